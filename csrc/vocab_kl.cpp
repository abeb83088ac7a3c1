// vocab_kl_: the exact divergence of two rows of logits and, over the rows themselves, its gradient. The coefficient of
// a row is known beforehand, so that the second sweep finds the row in the second-level cache.
// y = softcap * tanh(z / softcap) / temperature throughout; softcap 0 means none.
#include "vocab_stats.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>

#include "check.h"

namespace cosmo_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlock = 1024;  // two blocks of logits and their two scratch blocks stay in the first-level cache
constexpr double kFar = 0.5;      // D above which a KL is made directly (see kl_row): there both ways are as exact
constexpr double kInf = std::numeric_limits<double>::infinity();

// Powers are of 2 in fp32, where one multiply-add makes the exponent of a logit, and of e in fp64. kUnit: exponents in
// one nat; kLowest: below it the result is 0; kNear: (log p - log q)^2 under which differences are made by a series.
template <class A>
constexpr double kUnit = sizeof(A) == 4 ? 1.44269504088896341 : 1.0;
template <class A>
constexpr A kLowest = sizeof(A) == 4 ? A(-126) : A(-708);
template <class A>
constexpr A kNear = sizeof(A) == 4 ? A(1.0 / 64) : A(1e-6);

// 2^x for x <= 0, to 1 ulp: x = n + r, |r| <= 1/2 (coefficients are Cephes exp2f's). NaN gives NaN.
COSMO_INLINE float power(float x) {
  float shifted = x + 12582912.0f, r = x - (shifted - 12582912.0f);  // 1.5 * 2^23: n lands in the low bits
  float p = 1.535336188319500e-4f;
  p = p * r + 1.339887440266574e-3f;
  p = p * r + 9.618437357674640e-3f;
  p = p * r + 5.550332471162809e-2f;
  p = p * r + 2.402264791363012e-1f;
  p = p * r + 6.931472028550421e-1f;
  p = p * r + 1.0f;
  p *= bit_cast<float>((bit_cast<uint32_t>(shifted) << 23) + (127u << 23));
  return x < kLowest<float> ? 0.0f : p;
}
COSMO_INLINE double power(double x) { return std::exp(x); }

// tanh with a small relative error everywhere: a polynomial near 0 (Cephes tanhf), the exponential elsewhere.
COSMO_INLINE float tangent(float x) {
  float a = x < 0 ? -x : x, xx = x * x, p = -5.70498872745e-3f;
  p = p * xx + 2.06390887954e-2f;
  p = p * xx - 5.37397155531e-2f;
  p = p * xx + 1.33314422036e-1f;
  p = p * xx - 3.33332819422e-1f;
  float e = power(a * -2.88539008177792682f), far = (1.0f - e) / (1.0f + e);  // -2 / ln 2
  return a < 0.625f ? x + x * xx * p : x < 0 ? -far : far;
}
COSMO_INLINE double tangent(double x) { return std::tanh(x); }

// log(1 + w) for -1 < w <= 0: 1 + w = 2^k (1 + f), and 2 artanh(f / (2 + f)) by its series; f is w itself where k = 0.
COSMO_INLINE float log1p_negative(float w) {
  uint32_t bits = bit_cast<uint32_t>(1.0f + w) + (0x3f800000u - 0x3f3504f3u);  // sqrt(1/2) <= 1 + f < sqrt(2)
  int32_t k = int32_t(bits >> 23) - 127;
  float f = k == 0 ? w : bit_cast<float>((bits & 0x7fffffu) + 0x3f3504f3u) - 1.0f;
  float s = f / (2.0f + f), z = s * s;
  float p = (((z * (1.0f / 9) + 1.0f / 7) * z + 1.0f / 5) * z + 1.0f / 3) * z;
  float log = float(k) * 0.693147181f + 2.0f * (s + s * p);
  return w <= 0.0f ? log : w;  // NaN stays, and what rounding lifted above 0 is its own logarithm
}
COSMO_INLINE double log1p_negative(double w) { return std::log1p(w); }

template <class T, class A>
struct Side {
  T* logits;
  int64_t stride;
  A softcap;
  bool wanted;  // the gradient is written over these logits
};

template <class T, class A>
struct KlRows {
  Side<T, A> first, second;            // KL(first || second)
  const A *coefficient, *temperature;  // null: no gradient; 1
  A* kl;
  int64_t columns;
  A beta;  // 0: none, else the mixture is (1 - beta) first + beta second
};

// A block of logits as A, through the cap; returns its maximum. Asks for the block after it.
template <class T, class A>
COSMO_INLINE A fill(const Side<T, A>& side, const T* block, int64_t length, A* to) {
  for (int64_t j = 0; j < length; j += 64 / int64_t(sizeof(T))) __builtin_prefetch(block + kBlock + j, 0, 2);
  A top = -std::numeric_limits<A>::infinity(), inverse_cap = side.softcap > 0 ? A(1) / side.softcap : A(0);
  if (side.softcap > 0) {
#pragma omp simd
    for (int64_t j = 0; j < length; ++j) to[j] = side.softcap * tangent(load(block[j]) * inverse_cap);
  } else {
#pragma omp simd
    for (int64_t j = 0; j < length; ++j) to[j] = load(block[j]);
  }
#pragma omp simd reduction(max : top)
  for (int64_t j = 0; j < length; ++j) top = to[j] > top ? to[j] : top;
  return top;
}

// Writes the gradient by the (capped) logits of a block over the logits, through the cap.
template <class T, class A>
COSMO_INLINE void write(const Side<T, A>& side, T* block, int64_t length, A* gradient) {
  if (side.softcap > 0) {
    alignas(64) A ys[kBlock];
    fill(side, block, length, ys);
#pragma omp simd
    for (int64_t j = 0; j < length; ++j) {
      A th = ys[j] / side.softcap;
      gradient[j] *= A(1) - th * th;
    }
  }
#pragma omp simd
  for (int64_t j = 0; j < length; ++j) store(block + j, gradient[j]);
}

// One element of the two normalised rows: r = log p - log q, and q - p without cancellation (0 for equal rows).
template <class A>
struct Point {
  A p, q, r, difference;
};

template <class A>
struct Logs {
  A p, q;
};

template <class A>
struct Normal {
  A unit, base_p, base_q, scale_p, scale_q, inverse_t, offset;

  COSMO_INLINE A exponent_p(A y) const { return y * unit - base_p; }
  COSMO_INLINE A r(A y, A x) const { return (y - x) * inverse_t + offset; }

  COSMO_INLINE Point<A> at(A y, A x) const {
    Point<A> v{power(exponent_p(y)) * scale_p, power(x * unit - base_q) * scale_q, r(y, x), A(0)};
    A r = v.r, series = (((A(1) / 120 * r - A(1) / 24) * r + A(1) / 6) * r - A(0.5)) * r + A(1);
    v.difference = r * r < kNear<A> ? -v.p * r * series : v.q - v.p;
    return v;
  }

  // log(p / m) and log(q / m) of the mixture m = (1 - beta) p + beta q; 0 where that row is 0.
  COSMO_INLINE Logs<A> mixture(A p, A q, A r, A difference, A beta) const {
    bool first = p >= q;
    A larger = first ? p : q, part = (first ? beta : beta - A(1)) * difference / larger;
    A log = -log1p_negative(larger > A(0) ? part : larger);
    A log_p = first ? log : log + r, log_q = first ? log - r : log;
    return {p > A(0) ? log_p : p, q > A(0) ? log_q : q};
  }
};

enum class Mode { kFirst, kSecond, kBoth, kMixture };

template <Mode mode, class T, class A>
COSMO_INLINE void grad_row(const KlRows<T, A>& a, int64_t i, const Normal<A>& normal, A kl_p, A kl_q) {
  alignas(64) A ys[kBlock], xs[kBlock];
  T *first = a.first.logits + i * a.first.stride, *second = a.second.logits + i * a.second.stride;
  A c = a.coefficient[i] * normal.inverse_t, c_p = (A(1) - a.beta) * c, c_q = a.beta * c;
  for (int64_t start = 0; start < a.columns; start += kBlock) {
    int64_t length = std::min(kBlock, a.columns - start);
    fill(a.first, first + start, length, ys);
    fill(a.second, second + start, length, xs);
#pragma omp simd
    for (int64_t j = 0; j < length; ++j) {
      if constexpr (mode == Mode::kFirst) {
        A p = power(normal.exponent_p(ys[j])) * normal.scale_p, g = p * (normal.r(ys[j], xs[j]) - kl_p);
        ys[j] = c * (p > A(0) ? g : p);  // 0 * -inf is NaN
      } else {
        Point<A> v = normal.at(ys[j], xs[j]);
        if constexpr (mode == Mode::kMixture) {
          Logs<A> log = normal.mixture(v.p, v.q, v.r, v.difference, a.beta);
          ys[j] = c_p * v.p * (log.p - kl_p);
          xs[j] = c_q * v.q * (log.q - kl_q);
        } else {
          A g = v.p * (v.r - kl_p);
          if constexpr (mode == Mode::kBoth) ys[j] = c * (v.p > A(0) ? g : v.p);
          xs[j] = c * v.difference;
        }
      }
    }
    if (a.first.wanted) write(a.first, first + start, length, ys);
    if (a.second.wanted) write(a.second, second + start, length, xs);
  }
}

// Returns (1 - beta) KL(p || m) + beta KL(q || m) and writes both parts.
template <class T, class A>
COSMO_INLINE double mixture_row(const KlRows<T, A>& a, int64_t i, const Normal<A>& normal, double& kl_p, double& kl_q) {
  alignas(64) A ys[kBlock], xs[kBlock];
  T *first = a.first.logits + i * a.first.stride, *second = a.second.logits + i * a.second.stride;
  double js = 0;
  kl_p = kl_q = 0;
  for (int64_t start = 0; start < a.columns; start += kBlock) {
    int64_t length = std::min(kBlock, a.columns - start);
    fill(a.first, first + start, length, ys);
    fill(a.second, second + start, length, xs);
    A sum_p = 0, sum_q = 0, both = 0;
#pragma omp simd reduction(+ : sum_p, sum_q, both)
    for (int64_t j = 0; j < length; ++j) {
      Point<A> v = normal.at(ys[j], xs[j]);
      Logs<A> log = normal.mixture(v.p, v.q, v.r, v.difference, a.beta);
      sum_p += v.p * log.p;
      sum_q += v.q * log.q;
      both += (A(1) - a.beta) * (v.p * log.p) + a.beta * (v.q * log.q);  // the first-order parts cancel here
    }
    kl_p += sum_p;
    kl_q += sum_q;
    js += both;
  }
  return js;
}

// Σ over a row of 2^(unit * y - base), base the exponent of the running maximum `top` (0 while that is -inf).
template <class A>
struct Sum {
  double top, base, total;

  // Takes a new maximum; returns by how many nats the exponents fall.
  double raise(double next, double unit) {
    double old = base, fall = 0;
    if (next > top) {
      base = A(std::max(next * unit, double(std::numeric_limits<A>::lowest())));  // finite: -inf - -inf is NaN
      fall = top == -kInf ? 0.0 : (base - old) / kUnit<A>;
      top = next;
    }
    return fall;
  }
};

template <class T, class A>
COSMO_INLINE void kl_row(const KlRows<T, A>& a, int64_t i) {
  alignas(64) A ys[kBlock], xs[kBlock];
  T *first = a.first.logits + i * a.first.stride, *second = a.second.logits + i * a.second.stride;
  A inverse_t = a.temperature ? A(1) / a.temperature[i] : A(1), unit = A(kUnit<A> * inverse_t);
  Sum<A> p{-kInf, 0, 0}, q{-kInf, 0, 0};
  // excess = Σ e^u (e^-d - 1 + d), d = u - v the difference of the two scaled logits, each less its row's maximum:
  // every term is >= 0 and of second order in d. KL = excess / Σe^u - (e^D - 1 - D), D = log(Σe^v / Σe^u): for
  // near-equal rows the error is that of D times D, where Σ p (log p - log q) would lose everything to cancellation.
  // A peaked first row and a flat second one have e^D tokens' worth of excess, nearly all of it subtracted again: from
  // D = kFar on KL = moment / Σe^u + D, moment = Σ e^u d.
  double excess = 0, moment = 0;
  for (int64_t start = 0; start < a.columns; start += kBlock) {
    int64_t length = std::min(kBlock, a.columns - start);
    double fall_p = p.raise(fill(a.first, first + start, length, ys), unit);
    double fall_q = q.raise(fill(a.second, second + start, length, xs), unit), g = fall_p - fall_q;
    if (fall_p > 0 || fall_q > 0) {
      double fade_p = std::exp(-fall_p), fade_q = std::exp(-fall_q);
      double moved = excess + q.total * std::expm1(g) - p.total * g;  // in units of the old maximum
      excess = g > 700 ? fade_q * q.total : fade_p > 0 ? fade_p * moved : 0.0;
      moment = fade_p > 0 ? fade_p * (moment - p.total * g) : 0.0;
      p.total *= fade_p;
      q.total *= fade_q;
    }
    double apart = (p.base - q.base) / kUnit<A>;
    A base_p = A(p.base), base_q = A(q.base), shift = A(apart), sum_p = 0, sum_q = 0, more = 0, sum_d = 0;
#pragma omp simd reduction(+ : sum_p, sum_q, more, sum_d)
    for (int64_t j = 0; j < length; ++j) {
      A d = (ys[j] - xs[j]) * inverse_t - shift;
      A eu = power(ys[j] * unit - base_p), ev = power(xs[j] * unit - base_q);
      A ud = eu > A(0) ? eu * d : A(0), far = ev - eu + ud;  // a token that the first row cannot draw costs nothing
      A series = ((A(-1) / 120 * d + A(1) / 24) * d - A(1) / 6) * d + A(0.5), dd = d * d;
      sum_p += eu;
      sum_q += ev;
      sum_d += ud;
      more += dd < kNear<A> ? eu * dd * series : far;
    }
    p.total += sum_p;
    q.total += sum_q;
    excess += more;
    moment += sum_d + (double(shift) - apart) * sum_p;
  }
  double ratio = std::log(q.total / p.total), kl_q = 0;
  double kl_p = ratio > kFar ? moment / p.total + ratio : excess / p.total - (std::expm1(ratio) - ratio);
  a.kl[i] = A(kl_p);
  A offset = A(ratio - (p.base - q.base) / kUnit<A>);
  Normal<A> normal{unit, A(p.base), A(q.base), A(1 / p.total), A(1 / q.total), inverse_t, offset};
  if (a.beta > 0) a.kl[i] = A(mixture_row(a, i, normal, kl_p, kl_q));
  if (!a.coefficient) return;
  if (a.beta > 0) {
    grad_row<Mode::kMixture>(a, i, normal, A(kl_p), A(kl_q));
  } else if (a.first.wanted && a.second.wanted) {
    grad_row<Mode::kBoth>(a, i, normal, A(kl_p), A(0));
  } else if (a.first.wanted) {
    grad_row<Mode::kFirst>(a, i, normal, A(kl_p), A(0));
  } else {
    grad_row<Mode::kSecond>(a, i, normal, A(kl_p), A(0));
  }
}

template <class T, class A>
COSMO_INLINE void kl_rows(const KlRows<T, A>& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) kl_row(a, i);
}

// target_clones takes no templates, so each element type has its own entry point.
COSMO_ISA void run(const KlRows<float, float>& a, int64_t begin, int64_t end) { kl_rows(a, begin, end); }
COSMO_ISA void run(const KlRows<bf16, float>& a, int64_t begin, int64_t end) { kl_rows(a, begin, end); }
COSMO_ISA void run(const KlRows<double, double>& a, int64_t begin, int64_t end) { kl_rows(a, begin, end); }

struct Options {
  double softcap, other_softcap, beta;
  bool wanted, other_wanted;
};

template <class T, class A>
Tensor kl(const Tensor& logits, const Tensor& other, const std::optional<Tensor>& coefficient,
          const std::optional<Tensor>& temperature, const Options& o, ScalarType dtype) {
  int64_t n = logits.size(0), columns = logits.size(1);
  auto side = [](const Tensor& x, double softcap, bool wanted) {
    T* data = static_cast<T*>(wanted ? x.mutable_data_ptr() : const_cast<void*>(x.const_data_ptr()));
    return Side<T, A>{data, x.stride(0), A(softcap), wanted};
  };
  Tensor result = torch::stable::new_empty(logits, {n}, dtype);
  KlRows<T, A> rows{side(logits, o.softcap, o.wanted),
                    side(other, o.other_softcap, o.other_wanted),
                    optional_vector<A>(coefficient, "coefficient", n, dtype),
                    optional_vector<A>(temperature, "temperature", n, dtype),
                    result.mutable_data_ptr<A>(),
                    columns,
                    A(o.beta)};
  int64_t grain = std::max<int64_t>(1, 16384 / columns);
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { run(rows, begin, end); });
  return result;
}

Tensor vocab_kl_cpu_(const Tensor& logits, const Tensor& other, const std::optional<Tensor>& coefficient,
                     const std::optional<Tensor>& temperature, double softcap, double other_softcap, double beta,
                     bool wanted, bool other_wanted) {
  check_matrix(logits, "logits");
  check_matrix(other, "other");
  STD_TORCH_CHECK(
      logits.size(0) == other.size(0) && logits.size(1) == other.size(1) && logits.scalar_type() == other.scalar_type(),
      "logits and other must have one shape and dtype");
  STD_TORCH_CHECK(softcap >= 0 && other_softcap >= 0, "a softcap must not be negative");
  STD_TORCH_CHECK(beta >= 0 && beta < 1, "beta must be 0 or between 0 and 1, got ", beta);
  STD_TORCH_CHECK(coefficient.has_value() == (wanted || other_wanted), "a gradient needs the coefficient, and only it");
  Options o{softcap, other_softcap, beta, wanted, other_wanted};
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return kl<float, float>(logits, other, coefficient, temperature, o, ScalarType::Float);
    case ScalarType::BFloat16:
      return kl<bf16, float>(logits, other, coefficient, temperature, o, ScalarType::Float);
    case ScalarType::Double:
      return kl<double, double>(logits, other, coefficient, temperature, o, ScalarType::Double);
    default:
      STD_TORCH_CHECK(false, "logits must be float32, bfloat16 or float64");
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cosmo_fast, CPU, m) { m.impl("vocab_kl_", TORCH_BOX(&vocab_kl_cpu_)); }

}  // namespace cosmo_fast
