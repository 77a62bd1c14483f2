// Stock ggml blocks dequantized from their stored bytes, plain and obviously right: a thread for each weight, FP32, in the
// order of ggml's own reference, so that results are the same to the last bit. Source: the block structures of ggml
// (ggml-common.h); the arithmetic is that of anyquant/ir/ggml_blocks.py and ggml_grids.py, whose order of types this is.

#include "packed.cuh"

namespace {

enum GgmlType : u32 {
  Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4, TQ1_0, TQ2_0, IQ1_S, IQ1_M, IQ2_XXS,
  IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S
};

// The level of a 4-bit code; a switch has no memory to be initialized.
AQ_DEVICE float iq4_level(u32 code) {
  switch (code) {
    case 0: return -127;
    case 1: return -104;
    case 2: return -83;
    case 3: return -65;
    case 4: return -49;
    case 5: return -35;
    case 6: return -22;
    case 7: return -10;
    case 8: return 1;
    case 9: return 13;
    case 10: return 25;
    case 11: return 38;
    case 12: return 53;
    case 13: return 69;
    case 14: return 89;
    default: return 113;
  }
}

// Twice the values of E2M1: 0, 1, 2, 3, 4, 6, 8, 12, and below zero.
AQ_DEVICE float mxfp4_level(u32 code) {
  const u32 magnitude = code & 7, exponent = magnitude >> 1;
  const float size = exponent ? static_cast<float>((2 | (magnitude & 1)) << (exponent - 1)) : static_cast<float>(magnitude);
  return code & 8 ? -size : size;
}

// Element j of a block.
struct Block {
  const u8* bytes;
  const float* grid;  // points of the type's lattice, if it has one
  u32 j;

  AQ_DEVICE u32 byte(u32 i) const { return load(bytes + i); }
  AQ_DEVICE u32 word(u32 i) const { return byte(i) | byte(i + 1) << 8; }
  AQ_DEVICE u32 word32(u32 i) const { return word(i) | word(i + 2) << 16; }
  AQ_DEVICE float half(u32 i) const { return half_to_float(static_cast<u16>(word(i))); }
  AQ_DEVICE float signed_byte(u32 i) const { return static_cast<float>(static_cast<signed char>(byte(i))); }
  AQ_DEVICE u32 bit(u32 at, u32 i) const { return byte(at + i / 8) >> i % 8 & 1; }
  // Nibble i of those that lie two in a byte, the first one low.
  AQ_DEVICE u32 nibble(u32 at, u32 i) const { return byte(at + i / 2) >> 4 * (i % 2) & 15; }

  // Of 32 codes: low nibbles are the first half, high ones the second.
  AQ_DEVICE u32 of_halves(u32 at) const { return byte(at + j % 16) >> (j % 32 < 16 ? 0 : 4) & 15; }
  // Of 256: runs of 32 bytes, with four fields of 2 bits, or two nibbles, each after the other.
  AQ_DEVICE u32 two_bits(u32 at) const { return byte(at + j / 128 * 32 + j % 32) >> 2 * (j / 32 % 4) & 3; }
  AQ_DEVICE u32 of_runs(u32 at) const { return byte(at + j / 64 * 32 + j % 32) >> (j % 64 < 32 ? 0 : 4) & 15; }
  // Bit i of byte k belongs to element 32 i + k.
  AQ_DEVICE u32 mask(u32 at) const { return byte(at + j % 32) >> j / 32 & 1; }

  AQ_DEVICE float point(u32 code, u32 dimensions) const { return load(grid + code * dimensions + j % dimensions); }
  // Seven signs are stored; the eighth makes their number even.
  AQ_DEVICE bool shared_sign(u32 seven) const {
    u32 parity = 0;
    for (u32 i = 0; i < 7; ++i) parity ^= seven >> i & 1;
    return j % 8 < 7 ? seven >> j % 8 & 1 : parity;
  }
};

AQ_DEVICE float number(u32 code) { return static_cast<float>(code); }
AQ_DEVICE float number(int code) { return static_cast<float>(code); }
AQ_DEVICE float times(float a, float b) { return rounded_product(a, b); }
AQ_DEVICE float signed_by(bool negative, float value) { return negative ? -value : value; }

// With scales and minima of 6 bits at 4, for each 32 codes.
AQ_DEVICE float k_affine(const Block& b, u32 code) {
  const u32 group = b.j / 32, i = group % 4, d = b.byte(4 + i), m = b.byte(8 + i), both = b.byte(12 + i);
  const u32 scale = group < 4 ? d & 63 : (both & 15) | (d >> 2 & 48);
  const u32 minimum = group < 4 ? m & 63 : both >> 4 | (m >> 2 & 48);
  return times(times(b.half(0), number(scale)), number(code)) - times(b.half(2), number(minimum));
}

AQ_DEVICE float q3_k(const Block& b) {
  const u32 group = b.j / 16, low = b.byte(96 + group % 8) >> (group < 8 ? 0 : 4) & 15;
  const u32 high = b.byte(104 + group % 4) >> 2 * (group / 4) & 3;
  const int scale = static_cast<int>(low | high << 4) - 32;
  const int code = static_cast<int>(b.two_bits(32)) - (b.mask(0) ? 0 : 4);
  return times(times(b.half(108), number(scale)), number(code));
}

AQ_DEVICE float q6_k(const Block& b) {
  const u32 run = b.j / 128, low = b.byte(run * 64 + b.j % 64) >> (b.j % 128 < 64 ? 0 : 4) & 15;
  const int code = static_cast<int>(low | b.two_bits(128) << 4) - 32;
  return times(times(b.half(208), b.signed_byte(192 + b.j / 16)), number(code));
}

AQ_DEVICE float iq4_xs(const Block& b) {
  const u32 group = b.j / 32, low = b.nibble(4, group), high = b.word(2) >> 2 * group & 3;
  const int scale = static_cast<int>(low | high << 4) - 32;
  return times(times(b.half(0), number(scale)), iq4_level(b.of_halves(8 + 16 * group)));
}

// A byte is a fraction in units of 1/256; its ternary digits come out one by one as the whole part of 3 times it.
AQ_DEVICE float tq1_0(const Block& b) {
  const u32 j = b.j, digit = j < 160 ? j / 32 : j < 240 ? (j - 160) / 16 : (j - 240) / 4;
  u32 rest = b.byte(j < 160 ? j % 32 : j < 240 ? 32 + j % 16 : 48 + j % 4);
  for (u32 i = 0; i < digit; ++i) rest = rest * 3 & 255;
  return times(b.half(52), number(static_cast<int>(rest * 3 >> 8) - 1));
}

AQ_DEVICE float iq1(const Block& b, float scale, u32 code, bool negative) {
  return times(scale, b.point(code, 8) + (negative ? -0.125f : 0.125f));
}

AQ_DEVICE float iq1_s(const Block& b) {
  const u32 p = b.j / 8, word = b.word(34 + b.j / 32 * 2), high = word >> 3 * (p % 4) & 7;
  return iq1(b, times(b.half(0), number(2 * (word >> 12 & 7) + 1)), b.byte(2 + p) | high << 8, word >> 15);
}

AQ_DEVICE float iq1_m(const Block& b) {
  u32 half = 0;  // four bits of it end each word
  for (u32 i = 0; i < 4; ++i) half |= b.word(48 + 2 * i) >> 12 << 4 * i;
  const u32 p = b.j / 8, high = b.nibble(32, p), group = b.j / 16, field = b.word(48 + group / 4 * 2) >> 3 * (group % 4) & 7;
  const float scale = times(half_to_float(static_cast<u16>(half)), number(2 * field + 1));
  return iq1(b, scale, b.byte(p) | (high & 7) << 8, high & 8);
}

// A scale of 4 bits, counted in halves.
AQ_DEVICE float iq_scale(const Block& b, u32 scale, float factor) {
  return times(times(b.half(0), 0.5f + number(scale)), factor);
}

AQ_DEVICE float iq2_xxs(const Block& b) {
  const u32 at = 2 + b.j / 32 * 8, p = b.j / 8 % 4, word = b.word32(at + 4);
  return times(iq_scale(b, word >> 28, 0.25f), signed_by(b.shared_sign(word >> 7 * p & 127), b.point(b.byte(at + p), 8)));
}

AQ_DEVICE float iq2_xs(const Block& b) {
  const u32 code = b.word(2 + b.j / 8 * 2);
  return times(iq_scale(b, b.nibble(66, b.j / 16), 0.25f), signed_by(b.shared_sign(code >> 9), b.point(code & 511, 8)));
}

AQ_DEVICE float iq2_s(const Block& b) {
  const u32 p = b.j / 8, code = b.byte(2 + p) | (b.byte(66 + p / 4) >> 2 * (p % 4) & 3) << 8;
  return times(iq_scale(b, b.nibble(74, b.j / 16), 0.25f), signed_by(b.bit(34, b.j), b.point(code, 8)));
}

AQ_DEVICE float iq3_xxs(const Block& b) {
  const u32 word = b.word32(66 + b.j / 32 * 4), seven = word >> 7 * (b.j / 8 % 4) & 127;
  return times(iq_scale(b, word >> 28, 0.5f), signed_by(b.shared_sign(seven), b.point(b.byte(2 + b.j / 4), 4)));
}

AQ_DEVICE float iq3_s(const Block& b) {
  const u32 p = b.j / 4, code = b.byte(2 + p) | b.bit(66, p) << 8, scale = b.nibble(106, b.j / 32);
  return times(times(b.half(0), number(1 + 2 * scale)), signed_by(b.bit(74, b.j), b.point(code, 4)));
}

AQ_DEVICE float value_of(const Block& b, u32 type) {
  switch (type) {
    case Q4_0: return times(b.half(0), number(static_cast<int>(b.of_halves(2)) - 8));
    case Q4_1: return times(b.half(0), number(b.of_halves(4))) + b.half(2);
    case Q5_0: return times(b.half(0), number(static_cast<int>(b.of_halves(6) | b.bit(2, b.j) << 4) - 16));
    case Q5_1: return times(b.half(0), number(b.of_halves(8) | b.bit(4, b.j) << 4)) + b.half(2);
    case Q8_0: return times(b.half(0), b.signed_byte(2 + b.j));
    case Q2_K: {
      const u32 scales = b.byte(b.j / 16);
      return times(times(b.half(80), number(scales & 15)), number(b.two_bits(16))) - times(b.half(82), number(scales >> 4));
    }
    case Q3_K: return q3_k(b);
    case Q4_K: return k_affine(b, b.of_runs(16));
    case Q5_K: return k_affine(b, b.of_runs(48) | b.mask(16) << 4);
    case Q6_K: return q6_k(b);
    case IQ4_NL: return times(b.half(0), iq4_level(b.of_halves(2)));
    case IQ4_XS: return iq4_xs(b);
    case MXFP4: return times(ldexpf(1.0f, static_cast<int>(b.byte(0)) - 128), mxfp4_level(b.of_halves(1)));
    case TQ1_0: return tq1_0(b);
    case TQ2_0: return times(b.half(64), number(static_cast<int>(b.two_bits(0)) - 1));
    case IQ1_S: return iq1_s(b);
    case IQ1_M: return iq1_m(b);
    case IQ2_XXS: return iq2_xxs(b);
    case IQ2_XS: return iq2_xs(b);
    case IQ2_S: return iq2_s(b);
    case IQ3_XXS: return iq3_xxs(b);
    default: return iq3_s(b);
  }
}

}  // namespace

// w [rows][cols] of blocks of `length` weights in block_bytes each; grid: FP32 points of a lattice, or null.
AQ_KERNEL(256)
dequantize_ggml(const u8* blocks, const float* grid, u32 type, u32 length, u32 block_bytes, u32 rows, u32 cols, float* w) {
  const u64 i = static_cast<u64>(block_x()) * threads_of_block() + thread_index();
  if (i >= static_cast<u64>(rows) * cols) return;
  const Block block = {blocks + i / length * block_bytes, grid, static_cast<u32>(i % length)};
  store(w + i, value_of(block, type));
}
