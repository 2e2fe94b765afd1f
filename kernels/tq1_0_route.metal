// The TOP experts of each token, largest logit first, and their weights.
//
//   x        (tokens, K)             any float; if K is 0: the logits, (tokens, EXPERTS)
//   router   (EXPERTS, K)            any float; not read if K is 0
//   alpha    (EXPERTS,)              float; not read if ALPHA is false
//   indices  (tokens, TOP)           uint
//   weights  (tokens, TOP)           float
//
// Logits are float sums. Of equal logits, the one of the lower expert comes first; NaN comes last.
// Weights are exp(logit - largest), divided by their sum over the TOP experts if RENORMALISE is
// true, else over all; then multiplied by the expert's alpha.
//
// A threadgroup computes TOKENS tokens. Its simdgroups share the logits: PARTS of them sum a part
// of the columns of ROWS experts each. Then one simdgroup chooses for one token; a lane has the
// experts `lane` and `lane + 32`.
// Grid: x over tokens.

constexpr uint HELD = (EXPERTS + 31) / 32;

const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const uint first = threadgroup_position_in_grid.x * TOKENS;
const uint tokens = x_shape[0];
const uint token = first + simdgroup;

threadgroup float parts[K ? TOKENS * PARTS * EXPERTS : 1];
if (K) {
  const uint from = simdgroup / PARTS * ROWS;
  const uint row = min(from, uint(EXPERTS - ROWS));
  const uint part = simdgroup % PARTS;
  typedef Logits<TOKENS, ROWS, PARTS, K> Product;
  const float sum = Product::part(x, router, first, tokens - 1, row, part, lane);
  const uint expert = row + lane % ROWS;
  if (lane < TOKENS * ROWS && expert >= from) {
    parts[(lane / ROWS * PARTS + part) * EXPERTS + expert] = sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
if (simdgroup >= TOKENS || token >= tokens) return;

float logit[HELD];
uint key[HELD];    // 0: not to be chosen, or no longer
uint place[HELD];  // among the experts of the token; TOP: none
UNROLL for (uint n = 0; n < HELD; n++) {
  const uint expert = lane + 32 * n;
  const uint known = min(expert, uint(EXPERTS - 1));
  if (K) {
    logit[n] = 0.0f;
    for (uint p = 0; p < PARTS; p++) logit[n] += parts[(simdgroup * PARTS + p) * EXPERTS + known];
  } else {
    logit[n] = float(x[token * EXPERTS + known]);
  }
  key[n] = expert < EXPERTS ? ordered(logit[n]) : 0;
  place[n] = TOP;
}

float largest = 0.0f;
for (uint next = 0; next < TOP; next++) {
  uint best = key[0];
  uint held = lane;
  UNROLL for (uint n = 1; n < HELD; n++) {
    held = key[n] > best ? lane + 32 * n : held;
    best = max(best, key[n]);
  }
  const uint top = simd_max(best);
  const uint chosen = simd_min(best == top ? held : 32 * HELD);
  UNROLL for (uint n = 0; n < HELD; n++) {
    if (chosen == lane + 32 * n) {
      key[n] = 0;
      place[n] = next;
    }
  }
  largest = next == 0 ? unordered(top) : largest;
}

float power[HELD];
float sum = 0.0f;
UNROLL for (uint n = 0; n < HELD; n++) {
  power[n] = precise::exp(logit[n] - largest);
  sum += (RENORMALISE ? place[n] < TOP : lane + 32 * n < EXPERTS) ? power[n] : 0.0f;
}
sum = simd_sum(sum);
UNROLL for (uint n = 0; n < HELD; n++) {
  if (place[n] < TOP) {
    const uint expert = lane + 32 * n;
    const uint at = token * TOP + place[n];
    indices[at] = expert;
    weights[at] = power[n] / sum * (ALPHA ? float(alpha[expert]) : 1.0f);
  }
}
