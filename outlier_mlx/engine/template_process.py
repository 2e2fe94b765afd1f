"""Renders the templates of models and tasks. Run as a program of its own, never imported.

Such templates are programs of strangers in Jinja, and no sandbox of Jinja bounds them: an operator,
a filter or a loop can take any time and any memory, and often runs as one call into C. Here the
system ends them: the kernel stops this process when a template has used its processor time, and on
Linux refuses memory beyond the limit. `bounded.py` starts the process, and watches it.

Each line on stdin is a JSON object with "template", "kind" and "variables"; each line on stdout is
one with "text", or with "error" and whether the process ends after it.
"""

import json
import re
import resource
import signal
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any

_MAX_ERROR = 400


def main() -> None:
    """Answer requests until stdin ends.

    The argument is JSON: the limits, and the folders of Jinja's packages. Nothing else can be
    imported.
    """
    given = json.loads(sys.argv[1])
    sys.path.extend(given["folders"])
    make = {"chat": _chat_environment, "task": _task_environment}

    @lru_cache(64)
    def compiled(kind: str, text: str) -> Any:
        return make[kind]().from_string(text)

    compiled("chat", "")  # imports what the first template would
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, whatever it is doing
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # macOS counts address space that it only reserves
        resource.setrlimit(resource.RLIMIT_AS, (given["memory"], given["memory"]))
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, given["seconds"])
        reply = _reply(compiled, line, given["characters"])
        data = json.dumps(reply).encode() + b"\n"
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        if reply.get("ends"):
            return


def _reply(compiled: Any, line: bytes, characters: int) -> dict[str, Any]:
    from jinja2 import TemplateError, TemplateSyntaxError
    from jinja2.sandbox import SecurityError

    try:
        asked = json.loads(line)
        text = compiled(asked["kind"], asked["template"]).render(**asked["variables"])
        if len(text) > characters:
            return {"error": f"its text has more than {characters:,} characters"}
        text.encode()  # half a surrogate pair is no text
        return {"text": text}
    except MemoryError:
        return {"error": "it needs too much memory", "ends": True}
    except RecursionError:
        return {"error": "it is nested too deeply, or calls itself without end"}
    except TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: {error.message}"[:_MAX_ERROR]}
    except Exception as error:  # a template can raise anything
        said = isinstance(error, TemplateError) and not isinstance(error, SecurityError)
        return {"error": f"{'' if said else type(error).__name__ + ': '}{error}"[:_MAX_ERROR]}


def _chat_environment() -> Any:
    """What chat templates expect, as transformers has it in `utils/chat_template_utils.py`."""
    from jinja2 import TemplateError, ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(ext.Extension):
        """The tags around a reply, with which transformers finds replies to train on."""

        tags = {"generation"}  # noqa: RUF012 - as the base class has it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    class PlainNamespace(Namespace):
        """Jinja's namespace without names that mean something to Python."""

        def __init__(*given: Any, **names: Any) -> None:
            self, *rest = given
            Namespace.__init__(self, {})
            for name, value in dict(*rest, **names).items():
                self[name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise TemplateError(f"a namespace cannot hold the name {name}")
            super().__setitem__(name, value)

    class Dictionaries:
        """Makes dictionaries; the type itself would offer more."""

        def __call__(self, *pairs: Any, **names: Any) -> dict[Any, Any]:
            return dict(*pairs, **names)

        def fromkeys(self, *given: Any) -> dict[Any, Any]:
            return dict.fromkeys(*given)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def fail(message: object) -> None:
        raise TemplateError(str(message))

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals.update(
        raise_exception=fail,
        strftime_now=lambda form: datetime.now().strftime(form),
        dict=Dictionaries(),
        namespace=PlainNamespace,
    )
    return environment


def _task_environment() -> Any:
    """What lm-evaluation-harness offers the templates of tasks (`lm_eval/utils.py`)."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["regex_replace"] = lambda text, pattern, new, count=0: re.sub(
        pattern, new, text, count=count
    )
    return environment


if __name__ == "__main__":
    main()
