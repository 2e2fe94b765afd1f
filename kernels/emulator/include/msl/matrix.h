// 8x8 matrices held by a simdgroup, two neighbours of a row in each thread. Which two is not
// in Metal's specification; MLX (steel/gemm/mma.h) relies on this placement.
#pragma once

extern "C" __attribute__((const)) ulong emu_matrix_multiply(ulong a, ulong b, ulong c, uint place);

namespace metal {

template <typename T, int Cols, int Rows>
struct simdgroup_matrix {
  static_assert(Cols == 8 && Rows == 8, "Metal has simdgroup matrices of 8x8 only");
  typedef vec<T, 2> storage_type;
  storage_type elements;
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T diagonal) {
    ushort row = msl_row(), col = msl_col();
    elements = storage_type(row == col ? diagonal : T(0), row == col + 1 ? diagonal : T(0));
  }
  thread storage_type& thread_elements() thread { return elements; }
  static ushort msl_row() {
    uint lane = emu_lane();
    return ushort(((lane >> 2) & 4) + ((lane >> 1) & 3));
  }
  static ushort msl_col() {
    uint lane = emu_lane();
    return ushort(((lane >> 1) & 4) + (lane & 1) * 2);
  }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <typename T, int Cols, int Rows>
METAL_FUNC simdgroup_matrix<T, Cols, Rows> make_filled_simdgroup_matrix(T x) {
  simdgroup_matrix<T, Cols, Rows> m;
  m.elements = vec<T, 2>(x);
  return m;
}
template <typename T, int Cols, int Rows>
METAL_FUNC simdgroup_matrix<T, Cols, Rows> make_diagonal_simdgroup_matrix(T x) {
  return simdgroup_matrix<T, Cols, Rows>(x);
}

#define MSL_MATRIX_MEMORY(space)                                                                \
  template <typename T, int Cols, int Rows>                                                     \
  METAL_FUNC void simdgroup_load(                                                               \
      thread simdgroup_matrix<T, Cols, Rows>& m, const space T* from, ulong elements_per_row = 8, \
      ulong2 origin = ulong2(0), bool transpose = false) {                                      \
    emu_simdgroup_barrier(16, 0);                                                               \
    ulong row = m.msl_row(), col = m.msl_col();                                                 \
    from += origin.y * elements_per_row + origin.x;                                             \
    m.elements.x = from[transpose ? col * elements_per_row + row : row * elements_per_row + col]; \
    col += 1;                                                                                   \
    m.elements.y = from[transpose ? col * elements_per_row + row : row * elements_per_row + col]; \
  }                                                                                             \
  template <typename T, int Cols, int Rows>                                                     \
  METAL_FUNC void simdgroup_store(                                                              \
      thread simdgroup_matrix<T, Cols, Rows>& m, space T* to, ulong elements_per_row = 8,       \
      ulong2 origin = ulong2(0), bool transpose = false) {                                      \
    emu_simdgroup_barrier(17, 0);                                                               \
    ulong row = m.msl_row(), col = m.msl_col();                                                 \
    to += origin.y * elements_per_row + origin.x;                                               \
    to[transpose ? col * elements_per_row + row : row * elements_per_row + col] = T(m.elements.x); \
    col += 1;                                                                                   \
    to[transpose ? col * elements_per_row + row : row * elements_per_row + col] = T(m.elements.y); \
  }
MSL_MATRIX_MEMORY(device)
MSL_MATRIX_MEMORY(threadgroup)

template <typename T>
METAL_FUNC ulong msl_float_pair(vec<T, 2> x) {
  return as_type<ulong>(float2(x));
}
// The eight products are added in float, in order, each with one rounding; the result is then
// rounded to the accumulator's type. What the hardware does inside is not documented.
template <typename D, typename A, typename B, typename C>
METAL_FUNC void simdgroup_multiply_accumulate(
    thread simdgroup_matrix<D, 8, 8>& d, thread simdgroup_matrix<A, 8, 8>& a,
    thread simdgroup_matrix<B, 8, 8>& b, thread simdgroup_matrix<C, 8, 8>& c) {
  ulong r = emu_matrix_multiply(msl_float_pair(a.elements), msl_float_pair(b.elements),
                                msl_float_pair(c.elements), 0);
  d.elements = vec<D, 2>(as_type<float2>(r));
}
template <typename D, typename A, typename B>
METAL_FUNC void simdgroup_multiply(
    thread simdgroup_matrix<D, 8, 8>& d, thread simdgroup_matrix<A, 8, 8>& a,
    thread simdgroup_matrix<B, 8, 8>& b) {
  simdgroup_matrix<D, 8, 8> zero = make_filled_simdgroup_matrix<D, 8, 8>(D(0));
  simdgroup_multiply_accumulate(d, a, b, zero);
}

}  // namespace metal
