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

#include "check.h"

namespace cosmo_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlock = 2048;  // logits of one block stay in the first-level cache between its two loops

// Asks for the block after this one: reading and writing one stream runs at the latency of memory otherwise.
template <int kWrite, class T>
COSMO_INLINE void prefetch(const T* block) {
  for (int64_t j = 0; j < kBlock; j += 64 / int64_t(sizeof(T))) __builtin_prefetch(block + kBlock + j, kWrite, 2);
}

// softcap * tanh(z / softcap); 0 means none.
template <bool kCap, class V, class A>
COSMO_INLINE V capped(V z, A cap, A inverse_cap) {
  if constexpr (kCap) return cap * tanh_fast(z * inverse_cap);
  return z;
}

// One element through the vector path, so that it has the same bits there and alone.
template <bool kCap, class T, class A>
COSMO_INLINE A capped_one(T z, A cap, A inverse_cap) {
  return capped<kCap>(Vector<A>{} + load(z), cap, inverse_cap)[0];
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

// What a row has come to. Sums are relative to `base`, which lies at the maximum or close below: a block is summed in
// the same loop that looks for its maximum, and once more only where that turns out to lie far above.
struct Running {
  double max = -std::numeric_limits<double>::infinity(), base = max, sum = 0, moment = 0;

  void rebase(double to, double inverse_t) {
    double shift = (base - to) * inverse_t, factor = std::exp(shift);
    moment = sum > 0 ? factor * (moment + sum * shift) : moment;
    sum *= sum > 0 ? factor : 1.0;
    base = to;
  }
};

struct BlockSums {
  double max, sum, moment;
};

// Maximum, Σ e^u and Σ e^u u with u = (y - base) / t over `length` elements, a multiple of the step. The sums are
// arbitrary where the maximum lies far above the base.
template <bool kHeat, class T, class A>
COSMO_INLINE BlockSums block_sums(const T* block, int64_t length, A base, A inverse_t) {
  using V = Vector<A>;
  V top = V{} - std::numeric_limits<A>::infinity(), s[kParts<T>] = {}, w[kParts<T>] = {};
  for (int64_t j = 0; j < length; j += kStep<T>) {
    V y[kParts<T>];
    load_step(block + j, y);
    for (int k = 0; k < kParts<T>; ++k) {
      top = larger(y[k], top);
      V u = y[k] - base;
      if constexpr (kHeat) u *= inverse_t;
      V e = exp_bounded(u);
      s[k] += e;
      w[k] += e * u;
    }
  }
  double sum = 0, moment = 0;
  for (int k = 0; k < kParts<T>; ++k) sum += sum_of(s[k]), moment += sum_of(w[k]);
  return {max_of(top), sum, moment};
}

template <class T, class A>
COSMO_INLINE double block_max(const T* block, int64_t length) {
  Vector<A> top = Vector<A>{} - std::numeric_limits<A>::infinity(), y[kParts<T>];
  for (int64_t j = 0; j < length; j += kStep<T>) {
    load_step(block + j, y);
    for (int k = 0; k < kParts<T>; ++k) top = larger(y[k], top);
  }
  return max_of(top);
}

// Adds one block, whose length is a multiple of the step.
template <class T, class A>
COSMO_INLINE void add_block(const T* block, int64_t length, A inverse_t, Running& run) {
  constexpr double kFar = 2;  // nats above the base: more would cost the entropy digits
  constexpr double kNone = -std::numeric_limits<double>::infinity();
  if (run.base == kNone) {
    run.max = run.base = block_max<T, A>(block, length);
    if (run.base == kNone) {  // -inf alone, or NaN, which must not be lost
      for (int64_t j = 0; j < length; ++j) run.sum += load(block[j]) != load(block[j]) ? load(block[j]) : A(0);
      return;
    }
  }
  auto sums = [&]() __attribute__((always_inline)) {
    return inverse_t == A(1) ? block_sums<false>(block, length, A(run.base), inverse_t)
                             : block_sums<true>(block, length, A(run.base), inverse_t);
  };
  BlockSums add = sums();
  run.max = add.max > run.max ? add.max : run.max;
  if ((run.max - run.base) * inverse_t > kFar) {
    run.rebase(run.max, inverse_t);
    add = sums();
  }
  run.sum += add.sum;
  run.moment += add.moment;
}

template <bool kCap, class T, class A>
COSMO_INLINE void stats_row(const StatsRows<T, A>& a, int64_t i) {
  alignas(64) A scratch[kBlock] = {};
  const T* row = a.logits + i * a.stride;
  const int64_t target = a.targets[i];
  const A t = a.temperature ? a.temperature[i] : A(1), inverse_t = A(1) / t;
  const A inverse_cap = kCap ? A(1) / a.softcap : A(0);
  Running run;
  for (int64_t start = 0; start < a.columns; start += kBlock) {
    int64_t length = std::min(kBlock, a.columns - start);
    prefetch<0>(row + start);
    bool has_target = target >= start && target < start + length;
    if (!kCap && !has_target && length == kBlock) {
      add_block(row + start, length, inverse_t, run);
      continue;
    }
    const T* block = row + start;
    for (int64_t j = 0; j < length; ++j) scratch[j] = load(block[j]);
    int64_t padded = (length + kStep<A> - 1) / kStep<A> * kStep<A>;
    if constexpr (kCap) {
      for (int64_t j = 0; j < padded; j += kStep<A>) {
        Vector<A> y[1];
        load_step(scratch + j, y);
        y[0] = capped<kCap>(y[0], a.softcap, inverse_cap);
        store_step(scratch + j, y);
      }
    }
    for (int64_t j = length; j < padded; ++j) scratch[j] = -std::numeric_limits<A>::infinity();
    if (has_target) scratch[target - start] = -std::numeric_limits<A>::infinity();
    add_block(static_cast<const A*>(scratch), padded, inverse_t, run);
  }
  if (run.max > run.base) run.rebase(run.max, inverse_t);
  if (run.sum != run.sum) run.max = run.sum;
  A own = capped_one<kCap>(row[target], a.softcap, inverse_cap);
  // In units of y: the maximum stays unscaled (z or capped z) so that differences are taken before the division by t.
  bool alone = run.max == -std::numeric_limits<double>::infinity();
  RowStats<A> stats =
      finish_row<A>(alone ? double(own) : (double(own) - run.max) / t, alone ? run.max : 0.0, run.sum, run.moment);
  a.logp[i] = stats.logp;
  a.entropy[i] = stats.entropy;
  a.other_max[i] = A(run.max);
  a.other_sum[i] = A(run.sum);
}

template <class T, class A>
struct GradRows {
  T* logits;
  const int64_t *rows, *targets;
  const A *logp, *entropy, *other_max, *other_sum, *c_logp, *c_entropy, *temperature;
  int64_t columns, stride;
  A softcap;
};

// The gradient by one logit is -p (c_logp + c_entropy (log p + H)) slope / t, with p = e^u scale and log p = u + offset
// - H.
template <class A>
struct GradRow {
  A base, inverse_t, scale, c, ce, offset, cap, inverse_cap;  // the scale has the sign; without entropy it has c, too

  template <bool kCap, bool kEntropy, class V>
  COSMO_INLINE V operator()(V z) const {
    V y = z, factor = V{} + scale;
    if constexpr (kCap) {
      V th = tanh_fast(z * inverse_cap);
      y = cap * th;
      factor *= A(1) - th * th;
    }
    V u = smaller(V{} + A(0), (y - base) * inverse_t);  // above 0 only at the target, which is written by itself
    V e = exp_bounded(u);
    if constexpr (kEntropy) factor *= c + ce * (u + offset);
    return e * factor;
  }
};

template <bool kCap, bool kEntropy, class T, class A>
COSMO_INLINE void grad_row(const GradRows<T, A>& a, int64_t i) {
  const int64_t source = a.rows ? a.rows[i] : i, target = a.targets[source];
  const T* from = a.logits + source * a.stride;
  T* to = a.logits + i * a.stride;
  const A t = a.temperature ? a.temperature[source] : A(1), m = a.other_max[source];
  const A logp = a.logp[source], entropy = a.entropy[source];
  const double other = -std::expm1(double(logp));  // 1 - p_t
  const double scale = a.other_sum[source] > 0 ? other / double(a.other_sum[source]) : 0.0;
  GradRow<A> row;
  row.base = m == -std::numeric_limits<A>::infinity() ? A(0) : m;  // -inf - -inf; the scale is 0 there
  row.inverse_t = A(1) / t;
  row.c = a.c_logp[source] * row.inverse_t;
  row.scale = kEntropy ? -A(scale) : -A(scale) * row.c;
  row.ce = kEntropy ? a.c_entropy[source] * row.inverse_t : A(0);
  row.offset = kEntropy ? A(scale > 0 ? std::log(scale) : 0.0) + entropy : A(0);
  row.cap = a.softcap;
  row.inverse_cap = kCap ? A(1) / a.softcap : A(0);
  if (!std::isfinite(logp) || !std::isfinite(row.c) || !std::isfinite(row.ce)) {  // of a NaN, or a token that cannot be
    const bool banned = logp == -std::numeric_limits<A>::infinity() && std::isfinite(row.c) && row.ce == A(0);
    if (!banned) {
      for (int64_t j = 0; j < a.columns; ++j) store(to + j, std::numeric_limits<A>::quiet_NaN());
      return;
    }
  }
  A own = load(from[target]), slope = A(1);
  if constexpr (kCap) {
    A th = tanh_fast(Vector<A>{} + own * row.inverse_cap)[0];
    slope = A(1) - th * th;
  }
  auto step = [&](const T* in, T* out) __attribute__((always_inline)) {
    Vector<A> z[kParts<T>];
    load_step(in, z);
    for (int k = 0; k < kParts<T>; ++k) z[k] = row.template operator()<kCap, kEntropy>(z[k]);
    store_step(out, z);
  };
  const int64_t whole = a.columns / kStep<T> * kStep<T>;
  for (int64_t start = 0; start < whole; start += kBlock) {
    const int64_t end = std::min(start + kBlock, whole);
    prefetch<1>(from + start);
    for (int64_t j = start; j < end; j += kStep<T>) step(from + j, to + j);
  }
  if (whole < a.columns) {
    alignas(64) T tail[kStep<T>] = {};
    std::copy(from + whole, from + a.columns, tail);
    step(tail, tail);
    std::copy(tail, tail + (a.columns - whole), to + whole);
  }
  A p = A(std::exp(double(logp)));
  A g = row.c * A(other);
  if constexpr (kEntropy) g -= p > 0 ? row.ce * p * (logp + entropy) : A(0);
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

void check_logits(const Tensor& logits, const Tensor& targets, double softcap) {
  check_matrix(logits, "logits");
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
