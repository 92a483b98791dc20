// The permutation of tokens by experts: its index, rows from tokens, and sums of rows.
//
// `rows[starts[token] .. starts[token + 1])` are a token's rows in the order of experts; `entry_of_row[row]` is
// token * num_experts + expert. Rows are written by the token they come from, which is read once, and summed by the
// token they go to: nobody adds to memory that others write.
#pragma once

#include "csrc/device.cuh"

namespace kernels {

// Tokens whose choices a block holds as bits: one for each lane.
constexpr int STEP_TOKENS = WARP;
constexpr int MAX_EXPERTS = 1024;
constexpr int MAX_WORDS = MAX_EXPERTS / WARP;
// Rows that a thread reads before it adds them up.
constexpr int SUM_BATCH = 4;

// Choices [tokens, experts], cut into tiles of tokens; counts [tiles, experts] of the choices in each.
struct RoutingMap {
  const uint8_t* is_chosen;
  int* counts;
  int num_tokens, num_experts, tile_tokens, num_tiles;

  __device__ __forceinline__ bool at(int token, int expert) const {
    return is_chosen[static_cast<int64_t>(token) * num_experts + expert];
  }
  __device__ __forceinline__ int first_token() const { return blockIdx.x * tile_tokens; }
  __device__ __forceinline__ int end_token() const { return min(first_token() + tile_tokens, num_tokens); }
};

struct Index {
  int* entry_of_row;
  int* rows;
  int* starts;
  int* ends;  // of each expert's rows
};

// A block for each tile.
__global__ void __launch_bounds__(1024) expert_counts(RoutingMap map) {
  for (int expert = threadIdx.x; expert < map.num_experts; expert += blockDim.x) {
    int count = 0;
#pragma unroll 8
    for (int token = map.first_token(); token < map.end_token(); ++token) count += map.at(token, expert);
    map.counts[blockIdx.x * map.num_experts + expert] = count;
  }
}

// Sum of `value` over the lanes before this one, and over all in `total`.
__device__ __forceinline__ int sum_before_in_warp(int value, int& total) {
  const int lane = threadIdx.x % WARP;
  int sum = value;
#pragma unroll
  for (int distance = 1; distance < WARP; distance *= 2) {
    const int other = __shfl_up_sync(ALL_LANES, sum, distance);
    if (lane >= distance) sum += other;
  }
  total = __shfl_sync(ALL_LANES, sum, WARP - 1);
  return sum - value;
}

// The same over the threads of a block of whole warps, through MAX_WORDS ints of shared memory, free at the end.
__device__ __forceinline__ int sum_before(int value, int& total, int* scratch) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, num_warps = blockDim.x / WARP;
  int of_warp;
  const int before = sum_before_in_warp(value, of_warp);
  if (lane == 0) scratch[warp] = of_warp;
  __syncthreads();
  const int of_lane = lane < num_warps ? scratch[lane] : 0;
  const int before_lane = sum_before_in_warp(of_lane, total);
  const int before_warp = __shfl_sync(ALL_LANES, before_lane, warp);
  __syncthreads();
  return before_warp + before;
}

// A block for each tile, a thread for each expert (rounded up to whole warps), which numbers its rows in turn.
__global__ void __launch_bounds__(1024) expert_index(RoutingMap map, Index index) {
  __shared__ int scratch[MAX_WORDS];
  __shared__ unsigned bits[STEP_TOKENS][MAX_WORDS + 1];  // one more, so that lanes read different banks
  __shared__ int first_of_token[STEP_TOKENS];
  const int expert = threadIdx.x, lane = expert % WARP, word = expert / WARP, num_words = blockDim.x / WARP;
  const bool is_expert = expert < map.num_experts;

  int earlier = 0, all = 0;  // choices of this expert in earlier tiles, and in all
  if (is_expert) {
#pragma unroll 8
    for (int tile = 0; tile < map.num_tiles; ++tile) {
      const int count = map.counts[tile * map.num_experts + expert];
      earlier += tile < static_cast<int>(blockIdx.x) ? count : 0;
      all += count;
    }
  }
  int total;
  const int first_row = sum_before(all, total, scratch);
  if (is_expert && blockIdx.x == 0) index.ends[expert] = first_row + all;
  int row = first_row + earlier;
  int next;  // in `rows`
  sum_before(earlier, next, scratch);

  for (int first = map.first_token(); first < map.end_token(); first += STEP_TOKENS) {
    const int num_tokens = min(STEP_TOKENS, map.end_token() - first);
    unsigned chose_me = 0;
#pragma unroll 8
    for (int step = 0; step < STEP_TOKENS; ++step) {
      const bool is_chosen = is_expert && step < num_tokens && map.at(first + step, expert);
      const unsigned experts = __ballot_sync(ALL_LANES, is_chosen);
      if (lane == 0) bits[step][word] = experts;
      chose_me |= static_cast<unsigned>(is_chosen) << step;
    }
    __syncthreads();
    // Every warp counts, so that all know where the next tokens begin.
    int choices = 0, of_step;
    for (int other = 0; other < num_words; ++other) choices += __popc(bits[lane][other]);
    const int begin = next + sum_before_in_warp(choices, of_step);
    if (word == 0) {
      first_of_token[lane] = begin;
      if (lane < num_tokens) index.starts[first + lane] = begin;
    }
    __syncthreads();
    for (; chose_me; chose_me &= chose_me - 1, ++row) {
      const int step = __ffs(chose_me) - 1;
      int place = first_of_token[step] + __popc(bits[step][word] & ((1u << lane) - 1));
      for (int other = 0; other < word; ++other) place += __popc(bits[step][other]);
      index.rows[place] = row;
      index.entry_of_row[row] = (first + step) * map.num_experts + expert;
    }
    next += of_step;
    __syncthreads();
  }
  if (blockIdx.x + 1 == gridDim.x && threadIdx.x == 0) index.starts[map.num_tokens] = next;
}

// Rows of ranks, each in the order of experts: `ends` [ranks, experts] of all experts, of which these rows have some.
struct Chunks {
  const int* ends;
  int num_ranks, all_experts, first_expert, num_experts, num_rows;

  __device__ __forceinline__ int count() const { return num_ranks * num_experts; }
  __device__ __forceinline__ int size(int rank, int expert) const {
    const int* const end = ends + static_cast<int64_t>(rank) * all_experts + first_expert + expert;
    return *end - (first_expert + expert > 0 ? end[-1] : 0);
  }
};

// The permutation from chunks in the order of ranks to chunks in the order of experts. Every block makes both tables of
// chunks, 2 * count ints of shared memory, and finds the chunk of each of its rows by bisection.
__global__ void __launch_bounds__(256) chunk_index(Chunks chunks, Index index) {
  __shared__ int scratch[MAX_WORDS];
  DYNAMIC_SHARED(int, begins);
  const int count = chunks.count(), num_ranks = chunks.num_ranks;
  int* const old_begins = begins + count;  // both in the new order
  int total, earlier = 0;
  for (int first = 0; first < count; first += blockDim.x) {
    const int chunk = first + threadIdx.x, rank = chunk / chunks.num_experts, expert = chunk % chunks.num_experts;
    const int begin = earlier + sum_before(chunk < count ? chunks.size(rank, expert) : 0, total, scratch);
    if (chunk < count) old_begins[expert * num_ranks + rank] = begin;
    earlier += total;
  }
  earlier = 0;
  for (int first = 0; first < count; first += blockDim.x) {
    const int chunk = first + threadIdx.x, expert = chunk / num_ranks, rank = chunk % num_ranks;
    const int begin = earlier + sum_before(chunk < count ? chunks.size(rank, expert) : 0, total, scratch);
    if (chunk < count) begins[chunk] = begin;
    earlier += total;
  }
  __syncthreads();

  const int stride = gridDim.x * blockDim.x;
  for (int row = blockIdx.x * blockDim.x + threadIdx.x; row < chunks.num_rows; row += stride) {
    int low = 0, high = count - 1;  // the last chunk that begins at or before the row
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (begins[middle] <= row) low = middle;
      else high = middle - 1;
    }
    const int old_row = row - begins[low] + old_begins[low];
    index.entry_of_row[row] = old_row;
    index.rows[old_row] = row;
    index.starts[row] = row;
  }
  if (blockIdx.x != 0) return;
  if (threadIdx.x == 0) index.starts[chunks.num_rows] = chunks.num_rows;
  for (int expert = threadIdx.x; expert < chunks.num_experts; expert += blockDim.x) {
    index.ends[expert] = expert + 1 < chunks.num_experts ? begins[(expert + 1) * num_ranks] : chunks.num_rows;
  }
}

// Of a block's threads, x run along a row, y over tokens (or rows).
__device__ __forceinline__ int64_t number_in_grid() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
}

// Where rows are, which no kernel of rows changes: such an index is read ahead of stores.
using Places = const int* __restrict__;

// Rows of tokens, and where `probs` [tokens, experts] is given, the rows' probabilities.
template <class T, int N>
__global__ void __launch_bounds__(256)
    permute_rows(const T* x, const float* probs, Places entry_of_row, Places rows, Places starts, T* y,
                 float* row_probs, int64_t num_tokens, int vectors_per_row) {
  const int64_t token = number_in_grid(), size = static_cast<int64_t>(vectors_per_row) * N;
  if (token >= num_tokens) return;
  const int begin = starts[token], end = starts[token + 1];
  for (int vector = threadIdx.x; vector < vectors_per_row; vector += blockDim.x) {
    const Vector<T, N> values = load<N>(x + token * size + vector * N);
#pragma unroll 4
    for (int place = begin; place < end; ++place) store(y + rows[place] * size + vector * N, values);
  }
  if (!probs) return;
  for (int place = begin + threadIdx.x; place < end; place += blockDim.x) {
    const int row = rows[place];
    row_probs[row] = probs[entry_of_row[row]];
  }
}

// Add one vector of COUNT rows, in their order, after all are on their way.
template <class T, int N, int COUNT>
__device__ __forceinline__ void add_rows(const T* y, const float* weights, Places rows, int64_t size, int vector,
                                         float (&sums)[N]) {
  Vector<T, N> values[COUNT];
  float factors[COUNT];
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const int row = rows[i];
    values[i] = load<N>(y + row * size + vector * N);
    factors[i] = weights ? weights[row] : 1.0f;
  }
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
#pragma unroll
    for (int j = 0; j < N; ++j) sums[j] += factors[i] * values[i][j];
  }
}

// Sums of each token's rows, times `weights` [rows] where given; and where `grad_probs` [tokens, experts] is, what
// `grad_row_probs` [rows] gives: zero where an expert was not chosen.
template <class T, int N>
__global__ void __launch_bounds__(256)
    sum_rows(const T* y, const float* weights, const float* grad_row_probs, Places entry_of_row, Places rows,
             Places starts, T* x, float* grad_probs, int64_t num_tokens, int vectors_per_row, int num_experts) {
  const int64_t token = number_in_grid(), size = static_cast<int64_t>(vectors_per_row) * N;
  if (token >= num_tokens) return;
  const int begin = starts[token], end = starts[token + 1];
  for (int vector = threadIdx.x; vector < vectors_per_row; vector += blockDim.x) {
    float sums[N] = {};
    int place = begin;
#pragma unroll 1
    for (; place + SUM_BATCH <= end; place += SUM_BATCH) {
      add_rows<T, N, SUM_BATCH>(y, weights, rows + place, size, vector, sums);
    }
#pragma unroll 1
    for (; place < end; ++place) add_rows<T, N, 1>(y, weights, rows + place, size, vector, sums);
    Vector<T, N> result;
#pragma unroll
    for (int j = 0; j < N; ++j) result.set(j, sums[j]);
    store(x + token * size + vector * N, result);
  }
  if (!grad_probs) return;
  for (int expert = threadIdx.x; expert < num_experts; expert += blockDim.x) {
    const int64_t entry = token * num_experts + expert;
    float gradient = 0.0f;
    for (int place = begin; place < end; ++place) {
      const int row = rows[place];
      if (entry_of_row[row] == entry) gradient = grad_row_probs[row];
    }
    grad_probs[entry] = gradient;
  }
}

// Gradients of weighted rows and of their weights; a warp (threadIdx.x) for each row.
template <class T, int N>
__global__ void __launch_bounds__(128)
    weighted_rows_gradient(const T* gradient, const T* y, const float* weights, Places entry_of_row, T* grad_y,
                           float* grad_weights, int64_t num_rows, int vectors_per_row, int num_experts) {
  constexpr int BATCH = 2;
  const int64_t row = number_in_grid(), size = static_cast<int64_t>(vectors_per_row) * N;
  if (row >= num_rows) return;
  gradient += entry_of_row[row] / num_experts * size, y += row * size, grad_y += row * size;
  const float weight = weights[row];
  float sum = 0.0f;
  for (int first = threadIdx.x; first < vectors_per_row; first += BATCH * WARP) {
    Vector<T, N> gradients[BATCH], values[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      const int vector = first + i * WARP;
      if (vector < vectors_per_row) gradients[i] = load<N>(gradient + vector * N), values[i] = load<N>(y + vector * N);
    }
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      const int vector = first + i * WARP;
      if (vector >= vectors_per_row) continue;
      Vector<T, N> result;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        result.set(j, weight * gradients[i][j]);
        sum += gradients[i][j] * values[i][j];
      }
      store(grad_y + vector * N, result);
    }
  }
  sum = warp_reduce<Sum>(sum);
  if (threadIdx.x == 0) grad_weights[row] = sum;
}

}  // namespace kernels
