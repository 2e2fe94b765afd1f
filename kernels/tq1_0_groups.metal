// Products of vectors with rows of trits that may have a scale for each group of weights. A second
// header, after tq1_0.metal.

// The part of one of LANES lanes in the products of VECTORS vectors (K elements each) with ROWS
// successive rows that have a scale for each GROUP weights, or one for the row if GROUP is 0.
//
// Two lanes share a block of 16 bytes of a row: one has bytes 0 to 3 and 8 to 11, the other one the
// rest. B and GROUP are multiples of 16, so a digit of these bytes has one scale: the scale times
// the sum of its eight products is added. The order of the additions for an element of the result
// depends on K and LANES alone.
//
// If NEXT, the vectors follow one another; else they may be anywhere.
template <
    int ROWS, int VECTORS, bool NEXT, int LANES, int GROUP, int K, typename T, typename S>
struct GroupProduct {
  typedef typename Register<T>::type X;
  enum : uint {
    BLOCKS = (K + 79) / 80,  // blocks of a row
    PITCH = 16 * BLOCKS,
    GROUP_BLOCKS = GROUP > 0 ? GROUP / 16 : 1,
    GROUPS = GROUP > 0 ? K / (16 * GROUP_BLOCKS) : 1,
    WIDTH = ROWS < 4 ? ROWS : 4,  // scales that are loaded at once
    VECTOR = K % 4 == 0
  };

  const device uint8_t* rows;  // the first row
  uint last_row;               // the last of them, counted from 0: it stands for those after it
  const device T* x;           // the first vector
  uint places[VECTORS];        // if not NEXT: of each vector, in elements after the first one
  const device S* scales;      // of the first row and the first group, in tiles of eight rows
  float sums[VECTORS * ROWS];  // of vector v and row r: sums[v * ROWS + r], which is times UNIT

  METAL_FUNC void add(uint lane) thread {
    UNROLL for (uint i = 0; i < VECTORS * ROWS; i++) sums[i] = 0.0f;
    for (uint block = lane / 2; block < BLOCKS; block += LANES / 2) {
      step(block, 16 * block + lane % 2 * 4);
    }
  }

  // Adds the products of a block, of which the lane's bytes are at `at` and `at` + 8 of a row.
  METAL_FUNC void step(uint block, uint at) thread {
    Bytes bytes[2 * ROWS];
    UNROLL for (uint i = 0; i < 2 * ROWS; i++) {
      bytes[i].load(rows + at + min(i / 2, last_row) * PITCH + i % 2 * 8);
    }
    UNROLL for (uint i = 0; i < 2 * ROWS; i++) bytes[i].start();
    UNROLL for (uint n = 0; n < 5; n++) {
      if (n * PITCH >= K) continue;
      const bool whole = (n + 1) * PITCH <= K;  // else the digits of the last blocks are padding
      half2 trits[4 * ROWS];
      UNROLL for (uint i = 0; i < 4 * ROWS; i++) {
        trits[i] = bytes[i / 2].trits(i % 2);
        if ((n + 1) * PITCH < K) bytes[i / 2].next(i % 2);
      }
      S scale[ROWS];
      if (GROUP > 0) load_scales(scale, n * BLOCKS + block, whole);
      UNROLL for (uint v = 0; v < VECTORS; v++) {
        X eight[8];
        UNROLL for (uint i = 0; i < 8; i += 4) {
          load_four(eight + i, v, at, n * PITCH + 2 * i, whole);
        }
        float products[ROWS];
        UNROLL for (uint i = 0; i < 8; i++) {
          UNROLL for (uint r = 0; r < ROWS; r++) {
            const float element = float(eight[i]), trit = float(trits[4 * r + i / 2][i % 2]);
            products[r] = i == 0 ? element * trit : fma(element, trit, products[r]);
          }
        }
        UNROLL for (uint r = 0; r < ROWS; r++) {
          const float sum = sums[v * ROWS + r], product = products[r];
          sums[v * ROWS + r] = GROUP > 0 ? fma(product, float(scale[r]), sum) : sum + product;
        }
      }
    }
  }

  // Loads four elements of a vector from `at` + `offset` on. Where all of them are behind its end,
  // they belong to padding, and it loads others.
  METAL_FUNC void load_four(thread X* four, uint v, uint at, uint offset, bool whole) thread {
    if (offset >= K) {
      UNROLL for (uint i = 0; i < 4; i++) four[i] = X(0);
      return;
    }
    const device T* base = NEXT ? x : x + places[v];
    const uint distance = NEXT ? v * K : 0;
    if (VECTOR && !whole) at = min(at, uint(K - 4 - offset));
    if (VECTOR || whole) {
      Four<K, VECTOR>::load(four, base, at, distance + offset, true);
    } else {
      Four<K, VECTOR>::load(four, base + distance, at, offset, false);
    }
  }

  // Loads the scales of the rows for a block of weights, if need be of the last one.
  METAL_FUNC void load_scales(thread S* scale, uint block, bool inside) thread {
    uint from = block / GROUP_BLOCKS * 8;
    if (!inside) from = min(from, uint(8 * (GROUPS - 1)));
    UNROLL for (uint r = 0; r < ROWS; r += WIDTH) {
      const vec<S, WIDTH> some = *(const device vec<S, WIDTH>*)(scales + from + r);
      UNROLL for (uint i = 0; i < WIDTH; i++) scale[r + i] = some[i];
    }
  }
};

// Sums COUNT values (a power of 2) over LANES successive lanes. Lane l then has the sums of values
// l, l + LANES, ... at the beginning of `values`. After each step, a lane keeps half of the values.
// The order of the additions is the same for every COUNT and every value.
template <int COUNT, int LANES>
METAL_FUNC void sum_over_lanes(thread float* values, uint lane) {
  static_assert(COUNT > 0 && (COUNT & (COUNT - 1)) == 0, "not a power of 2");
  UNROLL for (uint bit = 1, left = COUNT / 2; bit < LANES; bit *= 2, left /= 2) {
    if (left > 0) {
      const bool upper = lane & bit;
      UNROLL for (uint i = 0; i < COUNT / 2; i++) {
        if (i >= left) continue;
        const float low = values[2 * i], high = values[2 * i + 1];
        values[i] = (upper ? high : low) + simd_shuffle_xor(upper ? low : high, ushort(bit));
      }
    } else {
      values[0] += simd_shuffle_xor(values[0], ushort(bit));
    }
  }
}

// The vectors of a slice: vector v of x is `place(v)`, and its products are those of `result(v)`.

struct NextVectors {
  uint first, last;  // the first one of the slice, and the last one of all

  METAL_FUNC uint place(uint v) const thread { return min(first + v, last); }
  METAL_FUNC uint result(uint v) const thread { return first + v; }
};

template <int M, int SHARE, typename P>
struct BlockVectors {
  Pairs<M> pairs;
  P blocks;

  METAL_FUNC uint place(uint v) const thread { return pairs.pair(blocks, v) / SHARE; }
  METAL_FUNC uint result(uint v) const thread { return pairs.pair(blocks, v); }
};

// Multiplies VECTORS vectors, of which the first `count` are written, with the ROWS rows from
// `wanted` on of a matrix of N rows. Rows and vectors that do not exist are replaced by others.
//
//   x        (vectors, K)
//   rows     (N, bytes)
//   scales   (tiles, K / GROUP, 8), or (N,) if GROUP is 0
//   y        (results, N)
template <
    int VECTORS, bool NEXT, int ROWS, int LANES, int GROUP, int N, int K, typename V, typename T,
    typename S, typename Y>
METAL_FUNC void multiply_slice(
    const device T* x, const device uint8_t* rows, const device S* scales, device Y* y, V vectors,
    uint count, uint wanted, uint lane) {
  typedef GroupProduct<ROWS, VECTORS, NEXT, LANES, GROUP, K, T, S> Product;
  const uint first = min(wanted, uint((N - 1) / ROWS * ROWS));  // so all rows are of one tile
  Product product;
  product.rows = rows + size_t(first) * Product::PITCH;
  product.last_row = N % ROWS == 0 ? ROWS - 1 : min(uint(ROWS), N - first) - 1;
  product.x = NEXT ? x + size_t(vectors.place(0)) * K : x;
  UNROLL for (uint v = 0; v < VECTORS; v++) product.places[v] = vectors.place(v) * K;
  product.scales =
      scales + (GROUP > 0 ? size_t(first / 8) * (8 * Product::GROUPS) + first % 8 : 0);
  product.add(lane);

  enum : uint {
    ALL = VECTORS * ROWS,
    VALUES = ALL > 16 ? 32 : ALL > 8 ? 16 : ALL > 4 ? 8 : ALL > 2 ? 4 : 2
  };
  float values[VALUES];
  UNROLL for (uint i = 0; i < VALUES; i++) values[i] = i < ALL ? product.sums[i] : 0.0f;
  sum_over_lanes<VALUES, LANES>(values, lane);
  UNROLL for (uint i = 0; i < VALUES; i += LANES) {
    const uint row = wanted + (lane + i) % ROWS, v = (lane + i) / ROWS;
    if (v < count && row < N) {
      const float scale = GROUP > 0 ? UNIT : float(scales[row]) * UNIT;
      y[size_t(vectors.result(v)) * N + row] = Y(values[i / LANES] * scale);
    }
  }
}

// The same for up to M vectors, which may be anywhere; fewer take less time.
template <int M, int ROWS, int LANES, int GROUP, int N, int K>
struct Some {
  template <typename V, typename T, typename S, typename Y>
  static METAL_FUNC void multiply(
      const device T* x, const device uint8_t* rows, const device S* scales, device Y* y,
      V vectors, uint count, uint wanted, uint lane) {
    if (count <= 1) {
      run<1>(x, rows, scales, y, vectors, count, wanted, lane);
    } else if (M == 2 || count == 2) {
      run<2>(x, rows, scales, y, vectors, count, wanted, lane);
    } else if (count == 3) {
      run<3>(x, rows, scales, y, vectors, count, wanted, lane);
    } else if (M == 4 || count == 4) {
      run<4>(x, rows, scales, y, vectors, count, wanted, lane);
    } else if (count <= 6) {
      run<6>(x, rows, scales, y, vectors, count, wanted, lane);
    } else {
      run<8>(x, rows, scales, y, vectors, count, wanted, lane);
    }
  }

  template <int VECTORS, typename V, typename T, typename S, typename Y>
  static METAL_FUNC void run(
      const device T* x, const device uint8_t* rows, const device S* scales, device Y* y,
      V vectors, uint count, uint wanted, uint lane) {
    if (VECTORS <= M) {
      multiply_slice<(VECTORS < M ? VECTORS : M), VECTORS == 1, ROWS, LANES, GROUP, N, K>(
          x, rows, scales, y, vectors, count, wanted, lane);
    }
  }
};
