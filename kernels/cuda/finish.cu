// Sums of what the tasks of columns add, and what outliers add to it.

#include "packed.cuh"

// y [batch][rows], of the type of x; partial FP32 [task][batch][rows], times factor [batch] unless that is null, with bias
// FP32 [rows] unless that is null. A thread for each row, block y of a row of activations.
AQ_KERNEL(256)
finish_columns(const u8* matrix, const float* partial, const float* factor, const void* x_data, int type, u32 batch,
               const float* bias, void* y) {
  const Matrix& m = *reinterpret_cast<const Matrix*>(matrix);
  const Activations x = {x_data, type, batch, m.cols};
  const u32 row = block_x() * threads_of_block() + thread_index(), b = block_y();
  if (row >= m.rows) return;
  float total = 0;
  for (u32 task = 0; task < m.tasks; ++task) {
    total += load(partial + (static_cast<u64>(task) * batch + b) * m.rows + row);
  }
  if (factor) total *= load(factor + b);
  if (m.indptr) {
    const u32* indptr = at<u32>(matrix, m.indptr) + row;
    const u32 end = load(indptr + 1);
#pragma unroll 4
    for (u32 i = load(indptr); i < end; ++i) {
      total += load(at<float>(matrix, m.delta) + i) * x.at(b, outlier_column(matrix, m, i));
    }
  }
  if (bias) total += load(bias + row);
  store_as(y, type, static_cast<u64>(b) * m.rows + row, total);
}
