// h = silu(gate x) * (up x) for every (token, expert) pair.
//
//   x        (tokens, K)             T, each used for SHARE successive pairs: SHARE is k
//   gate, up (experts, N, bytes)     rows of trits
//   *_scales (experts, N)            float
//   indices  (tokens, k)             uint
//   h        (tokens, k, N)          float
//
// A simdgroup computes ROWS elements of h from the same rows of gate and up, so it reads x once for
// both. The rows of the last simdgroup end at N. They may overlap those of the simdgroup before it,
// which writes the overlapping rows.
// Grid: x over rows, SIMDGROUPS simdgroups in a threadgroup; y over pairs.

const uint pair = threadgroup_position_in_grid.y;
const uint lane = thread_index_in_simdgroup;
const uint group = threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup_index_in_threadgroup;
if (group * ROWS >= N) return;
const uint first = min(group * ROWS, uint(N - ROWS));

const size_t row = size_t(indices[pair]) * N + first;
Product<DECODE, 2, ROWS, 1, PIECES, K, decltype(x + K), T> product;
product.rows[0] = gate + row * product.PITCH;
product.rows[1] = up + row * product.PITCH;
product.x[0] = x + size_t(pair / SHARE) * K;
product.add(lane);

float g = Sums<ROWS>::over_lanes(product.sums, lane);
float u = Sums<ROWS>::over_lanes(product.sums + ROWS, lane);
const uint r = Sums<ROWS>::of(lane);
if (Sums<ROWS>::writes(lane) && first + r >= group * ROWS) {
  g *= gate_scales[row + r] * UNIT;
  u *= up_scales[row + r] * UNIT;
  h[size_t(pair) * N + first + r] = g / (1.0f + exp(-g)) * u;
}
