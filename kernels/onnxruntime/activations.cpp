// See activations.h.

#include "activations.h"

namespace {

constexpr size_t MOST_RANK = 16;

OrtStatus* sides_of(const OrtApi& api, const OrtValue* value, int64_t* sides, size_t* rank) {
  OrtTensorTypeAndShapeInfo* shape = nullptr;
  ORT_TRY(api.GetTensorTypeAndShape(value, &shape));
  OrtStatus* status = api.GetDimensionsCount(shape, rank);
  if (!status && *rank <= MOST_RANK) status = api.GetDimensions(shape, sides, *rank);
  api.ReleaseTensorTypeAndShapeInfo(shape);
  return status;
}

}  // namespace

OrtStatus* open_activations(const OrtApi& api, OrtKernelContext* context, int64_t outputs, int64_t inputs,
                            Activations* activations) {
  const OrtValue* given = nullptr;
  ORT_TRY(api.KernelContext_GetInput(context, 0, &given));
  int64_t sides[MOST_RANK];
  size_t rank = 0;
  ORT_TRY(sides_of(api, given, sides, &rank));
  if (rank < 1 || rank > MOST_RANK || sides[rank - 1] != inputs) {
    return api.CreateStatus(ORT_INVALID_ARGUMENT,
                            "anyquant CodebookMatMul: A has more than 16 dimensions, or the last dimension of A is not K");
  }
  activations->batch = 1;
  for (size_t i = 0; i + 1 < rank; ++i) activations->batch *= static_cast<size_t>(sides[i]);
  sides[rank - 1] = outputs;
  OrtValue* result = nullptr;
  ORT_TRY(api.KernelContext_GetOutput(context, 0, sides, rank, &result));
  if (!activations->batch) return nullptr;
  void *x = nullptr, *y = nullptr;
  ORT_TRY(api.GetTensorMutableData(const_cast<OrtValue*>(given), &x));
  ORT_TRY(api.GetTensorMutableData(result, &y));
  activations->x = static_cast<const float*>(x);
  activations->y = static_cast<float*>(y);
  return nullptr;
}
