// Products by AVX2, FMA and F16C; see matmul_codes.h.

#include <string.h>

#include "half.h"
#include "matmul_layout.h"
#include "matmul_outliers.h"

#if VECTOR_UNITS
#include <immintrin.h>

#pragma GCC target("avx2,fma,f16c")

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")
#define INLINE_LAMBDA __attribute__((always_inline))

namespace matmul {
namespace {

// As registers suffice.
constexpr int rows_together(int, int batch) { return batch > 1 ? 1 : 2; }
constexpr int BAND_TOGETHER = 2;
constexpr int groups_together(int) { return 4; }
constexpr int MANY_ROWS = 2, MANY_BATCH = 2;  // of the tiles of sums for many rows of activations

#include "matmul_avx2.h"
#include "matmul_codes.h"
#include "matmul_rows.h"
#include "matmul_columns.h"
#include "matmul_gemm.h"
#include "matmul_dispatch.h"
#include "matmul_band.h"

}  // namespace

const Kernels avx2_kernels = {rows, columns, band};

}  // namespace matmul
#endif
