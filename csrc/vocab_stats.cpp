// vocab_stats: one read of a row of logits gives log-probability and entropy. vocab_grad_: one pass writes the gradient
// over the logits. y = softcap * tanh(z / softcap) / temperature throughout; softcap 0 means none.
#include "vocab_stats.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <tuple>

namespace cosmo_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlock = 2048;  // logits of one block stay in the first-level cache between its two loops

// Asks for the block after this one. Reading and writing one stream in place runs at the latency of memory otherwise:
// with this and a scratch block between loads and stores, the gradient pass went from 1.57 to 0.59 ns an element
// (bf16).
template <int kWrite, class T>
COSMO_INLINE void prefetch(const T* block, int64_t length) {
  for (int64_t j = 0; j < length; j += 64 / int64_t(sizeof(T))) __builtin_prefetch(block + kBlock + j, kWrite, 2);
}

template <class T, class A>
struct StatsRows {
  const T* logits;
  const int64_t* targets;
  const A* temperature;  // null: 1
  A *logp, *entropy, *other_max, *other_sum;
  int64_t columns, stride;
  A softcap;
};

// Adds columns [begin, end) to the running (max, sum, moment) of y.
template <bool kCap, class T, class A>
COSMO_INLINE void accumulate(const T* row, int64_t begin, int64_t end, A cap, A inverse_cap, A inverse_t, A* scratch,
                             double& max, double& sum, double& moment) {
  for (int64_t start = begin; start < end; start += kBlock) {
    int64_t length = std::min(kBlock, end - start);
    const T* block = row + start;
    prefetch<0>(block, length);
    A top = -std::numeric_limits<A>::infinity();
    if constexpr (kCap) {
#pragma omp simd reduction(max : top)
      for (int64_t j = 0; j < length; ++j) {
        A y = cap * tanh_fast(load(block[j]) * inverse_cap);
        scratch[j] = y;
        top = y > top ? y : top;
      }
    } else {
#pragma omp simd reduction(max : top)
      for (int64_t j = 0; j < length; ++j) {
        A y = load(block[j]);
        top = y > top ? y : top;
      }
    }
    if (top == -std::numeric_limits<A>::infinity() && max == top) {  // only -inf so far, or NaN, which must not be lost
      for (int64_t j = 0; j < length; ++j) sum += load(block[j]) != load(block[j]) ? load(block[j]) : A(0);
      continue;
    }
    if (top > max) {
      double shift = (max - top) * inverse_t, factor = std::exp(shift);
      moment = sum > 0 ? factor * (moment + sum * shift) : moment;
      sum *= sum > 0 ? factor : 1.0;
      max = top;
    }
    A m = A(max), s = 0, w = 0;
#pragma omp simd reduction(+ : s, w)
    for (int64_t j = 0; j < length; ++j) {
      A y;
      if constexpr (kCap) {
        y = scratch[j];
      } else {
        y = load(block[j]);
      }
      A u = (y - m) * inverse_t;
      A e = exp_negative(u);
      s += e;
      w += e * (u < A(-1000) ? A(-1000) : u);  // 0 * -inf
    }
    sum += s;
    moment += w;
  }
}

template <bool kCap, class T, class A>
COSMO_INLINE void stats_row(const StatsRows<T, A>& a, int64_t i) {
  alignas(64) A scratch[kCap ? kBlock : 1];
  const T* row = a.logits + i * a.stride;
  int64_t target = a.targets[i];
  A t = a.temperature ? a.temperature[i] : A(1), inverse_t = A(1) / t, inverse_cap = kCap ? A(1) / a.softcap : A(0);
  double max = -std::numeric_limits<double>::infinity(), sum = 0, moment = 0;
  accumulate<kCap>(row, 0, target, a.softcap, inverse_cap, inverse_t, scratch, max, sum, moment);
  accumulate<kCap>(row, target + 1, a.columns, a.softcap, inverse_cap, inverse_t, scratch, max, sum, moment);
  A own = kCap ? a.softcap * tanh_fast(load(row[target]) * inverse_cap) : load(row[target]);
  if (sum != sum) max = sum;  // a NaN among -inf
  // In units of y: the maximum stays unscaled (z or capped z) so that differences are taken before the division by t.
  double d_target = (double(own) - max) / t;
  RowStats<A> stats = max == -std::numeric_limits<double>::infinity() ? finish_row<A>(own, max, sum, moment)
                                                                      : finish_row<A>(d_target, 0.0, sum, moment);
  a.logp[i] = stats.logp;
  a.entropy[i] = stats.entropy;
  a.other_max[i] = A(max);
  a.other_sum[i] = A(sum);
}

template <class T, class A>
struct GradRows {
  T* logits;
  const int64_t *rows, *targets;
  const A *logp, *entropy, *other_max, *other_sum, *c_logp, *c_entropy, *temperature;
  int64_t columns, stride;
  A softcap;
};

template <bool kCap, bool kEntropy, class T, class A>
COSMO_INLINE void grad_row(const GradRows<T, A>& a, int64_t i) {
  int64_t source = a.rows ? a.rows[i] : i, target = a.targets[source];
  const T* from = a.logits + source * a.stride;
  T* to = a.logits + i * a.stride;
  A t = a.temperature ? a.temperature[source] : A(1), inverse_t = A(1) / t,
    inverse_cap = kCap ? A(1) / a.softcap : A(0);
  A m = a.other_max[source], cap = a.softcap, logp = a.logp[source], entropy = a.entropy[source];
  double other = -std::expm1(double(logp));  // 1 - p_t
  double scale64 = a.other_sum[source] > 0 ? other / double(a.other_sum[source]) : 0.0;
  if (!(logp == logp)) scale64 = double(logp);
  A scale = A(scale64), c = a.c_logp[source] * inverse_t, ce = kEntropy ? a.c_entropy[source] * inverse_t : A(0);
  // Entropy: dH/dy_j = -p_j (log p_j + H), and log p_j = u_j + log(scale).
  A offset = kEntropy ? A(scale64 > 0 ? std::log(scale64) : 0.0) + entropy : A(0);
  A own = load(from[target]);
  A none = m == -std::numeric_limits<A>::infinity() ? A(0) : m;  // -inf - -inf; the scale is 0 there
  alignas(64) A scratch[kBlock];
  for (int64_t start = 0; start < a.columns; start += kBlock) {
    int64_t length = std::min(kBlock, a.columns - start);
    const T* in = from + start;
    T* out = to + start;
    prefetch<1>(in, length);
#pragma omp simd
    for (int64_t j = 0; j < length; ++j) {
      A z = load(in[j]), y = z, slope = A(1);
      if constexpr (kCap) {
        A th = tanh_fast(z * inverse_cap);
        y = cap * th;
        slope = A(1) - th * th;
      }
      A u = (y - none) * inverse_t;
      A p = exp_negative(u > A(0) ? A(0) : u) * scale;  // u > 0 only at the target, which is written below
      A g = c;
      if constexpr (kEntropy) g += ce * ((u < A(-1000) ? A(-1000) : u) + offset);
      scratch[j] = -p * g * slope;
    }
#pragma omp simd
    for (int64_t j = 0; j < length; ++j) store(out + j, scratch[j]);
  }
  A slope = A(1);
  if constexpr (kCap) {
    A th = tanh_fast(own * inverse_cap);
    slope = A(1) - th * th;
  }
  A p = A(std::exp(double(logp)));
  A g = c * A(other);
  if constexpr (kEntropy) g -= p > 0 ? ce * p * (logp + entropy) : A(0);
  store(to + target, g * slope);
}

template <class T, class A>
COSMO_INLINE void stats_rows(const StatsRows<T, A>& a, int64_t begin, int64_t end) {
  if (a.softcap > 0) {
    for (int64_t i = begin; i < end; ++i) stats_row<true>(a, i);
  } else {
    for (int64_t i = begin; i < end; ++i) stats_row<false>(a, i);
  }
}

template <class T, class A>
COSMO_INLINE void grad_rows(const GradRows<T, A>& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if (a.softcap > 0) {
      a.c_entropy ? grad_row<true, true>(a, i) : grad_row<true, false>(a, i);
    } else {
      a.c_entropy ? grad_row<false, true>(a, i) : grad_row<false, false>(a, i);
    }
  }
}

// target_clones takes no templates, so each element type has its own two entry points.
COSMO_ISA void run(const StatsRows<float, float>& a, int64_t begin, int64_t end) { stats_rows(a, begin, end); }
COSMO_ISA void run(const StatsRows<bf16, float>& a, int64_t begin, int64_t end) { stats_rows(a, begin, end); }
COSMO_ISA void run(const StatsRows<double, double>& a, int64_t begin, int64_t end) { stats_rows(a, begin, end); }
COSMO_ISA void run(const GradRows<float, float>& a, int64_t begin, int64_t end) { grad_rows(a, begin, end); }
COSMO_ISA void run(const GradRows<bf16, float>& a, int64_t begin, int64_t end) { grad_rows(a, begin, end); }
COSMO_ISA void run(const GradRows<double, double>& a, int64_t begin, int64_t end) { grad_rows(a, begin, end); }

template <class Rows>
void run_parallel(const Rows& rows, int64_t n) {
  int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, rows.columns));
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { run(rows, begin, end); });
}

void check_vector(const Tensor& x, const char* name, int64_t n, ScalarType dtype) {
  STD_TORCH_CHECK(
      x.is_cpu() && x.dim() == 1 && x.size(0) == n && x.scalar_type() == dtype && (n < 2 || x.stride(0) == 1), name,
      " must be a contiguous CPU vector of ", n, " elements of the statistics' dtype (int64 for indices)");
}

template <class A>
const A* optional_vector(const std::optional<Tensor>& x, const char* name, int64_t n, ScalarType dtype) {
  if (!x.has_value()) return nullptr;
  check_vector(*x, name, n, dtype);
  return x->const_data_ptr<A>();
}

void check_logits(const Tensor& logits, const Tensor& targets, double softcap) {
  STD_TORCH_CHECK(logits.is_cpu() && logits.dim() == 2, "logits must be a CPU matrix (N, V), got ", logits.dim(),
                  " dimensions");
  STD_TORCH_CHECK(logits.size(1) > 0, "logits have no columns");
  STD_TORCH_CHECK(logits.size(1) == 1 || logits.stride(1) == 1, "the columns of the logits must be contiguous");
  STD_TORCH_CHECK(softcap >= 0, "softcap must not be negative, got ", softcap);
  check_vector(targets, "targets", logits.size(0), ScalarType::Long);
  const int64_t* t = targets.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < logits.size(0); ++i) {
    STD_TORCH_CHECK(t[i] >= 0 && t[i] < logits.size(1), "targets[", i, "] = ", t[i], " is outside the vocabulary of ",
                    logits.size(1));
  }
}

template <class T, class A>
std::tuple<Tensor, Tensor, Tensor, Tensor> stats(const Tensor& logits, const Tensor& targets,
                                                 const std::optional<Tensor>& temperature, double softcap,
                                                 ScalarType dtype) {
  int64_t n = logits.size(0);
  auto vector = [&] { return torch::stable::new_empty(logits, {n}, dtype); };
  Tensor logp = vector(), entropy = vector(), other_max = vector(), other_sum = vector();
  StatsRows<T, A> rows{static_cast<const T*>(logits.const_data_ptr()),
                       targets.const_data_ptr<int64_t>(),
                       optional_vector<A>(temperature, "temperature", n, dtype),
                       logp.mutable_data_ptr<A>(),
                       entropy.mutable_data_ptr<A>(),
                       other_max.mutable_data_ptr<A>(),
                       other_sum.mutable_data_ptr<A>(),
                       logits.size(1),
                       logits.stride(0),
                       A(softcap)};
  run_parallel(rows, n);
  return {logp, entropy, other_max, other_sum};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> vocab_stats_cpu(const Tensor& logits, const Tensor& targets,
                                                           const std::optional<Tensor>& temperature, double softcap) {
  check_logits(logits, targets, softcap);
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return stats<float, float>(logits, targets, temperature, softcap, ScalarType::Float);
    case ScalarType::BFloat16:
      return stats<bf16, float>(logits, targets, temperature, softcap, ScalarType::Float);
    case ScalarType::Double:
      return stats<double, double>(logits, targets, temperature, softcap, ScalarType::Double);
    default:
      STD_TORCH_CHECK(false, "logits must be float32, bfloat16 or float64");
  }
}

struct GradArguments {
  const std::optional<Tensor>& rows;
  const Tensor &targets, &logp, &entropy, &other_max, &other_sum, &c_logp;
  const std::optional<Tensor>&c_entropy, &temperature;
};

template <class T, class A>
void grad(const Tensor& logits, const GradArguments& x, double softcap, ScalarType dtype) {
  int64_t n = logits.size(0), kept = n;
  auto vector = [&](const Tensor& v, const char* name) {
    check_vector(v, name, n, dtype);
    return v.const_data_ptr<A>();
  };
  const int64_t* rows = nullptr;
  if (x.rows.has_value()) {
    kept = x.rows->size(0);
    check_vector(*x.rows, "rows", kept, ScalarType::Long);
    rows = x.rows->const_data_ptr<int64_t>();
    for (int64_t i = 0; i < kept; ++i) {
      STD_TORCH_CHECK(rows[i] == i || (rows[i] >= kept && rows[i] < n), "rows[", i, "] = ", rows[i],
                      " must be itself or a row from ", kept, " to ", n,
                      " (no row may be read after it is overwritten)");
    }
  }
  GradRows<T, A> arguments{static_cast<T*>(logits.mutable_data_ptr()),
                           rows,
                           x.targets.const_data_ptr<int64_t>(),
                           vector(x.logp, "logp"),
                           vector(x.entropy, "entropy"),
                           vector(x.other_max, "other_max"),
                           vector(x.other_sum, "other_sum"),
                           vector(x.c_logp, "c_logp"),
                           optional_vector<A>(x.c_entropy, "c_entropy", n, dtype),
                           optional_vector<A>(x.temperature, "temperature", n, dtype),
                           logits.size(1),
                           logits.stride(0),
                           A(softcap)};
  run_parallel(arguments, kept);
}

void vocab_grad_cpu_(const Tensor& logits, const std::optional<Tensor>& rows, const Tensor& targets, const Tensor& logp,
                     const Tensor& entropy, const Tensor& other_max, const Tensor& other_sum, const Tensor& c_logp,
                     const std::optional<Tensor>& c_entropy, const std::optional<Tensor>& temperature, double softcap) {
  check_logits(logits, targets, softcap);
  GradArguments x{rows, targets, logp, entropy, other_max, other_sum, c_logp, c_entropy, temperature};
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return grad<float, float>(logits, x, softcap, ScalarType::Float);
    case ScalarType::BFloat16:
      return grad<bf16, float>(logits, x, softcap, ScalarType::Float);
    case ScalarType::Double:
      return grad<double, double>(logits, x, softcap, ScalarType::Double);
    default:
      STD_TORCH_CHECK(false, "logits must be float32, bfloat16 or float64");
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cosmo_fast, CPU, m) {
  m.impl("vocab_stats", TORCH_BOX(&vocab_stats_cpu));
  m.impl("vocab_grad_", TORCH_BOX(&vocab_grad_cpu_));
}

}  // namespace cosmo_fast
