"""Adds checks and counters to a kernel's IR."""

import re
from dataclasses import dataclass, field

from . import ir
from .trace import Access, Origins, accesses

# Calls that wait for other threads; their last argument is the place number in the kernel.
RENDEZVOUS = {
    "emu_simd",
    "emu_simdgroup_barrier",
    "emu_threadgroup_barrier",
    "emu_matrix_multiply",
    "emu_atomic_load",
}

_HELPERS = """
@emu_counters = external global ptr
@emu_alignment_mask = external global i64
@emu_interleave = external global i32
@emu_arena = external global i64
@emu_arena_bytes = external global i64
@emu_read_shadow = external global i64
@emu_write_shadow = external global i64
declare void @emu_misaligned(i64, i32) cold noreturn nounwind
declare void @emu_far_away(i64, i32) cold noreturn nounwind
declare half @emu_fma_half(half, half, half) nounwind memory(none)
declare void @emu_yield() nounwind
define internal void @emu.before_store() alwaysinline nounwind {
  %interleave = load i32, ptr @emu_interleave
  %yields = icmp ne i32 %interleave, 0
  br i1 %yields, label %others, label %go
others:
  call void @emu_yield()
  br label %go
go:
  ret void
}
define internal void @emu.check(i64 %address, i64 %low, i32 %place) alwaysinline nounwind {
  %start = load i64, ptr @emu_arena
  %size = load i64, ptr @emu_arena_bytes
  %offset = sub i64 %address, %start
  %far = icmp uge i64 %offset, %size
  br i1 %far, label %outside, label %inside, !prof !{!"branch_weights", i32 1, i32 1000000}
outside:
  call void @emu_far_away(i64 %address, i32 %place)
  unreachable
inside:
  %on = load i64, ptr @emu_alignment_mask
  %mask = and i64 %on, %low
  %rest = and i64 %address, %mask
  %bad = icmp ne i64 %rest, 0
  br i1 %bad, label %wrong, label %right, !prof !{!"branch_weights", i32 1, i32 1000000}
wrong:
  call void @emu_misaligned(i64 %address, i32 %place)
  unreachable
right:
  ret void
}
"""


@dataclass
class Instrumented:
    """The IR to compile, and facts about it."""

    text: str
    places: list[int | None] = field(default_factory=list)  # line in the kernel, by place number
    arrays: dict[int, int] = field(default_factory=dict)  # bytes of threadgroup arrays, by number
    waits: bool = False  # whether any thread waits for another
    float_atomics: bool = False  # whether rounding depends on the order of threads
    blocks: int = 0  # number of basic blocks
    private: int = 0  # bytes of a thread's variables in memory


def _may_be_buffer(access: Access) -> bool:
    if access.origin:
        return access.origin.kind == "buffer"
    return access.pointer.startswith("ptr addrspace(1)")


def _is_shared(store: ir.Instruction, origins: Origins) -> bool:
    """Whether a store writes to memory that other threads can read."""
    access = accesses(store, origins)[0]
    if access.origin:
        return access.origin.kind in ("buffer", "array")
    return access.pointer.startswith(("ptr addrspace(1)", "ptr addrspace(3)"))


class _Writer:
    """Writes one module, instruction by instruction."""

    def __init__(self, module: ir.Module, file: str, count: bool) -> None:
        self.module = module
        self.file = file
        self.count = count
        self.result = Instrumented("")
        self.lines: list[str] = []
        self.fresh = 0

    def name(self) -> str:
        self.fresh += 1
        return f"%emu.{self.fresh}"

    def place(self, instruction: ir.Instruction) -> int:
        self.result.places.append(self.module.line(instruction.location, self.file))
        return len(self.result.places) - 1

    def emit(self, text: str, result: str | None = None) -> None:
        self.lines.append(f"  {result} = {text}" if result else f"  {text}")

    def guard(self, access: Access, instruction: ir.Instruction) -> None:
        """Adds a check of an access to a buffer, and marks the bytes that it touches."""
        address = self.name()
        self.emit(f"ptrtoint {access.pointer} to i64", address)
        place = self.place(instruction)
        self.emit(f"call void @emu.check(i64 {address}, i64 {access.align - 1}, i32 {place})")
        if not self.count or not access.bytes:
            return
        offset, shadow, pointer = self.name(), self.name(), self.name()
        which = "write" if access.write else "read"
        self.emit(f"load i64, ptr @emu_{which}_shadow", offset)
        self.emit(f"add i64 {address}, {offset}", shadow)
        self.emit(f"inttoptr i64 {shadow} to ptr", pointer)
        ones = ", ".join(["i8 1"] * access.bytes)
        self.emit(f"store <{access.bytes} x i8> <{ones}>, ptr {pointer}, align 1")

    def block(self, function: ir.Function, block: ir.Block, origins: Origins, first: bool) -> None:
        if block.label:
            self.lines.append(f"{block.label}:")
        rest = list(block.instructions)
        while rest and rest[0].opcode == "phi":
            self.emit(rest[0].text, rest.pop(0).result)
        if self.count:
            if first:
                self.emit("load ptr, ptr @emu_counters", "%emu.counters")
            at, old, new = self.name(), self.name(), self.name()
            self.emit(f"getelementptr i32, ptr %emu.counters, i64 {block.number}", at)
            self.emit(f"load i32, ptr {at}", old)
            self.emit(f"add i32 {old}, 1", new)
            self.emit(f"store i32 {new}, ptr {at}")
        for instruction in rest:
            self.instruction(instruction, origins)

    def instruction(self, instruction: ir.Instruction, origins: Origins) -> None:
        text = instruction.text
        checked = [a for a in accesses(instruction, origins) if _may_be_buffer(a)]
        for access in checked:
            self.guard(access, instruction)
        if instruction.opcode == "store" and _is_shared(instruction, origins):
            self.emit("call void @emu.before_store()")
        if checked and not any(a.atomic for a in checked):
            text = re.sub(r"\balign \d+", "align 1", text)
        if instruction.opcode in ("atomicrmw", "cmpxchg"):
            self.result.float_atomics |= bool(re.search(r"\batomicrmw (?:volatile )?f", text))
        if instruction.opcode == "alloca":
            self.result.private += ir.byte_size(instruction.type)
        callee = instruction.callee or ""
        if callee in RENDEZVOUS:
            place = self.place(instruction)
            text = re.sub(r"i32 (?:noundef )?\d+\)", f"i32 {place})", text)
            self.result.waits = True
        elif callee == "emu_threadgroup":
            index = ir.constant_argument(instruction, 0)
            size = ir.constant_argument(instruction, 1)
            if index is not None and size is not None:
                self.result.arrays[index] = size
        elif callee.startswith("llvm.fmuladd."):
            # Metal may fuse it or not; here both operations round.
            kind = instruction.type
            a, b, c = (x[len(kind) :].strip() for x in ir.call_arguments(instruction))
            product = self.name()
            self.emit(f"fmul {kind} {a}, {b}", product)
            text = f"fadd {kind} {product}, {c}"
        elif callee == "llvm.fma.f16":
            text = text.replace("@llvm.fma.f16", "@emu_fma_half")
        self.emit(text, instruction.result)


def instrument(text: str, file: str, count: bool) -> Instrumented:
    """Rewrites optimized IR for a run on the CPU.

    Every access to a buffer is checked for alignment; every wait gets its place number; before a
    store, other threads can run if the runtime wants it; `fmuladd` becomes two operations. With
    `count`, every basic block counts its runs for each thread, and every byte read or written is
    marked in a shadow of the buffers.

    Args:
        text: IR from `compile_ir`.
        file: name of the kernel's text in debug information.
        count: whether to count.
    """
    module = ir.Module(text)
    writer = _Writer(module, file, count)
    for line in module.other:
        if line.startswith("!llvm.dbg.cu"):
            continue
        line = re.sub(r' "(?:target-cpu|target-features|tune-cpu)"="[^"]*"', "", line)
        if line.startswith("declare") and re.search("@emu_(misaligned|far_away|fma_half)", line):
            continue
        writer.lines.append(line)
    for function in module.functions:
        header = re.sub(r" #\d+", "", function.header)
        header = re.sub(r" !\w+ !\d+", "", header)
        writer.lines.append(header)
        origins = Origins(function)
        for index, block in enumerate(function.blocks):
            writer.block(function, block, origins, index == 0)
        writer.lines.append("}")
    writer.result.blocks = len(module.blocks)
    writer.result.text = "\n".join(writer.lines) + "\n" + _HELPERS
    return writer.result
