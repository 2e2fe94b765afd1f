// y = rows x for every (vector, expert) pair, as tq1_0_qmv, with a scale for each GROUP weights.
//
//   x        (vectors, K)            T, each used for SHARE successive pairs
//   rows     (experts, N, bytes)     rows of trits
//   scales   (experts, tiles, K / GROUP, 8)   half or bfloat, in tiles of eight rows
//   indices  (pairs,)                uint
//   y        (pairs, N)              float
//
// LANES lanes compute ROWS elements of y.
// Grid: x over rows, SIMDGROUPS simdgroups in a threadgroup; y over pairs.

const uint lane = thread_index_in_simdgroup % LANES;
const uint simdgroup = threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup_index_in_threadgroup;
const uint wanted = (simdgroup * 32 + thread_index_in_simdgroup) / LANES * ROWS;
const uint first = min(wanted, uint((N - 1) / ROWS * ROWS));  // rows of a tile
const uint pair = threadgroup_position_in_grid.y;
const size_t expert = indices[pair];

GroupProduct<ROWS, 1, true, LANES, GROUP, K, T, S> product;
product.rows = rows + (expert * N + first) * product.PITCH;
product.last_row = N % ROWS == 0 ? ROWS - 1 : min(uint(ROWS), N - first) - 1;
product.x = x + size_t(pair / SHARE) * K;
product.scales = scales + (expert * ((N + 7) / 8) + first / 8) * (8 * product.GROUPS) + first % 8;
product.add(lane);

sum_over_lanes<ROWS, LANES>(product.sums, lane);
if (lane < ROWS && wanted + lane < N) {
  y[size_t(pair) * N + wanted + lane] = product.sums[0] * UNIT;
}
