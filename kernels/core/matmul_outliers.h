// Outliers of a packed matrix: each is kept as what it differs from the value beneath it, which a product counts as well,
// divided by the scale of its column, so that it is multiplied with the same prepared activations.
#pragma once

#include "matmul_layout.h"

namespace matmul {
namespace {

// A scale of zero becomes this one where a column has outliers: what codes add then is below any rounding.
constexpr float SCALE_OF_NOTHING = 0x1p-60f;

inline size_t half_units(const Packed& p) { return (static_cast<size_t>(p.rows) + HALF_UNIT - 1) / HALF_UNIT; }

// Where codebooks belong to rows: the outliers of one row after the other, in the order of sorted rows, by column. Where
// they belong to columns: those of one half of a unit of rows after the other, by the place of the sorted column.
struct Outliers {
  const uint32_t *indptr, *index;
  const float* delta;
  const uint8_t* row;  // of the half of a unit, where codebooks belong to columns

  explicit Outliers(const Packed& p)
      : indptr(p.at<uint32_t>(p.indptr)), index(p.at<uint32_t>(p.index)), delta(p.at<float>(p.delta)),
        row(p.at<uint8_t>(p.outlier_row)) {}

  // The first outlier of row, or half of a unit, `of` whose column comes at `place` or later.
  uint32_t from(uint32_t of, uint32_t place) const {
    uint32_t low = indptr[of], high = indptr[of + 1];
    while (low < high) {
      const uint32_t middle = low + (high - low) / 2;
      if (index[middle] < place) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }
};

// Of the row in this place among the sorted ones, to y, one float for each of the batch. x: prepared activations.
inline void add_outliers_of_row(const Packed& p, uint32_t place, const float* x, int batch, float* y, size_t y_row) {
  const Outliers outliers(p);
  const uint32_t begin = outliers.indptr[place], end = outliers.indptr[place + 1];
  for (int b = 0; b < batch; ++b, x += x_stride(p), y += y_row) {
    float sums[4] = {};  // one after the other would wait for each sum
    uint32_t i = begin;
    for (; end - i >= 4; i += 4) {
      for (int j = 0; j < 4; ++j) sums[j] += outliers.delta[i + j] * x[outliers.index[i + j]];
    }
    for (; i < end; ++i) sums[0] += outliers.delta[i] * x[outliers.index[i]];
    *y += (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
}

}  // namespace
}  // namespace matmul
