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
// A simdgroup computes ROWS elements of y for all experts of a token, in their order, and rounds
// each sum once. The rows of the last simdgroup end at N. They may overlap those of the simdgroup
// before it, which writes the overlapping rows.
// Grid: x over rows, SIMDGROUPS simdgroups in a threadgroup; y over tokens.

const uint token = threadgroup_position_in_grid.y;
const uint lane = thread_index_in_simdgroup;
const uint group = threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup_index_in_threadgroup;
if (group * ROWS >= N) return;
const uint first = min(group * ROWS, uint(N - ROWS));

const uint k = indices_shape[1];
const uint r = Sums<ROWS>::of(lane);  // the row that this lane finishes
float routed = 0.0f;
for (uint pair = token * k; pair < (token + 1) * k; pair++) {
  const size_t row = size_t(indices[pair]) * N + first;
  Product<DECODE, 1, ROWS, PIECES, K, Vectors<1, 1, K, decltype(h + K), float>> product;
  product.rows[0] = down + row * product.PITCH;
  product.vectors.own[0] = h + pair * K;
  product.add(lane);
  const float sum = Sums<ROWS>::over_lanes(product.sums, lane);
  routed = fma(weights[pair], sum * (scales[row + r] * UNIT), routed);
}
if (Sums<ROWS>::writes(lane) && first + r >= group * ROWS) {
  const uint at = token * N + first + r;
  y[at] = T(float(shared[at]) + routed);
}
