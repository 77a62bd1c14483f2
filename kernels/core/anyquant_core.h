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
#define AQ_ABI_VERSION 1

#define AQ_OK 0
#define AQ_BAD_ARGUMENT (-1) /* a null pointer with a length, or bits outside 0..8 */
#define AQ_BAD_LENGTH (-2)   /* a buffer's length is not what rows, cols and bits ask for */
#define AQ_BAD_VALUE (-3)    /* an element to pack does not fit into bits */

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

#ifdef __cplusplus
}
#endif
#endif
