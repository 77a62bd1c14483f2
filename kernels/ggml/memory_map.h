// What the memory of this process is, by /proc/self/maps.
#pragma once

#include <stdint.h>

#include <cinttypes>
#include <cstdio>

struct Mapping {
  uintptr_t begin, end;
  bool readable, writable;
};

// Calls see(mapping) for each, by address, until it says false.
template <class See>
inline void each_mapping(See see) {
  std::FILE* maps = std::fopen("/proc/self/maps", "r");
  if (!maps) return;
  char line[512], rights[5];
  uintptr_t begin, end;
  while (std::fgets(line, sizeof(line), maps)) {
    if (std::sscanf(line, "%" SCNxPTR "-%" SCNxPTR " %4s", &begin, &end, rights) != 3) continue;  // a long name's rest
    if (!see(Mapping{begin, end, rights[0] == 'r', rights[1] == 'w'})) break;
  }
  std::fclose(maps);
}

// The bytes around an address that can be read without a gap; false where it cannot.
inline bool readable_around(const char* address, const char** begin, const char** end) {
  const auto wanted = reinterpret_cast<uintptr_t>(address);
  uintptr_t from = 0, to = 0;
  each_mapping([&](const Mapping& m) {
    if (!m.readable || m.begin != to) {
      if (wanted >= from && wanted < to) return false;
      from = m.begin;
    }
    to = m.readable ? m.end : m.begin;
    return true;
  });
  *begin = reinterpret_cast<const char*>(from);
  *end = reinterpret_cast<const char*>(to);
  return wanted >= from && wanted < to;
}

// The mapping that an address is in; without rights where it is in none.
inline Mapping mapping_of(const void* address) {
  const auto wanted = reinterpret_cast<uintptr_t>(address);
  Mapping found = {0, 0, false, false};
  each_mapping([&](const Mapping& m) {
    if (wanted >= m.begin && wanted < m.end) found = m;
    return wanted >= m.end;
  });
  return found;
}

inline bool is_readable(const void* address) { return mapping_of(address).readable; }
inline bool is_writable(const void* address) { return mapping_of(address).writable; }
