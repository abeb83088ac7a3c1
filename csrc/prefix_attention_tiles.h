// Matrix tiles (AMX) for prefix_attention: the product of bf16 with sums in fp32, and the layouts that it wants.
#pragma once

#include "prefix_attention_product.h"

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && __GNUC__ >= 12 && !defined(COSMO_ONE_ISA)
#define COSMO_AMX 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define COSMO_TILES \
  __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,avx2,bmi2")))

namespace cosmo_fast::prefix_attention {
namespace {

// Whether the processor has tiles and the kernel lets this process use them.
inline bool has_tiles() {
  static const bool has = [] {
    if (!__builtin_cpu_supports("x86-64-v4") || !__builtin_cpu_supports("amx-tile") ||
        !__builtin_cpu_supports("amx-bf16") || !__builtin_cpu_supports("avx512bf16")) {
      return false;
    }
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  }();
  return has;
}

constexpr int64_t kTiled = 64;  // lanes of a block

COSMO_TILES inline void configure_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  asm volatile("" ::: "memory");
  _tile_loadconfig(&config);
}

// C (16 M, 16 N) fp32, from A (16 M, depth) bf16 and B (depth / 2, 16 N) pairs of bf16, one below the other; rows are
// bytes apart. Added to what is there if `sum`.
template <int M, int N>
COSMO_TILES COSMO_INLINE void tiles(int64_t depth, const char* a, int64_t a_row, const char* b, int64_t b_row, char* c,
                                    int64_t c_row, bool sum) {
  if (sum) {
    _tile_loadd(0, c, c_row);
    if (N > 1) _tile_loadd(1, c + 64, c_row);
    if (M > 1) _tile_loadd(2, c + 16 * c_row, c_row);
    if (M > 1 && N > 1) _tile_loadd(3, c + 16 * c_row + 64, c_row);
  } else {
    _tile_zero(0);
    if (N > 1) _tile_zero(1);
    if (M > 1) _tile_zero(2);
    if (M > 1 && N > 1) _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += 32, a += 64, b += 16 * b_row) {
    _tile_loadd(4, a, a_row);
    _tile_loadd(6, b, b_row);
    if (N > 1) _tile_loadd(7, b + 64, b_row);
    if (M > 1) _tile_loadd(5, a + 16 * a_row, a_row);
    _tile_dpbf16ps(0, 4, 6);
    if (N > 1) _tile_dpbf16ps(1, 4, 7);
    if (M > 1) _tile_dpbf16ps(2, 5, 6);
    if (M > 1 && N > 1) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_row);
  if (N > 1) _tile_stored(1, c + 64, c_row);
  if (M > 1) _tile_stored(2, c + 16 * c_row, c_row);
  if (M > 1 && N > 1) _tile_stored(3, c + 16 * c_row + 64, c_row);
}

// rows and columns are multiples of 16, depth of 32. a_row counts bf16, b_row pairs, c_row floats.
COSMO_TILES __attribute__((noinline)) void tile_product(int64_t rows, int64_t columns, int64_t depth, const bf16* a,
                                                        int64_t a_row, const uint32_t* b, int64_t b_row, float* c,
                                                        int64_t c_row, bool sum) {
  asm volatile("" ::: "memory");  // the compiler does not know what tile loads and stores touch
  const int64_t a_bytes = 2 * a_row, b_bytes = 4 * b_row, c_bytes = 4 * c_row;
  for (int64_t i = 0; i < rows; i += 32) {
    const char* from = reinterpret_cast<const char*>(a + i * a_row);
    for (int64_t j = 0; j < columns; j += 32) {
      const char* with = reinterpret_cast<const char*>(b + j);
      char* to = reinterpret_cast<char*>(c + i * c_row + j);
      if (rows - i > 16) {
        columns - j > 16 ? tiles<2, 2>(depth, from, a_bytes, with, b_bytes, to, c_bytes, sum)
                         : tiles<2, 1>(depth, from, a_bytes, with, b_bytes, to, c_bytes, sum);
      } else {
        columns - j > 16 ? tiles<1, 2>(depth, from, a_bytes, with, b_bytes, to, c_bytes, sum)
                         : tiles<1, 1>(depth, from, a_bytes, with, b_bytes, to, c_bytes, sum);
      }
    }
  }
  asm volatile("" ::: "memory");
}

// 2^x to 4e-6, 0 far below.
COSMO_TILES COSMO_INLINE __m512 exp2_rough(__m512 x) {
  const __m512 r = _mm512_reduce_ps(x, 0), n = _mm512_sub_ps(x, r);
  __m512 p = _mm512_fmadd_ps(r, _mm512_set1_ps(9.58285e-3f), _mm512_set1_ps(5.590642e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4024099e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9312419e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

// Two vectors of lanes as pairs, the first in the low halves.
COSMO_TILES COSMO_INLINE __m512i paired(__m512 low, __m512 high) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

// Key rows as tiles need them, `count` up to a multiple of 32 and `wide` elements: where they lie, or copied beside
// zeros.
COSMO_TILES COSMO_INLINE Rows<bf16> tile_rows(const View<const bf16>& x, int64_t row, int64_t head, int64_t count,
                                              int64_t size, int64_t wide, bf16* space) {
  if (count % 32 == 0 && size == wide) return {x.at(row, head), x.row};
  std::memset(space, 0, (count + 31) / 32 * 32 * wide * sizeof(bf16));
  for (int64_t i = 0; i < count; ++i) std::memcpy(space + i * wide, x.at(row + i, head), size * sizeof(bf16));
  return {space, wide};
}

// Two rows of 16 bf16 as pairs.
COSMO_TILES COSMO_INLINE u32x16 pair_rows(const bf16* low, const bf16* high) {
  const __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low)));
  const __m512i y = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(high)));
  return (u32x16)_mm512_or_si512(x, _mm512_slli_epi32(y, 16));
}

// Rows (n, d) of bf16 turned into (d, n), n and d multiples of 32.
COSMO_TILES COSMO_INLINE void turn(Rows<bf16> x, int64_t n, int64_t d, bf16* to, int64_t to_row) {
  for (int64_t i = 0; i < n; i += 32) {
    for (int64_t j = 0; j < d; j += 16) {
      u32x16 pairs[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) {
        const bf16* from = x.data + (i + 2 * r) * x.stride + j;
        pairs[r] = pair_rows(from, from + x.stride);
      }
      turn_square(pairs);
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) std::memcpy(to + (j + r) * to_row + i, &pairs[r], 64);
    }
  }
}

// The block's rows of x as (lanes, wide), zeros where there is none.
COSMO_TILES COSMO_INLINE void gather(const View<const bf16>& x, const Plan& plan, const Block& block, const Sizes& n,
                                     int64_t h, int64_t wide, bf16* to) {
  std::memset(to, 0, kTiled * wide * sizeof(bf16));
  each_lane(plan, block, n.rep, h, [&](int64_t lane, int64_t token, int64_t head) __attribute__((always_inline)) {
    std::memcpy(to + lane * wide, x.at(token, head), n.size * sizeof(bf16));
  });
}

// (lanes, wide) bf16 as pairs of elements (wide / 2, lanes).
COSMO_TILES COSMO_INLINE void pair_elements(const bf16* from, int64_t wide, uint32_t* to) {
  turn_matrix<u32x16>(kTiled, wide / 2, reinterpret_cast<const uint32_t*>(from), wide / 2, to, kTiled);
}

// x (wide, lanes) times a factor a lane, turned into the block's rows of `to`; `space` is for (lanes, wide).
COSMO_TILES COSMO_INLINE void scatter(const float* x, const float* factor, float* space, const View<bf16>& to,
                                      const Plan& plan, const Block& block, const Sizes& n, int64_t h, int64_t wide) {
  turn_matrix<f32x16>(wide, (block.lanes + 15) / 16 * 16, x, kTiled, space, wide);
  each_lane(plan, block, n.rep, h, [&](int64_t lane, int64_t token, int64_t head) COSMO_TILES {
    bf16* row = to.at(token, head);
    for (int64_t d = 0; d < n.size; d += 16) {
      const __m512 y = _mm512_mul_ps(_mm512_loadu_ps(space + lane * wide + d), _mm512_set1_ps(factor[lane]));
      const __mmask16 some = n.size - d >= 16 ? 0xffff : (1 << (n.size - d)) - 1;
      _mm256_mask_storeu_epi16(row + d, some, (__m256i)_mm512_cvtneps_pbh(y));
    }
  });
}

}  // namespace
}  // namespace cosmo_fast::prefix_attention
#endif
