// half and bfloat to and from float and double, rounding to nearest even. The compiler calls
// these by the names below where the processor has no instruction for it.
#pragma once

#include <stdint.h>
#include <string.h>

namespace emu {

inline uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
inline float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

inline float half_to_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
  if (exponent == 31) return float_of(sign | 0x7F800000 | (mantissa << 13) | (mantissa ? 0x400000 : 0));
  if (exponent) return float_of(sign | ((exponent + 112) << 23) | (mantissa << 13));
  float x = (float)mantissa * 0x1p-24f;
  return sign ? -x : x;
}

// Rounds a double, exactly: every sum and product of two halves is exact in one.
inline uint16_t half_from(double x) {
  uint64_t u;
  memcpy(&u, &x, 8);
  uint16_t sign = (uint16_t)(u >> 48) & 0x8000;
  if (x != x) return (uint16_t)(sign | 0x7E00 | ((u >> 42) & 0x1FF));
  double a = x < 0 ? -x : x;
  if (a >= 65520.0) return sign | 0x7C00;
  if (a < 0x1p-14) return sign | (uint16_t)__builtin_rint(a * 0x1p24);
  int exponent = (int)((u >> 52) & 0x7FF) - 1023;
  uint64_t mantissa = u & 0xFFFFFFFFFFFFFull;
  uint64_t kept = mantissa >> 42, rest = mantissa & 0x3FFFFFFFFFFull;
  kept += rest > 0x20000000000ull || (rest == 0x20000000000ull && (kept & 1));
  return (uint16_t)(sign | (((uint32_t)(exponent + 15) << 10) + (uint32_t)kept));
}

inline uint16_t bfloat_from(float x) {
  uint32_t u = bits_of(x);
  if (x != x) return (uint16_t)((u >> 16) | 0x40);
  return (uint16_t)((u + 0x7FFF + ((u >> 16) & 1)) >> 16);
}

}  // namespace emu

// clang passes half and bfloat to these helpers as the machine's own 16-bit floating types.
extern "C" {
float __extendhfsf2(_Float16 h) {
  uint16_t u;
  memcpy(&u, &h, 2);
  return emu::half_to_float(u);
}
_Float16 __truncdfhf2(double x) {
  uint16_t u = emu::half_from(x);
  _Float16 h;
  memcpy(&h, &u, 2);
  return h;
}
_Float16 __truncsfhf2(float x) { return __truncdfhf2((double)x); }
__bf16 __truncsfbf2(float x) {
  uint16_t u = emu::bfloat_from(x);
  __bf16 b;
  memcpy(&b, &u, 2);
  return b;
}
}
