// See blob.h.

#include "blob.h"

#include <cstdlib>
#include <cstring>

#include "half.h"
#include "matmul_place.h"

using matmul::Stream;
using matmul::stream_bytes;

namespace blob {
namespace {

struct Crc32Table {
  uint32_t of[8][256] = {};
  constexpr Crc32Table() {
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t c = i;
      for (int k = 0; k < 8; ++k) c = c & 1 ? c >> 1 ^ 0xedb88320u : c >> 1;
      of[0][i] = c;
    }
    for (uint32_t i = 0; i < 256; ++i) {
      for (int t = 1; t < 8; ++t) of[t][i] = of[t - 1][i] >> 8 ^ of[0][of[t - 1][i] & 255];
    }
  }
};
constexpr Crc32Table TABLE;

// A section; none has no bytes.
template <class T>
const T* at(const Header& h, int section) {
  const Section& s = h.section[section];
  return s.bytes ? reinterpret_cast<const T*>(reinterpret_cast<const char*>(&h) + s.offset) : nullptr;
}

template <class T>
size_t count(const Header& h, int section) {
  return h.section[section].bytes / sizeof(T);
}

bool sections_fit(const Header& h) {
  for (const Section& s : h.section) {
    if (!s.bytes) continue;
    if (s.offset % matmul::LINE || s.offset < HEADER_BYTES || s.offset > h.used || s.bytes > h.used - s.offset) return false;
  }
  return true;
}

uint64_t blocks_of_row(const Header& h) { return (h.columns + h.block - 1) / h.block; }

// 2^exponent as the high half of an FP32 number.
uint16_t power(int exponent) {
  return static_cast<uint16_t>(exponent >= -126 ? (exponent + 127) << 7 : 0x80 >> (-126 - exponent));
}

bool codebook_matrix(const Header& h, aq_codebook_matrix* m) {
  m->rows = h.rows;
  m->cols = h.columns;
  m->axis = h.form;
  m->index_bytes = h.columns <= 65536 ? 2 : 4;
  m->bits = at<uint8_t>(h, 0), m->bits_len = count<uint8_t>(h, 0);
  m->codes = at<uint8_t>(h, 1), m->codes_len = count<uint8_t>(h, 1);
  m->codebook = at<uint16_t>(h, 2), m->codebook_len = count<uint16_t>(h, 2);
  m->input_scale = at<uint16_t>(h, 3), m->input_scale_len = count<uint16_t>(h, 3);
  m->outlier_indptr = at<uint32_t>(h, 4), m->outlier_indptr_len = count<uint32_t>(h, 4);
  m->outlier_index = at<uint8_t>(h, 5), m->outlier_index_len = h.section[5].bytes / m->index_bytes;
  m->outlier_value = at<uint16_t>(h, 6), m->outlier_value_len = count<uint16_t>(h, 6);
  return h.form <= 1;
}

void* finish(const void* matrix, size_t (*size)(const void*), int (*pack)(const void*, void*, size_t)) {
  const size_t bytes = size(matrix);
  void* packed = bytes ? std::aligned_alloc(matmul::LINE, matmul::round_up(bytes, matmul::LINE)) : nullptr;
  if (packed && pack(matrix, packed, bytes) != AQ_OK) {
    std::free(packed);
    packed = nullptr;
  }
  return packed;
}

void* repack_codebook(const Header& h, bool in_bands) {
  aq_codebook_matrix m = {};
  if (!codebook_matrix(h, &m)) return nullptr;
  m.in_bands = in_bands;
  return finish(
      &m, [](const void* p) { return aq_matmul_bytes(static_cast<const aq_codebook_matrix*>(p)); },
      [](const void* p, void* to, size_t bytes) {
        return aq_matmul_pack(static_cast<const aq_codebook_matrix*>(p), to, bytes);
      });
}

void* repack_blocks(const Header& h, bool in_bands) {
  aq_block_matrix m = {};
  m.rows = h.rows;
  m.cols = h.columns;
  m.bits = h.width;
  m.block = static_cast<int32_t>(h.block);
  m.in_bands = in_bands;
  m.codes = at<uint8_t>(h, 0), m.codes_len = count<uint8_t>(h, 0);
  uint16_t* powers = nullptr;
  if (h.kind == AFFINE) {
    m.scale = at<uint16_t>(h, 1), m.scale_len = count<uint16_t>(h, 1);
    m.zero = at<uint8_t>(h, 2), m.zero_len = count<uint8_t>(h, 2);
    if (!m.zero) return nullptr;
  } else {
    const auto* exponents = at<int8_t>(h, 1);
    m.bfloat = 1;
    m.table = at<float>(h, 2), m.table_len = count<float>(h, 2);
    m.scale_len = count<int8_t>(h, 1);
    powers = static_cast<uint16_t*>(std::malloc(m.scale_len * sizeof(uint16_t) + 1));
    if (!exponents || !m.table || !powers) {
      std::free(powers);
      return nullptr;
    }
    for (size_t i = 0; i < m.scale_len; ++i) powers[i] = power(exponents[i]);
    m.scale = powers;
  }
  void* packed = finish(
      &m, [](const void* p) { return aq_matmul_block_bytes(static_cast<const aq_block_matrix*>(p)); },
      [](const void* p, void* to, size_t bytes) {
        return aq_matmul_pack_blocks(static_cast<const aq_block_matrix*>(p), to, bytes);
      });
  std::free(powers);
  return packed;
}

void dequantize_codebook(const Header& h, uint64_t row, float* out) {
  const auto *bits = at<uint8_t>(h, 0), *codes = at<uint8_t>(h, 1);
  const auto *entries = at<uint16_t>(h, 2), *scale = at<uint16_t>(h, 3);
  const bool columns = h.form == 1;
  const uint64_t channels = columns ? h.columns : row + 1, length = columns ? h.rows : h.columns;
  for (uint64_t c = 0; c < channels; ++c) {
    if (columns) {
      out[c] = from_half(entries[Stream{codes, bits[c]}.at(row)]);
    } else if (c == row) {
      for (uint64_t k = 0; k < length; ++k) out[k] = from_half(entries[Stream{codes, bits[c]}.at(k)]);
    }
    codes += stream_bytes(length, bits[c]);
    entries += static_cast<size_t>(1) << bits[c];
  }
  for (uint64_t k = 0; scale && k < h.columns; ++k) out[k] *= from_half(scale[k]);
  const auto* indptr = at<uint32_t>(h, 4);
  for (uint32_t i = indptr ? indptr[row] : 0; indptr && i < indptr[row + 1]; ++i) {
    out[h.columns <= 65536 ? at<uint16_t>(h, 5)[i] : at<uint32_t>(h, 5)[i]] = from_half(at<uint16_t>(h, 6)[i]);
  }
}

void dequantize_blocks(const Header& h, uint64_t row, float* out) {
  const uint64_t blocks = blocks_of_row(h);
  const uint8_t* codes = at<uint8_t>(h, 0) + row * stream_bytes(blocks * h.block, h.width);
  for (uint64_t k = 0; k < h.columns; ++k) {
    const unsigned code = Stream{codes, h.width}.at(k);
    const uint64_t i = row * blocks + k / h.block;
    if (h.kind == AFFINE) {
      const int zero = at<uint8_t>(h, 2)[i];
      out[k] = static_cast<float>(static_cast<int>(code) - zero) * from_half(at<uint16_t>(h, 1)[i]);
    } else {
      out[k] = at<float>(h, 2)[code] * from_bfloat(power(at<int8_t>(h, 1)[i]));
    }
  }
}

}  // namespace

// Eight bytes at a time.
uint32_t checksum(const void* data, size_t bytes) {
  const auto* p = static_cast<const uint8_t*>(data);
  uint32_t crc = ~0u;
  for (; bytes >= 8; bytes -= 8, p += 8) {
    uint32_t low, high, next = 0;
    std::memcpy(&low, p, 4);
    std::memcpy(&high, p + 4, 4);
    low ^= crc;
    for (int i = 0; i < 4; ++i) next ^= TABLE.of[7 - i][low >> 8 * i & 255] ^ TABLE.of[3 - i][high >> 8 * i & 255];
    crc = next;
  }
  for (; bytes; --bytes, ++p) crc = TABLE.of[0][(crc ^ *p) & 255] ^ crc >> 8;
  return ~crc;
}

bool begins_at(const void* memory, size_t most, uint64_t columns, uint64_t stride) {
  if (most < HEADER_BYTES || std::memcmp(memory, "AQTENSOR", 8)) return false;
  Header h;
  std::memcpy(&h, memory, sizeof(h));
  const uint32_t said = h.header_checksum;
  h.header_checksum = 0;
  if (checksum(&h, sizeof(h)) != said || h.version != 1 || h.header_bytes != HEADER_BYTES) return false;
  if (h.columns != columns || h.stride != stride || !h.rows || h.rows > most / stride) return false;
  return h.used >= HEADER_BYTES && h.used <= h.rows * stride;
}

bool is_whole(const Header& h) {
  return checksum(reinterpret_cast<const char*>(&h) + HEADER_BYTES, h.used - HEADER_BYTES) == h.data_checksum;
}

void* repack(const Header& h, bool in_bands) {
  if (!sections_fit(h) || (h.kind != CODEBOOK && h.kind != BLOCKS && h.kind != AFFINE)) return nullptr;
  return h.kind == CODEBOOK ? repack_codebook(h, in_bands) : repack_blocks(h, in_bands);
}

void dequantize(const Header& h, uint64_t row, float* out) {
  if (h.kind == CODEBOOK) {
    dequantize_codebook(h, row, out);
  } else {
    dequantize_blocks(h, row, out);
  }
}

}  // namespace blob
