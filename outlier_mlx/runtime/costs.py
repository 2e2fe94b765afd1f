"""What it costs to multiply experts: pairs one by one, in blocks, or after a conversion.

A (token, expert) pair needs every weight of its expert. A decode kernel that multiplies a block of
up to M pairs of one expert reads and decodes each weight once for all of them. If experts are
converted to affine 2-bit, MLX's matrix kernel multiplies them in tiles of 16 pairs.

The unit is a cycle of a GPU lane per weight of an expert: the cycles of the main pipe and half of
those of the second as the kernel emulator counts them, or the time of reads, whichever is longer. A
launch is made before the routing is known, so costs are expected values for tokens that choose
their experts at random. docs/kernels.md has the tables; a test compares the constants with the
emulator's counts.
"""

from functools import lru_cache
from math import exp, lgamma, log

# By M: the cycles of blocks of 1, 2 ... M pairs, the mean of gate, up and down in float16. Those of
# 8 leave registers for only 12 of the 13 simdgroups that keep a core busy; this is in their cycles.
BLOCK_CYCLES = {
    1: (2.7,),
    2: (2.8, 3.9),
    4: (2.8, 3.9, 5.0, 6.05),
    8: (3.05, 4.25, 5.4, 6.55, 7.8, 9.0, 10.1, 11.2),
}
# Cycles of a tile of MLX's matrix kernel: to make its weights, and for products of its 16 pairs.
TILE_CYCLES, TILE_PRODUCT_CYCLES = 5.5, 20.0
TILE_PAIRS = 16
# Bytes per weight from and to memory: of a block, of a conversion, of a tile.
BLOCK_BYTES, CONVERSION_BYTES, TILE_BYTES = 0.2, 0.51, 0.3125
# Cycles in the time of one byte: 13 to 18 on the M1 Max to M4 Max.
CYCLES_PER_BYTE = 15.0
# Time of a launch, which is an assumption, and cycles of all lanes in that time.
LAUNCH_SECONDS = 2e-6
LAUNCH_CYCLES = LAUNCH_SECONDS * 6.5e12
# Launches for pairs one by one, in blocks, and with converted experts.
LAUNCHES, BLOCK_LAUNCHES, CONVERTING_LAUNCHES = 2, 4, 28
# Converting may cost this much more: lanes of MLX's matrix kernel read x for 16 rows at a time, but
# those of a decode kernel for 4 to 8. The reads of a core from its own memory have no price.
CONVERTING_MARGIN = 1.2


def pairs_of_an_expert(tokens: int, experts: int, k: int) -> dict[int, float]:
    """Probabilities of the numbers of tokens that use an expert, if each uses k random experts.

    Returns:
        The binomial distribution, without numbers less likely than 1e-9.
    """
    if k >= experts:
        return {tokens: 1.0}
    chance = k / experts
    found = {}
    for n in range(tokens + 1):
        ways = lgamma(tokens + 1) - lgamma(n + 1) - lgamma(tokens - n + 1)
        p = exp(ways + n * log(chance) + (tokens - n) * log(1 - chance))
        if p > 1e-9:
            found[n] = p
    return found


@lru_cache(maxsize=4096)
def pairs_in_a_block(
    tokens: int,
    experts: int,
    k: int,
    weights: int,
    matrix_units: bool = False,
) -> int:
    """The number M of pairs in a block that costs least; 0: the experts are to be converted.

    Args:
        tokens: number of tokens.
        experts: number of experts of the layer.
        k: experts that a token uses.
        weights: number of weights of an expert.
        matrix_units: whether the chip multiplies matrices in units of their own, as from the M5 on.
            Then the products of a tile count nothing.
    """
    if tokens <= 1:
        return 1
    likely = pairs_of_an_expert(tokens, experts, k)
    launch = LAUNCH_CYCLES / (experts * weights)
    costs = {}
    for size, cycles in BLOCK_CYCLES.items():
        block = (0.0, *cycles)
        busy = sum(p * (n // size * block[size] + block[n % size]) for n, p in likely.items())
        blocks = sum(p * -(-n // size) for n, p in likely.items())
        costs[size] = max(busy, blocks * BLOCK_BYTES * CYCLES_PER_BYTE)
        costs[size] += launch * (LAUNCHES if size == 1 else BLOCK_LAUNCHES)
    best = min(costs, key=lambda size: costs[size])
    # An expert's last tile is half full on average.
    tiles = sum(p * max(1.0, n / TILE_PAIRS + 0.5) for n, p in likely.items() if n)
    tile = TILE_CYCLES + (0.0 if matrix_units else TILE_PRODUCT_CYCLES)
    converted = CONVERSION_BYTES * CYCLES_PER_BYTE + launch * CONVERTING_LAUNCHES
    converted += tiles * max(tile, TILE_BYTES * CYCLES_PER_BYTE)
    return 0 if converted < CONVERTING_MARGIN * costs[best] else best
