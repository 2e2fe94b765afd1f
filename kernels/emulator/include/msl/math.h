// Metal's mathematical functions. They exist for float, half and their vectors (a bfloat converts
// to float), and the integer ones for the integer types: as overloads, not as one template, so
// that a call whose arguments differ is as ambiguous here as it is in Metal.
#pragma once

// Functions without a clang builtin; the emulator's runtime and the C library define them.
#define MSL_PURE __attribute__((const))
extern "C" {
MSL_PURE float msl_rsqrt(float x) __asm__("emu_rsqrt");
MSL_PURE float msl_asinh(float x) __asm__("asinhf");
MSL_PURE float msl_acosh(float x) __asm__("acoshf");
MSL_PURE float msl_atanh(float x) __asm__("atanhf");
MSL_PURE float msl_sinpi(float x) __asm__("emu_sinpi");
MSL_PURE float msl_cospi(float x) __asm__("emu_cospi");
MSL_PURE float msl_fmod(float x, float y) __asm__("fmodf");
MSL_PURE float msl_atan2(float x, float y) __asm__("atan2f");
MSL_PURE float msl_exp10(float x) __asm__("emu_exp10");
MSL_PURE float msl_nextafter(float x, float y) __asm__("nextafterf");
MSL_PURE float msl_ldexp(float x, int k) __asm__("ldexpf");
MSL_PURE int msl_exponent(float x) __asm__("emu_exponent");
MSL_PURE float msl_tanpi(float x) __asm__("emu_tanpi");
}

// The smaller and the larger; where one is NaN, the other.
METAL_FUNC float msl_least(float x, float y) { return __builtin_fminf(x, y); }
METAL_FUNC float msl_most(float x, float y) { return __builtin_fmaxf(x, y); }
METAL_FUNC half msl_least(half x, half y) { return half(__builtin_fminf16(x, y)); }
METAL_FUNC half msl_most(half x, half y) { return half(__builtin_fmaxf16(x, y)); }

namespace metal {

#define MSL_VEC1(T, name)                                               \
  METAL_FUNC vec<T, 2> name(vec<T, 2> x) {                              \
    return vec<T, 2>(T(name(x.x)), T(name(x.y)));                       \
  }                                                                     \
  METAL_FUNC vec<T, 3> name(vec<T, 3> x) {                              \
    return vec<T, 3>(T(name(x.x)), T(name(x.y)), T(name(x.z)));         \
  }                                                                     \
  METAL_FUNC vec<T, 4> name(vec<T, 4> x) {                              \
    return vec<T, 4>(T(name(x.x)), T(name(x.y)), T(name(x.z)), T(name(x.w))); \
  }
#define MSL_VECN2(T, N, name)                                           \
  METAL_FUNC vec<T, N> name(vec<T, N> x, vec<T, N> y) {                 \
    vec<T, N> r;                                                        \
    _Pragma("clang loop unroll(full)") for (int i = 0; i < N; i++) {    \
      r.v[i] = name(T(x.v[i]), T(y.v[i]));                              \
    }                                                                   \
    return r;                                                           \
  }
#define MSL_VECN3(T, N, name)                                           \
  METAL_FUNC vec<T, N> name(vec<T, N> x, vec<T, N> y, vec<T, N> z) {    \
    vec<T, N> r;                                                        \
    _Pragma("clang loop unroll(full)") for (int i = 0; i < N; i++) {    \
      r.v[i] = name(T(x.v[i]), T(y.v[i]), T(z.v[i]));                   \
    }                                                                   \
    return r;                                                           \
  }
#define MSL_VEC2(T, name) MSL_VECN2(T, 2, name) MSL_VECN2(T, 3, name) MSL_VECN2(T, 4, name)
#define MSL_VEC3(T, name) MSL_VECN3(T, 2, name) MSL_VECN3(T, 3, name) MSL_VECN3(T, 4, name)

// One argument: the float form is the expression; half rounds its result once.
#define MSL_FLOAT1(name, expression)                                    \
  METAL_FUNC float name(float x) { return expression; }                 \
  METAL_FUNC half name(half h) {                                        \
    float x = h;                                                        \
    return half(expression);                                            \
  }                                                                     \
  MSL_VEC1(float, name)                                                 \
  MSL_VEC1(half, name)
// One argument, the same builtin for both types.
#define MSL_BUILTIN1(name, builtin)                                     \
  METAL_FUNC float name(float x) { return builtin(x); }                 \
  METAL_FUNC half name(half x) { return builtin(x); }                   \
  MSL_VEC1(float, name)                                                 \
  MSL_VEC1(half, name)
#define MSL_FLOAT2(name, expression)                                    \
  METAL_FUNC float name(float x, float y) { return expression; }        \
  METAL_FUNC half name(half a, half b) {                                \
    float x = a, y = b;                                                 \
    return half(expression);                                            \
  }                                                                     \
  MSL_VEC2(float, name)                                                 \
  MSL_VEC2(half, name)
#define MSL_BUILTIN2(name, builtin)                                     \
  METAL_FUNC float name(float x, float y) { return builtin(x, y); }     \
  METAL_FUNC half name(half x, half y) { return builtin(x, y); }        \
  MSL_VEC2(float, name)                                                 \
  MSL_VEC2(half, name)

MSL_BUILTIN1(fabs, __builtin_elementwise_abs)
MSL_BUILTIN1(ceil, __builtin_elementwise_ceil)
MSL_BUILTIN1(floor, __builtin_elementwise_floor)
MSL_BUILTIN1(rint, __builtin_elementwise_rint)
MSL_BUILTIN1(round, __builtin_elementwise_round)
MSL_BUILTIN1(trunc, __builtin_elementwise_trunc)
MSL_BUILTIN1(sqrt, __builtin_elementwise_sqrt)
MSL_BUILTIN1(exp, __builtin_elementwise_exp)
MSL_BUILTIN1(exp2, __builtin_elementwise_exp2)
MSL_FLOAT1(exp10, msl_exp10(x))
MSL_BUILTIN1(log, __builtin_elementwise_log)
MSL_BUILTIN1(log2, __builtin_elementwise_log2)
MSL_BUILTIN1(log10, __builtin_elementwise_log10)
MSL_BUILTIN1(sin, __builtin_elementwise_sin)
MSL_BUILTIN1(cos, __builtin_elementwise_cos)
MSL_BUILTIN1(tan, __builtin_elementwise_tan)
MSL_BUILTIN1(asin, __builtin_elementwise_asin)
MSL_BUILTIN1(acos, __builtin_elementwise_acos)
MSL_BUILTIN1(atan, __builtin_elementwise_atan)
MSL_BUILTIN1(sinh, __builtin_elementwise_sinh)
MSL_BUILTIN1(cosh, __builtin_elementwise_cosh)
MSL_BUILTIN1(tanh, __builtin_elementwise_tanh)
MSL_FLOAT1(asinh, msl_asinh(x))
MSL_FLOAT1(acosh, msl_acosh(x))
MSL_FLOAT1(atanh, msl_atanh(x))
MSL_FLOAT1(sinpi, msl_sinpi(x))
MSL_FLOAT1(cospi, msl_cospi(x))
MSL_FLOAT1(tanpi, msl_tanpi(x))
MSL_FLOAT1(rsqrt, msl_rsqrt(x))
MSL_FLOAT1(fract, msl_least(x - __builtin_elementwise_floor(x), 0.99999994f))
MSL_FLOAT1(sign, x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x == 0.0f ? x : 0.0f)
MSL_FLOAT1(saturate, msl_least(msl_most(x, 0.0f), 1.0f))

MSL_BUILTIN2(fmax, msl_most)
MSL_BUILTIN2(fmin, msl_least)
MSL_BUILTIN2(copysign, __builtin_elementwise_copysign)
MSL_BUILTIN2(pow, __builtin_elementwise_pow)
MSL_BUILTIN2(powr, __builtin_elementwise_pow)
MSL_FLOAT2(atan2, msl_atan2(x, y))
MSL_FLOAT2(fmod, msl_fmod(x, y))
MSL_FLOAT2(fdim, x > y ? x - y : x <= y ? 0.0f : __builtin_nanf(""))
MSL_FLOAT2(divide, x / y)
MSL_FLOAT2(step, y < x ? 0.0f : 1.0f)
METAL_FUNC float nextafter(float x, float y) { return msl_nextafter(x, y); }

METAL_FUNC float fma(float x, float y, float z) { return __builtin_elementwise_fma(x, y, z); }
METAL_FUNC half fma(half x, half y, half z) { return __builtin_elementwise_fma(x, y, z); }
MSL_VEC3(float, fma)
MSL_VEC3(half, fma)
#define MSL_FLOAT3(name, expression)                                                \
  METAL_FUNC float name(float x, float y, float z) { return expression; }           \
  METAL_FUNC half name(half x, half y, half z) { return half(expression); }         \
  MSL_VEC3(float, name)                                                             \
  MSL_VEC3(half, name)
METAL_FUNC float msl_smooth(float t) { return t * t * (3.0f - 2.0f * t); }
MSL_FLOAT3(mix, x + (y - x) * z)
MSL_FLOAT3(smoothstep, msl_smooth(saturate((z - x) / (y - x))))
MSL_FLOAT3(fmax3, fmax(fmax(x, y), z))
MSL_FLOAT3(fmin3, fmin(fmin(x, y), z))
MSL_FLOAT3(fmedian3, fmax(fmin(x, y), fmin(fmax(x, y), z)))

METAL_FUNC float ldexp(float x, int k) { return msl_ldexp(x, k); }
METAL_FUNC half ldexp(half x, int k) { return half(msl_ldexp(x, k)); }
METAL_FUNC float frexp(float x, thread int& e) {
  e = msl_exponent(x);
  return msl_ldexp(x, -e);
}
METAL_FUNC half frexp(half x, thread int& e) { return half(frexp(float(x), e)); }
METAL_FUNC float modf(float x, thread float& whole) {
  whole = trunc(x);
  return copysign(x - whole, x);
}
METAL_FUNC float sincos(float x, thread float& c) {
  c = cos(x);
  return sin(x);
}

METAL_FUNC bool isnan(float x) { return x != x; }
METAL_FUNC bool isnan(half x) { return x != x; }
METAL_FUNC bool isinf(float x) { return fabs(x) == INFINITY; }
METAL_FUNC bool isinf(half x) { return fabs(x) == half(INFINITY); }
METAL_FUNC bool isfinite(float x) { return fabs(x) < INFINITY; }
METAL_FUNC bool isfinite(half x) { return fabs(x) < half(INFINITY); }
METAL_FUNC bool isnormal(float x) { return fabs(x) >= FLT_MIN && fabs(x) < INFINITY; }
METAL_FUNC bool signbit(float x) { return as_type<int>(x) < 0; }
METAL_FUNC bool signbit(half x) { return as_type<short>(x) < 0; }

// Functions for both floats and integers: abs, min, max, clamp, min3, max3, median3.
#define MSL_ORDERED(T, ABS, MIN, MAX)                                                       \
  METAL_FUNC T abs(T x) { return ABS(x); }                                                  \
  METAL_FUNC T min(T x, T y) { return MIN(x, y); }                                          \
  METAL_FUNC T max(T x, T y) { return MAX(x, y); }                                          \
  METAL_FUNC T clamp(T x, T low, T high) { return MIN(MAX(x, low), high); }                 \
  METAL_FUNC T min3(T x, T y, T z) { return MIN(MIN(x, y), z); }                            \
  METAL_FUNC T max3(T x, T y, T z) { return MAX(MAX(x, y), z); }                            \
  METAL_FUNC T median3(T x, T y, T z) { return MAX(MIN(x, y), MIN(MAX(x, y), z)); }         \
  MSL_VEC1(T, abs)                                                                          \
  MSL_VEC2(T, min)                                                                          \
  MSL_VEC2(T, max)                                                                          \
  MSL_VEC3(T, clamp)
#define MSL_SAME(x) x
#define MSL_ORDERED_INT(T) \
  MSL_ORDERED(T, __builtin_elementwise_abs, __builtin_elementwise_min, __builtin_elementwise_max)
#define MSL_ORDERED_UINT(T) \
  MSL_ORDERED(T, MSL_SAME, __builtin_elementwise_min, __builtin_elementwise_max)
MSL_ORDERED(float, __builtin_elementwise_abs, msl_least, msl_most)
MSL_ORDERED(half, __builtin_elementwise_abs, msl_least, msl_most)
MSL_ORDERED_INT(char)
MSL_ORDERED_INT(short)
MSL_ORDERED_INT(int)
MSL_ORDERED_INT(long)
MSL_ORDERED_UINT(uchar)
MSL_ORDERED_UINT(ushort)
MSL_ORDERED_UINT(uint)
MSL_ORDERED_UINT(ulong)

#define MSL_BITWISE(T, wide)                                                                 \
  METAL_FUNC T popcount(T x) { return T(__builtin_elementwise_popcount(x)); }                \
  METAL_FUNC T clz(T x) { return T(__builtin_clzg((__make_unsigned(T))x, int(sizeof(T) * 8))); }       \
  METAL_FUNC T ctz(T x) { return T(__builtin_ctzg((__make_unsigned(T))x, int(sizeof(T) * 8))); }       \
  METAL_FUNC T reverse_bits(T x) { return T(__builtin_elementwise_bitreverse(x)); }          \
  METAL_FUNC T addsat(T x, T y) { return __builtin_elementwise_add_sat(x, y); }              \
  METAL_FUNC T subsat(T x, T y) { return __builtin_elementwise_sub_sat(x, y); }              \
  METAL_FUNC T absdiff(T x, T y) { return x > y ? T(x - y) : T(y - x); }                     \
  METAL_FUNC T mulhi(T x, T y) { return T((wide(x) * wide(y)) >> (sizeof(T) * 8)); }         \
  METAL_FUNC T madhi(T x, T y, T z) { return T(mulhi(x, y) + z); }                           \
  METAL_FUNC T hadd(T x, T y) { return T((wide(x) + wide(y)) >> 1); }                        \
  METAL_FUNC T rhadd(T x, T y) { return T((wide(x) + wide(y) + 1) >> 1); }                   \
  METAL_FUNC T rotate(T x, T n) {                                                            \
    typedef __make_unsigned(T) U;                                                            \
    constexpr uint bits = sizeof(T) * 8;                                                     \
    uint k = uint(n) % bits;                                                                 \
    return T(U(U(x) << k) | U(U(x) >> ((bits - k) % bits)));                                 \
  }                                                                                          \
  METAL_FUNC T extract_bits(T x, uint offset, uint bits) {                                   \
    return bits == 0 ? T(0) : T(T(x << (sizeof(T) * 8 - bits - offset)) >> (sizeof(T) * 8 - bits)); \
  }                                                                                          \
  METAL_FUNC T insert_bits(T base, T bits, uint offset, uint n) {                            \
    T mask = n >= sizeof(T) * 8 ? T(~T(0)) : T(((T(1) << n) - 1) << offset);                 \
    return T((base & ~mask) | (T(bits << offset) & mask));                                   \
  }
MSL_BITWISE(char, int)
MSL_BITWISE(uchar, uint)
MSL_BITWISE(short, int)
MSL_BITWISE(ushort, uint)
MSL_BITWISE(int, long)
MSL_BITWISE(uint, ulong)
typedef __int128 msl_int128;
typedef unsigned __int128 msl_uint128;
MSL_BITWISE(long, msl_int128)
MSL_BITWISE(ulong, msl_uint128)

template <typename T>
METAL_FUNC T select(T no, T yes, bool choose) {
  return choose ? yes : no;
}
template <typename T, int N>
METAL_FUNC vec<T, N> select(vec<T, N> no, vec<T, N> yes, vec<bool, N> choose) {
  vec<T, N> r;
  _Pragma("clang loop unroll(full)") for (int i = 0; i < N; i++) {
    r.v[i] = choose.v[i] ? yes.v[i] : no.v[i];
  }
  return r;
}
template <int N>
METAL_FUNC bool any(vec<bool, N> x) {
  bool r = false;
  _Pragma("clang loop unroll(full)") for (int i = 0; i < N; i++) { r = r || x.v[i]; }
  return r;
}
template <int N>
METAL_FUNC bool all(vec<bool, N> x) {
  bool r = true;
  _Pragma("clang loop unroll(full)") for (int i = 0; i < N; i++) { r = r && x.v[i]; }
  return r;
}
template <typename T, int N>
METAL_FUNC T dot(vec<T, N> x, vec<T, N> y) {
  T r = T(x.v[0]) * T(y.v[0]);
  _Pragma("clang loop unroll(full)") for (int i = 1; i < N; i++) { r = r + T(x.v[i]) * T(y.v[i]); }
  return r;
}
template <typename T, int N>
METAL_FUNC T length_squared(vec<T, N> x) {
  return dot(x, x);
}
template <typename T, int N>
METAL_FUNC T length(vec<T, N> x) {
  return sqrt(dot(x, x));
}
template <typename T, int N>
METAL_FUNC T distance(vec<T, N> x, vec<T, N> y) {
  return length(x - y);
}
template <typename T, int N>
METAL_FUNC vec<T, N> normalize(vec<T, N> x) {
  return x * rsqrt(dot(x, x));
}
template <typename T>
METAL_FUNC vec<T, 3> cross(vec<T, 3> a, vec<T, 3> b) {
  return vec<T, 3>(a.y * b.z - a.z * b.y, a.z * b.x - a.x * b.z, a.x * b.y - a.y * b.x);
}

// The fast and the precise functions compute the same here.
#define MSL_BOTH_MODES(M)                                                                     \
  M(fabs) M(abs) M(ceil) M(floor) M(rint) M(round) M(trunc) M(sqrt) M(exp) M(exp2) M(exp10)   \
  M(log) M(log2) M(log10) M(sin) M(cos) M(tan) M(asin) M(acos) M(atan) M(sinh) M(cosh)        \
  M(tanh) M(asinh) M(acosh) M(atanh) M(sinpi) M(cospi) M(tanpi) M(rsqrt) M(fract) M(sign)     \
  M(saturate) M(fmax) M(fmin) M(copysign) M(pow) M(powr) M(atan2) M(fmod) M(fdim) M(divide)   \
  M(step) M(fma) M(mix) M(smoothstep) M(fmax3) M(fmin3) M(fmedian3) M(ldexp) M(frexp)         \
  M(modf) M(sincos) M(isnan) M(isinf) M(isfinite) M(min) M(max) M(clamp) M(min3) M(max3)      \
  M(median3) M(dot) M(length) M(normalize) M(distance)
#define MSL_USING(name) using metal::name;
namespace fast {
MSL_BOTH_MODES(MSL_USING)
}
namespace precise {
MSL_BOTH_MODES(MSL_USING)
}

}  // namespace metal
