"""Finds clang, compiles a kernel's text to LLVM IR, and IR to a shared library."""

import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path

from .dialect import clang_dialect
from .errors import CompilerMissing, EmulatorError

PACKAGE = Path(__file__).resolve().parent
MINIMUM_CLANG = 19  # the oldest version that was tested

# C++ for OpenCL with Metal's rules: address spaces are part of the types, a literal without a
# suffix is a float, variables outside functions are constant, and OpenCL's own library is not
# declared. half and bfloat round after each operation.
LANGUAGE = [
    "-x", "clcpp", "-cl-std=clc++2021", "-cl-no-stdinc", "-nostdinc",
    "-cl-single-precision-constant", "-fno-elide-type", "-fdeclspec",
    "-Xclang",
    "-cl-ext=-__opencl_c_program_scope_global_variables,-__opencl_c_pipes,"
    "-__opencl_c_device_enqueue",
    "-Xclang", "-ffake-address-space-map",
    "-Xclang", "-ffloat16-excess-precision=none",
    "-Xclang", "-fbfloat16-excess-precision=none",
]  # fmt: skip

# A GPU thread is scalar: no vectorization, and no replacement of loops by memset or memcpy.
OPTIMIZATION = [
    "-O2", "-ffp-contract=on", "-fno-vectorize", "-fno-slp-vectorize", "-fno-math-errno",
    "-fno-builtin-memset", "-fno-builtin-memcpy", "-fno-unwind-tables",
    "-fno-asynchronous-unwind-tables", "-fno-exceptions", "-gline-tables-only",
    "-mllvm", "-inline-threshold=1000000",  # everything: a GPU has no calls
    "-mllvm", "-indvars-widen-indvars=false",  # a 32-bit loop counter stays one
    "-mllvm", "-disable-vector-combine",  # a vector is loaded as one
    "-mllvm", "-unroll-threshold=2700",  # as LLVM's GPU targets do for private arrays
]  # fmt: skip


@dataclass(frozen=True)
class Toolchain:
    """A clang and how to link with it."""

    clang: tuple[str, ...]
    linker: tuple[str, ...] | None  # None: clang links by itself
    headers: tuple[str, ...]  # directories of the C library's headers, where clang has none
    description: str

    @cached_property
    def target(self) -> list[str]:
        """Arguments that name the machine to compile for: this one."""
        machine = platform.machine().lower()
        if sys.platform == "darwin":
            return []
        return ["-target", f"{'aarch64' if machine == 'arm64' else machine}-unknown-linux-gnu"]

    @cached_property
    def machine(self) -> list[str]:
        """Arguments that turn on this processor's vector instructions.

        With $KERNEL_EMULATOR_PORTABLE set there are none, and the runtime switches stacks with the
        C library. In this way, code for other processors can be tested on this one.
        """
        if os.environ.get("KERNEL_EMULATOR_PORTABLE"):
            return ["-DEMU_UCONTEXT"]
        try:
            flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text()))
        except OSError:
            return []
        if platform.machine() == "x86_64" and {"avx2", "fma", "f16c", "bmi2"} <= flags:
            return ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
        return []

    def run(self, arguments: Sequence[str], what: str) -> str:
        """Runs clang; returns its stderr, raises `EmulatorError` if it fails."""
        done = subprocess.run(
            [*self.clang, *self.target, *arguments], capture_output=True, text=True
        )
        if done.returncode:
            raise EmulatorError(f"{what}: {self.description} failed\n{done.stderr}")
        return done.stderr

    def link(self, objects: Iterable[Path], to: Path) -> None:
        """Links objects and libraries into a shared library."""
        names = [str(path) for path in objects]
        if self.linker:
            command = [*self.linker, "-shared", *names, "-o", str(to)]
        elif sys.platform == "darwin":
            command = [*self.clang, "-dynamiclib", "-undefined", "dynamic_lookup", *names]
            command += ["-o", str(to)]
        else:
            command = [*self.clang, *self.target, "-shared", "-nostdlib", *names, "-o", str(to)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise EmulatorError(f"cannot link {to.name}: {done.stderr}")


def _system_clang() -> Toolchain | None:
    named = os.environ.get("KERNEL_EMULATOR_CLANG")
    newest_first = [f"clang-{n}" for n in range(40, MINIMUM_CLANG - 1, -1)]
    for name in [named] if named else ["clang", *newest_first]:
        path = shutil.which(name)
        if path is None:
            continue
        text = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
        found = re.search(r"clang version (\d+)(\.[\d.]+)?", text)
        if found and int(found[1]) >= MINIMUM_CLANG:
            return Toolchain((path,), None, (), found[0])
    if named:
        raise CompilerMissing(
            f"KERNEL_EMULATOR_CLANG={named} is not clang {MINIMUM_CLANG} or newer"
        )
    return None


def _ziglang() -> Toolchain | None:
    spec = importlib.util.find_spec("ziglang")
    if spec is None or spec.origin is None:
        return None
    root = Path(spec.origin).parent
    zig, library = str(root / "zig"), root / "lib"
    machine = {"x86_64": "x86", "aarch64": "aarch64", "arm64": "aarch64"}.get(platform.machine())
    folders = [f"{machine}-linux-gnu", "generic-glibc", f"{machine}-linux-any", "any-linux-any"]
    headers = [library / "include", *(library / "libc" / "include" / name for name in folders)]
    return Toolchain(
        (zig, "clang"),
        (zig, "ld.lld"),
        tuple(str(path) for path in headers if path.is_dir()),
        f"clang of ziglang {version('ziglang')}",
    )


@cache
def toolchain() -> Toolchain:
    """The compiler to use: $KERNEL_EMULATOR_CLANG, a system clang, or the wheel `ziglang`."""
    found = _system_clang() or _ziglang()
    if found is None:
        raise CompilerMissing(
            f"the kernel emulator needs clang {MINIMUM_CLANG} or newer: install it, "
            "or `pip install ziglang`"
        )
    return found


@cache
def cache_folder() -> Path:
    """The folder of compiled kernels: $KERNEL_EMULATOR_CACHE, or .cache/ in the checkout."""
    named = os.environ.get("KERNEL_EMULATOR_CACHE")
    folder = Path(named) if named else PACKAGE.parents[1] / ".cache" / "kernel-emulator"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@cache
def own_digest() -> str:
    """A digest of all code that a compiled kernel depends on, and of the compiler."""
    digest = hashlib.sha256()
    modules = ("compiler", "dialect", "msl", "signature", "ir", "trace", "instrument", "kernel")
    paths = [PACKAGE / f"{name}.py" for name in modules]
    for folder in ("include", "runtime"):
        paths += sorted(p for p in (PACKAGE / folder).rglob("*") if p.is_file())
    for path in paths:
        digest.update(str(path.relative_to(PACKAGE)).encode() + b"\0" + path.read_bytes())
    tools = toolchain()
    digest.update(repr((tools.clang, tools.description, tools.machine)).encode())
    digest.update(repr((PACKAGE, cache_folder())).encode())  # compiled files name them
    digest.update(version("mlx").encode())
    return digest.hexdigest()[:16]


def cached(key: str, make: Callable[[Path], None]) -> Path:
    """The cache's folder for `key`; if it does not exist yet, `make` fills it.

    `make` gets a temporary folder, which is renamed afterwards. So an existing folder is always
    complete, even if several processes work at the same time.
    """
    name = hashlib.sha256((own_digest() + key).encode()).hexdigest()[:32]
    folder = cache_folder() / name
    if not folder.is_dir():
        scratch = Path(tempfile.mkdtemp(prefix="new-", dir=cache_folder()))
        try:
            make(scratch)
            scratch.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


@cache
def mlx_headers() -> Path:
    """A copy of MLX's Metal headers, in the dialect that clang accepts."""
    import mlx.core as mx

    root = Path(mx.__file__).parent / "include"

    def make(folder: Path) -> None:
        for path in sorted((root / "mlx/backend/metal/kernels").rglob("*.h")):
            text = clang_dialect(path.read_text(encoding="utf-8"))
            to = folder / path.relative_to(root)
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_text(text, encoding="utf-8")

    return cached("mlx headers", make)


def include_arguments() -> list[str]:
    """Where `<metal_stdlib>` and MLX's own headers are."""
    return ["-isystem", str(PACKAGE / "include"), "-isystem", str(mlx_headers())]


def precompiled(prelude: str) -> Path:
    """A precompiled header of `prelude`; without it, the prelude takes most of the compile time."""

    def write(folder: Path) -> None:
        (folder / "prelude.h").write_text(prelude, encoding="utf-8")

    header = cached("prelude text\0" + prelude, write) / "prelude.h"  # clang looks for it again

    def make(folder: Path) -> None:
        toolchain().run(
            [*LANGUAGE, *OPTIMIZATION, *include_arguments(), "-c", "-Xclang", "-emit-pch"]
            + ["-Xclang", "-fno-pch-timestamp", str(header), "-o", str(folder / "prelude.pch")],
            "Metal's library",
        )

    return cached("prelude\0" + prelude, make) / "prelude.pch"


def runtime_library() -> Path:
    """The shared library that runs kernels, compiled at first use."""
    tools = toolchain()

    def make(folder: Path) -> None:
        target = folder / "runtime.o"
        arguments = ["-std=c++17", "-O2", "-fPIC", "-fno-exceptions", "-fno-rtti", *tools.machine]
        if tools.headers:
            arguments += ["-nostdinc", *(f"-isystem{path}" for path in tools.headers)]
        source = str(PACKAGE / "runtime" / "runtime.cpp")
        tools.run([*arguments, "-c", source, "-o", str(target)], "the runtime")
        tools.link([target], folder / "runtime.so")

    return cached("runtime", make) / "runtime.so"


def compile_ir(text: str, prelude: str, warnings: Sequence[str], to: Path) -> str:
    """Compiles a kernel's text to optimized LLVM IR in the file `to`.

    Returns:
        clang's warnings.

    Raises:
        EmulatorError: clang rejects the text; the message has its diagnostics.
    """
    source = to.with_suffix(".msl")
    source.write_text(text, encoding="utf-8")
    return toolchain().run(
        [*LANGUAGE, *OPTIMIZATION, *include_arguments(), *warnings]
        + ["-include-pch", str(precompiled(prelude)), "-S", "-emit-llvm", str(source)]
        + ["-o", str(to)],
        "the kernel",
    )


def compile_library(ir: str, to: Path) -> None:
    """Compiles LLVM IR to a shared library that uses the runtime."""
    tools = toolchain()
    source, target = to.with_suffix(".ll"), to.with_suffix(".o")
    source.write_text(ir, encoding="utf-8")
    # No passes over IR, which is optimized already: they would take half of the time.
    flags = ["-O2", "-Xclang", "-disable-llvm-passes", "-fPIC", "-ffp-contract=off"]
    tools.run(
        ["-x", "ir", *flags, *tools.machine, "-Wno-override-module"]
        + ["-c", str(source), "-o", str(target)],
        "the instrumented kernel",
    )
    tools.link([target, runtime_library()], to)
    target.unlink()
