// Products with one section of a packed matrix, over the sixteen lanes that the file defines which includes this.
//
// Every code is looked up once and multiplied with all rows of activations. Sums stay in registers, where they are
// kept by loops of fixed length.
#pragma once

// A unit is decoded in steps, a word of codes in each; with 3 bits in one.
template <int BITS>
constexpr int STEPS = BITS == 5 || BITS == 6 ? 4 : BITS == 3 ? 1 : stored_bits(BITS);
template <int BITS>
constexpr int STEP_GROUPS = GROUPS / STEPS<BITS>;

// Calls add(index, group) for the groups FROM to TO - 1 of a step; words of one channel are stride bytes apart.
template <int BITS, int FROM, int TO, class Do>
INLINE void each_index(const uint8_t* codes, size_t stride, int step, Do add) {
  if constexpr (BITS == 3) {
    const Ints a = words(codes), b = words(codes + stride);
    if constexpr (FROM < 8) {
      UNROLL for (int i = 0; i < 8; ++i) add(a >> 4 * i, i);
    }
    if constexpr (FROM < 16) {
      UNROLL for (int i = 0; i < 8; ++i) add(b >> 4 * i, 8 + i);
    }
    if constexpr (TO > 16) {
      const Ints c = words(codes + 2 * stride);
      UNROLL for (int i = 0; i < 8; ++i) add(c >> 4 * i, 16 + i);
      const Ints d = choose(0x11111111, a >> 3, choose(0x22222222, b >> 2, c >> 1));
      UNROLL for (int i = 0; i < 8; ++i) add(d >> 4 * i, 24 + i);
    }
  } else if constexpr (BITS == 5 || BITS == 6) {
    constexpr int high = BITS - 4, per_word = 32 / high;
    const Ints nibbles = words(codes + step * stride);
    const Ints above = words(codes + (4 + step * 8 / per_word) * stride) >> step * 8 % per_word * high;
    UNROLL for (int i = 0; i < 8; ++i) {
      const int by = i * high - 4;
      add(choose(15, nibbles >> 4 * i, by < 0 ? above << -by : above >> by), step * 8 + i);
    }
  } else {
    constexpr int width = stored_bits(BITS);
    const Ints word = words(codes + step * stride);
    UNROLL for (int i = FROM; i < TO; ++i) add(word >> width * i, step * STEP_GROUPS<BITS> + i);
  }
}

template <int BITS, class Do>
INLINE void each_chunk_index(const uint8_t* codes, Do add) {
  const Ints word = BITS <= 4 ? halves(codes) : words(codes);
  UNROLL for (int i = 0; i < CHUNK_GROUPS; ++i) add(word >> (BITS <= 4 ? 4 : 8) * i, i);
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
  INLINE void begin(uint32_t) {}
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
  // Of the groups of a unit, or of the chunks that are left.
  INLINE void begin(uint32_t unit) {
    const Blocks& of = p.blocks;
    const uint32_t per_block = of.block / LANES, first = unit * (UNIT / of.block);
    for (int r = 0; r < ROWS; ++r) {
      const size_t start = static_cast<size_t>(row + r) * of.blocks;
      for (uint32_t i = 0; i < GROUPS / per_block && first + i < of.blocks; ++i) {
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

// ROWS rows of a tile, the first of them in place `first` of it and row `row` of the section; y[r * BATCH + b].
template <template <int, int> class Values, int BITS, int ROWS, int BATCH>
void some_rows(const Packed& p, const Section& s, const uint8_t* codes, int tile, int first, uint32_t row,
               const float* x, float* y) {
  Values<BITS, ROWS> values(p, s, row);
  Floats sums[ROWS][BATCH];
  UNROLL for (int r = 0; r < ROWS; ++r) {
    UNROLL for (int b = 0; b < BATCH; ++b) sums[r][b] = zeros();
  }
  const size_t stride = static_cast<size_t>(LINE) * tile, x_row = padded(p);
  const auto add_product = [&](int r, Floats value, const float* at) INLINE_LAMBDA {
    UNROLL for (int b = 0; b < BATCH; ++b) sums[r][b] = fma(value, load(at + b * x_row), sums[r][b]);
  };
  for (uint32_t u = 0; u < s.units; ++u, codes += unit_bytes(BITS) * tile, x += UNIT) {
    values.begin(u);
    for (int step = 0; step < STEPS<BITS>; ++step) {
      UNROLL for (int r = 0; r < ROWS; ++r) {
        const uint8_t* start = codes + (first + r) * LINE;
        each_index<BITS, 0, STEP_GROUPS<BITS>>(start, stride, step, [&](Ints index, int group) INLINE_LAMBDA {
          add_product(r, values.value(r, index, group), x + group * LANES);
        });
      }
    }
  }
  if (s.chunks) values.begin(s.units);
  for (uint32_t c = 0; c < s.chunks; ++c, codes += chunk_bytes(BITS) * tile, x += CHUNK) {
    UNROLL for (int r = 0; r < ROWS; ++r) {
      each_chunk_index<BITS>(codes + (first + r) * chunk_bytes(BITS), [&](Ints index, int group) INLINE_LAMBDA {
        add_product(r, values.value(r, index, c * CHUNK_GROUPS + group), x + group * LANES);
      });
    }
  }
  UNROLL for (int r = 0; r < ROWS; ++r) {
    UNROLL for (int b = 0; b < BATCH; ++b) y[r * BATCH + b] = sum(sums[r][b]);
  }
}

// The rows begin..end-1 of a section; begin is the first of a tile.
template <template <int, int> class Values, int BITS, int BATCH>
void rows_of_width(const Packed& p, const Section& s, uint32_t begin, uint32_t end, const float* x, int batch,
                   float* y) {
  constexpr int ROWS = rows_together(BITS, BATCH);
  const auto* order = p.at<uint32_t>(p.order) + s.first;
  const uint32_t whole = s.count / TILE * TILE;
  float sums[ROWS * BATCH];
  const auto put = [&](uint32_t row, const float* of) {
    for (int b = 0; b < batch; ++b) y[static_cast<size_t>(b) * p.rows + order[row]] = of[b];
  };
  for (uint32_t row = begin; row < end;) {
    const uint8_t* codes = p.at<uint8_t>(s.codes) + row * s.channel_bytes();
    if (row >= whole) {
      some_rows<Values, BITS, 1, BATCH>(p, s, codes, 1, 0, row, x, sums);
      put(row++, sums);
      continue;
    }
    for (int first = 0; first < TILE; first += ROWS) {
      some_rows<Values, BITS, ROWS, BATCH>(p, s, codes, TILE, first, row + first, x, sums);
      for (int r = 0; r < ROWS; ++r) put(row + first + r, sums + r * BATCH);
    }
    row += TILE;
  }
}

// The steps of half a unit, and the groups of each that are of that half: with 1 and 3 bits one step holds both.
template <int BITS, int HALF>
struct Half {
  static constexpr bool split = STEPS<BITS> == 1;
  static constexpr int steps = split ? 1 : STEPS<BITS> / 2, begin = split ? 0 : HALF * steps;
  static constexpr int from = split ? HALF * GROUPS / 2 : 0, to = split ? from + GROUPS / 2 : STEP_GROUPS<BITS>;
};

// Adds to sums [BATCH][HALF_UNIT] what the columns of a section add to half a unit of rows.
template <int BITS, int HALF, int BATCH>
void half_unit(const Packed& p, const Section& s, uint32_t unit, const float* x, float* sums) {
  using Of = Half<BITS, HALF>;
  // With 8 bits all steps of the half in one pass, as the table is long; else one after the other, in registers.
  constexpr int together = BITS >= 7 ? Of::steps : 1, groups = (Of::to - Of::from) * together;
  const size_t stride = static_cast<size_t>(LINE) * s.count;
  const uint8_t* codes = p.at<uint8_t>(s.codes) + unit * unit_bytes(BITS) * s.count;
  const auto* entries = p.at<uint16_t>(s.tables);
  const size_t x_row = padded(p);
  for (int step = Of::begin; step < Of::begin + Of::steps; step += together) {
    const int first = step * STEP_GROUPS<BITS> + Of::from;
    float* out = sums + (first - HALF * GROUPS / 2) * LANES;
    Floats sum[groups][BATCH];
    load_sums(out, LANES, HALF_UNIT, sum);
    for (uint32_t k = 0; k < s.count; ++k) {
      Table<BITS> table;
      load_table<BITS>(entries + k * table_entries(BITS), &table);
      Floats factor[BATCH];
      UNROLL for (int b = 0; b < BATCH; ++b) factor[b] = spread(x[b * x_row + k]);
      UNROLL for (int t = 0; t < together; ++t) {
        each_index<BITS, Of::from, Of::to>(codes + k * LINE, stride, step + t, [&](Ints index, int group) INLINE_LAMBDA {
          const Floats value = lookup(table, index);
          UNROLL for (int b = 0; b < BATCH; ++b) sum[group - first][b] = fma(value, factor[b], sum[group - first][b]);
        });
      }
    }
    store_sums(sum, out, LANES, HALF_UNIT);
  }
}

// The same for a chunk of rows, out [BATCH][HALF_UNIT].
template <int BITS, int BATCH>
void one_chunk(const Packed& p, const Section& s, uint32_t chunk, const float* x, float* out) {
  const uint8_t* codes = p.at<uint8_t>(s.codes) + s.units * unit_bytes(BITS) * s.count;
  codes += chunk * chunk_bytes(BITS) * s.count;
  const auto* entries = p.at<uint16_t>(s.tables);
  Floats sum[CHUNK_GROUPS][BATCH];
  load_sums(out, LANES, HALF_UNIT, sum);
  for (uint32_t k = 0; k < s.count; ++k) {
    Table<BITS> table;
    load_table<BITS>(entries + k * table_entries(BITS), &table);
    each_chunk_index<BITS>(codes + k * chunk_bytes(BITS), [&](Ints index, int group) INLINE_LAMBDA {
      const Floats value = lookup(table, index);
      UNROLL for (int b = 0; b < BATCH; ++b) sum[group][b] = fma(value, spread(x[b * padded(p) + k]), sum[group][b]);
    });
  }
  store_sums(sum, out, LANES, HALF_UNIT);
}

template <int BITS, int BATCH>
void columns_of_width(const Packed& p, const Section& s, uint32_t half, const float* x, float* sums) {
  const uint32_t unit = half / 2;
  if (unit < s.units) {
    if (half % 2) {
      half_unit<BITS, 1, BATCH>(p, s, unit, x, sums);
    } else {
      half_unit<BITS, 0, BATCH>(p, s, unit, x, sums);
    }
    return;
  }
  const uint32_t first = (unit - s.units) * UNIT / CHUNK + half % 2 * HALF_UNIT / CHUNK;
  for (uint32_t c = first; c < s.chunks && c < first + HALF_UNIT / CHUNK; ++c) {
    one_chunk<BITS, BATCH>(p, s, c, x, sums + (c - first) * CHUNK);
  }
}

