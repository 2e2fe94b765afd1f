// vec<T, N> and packed<T, N>. Included by types.h.
#pragma once

template <typename T, int N>
struct msl_store;
template <typename T>
struct msl_store<T, 2> {
  typedef typename msl_lane<T>::type lane;
  union {
    msl_raw<T, 2> v;
    lane s[2];
    struct {
      lane x, y;
    };
    struct {
      lane r, g;
    };
    MSL_SWIZZLES_2(T)
  };
  msl_store() = default;
  constexpr msl_store(msl_raw<T, 2> raw) : v(raw) {}
};
template <typename T>
struct msl_store<T, 3> {
  typedef typename msl_lane<T>::type lane;
  union {
    msl_raw<T, 3> v;
    lane s[3];
    struct {
      lane x, y, z;
    };
    struct {
      lane r, g, b;
    };
    MSL_SWIZZLES_3(T)
  };
  msl_store() = default;
  constexpr msl_store(msl_raw<T, 3> raw) : v(raw) {}
};
template <typename T>
struct msl_store<T, 4> {
  typedef typename msl_lane<T>::type lane;
  union {
    msl_raw<T, 4> v;
    lane s[4];
    struct {
      lane x, y, z, w;
    };
    struct {
      lane r, g, b, a;
    };
    MSL_SWIZZLES_4(T)
  };
  msl_store() = default;
  constexpr msl_store(msl_raw<T, 4> raw) : v(raw) {}
};

template <typename T, int N>
struct packed;

struct msl_raw_tag {};

template <typename T, int N>
struct vec : msl_store<T, N> {
  typedef msl_raw<T, N> raw;
  typedef msl_store<T, N> store;
  typedef typename store::lane lane;

  vec() = default;
  constexpr vec(msl_raw_tag, raw x) : store(x) {}
  constexpr vec(const vec& o) : store(o.v) {}
  constexpr vec(const constant vec& o) : store(o.v) {}
  constexpr vec(T x) : store(raw(lane(x))) {}
  template <typename U>
  explicit vec(const vec<U, N>& o) : store(convert(o.v)) {}
  template <typename U>
  explicit vec(const constant vec<U, N>& o) : store(convert(o.v)) {}
  template <typename U, int... I, typename = typename msl_if<sizeof...(I) == N>::type>
  explicit vec(const msl_swizzle<U, I...>& o) : store(convert(o.get().v)) {}
  vec(const packed<T, N>& o) { copy(o.s); }
  template <typename... A, typename = typename msl_if<(sizeof...(A) > 1) && msl_total<A...>::n == N>::type>
  vec(A... a) {
    int at = 0;
    (put(a, at), ...);
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
  const lane& operator[](int i) const { return this->s[i]; }

  template <typename U>
  static raw convert(U o) {
    return __builtin_convertvector(o, raw);
  }

 private:
  template <typename P>
  void copy(const P& from) {
    for (int i = 0; i < N; i++) {
      this->s[i] = from[i];
    }
  }
  template <typename U>
  void put(U x, thread int& at) {
    this->s[at++] = lane(T(x));
  }
  template <typename U, int M>
  void put(vec<U, M> x, thread int& at) {
    for (int i = 0; i < M; i++) {
      this->s[at++] = lane(T(x.s[i]));
    }
  }
  template <typename U, int... I>
  void put(msl_swizzle<U, I...> x, thread int& at) {
    put(vec<U, sizeof...(I)>(x), at);
  }

#define MSL_ARITHMETIC(op)                                                               \
 public:                                                                                 \
  friend METAL_FUNC vec operator op(vec a, vec b) { return vec(msl_raw_tag(), a.v op b.v); } \
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
#define MSL_COMPARE(op)                                                            \
  friend METAL_FUNC vec<bool, N> operator op(vec a, vec b) {                       \
    return vec<bool, N>(msl_raw_tag(), vec<bool, N>::convert(a.v op b.v) & char(1));  \
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
  packed(T x) {
    for (int i = 0; i < N; i++) {
      s[i] = x;
    }
  }
  template <typename... A, typename = typename msl_if<(sizeof...(A) > 1) && msl_total<A...>::n == N>::type>
  packed(A... a) {
    copy(vec<T, N>(a...));
  }
  T& operator[](int i) { return s[i]; }
  const T& operator[](int i) const { return s[i]; }
  packed& operator+=(vec<T, N> o) { return *this = packed(vec<T, N>(*this) + o); }
  packed& operator*=(vec<T, N> o) { return *this = packed(vec<T, N>(*this) * o); }

 private:
  void copy(const vec<T, N>& o) {
    for (int i = 0; i < N; i++) {
      s[i] = o.s[i];
    }
  }
};

#define MSL_EVERY_OPERATOR(M) M(+) M(-) M(*) M(/) M(%) M(&) M(|) M(^) M(<<) M(>>)
MSL_EVERY_OPERATOR(MSL_SWIZZLE_OPERATOR)
