"""The number of a model's parameters, and of those that one token uses."""

import re
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from outlier_mlx.engine.paging.paged import PagedSwitchLinear
from outlier_mlx.errors import OutlierError, listed
from outlier_mlx.models.config import describe
from outlier_mlx.models.config_values import TOP_K_NAMES
from outlier_mlx.models.sizes import Parameters
from outlier_mlx.runtime.switch import TernarySwitchLinear
from outlier_mlx.storage.shards import read_shards
from outlier_mlx.upstream import QuantizedSwitchLinear, SwitchLinear

_EXPERTS = (SwitchLinear, QuantizedSwitchLinear, TernarySwitchLinear, PagedSwitchLinear)
#: The rule for people. It gives the published counts of OLMoE, Qwen3 and Mixtral.
RULE = (
    "all parameters but those of experts that a token is not routed to; shared experts, routers,"
    " norms, the whole embedding and the whole head count, a tied head once"
)


def count_parameters(model: nn.Module, config: dict) -> Parameters:
    """Count a loaded model's parameters; `config` says how many experts a token uses.

    Raises:
        OutlierError: the model has experts, and the config does not say.
    """
    total = idle = 0
    top_k = describe(config).top_k
    for module in model.modules():
        own = _own_parameters(module)
        total += own
        if isinstance(module, _EXPERTS):
            if top_k is None:
                raise OutlierError(
                    "config.json does not say how many experts a token uses; looked for "
                    + listed(TOP_K_NAMES, last="or")
                )
            paged = isinstance(module, PagedSwitchLinear)
            experts = module.num_experts if paged else module.weight.shape[0]
            idle += own // experts * (experts - min(experts, top_k))
    return Parameters(total, total - idle)


def _own_parameters(module: nn.Module) -> int:
    """Number of parameters of a module itself, without its children."""
    arrays = {
        name: value
        for name, value in module.items()
        if isinstance(value, mx.array) and not name.startswith("_")
    }
    if isinstance(module, PagedSwitchLinear):
        return module.num_experts * module.output_dims * module.input_dims
    if isinstance(module, TernarySwitchLinear):
        return module.weight.shape[0] * module.weight.shape[1] * module.input_dims
    bits = getattr(module, "bits", None)
    if bits is None or "scales" not in arrays:
        return sum(value.size for value in arrays.values())
    bias = arrays["bias"].size if "bias" in arrays else 0
    return arrays["weight"].size * 32 // int(bits) + bias


def weights_bits(folder: Path, layers: int, total: int) -> float:
    """Bits a parameter takes in the model's files, scales and all.

    Args:
        folder: folder of the model.
        layers: number of layers of the loaded model. Tensors of further layers (for predicting
            several tokens at once) are not run and not counted.
        total: number of parameters of the loaded model.
    """
    nbytes = 0
    for name, tensor in read_shards(folder).items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer is None or int(layer[1]) < layers:
            nbytes += tensor.nbytes
    return 8 * nbytes / total
