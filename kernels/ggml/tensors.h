// Tensors that have been met: each is checked and repacked once, when the first of its rows is asked for.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <cstring>

#include "blob.h"

struct Tensor {
  const char* begin;  // the blob; bytes 0: the memory holds something else by now
  size_t bytes;
  uint64_t stride;
  uint32_t checksums[2];  // of the header and of the data, as the header says
  uint32_t* row_checksums;  // null: no memory for them
  void* packed;  // null: damaged
  size_t cache_bytes;  // that each thread needs for it

  const blob::Header& header() const { return *reinterpret_cast<const blob::Header*>(begin); }
};

// Where a thread is. A product asks for every row, one after the other.
struct Place {
  const Tensor* tensor = nullptr;
  const char* row = nullptr;
  uint64_t number = 0;
};

inline bool unchanged(const Tensor& t) {
  return std::memcmp(&t.header().header_checksum, t.checksums, sizeof(t.checksums)) == 0;
}

// Goes to a row; false where it is of no tensor, or of a damaged one, which is said on stderr once for each.
bool look_up(const char* row, uint64_t columns, uint64_t stride, Place* place);

inline bool go_to(const char* row, uint64_t columns, uint64_t stride, Place* place) {
  const Tensor* t = place->tensor;
  // The next one of the same tensor needs no division.
  if (!t || row != place->row + stride || t->stride != stride || row >= t->begin + t->bytes || !unchanged(*t)) {
    return look_up(row, columns, stride, place);
  }
  place->row = row;
  ++place->number;
  return t->packed != nullptr;
}
