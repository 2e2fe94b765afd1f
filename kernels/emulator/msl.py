"""Builds a translation unit from a kernel's text, and selects the compiler's diagnostics."""

import re
from dataclasses import dataclass

from .dialect import clang_dialect, without_comments
from .errors import LintError

FILE = "kernel"  # file name of the kernel's text in diagnostics

# Every warning is an error. Turned off are warnings that the generated signature and C++ templates
# cause (unused parameters, comparisons of mixed signs), a harmless one that mlx-lm's kernels cause
# (unused variables), and those about Metal's own attributes.
WARNINGS = [
    "-Wall", "-Wextra", "-Wfloat-conversion", "-Wimplicit-float-conversion",
    "-Wimplicit-int-conversion", "-Wno-shorten-64-to-32",
    "-Wno-unused-parameter", "-Wno-sign-compare", "-Wno-unknown-attributes",
    "-Wno-ignored-attributes", "-Wno-pass-failed", "-Wno-implicit-int-float-conversion",
    "-Wno-unused-function", "-Wno-unused-variable",
]  # fmt: skip

_SCALARS = "bool char uchar short ushort int uint long ulong half bfloat float void size_t"
_SCALARS += " int8_t uint8_t int16_t uint16_t int32_t uint32_t int64_t uint64_t bfloat16_t"
_SPACES = {"device", "constant", "threadgroup", "thread"}
_SPECIFIERS = {"const", "volatile", "static", "constexpr", "inline", "unsigned", "METAL_FUNC"}


@dataclass(frozen=True)
class Prepared:
    """A kernel's text, ready for clang."""

    text: str
    prelude: str  # text before it, the same for many kernels


_WORDS = {"__private": "thread", "__global": "device", "__local": "threadgroup",
          "__constant": "constant"}  # fmt: skip


def relevant_diagnostics(diagnostics: str) -> str:
    """Selects relevant errors and warnings from clang's output, with Metal's names.

    A literal such as 1e30 has type float in Metal, but clang first makes it a double and then warns
    about the conversion. This warning is dropped, as nothing else is a double; so are notes about
    candidates in the emulator's own headers.
    """
    found = re.split(r"^(?=\S+:\d+:\d+: |In file included|\d+ \w+s? )", diagnostics, flags=re.M)
    kept, keep = [], False
    for one in found:
        head = one.split("\n", 1)[0]
        if ": note: " in head:
            if keep and head.startswith(f"{FILE}:"):
                kept.append(one)
            continue
        literal = "'double' to 'float'" in head
        keep = (": error: " in head or ": warning: " in head) and not literal
        if keep:
            kept.append(one)
    text = "".join(kept).replace("__generic ", "").replace(": warning: ", ": error: ")
    return re.sub("|".join(_WORDS), lambda word: _WORDS[word[0]], text)


def _swizzle_macros(text: str) -> str:
    """Defines the vector members that the text uses, like .xy: see include/msl/vector.h."""
    used = sorted(set(re.findall(r"\.\s*([xyzw]{2,4}|[rgba]{2,4})\b", without_comments(text))))
    lines = []
    for n in (2, 3, 4):
        fields = []
        for name in used:
            order = "xyzw" if name[0] in "xyzw" else "rgba"
            if all(c in order[:n] for c in name):
                indices = ", ".join(str(order.index(c)) for c in name)
                fields.append(f"MSL_SWIZZLE({len(name)}, {name}, {indices})")
        lines.append(f"#define MSL_SWIZZLES_{n} {' '.join(fields)}\n")
    return "".join(lines)


def _check_address_spaces(text: str) -> None:
    """Raises `LintError` for a pointer or reference without an address space.

    C++ for OpenCL accepts it, but Metal does not.
    """
    code = without_comments(text)
    declared = set(_SCALARS.split())
    declared |= set(re.findall(r"\b(?:typename|class|struct|using)\s+(\w+)", code))
    declared |= {f"{t}{n}" for t in _SCALARS.split()[:12] for n in (2, 3, 4)}
    names = "|".join(sorted(declared, key=len, reverse=True))
    pattern = rf"\b({names})\b(?:\s*<[^<>;()]*>)?\s*(?:const\s*)?"
    pattern += r"([*&])(?![&=])\s*(?:const\s+)?(?=[\w,)>(])"
    for found in re.finditer(pattern, code):
        before = re.findall(r"\w+|[^\w\s]", code[max(0, found.start() - 200) : found.start()])
        words = set()
        while before and (before[-1] in _SPECIFIERS | _SPACES or before[-1] in ("metal", ":")):
            words.add(before.pop())
        if before and before[-1] in ("typename", "class", "struct", "using", "sizeof"):
            continue
        if not words & _SPACES:
            line = code.count("\n", 0, found.start()) + 1
            kind = "pointer" if found[2] == "*" else "reference"
            raise LintError(
                f"{FILE}:{line}: error: {kind} type must have an explicit address space: "
                f"{' '.join(text[found.start() : found.end()].split())!r}"
            )


def prepare(text: str, entry: str, includes: tuple[str, ...], swizzles_from: str = "") -> Prepared:
    """Builds a translation unit from a kernel's text.

    Args:
        text: the kernel, after its helper functions.
        entry: the function that calls it; is appended.
        includes: headers of MLX to put before the text.
        swizzles_from: other text that uses vector members such as .xy.

    Raises:
        LintError: a pointer or reference without an address space.
    """
    _check_address_spaces(text)
    prelude = _swizzle_macros(text + swizzles_from) + "#define MLX_METAL_JIT 1\n"
    prelude += "".join(f'#include "{name}"\n' for name in includes)
    body = clang_dialect(text)
    poison = "#pragma clang poison double"  # Metal has no such type
    return Prepared(f'{poison}\n#line 1 "{FILE}"\n{body}\n#line 1 "entry"\n{entry}', prelude)
