"""The `outlier_moe.py` of a tier: `runtime/` joined into one file that needs only mlx and mlx-lm.

mlx-lm runs it (`model_file` in config.json) where this package is not installed, if its user
passes --trust-remote-code. Joining is textual: imports between the modules are removed, and all
others are moved to the top.
"""

import ast
from pathlib import Path

import outlier_mlx.runtime
from outlier_mlx.runtime.kernel_text import kernel_names, kernel_text

MODULE_ORDER = ("affine2", "variants", "kernels", "ops", "switch", "moe", "model")

_HEADER = '''"""Model code of an Outlier tier, written by outlier-mlx.

Load this folder with mlx-lm and --trust-remote-code, or with outlier-mlx, which never runs it.
Licence: Apache-2.0.
"""
'''


def bundle() -> str:
    """The text of `outlier_moe.py`."""
    folder = Path(outlier_mlx.runtime.__file__).parent
    plain: set[str] = set()
    froms: dict[str, set[str]] = {}
    bodies = [_kernels()]
    for name in MODULE_ORDER:
        source = (folder / f"{name}.py").read_text(encoding="utf-8")
        bodies.append(_without_imports(source, plain, froms))
    lines = [f"import {name}" for name in plain]
    lines += [f"from {module} import {', '.join(sorted(names))}" for module, names in froms.items()]
    standard = [line for line in lines if not line.split()[1].startswith("mlx")]
    others = [line for line in lines if line.split()[1].startswith("mlx")]
    blocks = ["\n".join(sorted(block, key=_import_order)) for block in (standard, others)]
    return _HEADER + "\n" + "\n\n".join(blocks) + "\n\n" + "\n\n\n".join(bodies) + "\n"


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
