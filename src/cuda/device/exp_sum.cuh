// Sums of exponentials: softmax whose maximum may still rise.
#pragma once

#include <cuda_runtime.h>

#include <cfloat>
#include <cstdint>

#include "cuda/device/warp.cuh"
#include "cuda/kernels.h"

namespace spectralkv::cuda {

inline constexpr float kLog2E = 1.44269504F;

/// 2^x, 0 where that is subnormal.
__device__ inline float exp2_of(float x) {
  float result = 0.0F;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ inline float log2_of(float x) {
  float result = 0.0F;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

/// Sum of 2^(x - maximum), whose maximum may still rise. Scores are finite or -inf.
struct ExpSum {
  float maximum = -FLT_MAX;
  float sum = 0.0F;

  __device__ void add(float x) {
    const float above = x - maximum;
    const float factor = exp2_of(-fabsf(above));
    sum = above > 0.0F ? fmaf(sum, factor, 1.0F) : sum + factor;
    maximum = fmaxf(maximum, x);
  }
  __device__ void add(const ExpSum& other) {
    const float highest = fmaxf(maximum, other.maximum);
    sum = sum * exp2_of(maximum - highest) + other.sum * exp2_of(other.maximum - highest);
    maximum = highest;
  }
  /// What is subtracted from a score to get the logarithm of its probability.
  __device__ float shift() const { return sum > 0.0F ? maximum + log2_of(sum) : INFINITY; }

  /// Of all lanes of a warp, in each of them.
  __device__ static ExpSum of_lanes(const ExpSum& own) {
    ExpSum all{.maximum = warp_max(own.maximum), .sum = 0.0F};
    all.sum = own.sum * exp2_of(own.maximum - all.maximum);
    for (int offset = 16; offset > 0; offset /= 2) {
      all.sum += __shfl_xor_sync(0xffffffffU, all.sum, offset);
    }
    return all;
  }
  __device__ ExpSum from_lane(int offset) const {
    return {.maximum = __shfl_xor_sync(0xffffffffU, maximum, offset),
            .sum = __shfl_xor_sync(0xffffffffU, sum, offset)};
  }
  __device__ std::uint64_t packed() const {
    return std::uint64_t{__float_as_uint(maximum)} << 32U | __float_as_uint(sum);
  }
  __device__ static ExpSum unpacked(std::uint64_t bits) {
    return {.maximum = __uint_as_float(static_cast<std::uint32_t>(bits >> 32U)),
            .sum = __uint_as_float(static_cast<std::uint32_t>(bits))};
  }
};

/// Scores count in units of log(2): their exponentials are powers of 2. This takes the softcap into
/// account; -inf stays.
__device__ inline float soften(const UpdateArgs& args, float score) {
  const float cap = args.softcap * kLog2E;
  return score > -INFINITY ? cap * tanhf(score / cap) : score;
}
/// The score of a dot product, -inf where it is no number.
__device__ inline float scaled(const UpdateArgs& args, float dot) {
  const float x = dot * (args.scale * kLog2E);
  if (!(fabsf(x) <= FLT_MAX)) return -INFINITY;
  return args.softcap > 0.0F ? soften(args, x) : x;
}

}  // namespace spectralkv::cuda
