"""What a model is and how large, from its config and the headers of its files alone."""

from collections.abc import Container, Iterable
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path

from outlier_mlx.checkpoints import ALPHA_OVERLAY, Overlay, open_overlay, packed
from outlier_mlx.checkpoints.expert_files import expert_of
from outlier_mlx.checkpoints.keys import AlphaKey, BaseKey, ExpertKey, RouterKey, parse_key
from outlier_mlx.checkpoints.single import matches
from outlier_mlx.engine.memory import dimensions, kv_bytes
from outlier_mlx.errors import CheckpointError, OutlierError
from outlier_mlx.models.config import Defaults, parse_config
from outlier_mlx.models.summary import SummaryRow, kind_of, summarize
from outlier_mlx.storage.hub import Source, cached, hub_errors, resolve
from outlier_mlx.storage.paths import inside
from outlier_mlx.storage.safetensors import NUMPY_DTYPES, TensorRef, read_json
from outlier_mlx.storage.shards import read_shards
from outlier_mlx.terminal import Progress

Tensors = dict[str, tuple[str, tuple[int, ...]]]
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
        progress: told how many files on the hub were asked for their headers, and how many will be.

    Raises:
        CheckpointError: there is no model, or its files are not sound.
        OutlierError: the hub cannot be reached.
    """
    if Path(path_or_repo).is_dir():
        folder = resolve(path_or_repo, revision).folder
        return _inspect_folder(folder, folder.resolve().name)
    source = resolve(path_or_repo, revision, files=("config.json",))
    config = _read_config(source.folder)
    try:
        return _inspect_repo(source, config, progress)
    except CheckpointError:
        raise
    except OutlierError:
        snapshot = cached(source.name, source.revision)
        if snapshot is None:
            raise
        return _inspect_folder(snapshot, source.name)


def _inspect_repo(source: Source, config: dict, progress: Progress | None) -> Info:
    """Describe a repository on the hub by the headers of its files."""
    from huggingface_hub import HfApi, RepoFile

    repo = source.name
    with hub_errors(repo):
        tree = list(HfApi().list_repo_tree(repo, recursive=True, revision=source.revision))
    files = {file.path: file.size for file in tree if isinstance(file, RepoFile)}
    index = None
    if packed.SIGN in files:
        index = resolve(repo, source.revision, files=(packed.SIGN,)).folder
    shards = [name for name in files if name.endswith(".safetensors")]
    tensors = _remote_tensors(repo, source.revision, shards, progress)
    sizes = list(tensor_sizes(repo, config, tensors))
    if not _is_overlay(config):
        return _describe(repo, config, sizes, None)
    form = matches(tensors)
    if index is not None and not any(kind == "experts" for kind, *_ in sizes):
        sizes += packed_sizes(index)
        form = "monolith" if f"{packed.FOLDER}/{packed.MONOLITH}" in files else "packed"
    if ALPHA_OVERLAY in files:
        form = f"{form} + {ALPHA_OVERLAY}"
    found = _describe(repo, config, sizes, form)
    for name, nbytes in files.items():
        if name.endswith(".gguf"):
            found.details[f"not counted: {name}"] = f"{nbytes / 1e9:.2f} GB"
    return found


def _inspect_folder(folder: Path, name: str) -> Info:
    config = _read_config(folder)
    if _is_overlay(config):
        overlay = open_overlay(folder)
        return _describe(name, config, overlay_sizes(overlay), overlay.form)
    tensors = {ref.name: (ref.dtype, ref.shape) for ref in read_shards(folder).values()}
    return _describe(name, config, tensor_sizes(name, config, tensors), None)


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


def _remote_tensors(
    repo: str, revision: str | None, files: list[str], progress: Progress | None
) -> Tensors:
    """Dtypes and shapes by range requests for the files' headers."""
    from huggingface_hub import HfApi

    api = HfApi()
    tensors: Tensors = {}
    for done, name in enumerate(files):
        if progress is not None:
            progress(done, len(files))
        with hub_errors(repo):
            header = api.parse_safetensors_file_metadata(repo, name, revision=revision)
        place = expert_of(name)
        prefix = "model.layers.{}.mlp.experts.{}.".format(*place) if place else ""
        for key, tensor in header.tensors.items():
            tensors[prefix + key] = (tensor.dtype, tuple(tensor.shape))
    if not tensors:
        raise CheckpointError(f"{repo}: no *.safetensors file")
    return tensors


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
        yield kind_of(tier_name(name, moe_layers)), prod(tensor.shape), tensor.nbytes
    for router in [*overlay.routers.values(), *overlay.alpha_tensors.values()]:
        yield "router", prod(router.shape), router.nbytes
    for expert in (expert for experts in overlay.experts.values() for expert in experts):
        for _, matrix in expert:
            scale = matrix.scale.nbytes if isinstance(matrix.scale, TensorRef) else 0
            yield "experts", prod(matrix.trits.shape), matrix.trits.nbytes + scale


def packed_sizes(folder: Path) -> Sizes:
    """Kind, parameters and bytes of packed experts, by their index alone."""
    for entry in packed.read_index(folder, packed.SIGN).values():
        yield "experts", prod(entry.shape) if entry.part.part == "trits" else 0, entry.nbytes


def tensor_sizes(name: str, raw: dict, tensors: Tensors) -> Sizes:
    """Kind, parameters and bytes of tensors, of whatever kind of model; `name` is for messages."""
    overlay = _is_overlay(raw)
    moe_layers = parse_config(raw, Defaults()).moe_layers if overlay else ()
    for key, (dtype, shape) in tensors.items():
        if dtype not in NUMPY_DTYPES:
            raise CheckpointError(f"{name}: {key}: dtype {dtype} is not one this project reads")
        nbytes = prod(shape) * NUMPY_DTYPES[dtype].itemsize
        kind = kind_of(tier_name(key, moe_layers)) if overlay else kind_of(key)
        yield kind, _params(key, dtype, shape, raw, tensors), nbytes


def tier_name(key: str, moe_layers: Container[int]) -> str:
    """The module that a key of an overlay belongs to, by its name in a tier."""
    match parse_key(key):
        case BaseKey(name):
            shared = ".mlp." in name and int(name.split(".")[2]) in moe_layers
            return name.replace(".mlp.", ".mlp.shared_expert.") if shared else name
        case ExpertKey(layer):
            return f"model.layers.{layer}.mlp.switch_mlp"
        case RouterKey(layer):
            return f"model.layers.{layer}.mlp.gate."
        case AlphaKey():
            return "model.layers.mlp.alpha"
    return key


def _params(key: str, dtype: str, shape: tuple[int, ...], raw: dict, tensors: Tensors) -> int:
    """Parameters of the model that a tensor stands for; scales and biases of codes count none."""
    module, _, leaf = key.rpartition(".")
    if f"{module}.qweight" in tensors and leaf in ("qweight", "qzeros", "scales"):  # AWQ
        return 8 * prod(shape) if leaf == "qweight" else 0
    weight = tensors.get(f"{module}.weight")
    ternary = "ternary" in raw or "ternary_switch" in raw
    packed = weight is not None and weight[0] in (("U8", "U32") if ternary else ("U32",))
    if packed and leaf in ("scales", "biases"):
        return 0
    if key.endswith("_scale") or (leaf == "scale" and ".experts." in key):
        return 0
    if leaf != "weight" or not packed:
        return prod(shape)
    if dtype == "U8":
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
