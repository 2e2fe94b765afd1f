// y = x rows: the product of an ordinary linear layer for a few vectors.
//
//   x        (vectors, K)            T
//   rows     (N, bytes)              rows of trits
//   scales   (N,)                    float, one per row, if GROUP is 0
//            (tiles, K / GROUP, 8)   else half or bfloat, one for GROUP weights, in tiles of 8 rows
//   y        (vectors, N)            T: summed in float, rounded once
//
// LANES lanes compute ROWS elements of y for each of M vectors.
// Grid: x over rows, SIMDGROUPS simdgroups in a threadgroup; y over vectors, M at a time.

const uint lane = thread_index_in_simdgroup % LANES;
const uint simdgroup = threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup_index_in_threadgroup;
const uint wanted = (simdgroup * 32 + thread_index_in_simdgroup) / LANES * ROWS;
const uint first = min(wanted, uint((N - 1) / ROWS * ROWS));  // rows of a tile
const uint vector = threadgroup_position_in_grid.y * M;
const uint vectors = FULL ? M : min(uint(M), uint(x_shape[0]) - vector);

GroupProduct<ROWS, M, FULL, LANES, GROUP, K, T, S> product;
product.rows = rows + size_t(first) * product.PITCH;
product.last_row = N % ROWS == 0 ? ROWS - 1 : min(uint(ROWS), N - first) - 1;
product.x = x + size_t(vector) * K;
UNROLL for (uint v = 0; v < M; v++) product.places[v] = min(v, vectors - 1) * K;
product.scales = scales + (GROUP > 0 ? size_t(first / 8) * (8 * product.GROUPS) + first % 8 : 0);
product.add(lane);

sum_over_lanes<M * ROWS, LANES>(product.sums, lane);
UNROLL for (uint i = 0; i < M * ROWS; i += LANES) {
  const uint row = wanted + (lane + i) % ROWS, v = (lane + i) / ROWS;
  if (lane + i < M * ROWS && row < N && v < vectors) {
    const float scale = GROUP > 0 ? UNIT : float(scales[row]) * UNIT;
    y[size_t(vector + v) * N + row] = T(product.sums[i / LANES] * scale);
  }
}
