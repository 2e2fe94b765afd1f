"""Finds the memory of a pointer in IR: a buffer, threadgroup array or private variable."""

import re
from dataclasses import dataclass

from . import ir


@dataclass(frozen=True)
class Origin:
    """The memory that a pointer points into."""

    kind: str  # "buffer", "array" (of the threadgroup), "thread" (its position), "private", "table"
    index: int = 0


class Origins:
    """Follows the pointers of one function to their origins."""

    def __init__(self, function: ir.Function) -> None:
        self.function = function
        self.known: dict[str, Origin | None] = {}
        self.visiting: set[str] = set()
        self.is_entry = function.name == "emu_entry"

    def of(self, operand: str) -> Origin | None:
        """The origin of a pointer operand; None if it is unknown or may be one of several."""
        operand = operand.strip().rstrip(",")
        cast = r"(?:getelementptr|addrspacecast|bitcast)\b.*?"
        inner = re.match(cast + r"ptr(?: addrspace\(\d+\))? ([@%][\w.$\"]+)", operand)
        if inner:
            operand = inner[1]
        if operand.startswith("@"):
            return Origin("table")
        if operand in self.known:
            return self.known[operand]
        if operand in self.visiting:  # a loop's own value adds nothing
            return None
        self.visiting.add(operand)
        found = self._find(operand)
        self.visiting.discard(operand)
        if found or not self.visiting:
            self.known[operand] = found
        return found

    def _find(self, operand: str) -> Origin | None:
        made = self.function.definitions.get(operand)
        if made is None:
            return Origin("thread") if self.is_entry else None
        if made.opcode == "alloca":
            return Origin("private")
        if made.opcode == "call":
            kind = {
                "emu_device_buffer": "buffer",
                "emu_constant_buffer": "buffer",
                "emu_threadgroup": "array",
            }.get(made.callee or "")
            index = ir.constant_argument(made, 0) if kind else None
            return Origin(kind, index) if kind and index is not None else None
        if made.opcode in ("getelementptr", "addrspacecast", "bitcast", "freeze"):
            base = re.search(r"ptr(?: addrspace\(\d+\))? ([@%](?:\"[^\"]*\"|[\w.$-]+))", made.text)
            return self.of(base[1]) if base else None
        if made.opcode in ("phi", "select"):
            values = made.operands if made.opcode == "phi" else made.operands[1:]
            if (
                made.opcode == "phi"
            ):  # labels are operands too: keep what stands in [ value, label ]
                values = re.findall(r"\[ ([^,\]]+), ", made.text)
            origins = {self.of(v) for v in values if v not in ("null", "poison", "undef")}
            origins.discard(None)
            return origins.pop() if len(origins) == 1 else None
        return None


@dataclass(frozen=True)
class Access:
    """A read or write of memory by an instruction."""

    write: bool
    bytes: int
    align: int
    pointer: str  # the operand with its type: "ptr addrspace(1) %3"
    origin: Origin | None
    atomic: bool = False


def _pointer(text: str) -> tuple[str, str]:
    """Splits `ptr addrspace(1) noundef align 4 %3` into the type and the operand."""
    found = re.match(
        r"(ptr(?: addrspace\(\d+\))?)((?: (?:noundef|nonnull|captures\([^)]*\)|"
        r"readonly|writeonly|align \d+|dereferenceable\(\d+\)|noalias))*) (.*)$",
        text,
    )
    if found is None:
        raise ValueError(f"not a pointer operand: {text}")
    operand = found[3]
    return found[1], operand.split()[0] if operand[0] in "%@" else operand


def _after(text: str, start: int) -> str:
    """The operand from `start` up to the next comma outside brackets."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "(<[{") - (text[i] in ")>]}")
        if depth == 0 and text[i] == ",":
            return text[start:i]
    return text[start:]


def accesses(instruction: ir.Instruction, origins: Origins) -> list[Access]:
    """The memory that an instruction touches."""
    text, opcode = instruction.text, instruction.opcode
    aligned = re.search(r", align (\d+)", text)
    align = int(aligned[1]) if aligned else 1
    if opcode in ("load", "store", "atomicrmw", "cmpxchg"):
        at = re.search(r"ptr(?: addrspace\(\d+\))? ", text)
        if opcode == "store":  # the value comes first, and may be a pointer itself
            at = re.search(r", (ptr(?: addrspace\(\d+\))? .*)$", text)
            start = at.start(1) if at else 0
        else:
            start = at.start() if at else 0
        kind, operand = _pointer(_after(text, start))
        origin = origins.of(operand)
        pointer = f"{kind} {operand}"
        if opcode in ("load", "store"):
            size = ir.byte_size(instruction.type)
            return [Access(opcode == "store", size, align, pointer, origin, "atomic" in text)]
        value = ir.first_type(text[start + len(_after(text, start)) + 1 :])
        size = ir.byte_size(value)
        return [Access(w, size, align, pointer, origin, True) for w in (False, True)]
    callee = instruction.callee or ""
    if callee.startswith(("llvm.memcpy", "llvm.memmove", "llvm.memset")):
        arguments = ir.call_arguments(instruction)
        size = ir.constant_argument(instruction, 2) or 0
        found = []
        for index, argument in enumerate(arguments[: 1 if "memset" in callee else 2]):
            given = re.search(r"align (\d+)", argument)
            kind, operand = _pointer(argument)
            found.append(
                Access(
                    index == 0,
                    size,
                    int(given[1]) if given else 1,
                    f"{kind} {operand}",
                    origins.of(operand),
                )
            )
        return found
    return []
