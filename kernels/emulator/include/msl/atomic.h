// Atomic operations, relaxed as all of Metal's are.
#pragma once

extern "C" void emu_atomic_load(uint place);

namespace metal {

enum memory_order { memory_order_relaxed = __ATOMIC_RELAXED };

template <typename T>
struct atomic {
  T value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<ulong> atomic_ulong;
typedef atomic<bool> atomic_bool;
typedef atomic<float> atomic_float;

// Loads, stores and exchanges move bits, so that they serve float as well.
template <typename T>
struct msl_atomic_bits {
  typedef T type;
};
template <>
struct msl_atomic_bits<float> {
  typedef uint type;
};
template <>
struct msl_atomic_bits<bool> {
  typedef uchar type;
};

#define MSL_ATOMIC_RMW(space, name)                                                             \
  template <typename T>                                                                         \
  METAL_FUNC T atomic_fetch_##name##_explicit(volatile space atomic<T>* p, T x, memory_order) { \
    return __atomic_fetch_##name(&p->value, x, __ATOMIC_RELAXED);                               \
  }
#define MSL_ATOMICS(space)                                                                      \
  template <typename T>                                                                         \
  METAL_FUNC T atomic_load_explicit(const volatile space atomic<T>* p, memory_order) {          \
    typedef typename msl_atomic_bits<T>::type bits;                                             \
    emu_atomic_load(0);                                                                         \
    return __builtin_bit_cast(                                                                  \
        T, __atomic_load_n((const volatile space bits*)&p->value, __ATOMIC_RELAXED));           \
  }                                                                                             \
  template <typename T>                                                                         \
  METAL_FUNC void atomic_store_explicit(volatile space atomic<T>* p, T x, memory_order) {       \
    typedef typename msl_atomic_bits<T>::type bits;                                             \
    __atomic_store_n((volatile space bits*)&p->value, __builtin_bit_cast(bits, x),              \
                     __ATOMIC_RELAXED);                                                         \
  }                                                                                             \
  template <typename T>                                                                         \
  METAL_FUNC T atomic_exchange_explicit(volatile space atomic<T>* p, T x, memory_order) {       \
    typedef typename msl_atomic_bits<T>::type bits;                                             \
    return __builtin_bit_cast(                                                                  \
        T, __atomic_exchange_n((volatile space bits*)&p->value, __builtin_bit_cast(bits, x),    \
                               __ATOMIC_RELAXED));                                              \
  }                                                                                             \
  template <typename T>                                                                         \
  METAL_FUNC bool atomic_compare_exchange_weak_explicit(                                        \
      volatile space atomic<T>* p, thread T* expected, T x, memory_order, memory_order) {       \
    typedef typename msl_atomic_bits<T>::type bits;                                             \
    emu_atomic_load(0);                                                                         \
    bits hoped = __builtin_bit_cast(bits, *expected);                                           \
    bits found = __sync_val_compare_and_swap((volatile space bits*)&p->value, hoped,            \
                                             __builtin_bit_cast(bits, x));                      \
    *expected = __builtin_bit_cast(T, found);                                                   \
    return found == hoped;                                                                      \
  }                                                                                             \
  MSL_ATOMIC_RMW(space, add)                                                                    \
  MSL_ATOMIC_RMW(space, sub)                                                                    \
  MSL_ATOMIC_RMW(space, and)                                                                    \
  MSL_ATOMIC_RMW(space, or)                                                                     \
  MSL_ATOMIC_RMW(space, xor)                                                                    \
  MSL_ATOMIC_RMW(space, min)                                                                    \
  MSL_ATOMIC_RMW(space, max)
MSL_ATOMICS(device)
MSL_ATOMICS(threadgroup)

enum thread_scope { thread_scope_thread, thread_scope_threadgroup, thread_scope_device };
METAL_FUNC void atomic_thread_fence(mem_flags, memory_order, thread_scope = thread_scope_device) {}

}  // namespace metal
