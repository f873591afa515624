// The inner interface: what a device does for GraphManager, one method a stage.
//
// GraphManager has checked shapes, dtypes and devices before it calls; a backend checks what only
// the device's memory tells (free slots, kept slots) and throws before it changes anything.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <numeric>
#include <span>
#include <string_view>
#include <vector>

#include "spectralkv/config.h"
#include "spectralkv/graph_manager.h"
#include "spectralkv/stream.h"
#include "spectralkv/tensor.h"

namespace spectralkv::detail {

/// What the host knows of a layer. GraphManager keeps it and backends read it.
struct LayerState {
  std::int64_t batch = 0;
  std::int64_t capacity = 0;  ///< slots a graph has; of a divided layer: the largest of its rooms
  /// Slots that each graph of a sequence has, one behind the other in one pool: a divided layer.
  /// Empty: an even layer, where each has `capacity`.
  std::vector<std::int64_t> rooms;
  std::int64_t length = 0;  ///< slots [0, length) are in use, as far as a graph has them
  /// Positions ascend with slots, and all graphs of a sequence hold the same ones. Holds until a
  /// slot is released or reused, or heads keep different numbers of tokens.
  bool ordered = true;
  bool has_novelty = false;  ///< restart weights of novelty populations were computed
  bool was_divided = false;  ///< and made even again; its heads part again at the next cut
  // One entry a sequence:
  std::vector<std::int64_t> seen;         ///< tokens seen, the next token's position
  std::vector<std::int64_t> walked_at;    ///< `seen` when scores were last renewed, -1: never
  std::vector<std::uint64_t> walk_block;  ///< Philox block at which the next walk starts
  // One entry a graph, (B, G):
  std::vector<std::int64_t> held;  ///< tokens held

  bool divided() const { return !rooms.empty(); }
  std::int64_t graphs() const {
    return batch == 0 ? 0 : static_cast<std::int64_t>(held.size()) / batch;
  }
  /// Slots that a graph has.
  std::int64_t room(std::int64_t g) const {
    return divided() ? rooms[static_cast<std::size_t>(g)] : capacity;
  }
  /// Slots of a graph that may be in use.
  std::int64_t extent(std::int64_t g) const { return std::min(length, room(g)); }
  /// Slots of a sequence in a divided layer.
  std::int64_t pool() const { return std::accumulate(rooms.begin(), rooms.end(), std::int64_t{0}); }
  std::span<const std::int64_t> held_by(std::int64_t b) const {
    const auto count = static_cast<std::size_t>(graphs());
    return std::span(held).subspan(static_cast<std::size_t>(b) * count, count);
  }
  /// What the graph of a sequence that holds most holds.
  std::int64_t most_held(std::int64_t b) const {
    const auto counts = held_by(b);
    return counts.empty() ? 0 : *std::max_element(counts.begin(), counts.end());
  }
  /// Whether all graphs of each sequence hold the same number of tokens.
  bool holds_alike() const {
    for (std::int64_t b = 0; b < batch; ++b) {
      const auto counts = held_by(b);
      if (std::any_of(counts.begin(), counts.end(), [&](auto n) { return n != counts[0]; })) {
        return false;
      }
    }
    return true;
  }
};

/// What a token attends with besides queries and keys, and where the result goes.
struct AttendedViews {
  ConstTensorView values;  ///< (B, Hkv, S, D) or empty: only the row is asked for
  TensorView out;          ///< (B, Hq, D)
};

struct UpdateArgs {
  ConstTensorView queries;  ///< (B, Hq, Q, D)
  ConstTensorView keys;     ///< (B, Hkv, S, D)
  AttendedViews attended;   ///< of one token a sequence
  ConstTensorView slots;    ///< i32 (B, Hkv) or empty: the slots from `first_slot` on
  ConstTensorView valid;    ///< u8 (B, Q) or empty
  std::int64_t first_slot = 0;
  std::int64_t length = 0;  ///< length of the layer once the tokens are in
  double scale = 1.0;
  double softcap = 0.0;
  std::int64_t row_stride = 1;  ///< 0: no rows; more than one token or none attends

  bool attends() const { return !attended.values.empty(); }
};

/// Attention of one token a sequence without a graph.
struct AttentionArgs {
  ConstTensorView query;  ///< (B, Hq, D)
  ConstTensorView keys;   ///< (B, Hkv, S, D)
  AttendedViews attended;
  ConstTensorView positions;  ///< i32 (B, Hkv, S), negative: not attended to; or empty
  std::int64_t length = 0;    ///< slots [0, length)
  double scale = 1.0;
  double softcap = 0.0;
};

/// New tokens, and where their keys and values may go.
struct PlaceArgs {
  ConstTensorView new_keys;    ///< (B, Hkv, D)
  ConstTensorView new_values;  ///< (B, Hkv, Dv)
  TensorView keys;             ///< (B, Hkv, S, D)
  TensorView values;           ///< (B, Hkv, S, Dv), with as many slots as the keys
  TensorView slots;            ///< i32 (B, Hkv)
};

/// The plan of an eviction.
struct CutArgs {
  EvictionConfig eviction;
  std::vector<std::int64_t> budgets;  ///< one entry a graph of a sequence
  std::vector<std::uint8_t> cut;      ///< one entry a sequence, nonzero: cut it to the budgets
  std::int64_t kept_length = 0;
  bool left_aligned = false;  ///< -1 stand behind the kept slots of a head, not before them
};

/// Whose scores are found anew, and how.
struct RenewArgs {
  std::int64_t first = 0;  ///< layers [first, first + count)
  std::int64_t count = 0;
  std::span<const std::uint8_t> sequences;  ///< one entry each, nonzero: takes part; empty: all
  std::span<const int> walking;             ///< populations, by number
  std::span<const int> exact;               ///< others
  bool beside = true;                       ///< what the caller queues next need not wait for it

  /// Philox blocks that are used up, see blocks_of_walk.
  std::uint64_t blocks(const WalkConfig& walk) const;
};

/// Where new tokens go.
struct SlotPlan {
  std::int64_t length = 0;  ///< of the layer once they are there
  bool appended = true;     ///< every slot lies behind all others
};

struct BackendStatistics {
  std::int64_t rows_written = 0;
  std::int64_t rows_nonfinite = 0;
};

struct TruncatePlan {
  std::int64_t length = 0;            ///< of the layer afterwards
  std::vector<std::int64_t> dropped;  ///< tokens to forget, one entry a sequence
};

/// What a loaded graph holds.
struct LoadResult {
  std::vector<std::int64_t> seen;  ///< one entry a sequence
  std::vector<std::int64_t> held;  ///< one entry a graph
  bool ordered = true;
};

class Backend {
 public:
  virtual ~Backend() = default;

  /// Of calls that take none, from now on.
  virtual void use_stream(Stream stream) = 0;

  /// Gives a layer memory for sequences whose graphs have `rooms` slots (empty: `capacity` each);
  /// sequence i of the new memory is a copy of sequences[i] of the old. No token lies behind what
  /// both have room for.
  virtual void resize(std::int64_t layer, std::int64_t capacity,
                      std::span<const std::int64_t> rooms,
                      std::span<const std::int64_t> sequences) = 0;

  /// Whether calls on `stream` are recorded for later instead of done, so that the host's view
  /// stays as it is.
  virtual bool is_recording(Stream stream) const = 0;

  /// Checks the slots i32 (B, Hkv) of new tokens; precedes `update`.
  virtual SlotPlan plan_slots(std::string_view operation, std::int64_t layer,
                              const ConstTensorView& slots, Stream stream) const = 0;

  /// Draws the rows of new tokens and, where asked for, computes their attention. Returns the
  /// tokens that each sequence gained.
  virtual std::vector<std::int64_t> update(std::int64_t layer, const UpdateArgs& args,
                                           Stream stream) = 0;
  virtual void update_novelty(std::int64_t layer, const ConstTensorView& keys, Stream stream) = 0;
  /// Renews scores: walks some populations and solves others exactly.
  virtual void renew(std::string_view operation, const RenewArgs& args, Stream stream) = 0;

  virtual void scores(std::int64_t layer, int population, const TensorView& out,
                      Stream stream) const = 0;
  virtual void visits(std::int64_t layer, int population, const TensorView& out,
                      Stream stream) const = 0;
  virtual void select(std::int64_t layer, const CutArgs& args, const TensorView& out,
                      Stream stream) const = 0;
  virtual void safety_mask(std::int64_t layer, const EvictionConfig& eviction, double top_fraction,
                           const TensorView& out, Stream stream) const = 0;
  virtual void next_slots(std::int64_t layer, const TensorView& out, Stream stream) const = 0;
  virtual void place(std::int64_t layer, const PlaceArgs& args, Stream stream) const = 0;

  /// Checks a list of kept slots; returns how many each graph keeps, (B, G), which must be `kept`
  /// where that is not empty. Precedes `compact` and `release`.
  virtual std::vector<std::int64_t> check_keep(std::string_view operation, std::int64_t layer,
                                               const ConstTensorView& keep,
                                               std::span<const std::int64_t> kept,
                                               Stream stream) const = 0;
  virtual void compact(std::int64_t layer, const ConstTensorView& keep, const TensorView& keys,
                       const TensorView& values, Stream stream) = 0;
  virtual void release(std::int64_t layer, const ConstTensorView& keep, Stream stream) = 0;

  /// What forgetting the newest `count` slots (tokens where the layer is not ordered) would do;
  /// throws when these are not the newest tokens.
  virtual TruncatePlan plan_truncate(std::int64_t layer, std::int64_t count) const = 0;
  virtual void truncate(std::int64_t layer, const TruncatePlan& plan) = 0;
  /// For each graph of a sequence, one behind its last slot with a token, in any sequence.
  virtual std::vector<std::int64_t> taken_slots(std::int64_t layer) const = 0;
  virtual void reset(std::int64_t layer, std::int64_t sequence) = 0;
  /// Before all layers are reset: forgets what an earlier call of the caller did wrong.
  virtual void recover() = 0;

  virtual void positions(std::int64_t layer, const TensorView& out, Stream stream) const = 0;
  virtual void rows(std::int64_t layer, const TensorView& neighbors,
                    const TensorView& probabilities, Stream stream) const = 0;
  virtual LoadResult load_rows(std::int64_t layer, const ConstTensorView& positions,
                               const ConstTensorView& neighbors,
                               const ConstTensorView& probabilities, Stream stream) = 0;
  virtual void load_restart_weights(std::int64_t layer, const ConstTensorView& weights,
                                    Stream stream) = 0;
  virtual void restart_distribution(std::int64_t layer, int population, const TensorView& out,
                                    Stream stream) const = 0;

  virtual std::vector<std::uint8_t> save_layer(std::int64_t layer) const = 0;
  /// Returns the host's view of the layer, whose capacity stays.
  virtual LayerState load_layer(std::int64_t layer, std::span<const std::uint8_t> saved) = 0;

  virtual void synchronize() const = 0;
  /// What the device counts, where that may differ from the host's view; `state` is that view.
  virtual void refresh(std::int64_t layer, LayerState& state) const = 0;
  virtual BackendStatistics statistics() const = 0;
  virtual MemoryUse memory_use() const = 0;
};

/// `layers` outlives the backend and holds the host's view of every layer.
std::unique_ptr<Backend> make_cpu_backend(const GraphConfig& graph, const WalkConfig& walk,
                                          const std::vector<LayerState>& layers);
/// Throws BackendUnavailable where there is none.
std::unique_ptr<Backend> make_cuda_backend(const GraphConfig& graph, const WalkConfig& walk,
                                           const std::vector<LayerState>& layers, Stream stream);

void decode_attention_on_cpu(const AttentionArgs& args);
/// Throws BackendUnavailable where there is no such device.
void decode_attention_on_cuda(const AttentionArgs& args, int device, Stream stream);

/// Walkers of a population and the number of the first: its share, the last one takes the rest.
struct WalkerRange {
  std::int64_t first = 0;
  std::int64_t count = 0;
};
WalkerRange walkers_of(const WalkConfig& walk, int population);

/// Numbers of the populations whose scores are found so, ascending.
std::vector<int> populations_of(const WalkConfig& walk, Solver solver);

/// What a population's scores are multiplied with before the visits of a walk are added.
inline double decay_of(const WalkConfig& walk, int population) {
  return walk.populations[static_cast<std::size_t>(population)].decay.value_or(walk.decay);
}

/// Whether visits are kept beside the scores: these are the visits where no population accumulates
/// them and f32 holds every count.
bool needs_visits(const WalkConfig& walk);

/// Philox blocks that one walk takes from each walker's stream: two numbers for the start and for
/// every step, four in a block.
constexpr std::uint64_t blocks_of_walk(std::int64_t walk_length) {
  return (static_cast<std::uint64_t>(walk_length) + 2) / 2;
}
inline std::uint64_t RenewArgs::blocks(const WalkConfig& walk) const {
  return walking.empty() ? 0 : blocks_of_walk(walk.walk_length);
}

/// Oldest position of a `Restart::recent` population.
std::int64_t first_recent_position(const Population& population, std::int64_t seen,
                                   std::int64_t num_sinks);

}  // namespace spectralkv::detail
