// Products with many rows of activations: codes become floats that stay in the first cache, and tiles of sums stay in
// registers. See matmul_codes.h.
#pragma once

constexpr int STEP_COLUMNS = 32;  // that are decoded at once where columns have codebooks

// Adds to sums [ROWS][BATCH] of vectors, r_sum and LANES floats apart, the products of w [ROWS][UNIT] and x, lane by lane.
template <int ROWS, int BATCH>
void dots(const float* w, int columns, const float* x, size_t x_row, float* sums, size_t r_sum) {
  Floats sum[ROWS][BATCH];
  load_sums(sums, r_sum, LANES, sum);
  for (int k = 0; k < columns; k += LANES) {
    Floats value[ROWS];
    UNROLL for (int r = 0; r < ROWS; ++r) value[r] = load(w + r * UNIT + k);
    UNROLL for (int b = 0; b < BATCH; ++b) {
      const Floats factor = load(x + b * x_row + k);
      UNROLL for (int r = 0; r < ROWS; ++r) sum[r][b] = fma(value[r], factor, sum[r][b]);
    }
  }
  store_sums(sum, sums, r_sum, LANES);
}

// Adds to sums [BATCH][HALF_UNIT], of which COUNT groups are done, the products of w [columns][HALF_UNIT] and x.
template <int COUNT, int BATCH>
void outer(const float* w, int columns, const float* x, size_t x_row, float* sums) {
  Floats sum[COUNT][BATCH];
  load_sums(sums, LANES, HALF_UNIT, sum);
  for (int k = 0; k < columns; ++k, w += HALF_UNIT) {
    Floats value[COUNT];
    UNROLL for (int g = 0; g < COUNT; ++g) value[g] = load(w + g * LANES);
    UNROLL for (int b = 0; b < BATCH; ++b) {
      const Floats factor = spread(x[b * x_row + k]);
      UNROLL for (int g = 0; g < COUNT; ++g) sum[g][b] = fma(value[g], factor, sum[g][b]);
    }
  }
  store_sums(sum, sums, LANES, HALF_UNIT);
}

// Calls function(integral constant) for a number of 1..MANY_BATCH.
template <int N = MANY_BATCH, class Function>
INLINE void with_batch(int batch, Function function) {
  if constexpr (N == 1) {
    function(Constant<1>());
  } else if (batch == N) {
    function(Constant<N>());
  } else {
    with_batch<N - 1>(batch, function);
  }
}

// Rows of a tile in FP32, out [tile][UNIT]: the columns of unit u, or from units on, of the chunks; how many they are.
template <template <int, int> class Values, int BITS>
int decode_rows(const Packed& p, const Section& s, const uint8_t* codes, int tile, uint32_t row, uint32_t u,
                float* out) {
  const size_t stride = static_cast<size_t>(LINE) * tile;
  const uint8_t* unit = codes + u * unit_bytes(BITS) * tile;
  for (int r = 0; r < tile; ++r, out += UNIT) {
    Values<BITS, 1> values(p, s, row + r);
    values.begin(u);
    const auto put = [&](Ints index, int group) INLINE_LAMBDA {
      store(out + group * LANES, values.value(0, index, group));
    };
    if (u < s.units) {
      for (int step = 0; step < STEPS<BITS>; ++step) {
        Codes<BITS> some;
        some.load(unit + r * LINE, stride, step);
        UNROLL for (int i = 0; i < STEP_GROUPS<BITS>; ++i) put(some.index(i), step * STEP_GROUPS<BITS> + i);
      }
      continue;
    }
    for (uint32_t c = 0; c < s.chunks; ++c) {
      each_chunk_index<BITS>(unit + (c * tile + r) * chunk_bytes(BITS), [&](Ints index, int group) INLINE_LAMBDA {
        put(index, c * CHUNK_GROUPS + group);
      });
    }
  }
  return u < s.units ? UNIT : static_cast<int>(s.chunks) * CHUNK;
}

template <template <int, int> class Values, int BITS>
void rows_for_many(const Packed& p, const Section& s, uint32_t begin, uint32_t end, const float* x, int batch,
                   float* y) {
  alignas(LINE) float w[TILE * UNIT];
  const auto add = [&](const uint8_t* codes, int tile, uint32_t row, uint32_t u, float* sums, size_t r_sum) {
    const int columns = decode_rows<Values, BITS>(p, s, codes, tile, row, u, w);
    for (int b = 0; b < batch; b += MANY_BATCH) {
      with_batch(batch - b < MANY_BATCH ? batch - b : MANY_BATCH, [&](auto some) INLINE_LAMBDA {
        const float* from = x + b * x_stride(p) + u * UNIT;
        if (tile == 1) return dots<1, some.value>(w, columns, from, x_stride(p), sums + b * LANES, r_sum);
        for (int r = 0; r < TILE; r += MANY_ROWS) {
          dots<MANY_ROWS, some.value>(w + r * UNIT, columns, from, x_stride(p), sums + r * r_sum + b * LANES, r_sum);
        }
      });
    }
  };
  tile_by_tile<BITS, MOST_BATCH>(p, s, begin, end, batch, y, add);
}

// Columns first..first+count-1 in FP32, out [count][HALF_UNIT]: their codes for half a unit of rows, or what chunks
// there are in its place; how many groups that is.
template <int BITS>
int decode_columns(const Packed& p, const Section& s, uint32_t half, uint32_t first, int count, float* out) {
  constexpr int steps = STEPS<BITS> / 2;
  const uint32_t unit = half / 2, begin = half % 2 * steps;
  const size_t stride = static_cast<size_t>(LINE) * s.count;
  const auto* base = p.at<uint8_t>(s.codes);
  const auto* entries = p.at<uint16_t>(s.tables) + first * table_entries(BITS);
  const uint8_t* codes = base + unit * unit_bytes(BITS) * s.count + static_cast<size_t>(first) * LINE;
  const uint32_t chunk = (unit - s.units) * UNIT / CHUNK + half % 2 * HALF_UNIT / CHUNK;
  const bool whole = unit < s.units;
  const int left = whole || chunk > s.chunks ? 0 : static_cast<int>(s.chunks - chunk);
  const int chunks = left < HALF_UNIT / CHUNK ? left : HALF_UNIT / CHUNK;
  const uint8_t* tail = base + (s.units * unit_bytes(BITS) + chunk * chunk_bytes(BITS)) * s.count;
  for (int k = 0; k < count; ++k, out += HALF_UNIT) {
    Table<BITS> table;
    load_table<BITS>(entries + k * table_entries(BITS), &table);
    for (int step = 0; whole && step < steps; ++step) {
      Codes<BITS> some;
      some.load(codes + k * LINE, stride, begin + step);
      UNROLL for (int i = 0; i < STEP_GROUPS<BITS>; ++i) {
        store(out + (step * STEP_GROUPS<BITS> + i) * LANES, lookup(table, some.index(i)));
      }
    }
    for (int c = 0; c < chunks; ++c) {
      const uint8_t* at = tail + (static_cast<size_t>(c) * s.count + first + k) * chunk_bytes(BITS);
      each_chunk_index<BITS>(at, [&](Ints index, int group) INLINE_LAMBDA {
        store(out + (c * CHUNK_GROUPS + group) * LANES, lookup(table, index));
      });
    }
  }
  return whole ? GROUPS / 2 : chunks * CHUNK_GROUPS;
}

template <int BITS>
void columns_for_many(const Packed& p, const Section& s, uint32_t half, const float* x, int batch, float* sums) {
  alignas(LINE) float w[STEP_COLUMNS * HALF_UNIT];
  for (uint32_t first = 0; first < s.count; first += STEP_COLUMNS) {
    const int count = static_cast<int>(s.count - first < STEP_COLUMNS ? s.count - first : STEP_COLUMNS);
    const int groups = decode_columns<BITS>(p, s, half, first, count, w);
    for (int b = 0; b < batch; b += MANY_BATCH) {
      with_batch(batch - b < MANY_BATCH ? batch - b : MANY_BATCH, [&](auto some) INLINE_LAMBDA {
        const float* from = x + b * x_stride(p) + first;
        for (int g = 0; g < groups; g += MANY_ROWS) {  // groups are fours or more
          outer<MANY_ROWS, some.value>(w + g * LANES, count, from, x_stride(p), sums + b * HALF_UNIT + g * LANES);
        }
      });
    }
  }
}
