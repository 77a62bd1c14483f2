// What the plug-in knows of ggml: two tables that say how types are stored and multiplied. Names are ours; the plug-in
// checks sizes and known entries before it relies on them.
#pragma once

#include <stddef.h>
#include <stdint.h>

extern "C" {

typedef void (*ToFloat)(const void* row, float* out, int64_t count);
typedef void (*FromFloat)(const float* row, void* out, int64_t count);
// s: rows of results, bs floats apart; x: rows of a matrix, bx bytes apart; y: rows of activations; nrc of each.
typedef void (*VecDot)(int n, float* s, size_t bs, const void* x, size_t bx, const void* y, size_t by, int nrc);

typedef struct TypeTraits {  // ggml_type_traits
  const char* name;
  int64_t block;  // weights
  int64_t interleaved;
  size_t bytes;  // of a block
  bool quantized;
  ToFloat to_float;
  FromFloat from_float;
} TypeTraits;

typedef struct CpuTraits {  // ggml_type_traits_cpu
  FromFloat from_float;
  VecDot vec_dot;
  int activations;  // type that they are converted to
  int64_t rows;     // at once
} CpuTraits;

}  // extern "C"

enum { GGML_F32 = 0, GGML_F16 = 1, GGML_Q4_0 = 2, GGML_Q8_0 = 8 };
