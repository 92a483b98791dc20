// CUDA's thread model on one host thread: a fiber for each CUDA thread of a block, blocks one after another.
//
// A fiber runs until it waits for others (__syncthreads, __syncwarp, a shuffle) or ends, so a missing barrier shows as
// values read before they are written; `order` sets who runs first. A barrier that some threads never reach, an access
// that hardware refuses and a shuffle from a lane that does not take part are reported. Not covered: asynchronous
// copies, tensor cores, the memory model between blocks, bank conflicts.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <string>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __shared__ static
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) int2 { int32_t x, y; };
struct alignas(16) int4 { int32_t x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr int LANES = 32;
constexpr size_t STACK_BYTES = 128 << 10;
enum class State { ready, at_block_barrier, at_warp_barrier, done };
enum class Order : int { ascending, descending, shuffled };

struct Fiber {
  ucontext_t start;
  jmp_buf registers;
  bool is_started = false;
  State state = State::ready;
  dim3 index;
  unsigned mask = 0;           // lanes it waits for
  unsigned exchanges = 0;      // so far; two slots in turn, so that none is overwritten before all have read
  uint64_t slots[2] = {0, 0};
  unsigned slot_exchange[2] = {~0u, ~0u};
};

inline std::vector<Fiber> fibers;
inline int running;
inline jmp_buf scheduler;
inline char* stacks;
inline size_t num_stacks;
inline const std::function<void()>* body;
inline std::string error;
inline Order order = Order::ascending;
inline std::vector<char> dynamic_memory;

inline char* dynamic_shared() {
  return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(dynamic_memory.data()) + 127) & ~uintptr_t(127));
}

// Both ways between scheduler and fiber; _longjmp, unlike swapcontext, makes no system call.
__attribute__((noinline)) inline void leave() {
  if (_setjmp(fibers[running].registers) == 0) _longjmp(scheduler, 1);
}

[[noreturn]] inline void stop(const std::string& message) {
  if (error.empty()) {
    const dim3 thread = threadIdx, block = blockIdx;
    error = message + " (thread " + std::to_string(thread.x) + "," + std::to_string(thread.y) + "," +
            std::to_string(thread.z) + " of block " + std::to_string(block.x) + "," + std::to_string(block.y) + "," +
            std::to_string(block.z) + ")";
  }
  fibers[running].state = State::done;
  _longjmp(scheduler, 1);
}

inline void enter() {
  (*body)();
  fibers[running].state = State::done;
  _longjmp(scheduler, 1);
}

__attribute__((noinline)) inline void resume(int index) {
  running = index;
  Fiber& fiber = fibers[index];
  threadIdx = fiber.index;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.is_started) _longjmp(fiber.registers, 1);
  fiber.is_started = true;
  setcontext(&fiber.start);
}

inline void wait(State state, unsigned mask) {
  asm volatile("" ::: "memory");
  fibers[running].state = state;
  fibers[running].mask = mask;
  leave();
  asm volatile("" ::: "memory");
}

// Let those lanes of a warp go on whose whole mask waits. False if there are none.
inline bool release_warp(int first) {
  const int last = std::min(first + LANES, static_cast<int>(fibers.size()));
  unsigned live = 0, waiting = 0;
  for (int index = first; index < last; ++index) {
    const State state = fibers[index].state;
    if (state != State::done) live |= 1u << (index - first);
    if (state == State::at_warp_barrier) waiting |= 1u << (index - first);
  }
  bool any = false;
  for (int index = first; index < last; ++index) {
    const unsigned needed = fibers[index].mask & live;
    if (!(waiting >> (index - first) & 1) || (needed & waiting) != needed) continue;
    bool is_agreed = true;
    for (int other = first; other < last; ++other) {
      if (needed >> (other - first) & 1) is_agreed &= fibers[other].mask == fibers[index].mask;
    }
    if (!is_agreed) continue;
    for (int other = first; other < last; ++other) {
      if (needed >> (other - first) & 1) fibers[other].state = State::ready;
    }
    waiting &= ~needed;
    any = true;
  }
  return any;
}

// Run threads of a warp until all wait for other warps, or have ended; with `once` only to their next wait.
inline bool run_warp(int first, bool once, unsigned* seed) {
  const int count = std::min(LANES, static_cast<int>(fibers.size()) - first);
  bool any = false;
  do {
    const int start = seed ? static_cast<int>((*seed = *seed * 1664525u + 1013904223u) >> 8) % count : 0;
    for (int turn = 0; turn < count; ++turn) {
      const int lane = order == Order::descending ? count - 1 - turn : (start + turn) % count;
      if (fibers[first + lane].state == State::ready) resume(first + lane), any = true;
      if (!error.empty()) return true;
    }
  } while (release_warp(first) && !once);
  return any;
}

// One warp runs as far as it can before the next one starts, so that it overwrites what others have still to read;
// shuffled, warps take steps in a random order.
inline void run_block(unsigned seed) {
  const int num_warps = (static_cast<int>(fibers.size()) + LANES - 1) / LANES;
  while (true) {
    bool any = false;
    for (int turn = 0; turn < num_warps; ++turn) {
      const bool is_shuffled = order == Order::shuffled;
      const int random = static_cast<int>((seed = seed * 1664525u + 1013904223u) >> 8) % num_warps;
      const int warp = is_shuffled ? random : order == Order::descending ? num_warps - 1 - turn : turn;
      any |= run_warp(warp * LANES, is_shuffled, is_shuffled ? &seed : nullptr);
      if (!error.empty()) return;
    }
    bool is_done = true, all_at_barrier = true, is_ready = false;
    for (const Fiber& fiber : fibers) {
      is_done &= fiber.state == State::done;
      all_at_barrier &= fiber.state == State::done || fiber.state == State::at_block_barrier;
      is_ready |= fiber.state == State::ready;
    }
    if (is_done) return;
    if (all_at_barrier) {
      for (Fiber& fiber : fibers) {
        if (fiber.state == State::at_block_barrier) fiber.state = State::ready;
      }
    } else if (!any && !is_ready) {
      error = "threads wait for others that never come (a barrier or warp operation in divergent code), block " +
              std::to_string(blockIdx.x) + "," + std::to_string(blockIdx.y) + "," + std::to_string(blockIdx.z);
      return;
    }
  }
}

// Run `kernel` (a call with its arguments) for every thread of every block. Dynamic shared memory starts as NaN.
inline void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  const size_t count = size_t(block.x) * block.y * block.z;
  if (!error.empty()) return;
  if (count == 0 || count > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) {
    error = "invalid launch: " + std::to_string(count) + " threads in a block";
    return;
  }
  if (shared_bytes > 227 * 1024) {
    error = "invalid launch: " + std::to_string(shared_bytes) + " bytes of dynamic shared memory";
    return;
  }
  if (count > num_stacks) {
    if (stacks) munmap(stacks, num_stacks * STACK_BYTES);
    stacks = static_cast<char*>(mmap(nullptr, count * STACK_BYTES, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    num_stacks = count;
  }
  body = &kernel;
  blockDim = block, gridDim = grid;
  unsigned seed = 1;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        dynamic_memory.assign(shared_bytes + 128, char(0xff));
        fibers.assign(count, Fiber());
        for (size_t index = 0; index < count; ++index) {
          Fiber& fiber = fibers[index];
          const unsigned linear = static_cast<unsigned>(index);
          fiber.index = dim3(linear % block.x, linear / block.x % block.y, linear / (block.x * block.y));
          getcontext(&fiber.start);
          fiber.start.uc_stack.ss_sp = stacks + index * STACK_BYTES;
          fiber.start.uc_stack.ss_size = STACK_BYTES;
          fiber.start.uc_link = nullptr;
          makecontext(&fiber.start, enter, 0);
        }
        run_block(seed++);
        if (!error.empty()) return;
      }
}

inline int lane() { return running % LANES; }

// `value` of the lane with number `source`; its own where `source` is outside [0, 32).
template <class T>
T exchange(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value);
  const int me = running;
  if (!(mask >> lane() & 1)) stop("a warp operation by a lane that is not in its mask");
  const unsigned number = fibers[me].exchanges++;
  memcpy(&fibers[me].slots[number & 1], &value, sizeof(T));
  fibers[me].slot_exchange[number & 1] = number;
  wait(State::at_warp_barrier, mask);
  if (source < 0 || source >= LANES) return value;
  const size_t from = me - me % LANES + source;
  T result;
  if (from >= fibers.size() || !(mask >> source & 1) || fibers[from].slot_exchange[number & 1] != number) {
    stop("a shuffle reads from lane " + std::to_string(source) + ", which does not take part");
  }
  memcpy(&result, &fibers[from].slots[number & 1], sizeof(T));
  return result;
}

inline void check_aligned(const void* pointer, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes) {
    stop("an access of " + std::to_string(bytes) + " bytes at an address that is not a multiple of it");
  }
}

}  // namespace emulator

#define DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(emulator::dynamic_shared())
#define CHECK_ALIGNED(pointer, bytes) emulator::check_aligned(pointer, bytes)

inline void __syncthreads() { emulator::wait(emulator::State::at_block_barrier, 0); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::wait(emulator::State::at_warp_barrier, mask); }
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = emulator::lane();
  return emulator::exchange(mask, value, lane / width * width + source % width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance, int width = 32) {
  const int lane = emulator::lane(), source = lane ^ distance;
  return emulator::exchange(mask, value, source / width > lane / width ? -1 : source);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const int lane = emulator::lane(), source = lane - static_cast<int>(distance);
  return emulator::exchange(mask, value, source < lane / width * width ? -1 : source);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const int lane = emulator::lane(), source = lane + static_cast<int>(distance);
  return emulator::exchange(mask, value, source >= (lane / width + 1) * width ? -1 : source);
}
inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  unsigned result = 0;
  // Lanes outside the mask give nothing; one exchange per lane keeps all in step.
  for (int source = 0; source < emulator::LANES; ++source) {
    if (mask >> source & 1 && emulator::exchange(mask, unsigned(predicate), source)) result |= 1u << source;
  }
  return result;
}
inline bool __any_sync(unsigned mask, bool predicate) { return __ballot_sync(mask, predicate) != 0; }
inline bool __all_sync(unsigned mask, bool predicate) { return __ballot_sync(mask, predicate) == mask; }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

// Fibers change only where they wait, so plain operations are atomic.
template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) { const T old = *address; *address = old + value; return old; }
template <class T>
T atomicMax(T* address, std::type_identity_t<T> value) { const T old = *address; *address = std::max(old, value); return old; }
template <class T>
T atomicMin(T* address, std::type_identity_t<T> value) { const T old = *address; *address = std::min(old, value); return old; }
template <class T>
T atomicExch(T* address, std::type_identity_t<T> value) { const T old = *address; *address = value; return old; }
template <class T>
T atomicCAS(T* address, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  const T old = *address;
  if (old == compare) *address = value;
  return old;
}

template <class T>
T __ldg(const T* address) { return *address; }
template <class T>
T __ldcs(const T* address) { return *address; }
template <class T>
void __stcs(T* address, T value) { *address = value; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __int_as_float(int bits) { float value; memcpy(&value, &bits, 4); return value; }
inline int __float_as_int(float value) { int bits; memcpy(&bits, &value, 4); return bits; }
inline int __float2int_rn(float x) { return static_cast<int>(nearbyintf(x)); }
inline int min(int a, int b) { return std::min(a, b); }
inline int max(int a, int b) { return std::max(a, b); }
inline int64_t min(int64_t a, int64_t b) { return std::min(a, b); }
inline int64_t max(int64_t a, int64_t b) { return std::max(a, b); }

namespace kernels {

// Types of 16 bits with rounding to the nearest value, ties to the even one, as the hardware's conversions.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }
inline float to_float(bfloat16 value) { return __int_as_float(int(uint32_t(value.bits) << 16)); }
inline float to_float(float16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16, exponent = value.bits >> 10 & 31u, fraction = value.bits & 0x3ffu;
  if (exponent == 31) return __int_as_float(int(sign | 0x7f800000u | fraction << 13));
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * ldexpf(float(fraction), -24);
  return __int_as_float(int(sign | (exponent + 112) << 23 | fraction << 13));
}

template <class T>
T round_to(float value);
template <>
inline float round_to<float>(float value) { return value; }
template <>
inline bfloat16 round_to<bfloat16>(float value) {
  const uint32_t bits = uint32_t(__float_as_int(value));
  if (value != value) return {0x7fff};
  return {uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
template <>
inline float16 round_to<float16>(float value) {
  const uint16_t sign = uint16_t(uint32_t(__float_as_int(value)) >> 16 & 0x8000u);
  const float size = fabsf(value);
  if (value != value) return {0x7fff};
  if (size >= 65520.0f) return {uint16_t(sign | 0x7c00u)};
  // nearbyint rounds ties to even; the unit is the spacing of the binade, that of subnormals below 2^-14.
  int exponent;
  frexpf(size, &exponent);
  const int unit = size == 0.0f ? -24 : std::max(exponent - 11, -24);
  const uint32_t steps = uint32_t(nearbyintf(ldexpf(size, -unit)));
  // Steps count from zero in subnormals; in a binade they start at 1024, which the exponent stands for.
  return {uint16_t(sign | (unit == -24 ? steps : steps + (uint32_t(unit + 24) << 10)))};
}

}  // namespace kernels

extern "C" {
__attribute__((visibility("default"), used)) inline const char* emulator_error() { return emulator::error.c_str(); }
__attribute__((visibility("default"), used)) inline void emulator_begin(int order) {
  emulator::error.clear();
  emulator::order = static_cast<emulator::Order>(order);
}
}
