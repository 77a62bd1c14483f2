// The constants of a CodebookMatMul node, as docs/onnx-operators.md defines them: read and checked.
#pragma once

#include "anyquant_matmul.h"
#include "ort_api.h"

// Memory that begins at the border of a cache line; freed with it.
class Memory {
 public:
  Memory() = default;
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  // Whether there is that much to be had; what was held before is freed.
  bool reserve(size_t bytes);
  // Another's, which then has none.
  void take(Memory* other);
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
};

struct Constants {
  int64_t inputs = 0, outputs = 0;
  aq_codebook_matrix matrix = {};  // refers to what the node has, and to the streams
  Memory streams;                  // the codes
  Memory bias;                     // [outputs], or nothing
};

// An error that says the node's name first.
OrtStatus* refuse(const OrtApi& api, const OrtKernelInfo* info, int error, const char* format, ...)
    __attribute__((format(printf, 4, 5)));

// Null, or why the node's constants mean nothing.
OrtStatus* read_constants(const OrtApi& api, const OrtKernelInfo* info, Constants* constants);
