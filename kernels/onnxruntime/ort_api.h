// What the shell uses of ONNX Runtime's C interface, version 17 (ONNX Runtime 1.17), and no more: its headers come with
// none of the packages that hold the runtime. The interface grows at its end alone, so that this fits later ones too.
// Declared after onnxruntime_c_api.h, Copyright (c) Microsoft Corporation, MIT licence.
#pragma once

#include <stddef.h>
#include <stdint.h>

extern "C" {

struct OrtStatus;  // null: no error
struct OrtValue;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtTensorTypeAndShapeInfo;
struct OrtShapeInferContext;

enum { ORT_ANY = 0, ORT_FLOAT = 1, ORT_UINT8 = 2, ORT_UINT16 = 4, ORT_FLOAT16 = 10, ORT_UINT32 = 12 };  // of elements
enum { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2, ORT_INVALID_GRAPH = 10 };                              // of errors
enum { ORT_REQUIRED = 0 };        // of inputs and outputs
enum { ORT_CPU_INPUT = -2, ORT_DEFAULT_MEMORY = 0 };  // memory: of the host; of the execution provider

constexpr uint32_t ORT_VERSION = 17;

// A table of functions; those between are not ours.
struct OrtApi {
  OrtStatus* (*CreateStatus)(int error, const char* message);
  void* to_26[25];
  OrtStatus* (*CreateCustomOpDomain)(const char* name, OrtCustomOpDomain** domain);
  OrtStatus* (*CustomOpDomain_Add)(OrtCustomOpDomain* domain, const struct OrtCustomOp* op);
  OrtStatus* (*AddCustomOpDomain)(OrtSessionOptions* options, OrtCustomOpDomain* domain);
  void* to_51[22];
  OrtStatus* (*GetTensorMutableData)(OrtValue* value, void** data);
  void* to_60[8];
  OrtStatus* (*GetTensorElementType)(const OrtTensorTypeAndShapeInfo* info, int* type);
  OrtStatus* (*GetDimensionsCount)(const OrtTensorTypeAndShapeInfo* info, size_t* count);
  OrtStatus* (*GetDimensions)(const OrtTensorTypeAndShapeInfo* info, int64_t* dimensions, size_t count);
  void* to_65[2];
  OrtStatus* (*GetTensorTypeAndShape)(const OrtValue* value, OrtTensorTypeAndShapeInfo** info);
  void* to_86[20];
  OrtStatus* (*KernelInfoGetAttribute_int64)(const OrtKernelInfo* info, const char* name, int64_t* value);
  void* to_90[3];
  OrtStatus* (*KernelContext_GetInput)(const OrtKernelContext* context, size_t index, const OrtValue** value);
  OrtStatus* (*KernelContext_GetOutput)(OrtKernelContext* context, size_t index, const int64_t* dimensions,
                                        size_t count, OrtValue** value);
  void* to_99[7];
  void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo* info);
  void* to_193[93];
  OrtStatus* (*KernelContext_GetGPUComputeStream)(const OrtKernelContext* context, void** stream);
  void* to_244[50];
  OrtStatus* (*KernelInfo_GetNodeName)(const OrtKernelInfo* info, char* name, size_t* size);
  void* to_249[4];
  OrtStatus* (*KernelInfoGetConstantInput_tensor)(const OrtKernelInfo* info, size_t index, int* is_constant,
                                                  const OrtValue** value);
  void* to_274[24];
  OrtStatus* (*KernelContext_ParallelFor)(const OrtKernelContext* context, void (*task)(void*, size_t), size_t total,
                                          size_t batches, void* argument);
};

#define AQ_SLOT(name, number) static_assert(offsetof(OrtApi, name) == (number) * sizeof(void*), #name)
AQ_SLOT(CreateCustomOpDomain, 26);
AQ_SLOT(GetTensorMutableData, 51);
AQ_SLOT(GetTensorElementType, 60);
AQ_SLOT(GetTensorTypeAndShape, 65);
AQ_SLOT(KernelInfoGetAttribute_int64, 86);
AQ_SLOT(KernelContext_GetInput, 90);
AQ_SLOT(ReleaseTensorTypeAndShapeInfo, 99);
AQ_SLOT(KernelContext_GetGPUComputeStream, 193);
AQ_SLOT(KernelInfo_GetNodeName, 244);
AQ_SLOT(KernelInfoGetConstantInput_tensor, 249);
AQ_SLOT(KernelContext_ParallelFor, 274);
#undef AQ_SLOT

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);  // null: the runtime is older
  const char* (*GetVersionString)();
};

// What an operator's library fills in; the runtime reads as far as the version goes.
struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info);
  const char* (*GetName)(const OrtCustomOp* op);
  const char* (*GetExecutionProviderType)(const OrtCustomOp* op);
  int (*GetInputType)(const OrtCustomOp* op, size_t index);
  size_t (*GetInputTypeCount)(const OrtCustomOp* op);
  int (*GetOutputType)(const OrtCustomOp* op, size_t index);
  size_t (*GetOutputTypeCount)(const OrtCustomOp* op);
  void (*KernelCompute)(void* kernel, OrtKernelContext* context);
  void (*KernelDestroy)(void* kernel);
  int (*GetInputCharacteristic)(const OrtCustomOp* op, size_t index);
  int (*GetOutputCharacteristic)(const OrtCustomOp* op, size_t index);
  int (*GetInputMemoryType)(const OrtCustomOp* op, size_t index);
  int (*GetVariadicInputMinArity)(const OrtCustomOp* op);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp* op);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp* op);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp* op);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext* context);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp* op, OrtShapeInferContext* context);
  int (*GetStartVersion)(const OrtCustomOp* op);
  int (*GetEndVersion)(const OrtCustomOp* op);
};

}  // extern "C"

// Passes an error on.
#define ORT_TRY(call) \
  if (OrtStatus* status = (call)) return status
