"""Assigns each LLVM IR instruction to classes of GPU instructions.

An IR instruction may be several GPU instructions, or none, such as a register move, the conversion
of a 16-bit operand, or the addition in a load's address mode. docs/emulator.md has the rules,
cost.py the prices.
"""

import re
from collections import Counter

from . import addresses, bitops, ir
from .trace import Origins, accesses

_FREE = {
    "phi", "bitcast", "addrspacecast", "ptrtoint", "inttoptr", "freeze", "alloca", "ret", "fneg",
    "extractvalue", "insertvalue", "shufflevector", "unreachable", "fence",
}  # fmt: skip
_MEMORY = {"load", "store"}  # one instruction moves up to four components
_VECTORS = {"load", "extractelement", "shufflevector"}  # bytes in registers of their own
_ALU = {"add", "sub", "mul", "and", "or", "xor", "icmp", "uitofp", "sitofp"}
_FLOAT_USERS = {"fadd", "fsub", "fmul", "fdiv", "fcmp", "fneg", "fptrunc"}
_FLOAT_CALLS = ("llvm.fma.", "llvm.fmuladd.", "llvm.maxnum.", "llvm.minnum.", "llvm.fabs.")
_FUNCTIONS = {
    "llvm.fma": "float arithmetic", "llvm.fmuladd": "float arithmetic",
    "llvm.maxnum": "float compare or select", "llvm.minnum": "float compare or select",
    "llvm.copysign": "bitwise",
    "llvm.floor": "round to integer", "llvm.ceil": "round to integer",
    "llvm.rint": "round to integer", "llvm.trunc": "round to integer",
    "llvm.round": "round to integer", "llvm.roundeven": "round to integer",
    "llvm.sqrt": "square root", "emu_rsqrt": "reciprocal square root",
    "llvm.exp2": "exp2 or log2", "llvm.log2": "exp2 or log2",
    "llvm.exp": "exp or log", "llvm.log": "exp or log", "emu_exp10": "exp or log",
    "llvm.log10": "exp or log", "llvm.pow": "power", "llvm.tanh": "tanh",
    "llvm.sin": "sine or cosine", "llvm.cos": "sine or cosine",
    "emu_sinpi": "sine or cosine", "emu_cospi": "sine or cosine",
    "llvm.smax": "integer compare or select", "llvm.smin": "integer compare or select",
    "llvm.umax": "integer compare or select", "llvm.umin": "integer compare or select",
    "llvm.abs": "integer compare or select",
    "llvm.uadd.sat": "integer add", "llvm.usub.sat": "integer add",
    "llvm.sadd.sat": "integer add", "llvm.ssub.sat": "integer add",
    "llvm.ctpop": "bit count or reversal", "llvm.bitreverse": "bit count or reversal",
    "llvm.ctlz": "bit count or reversal", "llvm.cttz": "bit count or reversal",
    "llvm.bswap": "shift, 64 bits", "llvm.fshl": "shift, 64 bits", "llvm.fshr": "shift, 64 bits",
    "emu_matrix_multiply": "simdgroup matrix multiply",
    "emu_simdgroup_barrier": "barrier", "emu_threadgroup_barrier": "barrier",
}  # fmt: skip
_FREE_CALLS = (
    "llvm.lifetime", "llvm.assume", "llvm.experimental.noalias", "llvm.dbg", "llvm.fabs",
    "emu_lane", "emu_device_buffer", "emu_constant_buffer", "emu_threadgroup", "emu_atomic_load",
    "llvm.memset",
)  # fmt: skip


def classify(function: ir.Function, origins: Origins) -> dict[int, Counter[str]]:
    """For each instruction of a function, by its `id`: its classes and their numbers."""
    rules = _Rules(function, origins)
    return {id(i): rules.kinds(i) for i in function}


class _Rules:
    def __init__(self, function: ir.Function, origins: Origins) -> None:
        self.function = function
        self.origins = origins
        self.absorbed = bitops.absorbed(function)
        self.merged = addresses.merged_bytes(function)

    def made(self, value: str) -> ir.Instruction | None:
        return self.function.definitions.get(value)

    def users(self, instruction: ir.Instruction) -> list[ir.Instruction]:
        return self.function.users.get(instruction.result or "", [])

    def kinds(self, i: ir.Instruction) -> Counter[str]:
        """The classes of one instruction; a vector counts once for each component."""
        n = 1 if i.opcode in _MEMORY or i.opcode == "select" else ir.lanes(i.type)
        method = getattr(self, f"_{i.opcode}", None)
        if i.opcode in _FREE:
            return Counter()
        if method:
            one = method(i)
        elif i.opcode in ("fadd", "fsub", "fmul"):
            one = ["float arithmetic", *self._bfloat_result(i)]
        elif i.opcode in bitops.BITWISE:
            one = self._bitwise(i)
        elif i.opcode in ("zext", "sext", "trunc"):
            one = self._integer_width(i)
        elif i.opcode in ("sitofp", "uitofp", "fptosi", "fptoui"):
            one = ["integer to float or back"]
            if i.opcode.endswith("tofp") and ir.element(i.type) == "i1":
                one = ["integer compare or select"]
        elif i.opcode in ("udiv", "sdiv", "urem", "srem"):
            constant = re.search(r", (?:-?\d+|splat .*)$", i.text)
            one = ["integer divide by a constant" if constant else "integer divide"]
        elif i.opcode in ("atomicrmw", "cmpxchg"):
            one = ["atomic"]
        else:
            one = ["unknown"]
        return Counter({kind: one.count(kind) * n for kind in one})

    # -- floats

    def _bfloat_result(self, i: ir.Instruction) -> list[str]:
        return ["round to bfloat"] if ir.element(i.type) == "bfloat" else []

    def _fdiv(self, i: ir.Instruction) -> list[str]:
        return ["half divide" if ir.element(i.type) == "half" else "float divide"]

    def _fcmp(self, i: ir.Instruction) -> list[str]:
        users = self.users(i)
        fused = users and all(u.opcode == "select" for u in users)
        return [] if fused else ["float compare or select"]

    def _fpext(self, i: ir.Instruction) -> list[str]:
        if ir.element(i.type) == "bfloat":
            return ["move or convert a float"]
        free = all(
            u.opcode in _FLOAT_USERS or (u.callee or "").startswith(_FLOAT_CALLS)
            for u in self._through_vectors(i)
        )
        return [] if free else ["move or convert a float"]

    def _fptrunc(self, i: ir.Instruction) -> list[str]:
        if re.search(r" to (?:<\d+ x )?bfloat", i.text):
            return ["round to bfloat"]
        source = self.made(i.operands[0]) if i.operands else None
        computed = source is not None and (
            source.opcode in ("fadd", "fsub", "fmul")
            or (source.callee or "").startswith(("llvm.fma.", "llvm.fmuladd."))
        )
        alone = computed and source is not None and len(self.users(source)) == 1
        return [] if alone else ["move or convert a float"]

    def _through_vectors(self, i: ir.Instruction) -> list[ir.Instruction]:
        """The users of a value; also users of its parts, if a vector is taken apart."""
        found = []
        for user in self.users(i):
            if user.opcode in ("extractelement", "shufflevector"):
                found += self._through_vectors(user)
            else:
                found.append(user)
        return found

    # -- integers

    def _add(self, i: ir.Instruction) -> list[str]:
        if ir.bits(i.type) <= 32:
            return ["integer add"]
        for value in i.operands:
            source = self.made(value)
            if source and source.opcode == "mul" and len(self.users(source)) == 1:
                return []  # one multiply-add
        return ["integer add, 64 bits"]

    _sub = _add

    def _mul(self, i: ir.Instruction) -> list[str]:
        constant = re.search(r"(?:, | splat \(i\d+ )(-?\d+)\)?$", i.text)
        wide = ir.bits(i.type) > 32
        if constant and not wide:
            return _multiply_by(int(constant[1]))
        if not wide:
            return ["integer multiply"]
        narrow = constant is None or abs(int(constant[1])) < 2**32
        for value in i.operands:
            source = self.made(value)
            narrow = narrow and source is not None and source.opcode in ("zext", "sext")
        return ["integer multiply, 32 x 32 to 64 bits" if narrow else "integer multiply, 64 bits"]

    def _shl(self, i: ir.Instruction) -> list[str]:
        amount = self._amount(i)
        if ir.bits(i.type) > 32:
            return [] if amount == 32 else ["shift, 64 bits"]
        if amount is None or not 1 <= amount <= 4:
            return ["shift"]
        users = self.users(i)
        fused = users and all(u.opcode in ("add", "sub") for u in users)
        return [] if fused else ["integer add"]

    def _lshr(self, i: ir.Instruction) -> list[str]:
        amount, wide = self._amount(i), ir.bits(i.type) > 32
        users = self.users(i)
        if amount and users and all(_takes_part(u, amount) for u in users):
            return []  # instructions can use half of a register
        if amount == 16 and i.opcode == "lshr" and not wide:
            # The upper half of a register, zero-extended, can be an operand of arithmetic.
            return [] if users and all(u.opcode in _ALU for u in users) else ["integer add"]
        return ["shift, 64 bits" if wide else "shift"]

    _ashr = _lshr

    def _amount(self, i: ir.Instruction) -> int | None:
        found = re.search(r"(?:, | splat \(i\d+ )(\d+)\)?$", i.text)
        return int(found[1]) if found else None

    def _bitwise(self, i: ir.Instruction) -> list[str]:
        if i.result in self.absorbed:
            return []
        n = 2 if ir.bits(i.type) > 32 else 1
        mask = re.search(r", (\d+)$", i.text)
        amounts = all(u.opcode in ("shl", "lshr", "ashr") for u in self.users(i))
        if i.opcode == "and" and mask and int(mask[1]) == ir.bits(i.type) - 1 and amounts:
            return []  # a shift uses its amount modulo the width
        if i.opcode == "and" and mask and _is_low_mask(int(mask[1])) and i.operands:
            source = self.made(i.operands[0])
            if source and source.opcode == "lshr" and len(self.users(source)) == 1:
                return []  # together with the shift, one bit-field extraction
        return ["bitwise"] * n

    def _integer_width(self, i: ir.Instruction) -> list[str]:
        source = ir.element(i.type)
        if source == "i1":
            return ["integer compare or select"]
        if i.opcode == "trunc" or source in ("i16", "i32"):
            if i.opcode == "sext" and source == "i32" and not self._only_indexes(i):
                return ["shift"]  # the upper word is the sign
            return []
        made = self.made(i.operands[0]) if i.operands else None
        if made is None or made.opcode in _VECTORS:
            return []  # the load itself extends
        return ["bitwise" if i.opcode == "zext" else "shift"]

    def _only_indexes(self, i: ir.Instruction) -> bool:
        return all(u.opcode in ("getelementptr", "mul", "icmp") for u in self.users(i))

    def _icmp(self, i: ir.Instruction) -> list[str]:
        users = self.users(i)
        if users and all(u.opcode == "select" for u in users):
            return []
        return ["integer compare or select"] * (2 if ir.bits(i.type) > 32 else 1)

    def _select(self, i: ir.Instruction) -> list[str]:
        kind = re.search(r", (<\d+ x \w+>|\w+)", i.text)
        chosen = kind[1] if kind else ""
        n, element = ir.lanes(chosen), ir.element(chosen)
        if element in ("float", "half", "bfloat"):
            return ["float compare or select"] * n
        return ["integer compare or select"] * (n * (2 if ir.bits(element) > 32 else 1))

    def _extractelement(self, i: ir.Instruction) -> list[str]:
        return [] if re.search(r"i\d+ \d+$", i.text) else ["private load"]

    def _insertelement(self, i: ir.Instruction) -> list[str]:
        return [] if re.search(r"i\d+ \d+$", i.text) else ["private store"]

    # -- control and memory

    def _br(self, i: ir.Instruction) -> list[str]:
        return ["branch"] if i.text.startswith("br i1") else []

    def _switch(self, i: ir.Instruction) -> list[str]:
        return ["integer compare or select", "branch"] * i.text.count("label")

    def _load(self, i: ir.Instruction) -> list[str]:
        return self._memory(i) + ["unpack merged bytes"] * (id(i) in self.merged)

    _store = _load

    def _memory(self, i: ir.Instruction) -> list[str]:
        found = []
        for access in accesses(i, self.origins):
            space = re.match(r"ptr(?: addrspace\((\d+)\))?", access.pointer)
            number = space[1] if space else None
            kind = (
                access.origin.kind
                if access.origin
                else {"1": "buffer", "2": "table", "3": "array"}.get(number or "")
            )
            if kind == "thread":
                continue  # positions are in registers
            if (kind == "buffer" and number == "2") or kind == "table":
                found.append("constant load")
            else:
                where = {"buffer": "device", "array": "threadgroup", "private": "private"}
                found.append(
                    f"{where.get(kind or '', 'device')} {'store' if access.write else 'load'}"
                )
        return found

    def _getelementptr(self, i: ir.Instruction) -> list[str]:
        return ["address"] * addresses.additions(self.function, i)

    def _call(self, i: ir.Instruction) -> list[str]:
        name = i.callee or ""
        if name.startswith(_FREE_CALLS):
            return []
        if name == "emu_simd":
            return [_simd_class(ir.constant_argument(i, 0) or 0)]
        if name.startswith(("llvm.memcpy", "llvm.memmove")):
            return self._memory(i)
        stem = re.sub(r"\.(?:v\d+)?(?:f\d+|bf16|i\d+)(?:\..*)?$", "", name)
        kind = _FUNCTIONS.get(stem, "other function" if not name.startswith("llvm.") else "unknown")
        return [kind, *(self._bfloat_result(i) if kind == "float arithmetic" else [])]


def _takes_part(user: ir.Instruction, amount: int) -> bool:
    """Whether a user of a value shifted right uses only a 16-bit or 32-bit part of it."""
    width = re.search(r" to i(\d+)$", user.text) if user.opcode == "trunc" else None
    return width is not None and int(width[1]) in (16, 32) and amount % int(width[1]) == 0


def _is_low_mask(mask: int) -> bool:
    return mask & (mask + 1) == 0


def _multiply_by(factor: int) -> list[str]:
    """A multiplication by a constant; additions with a shift by 1 to 4, if that is cheaper."""
    if factor in (-1, 0, 1):
        return ["integer add"]
    zeros = (factor & -factor).bit_length() - 1
    odd = factor >> zeros
    for k in range(1, 5):
        if odd in (2**k + 1, 2**k - 1, 1 - 2**k, -(2**k) - 1):
            extra = ["integer add"] * (odd == -(2**k) - 1)
            after = [] if zeros == 0 else ["integer add"]
            return ["integer add", *extra, *after] if zeros <= 4 else ["integer multiply"]
    return ["integer multiply"]


def _simd_class(op: int) -> str:
    """The class of an operation by its code in include/msl/simd.h."""
    quad, op = op >= 64, op % 64
    if op <= 7:
        return "quad reduction" if quad else "simd reduction"
    if op <= 11:
        return "quad reduction" if quad else "simd prefix"
    return "simd shuffle"
