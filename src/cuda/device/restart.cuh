// Restart weights and draws: the first slot whose cumulative weight exceeds a share of the total.
//
// A restart table is a header, coarse sums and fine sums. A fine sum covers the weights of all
// slots up to the end of a block of kRestartBlock, a coarse one those up to the end of
// `restart_group` blocks. A draw searches the coarse sums, which a thread block has in shared
// memory, then reads the fine sums of one group and the weights of one block.
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
  const std::uint32_t* novelty;  ///< null: all positions in [first, end) weigh the same
  std::int32_t first;
  std::int32_t end;  ///< tokens seen: newer ones may come while a walk runs

  __device__ std::uint32_t of(std::int32_t position, std::uint32_t novelty_weight) const {
    if (novelty != nullptr) return position >= 0 ? novelty_weight : 0U;
    return position >= first && position < end ? 1U : 0U;
  }
  __device__ std::uint32_t operator()(std::int64_t slot) const {
    return of(positions[slot], novelty != nullptr ? novelty[slot] : 0U);
  }
};

/// Oldest position of a population that restarts by position.
__device__ inline std::int32_t first_recent(const LayerView& layer, const WalkRules& rules,
                                            std::int64_t seen, int p) {
  const auto& population = rules.population[p];
  const std::int64_t sinks = layer.num_sinks;
  if (population.restart == static_cast<std::int32_t>(Restart::current)) {
    return static_cast<std::int32_t>(max(seen - 1, sinks));
  }
  const auto by_fraction = static_cast<std::int64_t>(
      floor(__dadd_rn(__dmul_rn(population.recent_fraction, static_cast<double>(seen)), 1e-9)));
  const std::int64_t tokens =
      population.recent_tokens > 0 ? population.recent_tokens : max(std::int64_t{1}, by_fraction);
  return static_cast<std::int32_t>(max(sinks, seen - tokens));
}

__device__ inline RestartWeights restart_weights(const LayerView& layer, const WalkRules& rules,
                                                 std::int64_t b, std::int64_t g, int p) {
  const std::int64_t seen = layer.sequences[b].seen;
  RestartWeights weights{positions_of(layer, b, g), nullptr, 0, static_cast<std::int32_t>(seen)};
  if (rules.population[p].restart == static_cast<std::int32_t>(Restart::novelty)) {
    weights.novelty = novelty_of(layer, b, g);
  } else {
    weights.first = first_recent(layer, rules, seen, p);
  }
  return weights;
}

struct alignas(16) RestartHeader {
  std::uint64_t total;
  std::int32_t first;   ///< where there are no sums: the slots [first, first + total) weigh 1
  std::int32_t coarse;  ///< number of coarse sums; 0: there are no sums
};

struct RestartTable {
  RestartHeader* header;
  std::uint64_t* coarse;
  std::uint64_t* fine;
};

__device__ inline RestartTable restart_table_of(const LayerView& layer, std::int64_t b,
                                                std::int64_t g, int p) {
  std::uint64_t* const table =
      layer.restart_tables +
      (graph_index(layer, b, g) * layer.populations + p) * layer.restart_stride;
  const int group = layer.restart_group * kRestartBlock;  // a power of two
  const std::int64_t coarse = (layer.capacity + group - 1) >> (31 - __clz(group));
  return {.header = reinterpret_cast<RestartHeader*>(table),
          .coarse = table + 2,
          .fine = table + 2 + (coarse + 1) / 2 * 2};
}

/// Reads the kRestartBlock values of a block; those behind `end` are 0. `aligned`: see has_quads.
template <class T>
__device__ inline void load_block(const T* values, std::int64_t first, std::int64_t end,
                                  bool aligned, T (&out)[kRestartBlock]) {
  if (aligned) {
#pragma unroll
    for (int i = 0; i < kRestartBlock; i += 4) {
      uint4 four{};
      if (first + i < end) four = __ldcg(reinterpret_cast<const uint4*>(values + first + i));
      out[i] = static_cast<T>(four.x);
      out[i + 1] = static_cast<T>(four.y);
      out[i + 2] = static_cast<T>(four.z);
      out[i + 3] = static_cast<T>(four.w);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kRestartBlock; ++i)
      out[i] = first + i < end ? __ldcg(values + first + i) : T{0};
  }
}

/// Draws of one population of one graph.
struct Restarts {
  RestartHeader header;
  const std::uint64_t* coarse;
  const std::uint64_t* fine;
  std::int32_t group;
  std::int32_t coarse_step;  ///< highest power of two up to the number of coarse sums
  bool aligned;
  std::int32_t room;
  RestartWeights weights;

  __device__ std::int32_t draw(std::uint32_t random) const {
    const std::uint64_t target = scaled(header.total, random);
    if (header.coarse == 0) return header.first + static_cast<std::int32_t>(target);
    std::int32_t at = 0;
    for (std::int32_t step = coarse_step; step > 0; step /= 2) {
      if (at + step <= header.coarse && coarse[at + step - 1] <= target) at += step;
    }
    std::uint64_t before = at > 0 ? coarse[at - 1] : 0U;
    std::int64_t block = std::int64_t{at} * group;
    constexpr int kScan = 8;
    std::int32_t blocks = group;
    for (; blocks > kScan; blocks /= 2) {
      const std::uint64_t sum = __ldcg(fine + block + blocks / 2 - 1);
      if (sum <= target) {
        before = sum;
        block += blocks / 2;
      }
    }
    if (blocks > 1) {
      std::uint64_t sums[kScan - 1];
      const std::uint64_t* const from = fine + block;
#pragma unroll
      for (int i = 0; i < kScan - 1; ++i) {
        sums[i] = i + 1 < blocks ? __ldcg(from + i) : ~std::uint64_t{0};
      }
#pragma unroll
      for (int i = 0; i < kScan - 1; ++i) {
        if (sums[i] <= target) {
          before = sums[i];
          ++block;
        }
      }
    }
    const std::int64_t first = block * kRestartBlock;
    auto slot = static_cast<std::int32_t>(first);
    std::uint32_t weight[kRestartBlock];
    if (weights.novelty != nullptr) {  // 0 where there is no token, see fill_restart_table
      load_block(weights.novelty, first, room, aligned, weight);
    } else {
      std::int32_t positions[kRestartBlock];
      load_block(weights.positions, first, room, aligned, positions);
#pragma unroll
      for (int i = 0; i < kRestartBlock; ++i) weight[i] = weights.of(positions[i], 0);
    }
#pragma unroll
    for (int i = 0; i + 1 < kRestartBlock; ++i) {
      before += weight[i];
      slot += before <= target ? 1 : 0;
    }
    return slot;
  }
};

}  // namespace spectralkv::cuda
