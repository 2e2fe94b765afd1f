// y = x rows: the product of an ordinary linear layer for a few vectors.
//
//   x        (vectors, K)            T
//   rows     (N, bytes)              rows of trits
//   scales   (N,)                    float, one per row, if GROUP is 0
//            (tiles, K / GROUP, 8)   else half or bfloat, one for GROUP weights, in tiles of 8 rows
//   y        (vectors, N)            T: summed in float, rounded once
//
// LANES lanes compute ROWS elements of y for each vector of a slice: M vectors, and in the last
// slice up to TAIL, exactly TAIL if EXACT.
// Grid: x over rows, SIMDGROUPS simdgroups in a threadgroup; y over slices.

const uint lane = thread_index_in_simdgroup % LANES;
const uint simdgroup = threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup_index_in_threadgroup;
const uint row = (simdgroup * 32 + thread_index_in_simdgroup) / LANES * ROWS;
const uint first = threadgroup_position_in_grid.y * M, left = x_shape[0] - first;
const NextVectors vectors = {first, first + left - 1};
if (left >= M) {
  multiply_slice<M, true, ROWS, LANES, GROUP, N, K>(x, rows, scales, y, vectors, M, row, lane);
} else {
  multiply_slice<TAIL, EXACT, ROWS, LANES, GROUP, N, K>(
      x, rows, scales, y, vectors, left, row, lane);
}
