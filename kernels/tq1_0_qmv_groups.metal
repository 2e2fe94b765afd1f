// y = rows x for every (vector, expert) pair, as tq1_0_qmv, with a scale for each GROUP weights.
//
//   x        (vectors, K)            T, each used for SHARE successive pairs
//   rows     (experts, N, bytes)     rows of trits
//   scales   (experts, tiles, K / GROUP, 8)   half or bfloat, in tiles of eight rows
//   indices  (pairs,)                uint
//   blocks   (blocks, M + 1)         uint, see tq1_0_sort; unused if M is 1
//   y        (pairs, N)              float
//
// LANES lanes compute ROWS elements of y for each pair of a block.
// Grid: x over rows, SIMDGROUPS simdgroups in a threadgroup; y over blocks, or pairs if M is 1.

const uint lane = thread_index_in_simdgroup % LANES;
const uint simdgroup = threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup_index_in_threadgroup;
const uint row = (simdgroup * 32 + thread_index_in_simdgroup) / LANES * ROWS;
const BlockVectors<M, SHARE, decltype(blocks + 0)> vectors = {
    {threadgroup_position_in_grid.y}, blocks};
const uint count = vectors.pairs.count(blocks);
if (count == 0) return;

const size_t expert = indices[vectors.result(0)];
constexpr size_t PITCH = (K + 79) / 80 * 16, SCALES = (N + 7) / 8 * (K / GROUP) * 8;
Some<M, ROWS, LANES, GROUP, N, K>::multiply(
    x, rows + expert * N * PITCH, scales + expert * SCALES, y, vectors, count, row, lane);
