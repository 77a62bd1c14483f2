// ggml's CPU backend keeps a list of buffer types that may do operations in its place, and asks each of them for every
// operation of a graph. One that holds no buffers is added there: it does the products with our types, of all rows at
// once, for which the matrix lies in memory as kernels/core likes it best.

#include "products.h"

#include <dlfcn.h>
#include <link.h>

#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <new>

#include "anyquant_matmul.h"
#include "ggml_abi.h"
#include "matmul_layout.h"
#include "memory_map.h"
#include "tensors.h"
#include "types.h"

namespace {

// A std::vector<BufferType*>.
struct List {
  BufferType **begin, **end, **capacity;
};

// What a ggml exports that this takes.
struct Names {
  void* (*init)(InitParams);
  void (*free)(void* context);
  size_t (*overhead)();
  GgmlTensor* (*new_tensor)(void* context, int type, int64_t columns, int64_t rows);
  GgmlTensor* (*mul_mat)(void* context, GgmlTensor*, GgmlTensor*);
  const char* (*op_name)(int);
  void* (*data)(const GgmlTensor*);
  void (*barrier)(void* threads);
  List* (*extra)();
};

// Of one ggml: its barrier may differ from another's.
class Products final : public TensorTraits {
 public:
  Products(int operation, void (*barrier)(void*)) : operation_(operation), barrier_(barrier) {}

  bool is_ours(const GgmlTensor& op) const;
  bool work_size(int threads, const GgmlTensor* op, size_t& bytes) override;
  bool compute(ComputeParams* how, GgmlTensor* op) override;

 private:
  int operation_;
  void (*barrier_)(void*);
};

bool is_dense(const GgmlTensor& t) {
  size_t bytes = sizeof(float);
  for (int i = 0; i < 4; bytes *= static_cast<size_t>(t.sides[i++])) {
    if (t.strides[i] != bytes) return false;
  }
  return t.type == GGML_F32;
}

// A matrix of one of our types times activations, which lie without gaps, as results do. Anything else is left to ggml.
bool Products::is_ours(const GgmlTensor& op) const {
  if (op.operation != operation_) return false;
  const GgmlTensor &w = *op.source[0], &x = *op.source[1];
  size_t block = 0;
  for (const auto& type : TYPE) block = w.type == type.number ? type.bytes : block;
  return block && w.sides[2] == 1 && w.sides[3] == 1 && w.strides[0] == block &&
         w.strides[1] == static_cast<size_t>(w.sides[0]) / blob::BLOCK * block && is_dense(x) && is_dense(op);
}

size_t batch_of(const GgmlTensor& op) {
  const int64_t* sides = op.source[1]->sides;
  return static_cast<size_t>(sides[1] * sides[2] * sides[3]);
}

// One row of activations each thread prepares for itself, which takes less than to wait for another.
size_t workspace_of(const GgmlTensor& op) {
  const auto columns = static_cast<uint64_t>(op.source[0]->sides[0]);
  return matmul::round_up(aq_matmul_most_workspace(columns, batch_of(op)), matmul::LINE);
}

size_t work_of(const GgmlTensor& op, int threads) {
  return workspace_of(op) * static_cast<size_t>(batch_of(op) == 1 ? threads : 1) + matmul::LINE;
}

// A matrix that was met and repacked; null where this one was not.
const void* known(const GgmlTensor& w) {
  thread_local const Tensor* previous = nullptr;
  const auto columns = static_cast<uint64_t>(w.sides[0]), rows = static_cast<uint64_t>(w.sides[1]);
  const Tensor* t = known_at(static_cast<const char*>(w.data), rows, columns, w.strides[1], previous);
  if (t) previous = t;
  return t ? t->packed[WHOLE].load() : nullptr;
}

const void* meet(const GgmlTensor& w) {
  const auto columns = static_cast<uint64_t>(w.sides[0]), rows = static_cast<uint64_t>(w.sides[1]);
  Tensor* t = tensor_at(static_cast<const char*>(w.data), rows, columns, w.strides[1]);
  return t ? packed_for(t, WHOLE) : nullptr;
}

// Here, where a graph is planned by one thread, tensors are met: threads that compute must not find different things.
bool Products::work_size(int threads, const GgmlTensor* op, size_t& bytes) {
  const GgmlTensor& w = *op->source[0];
  if (!w.data || (!known(w) && !meet(w))) return false;
  bytes = work_of(*op, threads);
  return true;
}

// What it does not do, as where some rows of a tensor are taken or data is damaged, ggml does row by row.
bool Products::compute(ComputeParams* how, GgmlTensor* op) {
  const void* packed = how->work_bytes < work_of(*op, how->parts) ? nullptr : known(*op->source[0]);
  if (!packed) return false;
  const size_t batch = batch_of(*op), bytes = workspace_of(*op);
  const auto part = static_cast<size_t>(how->part), parts = static_cast<size_t>(how->parts);
  const auto* x = static_cast<const float*>(op->source[1]->data);
  auto* work = reinterpret_cast<char*>(matmul::round_up(reinterpret_cast<uintptr_t>(how->work), matmul::LINE));
  if (batch == 1) {
    work += part * bytes;
    aq_matmul_prepare(packed, x, batch, work, bytes);
  } else {
    aq_matmul_prepare_part(packed, x, batch, work, bytes, part, parts);
    barrier_(how->threads);
  }
  aq_matmul_run(packed, batch, work, static_cast<float*>(op->data), part, parts, AQ_LEVEL_BEST);
  return true;
}

// Is asked for each operation; holds no buffers.
class NoBuffers final : public ExtraBufferType {
 public:
  explicit NoBuffers(const Products& products) : products_(products) {}

  bool supports(void*, const GgmlTensor*) override { return false; }
  TensorTraits* traits(const GgmlTensor* op) override { return products_.is_ours(*op) ? &products_ : nullptr; }

 private:
  Products products_;
};

// Whether a class has so many virtual functions, destructors being two.
bool has_functions(void* library, const char* table, size_t count) {
  void* at = dlsym(library, table);
  Dl_info info;
  void* symbol = nullptr;
  if (!at || !dladdr1(at, &info, &symbol, RTLD_DL_SYMENT) || !symbol) return false;
  return static_cast<const ElfW(Sym)*>(symbol)->st_size == (count + 2) * sizeof(void*);
}

// The number of the product in ggml's list of operations, by a graph of one; -1 where a tensor is not what it should be.
int product_number(const Names& ggml) {
  if (ggml.overhead() < sizeof(GgmlTensor)) return -1;
  void* context = ggml.init({ggml.overhead() * 3 + (1 << 14), nullptr, false});
  if (!context) return -1;
  GgmlTensor* w = ggml.new_tensor(context, GGML_F32, 32, 5);
  GgmlTensor* x = ggml.new_tensor(context, GGML_F32, 32, 3);
  const GgmlTensor* y = ggml.mul_mat(context, w, x);
  const auto is_as_made = [&](const GgmlTensor& t, int64_t columns, int64_t rows) {
    return t.sides[0] == columns && t.sides[1] == rows && t.sides[2] == 1 && t.sides[3] == 1 && is_dense(t) &&
           t.data == ggml.data(&t);
  };
  int number = -1;
  if (is_as_made(*w, 32, 5) && is_as_made(*x, 32, 3) && is_as_made(*y, 5, 3) && y->source[0] == w && y->source[1] == x &&
      !y->source[2] && w->operation == 0 && y->operation > 0 && !std::strcmp(ggml.op_name(y->operation), "MUL_MAT")) {
    number = y->operation;
  }
  ggml.free(context);
  return number;
}

template <class Function>
bool find(void* library, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(library, name));
  return *function;
}

constexpr size_t MOST_WORDS = 12;

// Never given back: the host's list points there.
struct Added {
  BufferType words[MOST_WORDS];
  alignas(NoBuffers) char context[sizeof(NoBuffers)];
};

bool was_added(const BufferType* type, size_t context) {
  return type[context] == reinterpret_cast<const char*>(type) + offsetof(Added, context);
}

// Which word of a buffer type is its context: that of which the class says so. As many as there are, where none is.
size_t context_of(const BufferType* type) {
  for (size_t i = 0; i < MOST_WORDS && is_readable(type + i); ++i) {
    Dl_info info;
    if (type[i] && is_readable(type[i]) && dladdr(*static_cast<void**>(type[i]), &info) && info.dli_sname &&
        !std::strncmp(info.dli_sname, "_ZTVN4ggml3cpu", 14) && std::strstr(info.dli_sname, "17extra_buffer_typeE")) {
      return i;
    }
  }
  return MOST_WORDS;
}

bool append(List* list, BufferType* type) {
  const auto count = static_cast<size_t>(list->end - list->begin);
  auto** bigger = static_cast<BufferType**>(std::malloc((count + 1) * sizeof(BufferType*)));
  if (!bigger) return false;
  if (count) std::memcpy(bigger, list->begin, count * sizeof(BufferType*));
  bigger[count] = type;
  *list = {bigger, bigger + count + 1, bigger + count + 1};
  return true;
}

}  // namespace

bool add_products(void* library) {
  Names ggml;
  if (!find(library, "ggml_init", &ggml.init) || !find(library, "ggml_free", &ggml.free) ||
      !find(library, "ggml_tensor_overhead", &ggml.overhead) || !find(library, "ggml_new_tensor_2d", &ggml.new_tensor) ||
      !find(library, "ggml_mul_mat", &ggml.mul_mat) || !find(library, "ggml_op_name", &ggml.op_name) ||
      !find(library, "ggml_get_data", &ggml.data) || !find(library, "ggml_barrier", &ggml.barrier) ||
      !find(library, "_Z39ggml_backend_cpu_get_extra_buffer_typesv", &ggml.extra) ||
      !dlsym(library, "ggml_cpu_extra_compute_forward") || !dlsym(library, "ggml_cpu_extra_work_size") ||
      !has_functions(library, "_ZTVN4ggml3cpu13tensor_traitsE", 4) ||
      !has_functions(library, "_ZTVN4ggml3cpu17extra_buffer_typeE", 4)) {
    return false;
  }
  const int operation = product_number(ggml);
  if (operation < 0) return false;
  List* list = ggml.extra();
  const auto count = list->end - list->begin;
  if (count < 0 || count > 16 || list->capacity < list->end) return false;
  // What it is like differs from version to version: one that is there is copied, but for what it says of operations.
  if (!count || !*list->begin) return false;
  const size_t context = context_of(*list->begin);
  if (context == MOST_WORDS) return false;
  for (BufferType** each = list->begin; each != list->end; ++each) {
    if (*each && was_added(*each, context)) return true;
  }
  const char* wanted = std::getenv("ANYQUANT_GGML");
  if (wanted && !std::strcmp(wanted, "rows")) return false;
  auto* added = static_cast<Added*>(std::calloc(1, sizeof(Added)));
  if (!added) return false;
  std::memcpy(added->words, *list->begin, context * sizeof(BufferType));
  added->words[context] = new (added->context) NoBuffers(Products(operation, ggml.barrier));
  return append(list, added->words);
}
