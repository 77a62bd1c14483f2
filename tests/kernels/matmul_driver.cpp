// Packs random matrices and multiplies with them, every buffer an allocation of its own of the exact size, parts in
// threads of their own: for the sanitizers. Exit code 0 if all levels agree.

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "anyquant_matmul.h"

namespace {

uint32_t state = 1;
uint32_t random_below(uint32_t n) { return (state = state * 1664525u + 1013904223u) / 65536 % n; }

// Memory of exactly so many bytes, aligned to 64.
struct Aligned {
  void* memory;
  explicit Aligned(size_t bytes) : memory(std::aligned_alloc(64, (bytes + 63) / 64 * 64)) {}
  ~Aligned() { std::free(memory); }
};

// Whether bands of rows, asked for by two threads, are those of the product. x has no byte beyond its end.
int multiply_in_bands(const void* packed, uint64_t rows, uint64_t cols, size_t batch, const std::vector<float>& x,
                      const std::vector<float>& expected) {
  const size_t some = batch < 2 ? 1 : 2, size = aq_matmul_band_workspace(packed);
  const float* from[2] = {x.data() + (batch - some) * cols, x.data() + (batch - 1) * cols};
  for (int level = AQ_LEVEL_SCALAR; level <= aq_matmul_level(); ++level) {
    std::atomic<int> wrong{0};
    const auto work = [&](uint64_t first) {
      const Aligned workspace(size);
      std::memset(workspace.memory, 0, 64);
      for (uint64_t band = first; band * AQ_BAND < rows; band += 2) {
        std::vector<float> y(some * AQ_BAND, NAN);
        if (aq_matmul_band(packed, band, from, some, workspace.memory, size, y.data(), level) != AQ_OK) wrong = 9;
        for (size_t i = 0; i < y.size(); ++i) {
          const uint64_t row = band * AQ_BAND + i % AQ_BAND;
          if (row >= rows) continue;
          const float other = expected[(batch - some + i / AQ_BAND) * rows + row];
          if (!(std::fabs(y[i] - other) <= 1e-5f * static_cast<float>(cols))) wrong = 10;
        }
      }
    };
    std::thread another(work, 1);
    work(0);
    another.join();
    if (wrong) return wrong;
  }
  return 0;
}

struct Product {
  std::vector<float> x, y;
};

// Whether all levels give the same product with a packed matrix, which is kept.
int multiply(const void* packed, uint64_t rows, uint64_t cols, size_t batch, Product* product) {
  std::vector<float>&x = product->x, &first = product->y;
  x.resize(batch * cols);
  for (float& each : x) each = static_cast<float>(random_below(2001)) / 1000.f - 1.f;
  const size_t size = aq_matmul_workspace(packed, batch);
  const Aligned workspace(size);
  if (size > aq_matmul_most_workspace(cols, batch)) return 3;
  for (size_t parts = 1 + random_below(4), part = parts; part-- > 0;) {
    if (aq_matmul_prepare_part(packed, x.data(), batch, workspace.memory, size, part, parts) != AQ_OK) return 3;
  }
  for (int level = AQ_LEVEL_SCALAR; level <= aq_matmul_level(); ++level) {
    std::vector<float> y(batch * rows, NAN);
    std::vector<std::thread> threads;
    const size_t parts = 1 + random_below(4);
    for (size_t part = 0; part < parts; ++part) {
      threads.emplace_back([&, part] {
        aq_matmul_run(packed, batch, workspace.memory, y.data(), part, parts, level);
      });
    }
    for (std::thread& thread : threads) thread.join();
    if (first.empty()) first = y;
    for (size_t i = 0; i < y.size(); ++i) {
      if (!(std::fabs(y[i] - first[i]) <= 1e-5f * static_cast<float>(cols))) {
        std::printf("%zu x %zu, level %d, batch %zu: %g at %zu, not %g\n", static_cast<size_t>(rows),
                    static_cast<size_t>(cols), level, batch, y[i], i, first[i]);
        return 4;
      }
    }
  }
  // By the library's threads, while another call wants them too.
  const Aligned another(size);
  std::vector<float> y(batch * rows, NAN), z(batch * rows, NAN);
  std::thread rival([&] { aq_matmul(packed, x.data(), batch, another.memory, size, z.data(), 2); });
  const int status = aq_matmul(packed, x.data(), batch, workspace.memory, size, y.data(), 1 + random_below(4));
  rival.join();
  if (status != AQ_OK) return 7;
  for (size_t i = 0; i < y.size(); ++i) {
    if (y[i] != z[i] || !(std::fabs(y[i] - first[i]) <= 1e-5f * static_cast<float>(cols))) return 8;
  }
  return 0;
}

// Whether products with a matrix agree however it is packed.
template <class Matrix>
int check(Matrix matrix, size_t (*size)(const Matrix*), int (*pack)(const Matrix*, void*, size_t), size_t batch) {
  Product product;
  for (const int in_bands : {0, 1}) {
    matrix.in_bands = in_bands;
    const size_t bytes = size(&matrix);
    if (!bytes) return 1;
    const Aligned packed(bytes);
    if (pack(&matrix, packed.memory, bytes) != AQ_OK) return 2;
    const int wrong =
        in_bands ? multiply_in_bands(packed.memory, matrix.rows, matrix.cols, batch, product.x, product.y)
                 : multiply(packed.memory, matrix.rows, matrix.cols, batch, &product);
    if (wrong) return wrong;
  }
  return 0;
}

int check_codebooks(uint64_t rows, uint64_t cols, int axis, int least, int most, bool scaled, uint32_t outliers,
                    size_t batch) {
  const uint64_t channels = axis ? cols : rows, length = axis ? rows : cols;
  std::vector<uint8_t> bits(channels);
  size_t codes_len = 0, entries = 0;
  for (uint8_t& b : bits) {
    b = static_cast<uint8_t>(least + random_below(most - least + 1));
    codes_len += (length * b + 7) / 8;
    entries += size_t{1} << b;
  }
  std::vector<uint8_t> codes(codes_len);
  for (uint8_t& byte : codes) byte = static_cast<uint8_t>(random_below(256));
  std::vector<uint16_t> codebook(entries), scale(scaled ? cols : 0), value;
  for (uint16_t& entry : codebook) entry = static_cast<uint16_t>(0x3000 + random_below(0x0c00));  // .125 to 1
  for (uint16_t& each : scale) each = static_cast<uint16_t>(0x3800 + random_below(0x0800));
  std::vector<uint32_t> indptr(outliers ? rows + 1 : 0), index;
  for (uint64_t row = 0; outliers && row < rows; ++row) {
    for (uint32_t column = random_below(outliers); column < cols; column += 1 + random_below(outliers)) {
      index.push_back(column);
      value.push_back(0x4500);
    }
    indptr[row + 1] = static_cast<uint32_t>(index.size());
  }
  aq_codebook_matrix matrix = {
      rows, cols, axis, 4, 0, bits.data(), bits.size(), codes.data(), codes.size(), codebook.data(), codebook.size(),
      scaled ? scale.data() : nullptr, scale.size(), outliers ? indptr.data() : nullptr, indptr.size(),
      index.data(), index.size(), value.data(), value.size()};
  return check(matrix, aq_matmul_bytes, aq_matmul_pack, batch);
}

int check_blocks(uint64_t rows, uint64_t cols, int bits, int block, bool with_table, bool with_zero, size_t batch) {
  const size_t blocks = (cols + block - 1) / block, entries = size_t{1} << bits;
  std::vector<uint8_t> codes(rows * ((blocks * block * bits + 7) / 8)), recode(entries), zero(rows * blocks);
  std::vector<float> table(with_table ? entries : 0);
  std::vector<uint16_t> scale(rows * blocks);
  for (uint8_t& byte : codes) byte = static_cast<uint8_t>(random_below(256));
  for (uint8_t& code : recode) code = static_cast<uint8_t>(random_below(static_cast<uint32_t>(entries)));
  for (uint8_t& each : zero) each = static_cast<uint8_t>(random_below(static_cast<uint32_t>(entries)));
  for (float& entry : table) entry = static_cast<float>(random_below(200)) / 100.f - 1.f;
  const bool bfloat = random_below(2);
  for (uint16_t& each : scale) each = bfloat ? 0x3c00 : 0x2000;  // 1/128
  aq_block_matrix matrix = {
      rows, cols, bits, block, bfloat, 0, codes.data(), codes.size(), recode.data(), recode.size(),
      with_table ? table.data() : nullptr, table.size(), scale.data(), scale.size(),
      with_zero ? zero.data() : nullptr, with_zero ? zero.size() : 0};
  return check(matrix, aq_matmul_block_bytes, aq_matmul_pack_blocks, batch);
}

}  // namespace

int main() {
  const uint64_t sides[] = {1, 9, 63, 65, 513, 600, 1090};
  for (const uint64_t rows : sides) {
    for (const uint64_t cols : sides) {
      const auto batch = [] { return random_below(3) ? 1 + random_below(7) : 70; };
      for (int axis = 0; axis < 2; ++axis) {
        const int least = static_cast<int>(random_below(9)), more = static_cast<int>(random_below(9 - least));
        const int wrong =
            check_codebooks(rows, cols, axis, least, least + more, random_below(2), random_below(2) * 37, batch());
        if (wrong) return wrong;
      }
      const int bits = 1 + static_cast<int>(random_below(8)), block = 16 << random_below(5);
      const int wrong = check_blocks(rows, cols, bits, block, random_below(2), random_below(2), batch());
      if (wrong) return wrong;
    }
  }
  return 0;
}
