// Products row by row, for hosts that ask for one at a time; see matmul_codes.h.
#pragma once

constexpr int CHAINS = 4;  // of sums: an addition waits for the one before it in its chain

template <int BATCH>
INLINE void write_sums(const Floats (&sums)[CHAINS][BATCH], float* y) {
  const Floats one = spread(1);
  UNROLL for (int b = 0; b < BATCH; ++b) {
    y[b] = sum(fma(fma(sums[0][b], one, sums[1][b]), one, fma(sums[2][b], one, sums[3][b])));
  }
}

// Adds what a group of weights makes of x, from column k on.
template <int BATCH, bool SCALED>
INLINE void add_group(Floats value, const float* const* x, const float* scale, size_t k, Floats (&sums)[BATCH]) {
  if constexpr (SCALED) value = mul(value, load(scale + k));
  UNROLL for (int b = 0; b < BATCH; ++b) sums[b] = fma(value, load(x[b] + k), sums[b]);
}

// A unit whose columns all exist.
template <class Values, int BITS, int BATCH, bool SCALED>
INLINE void add_unit_of_row(const uint8_t* unit, uint32_t u, const float* const* x, const float* scale, size_t k,
                            Values* values, Floats (&sums)[CHAINS][BATCH]) {
  constexpr int groups = STEP_GROUPS<BITS>;
  values->begin(u, 0, GROUPS);
  for (int step = 0; step < STEPS<BITS>; ++step, k += groups * LANES) {
    Codes<BITS> some;
    some.load(unit, LINE, step);
    UNROLL for (int i = 0; i < groups; ++i) {
      const Floats value = values->value(0, some.index(i), step * groups + i);
      add_group<BATCH, SCALED>(value, x, scale, k + i * LANES, sums[i % CHAINS]);
    }
  }
}

// What comes after the last unit whose columns all exist: chunks, or a unit.
template <class Values, int BITS, int BATCH, bool SCALED>
INLINE void add_rest_of_row(const Section& s, const uint8_t* codes, uint32_t whole, const float* const* x,
                            const float* scale, size_t k, Values* values, Floats (&sums)[CHAINS][BATCH]) {
  if (whole < s.units) {
    return add_unit_of_row<Values, BITS, BATCH, SCALED>(codes, whole, x, scale, k, values, sums);
  }
  values->begin(whole, 0, static_cast<int>(s.chunks) * CHUNK_GROUPS);
  for (uint32_t c = 0; c < s.chunks; ++c, codes += chunk_bytes(BITS), k += CHUNK) {
    each_chunk_index<BITS>(codes, [&](Ints index, int group) INLINE_LAMBDA {
      const Floats value = values->value(0, index, c * CHUNK_GROUPS + group);
      add_group<BATCH, SCALED>(value, x, scale, k + group * LANES, sums[group % CHAINS]);
    });
  }
}

template <template <int, int> class Values, int BITS, int BATCH, bool SCALED>
void dot_row(const Packed& p, const Section& s, uint32_t number, const float* const* x, float* y) {
  const uint8_t* codes = p.at<uint8_t>(s.codes) + number * s.channel_bytes();
  const float* scale = SCALED ? p.at<float>(p.scale) : nullptr;
  for (size_t at = 0; at < s.channel_bytes(); at += LINE) __builtin_prefetch(codes + AHEAD_OF_FEW + at);
  Values<BITS, 1> values(p, s, number);
  Floats sums[CHAINS][BATCH];
  UNROLL for (int i = 0; i < CHAINS; ++i) {
    UNROLL for (int b = 0; b < BATCH; ++b) sums[i][b] = zeros();
  }
  const uint32_t whole = p.cols / UNIT, left = p.cols % UNIT;
  size_t k = 0;
  for (uint32_t u = 0; u < whole; ++u, k += UNIT) {
    add_unit_of_row<Values<BITS, 1>, BITS, BATCH, SCALED>(codes + u * unit_bytes(BITS), u, x, scale, k, &values, sums);
  }
  codes += whole * unit_bytes(BITS);
  if (left == s.chunks * CHUNK && whole == s.units) {
    add_rest_of_row<Values<BITS, 1>, BITS, BATCH, SCALED>(s, codes, whole, x, scale, k, &values, sums);
  } else {  // beside what does not exist: copies, with zeros after them
    alignas(LINE) float last[BATCH + 1][UNIT];
    const float* from[BATCH];
    const auto copy = [&](const float* begin, float* to) {
      memcpy(to, begin + k, left * sizeof(float));
      memset(to + left, 0, (UNIT - left) * sizeof(float));
    };
    for (int b = 0; b < BATCH; ++b) {
      copy(x[b], last[b]);
      from[b] = last[b];
    }
    if constexpr (SCALED) copy(scale, last[BATCH]);
    add_rest_of_row<Values<BITS, 1>, BITS, BATCH, SCALED>(s, codes, whole, from, last[BATCH], 0, &values, sums);
  }
  write_sums(sums, y);
}

template <int BITS>
void dot_row_of_bits(const Packed& p, const Section& s, uint32_t number, const float* const* x, int batch, float* y) {
  if (p.blocks.block) {
    return batch == 1 ? dot_row<Scaled, BITS, 1, false>(p, s, number, x, y)
                      : dot_row<Scaled, BITS, 2, false>(p, s, number, x, y);
  }
  if (p.scale) {
    return batch == 1 ? dot_row<Codebooks, BITS, 1, true>(p, s, number, x, y)
                      : dot_row<Codebooks, BITS, 2, true>(p, s, number, x, y);
  }
  return batch == 1 ? dot_row<Codebooks, BITS, 1, false>(p, s, number, x, y)
                    : dot_row<Codebooks, BITS, 2, false>(p, s, number, x, y);
}

template <int BATCH>
void dense_of_batch(const float* weights, size_t columns, const float* const* x, float* y) {
  Floats sums[CHAINS][BATCH];
  UNROLL for (int i = 0; i < CHAINS; ++i) {
    UNROLL for (int b = 0; b < BATCH; ++b) sums[i][b] = zeros();
  }
  size_t k = 0;
  for (; k + CHAINS * LANES <= columns; k += CHAINS * LANES) {
    UNROLL for (int i = 0; i < CHAINS; ++i) {
      add_group<BATCH, false>(load(weights + k + i * LANES), x, nullptr, k + i * LANES, sums[i]);
    }
  }
  write_sums(sums, y);
  for (; k < columns; ++k) {
    for (int b = 0; b < BATCH; ++b) y[b] += weights[k] * x[b][k];
  }
}

void dense_row(const float* weights, size_t columns, const float* const* x, int batch, float* y) {
  if (batch == 1) return dense_of_batch<1>(weights, columns, x, y);
  dense_of_batch<2>(weights, columns, x, y);
}

// Rows without codes have one value each: what it is multiplied with.
void sum_row(const Packed& p, float value, const float* const* x, int batch, float* y) {
  const float* scale = p.scale ? p.at<float>(p.scale) : nullptr;
  for (int b = 0; b < batch; ++b) {
    double total = 0;
    for (uint32_t k = 0; k < p.cols; ++k) total += scale ? x[b][k] * scale[k] : x[b][k];
    y[b] = static_cast<float>(value * total);
  }
}

void one_row(const Packed& p, const Section& s, uint32_t number, const float* const* x, int batch, float* y) {
  if (!s.bits) return sum_row(p, from_half(p.at<uint16_t>(s.tables)[number]), x, batch, y);
  FOR_BITS(dot_row_of_bits, s.bits, p, s, number, x, batch, y)
}

// The weights of a column in a group of rows.
template <int BITS>
void decode_column(const Packed& p, const Section& s, uint32_t number, uint32_t group, Floats* out) {
  Table<BITS> table;
  load_table<BITS>(p.at<uint16_t>(s.tables) + number * table_entries(BITS), &table);
  const uint32_t unit = group / GROUPS;
  if (unit < s.units) {
    const uint8_t* codes = p.at<uint8_t>(s.codes) + unit * unit_bytes(BITS) * s.count + static_cast<size_t>(number) * LINE;
    Codes<BITS> some;
    some.load(codes, static_cast<size_t>(LINE) * s.count, group % GROUPS / STEP_GROUPS<BITS>);
    *out = lookup(table, some.index(group % STEP_GROUPS<BITS>));
    return;
  }
  const uint32_t rest = group - s.units * GROUPS;
  const uint8_t* codes = p.at<uint8_t>(s.codes) + s.units * unit_bytes(BITS) * s.count;
  codes += (static_cast<size_t>(rest / CHUNK_GROUPS) * s.count + number) * chunk_bytes(BITS);
  const int by = static_cast<int>(rest % CHUNK_GROUPS);
  *out = lookup(table, BITS <= 4 ? halves(codes) >> 4 * by : words(codes) >> 8 * by);
}

void decode_column_of_bits(const Packed& p, const Section& s, uint32_t number, uint32_t group, Floats* out) {
  if (!s.bits) {
    *out = spread(from_half(p.at<uint16_t>(s.tables)[number]));
    return;
  }
  FOR_BITS(decode_column, s.bits, p, s, number, group, out)
}

void decode_rows_of_columns(const Packed& p, uint32_t group, float* out) {
  const auto* place = p.at<uint32_t>(p.place);
  const float* scale = p.scale ? p.at<float>(p.scale) : nullptr;
  alignas(LINE) float lines[LANES * LANES];
  for (uint32_t k = 0; k < p.cols; k += LANES) {
    for (uint32_t i = 0; i < LANES; ++i) {
      Floats value = zeros();
      if (k + i < p.cols) {
        int section = p.sections - 1;
        while (p.section[section].first > place[k + i]) --section;
        const Section& s = p.section[section];
        decode_column_of_bits(p, s, place[k + i] - s.first, group, &value);
        if (scale) value = mul(value, spread(scale[k + i]));
      }
      store(lines + i * LANES, value);
    }
    transpose(lines, LANES, out + k, decoded_stride(p));
  }
}
