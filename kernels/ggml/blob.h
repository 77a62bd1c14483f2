// A tensor as it lies in a GGUF file in one of our types; see docs/gguf-format.md.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "anyquant_matmul.h"

namespace blob {

constexpr int BLOCK = 32;  // weights
constexpr uint32_t HEADER_BYTES = 256;
constexpr int SECTIONS = 8;

enum Kind : uint8_t { CODEBOOK = 1, BLOCKS = 2, AFFINE = 3 };

struct Section {
  uint64_t offset, bytes;
};

struct Header {
  char magic[8];
  uint32_t version, header_bytes, header_checksum, data_checksum;
  uint64_t used, rows, columns;
  uint32_t stride;  // bytes of a row of the tensor
  uint8_t kind, form, width, exponent_width;
  uint32_t block;
  uint8_t reserved[4];
  Section section[SECTIONS];
  char name[64];
};
static_assert(sizeof(Header) == HEADER_BYTES, "the format says so");

// Whether a tensor begins here: magic, checksum of the header, sizes. stride: as the type and the columns have it; most:
// bytes that can be read.
bool begins_at(const void* at, size_t most, uint64_t columns, uint64_t stride);

// CRC-32 as zlib has it.
uint32_t checksum(const void* data, size_t bytes);

// Whether the data are what their checksum says.
bool is_whole(const Header& header);

// Repacks data that is whole for aq_matmul_band, or for products of all rows at once, into memory from aligned_alloc. Null
// where its sections or what is in them do not fit together, or there is no memory.
void* repack(const Header& header, bool in_bands);

// One row in FP32, as the intermediate representation defines it, of what could be repacked.
void dequantize(const Header& header, uint64_t row, float* out);

}  // namespace blob
