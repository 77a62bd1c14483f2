// What the plug-in knows of ggml: two tables that say how types are stored and multiplied, and what may take whole
// operations over from ggml. Names are ours, and only what is used has one; the plug-in checks sizes and known entries
// before it relies on them.
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

typedef struct GgmlTensor {  // ggml_tensor
  int type;
  void* buffer;
  int64_t sides[4];
  size_t strides[4];  // bytes
  int operation;
  int32_t parameters[16];
  int32_t flags;
  struct GgmlTensor* source[10];
  struct GgmlTensor* view;
  size_t view_offset;
  void* data;
} GgmlTensor;

typedef struct ComputeParams {  // ggml_compute_params
  int part, parts;  // of the threads
  size_t work_bytes;
  void* work;  // all threads share it
  void* threads;
} ComputeParams;

typedef struct InitParams {  // ggml_init_params
  size_t bytes;
  void* memory;
  bool no_alloc;
} InitParams;

typedef void* BufferType;  // a word of ggml_backend_buffer_type: six or seven functions, a device, an ExtraBufferType

}  // extern "C"

// ggml::cpu::tensor_traits: does an operation in ggml's place. All threads of a graph call compute with the same one.
class TensorTraits {
 public:
  virtual ~TensorTraits() = default;
  // Whether it wants so many bytes of ComputeParams::work.
  virtual bool work_size(int threads, const GgmlTensor* operation, size_t& bytes) = 0;
  // Whether it did the operation; the same in all threads.
  virtual bool compute(ComputeParams* how, GgmlTensor* operation) = 0;
};

// ggml::cpu::extra_buffer_type: is asked for every operation who does it.
class ExtraBufferType {
 public:
  virtual ~ExtraBufferType() = default;
  virtual bool supports(void* device, const GgmlTensor* operation) = 0;
  virtual TensorTraits* traits(const GgmlTensor* operation) = 0;
};

enum { GGML_F32 = 0, GGML_F16 = 1, GGML_Q4_0 = 2, GGML_Q8_0 = 8 };
