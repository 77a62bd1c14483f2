// Registers our tensor types in the ggml that a process runs, prebuilt ones too; see docs/gguf-format.md.
//
// ggml keeps how types are stored and multiplied in two tables, and exports where an entry lies. Numbers of types that it
// has given up are still in there, empty: ours go there. Before anything is written, sizes and known entries are compared.

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "ggml_abi.h"
#include "matmul_layout.h"
#include "memory_map.h"
#include "products.h"
#include "tensors.h"
#include "types.h"

namespace {

// A band of rows times one or two rows of activations. ggml asks for one or two rows after the other; the whole band is
// done when the first of them is asked for. Without a constructor, which each use would have to ask about.
struct Band {
  const char* next;  // row; null: there is none
  uint64_t columns, stride, batch;
  const float* x[2];
  uint64_t beginnings[2][2];  // of the activations, lest others lie there by now
  uint64_t at, end;           // rows of the band: where the next one is, and those that there are
  float y[2][AQ_BAND];

  bool is_of(const float* activations, int b) const {
    uint64_t beginning[2];
    std::memcpy(beginning, activations, sizeof(beginning));
    return activations == x[b] && beginning[0] == beginnings[b][0] && beginning[1] == beginnings[b][1];
  }
  // Whether a row is simply the next one; y: its activations.
  bool has(const char* row, uint64_t n, uint64_t bytes, const float* const* y, uint64_t count) const {
    return row == next && batch == count && columns == n && stride == bytes && is_of(y[0], 0) &&
           (count == 1 || is_of(y[1], 1));
  }
  void go_on() { next = ++at < end ? next + stride : nullptr; }
};
thread_local Band thread_band;

// What else a thread keeps.
struct Thread {
  Place place, place_of_values;
  void* workspace = nullptr;
  size_t bytes = 0;

  ~Thread() { std::free(workspace); }

  bool reserve(size_t wanted) {
    if (wanted <= bytes) return true;
    std::free(workspace);
    bytes = matmul::round_up(wanted, matmul::LINE);
    workspace = std::aligned_alloc(matmul::LINE, bytes);
    if (!workspace) return bytes = 0, false;
    std::memset(workspace, 0, matmul::LINE);
    return true;
  }
};
thread_local Thread thread;

// Does the band that a row is of; false where its products are not numbers.
__attribute__((noinline)) bool multiply(const char* row, uint64_t columns, uint64_t stride, const float* const* x,
                                        uint64_t batch, Band* band) {
  Thread& me = thread;
  band->next = nullptr;
  if (!go_to(row, columns, stride, x[0], &me.place)) return false;
  const void* packed = packed_for(me.place.tensor, BANDS);
  if (!packed || !me.reserve(aq_matmul_band_workspace(packed))) return false;
  const Tensor& t = *me.place.tensor;
  // Not what the header says, as it may be gone by now.
  const uint64_t number = me.place.row / AQ_BAND, left = t.bytes / t.stride - number * AQ_BAND;
  if (aq_matmul_band(packed, number, x, batch, me.workspace, me.bytes, band->y[0], AQ_LEVEL_BEST) != AQ_OK) return false;
  band->next = row;
  band->columns = columns;
  band->stride = stride;
  band->batch = batch;
  band->at = me.place.row % AQ_BAND;
  band->end = left < AQ_BAND ? left : AQ_BAND;
  for (uint64_t b = 0; b < batch; ++b) {
    band->x[b] = x[b];
    std::memcpy(band->beginnings[b], x[b], sizeof(band->beginnings[b]));
  }
  return true;
}

// Where the row is not simply the next one of a band.
__attribute__((noinline)) void some_products(uint64_t columns, uint64_t stride, float* s, size_t bs, const char* x, size_t bx,
                                             const float* const* y, uint64_t batch, Band* band) {
  for (uint64_t r = 0; r < batch; ++r, x += bx) {
    const bool done = band->has(x, columns, stride, y, batch) || multiply(x, columns, stride, y, batch, band);
    for (uint64_t b = 0; b < batch; ++b) s[r + b * bs] = done ? band->y[b][band->at] : NAN;
    if (done) band->go_on();
  }
}

// n: columns, a multiple of 32.
template <int I>
void vec_dot(int n, float* s, size_t bs, const void* x, size_t bx, const void* y, size_t by, int nrc) {
  const auto columns = static_cast<uint64_t>(n), stride = columns / blob::BLOCK * TYPE[I].bytes;
  const auto* row = static_cast<const char*>(x);
  const float* both[2] = {static_cast<const float*>(y),
                          reinterpret_cast<const float*>(static_cast<const char*>(y) + by)};
  Band& band = thread_band;
  if (nrc == 1 && band.has(row, columns, stride, both, 1)) {
    *s = band.y[0][band.at];
    return band.go_on();
  }
  some_products(columns, stride, s, bs, row, bx, both, static_cast<uint64_t>(nrc), &band);
}

template <int I>
void to_float(const void* x, float* out, int64_t n) {
  const uint64_t columns = static_cast<uint64_t>(n), stride = columns / blob::BLOCK * TYPE[I].bytes;
  Place& place = thread.place_of_values;
  // Unlike products it reads the file's own bytes, so that they are checked again for each series of rows.
  if (go_to(static_cast<const char*>(x), columns, stride, nullptr, &place) &&
      (!place.looked_up || blob::is_whole(place.tensor->header())) && is_sound(place.tensor)) {
    return blob::dequantize(place.tensor->header(), place.row, out);
  }
  place.tensor = nullptr;
  for (int64_t i = 0; i < n; ++i) out[i] = NAN;
}

constexpr VecDot VEC_DOT[TYPES] = {vec_dot<0>, vec_dot<1>, vec_dot<2>, vec_dot<3>, vec_dot<4>, vec_dot<5>, vec_dot<6>};
constexpr ToFloat TO_FLOAT[TYPES] = {to_float<0>, to_float<1>, to_float<2>, to_float<3>, to_float<4>, to_float<5>,
                                     to_float<6>};

using GetTraits = const TypeTraits* (*)(int);
using GetCpuTraits = const CpuTraits* (*)(int);

// What is known of every ggml; null where all of it holds. named: our types are among its names already.
const char* why_not(GetTraits traits, GetCpuTraits cpu, bool named) {
  if (reinterpret_cast<const char*>(traits(1)) - reinterpret_cast<const char*>(traits(0)) != sizeof(TypeTraits) ||
      reinterpret_cast<const char*>(cpu(1)) - reinterpret_cast<const char*>(cpu(0)) != sizeof(CpuTraits)) {
    return "its tables have entries of another size";
  }
  constexpr struct {
    int number;
    const char* name;
    int64_t block;
    size_t bytes;
    bool quantized;
  } expected[] = {{GGML_F32, "f32", 1, 4, false}, {GGML_F16, "f16", 1, 2, false}, {GGML_Q4_0, "q4_0", 32, 18, true},
                  {GGML_Q8_0, "q8_0", 32, 34, true}};
  for (const auto& e : expected) {
    const TypeTraits& t = *traits(e.number);
    if (!t.name || std::strcmp(t.name, e.name) || t.block != e.block || t.bytes != e.bytes || t.quantized != e.quantized ||
        !cpu(e.number)->vec_dot || cpu(e.number)->rows < 1 || cpu(e.number)->rows > 2) {
      return "known types are not what they should be";
    }
  }
  if (cpu(GGML_F32)->activations != GGML_F32 || cpu(GGML_Q4_0)->activations != GGML_Q8_0 ||
      !traits(GGML_Q4_0)->to_float || !traits(GGML_Q8_0)->to_float) {
    return "known types are not what they should be";
  }
  for (const auto& type : TYPE) {
    const TypeTraits& t = *traits(type.number);
    if ((!named && (t.bytes || t.block || t.to_float)) || cpu(type.number)->vec_dot) return "a number that was given up is in use";
  }
  return nullptr;
}

// Makes memory writable for as long as it lives, where it is not.
class Writable {
 public:
  Writable(const void* at, size_t bytes)
      : changed_(!is_writable(at) || !is_writable(static_cast<const char*>(at) + bytes - 1)) {
    const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)), address = reinterpret_cast<uintptr_t>(at);
    begin_ = address / page * page;
    bytes_ = (address + bytes + page - 1) / page * page - begin_;
    done_ = !changed_ || mprotect(reinterpret_cast<void*>(begin_), bytes_, PROT_READ | PROT_WRITE) == 0;
  }
  ~Writable() {
    if (changed_ && done_) mprotect(reinterpret_cast<void*>(begin_), bytes_, PROT_READ);
  }
  explicit operator bool() const { return done_; }

 private:
  uintptr_t begin_;
  size_t bytes_;
  bool changed_, done_;
};

bool add_types(GetTraits traits, GetCpuTraits cpu) {
  // Whole tables, as entries of both may share pages.
  const int last = TYPE[TYPES - 1].number;
  const Writable one(traits(0), (last + 1) * sizeof(TypeTraits)), other(cpu(0), (last + 1) * sizeof(CpuTraits));
  if (!one || !other) return false;
  for (int i = 0; i < TYPES; ++i) {
    *const_cast<CpuTraits*>(cpu(TYPE[i].number)) = {nullptr, VEC_DOT[i], GGML_F32, 2};
    *const_cast<TypeTraits*>(traits(TYPE[i].number)) = {
        TYPE[i].name, blob::BLOCK, 0, static_cast<size_t>(TYPE[i].bytes), true, TO_FLOAT[i], nullptr};
  }
  return true;
}

// A ggml of the process: both functions as one library sees them, be they its own or of one that it needs.
struct Host {
  void* library;
  GetTraits traits;
  GetCpuTraits cpu;
};

struct Found {
  Host host[16];
  int count = 0;
};

// Of every library; hosts load ggml's so that others do not see its names.
int look_into(dl_phdr_info* info, size_t, void* argument) {
  auto& found = *static_cast<Found*>(argument);
  void* library = dlopen(info->dlpi_name && *info->dlpi_name ? info->dlpi_name : nullptr, RTLD_LAZY | RTLD_NOLOAD);
  if (!library) return 0;
  const Host host = {library, reinterpret_cast<GetTraits>(dlsym(library, "ggml_get_type_traits")),
                     reinterpret_cast<GetCpuTraits>(dlsym(library, "ggml_get_type_traits_cpu"))};
  bool is_new = host.traits && host.cpu && found.count < 16;
  for (int i = 0; i < found.count; ++i) {
    is_new = is_new && (found.host[i].cpu != host.cpu || found.host[i].traits != host.traits);
  }
  if (is_new) {
    found.host[found.count++] = host;
  } else {
    dlclose(library);
  }
  return 0;
}

const char* message = "";
int with_products = 0;

}  // namespace

// Adds the types to every ggml in the process. Returns to how many; those that have them already count, too.
extern "C" __attribute__((visibility("default"))) int anyquant_ggml_register(void) {
  static pthread_mutex_t one_at_a_time = PTHREAD_MUTEX_INITIALIZER;
  pthread_mutex_lock(&one_at_a_time);
  Found found;
  dl_iterate_phdr(look_into, &found);
  int done = with_products = 0;
  for (int i = 0; i < found.count; ++i) {
    const auto [library, traits, cpu] = found.host[i];
    // One set of names may serve several builds of the products, as where each is for another processor.
    const bool known = traits(TYPE[0].number)->to_float == TO_FLOAT[0];
    const char* why = known && cpu(TYPE[0].number)->vec_dot == VEC_DOT[0] ? nullptr : why_not(traits, cpu, known);
    if (!why && !add_types(traits, cpu)) why = "its tables cannot be written";
    if (why) {
      message = why;
      std::fprintf(stderr, "anyquant: nothing was changed in this ggml: %s\n", why);
    } else {
      with_products += add_products(library);
      ++done;
    }
    dlclose(library);
  }
  if (!done) {
    if (!*message) message = "there is no ggml whose tables can be found";
    std::fprintf(stderr, "anyquant: no tensor types were added: %s\n", message);
  }
  pthread_mutex_unlock(&one_at_a_time);
  return done;
}

// Of how many among those whole products are done at once, which is faster.
extern "C" __attribute__((visibility("default"))) int anyquant_ggml_whole(void) { return with_products; }

// Why the last ggml was left as it was.
extern "C" __attribute__((visibility("default"))) const char* anyquant_ggml_message(void) { return message; }

// What ggml calls in the library that GGML_BACKEND_PATH names. There is no backend: it says so and goes on; the library
// stays (-z nodelete).
extern "C" __attribute__((visibility("default"))) void* ggml_backend_init(void) {
  anyquant_ggml_register();
  return nullptr;
}
