// Shared by tq1_0_route and tq1_0_logits: products of tokens with rows of the router.

#define UNROLL _Pragma("clang loop unroll(full)")

// Reads COUNT (1 or 4) successive elements as floats.
template <uint COUNT>
struct Columns {
  template <typename P>
  static METAL_FUNC void read(thread float* values, P from) {
    UNROLL for (uint i = 0; i < COUNT; i++) values[i] = float(from[i]);
  }
};
template <>
struct Columns<4> {
  template <typename T>
  static METAL_FUNC void read(thread float* values, const device T* from) {
    const vec<T, 4> loaded = *(const device vec<T, 4>*)from;
    UNROLL for (uint i = 0; i < 4; i++) values[i] = float(loaded[i]);
  }
};

// The sum of values[i] over the simdgroup, in lane i; of the other lanes' results, none has a use.
// After each exchange with a neighbour, a lane has half as many sums to go on with. Sums of two
// lanes become sums of four, and so on, whatever COUNT is: so is the rounding.
template <uint COUNT>
METAL_FUNC float sum_by_lane(thread float* values, uint lane) {
  UNROLL for (uint step = 1, count = COUNT; step < 32; step *= 2, count = (count + 1) / 2) {
    const bool odd = lane & step;
    UNROLL for (uint i = 0; i < (COUNT + 1) / 2; i++) {
      if (i >= (count + 1) / 2) continue;
      const float a = values[2 * i];
      const float b = 2 * i + 1 < count ? values[2 * i + 1] : a;
      values[i] = (odd ? b : a) + simd_shuffle_xor(odd ? a : b, ushort(step));
    }
  }
  return values[0];
}

// One part of the logits of TOKENS tokens for ROWS successive rows of the router, which have K
// columns: in lane i, that of token i / ROWS for row i % ROWS. Of each 128 columns, a lane takes
// four; part p takes the columns 128 p to 128 p + 127, then those 128 PARTS further on, and so on.
// The order of a token's sums depends on PARTS and K alone. `last` is the last token that there is.
template <uint TOKENS, uint ROWS, uint PARTS, uint K>
struct Logits {
  enum : uint {
    // MLX has arrays of fewer than 8 elements in constant memory, which only scalar loads read.
    COUNT = K % 4 == 0 && K >= 8 ? 4 : 1,
    STRIDE = 32 * COUNT * PARTS
  };

  template <typename X, typename W>
  static METAL_FUNC float part(
      X x, W router, uint token, uint last, uint row, uint part, uint lane) {
    float sums[TOKENS * ROWS] = {};
    for (uint at = COUNT * (lane + 32 * part); at < K; at += STRIDE) {
      float weights[ROWS][COUNT];
      UNROLL for (uint r = 0; r < ROWS; r++) {
        Columns<COUNT>::read(weights[r], router + (row + r) * K + at);
      }
      UNROLL for (uint t = 0; t < TOKENS; t++) {
        float columns[COUNT];
        Columns<COUNT>::read(columns, x + min(token + t, last) * K + at);
        UNROLL for (uint r = 0; r < ROWS; r++) {
          UNROLL for (uint i = 0; i < COUNT; i++) {
            sums[t * ROWS + r] = fma(columns[i], weights[r][i], sums[t * ROWS + r]);
          }
        }
      }
    }
    return sum_by_lane<TOKENS * ROWS>(sums, lane);
  }
};

// Unsigned integers in the order of floats; -0 and 0 are equal. NaN is 1, the smallest of all.
METAL_FUNC uint ordered(float value) {
  const uint bits = as_type<uint>(value);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return 1;
  if (bits == 0x80000000) return 0x80000000;
  return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}

// The float of an integer that `ordered` returns.
METAL_FUNC float unordered(uint key) {
  return as_type<float>(key & 0x80000000 ? key & 0x7FFFFFFF : ~key);
}
