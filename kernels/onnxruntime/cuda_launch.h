// What is launched for a product of FP32 activations with a packed matrix; see anyquant/runtime/cuda/products.py.
#pragma once

#include "cuda_layout.h"
#include "cuda_library.h"

namespace cuda {

constexpr size_t MOST_ROWS = 8;  // of activations, at a time

// The kernels for one of few, or for up to eight, rows of activations with matrices of an axis and some widths.
struct Kernels {
  Function product, finish;  // finish: where columns have codebooks
};

// Those of the current context, loaded once. False: see words.
bool kernels_for(const Driver& driver, Context context, const CudaLayout& layout, size_t batch, Kernels* kernels,
                 Words* words);

struct Product {
  const CudaLayout* layout;
  Pointer packed, bias;  // bias: FP32 for each output, or 0
  int multiprocessors;
};

// y [batch][rows] of x [batch][cols], at most eight rows. False: see words.
bool multiply(const Driver& driver, const Product& product, const Kernels& kernels, Stream stream, Pointer x,
              size_t batch, Pointer y, Words* words);

// Says what the driver says of a failure; false, always.
bool failed(const Driver& driver, Result result, const char* what, Words* words);

}  // namespace cuda
