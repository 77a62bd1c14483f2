// Products of up to AQ_BATCH rows of activations, 1 to 8, with a codebook matrix, summed in FP32: a lane owns a row of the
// matrix. The order of sums depends on the matrix alone: the same bits each time.

#include "lookup.cuh"

#ifndef AQ_BATCH
#error "AQ_BATCH: the most rows of activations"
#endif

namespace {

// Adds what 32 columns add, whose activations [AQ_BATCH][x_stride] begin at x.
template <int BITS>
AQ_DEVICE void add_step(const Words<BITS>& words, const u32* table, u32 lane, int code, u32 column, const float* x,
                        u32 x_stride, float (&sum)[AQ_BATCH]) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(STEP); i += 4) {
    const float2 low = Table<BITS>::floats(table, lane, words, code + i, column + i);
    const float2 high = Table<BITS>::floats(table, lane, words, code + i + 2, column + i + 2);
#pragma unroll
    for (int b = 0; b < AQ_BATCH; ++b) {
      const float4 v = load_shared(reinterpret_cast<const float4*>(x + b * x_stride + i));
      sum[b] += low.x * v.x;
      sum[b] += low.y * v.y;
      sum[b] += high.x * v.z;
      sum[b] += high.y * v.w;
    }
  }
}

#if AQ_AXIS == 0

AQ_DEVICE constexpr u32 most(u32 a, u32 b) { return a > b ? a : b; }
constexpr u32 ROW_TABLE = most(table_words(), AQ_BATCH * TILE);

// The warps of a block share the groups of columns of a tile.
template <int BITS>
struct RowWork {
  AQ_DEVICE static void run(const u8* matrix, const Matrix& m, const Task& task, const Activations& x, u32* table,
                            float* x_of_warp, float (&sum)[AQ_BATCH]) {
    const u32 lane = thread_index() % LANES, warps = threads_of_block() / LANES;
    Table<BITS>::build(at<u16>(matrix, task.tables), table);
    sync_block();
    for (u32 group = thread_index() / LANES; group * GROUP < m.cols; group += warps) {
      Words<BITS> words;
      words.read(at<uint4>(matrix, task.codes) + static_cast<u64>(group) * BITS * LANES, lane);
      float own[GROUP / STEP][AQ_BATCH];
#pragma unroll
      for (u32 q = 0; q < GROUP / STEP; ++q) {
        const u32 column = group * GROUP + q * STEP + lane;
        const float scale = scale_of(matrix, m, column);
#pragma unroll
        for (int b = 0; b < AQ_BATCH; ++b) own[q][b] = scale * x.at(b, column);
      }
#pragma unroll
      for (u32 q = 0; q < GROUP / STEP; ++q) {
        sync_warp();
#pragma unroll
        for (int b = 0; b < AQ_BATCH; ++b) store_shared(x_of_warp + b * STEP + lane, own[q][b]);
        sync_warp();
        add_step<BITS>(words, table, lane, q * STEP, 0, x_of_warp, STEP, sum);
      }
    }
  }
};

}  // namespace

// y [batch][rows], of the type of x [batch][cols], with bias FP32 [rows] unless that is null. A block for each task, of up to
// 16 warps; shared memory: ROW_TABLE words, and AQ_BATCH * 32 for each warp.
AQ_KERNEL(512)
gemv_rows(const u8* matrix, const void* x_data, int type, u32 batch, const float* bias, void* y) {
  AQ_SHARED(memory);
  const Matrix& m = *reinterpret_cast<const Matrix*>(matrix);
  const Task task = at<Task>(matrix, m.task)[block_x()];
  const Activations x = {x_data, type, batch, m.cols};
  const u32 lane = thread_index() % LANES, warp = thread_index() / LANES, warps = threads_of_block() / LANES;
  u32* table = reinterpret_cast<u32*>(memory);
  float* of_warps = reinterpret_cast<float*>(table + ROW_TABLE);
  float* of_warp = of_warps + warp * AQ_BATCH * LANES;
  float sum[AQ_BATCH] = {};
  for_width<RowWork>(task.bits, matrix, m, task, x, table, of_warp, sum);

  sync_block();
#pragma unroll
  for (int b = 0; b < AQ_BATCH; ++b) store_shared(of_warp + b * LANES + lane, sum[b]);
  float* of_outliers = reinterpret_cast<float*>(table);
  if (m.indptr) outlier_sums<AQ_BATCH>(matrix, m, task, x, of_outliers);
  sync_block();
  for (u32 i = thread_index(); i < AQ_BATCH * TILE; i += threads_of_block()) {
    const u32 b = i / TILE, row = i % TILE;
    if (b >= batch || row >= task.count) continue;
    float total = m.indptr ? load_shared(of_outliers + i) : 0.0f;
    for (u32 w = 0; w < warps; ++w) total += load_shared(of_warps + w * AQ_BATCH * LANES + i);
    const u32 to = load(at<u32>(matrix, m.order) + task.first + row);
    if (bias) total += load(bias + to);
    store_as(y, type, static_cast<u64>(b) * m.rows + to, total);
  }
}

#else

// The warps of a block have the same columns of a tile each.
template <int BITS>
struct ColumnWork {
  AQ_DEVICE static void run(const u8* matrix, const Matrix& m, const Task& task, const Activations& x, u32* table,
                            float* activations, float (&sum)[AQ_BATCH]) {
    constexpr u32 COLUMNS = Table<BITS>::COLUMNS;
    const u32 lane = thread_index() % LANES, tile = block_x() * (threads_of_block() / LANES) + thread_index() / LANES;
    const bool has_rows = tile * TILE < m.rows;
    const uint4* codes = at<uint4>(matrix, task.codes) + static_cast<u64>(tile) * task.stride * BITS * LANES;
    for (u32 group = 0; group < task.count; ++group) {
      Words<BITS> words;
      if (has_rows) words.read(codes + static_cast<u64>(group) * BITS * LANES, lane);
#pragma unroll
      for (u32 c = 0; c < GROUP; c += COLUMNS) {
        const u32 first = group * GROUP + c;
        sync_block();  // what is there may still be in use
        Table<BITS>::build(at<u16>(matrix, task.tables) + (static_cast<u64>(first) << BITS), table);
        for (u32 i = thread_index(); i < AQ_BATCH * COLUMNS; i += threads_of_block()) {
          const u32 column = load(at<u32>(matrix, m.order) + task.first + first + i % COLUMNS);
          store_shared(activations + i, scale_of(matrix, m, column) * x.at(i / COLUMNS, column));
        }
        sync_block();
        if (!has_rows) continue;
#pragma unroll
        for (u32 q = 0; q < COLUMNS; q += STEP) {
          add_step<BITS>(words, table, lane, c + q, q, activations + q, COLUMNS, sum);
        }
      }
    }
  }
};

}  // namespace

// What each task adds, [task][batch][rows]: block x is of as many tiles as it has warps, block y of a task. Shared memory:
// table_words() words, and AQ_BATCH * 128.
AQ_KERNEL(256) gemv_columns(const u8* matrix, const void* x_data, int type, u32 batch, float* partial) {
  AQ_SHARED(memory);
  const Matrix& m = *reinterpret_cast<const Matrix*>(matrix);
  const Task task = at<Task>(matrix, m.task)[block_y()];
  const Activations x = {x_data, type, batch, m.cols};
  u32* table = reinterpret_cast<u32*>(memory);
  float* activations = reinterpret_cast<float*>(table + table_words());
  float sum[AQ_BATCH] = {};
  for_width<ColumnWork>(task.bits, matrix, m, task, x, table, activations, sum);

  const u32 row = block_x() * threads_of_block() + thread_index();
  if (row >= m.rows) return;
#pragma unroll
  for (int b = 0; b < AQ_BATCH; ++b) {
    if (b < static_cast<int>(batch)) store(partial + (static_cast<u64>(block_y()) * batch + b) * m.rows + row, sum[b]);
  }
}

#endif
