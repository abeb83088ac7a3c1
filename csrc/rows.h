// What the elementwise ops share: contiguous rows in steps of one register, the last one padded with zeros.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <type_traits>

#include "vocab_stats.h"

namespace cosmo_fast {

// f(column, elements) for every step of a row of T; all but the last have kStep<T> elements.
template <class T, class F>
COSMO_INLINE void each_step(int64_t columns, F f) {
  int64_t j = 0;
  for (; j + kStep<T> <= columns; j += kStep<T>) f(j, kStep<T>);
  if (j < columns) f(j, columns - j);
}

template <class T>
COSMO_INLINE void load_part(const T* from, int64_t n, Vector<T> (&x)[kParts<T>]) {
  if (n == kStep<T>) return load_step(from, x);
  alignas(64) T rest[kStep<T>] = {};
  std::memcpy(rest, from, n * sizeof(T));
  load_step(rest, x);
}

// A NaN of bf16 or of the processor has its lower half empty and so outlives the rounding of store_step.
template <class T>
COSMO_INLINE void store_part(T* to, int64_t n, const Vector<T> (&x)[kParts<T>]) {
  if (n == kStep<T>) return store_step(to, x);
  alignas(64) T rest[kStep<T>];
  store_step(rest, x);
  std::memcpy(to, rest, n * sizeof(T));
}

inline void check_like(const torch::stable::Tensor& x, const char* name, const torch::stable::Tensor& like) {
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous(), name, " must be a contiguous CPU tensor");
  STD_TORCH_CHECK(x.scalar_type() == like.scalar_type() && x.dim() == like.dim(), name, " differs in shape or dtype");
  for (int64_t d = 0; d < x.dim(); ++d) STD_TORCH_CHECK(x.size(d) == like.size(d), name, " differs in shape");
}

template <class T>
T* data(const torch::stable::Tensor& x) {
  if constexpr (std::is_const_v<T>) {
    return static_cast<T*>(x.const_data_ptr());
  } else {
    return static_cast<T*>(x.mutable_data_ptr());
  }
}

template <class A>
constexpr torch::headeronly::ScalarType statistics_type =
    sizeof(A) == 8 ? torch::headeronly::ScalarType::Double : torch::headeronly::ScalarType::Float;

// f(T(), A()) for the tensor's element type and the one that its rows are worked on in.
template <class F>
auto by_type(const torch::stable::Tensor& x, F f) {
  switch (x.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return f(float(), float());
    case torch::headeronly::ScalarType::BFloat16:
      return f(bf16(), float());
    case torch::headeronly::ScalarType::Double:
      return f(double(), double());
    default:
      STD_TORCH_CHECK(false, "float32, bfloat16 or float64 is wanted");
  }
}

}  // namespace cosmo_fast
