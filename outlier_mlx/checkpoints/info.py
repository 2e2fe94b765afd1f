"""What a model is and how large, from its config and the headers of its files alone."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path

from outlier_mlx.checkpoints import Overlay, open_overlay
from outlier_mlx.checkpoints.heads import headers
from outlier_mlx.engine.memory import dimensions, kv_bytes
from outlier_mlx.errors import CheckpointError
from outlier_mlx.models.config import Defaults, parse_config
from outlier_mlx.models.summary import SummaryRow, kind_of, summarize
from outlier_mlx.storage.paths import inside
from outlier_mlx.storage.safetensors import TensorRef, read_json
from outlier_mlx.storage.shards import read_shards
from outlier_mlx.terminal import Progress

# A tier's own names, and those of models that portable tiers are.
EXPERT_NAMES = ("num_experts", "moe_num_experts", "num_local_experts")
TOP_K_NAMES = ("num_experts_per_tok", "moe_k")


@dataclass(frozen=True)
class Info:
    """What `outlier-mlx info` says.

    Attributes:
        name: the folder's or repository's name.
        kind: "tier", "overlay" or "model".
        form: the overlay's form, or how a tier stores its experts.
        params: parameters in all.
        active_params: parameters that a token uses.
        nbytes: bytes of all tensors.
        kv_bytes_per_token: bytes that the KV cache grows by with each token, in 16 bits.
        rows: parameters and bytes by kind of part, the total last.
        details: layers, experts and so on, for people.
    """

    name: str
    kind: str
    form: str
    params: int
    active_params: int
    nbytes: int
    kv_bytes_per_token: int
    rows: list[SummaryRow]
    details: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict:
        """Everything, with the bits per weight of each row."""
        rows = [asdict(row) | {"bits_per_weight": row.bits_per_weight} for row in self.rows]
        return asdict(self) | {"rows": rows}


def inspect(
    path_or_repo: str | Path,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Info:
    """Describe a tier, an overlay or a plain model; no weights are read or downloaded.

    Args:
        path_or_repo: a folder, or a repository on the hub.
        revision: branch, tag or commit on the hub.
        progress: told how many files on the hub have been asked for, and how many will be.

    Raises:
        CheckpointError: there is no model, or its files are not sound.
        OutlierError: the hub cannot be reached.
    """
    with headers(path_or_repo, revision, progress) as found:
        return _inspect_folder(found.source.folder, found.source.name)


def _inspect_folder(folder: Path, name: str) -> Info:
    config = _read_config(folder)
    if _is_overlay(config):
        overlay = open_overlay(folder)
        return _describe(name, config, overlay_sizes(overlay), overlay.form)
    return _describe(name, config, tensor_sizes(config, read_shards(folder)), None)


def _read_config(folder: Path) -> dict:
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder}: not a model: no config.json")
    return read_json(inside(folder, "config.json"))


def _is_overlay(config: dict) -> bool:
    experts = config.get("n_experts") or config.get("outlier_num_experts")
    dense = config.get("model_type") == "outlier_moe"
    return "ternary" not in config and bool(experts or dense)


#: Kind of part, parameters and bytes.
Sizes = Iterable[tuple[str, int, int]]


def _number(raw: dict, names: tuple[str, ...]) -> int:
    return next((int(raw[name]) for name in names if raw.get(name)), 0)


def _describe(name: str, raw: dict, sizes: Sizes, form: str | None) -> Info:
    try:
        return _added_up(name, raw, sizes, form)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # Any model may be asked about, so its config may hold anything.
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{name}: config.json does not describe the tensors: {reason}"
        ) from error


def _added_up(name: str, raw: dict, sizes: Sizes, form: str | None) -> Info:
    tier = "ternary" in raw
    overlay = _is_overlay(raw)
    if overlay:
        config = parse_config(raw, Defaults())
        experts, top_k = config.experts, config.top_k
    else:
        experts, top_k = _number(raw, EXPERT_NAMES), _number(raw, TOP_K_NAMES)
    rows = summarize(sizes)
    total = rows[-1]
    routed = next((row.params for row in rows if row.kind == "experts"), 0)
    idle = routed * (experts - min(top_k, experts)) // experts if experts else 0
    kind_name = "tier" if tier else "overlay" if overlay else "model"
    known = dimensions(raw)
    return Info(
        name=name,
        kind=kind_name,
        form=raw["ternary"].get("format", "?") if tier else form or raw.get("model_type", "?"),
        params=total.params,
        active_params=total.params - idle,
        nbytes=total.nbytes,
        kv_bytes_per_token=kv_bytes(known, 1) if known else 0,
        rows=rows,
        details=_details(raw, experts, top_k),
    )


def overlay_sizes(overlay: Overlay) -> Sizes:
    """Kind, parameters and bytes of everything that an overlay holds, whatever its form."""
    moe_layers = overlay.config.moe_layers
    for name, tensor in overlay.base.items():
        shared = ".mlp." in name and int(name.split(".")[2]) in moe_layers
        kind = "shared FFN" if shared else kind_of(name)
        yield kind, prod(tensor.shape), tensor.nbytes
    for router in [*overlay.routers.values(), *overlay.alpha_tensors.values()]:
        yield "router", prod(router.shape), router.nbytes
    for expert in (expert for experts in overlay.experts.values() for expert in experts):
        for _, matrix in expert:
            scale = matrix.scale.nbytes if isinstance(matrix.scale, TensorRef) else 0
            yield "experts", prod(matrix.trits.shape), matrix.trits.nbytes + scale


def tensor_sizes(raw: dict, tensors: Mapping[str, TensorRef]) -> Sizes:
    """Kind, parameters and bytes of the tensors of a tier or plain model."""
    for key, tensor in tensors.items():
        yield kind_of(key), _params(key, tensor, raw, tensors), tensor.nbytes


def _params(key: str, tensor: TensorRef, raw: dict, tensors: Mapping[str, TensorRef]) -> int:
    """Parameters of the model that a tensor stands for; scales and biases of codes count none."""
    shape = tensor.shape
    module, _, leaf = key.rpartition(".")
    if f"{module}.qweight" in tensors and leaf in ("qweight", "qzeros", "scales"):  # AWQ
        return 8 * prod(shape) if leaf == "qweight" else 0
    weight = tensors.get(f"{module}.weight")
    ternary = "ternary" in raw or "ternary_switch" in raw
    packed = weight is not None and weight.dtype in (("U8", "U32") if ternary else ("U32",))
    if packed and leaf in ("scales", "biases"):
        return 0
    if key.endswith("_scale") or (leaf == "scale" and ".experts." in key):
        return 0
    if leaf != "weight" or not packed:
        return prod(shape)
    if tensor.dtype == "U8":
        inner = "moe_intermediate_size" if "ternary" in raw else "intermediate_size"
        return prod(shape[:-1]) * int(raw[inner if ".down_proj" in module else "hidden_size"])
    quantization = raw.get("quantization") or {}
    bits = int((quantization.get(module) or quantization).get("bits", 4))
    return prod(shape) * 32 // bits


def _details(raw: dict, experts: int, top_k: int) -> dict[str, str]:
    details = {
        "architecture": str(raw.get("model_type", "?")),
        "layers": str(raw.get("num_hidden_layers") or raw.get("n_layers") or "?"),
    }
    if experts:
        lists = [raw[n] for n in ("moe_layers", "moe_layer_indices", "v3_2_moe_layers") if n in raw]
        count = len(lists[0]) if lists and isinstance(lists[0], list) else "all"
        details["MoE layers"] = str(count)
        details["experts"] = f"{experts}, {top_k} used by a token"
    quantization = raw.get("quantization")
    if isinstance(quantization, dict):
        details["base"] = (
            f"{quantization.get('bits')} bits, groups of {quantization.get('group_size')}"
        )
    return details
