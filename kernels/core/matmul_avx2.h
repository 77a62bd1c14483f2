// Sixteen lanes in two halves, by AVX2 with FMA and F16C.
#pragma once

struct Floats {
  __m256 low, high;
};
struct Ints {
  __m256i low, high;
};

INLINE Floats zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE Floats load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
INLINE void store(float* to, Floats a) {
  _mm256_storeu_ps(to, a.low);
  _mm256_storeu_ps(to + 8, a.high);
}
INLINE Floats spread(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
INLINE Floats mul(Floats a, Floats b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
INLINE Floats fma(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
INLINE float sum(Floats a) {
  const __m256 eight = _mm256_add_ps(a.low, a.high);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}

// Eight times eight.
INLINE void transpose_eighth(const float* from, size_t row, float* to, size_t column) {
  __m256 a[8], b[8];
  UNROLL for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(from + i * row);
  UNROLL for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  UNROLL for (int i = 0; i < 8; i += 4) {  // a[i + j]: column j of each four
    UNROLL for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = _mm256_shuffle_ps(b[i + j], b[i + 2 + j], 0x44);
      a[i + 2 * j + 1] = _mm256_shuffle_ps(b[i + j], b[i + 2 + j], 0xee);
    }
  }
  UNROLL for (int j = 0; j < 4; ++j) {
    _mm256_storeu_ps(to + j * column, _mm256_permute2f128_ps(a[j], a[4 + j], 0x20));
    _mm256_storeu_ps(to + (4 + j) * column, _mm256_permute2f128_ps(a[j], a[4 + j], 0x31));
  }
}

// Sixteen vectors that are `row` floats apart become their columns, `column` floats apart.
INLINE void transpose(const float* from, size_t row, float* to, size_t column) {
  for (int i = 0; i < LANES; i += 8) {
    for (int j = 0; j < LANES; j += 8) transpose_eighth(from + i * row + j, row, to + j * column + i, column);
  }
}

INLINE Ints operator>>(Ints a, int by) { return {_mm256_srli_epi32(a.low, by), _mm256_srli_epi32(a.high, by)}; }
INLINE Ints operator<<(Ints a, int by) { return {_mm256_slli_epi32(a.low, by), _mm256_slli_epi32(a.high, by)}; }
INLINE Ints words(const void* from) {
  const auto* half = static_cast<const __m256i*>(from);
  return {_mm256_loadu_si256(half), _mm256_loadu_si256(half + 1)};
}
INLINE Ints halves(const void* from) {
  const auto* half = static_cast<const __m128i*>(from);
  return {_mm256_cvtepu16_epi32(_mm_loadu_si128(half)), _mm256_cvtepu16_epi32(_mm_loadu_si128(half + 1))};
}
INLINE Ints choose(uint32_t mask, Ints a, Ints b) {
  const __m256i m = _mm256_set1_epi32(static_cast<int>(mask));
  const auto half = [m](__m256i x, __m256i y) INLINE_LAMBDA {
    return _mm256_or_si256(_mm256_and_si256(m, x), _mm256_andnot_si256(m, y));
  };
  return {half(a.low, b.low), half(a.high, b.high)};
}

template <int BITS>
struct Table {
  __m256 part[table_entries(BITS) / 8];
};

template <int BITS>
INLINE void load_table(const uint16_t* entries, Table<BITS>* table) {
  for (size_t i = 0; i < table_entries(BITS) / 8; ++i) {
    table->part[i] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(entries) + i));
  }
}

template <int BITS>
INLINE void load_table(const float* entries, Table<BITS>* table) {
  for (size_t i = 0; i < table_entries(BITS) / 8; ++i) table->part[i] = _mm256_loadu_ps(entries + 8 * i);
}

// The codes as numbers. Here and below, bits of the index above those of the code may be anything.
template <int BITS>
INLINE Floats numbers(Ints index) {
  const __m256i mask = _mm256_set1_epi32((1 << BITS) - 1);
  return {_mm256_cvtepi32_ps(_mm256_and_si256(index.low, mask)), _mm256_cvtepi32_ps(_mm256_and_si256(index.high, mask))};
}

template <int BITS>
INLINE __m256 lookup_half(const Table<BITS>& table, __m256i i) {
  if constexpr (BITS <= 3) {
    return _mm256_permutevar8x32_ps(table.part[0], i);
  } else if constexpr (BITS == 4) {
    const __m256 low = _mm256_permutevar8x32_ps(table.part[0], i), high = _mm256_permutevar8x32_ps(table.part[1], i);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
  } else {
    const __m256i code = _mm256_and_si256(i, _mm256_set1_epi32((1 << BITS) - 1));
    return _mm256_i32gather_ps(reinterpret_cast<const float*>(table.part), code, 4);
  }
}

template <int BITS>
INLINE Floats lookup(const Table<BITS>& table, Ints index) {
  return {lookup_half(table, index.low), lookup_half(table, index.high)};
}
