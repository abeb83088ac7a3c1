// The arguments of prefix_attention and how its kernels reach their rows.
#pragma once

#ifdef COSMO_ISA
#define COSMO_ONE_ISA  // the one that the compiler was told to use
#endif
#include <torch/csrc/stable/tensor.h>

#include <limits>

#include "prefix_attention.h"
#include "vocab_stats.h"

namespace cosmo_fast::prefix_attention {

using torch::stable::Tensor;

template <class A>
constexpr int64_t kWidth = 64 / int64_t(sizeof(A));
template <class A>
constexpr int64_t kLanes = 4 * kWidth<A>;

// (rows, heads, size) with contiguous elements.
template <class T>
struct View {
  T* data;
  int64_t row, head;
  explicit View(const Tensor& x)
      : data(static_cast<T*>(const_cast<void*>(x.const_data_ptr()))), row(x.stride(0)), head(x.stride(1)) {}
  COSMO_INLINE T* at(int64_t r, int64_t h) const { return data + r * row + h * head; }
};

struct Sizes {
  int64_t rep, key_heads, size, padded;  // query heads of a key head; D, and D in whole vectors
};

template <class T, class A>
struct Forward {
  const Plan& plan;
  View<const T> q, k, v;
  View<T> out;
  A* lse;  // (Tq, H)
  Sizes n;
  A scale;
};

template <class T, class A>
struct Backward {
  const Plan& plan;
  View<const T> q, k, v, out, grad;
  View<T> dq;
  const A* lse;
  A* sums;  // (2 Hk, plan.sums, padded): dV and dK of each key head
  Sizes n;
  A scale;
};

// Working memory of this thread, 64-byte aligned; kept, because asking for fresh pages costs more than a small call.
template <class A>
A* scratch(int64_t elements) {
  static thread_local std::vector<A> memory;
  if (int64_t(memory.size()) < elements + kWidth<A>) memory.resize(elements + kWidth<A>);
  return reinterpret_cast<A*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
}

template <class A>
struct Rows {
  const A* data;
  int64_t stride;
};

// Calls f(lane, token, head) for every row of the block.
template <class F>
COSMO_INLINE void each_lane(const Plan& plan, const Block& block, int64_t rep, int64_t key_head, F f) {
  for (int64_t i = block.first_piece; i < block.last_piece; ++i) {
    const Piece& piece = plan.pieces[i];
    int64_t token = piece.token + piece.row / rep, r = piece.row % rep;
    for (int64_t lane = piece.begin; lane < piece.end; ++lane) {
      f(lane, token, key_head * rep + r);
      if (++r == rep) r = 0, ++token;
    }
  }
}

// limits[lane]: how many keys of the tile from `start` the lane sees, 0 outside the piece; returns the most.
template <class A>
COSMO_INLINE int64_t limits_of(const Piece& piece, int64_t start, int64_t rep, int64_t first, int64_t last, A* limits) {
  for (int64_t lane = first; lane < last; ++lane) {
    const bool mine = lane >= piece.begin && lane < piece.end;
    limits[lane] = mine ? A(std::clamp<int64_t>(piece.limit(lane, rep) - start, 0, kTile)) : A(0);
  }
  return std::min(kTile, piece.limit(piece.end - 1, rep) - start);
}

template <class T, class A>
void clear_sums(const Backward<T, A>& a, int64_t index, int64_t h) {
  const Part& part = a.plan.parts[index];
  const int64_t next = index + 1 < int64_t(a.plan.parts.size()) ? a.plan.parts[index + 1].sums : a.plan.sums;
  for (int64_t x = 2 * h; x < 2 * h + 2; ++x) {
    A* sums = a.sums + x * a.plan.sums * a.n.padded;
    std::fill(sums + part.sums * a.n.padded, sums + next * a.n.padded, A(0));
  }
}

}  // namespace cosmo_fast::prefix_attention
