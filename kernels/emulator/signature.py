"""Parses a kernel's signature: its buffers and thread attributes."""

import re
from dataclasses import dataclass

from .errors import EmulatorError

# The attributes of a thread, in the order of the runtime's array.
ATTRIBUTES = [
    "thread_position_in_grid",
    "thread_position_in_threadgroup",
    "threadgroup_position_in_grid",
    "threads_per_threadgroup",
    "dispatch_threads_per_threadgroup",
    "threads_per_grid",
    "threadgroups_per_grid",
    "thread_index_in_threadgroup",
    "thread_index_in_simdgroup",
    "simdgroup_index_in_threadgroup",
    "simdgroups_per_threadgroup",
    "dispatch_simdgroups_per_threadgroup",
    "thread_index_in_quadgroup",
    "quadgroup_index_in_threadgroup",
    "quadgroups_per_threadgroup",
    "dispatch_quadgroups_per_threadgroup",
    "threads_per_simdgroup",
    "grid_origin",
]
_SAME = {"grid_size": "threads_per_grid", "thread_execution_width": "threads_per_simdgroup"}


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel."""

    type: str  # as written, without the attribute: "const device float*"
    name: str
    buffer: int | None  # index of the buffer it is bound to
    attribute: str | None  # or the thread attribute it carries

    @property
    def written(self) -> bool:
        """Whether the kernel may write through it."""
        return self.buffer is not None and "device" in self.type and "const " not in self.type


@dataclass(frozen=True)
class Signature:
    """A kernel's name, its template arguments as written, and its parameters."""

    name: str
    arguments: str  # "" or "<half, 128>"
    parameters: tuple[Parameter, ...]

    @property
    def buffers(self) -> list[Parameter]:
        """The parameters bound to buffers, by index."""
        bound = [p for p in self.parameters if p.buffer is not None]
        return sorted(bound, key=lambda p: p.buffer or 0)


def _matching(text: str, start: int) -> int:
    """The index after the bracket that closes the one at `start`."""
    pairs = {"(": ")", "[": "]", "{": "}", "<": ">"}
    closing = [pairs[text[start]]]
    i = start
    while closing:
        i += 1
        if i == len(text):
            raise EmulatorError(f"unbalanced brackets after {text[start : start + 40]!r}")
        if text[i] == closing[-1]:
            closing.pop()
        elif text[i] in pairs and (text[i] != "<" or text[start] == "<"):
            closing.append(pairs[text[i]])
    return i + 1


def _split(text: str) -> list[str]:
    """Splits at commas outside brackets."""
    parts, depth, last = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "(<[{") - (c in ")>]}")
        if c == "," and depth == 0:
            parts.append(text[last:i])
            last = i + 1
    return [part.strip() for part in [*parts, text[last:]] if part.strip()]


def parse(text: str, name: str, arguments: str = "") -> Signature:
    """Reads the signature of kernel `name` in Metal source text."""
    found = re.search(rf"\bvoid\s+{re.escape(name)}\s*\(", text)
    if found is None:
        raise EmulatorError(f"no kernel {name} in the source")
    end = _matching(text, found.end() - 1)
    parameters = []
    for part in _split(text[found.end() : end - 1]):
        attribute = re.search(r"\[\[\s*(\w+)\s*(?:\(\s*(\d+)\s*\))?\s*\]\]", part)
        if attribute is None:
            raise EmulatorError(f"{name}: parameter {part!r} has no attribute")
        declared = re.match(r"(.*?)(\w+)\s*$", part[: attribute.start()], flags=re.S)
        if declared is None:
            raise EmulatorError(f"{name}: cannot read parameter {part!r}")
        kind, index = attribute[1], attribute[2]
        kind = _SAME.get(kind, kind)
        if kind != "buffer" and kind not in ATTRIBUTES:
            raise EmulatorError(f"{name}: the attribute [[{kind}]] is not supported")
        bound = int(index) if kind == "buffer" else None
        type_text = " ".join(declared[1].split())
        parameters.append(
            Parameter(type_text, declared[2], bound, None if kind == "buffer" else kind)
        )
    return Signature(name, arguments, tuple(parameters))


def parse_generated(text: str) -> tuple[str, Signature]:
    """Splits MLX's generated text into the text to compile and the kernel's signature.

    The explicit instantiation at the end has the template arguments. It is removed from the text,
    because its attributes are not C++.
    """
    tail = re.search(
        r"^template \[\[host_name\(\"[^\"]*\"\)\]\] \[\[kernel\]\] decltype\(.*\)\s+"
        r"(\w+)(<.*>);\s*\Z",
        text,
        flags=re.M,
    )
    if tail:
        return text[: tail.start()], parse(text, tail[1], tail[2])
    names = re.findall(r"\[\[kernel\]\] void (\w+)\s*\(", text)
    if not names:
        raise EmulatorError("MLX's text has no [[kernel]]")
    return text, parse(text, names[-1])


def entry(signature: Signature) -> str:
    """The source of the function that the runtime calls: it calls the kernel with its arguments."""
    arguments = []
    for p in signature.parameters:
        if p.buffer is not None:
            space = "constant" if re.search(r"\bconstant\b", p.type) else "device"
            how = "reference" if p.type.endswith("&") else "pointer"
            arguments.append(f"emu_{space}_{how}{{{p.buffer}u}}")
        else:
            at = f"t->a[{ATTRIBUTES.index(p.attribute or '')}]"
            lanes = p.type[-1] if p.type[-1:] in "234" else ""
            values = [f"{at}[{d}]" for d in range(int(lanes or 1))]
            arguments.append(f"{p.type}({', '.join(values)})")
    call = f"{signature.name}{signature.arguments}({', '.join(arguments)})"
    return f"""struct emu_thread {{ uint a[{len(ATTRIBUTES)}][3]; }};
extern "C" __attribute__((used)) void emu_entry(const thread emu_thread* t) {{ {call}; }}
"""
