// Makes blocks of up to M (token, expert) pairs of one expert.
//
//   indices  (pairs,)              uint, the expert of each pair
//   blocks   (blocks, M + 1)       uint: the number of pairs of a block, then these pairs
//
// Blocks are in the order of experts, and an expert's pairs in ascending order, all but the last of
// its blocks full. The blocks after those have no pairs. Where a block has fewer than M, pair 0
// stands for the others.
// Grid: one threadgroup of SIMDGROUPS simdgroups, each of which takes every SIMDGROUPS-th expert.

const uint lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
const uint pairs = indices_shape[0];
threadgroup uint counts[EXPERTS];

for (uint expert = simdgroup; expert < EXPERTS; expert += SIMDGROUPS) {
  uint count = 0;
  for (uint pair = lane; pair < pairs; pair += 32) count += indices[pair] == expert ? 1 : 0;
  count = simd_sum(count);
  if (lane == 0) counts[expert] = count;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

for (uint expert = simdgroup; expert < EXPERTS; expert += SIMDGROUPS) {
  uint before = 0;  // blocks of the experts before
  for (uint e = lane; e < expert; e += 32) before += (counts[e] + M - 1) / M;
  const uint first = simd_sum(before), count = counts[expert];
  for (uint i = lane; i < (count + M - 1) / M * (M + 1); i += 32) {
    const uint done = i / (M + 1) * M, slot = i % (M + 1);
    if (slot == 0) {
      blocks[first * (M + 1) + i] = min(uint(M), count - done);
    } else if (done + slot > count) {
      blocks[first * (M + 1) + i] = 0;
    }
  }
  uint found = 0;
  for (uint from = 0; from < pairs; from += 32) {
    const uint pair = from + lane;
    const bool mine = pair < pairs && indices[min(pair, pairs - 1)] == expert;
    const uint at = found + simd_prefix_exclusive_sum(mine ? 1u : 0u);
    if (mine) blocks[(first + at / M) * (M + 1) + 1 + at % M] = pair;
    found += simd_sum(mine ? 1u : 0u);
  }
}

uint used = 0;
for (uint e = lane; e < EXPERTS; e += 32) used += (counts[e] + M - 1) / M;
used = simd_sum(used);
const uint end = (pairs + (M - 1) * min(uint(EXPERTS), pairs)) / M * (M + 1);
for (uint i = used * (M + 1) + simdgroup * 32 + lane; i < end; i += 32 * SIMDGROUPS) blocks[i] = 0;
