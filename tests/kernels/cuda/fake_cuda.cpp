// libcuda.so.1 on the emulator, as far as cuda-core and the operator for ONNX Runtime use it. "Cubins" are paths of libraries
// of kernels for the emulator. Calls that would be mistakes on a GPU end the process; FAKE_CUDA_FAIL names one that is to fail.

#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <map>
#include <string>
#include <vector>

namespace {

std::map<uint64_t, size_t> live;  // memory of the device
std::map<uint64_t, size_t> async;
int loaded = 0;
bool copying = false;  // until the stream is synchronized
thread_local int depth = 0;  // of the stack of contexts

#define REQUIRE(condition)                                       \
  if (!(condition)) {                                            \
    fprintf(stderr, "fake CUDA: %s in %s\n", #condition, __func__); \
    abort();                                                     \
  }

bool fails(const char* name) {
  const char* chosen = getenv("FAKE_CUDA_FAIL");
  return chosen && !strcmp(chosen, name);
}

struct Library {
  void* handle;
};
struct Function {
  std::string name;
  void *kernel, *emulate;
};

// What kernels take: p memory to read, w memory to write, i an integer of 32 bits.
const std::map<std::string, const char*> ARGUMENTS = {
    {"gemv_rows", "ppiipw"},
    {"gemv_columns", "ppiiw"},
    {"finish_columns", "ppppiipw"},
    {"half_activations", "ppiiwiw"},
    {"gemm_rows", "ppippiiw"},
    {"gemm_columns", "ppiiw"},
    {"expand_rows", "pwi"},
    {"expand_columns", "pwi"},
    {"expand_outliers", "pwi"},
    {"dequantize_codebook", "ppppppiiiw"},
    {"replace_outliers", "ppipiiw"},
    {"dequantize_block", "ppiiiiiiiiw"},
    {"dequantize_affine", "pppiiiiiiw"},
    {"dequantize_ggml", "ppiiiiiw"},
    {"multiply", "ppiiw"}};

int allocate(uint64_t* pointer, size_t bytes) {
  void* memory = aligned_alloc(256, (bytes + 255) / 256 * 256);
  REQUIRE(memory);
  memset(memory, 0xff, bytes);  // not a number
  *pointer = reinterpret_cast<uint64_t>(memory);
  live[*pointer] = bytes;
  return 0;
}

}  // namespace

extern "C" {

int cuGetErrorString(int result, const char** words) {
  *words = result == 2 ? "out of memory" : "something else";
  return 0;
}
int cuStreamGetCtx(void* stream, void** context) {
  REQUIRE(stream == reinterpret_cast<void*>(0x57));
  *context = reinterpret_cast<void*>(0xc7);
  return fails("cuStreamGetCtx") ? 400 : 0;
}
int cuCtxPushCurrent_v2(void* context) {
  REQUIRE(context == reinterpret_cast<void*>(0xc7));
  ++depth;
  return 0;
}
int cuCtxPopCurrent_v2(void** context) {
  REQUIRE(depth-- > 0);
  *context = nullptr;
  return 0;
}
int cuCtxGetDevice(int* device) {
  REQUIRE(depth > 0);
  *device = 0;
  return 0;
}
int cuDriverGetVersion(int* version) {
  const char* chosen = getenv("FAKE_CUDA_VERSION");
  *version = chosen ? atoi(chosen) : 13000;
  return 0;
}
int cuStreamSynchronize(void* stream) {
  REQUIRE(depth > 0 && stream == reinterpret_cast<void*>(0x57));
  copying = false;
  return fails("cuStreamSynchronize") ? 700 : 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int) {
  const char* major = getenv("FAKE_CUDA_MAJOR");
  *value = attribute == 75 ? (major ? atoi(major) : 9) : attribute == 76 ? 0 : attribute == 16 ? 4 : -1;
  return 0;
}
int cuModuleLoadData(void** module, const void* image) {
  REQUIRE(depth > 0);
  if (fails("cuModuleLoadData")) return 200;
  void* handle = dlopen(static_cast<const char*>(image), RTLD_NOW | RTLD_LOCAL);
  if (!handle) fprintf(stderr, "%s\n", dlerror());
  REQUIRE(handle);
  *module = new Library{handle};
  ++loaded;
  return 0;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  void* handle = static_cast<Library*>(module)->handle;
  *function = new Function{name, dlsym(handle, name), dlsym(handle, "emulate")};
  return static_cast<Function*>(*function)->kernel ? 0 : 500;
}
int cuMemAlloc_v2(uint64_t* pointer, size_t bytes) {
  REQUIRE(depth > 0);
  return fails("cuMemAlloc_v2") ? 2 : allocate(pointer, bytes);
}
int cuMemFree_v2(uint64_t pointer) {
  REQUIRE(live.erase(pointer));
  free(reinterpret_cast<void*>(pointer));
  return 0;
}
int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* stream) {
  REQUIRE(depth > 0 && stream == reinterpret_cast<void*>(0x57));
  REQUIRE(live.count(to) && live[to] >= bytes);
  if (fails("cuMemcpyHtoDAsync_v2")) return 700;
  copying = true;
  memcpy(reinterpret_cast<void*>(to), from, bytes);
  return 0;
}
int cuMemAllocAsync(uint64_t* pointer, size_t bytes, void* stream) {
  REQUIRE(depth > 0 && stream);
  if (fails("cuMemAllocAsync")) return 2;
  const int result = allocate(pointer, bytes);
  async[*pointer] = bytes;
  return result;
}
int cuMemFreeAsync(uint64_t pointer, void*) {
  REQUIRE(async.erase(pointer));
  return cuMemFree_v2(pointer);
}
int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                   unsigned block_z, unsigned shared_bytes, void* stream, void** arguments, void** extra) {
  REQUIRE(depth > 0 && stream == reinterpret_cast<void*>(0x57) && !extra);
  REQUIRE(!copying);
  REQUIRE(grid_z == 1 && block_y == 1 && block_z == 1 && shared_bytes <= 48 << 10);
  if (fails("cuLaunchKernel")) return 719;
  const Function& f = *static_cast<Function*>(function);
  const char* kinds = ARGUMENTS.at(f.name);
  std::vector<uint64_t> words, ranges;
  for (size_t i = 0; kinds[i]; ++i) {
    uint64_t word = 0;
    memcpy(&word, arguments[i], kinds[i] == 'i' ? 4 : 8);
    words.push_back(word);
    if (kinds[i] == 'i' || !word) continue;
    auto found = live.upper_bound(word);
    REQUIRE(found != live.begin());
    --found;
    REQUIRE(word < found->first + found->second);
    const uint64_t range[] = {word, found->first + found->second - word, kinds[i] == 'w'};
    ranges.insert(ranges.end(), range, range + 3);
  }
  const uint32_t grid[] = {grid_x, grid_y};
  char message[500];
  using Emulate = int (*)(const char*, void*, const uint32_t*, uint32_t, uint32_t, const uint64_t*, uint32_t,
                          const uint64_t*, uint32_t, char*, uint64_t);
  const int failed = reinterpret_cast<Emulate>(f.emulate)(
      f.name.c_str(), f.kernel, grid, block_x, shared_bytes, words.data(), static_cast<uint32_t>(words.size()),
      ranges.data(), static_cast<uint32_t>(ranges.size() / 3), message, sizeof(message));
  if (failed) fprintf(stderr, "%s\n", message);
  REQUIRE(!failed);
  return 0;
}

#ifndef FAKE_WITHOUT_CUDA_CORE  // the real NVRTC takes a driver that has these for more than it is
// What cuda-core calls besides, which asks for functions by their names.
int cuGetProcAddress_v2(const char* name, void** function, int, uint64_t, int* status) {
  Dl_info self;
  REQUIRE(dladdr(reinterpret_cast<void*>(&cuGetErrorString), &self));
  void* library = dlopen(self.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  *function = dlsym(library, name);
  if (!*function) *function = dlsym(library, (std::string(name) + "_v2").c_str());
  if (status) *status = *function ? 0 : 1;
  return *function ? 0 : 500;
}
int cuInit(unsigned) { return 0; }
int cuGetErrorName(int, const char** name) {
  *name = "CUDA_ERROR_OF_THE_FAKE";
  return 0;
}
int cuDeviceGetCount(int* count) {
  *count = 1;
  return 0;
}
int cuDeviceGet(int* device, int number) {
  REQUIRE(number == 0);
  *device = 0;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int) {
  *context = reinterpret_cast<void*>(0xc7);
  return 0;
}
int cuCtxSetCurrent(void* context) {
  depth = context ? 1 : 0;
  return 0;
}
int cuCtxGetCurrent(void** context) {
  *context = depth ? reinterpret_cast<void*>(0xc7) : nullptr;
  return 0;
}
int cuLibraryLoadData(void** library, const void* code, int*, void**, unsigned, int*, void**, unsigned) {
  return cuModuleLoadData(library, code);
}
int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  return cuModuleGetFunction(kernel, library, name);
}
int cuLibraryUnload(void*) { return 0; }
int cuDevicePrimaryCtxRelease(int) { return 0; }
struct LaunchConfig {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
  void* stream;
  void* attributes;
  unsigned attribute_count;
};
int cuLaunchKernelEx(const LaunchConfig* c, void* function, void** arguments, void** extra) {
  return cuLaunchKernel(function, c->grid_x, c->grid_y, c->grid_z, c->block_x, c->block_y, c->block_z, c->shared_bytes,
                        c->stream, arguments, extra);
}
#endif

// For the tests.
uint64_t fake_allocate(size_t bytes) {
  uint64_t pointer = 0;
  allocate(&pointer, bytes);
  return pointer;
}
// Memory of the host that kernels may be given.
void fake_lend(uint64_t pointer, size_t bytes) {
  for (auto near = live.lower_bound(pointer); near != live.end() && near->first < pointer + bytes;) near = live.erase(near);
  auto before = live.lower_bound(pointer);
  if (before != live.begin() && (--before)->first + before->second > pointer) live.erase(before);
  live[pointer] = bytes;
}
void fake_free(uint64_t pointer) { cuMemFree_v2(pointer); }
size_t fake_live() { return live.size(); }
int fake_depth() { return depth; }
int fake_loaded() { return loaded; }
// Memory of the device that is not the test's own: the largest piece.
uint64_t fake_largest(uint64_t but_x, uint64_t but_y, size_t* bytes) {
  uint64_t found = 0;
  *bytes = 0;
  for (const auto& [pointer, size] : live) {
    if (pointer != but_x && pointer != but_y && size >= *bytes) found = pointer, *bytes = size;
  }
  return found;
}
}
