/* Products of activations with quantized matrices, without dequantizing them first; part of libanyquant_core.
 *
 * A matrix is repacked once, into memory of the caller, and is read-only from there on. A product is prepared by one
 * thread, or in parts by several, and then done in parts, each by any thread of the host's pool:
 *
 *     bytes = aq_matmul_bytes(&matrix)                        0: the matrix is not a valid one
 *     aq_matmul_pack(&matrix, packed, bytes)                  or aq_matmul_block_bytes, aq_matmul_pack_blocks
 *     aq_matmul_prepare(packed, x, batch, workspace, size)    size >= aq_matmul_workspace(packed, batch)
 *     aq_matmul_run(packed, batch, workspace, y, part, parts, 0)       for each part in 0..parts-1
 *
 * The layout depends on the version of this library and belongs into no file. Which part computes a row changes
 * nothing in its sum: results do not depend on parts. */
#ifndef ANYQUANT_MATMUL_H
#define ANYQUANT_MATMUL_H

#include "anyquant_core.h"

#ifdef __cplusplus
extern "C" {
#endif

#define AQ_UNSUPPORTED (-4) /* this processor, or this build, does not have the instructions asked for */

/* A matrix of rows * cols, as the intermediate representation stores it. Lengths are in elements; none is null and 0. */
typedef struct aq_codebook_matrix {
  uint64_t rows, cols;            /* 1..2^31-1 each: outputs, inputs */
  int32_t axis;                   /* 0: each row has a codebook; 1: each column */
  int32_t index_bytes;            /* of an outlier's index: 2 or 4 */
  int32_t in_bands;               /* 1: for aq_matmul_band, and where axis is 0 for it alone */
  const uint8_t* bits;            /* of each channel, 0..8 */
  size_t bits_len;
  const uint8_t* codes;           /* bit streams, one channel after the other, each padded to a byte */
  size_t codes_len;
  const uint16_t* codebook;       /* FP16, 2^bits entries for each channel */
  size_t codebook_len;
  const uint16_t* input_scale;    /* none, or FP16 for each column */
  size_t input_scale_len;
  const uint32_t* outlier_indptr; /* none, or rows + 1: where each row's outliers begin */
  size_t outlier_indptr_len;
  const void* outlier_index;      /* columns, ascending within a row */
  size_t outlier_index_len;
  const uint16_t* outlier_value;  /* FP16, instead of what the code and the scale say */
  size_t outlier_value_len;
} aq_codebook_matrix;

/* A matrix of rows * cols whose blocks of columns have a scale: value = (number - zero) * scale, where the number is a
 * code, or what a table says of it. */
typedef struct aq_block_matrix {
  uint64_t rows, cols;    /* 1..2^31-1 each: outputs, inputs */
  int32_t bits;           /* of a code, 1..8 */
  int32_t block;          /* columns that share a scale: 16, 32, 64, 128 or 256; the last of a row may have fewer */
  int32_t bfloat;         /* scales are FP16 (0), or the high halves of FP32 numbers (1) */
  int32_t in_bands;       /* 1: for aq_matmul_band alone */
  const uint8_t* codes;   /* bit streams, a row of whole blocks after the other, each padded to a byte */
  size_t codes_len;
  const uint8_t* recode;  /* none, or 2^bits: the code, below 2^bits, that each stands for below */
  size_t recode_len;
  const float* table;     /* none, or 2^bits numbers */
  size_t table_len;
  const uint16_t* scale;  /* rows * blocks of a row */
  size_t scale_len;
  const uint8_t* zero;    /* none, or as many */
  size_t zero_len;
} aq_block_matrix;

/* Size of the packed matrix; 0 where a field is out of range or a length does not fit the others. */
AQ_API size_t aq_matmul_bytes(const aq_codebook_matrix* matrix);
AQ_API size_t aq_matmul_block_bytes(const aq_block_matrix* matrix);

/* packed is aligned to 64 bytes. Checks values before it writes: AQ_BAD_VALUE where outliers do not ascend or lie
 * outside the matrix, or a code stands for one that is too large. */
AQ_API int aq_matmul_pack(const aq_codebook_matrix* matrix, void* packed, size_t packed_len);
AQ_API int aq_matmul_pack_blocks(const aq_block_matrix* matrix, void* packed, size_t packed_len);

/* Bytes, to be aligned to 64. */
AQ_API size_t aq_matmul_workspace(const void* packed, size_t batch);

/* The most that this is for any matrix of so many columns. */
AQ_API size_t aq_matmul_most_workspace(uint64_t cols, size_t batch);

/* x: batch * cols, C order. */
AQ_API int aq_matmul_prepare(const void* packed, const float* x, size_t batch, void* workspace, size_t workspace_len);

/* The same in parts, all of which are done before a product is. */
AQ_API int aq_matmul_prepare_part(const void* packed, const float* x, size_t batch, void* workspace,
                                  size_t workspace_len, size_t part, size_t parts);

#define AQ_LEVEL_BEST 0
#define AQ_LEVEL_SCALAR 1
#define AQ_LEVEL_AVX2 2   /* with FMA and F16C */
#define AQ_LEVEL_AVX512 3 /* F */

/* The best level that can run here; at most AVX2, or scalar, where the environment variable ANYQUANT_CPU is "avx2" or
 * "scalar" when the library is loaded. */
AQ_API int aq_matmul_level(void);

/* y: batch * rows, C order: x times the transposed matrix. Writes the rows of this part alone. */
AQ_API int aq_matmul_run(const void* packed, size_t batch, const void* workspace, float* y, size_t part, size_t parts,
                         int level);

/* For hosts that ask for one row after the other, of a matrix that was packed in_bands: y [batch][AQ_BAND] of the rows
 * from band * AQ_BAND on that there are; batch 1 or 2, x: rows of activations as they come, unprepared. workspace: memory
 * of this thread alone, aligned to 64 bytes; its first 64 bytes are zero before the first call. It may be used for other
 * matrices, too. The size is 0 where the matrix was not packed in_bands. */
#define AQ_BAND 16
AQ_API size_t aq_matmul_band_workspace(const void* packed);
AQ_API int aq_matmul_band(const void* packed, uint64_t band, const float* const* x, size_t batch, void* workspace,
                          size_t workspace_len, float* y, int level);

/* All of that, in so many threads: those that the library keeps, of which the first such call makes as many as it needs,
 * and this one. While they are at work for another call this thread does it alone. */
AQ_API int aq_matmul(const void* packed, const float* x, size_t batch, void* workspace, size_t workspace_len, float* y,
                     size_t threads);

#ifdef __cplusplus
}
#endif
#endif
