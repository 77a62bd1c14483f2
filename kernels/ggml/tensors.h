// Tensors that have been met: each is checked when it is first asked for, and repacked once for each way of multiplying
// with it.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <atomic>
#include <cstring>

#include "blob.h"

// What a tensor is repacked for: products of some rows, or of all of them at once.
enum Layout { BANDS, WHOLE };

struct Tensor {
  Tensor* after;      // the one that was met next
  const char* begin;  // the blob; bytes 0: the memory holds something else by now
  size_t bytes;
  uint64_t columns, stride;
  uint32_t checksums[2];  // of the header and of the data, as the header says
  // Of each row its checksum, and how it begins.
  uint32_t* row_checksums;
  uint64_t* beginnings;
  std::atomic<bool> damaged;  // its data
  // By Layout. Null: not yet, or not at all.
  std::atomic<void*> packed[2];
  std::atomic<bool> failed[2];

  const blob::Header& header() const { return *reinterpret_cast<const blob::Header*>(begin); }
};

// Where a thread is.
struct Place {
  Tensor* tensor = nullptr;
  uint64_t row = 0;
  const void* activations = nullptr;  // that the last product was with
  bool looked_up = false;             // the last time
};

// Goes to a row; false where it is of no tensor, or of a damaged one, which is said on stderr once for each.
bool look_up(const char* row, uint64_t columns, uint64_t stride, Place* place);

// The same without looking closely where the product is plainly the one before, which goes on: ggml takes rows of a
// matrix one after the other and leaves out what other threads do, or takes a block of them again with other activations.
// Reads of memory the row alone: where another model lies now, the tensor's beginning may be gone.
inline bool go_to(const char* row, uint64_t columns, uint64_t stride, const void* activations, Place* place) {
  constexpr uint64_t ROWS_OF_BLOCK = 16;
  const bool same = activations == place->activations;
  place->activations = activations;
  Tensor* t = place->tensor;
  if (!t || t->stride != stride || row < t->begin || row >= t->begin + t->bytes) {
    return look_up(row, columns, stride, place);
  }
  const auto bytes = static_cast<uint64_t>(row - t->begin), number = bytes / stride;
  const bool goes_on = number > place->row ? same : place->row - number < ROWS_OF_BLOCK;
  // The header begins like any other.
  if (!goes_on || bytes < blob::HEADER_BYTES || number * stride != bytes ||
      std::memcmp(row, t->beginnings + number, sizeof(uint64_t))) {
    return look_up(row, columns, stride, place);
  }
  place->row = number;
  place->looked_up = false;
  return !t->damaged;
}

// Null where it is damaged, does not fit together, or there is no memory for it, which is said once.
const void* packed_for(Tensor* tensor, Layout layout);

// Whether its values can be asked for: what could be repacked was checked.
bool is_sound(Tensor* tensor);

// The tensor of so many rows that begins here, in memory that is there, and has been met; null where none has. previous:
// what the thread asked for last, or null.
Tensor* known_at(const char* begin, uint64_t rows, uint64_t columns, uint64_t stride, const Tensor* previous);

// The same, and meets it; null where none begins here.
Tensor* tensor_at(const char* begin, uint64_t rows, uint64_t columns, uint64_t stride);
