// Tensors that have been met: each is checked and repacked once, when the first of its rows is asked for.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "blob.h"

struct Tensor {
  const char* begin;  // the blob; bytes 0: the memory holds something else by now
  size_t bytes;
  uint64_t stride;
  uint32_t checksums[2];
  void* packed;  // null: damaged

  const blob::Header& header() const { return *reinterpret_cast<const blob::Header*>(begin); }
};

// The tensor that this row belongs to, and which row of it that is; null where there is none, or a damaged one. Says so
// on stderr once for each.
const Tensor* tensor_of(const void* row, uint64_t columns, uint64_t stride, uint64_t* number);
