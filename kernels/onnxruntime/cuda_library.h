// The driver and the compiler of NVIDIA's, found when they are first needed: nothing is linked to them.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace cuda {

using Context = struct CUctx_st*;
using Stream = struct CUstream_st*;
using Module = struct CUmod_st*;
using Function = struct CUfunc_st*;
using Pointer = unsigned long long;  // to memory of the device
using Result = int;                  // 0: no error

enum Attribute : int { MULTIPROCESSORS = 16, CAPABILITY_MAJOR = 75, CAPABILITY_MINOR = 76 };

struct Driver {
  Result (*GetErrorString)(Result result, const char** words);
  Result (*DriverGetVersion)(int* version);
  Result (*StreamGetCtx)(Stream stream, Context* context);
  Result (*CtxPushCurrent)(Context context);
  Result (*CtxPopCurrent)(Context* context);
  Result (*CtxGetDevice)(int* device);
  Result (*DeviceGetAttribute)(int* value, Attribute attribute, int device);
  Result (*ModuleLoadData)(Module* module, const void* image);
  Result (*ModuleGetFunction)(Function* function, Module module, const char* name);
  Result (*MemAlloc)(Pointer* pointer, size_t bytes);
  Result (*MemFree)(Pointer pointer);
  Result (*MemcpyHtoDAsync)(Pointer to, const void* from, size_t bytes, Stream stream);
  Result (*StreamSynchronize)(Stream stream);
  Result (*MemAllocAsync)(Pointer* pointer, size_t bytes, Stream stream);
  Result (*MemFreeAsync)(Pointer pointer, Stream stream);
  Result (*LaunchKernel)(Function function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                         unsigned block_y, unsigned block_z, unsigned shared_bytes, Stream stream, void** arguments,
                         void** extra);
};

// Null: there is none, or one that is too old; then why.
const Driver* driver(const char** why);

// A message of fixed size.
struct Words {
  char text[1500] = "";
  bool say(const char* format, ...) __attribute__((format(printf, 2, 3)));  // false, always
};

// A cubin of one of the sources, by the compiler or from the disk; to be freed. Null: see words.
struct Macro {
  const char* name;
  unsigned value;
};
void* compiled(const char* source, const Macro* macros, size_t count, int major, int minor, Words* words);

}  // namespace cuda
