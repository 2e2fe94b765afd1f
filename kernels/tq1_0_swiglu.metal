// h = silu(gate x) * (up x) for every (token, expert) pair.
//
//   x        (tokens, K)             T
//   gate, up (experts, N, bytes)     rows of trits
//   *_scales (experts, N)            float
//   indices  (tokens, k)             uint
//   h        (tokens, k, N)          float
//
// A simdgroup computes ROWS elements of h from the same rows of gate and up, so it reads x once for
// both. The rows of the last simdgroup end at N. They may overlap those of the simdgroup before it,
// which writes the overlapping rows.
// Grid: x over rows, SIMDGROUPS simdgroups in a threadgroup; y over pairs.

typedef Rows<DECODE, ROWS, WORDS, K, T> Product;

const uint pair = threadgroup_position_in_grid.y;
const uint lane = thread_index_in_simdgroup;
const uint group = threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup_index_in_threadgroup;
if (group * ROWS >= N) return;
const uint first = min(group * ROWS, uint(N - ROWS));

const size_t row = size_t(indices[pair]) * N + first;
float sums[2 * ROWS] = {};
Product::template add<2>(
    sums, gate + row * Product::PITCH, up + row * Product::PITCH,
    x + size_t(pair / indices_shape[1]) * K, lane);

// Lane r finishes row r.
float g = 0.0f, u = 0.0f;
UNROLL for (uint r = 0; r < ROWS; r++) {
  const float gate_sum = simd_sum(sums[r]), up_sum = simd_sum(sums[ROWS + r]);
  g = lane == r ? gate_sum : g;
  u = lane == r ? up_sum : u;
}
if (lane < ROWS && first + lane >= group * ROWS) {
  g *= gate_scales[row + lane] * Product::unit();
  u *= up_scales[row + lane] * Product::unit();
  h[size_t(pair) * N + first + lane] = g / (1.0f + exp(-g)) * u;
}
