// Converts rows of trits to MLX's affine 2-bit codes: 16 codes in a word, the first in the lowest
// bits.
//
//   rows     (rows, PITCH)           bytes
//   codes    (rows, WIDTH)           uint; codes after the end of a row are 0
//
// A thread converts a block: 16 bytes hold 80 trits, and 80 codes fill 5 words.

constexpr uint BLOCKS = (WIDTH + 4) / 5;  // blocks of a row
const size_t row = thread_position_in_grid.x / BLOCKS;
const uint block = thread_position_in_grid.x % BLOCKS;

uint words[4];
UNROLL for (uint i = 0; i < 4; i++) {
  const uint at = 16 * block + 4 * i;
  const bool inside = at < PITCH;
  const uint word = *(const device uint*)(rows + row * PITCH + (inside ? at : 0));
  words[i] = inside ? word : 0;
}

ulong quads[4];  // 20 codes each
UNROLL for (uint i = 0; i < 4; i++) {
  uint lanes[2] = {(words[i] << 2) & 0x03FC03FC, (words[i] >> 6) & 0x03FC03FC};
  ulong pair[2];  // codes of bytes 0 and 2, or 1 and 3: 10 bits each, 20 bits apart
  UNROLL for (uint j = 0; j < 2; j++) {
    uint codes = 0;
    UNROLL for (uint n = 0; n < 5; n++) {
      const uint carried = lanes[j] + (lanes[j] << 1);
      lanes[j] = carried & 0x03FF03FF;
      codes = (codes >> 2) | (carried & 0x0C000C00);
    }
    codes >>= 2;
    pair[j] = (codes & 1023) | (ulong(codes >> 16) << 20);
  }
  quads[i] = pair[0] | (pair[1] << 10);
}

const uint made[5] = {
    uint(quads[0]),
    uint(quads[0] >> 32) | (uint(quads[1]) << 8),
    uint(quads[1] >> 24) | (uint(quads[2]) << 16),
    uint(quads[2] >> 16) | (uint(quads[3]) << 24),
    uint(quads[3] >> 8),
};
UNROLL for (uint i = 0; i < 5; i++) {
  const uint at = 5 * block + i;
  if (at < WIDTH) codes[row * WIDTH + at] = made[i];
}
