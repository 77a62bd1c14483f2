// Products with a band of rows, for hosts that ask for one row after the other; see matmul_codes.h.
#pragma once

// Activations times scales, with zeros after them as far as there are codes.
void scale_activations(const Packed& p, const float* x, float* out) {
  const float* scale = p.scale ? p.at<float>(p.scale) : nullptr;
  uint32_t k = 0;
  for (; k + LANES <= p.cols; k += LANES) store(out + k, scale ? mul(load(x + k), load(scale + k)) : load(x + k));
  for (; k < p.cols; ++k) out[k] = scale ? x[k] * scale[k] : x[k];
  size_t end = round_up(k, LANES);
  for (int i = 0; i < p.sections && !p.axis; ++i) {
    const size_t codes = p.section[i].units * size_t{UNIT} + p.section[i].chunks * size_t{CHUNK};
    if (codes > end) end = codes;
  }
  memset(out + k, 0, (end - k) * sizeof(float));
}

constexpr size_t AHEAD_OF_BAND = 8 << 10;  // bytes, as in matmul_rows.h

// Some rows of a section that lie together in a band.
struct Some {
  const Packed& p;
  const Section& s;
  const uint32_t* order;
  const uint8_t* records;
  size_t bytes;  // of a record
  uint32_t row, end;  // of the section
};

// ROWS of them from the first on; as many sums as it takes for none to wait for the one before it.
template <template <int, int> class Values, int BITS, int ROWS, int BATCH>
INLINE void rows_of_band(const Some& some, const float* x, float* y) {
  constexpr int CHAINS = ROWS * BATCH < 4 ? 4 / (ROWS * BATCH) : 1;
  const Section& s = some.s;
  for (size_t at = 0; at < ROWS * some.bytes; at += LINE) __builtin_prefetch(some.records + AHEAD_OF_BAND + at);
  const uint8_t *codes = some.records + table_bytes(some.p, s), *chunks = codes + s.units * unit_bytes(BITS);
  const Lines lines = {codes, some.bytes, unit_bytes(BITS), LINE, chunks, some.bytes, chunk_bytes(BITS)};
  Values<BITS, ROWS> values(some.p, some.row, some.records, some.bytes);
  Floats sums[CHAINS][ROWS][BATCH];
  UNROLL for (int c = 0; c < CHAINS; ++c) {
    UNROLL for (int r = 0; r < ROWS; ++r) {
      UNROLL for (int b = 0; b < BATCH; ++b) sums[c][r][b] = zeros();
    }
  }
  for (uint32_t u = 0; u < s.units + (s.chunks > 0); ++u, x += UNIT) {
    add_unit<BITS>(s, lines, u, x, x_stride(some.p), &values, sums);
  }
  UNROLL for (int r = 0; r < ROWS; ++r) {
    UNROLL for (int b = 0; b < BATCH; ++b) {
      Floats total = sums[0][r][b];
      UNROLL for (int c = 1; c < CHAINS; ++c) total = fma(sums[c][r][b], spread(1), total);
      y[b * BAND + some.order[r] % BAND] = sum(total);
    }
  }
}

// As many at a time as registers suffice for, then what is left in halves of that.
template <template <int, int> class Values, int BITS, int ROWS, int BATCH>
INLINE void by_halves(Some some, const float* x, float* y) {
  while (some.end - some.row >= ROWS) {
    rows_of_band<Values, BITS, ROWS, BATCH>(some, x, y);
    some.row += ROWS;
    some.order += ROWS;
    some.records += ROWS * some.bytes;
  }
  if constexpr (ROWS > 1) by_halves<Values, BITS, ROWS / 2, BATCH>(some, x, y);
}

template <template <int, int> class Values, int BITS>
INLINE void band_by_batch(const Some& some, const float* x, int batch, float* y) {
  if (batch == 1) return by_halves<Values, BITS, BAND_TOGETHER, 1>(some, x, y);
  by_halves<Values, BITS, BAND_TOGETHER, 2>(some, x, y);
}

template <int BITS>
void band_of_bits(const Some& some, const float* x, int batch, float* y) {
  if (some.p.blocks.block) return band_by_batch<Scaled, BITS>(some, x, batch, y);
  band_by_batch<Codebooks, BITS>(some, x, batch, y);
}

// Rows without codes have one value each: what the sum of the activations is multiplied with.
void constant_rows(const Some& some, const float* x, int batch, float* y) {
  for (int b = 0; b < batch; ++b, x += x_stride(some.p), y += BAND) {
    Floats total = zeros();
    for (uint32_t k = 0; k < some.p.cols; k += LANES) total = fma(load(x + k), spread(1), total);
    const float activations = sum(total);
    for (uint32_t r = 0; r < some.end - some.row; ++r) {
      uint16_t value;
      memcpy(&value, some.records + r * some.bytes, sizeof(value));
      y[some.order[r] % BAND] = activations * from_half(value);
    }
  }
}

void rows_of_section(const Some& some, const float* x, int batch, float* y) {
  if (!some.s.bits) return constant_rows(some, x, batch, y);
  FOR_BITS(band_of_bits, some.s.bits, some, x, batch, y)
}

void band_of_rows(const Packed& p, uint32_t band, const float* x, int batch, float* y) {
  const auto *begin = p.at<uint32_t>(p.bands) + static_cast<size_t>(band) * p.sections, *end = begin + p.sections;
  const uint8_t* records = p.at<uint8_t>(record_of(p, band, 0, begin[0]));
  for (int i = 0; i < p.sections; ++i) {
    const Section& s = p.section[i];
    if (begin[i] == end[i]) continue;
    const auto* order = p.at<uint32_t>(p.order) + s.first + begin[i];
    const size_t bytes = record_bytes(p, s);
    rows_of_section({p, s, order, records, bytes, begin[i], end[i]}, x, batch, y);
    records += (end[i] - begin[i]) * bytes;
    for (uint32_t r = 0; p.outliers && r < end[i] - begin[i]; ++r) {
      add_outliers_of_row(p, s.first + begin[i] + r, x, batch, y + order[r] % BAND, BAND);
    }
  }
}

// The columns of a section in a band of rows, out [columns][LANES] by their places before they were sorted.
template <int BITS>
void decode_of_bits(const Packed& p, const Section& s, uint32_t band, float* out) {
  const auto* order = p.at<uint32_t>(p.order) + s.first;
  const auto* entries = p.at<uint16_t>(s.tables);
  const uint8_t* codes = p.at<uint8_t>(s.codes);
  const uint32_t unit = band / GROUPS, group = band % GROUPS, rest = band - s.units * GROUPS;
  const size_t stride = static_cast<size_t>(LINE) * s.count;
  const bool whole = unit < s.units;
  codes += (whole ? unit : s.units) * unit_bytes(BITS) * s.count;
  if (!whole) codes += static_cast<size_t>(rest / CHUNK_GROUPS) * s.count * chunk_bytes(BITS);
  for (uint32_t c = 0; c < s.count; ++c, entries += table_entries(BITS)) {
    Table<BITS> table;
    load_table<BITS>(entries, &table);
    Ints index;
    if (whole) {
      Codes<BITS> some;
      some.load(codes + static_cast<size_t>(c) * LINE, stride, group / STEP_GROUPS<BITS>);
      index = some.index(group % STEP_GROUPS<BITS>);
    } else {
      const uint8_t* chunk = codes + static_cast<size_t>(c) * chunk_bytes(BITS);
      const int by = static_cast<int>(rest % CHUNK_GROUPS);
      index = BITS <= 4 ? halves(chunk) >> 4 * by : words(chunk) >> 8 * by;
    }
    store(out + static_cast<size_t>(order[c]) * LANES, lookup(table, index));
  }
}

void decode_section(const Packed& p, const Section& s, uint32_t band, float* out) {
  FOR_BITS(decode_of_bits, s.bits, p, s, band, out)
}

void decode_band(const Packed& p, uint32_t band, float* out) {
  const auto* order = p.at<uint32_t>(p.order);
  for (int i = 0; i < p.sections; ++i) {
    const Section& s = p.section[i];
    decode_section(p, s, band, out);
    for (uint32_t c = 0; !s.bits && c < s.count; ++c) {
      store(out + static_cast<size_t>(order[s.first + c]) * LANES, spread(from_half(p.at<uint16_t>(s.tables)[c])));
    }
  }
  if (!p.outliers) return;
  const Outliers outliers(p);
  const uint32_t half = band / (HALF_UNIT / BAND), first = band % (HALF_UNIT / BAND) * BAND;
  for (uint32_t i = outliers.indptr[half]; i < outliers.indptr[half + 1]; ++i) {
    const uint32_t row = outliers.row[i] - first;  // large where it comes before
    if (row < BAND) out[static_cast<size_t>(order[outliers.index[i]]) * LANES + row] += outliers.delta[i];
  }
}

// y [BATCH][BAND] of decoded columns.
template <int BATCH>
void band_of_columns(const float* w, uint32_t columns, const float* x, size_t x_row, float* y) {
  constexpr int CHAINS = 4;
  Floats sums[CHAINS][BATCH];
  UNROLL for (int c = 0; c < CHAINS; ++c) {
    UNROLL for (int b = 0; b < BATCH; ++b) sums[c][b] = zeros();
  }
  uint32_t k = 0;
  const auto add = [&](int chain, uint32_t column) INLINE_LAMBDA {
    const Floats value = load(w + static_cast<size_t>(column) * LANES);
    UNROLL for (int b = 0; b < BATCH; ++b) sums[chain][b] = fma(value, spread(x[b * x_row + column]), sums[chain][b]);
  };
  for (; k + CHAINS <= columns; k += CHAINS) {
    UNROLL for (int c = 0; c < CHAINS; ++c) add(c, k + c);
  }
  for (; k < columns; ++k) add(0, k);
  const Floats one = spread(1);
  UNROLL for (int b = 0; b < BATCH; ++b) {
    store(y + b * BAND, fma(fma(sums[0][b], one, sums[1][b]), one, fma(sums[2][b], one, sums[3][b])));
  }
}

void band(const Packed& p, uint32_t number, const float* const* x, int batch, const BandWorkspace& work, float* y) {
  for (int b = 0; b < batch; ++b) scale_activations(p, x[b], work.x + b * x_stride(p));
  if (!p.axis) return band_of_rows(p, number, work.x, batch, y);
  if (work.kept->serial != p.serial || work.kept->band != number) {
    decode_band(p, number, work.decoded);
    *work.kept = {p.serial, number};
  }
  if (batch == 1) return band_of_columns<1>(work.decoded, p.cols, work.x, x_stride(p), y);
  band_of_columns<2>(work.decoded, p.cols, work.x, x_stride(p), y);
}
