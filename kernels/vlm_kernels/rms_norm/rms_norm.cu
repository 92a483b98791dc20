// Launches of the RMS norms.
//
// All are bound by memory: a forward pass reads and writes each tensor once (norm 2 passes over [rows, size], with a
// residual 4, between sandwiched blocks 4 where separate operations need 7), a backward pass too (3, 4, 6). A row lies in
// registers between the reductions over it, so it is read once; 1 to 4 vectors of 16 bytes per thread and tensor keep
// enough bytes on their way (some 25 kB per multiprocessor at 4 TB/s), and a row of 4096 bf16 takes 256 threads with two
// vectors, of which several fit on a multiprocessor and hide each other's barriers. Small rows share blocks of at least
// 128 threads. Backward blocks stay for many rows, as many as fit at a time, so that gradients of the weights are added
// up in shared memory and only a few hundred rows of partial sums go through memory; they ask for the next row before
// they reduce the present one. Weights, the same for every row, are read from the cache where they are used. So 64
// registers do (80 on sm_100), and two blocks fit for rows of 8192 bf16 elements (5376). Not measured on a GPU yet.
#include "csrc/launch.h"
#include "csrc/partial_sums.cuh"
#include "rms_norm/rms_norm.cuh"

namespace kernels {
namespace {

template <int N_, int CHUNKS_>
struct Shape {
  static constexpr int N = N_, CHUNKS = CHUNKS_;
};

struct Rows {
  int64_t count;
  int size;

  explicit Rows(const Tensor& x)
      : count(x.size(x.dim() - 1) ? x.numel() / x.size(x.dim() - 1) : 0), size(static_cast<int>(x.size(x.dim() - 1))) {}
};

// Threads for `vectors` of a row, and rows that share a block.
dim3 block_for(int64_t vectors, int chunks) {
  const int64_t needed = ceil_divide(vectors, std::max(chunks, 1));
  const int64_t threads = std::min<int64_t>(ceil_divide(needed, WARP) * WARP, max_threads(chunks));
  return dim3(static_cast<unsigned>(threads), static_cast<unsigned>(std::max<int64_t>(1, 128 / threads)));
}

// Call f(Shape, block) with the variant for rows of `size` elements at these addresses.
template <class T, int MAX_CHUNKS, class Function>
void for_shape(std::initializer_list<const void*> pointers, int size, Function&& f) {
  constexpr int N = VECTOR<T>;
  if (is_vectorizable(pointers, size, sizeof(T))) {
    const int vectors = size / N;
    if (vectors <= max_threads(1)) return f(Shape<N, 1>{}, block_for(vectors, 1));
    if (vectors <= 2 * max_threads(2)) return f(Shape<N, 2>{}, block_for(vectors, 2));
    if constexpr (MAX_CHUNKS == 4) {
      if (vectors <= 4 * max_threads(4)) return f(Shape<N, 4>{}, block_for(vectors, 4));
    }
    return f(Shape<N, 0>{}, block_for(vectors, 0));
  }
  f(Shape<1, 0>{}, block_for(size, 0));
}

void check_weight(const std::optional<Tensor>& weight, const Tensor& x, int size) {
  if (!weight.has_value()) return;
  STD_TORCH_CHECK(weight->dim() == 1 && weight->size(0) == size && weight->scalar_type() == x.scalar_type() &&
                      weight->get_device_index() == x.get_device_index(),
                  "rms_norm: a weight has one element for each of a row, of the same dtype and on the same device");
}

template <class T>
T* memory_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// x, then norm(x) or (residual + x, norm(residual + x)).
void forward(const Tensor& x, const Tensor* residual, const std::optional<Tensor>& given_weight, Tensor* sum,
             const Tensor& normed, double eps, bool zero_centered) {
  const Rows rows(x);
  check_weight(given_weight, x, rows.size);
  const auto weight = as_contiguous(given_weight);
  if (rows.count == 0) return;
  const OnDevice device(x);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    const T* const from = memory_of<T>(x);
    const T* const addend = residual ? memory_of<T>(*residual) : nullptr;
    T* const total = sum ? memory_of<T>(*sum) : nullptr;
    const T* const factors = pointer_of<T>(weight);
    for_shape<T, 4>({from, addend, total, factors, normed.data_ptr()}, rows.size, [&](auto shape, dim3 block) {
      using S = decltype(shape);
      rms_norm_forward<T, S::N, S::CHUNKS><<<ceil_divide(rows.count, block.y), block, 0, device.stream>>>(
          from, addend, factors, total, memory_of<T>(normed), rows.count, rows.size, eps, zero_centered ? 1.0f : 0.0f);
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// residual + norm(x), and where `normed` is given, the norm of that.
void add_forward(const Tensor& x, const Tensor& residual, const std::optional<Tensor>& given_post_weight,
                 const std::optional<Tensor>& given_weight, const Tensor& sum, const Tensor* normed, double eps,
                 bool zero_centered) {
  const Rows rows(x);
  check_weight(given_post_weight, x, rows.size);
  check_weight(given_weight, x, rows.size);
  const auto post_weight = as_contiguous(given_post_weight), weight = as_contiguous(given_weight);
  if (rows.count == 0) return;
  const OnDevice device(x);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    T* const to = normed ? memory_of<T>(*normed) : nullptr;
    const T* const post = pointer_of<T>(post_weight);
    const T* const factors = pointer_of<T>(weight);
    const std::initializer_list<const void*> all = {x.data_ptr(), residual.data_ptr(), post, factors, sum.data_ptr(), to};
    for_shape<T, 4>(all, rows.size, [&](auto shape, dim3 block) {
      using S = decltype(shape);
      rms_norm_add_forward<T, S::N, S::CHUNKS><<<ceil_divide(rows.count, block.y), block, 0, device.stream>>>(
          memory_of<T>(x), memory_of<T>(residual), post, factors, memory_of<T>(sum), to, rows.count, rows.size, eps,
          zero_centered ? 1.0f : 0.0f);
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor rms_norm(const Tensor& given_x, const std::optional<Tensor>& weight, double eps, bool zero_centered) {
  const Tensor x = as_contiguous(given_x);
  const Tensor normed = torch::stable::empty_like(x);
  forward(x, nullptr, weight, nullptr, normed, eps, zero_centered);
  return normed;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& given_x, const Tensor& given_residual,
                                        const std::optional<Tensor>& weight, double eps, bool zero_centered) {
  check_same_shape(given_x, given_residual, "add_rms_norm");
  const Tensor x = as_contiguous(given_x), residual = as_contiguous(given_residual);
  Tensor sum = torch::stable::empty_like(x);
  const Tensor normed = torch::stable::empty_like(x);
  forward(x, &residual, weight, &sum, normed, eps, zero_centered);
  return {sum, normed};
}

Tensor rms_norm_add(const Tensor& given_x, const Tensor& given_residual, const std::optional<Tensor>& weight, double eps,
                    bool zero_centered) {
  check_same_shape(given_x, given_residual, "rms_norm_add");
  const Tensor x = as_contiguous(given_x), residual = as_contiguous(given_residual);
  const Tensor sum = torch::stable::empty_like(x);
  add_forward(x, residual, weight, std::nullopt, sum, nullptr, eps, zero_centered);
  return sum;
}

std::tuple<Tensor, Tensor> rms_norm_add_rms_norm(const Tensor& given_x, const Tensor& given_residual,
                                                 const std::optional<Tensor>& post_weight,
                                                 const std::optional<Tensor>& weight, double eps, bool zero_centered) {
  check_same_shape(given_x, given_residual, "rms_norm_add_rms_norm");
  const Tensor x = as_contiguous(given_x), residual = as_contiguous(given_residual);
  const Tensor sum = torch::stable::empty_like(x), normed = torch::stable::empty_like(x);
  add_forward(x, residual, post_weight, weight, sum, &normed, eps, zero_centered);
  return {sum, normed};
}

// As many blocks as run at a time, and not more than there are rows for; allows the kernel its dynamic shared memory.
template <class Kernel>
unsigned persistent_blocks(Kernel kernel, dim3 block, int shared_bytes, int64_t num_rows, const OnDevice& device) {
  constexpr int ALLOWED = 40 << 10;  // 48 KiB without asking, less what kernels have statically
  if (shared_bytes > ALLOWED) {
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  }
  int per_multiprocessor = 0;
  STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, block.x * block.y,
                                                               shared_bytes));
  const int64_t resident = static_cast<int64_t>(std::max(per_multiprocessor, 1)) * device.multiprocessors();
  return static_cast<unsigned>(std::min(resident, ceil_divide(num_rows, block.y)));
}

Tensor gradient_like(const std::optional<Tensor>& weight, const Tensor& x, bool is_needed) {
  return weight.has_value() && is_needed ? torch::stable::empty_like(*weight) : torch::stable::new_empty(x, {0});
}

// Bytes in which a block holds its sums for the gradients of `weights` weights.
template <class Shape>
int sums_bytes(dim3 block, int weights) {
  return weights * weight_gradient_floats<Shape::N, Shape::CHUNKS>(block.x * block.y) * static_cast<int>(sizeof(float));
}

// Add up partial sums [weights, groups, size] into one or two gradients of weights; empty ones are left.
template <class T>
void sum_weights(const Tensor& partials, const Tensor& first, const Tensor* second, int groups, int size,
                 cudaStream_t stream) {
  const dim3 block(PARTIAL_COLUMNS, PARTIAL_ROWS);
  const dim3 grid(static_cast<unsigned>(ceil_divide(size, PARTIAL_COLUMNS)), second ? 2 : 1);
  const auto target = [](const Tensor* sums) { return sums && sums->numel() ? memory_of<T>(*sums) : nullptr; };
  sum_partials<T><<<grid, block, 0, stream>>>(memory_of<float>(partials), target(&first), target(second), groups, size);
}

Tensor partials_for(const Tensor& x, int64_t count) {
  return torch::stable::new_empty(x, {count}, ScalarType::Float);
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& given_gradient, const Tensor& given_x,
                                             const std::optional<Tensor>& given_weight,
                                             const std::optional<Tensor>& given_addend, double eps, bool zero_centered,
                                             bool needs_weight) {
  check_same_shape(given_gradient, given_x, "rms_norm_backward");
  const Tensor x = as_contiguous(given_x), gradient = as_contiguous(given_gradient);
  const auto weight = as_contiguous(given_weight), addend = as_contiguous(given_addend);
  const Rows rows(x);
  check_weight(weight, x, rows.size);
  if (addend.has_value()) check_same_shape(*addend, x, "rms_norm_backward");
  Tensor grad_x = torch::stable::empty_like(x), grad_weight = gradient_like(weight, x, needs_weight);
  needs_weight = needs_weight && weight.has_value();
  if (rows.count == 0) return {grad_x, torch::stable::zero_(grad_weight)};
  const OnDevice device(x);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    const T* const other = pointer_of<T>(addend);
    const T* const factors = pointer_of<T>(weight);
    const std::initializer_list<const void*> all = {x.data_ptr(), gradient.data_ptr(), other, factors, grad_x.data_ptr()};
    for_shape<T, 4>(all, rows.size, [&](auto shape, dim3 block) {
      using S = decltype(shape);
      const auto kernel = rms_norm_gradient<T, S::N, S::CHUNKS>;
      const int shared_bytes = sums_bytes<S>(block, needs_weight ? 1 : 0);
      const unsigned blocks = persistent_blocks(kernel, block, shared_bytes, rows.count, device);
      const int groups = static_cast<int>(blocks * block.y);
      const Tensor partials = partials_for(x, needs_weight ? static_cast<int64_t>(groups) * rows.size : 0);
      kernel<<<blocks, block, shared_bytes, device.stream>>>(
          memory_of<T>(gradient), memory_of<T>(x), factors, other, memory_of<T>(grad_x),
          needs_weight ? memory_of<float>(partials) : nullptr, rows.count, rows.size, eps, zero_centered ? 1.0f : 0.0f);
      if (needs_weight) sum_weights<T>(partials, grad_weight, nullptr, groups, rows.size, device.stream);
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {grad_x, grad_weight};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rms_norm_add_rms_norm_backward(
    const Tensor& given_grad_sum, const Tensor& given_grad_normed, const Tensor& given_x, const Tensor& given_sum,
    const std::optional<Tensor>& given_post_weight, const std::optional<Tensor>& given_weight, double eps,
    bool zero_centered, bool needs_weights) {
  for (const Tensor* tensor : {&given_grad_sum, &given_grad_normed, &given_sum}) {
    check_same_shape(*tensor, given_x, "rms_norm_add_rms_norm_backward");
  }
  const Tensor x = as_contiguous(given_x), sum = as_contiguous(given_sum);
  const Tensor grad_sum = as_contiguous(given_grad_sum), grad_normed = as_contiguous(given_grad_normed);
  const auto post_weight = as_contiguous(given_post_weight), weight = as_contiguous(given_weight);
  const Rows rows(x);
  check_weight(post_weight, x, rows.size);
  check_weight(weight, x, rows.size);
  Tensor grad_residual = torch::stable::empty_like(x), grad_x = torch::stable::empty_like(x);
  Tensor grad_post_weight = gradient_like(post_weight, x, needs_weights);
  Tensor grad_weight = gradient_like(weight, x, needs_weights);
  needs_weights = needs_weights && (post_weight.has_value() || weight.has_value());
  if (rows.count == 0) {
    return {grad_residual, grad_x, torch::stable::zero_(grad_post_weight), torch::stable::zero_(grad_weight)};
  }
  const OnDevice device(x);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    const T* const post = pointer_of<T>(post_weight);
    const T* const factors = pointer_of<T>(weight);
    const std::initializer_list<const void*> all = {x.data_ptr(),           sum.data_ptr(),    grad_sum.data_ptr(),
                                                    grad_normed.data_ptr(), grad_x.data_ptr(), grad_residual.data_ptr(),
                                                    post,                   factors};
    for_shape<T, 2>(all, rows.size, [&](auto shape, dim3 block) {
      using S = decltype(shape);
      const auto kernel = rms_norm_add_rms_norm_gradient<T, S::N, S::CHUNKS>;
      const int shared_bytes = sums_bytes<S>(block, needs_weights ? 2 : 0);
      const unsigned blocks = persistent_blocks(kernel, block, shared_bytes, rows.count, device);
      const int groups = static_cast<int>(blocks * block.y);
      const Tensor partials = partials_for(x, needs_weights ? 2 * static_cast<int64_t>(groups) * rows.size : 0);
      kernel<<<blocks, block, shared_bytes, device.stream>>>(
          memory_of<T>(grad_sum), memory_of<T>(grad_normed), memory_of<T>(x), memory_of<T>(sum), post, factors,
          memory_of<T>(grad_residual), memory_of<T>(grad_x), needs_weights ? memory_of<float>(partials) : nullptr,
          rows.count, rows.size, eps, zero_centered ? 1.0f : 0.0f);
      if (needs_weights) {
        sum_weights<T>(partials, grad_post_weight, &grad_weight, groups, rows.size, device.stream);
      }
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {grad_residual, grad_x, grad_post_weight, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlm_kernels, CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("rms_norm_add", TORCH_BOX(&rms_norm_add));
  m.impl("rms_norm_add_rms_norm", TORCH_BOX(&rms_norm_add_rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  m.impl("rms_norm_add_rms_norm_backward", TORCH_BOX(&rms_norm_add_rms_norm_backward));
}

}  // namespace kernels
