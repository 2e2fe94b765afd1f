"""The modules of a model that store weights, and their shapes: one table for every family.

Names and shapes are those of mlx-lm 0.32's models.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod

from outlier_mlx.errors import CheckpointError
from outlier_mlx.models.description import PROJECTIONS, ModelConfig


@dataclass(frozen=True)
class Module:
    """A module of an MLX model that stores a weight.

    Attributes:
        path: its name, such as "model.layers.0.self_attn.q_proj".
        kind: the line of the summary that counts it (`summary.KINDS`).
        shape: shape of its weight before quantization: (out, in), (experts, out, in) or (width,).
        bias: whether `path.bias`, (out,), belongs to it.
        leaf: the name of the weight in the module.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    bias: bool = False
    leaf: str = "weight"

    @property
    def params(self) -> int:
        """Elements of the weight and the bias."""
        return sum(prod(shape) for shape in self.tensors().values())

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of its weight and bias, unquantized."""
        bias = {f"{self.path}.bias": self.shape[:1]} if self.bias else {}
        return {f"{self.path}.{self.leaf}": self.shape} | bias


#: The modules of a layer's FFN, by the layer's number.
FeedForward = Callable[[ModelConfig, int], list[Module]]


def list_modules(config: ModelConfig, feed_forward: FeedForward) -> list[Module]:
    """The modules of a decoder, in the order of a forward pass."""
    hidden, vocab = config.hidden, config.vocab
    result = [Module("model.embed_tokens", "embeddings", (vocab, hidden))]
    for layer in range(config.layers):
        prefix = f"model.layers.{layer}"
        result.append(Module(f"{prefix}.input_layernorm", "norms", (hidden,)))
        result += _attention(config, f"{prefix}.self_attn")
        result.append(Module(f"{prefix}.post_attention_layernorm", "norms", (hidden,)))
        result += feed_forward(config, layer)
    result.append(Module("model.norm", "norms", (hidden,)))
    if not config.tied:
        result.append(Module("lm_head", "head", (vocab, hidden)))
    return result


def _attention(config: ModelConfig, prefix: str) -> list[Module]:
    hidden, width = config.hidden, config.head_dim
    queries, keys = config.heads * width, config.kv_heads * width
    result = [
        Module(f"{prefix}.q_proj", "attention", (queries, hidden), config.qkv_bias),
        Module(f"{prefix}.k_proj", "attention", (keys, hidden), config.qkv_bias),
        Module(f"{prefix}.v_proj", "attention", (keys, hidden), config.qkv_bias),
        Module(f"{prefix}.o_proj", "attention", (hidden, queries), config.o_bias),
    ]
    if config.qk_norm:
        result += [Module(f"{prefix}.{name}_norm", "norms", (width,)) for name in "qk"]
    return result


def dense(config: ModelConfig, layer: int) -> list[Module]:
    """A gated FFN."""
    path = f"model.layers.{layer}.mlp"
    return gated(path, "dense FFN", config.hidden, config.intermediate, bias=config.mlp_bias)


def gated(
    path: str, kind: str, hidden: int, width: int, *, lead: tuple[int, ...] = (), bias: bool = False
) -> list[Module]:
    """The matrices of a gated FFN: gate and up (*lead, width, hidden), down (*lead, hidden, width).

    Args:
        path: name of the FFN.
        kind: kind of the modules.
        hidden: width of its input and output.
        width: width between gate or up and down.
        lead: (experts,) for stacked experts.
        bias: whether they have biases.
    """
    return [
        Module(
            f"{path}.{name}_proj",
            kind,
            (*lead, hidden, width) if name == "down" else (*lead, width, hidden),
            bias,
        )
        for name in PROJECTIONS
    ]


def tier_layer(config: ModelConfig, layer: int) -> list[Module]:
    """A tier's FFN: the base's own, plus routed experts in the layers that `moe_layers` lists.

    The shapes of the experts' ternary matrices are those before packing.

    Raises:
        CheckpointError: the config does not say how wide an expert is.
    """
    if layer not in config.moe_layers:
        return dense(config, layer)
    if config.expert_width is None:
        raise CheckpointError("config.json: moe_intermediate_size is missing")
    path, hidden, experts = f"model.layers.{layer}.mlp", config.hidden, config.experts
    shared = f"{path}.shared_expert"
    return [
        *gated(shared, "shared FFN", hidden, config.intermediate, bias=config.mlp_bias),
        Module(f"{path}.gate", "router", (experts, hidden)),
        Module(path, "router", (experts,), leaf="alpha"),
        *gated(f"{path}.switch_mlp", "experts", hidden, config.expert_width, lead=(experts,)),
    ]


def tier_modules(config: ModelConfig) -> list[Module]:
    """The modules of a tier, in the order of a forward pass; see `tier_layer`."""
    return list_modules(config, tier_layer)


def check_complete(
    wanted: Iterable[Module], found: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Check that no tensor of a model is missing, has another shape, or is unknown.

    Args:
        wanted: the model's modules.
        found: shapes before quantization, by MLX's name, as "model.norm.weight".
        where: name of the source in messages.

    Raises:
        CheckpointError: names the first wrong tensor.
    """
    expected = {name: shape for module in wanted for name, shape in module.tensors().items()}
    for name, shape in expected.items():
        if name not in found:
            raise CheckpointError(f"{where}: the tensor {name} {shape} is missing")
        if tuple(found[name]) != shape:
            raise CheckpointError(f"{where}: {name}: shape {found[name]}, expected {shape}")
    for name in found:
        if name not in expected:
            raise CheckpointError(f"{where}: {name}: not a tensor of this model")
