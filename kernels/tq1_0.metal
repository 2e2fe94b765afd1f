// Dot products of x with rows of trits, a few rows to a simdgroup: what the tq1_0 kernels share.
//
// A row byte is a fraction of 256 whose five base-3 digits are the trits plus 1, the most
// significant first: three times the byte carries the next digit out of its 8 bits. Byte i holds
// weights 5 i to 5 i + 4, so a 32-bit word holds twenty. Of a row's words, lane l of a simdgroup
// takes l, l + 32, l + 64 and so on, or pairs of them with 64-bit loads.
//
// Nothing here may end in memory: arrays are indexed by unrolled loops only.

#define UNROLL _Pragma("clang loop unroll(full)")

// How digits leave their byte.
enum Decode : int {
  // As exponents. With a byte at bits 2 to 9 of a 16-bit lane, three times the lane carries digit d
  // into bits 10 and 11, the lowest of a half's exponent: these bits alone are the half d * 2^-14.
  // The sum of x, which the digits' offset of 1 adds, is taken off where a word's sum starts.
  EXPONENT = 0,
  // The same, with the offset subtracted from each digit. Every product is exact.
  EXACT = 1,
  // With g_n = floor(3^n byte / 256) in floats, d_n = g_(n+1) - 3 g_n: sums of d x are sums of
  // g c, where c depends on x alone.
  TELESCOPED = 2,
  // Not at all: the same loads, and a result without meaning.
  FLOOR = 3
};

constant constexpr float DIGIT = 6.103515625e-05f;  // 2^-14, a digit of 1 as an exponent

// x stays a half in registers where it is one: an operand of a float fma may be.
template <typename T>
struct Register {
  typedef float type;
};
template <>
struct Register<half> {
  typedef half type;
};

// The part of x that meets one word, from element `at` on, VECTOR (1 or 4) to a load. Where x, of
// `size` elements, may end within the word, WHOLE is false, and what lies beyond is zero.
template <typename X, int VECTOR, bool WHOLE>
struct Loader {
  template <typename P>
  static METAL_FUNC void load(thread X* c, P x, uint at, uint size) {
    const P here = x + at;
    UNROLL for (uint i = 0; i < 20; i++) {
      const X v = X(WHOLE ? here[i] : x[min(at + i, size - 1)]);
      c[i] = WHOLE || at + i < size ? v : X(0);
    }
  }
};
template <typename X, bool WHOLE>
struct Loader<X, 4, WHOLE> {
  template <typename T>
  static METAL_FUNC void load(thread X* c, const device T* x, uint at, uint size) {
    const device T* here = x + at;
    UNROLL for (uint i = 0; i < 20; i += 4) {
      const device T* from = WHOLE ? here + i : x + min(at + i, size - 4);
      const vec<T, 4> v = *(const device vec<T, 4>*)from;
      UNROLL for (uint j = 0; j < 4; j++) c[i + j] = WHOLE || at + i < size ? X(v[j]) : X(0);
    }
  }
};

// Digits n of bytes 0 and 2 (x) or 1 and 3 (y) of a word, as halves; the lanes move on to n + 1.
METAL_FUNC half2 next_digits(thread uint& lanes) {
  const uint carried = lanes + (lanes << 1);
  lanes = carried & 0x03FF03FF;
  return as_type<half2>(carried & 0x0C000C00);
}

// What a word of x becomes before it meets the rows, and the product of the two.
template <int DECODE, typename X>
struct Word {
  X x[20];
  float start[2];  // of the sums over bytes 0 and 2, and over bytes 1 and 3

  METAL_FUNC void prepare() {
    UNROLL for (int i = 0; i < 2; i++) start[i] = -DIGIT * (five(5 * i) + five(5 * i + 10));
  }
  METAL_FUNC float five(int at) const {
    float sum = float(x[at]);
    UNROLL for (int n = 1; n < 5; n++) sum += float(x[at + n]);
    return sum;
  }
  // Adds the products of bytes 0 and 2 (`at` 0) or 1 and 3 (`at` 5) to a sum.
  METAL_FUNC float add(float sum, uint lanes, int at) const {
    UNROLL for (int n = 0; n < 5; n++) {
      half2 digits = next_digits(lanes);
      if (DECODE == EXACT) digits = digits - half2(half(DIGIT));
      sum = fma(float(x[at + n]), float(digits.x), sum);
      sum = fma(float(x[at + n + 10]), float(digits.y), sum);
    }
    return sum;
  }
  // The word's sum of trits times x, times DIGIT. An activation that is far above the others makes
  // `start` as large, and what is added before its own product takes that away loses precision.
  // Taking off the offset in two steps keeps that short.
  METAL_FUNC float dot(uint word) const {
    float sum = DECODE == EXACT ? 0.0f : start[0];
    sum = add(sum, (word << 2) & 0x03FC03FC, 0);
    if (DECODE != EXACT) sum += start[1];
    return add(sum, (word >> 6) & 0x03FC03FC, 5);
  }
};
template <typename X>
struct Word<TELESCOPED, X> {
  X x[20];
  float c[20];
  float start;

  METAL_FUNC void prepare() {
    start = 0.0f;
    UNROLL for (int i = 0; i < 20; i++) {
      start -= float(x[i]);
      c[i] = i % 5 == 4 ? float(x[i]) : fma(-3.0f, float(x[i + 1]), float(x[i]));
    }
  }
  METAL_FUNC float dot(uint word) const {
    float sum = start;
    UNROLL for (int i = 0; i < 4; i++) {
      float power = 0.01171875f;  // 3 / 256
      const float byte = float((word >> (8 * i)) & 255);
      UNROLL for (int n = 0; n < 5; n++) {
        sum = fma(floor(byte * power), c[5 * i + n], sum);
        power *= 3.0f;
      }
    }
    return sum;
  }
};
template <typename X>
struct Word<FLOOR, X> {
  X x[20];
  float start;

  METAL_FUNC void prepare() {
    start = 0.0f;
    UNROLL for (int i = 0; i < 20; i++) start += float(x[i]);
  }
  METAL_FUNC float dot(uint word) const { return as_type<float>(word ^ as_type<uint>(start)); }
};

// The lanes' shares of products of x (K elements) with ROWS rows, which lie one after the other.
template <int DECODE, int ROWS, int WORDS, int K, typename T>
struct Rows {
  typedef typename Register<T>::type X;
  enum : uint {
    PITCH = (K + 19) / 20 * 4,    // bytes of a row
    STEP = 32 * 4 * WORDS,        // bytes of a row that a simdgroup reads at a time
    WHOLE = K / 5 / STEP * STEP,  // bytes of a row before the step in which x ends
    LAST = PITCH - 4 * WORDS
  };
  static_assert(PITCH % (4 * WORDS) == 0, "a load crosses the end of a row");

  static METAL_FUNC void read(thread uint* words, const device uint8_t* row) {
    if (WORDS == 2) {
      const uint2 pair = *(const device uint2*)row;
      words[0] = pair.x;
      words[1] = pair.y;
    } else {
      words[0] = *(const device uint*)row;
    }
  }

  // Adds what lies at byte `at` of the rows: ROWS of `a`, then with MATRICES == 2 as many of `b`.
  // INSIDE is false where rows and x may end before.
  template <int MATRICES, bool INSIDE, typename P>
  static METAL_FUNC void step(
      thread float* sums, const device uint8_t* a, const device uint8_t* b, P x, uint at) {
    uint words[MATRICES * ROWS * WORDS];
    const uint from = INSIDE ? at : min(at, uint(LAST));
    // All loads come before the first use of one.
    UNROLL for (int r = 0; r < ROWS; r++) read(words + r * WORDS, a + from + r * PITCH);
    if (MATRICES == 2) {
      UNROLL for (int r = 0; r < ROWS; r++) read(words + (ROWS + r) * WORDS, b + from + r * PITCH);
    }
    Word<DECODE, X> shared[WORDS];
    UNROLL for (int i = 0; i < WORDS; i++) {
      Loader<X, K % 4 == 0 ? 4 : 1, INSIDE>::load(shared[i].x, x, 5 * at + 20 * i, K);
      shared[i].prepare();
    }
    UNROLL for (int r = 0; r < MATRICES * ROWS; r++) {
      UNROLL for (int i = 0; i < WORDS; i++) sums[r] += shared[i].dot(words[r * WORDS + i]);
    }
  }

  template <int MATRICES, typename P>
  static METAL_FUNC void add(
      thread float* sums, const device uint8_t* a, const device uint8_t* b, P x, uint lane) {
    uint at = 4 * WORDS * lane;
    for (; at < WHOLE; at += STEP) step<MATRICES, true>(sums, a, b, x, at);
    if (WHOLE * 5 < K) step<MATRICES, false>(sums, a, b, x, at);
  }

  // What the sums have to be multiplied by.
  static METAL_FUNC float unit() {
    return DECODE == EXPONENT || DECODE == EXACT ? 1.0f / DIGIT : 1.0f;
  }
};
