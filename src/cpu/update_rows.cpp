// The rows of a block of new tokens, each seeing the tokens up to itself. Keys are packed into panels
// that all queries of a task pass over, as in a matrix product; scores of a few tokens at a time live
// in a buffer of the thread.
#include <algorithm>
#include <atomic>

#include "cpu/layer.h"
#include "thread_pool.h"

namespace spectralkv::detail {
namespace {

/// Query rows that share a packed panel: enough to make packing cheap.
constexpr std::int64_t kRowsPerTask = 64;
/// Most scores a thread holds (16 MiB): long caches take fewer tokens at a time.
constexpr std::int64_t kScoresPerTask = std::int64_t{1} << 22;

}  // namespace

UpdateCounts update_block(const CpuContext& context, CpuLayer& layer, const UpdateArgs& args,
                          std::vector<Scratch>& scratch) {
  const GraphConfig& graph = context.graph;
  const std::int64_t dim = graph.head_dim;
  const std::int64_t group = context.group();
  const std::int64_t panel = context.simd.panel_width;
  const std::int64_t count = args.queries.size(2);
  const std::int64_t ld = (args.length + panel - 1) / panel * panel;
  const std::int64_t drawn = (count + args.row_stride - 1) / args.row_stride;
  const std::int64_t tokens_per_task = std::clamp<std::int64_t>(
      std::min(kRowsPerTask / group, kScoresPerTask / (group * ld)), 1, drawn);
  const std::int64_t blocks = (drawn + tokens_per_task - 1) / tokens_per_task;
  const std::int64_t query_heads = context.head_count() * group;
  const float weight = 1.0F / static_cast<float>(query_heads);
  const int threads = context.threads_for(layer.batch() * graph.num_query_heads * drawn *
                                          args.length * dim);
  std::atomic<std::int64_t> rows{0};
  std::atomic<std::int64_t> nonfinite{0};

  parallel_for(layer.batch() * layer.graphs() * blocks, threads, [&](std::int64_t task,
                                                                      int worker) {
    // The longest tasks, at the end of the block of tokens, come first.
    const std::int64_t block = blocks - 1 - task / (layer.batch() * layer.graphs());
    const std::int64_t b = task % (layer.batch() * layer.graphs()) / layer.graphs();
    const std::int64_t g = task % layer.graphs();
    const std::int64_t begin = block * tokens_per_task;
    const std::int64_t tokens = std::min(tokens_per_task, drawn - begin);
    // Drawn row i is of token count - 1 - (drawn - 1 - i) * row_stride: the newest always has one.
    const auto token_of = [&](std::int64_t i) {
      return count - 1 - (drawn - 1 - (begin + i)) * args.row_stride;
    };
    const std::int64_t last_slot = args.first_slot + token_of(tokens - 1);
    const std::int64_t visible = last_slot + 1;
    const std::int32_t* positions = layer.positions(b, g);

    Scratch& mine = scratch[static_cast<std::size_t>(worker)];
    float* const queries = mine.queries.at_least(tokens * group * dim);
    float* const scores = mine.scores.at_least(tokens * group * ld);
    float* const sums = mine.sums.at_least(tokens * visible);
    float* const packed = mine.panel.at_least(std::max(panel, std::int64_t{1}) * dim);
    auto* const finite = reinterpret_cast<std::uint32_t*>(mine.words.at_least(tokens));
    std::fill_n(sums, tokens * visible, 0.0F);
    std::fill_n(finite, tokens, 1U);

    for (std::int64_t h = context.first_head(g); h < context.first_head(g) + context.head_count();
         ++h) {
      const auto* keys = head_pointer(args.keys, b, h);
      const std::int64_t slot_bytes = args.keys.stride(2) * size_of(args.keys.dtype);
      for (std::int64_t i = 0; i < tokens; ++i) {
        for (std::int64_t q = 0; q < group; ++q) {
          context.simd.load_row(head_pointer(args.queries, b, h * group + q) +
                                    token_of(i) * args.queries.stride(2) *
                                        size_of(args.queries.dtype),
                                args.queries.dtype, dim, queries + (i * group + q) * dim);
        }
        context.simd.load_row(keys + (args.first_slot + token_of(i)) * slot_bytes, args.keys.dtype,
                              dim, packed);
        if (!all_finite(packed, dim) || !all_finite(queries + i * group * dim, group * dim)) {
          finite[i] = 0;
        }
      }
      for (std::int64_t j = 0; j < visible; j += panel) {
        context.simd.pack_panel(keys + j * slot_bytes, args.keys.dtype, args.keys.stride(2),
                                std::min(panel, visible - j), dim, packed);
        context.simd.panel_scores(packed, dim, queries, tokens * group, scores + j, ld);
      }
      for (std::int64_t i = 0; i < tokens; ++i) {
        const std::int64_t n = args.first_slot + token_of(i) + 1;
        for (std::int64_t q = 0; q < group; ++q) {
          add_softmax(context, args, scores + (i * group + q) * ld, n, positions, weight,
                      sums + i * visible);
        }
      }
    }

    for (std::int64_t i = 0; i < tokens; ++i) {
      const std::int64_t slot = args.first_slot + token_of(i);
      if (positions[slot] < 0) continue;  // padding
      ++rows;
      if (finite[i] == 0) {
        ++nonfinite;
        continue;
      }
      draw_row(context, layer, b, g, slot, sums + i * visible, slot + 1);
    }
  });
  return {.rows = rows, .nonfinite = nonfinite};
}

}  // namespace spectralkv::detail
