// GraphManager and Monitor as the suites use them: on the device under test, with tensors in host
// memory.
//
// In namespace spectralkv::test these names hide those of the library. Calls with tensors go
// through a DeviceCall; a caller's stream is replaced by the call's own.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "device.h"
#include "spectralkv/attention.h"
#include "spectralkv/graph_manager.h"
#include "spectralkv/monitor.h"
#include "tensors.h"

namespace spectralkv::test {

class GraphManager {
 public:
  GraphManager(const GraphConfig& graph, const WalkConfig& walk)
      : owned_(std::make_unique<spectralkv::GraphManager>(on_tested_device(graph), walk)),
        manager_(owned_.get()) {}
  /// One that somebody else owns, on its own device.
  explicit GraphManager(spectralkv::GraphManager& manager) : manager_(&manager) {}

  void update(Index layer, const ConstTensorView& query, const ConstTensorView& keys,
              const ConstTensorView& slots, const ScoreOptions& options, Stream) {
    DeviceCall on(device());
    manager_->update(layer, on(query), on(keys), on(slots), options, on.stream());
  }
  void attend(Index layer, const ConstTensorView& query, const ConstTensorView& keys,
              const ConstTensorView& values, const ConstTensorView& slots, const TensorView& out,
              const ScoreOptions& options, Stream) {
    DeviceCall on(device());
    manager_->attend(layer, on(query), on(keys), on(values), on(slots), on(out), options,
                     on.stream());
  }
  void update_rows(Index layer, const ConstTensorView& queries, const ConstTensorView& keys,
                   const RowOptions& options, Stream) {
    DeviceCall on(device());
    RowOptions same = options;
    same.valid = on(options.valid);
    manager_->update_rows(layer, on(queries), on(keys), same, on.stream());
  }
  void update_novelty(Index layer, const ConstTensorView& keys, Stream) {
    DeviceCall on(device());
    manager_->update_novelty(layer, on(keys), on.stream());
  }
  void walk(Index layer, std::span<const std::uint8_t> sequences, Stream) {
    manager_->walk(layer, sequences, DeviceCall(device()).stream());
  }
  void solve(Index layer, std::span<const std::uint8_t> sequences, Stream) {
    manager_->solve(layer, sequences, DeviceCall(device()).stream());
  }
  void update_and_step(Index layer, const ConstTensorView& query, const ConstTensorView& keys,
                       const ConstTensorView& slots, const ScoreOptions& options, Stream) {
    DeviceCall on(device());
    manager_->update_and_step(layer, on(query), on(keys), on(slots), options, on.stream());
  }
  void scores(Index layer, int population, const TensorView& out, Stream) const {
    DeviceCall on(device());
    manager_->scores(layer, population, on(out), on.stream());
  }
  void visits(Index layer, int population, const TensorView& out, Stream) const {
    DeviceCall on(device());
    manager_->visits(layer, population, on(out), on.stream());
  }

  bool is_full(Index layer, const EvictionConfig& eviction) const {
    return manager_->is_full(layer, eviction);
  }
  std::vector<std::uint8_t> full_sequences(Index layer, const EvictionConfig& eviction) const {
    return manager_->full_sequences(layer, eviction);
  }
  Index kept_length(Index layer, const EvictionConfig& eviction, bool force) const {
    return manager_->kept_length(layer, eviction, force);
  }
  std::vector<Index> kept_counts(Index layer, const EvictionConfig& eviction, bool force) const {
    return manager_->kept_counts(layer, eviction, force);
  }
  void select(Index layer, const EvictionConfig& eviction, bool force, const TensorView& out,
              Stream) const {
    DeviceCall on(device());
    manager_->select(layer, eviction, force, on(out), on.stream());
  }
  void safety_mask(Index layer, const EvictionConfig& eviction, double top_fraction,
                   const TensorView& out, Stream) const {
    DeviceCall on(device());
    manager_->safety_mask(layer, eviction, top_fraction, on(out), on.stream());
  }
  void compact(Index layer, const ConstTensorView& keep, const TensorView& keys,
               const TensorView& values, Stream, std::span<const Index> kept = {}) {
    DeviceCall on(device());
    manager_->compact(layer, on(keep), on(keys), on(values), on.stream(), kept);
  }
  void release(Index layer, const ConstTensorView& keep, Stream, std::span<const Index> kept = {}) {
    DeviceCall on(device());
    manager_->release(layer, on(keep), on.stream(), kept);
  }
  void next_slots(Index layer, const TensorView& out, Stream) const {
    DeviceCall on(device());
    manager_->next_slots(layer, on(out), on.stream());
  }

  void place(Index layer, const ConstTensorView& new_keys, const ConstTensorView& new_values,
             const TensorView& keys, const TensorView& values, const TensorView& slots,
             Stream) const {
    DeviceCall on(device());
    manager_->place(layer, on(new_keys), on(new_values), on(keys), on(values), on(slots),
                    on.stream());
  }

  void truncate(Index layer, Index count) { manager_->truncate(layer, count); }
  void select_batch(Index layer, std::span<const Index> sequences) {
    manager_->select_batch(layer, sequences);
  }
  void reset(Index layer, std::optional<Index> sequence = std::nullopt) {
    manager_->reset(layer, sequence);
  }
  void reserve(Index layer, Index capacity) { manager_->reserve(layer, capacity); }
  void divide(Index layer, std::span<const Index> rooms) { manager_->divide(layer, rooms); }
  void synchronize() const { manager_->synchronize(); }
  void refresh() { manager_->refresh(); }

  const GraphConfig& graph_config() const { return manager_->graph_config(); }
  const WalkConfig& walk_config() const { return manager_->walk_config(); }
  Index length(Index layer) const { return manager_->length(layer); }
  Index capacity(Index layer) const { return manager_->capacity(layer); }
  std::span<const Index> rooms(Index layer) const { return manager_->rooms(layer); }
  Index batch_size(Index layer) const { return manager_->batch_size(layer); }
  Index graphs_per_sequence() const { return manager_->graphs_per_sequence(); }
  Index tokens_seen(Index layer, Index sequence) const {
    return manager_->tokens_seen(layer, sequence);
  }
  Index tokens_held(Index layer, Index sequence) const {
    return manager_->tokens_held(layer, sequence);
  }
  Index tokens_walked(Index layer, Index sequence) const {
    return manager_->tokens_walked(layer, sequence);
  }
  void positions(Index layer, const TensorView& out, Stream) const {
    DeviceCall on(device());
    manager_->positions(layer, on(out), on.stream());
  }
  void rows(Index layer, const TensorView& neighbors, const TensorView& probabilities,
            Stream) const {
    DeviceCall on(device());
    manager_->rows(layer, on(neighbors), on(probabilities), on.stream());
  }
  void load_rows(Index layer, const ConstTensorView& positions, const ConstTensorView& neighbors,
                 const ConstTensorView& probabilities, Stream = {}) {
    DeviceCall on(device());
    manager_->load_rows(layer, on(positions), on(neighbors), on(probabilities), on.stream());
  }
  void load_restart_weights(Index layer, const ConstTensorView& weights, Stream = {}) {
    DeviceCall on(device());
    manager_->load_restart_weights(layer, on(weights), on.stream());
  }
  std::vector<std::uint8_t> save_layer(Index layer) const { return manager_->save_layer(layer); }
  void load_layer(Index layer, std::span<const std::uint8_t> saved) {
    manager_->load_layer(layer, saved);
  }
  void restart_distribution(Index layer, int population, const TensorView& out, Stream) const {
    DeviceCall on(device());
    manager_->restart_distribution(layer, population, on(out), on.stream());
  }
  Statistics statistics() const { return manager_->statistics(); }
  MemoryUse memory_use() const { return manager_->memory_use(); }

 private:
  Device device() const { return manager_->graph_config().device; }

  std::unique_ptr<spectralkv::GraphManager> owned_;
  spectralkv::GraphManager* manager_;
};

inline void decode_attention(const ConstTensorView& query, const ConstTensorView& keys,
                             const ConstTensorView& values, const ConstTensorView& positions,
                             Index length, const TensorView& out, const ScoreOptions& options) {
  const Device device = on_tested_device({}).device;
  DeviceCall on(device);
  spectralkv::decode_attention(on(query), on(keys), on(values), on(positions), length, on(out),
                               options, device, on.stream());
}

class Monitor {
 public:
  Monitor(const GraphConfig& graph, const WalkConfig& walk, const MonitorConfig& monitor)
      : monitor_(std::make_unique<spectralkv::Monitor>(on_tested_device(graph), walk, monitor)),
        graph_(monitor_->graph()) {}

  void on_prefill(Index layer, const ConstTensorView& queries, const ConstTensorView& keys,
                  const ScoreOptions& options, const ConstTensorView& valid, Stream) {
    DeviceCall on(device());
    monitor_->on_prefill(layer, on(queries), on(keys), options, on(valid), on.stream());
  }
  void on_prefill_end(Index layer, const ConstTensorView& keys, Stream) {
    DeviceCall on(device());
    monitor_->on_prefill_end(layer, on(keys), on.stream());
  }
  void on_step(Index layer, const ConstTensorView& query, const ConstTensorView& keys,
               const ConstTensorView& slots, const ScoreOptions& options, Stream) {
    DeviceCall on(device());
    monitor_->on_step(layer, on(query), on(keys), on(slots), options, on.stream());
  }
  void renew_due(Index layer, const ConstTensorView& keys, Stream) {
    DeviceCall on(device());
    monitor_->renew_due(layer, on(keys), on.stream());
  }
  void on_finish(Index sequence) { monitor_->on_finish(sequence); }
  bool is_full(Index layer) const { return monitor_->is_full(layer); }
  Index kept_length(Index layer) const { return monitor_->kept_length(layer); }
  void set_head_budgets(Index layer, std::vector<Index> budgets) {
    monitor_->set_head_budgets(layer, std::move(budgets));
  }
  void keep(Index layer, const ConstTensorView& keys, const TensorView& out, Stream) {
    DeviceCall on(device());
    monitor_->keep(layer, on(keys), on(out), on.stream());
  }
  void safety_mask(Index layer, const TensorView& out, Stream) const {
    DeviceCall on(device());
    monitor_->safety_mask(layer, on(out), on.stream());
  }
  const MonitorConfig& config() const { return monitor_->config(); }
  GraphManager& graph() { return graph_; }
  const GraphManager& graph() const { return graph_; }

 private:
  Device device() const { return graph_.graph_config().device; }

  std::unique_ptr<spectralkv::Monitor> monitor_;
  GraphManager graph_;
};

}  // namespace spectralkv::test
