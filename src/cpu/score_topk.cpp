// The row of one new token a sequence: dot products with every cached key, softmax, mean over the
// query heads of the graph, top K.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <limits>

#include "cpu/layer.h"
#include "thread_pool.h"

namespace spectralkv::detail {
namespace {

float apply_softcap(float* scores, std::int64_t n, float softcap) {
  float maximum = -std::numeric_limits<float>::infinity();
  for (std::int64_t j = 0; j < n; ++j) {
    if (!std::isfinite(scores[j])) continue;
    scores[j] = softcap * std::tanh(scores[j] / softcap);
    maximum = std::max(maximum, scores[j]);
  }
  return maximum;
}

}  // namespace

bool all_finite(const float* values, std::int64_t n) {
  return std::all_of(values, values + n, [](float value) { return std::isfinite(value); });
}

float softmax(const CpuContext& context, const SoftmaxArgs& args, float* scores, std::int64_t n,
              const std::int32_t* positions) {
  float maximum = context.simd.mask_scores(scores, n, args.scale, positions);
  if (maximum == -std::numeric_limits<float>::infinity()) {
    std::fill_n(scores, n, 0.0F);
    return 0.0F;
  }
  if (args.softcap > 0.0F) maximum = apply_softcap(scores, n, args.softcap);
  return context.simd.exp_sum(scores, n, maximum);
}

float add_softmax(const CpuContext& context, const SoftmaxArgs& args, float* scores, std::int64_t n,
                  const std::int32_t* positions, float weight, float* sums) {
  const float total = softmax(context, args, scores, n, positions);
  if (total > 0.0F) context.simd.add_scaled(sums, scores, n, weight / total);
  return total;
}

void draw_row(const CpuContext& context, CpuLayer& layer, std::int64_t b, std::int64_t g,
              std::int64_t slot, const float* probabilities, std::int64_t n) {
  std::array<std::int32_t, kMaxNeighbors> neighbors;
  std::array<float, kMaxNeighbors> best;
  std::array<double, kMaxNeighbors> weights{};
  const int count = context.simd.top_k(probabilities, n, context.graph.top_k, layer.positions(b, g),
                                       static_cast<std::int32_t>(context.graph.num_sinks), slot,
                                       neighbors.data(), best.data());
  std::copy_n(best.begin(), count, weights.begin());
  write_row(layer.row(b, g, slot), context.graph.edge_law, context.graph.top_k, neighbors.data(),
            weights.data(), count);
}

UpdateCounts update_single(const CpuContext& context, CpuLayer& layer, const UpdateArgs& args,
                           std::vector<Scratch>& scratch) {
  const GraphConfig& graph = context.graph;
  const std::int64_t dim = graph.head_dim;
  const std::int64_t group = context.group();
  const std::int64_t length = args.length;
  const std::int64_t key_bytes = args.keys.stride(2) * size_of(args.keys.dtype);

  const std::int64_t at_once = round_size(context, layer.batch(), layer.graphs());
  float* const queries = scratch[0].queries.at_least(at_once * graph.num_query_heads * dim);
  float* const scores = scratch[0].scores.at_least(at_once * graph.num_query_heads * length);
  float* const totals = scratch[0].totals.at_least(at_once * graph.num_query_heads);
  std::atomic<std::int64_t> rows{0};
  std::atomic<std::int64_t> nonfinite{0};

  for (std::int64_t first = 0; first < layer.batch(); first += at_once) {
    const AttentionRound round{.queries = args.queries,
                               .keys = args.keys,
                               .first = first,
                               .count = std::min(at_once, layer.batch() - first),
                               .length = length,
                               .layer = &layer};
    score_keys(context, round, queries, scores);

    const int threads = context.threads_for(round.operations(graph));
    parallel_for(round.count * layer.graphs(), threads, [&](std::int64_t task, int worker) {
      const std::int64_t b = first + task / layer.graphs();
      const std::int64_t g = task % layer.graphs();
      const std::int64_t first_head = context.first_head(g);
      const std::int64_t slot =
          args.slots.empty()
              ? args.first_slot
              : *element_pointer<std::int32_t>(
                    args.slots, b * args.slots.stride(0) + first_head * args.slots.stride(1));
      const std::int32_t* positions = layer.positions(b, g);
      if (positions[slot] < 0) return;  // padding
      ++rows;

      Scratch& mine = scratch[static_cast<std::size_t>(worker)];
      float* const key = mine.panel.at_least(dim);
      const std::int64_t query_heads = context.head_count() * group;
      const std::int64_t first_query = (b - first) * graph.num_query_heads + first_head * group;
      bool finite = all_finite(queries + first_query * dim, query_heads * dim);
      for (std::int64_t h = first_head; h < first_head + context.head_count(); ++h) {
        context.simd.load_row(layer.slots(args.keys, b, h) + slot * key_bytes, args.keys.dtype, dim,
                              key);
        finite = finite && all_finite(key, dim);
      }
      if (!finite) ++nonfinite;
      if (!finite && !args.attends()) return;

      const std::int64_t slots = layer.extent(g, length);
      float* const sums = mine.sums.at_least(slots);
      std::fill_n(sums, slots, 0.0F);
      for (std::int64_t q = first_query; q < first_query + query_heads; ++q) {
        totals[q] = add_softmax(context, softmax_args(args), scores + q * length, slots, positions,
                                1.0F / static_cast<float>(query_heads), sums);
      }
      if (finite) draw_row(context, layer, b, g, slot, sums, slots);
    });

    if (args.attends()) {
      weigh_values(
          context, round, args.attended,
          [&](std::int64_t b, std::int64_t h) { return layer.positions(b, context.graph_of(h)); },
          scores, totals, scratch[0].outputs);
    }
  }
  return {.rows = rows, .nonfinite = nonfinite};
}

}  // namespace spectralkv::detail
