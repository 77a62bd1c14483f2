// Products for any processor; see matmul_codes.h.

#include <string.h>

#include "half.h"
#include "matmul_layout.h"
#include "matmul_outliers.h"

#define INLINE inline __attribute__((always_inline))
#define UNROLL  // lanes are loops already
#define INLINE_LAMBDA __attribute__((always_inline))

namespace matmul {
namespace {

constexpr int rows_together(int, int) { return 1; }
constexpr int BAND_TOGETHER = 1;
constexpr int groups_together(int) { return 4; }
constexpr int MANY_ROWS = 1, MANY_BATCH = 1;  // of the tiles of sums for many rows of activations

#include "matmul_scalar.h"
#include "matmul_codes.h"
#include "matmul_rows.h"
#include "matmul_columns.h"
#include "matmul_gemm.h"
#include "matmul_dispatch.h"
#include "matmul_band.h"

}  // namespace

const Kernels scalar_kernels = {rows, columns, band};

}  // namespace matmul
