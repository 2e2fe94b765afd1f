"""Finds the bitwise operations that one instruction does together.

The instruction for bits computes any function of two bits, for two registers or a register and a
constant. So a chain of and, or, xor and not is one instruction if it depends on only two values:
`~c & m`, which LLVM writes as `(c & m) ^ m`.
"""

import re
from itertools import product

from . import ir

BITWISE = ("and", "or", "xor")


def absorbed(function: ir.Function) -> set[str]:
    """The values of bitwise operations that nothing needs but other bitwise operations, each of
    which computes its result without them."""
    made: dict[str, tuple[frozenset[str], set[str]]] = {}
    for block in function.blocks:
        for i in block.instructions:
            if i.opcode in BITWISE and i.result:
                made[i.result] = _leaves(i, function, made)
    return {
        value
        for value in made
        if all(
            value in made.get(u.result or "", ((), ()))[1] for u in function.users.get(value, [])
        )
        and function.users.get(value)
    }


def _leaves(
    i: ir.Instruction,
    function: ir.Function,
    made: dict[str, tuple[frozenset[str], set[str]]],
) -> tuple[frozenset[str], set[str]]:
    """The values that an operation is a function of, at most two if possible, and the operands
    that it does not need for that."""
    operands = _operands(i)
    choices = []
    for operand in operands:
        inner = function.definitions.get(operand)
        same = inner is not None and operand in made and inner.type == i.type
        plain = (_leaf(operand, ir.bits(i.type)), set[str]())
        choices.append([(made[operand][0], {operand}), plain] if same else [plain])
    for chosen in product(*choices):  # the most that can be left out comes first
        leaves = frozenset[str]().union(*(part[0] for part in chosen))
        if len(leaves) <= 2:
            return leaves, set[str]().union(*(part[1] for part in chosen))
    return frozenset(operands), set()


def _operands(i: ir.Instruction) -> list[str]:
    text = i.text[i.text.index(i.type) + len(i.type) :]
    first, _, second = text.partition(", ")
    return [first.strip(), second.strip()]


def _leaf(operand: str, bits: int) -> frozenset[str]:
    """The operand; a constant and its complement are the same, and all ones are nothing."""
    number = re.fullmatch(r"(?:splat \(i\d+ )?(-?\d+)\)?", operand)
    if number is None:
        return frozenset({operand})
    ones = (1 << bits) - 1
    value = int(number[1]) & ones
    return frozenset() if value in (0, ones) else frozenset({str(min(value, value ^ ones))})
