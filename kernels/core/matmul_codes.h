// Codes of a packed matrix and what they stand for, over the sixteen lanes that the file defines which includes this.
// Loops of fixed length keep everything in registers.
#pragma once

// A unit is decoded in steps of 8 groups, of 4 where a code takes a byte: so many activations fit into registers.
template <int BITS>
constexpr int STEPS = stored_bits(BITS) == 8 ? 8 : 4;
template <int BITS>
constexpr int STEP_GROUPS = GROUPS / STEPS<BITS>;

// The codes of a step of one channel, whose words are stride bytes apart.
template <int BITS>
struct Codes {
  static constexpr int high = BITS == 5 || BITS == 6 ? BITS - 4 : 0;  // bits above nibbles, in words of their own
  static constexpr int width = BITS == 3 || high ? 4 : stored_bits(BITS);
  Ints word, above;

  INLINE void load(const uint8_t* codes, size_t stride, int step) {
    if constexpr (BITS <= 2) {
      constexpr int steps = 4 / BITS;  // that a word holds
      word = words(codes + step / steps * stride) >> 8 * BITS * (step % steps);
    } else if (BITS != 3 || step < 3) {
      word = words(codes + step * stride);
    } else {  // what is above the nibbles of the others
      const Ints a = words(codes), b = words(codes + stride), c = words(codes + 2 * stride);
      word = choose(0x11111111, a >> 3, choose(0x22222222, b >> 2, c >> 1));
    }
    if constexpr (high > 0) {
      constexpr int per_word = 32 / high;
      above = words(codes + (4 + step * 8 / per_word) * stride) >> step * 8 % per_word * high;
    }
  }
  // Of group i of the step.
  INLINE Ints index(int i) const {
    if constexpr (high == 0) return word >> width * i;
    const int by = i * high - 4;
    return choose(15, word >> width * i, by < 0 ? above << -by : above >> by);
  }
};

template <int BITS, class Do>
INLINE void each_chunk_index(const uint8_t* codes, Do add) {
  const Ints word = BITS <= 4 ? halves(codes) : words(codes);
  UNROLL for (int i = 0; i < CHUNK_GROUPS; ++i) add(word >> (BITS <= 4 ? 4 : 8) * i, i);
}

template <int N>
struct Constant {
  static constexpr int value = N;
};

// Calls function(integral constant, first) for the fours of a batch, then for what is left: for one, two, or a four of
// which the last one does not count.
template <class Function>
INLINE void with_fours(int batch, Function function) {
  int b = 0;
  for (; batch - b > 2; b += 4) function(Constant<4>(), b);
  if (batch - b == 2) function(Constant<2>(), b);
  if (batch - b == 1) function(Constant<1>(), b);
}

// Tiles of sums, which lie `outer` and `inner` floats apart in memory, into registers and back.
template <int COUNT, int BATCH>
INLINE void load_sums(const float* from, size_t outer, size_t inner, Floats (&sum)[COUNT][BATCH]) {
  UNROLL for (int i = 0; i < COUNT; ++i) {
    UNROLL for (int b = 0; b < BATCH; ++b) sum[i][b] = load(from + i * outer + b * inner);
  }
}

template <int COUNT, int BATCH>
INLINE void store_sums(const Floats (&sum)[COUNT][BATCH], float* to, size_t outer, size_t inner) {
  UNROLL for (int i = 0; i < COUNT; ++i) {
    UNROLL for (int b = 0; b < BATCH; ++b) store(to + i * outer + b * inner, sum[i][b]);
  }
}

// What the codes of some rows stand for, where each row has a codebook.
template <int BITS, int ROWS>
struct Codebooks {
  Table<BITS> table[ROWS];

  // The rows row..row+ROWS-1 of a section.
  INLINE Codebooks(const Packed& p, const Section& s, uint32_t row) {
    const uint16_t* entries = p.at<uint16_t>(s.tables) + row * table_entries(BITS);
    UNROLL for (int r = 0; r < ROWS; ++r) load_table<BITS>(entries + r * table_entries(BITS), &table[r]);
  }
  // Rows of bands, whose records are so many bytes apart.
  INLINE Codebooks(const Packed&, uint32_t, const uint8_t* records, size_t bytes) {
    UNROLL for (int r = 0; r < ROWS; ++r) {
      load_table<BITS>(reinterpret_cast<const uint16_t*>(records + r * bytes), &table[r]);
    }
  }
  INLINE void begin(uint32_t, int, int) {}
  INLINE Floats value(int r, Ints index, int) const { return lookup(table[r], index); }
};

// The same where blocks of columns have a scale, and perhaps a zero: (number - zero) * scale.
template <int BITS, int ROWS>
struct Scaled {
  const Packed& p;
  uint32_t row;
  Table<BITS> table;
  float scale[ROWS][GROUPS] = {}, shift[ROWS][GROUPS] = {};  // finite where padding has no block

  INLINE Scaled(const Packed& p, const Section&, uint32_t row) : p(p), row(row) {
    load_table<BITS>(p.at<float>(p.blocks.table), &table);
  }
  INLINE Scaled(const Packed& p, uint32_t row, const uint8_t*, size_t) : p(p), row(row) {
    load_table<BITS>(p.at<float>(p.blocks.table), &table);
  }
  // Of groups group..group+count-1 of a unit, or of the chunks that are left.
  INLINE void begin(uint32_t unit, int group, int count) {
    const Blocks& of = p.blocks;
    const uint32_t per_block = of.block / LANES, first = unit * (UNIT / of.block);
    const uint32_t begin = group / per_block, end = (group + count + per_block - 1) / per_block;
    for (int r = 0; r < ROWS; ++r) {
      const size_t start = static_cast<size_t>(row + r) * of.blocks;
      for (uint32_t i = begin; i < end && first + i < of.blocks; ++i) {
        const uint16_t bits = p.at<uint16_t>(of.scales)[start + first + i];
        const float by = of.bfloat ? from_bfloat(bits) : from_half(bits);
        const float zero = of.zeros ? p.at<uint8_t>(of.zeros)[start + first + i] : 0;
        for (uint32_t g = i * per_block; g < (i + 1) * per_block; ++g) {
          scale[r][g] = by;
          shift[r][g] = -zero * by;
        }
      }
    }
  }
  INLINE Floats value(int r, Ints index, int group) const {
    const Floats number = BITS > 4 && p.blocks.numbers ? numbers<BITS>(index) : lookup(table, index);
    return fma(number, spread(scale[r][group]), spread(shift[r][group]));
  }
};
