// Scalar mathematics of the vocabulary rows. Plain loops over these functions vectorise: no branches, no libm calls.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#define COSMO_INLINE inline __attribute__((always_inline))

// The loops are compiled three times and the processor picks one when the library is loaded (an ifunc).
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && __GNUC__ >= 12
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

// The type in which a row of T is worked on: fp32 for bf16 and fp32, fp64 for the oracle.
template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

COSMO_INLINE float load(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
COSMO_INLINE float load(float x) { return x; }
COSMO_INLINE double load(double x) { return x; }

COSMO_INLINE void store(float* to, float x) { *to = x; }
COSMO_INLINE void store(double* to, double x) { *to = x; }
COSMO_INLINE void store(bf16* to, float x) {  // round to nearest even, as PyTorch does; a NaN stays one
  uint32_t bits = bit_cast<uint32_t>(x);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to->bits = uint16_t(x != x ? 0x7fc0 : rounded);
}

// exp(x) for x <= 0, to 1 ulp in fp32 and 2 ulp in fp64: x = n ln 2 + r, |r| <= ln 2 / 2, a polynomial in r, 2^n by its
// bits. The result is 0 where it would be subnormal. NaN gives NaN. (Cody and Waite; coefficients are Cephes expf's.)
COSMO_INLINE float exp_negative(float x) {
  float clamped = x < -87.0f ? -87.0f : x;
  float shifted = clamped * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: the integer n lands in the low bits
  float n = shifted - 12582912.0f;
  float r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t power = (bit_cast<uint32_t>(shifted) << 23) + (127u << 23);
  float result = p * bit_cast<float>(power);
  return x < -87.0f ? 0.0f : result;
}

COSMO_INLINE double exp_negative(double x) {
  double clamped = x < -708.0 ? -708.0 : x;
  double shifted = clamped * 1.4426950408889634074 + 6755399441055744.0;  // 1.5 * 2^52
  double n = shifted - 6755399441055744.0;
  double r = clamped - n * 6.93145751953125e-1;
  r = r - n * 1.42860682030941723212e-6;
  double rr = r * r;  // exp(r) = 1 + 2 r P(r^2) / (Q(r^2) - r P(r^2)), Cephes exp
  double p = r * ((1.26177193074810590878e-4 * rr + 3.02994407707441961300e-2) * rr + 9.99999999999999999910e-1);
  double q = ((3.00198505138664455042e-6 * rr + 2.52448340349684104192e-3) * rr + 2.27265548208155028766e-1) * rr + 2.0;
  uint64_t power = (bit_cast<uint64_t>(shifted) << 52) + (uint64_t(1023) << 52);
  double result = (1.0 + 2.0 * p / (q - p)) * bit_cast<double>(power);
  return x < -708.0 ? 0.0 : result;
}

COSMO_INLINE float copy_sign(float magnitude, float sign) {
  return bit_cast<float>(bit_cast<uint32_t>(magnitude) | (bit_cast<uint32_t>(sign) & 0x80000000u));
}
COSMO_INLINE double copy_sign(double magnitude, double sign) {
  return bit_cast<double>(bit_cast<uint64_t>(magnitude) | (bit_cast<uint64_t>(sign) & (uint64_t(1) << 63)));
}

// tanh with a small relative error everywhere: a polynomial near 0, the exponential elsewhere (Cephes tanhf, tanh).
COSMO_INLINE float tanh_fast(float x) {
  float a = x < 0 ? -x : x, xx = x * x;
  float p = -5.70498872745e-3f;
  p = p * xx + 2.06390887954e-2f;
  p = p * xx + -5.37397155531e-2f;
  p = p * xx + 1.33314422036e-1f;
  p = p * xx + -3.33332819422e-1f;
  float e = exp_negative(-2.0f * a);
  return a < 0.625f ? x + x * xx * p : copy_sign((1.0f - e) / (1.0f + e), x);
}
COSMO_INLINE double tanh_fast(double x) {
  double a = x < 0 ? -x : x, xx = x * x;
  double p = (-9.64399179425052238628e-1 * xx + -9.92877231001918586564e1) * xx + -1.61468768441708447952e3;
  double q = ((xx + 1.12811678491632931402e2) * xx + 2.23548839060100448583e3) * xx + 4.84406305325125486048e3;
  double e = exp_negative(-2.0 * a);
  return a < 0.625 ? x + x * xx * p / q : copy_sign((1.0 - e) / (1.0 + e), x);
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
