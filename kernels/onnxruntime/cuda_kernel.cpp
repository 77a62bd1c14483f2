// The operator on NVIDIA GPUs: the kernels of kernels/cuda, compiled by NVRTC at first use. It has been tested with an
// emulator in the place of the GPU, and on no GPU yet.

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include <new>

#include "activations.h"
#include "constants.h"
#include "cuda_launch.h"
#include "cuda_layout.h"
#include "kernels.h"

namespace {

using cuda::Context, cuda::Driver, cuda::Pointer, cuda::Stream, cuda::Words;

struct Kernel {
  const OrtApi* api;
  const Driver* driver;
  int64_t inputs = 0, outputs = 0;
  CudaLayout layout = {};
  size_t bytes = 0;  // of the packed matrix and, behind it, the bias
  bool has_bias = false;
  Memory host{};  // until they are on the GPU
  pthread_mutex_t moving = PTHREAD_MUTEX_INITIALIZER;
  Context context = nullptr;  // where they are
  Pointer device = 0;
  int multiprocessors = 0;

  size_t bias_offset() const { return (layout.bytes + 255) / 256 * 256; }
};

OrtStatus* error(const Kernel& self, const Words& words) {
  Words whole;
  whole.say("anyquant CodebookMatMul: %s", words.text);
  return self.api->CreateStatus(ORT_FAIL, whole.text);
}

// To the GPU of the current context, at the first run: which one it is, is known then.
bool move(Kernel* self, Context context, Stream stream, Words* words) {
  const Driver& driver = *self->driver;
  if (self->context) {
    return self->context == context || words->say("a session of one GPU runs on another");
  }
  int device = 0;
  cuda::Result result = driver.CtxGetDevice(&device);
  if (!result) result = driver.DeviceGetAttribute(&self->multiprocessors, cuda::MULTIPROCESSORS, device);
  if (result) return cuda::failed(driver, result, "the GPU does not say what it is", words);
  Pointer memory = 0;
  result = driver.MemAlloc(&memory, self->bytes);
  if (result) return cuda::failed(driver, result, "the GPU has no memory for a matrix", words);
  result = driver.MemcpyHtoDAsync(memory, self->host.as<void>(), self->bytes, stream);
  if (!result) result = driver.StreamSynchronize(stream);  // other streams will read it, too
  if (result) {
    driver.MemFree(memory);
    return cuda::failed(driver, result, "a matrix does not get to the GPU", words);
  }
  self->device = memory, self->context = context;
  self->host.reserve(0);
  return true;
}

bool run(Kernel* self, Context context, Stream stream, const Activations& given, Words* words) {
  pthread_mutex_lock(&self->moving);
  const bool moved = move(self, context, stream, words);
  pthread_mutex_unlock(&self->moving);
  if (!moved) return false;
  const Driver& driver = *self->driver;
  const Pointer bias = self->has_bias ? self->device + self->bias_offset() : 0;
  const cuda::Product product = {&self->layout, self->device, bias, self->multiprocessors};
  for (size_t first = 0; first < given.batch; first += cuda::MOST_ROWS) {
    const size_t left = given.batch - first, batch = left < cuda::MOST_ROWS ? left : cuda::MOST_ROWS;
    cuda::Kernels kernels = {};
    const auto x = reinterpret_cast<Pointer>(given.x + first * self->layout.cols);
    const auto y = reinterpret_cast<Pointer>(given.y + first * self->layout.rows);
    if (!cuda::kernels_for(driver, context, self->layout, batch, &kernels, words) ||
        !cuda::multiply(driver, product, kernels, stream, x, batch, y, words)) {
      return false;
    }
  }
  return true;
}

OrtStatus* compute(void* kernel, OrtKernelContext* context) {
  auto& self = *static_cast<Kernel*>(kernel);
  Activations given = {};
  ORT_TRY(open_activations(*self.api, context, self.outputs, self.inputs, &given));
  if (!given.batch) return nullptr;
  void* stream = nullptr;
  ORT_TRY(self.api->KernelContext_GetGPUComputeStream(context, &stream));

  Words words;
  Context gpu = nullptr, popped = nullptr;
  cuda::Result result = self.driver->StreamGetCtx(static_cast<Stream>(stream), &gpu);
  if (!result) result = self.driver->CtxPushCurrent(gpu);
  if (result) {
    cuda::failed(*self.driver, result, "the stream of the session is on no GPU", &words);
    return error(self, words);
  }
  const bool done = run(&self, gpu, static_cast<Stream>(stream), given, &words);
  self.driver->CtxPopCurrent(&popped);
  return done ? nullptr : error(self, words);
}

void destroy(void* kernel) {
  auto* self = static_cast<Kernel*>(kernel);
  if (self->context && !self->driver->CtxPushCurrent(self->context)) {
    Context popped = nullptr;
    self->driver->MemFree(self->device);
    self->driver->CtxPopCurrent(&popped);
  }
  self->~Kernel();
  free(self);
}

OrtStatus* pack(const OrtApi& api, const OrtKernelInfo* info, Kernel* self) {
  Constants constants;
  ORT_TRY(read_constants(api, info, &constants));
  self->inputs = constants.inputs, self->outputs = constants.outputs;
  self->layout = cuda_layout(constants.matrix);
  const auto* bias = constants.bias.as<float>();
  const size_t bias_bytes = sizeof(float) * constants.matrix.rows;
  self->has_bias = bias;
  self->bytes = bias ? self->bias_offset() + bias_bytes : self->layout.bytes;
  if (!self->host.reserve(self->bytes) || !cuda_pack(constants.matrix, self->host.as<uint8_t>())) {
    return refuse(api, info, ORT_FAIL, "there are no %zu bytes of memory", self->bytes);
  }
  if (bias) memcpy(self->host.as<uint8_t>() + self->bias_offset(), bias, bias_bytes);
  return nullptr;
}

OrtStatus* create(const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
  const char* why = nullptr;
  const Driver* driver = cuda::driver(&why);
  if (!driver) return refuse(*api, info, ORT_FAIL, "%s", why);
  void* memory = malloc(sizeof(Kernel));
  if (!memory) return api->CreateStatus(ORT_FAIL, "anyquant CodebookMatMul: there is no memory");
  auto* self = new (memory) Kernel{api, driver};
  if (OrtStatus* status = pack(*api, info, self)) {
    destroy(self);
    return status;
  }
  *kernel = self;
  return nullptr;
}

}  // namespace

// The constants are repacked by the host.
const OperatorKernel cuda_kernel = {"CUDAExecutionProvider", ORT_CPU_INPUT, create, compute, destroy};
