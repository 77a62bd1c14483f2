// See cuda_layout.h.

#include "cuda_layout.h"

#include <string.h>

#include "half.h"
#include "matmul_layout.h"

using matmul::MOST_BITS, matmul::stream_bytes;

namespace {

constexpr uint64_t MAGIC = 0x3144554374726D61;
constexpr uint32_t TILE = 32, GROUP = 128, NO_COLUMN = 0xffffffff;
constexpr size_t LANE_BYTES = 16, ALIGNMENT = 256;
constexpr size_t COLUMN_TASKS = 512, TILES_OF_BLOCK = 8;

// As in packed.cuh.
struct Header {
  uint64_t magic, bytes;
  uint32_t rows, cols, axis, tasks, order_len, outliers, index_bytes, widths;
  uint64_t task, codes, tables, order, scale, indptr, index, value, delta;
};
struct Task {
  uint32_t bits, first, count, stride;
  uint64_t codes, tables;
};
static_assert(sizeof(Header) == 120 && sizeof(Task) == 32, "no padding");

constexpr size_t divided_up(size_t a, size_t b) { return (a + b - 1) / b; }

// How many channels have each width, and what those before the first one of a channel take.
struct Channels {
  size_t of_width[MOST_BITS + 1] = {};
  size_t number, length;

  explicit Channels(const aq_codebook_matrix& m) : number(m.axis ? m.cols : m.rows), length(m.axis ? m.rows : m.cols) {
    for (size_t c = 0; c < number; ++c) ++of_width[m.bits[c]];
  }
};

// Sizes of the parts whose channels have a width.
struct Section {
  size_t groups, tiles, codes, tables, order, tasks;
};

// Groups of a task where columns have codebooks.
size_t groups_of_task(const aq_codebook_matrix& m, const Channels& channels) {
  size_t groups = 0;
  for (size_t count : channels.of_width) groups += divided_up(count, GROUP);
  const size_t most = groups * divided_up(m.rows, TILE) / TILES_OF_BLOCK / COLUMN_TASKS;
  return most ? most : 1;
}

Section section_of(const aq_codebook_matrix& m, const Channels& channels, int bits) {
  const size_t count = channels.of_width[bits], entries = size_t{2} << bits;  // in bytes
  Section s = {};
  if (m.axis == 0) {
    s.groups = divided_up(m.cols, GROUP), s.tiles = divided_up(count, TILE);
    s.tables = s.tiles * TILE * entries, s.order = count, s.tasks = s.tiles;
  } else {
    s.groups = divided_up(count, GROUP), s.tiles = divided_up(m.rows, TILE);
    s.tables = s.groups * GROUP * entries, s.order = s.groups * GROUP;
    s.tasks = divided_up(s.groups, groups_of_task(m, channels));
  }
  s.codes = s.tiles * s.groups * bits * TILE * LANE_BYTES;
  return s;
}

// Offsets of all arrays, one after the other; the header's own lengths are there already.
size_t place(const aq_codebook_matrix& m, size_t codes, size_t tables, Header* h) {
  size_t end = sizeof(Header);
  const auto next = [&end](size_t bytes) {
    const size_t begin = divided_up(end, ALIGNMENT) * ALIGNMENT;
    end = begin + bytes;
    return static_cast<uint64_t>(begin);
  };
  h->task = next(h->tasks * sizeof(Task));
  h->codes = next(codes);
  h->tables = next(tables);
  h->order = next(h->order_len * sizeof(uint32_t));
  if (m.input_scale) h->scale = next(m.cols * sizeof(uint16_t));
  if (h->outliers) {
    h->indptr = next((m.rows + 1) * sizeof(uint32_t));
    h->index = next(m.outlier_value_len * m.index_bytes);
    h->value = next(m.outlier_value_len * sizeof(uint16_t));
    h->delta = next(m.outlier_value_len * sizeof(float));
  }
  return end;
}

Header header_of(const aq_codebook_matrix& m) {
  const Channels channels(m);
  Header h = {};
  size_t codes = 0, tables = 0;
  for (int bits = 0; bits <= MOST_BITS; ++bits) {
    if (!channels.of_width[bits]) continue;
    const Section s = section_of(m, channels, bits);
    codes += s.codes, tables += s.tables;
    h.order_len += static_cast<uint32_t>(s.order), h.tasks += static_cast<uint32_t>(s.tasks);
    h.widths |= 1u << bits;
  }
  h.magic = MAGIC;
  h.rows = static_cast<uint32_t>(m.rows), h.cols = static_cast<uint32_t>(m.cols), h.axis = static_cast<uint32_t>(m.axis);
  h.outliers = static_cast<uint32_t>(m.outlier_value_len), h.index_bytes = static_cast<uint32_t>(m.index_bytes);
  h.bytes = place(m, codes, tables, &h);
  return h;
}

uint32_t code_at(const uint8_t* stream, size_t i, int bits) {
  const size_t at = i * bits;
  if (!bits) return 0;
  uint32_t two = stream[at / 8];
  if (at % 8 + bits > 8) two |= static_cast<uint32_t>(stream[at / 8 + 1]) << 8;
  return two >> at % 8 & ((1u << bits) - 1);
}

// Where the codes and the entries of each channel begin.
struct Starts {
  Memory memory;
  size_t *stream, *entry;

  bool find(const aq_codebook_matrix& m, const Channels& channels) {
    if (!memory.reserve(2 * channels.number * sizeof(size_t))) return false;
    stream = memory.as<size_t>(), entry = stream + channels.number;
    size_t codes = 0, entries = 0;
    for (size_t c = 0; c < channels.number; ++c) {
      stream[c] = codes, entry[c] = entries;
      codes += stream_bytes(channels.length, m.bits[c]), entries += size_t{1} << m.bits[c];
    }
    return true;
  }
};

class Packer {
 public:
  Packer(const aq_codebook_matrix& m, const Header& header, const Channels& channels, const Starts& starts, uint8_t* to)
      : m_(m), h_(header), channels_(channels), starts_(starts), packed_(to) {
    memcpy(packed_, &h_, sizeof(h_));
  }

  void run() {
    for (int bits = MOST_BITS; bits >= 0; --bits) {  // what takes longest first
      if (!channels_.of_width[bits]) continue;
      const Section s = section_of(m_, channels_, bits);
      m_.axis ? columns(bits, s) : rows(bits, s);
      code_bytes_ += s.codes, table_bytes_ += s.tables, order_ += s.order;
    }
    if (m_.input_scale) memcpy(packed_ + h_.scale, m_.input_scale, m_.cols * sizeof(uint16_t));
    if (h_.outliers) outliers();
  }

 private:
  // Byte k of the stream of a row of a tile.
  uint8_t* lane_byte(const Section& s, int bits, size_t tile, uint32_t lane, size_t k) {
    const size_t line = k / LANE_BYTES;  // group, then which of its `bits` pieces
    const size_t first = tile * s.groups * bits + line;
    return packed_ + h_.codes + code_bytes_ + (first * TILE + lane) * LANE_BYTES + k % LANE_BYTES;
  }

  void add_task(const Task& task) {
    memcpy(packed_ + h_.task + tasks_++ * sizeof(Task), &task, sizeof(task));
  }

  void rows(int bits, const Section& s) {
    auto* order = reinterpret_cast<uint32_t*>(packed_ + h_.order) + order_;
    auto* tables = reinterpret_cast<uint16_t*>(packed_ + h_.tables + table_bytes_);
    const size_t entries = size_t{1} << bits, bytes = stream_bytes(m_.cols, bits);
    size_t place = 0;
    for (size_t row = 0; row < m_.rows; ++row) {
      if (m_.bits[row] != bits) continue;
      const size_t tile = place / TILE;
      const auto lane = static_cast<uint32_t>(place % TILE);
      if (!lane) {
        const size_t left = s.order - place;
        add_task({static_cast<uint32_t>(bits), static_cast<uint32_t>(order_ + place),
                  static_cast<uint32_t>(left < TILE ? left : TILE), 0,
                  h_.codes + code_bytes_ + tile * s.groups * bits * TILE * LANE_BYTES,
                  h_.tables + table_bytes_ + tile * entries * TILE * sizeof(uint16_t)});
      }
      const uint8_t* stream = m_.codes + starts_.stream[row];
      for (size_t k = 0; k < bytes; ++k) *lane_byte(s, bits, tile, lane, k) = stream[k];
      for (size_t e = 0; e < entries; ++e) {
        tables[(tile * entries + e) * TILE + lane] = m_.codebook[starts_.entry[row] + e];
      }
      order[place++] = static_cast<uint32_t>(row);
    }
  }

  void columns(int bits, const Section& s) {
    auto* order = reinterpret_cast<uint32_t*>(packed_ + h_.order) + order_;
    auto* tables = reinterpret_cast<uint16_t*>(packed_ + h_.tables + table_bytes_);
    const size_t entries = size_t{1} << bits, most = groups_of_task(m_, channels_);
    for (size_t group = 0; group < s.groups; group += most) {
      const size_t left = s.groups - group;
      add_task({static_cast<uint32_t>(bits), static_cast<uint32_t>(order_ + group * GROUP),
                static_cast<uint32_t>(left < most ? left : most), static_cast<uint32_t>(s.groups),
                h_.codes + code_bytes_ + group * bits * TILE * LANE_BYTES,
                h_.tables + table_bytes_ + group * GROUP * entries * sizeof(uint16_t)});
    }
    size_t place = 0;
    for (size_t column = 0; column < m_.cols; ++column) {
      if (m_.bits[column] != bits) continue;
      memcpy(tables + place * entries, m_.codebook + starts_.entry[column], entries * sizeof(uint16_t));
      const uint8_t* stream = m_.codes + starts_.stream[column];
      const size_t k = place * bits / 8, shift = place * bits % 8;
      for (size_t row = 0; bits && row < m_.rows; ++row) {
        const uint32_t code = code_at(stream, row, bits) << shift, lane = row % TILE;
        *lane_byte(s, bits, row / TILE, lane, k) |= static_cast<uint8_t>(code);
        if (shift + bits > 8) *lane_byte(s, bits, row / TILE, lane, k + 1) |= static_cast<uint8_t>(code >> 8);
      }
      order[place++] = static_cast<uint32_t>(column);
    }
    for (; place < s.order; ++place) order[place] = NO_COLUMN;
  }

  // What the code and the scale say; the product rounds once.
  float plain(size_t row, size_t column) const {
    const size_t channel = m_.axis ? column : row, at = m_.axis ? row : column;
    const uint32_t code = code_at(m_.codes + starts_.stream[channel], at, m_.bits[channel]);
    const float value = from_half(m_.codebook[starts_.entry[channel] + code]);
    return m_.input_scale ? value * from_half(m_.input_scale[column]) : value;
  }

  void outliers() {
    auto* deltas = reinterpret_cast<float*>(packed_ + h_.delta);
    for (size_t row = 0; row < m_.rows; ++row) {
      for (size_t i = m_.outlier_indptr[row]; i < m_.outlier_indptr[row + 1]; ++i) {
        const size_t column = m_.index_bytes == 2 ? static_cast<const uint16_t*>(m_.outlier_index)[i]
                                                  : static_cast<const uint32_t*>(m_.outlier_index)[i];
        deltas[i] = from_half(m_.outlier_value[i]) - plain(row, column);
      }
    }
    memcpy(packed_ + h_.indptr, m_.outlier_indptr, (m_.rows + 1) * sizeof(uint32_t));
    memcpy(packed_ + h_.index, m_.outlier_index, m_.outlier_value_len * m_.index_bytes);
    memcpy(packed_ + h_.value, m_.outlier_value, m_.outlier_value_len * sizeof(uint16_t));
  }

  const aq_codebook_matrix& m_;
  const Header h_;
  const Channels& channels_;
  const Starts& starts_;
  uint8_t* const packed_;
  size_t tasks_ = 0, order_ = 0, code_bytes_ = 0, table_bytes_ = 0;
};

}  // namespace

CudaLayout cuda_layout(const aq_codebook_matrix& matrix) {
  const Header h = header_of(matrix);
  return {h.rows, h.cols, h.axis, h.widths, h.tasks, h.outliers, h.bytes};
}

bool cuda_pack(const aq_codebook_matrix& matrix, uint8_t* packed) {
  const Channels channels(matrix);
  Starts starts;
  if (!starts.find(matrix, channels)) return false;
  const Header header = header_of(matrix);
  memset(packed, 0, header.bytes);
  Packer(matrix, header, channels, starts, packed).run();
  return true;
}
