// Codes of values: the nearest entry of a codebook; see anyquant_core.h.

#include "anyquant_core.h"

extern "C" int aq_assign(const float* values, size_t values_len, size_t rows, size_t cols, const float* codebook,
                         size_t codebook_len, int32_t k, uint8_t* codes, size_t codes_len) {
  size_t size = 0;
  if (!values || !codebook || !codes || k < 1 || k > 256) return AQ_BAD_ARGUMENT;
  if (__builtin_mul_overflow(rows, cols, &size) || size != values_len || size != codes_len) return AQ_BAD_LENGTH;
  if (__builtin_mul_overflow(rows, static_cast<size_t>(k), &size) || size != codebook_len) return AQ_BAD_LENGTH;
  for (size_t r = 0; r < rows; ++r) {
    const float* entries = codebook + r * k;
    double middles[256];  // between different neighbours; the rest are never passed
    uint8_t code[256] = {0};
    int distinct = 1, step = 1;
    for (int c = 1; c < k; ++c) {
      if (entries[c] == entries[c - 1]) continue;
      middles[distinct - 1] = (static_cast<double>(entries[c - 1]) + entries[c]) / 2;
      code[distinct++] = static_cast<uint8_t>(c);
    }
    while (step < distinct) step *= 2;
    for (int c = distinct - 1; c < 256; ++c) middles[c] = __builtin_inf();
    for (size_t i = r * cols; i < (r + 1) * cols; ++i) {
      const double x = values[i];
      int at = 0;
      for (int s = step / 2; s; s /= 2) at += middles[at + s - 1] < x ? s : 0;
      codes[i] = code[at];
    }
  }
  return AQ_OK;
}
