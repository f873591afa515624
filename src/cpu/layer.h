// The CPU backend's memory of one layer, and what all its stages share.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <new>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include "backend.h"
#include "cpu/simd.h"
#include "row_format.h"
#include "spectralkv/config.h"
#include "spectralkv/tensor.h"

namespace spectralkv::detail {

/// Zeroed memory that starts on a cache line, so that a row of 64 bytes lies in one.
template <class T>
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(std::int64_t size, T value = T{})
      : size_(size),
        data_(static_cast<T*>(::operator new[](static_cast<std::size_t>(size) * sizeof(T),
                                               std::align_val_t{kAlignment}))) {
    std::uninitialized_fill_n(data_.get(), size, value);
  }

  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  std::int64_t bytes() const { return size_ * static_cast<std::int64_t>(sizeof(T)); }

  /// Grows without keeping the contents.
  T* at_least(std::int64_t size) {
    if (size > size_) *this = AlignedBuffer(size);
    return data();
  }

 private:
  static constexpr std::size_t kAlignment = 64;
  struct Free {
    void operator()(T* p) const { ::operator delete[](p, std::align_val_t{kAlignment}); }
  };
  std::int64_t size_ = 0;
  std::unique_ptr<T[], Free> data_;
};

inline constexpr std::size_t kMaxNeighbors = 32;

/// A row is top_k neighbours (slots, -1 where there are none) and, unless EdgeLaw::uniform, top_k
/// thresholds: the cumulative probabilities in units of 2^-32, so that a 32-bit random number r
/// takes the first edge with r < threshold. Under EdgeLaw::weighted the last edge's threshold is
/// 2^32 - 1, not 2^32: a number above it is drawn again, as one that hits a stale edge is. Under
/// EdgeLaw::attention it may be anything: a number above it is a restart.
template <class Word>
class BasicRow {
 public:
  BasicRow(Word* words, RowFormat format, int top_k)
      : words_(words), format_(format), top_k_(top_k) {}

  operator BasicRow<const Word>() const {  // NOLINT(*-explicit-*)
    return {words_, format_, top_k_};
  }

  Word* words() const { return words_; }
  bool has_thresholds() const { return format_ != RowFormat::slots; }

  std::int32_t neighbor(int k) const {
    if (format_ == RowFormat::packed) return packed_slot(words_[k]);
    return static_cast<std::int32_t>(words_[k]);
  }
  std::uint32_t threshold(int k) const {
    if (format_ == RowFormat::packed) return packed_threshold(words_[k]);
    return words_[top_k_ + k];
  }
  /// Probability of edge k before stale edges are left out, in units of 2^-32 (1 each if uniform).
  std::uint32_t width(int k) const {
    if (!has_thresholds()) return 1;
    return threshold(k) - (k == 0 ? 0 : threshold(k - 1));
  }
  /// The threshold is left out where the row has none.
  void set(int k, std::int32_t neighbor, std::uint32_t threshold) const {
    if (format_ == RowFormat::packed) {
      words_[k] = pack_edge(neighbor, threshold);
      return;
    }
    words_[k] = static_cast<std::uint32_t>(neighbor);
    if (format_ == RowFormat::wide) words_[top_k_ + k] = threshold;
  }

 private:
  Word* words_;
  RowFormat format_;
  int top_k_;
};
using Row = BasicRow<std::uint32_t>;
using ConstRow = BasicRow<const std::uint32_t>;

/// Copies a row to one of any format, with its edges to slots below `slots`: only stale ones lead
/// to others.
void copy_row(ConstRow from, Row to, int top_k, std::int64_t slots);

// ---- views

template <class T, class Pointer>
auto* element_pointer(const BasicTensorView<Pointer>& view, std::int64_t offset) {
  using Element = std::conditional_t<std::is_const_v<Pointer>, const T, T>;
  return static_cast<Element*>(view.data) + offset;
}

/// Address of element (b, h) of a view whose first axes are (sequence, head), of any dtype.
template <class Pointer>
auto* head_pointer(const BasicTensorView<Pointer>& view, std::int64_t b, std::int64_t h) {
  using Byte = std::conditional_t<std::is_const_v<Pointer>, const std::byte, std::byte>;
  return static_cast<Byte*>(view.data) +
         (b * view.stride(0) + h * view.stride(1)) * size_of(view.dtype);
}

/// Arrays of a layer: of each sequence its graphs one behind the other, with as many slots as each
/// has room for.
class CpuLayer {
 public:
  /// `rooms`: slots of each graph of a sequence; empty: `capacity` each.
  CpuLayer(const GraphConfig& graph, const WalkConfig& walk, std::int64_t batch,
           std::int64_t capacity, std::span<const std::int64_t> rooms = {});

  std::int64_t batch() const { return batch_; }
  std::int64_t graphs() const { return std::ssize(rooms_); }
  std::int64_t room(std::int64_t g) const { return rooms_[static_cast<std::size_t>(g)]; }
  /// Of the first `length` slots those that the graph has.
  std::int64_t extent(std::int64_t g, std::int64_t length) const {
    return std::min(length, room(g));
  }

  /// Slot 0 of a KV head in keys or values: (B, Hkv, S, D), or (B, 1, pool, D) of a divided layer.
  template <class Pointer>
  auto* slots(const BasicTensorView<Pointer>& view, std::int64_t b, std::int64_t h) const {
    if (!divided_) return head_pointer(view, b, h);
    return head_pointer(view, b, 0) + before(h) * view.stride(2) * size_of(view.dtype);
  }

  std::int32_t* positions(std::int64_t b, std::int64_t g) {
    return positions_.data() + offset(b, g);
  }
  const std::int32_t* positions(std::int64_t b, std::int64_t g) const {
    return positions_.data() + offset(b, g);
  }
  RowFormat format() const { return format_; }
  Row row(std::int64_t b, std::int64_t g, std::int64_t slot) {
    return {rows_.data() + (offset(b, g) + slot) * words_of_row(format_, top_k_), format_, top_k_};
  }
  ConstRow row(std::int64_t b, std::int64_t g, std::int64_t slot) const {
    return {rows_.data() + (offset(b, g) + slot) * words_of_row(format_, top_k_), format_, top_k_};
  }
  float* scores(std::int64_t b, std::int64_t g, int population) {
    return scores_.data() + offset(b, g) * populations_ + population * room(g);
  }
  const float* scores(std::int64_t b, std::int64_t g, int population) const {
    return scores_.data() + offset(b, g) * populations_ + population * room(g);
  }
  /// Whether visits are kept beside the scores. They are the scores where nothing is accumulated
  /// and f32 holds every count.
  bool has_visits() const { return visits_.bytes() > 0; }
  std::uint32_t* visits(std::int64_t b, std::int64_t g, int population) {
    return visits_.data() + offset(b, g) * populations_ + population * room(g);
  }
  const std::uint32_t* visits(std::int64_t b, std::int64_t g, int population) const {
    return visits_.data() + offset(b, g) * populations_ + population * room(g);
  }
  /// Restart weights of novelty populations.
  std::uint32_t* novelty(std::int64_t b, std::int64_t g) { return novelty_.data() + offset(b, g); }
  const std::uint32_t* novelty(std::int64_t b, std::int64_t g) const {
    return novelty_.data() + offset(b, g);
  }

  /// Empties a slot: no token, no edges, no score.
  void clear(std::int64_t b, std::int64_t g, std::int64_t slot);

  /// Calls function(pointer) for each array of a graph that has one value a slot: all but the rows.
  template <class Function>
  void for_each_value(Function&& function, std::int64_t b, std::int64_t g) {
    function(positions(b, g));
    for (int p = 0; p < populations_; ++p) {
      function(scores(b, g, p));
      if (has_visits()) function(visits(b, g, p));
    }
    if (novelty_.bytes() > 0) function(novelty(b, g));
  }

  /// Takes over one sequence of another layer of the same shape but for batch, rooms and format of
  /// rows: of the first `length` slots those that both have, and the edges to them.
  void copy_sequence(std::int64_t to, const CpuLayer& other, std::int64_t from,
                     std::int64_t length);

  std::int64_t bytes() const;

 private:
  /// Slots of a sequence before those of graph g.
  std::int64_t before(std::int64_t g) const { return before_[static_cast<std::size_t>(g)]; }
  std::int64_t offset(std::int64_t b, std::int64_t g) const {
    return b * before_.back() + before(g);
  }

  std::int64_t batch_;
  bool divided_;
  std::vector<std::int64_t> rooms_;
  std::vector<std::int64_t> before_;  ///< and at last all slots of a sequence
  int top_k_;
  RowFormat format_;
  std::int64_t populations_;
  AlignedBuffer<std::int32_t> positions_;
  AlignedBuffer<std::uint32_t> rows_;
  AlignedBuffer<float> scores_;
  AlignedBuffer<std::uint32_t> visits_;
  AlignedBuffer<std::uint32_t> novelty_;
};

/// Cosines and sines of Rotary for any position, from two small tables: an angle is the sum of that
/// of a multiple of kStep and that of the rest.
class RotaryTable {
 public:
  explicit RotaryTable(const Rotary& rotary);

  bool empty() const { return rotary_.inv_freq.empty(); }
  /// Makes room for positions below `count`; nothing else may use the table.
  void reserve(std::int64_t count);
  /// Writes the `dim` elements of a key as they were before they were turned; in place.
  void unturn(float* key, std::int64_t position) const;

 private:
  struct Turn {
    float cos;
    float sin;
  };
  static constexpr std::int64_t kStep = 512;
  static std::vector<Turn> turns_at(const Rotary& rotary, double position);

  Rotary rotary_;
  std::vector<Turn> steps_;  ///< (n, pairs): of multiples of kStep
  std::vector<Turn> rests_;  ///< (kStep, pairs)
};

/// What the stages read besides the layer.
struct CpuContext {
  const GraphConfig& graph;
  const WalkConfig& walk;
  const SimdKernels& simd;
  int threads;

  std::int64_t group() const { return graph.num_query_heads / graph.num_kv_heads; }
  /// KV heads that share graph g: [first, first + count).
  std::int64_t first_head(std::int64_t g) const { return graph.scope == GraphScope::head ? g : 0; }
  std::int64_t head_count() const {
    return graph.scope == GraphScope::head ? 1 : graph.num_kv_heads;
  }
  /// The graph of a KV head.
  std::int64_t graph_of(std::int64_t head) const {
    return graph.scope == GraphScope::head ? head : 0;
  }
  /// One thread where the work is smaller than waking others.
  int threads_for(std::int64_t operations) const { return operations < (1 << 20) ? 1 : threads; }
};

/// Memory of one thread that holds nothing between calls.
struct Scratch {
  AlignedBuffer<float> scores;
  AlignedBuffer<float> sums;
  AlignedBuffer<float> totals;
  AlignedBuffer<float> outputs;
  AlignedBuffer<float> queries;
  AlignedBuffer<float> panel;
  AlignedBuffer<double> z_scores;
  AlignedBuffer<std::uint32_t> words;
  AlignedBuffer<std::int32_t> slots;

  std::int64_t bytes() const {
    return scores.bytes() + sums.bytes() + totals.bytes() + outputs.bytes() + queries.bytes() +
           panel.bytes() + z_scores.bytes() + words.bytes() + slots.bytes();
  }
};

// ---- stages, one file each

struct UpdateCounts {
  std::int64_t rows = 0;
  std::int64_t nonfinite = 0;
};

/// score_topk.cpp: one new token a sequence.
UpdateCounts update_single(const CpuContext& context, CpuLayer& layer, const UpdateArgs& args,
                           std::vector<Scratch>& scratch);
/// update_rows.cpp: a block of new tokens.
UpdateCounts update_block(const CpuContext& context, CpuLayer& layer, const UpdateArgs& args,
                          std::vector<Scratch>& scratch);
/// What a softmax does to raw dot products.
struct SoftmaxArgs {
  float scale;
  float softcap;  ///< 0: none
};
inline SoftmaxArgs softmax_args(const UpdateArgs& args) {
  return {.scale = static_cast<float>(args.scale), .softcap = static_cast<float>(args.softcap)};
}
/// Turns n scores (raw dot products) of one query head into numbers in proportion to their softmax,
/// 0 where `positions` (null: none) is negative or the score is not finite. Returns their sum: 0
/// where the head sees no token.
float softmax(const CpuContext& context, const SoftmaxArgs& args, float* scores, std::int64_t n,
              const std::int32_t* positions);
/// The same, and adds the softmax to `sums` with a weight.
float add_softmax(const CpuContext& context, const SoftmaxArgs& args, float* scores, std::int64_t n,
                  const std::int32_t* positions, float weight, float* sums);

/// attention.cpp: the attention of one token a sequence, for a round of sequences at once.
struct AttentionRound {
  ConstTensorView queries;  ///< (B, Hq, D), further axes are not looked at
  ConstTensorView keys;     ///< (B, Hkv, S, D), or as `layer` has it
  std::int64_t first;       ///< sequences [first, first + count)
  std::int64_t count;
  std::int64_t length;              ///< slots [0, length), as far as a head has them
  const CpuLayer* layer = nullptr;  ///< whose slots these are; null: each head has `length`

  std::int64_t slots_of(std::int64_t g) const {
    return layer == nullptr ? length : layer->extent(g, length);
  }
  const std::byte* slots(const ConstTensorView& view, std::int64_t b, std::int64_t h) const {
    return layer == nullptr ? head_pointer(view, b, h) : layer->slots(view, b, h);
  }

  std::int64_t operations(const GraphConfig& graph) const {
    return count * graph.num_query_heads * length * graph.head_dim;
  }
};
/// Sequences that are worth a round: as many as keep all threads busy.
std::int64_t round_size(const CpuContext& context, std::int64_t batch, std::int64_t graphs);
/// Writes the queries as f32 (count, Hq, D) and their dot products with the keys (count, Hq,
/// length).
void score_keys(const CpuContext& context, const AttentionRound& round, float* queries,
                float* scores);
/// positions(b, h): of the slots of a head, or null.
using PositionsOf = std::function<const std::int32_t*(std::int64_t b, std::int64_t h)>;
/// Writes the attention's output: means of the values by `weights` (count, Hq, length), whose sums
/// are `totals` (count, Hq). `partial` is scratch.
void weigh_values(const CpuContext& context, const AttentionRound& round,
                  const AttendedViews& attended, const PositionsOf& positions, const float* weights,
                  const float* totals, AlignedBuffer<float>& partial);

/// Draws the row of the token in `slot` from the probabilities of the first n slots.
void draw_row(const CpuContext& context, CpuLayer& layer, std::int64_t b, std::int64_t g,
              std::int64_t slot, const float* probabilities, std::int64_t n);
bool all_finite(const float* values, std::int64_t n);

/// graph_rows.cpp

/// Stores `count` neighbours with their probabilities, which need not sum to 1: EdgeLaw::weighted
/// makes them.
void write_row(Row row, EdgeLaw law, int top_k, const std::int32_t* neighbors,
               const double* probabilities, int count);
inline bool is_live_edge(const std::int32_t* positions, std::int64_t from, std::int32_t to) {
  return to >= 0 && positions[to] >= 0 && positions[to] < positions[from];
}
/// Calls function(neighbor, probability) for each live edge. The probabilities sum to 1; under
/// EdgeLaw::attention to less, and the rest is a restart.
template <class Function>
void for_each_live_edge(ConstRow row, EdgeLaw law, int top_k, const std::int32_t* positions,
                        std::int64_t slot, Function&& function) {
  std::array<std::int32_t, kMaxNeighbors> neighbors;
  std::array<std::uint32_t, kMaxNeighbors> widths;
  std::size_t count = 0;
  std::uint64_t total = 0;
  std::uint32_t before = 0;
  for (int k = 0; k < top_k; ++k) {
    const std::uint32_t upper = row.has_thresholds() ? row.threshold(k) : before + 1;
    const std::uint32_t width = upper - before;
    before = upper;
    const std::int32_t neighbor = row.neighbor(k);
    if (width == 0 || !is_live_edge(positions, slot, neighbor)) continue;
    neighbors[count] = neighbor;
    widths[count++] = width;
    total += width;
  }
  if (count == 0) return;
  if (law == EdgeLaw::attention) total = std::uint64_t{1} << 32U;
  const double unit = 1.0 / static_cast<double>(total);
  for (std::size_t i = 0; i < count; ++i) {
    function(neighbors[i], static_cast<double>(widths[i]) * unit);
  }
}
/// Rewrites the row of `slot` for slots that move, into `to`, which may be the row itself:
/// new_slot[j] is where slot j goes, -1 where its token does not stay. Edges to tokens that go are
/// dropped, the others keep their proportions, or under EdgeLaw::attention their probabilities.
void remap_row(ConstRow from, Row to, EdgeLaw law, int top_k, const std::int32_t* positions,
               std::int64_t slot, const std::int32_t* new_slot);

/// load_rows.cpp: fills an empty layer; throws InvalidArgument where the tables are no graphs.
LoadResult load_graphs(const GraphConfig& graph, CpuLayer& next, const ConstTensorView& positions,
                       const ConstTensorView& neighbors, const ConstTensorView& probabilities);

/// saved_layer.cpp

/// See GraphManager::save_layer; `layer` is what `state` says, on this device or copied from it.
std::vector<std::uint8_t> save_layer(const GraphConfig& graph, const WalkConfig& walk,
                                     const CpuLayer& layer, const LayerState& state);
struct LoadedLayer {
  CpuLayer layer;
  LayerState state;
};
/// Throws InvalidArgument where the bytes are no layer of these graphs.
LoadedLayer load_layer(const GraphConfig& graph, const WalkConfig& walk, std::int64_t capacity,
                       std::span<const std::int64_t> rooms, std::span<const std::uint8_t> saved);

/// novelty.cpp
void update_novelty(const CpuContext& context, const RotaryTable& rotary, CpuLayer& layer,
                    const ConstTensorView& keys, std::int64_t length,
                    std::vector<Scratch>& scratch);

/// restart.cpp: where walkers of one population of one graph restart.
class RestartTable {
 public:
  RestartTable(const CpuContext& context, const CpuLayer& layer, const LayerState& state,
               std::int64_t b, std::int64_t g, int population);

  bool empty() const { return slots_.empty(); }
  /// The slot that a 32-bit random number means.
  std::int32_t draw(std::uint32_t random) const {
    if (cumulative_.empty()) return slots_[scaled(slots_.size(), random)];
    const std::uint64_t target = scaled(cumulative_.back(), random);
    std::size_t i = guide_[random >> guide_shift_];
    while (cumulative_[i] <= target) ++i;
    return slots_[i];
  }
  /// Calls function(slot, probability).
  template <class Function>
  void for_each(Function&& function) const {
    for (std::size_t i = 0; i < slots_.size(); ++i) {
      const double weight =
          cumulative_.empty()
              ? 1.0
              : static_cast<double>(cumulative_[i] - (i == 0 ? 0 : cumulative_[i - 1]));
      const double total = cumulative_.empty() ? static_cast<double>(slots_.size())
                                               : static_cast<double>(cumulative_.back());
      function(slots_[i], weight / total);
    }
  }

 private:
  __extension__ using Wide = unsigned __int128;
  /// floor(total * random / 2^32)
  static std::uint64_t scaled(std::uint64_t total, std::uint32_t random) {
    return static_cast<std::uint64_t>((static_cast<Wide>(total) * random) >> 32U);
  }

  std::vector<std::int32_t> slots_;
  std::vector<std::uint64_t> cumulative_;  ///< weights; empty: all alike
  std::vector<std::uint32_t> guide_;       ///< where to start looking, by the number's high bits
  unsigned guide_shift_ = 0;
};

/// ppr_walk.cpp
void walk(const CpuContext& context, CpuLayer& layer, const LayerState& state,
          std::int64_t layer_index, std::span<const std::uint8_t> sequences,
          std::span<const int> populations, std::vector<Scratch>& scratch);
/// ppr_exact.cpp
void solve(const CpuContext& context, CpuLayer& layer, const LayerState& state,
           std::span<const std::uint8_t> sequences, std::span<const int> populations);
/// select.cpp
void select(const CpuContext& context, const CpuLayer& layer, const LayerState& state,
            const CutArgs& args, const TensorView& out);
void safety_mask(const CpuContext& context, const CpuLayer& layer, const LayerState& state,
                 const EvictionConfig& eviction, double top_fraction, const TensorView& out);
/// compact.cpp
void compact(const CpuContext& context, CpuLayer& layer, std::int64_t length,
             const ConstTensorView& keep, const TensorView& keys, const TensorView& values);

}  // namespace spectralkv::detail
