"""Run a merge: open the models, compute and measure routers, write the folder."""

from pathlib import Path

import mlx.core as mx
import numpy as np

from outlier_mlx.engine.loading import check_loads
from outlier_mlx.merge.gates import Gates
from outlier_mlx.merge.merge_config import read_merge_config
from outlier_mlx.merge.model import open_mixture
from outlier_mlx.merge.plan import DTYPES, StoredAs, make_config, make_parts, unquantized
from outlier_mlx.merge.report import Merged, as_json, model_card
from outlier_mlx.merge.routers import compute_routers, silent
from outlier_mlx.models.quantization import DEFAULT_GROUP_SIZE
from outlier_mlx.storage.output import write_json
from outlier_mlx.storage.paths import named
from outlier_mlx.terminal import Stages
from outlier_mlx.writing.assets import copy_assets
from outlier_mlx.writing.folders import Sources, check_free, check_space
from outlier_mlx.writing.model_folder import write_model
from outlier_mlx.writing.parts import Parts

REPORT = "merge.json"


def merge(
    config_file: str | Path,
    out: str | Path,
    *,
    bits: int | None = None,
    group_size: int = DEFAULT_GROUP_SIZE,
    dtype: str | None = None,
    no_positive: str | None = None,
    held_out: str | Path | None = None,
    seed: int = 0,
    measure: bool = True,
    force: bool = False,
    stages: Stages = silent,
) -> Merged:
    """Merge dense models into a mixture of experts.

    Memory holds at most one layer's attention, or one expert's FFN in one layer, and the hidden
    states of the prompts' tokens.

    Args:
        config_file: the YAML file; see `merge.merge_config`.
        out: the folder to write.
        bits: 4 or 8: an MLX folder with quantized matrices; None: Hugging Face's tensor names.
        group_size: 32, 64 or 128 weights that share a scale.
        dtype: used instead of the configuration's `dtype`.
        no_positive: used instead of the configuration's `no_positive`.
        held_out: YAML file with a list of prompts for each expert, used instead of the
            configuration's `held_out`.
        seed: seed of random routers and of noise.
        measure: whether to run the merged model on prompts before it is written. For `gate_mode:
            trained`, it always runs.
        force: replace `out` if it is a model that this project wrote.
        stages: shows progress.

    Raises:
        OutlierError: the configuration or a model is invalid, models do not match, the output
            exists, or the disk is too small. No files are left behind.
    """
    target = named(out)
    check_free(target, force=force)
    merge_config = read_merge_config(Path(config_file), no_positive=no_positive)
    if held_out is not None:
        merge_config = merge_config.with_held_out(Path(held_out))
    experts = [*merge_config.experts, merge_config.shared]
    models = [merge_config.base, *(expert.source for expert in experts if expert is not None)]
    inputs = [config_file, held_out, *models]
    check_free(target, force=force, sources=inputs)
    mixture = open_mixture(merge_config, seed)
    stored = DTYPES[mixture.base.tensors["model.embed_tokens.weight"].dtype]
    stored_as = StoredAs(dtype or merge_config.dtype or stored, bits, group_size)
    layers, hidden = mixture.base.config.layers, mixture.base.config.hidden
    empty = Gates(np.zeros((layers, len(mixture.experts), hidden)), np.zeros((layers, hidden)))
    check_space(target, Parts(make_parts(mixture, empty, stored_as)).nbytes, "the model")

    routers = compute_routers(merge_config, mixture, seed=seed, measure=measure, stages=stages)
    mx.clear_cache()  # free the buffers of layers
    tensors = Parts(make_parts(mixture, routers.gates, stored_as))
    result = Merged(
        path=target,
        merge_config=merge_config,
        mixture=mixture,
        stored_as=stored_as,
        seed=seed,
        rows=tensors.rows,
        unquantized=unquantized(tensors.parts, stored_as),
        routers=routers,
        notes=[*mixture.notes, *routers.notes],
    )
    _write(result, tensors, inputs, force=force, stages=stages)
    return result


def _write(result: Merged, tensors: Parts, inputs: Sources, *, force: bool, stages: Stages) -> None:
    report, mixture = as_json(result), result.mixture
    models = (mixture.base, *(expert.model for expert in mixture.all_experts))

    def assets(folder: Path) -> None:
        write_json(folder / REPORT, report)
        # The tokenizer is taken from the first folder that has one: the base.
        sources = dict.fromkeys(model.source.folder for model in models)
        copy_assets(list(sources), folder, "expert")

    with stages("writing", "") as progress:
        write_model(
            result.path,
            tensors,
            make_config(mixture, result.stored_as, tensors.parts),
            source=mixture.base.name,
            inputs=[*inputs, *(model.source.folder for model in models)],
            assets=assets,
            manifest={"source": {"form": "merge"} | {k: report[k] for k in ("base", "experts")}},
            card=lambda folder: model_card(result, folder),
            check=check_loads,
            force=force,
            progress=progress,
        )
