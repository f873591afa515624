// Restart weights and draws: the first slot whose cumulative weight exceeds a share of the total.
#pragma once

#include <cstdint>

#include "cuda/device/graph_rows.cuh"
#include "cuda/kernels.h"
#include "cuda/layer.h"

namespace spectralkv::cuda {

/// floor(total * random / 2^32)
__device__ inline std::uint64_t scaled(std::uint64_t total, std::uint32_t random) {
  return (__umul64hi(total, random) << 32U) | ((total * random) >> 32U);
}

/// Restart weights of one population of one graph.
struct RestartWeights {
  const std::int32_t* positions;
  const std::uint32_t* novelty;  ///< null: all positions from `first` on weigh the same
  std::int64_t first;

  __device__ std::uint32_t operator()(std::int64_t slot) const {
    const std::int32_t position = positions[slot];
    if (novelty != nullptr) return position >= 0 ? novelty[slot] : 0U;
    return position >= first ? 1U : 0U;
  }
};

__device__ inline RestartWeights restart_weights(const LayerView& layer, const WalkRules& rules,
                                                 std::int64_t b, std::int64_t g, int p) {
  const auto& population = rules.population[p];
  RestartWeights weights{positions_of(layer, b, g), nullptr, 0};
  const std::int64_t seen = layer.sequences[b].seen;
  const std::int64_t sinks = layer.num_sinks;
  if (population.restart == static_cast<std::int32_t>(Restart::novelty)) {
    weights.novelty = novelty_of(layer, b, g);
  } else if (population.restart == static_cast<std::int32_t>(Restart::current)) {
    weights.first = max(seen - 1, sinks);
  } else {
    const auto by_fraction = static_cast<std::int64_t>(
        floor(__dadd_rn(__dmul_rn(population.recent_fraction, static_cast<double>(seen)), 1e-9)));
    const std::int64_t tokens =
        population.recent_tokens > 0 ? population.recent_tokens : max(std::int64_t{1}, by_fraction);
    weights.first = max(sinks, seen - tokens);
  }
  return weights;
}

__device__ inline std::uint64_t* restart_sums_of(const LayerView& layer, std::int64_t graph,
                                                 int p) {
  return layer.restart_sums + (graph * layer.populations + p) * layer.restart_blocks;
}
__device__ inline std::uint32_t* restart_guide_of(const LayerView& layer, std::int64_t graph,
                                                  int p) {
  return layer.restart_guide + ((graph * layer.populations + p) << layer.guide_bits);
}

inline constexpr int kTableThreads = 1024;

/// Fills the tables of one population of one graph; all threads of a block of kTableThreads.
__device__ inline void fill_restart_table(const LayerView& layer, const WalkRules& rules,
                                          std::int64_t b, std::int64_t g, int p) {
  __shared__ std::uint64_t warp_totals[kTableThreads / 32];
  const std::int64_t length = layer.counters->length;
  const RestartWeights weight = restart_weights(layer, rules, b, g, p);
  const std::int64_t graph = graph_index(layer, b, g);
  std::uint64_t* const sums = restart_sums_of(layer, graph, p);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;

  for (std::int64_t block = warp; block < layer.restart_blocks; block += kTableThreads / 32) {
    const std::int64_t slot = block * kRestartBlock + lane;
    std::uint64_t sum = slot < length ? weight(slot) : 0U;
    for (int offset = 16; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(0xffffffffU, sum, offset);
    }
    if (lane == 0) sums[block] = sum;
  }
  __syncthreads();
  std::uint64_t carry = 0;
  for (std::int64_t first = 0; first < layer.restart_blocks; first += kTableThreads) {
    const std::int64_t block = first + threadIdx.x;
    std::uint64_t sum = block < layer.restart_blocks ? sums[block] : 0U;
    for (int offset = 1; offset < 32; offset *= 2) {
      const std::uint64_t before = __shfl_up_sync(0xffffffffU, sum, offset);
      if (lane >= offset) sum += before;
    }
    if (lane == 31) warp_totals[warp] = sum;
    __syncthreads();
    std::uint64_t total = 0;
    for (int w = 0; w < kTableThreads / 32; ++w) {
      if (w == warp) sum += total;
      total += warp_totals[w];
    }
    if (block < layer.restart_blocks) sums[block] = carry + sum;
    carry += total;
    __syncthreads();
  }
  std::uint32_t* const guide = restart_guide_of(layer, graph, p);
  for (std::uint32_t bucket = threadIdx.x; bucket < (1U << layer.guide_bits);
       bucket += kTableThreads) {
    const std::uint64_t target = scaled(carry, bucket << (32 - layer.guide_bits));
    std::int64_t low = 0;
    std::int64_t high = layer.restart_blocks - 1;
    while (low < high) {
      const std::int64_t middle = (low + high) / 2;
      if (sums[middle] > target) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    guide[bucket] = static_cast<std::uint32_t>(low);
  }
}

}  // namespace spectralkv::cuda
