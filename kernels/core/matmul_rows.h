// Products with the rows of a section, for one and for a few rows of activations; see matmul_codes.h.
#pragma once

// How far ahead codes are asked for: bytes, with one row of activations and with more. Measured on a
// processor that reads memory at 25 GB/s a core; without, it waits for a third of the time, as what it foresees by itself
// ends at every page.
constexpr size_t AHEAD_OF_ONE = 12 << 10, AHEAD_OF_FEW = 4 << 10;

// Where the codes of some rows lie: distances in bytes, from a row to the next and from a unit, a word, a chunk.
struct Lines {
  const uint8_t* units;
  size_t row, unit, word;
  const uint8_t* chunks;
  size_t row_of_chunk, chunk;
};

// Of those of a tile, from its row `first` on.
template <int BITS>
INLINE Lines lines_of_tile(const Section& s, const uint8_t* codes, int tile, int first) {
  const size_t unit = unit_bytes(BITS) * tile, chunk = chunk_bytes(BITS);
  const size_t word = static_cast<size_t>(LINE) * tile;
  return {codes + first * LINE, LINE, unit, word, codes + s.units * unit + first * chunk, chunk, chunk * tile};
}

// Adds to sums what unit u of ROWS rows, or after the last unit the chunks that are left, make of x: activations from that
// unit on, in rows x_row apart. Sums are spread over CHAINS, so that an addition need not wait for the one before it.
template <int BITS, int CHAINS, int ROWS, int BATCH, class Values>
INLINE void add_unit(const Section& s, const Lines& lines, uint32_t u, const float* x, size_t x_row, Values* values,
                     Floats (&sums)[CHAINS][ROWS][BATCH]) {
  constexpr int groups = STEP_GROUPS<BITS>;
  values->begin(u, 0, GROUPS);
  if (u < s.units) {
    const uint8_t* codes = lines.units + u * lines.unit;
    for (int step = 0; step < STEPS<BITS>; ++step, x += groups * LANES) {
      Codes<BITS> some[ROWS];
      UNROLL for (int r = 0; r < ROWS; ++r) some[r].load(codes + r * lines.row, lines.word, step);
      if constexpr (BATCH == 1) {  // all activations of the step stay in registers
        UNROLL for (int r = 0; r < ROWS; ++r) {
          UNROLL for (int i = 0; i < groups; ++i) {
            Floats& total = sums[i % CHAINS][r][0];
            total = fma(values->value(r, some[r].index(i), step * groups + i), load(x + i * LANES), total);
          }
        }
      } else {
        UNROLL for (int i = 0; i < groups; ++i) {
          Floats factor[BATCH];
          UNROLL for (int b = 0; b < BATCH; ++b) factor[b] = load(x + b * x_row + i * LANES);
          UNROLL for (int r = 0; r < ROWS; ++r) {
            const Floats value = values->value(r, some[r].index(i), step * groups + i);
            UNROLL for (int b = 0; b < BATCH; ++b) {
              sums[i % CHAINS][r][b] = fma(value, factor[b], sums[i % CHAINS][r][b]);
            }
          }
        }
      }
    }
    return;
  }
  for (uint32_t c = 0; c < s.chunks; ++c, x += CHUNK) {
    UNROLL for (int r = 0; r < ROWS; ++r) {
      each_chunk_index<BITS>(lines.chunks + c * lines.chunk + r * lines.row_of_chunk, [&](Ints index, int group) INLINE_LAMBDA {
        const Floats value = values->value(r, index, c * CHUNK_GROUPS + group);
        UNROLL for (int b = 0; b < BATCH; ++b) {
          Floats& total = sums[group % CHAINS][r][b];
          total = fma(value, load(x + b * x_row + group * LANES), total);
        }
      });
    }
  }
}

// Asks for the codes of a unit that comes so many bytes later, in this tile or the next one.
template <int BITS>
INLINE void fetch_ahead(const uint8_t* codes, int tile, uint32_t u, size_t distance) {
  codes += u * unit_bytes(BITS) * tile + distance;
  for (size_t at = 0; at < unit_bytes(BITS) * tile; at += LINE) __builtin_prefetch(codes + at);
}

// ROWS rows of a tile with one row of activations, the first of them in place `first` of it and row `row` of the section.
template <template <int, int> class Values, int BITS, int ROWS>
void some_rows(const Packed& p, const Section& s, const uint8_t* codes, int tile, int first, uint32_t row,
               const float* x, const uint32_t* order, float* y) {
  Values<BITS, ROWS> values(p, s, row);
  const Lines lines = lines_of_tile<BITS>(s, codes, tile, first);
  Floats sums[1][ROWS][1];
  UNROLL for (int r = 0; r < ROWS; ++r) sums[0][r][0] = zeros();
  for (uint32_t u = 0; u < s.units + (s.chunks > 0); ++u, x += UNIT) {
    if (first == 0) fetch_ahead<BITS>(codes, tile, u, AHEAD_OF_ONE);
    add_unit<BITS>(s, lines, u, x, 0, &values, sums);
  }
  UNROLL for (int r = 0; r < ROWS; ++r) y[order[r]] = sum(sums[0][r][0]);
}

// The rows begin..end-1 of a section, begin the first of a tile, for one row of activations.
template <template <int, int> class Values, int BITS>
void rows_for_one(const Packed& p, const Section& s, uint32_t begin, uint32_t end, const float* x, float* y) {
  constexpr int ROWS = rows_together(BITS, 1);
  const auto* order = p.at<uint32_t>(p.order) + s.first;
  for (uint32_t row = begin; row < end;) {
    const uint8_t* codes = p.at<uint8_t>(s.codes) + row * s.channel_bytes();
    if (row >= s.tiled) {
      some_rows<Values, BITS, 1>(p, s, codes, 1, 0, row, x, order + row, y);
      ++row;
      continue;
    }
    for (int first = 0; first < TILE; first += ROWS, row += ROWS) {
      some_rows<Values, BITS, ROWS>(p, s, codes, TILE, first, row, x, order + row, y);
    }
  }
}

// Adds to sums, BATCH vectors for each row, rows r_sum floats apart, what unit u of a tile makes of x.
template <template <int, int> class Values, int BITS, int ROWS, int BATCH>
void unit_of_tile(const Packed& p, const Section& s, const uint8_t* codes, int tile, uint32_t row, uint32_t u,
                  const float* x, float* sums, size_t r_sum) {
  for (int first = 0; first < tile; first += ROWS, sums += ROWS * r_sum) {
    Values<BITS, ROWS> values(p, s, row + first);
    Floats sum[1][ROWS][BATCH];
    load_sums(sums, r_sum, LANES, sum[0]);
    add_unit<BITS>(s, lines_of_tile<BITS>(s, codes, tile, first), u, x, x_stride(p), &values, sum);
    store_sums(sum[0], sums, r_sum, LANES);
  }
}

// For 2 to FEW rows of activations: tile by tile, and unit by unit, so that its codes stay in a cache while all
// activations are multiplied with them, four at a time.
template <template <int, int> class Values, int BITS>
void rows_for_few(const Packed& p, const Section& s, uint32_t begin, uint32_t end, const float* x, int batch,
                  float* y) {
  const size_t r_sum = round_up(batch, 4) * LANES;
  const auto* order = p.at<uint32_t>(p.order) + s.first;
  alignas(LINE) float sums[TILE * FEW * LANES];
  for (uint32_t row = begin; row < end;) {
    const int tile = row < s.tiled ? TILE : 1;
    const uint8_t* codes = p.at<uint8_t>(s.codes) + row * s.channel_bytes();
    memset(sums, 0, tile * r_sum * sizeof(float));
    for (uint32_t u = 0; u < s.units + (s.chunks > 0); ++u) {
      fetch_ahead<BITS>(codes, tile, u, AHEAD_OF_FEW);
      with_fours(batch, [&](auto some, int b) INLINE_LAMBDA {
        constexpr int BATCH = some.value, ROWS = rows_together(BITS, BATCH);
        const float* from = x + b * x_stride(p) + u * UNIT;
        float* to = sums + b * LANES;
        if (tile == 1) return unit_of_tile<Values, BITS, 1, BATCH>(p, s, codes, 1, row, u, from, to, r_sum);
        unit_of_tile<Values, BITS, ROWS, BATCH>(p, s, codes, TILE, row, u, from, to, r_sum);
      });
    }
    for (int r = 0; r < tile; ++r, ++row) {
      for (int b = 0; b < batch; ++b) {
        y[static_cast<size_t>(b) * p.rows + order[row]] = sum(load(sums + r * r_sum + b * LANES));
      }
    }
  }
}
