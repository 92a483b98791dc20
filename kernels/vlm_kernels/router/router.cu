// Launches of the router: a few values of each token and expert are read and written once, 1 us for 8192 tokens and 128
// experts in either direction, so that one launch in place of ten is what counts. Not measured on a GPU yet.
#include "csrc/launch.h"
#include "csrc/partial_sums.cuh"
#include "router/router.cuh"

namespace kernels {
namespace {

// Warps that sum over tokens: a token or two for each of them in a short row, and 4 MiB of partial sums at most.
constexpr int64_t MAX_SUM_BLOCKS = 128;

template <class T>
T* memory_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

struct Logits {
  Tensor values;
  int64_t num_tokens;
  int num_experts;

  explicit Logits(const Tensor& logits) : values(as_contiguous(logits)), num_tokens(0), num_experts(0) {
    STD_TORCH_CHECK(logits.dim() == 2 && logits.scalar_type() == ScalarType::Float, "router: logits are fp32 [T, E]");
    STD_TORCH_CHECK(logits.size(1) > 0 && logits.size(1) <= MAX_ROUTED_EXPERTS, "router: 1 to 1024 experts");
    num_tokens = logits.size(0), num_experts = static_cast<int>(logits.size(1));
  }

  unsigned blocks() const { return static_cast<unsigned>(ceil_divide(num_tokens, ROUTER_WARPS)); }

  Tensor bytes(const Tensor& given, int64_t count, const char* what) const {
    STD_TORCH_CHECK(given.scalar_type() == ScalarType::Bool && given.numel() == count, what);
    return as_contiguous(given);
  }
  Tensor chosen(const Tensor& given) const {
    return bytes(given, num_tokens * num_experts, "router: choices are bool [T, E]");
  }
  Tensor real(const Tensor& given) const { return bytes(given, num_tokens, "router: real tokens are bool [T]"); }
};

// Call f(N) with the number of logits that a lane holds.
template <class Function>
void with_lane_size(int num_experts, Function&& f) {
  if (num_experts <= WARP) return f(std::integral_constant<int, 1>{});
  if (num_experts <= 2 * WARP) return f(std::integral_constant<int, 2>{});
  if (num_experts <= 4 * WARP) return f(std::integral_constant<int, 4>{});
  if (num_experts <= 8 * WARP) return f(std::integral_constant<int, 8>{});
  if (num_experts <= 16 * WARP) return f(std::integral_constant<int, 16>{});
  f(std::integral_constant<int, 32>{});
}

const dim3 BLOCK(WARP, ROUTER_WARPS);

Tensor choose_experts(const Tensor& given, int64_t top_k) {
  const Logits logits(given);
  STD_TORCH_CHECK(top_k >= 0 && top_k <= logits.num_experts, "choose_experts: more choices than experts");
  const Tensor chosen = torch::stable::new_empty(given, {logits.num_tokens, logits.num_experts}, ScalarType::Bool);
  if (logits.num_tokens == 0) return chosen;
  const OnDevice device(given);
  with_lane_size(logits.num_experts, [&](auto n) {
    choose_top<n><<<logits.blocks(), BLOCK, 0, device.stream>>>(
        memory_of<float>(logits.values), memory_of<uint8_t>(chosen), logits.num_tokens, logits.num_experts,
        static_cast<int>(top_k));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return chosen;
}

std::tuple<Tensor, Tensor, Tensor> route(const Tensor& given, const Tensor& given_chosen, const Tensor& given_real) {
  const Logits logits(given);
  const Tensor chosen = logits.chosen(given_chosen), is_real = logits.real(given_real);
  const int num_experts = logits.num_experts;
  const Tensor weights = torch::stable::empty_like(logits.values);
  Tensor tokens = torch::stable::new_empty(given, {num_experts});
  Tensor probabilities = torch::stable::new_empty(given, {num_experts});
  if (logits.num_tokens == 0) return {weights, torch::stable::zero_(tokens), torch::stable::zero_(probabilities)};
  const OnDevice device(given);
  const int64_t blocks = std::min<int64_t>(logits.blocks(), MAX_SUM_BLOCKS), warps = blocks * ROUTER_WARPS;
  const Tensor partials = torch::stable::new_empty(given, {2 * warps * num_experts});
  with_lane_size(num_experts, [&](auto n) {
    route_tokens<n><<<static_cast<unsigned>(blocks), BLOCK, 0, device.stream>>>(
        memory_of<float>(logits.values), memory_of<uint8_t>(chosen), memory_of<uint8_t>(is_real),
        memory_of<float>(weights), memory_of<float>(partials), logits.num_tokens, num_experts);
  });
  const dim3 grid(static_cast<unsigned>(ceil_divide(num_experts, PARTIAL_COLUMNS)), 2);
  sum_partials<float><<<grid, dim3(PARTIAL_COLUMNS, PARTIAL_ROWS), 0, device.stream>>>(
      memory_of<float>(partials), memory_of<float>(tokens), memory_of<float>(probabilities), static_cast<int>(warps),
      num_experts);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {weights, tokens, probabilities};
}

Tensor route_backward(const std::optional<Tensor>& given_grad_weights,
                      const std::optional<Tensor>& given_grad_probabilities, const Tensor& given,
                      const Tensor& given_chosen, const Tensor& given_real) {
  const Logits logits(given);
  const Tensor chosen = logits.chosen(given_chosen), is_real = logits.real(given_real);
  const auto grad_weights = as_contiguous(given_grad_weights);
  const auto grad_probabilities = as_contiguous(given_grad_probabilities);
  const Tensor gradient = torch::stable::empty_like(logits.values);
  if (grad_weights.has_value()) check_same_shape(*grad_weights, gradient, "route_backward: gradient of weights");
  if (grad_probabilities.has_value()) {
    STD_TORCH_CHECK(grad_probabilities->scalar_type() == ScalarType::Float &&
                        grad_probabilities->numel() == logits.num_experts,
                    "route_backward: gradients of probabilities are fp32 [E]");
  }
  if (logits.num_tokens == 0) return gradient;
  const OnDevice device(given);
  with_lane_size(logits.num_experts, [&](auto n) {
    route_gradient<n><<<logits.blocks(), BLOCK, 0, device.stream>>>(
        pointer_of<float>(grad_weights), pointer_of<float>(grad_probabilities), memory_of<float>(logits.values),
        memory_of<uint8_t>(chosen), memory_of<uint8_t>(is_real), memory_of<float>(gradient), logits.num_tokens,
        logits.num_experts);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlm_kernels, CUDA, m) {
  m.impl("choose_experts", TORCH_BOX(&choose_experts));
  m.impl("route", TORCH_BOX(&route));
  m.impl("route_backward", TORCH_BOX(&route_backward));
}

}  // namespace kernels
