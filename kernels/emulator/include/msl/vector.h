// vec<T, N> and packed<T, N>. Included by types.h.
//
// Components are properties, read out of the whole vector: so a load of a vector stays one, and a
// component has no address, as in Metal. The emulator defines MSL_SWIZZLES_N, the names like .xy
// that a kernel uses, from the kernel's text: all 340 would cost a second of every compilation.
#pragma once

#ifndef MSL_SWIZZLES_4
#define MSL_SWIZZLES_2
#define MSL_SWIZZLES_3
#define MSL_SWIZZLES_4
#endif

template <typename T, int N>
struct packed;

struct msl_raw_tag {};

template <typename T, int N>
struct vec_memory {
  typedef msl_raw<T, N> raw;
  typedef typename msl_lane<T>::type lane;
  union {
    raw v;
    lane s[N];
  };
  vec_memory() = default;
  constexpr vec_memory(raw x) : v(x) {}
};

#define MSL_COMPONENT(i, name)                                             \
  T get_##name() const { return T(this->v[i]); }                           \
  T get_##name() const constant { return T(this->v[i]); }                  \
  void put_##name(T x) { this->s[i] = typename msl_lane<T>::type(x); }     \
  __declspec(property(get = get_##name, put = put_##name)) T name;
#define MSL_SWIZZLE(n, name, ...)                                          \
  vec<T, n> get_##name() const {                                           \
    return vec<T, n>(msl_raw_tag(), __builtin_shufflevector(this->v, this->v, __VA_ARGS__)); \
  }                                                                        \
  vec<T, n> get_##name() const constant {                                  \
    return vec<T, n>(msl_raw_tag(), __builtin_shufflevector(this->v, this->v, __VA_ARGS__)); \
  }                                                                        \
  void put_##name(vec<T, n> x) {                                           \
    constexpr int to[n] = {__VA_ARGS__};                                   \
    for (int i = 0; i < n; i++) {                                          \
      this->s[to[i]] = x.v[i];                                             \
    }                                                                      \
  }                                                                        \
  __declspec(property(get = get_##name, put = put_##name)) vec<T, n> name;

template <typename T, int N>
struct msl_store;
template <typename T>
struct msl_store<T, 2> : vec_memory<T, 2> {
  using vec_memory<T, 2>::vec_memory;
  MSL_COMPONENT(0, x) MSL_COMPONENT(1, y) MSL_COMPONENT(0, r) MSL_COMPONENT(1, g)
  MSL_SWIZZLES_2
};
template <typename T>
struct msl_store<T, 3> : vec_memory<T, 3> {
  using vec_memory<T, 3>::vec_memory;
  MSL_COMPONENT(0, x) MSL_COMPONENT(1, y) MSL_COMPONENT(2, z)
  MSL_COMPONENT(0, r) MSL_COMPONENT(1, g) MSL_COMPONENT(2, b)
  MSL_SWIZZLES_3
};
template <typename T>
struct msl_store<T, 4> : vec_memory<T, 4> {
  using vec_memory<T, 4>::vec_memory;
  MSL_COMPONENT(0, x) MSL_COMPONENT(1, y) MSL_COMPONENT(2, z) MSL_COMPONENT(3, w)
  MSL_COMPONENT(0, r) MSL_COMPONENT(1, g) MSL_COMPONENT(2, b) MSL_COMPONENT(3, a)
  MSL_SWIZZLES_4
};

template <typename T, int N>
struct vec : msl_store<T, N> {
  typedef msl_raw<T, N> raw;
  typedef msl_store<T, N> store;
  typedef typename msl_lane<T>::type lane;

  vec() = default;
  constexpr vec(msl_raw_tag, raw x) : store(x) {}
  constexpr vec(const vec& o) : store(o.v) {}
  constexpr vec(const constant vec& o) : store(o.v) {}
  constexpr vec(T x) : store(raw(lane(x))) {}
  template <typename U>
  explicit vec(const vec<U, N>& o) : store(convert(o.v)) {}
  template <typename U>
  explicit vec(const constant vec<U, N>& o) : store(convert(o.v)) {}
  vec(const packed<T, N>& o) : store(gathered(o)) {}
  template <typename... A, typename = typename msl_if<(sizeof...(A) > 1) && msl_total<A...>::n == N>::type>
  vec(A... a) {
    raw r;
    int at = 0;
    (put(r, at, a), ...);
    this->v = r;
  }
  vec& operator=(const vec& o) {
    this->v = o.v;
    return *this;
  }
  vec& operator=(const constant vec& o) {
    this->v = o.v;
    return *this;
  }
  lane& operator[](int i) { return this->s[i]; }
  T operator[](int i) const { return T(this->v[i]); }

  template <typename U>
  static raw convert(U o) {
    return __builtin_convertvector(o, raw);
  }

 private:
  template <typename P>
  static raw gathered(const P& from) {
    raw r;
    for (int i = 0; i < N; i++) {
      r[i] = from[i];
    }
    return r;
  }
  template <typename U>
  static void put(thread raw& r, thread int& at, U x) {
    r[at++] = lane(T(x));
  }
  template <typename U, int M>
  static void put(thread raw& r, thread int& at, vec<U, M> x) {
    for (int i = 0; i < M; i++) {
      r[at++] = lane(T(x.v[i]));
    }
  }

#define MSL_ARITHMETIC(op)                                                                      \
 public:                                                                                        \
  friend METAL_FUNC vec operator op(vec a, vec b) { return vec(msl_raw_tag(), a.v op b.v); }    \
  vec& operator op##=(vec b) { return *this = *this op b; }
  MSL_ARITHMETIC(+)
  MSL_ARITHMETIC(-)
  MSL_ARITHMETIC(*)
  MSL_ARITHMETIC(/)
  MSL_ARITHMETIC(%)
  MSL_ARITHMETIC(&)
  MSL_ARITHMETIC(|)
  MSL_ARITHMETIC(^)
  MSL_ARITHMETIC(<<)
  MSL_ARITHMETIC(>>)
#undef MSL_ARITHMETIC
#define MSL_COMPARE(op)                                                                         \
  friend METAL_FUNC vec<bool, N> operator op(vec a, vec b) {                                    \
    return vec<bool, N>(msl_raw_tag(), vec<bool, N>::convert(a.v op b.v) & char(1));            \
  }
  MSL_COMPARE(==)
  MSL_COMPARE(!=)
  MSL_COMPARE(<)
  MSL_COMPARE(<=)
  MSL_COMPARE(>)
  MSL_COMPARE(>=)
#undef MSL_COMPARE
  friend METAL_FUNC vec<bool, N> operator&&(vec a, vec b) { return (a != vec(T(0))) & (b != vec(T(0))); }
  friend METAL_FUNC vec<bool, N> operator||(vec a, vec b) { return (a != vec(T(0))) | (b != vec(T(0))); }
  friend METAL_FUNC vec<bool, N> operator!(vec a) { return a == vec(T(0)); }
  friend METAL_FUNC vec operator-(vec a) { return vec(msl_raw_tag(), -a.v); }
  friend METAL_FUNC vec operator+(vec a) { return a; }
  friend METAL_FUNC vec operator~(vec a) { return vec(msl_raw_tag(), ~a.v); }
  vec& operator++() { return *this += vec(T(1)); }
  vec& operator--() { return *this -= vec(T(1)); }
};

// The same components without padding: aligned as one component.
template <typename T, int N>
struct packed {
  T s[N];
  packed() = default;
  packed(const vec<T, N>& o) { copy(o); }
  packed(T x) { copy(vec<T, N>(x)); }
  template <typename... A, typename = typename msl_if<(sizeof...(A) > 1) && msl_total<A...>::n == N>::type>
  packed(A... a) {
    copy(vec<T, N>(a...));
  }
  T& operator[](int i) { return s[i]; }
  const T& operator[](int i) const { return s[i]; }
  packed& operator+=(vec<T, N> o) { return *this = packed(vec<T, N>(*this) + o); }
  packed& operator*=(vec<T, N> o) { return *this = packed(vec<T, N>(*this) * o); }

 private:
  void copy(vec<T, N> o) {
    for (int i = 0; i < N; i++) {
      s[i] = T(o.v[i]);
    }
  }
};
