// From a section's width and the number of rows of activations to the function that was compiled for them.
#pragma once

#define FOR_BITS(function, bits, ...)                        \
  switch (bits) {                                            \
    case 1: return function<1>(__VA_ARGS__);                 \
    case 2: return function<2>(__VA_ARGS__);                 \
    case 3: return function<3>(__VA_ARGS__);                 \
    case 4: return function<4>(__VA_ARGS__);                 \
    case 5: return function<5>(__VA_ARGS__);                 \
    case 6: return function<6>(__VA_ARGS__);                 \
    case 7: return function<7>(__VA_ARGS__);                 \
    case 8: return function<8>(__VA_ARGS__);                 \
    default: return;                                         \
  }

template <template <int, int> class Values, int BITS>
void rows_by_batch(const Packed& p, const Section& s, uint32_t begin, uint32_t end, const float* x, int batch,
                   float* y) {
  if (batch == 1) return rows_for_one<Values, BITS>(p, s, begin, end, x, y);
  if (batch <= FEW) return rows_for_few<Values, BITS>(p, s, begin, end, x, batch, y);
  rows_for_many<Values, BITS>(p, s, begin, end, x, batch, y);
}

template <int BITS>
void rows_of_bits(const Packed& p, const Section& s, uint32_t begin, uint32_t end, const float* x, int batch,
                  float* y) {
  if (p.blocks.block) return rows_by_batch<Scaled, BITS>(p, s, begin, end, x, batch, y);
  rows_by_batch<Codebooks, BITS>(p, s, begin, end, x, batch, y);
}

template <int BITS>
void columns_of_bits(const Packed& p, const Section& s, uint32_t half, const float* x, int batch, float* sums) {
  if (batch > FEW) return columns_for_many<BITS>(p, s, half, x, batch, sums);
  with_fours(batch, [&](auto some, int b) INLINE_LAMBDA {
    columns_of_width<BITS, some.value>(p, s, half, x + b * x_stride(p), sums + b * HALF_UNIT);
  });
}

void rows(const Packed& p, const Section& s, uint32_t begin, uint32_t end, const float* x, int batch, float* y) {
  FOR_BITS(rows_of_bits, s.bits, p, s, begin, end, x, batch, y)
}

void columns(const Packed& p, const Section& s, uint32_t half, const float* x, int batch, float* sums) {
  FOR_BITS(columns_of_bits, s.bits, p, s, half, x, batch, sums)
}
