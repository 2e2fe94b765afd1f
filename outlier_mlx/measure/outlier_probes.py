"""Where the inputs of attention and of the feed-forward block are read, and how."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from outlier_mlx.engine.calls import Told, watched_calls
from outlier_mlx.errors import OutlierError, listed
from outlier_mlx.runtime.switch import TernarySwitchGLU
from outlier_mlx.upstream import SwitchGLU, SwitchMLP

Kind = Literal["attention", "dense_ffn", "routed_experts", "shared_experts"]
EXPERTS = (SwitchGLU, SwitchMLP, TernarySwitchGLU)
# Names of the children of a MoE block that every token goes through.
SHARED_NAMES = {"shared_expert", "shared_experts", "shared_mlp"}


@dataclass(frozen=True)
class Place:
    """A vector that can be read: the input or output of a child of a decoder layer."""

    module: str
    side: Literal["input", "output"]


Pair = tuple[Place, Place]

PRE_NORM: Pair = (Place("input_layernorm", "output"), Place("post_attention_layernorm", "output"))
# Norms on both sides of each block.
SANDWICH: Pair = (Place("input_layernorm", "output"), Place("pre_feedforward_layernorm", "output"))
# Norms behind the blocks only: these read the residual stream as it is.
POST_NORM: Pair = (Place("self_attn", "input"), Place("mlp", "input"))
#: mlx-lm's modules whose layers have other norms than the usual two: where to read the input of
#: attention, and that of the feed-forward block.
ARCHITECTURES: dict[str, Pair] = {
    "gemma2": SANDWICH,
    "gemma3_text": SANDWICH,
    "glm4": PRE_NORM,
    "olmo2": POST_NORM,
    "olmo3": POST_NORM,
}


@dataclass(frozen=True)
class Probe:
    """One input of one layer.

    Attributes:
        layer: number of the layer.
        name: such as "layer_3.attn" or "layer_3.ffn".
        place: where the vector is read.
        kinds: what reads the vector. The router, routed experts and shared experts of a layer all
            read the same one.
        experts: number of experts that read it.
    """

    layer: int
    name: str
    place: Place
    kinds: tuple[Kind, ...]
    experts: int = 0


def find_probes(model: nn.Module) -> list[Probe]:
    """The probes of a model, two per layer, in the order in which they are computed.

    Raises:
        OutlierError: layers of this kind are not supported.
    """
    layers = getattr(model, "layers", None)
    if not layers:
        raise OutlierError(f"{type(model).__module__}: no list of layers")
    probes = []
    for number, layer in enumerate(layers):
        attention, ffn = _pair(layer, number)
        probes.append(Probe(number, f"layer_{number}.attn", attention, ("attention",)))
        probes.append(_ffn_probe(layer, number, ffn))
    return probes


def _pair(layer: nn.Module, number: int) -> Pair:
    architecture = type(layer).__module__.rpartition(".")[2]
    norms = sorted(name for name in layer.children() if "norm" in name)
    pair = ARCHITECTURES.get(architecture)
    if pair is None and norms == sorted(place.module for place in PRE_NORM):
        pair = PRE_NORM
    if pair is None or not all(isinstance(layer.get(p.module), nn.Module) for p in pair):
        raise OutlierError(
            f"{architecture}: cannot tell what enters attention and what the feed-forward block of"
            f" layer {number}: its norms are {listed(norms)}; known are"
            f" {listed(place.module for place in PRE_NORM)}, and the layers of"
            f" {listed(ARCHITECTURES)}"
        )
    return pair


def _ffn_probe(layer: nn.Module, number: int, place: Place) -> Probe:
    name = f"layer_{number}.ffn"
    experts = next((module for module in layer.modules() if isinstance(module, EXPERTS)), None)
    if experts is None:
        return Probe(number, name, place, ("dense_ffn",))
    if isinstance(experts, TernarySwitchGLU):
        count = experts.num_experts
    else:
        first = experts.fc1 if isinstance(experts, SwitchMLP) else experts.gate_proj
        count = first.weight.shape[0]
    names = {name.rpartition(".")[2] for name, _ in layer.named_modules()}
    kinds: tuple[Kind, ...] = ("routed_experts",)
    if names & SHARED_NAMES:
        kinds = "routed_experts", "shared_experts"
    return Probe(number, name, place, kinds, count)


#: Called with a probe's number, the residual stream or whatever else enters its module, and the
#: vectors that the probe stands for; both (1, positions, hidden).
See = Callable[[int, mx.array, mx.array], None]
#: Called with a layer, and the experts (..., k) that its tokens are routed to.
SeeRouting = Callable[[int, mx.array], None]


@contextmanager
def watched(
    model: nn.Module,
    probes: Sequence[Probe],
    see: See,
    see_routing: SeeRouting | None = None,
) -> Iterator[None]:
    """Watch a model's probes for as long as the block lasts; nothing that it computes changes.

    Args:
        model: a model with `layers`.
        probes: as `find_probes` gives them.
        see: called for each call of a probe.
        see_routing: called for each call of a layer's experts.
    """
    with ExitStack() as stack:
        for number, probe in enumerate(probes):
            module = model.layers[probe.layer][probe.place.module]
            seer = _seer(see, number, probe.place.side)
            stack.enter_context(watched_calls(module, "__call__", seer))
        if see_routing is not None:
            for number, layer in enumerate(model.layers):
                seer = _router_seer(see_routing, number)
                for module in filter(lambda m: isinstance(m, EXPERTS), layer.modules()):
                    method = "mix" if isinstance(module, TernarySwitchGLU) else "__call__"
                    stack.enter_context(watched_calls(module, method, seer))
        yield


def _seer(see: See, probe: int, side: str) -> Told:
    return lambda given, y: see(probe, given[0], given[0] if side == "input" else y)


def _router_seer(see: SeeRouting, layer: int) -> Told:
    return lambda given, _: see(layer, given[1])
