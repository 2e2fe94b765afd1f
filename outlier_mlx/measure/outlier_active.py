"""How many parameters a model has, and how many of them one token uses."""

import re
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from outlier_mlx.errors import OutlierError, listed
from outlier_mlx.runtime.switch import TernarySwitchLinear
from outlier_mlx.storage.shards import read_shards

#: How configs say the number of experts that a token uses.
TOP_K_NAMES = ("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")
_EXPERTS = (SwitchLinear, QuantizedSwitchLinear, TernarySwitchLinear)
#: In people's words; the published counts of OLMoE, Qwen3 and Mixtral come out this way.
RULE = (
    "all parameters but those of experts that a token is not routed to; shared experts, routers,"
    " norms, the whole embedding and the whole head count, a tied head once"
)


@dataclass(frozen=True)
class Parameters:
    """Counts of logical parameters: quantized and ternary weights count as many as they stand for.

    Attributes:
        total: all that the loaded model has.
        active: those that one token uses, by `RULE`.
    """

    total: int
    active: int


def count_parameters(model: nn.Module, config: dict) -> Parameters:
    """Count a loaded model's parameters; `config` says how many experts a token uses.

    Raises:
        OutlierError: the model has experts, and the config does not say.
    """
    total = idle = 0
    for module in model.modules():
        own = _own_parameters(module)
        total += own
        if isinstance(module, _EXPERTS):
            experts = module.weight.shape[0]
            idle += own // experts * (experts - min(experts, _top_k(config)))
    return Parameters(total, total - idle)


def _own_parameters(module: nn.Module) -> int:
    """The parameters of a module without its children's."""
    arrays = {
        name: value
        for name, value in module.items()
        if isinstance(value, mx.array) and not name.startswith("_")
    }
    if isinstance(module, TernarySwitchLinear):
        return module.weight.shape[0] * module.weight.shape[1] * module.input_dims
    bits = getattr(module, "bits", None)
    if bits is None or "scales" not in arrays:
        return sum(value.size for value in arrays.values())
    bias = arrays["bias"].size if "bias" in arrays else 0
    return arrays["weight"].size * 32 // int(bits) + bias


def _top_k(config: dict) -> int:
    for name in TOP_K_NAMES:
        if isinstance(config.get(name), int):
            return config[name]
    raise OutlierError(
        "config.json does not say how many experts a token uses; looked for "
        + listed(TOP_K_NAMES, last="or")
    )


def weights_bits(folder: Path, layers: int, total: int) -> float:
    """Bits a parameter takes in the model's files, scales and all.

    Args:
        folder: the model's.
        layers: of the loaded model; tensors of layers behind them (for predicting several tokens
            at once), which are not run, do not count.
        total: parameters of the loaded model.
    """
    nbytes = 0
    for name, tensor in read_shards(folder).items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer is None or int(layer[1]) < layers:
            nbytes += tensor.nbytes
    return 8 * nbytes / total
