// Blocks (d, m) of a bf16 product into rows (m, d) of the weight's gradient, on a CPU. oneDNN multiplies by a left side
// that is stored transposed at half its speed, so the product is made the other way round and its result turned.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>

#include "vocab_stats.h"

namespace cosmo_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using u16x8 = uint16_t __attribute__((vector_size(16)));
using u32x8 = uint32_t __attribute__((vector_size(32)));
using f32x8 = float __attribute__((vector_size(32)));

COSMO_INLINE void transpose8(u16x8 (&x)[8]) {  // three rounds of interleaving row i with row i + 4
#pragma GCC unroll 3
  for (int round = 0; round < 3; ++round) {
    u16x8 y[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
#ifdef __clang__
      y[2 * i] = __builtin_shufflevector(x[i], x[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
      y[2 * i + 1] = __builtin_shufflevector(x[i], x[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
#else  // which GCC has from version 12 only
      y[2 * i] = __builtin_shuffle(x[i], x[i + 4], u16x8{0, 8, 1, 9, 2, 10, 3, 11});
      y[2 * i + 1] = __builtin_shuffle(x[i], x[i + 4], u16x8{4, 12, 5, 13, 6, 14, 7, 15});
#endif
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) x[i] = y[i];
  }
}

COSMO_INLINE void put8(bf16* to, u16x8 x) { std::memcpy(to, &x, sizeof x); }
COSMO_INLINE void put8(float* to, u16x8 x) {
  f32x8 sum;
  std::memcpy(&sum, to, sizeof sum);
  sum += (f32x8)(__builtin_convertvector(x, u32x8) << 16);
  std::memcpy(to, &sum, sizeof sum);
}
COSMO_INLINE void put(bf16* to, bf16 x) { *to = x; }
COSMO_INLINE void put(float* to, bf16 x) { *to += load(x); }

template <class To>
struct Transposed {
  To* out;
  const bf16* x;
  int64_t d, m, out_stride, x_stride;
};

// Rows [begin, end) of the result, 32 × 8 at a time: whole cache lines are read, and a row's are written in turn.
template <class To>
COSMO_INLINE void add_rows(const Transposed<To>& a, int64_t begin, int64_t end) {
  const int64_t whole = a.d / 8 * 8, full = begin + (end - begin) / 8 * 8;
  for (int64_t k = 0; k < whole; k += 8) {
    for (int64_t v = begin; v < full; v += 8) {
      u16x8 block[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) std::memcpy(&block[i], a.x + (k + i) * a.x_stride + v, 16);
      transpose8(block);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) put8(a.out + (v + i) * a.out_stride + k, block[i]);
    }
  }
  for (int64_t v = begin; v < end; ++v) {
    for (int64_t k = v < full ? whole : 0; k < a.d; ++k) put(a.out + v * a.out_stride + k, a.x[k * a.x_stride + v]);
  }
}

COSMO_ISA void run(const Transposed<bf16>& a, int64_t begin, int64_t end) { add_rows(a, begin, end); }
COSMO_ISA void run(const Transposed<float>& a, int64_t begin, int64_t end) { add_rows(a, begin, end); }

template <class To>
void run_parallel(const Tensor& out, const Tensor& x) {
  Transposed<To> a{static_cast<To*>(out.mutable_data_ptr()),
                   static_cast<const bf16*>(x.const_data_ptr()),
                   x.size(0),
                   x.size(1),
                   out.stride(0),
                   x.stride(0)};
  torch::stable::parallel_for(0, (a.m + 31) / 32, 4, [&](int64_t begin, int64_t end) {
    for (int64_t v = begin * 32; v < std::min(end * 32, a.m); v += 32) run(a, v, std::min(v + 32, a.m));
  });
}

void add_transposed_(const Tensor& out, const Tensor& x) {
  STD_TORCH_CHECK(out.is_cpu() && x.is_cpu() && out.dim() == 2 && x.dim() == 2 && out.size(0) == x.size(1) &&
                      out.size(1) == x.size(0),
                  "out (m, d) and x (d, m) must be CPU matrices of transposed shapes");
  STD_TORCH_CHECK((out.size(1) < 2 || out.stride(1) == 1) && (x.size(1) < 2 || x.stride(1) == 1),
                  "the columns of out and x must be contiguous");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16, "x must be bfloat16");
  if (out.scalar_type() == ScalarType::BFloat16) return run_parallel<bf16>(out, x);
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::Float, "out must be bfloat16 (x is copied) or float32 (x is added)");
  run_parallel<float>(out, x);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cosmo_fast, CPU, m) { m.impl("add_transposed_", TORCH_BOX(&add_transposed_)); }

}  // namespace cosmo_fast
