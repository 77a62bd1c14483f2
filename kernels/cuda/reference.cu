// Plain and obviously right: every kind of the intermediate representation dequantized from its stored arrays, a thread for
// each weight, and a product of dense FP32 matrices, a thread for each result. FP32 throughout, in one order.

#include "packed.cuh"

namespace {

// The code of `bits` bits from bit `at` of a stream on.
AQ_DEVICE u32 code_at(const u8* stream, u64 at, u32 bits) {
  u32 code = 0;
  for (u32 i = 0; i < bits; ++i) code |= static_cast<u32>(load(stream + (at + i) / 8) >> (at + i) % 8 & 1) << i;
  return code;
}

// Row and column of this thread's weight; false beyond the last one.
struct Weight {
  u64 number;
  u32 row, column;
  AQ_DEVICE bool is_in(u32 rows, u32 cols) {
    number = static_cast<u64>(block_x()) * threads_of_block() + thread_index();
    row = static_cast<u32>(number / cols), column = static_cast<u32>(number % cols);
    return number < static_cast<u64>(rows) * cols;
  }
};

}  // namespace

// stream, entry: for each channel where its codes (bytes) and its codebook (entries) begin; input_scale may be null.
AQ_KERNEL(256)
dequantize_codebook(const u8* bits, const u8* codes, const u64* stream, const u16* codebook, const u64* entry,
                    const u16* input_scale, u32 rows, u32 cols, u32 axis, float* w) {
  Weight of;
  if (!of.is_in(rows, cols)) return;
  const u32 channel = axis ? of.column : of.row, place = axis ? of.row : of.column, width = load(bits + channel);
  const u32 code = code_at(codes + load(stream + channel), static_cast<u64>(place) * width, width);
  float value = half_to_float(load(codebook + load(entry + channel) + code));
  if (input_scale) value = rounded_product(value, half_to_float(load(input_scale + of.column)));
  store(w + of.number, value);
}

// After that; index is of 2 or 4 bytes. A thread for each row.
AQ_KERNEL(256)
replace_outliers(const u32* indptr, const void* index, u32 index_bytes, const u16* value, u32 rows, u32 cols, float* w) {
  const u32 row = block_x() * threads_of_block() + thread_index();
  if (row >= rows) return;
  for (u32 i = load(indptr + row); i < load(indptr + row + 1); ++i) {
    const u32 column =
        index_bytes == 2 ? load(static_cast<const u16*>(index) + i) : load(static_cast<const u32*>(index) + i);
    store(w + static_cast<u64>(row) * cols + column, half_to_float(load(value + i)));
  }
}

enum Format : u32 { BFP = 0, MINIFLOAT = 1, LOG = 2 };

// A row takes row_bytes of codes and has `blocks` exponents.
AQ_KERNEL(256)
dequantize_block(const u8* codes, const u8* exponents, u32 row_bytes, u32 blocks, u32 block, u32 format, u32 width,
                 u32 exponent_width, u32 rows, u32 cols, float* w) {
  Weight of;
  if (!of.is_in(rows, cols)) return;
  const u32 code = code_at(codes + static_cast<u64>(of.row) * row_bytes, static_cast<u64>(of.column) * width, width);
  const int shared = static_cast<signed char>(load(exponents + static_cast<u64>(of.row) * blocks + of.column / block));
  const int top = static_cast<int>(width) - 1, magnitude = static_cast<int>(code & ((1u << top) - 1));
  int significand = magnitude, exponent = shared - top;
  if (format == LOG) {
    significand = 1, exponent = shared + magnitude - ((1 << top) - 1);
  } else if (format == MINIFLOAT) {
    const int mantissa_bits = top - static_cast<int>(exponent_width), field = magnitude >> mantissa_bits;
    const int mantissa = magnitude & ((1 << mantissa_bits) - 1);
    significand = field > 0 ? mantissa + (1 << mantissa_bits) : mantissa;
    exponent = (field > 1 ? field : 1) - ((1 << exponent_width) - 1) + shared - mantissa_bits;
  }
  const float value = ldexpf(static_cast<float>(significand), exponent);
  store(w + of.number, code >> top ? -value : value);
}

AQ_KERNEL(256)
dequantize_affine(const u8* codes, const u16* scale, const u8* zero, u32 row_bytes, u32 blocks, u32 block, u32 bits,
                  u32 rows, u32 cols, float* w) {
  Weight of;
  if (!of.is_in(rows, cols)) return;
  const u64 i = static_cast<u64>(of.row) * blocks + of.column / block;
  const u32 code = code_at(codes + static_cast<u64>(of.row) * row_bytes, static_cast<u64>(of.column) * bits, bits);
  const float number = static_cast<float>(code) - static_cast<float>(load(zero + i));
  store(w + of.number, rounded_product(number, half_to_float(load(scale + i))));
}

// y [batch][rows] of x [batch][cols]; block y is of a row of activations.
AQ_KERNEL(256) multiply(const float* w, const float* x, u32 rows, u32 cols, float* y) {
  const u32 row = block_x() * threads_of_block() + thread_index();
  if (row >= rows) return;
  float sum = 0;
  for (u32 k = 0; k < cols; ++k) {
    sum += load(w + static_cast<u64>(row) * cols + k) * load(x + static_cast<u64>(block_y()) * cols + k);
  }
  store(y + static_cast<u64>(block_y()) * rows + row, sum);
}
