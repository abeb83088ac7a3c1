// The mathematics of the vocabulary rows, on vectors of lanes: no branches, no libm calls.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#define COSMO_INLINE inline __attribute__((always_inline))

// COSMO_ISA may be defined to nothing, to test one instruction set alone (make isa-check).
// The loops are compiled three times and the processor picks one when the library is loaded (an ifunc).
#if defined(COSMO_ISA)
#elif defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && __GNUC__ >= 12
#define COSMO_ISA __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define COSMO_ISA
#endif

namespace cosmo_fast {

struct bf16 {
  uint16_t bits;
};

template <class To, class From>
COSMO_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// Vectors of one 64-byte register, as the compiler knows them: where registers are shorter it splits them. A mask is a
// vector of integers, `mask ? a : b` chooses by lane.
using f32x16 = float __attribute__((vector_size(64)));
using f64x8 = double __attribute__((vector_size(64)));
using u32x16 = uint32_t __attribute__((vector_size(64)));
using u64x8 = uint64_t __attribute__((vector_size(64)));

// The type in which a row of T is worked on, fp32 for bf16 and fp32, fp64 for the oracle, and a vector of it.
template <class T>
struct VectorOf {
  using type = f32x16;
};
template <>
struct VectorOf<double> {
  using type = f64x8;
};
template <class T>
using Vector = typename VectorOf<T>::type;
// Elements of T in 64 bytes, and the vectors that they are worked on in: two for bf16, the even and the odd ones, which
// takes a shift or a mask each and no shuffle.
template <class T>
constexpr int64_t kStep = 64 / sizeof(T);
template <class T>
constexpr int kParts = std::is_same_v<T, bf16> ? 2 : 1;

COSMO_INLINE float load(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
COSMO_INLINE float load(float x) { return x; }
COSMO_INLINE double load(double x) { return x; }

template <class T>
COSMO_INLINE void load_step(const T* from, Vector<T> (&x)[1]) {
  std::memcpy(&x[0], from, 64);
}
COSMO_INLINE void load_step(const bf16* from, f32x16 (&x)[2]) {
  u32x16 bits;
  std::memcpy(&bits, from, 64);
  x[0] = (f32x16)(bits << 16);
  x[1] = (f32x16)(bits & 0xffff0000u);
}

COSMO_INLINE void store(float* to, float x) { *to = x; }
COSMO_INLINE void store(double* to, double x) { *to = x; }
COSMO_INLINE void store(bf16* to, float x) {  // round to nearest even, as PyTorch does; a NaN stays one
  uint32_t bits = bit_cast<uint32_t>(x);
  to->bits = uint16_t(x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <class T>
COSMO_INLINE void store_step(T* to, const Vector<T> (&x)[1]) {
  std::memcpy(to, &x[0], 64);
}
COSMO_INLINE void store_step(bf16* to,
                             const f32x16 (&x)[2]) {  // as `store`, but the caller has seen to it that none is NaN
  u32x16 even = (u32x16)x[0], odd = (u32x16)x[1];
  even += 0x7fff + ((even >> 16) & 1);
  odd += 0x7fff + ((odd >> 16) & 1);
  u32x16 both = (even >> 16) | (odd & 0xffff0000u);
  std::memcpy(to, &both, 64);
}

template <class V>
COSMO_INLINE V larger(V a, V b) {  // b where a is NaN
  return a > b ? a : b;
}
template <class V>
COSMO_INLINE V smaller(V a, V b) {
  return a < b ? a : b;
}

template <class V>
COSMO_INLINE double sum_of(V x) {
  double sum = 0;
  for (int i = 0; i < int(sizeof(V) / sizeof(x[0])); ++i) sum += double(x[i]);
  return sum;
}
template <class V>
COSMO_INLINE double max_of(V x) {
  double max = x[0];
  for (int i = 1; i < int(sizeof(V) / sizeof(x[0])); ++i) max = double(x[i]) > max ? double(x[i]) : max;
  return max;
}

// exp(x) for x below 80 (fp32) or 700 (fp64), to 1 ulp in fp32 and 2 ulp in fp64: x = n ln 2 + r, |r| <= ln 2 / 2, a
// polynomial in r (minimax in fp32, Cephes exp in fp64), 2^n by its bits. The result is 0 where it would be subnormal,
// NaN for NaN and arbitrary above. x is raised to where the result becomes 0: a product of the two is finite.
COSMO_INLINE f32x16 exp_bounded(f32x16& x) {
  auto none = x < -87.0f;
  x = none ? f32x16{} - 87.0f : x;
  constexpr float kMagic = 12582912.0f + 127.0f;  // 1.5 * 2^23 + bias: the low bits become the exponent of 2^n
  f32x16 shifted = x * 1.44269504088896341f + kMagic;
  f32x16 n = shifted - kMagic;
  f32x16 r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  f32x16 p = r * 1.3814540580e-3f + 8.3687454462e-3f;
  p = p * r + 4.1668388993e-2f;
  p = p * r + 1.6666521132e-1f;
  p = p * r + 4.9999994040e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return none ? f32x16{} : p * (f32x16)((u32x16)shifted << 23);
}

COSMO_INLINE f64x8 exp_bounded(f64x8& x) {
  auto none = x < -708.0;
  x = none ? f64x8{} - 708.0 : x;
  f64x8 shifted = x * 1.4426950408889634074 + 6755399441055744.0;  // 1.5 * 2^52
  f64x8 n = shifted - 6755399441055744.0;
  f64x8 r = x - n * 6.93145751953125e-1;
  r = r - n * 1.42860682030941723212e-6;
  f64x8 rr = r * r;  // exp(r) = 1 + 2 r P(r^2) / (Q(r^2) - r P(r^2))
  f64x8 p = r * ((1.26177193074810590878e-4 * rr + 3.02994407707441961300e-2) * rr + 9.99999999999999999910e-1);
  f64x8 q = ((3.00198505138664455042e-6 * rr + 2.52448340349684104192e-3) * rr + 2.27265548208155028766e-1) * rr + 2.0;
  f64x8 power = (f64x8)(((u64x8)shifted << 52) + (uint64_t(1023) << 52));
  return none ? f64x8{} : (1.0 + 2.0 * p / (q - p)) * power;
}

// tanh with a small relative error everywhere: a polynomial near 0, the exponential elsewhere (Cephes tanhf, tanh).
COSMO_INLINE f32x16 tanh_fast(f32x16 x) {
  f32x16 a = x < 0 ? -x : x, xx = x * x;
  f32x16 p = xx * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * xx + -5.37397155531e-2f;
  p = p * xx + 1.33314422036e-1f;
  p = p * xx + -3.33332819422e-1f;
  f32x16 twice = -2.0f * a, e = exp_bounded(twice), far = (1.0f - e) / (1.0f + e);
  return a < 0.625f ? x + x * xx * p : (x < 0 ? -far : far);
}
COSMO_INLINE f64x8 tanh_fast(f64x8 x) {
  f64x8 a = x < 0 ? -x : x, xx = x * x;
  f64x8 p = (-9.64399179425052238628e-1 * xx + -9.92877231001918586564e1) * xx + -1.61468768441708447952e3;
  f64x8 q = ((xx + 1.12811678491632931402e2) * xx + 2.23548839060100448583e3) * xx + 4.84406305325125486048e3;
  f64x8 twice = -2.0 * a, e = exp_bounded(twice), far = (1.0 - e) / (1.0 + e);
  return a < 0.625 ? x + x * xx * p / q : (x < 0 ? -far : far);
}

// What one row comes to, given the maximum m and the sums over every column except the target's:
// sum = Σ e^(y_j - m), moment = Σ e^(y_j - m) (y_j - m). Leaving the target out is what makes a confident token exact:
// with d = lse(others) - y_t, log p_t = -softplus(d) and 1 - p_t = sigmoid(d) have no cancellation.
template <class T>
struct RowStats {
  T logp, entropy;
};

template <class T>
COSMO_INLINE RowStats<T> finish_row(double target, double max, double sum, double moment) {
  if (target == std::numeric_limits<double>::infinity()) {  // an overflow, not certainty
    return {std::numeric_limits<T>::quiet_NaN(), std::numeric_limits<T>::quiet_NaN()};
  }
  if (max == -std::numeric_limits<double>::infinity()) {  // no other column can be drawn (or there is none)
    double certain = target > max ? 0.0 : std::numeric_limits<double>::quiet_NaN();
    return {T(certain), T(certain)};
  }
  double log_sum = std::log(sum);
  double d = max - target + log_sum;
  double small = std::log1p(std::exp(-std::fabs(d)));
  double logp = -(d > 0 ? d + small : small), log_other = -(d < 0 ? small - d : small);
  double p = std::exp(logp), other = std::exp(log_other);
  double entropy = other * (log_sum - moment / sum);
  entropy -= p > 0 ? p * logp : 0.0;
  entropy -= other > 0 ? other * log_other : 0.0;
  return {T(d != d ? d : logp), T(d != d ? d : entropy)};
}

}  // namespace cosmo_fast
