// v.xy, v.wzyx, v.rgb and so on: views of a vector's components. Included by types.h.
#pragma once

constexpr int msl_last(int i) { return i; }
template <typename... A>
constexpr int msl_last(int i, A... rest) {
  return i > msl_last(rest...) ? i : msl_last(rest...);
}

template <typename T, int... I>
struct msl_swizzle {
  static constexpr constant int n = sizeof...(I);
  typename msl_lane<T>::type s[msl_last(I...) + 1];
  vec<T, n> get() const { return vec<T, n>(T(s[I])...); }
  operator vec<T, n>() const { return get(); }
  void operator=(vec<T, n> o) { set(o); }
  void operator=(const msl_swizzle& o) { set(vec<T, n>(o)); }
  void operator+=(vec<T, n> o) { set(vec<T, n>(*this) + o); }
  void operator-=(vec<T, n> o) { set(vec<T, n>(*this) - o); }
  void operator*=(vec<T, n> o) { set(vec<T, n>(*this) * o); }
  void operator/=(vec<T, n> o) { set(vec<T, n>(*this) / o); }
  void set(vec<T, n> o) {
    int from = 0;
    ((s[I] = o.s[from++]), ...);
  }
};

#define MSL_SWIZZLE_OPERATOR(op)                                                       \
  template <typename T, int... I, typename B>                                          \
  METAL_FUNC auto operator op(const msl_swizzle<T, I...>& a, B b) {                    \
    return vec<T, sizeof...(I)>(a) op vec<T, sizeof...(I)>(b);                         \
  }                                                                                    \
  template <typename T, int N, int... I>                                               \
  METAL_FUNC auto operator op(vec<T, N> a, const msl_swizzle<T, I...>& b) {            \
    return a op vec<T, sizeof...(I)>(b);                                               \
  }                                                                                    \
  template <typename S, typename T, int... I, typename = decltype(T(S()))>             \
  METAL_FUNC auto operator op(S a, const msl_swizzle<T, I...>& b) {                    \
    return vec<T, sizeof...(I)>(T(a)) op vec<T, sizeof...(I)>(b);                      \
  }

// The names that a kernel uses are members MSL_SWIZZLES_N of a vector of N: the emulator defines
// these macros from the kernel's text, since all 340 names cost a second of every compilation.
#define MSL_SWIZZLE(T, name, ...) msl_swizzle<T, __VA_ARGS__> name;
#ifndef MSL_SWIZZLES_4
#define MSL_SWIZZLES_2(T)
#define MSL_SWIZZLES_3(T)
#define MSL_SWIZZLES_4(T)
#endif
