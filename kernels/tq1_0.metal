// Shared by the tq1_0 kernels: products of vectors with rows of trits, a few rows for each
// simdgroup.
//
// A row of B bytes holds five weights in a byte: byte j holds weights j, B + j, ... and 4 B + j. A
// byte divided by 256 is a fraction whose five base-3 digits are the trits plus 1, the most
// significant first. Multiplying the byte by 3 carries the next digit out of its 8 bits. So digit n
// of four neighbouring bytes belongs to four neighbouring elements of a vector.
//
// All arrays must stay in registers, so only unrolled loops index them. Bounds of inner loops do
// not depend on outer ones, so that loops are unrolled whatever order a compiler takes them in.
//
// Member functions have the qualifier `thread`, which is implied only before Metal 4.1.

#define UNROLL _Pragma("clang loop unroll(full)")

enum Decode : int {
  SIGNS = 0,
  // No decoding: the same loads, but the result is not valid. For measuring the time of the loads.
  FLOOR = 1
};

constant constexpr float UNIT = 0.5f;  // the factor for sums: a decoded trit is twice its value

// Four successive bytes of a row, in 16 bits each. After `start`, bits 6 to 15 hold 3 * byte: the
// next digit is in bits 14 and 15, and their complement is, read as a half, exactly -2, -0 or 2 for
// a digit of 0, 1 or 2.
struct Bytes {
  uint pairs[2];  // bytes 0 and 1, bytes 2 and 3

  METAL_FUNC void load(const device uint8_t* from) thread {
    const ushort4 bytes = ushort4(*(const device uchar4*)from);
    pairs[0] = as_type<uint>(bytes.xy);
    pairs[1] = as_type<uint>(bytes.zw);
  }
  METAL_FUNC void start() thread {
    UNROLL for (int i = 0; i < 2; i++) pairs[i] *= 3 << 6;
  }
  METAL_FUNC half2 trits(int pair) const thread {
    return as_type<half2>(~pairs[pair] & 0xC000C000u);
  }
  METAL_FUNC void next(int pair) thread {
    pairs[pair] &= 0x3FFF3FFFu;
    pairs[pair] += pairs[pair] << 1;
  }
};

// A half stays a half in registers: operands of a float fma may be halves.
template <typename T>
struct Register {
  typedef float type;
};
template <>
struct Register<half> {
  typedef half type;
};

// Loads the four elements of a vector of K from index `at` + `offset` on. If not `whole`, it may
// end before them; then the last elements are loaded instead: the trits there are 0.
template <int K, bool VECTOR>
struct Four {
  template <typename X, typename P>
  static METAL_FUNC void load(thread X* four, P x, uint at, uint offset, bool whole) {
    const P here = x + at;
    UNROLL for (uint i = 0; i < 4; i++) {
      four[i] = X(whole ? here[offset + i] : x[min(at + offset + i, uint(K - 1))]);
    }
  }
};
template <int K>
struct Four<K, true> {
  template <typename X, typename T>
  static METAL_FUNC void load(
      thread X* four, const device T* x, uint at, uint offset, bool whole) {
    const device T* here = x + at;
    const device T* from = whole ? here + offset : x + min(at + offset, uint(K - 4));
    const vec<T, 4> v = *(const device vec<T, 4>*)from;
    UNROLL for (uint i = 0; i < 4; i++) four[i] = X(v[i]);
  }
};

// The vectors of a product, K elements each. P is the type of pointers to them: MLX has small
// arrays in constant memory.
//
// If LOADERS is 1, every lane loads the elements that it needs. Otherwise, the LOADERS simdgroups
// of a threadgroup first copy those for a piece of the rows to threadgroup memory, as floats if T
// is bfloat. So a threadgroup loads and converts an element once.
template <int VECTORS, int LOADERS, int K, typename P, typename T>
struct Vectors {
  typedef typename Register<T>::type X;
  enum : uint {
    COUNT = VECTORS,
    PITCH = (K + 79) / 80 * 16,
    OWN = (VECTORS + LOADERS - 1) / LOADERS,
    TOGETHER = LOADERS > 1,
    VECTOR = K % 4 == 0 && K >= 8  // constant memory has scalar loads only
  };

  P own[OWN];  // vectors `loader`, `loader` + LOADERS and so on
  uint loader;
  threadgroup vec<X, 4>* copy;  // of this lane: those for digit n of vector v are at (5 v + n) * 32

  // Copies the elements for this lane's piece, if it has one.
  METAL_FUNC void copy_for(uint at) const thread {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    UNROLL for (uint i = 0; i < OWN; i++) {
      if (at < PITCH && (VECTORS % LOADERS == 0 || i * LOADERS + loader < VECTORS)) {
        UNROLL for (uint n = 0; n < 5; n++) {
          if (n * PITCH >= K) continue;
          X four[4];
          Four<K, VECTOR>::load(four, own[i], at + n * PITCH, 0, (n + 1) * PITCH <= K);
          threadgroup vec<X, 4>* to = copy + loader * (5 * 32);
          to[(5 * LOADERS * i + n) * 32] = vec<X, 4>(four[0], four[1], four[2], four[3]);
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  // The elements of vector v for digit n of bytes `at` + `offset` to `at` + `offset` + 3.
  METAL_FUNC void load(thread X* four, uint v, uint n, uint at, uint offset) const thread {
    if (LOADERS > 1) {
      const vec<X, 4> found = copy[(5 * v + n) * 32];
      UNROLL for (uint e = 0; e < 4; e++) four[e] = found[e];
    } else {
      // One vector has constant offsets from one address; several share an index.
      const uint from = n * PITCH + offset, index = VECTORS > 1 ? at + from : at;
      const bool whole = (n + 1) * PITCH <= K;
      Four<K, VECTOR>::load(four, own[v % OWN], index, VECTORS > 1 ? 0 : from, whole);
    }
  }
};

// One lane's part of the products of vectors, a `Vectors` V, with ROWS successive rows of each of
// MATRICES matrices. A lane takes a piece of each row, four bytes, and then the next one; a turn of
// the loop has PIECES. The order of the additions for an element of the result depends on K alone.
template <int DECODE, int MATRICES, int ROWS, int PIECES, int K, typename V>
struct Product {
  enum : uint {
    PITCH = (K + 79) / 80 * 16,  // bytes of a row
    PIECE = 4 * 32,              // successive bytes of a row that a simdgroup takes
    STEP = PIECES * PIECE,
    ALL = MATRICES * ROWS,
    VECTORS = V::COUNT,
    // Rows that take turns, so that an instruction rarely needs the result of the one before it.
    TURNS = ALL >= 4 && VECTORS > 1 ? 4 : 2
  };

  const device uint8_t* rows[MATRICES];  // the first row of each matrix
  V vectors;
  // Of vector v and row r of matrix m: sums[(v * MATRICES + m) * ROWS + r]. Times UNIT, it is the
  // product with the trits.
  float sums[VECTORS * ALL];

  // Adds the products of whole rows.
  METAL_FUNC void add(uint lane) thread {
    UNROLL for (uint i = 0; i < VECTORS * ALL; i++) sums[i] = 0.0f;
    uint at = 4 * lane;
    if (V::TOGETHER) {
      for (; at < PITCH / PIECE * PIECE; at += PIECE) {
        vectors.copy_for(at);
        piece(at, 0);
      }
      if (PITCH % PIECE != 0) {
        vectors.copy_for(at);
        if (at < PITCH) piece(at, 0);
      }
      return;
    }
    for (; at < PITCH / STEP * STEP; at += STEP) {
      UNROLL for (uint p = 0; p < PIECES; p++) piece(at, p * PIECE);
    }
    if (PITCH % STEP != 0) {
      for (; at < PITCH; at += PIECE) piece(at, 0);
    }
  }

  // Adds the products of bytes `at` + `offset` to `at` + `offset` + 3 of every row.
  METAL_FUNC void piece(uint at, uint offset) thread {
    Bytes bytes[ALL];
    // All loads of rows come before the first use of their bytes.
    UNROLL for (uint m = 0; m < MATRICES; m++) {
      const device uint8_t* from = rows[m] + at;
      UNROLL for (uint r = 0; r < ROWS; r++) bytes[m * ROWS + r].load(from + r * PITCH + offset);
    }
    float words[VECTORS * ALL];  // the sums of this piece
    UNROLL for (uint i = 0; i < VECTORS * ALL; i++) words[i] = 0.0f;
    if (DECODE == SIGNS) {
      UNROLL for (uint i = 0; i < ALL; i++) bytes[i].start();
    }
    UNROLL for (uint n = 0; n < 5; n++) {
      if (n * PITCH < K) digit(words, bytes, at, offset, n);
    }
    UNROLL for (uint i = 0; i < VECTORS * ALL; i++) {
      const thread uint* raw = bytes[i % ALL].pairs;
      const float mixed = as_type<float>(raw[0] ^ raw[1] ^ as_type<uint>(words[i / ALL * ALL]));
      sums[i] += DECODE == FLOOR ? mixed : words[i];
    }
  }

  // Adds the products of digit n of these bytes.
  METAL_FUNC void digit(
      thread float* words, thread Bytes* bytes, uint at, uint offset, uint n) thread {
    const bool more = (n + 1) * PITCH < K;
    UNROLL for (uint first = 0; first < ALL; first += TURNS) {
      half2 trits[2][TURNS];
      UNROLL for (uint i = 0; i < 2 * TURNS; i++) {
        const uint pair = i / TURNS, r = i % TURNS;
        trits[pair][r] = bytes[first + r].trits(pair);
      }
      UNROLL for (uint v = 0; v < VECTORS; v++) {
        typename V::X four[4];
        vectors.load(four, v, n, at, offset);
        UNROLL for (uint i = 0; i < 4 * TURNS; i++) {
          const uint e = i / TURNS, r = i % TURNS;
          const float element = four[e], trit = trits[e / 2][r][e % 2];
          const float word = words[v * ALL + first + r];
          words[v * ALL + first + r] = DECODE == FLOOR ? word + element : fma(element, trit, word);
        }
      }
      UNROLL for (uint i = 0; i < 2 * TURNS; i++) {
        if (more && DECODE != FLOOR) bytes[first + i % TURNS].next(i / TURNS);
      }
    }
  }
};

// Sums COUNT values (a power of 2, at most 16) over the lanes of a simdgroup. After each of the
// first steps, a lane keeps half of the values; lane l returns the sum of value `of(l)`. The order
// of the additions is the same for every COUNT and every value.
template <int COUNT>
struct Sums {
  static_assert(COUNT > 0 && COUNT <= 16 && (COUNT & (COUNT - 1)) == 0, "not a power of 2");

  static METAL_FUNC uint of(uint lane) { return lane % 16 / (16 / COUNT); }
  // Whether this is the lane that writes the sum of its value.
  static METAL_FUNC bool writes(uint lane) { return lane < 16 && lane % (16 / COUNT) == 0; }

  static METAL_FUNC float over_lanes(thread float* values, uint lane) {
    UNROLL for (uint bit = 8, left = COUNT / 2; bit > 0; bit /= 2, left /= 2) {
      if (left > 0) {
        const bool upper = lane & bit;
        UNROLL for (uint i = 0; i < COUNT / 2; i++) {
          if (i >= left) continue;
          const float low = values[i], high = values[i + left];
          values[i] = (upper ? high : low) + simd_shuffle_xor(upper ? low : high, ushort(bit));
        }
      } else {
        values[0] += simd_shuffle_xor(values[0], ushort(bit));
      }
    }
    return values[0] + simd_shuffle_xor(values[0], ushort(16));
  }
};

// The pairs of a threadgroup: those of a block that tq1_0_sort made, or pair `number` if M is 1.
template <int M>
struct Pairs {
  uint number;

  template <typename P>
  METAL_FUNC uint count(P blocks) const thread { return M > 1 ? blocks[number * (M + 1)] : 1; }
  template <typename P>
  METAL_FUNC uint pair(P blocks, uint m) const thread {
    return M > 1 ? blocks[number * (M + 1) + 1 + m] : number;
  }
};

// The products of up to M vectors with ROWS rows of each of MATRICES matrices, summed over lanes.
// Fewer vectors than M cost less, and every product has the same bits.
template <
    int DECODE, int MATRICES, int ROWS, int M, int PIECES, int LOADERS, int K, typename P,
    typename T>
struct Block {
  typedef typename Register<T>::type X;
  enum : uint {
    PART = M * ROWS < 16 ? M * ROWS : 16,  // sums of a matrix that are added together over lanes
    PARTS = M * ROWS / PART,
    PITCH = (K + 79) / 80 * 16,
    OWN = (M + LOADERS - 1) / LOADERS
  };

  const device uint8_t* rows[MATRICES];  // the first row of each matrix
  P own[OWN];  // this and the next two: see Vectors
  uint loader;
  threadgroup vec<X, 4>* copy;
  // The results: with row `row` of matrix m and vector `vector` + i * PART / ROWS, sums[m][i]. If
  // `writes` is false, another lane has them, too.
  float sums[MATRICES][PARTS];
  uint row, vector;
  bool writes;

  // Multiplies the first `count` vectors; the others have to be valid, too.
  METAL_FUNC void multiply(uint count, uint lane) thread {
    if (count >= M) {
      run<M>(lane);
    } else if (count == 1) {
      run<1>(lane);
    } else if (M > 2 && count == 2) {
      run<M < 2 ? M : 2>(lane);
    } else if (M > 2 && count == 3) {
      run<M < 3 ? M : 3>(lane);
    } else if (M > 4 && count == 4) {
      run<M < 4 ? M : 4>(lane);
    } else if (M > 4 && count == 5) {
      run<M < 5 ? M : 5>(lane);
    } else if (M > 4 && count == 6) {
      run<M < 6 ? M : 6>(lane);
    } else if (M > 4) {
      run<M < 7 ? M : 7>(lane);
    }
  }

  template <int COUNT>
  METAL_FUNC void run(uint lane) thread {
    // A power of 2 of values that are added together over lanes.
    enum : uint {
      FEW = COUNT * ROWS,
      VALUES = FEW > 8 ? 16 : FEW > 4 ? 8 : FEW > 2 ? 4 : 2,
    };
    typedef Vectors<COUNT, LOADERS, K, P, T> Some;
    Product<DECODE, MATRICES, ROWS, PIECES, K, Some> product;
    UNROLL for (uint m = 0; m < MATRICES; m++) product.rows[m] = rows[m];
    UNROLL for (uint i = 0; i < Some::OWN; i++) product.vectors.own[i] = own[i];
    product.vectors.loader = loader;
    product.vectors.copy = copy + lane;
    product.add(lane);
    UNROLL for (uint m = 0; m < MATRICES; m++) {
      UNROLL for (uint part = 0; part < PARTS; part++) {
        float values[VALUES];
        UNROLL for (uint i = 0; i < VALUES; i++) {
          const uint v = part * PART / ROWS + i / ROWS;
          values[i] = v < COUNT ? product.sums[(v * MATRICES + m) * ROWS + i % ROWS] : 0.0f;
        }
        sums[m][part] = part * PART < FEW ? Sums<VALUES>::over_lanes(values, lane) : 0.0f;
      }
    }
    row = Sums<VALUES>::of(lane) % ROWS;
    vector = Sums<VALUES>::of(lane) / ROWS;
    writes = Sums<VALUES>::writes(lane);
  }
};
