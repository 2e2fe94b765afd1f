// Converts rows of trits to MLX's affine 2-bit codes: 16 codes in a word, the first in the lowest
// bits.
//
//   rows     (rows, 16 BLOCKS)       bytes
//   codes    (rows, WIDTH)           uint; codes after the end of a row have no meaning
//
// A thread converts a block of 16 bytes: their 16 digits n fill one word, for each n.

const size_t row = thread_position_in_grid.x / BLOCKS;
const uint block = thread_position_in_grid.x % BLOCKS;

// Bytes i and i + 8, each in the low half of 16 bits.
const device uchar4* from = (const device uchar4*)(rows + (row * BLOCKS + block) * 16);
uint pairs[8];
UNROLL for (uint i = 0; i < 2; i++) {
  const ushort4 low = ushort4(from[i]), high = ushort4(from[i + 2]);
  UNROLL for (uint j = 0; j < 4; j++) pairs[4 * i + j] = as_type<uint>(ushort2(low[j], high[j]));
}

device uint* out = codes + row * WIDTH + block;
UNROLL for (uint n = 0; n < 5; n++) {
  uint fours[2] = {0, 0};  // the codes of four pairs, in the upper half of 16 bits
  UNROLL for (int i = 7; i >= 0; i--) {
    pairs[i] += pairs[i] << 1;  // carries the next digit into bits 8 and 9 of 16
    fours[i / 4] = (pairs[i] & 0x03000300) + (fours[i / 4] << 2);
    pairs[i] &= 0x00FF00FF;
  }
  const uint column = n * BLOCKS + block;
  if ((n + 1) * BLOCKS <= WIDTH || column < WIDTH) {
    out[n * BLOCKS] = fours[1] | fours[0] >> 8;
  }
}
// The padding of the codes may be longer than that of the bytes, by a word.
if (WIDTH > 5 * BLOCKS && block == 0) codes[row * WIDTH + 5 * BLOCKS] = 0;
