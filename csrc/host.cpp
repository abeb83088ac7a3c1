// Host-side planning, integers only. Arguments are checked here; the interpreter lock is released while we work.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "planner.h"

namespace py = pybind11;
using Integers = py::array_t<int64_t, py::array::c_style>;
using Reals = py::array_t<double, py::array::c_style>;

namespace {

[[noreturn]] void fail(const std::string& message) { throw py::value_error(message); }

std::string at(const char* name, int64_t index, int64_t value) {
  return std::string(name) + "[" + std::to_string(index) + "] = " + std::to_string(value);
}

template <typename T>
const T* vector_of(const py::array_t<T, py::array::c_style>& x, const char* name) {
  if (x.ndim() != 1) fail(std::string(name) + " must have one dimension, got " + std::to_string(x.ndim()));
  return x.data();
}

template <typename T>
const T* costs_of(const py::array_t<T, py::array::c_style>& costs) {
  const T* cost = vector_of(costs, "costs");
  for (int64_t i = 0; i < costs.size(); ++i) {
    if (!(cost[i] >= 0 && cost[i] <= std::numeric_limits<T>::max())) {
      fail("costs[" + std::to_string(i) + "] = " + std::to_string(cost[i]) + " is negative or not a number");
    }
  }
  return cost;
}

planner::Lists best_fit_decreasing(const Integers& costs, int64_t budget) {
  const int64_t* cost = costs_of(costs);
  if (budget <= 0) fail("budget must be positive, got " + std::to_string(budget));
  py::gil_scoped_release release;
  return planner::best_fit_decreasing(cost, costs.size(), budget);
}

planner::Lists even_parts(const Integers& costs, int64_t budget) {
  const int64_t* cost = costs_of(costs);
  for (int64_t i = 0; i < costs.size(); ++i) {
    if (cost[i] > budget) fail(at("costs", i, cost[i]) + " is over the budget of " + std::to_string(budget));
  }
  py::gil_scoped_release release;
  return planner::even_parts(cost, costs.size(), budget);
}

planner::Lists balance(const Reals& costs, int64_t ranks) {
  const double* cost = costs_of(costs);
  if (ranks <= 0) fail("ranks must be positive, got " + std::to_string(ranks));
  py::gil_scoped_release release;
  return planner::balance(cost, costs.size(), ranks);
}

py::tuple mrope_positions(const Integers& seq_lengths, const Integers& media_seq, const Integers& media_offset,
                          const Integers& media_thw, const Reals& media_step) {
  const int64_t *length = vector_of(seq_lengths, "seq_lengths"), *owner = vector_of(media_seq, "media_seq");
  const int64_t* offset = vector_of(media_offset, "media_offset");
  int64_t n = seq_lengths.size(), m = media_seq.size(), total = 0;
  if (media_offset.size() != m || media_thw.ndim() != 2 || media_thw.shape(0) != m || media_thw.shape(1) != 3) {
    fail("media_offset must have " + std::to_string(m) + " elements and media_thw the shape (" + std::to_string(m) +
         ", 3)");
  }
  if (media_step.size() != 0 && (media_step.ndim() != 1 || media_step.size() != m)) {
    fail("media_step must be empty or have " + std::to_string(m) + " elements");
  }
  const int64_t* thw = media_thw.data();
  const double* step = media_step.size() != 0 ? media_step.data() : nullptr;
  for (int64_t s = 0; s < n; ++s) {
    if (length[s] < 0) fail(at("seq_lengths", s, length[s]) + " is negative");
    total += length[s];
  }
  for (int64_t k = 0; k < m; ++k) {
    const int64_t* g = thw + 3 * k;
    if (owner[k] < 0 || owner[k] >= n || (k > 0 && owner[k] < owner[k - 1])) {
      fail(at("media_seq", k, owner[k]) + " must name a sequence, in order");
    }
    if (g[0] < 1 || g[1] < 1 || g[2] < 1) fail(at("media_thw", k, std::min({g[0], g[1], g[2]})) + " is not positive");
    if (step && !(step[k] >= 0 && step[k] < 1e6)) {
      fail("media_step[" + std::to_string(k) + "] = " + std::to_string(step[k]) + " is not in [0, 1e6)");
    }
    bool follows = k > 0 && owner[k] == owner[k - 1];
    int64_t earliest = follows ? offset[k - 1] + thw[3 * k - 3] * thw[3 * k - 2] * thw[3 * k - 1] : 0;
    if (offset[k] < earliest || offset[k] > length[owner[k]] - g[0] * g[1] * g[2]) {
      fail(at("media_offset", k, offset[k]) + ": the slot overlaps the one before it or leaves its sequence");
    }
  }
  Integers positions({int64_t(3), total}), next(n);
  int64_t *t = positions.mutable_data(), *h = t + total, *w = h + total, *next_position = next.mutable_data();
  {
    py::gil_scoped_release release;
    int64_t row = 0, k = 0;
    for (int64_t s = 0; s < n; ++s) {
      int64_t first = row, end = row + length[s], position = 0;
      while (row < end) {
        int64_t media = k < m && owner[k] == s ? first + offset[k] : end;
        for (; row < media; ++row, ++position) t[row] = h[row] = w[row] = position;
        if (row == end) break;
        const int64_t* g = thw + 3 * k;
        const float interval = step ? float(step[k]) : 1.0f;  // products in fp32, cut off, as transformers makes them
        ++k;
        int64_t time = 0;
        for (int64_t i = 0; i < g[0]; ++i) {
          time = int64_t(float(i) * interval);
          for (int64_t y = 0; y < g[1]; ++y) {
            for (int64_t x = 0; x < g[2]; ++x, ++row) {
              t[row] = position + time, h[row] = position + y, w[row] = position + x;
            }
          }
        }
        position += std::max({time + 1, g[1], g[2]});  // text goes on after the global maximum of the three axes
      }
      next_position[s] = position;
    }
  }
  return py::make_tuple(positions, next);
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host-side planning on integers.";
  m.def("best_fit_decreasing", &best_fit_decreasing, py::arg("costs"), py::arg("budget"),
        "Bins (lists of item indices) whose costs sum to at most `budget`, by best-fit decreasing. An item above the "
        "budget has a bin of its own. Ties go to the lower index and the older bin, so the result is deterministic.");
  m.def("even_parts", &even_parts, py::arg("costs"), py::arg("budget"),
        "The fewest runs of consecutive item indices whose costs sum to at most `budget`, as even as that allows.");
  m.def("balance", &balance, py::arg("costs"), py::arg("ranks"),
        "`ranks` lists of item indices whose largest sum of `costs` (float64) is as small as Karmarkar & Karp's "
        "differencing and a bounded search make it; ascending, ordered by their first item, the empty ones last.");
  m.def(
      "mrope_positions", &mrope_positions, py::arg("seq_lengths"), py::arg("media_seq"), py::arg("media_offset"),
      py::arg("media_thw"), py::arg("media_step") = Reals(),
      "Positions int64 (3, total) on the axes time, height, width, and the next free position int64 (n,) of each "
      "sequence, by the rule of Qwen2-VL: text counts up on all three; a medium that starts at position s has s + its "
      "(t, h, w) index; text after it starts at the maximum over the three axes + 1. media_seq (m,): sequence of each "
      "medium, non-decreasing; media_offset (m,): its first row within the sequence; media_thw (m, 3): its grid after "
      "the spatial merge; media_step (m,) or empty: positions between two frames, cut to integers frame by frame.");
}
