// vision_greedy: max_min and dpp of ops/vision_prune.py on the CPU.
//
// Both take the products of a pick with all rows. Of the rows that are ahead many are picked soon after each other, so
// the products of several are taken at once (Ahead): the image is then read once for all of them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "check.h"
#include "prefix_attention_tiles.h"
#include "vision_prune.h"

namespace cosmo_fast::vision_prune {
namespace {

using prefix_attention::scratch;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
constexpr int64_t kGroup = 16, kAhead = 32;
constexpr int64_t kWhole = 64;  // elements of a row are padded to a multiple

// An image's rows as units, zeros past n and d, and for matrix tiles their upper and lower bytes, four of each of
// kGroup rows side by side: (groups, whole / 4, kGroup, 4).
struct Image {
  int64_t n, rows, whole;  // rows: n in whole groups
  int16_t* units;
  uint32_t* squares;
  int8_t *high, *low;
};

// False: NaN or infinite.
COSMO_ISA bool unit_row(const float* x, int64_t d, int64_t whole, int16_t* to, uint32_t& square) {
  double sums[kSumLanes] = {};
  int64_t j = 0;
  for (; j + kSumLanes <= d; j += kSumLanes) {
    for (int l = 0; l < kSumLanes; ++l) sums[l] += double(x[j + l]) * double(x[j + l]);
  }
  for (int l = 0; j + l < d; ++l) sums[l] += double(x[j + l]) * double(x[j + l]);
  for (int half = kSumLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) sums[l] += sums[l + half];
  }
  if (!(sums[0] <= std::numeric_limits<double>::max())) return false;
  const double scale = twice_scale(sums[0]);
  square = 0;
  for (j = 0; j < d; ++j) {
    const int element = unit_element(x[j], scale);
    to[j] = int16_t(element);
    square += uint32_t(element * element);
  }
  std::fill(to + d, to + whole, int16_t(0));
  return true;
}

// units = 256 high + low, both of them signed.
COSMO_ISA void split(const int16_t* units, int64_t n, int8_t* high, int8_t* low) {
  for (int64_t j = 0; j < n; ++j) high[j] = int8_t((units[j] + 128) >> 8), low[j] = int8_t(units[j]);
}

COSMO_ISA void turn(int64_t whole, const int8_t* from, int8_t* to) {
  prefix_attention::turn_matrix<u32x16>(kGroup, whole / 4, reinterpret_cast<const uint32_t*>(from), whole / 4,
                                        reinterpret_cast<uint32_t*>(to), kGroup);
}

bool has_byte_tiles() {
#ifdef COSMO_AMX
  return prefix_attention::has_tiles() && __builtin_cpu_supports("amx-int8");
#else
  return false;
#endif
}

bool pack(const float* x, int64_t d, const Image& image) {
  std::vector<int8_t> bytes(has_byte_tiles() ? 2 * kGroup * image.whole : 0);
  for (int64_t i = 0; i < image.rows; ++i) {
    const int64_t elements = i < image.n ? d : 0;
    if (!unit_row(x + i * d, elements, image.whole, image.units + i * image.whole, image.squares[i])) return false;
    if (bytes.empty() || i % kGroup < kGroup - 1) continue;
    const int64_t first = (i - i % kGroup) * image.whole, size = kGroup * image.whole;
    split(image.units + first, size, bytes.data(), bytes.data() + size);
    turn(image.whole, bytes.data(), image.high + first);
    turn(image.whole, bytes.data() + size, image.low + first);
  }
  return true;
}

// The products of `count` vectors (count, whole) with all rows: (count, rows).
COSMO_ISA void multiply(const Image& image, const int16_t* vectors, int64_t count, int32_t* out) {
  for (int64_t i = 0; i < image.rows; ++i) {
    for (int64_t c = 0; c < count; ++c) {
      const int16_t *x = image.units + i * image.whole, *y = vectors + c * image.whole;
      int32_t sum = 0;
      for (int64_t j = 0; j < image.whole; ++j) sum += int32_t(x[j]) * int32_t(y[j]);
      out[c * image.rows + i] = sum;
    }
  }
}

#ifdef COSMO_AMX
// The same for a multiple of kGroup vectors, by their bytes.
__attribute__((target("amx-tile,amx-int8,avx512f"))) void multiply_bytes(const Image& image, const int8_t* high,
                                                                         const int8_t* low, int64_t count,
                                                                         int32_t* out) {
  alignas(64) uint32_t part[3][kGroup * kGroup];
  const int64_t whole = image.whole;
  prefix_attention::configure_tiles();
  for (int64_t i = 0; i < image.rows; i += kGroup) {
    for (int64_t c = 0; c < count; c += kGroup) {
      asm volatile("" ::: "memory");  // the compiler does not know what tile loads and stores touch
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      for (int64_t j = 0; j < whole; j += 64) {
        _tile_loadd(3, high + c * whole + j, whole);
        _tile_loadd(5, image.high + i * whole + j * kGroup, 64);
        _tile_loadd(4, low + c * whole + j, whole);
        _tile_loadd(6, image.low + i * whole + j * kGroup, 64);
        _tile_dpbssd(0, 3, 5);
        _tile_dpbssd(1, 3, 6);
        _tile_dpbssd(2, 4, 6);
        _tile_dpbssd(1, 4, 5);
      }
      _tile_stored(0, part[0], 64);
      _tile_stored(1, part[1], 64);
      _tile_stored(2, part[2], 64);
      asm volatile("" ::: "memory");
      for (int64_t v = 0; v < kGroup; ++v) {
        int32_t* to = out + (c + v) * image.rows + i;
        const int64_t at = v * kGroup;
        for (int64_t r = 0; r < kGroup; ++r) {
          to[r] = int32_t((part[0][at + r] << 16) + (part[1][at + r] << 8) + part[2][at + r]);
        }
      }
    }
  }
  _tile_release();
}
#endif

// Products of the row that is picked now, and of those that are picked next if nothing changes. `key`: what the next
// pick has most of; not above 0 for rows that are picked.
template <class K>
struct Ahead {
  const Image& image;
  const K* key;
  std::vector<int64_t> rows;
  std::vector<int16_t> vectors;
  std::vector<int8_t> bytes;
  std::vector<int32_t> out;

  Ahead(const Image& image, const K* key)
      : image(image), key(key), vectors(kAhead * image.whole), bytes(2 * vectors.size()), out(kAhead * image.rows) {}

  const int32_t* of(int64_t row) {
    auto at = std::find(rows.begin(), rows.end(), row);
    if (at == rows.end()) look(row), at = rows.begin();
    return out.data() + (at - rows.begin()) * image.rows;
  }

  void look(int64_t row) {
    rows.clear();
    for (int64_t i = 0; i < image.n; ++i) {
      if (key[i] > K()) rows.push_back(i);
    }
    std::swap(*rows.begin(), *std::find(rows.begin(), rows.end(), row));
    if (int64_t(rows.size()) > kAhead) {
      auto more = [&](int64_t a, int64_t b) { return key[a] > key[b]; };
      std::nth_element(rows.begin() + 1, rows.begin() + kAhead, rows.end(), more);
      rows.resize(kAhead);
    }
    for (size_t c = 0; c < rows.size(); ++c) {
      std::copy_n(image.units + rows[c] * image.whole, image.whole, vectors.data() + c * image.whole);
    }
#ifdef COSMO_AMX
    if (has_byte_tiles()) {
      const int64_t size = int64_t(vectors.size());
      split(vectors.data(), size, bytes.data(), bytes.data() + size);
      multiply_bytes(image, bytes.data(), bytes.data() + size, int64_t(rows.size()), out.data());
      return;
    }
#endif
    multiply(image, vectors.data(), int64_t(rows.size()), out.data());
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

COSMO_ISA void add_rows(const Image& image, int32_t* sums) {  // (whole)
  for (int64_t i = 0; i < image.n; ++i) {
    for (int64_t j = 0; j < image.whole; ++j) sums[j] += image.units[i * image.whole + j];
  }
}

// Farthest first. The first pick is the row farthest from the mean direction.
void max_min(const Image& image, int64_t k, int64_t* picks) {
  std::vector<int32_t> sums(image.whole);
  std::vector<float> mean(image.whole);
  std::vector<int16_t> units(image.whole);
  std::vector<uint32_t> key(image.rows, ~0u);
  uint32_t square;
  add_rows(image, sums.data());
  std::copy(sums.begin(), sums.end(), mean.begin());
  std::vector<int32_t> product(image.rows);
  unit_row(mean.data(), image.whole, image.whole, units.data(), square);
  multiply(image, units.data(), 1, product.data());
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
  double* factor;  // (groups, k, kGroup)
  double *left, *key;
  const double* weight;
  int64_t t, k, row;
};

COSMO_ISA void take(const Step& a) {
  const double root = std::sqrt(a.left[a.row]);
  const double* own = a.factor + a.row / kGroup * a.k * kGroup + a.row % kGroup;
  for (int64_t i = 0; i < a.image.n; i += kGroup) {
    double e[kGroup], *factor = a.factor + i * a.k;
    for (int l = 0; l < kGroup; ++l) e[l] = double(a.product[i + l]) * kInverse;
    for (int64_t s = 0; s < a.t; ++s) {
      const double c = -own[s * kGroup];
      for (int l = 0; l < kGroup; ++l) e[l] = __builtin_fma(c, factor[s * kGroup + l], e[l]);
    }
    for (int l = 0; l < kGroup; ++l) {
      factor[a.t * kGroup + l] = e[l] /= root;
      const double left = __builtin_fma(-e[l], e[l], a.left[i + l]);
      a.left[i + l] = left < kDependent ? 0.0 : left;
      a.key[i + l] = a.key[i + l] < 0 ? -1.0 : a.weight[i + l] * a.left[i + l];
    }
  }
}

// Greedy maximum of log det over diag(r) S diag(r): the row with the most r^2 left, where S's factor leaves `left` of
// its squared length. Where nothing is left anywhere, the most relevant rows.
void dpp(const Image& image, const int16_t* text, int64_t k, int64_t* picks) {
  std::vector<int32_t> product(image.rows);
  multiply(image, text, 1, product.data());
  const auto [low, high] = std::minmax_element(product.begin(), product.begin() + image.n);
  const double least = *low, range = double(*high) - least;
  std::vector<double> relevance(image.rows), weight(image.rows), left(image.rows), key(image.rows, -1.0);
  for (int64_t i = 0; i < image.n; ++i) {
    relevance[i] = range > 0 ? (product[i] - least) / range : 1.0;
    weight[i] = relevance[i] * relevance[i];
    left[i] = image.squares[i] * kInverse;
    key[i] = weight[i] * left[i];
  }
  double* factor = scratch<double>(image.rows * k);
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

// Kept rows of each image in the order of the picks; -1 where a row (or the text) is NaN or infinite.
Tensor vision_greedy_cpu(const Tensor& features, const Tensor& counts, const Tensor& keep,
                         const std::optional<Tensor>& text) {
  const int64_t images = counts.numel(), d = features.size(1);
  STD_TORCH_CHECK(features.is_contiguous() && features.dim() == 2 && features.scalar_type() == ScalarType::Float &&
                      features.is_cpu(),
                  "features must be a contiguous fp32 matrix");
  STD_TORCH_CHECK(!text.has_value() || (text->is_contiguous() && text->numel() == images * d &&
                                        text->scalar_type() == ScalarType::Float && text->is_cpu()),
                  "text must be contiguous fp32 (images, d)");
  check_vector(counts, "counts", images, ScalarType::Long);
  check_vector(keep, "keep", images, ScalarType::Long);
  const int64_t *count = counts.const_data_ptr<int64_t>(), *kept = keep.const_data_ptr<int64_t>();
  std::vector<int64_t> starts(images + 1), ends(images + 1);
  for (int64_t b = 0; b < images; ++b) {
    STD_TORCH_CHECK(kept[b] >= 0 && kept[b] <= count[b], "keep must be from 0 to counts");
    STD_TORCH_CHECK(count[b] <= kMost && d <= kMost, "an image may have ", kMost, " rows and columns");
    starts[b + 1] = starts[b] + count[b], ends[b + 1] = ends[b] + kept[b];
  }
  STD_TORCH_CHECK(starts[images] == features.size(0), "counts must sum to the rows of features");
  Tensor out = torch::stable::new_empty(counts, {ends[images]});
  const float *x = features.const_data_ptr<float>(),
              *texts = text.has_value() ? text->const_data_ptr<float>() : nullptr;
  int64_t* rows = out.mutable_data_ptr<int64_t>();
  torch::stable::parallel_for(0, images, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t k = kept[b], n = (count[b] + kGroup - 1) / kGroup * kGroup,
                    whole = (d + kWhole - 1) / kWhole * kWhole;
      if (k == 0) continue;
      int8_t* space = reinterpret_cast<int8_t*>(scratch<int32_t>(n * (whole + 1)));
      const Image image{count[b],
                        n,
                        whole,
                        reinterpret_cast<int16_t*>(space + 2 * n * whole),
                        reinterpret_cast<uint32_t*>(space + 4 * n * whole),
                        space,
                        space + n * whole};
      std::vector<int16_t> units(whole);
      uint32_t square;
      int64_t* picks = rows + ends[b];
      if (!pack(x + starts[b] * d, d, image) || (texts && !unit_row(texts + b * d, d, whole, units.data(), square))) {
        std::fill(picks, picks + k, -1);
        continue;
      }
      texts ? dpp(image, units.data(), k, picks) : max_min(image, k, picks);
      for (int64_t i = 0; i < k; ++i) picks[i] += starts[b];
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cosmo_fast, CPU, m) { m.impl("vision_greedy", TORCH_BOX(&vision_greedy_cpu)); }

}  // namespace cosmo_fast::vision_prune
