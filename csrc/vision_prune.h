// Rows of features as whole numbers, for the CPU and CUDA: what the greedy selectors compare is exact from here on, in
// any order of summation, with any instruction set and on any device.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif

namespace cosmo_fast::vision_prune {

// Length of every row that is not zero. Its elements fit into 16 bits, a product of two rows into int32 (as does every
// part of the sum: Cauchy and Schwarz) and the square of a distance into uint32, one below its largest value.
constexpr int kUnit = 32000;
constexpr int64_t kMost = 1 << 16;  // rows and columns of an image, so that sums over either fit, too
constexpr double kInverse = 1.0 / (double(kUnit) * kUnit);
constexpr int kSumLanes = 32;        // a row's squares: element j goes to lane j % 32 in fp64, then halves are added
constexpr double kDependent = 1e-9;  // dpp: a row with less left of its squared length is a combination of the picks

// Rounded half away from zero by integers: a product and a sum in floating point may or may not be fused.
HOST_DEVICE inline int unit_element(float x, double twice_scale) {
  const int twice = int(double(x) * twice_scale);
  return (twice + (twice < 0 ? -1 : 1)) / 2;
}
HOST_DEVICE inline double twice_scale(double square) { return square > 0 ? 2.0 * kUnit / std::sqrt(square) : 0.0; }

HOST_DEVICE inline uint32_t distance(uint32_t square, uint32_t other, int32_t product) {
  return square + other - 2 * uint32_t(product);
}

}  // namespace cosmo_fast::vision_prune
