// Planning on plain numbers: bins under a budget, even parts of one list, balanced ranks. host.cpp checks and binds.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <queue>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

namespace planner {

using Lists = std::vector<std::vector<int64_t>>;

// Indices from the largest cost to the smallest, ties by index.
template <typename T>
std::vector<int64_t> decreasing(const T* cost, int64_t n) {
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return cost[a] > cost[b]; });
  return order;
}

inline Lists best_fit_decreasing(const int64_t* cost, int64_t n, int64_t budget) {
  Lists bins;
  // (free, bin): the first that is large enough is the tightest, then the oldest
  std::set<std::pair<int64_t, int64_t>> room;
  for (int64_t item : decreasing(cost, n)) {
    auto fit = room.lower_bound({cost[item], -1});
    if (fit == room.end()) {
      bins.push_back({item});
      if (cost[item] < budget) room.insert({budget - cost[item], int64_t(bins.size()) - 1});
    } else {
      auto [free, bin] = *fit;
      room.erase(fit);
      bins[bin].push_back(item);
      room.insert({free - cost[item], bin});
    }
  }
  return bins;
}

// Runs of items in their order, each at most `most`; an item above it has a run of its own.
inline Lists runs(const int64_t* size, int64_t n, int64_t most) {
  Lists parts;
  int64_t held = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (parts.empty() || size[i] > most - held) parts.emplace_back(), held = 0;
    parts.back().push_back(i);
    held += size[i];
  }
  return parts;
}

// The fewest runs within the budget, and among those the ones whose largest is smallest. No item is above the budget.
inline Lists even_parts(const int64_t* size, int64_t n, int64_t budget) {
  size_t fewest = runs(size, n, budget).size();
  int64_t low = n ? *std::max_element(size, size + n) : 0, high = std::max(budget, low);
  while (low < high) {
    int64_t middle = low + (high - low) / 2;
    if (runs(size, n, middle).size() > fewest) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return runs(size, n, high);
}

// Karmarkar & Karp's largest differencing, for k ranks: a partial solution is k loads less the least of them. The two
// whose largest loads are largest become one, heavy ranks of the one with light ranks of the other, until one is left.
inline std::vector<int64_t> karmarkar_karp(const double* cost, int64_t n, int64_t ranks) {
  struct Rank {
    double load;
    int64_t head, tail;  // a linked list of items; -1: none
  };
  std::vector<int64_t> next(n, -1), rank_of(n);
  std::vector<std::vector<Rank>> part(n, std::vector<Rank>(ranks, {0, -1, -1}));  // descending loads
  std::priority_queue<std::pair<double, int64_t>> open;                           // (difference, -part)
  for (int64_t i = 0; i < n; ++i) {
    part[i][0] = {cost[i], i, i};
    open.push({cost[i], -i});
  }
  while (open.size() > 1) {
    int64_t a = -open.top().second;
    open.pop();
    int64_t b = -open.top().second;
    open.pop();
    if (b < a) std::swap(a, b);
    for (int64_t r = 0; r < ranks; ++r) {
      Rank& to = part[a][r];
      const Rank& from = part[b][ranks - 1 - r];
      if (from.head < 0) continue;
      to.load += from.load;
      (to.head < 0 ? to.head : next[to.tail]) = from.head;
      to.tail = from.tail;
    }
    part[b] = {};
    std::stable_sort(part[a].begin(), part[a].end(), [](const Rank& x, const Rank& y) { return x.load > y.load; });
    double least = part[a].back().load;
    for (Rank& rank : part[a]) rank.load -= least;
    open.push({part[a][0].load, -a});
  }
  for (int64_t r = 0; n > 0 && r < ranks; ++r) {
    for (int64_t i = part[0][r].head; i >= 0; i = next[i]) rank_of[i] = r;
  }
  return rank_of;
}

// Korf's complete greedy search: largest item first, lightest rank first, everything that cannot beat `best` cut off.
struct Search {
  const double* cost;
  std::vector<int64_t> order, rank_of, best_rank_of;
  std::vector<double> load;
  double best, goal;
  int64_t nodes;  // visited at most: the result must not depend on a clock

  void descend(size_t depth) {
    if (depth == order.size()) {
      best = *std::max_element(load.begin(), load.end());
      best_rank_of = rank_of;
      return;
    }
    double item = cost[order[depth]];
    std::vector<int64_t> lightest = decreasing(load.data(), load.size());
    for (auto r = lightest.rbegin(); r != lightest.rend(); ++r) {
      double before = load[*r];
      if (r != lightest.rbegin() && before == load[*(r - 1)]) continue;  // a rank like the last one tried
      if (before + item >= best || best <= goal || --nodes < 0) return;
      load[*r] = before + item;
      rank_of[order[depth]] = *r;
      descend(depth + 1);
      load[*r] = before;
    }
  }
};

constexpr int64_t kSearched = 4096;  // items: the search goes as deep

// Ranks whose heaviest is within a few per cent of the least possible: differencing, which is nearly exact for many
// items, then a bounded search where it is more than 1 % above what no division can beat.
inline Lists balance(const double* cost, int64_t n, int64_t ranks) {
  std::vector<int64_t> rank_of = karmarkar_karp(cost, n, ranks), order = decreasing(cost, n);
  std::vector<double> load(ranks, 0);
  for (int64_t i = 0; i < n; ++i) load[rank_of[i]] += cost[i];
  double least = std::accumulate(cost, cost + n, 0.0) / double(ranks);
  if (n > 0) least = std::max(least, cost[order[0]]);
  if (n > ranks) least = std::max(least, cost[order[ranks - 1]] + cost[order[ranks]]);  // two of ranks + 1 share one
  double heaviest = *std::max_element(load.begin(), load.end()), goal = 1.01 * least;
  if (heaviest > goal && n <= kSearched) {
    Search search{cost, order, rank_of, rank_of, std::vector<double>(ranks, 0), heaviest, goal, 100000};
    search.descend(0);
    rank_of = search.best_rank_of;
  }
  Lists lists(ranks);
  for (int64_t i = 0; i < n; ++i) lists[rank_of[i]].push_back(i);
  std::stable_sort(lists.begin(), lists.end(), [](const auto& a, const auto& b) {
    return (a.empty() ? INT64_MAX : a[0]) < (b.empty() ? INT64_MAX : b[0]);
  });
  return lists;
}

}  // namespace planner
