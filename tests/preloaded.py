"""A process that has imported what commands need, and runs each command in a fork of itself.

To the shell that calls it, such a command is a program: it has arguments, streams, a working
folder, an exit code and memory of its own. Only the second that imports take is saved. A command
with variables of its own, and a server, which a signal to its group ends, start as programs do.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

# Nothing here may start a thread or compute: a fork would not have the thread.
MODULES = ("outlier_mlx.cli", "mlx_lm", "datasets", "lm_eval", "openai")
# What a shell, or Python itself, sets for each command.
OF_SHELLS = ("PWD", "OLDPWD", "SHLVL", "_", "LC_CTYPE")
CLIENT = """#!{python} -IS
import json, os, socket, sys
arguments, variables = sys.argv[1:], dict(os.environ)
for name in {of_shells!r}:
    variables.pop(name, None)
if arguments[:1] != ["serve"] and variables == {variables!r}:
    with socket.socket(socket.AF_UNIX) as to:
        to.connect({address!r})
        asked = json.dumps([{program!r}, arguments, os.getcwd()]).encode()
        socket.send_fds(to, [len(asked).to_bytes(4, "big")], [0, 1, 2])
        to.sendall(asked)
        answer = to.recv(4)
    sys.exit(int.from_bytes(answer, "big") if len(answer) == 4 else "no answer")
os.execv({program!r}, [{program!r}, *arguments])
"""


@contextmanager
def preloaded(
    program: Path, folder: Path, environment: dict[str, str], modules: Sequence[str] = MODULES
) -> Iterator[dict[str, str]]:
    """The environment, with a stand-in for a Python program first in its PATH; as it is on macOS,
    where a fork cannot use the GPU.

    Args:
        program: a script of Python, as pip installs them.
        folder: an empty one, for the stand-in.
        environment: of the process that is forked.
        modules: what it imports first.
    """
    if sys.platform == "darwin":
        yield environment
        return
    environment = environment | {"PATH": f"{folder}{os.pathsep}{environment['PATH']}"}
    stand_in, address = folder / program.name, str(folder / "socket")
    variables = {name: text for name, text in environment.items() if name not in OF_SHELLS}
    texts = {"python": sys.executable, "of_shells": OF_SHELLS, "variables": variables}
    stand_in.write_text(CLIENT.format(address=address, program=str(program), **texts))
    stand_in.chmod(0o755)
    command = [sys.executable, __file__, address, *modules]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        try:
            yield environment
        finally:
            process.terminate()


def _run(asked: bytes, streams: list[int]) -> None:
    """Become the program that is asked for."""
    program, arguments, folder = json.loads(asked)
    for to, stream in enumerate(streams):
        os.dup2(stream, to)
        os.close(stream)
    os.chdir(folder)
    sys.argv = [program, *arguments]
    sys.path[0] = str(Path(program).parent)
    runpy.run_path(program, run_name="__main__")


def _received(client: socket.socket) -> tuple[bytes, list[int]]:
    head, streams, _, _ = socket.recv_fds(client, 4, 3)
    asked = b""
    while len(asked) < int.from_bytes(head, "big"):
        asked += client.recv(1 << 16)
    return asked, streams


def _main(address: str, *modules: str) -> None:
    for name in modules:
        import_module(name)
    gc.freeze()  # else each fork would copy and free all of it as it ends
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen(64)
        print("ready", flush=True)
        while True:
            client, _ = listening.accept()
            asked, streams = _received(client)
            if not os.fork():
                break
            client.close()
            for stream in streams:
                os.close(stream)
    # One process waits for the other, which is the program.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if child := os.fork():
        for stream in (0, 1, 2, *streams):
            os.close(stream)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        client.sendall((code if code >= 0 else 128 - code).to_bytes(4, "big"))
        os._exit(0)
    client.close()
    _run(asked, streams)


if __name__ == "__main__":
    _main(*sys.argv[1:])
