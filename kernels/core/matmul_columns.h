// Products with the columns of a section, for one and for a few rows of activations; see matmul_codes.h.
#pragma once

constexpr size_t AHEAD_COLUMNS = 96;  // columns, as in matmul_rows.h

// Adds to sums, BATCH rows that are HALF_UNIT apart, what the columns of a section add to COUNT groups of rows:
// each_index(k, add) calls add(index, group) for those of column k.
template <int BITS, int BATCH, int COUNT, class Indices>
INLINE void add_columns(const Packed& p, const Section& s, const float* x, float* sums, Indices each_index) {
  const size_t x_row = x_stride(p);
  const auto* entries = p.at<uint16_t>(s.tables);
  Floats sum[COUNT][BATCH];
  load_sums(sums, LANES, HALF_UNIT, sum);
  for (size_t k = 0; k < s.count; ++k) {
    Table<BITS> table;
    load_table<BITS>(entries + k * table_entries(BITS), &table);
    Floats factor[BATCH];
    UNROLL for (int b = 0; b < BATCH; ++b) factor[b] = spread(x[b * x_row + k]);
    each_index(k, [&](Ints index, int group) INLINE_LAMBDA {
      const Floats value = lookup(table, index);
      UNROLL for (int b = 0; b < BATCH; ++b) sum[group][b] = fma(value, factor[b], sum[group][b]);
    });
  }
  store_sums(sum, sums, LANES, HALF_UNIT);
}

// For COUNT groups, of which the first is group FIRST of a step.
template <int BITS, int BATCH, int COUNT, int FIRST>
void some_groups(const Packed& p, const Section& s, const uint8_t* codes, int step, const float* x, float* sums) {
  constexpr int per_step = COUNT < STEP_GROUPS<BITS> ? COUNT : STEP_GROUPS<BITS>;
  const size_t stride = static_cast<size_t>(LINE) * s.count;
  add_columns<BITS, BATCH, COUNT>(p, s, x, sums, [&](size_t k, auto add) INLINE_LAMBDA {
    UNROLL for (int t = 0; t < COUNT / per_step; ++t) {
      Codes<BITS> some;
      some.load(codes + k * LINE, stride, step + t);
      // The word of the step, or nearly: an address that is none does no harm.
      __builtin_prefetch(codes + (k + AHEAD_COLUMNS) * LINE + (step + t) * stored_bits(BITS) / STEPS<BITS> * stride);
      UNROLL for (int i = 0; i < per_step; ++i) add(some.index(FIRST + i), t * per_step + i);
    }
  });
}

// The same for half a unit of rows.
template <int BITS, int BATCH>
void half_unit(const Packed& p, const Section& s, uint32_t half, const float* x, float* sums) {
  // As many groups in one pass over the columns as there are registers for sums, and more where the table is long.
  constexpr bool all = stored_bits(BITS) == 8 && BATCH <= 2;
  constexpr int count = all ? GROUPS / 2 : groups_together(BATCH), per_step = STEP_GROUPS<BITS>;
  const uint8_t* codes = p.at<uint8_t>(s.codes) + half / 2 * unit_bytes(BITS) * s.count;
  for (int group = 0; group < GROUPS / 2; group += count, sums += count * LANES) {
    const int step = (half % 2 * (GROUPS / 2) + group) / per_step;
    if constexpr (count < per_step) {
      if (group % per_step) {
        some_groups<BITS, BATCH, count, count>(p, s, codes, step, x, sums);
        continue;
      }
    }
    some_groups<BITS, BATCH, count, 0>(p, s, codes, step, x, sums);
  }
}

// The same for a chunk of rows.
template <int BITS, int BATCH>
void one_chunk(const Packed& p, const Section& s, uint32_t chunk, const float* x, float* sums) {
  const uint8_t* codes = p.at<uint8_t>(s.codes) + s.units * unit_bytes(BITS) * s.count;
  codes += chunk * chunk_bytes(BITS) * s.count;
  add_columns<BITS, BATCH, CHUNK_GROUPS>(p, s, x, sums, [&](size_t k, auto add) INLINE_LAMBDA {
    each_chunk_index<BITS>(codes + k * chunk_bytes(BITS), add);
  });
}

template <int BITS, int BATCH>
void columns_of_width(const Packed& p, const Section& s, uint32_t half, const float* x, float* sums) {
  const uint32_t unit = half / 2;
  if (unit < s.units) {
    half_unit<BITS, BATCH>(p, s, half, x, sums);
    return;
  }
  const uint32_t first = (unit - s.units) * UNIT / CHUNK + half % 2 * HALF_UNIT / CHUNK;
  for (uint32_t c = first; c < s.chunks && c < first + HALF_UNIT / CHUNK; ++c) {
    one_chunk<BITS, BATCH>(p, s, c, x, sums + (c - first) * CHUNK);
  }
}
