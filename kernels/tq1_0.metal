// Shared by the tq1_0 kernels: dot products of x with rows of trits, a few rows for each simdgroup.
//
// A row byte divided by 256 is a fraction whose five base-3 digits are the trits plus 1, the most
// significant first. Multiplying the byte by 3 carries the next digit out of its 8 bits. Byte i
// holds weights 5 i to 5 i + 4, so a 32-bit word holds 20 weights. Lane l of a simdgroup processes
// words l, l + 32, l + 64 and so on of a row, or pairs of words with 64-bit loads.
//
// All arrays must stay in registers, so only unrolled loops index them.

#define UNROLL _Pragma("clang loop unroll(full)")

// How the digits of a byte are decoded.
enum Decode : int {
  // The byte is in bits 2 to 9 of 16 bits. Multiplying by 3 carries digit d into bits 10 and 11,
  // the lowest bits of the exponent of a half. These two bits alone are the half d * 2^-14. Digits
  // are trits plus 1, which would add the sum of x; so each word's sum starts at minus that sum.
  EXPONENT = 0,
  // The same, but 1 is subtracted from each digit. Every product is exact.
  EXACT = 1,
  // With g_n = floor(3^n byte / 256) in floats, digit d_n = g_(n+1) - 3 g_n. So the sum of d x is a
  // sum of g c, where c depends only on x.
  TELESCOPED = 2,
  // No decoding: the same loads, but the result is not valid. For measuring the time of the loads.
  FLOOR = 3
};

constant constexpr float DIGIT = 6.103515625e-05f;  // 2^-14, the half for a digit of 1

// A half x stays a half in registers: operands of a float fma may be halves.
template <typename T>
struct Register {
  typedef float type;
};
template <>
struct Register<half> {
  typedef half type;
};

// Loads the 20 elements of x for one word, from element `at` on, VECTOR (1 or 4) at a time. If
// WHOLE is false, x (`size` elements) may end inside the word; elements beyond its end are zero.
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

// The next digit of two bytes of a word (0 and 2, or 1 and 3) as halves times 2^-14. `lanes` holds
// the two bytes, 16 bits each.
METAL_FUNC half2 next_digits(thread uint& lanes) {
  const uint carried = lanes + (lanes << 1);
  lanes = carried & 0x03FF03FF;
  return as_type<half2>(carried & 0x0C000C00);
}

// The elements of x for one word, prepared for its decode method, and the dot product with a word.
template <int DECODE, typename X>
struct Word {
  X x[20];
  float start[2];  // start values of the sums over bytes 0 and 2, and over bytes 1 and 3

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
  // The word's sum of trits times x, times DIGIT. If one activation is much larger than the others,
  // `start` is as large, and products lose precision until that activation's own product is added.
  // So `start` is added in two parts.
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

// One lane's part of the products of x (K elements) with ROWS successive rows.
template <int DECODE, int ROWS, int WORDS, int K, typename T>
struct Rows {
  typedef typename Register<T>::type X;
  enum : uint {
    PITCH = (K + 19) / 20 * 4,    // bytes of a row
    STEP = 32 * 4 * WORDS,        // bytes of a row that a simdgroup reads in one step
    WHOLE = K / 5 / STEP * STEP,  // bytes of a row in whole steps
    LAST = PITCH - 4 * WORDS,
    // MLX has arrays of fewer than 8 elements in constant memory, which only scalar loads read.
    VECTOR = K % 4 == 0 && K >= 8 ? 4 : 1
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

  // Adds the words at byte `at` of ROWS rows of `a` and, if MATRICES is 2, of ROWS rows of `b`.
  // If INSIDE is false, rows and x may end before these words do.
  template <int MATRICES, bool INSIDE, typename P>
  static METAL_FUNC void step(
      thread float* sums, const device uint8_t* a, const device uint8_t* b, P x, uint at) {
    uint words[MATRICES * ROWS * WORDS];
    const uint from = INSIDE ? at : min(at, uint(LAST));
    // All loads come before the first use of a loaded word.
    UNROLL for (int r = 0; r < ROWS; r++) read(words + r * WORDS, a + from + r * PITCH);
    if (MATRICES == 2) {
      UNROLL for (int r = 0; r < ROWS; r++) read(words + (ROWS + r) * WORDS, b + from + r * PITCH);
    }
    Word<DECODE, X> shared[WORDS];
    UNROLL for (int i = 0; i < WORDS; i++) {
      Loader<X, VECTOR, INSIDE>::load(shared[i].x, x, 5 * at + 20 * i, K);
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

  // The factor for the sums.
  static METAL_FUNC float unit() {
    return DECODE == EXPONENT || DECODE == EXACT ? 1.0f / DIGIT : 1.0f;
  }
};
