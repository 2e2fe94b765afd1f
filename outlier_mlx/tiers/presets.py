"""Recipes: how a tier stores the base and the experts."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from outlier_mlx.errors import OutlierError, did_you_mean
from outlier_mlx.models.quantization import DEFAULT_GROUP_SIZE, GROUP_SIZES

DTYPES = ("bfloat16", "float16", "float32")
MIXED_BITS = 6
EXPERT_FORMATS = ("tq1_0", "affine2")
_SHORT = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


@dataclass(frozen=True)
class Recipe:
    """How a tier is written.

    Attributes:
        base_bits: 4 or 8 bits a weight for the base's matrices; None leaves them unquantized.
        group_size: weights that share a scale and a bias in the quantized base.
        experts: "tq1_0" (1.6 bits a weight) or "affine2" (MLX's own 2-bit format).
        dtype: dtype of norms, biases, scales and activations; None follows the checkpoint.
        portable: write a model that stock mlx-lm loads; its experts are affine2.
        mixed: 6 bits for the base's most sensitive matrices; see `bits`.
    """

    base_bits: int | None = 4
    group_size: int = DEFAULT_GROUP_SIZE
    experts: str = "tq1_0"
    dtype: str | None = None
    portable: bool = False
    mixed: bool = False

    def bits(self, name: str, layers: int) -> int | None:
        """Bits a weight of a base matrix.

        Args:
            name: its name, as in "model.layers.3.mlp.down_proj.weight".
            layers: layers of the model.

        The choice of sensitive matrices is that of mlx-lm's recipe `mixed_4_6`, which follows
        llama.cpp's Q4_K_M: values and down projections in the first and last eighth of the layers
        and in every third between, and the head.
        """
        if not self.mixed or self.base_bits is None:
            return self.base_bits
        words = name.split(".")
        layer = int(words[2]) if words[1] == "layers" else None
        if layer is None:
            return MIXED_BITS if words[0] == "lm_head" else self.base_bits
        eighth = layers // 8
        outer = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
        sensitive = ".v_proj." in name or ".down_proj." in name
        return MIXED_BITS if outer and sensitive else self.base_bits

    @property
    def name(self) -> str:
        """A short name, as in "q4" or "q8-g32"; it ends the default output folder's name."""
        name = f"q{self.base_bits}" if self.base_bits else _SHORT.get(self.dtype or "", "plain")
        if self.mixed:
            name += "-mixed"
        if self.base_bits and self.group_size != DEFAULT_GROUP_SIZE:
            name += f"-g{self.group_size}"
        if self.portable:
            return f"{name}-portable"
        return name if self.experts == "tq1_0" else f"{name}-{self.experts}"


RECIPES = {
    "q4": Recipe(),
    "q4-mixed": Recipe(mixed=True),
    "q8": Recipe(base_bits=8),
    "bf16": Recipe(base_bits=None, dtype="bfloat16"),
    "f16": Recipe(base_bits=None, dtype="float16"),
    "f32": Recipe(base_bits=None, dtype="float32"),
}


def make_recipe(
    tier: str = "q4",
    *,
    base_bits: int | str | None = None,
    group_size: int | None = None,
    experts: str | None = None,
    dtype: str | None = None,
    portable: bool = False,
) -> Recipe:
    """A named recipe with single choices changed.

    Args:
        tier: a name in `RECIPES`.
        base_bits: 4, 8, or "none" (also 16 and 32) for an unquantized base.
        group_size: 32, 64 or 128.
        experts: "tq1_0" or "affine2".
        dtype: "bfloat16", "float16" or "float32".
        portable: a model that stock mlx-lm loads, its experts in "affine2".

    Raises:
        OutlierError: a value is not one of these.
    """
    _one_of("tier", tier, RECIPES)
    recipe = RECIPES[tier]
    if base_bits is not None:
        bits = str(base_bits).lower()
        _one_of("base_bits", bits, ("4", "8", "none", "16", "32"))
        recipe = replace(recipe, base_bits=int(bits) if bits in ("4", "8") else None, mixed=False)
    if group_size is not None:
        _one_of("group_size", group_size, GROUP_SIZES)
        recipe = replace(recipe, group_size=group_size)
    if experts is not None:
        _one_of("experts", experts, EXPERT_FORMATS)
        recipe = replace(recipe, experts=experts)
    if dtype is not None:
        _one_of("dtype", dtype, DTYPES)
        recipe = replace(recipe, dtype=dtype)
    if portable:
        if experts == "tq1_0":
            raise OutlierError("a portable tier holds its experts in affine2, not in tq1_0")
        recipe = replace(recipe, experts="affine2", portable=True)
    return recipe


def _one_of(name: str, value: object, allowed: Iterable) -> None:
    if value not in allowed:
        choices = [str(choice) for choice in allowed]
        hint = did_you_mean(str(value), choices)
        raise OutlierError(f"{name} {value!r}: expected one of {', '.join(choices)}{hint}")
