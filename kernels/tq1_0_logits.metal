// logits = x router^T, for a router that is too large for a single threadgroup.
//
//   x        (tokens, K)             any float
//   router   (EXPERTS, K)            any float
//   logits   (tokens, EXPERTS)       float
//
// A threadgroup computes ROWS logits of TOKENS tokens; each of its PARTS simdgroups sums a part of
// the columns.
// Grid: x over rows, PARTS simdgroups in a threadgroup; y over tokens.

typedef Logits<TOKENS, ROWS, PARTS, K> Product;

const uint lane = thread_index_in_simdgroup;
const uint part = simdgroup_index_in_threadgroup;
const uint token = threadgroup_position_in_grid.y * TOKENS;
const uint tokens = x_shape[0];
const uint from = threadgroup_position_in_grid.x * ROWS;
const uint row = min(from, uint(EXPERTS - ROWS));

threadgroup float parts[PARTS * TOKENS * ROWS];
const float sum = Product::part(x, router, token, tokens - 1, row, part, lane);
if (lane < TOKENS * ROWS) parts[part * TOKENS * ROWS + lane] = sum;
threadgroup_barrier(mem_flags::mem_threadgroup);

const uint i = thread_position_in_threadgroup.x;
const uint t = token + i / ROWS;
const uint expert = row + i % ROWS;
if (i < TOKENS * ROWS && t < tokens && expert >= from) {
  float logit = 0.0f;
  for (uint p = 0; p < PARTS; p++) logit += parts[p * TOKENS * ROWS + i];
  logits[t * EXPERTS + expert] = logit;
}
