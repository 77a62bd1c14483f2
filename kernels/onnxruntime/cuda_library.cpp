// See cuda_library.h.

#include "cuda_library.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cubin_cache.h"
#include "cuda_sources.h"

namespace cuda {

namespace {

struct Compiler {
  using Program = struct Program_st*;
  int (*Version)(int* major, int* minor);
  int (*CreateProgram)(Program* program, const char* source, const char* name, int headers, const char* const* texts,
                       const char* const* names);
  int (*DestroyProgram)(Program* program);
  int (*CompileProgram)(Program program, int options, const char* const* option);
  int (*GetProgramLogSize)(Program program, size_t* bytes);
  int (*GetProgramLog)(Program program, char* log);
  int (*GetCUBINSize)(Program program, size_t* bytes);
  int (*GetCUBIN)(Program program, char* cubin);
  const char* (*GetErrorString)(int result);
};

// One after the other, as the loader finds them; the first one that is there.
void* open_first(const char* const* names) {
  for (; *names; ++names) {
    if (void* library = dlopen(*names, RTLD_NOW | RTLD_LOCAL)) return library;
  }
  return nullptr;
}

template <class F>
bool find(void* library, const char* name, F* function) {
  *function = reinterpret_cast<F>(dlsym(library, name));
  return *function;
}

Driver the_driver;
Compiler the_compiler;
const char *no_driver = nullptr, *no_compiler = nullptr;

void find_driver() {
  static const char* const NAMES[] = {"libcuda.so.1", nullptr};
  void* library = open_first(NAMES);
  Driver& d = the_driver;
  if (!library) {
    no_driver = "there is no NVIDIA driver (libcuda.so.1)";
  } else if (!(find(library, "cuGetErrorString", &d.GetErrorString) && find(library, "cuStreamGetCtx", &d.StreamGetCtx) &&
               find(library, "cuCtxPushCurrent_v2", &d.CtxPushCurrent) &&
               find(library, "cuCtxPopCurrent_v2", &d.CtxPopCurrent) && find(library, "cuCtxGetDevice", &d.CtxGetDevice) &&
               find(library, "cuDeviceGetAttribute", &d.DeviceGetAttribute) &&
               find(library, "cuModuleLoadData", &d.ModuleLoadData) &&
               find(library, "cuModuleGetFunction", &d.ModuleGetFunction) &&
               find(library, "cuMemAlloc_v2", &d.MemAlloc) && find(library, "cuMemFree_v2", &d.MemFree) &&
               find(library, "cuMemcpyHtoDAsync_v2", &d.MemcpyHtoDAsync) &&
               find(library, "cuStreamSynchronize", &d.StreamSynchronize) &&
               find(library, "cuDriverGetVersion", &d.DriverGetVersion) && find(library, "cuMemAllocAsync", &d.MemAllocAsync) &&
               find(library, "cuMemFreeAsync", &d.MemFreeAsync) && find(library, "cuLaunchKernel", &d.LaunchKernel))) {
    no_driver = "the NVIDIA driver is older than CUDA 11.2";
  }
}

void find_compiler() {
  // A driver takes what the compiler of its own CUDA makes, or an older one.
  static const char* const NAMES[] = {"libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc.so", nullptr};
  int version = 0;
  the_driver.DriverGetVersion(&version);
  void* library = open_first(NAMES + (version < 13000));
  Compiler& c = the_compiler;
  if (!library) {
    no_compiler =
        "NVRTC, which compiles the kernels, is not to be found: pip install nvidia-cuda-nvrtc, and call "
        "onnxruntime.preload_dlls() or put its folder on LD_LIBRARY_PATH";
  } else if (!(find(library, "nvrtcVersion", &c.Version) && find(library, "nvrtcCreateProgram", &c.CreateProgram) &&
               find(library, "nvrtcDestroyProgram", &c.DestroyProgram) &&
               find(library, "nvrtcCompileProgram", &c.CompileProgram) &&
               find(library, "nvrtcGetProgramLogSize", &c.GetProgramLogSize) &&
               find(library, "nvrtcGetProgramLog", &c.GetProgramLog) &&
               find(library, "nvrtcGetCUBINSize", &c.GetCUBINSize) && find(library, "nvrtcGetCUBIN", &c.GetCUBIN) &&
               find(library, "nvrtcGetErrorString", &c.GetErrorString))) {
    no_compiler = "NVRTC is older than CUDA 11.2";
  }
}

pthread_once_t driver_once = PTHREAD_ONCE_INIT, compiler_once = PTHREAD_ONCE_INIT;

// What the compiler says of a program; words may be cut.
bool log_of(Compiler::Program program, int result, const char* source, Words* words) {
  size_t bytes = 0;
  char* log = nullptr;
  if (!the_compiler.GetProgramLogSize(program, &bytes) && bytes && (log = static_cast<char*>(calloc(bytes + 1, 1)))) {
    the_compiler.GetProgramLog(program, log);
  }
  words->say("%s does not compile (%s): %s", source, the_compiler.GetErrorString(result), log ? log : "");
  free(log);
  return false;
}

// The cubin, to be freed.
char* compile(const Source& source, const char* const* options, int count, size_t* bytes, Words* words) {
  constexpr int HEADER_COUNT = sizeof(HEADERS) / sizeof(HEADERS[0]);
  const char *texts[HEADER_COUNT], *names[HEADER_COUNT];
  for (int i = 0; i < HEADER_COUNT; ++i) texts[i] = HEADERS[i].text, names[i] = HEADERS[i].name;
  const Compiler& c = the_compiler;
  Compiler::Program program = nullptr;
  int result = c.CreateProgram(&program, source.text, source.name, HEADER_COUNT, texts, names);
  if (result) {
    words->say("%s: %s", source.name, c.GetErrorString(result));
    return nullptr;
  }
  char* cubin = nullptr;
  result = c.CompileProgram(program, count, options);
  if (result) {
    log_of(program, result, source.name, words);
  } else if (c.GetCUBINSize(program, bytes) || !*bytes || !(cubin = static_cast<char*>(malloc(*bytes))) ||
             c.GetCUBIN(program, cubin)) {
    words->say("%s: the compiler gave no cubin", source.name);
    free(cubin);
    cubin = nullptr;
  }
  c.DestroyProgram(&program);
  return cubin;
}

}  // namespace

bool Words::say(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  return false;
}

const Driver* driver(const char** why) {
  pthread_once(&driver_once, find_driver);
  *why = no_driver;
  return no_driver ? nullptr : &the_driver;
}

// After driver() gave one.
void* compiled(const char* name, const Macro* macros, size_t count, int major, int minor, Words* words) {
  pthread_once(&compiler_once, find_compiler);
  if (no_compiler) {
    words->say("%s", no_compiler);
    return nullptr;
  }
  const Source* source = SOURCES;
  while (strcmp(source->name, name) != 0) ++source;

  constexpr size_t MOST_OPTIONS = 8, OPTION_BYTES = 64;
  char written[MOST_OPTIONS][OPTION_BYTES];
  const char* options[MOST_OPTIONS];
  int used = 0;
  snprintf(written[used++], OPTION_BYTES, "--gpu-architecture=sm_%d%d", major, minor);
  snprintf(written[used++], OPTION_BYTES, "--std=c++17");
  for (size_t i = 0; i < count; ++i) {
    snprintf(written[used++], OPTION_BYTES, "--define-macro=%s=%u", macros[i].name, macros[i].value);
  }
  Digest digest;
  int version[2] = {};
  the_compiler.Version(&version[0], &version[1]);
  digest.add(version, sizeof(version));
  for (int i = 0; i < used; ++i) {
    options[i] = written[i];
    digest.add(written[i], strlen(written[i]) + 1);
  }
  for (const Source& header : HEADERS) digest.add(header.text, strlen(header.text));
  digest.add(source->text, strlen(source->text));

  char file[256];
  snprintf(file, sizeof(file), "ort-%s-sm_%d%d-%016llx", name, major, minor, digest.value());
  size_t bytes = 0;
  char* cubin = kept_cubin(file, &bytes);
  if (!cubin && (cubin = compile(*source, options, used, &bytes, words))) keep_cubin(file, cubin, bytes);
  return cubin;
}

}  // namespace cuda
