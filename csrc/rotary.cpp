// rotary: the two halves of every head turned by the token's angles, queries and keys in one call.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "rows.h"

namespace cosmo_fast {
namespace {

using torch::stable::Tensor;

template <class T, class A>
struct Rotary {
  const T* x;
  T* out;
  const A *cos, *sin;
  int64_t heads, half, row, head, cos_row, sin_row;  // the strides of x, cos and sin; out is contiguous
  A sign;
};

template <class T, class A>
COSMO_INLINE void rotate(const Rotary<T, A>& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const A* __restrict c = a.cos + i * a.cos_row, * __restrict s = a.sin + i * a.sin_row;
    for (int64_t h = 0; h < a.heads; ++h) {
      const T* __restrict x = a.x + i * a.row + h * a.head, * __restrict y = x + a.half;
      T* __restrict to = a.out + (i * a.heads + h) * 2 * a.half, * __restrict other = to + a.half;
      for (int64_t j = 0; j < a.half; ++j) {
        const A first = load(x[j]), second = load(y[j]), sine = s[j] * a.sign;
        store(to + j, first * c[j] - second * sine);
        store(other + j, second * c[j] + first * sine);
      }
    }
  }
}

COSMO_ISA void run(const Rotary<float, float>& a, int64_t begin, int64_t end) { rotate(a, begin, end); }
COSMO_ISA void run(const Rotary<bf16, float>& a, int64_t begin, int64_t end) { rotate(a, begin, end); }
COSMO_ISA void run(const Rotary<double, double>& a, int64_t begin, int64_t end) { rotate(a, begin, end); }

Tensor turned(const Tensor& x, const Tensor& cos, const Tensor& sin, bool inverse) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 3 && x.size(2) % 2 == 0 && (x.size(2) == 0 || x.stride(2) == 1),
                  "q and k must be CPU tensors (T, heads, D) with contiguous elements and D even");
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)});
  by_type(x, [&](auto element, auto number) {
    using T = decltype(element);
    using A = decltype(number);
    for (const Tensor* t : {&cos, &sin}) {
      STD_TORCH_CHECK(t->is_cpu() && t->dim() == 2 && t->size(0) == x.size(0) && t->size(1) == x.size(2) &&
                          (t->size(1) == 0 || t->stride(1) == 1) && t->scalar_type() == statistics_type<A>,
                      "cos and sin must be CPU tensors (T, D) of the statistics' dtype");
    }
    const Rotary<T, A> a{data<const T>(x), data<T>(out),  data<const A>(cos), data<const A>(sin),
                         x.size(1),        x.size(2) / 2, x.stride(0),        x.stride(1),
                         cos.stride(0),    sin.stride(0), A(inverse ? -1 : 1)};
    const int64_t grain = 1 + (1 << 15) / std::max<int64_t>(1, x.size(1) * x.size(2));  // rows that are worth a thread
    torch::stable::parallel_for(0, x.size(0), grain, [&](int64_t begin, int64_t end) { run(a, begin, end); });
  });
  return out;
}

std::tuple<Tensor, Tensor> rotary(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                                  bool inverse) {
  return {turned(q, cos, sin, inverse), turned(k, cos, sin, inverse)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cosmo_fast, CPU, m) { m.impl("rotary", TORCH_BOX(&rotary)); }

}  // namespace cosmo_fast
