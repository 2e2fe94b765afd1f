"""What `bench` measures with a model: its speed, MLX's settings, or the decode kernels."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import typer

from outlier_mlx.cli.app import print_json, say
from outlier_mlx.cli.loading import load_checked, planned_memory, refuse_paging, use_of
from outlier_mlx.cli.options import Loading
from outlier_mlx.errors import OutlierError
from outlier_mlx.storage.hub import resolve

if TYPE_CHECKING:
    from outlier_mlx.measure.bench import BenchOptions


def bench_speed(
    model: str, loading: Loading, options: "BenchOptions", *, as_json: bool, quiet: bool
) -> None:
    """Measure speed and memory of a model.

    Raises:
        OutlierError: it does not fit into memory, or is not valid.
    """
    from outlier_mlx.measure.bench import bench_model
    from outlier_mlx.measure.bench_tables import print_result
    from outlier_mlx.terminal import progress_bar

    source = resolve(model, loading.revision)
    step = options.prefill_step_size
    loaded, tokenizer = load_checked(source, loading, options.tokens, step=step, quiet=quiet)
    with progress_bar("measuring", "runs", quiet=quiet) as progress:
        found = bench_model(loaded, tokenizer, options, progress, source.folder)
    _show(source.name, found, print_result, as_json=as_json)


def bench_kernels(
    model: str,
    loading: Loading,
    options: "BenchOptions",
    *,
    save: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Time the variants of the decode kernels, and perhaps use the best from then on.

    Raises:
        OutlierError: the model is no tier, does not fit into memory, or is not valid; or there are
            no kernels here to save.
        Exit: a variant could not be timed.
    """
    from outlier_mlx.measure.bench_kernels import bench_kernels, copied_bytes
    from outlier_mlx.measure.bench_results import save_best
    from outlier_mlx.measure.bench_tables import print_kernels
    from outlier_mlx.runtime.ops import use_metal
    from outlier_mlx.terminal import progress_bar, size

    loading = refuse_paging(loading, "--kernels times kernels on all experts")
    if not use_metal():
        if save:
            raise OutlierError("--save: no Metal here, so there are no kernels to choose from")
        say("no Metal here, so there are no kernels to time: this is the plain path in MLX alone")
    source, step = resolve(model, loading.revision), options.prefill_step_size
    loaded, _ = load_checked(source, loading, options.tokens, step=step, quiet=quiet)
    if not quiet:
        copies = copied_bytes(loaded, options.batch_size)
        say(f"copies in MLX's formats take {size(copies)} at a time")
    with progress_bar("measuring", "runs", quiet=quiet) as progress:
        found = bench_kernels(loaded, options.num_trials, options.batch_size, progress)
    _show(source.name, found, print_kernels, as_json=as_json)
    for error in found.errors:
        say(error)
    if save:
        say(f"saved the best variants in {save_best(found)}")
    if found.errors:
        raise typer.Exit(1)


def bench_settings(
    model: str, loading: Loading, options: "BenchOptions", *, as_json: bool, quiet: bool
) -> None:
    """Compare sizes of MLX's command buffers.

    Raises:
        OutlierError: the model does not fit into memory, or a run failed.
        BadParameter: there are too few runs to compare.
        Exit: the model computes something else with other sizes.
    """
    from outlier_mlx.measure.bench_settings import LEAST_ROUNDS, bench_settings, run_apart
    from outlier_mlx.measure.bench_tables import print_settings
    from outlier_mlx.runtime.ops import use_metal
    from outlier_mlx.terminal import progress_bar

    if options.num_trials < LEAST_ROUNDS:
        raise typer.BadParameter(
            f"--settings needs at least {LEAST_ROUNDS}: fewer show nothing but noise",
            param_hint="--num-trials",
        )
    loading = refuse_paging(loading, "--settings compares speeds with all experts loaded")
    if not use_metal():
        say("no Metal here, so MLX has no command buffers: what differs below is noise")
    source = resolve(model, loading.revision)
    planned_memory(source, loading, use_of(loading, options.tokens), quiet=True)
    run = partial(run_apart, source.folder, options, loading.dtype)
    with progress_bar("measuring", "runs", quiet=quiet) as progress:
        found = bench_settings(run, options, progress)
    _show(source.name, found, print_settings, as_json=as_json)
    for error in found.errors:
        say(error)
    if found.errors:
        raise typer.Exit(1)


def _show(model: str, found: Any, show: Callable[[str, Any], None], *, as_json: bool) -> None:
    """Print what was found, as JSON or with `show`."""
    if as_json:
        print_json({"model": model} | found.as_json())
    else:
        show(model, found)
