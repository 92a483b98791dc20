// Launch and registration of the operators in kernels/rope.
//
// Bound by memory. A forward pass reads and writes every head once; a backward pass reads heads and gradients and
// writes once: for 8192 tokens of Qwen3-VL 8B 160 and 240 MiB, the floor. Tables and 1/rms add 4 MiB, read once for
// each tensor and slice of heads; weights stay in L1. Heads of 128 bf16 take 8 lanes, each 16 bytes of either half: a
// warp reads 1 KiB per round of heads, a forward pass one round ahead, a backward pass of two tensors. With 24 and 16
// warps on a multiprocessor (80 and 128 registers) that is about the 25 kB under way that 4 TB/s take. Such a round is
// 280 and 450 instructions, where memory leaves time for some 480 and 700. Four warps share a block: they need each
// other only for the weights' gradients, once, at its end. With such gradients blocks take many tokens each, so that
// few partial sums go through memory. Not measured on a GPU yet.
#include "csrc/launch.h"
#include "csrc/partial_sums.cuh"
#include "rope/rope.cuh"

namespace kernels::rope {
namespace {

constexpr int BLOCKS_PER_MULTIPROCESSOR = 8;
constexpr int64_t UNLIMITED = int64_t{1} << 40;

using Optional = std::optional<Tensor>;

// Call f(std::integral_constant<int, N>) with the largest N that alignment allows.
template <class T, class Table, int N = VECTOR<T>, class Function>
void with_vectors(const Alignment& alignment, const Rotation<Table>& rotation, Function&& f) {
  if constexpr (N == 1) {
    f(std::integral_constant<int, 1>());
  } else if (alignment.template allows<T, Table, N>(rotation)) {
    f(std::integral_constant<int, N>());
  } else {
    with_vectors<T, Table, N / 2>(alignment, rotation, f);
  }
}

template <class T>
Layout<const T> layout(const Tensor& x) {
  const int64_t tokens = x.dim() - 2;
  return {static_cast<const T*>(x.data_ptr()), x.stride(0), tokens == 2 ? x.stride(1) : 0, x.stride(tokens)};
}

void check(const Tensor& q, const Tensor& k, const Tensor& cosine, const Tensor& sine, const Optional& scale,
           const Optional& q_weight, const Optional& k_weight, int64_t sections) {
  STD_TORCH_CHECK(q.dim() == k.dim() && (q.dim() == 3 || q.dim() == 4),
                  "queries and keys have one or two token dimensions");
  const int64_t dims = q.dim(), head_dim = q.size(dims - 1);
  STD_TORCH_CHECK(cosine.dim() == dims - 1 && sine.dim() == dims - 1, "a table is [tokens, rotated / 2]");
  for (int64_t dim = 0; dim < dims - 2; ++dim) {
    const int64_t size = q.size(dim);
    STD_TORCH_CHECK(k.size(dim) == size && cosine.size(dim) == size && sine.size(dim) == size,
                    "queries, keys and the table have the same tokens");
  }
  const int64_t pairs = cosine.size(dims - 2);
  STD_TORCH_CHECK(k.size(dims - 1) == head_dim && head_dim % 2 == 0 && head_dim <= MAX_HEAD_DIM,
                  "heads of queries and keys are equally large, even, and at most 512 elements");
  STD_TORCH_CHECK(sine.size(dims - 2) == pairs && 2 * pairs <= head_dim && pairs > 0 && sections > 0 &&
                      pairs % sections == 0,
                  "a table has equal sections, of at most the head's elements together");
  STD_TORCH_CHECK(q.scalar_type() == k.scalar_type() && cosine.scalar_type() == sine.scalar_type() &&
                      (cosine.scalar_type() == q.scalar_type() || cosine.scalar_type() == ScalarType::Float),
                  "queries and keys have one dtype, the table the same or fp32");
  STD_TORCH_CHECK(!scale.has_value() || (scale->scalar_type() == cosine.scalar_type() &&
                                         scale->numel() * pairs == cosine.numel()),
                  "a scale is one number of the table's dtype for each token");
  for (const Optional* weight : {&q_weight, &k_weight}) {
    STD_TORCH_CHECK(!weight->has_value() ||
                        ((*weight)->numel() == head_dim && (*weight)->scalar_type() == q.scalar_type()),
                    "a norm's weight has the size and dtype of a head");
  }
}

template <class T, class Table>
Rotation<Table> rotation_of(
    const Tensor& q, const Tensor& k, const Tensor& cosine, const Tensor& sine, int64_t sections) {
  Rotation<Table> rotation{};
  const int64_t dims = q.dim();
  const int64_t tokens = dims == 4 ? q.size(0) * q.size(1) : q.size(0);
  // A warp's number, and the first beyond the last warp's work, are int.
  STD_TORCH_CHECK(tokens * (q.size(dims - 2) + k.size(dims - 2)) < (int64_t{1} << 30), "too many tokens and heads");
  rotation.cosine = static_cast<const Table*>(cosine.data_ptr());
  rotation.sine = static_cast<const Table*>(sine.data_ptr());
  rotation.tokens = static_cast<int>(tokens);
  rotation.inner_tokens = dims == 4 ? static_cast<int>(q.size(1)) : 1;
  rotation.half_dim = static_cast<int>(q.size(dims - 1) / 2);
  rotation.inverse_dim = 1.0f / static_cast<float>(q.size(dims - 1));
  rotation.rotated_pairs = static_cast<int>(cosine.size(dims - 2));
  rotation.section_pairs = static_cast<int>(rotation.rotated_pairs / sections);
  return rotation;
}

Tensor empty_heads(const Tensor& x) {
  const auto sizes = x.sizes();
  return torch::stable::new_empty(x, std::vector<int64_t>(sizes.begin(), sizes.end()));
}

Tensor head_contiguous(const Tensor& x) { return x.stride(x.dim() - 1) == 1 ? x : as_contiguous(x); }

// Call f(T{}, Table{}) with the element types of queries and of the table.
template <class Function>
void dispatch_both(const Tensor& q, const Tensor& table, Function&& f) {
  dispatch(q, [&](auto element) {
    if (table.scalar_type() == q.scalar_type()) {
      f(element, element);
    } else {
      f(element, float{});
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_on_device(
    Tensor q, Tensor k, Optional q_weight, Optional k_weight, Tensor cosine, Tensor sine, Optional scale,
    std::optional<double> eps, bool zero_centered, int64_t sections) {
  check(q, k, cosine, sine, scale, q_weight, k_weight, sections);
  auto rstd_like = [&](const Tensor& x) {
    std::vector<int64_t> sizes{0};
    if (eps.has_value()) {
      sizes.assign(x.sizes().begin(), x.sizes().end());
      sizes.back() = 1;
    }
    return torch::stable::new_empty(x, sizes, ScalarType::Float);
  };
  Tensor q_out = empty_heads(q), k_out = empty_heads(k), q_rstd = rstd_like(q), k_rstd = rstd_like(k);
  if (cosine.numel() == 0) return {q_out, k_out, q_rstd, k_rstd};
  const OnDevice device(q);
  q = head_contiguous(q), k = head_contiguous(k);
  cosine = as_contiguous(cosine), sine = as_contiguous(sine), scale = as_contiguous(scale);
  q_weight = as_contiguous(q_weight), k_weight = as_contiguous(k_weight);
  dispatch_both(q, cosine, [&](auto element, auto table) {
    using T = decltype(element);
    using Table = decltype(table);
    Rotation<Table> rotation = rotation_of<T, Table>(q, k, cosine, sine, sections);
    Alignment alignment;
    rotation.has_norm = eps.has_value();
    rotation.eps = static_cast<float>(eps.value_or(0.0));
    rotation.weight_offset = zero_centered ? 1.0f : 0.0f;
    auto side = [&](const Tensor& x, const Tensor& y, const Tensor& rstd, const Optional& weight,
                    const Optional& factor) {
      alignment.add(layout<T>(x));
      alignment.add(pointer_of<T>(weight));
      return Forward<T, Table>{layout<T>(x), static_cast<T*>(y.data_ptr()), static_cast<float*>(rstd.data_ptr()),
                               pointer_of<T>(weight), pointer_of<Table>(factor), static_cast<int>(x.size(x.dim() - 2))};
    };
    Both<Forward<T, Table>> both{
        side(q, q_out, q_rstd, q_weight, scale), side(k, k_out, k_rstd, k_weight, std::nullopt)};
    with_vectors<T, Table>(alignment, rotation, [&](auto vector) {
      constexpr int N = decltype(vector)::value;
      divide<T, N>(rotation, both, UNLIMITED);
      const int blocks = both.at[0].blocks + both.at[1].blocks;
      rope_forward<T, Table, N><<<blocks, WARPS * WARP, 0, device.stream>>>(both, rotation);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return {q_out, k_out, q_rstd, k_rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_on_device(
    Tensor q_grad, Tensor k_grad, Tensor q, Tensor k, Tensor q_rstd, Tensor k_rstd, Optional q_weight,
    Optional k_weight, Tensor cosine, Tensor sine, Optional scale, bool zero_centered, int64_t sections) {
  check(q, k, cosine, sine, scale, q_weight, k_weight, sections);
  check_same_shape(q_grad, q, "gradient of queries");
  check_same_shape(k_grad, k, "gradient of keys");
  Tensor q_result = empty_heads(q), k_result = empty_heads(k);
  const bool has_norm = q_rstd.dim() == q.dim();
  const bool has_weights = has_norm && (q_weight.has_value() || k_weight.has_value());
  const int64_t head_dim = q.size(q.dim() - 1);
  auto weight_grad_like = [&](const Optional& weight) {
    return has_norm && weight.has_value() ? torch::stable::new_empty(*weight, {head_dim})
                                          : torch::stable::new_empty(q, {0}, ScalarType::Float);
  };
  Tensor weight_grads[2] = {weight_grad_like(q_weight), weight_grad_like(k_weight)};
  if (cosine.numel() == 0) {
    for (Tensor& sums : weight_grads) torch::stable::zero_(sums);
    return {q_result, k_result, weight_grads[0], weight_grads[1]};
  }
  const OnDevice device(q);
  q = head_contiguous(q), k = head_contiguous(k);
  q_grad = head_contiguous(q_grad), k_grad = head_contiguous(k_grad);
  cosine = as_contiguous(cosine), sine = as_contiguous(sine), scale = as_contiguous(scale);
  q_weight = as_contiguous(q_weight), k_weight = as_contiguous(k_weight);
  dispatch_both(q, cosine, [&](auto element, auto table) {
    using T = decltype(element);
    using Table = decltype(table);
    Rotation<Table> rotation = rotation_of<T, Table>(q, k, cosine, sine, sections);
    Alignment alignment;
    rotation.has_norm = has_norm;
    rotation.weight_offset = zero_centered ? 1.0f : 0.0f;
    auto side = [&](const Tensor& x, const Tensor& grad, const Tensor& x_grad, const Tensor& rstd,
                    const Optional& weight, const Optional& factor) {
      alignment.add(layout<T>(x));
      alignment.add(layout<T>(grad));
      alignment.add(pointer_of<T>(weight));
      return Backward<T, Table>{layout<T>(x), layout<T>(grad), static_cast<T*>(x_grad.data_ptr()),
                                static_cast<const float*>(rstd.data_ptr()), pointer_of<T>(weight), nullptr,
                                pointer_of<Table>(factor), static_cast<int>(x.size(x.dim() - 2))};
    };
    Both<Backward<T, Table>> both{
        side(q, q_grad, q_result, q_rstd, q_weight, scale), side(k, k_grad, k_result, k_rstd, k_weight, std::nullopt)};
    with_vectors<T, Table>(alignment, rotation, [&](auto vector) {
      constexpr int N = decltype(vector)::value;
      const int64_t resident = int64_t{BLOCKS_PER_MULTIPROCESSOR} * device.multiprocessors();
      divide<T, N>(rotation, both, has_weights ? resident : UNLIMITED);
      const int blocks = both.at[0].blocks + both.at[1].blocks;
      const Tensor partials = torch::stable::new_empty(q, {has_weights ? blocks : 0, head_dim}, ScalarType::Float);
      both.at[0].partial = static_cast<float*>(partials.data_ptr());
      both.at[1].partial = both.at[0].partial + both.at[0].blocks * head_dim;
      for (int side = 0; side < 2; ++side) {
        if (weight_grads[side].numel() == 0) both.at[side].partial = nullptr;
      }
      const size_t shared = has_weights ? WARPS * head_dim * sizeof(float) : 0;
      rope_backward<T, Table, N><<<blocks, WARPS * WARP, shared, device.stream>>>(both, rotation);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      const dim3 threads(PARTIAL_COLUMNS, PARTIAL_ROWS);
      for (int side = 0; side < 2; ++side) {
        if (weight_grads[side].numel() == 0) continue;
        sum_partials<T><<<ceil_divide(head_dim, PARTIAL_COLUMNS), threads, 0, device.stream>>>(
            both.at[side].partial, static_cast<T*>(weight_grads[side].data_ptr()), nullptr, both.at[side].blocks,
            static_cast<int>(head_dim));
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      }
    });
  });
  return {q_result, k_result, weight_grads[0], weight_grads[1]};
}

}  // namespace
}  // namespace kernels::rope

STABLE_TORCH_LIBRARY_IMPL(vlm_kernels, CUDA, m) {
  m.impl("qk_norm_rope", TORCH_BOX(&kernels::rope::forward_on_device));
  m.impl("qk_norm_rope_backward", TORCH_BOX(&kernels::rope::backward_on_device));
}
