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

#define MSL_ATOMIC_RMW(space, name)                                                           \
  template <typename T>                                                                       \
  METAL_FUNC T atomic_fetch_##name##_explicit(volatile space atomic<T>* p, T x, memory_order) { \
    return __atomic_fetch_##name(&p->value, x, __ATOMIC_RELAXED);                             \
  }
#define MSL_ATOMICS(space)                                                                    \
  template <typename T>                                                                       \
  METAL_FUNC T atomic_load_explicit(const volatile space atomic<T>* p, memory_order) {        \
    emu_atomic_load(0);                                                                       \
    T x;                                                                                      \
    __atomic_load(&p->value, &x, __ATOMIC_RELAXED);                                           \
    return x;                                                                                 \
  }                                                                                           \
  template <typename T>                                                                       \
  METAL_FUNC void atomic_store_explicit(volatile space atomic<T>* p, T x, memory_order) {     \
    __atomic_store(&p->value, &x, __ATOMIC_RELAXED);                                          \
  }                                                                                           \
  template <typename T>                                                                       \
  METAL_FUNC T atomic_exchange_explicit(volatile space atomic<T>* p, T x, memory_order) {     \
    T old;                                                                                    \
    __atomic_exchange(&p->value, &x, &old, __ATOMIC_RELAXED);                                 \
    return old;                                                                               \
  }                                                                                           \
  template <typename T>                                                                       \
  METAL_FUNC bool atomic_compare_exchange_weak_explicit(                                      \
      volatile space atomic<T>* p, thread T* expected, T x, memory_order, memory_order) {     \
    emu_atomic_load(0);                                                                       \
    return __atomic_compare_exchange(&p->value, expected, &x, false, __ATOMIC_RELAXED,        \
                                     __ATOMIC_RELAXED);                                       \
  }                                                                                           \
  MSL_ATOMIC_RMW(space, add)                                                                  \
  MSL_ATOMIC_RMW(space, sub)                                                                  \
  MSL_ATOMIC_RMW(space, and)                                                                  \
  MSL_ATOMIC_RMW(space, or)                                                                   \
  MSL_ATOMIC_RMW(space, xor)                                                                  \
  MSL_ATOMIC_RMW(space, min)                                                                  \
  MSL_ATOMIC_RMW(space, max)
MSL_ATOMICS(device)
MSL_ATOMICS(threadgroup)

enum thread_scope { thread_scope_thread, thread_scope_threadgroup, thread_scope_device };
METAL_FUNC void atomic_thread_fence(mem_flags, memory_order, thread_scope = thread_scope_device) {}

}  // namespace metal
