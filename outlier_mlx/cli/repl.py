"""The loop of `outlier-mlx chat`: reads lines, runs commands, shows replies."""

import io
import os
import signal
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from outlier_mlx.cli.markdown import renders_markdown, reply_writer
from outlier_mlx.engine import sessions as files
from outlier_mlx.engine.conversation import Conversation
from outlier_mlx.engine.distributed.ranks import ranks, shared
from outlier_mlx.engine.responses import Response
from outlier_mlx.errors import OutlierError, did_you_mean
from outlier_mlx.terminal import after_reading, color_system

PROMPT = ">>> "
MORE = "... "
BLOCK = '"""'
HELP = {
    "/help": "show this list",
    "/reset": "start a new conversation with the same system prompt",
    "/system [TEXT]": "set the system prompt, or show it",
    "/temp [X]": "set the sampling temperature, or show it; 0: greedy",
    "/save FILE": "save the conversation; as FILE.safetensors, with its KV cache",
    "/load FILE": "continue a saved conversation",
    "/exit": "end the program, like Ctrl-D",
}
HINTS = (
    'Begin and end a message of several lines with """.',
    "For a message that begins with /, type //. Ctrl-C stops a reply.",
)


class Finished(Exception):
    """The user ended the program."""


@dataclass
class Chat:
    """A conversation on a terminal or in a pipe.

    Attributes:
        conversation: messages, KV cache and model.
        model: `files.identity` of the model.
        cache_file: file that keeps the conversation and its KV cache between runs, or None.
        quiet: show no statistics.
        out: console for replies.
        err: console for everything else.
    """

    conversation: Conversation
    model: str
    cache_file: Path | None = None
    quiet: bool = False
    out: Console = field(
        default_factory=lambda: Console(highlight=False, color_system=color_system())
    )
    err: Console = field(
        default_factory=lambda: Console(stderr=True, highlight=False, color_system=color_system())
    )

    def __post_init__(self) -> None:
        """Check whether input and output are terminals."""
        self.asks = sys.stdin.isatty()
        self.markdown = renders_markdown(self.out)
        self._known: set[Path] = set()

    def run(self) -> None:
        """Answer messages and commands until the user ends the program.

        Raises:
            OutlierError: a command or reply failed without a terminal; or the cache file is not a
                saved conversation.
        """
        if self.cache_file is not None and self.cache_file.exists():
            self._load(self.cache_file)
        if isinstance(sys.stdin, io.TextIOWrapper) and not self.asks:
            sys.stdin.reconfigure(errors="replace")
        if self.asks:
            _use_readline()
            if not self.quiet:
                self._note("/help lists the commands; Ctrl-D ends the program")
        with suppress(Finished):
            while True:
                self._turn()
        if self.cache_file is not None and self.conversation.messages:
            files.save(self.cache_file, self.conversation, self.model)

    def _turn(self) -> None:
        try:
            text = self._read()
            if text.startswith("/") and not text.startswith("//"):
                self._command(*text.strip().partition(" ")[::2])
            elif text.strip():
                self._reply(text.removeprefix("/") if text.startswith("//") else text)
        except EOFError:
            if self.asks:
                self.err.print()
            raise Finished from None
        except KeyboardInterrupt:
            if not self.asks or ranks().size > 1:
                raise
            self.err.print()
            self._note("Ctrl-D or /exit ends the program")
        except (OutlierError, OSError) as error:
            if not self.asks:
                raise
            self._note(str(error), "[red]error:[/] ")

    def _read(self) -> str:
        """Read a message: one line, or the lines between triple quotes."""
        line = self._line(PROMPT)
        if not line.startswith(BLOCK):
            return line
        lines = [line.removeprefix(BLOCK)]
        while not lines[-1].rstrip().endswith(BLOCK):
            try:
                lines.append(self._line(MORE))
            except EOFError:
                raise OutlierError(f"the message has no {BLOCK} at its end") from None
        lines[-1] = lines[-1].rstrip().removesuffix(BLOCK)
        return "\n".join(lines).strip("\n")

    def _line(self, prompt: str) -> str:
        """A line that the user types; on several ranks, all get the one of the first."""
        if ranks().size == 1:
            return self._typed(prompt)
        line = None
        with suppress(EOFError):
            line = self._typed(prompt) if ranks().leads else None
        line = shared(line)
        if line is None:
            raise EOFError
        return str(line)

    def _typed(self, prompt: str) -> str:
        if self.asks and self.out.is_terminal:
            return input(prompt)
        if self.asks:
            self.err.print(prompt, end="")
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")

    def _reply(self, text: str) -> None:
        last: Response | None = None
        with _interrupts() as stopped:
            responses = after_reading(
                lambda progress: self.conversation.reply(text, progress=progress, stopped=stopped),
                quiet=self.quiet,
            )
            with reply_writer(self.out, markdown=self.markdown) as writer:
                for last in responses:
                    writer.write(last.text)
        if not self.markdown and last is not None:
            self.out.file.write("\n")
            self.out.file.flush()
        if stopped():
            if not self.asks:
                raise KeyboardInterrupt
            self._note("interrupted")
        if last is not None and self.asks and not self.quiet:
            self._statistics(last)

    def _statistics(self, last: Response) -> None:
        limit = " (limit of --max-tokens)" if last.finish_reason == "length" else ""
        drafted = f"; {last.counts}" if last.counts.drafted else ""
        self._note(
            f"{last.prompt_tokens} tokens read, {last.generation_tokens} written{limit},"
            f" {last.generation_tps:.1f} tokens/s{drafted}"
        )

    def _command(self, name: str, argument: str) -> None:
        argument = argument.strip()
        known = {usage.split()[0]: usage for usage in HELP}
        if name not in known:
            hint = did_you_mean(name, known) or "; /help lists them"
            raise OutlierError(f"unknown command {name}{hint}")
        if "FILE" in known[name] and ranks().size > 1:
            raise OutlierError(f"{name}: not with several ranks: a KV cache is spread over them")
        if "FILE" in known[name] and not argument:
            raise OutlierError(f"usage: {known[name]}")
        {
            "/help": self._help,
            "/reset": self._reset,
            "/system": self._system,
            "/temp": self._temp,
            "/save": self._save,
            "/load": lambda text: self._load(_path(text)),
            "/exit": self._exit,
        }[name](argument)

    def _help(self, _: str) -> None:
        width = max(map(len, HELP))
        for usage, meaning in HELP.items():
            self.err.print(f"[bold]{escape(usage.ljust(width))}[/]  {meaning}")
        for hint in HINTS:
            self._note(hint)

    def _reset(self, _: str) -> None:
        self.conversation.reset()
        self._note("new conversation")

    def _exit(self, _: str) -> None:
        raise Finished

    def _system(self, text: str) -> None:
        if text:
            self.conversation.set_system(text)
        self._note(f"system prompt: {self.conversation.options.system_prompt or 'none'}")

    def _temp(self, text: str) -> None:
        options = self.conversation.options
        if text:
            try:
                temp = float(text)
            except ValueError:
                temp = -1.0
            if not 0 <= temp <= 100:
                raise OutlierError(f"/temp {text}: expected a number from 0 to 100")
            self.conversation.options = options = replace(options, temp=temp)
        self._note(f"temperature: {options.temp:g}")

    def _save(self, text: str) -> None:
        path = _path(text)
        if path.exists() and path.resolve() not in self._known:
            raise OutlierError(f"{path} exists; choose another name, or remove it first")
        files.save(path, self.conversation, self.model)
        self._known.add(path.resolve())
        self._note(f"saved {path}")

    def _load(self, path: Path) -> None:
        if not path.is_file():
            raise OutlierError(f"{path}: no such file")
        files.load(path, self.conversation, self.model)
        self._known.add(path.resolve())
        self._note(f"{path}: {len(self.conversation.messages) // 2} messages and their replies")

    def _note(self, text: str, sign: str = "") -> None:
        shown = sign + escape(text) if sign else f"[dim]{escape(text)}[/]"
        # Do not wrap lines for a program that reads them.
        self.err.print(shown, soft_wrap=not self.err.is_terminal)


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))  # noqa: PTH111 - this one never raises


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Catch the first Ctrl-C; the yielded function says whether it came. A second one raises."""
    seen: list[int] = []

    def note(number: int, _: object) -> None:
        if seen or ranks().size > 1:  # the others would go on
            raise KeyboardInterrupt
        seen.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        with _no_echo():
            yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _no_echo() -> Iterator[None]:
    """Do not show typed characters, such as ^C, in the middle of the reply."""
    if not sys.stdin.isatty():
        yield
        return
    place = sys.stdin.fileno()
    before = termios.tcgetattr(place)
    changed = termios.tcgetattr(place)
    changed[3] &= ~termios.ECHO
    termios.tcsetattr(place, termios.TCSADRAIN, changed)
    try:
        yield
    finally:
        termios.tcsetattr(place, termios.TCSADRAIN, before)


def _use_readline() -> None:
    """Turn on line editing, history and Tab completion, if Python has the module."""
    try:
        import readline
    except ImportError:
        return
    names = [usage.split()[0] for usage in HELP]

    def complete(text: str, state: int) -> str | None:
        found = [f"{name} " for name in names if name.startswith(text)] if text[:1] == "/" else []
        return found[state] if state < len(found) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" ")
    libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
