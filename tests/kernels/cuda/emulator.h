// The machine of kernels/cuda/platform.cuh on a CPU, for tests: threads are fibers, and what a GPU would let pass or
// punish at random ends the launch with a message instead: barriers that not all reach, memory out of bounds or out of
// line, shared memory that was never written, and races for it.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

struct alignas(16) uint4 {
  u32 x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

#define AQ_DEVICE inline
#define AQ_KERNEL(threads) extern "C" void
#define AQ_SHARED(name) uint4* name = emulator::shared_memory()

namespace emulator {

enum State { READY, AT_BLOCK_BARRIER, AT_WARP_BARRIER, AT_SHUFFLE, AT_PRODUCT, DONE };
constexpr const char* STATES[] = {"runs", "sync_block", "sync_warp", "from_lane_xor", "multiply_add", "has ended"};
constexpr size_t STACK = 128 << 10, GRAIN = 2;  // bytes that accesses are told apart by
constexpr u32 NOBODY = 0xffffffffu, SEVERAL = 0xfffffffeu;

struct Range {
  u64 begin, bytes, writable;
};

struct Thread {
  ucontext_t context;
  State state;
  float value, sum[4];  // of warp-wide operations
  u32 flipped, a[4], b[2];
};

// Who wrote or read a piece of shared memory last, and how many barriers ago.
struct Access {
  u32 thread = NOBODY, warp = NOBODY, block_barriers = 0, warp_barriers = 0;
};

struct Machine {
  const char* kernel;
  void (*call)(const u64*);
  u64 arguments[16];
  u32 grid[2], block[2], threads, current, block_barriers;
  std::vector<Thread> fibers;
  std::vector<u32> warp_barriers;
  std::vector<uint4> shared;
  u32 shared_bytes;
  std::vector<Access> written, read;
  std::vector<Range> ranges;
  std::vector<std::vector<u32>> owners;  // of bytes of writable ranges
  std::vector<char> stacks;
  ucontext_t scheduler;
  char* message;
  size_t message_bytes;
  bool failed;
};
inline Machine m;

inline uint4* shared_memory() { return m.shared.data(); }

inline void leave(State state) {
  Thread& self = m.fibers[m.current];
  self.state = state;
  swapcontext(&self.context, &m.scheduler);
}

__attribute__((format(printf, 1, 2))) inline void note(const char* format, ...) {
  if (m.failed) return;
  m.failed = true;
  const int begun = snprintf(m.message, m.message_bytes, "%s, block (%u, %u), thread %u: ", m.kernel, m.block[0],
                             m.block[1], m.current);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(m.message + begun, m.message_bytes - begun, format, arguments);
  va_end(arguments);
}

#define AQ_REQUIRE(condition, ...)     \
  if (!(condition)) {                  \
    emulator::note(__VA_ARGS__);       \
    emulator::leave(emulator::READY);  \
  }

inline size_t range_of(const void* pointer, size_t bytes, const char* what) {
  const u64 address = reinterpret_cast<u64>(pointer);
  AQ_REQUIRE(address % bytes == 0, "%s of %zu bytes is out of line", what, bytes);
  for (size_t i = 0; i < m.ranges.size(); ++i) {
    const Range& r = m.ranges[i];
    if (address >= r.begin && address + bytes <= r.begin + r.bytes) return i;
  }
  AQ_REQUIRE(false, "%s of %zu bytes is in no memory that was given", what, bytes);
  return 0;
}

inline void check_load(const void* from, size_t bytes) {
  AQ_REQUIRE(!m.ranges[range_of(from, bytes, "a load")].writable, "a load of what may be written meanwhile");
}

inline void check_store(const void* to, size_t bytes) {
  const size_t i = range_of(to, bytes, "a store");
  AQ_REQUIRE(m.ranges[i].writable, "a store to what is constant");
  const u32 self = (m.block[1] * m.grid[0] + m.block[0]) * m.threads + m.current;
  const size_t first = reinterpret_cast<u64>(to) - m.ranges[i].begin;
  for (size_t b = first; b < first + bytes; ++b) {
    u32& owner = m.owners[i][b];
    AQ_REQUIRE(owner == NOBODY || owner == self, "a store to byte %zu, which another thread wrote", b);
    owner = self;
  }
}

inline bool is_before(const Access& a) {
  const u32 warp = m.current / 32;
  return a.warp == NOBODY || m.block_barriers > a.block_barriers ||
         (a.warp == warp && (a.thread == m.current || m.warp_barriers[warp] > a.warp_barriers));
}

inline void check_shared(const void* pointer, size_t bytes, bool writes) {
  const u64 begin = reinterpret_cast<u64>(m.shared.data()), address = reinterpret_cast<u64>(pointer);
  AQ_REQUIRE(address >= begin && address + bytes <= begin + m.shared_bytes,
             "shared memory at byte %lld of %u", static_cast<long long>(address - begin), m.shared_bytes);
  AQ_REQUIRE(address % bytes == 0, "shared memory of %zu bytes is out of line", bytes);
  const u32 warp = m.current / 32;
  for (size_t i = (address - begin) / GRAIN; i < (address - begin + bytes) / GRAIN; ++i) {
    Access &w = m.written[i], &r = m.read[i];
    AQ_REQUIRE(writes || w.warp != NOBODY, "shared byte %zu is read and was never written", i * GRAIN);
    AQ_REQUIRE(is_before(w), "race: shared byte %zu was written by thread %u, with no barrier in between", i * GRAIN,
               w.thread);
    if (writes) {
      AQ_REQUIRE(is_before(r), "race: shared byte %zu was read by others, with no barrier in between", i * GRAIN);
      w = {m.current, warp, m.block_barriers, m.warp_barriers[warp]};
      r = {};
    } else if (r.warp == NOBODY || m.block_barriers > r.block_barriers) {
      r = {m.current, warp, m.block_barriers, m.warp_barriers[warp]};
    } else {
      if (r.thread != m.current) r.thread = SEVERAL;
      if (r.warp != warp) r.warp = SEVERAL;
      r.warp_barriers = m.warp_barriers[warp];
    }
  }
}

}  // namespace emulator

inline u32 thread_index() { return emulator::m.current; }
inline u32 threads_of_block() { return emulator::m.threads; }
inline u32 block_x() { return emulator::m.block[0]; }
inline u32 block_y() { return emulator::m.block[1]; }
inline void sync_block() { emulator::leave(emulator::AT_BLOCK_BARRIER); }
inline void sync_warp() { emulator::leave(emulator::AT_WARP_BARRIER); }

inline float from_lane_xor(float value, u32 flipped) {
  auto& self = emulator::m.fibers[emulator::m.current];
  self.value = value, self.flipped = flipped;
  emulator::leave(emulator::AT_SHUFFLE);
  return self.value;
}

template <class T>
inline T load(const T* from) {
  emulator::check_load(from, sizeof(T));
  return *from;
}
inline uint4 load_once(const uint4* from) { return load(from); }
template <class T>
inline void store(T* to, T value) {
  emulator::check_store(to, sizeof(T));
  *to = value;
}
template <class T>
inline T load_shared(const T* from) {
  emulator::check_shared(from, sizeof(T), false);
  return *from;
}
template <class T>
inline void store_shared(T* to, T value) {
  emulator::check_shared(to, sizeof(T), true);
  *to = value;
}

inline float bits_to_float(u32 bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline u32 float_to_bits(float value) {
  u32 bits;
  memcpy(&bits, &value, 4);
  return bits;
}
inline float half_to_float(u16 half) {
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  const float size = exponent == 31  ? (mantissa ? NAN : INFINITY)
                     : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                     : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  return half >> 15 ? -size : size;
}
inline u16 float_to_half(float value) {
  const u16 sign = static_cast<u16>(float_to_bits(value) >> 31 << 15);
  const float size = std::fabs(value);
  if (std::isnan(size)) return 0x7fff;
  if (size >= 65520.0f) return sign | 0x7c00;
  int exponent = 0;
  std::frexp(size, &exponent);  // size < 2^exponent
  if (exponent < -13 || size == 0) exponent = -13;
  // Units in the last place; nearbyint goes to the even one, and what carries over is the next exponent's.
  const int units = static_cast<int>(std::nearbyint(std::ldexp(size, 11 - exponent)));
  return static_cast<u16>(sign | (units + ((exponent + 13) << 10)));
}
inline u32 funnel(u32 low, u32 high, u32 shift) { return static_cast<u32>((static_cast<u64>(high) << 32 | low) >> shift); }
inline float rounded_product(float a, float b) { return a * b; }  // -ffp-contract=off

inline void multiply_add(float (&sum)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  auto& self = emulator::m.fibers[emulator::m.current];
  memcpy(self.sum, sum, sizeof(sum)), memcpy(self.a, a, sizeof(a)), memcpy(self.b, b, sizeof(b));
  emulator::leave(emulator::AT_PRODUCT);
  memcpy(sum, self.sum, sizeof(sum));
}

namespace emulator {

inline float half_of(u32 word, u32 which) { return half_to_float(static_cast<u16>(word >> 16 * which)); }

inline void multiply_warp(Thread* lanes) {
  float a[16][16], b[16][8];
  for (u32 lane = 0; lane < 32; ++lane) {
    const u32 g = lane / 4, t = lane % 4;
    for (u32 i = 0; i < 8; ++i) a[g + 8 * (i / 2 % 2)][2 * t + 8 * (i / 4) + i % 2] = half_of(lanes[lane].a[i / 2], i % 2);
    for (u32 i = 0; i < 4; ++i) b[2 * t + 8 * (i / 2) + i % 2][g] = half_of(lanes[lane].b[i / 2], i % 2);
  }
  for (u32 lane = 0; lane < 32; ++lane) {
    for (u32 i = 0; i < 4; ++i) {
      const u32 row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      double sum = lanes[lane].sum[i];
      for (u32 k = 0; k < 16; ++k) sum += static_cast<double>(a[row][k]) * b[k][column];
      lanes[lane].sum[i] = static_cast<float>(sum);
    }
  }
}

inline void release_warp(u32 warp) {
  Thread* lanes = m.fibers.data() + 32 * warp;
  if (lanes->state == AT_WARP_BARRIER) ++m.warp_barriers[warp];
  if (lanes->state == AT_PRODUCT) multiply_warp(lanes);
  if (lanes->state == AT_SHUFFLE) {
    float values[32];
    for (u32 i = 0; i < 32; ++i) values[i] = lanes[i].value;
    for (u32 i = 0; i < 32; ++i) lanes[i].value = values[(i ^ lanes[i].flipped) % 32];
  }
  for (u32 i = 0; i < 32; ++i) lanes[i].state = READY;
}

inline void run_fiber() {
  m.call(m.arguments);
  leave(DONE);
}

// True while there is something to go on with.
inline bool step() {
  for (m.current = 0; m.current < m.threads; ++m.current) {
    Thread& fiber = m.fibers[m.current];
    if (fiber.state != READY) continue;
    swapcontext(&m.scheduler, &fiber.context);
    if (m.failed) return false;
  }
  bool released = false, block_waits = true, all_done = true;
  for (u32 first = 0; first < m.threads; first += 32) {
    const State state = m.fibers[first].state;
    bool same = true;
    for (u32 i = 0; i < 32; ++i) same = same && m.fibers[first + i].state == state;
    if (same && (state == AT_WARP_BARRIER || state == AT_SHUFFLE || state == AT_PRODUCT)) {
      release_warp(first / 32);
      released = true;
    }
    for (u32 i = 0; i < 32; ++i) {
      block_waits = block_waits && m.fibers[first + i].state == AT_BLOCK_BARRIER;
      all_done = all_done && m.fibers[first + i].state == DONE;
    }
  }
  if (block_waits) {
    ++m.block_barriers;
    for (Thread& fiber : m.fibers) fiber.state = READY;
    return true;
  }
  if (released || all_done) return released;
  for (m.current = 0; m.fibers[m.current].state == DONE;) ++m.current;
  const State waits = m.fibers[m.current].state;
  for (u32 i = 0; i < m.threads; ++i) {
    if (m.fibers[i].state != waits) note("waits at %s, which thread %u does not reach: %s", STATES[waits], i, STATES[m.fibers[i].state]);
  }
  note("waits for ever");
  return false;
}

inline void run_block() {
  memset(m.shared.data(), 0xff, m.shared.size() * sizeof(uint4));
  m.written.assign(m.shared_bytes / GRAIN, {});
  m.read.assign(m.shared_bytes / GRAIN, {});
  m.warp_barriers.assign(m.threads / 32, 0);
  m.block_barriers = 0;
  for (u32 i = 0; i < m.threads; ++i) {
    Thread& fiber = m.fibers[i];
    fiber.state = READY;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = m.stacks.data() + i * STACK;
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
  while (step()) {
  }
}

}  // namespace emulator

// Parameters of kernels are pointers and 32-bit integers, so that each can be passed as a word. Returns 0, or 1 with a
// message.
extern "C" inline __attribute__((used, visibility("default"))) int emulate(
    const char* name, void* kernel, const u32* grid, u32 threads, u32 shared_bytes, const u64* arguments, u32 count,
    const emulator::Range* ranges, u32 range_count, char* message, u64 message_bytes) {
  using emulator::m;
  static void* target;
  target = kernel;
  m.kernel = name, m.threads = threads, m.shared_bytes = shared_bytes, m.failed = false;
  m.message = message, m.message_bytes = message_bytes, m.grid[0] = grid[0], m.grid[1] = grid[1];
  memset(m.arguments, 0, sizeof(m.arguments));
  memcpy(m.arguments, arguments, count * sizeof(u64));
  m.call = [](const u64* a) {
    using Kernel = void (*)(u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64);
    reinterpret_cast<Kernel>(target)(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11]);
  };
  m.fibers.resize(threads);
  m.stacks.resize(threads * emulator::STACK);
  m.shared.assign(shared_bytes / sizeof(uint4) + 1, {});
  m.ranges.assign(ranges, ranges + range_count);
  m.owners.clear();
  for (const emulator::Range& r : m.ranges) m.owners.emplace_back(r.writable ? r.bytes : 0, emulator::NOBODY);
  for (m.block[1] = 0; m.block[1] < grid[1] && !m.failed; ++m.block[1]) {
    for (m.block[0] = 0; m.block[0] < grid[0] && !m.failed; ++m.block[0]) emulator::run_block();
  }
  return m.failed;
}
