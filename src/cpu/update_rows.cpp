// The rows of a block of new tokens, each seeing the tokens up to itself. Keys are packed into
// panels that all queries of a task pass over, as in a matrix product; scores of a few tokens at a
// time live in a buffer of the thread.
#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/layer.h"
#include "thread_pool.h"

namespace spectralkv::detail {
namespace {

/// Query rows that share a packed panel: enough to make packing cheap.
constexpr std::int64_t kRowsPerTask = 64;
/// Most scores a thread holds (16 MiB): long caches take fewer tokens at a time.
constexpr std::int64_t kScoresPerTask = std::int64_t{1} << 22;

/// The tokens of each sequence that get a row, ascending: every row_stride-th, the newest among
/// them.
std::vector<std::vector<std::int64_t>> drawn_tokens(const CpuLayer& layer, const UpdateArgs& args) {
  std::vector<std::vector<std::int64_t>> drawn(static_cast<std::size_t>(layer.batch()));
  for (std::int64_t b = 0; b < layer.batch(); ++b) {
    auto& tokens = drawn[static_cast<std::size_t>(b)];
    const std::int32_t* positions = layer.positions(b, 0) + args.first_slot;
    std::int64_t newer = 0;
    for (std::int64_t i = args.queries.size(2); i-- > 0;) {
      if (positions[i] >= 0 && newer++ % args.row_stride == 0) tokens.push_back(i);
    }
    std::reverse(tokens.begin(), tokens.end());
  }
  return drawn;
}

}  // namespace

UpdateCounts update_block(const CpuContext& context, CpuLayer& layer, const UpdateArgs& args,
                          std::vector<Scratch>& scratch) {
  const GraphConfig& graph = context.graph;
  const std::int64_t dim = graph.head_dim;
  const std::int64_t group = context.group();
  const std::int64_t panel = context.simd.panel_width;
  const std::int64_t ld = (args.length + panel - 1) / panel * panel;
  const std::vector<std::vector<std::int64_t>> drawn = drawn_tokens(layer, args);
  std::int64_t most_drawn = 0;
  for (const auto& tokens : drawn) {
    most_drawn = std::max(most_drawn, static_cast<std::int64_t>(tokens.size()));
  }
  if (most_drawn == 0) return {};
  const std::int64_t tokens_per_task = std::clamp<std::int64_t>(
      std::min(kRowsPerTask / group, kScoresPerTask / (group * ld)), 1, most_drawn);
  const std::int64_t blocks = (most_drawn + tokens_per_task - 1) / tokens_per_task;
  const std::int64_t query_heads = context.head_count() * group;
  const float weight = 1.0F / static_cast<float>(query_heads);
  const int threads =
      context.threads_for(layer.batch() * graph.num_query_heads * most_drawn * args.length * dim);
  std::atomic<std::int64_t> rows{0};
  std::atomic<std::int64_t> nonfinite{0};

  parallel_for(
      layer.batch() * layer.graphs() * blocks, threads, [&](std::int64_t task, int worker) {
        // The longest tasks, at the end of the block of tokens, come first.
        const std::int64_t block = blocks - 1 - task / (layer.batch() * layer.graphs());
        const std::int64_t b = task % (layer.batch() * layer.graphs()) / layer.graphs();
        const std::int64_t g = task % layer.graphs();
        const std::int64_t begin = block * tokens_per_task;
        const std::vector<std::int64_t>& own = drawn[static_cast<std::size_t>(b)];
        const std::int64_t tokens =
            std::min(tokens_per_task, static_cast<std::int64_t>(own.size()) - begin);
        if (tokens <= 0) return;
        const auto token_of = [&](std::int64_t i) {
          return own[static_cast<std::size_t>(begin + i)];
        };
        const std::int64_t last_slot = args.first_slot + token_of(tokens - 1);
        const std::int64_t visible = last_slot + 1;
        const std::int32_t* positions = layer.positions(b, g);

        Scratch& mine = scratch[static_cast<std::size_t>(worker)];
        float* const queries = mine.queries.at_least(tokens * group * dim);
        float* const scores = mine.scores.at_least(tokens * group * ld);
        float* const sums = mine.sums.at_least(tokens * visible);
        float* const packed = mine.panel.at_least(std::max(panel, std::int64_t{1}) * dim);
        std::uint32_t* const finite = mine.words.at_least(tokens);
        std::fill_n(sums, tokens * visible, 0.0F);
        std::fill_n(finite, tokens, 1U);

        for (std::int64_t h = context.first_head(g);
             h < context.first_head(g) + context.head_count(); ++h) {
          const auto* keys = head_pointer(args.keys, b, h);
          const std::int64_t slot_bytes = args.keys.stride(2) * size_of(args.keys.dtype);
          for (std::int64_t i = 0; i < tokens; ++i) {
            for (std::int64_t q = 0; q < group; ++q) {
              context.simd.load_row(
                  head_pointer(args.queries, b, h * group + q) +
                      token_of(i) * args.queries.stride(2) * size_of(args.queries.dtype),
                  args.queries.dtype, dim, queries + (i * group + q) * dim);
            }
            context.simd.load_row(keys + (args.first_slot + token_of(i)) * slot_bytes,
                                  args.keys.dtype, dim, packed);
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
              add_softmax(context, softmax_args(args), scores + (i * group + q) * ld, n, positions,
                          weight, sums + i * visible);
            }
          }
        }

        for (std::int64_t i = 0; i < tokens; ++i) {
          const std::int64_t slot = args.first_slot + token_of(i);
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
