"""The model code in tiers and ternary models: modules of `runtime/` joined into one file.

It needs only mlx and mlx-lm. mlx-lm runs it (`model_file` in config.json) where this package is not
installed, if its user passes --trust-remote-code. Joining is textual: imports between the modules
are removed, and all others are moved to the top.
"""

import ast
import io
import re
import tokenize
from pathlib import Path

import outlier_mlx.runtime
from outlier_mlx.models.tier_fields import MODEL_FILE, TERNARY_FILE
from outlier_mlx.runtime.kernel_text import kernel_names, kernel_text

#: The modules of each file, in an order in which they can run.
MODULES = {
    MODEL_FILE: (
        *("affine2", "variants", "launching", "kernels", "blocks", "costs", "groups", "ops"),
        *("routing", "packed", "switch", "moe", "dtypes", "model"),
    ),
    TERNARY_FILE: (
        *("affine2", "variants", "launching", "kernels", "blocks", "costs", "groups"),
        *("ops", "packed", "rotation", "dense", "ternary_layers", "dtypes", "ternary_model"),
    ),
}
_OWNERS = {MODEL_FILE: "an Outlier tier", TERNARY_FILE: "a ternary model"}
# What mlx-lm looks for has the same names in every file, but not in this package.
_ALIASES = {
    MODEL_FILE: "",
    TERNARY_FILE: "\n\nModel, ModelArgs = TernaryModel, TernaryModelArgs\n",
}

_HEADER = '''"""Model code of {}, written by outlier-mlx.

Load this folder with mlx-lm and --trust-remote-code, or with outlier-mlx, which never runs it.
Licence: Apache-2.0.
"""
'''

_LITERAL_OR_COMMENT = re.compile(r'"[^"\n]*"|\'[^\'\n]*\'|//[^\n]*|/\*.*?\*/', re.DOTALL)


def bundle(file: str = MODEL_FILE) -> str:
    """The text of one of the files in `MODULES`."""
    folder = Path(outlier_mlx.runtime.__file__).parent
    plain: set[str] = set()
    froms: dict[str, set[str]] = {}
    bodies = [_kernels()]
    for name in MODULES[file]:
        source = (folder / f"{name}.py").read_text(encoding="utf-8")
        bodies.append(_without_imports(source, plain, froms))
    lines = [f"import {name}" for name in plain]
    lines += [f"from {module} import {', '.join(sorted(names))}" for module, names in froms.items()]
    standard = [line for line in lines if not line.split()[1].startswith("mlx")]
    others = [line for line in lines if line.split()[1].startswith("mlx")]
    blocks = ["\n".join(sorted(block, key=_import_order)) for block in (standard, others)]
    head = _HEADER.format(_OWNERS[file]) + "\n" + "\n\n".join(blocks)
    return head + "\n\n" + "\n\n\n".join(bodies) + "\n" + _ALIASES[file]


def is_bundle(data: bytes, file: str = MODEL_FILE) -> bool:
    """Whether code does what `bundle` does: the same statements, whatever comments say.

    So a folder stays valid when only comments, docstrings or line breaks of the project change.

    Args:
        data: a file's bytes.
        file: its name.
    """
    text = bundle(file)
    if data == text.encode():
        return True
    if len(data) > 2 * len(text.encode()):
        return False
    try:
        # With another encoding, Python would read other statements than are compared here.
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        return encoding == "utf-8" and _statements(data.decode()) == _statements(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _statements(text: str) -> str:
    """The statements of Python code as one text, without docstrings and the kernels' comments."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for value in node.values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    value.value = _without_comments(value.value)
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            first = body[0].value
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                first.value = ""
    return ast.dump(tree)


def _without_comments(metal: str) -> str:
    """The words of a kernel, line by line; line breaks end directives.

    Where a comment might not be what it seems (spliced lines, trigraphs, raw strings, other line
    breaks), the text stays as it is.
    """
    if not metal.isascii() or any(sign in metal for sign in ("\\", "??/", 'R"', "\r")):
        return metal
    code = _LITERAL_OR_COMMENT.sub(lambda m: m[0] if m[0][0] in "\"'" else " ", metal)
    lines = (" ".join(line.split()) for line in code.split("\n"))
    return "\n".join(line for line in lines if line)


def _kernels() -> str:
    """A replacement for `runtime/kernel_text.py`: the same function, with the text built in."""
    lines = ["KERNEL_TEXT = {"]
    for name in kernel_names():
        text = kernel_text(name)
        if '"""' in text or "\\" in text:
            raise ValueError(f"kernels/{name}.metal cannot stand in a Python string")
        lines.append(f'    "{name}": """\n{text}""",')
    lines += [
        "}",
        "",
        "",
        "def kernel_text(name: str) -> str:",
        '    """The text of a kernel."""',
        "    return KERNEL_TEXT[name]",
    ]
    return "\n".join(lines)


def _import_order(line: str) -> tuple[bool, str]:
    return line.startswith("from"), line


def _without_imports(source: str, plain: set[str], froms: dict[str, set[str]]) -> str:
    """A module's text without docstring and imports; those that leave `runtime/` are collected."""
    tree = ast.parse(source)
    lines = source.splitlines()
    for node in tree.body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.Import):
            plain.update(_spelt(alias) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                names = froms.setdefault(node.module or "", set())
                names.update(_spelt(alias) for alias in node.names)
        elif not docstring:
            continue
        for number in range(node.lineno - 1, node.end_lineno or node.lineno):
            lines[number] = ""
    return "\n".join(lines).strip()


def _spelt(alias: ast.alias) -> str:
    return f"{alias.name} as {alias.asname}" if alias.asname else alias.name
