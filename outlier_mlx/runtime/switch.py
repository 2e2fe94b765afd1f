"""Expert layers: one linear layer per expert; a token uses those of the experts it is routed to."""

import mlx.core as mx
import mlx.nn as nn

from .affine2 import affine_product
from .ops import block_pairs, decoded_mix, rows_product, swiglu, use_metal, weighted_sum
from .packed import PackedModule

# Least number of (token, expert) pairs that are sorted by expert, so that MLX's matrix kernels read
# each expert once. mlx-lm uses the same number.
SORT_FROM_PAIRS = 64

FOUR_ZERO_BYTES = 0x80808080  # 20 trits 0


class TernarySwitchLinear(PackedModule):
    """`num_experts` linear layers with ternary weights, five trits in a byte.

    Parameters, both frozen: `weight` (experts, out, row_bytes) uint8 in the layout `tq1_0_strided`,
    and `scales` (experts, out) float32.
    """

    def __init__(self, input_dims: int, output_dims: int, num_experts: int) -> None:
        rows = (num_experts, output_dims)
        super().__init__(input_dims, rows, mx.zeros(rows))

    def prepare(self) -> None:
        """Prepare for multiplication, after the weights are loaded.

        Rows with only trits 0 get the scale 0, so that their products are exactly 0 for every way
        to sum digits. Without a GPU, the affine copy is made and kept.
        """
        zero = mx.all(self.weight.view(mx.uint32) == FOUR_ZERO_BYTES, axis=-1)
        self.scales = mx.where(zero, 0.0, self.scales)
        # Evaluate now: a lazy array can only be evaluated in the thread that made it.
        mx.eval(self.scales)
        super().prepare()

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """Multiply x (..., 1, in) by the experts in `indices` (...): (..., 1, out) float32."""
        if use_metal():
            packed = self.weight, self.scales
            return rows_product(x, indices, *packed, sorted_indices, self.training)
        return affine_product(x.astype(mx.float32), self.affine(), indices, sorted_indices)


class TernarySwitchGLU(nn.Module):
    """The routed experts of a layer: `down(silu(gate x) * up x)` for each chosen expert."""

    def __init__(self, input_dims: int, hidden_dims: int, num_experts: int) -> None:
        super().__init__()
        self.hidden_dims, self.num_experts = hidden_dims, num_experts
        self.gate_proj = TernarySwitchLinear(input_dims, hidden_dims, num_experts)
        self.up_proj = TernarySwitchLinear(input_dims, hidden_dims, num_experts)
        self.down_proj = TernarySwitchLinear(hidden_dims, input_dims, num_experts)

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """Apply the experts `indices` (..., k) to x (..., hidden): (..., k, hidden) float32."""
        indices = mx.stop_gradient(indices)
        x = mx.expand_dims(x, (-2, -3))  # (..., 1, 1, hidden)
        inverse = None
        shape = indices.shape
        if indices.size >= SORT_FROM_PAIRS:
            x, indices, inverse = sort_by_expert(x, indices)
        in_order = inverse is not None
        gate = self.gate_proj(x, indices, in_order)
        up = self.up_proj(x, indices, in_order)
        y = self.down_proj(swiglu(gate, up), indices, in_order).squeeze(-2)
        return y if inverse is None else mx.unflatten(y[inverse], 0, shape)

    def mix(self, x: mx.array, indices: mx.array, weights: mx.array, shared: mx.array) -> mx.array:
        """Add the weighted experts of each token to `shared`.

        Args:
            x: (..., hidden), the input of the experts.
            indices: (..., k) uint32, numbers of the experts.
            weights: (..., k) float32, weights of these experts.
            shared: (..., hidden), the output of the shared expert.

        Returns:
            (..., hidden) of the dtype of `shared`: summed in float32, rounded once.
        """
        indices = mx.stop_gradient(indices)
        sizes = self.num_experts, 3, x.shape[-1], self.hidden_dims
        size = 0 if self.training else block_pairs(indices, *sizes)
        if size == 0:
            return weighted_sum(shared, self(x.astype(mx.float32), indices), weights)
        return decoded_mix(x, weights, shared, indices, size, *self.packed(), slots=self.slots)

    @property
    def slots(self) -> mx.array | None:
        """Where each expert is in `packed`, (experts,) uint32; None: at its number."""
        return None

    def packed(self) -> tuple[mx.array, ...]:
        """Rows and scales of gate, of up and of down."""
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        return gate.weight, gate.scales, up.weight, up.scales, down.weight, down.scales


def sort_by_expert(x: mx.array, indices: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Order (token, expert) pairs by expert.

    Args:
        x: (..., 1, 1, hidden), one vector per token.
        indices: (..., k) experts of each token.

    Returns:
        x (pairs, 1, hidden) and indices (pairs,) ordered by expert, and the permutation (pairs,)
        that restores the old order.
    """
    flat = indices.flatten()
    order = mx.argsort(flat)
    tokens = x.flatten(0, -3)[order // indices.shape[-1]]
    return tokens, flat[order], mx.argsort(order)
