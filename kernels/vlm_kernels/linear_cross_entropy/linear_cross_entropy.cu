// Launches of the two passes over a chunk of logits.
//
// Bytes: the first pass reads every logit once, the second reads and writes it once, so that in bf16 a chunk of 1408
// tokens and 262144 columns moves 0.7 GB and 1.5 GB: 0.2 ms and 0.3 ms at an H200's 4.3 TB/s, beside 15 ms to 20 ms of
// the chunk's four products. 512 (256) threads with four 16-byte accesses each under way keep 32 KiB (16 KiB) per block
// in flight, where 26 KiB per multiprocessor hide the latency of memory; a row of 32768 columns (eight tensor ranks)
// still occupies every thread of a block.
#include "csrc/launch.h"
#include "linear_cross_entropy/linear_cross_entropy.cuh"

namespace {

using namespace kernels;

constexpr int STATISTICS_THREADS = 512, GRADIENT_THREADS = 256;

template <class T, int N, bool CAPPED>
__global__ void __launch_bounds__(STATISTICS_THREADS)
    statistics_kernel(const T* logits, const int64_t* labels, float* statistics, int64_t width, int columns,
                      float softcap) {
  vocabulary_statistics<T, N, CAPPED>(logits, labels, statistics, width, columns, softcap);
}

template <class T, int N, bool CAPPED>
__global__ void __launch_bounds__(GRADIENT_THREADS)
    gradient_kernel(T* logits, const int64_t* labels, const float* factors, int64_t width, int columns, float softcap) {
  logits_gradient<T, N, CAPPED>(logits, labels, factors, width, columns, softcap);
}

void check(const Tensor& logits, const Tensor& labels, int64_t columns) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous(), "logits: a contiguous matrix expected");
  STD_TORCH_CHECK(labels.dim() == 1 && labels.size(0) == logits.size(0) && labels.is_contiguous() &&
                      labels.scalar_type() == ScalarType::Long,
                  "labels: one int64 per row of the logits expected");
  STD_TORCH_CHECK(labels.get_device_index() == logits.get_device_index(), "labels: on another device than the logits");
  STD_TORCH_CHECK(columns >= 0 && columns <= logits.size(1) && logits.size(1) <= INT32_MAX / 2,
                  "columns: at most as many as the logits have expected");
}

// f(T{}, whole or single elements at a time, capped or not) as types.
template <class Function>
void dispatch_kernel(const Tensor& logits, double softcap, Function&& f) {
  dispatch(logits, [&](auto element) {
    using T = decltype(element);
    const bool in_vectors = is_vectorizable({logits.data_ptr()}, logits.size(1), sizeof(T));
    const auto with_width = [&](auto width) {
      if (softcap == 0.0) return f(element, width, std::false_type{});
      return f(element, width, std::true_type{});
    };
    if (in_vectors) return with_width(std::integral_constant<int, VECTOR<T>>{});
    return with_width(std::integral_constant<int, 1>{});
  });
}

Tensor launch_statistics(Tensor logits, Tensor labels, int64_t columns, double softcap) {
  check(logits, labels, columns);
  const int64_t tokens = logits.size(0), width = logits.size(1);
  Tensor statistics = torch::stable::new_empty(logits, {tokens, 3}, ScalarType::Float);
  if (tokens == 0) return statistics;
  const OnDevice device(logits);
  dispatch_kernel(logits, softcap, [&](auto element, auto n, auto is_capped) {
    using T = decltype(element);
    statistics_kernel<T, n(), is_capped()><<<tokens, STATISTICS_THREADS, 0, device.stream>>>(
        static_cast<const T*>(logits.data_ptr()), static_cast<const int64_t*>(labels.data_ptr()),
        static_cast<float*>(statistics.data_ptr()), width, static_cast<int>(columns), static_cast<float>(softcap));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return statistics;
}

void launch_gradient(Tensor logits, Tensor labels, Tensor factors, int64_t columns, double softcap) {
  check(logits, labels, columns);
  const int64_t tokens = logits.size(0), width = logits.size(1);
  STD_TORCH_CHECK(factors.dim() == 2 && factors.size(0) == tokens && factors.size(1) == 4 && factors.is_contiguous() &&
                      factors.scalar_type() == ScalarType::Float && is_vectorizable({factors.data_ptr()}, 4, 4) &&
                      factors.get_device_index() == logits.get_device_index(),
                  "factors: [rows of the logits, 4] fp32 expected, 16-byte aligned");
  if (tokens == 0 || width == 0) return;
  const OnDevice device(logits);
  dispatch_kernel(logits, softcap, [&](auto element, auto n, auto is_capped) {
    using T = decltype(element);
    const int64_t tiles = ceil_divide(width, GRADIENT_THREADS * n() * VOCABULARY_UNROLL);
    const dim3 grid(static_cast<unsigned>(tokens), static_cast<unsigned>(tiles));
    gradient_kernel<T, n(), is_capped()><<<grid, GRADIENT_THREADS, 0, device.stream>>>(
        static_cast<T*>(logits.data_ptr()), static_cast<const int64_t*>(labels.data_ptr()),
        static_cast<const float*>(factors.data_ptr()), width, static_cast<int>(columns), static_cast<float>(softcap));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlm_kernels, CUDA, m) {
  m.impl("vocabulary_statistics", TORCH_BOX(&launch_statistics));
  m.impl("logits_gradient_", TORCH_BOX(&launch_gradient));
}
