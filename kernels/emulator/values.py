"""The registers of a function's values.

A register has 16 bits: a half or ushort is in one, a float or uint in two, a pointer or 64-bit
integer in four. Many instructions of the IR only name registers differently: a component of a
vector, the same bits as another type, an operand that an instruction widens itself. Values that
depend on no thread, such as sizes and pointers to buffers, are in other registers ("uniform"),
which are not scarce.
"""

import re
from collections import Counter

from . import ir
from .signature import ATTRIBUTES
from .trace import Origins, accesses

Part = tuple[int, ...]  # the registers of one component, the lowest bits first
UNIFORM = 0  # stands for any uniform register
_POSITIONS = ("thread_", "threadgroup_position", "simdgroup_index", "quadgroup_index")
_POINTERS = ("emu_device", "emu_constant", "emu_threadgroup")  # and not its barriers: no result
_CONVERSIONS = {
    "zext", "sext", "trunc", "fpext", "fptrunc", "bitcast", "addrspacecast", "sitofp", "uitofp",
    "fptosi", "fptoui", "ptrtoint", "inttoptr",
}  # fmt: skip
_SAME = {"freeze", "addrspacecast", "ptrtoint", "inttoptr", "fneg", "call"}


class Values:
    """Gives registers to the values of a function.

    Args:
        function: the function.
        origins: the origins of its pointers.
        kinds: from `classify`: instructions without a class are not issued.
    """

    def __init__(
        self, function: ir.Function, origins: Origins, kinds: dict[int, Counter[str]]
    ) -> None:
        self.function = function
        self.origins = origins
        self.kinds = kinds
        self.known: dict[str, list[Part]] = {}
        self.count = 0
        self.issued: set[str] = set()  # values that have registers of their own
        self.uniform: set[str] = set()  # values that are the same for all threads of a launch
        for i in function:
            if i.opcode == "phi" and i.result:
                self._own(i)
        for i in function:
            if i.result:
                self.parts(i.result)

    def parts(self, value: str) -> list[Part]:
        """The registers of each component of a value."""
        if value not in self.known:
            made = self.function.definitions.get(value)
            if made is None:
                return [(UNIFORM,)]
            self.known[value] = self._alias(made) or self._uniform(made) or self._own(made)
        return self.known[value]

    def all(self, value: str) -> set[int]:
        """All registers of a value but uniform ones."""
        return {r for part in self.parts(value) for r in part if r != UNIFORM}

    def read(self, i: ir.Instruction) -> set[int]:
        """The registers that an instruction reads."""
        return set[int]().union(*(self.all(value) for value in i.operands))

    def written(self, i: ir.Instruction) -> set[int]:
        """The registers that an instruction writes."""
        return self.all(i.result) if i.result in self.issued and i.result else set()

    def _own(self, i: ir.Instruction) -> list[Part]:
        kind, found = result_type(i), []
        width = _registers(kind)
        for _ in range(ir.lanes(kind)):
            found.append(tuple(range(self.count + 1, self.count + 1 + width)))
            self.count += width
        self.known[i.result or ""] = found
        self.issued.add(i.result or "")
        return found

    def _uniform(self, i: ir.Instruction) -> list[Part] | None:
        """The registers of a value that is the same for all threads of a launch, else None."""
        callee = i.callee or ""
        if i.opcode in ("phi", "alloca", "atomicrmw", "cmpxchg") or self.read(i):
            return None
        if callee.startswith("emu_") and not callee.startswith(_POINTERS):
            return None
        if i.opcode == "load" and not self._is_uniform_load(i):
            return None
        kind = result_type(i)
        self.uniform.add(i.result or "")
        return [(UNIFORM,) * _registers(kind)] * ir.lanes(kind)

    def _is_uniform_load(self, i: ir.Instruction) -> bool:
        """Whether a load from a uniform address is made once for a launch."""
        access = accesses(i, self.origins)[0]
        if access.origin and access.origin.kind == "thread":
            return not self._attribute(access.pointer).startswith(_POSITIONS)
        return "constant load" in self.kinds[id(i)]

    def _attribute(self, pointer: str) -> str:
        """The attribute of a thread that is at an address."""
        value, offset = pointer.split()[-1], 0
        while made := self.function.definitions.get(value):
            found = re.search(r"i\d+ (\d+)$", made.text)
            offset += int(found[1]) if found else 0
            value = made.operands[0]
        return ATTRIBUTES[min(offset // 12, len(ATTRIBUTES) - 1)]

    # -- other names

    def _alias(self, i: ir.Instruction) -> list[Part] | None:
        """The registers of other values that a value is in, if it has none of its own."""
        if self.kinds[id(i)] or i.opcode in ("load", "phi", "alloca"):
            return None
        if i.opcode == "call" and not (i.callee or "").startswith("llvm.fabs"):
            return None
        kind = result_type(i)
        method = getattr(self, f"_{i.opcode}", None)
        if method:
            return method(i, kind)
        if i.opcode in _SAME:
            return [self._sized(part, kind) for part in self.parts(i.operands[0])]
        return self._part_of_users(i, kind)

    def _part_of_users(self, i: ir.Instruction, kind: str) -> list[Part]:
        """An operation that its users do: they read all that it reads."""
        found: list[Part] = []
        for lane in range(ir.lanes(kind)):
            read: dict[int, None] = {}
            for value in i.operands:
                parts = self.parts(value)
                for part in [parts[lane]] if len(parts) == ir.lanes(kind) else parts:
                    read |= dict.fromkeys(part)
            found.append(tuple(read) or (UNIFORM,))
        return found

    def _sized(self, part: Part, kind: str) -> Part:
        width = _registers(kind)
        return part[:width] + (UNIFORM,) * (width - len(part))

    def _zext(self, i: ir.Instruction, kind: str) -> list[Part]:
        return [self._sized(part, kind) for part in self.parts(i.operands[0])] if i.operands else []

    _sext = _trunc = _fpext = _fptrunc = _zext

    def _lshr(self, i: ir.Instruction, kind: str) -> list[Part]:
        amount = re.search(r"(?:, | splat \(i\d+ )(\d+)\)?$", i.text)
        skipped = int(amount[1]) // 16 if amount else 0
        return [self._sized(part[skipped:], kind) for part in self.parts(i.operands[0])]

    _ashr = _lshr

    def _extractelement(self, i: ir.Instruction, kind: str) -> list[Part] | None:
        at = re.search(r"i\d+ (\d+)$", i.text)
        parts = self.parts(i.operands[0]) if i.operands else [(UNIFORM,)]
        return [parts[int(at[1])]] if at and int(at[1]) < len(parts) else None

    def _insertelement(self, i: ir.Instruction, kind: str) -> list[Part] | None:
        found = re.search(r"> (\S+|<.*>|splat \(.*\)), [\w]+ (\S+), i\d+ (\d+)$", i.text)
        if found is None:
            return None
        parts = list(self._vector(found[1], kind))
        parts[int(found[3])] = self._sized(self.parts(found[2])[0], kind)
        return parts

    def _shufflevector(self, i: ir.Instruction, kind: str) -> list[Part] | None:
        found = re.match(r"shufflevector (<\d+ x \w+>) (.*), \1 (.*), <\d+ x i32> (.*)$", i.text)
        if found is None:
            return None
        both = [*self._vector(found[2], found[1]), *self._vector(found[3], found[1])]
        lanes = re.findall(r"i32 (\d+|poison|undef)", found[4]) or ["0"]
        if len(lanes) == 1:
            lanes *= ir.lanes(kind)
        return [both[int(n)] if n.isdigit() else self._sized((), kind) for n in lanes]

    def _vector(self, operand: str, kind: str) -> list[Part]:
        if operand.startswith("%"):
            return self.parts(operand)
        return [self._sized((), kind)] * ir.lanes(kind)

    def _bitcast(self, i: ir.Instruction, kind: str) -> list[Part] | None:
        source = ir.first_type(i.text[len("bitcast") :])
        parts = self.parts(i.operands[0])
        if ir.bits(source) == ir.bits(kind):
            return parts
        if ir.bits(source) % 16 or ir.bits(kind) % 16:
            return None
        width, flat = _registers(kind), [r for part in parts for r in self._sized(part, source)]
        return [tuple(flat[n : n + width]) for n in range(0, len(flat), width)]

    def _getelementptr(self, i: ir.Instruction, kind: str) -> list[Part]:
        return self._part_of_users(i, "ptr")


def result_type(i: ir.Instruction) -> str:
    """The type of an instruction's result."""
    if i.opcode in _CONVERSIONS:
        found = re.search(r" to (<\d+ x \w+>|\w+)[^,]*$", i.text)
        return found[1] if found else i.type
    if i.opcode in ("icmp", "fcmp"):
        return "i1" if ir.lanes(i.type) == 1 else f"<{ir.lanes(i.type)} x i1>"
    if i.opcode in ("getelementptr", "alloca"):
        return "ptr"
    if i.opcode == "select":
        found = re.search(r", (<\d+ x \w+>|\w+)", i.text)
        return found[1] if found else i.type
    if i.opcode == "extractelement":
        return ir.element(i.type)
    if i.opcode == "shufflevector":
        found = re.search(r"<(\d+) x i32> \S*[^>]*>?$", i.text)
        return f"<{found[1]} x {ir.element(i.type)}>" if found else i.type
    return i.type


def _registers(kind: str) -> int:
    """The number of registers of one component."""
    return max(1, ir.bits(kind) // 16)
