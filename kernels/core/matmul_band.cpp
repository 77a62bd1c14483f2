// Products a band of rows at a time; see anyquant_matmul.h.

#include "anyquant_matmul.h"
#include "matmul_layout.h"

using namespace matmul;

static_assert(BAND == AQ_BAND && BAND == LANES, "the lanes are the rows where columns have codebooks");

extern "C" size_t aq_matmul_band_workspace(const void* packed) {
  const Packed* p = packed_at(packed);
  if (!p || (!p->axis && !p->bands)) return 0;
  return LINE + (2 * x_stride(*p) + (p->axis ? static_cast<size_t>(p->cols) * LANES : 0)) * sizeof(float);
}

extern "C" int aq_matmul_band(const void* packed, uint64_t band, const float* const* x, size_t batch, void* workspace,
                              size_t workspace_len, float* y, int level) {
  const Packed* p = packed_at(packed);
  if (!p || (!p->axis && !p->bands) || band > (p->rows - 1) / BAND) return AQ_BAD_ARGUMENT;
  if (!x || batch < 1 || batch > 2 || !y || !workspace || reinterpret_cast<uintptr_t>(workspace) % LINE) {
    return AQ_BAD_ARGUMENT;
  }
  if (workspace_len < aq_matmul_band_workspace(packed)) return AQ_BAD_LENGTH;
  const Kernels* kernels = kernels_of(level);
  if (!kernels) return level < AQ_LEVEL_BEST || level > AQ_LEVEL_AVX512 ? AQ_BAD_ARGUMENT : AQ_UNSUPPORTED;
  auto* floats = reinterpret_cast<float*>(static_cast<char*>(workspace) + LINE);
  const BandWorkspace work = {static_cast<KeptBand*>(workspace), floats, floats + 2 * x_stride(*p)};
  kernels->band(*p, static_cast<uint32_t>(band), x, static_cast<int>(batch), work, y);
  return AQ_OK;
}
