// What kernel bodies are written with: element types, vector loads and stores, reductions over warps and blocks.
//
// Bodies compile with nvcc, and with a host compiler where EMULATOR names a header that emulates the thread model.
// All arithmetic is in fp32; memory holds float, float16 or bfloat16.
#pragma once

#include <stdint.h>
#include <string.h>

#include <type_traits>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// Dynamic shared memory, 16-byte aligned, as a pointer to `type`.
#define DYNAMIC_SHARED(type, name)                                   \
  extern __shared__ __align__(16) unsigned char dynamic_shared_bytes[]; \
  type* const name = reinterpret_cast<type*>(dynamic_shared_bytes)

// The emulator stops at an access that hardware refuses; here hardware does.
#define CHECK_ALIGNED(pointer, bytes)

namespace kernels {
using bfloat16 = __nv_bfloat16;
using float16 = __half;
}  // namespace kernels
#else
#include EMULATOR
#endif

namespace kernels {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int VECTOR_BYTES = 16;

// Elements of T in one 16-byte access.
template <class T>
constexpr int VECTOR = VECTOR_BYTES / static_cast<int>(sizeof(T));

#ifdef __CUDACC__
__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(float16 value) { return __half2float(value); }
__device__ __forceinline__ float to_float(bfloat16 value) { return __bfloat162float(value); }

// Nearest value of T, ties to even.
template <class T>
__device__ __forceinline__ T round_to(float value);
template <>
__device__ __forceinline__ float round_to<float>(float value) { return value; }
template <>
__device__ __forceinline__ float16 round_to<float16>(float value) { return __float2half_rn(value); }
template <>
__device__ __forceinline__ bfloat16 round_to<bfloat16>(float value) { return __float2bfloat16_rn(value); }
#endif

// What memory holds after `value` was stored as T and read back.
template <class T>
__device__ __forceinline__ float rounded(float value) {
  return to_float(round_to<T>(value));
}

// N elements as they lie in memory, in registers.
template <class T, int N>
struct alignas(N * sizeof(T) < VECTOR_BYTES ? N * sizeof(T) : VECTOR_BYTES) Vector {
  T at[N];

  // Elements of 16 bits are read and set in pairs, as they lie in registers: one alone costs another instruction.
  __device__ __forceinline__ float operator[](int index) const {
#ifdef __CUDACC__
    if constexpr (sizeof(T) == 2 && N % 2 == 0) {
      uint32_t pair;
      memcpy(&pair, at + index / 2 * 2, sizeof(pair));
      if constexpr (std::is_same_v<T, bfloat16>) {
        return __uint_as_float(index % 2 ? pair & 0xffff0000u : pair << 16);
      } else {
        __half2 halves;
        memcpy(&halves, &pair, sizeof(pair));
        return index % 2 ? __high2float(halves) : __low2float(halves);
      }
    } else
#endif
    {
      return to_float(at[index]);
    }
  }

  __device__ __forceinline__ void set(int index, float value) { at[index] = round_to<T>(value); }

  __device__ __forceinline__ void set_all(const float (&values)[N]) {
#ifdef __CUDACC__
    if constexpr (sizeof(T) == 2 && N % 2 == 0) {
#pragma unroll
      for (int index = 0; index < N; index += 2) {
        if constexpr (std::is_same_v<T, bfloat16>) {
          const __nv_bfloat162 pair = __floats2bfloat162_rn(values[index], values[index + 1]);
          memcpy(at + index, &pair, sizeof(pair));
        } else {
          const __half2 pair = __floats2half2_rn(values[index], values[index + 1]);
          memcpy(at + index, &pair, sizeof(pair));
        }
      }
    } else
#endif
    {
#pragma unroll
      for (int index = 0; index < N; ++index) set(index, values[index]);
    }
  }
};

// Keep 16-bit elements as such in registers: the compiler must convert them again after this point. Otherwise it may
// hold fp32 copies from one pass over a row to the next, twice the registers.
template <class T, int N>
__device__ __forceinline__ void keep_packed(Vector<T, N>& values) {
#ifdef __CUDACC__
  if constexpr (sizeof(T) == 2 && N % 2 == 0) {
#pragma unroll
    for (int piece = 0; piece < N / 2; ++piece) {
      uint32_t word;
      memcpy(&word, reinterpret_cast<const char*>(&values) + piece * 4, 4);
      asm volatile("" : "+r"(word));
      memcpy(reinterpret_cast<char*>(&values) + piece * 4, &word, 4);
    }
  }
#endif
}

template <int BYTES>
struct WordOf;
template <>
struct WordOf<16> { using type = uint4; };
template <>
struct WordOf<8> { using type = uint2; };
template <>
struct WordOf<4> { using type = uint32_t; };
template <>
struct WordOf<2> { using type = uint16_t; };

// Read N elements with as few accesses as alignment allows: `from` must be aligned to min(16, N * sizeof(T)) bytes.
// N = 1 is what an unaligned row, or a tail, is read with. N must be a power of two.
template <int N, class T>
__device__ __forceinline__ Vector<T, N> load(const T* from) {
  constexpr int BYTES = N * static_cast<int>(sizeof(T));
  constexpr int STEP = BYTES < VECTOR_BYTES ? BYTES : VECTOR_BYTES;
  using Word = typename WordOf<STEP>::type;
  CHECK_ALIGNED(from, STEP);
  Vector<T, N> result;
#pragma unroll
  for (int piece = 0; piece < BYTES / STEP; ++piece) {
    const Word word = reinterpret_cast<const Word*>(from)[piece];
    memcpy(reinterpret_cast<char*>(&result) + piece * STEP, &word, STEP);
  }
  return result;
}

// The reverse of `load`.
template <int N, class T>
__device__ __forceinline__ void store(T* to, const Vector<T, N>& values) {
  constexpr int BYTES = N * static_cast<int>(sizeof(T));
  constexpr int STEP = BYTES < VECTOR_BYTES ? BYTES : VECTOR_BYTES;
  using Word = typename WordOf<STEP>::type;
  CHECK_ALIGNED(to, STEP);
#pragma unroll
  for (int piece = 0; piece < BYTES / STEP; ++piece) {
    Word word;
    memcpy(&word, reinterpret_cast<const char*>(&values) + piece * STEP, STEP);
    reinterpret_cast<Word*>(to)[piece] = word;
  }
}

// Ask for memory that is read soon: it takes no register until then. One call brings 32 bytes.
constexpr int PREFETCH_BYTES = 32;
__device__ __forceinline__ void prefetch([[maybe_unused]] const void* address) {
#ifdef __CUDACC__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

struct Sum {
  static constexpr float NEUTRAL = 0.0f;
  __device__ __forceinline__ static float combine(float a, float b) { return a + b; }
};

struct Max {
  static constexpr float NEUTRAL = -INFINITY;
  __device__ __forceinline__ static float combine(float a, float b) { return fmaxf(a, b); }
};

// Every lane gets the result over LANES neighbouring lanes (a power of two), the same bits in each.
template <class Operation, int LANES = WARP>
__device__ __forceinline__ float warp_reduce(float value) {
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2) {
    value = Operation::combine(value, __shfl_xor_sync(ALL_LANES, value, distance));
  }
  return value;
}

// Floats of shared memory that `row_reduce` needs for COUNT values: rows of warps in a block are at most 32 warps.
template <int COUNT>
constexpr int REDUCTION_SCRATCH = COUNT * WARP;

// Every thread gets, for each of COUNT values, the result over the threads of its row (equal threadIdx.y).
//
// blockDim.x is a multiple of 32. All threads of the block call it. There is one barrier, between writing and reading
// `scratch` (REDUCTION_SCRATCH<COUNT> floats): the next call needs other scratch, or a barrier before it. Rows of one
// warp need neither.
template <class Operation, int COUNT>
__device__ __forceinline__ void row_reduce(float (&values)[COUNT], float* scratch) {
#pragma unroll
  for (int index = 0; index < COUNT; ++index) values[index] = warp_reduce<Operation>(values[index]);
  const int num_warps = blockDim.x / WARP;
  if (num_warps == 1) return;
  const int lane = threadIdx.x % WARP;
  float* const row = scratch + threadIdx.y * num_warps * COUNT;
  if (lane == 0) {
#pragma unroll
    for (int index = 0; index < COUNT; ++index) row[index * num_warps + threadIdx.x / WARP] = values[index];
  }
  __syncthreads();
#pragma unroll
  for (int index = 0; index < COUNT; ++index) {
    values[index] = warp_reduce<Operation>(lane < num_warps ? row[index * num_warps + lane] : Operation::NEUTRAL);
  }
}

}  // namespace kernels
