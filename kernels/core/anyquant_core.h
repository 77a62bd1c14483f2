/* The C interface of libanyquant_core. Every function returns 0 or one of the negative codes below, reads and
 * writes only inside the lengths it is given, allocates nothing and may be called from any thread. */
#ifndef ANYQUANT_CORE_H
#define ANYQUANT_CORE_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define AQ_API __attribute__((visibility("default")))
#else
#define AQ_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Changes whenever the meaning or the arguments of an existing function change. */
#define AQ_ABI_VERSION 5

#define AQ_OK 0
#define AQ_BAD_ARGUMENT (-1) /* a null pointer with a length, or bits or a number of clusters out of range */
#define AQ_BAD_LENGTH (-2)   /* a buffer's length is not what the other arguments ask for */
#define AQ_BAD_VALUE (-3)    /* an element to pack does not fit into bits, or a code is not below k */

AQ_API int aq_abi_version(void);

/* Bit streams. Element i of a row lies at bits [i*bits, (i+1)*bits) of the row, least significant bit first; a row
 * is padded with zero bits to (cols*bits + 7) / 8 bytes. bits is 0..8; with 0 bits a row has no bytes and every
 * element is 0.
 *
 * values: rows * cols elements, one byte each, C order.  codes: rows * row_bytes bytes, C order.
 * values_len and codes_len are the lengths of the two buffers in bytes, and must be exact. */

/* Writes all codes_len bytes; on AQ_BAD_VALUE the contents of codes are unspecified. */
AQ_API int aq_pack_bits(const uint8_t* values, size_t values_len, size_t rows, size_t cols, int bits, uint8_t* codes,
                        size_t codes_len);

/* Ignores the padding bits. */
AQ_API int aq_unpack_bits(const uint8_t* codes, size_t codes_len, size_t rows, size_t cols, int bits, uint8_t* values,
                          size_t values_len);

/* Exact weighted k-means in one dimension, each row by itself: the least sum of w * (x - nearest centroid)^2.
 *
 * values: rows * cols finite elements, C order, cols 1..2^28.  weights: none (null and 0), cols shared by all rows, or
 * rows * cols; finite, not negative. An element of weight 0 is not there; a row of zero weights has none at all.
 * Lengths are in elements, the workspace's in bytes: at least aq_kmeans_workspace(cols), aligned for a double. */

/* 0 where cols is out of range. */
AQ_API size_t aq_kmeans_workspace(size_t cols);

/* errors: rows * ks_len, the least error with ks[q] centroids; ks ascends within 1..256. */
AQ_API int aq_kmeans_errors(const float* values, size_t values_len, const float* weights, size_t weights_len,
                            size_t rows, size_t cols, const int32_t* ks, size_t ks_len, double* errors,
                            size_t errors_len, void* workspace, size_t workspace_len);

/* centroids: rows * k, ascending; where a row has fewer different values than k, those, the last one repeated. */
AQ_API int aq_kmeans(const float* values, size_t values_len, const float* weights, size_t weights_len, size_t rows,
                     size_t cols, int32_t k, double* centroids, size_t centroids_len, void* workspace,
                     size_t workspace_len);

/* codes: of each value the nearest entry of its row's ascending codebook, k of 1..256 entries; ties and equal entries
 * go to the lowest code. */
AQ_API int aq_assign(const float* values, size_t values_len, size_t rows, size_t cols, const float* codebook,
                     size_t codebook_len, int32_t k, uint8_t* codes, size_t codes_len);

/* Lower loss (q - w)^T H (q - w) of rows with codebooks, by moving entries and codes; q is codebook[code] * scale.
 *
 * moment: H, cols * cols, symmetric and positive semi-definite.  weights: w, rows * cols.  fixed: none (null and 0), or
 * rows * cols: what stands for a weight whatever its code, NaN where the code counts.  scale: none, or cols, positive.
 * codebook: rows * k FP16 numbers, each row ascending; codes: rows * cols, below k; both are overwritten, and entries
 * that no code names may then hold anything.  losses: rows * 2, before and after, never more than before.
 * All finite but for the NaN; cols 1..2^24, k 1..256; lengths as above. On AQ_BAD_VALUE, a code, nothing is written. */

/* 0 where cols or k is out of range. */
AQ_API size_t aq_refine_workspace(size_t cols, int32_t k);

AQ_API int aq_refine_rows(const float* moment, size_t moment_len, const float* weights, size_t weights_len,
                          const float* fixed, size_t fixed_len, const float* scale, size_t scale_len, size_t rows,
                          size_t cols, int32_t k, int32_t alternations, int32_t cycles, float* codebook,
                          size_t codebook_len, uint8_t* codes, size_t codes_len, double* losses, size_t losses_len,
                          void* workspace, size_t workspace_len);

#ifdef __cplusplus
}
#endif
#endif
