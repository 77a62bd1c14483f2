// Products by AVX-512F; see matmul_codes.h.

#include <string.h>

#include "half.h"
#include "matmul_layout.h"
#include "matmul_outliers.h"

#if VECTOR_UNITS
// GCC 12 takes what its own header leaves undefined on purpose for a mistake.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#pragma GCC target("avx512f,avx2,fma,f16c")

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")
#define INLINE_LAMBDA __attribute__((always_inline))

namespace matmul {
namespace {

// As registers suffice.
constexpr int rows_together(int bits, int batch) { return bits == 6 ? 2 : bits > 4 ? (batch == 1 ? 4 : 2) : batch <= 2 ? 8 : 4; }
constexpr int BAND_TOGETHER = 4;
constexpr int groups_together(int batch) { return batch == 1 ? 16 : batch == 2 ? 8 : 4; }
constexpr int MANY_ROWS = 4, MANY_BATCH = 6;  // of the tiles of sums for many rows of activations

#include "matmul_avx512.h"
#include "matmul_codes.h"
#include "matmul_rows.h"
#include "matmul_columns.h"
#include "matmul_gemm.h"
#include "matmul_dispatch.h"
#include "matmul_band.h"

}  // namespace

const Kernels avx512_kernels = {rows, columns, band};

}  // namespace matmul
#endif
