"""Results that commands print: tables, and a few lines around them."""

from typing import TYPE_CHECKING

from outlier_mlx.errors import listed, one_line
from outlier_mlx.terminal import (
    count,
    parts_table,
    print_columns,
    print_heading,
    size,
    stderr,
    stdout,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from outlier_mlx.checkpoints.info import Info
    from outlier_mlx.checkpoints.ternary_info import TernaryInfo
    from outlier_mlx.engine.machine import Budget
    from outlier_mlx.engine.paging.statistics import PagingStatistics
    from outlier_mlx.engine.responses import Response
    from outlier_mlx.imports import Imported
    from outlier_mlx.tiers.choose import Choice
    from outlier_mlx.tiers.convert import Report


def print_report(report: "Report") -> None:
    """Print what a conversion wrote."""
    console = stderr()
    recipe = report.recipe
    console.print(
        parts_table(report.rows, one_line(f"{report.path.name}: {recipe.name}, {recipe.dtype}"))
    )
    if report.unquantized:
        names = listed(report.unquantized, 4)
        console.print(
            f"unquantized, since no group size divides their width: {names}", soft_wrap=True
        )
    for note in report.notes:
        console.print(note, soft_wrap=True)
    console.print(
        one_line(f"wrote {report.path} from an overlay of form {report.form}"), soft_wrap=True
    )


def print_imported(written: "Imported") -> None:
    """Print what an import wrote, and what is not exact in it."""
    console = stderr()
    print_heading(console, written.path.name, f": from {written.source_format}")
    console.print(parts_table(written.rows))
    for note in written.notes:
        console.print(one_line(note), soft_wrap=True)
    console.print(one_line(f"wrote {written.path}"), soft_wrap=True)


def print_statistics(response: "Response", paging: "PagingStatistics | None" = None) -> None:
    """Print speed and memory of a finished generation, and what paged experts cost."""
    drafted = f"; {response.counts}" if response.counts.drafted else ""
    stderr().print(
        f"prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.1f} tokens/s\n"
        f"generation: {response.generation_tokens} tokens,"
        f" {response.generation_tps:.1f} tokens/s{drafted}\n"
        f"peak memory: {response.peak_memory:.3f} GB"
    )
    if paging is not None:
        stderr().print(str(paging), soft_wrap=True)


def print_info(info: "Info") -> None:
    """Print what a model is."""
    console = stdout()
    print_heading(console, info.name, f": {info.kind} ({info.form})")
    for name, value in _facts(info).items():
        console.print(one_line(f"{name}: {value}"), soft_wrap=True)
    console.print(
        f"parameters: {count(info.params)}, of which a token uses {count(info.active_params)}",
        soft_wrap=True,
    )
    tokens = min(info.context_length or 4096, 4096)
    cache = size((info.kv_bytes_per_token or 0) * tokens)
    more = f", and {cache} of KV cache for {tokens} tokens in 16 bits"
    console.print(
        f"memory: {size(info.nbytes)} of weights" + (more if info.kv_bytes_per_token else ""),
        soft_wrap=True,
    )
    console.print(parts_table(info.rows))
    if info.ternary is not None:
        for line in _ternary_lines(info.ternary):
            indent = line[: len(line) - len(line.lstrip())]
            console.print(indent + one_line(line), soft_wrap=True)


def _ternary_lines(ternary: "TernaryInfo") -> "Iterator[str]":
    """What is known of a model's matrices: a line for all, and some for each sort."""
    from outlier_mlx.checkpoints.ternary_info import FLOATS

    total, possible = len(ternary.matrices), ternary.possible
    floats = any(matrix.form == FLOATS for matrix in ternary.matrices)
    of_all = f"of {total} {'matrices' if floats else 'quantized matrices'}"
    hint = "(--deep reads their codes)"
    if floats and not ternary.deep:
        return  # any model may be: this is no news
    if not possible:
        yield f"ternary: none {of_all}"
    else:
        known, unknown = len(ternary.of(True)), len(ternary.of(None))
        said = f"{known} {of_all}"
        if unknown:
            more = f"perhaps {unknown}"
            said = f"{said}, and {more} more {hint}" if known else f"{more} {of_all} {hint}"
        now = sum(matrix.nbytes for matrix in possible)
        packed = sum(matrix.packed_nbytes or 0 for matrix in possible)
        yield f"ternary: {said}"
        if packed != now:
            yield f"as ternary rows: {size(packed)} in place of {size(now)} ({packed / now:.2f})"
    words = {True: "ternary", False: "not ternary", None: "perhaps ternary"}
    sorts: dict[tuple[str, str], list[str]] = {}
    for matrix in ternary.matrices:
        sort = (matrix.form, words[matrix.ternary])
        sorts.setdefault(sort, []).append(matrix.name)
    for (form, word), names in sorts.items():
        yield f"  {word} ({form}):"
        yield from (f"    {line}" for line in patterns(names))


def patterns(names: "Iterable[str]") -> list[str]:
    """Names in few lines, as shells spell several: `model.layers.{0-2,5}.mlp.{gate,up}_proj`."""
    paths = [tuple(name.split(".")) for name in dict.fromkeys(names)]
    for place in reversed(range(max(map(len, paths), default=0))):
        numbers: dict[tuple[str, ...], list[int]] = {}
        for path in paths:
            number = path[place] if place < len(path) and path[place].isdecimal() else None
            key = path if number is None else (*path[:place], "*", *path[place + 1 :])
            numbers.setdefault(key, []).extend([] if number is None else [int(number)])
        paths = [
            (*path[:place], _ranges(found), *path[place + 1 :]) if found else path
            for path, found in numbers.items()
        ]
    leaves: dict[tuple[str, str], list[str]] = {}
    for path in paths:
        *folders, leaf, end = path if path[-1] == "weight" and len(path) > 1 else (*path, "")
        folder, weight = "".join(f"{part}." for part in folders), end and f".{end}"
        first, line, last = leaf.rpartition("_")
        if first and last == "proj":
            leaves.setdefault((folder, f"_{last}{weight}"), []).append(first)
        else:
            leaves.setdefault((f"{folder}{first}{line}", weight), []).append(last)
    return [begin + _braces(found) + end for (begin, end), found in leaves.items()]


def _ranges(numbers: list[int]) -> str:
    """Numbers such as {0-2,5}, or {3,7,...,31} if there are many; one alone without braces."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = [f"{a}-{b}" if a < b else f"{a}" for a, b in runs]
    said = ",".join(texts if len(texts) < 5 else [*texts[:2], "...", texts[-1]])
    return f"{{{said}}}" if len(numbers) > 1 else said


def _braces(found: list[str]) -> str:
    return found[0] if len(found) == 1 else f"{{{','.join(found)}}}"


def _facts(info: "Info") -> dict[str, object]:
    """Known facts about a model, by the names to print."""
    facts: dict[str, object] = {
        "architecture": info.architecture or "unknown",
        "layers": info.layers or "unknown",
    }
    if info.experts:
        used = info.experts_per_token or "an unknown number"
        facts["MoE layers"] = "all" if info.moe_layers is None else info.moe_layers
        facts["experts"] = f"{info.experts}, {used} used by a token"
    base = [info.base_architecture] if info.base_architecture else []
    if info.quantization is not None:
        bits, group_size = info.quantization["bits"], info.quantization["group_size"]
        base.append(f"{bits} bits, groups of {group_size}")
    if base:
        facts["base" if info.base_architecture else "quantization"] = ", ".join(base)
    return facts | {
        "context length": f"{info.context_length} tokens" if info.context_length else "unknown",
        "vocabulary": f"{info.vocab} tokens" if info.vocab else "unknown",
        "dtype": info.dtype or "unknown",
        "chat template": "yes" if info.chat_template else "no",
        "licence": info.licence or "not stated",
    }


def print_choices(choices: "list[Choice]", available: "Budget") -> None:
    """Print the memory that recipes need, compared with the memory that is available."""
    console = stdout()
    keys = next((list(choice.memory) for choice in choices if choice.memory), [])
    heads = [f"{tokens // 1024}k\n{bits or 16} bits" for tokens, bits in keys]
    rows = [
        (
            choice.name,
            size(choice.nbytes),
            *(_against(choice.memory[key], available.nbytes) for key in keys),
        )
        for choice in choices
        if choice.reason is None
    ]
    title = "Memory by tokens of context and bits of the KV cache"
    print_columns(console, ["recipe", "weights", *heads], rows, title=title, fixed=2)
    for choice in choices:
        for said in filter(None, (choice.reason, *choice.notes)):
            console.print(f"{choice.name}: {said}", soft_wrap=True)
    console.print(
        f"{available} (in brackets: does not fit)",
        soft_wrap=True,
    )


def _against(nbytes: int, limit: int) -> str:
    return size(nbytes) if nbytes <= limit else f"({size(nbytes)})"
