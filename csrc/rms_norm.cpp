// rms_norm: each row over its root mean square, times a weight. Both directions read a row from memory once.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "check.h"
#include "rows.h"

namespace cosmo_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kRows = 16;  // whose parts of the weight's gradient are summed together, with any number of threads
template <class A>
constexpr int64_t kLanes = 64 / sizeof(A);

template <class T, class A>
struct Norm {
  const T *x, *weight;
  T* out;
  A* scale;  // 1 / root mean square of each row
  int64_t rows, columns;
  double eps;
};

template <class T, class A>
struct NormBackward {
  const T *grad, *x, *weight;
  const A* scale;
  T* dx;
  A* sums;  // (blocks of kRows, whole steps of columns, each as load_step has it) of the weight's gradient, or null
  int64_t rows, columns;
  int64_t padded() const { return (columns + kStep<T> - 1) / kStep<T> * kStep<T>; }
};

COSMO_INLINE f32x16 rounded(f32x16 x, bf16) {
  u32x16 bits = (u32x16)x;
  return (f32x16)((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u);
}
template <class V, class T>
COSMO_INLINE V rounded(V x, T) {
  return x;
}

template <class T, class A>
COSMO_INLINE void norm_rows(const Norm<T, A>& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T* x = a.x + i * a.columns;
    T* out = a.out + i * a.columns;
    Vector<T> sums[kParts<T>] = {};
    each_step<T>(a.columns, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
      Vector<T> xs[kParts<T>];
      load_part(x + j, n, xs);
      for (int p = 0; p < kParts<T>; ++p) sums[p] += xs[p] * xs[p];
    });
    double square = 0;
    for (const Vector<T>& sum : sums) square += sum_of(sum);
    const A scale = a.scale[i] = A(1 / std::sqrt(square / double(a.columns) + a.eps));
    each_step<T>(a.columns, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
      Vector<T> xs[kParts<T>], ws[kParts<T>];
      load_part(x + j, n, xs);
      load_part(a.weight + j, n, ws);
      for (int p = 0; p < kParts<T>; ++p) xs[p] = rounded(xs[p] * scale, T()) * ws[p];
      store_part(out + j, n, xs);
    });
  }
}

// dx = s (g w - h mean(g w h)), dw = Σ g h, h = s x.
template <class T, class A>
COSMO_INLINE void norm_back_rows(const NormBackward<T, A>& a, int64_t block) {
  A* sums = a.sums ? a.sums + block * a.padded() : nullptr;
  if (sums) std::fill_n(sums, a.padded(), A(0));
  for (int64_t i = block * kRows; i < std::min(a.rows, (block + 1) * kRows); ++i) {
    const T *g = a.grad + i * a.columns, *x = a.x + i * a.columns;
    T* dx = a.dx + i * a.columns;
    const A scale = a.scale[i];
    Vector<T> dots[kParts<T>] = {};
    each_step<T>(a.columns, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
      Vector<T> gs[kParts<T>], xs[kParts<T>], ws[kParts<T>];
      load_part(g + j, n, gs);
      load_part(x + j, n, xs);
      load_part(a.weight + j, n, ws);
      for (int p = 0; p < kParts<T>; ++p) {
        gs[p] *= xs[p] * scale;
        dots[p] += gs[p] * ws[p];
        if (!sums) continue;
        Vector<T> sum;
        std::memcpy(&sum, sums + j + p * kLanes<A>, 64);
        sum += gs[p];
        std::memcpy(sums + j + p * kLanes<A>, &sum, 64);
      }
    });
    double dot = 0;
    for (const Vector<T>& x : dots) dot += sum_of(x);
    const A mean = A(dot / double(a.columns));
    each_step<T>(a.columns, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
      Vector<T> gs[kParts<T>], xs[kParts<T>], ws[kParts<T>];
      load_part(g + j, n, gs);
      load_part(x + j, n, xs);
      load_part(a.weight + j, n, ws);
      for (int p = 0; p < kParts<T>; ++p) gs[p] = scale * (gs[p] * ws[p] - xs[p] * scale * mean);
      store_part(dx + j, n, gs);
    });
  }
}

COSMO_ISA void run(const Norm<float, float>& a, int64_t begin, int64_t end) { norm_rows(a, begin, end); }
COSMO_ISA void run(const Norm<bf16, float>& a, int64_t begin, int64_t end) { norm_rows(a, begin, end); }
COSMO_ISA void run(const Norm<double, double>& a, int64_t begin, int64_t end) { norm_rows(a, begin, end); }
COSMO_ISA void run(const NormBackward<float, float>& a, int64_t block) { norm_back_rows(a, block); }
COSMO_ISA void run(const NormBackward<bf16, float>& a, int64_t block) { norm_back_rows(a, block); }
COSMO_ISA void run(const NormBackward<double, double>& a, int64_t block) { norm_back_rows(a, block); }

// The blocks' sums, added in their order.
template <class T, class A>
void add_blocks(const NormBackward<T, A>& a, int64_t blocks, T* dweight) {
  torch::stable::parallel_for(0, a.padded() / kStep<T>, 16, [&](int64_t begin, int64_t end) {
    for (int64_t step = begin; step < end; ++step) {
      double total[kStep<T>] = {};
      for (int64_t b = 0; b < blocks; ++b) {
        const A* from = a.sums + b * a.padded() + step * kStep<T>;
        for (int64_t k = 0; k < kStep<T>; ++k) total[k] += double(from[k]);
      }
      const int64_t first = step * kStep<T>, n = std::min(kStep<T>, a.columns - first);
      for (int64_t k = 0; k < n; ++k) {
        store(dweight + first + k, A(total[k / kParts<T> + k % kParts<T> * kLanes<A>]));
      }
    }
  });
}

struct Shape {
  int64_t rows, columns;
  int64_t grain() const { return 1 + (1 << 15) / columns; }  // rows that are worth a thread
};

Shape check(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() > 0 && x.size(x.dim() - 1) > 0, "x must be (..., d) with d > 0");
  const int64_t columns = x.size(x.dim() - 1);
  check_like(x, "x", x);
  check_vector(weight, "weight", columns, x.scalar_type());
  return {x.numel() / columns, columns};
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const Shape n = check(x, weight);
  Tensor out = torch::stable::empty_like(x);
  return by_type(x, [&](auto element, auto number) {
    using T = decltype(element);
    using A = decltype(number);
    Tensor scale = torch::stable::new_empty(x, {n.rows}, statistics_type<A>);
    const Norm<T, A> a{data<const T>(x), data<const T>(weight), data<T>(out), data<A>(scale), n.rows, n.columns, eps};
    torch::stable::parallel_for(0, n.rows, n.grain(), [&](int64_t begin, int64_t end) { run(a, begin, end); });
    return std::tuple{out, scale};
  });
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                             const Tensor& scale, bool weight_wanted) {
  const Shape n = check(x, weight);
  check_like(grad, "grad", x);
  Tensor dx = torch::stable::empty_like(x);
  Tensor dweight = torch::stable::new_empty(x, {weight_wanted ? n.columns : 0});
  return by_type(x, [&](auto element, auto number) {
    using T = decltype(element);
    using A = decltype(number);
    check_vector(scale, "scale", n.rows, statistics_type<A>);
    NormBackward<T, A> a{data<const T>(grad),
                         data<const T>(x),
                         data<const T>(weight),
                         data<const A>(scale),
                         data<T>(dx),
                         nullptr,
                         n.rows,
                         n.columns};
    const int64_t blocks = (n.rows + kRows - 1) / kRows;
    Tensor sums = torch::stable::new_empty(x, {weight_wanted ? blocks * a.padded() : 0}, statistics_type<A>);
    if (weight_wanted) a.sums = data<A>(sums);
    torch::stable::parallel_for(0, blocks, 1 + n.grain() / kRows, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) run(a, block);
    });
    if (weight_wanted) add_blocks(a, blocks, data<T>(dweight));
    return std::tuple{dx, dweight};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cosmo_fast, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace cosmo_fast
