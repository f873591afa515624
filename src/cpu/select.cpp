// Which slots stay. Of equal scores the newer token stays.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/layer.h"
#include "thread_pool.h"

namespace spectralkv::detail {
namespace {

/// The score of every slot: of one population, or the sum over all (population -1).
std::vector<float> scores_of(const CpuContext& context, const CpuLayer& layer, std::int64_t b,
                             std::int64_t g, int population, std::int64_t length) {
  if (population >= 0) {
    const float* scores = layer.scores(b, g, population);
    return {scores, scores + length};
  }
  std::vector<float> sums(static_cast<std::size_t>(length), 0.0F);
  for (int p = 0; std::cmp_less(p, context.walk.populations.size()); ++p) {
    const float* scores = layer.scores(b, g, p);
    for (std::size_t j = 0; j < sums.size(); ++j) sums[j] += scores[j];
  }
  return sums;
}

/// Moves the `count` best of `slots` to the front.
void best_first(std::vector<std::int32_t>& slots, std::int64_t count, const float* scores,
                const std::int32_t* positions) {
  const auto better = [&](std::int32_t a, std::int32_t b) {
    return scores[a] != scores[b] ? scores[a] > scores[b] : positions[a] > positions[b];
  };
  if (count <= 0 || count >= std::ssize(slots)) return;
  std::nth_element(slots.begin(), slots.begin() + (count - 1), slots.end(), better);
}

bool is_protected(std::int32_t position, std::int64_t seen, const EvictionConfig& eviction) {
  return position < eviction.sinks || position >= seen - eviction.window;
}

/// The slots of one graph of a sequence that is cut, ascending; `budget` is less than it holds.
std::vector<std::int32_t> kept_slots(const CpuContext& context, const CpuLayer& layer,
                                     const LayerState& state, const EvictionConfig& eviction,
                                     std::int64_t budget, std::int64_t b, std::int64_t g) {
  const std::int32_t* positions = layer.positions(b, g);
  const std::int64_t seen = state.seen[static_cast<std::size_t>(b)];
  std::vector<std::int32_t> kept;
  std::vector<std::int32_t> candidates;
  for (std::int64_t slot = 0; slot < state.extent(g); ++slot) {
    if (positions[slot] < 0) continue;
    const bool stays = is_protected(positions[slot], seen, eviction);
    (stays ? kept : candidates).push_back(static_cast<std::int32_t>(slot));
  }

  // Every population takes its share of the places from what the ones before it left; the first one
  // takes what rounding leaves over.
  const std::int64_t places = budget - static_cast<std::int64_t>(kept.size());
  const auto& populations = context.walk.populations;
  std::vector<std::int64_t> quotas;
  std::int64_t given = 0;
  for (const Population& population : populations) {
    quotas.push_back(static_cast<std::int64_t>(
        std::floor(population.share * static_cast<double>(places) + 1e-9)));
    given += quotas.back();
  }
  quotas.front() += places - given;
  for (std::size_t p = 0; p < populations.size(); ++p) {
    const std::int64_t quota = std::min(quotas[p], static_cast<std::int64_t>(candidates.size()));
    best_first(candidates, quota, layer.scores(b, g, static_cast<int>(p)), positions);
    kept.insert(kept.end(), candidates.begin(), candidates.begin() + quota);
    candidates.erase(candidates.begin(), candidates.begin() + quota);
  }
  std::sort(kept.begin(), kept.end());
  return kept;
}

std::vector<std::int32_t> held_slots(const CpuLayer& layer, const LayerState& state, std::int64_t b,
                                     std::int64_t g) {
  std::vector<std::int32_t> held;
  for (std::int64_t slot = 0; slot < state.extent(g); ++slot) {
    if (layer.positions(b, g)[slot] >= 0) held.push_back(static_cast<std::int32_t>(slot));
  }
  return held;
}

}  // namespace

void select(const CpuContext& context, const CpuLayer& layer, const LayerState& state,
            const CutArgs& args, const TensorView& out) {
  const int threads = context.threads_for(layer.batch() * layer.graphs() * state.length * 32);
  parallel_for(layer.batch() * layer.graphs(), threads, [&](std::int64_t task, int) {
    const std::int64_t b = task / layer.graphs();
    const std::int64_t g = task % layer.graphs();
    const std::int64_t budget = args.budgets[static_cast<std::size_t>(g)];
    // With budgets of their own heads are cut together, those that hold less as well.
    const bool cut = args.cut[static_cast<std::size_t>(b)] != 0 &&
                     state.held_by(b)[static_cast<std::size_t>(g)] > budget;
    const std::vector<std::int32_t> kept =
        cut ? kept_slots(context, layer, state, args.eviction, budget, b, g)
            : held_slots(layer, state, b, g);
    const std::int64_t empty =
        args.left_aligned ? 0 : args.kept_length - static_cast<std::int64_t>(kept.size());
    for (std::int64_t h = context.first_head(g); h < context.first_head(g) + context.head_count();
         ++h) {
      auto* slots = element_pointer<std::int32_t>(out, b * out.stride(0) + h * out.stride(1));
      std::fill_n(slots, args.kept_length, -1);
      std::copy(kept.begin(), kept.end(), slots + empty);
    }
  });
}

void safety_mask(const CpuContext& context, const CpuLayer& layer, const LayerState& state,
                 const EvictionConfig& eviction, double top_fraction, const TensorView& out) {
  const int threads = context.threads_for(layer.batch() * layer.graphs() * state.length * 32);
  parallel_for(layer.batch() * layer.graphs(), threads, [&](std::int64_t task, int) {
    const std::int64_t b = task / layer.graphs();
    const std::int64_t g = task % layer.graphs();
    const std::int32_t* positions = layer.positions(b, g);
    const std::int64_t seen = state.seen[static_cast<std::size_t>(b)];
    std::vector<std::int32_t> slots = held_slots(layer, state, b, g);
    const auto safe = static_cast<std::int64_t>(
        std::ceil(top_fraction * static_cast<double>(slots.size()) - 1e-9));
    const std::vector<float> scores = scores_of(context, layer, b, g, -1, state.extent(g));
    best_first(slots, safe, scores.data(), positions);
    for (std::int64_t h = context.first_head(g); h < context.first_head(g) + context.head_count();
         ++h) {
      auto* mask = element_pointer<std::uint8_t>(out, b * out.stride(0) + h * out.stride(1));
      std::fill_n(mask, state.length, std::uint8_t{0});
      for (auto i = static_cast<std::size_t>(safe); i < slots.size(); ++i) {
        const std::int32_t slot = slots[i];
        mask[slot] = is_protected(positions[slot], seen, eviction) ? 0 : 1;
      }
    }
  });
}

}  // namespace spectralkv::detail
