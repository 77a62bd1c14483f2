// How a matrix lies in memory while products are done with it; see anyquant_matmul.h.
//
// Channels are sorted by width; those of one width are a section. The codes of a channel lie in units of 512 and a
// tail of chunks of 64. A unit has 32 groups of 16 codes, one for each lane of a vector of 32-bit words; with b bits
// it takes b words for each lane, 64 * b bytes, and no bit is lost:
//
//     1, 2, 4, 8   word w holds groups w * 32 / b and on, one above the other
//     3            words 0, 1 and 2 hold groups 0..7, 8..15 and 16..23 in nibbles; the bits above them are those of
//                  groups 24..31, the lowest in word 0
//     5, 6         four words of nibbles hold the low four bits; one or two words of 1 or 2 bits, the rest
//     7            like 8
//
// A chunk has 4 groups; up to 4 bits they are nibbles of 16-bit words, else bytes of 32-bit words.
//
// In memory channels are interleaved in tiles, so that one thread reads one stream: [tile][unit][word][channel of the
// tile], then [chunk][channel of the tile]. Rows with codebooks have tiles of 8, and of 1 where fewer than 8 are left.
//
// For hosts that ask for bands of 16 rows, a row is a record of its table and its codes, [unit][word], then [chunk]; the
// records of a band lie together, by section.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "vector_units.h"

namespace matmul {

constexpr int LANES = 16, GROUPS = 32, UNIT = LANES * GROUPS, CHUNK_GROUPS = 4, CHUNK = LANES * CHUNK_GROUPS;
constexpr int LINE = 64;  // bytes of a word of all lanes
constexpr int TILE = 8;
constexpr int MOST_BITS = 8;
constexpr uint64_t MOST_SIDE = 0x7fffffff;
constexpr int MOST_OF_ROWS = 132, MOST_OF_COLUMNS = 66;  // rows of activations that one pass over the codes serves
constexpr int HALF_UNIT = UNIT / 2;  // rows that are done together where columns have codebooks
constexpr int BLOCK = 4 * LANES;     // the same where rows have, with many rows of activations
constexpr int BAND = 16;             // rows that a host asks for at a time
constexpr int FEW = 8;               // rows of activations that are not many yet: codes are looked up for each four

// Of a channel's codes outside of here.
inline size_t stream_bytes(uint64_t length, int bits) { return length / 8 * bits + (length % 8 * bits + 7) / 8; }

constexpr int stored_bits(int bits) { return bits == 7 ? 8 : bits; }
constexpr size_t unit_bytes(int bits) { return static_cast<size_t>(LINE) * stored_bits(bits); }
constexpr size_t chunk_bytes(int bits) { return bits <= 4 ? LINE / 2 : LINE; }
// Up to 4 bits a table fills a vector, by repetition, so that no index needs a mask.
constexpr size_t table_entries(int bits) { return bits == 0 ? 1 : bits < 4 ? 16 : static_cast<size_t>(1) << bits; }

// Codes of one width: channels first..first+count-1 of the sorted ones.
struct Section {
  int32_t bits;
  uint32_t first, count;
  uint32_t tiled;  // channels that lie in whole tiles, of rows
  uint32_t units, chunks;
  uint64_t codes, tables;  // offsets

  size_t channel_bytes() const { return units * unit_bytes(bits) + chunks * chunk_bytes(bits); }
};

// Scales of blocks: rows have no codebooks, but one table for all.
struct Blocks {
  uint32_t block;   // columns that share a scale, 0 where there are none
  uint32_t blocks;  // of a row
  int32_t bfloat;   // scales are the high halves of FP32 numbers, not FP16
  uint32_t numbers;  // codes are numbers, as the table says too
  uint64_t table, scales, zeros;  // offsets: FP32 [table_entries], 16 bits and 8 bits [rows][blocks]; zeros 0 for none
};

struct Packed {
  uint64_t magic, bytes;
  uint64_t serial;  // no other matrix of this process has it
  uint32_t rows, cols;
  int32_t axis, sections;
  Blocks blocks;
  uint64_t outliers;
  uint64_t order;  // offset: the channel in each place among the sorted ones
  uint64_t bands, records;  // offsets: the first row of each section in each band and after the last; 0 for none
  uint64_t scale, indptr, index, delta, outlier_row;  // offsets; 0 for none; see matmul_outliers.h
  Section section[MOST_BITS + 1];

  template <class T>
  const T* at(uint64_t offset) const {
    return reinterpret_cast<const T*>(reinterpret_cast<const char*>(this) + offset);
  }
};

// Of a section's tables, where each row has one.
inline size_t table_bytes(const Packed& p, const Section& s) {
  return p.blocks.block ? 0 : table_entries(s.bits) * sizeof(uint16_t);
}

constexpr uint64_t MAGIC = 0x31766d7174616d71;

constexpr size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

inline size_t record_bytes(const Packed& p, const Section& s) {
  return round_up(table_bytes(p, s) + s.channel_bytes(), LINE);
}

// Offset of the record of row `number` of a section, which is of this band.
inline uint64_t record_of(const Packed& p, uint32_t band, int section, uint32_t number) {
  const auto *begin = p.at<uint32_t>(p.bands) + static_cast<size_t>(band) * p.sections, *end = begin + p.sections;
  uint64_t offset = p.records;
  for (int i = 0; i < p.sections; ++i) {
    offset += record_bytes(p, p.section[i]) * (i < section ? end[i] : i == section ? number : begin[i]);
  }
  return offset;
}

// Floats from one row of prepared activations to the next. They are padded with zeros to a whole unit, as codes of the
// padding count nothing; and then by what keeps the same columns of several rows from one place in a cache.
inline size_t x_stride(uint64_t cols) { return ((cols + UNIT - 1) / UNIT | 1) * UNIT + LANES; }
inline size_t x_stride(const Packed& p) { return x_stride(p.cols); }

// What a thread has for bands: prepared activations [2][x_stride], and where columns have codebooks the band that it
// decoded last [columns][LANES], as hosts come back to it with other activations.
struct KeptBand {
  uint64_t serial, band;
};
struct BandWorkspace {
  KeptBand* kept;
  float *x, *decoded;
};

// The inner loops for one set of instructions. x: prepared activations [batch][x_stride], of columns in their sorted
// order from the section's first on; batch 1..MOST_OF_ROWS or MOST_OF_COLUMNS, and where it lacks one to fours there is
// one more to read. With more than FEW rows of activations they add outliers, too.
struct Kernels {
  // The rows begin..end-1 of a section, begin the first of a tile, into y [batch][rows].
  void (*rows)(const Packed&, const Section&, uint32_t begin, uint32_t end, const float* x, int batch, float* y);
  // Adds what a section's columns add to one half of a unit of rows to sums [batch][HALF_UNIT].
  void (*columns)(const Packed&, const Section&, uint32_t half, const float* x, int batch, float* sums);
  // A band of rows, y [batch][BAND]; x: one or two rows of activations as they come.
  void (*band)(const Packed&, uint32_t number, const float* const* x, int batch, const BandWorkspace&, float* y);
};

const Kernels* kernels_of(int level);         // null where this processor does not have it
const Packed* packed_at(const void* packed);  // null where it is none

extern const Kernels scalar_kernels;
#if VECTOR_UNITS
extern const Kernels avx2_kernels, avx512_kernels;
#endif

}  // namespace matmul
