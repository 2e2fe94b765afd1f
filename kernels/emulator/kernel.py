"""A kernel compiled for the CPU, and the cache of compiled kernels."""

import json
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from . import compiler, msl
from .errors import EmulatorError, LintError
from .instrument import instrument
from .signature import Signature, entry, parse_generated

MAX_THREADGROUP_MEMORY = 32 * 1024
MAX_PRIVATE_MEMORY = 128 * 1024  # half of a fiber's stack
UTILS = "mlx/backend/metal/kernels/utils.h"  # MLX includes it in every custom kernel


@dataclass(frozen=True)
class Facts:
    """Facts about a compiled kernel; see `Instrumented`."""

    places: list[int | None]  # line in the kernel, by place number
    arrays: dict[int, int]  # bytes of threadgroup arrays, by number
    waits: bool
    float_atomics: bool
    blocks: int


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel's text, signature and compiled files."""

    text: str
    signature: Signature
    folder: Path  # folder in the cache: kernel.ll, run/, count/

    @cached_property
    def ir(self) -> str:
        """The optimized LLVM IR that is run and counted."""
        return (self.folder / "kernel.ll").read_text(encoding="utf-8")

    def library(self, count: bool) -> tuple[Path, Facts]:
        """The shared library for a run, and facts about it; compiled at first use."""
        kind = "count" if count else "run"

        def make(folder: Path) -> None:
            made = instrument(self.ir, msl.FILE, count)
            compiler.compile_library(made.text, folder / "kernel.so")
            facts = asdict(
                Facts(made.places, made.arrays, made.waits, made.float_atomics, made.blocks)
            )
            (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")

        folder = compiler.cached(f"{kind}\0{self.folder.name}", make)
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        facts["arrays"] = {int(k): v for k, v in facts["arrays"].items()}
        return folder / "kernel.so", Facts(**facts)


_lock = threading.Lock()
_known: dict[tuple[str, str, tuple[str, ...], bool], CompiledKernel] = {}


def compile_kernel(
    text: str,
    signature: Signature | None = None,
    includes: Sequence[str] = (UTILS,),
    swizzles_from: str = "",
    strict: bool = True,
) -> CompiledKernel:
    """Lints a kernel and compiles it to IR.

    Args:
        text: Metal source that MLX generated, or any text with the kernel of `signature`.
        signature: the kernel to run; default: the one that MLX generated.
        includes: headers that come before the text.
        swizzles_from: text of those headers that uses vector members such as .xy.
        strict: whether warnings are errors.

    Raises:
        LintError: the text is not valid Metal.
    """
    if signature is None:
        text, signature = parse_generated(text)
    call = entry(signature)
    key = (text, call, tuple(includes), strict)
    with _lock:
        if key in _known:
            return _known[key]
    prepared = msl.prepare(text, call, tuple(includes), swizzles_from)
    warnings = msl.WARNINGS if strict else ["-w"]

    def make(folder: Path) -> None:
        try:
            written = compiler.compile_ir(
                prepared.text, prepared.prelude, warnings, folder / "kernel.ll"
            )
        except EmulatorError as error:
            wrong = msl.relevant_diagnostics(str(error))
            raise LintError(f"{signature.name}:\n{wrong or error}") from None
        if wrong := msl.relevant_diagnostics(written):
            raise LintError(f"{signature.name}:\n{wrong}")
        _check_memory(signature.name, (folder / "kernel.ll").read_text(encoding="utf-8"))

    folder = compiler.cached("\0".join([prepared.prelude, prepared.text, *warnings]), make)
    kernel = CompiledKernel(text, signature, folder)
    with _lock:
        return _known.setdefault(key, kernel)


def _check_memory(name: str, text: str) -> None:
    made = instrument(text, msl.FILE, count=False)
    total = sum(made.arrays.values())
    if total > MAX_THREADGROUP_MEMORY:
        raise LintError(
            f"{name}: {total} bytes of threadgroup memory; "
            f"a threadgroup has {MAX_THREADGROUP_MEMORY}"
        )
    if made.private > MAX_PRIVATE_MEMORY:
        raise LintError(
            f"{name}: {made.private} bytes of private memory for each thread; "
            f"the emulator has {MAX_PRIVATE_MEMORY}"
        )
