// vision_greedy on CUDA: the picks of csrc/vision_prune.cpp, from the same whole numbers and the same operations in
// fp64. A warp makes a row's units; then one block picks an image's rows, its distances in shared memory where they
// fit.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstring>
#include <optional>
#include <vector>

#include "vision_prune.h"

namespace cosmo_fast::vision_prune {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kWarp = 32, kBlock = 1024;
constexpr uint32_t kBad = 0xffffffffu;  // squared length of a row with NaN or infinity
static_assert(kSumLanes == kWarp);

// Units (rows, d) and squared lengths of x (rows, d). A warp a row; its lanes are those of the sum's order.
__global__ void unit_kernel(const float* x, int64_t rows, int64_t d, int16_t* units, uint32_t* squares) {
  const int64_t row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (row >= rows) return;
  double sum = 0;
  for (int64_t j = lane; j < d; j += kWarp) sum += double(x[row * d + j]) * double(x[row * d + j]);  // exact products
  for (int half = kWarp / 2; half > 0; half /= 2) sum += __shfl_xor_sync(~0u, sum, half);
  const double scale = twice_scale(sum);
  uint32_t square = 0;
  for (int64_t j = lane; isfinite(sum) && j < d; j += kWarp) {
    const int element = unit_element(x[row * d + j], scale);
    units[row * d + j] = int16_t(element);
    square += uint32_t(element * element);
  }
  for (int half = kWarp / 2; half > 0; half /= 2) square += __shfl_xor_sync(~0u, square, half);
  if (lane == 0) squares[row] = isfinite(sum) ? square : kBad;
}

struct Job {
  int64_t start, n, first, k;  // rows of the image, and where its picks go
};

struct Space {
  const int16_t *units, *text;  // (rows, d), (images, d) or null
  const uint32_t *squares, *text_squares;
  int32_t* products;                        // (rows)
  float* sums;                              // (images, d)
  uint32_t* near;                           // (rows), for images whose distances do not fit into shared memory
  double *left, *weight, *relevance, *key;  // (rows) each, dpp
  double* factor;                           // dpp: Σ k n, an image at factors[b] as (k, n)
  const int64_t* factors;
  int64_t* picks;
  int64_t d, shared_rows;
};

// products[i] = row i · vector, a warp a row.
__device__ void multiply(const int16_t* units, int64_t n, int64_t d, const int16_t* vector, int32_t* products) {
  __syncthreads();
  for (int64_t i = threadIdx.x / kWarp; i < n; i += kBlock / kWarp) {
    int32_t sum = 0;
    for (int64_t j = threadIdx.x % kWarp; j < d; j += kWarp) sum += int32_t(units[i * d + j]) * int32_t(vector[j]);
    for (int half = kWarp / 2; half > 0; half /= 2) sum += __shfl_xor_sync(~0u, sum, half);
    if (threadIdx.x % kWarp == 0) products[i] = sum;
  }
  __syncthreads();
}

// The first row with the largest key, for every thread.
template <class K>
__device__ int64_t largest(const K* key, int64_t n) {
  __shared__ K most[kBlock];
  __shared__ int64_t at[kBlock];
  __syncthreads();
  const int t = threadIdx.x;
  at[t] = n;
  for (int64_t i = t; i < n; i += kBlock) {
    if (at[t] == n || key[i] > most[t]) most[t] = key[i], at[t] = i;
  }
  for (int half = kBlock / 2; half > 0; half /= 2) {
    __syncthreads();
    if (t >= half || at[t + half] == n) continue;
    const bool more = at[t] == n || most[t + half] > most[t] || (most[t + half] == most[t] && at[t + half] < at[t]);
    if (more) most[t] = most[t + half], at[t] = at[t + half];
  }
  __syncthreads();
  const int64_t found = at[0];
  __syncthreads();
  return found;
}

__device__ void fold(const uint32_t* squares, int64_t n, const int32_t* products, uint32_t square, bool fresh,
                     uint32_t* key) {
  for (int64_t i = threadIdx.x; i < n; i += kBlock) {
    const uint32_t d = distance(squares[i], square, products[i]) + 1, before = fresh ? ~0u : key[i];
    key[i] = d < before ? d : before;
  }
  __syncthreads();
}

// The unit vector of the mean direction, as unit_row makes it, into `mean`; its squared length.
__device__ uint32_t mean_row(const int16_t* units, int64_t n, int64_t d, float* sums, int16_t* mean) {
  __shared__ double total;
  __shared__ uint32_t square;
  const int t = threadIdx.x;
  for (int64_t j = t; j < d; j += kBlock) {
    int32_t sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += units[i * d + j];
    sums[j] = float(sum);
  }
  __syncthreads();
  if (t < kWarp) {
    double sum = 0;
    for (int64_t j = t; j < d; j += kWarp) sum += double(sums[j]) * double(sums[j]);
    for (int half = kWarp / 2; half > 0; half /= 2) sum += __shfl_xor_sync(~0u, sum, half);
    if (t == 0) total = sum, square = 0;
  }
  __syncthreads();
  const double scale = twice_scale(total);
  for (int64_t j = t; j < d; j += kBlock) {
    const int element = unit_element(sums[j], scale);
    mean[j] = int16_t(element);
    atomicAdd(&square, uint32_t(element * element));  // whole numbers: any order
  }
  __syncthreads();
  return square;
}

__device__ void max_min(const Job& job, const Space& a, const int16_t* units, int16_t* mean, uint32_t* key) {
  const uint32_t* squares = a.squares + job.start;
  int32_t* products = a.products + job.start;
  const uint32_t square = mean_row(units, job.n, a.d, a.sums + blockIdx.x * a.d, mean);
  multiply(units, job.n, a.d, mean, products);
  fold(squares, job.n, products, square, true, key);
  for (int64_t t = 0; t < job.k; ++t) {
    const int64_t row = largest(key, job.n);
    multiply(units, job.n, a.d, units + row * a.d, products);
    fold(squares, job.n, products, squares[row], t == 0, key);
    if (threadIdx.x == 0) key[row] = 0, a.picks[job.first + t] = job.start + row;
    __syncthreads();
  }
}

__device__ void dpp(const Job& job, const Space& a, const int16_t* units, const int16_t* text, double* factor) {
  int32_t* products = a.products + job.start;
  double *left = a.left + job.start, *weight = a.weight + job.start, *relevance = a.relevance + job.start;
  double* key = a.key + job.start;
  multiply(units, job.n, a.d, text, products);
  __shared__ double most, least;
  for (int64_t i = threadIdx.x; i < job.n; i += kBlock) key[i] = double(products[i]), left[i] = -key[i];
  const int64_t high = largest(key, job.n), low = largest(left, job.n);
  if (threadIdx.x == 0) most = double(products[high]), least = double(products[low]);
  __syncthreads();
  const double range = most - least;
  for (int64_t i = threadIdx.x; i < job.n; i += kBlock) {
    relevance[i] = range > 0 ? (products[i] - least) / range : 1.0;
    weight[i] = relevance[i] * relevance[i];
    left[i] = a.squares[job.start + i] * kInverse;
    key[i] = weight[i] * left[i];
  }
  int64_t t = 0;
  for (; t < job.k; ++t) {
    const int64_t row = largest(key, job.n);
    if (!(key[row] > 0)) break;
    multiply(units, job.n, a.d, units + row * a.d, products);
    const double root = sqrt(left[row]);
    __syncthreads();
    for (int64_t i = threadIdx.x; i < job.n; i += kBlock) {
      double e = double(products[i]) * kInverse;
      for (int64_t s = 0; s < t; ++s) e = fma(-factor[s * job.n + row], factor[s * job.n + i], e);
      e /= root;
      factor[t * job.n + i] = e;
      const double rest = fma(-e, e, left[i]);
      left[i] = rest < kDependent ? 0.0 : rest;
      key[i] = key[i] < 0 || i == row ? -1.0 : weight[i] * left[i];
    }
    if (threadIdx.x == 0) a.picks[job.first + t] = job.start + row;
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < job.n; i += kBlock) relevance[i] = key[i] < 0 ? -1.0 : relevance[i];
  for (; t < job.k; ++t) {
    const int64_t row = largest(relevance, job.n);
    if (threadIdx.x == 0) relevance[row] = -1, a.picks[job.first + t] = job.start + row;
  }
}

__global__ void __launch_bounds__(kBlock) greedy_kernel(const Job* jobs, Space a) {
  extern __shared__ uint32_t space[];  // a vector (d) of int16, then the distances
  const Job job = jobs[blockIdx.x];
  if (job.k == 0) return;
  const int16_t* units = a.units + job.start * a.d;
  int bad = a.text && a.text_squares[blockIdx.x] == kBad;
  for (int64_t i = threadIdx.x; i < job.n; i += kBlock) bad |= a.squares[job.start + i] == kBad;
  if (__syncthreads_or(bad)) {
    for (int64_t t = threadIdx.x; t < job.k; t += kBlock) a.picks[job.first + t] = -1;
  } else if (a.text) {
    dpp(job, a, units, a.text + blockIdx.x * a.d, a.factor + a.factors[blockIdx.x]);
  } else {
    uint32_t* near = job.n <= a.shared_rows ? space + (a.d + 1) / 2 : a.near + job.start;
    max_min(job, a, units, reinterpret_cast<int16_t*>(space), near);
  }
}

void check(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, "vision_greedy: ", cudaGetErrorString(error)); }

// Kept rows of each image in the order of the picks; -1 where a row (or the text) is NaN or infinite.
Tensor vision_greedy_cuda(const Tensor& features, const Tensor& counts, const Tensor& keep,
                          const std::optional<Tensor>& text) {
  const int64_t images = counts.numel(), n = features.size(0), d = features.size(1);
  STD_TORCH_CHECK(features.is_cuda() && features.is_contiguous() && features.scalar_type() == ScalarType::Float,
                  "features must be a contiguous fp32 matrix on CUDA");
  STD_TORCH_CHECK(!text.has_value() || (text->is_cuda() && text->is_contiguous() && text->numel() == images * d &&
                                        text->scalar_type() == ScalarType::Float),
                  "text must be contiguous fp32 (images, d) on CUDA");
  STD_TORCH_CHECK(counts.is_cpu() && keep.is_cpu() && keep.numel() == images, "counts and keep stay on the host");
  const int64_t *count = counts.const_data_ptr<int64_t>(), *kept = keep.const_data_ptr<int64_t>();
  std::vector<int64_t> table;  // the jobs, then where their factors lie
  int64_t start = 0, first = 0, factors = 0;
  std::vector<int64_t> offsets;
  for (int64_t b = 0; b < images; ++b) {
    STD_TORCH_CHECK(kept[b] >= 0 && kept[b] <= count[b], "keep must be from 0 to counts");
    STD_TORCH_CHECK(count[b] <= kMost && d <= kMost, "an image may have ", kMost, " rows and columns");
    table.insert(table.end(), {start, count[b], first, kept[b]});
    offsets.push_back(factors);
    start += count[b], first += kept[b], factors += text.has_value() ? count[b] * kept[b] : 0;
  }
  STD_TORCH_CHECK(start == n, "counts must sum to the rows of features");
  table.insert(table.end(), offsets.begin(), offsets.end());
  auto bytes = [&](int64_t size) { return torch::stable::new_empty(features, {size}, ScalarType::Byte); };
  Tensor picks = torch::stable::new_empty(features, {first}, ScalarType::Long);
  if (first == 0) return picks;
  const int64_t texts = text.has_value() ? images : 0, scores = text.has_value() ? n : 0;
  Tensor places = bytes(8 * int64_t(table.size())), units = bytes(2 * (n + texts) * d),
         small = bytes(4 * (3 * n + texts));
  Tensor large = bytes(8 * (4 * scores + factors)), sums = bytes(4 * images * d);
  const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());  // launches go where it points
  void* stream_pointer;
  aoti_torch_get_current_cuda_stream(features.get_device_index(), &stream_pointer);
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  auto* jobs = static_cast<int64_t*>(places.mutable_data_ptr());
  check(cudaMemcpyAsync(jobs, table.data(), 8 * table.size(), cudaMemcpyHostToDevice, stream));
  auto* unit = static_cast<int16_t*>(units.mutable_data_ptr());
  auto* square = static_cast<uint32_t*>(small.mutable_data_ptr());
  auto* score = static_cast<double*>(large.mutable_data_ptr());
  auto blocks = [](int64_t rows) { return unsigned((rows * kWarp + 255) / 256); };
  unit_kernel<<<blocks(n), 256, 0, stream>>>(features.const_data_ptr<float>(), n, d, unit, square);
  if (texts) {
    unit_kernel<<<blocks(texts), 256, 0, stream>>>(text->const_data_ptr<float>(), texts, d, unit + n * d,
                                                   square + 3 * n);
  }
  int most = 0;
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, features.get_device_index()));
  const int64_t vector = (d + 1) / 2 * 4, shared_rows = (most - 32768 - vector) / 4;  // `largest`, twice, has 28 KiB
  int64_t longest = 0;
  for (int64_t b = 0; b < images; ++b) longest = count[b] <= shared_rows && count[b] > longest ? count[b] : longest;
  const int size = int(vector + 4 * longest);
  check(cudaFuncSetAttribute(greedy_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, size));
  Space a{unit,
          texts ? unit + n * d : nullptr,
          square,
          square + 3 * n,
          reinterpret_cast<int32_t*>(square + n),
          static_cast<float*>(sums.mutable_data_ptr()),
          square + 2 * n,
          score,
          score + n,
          score + 2 * n,
          score + 3 * n,
          score + 4 * n,
          jobs + 4 * images,
          picks.mutable_data_ptr<int64_t>(),
          d,
          shared_rows};
  greedy_kernel<<<unsigned(images), kBlock, size, stream>>>(reinterpret_cast<const Job*>(jobs), a);
  check(cudaGetLastError());
  return picks;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cosmo_fast, CUDA, m) { m.impl("vision_greedy", TORCH_BOX(&vision_greedy_cuda)); }

}  // namespace cosmo_fast::vision_prune
