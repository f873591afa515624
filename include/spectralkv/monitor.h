// The controller for an engine's loop: feed it queries and keys, ask it what may go.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "spectralkv/config.h"
#include "spectralkv/export.h"
#include "spectralkv/graph_manager.h"
#include "spectralkv/stream.h"
#include "spectralkv/tensor.h"

namespace spectralkv {

struct SPECTRALKV_API MonitorConfig {
  EvictionConfig eviction{};
  /// EvictionConfig::head_budgets of each layer. Empty: those of `eviction`.
  std::vector<std::vector<std::int64_t>> head_budgets{};
  /// Solver::walk: GraphManager::walk, each population as it says; Solver::exact:
  /// GraphManager::solve, all of them exactly.
  Solver solver = Solver::walk;
  /// A sequence's importance is renewed when its prompt ends, before it is cut and, where this is
  /// positive, every walk_interval tokens.
  std::int64_t walk_interval = 0;
  double top_fraction = 0.2;    ///< the part of a head's tokens that safety_mask protects
  std::int64_t row_stride = 1;  ///< of prompt rows, see RowOptions
  /// Most rows of a chunk of prompt: of its newest columns, every row_stride-th. The tokens before
  /// them have no edges: nearly all walks begin among the newest tokens and restart soon.
  std::int64_t prompt_rows = 1024;

  void validate() const;
  /// How a layer is cut.
  EvictionConfig eviction_of(std::int64_t layer) const;
};

/// Decides when the graphs are walked and when the cache is cut. One Monitor serves one batch:
///
///     on_prefill (per layer and chunk) ... on_prefill_end
///     every step: on_step, or graph().attend and renew_due (per layer), or, without a row,
///         graph().update_rows with row_stride 0 and renew_due;
///         if is_full(layer): keep(layer), then compact (and, with head budgets, graph().divide)
///         or, if the engine puts new tokens into freed slots, release
///     on_finish
///
/// Each sequence keeps its own schedule, so that a sequence is treated in a batch as it would be
/// alone.
class SPECTRALKV_API Monitor {
 public:
  /// `stream`: as for GraphManager::use_stream.
  Monitor(const GraphConfig& graph, const WalkConfig& walk, const MonitorConfig& monitor,
          Stream stream = {});
  ~Monitor();
  Monitor(Monitor&&) noexcept;
  Monitor& operator=(Monitor&&) noexcept;

  /// A chunk of prompt, as GraphManager::update_rows takes it.
  void on_prefill(std::int64_t layer, const ConstTensorView& queries, const ConstTensorView& keys,
                  const ScoreOptions& options, const ConstTensorView& valid, Stream stream);

  /// The prompt is complete: renews the importance of all sequences of a layer.
  void on_prefill_end(std::int64_t layer, const ConstTensorView& keys, Stream stream);

  /// One new token a sequence, as GraphManager::update takes it; renews the importance of the
  /// sequences whose walk_interval is over.
  void on_step(std::int64_t layer, const ConstTensorView& query, const ConstTensorView& keys,
               const ConstTensorView& slots, const ScoreOptions& options, Stream stream);

  /// What on_step does after GraphManager::update, for tokens that came by another method of it:
  /// renews the importance of the sequences whose walk_interval is over.
  void renew_due(std::int64_t layer, const ConstTensorView& keys, Stream stream);

  /// A sequence has ended: its slots hold no tokens any more, and no cut keeps them.
  void on_finish(std::int64_t sequence);

  /// Whether a head of a sequence of the layer has reached its budget + interval.
  bool is_full(std::int64_t layer) const;

  /// Length of what keep writes.
  std::int64_t kept_length(std::int64_t layer) const;

  /// Writes i32 (B, Hkv, kept_length(layer)): the slots that stay (GraphManager::select). First
  /// renews the importance of the full sequences where tokens came since their last walk.
  void keep(std::int64_t layer, const ConstTensorView& keys, const TensorView& out, Stream stream);

  /// From now on the heads of a layer keep so many tokens each (EvictionConfig::head_budgets); what
  /// a head holds above that goes at the next cut. Empty: all keep the budget.
  void set_head_budgets(std::int64_t layer, std::vector<std::int64_t> budgets);

  /// GraphManager::safety_mask with this monitor's settings.
  void safety_mask(std::int64_t layer, const TensorView& out, Stream stream) const;

  const MonitorConfig& config() const noexcept;
  GraphManager& graph() noexcept;
  const GraphManager& graph() const noexcept;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace spectralkv
