// Moves kept slots to the front, in place.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/layer.h"
#include "thread_pool.h"

namespace spectralkv::detail {
namespace {

constexpr std::int64_t kCacheLine = 64;
/// How far ahead memory is fetched: a run is one or two slots where a fifth stays.
constexpr std::size_t kMovesAhead = 6;

/// A run of slots that move by the same distance.
struct Move {
  std::int64_t to;
  std::int64_t from;
  std::int64_t count;
};

/// Runs in an order in which none overwrites what a later one reads. Where a slot is kept
/// keep[i] - i never falls, so all moves to the right come before all moves to the left in the
/// list, and the two kinds never touch each other's slots. Among themselves, moves to the left are
/// safe in ascending order and moves to the right in descending order.
std::vector<Move> plan_moves(const std::int32_t* keep, std::int64_t count) {
  std::vector<Move> left;
  std::vector<Move> right;
  for (std::int64_t i = 0; i < count;) {
    const std::int64_t from = keep[i];
    if (from < 0) {  // stays empty
      ++i;
      continue;
    }
    std::int64_t run = 1;
    while (i + run < count && keep[i + run] == from + run) ++run;
    if (from != i) (from > i ? left : right).push_back({i, from, run});
    i += run;
  }
  left.insert(left.end(), right.rbegin(), right.rend());
  return left;
}

void move_slots(const TensorView& view, std::int64_t b, std::int64_t h,
                const std::vector<Move>& moves) {
  std::byte* const base = head_pointer(view, b, h);
  const std::int64_t element = size_of(view.dtype);
  const std::int64_t stride = view.stride(2) * element;
  const std::int64_t width = view.size(3) * element;
  for (std::size_t i = 0; i < moves.size(); ++i) {
    const Move& move = moves[i];
    // Kept slots lie scattered: the processor does not foresee where the next run starts.
    if (i + kMovesAhead < moves.size()) {
      const std::byte* next = base + moves[i + kMovesAhead].from * stride;
      for (std::int64_t offset = 0; offset < width; offset += kCacheLine) {
        __builtin_prefetch(next + offset);
      }
    }
    if (stride == width) {
      std::memmove(base + move.to * stride, base + move.from * stride,
                   static_cast<std::size_t>(move.count * width));
      continue;
    }
    for (std::int64_t j = 0; j < move.count; ++j) {
      const std::int64_t k = move.to < move.from ? j : move.count - 1 - j;
      std::memcpy(base + (move.to + k) * stride, base + (move.from + k) * stride,
                  static_cast<std::size_t>(width));
    }
  }
}

template <class T>
void move_values(T* values, const std::vector<Move>& moves) {
  for (const Move& move : moves) {
    std::memmove(values + move.to, values + move.from,
                 static_cast<std::size_t>(move.count) * sizeof(T));
  }
}

void move_graph(const CpuContext& context, CpuLayer& layer, std::int64_t b, std::int64_t g,
                const std::int32_t* keep, std::int64_t count, std::int64_t length,
                const std::vector<Move>& moves) {
  const int top_k = context.graph.top_k;
  std::int32_t* const positions = layer.positions(b, g);
  std::vector<std::int32_t> new_slot(static_cast<std::size_t>(length), -1);
  for (std::int64_t i = 0; i < count; ++i) {
    if (keep[i] >= 0) new_slot[static_cast<std::size_t>(keep[i])] = static_cast<std::int32_t>(i);
  }
  // Rows are rewritten on their way, before positions move: these tell which edges live.
  const auto rewrite = [&](std::int64_t to, std::int64_t from) {
    remap_row(layer.row(b, g, from), layer.row(b, g, to), context.graph.edge_law, top_k, positions,
              from, new_slot.data());
  };
  for (std::int64_t i = 0; i < count; ++i) {
    if (keep[i] == i) rewrite(i, i);
  }
  for (std::size_t i = 0; i < moves.size(); ++i) {
    const Move& move = moves[i];
    if (i + kMovesAhead < moves.size()) {
      __builtin_prefetch(layer.row(b, g, moves[i + kMovesAhead].from).words());
    }
    for (std::int64_t j = 0; j < move.count; ++j) {
      const std::int64_t k = move.to < move.from ? j : move.count - 1 - j;
      rewrite(move.to + k, move.from + k);
    }
  }
  layer.for_each_value([&](auto* values) { move_values(values, moves); }, b, g);
  for (std::int64_t i = 0; i < count; ++i) {
    if (keep[i] < 0) layer.clear(b, g, i);
  }
  // What lies behind is cleared when a token takes its place.
  std::fill(positions + count, positions + length, -1);
}

}  // namespace

void compact(const CpuContext& context, CpuLayer& layer, std::int64_t length,
             const ConstTensorView& keep, const TensorView& keys, const TensorView& values) {
  const std::int64_t count = keep.size(2);
  const std::int64_t width = keys.empty() ? 1 : keys.size(3) * 2;
  const std::int64_t heads = context.graph.num_kv_heads;
  const int threads = context.threads_for(layer.batch() * heads * count * width);
  parallel_for(layer.batch() * heads, threads, [&](std::int64_t task, int) {
    const std::int64_t b = task / heads;
    const std::int64_t h = task % heads;
    const auto* slots =
        element_pointer<std::int32_t>(keep, b * keep.stride(0) + h * keep.stride(1));
    const std::vector<Move> moves = plan_moves(slots, count);
    if (!keys.empty()) move_slots(keys, b, h, moves);
    if (!values.empty()) move_slots(values, b, h, moves);
    const std::int64_t g = context.graph_of(h);
    if (h == context.first_head(g)) {
      move_graph(context, layer, b, g, slots, count, length, moves);
    }
  });
}

}  // namespace spectralkv::detail
