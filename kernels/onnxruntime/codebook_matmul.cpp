// anyquant::CodebookMatMul in ONNX Runtime: the operator of docs/onnx-operators.md on the kernels of kernels/core, in the
// threads of the session. ONNX Runtime takes a registered operator where a model also has a function of that name.

#include <limits.h>
#include <stdlib.h>
#include <unistd.h>

#include <atomic>
#include <new>

#include "anyquant_matmul.h"
#include "ort_api.h"
#include "stored_matrix.h"

namespace {

constexpr size_t INPUTS = 9, MOST_RANK = 16;
constexpr size_t PART_BYTES = 1 << 16;  // of a matrix, that are worth a thread
constexpr size_t PARTS_PER_CORE = 4;    // so that one that is late delays the others by little

struct Kernel {
  const OrtApi* api;
  StoredMatrix matrix;
};

const long cores = sysconf(_SC_NPROCESSORS_ONLN);

size_t parts_for(const StoredMatrix& matrix, size_t batch) {
  const size_t worth = matrix.packed_bytes * batch / PART_BYTES;
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

OrtStatus* sides_of(const OrtApi& api, const OrtValue* value, int64_t* sides, size_t* rank) {
  OrtTensorTypeAndShapeInfo* shape = nullptr;
  ORT_TRY(api.GetTensorTypeAndShape(value, &shape));
  OrtStatus* status = api.GetDimensionsCount(shape, rank);
  if (!status && *rank <= MOST_RANK) status = api.GetDimensions(shape, sides, *rank);
  api.ReleaseTensorTypeAndShapeInfo(shape);
  return status;
}

OrtStatus* compute(void* kernel, OrtKernelContext* context) {
  const auto& self = *static_cast<const Kernel*>(kernel);
  const OrtApi& api = *self.api;
  const StoredMatrix& matrix = self.matrix;
  const OrtValue* given = nullptr;
  ORT_TRY(api.KernelContext_GetInput(context, 0, &given));
  int64_t sides[MOST_RANK];
  size_t rank = 0;
  ORT_TRY(sides_of(api, given, sides, &rank));
  if (rank < 1 || rank > MOST_RANK || sides[rank - 1] != matrix.inputs) {
    return api.CreateStatus(ORT_INVALID_ARGUMENT,
                            "anyquant CodebookMatMul: A has more than 16 dimensions, or the last dimension of A is not K");
  }
  Product product = {};
  product.batch = 1;
  for (size_t i = 0; i + 1 < rank; ++i) product.batch *= static_cast<size_t>(sides[i]);
  sides[rank - 1] = matrix.outputs;
  OrtValue* result = nullptr;
  ORT_TRY(api.KernelContext_GetOutput(context, 0, sides, rank, &result));
  if (!product.batch) return nullptr;
  void *x = nullptr, *y = nullptr;
  ORT_TRY(api.GetTensorMutableData(const_cast<OrtValue*>(given), &x));
  ORT_TRY(api.GetTensorMutableData(result, &y));
  product.y = static_cast<float*>(y);
  product.packed = matrix.packed.as<void>();

  Memory workspace;
  const size_t bytes = aq_matmul_workspace(product.packed, product.batch);
  if (!workspace.reserve(bytes)) {
    return api.CreateStatus(ORT_FAIL, "anyquant CodebookMatMul: there is no memory for the activations");
  }
  product.workspace = workspace.as<void>();
  aq_matmul_prepare(product.packed, static_cast<const float*>(x), product.batch, workspace.as<void>(), bytes);
  product.parts = parts_for(matrix, product.batch);
  if (product.parts == 1) {
    run_part(&product, 0);
  } else {
    ORT_TRY(api.KernelContext_ParallelFor(context, run_part, product.parts, product.parts, &product));
  }
  if (const auto* bias = matrix.bias.as<float>()) {
    const auto outputs = static_cast<size_t>(matrix.outputs);
    for (size_t b = 0; b < product.batch; ++b) {
      for (size_t n = 0; n < outputs; ++n) product.y[b * outputs + n] += bias[n];
    }
  }
  return nullptr;
}

void destroy(void* kernel) {
  auto* self = static_cast<Kernel*>(kernel);
  self->~Kernel();
  free(self);
}

OrtStatus* create(const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
  void* memory = malloc(sizeof(Kernel));
  if (!memory) return api->CreateStatus(ORT_FAIL, "anyquant CodebookMatMul: there is no memory");
  auto* self = new (memory) Kernel{api, {}};
  if (OrtStatus* status = read_matrix(*api, info, &self->matrix)) {
    destroy(self);
    return status;
  }
  *kernel = self;
  return nullptr;
}

// A, bits, planes, codebook, input_scale, outlier_indptr, outlier_index (uint16 or uint32), outlier_value, bias
constexpr int TYPES[INPUTS] = {ORT_FLOAT,  ORT_UINT8, ORT_UINT8,   ORT_FLOAT16, ORT_FLOAT16,
                               ORT_UINT32, ORT_ANY,   ORT_FLOAT16, ORT_FLOAT};

OrtCustomOp described() {
  OrtCustomOp op = {};
  op.version = ORT_VERSION;
  op.GetName = [](const OrtCustomOp*) { return "CodebookMatMul"; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
  op.GetInputType = [](const OrtCustomOp*, size_t index) { return TYPES[index]; };
  op.GetInputTypeCount = [](const OrtCustomOp*) { return INPUTS; };
  op.GetOutputType = [](const OrtCustomOp*, size_t) -> int { return ORT_FLOAT; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  op.KernelDestroy = destroy;
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t) -> int { return ORT_REQUIRED; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) -> int { return ORT_REQUIRED; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) -> int { return ORT_DEFAULT_MEMORY; };
  op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op.CreateKernelV2 = create;
  op.KernelComputeV2 = compute;
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return INT_MAX; };
  return op;
}

const OrtCustomOp codebook_matmul = described();

// A runtime refers to its domain as long as there are sessions, so each runtime of a process has one that stays.
struct Registered {
  const OrtApi* api;
  OrtCustomOpDomain* domain;
  Registered* next;
};
std::atomic<Registered*> registered{nullptr};

OrtStatus* make_domain(const OrtApi& api, OrtCustomOpDomain** domain) {
  ORT_TRY(api.CreateCustomOpDomain("anyquant", domain));
  return api.CustomOpDomain_Add(*domain, &codebook_matmul);
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
