// The two passes over a chunk of logits that `reference.py` defines.
#pragma once

#include "csrc/device.cuh"

namespace kernels {

// Vectors that a thread has under way at once.
constexpr int VOCABULARY_UNROLL = 4;

// softcap * tanh(logit / softcap).
template <bool CAPPED>
__device__ __forceinline__ float capped(float logit, float softcap, float inverse_softcap) {
  return CAPPED ? softcap * tanhf(logit * inverse_softcap) : logit;
}

// Largest value so far and the sum of exponentials relative to it.
struct OnlineSoftmax {
  float largest = -INFINITY;
  float total = 0.0f;

  // Subtracted from exponents; finite where all values are -inf, so that those add 0 and NaN still shows.
  __device__ __forceinline__ static float shift(float largest) { return largest == -INFINITY ? 0.0f : largest; }

  __device__ __forceinline__ void rescale(float new_largest) {
    total *= expf(largest - shift(new_largest));
    largest = new_largest;
  }

  template <int N>
  __device__ __forceinline__ void add(const float (&values)[N]) {
    float new_largest = largest;
#pragma unroll
    for (int i = 0; i < N; ++i) new_largest = fmaxf(new_largest, values[i]);
    rescale(new_largest);
    const float subtracted = shift(largest);
#pragma unroll
    for (int i = 0; i < N; ++i) total += expf(values[i] - subtracted);
  }
};

// statistics[token] = {largest logit, sum of exponentials relative to it, label's logit or 0}: one block per token.
//
// Rows of `width` elements can be read N at a time; only the first `columns` elements count. blockDim.x is a multiple
// of 32.
template <class T, int N, bool CAPPED>
__device__ void vocabulary_statistics(const T* __restrict__ logits, const int64_t* __restrict__ labels,
                                      float* __restrict__ statistics, int64_t width, int columns, float softcap) {
  __shared__ float scratch[2 * REDUCTION_SCRATCH<1>];
  const int64_t token = blockIdx.x;
  const T* const row = logits + token * width;
  const float inverse_softcap = CAPPED ? 1.0f / softcap : 0.0f;
  OnlineSoftmax softmax;
  const auto add = [&](const Vector<T, N>& vector) {
    float values[N];
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = capped<CAPPED>(vector[i], softcap, inverse_softcap);
    softmax.add(values);
  };
  const int threads = blockDim.x, num_vectors = columns / N;
  int index = threadIdx.x;
  for (; index + (VOCABULARY_UNROLL - 1) * threads < num_vectors; index += VOCABULARY_UNROLL * threads) {
    Vector<T, N> vectors[VOCABULARY_UNROLL];
#pragma unroll
    for (int k = 0; k < VOCABULARY_UNROLL; ++k) vectors[k] = load<N>(row + (index + k * threads) * N);
#pragma unroll
    for (int k = 0; k < VOCABULARY_UNROLL; ++k) add(vectors[k]);
  }
  for (; index < num_vectors; index += threads) add(load<N>(row + index * N));
  for (int column = num_vectors * N + threadIdx.x; column < columns; column += threads) {
    const float value[1] = {capped<CAPPED>(to_float(row[column]), softcap, inverse_softcap)};
    softmax.add(value);
  }

  float largest[1] = {softmax.largest};
  row_reduce<Max>(largest, scratch);
  softmax.rescale(largest[0]);
  float total[1] = {softmax.total};
  row_reduce<Sum>(total, scratch + REDUCTION_SCRATCH<1>);
  if (threadIdx.x == 0) {
    const int64_t label = labels[token];
    const bool is_mine = label >= 0 && label < columns;
    float* const result = statistics + 3 * token;
    result[0] = largest[0];
    result[1] = total[0];
    result[2] = is_mine ? capped<CAPPED>(to_float(row[label]), softcap, inverse_softcap) : 0.0f;
  }
}

// logits[token, column] = d/dlogit of (factor[2] * logsumexp - factor[3] * label's logit), 0 from `columns` on.
//
// Blocks (token, tile): a tile is blockDim.x * N * VOCABULARY_UNROLL columns, and `width` is a multiple of N. A token's
// factors are {largest, log of the sum of exponentials relative to it, factor on the softmax, factor at the label},
// 16-byte aligned.
template <class T, int N, bool CAPPED>
__device__ void logits_gradient(T* __restrict__ logits, const int64_t* __restrict__ labels,
                                const float* __restrict__ factors, int64_t width, int columns, float softcap) {
  const int64_t token = blockIdx.x;
  T* const row = logits + token * width;
  const Vector<float, 4> factor = load<4>(factors + 4 * token);
  const float largest = factor[0], log_total = factor[1], scale = factor[2], at_label = factor[3];
  const int64_t label = labels[token];
  const float inverse_softcap = CAPPED ? 1.0f / softcap : 0.0f;
  const int threads = blockDim.x, first = (blockIdx.y * VOCABULARY_UNROLL * threads + threadIdx.x) * N;
  Vector<T, N> vectors[VOCABULARY_UNROLL];
#pragma unroll
  for (int k = 0; k < VOCABULARY_UNROLL; ++k) {
    const int start = first + k * threads * N;
    if (start < width) vectors[k] = load<N>(row + start);
  }
#pragma unroll
  for (int k = 0; k < VOCABULARY_UNROLL; ++k) {
    const int start = first + k * threads * N;
    if (start >= width) break;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float value = capped<CAPPED>(vectors[k][i], softcap, inverse_softcap);
      float gradient = scale * expf(value - largest - log_total);
      if (start + i == label) gradient -= at_label;
      if (CAPPED) gradient *= 1.0f - (value * inverse_softcap) * (value * inverse_softcap);
      vectors[k].set(i, start + i < columns ? gradient : 0.0f);
    }
    store(row + start, vectors[k]);
  }
}

}  // namespace kernels
