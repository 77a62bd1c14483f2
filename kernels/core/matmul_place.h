// Where codes go when a matrix is repacked; see matmul_layout.h for the layout.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "matmul_layout.h"

namespace matmul {

uint64_t next_serial();  // of a matrix

namespace {

// Gives out what comes after the header, each at the border of a cache line.
struct Room {
  uint64_t end = round_up(sizeof(Packed), LINE);

  uint64_t operator()(uint64_t bytes) {
    const uint64_t offset = end;
    end = round_up(end + bytes, LINE);
    return offset;
  }
};

// Room for bands, once all sections are known.
inline void plan_bands(Packed* p, Room* room) {
  p->bands = (*room)(((p->rows - 1) / BAND + 2) * static_cast<uint64_t>(p->sections) * sizeof(uint32_t));
  uint64_t bytes = 0;
  for (int i = 0; i < p->sections; ++i) bytes += record_bytes(*p, p->section[i]) * p->section[i].count;
  p->records = (*room)(bytes);
}

// Units and chunks of channels of this length. Chunks take the tail unless another unit is as small.
inline void divide(uint64_t length, Section* s) {
  if (!s->bits) return;
  s->units = static_cast<uint32_t>(length / UNIT);
  s->chunks = static_cast<uint32_t>((length % UNIT + CHUNK - 1) / CHUNK);
  if (s->chunks * chunk_bytes(s->bits) >= unit_bytes(s->bits)) s->units += 1, s->chunks = 0;
}

// Codes of a channel, one at a time, out of its stream.
struct Stream {
  const uint8_t* codes;
  int bits;
  const uint8_t* recode = nullptr;  // what takes the place of each code

  unsigned at(uint64_t i) const {
    if (!bits) return 0;  // of nothing
    const uint64_t bit = i * bits;
    const uint8_t* byte = codes + bit / 8;
    const unsigned shift = bit % 8;
    unsigned word = byte[0];
    if (shift + bits > 8) word |= static_cast<unsigned>(byte[1]) << 8;  // only where the code reaches into it
    const unsigned code = word >> shift & ((1u << bits) - 1);
    return recode ? recode[code] : code;
  }
};

// Adds the bits of one code to the words of a unit; group and lane say which.
inline void place(uint32_t* words, size_t stride, int bits, int group, int lane, uint32_t code) {
  const auto put = [&](int word, int at, uint32_t value) { words[word * stride + lane] |= value << at; };
  if (bits == 3) {
    if (group < 24) return put(group / 8, group % 8 * 4, code);
    for (int w = 0; w < 3; ++w) put(w, (group - 24) * 4 + 3, code >> w & 1);
    return;
  }
  if (bits == 5 || bits == 6) {
    const int fields = bits == 5 ? 32 : 16;
    put(group / 8, group % 8 * 4, code & 15);
    return put(4 + group / fields, group % fields * (bits - 4), code >> 4);
  }
  const int width = stored_bits(bits), fields = 32 / width;
  put(group / fields, group % fields * width, code);
}

// The code that place() put there.
inline uint32_t placed(const uint32_t* words, size_t stride, int bits, int group, int lane) {
  const auto get = [&](int word, int at, int width) { return words[word * stride + lane] >> at & ((1u << width) - 1); };
  if (bits == 3) {
    if (group < 24) return get(group / 8, group % 8 * 4, 3);
    const int at = (group - 24) * 4 + 3;
    return get(0, at, 1) | get(1, at, 1) << 1 | get(2, at, 1) << 2;
  }
  if (bits == 5 || bits == 6) {
    const int high = bits - 4, fields = 32 / high;
    return get(group / 8, group % 8 * 4, 4) | get(4 + group / fields, group % fields * high, high) << 4;
  }
  const int width = stored_bits(bits), fields = 32 / width;
  return get(group / fields, group % fields * width, width);
}

// Where the words of a channel begin, and how far apart they are.
struct Place {
  char* units;
  size_t word, unit;  // distances in bytes
  char* chunks;
  size_t chunk;
};

inline void write_channel(const Section& s, const Stream& stream, uint64_t length, const Place& to) {
  for (uint64_t i = 0; i < length; ++i) {
    const uint32_t code = stream.at(i);
    const uint64_t unit = i / UNIT;
    if (unit < s.units) {
      auto* words = reinterpret_cast<uint32_t*>(to.units + unit * to.unit);
      place(words, to.word / sizeof(uint32_t), s.bits, i % UNIT / LANES, i % LANES, code);
      continue;
    }
    const uint64_t rest = i - static_cast<uint64_t>(s.units) * UNIT;
    char* chunk = to.chunks + rest / CHUNK * to.chunk;
    const int group = rest % CHUNK / LANES, lane = i % LANES;
    if (s.bits <= 4) {
      reinterpret_cast<uint16_t*>(chunk)[lane] |= static_cast<uint16_t>(code << group * 4);
    } else {
      reinterpret_cast<uint32_t*>(chunk)[lane] |= code << group * 8;
    }
  }
}

inline uint32_t read_code(const Section& s, const Place& from, uint64_t i) {
  const int lane = i % LANES;
  if (i / UNIT < s.units) {
    const auto* words = reinterpret_cast<const uint32_t*>(from.units + i / UNIT * from.unit);
    return placed(words, from.word / sizeof(uint32_t), s.bits, i % UNIT / LANES, lane);
  }
  const uint64_t rest = i - static_cast<uint64_t>(s.units) * UNIT;
  const char* chunk = from.chunks + rest / CHUNK * from.chunk;
  const int group = rest % CHUNK / LANES;
  if (s.bits <= 4) return reinterpret_cast<const uint16_t*>(chunk)[lane] >> group * 4 & 15;
  return reinterpret_cast<const uint32_t*>(chunk)[lane] >> group * 8 & 255;
}

// Of one channel of those that are interleaved from `codes` on.
inline Place place_in(const Section& s, char* codes, uint32_t tile, uint32_t channel) {
  const size_t unit = unit_bytes(s.bits) * tile, chunk = chunk_bytes(s.bits);
  return {codes + static_cast<size_t>(LINE) * channel, static_cast<size_t>(LINE) * tile, unit,
          codes + unit * s.units + chunk * channel, chunk * tile};
}

inline Place place_of(const Section& s, uint32_t number, char* codes, int axis) {
  uint32_t tile = s.count, channel = number;  // columns: all of a section are one tile
  if (!axis) {
    const bool tiled = number < s.tiled;
    tile = tiled ? TILE : 1;
    channel = tiled ? number % TILE : 0;
    codes += static_cast<size_t>(number - channel) * s.channel_bytes();
  }
  return place_in(s, codes, tile, channel);
}

}  // namespace
}  // namespace matmul
