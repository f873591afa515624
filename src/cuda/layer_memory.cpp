#include "cuda/layer_memory.h"

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <numeric>
#include <span>

#include "backend.h"
#include "cuda/cuda_check.h"
#include "cuda/kernels.h"

namespace spectralkv::cuda {
namespace {

using detail::needs_visits;

constexpr std::int64_t kAlignment = 256;

std::int64_t aligned(std::int64_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

/// Copies `rows` runs of `count` values of 4 bytes.
void copy_runs(void* to, std::int64_t to_stride, const void* from, std::int64_t from_stride,
               std::int64_t count, std::int64_t rows, cudaStream_t stream) {
  if (count == 0) return;
  constexpr std::int64_t kWord = 4;
  check(cudaMemcpy2DAsync(to, static_cast<std::size_t>(to_stride * kWord), from,
                          static_cast<std::size_t>(from_stride * kWord),
                          static_cast<std::size_t>(count * kWord), static_cast<std::size_t>(rows),
                          cudaMemcpyDeviceToDevice, stream),
        "cudaMemcpy2DAsync");
}

}  // namespace

LayerMemory::LayerMemory(const GraphConfig& graph, const WalkConfig& walk,
                         const SharedMemory& shared, std::int64_t index, std::int64_t batch,
                         std::int64_t capacity, std::span<const std::int64_t> rooms,
                         cudaStream_t stream) {
  const std::int64_t graphs = graph.scope == GraphScope::head ? graph.num_kv_heads : 1;
  const auto populations = static_cast<std::int64_t>(walk.populations.size());
  view_.index = static_cast<std::int32_t>(index);
  view_.batch = static_cast<std::int32_t>(batch);
  view_.heads = static_cast<std::int32_t>(graph.num_kv_heads);
  view_.graphs = static_cast<std::int32_t>(graphs);
  view_.heads_per_graph = static_cast<std::int32_t>(graph.num_kv_heads / graphs);
  view_.group = static_cast<std::int32_t>(graph.num_query_heads / graph.num_kv_heads);
  view_.head_dim = static_cast<std::int32_t>(graph.head_dim);
  view_.top_k = graph.top_k;
  view_.format = detail::row_format(graph, capacity);
  view_.row_words = detail::words_of_row(view_.format, graph.top_k);
  view_.populations = static_cast<std::int32_t>(populations);
  view_.num_sinks = static_cast<std::int32_t>(graph.num_sinks);
  view_.law = graph.edge_law;
  view_.capacity = capacity;
  if (!rooms.empty()) {
    for (const std::int64_t room : rooms) {
      division_.push_back(static_cast<std::int32_t>(view_.pool));
      view_.pool += room;
    }
    division_.push_back(static_cast<std::int32_t>(view_.pool));
    const auto order = division_.insert(division_.end(), rooms.size(), 0);
    std::iota(order, division_.end(), 0);
    std::stable_sort(order, division_.end(), [&](auto g, auto other) {
      return rooms[static_cast<std::size_t>(g)] > rooms[static_cast<std::size_t>(other)];
    });
  }
  const std::int64_t restart_blocks = (capacity + kRestartBlock - 1) / kRestartBlock;
  view_.restart_group = 1;
  while (kMostCoarseSums * view_.restart_group < restart_blocks) view_.restart_group *= 2;
  const std::int64_t coarse = (restart_blocks + view_.restart_group - 1) / view_.restart_group;
  view_.restart_stride = 2 + (coarse + 1) / 2 * 2 + (coarse * view_.restart_group + 1) / 2 * 2;
  view_.fault = shared.fault;
  view_.reported = shared.reported;
  view_.statistics = shared.statistics;

  const std::int64_t slots = this->slots();
  const bool has_visits = needs_visits(walk);
  std::int64_t size = 0;
  const auto take = [&size](std::int64_t bytes) {
    const std::int64_t offset = size;
    size = aligned(size + bytes);
    return offset;
  };
  const std::int64_t positions = take(slots * 4);
  const std::int64_t rows = take(slots * view_.row_words * 4);
  const std::int64_t scores = take(slots * populations * 4);
  const std::int64_t visits = take(has_visits ? slots * populations * 4 : 0);
  const std::int64_t novelty = take(walk.needs_novelty() ? slots * 4 : 0);
  graph_bytes_ = size;
  const std::int64_t counters = take(sizeof(LayerCounters));
  const std::int64_t sequences = take(batch * static_cast<std::int64_t>(sizeof(SequenceCounters)));
  const std::int64_t walk_counters = take(sizeof(LayerCounters));
  const std::int64_t walk_sequences =
      take(batch * static_cast<std::int64_t>(sizeof(SequenceCounters)));
  const std::int64_t tables = batch * graphs * populations;
  const std::int64_t restart_tables = take(tables * view_.restart_stride * 8);
  const std::int64_t walk_tickets = take(batch * 4);
  const std::int64_t division = take(std::ssize(division_) * 4);
  const std::int64_t update = take(update_scratch(view_));

  memory_ = Memory(size, Memory::Kind::device);
  view_.positions = memory_.as<std::int32_t>(positions);
  view_.rows = memory_.as<std::uint32_t>(rows);
  view_.scores = memory_.as<float>(scores);
  view_.visits = has_visits ? memory_.as<std::uint32_t>(visits) : nullptr;
  view_.novelty = walk.needs_novelty() ? memory_.as<std::uint32_t>(novelty) : nullptr;
  view_.counters = memory_.as<LayerCounters>(counters);
  view_.sequences = memory_.as<SequenceCounters>(sequences);
  view_.restart_tables = memory_.as<std::uint64_t>(restart_tables);
  view_.walk_tickets = memory_.as<std::uint32_t>(walk_tickets);
  view_.update_scratch = memory_.as<void>(update);
  if (is_divided()) {
    view_.first_slots = memory_.as<std::int32_t>(division);
    view_.head_order = view_.first_slots + graphs + 1;
  }
  walk_view_ = view_;
  walk_view_.counters = memory_.as<LayerCounters>(walk_counters);
  walk_view_.sequences = memory_.as<SequenceCounters>(walk_sequences);
  check(cudaMemsetAsync(memory_.data(), 0, static_cast<std::size_t>(size), stream),
        "cudaMemsetAsync");
  if (is_divided()) {
    check(cudaMemcpyAsync(memory_.as<void>(division), division_.data(),
                          division_.size() * sizeof(std::int32_t), cudaMemcpyHostToDevice, stream),
          "cudaMemcpyAsync");
  }
  if (slots > 0) {
    check(cudaMemsetAsync(view_.positions, 0xff, static_cast<std::size_t>(slots * 4), stream),
          "cudaMemsetAsync");
  }
}

void LayerMemory::copy_sequence(std::int64_t to, const LayerMemory& other, std::int64_t from,
                                std::int64_t length, cudaStream_t stream) {
  const LayerView& mine = view_;
  const LayerView& its = other.view_;
  // Even layers have all graphs at equal distances: one copy an array.
  const std::int64_t at_once = is_divided() || other.is_divided() ? 1 : mine.graphs;
  for (std::int64_t g = 0; g < mine.graphs; g += at_once) {
    const std::int64_t own_slots = to * slots_before(mine.graphs) + slots_before(g);
    const std::int64_t its_slots = from * other.slots_before(mine.graphs) + other.slots_before(g);
    const std::int64_t count = std::min({length, room(g), other.room(g)});
    const auto copy = [&](auto* own, const auto* others, std::int64_t runs) {
      if (own == nullptr) return;
      copy_runs(own + own_slots * runs, room(g), others + its_slots * runs, other.room(g), count,
                at_once * runs, stream);
    };
    copy(mine.positions, its.positions, 1);
    copy(mine.scores, its.scores, mine.populations);
    copy(mine.visits, its.visits, mine.populations);
    copy(mine.novelty, its.novelty, 1);
  }
  launch_copy_rows(mine, to, its, from, length, stream);
  check(cudaMemcpyAsync(mine.sequences + to, its.sequences + from, sizeof(SequenceCounters),
                        cudaMemcpyDeviceToDevice, stream),
        "cudaMemcpyAsync");
}

}  // namespace spectralkv::cuda
