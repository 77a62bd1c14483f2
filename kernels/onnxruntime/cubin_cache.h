// Compiled kernels on the disk: in $ANYQUANT_CACHE/cubins, or anyquant/cubins in $XDG_CACHE_HOME or ~/.cache.
#pragma once

#include <stddef.h>

namespace cuda {

// FNV-1a, 64 bits: tells states of the sources apart, and whole files from damaged ones.
class Digest {
 public:
  void add(const void* data, size_t bytes) {
    for (size_t i = 0; i < bytes; ++i) {
      value_ = (value_ ^ static_cast<const unsigned char*>(data)[i]) * 0x100000001b3ull;
    }
  }
  unsigned long long value() const { return value_; }

 private:
  unsigned long long value_ = 0xcbf29ce484222325ull;
};

// To be freed; null: there is none, or it is damaged.
char* kept_cubin(const char* name, size_t* bytes);

// Where nothing can be written, nothing is kept.
void keep_cubin(const char* name, const char* cubin, size_t bytes);

}  // namespace cuda
