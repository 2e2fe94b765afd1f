// The scalar and vector types of the Metal Shading Language, for clang's C++ for OpenCL:
// there address spaces are part of the language, as they are in Metal.
#pragma once

#pragma OPENCL EXTENSION cl_khr_fp16 : enable

#define device __global
#define constant __constant
#define threadgroup __local
#define thread __private
// Words that OpenCL reserves and Metal does not.
#define local msl_local
#define global msl_global
#define generic msl_generic
#define read_only msl_read_only
#define write_only msl_write_only
#define read_write msl_read_write
#define atomic_int msl_atomic_int
#define atomic_uint msl_atomic_uint
#define atomic_ulong msl_atomic_ulong
#define atomic_float msl_atomic_float

#define METAL_FUNC inline __attribute__((always_inline))
#define METAL_CONST_ARG(x)
#define __METAL__ 1
#define __METAL_VERSION__ 310
#define __METAL_FAST_MATH__ 0
#define __METAL_PRECISE_MATH__ 1
#define __METAL_MAYBE_FAST_MATH__ 2

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef __bf16 bfloat;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef uchar uint8_t;
typedef ushort uint16_t;
typedef uint uint32_t;
typedef ulong uint64_t;
typedef ulong size_t;
typedef long ptrdiff_t;
typedef ulong uintptr_t;
typedef long intptr_t;

#define NAN __builtin_nanf("")
#define INFINITY __builtin_inff()
#define HUGE_VALF __builtin_inff()
#define MAXFLOAT 3.402823466e+38f
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.192092896e-07f
#define HALF_MAX 65504.0h
#define HALF_MIN 6.103515625e-05h
#define INT_MAX 2147483647
#define INT_MIN (-2147483647 - 1)
#define UINT_MAX 4294967295u
#define CHAR_BIT 8
#define M_PI_F 3.14159265358979323846f
#define M_1_PI_F 0.31830988618379067154f
#define M_2_PI_F 0.63661977236758134308f
#define M_PI_2_F 1.57079632679489661923f
#define M_E_F 2.71828182845904523536f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LOG10E_F 0.43429448190325182765f
#define M_LN2_F 0.69314718055994530942f
#define M_LN10_F 2.30258509299404568402f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.70710678118654752440f
#define M_2_SQRTPI_F 1.12837916709551257390f

// How a vector's components lie in a register; a bool is a byte there.
template <typename T>
struct msl_lane {
  typedef T type;
};
template <>
struct msl_lane<bool> {
  typedef char type;
};
template <typename T, int N>
using msl_raw = typename msl_lane<T>::type __attribute__((ext_vector_type(N)));

template <typename T, int N>
struct vec;

template <typename T>
struct msl_width {
  static constexpr constant int n = 1;
};
template <typename T, int N>
struct msl_width<vec<T, N>> {
  static constexpr constant int n = N;
};

template <bool B, typename T = void>
struct msl_if {};
template <typename T>
struct msl_if<true, T> {
  typedef T type;
};

template <typename... A>
struct msl_total;
template <>
struct msl_total<> {
  static constexpr constant int n = 0;
};
template <typename T, typename... A>
struct msl_total<T, A...> {
  static constexpr constant int n = msl_width<T>::n + msl_total<A...>::n;
};

#include "msl/vector.h"

#define MSL_VECTORS(T)          \
  typedef vec<T, 2> T##2;       \
  typedef vec<T, 3> T##3;       \
  typedef vec<T, 4> T##4;       \
  typedef packed<T, 2> packed_##T##2; \
  typedef packed<T, 3> packed_##T##3; \
  typedef packed<T, 4> packed_##T##4;
MSL_VECTORS(char)
MSL_VECTORS(uchar)
MSL_VECTORS(short)
MSL_VECTORS(ushort)
MSL_VECTORS(int)
MSL_VECTORS(uint)
MSL_VECTORS(long)
MSL_VECTORS(ulong)
MSL_VECTORS(half)
MSL_VECTORS(bfloat)
MSL_VECTORS(float)
typedef vec<bool, 2> bool2;
typedef vec<bool, 3> bool3;
typedef vec<bool, 4> bool4;

// The same bits as another type of the same size: a cast between clang's vectors, a scalar being
// a vector of one. (By way of memory, the optimizer would split the load that the bits come from.)
template <typename T>
struct msl_bits {
  typedef msl_raw<T, 1> type;
  static METAL_FUNC type take(T x) { return type(x); }
  static METAL_FUNC T give(type x) { return T(x[0]); }
};
template <typename T, int N>
struct msl_bits<vec<T, N>> {
  typedef msl_raw<T, N> type;
  static METAL_FUNC type take(vec<T, N> x) { return x.v; }
  static METAL_FUNC vec<T, N> give(type x) { return vec<T, N>(msl_raw_tag(), x); }
};
template <typename To, typename From>
METAL_FUNC To as_type(From x) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs two types of the same size");
  typedef typename msl_bits<To>::type bits;
  return msl_bits<To>::give((bits)msl_bits<From>::take(x));
}

namespace metal {
using ::vec;
}  // namespace metal
