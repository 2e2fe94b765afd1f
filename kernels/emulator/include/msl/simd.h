// Operations across the threads of a simdgroup, a quadgroup and a threadgroup. Each is a
// rendezvous: the runtime (emulator/runtime) checks that every thread arrived at the same one.
#pragma once

// The codes are shared with runtime/simd.h and, for prices, with classify.py.
enum msl_simd_op : uint {
  msl_op_sum = 1, msl_op_product, msl_op_min, msl_op_max, msl_op_and, msl_op_or, msl_op_xor,
  msl_op_prefix_inclusive_sum, msl_op_prefix_exclusive_sum,
  msl_op_prefix_inclusive_product, msl_op_prefix_exclusive_product,
  msl_op_shuffle = 16, msl_op_broadcast, msl_op_shuffle_up, msl_op_shuffle_down,
  msl_op_shuffle_xor, msl_op_rotate_up, msl_op_rotate_down, msl_op_fill_up, msl_op_fill_down,
  msl_op_broadcast_first, msl_op_ballot, msl_op_active,
  msl_op_quad = 64,
};
enum msl_simd_type : uint {
  msl_f32, msl_f16, msl_bf16, msl_i8, msl_u8, msl_i16, msl_u16, msl_i32, msl_u32, msl_i64, msl_u64
};

extern "C" {
// The last argument is the place in the kernel; the emulator fills it in.
__attribute__((const)) ulong emu_simd(uint op, uint type, ulong value, ulong argument, uint place);
void emu_simdgroup_barrier(uint kind, uint place);
void emu_threadgroup_barrier(uint flags, uint place);
__attribute__((const)) uint emu_lane();
__attribute__((const)) threadgroup void* emu_threadgroup(uint array, ulong bytes);
}

// The replacement for `threadgroup float buf[64];`: memory of the runtime, of a known size.
#define MSL_ARRAY(number, name, dims, ...)          \
  typedef __VA_ARGS__ msl_array_##name dims;        \
  threadgroup msl_array_##name& name =              \
      *(threadgroup msl_array_##name*)emu_threadgroup(number##u, sizeof(msl_array_##name))

template <typename T>
struct msl_simd_traits {
  static constexpr constant bool ok = false;
};
#define MSL_SIMD_TYPE(T, U, tag)                                         \
  template <>                                                            \
  struct msl_simd_traits<T> {                                            \
    static constexpr constant bool ok = true;                            \
    static constexpr constant uint type = tag;                           \
    static ulong bits(T x) { return __builtin_bit_cast(U, x); }          \
    static T value(ulong x) { return __builtin_bit_cast(T, U(x)); }      \
  };
MSL_SIMD_TYPE(float, uint, msl_f32)
MSL_SIMD_TYPE(half, ushort, msl_f16)
MSL_SIMD_TYPE(char, uchar, msl_i8)
MSL_SIMD_TYPE(int8_t, uchar, msl_i8)
MSL_SIMD_TYPE(uchar, uchar, msl_u8)
MSL_SIMD_TYPE(short, ushort, msl_i16)
MSL_SIMD_TYPE(ushort, ushort, msl_u16)
MSL_SIMD_TYPE(int, uint, msl_i32)
MSL_SIMD_TYPE(uint, uint, msl_u32)

template <uint op, typename T>
METAL_FUNC T msl_across(T x, ulong argument) {
  typedef msl_simd_traits<T> traits;
  return traits::value(emu_simd(op, traits::type, traits::bits(x), argument, 0));
}
template <uint op, typename T, int N>
METAL_FUNC vec<T, N> msl_across(vec<T, N> x, ulong argument) {
  vec<T, N> r;
  _Pragma("clang loop unroll(full)") for (int i = 0; i < N; i++) {
    r.v[i] = msl_across<op>(T(x.v[i]), argument);
  }
  return r;
}
template <uint op, typename T>
METAL_FUNC T msl_across_filled(T x, T fill, ulong argument) {
  typedef msl_simd_traits<T> traits;
  static_assert(sizeof(T) <= 4, "the shuffled and the filling value travel together");
  ulong both = traits::bits(x) | (traits::bits(fill) << 32);
  return traits::value(emu_simd(op, traits::type, both, argument, 0));
}
template <uint op, typename T, int N>
METAL_FUNC vec<T, N> msl_across_filled(vec<T, N> x, vec<T, N> fill, ulong argument) {
  vec<T, N> r;
  _Pragma("clang loop unroll(full)") for (int i = 0; i < N; i++) {
    r.v[i] = msl_across_filled<op>(T(x.v[i]), T(fill.v[i]), argument);
  }
  return r;
}

namespace metal {

enum class mem_flags : uint {
  mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4, mem_threadgroup_imageblock = 8
};
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }

METAL_FUNC void threadgroup_barrier(mem_flags flags) { emu_threadgroup_barrier(uint(flags), 0); }
METAL_FUNC void simdgroup_barrier(mem_flags flags) { emu_simdgroup_barrier(uint(flags), 0); }

template <typename T>
struct msl_component {
  typedef T type;
};
template <typename T, int N>
struct msl_component<vec<T, N>> {
  typedef T type;
};
template <typename T>
using msl_simd_only = enable_if_t<msl_simd_traits<typename msl_component<T>::type>::ok>;

#define MSL_ACROSS0(name, op)                                   \
  template <typename T, typename = msl_simd_only<T>>            \
  METAL_FUNC T simd_##name(T x) {                               \
    return msl_across<op>(x, 0);                                \
  }                                                             \
  template <typename T, typename = msl_simd_only<T>>            \
  METAL_FUNC T quad_##name(T x) {                               \
    return msl_across<op + msl_op_quad>(x, 0);                  \
  }
MSL_ACROSS0(sum, msl_op_sum)
MSL_ACROSS0(product, msl_op_product)
MSL_ACROSS0(min, msl_op_min)
MSL_ACROSS0(max, msl_op_max)
MSL_ACROSS0(and, msl_op_and)
MSL_ACROSS0(or, msl_op_or)
MSL_ACROSS0(xor, msl_op_xor)
MSL_ACROSS0(prefix_inclusive_sum, msl_op_prefix_inclusive_sum)
MSL_ACROSS0(prefix_exclusive_sum, msl_op_prefix_exclusive_sum)
MSL_ACROSS0(prefix_inclusive_product, msl_op_prefix_inclusive_product)
MSL_ACROSS0(prefix_exclusive_product, msl_op_prefix_exclusive_product)
MSL_ACROSS0(broadcast_first, msl_op_broadcast_first)

#define MSL_ACROSS1(name, op)                                   \
  template <typename T, typename = msl_simd_only<T>>            \
  METAL_FUNC T simd_##name(T x, ushort n) {                     \
    return msl_across<op>(x, n);                                \
  }                                                             \
  template <typename T, typename = msl_simd_only<T>>            \
  METAL_FUNC T quad_##name(T x, ushort n) {                     \
    return msl_across<op + msl_op_quad>(x, n);                  \
  }
MSL_ACROSS1(shuffle, msl_op_shuffle)
MSL_ACROSS1(broadcast, msl_op_broadcast)
MSL_ACROSS1(shuffle_up, msl_op_shuffle_up)
MSL_ACROSS1(shuffle_down, msl_op_shuffle_down)
MSL_ACROSS1(shuffle_xor, msl_op_shuffle_xor)
MSL_ACROSS1(shuffle_rotate_up, msl_op_rotate_up)
MSL_ACROSS1(shuffle_rotate_down, msl_op_rotate_down)

#define MSL_ACROSS_FILL(name, op)                                                  \
  template <typename T, typename = msl_simd_only<T>>                               \
  METAL_FUNC T simd_##name(T x, T fill, ushort n, ushort modulo = 32) {            \
    return msl_across_filled<op>(x, fill, ulong(n) | (ulong(modulo) << 16));       \
  }                                                                                \
  template <typename T, typename = msl_simd_only<T>>                               \
  METAL_FUNC T quad_##name(T x, T fill, ushort n, ushort modulo = 4) {             \
    return msl_across_filled<op + msl_op_quad>(x, fill, ulong(n) | (ulong(modulo) << 16)); \
  }
MSL_ACROSS_FILL(shuffle_and_fill_up, msl_op_fill_up)
MSL_ACROSS_FILL(shuffle_and_fill_down, msl_op_fill_down)

struct simd_vote {
  typedef ulong vote_t;
  ulong mask;
  explicit constexpr simd_vote(ulong m = 0) : mask(m) {}
  explicit constexpr operator ulong() const { return mask; }
  bool all() const { return (mask & 0xFFFFFFFF) == 0xFFFFFFFF; }
  bool any() const { return mask != 0; }
};
METAL_FUNC simd_vote simd_ballot(bool x) { return simd_vote(emu_simd(msl_op_ballot, msl_u32, x, 0, 0)); }
METAL_FUNC simd_vote simd_active_threads_mask() { return simd_vote(emu_simd(msl_op_active, msl_u32, 0, 0, 0)); }
METAL_FUNC bool simd_all(bool x) { return emu_simd(msl_op_and, msl_u32, x, 0, 0) != 0; }
METAL_FUNC bool simd_any(bool x) { return emu_simd(msl_op_or, msl_u32, x, 0, 0) != 0; }
METAL_FUNC bool quad_all(bool x) { return emu_simd(msl_op_and + msl_op_quad, msl_u32, x, 0, 0) != 0; }
METAL_FUNC bool quad_any(bool x) { return emu_simd(msl_op_or + msl_op_quad, msl_u32, x, 0, 0) != 0; }
METAL_FUNC bool simd_is_first() { return simd_broadcast_first(emu_lane()) == emu_lane(); }

}  // namespace metal
