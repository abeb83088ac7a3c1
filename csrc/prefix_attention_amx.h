// prefix_attention in bf16 on processors with matrix tiles (AMX): the same walk over blocks and tiles of keys, with
// every product on 16 × 16 tiles and sums in fp32. A tile's rows and columns do not touch each other, so that here,
// too, a row's bits are its own business. Weights and their gradients are rounded to bf16 between two products.
#pragma once

#include <cmath>
#include <utility>

#include "prefix_attention_tiles.h"

#ifdef COSMO_AMX
namespace cosmo_fast::prefix_attention {
namespace {

struct TiledForward {
  const Forward<bf16, float>& a;
  int64_t h, wide;  // the head size in whole tiles
  float c;          // what turns scores into exponents of 2
  bool turned;      // a negative scale: the queries change sign
  // Of each block: queries as pairs (wide / 2, lanes), out (wide, lanes), m, l. Of a tile: see below.
  int64_t kept_size;
  char* kept;
  float *scores, *part, *limits, *alpha;
  uint32_t* weights;
  bf16 *space, *values;

  COSMO_TILES TiledForward(const Forward<bf16, float>& a, int64_t h) : a(a), h(h), wide((a.n.size + 31) / 32 * 32) {
    c = std::fabs(a.scale) * 1.44269504088896341f;
    turned = a.scale < 0;
    kept_size = (wide * 2 + wide * 4 + 8) * kTiled;
    const int64_t tile = kTile * kTiled;
    kept = reinterpret_cast<char*>(scratch<float>(
        (kStrip * kept_size + tile * 4 + wide * kTiled * 4 + 2 * 4 * kTiled + tile * 2 + kTile * wide * 4) / 4));
    scores = reinterpret_cast<float*>(kept + kStrip * kept_size);
    part = scores + tile;
    limits = part + wide * kTiled;
    alpha = limits + kTiled;
    weights = reinterpret_cast<uint32_t*>(alpha + kTiled);
    space = reinterpret_cast<bf16*>(weights + tile / 2);
    values = space + kTile * wide;
  }
  COSMO_INLINE uint32_t* queries(int64_t slot) const { return reinterpret_cast<uint32_t*>(kept + slot * kept_size); }
  COSMO_INLINE float* out(int64_t slot) const { return reinterpret_cast<float*>(queries(slot) + wide / 2 * kTiled); }
  COSMO_INLINE float* m(int64_t slot) const { return out(slot) + wide * kTiled; }
  COSMO_INLINE float* l(int64_t slot) const { return m(slot) + kTiled; }

  // Scores of 16 lanes become weights, as pairs of keys; n is rounded up to 32 with weights 0.
  template <bool kMasked>
  COSMO_TILES COSMO_INLINE void soften(int64_t n, int64_t at, float* m, float* l) const {
    const __m512 none = _mm512_set1_ps(-std::numeric_limits<float>::infinity()), scale = _mm512_set1_ps(c);
    const __m512 before = _mm512_loadu_ps(m + at), limit = _mm512_loadu_ps(limits + at);
    const float* s = scores + at;
    __m512 tops[4] = {none, none, none, none};  // one chain of maxima would wait for itself
    for (int64_t j = 0; j < n; j += 4) {
#pragma GCC unroll 4
      for (int64_t i = 0; i < 4; ++i) {  // rows past n are there, and count for nothing
        const __m512 x = _mm512_loadu_ps(s + (j + i) * kTiled), at = _mm512_set1_ps(float(j + i));
        const __mmask16 seen = kMasked ? _mm512_cmp_ps_mask(at, limit, _CMP_LT_OQ) : j + i < n ? 0xffff : 0;
        tops[i] = _mm512_mask_max_ps(tops[i], seen, x, tops[i]);  // which is the second where the first is NaN
      }
    }
    __m512 top = _mm512_max_ps(_mm512_max_ps(tops[0], tops[1]), _mm512_max_ps(tops[2], tops[3]));
    top = _mm512_max_ps(_mm512_mul_ps(top, scale), before);
    const __m512 base = _mm512_mask_mov_ps(top, _mm512_cmp_ps_mask(top, none, _CMP_EQ_OQ), _mm512_setzero_ps());
    __m512 factor = exp2_rough(_mm512_sub_ps(before, base)), sum = _mm512_setzero_ps();
    auto weight = [&](int64_t j) COSMO_TILES __attribute__((always_inline)) {
      __m512 e = exp2_rough(_mm512_fmsub_ps(_mm512_loadu_ps(s + j * kTiled), scale, base));
      const __m512 at = _mm512_set1_ps(float(j));
      if (kMasked) e = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(at, limit, _CMP_LT_OQ), e);
      return e;
    };
    int64_t j = 0;
    for (; j + 2 <= n; j += 2) {
      const __m512 first = weight(j), second = weight(j + 1);
      sum = _mm512_add_ps(sum, _mm512_add_ps(first, second));
      _mm512_storeu_si512(weights + j / 2 * kTiled + at, paired(first, second));
    }
    if (j < n) {
      const __m512 first = weight(j);
      sum = _mm512_add_ps(sum, first);
      _mm512_storeu_si512(weights + j / 2 * kTiled + at, paired(first, _mm512_setzero_ps()));
      j += 2;
    }
    for (; j < (n + 31) / 32 * 32; j += 2) _mm512_storeu_si512(weights + j / 2 * kTiled + at, _mm512_setzero_si512());
    _mm512_storeu_ps(m + at, top);
    _mm512_storeu_ps(l + at, _mm512_fmadd_ps(_mm512_loadu_ps(l + at), factor, sum));
    const __mmask16 seen = _mm512_cmp_ps_mask(limit, _mm512_setzero_ps(), _CMP_GT_OQ);
    if (kMasked) factor = _mm512_mask_mov_ps(_mm512_set1_ps(-1.0f), seen, factor);
    _mm512_storeu_ps(alpha + at, factor);
  }

  // One tile of keys (k as it lies, `values` turned) and the lanes of one block from 16 * first to 16 * last.
  COSMO_TILES COSMO_INLINE void add(Rows<bf16> k, int64_t n, int64_t slot, int64_t first, int64_t last,
                                    bool masked) const {
    const int64_t at = 16 * first, lanes = 16 * (last - first), keys = (n + 31) / 32 * 32;
    tile_product(keys, lanes, wide, k.data, k.stride, queries(slot) + at, kTiled, scores + at, kTiled, false);
    for (int64_t i = at; i < 16 * last; i += 16) {
      masked ? soften<true>(n, i, m(slot), l(slot)) : soften<false>(n, i, m(slot), l(slot));
    }
    tile_product(wide, lanes, keys, values, kTile, weights + at, kTiled, part + at, kTiled, false);
    for (int64_t d = 0; d < wide; ++d) {
      for (int64_t i = at; i < 16 * last; i += 16) {
        const __m512 factor = _mm512_loadu_ps(alpha + i);
        float* to = out(slot) + d * kTiled + i;
        const __m512 x = _mm512_fmadd_ps(_mm512_loadu_ps(to), factor, _mm512_loadu_ps(part + d * kTiled + i));
        _mm512_mask_storeu_ps(to, _mm512_cmp_ps_mask(factor, _mm512_setzero_ps(), _CMP_NLT_UQ), x);
      }
    }
  }

  COSMO_TILES COSMO_INLINE Rows<bf16> tile(int64_t row, int64_t n) const {
    const Rows<bf16> v = tile_rows(a.v, row, h, n, a.n.size, wide, space);
    turn(v, (n + 31) / 32 * 32, wide, values, kTile);
    return tile_rows(a.k, row, h, n, a.n.size, wide, space);
  }

  COSMO_TILES COSMO_INLINE void open(const Block& block, int64_t slot) const {
    std::memset(kept + slot * kept_size, 0, kept_size);
    std::fill(m(slot), l(slot), -std::numeric_limits<float>::infinity());
    bf16* rows = reinterpret_cast<bf16*>(part);
    gather(a.q, a.plan, block, a.n, h, wide, rows);
    if (turned) {
      for (int64_t i = 0; i < kTiled * wide; ++i) rows[i].bits ^= 0x8000;
    }
    pair_elements(rows, wide, queries(slot));
  }

  COSMO_TILES COSMO_INLINE void close(const Block& block, int64_t slot) const {
    const float *top = m(slot), *sum = l(slot);
    for (int64_t i = 0; i < kTiled; ++i) alpha[i] = 1.0f / sum[i];
    scatter(out(slot), alpha, part, a.out, a.plan, block, a.n, h, wide);
    each_lane(a.plan, block, a.n.rep, h, [&](int64_t lane, int64_t token, int64_t head) __attribute__((always_inline)) {
      a.lse[token * a.n.key_heads * a.n.rep + head] = top[lane] * 0.693147180559945309f + std::log(sum[lane]);
    });
  }

  COSMO_TILES void run(int64_t first_block, int64_t last_block) const {
    const std::vector<Block>& blocks = a.plan.blocks;
    const std::vector<Piece>& pieces = a.plan.pieces;
    for (int64_t b = first_block; b < last_block; ++b) open(blocks[b], b - first_block);
    const Block& block = blocks[first_block];
    for (int64_t start = 0; start < block.prefix_length; start += kTile) {
      const int64_t n = std::min(kTile, block.prefix_length - start);
      const Rows<bf16> k = tile(block.prefix + start, n);
      for (int64_t b = first_block; b < last_block; ++b) {
        add(k, n, b - first_block, 0, (blocks[b].lanes + 15) / 16, false);
      }
    }
    const int64_t end = blocks[last_block - 1].last_piece;
    for (int64_t i = block.first_piece, j; i < end; i = j) {
      for (j = i; j < end && pieces[j].segment == pieces[i].segment;) ++j;
      const int64_t keys = pieces[j - 1].limit(pieces[j - 1].end - 1, a.n.rep);
      for (int64_t start = 0; start < keys; start += kTile) {
        const Rows<bf16> k = tile(pieces[i].keys + start, std::min(kTile, keys - start));
        for (int64_t x = i; x < j; ++x) {
          const int64_t first = pieces[x].begin / 16, last = (pieces[x].end + 15) / 16;
          const int64_t n = limits_of(pieces[x], start, a.n.rep, 16 * first, 16 * last, limits);
          if (n > 0) add(k, n, pieces[x].block - first_block, first, last, true);
        }
      }
    }
    for (int64_t b = first_block; b < last_block; ++b) close(blocks[b], b - first_block);
  }
};

// The blocks of one part, as many at once as stay in the cache.
COSMO_TILES inline void run_tiled(const Forward<bf16, float>& a, int64_t index, int64_t h) {
  const Part& part = a.plan.parts[index];
  const TiledForward strip(a, h);
  configure_tiles();
  for (int64_t b = part.first_block; b < part.last_block; b += kStrip) {
    strip.run(b, std::min(b + kStrip, part.last_block));
  }
  _tile_release();
}

struct TiledBackward {
  const Backward<bf16, float>& a;
  int64_t h, wide;
  float c;
  bool turned;
  static constexpr int64_t kAll = kStrip * kTiled;  // lanes of a strip
  // Of the strip: queries and gradients as pairs of elements (wide / 2, lanes of a block) and as pairs of lanes
  // (all / 2, wide); dQ (wide, lanes of a block); log-sum-exp and delta (all). Of a tile: weights and the gradients of
  // the scores (keys, all), those of a block as pairs of keys, too, and what the products need.
  uint32_t *qt, *gt, *q, *g, *pairs;
  float *dq, *lse, *delta, *scores, *grads, *part, *limits;
  bf16 *p, *ds, *space, *keys;

  COSMO_TILES TiledBackward(const Backward<bf16, float>& a, int64_t h) : a(a), h(h), wide(a.n.padded) {
    c = std::fabs(a.scale) * 1.44269504088896341f;
    turned = a.scale < 0;
    const int64_t tile = kTile * kTiled, words = wide / 2 * kAll, most = std::max(kTile, kTiled) * wide;
    uint32_t* at = scratch<uint32_t>(6 * words + 2 * kAll + tile * 2 + tile / 2 + most + kTiled + kTile * kAll +
                                     3 * kTile * wide / 2);
    auto take = [&](int64_t n) { return std::exchange(at, at + n); };
    auto floats = [&](int64_t n) { return reinterpret_cast<float*>(take(n)); };
    auto halves = [&](int64_t n) { return reinterpret_cast<bf16*>(take(n / 2)); };
    qt = take(words), gt = take(words), q = take(words), g = take(words), dq = floats(2 * words);
    lse = floats(kAll), delta = floats(kAll), scores = floats(tile), grads = floats(tile), pairs = take(tile / 2);
    part = floats(most), limits = floats(kTiled), p = halves(kTile * kAll), ds = halves(kTile * kAll);
    space = halves(2 * kTile * wide), keys = halves(kTile * wide);
  }

  // Scores and gradients of the weights of 32 lanes become the weights and the gradients of the scores.
  template <bool kMasked>
  COSMO_TILES COSMO_INLINE void soften(int64_t n, int64_t slot, int64_t at) const {
    const __m512 scale = _mm512_set1_ps(c);
    const int64_t all = slot * kTiled + at;
    __m512 base[2], mean[2], limit[2];
    for (int i = 0; i < 2; ++i) {
      base[i] = _mm512_loadu_ps(lse + all + 16 * i), mean[i] = _mm512_loadu_ps(delta + all + 16 * i);
      limit[i] = _mm512_loadu_ps(limits + at + 16 * i);
    }
    for (int64_t j = 0; j < (n + 31) / 32 * 32; j += 2) {
      __m512 d[2][2] = {};
      for (int k = 0; k < 2 && j + k < n; ++k) {
        __m512 e[2];
        for (int i = 0; i < 2; ++i) {
          const int64_t from = (j + k) * kTiled + at + 16 * i;
          e[i] = exp2_rough(_mm512_fmsub_ps(_mm512_loadu_ps(scores + from), scale, base[i]));
          d[k][i] = _mm512_mul_ps(e[i], _mm512_sub_ps(_mm512_loadu_ps(grads + from), mean[i]));
          if (kMasked) {
            const __mmask16 seen = _mm512_cmp_ps_mask(_mm512_set1_ps(float(j + k)), limit[i], _CMP_LT_OQ);
            e[i] = _mm512_maskz_mov_ps(seen, e[i]), d[k][i] = _mm512_maskz_mov_ps(seen, d[k][i]);
          }
        }
        _mm512_storeu_si512(p + (j + k) * kAll + all, (__m512i)_mm512_cvtne2ps_pbh(e[1], e[0]));
        _mm512_storeu_si512(ds + (j + k) * kAll + all, (__m512i)_mm512_cvtne2ps_pbh(d[k][1], d[k][0]));
      }
      for (int i = 0; i < 2; ++i) _mm512_storeu_si512(pairs + j / 2 * kTiled + at + 16 * i, paired(d[0][i], d[1][i]));
    }
  }

  // What one tile of keys and the lanes of one block from 32 * first to 32 * last have to do with each other; dQ.
  COSMO_TILES COSMO_INLINE void add(Rows<bf16> k, Rows<bf16> v, int64_t n, int64_t slot, int64_t first, int64_t last,
                                    bool masked) const {
    const int64_t at = 32 * first, lanes = 32 * (last - first), deep = (n + 31) / 32 * 32,
                  of = slot * kTiled * wide / 2;
    tile_product(deep, lanes, wide, k.data, k.stride, qt + of + at, kTiled, scores + at, kTiled, false);
    tile_product(deep, lanes, wide, v.data, v.stride, gt + of + at, kTiled, grads + at, kTiled, false);
    for (int64_t i = at; i < 32 * last; i += 32) masked ? soften<true>(n, slot, i) : soften<false>(n, slot, i);
    tile_product(wide, lanes, deep, keys, kTile, pairs + at, kTiled, part + at, kTiled, false);
    for (int64_t i = at; i < 32 * last; i += 16) {
      __mmask16 some = 0xffff;
      if (masked) some = _mm512_cmp_ps_mask(_mm512_loadu_ps(limits + i), _mm512_setzero_ps(), _CMP_GT_OQ);
      for (int64_t d = 0; d < wide; ++d) {
        float* to = dq + 2 * of + d * kTiled + i;
        const __m512 x = _mm512_add_ps(_mm512_loadu_ps(to), _mm512_loadu_ps(part + d * kTiled + i));
        _mm512_mask_storeu_ps(to, some, x);
      }
    }
  }

  // dV and dK of a tile by the lanes [begin, end) of the strip, multiples of 32.
  COSMO_TILES COSMO_INLINE void add_keys(int64_t n, int64_t begin, int64_t end, int64_t sums) const {
    for (int64_t x = 0; x < 2; ++x) {
      float* to = a.sums + ((2 * h + x) * a.plan.sums + sums) * wide;
      const bf16* from = (x ? ds : p) + begin;
      const uint32_t* with = (x ? q : g) + begin / 2 * wide;
      if (n % 16 == 0) {
        tile_product(n, wide, end - begin, from, kAll, with, wide, to, wide, true);
      } else {
        tile_product((n + 15) / 16 * 16, wide, end - begin, from, kAll, with, wide, part, wide, false);
        for (int64_t i = 0; i < n * wide; ++i) to[i] += part[i];
      }
    }
  }

  COSMO_TILES COSMO_INLINE void open(const Block& block, int64_t slot) const {
    bf16* rows = reinterpret_cast<bf16*>(part);
    const int64_t of = slot * kTiled * wide / 2;
    for (int x = 0; x < 2; ++x) {
      gather(x ? a.grad : a.q, a.plan, block, a.n, h, wide, rows);
      for (int64_t lane = 0; lane < kTiled; lane += 2) {
        for (int64_t d = 0; d < wide; d += 16) {
          const u32x16 both = pair_rows(rows + lane * wide + d, rows + (lane + 1) * wide + d);
          std::memcpy((x ? g : q) + of + lane / 2 * wide + d, &both, 64);
        }
      }
      if (x == 0 && turned) {
        for (int64_t i = 0; i < kTiled * wide; ++i) rows[i].bits ^= 0x8000;
      }
      pair_elements(rows, wide, (x ? gt : qt) + of);
    }
    std::fill_n(dq + 2 * of, kTiled * wide, 0.0f);
    float *base = lse + slot * kTiled, *mean = delta + slot * kTiled;
    std::fill_n(base, kTiled, 0.0f);
    std::fill_n(mean, kTiled, 0.0f);
    each_lane(a.plan, block, a.n.rep, h, [&](int64_t lane, int64_t token, int64_t head) __attribute__((always_inline)) {
      const bf16* o = a.out.at(token, head);
      float sum[16] = {};
      for (int64_t d = 0; d < a.n.size; ++d) sum[d % 16] += load(rows[lane * wide + d]) * load(o[d]);
      for (float x : sum) mean[lane] += x;
      base[lane] = a.lse[token * a.n.key_heads * a.n.rep + head] * 1.44269504088896341f;
    });
  }

  COSMO_TILES COSMO_INLINE Rows<bf16> tile(int64_t row, int64_t n, Rows<bf16>* v) const {
    const Rows<bf16> k = tile_rows(a.k, row, h, n, a.n.size, wide, space);
    turn(k, (n + 31) / 32 * 32, wide, keys, kTile);
    *v = tile_rows(a.v, row, h, n, a.n.size, wide, space + kTile * wide);
    return k;
  }

  COSMO_TILES void run(int64_t first_block, int64_t last_block, int64_t part_sums) const {
    const std::vector<Block>& blocks = a.plan.blocks;
    const std::vector<Piece>& pieces = a.plan.pieces;
    for (int64_t b = first_block; b < last_block; ++b) open(blocks[b], b - first_block);
    const Block& block = blocks[first_block];
    Rows<bf16> v;
    for (int64_t start = 0; start < block.prefix_length; start += kTile) {
      const int64_t n = std::min(kTile, block.prefix_length - start);
      const Rows<bf16> k = tile(block.prefix + start, n, &v);
      for (int64_t b = first_block; b < last_block; ++b) {
        add(k, v, n, b - first_block, 0, (blocks[b].lanes + 31) / 32, false);
      }
      const int64_t end = (last_block - 1 - first_block) * kTiled + (blocks[last_block - 1].lanes + 31) / 32 * 32;
      add_keys(n, 0, end, part_sums + start);
    }
    const int64_t end = blocks[last_block - 1].last_piece;
    for (int64_t i = block.first_piece, j; i < end; i = j) {
      for (j = i; j < end && pieces[j].segment == pieces[i].segment;) ++j;
      const int64_t all = pieces[j - 1].limit(pieces[j - 1].end - 1, a.n.rep);
      for (int64_t start = 0; start < all; start += kTile) {
        const int64_t n = std::min(kTile, all - start);
        const Rows<bf16> k = tile(pieces[i].keys + start, n, &v);
        int64_t begin = -1, to = 0;
        for (int64_t x = i; x < j; ++x) {
          const int64_t slot = pieces[x].block - first_block;
          if (limits_of(pieces[x], start, a.n.rep, 0, kTiled, limits) <= 0) continue;
          add(k, v, n, slot, pieces[x].begin / 32, (pieces[x].end + 31) / 32, true);
          if (begin < 0) begin = slot * kTiled + pieces[x].begin;
          to = slot * kTiled + (pieces[x].end + 31) / 32 * 32;
        }
        add_keys(n, begin, to, pieces[i].sums + start);
      }
    }
    std::fill_n(limits, kTiled, a.scale);
    for (int64_t b = first_block; b < last_block; ++b) {
      scatter(dq + (b - first_block) * kTiled * wide, limits, part, a.dq, a.plan, blocks[b], a.n, h, wide);
    }
  }
};

COSMO_TILES inline void run_tiled(const Backward<bf16, float>& a, int64_t index, int64_t h) {
  const Part& part = a.plan.parts[index];
  clear_sums(a, index, h);
  const TiledBackward strip(a, h);
  configure_tiles();
  for (int64_t b = part.first_block; b < part.last_block; b += kStrip) {
    strip.run(b, std::min(b + kStrip, part.last_block), part.sums);
  }
  _tile_release();
}

}  // namespace
}  // namespace cosmo_fast::prefix_attention
#endif
