// See constants.h.

#include "constants.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "matmul_layout.h"

using matmul::LINE, matmul::MOST_BITS, matmul::MOST_SIDE, matmul::round_up, matmul::stream_bytes;

namespace {

enum Input { ACTIVATIONS, BITS, PLANES, CODEBOOK, SCALE, INDPTR, INDEX, VALUE, BIAS };
constexpr const char* NAMES[] = {"A",           "bits",           "planes",        "codebook",
                                 "input_scale", "outlier_indptr", "outlier_index", "outlier_value", "bias"};

struct Array {
  const void* data = nullptr;
  int type = 0;
  size_t rank = 0, count = 0;
  int64_t sides[2] = {};

  template <typename T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
};

#define REQUIRE(condition, ...) \
  if (!(condition)) return refuse(api, info, ORT_INVALID_GRAPH, __VA_ARGS__)

OrtStatus* describe(const OrtApi& api, const OrtTensorTypeAndShapeInfo* shape, Array* array) {
  ORT_TRY(api.GetTensorElementType(shape, &array->type));
  ORT_TRY(api.GetDimensionsCount(shape, &array->rank));
  if (array->rank < 1 || array->rank > 2) return nullptr;
  ORT_TRY(api.GetDimensions(shape, array->sides, array->rank));
  array->count = static_cast<size_t>(array->sides[0]) * (array->rank == 2 ? static_cast<size_t>(array->sides[1]) : 1);
  return nullptr;
}

// A constant input of a type (ORT_ANY: of whichever) and a rank.
OrtStatus* read_array(const OrtApi& api, const OrtKernelInfo* info, Input input, int type, size_t rank, Array* array) {
  int is_constant = 0;
  const OrtValue* value = nullptr;
  ORT_TRY(api.KernelInfoGetConstantInput_tensor(info, input, &is_constant, &value));
  REQUIRE(is_constant && value, "%s is not a constant of the graph", NAMES[input]);
  OrtTensorTypeAndShapeInfo* shape = nullptr;
  ORT_TRY(api.GetTensorTypeAndShape(value, &shape));
  OrtStatus* status = describe(api, shape, array);
  api.ReleaseTensorTypeAndShapeInfo(shape);
  if (status) return status;
  REQUIRE(array->rank == rank, "%s has %zu dimensions, not %zu", NAMES[input], array->rank, rank);
  REQUIRE(type == ORT_ANY || array->type == type, "%s has elements of type %d, not %d", NAMES[input], array->type, type);
  void* data = nullptr;
  ORT_TRY(api.GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  array->data = data;
  return nullptr;
}

// Bit planes of a channel to its bit stream: of 8 elements the planes hold a byte each, the stream as many bytes.
void write_stream(const uint8_t* planes, size_t plane_bytes, int bits, size_t length, uint8_t* stream) {
  uint64_t spread[256];  // bit i of a byte at bit i * bits
  for (int byte = 0; byte < 256; ++byte) {
    spread[byte] = 0;
    for (int i = 0; i < 8; ++i) spread[byte] |= static_cast<uint64_t>(byte >> i & 1) << i * bits;
  }
  const size_t whole = stream_bytes(length, bits);
  for (size_t j = 0, at = 0; j < plane_bytes; ++j, at += bits) {
    uint64_t word = 0;
    for (int plane = 0; plane < bits; ++plane) word |= spread[planes[plane * plane_bytes + j]] << plane;
    for (int i = 0; i < bits && at + i < whole; ++i) stream[at + i] = static_cast<uint8_t>(word >> 8 * i);
  }
}

// The sizes that the widths call for.
struct Census {
  size_t planes = 0, entries = 0, stream = 0;
};

OrtStatus* count(const OrtApi& api, const OrtKernelInfo* info, const Array& bits, size_t channels, size_t length,
                 Census* census) {
  REQUIRE(bits.count == channels, "%zu widths for %zu channels", bits.count, channels);
  for (size_t c = 0; c < channels; ++c) {
    const int width = bits.as<uint8_t>()[c];
    REQUIRE(width <= MOST_BITS, "channel %zu has a width of %d bits; at most 8 are possible", c, width);
    census->planes += width;
    census->entries += size_t{1} << width;
    census->stream += stream_bytes(length, width);
  }
  return nullptr;
}

OrtStatus* read_outliers(const OrtApi& api, const OrtKernelInfo* info, aq_codebook_matrix* matrix) {
  Array indptr, index, value;
  ORT_TRY(read_array(api, info, INDPTR, ORT_UINT32, 1, &indptr));
  ORT_TRY(read_array(api, info, INDEX, ORT_ANY, 1, &index));
  ORT_TRY(read_array(api, info, VALUE, ORT_FLOAT16, 1, &value));
  REQUIRE(index.type == ORT_UINT16 || index.type == ORT_UINT32,
          "outlier_index has elements of type %d, neither uint16 nor uint32", index.type);
  REQUIRE(index.count == value.count, "%zu columns for %zu outliers", index.count, value.count);
  if (indptr.count == 1 && *indptr.as<uint32_t>() == 0 && !value.count) return nullptr;
  REQUIRE(indptr.count == matrix->rows + 1, "outlier_indptr has %zu elements for %zu rows", indptr.count,
          static_cast<size_t>(matrix->rows));
  const auto* starts = indptr.as<uint32_t>();
  REQUIRE(starts[0] == 0 && starts[matrix->rows] == value.count, "outlier_indptr runs from %u to %u for %zu outliers",
          starts[0], starts[matrix->rows], value.count);
  const auto column = [&](size_t i) -> uint64_t {
    return index.type == ORT_UINT16 ? index.as<uint16_t>()[i] : index.as<uint32_t>()[i];
  };
  for (size_t row = 0; row < matrix->rows; ++row) {
    REQUIRE(starts[row] <= starts[row + 1] && starts[row + 1] <= value.count, "outlier_indptr descends after row %zu", row);
    for (size_t i = starts[row]; i < starts[row + 1]; ++i) {
      REQUIRE(column(i) < matrix->cols && (i == starts[row] || column(i - 1) < column(i)),
              "outlier %zu of row %zu is out of order, or in column %zu of %zu", i - starts[row], row,
              static_cast<size_t>(column(i)), static_cast<size_t>(matrix->cols));
    }
  }
  matrix->outlier_indptr = indptr.as<uint32_t>();
  matrix->outlier_indptr_len = indptr.count;
  matrix->outlier_index = index.data;
  matrix->outlier_index_len = index.count;
  matrix->outlier_value = value.as<uint16_t>();
  matrix->outlier_value_len = value.count;
  matrix->index_bytes = index.type == ORT_UINT16 ? 2 : 4;
  return nullptr;
}

OrtStatus* read_scale(const OrtApi& api, const OrtKernelInfo* info, aq_codebook_matrix* matrix) {
  constexpr uint16_t ONE = 0x3c00;
  Array scale;
  ORT_TRY(read_array(api, info, SCALE, ORT_FLOAT16, 1, &scale));
  if (scale.count == 1 && *scale.as<uint16_t>() == ONE) return nullptr;
  REQUIRE(scale.count == matrix->cols, "input_scale has %zu elements for %zu inputs", scale.count,
          static_cast<size_t>(matrix->cols));
  matrix->input_scale = scale.as<uint16_t>();
  matrix->input_scale_len = scale.count;
  return nullptr;
}

OrtStatus* read_bias(const OrtApi& api, const OrtKernelInfo* info, Constants* constants) {
  Array bias;
  ORT_TRY(read_array(api, info, BIAS, ORT_FLOAT, 1, &bias));
  if (bias.count == 1 && *bias.as<float>() == 0) return nullptr;
  const auto outputs = static_cast<size_t>(constants->outputs);
  REQUIRE(bias.count == outputs || bias.count == 1, "bias has %zu elements for %zu outputs", bias.count, outputs);
  REQUIRE(constants->bias.reserve(outputs * sizeof(float)), "there is no memory for the bias");
  for (size_t n = 0; n < outputs; ++n) constants->bias.as<float>()[n] = bias.as<float>()[bias.count == 1 ? 0 : n];
  return nullptr;
}

}  // namespace

Memory::~Memory() { free(data_); }

bool Memory::reserve(size_t bytes) {
  free(data_);
  data_ = aligned_alloc(LINE, round_up(bytes, LINE));
  return data_ || !bytes;
}

void Memory::take(Memory* other) {
  free(data_);
  data_ = other->data_;
  other->data_ = nullptr;
}

OrtStatus* refuse(const OrtApi& api, const OrtKernelInfo* info, int error, const char* format, ...) {
  char name[128] = "", message[400] = "", whole[600];
  size_t size = sizeof(name);
  // A longer name is an error, which would have to be released; the message goes without it then.
  size_t needed = 0;
  if (!api.KernelInfo_GetNodeName(info, nullptr, &needed) && needed <= size) api.KernelInfo_GetNodeName(info, name, &size);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof(message), format, arguments);
  va_end(arguments);
  snprintf(whole, sizeof(whole), "anyquant CodebookMatMul %s: %s", name, message);
  return api.CreateStatus(error, whole);
}

OrtStatus* read_constants(const OrtApi& api, const OrtKernelInfo* info, Constants* result) {
  int64_t by_output = 0;
  ORT_TRY(api.KernelInfoGetAttribute_int64(info, "K", &result->inputs));
  ORT_TRY(api.KernelInfoGetAttribute_int64(info, "N", &result->outputs));
  ORT_TRY(api.KernelInfoGetAttribute_int64(info, "transB", &by_output));
  const auto is_side = [](int64_t n) { return n >= 1 && static_cast<uint64_t>(n) <= MOST_SIDE; };
  REQUIRE(is_side(result->inputs), "K is %lld", static_cast<long long>(result->inputs));
  REQUIRE(is_side(result->outputs), "N is %lld", static_cast<long long>(result->outputs));
  REQUIRE(by_output == 0 || by_output == 1, "transB is %lld", static_cast<long long>(by_output));
  aq_codebook_matrix& matrix = result->matrix;
  matrix.rows = static_cast<uint64_t>(result->outputs);
  matrix.cols = static_cast<uint64_t>(result->inputs);
  matrix.axis = !by_output;
  matrix.index_bytes = 2;
  const size_t channels = by_output ? matrix.rows : matrix.cols, length = by_output ? matrix.cols : matrix.rows;

  Array bits, planes, codebook;
  ORT_TRY(read_array(api, info, BITS, ORT_UINT8, 1, &bits));
  ORT_TRY(read_array(api, info, PLANES, ORT_UINT8, 2, &planes));
  ORT_TRY(read_array(api, info, CODEBOOK, ORT_FLOAT16, 1, &codebook));
  Census census;
  ORT_TRY(count(api, info, bits, channels, length, &census));
  const size_t plane_bytes = (length + 7) / 8, plane_rows = static_cast<size_t>(planes.sides[0]);
  REQUIRE(static_cast<size_t>(planes.sides[1]) == plane_bytes, "planes of %zu bytes for channels of %zu",
          static_cast<size_t>(planes.sides[1]), length);
  REQUIRE(plane_rows >= 1 && plane_rows >= census.planes, "%zu planes for %zu bits", plane_rows, census.planes);
  REQUIRE(codebook.count == census.entries, "%zu codebook entries, the widths call for %zu", codebook.count,
          census.entries);
  for (size_t i = 0; i < codebook.count; ++i) {  // padding is multiplied with entries, too
    REQUIRE((codebook.as<uint16_t>()[i] & 0x7c00) != 0x7c00, "codebook entry %zu is not finite", i);
  }
  ORT_TRY(read_scale(api, info, &matrix));
  ORT_TRY(read_outliers(api, info, &matrix));
  ORT_TRY(read_bias(api, info, result));

  REQUIRE(result->streams.reserve(census.stream), "there are no %zu bytes of memory", census.stream);
  auto* stream = result->streams.as<uint8_t>();
  const auto* plane = planes.as<uint8_t>();
  for (size_t c = 0; c < channels; ++c) {
    const int width = bits.as<uint8_t>()[c];
    write_stream(plane, plane_bytes, width, length, stream);
    plane += width * plane_bytes;
    stream += stream_bytes(length, width);
  }
  matrix.bits = bits.as<uint8_t>();
  matrix.bits_len = bits.count;
  matrix.codes = result->streams.as<uint8_t>();
  matrix.codes_len = census.stream;
  matrix.codebook = codebook.as<uint16_t>();
  matrix.codebook_len = codebook.count;
  return nullptr;
}
