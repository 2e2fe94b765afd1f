// y = rows x for every (vector, expert) pair: a gathered matrix-vector product.
//
//   x        (vectors, K)            T, each used for SHARE successive pairs
//   rows     (experts, N, bytes)     rows of trits
//   scales   (experts, N)            float
//   indices  (pairs,)                uint
//   y        (pairs, N)              float
//
// A simdgroup computes ROWS elements of y. The rows of the last simdgroup end at N. They may
// overlap those of the simdgroup before it, which writes the overlapping rows.
// Grid: x over rows, SIMDGROUPS simdgroups in a threadgroup; y over pairs.

const uint pair = threadgroup_position_in_grid.y;
const uint lane = thread_index_in_simdgroup;
const uint group = threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup_index_in_threadgroup;
if (group * ROWS >= N) return;
const uint first = min(group * ROWS, uint(N - ROWS));

const size_t row = size_t(indices[pair]) * N + first;
Product<DECODE, 1, ROWS, 1, PIECES, K, decltype(x + K), T> product;
product.rows[0] = rows + row * product.PITCH;
product.x[0] = x + size_t(pair / SHARE) * K;
product.add(lane);

const float sum = Sums<ROWS>::over_lanes(product.sums, lane);
const uint r = Sums<ROWS>::of(lane);
if (Sums<ROWS>::writes(lane) && first + r >= group * ROWS) {
  y[size_t(pair) * N + first + r] = sum * (scales[row + r] * UNIT);
}
