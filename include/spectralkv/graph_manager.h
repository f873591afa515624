// The attention graphs of a model: who attended to whom, and what that says about whom to keep.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "spectralkv/attention.h"
#include "spectralkv/config.h"
#include "spectralkv/export.h"
#include "spectralkv/stream.h"
#include "spectralkv/tensor.h"

namespace spectralkv {

/// Means "every layer" where a layer is asked for.
inline constexpr std::int64_t kAllLayers = -1;

/// Options of a block of prompt rows.
struct RowOptions {
  ScoreOptions score{};
  /// u8 (B, Q): 0 marks padding, which takes a slot but no position. Empty view: all are tokens.
  ConstTensorView valid{};
  /// Rows are drawn for every row_stride-th token of a block, counted from its newest backwards;
  /// the others have no edges. 0: no token gets one, and neither queries nor keys are read.
  std::int64_t row_stride = 1;
};

struct Statistics {
  std::int64_t rows_written = 0;    ///< rows drawn, over layers, sequences and graphs
  std::int64_t rows_nonfinite = 0;  ///< rows left empty: the token's query or key is not finite
  std::int64_t walks = 0;           ///< graphs of which a population walked
  std::int64_t solves = 0;          ///< graphs of which a population was solved exactly
  std::int64_t evicted = 0;         ///< tokens let go, over layers, sequences and heads
};

struct MemoryUse {
  std::int64_t graph_bytes = 0;    ///< rows, positions, visits, scores and restart weights
  std::int64_t scratch_bytes = 0;  ///< buffers that hold nothing between calls
};

/// Holds one graph for each layer, sequence and KV head (or layer, see GraphScope).
///
/// A *slot* is where a token's key lies in the cache; its *position* is where it stands in the
/// text. Slots [0, length) are in use; an empty one among them (padding, or freed) has position -1.
/// Heads of a layer may have rooms of different size, see divide: then a sequence's slots lie in
/// one pool, head behind head, and keys and values are (B, 1, pool, D) where (B, Hkv, S, D) is
/// said; a slot is counted from the beginning of its head's room. Shapes: L layers, B sequences, Hq
/// query heads, Hkv KV heads, S slots, Q tokens, D head_dim, K neighbours, P populations. Keys and
/// queries are f32, f16 or bf16; the last axis is contiguous, the others have any stride. Keys are
/// read up to `length` slots only, so S may be a whole slab.
///
/// Every method throws InvalidArgument before it changes anything. Calls on one manager must not
/// overlap; two managers are independent. On the CPU every call has finished when it returns.
///
/// On CUDA a call is queued and returns. What touches the caller's tensors runs on the caller's
/// stream; walks and solves touch only the manager's own memory and run, unless `beside` is false,
/// on a side stream of low priority, beside new tokens, between the caller's work before them and
/// the first call that needs their result. Calls on different streams are ordered by the manager.
/// Some calls wait for the device: those that take or return memory, save or load a graph,
/// truncate, read statistics, or must count what a tensor on the device holds (padding marks; kept
/// lists without `kept`; slots and kept lists with GraphConfig::eager_checks). Without eager checks
/// the device checks slots and kept lists itself: a faulty one stops all later changes, and the
/// calls that come after the device found it throw InvalidArgument until reset(kAllLayers).
///
/// `update`, `attend`, `update_novelty`, `walk`, `select`, `release`, `next_slots`, `place`,
/// `scores` and the like may be captured into a CUDA graph, on the captured stream alone;
/// synchronize() before the capture. Counters advance on the device with each replay, and refresh()
/// tells the host's view of them.
class SPECTRALKV_API GraphManager {
 public:
  /// `stream`: as for use_stream.
  GraphManager(const GraphConfig& graph, const WalkConfig& walk, Stream stream = {});
  ~GraphManager();
  GraphManager(GraphManager&&) noexcept;
  GraphManager& operator=(GraphManager&&) noexcept;
  GraphManager(const GraphManager&) = delete;
  GraphManager& operator=(const GraphManager&) = delete;

  /// From now on the stream of calls that take none, as long as it lives; the legacy default
  /// stream before. Where a capture keeps it from being used, the manager's side stream steps in.
  /// Kernels on two streams in turns can make a process slower for good: name the stream of the
  /// other calls.
  void use_stream(Stream stream);

  // -- growing the graph

  /// One new token a sequence: draws its row from its attention over the cache.
  /// `query` (B, Hq, D); `keys` (B, Hkv, S, D) with the new token's key already in its slot.
  /// `slots` i32 (B, Hkv), each a free slot (see next_slots); empty view: slot `length`, appended.
  void update(std::int64_t layer, const ConstTensorView& query, const ConstTensorView& keys,
              const ConstTensorView& slots, const ScoreOptions& options, Stream stream);

  /// The same, and writes the token's attention over the cache to `out` (B, Hq, D): one pass over
  /// the keys serves both. `values` (B, Hkv, S, D) with the new token's value already in its slot;
  /// `values` and `out` are of query's dtype. Slots without a token are not attended to; a score
  /// that is not finite counts as none, and where a head has no score at all its output is NaN.
  /// On CUDA, D is at most 256.
  void attend(std::int64_t layer, const ConstTensorView& query, const ConstTensorView& keys,
              const ConstTensorView& values, const ConstTensorView& slots, const TensorView& out,
              const ScoreOptions& options, Stream stream);

  /// Q new tokens a sequence, appended at slots [length, length + Q): a prompt, a chunk of one, or
  /// a draft. Each sees the tokens up to itself. `queries` (B, Hq, Q, D); `keys` (B, Hkv, S, D).
  void update_rows(std::int64_t layer, const ConstTensorView& queries, const ConstTensorView& keys,
                   const RowOptions& options, Stream stream);

  // -- importance

  /// Renews the restart weights of novelty populations from the keys (B, Hkv, S, D).
  void update_novelty(std::int64_t layer, const ConstTensorView& keys, Stream stream);

  /// Renews the scores of all populations: by random walks, and of those with Solver::exact as
  /// solve does. `sequences` marks which take part (B entries, nonzero: yes); empty: all. `beside`
  /// is for CUDA: whether new tokens need not wait for it. Not where the next call needs its
  /// result, so that no second stream is put to work for nothing.
  void walk(std::int64_t layer, std::span<const std::uint8_t> sequences, Stream stream,
            bool beside = true);

  /// The same scores without noise, of all populations: one sweep from the newest token to the
  /// oldest, in units of visits. Bitwise deterministic.
  void solve(std::int64_t layer, std::span<const std::uint8_t> sequences, Stream stream,
             bool beside = true);

  /// update, update_novelty where a population needs it, and walk.
  void update_and_step(std::int64_t layer, const ConstTensorView& query,
                       const ConstTensorView& keys, const ConstTensorView& slots,
                       const ScoreOptions& options, Stream stream);

  /// Writes f32 (B, Hkv, length): decayed visits of a population, or their sum (population -1).
  void scores(std::int64_t layer, int population, const TensorView& out, Stream stream) const;

  /// Writes u32 (B, Hkv, length): visits of a population in the last walk; where it was solved
  /// exactly, what is expected of one, rounded.
  void visits(std::int64_t layer, int population, const TensorView& out, Stream stream) const;

  // -- eviction

  /// Whether a head of any sequence holds its budget + interval tokens or more.
  bool is_full(std::int64_t layer, const EvictionConfig& eviction) const;

  /// Which sequences are cut then (`force`: every one above the budget): one entry each, nonzero
  /// for those.
  std::vector<std::uint8_t> full_sequences(std::int64_t layer, const EvictionConfig& eviction,
                                           bool force = false) const;

  /// Slots a head needs at most once every full sequence (`force`: every one above the budget) is
  /// cut.
  std::int64_t kept_length(std::int64_t layer, const EvictionConfig& eviction, bool force) const;

  /// Tokens that each head keeps then: one entry a sequence, or one a head, (B, Hkv), where heads
  /// have budgets of their own or hold different numbers.
  std::vector<std::int64_t> kept_counts(std::int64_t layer, const EvictionConfig& eviction,
                                        bool force) const;

  /// Writes i32 (B, Hkv, kept_length): the slots that stay, ascending, right-aligned behind -1;
  /// with head_budgets left-aligned before them. Of a full sequence a head keeps its sinks, its
  /// window and, each population its share, the highest scores; of equal scores the newer token
  /// stays. Other sequences, and heads that hold less than their budget, keep all they have.
  void select(std::int64_t layer, const EvictionConfig& eviction, bool force, const TensorView& out,
              Stream stream) const;

  /// Writes u8 (B, Hkv, length): 1 where a token may go: it is not among the best `top_fraction` of
  /// its head's scores and outside sinks and window.
  void safety_mask(std::int64_t layer, const EvictionConfig& eviction, double top_fraction,
                   const TensorView& out, Stream stream) const;

  /// Moves the kept slots to the front, in place: of `keys` (B, Hkv, S, D) and `values`
  /// (B, Hkv, S, Dv), of any dtype, and of the graph. `keep` i32 (B, Hkv, M) as select writes it.
  /// Empty views: there is nothing to move. `kept`: how many each sequence or each head keeps,
  /// where the host knows it (see kept_counts); else it is counted. The layer must be even.
  void compact(std::int64_t layer, const ConstTensorView& keep, const TensorView& keys,
               const TensorView& values, Stream stream, std::span<const std::int64_t> kept = {});

  /// Frees every slot that is not in `keep` i32 (B, Hkv, M); nothing moves.
  void release(std::int64_t layer, const ConstTensorView& keep, Stream stream,
               std::span<const std::int64_t> kept = {});

  /// Writes i32 (B, Hkv): a free slot of each head, the lowest one.
  void next_slots(std::int64_t layer, const TensorView& out, Stream stream) const;

  /// Writes the key (B, Hkv, D) and value (B, Hkv, Dv) of a new token a sequence into the lowest
  /// free slot of each head, in place: of `keys` (B, Hkv, S, D) and `values` (B, Hkv, S, Dv), of
  /// any dtype. `slots` i32 (B, Hkv) gets these slots, for `update`, which takes them.
  void place(std::int64_t layer, const ConstTensorView& new_keys, const ConstTensorView& new_values,
             const TensorView& keys, const TensorView& values, const TensorView& slots,
             Stream stream) const;

  // -- sequences

  /// Forgets the newest `count` tokens (slots, where nothing was released). They must all be there.
  void truncate(std::int64_t layer, std::int64_t count);

  /// Sequence i becomes a copy of what sequences[i] was: beams, repeats, early finish.
  void select_batch(std::int64_t layer, std::span<const std::int64_t> sequences);

  /// Forgets all tokens of a layer, or of one sequence of it. Random numbers go on, never back.
  void reset(std::int64_t layer, std::optional<std::int64_t> sequence = std::nullopt);

  /// Gives each head of a layer room for `capacity` slots; no less than its length. Takes or
  /// returns memory; slots keep their numbers.
  void reserve(std::int64_t layer, std::int64_t capacity);

  /// Gives each head of a layer a room of its own: slots in a pool that they share, `rooms` (Hkv).
  /// Slots keep their numbers, so every token must lie in what becomes its head's room, as it does
  /// behind select with head_budgets and compact. Takes and returns memory, and waits for the
  /// device. Until reserve makes the layer even again new tokens need slots (see place), and
  /// update_rows, compact and the load_ methods but load_layer refuse it. Needs GraphScope::head.
  void divide(std::int64_t layer, std::span<const std::int64_t> rooms);

  /// Waits for the device's work of this manager.
  void synchronize() const;

  /// Reads lengths and counts from the device, after replays of captured calls; waits.
  void refresh();

  // -- inspection

  const GraphConfig& graph_config() const noexcept;
  const WalkConfig& walk_config() const noexcept;
  std::int64_t length(std::int64_t layer) const;
  /// Slots a head has; of a divided layer: the most that one has.
  std::int64_t capacity(std::int64_t layer) const;
  /// Slots of each head of a divided layer; empty: the layer is even.
  std::span<const std::int64_t> rooms(std::int64_t layer) const;
  std::int64_t batch_size(std::int64_t layer) const;
  /// Graphs a sequence has in a layer: Hkv, or 1 when a layer shares one.
  std::int64_t graphs_per_sequence() const noexcept;
  /// Tokens seen by a sequence, evicted ones included.
  std::int64_t tokens_seen(std::int64_t layer, std::int64_t sequence) const;
  /// Tokens that the head of a sequence holds that holds most.
  std::int64_t tokens_held(std::int64_t layer, std::int64_t sequence) const;
  /// tokens_seen at the sequence's last walk or solve; -1 if there was none, or if tokens that it
  /// covered were truncated since.
  std::int64_t tokens_walked(std::int64_t layer, std::int64_t sequence) const;
  /// Writes i32 (B, Hkv, length): the position of the token in each slot, -1 if empty.
  void positions(std::int64_t layer, const TensorView& out, Stream stream) const;
  /// Writes the rows: neighbours i32 and probabilities f32, both (B, G, length, K) with
  /// G = graphs_per_sequence(). Absent and stale edges: -1 and 0, the others as walks follow them:
  /// a row sums to 1, or to less under EdgeLaw::attention.
  void rows(std::int64_t layer, const TensorView& neighbors, const TensorView& probabilities,
            Stream stream) const;
  /// Replaces the graphs of a layer: `positions` i32 (B, G, S), `neighbors` i32 and `probabilities`
  /// f32 (B, G, S, K). Positions of a graph are unique where not -1, an edge points to an older
  /// token, a row's probabilities sum to 1 or to 0, under EdgeLaw::attention to 1 at most; S
  /// becomes the length.
  void load_rows(std::int64_t layer, const ConstTensorView& positions,
                 const ConstTensorView& neighbors, const ConstTensorView& probabilities,
                 Stream stream = {});
  /// Replaces the restart weights of novelty populations, u32 (B, G, length), relative to each
  /// other; a slot without a token has none.
  void load_restart_weights(std::int64_t layer, const ConstTensorView& weights, Stream stream = {});
  /// Writes f32 (B, G, length): the restart distribution of a population.
  void restart_distribution(std::int64_t layer, int population, const TensorView& out,
                            Stream stream) const;

  /// All that the graphs of a layer hold and go on from, so that load_layer of a manager with the
  /// same configuration, on any device, goes on as this one would. Waits for the device.
  /// After replays of captured calls, refresh() first.
  std::vector<std::uint8_t> save_layer(std::int64_t layer) const;
  /// Replaces a layer, its number of sequences included, by a saved one, which must fit the edge
  /// law, top_k, scope, heads and populations of this manager and, with its length, the capacity of
  /// the layer. Waits for the device.
  void load_layer(std::int64_t layer, std::span<const std::uint8_t> saved);

  Statistics statistics() const;
  MemoryUse memory_use() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace spectralkv
