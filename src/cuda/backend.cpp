// The CUDA backend: queues work and keeps its order. What a stage does stands in its kernels.
#include "backend.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numbers>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cpu/layer.h"
#include "cuda/cuda_check.h"
#include "cuda/cuda_device.h"
#include "cuda/device_memory.h"
#include "cuda/fault.h"
#include "cuda/kernels.h"
#include "cuda/layer.h"
#include "cuda/layer_memory.h"
#include "cuda/stream_order.h"
#include "spectralkv/error.h"
#include "validate.h"

namespace spectralkv::detail {
namespace {

using cuda::check;
using cuda::DeviceGuard;
using cuda::FaultRecord;
using cuda::LayerCounters;
using cuda::LayerMemory;
using cuda::LayerView;
using cuda::Memory;
using cuda::SequenceCounters;
using cuda::SequenceMarks;
using cuda::StreamOrder;
using cuda::TableView;
using cuda::TokensView;

cudaStream_t handle_of(Stream stream) { return static_cast<cudaStream_t>(stream.handle); }

/// `first_slots`: of a LayerView, where the view has the slots of the layer's heads.
TokensView tokens_of(const ConstTensorView& view, const std::int32_t* first_slots = nullptr) {
  return {.data = view.data,
          .dtype = view.dtype,
          .sequence_stride = view.stride(0),
          .head_stride = first_slots == nullptr ? view.stride(1) : 0,
          .token_stride = view.rank > 3 ? view.stride(2) : 0,
          .first_slots = first_slots};
}

template <class T, class Pointer>
TableView<T> table_of(const BasicTensorView<Pointer>& view) {
  return {.data = static_cast<T*>(view.data),
          .sequence_stride = view.stride(0),
          .head_stride = view.stride(1),
          .slot_stride = view.rank > 2 ? view.stride(2) : 0};
}

cuda::AttendArgs attend_args(const cuda::UpdateArgs& update, const AttendedViews& attended) {
  return {.update = update,
          .values = tokens_of(attended.values, update.keys.first_slots),
          .out = table_of<void>(attended.out)};
}

/// Whether the current device can attend with these shapes.
void check_attend_shape(std::string_view operation, std::int64_t group, std::int64_t head_dim) {
  check_range(operation, "head_dim on CUDA", head_dim, 1, cuda::kMostAttendDim);
  if (cuda::attend_fits(group, head_dim)) return;
  throw_invalid(operation, "the number of query heads of a KV head",
                "so small that their sums fit the device's shared memory", std::to_string(group));
}

/// Marks of sequences [first, first + SequenceMarks::kMost); no entries: all.
SequenceMarks marks_of(std::span<const std::uint8_t> entries, std::int64_t first,
                       std::int64_t batch) {
  SequenceMarks marks{};
  const std::int64_t end = std::min<std::int64_t>(batch, first + SequenceMarks::kMost);
  for (std::int64_t b = first; b < end; ++b) {
    if (!entries.empty() && entries[static_cast<std::size_t>(b)] == 0) continue;
    const auto bit = static_cast<std::uint32_t>(b - first);
    marks.bits[bit / 32U] |= 1U << (bit % 32U);
  }
  return marks;
}

cuda::PopulationList list_of(std::span<const int> populations) {
  cuda::PopulationList list{.count = static_cast<std::int32_t>(populations.size()), .numbers = {}};
  std::copy(populations.begin(), populations.end(), list.numbers);
  return list;
}

/// A copy of a (B, G, S, ...) tensor in host memory.
class HostCopy {
 public:
  HostCopy(const ConstTensorView& view, cudaStream_t stream) : view_(view) {
    const std::int64_t width = view.rank == 4 ? view.size(3) : 1;
    const std::int64_t element = size_of(view.dtype);
    const std::int64_t slots = view.size(2);
    bytes_.resize(static_cast<std::size_t>(view.size(0) * view.size(1) * slots * width * element));
    std::byte* to = bytes_.data();
    for (std::int64_t b = 0; b < view.size(0); ++b) {
      for (std::int64_t g = 0; g < view.size(1); ++g) {
        const auto* from = static_cast<const std::byte*>(view.data) +
                           (b * view.stride(0) + g * view.stride(1)) * element;
        copy(to, from, slots, width * element, view.stride(2) * element, stream);
        to += slots * width * element;
      }
    }
    view_.data = bytes_.data();
    view_.device = {};
    std::int64_t stride = 1;
    for (int axis = view.rank - 1; axis >= 0; --axis) {
      view_.strides[static_cast<std::size_t>(axis)] = stride;
      stride *= view.size(axis);
    }
  }
  HostCopy(const HostCopy&) = delete;
  HostCopy& operator=(const HostCopy&) = delete;

  const ConstTensorView& view() const { return view_; }

 private:
  static void copy(std::byte* to, const std::byte* from, std::int64_t rows, std::int64_t width,
                   std::int64_t pitch, cudaStream_t stream) {
    if (rows == 0 || width == 0) return;
    if (pitch >= width) {
      check(cudaMemcpy2DAsync(to, static_cast<std::size_t>(width), from,
                              static_cast<std::size_t>(pitch), static_cast<std::size_t>(width),
                              static_cast<std::size_t>(rows), cudaMemcpyDeviceToHost, stream),
            "cudaMemcpy2DAsync");
      return;
    }
    for (std::int64_t row = 0; row < rows; ++row) {
      check(cudaMemcpyAsync(to + row * width, from + row * pitch, static_cast<std::size_t>(width),
                            cudaMemcpyDeviceToHost, stream),
            "cudaMemcpyAsync");
    }
  }

  ConstTensorView view_;
  std::vector<std::byte> bytes_;
};

class CudaBackend final : public Backend {
 public:
  CudaBackend(const GraphConfig& graph, const WalkConfig& walk,
              const std::vector<LayerState>& states, Stream stream)
      : graph_(graph), walk_(walk), states_(states) {
    order_.use(handle_of(stream));
    const cudaStream_t own = order_.own();
    check(cudaMemsetAsync(shared_.data(), 0, static_cast<std::size_t>(shared_.bytes()), own),
          "cudaMemsetAsync");
    *reported() = {};
    layers_.reserve(states.size());
    for (std::size_t l = 0; l < states.size(); ++l) {
      layers_.emplace_back(graph_, walk_, shared(), static_cast<std::int64_t>(l), states[l].batch,
                           states[l].capacity, states[l].rooms, own);
      cuda::launch_begin_layer(layers_.back().view(), own);
    }
    scratch_ = missing_scratch(all_views(), own);
    queue_views(own);
    queue_rotary(own);
    order_.leave(own);
  }

  ~CudaBackend() override {
    try {
      const DeviceGuard guard(graph_.device.index);
      order_.synchronize();
    } catch (const Error&) {
      // A broken device has nothing left to wait for.
    }
  }
  CudaBackend(const CudaBackend&) = delete;
  CudaBackend& operator=(const CudaBackend&) = delete;

  void use_stream(Stream stream) override { order_.use(handle_of(stream)); }

  void resize(std::int64_t layer, std::int64_t capacity, std::span<const std::int64_t> rooms,
              std::span<const std::int64_t> sequences) override {
    const DeviceGuard guard(graph_.device.index);
    raise_reported("resize");
    const cudaStream_t own = order_.own();
    LayerMemory next(graph_, walk_, shared(), layer, static_cast<std::int64_t>(sequences.size()),
                     capacity, rooms, own);
    const LayerMemory& old = layers_[static_cast<std::size_t>(layer)];
    for (std::size_t b = 0; b < sequences.size(); ++b) {
      next.copy_sequence(static_cast<std::int64_t>(b), old, sequences[b], state(layer).length, own);
    }
    check(cudaMemcpyAsync(next.view().counters, old.view().counters, sizeof(LayerCounters),
                          cudaMemcpyDeviceToDevice, own),
          "cudaMemcpyAsync");
    if (!rooms.empty()) {
      std::int32_t& ordered = next.view().counters->ordered;
      check(cudaMemsetAsync(&ordered, 0, sizeof(ordered), own), "cudaMemsetAsync");
    }
    check(cudaStreamSynchronize(own), "cudaStreamSynchronize");
    replace_layer(layer, next, own);
    change(own, [&] { refresh_restart_tables(layer, capacity, own); });
  }

  bool is_recording(Stream stream) const override {
    const DeviceGuard guard(graph_.device.index);
    return StreamOrder::is_capturing(handle_of(stream));
  }

  SlotPlan plan_slots(std::string_view operation, std::int64_t layer, const ConstTensorView& slots,
                      Stream stream) const override {
    const LayerState& host = state(layer);
    if (graph_.eager_checks && !is_recording(stream)) {
      const DeviceGuard guard(graph_.device.index);
      const cudaStream_t queue = begin_beside_walk(operation, stream);
      auto* plan = scratch_.results.as<std::int64_t>(kResultTable);
      look(queue, [&] {
        cuda::launch_plan_slots(view(layer), table_of<const std::int32_t>(slots), plan, checked(),
                                queue);
      });
      order_.synchronize();
      if (checked()->fault != 0U) cuda::throw_fault(operation, *checked());
      return {.length = plan[0], .appended = plan[1] != 0};
    }
    // A head takes the slot behind all others only where it has no free one.
    bool any_full = false;
    bool all_full = true;
    for (const std::int64_t held : host.held) {
      any_full = any_full || held == host.length;
      all_full = all_full && held == host.length;
    }
    return {.length = host.length + (any_full ? 1 : 0), .appended = all_full};
  }

  std::vector<std::int64_t> update(std::int64_t layer, const UpdateArgs& args,
                                   Stream stream) override {
    const std::string_view operation = args.attends() ? "attend" : "update";
    const DeviceGuard guard(graph_.device.index);
    if (args.attends()) check_attend_shape(operation, view(layer).group, graph_.head_dim);
    const cudaStream_t queue = begin_beside_walk(operation, stream);
    const std::int64_t count = args.queries.size(2);
    std::vector<std::int64_t> added(static_cast<std::size_t>(view(layer).batch), count);
    if (view(layer).batch == 0) return added;
    if (count == 1 && args.valid.empty() && args.row_stride > 0) {
      change(queue, [&] {
        if (args.length > args.first_slot + 1) leave_gap(layer, args.length - 1, queue);
        const cuda::UpdateArgs update{.queries = tokens_of(args.queries),
                                      .keys = tokens_of(args.keys, view(layer).first_slots),
                                      .slots = args.slots.empty()
                                                   ? TableView<const std::int32_t>{}
                                                   : table_of<const std::int32_t>(args.slots),
                                      .scale = static_cast<float>(args.scale),
                                      .softcap = static_cast<float>(args.softcap)};
        const std::int64_t extent = is_recording(stream) ? view(layer).capacity : args.length;
        const std::vector<std::int64_t>& rooms = state(layer).rooms;
        if (args.attends()) {
          cuda::launch_attend(view(layer), attend_args(update, args.attended), extent, rooms,
                              queue);
        } else {
          cuda::launch_update(view(layer), update, extent,
                              cuda::plan_update(view(layer), extent, rooms), queue);
        }
      });
      return added;
    }
    refuse_recording("update_rows", stream);
    change(queue, [&] {
      update_block(layer, args, queue);
      if (args.valid.empty()) return;
      const std::vector<SequenceCounters> counters = download_sequences(layer, queue);
      for (std::size_t b = 0; b < added.size(); ++b) {
        added[b] = counters[b].seen - state(layer).seen[b];
      }
    });
    return added;
  }

  void update_novelty(std::int64_t layer, const ConstTensorView& keys, Stream stream) override {
    const DeviceGuard guard(graph_.device.index);
    const cudaStream_t queue = begin("update_novelty", stream);
    const std::int64_t extent = extent_of(layer, stream);
    if (extent == 0) return;
    change(queue, [&] {
      const cuda::RotaryView rotary{
          .revolutions = revolutions_.as<double>(),
          .pairs = static_cast<std::int32_t>(graph_.rotary.inv_freq.size()),
          .interleaved = graph_.rotary.interleaved};
      cuda::launch_novelty(view(layer), tokens_of(keys, view(layer).first_slots), rotary,
                           walk_.novelty_width, scratch_.novelty.as<float>(), extent, queue);
      refresh_restart_tables(layer, extent, queue);
    });
  }

  void renew(std::string_view operation, const RenewArgs& args, Stream stream) override {
    const DeviceGuard guard(graph_.device.index);
    const std::int64_t first = args.first;
    std::int64_t graphs = 0;
    std::int64_t most_batch = 0;
    std::int64_t most_capacity = 0;
    std::int64_t most_extent = 0;
    std::vector<RowFormat> formats;  // one, but where some graphs are too large for packed rows
    for (std::int64_t l = first; l < first + args.count; ++l) {
      const auto is_same = [&](RowFormat format) { return format == view(l).format; };
      if (std::none_of(formats.begin(), formats.end(), is_same)) formats.push_back(view(l).format);
      graphs += std::int64_t{view(l).batch} * view(l).graphs;
      most_batch = std::max<std::int64_t>(most_batch, view(l).batch);
      most_capacity = std::max(most_capacity, view(l).capacity);
      most_extent = std::max(most_extent, extent_of(l, stream));
    }
    const auto layers = static_cast<int>(args.count);
    const cuda::PopulationList walking = list_of(args.walking);
    const cuda::PopulationList exact = list_of(args.exact);
    raise_reported(operation);
    grow(scratch_.solve, cuda::solve_scratch(graphs * exact.count, most_capacity),
         is_recording(stream), operation);
    const cudaStream_t queue = begin(operation, stream);
    const auto* const live = scratch_.views.as<LayerView>() + first;
    const auto renew_layers = [&](const LayerView* views, const LayerView& one, cudaStream_t on) {
      for (const RowFormat format : formats) {
        LayerView shape = one;
        shape.format = format;
        for (std::int64_t b = 0; b < most_batch; b += SequenceMarks::kMost) {
          const SequenceMarks marks = marks_of(args.sequences, b, most_batch);
          cuda::launch_walk(views, layers, shape, rules(), walking, most_batch, most_extent, b,
                            marks, on);
          cuda::launch_solve(views, layers, shape, rules(), exact, walk_.restart_prob, most_batch,
                             most_capacity, most_extent, b, marks, scratch_.solve.data(), on);
        }
      }
    };
    if (is_recording(stream) || !args.beside) {
      change(queue, [&] { renew_layers(live, view(first), queue); });
      return;
    }
    const LayerView* const copies = live + states_.size();
    change(queue, [&] {
      for (std::int64_t b = 0; b < most_batch; b += SequenceMarks::kMost) {
        cuda::launch_begin_walk(live, copies, layers, args.blocks(walk_), most_batch, b,
                                marks_of(args.sequences, b, most_batch), queue);
      }
    });
    try {
      renew_layers(copies, layers_[static_cast<std::size_t>(first)].walk_view(),
                   order_.fork_walk(queue));
      order_.leave_walk();
    } catch (const CudaError& error) {
      broken_ = error.what();
      throw;
    }
  }

  void scores(std::int64_t layer, int population, const TensorView& out,
              Stream stream) const override {
    read("scores", layer, stream, [&](cudaStream_t queue, std::int64_t extent) {
      cuda::launch_scores(view(layer), population, table_of<float>(out), extent, queue);
    });
  }
  void visits(std::int64_t layer, int population, const TensorView& out,
              Stream stream) const override {
    read("visits", layer, stream, [&](cudaStream_t queue, std::int64_t extent) {
      cuda::launch_visits(view(layer), population, table_of<std::uint32_t>(out), extent, queue);
    });
  }

  void select(std::int64_t layer, const CutArgs& args, const TensorView& out,
              Stream stream) const override {
    if (args.kept_length == 0) return;
    cuda::SelectArgs select{.window = args.eviction.window,
                            .sinks = args.eviction.sinks,
                            .kept_length = args.kept_length,
                            .left_aligned = args.left_aligned,
                            .shares = {}};
    for (std::size_t p = 0; p < walk_.populations.size(); ++p) {
      select.shares[p] = walk_.populations[p].share;
    }
    read("select", layer, stream, [&](cudaStream_t queue, std::int64_t extent) {
      for (std::int64_t b = 0; b < view(layer).batch; b += SequenceMarks::kMost) {
        cuda::launch_select(view(layer), select, args.budgets.data(), b,
                            marks_of(args.cut, b, view(layer).batch), table_of<std::int32_t>(out),
                            scratch_.marks.as<std::int32_t>(), extent, queue);
      }
    });
  }
  void safety_mask(std::int64_t layer, const EvictionConfig& eviction, double top_fraction,
                   const TensorView& out, Stream stream) const override {
    read("safety_mask", layer, stream, [&](cudaStream_t queue, std::int64_t extent) {
      cuda::launch_safety_mask(view(layer), eviction.window, eviction.sinks, top_fraction,
                               table_of<std::uint8_t>(out), scratch_.marks.as<std::int32_t>(),
                               extent, queue);
    });
  }

  void next_slots(std::int64_t layer, const TensorView& out, Stream stream) const override {
    require_free_slots("next_slots", layer, state(layer).capacity);
    const DeviceGuard guard(graph_.device.index);
    const cudaStream_t queue = begin_beside_walk("next_slots", stream);
    look(queue, [&] {
      cuda::launch_next_slots(view(layer), table_of<std::int32_t>(out), extent_of(layer, stream),
                              queue);
    });
  }

  void place(std::int64_t layer, const PlaceArgs& args, Stream stream) const override {
    const LayerState& host = state(layer);
    require_free_slots("place", layer, host.divided() ? host.capacity : args.keys.size(2));
    const DeviceGuard guard(graph_.device.index);
    const cudaStream_t queue = begin_beside_walk("place", stream);
    look(queue, [&] {
      cuda::launch_place(view(layer),
                         {.new_keys = tokens_of(args.new_keys),
                          .new_values = tokens_of(args.new_values),
                          .keys = tokens_of(args.keys, view(layer).first_slots),
                          .values = tokens_of(args.values, view(layer).first_slots),
                          .slots = table_of<std::int32_t>(args.slots),
                          .num_slots = args.keys.size(2),
                          .key_dim = args.keys.size(3),
                          .value_dim = args.values.size(3)},
                         queue);
    });
  }

  std::vector<std::int64_t> check_keep(std::string_view operation, std::int64_t layer,
                                       const ConstTensorView& keep,
                                       std::span<const std::int64_t> kept,
                                       Stream stream) const override {
    const DeviceGuard guard(graph_.device.index);
    const cudaStream_t queue = begin(operation, stream);
    const TableView<const std::int32_t> table = table_of<const std::int32_t>(keep);
    const auto graphs = std::int64_t{view(layer).batch} * view(layer).graphs;
    const bool recording = is_recording(stream);
    const auto admit = [&](const std::int64_t* expected) {
      cuda::launch_admit_keep(view(layer), table, keep.size(2), expected,
                              scratch_.marks.as<std::int32_t>(), kept_counts(), queue);
    };
    if (recording || (!graph_.eager_checks && !kept.empty())) {
      // A replay may hold other numbers than now.
      look(queue, [&] { admit(kept.empty() || recording ? nullptr : kept.data()); });
      return kept.empty() ? state(layer).held : std::vector<std::int64_t>(kept.begin(), kept.end());
    }
    auto* counts = scratch_.results.as<std::int64_t>(kResultTable);
    std::int64_t* expected = nullptr;
    if (!kept.empty()) {
      expected = counts + graphs;
      std::copy(kept.begin(), kept.end(), expected);
    }
    look(queue, [&] {
      cuda::launch_check_keep(view(layer), table, keep.size(2), expected, counts, checked(), queue);
    });
    order_.synchronize();
    if (checked()->fault != 0U) cuda::throw_fault(operation, *checked());
    look(queue, [&] { admit(nullptr); });
    return {counts, counts + graphs};
  }

  void compact(std::int64_t layer, const ConstTensorView& keep, const TensorView& keys,
               const TensorView& values, Stream stream) override {
    const DeviceGuard guard(graph_.device.index);
    const cudaStream_t queue = begin("compact", stream);
    const LayerView& memory = view(layer);
    const std::int64_t extent = extent_of(layer, stream);
    if (extent == 0) return;
    std::vector<cuda::MoveJob> jobs;
    for (const TensorView* moved : {&keys, &values}) {
      if (moved->empty()) continue;
      const std::int64_t element = size_of(moved->dtype);
      jobs.push_back({.data = moved->data,
                      .sequence_stride = moved->stride(0) * element,
                      .row_stride = moved->stride(1) * element,
                      .slot_stride = moved->stride(2) * element,
                      .width = moved->size(3) * element,
                      .rows = memory.heads});
    }
    change(queue, [&] {
      cuda::launch_compact(memory, jobs.data(), static_cast<int>(jobs.size()),
                           table_of<const std::int32_t>(keep), keep.size(2),
                           scratch_.marks.as<std::int32_t>(), kept_counts(), queue);
      refresh_restart_tables(layer, extent, queue);
    });
  }

  void release(std::int64_t layer, const ConstTensorView& keep, Stream stream) override {
    const DeviceGuard guard(graph_.device.index);
    const cudaStream_t queue = begin("release", stream);
    change(queue, [&] {
      cuda::launch_release(view(layer), table_of<const std::int32_t>(keep), keep.size(2),
                           scratch_.marks.as<std::int32_t>(), kept_counts(),
                           extent_of(layer, stream), queue);
      refresh_restart_tables(layer, extent_of(layer, stream), queue);
    });
  }

  TruncatePlan plan_truncate(std::int64_t layer, std::int64_t count) const override {
    const DeviceGuard guard(graph_.device.index);
    raise_reported("truncate");
    const cudaStream_t own = order_.own();
    const LayerState& host = state(layer);
    const std::int64_t graphs = view(layer).batch * view(layer).graphs;
    auto* found = scratch_.results.as<std::int64_t>(kResultTable);
    auto* oldest = found + graphs;
    auto* last = oldest + graphs;
    look(own, [&] {
      cuda::launch_plan_truncate(view(layer), count, host.ordered, found, oldest, last, host.length,
                                 own);
    });
    order_.synchronize();
    TruncatePlan plan{.length = host.ordered ? host.length - count : *last + 1, .dropped = {}};
    for (std::int64_t i = 0; i < graphs; ++i) {
      const std::int64_t b = i / view(layer).graphs;
      const std::int64_t expected =
          host.ordered ? host.seen[static_cast<std::size_t>(b)] - oldest[i] : count;
      if (found[i] != expected) {
        throw_invalid("truncate", "the newest tokens of sequence " + std::to_string(b),
                      "all in the cache (" + std::to_string(expected) + ")",
                      std::to_string(found[i]) + ": some were evicted");
      }
      if (i % view(layer).graphs == 0) plan.dropped.push_back(found[i]);
    }
    return plan;
  }

  void truncate(std::int64_t layer, const TruncatePlan& plan) override {
    const DeviceGuard guard(graph_.device.index);
    const cudaStream_t own = order_.own();
    auto* dropped = scratch_.results.as<std::int64_t>(kResultTable);
    std::copy(plan.dropped.begin(), plan.dropped.end(), dropped);
    change(own, [&] {
      cuda::launch_truncate(view(layer), plan.length, dropped, state(layer).length, own);
      refresh_restart_tables(layer, state(layer).length, own);
      check(cudaStreamSynchronize(own), "cudaStreamSynchronize");
    });
  }

  std::vector<std::int64_t> taken_slots(std::int64_t layer) const override {
    const DeviceGuard guard(graph_.device.index);
    raise_reported("taken_slots");
    const cudaStream_t own = order_.own();
    auto* taken = scratch_.results.as<std::int64_t>(kResultTable);
    look(own, [&] { cuda::launch_taken_slots(view(layer), taken, own); });
    order_.synchronize();
    return {taken, taken + view(layer).graphs};
  }

  void reset(std::int64_t layer, std::int64_t sequence) override {
    const DeviceGuard guard(graph_.device.index);
    raise_reported("reset");
    const cudaStream_t own = order_.own();
    const LayerState& host = state(layer);
    bool others = false;
    for (std::int64_t b = 0; b < host.batch; ++b) {
      others = others || (b != sequence && host.most_held(b) != 0);
    }
    change(own, [&] {
      cuda::launch_reset(view(layer), sequence, others ? host.length : 0,
                         others ? host.ordered : !host.divided(), view(layer).capacity, own);
      refresh_restart_tables(layer, view(layer).capacity, own);
    });
  }

  void recover() override {
    const DeviceGuard guard(graph_.device.index);
    const cudaStream_t own = order_.own();
    look(own, [&] { cuda::launch_clear_fault(fault(), reported(), own); });
    order_.synchronize();
    broken_.clear();
  }

  void positions(std::int64_t layer, const TensorView& out, Stream stream) const override {
    read("positions", layer, stream, [&](cudaStream_t queue, std::int64_t extent) {
      cuda::launch_positions(view(layer), table_of<std::int32_t>(out), extent, queue);
    });
  }
  void rows(std::int64_t layer, const TensorView& neighbors, const TensorView& probabilities,
            Stream stream) const override {
    read("rows", layer, stream, [&](cudaStream_t queue, std::int64_t extent) {
      cuda::launch_rows(view(layer), table_of<std::int32_t>(neighbors),
                        table_of<float>(probabilities), extent, queue);
    });
  }

  LoadResult load_rows(std::int64_t layer, const ConstTensorView& positions,
                       const ConstTensorView& neighbors, const ConstTensorView& probabilities,
                       Stream stream) override;
  std::vector<std::uint8_t> save_layer(std::int64_t layer) const override;
  LayerState load_layer(std::int64_t layer, std::span<const std::uint8_t> saved) override;

  void load_restart_weights(std::int64_t layer, const ConstTensorView& weights,
                            Stream stream) override {
    read("load_restart_weights", layer, stream, [&](cudaStream_t queue, std::int64_t extent) {
      const LayerView& memory = view(layer);
      constexpr std::int64_t kWord = 4;
      for (std::int64_t b = 0; b < memory.batch; ++b) {
        for (std::int64_t g = 0; g < memory.graphs; ++g) {
          check(cudaMemcpyAsync(memory.novelty + (b * memory.graphs + g) * memory.capacity,
                                static_cast<const std::uint32_t*>(weights.data) +
                                    b * weights.stride(0) + g * weights.stride(1),
                                static_cast<std::size_t>(state(layer).length * kWord),
                                cudaMemcpyDeviceToDevice, queue),
                "cudaMemcpyAsync");
        }
      }
      refresh_restart_tables(layer, extent, queue);
    });
  }

  void restart_distribution(std::int64_t layer, int population, const TensorView& out,
                            Stream stream) const override {
    read("restart_distribution", layer, stream, [&](cudaStream_t queue, std::int64_t extent) {
      cuda::launch_restart_distribution(view(layer), rules(), population, table_of<float>(out),
                                        extent, queue);
    });
  }

  void synchronize() const override {
    const DeviceGuard guard(graph_.device.index);
    order_.synchronize();
    raise_reported("synchronize");
  }

  void refresh(std::int64_t layer, LayerState& host) const override {
    const DeviceGuard guard(graph_.device.index);
    // Replays run where the caller launched them.
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    raise_reported("refresh");
    const std::vector<SequenceCounters> sequences = download_sequences(layer, order_.own());
    LayerCounters counters{};
    check(cudaMemcpyAsync(&counters, view(layer).counters, sizeof(counters), cudaMemcpyDeviceToHost,
                          order_.own()),
          "cudaMemcpyAsync");
    check(cudaStreamSynchronize(order_.own()), "cudaStreamSynchronize");
    host.length = counters.length;
    host.ordered = counters.ordered != 0;
    for (std::size_t b = 0; b < sequences.size(); ++b) {
      host.seen[b] = sequences[b].seen;
      host.walked_at[b] = sequences[b].walked_at;
      host.walk_block[b] = sequences[b].walk_block;
    }
    host.held = held_by_graphs(layer, sequences, host.ordered);
  }

  BackendStatistics statistics() const override {
    const DeviceGuard guard(graph_.device.index);
    const cudaStream_t own = order_.own();
    cuda::Statistics counted{};
    check(cudaMemcpyAsync(&counted, shared().statistics, sizeof(counted), cudaMemcpyDeviceToHost,
                          own),
          "cudaMemcpyAsync");
    check(cudaStreamSynchronize(own), "cudaStreamSynchronize");
    return {.rows_written = static_cast<std::int64_t>(counted.rows_written),
            .rows_nonfinite = static_cast<std::int64_t>(counted.rows_nonfinite)};
  }

  MemoryUse memory_use() const override {
    MemoryUse use;
    for (const LayerMemory& layer : layers_) {
      use.graph_bytes += layer.graph_bytes();
      use.scratch_bytes += layer.scratch_bytes();
    }
    for (const Memory* memory :
         {&shared_, &reported_, &pinned_views_, &scratch_.results, &scratch_.device_results,
          &scratch_.views, &scratch_.marks, &scratch_.novelty, &scratch_.solve, &rows_scratch_}) {
      use.scratch_bytes += memory->bytes();
    }
    return use;
  }

 private:
  // Offsets in `results_`: a record of what a check found, then a table.
  static constexpr std::int64_t kResultTable = 256;

  const LayerView& view(std::int64_t layer) const {
    return layers_[static_cast<std::size_t>(layer)].view();
  }
  const LayerState& state(std::int64_t layer) const {
    return states_[static_cast<std::size_t>(layer)];
  }
  FaultRecord* fault() const { return shared_.as<FaultRecord>(); }
  FaultRecord* reported() const { return reported_.as<FaultRecord>(); }
  /// Of the list that was checked last.
  std::int64_t* kept_counts() const {
    return scratch_.device_results.as<std::int64_t>(kResultTable);
  }
  FaultRecord* checked() const { return scratch_.results.as<FaultRecord>(); }
  cuda::SharedMemory shared() const {
    return {.fault = fault(),
            .reported = reported(),
            .statistics = shared_.as<cuda::Statistics>(kResultTable)};
  }

  /// Most slots of a layer that may be in use when work queued now runs.
  std::int64_t extent_of(std::int64_t layer, Stream stream) const {
    return is_recording(stream) ? view(layer).capacity : state(layer).length;
  }

  /// Throws what the device has found since, if anything, or that a change was left half done.
  void raise_reported(std::string_view operation) const {
    if (!broken_.empty()) {
      throw CudaError("[" + std::string(operation) +
                      "] the manager cannot go on before reset(kAllLayers), because a call failed "
                      "before: " +
                      broken_);
    }
    const volatile std::uint32_t& found = reported()->fault;
    if (found == 0U) return;
    const FaultRecord record = *reported();
    const auto kind = static_cast<cuda::Fault>(record.fault);
    const bool slots = kind == cuda::Fault::slot_range || kind == cuda::Fault::slot_taken ||
                       kind == cuda::Fault::slots_differ || kind == cuda::Fault::layer_full;
    const bool takes_slots = operation == "update" || operation == "attend";
    cuda::throw_fault(takes_slots || !slots ? operation : "update", record);
  }

  cudaStream_t begin(std::string_view operation, Stream stream) const {
    raise_reported(operation);
    order_.enter(handle_of(stream), operation);
    return handle_of(stream);
  }

  /// Each graph has a free one below `slots`, as far as the host knows: while replays go on, the
  /// device may hold more.
  void require_free_slots(std::string_view operation, std::int64_t layer,
                          std::int64_t slots) const {
    const LayerState& host = state(layer);
    for (std::int64_t b = 0; b < host.batch; ++b) {
      const auto held = host.held_by(b);
      for (std::size_t g = 0; g < held.size(); ++g) {
        const std::int64_t limit = std::min(host.room(static_cast<std::int64_t>(g)), slots);
        if (held[g] < limit) continue;
        throw_invalid(operation, "sequence " + std::to_string(b), "one with a free slot",
                      std::to_string(held[g]) + " tokens in " + std::to_string(limit) + " slots");
      }
    }
  }
  /// For calls of which a walk under way notices nothing.
  cudaStream_t begin_beside_walk(std::string_view operation, Stream stream) const {
    raise_reported(operation);
    order_.enter_beside_walk(handle_of(stream), operation);
    return handle_of(stream);
  }

  static void refuse_recording(std::string_view operation, Stream stream) {
    if (!StreamOrder::is_capturing(handle_of(stream))) return;
    throw CudaError("[" + std::string(operation) + "] cannot be captured: the host takes part");
  }

  /// Queues work that changes nothing of the graph.
  template <class Work>
  void look(cudaStream_t queue, Work&& work) const {
    try {
      work();
    } catch (const CudaError&) {
      leave_after_failure(queue);
      throw;
    }
    order_.leave(queue);
  }

  /// Queues work that changes the graph. Where a call fails on the way, the device holds neither
  /// what was nor what should be, and the manager says so from then on.
  template <class Work>
  void change(cudaStream_t queue, Work&& work) {
    try {
      work();
    } catch (const CudaError& error) {
      broken_ = error.what();
      leave_after_failure(queue);
      throw;
    }
    order_.leave(queue);
  }

  /// What was queued before the failure is waited for, if the device still can.
  void leave_after_failure(cudaStream_t queue) const {
    try {
      order_.leave(queue);
    } catch (const CudaError&) {
      // The failure itself is on its way to the caller.
    }
  }

  template <class Launch>
  void read(std::string_view operation, std::int64_t layer, Stream stream, Launch&& launch) const {
    const DeviceGuard guard(graph_.device.index);
    const cudaStream_t queue = begin(operation, stream);
    const std::int64_t extent = extent_of(layer, stream);
    if (extent == 0 || view(layer).batch == 0) return;
    look(queue, [&] { launch(queue, extent); });
  }

  void grow(Memory& memory, std::int64_t bytes, bool recording, std::string_view operation) const {
    if (bytes <= memory.bytes()) return;
    if (recording) {
      throw CudaError("[" + std::string(operation) +
                      "] needs memory that cannot be taken while it is captured: call it once "
                      "before the capture");
    }
    order_.synchronize();
    memory = Memory();
    memory = Memory(bytes, Memory::Kind::device);
  }

  /// Queues a copy from `pinned`, which stays as it is until that is done.
  static void queue_upload(const Memory& to, const Memory& pinned, std::int64_t bytes,
                           cudaStream_t own) {
    check(cudaMemcpyAsync(to.data(), pinned.data(), static_cast<std::size_t>(bytes),
                          cudaMemcpyHostToDevice, own),
          "cudaMemcpyAsync");
  }

  void queue_rotary(cudaStream_t own) {
    const std::vector<double>& frequencies = graph_.rotary.inv_freq;
    if (frequencies.empty() || !walk_.needs_novelty()) return;
    const auto bytes = static_cast<std::int64_t>(frequencies.size() * sizeof(double));
    revolutions_ = Memory(bytes, Memory::Kind::device);
    pinned_revolutions_ = Memory(bytes, Memory::Kind::mapped);
    std::transform(frequencies.begin(), frequencies.end(), pinned_revolutions_.as<double>(),
                   [](double frequency) { return frequency / (2.0 * std::numbers::pi); });
    queue_upload(revolutions_, pinned_revolutions_, bytes, own);
  }

  /// Scratch that fits the shapes of all layers.
  struct Scratch {
    Memory marks;  ///< one word a slot of the largest layer
    Memory novelty;
    Memory solve;           ///< where no population is exact, the first solve takes it
    Memory results;         ///< of checks; the host reads them
    Memory device_results;  ///< of checks that the host does not wait for
    Memory views;           ///< LayerView of every layer, then walk_view() of every layer
  };

  /// `next` takes the place of a layer, and its memory is that of the old one afterwards. Takes all
  /// memory before it changes anything.
  void replace_layer(std::int64_t layer, LayerMemory& next, cudaStream_t own) {
    const auto index = static_cast<std::size_t>(layer);
    std::vector<LayerView> views = all_views();
    views[index] = next.view();
    Scratch more = missing_scratch(views, own);
    // What is queued may still use what is about to be freed.
    order_.synchronize();
    take_scratch(more);
    std::swap(layers_[index], next);
    queue_views(own);
    order_.leave(own);
  }

  std::vector<LayerView> all_views() const {
    std::vector<LayerView> views;
    for (const LayerMemory& layer : layers_) views.push_back(layer.view());
    return views;
  }

  /// Only what is larger than before.
  Scratch missing_scratch(const std::vector<LayerView>& views, cudaStream_t own) const {
    std::int64_t slots = 0;
    std::int64_t table = 0;
    std::int64_t novelty = 0;
    std::int64_t graphs = 0;
    std::int64_t capacity = 0;
    for (const LayerView& one : views) {
      slots = std::max<std::int64_t>(slots, std::int64_t{one.batch} * one.graphs * one.capacity);
      graphs += std::int64_t{one.batch} * one.graphs;
      capacity = std::max(capacity, one.capacity);
      table = std::max<std::int64_t>(table, std::int64_t{one.batch} * (2 * one.graphs + 2) + 2);
      if (walk_.needs_novelty()) {
        novelty = std::max(novelty, cuda::novelty_scratch(one, walk_.novelty_width));
      }
    }
    // Where a walk needs some, a later solve of all populations must not take more: captured walks
    // hold on to the memory.
    const bool any_exact = !populations_of(walk_, Solver::exact).empty();
    const std::int64_t solved =
        any_exact ? graphs * static_cast<std::int64_t>(walk_.populations.size()) : 0;
    constexpr std::int64_t kWord = 4;
    const auto more = [](const Memory& memory, std::int64_t bytes, Memory::Kind kind) {
      return bytes > memory.bytes() ? Memory(bytes, kind) : Memory();
    };
    Scratch scratch{
        .marks = more(scratch_.marks, slots * kWord, Memory::Kind::device),
        .novelty = more(scratch_.novelty, novelty * kWord, Memory::Kind::device),
        .solve = more(scratch_.solve, cuda::solve_scratch(solved, capacity), Memory::Kind::device),
        .results = more(scratch_.results, kResultTable + table * 8, Memory::Kind::mapped),
        .device_results =
            more(scratch_.device_results, kResultTable + table * 8, Memory::Kind::device),
        .views =
            more(scratch_.views, static_cast<std::int64_t>(2 * views.size() * sizeof(LayerView)),
                 Memory::Kind::device)};
    if (scratch.marks.bytes() > 0) {
      check(cudaMemsetAsync(scratch.marks.data(), 0,
                            static_cast<std::size_t>(scratch.marks.bytes()), own),
            "cudaMemsetAsync");
    }
    return scratch;
  }

  void take_scratch(Scratch& more) {
    const auto take = [](Memory& memory, Memory& larger) {
      if (larger.bytes() > 0) memory = std::move(larger);
    };
    take(scratch_.marks, more.marks);
    take(scratch_.novelty, more.novelty);
    take(scratch_.solve, more.solve);
    take(scratch_.results, more.results);
    take(scratch_.device_results, more.device_results);
    take(scratch_.views, more.views);
  }

  /// No earlier copy is under way.
  void queue_views(cudaStream_t own) {
    auto* view = pinned_views_.as<LayerView>();
    for (const LayerMemory& layer : layers_) *view++ = layer.view();
    for (const LayerMemory& layer : layers_) *view++ = layer.walk_view();
    queue_upload(scratch_.views, pinned_views_, pinned_views_.bytes(), own);
  }

  /// Waits for what is queued.
  static void upload_counters(const LayerView& layer, const LayerState& host, cudaStream_t queue) {
    std::vector<SequenceCounters> sequences;
    for (std::size_t b = 0; b < host.seen.size(); ++b) {
      sequences.push_back({.seen = host.seen[b],
                           .held = host.held_by(static_cast<std::int64_t>(b))[0],
                           .walked_at = host.walked_at[b],
                           .walk_block = host.walk_block[b]});
    }
    const LayerCounters counters{
        .length = host.length, .ordered = host.ordered ? 1 : 0, .ticket = 0};
    check(
        cudaMemcpyAsync(layer.sequences, sequences.data(),
                        sequences.size() * sizeof(SequenceCounters), cudaMemcpyHostToDevice, queue),
        "cudaMemcpyAsync");
    check(
        cudaMemcpyAsync(layer.counters, &counters, sizeof(counters), cudaMemcpyHostToDevice, queue),
        "cudaMemcpyAsync");
    check(cudaStreamSynchronize(queue), "cudaStreamSynchronize");
  }

  std::vector<SequenceCounters> download_sequences(std::int64_t layer, cudaStream_t queue) const {
    std::vector<SequenceCounters> sequences(static_cast<std::size_t>(view(layer).batch));
    check(
        cudaMemcpyAsync(sequences.data(), view(layer).sequences,
                        sequences.size() * sizeof(SequenceCounters), cudaMemcpyDeviceToHost, queue),
        "cudaMemcpyAsync");
    check(cudaStreamSynchronize(queue), "cudaStreamSynchronize");
    return sequences;
  }

  /// (B, G)
  std::vector<std::int64_t> held_by_graphs(std::int64_t layer,
                                           const std::vector<SequenceCounters>& sequences,
                                           bool ordered) const {
    const std::int64_t graphs = view(layer).graphs;
    if (ordered) {  // those of a sequence hold the same tokens
      std::vector<std::int64_t> held;
      for (const SequenceCounters& sequence : sequences) {
        held.insert(held.end(), static_cast<std::size_t>(graphs), sequence.held);
      }
      return held;
    }
    const cudaStream_t own = order_.own();
    auto* counts = scratch_.results.as<std::int64_t>(kResultTable);
    look(own, [&] { cuda::launch_count_held(view(layer), counts, own); });
    order_.synchronize();
    return {counts, counts + view(layer).batch * graphs};
  }

  /// Slots up to `length` are in use from now on, empty: a checked slot of a new token lies there.
  void leave_gap(std::int64_t layer, std::int64_t length, cudaStream_t queue) {
    const LayerCounters counters{.length = length, .ordered = 0, .ticket = 0};
    check(cudaMemcpyAsync(view(layer).counters, &counters, sizeof(counters), cudaMemcpyHostToDevice,
                          queue),
          "cudaMemcpyAsync");
  }

  /// Copies all arrays of a layer between the device and a layer of the same shape in host memory.
  static void copy_layer(const LayerMemory& memory, CpuLayer& host, cudaMemcpyKind kind,
                         cudaStream_t queue) {
    constexpr std::int64_t kWord = 4;
    const LayerView& device = memory.view();
    const std::int64_t slots = memory.slots();
    if (slots == 0) return;
    const auto copy = [&](void* on_device, void* on_host, std::int64_t words) {
      const bool upload = kind == cudaMemcpyHostToDevice;
      check(cudaMemcpyAsync(upload ? on_device : on_host, upload ? on_host : on_device,
                            static_cast<std::size_t>(slots * words * kWord), kind, queue),
            "cudaMemcpyAsync");
    };
    copy(device.positions, host.positions(0, 0), 1);
    copy(device.rows, host.row(0, 0, 0).words(), device.row_words);
    copy(device.scores, host.scores(0, 0, 0), device.populations);
    if (device.visits != nullptr) copy(device.visits, host.visits(0, 0, 0), device.populations);
    if (device.novelty != nullptr) copy(device.novelty, host.novelty(0, 0), 1);
  }

  /// Follows every change of restart weights.
  void refresh_restart_tables(std::int64_t layer, std::int64_t extent, cudaStream_t queue) const {
    if (!walk_.needs_novelty()) return;
    const LayerView& memory = view(layer);
    cuda::PopulationList all{};
    while (std::cmp_less(all.count, walk_.populations.size())) {
      all.numbers[all.count] = all.count;
      ++all.count;
    }
    for (std::int64_t b = 0; b < memory.batch; b += SequenceMarks::kMost) {
      cuda::launch_restart_tables(cuda::RestartTables::novelty, nullptr, 1, memory, rules(), all,
                                  memory.batch, extent, b, marks_of({}, b, memory.batch), queue);
    }
  }

  void update_block(std::int64_t layer, const UpdateArgs& args, cudaStream_t queue) {
    const LayerView& memory = view(layer);
    const std::int64_t count = args.queries.size(2);
    const std::int64_t slots = args.first_slot + count;
    constexpr std::int64_t kWord = 4;
    constexpr std::int64_t kAlignment = 64;
    const std::int64_t drawn = (memory.batch * count + kAlignment - 1) / kAlignment * kAlignment;
    const std::int64_t tiles =
        args.row_stride > 0 ? cuda::update_rows_scratch(memory, slots, count, args.row_stride) : 0;
    grow(rows_scratch_, (drawn + tiles) * kWord, false, "update_rows");
    const bool marked = !args.valid.empty();
    auto* draws = rows_scratch_.as<std::int32_t>();
    cuda::launch_admit(memory, args.first_slot, count,
                       marked ? static_cast<const std::uint8_t*>(args.valid.data) : nullptr,
                       marked ? args.valid.stride(0) : 0, marked ? args.valid.stride(1) : 0,
                       args.row_stride, draws, queue);
    if (args.row_stride == 0) return;
    const cuda::UpdateRowsArgs rows{.queries = tokens_of(args.queries),
                                    .keys = tokens_of(args.keys),
                                    .first_slot = args.first_slot,
                                    .count = count,
                                    .row_stride = args.row_stride,
                                    .scale = static_cast<float>(args.scale),
                                    .softcap = static_cast<float>(args.softcap),
                                    .drawn = draws,
                                    .scratch = rows_scratch_.as<std::int32_t>(drawn * kWord)};
    cuda::launch_update_rows(memory, rows, queue);
  }

  cuda::WalkRules rules() const {
    cuda::WalkRules rules{};
    rules.seed = graph_.seed;
    rules.walk_length = walk_.walk_length;
    rules.restart_threshold = static_cast<std::uint64_t>(walk_.restart_prob * 0x1p32);
    rules.first_stream_of_layer = graph_.total_kv_heads;
    rules.head_offset = graph_.scope == GraphScope::head ? graph_.head_offset : 0;
    for (std::size_t p = 0; p < walk_.populations.size(); ++p) {
      const Population& population = walk_.populations[p];
      const WalkerRange walkers = walkers_of(walk_, static_cast<int>(p));
      rules.population[p] = {.first_walker = walkers.first,
                             .walkers = walkers.count,
                             .restart = static_cast<std::int32_t>(population.restart),
                             .count_restarts = population.count == VisitCount::all ? 1 : 0,
                             .recent_fraction = population.recent_fraction,
                             .recent_tokens = population.recent_tokens,
                             .decay = decay_of(walk_, static_cast<int>(p))};
    }
    return rules;
  }

  // The device is current while members are made.
  const GraphConfig graph_;
  const WalkConfig walk_;
  const std::vector<LayerState>& states_;
  Memory revolutions_;  ///< of a RotaryView
  Memory pinned_revolutions_;
  Memory pinned_views_{static_cast<std::int64_t>(2 * states_.size() * sizeof(LayerView)),
                       Memory::Kind::mapped};
  Memory shared_{2 * kResultTable, Memory::Kind::device};
  Memory reported_{kResultTable, Memory::Kind::mapped};
  Scratch scratch_;
  Memory rows_scratch_;
  std::vector<LayerMemory> layers_;
  std::string broken_;         ///< by which failed call
  mutable StreamOrder order_;  // is destroyed first, and waits
};

LoadResult CudaBackend::load_rows(std::int64_t layer, const ConstTensorView& positions,
                                  const ConstTensorView& neighbors,
                                  const ConstTensorView& probabilities, Stream stream) {
  const DeviceGuard guard(graph_.device.index);
  refuse_recording("load_rows", stream);
  const cudaStream_t queue = begin("load_rows", stream);
  const HostCopy host_positions(positions, queue);
  const HostCopy host_neighbors(neighbors, queue);
  const HostCopy host_probabilities(probabilities, queue);
  check(cudaStreamSynchronize(queue), "cudaStreamSynchronize");
  const LayerView& memory = view(layer);
  CpuLayer loaded(graph_, walk_, memory.batch, memory.capacity);
  LoadResult result = load_graphs(graph_, loaded, host_positions.view(), host_neighbors.view(),
                                  host_probabilities.view());
  LayerMemory next(graph_, walk_, shared(), layer, memory.batch, memory.capacity, {}, queue);
  copy_layer(next, loaded, cudaMemcpyHostToDevice, queue);
  LayerState host = state(layer);
  host.length = positions.size(2);
  host.ordered = result.ordered;
  host.seen = result.seen;
  host.held = result.held;
  std::fill(host.walked_at.begin(), host.walked_at.end(), -1);
  upload_counters(next.view(), host, queue);
  replace_layer(layer, next, order_.own());
  return result;
}

std::vector<std::uint8_t> CudaBackend::save_layer(std::int64_t layer) const {
  const DeviceGuard guard(graph_.device.index);
  raise_reported("save_layer");
  const cudaStream_t own = order_.own();
  const LayerMemory& memory = layers_[static_cast<std::size_t>(layer)];
  const LayerState& host = state(layer);
  CpuLayer copy(graph_, walk_, host.batch, host.capacity, host.rooms);
  copy_layer(memory, copy, cudaMemcpyDeviceToHost, own);
  check(cudaStreamSynchronize(own), "cudaStreamSynchronize");
  return detail::save_layer(graph_, walk_, copy, host);
}

LayerState CudaBackend::load_layer(std::int64_t layer, std::span<const std::uint8_t> saved) {
  const DeviceGuard guard(graph_.device.index);
  raise_reported("load_layer");
  const LayerState& host = state(layer);
  LoadedLayer loaded = detail::load_layer(graph_, walk_, host.capacity, host.rooms, saved);
  const cudaStream_t own = order_.own();
  LayerMemory next(graph_, walk_, shared(), layer, loaded.state.batch, loaded.state.capacity,
                   loaded.state.rooms, own);
  copy_layer(next, loaded.layer, cudaMemcpyHostToDevice, own);
  upload_counters(next.view(), loaded.state, own);
  replace_layer(layer, next, own);
  change(own, [&] { refresh_restart_tables(layer, loaded.state.length, own); });
  return loaded.state;
}

}  // namespace

namespace {

void require_device(const std::string& operation, Device device) {
  const int devices = cuda::device_count();
  if (devices > device.index) return;
  throw BackendUnavailable("[" + operation + "] no backend for " + name_of(device) + ": " +
                           (devices == 0 ? cuda::status()
                                         : "this machine has " + std::to_string(devices) +
                                               " CUDA device" + (devices == 1 ? "" : "s")));
}

}  // namespace

void decode_attention_on_cuda(const AttentionArgs& args, int device, Stream stream) {
  require_device("decode_attention", {DeviceType::cuda, device});
  const DeviceGuard guard(device);
  const std::int64_t group = args.query.size(1) / args.keys.size(1);
  check_attend_shape("decode_attention", group, args.query.size(2));
  const cuda::UpdateArgs update{.queries = tokens_of(args.query),
                                .keys = tokens_of(args.keys),
                                .slots = {},
                                .scale = static_cast<float>(args.scale),
                                .softcap = static_cast<float>(args.softcap)};
  cuda::launch_decode_attention(
      {.batch = args.query.size(0),
       .heads = args.keys.size(1),
       .group = group,
       .head_dim = args.query.size(2),
       .length = args.length,
       .positions = args.positions.empty() ? TableView<const std::int32_t>{}
                                           : table_of<const std::int32_t>(args.positions)},
      attend_args(update, args.attended), handle_of(stream));
}

std::unique_ptr<Backend> make_cuda_backend(const GraphConfig& graph, const WalkConfig& walk,
                                           const std::vector<LayerState>& layers, Stream stream) {
  require_device("GraphManager", graph.device);
  const DeviceGuard guard(graph.device.index);
  return std::make_unique<CudaBackend>(graph, walk, layers, stream);
}

}  // namespace spectralkv::detail
