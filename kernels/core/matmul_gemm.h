// Products with many rows of activations: codes become floats that stay in the first cache, and tiles of sums stay in
// registers, of which the lanes are rows of the matrix. See matmul_codes.h.
#pragma once

// Calls function(integral constant) for n, or for MOST if it is more.
template <int MOST, class Function>
INLINE void with_most(int n, Function function) {
  if constexpr (MOST == 1) {
    function(Constant<1>());
  } else if (n >= MOST) {
    function(Constant<MOST>());
  } else {
    with_most<MOST - 1>(n, function);
  }
}

// Adds to sums [BATCH][STRIDE], of which COUNT groups are done, the products of w [columns][STRIDE] and x.
template <int STRIDE, int COUNT, int BATCH>
void outer(const float* w, int columns, const float* x, size_t x_row, float* sums) {
  Floats sum[COUNT][BATCH];
  load_sums(sums, LANES, STRIDE, sum);
  for (int k = 0; k < columns; ++k, w += STRIDE) {
    Floats value[COUNT];
    UNROLL for (int g = 0; g < COUNT; ++g) value[g] = load(w + g * LANES);
    UNROLL for (int b = 0; b < BATCH; ++b) {
      const Floats factor = spread(x[b * x_row + k]);
      UNROLL for (int g = 0; g < COUNT; ++g) sum[g][b] = fma(value[g], factor, sum[g][b]);
    }
  }
  store_sums(sum, sums, LANES, STRIDE);
}

// The same for so many groups and rows of activations.
template <int STRIDE>
void outers(const float* w, int groups, int columns, const float* x, size_t x_row, int batch, float* sums) {
  for (int b = 0; b < batch; b += MANY_BATCH) {
    with_most<MANY_BATCH>(batch - b, [&](auto some) INLINE_LAMBDA {
      for (int g = 0; g < groups; g += MANY_ROWS) {
        with_most<MANY_ROWS>(groups - g, [&](auto count) INLINE_LAMBDA {
          outer<STRIDE, count.value, some.value>(w + g * LANES, columns, x + b * x_row, x_row,
                                                 sums + b * STRIDE + g * LANES);
        });
      }
    });
  }
}

// Row `row` of a section in FP32: of unit u the groups of a step, or where there are no more units, of a chunk; how many
// columns that is. Asks for the codes of the next unit.
template <template <int, int> class Values, int BITS>
INLINE int decode_row(const Packed& p, const Section& s, uint32_t row, uint32_t u, int step, float* out) {
  const uint32_t tile = row < s.tiled ? TILE : 1, place = row < s.tiled ? row % TILE : 0;
  const uint8_t* unit = p.at<uint8_t>(s.codes) + (row - place) * s.channel_bytes() + u * unit_bytes(BITS) * tile;
  Values<BITS, 1> values(p, s, row);
  if (u == s.units) {
    values.begin(u, step * CHUNK_GROUPS, CHUNK_GROUPS);
    each_chunk_index<BITS>(unit + (step * tile + place) * chunk_bytes(BITS), [&](Ints index, int group) INLINE_LAMBDA {
      store(out + group * LANES, values.value(0, index, step * CHUNK_GROUPS + group));
    });
    return CHUNK;
  }
  constexpr int groups = STEP_GROUPS<BITS>, words = stored_bits(BITS);
  const size_t stride = static_cast<size_t>(LINE) * tile;
  unit += place * LINE;
  for (int word = words * step / STEPS<BITS>; word < words * (step + 1) / STEPS<BITS>; ++word) {
    __builtin_prefetch(unit + (words + word) * stride);
  }
  values.begin(u, step * groups, groups);
  Codes<BITS> some;
  some.load(unit, stride, step);
  UNROLL for (int i = 0; i < groups; ++i) store(out + i * LANES, values.value(0, some.index(i), step * groups + i));
  return groups * LANES;
}

// The rows begin..end-1 of a section.
template <template <int, int> class Values, int BITS>
void rows_for_many(const Packed& p, const Section& s, uint32_t begin, uint32_t end, const float* x, int batch,
                   float* y) {
  constexpr int most = (STEP_GROUPS<BITS> > CHUNK_GROUPS ? STEP_GROUPS<BITS> : CHUNK_GROUPS) * LANES;  // columns
  const auto* order = p.at<uint32_t>(p.order) + s.first;
  alignas(LINE) float w[most * BLOCK], lines[LANES * most] = {}, sums[MOST_OF_ROWS * BLOCK];
  for (uint32_t row = begin; row < end; row += BLOCK) {
    const int count = end - row < BLOCK ? static_cast<int>(end - row) : BLOCK;
    uint32_t next[BLOCK];  // outlier of each row
    for (int r = 0; p.outliers && r < count; ++r) next[r] = Outliers(p).indptr[s.first + row + r];
    memset(sums, 0, batch * BLOCK * sizeof(float));
    uint32_t first = 0;
    for (uint32_t i = 0, columns = 0; i < s.units * STEPS<BITS> + s.chunks; ++i, first += columns) {
      const uint32_t u = i / STEPS<BITS> < s.units ? i / STEPS<BITS> : s.units;
      for (int r = 0; r < count; ++r) {
        columns = decode_row<Values, BITS>(p, s, row + r, u, i - u * STEPS<BITS>, lines + r % LANES * most);
        if (r % LANES != LANES - 1 && r != count - 1) continue;
        for (uint32_t k = 0; k < columns; k += LANES) transpose(lines + k, most, w + k * BLOCK + r / LANES * LANES, BLOCK);
      }
      for (int r = 0; p.outliers && r < count; ++r) {
        const Outliers outliers(p);
        for (; next[r] < outliers.indptr[s.first + row + r + 1] && outliers.index[next[r]] < first + columns; ++next[r]) {
          w[(outliers.index[next[r]] - first) * BLOCK + r] += outliers.delta[next[r]];
        }
      }
      outers<BLOCK>(w, (count + LANES - 1) / LANES, columns, x + first, x_stride(p), batch, sums);
    }
    for (int b = 0; b < batch; ++b) {
      for (int r = 0; r < count; ++r) y[static_cast<size_t>(b) * p.rows + order[row + r]] = sums[b * BLOCK + r];
    }
  }
}

constexpr int STEP_COLUMNS = 32;  // that are decoded at once where columns have codebooks

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
  const Outliers outliers(p);
  uint32_t next = p.outliers ? outliers.from(half, s.first) : 0;
  for (uint32_t first = 0; first < s.count; first += STEP_COLUMNS) {
    const int count = static_cast<int>(s.count - first < STEP_COLUMNS ? s.count - first : STEP_COLUMNS);
    const int groups = decode_columns<BITS>(p, s, half, first, count, w);
    const uint32_t place = s.first + first;
    for (; p.outliers && next < outliers.indptr[half + 1] && outliers.index[next] < place + count; ++next) {
      w[(outliers.index[next] - place) * HALF_UNIT + outliers.row[next]] += outliers.delta[next];
    }
    outers<HALF_UNIT>(w, groups, count, x + first, x_stride(p), batch, sums);
  }
}
