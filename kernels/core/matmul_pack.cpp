// Repacking of a codebook matrix for products; see anyquant_matmul.h and matmul_layout.h.

#include <atomic>
#include <cstring>
#include <utility>

#include "anyquant_matmul.h"
#include "half.h"
#include "matmul_layout.h"
#include "matmul_outliers.h"
#include "matmul_place.h"

using namespace matmul;

namespace {

struct Census {
  uint64_t channels, length, codes = 0, entries = 0;
  uint32_t count[MOST_BITS + 1] = {};
};

// Whether all fields and lengths fit together, values of outliers aside.
bool take(const aq_codebook_matrix& m, Census* census) {
  if (m.rows < 1 || m.rows > MOST_SIDE || m.cols < 1 || m.cols > MOST_SIDE || m.axis < 0 || m.axis > 1) return false;
  const uint64_t channels = m.axis ? m.cols : m.rows, length = m.axis ? m.rows : m.cols;
  if (m.bits_len != channels || !m.bits) return false;
  census->channels = channels;
  census->length = length;
  for (uint64_t c = 0; c < channels; ++c) {
    if (m.bits[c] > MOST_BITS) return false;
    ++census->count[m.bits[c]];
    census->codes += stream_bytes(length, m.bits[c]);
    census->entries += static_cast<uint64_t>(1) << m.bits[c];
  }
  if (m.codes_len != census->codes || (!m.codes && m.codes_len)) return false;
  if (m.codebook_len != census->entries || !m.codebook) return false;
  if (m.input_scale_len != (m.input_scale ? m.cols : 0)) return false;
  if (!m.outlier_indptr) return m.outlier_indptr_len == 0 && m.outlier_index_len == 0 && m.outlier_value_len == 0;
  if (m.outlier_indptr_len != m.rows + 1 || m.outlier_index_len != m.outlier_value_len) return false;
  if (m.outlier_index_len && (!m.outlier_index || !m.outlier_value)) return false;
  return m.index_bytes == 2 || m.index_bytes == 4;
}

uint32_t outlier_column(const aq_codebook_matrix& m, size_t i) {
  if (m.index_bytes == 2) return static_cast<const uint16_t*>(m.outlier_index)[i];
  return static_cast<const uint32_t*>(m.outlier_index)[i];
}

bool outliers_ascend(const aq_codebook_matrix& m) {
  if (!m.outlier_indptr) return true;
  if (m.outlier_indptr[0] != 0 || m.outlier_indptr[m.rows] != m.outlier_index_len) return false;
  for (uint64_t row = 0; row < m.rows; ++row) {
    const uint32_t begin = m.outlier_indptr[row], end = m.outlier_indptr[row + 1];
    if (begin > end || end > m.outlier_index_len) return false;
    for (uint32_t i = begin; i < end; ++i) {
      if (outlier_column(m, i) >= m.cols) return false;
      if (i > begin && outlier_column(m, i) <= outlier_column(m, i - 1)) return false;
    }
  }
  return true;
}

// Where everything lies.
Packed plan(const aq_codebook_matrix& m, const Census& census) {
  Packed p = {};
  p.magic = MAGIC;
  p.rows = static_cast<uint32_t>(m.rows);
  p.cols = static_cast<uint32_t>(m.cols);
  p.axis = m.axis;
  p.outliers = m.outlier_index_len;
  Room room;
  p.order = room(census.channels * sizeof(uint32_t));
  if (m.input_scale) p.scale = room(m.cols * sizeof(float));
  if (p.outliers) {
    p.indptr = room(((m.axis ? half_units(p) : m.rows) + 1) * sizeof(uint32_t));
    if (m.axis) p.outlier_row = room(p.outliers);
    p.index = room(p.outliers * sizeof(uint32_t));
    p.delta = room(p.outliers * sizeof(float));
  }
  uint32_t first = 0;
  for (int bits = 0; bits <= MOST_BITS; ++bits) {
    if (!census.count[bits]) continue;
    Section& s = p.section[p.sections++];
    s.bits = bits;
    s.first = first;
    s.count = census.count[bits];
    s.tiled = s.count / TILE * TILE;
    divide(census.length, &s);
    first += s.count;
    if (m.in_bands && !m.axis) continue;
    s.tables = room(s.count * table_entries(bits) * sizeof(uint16_t));
    s.codes = room(s.count * s.channel_bytes());
  }
  if (m.in_bands && !m.axis) plan_bands(&p, &room);
  p.bytes = room.end;
  return p;
}

// The place of a channel among the sorted ones of its section, which ascend.
uint32_t number_of(const Packed& p, const Section& s, uint32_t channel) {
  const auto* order = p.at<uint32_t>(p.order) + s.first;
  uint32_t low = 0, high = s.count;
  while (low + 1 < high) {
    const uint32_t middle = low + (high - low) / 2;
    (order[middle] <= channel ? low : high) = middle;
  }
  return low;
}

// Puts outliers begin..end-1 into the order of their columns, rows beside them. Shell's sort: they lie in three arrays.
void sort_by_place(uint32_t* index, float* delta, uint8_t* row, uint32_t begin, uint32_t end) {
  for (uint32_t gap = (end - begin) / 2; gap; gap /= 2) {
    for (uint32_t i = begin + gap; i < end; ++i) {
      for (uint32_t j = i; j >= begin + gap && index[j - gap] > index[j]; j -= gap) {
        std::swap(index[j], index[j - gap]);
        std::swap(delta[j], delta[j - gap]);
        std::swap(row[j], row[j - gap]);
      }
    }
  }
}

// Where the table and the codes of a channel are.
struct Channel {
  const Section* section;
  uint32_t number;  // of the section
  uint16_t* table;
  Place codes;
};

Channel channel_at(const Packed& p, const int* section_of, int bits, uint32_t channel, uint32_t number, char* base) {
  const Section& s = p.section[section_of[bits]];
  if (!p.bands) {
    auto* table = reinterpret_cast<uint16_t*>(base + s.tables) + number * table_entries(bits);
    return {&s, number, table, place_of(s, number, base + s.codes, p.axis)};
  }
  char* record = base + record_of(p, channel / BAND, section_of[bits], number);
  return {&s, number, reinterpret_cast<uint16_t*>(record), place_in(s, record + table_bytes(p, s), 1, 0)};
}

// See matmul_outliers.h.
void write_outliers(const aq_codebook_matrix& m, const Packed& p, const int* section_of, char* base) {
  auto* indptr = reinterpret_cast<uint32_t*>(base + p.indptr);
  auto* index = reinterpret_cast<uint32_t*>(base + p.index);
  auto* delta = reinterpret_cast<float*>(base + p.delta);
  auto* row_of_half = reinterpret_cast<uint8_t*>(base + p.outlier_row);
  auto* scale = p.scale ? reinterpret_cast<float*>(base + p.scale) : nullptr;
  const auto* order = p.at<uint32_t>(p.order);
  uint32_t put = 0;
  for (uint32_t place = 0; place < m.rows; ++place) {
    const uint32_t row = m.axis ? place : order[place];
    if (!m.axis) indptr[place] = put;
    if (m.axis && row % HALF_UNIT == 0) indptr[row / HALF_UNIT] = put;
    for (uint32_t i = m.outlier_indptr[row]; i < m.outlier_indptr[row + 1]; ++i, ++put) {
      const uint32_t column = outlier_column(m, i), channel = m.axis ? column : row;
      const Section& s = p.section[section_of[m.bits[channel]]];
      const Channel at = channel_at(p, section_of, s.bits, channel, number_of(p, s, channel), base);
      const float entry = from_half(at.table[s.bits ? read_code(s, at.codes, m.axis ? row : column) : 0]);
      if (scale && scale[column] == 0) scale[column] = SCALE_OF_NOTHING;
      index[put] = m.axis ? s.first + at.number : column;
      delta[put] = from_half(m.outlier_value[i]) / (scale ? scale[column] : 1) - entry;
      if (m.axis) row_of_half[put] = static_cast<uint8_t>(row % HALF_UNIT);
    }
  }
  indptr[m.axis ? half_units(p) : m.rows] = put;
  for (size_t half = 0; m.axis && half < half_units(p); ++half) {
    sort_by_place(index, delta, row_of_half, indptr[half], indptr[half + 1]);
  }
}

// Writes down how many rows of each section come before each band.
void count_bands(const aq_codebook_matrix& m, const Packed& p, uint32_t* begin) {
  uint32_t count[MOST_BITS + 1] = {};
  for (uint64_t row = 0; row <= m.rows; ++row) {
    if (row % BAND == 0 || row == m.rows) {
      for (int i = 0; i < p.sections; ++i) *begin++ = count[p.section[i].bits];
    }
    if (row < m.rows) ++count[m.bits[row]];
  }
}

}  // namespace

uint64_t matmul::next_serial() {
  static std::atomic<uint64_t> last{0};
  return ++last;
}

extern "C" size_t aq_matmul_bytes(const aq_codebook_matrix* matrix) {
  Census census = {};
  if (!matrix || !take(*matrix, &census)) return 0;
  return plan(*matrix, census).bytes;
}

extern "C" int aq_matmul_pack(const aq_codebook_matrix* matrix, void* packed, size_t packed_len) {
  Census census = {};
  if (!matrix || !packed || reinterpret_cast<uintptr_t>(packed) % LINE || !take(*matrix, &census)) {
    return AQ_BAD_ARGUMENT;
  }
  const aq_codebook_matrix& m = *matrix;
  Packed header = plan(m, census);
  header.serial = next_serial();
  if (packed_len != header.bytes) return AQ_BAD_LENGTH;
  if (!outliers_ascend(m)) return AQ_BAD_VALUE;
  std::memset(packed, 0, packed_len);
  std::memcpy(packed, &header, sizeof(header));
  char* base = static_cast<char*>(packed);
  const Packed& p = *static_cast<const Packed*>(packed);
  auto* order = reinterpret_cast<uint32_t*>(base + p.order);

  int section_of[MOST_BITS + 1] = {};
  uint32_t next[MOST_BITS + 1] = {};
  for (int i = 0; i < p.sections; ++i) section_of[p.section[i].bits] = i;
  if (p.bands) count_bands(m, p, reinterpret_cast<uint32_t*>(base + p.bands));

  if (m.input_scale) {
    auto* scale = reinterpret_cast<float*>(base + p.scale);
    for (uint64_t c = 0; c < m.cols; ++c) scale[c] = from_half(m.input_scale[c]);
  }
  const uint8_t* codes = m.codes;
  const uint16_t* entries = m.codebook;
  for (uint64_t c = 0; c < census.channels; ++c) {
    const int bits = m.bits[c];
    const Channel at = channel_at(p, section_of, bits, static_cast<uint32_t>(c), next[bits]++, base);
    order[at.section->first + at.number] = static_cast<uint32_t>(c);
    const size_t size = static_cast<size_t>(1) << bits;
    for (size_t i = 0; i < table_entries(bits); ++i) at.table[i] = entries[i % size];
    const Stream stream = {codes, bits};
    if (bits) write_channel(*at.section, stream, census.length, at.codes);
    codes += stream_bytes(census.length, bits);
    entries += size;
  }
  if (p.outliers) write_outliers(m, p, section_of, base);
  return AQ_OK;
}
