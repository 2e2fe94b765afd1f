"""Measuring several models one after another; the results of each are written at once."""

import gc
from pathlib import Path
from typing import Any

import mlx.core as mx

from outlier_mlx.engine.loading import check_model, load_model, load_tokenizer
from outlier_mlx.engine.memory import check_fits
from outlier_mlx.engine.needs import Use
from outlier_mlx.engine.paging.budget import ExpertMemory
from outlier_mlx.engine.plan import Plan
from outlier_mlx.errors import CheckpointError, OutlierError
from outlier_mlx.measure.outlier_draw import AXES, Against, draw_comparison, draw_heatmap
from outlier_mlx.measure.outlier_parameters import count_parameters, weights_bits
from outlier_mlx.measure.outlier_report import (
    FILES,
    RESULTS,
    SUMMARY,
    Study,
    describe,
    file_name,
    summarize,
)
from outlier_mlx.measure.outliers import Measurement, measure, read_windows
from outlier_mlx.measure.perplexity import warn_of_context
from outlier_mlx.measure.pictures import SUFFIXES, require_matplotlib
from outlier_mlx.storage.hub import Source, resolve
from outlier_mlx.storage.output import check_folder, clear_folder, write_json
from outlier_mlx.storage.texts import parse_json, read_bytes
from outlier_mlx.terminal import progress_bar, working


def study_models(
    models: list[str], study: Study, out: Path, *, force: bool = False, quiet: bool = True
) -> list[dict[str, Any]]:
    """Measure models, one in memory at a time.

    The results of a model are written when it is done, so a later model that fails does not lose
    them. Results of an earlier run are replaced when the first model is done.

    Args:
        models: folders or hub repositories.
        study: the text, and what is measured.
        out: the folder to write into.
        force: replace the results of an earlier run.
        quiet: show no progress on the terminal.

    Returns:
        The results of each, as `outlier_report.describe` has them.

    Raises:
        OutlierError: a model or the text is not usable, or `out` has results already.
    """
    check_folder(out, FILES, force=force, sources=[*models, study.text])
    if study.plots:
        require_matplotlib(", or --no-plots")
    named = _named(models)
    for source in named.values():
        check_model(source.folder)
    entries: list[dict[str, Any]] = []
    for name, source in named.items():
        entry, measured = _study(name, source, study, quiet)
        if not entries:
            clear_folder(out, _files_there(out))
        entries.append(entry)
        write_json(out / RESULTS, entries)
        write_json(out / SUMMARY, summarize(entries))
        if study.plots:
            with working(f"drawing {name}", quiet=quiet):
                path = out / _heatmap(name, f".{study.plots}")
                draw_heatmap(measured.counts, name, entry["blog"]["unique_dims"], path)
        del measured
    if study.plots:
        with working("drawing the comparison", quiet=quiet):
            for against in AXES:
                path = out / _comparison(against, f".{study.plots}")
                draw_comparison(entries, against, path)
    return entries


def _heatmap(model: str, suffix: str) -> str:
    return f"heatmap-{file_name(model)}{suffix}"


def _comparison(against: Against, suffix: str) -> str:
    return f"by-{against.replace('_', '-')}{suffix}"


def _files_there(out: Path) -> list[str]:
    """The names of the files that an earlier run wrote into a folder, by its results."""
    try:
        entries = parse_json(read_bytes(out / RESULTS), RESULTS)
    except (CheckpointError, OSError):
        return []
    names = [RESULTS, SUMMARY]
    for entry in entries if isinstance(entries, list) else ():
        model = entry.get("model") if isinstance(entry, dict) else None
        if isinstance(model, str):
            names += [_heatmap(model, suffix) for suffix in SUFFIXES]
    return names + [_comparison(against, suffix) for against in AXES for suffix in SUFFIXES]


def _named(models: list[str]) -> dict[str, Source]:
    """The models by name, or as they were given if names are equal."""
    sources = {given: resolve(given) for given in models}
    if len({source.folder.resolve() for source in sources.values()}) < len(models):
        raise OutlierError("a model is given twice")
    names = [source.name for source in sources.values()]
    return {
        source.name if names.count(source.name) == 1 else given: source
        for given, source in sources.items()
    }


def _study(
    name: str, source: Source, study: Study, quiet: bool
) -> tuple[dict[str, Any], Measurement]:
    folder = source.folder
    memory: ExpertMemory | Plan = study.memory
    if study.check_memory:
        memory = check_fits(folder, Use(0), memory=study.memory)
    with working(f"loading {name}", quiet=quiet):
        # The text is read first: it may be too short.
        tokenizer = load_tokenizer(folder, check_model(folder))
        windows = read_windows(tokenizer, study.text, study.sequences, study.length, study.overlap)
        model, config = load_model(folder, dtype=study.dtype, expert_memory=memory)
    warn_of_context(model, windows)
    try:
        parameters = count_parameters(model, config)
        with progress_bar(name, "layers", quiet=quiet) as progress:
            measured = measure(model, windows, study.options, progress)
    except OutlierError as error:
        raise OutlierError(f"{name}: {error}") from error
    bits = weights_bits(folder, len(model.layers), parameters.total)
    del model
    # The next model needs the memory.
    gc.collect()
    mx.clear_cache()
    return describe(name, measured, parameters, bits, study, windows), measured
