// Norm and rotation of queries and keys, forward and backward: what each thread of a warp does with heads of a token.
//
// A group of neighbouring lanes holds one head at a time. A lane holds the elements of some pairs that turn together,
// so that the rotation needs no exchange between lanes and only the norm's sums do.
#pragma once

#include <type_traits>

#include "csrc/device.cuh"

namespace kernels::rope {

constexpr int WARPS = 4;
constexpr int MAX_HEAD_DIM = 512;
// Heads of a token that a group of lanes takes one after another.
constexpr int ROUNDS = 4;

// Vectors of N first and N second elements that a lane holds: heads of 72, in steps of four, leave few lanes idle.
template <class T, int N>
constexpr int chunks_of() {
  if (N == 1) return MAX_HEAD_DIM / 2 / WARP;
  if (N == VECTOR<T>) return sizeof(T) == 4 ? 2 : 1;
  return 3;
}

// Blocks per multiprocessor that registers must allow: enough reads under way.
template <class T, int N>
constexpr int resident_blocks(int blocks) {
  if (sizeof(T) == 4 || N == 1) return 1;
  return N == VECTOR<T> ? blocks : blocks - 2;
}

// Heads of all tokens of one tensor, which may lie anywhere but for the elements of a head.
template <class T>
struct Layout {
  T* data;
  int64_t outer_stride, inner_stride, head_stride;

  __device__ __forceinline__ T* token(int index, int inner_tokens) const {
    return data + index / inner_tokens * outer_stride + index % inner_tokens * inner_stride;
  }
};

// What queries and keys have in common.
template <class Table>
struct Rotation {
  const Table* cosine;  // [tokens, rotated_pairs]
  const Table* sine;
  int tokens, inner_tokens;  // a token is an outer and an inner index
  int half_dim;
  float inverse_dim;
  int rotated_pairs, section_pairs;
  int lanes;  // of a head: a power of two
  float eps;
  bool has_norm;
  float weight_offset;  // one where norms multiply by one plus their weight
};

// Queries or keys of a forward pass.
template <class T, class Table>
struct Forward {
  Layout<const T> x;
  T* y;           // [tokens, heads, D]
  float* rstd;    // [tokens, heads]
  const T* weight;
  const Table* scale;  // [tokens]
  int heads, slices, blocks;  // a warp takes a token's heads, or a slice of them
};

// Queries or keys of a backward pass.
template <class T, class Table>
struct Backward {
  Layout<const T> x, grad;
  T* x_grad;  // [tokens, heads, D]
  const float* rstd;
  const T* weight;
  float* partial;  // [blocks, D], sums of the weight's gradient; null if it is not wanted
  const Table* scale;
  int heads, slices, blocks;
};

// Pairs of one lane: CHUNKS times N neighbouring ones.
template <int N, int CHUNKS>
struct Places {
  int num_pairs, rotated_pairs;
  int pair[CHUNKS];  // the first of each chunk, perhaps past the end
  int first[CHUNKS], second[CHUNKS];

  template <class Table>
  __device__ __forceinline__ Places(const Rotation<Table>& rotation, int lane)
      : num_pairs(rotation.half_dim), rotated_pairs(rotation.rotated_pairs) {
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      pair[chunk] = (chunk * rotation.lanes + lane) * N;
      // Behind the sections before it; what does not turn is paired in any way.
      const int before = turns(chunk) ? pair[chunk] / rotation.section_pairs * rotation.section_pairs : rotated_pairs;
      first[chunk] = pair[chunk] + before;
      second[chunk] = first[chunk] + (turns(chunk) ? rotation.section_pairs : num_pairs - rotated_pairs);
    }
  }

  __device__ __forceinline__ bool exists(int chunk) const { return pair[chunk] < num_pairs; }
  __device__ __forceinline__ bool turns(int chunk) const { return pair[chunk] < rotated_pairs; }
};

template <class T, int N, int CHUNKS>
struct Head {
  Vector<T, N> first[CHUNKS], second[CHUNKS];

  // Zeros where there is nothing to read.
  __device__ __forceinline__ void read(const T* from, const Places<N, CHUNKS>& places, bool is_active) {
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      first[chunk] = second[chunk] = Vector<T, N>{};
      if (!is_active || !places.exists(chunk)) continue;
      first[chunk] = load<N>(from + places.first[chunk]);
      second[chunk] = load<N>(from + places.second[chunk]);
    }
  }

  __device__ __forceinline__ void write(T* to, const Places<N, CHUNKS>& places) const {
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      if (!places.exists(chunk)) continue;
      store(to + places.first[chunk], first[chunk]);
      store(to + places.second[chunk], second[chunk]);
    }
  }
};

template <class Table, int N, int CHUNKS>
struct Angles {
  Vector<Table, N> cosine[CHUNKS], sine[CHUNKS];

  __device__ __forceinline__ Angles(const Rotation<Table>& rotation, const Places<N, CHUNKS>& places, int token) {
    const int64_t row = static_cast<int64_t>(token) * rotation.rotated_pairs;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      if (!places.turns(chunk)) continue;
      cosine[chunk] = load<N>(rotation.cosine + row + places.pair[chunk]);
      sine[chunk] = load<N>(rotation.sine + row + places.pair[chunk]);
    }
  }
};

struct Product {
  __device__ __forceinline__ static float of(float a, float b) { return a * b; }
#ifdef __CUDACC__
  template <class Pair>
  __device__ __forceinline__ static Pair of(Pair a, Pair b) { return __hmul2_rn(a, b); }
#endif
};

struct Difference {
  __device__ __forceinline__ static float of(float a, float b) { return a - b; }
#ifdef __CUDACC__
  template <class Pair>
  __device__ __forceinline__ static Pair of(Pair a, Pair b) { return __hsub2_rn(a, b); }
#endif
};

struct Total {
  __device__ __forceinline__ static float of(float a, float b) { return a + b; }
#ifdef __CUDACC__
  template <class Pair>
  __device__ __forceinline__ static Pair of(Pair a, Pair b) { return __hadd2_rn(a, b); }
#endif
};

// Each element of T, rounded to T. A GPU takes two of 16 bits at a time, with the same bits.
template <class Operation, class T, int N>
__device__ __forceinline__ Vector<T, N> elementwise(const Vector<T, N>& a, const Vector<T, N>& b) {
  Vector<T, N> result;
#ifdef __CUDACC__
  if constexpr (sizeof(T) == 2 && N % 2 == 0) {
    using Pair = std::conditional_t<std::is_same_v<T, float16>, __half2, __nv_bfloat162>;
#pragma unroll
    for (int index = 0; index < N; index += 2) {
      Pair x, y;
      memcpy(&x, a.at + index, sizeof(Pair));
      memcpy(&y, b.at + index, sizeof(Pair));
      const Pair z = Operation::of(x, y);
      memcpy(result.at + index, &z, sizeof(Pair));
    }
  } else
#endif
  {
    float values[N];
#pragma unroll
    for (int index = 0; index < N; ++index) values[index] = Operation::of(a[index], b[index]);
    result.set_all(values);
  }
  return result;
}

// Rotate pairs in the table's type, rounding every product and sum to it, as a chain of operations does.
template <class T, class Table, int N>
__device__ __forceinline__ void turn(
    Vector<T, N>& first, Vector<T, N>& second, const Vector<Table, N>& cosine, const Vector<Table, N>& sine) {
  if constexpr (std::is_same_v<T, Table>) {
    const Vector<T, N> turned =
        elementwise<Difference>(elementwise<Product>(first, cosine), elementwise<Product>(second, sine));
    second = elementwise<Total>(elementwise<Product>(second, cosine), elementwise<Product>(first, sine));
    first = turned;
  } else {
    float a[N], b[N];
#pragma unroll
    for (int index = 0; index < N; ++index) {
      a[index] = first[index] * cosine[index] - second[index] * sine[index];
      b[index] = second[index] * cosine[index] + first[index] * sine[index];
    }
    first.set_all(a);
    second.set_all(b);
  }
}

template <class T, class Table, int N>
__device__ __forceinline__ void multiply(Vector<T, N>& values, Table factor) {
  if constexpr (std::is_same_v<T, Table>) {
    Vector<T, N> factors;
#pragma unroll
    for (int index = 0; index < N; ++index) factors.at[index] = factor;
    values = elementwise<Product>(values, factors);
  } else {
    float products[N];
#pragma unroll
    for (int index = 0; index < N; ++index) products[index] = values[index] * to_float(factor);
    values.set_all(products);
  }
}

// Sum over the lanes of a head; every lane of the warp calls it.
__device__ __forceinline__ float head_sum(float value, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(ALL_LANES, value, distance);
  return value;
}

// Where a warp works: one token and every `step`th head from `head`.
struct Work {
  int warp, lane, group, groups;

  __device__ __forceinline__ Work(int block, int lanes)
      : warp(block * WARPS + threadIdx.x / WARP),
        lane(threadIdx.x % lanes),
        group(threadIdx.x % WARP / lanes),
        groups(WARP / lanes) {}
};

template <int N, int CHUNKS, class T, class Table>
__device__ __forceinline__ void forward_of(
    const Forward<T, Table>& side, const Rotation<Table>& rotation, int block) {
  const Work work(block, rotation.lanes);
  const int token = work.warp / side.slices, slice = work.warp % side.slices;
  if (token >= rotation.tokens) return;
  const Places<N, CHUNKS> places(rotation, work.lane);
  const Angles<Table, N, CHUNKS> angles(rotation, places, token);
  const float offset = side.weight == nullptr ? 1.0f : rotation.weight_offset;
  const Table scale = side.scale == nullptr ? round_to<Table>(1.0f) : side.scale[token];
  const T* const from = side.x.token(token, rotation.inner_tokens);

  const int step = side.slices * work.groups;
  int head = slice * work.groups + work.group;
  Head<T, N, CHUNKS> x, next;
  next.read(from + head * side.x.head_stride, places, head < side.heads);
  // All lanes of a warp go round equally often: they exchange sums.
  for (int base = slice * work.groups; base < side.heads; base += step, head += step) {
    x = next;
    next.read(from + (head + step) * side.x.head_stride, places, head + step < side.heads);
    float rstd = 1.0f;
    if (rotation.has_norm) {
      Head<T, N, CHUNKS> weight;
      // Read every time: registers are short.
      weight.read(side.weight, places, side.weight != nullptr);
      float squares = 0.0f;
#pragma unroll
      for (int chunk = 0; chunk < CHUNKS; ++chunk) {
#pragma unroll
        for (int index = 0; index < N; ++index) {
          squares += x.first[chunk][index] * x.first[chunk][index];
          squares += x.second[chunk][index] * x.second[chunk][index];
        }
      }
      rstd = rsqrtf(head_sum(squares, rotation.lanes) * rotation.inverse_dim + rotation.eps);
#pragma unroll
      for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        float a[N], b[N];
#pragma unroll
        for (int index = 0; index < N; ++index) {
          a[index] = x.first[chunk][index] * rstd * (offset + weight.first[chunk][index]);
          b[index] = x.second[chunk][index] * rstd * (offset + weight.second[chunk][index]);
        }
        x.first[chunk].set_all(a);
        x.second[chunk].set_all(b);
      }
    }
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      if (places.turns(chunk)) turn(x.first[chunk], x.second[chunk], angles.cosine[chunk], angles.sine[chunk]);
      if (side.scale == nullptr) continue;
      multiply(x.first[chunk], scale);
      multiply(x.second[chunk], scale);
    }
    if (head >= side.heads) continue;
    const int64_t row = static_cast<int64_t>(token) * side.heads + head;
    x.write(side.y + row * 2 * rotation.half_dim, places);
    if (rotation.has_norm && work.lane == 0) side.rstd[row] = rstd;
  }
}

// Queries in the first blocks, keys in the others.
template <class Side>
struct Both {
  Side at[2];
};

template <class T, class Table, int N>
__global__ void __launch_bounds__(WARPS* WARP, resident_blocks<T, N>(6)) rope_forward(
    const __grid_constant__ Both<Forward<T, Table>> both, const __grid_constant__ Rotation<Table> rotation) {
  const int block = blockIdx.x, is_key = block >= both.at[0].blocks;
  forward_of<N, chunks_of<T, N>()>(both.at[is_key], rotation, is_key ? block - both.at[0].blocks : block);
}

// Sums over the block of what each lane has gathered for its elements of the weight, to a row of `partial`.
template <int N, int CHUNKS>
__device__ __forceinline__ void write_partial(
    float (&first)[CHUNKS][N], float (&second)[CHUNKS][N], const Places<N, CHUNKS>& places, int lanes, int head_dim,
    float* to) {
  DYNAMIC_SHARED(float, shared);  // [WARPS, D]
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
#pragma unroll
    for (int index = 0; index < N; ++index) {
      for (int distance = lanes; distance < WARP; distance *= 2) {
        first[chunk][index] += __shfl_xor_sync(ALL_LANES, first[chunk][index], distance);
        second[chunk][index] += __shfl_xor_sync(ALL_LANES, second[chunk][index], distance);
      }
      if (static_cast<int>(threadIdx.x % WARP) < lanes && places.exists(chunk)) {
        float* const row = shared + threadIdx.x / WARP * head_dim;
        row[places.first[chunk] + index] = first[chunk][index];
        row[places.second[chunk] + index] = second[chunk][index];
      }
    }
  }
  __syncthreads();
  for (int index = threadIdx.x; index < head_dim; index += WARPS * WARP) {
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) sum += shared[warp * head_dim + index];
    to[index] = sum;
  }
}

template <int N, int CHUNKS, class T, class Table>
__device__ __forceinline__ void backward_of(
    const Backward<T, Table>& side, const Rotation<Table>& rotation, int block) {
  const Work work(block, rotation.lanes);
  const Places<N, CHUNKS> places(rotation, work.lane);
  const float offset = side.weight == nullptr ? 1.0f : rotation.weight_offset;
  float first_sum[CHUNKS][N] = {}, second_sum[CHUNKS][N] = {};

  for (int item = work.warp; item < rotation.tokens * side.slices; item += side.blocks * WARPS) {
    const int token = item / side.slices, slice = item % side.slices;
    const float scale = side.scale == nullptr ? 1.0f : to_float(side.scale[token]);
    const T* const from = side.x.token(token, rotation.inner_tokens);
    const T* const grad_from = side.grad.token(token, rotation.inner_tokens);
    const int step = side.slices * work.groups;
    int head = slice * work.groups + work.group;
    for (int base = slice * work.groups; base < side.heads; base += step, head += step) {
      const bool is_active = head < side.heads;
      const int64_t row = static_cast<int64_t>(token) * side.heads + head;
      Head<T, N, CHUNKS> grad, x, weight;
      grad.read(grad_from + head * side.grad.head_stride, places, is_active);
      float rstd = 1.0f;
      if (rotation.has_norm) {
        x.read(from + head * side.x.head_stride, places, is_active);
        rstd = is_active ? side.rstd[row] : 0.0f;
        // Read every time: registers are short.
        weight.read(side.weight, places, side.weight != nullptr);
      }
      const Angles<Table, N, CHUNKS> angles(rotation, places, token);
      float first[CHUNKS][N], second[CHUNKS][N], products = 0.0f;
#pragma unroll
      for (int chunk = 0; chunk < CHUNKS; ++chunk) {
#pragma unroll
        for (int index = 0; index < N; ++index) {
          float a = grad.first[chunk][index] * scale, b = grad.second[chunk][index] * scale;
          if (places.turns(chunk)) {
            const float cosine = angles.cosine[chunk][index], sine = angles.sine[chunk][index];
            const float turned = a * cosine + b * sine;
            b = b * cosine - a * sine;
            a = turned;
          }
          if (rotation.has_norm) {
            const float first_product = a * x.first[chunk][index], second_product = b * x.second[chunk][index];
            first_sum[chunk][index] += first_product * rstd;
            second_sum[chunk][index] += second_product * rstd;
            const float first_factor = offset + weight.first[chunk][index];
            const float second_factor = offset + weight.second[chunk][index];
            products += first_product * first_factor + second_product * second_factor;
            a *= first_factor;
            b *= second_factor;
          }
          first[chunk][index] = a;
          second[chunk][index] = b;
        }
      }
      if (rotation.has_norm) {
        const float shift = head_sum(products, rotation.lanes) * rotation.inverse_dim * rstd * rstd;
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
#pragma unroll
          for (int index = 0; index < N; ++index) {
            first[chunk][index] = rstd * (first[chunk][index] - x.first[chunk][index] * shift);
            second[chunk][index] = rstd * (second[chunk][index] - x.second[chunk][index] * shift);
          }
        }
      }
      if (!is_active) continue;
#pragma unroll
      for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        grad.first[chunk].set_all(first[chunk]);
        grad.second[chunk].set_all(second[chunk]);
      }
      grad.write(side.x_grad + row * 2 * rotation.half_dim, places);
    }
  }
  if (side.partial == nullptr) return;
  const int head_dim = 2 * rotation.half_dim;
  float* const partial = side.partial + static_cast<int64_t>(block) * head_dim;
  write_partial<N, CHUNKS>(first_sum, second_sum, places, rotation.lanes, head_dim, partial);
}

// As `rope_forward`, but that a warp takes one token after another, for the sums of the weights' gradients.
template <class T, class Table, int N>
__global__ void __launch_bounds__(WARPS* WARP, resident_blocks<T, N>(4)) rope_backward(
    const __grid_constant__ Both<Backward<T, Table>> both, const __grid_constant__ Rotation<Table> rotation) {
  const int block = blockIdx.x, is_key = block >= both.at[0].blocks;
  backward_of<N, chunks_of<T, N>()>(both.at[is_key], rotation, is_key ? block - both.at[0].blocks : block);
}

// What must be multiples of N elements for accesses of N elements.
struct Alignment {
  int64_t strides = 0;
  uintptr_t addresses = 0;

  void add(const void* pointer) { addresses |= reinterpret_cast<uintptr_t>(pointer); }
  template <class T>
  void add(const Layout<T>& layout) {
    strides |= layout.outer_stride | layout.inner_stride | layout.head_stride;
    add(layout.data);
  }

  template <class T, class Table, int N>
  bool allows(const Rotation<Table>& rotation) const {
    const uintptr_t table = reinterpret_cast<uintptr_t>(rotation.cosine) | reinterpret_cast<uintptr_t>(rotation.sine);
    const uintptr_t table_bytes = N * sizeof(Table) < VECTOR_BYTES ? N * sizeof(Table) : VECTOR_BYTES;
    const int64_t sizes = rotation.section_pairs | (rotation.half_dim - rotation.rotated_pairs);
    return (sizes | strides) % N == 0 && addresses % (N * sizeof(T)) == 0 && table % table_bytes == 0 &&
           rotation.half_dim <= N * WARP * chunks_of<T, N>();
  }
};

// Lanes of a head, and warps and blocks for the heads of all tokens; at most `max_blocks` of which each takes some.
template <class T, int N, class Table, class Side>
inline void divide(Rotation<Table>& rotation, Both<Side>& both, int64_t max_blocks) {
  const int vectors = (rotation.half_dim + N - 1) / N;
  rotation.lanes = 1;
  while (rotation.lanes * chunks_of<T, N>() < vectors) rotation.lanes *= 2;
  const int heads_of_a_warp = ROUNDS * (WARP / rotation.lanes);
  for (Side& side : both.at) {
    side.slices = (side.heads + heads_of_a_warp - 1) / heads_of_a_warp;
    const int64_t blocks = (static_cast<int64_t>(rotation.tokens) * side.slices + WARPS - 1) / WARPS;
    const int64_t share = max_blocks * side.heads / (both.at[0].heads + both.at[1].heads);
    // A side may have no heads.
    side.blocks = static_cast<int>(blocks < share || blocks == 0 ? blocks : share > 0 ? share : 1);
  }
}

}  // namespace kernels::rope
