// Gated activations, activation(gate) * up * factor, and their gradients from gate and up.
//
// `flat` kernels take whole contiguous tensors; a thread works on BATCH vectors of N elements, one block apart. `rows`
// kernels take rows of gate and up at any distance (halves of one tensor), and a factor for each row; a warp
// (threadIdx.x, a block has blockDim.y of them) works on a row. All loads of a batch come before its stores, so that
// enough bytes are on their way, and so that results may lie over arguments of the same layout.
#pragma once

#include "csrc/device.cuh"

namespace kernels {

constexpr int SILU = 0, GELU_TANH = 1, GELU = 2;
constexpr int GATED_BATCH = 2;

// 1 / (1 + e^-x). Where results are rounded to 16 bits, by approximations that are off by a few bits of fp32.
template <class T>
__device__ __forceinline__ float logistic(float x) {
  if constexpr (sizeof(T) == 2) return __fdividef(1.0f, 1.0f + __expf(-x));
  return 1.0f / (1.0f + expf(-x));
}

// activation(x) = x * share(x), and the activation's derivative.
template <int ACTIVATION, class T>
struct Gate {
  float share, derivative;

  __device__ __forceinline__ explicit Gate(float x) {
    if constexpr (ACTIVATION == SILU) {
      share = logistic<T>(x);
      derivative = share + x * share * (1.0f - share);
    } else if constexpr (ACTIVATION == GELU_TANH) {
      // (1 + tanh(z)) / 2 is the logistic function of 2 z.
      constexpr float FACTOR = 1.5957691216057308f, CUBIC = 0.044715f;
      share = logistic<T>(FACTOR * (x + CUBIC * x * x * x));
      derivative = share + x * share * (1.0f - share) * FACTOR * (1.0f + 3.0f * CUBIC * x * x);
    } else {
      constexpr float ROOT_HALF = 0.70710678118654752f, DENSITY = 0.39894228040143268f;
      share = 0.5f * erfcf(-ROOT_HALF * x);
      derivative = share + x * DENSITY * expf(-0.5f * x * x);
    }
  }
};

template <int ACTIVATION, class T, int N>
__device__ __forceinline__ Vector<T, N> gated_product(const Vector<T, N>& gate, const Vector<T, N>& up, float factor) {
  Vector<T, N> product;
#pragma unroll
  for (int i = 0; i < N; ++i) product.set(i, gate[i] * Gate<ACTIVATION, T>(gate[i]).share * up[i] * factor);
  return product;
}

// Gradients of one vector; returns what it adds to the factor's.
template <int ACTIVATION, class T, int N>
__device__ __forceinline__ float gated_gradients(const Vector<T, N>& gradient, const Vector<T, N>& gate,
                                                 const Vector<T, N>& up, float factor, Vector<T, N>& grad_gate,
                                                 Vector<T, N>& grad_up) {
  float grad_factor = 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const Gate<ACTIVATION, T> at(gate[i]);
    const float activated = gate[i] * at.share, scaled = gradient[i] * factor;
    grad_gate.set(i, scaled * up[i] * at.derivative);
    grad_up.set(i, scaled * activated);
    grad_factor += gradient[i] * activated * up[i];
  }
  return grad_factor;
}

// Vectors of this thread: the first, and how far apart.
struct Batch {
  int64_t first;
  int distance;
};

__device__ __forceinline__ Batch flat_batch() {
  const int block = blockDim.x;
  return {static_cast<int64_t>(blockIdx.x) * block * GATED_BATCH + threadIdx.x, block};
}

// f(index in batch, vector) for those below `end`.
template <class Function>
__device__ __forceinline__ void each_vector(Batch batch, int64_t end, Function&& f) {
#pragma unroll
  for (int index = 0; index < GATED_BATCH; ++index) {
    const int64_t vector = batch.first + index * batch.distance;
    if (vector < end) f(index, vector);
  }
}

// All tensors hold num_vectors * N elements.
template <class T, int N, int ACTIVATION>
__global__ void __launch_bounds__(256) gated_flat(const T* gate, const T* up, T* product, int64_t num_vectors) {
  const Batch batch = flat_batch();
  Vector<T, N> gates[GATED_BATCH], ups[GATED_BATCH];
  each_vector(batch, num_vectors, [&](int index, int64_t vector) {
    gates[index] = load<N>(gate + vector * N);
    ups[index] = load<N>(up + vector * N);
  });
  each_vector(batch, num_vectors, [&](int index, int64_t vector) {
    store(product + vector * N, gated_product<ACTIVATION>(gates[index], ups[index], 1.0f));
  });
}

template <class T, int N, int ACTIVATION>
__global__ void __launch_bounds__(256) gated_flat_gradient(const T* gradient, const T* gate, const T* up, T* grad_gate,
                                                           T* grad_up, int64_t num_vectors) {
  const Batch batch = flat_batch();
  Vector<T, N> gradients[GATED_BATCH], gates[GATED_BATCH], ups[GATED_BATCH];
  each_vector(batch, num_vectors, [&](int index, int64_t vector) {
    gradients[index] = load<N>(gradient + vector * N);
    gates[index] = load<N>(gate + vector * N);
    ups[index] = load<N>(up + vector * N);
  });
  each_vector(batch, num_vectors, [&](int index, int64_t vector) {
    Vector<T, N> of_gate, of_up;
    gated_gradients<ACTIVATION>(gradients[index], gates[index], ups[index], 1.0f, of_gate, of_up);
    store(grad_gate + vector * N, of_gate);
    store(grad_up + vector * N, of_up);
  });
}

// Rows of `product` follow each other; those of gate and up begin `stride` elements apart. A null factor is one.
template <class T, int N, int ACTIVATION>
__global__ void __launch_bounds__(128) gated_rows(const T* gate, const T* up, const float* factor, T* product,
                                                  int64_t num_rows, int vectors_per_row, int64_t stride) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= num_rows) return;
  gate += row * stride, up += row * stride, product += row * vectors_per_row * N;
  const float by = factor ? factor[row] : 1.0f;
  for (int first = threadIdx.x; first < vectors_per_row; first += GATED_BATCH * WARP) {
    const Batch batch{first, WARP};
    Vector<T, N> gates[GATED_BATCH], ups[GATED_BATCH];
    each_vector(batch, vectors_per_row, [&](int index, int64_t vector) {
      gates[index] = load<N>(gate + vector * N);
      ups[index] = load<N>(up + vector * N);
    });
    each_vector(batch, vectors_per_row, [&](int index, int64_t vector) {
      store(product + vector * N, gated_product<ACTIVATION>(gates[index], ups[index], by));
    });
  }
}

// Gradients lie as gate and up do; that of the factor is summed over a row in an order that never changes.
template <class T, int N, int ACTIVATION>
__global__ void __launch_bounds__(128)
    gated_rows_gradient(const T* gradient, const T* gate, const T* up, const float* factor, T* grad_gate, T* grad_up,
                        float* grad_factor, int64_t num_rows, int vectors_per_row, int64_t stride) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= num_rows) return;
  gradient += row * vectors_per_row * N;
  gate += row * stride, up += row * stride, grad_gate += row * stride, grad_up += row * stride;
  const float by = factor ? factor[row] : 1.0f;
  float sum = 0.0f;
  for (int first = threadIdx.x; first < vectors_per_row; first += GATED_BATCH * WARP) {
    const Batch batch{first, WARP};
    Vector<T, N> gradients[GATED_BATCH], gates[GATED_BATCH], ups[GATED_BATCH];
    each_vector(batch, vectors_per_row, [&](int index, int64_t vector) {
      gradients[index] = load<N>(gradient + vector * N);
      gates[index] = load<N>(gate + vector * N);
      ups[index] = load<N>(up + vector * N);
    });
    each_vector(batch, vectors_per_row, [&](int index, int64_t vector) {
      Vector<T, N> of_gate, of_up;
      sum += gated_gradients<ACTIVATION>(gradients[index], gates[index], ups[index], by, of_gate, of_up);
      store(grad_gate + vector * N, of_gate);
      store(grad_up + vector * N, of_up);
    });
  }
  if (!grad_factor) return;
  sum = warp_reduce<Sum>(sum);
  if (threadIdx.x == 0) grad_factor[row] = sum;
}

}  // namespace kernels
