#include "spectralkv/monitor.h"

#include <algorithm>
#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "spectralkv/error.h"
#include "validate.h"

namespace spectralkv {

void MonitorConfig::validate() const {
  eviction.validate();
  for (std::size_t layer = 0; layer < head_budgets.size(); ++layer) {
    eviction_of(static_cast<std::int64_t>(layer)).validate();
  }
  constexpr std::int64_t kMost = std::int64_t{1} << 30;
  detail::check_range("MonitorConfig", "walk_interval", walk_interval, 0, kMost);
  detail::check_range("MonitorConfig", "row_stride", row_stride, 1, kMost);
  detail::check_range("MonitorConfig", "prompt_rows", prompt_rows, 1, kMost);
  if (!(top_fraction >= 0.0 && top_fraction <= 1.0)) {
    detail::throw_invalid("MonitorConfig", "top_fraction", "in [0, 1]",
                          std::to_string(top_fraction));
  }
}

EvictionConfig MonitorConfig::eviction_of(std::int64_t layer) const {
  EvictionConfig own = eviction;
  if (!head_budgets.empty()) own.head_budgets = head_budgets[static_cast<std::size_t>(layer)];
  return own;
}

namespace {

/// `count` elements of an axis; of an empty view an empty one.
ConstTensorView part_of(ConstTensorView view, int axis, std::int64_t first, std::int64_t count) {
  if (view.empty()) return view;
  view.data =
      static_cast<const std::byte*>(view.data) + first * view.stride(axis) * size_of(view.dtype);
  view.shape[static_cast<std::size_t>(axis)] = count;
  return view;
}

}  // namespace

struct Monitor::Impl {
  GraphManager graph;
  MonitorConfig config;

  /// Whether `count` more tokens with these keys and marks pass the checks that fewer would pass.
  bool takes(std::int64_t layer, std::int64_t count, const ConstTensorView& keys,
             const ConstTensorView& valid) const {
    const std::int64_t length = graph.length(layer) + count;
    return length <= graph.capacity(layer) && keys.rank == 4 && keys.size(2) >= length &&
           (valid.empty() || (valid.rank == 2 && valid.size(1) == count));
  }

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
             const std::vector<std::uint8_t>& sequences, Stream stream, bool beside = true) {
    if (sequences.empty()) return;
    if (graph.walk_config().needs_novelty()) graph.update_novelty(layer, keys, stream);
    if (config.solver == Solver::exact) {
      graph.solve(layer, sequences, stream, beside);
    } else {
      graph.walk(layer, sequences, stream, beside);
    }
  }

  /// How a layer is cut; the layer is checked.
  EvictionConfig eviction_of(std::int64_t layer) const {
    detail::check_range("Monitor", "layer", layer, 0, graph.graph_config().num_layers - 1);
    return config.eviction_of(layer);
  }

  static MonitorConfig checked(MonitorConfig config, std::int64_t num_layers) {
    config.validate();
    if (!config.head_budgets.empty() &&
        std::cmp_not_equal(config.head_budgets.size(), num_layers)) {
      detail::throw_invalid("Monitor", "the number of layers with head budgets",
                            std::to_string(num_layers), std::to_string(config.head_budgets.size()));
    }
    return config;
  }
};

Monitor::Monitor(const GraphConfig& graph, const WalkConfig& walk, const MonitorConfig& monitor,
                 Stream stream)
    : impl_(new Impl{.graph = GraphManager(graph, walk, stream),
                     .config = Impl::checked(monitor, graph.num_layers)}) {}
Monitor::~Monitor() = default;
Monitor::Monitor(Monitor&&) noexcept = default;
Monitor& Monitor::operator=(Monitor&&) noexcept = default;

void Monitor::on_prefill(std::int64_t layer, const ConstTensorView& queries,
                         const ConstTensorView& keys, const ScoreOptions& options,
                         const ConstTensorView& valid, Stream stream) {
  GraphManager& graph = impl_->graph;
  const std::int64_t stride = impl_->config.row_stride;
  const auto draw = [&](const ConstTensorView& some, const ConstTensorView& real,
                        std::int64_t row_stride) {
    graph.update_rows(layer, some, keys,
                      {.score = options, .valid = real, .row_stride = row_stride}, stream);
  };
  const std::int64_t count = queries.rank == 4 ? queries.size(2) : 0;
  const std::int64_t drawn = impl_->config.prompt_rows * stride;
  // What would be refused is refused whole, not after half of it.
  if (count <= drawn || !impl_->takes(layer, count, keys, valid)) {
    draw(queries, valid, stride);
    return;
  }
  const std::int64_t older = count - drawn;
  draw(part_of(queries, 2, 0, older), part_of(valid, 1, 0, older), 0);
  draw(part_of(queries, 2, older, drawn), part_of(valid, 1, older, drawn), stride);
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
  return impl_->graph.is_full(layer, impl_->eviction_of(layer));
}

std::int64_t Monitor::kept_length(std::int64_t layer) const {
  return impl_->graph.kept_length(layer, impl_->eviction_of(layer), false);
}

void Monitor::keep(std::int64_t layer, const ConstTensorView& keys, const TensorView& out,
                   Stream stream) {
  const EvictionConfig eviction = impl_->eviction_of(layer);
  const auto full = impl_->graph.full_sequences(layer, eviction);
  impl_->renew(layer, keys,
               impl_->marked(layer,
                             [&](std::int64_t b) {
                               return full[static_cast<std::size_t>(b)] != 0 &&
                                      impl_->has_news(layer, b);
                             }),
               stream, /*beside=*/false);
  impl_->graph.select(layer, eviction, false, out, stream);
}

void Monitor::set_head_budgets(std::int64_t layer, std::vector<std::int64_t> budgets) {
  EvictionConfig eviction = impl_->eviction_of(layer);
  eviction.head_budgets = budgets;
  eviction.validate();
  const GraphConfig& graph = impl_->graph.graph_config();
  if (!budgets.empty() && std::cmp_not_equal(budgets.size(), graph.num_kv_heads)) {
    detail::throw_invalid("Monitor", "the number of head budgets",
                          std::to_string(graph.num_kv_heads), std::to_string(budgets.size()));
  }
  auto& all = impl_->config.head_budgets;
  all.resize(static_cast<std::size_t>(graph.num_layers));
  all[static_cast<std::size_t>(layer)] = std::move(budgets);
}

void Monitor::safety_mask(std::int64_t layer, const TensorView& out, Stream stream) const {
  impl_->graph.safety_mask(layer, impl_->config.eviction, impl_->config.top_fraction, out, stream);
}

const MonitorConfig& Monitor::config() const noexcept { return impl_->config; }
GraphManager& Monitor::graph() noexcept { return impl_->graph; }
const GraphManager& Monitor::graph() const noexcept { return impl_->graph; }

}  // namespace spectralkv
