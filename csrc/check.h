// What more than one op asks of its arguments.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

namespace cosmo_fast {

inline void check_vector(const torch::stable::Tensor& x, const char* name, int64_t n,
                         torch::headeronly::ScalarType dtype) {
  STD_TORCH_CHECK(
      x.is_cpu() && x.dim() == 1 && x.size(0) == n && x.scalar_type() == dtype && (n < 2 || x.stride(0) == 1), name,
      " must be a contiguous CPU vector of ", n, " elements of the statistics' dtype (int64 for indices)");
}

template <class A>
const A* optional_vector(const std::optional<torch::stable::Tensor>& x, const char* name, int64_t n,
                         torch::headeronly::ScalarType dtype) {
  if (!x.has_value()) return nullptr;
  check_vector(*x, name, n, dtype);
  return x->const_data_ptr<A>();
}

inline void check_matrix(const torch::stable::Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 2 && x.size(1) > 0, name, " must be a CPU matrix (N, V) with V > 0");
  STD_TORCH_CHECK(x.size(1) == 1 || x.stride(1) == 1, "the columns of ", name, " must be contiguous");
}

}  // namespace cosmo_fast
