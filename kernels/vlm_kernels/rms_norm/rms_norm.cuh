// Root-mean-square norms of rows, with the residual additions around them in the same pass over memory.
//
// threadIdx.x runs along a row (blockDim.x is a multiple of 32), threadIdx.y over rows of a block. A thread works on
// vectors threadIdx.x, threadIdx.x + blockDim.x, ... of N elements: on CHUNKS of them, held in registers between passes
// over the row; or with CHUNKS = 0 on as many as there are, read again in every pass.
//
// A null weight stands for ones; `offset` (0 or 1) is added to a weight. What is stored is rounded once, and later
// passes work on what was stored, so that results are those of separate operations.
#pragma once

#include "csrc/device.cuh"

namespace kernels {

// CHUNKS vectors of each tensor and fp32 sums for weights fit in the registers of so many threads.
constexpr int max_threads(int chunks) { return chunks == 1 ? 128 : chunks == 4 ? 320 : 512; }

// At least so many such blocks fit on a multiprocessor in a backward pass: one reads its rows while another reduces.
constexpr int min_blocks(int chunks) { return chunks == 1 ? 4 : 2; }

// On sm_100 the compiler cannot do with the 64 registers of two blocks of 512 threads for a gradient of two norms. With
// these, two blocks of rows of 5376 bf16 elements fit, and one of 8192.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define BOUNDS_OF_TWO_NORMS __maxnreg__(CHUNKS == 1 ? 128 : 80)
#else
#define BOUNDS_OF_TWO_NORMS __launch_bounds__(max_threads(CHUNKS), min_blocks(CHUNKS))
#endif

template <int N, int CHUNKS>
struct Columns {
  int size;

  // f(chunk, column) for every vector of this thread.
  template <class Function>
  __device__ __forceinline__ void each(Function&& f) const {
    if constexpr (CHUNKS > 0) {
#pragma unroll
      for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        const int column = (chunk * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * N;
        if (column < size) f(chunk, column);
      }
    } else {
      for (int column = threadIdx.x * N; column < size; column += blockDim.x * N) f(0, column);
    }
  }
};

// A row of a tensor, the part of this thread of it.
template <class T, int N, int CHUNKS>
struct Row {
  Vector<T, N> held[CHUNKS > 0 ? CHUNKS : 1];
  const T* memory;

  // A null pointer is not read.
  __device__ __forceinline__ Row(const T* from, Columns<N, CHUNKS> columns) : memory(from) {
    if constexpr (CHUNKS > 0) {
      if (from) columns.each([&](int chunk, int column) { held[chunk] = load<N>(from + column); });
    }
  }

  __device__ __forceinline__ Vector<T, N> at(int chunk, int column) const {
    if constexpr (CHUNKS > 0) return held[chunk];
    return load<N>(memory + column);
  }

  // Store in the row `to`; after the pass, `now_in` tells where `at` finds what was stored.
  __device__ __forceinline__ void write(T* to, int chunk, int column, const Vector<T, N>& values) {
    store(to + column, values);
    if constexpr (CHUNKS > 0) held[chunk] = values;
  }

  __device__ __forceinline__ void now_in(const T* from) { memory = from; }

  __device__ __forceinline__ void keep_packed() {
    if constexpr (CHUNKS > 0) {
#pragma unroll
      for (int chunk = 0; chunk < CHUNKS; ++chunk) kernels::keep_packed(held[chunk]);
    }
  }
};

// Ask for this thread's part of a row that it reads in the next turn, so that memory is not idle during reductions.
template <class T, int N, int CHUNKS>
__device__ __forceinline__ void prefetch_row(const T* from, Columns<N, CHUNKS> columns) {
  if constexpr (N > 1) {
    columns.each([&](int, int column) {
      if (column * static_cast<int>(sizeof(T)) % PREFETCH_BYTES == 0) prefetch(from + column);
    });
  }
}

// What normalised values are multiplied by.
template <class T, int N, int CHUNKS>
struct Weight {
  Row<T, N, CHUNKS> row;
  float offset;

  __device__ __forceinline__ Weight(const T* weight, float offset, Columns<N, CHUNKS> columns)
      : row(weight, columns), offset(offset) {}

  __device__ __forceinline__ void at(int chunk, int column, float (&values)[N]) const {
    if (!row.memory) {
#pragma unroll
      for (int i = 0; i < N; ++i) values[i] = 1.0f;
      return;
    }
    const Vector<T, N> stored = row.at(chunk, column);
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = stored[i] + offset;
  }
};

// Floats of shared memory in which the threads of a block hold their sums for one weight's gradient.
template <int N, int CHUNKS>
__host__ __device__ constexpr int weight_gradient_floats(int threads) {
  return threads * CHUNKS * N;
}

// Sums of a weight's gradient over the rows of a thread: in shared memory, as registers would not do for a second block
// of wide rows on a multiprocessor; with CHUNKS = 0 in row `group` of `partials`.
template <int N, int CHUNKS>
struct WeightGradient {
  static constexpr int PIECE = N < VECTOR<float> ? N : VECTOR<float>;
  float* shared;
  float* partials;
  int group, size;

  // Where `partials` is null, nothing is added up and `shared` is not used.
  __device__ __forceinline__ WeightGradient(float* shared, float* partials, int group, int size)
      : shared(shared), partials(partials), group(group), size(size) {
    const Columns<N, CHUNKS> columns{size};
    if (!partials) return;
    columns.each([&](int chunk, int column) {
#pragma unroll
      for (int i = 0; i < N; i += PIECE) store(sums(chunk, column, i), Vector<float, PIECE>{});
    });
  }

  __device__ __forceinline__ void add(int chunk, int column, const float (&values)[N]) {
    if (!partials) return;
#pragma unroll
    for (int i = 0; i < N; i += PIECE) {
      Vector<float, PIECE> piece = load<PIECE>(sums(chunk, column, i));
#pragma unroll
      for (int j = 0; j < PIECE; ++j) piece.at[j] += values[i + j];
      store(sums(chunk, column, i), piece);
    }
  }

  __device__ __forceinline__ void write() {
    if (CHUNKS == 0 || !partials) return;
    Columns<N, CHUNKS>{size}.each([&](int chunk, int column) {
#pragma unroll
      for (int i = 0; i < N; i += PIECE) store(row() + column + i, load<PIECE>(sums(chunk, column, i)));
    });
  }

  // Pieces of neighbouring threads are neighbours in shared memory: no two banks in conflict.
  __device__ __forceinline__ float* sums(int chunk, int column, int i) const {
    if constexpr (CHUNKS == 0) return row() + column + i;
    const int threads = blockDim.x * blockDim.y, thread = threadIdx.y * blockDim.x + threadIdx.x;
    return shared + ((chunk * N + i) * threads + thread * PIECE);
  }

  __device__ __forceinline__ float* row() const { return partials + static_cast<int64_t>(group) * size; }
};

template <class T, int N, int CHUNKS>
__device__ __forceinline__ void store_normed(T* to, int chunk, int column, const Row<T, N, CHUNKS>& values,
                                             const Weight<T, N, CHUNKS>& weights, float scale) {
  const Vector<T, N> value = values.at(chunk, column);
  float factors[N];
  weights.at(chunk, column, factors);
  Vector<T, N> result;
#pragma unroll
  for (int i = 0; i < N; ++i) result.set(i, value[i] * scale * factors[i]);
  store(to + column, result);
}

// The two sums over a row that the gradient of its norm needs: of squares, and of values times incoming gradients.
template <class T, int N, int CHUNKS>
__device__ __forceinline__ void add_products(int chunk, int column, const Row<T, N, CHUNKS>& values,
                                             const Row<T, N, CHUNKS>& gradients, const Weight<T, N, 0>& weights,
                                             float (&sums)[2]) {
  const Vector<T, N> value = values.at(chunk, column), gradient = gradients.at(chunk, column);
  float factors[N];
  weights.at(chunk, column, factors);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    sums[0] += value[i] * value[i];
    sums[1] += gradient[i] * factors[i] * value[i];
  }
}

__device__ __forceinline__ float inverse_rms(float sum_of_squares, int size, float eps) {
  return rsqrtf(sum_of_squares / size + eps);
}

struct NormGradient {
  float scale, projection;

  __device__ __forceinline__ NormGradient(const float (&sums)[2], int size, float eps)
      : scale(inverse_rms(sums[0], size, eps)), projection(sums[1] * scale * scale / size) {}

  // Gradient of the norm's input, from it and the gradient times the weight.
  __device__ __forceinline__ float input(float value, float gradient) const {
    return scale * (gradient - value * projection);
  }
};

// normed = norm(x), or sum = residual + x and normed = norm(sum) where there is a residual.
template <class T, int N, int CHUNKS>
__global__ void __launch_bounds__(max_threads(CHUNKS), 1)
    rms_norm_forward(const T* x, const T* residual, const T* weight, T* sum, T* normed, int64_t num_rows, int size,
                     float eps, float offset) {
  __shared__ float scratch[REDUCTION_SCRATCH<1>];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t start = row * size;
  // Threads past the last row only take part in the barrier.
  const Columns<N, CHUNKS> columns{row < num_rows ? size : 0};
  Row<T, N, CHUNKS> values(x + start, columns);
  const Row<T, N, CHUNKS> addends(residual ? residual + start : nullptr, columns);
  const Weight<T, N, CHUNKS> weights(weight, offset, columns);
  float squares[1] = {0.0f};
  columns.each([&](int chunk, int column) {
    Vector<T, N> value = values.at(chunk, column);
    if (residual) {
      const Vector<T, N> addend = addends.at(chunk, column);
#pragma unroll
      for (int i = 0; i < N; ++i) value.set(i, addend[i] + value[i]);
      values.write(sum + start, chunk, column, value);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) squares[0] += value[i] * value[i];
  });
  if (residual) values.now_in(sum + start);
  row_reduce<Sum>(squares, scratch);
  values.keep_packed();
  const float scale = inverse_rms(squares[0], size, eps);
  columns.each([&](int chunk, int column) {
    store_normed(normed + start, chunk, column, values, weights, scale);
  });
}

// sum = residual + norm(x) with post_weight, and where `normed` is not null, normed = norm(sum) with weight.
template <class T, int N, int CHUNKS>
__global__ void __launch_bounds__(max_threads(CHUNKS), 1)
    rms_norm_add_forward(const T* x, const T* residual, const T* post_weight, const T* weight, T* sum, T* normed,
                         int64_t num_rows, int size, float eps, float offset) {
  __shared__ float scratch[2 * REDUCTION_SCRATCH<1>];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t start = row * size;
  const Columns<N, CHUNKS> columns{row < num_rows ? size : 0};
  Row<T, N, CHUNKS> inputs(x + start, columns);
  Row<T, N, CHUNKS> sums(residual + start, columns);
  const Weight<T, N, CHUNKS> post_weights(post_weight, offset, columns);
  float squares[1] = {0.0f};
  columns.each([&](int chunk, int column) {
    const Vector<T, N> value = inputs.at(chunk, column);
#pragma unroll
    for (int i = 0; i < N; ++i) squares[0] += value[i] * value[i];
  });
  row_reduce<Sum>(squares, scratch);
  inputs.keep_packed();
  const float post_scale = inverse_rms(squares[0], size, eps);
  squares[0] = 0.0f;
  columns.each([&](int chunk, int column) {
    const Vector<T, N> value = inputs.at(chunk, column), addend = sums.at(chunk, column);
    float factors[N];
    post_weights.at(chunk, column, factors);
    Vector<T, N> total;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      total.set(i, addend[i] + rounded<T>(value[i] * post_scale * factors[i]));
      squares[0] += total[i] * total[i];
    }
    sums.write(sum + start, chunk, column, total);
  });
  if (!normed) return;
  sums.now_in(sum + start);
  const Weight<T, N, CHUNKS> weights(weight, offset, columns);
  row_reduce<Sum>(squares, scratch + REDUCTION_SCRATCH<1>);
  sums.keep_packed();
  const float scale = inverse_rms(squares[0], size, eps);
  columns.each([&](int chunk, int column) {
    store_normed(normed + start, chunk, column, sums, weights, scale);
  });
}

// Gradients of normed = norm(x) with respect to x (plus `addend`, which flows to x by another way; may be null) and the
// weight. Row `blockIdx.x * blockDim.y + threadIdx.y` of `partials` (null: not wanted) is this thread row's part of it.
template <class T, int N, int CHUNKS>
__global__ void __launch_bounds__(max_threads(CHUNKS), min_blocks(CHUNKS))
    rms_norm_gradient(const T* grad_normed, const T* x, const T* weight, const T* addend, T* grad_x, float* partials,
                      int64_t num_rows, int size, float eps, float offset) {
  __shared__ float scratch[2][REDUCTION_SCRATCH<2>];
  const int group = blockIdx.x * blockDim.y + threadIdx.y;
  DYNAMIC_SHARED(float, weight_sums);
  WeightGradient<N, CHUNKS> weight_gradient(weight_sums, partials, group, size);
  const int num_groups = gridDim.x * blockDim.y;
  int turn = 0;
  for (int64_t row = group; row - threadIdx.y < num_rows; row += num_groups) {
    const int64_t start = row * size;
    const Columns<N, CHUNKS> columns{row < num_rows ? size : 0};
    Row<T, N, CHUNKS> values(x + start, columns), gradients(grad_normed + start, columns);
    const Row<T, N, CHUNKS> addends(addend ? addend + start : nullptr, columns);
    const Weight<T, N, 0> weights(weight, offset, {});
    const int64_t next = start + static_cast<int64_t>(num_groups) * size;
    const Columns<N, CHUNKS> next_columns{row + num_groups < num_rows ? size : 0};
    prefetch_row(x + next, next_columns);
    prefetch_row(grad_normed + next, next_columns);
    if (addend) prefetch_row(addend + next, next_columns);
    float sums[2] = {0.0f, 0.0f};
    columns.each([&](int chunk, int column) { add_products(chunk, column, values, gradients, weights, sums); });
    row_reduce<Sum>(sums, scratch[turn]);
    values.keep_packed(), gradients.keep_packed();
    turn ^= 1;
    const NormGradient norm(sums, size, eps);
    columns.each([&](int chunk, int column) {
      const Vector<T, N> value = values.at(chunk, column), gradient = gradients.at(chunk, column);
      float factors[N];
      weights.at(chunk, column, factors);
      Vector<T, N> other;
      if (addend) other = addends.at(chunk, column);
      Vector<T, N> result;
      float for_weight[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float flowing = norm.input(value[i], gradient[i] * factors[i]);
        result.set(i, addend ? other[i] + flowing : flowing);
        for_weight[i] = gradient[i] * value[i] * norm.scale;
      }
      store(grad_x + start + column, result);
      weight_gradient.add(chunk, column, for_weight);
    });
  }
  weight_gradient.write();
}

// Gradients of sum = residual + norm(x) with post_weight, normed = norm(sum) with weight. The gradient that reaches
// `sum` is rounded to T where it is stored as the residual's. `partials` is [2, rows of threads, size]: post_weight's,
// then weight's.
template <class T, int N, int CHUNKS>
__global__ void BOUNDS_OF_TWO_NORMS
    rms_norm_add_rms_norm_gradient(const T* grad_sum, const T* grad_normed, const T* x, const T* sum,
                                   const T* post_weight, const T* weight, T* grad_residual, T* grad_x, float* partials,
                                   int64_t num_rows, int size, float eps, float offset) {
  __shared__ float scratch[2][REDUCTION_SCRATCH<2>];
  const int group = blockIdx.x * blockDim.y + threadIdx.y, num_groups = gridDim.x * blockDim.y;
  DYNAMIC_SHARED(float, weight_sums);
  WeightGradient<N, CHUNKS> post_weight_gradient(weight_sums, partials, group, size);
  WeightGradient<N, CHUNKS> weight_gradient(weight_sums + weight_gradient_floats<N, CHUNKS>(blockDim.x * blockDim.y),
                                            partials, num_groups + group, size);
  for (int64_t row = group; row - threadIdx.y < num_rows; row += num_groups) {
    const int64_t start = row * size;
    const Columns<N, CHUNKS> columns{row < num_rows ? size : 0};
    Row<T, N, CHUNKS> totals(sum + start, columns), gradients(grad_normed + start, columns);
    Row<T, N, CHUNKS> flowing(grad_sum + start, columns), inputs(x + start, columns);
    const int64_t next = start + static_cast<int64_t>(num_groups) * size;
    const Columns<N, CHUNKS> next_columns{row + num_groups < num_rows ? size : 0};
    for (const T* tensor : {sum, grad_normed, grad_sum, x}) prefetch_row(tensor + next, next_columns);
    float sums[2] = {0.0f, 0.0f};
    {
      const Weight<T, N, 0> weights(weight, offset, {});
      columns.each([&](int chunk, int column) { add_products(chunk, column, totals, gradients, weights, sums); });
      row_reduce<Sum>(sums, scratch[0]);
      totals.keep_packed(), gradients.keep_packed();
      const NormGradient norm(sums, size, eps);
      columns.each([&](int chunk, int column) {
        const Vector<T, N> total = totals.at(chunk, column), gradient = gradients.at(chunk, column);
        Vector<T, N> result = flowing.at(chunk, column);
        float factors[N], for_weight[N];
        weights.at(chunk, column, factors);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          result.set(i, result[i] + norm.input(total[i], gradient[i] * factors[i]));
          for_weight[i] = gradient[i] * total[i] * norm.scale;
        }
        flowing.write(grad_residual + start, chunk, column, result);
        weight_gradient.add(chunk, column, for_weight);
      });
    }
    flowing.now_in(grad_residual + start);
    const Weight<T, N, 0> post_weights(post_weight, offset, {});
    sums[0] = sums[1] = 0.0f;
    columns.each([&](int chunk, int column) { add_products(chunk, column, inputs, flowing, post_weights, sums); });
    row_reduce<Sum>(sums, scratch[1]);
    inputs.keep_packed(), flowing.keep_packed();
    const NormGradient norm(sums, size, eps);
    columns.each([&](int chunk, int column) {
      const Vector<T, N> value = inputs.at(chunk, column), gradient = flowing.at(chunk, column);
      float factors[N], for_weight[N];
      post_weights.at(chunk, column, factors);
      Vector<T, N> result;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        result.set(i, norm.input(value[i], gradient[i] * factors[i]));
        for_weight[i] = gradient[i] * value[i] * norm.scale;
      }
      store(grad_x + start + column, result);
      post_weight_gradient.add(chunk, column, for_weight);
    });
  }
  post_weight_gradient.write();
  weight_gradient.write();
}

}  // namespace kernels
