#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "expect.h"
#include "feeder.h"
#include "graph.h"
#include "manager.h"
#include "reference.h"
#include "tensors.h"

namespace spectralkv::test {
namespace {

using Bytes8 = std::vector<std::uint8_t>;

GraphConfig graph_config(EdgeLaw law = EdgeLaw::weighted, Index batch = 2, bool pack = true) {
  return {.batch_size = batch,
          .num_query_heads = 4,
          .num_kv_heads = 2,
          .head_dim = 8,
          .capacity = 64,
          .edge_law = law,
          .pack_rows = pack,
          .seed = 3,
          .num_threads = 1};
}

const WalkConfig kWalk{.num_walkers = 200,
                       .decay = 0.5,
                       .populations = {{.share = 0.5, .recent_tokens = 20},
                                       {.restart = Restart::novelty, .share = 0.5, .decay = 0.0}}};
const EvictionConfig kEviction{.budget = 24, .interval = 8, .window = 8, .sinks = 2};

void walk(GraphManager& manager, Feeder& feeder) {
  manager.update_novelty(0, feeder.keys.view(), Stream{});
  manager.walk(0, {}, Stream{});
}

/// Everything but the counts since construction.
void expect_same(const GraphManager& expected, const GraphManager& actual) {
  const Snapshot want(expected);
  const Snapshot got(actual);
  constexpr std::ptrdiff_t kStatistics = 5;
  EXPECT_TRUE(std::equal(want.numbers.begin() + kStatistics, want.numbers.end(),
                         got.numbers.begin() + kStatistics, got.numbers.end()));
  EXPECT_EQ(want.tensors, got.tensors);
}

/// A manager whose graphs have seen all that can happen to them, and what feeds it.
struct Lived {
  GraphManager manager;
  Feeder feeder;

  explicit Lived(EdgeLaw law, const WalkConfig& walk_config = kWalk, bool pack = true)
      : manager(graph_config(law, 2, pack), walk_config), feeder(manager, 0, 5) {
    HostTensor valid(DType::u8, {2, 10});
    valid.fill(1);
    for (Index i = 0; i < 2; ++i) valid.set({0, i}, 0);
    feeder.prefill(10, valid.view());
    feeder.prefill(30);
    walk(manager, feeder);
    cut();
    for (int i = 0; i < 5; ++i) feeder.append();
    manager.truncate(0, 2);
    walk(manager, feeder);
  }

  void cut() {
    HostTensor keep(DType::i32, {2, 2, manager.kept_length(0, kEviction, true)});
    manager.select(0, kEviction, true, keep.view(), Stream{});
    manager.compact(0, keep.view(), feeder.keys.view(), {}, Stream{});
  }
};

class SavedLayerOfEveryLaw : public ::testing::TestWithParam<EdgeLaw> {};
INSTANTIATE_TEST_SUITE_P(Laws, SavedLayerOfEveryLaw, ::testing::ValuesIn(kEdgeLaws));

void expect_to_go_on(EdgeLaw law, const WalkConfig& walk_config) {
  Lived lived(law, walk_config);
  GraphManager loaded(graph_config(law), walk_config);
  loaded.load_layer(0, lived.manager.save_layer(0));
  expect_same(lived.manager, loaded);
  EXPECT_EQ(lived.manager.save_layer(0), loaded.save_layer(0));

  Feeder feeder(loaded, 0, 5);
  feeder.keys = lived.feeder.keys;
  feeder.random = lived.feeder.random;
  // Scores that were not forgotten and restart weights of before count on.
  loaded.walk(0, {}, Stream{});
  lived.manager.walk(0, {}, Stream{});
  expect_same(lived.manager, loaded);
  for (int i = 0; i < 6; ++i) {
    feeder.append();
    lived.feeder.append();
  }
  walk(loaded, feeder);
  walk(lived.manager, lived.feeder);
  expect_same(lived.manager, loaded);
}

TEST_P(SavedLayerOfEveryLaw, GoesOnAsIfNothingHadHappened) { expect_to_go_on(GetParam(), kWalk); }

TEST_P(SavedLayerOfEveryLaw, GoesOnWherePopulationsAreExact) {
  for (std::size_t exact = 0; exact < 2; ++exact) {
    WalkConfig walk = kWalk;
    walk.populations[exact].solver = Solver::exact;
    expect_to_go_on(GetParam(), walk);
  }
}

TEST(SavedLayer, KeepsFreeSlots) {
  Lived lived(EdgeLaw::weighted);
  const Index length = lived.manager.length(0);
  std::vector<Index> stay;
  for (Index slot = 0; slot < length; ++slot) {
    if (slot < 6 || slot >= 10) stay.push_back(slot);
  }
  const HostTensor keep = keep_tensor(std::vector(2, std::vector(2, stay)));
  lived.manager.release(0, keep.view(), Stream{});
  GraphManager loaded(graph_config(), kWalk);
  loaded.load_layer(0, lived.manager.save_layer(0));
  Feeder feeder(loaded, 0, 5);
  feeder.keys = lived.feeder.keys;
  feeder.random = lived.feeder.random;
  EXPECT_EQ(feeder.reuse().bytes(), lived.feeder.reuse().bytes());
  expect_same(lived.manager, loaded);
}

TEST(SavedLayer, BringsItsNumberOfSequences) {
  Lived lived(EdgeLaw::weighted);
  GraphManager loaded(graph_config(EdgeLaw::weighted, 5), kWalk);
  loaded.load_layer(0, lived.manager.save_layer(0));
  expect_same(lived.manager, loaded);
}

TEST(SavedLayer, MayBeEmpty) {
  GraphManager fresh(graph_config(), kWalk);
  Lived lived(EdgeLaw::weighted);
  lived.manager.load_layer(0, fresh.save_layer(0));
  EXPECT_EQ(lived.manager.length(0), 0);
  EXPECT_EQ(lived.manager.tokens_seen(0, 1), 0);
}

TEST(SavedLayer, OfOthersIsRejected) {
  Lived lived(EdgeLaw::weighted);
  const Bytes8 saved = lived.manager.save_layer(0);
  const auto rejected = [&](GraphConfig graph, const WalkConfig& walk) {
    GraphManager other(graph, walk);
    expect_rejected(other, "load_layer", [&] { other.load_layer(0, saved); });
  };
  rejected(graph_config(EdgeLaw::uniform), kWalk);
  GraphConfig graph = graph_config();
  graph.top_k = 16;
  rejected(graph, kWalk);
  graph = graph_config();
  graph.scope = GraphScope::layer;
  rejected(graph, kWalk);
  graph = graph_config();
  graph.capacity = lived.manager.length(0) - 1;
  rejected(graph, kWalk);
  rejected(graph_config(), {.decay = 0.5, .populations = {{.recent_tokens = 20}}});
  WalkConfig forgetful = kWalk;
  forgetful.decay = 0.0;
  rejected(graph_config(), forgetful);
}

class SavedLayerOfEveryFormat : public ::testing::TestWithParam<bool> {};
INSTANTIATE_TEST_SUITE_P(Packed, SavedLayerOfEveryFormat, ::testing::Bool());

TEST_P(SavedLayerOfEveryFormat, DamagedIsRejected) {
  const bool pack = GetParam();
  Lived lived(EdgeLaw::weighted, kWalk, pack);
  const Bytes8 saved = lived.manager.save_layer(0);
  GraphManager other(graph_config(), kWalk);
  const auto rejected = [&](const Bytes8& bytes) {
    expect_rejected(other, "load_layer", [&] { other.load_layer(0, bytes); });
  };
  rejected({});
  rejected(Bytes8(saved.begin(), saved.end() - 1));
  rejected(Bytes8(saved.size(), 7));
  Bytes8 longer = saved;
  longer.push_back(0);
  rejected(longer);

  // Any number of it that is out of range: format, sequences, positions, neighbours, thresholds,
  // scores.
  const auto with = [&](std::size_t offset, std::int32_t value) {
    Bytes8 bytes = saved;
    std::memcpy(bytes.data() + offset, &value, sizeof(value));
    return bytes;
  };
  constexpr std::size_t kFormat = 8 * 8;
  constexpr std::size_t kHeader = 13 * 8;
  const std::size_t row = 4 * (pack ? 8 : 16);
  const std::size_t slots = 8 * static_cast<std::size_t>(lived.manager.graphs_per_sequence());
  constexpr std::size_t kSequences = 2 * 3 * 8;
  const auto length = static_cast<std::size_t>(lived.manager.length(0));
  const std::size_t positions = kHeader + slots + kSequences;
  const std::size_t rows = positions + 4 * length;
  const std::size_t last_row = rows + row * (length - 1);
  const std::size_t scores = rows + row * length;
  ASSERT_EQ(saved[kFormat], pack ? 2 : 1);
  for (const std::int32_t format : {-1, 0, 3, 256, pack ? 1 : 2}) rejected(with(kFormat, format));
  rejected(with(kHeader, -5));  // slots of a graph
  rejected(with(kHeader, 1));   // fewer than there are
  rejected(with(kHeader + slots, -5));
  rejected(with(positions + 4 * (length - 1), 1 << 20));
  rejected(with(positions + 4 * (length - 1), 3));
  rejected(with(last_row, static_cast<std::int32_t>(length)));
  rejected(with(last_row, -2));
  // The first edge of a token with several gets all there is.
  rejected(pack ? with(last_row, static_cast<std::int32_t>(0xffff0000))
                : with(last_row + 4 * 8, -1));
  rejected(with(scores, static_cast<std::int32_t>(0x7fc00000)));
}

}  // namespace
}  // namespace spectralkv::test
