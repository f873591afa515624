// Expectations that several test files share.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <exception>
#include <regex>
#include <source_location>
#include <string>
#include <string_view>
#include <vector>

#include "graph.h"
#include "manager.h"
#include "spectralkv/error.h"
#include "tensors.h"

namespace spectralkv::test {

/// Packed rows hold cumulative probabilities in units of so much, each rounded to the nearest: a
/// probability, the difference of two, changes by one unit at most. Where rows of two managers are
/// rounded apart from each other it is twice that.
inline constexpr double kPackedTolerance = 0x10001p-32;

/// What packing may change in a probability of a row, before stale edges are left out.
inline double packing_error(const GraphConfig& config) {
  const bool is_packed =
      config.pack_rows && config.edge_law != EdgeLaw::uniform && config.capacity <= 65535;
  return is_packed ? kPackedTolerance : 0.0;
}

/// All that a manager tells about itself, as bytes: equal snapshots mean that nothing changed.
struct Snapshot {
  std::vector<Index> numbers;
  std::vector<Bytes> tensors;

  explicit Snapshot(const GraphManager& manager) {
    const Statistics statistics = manager.statistics();
    numbers = {statistics.rows_written, statistics.rows_nonfinite, statistics.walks,
               statistics.solves, statistics.evicted};
    const int populations = static_cast<int>(manager.walk_config().populations.size());
    for (Index layer = 0; layer < manager.graph_config().num_layers; ++layer) {
      numbers.insert(numbers.end(),
                     {manager.length(layer), manager.capacity(layer), manager.batch_size(layer)});
      for (Index b = 0; b < manager.batch_size(layer); ++b) {
        numbers.insert(numbers.end(), {manager.tokens_seen(layer, b), manager.tokens_held(layer, b),
                                       manager.tokens_walked(layer, b)});
      }
      tensors.push_back(read_positions(manager, layer).bytes());
      const RawRows rows = read_raw_rows(manager, layer);
      tensors.push_back(rows.neighbors.bytes());
      tensors.push_back(rows.probabilities.bytes());
      for (int population = -1; population < populations; ++population) {
        tensors.push_back(read_scores(manager, layer, population).bytes());
        if (population < 0) continue;
        tensors.push_back(read_visits(manager, layer, population).bytes());
      }
    }
  }

  friend bool operator==(const Snapshot&, const Snapshot&) = default;
};

/// `call` throws InvalidArgument that reads "[operation] ... must be ..., got ...".
template <class Call>
void expect_invalid(std::string_view operation, Call&& call,
                    std::source_location where = std::source_location::current()) {
  const ::testing::ScopedTrace trace(where.file_name(), static_cast<int>(where.line()),
                                     "expect_invalid");
  try {
    call();
    ADD_FAILURE() << "[" << operation << "] nothing was thrown";
  } catch (const InvalidArgument& error) {
    const std::string message = error.what();
    EXPECT_EQ(message.rfind("[" + std::string(operation) + "] ", 0), 0U) << message;
    EXPECT_TRUE(std::regex_match(message, std::regex(R"(\[\w+\] .+ must be .+, got .+)")))
        << message;
  } catch (const std::exception& error) {
    ADD_FAILURE() << "another error was thrown: " << error.what();
  }
}

/// The same, and `manager` is as it was.
template <class Call>
void expect_rejected(const GraphManager& manager, std::string_view operation, Call&& call,
                     std::source_location where = std::source_location::current()) {
  const Snapshot before(manager);
  expect_invalid(operation, call, where);
  EXPECT_TRUE(before == Snapshot(manager))
      << "state changed, line " << where.line() << " of " << where.file_name();
}

/// Rows hold live, older tokens that are no sinks, each once; probabilities sum to 1, or to less
/// under EdgeLaw::attention.
inline void expect_sound(const Graph& graph, Index num_sinks, EdgeLaw law = EdgeLaw::weighted) {
  for (Index slot = 0; slot < graph.length(); ++slot) {
    const std::vector<Edge>& row = graph.rows[at(slot)];
    if (row.empty()) continue;
    EXPECT_TRUE(graph.live(slot)) << "slot " << slot;
    double sum = 0.0;
    std::vector<Index> targets;
    for (const Edge& edge : row) {
      ASSERT_LT(edge.slot, graph.length()) << "slot " << slot;
      EXPECT_GE(graph.positions[at(edge.slot)], num_sinks) << "slot " << slot;
      EXPECT_LT(graph.positions[at(edge.slot)], graph.positions[at(slot)]) << "slot " << slot;
      EXPECT_GE(edge.probability, 0.0) << "slot " << slot;
      sum += edge.probability;
      targets.push_back(edge.slot);
    }
    if (law == EdgeLaw::attention) {
      EXPECT_LT(sum, 1.0 + 2e-6) << "slot " << slot;
    } else {
      EXPECT_NEAR(sum, 1.0, 2e-6) << "slot " << slot;
    }
    std::sort(targets.begin(), targets.end());
    EXPECT_EQ(std::adjacent_find(targets.begin(), targets.end()), targets.end()) << "slot " << slot;
  }
}

/// The same edges, in any order, with probabilities that differ by `tolerance` at most. Where rows
/// are packed an edge that is nearly never followed may be missing.
inline void expect_same_row(std::vector<Edge> expected, std::vector<Edge> actual,
                            double tolerance) {
  if (tolerance >= kPackedTolerance) {
    const auto drop_unless_in = [&](const std::vector<Edge>& other, std::vector<Edge>& row) {
      std::erase_if(row, [&](const Edge& edge) {
        return edge.probability <= tolerance &&
               std::none_of(other.begin(), other.end(),
                            [&](const Edge& same) { return same.slot == edge.slot; });
      });
    };
    drop_unless_in(actual, expected);
    drop_unless_in(expected, actual);
  }
  const auto by_slot = [](const Edge& a, const Edge& b) { return a.slot < b.slot; };
  std::sort(expected.begin(), expected.end(), by_slot);
  std::sort(actual.begin(), actual.end(), by_slot);
  ASSERT_EQ(expected.size(), actual.size());
  for (std::size_t i = 0; i < expected.size(); ++i) {
    EXPECT_EQ(expected[i].slot, actual[i].slot) << "edge " << i;
    EXPECT_NEAR(expected[i].probability, actual[i].probability, tolerance) << "edge " << i;
  }
}

inline void expect_same_graph(const Graph& expected, const Graph& actual, double tolerance) {
  ASSERT_EQ(expected.positions, actual.positions);
  for (Index slot = 0; slot < expected.length(); ++slot) {
    SCOPED_TRACE(::testing::Message() << "row " << slot);
    expect_same_row(expected.rows[at(slot)], actual.rows[at(slot)], tolerance);
  }
}

}  // namespace spectralkv::test
