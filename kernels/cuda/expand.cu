// The weights of a packed codebook matrix, [rows][cols], for products with so many rows of activations that a product of dense
// matrices is faster. FP32 is what the intermediate representation defines, to the last bit.

#include "lookup.cuh"

namespace {

// 32 columns of a tile, by way of memory of this warp [32][33], so that each row is written as one piece.
template <int BITS, class Place>
AQ_DEVICE void write_step(const u8* matrix, const Matrix& m, const Words<BITS>& words, const u32* table, int code,
                          u32 column, u32 rows, float* tile, void* w, int type, Place place) {
  const u32 lane = thread_index() % LANES;
  sync_warp();
#pragma unroll
  for (int i = 0; i < static_cast<int>(STEP); i += 2) {
    const float2 two = Table<BITS>::floats(table, lane, words, code + i, column + i);
    store_shared(tile + lane * (STEP + 1) + i, two.x);
    store_shared(tile + lane * (STEP + 1) + i + 1, two.y);
  }
  sync_warp();
  const u32 to = place.column(lane);
  if (to >= m.cols) return;
  const float scale = scale_of(matrix, m, to);
  for (u32 row = 0; row < rows; ++row) {
    const float value = rounded_product(load_shared(tile + row * (STEP + 1) + lane), scale);
    store_as(w, type, static_cast<u64>(place.row(row)) * m.cols + to, value);
  }
}

#if AQ_AXIS == 0

struct RowPlace {
  const u32* rows;
  u32 first_column;
  AQ_DEVICE u32 row(u32 i) const { return load(rows + i); }
  AQ_DEVICE u32 column(u32 i) const { return first_column + i; }
};

template <int BITS>
struct RowWork {
  AQ_DEVICE static void run(const u8* matrix, const Matrix& m, const Task& task, u32* table, float* tile, void* w,
                            int type) {
    const u32 lane = thread_index() % LANES, warps = threads_of_block() / LANES;
    Table<BITS>::build(at<u16>(matrix, task.tables), table);
    sync_block();
    for (u32 group = thread_index() / LANES; group * GROUP < m.cols; group += warps) {
      Words<BITS> words;
      words.read(at<uint4>(matrix, task.codes) + static_cast<u64>(group) * BITS * LANES, lane);
#pragma unroll
      for (u32 c = 0; c < GROUP; c += STEP) {
        const RowPlace place = {at<u32>(matrix, m.order) + task.first, group * GROUP + c};
        write_step<BITS>(matrix, m, words, table, c, 0, task.count, tile, w, type, place);
      }
    }
  }
};

}  // namespace

// w [rows][cols], without outliers. A block for each task, of up to 4 warps; shared memory: table_words() words, and 1056
// for each warp.
AQ_KERNEL(128) expand_rows(const u8* matrix, void* w, int type) {
  AQ_SHARED(memory);
  const Matrix& m = *reinterpret_cast<const Matrix*>(matrix);
  const Task task = at<Task>(matrix, m.task)[block_x()];
  u32* table = reinterpret_cast<u32*>(memory);
  float* tile = reinterpret_cast<float*>(table + table_words()) + thread_index() / LANES * STEP * (STEP + 1);
  for_width<RowWork>(task.bits, matrix, m, task, table, tile, w, type);
}

#else

struct ColumnPlace {
  u32 first_row;
  const u32* columns;
  AQ_DEVICE u32 row(u32 i) const { return first_row + i; }
  AQ_DEVICE u32 column(u32 i) const { return load(columns + i); }
};

template <int BITS>
struct ColumnWork {
  AQ_DEVICE static void run(const u8* matrix, const Matrix& m, const Task& task, u32* table, float* tile, void* w,
                            int type) {
    constexpr u32 COLUMNS = Table<BITS>::COLUMNS;
    const u32 lane = thread_index() % LANES, number = block_x() * (threads_of_block() / LANES) + thread_index() / LANES;
    const u32 first_row = number * TILE, rows = m.rows < first_row ? 0 : m.rows - first_row;
    const uint4* codes = at<uint4>(matrix, task.codes) + static_cast<u64>(number) * task.stride * BITS * LANES;
    for (u32 group = 0; group < task.count; ++group) {
      Words<BITS> words;
      if (rows) words.read(codes + static_cast<u64>(group) * BITS * LANES, lane);
#pragma unroll
      for (u32 c = 0; c < GROUP; c += COLUMNS) {
        const u32 first = group * GROUP + c;
        sync_block();  // what is there may still be in use
        Table<BITS>::build(at<u16>(matrix, task.tables) + (static_cast<u64>(first) << BITS), table);
        sync_block();
        if (!rows) continue;
#pragma unroll
        for (u32 q = 0; q < COLUMNS; q += STEP) {
          const ColumnPlace place = {first_row, at<u32>(matrix, m.order) + task.first + first + q};
          write_step<BITS>(matrix, m, words, table, c + q, q, rows < TILE ? rows : TILE, tile, w, type, place);
        }
      }
    }
  }
};

}  // namespace

// The same where columns have codebooks: block x is of as many tiles as it has warps, block y of a task; table_words().
AQ_KERNEL(128) expand_columns(const u8* matrix, void* w, int type) {
  AQ_SHARED(memory);
  const Matrix& m = *reinterpret_cast<const Matrix*>(matrix);
  const Task task = at<Task>(matrix, m.task)[block_y()];
  u32* table = reinterpret_cast<u32*>(memory);
  float* tile = reinterpret_cast<float*>(table + table_words()) + thread_index() / LANES * STEP * (STEP + 1);
  for_width<ColumnWork>(task.bits, matrix, m, task, table, tile, w, type);
}

#endif

// Puts outliers in their places, after that: a warp for each row.
AQ_KERNEL(256) expand_outliers(const u8* matrix, void* w, int type) {
  const Matrix& m = *reinterpret_cast<const Matrix*>(matrix);
  const u32 row = block_x() * (threads_of_block() / LANES) + thread_index() / LANES;
  if (row >= m.rows) return;
  const u32* indptr = at<u32>(matrix, m.indptr) + row;
  const u32 end = load(indptr + 1);
  for (u32 i = load(indptr) + thread_index() % LANES; i < end; i += LANES) {
    store_as(w, type, static_cast<u64>(row) * m.cols + outlier_column(matrix, m, i),
             half_to_float(load(at<u16>(matrix, m.value) + i)));
  }
}
