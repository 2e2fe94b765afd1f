// y = H (signs x), or y = signs (H x), in blocks of B along a row: H is the normalised
// Walsh-Hadamard transform in natural order, H[i][j] = (-1)^popcount(i & j) / sqrt(B).
//
//   x        (tokens, K)             T, K a multiple of B
//   signs    (K,)                    half, each 1 or -1
//   y        (tokens, K)             T: computed in float, rounded once
//
// B is a power of two from 512 to 8192. A thread has 32 elements of a block. An element's number i
// has log2 B bits, and the transform adds and subtracts elements that differ in one bit, for each
// bit. First, a thread has the elements that differ in bits 0 and 1 and in the highest three, which
// are vectors of x. Then blocks above 1024 exchange elements with other lanes for the next one to
// three bits from bit 2 on. The bits that remain, five (four if B is 512), need other elements,
// which come through threadgroup memory.
// Grid: x over blocks, BLOCKS blocks in a threadgroup; y over tokens.

constexpr uint THREADS = B / 32;  // threads of a block
constexpr uint BLOCKS = THREADS < 32 ? 32 / THREADS : 1;
constexpr uint STEP = B / 8;  // distance of the highest three bits
constexpr uint LOW = B > 1024 ? B / 256 : 4;  // elements below the bits of the second part
constexpr uint LAST = STEP / LOW < 32 ? STEP / LOW : 32;  // elements of a second transform
constexpr uint HIGH = LAST / 4;  // distance, in STEPs, of a thread's two of these
// Some room, so that the lanes that read neighbours in the second part use different banks.
constexpr uint ROOM = B < 8192 ? LOW : 0;
constexpr uint PITCH = 8 * (STEP + ROOM) + (BLOCKS > 1 ? 16 : 0);
constexpr float SCALE = (B == 512 || B == 2048 || B == 8192 ? 1.41421356f : 1.0f) /
    (B <= 1024 ? 32.0f : B <= 4096 ? 64.0f : 128.0f);
threadgroup float4 exchanged[BLOCKS * PITCH / 4];

const uint thread_of_block = thread_position_in_threadgroup.x % THREADS;
const uint place = thread_position_in_threadgroup.x / THREADS;
const uint wanted = threadgroup_position_in_grid.x * BLOCKS + place;
const uint start = min(wanted, uint(K / B - 1)) * B;  // the last threadgroup may have fewer blocks
const size_t row = size_t(threadgroup_position_in_grid.y) * K;
threadgroup float* block = (threadgroup float*)exchanged + place * PITCH;

float v[32];
{
  const uint first = start + 4 * thread_of_block;
  const device T* from = x + row + first;
  const device half* sign = signs + first;
  UNROLL for (uint q = 0; q < 8; q++) {
    const vec<T, 4> values = *(const device vec<T, 4>*)(from + q * STEP);
    half4 s = half4(1.0h);
    if (!INVERSE) s = *(const device half4*)(sign + q * STEP);
    UNROLL for (uint i = 0; i < 4; i += 2) {
      const float a = float(values[i]) * float(s[i]), b = float(values[i + 1]);
      v[4 * q + i] = fma(b, float(s[i + 1]), a);
      v[4 * q + i + 1] = fma(-b, float(s[i + 1]), a);
    }
  }
}
UNROLL for (uint bit = 2; bit < 32; bit *= 2) {
  UNROLL for (uint i = 0; i < 32; i++) {
    if (i & bit) continue;
    const float a = v[i], b = v[i + bit];
    v[i] = a + b;
    v[i + bit] = a - b;
  }
}
UNROLL for (uint bit = 1; bit < LOW / 4; bit *= 2) {
  const float own = thread_of_block & bit ? -1.0f : 1.0f;
  UNROLL for (uint i = 0; i < 32; i++) v[i] = fma(own, v[i], simd_shuffle_xor(v[i], ushort(bit)));
}

UNROLL for (uint q = 0; q < 8; q++) {
  *(threadgroup float4*)(block + q * (STEP + ROOM) + 4 * thread_of_block) =
      float4(v[4 * q], v[4 * q + 1], v[4 * q + 2], v[4 * q + 3]);
}
threadgroup_barrier(mem_flags::mem_threadgroup);
const uint low = thread_of_block % LOW, high = thread_of_block / LOW;
UNROLL for (uint i = 0; i < 32; i++) {
  v[i] = block[high * (STEP + ROOM) + low + i / LAST * HIGH * (STEP + ROOM) + i % LAST * LOW];
}

UNROLL for (uint bit = 1; bit < LAST; bit *= 2) {
  // The last sums are also normalised.
  const float scale = bit * 2 == LAST ? SCALE : 1.0f;
  UNROLL for (uint i = 0; i < 32; i++) {
    if (i & bit) continue;
    const float a = v[i], b = bit * 2 == LAST ? v[i + bit] * scale : v[i + bit];
    v[i] = fma(a, scale, b);
    v[i + bit] = fma(a, scale, -b);
  }
}
if (wanted == start / B) {
  const uint first = start + high * STEP + low;
  UNROLL for (uint i = 0; i < 32; i++) {
    const uint at = i / LAST * HIGH * STEP + i % LAST * LOW;
    y[row + first + at] = T(INVERSE ? v[i] * float(signs[first + at]) : v[i]);
  }
}
