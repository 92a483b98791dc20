// Launches of the permutation of tokens by experts.
//
// Rows are bound by memory: tokens are read (or written) once, rows written (or read) once; of 16 bytes of a row, 4 bytes
// of index are read once per row. A block has 256 threads along a token (2048 bf16 are one vector each; longer rows
// loop), or several short tokens; each thread writes all rows of its vector, or has SUM_BATCH of them on their way. The
// index is made by two launches over at most MAX_TILES tiles of the map, which is read twice (1 MiB of bytes for 8192
// tokens and 128 experts), instead of a sort of all its elements. Not measured on a GPU yet.
#include "csrc/launch.h"
#include "permute/permute.cuh"

namespace kernels {
namespace {

constexpr int MAX_TILES = 128, THREADS = 256, ROW_WARPS = 4, MAX_CHUNKS = 4096, MAX_CHUNK_BLOCKS = 64;

using Optional = std::optional<Tensor>;

template <class T>
T* memory_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

void check_matrix(const Tensor& tensor, int64_t num_rows, const char* what) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == num_rows && tensor.size(1) > 0, what);
}

void check_numbers(const Optional& tensor, int64_t count, const char* what) {
  if (!tensor.has_value()) return;
  STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Float && tensor->numel() == count, what);
}

// A permutation's tensors.
struct Given {
  Tensor entry_of_row, rows, starts;
  int64_t num_rows, num_tokens;
  int num_experts;

  Given(const Tensor& entry_of_row, const Tensor& rows, const Tensor& starts, int64_t num_experts)
      : entry_of_row(as_contiguous(entry_of_row)),
        rows(as_contiguous(rows)),
        starts(as_contiguous(starts)),
        num_rows(rows.numel()),
        num_tokens(starts.numel() - 1),
        num_experts(static_cast<int>(num_experts)) {
    for (const Tensor* tensor : {&entry_of_row, &rows, &starts}) {
      STD_TORCH_CHECK(tensor->dim() == 1 && tensor->scalar_type() == ScalarType::Int, "permute: an index is int32");
    }
    STD_TORCH_CHECK(entry_of_row.numel() == num_rows && num_tokens >= 0 && num_experts > 0, "permute: not an index");
  }
};

// Threads along a row of `vectors`, and rows of a block.
dim3 block_for(int64_t vectors) {
  const int64_t along = std::min<int64_t>(ceil_divide(vectors, WARP) * WARP, THREADS);
  return dim3(static_cast<unsigned>(along), static_cast<unsigned>(THREADS / along));
}

// Call f(T{}, N) where all pointers are to rows of `size` elements.
template <class Function>
void with_vectors(const Tensor& x, std::initializer_list<const void*> pointers, int64_t size, Function&& f) {
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    if (is_vectorizable(pointers, size, sizeof(T))) return f(zero, std::integral_constant<int, VECTOR<T>>{});
    f(zero, std::integral_constant<int, 1>{});
  });
}

Tensor numbers_like(const Tensor& x, const Optional& given, const std::vector<int64_t>& sizes) {
  return torch::stable::new_empty(x, given.has_value() ? sizes : std::vector<int64_t>{0}, ScalarType::Float);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> expert_permutation(const Tensor& given_map, int64_t num_rows) {
  const Tensor map = as_contiguous(given_map);
  STD_TORCH_CHECK(map.dim() == 2 && map.scalar_type() == ScalarType::Bool, "expert_permutation: a map is bool [T, E]");
  const int64_t num_tokens = map.size(0), num_experts = map.size(1);
  STD_TORCH_CHECK(num_experts > 0 && num_experts <= MAX_EXPERTS, "expert_permutation: 1 to 1024 experts");
  STD_TORCH_CHECK(num_tokens * num_experts < INT32_MAX, "expert_permutation: too many tokens for 32-bit indices");
  const auto empty = [&](int64_t size) { return torch::stable::new_empty(map, {size}, ScalarType::Int); };
  Tensor entry_of_row = empty(num_rows), rows = empty(num_rows), starts = empty(num_tokens + 1);
  Tensor ends = empty(num_experts);
  if (num_tokens == 0) return {entry_of_row, rows, torch::stable::zero_(starts), torch::stable::zero_(ends)};
  const int64_t tile = ceil_divide(ceil_divide(num_tokens, MAX_TILES), STEP_TOKENS) * STEP_TOKENS;
  const int64_t num_tiles = ceil_divide(num_tokens, tile);
  const Tensor counts = empty(num_tiles * num_experts);
  const OnDevice device(map);
  const RoutingMap of{memory_of<const uint8_t>(map),     memory_of<int>(counts),  static_cast<int>(num_tokens),
                      static_cast<int>(num_experts), static_cast<int>(tile), static_cast<int>(num_tiles)};
  const unsigned threads = static_cast<unsigned>(ceil_divide(num_experts, WARP) * WARP);
  const unsigned blocks = static_cast<unsigned>(num_tiles);
  expert_counts<<<blocks, threads, 0, device.stream>>>(of);
  expert_index<<<blocks, threads, 0, device.stream>>>(
      of, Index{memory_of<int>(entry_of_row), memory_of<int>(rows), memory_of<int>(starts), memory_of<int>(ends)});
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {entry_of_row, rows, starts, ends};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> chunk_permutation(const Tensor& given_ends, int64_t first_expert,
                                                             int64_t num_experts, int64_t num_rows) {
  const Tensor of_ranks = as_contiguous(given_ends);
  STD_TORCH_CHECK(of_ranks.dim() == 2 && of_ranks.scalar_type() == ScalarType::Int,
                  "chunk_permutation: ends are int32 [N, E]");
  const int64_t num_ranks = of_ranks.size(0), count = num_ranks * num_experts;
  STD_TORCH_CHECK(first_expert >= 0 && num_experts > 0 && first_expert + num_experts <= of_ranks.size(1),
                  "chunk_permutation: no such experts");
  STD_TORCH_CHECK(count > 0 && count <= MAX_CHUNKS, "chunk_permutation: 1 to 4096 chunks of rows");
  STD_TORCH_CHECK(num_rows < INT32_MAX, "chunk_permutation: too many rows for 32-bit indices");
  const auto empty = [&](int64_t size) { return torch::stable::new_empty(of_ranks, {size}); };
  const Tensor entry_of_row = empty(num_rows), rows = empty(num_rows), starts = empty(num_rows + 1);
  const Tensor ends = empty(num_experts);
  const OnDevice device(of_ranks);
  const Chunks chunks{memory_of<int>(of_ranks),       static_cast<int>(num_ranks),
                      static_cast<int>(of_ranks.size(1)), static_cast<int>(first_expert),
                      static_cast<int>(num_experts),  static_cast<int>(num_rows)};
  const int64_t blocks = std::clamp<int64_t>(ceil_divide(num_rows, THREADS), 1, MAX_CHUNK_BLOCKS);
  chunk_index<<<static_cast<unsigned>(blocks), THREADS, 2 * count * sizeof(int), device.stream>>>(
      chunks, Index{memory_of<int>(entry_of_row), memory_of<int>(rows), memory_of<int>(starts), memory_of<int>(ends)});
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {entry_of_row, rows, starts, ends};
}

// Rows of x, one for each choice.
void copy_rows(const Tensor& x, const Optional& probs, const Given& index, const Tensor& y, const Tensor& row_probs) {
  if (index.num_tokens == 0) return;
  const int64_t size = x.size(1);
  const OnDevice device(x);
  with_vectors(x, {x.data_ptr(), y.data_ptr()}, size, [&](auto zero, auto n) {
    using T = decltype(zero);
    const dim3 block = block_for(size / n);
    permute_rows<T, n><<<ceil_divide(index.num_tokens, block.y), block, 0, device.stream>>>(
        memory_of<T>(x), pointer_of<float>(probs), memory_of<int>(index.entry_of_row), memory_of<int>(index.rows),
        memory_of<int>(index.starts), memory_of<T>(y), memory_of<float>(row_probs), index.num_tokens,
        static_cast<int>(size / n));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Sums of rows of y, and the gradient of probabilities where that of rows' is given.
void add_up_rows(const Tensor& y, const Optional& weights, const Optional& grad_row_probs, const Given& index,
              const Tensor& x, const Tensor& grad_probs) {
  if (index.num_tokens == 0) return;
  const int64_t size = y.size(1);
  const OnDevice device(y);
  with_vectors(y, {x.data_ptr(), y.data_ptr()}, size, [&](auto zero, auto n) {
    using T = decltype(zero);
    const dim3 block = block_for(size / n);
    sum_rows<T, n><<<ceil_divide(index.num_tokens, block.y), block, 0, device.stream>>>(
        memory_of<T>(y), pointer_of<float>(weights), pointer_of<float>(grad_row_probs),
        memory_of<int>(index.entry_of_row), memory_of<int>(index.rows), memory_of<int>(index.starts), memory_of<T>(x),
        grad_row_probs.has_value() ? memory_of<float>(grad_probs) : nullptr, index.num_tokens,
        static_cast<int>(size / n), index.num_experts);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor> permute(const Tensor& given_x, const Optional& given_probs, const Tensor& entry_of_row,
                                   const Tensor& rows, const Tensor& starts, int64_t num_experts) {
  const Given index(entry_of_row, rows, starts, num_experts);
  const Tensor x = as_contiguous(given_x);
  const Optional probs = as_contiguous(given_probs);
  check_matrix(x, index.num_tokens, "permute: a row for each token");
  check_numbers(probs, index.num_tokens * num_experts, "permute: probabilities are fp32 [T, E]");
  const Tensor y = torch::stable::new_empty(x, {index.num_rows, x.size(1)});
  const Tensor row_probs = numbers_like(x, probs, {index.num_rows});
  copy_rows(x, probs, index, y, row_probs);
  return {y, row_probs};
}

std::tuple<Tensor, Tensor> permute_backward(const Tensor& given_gradient, const Optional& given_grad_probs,
                                            const Tensor& entry_of_row, const Tensor& rows, const Tensor& starts,
                                            int64_t num_experts) {
  const Given index(entry_of_row, rows, starts, num_experts);
  const Tensor gradient = as_contiguous(given_gradient);
  const Optional grad_row_probs = as_contiguous(given_grad_probs);
  check_matrix(gradient, index.num_rows, "permute_backward: a gradient for each row");
  check_numbers(grad_row_probs, index.num_rows, "permute_backward: gradients of probabilities are fp32 [R]");
  const Tensor grad_x = torch::stable::new_empty(gradient, {index.num_tokens, gradient.size(1)});
  const Tensor grad_probs = numbers_like(gradient, grad_row_probs, {index.num_tokens, num_experts});
  add_up_rows(gradient, std::nullopt, grad_row_probs, index, grad_x, grad_probs);
  return {grad_x, grad_probs};
}

Tensor unpermute(const Tensor& given_y, const Optional& given_weights, const Tensor& entry_of_row, const Tensor& rows,
                 const Tensor& starts, int64_t num_experts) {
  const Given index(entry_of_row, rows, starts, num_experts);
  const Tensor y = as_contiguous(given_y);
  const Optional weights = as_contiguous(given_weights);
  check_matrix(y, index.num_rows, "unpermute: rows as the permutation has");
  check_numbers(weights, index.num_rows, "unpermute: weights are fp32 [R]");
  const Tensor x = torch::stable::new_empty(y, {index.num_tokens, y.size(1)});
  add_up_rows(y, weights, std::nullopt, index, x, x);
  return x;
}

std::tuple<Tensor, Tensor> unpermute_backward(const Tensor& given_gradient, const Optional& given_y,
                                              const Optional& given_weights, const Tensor& entry_of_row,
                                              const Tensor& rows, const Tensor& starts, int64_t num_experts) {
  const Given index(entry_of_row, rows, starts, num_experts);
  const Tensor gradient = as_contiguous(given_gradient);
  check_matrix(gradient, index.num_tokens, "unpermute_backward: a gradient for each token");
  const int64_t size = gradient.size(1);
  const Tensor grad_y = torch::stable::new_empty(gradient, {index.num_rows, size});
  const Optional y = as_contiguous(given_y), weights = as_contiguous(given_weights);
  const Tensor grad_weights = numbers_like(gradient, weights, {index.num_rows});
  if (!weights.has_value()) {
    copy_rows(gradient, std::nullopt, index, grad_y, grad_weights);
    return {grad_y, grad_weights};
  }
  check_numbers(weights, index.num_rows, "unpermute_backward: weights are fp32 [R]");
  STD_TORCH_CHECK(y.has_value(), "unpermute_backward: the gradient of weights needs rows");
  check_same_shape(*y, grad_y, "unpermute_backward: rows");
  if (index.num_rows == 0) return {grad_y, grad_weights};
  const OnDevice device(gradient);
  with_vectors(gradient, {gradient.data_ptr(), y->data_ptr(), grad_y.data_ptr()}, size, [&](auto zero, auto n) {
    using T = decltype(zero);
    weighted_rows_gradient<T, n>
        <<<ceil_divide(index.num_rows, ROW_WARPS), dim3(WARP, ROW_WARPS), 0, device.stream>>>(
            memory_of<T>(gradient), memory_of<T>(*y), memory_of<float>(*weights), memory_of<int>(index.entry_of_row),
            memory_of<T>(grad_y), memory_of<float>(grad_weights), index.num_rows, static_cast<int>(size / n),
            index.num_experts);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {grad_y, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlm_kernels, CUDA, m) {
  m.impl("expert_permutation", TORCH_BOX(&expert_permutation));
  m.impl("chunk_permutation", TORCH_BOX(&chunk_permutation));
  m.impl("permute", TORCH_BOX(&permute));
  m.impl("permute_backward", TORCH_BOX(&permute_backward));
  m.impl("unpermute", TORCH_BOX(&unpermute));
  m.impl("unpermute_backward", TORCH_BOX(&unpermute_backward));
}

}  // namespace kernels
