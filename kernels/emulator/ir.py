"""A parser for the needed parts of LLVM's textual IR: functions, blocks, instructions, values."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

_LABEL = re.compile(r'^("[^"]*"|[\w$.-]+):')
_RESULT = re.compile(r'^\s*(%(?:"[^"]*"|[\w$.-]+))\s*=\s*(.*)$', re.S)
_VALUE = re.compile(r'%(?:"[^"]*"|[\w$.-]+)')
_TYPE_BITS = {"half": 16, "bfloat": 16, "float": 32, "double": 64, "ptr": 64}


@dataclass
class Instruction:
    """One instruction: its text without metadata."""

    text: str  # "load float, ptr addrspace(1) %3, align 4"
    result: str | None  # "%7"
    location: str | None  # number of its !dbg node

    @cached_property
    def opcode(self) -> str:
        """`add`, `load`, `call` and so on."""
        words = self.text.split(None, 2)
        return words[1] if words[0] in ("tail", "musttail", "notail") else words[0]

    @cached_property
    def callee(self) -> str | None:
        """The name of the called function; None if this is not a call."""
        found = re.search(r"@(\"[^\"]*\"|[\w$.]+)\(", self.text) if self.opcode == "call" else None
        return found[1].strip('"') if found else None

    @cached_property
    def operands(self) -> list[str]:
        """The local values that it uses, in order of appearance."""
        return _VALUE.findall(self.text)

    @cached_property
    def type(self) -> str:
        """The type of its result, or of the value that a store writes."""
        text = re.sub(r"^(tail |musttail |notail )", "", self.text)
        text = text[len(self.opcode) :]
        flags = r"\s*(?:(?:nuw|nsw|nusw|exact|disjoint|nneg|samesign|inbounds|volatile|atomic|"
        flags += r"fast|nnan|ninf|nsz|arcp|contract|afn|reassoc|fastcc|noundef|zeroext|signext|"
        flags += r"range\([^)]*\)|fadd|fsub|fmax|fmin|eq|ne|[us][gl][te]|[ou](?:eq|ne|gt|ge|lt|le)|"
        flags += r"ord|uno|xchg|max|min|umax|umin|and|nand|or|xor|add|sub|inrange\([^)]*\))\s+)*"
        rest = text[re.match(flags, text).end() :]  # type: ignore[union-attr]
        return first_type(rest)


def first_type(text: str) -> str:
    """The type at the start of a piece of IR."""
    text = text.lstrip()
    if text[:1] in "<[{":
        depth = 0
        for i, c in enumerate(text):
            depth += (c in "<[{(") - (c in ">]})")
            if depth == 0:
                return text[: i + 1]
    found = re.match(r'[\w%."]+', text)
    return found[0] if found else ""


def lanes(type_text: str) -> int:
    """Number of components of a type: 4 for <4 x float>, 1 for i32."""
    found = re.match(r"<(\d+) x ", type_text)
    return int(found[1]) if found else 1


def element(type_text: str) -> str:
    """The type of one component."""
    found = re.match(r"<\d+ x (.*)>$", type_text)
    return found[1] if found else type_text


def bits(type_text: str) -> int:
    """The width of one component in bits."""
    one = element(type_text)
    if one in _TYPE_BITS:
        return _TYPE_BITS[one]
    found = re.match(r"i(\d+)$", one)
    return int(found[1]) if found else 0


def byte_size(type_text: str) -> int:
    """Number of bytes that a load or store of a type touches; 0 if unknown."""
    array = re.match(r"\[(\d+) x (.*)\]$", type_text)
    if array:
        return int(array[1]) * byte_size(array[2])
    return lanes(type_text) * ((bits(type_text) + 7) // 8)


@dataclass
class Block:
    """A basic block; `number` is its index in the module, and the index of its counter."""

    label: str
    number: int
    instructions: list[Instruction] = field(default_factory=list)


@dataclass
class Function:
    """A function's definition."""

    header: str
    name: str
    blocks: list[Block] = field(default_factory=list)

    def __iter__(self) -> Iterator[Instruction]:
        for block in self.blocks:
            yield from block.instructions

    @cached_property
    def definitions(self) -> dict[str, Instruction]:
        """The instruction that makes each value."""
        return {i.result: i for i in self if i.result}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that use each value."""
        found: dict[str, list[Instruction]] = {}
        for i in self:
            for value in set(i.operands):
                found.setdefault(value, []).append(i)
        return found


class Module:
    """Parsed IR; everything outside of functions is kept as text."""

    def __init__(self, text: str) -> None:
        self.functions: list[Function] = []
        self.other: list[str] = []
        self.metadata: dict[str, str] = {}
        self.blocks: list[Block] = []
        lines = iter(text.splitlines())
        for line in lines:
            if line.startswith("define "):
                self.functions.append(self._function(line, lines))
                continue
            node = re.match(r"!(\d+) = (.*)", line)
            if node:
                self.metadata[node[1]] = node[2]
            self.other.append(line)

    def _function(self, header: str, lines: Iterator[str]) -> Function:
        name = re.search(r"@(\"[^\"]*\"|[\w$.]+)\(", header)
        assert name is not None
        header = re.sub(r" !dbg !\d+", "", header)
        function = Function(header, name[1].strip('"'))

        def start(label: str) -> None:
            block = Block(label, len(self.blocks))
            self.blocks.append(block)
            function.blocks.append(block)

        for line in lines:
            if line == "}":
                return function
            label = _LABEL.match(line)
            if label:
                start(label[1])
                continue
            code = line.strip()
            if not code or code.startswith(";"):
                continue
            if not function.blocks:
                start("")
            if re.match(r"(?:tail call|call|switch)\b.*\[$", code) or code.endswith("["):
                # A switch's cases are lines of their own, and metadata may follow the bracket.
                while not re.search(r"\](?:, ![\w.]+ !\d+)*$", code):
                    code += " " + next(lines).strip()
            location = re.search(r", !dbg !(\d+)", code)
            code = re.sub(r"(?:,| )\s*![\w.]+ !\d+", "", code)
            made = _RESULT.match(code)
            result, rest = (made[1], made[2]) if made else (None, code)
            function.blocks[-1].instructions.append(
                Instruction(rest, result, location[1] if location else None)
            )
        raise ValueError("IR ends inside a function")

    def line(self, location: str | None, file: str) -> int | None:
        """The line in `file` of a !dbg node; for inlined calls, the innermost line in `file`."""
        while location:
            node = self.metadata.get(location, "")
            if self._file(node) == file:
                found = re.search(r"line: (\d+)", node)
                return int(found[1]) if found else None
            outer = re.search(r"inlinedAt: !(\d+)", node)
            location = outer[1] if outer else None
        return None

    def _file(self, node: str) -> str | None:
        while node:
            named = re.search(r"filename: \"([^\"]*)\"", node)
            if named:
                return named[1]
            up = re.search(r"file: !(\d+)", node) or re.search(r"scope: !(\d+)", node)
            node = self.metadata.get(up[1], "") if up else ""
        return None


def call_arguments(instruction: Instruction) -> list[str]:
    """The arguments of a call, each with its type: `i32 noundef 5`."""
    text = instruction.text
    start = text.index("(", text.index("@"))
    depth, last, found = 0, start + 1, []
    for i in range(start, len(text)):
        depth += (text[i] in "(<[{") - (text[i] in ")>]}")
        if (text[i] == "," and depth == 1) or depth == 0:
            found.append(text[last:i].strip())
            last = i + 1
        if depth == 0:
            break
    return [argument for argument in found if argument]


def constant_argument(instruction: Instruction, index: int) -> int | None:
    """The value of a call's argument, if it is a literal."""
    found = re.search(r"(-?\d+)$", call_arguments(instruction)[index])
    return int(found[1]) if found else None


def incoming(phi: Instruction) -> list[tuple[str, str]]:
    """The values of a phi, each with the label of the block that it comes from."""
    return re.findall(r"\[ ([^\]]+?), %(\"[^\"]*\"|[\w$.-]+) \]", phi.text)
