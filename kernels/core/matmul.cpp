// Products with packed matrices: preparation, the work of one part, and which instructions do it; see
// anyquant_matmul.h.

#include <cstdlib>
#include <cstring>

#include "anyquant_matmul.h"
#include "half.h"
#include "matmul_layout.h"
#include "matmul_outliers.h"
#include "pool.h"

using namespace matmul;

namespace {

// Workspace: [batch][x_stride] of activations, and one more where the last pass lacks one to fours; then for each of them
// what channels without codes add to every row (columns), or the sum that they are multiplied with (rows).
size_t prepared_rows(const Packed& p, size_t batch) {
  return batch + (batch % (p.axis ? MOST_OF_COLUMNS : MOST_OF_ROWS) % 4 == 3);
}

int find_level() {
#if VECTOR_UNITS
  __builtin_cpu_init();
  const char* most = std::getenv("ANYQUANT_CPU");
  if (most && !std::strcmp(most, "scalar")) return AQ_LEVEL_SCALAR;
  if (__builtin_cpu_supports("avx512f") && !(most && !std::strcmp(most, "avx2"))) return AQ_LEVEL_AVX512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    return AQ_LEVEL_AVX2;
  }
#endif
  return AQ_LEVEL_SCALAR;
}

const int best_level = find_level();

// What a weight of a width costs beside one of another: up to 4 bits the same but for memory, beyond that by what is looked
// up in how long a table. Measured, AVX-512.
constexpr uint64_t COST[MOST_BITS + 1] = {1, 14, 14, 15, 16, 27, 50, 220, 220};

// The first row of a part's share: as much work before it as parts are before it, at the border of a tile.
struct Border {
  int section;
  uint32_t row;
};

Border border(const Packed& p, size_t part, size_t parts) {
  uint64_t total = 0;
  for (int i = 0; i < p.sections; ++i) total += p.section[i].count * COST[p.section[i].bits];
  auto before = static_cast<uint64_t>(static_cast<unsigned __int128>(total) * part / parts);
  for (int i = 0; i < p.sections; ++i) {
    const Section& s = p.section[i];
    const uint64_t row = before / COST[s.bits];
    if (row < s.count) return {i, static_cast<uint32_t>(row / TILE * TILE)};
    before -= s.count * COST[s.bits];
  }
  return {p.sections, 0};
}

// Of the columns of a section, in one half of a unit of rows; sums [batch][HALF_UNIT].
void add_outliers_of_columns(const Packed& p, const Section& s, uint32_t half, const float* x, int batch, float* sums) {
  const Outliers outliers(p);
  const uint32_t begin = outliers.from(half, s.first), end = outliers.from(half, s.first + s.count);
  for (int b = 0; b < batch; ++b, x += x_stride(p), sums += HALF_UNIT) {
    for (uint32_t i = begin; i < end; ++i) sums[outliers.row[i]] += outliers.delta[i] * x[outliers.index[i]];
  }
}

void run_rows(const Packed& p, const Kernels& kernels, const float* x, size_t batch, const float* constants, float* y,
              size_t part, size_t parts) {
  const Border from = border(p, part, parts), to = border(p, part + 1, parts);
  const auto* order = p.at<uint32_t>(p.order);
  for (size_t b = 0; b < batch; b += MOST_OF_ROWS) {
    const int some = static_cast<int>(batch - b < MOST_OF_ROWS ? batch - b : MOST_OF_ROWS);
    const float* in = x + b * x_stride(p);
    float* out = y + b * p.rows;
    for (int i = from.section; i < p.sections && i <= to.section; ++i) {
      const Section& s = p.section[i];
      const uint32_t begin = i == from.section ? from.row : 0, end = i == to.section ? to.row : s.count;
      if (s.bits) kernels.rows(p, s, begin, end, in, some, out);
      for (uint32_t row = begin; !s.bits && row < end; ++row) {
        const float value = from_half(p.at<uint16_t>(s.tables)[row]);
        float* to = out + order[s.first + row];
        for (int j = 0; j < some; ++j) to[static_cast<size_t>(j) * p.rows] = value * constants[b + j];
      }
      if (!p.outliers || (s.bits && some > FEW)) continue;
      for (uint32_t row = begin; row < end; ++row) {
        add_outliers_of_row(p, s.first + row, in, some, out + order[s.first + row], p.rows);
      }
    }
  }
}

void run_columns(const Packed& p, const Kernels& kernels, const float* x, size_t batch, const float* constants, float* y,
                 size_t part, size_t parts) {
  const size_t halves = half_units(p);
  for (size_t half = halves * part / parts; half < halves * (part + 1) / parts; ++half) {
    const size_t first = half * HALF_UNIT, count = p.rows - first < HALF_UNIT ? p.rows - first : HALF_UNIT;
    for (size_t b = 0; b < batch; b += MOST_OF_COLUMNS) {
      const int some = static_cast<int>(batch - b < MOST_OF_COLUMNS ? batch - b : MOST_OF_COLUMNS);
      const float* in = x + b * x_stride(p);
      alignas(LINE) float sums[MOST_OF_COLUMNS * HALF_UNIT];
      for (int j = 0; j < some; ++j) {
        for (int i = 0; i < HALF_UNIT; ++i) sums[j * HALF_UNIT + i] = constants[b + j];
      }
      for (int i = 0; i < p.sections; ++i) {
        const Section& s = p.section[i];
        if (s.bits) kernels.columns(p, s, static_cast<uint32_t>(half), in + s.first, some, sums);
        if (!p.outliers || (s.bits && some > FEW)) continue;
        add_outliers_of_columns(p, s, static_cast<uint32_t>(half), in, some, sums);
      }
      for (int j = 0; j < some; ++j) std::memcpy(y + (b + j) * p.rows + first, sums + j * HALF_UNIT, count * sizeof(float));
    }
  }
}

}  // namespace

const Packed* matmul::packed_at(const void* packed) {
  const auto* p = static_cast<const Packed*>(packed);
  return p && reinterpret_cast<uintptr_t>(p) % LINE == 0 && p->magic == MAGIC ? p : nullptr;
}

const Kernels* matmul::kernels_of(int level) {
  if (level == AQ_LEVEL_BEST) level = best_level;
#if VECTOR_UNITS
  if (level == AQ_LEVEL_AVX512 && best_level >= AQ_LEVEL_AVX512) return &avx512_kernels;
  if (level == AQ_LEVEL_AVX2 && best_level >= AQ_LEVEL_AVX2) return &avx2_kernels;
#endif
  return level == AQ_LEVEL_SCALAR ? &scalar_kernels : nullptr;
}

extern "C" int aq_matmul_level(void) { return best_level; }

extern "C" size_t aq_matmul_workspace(const void* packed, size_t batch) {
  const Packed* p = packed_at(packed);
  return p && !p->bands ? prepared_rows(*p, batch) * (x_stride(*p) + 1) * sizeof(float) : 0;
}

extern "C" size_t aq_matmul_most_workspace(uint64_t cols, size_t batch) {
  return (batch + 1) * (x_stride(cols) + 1) * sizeof(float);
}

extern "C" int aq_matmul_prepare(const void* packed, const float* x, size_t batch, void* workspace,
                                 size_t workspace_len) {
  return aq_matmul_prepare_part(packed, x, batch, workspace, workspace_len, 0, 1);
}

extern "C" int aq_matmul_prepare_part(const void* packed, const float* x, size_t batch, void* workspace,
                                      size_t workspace_len, size_t part, size_t parts) {
  const Packed* p = packed_at(packed);
  if (!p || p->bands || !parts || part >= parts) return AQ_BAD_ARGUMENT;
  if (!batch) return AQ_OK;  // memory for nothing may lie anywhere
  if (!x || !workspace || reinterpret_cast<uintptr_t>(workspace) % LINE) return AQ_BAD_ARGUMENT;
  if (workspace_len < aq_matmul_workspace(packed, batch)) return AQ_BAD_LENGTH;
  auto* rows = static_cast<float*>(workspace);
  float* constants = rows + prepared_rows(*p, batch) * x_stride(*p);
  const auto* order = p->at<uint32_t>(p->order);
  const auto* scale = p->scale ? p->at<float>(p->scale) : nullptr;
  const Section& least = p->section[0];
  const size_t begin = batch * part / parts, end = batch * (part + 1) / parts, stride = x_stride(*p);
  rows += begin * stride;
  x += begin * p->cols;
  for (size_t b = begin; b < end; ++b, rows += stride, x += p->cols) {
    for (uint32_t k = 0; k < p->cols; ++k) {
      const uint32_t column = p->axis ? order[k] : k;
      rows[k] = scale ? x[column] * scale[column] : x[column];
    }
    std::memset(rows + p->cols, 0, (stride - p->cols) * sizeof(float));
    constants[b] = 0;
    if (least.bits) continue;
    double sum = 0;
    for (uint32_t k = 0; k < (p->axis ? least.count : p->cols); ++k) {
      sum += rows[k] * (p->axis ? from_half(p->at<uint16_t>(least.tables)[k]) : 1.0);
    }
    constants[b] = static_cast<float>(sum);
  }
  if (part == parts - 1) std::memset(rows, 0, (prepared_rows(*p, batch) - batch) * stride * sizeof(float));
  return AQ_OK;
}

extern "C" int aq_matmul_run(const void* packed, size_t batch, const void* workspace, float* y, size_t part,
                             size_t parts, int level) {
  const Packed* p = packed_at(packed);
  if (!p || p->bands || !parts || part >= parts || (batch && (!workspace || !y))) return AQ_BAD_ARGUMENT;
  const Kernels* kernels = kernels_of(level);
  if (!kernels) return level < AQ_LEVEL_BEST || level > AQ_LEVEL_AVX512 ? AQ_BAD_ARGUMENT : AQ_UNSUPPORTED;
  const auto* x = static_cast<const float*>(workspace);
  const float* constants = x + prepared_rows(*p, batch) * x_stride(*p);
  const auto run = p->axis ? run_columns : run_rows;
  run(*p, *kernels, x, batch, constants, y, part, parts);
  return AQ_OK;
}

extern "C" int aq_matmul(const void* packed, const float* x, size_t batch, void* workspace, size_t workspace_len,
                         float* y, size_t threads) {
  if (!threads || (batch && !y)) return AQ_BAD_ARGUMENT;
  const int status = aq_matmul_prepare(packed, x, batch, workspace, workspace_len);
  if (status != AQ_OK) return status;
  struct Product {
    const void* packed;
    size_t batch;
    const void* workspace;
    float* y;
  } product = {packed, batch, workspace, y};
  run_in_parts(
      [](void* argument, size_t part, size_t parts) {
        const auto* p = static_cast<const Product*>(argument);
        aq_matmul_run(p->packed, p->batch, p->workspace, p->y, part, parts, AQ_LEVEL_BEST);
      },
      &product, threads);
  return AQ_OK;
}
