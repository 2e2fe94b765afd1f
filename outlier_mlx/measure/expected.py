"""The speed to expect of a model on a machine: one formula, for what is loaded and what is not.

The time of a decoded token is the sum of

    memory     the bytes that it reads, by the bandwidth (on a CPU: the weights that it multiplies)
    launches   their number, by the time of one
    disk       the bytes of experts that are not in memory, by the disk's speed; but the disk reads
               while a layer's shared FFN is computed, so that much of it costs nothing

Nothing else is counted, and bandwidths are used fully, so the speed is the most that there can be.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from outlier_mlx.models.config import Description
from outlier_mlx.models.sizes import bytes_read, kv_bytes
from outlier_mlx.models.stored import stored_params
from outlier_mlx.models.summary import kind_of
from outlier_mlx.runtime.costs import LAUNCH_SECONDS
from outlier_mlx.storage.safetensors import TensorRef

# Launches of a token as docs/kernels.md counts them: of a layer, of its experts, and all others.
LAYER_LAUNCHES, ROUTED_LAUNCHES, OTHER_LAUNCHES = 20, 3, 6


@dataclass(frozen=True)
class Work:
    """What a model has to do for a token.

    Attributes:
        nbytes: bytes read from memory to decode a token: weights and KV cache.
        weights: weights that are multiplied to decode a token, and values of the KV cache.
        prompt_weights: weights that are multiplied for a token of a prompt, but for the last one.
            Of the last layer, these are only keys and values, and the head is left out: mlx-lm
            evaluates nothing of a prompt but the KV cache.
        launches: launches of a decoded token on a GPU.
        routed_bytes: bytes of the experts that a token uses, all layers together.
        expert_bytes: bytes of all experts.
        shared_share: the part of `nbytes` that is shared FFNs, beside which experts are read.
    """

    nbytes: int
    weights: int
    prompt_weights: int
    launches: int
    routed_bytes: int
    expert_bytes: int
    shared_share: float


@dataclass(frozen=True)
class Machine:
    """What a machine does in a second.

    Attributes:
        bandwidth_gb_s: GB/s of memory; None: not known.
        weights_per_s: weights that a CPU multiplies, with one vector; it is used in place of the
            bandwidth if it is given.
        prompt_weights_per_s: the same with many vectors, as in a prompt; None: not known.
        launch_seconds: time of a launch, or of an operation on a CPU.
        disk_gb_s: GB/s of a disk; None: not known.
    """

    bandwidth_gb_s: float | None = None
    weights_per_s: float | None = None
    prompt_weights_per_s: float | None = None
    launch_seconds: float = LAUNCH_SECONDS
    disk_gb_s: float | None = None


@dataclass(frozen=True)
class Expected:
    """The least time of a decoded token, in seconds, and its parts.

    Attributes:
        memory: reading weights and KV cache from memory (on a CPU: multiplying).
        launches: launching.
        disk: reading experts from the disk, as far as nothing else is done meanwhile.
    """

    memory: float
    launches: float
    disk: float

    @property
    def seconds(self) -> float:
        """Seconds of a token."""
        return self.memory + self.launches + self.disk

    @property
    def tokens_per_s(self) -> float:
        """Tokens/s, at most."""
        return 1 / self.seconds

    def as_json(self) -> dict[str, Any]:
        """Tokens/s, and the parts in seconds."""
        return {"tokens_per_s": self.tokens_per_s, "seconds": asdict(self)}


def decoding(work: Work, machine: Machine, missing_bytes: float = 0.0) -> Expected | None:
    """The time of a decoded token.

    Args:
        work: what the model has to do.
        machine: what does it.
        missing_bytes: bytes of experts that a token reads from the disk, on average.

    Returns:
        None if the machine's speed is not known; or that of its disk, where bytes are missing.
    """
    if machine.weights_per_s is not None:
        memory = work.weights / machine.weights_per_s
    elif machine.bandwidth_gb_s is not None:
        memory = work.nbytes / machine.bandwidth_gb_s / 1e9
    else:
        return None
    disk = 0.0
    if missing_bytes:
        if machine.disk_gb_s is None:
            return None
        disk = max(0.0, missing_bytes / machine.disk_gb_s / 1e9 - work.shared_share * memory)
    return Expected(memory, work.launches * machine.launch_seconds, disk)


def reading(
    work: Work, machine: Machine, missing_bytes: float = 0.0, step: int = 1
) -> float | None:
    """Prompt tokens/s, at most: as fast as the machine multiplies, and as its disk reads meanwhile.

    Args:
        work: what the model has to do.
        machine: what does it.
        missing_bytes: bytes of experts that a chunk of the prompt reads from the disk.
        step: tokens of a chunk.

    Returns:
        None if nothing of that is known.
    """
    limits = []
    if machine.prompt_weights_per_s is not None:
        limits.append(machine.prompt_weights_per_s / work.prompt_weights)
    if missing_bytes and machine.disk_gb_s is not None:
        limits.append(step * machine.disk_gb_s * 1e9 / missing_bytes)
    return min(limits, default=None)


def work_of(
    tensors: Mapping[str, TensorRef], config: Description, context: int, name: str
) -> Work | None:
    """What a stored model has to do for a token.

    Args:
        tensors: the model's tensors, by mlx-lm's names.
        config: the model's.
        context: tokens in the KV cache, which is taken to have 16 bits.
        name: name of the model in messages.

    Returns:
        None if the size of the KV cache is not known.

    Raises:
        CheckpointError: the config does not say how a tensor is packed.
    """
    params = {key: stored_params(key, tensors, config, name) for key in tensors}
    cache = kv_bytes(config, context)
    if cache is None:
        return None
    nbytes = _used({key: tensor.nbytes for key, tensor in tensors.items()}, tensors, config)
    weights = _used(params, tensors, config)
    kinds: dict[str, int] = {}
    for key, tensor in tensors.items():
        kinds[kind_of(key)] = kinds.get(kind_of(key), 0) + tensor.nbytes
    prompt = {key: n for key, n in params.items() if _in_prompt(key, config)}
    routed = len(config.moe_layers or ())
    total = nbytes + cache
    return Work(
        nbytes=total,
        weights=weights + cache // 2,
        prompt_weights=max(1, _used(prompt, tensors, config)),
        launches=(config.layers or 0) * LAYER_LAUNCHES + routed * ROUTED_LAUNCHES + OTHER_LAUNCHES,
        routed_bytes=round(kinds.get("experts", 0) * used_share(config)),
        expert_bytes=kinds.get("experts", 0),
        shared_share=kinds.get("shared FFN", 0) / total,
    )


def _in_prompt(key: str, config: Description) -> bool:
    """Whether a tensor is needed for a token whose logits are not asked for."""
    last = f"model.layers.{(config.layers or 0) - 1}."
    if key.startswith(last):
        return any(f".{name}." in key for name in ("input_layernorm", "k_proj", "v_proj"))
    return kind_of(key) not in ("embeddings", "head")


def used_share(config: Description) -> float:
    """The part of a layer's experts that a token uses; 1 without experts."""
    return min(config.top_k or config.experts, config.experts) / max(1, config.experts) or 1.0


def expected_share(config: Description, tokens: int) -> float:
    """The part of a layer's experts that so many tokens use, on average.

    Experts are taken to be used equally often, whatever other tokens use.
    """
    return 1 - (1 - used_share(config)) ** tokens


def _used(sizes: Mapping[str, int], tensors: Mapping[str, TensorRef], config: Description) -> int:
    """What a token uses of all sizes, without the KV cache; experts may be stored one by one."""
    rows = (
        (".switch_mlp." if kind_of(key) == "experts" else key, n, (*tensors[key].shape, 1)[0])
        for key, n in sizes.items()
    )
    empty = replace(config, attention=(), kv_heads=1, head_dim=1)
    return bytes_read(rows, empty, 0, 2) or 0
