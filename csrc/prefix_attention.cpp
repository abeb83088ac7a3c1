// prefix_attention: one pass over each row's two intervals of keys, its prefix and its own; forward and backward.
#include "prefix_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <atomic>
#include <tuple>

#include "prefix_attention_amx.h"
#include "prefix_attention_vector.h"

namespace cosmo_fast::prefix_attention {
namespace {

using torch::headeronly::ScalarType;

// f(i) for i < n; whoever is free takes the next, as the pieces of work differ much in length.
template <class F>
void in_parallel(int64_t n, F f) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, n, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) f(i);
  });
}

Sizes check(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& segments) {
  for (const Tensor* x : {&q, &k, &v}) {
    STD_TORCH_CHECK(x->is_cpu() && x->dim() == 3 && (x->size(2) < 2 || x->stride(2) == 1),
                    "q, k and v must be CPU tensors (rows, heads, size) with contiguous elements");
    STD_TORCH_CHECK(x->scalar_type() == q.scalar_type() && x->size(2) == q.size(2),
                    "q, k and v differ in dtype or size");
  }
  STD_TORCH_CHECK(k.size(0) == v.size(0) && k.size(1) == v.size(1), "k and v differ in shape");
  STD_TORCH_CHECK(q.size(1) > 0 && k.size(1) > 0 && q.size(1) % k.size(1) == 0, q.size(1),
                  " query heads are not a multiple of ", k.size(1), " key heads");
  const int64_t size = q.size(2);
  STD_TORCH_CHECK(size >= 1 && size <= 256, "the head size must be from 1 to 256, got ", size);
  STD_TORCH_CHECK(segments.is_cpu() && segments.dim() == 2 && segments.size(1) == 6 &&
                      (segments.size(0) == 0 || (segments.stride(1) == 1 && segments.stride(0) == 6)) &&
                      segments.scalar_type() == ScalarType::Long,
                  "segments must be a contiguous (s, 6) int64 tensor on the CPU");
  const int64_t* x = segments.const_data_ptr<int64_t>();
  int64_t covered = 0;
  for (int64_t s = 0; s < segments.size(0); ++s, x += 6) {
    const auto lies = [](int64_t start, int64_t length, int64_t rows) {  // without a sum that could overflow
      return start >= 0 && length >= 0 && length <= rows && start <= rows - length;
    };
    const int64_t keys = k.size(0);
    const bool inside = lies(x[0], x[1], q.size(0)) && lies(x[2], x[3], keys) && lies(x[4], x[5], keys);
    STD_TORCH_CHECK(inside && x[3] >= x[1], "segment ", s, " is outside q or k, or has fewer keys than queries");
    covered += x[1];
  }
  STD_TORCH_CHECK(covered == q.size(0), "the segments cover ", covered, " of ", q.size(0), " query rows");
  return {q.size(1) / k.size(1), k.size(1), size, 0};
}

template <class T, class A>
std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& segments,
                                   double scale, Sizes n, ScalarType dtype) {
  n.padded = (n.size + kWidth<A> - 1) / kWidth<A> * kWidth<A>;
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), n.size});
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1)}, dtype);
  const Plan plan(segments.const_data_ptr<int64_t>(), segments.size(0), n.rep, kLanes<A>);
  Forward<T, A> a{plan, View<const T>(q), View<const T>(k), View<const T>(v), View<T>(out), lse.mutable_data_ptr<A>(),
                  n,    A(scale)};
#ifdef COSMO_AMX
  if constexpr (std::is_same_v<T, bf16>) {
    if (has_tiles()) {
      const int64_t parts = int64_t(plan.parts.size());
      in_parallel(parts * n.key_heads, [&](int64_t i) { run_tiled(a, i / n.key_heads, i % n.key_heads); });
      return {out, lse};
    }
  }
#endif
  const int64_t blocks = int64_t(plan.blocks.size());
  in_parallel(blocks * n.key_heads, [&](int64_t i) {  // a part's heads one after the other: their keys are neighbours
    const Part& part = plan.parts[plan.blocks[i / n.key_heads].part];
    const int64_t count = part.last_block - part.first_block, x = i - part.first_block * n.key_heads;
    run(a, part.first_block + x % count, x / count);
  });
  return {out, lse};
}

// The shares of every key row, summed in the order of the parts.
template <class T, class A>
void add_shares(const Backward<T, A>& a, const View<T>& dk, const View<T>& dv, int64_t rows, A dk_factor) {
  const int64_t cells = (rows + kTile - 1) / kTile, padded = a.n.padded;
  std::vector<std::vector<const Share*>> of(cells);
  for (const Share& share : a.plan.shares) {
    if (share.length == 0) continue;
    for (int64_t c = share.row / kTile; c <= (share.row + share.length - 1) / kTile; ++c) of[c].push_back(&share);
  }
  in_parallel(cells * a.n.key_heads * 2, [&](int64_t i) {
    const int64_t cell = i / (a.n.key_heads * 2), x = i % (a.n.key_heads * 2), begin = cell * kTile;
    A* total = scratch<A>(kTile * padded);
    std::fill(total, total + kTile * padded, A(0));
    for (const Share* share : of[cell]) {
      const int64_t from = std::max(begin, share->row), to = std::min(begin + kTile, share->row + share->length);
      const A* part = a.sums + (x * a.plan.sums + share->sums + from - share->row) * padded;
      A* sum = total + (from - begin) * padded;
      for (int64_t j = 0; j < (to - from) * padded; ++j) sum[j] += part[j];
    }
    for (int64_t row = begin; row < std::min(begin + kTile, rows); ++row) {
      T* to = (x % 2 ? dk : dv).at(row, x / 2);
      for (int64_t d = 0; d < a.n.size; ++d)
        store(to + d, total[(row - begin) * padded + d] * (x % 2 ? dk_factor : A(1)));
    }
  });
}

template <class T, class A>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& out, const Tensor& lse, const Tensor& segments, double scale,
                                            Sizes n, ScalarType dtype) {
  STD_TORCH_CHECK(lse.scalar_type() == dtype && lse.dim() == 2 && lse.size(0) == q.size(0) &&
                      lse.size(1) == q.size(1) && lse.stride(1) == 1 && lse.stride(0) == q.size(1),
                  "lse must be the forward's");
  Tensor dq = torch::stable::new_empty(q, {q.size(0), q.size(1), n.size});
  Tensor dk = torch::stable::new_empty(k, {k.size(0), k.size(1), n.size});
  Tensor dv = torch::stable::new_empty(k, {k.size(0), k.size(1), n.size});
#ifdef COSMO_AMX
  const bool tiled = std::is_same_v<T, bf16> && has_tiles();
#else
  constexpr bool tiled = false;
#endif
  const int64_t whole = tiled ? 32 : kWidth<A>;
  n.padded = (n.size + whole - 1) / whole * whole;
  const Plan plan(segments.const_data_ptr<int64_t>(), segments.size(0), n.rep, kLanes<A>, tiled ? 32 : 1);
  Tensor sums = torch::stable::new_empty(q, {2 * n.key_heads * plan.sums * n.padded}, dtype);
  Backward<T, A> a{plan,
                   View<const T>(q),
                   View<const T>(k),
                   View<const T>(v),
                   View<const T>(out),
                   View<const T>(grad),
                   View<T>(dq),
                   lse.const_data_ptr<A>(),
                   sums.mutable_data_ptr<A>(),
                   n,
                   A(scale)};
  const int64_t parts = int64_t(plan.parts.size());
  in_parallel(parts * n.key_heads, [&](int64_t i) {
#ifdef COSMO_AMX
    if constexpr (std::is_same_v<T, bf16>) {
      if (tiled) return run_tiled(a, i % parts, i / parts);
    }
#endif
    run(a, i % parts, i / parts);
  });
  add_shares<T, A>(a, View<T>(dk), View<T>(dv), k.size(0), tiled ? a.scale : A(1));
  return {dq, dk, dv};
}

std::tuple<Tensor, Tensor> prefix_attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                                const Tensor& segments, double scale) {
  const Sizes n = check(q, k, v, segments);
  switch (q.scalar_type()) {
    case ScalarType::Float:
      return forward<float, float>(q, k, v, segments, scale, n, ScalarType::Float);
    case ScalarType::BFloat16:
      return forward<bf16, float>(q, k, v, segments, scale, n, ScalarType::Float);
    case ScalarType::Double:
      return forward<double, double>(q, k, v, segments, scale, n, ScalarType::Double);
    default:
      STD_TORCH_CHECK(false, "q must be float32, bfloat16 or float64");
  }
}

std::tuple<Tensor, Tensor, Tensor> prefix_attention_backward_cpu(const Tensor& grad, const Tensor& q, const Tensor& k,
                                                                 const Tensor& v, const Tensor& out, const Tensor& lse,
                                                                 const Tensor& segments, double scale) {
  const Sizes n = check(q, k, v, segments);
  for (const Tensor* x : {&grad, &out}) {
    STD_TORCH_CHECK(x->is_cpu() && x->dim() == 3 && x->size(0) == q.size(0) && x->size(1) == q.size(1) &&
                        x->size(2) == n.size && (n.size < 2 || x->stride(2) == 1) &&
                        x->scalar_type() == q.scalar_type(),
                    "grad and out must be like q, with contiguous elements");
  }
  switch (q.scalar_type()) {
    case ScalarType::Float:
      return backward<float, float>(grad, q, k, v, out, lse, segments, scale, n, ScalarType::Float);
    case ScalarType::BFloat16:
      return backward<bf16, float>(grad, q, k, v, out, lse, segments, scale, n, ScalarType::Float);
    case ScalarType::Double:
      return backward<double, double>(grad, q, k, v, out, lse, segments, scale, n, ScalarType::Double);
    default:
      STD_TORCH_CHECK(false, "q must be float32, bfloat16 or float64");
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cosmo_fast, CPU, m) {
  m.impl("prefix_attention", TORCH_BOX(&prefix_attention_cpu));
  m.impl("prefix_attention_backward", TORCH_BOX(&prefix_attention_backward_cpu));
}

}  // namespace cosmo_fast::prefix_attention
