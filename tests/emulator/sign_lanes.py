"""A small product with ternary rows whose machine code was counted by others: sign lanes.

Byte j of a row holds weights j, B + j, ... 4 B + j as base-3 digits. A byte at bits 6 to 13 of 16
bits, multiplied by 3, has its next digit in bits 14 and 15; their complement is, as a half, minus
twice the trit.
"""

import mlx.core as mx
import numpy as np

from kernels.emulator.virtual import Launch, VirtualMetal

from .tools import launch

K, B, N = 5120, 1024, 64
ROWS = 8  # rows of a simdgroup
HEADER = '#define UNROLL _Pragma("clang loop unroll(full)")\n'
SOURCE = """
const uint lane = thread_index_in_simdgroup;
const uint group = threadgroup_position_in_grid.x * 2 + simdgroup_index_in_threadgroup;
const uint first = group * ROWS;
const device uint8_t* mine = rows + size_t(first) * B;
float sums[ROWS] = {};
for (uint at = 4 * lane; at < B; at += 128) {
  uint c[ROWS][2];
  UNROLL for (int r = 0; r < ROWS; r++) {
    const ushort4 bytes = ushort4(*(const device uchar4*)(mine + at + r * B));
    c[r][0] = as_type<uint>(bytes.xy) * 192u;
    c[r][1] = as_type<uint>(bytes.zw) * 192u;
  }
  float word[ROWS] = {};
  UNROLL for (int n = 0; n < 5; n++) {
    const uint from = n * B + at;
    const half4 v = *(const device half4*)(x + (n < 4 ? from : min(from, uint(K - 4))));
    UNROLL for (int r = 0; r < ROWS; r++) {
      const half2 a = as_type<half2>(~c[r][0] & 0xC000C000u);
      const half2 b = as_type<half2>(~c[r][1] & 0xC000C000u);
      word[r] = fma(float(v.x), float(a.x), word[r]);
      word[r] = fma(float(v.y), float(a.y), word[r]);
      word[r] = fma(float(v.z), float(b.x), word[r]);
      word[r] = fma(float(v.w), float(b.y), word[r]);
      UNROLL for (int i = 0; i < 2; i++) {
        c[r][i] &= 0x3FFF3FFFu;
        c[r][i] += c[r][i] << 1;
      }
    }
  }
  UNROLL for (int r = 0; r < ROWS; r++) sums[r] += word[r];
}
// After each step a lane keeps half of the rows; row r ends in lane r.
uint step = 1;
UNROLL for (int left = ROWS / 2; left >= 1; left /= 2, step *= 2) {
  const bool upper = lane & step;
  UNROLL for (int r = 0; r < left; r++) {
    const float kept = upper ? sums[2 * r + 1] : sums[2 * r];
    const float given = upper ? sums[2 * r] : sums[2 * r + 1];
    sums[r] = kept + simd_shuffle_xor(given, ushort(step));
  }
}
for (; step < 32; step *= 2) sums[0] += simd_shuffle_xor(sums[0], ushort(step));
if (lane < ROWS) y[first + lane] = 0.5f * sums[0] * scales[first + lane];
"""


def packed(trits: np.ndarray) -> np.ndarray:
    """Rows of trits (N, K) as bytes (N, B)."""
    digits = np.ones((len(trits), 5 * B), np.int64)
    digits[:, :K] = trits + 1
    number = digits.reshape(-1, 5, B).transpose(0, 2, 1) @ 3 ** np.arange(4, -1, -1)
    return ((256 * number + 242) // 243).astype(np.uint8)


def product(metal: VirtualMetal) -> tuple[np.ndarray, np.ndarray, Launch]:
    """The product with random rows by the kernel, and exactly; and its launch."""
    rng = np.random.default_rng(0)
    trits = rng.integers(-1, 2, (N, K))
    x = rng.normal(size=K).astype(np.float16)
    inputs = {"x": mx.array(x), "rows": mx.array(packed(trits)), "scales": mx.ones((N,))}
    (y,) = launch(
        metal, SOURCE, inputs, {"y": ((N,), mx.float32)}, header=HEADER,
        grid=(32 * N // ROWS, 1, 1), threadgroup=(64, 1, 1),
        call={"template": [("ROWS", ROWS), ("K", K), ("B", B)]},
    )  # fmt: skip
    return np.array(y), trits @ x.astype(np.float64), metal.launches[-1]
