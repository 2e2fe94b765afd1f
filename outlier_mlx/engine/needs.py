"""What a model takes of memory, from the headers of its files and its config: no tensor is read."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from outlier_mlx.engine.distributed.share import replicated, share_of
from outlier_mlx.engine.paging.budget import Experts
from outlier_mlx.models.config import Description, describe, is_ternary_model, is_tier, raw_config
from outlier_mlx.models.sizes import kv_bytes
from outlier_mlx.runtime.affine2 import ROWS, affine_group, padded_width
from outlier_mlx.storage.safetensors import TensorRef
from outlier_mlx.storage.shards import read_shards

# Number of weights that a CPU multiplies in 0.2 s, if it has nothing else to do.
_CPU_STEP = 200_000_000
# Widths of heads for which MLX's GPU kernels keep the scores of attention to themselves.
FUSED_HEADS = (64, 80, 128)
# Experts that are read and converted at a time on a CPU, and how much more memory converting takes
# than what is converted: pieces of 2^20 bytes of rows.
CONVERTED_TOGETHER, CONVERTING = 2, 24
# MLX's own limit of its cache on a CPU, and what is enough on a GPU.
CPU_CACHE, MLX_CACHE = 32 << 20, 256 << 20
# mlx-lm's KV caches grow by so many tokens.
_CACHE_STEP = 256
#: In the names of the tensors of routed experts.
SWITCH = ".switch_mlp."
_HALVES = ("F16", "BF16")


@dataclass(frozen=True)
class Use:
    """How a model is going to be used.

    Attributes:
        tokens: tokens in the KV cache of a conversation.
        conversations: how many have a KV cache at the same time.
        prompts: how many of them are read at the same time.
        step: tokens of a prompt that are processed at a time, at most.
        logits: tokens whose logits are in memory at the same time.
        kv_bits: bits of a value in a quantized KV cache; None: it is not quantized.
        kv_group_size: values of a quantized KV cache that share a scale.
        kv_start: from how many tokens on it is quantized.
        wide: whether what has 16 bits is to be loaded and computed with 32, also on a GPU.
    """

    tokens: int = 4096
    conversations: int = 1
    prompts: int = 1
    step: int = 2048
    logits: int = 1
    kv_bits: int | None = None
    kv_group_size: int = 64
    kv_start: int = 0
    wide: bool = False


@dataclass(frozen=True)
class Needs:
    """What a model takes of memory.

    Attributes:
        plain: bytes of the weights that are always loaded: if `wide`, what has 16 bits in the files
            takes 32.
        copies: bytes of their ternary matrices once more, in MLX's 2-bit format, on a CPU.
        routed: bytes of the experts that can be paged; those of other models are in `plain`.
        routed_copies: the copies of these experts, if they are loaded.
        converted: bytes of the largest such copies that a GPU makes for a prompt, and drops.
        gathered: bytes that it takes more if experts are paged: on a GPU, to have the rows of a
            layer side by side; on a CPU, to convert experts that are read.
        experts: the experts that can be paged; None if there are none.
        elements: number of weights, all experts included.
        config: what is known of the model.
        on_cpu: whether it runs without a GPU.
        wide: whether what has 16 bits is loaded and computed with 32, as always on a CPU.
        replicated: of the stored weights, bytes of those that all ranks have; 0: there is one.
    """

    plain: int
    copies: int
    routed: int
    routed_copies: int
    converted: int
    gathered: int
    experts: Experts | None
    elements: int
    config: Description
    on_cpu: bool
    wide: bool
    replicated: int = 0

    @property
    def weights(self) -> int:
        """Bytes of everything that is loaded, if nothing is paged."""
        return self.plain + self.copies + self.routed + self.routed_copies

    @property
    def value_nbytes(self) -> int:
        """Bytes of an activation, at most."""
        return 4 if self.wide or self.config.dtype == "float32" else 2

    def cache(
        self, tokens: int, bits: int | None = None, group_size: int = 64, start: int = 0
    ) -> int:
        """Bytes of the KV cache of a conversation at its largest; 0 where that is not known.

        Args:
            tokens: tokens in the cache.
            bits: bits of a value in a quantized cache; None: it is not quantized.
            group_size: values of a quantized cache that share a scale.
            start: from how many tokens on the cache is quantized.
        """
        factor = self.value_nbytes // 2
        plain = kv_bytes(self.config, tokens if bits is None else min(tokens, start)) or 0
        if bits is None or tokens < start:
            return factor * plain
        quantized = kv_bytes(self.config, tokens, bits, group_size) or 0
        return factor * max(plain, quantized)

    def activations(self, use: Use) -> int:
        """Bytes of what is computed from a chunk of a prompt, at most.

        With T tokens in the chunk, L in the KV cache, hidden size H, FFN width I, k experts of
        width W a token, and b bytes a value, that is

            residual    3 T H b       the residual stream, its norm, the sum
            attention   4 T (heads + KV heads) (head width) b, and a layer's keys and values once
                        more, as the cache grows; 6 T (channels) 4 for a layer of linear attention
            growth      255 tokens of KV cache, which grows in steps of 256
            FFN         T (3 I + H) b + T k (3 W + 4 H) 4 + T H 4
            scores      2 (heads) T L b, where MLX does not keep them to itself
            logits      (tokens whose logits are kept) (vocabulary) (b + 12)

        Attention and FFN do not happen together. One layer at a time is counted. On a GPU more may
        wait to be freed, but only as long as MLX is below its memory limit; there it waits.
        """
        logits = use.logits * (self.config.vocab or 0) * (self.value_nbytes + 12)
        growth = self.cache(_CACHE_STEP - 1) - self.cache(0)
        return self._layer(use) + self._scores(use) + logits + growth

    def mlx_cache(self, use: Use) -> int:
        """Bytes of freed memory that MLX is to keep: what a layer takes, or `MLX_CACHE`."""
        return min(self._layer(use), CPU_CACHE if self.on_cpu else MLX_CACHE)

    def working(self, use: Use) -> int:
        """Bytes beside weights and KV caches, if nothing is paged."""
        return self.activations(use) + self.mlx_cache(use) + self.converted

    def step(self, most: int) -> int:
        """Number of prompt tokens to process at a time; see `generate.prefill_step`."""
        return cpu_step(most, self.elements) if self.on_cpu else most

    def _chunk(self, use: Use) -> int:
        """Tokens that are processed together: texts whose logits are kept are not divided."""
        return max(use.logits, use.prompts * min(use.tokens, self.step(use.step)))

    def _layer(self, use: Use) -> int:
        chunk = self._chunk(use)
        residual = 3 * chunk * (self.config.hidden or 0) * self.value_nbytes
        return residual + max(self._attention(use, chunk), self._ffn(chunk))

    def _attention(self, use: Use, chunk: int) -> int:
        config, nbytes = self.config, self.value_nbytes
        heads, width = config.heads or 0, config.head_dim or 0
        kv_heads = config.kv_heads or heads
        plain = 4 * chunk * (heads + kv_heads) * width * nbytes
        plain += use.prompts * 2 * kv_heads * width * use.tokens * nbytes
        linear = 6 * chunk * config.linear.channels * 4 if config.linear else 0
        return max(plain, linear)

    def _scores(self, use: Use) -> int:
        config = self.config
        if not self.on_cpu and config.head_dim in FUSED_HEADS and use.kv_bits is None:
            return 0
        windows = [use.tokens if n is None else n for n in config.attention or (None,)]
        seen = min(use.tokens, max(windows) + self.step(use.step))
        return 2 * (config.heads or 0) * self._chunk(use) * seen * self.value_nbytes

    def _ffn(self, chunk: int) -> int:
        config = self.config
        hidden, used = config.hidden or 0, min(config.top_k or config.experts, config.experts)
        dense = chunk * (3 * (config.intermediate or 0) + hidden) * self.value_nbytes
        if not used:
            return dense
        routed = used * (3 * (config.expert_width or config.intermediate or 0) + 4 * hidden)
        return dense + 4 * chunk * (routed + hidden)


def cpu_step(most: int, weights: int) -> int:
    """Number of prompt tokens that a CPU processes at a time, so that a step takes 0.2 s."""
    return max(1, min(most, _CPU_STEP // max(1, weights)))


def needs_of(folder: Path, on_cpu: bool, *, wide: bool = False) -> Needs:
    """What the model in a folder takes: a tier, or a plain MLX model; or a rank's share of it.

    Raises:
        CheckpointError: the folder has no config.json, or no sound safetensors.
        OutlierError: the model cannot be split over the ranks.
    """
    tensors, raw = read_shards(folder), raw_config(folder)
    mine, config = share_of(folder, tensors, describe(raw))
    needs = needs_from(mine, raw, on_cpu, wide=wide, config=config)
    return replace(needs, replicated=replicated(tensors, mine))


def needs_from(
    tensors: Mapping[str, TensorRef],
    raw: dict,
    on_cpu: bool,
    *,
    wide: bool = False,
    config: Description | None = None,
) -> Needs:
    """What a model takes, by its tensors and its config.json; see `needs_of`.

    Args:
        tensors: the model's.
        raw: its config.json.
        on_cpu: whether it runs without a GPU.
        wide: whether what has 16 bits is to be loaded with 32.
        config: what the tensors are of, if that is a part of the model only.
    """
    wide = wide or on_cpu
    counter = _Counter(tensors, raw, on_cpu, wide, config or describe(raw))
    experts = counter.experts()
    routed = counter.routed() if experts else []
    plain = tensors.keys() - set(routed)
    packed = counter.packed
    gathered = [tensors[f"{path}.weight"].nbytes for path in packed if SWITCH in f"{path}."]
    return Needs(
        plain=counter.stored(plain),
        copies=counter.copies(plain),
        routed=counter.stored(routed),
        routed_copies=counter.copies(routed),
        # Of gate and up, which have the same input, both may be there.
        converted=0 if on_cpu else 2 * max(map(counter.copy, packed), default=0),
        gathered=counter.converting(routed) if on_cpu else 2 * max(gathered, default=0),
        experts=experts,
        elements=counter.elements(),
        config=counter.config,
        on_cpu=on_cpu,
        wide=wide,
    )


def cache_needs(config: Description, *, wide: bool) -> Needs:
    """What the KV caches of a loaded model take, without its weights.

    Args:
        config: the model's.
        wide: whether it computes in float32.
    """
    return Needs(0, 0, 0, 0, 0, 0, None, 0, config, wide, wide)


class _Counter:
    """Adds up the tensors of a model."""

    def __init__(
        self,
        tensors: Mapping[str, TensorRef],
        raw: dict,
        on_cpu: bool,
        wide: bool,
        config: Description,
    ) -> None:
        self.tensors, self.raw, self.on_cpu, self.wide = tensors, raw, on_cpu, wide
        self.config = config
        own = is_tier(raw) or is_ternary_model(raw) or "ternary_switch" in raw
        suffix = ".weight"
        self.packed = [
            name.removesuffix(suffix)
            for name, tensor in tensors.items()
            if own and tensor.dtype == "U8" and name.endswith(suffix)
        ]

    def stored(self, names: Iterable[str]) -> int:
        """Bytes of tensors, as they are loaded; scales of packed rows keep their dtype."""
        packed = {f"{path}.scales" for path in self.packed}
        total = 0
        for name in names:
            tensor = self.tensors[name]
            doubled = self.wide and tensor.dtype in _HALVES and name not in packed
            total += tensor.nbytes * (2 if doubled else 1)
        return total

    def copies(self, names: Iterable[str]) -> int:
        """Bytes of the affine copies of packed matrices, if they are kept."""
        found = set(names)
        kept = [path for path in self.packed if f"{path}.weight" in found]
        return sum(map(self.copy, kept)) if self.on_cpu else 0

    def copy(self, path: str) -> int:
        """Bytes of a packed matrix, or of those of all experts, in MLX's 2-bit format."""
        *rows, row = self.tensors[f"{path}.weight"].shape
        width = self._width(path) or 5 * row
        scales = self.tensors.get(f"{path}.scales")
        if scales is not None and scales.shape == tuple(rows):
            count = prod(rows) * (padded_width(width) // affine_group(width))
        else:
            count = prod(scales.shape) if scales is not None else 0
        return prod(rows) * padded_width(width) // 4 + 2 * 4 * count

    def _width(self, path: str) -> int | None:
        """Weights in a row."""
        if SWITCH in f"{path}.":
            down = path.endswith("down_proj")
            return self.config.expert_width if down else self.config.hidden
        modules = self.raw["ternary"].get("modules") if "ternary" in self.raw else None
        found = modules.get(path) if isinstance(modules, dict) else None
        width = found.get("in_features") if isinstance(found, dict) else None
        return width if type(width) is int and width > 0 else None

    def converting(self, routed: Iterable[str]) -> int:
        """Bytes that it takes to convert the experts that are read, some at a time."""
        experts = self.experts()
        if experts is None:
            return 0
        expert = self.stored(routed) // experts.total
        return CONVERTED_TOGETHER * expert + CONVERTING * min(expert, 1 << 20)

    def experts(self) -> Experts | None:
        """The experts in packed rows of a tier or an imported Mixtral, all of one size."""
        switch = self.raw.get("ternary") if is_tier(self.raw) else self.raw.get("ternary_switch")
        count, top_k = self.config.experts, self.config.top_k
        if not isinstance(switch, dict) or switch.get("format") != ROWS:
            return None
        layers = switch.get("layers", self.config.moe_layers)
        if not isinstance(layers, list | tuple) or not layers or count < 1 or top_k is None:
            return None
        routed = self.routed()
        nbytes = self.copies(routed) if self.on_cpu else self.stored(routed)
        return Experts(len(layers), count, min(top_k, count), nbytes // (len(layers) * count))

    def routed(self) -> list[str]:
        """Names of the tensors of experts in packed rows."""
        packed = tuple(f"{path}." for path in self.packed if SWITCH in f"{path}.")
        return [name for name in self.tensors if name.startswith(packed)]

    def elements(self) -> int:
        """Weights, as mlx-lm counts them in `get_total_parameters`: bytes of packed rows."""
        how = self.config.quantization
        total = 0
        for name, tensor in self.tensors.items():
            path, _, leaf = name.rpartition(".")
            weight = self.tensors.get(f"{path}.weight")
            if leaf in ("scales", "biases") and weight is not None and weight.dtype == "U32":
                continue
            bits = how.of(path) if how and tensor.dtype == "U32" else None
            total += prod(tensor.shape) * (32 // bits.bits if bits else 1)
        return total
