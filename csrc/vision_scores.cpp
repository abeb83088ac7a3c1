// vision_attention and vision_squares: the scores of ops/vision_prune.py on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "check.h"
#include "prefix_attention_tiles.h"
#include "rows.h"
#include "vision_prune.h"

namespace cosmo_fast::vision_prune {
namespace {

using prefix_attention::scratch;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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
COSMO_OVERLOAD(bf16)
COSMO_OVERLOAD(double)
#undef COSMO_OVERLOAD

void check_rows(const Tensor& x, int64_t dim, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == dim && (x.size(dim - 1) < 2 || x.stride(dim - 1) == 1), name,
                  " must be a CPU tensor with ", dim, " axes and contiguous rows");
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
  m.impl("vision_attention", TORCH_BOX(&vision_attention_cpu));
  m.impl("vision_squares", TORCH_BOX(&vision_squares_cpu));
}

}  // namespace cosmo_fast::vision_prune
