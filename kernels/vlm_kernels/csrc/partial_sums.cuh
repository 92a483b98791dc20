// Sums of partial gradients: every group of threads of a backward pass leaves one row of fp32, these are added up.
#pragma once

#include "csrc/device.cuh"

namespace kernels {

constexpr int PARTIAL_COLUMNS = WARP, PARTIAL_ROWS = 16;

// sums[column] = sum over `count` rows of partials [count, size], always in the same order. blockIdx.y = 1 adds up the
// `count` rows that follow into `more_sums`; a null
// pointer is not written. Blocks are PARTIAL_COLUMNS x PARTIAL_ROWS threads, one per 32 columns.
template <class T>
__global__ void __launch_bounds__(PARTIAL_COLUMNS* PARTIAL_ROWS)
    sum_partials(const float* partials, T* sums, T* more_sums, int count, int size) {
  __shared__ float shared[PARTIAL_ROWS][PARTIAL_COLUMNS + 1];
  const int column = blockIdx.x * PARTIAL_COLUMNS + threadIdx.x;
  const float* const first = partials + static_cast<int64_t>(blockIdx.y) * count * size + column;
  float sum = 0.0f;
  if (column < size) {
#pragma unroll 4
    for (int row = threadIdx.y; row < count; row += PARTIAL_ROWS) sum += first[static_cast<int64_t>(row) * size];
  }
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= size) return;
  for (int row = 1; row < PARTIAL_ROWS; ++row) sum += shared[row][threadIdx.x];
  T* const to = blockIdx.y == 0 ? sums : more_sums;
  if (to) to[column] = round_to<T>(sum);
}

}  // namespace kernels
