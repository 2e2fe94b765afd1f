"""Blocks of (token, expert) pairs of one expert, which share the decoding of its rows."""

import mlx.core as mx

from .kernels import BLOCK_VARIANTS
from .launching import built_kernel, check_size, described

# Most simdgroups of a threadgroup.
SORT_SIMDGROUPS = 32


def block_count(pairs: int, experts: int, size: int) -> int:
    """The most blocks that pairs can need: every expert may have a last block that is not full.

    Args:
        pairs: number of (token, expert) pairs.
        experts: number of experts.
        size: most pairs of a block.
    """
    return (pairs + (size - 1) * min(experts, pairs)) // size


def tq1_0_sort(indices: mx.array, experts: int, size: int) -> mx.array:
    """Make blocks of pairs of one expert, for the decode kernels.

    Args:
        indices: (pairs,) or (tokens, k) uint32, the expert of each pair, each below `experts`.
        experts: number of experts.
        size: most pairs of a block: 2, 4 or 8.

    Returns:
        (`block_count`, 1 + size) uint32: the number of pairs of each block, and their numbers.

    Raises:
        ValueError: a dtype or size is not supported.
    """
    name = "tq1_0_sort"
    if indices.dtype != mx.uint32 or indices.size == 0:
        raise ValueError(f"{name}: indices are {described(indices)}; expected some uint32")
    if size not in BLOCK_VARIANTS["tq1_0_qmv"]:
        raise ValueError(f"{name}: blocks of {size} pairs are not supported")
    check_size(name, "experts", experts)
    blocks = block_count(indices.size, experts, size)
    simdgroups = min(experts, SORT_SIMDGROUPS)
    return built_kernel(name)(
        inputs=[indices.flatten()],
        template=[
            ("M", size),
            ("EXPERTS", experts),
            ("SIMDGROUPS", simdgroups),
        ],
        grid=(32 * simdgroups, 1, 1),
        threadgroup=(32 * simdgroups, 1, 1),
        output_shapes=[(blocks, 1 + size)],
        output_dtypes=[mx.uint32],
    )[0]
