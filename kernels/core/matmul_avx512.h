// Sixteen lanes by AVX-512F.
#pragma once

using Floats = __m512;
typedef uint32_t Ints __attribute__((vector_size(64)));

INLINE Floats zeros() { return _mm512_setzero_ps(); }
INLINE Floats load(const float* from) { return _mm512_loadu_ps(from); }
INLINE void store(float* to, Floats a) { _mm512_storeu_ps(to, a); }
INLINE Floats spread(float a) { return _mm512_set1_ps(a); }
INLINE Floats mul(Floats a, Floats b) { return a * b; }
INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE float sum(Floats a) { return _mm512_reduce_add_ps(a); }

// Sixteen vectors that are `row` floats apart become their columns, `column` floats apart.
INLINE void transpose(const float* from, size_t row, float* to, size_t column) {
  __m512 a[LANES], b[LANES];
  UNROLL for (int i = 0; i < LANES; ++i) a[i] = load(from + i * row);
  UNROLL for (int i = 0; i < LANES; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  UNROLL for (int i = 0; i < LANES; i += 4) {  // a[i + j]: column j of each four
    UNROLL for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = _mm512_shuffle_ps(b[i + j], b[i + 2 + j], 0x44);
      a[i + 2 * j + 1] = _mm512_shuffle_ps(b[i + j], b[i + 2 + j], 0xee);
    }
  }
  UNROLL for (int j = 0; j < 4; ++j) {
    const __m512 low = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88), high = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88);
    const __m512 odd = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xdd), above = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xdd);
    store(to + j * column, _mm512_shuffle_f32x4(low, high, 0x88));
    store(to + (4 + j) * column, _mm512_shuffle_f32x4(odd, above, 0x88));
    store(to + (8 + j) * column, _mm512_shuffle_f32x4(low, high, 0xdd));
    store(to + (12 + j) * column, _mm512_shuffle_f32x4(odd, above, 0xdd));
  }
}

INLINE Ints words(const void* from) { return (Ints)_mm512_loadu_si512(from); }
INLINE Ints halves(const void* from) {
  return (Ints)_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
}
// Bits of a where the mask has ones, of b elsewhere.
INLINE Ints choose(uint32_t mask, Ints a, Ints b) {
  return (Ints)_mm512_ternarylogic_epi32(_mm512_set1_epi32(static_cast<int>(mask)), (__m512i)a, (__m512i)b, 0xca);
}

template <int BITS>
struct Table {
  Floats part[table_entries(BITS) / LANES];
};

template <int BITS>
INLINE void load_table(const uint16_t* entries, Table<BITS>* table) {
  for (size_t i = 0; i < table_entries(BITS) / LANES; ++i) {
    table->part[i] = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(entries) + i));
  }
}

template <int BITS>
INLINE void load_table(const float* entries, Table<BITS>* table) {
  for (size_t i = 0; i < table_entries(BITS) / LANES; ++i) table->part[i] = load(entries + i * LANES);
}

// The codes as numbers. Here and below, bits of the index above those of the code may be anything.
template <int BITS>
INLINE Floats numbers(Ints index) {
  return _mm512_cvtepi32_ps(_mm512_and_epi32((__m512i)index, _mm512_set1_epi32((1 << BITS) - 1)));
}

template <int BITS>
INLINE Floats lookup(const Table<BITS>& table, Ints index) {
  const __m512i i = (__m512i)index;
  if constexpr (BITS <= 4) {
    return _mm512_permutexvar_ps(i, table.part[0]);
  } else if constexpr (BITS == 5) {
    return _mm512_permutex2var_ps(table.part[0], i, table.part[1]);
  } else if constexpr (BITS == 6) {
    const __m512 low = _mm512_permutex2var_ps(table.part[0], i, table.part[1]);
    const __m512 high = _mm512_permutex2var_ps(table.part[2], i, table.part[3]);
    return _mm512_mask_blend_ps(_mm512_test_epi32_mask(i, _mm512_set1_epi32(32)), low, high);
  } else {
    const __m512i code = _mm512_and_epi32(i, _mm512_set1_epi32((1 << BITS) - 1));
    return _mm512_i32gather_ps(code, reinterpret_cast<const float*>(table.part), 4);
  }
}
