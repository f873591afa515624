// The CPU backend: every call has finished when it returns.
#include "backend.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <string>
#include <string_view>
#include <vector>

#include "cpu/layer.h"
#include "spectralkv/error.h"
#include "thread_pool.h"
#include "validate.h"

namespace spectralkv::detail {
namespace {

std::string at(std::int64_t b, std::int64_t h) {
  return " of sequence " + std::to_string(b) + ", head " + std::to_string(h);
}

class CpuBackend final : public Backend {
 public:
  CpuBackend(const GraphConfig& graph, const WalkConfig& walk,
             const std::vector<LayerState>& states)
      : graph_(graph), walk_(walk), states_(states), rotary_(graph.rotary) {
    const int threads = graph.num_threads > 0 ? graph.num_threads : available_processors();
    scratch_.resize(static_cast<std::size_t>(threads));
    layers_.reserve(states.size());
    for (const LayerState& state : states) {
      layers_.emplace_back(graph, walk, state.batch, state.capacity, state.rooms);
    }
  }

  void use_stream(Stream) override {}

  void resize(std::int64_t layer, std::int64_t capacity, std::span<const std::int64_t> rooms,
              std::span<const std::int64_t> sequences) override {
    CpuLayer& old = mine(layer);
    CpuLayer next(graph_, walk_, static_cast<std::int64_t>(sequences.size()), capacity, rooms);
    for (std::size_t b = 0; b < sequences.size(); ++b) {
      next.copy_sequence(static_cast<std::int64_t>(b), old, sequences[b], state(layer).length);
    }
    old = std::move(next);
  }

  bool is_recording(Stream) const override { return false; }

  SlotPlan plan_slots(std::string_view operation, std::int64_t layer, const ConstTensorView& slots,
                      Stream) const override {
    const LayerState& host = state(layer);
    SlotPlan plan{.length = host.length, .appended = true};
    for (std::int64_t b = 0; b < mine(layer).batch(); ++b) {
      for (std::int64_t h = 0; h < graph_.num_kv_heads; ++h) {
        const std::int64_t slot = slot_of(slots, b, h);
        const std::int64_t g = context().graph_of(h);
        if (slot < 0 || slot >= host.room(g)) {
          throw_invalid(operation, "the slot" + at(b, h),
                        "in [0, " + std::to_string(host.room(g) - 1) + "]", std::to_string(slot));
        }
        if (slot < host.length && mine(layer).positions(b, g)[slot] >= 0) {
          throw_invalid(operation, "the slot" + at(b, h), "free",
                        std::to_string(slot) + ", which holds a token");
        }
        if (slot != slot_of(slots, b, context().first_head(g))) {
          throw_invalid(operation, "the slots of heads that share a graph", "equal",
                        std::to_string(slot) + " and " +
                            std::to_string(slot_of(slots, b, context().first_head(g))));
        }
        plan.appended = plan.appended && slot == host.length;
        plan.length = std::max(plan.length, slot + 1);
      }
    }
    return plan;
  }

  std::vector<std::int64_t> update(std::int64_t layer, const UpdateArgs& args, Stream) override {
    CpuLayer& memory = mine(layer);
    const std::int64_t count = args.queries.size(2);
    std::vector<std::int64_t> added(static_cast<std::size_t>(memory.batch()), 0);
    for (std::int64_t b = 0; b < memory.batch(); ++b) {
      for (std::int64_t g = 0; g < memory.graphs(); ++g) {
        for (std::int64_t slot = args.first_slot; slot < memory.extent(g, args.length); ++slot) {
          memory.clear(b, g, slot);
        }
      }
    }
    for (std::int64_t b = 0; b < memory.batch(); ++b) {
      std::int64_t& tokens = added[static_cast<std::size_t>(b)];
      for (std::int64_t i = 0; i < count; ++i) {
        const bool valid = args.valid.empty() || *element_pointer<std::uint8_t>(
                                                     args.valid, b * args.valid.stride(0) +
                                                                     i * args.valid.stride(1)) != 0;
        const std::int64_t position = state(layer).seen[static_cast<std::size_t>(b)] + tokens;
        for (std::int64_t g = 0; g < memory.graphs(); ++g) {
          const std::int64_t slot = args.slots.empty()
                                        ? args.first_slot + i
                                        : slot_of(args.slots, b, context().first_head(g));
          if (!args.slots.empty()) memory.clear(b, g, slot);
          if (valid) memory.positions(b, g)[slot] = static_cast<std::int32_t>(position);
        }
        tokens += valid ? 1 : 0;
      }
    }
    if (args.row_stride == 0) return added;
    const UpdateCounts counts = count == 1 ? update_single(context(), memory, args, scratch_)
                                           : update_block(context(), memory, args, scratch_);
    statistics_.rows_written += counts.rows;
    statistics_.rows_nonfinite += counts.nonfinite;
    return added;
  }

  void update_novelty(std::int64_t layer, const ConstTensorView& keys, Stream) override {
    const LayerState& host = state(layer);
    rotary_.reserve(host.seen.empty() ? 0 : *std::max_element(host.seen.begin(), host.seen.end()));
    detail::update_novelty(context(), rotary_, mine(layer), keys, host.length, scratch_);
  }
  void renew(std::string_view, const RenewArgs& args, Stream) override {
    for (std::int64_t layer = args.first; layer < args.first + args.count; ++layer) {
      detail::walk(context(), mine(layer), state(layer), layer, args.sequences, args.walking,
                   scratch_);
      detail::solve(context(), mine(layer), state(layer), args.sequences, args.exact);
    }
  }

  void scores(std::int64_t layer, int population, const TensorView& out, Stream) const override {
    const auto populations = static_cast<int>(walk_.populations.size());
    for_heads<float>(layer, out, [&](std::int64_t b, std::int64_t g, float* row, std::int64_t n) {
      for (int p = 0; p < populations; ++p) {
        if (population >= 0 && population != p) continue;
        const float* from = mine(layer).scores(b, g, p);
        for (std::int64_t j = 0; j < n; ++j) row[j] += from[j];
      }
    });
  }

  void visits(std::int64_t layer, int population, const TensorView& out, Stream) const override {
    for_heads<std::uint32_t>(
        layer, out, [&](std::int64_t b, std::int64_t g, std::uint32_t* row, std::int64_t n) {
          if (mine(layer).has_visits()) {
            std::copy_n(mine(layer).visits(b, g, population), n, row);
            return;
          }
          const float* from = mine(layer).scores(b, g, population);
          std::transform(from, from + n, row, [](float score) {
            return static_cast<std::uint32_t>(std::lround(score));
          });
        });
  }

  void select(std::int64_t layer, const CutArgs& args, const TensorView& out,
              Stream) const override {
    detail::select(context(), mine(layer), state(layer), args, out);
  }
  void safety_mask(std::int64_t layer, const EvictionConfig& eviction, double top_fraction,
                   const TensorView& out, Stream) const override {
    detail::safety_mask(context(), mine(layer), state(layer), eviction, top_fraction, out);
  }

  void next_slots(std::int64_t layer, const TensorView& out, Stream) const override {
    write_next_slots("next_slots", layer, state(layer).capacity, out);
  }
  void place(std::int64_t layer, const PlaceArgs& args, Stream) const override {
    write_next_slots("place", layer, args.keys.size(2), args.slots);
    const auto copy = [&](const ConstTensorView& from, const TensorView& to, std::int64_t b,
                          std::int64_t h, std::int64_t slot) {
      const std::int64_t bytes = size_of(to.dtype);
      std::memcpy(mine(layer).slots(to, b, h) + slot * to.stride(2) * bytes,
                  head_pointer(from, b, h), static_cast<std::size_t>(to.size(3) * bytes));
    };
    for (std::int64_t b = 0; b < mine(layer).batch(); ++b) {
      for (std::int64_t h = 0; h < graph_.num_kv_heads; ++h) {
        const std::int64_t slot = *element_pointer<std::int32_t>(
            args.slots, b * args.slots.stride(0) + h * args.slots.stride(1));
        copy(args.new_keys, args.keys, b, h, slot);
        copy(args.new_values, args.values, b, h, slot);
      }
    }
  }

  std::vector<std::int64_t> check_keep(std::string_view operation, std::int64_t layer,
                                       const ConstTensorView& keep,
                                       std::span<const std::int64_t> kept, Stream) const override {
    std::vector<std::int64_t> counts;
    for (std::int64_t b = 0; b < mine(layer).batch(); ++b) {
      for (std::int64_t h = 0; h < graph_.num_kv_heads; ++h) {
        const std::int64_t count = check_kept_head(operation, layer, keep, b, h);
        const std::int64_t g = context().graph_of(h);
        if (h == context().first_head(g)) counts.push_back(count);
        if (!kept.empty() && count != kept[counts.size() - 1]) {
          throw_invalid(operation, "the number of kept slots" + at(b, h),
                        std::to_string(kept[counts.size() - 1]), std::to_string(count));
        }
      }
    }
    return counts;
  }

  void compact(std::int64_t layer, const ConstTensorView& keep, const TensorView& keys,
               const TensorView& values, Stream) override {
    detail::compact(context(), mine(layer), state(layer).length, keep, keys, values);
  }

  void release(std::int64_t layer, const ConstTensorView& keep, Stream) override {
    CpuLayer& memory = mine(layer);
    std::vector<std::uint8_t> stays;
    for (std::int64_t b = 0; b < memory.batch(); ++b) {
      for (std::int64_t g = 0; g < memory.graphs(); ++g) {
        const std::int64_t length = state(layer).extent(g);
        stays.assign(static_cast<std::size_t>(length), 0);
        for (std::int64_t i = 0; i < keep.size(2); ++i) {
          const std::int32_t slot = kept_slot(keep, b, context().first_head(g), i);
          if (slot >= 0) stays[static_cast<std::size_t>(slot)] = 1;
        }
        for (std::int64_t slot = 0; slot < length; ++slot) {
          if (stays[static_cast<std::size_t>(slot)] == 0) memory.clear(b, g, slot);
        }
      }
    }
  }

  TruncatePlan plan_truncate(std::int64_t layer, std::int64_t count) const override {
    const LayerState& host = state(layer);
    const CpuLayer& memory = mine(layer);
    TruncatePlan plan{.length = host.ordered ? host.length - count : 0, .dropped = {}};
    for (std::int64_t b = 0; b < memory.batch(); ++b) {
      const std::int64_t seen = host.seen[static_cast<std::size_t>(b)];
      for (std::int64_t g = 0; g < memory.graphs(); ++g) {
        const std::int32_t* positions = memory.positions(b, g);
        // Ordered layers forget slots, others tokens; either way these must be the newest tokens.
        std::int64_t found = 0;
        std::int64_t oldest = seen;
        for (std::int64_t slot = 0; slot < host.extent(g); ++slot) {
          if (positions[slot] < 0) continue;
          const bool goes =
              host.ordered ? slot >= host.length - count : positions[slot] >= seen - count;
          if (!goes) {
            if (!host.ordered) plan.length = std::max(plan.length, slot + 1);
            continue;
          }
          ++found;
          oldest = std::min<std::int64_t>(oldest, positions[slot]);
        }
        const std::int64_t expected = host.ordered ? seen - oldest : count;
        if (found != expected) {
          throw_invalid("truncate", "the newest tokens of sequence " + std::to_string(b),
                        "all in the cache (" + std::to_string(expected) + ")",
                        std::to_string(found) + ": some were evicted");
        }
        if (g == 0) plan.dropped.push_back(found);
      }
    }
    return plan;
  }

  void truncate(std::int64_t layer, const TruncatePlan& plan) override {
    const LayerState& host = state(layer);
    CpuLayer& memory = mine(layer);
    for (std::int64_t b = 0; b < memory.batch(); ++b) {
      const std::int64_t first =
          host.seen[static_cast<std::size_t>(b)] - plan.dropped[static_cast<std::size_t>(b)];
      for (std::int64_t g = 0; g < memory.graphs(); ++g) {
        for (std::int64_t slot = 0; slot < host.extent(g); ++slot) {
          if (memory.positions(b, g)[slot] >= first || slot >= plan.length) {
            memory.clear(b, g, slot);
          }
        }
      }
    }
  }

  std::vector<std::int64_t> taken_slots(std::int64_t layer) const override {
    const CpuLayer& memory = mine(layer);
    std::vector<std::int64_t> taken(static_cast<std::size_t>(memory.graphs()), 0);
    for (std::int64_t b = 0; b < memory.batch(); ++b) {
      for (std::int64_t g = 0; g < memory.graphs(); ++g) {
        std::int64_t slots = state(layer).extent(g);
        while (slots > 0 && memory.positions(b, g)[slots - 1] < 0) --slots;
        std::int64_t& most = taken[static_cast<std::size_t>(g)];
        most = std::max(most, slots);
      }
    }
    return taken;
  }

  void reset(std::int64_t layer, std::int64_t sequence) override {
    CpuLayer& memory = mine(layer);
    for (std::int64_t g = 0; g < memory.graphs(); ++g) {
      for (std::int64_t slot = 0; slot < state(layer).extent(g); ++slot) {
        memory.clear(sequence, g, slot);
      }
    }
  }

  void recover() override {}

  void positions(std::int64_t layer, const TensorView& out, Stream) const override {
    for_heads<std::int32_t>(
        layer, out,
        [&](std::int64_t b, std::int64_t g, std::int32_t* row, std::int64_t n) {
          std::copy_n(mine(layer).positions(b, g), n, row);
        },
        -1);
  }

  void rows(std::int64_t layer, const TensorView& neighbors, const TensorView& probabilities,
            Stream) const override {
    const CpuLayer& memory = mine(layer);
    for (std::int64_t b = 0; b < memory.batch(); ++b) {
      for (std::int64_t g = 0; g < memory.graphs(); ++g) {
        for (std::int64_t slot = 0; slot < state(layer).length; ++slot) {
          auto* to = element_pointer<std::int32_t>(neighbors, row_offset(neighbors, b, g, slot));
          auto* weight =
              element_pointer<float>(probabilities, row_offset(probabilities, b, g, slot));
          std::fill_n(to, graph_.top_k, -1);
          std::fill_n(weight, graph_.top_k, 0.0F);
          if (slot >= memory.room(g) || memory.positions(b, g)[slot] < 0) continue;
          for_each_live_edge(memory.row(b, g, slot), graph_.edge_law, graph_.top_k,
                             memory.positions(b, g), slot,
                             [&](std::int32_t neighbor, double probability) {
                               *to++ = neighbor;
                               *weight++ = static_cast<float>(probability);
                             });
        }
      }
    }
  }

  LoadResult load_rows(std::int64_t layer, const ConstTensorView& positions,
                       const ConstTensorView& neighbors, const ConstTensorView& probabilities,
                       Stream) override;

  void load_restart_weights(std::int64_t layer, const ConstTensorView& weights, Stream) override {
    CpuLayer& memory = mine(layer);
    for (std::int64_t b = 0; b < memory.batch(); ++b) {
      for (std::int64_t g = 0; g < memory.graphs(); ++g) {
        std::copy_n(
            element_pointer<std::uint32_t>(weights, b * weights.stride(0) + g * weights.stride(1)),
            state(layer).length, memory.novelty(b, g));
      }
    }
  }

  void restart_distribution(std::int64_t layer, int population, const TensorView& out,
                            Stream) const override {
    const CpuLayer& memory = mine(layer);
    for (std::int64_t b = 0; b < memory.batch(); ++b) {
      for (std::int64_t g = 0; g < memory.graphs(); ++g) {
        auto* row = element_pointer<float>(out, b * out.stride(0) + g * out.stride(1));
        std::fill_n(row, state(layer).length, 0.0F);
        const RestartTable table(context(), memory, state(layer), b, g, population);
        table.for_each([&](std::int32_t slot, double probability) {
          row[slot] = static_cast<float>(probability);
        });
      }
    }
  }

  std::vector<std::uint8_t> save_layer(std::int64_t layer) const override {
    return detail::save_layer(graph_, walk_, mine(layer), state(layer));
  }

  LayerState load_layer(std::int64_t layer, std::span<const std::uint8_t> saved) override {
    LoadedLayer loaded =
        detail::load_layer(graph_, walk_, state(layer).capacity, state(layer).rooms, saved);
    mine(layer) = std::move(loaded.layer);
    return loaded.state;
  }

  void synchronize() const override {}
  void refresh(std::int64_t, LayerState&) const override {}
  BackendStatistics statistics() const override { return statistics_; }

  MemoryUse memory_use() const override {
    MemoryUse use;
    for (const CpuLayer& layer : layers_) use.graph_bytes += layer.bytes();
    for (const Scratch& scratch : scratch_) use.scratch_bytes += scratch.bytes();
    return use;
  }

 private:
  CpuContext context() const {
    return {.graph = graph_,
            .walk = walk_,
            .simd = simd_kernels(),
            .threads = static_cast<int>(scratch_.size())};
  }
  CpuLayer& mine(std::int64_t layer) { return layers_[static_cast<std::size_t>(layer)]; }
  const CpuLayer& mine(std::int64_t layer) const {
    return layers_[static_cast<std::size_t>(layer)];
  }
  const LayerState& state(std::int64_t layer) const {
    return states_[static_cast<std::size_t>(layer)];
  }

  /// Writes a free slot of each head, below `limit` where that is less than it has room for, or
  /// throws and writes none.
  void write_next_slots(std::string_view operation, std::int64_t layer, std::int64_t limit,
                        const TensorView& out) const {
    const CpuLayer& memory = mine(layer);
    std::vector<std::int32_t> found;
    for (std::int64_t b = 0; b < memory.batch(); ++b) {
      for (std::int64_t g = 0; g < memory.graphs(); ++g) {
        const std::int32_t* positions = memory.positions(b, g);
        const std::int64_t slots = std::min(state(layer).room(g), limit);
        const std::int64_t slot = std::find_if(positions, positions + state(layer).extent(g),
                                               [](auto p) { return p < 0; }) -
                                  positions;
        if (slot >= slots) {
          const std::int64_t held = state(layer).held_by(b)[static_cast<std::size_t>(g)];
          throw_invalid(operation, "sequence " + std::to_string(b), "one with a free slot",
                        std::to_string(held) + " tokens in " + std::to_string(slots) + " slots");
        }
        found.push_back(static_cast<std::int32_t>(slot));
      }
    }
    for (std::int64_t b = 0; b < memory.batch(); ++b) {
      for (std::int64_t h = 0; h < graph_.num_kv_heads; ++h) {
        const std::int64_t graph = b * memory.graphs() + context().graph_of(h);
        *element_pointer<std::int32_t>(out, b * out.stride(0) + h * out.stride(1)) =
            found[static_cast<std::size_t>(graph)];
      }
    }
  }

  static std::int64_t slot_of(const ConstTensorView& slots, std::int64_t b, std::int64_t h) {
    return *element_pointer<std::int32_t>(slots, b * slots.stride(0) + h * slots.stride(1));
  }
  static std::int32_t kept_slot(const ConstTensorView& keep, std::int64_t b, std::int64_t h,
                                std::int64_t i) {
    return *element_pointer<std::int32_t>(
        keep, b * keep.stride(0) + h * keep.stride(1) + i * keep.stride(2));
  }
  template <class Pointer>
  static std::int64_t row_offset(const BasicTensorView<Pointer>& view, std::int64_t b,
                                 std::int64_t g, std::int64_t slot) {
    return b * view.stride(0) + g * view.stride(1) + slot * view.stride(2);
  }

  /// Calls function(b, g, row, slots) for the row (b, h) of a (B, Hkv, length) tensor; what the
  /// graph has no slots for is `none`.
  template <class T, class Function>
  void for_heads(std::int64_t layer, const TensorView& out, Function&& function,
                 T none = T{}) const {
    for (std::int64_t b = 0; b < mine(layer).batch(); ++b) {
      for (std::int64_t h = 0; h < graph_.num_kv_heads; ++h) {
        const std::int64_t g = context().graph_of(h);
        auto* row = element_pointer<T>(out, b * out.stride(0) + h * out.stride(1));
        std::fill_n(row, state(layer).length, none);
        function(b, g, row, state(layer).extent(g));
      }
    }
  }

  std::int64_t check_kept_head(std::string_view operation, std::int64_t layer,
                               const ConstTensorView& keep, std::int64_t b, std::int64_t h) const {
    const std::int64_t g = context().graph_of(h);
    const std::int32_t* positions = mine(layer).positions(b, g);
    std::int32_t before = -1;
    std::int64_t count = 0;
    for (std::int64_t i = 0; i < keep.size(2); ++i) {
      const std::int32_t slot = kept_slot(keep, b, h, i);
      const bool left_aligned = kept_slot(keep, b, h, 0) >= 0;
      const bool ended = left_aligned && i > 0 && before == -1;
      if (slot != kept_slot(keep, b, context().first_head(g), i)) {
        throw_invalid(operation, "the kept slots of heads that share a graph", "equal",
                      std::to_string(slot) + at(b, h));
      }
      if (slot == -1 && (before == -1 || left_aligned)) {
        before = -1;
        continue;
      }
      if (slot <= before || slot >= state(layer).extent(g) || ended) {
        throw_invalid(operation, "the kept slots" + at(b, h),
                      "ascending in [0, " + std::to_string(state(layer).extent(g) - 1) +
                          "], with every -1 before or every -1 behind them",
                      std::to_string(slot) + " after " + std::to_string(before));
      }
      if (positions[slot] < 0) {
        throw_invalid(operation, "the kept slots" + at(b, h), "slots that hold a token",
                      std::to_string(slot) + ", which is empty");
      }
      before = slot;
      ++count;
    }
    return count;
  }

  const GraphConfig graph_;
  const WalkConfig walk_;
  const std::vector<LayerState>& states_;
  RotaryTable rotary_;
  std::vector<CpuLayer> layers_;
  std::vector<Scratch> scratch_;
  BackendStatistics statistics_;
};

LoadResult CpuBackend::load_rows(std::int64_t layer, const ConstTensorView& positions,
                                 const ConstTensorView& neighbors,
                                 const ConstTensorView& probabilities, Stream) {
  CpuLayer next(graph_, walk_, mine(layer).batch(), state(layer).capacity);
  LoadResult result = load_graphs(graph_, next, positions, neighbors, probabilities);
  mine(layer) = std::move(next);
  return result;
}

}  // namespace

std::unique_ptr<Backend> make_cpu_backend(const GraphConfig& graph, const WalkConfig& walk,
                                          const std::vector<LayerState>& layers) {
  return std::make_unique<CpuBackend>(graph, walk, layers);
}

}  // namespace spectralkv::detail
