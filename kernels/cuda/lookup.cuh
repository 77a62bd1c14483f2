// From codes to weights by tables in shared memory, for two columns at once where such a table is small enough.
//
// Of rows, entry e of the row of a lane is word e * 32 + lane: each lane has a bank of its own, whatever the codes are.
// Of columns, all lanes look into the table of the same column: up to 32 words, or the same word, no bank is asked twice.
#pragma once

#include "packed.cuh"

#if !defined(AQ_AXIS) || !defined(AQ_WIDTHS)
#error "AQ_AXIS: 0 where rows have codebooks, 1 where columns have. AQ_WIDTHS: bit b is set where channels may have b bits"
#endif
constexpr int MOST_BITS = 8;

template <int BITS>
struct Table {
  static constexpr bool PAIRS = BITS <= (AQ_AXIS == 0 ? 4 : 2);
  static constexpr int INDEX_BITS = PAIRS ? 2 * BITS : BITS;
  static constexpr u32 ENTRIES = 1u << INDEX_BITS, MASK = (1u << BITS) - 1;
  static constexpr u32 COLUMNS = BITS <= 5 ? GROUP : STEP;  // that tables are held of at a time
  static constexpr u32 WORDS = AQ_AXIS == 0 ? ENTRIES * TILE : ENTRIES * (PAIRS ? COLUMNS / 2 : COLUMNS);

  // All threads of the block: a pair of FP16 numbers, or an FP32 number, a word.
  AQ_DEVICE static void build(const u16* stored, u32* table) {
    for (u32 i = thread_index(); i < WORDS; i += threads_of_block()) {
      u32 first = i, second = 0;  // in what is stored
      if constexpr (AQ_AXIS == 0 && PAIRS) {
        const u32 entry = i / TILE, lane = i % TILE;
        first = (entry & MASK) * TILE + lane, second = (entry >> BITS) * TILE + lane;
      } else if constexpr (PAIRS) {
        const u32 pair = i >> INDEX_BITS, entry = i & (ENTRIES - 1);
        first = (2 * pair << BITS) + (entry & MASK), second = ((2 * pair + 1) << BITS) + (entry >> BITS);
      }
      const u16 half = load(stored + first);
      store_shared(table + i, PAIRS ? half | static_cast<u32>(load(stored + second)) << 16
                                    : float_to_bits(half_to_float(half)));
    }
  }

  // The word for the codes from `code` of a group on; column: of those that tables are held of.
  AQ_DEVICE static u32 word(const u32* table, u32 lane, const Words<BITS>& words, int code, u32 column) {
    const u32 index = words.template field<INDEX_BITS>(BITS * code);
    return load_shared(table + (AQ_AXIS == 0 ? index * TILE + lane : ((PAIRS ? column / 2 : column) << INDEX_BITS) + index));
  }

  // Weights of two columns, the first one even.
  AQ_DEVICE static float2 floats(const u32* table, u32 lane, const Words<BITS>& words, int code, u32 column) {
    float2 two;
    const u32 one = word(table, lane, words, code, column);
    if constexpr (PAIRS) {
      two.x = half_to_float(static_cast<u16>(one)), two.y = half_to_float(static_cast<u16>(one >> 16));
    } else {
      two.x = bits_to_float(one), two.y = bits_to_float(word(table, lane, words, code + 1, column + 1));
    }
    return two;
  }

  // The same as a pair of FP16 numbers.
  AQ_DEVICE static u32 halves(const u32* table, u32 lane, const Words<BITS>& words, int code, u32 column) {
    if constexpr (PAIRS) return word(table, lane, words, code, column);
    const float2 two = floats(table, lane, words, code, column);
    return float_to_half(two.x) | static_cast<u32>(float_to_half(two.y)) << 16;
  }
};

// Words of the largest table of any width.
template <int BITS = 0>
AQ_DEVICE constexpr u32 table_words() {
  if constexpr (BITS > MOST_BITS) {
    return 0;
  } else {
    constexpr u32 others = table_words<BITS + 1>(), own = (AQ_WIDTHS >> BITS & 1) ? Table<BITS>::WORDS : 0;
    return own > others ? own : others;
  }
}

// Calls Work<b>::run for a width b among AQ_WIDTHS.
template <template <int> class Work, int BITS = 0, class... Arguments>
AQ_DEVICE void for_width(u32 bits, Arguments&... arguments) {
  if constexpr (BITS <= MOST_BITS) {
    if constexpr ((AQ_WIDTHS >> BITS & 1) != 0) {
      if (bits == BITS) return Work<BITS>::run(arguments...);
    }
    for_width<Work, BITS + 1>(bits, arguments...);
  }
}

// What outliers add to the products of a tile's rows, by all threads of the block: sums [COUNT][TILE] in shared memory.
template <int COUNT>
AQ_DEVICE void outlier_sums(const u8* matrix, const Matrix& m, const Task& task, const Activations& x, float* sums) {
  const u32 lane = thread_index() % LANES;
  for (u32 row = thread_index() / LANES; row < task.count; row += threads_of_block() / LANES) {
    const u32* indptr = at<u32>(matrix, m.indptr) + load(at<u32>(matrix, m.order) + task.first + row);
    const u32 end = load(indptr + 1);
    float sum[COUNT] = {};
    for (u32 i = load(indptr) + lane; i < end; i += LANES) {
      const u32 column = outlier_column(matrix, m, i);
      const float delta = load(at<float>(matrix, m.delta) + i);
#pragma unroll
      for (int b = 0; b < COUNT; ++b) sum[b] += delta * x.at(b, column);
    }
#pragma unroll
    for (int b = 0; b < COUNT; ++b) {
      for (u32 flipped = LANES / 2; flipped; flipped /= 2) sum[b] += from_lane_xor(sum[b], flipped);
      if (lane == 0) store_shared(sums + b * TILE + row, sum[b]);
    }
  }
}
