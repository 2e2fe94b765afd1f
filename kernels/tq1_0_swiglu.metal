// h = silu(gate x) * (up x) for every (token, expert) pair.
//
//   x        (tokens, K)             T, each used for SHARE successive pairs: SHARE is k
//   gate, up (experts, N, bytes)     rows of trits
//   *_scales (experts, N)            float
//   indices  (tokens, k)             uint
//   blocks   (blocks, M + 1)         uint, see tq1_0_sort; unused if M is 1
//   h        (tokens, k, N)          float
//
// A simdgroup computes ROWS elements of h, from the same rows of gate and up, for each pair of a
// block. The rows of the last simdgroup end at N. They may overlap those of the simdgroup before
// it, which writes the overlapping rows.
// LOADERS is 1, or SIMDGROUPS if they load vectors together.
// Grid: x over rows, SIMDGROUPS simdgroups in a threadgroup; y over blocks, or pairs if M is 1.

typedef vec<typename Register<T>::type, 4> X4;
threadgroup X4 copy[LOADERS > 1 ? M * 5 * 32 : 1];

const uint lane = thread_index_in_simdgroup;
const uint group = threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup_index_in_threadgroup;
const uint first = min(group * ROWS, uint(N - ROWS));
const Pairs<M> pairs = {threadgroup_position_in_grid.y};
const uint count = pairs.count(blocks);
if (count == 0 || (LOADERS == 1 && group * ROWS >= N)) return;

const size_t row = size_t(indices[pairs.pair(blocks, 0)]) * N + first;
Block<DECODE, 2, ROWS, M, PIECES, LOADERS, K, decltype(x + K), T> product;
product.rows[0] = gate + row * product.PITCH;
product.rows[1] = up + row * product.PITCH;
product.copy = copy;
product.loader = LOADERS > 1 ? simdgroup_index_in_threadgroup : 0;
UNROLL for (uint i = 0; i < product.OWN; i++) {
  const uint m = min(i * LOADERS + product.loader, uint(M - 1));
  product.own[i] = x + pairs.pair(blocks, m) / SHARE * K;
}
product.multiply(count, lane);

const uint r = product.row;
if (product.writes && first + r >= group * ROWS) {
  UNROLL for (uint i = 0; i < product.PARTS; i++) {
    const uint m = product.vector + i * product.PART / ROWS;
    if (m < count) {
      const float g = product.sums[0][i] * (gate_scales[row + r] * UNIT);
      const float u = product.sums[1][i] * (up_scales[row + r] * UNIT);
      h[pairs.pair(blocks, m) * N + first + r] = g / (1.0f + exp(-g)) * u;
    }
  }
}
