// Products of up to AQ_BATCH rows of activations, 8, 16 or 32, with a codebook matrix on tensor cores: weights and
// activations in FP16, sums in FP32. A warp looks up 32 columns of a tile at a time and multiplies with them.

#include "lookup.cuh"

#ifndef AQ_BATCH
#error "AQ_BATCH: the most rows of activations"
#endif

namespace {

constexpr u32 WARPS = 4;                 // of a block
constexpr int NUMBERS = AQ_BATCH / 8;     // tiles of 8 rows of activations
constexpr u32 ROW_WORDS = STEP / 2 + 4;   // of 32 weights of a row, padded so that rows begin in different banks
constexpr u32 TILE_WORDS = TILE * ROW_WORDS;

struct Sums {
  float of[2][NUMBERS][4] = {};  // upper and lower 16 rows; see multiply_add
};

// halves: activations [AQ_BATCH][stride] of these columns; tile: memory of this warp.
template <int BITS>
AQ_DEVICE void add_step(const Words<BITS>& words, const u32* table, int code, u32 column, const u16* halves, u32 stride,
                        u32* tile, Sums& sums) {
  const u32 lane = thread_index() % LANES, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < static_cast<int>(STEP); i += 8) {
    uint4 eight;
    eight.x = Table<BITS>::halves(table, lane, words, code + i, column + i);
    eight.y = Table<BITS>::halves(table, lane, words, code + i + 2, column + i + 2);
    eight.z = Table<BITS>::halves(table, lane, words, code + i + 4, column + i + 4);
    eight.w = Table<BITS>::halves(table, lane, words, code + i + 6, column + i + 6);
    store_shared(reinterpret_cast<uint4*>(tile + lane * ROW_WORDS + i / 2), eight);
  }
  sync_warp();
#pragma unroll
  for (u32 k = 0; k < STEP; k += 16) {
    u32 a[2][4];
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
      const u32* upper = tile + (16 * half + g) * ROW_WORDS + k / 2 + t;
      const u32* lower = upper + 8 * ROW_WORDS;
      a[half][0] = load_shared(upper), a[half][1] = load_shared(lower);
      a[half][2] = load_shared(upper + 4), a[half][3] = load_shared(lower + 4);
    }
#pragma unroll
    for (int n = 0; n < NUMBERS; ++n) {
      const u32* own = reinterpret_cast<const u32*>(halves + static_cast<u64>(n * 8 + g) * stride + k) + t;
      const u32 b[2] = {load(own), load(own + 4)};
      multiply_add(sums.of[0][n], a[0], b);
      multiply_add(sums.of[1][n], a[1], b);
    }
  }
  sync_warp();
}

// Calls take(row of the tile, row of activations, sum) for what this lane holds.
template <class Take>
AQ_DEVICE void each_sum(const Sums& sums, Take take) {
  const u32 lane = thread_index() % LANES, g = lane / 4, t = lane % 4;
#pragma unroll
  for (u32 i = 0; i < 8u * NUMBERS; ++i) {
    const u32 half = i / (4 * NUMBERS), n = i / 4 % NUMBERS, part = i % 4;
    take(16 * half + 8 * (part / 2) + g, 8 * n + 2 * t + part % 2, sums.of[half][n][part]);
  }
}

}  // namespace

// Activations as FP16, with the scales of columns, in the places of columns, and so that the largest of a row is from 2^14 to
// 2^15: halves [AQ_BATCH][stride], stride a multiple of 128; factor FP32 [AQ_BATCH] is what to multiply results with. A
// block of 256 threads for each of the AQ_BATCH rows.
AQ_KERNEL(256)
half_activations(const u8* matrix, const void* x_data, int type, u32 batch, u16* halves, u32 stride, float* factor) {
  AQ_SHARED(memory);
  float* largest = reinterpret_cast<float*>(memory);
  const Matrix& m = *reinterpret_cast<const Matrix*>(matrix);
  const Activations x = {x_data, type, batch, m.cols};
  const u32 thread = thread_index(), row = block_x();
  const auto value = [&](u32 place) {
    const u32 column = m.axis ? load(at<u32>(matrix, m.order) + place) : place;
    return scale_of(matrix, m, column) * x.at(row, column);
  };
  float most = 0;
  for (u32 i = thread; i < stride; i += threads_of_block()) most = fmaxf(most, fabsf(value(i)));
  store_shared(largest + thread, most);
  for (u32 half = threads_of_block() / 2; half; half /= 2) {
    sync_block();
    if (thread >= half) continue;
    store_shared(largest + thread, fmaxf(load_shared(largest + thread), load_shared(largest + thread + half)));
  }
  sync_block();
  // Powers of two: neither rounds. What is not finite stays so.
  const int least = -100, target = 14;
  int exponent = static_cast<int>(float_to_bits(load_shared(largest)) >> 23) - 127;
  if (exponent < least) exponent = least;
  const float up = exponent > 127 ? 1.0f : bits_to_float(static_cast<u32>(127 + target - exponent) << 23);
  const float down = exponent > 127 ? 1.0f : bits_to_float(static_cast<u32>(127 + exponent - target) << 23);
  for (u32 i = thread; i < stride; i += threads_of_block()) {
    store(halves + static_cast<u64>(row) * stride + i, float_to_half(up * value(i)));
  }
  if (thread == 0) store(factor + row, down);
}

namespace {

#if AQ_AXIS == 0

template <int BITS>
struct RowWork {
  AQ_DEVICE static void run(const u8* matrix, const Matrix& m, const Task& task, const u16* halves, u32 stride,
                            u32* table, u32* tile, Sums& sums) {
    const u32 lane = thread_index() % LANES, warps = threads_of_block() / LANES;
    Table<BITS>::build(at<u16>(matrix, task.tables), table);
    sync_block();
    for (u32 group = thread_index() / LANES; group * GROUP < m.cols; group += warps) {
      Words<BITS> words;
      words.read(at<uint4>(matrix, task.codes) + static_cast<u64>(group) * BITS * LANES, lane);
#pragma unroll
      for (u32 c = 0; c < GROUP; c += STEP) {
        add_step<BITS>(words, table, c, 0, halves + group * GROUP + c, stride, tile, sums);
      }
    }
  }
};

}  // namespace

// y [batch][rows], of the type of x; halves and factor as half_activations made them. A block for each task; shared memory:
// the more of table_words() + 4 * 640 and 4 * 32 * AQ_BATCH words.
AQ_KERNEL(WARPS* LANES)
gemm_rows(const u8* matrix, const u16* halves, u32 stride, const float* factor, const void* x_data, int type, u32 batch,
          void* y) {
  AQ_SHARED(memory);
  const Matrix& m = *reinterpret_cast<const Matrix*>(matrix);
  const Task task = at<Task>(matrix, m.task)[block_x()];
  const Activations x = {x_data, type, batch, m.cols};
  const u32 warp = thread_index() / LANES;
  u32* table = reinterpret_cast<u32*>(memory);
  u32* tile = table + table_words() + warp * TILE_WORDS;
  Sums sums;
  for_width<RowWork>(task.bits, matrix, m, task, halves, stride, table, tile, sums);

  sync_block();
  float* of_warps = reinterpret_cast<float*>(memory);
  each_sum(sums, [&](u32 row, u32 b, float sum) { store_shared(of_warps + (warp * AQ_BATCH + b) * TILE + row, sum); });
  sync_block();
  float total[AQ_BATCH * TILE / (WARPS * LANES)];
#pragma unroll
  for (u32 k = 0; k < AQ_BATCH * TILE / (WARPS * LANES); ++k) {
    const u32 i = thread_index() + k * WARPS * LANES;
    total[k] = 0;
    for (u32 w = 0; w < WARPS; ++w) total[k] += load_shared(of_warps + w * AQ_BATCH * TILE + i);
    total[k] *= load(factor + i / TILE);
  }
  if (m.indptr) {
    sync_block();
    outlier_sums<AQ_BATCH>(matrix, m, task, x, of_warps);
    sync_block();
  }
#pragma unroll
  for (u32 k = 0; k < AQ_BATCH * TILE / (WARPS * LANES); ++k) {
    const u32 i = thread_index() + k * WARPS * LANES, b = i / TILE, row = i % TILE;
    if (b >= batch || row >= task.count) continue;
    const float outliers = m.indptr ? load_shared(of_warps + i) : 0.0f;
    store_as(y, type, static_cast<u64>(b) * m.rows + load(at<u32>(matrix, m.order) + task.first + row),
             total[k] + outliers);
  }
}

#else

template <int BITS>
struct ColumnWork {
  AQ_DEVICE static void run(const u8* matrix, const Matrix& m, const Task& task, const u16* halves, u32 stride,
                            u32* table, u32* tile, Sums& sums) {
    constexpr u32 COLUMNS = Table<BITS>::COLUMNS;
    const u32 lane = thread_index() % LANES, number = block_x() * (threads_of_block() / LANES) + thread_index() / LANES;
    const bool has_rows = number * TILE < m.rows;
    const uint4* codes = at<uint4>(matrix, task.codes) + static_cast<u64>(number) * task.stride * BITS * LANES;
    for (u32 group = 0; group < task.count; ++group) {
      Words<BITS> words;
      if (has_rows) words.read(codes + static_cast<u64>(group) * BITS * LANES, lane);
#pragma unroll
      for (u32 c = 0; c < GROUP; c += COLUMNS) {
        const u32 first = group * GROUP + c;
        sync_block();  // what is there may still be in use
        Table<BITS>::build(at<u16>(matrix, task.tables) + (static_cast<u64>(first) << BITS), table);
        sync_block();
        if (!has_rows) continue;
#pragma unroll
        for (u32 q = 0; q < COLUMNS; q += STEP) {
          add_step<BITS>(words, table, c + q, q, halves + task.first + first + q, stride, tile, sums);
        }
      }
    }
  }
};

}  // namespace

// As gemv_columns; shared memory: table_words() + 4 * 640 words.
AQ_KERNEL(WARPS* LANES)
gemm_columns(const u8* matrix, const u16* halves, u32 stride, u32 batch, float* partial) {
  AQ_SHARED(memory);
  const Matrix& m = *reinterpret_cast<const Matrix*>(matrix);
  const Task task = at<Task>(matrix, m.task)[block_y()];
  const u32 warp = thread_index() / LANES;
  u32* table = reinterpret_cast<u32*>(memory);
  u32* tile = table + table_words() + warp * TILE_WORDS;
  Sums sums;
  for_width<ColumnWork>(task.bits, matrix, m, task, halves, stride, table, tile, sums);

  const u32 first = (block_x() * WARPS + warp) * TILE;
  each_sum(sums, [&](u32 row, u32 b, float sum) {
    if (b < batch && first + row < m.rows) {
      store(partial + (static_cast<u64>(block_y()) * batch + b) * m.rows + first + row, sum);
    }
  });
}

#endif
