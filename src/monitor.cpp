#include "spectralkv/monitor.h"

#include <algorithm>
#include <string>
#include <vector>

#include "spectralkv/error.h"
#include "validate.h"

namespace spectralkv {

void MonitorConfig::validate() const {
  eviction.validate();
  constexpr std::int64_t kMost = std::int64_t{1} << 30;
  detail::check_range("MonitorConfig", "walk_interval", walk_interval, 0, kMost);
  detail::check_range("MonitorConfig", "row_stride", row_stride, 1, kMost);
  if (!(top_fraction >= 0.0 && top_fraction <= 1.0)) {
    detail::throw_invalid("MonitorConfig", "top_fraction", "in [0, 1]",
                          std::to_string(top_fraction));
  }
}

struct Monitor::Impl {
  GraphManager graph;
  MonitorConfig config;

  /// Marks the sequences of a layer for which `due(sequence)` holds; empty if there are none.
  template <class Predicate>
  std::vector<std::uint8_t> marked(std::int64_t layer, Predicate&& due) const {
    std::vector<std::uint8_t> marks;
    bool any = false;
    for (std::int64_t b = 0; b < graph.batch_size(layer); ++b) {
      marks.push_back(due(b) ? 1 : 0);
      any = any || marks.back() != 0;
    }
    if (!any) marks.clear();
    return marks;
  }

  bool has_news(std::int64_t layer, std::int64_t sequence) const {
    return graph.tokens_walked(layer, sequence) != graph.tokens_seen(layer, sequence);
  }

  void renew(std::int64_t layer, const ConstTensorView& keys,
             const std::vector<std::uint8_t>& sequences, Stream stream) {
    if (sequences.empty()) return;
    if (graph.walk_config().needs_novelty()) graph.update_novelty(layer, keys, stream);
    if (config.solver == Solver::exact) {
      graph.solve(layer, sequences, stream);
    } else {
      graph.walk(layer, sequences, stream);
    }
  }

  static MonitorConfig checked(MonitorConfig config) {
    config.validate();
    return config;
  }
};

Monitor::Monitor(const GraphConfig& graph, const WalkConfig& walk, const MonitorConfig& monitor)
    : impl_(new Impl{.graph = GraphManager(graph, walk), .config = Impl::checked(monitor)}) {}
Monitor::~Monitor() = default;
Monitor::Monitor(Monitor&&) noexcept = default;
Monitor& Monitor::operator=(Monitor&&) noexcept = default;

void Monitor::on_prefill(std::int64_t layer, const ConstTensorView& queries,
                         const ConstTensorView& keys, const ScoreOptions& options,
                         const ConstTensorView& valid, Stream stream) {
  impl_->graph.update_rows(
      layer, queries, keys,
      {.score = options, .valid = valid, .row_stride = impl_->config.row_stride}, stream);
}

void Monitor::on_prefill_end(std::int64_t layer, const ConstTensorView& keys, Stream stream) {
  impl_->renew(layer, keys,
               impl_->marked(layer, [&](std::int64_t b) { return impl_->has_news(layer, b); }),
               stream);
}

void Monitor::on_step(std::int64_t layer, const ConstTensorView& query, const ConstTensorView& keys,
                      const ConstTensorView& slots, const ScoreOptions& options, Stream stream) {
  impl_->graph.update(layer, query, keys, slots, options, stream);
  renew_due(layer, keys, stream);
}

void Monitor::renew_due(std::int64_t layer, const ConstTensorView& keys, Stream stream) {
  const GraphManager& graph = impl_->graph;
  const std::int64_t interval = impl_->config.walk_interval;
  if (interval == 0) return;
  impl_->renew(layer, keys,
               impl_->marked(layer,
                             [&](std::int64_t b) {
                               const std::int64_t walked =
                                   std::max<std::int64_t>(graph.tokens_walked(layer, b), 0);
                               return graph.tokens_seen(layer, b) - walked >= interval;
                             }),
               stream);
}

void Monitor::on_finish(std::int64_t sequence) { impl_->graph.reset(kAllLayers, sequence); }

bool Monitor::is_full(std::int64_t layer) const {
  return impl_->graph.is_full(layer, impl_->config.eviction);
}

std::int64_t Monitor::kept_length(std::int64_t layer) const {
  return impl_->graph.kept_length(layer, impl_->config.eviction, false);
}

void Monitor::keep(std::int64_t layer, const ConstTensorView& keys, const TensorView& out,
                   Stream stream) {
  const auto full = impl_->graph.full_sequences(layer, impl_->config.eviction);
  impl_->renew(layer, keys,
               impl_->marked(layer,
                             [&](std::int64_t b) {
                               return full[static_cast<std::size_t>(b)] != 0 &&
                                      impl_->has_news(layer, b);
                             }),
               stream);
  impl_->graph.select(layer, impl_->config.eviction, false, out, stream);
}

void Monitor::safety_mask(std::int64_t layer, const TensorView& out, Stream stream) const {
  impl_->graph.safety_mask(layer, impl_->config.eviction, impl_->config.top_fraction, out, stream);
}

const MonitorConfig& Monitor::config() const noexcept { return impl_->config; }
GraphManager& Monitor::graph() noexcept { return impl_->graph; }
const GraphManager& Monitor::graph() const noexcept { return impl_->graph; }

}  // namespace spectralkv
