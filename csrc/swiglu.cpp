// swiglu: gate * sigmoid(gate) * up, forward and backward, each in one pass.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "rows.h"

namespace cosmo_fast {
namespace {

using torch::stable::Tensor;

constexpr int64_t kGrain = 1 << 14;  // elements that are worth a thread: whole steps of any type

template <class T>
struct Swiglu {
  const T *gate, *up;
  T* out;
};

template <class T>
struct SwigluBackward {
  const T *grad, *gate, *up;
  T *dgate, *dup;
};

// sigmoid(x), 1 - sigmoid(x) and x sigmoid(x), none of them by a difference or from another's rounded value.
template <class V>
struct Sigmoid {
  V of, rest, silu;

  COSMO_INLINE explicit Sigmoid(V x) {
    V below = x < 0 ? x : -x, e = exp_bounded(below), one = V{} + 1, sum = one + e;
    of = (x < 0 ? e : one) / sum;
    rest = (x < 0 ? one : e) / sum;
    silu = (x < 0 ? x * e : x) / sum;
  }
};

template <class T>
COSMO_INLINE void forward(const Swiglu<T>& a, int64_t begin, int64_t end) {
  each_step<T>(end - begin, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
    Vector<T> gs[kParts<T>], us[kParts<T>];
    load_part(a.gate + begin + j, n, gs);
    load_part(a.up + begin + j, n, us);
    for (int p = 0; p < kParts<T>; ++p) us[p] *= Sigmoid(gs[p]).silu;
    store_part(a.out + begin + j, n, us);
  });
}

template <class T>
COSMO_INLINE void backward(const SwigluBackward<T>& a, int64_t begin, int64_t end) {
  each_step<T>(end - begin, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
    Vector<T> ds[kParts<T>], gs[kParts<T>], us[kParts<T>];
    load_part(a.grad + begin + j, n, ds);
    load_part(a.gate + begin + j, n, gs);
    load_part(a.up + begin + j, n, us);
    for (int p = 0; p < kParts<T>; ++p) {
      const Sigmoid s(gs[p]);
      gs[p] = ds[p] * us[p] * (s.of + s.silu * s.rest);
      ds[p] *= s.silu;
    }
    store_part(a.dup + begin + j, n, ds);
    store_part(a.dgate + begin + j, n, gs);
  });
}

COSMO_ISA void run(const Swiglu<float>& a, int64_t begin, int64_t end) { forward(a, begin, end); }
COSMO_ISA void run(const Swiglu<bf16>& a, int64_t begin, int64_t end) { forward(a, begin, end); }
COSMO_ISA void run(const Swiglu<double>& a, int64_t begin, int64_t end) { forward(a, begin, end); }
COSMO_ISA void run(const SwigluBackward<float>& a, int64_t begin, int64_t end) { backward(a, begin, end); }
COSMO_ISA void run(const SwigluBackward<bf16>& a, int64_t begin, int64_t end) { backward(a, begin, end); }
COSMO_ISA void run(const SwigluBackward<double>& a, int64_t begin, int64_t end) { backward(a, begin, end); }

template <class F>
void in_parallel(int64_t elements, F f) {
  torch::stable::parallel_for(0, (elements + kGrain - 1) / kGrain, 1,
                              [&](int64_t begin, int64_t end) { f(begin * kGrain, std::min(end * kGrain, elements)); });
}

Tensor swiglu(const Tensor& gate, const Tensor& up) {
  check_like(gate, "gate", gate);
  check_like(up, "up", gate);
  Tensor out = torch::stable::empty_like(gate);
  by_type(gate, [&](auto element, auto) {
    using T = decltype(element);
    const Swiglu<T> a{data<const T>(gate), data<const T>(up), data<T>(out)};
    in_parallel(gate.numel(), [&](int64_t begin, int64_t end) { run(a, begin, end); });
  });
  return out;
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& grad, const Tensor& gate, const Tensor& up) {
  check_like(gate, "gate", gate);
  check_like(up, "up", gate);
  check_like(grad, "grad", gate);
  Tensor dgate = torch::stable::empty_like(gate), dup = torch::stable::empty_like(gate);
  by_type(gate, [&](auto element, auto) {
    using T = decltype(element);
    const SwigluBackward<T> a{data<const T>(grad), data<const T>(gate), data<const T>(up), data<T>(dgate),
                              data<T>(dup)};
    in_parallel(gate.numel(), [&](int64_t begin, int64_t end) { run(a, begin, end); });
  });
  return {dgate, dup};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cosmo_fast, CPU, m) {
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
}

}  // namespace cosmo_fast
