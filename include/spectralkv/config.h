// What a graph, its walks and an eviction are made of.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "spectralkv/export.h"
#include "spectralkv/tensor.h"

namespace spectralkv {

/// How a token's row stores its neighbours, and how walkers follow them.
enum class EdgeLaw : std::uint8_t {
  uniform,    ///< top_k slots, each followed with the same probability
  weighted,   ///< top_k slots with their cumulative probabilities, whose sum is 1
  attention,  ///< the same, but of the attention to all tokens: what the neighbours leave over, to
              ///< sinks for instance, and what tokens held that went is a restart
};

/// Which heads share a graph.
enum class GraphScope : std::uint8_t {
  head,   ///< one graph for each KV head
  layer,  ///< one graph for all KV heads of a layer
};

/// How the model turned its keys by their positions: by p * inv_freq[i] the pair i of the token at
/// position p. What keys have in common shows only once they are turned back, so novelty compares
/// them unturned. Of the head_dim elements those behind 2 * inv_freq.size() were not turned;
/// without inv_freq none was, and keys are compared as they lie.
struct SPECTRALKV_API Rotary {
  std::vector<double> inv_freq;  ///< radians a token
  /// Pair i is elements 2 i and 2 i + 1; otherwise i and i + inv_freq.size().
  bool interleaved = false;
};

/// Shape and memory of the graphs of one model. A graph is one (layer, sequence, KV head), or one
/// (layer, sequence) with GraphScope::layer.
struct SPECTRALKV_API GraphConfig {
  std::int64_t num_layers = 1;
  std::int64_t batch_size = 1;
  std::int64_t num_query_heads = 1;  ///< a multiple of num_kv_heads
  std::int64_t num_kv_heads = 1;
  std::int64_t head_dim = 64;
  std::int64_t capacity = 0;  ///< slots a graph; GraphManager::reserve changes it later
  int top_k = 8;              ///< neighbours a token: 4, 8, 16 or 32
  EdgeLaw edge_law = EdgeLaw::weighted;
  /// Rows of 16-bit slots and 16-bit cumulative probabilities where a graph has at most 65,535
  /// slots: half the memory. Otherwise, and in larger graphs, both have 32 bits. EdgeLaw::uniform
  /// has no probabilities to pack.
  bool pack_rows = true;
  GraphScope scope = GraphScope::head;
  std::int64_t num_sinks = 4;  ///< tokens at positions below this get no edges and no restarts
  std::uint64_t seed = 0;
  std::int64_t head_offset = 0;  ///< first KV head here, counted over all ranks (tensor parallel)
  std::int64_t total_kv_heads = 0;  ///< KV heads over all ranks; 0: num_kv_heads
  Device device{};
  int num_threads = 0;  ///< threads of the CPU backend; 0: one for each processor we may run on
  /// CUDA: wait for the device to check slots and kept lists, so that a call with bad ones throws
  /// and changes nothing. Otherwise no call waits, and a later call throws (see GraphManager).
  bool eager_checks = false;
  Rotary rotary{};

  /// Throws InvalidArgument that names the field, what was expected and what came.
  void validate() const;
};

/// Where a walker goes when it restarts.
enum class Restart : std::uint8_t {
  current,  ///< the newest token
  recent,   ///< a token among the newest, each alike
  novelty,  ///< a token by softmax of the z-scored distance of its key from the mean key direction
};

/// Which arrivals a visit counts.
enum class VisitCount : std::uint8_t {
  edges,  ///< arrivals over an edge
  all,    ///< arrivals by restart, too
};

/// How the scores of a population are found.
enum class Solver : std::uint8_t {
  walk,   ///< by random walks
  exact,  ///< by one sweep over the graph: what infinitely many walkers would find
};

/// A part of the walkers that restarts and counts in one way, and its part of the budget.
struct Population {
  Restart restart = Restart::recent;
  VisitCount count = VisitCount::edges;
  double share = 1.0;            ///< of walkers and of the budget; the shares of a config sum to 1
  double recent_fraction = 0.1;  ///< Restart::recent: this part of the tokens seen ...
  std::int64_t recent_tokens = 0;              ///< ... or, when positive, this many tokens
  std::optional<double> decay = std::nullopt;  ///< in place of WalkConfig::decay
  /// Solver::exact: none of its walkers starts, and its scores are what they would be expected to
  /// find. The other populations walk as they would beside walkers.
  Solver solver = Solver::walk;
};

/// Most populations a walk can have.
inline constexpr int kMaxPopulations = 4;

/// Personalized PageRank, by random walks or exactly. restart_prob is 1 - damping in PageRank's
/// words.
struct SPECTRALKV_API WalkConfig {
  std::int64_t num_walkers = 1024;  ///< a graph, over all its populations
  std::int64_t walk_length = 20;    ///< steps a walker
  double restart_prob = 0.7;        ///< in (0, 1]
  /// scores = decay * scores + visits; 0: each walk anew, 1: never forget. Of populations that have
  /// none of their own.
  double decay = 0.0;
  /// Restart::novelty: a token's weight is the mean over the tokens held among so many positions
  /// around it, an odd number. What nobody asked for yet is worth keeping as a whole phrase only.
  std::int64_t novelty_width = 5;
  std::vector<Population> populations{
      {.restart = Restart::recent, .count = VisitCount::edges, .share = 0.6, .decay = 0.5},
      {.restart = Restart::novelty,
       .count = VisitCount::all,
       .share = 0.4,
       .solver = Solver::exact},
  };

  void validate() const;
  bool needs_novelty() const;
};

/// When a cache is cut, and what always stays.
struct SPECTRALKV_API EvictionConfig {
  std::int64_t budget = 0;     ///< tokens kept a head, sinks and window included
  std::int64_t interval = 32;  ///< a sequence is cut when a head holds this many tokens above it
  std::int64_t window = 50;    ///< newest tokens that always stay
  std::int64_t sinks = 4;      ///< oldest tokens that always stay
  /// One entry a KV head, in place of `budget`: heads that keep more or less than others. Needs
  /// GraphScope::head. Sequences of a batch are then cut together, as soon as one is full: before
  /// the layer is divided (see GraphManager::divide) when a head holds budget + interval tokens;
  /// from then on when one holds its own budget + interval, or, once the layer was made even again,
  /// as soon as one holds more than its budget. Empty: all keep `budget`, and each sequence has its
  /// own schedule.
  std::vector<std::int64_t> head_budgets{};

  void validate() const;
};

/// Sets edge law, top_k and the walk to a named choice: "default", "walks" (the default with
/// nothing solved exactly), "uniform32" or "weighted4".
SPECTRALKV_API void apply_preset(std::string_view name, GraphConfig& graph, WalkConfig& walk);

}  // namespace spectralkv
