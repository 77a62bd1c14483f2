// See cuda_launch.h.

#include "cuda_launch.h"

#include <pthread.h>
#include <stdlib.h>

namespace cuda {

namespace {

constexpr uint32_t TILE = 32, GROUP = 128, STEP = 32, WARP = 32, BLOCK = 256;
constexpr uint32_t FEW_WARPS = 8, MANY_WARPS = 16;
constexpr int FP32 = 0;

// What stays loaded as long as the process lives.
struct Loaded {
  Context context;
  uint32_t axis, widths, room;
  Kernels kernels;
  Loaded* next;
};
Loaded* loaded = nullptr;
pthread_mutex_t loading = PTHREAD_MUTEX_INITIALIZER;

// Compiled for one row, or for eight: each takes a second at first use.
uint32_t room_for(size_t batch) { return batch == 1 ? 1 : MOST_ROWS; }

// As table_words() in lookup.cuh.
uint32_t table_words(uint32_t axis, uint32_t widths) {
  uint32_t most = 0;
  for (uint32_t bits = 0; bits <= 8; ++bits) {
    if (!(widths >> bits & 1)) continue;
    const uint32_t words = axis == 0 ? TILE << (bits <= 4 ? 2 * bits : bits)
                                     : bits <= 2 ? GROUP / 2 << 2 * bits : (bits <= 5 ? GROUP : STEP) << bits;
    if (words > most) most = words;
  }
  return most;
}

bool load(const Driver& driver, const char* source, const char* name, const Macro* macros, size_t count,
          Function* function, Words* words) {
  int device = 0, major = 0, minor = 0;
  Result result = driver.CtxGetDevice(&device);
  if (!result) result = driver.DeviceGetAttribute(&major, CAPABILITY_MAJOR, device);
  if (!result) result = driver.DeviceGetAttribute(&minor, CAPABILITY_MINOR, device);
  if (result) return failed(driver, result, "the GPU does not say what it is", words);
  if (major < 8) {
    return words->say("the GPU has compute capability %d.%d; the kernels need 8.0 or later (Ampere)", major, minor);
  }
  void* cubin = compiled(source, macros, count, major, minor, words);
  if (!cubin) return false;
  Module module = nullptr;
  result = driver.ModuleLoadData(&module, cubin);
  free(cubin);
  if (!result) result = driver.ModuleGetFunction(function, module, name);
  return result ? failed(driver, result, "the kernels cannot be loaded; is the driver older than NVRTC?", words) : true;
}

bool load_all(const Driver& driver, uint32_t axis, uint32_t widths, uint32_t room, Kernels* kernels, Words* words) {
  const Macro macros[] = {{"AQ_AXIS", axis}, {"AQ_WIDTHS", widths}, {"AQ_BATCH", room}};
  if (!load(driver, "gemv.cu", axis ? "gemv_columns" : "gemv_rows", macros, 3, &kernels->product, words)) return false;
  return !axis || load(driver, "finish.cu", "finish_columns", nullptr, 0, &kernels->finish, words);
}

bool launch(const Driver& driver, Function function, uint32_t grid_x, uint32_t grid_y, uint32_t threads,
            uint32_t shared_bytes, Stream stream, void** arguments, Words* words) {
  const Result result =
      driver.LaunchKernel(function, grid_x, grid_y, 1, threads, 1, 1, shared_bytes, stream, arguments, nullptr);
  return result ? failed(driver, result, "the GPU does not start a kernel", words) : true;
}

}  // namespace

bool failed(const Driver& driver, Result result, const char* what, Words* words) {
  const char* why = nullptr;
  driver.GetErrorString(result, &why);
  return words->say("%s: %s (CUDA error %d)", what, why ? why : "unknown", result);
}

bool kernels_for(const Driver& driver, Context context, const CudaLayout& layout, size_t batch, Kernels* kernels,
                 Words* words) {
  const uint32_t room = room_for(batch);
  pthread_mutex_lock(&loading);
  Loaded* known = loaded;
  while (known && !(known->context == context && known->axis == layout.axis && known->widths == layout.widths &&
                    known->room == room)) {
    known = known->next;
  }
  bool ok = true;
  if (known) {
    *kernels = known->kernels;
  } else if ((ok = load_all(driver, layout.axis, layout.widths, room, kernels, words))) {
    auto* entry = static_cast<Loaded*>(malloc(sizeof(Loaded)));
    if (entry) {
      *entry = {context, layout.axis, layout.widths, room, *kernels, loaded};
      loaded = entry;
    }
  }
  pthread_mutex_unlock(&loading);
  return ok;
}

bool multiply(const Driver& driver, const Product& p, const Kernels& kernels, Stream stream, Pointer x, size_t batch,
              Pointer y, Words* words) {
  const CudaLayout& l = *p.layout;
  const uint32_t room = room_for(batch), table = table_words(l.axis, l.widths);
  Pointer packed = p.packed, bias = p.bias, none = 0;
  int type = FP32;
  auto rows_of_x = static_cast<uint32_t>(batch);
  if (l.axis == 0) {
    // Few tiles leave multiprocessors with too few warps to hide how long memory takes.
    const bool few = room == 1 && l.tasks < 2 * static_cast<uint32_t>(p.multiprocessors);
    const uint32_t warps = few ? MANY_WARPS : FEW_WARPS, sums = room * TILE;
    const uint32_t shared = 4 * ((table > sums ? table : sums) + warps * room * WARP);
    void* arguments[] = {&packed, &x, &type, &rows_of_x, &bias, &y};
    return launch(driver, kernels.product, l.tasks, 1, warps * WARP, shared, stream, arguments, words);
  }
  Pointer partial = 0;
  Result result = driver.MemAllocAsync(&partial, sizeof(float) * l.tasks * batch * l.rows, stream);
  if (result) return failed(driver, result, "the GPU has no memory for the sums of columns", words);
  const uint32_t tiles = (l.rows + TILE - 1) / TILE, warps = tiles < FEW_WARPS ? tiles : FEW_WARPS;
  void* arguments[] = {&packed, &x, &type, &rows_of_x, &partial};
  bool ok = launch(driver, kernels.product, (tiles + warps - 1) / warps, l.tasks, warps * WARP,
                   4 * (table + room * GROUP), stream, arguments, words);
  void* others[] = {&packed, &partial, &none, &x, &type, &rows_of_x, &bias, &y};
  ok = ok && launch(driver, kernels.finish, (l.rows + BLOCK - 1) / BLOCK, rows_of_x, BLOCK, 0, stream, others, words);
  result = driver.MemFreeAsync(partial, stream);
  return ok && result ? failed(driver, result, "the GPU does not take memory back", words) : ok;
}

}  // namespace cuda
