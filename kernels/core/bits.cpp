// Packing and unpacking of bit streams; see anyquant_core.h for the layout.
//
// Eight elements of B bits are exactly B bytes, so every group of eight starts on a byte border and fits into one
// 64-bit word. Between eight bytes of one element each and 8 * B packed bits lie three steps, which halve or double
// the distance between neighbours: 1 element, 2 elements, 4 elements.

#include <cstring>

#include "anyquant_core.h"

namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "words are loaded and stored as they lie in memory");

// Whether rows * cols == values_len and rows * row_bytes == codes_len, without overflow. Gives row_bytes.
int check(const void* values, size_t values_len, const void* codes, size_t codes_len, size_t rows, size_t cols,
          int bits, size_t* row_bytes) {
  if (bits < 0 || bits > 8) return AQ_BAD_ARGUMENT;
  if ((!values && values_len) || (!codes && codes_len)) return AQ_BAD_ARGUMENT;
  // cols / 8 * bits cannot overflow: bits <= 8. The rest of less than 8 elements takes at most 8 bytes.
  const size_t whole = cols / 8 * static_cast<size_t>(bits);
  const size_t rest = (cols % 8 * static_cast<size_t>(bits) + 7) / 8;
  if (whole > SIZE_MAX - rest) return AQ_BAD_LENGTH;
  *row_bytes = whole + rest;
  size_t product = 0;
  if (__builtin_mul_overflow(rows, cols, &product) || product != values_len) return AQ_BAD_LENGTH;
  if (__builtin_mul_overflow(rows, *row_bytes, &product) || product != codes_len) return AQ_BAD_LENGTH;
  return AQ_OK;
}

// The masks of the three steps: the lower of two neighbouring groups of 1, 2 and 4 elements.
template <int B>
struct Masks {
  static constexpr uint64_t one = ((1ull << B) - 1) * 0x0001000100010001ull;
  static constexpr uint64_t two = ((1ull << 2 * B) - 1) * 0x0000000100000001ull;
  static constexpr uint64_t four = (1ull << 4 * B) - 1;
};

// Eight bytes below 2^B to 8 * B bits.
template <int B>
uint64_t squeeze(uint64_t x) {
  using M = Masks<B>;
  x = (x & M::one) | (x >> (8 - B) & M::one << B);
  x = (x & M::two) | (x >> (16 - 2 * B) & M::two << 2 * B);
  return (x & M::four) | (x >> (32 - 4 * B) & M::four << 4 * B);
}

// The inverse; bits from 8 * B on are ignored.
template <int B>
uint64_t spread(uint64_t x) {
  using M = Masks<B>;
  x = (x & M::four) | (x & M::four << 4 * B) << (32 - 4 * B);
  x = (x & M::two) | (x & M::two << 2 * B) << (16 - 2 * B);
  return (x & M::one) | (x & M::one << B) << (8 - B);
}

// Returns the OR of all groups of eight values: a bit above B in any byte means that a value does not fit.
template <int B>
uint64_t pack_row(const uint8_t* values, size_t cols, uint8_t* codes) {
  uint64_t seen = 0;
  for (; cols >= 8; cols -= 8, values += 8, codes += B) {
    uint64_t eight = 0;
    std::memcpy(&eight, values, 8);
    seen |= eight;
    const uint64_t word = squeeze<B>(eight);
    std::memcpy(codes, &word, B);
  }
  if (cols) {
    uint64_t eight = 0;
    std::memcpy(&eight, values, cols);
    seen |= eight;
    const uint64_t word = squeeze<B>(eight);
    std::memcpy(codes, &word, (cols * B + 7) / 8);
  }
  return seen;
}

template <int B>
void unpack_row(const uint8_t* codes, size_t row_bytes, size_t cols, uint8_t* values) {
  // Whole words while the row has them: loading B bytes goes through the stack and costs three times as much.
  for (; cols >= 8 && row_bytes >= 8; cols -= 8, values += 8, codes += B, row_bytes -= B) {
    uint64_t word = 0;
    std::memcpy(&word, codes, 8);
    const uint64_t eight = spread<B>(word);
    std::memcpy(values, &eight, 8);
  }
  for (; cols; codes += B) {
    const size_t count = cols < 8 ? cols : 8;
    uint64_t word = 0;
    std::memcpy(&word, codes, (count * B + 7) / 8);
    const uint64_t eight = spread<B>(word);
    std::memcpy(values, &eight, count);
    values += count;
    cols -= count;
  }
}

template <int B>
int pack(const uint8_t* values, size_t rows, size_t cols, uint8_t* codes, size_t row_bytes) {
  for (size_t r = 0; r < rows; ++r) {
    const uint64_t seen = pack_row<B>(values + r * cols, cols, codes + r * row_bytes);
    if (seen & ~(0x0101010101010101ull * ((1u << B) - 1))) return AQ_BAD_VALUE;
  }
  return AQ_OK;
}

template <int B>
int unpack(const uint8_t* codes, size_t rows, size_t cols, uint8_t* values, size_t row_bytes) {
  for (size_t r = 0; r < rows; ++r) unpack_row<B>(codes + r * row_bytes, row_bytes, cols, values + r * cols);
  return AQ_OK;
}

int all_zero(const uint8_t* values, size_t length) {
  for (size_t i = 0; i < length; ++i) {
    if (values[i]) return AQ_BAD_VALUE;
  }
  return AQ_OK;
}

}  // namespace

extern "C" int aq_abi_version(void) { return AQ_ABI_VERSION; }

extern "C" int aq_pack_bits(const uint8_t* values, size_t values_len, size_t rows, size_t cols, int bits,
                            uint8_t* codes, size_t codes_len) {
  size_t n = 0;
  const int status = check(values, values_len, codes, codes_len, rows, cols, bits, &n);
  if (status != AQ_OK || values_len == 0) return status;
  switch (bits) {
    case 0: return all_zero(values, values_len);
    case 1: return pack<1>(values, rows, cols, codes, n);
    case 2: return pack<2>(values, rows, cols, codes, n);
    case 3: return pack<3>(values, rows, cols, codes, n);
    case 4: return pack<4>(values, rows, cols, codes, n);
    case 5: return pack<5>(values, rows, cols, codes, n);
    case 6: return pack<6>(values, rows, cols, codes, n);
    case 7: return pack<7>(values, rows, cols, codes, n);
    default: std::memcpy(codes, values, values_len); return AQ_OK;
  }
}

extern "C" int aq_unpack_bits(const uint8_t* codes, size_t codes_len, size_t rows, size_t cols, int bits,
                              uint8_t* values, size_t values_len) {
  size_t n = 0;
  const int status = check(values, values_len, codes, codes_len, rows, cols, bits, &n);
  if (status != AQ_OK || values_len == 0) return status;
  switch (bits) {
    case 0: std::memset(values, 0, values_len); return AQ_OK;
    case 1: return unpack<1>(codes, rows, cols, values, n);
    case 2: return unpack<2>(codes, rows, cols, values, n);
    case 3: return unpack<3>(codes, rows, cols, values, n);
    case 4: return unpack<4>(codes, rows, cols, values, n);
    case 5: return unpack<5>(codes, rows, cols, values, n);
    case 6: return unpack<6>(codes, rows, cols, values, n);
    case 7: return unpack<7>(codes, rows, cols, values, n);
    default: std::memcpy(values, codes, values_len); return AQ_OK;
  }
}
