"""Rewrites Metal source where clang's C++ for OpenCL needs another syntax."""

import re


def clang_dialect(text: str) -> str:
    """Rewrites Metal source so that clang accepts it; line numbers stay the same.

    Five things change. The qualifier `thread` of a constructor is removed, because in C++ for
    OpenCL a constructor without one works in every address space. Function constants, which a host
    sets at launch, become true. Threadgroup arrays become references to memory of the runtime. The
    suffix bf of a literal becomes a conversion. Kernels become static, so that only the called one
    stays in the IR.
    """
    names = "|".join(re.findall(r"\bstruct\s+(?:alignas\(.*\)\s*)?(\w+)", text))
    if names:
        text = re.sub(rf"((?:[;{{}}]|\w)\s+(?:{names})\s*\([^()]*\)\s*)thread\b", r"\1", text)
    constant = r"^constant bool (\w+) \[\[function_constant\(\d+\)\]\];"
    text = re.sub(constant, r"constexpr constant bool \1 = true;", text, flags=re.M)
    text = re.sub(
        r"(?<![\w.])((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)bf\b", r"bfloat(float(\1))", text
    )
    text = re.sub(r"\[\[kernel\]\](\s+)void\b", r"[[kernel]]\1static void", text)
    return _threadgroup_arrays(text)


def without_comments(text: str) -> str:
    """The text with comments and strings replaced by blanks; length and lines stay the same."""

    def blank(found: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", found[0])

    return re.sub(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"", blank, text, flags=re.S)


def _innermost(code: str) -> list[str]:
    """For each character, the innermost open bracket around it, or ''."""
    stack, at = [""], []
    for c in code:
        at.append(stack[-1])
        if c in "([{":
            stack.append(c)
        elif c in ")]}" and len(stack) > 1:
            stack.pop()
    return at


def _threadgroup_arrays(text: str) -> str:
    """Turns `threadgroup float buf[64];` into a reference to memory of the runtime.

    So its size is known, guard pages surround it, and its first content is NaN.
    """
    code = without_comments(text)
    inside = _innermost(code)
    pieces, last, number = [], 0, 0
    for found in re.finditer(r"\bthreadgroup\b", code):
        start = found.start()
        if start < last or inside[start] not in ("", "{"):
            continue
        end = code.find(";", start)
        declaration = re.fullmatch(
            r"threadgroup\s+((?:const\s+|volatile\s+)*[\w:]+(?:\s*<[^;=]*?>)?)\s+"
            r"(\w+\s*(?:\[[^\]]*\]\s*)*(?:,\s*\w+\s*(?:\[[^\]]*\]\s*)*)*)",
            code[start:end],
        )
        if end < 0 or declaration is None:
            continue
        made = []
        for name, dims in re.findall(r"(\w+)\s*((?:\[[^\]]*\]\s*)*)", declaration[2]):
            made.append(f"MSL_ARRAY({number}, {name}, {dims.strip()}, {declaration[1]})")
            number += 1
        pieces.append(text[last:start] + "; ".join(made) + ";" + "\n" * code[start:end].count("\n"))
        last = end + 1
    return "".join(pieces) + text[last:]
