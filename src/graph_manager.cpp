// Validation, the host's view of the layers and the choice of the backend. Nothing else.
#include "spectralkv/graph_manager.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "backend.h"
#include "spectralkv/error.h"
#include "validate.h"

namespace spectralkv {

using detail::check_range;
using detail::check_tensor;
using detail::kAny;
using detail::LayerState;
using detail::throw_invalid;

namespace {

/// (B, Hq, D) as (B, Hq, 1, D).
ConstTensorView with_token_axis(ConstTensorView query) {
  query.rank = 4;
  query.shape[3] = query.shape[2];
  query.strides[3] = query.strides[2];
  query.shape[2] = 1;
  query.strides[2] = 0;
  return query;
}

std::int64_t graphs_of(const GraphConfig& config) {
  return config.scope == GraphScope::head ? config.num_kv_heads : 1;
}

}  // namespace

struct GraphManager::Impl {
  GraphConfig graph;
  WalkConfig walk;
  std::vector<LayerState> layers;
  std::unique_ptr<detail::Backend> backend;
  Statistics statistics;
  std::vector<int> walking;  ///< populations that walk
  std::vector<int> exact;    ///< the others
  std::vector<int> all;      ///< both

  Impl(const GraphConfig& graph_config, WalkConfig walk_config, Stream stream)
      : graph(graph_config), walk(std::move(walk_config)) {
    graph.validate();
    walk.validate();
    if (graph.total_kv_heads == 0) graph.total_kv_heads = graph.num_kv_heads;
    LayerState state;
    state.batch = graph.batch_size;
    state.capacity = graph.capacity;
    const auto batch = static_cast<std::size_t>(graph.batch_size);
    state.seen.assign(batch, 0);
    state.held.assign(batch * static_cast<std::size_t>(graphs_of(graph)), 0);
    state.walked_at.assign(batch, -1);
    state.walk_block.assign(batch, 0);
    walking = detail::populations_of(walk, Solver::walk);
    exact = detail::populations_of(walk, Solver::exact);
    all.resize(walk.populations.size());
    std::iota(all.begin(), all.end(), 0);
    layers.assign(static_cast<std::size_t>(graph.num_layers), state);
    backend = graph.device.type == DeviceType::cpu
                  ? detail::make_cpu_backend(graph, walk, layers)
                  : detail::make_cuda_backend(graph, walk, layers, stream);
  }

  // -- checks

  LayerState& layer_state(std::string_view operation, std::int64_t layer) {
    check_range(operation, "layer", layer, 0, graph.num_layers - 1);
    return layers[static_cast<std::size_t>(layer)];
  }
  const LayerState& layer_state(std::string_view operation, std::int64_t layer) const {
    check_range(operation, "layer", layer, 0, graph.num_layers - 1);
    return layers[static_cast<std::size_t>(layer)];
  }

  /// The layers that a layer argument means: [first, first + count).
  std::pair<std::int64_t, std::int64_t> layer_range(std::int64_t layer) const {
    return layer == kAllLayers ? std::pair{std::int64_t{0}, graph.num_layers}
                               : std::pair{layer, std::int64_t{1}};
  }

  /// Calls function(layer) for one layer or for all.
  template <class Function>
  void for_layers(std::string_view operation, std::int64_t layer, Function&& function) const {
    if (layer != kAllLayers) {
      check_range(operation, "layer", layer, kAllLayers, graph.num_layers - 1);
      function(layer);
      return;
    }
    for (std::int64_t l = 0; l < graph.num_layers; ++l) function(l);
  }

  void check_population(std::string_view operation, int population, int lowest) const {
    check_range(operation, "population", population, lowest,
                static_cast<std::int64_t>(walk.populations.size()) - 1);
  }

  /// (B, Hq, D) of one new token a sequence.
  void check_query(std::string_view operation, std::int64_t layer,
                   const ConstTensorView& query) const {
    check_tensor(query, {.operation = operation,
                         .name = "query",
                         .axes = "(B, Hq, D)",
                         .extents = {layer_state(operation, layer).batch, graph.num_query_heads,
                                     graph.head_dim},
                         .dtypes = {DType::f32, DType::f16, DType::bf16},
                         .device = graph.device});
  }

  /// Axes of keys and values, heads in such a tensor, and slots it must have where those of
  /// [0, length) are looked at.
  static std::string_view cache_axes(const LayerState& state) {
    return state.divided() ? "(B, 1, pool, D)" : "(B, Hkv, S, D)";
  }
  std::int64_t cache_heads(const LayerState& state) const {
    return state.divided() ? 1 : graph.num_kv_heads;
  }
  static std::int64_t cache_slots(const LayerState& state, std::int64_t length) {
    return state.divided() ? state.pool() : length;
  }

  void check_keys(std::string_view operation, const ConstTensorView& keys, const LayerState& state,
                  std::int64_t length) const {
    check_tensor(keys, {.operation = operation,
                        .name = "keys",
                        .axes = cache_axes(state),
                        .extents = {state.batch, cache_heads(state), kAny, graph.head_dim},
                        .dtypes = {DType::f32, DType::f16, DType::bf16},
                        .device = graph.device});
    detail::check_slots(operation, "keys", keys, cache_slots(state, length));
  }

  /// Some calls need slots of all heads side by side.
  static void require_even(std::string_view operation, std::string_view what,
                           const LayerState& state) {
    if (state.divided()) {
      throw_invalid(operation, what, "an even layer (see reserve)",
                    "one whose heads have rooms of their own");
    }
  }

  void check_slot_table(std::string_view operation, std::string_view name, DType dtype,
                        const ConstTensorView& view, const LayerState& state, std::int64_t slots,
                        bool writable) const {
    check_tensor(view, {.operation = operation,
                        .name = name,
                        .axes = "(B, Hkv, S)",
                        .extents = {state.batch, graph.num_kv_heads, slots},
                        .dtypes = {dtype},
                        .device = graph.device,
                        .unit_last_stride = true,
                        .writable = writable});
  }

  void check_row_table(std::string_view operation, std::string_view name, DType dtype,
                       const ConstTensorView& view, const LayerState& state, std::int64_t slots,
                       bool writable) const {
    check_tensor(view, {.operation = operation,
                        .name = name,
                        .axes = "(B, G, S, K)",
                        .extents = {state.batch, graphs_of(graph), slots, graph.top_k},
                        .dtypes = {dtype},
                        .device = graph.device,
                        .unit_last_stride = true,
                        .writable = writable});
  }

  void check_sequences(std::string_view operation, std::span<const std::uint8_t> sequences,
                       const LayerState& state) const {
    if (!sequences.empty() && std::cmp_not_equal(sequences.size(), state.batch)) {
      throw_invalid(operation, "the number of sequence marks", std::to_string(state.batch),
                    std::to_string(sequences.size()));
    }
  }

  // -- stages

  /// Appends Q tokens, or puts one a sequence into free slots.
  void add_tokens(std::string_view operation, std::int64_t layer, const ConstTensorView& queries,
                  const ConstTensorView& keys, const ConstTensorView& slots,
                  const RowOptions& options, Stream stream,
                  const detail::AttendedViews* attended = nullptr) {
    LayerState& state = layer_state(operation, layer);
    detail::check_score_options(operation, options.score);
    check_range(operation, "row_stride", options.row_stride, 0,
                std::numeric_limits<std::int32_t>::max());
    const std::int64_t count = queries.size(2);
    if (slots.empty()) require_even(operation, "the layer, without slots", state);

    detail::SlotPlan plan{.length = state.length + count, .appended = true};
    if (!slots.empty()) {
      check_tensor(slots, {.operation = operation,
                           .name = "slots",
                           .axes = "(B, Hkv)",
                           .extents = {state.batch, graph.num_kv_heads},
                           .dtypes = {DType::i32},
                           .device = graph.device,
                           .unit_last_stride = false});
      plan = backend->plan_slots(operation, layer, slots, stream);
    }
    if (plan.length > state.capacity) {
      throw_invalid(operation, "the layer's length",
                    "at most its capacity " + std::to_string(state.capacity),
                    std::to_string(plan.length));
    }
    check_keys(operation, keys, state, plan.length);
    detail::check_same_dtype(operation, "keys", keys, queries);
    if (attended != nullptr) {
      detail::check_attended(operation, queries, keys, attended->values,
                             cache_slots(state, plan.length), attended->out);
    }
    if (!options.valid.empty()) {
      check_tensor(options.valid, {.operation = operation,
                                   .name = "valid",
                                   .axes = "(B, Q)",
                                   .extents = {state.batch, count},
                                   .dtypes = {DType::u8},
                                   .device = graph.device,
                                   .unit_last_stride = false});
    }
    if (count == 0) return;
    const std::vector<std::int64_t> added =
        backend->update(layer,
                        {.queries = queries,
                         .keys = keys,
                         .attended = attended == nullptr ? detail::AttendedViews{} : *attended,
                         .slots = slots,
                         .valid = options.valid,
                         .first_slot = state.length,
                         .length = plan.length,
                         .scale = detail::scale_of(options.score, graph.head_dim),
                         .softcap = options.score.softcap,
                         .row_stride = options.row_stride},
                        stream);
    if (backend->is_recording(stream)) return;
    state.length = plan.length;
    state.ordered = state.ordered && plan.appended;
    const std::int64_t graphs = state.graphs();
    auto held = state.held.begin();
    for (std::size_t b = 0; b < added.size(); ++b) {
      state.seen[b] += added[b];
      for (std::int64_t g = 0; g < graphs; ++g) *held++ += added[b];
    }
  }

  void check_walk(std::string_view operation, std::int64_t layer,
                  std::span<const std::uint8_t> sequences) const {
    for_layers(operation, layer, [&](std::int64_t l) {
      const LayerState& state = layers[static_cast<std::size_t>(l)];
      check_sequences(operation, sequences, state);
      if (walk.needs_novelty() && !state.has_novelty && state.length > 0) {
        throw_invalid(operation, "a novelty population's restart weights",
                      "computed by update_novelty first", "none for layer " + std::to_string(l));
      }
    });
  }

  /// Walks some populations of the marked sequences and solves others exactly.
  void renew(std::string_view operation, std::int64_t layer,
             std::span<const std::uint8_t> sequences, std::span<const int> to_walk,
             std::span<const int> to_solve, bool beside, Stream stream) {
    check_walk(operation, layer, sequences);
    const auto [first, count] = layer_range(layer);
    const detail::RenewArgs args{.first = first,
                                 .count = count,
                                 .sequences = sequences,
                                 .walking = to_walk,
                                 .exact = to_solve,
                                 .beside = beside};
    backend->renew(operation, args, stream);
    if (backend->is_recording(stream)) return;
    std::int64_t graphs = 0;
    for (std::int64_t l = first; l < first + count; ++l) {
      LayerState& state = layers[static_cast<std::size_t>(l)];
      for (std::size_t b = 0; b < state.seen.size(); ++b) {
        if (!sequences.empty() && sequences[b] == 0) continue;
        state.walked_at[b] = state.seen[b];
        state.walk_block[b] += args.blocks(walk);
        graphs += graphs_of(graph);
      }
    }
    if (!to_walk.empty()) statistics.walks += graphs;
    if (!to_solve.empty()) statistics.solves += graphs;
  }

  detail::CutArgs plan_cut(std::string_view operation, std::int64_t layer,
                           const EvictionConfig& eviction, bool force) const {
    const LayerState& state = layer_state(operation, layer);
    eviction.validate();
    detail::CutArgs args{.eviction = eviction,
                         .budgets = eviction.head_budgets,
                         .cut = {},
                         .kept_length = 0,
                         .left_aligned = !eviction.head_budgets.empty()};
    const auto graphs = static_cast<std::size_t>(graphs_of(graph));
    if (args.budgets.empty()) args.budgets.assign(graphs, eviction.budget);
    const bool together = !eviction.head_budgets.empty();
    if (args.budgets.size() != graphs || (together && graph.scope != GraphScope::head)) {
      throw_invalid(operation, "the number of head budgets",
                    graph.scope == GraphScope::head ? std::to_string(graph.num_kv_heads)
                                                    : "none where heads share a graph",
                    std::to_string(args.budgets.size()));
    }
    // Heads that part at the next cut, or parted and were put side by side for a while.
    const bool overdue =
        together && !state.divided() && (state.was_divided || !state.holds_alike());
    const std::int64_t above = force || overdue ? 1 : eviction.interval;
    bool any = false;
    for (std::int64_t b = 0; b < state.batch; ++b) {
      const auto held = state.held_by(b);
      bool cut = false;
      for (std::size_t g = 0; g < graphs; ++g) {
        const std::int64_t own = state.divided() || overdue ? args.budgets[g] : eviction.budget;
        cut = cut || held[g] >= own + above;
      }
      any = any || cut;
      args.cut.push_back(cut ? 1 : 0);
    }
    if (together && any) std::fill(args.cut.begin(), args.cut.end(), std::uint8_t{1});
    for (std::size_t i = 0; i < state.held.size(); ++i) {
      const bool cut = args.cut[i / graphs] != 0;
      args.kept_length =
          std::max(args.kept_length, kept_by(cut, state.held[i], args.budgets[i % graphs]));
    }
    return args;
  }

  /// Tokens that a head keeps of those that it holds.
  static std::int64_t kept_by(bool cut, std::int64_t held, std::int64_t budget) {
    return cut ? std::min(held, budget) : held;
  }

  /// Checks a list of kept slots; returns how many each graph keeps.
  std::vector<std::int64_t> check_keep(std::string_view operation, std::int64_t layer,
                                       const ConstTensorView& keep,
                                       std::span<const std::int64_t> kept, Stream stream) const {
    const LayerState& state = layer_state(operation, layer);
    check_slot_table(operation, "keep", DType::i32, keep, state, kAny, false);
    check_range(operation, "keep's number of slots", keep.size(2), 0, state.length);
    std::vector<std::int64_t> expected(kept.begin(), kept.end());
    const auto graphs = static_cast<std::size_t>(state.graphs());
    if (std::cmp_equal(kept.size(), state.batch) && kept.size() != state.held.size()) {
      expected.clear();
      for (const std::int64_t count : kept) expected.insert(expected.end(), graphs, count);
    }
    if (!kept.empty() && expected.size() != state.held.size()) {
      throw_invalid(operation, "the number of kept counts",
                    std::to_string(state.batch) + " or " + std::to_string(state.held.size()),
                    std::to_string(kept.size()));
    }
    for (std::size_t i = 0; i < expected.size(); ++i) {
      check_range(operation, "a kept count", expected[i], 0, std::min(keep.size(2), state.held[i]));
    }
    return backend->check_keep(operation, layer, keep, expected, stream);
  }

  void book_kept(LayerState& state, const std::vector<std::int64_t>& kept) {
    const std::int64_t heads_of_graph = graph.num_kv_heads / graphs_of(graph);
    for (std::size_t i = 0; i < kept.size(); ++i) {
      statistics.evicted += (state.held[i] - kept[i]) * heads_of_graph;
    }
    state.held = kept;
    state.ordered = state.ordered && state.holds_alike();
  }

  /// Gives a layer memory with other rooms (empty: `capacity` slots a head).
  void resize(std::int64_t layer, std::int64_t capacity, std::vector<std::int64_t> rooms) {
    LayerState& state = layers[static_cast<std::size_t>(layer)];
    if (capacity == state.capacity && rooms == state.rooms) return;
    std::vector<std::int64_t> sequences(static_cast<std::size_t>(state.batch));
    std::iota(sequences.begin(), sequences.end(), 0);
    backend->resize(layer, capacity, rooms, sequences);
    state.was_divided = rooms.empty() && (state.divided() || state.was_divided);
    state.capacity = capacity;
    state.rooms = std::move(rooms);
    state.ordered = state.ordered && !state.divided();
  }
};

GraphManager::GraphManager(const GraphConfig& graph, const WalkConfig& walk, Stream stream)
    : impl_(std::make_unique<Impl>(graph, walk, stream)) {}
GraphManager::~GraphManager() = default;
GraphManager::GraphManager(GraphManager&&) noexcept = default;
GraphManager& GraphManager::operator=(GraphManager&&) noexcept = default;

void GraphManager::use_stream(Stream stream) { impl_->backend->use_stream(stream); }

void GraphManager::update(std::int64_t layer, const ConstTensorView& query,
                          const ConstTensorView& keys, const ConstTensorView& slots,
                          const ScoreOptions& options, Stream stream) {
  impl_->check_query("update", layer, query);
  impl_->add_tokens("update", layer, with_token_axis(query), keys, slots,
                    {.score = options, .valid = {}, .row_stride = 1}, stream);
}

void GraphManager::attend(std::int64_t layer, const ConstTensorView& query,
                          const ConstTensorView& keys, const ConstTensorView& values,
                          const ConstTensorView& slots, const TensorView& out,
                          const ScoreOptions& options, Stream stream) {
  impl_->check_query("attend", layer, query);
  const detail::AttendedViews attended{.values = values, .out = out};
  impl_->add_tokens("attend", layer, with_token_axis(query), keys, slots,
                    {.score = options, .valid = {}, .row_stride = 1}, stream, &attended);
}

void GraphManager::update_rows(std::int64_t layer, const ConstTensorView& queries,
                               const ConstTensorView& keys, const RowOptions& options,
                               Stream stream) {
  const LayerState& state = impl_->layer_state("update_rows", layer);
  check_tensor(queries,
               {.operation = "update_rows",
                .name = "queries",
                .axes = "(B, Hq, Q, D)",
                .extents = {state.batch, impl_->graph.num_query_heads, kAny, impl_->graph.head_dim},
                .dtypes = {DType::f32, DType::f16, DType::bf16},
                .device = impl_->graph.device});
  impl_->add_tokens("update_rows", layer, queries, keys, {}, options, stream);
}

void GraphManager::update_novelty(std::int64_t layer, const ConstTensorView& keys, Stream stream) {
  LayerState& state = impl_->layer_state("update_novelty", layer);
  if (!impl_->walk.needs_novelty()) {
    throw_invalid("update_novelty", "the walk", "one with a novelty population", "one without");
  }
  impl_->check_keys("update_novelty", keys, state, state.length);
  impl_->backend->update_novelty(layer, keys, stream);
  if (!impl_->backend->is_recording(stream)) state.has_novelty = true;
}

void GraphManager::walk(std::int64_t layer, std::span<const std::uint8_t> sequences, Stream stream,
                        bool beside) {
  impl_->renew("walk", layer, sequences, impl_->walking, impl_->exact, beside, stream);
}

void GraphManager::solve(std::int64_t layer, std::span<const std::uint8_t> sequences, Stream stream,
                         bool beside) {
  impl_->renew("solve", layer, sequences, {}, impl_->all, beside, stream);
}

void GraphManager::update_and_step(std::int64_t layer, const ConstTensorView& query,
                                   const ConstTensorView& keys, const ConstTensorView& slots,
                                   const ScoreOptions& options, Stream stream) {
  update(layer, query, keys, slots, options, stream);
  if (impl_->walk.needs_novelty()) update_novelty(layer, keys, stream);
  walk(layer, {}, stream);
}

void GraphManager::scores(std::int64_t layer, int population, const TensorView& out,
                          Stream stream) const {
  const LayerState& state = impl_->layer_state("scores", layer);
  impl_->check_population("scores", population, -1);
  impl_->check_slot_table("scores", "out", DType::f32, out, state, state.length, true);
  impl_->backend->scores(layer, population, out, stream);
}

void GraphManager::visits(std::int64_t layer, int population, const TensorView& out,
                          Stream stream) const {
  const LayerState& state = impl_->layer_state("visits", layer);
  impl_->check_population("visits", population, 0);
  impl_->check_slot_table("visits", "out", DType::u32, out, state, state.length, true);
  impl_->backend->visits(layer, population, out, stream);
}

bool GraphManager::is_full(std::int64_t layer, const EvictionConfig& eviction) const {
  const auto marks = impl_->plan_cut("is_full", layer, eviction, false).cut;
  return std::any_of(marks.begin(), marks.end(), [](std::uint8_t mark) { return mark != 0; });
}

std::vector<std::uint8_t> GraphManager::full_sequences(std::int64_t layer,
                                                       const EvictionConfig& eviction,
                                                       bool force) const {
  return impl_->plan_cut("full_sequences", layer, eviction, force).cut;
}

std::int64_t GraphManager::kept_length(std::int64_t layer, const EvictionConfig& eviction,
                                       bool force) const {
  return impl_->plan_cut("kept_length", layer, eviction, force).kept_length;
}

std::vector<std::int64_t> GraphManager::kept_counts(std::int64_t layer,
                                                    const EvictionConfig& eviction,
                                                    bool force) const {
  const detail::CutArgs args = impl_->plan_cut("kept_counts", layer, eviction, force);
  const LayerState& state = impl_->layer_state("kept_counts", layer);
  const bool alike = eviction.head_budgets.empty() && state.holds_alike();
  std::vector<std::int64_t> kept;
  for (std::int64_t b = 0; b < state.batch; ++b) {
    const auto held = state.held_by(b);
    const bool cut = args.cut[static_cast<std::size_t>(b)] != 0;
    for (std::size_t g = 0; g < held.size() && (g == 0 || !alike); ++g) {
      kept.push_back(impl_->kept_by(cut, held[g], args.budgets[g]));
    }
  }
  return kept;
}

void GraphManager::select(std::int64_t layer, const EvictionConfig& eviction, bool force,
                          const TensorView& out, Stream stream) const {
  const detail::CutArgs args = impl_->plan_cut("select", layer, eviction, force);
  const LayerState& state = impl_->layer_state("select", layer);
  impl_->check_slot_table("select", "out", DType::i32, out, state, args.kept_length, true);
  impl_->backend->select(layer, args, out, stream);
}

void GraphManager::safety_mask(std::int64_t layer, const EvictionConfig& eviction,
                               double top_fraction, const TensorView& out, Stream stream) const {
  const LayerState& state = impl_->layer_state("safety_mask", layer);
  eviction.validate();
  if (!(top_fraction >= 0.0 && top_fraction <= 1.0)) {
    throw_invalid("safety_mask", "top_fraction", "in [0, 1]", std::to_string(top_fraction));
  }
  impl_->check_slot_table("safety_mask", "out", DType::u8, out, state, state.length, true);
  impl_->backend->safety_mask(layer, eviction, top_fraction, out, stream);
}

void GraphManager::compact(std::int64_t layer, const ConstTensorView& keep, const TensorView& keys,
                           const TensorView& values, Stream stream,
                           std::span<const std::int64_t> kept) {
  LayerState& state = impl_->layer_state("compact", layer);
  impl_->require_even("compact", "the layer", state);
  const auto check_moved = [&](std::string_view name, const TensorView& view) {
    if (view.empty()) return;
    check_tensor(
        view, {.operation = "compact",
               .name = name,
               .axes = "(B, Hkv, S, D)",
               .extents = {state.batch, impl_->graph.num_kv_heads, kAny, kAny},
               .dtypes = {DType::f32, DType::f16, DType::bf16, DType::i32, DType::u32, DType::u8},
               .device = impl_->graph.device,
               .unit_last_stride = true,
               .writable = true});
    if (view.size(2) < state.length) {
      throw_invalid("compact", std::string(name) + "' number of slots",
                    "at least " + std::to_string(state.length), std::to_string(view.size(2)));
    }
  };
  check_moved("keys", keys);
  check_moved("values", values);
  const auto counts = impl_->check_keep("compact", layer, keep, kept, stream);
  impl_->backend->compact(layer, keep, keys, values, stream);
  if (impl_->backend->is_recording(stream)) return;
  impl_->book_kept(state, counts);
  state.length = keep.size(2);
}

void GraphManager::release(std::int64_t layer, const ConstTensorView& keep, Stream stream,
                           std::span<const std::int64_t> kept) {
  LayerState& state = impl_->layer_state("release", layer);
  const auto counts = impl_->check_keep("release", layer, keep, kept, stream);
  impl_->backend->release(layer, keep, stream);
  if (impl_->backend->is_recording(stream)) return;
  impl_->book_kept(state, counts);
  state.ordered = false;
}

void GraphManager::next_slots(std::int64_t layer, const TensorView& out, Stream stream) const {
  const LayerState& state = impl_->layer_state("next_slots", layer);
  check_tensor(out, {.operation = "next_slots",
                     .name = "out",
                     .axes = "(B, Hkv)",
                     .extents = {state.batch, impl_->graph.num_kv_heads},
                     .dtypes = {DType::i32},
                     .device = impl_->graph.device,
                     .unit_last_stride = false,
                     .writable = true});
  impl_->backend->next_slots(layer, out, stream);
}

void GraphManager::place(std::int64_t layer, const ConstTensorView& new_keys,
                         const ConstTensorView& new_values, const TensorView& keys,
                         const TensorView& values, const TensorView& slots, Stream stream) const {
  const LayerState& state = impl_->layer_state("place", layer);
  const std::int64_t heads = impl_->graph.num_kv_heads;
  const auto check_pair = [&](std::string_view name, std::string_view of, const auto& added,
                              const TensorView& held, std::int64_t slots_of_both) {
    check_tensor(
        held, {.operation = "place",
               .name = name,
               .axes = impl_->cache_axes(state),
               .extents = {state.batch, impl_->cache_heads(state), slots_of_both, kAny},
               .dtypes = {DType::f32, DType::f16, DType::bf16, DType::i32, DType::u32, DType::u8},
               .device = impl_->graph.device,
               .unit_last_stride = true,
               .writable = true});
    check_tensor(added, {.operation = "place",
                         .name = of,
                         .axes = "(B, Hkv, D)",
                         .extents = {state.batch, heads, held.size(3)},
                         .dtypes = {held.dtype},
                         .device = impl_->graph.device,
                         .unit_last_stride = true});
  };
  check_pair("keys", "new_keys", new_keys, keys, kAny);
  detail::check_slots("place", "keys", keys, impl_->cache_slots(state, 0));
  check_pair("values", "new_values", new_values, values, keys.size(2));
  check_tensor(slots, {.operation = "place",
                       .name = "slots",
                       .axes = "(B, Hkv)",
                       .extents = {state.batch, heads},
                       .dtypes = {DType::i32},
                       .device = impl_->graph.device,
                       .unit_last_stride = false,
                       .writable = true});
  impl_->backend->place(layer,
                        {.new_keys = new_keys,
                         .new_values = new_values,
                         .keys = keys,
                         .values = values,
                         .slots = slots},
                        stream);
}

void GraphManager::truncate(std::int64_t layer, std::int64_t count) {
  std::vector<detail::TruncatePlan> plans;
  impl_->for_layers("truncate", layer, [&](std::int64_t l) {
    check_range("truncate", "count", count, 0, impl_->layers[static_cast<std::size_t>(l)].length);
    plans.push_back(impl_->backend->plan_truncate(l, count));
  });
  std::size_t next = 0;
  impl_->for_layers("truncate", layer, [&](std::int64_t l) {
    LayerState& state = impl_->layers[static_cast<std::size_t>(l)];
    const detail::TruncatePlan& plan = plans[next++];
    impl_->backend->truncate(l, plan);
    state.length = plan.length;
    const auto graphs = static_cast<std::size_t>(graphs_per_sequence());
    for (std::size_t i = 0; i < state.held.size(); ++i) state.held[i] -= plan.dropped[i / graphs];
    for (std::size_t b = 0; b < plan.dropped.size(); ++b) {
      state.seen[b] -= plan.dropped[b];
      if (state.walked_at[b] > state.seen[b]) state.walked_at[b] = -1;
    }
  });
}

void GraphManager::select_batch(std::int64_t layer, std::span<const std::int64_t> sequences) {
  check_range("select_batch", "the number of sequences",
              static_cast<std::int64_t>(sequences.size()), 1, 1 << 20);
  impl_->for_layers("select_batch", layer, [&](std::int64_t l) {
    const LayerState& state = impl_->layers[static_cast<std::size_t>(l)];
    for (const std::int64_t sequence : sequences) {
      check_range("select_batch", "sequence", sequence, 0, state.batch - 1);
    }
  });
  impl_->for_layers("select_batch", layer, [&](std::int64_t l) {
    LayerState& state = impl_->layers[static_cast<std::size_t>(l)];
    impl_->backend->resize(l, state.capacity, state.rooms, sequences);
    const std::int64_t graphs = graphs_per_sequence();
    const auto select = [&](auto& entries, std::int64_t each) {
      const auto old = std::move(entries);
      entries.clear();
      for (const std::int64_t sequence : sequences) {
        const auto first = old.begin() + sequence * each;
        entries.insert(entries.end(), first, first + each);
      }
    };
    select(state.seen, 1);
    select(state.walked_at, 1);
    select(state.walk_block, 1);
    select(state.held, graphs);
    state.batch = static_cast<std::int64_t>(sequences.size());
  });
}

void GraphManager::reset(std::int64_t layer, std::optional<std::int64_t> sequence) {
  impl_->for_layers("reset", layer, [&](std::int64_t l) {
    if (!sequence) return;
    check_range("reset", "sequence", *sequence, 0,
                impl_->layers[static_cast<std::size_t>(l)].batch - 1);
  });
  if (layer == kAllLayers && !sequence) impl_->backend->recover();
  impl_->for_layers("reset", layer, [&](std::int64_t l) {
    LayerState& state = impl_->layers[static_cast<std::size_t>(l)];
    for (std::int64_t b = 0; b < state.batch; ++b) {
      if (sequence && *sequence != b) continue;
      impl_->backend->reset(l, b);
      const auto i = static_cast<std::size_t>(b);
      state.seen[i] = 0;
      state.walked_at[i] = -1;
      std::fill_n(state.held.begin() + b * graphs_per_sequence(), graphs_per_sequence(), 0);
    }
    if (std::all_of(state.held.begin(), state.held.end(), [](auto held) { return held == 0; })) {
      state.length = 0;
      state.was_divided = false;
      state.ordered = !state.divided();
      state.has_novelty = false;
    }
  });
}

void GraphManager::reserve(std::int64_t layer, std::int64_t capacity) {
  impl_->for_layers("reserve", layer, [&](std::int64_t l) {
    check_range("reserve", "capacity", capacity, impl_->layers[static_cast<std::size_t>(l)].length,
                std::numeric_limits<std::int32_t>::max());
  });
  impl_->for_layers("reserve", layer, [&](std::int64_t l) { impl_->resize(l, capacity, {}); });
}

void GraphManager::divide(std::int64_t layer, std::span<const std::int64_t> rooms) {
  const LayerState& state = impl_->layer_state("divide", layer);
  const std::int64_t heads = impl_->graph.num_kv_heads;
  if (impl_->graph.scope != GraphScope::head) {
    throw_invalid("divide", "the graphs", "one a head", "one that the heads of a layer share");
  }
  if (std::cmp_not_equal(rooms.size(), heads)) {
    throw_invalid("divide", "the number of rooms", std::to_string(heads),
                  std::to_string(rooms.size()));
  }
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  const std::vector<std::int64_t> taken = impl_->backend->taken_slots(layer);
  std::int64_t pool = 0;
  for (std::size_t g = 0; g < rooms.size(); ++g) {
    check_range("divide", "the room of head " + std::to_string(g), rooms[g], taken[g], kMost);
    pool += rooms[g];
  }
  check_range("divide", "all rooms together", pool, 0, kMost);
  check_range("divide", "the largest room", *std::max_element(rooms.begin(), rooms.end()),
              state.length, kMost);
  impl_->resize(layer, *std::max_element(rooms.begin(), rooms.end()), {rooms.begin(), rooms.end()});
}

void GraphManager::synchronize() const { impl_->backend->synchronize(); }

void GraphManager::refresh() {
  for (std::int64_t l = 0; l < impl_->graph.num_layers; ++l) {
    impl_->backend->refresh(l, impl_->layers[static_cast<std::size_t>(l)]);
  }
}

const GraphConfig& GraphManager::graph_config() const noexcept { return impl_->graph; }
const WalkConfig& GraphManager::walk_config() const noexcept { return impl_->walk; }

std::int64_t GraphManager::length(std::int64_t layer) const {
  return impl_->layer_state("length", layer).length;
}
std::int64_t GraphManager::capacity(std::int64_t layer) const {
  return impl_->layer_state("capacity", layer).capacity;
}
std::int64_t GraphManager::batch_size(std::int64_t layer) const {
  return impl_->layer_state("batch_size", layer).batch;
}
std::int64_t GraphManager::graphs_per_sequence() const noexcept { return graphs_of(impl_->graph); }

std::int64_t GraphManager::tokens_seen(std::int64_t layer, std::int64_t sequence) const {
  const LayerState& state = impl_->layer_state("tokens_seen", layer);
  check_range("tokens_seen", "sequence", sequence, 0, state.batch - 1);
  return state.seen[static_cast<std::size_t>(sequence)];
}
std::int64_t GraphManager::tokens_held(std::int64_t layer, std::int64_t sequence) const {
  const LayerState& state = impl_->layer_state("tokens_held", layer);
  check_range("tokens_held", "sequence", sequence, 0, state.batch - 1);
  return state.most_held(sequence);
}
std::span<const std::int64_t> GraphManager::rooms(std::int64_t layer) const {
  return impl_->layer_state("rooms", layer).rooms;
}
std::int64_t GraphManager::tokens_walked(std::int64_t layer, std::int64_t sequence) const {
  const LayerState& state = impl_->layer_state("tokens_walked", layer);
  check_range("tokens_walked", "sequence", sequence, 0, state.batch - 1);
  return state.walked_at[static_cast<std::size_t>(sequence)];
}

void GraphManager::positions(std::int64_t layer, const TensorView& out, Stream stream) const {
  const LayerState& state = impl_->layer_state("positions", layer);
  impl_->check_slot_table("positions", "out", DType::i32, out, state, state.length, true);
  impl_->backend->positions(layer, out, stream);
}

void GraphManager::rows(std::int64_t layer, const TensorView& neighbors,
                        const TensorView& probabilities, Stream stream) const {
  const LayerState& state = impl_->layer_state("rows", layer);
  impl_->check_row_table("rows", "neighbors", DType::i32, neighbors, state, state.length, true);
  impl_->check_row_table("rows", "probabilities", DType::f32, probabilities, state, state.length,
                         true);
  impl_->backend->rows(layer, neighbors, probabilities, stream);
}

void GraphManager::load_rows(std::int64_t layer, const ConstTensorView& positions,
                             const ConstTensorView& neighbors, const ConstTensorView& probabilities,
                             Stream stream) {
  LayerState& state = impl_->layer_state("load_rows", layer);
  impl_->require_even("load_rows", "the layer", state);
  check_tensor(positions, {.operation = "load_rows",
                           .name = "positions",
                           .axes = "(B, G, S)",
                           .extents = {state.batch, graphs_per_sequence(), kAny},
                           .dtypes = {DType::i32},
                           .device = impl_->graph.device});
  const std::int64_t slots = positions.size(2);
  check_range("load_rows", "positions' number of slots", slots, 0, state.capacity);
  impl_->check_row_table("load_rows", "neighbors", DType::i32, neighbors, state, slots, false);
  impl_->check_row_table("load_rows", "probabilities", DType::f32, probabilities, state, slots,
                         false);
  detail::LoadResult result =
      impl_->backend->load_rows(layer, positions, neighbors, probabilities, stream);
  state.length = slots;
  state.seen = std::move(result.seen);
  state.held = std::move(result.held);
  state.ordered = result.ordered;
  state.has_novelty = false;
  std::fill(state.walked_at.begin(), state.walked_at.end(), -1);
}

void GraphManager::load_restart_weights(std::int64_t layer, const ConstTensorView& weights,
                                        Stream stream) {
  LayerState& state = impl_->layer_state("load_restart_weights", layer);
  impl_->require_even("load_restart_weights", "the layer", state);
  if (!impl_->walk.needs_novelty()) {
    throw_invalid("load_restart_weights", "the walk", "one with a novelty population",
                  "one without");
  }
  check_tensor(weights, {.operation = "load_restart_weights",
                         .name = "weights",
                         .axes = "(B, G, S)",
                         .extents = {state.batch, graphs_per_sequence(), state.length},
                         .dtypes = {DType::u32},
                         .device = impl_->graph.device,
                         .unit_last_stride = true});
  impl_->backend->load_restart_weights(layer, weights, stream);
  state.has_novelty = true;
}

void GraphManager::restart_distribution(std::int64_t layer, int population, const TensorView& out,
                                        Stream stream) const {
  const LayerState& state = impl_->layer_state("restart_distribution", layer);
  impl_->check_population("restart_distribution", population, 0);
  check_tensor(out, {.operation = "restart_distribution",
                     .name = "out",
                     .axes = "(B, G, S)",
                     .extents = {state.batch, graphs_per_sequence(), state.length},
                     .dtypes = {DType::f32},
                     .device = impl_->graph.device,
                     .unit_last_stride = true,
                     .writable = true});
  impl_->check_walk("restart_distribution", layer, {});
  impl_->backend->restart_distribution(layer, population, out, stream);
}

std::vector<std::uint8_t> GraphManager::save_layer(std::int64_t layer) const {
  impl_->layer_state("save_layer", layer);
  return impl_->backend->save_layer(layer);
}

void GraphManager::load_layer(std::int64_t layer, std::span<const std::uint8_t> saved) {
  LayerState& state = impl_->layer_state("load_layer", layer);
  state = impl_->backend->load_layer(layer, saved);
}

Statistics GraphManager::statistics() const {
  Statistics statistics = impl_->statistics;
  const detail::BackendStatistics counted = impl_->backend->statistics();
  statistics.rows_written = counted.rows_written;
  statistics.rows_nonfinite = counted.rows_nonfinite;
  return statistics;
}

MemoryUse GraphManager::memory_use() const { return impl_->backend->memory_use(); }

namespace detail {

WalkerRange walkers_of(const WalkConfig& walk, int population) {
  WalkerRange range;
  for (int p = 0; p <= population; ++p) {
    range.first += range.count;
    const bool last = p + 1 == static_cast<int>(walk.populations.size());
    // A share of 0.3 times 10 walkers must not become 2 by rounding in binary.
    const double share = walk.populations[static_cast<std::size_t>(p)].share;
    range.count = last ? walk.num_walkers - range.first
                       : static_cast<std::int64_t>(
                             std::floor(share * static_cast<double>(walk.num_walkers) + 1e-9));
  }
  return range;
}

std::vector<int> populations_of(const WalkConfig& walk, Solver solver) {
  std::vector<int> numbers;
  for (std::size_t p = 0; p < walk.populations.size(); ++p) {
    if (walk.populations[p].solver == solver) numbers.push_back(static_cast<int>(p));
  }
  return numbers;
}

bool needs_visits(const WalkConfig& walk) {
  constexpr std::int64_t kExactCounts = std::int64_t{1}
                                        << 24;  // f32 holds every integer up to here
  bool accumulates = false;
  for (int p = 0; p < static_cast<int>(walk.populations.size()); ++p) {
    accumulates = accumulates || decay_of(walk, p) != 0.0;
  }
  return accumulates || walk.num_walkers * walk.walk_length > kExactCounts;
}

std::int64_t first_recent_position(const Population& population, std::int64_t seen,
                                   std::int64_t num_sinks) {
  const std::int64_t by_fraction = std::max<std::int64_t>(
      1, static_cast<std::int64_t>(
             std::floor(population.recent_fraction * static_cast<double>(seen) + 1e-9)));
  const std::int64_t tokens = population.recent_tokens > 0 ? population.recent_tokens : by_fraction;
  return std::max(num_sinks, seen - tokens);
}

}  // namespace detail
}  // namespace spectralkv
