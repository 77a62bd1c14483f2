// What a run gives to a kernel and takes from it.
#pragma once

#include "ort_api.h"

// FP32 in the memory of the execution provider.
struct Activations {
  size_t batch;  // rows; 0: there is nothing to do
  const float* x;
  float* y;
};

// Null, or why A does not fit a matrix of so many outputs and inputs.
OrtStatus* open_activations(const OrtApi& api, OrtKernelContext* context, int64_t outputs, int64_t inputs,
                            Activations* activations);
