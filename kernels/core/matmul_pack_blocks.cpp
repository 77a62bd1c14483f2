// Repacking of a matrix with scales of blocks for products; see anyquant_matmul.h and matmul_layout.h.

#include <cstring>

#include "anyquant_matmul.h"
#include "matmul_layout.h"
#include "matmul_place.h"

using namespace matmul;

namespace {

uint64_t blocks_of(const aq_block_matrix& m) { return (m.cols + m.block - 1) / m.block; }

size_t row_bytes(const aq_block_matrix& m) { return stream_bytes(blocks_of(m) * m.block, m.bits); }

// Whether all fields and lengths fit together.
bool take(const aq_block_matrix& m) {
  if (m.rows < 1 || m.rows > MOST_SIDE || m.cols < 1 || m.cols > MOST_SIDE) return false;
  if (m.bits < 1 || m.bits > MOST_BITS || m.bfloat < 0 || m.bfloat > 1) return false;
  if (m.block != 16 && m.block != 32 && m.block != 64 && m.block != 128 && m.block != 256) return false;
  const size_t codes = static_cast<size_t>(1) << m.bits, scales = m.rows * blocks_of(m);
  if (!m.codes || m.codes_len != m.rows * row_bytes(m) || !m.scale || m.scale_len != scales) return false;
  if (m.recode_len != (m.recode ? codes : 0) || m.table_len != (m.table ? codes : 0)) return false;
  return m.zero_len == (m.zero ? scales : 0);
}

Packed plan(const aq_block_matrix& m) {
  Packed p = {};
  p.magic = MAGIC;
  p.rows = static_cast<uint32_t>(m.rows);
  p.cols = static_cast<uint32_t>(m.cols);
  p.sections = 1;
  p.blocks.block = static_cast<uint32_t>(m.block);
  p.blocks.blocks = static_cast<uint32_t>(blocks_of(m));
  p.blocks.bfloat = m.bfloat;
  p.blocks.numbers = !m.table;
  Section& s = p.section[0];
  s.bits = m.bits;
  s.count = p.rows;
  s.tiled = s.count / TILE * TILE;
  divide(m.cols, &s);
  Room room;
  p.order = room(m.rows * sizeof(uint32_t));
  p.blocks.table = room(table_entries(m.bits) * sizeof(float));
  p.blocks.scales = room(m.scale_len * sizeof(uint16_t));
  if (m.zero) p.blocks.zeros = room(m.zero_len);
  if (m.in_bands) {
    plan_bands(&p, &room);
  } else {
    s.codes = room(s.count * s.channel_bytes());
  }
  p.bytes = room.end;
  return p;
}

}  // namespace

extern "C" size_t aq_matmul_block_bytes(const aq_block_matrix* matrix) {
  return matrix && take(*matrix) ? plan(*matrix).bytes : 0;
}

extern "C" int aq_matmul_pack_blocks(const aq_block_matrix* matrix, void* packed, size_t packed_len) {
  if (!matrix || !packed || reinterpret_cast<uintptr_t>(packed) % LINE || !take(*matrix)) return AQ_BAD_ARGUMENT;
  const aq_block_matrix& m = *matrix;
  Packed p = plan(m);
  p.serial = next_serial();
  if (packed_len != p.bytes) return AQ_BAD_LENGTH;
  const size_t codes = static_cast<size_t>(1) << m.bits;
  for (size_t i = 0; i < m.recode_len; ++i) {
    if (m.recode[i] >= codes) return AQ_BAD_VALUE;
  }
  std::memset(packed, 0, packed_len);
  std::memcpy(packed, &p, sizeof(p));
  char* base = static_cast<char*>(packed);
  auto* table = reinterpret_cast<float*>(base + p.blocks.table);
  for (size_t i = 0; i < table_entries(m.bits); ++i) {
    table[i] = m.table ? m.table[i % codes] : static_cast<float>(i % codes);
  }
  std::memcpy(base + p.blocks.scales, m.scale, m.scale_len * sizeof(uint16_t));
  if (m.zero) std::memcpy(base + p.blocks.zeros, m.zero, m.zero_len);
  for (uint32_t band = 0; p.bands && band <= (p.rows - 1) / BAND + 1; ++band) {
    reinterpret_cast<uint32_t*>(base + p.bands)[band] = band * BAND < p.rows ? band * BAND : p.rows;
  }
  for (uint32_t row = 0; row < p.rows; ++row) {
    reinterpret_cast<uint32_t*>(base + p.order)[row] = row;
    const Stream stream = {m.codes + row * row_bytes(m), m.bits, m.recode};
    const Section& s = p.section[0];
    char* record = base + p.records + row * record_bytes(p, s);
    write_channel(s, stream, m.cols, m.in_bands ? place_in(s, record, 1, 0) : place_of(s, row, base + s.codes, 0));
  }
  return AQ_OK;
}
