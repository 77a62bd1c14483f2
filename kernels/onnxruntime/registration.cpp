// anyquant::CodebookMatMul in ONNX Runtime: the operator of docs/onnx-operators.md, in a library that a session's options
// are given. ONNX Runtime takes a registered operator where a model also has a function of that name.

#include <limits.h>
#include <stdlib.h>

#include <atomic>

#include "kernels.h"
#include "ort_api.h"

namespace {

constexpr size_t INPUTS = 9;

// A, bits, planes, codebook, input_scale, outlier_indptr, outlier_index (uint16 or uint32), outlier_value, bias
constexpr int TYPES[INPUTS] = {ORT_FLOAT,  ORT_UINT8, ORT_UINT8,   ORT_FLOAT16, ORT_FLOAT16,
                               ORT_UINT32, ORT_ANY,   ORT_FLOAT16, ORT_FLOAT};

template <const OperatorKernel& KERNEL>
OrtCustomOp described() {
  OrtCustomOp op = {};
  op.version = ORT_VERSION;
  op.GetName = [](const OrtCustomOp*) { return "CodebookMatMul"; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) { return KERNEL.provider; };
  op.GetInputType = [](const OrtCustomOp*, size_t index) { return TYPES[index]; };
  op.GetInputTypeCount = [](const OrtCustomOp*) { return INPUTS; };
  op.GetOutputType = [](const OrtCustomOp*, size_t) -> int { return ORT_FLOAT; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  op.KernelDestroy = KERNEL.destroy;
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t) -> int { return ORT_REQUIRED; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) -> int { return ORT_REQUIRED; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t index) -> int {
    return index ? KERNEL.constants : ORT_DEFAULT_MEMORY;
  };
  op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op.CreateKernelV2 = KERNEL.create;
  op.KernelComputeV2 = KERNEL.compute;
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return INT_MAX; };
  return op;
}

const OrtCustomOp on_cpu = described<cpu_kernel>(), on_cuda = described<cuda_kernel>();

// That kernel has run on no GPU yet: it is for those who ask for it.
bool has_cuda() {
  const char* asked = getenv("ANYQUANT_ONNXRUNTIME_CUDA");
  return asked && asked[0] == '1' && !asked[1];
}

// A runtime refers to its domain as long as there are sessions, so each runtime of a process has one that stays.
struct Registered {
  const OrtApi* api;
  OrtCustomOpDomain* domain;
  Registered* next;
};
std::atomic<Registered*> registered{nullptr};

OrtStatus* make_domain(const OrtApi& api, OrtCustomOpDomain** domain) {
  ORT_TRY(api.CreateCustomOpDomain("anyquant", domain));
  ORT_TRY(api.CustomOpDomain_Add(*domain, &on_cpu));
  return has_cuda() ? api.CustomOpDomain_Add(*domain, &on_cuda) : nullptr;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_VERSION);
  if (!api) return nullptr;  // such a runtime runs the function in the model
  for (Registered* known = registered.load(); known; known = known->next) {
    if (known->api == api) return api->AddCustomOpDomain(options, known->domain);
  }
  auto* entry = static_cast<Registered*>(malloc(sizeof(Registered)));
  if (!entry) return api->CreateStatus(ORT_FAIL, "anyquant: there is no memory");
  entry->api = api;
  if (OrtStatus* status = make_domain(*api, &entry->domain)) {
    free(entry);
    return status;
  }
  entry->next = registered.load();
  while (!registered.compare_exchange_weak(entry->next, entry)) {
  }
  return api->AddCustomOpDomain(options, entry->domain);
}
