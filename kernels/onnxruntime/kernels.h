// The kernels of anyquant::CodebookMatMul, one for each execution provider.
#pragma once

#include "ort_api.h"

struct OperatorKernel {
  const char* provider;
  int constants;  // memory that inputs after the first are to lie in
  OrtStatus* (*create)(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** kernel);
  OrtStatus* (*compute)(void* kernel, OrtKernelContext* context);
  void (*destroy)(void* kernel);
};

extern const OperatorKernel cpu_kernel, cuda_kernel;
