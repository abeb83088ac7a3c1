// group_advantages: rewards minus the mean of their group, scaled. One pass finds the groups, their statistics and the
// result; a second one multiplies by what only the whole batch knows. Statistics are in fp64, and sums over the batch
// add up blocks of a fixed size in order, so that the number of threads changes nothing.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <vector>

namespace cosmo_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlock = 8192;  // a group belongs to the block in which it starts, however long it is

enum Scale : int64_t { kNone, kGroup, kLeaveOneOut, kBatch, kCentred, kClipFilter };

struct Totals {
  double known = 0, sum = 0, square = 0, within = 0;  // sum and square of (reward - origin); squares within the groups
  int64_t groups = 0, varied = 0;
  bool sorted = true;
};

template <class T>
struct Groups {
  const T* rewards;
  const int64_t* ids;
  const int64_t* order;  // null: the ids are sorted
  T* out;
  int64_t n;
  Scale scale;
  double epsilon, origin;
};

// Most groups are small, and a division is a third of one.
constexpr std::array<double, 65> kInverse = [] {
  std::array<double, 65> inverse{};
  for (int n = 1; n < 65; ++n) inverse[n] = 1.0 / n;
  return inverse;
}();

inline double inverse(double count) { return count < 65 ? kInverse[int(count)] : 1 / count; }

inline void add_mean(Totals& totals, double known, double mean) {
  totals.known += known;
  totals.sum += known * mean;
  totals.square += known * mean * mean;
}

// The group that starts at `start`; returns its end. Differences are taken to its first known reward: they are exactly
// zero in a group without variance, and the squares lose nothing to a large mean.
template <bool kOrdered, class T>
int64_t one_group(const Groups<T>& a, int64_t start, Totals& totals) {
  auto at = [&](int64_t k) { return kOrdered ? a.order[k] : k; };
  const int64_t id = a.ids[at(start)];
  // One loop for the end and the sums: a mispredicted exit costs as much as a small group's arithmetic.
  int64_t end = start, k;
  double first = a.rewards[at(start)], known = 0, sum = 0, square = 0, different = 0;  // first: NaN where none is known
  do {
    const double reward = a.rewards[at(end)];
    first = first == first ? first : reward;
    const double difference = reward == reward ? reward - first : 0.0;
    known += reward == reward ? 1.0 : 0.0;
    different += reward == reward && reward != first ? 1.0 : 0.0;
    sum += difference;
    square += difference * difference;
  } while (++end < a.n && a.ids[at(end)] == id);
  totals.sorted &= end == a.n || a.ids[at(end)] > id;
  totals.groups += known > 0;
  if (different == 0) {
    if (known > 0) add_mean(totals, known, first - a.origin);
    for (k = start; k < end; ++k) a.out[at(k)] = T(0);
    return end;
  }
  const double mean = sum * inverse(known), within = std::max(square - sum * mean, 0.0);
  add_mean(totals, known, first + mean - a.origin);
  totals.square += within;
  totals.within += within;
  totals.varied += 1;
  double factor = 1;
  if (a.scale == kGroup) factor = 1 / (std::sqrt(within * inverse(known - 1)) + a.epsilon);
  if (a.scale == kLeaveOneOut) factor = known * inverse(known - 1);
  for (k = start; k < end; ++k) {
    const double reward = a.rewards[at(k)];
    a.out[at(k)] = reward == reward ? T((reward - first - mean) * factor) : T(0);
  }
  return end;
}

template <bool kOrdered, class T>
Totals all_groups(const Groups<T>& a) {
  auto id = [&](int64_t k) { return a.ids[kOrdered ? a.order[k] : k]; };
  std::vector<Totals> blocks((a.n + kBlock - 1) / kBlock);
  torch::stable::parallel_for(0, int64_t(blocks.size()), 4, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      Totals totals;  // not in the vector: neighbours would share a cache line
      int64_t k = b * kBlock, stop = std::min(a.n, k + kBlock);
      while (k > 0 && k < stop && id(k) == id(k - 1)) ++k;  // the rest of a group of an earlier block
      while (k < stop) k = one_group<kOrdered>(a, k, totals);
      blocks[b] = totals;
    }
  });
  Totals all;
  for (const Totals& block : blocks) {
    all.known += block.known;
    all.sum += block.sum;
    all.square += block.square;
    all.within += block.within;
    all.groups += block.groups;
    all.varied += block.varied;
    all.sorted &= block.sorted;
  }
  return all;
}

// What sorts the ids, equal ones in their order: a radix sort over the digits in which they differ.
std::vector<int64_t> stable_order(const int64_t* ids, int64_t n) {
  auto [low, high] = std::minmax_element(ids, ids + n);
  const uint64_t base = uint64_t(*low), range = uint64_t(*high) - base;
  std::vector<int64_t> order(n), next(n);
  std::iota(order.begin(), order.end(), 0);
  for (int shift = 0; shift < 64 && (range >> shift) > 0; shift += 11) {
    auto digit = [&](int64_t k) { return ((uint64_t(ids[k]) - base) >> shift) & 2047; };
    std::array<int64_t, 2049> place{};
    for (int64_t k = 0; k < n; ++k) ++place[digit(k) + 1];
    std::partial_sum(place.begin(), place.end(), place.begin());
    for (int64_t k : order) next[place[digit(k)]++] = k;
    order.swap(next);
  }
  return order;
}

double batch_factor(const Totals& totals, Scale scale, double epsilon, double weight_cap) {
  if (scale == kClipFilter) return std::min(weight_cap, double(totals.groups) / double(totals.varied));
  double squares = scale == kBatch ? totals.square - totals.sum * totals.sum / totals.known : totals.within;
  return 1 / (std::sqrt(squares / (totals.known - 1)) + epsilon);
}

template <class T>
Tensor run(const Tensor& rewards, const Tensor& groups, Scale scale, double epsilon, double weight_cap) {
  int64_t n = rewards.size(0);
  Tensor result = torch::stable::new_empty(rewards, {n});
  const T* values = rewards.const_data_ptr<T>();
  const T* origin = std::find_if(values, values + n, [](T x) { return x == x; });
  Groups<T> a{values,  groups.const_data_ptr<int64_t>(),           nullptr, result.mutable_data_ptr<T>(), n, scale,
              epsilon, origin < values + n ? double(*origin) : 0.0};
  Totals totals = all_groups<false>(a);
  if (!totals.sorted) {
    std::vector<int64_t> order = stable_order(a.ids, n);
    a.order = order.data();
    totals = all_groups<true>(a);
  }
  if (scale >= kBatch && totals.varied > 0) {
    const double factor = batch_factor(totals, scale, epsilon, weight_cap);
    torch::stable::parallel_for(0, n, 4 * kBlock, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) a.out[k] = T(a.out[k] * factor);
    });
  }
  return result;
}

Tensor group_advantages_cpu(const Tensor& rewards, const Tensor& groups, int64_t scale, double epsilon,
                            double weight_cap) {
  auto vector = [](const Tensor& x) { return x.is_cpu() && x.dim() == 1 && (x.size(0) < 2 || x.stride(0) == 1); };
  STD_TORCH_CHECK(vector(rewards) && vector(groups) && groups.size(0) == rewards.size(0) &&
                      groups.scalar_type() == ScalarType::Long,
                  "rewards and groups (int64) must be contiguous CPU vectors of one length");
  STD_TORCH_CHECK(scale >= kNone && scale <= kClipFilter, "scale must be 0 to 5, got ", scale);
  switch (rewards.scalar_type()) {
    case ScalarType::Float:
      return run<float>(rewards, groups, Scale(scale), epsilon, weight_cap);
    case ScalarType::Double:
      return run<double>(rewards, groups, Scale(scale), epsilon, weight_cap);
    default:
      STD_TORCH_CHECK(false, "rewards must be float32 or float64");
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cosmo_fast, CPU, m) { m.impl("group_advantages", TORCH_BOX(&group_advantages_cpu)); }

}  // namespace cosmo_fast
