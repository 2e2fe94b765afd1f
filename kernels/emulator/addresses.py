"""What the addresses of loads and stores cost, and loads that the machine's compiler merges.

A load or store adds one 32-bit register, or a constant, to a 64-bit base.
"""

import re

from . import ir

_ACCESS = ("load", "store", "atomicrmw", "cmpxchg", "call")


def users_of_pointer(function: ir.Function, pointer: ir.Instruction) -> list[ir.Instruction]:
    """The users of a pointer, also those of its casts to other address spaces."""
    found = []
    for user in function.users.get(pointer.result or "", []):
        if user.opcode == "addrspacecast":
            found += users_of_pointer(function, user)
        else:
            found.append(user)
    return found


def additions(function: ir.Function, i: ir.Instruction) -> int:
    """Number of additions for a getelementptr, beyond those that loads and stores do themselves."""
    users = users_of_pointer(function, i)
    direct = [u for u in users if u.opcode in _ACCESS]
    variable = _variables(i)
    if not variable:
        return 0 if len(direct) == len(users) else 3
    if any(_is_wide(function, x.split()[-1]) for x in variable):
        return 4
    offsets = [u for u in users if u.opcode == "getelementptr" and _is_offset(function, u)]
    if len(direct) + len(offsets) < len(users):
        return 3
    return min(3, len(offsets))


def _variables(i: ir.Instruction) -> list[str]:
    """The indices of a getelementptr that are not constants."""
    return [index for index in i.text.split(", ")[2:] if "%" in index]


def _is_offset(function: ir.Function, i: ir.Instruction) -> bool:
    """Whether a getelementptr adds only a constant, for accesses only."""
    return not _variables(i) and all(u.opcode in _ACCESS for u in users_of_pointer(function, i))


def _is_wide(function: ir.Function, value: str) -> bool:
    """Whether an index needs more than 32 bits; the type of an extension is what it extends."""
    made = function.definitions.get(value)
    return made is not None and ir.bits(made.type) > 32


def merged_bytes(function: ir.Function) -> set[int]:
    """Loads of four bytes that stand next to another one, by their `id`.

    The machine's compiler makes one load of 32-bit words from two adjacent loads of `uchar4`. So
    their bytes do not come in 16-bit registers of their own, as those of one load do.
    """
    merged: set[int] = set()
    for block in function.blocks:
        known: dict[tuple[str, int], ir.Instruction] = {}
        for i in block.instructions:
            if i.opcode != "load" or i.type != "<4 x i8>":
                continue
            base, offset = _base(function, i.operands[0])
            known[base, offset] = i
            for other in (offset - 4, offset + 4):
                if (base, other) in known:
                    merged |= {id(i), id(known[base, other])}
    return merged


def _base(function: ir.Function, pointer: str) -> tuple[str, int]:
    """A pointer as another one plus a constant number of bytes."""
    offset = 0
    while made := function.definitions.get(pointer):
        if made.opcode == "getelementptr" and not _variables(made):
            added = re.match(
                r"(?:\S+ )*?(\S+), ptr(?: addrspace\(\d+\))? \S+, i\d+ (-?\d+)$", made.text
            )
            if added is None:
                break
            offset += ir.byte_size(added[1]) * int(added[2])
        elif made.opcode != "addrspacecast":
            break
        pointer = made.operands[0]
    return pointer, offset
