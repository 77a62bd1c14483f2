// Codebook matrices as the kernels of kernels/cuda multiply with them: what anyquant/runtime/cuda/layout.py makes, to the
// last byte. The layout is described in kernels/cuda/packed.cuh.
#pragma once

#include "constants.h"

// What a launch has to know of a packed matrix; see Layout there.
struct CudaLayout {
  uint32_t rows, cols, axis, widths, tasks, outliers;
  size_t bytes;
};

// Sizes of a matrix that read_constants found good.
CudaLayout cuda_layout(const aq_codebook_matrix& matrix);

// The matrix, into so many bytes; false: there is no memory for what it takes besides.
bool cuda_pack(const aq_codebook_matrix& matrix, uint8_t* packed);
