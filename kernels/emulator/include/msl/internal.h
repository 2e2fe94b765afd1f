// Connects a kernel with the runtime, and declares names inside Metal's own library that MLX's
// headers use.
#pragma once

// The arguments of a kernel: a buffer converts to the type that the kernel declares.
extern "C" {
__attribute__((const)) device void* emu_device_buffer(uint index);
__attribute__((const)) constant void* emu_constant_buffer(uint index);
}
#define MSL_ARGUMENT(space)                                                             \
  struct emu_##space##_pointer {                                                        \
    uint index;                                                                         \
    template <typename T>                                                               \
    operator space T*() const {                                                         \
      return (space T*)emu_##space##_buffer(index);                                     \
    }                                                                                   \
  };                                                                                    \
  struct emu_##space##_reference {                                                      \
    uint index;                                                                         \
    template <typename T>                                                               \
    operator space T&() const {                                                         \
      return *(space T*)emu_##space##_buffer(index);                                    \
    }                                                                                   \
  };
MSL_ARGUMENT(device)
MSL_ARGUMENT(constant)

#define MSL_INTERNAL1(name) \
  METAL_FUNC float __metal_##name(float x, int) { return metal::name(x); }
#define MSL_INTERNAL2(name) \
  METAL_FUNC float __metal_##name(float x, float y, int) { return metal::name(x, y); }
#define MSL_INTERNAL3(name) \
  METAL_FUNC float __metal_##name(float x, float y, float z, int) { return metal::name(x, y, z); }
MSL_INTERNAL1(fabs) MSL_INTERNAL1(acos) MSL_INTERNAL1(acosh) MSL_INTERNAL1(asin)
MSL_INTERNAL1(asinh) MSL_INTERNAL1(atan) MSL_INTERNAL1(atanh) MSL_INTERNAL1(ceil)
MSL_INTERNAL1(cos) MSL_INTERNAL1(cosh) MSL_INTERNAL1(cospi) MSL_INTERNAL1(exp)
MSL_INTERNAL1(exp10) MSL_INTERNAL1(exp2) MSL_INTERNAL1(floor) MSL_INTERNAL1(fract)
MSL_INTERNAL1(log) MSL_INTERNAL1(log10) MSL_INTERNAL1(log2) MSL_INTERNAL1(rint)
MSL_INTERNAL1(round) MSL_INTERNAL1(rsqrt) MSL_INTERNAL1(sin) MSL_INTERNAL1(sinh)
MSL_INTERNAL1(sinpi) MSL_INTERNAL1(sqrt) MSL_INTERNAL1(tan) MSL_INTERNAL1(tanh)
MSL_INTERNAL1(tanpi) MSL_INTERNAL1(trunc)
MSL_INTERNAL2(atan2) MSL_INTERNAL2(divide) MSL_INTERNAL2(fmax) MSL_INTERNAL2(fmin)
MSL_INTERNAL2(fmod) MSL_INTERNAL2(pow) MSL_INTERNAL2(powr)
MSL_INTERNAL3(fmax3) MSL_INTERNAL3(fmin3) MSL_INTERNAL3(fmedian3)
METAL_FUNC float __metal_fma(float x, float y, float z) { return metal::fma(x, y, z); }
METAL_FUNC float __metal_ldexp(float x, int k, int) { return metal::ldexp(x, k); }
METAL_FUNC float __metal_frexp(float x, thread int* e) { return metal::frexp(x, *e); }
METAL_FUNC float __metal_nextafter(float x, float y) { return metal::nextafter(x, y); }
METAL_FUNC ushort __metal_get_simdgroup_size(ushort) { return 32; }

#define __metal_simd_broadcast metal::simd_broadcast
#define __metal_simd_shuffle metal::simd_shuffle
#define __metal_simd_shuffle_down metal::simd_shuffle_down
#define __metal_simd_shuffle_up metal::simd_shuffle_up
#define __metal_simd_shuffle_xor metal::simd_shuffle_xor
#define __metal_simd_shuffle_rotate_down metal::simd_shuffle_rotate_down
#define __metal_simd_shuffle_rotate_up metal::simd_shuffle_rotate_up
#define __metal_simd_shuffle_and_fill_down metal::simd_shuffle_and_fill_down
#define __metal_simd_shuffle_and_fill_up metal::simd_shuffle_and_fill_up
#define __metal_simd_max metal::simd_max
#define __metal_simd_min metal::simd_min
#define __metal_simd_sum metal::simd_sum
#define __metal_simd_product metal::simd_product
#define __metal_simd_xor metal::simd_xor
#define __metal_simd_prefix_exclusive_product metal::simd_prefix_exclusive_product
#define __metal_simd_prefix_exclusive_sum metal::simd_prefix_exclusive_sum
#define __metal_simd_prefix_inclusive_product metal::simd_prefix_inclusive_product
#define __metal_simd_prefix_inclusive_sum metal::simd_prefix_inclusive_sum
