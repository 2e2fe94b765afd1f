// The type traits and number limits that Metal's standard library offers.
#pragma once

namespace metal {

template <typename T, T V>
struct integral_constant {
  static constexpr constant T value = V;
  typedef T value_type;
  constexpr operator T() const { return V; }
};
typedef integral_constant<bool, true> true_type;
typedef integral_constant<bool, false> false_type;
template <bool B>
using bool_constant = integral_constant<bool, B>;

template <bool B, typename T = void>
struct enable_if {};
template <typename T>
struct enable_if<true, T> {
  typedef T type;
};
template <bool B, typename T = void>
using enable_if_t = typename enable_if<B, T>::type;
template <bool B, typename T, typename U>
struct conditional {
  typedef T type;
};
template <typename T, typename U>
struct conditional<false, T, U> {
  typedef U type;
};
template <bool B, typename T, typename U>
using conditional_t = typename conditional<B, T, U>::type;

template <typename T>
struct remove_const {
  typedef T type;
};
template <typename T>
struct remove_const<const T> {
  typedef T type;
};
template <typename T>
struct remove_cv : remove_const<T> {};
template <typename T>
struct remove_cv<volatile T> : remove_const<T> {};
template <typename T>
struct remove_cv<const volatile T> : remove_const<T> {};
template <typename T>
using remove_cv_t = typename remove_cv<T>::type;
template <typename T>
struct remove_addrspace {
  typedef T type;
};
#define MSL_REMOVE_SPACE(space)           \
  template <typename T>                   \
  struct remove_addrspace<space T> {  \
    typedef T type;                       \
  };
MSL_REMOVE_SPACE(device)
MSL_REMOVE_SPACE(constant)
MSL_REMOVE_SPACE(threadgroup)
MSL_REMOVE_SPACE(thread)
template <typename T>
using remove_addrspace_t = typename remove_addrspace<T>::type;
template <typename T>
struct remove_reference {
  typedef T type;
};
template <typename T>
struct remove_reference<T&> {
  typedef T type;
};
template <typename T>
using remove_reference_t = typename remove_reference<T>::type;
template <typename T>
struct remove_pointer {
  typedef T type;
};
template <typename T>
struct remove_pointer<T*> {
  typedef typename remove_addrspace<T>::type type;
};
template <typename T>
using remove_pointer_t = typename remove_pointer<T>::type;

template <typename T, typename U>
struct is_same : false_type {};
template <typename T>
struct is_same<T, T> : true_type {};
template <typename T>
struct is_pointer : false_type {};
template <typename T>
struct is_pointer<T*> : true_type {};
template <typename T>
struct is_floating_point
    : bool_constant<is_same<remove_cv_t<T>, float>::value || is_same<remove_cv_t<T>, half>::value ||
                    is_same<remove_cv_t<T>, bfloat>::value> {};
template <typename T>
struct is_integral : bool_constant<__is_integral(T)> {};
template <typename T>
struct is_arithmetic : bool_constant<is_integral<T>::value || is_floating_point<T>::value> {};
template <typename T>
struct is_signed : bool_constant<is_floating_point<T>::value || __is_signed(T)> {};
template <typename T>
struct is_unsigned : bool_constant<__is_unsigned(T)> {};
template <typename T>
struct is_void : is_same<remove_cv_t<T>, void> {};
template <typename From, typename To>
struct is_convertible : bool_constant<__is_convertible(From, To)> {};
template <typename T>
struct make_unsigned {
  typedef __make_unsigned(T) type;
};
template <typename T>
struct make_signed {
  typedef __make_signed(T) type;
};
template <typename... B>
struct _disjunction : false_type {};
template <typename B, typename... R>
struct _disjunction<B, R...> : conditional_t<bool(B::value), B, _disjunction<R...>> {};
template <typename... B>
struct _conjunction : true_type {};
template <typename B, typename... R>
struct _conjunction<B, R...> : conditional_t<bool(B::value), _conjunction<R...>, B> {};

#define MSL_VALUE(name)           \
  template <typename... T>        \
  constexpr constant bool name##_v = name<T...>::value;
MSL_VALUE(is_same)
MSL_VALUE(is_pointer)
MSL_VALUE(is_floating_point)
MSL_VALUE(is_integral)
MSL_VALUE(is_arithmetic)
MSL_VALUE(is_signed)
MSL_VALUE(is_unsigned)
MSL_VALUE(is_convertible)
MSL_VALUE(is_void)

template <typename T>
struct numeric_limits {
  static constexpr constant bool is_specialized = is_integral<T>::value;
  static constexpr constant bool is_signed = metal::is_signed<T>::value;
  static constexpr constant bool is_integer = is_integral<T>::value;
  static constexpr constant int digits = int(sizeof(T)) * 8 - (is_signed ? 1 : 0);
  static constexpr T min() { return is_signed ? T(T(1) << (sizeof(T) * 8 - 1)) : T(0); }
  static constexpr T max() { return T(~min()); }
  static constexpr T lowest() { return min(); }
};
template <>
struct numeric_limits<bool> {
  static constexpr constant bool is_integer = true;
  static constexpr bool min() { return false; }
  static constexpr bool max() { return true; }
  static constexpr bool lowest() { return false; }
};
#define MSL_FLOAT_LIMITS(T, least, most, eps, d)                              \
  template <>                                                                 \
  struct numeric_limits<T> {                                                  \
    static constexpr constant bool is_specialized = true;                     \
    static constexpr constant bool is_signed = true;                          \
    static constexpr constant bool is_integer = false;                        \
    static constexpr constant bool has_infinity = true;                       \
    static constexpr constant bool has_quiet_NaN = true;                      \
    static constexpr constant int digits = d;                                 \
    static constexpr T min() { return T(least); }                             \
    static constexpr T max() { return T(most); }                              \
    static constexpr T lowest() { return T(-most); }                          \
    static constexpr T epsilon() { return T(eps); }                           \
    static constexpr T infinity() { return T(__builtin_inff()); }             \
    static constexpr T quiet_NaN() { return T(__builtin_nanf("")); }          \
    static constexpr T signaling_NaN() { return T(__builtin_nansf("")); }     \
  };
MSL_FLOAT_LIMITS(float, FLT_MIN, FLT_MAX, FLT_EPSILON, 24)
MSL_FLOAT_LIMITS(half, 6.103515625e-05f, 65504.0f, 0.0009765625f, 11)
MSL_FLOAT_LIMITS(bfloat, 1.175494351e-38f, 3.38953139e38f, 0.0078125f, 8)

template <typename T, size_t N>
struct array {
  T s[N];
  T& operator[](size_t i) { return s[i]; }
  const T& operator[](size_t i) const { return s[i]; }
  constexpr size_t size() const { return N; }
};

}  // namespace metal
