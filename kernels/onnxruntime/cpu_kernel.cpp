// The operator on the CPU: the kernels of kernels/core, in the threads of the session.

#include <stdlib.h>
#include <unistd.h>

#include <new>

#include "activations.h"
#include "anyquant_matmul.h"
#include "constants.h"
#include "kernels.h"

namespace {

constexpr size_t PART_BYTES = 1 << 16;  // of a matrix, that are worth a thread
constexpr size_t PARTS_PER_CORE = 4;    // so that one that is late delays the others by little

struct Kernel {
  const OrtApi* api;
  int64_t inputs = 0, outputs = 0;
  size_t packed_bytes = 0;
  Memory packed{};  // by aq_matmul_pack
  Memory bias{};    // [outputs], or nothing
};

const long cores = sysconf(_SC_NPROCESSORS_ONLN);

size_t parts_for(const Kernel& kernel, size_t batch) {
  const size_t worth = kernel.packed_bytes * batch / PART_BYTES;
  const size_t most = cores > 0 ? static_cast<size_t>(cores) * PARTS_PER_CORE : PARTS_PER_CORE;
  return worth < 1 ? 1 : worth < most ? worth : most;
}

struct Product {
  const void* packed;
  size_t batch;
  const void* workspace;
  float* y;
  size_t parts;
};

void run_part(void* argument, size_t part) {
  const auto* p = static_cast<const Product*>(argument);
  aq_matmul_run(p->packed, p->batch, p->workspace, p->y, part, p->parts, AQ_LEVEL_BEST);
}

OrtStatus* compute(void* kernel, OrtKernelContext* context) {
  const auto& self = *static_cast<const Kernel*>(kernel);
  const OrtApi& api = *self.api;
  Activations given = {};
  ORT_TRY(open_activations(api, context, self.outputs, self.inputs, &given));
  if (!given.batch) return nullptr;

  const void* packed = self.packed.as<void>();
  Memory workspace;
  const size_t bytes = aq_matmul_workspace(packed, given.batch);
  if (!workspace.reserve(bytes)) {
    return api.CreateStatus(ORT_FAIL, "anyquant CodebookMatMul: there is no memory for the activations");
  }
  aq_matmul_prepare(packed, given.x, given.batch, workspace.as<void>(), bytes);
  Product product = {packed, given.batch, workspace.as<void>(), given.y, parts_for(self, given.batch)};
  if (product.parts == 1) {
    run_part(&product, 0);
  } else {
    ORT_TRY(api.KernelContext_ParallelFor(context, run_part, product.parts, product.parts, &product));
  }
  if (const auto* bias = self.bias.as<float>()) {
    const auto outputs = static_cast<size_t>(self.outputs);
    for (size_t b = 0; b < given.batch; ++b) {
      for (size_t n = 0; n < outputs; ++n) given.y[b * outputs + n] += bias[n];
    }
  }
  return nullptr;
}

void destroy(void* kernel) {
  auto* self = static_cast<Kernel*>(kernel);
  self->~Kernel();
  free(self);
}

OrtStatus* pack(const OrtApi& api, const OrtKernelInfo* info, Kernel* self) {
  Constants constants;
  ORT_TRY(read_constants(api, info, &constants));
  self->inputs = constants.inputs, self->outputs = constants.outputs;
  self->bias.take(&constants.bias);
  self->packed_bytes = aq_matmul_bytes(&constants.matrix);
  if (!self->packed_bytes) return refuse(api, info, ORT_INVALID_GRAPH, "the constants do not fit together");
  if (!self->packed.reserve(self->packed_bytes)) {
    return refuse(api, info, ORT_FAIL, "there are no %zu bytes of memory", self->packed_bytes);
  }
  const int status = aq_matmul_pack(&constants.matrix, self->packed.as<void>(), self->packed_bytes);
  if (status != AQ_OK) return refuse(api, info, ORT_FAIL, "the matrix cannot be packed (status %d)", status);
  return nullptr;
}

OrtStatus* create(const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
  void* memory = malloc(sizeof(Kernel));
  if (!memory) return api->CreateStatus(ORT_FAIL, "anyquant CodebookMatMul: there is no memory");
  auto* self = new (memory) Kernel{api};
  if (OrtStatus* status = pack(*api, info, self)) {
    destroy(self);
    return status;
  }
  *kernel = self;
  return nullptr;
}

}  // namespace

const OperatorKernel cpu_kernel = {"CPUExecutionProvider", ORT_DEFAULT_MEMORY, create, compute, destroy};
