// A codebook matrix as the kernels multiply with it: one piece of memory that begins with this header. It is made by
// anyquant/runtime/cuda/layout.py, which has the same fields; offsets are bytes from the header on, multiples of 16.
//
// Channels are sorted by width, the widest first. Codes are bit streams as they are stored: a row's codes of 128 columns
// are 4 * bits words, of which each of the 32 rows of a tile has four in turn, [word / 4][row of the tile][4].
//
// Rows with codebooks (axis 0): a task is a tile of up to 32 rows of a width; [group of 128 columns][bits][32][4].
// Columns with codebooks (axis 1): the columns of a width, padded to groups of 128, are a section,
// [tile of rows][group of the section][bits][32][4]. A task is some groups of a section.
//
// Tables are FP16. Of rows [entry][row of the tile], of columns [column of the section][entry].
#pragma once

#include "platform.cuh"

constexpr u32 GROUP = 128, STEP = 32;  // columns whose codes are read, and looked up, at a time
constexpr u32 TILE = LANES;            // rows
constexpr u32 NO_COLUMN = 0xffffffffu;

struct Matrix {
  u64 magic, bytes;
  u32 rows, cols, axis, tasks;
  u32 order_len, outliers, index_bytes, widths;  // bit b of widths: there are channels of b bits
  u64 task, codes, tables;
  u64 order;   // u32 [order_len]: of rows, or of columns padded with NO_COLUMN, the channel in each place
  u64 scale;   // FP16 [cols], or 0
  u64 indptr;  // u32 [rows + 1], or 0 where there are no outliers: rows as they are numbered outside
  u64 index;   // columns, u16 or u32 by index_bytes
  u64 value;   // FP16: what an outlier is
  u64 delta;   // FP32: what it is more than its code and scale say
};

struct Task {
  u32 bits, first, count, stride;  // axis 0: place of the first row, rows; axis 1: of the first column, groups, of them a tile
  u64 codes, tables;               // offsets
};

template <class T>
AQ_DEVICE const T* at(const u8* matrix, u64 offset) {
  return reinterpret_cast<const T*>(matrix + offset);
}

// Numbers of activations and results: what torch calls float32, float16, bfloat16.
enum Type : int { FP32 = 0, FP16 = 1, BF16 = 2 };

AQ_DEVICE float load_as(const void* from, int type, u64 i) {
  if (type == FP32) return load(static_cast<const float*>(from) + i);
  const u16 half = load(static_cast<const u16*>(from) + i);
  return type == FP16 ? half_to_float(half) : bits_to_float(static_cast<u32>(half) << 16);
}

AQ_DEVICE void store_as(void* to, int type, u64 i, float value) {
  if (type == FP32) return store(static_cast<float*>(to) + i, value);
  u16 half;
  if (type == FP16) {
    half = float_to_half(value);
  } else {
    const u32 bits = float_to_bits(value);
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    half = static_cast<u16>(is_nan ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  store(static_cast<u16*>(to) + i, half);
}

// Rows of activations [batch][cols].
struct Activations {
  const void* data;
  int type;
  u32 batch, cols;

  // 0 outside.
  AQ_DEVICE float at(u32 row, u32 column) const {
    return row < batch && column < cols ? load_as(data, type, static_cast<u64>(row) * cols + column) : 0.0f;
  }
};

AQ_DEVICE float scale_of(const u8* matrix, const Matrix& m, u32 column) {
  return m.scale && column < m.cols ? half_to_float(load(::at<u16>(matrix, m.scale) + column)) : 1.0f;
}

AQ_DEVICE u32 outlier_column(const u8* matrix, const Matrix& m, u32 i) {
  return m.index_bytes == 2 ? load(at<u16>(matrix, m.index) + i) : load(at<u32>(matrix, m.index) + i);
}

// The four words of each lane, `bits` times.
template <int BITS>
struct Words {
  u32 word[4 * BITS + 1];

  AQ_DEVICE void read(const uint4* group, u32 lane) {
#pragma unroll
    for (int i = 0; i < BITS; ++i) {
      const uint4 four = load_once(group + i * LANES + lane);
      word[4 * i] = four.x, word[4 * i + 1] = four.y, word[4 * i + 2] = four.z, word[4 * i + 3] = four.w;
    }
    word[4 * BITS] = 0;
  }
  // `COUNT` bits from bit `from` on, both known when this is compiled.
  template <int COUNT>
  AQ_DEVICE u32 field(int from) const {
    if constexpr (COUNT == 0) return 0;
    const int w = from / 32, shift = from % 32;
    const u32 bits = shift + COUNT <= 32 ? word[w] >> shift : funnel(word[w], word[w + 1], shift);
    return bits & ((1u << COUNT) - 1);
  }
};
