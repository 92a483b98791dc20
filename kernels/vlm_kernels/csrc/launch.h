// What launch code is written with: torch's tensors by its stable ABI, the current stream, checks, dtype dispatch.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "csrc/device.cuh"

namespace kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The tensor's device is the current one while this lives; `stream` is torch's current stream there.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {
    void* current = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &current));
    stream = static_cast<cudaStream_t>(current);
  }

  int multiprocessors() const {
    int count = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index_));
    return count;
  }

  cudaStream_t stream;

 private:
  int index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

// Call f(T{}) with the tensor's element type: float, float16 or bfloat16.
template <class Function>
void dispatch(const Tensor& tensor, Function&& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Half:
      return f(float16{});
    case ScalarType::BFloat16:
      return f(bfloat16{});
    default:
      STD_TORCH_CHECK(false, "fp32, fp16 or bf16 expected");
  }
}

// May rows of `size` elements of all these be read 16 bytes at a time? Null pointers are not read.
inline bool is_vectorizable(std::initializer_list<const void*> pointers, int64_t size, int64_t element_bytes) {
  uintptr_t bits = static_cast<uintptr_t>(size * element_bytes);
  for (const void* pointer : pointers) bits |= reinterpret_cast<uintptr_t>(pointer);
  return bits % VECTOR_BYTES == 0;
}

// nullptr where there is no tensor.
template <class T>
const T* pointer_of(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<const T*>(tensor->data_ptr()) : nullptr;
}

// The tensor itself where it is contiguous, else a copy that is.
inline Tensor as_contiguous(const Tensor& tensor) { return torch::stable::contiguous(tensor); }

inline std::optional<Tensor> as_contiguous(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? std::optional<Tensor>(torch::stable::contiguous(*tensor)) : std::nullopt;
}

inline void check_same_shape(const Tensor& a, const Tensor& b, const char* what) {
  const auto sizes_a = a.sizes(), sizes_b = b.sizes();
  STD_TORCH_CHECK(sizes_a.size() == sizes_b.size() && std::equal(sizes_a.begin(), sizes_a.end(), sizes_b.begin()) &&
                      a.scalar_type() == b.scalar_type() && a.get_device_index() == b.get_device_index(),
                  what, ": shape, dtype and device must be the same");
}

constexpr int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace kernels
