// Computes the operations across a simdgroup, once all its lanes have arrived.
#pragma once

#include <math.h>
#include <stdint.h>

#include "convert.h"

namespace emu {

// The codes of include/msl/simd.h.
enum Op : uint32_t {
  op_sum = 1, op_product, op_min, op_max, op_and, op_or, op_xor,
  op_prefix_inclusive_sum, op_prefix_exclusive_sum,
  op_prefix_inclusive_product, op_prefix_exclusive_product,
  op_shuffle = 16, op_broadcast, op_shuffle_up, op_shuffle_down, op_shuffle_xor,
  op_rotate_up, op_rotate_down, op_fill_up, op_fill_down, op_broadcast_first,
  op_ballot, op_active,
  op_quad = 64,
  op_barrier = 256, op_matrix_multiply = 512,
};
enum Type : uint32_t { f32, f16, bf16, i8, u8, i16, u16, i32, u32, i64, u64 };

struct Slot {
  uint64_t value, argument, third, result;
};

struct F32 {
  typedef float type;
  static float get(uint64_t v) { return float_of((uint32_t)v); }
  static uint64_t put(float x) { return bits_of(x); }
};
struct F16 {
  typedef float type;  // exact for one operation, which put then rounds
  static float get(uint64_t v) { return half_to_float((uint16_t)v); }
  static uint64_t put(float x) { return half_from(x); }
};
template <typename T, typename U>
struct Int {
  typedef T type;
  static T get(uint64_t v) { return (T)(U)v; }
  static uint64_t put(T x) { return (uint64_t)(U)x; }
};

template <typename V>
uint64_t combine(uint32_t op, uint64_t a, uint64_t b) {
  typedef typename V::type T;
  T x = V::get(a), y = V::get(b);
  switch (op) {
    case op_sum:
    case op_prefix_inclusive_sum:
    case op_prefix_exclusive_sum:
      return V::put((T)(x + y));
    case op_product:
    case op_prefix_inclusive_product:
    case op_prefix_exclusive_product:
      return V::put((T)(x * y));
    case op_min:
      return V::put(x != x ? y : y != y ? x : (y < x ? y : x));
    case op_max:
      return V::put(x != x ? y : y != y ? x : (x < y ? y : x));
    case op_and:
      return a & b;
    case op_or:
      return a | b;
    default:
      return a ^ b;
  }
}

inline uint64_t combine(uint32_t op, uint32_t type, uint64_t a, uint64_t b) {
  switch (type) {
    case f32: return combine<F32>(op, a, b);
    case f16: return combine<F16>(op, a, b);
    case i8: return combine<Int<int8_t, uint8_t>>(op, a, b);
    case u8: return combine<Int<uint8_t, uint8_t>>(op, a, b);
    case i16: return combine<Int<int16_t, uint16_t>>(op, a, b);
    case u16: return combine<Int<uint16_t, uint16_t>>(op, a, b);
    case i32: return combine<Int<int32_t, uint32_t>>(op, a, b);
    default: return combine<Int<uint32_t, uint32_t>>(op, a, b);
  }
}

inline uint64_t identity(uint32_t op, uint32_t type) {
  bool product = op == op_prefix_exclusive_product;
  if (!product) return 0;
  return type == f32 ? bits_of(1.0f) : type == f16 ? 0x3C00 : 1;
}

// A butterfly: lane i meets lane i ^ 1, then i ^ 2 and so on. mlx-lm's packed gated-delta kernel
// relies on simd_sum adding in this order on Apple GPUs. Lanes that do not exist are left out.
inline void reduce(uint32_t op, uint32_t type, Slot* slot, int lanes, int width) {
  bool live[32];
  uint64_t v[32], next[32];
  for (int i = 0; i < width; i++) {
    live[i] = i < lanes;
    v[i] = live[i] ? slot[i].value : 0;
  }
  for (int step = 1; step < width; step *= 2) {
    bool now[32];
    for (int i = 0; i < width; i++) {
      int j = i ^ step;
      int low = i < j ? i : j, high = i < j ? j : i;
      now[i] = live[i] || live[j];
      next[i] = live[low] && live[high] ? combine(op, type, v[low], v[high])
                                        : live[low] ? v[low] : v[high];
    }
    for (int i = 0; i < width; i++) {
      v[i] = next[i];
      live[i] = now[i];
    }
  }
  for (int i = 0; i < lanes; i++) slot[i].result = v[i];
}

inline void prefix(uint32_t op, uint32_t type, Slot* slot, int lanes) {
  bool inclusive = op == op_prefix_inclusive_sum || op == op_prefix_inclusive_product;
  uint64_t total = identity(op, type);
  for (int i = 0; i < lanes; i++) {
    uint64_t next = i == 0 ? slot[i].value : combine(op, type, total, slot[i].value);
    slot[i].result = inclusive ? next : (i == 0 ? identity(op, type) : total);
    total = next;
  }
}

// Returns the lane whose value lane i takes; `own` says that it keeps its own; -1 is a lane
// beyond the group. An index that Metal leaves undefined counts as beyond.
inline int source(uint32_t op, int i, uint64_t argument, int width, bool* own) {
  int n = (int)(argument & 0xFFFF), modulo = (int)(argument >> 16);
  *own = false;
  switch (op) {
    case op_shuffle:
    case op_broadcast:
      return n < width ? n : -1;
    case op_shuffle_xor:
      return (i ^ n) < width ? (i ^ n) : -1;
    case op_shuffle_up:
      *own = i < n;
      return i - n;
    case op_shuffle_down:
      *own = i + n >= width;
      return i + n;
    case op_rotate_up:
      return ((i - n) % width + width) % width;
    case op_rotate_down:
      return (i + n) % width;
    case op_fill_up: {
      int start = i / modulo * modulo;
      return i - n >= start ? i - n : -2;
    }
    default: {  // op_fill_down
      int end = i / modulo * modulo + modulo;
      return i + n < end ? i + n : -2;
    }
  }
}

// Carries out one operation for a simdgroup of `lanes` threads. Returns -1, or the lane that
// asked for the value of a lane that does not exist.
inline int across(uint32_t op, uint32_t type, Slot* slot, int lanes) {
  if (op >= op_quad) {
    for (int q = 0; q < lanes; q += 4) {
      int bad = -1, n = lanes - q < 4 ? lanes - q : 4;
      uint32_t inner = op - op_quad;
      Slot* quad = slot + q;
      if (inner <= op_xor) {
        reduce(inner, type, quad, n, 4);
      } else if (inner <= op_prefix_exclusive_product) {
        prefix(inner, type, quad, n);
      } else if (inner == op_broadcast_first) {
        for (int i = 0; i < n; i++) quad[i].result = quad[0].value;
      } else {
        for (int i = 0; i < n && bad < 0; i++) {
          bool own;
          int from = source(inner, i, quad[i].argument, 4, &own);
          if (own) {
            quad[i].result = quad[i].value;
          } else if (from == -2) {
            quad[i].result = quad[i].value >> 32;
          } else if (from < 0 || from >= n) {
            bad = q + i;
          } else {
            quad[i].result = quad[from].value;
          }
        }
        if (bad >= 0) return bad;
      }
    }
    return -1;
  }
  if (op <= op_xor) {
    reduce(op, type, slot, lanes, 32);
  } else if (op <= op_prefix_exclusive_product) {
    prefix(op, type, slot, lanes);
  } else if (op == op_broadcast_first) {
    for (int i = 0; i < lanes; i++) slot[i].result = slot[0].value;
  } else if (op == op_ballot || op == op_active) {
    uint64_t mask = 0;
    for (int i = 0; i < lanes; i++) mask |= (uint64_t)(op == op_active || slot[i].value) << i;
    for (int i = 0; i < lanes; i++) slot[i].result = mask;
  } else {
    for (int i = 0; i < lanes; i++) {
      bool own;
      int from = source(op, i, slot[i].argument, 32, &own);
      if (own) {
        slot[i].result = slot[i].value;
      } else if (from == -2) {
        slot[i].result = slot[i].value >> 32;
      } else if (from < 0 || from >= lanes) {
        return i;
      } else {
        slot[i].result = (uint32_t)slot[from].value;
      }
    }
  }
  return -1;
}

// d = a b + c for 8x8 matrices placed as include/msl/matrix.h says.
inline void matrix_multiply(Slot* slot) {
  float a[8][8], b[8][8], c[8][8];
  for (int lane = 0; lane < 32; lane++) {
    int row = ((lane >> 2) & 4) + ((lane >> 1) & 3), col = ((lane >> 1) & 4) + (lane & 1) * 2;
    for (int i = 0; i < 2; i++) {
      a[row][col + i] = float_of((uint32_t)(slot[lane].value >> (32 * i)));
      b[row][col + i] = float_of((uint32_t)(slot[lane].argument >> (32 * i)));
      c[row][col + i] = float_of((uint32_t)(slot[lane].third >> (32 * i)));
    }
  }
  for (int lane = 0; lane < 32; lane++) {
    int row = ((lane >> 2) & 4) + ((lane >> 1) & 3), col = ((lane >> 1) & 4) + (lane & 1) * 2;
    slot[lane].result = 0;
    for (int i = 0; i < 2; i++) {
      float sum = c[row][col + i];
      for (int k = 0; k < 8; k++) sum = fmaf(a[row][k], b[k][col + i], sum);
      slot[lane].result |= (uint64_t)bits_of(sum) << (32 * i);
    }
  }
}

}  // namespace emu
