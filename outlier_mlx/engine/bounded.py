"""Templates in Jinja, rendered within limits of time, memory and size by processes of their own.

A chat template comes with a model, and the templates of tasks come with task files: strangers wrote
them. `template_process.py` renders them, and can import nothing of this project. A process stays
for the next template, which then costs some tenths of a millisecond; one that exceeds a limit is
ended and replaced.
"""

import atexit
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from outlier_mlx.errors import OutlierError

#: Processor time for one template, in seconds; ordinary ones take some thousandths.
MAX_SECONDS = 2.0
#: Time by the clock, in seconds, for a process that gets little processor time.
MAX_WAIT = 10.0
#: Memory of a process that renders, in bytes; it starts with 30 MB.
MAX_MEMORY = 512 << 20
#: Length of the rendered text, in characters.
MAX_CHARACTERS = 8 << 20
#: Processes at a time.
MAX_PROCESSES = 4
# Seconds between two looks at the memory of a process.
_WATCH = 0.05
# Two escapes of six characters: the most that JSON needs for one character.
_ESCAPED = 12


class TemplateError(OutlierError):
    """A template refuses what it is given, fails, or exceeds its limits."""


def render_within_limits(
    template: str, variables: Mapping[str, Any], kind: Literal["chat", "task"] = "chat"
) -> str:
    """Render a template in another process.

    Args:
        template: text in Jinja.
        variables: its variables; what JSON does not know becomes a list or a text.
        kind: "chat" offers what chat templates expect; "task", what the tasks of
            lm-evaluation-harness do.

    Raises:
        TemplateError: the template fails, or exceeds its limits; the message is the reason alone.
    """
    asked = {"template": template, "kind": kind, "variables": variables}
    try:
        request = json.dumps(asked, default=_plain).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise TemplateError(f"its variables are no JSON: {error}") from None
    reply = _ask(request)
    if isinstance(text := reply.get("text"), str):
        return text
    raise TemplateError(str(reply.get("error")))


def text_after_reply(template: str, special: Mapping[str, Any]) -> str:
    """What a chat template writes after a reply, without blanks before it; empty if it fails.

    Args:
        template: the template.
        special: texts of special tokens by name, such as "eos_token".
    """
    reply = "reply-7d41"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": reply}]
    given = {"messages": messages, "add_generation_prompt": False, "tools": None}
    try:
        text = render_within_limits(template, dict(special) | given)
    except TemplateError:
        return ""
    _, found, rest = text.rpartition(reply)
    return rest.lstrip() if found else ""


def _plain(value: Any) -> Any:
    """An array as a list, anything else as text."""
    as_list = getattr(value, "tolist", None)
    return as_list() if callable(as_list) else str(value)


class _Process:
    """A process that renders one template after the other."""

    def __init__(self) -> None:
        folders = [str(Path(_origin(name)).parents[1]) for name in ("jinja2", "markupsafe")]
        given = {
            "folders": folders,
            "seconds": MAX_SECONDS,
            "memory": MAX_MEMORY,
            "characters": MAX_CHARACTERS,
        }
        program = Path(__file__).with_name("template_process.py")
        # -I and -S: no environment variables, no site-packages, nothing of the current folder.
        command = [sys.executable, "-I", "-S", str(program), json.dumps(given)]
        pipe = subprocess.PIPE
        self._running = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, bufsize=0
        )
        assert self._running.stdin is not None and self._running.stdout is not None
        self._input, self._output = self._running.stdin.fileno(), self._running.stdout.fileno()
        self._ready = selectors.DefaultSelector()
        self._ready.register(self._output, selectors.EVENT_READ)

    def alive(self) -> bool:
        """Whether the process has not ended."""
        return self._running.poll() is None

    def ask(self, request: bytes) -> dict[str, Any]:
        """Send a line, and wait for the line that answers it.

        Raises:
            TemplateError: the process exceeded a limit, or ended.
        """
        rest = memoryview(request)
        try:
            while rest:
                rest = rest[os.write(self._input, rest) :]
        except BrokenPipeError:
            raise TemplateError(self._end_reason()) from None
        line = bytearray()
        deadline = time.monotonic() + MAX_WAIT
        while not line.endswith(b"\n"):
            if time.monotonic() > deadline:
                raise TemplateError(f"it takes longer than {MAX_WAIT:g} s")
            if not self._ready.select(_WATCH):
                # On Linux the kernel refuses memory; macOS has no such limit.
                if _resident(self._running.pid) > MAX_MEMORY:
                    raise TemplateError("it needs too much memory")
                continue
            piece = os.read(self._output, 1 << 16)
            if not piece:
                raise TemplateError(self._end_reason())
            line += piece
            if len(line) > _ESCAPED * MAX_CHARACTERS:
                raise TemplateError("its text is too long")
        reply = json.loads(line)
        return reply if isinstance(reply, dict) else {}

    def _end_reason(self) -> str:
        code = self._running.wait(MAX_WAIT)
        if code == -signal.SIGPROF:
            return f"it takes more than {MAX_SECONDS:g} s of processor time"
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"its process ended ({name})"

    def end(self) -> None:
        """End the process and close its pipes."""
        self._running.kill()
        self._running.wait()
        self._ready.close()
        for stream in (self._running.stdin, self._running.stdout):
            if stream is not None:
                stream.close()


_idle: list[_Process] = []
_slots = threading.BoundedSemaphore(MAX_PROCESSES)
# A child of `fork` shares the pipes; its own templates need processes of their own.
os.register_at_fork(after_in_child=_idle.clear)


def _ask(request: bytes) -> dict[str, Any]:
    with _slots:
        process = _take()
        try:
            reply = process.ask(request)
            if reply.get("ends"):
                process.end()
            else:
                _idle.append(process)
            return reply
        except BaseException:  # Ctrl-C, too: an answer that nobody read would be the next one's
            process.end()
            raise


def _take() -> _Process:
    """An idle process, or a new one."""
    while True:
        try:
            process = _idle.pop()
        except IndexError:
            return _Process()
        if process.alive():
            return process
        process.end()


@atexit.register
def _end_all() -> None:
    while _idle:
        _idle.pop().end()


def _origin(package: str) -> str:
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None
    return spec.origin


def _resident(process: int) -> int:
    """The memory of a process in bytes, as `ps` tells it on macOS and Linux; 0 if it does not."""
    command = ["ps", "-o", "rss=", "-p", str(process)]
    try:
        said = subprocess.run(command, capture_output=True, timeout=5, check=False).stdout
        return int(said) << 10
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0
