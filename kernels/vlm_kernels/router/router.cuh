// The choice of experts, the weights of the chosen ones, and sums over tokens; a warp for each token.
//
// A lane holds the logits of every 32nd expert, N of them. `chosen` has a byte for each token and expert. Sums leave
// one row of partial sums for each warp, which `sum_partials` adds up: nobody adds to memory that others write.
#pragma once

#include "csrc/device.cuh"

namespace kernels {

constexpr int MAX_ROUTED_EXPERTS = 1024;
constexpr int ROUTER_WARPS = 4;

// The order of floats as that of integers; what is no number is the largest (or, with its sign bit, the smallest).
__device__ __forceinline__ uint32_t ordered(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ uint64_t largest_in_warp(uint64_t value) {
#pragma unroll
  for (int distance = WARP / 2; distance > 0; distance /= 2) {
    const uint64_t other = __shfl_xor_sync(ALL_LANES, value, distance);
    value = other > value ? other : value;
  }
  return value;
}

__device__ __forceinline__ int64_t warp_in_grid() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
}

// Logits of one token; minus infinity past the last expert.
template <int N>
__device__ __forceinline__ void load_logits(const float* logits, int num_experts, float (&values)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int expert = threadIdx.x + i * WARP;
    values[i] = expert < num_experts ? logits[expert] : -INFINITY;
  }
}

// Of equal logits the first expert's, so that exactly `top_k` are chosen, whatever the values.
template <int N>
__global__ void __launch_bounds__(WARP* ROUTER_WARPS)
    choose_top(const float* logits, uint8_t* chosen, int64_t num_tokens, int num_experts, int top_k) {
  const int64_t token = warp_in_grid();
  if (token >= num_tokens) return;
  const int lane = threadIdx.x;
  float values[N];
  load_logits(logits + token * num_experts, num_experts, values);
  uint32_t taken = 0;
  for (int choice = 0; choice < top_k; ++choice) {
    uint64_t best = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const uint32_t expert = lane + i * WARP;
      if (expert >= num_experts || taken >> i & 1) continue;
      const uint64_t rank = static_cast<uint64_t>(ordered(values[i])) << 32 | (0xffffffffu - expert);
      best = rank > best ? rank : best;
    }
    const uint32_t expert = 0xffffffffu - static_cast<uint32_t>(largest_in_warp(best));
    if (expert % WARP == lane) taken |= 1u << expert / WARP;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int expert = lane + i * WARP;
    if (expert < num_experts) chosen[token * num_experts + expert] = taken >> i & 1;
  }
}

// Replace the logits of the experts that `among` has bits of by exponentials relative to the largest, others by zero;
// returns the inverse of their sum.
template <int N>
__device__ __forceinline__ float softmax_terms(uint32_t among, float (&values)[N]) {
  float largest = -INFINITY, sum = 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) largest = fmaxf(largest, among >> i & 1 ? values[i] : -INFINITY);
  largest = warp_reduce<Max>(largest);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    values[i] = among >> i & 1 ? expf(values[i] - largest) : 0.0f;
    sum += values[i];
  }
  return 1.0f / warp_reduce<Sum>(sum);
}

// Bits of a lane's experts: of all that exist, and of those that the token chose.
template <int N>
__device__ __forceinline__ void load_bits(const uint8_t* chosen, int num_experts, uint32_t& exists, uint32_t& is_chosen) {
  exists = is_chosen = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int expert = threadIdx.x + i * WARP;
    if (expert >= num_experts) continue;
    exists |= 1u << i;
    is_chosen |= static_cast<uint32_t>(chosen[expert] != 0) << i;
  }
}

// Weights of all tokens; partial sums [2, warps, experts] of choices, then of probabilities, over real tokens.
template <int N>
__global__ void __launch_bounds__(WARP* ROUTER_WARPS)
    route_tokens(const float* logits, const uint8_t* chosen, const uint8_t* is_real, float* weights, float* partials,
                 int64_t num_tokens, int num_experts) {
  const int64_t warp = warp_in_grid(), num_warps = static_cast<int64_t>(gridDim.x) * blockDim.y;
  float choices[N] = {}, probabilities[N] = {};
  for (int64_t token = warp; token < num_tokens; token += num_warps) {
    const int64_t first = token * num_experts;
    float values[N];
    uint32_t exists, is_chosen;
    load_logits(logits + first, num_experts, values);
    load_bits<N>(chosen + first, num_experts, exists, is_chosen);
    const float of_chosen = softmax_terms(is_chosen, values);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (exists >> i & 1) weights[first + threadIdx.x + i * WARP] = values[i] * of_chosen;
    }
    if (!is_real[token]) continue;
    load_logits(logits + first, num_experts, values);  // again: 1024 experts would not fit in registers twice
    const float of_all = softmax_terms(exists, values);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      choices[i] += static_cast<float>(is_chosen >> i & 1);
      probabilities[i] += values[i] * of_all;
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int expert = threadIdx.x + i * WARP;
    if (expert >= num_experts) continue;
    partials[warp * num_experts + expert] = choices[i];
    partials[(num_warps + warp) * num_experts + expert] = probabilities[i];
  }
}

// Adds to `gradient` what reaches the logits through a softmax of the terms over their sum.
template <int N>
__device__ __forceinline__ void add_through_softmax(const float (&terms)[N], float inverse, const float (&upstream)[N],
                                                    float (&gradient)[N]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) sum += terms[i] * inverse * upstream[i];
  sum = warp_reduce<Sum>(sum);
#pragma unroll
  for (int i = 0; i < N; ++i) gradient[i] += terms[i] * inverse * (upstream[i] - sum);
}

// Gradient of the logits from those of weights [tokens, experts] and of the probabilities' sums [experts], where given.
template <int N>
__global__ void __launch_bounds__(WARP* ROUTER_WARPS)
    route_gradient(const float* grad_weights, const float* grad_probabilities, const float* logits,
                   const uint8_t* chosen, const uint8_t* is_real, float* gradient, int64_t num_tokens,
                   int num_experts) {
  const int64_t token = warp_in_grid(), first = token * num_experts;
  if (token >= num_tokens) return;
  float values[N], upstream[N], sums[N] = {};
  uint32_t exists, is_chosen;
  load_bits<N>(chosen + first, num_experts, exists, is_chosen);
  if (grad_weights) {
    load_logits(logits + first, num_experts, values);
    const float inverse = softmax_terms(is_chosen, values);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      // What is given for an expert that was not chosen has no effect, whatever it is.
      upstream[i] = is_chosen >> i & 1 ? grad_weights[first + threadIdx.x + i * WARP] : 0.0f;
    }
    add_through_softmax(values, inverse, upstream, sums);
  }
  if (grad_probabilities && is_real[token]) {
    load_logits(logits + first, num_experts, values);
    const float inverse = softmax_terms(exists, values);
#pragma unroll
    for (int i = 0; i < N; ++i) upstream[i] = exists >> i & 1 ? grad_probabilities[threadIdx.x + i * WARP] : 0.0f;
    add_through_softmax(values, inverse, upstream, sums);
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (exists >> i & 1) gradient[first + threadIdx.x + i * WARP] = sums[i];
  }
}

}  // namespace kernels
