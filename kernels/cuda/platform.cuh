// What the kernels use of a GPU, and nothing else: no header of the CUDA toolkit is needed to compile them. Where
// AQ_EMULATOR is defined, the same names come from the emulator that the tests bring.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr u32 LANES = 32;  // of a warp

#ifdef AQ_EMULATOR
#include "emulator.h"
#else

#define AQ_DEVICE __device__ __forceinline__
#define AQ_KERNEL(threads) extern "C" __global__ __launch_bounds__(threads) void
// The block's memory, whose size comes with the launch.
#define AQ_SHARED(name) extern __shared__ uint4 name[]

AQ_DEVICE u32 thread_index() { return threadIdx.x; }
AQ_DEVICE u32 threads_of_block() { return blockDim.x; }
AQ_DEVICE u32 block_x() { return blockIdx.x; }
AQ_DEVICE u32 block_y() { return blockIdx.y; }

AQ_DEVICE void sync_block() { __syncthreads(); }
AQ_DEVICE void sync_warp() { __syncwarp(); }
// The value that the lane of this number with these bits flipped has; all lanes of the warp take part.
AQ_DEVICE float from_lane_xor(float value, u32 flipped) { return __shfl_xor_sync(0xffffffffu, value, flipped); }

// Global memory: constant while a kernel runs; read once, so that it need not push others out of the cache; written.
template <class T>
AQ_DEVICE T load(const T* from) {
  return __ldg(from);
}
AQ_DEVICE uint4 load_once(const uint4* from) {
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(from));
  return v;
}
template <class T>
AQ_DEVICE void store(T* to, T value) {
  *to = value;
}

template <class T>
AQ_DEVICE T load_shared(const T* from) {
  return *from;
}
template <class T>
AQ_DEVICE void store_shared(T* to, T value) {
  *to = value;
}

AQ_DEVICE float half_to_float(u16 half) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
}
// To nearest, ties to even.
AQ_DEVICE u16 float_to_half(float value) {
  u16 half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
  return half;
}
AQ_DEVICE float bits_to_float(u32 bits) { return __uint_as_float(bits); }
AQ_DEVICE u32 float_to_bits(float value) { return __float_as_uint(value); }
// The 32 bits from bit `shift` on, 0..31, of the 64 that two words are.
AQ_DEVICE u32 funnel(u32 low, u32 high, u32 shift) { return __funnelshift_r(low, high, shift); }
// A product that no addition is merged with.
AQ_DEVICE float rounded_product(float a, float b) { return __fmul_rn(a, b); }

// sum += a * b of a whole warp: a is 16 x 16, b 16 x 8, both FP16 in pairs, the sum 16 x 8 in FP32. With g = lane / 4 and
// t = lane % 4, a lane holds of a the columns 2t and 2t+1 of rows g and g+8, then 2t+8 and 2t+9 of them; of b the rows
// 2t and 2t+1, then 2t+8 and 2t+9, of column g; of the sum the columns 2t and 2t+1 of rows g, then g+8.
AQ_DEVICE void multiply_add(float (&sum)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif
