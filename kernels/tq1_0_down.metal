// y = shared + sum over a token's experts of weight * (down h).
//
//   h        (tokens, k, K)          float
//   down     (experts, N, bytes)     rows of trits
//   scales   (experts, N)            float
//   indices  (tokens, k)             uint
//   weights  (tokens, k)             float
//   shared   (tokens, N)             T
//   y        (tokens, N)             T
//
// A simdgroup computes ROWS elements of y for all experts of a token. Every lane multiplies its own
// part of each product by the weight, so there is one sum over the lanes and one rounding to T.
// Grid: x over rows, SIMDGROUPS simdgroups in a threadgroup; y over tokens.

typedef Rows<DECODE, ROWS, WORDS, K, float> Product;

const uint token = threadgroup_position_in_grid.y;
const uint lane = thread_index_in_simdgroup;
const uint group = threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup_index_in_threadgroup;
if (group * ROWS >= N) return;
const uint first = min(group * ROWS, uint(N - ROWS));

const uint k = indices_shape[1];
float total[ROWS] = {};
for (uint pair = token * k; pair < (token + 1) * k; pair++) {
  const size_t row = size_t(indices[pair]) * N + first;
  float sums[ROWS] = {};
  Product::template add<1>(sums, down + row * Product::PITCH, down, h + size_t(pair) * K, lane);
  const float weight = weights[pair] * Product::unit();
  UNROLL for (uint r = 0; r < ROWS; r++) {
    total[r] = fma(sums[r], weight * scales[row + r], total[r]);
  }
}

float routed = 0.0f;  // lane r: sum of row r
UNROLL for (uint r = 0; r < ROWS; r++) {
  const float sum = simd_sum(total[r]);
  routed = lane == r ? sum : routed;
}
if (lane < ROWS && first + lane >= group * ROWS) {
  const size_t at = size_t(token) * N + first + lane;
  y[at] = T(float(shared[at]) + routed);
}
