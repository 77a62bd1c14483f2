// Products row by row; see anyquant_matmul.h.

#include "anyquant_matmul.h"
#include "matmul_layout.h"
#include "matmul_outliers.h"

using namespace matmul;

namespace {

// What a thread keeps of column codebooks: a group of rows, decoded.
struct RowCache {
  uint64_t serial, group;
};

void fill(const Packed& p, const Kernels& kernels, uint32_t group, float* rows) {
  kernels.decode(p, group, rows);
  if (!p.outliers) return;
  const Outliers outliers(p);
  const auto* order = p.at<uint32_t>(p.order);
  const auto* scale = p.scale ? p.at<float>(p.scale) : nullptr;
  const uint32_t half = group / (HALF_UNIT / LANES), first = group % (HALF_UNIT / LANES) * LANES;
  for (uint32_t i = outliers.indptr[half]; i < outliers.indptr[half + 1]; ++i) {
    if (outliers.row[i] / LANES * LANES != first) continue;
    const uint32_t column = order[outliers.index[i]];
    rows[(outliers.row[i] - first) * decoded_stride(p) + column] += outliers.delta[i] * (scale ? scale[column] : 1);
  }
}

}  // namespace

extern "C" size_t aq_matmul_row_cache(const void* packed) {
  const Packed* p = packed_at(packed);
  return p && p->axis ? LINE + LANES * decoded_stride(*p) * sizeof(float) : LINE;
}

extern "C" int aq_matmul_row(const void* packed, uint64_t row, const float* const* x, size_t batch, void* cache,
                             size_t cache_len, float* y, int level) {
  const Packed* p = packed_at(packed);
  if (!p || !p->place || row >= p->rows || !x || batch < 1 || batch > 2 || !y || !cache) return AQ_BAD_ARGUMENT;
  if (reinterpret_cast<uintptr_t>(cache) % LINE) return AQ_BAD_ARGUMENT;
  if (cache_len < aq_matmul_row_cache(packed)) return AQ_BAD_LENGTH;
  const Kernels* kernels = kernels_of(level);
  if (!kernels) return level < AQ_LEVEL_BEST || level > AQ_LEVEL_AVX512 ? AQ_BAD_ARGUMENT : AQ_UNSUPPORTED;
  const int some = static_cast<int>(batch);
  if (p->axis) {
    auto* kept = static_cast<RowCache*>(cache);
    auto* rows = reinterpret_cast<float*>(static_cast<char*>(cache) + LINE);
    const RowCache wanted = {p->serial, row / LANES};
    if (kept->serial != wanted.serial || kept->group != wanted.group) {
      fill(*p, *kernels, static_cast<uint32_t>(row / LANES), rows);
      *kept = wanted;
    }
    kernels->dense(rows + row % LANES * decoded_stride(*p), p->cols, x, some, y);
    return AQ_OK;
  }
  const uint32_t place = p->at<uint32_t>(p->place)[row];
  int section = p->sections - 1;
  while (p->section[section].first > place) --section;
  const Section& s = p->section[section];
  kernels->row(*p, s, place - s.first, x, some, y);
  if (!p->outliers) return AQ_OK;
  const Outliers outliers(*p);
  const auto* scale = p->scale ? p->at<float>(p->scale) : nullptr;
  for (int b = 0; b < some; ++b) {
    for (uint32_t i = outliers.indptr[place]; i < outliers.indptr[place + 1]; ++i) {
      const uint32_t column = outliers.index[i];
      y[b] += outliers.delta[i] * (scale ? x[b][column] * scale[column] : x[b][column]);
    }
  }
  return AQ_OK;
}
