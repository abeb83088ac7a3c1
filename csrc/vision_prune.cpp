// vision_greedy, vision_attention and vision_squares: what the selectors of ops/vision_prune.py compute on the CPU.
//
// The greedy selectors take the products of a pick with all rows. Of the rows that are ahead many are picked soon after
// each other, so the products of several are taken at once (Ahead): the image is then read once for all of them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "check.h"
#include "prefix_attention_tiles.h"
#include "rows.h"
#include "vision_prune.h"

namespace cosmo_fast::vision_prune {
namespace {

using prefix_attention::scratch;
using prefix_attention::turn_matrix;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using i32x16 = int32_t __attribute__((vector_size(64)));

constexpr int64_t kGroup = 16, kPanel = 8, kMostAhead = 32;

// An image's rows: `packed` (groups, pairs, kGroup rows) of two int16, and their squared lengths; rows past n are zero.
struct Image {
  int64_t n, groups, pairs;
  int32_t* packed;
  uint32_t* squares;
  int64_t rows() const { return groups * kGroup; }
};

// fp64 rows are divided by their largest element first, so that fp32 holds them.
template <class T>
COSMO_INLINE void read_row(const T* from, int64_t d, float* to) {
  T largest = T();
  if constexpr (std::is_same_v<T, double>) {
    for (int64_t j = 0; j < d; ++j) largest = std::fabs(from[j]) > largest ? std::fabs(from[j]) : largest;
  }
  for (int64_t j = 0; j < d; ++j) {
    if constexpr (std::is_same_v<T, double>) {
      to[j] = float(largest > 0 ? from[j] / largest : from[j]);
    } else {
      to[j] = load(from[j]);
    }
  }
}

// x has room for whole kSumLanes. False: NaN or infinite.
COSMO_INLINE bool unit_row(float* x, int64_t d, int16_t* to, uint32_t& square) {
  const int64_t whole = (d + kSumLanes - 1) / kSumLanes * kSumLanes;
  std::fill(x + d, x + whole, 0.0f);
  double sums[kSumLanes] = {};
  for (int64_t j = 0; j < whole; j += kSumLanes) {
    for (int l = 0; l < kSumLanes; ++l) sums[l] += double(x[j + l]) * double(x[j + l]);
  }
  for (int half = kSumLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) sums[l] += sums[l + half];
  }
  if (!(sums[0] <= std::numeric_limits<double>::max())) return false;
  const double scale = twice_scale(sums[0]);
  square = 0;
  for (int64_t j = 0; j < whole; ++j) {
    const int element = unit_element(x[j], scale);
    to[j] = int16_t(element);
    square += uint32_t(element * element);
  }
  return true;
}

template <class T>
COSMO_INLINE bool pack_rows(const T* x, int64_t stride, int64_t d, const Image& image, float* row, int16_t* units) {
  const int64_t whole = 2 * image.pairs;
  for (int64_t first = 0; first < image.n; first += kGroup) {
    const int64_t count = std::min(kGroup, image.n - first);
    if (count < kGroup) std::fill(units, units + kGroup * whole, int16_t(0));
    for (int64_t i = 0; i < count; ++i) {
      read_row(x + (first + i) * stride, d, row);
      if (!unit_row(row, d, units + i * whole, image.squares[first + i])) return false;
    }
    std::fill(image.squares + first + count, image.squares + first + kGroup, 0u);
    turn_matrix<u32x16>(kGroup, image.pairs, reinterpret_cast<uint32_t*>(units), image.pairs,
                        reinterpret_cast<uint32_t*>(image.packed) + first * image.pairs, kGroup);
  }
  return true;
}

#define COSMO_OVERLOAD(T)                                                                                      \
  COSMO_ISA bool pack(const T* x, int64_t stride, int64_t d, const Image& image, float* row, int16_t* units) { \
    return pack_rows(x, stride, d, image, row, units);                                                         \
  }
COSMO_OVERLOAD(float)
COSMO_OVERLOAD(bf16) COSMO_OVERLOAD(double)
#undef COSMO_OVERLOAD

    COSMO_ISA bool pack_vector(float* x, int64_t d, int16_t* to, uint32_t& square) {
  return unit_row(x, d, to, square);
}

// Products of all rows with `count` vectors, kPanel of them side by side in a panel (pairs, kPanel).
struct Products {
  const Image& image;
  int64_t count;
  const int32_t* panels;
  int32_t* out;  // (count, rows)
};

COSMO_ISA void multiply(const Products& a) {
  for (int64_t g = 0; g < a.image.groups; ++g) {
    for (int64_t c = 0; c < a.count; c += kPanel) {
      const int32_t *x = a.image.packed + g * a.image.pairs * kGroup, *y = a.panels + c * a.image.pairs;
      i32x16 sum[kPanel] = {};
      for (int64_t p = 0; p < a.image.pairs; ++p, x += kGroup, y += kPanel) {
        i32x16 both;
        std::memcpy(&both, x, 64);
        const i32x16 high = both >> 16, low = (i32x16)((u32x16)both << 16) >> 16;
#pragma GCC unroll 8
        for (int i = 0; i < kPanel; ++i) sum[i] += low * int32_t(int16_t(y[i])) + high * (y[i] >> 16);
      }
      for (int64_t i = 0; i < kPanel; ++i) std::memcpy(a.out + (c + i) * a.image.rows() + g * kGroup, &sum[i], 64);
    }
  }
}

#ifdef COSMO_AMX  // x86-64 with a compiler that knows its instructions
#define COSMO_VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
template <int kGroups>
COSMO_VNNI inline void multiply_groups(const Products& a, int64_t g) {
  const int64_t step = a.image.pairs * kGroup;
  for (int64_t c = 0; c < a.count; c += kPanel) {
    const int32_t *x = a.image.packed + g * step, *y = a.panels + c * a.image.pairs;
    __m512i sum[kGroups][kPanel];
    for (auto& row : sum) std::fill(row, row + kPanel, _mm512_setzero_si512());
    for (int64_t p = 0; p < a.image.pairs; ++p, x += kGroup, y += kPanel) {
      __m512i rows[kGroups];
#pragma GCC unroll 3
      for (int k = 0; k < kGroups; ++k) rows[k] = _mm512_loadu_si512(x + k * step);
#pragma GCC unroll 8
      for (int i = 0; i < kPanel; ++i) {
        const __m512i pair = _mm512_set1_epi32(y[i]);
#pragma GCC unroll 3
        for (int k = 0; k < kGroups; ++k) sum[k][i] = _mm512_dpwssd_epi32(sum[k][i], rows[k], pair);
      }
    }
#pragma GCC unroll 3
    for (int k = 0; k < kGroups; ++k) {
#pragma GCC unroll 8
      for (int i = 0; i < kPanel; ++i) {
        _mm512_storeu_si512(a.out + (c + i) * a.image.rows() + (g + k) * kGroup, sum[k][i]);
      }
    }
  }
}

COSMO_VNNI void multiply_vnni(const Products& a) {
  int64_t g = 0;
  for (; g + 3 <= a.image.groups; g += 3) multiply_groups<3>(a, g);
  for (; g < a.image.groups; ++g) multiply_groups<1>(a, g);
}
#endif

void products(const Products& a) {
#ifdef COSMO_AMX
  static const bool vnni = __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512vnni");
  if (vnni) return multiply_vnni(a);
#endif
  multiply(a);
}

// The products of one vector (whole, int16) with all rows.
void products_with(const Image& image, const int16_t* units, int32_t* out) {
  std::vector<int32_t> panel(image.pairs * kPanel), all(kPanel * image.rows());
  for (int64_t p = 0; p < image.pairs; ++p) std::memcpy(&panel[p * kPanel], units + 2 * p, 4);
  products({image, kPanel, panel.data(), all.data()});
  std::copy_n(all.data(), image.rows(), out);
}

// Products of the row that is picked now, and of those that are picked next if nothing changes. `key`: what the next
// pick has most of; 0 for rows that are picked. Wider where that came true, narrower where it did not.
template <class K>
struct Ahead {
  const Image& image;
  const K* key;
  std::vector<int64_t> rows, order;
  std::vector<int32_t> panels, out;
  int64_t width = kPanel, used = kPanel;

  Ahead(const Image& image, const K* key)
      : image(image), key(key), panels(kMostAhead * image.pairs), out(kMostAhead * image.rows()) {}

  const int32_t* of(int64_t row) {
    const auto at = std::find(rows.begin(), rows.end(), row);
    if (at == rows.end()) return look(row), out.data();
    ++used;
    return out.data() + (at - rows.begin()) * image.rows();
  }

  void look(int64_t row) {
    width = 2 * used >= width ? std::min(2 * width, kMostAhead) : std::max(width / 2, kPanel);
    used = 1;
    order.clear();
    for (int64_t i = 0; i < image.n; ++i) {
      if (key[i] > K() && i != row) order.push_back(i);
    }
    const int64_t more = std::min(width - 1, int64_t(order.size()));
    std::nth_element(order.begin(), order.begin() + more, order.end(),
                     [&](int64_t a, int64_t b) { return key[a] > key[b]; });
    rows.assign(1, row);
    rows.insert(rows.end(), order.begin(), order.begin() + more);
    for (int64_t c = 0; c < int64_t(rows.size()); ++c) {
      const int32_t* from = image.packed + rows[c] / kGroup * image.pairs * kGroup + rows[c] % kGroup;
      int32_t* to = panels.data() + c / kPanel * kPanel * image.pairs + c % kPanel;
      for (int64_t p = 0; p < image.pairs; ++p) to[p * kPanel] = from[p * kGroup];
    }
    products({image, int64_t(rows.size() + kPanel - 1) / kPanel * kPanel, panels.data(), out.data()});
  }
};

template <class K>
int64_t first_largest(const K* key, int64_t n) {
  K most = key[0];
  for (int64_t i = 1; i < n; ++i) most = key[i] > most ? key[i] : most;
  return std::find(key, key + n, most) - key;
}
COSMO_ISA int64_t largest(const uint32_t* key, int64_t n) { return first_largest(key, n); }
COSMO_ISA int64_t largest(const double* key, int64_t n) { return first_largest(key, n); }

// The running minimum of the distance to the picks, plus one; 0 for the picks.
COSMO_ISA void fold(const Image& image, const int32_t* product, uint32_t square, uint32_t* key) {
  for (int64_t i = 0; i < image.n; ++i) {
    const uint32_t d = distance(image.squares[i], square, product[i]) + 1;
    key[i] = d < key[i] ? d : key[i];
  }
}

COSMO_ISA void add_rows(const Image& image, int64_t* sums) {  // (2 pairs)
  for (int64_t k = 0; k < image.groups * image.pairs; ++k) {
    int32_t low = 0, high = 0;
    for (int64_t i = 0; i < kGroup; ++i) {
      const int32_t both = image.packed[k * kGroup + i];
      low += int32_t(uint32_t(both) << 16) >> 16, high += both >> 16;
    }
    sums[2 * (k % image.pairs)] += low, sums[2 * (k % image.pairs) + 1] += high;
  }
}

// Farthest first. The first pick is the row farthest from the mean direction.
void max_min(const Image& image, int64_t k, int64_t* picks) {
  std::vector<int64_t> sums(2 * image.pairs);
  std::vector<float> mean(2 * image.pairs);
  std::vector<int16_t> units(2 * image.pairs);
  std::vector<int32_t> product(image.rows());
  std::vector<uint32_t> key(image.rows(), ~0u);
  uint32_t square;
  add_rows(image, sums.data());
  std::copy(sums.begin(), sums.end(), mean.begin());
  pack_vector(mean.data(), 2 * image.pairs, units.data(), square);
  products_with(image, units.data(), product.data());
  fold(image, product.data(), square, key.data());
  Ahead<uint32_t> ahead(image, key.data());
  for (int64_t t = 0; t < k; ++t) {
    const int64_t row = picks[t] = largest(key.data(), image.n);
    const int32_t* found = ahead.of(row);
    if (t == 0) std::fill(key.begin(), key.end(), ~0u);
    fold(image, found, image.squares[row], key.data());
    key[row] = 0;
  }
}

// One step of the incremental Cholesky factor, every row on its own, with fused multiply-adds as they are written.
struct Step {
  const Image& image;
  const int32_t* product;
  double* factor;  // (groups of 8 rows, k, 8)
  double *left, *key;
  const double* weight;
  int64_t t, k, row;
};

COSMO_ISA void take(const Step& a) {
  const double root = std::sqrt(a.left[a.row]);
  const double* own = a.factor + a.row / 8 * a.k * 8 + a.row % 8;
  for (int64_t i = 0; i < a.image.n; i += 8) {
    double e[8], *factor = a.factor + i * a.k;
    for (int l = 0; l < 8; ++l) e[l] = double(a.product[i + l]) * kInverse;
    for (int64_t s = 0; s < a.t; ++s) {
      const double c = -own[s * 8];
      for (int l = 0; l < 8; ++l) e[l] = __builtin_fma(c, factor[s * 8 + l], e[l]);
    }
    for (int l = 0; l < 8; ++l) {
      factor[a.t * 8 + l] = e[l] /= root;
      const double left = __builtin_fma(-e[l], e[l], a.left[i + l]);
      a.left[i + l] = left < kDependent ? 0.0 : left;
      a.key[i + l] = a.key[i + l] < 0 ? -1.0 : a.weight[i + l] * a.left[i + l];
    }
  }
}

// Greedy maximum of log det over diag(r) S diag(r): the row with the most r^2 left, where S's factor leaves `left` of
// its squared length. Where nothing is left anywhere, the most relevant rows.
void dpp(const Image& image, const int16_t* text, int64_t k, int64_t* picks) {
  std::vector<int32_t> product(image.rows());
  products_with(image, text, product.data());
  const auto [low, high] = std::minmax_element(product.begin(), product.begin() + image.n);
  const double least = *low, range = double(*high) - least;
  std::vector<double> relevance(image.rows()), weight(image.rows()), left(image.rows()), key(image.rows(), -1.0);
  for (int64_t i = 0; i < image.n; ++i) {
    relevance[i] = range > 0 ? (product[i] - least) / range : 1.0;
    weight[i] = relevance[i] * relevance[i];
    left[i] = image.squares[i] * kInverse;
    key[i] = weight[i] * left[i];
  }
  double* factor = scratch<double>(image.rows() * k);
  Ahead<double> ahead(image, key.data());
  int64_t t = 0;
  for (; t < k; ++t) {
    const int64_t row = largest(key.data(), image.n);
    if (!(key[row] > 0)) break;
    take({image, ahead.of(row), factor, left.data(), key.data(), weight.data(), t, k, row});
    key[picks[t] = row] = -1;
  }
  for (int64_t i = 0; i < image.n; ++i) relevance[i] = key[i] < 0 ? -1.0 : relevance[i];
  for (; t < k; ++t) relevance[picks[t] = largest(relevance.data(), image.n)] = -1;
}

struct Choice {
  int64_t d;
  const int64_t *counts, *keep;
  int64_t images;
};

// Kept rows of each image in ascending order, -1 first where a row (or the text) is NaN or infinite.
template <class T>
void greedy(const Choice& a, const T* features, int64_t stride, const T* text, int64_t text_stride, int64_t* kept) {
  std::vector<int64_t> starts(a.images + 1), ends(a.images + 1);
  std::partial_sum(a.counts, a.counts + a.images, starts.begin() + 1);
  std::partial_sum(a.keep, a.keep + a.images, ends.begin() + 1);
  torch::stable::parallel_for(0, a.images, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      Image image{a.counts[b], (a.counts[b] + kGroup - 1) / kGroup, (a.d + kSumLanes - 1) / kSumLanes * kGroup, {}, {}};
      const int64_t packed = image.rows() * image.pairs, k = a.keep[b], whole = 2 * image.pairs;
      image.packed = scratch<int32_t>(packed + image.rows());
      image.squares = reinterpret_cast<uint32_t*>(image.packed + packed);
      std::vector<float> row(whole);
      std::vector<int16_t> units(kGroup * whole);
      int64_t* picks = kept + ends[b];
      uint32_t square;
      bool finite = pack(features + starts[b] * stride, stride, a.d, image, row.data(), units.data());
      if (text) {
        read_row(text + b * text_stride, a.d, row.data());
        finite = pack_vector(row.data(), a.d, units.data(), square) && finite;
      }
      if (k == 0) continue;
      if (finite) {
        text ? dpp(image, units.data(), k, picks) : max_min(image, k, picks);
        std::sort(picks, picks + k);
        for (int64_t i = 0; i < k; ++i) picks[i] += starts[b];
      } else {
        std::fill(picks, picks + k, -1);
      }
    }
  });
}

// One image and key head: score[key] = Σ exp(scale q k - lse) over the `rep` heads of `queries` rows.
template <class T, class A>
struct Columns {
  const T *q, *k;
  const A* lse;
  int64_t q_row, q_head, k_row, heads, queries, keys, rep, d;
  A scale;
  double* score;
};

template <class A>
COSMO_INLINE void add_weights(const A* scores, int64_t keys, int64_t lanes, const A* lse, A scale, double* score) {
  const Vector<A> most = Vector<A>{} + A(sizeof(A) == 8 ? 700 : 80);  // only a wrong lse comes here
  for (int64_t j = 0; j < keys; ++j, scores += lanes) {
    Vector<A> sum{}, s, l;
    for (int64_t i = 0; i < lanes; i += kStep<A>) {
      std::memcpy(&s, scores + i, 64);
      std::memcpy(&l, lse + i, 64);
      Vector<A> x = smaller(most, s * scale - l);
      sum += exp_bounded(x);
    }
    score[j] += sum_of(sum);
  }
}
COSMO_ISA void weigh(const float* s, int64_t keys, int64_t lanes, const float* lse, float scale, double* score) {
  add_weights(s, keys, lanes, lse, scale, score);
}
COSMO_ISA void weigh(const double* s, int64_t keys, int64_t lanes, const double* lse, double scale, double* score) {
  add_weights(s, keys, lanes, lse, scale, score);
}

constexpr int64_t kKeys = 64, kMostLanes = 512;

#ifdef COSMO_AMX
COSMO_TILES void multiply_tiles(int64_t lanes, int64_t wide, const bf16* keys, const uint32_t* pairs, float* scores) {
  prefix_attention::configure_tiles();
  prefix_attention::tile_product(kKeys, lanes, wide, keys, wide, pairs, lanes, scores, lanes, false);
  _tile_release();
}
#endif

template <class T, class A>
void add_columns(const Columns<T, A>& a) {
  const int64_t wide = (a.d + 31) / 32 * 32, all = a.queries * a.rep;
  [[maybe_unused]] bool tiled = false;
#ifdef COSMO_AMX
  tiled = std::is_same_v<T, bf16> && prefix_attention::has_tiles();
#endif
  A* queries = scratch<A>(kMostLanes * (wide + 1) + kKeys * (kMostLanes + wide));  // (wide, lanes), or pairs of bf16
  A *lse = queries + kMostLanes * wide, *scores = lse + kMostLanes, *keys = scores + kKeys * kMostLanes;
  for (int64_t first = 0; first < all; first += kMostLanes) {
    const int64_t count = std::min(kMostLanes, all - first), lanes = (count + 15) / 16 * 16;
    std::fill(queries, queries + wide * lanes, A(0));
    std::fill(lse, lse + lanes, A(1e30));  // lanes that are not there weigh nothing
    for (int64_t l = 0; l < count; ++l) {
      const int64_t token = (first + l) / a.rep, head = (first + l) % a.rep;
      const T* q = a.q + token * a.q_row + head * a.q_head;
      lse[l] = a.lse[token * a.heads + head];
      for (int64_t i = 0; i < a.d; ++i) {
        if constexpr (std::is_same_v<T, bf16>) {
          if (tiled) {
            reinterpret_cast<uint32_t*>(queries)[i / 2 * lanes + l] |= uint32_t(q[i].bits) << (i % 2 * 16);
            continue;
          }
        }
        queries[i * lanes + l] = load(q[i]);
      }
    }
    for (int64_t j = 0; j < a.keys; j += kKeys) {
      const int64_t n = std::min(kKeys, a.keys - j);
#ifdef COSMO_AMX
      if constexpr (std::is_same_v<T, bf16>) {
        if (tiled) {
          bf16* rows = reinterpret_cast<bf16*>(keys);
          std::memset(rows, 0, kKeys * wide * sizeof(bf16));
          for (int64_t i = 0; i < n; ++i) std::memcpy(rows + i * wide, a.k + (j + i) * a.k_row, a.d * sizeof(bf16));
          multiply_tiles(lanes, wide, rows, reinterpret_cast<uint32_t*>(queries), scores);
          weigh(scores, n, lanes, lse, a.scale, a.score + j);
          continue;
        }
      }
#endif
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t e = 0; e < a.d; ++e) keys[i * wide + e] = load(a.k[(j + i) * a.k_row + e]);
      }
      using prefix_attention::Into;
      prefix_attention::multiply(prefix_attention::Product<A>{n, lanes / kStep<A>, a.d, keys, wide, 1, queries, lanes,
                                                              scores, lanes, Into::kZero, nullptr});
      weigh(scores, n, lanes, lse, a.scale, a.score + j);
    }
  }
}

// Lanes of Σ (x_i - x_(i - back))^2 as in unit_row; back 0: of Σ x_i^2.
template <class T>
COSMO_INLINE void square_rows(const T* x, int64_t stride, int64_t d, const int64_t* back, int64_t begin, int64_t end,
                              double* out) {
  for (int64_t i = begin; i < end; ++i) {
    const T *row = x + i * stride, *other = row - back[i] * stride;
    const double some = back[i] ? 1.0 : 0.0;
    double sums[kSumLanes] = {};
    auto add = [&](int64_t j, int64_t n) __attribute__((always_inline)) {
      for (int64_t l = 0; l < n; ++l) {
        const double y = double(load(row[j + l])) - some * double(load(other[j + l]));
        sums[l] = __builtin_fma(y, y, sums[l]);
      }
    };
    int64_t j = 0;
    for (; j + kSumLanes <= d; j += kSumLanes) add(j, kSumLanes);
    add(j, d - j);
    for (int half = kSumLanes / 2; half > 0; half /= 2) {
      for (int l = 0; l < half; ++l) sums[l] += sums[l + half];
    }
    out[i] = sums[0];
  }
}
#define COSMO_OVERLOAD(T)                                                                                        \
  COSMO_ISA void squares(const T* x, int64_t stride, int64_t d, const int64_t* back, int64_t begin, int64_t end, \
                         double* out) {                                                                          \
    square_rows(x, stride, d, back, begin, end, out);                                                            \
  }
COSMO_OVERLOAD(float)
COSMO_OVERLOAD(bf16) COSMO_OVERLOAD(double)
#undef COSMO_OVERLOAD

    void check_rows(const Tensor& x, int64_t dim, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == dim && (x.size(dim - 1) < 2 || x.stride(dim - 1) == 1), name,
                  " must be a CPU tensor with ", dim, " axes and contiguous rows");
}

Tensor vision_greedy_cpu(const Tensor& features, const Tensor& counts, const Tensor& keep,
                         const std::optional<Tensor>& text) {
  check_rows(features, 2, "features");
  check_vector(counts, "counts", counts.numel(), ScalarType::Long);
  check_vector(keep, "keep", counts.numel(), ScalarType::Long);
  const Choice a{features.size(1), data<const int64_t>(counts), data<const int64_t>(keep), counts.numel()};
  int64_t rows = 0, kept = 0;
  for (int64_t b = 0; b < a.images; ++b) {
    STD_TORCH_CHECK(a.keep[b] >= 0 && a.keep[b] <= a.counts[b], "keep must be from 0 to counts");
    rows += a.counts[b], kept += a.keep[b];
  }
  STD_TORCH_CHECK(rows == features.size(0), "counts must sum to the rows of features");
  if (text.has_value()) {
    check_rows(*text, 2, "text");
    STD_TORCH_CHECK(text->size(0) == a.images && text->size(1) == a.d && text->scalar_type() == features.scalar_type(),
                    "text must be a row an image, of the features' dtype");
  }
  Tensor out = torch::stable::new_empty(counts, {kept});
  by_type(features, [&](auto element, auto) {
    using T = decltype(element);
    greedy(a, data<const T>(features), features.stride(0), text.has_value() ? data<const T>(*text) : nullptr,
           text.has_value() ? text->stride(0) : 0, data<int64_t>(out));
    return 0;
  });
  return out;
}

Tensor vision_attention_cpu(const Tensor& query, const Tensor& key, const Tensor& lse, const Tensor& counts,
                            const Tensor& query_counts, double scale) {
  check_rows(query, 3, "query");
  check_rows(key, 3, "key");
  check_vector(counts, "counts", counts.numel(), ScalarType::Long);
  check_vector(query_counts, "query_counts", counts.numel(), ScalarType::Long);
  const int64_t images = counts.numel(), heads = key.size(1), rep = query.size(1) / heads, n = key.size(0);
  STD_TORCH_CHECK(query.size(1) == rep * heads && query.size(2) == key.size(2) && lse.is_contiguous() &&
                      lse.numel() == query.size(0) * query.size(1) && query.scalar_type() == key.scalar_type(),
                  "query (Tq, H, D), key (n, Hk, D) and lse (Tq, H) do not fit");
  std::vector<int64_t> starts(images + 1), tokens(images + 1);
  std::partial_sum(data<const int64_t>(counts), data<const int64_t>(counts) + images, starts.begin() + 1);
  std::partial_sum(data<const int64_t>(query_counts), data<const int64_t>(query_counts) + images, tokens.begin() + 1);
  STD_TORCH_CHECK(starts[images] == n && tokens[images] == query.size(0), "counts must sum to the rows");
  Tensor out = torch::stable::new_empty(key, {n}, ScalarType::Double);
  std::vector<double> parts(heads * n);
  by_type(query, [&](auto element, auto number) {
    using T = decltype(element);
    using A = decltype(number);
    STD_TORCH_CHECK(lse.scalar_type() == statistics_type<A>, "lse must be of the statistics' dtype");
    torch::stable::parallel_for(0, images * heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / heads, h = i % heads;
        add_columns(Columns<T, A>{data<const T>(query) + tokens[b] * query.stride(0) + h * rep * query.stride(1),
                                  data<const T>(key) + starts[b] * key.stride(0) + h * key.stride(1),
                                  data<const A>(lse) + tokens[b] * rep * heads + h * rep, query.stride(0),
                                  query.stride(1), key.stride(0), rep * heads, tokens[b + 1] - tokens[b],
                                  starts[b + 1] - starts[b], rep, key.size(2), A(scale),
                                  parts.data() + h * n + starts[b]});
      }
    });
    return 0;
  });
  double* score = data<double>(out);
  std::fill(score, score + n, 0.0);
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t j = 0; j < n; ++j) score[j] += parts[h * n + j];
  }
  return out;
}

Tensor vision_squares_cpu(const Tensor& x, const Tensor& back) {
  check_rows(x, 2, "x");
  check_vector(back, "back", x.size(0), ScalarType::Long);
  for (int64_t i = 0; i < x.size(0); ++i) {
    const int64_t step = data<const int64_t>(back)[i];
    STD_TORCH_CHECK(step >= 0 && step <= i, "back must name an earlier row");
  }
  Tensor out = torch::stable::new_empty(x, {x.size(0)}, ScalarType::Double);
  by_type(x, [&](auto element, auto) {
    using T = decltype(element);
    torch::stable::parallel_for(0, x.size(0), 64, [&](int64_t begin, int64_t end) {
      squares(data<const T>(x), x.stride(0), x.size(1), data<const int64_t>(back), begin, end, data<double>(out));
    });
    return 0;
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cosmo_fast, CPU, m) {
  m.impl("vision_greedy", TORCH_BOX(&vision_greedy_cpu));
  m.impl("vision_attention", TORCH_BOX(&vision_attention_cpu));
  m.impl("vision_squares", TORCH_BOX(&vision_squares_cpu));
}

}  // namespace cosmo_fast::vision_prune
