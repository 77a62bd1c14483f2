// Sixteen lanes one after the other, for any processor.
#pragma once

struct Floats {
  float lane[LANES];
};
struct Ints {
  uint32_t lane[LANES];
};

template <class Result, class Function>
INLINE Result each_lane(Function function) {
  Result result;
  for (int i = 0; i < LANES; ++i) result.lane[i] = function(i);
  return result;
}

INLINE Floats spread(float a) { return each_lane<Floats>([&](int) { return a; }); }
INLINE Floats zeros() { return spread(0.0f); }
INLINE Floats load(const float* from) { return each_lane<Floats>([&](int i) { return from[i]; }); }
INLINE void store(float* to, const Floats& a) { memcpy(to, a.lane, sizeof(a.lane)); }
INLINE Floats mul(const Floats& a, const Floats& b) {
  return each_lane<Floats>([&](int i) { return a.lane[i] * b.lane[i]; });
}
INLINE Floats fma(const Floats& a, const Floats& b, const Floats& c) {
  return each_lane<Floats>([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
}
INLINE float sum(const Floats& a) {
  float part[LANES];
  memcpy(part, a.lane, sizeof(part));
  for (int half = LANES / 2; half; half /= 2) {
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  }
  return part[0];
}

// Sixteen vectors that are `row` floats apart become their columns, `column` floats apart.
INLINE void transpose(const float* from, size_t row, float* to, size_t column) {
  for (int i = 0; i < LANES; ++i) {
    for (int j = 0; j < LANES; ++j) to[j * column + i] = from[i * row + j];
  }
}

INLINE Ints operator>>(const Ints& a, int by) {
  return each_lane<Ints>([&](int i) { return a.lane[i] >> by; });
}
INLINE Ints operator<<(const Ints& a, int by) {
  return each_lane<Ints>([&](int i) { return a.lane[i] << by; });
}
INLINE Ints words(const void* from) {
  Ints result;
  memcpy(result.lane, from, sizeof(result.lane));
  return result;
}
INLINE Ints halves(const void* from) {
  const auto* half = static_cast<const uint16_t*>(from);
  return each_lane<Ints>([&](int i) { return uint32_t{half[i]}; });
}
INLINE Ints choose(uint32_t mask, const Ints& a, const Ints& b) {
  return each_lane<Ints>([&](int i) { return (a.lane[i] & mask) | (b.lane[i] & ~mask); });
}

template <int BITS>
struct Table {
  float entry[table_entries(BITS)];
};

template <int BITS>
INLINE void load_table(const uint16_t* entries, Table<BITS>* table) {
  for (size_t i = 0; i < table_entries(BITS); ++i) table->entry[i] = from_half(entries[i]);
}

template <int BITS>
INLINE void load_table(const float* entries, Table<BITS>* table) {
  memcpy(table->entry, entries, sizeof(table->entry));
}

// The codes as numbers. Here and below, bits of the index above those of the code may be anything.
template <int BITS>
INLINE Floats numbers(const Ints& index) {
  return each_lane<Floats>([&](int i) { return static_cast<float>(index.lane[i] & ((1u << BITS) - 1)); });
}

template <int BITS>
INLINE Floats lookup(const Table<BITS>& table, const Ints& index) {
  return each_lane<Floats>([&](int i) { return table.entry[index.lane[i] & (table_entries(BITS) - 1)]; });
}
