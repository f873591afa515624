// A layer as bytes, and back.
//
// Words of this machine's byte order: a header, the slots of each graph of a sequence, the
// sequences, then graph by graph positions, rows and, population by population, scores and visits,
// at last the restart weights. Each part's size follows from what comes before it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cpu/layer.h"
#include "validate.h"

namespace spectralkv::detail {
namespace {

constexpr std::string_view kOperation = "load_layer";
constexpr std::int64_t kMagic = 0x6b'76'6c'61'79'65'72'00;  // "kvlayer"
constexpr std::int64_t kVersion = 3;

/// What a saved layer says of itself; all its fields are numbers, in the order of the file.
struct Header {
  std::int64_t magic = kMagic;
  std::int64_t version = kVersion;
  std::int64_t law = 0;
  std::int64_t top_k = 0;
  std::int64_t graphs = 0;
  std::int64_t populations = 0;
  std::int64_t has_visits = 0;
  std::int64_t has_weights = 0;  ///< room for restart weights
  std::int64_t format = 0;       ///< of rows, which need not be that of the layer that loads them
  std::int64_t batch = 0;
  std::int64_t length = 0;
  std::int64_t ordered = 0;
  std::int64_t has_novelty = 0;  ///< restart weights were computed
};

struct Sequence {
  std::int64_t seen = 0;
  std::int64_t walked_at = 0;
  std::uint64_t walk_block = 0;
};

/// The format is that of small graphs.
Header header_of(const GraphConfig& graph, const WalkConfig& walk) {
  return {.law = static_cast<std::int64_t>(graph.edge_law),
          .top_k = graph.top_k,
          .graphs = graph.scope == GraphScope::head ? graph.num_kv_heads : 1,
          .populations = static_cast<std::int64_t>(walk.populations.size()),
          .has_visits = needs_visits(walk) ? 1 : 0,
          .has_weights = walk.needs_novelty() ? 1 : 0,
          .format = static_cast<std::int64_t>(row_format(graph, 0))};
}

class Writer {
 public:
  template <class T>
  void put(const T* values, std::int64_t count) {
    const auto* from = reinterpret_cast<const std::uint8_t*>(values);
    bytes_.insert(bytes_.end(), from, from + count * static_cast<std::int64_t>(sizeof(T)));
  }
  std::vector<std::uint8_t> take() { return std::move(bytes_); }

 private:
  std::vector<std::uint8_t> bytes_;
};

class Reader {
 public:
  explicit Reader(std::span<const std::uint8_t> bytes) : bytes_(bytes) {}

  std::int64_t left() const { return static_cast<std::int64_t>(bytes_.size()); }

  /// The caller has made sure that they are there.
  template <class T>
  void get(T* values, std::int64_t count) {
    const auto size = static_cast<std::size_t>(count) * sizeof(T);
    if (size == 0) return;
    std::memcpy(values, bytes_.data(), size);
    bytes_ = bytes_.subspan(size);
  }

 private:
  std::span<const std::uint8_t> bytes_;
};

RowFormat format_of(const Header& header) { return static_cast<RowFormat>(header.format); }
std::int64_t row_words(const Header& header) {
  return words_of_row(format_of(header), static_cast<int>(header.top_k));
}

/// All runs of the arrays of a graph with n slots, in the order of the file; `rows`: the words of
/// its rows in the file's format.
template <class Layer, class Word, class Function>
void for_each_run(Layer& layer, const Header& header, Word* rows, std::int64_t n, std::int64_t b,
                  std::int64_t g, Function&& function) {
  function(layer.positions(b, g), n);
  function(rows, n * row_words(header));
  for (int p = 0; p < header.populations; ++p) {
    function(layer.scores(b, g, p), n);
    if (header.has_visits != 0) function(layer.visits(b, g, p), n);
  }
  if (header.has_weights != 0) function(layer.novelty(b, g), n);
}

/// `slots`: of all graphs of a sequence.
std::int64_t bytes_of(const Header& header, std::int64_t slots) {
  const std::int64_t words_of_slot =
      1 + row_words(header) + header.populations * (1 + header.has_visits) + header.has_weights;
  return header.batch * (static_cast<std::int64_t>(sizeof(Sequence)) + slots * words_of_slot * 4);
}

void check_bytes(std::string_view what, std::int64_t expected, std::int64_t got, bool more) {
  if (more ? got >= expected : got == expected) return;
  throw_invalid(kOperation, what, std::to_string(expected) + (more ? " at least" : ""),
                std::to_string(got));
}

void check_header(const Header& header, const Header& mine, std::int64_t capacity) {
  const auto equal = [](std::string_view what, std::int64_t got, std::int64_t expected) {
    if (got != expected) {
      throw_invalid(kOperation, what, std::to_string(expected), std::to_string(got));
    }
  };
  if (header.magic != kMagic) {
    throw_invalid(kOperation, "the bytes", "those of a saved layer", "others");
  }
  equal("the version of the saved layer", header.version, mine.version);
  equal("its edge law", header.law, mine.law);
  equal("its top_k", header.top_k, mine.top_k);
  equal("its graphs a sequence", header.graphs, mine.graphs);
  equal("its number of populations", header.populations, mine.populations);
  equal("whether it holds visits", header.has_visits, mine.has_visits);
  equal("whether it holds restart weights", header.has_weights, mine.has_weights);
  if (format_of(mine) == RowFormat::slots) {
    equal("the format of its rows", header.format, mine.format);
  } else {
    check_range(kOperation, "the format of its rows", header.format,
                static_cast<std::int64_t>(RowFormat::wide),
                static_cast<std::int64_t>(RowFormat::packed));
  }
  check_range(kOperation, "its number of sequences", header.batch, 1, 1 << 20);
  check_range(kOperation, "its length", header.length, 0, capacity);
  check_range(kOperation, "its mark of order", header.ordered, 0, 1);
  check_range(kOperation, "its mark of restart weights", header.has_novelty, 0, header.has_weights);
}

void check_sequence(const Sequence& sequence) {
  check_range(kOperation, "tokens seen", sequence.seen, 0,
              std::numeric_limits<std::int32_t>::max());
  check_range(kOperation, "tokens walked", sequence.walked_at, -1, sequence.seen);
}

/// Returns the tokens that the graph holds.
std::int64_t check_positions(const std::int32_t* positions, const Header& header,
                             std::int64_t slots, std::int64_t seen) {
  std::vector<std::int32_t> held;
  for (std::int64_t slot = 0; slot < slots; ++slot) {
    check_range(kOperation, "a position", positions[slot], -1, seen - 1);
    if (positions[slot] >= 0) held.push_back(positions[slot]);
  }
  const bool ascends = std::is_sorted(held.begin(), held.end());
  std::sort(held.begin(), held.end());
  const bool unique = std::adjacent_find(held.begin(), held.end()) == held.end();
  if (!unique || (header.ordered != 0 && !ascends)) {
    throw_invalid(kOperation, "the positions of a graph",
                  header.ordered != 0 ? "unique and ascending" : "unique", "others");
  }
  return static_cast<std::int64_t>(held.size());
}

/// Checks a row of a graph with `slots` slots, and stores it.
void load_row(ConstRow saved, const Header& header, std::int64_t slots, Row row) {
  std::uint32_t before = 0;
  for (int k = 0; k < header.top_k; ++k) {
    check_range(kOperation, "a neighbour", saved.neighbor(k), -1, slots - 1);
    const std::uint32_t threshold = saved.has_thresholds() ? saved.threshold(k) : 0;
    if (threshold < before) {
      throw_invalid(kOperation, "the thresholds of a row", "ascending", "others");
    }
    before = threshold;
    row.set(k, saved.neighbor(k), threshold);
  }
}

}  // namespace

std::vector<std::uint8_t> save_layer(const GraphConfig& graph, const WalkConfig& walk,
                                     const CpuLayer& layer, const LayerState& state) {
  Header header = header_of(graph, walk);
  header.batch = state.batch;
  header.length = state.length;
  header.ordered = state.ordered ? 1 : 0;
  header.has_novelty = state.has_novelty ? 1 : 0;
  header.format = static_cast<std::int64_t>(layer.format());
  Writer writer;
  writer.put(&header, 1);
  for (std::int64_t g = 0; g < header.graphs; ++g) {
    const std::int64_t slots = state.extent(g);
    writer.put(&slots, 1);
  }
  for (std::size_t b = 0; b < state.seen.size(); ++b) {
    const Sequence sequence{state.seen[b], state.walked_at[b], state.walk_block[b]};
    writer.put(&sequence, 1);
  }
  for (std::int64_t b = 0; b < header.batch; ++b) {
    for (std::int64_t g = 0; g < header.graphs; ++g) {
      const std::int64_t n = state.extent(g);
      std::vector<std::uint32_t> rows(static_cast<std::size_t>(n * row_words(header)));
      for (std::int64_t slot = 0; slot < n; ++slot) {
        const Row saved{rows.data() + slot * row_words(header), layer.format(), graph.top_k};
        copy_row(layer.row(b, g, slot), saved, graph.top_k, n);  // truncate may leave stale edges
      }
      for_each_run(layer, header, rows.data(), n, b, g,
                   [&](const auto* values, std::int64_t count) { writer.put(values, count); });
    }
  }
  return writer.take();
}

LoadedLayer load_layer(const GraphConfig& graph, const WalkConfig& walk, std::int64_t capacity,
                       std::span<const std::int64_t> rooms, std::span<const std::uint8_t> saved) {
  Reader reader(saved);
  Header header;
  constexpr auto kHeaderBytes = static_cast<std::int64_t>(sizeof(Header));
  check_bytes("the bytes", kHeaderBytes, reader.left(), true);
  reader.get(&header, 1);
  check_header(header, header_of(graph, walk), capacity);
  check_bytes("the bytes behind the header", 8 * header.graphs, reader.left(), true);
  std::vector<std::int64_t> slots(static_cast<std::size_t>(header.graphs));
  reader.get(slots.data(), header.graphs);
  for (std::size_t g = 0; g < slots.size(); ++g) {
    check_range(kOperation, "the slots of a graph", slots[g], 0,
                std::min(header.length, rooms.empty() ? capacity : rooms[g]));
  }
  check_bytes("the bytes behind the numbers of slots",
              bytes_of(header, std::accumulate(slots.begin(), slots.end(), std::int64_t{0})),
              reader.left(), false);

  LoadedLayer loaded{.layer = CpuLayer(graph, walk, header.batch, capacity, rooms), .state = {}};
  LayerState& state = loaded.state;
  state.batch = header.batch;
  state.capacity = capacity;
  state.rooms.assign(rooms.begin(), rooms.end());
  state.length = header.length;
  state.ordered = header.ordered != 0 && !state.divided();
  state.has_novelty = header.has_novelty != 0;
  for (std::int64_t b = 0; b < header.batch; ++b) {
    Sequence sequence;
    reader.get(&sequence, 1);
    check_sequence(sequence);
    state.seen.push_back(sequence.seen);
    state.walked_at.push_back(sequence.walked_at);
    state.walk_block.push_back(sequence.walk_block);
  }
  for (std::int64_t b = 0; b < header.batch; ++b) {
    for (std::int64_t g = 0; g < header.graphs; ++g) {
      const std::int64_t n = slots[static_cast<std::size_t>(g)];
      std::vector<std::uint32_t> rows(static_cast<std::size_t>(n * row_words(header)));
      for_each_run(loaded.layer, header, rows.data(), n, b, g,
                   [&](auto* values, std::int64_t count) { reader.get(values, count); });
      const std::int32_t* positions = loaded.layer.positions(b, g);
      const std::int64_t held =
          check_positions(positions, header, n, state.seen[static_cast<std::size_t>(b)]);
      state.held.push_back(held);
      for (std::int64_t slot = 0; slot < n; ++slot) {
        load_row({rows.data() + slot * row_words(header), format_of(header), graph.top_k}, header,
                 n, loaded.layer.row(b, g, slot));
      }
      for (int p = 0; p < header.populations; ++p) {
        const float* scores = loaded.layer.scores(b, g, p);
        if (!std::all_of(scores, scores + n,
                         [](float score) { return std::isfinite(score) && score >= 0.0F; })) {
          throw_invalid(kOperation, "scores", "finite and non-negative", "others");
        }
      }
    }
  }
  if (header.ordered != 0 && !state.holds_alike()) {
    throw_invalid(kOperation, "the number of tokens of each graph of a sequence",
                  "the same where slots follow the text", "others");
  }
  return loaded;
}

}  // namespace spectralkv::detail
