// y = rows x for every (vector, expert) pair: a gathered matrix-vector product.
//
//   x        (vectors, K)            T, each used for `pairs / vectors` successive pairs
//   rows     (experts, N, bytes)     rows of trits
//   scales   (experts, N)            float
//   indices  (pairs,)                uint
//   y        (pairs, N)              float
//
// Grid: x over rows, SIMDGROUPS simdgroups in a threadgroup; y over pairs.

typedef Rows<DECODE, ROWS, WORDS, K, T> Product;

const uint pair = threadgroup_position_in_grid.y;
const uint lane = thread_index_in_simdgroup;
const uint group = threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup_index_in_threadgroup;
if (group * ROWS >= N) return;
const uint first = min(group * ROWS, uint(N - ROWS));

const size_t row = size_t(indices[pair]) * N + first;
const uint vector = pair / (uint(indices_shape[0]) / uint(x_shape[0]));
float sums[ROWS] = {};
Product::template add<1>(sums, rows + row * Product::PITCH, rows, x + size_t(vector) * K, lane);

float product = 0.0f;  // lane r: product of row r
UNROLL for (uint r = 0; r < ROWS; r++) {
  const float sum = simd_sum(sums[r]);
  product = lane == r ? sum : product;
}
if (lane < ROWS && first + lane >= group * ROWS) {
  y[size_t(pair) * N + first + lane] = product * (scales[row + lane] * Product::unit());
}
