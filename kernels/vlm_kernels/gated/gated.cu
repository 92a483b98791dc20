// Launches of the gated activations.
//
// All are bound by memory: forward reads two tensors and writes one, backward reads three and writes two, each once.
// A thread of the flat kernels has two vectors of 16 bytes of each tensor on their way (64 to 96 bytes; 2048 threads of
// a multiprocessor 128 kB or more, several times what 4 TB/s need at 600 ns), in blocks of 256. Rows (of experts, 704 to
// 2048 elements) take a warp each, so that the sum over a row for the factor's gradient needs no barrier; blocks of four
// warps end together. Not measured on a GPU yet.
#include "csrc/launch.h"
#include "gated/gated.cuh"

namespace kernels {
namespace {

constexpr unsigned FLAT_THREADS = 256, ROW_WARPS = 4;

template <class T>
T* memory_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// Where gate and up are.
struct Arguments {
  Tensor gate;
  std::optional<Tensor> up;
  std::optional<Tensor> factor;
  int64_t num_rows, width, stride;

  Arguments(const Tensor& given_gate, const std::optional<Tensor>& given_up, const std::optional<Tensor>& given_factor)
      : gate(as_contiguous(given_gate)), up(as_contiguous(given_up)), factor(as_contiguous(given_factor)) {
    STD_TORCH_CHECK(gate.dim() > 0, "gated: a gate has columns");
    stride = gate.size(gate.dim() - 1);
    num_rows = stride ? gate.numel() / stride : 0;
    STD_TORCH_CHECK(up.has_value() || stride % 2 == 0, "gated: halves of an odd number of columns");
    width = up.has_value() ? stride : stride / 2;
    if (up.has_value()) check_same_shape(*up, gate, "gated: gate and up");
    STD_TORCH_CHECK(!factor.has_value() || (factor->scalar_type() == ScalarType::Float && factor->numel() == num_rows &&
                                            factor->get_device_index() == gate.get_device_index()),
                    "gated: a factor is fp32, one for each row, on the same device");
  }

  bool is_flat() const { return up.has_value() && !factor.has_value(); }

  // `whole` has the layout of `gate`; the second one is that of up.
  template <class T>
  T* second(const Tensor& whole, const std::optional<Tensor>& other) const {
    return other.has_value() ? memory_of<T>(*other) : memory_of<T>(whole) + width;
  }

  int64_t elements_of_rows() const { return is_flat() ? num_rows * width : width; }
};

// Call f(T{}, N, ACTIVATION), the latter two as std::integral_constant.
template <class Function>
void with_variant(const Arguments& arguments, std::initializer_list<const Tensor*> others, int64_t activation,
                  Function&& f) {
  STD_TORCH_CHECK(activation >= SILU && activation <= GELU, "gated: no such activation");
  dispatch(arguments.gate, [&](auto zero) {
    using T = decltype(zero);
    // Gate, up, and all others begin where vectors may, and so does each row.
    bool by_vectors = is_vectorizable({memory_of<T>(arguments.gate), arguments.second<T>(arguments.gate, arguments.up)},
                                      arguments.elements_of_rows(), sizeof(T));
    for (const Tensor* other : others) by_vectors &= is_vectorizable({other->data_ptr()}, 0, sizeof(T));
    const auto with_activation = [&](auto n) {
      if (activation == SILU) return f(zero, n, std::integral_constant<int, SILU>{});
      if (activation == GELU_TANH) return f(zero, n, std::integral_constant<int, GELU_TANH>{});
      f(zero, n, std::integral_constant<int, GELU>{});
    };
    if (by_vectors) return with_activation(std::integral_constant<int, VECTOR<T>>{});
    with_activation(std::integral_constant<int, 1>{});
  });
}

unsigned flat_blocks(int64_t num_vectors) {
  return static_cast<unsigned>(ceil_divide(num_vectors, GATED_BATCH * FLAT_THREADS));
}

Tensor gated(const Tensor& gate, const std::optional<Tensor>& up, const std::optional<Tensor>& factor,
             int64_t activation, bool /* consume: for the backward pass */) {
  const Arguments a(gate, up, factor);
  std::vector<int64_t> sizes(a.gate.sizes().begin(), a.gate.sizes().end());
  sizes.back() = a.width;
  const Tensor product = torch::stable::new_empty(a.gate, sizes);
  if (product.numel() == 0) return product;
  const OnDevice device(a.gate);
  with_variant(a, {&product}, activation, [&](auto zero, auto n, auto of) {
    using T = decltype(zero);
    const T* const first = memory_of<T>(a.gate);
    const T* const second = a.second<T>(a.gate, a.up);
    if (a.is_flat()) {
      const int64_t num_vectors = a.num_rows * a.width / n;
      gated_flat<T, n, of><<<flat_blocks(num_vectors), FLAT_THREADS, 0, device.stream>>>(
          first, second, memory_of<T>(product), num_vectors);
    } else {
      gated_rows<T, n, of><<<ceil_divide(a.num_rows, ROW_WARPS), dim3(WARP, ROW_WARPS), 0, device.stream>>>(
          first, second, pointer_of<float>(a.factor), memory_of<T>(product), a.num_rows, static_cast<int>(a.width / n),
          a.stride);
    }
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return product;
}

std::optional<Tensor> like(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? std::optional<Tensor>(torch::stable::empty_like(*tensor)) : std::nullopt;
}

// Write all gradients; those of gate and up may lie over gate and up.
void write_gradients(const Tensor& given_gradient, const Arguments& a, int64_t activation, const Tensor& grad_gate,
                     const std::optional<Tensor>& grad_up, std::optional<Tensor>& grad_factor) {
  const Tensor gradient = as_contiguous(given_gradient);
  STD_TORCH_CHECK(gradient.numel() == a.num_rows * a.width && gradient.scalar_type() == a.gate.scalar_type() &&
                      gradient.get_device_index() == a.gate.get_device_index(),
                  "gated_backward: a gradient is like the result");
  if (gradient.numel() == 0) {
    // Rows without columns add nothing.
    if (grad_factor.has_value()) torch::stable::zero_(*grad_factor);
    return;
  }
  const OnDevice device(a.gate);
  const auto launch = [&](auto zero, auto n, auto of) {
    using T = decltype(zero);
    const T* const first = memory_of<T>(a.gate);
    const T* const second = a.second<T>(a.gate, a.up);
    T* const to = memory_of<T>(grad_gate);
    T* const second_to = a.second<T>(grad_gate, grad_up);
    if (a.is_flat()) {
      const int64_t num_vectors = a.num_rows * a.width / n;
      gated_flat_gradient<T, n, of><<<flat_blocks(num_vectors), FLAT_THREADS, 0, device.stream>>>(
          memory_of<T>(gradient), first, second, to, second_to, num_vectors);
    } else {
      gated_rows_gradient<T, n, of><<<ceil_divide(a.num_rows, ROW_WARPS), dim3(WARP, ROW_WARPS), 0, device.stream>>>(
          memory_of<T>(gradient), first, second, pointer_of<float>(a.factor), to, second_to,
          grad_factor.has_value() ? memory_of<float>(*grad_factor) : nullptr, a.num_rows,
          static_cast<int>(a.width / n), a.stride);
    }
  };
  with_variant(a, {&gradient, &grad_gate, grad_up.has_value() ? &*grad_up : &grad_gate}, activation, launch);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::vector<Tensor> gated_backward(const Tensor& gradient, const Tensor& gate, const std::optional<Tensor>& up,
                                   const std::optional<Tensor>& factor, int64_t activation) {
  const Arguments a(gate, up, factor);
  const Tensor grad_gate = torch::stable::empty_like(a.gate);
  std::optional<Tensor> grad_up = like(a.up), grad_factor = like(a.factor);
  write_gradients(gradient, a, activation, grad_gate, grad_up, grad_factor);
  std::vector<Tensor> results = {grad_gate};
  if (grad_up.has_value()) results.push_back(*grad_up);
  if (grad_factor.has_value()) results.push_back(*grad_factor);
  return results;
}

Tensor gated_backward_in_place(const Tensor& gradient, const Tensor& gate, const std::optional<Tensor>& up,
                               const std::optional<Tensor>& factor, int64_t activation) {
  STD_TORCH_CHECK(gate.is_contiguous() && (!up.has_value() || up->is_contiguous()),
                  "gated_backward_: gate and up are contiguous");
  const Arguments a(gate, up, factor);
  std::optional<Tensor> grad_factor = like(a.factor);
  write_gradients(gradient, a, activation, a.gate, a.up, grad_factor);
  return grad_factor.has_value() ? *grad_factor : torch::stable::new_empty(gradient, {0});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlm_kernels, CUDA, m) {
  m.impl("gated", TORCH_BOX(&gated));
  m.impl("gated_backward", TORCH_BOX(&gated_backward));
  m.impl("gated_backward_", TORCH_BOX(&gated_backward_in_place));
}

}  // namespace kernels
