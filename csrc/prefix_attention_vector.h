// prefix_attention on vectors of lanes: any element type, head size and processor.
#pragma once

#include <cmath>
#include <utility>

#include "prefix_attention_product.h"

namespace cosmo_fast::prefix_attention {
namespace {

// `count` key rows as the products read them: where they lie, or widened into `space`.
template <class T, class A>
COSMO_INLINE Rows<A> rows_of(const View<const T>& x, int64_t row, int64_t head, int64_t count, int64_t size, A* space) {
  if constexpr (std::is_same_v<T, A>) {
    return {x.at(row, head), x.row};
  } else {
    for (int64_t i = 0; i < count; ++i) {
      const T* from = x.at(row + i, head);
      for (int64_t d = 0; d < size; ++d) space[i * size + d] = load(from[d]);
    }
    return {space, size};
  }
}

template <class A>
COSMO_INLINE Vector<A> get(const A* from) {
  Vector<A> x;
  std::memcpy(&x, from, 64);
  return x;
}
template <class A>
COSMO_INLINE void put(A* to, Vector<A> x) {
  std::memcpy(to, &x, 64);
}

// One vector of lanes of a tile's scores becomes weights e^(s - m); m and l go on, and `alpha` is what the sums so far
// are worth. Lanes that see nothing of the tile keep theirs and get alpha -1.
template <bool kMasked, class A>
COSMO_INLINE void soften(A* p, int64_t n, const A* limits, A scale, A* m, A* l, A* alpha) {
  using V = Vector<A>;
  constexpr A kNone = -std::numeric_limits<A>::infinity();
  const V before = get(m), limit = kMasked ? get(limits) : V{};
  const V zero{};
  V tops[2] = {before, before}, sums[2] = {};  // one chain of them would wait for itself
#pragma GCC unroll 4
  for (int64_t j = 0; j < n; ++j) {
    V s = get(p + j * kLanes<A>) * scale;
    if constexpr (kMasked) s = zero + A(j) < limit ? s : zero + kNone;
    tops[j % 2] = larger(s, tops[j % 2]);
  }
  const V top = larger(tops[0], tops[1]);
  const V base = top == kNone ? zero : top;
  V shift = before - base, factor = exp_bounded(shift);
#pragma GCC unroll 4
  for (int64_t j = 0; j < n; ++j) {
    V x = get(p + j * kLanes<A>) * scale - base;
    if constexpr (kMasked) x = zero + A(j) < limit ? x : zero + kNone;
    V e = exp_bounded(x);
    sums[j % 2] += e;
    put(p + j * kLanes<A>, e);
  }
  put(m, top);
  put(l, get(l) * factor + (sums[0] + sums[1]));
  if constexpr (kMasked) factor = limit > zero ? factor : zero - A(1);
  put(alpha, factor);
}

constexpr int64_t kFew = 6;  // from 8 on, a short tile takes longer this way

// A tile of own keys for a piece of `rows` <= kFew lanes, as in decoding: keys, then features, are the lanes of
// vectors, so that nothing is computed for lanes of others. Every sum runs in the same order as there. q and out are
// (rows, padded); limits, m and l have an element a row; `space` is for (kFew + kTile) * padded + kTile * kFew.
template <class A>
COSMO_INLINE void add_few(Rows<A> k, Rows<A> v, int64_t n, int64_t rows, int64_t padded, A scale, const A* limits,
                          const A* q, A* out, A* m, A* l, A* space) {
  using V = Vector<A>;
  constexpr int64_t w = kWidth<A>;
  constexpr A kNone = -std::numeric_limits<A>::infinity();
  A *p = space, *sums = p + kFew * kTile, *turned = sums + kFew * padded;
  const V zero{};
  V place{}, x[w];
  for (int64_t i = 0; i < w; ++i) place[i] = A(i);
  for (int64_t j = 0; j < n; j += w) {
    for (int64_t d = 0; d < padded; d += w) {
#pragma GCC unroll 16
      for (int64_t i = 0; i < w; ++i) x[i] = get(k.data + std::min(j + i, n - 1) * k.stride + d);
      turn_square(x);
#pragma GCC unroll 16
      for (int64_t i = 0; i < w; ++i) put(turned + (d + i) * kTile + j, x[i]);
    }
  }
  multiply<A>({rows, (n + w - 1) / w, padded, q, padded, 1, turned, kTile, p, kTile, Into::kZero, nullptr});
  A factors[kFew];
  for (int64_t r = 0; r < rows; ++r) {
    A *s = p + r * kTile, most = m[r], total[2] = {};
    const V limit = zero + limits[r];
    V top = zero + most;
    for (int64_t j = 0; j < n; j += w) top = larger(place + A(j) < limit ? get(s + j) * scale : zero + kNone, top);
    for (int64_t i = 0; i < w; ++i) most = top[i] > most ? top[i] : most;
    const A base = most == kNone ? A(0) : most;
    V shift = zero + (m[r] - base);
    factors[r] = exp_bounded(shift)[0];
    for (int64_t j = 0; j < n; j += w) {
      V y = get(s + j) * scale - base;
      y = place + A(j) < limit ? y : zero + kNone;
      put(s + j, exp_bounded(y));
    }
    for (int64_t j = 0; j < n; ++j) total[j % 2] += s[j];
    m[r] = most;
    l[r] = l[r] * factors[r] + (total[0] + total[1]);
  }
  multiply<A>({rows, padded / w, n, p, kTile, 1, v.data, v.stride, sums, padded, Into::kZero, nullptr});
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t d = 0; limits[r] > 0 && d < padded; d += w) {
      A* to = out + r * padded + d;
      put(to, get(sums + r * padded + d) + get(to) * factors[r]);
    }
  }
}

template <class T, class A>
COSMO_INLINE void forward_block(const Forward<T, A>& a, int64_t index, int64_t h) {
  constexpr int64_t w = kWidth<A>, lanes = kLanes<A>;
  const int64_t size = a.n.size, rep = a.n.rep;
  const Block& block = a.plan.blocks[index];
  const int64_t padded = a.n.padded;
  A* q = scratch<A>((3 * padded + 4 + kTile) * lanes + (kFew + kTile) * padded + kTile * (2 * size + kFew));
  A *out = q + padded * lanes, *p = out + padded * lanes, *m = p + kTile * lanes, *l = m + lanes, *alpha = l + lanes;
  A *limits = alpha + lanes, *rows = limits + lanes, *space = rows + padded * lanes;
  const int64_t all = (block.lanes + w - 1) / w;
  std::fill(out, p, A(0));
  std::fill(rows, rows + all * w * padded, A(0));
  std::fill(m, l, -std::numeric_limits<A>::infinity());
  std::fill(l, alpha, A(0));
  each_lane(a.plan, block, rep, h, [&](int64_t lane, int64_t token, int64_t head) __attribute__((always_inline)) {
    const T* from = a.q.at(token, head);
    for (int64_t d = 0; d < size; ++d) rows[lane * padded + d] = load(from[d]);
  });
  turn_matrix<Vector<A>>(all * w, padded, rows, padded, q, lanes);
  auto tile = [&](int64_t row, int64_t n, int64_t first, int64_t last, bool masked) __attribute__((always_inline)) {
    const int64_t at = first * w, vectors = last - first;
    Rows<A> x = rows_of<T, A>(a.k, row, h, n, size, space);
    multiply<A>({n, vectors, size, x.data, x.stride, 1, q + at, lanes, p + at, lanes, Into::kZero, nullptr});
    for (int64_t c = at; c < last * w; c += w) {
      masked ? soften<true>(p + c, n, limits + c, a.scale, m + c, l + c, alpha + c)
             : soften<false>(p + c, n, limits + c, a.scale, m + c, l + c, alpha + c);
    }
    x = rows_of<T, A>(a.v, row, h, n, size, space);
    multiply<A>({size, vectors, n, x.data, 1, x.stride, p + at, lanes, out + at, lanes,
                 masked ? Into::kSome : Into::kScaled, alpha + at});
  };
  for (int64_t start = 0; start < block.prefix_length; start += kTile) {
    tile(block.prefix + start, std::min(kTile, block.prefix_length - start), 0, all, false);
  }
  auto few = [&](const Piece& piece) { return piece.end - piece.begin <= kFew && size == padded; };
  for (int64_t i = block.first_piece; i < block.last_piece; ++i) {
    const Piece& piece = a.plan.pieces[i];
    const int64_t first = piece.begin / w, last = (piece.end + w - 1) / w, keys = piece.limit(piece.end - 1, rep);
    for (int64_t start = 0; !few(piece) && start < keys; start += kTile) {
      const int64_t n = limits_of(piece, start, rep, first * w, last * w, limits);
      tile(piece.keys + start, n, first, last, true);
    }
  }
  turn_matrix<Vector<A>>(padded, all * w, out, lanes, q, padded);  // the queries are still there, in rows
  for (int64_t i = block.first_piece; i < block.last_piece; ++i) {
    const Piece& piece = a.plan.pieces[i];
    const int64_t at = piece.begin, keys = few(piece) ? piece.limit(piece.end - 1, rep) : 0;
    for (int64_t start = 0; start < keys; start += kTile) {
      const int64_t n = limits_of(piece, start, rep, at, piece.end, limits);
      const Rows<A> k = rows_of<T, A>(a.k, piece.keys + start, h, n, size, space);
      const Rows<A> v = rows_of<T, A>(a.v, piece.keys + start, h, n, size, space + kTile * size);
      add_few(k, v, n, piece.end - at, padded, a.scale, limits + at, rows + at * padded, q + at * padded, m + at,
              l + at, space + 2 * kTile * size);
    }
  }
  each_lane(a.plan, block, rep, h, [&](int64_t lane, int64_t token, int64_t head) __attribute__((always_inline)) {
    T* to = a.out.at(token, head);
    const A inverse = A(1) / l[lane];
    for (int64_t d = 0; d < size; ++d) store(to + d, q[lane * padded + d] * inverse);
    a.lse[token * a.n.key_heads * rep + head] = m[lane] + std::log(l[lane]);
  });
}

// What the backward keeps of one block: queries and gradients as (D, lanes) and (lanes, padded D), dQ as (D, lanes).
template <class A>
struct Kept {
  A *qt, *gt, *dq, *q, *g, *lse, *delta;
  static int64_t elements(const Sizes& n) { return (5 * n.padded + 2) * kLanes<A>; }
  Kept(A* at, const Sizes& n) {
    constexpr int64_t lanes = kLanes<A>;
    qt = at, gt = qt + n.padded * lanes, dq = gt + n.padded * lanes, q = dq + n.padded * lanes;
    g = q + n.padded * lanes;
    lse = g + n.padded * lanes, delta = lse + lanes;
  }
};

template <class T, class A>
COSMO_INLINE void keep(const Backward<T, A>& a, const Block& block, int64_t h, const Kept<A>& x) {
  constexpr int64_t lanes = kLanes<A>;
  std::fill_n(x.dq, 3 * a.n.padded * lanes + 2 * lanes, A(0));
  each_lane(a.plan, block, a.n.rep, h, [&](int64_t lane, int64_t token, int64_t head) __attribute__((always_inline)) {
    const T *q = a.q.at(token, head), *g = a.grad.at(token, head), *o = a.out.at(token, head);
    A sums[16] = {};
    for (int64_t d = 0; d < a.n.size; ++d) {
      x.q[lane * a.n.padded + d] = load(q[d]);
      x.g[lane * a.n.padded + d] = load(g[d]);
      sums[d % 16] += A(load(g[d])) * A(load(o[d]));
    }
    for (A sum : sums) x.delta[lane] += sum;
    x.lse[lane] = a.lse[token * a.n.key_heads * a.n.rep + head];
  });
  turn_matrix<Vector<A>>(lanes, a.n.padded, x.q, a.n.padded, x.qt, lanes);
  turn_matrix<Vector<A>>(lanes, a.n.padded, x.g, a.n.padded, x.gt, lanes);
}

// One vector of lanes: scores s and gradients g of the weights become the weights, and the gradients of the scores.
template <bool kMasked, class A>
COSMO_INLINE void soften_back(A* s, A* g, int64_t n, const A* limits, A scale, const A* lse, const A* delta) {
  using V = Vector<A>;
  const V base = get(lse), mean = get(delta), limit = kMasked ? get(limits) : V{}, zero{};
  for (int64_t j = 0; j < n; ++j, s += kLanes<A>, g += kLanes<A>) {
    V x = get(s) * scale - base, p = exp_bounded(x), ds = p * (get(g) - mean) * scale;
    if constexpr (kMasked) {
      auto seen = zero + A(j) < limit;
      p = seen ? p : zero, ds = seen ? ds : zero;
    }
    put(s, p);
    put(g, ds);
  }
}

template <class T, class A>
struct Strip {
  const Backward<T, A>& a;
  int64_t h;
  A *kept, *p, *g, *limits, *space;
  COSMO_INLINE Strip(const Backward<T, A>& a, int64_t h) : a(a), h(h) {
    constexpr int64_t lanes = kLanes<A>;
    kept = scratch<A>(kStrip * Kept<A>::elements(a.n) + (2 * kTile + 2) * lanes + 2 * kTile * a.n.size);
    p = kept + kStrip * Kept<A>::elements(a.n), g = p + kTile * lanes, limits = g + kTile * lanes;
    space = limits + 2 * lanes;
  }

  // The keys' gradients by the lanes [begin, end) of a block, and theirs by the keys.
  COSMO_INLINE void add(Rows<A> k, Rows<A> v, int64_t n, int64_t slot, int64_t begin, int64_t end, bool masked,
                        int64_t sums) const {
    constexpr int64_t w = kWidth<A>, lanes = kLanes<A>;
    const int64_t size = a.n.size, padded = a.n.padded, first = begin / w, last = (end + w - 1) / w, at = first * w;
    const Kept<A> x(kept + slot * Kept<A>::elements(a.n), a.n);
    multiply<A>({n, last - first, size, k.data, k.stride, 1, x.qt + at, lanes, p + at, lanes, Into::kZero, nullptr});
    multiply<A>({n, last - first, size, v.data, v.stride, 1, x.gt + at, lanes, g + at, lanes, Into::kZero, nullptr});
    A* some = limits + lanes;
    for (int64_t c = at; c < last * w; c += w) {
      masked ? soften_back<true>(p + c, g + c, n, limits + c, a.scale, x.lse + c, x.delta + c)
             : soften_back<false>(p + c, g + c, n, limits + c, a.scale, x.lse + c, x.delta + c);
      if (masked) put(some + c, get(limits + c) > Vector<A>{} ? Vector<A>{} + A(1) : Vector<A>{} - A(1));
    }
    A *dv = a.sums + (2 * h * a.plan.sums + sums) * padded, *dk = dv + a.plan.sums * padded;
    const int64_t rows = end - begin, vectors = padded / w;
    multiply<A>({n, vectors, rows, p + begin, lanes, 1, x.g + begin * padded, padded, dv, padded, Into::kSum, nullptr});
    multiply<A>({n, vectors, rows, g + begin, lanes, 1, x.q + begin * padded, padded, dk, padded, Into::kSum, nullptr});
    multiply<A>({size, last - first, n, k.data, 1, k.stride, g + at, lanes, x.dq + at, lanes,
                 masked ? Into::kSome : Into::kSum, some + at});
  }

  COSMO_INLINE void run(int64_t first_block, int64_t last_block, int64_t part_sums) const {
    constexpr int64_t lanes = kLanes<A>;
    const std::vector<Block>& blocks = a.plan.blocks;
    const std::vector<Piece>& pieces = a.plan.pieces;
    auto both = [&](int64_t row, int64_t n) __attribute__((always_inline)) {
      return std::pair{rows_of<T, A>(a.k, row, h, n, a.n.size, space),
                       rows_of<T, A>(a.v, row, h, n, a.n.size, space + kTile * a.n.size)};
    };
    for (int64_t b = first_block; b < last_block; ++b) {
      keep(a, blocks[b], h, Kept<A>(kept + (b - first_block) * Kept<A>::elements(a.n), a.n));
    }
    const Block& block = blocks[first_block];
    for (int64_t start = 0; start < block.prefix_length; start += kTile) {
      const int64_t n = std::min(kTile, block.prefix_length - start);
      auto [k, v] = both(block.prefix + start, n);
      for (int64_t b = first_block; b < last_block; ++b) {
        add(k, v, n, b - first_block, 0, blocks[b].lanes, false, part_sums + start);
      }
    }
    const int64_t end = blocks[last_block - 1].last_piece;
    for (int64_t i = block.first_piece, j; i < end; i = j) {
      for (j = i; j < end && pieces[j].segment == pieces[i].segment;) ++j;
      const int64_t keys = pieces[j - 1].limit(pieces[j - 1].end - 1, a.n.rep);
      for (int64_t start = 0; start < keys; start += kTile) {
        auto [k, v] = both(pieces[i].keys + start, std::min(kTile, keys - start));
        for (int64_t c = i; c < j; ++c) {
          const Piece& piece = pieces[c];
          const int64_t n = limits_of(piece, start, a.n.rep, 0, lanes, limits);
          if (n > 0) add(k, v, n, piece.block - first_block, piece.begin, piece.end, true, piece.sums + start);
        }
      }
    }
    for (int64_t b = first_block; b < last_block; ++b) {
      const Kept<A> x(kept + (b - first_block) * Kept<A>::elements(a.n), a.n);
      turn_matrix<Vector<A>>(a.n.padded, lanes, x.dq, lanes, x.q, a.n.padded);
      each_lane(a.plan, blocks[b], a.n.rep, h,
                [&](int64_t lane, int64_t token, int64_t head) __attribute__((always_inline)) {
                  T* to = a.dq.at(token, head);
                  for (int64_t d = 0; d < a.n.size; ++d) store(to + d, x.q[lane * a.n.padded + d]);
                });
    }
  }
};

template <class T, class A>
COSMO_INLINE void backward_part(const Backward<T, A>& a, int64_t index, int64_t h) {
  const Part& part = a.plan.parts[index];
  clear_sums(a, index, h);
  const Strip<T, A> strip(a, h);
  for (int64_t b = part.first_block; b < part.last_block; b += kStrip) {
    strip.run(b, std::min(b + kStrip, part.last_block), part.sums);
  }
}

COSMO_ISA void run(const Forward<float, float>& a, int64_t i, int64_t h) { forward_block(a, i, h); }
COSMO_ISA void run(const Forward<bf16, float>& a, int64_t i, int64_t h) { forward_block(a, i, h); }
COSMO_ISA void run(const Forward<double, double>& a, int64_t i, int64_t h) { forward_block(a, i, h); }
COSMO_ISA void run(const Backward<float, float>& a, int64_t i, int64_t h) { backward_part(a, i, h); }
COSMO_ISA void run(const Backward<bf16, float>& a, int64_t i, int64_t h) { backward_part(a, i, h); }
COSMO_ISA void run(const Backward<double, double>& a, int64_t i, int64_t h) { backward_part(a, i, h); }

}  // namespace
}  // namespace cosmo_fast::prefix_attention
