// Matrices of prefix_attention on vectors: the product, fp32 and fp64, and the transpose.
#pragma once

#include "prefix_attention_rows.h"

namespace cosmo_fast::prefix_attention {

// A square of vectors turned: as many rounds of interleaving row i with row i + half as it takes.
template <class V>
COSMO_INLINE void turn_square(V (&x)[sizeof(V) / sizeof(V{}[0])]) {
  constexpr int w = sizeof(V) / sizeof(V{}[0]);
  using I = std::conditional_t<w == 16, u32x16, u64x8>;
  I low, high;
#pragma GCC unroll 16
  for (int i = 0; i < w; ++i) low[i] = i / 2 + i % 2 * w, high[i] = low[i] + w / 2;
#pragma GCC unroll 4
  for (int round = 1; round < w; round *= 2) {
    V y[w];
#pragma GCC unroll 8
    for (int i = 0; i < w / 2; ++i) {
#ifdef __clang__
      for (int j = 0; j < w; ++j) {
        y[2 * i][j] = (j % 2 ? x[i + w / 2] : x[i])[j / 2];
        y[2 * i + 1][j] = (j % 2 ? x[i + w / 2] : x[i])[j / 2 + w / 2];
      }
#else
      y[2 * i] = __builtin_shuffle(x[i], x[i + w / 2], low);
      y[2 * i + 1] = __builtin_shuffle(x[i], x[i + w / 2], high);
#endif
    }
#pragma GCC unroll 16
    for (int i = 0; i < w; ++i) x[i] = y[i];
  }
}

// A matrix of multiples of a vector's width turned: (rows, columns) to (columns, rows).
template <class V, class E>
COSMO_INLINE void turn_matrix(int64_t rows, int64_t columns, const E* from, int64_t from_row, E* to, int64_t to_row) {
  constexpr int w = sizeof(V) / sizeof(E);
  for (int64_t i = 0; i < rows; i += w) {
    for (int64_t j = 0; j < columns; j += w) {
      V x[w];
#pragma GCC unroll 16
      for (int r = 0; r < w; ++r) std::memcpy(&x[r], from + (i + r) * from_row + j, 64);
      turn_square(x);
#pragma GCC unroll 16
      for (int r = 0; r < w; ++r) std::memcpy(to + (j + r) * to_row + i, &x[r], 64);
    }
  }
}

// What becomes of what is there: it is overwritten, or added to; times `factor` (one a column) before that; or only in
// the columns whose factor is not negative, where the others stay as they are even if the product there is NaN.
enum class Into { kZero, kSum, kScaled, kSome };

// C (rows, 16 or 8 vectors' columns) from A (rows, depth) of any strides and B (depth, columns).
template <class A>
struct Product {
  int64_t rows, vectors, depth;
  const A* a;
  int64_t a_row, a_depth;
  const A* b;
  int64_t b_row;
  A* c;
  int64_t c_row;
  Into into;
  const A* factor;
};

// R rows and N vectors of columns in registers. Every element is one chain of fused multiply-adds over the depth,
// whatever R and N are, and is added to what is there at its end: a long sum in short ones is more exact.
template <int R, int N, class A>
COSMO_INLINE void multiply_block(const Product<A>& x, const A* a, const A* b, A* c, const A* factor) {
  using V = Vector<A>;
  constexpr int64_t w = kWidth<A>;
  V sum[R][N];
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sum[r][n] = V{};
  }
  const int64_t a_row = x.a_row, a_depth = x.a_depth, b_row = x.b_row;
  for (int64_t k = 0; k < x.depth; ++k, a += a_depth, b += b_row) {
    V y[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) std::memcpy(&y[n], b + n * w, 64);
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r) {
      const A z = a[r * a_row];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[r][n] += y[n] * z;
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
    V times = V{} + A(1), old;
    if (x.into == Into::kScaled || x.into == Into::kSome) std::memcpy(&times, factor + n * w, 64);
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r) {
      A* to = c + r * x.c_row + n * w;
      if (x.into != Into::kZero) {
        std::memcpy(&old, to, 64);
        V total = sum[r][n] + old * times;
        sum[r][n] = x.into == Into::kSome ? (times < A(0) ? old : total) : total;
      }
      std::memcpy(to, &sum[r][n], 64);
    }
  }
}

// All rows: in blocks of R, then what is left in blocks of half as many.
template <int R, int N, class A>
COSMO_INLINE void multiply_rows(const Product<A>& x, int64_t column, int64_t row) {
  for (; row + R <= x.rows; row += R) {
    const A* factor = x.factor ? x.factor + column : nullptr;
    multiply_block<R, N>(x, x.a + row * x.a_row, x.b + column, x.c + row * x.c_row + column, factor);
  }
  if constexpr (R > 1) multiply_rows<R / 2, N>(x, column, row);
}

// 32 registers of 64 bytes: 24 sums, 4 of B and one of A.
template <class A>
COSMO_INLINE void multiply_wide(const Product<A>& x) {
  int64_t n = 0;
  for (; n + 4 <= x.vectors; n += 4) multiply_rows<6, 4>(x, n * kWidth<A>, 0);
  if (x.vectors - n == 3) multiply_rows<8, 3>(x, n * kWidth<A>, 0);
  if (x.vectors - n == 2) multiply_rows<12, 2>(x, n * kWidth<A>, 0);
  if (x.vectors - n == 1) multiply_rows<16, 1>(x, n * kWidth<A>, 0);
}

// A vector is kSplit registers, of which there are 16.
template <int kSplit, class A>
COSMO_INLINE void multiply_narrow(const Product<A>& x) {
  for (int64_t n = 0; n < x.vectors; ++n) multiply_rows<12 / kSplit, 1>(x, n * kWidth<A>, 0);
}

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && __GNUC__ >= 12 && !defined(COSMO_ONE_ISA)
#define COSMO_TARGET(arch) __attribute__((target("arch=" arch)))
COSMO_TARGET("x86-64-v4") inline void multiply_v4(const Product<float>& x) { multiply_wide(x); }
COSMO_TARGET("x86-64-v4") inline void multiply_v4(const Product<double>& x) { multiply_wide(x); }
COSMO_TARGET("x86-64-v3") inline void multiply_v3(const Product<float>& x) { multiply_narrow<2>(x); }
COSMO_TARGET("x86-64-v3") inline void multiply_v3(const Product<double>& x) { multiply_narrow<2>(x); }
inline void multiply_v1(const Product<float>& x) { multiply_narrow<4>(x); }
inline void multiply_v1(const Product<double>& x) { multiply_narrow<4>(x); }
template <class A>
inline void multiply(const Product<A>& x) {
  static const int level = __builtin_cpu_supports("x86-64-v4") ? 4 : __builtin_cpu_supports("x86-64-v3") ? 3 : 1;
  if (level == 4) return multiply_v4(x);
  level == 3 ? multiply_v3(x) : multiply_v1(x);
}
#elif defined(__AVX512F__)
template <class A>
inline void multiply(const Product<A>& x) {
  multiply_wide(x);
}
#elif defined(__AVX2__)
template <class A>
inline void multiply(const Product<A>& x) {
  multiply_narrow<2>(x);
}
#else
template <class A>
inline void multiply(const Product<A>& x) {
  multiply_narrow<4>(x);
}
#endif

}  // namespace cosmo_fast::prefix_attention
