"""A small product with ternary rows whose machine code was counted by others: sign lanes.

Byte j of a row holds weights j, B + j, ... 4 B + j as base-3 digits. A byte at bits 6 to 13 of 16
bits, multiplied by 3, has its next digit in bits 14 and 15; their complement is, as a half, minus
twice the trit.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from kernels.emulator.virtual import Launch, VirtualMetal

from .tools import launch

K, B, N = 5120, 1024, 64
HEADER = '#define UNROLL _Pragma("clang loop unroll(full)")\n'
SOURCE = """
const uint lane = thread_index_in_simdgroup;
const uint group = threadgroup_position_in_grid.x * 2 + simdgroup_index_in_threadgroup;
const uint first = group * ROWS;
const device uint8_t* mine = rows + size_t(first) * B;
float sums[TOKENS][ROWS] = {};
for (uint at = 4 * lane; at < B; at += 128) {
  uint c[ROWS][2];
  UNROLL for (int r = 0; r < ROWS; r++) {
    const ushort4 bytes = ushort4(*(const device uchar4*)(mine + at + r * B));
    c[r][0] = as_type<uint>(bytes.xy) * 192u;
    c[r][1] = as_type<uint>(bytes.zw) * 192u;
  }
  UNROLL for (int n = 0; n < 5; n++) {
    const uint from = n < 4 ? n * B + at : min(n * B + at, uint(K - 4));
    half4 v[TOKENS];
    UNROLL for (int t = 0; t < TOKENS; t++) v[t] = *(const device half4*)(x + t * K + from);
    UNROLL for (int r = 0; r < ROWS; r++) {
      const half2 a = as_type<half2>(~c[r][0] & 0xC000C000u);
      const half2 b = as_type<half2>(~c[r][1] & 0xC000C000u);
      UNROLL for (int t = 0; t < TOKENS; t++) {
        sums[t][r] = fma(float(v[t].x), float(a.x), sums[t][r]);
        sums[t][r] = fma(float(v[t].y), float(a.y), sums[t][r]);
        sums[t][r] = fma(float(v[t].z), float(b.x), sums[t][r]);
        sums[t][r] = fma(float(v[t].w), float(b.y), sums[t][r]);
      }
      UNROLL for (int i = 0; i < 2; i++) {
        c[r][i] &= 0x3FFF3FFFu;
        c[r][i] += c[r][i] << 1;
      }
    }
  }
}
// After each step a lane keeps half of the rows; row r ends in lane r.
uint step = 1;
UNROLL for (int left = ROWS / 2; left >= 1; left /= 2, step *= 2) {
  const bool upper = lane & step;
  UNROLL for (int i = 0; i < TOKENS * left; i++) {
    const int t = i / left, r = i % left;
    const float kept = upper ? sums[t][2 * r + 1] : sums[t][2 * r];
    const float given = upper ? sums[t][2 * r] : sums[t][2 * r + 1];
    sums[t][r] = kept + simd_shuffle_xor(given, ushort(step));
  }
}
UNROLL for (int t = 0; t < TOKENS; t++) {
  for (uint far = step; far < 32; far *= 2) {
    sums[t][0] += simd_shuffle_xor(sums[t][0], ushort(far));
  }
  if (lane < ROWS) y[t * N + first + lane] = 0.5f * sums[t][0] * scales[first + lane];
}
"""


@dataclass(frozen=True)
class Counted:
    """What others counted in the machine code that an open compiler made for Apple's M1."""

    tokens: int
    rows: int  # of a simdgroup
    main: float  # cycles a weight; of the decoding, and of all tokens' products
    registers: int
    threads: int
    loop_bytes: int


COUNTED = (
    Counted(1, 8, 2.46, 77, 1024, 2948),
    Counted(2, 8, 3.50, 99, 1024, 4278),
    Counted(4, 8, 5.57, 139, 704, 6922),
    Counted(4, 4, 5.69, 91, 1024, 3572),
    Counted(8, 4, 9.84, 139, 704, 6298),
)


def packed(trits: np.ndarray) -> np.ndarray:
    """Rows of trits (N, K) as bytes (N, B)."""
    digits = np.ones((len(trits), 5 * B), np.int64)
    digits[:, :K] = trits + 1
    number = digits.reshape(-1, 5, B).transpose(0, 2, 1) @ 3 ** np.arange(4, -1, -1)
    return ((256 * number + 242) // 243).astype(np.uint8)


def product(metal: VirtualMetal, tokens: int, rows: int) -> tuple[np.ndarray, np.ndarray, Launch]:
    """Products of vectors with random rows by the kernel, and exactly; and its launch.

    Returns:
        Two arrays (tokens, N), and the launch, for N * K weights.
    """
    rng = np.random.default_rng(0)
    trits = rng.integers(-1, 2, (N, K))
    x = rng.normal(size=(tokens, K)).astype(np.float16)
    inputs = {"x": mx.array(x), "rows": mx.array(packed(trits)), "scales": mx.ones((N,))}
    template = [("TOKENS", tokens), ("ROWS", rows), ("K", K), ("B", B), ("N", N)]
    (y,) = launch(
        metal, SOURCE, inputs, {"y": ((tokens, N), mx.float32)}, header=HEADER,
        grid=(32 * N // rows, 1, 1), threadgroup=(64, 1, 1), call={"template": template},
    )  # fmt: skip
    return np.array(y), x.astype(np.float64) @ trits.T, metal.launches[-1]
