#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <vector>

#include "expect.h"
#include "spectralkv/config.h"
#include "spectralkv/monitor.h"
#include "tensors.h"

namespace spectralkv::test {
namespace {

/// `config` with one field changed does not pass.
template <class Config, class Change>
void expect_bad(const char* operation, Config config, Change&& change,
                std::source_location where = std::source_location::current()) {
  change(config);
  expect_invalid(operation, [&] { config.validate(); }, where);
}

GraphConfig graph_config() {
  return {.num_query_heads = 8, .num_kv_heads = 2, .head_dim = 64, .capacity = 100};
}

TEST(Config, AcceptsItsDefaults) {
  EXPECT_NO_THROW(GraphConfig{}.validate());
  EXPECT_NO_THROW(graph_config().validate());
  EXPECT_NO_THROW(WalkConfig{}.validate());
  EXPECT_NO_THROW((EvictionConfig{.budget = 55}.validate()));
  EXPECT_NO_THROW((MonitorConfig{.eviction = {.budget = 55}}.validate()));
}

TEST(Config, RejectsBadGraphs) {
  const auto bad = [](auto change, std::source_location where = std::source_location::current()) {
    expect_bad("GraphConfig", graph_config(), change, where);
  };
  bad([](GraphConfig& config) { config.num_layers = 0; });
  bad([](GraphConfig& config) { config.num_layers = -1; });
  bad([](GraphConfig& config) { config.batch_size = 0; });
  bad([](GraphConfig& config) { config.num_query_heads = 0; });
  bad([](GraphConfig& config) { config.num_query_heads = 7; });
  bad([](GraphConfig& config) { config.num_query_heads = 1; });
  bad([](GraphConfig& config) { config.num_kv_heads = 0; });
  bad([](GraphConfig& config) { config.num_kv_heads = -2; });
  bad([](GraphConfig& config) { config.head_dim = 0; });
  bad([](GraphConfig& config) { config.head_dim = -64; });
  bad([](GraphConfig& config) { config.capacity = -1; });
  bad([](GraphConfig& config) { config.capacity = std::int64_t{1} << 40; });
  for (const int top_k : {-4, 0, 1, 2, 3, 5, 7, 9, 12, 24, 31, 33, 64}) {
    bad([&](GraphConfig& config) { config.top_k = top_k; });
  }
  bad([](GraphConfig& config) { config.num_sinks = -1; });
  bad([](GraphConfig& config) { config.head_offset = -1; });
  bad([](GraphConfig& config) { config.head_offset = 1; });
  bad([](GraphConfig& config) { config.total_kv_heads = 1; });
  bad([](GraphConfig& config) { config.total_kv_heads = -2; });
  bad([](GraphConfig& config) {
    config.total_kv_heads = 8;
    config.head_offset = 7;
  });
  bad([](GraphConfig& config) { config.num_threads = -1; });
  bad([](GraphConfig& config) { config.device.index = -1; });
}

TEST(Config, AcceptsEveryTopKAndPlaceAmongTheRanks) {
  for (const int top_k : {4, 8, 16, 32}) {
    GraphConfig config = graph_config();
    config.top_k = top_k;
    EXPECT_NO_THROW(config.validate());
  }
  for (const std::int64_t offset : {0, 2, 4, 6}) {
    GraphConfig config = graph_config();
    config.total_kv_heads = 8;
    config.head_offset = offset;
    EXPECT_NO_THROW(config.validate());
  }
}

TEST(Config, RejectsBadWalks) {
  const auto bad = [](auto change, std::source_location where = std::source_location::current()) {
    expect_bad("WalkConfig", WalkConfig{}, change, where);
  };
  bad([](WalkConfig& config) { config.num_walkers = 0; });
  bad([](WalkConfig& config) { config.num_walkers = -1; });
  bad([](WalkConfig& config) { config.walk_length = 0; });
  bad([](WalkConfig& config) { config.walk_length = -20; });
  for (const double restart_prob : {0.0, -0.1, 1.0000001, 2.0, kNan, kInfinity, -kInfinity}) {
    bad([&](WalkConfig& config) { config.restart_prob = restart_prob; });
  }
  for (const double decay : {-0.1, 1.0000001, kNan, kInfinity}) {
    bad([&](WalkConfig& config) { config.decay = decay; });
    bad([&](WalkConfig& config) { config.populations.back().decay = decay; });
  }
  for (const std::int64_t width : {-1, 0, 2, 4, 1024, 1025}) {
    bad([&](WalkConfig& config) { config.novelty_width = width; });
  }
  bad([](WalkConfig& config) { config.populations.clear(); });
  bad([](WalkConfig& config) {
    config.populations.assign(kMaxPopulations + 1, {.share = 1.0 / (kMaxPopulations + 1)});
  });
  for (const double share : {0.0, 0.4, 0.50001, 1.5, -0.5, kNan, kInfinity}) {
    bad([&](WalkConfig& config) { config.populations.front().share = share; });
  }
  bad([](WalkConfig& config) {  // they sum to 1
    config.populations.front().share = 1.5;
    config.populations.back().share = -0.5;
  });
  for (const double fraction : {-0.1, 1.1, kNan}) {
    bad([&](WalkConfig& config) { config.populations.front().recent_fraction = fraction; });
  }
  bad([](WalkConfig& config) { config.populations.front().recent_tokens = -1; });
  // Walkers are the unit of exact scores.
  for (std::size_t exact = 0; exact < 2; ++exact) {
    bad([&](WalkConfig& config) {
      config.num_walkers = 9;
      config.populations = {{.share = 0.1}, {.share = 0.9}};
      config.populations[exact].solver = Solver::exact;
    });
  }
}

TEST(Config, AcceptsWalksAtTheirLimits) {
  WalkConfig config;
  config.restart_prob = 1.0;
  config.decay = 1.0;
  EXPECT_NO_THROW(config.validate());
  config.novelty_width = 1;
  EXPECT_NO_THROW(config.validate());
  config.novelty_width = 1023;
  EXPECT_NO_THROW(config.validate());
  config.populations.front().decay = 0.0;
  config.populations.back().decay = 1.0;
  EXPECT_NO_THROW(config.validate());
  config.restart_prob = 1e-6;
  config.populations.front().share = 0.6000001;
  EXPECT_NO_THROW(config.validate());
  config.populations.assign(kMaxPopulations, {.share = 1.0 / kMaxPopulations});
  EXPECT_NO_THROW(config.validate());
  config.num_walkers = kMaxPopulations;
  config.populations.back().solver = Solver::exact;
  EXPECT_NO_THROW(config.validate());
}

TEST(Config, KnowsWhoNeedsNovelty) {
  WalkConfig config;
  EXPECT_TRUE(config.needs_novelty());
  config.populations = {{.restart = Restart::current, .share = 0.5},
                        {.restart = Restart::recent, .share = 0.5}};
  EXPECT_FALSE(config.needs_novelty());
}

TEST(Config, RejectsBadEvictions) {
  const EvictionConfig good{.budget = 13, .interval = 4, .window = 8, .sinks = 4};
  EXPECT_NO_THROW(good.validate());
  const auto bad = [&](auto change, std::source_location where = std::source_location::current()) {
    expect_bad("EvictionConfig", good, change, where);
  };
  bad([](EvictionConfig& config) { config.budget = 12; });
  bad([](EvictionConfig& config) { config.budget = 0; });
  bad([](EvictionConfig& config) { config.budget = -13; });
  bad([](EvictionConfig& config) { config.window = 9; });
  bad([](EvictionConfig& config) { config.sinks = 5; });
  bad([](EvictionConfig& config) { config.interval = -1; });
  bad([](EvictionConfig& config) { config.window = -1; });
  bad([](EvictionConfig& config) { config.sinks = -1; });
  bad([](EvictionConfig& config) { config.budget = std::numeric_limits<std::int64_t>::max(); });
}

TEST(Config, RejectsBadMonitors) {
  const MonitorConfig good{.eviction = {.budget = 13, .interval = 4, .window = 8, .sinks = 4}};
  EXPECT_NO_THROW(good.validate());
  const auto bad = [&](const char* operation, auto change,
                       std::source_location where = std::source_location::current()) {
    expect_bad(operation, good, change, where);
  };
  bad("EvictionConfig", [](MonitorConfig& config) { config.eviction.budget = 12; });
  bad("MonitorConfig", [](MonitorConfig& config) { config.walk_interval = -1; });
  bad("MonitorConfig", [](MonitorConfig& config) { config.row_stride = 0; });
  bad("MonitorConfig", [](MonitorConfig& config) { config.prompt_rows = 0; });
  for (const double fraction : {-0.1, 1.1, kNan}) {
    bad("MonitorConfig", [&](MonitorConfig& config) { config.top_fraction = fraction; });
  }
}

TEST(Config, HasPresets) {
  for (const char* name : {"default", "walks", "uniform32", "weighted4"}) {
    GraphConfig graph = graph_config();
    WalkConfig walk;
    apply_preset(name, graph, walk);
    EXPECT_NO_THROW(graph.validate()) << name;
    EXPECT_NO_THROW(walk.validate()) << name;
    EXPECT_EQ(graph.num_query_heads, 8) << name;
    EXPECT_EQ(graph.capacity, 100) << name;
  }
  GraphConfig graph;
  WalkConfig walk;
  apply_preset("walks", graph, walk);
  const WalkConfig defaults;
  ASSERT_EQ(walk.populations.size(), defaults.populations.size());
  for (std::size_t p = 0; p < walk.populations.size(); ++p) {
    EXPECT_EQ(walk.populations[p].solver, Solver::walk) << p;
    EXPECT_EQ(walk.populations[p].restart, defaults.populations[p].restart) << p;
    EXPECT_EQ(walk.populations[p].decay, defaults.populations[p].decay) << p;
    EXPECT_DOUBLE_EQ(walk.populations[p].share, defaults.populations[p].share) << p;
  }

  apply_preset("uniform32", graph, walk);
  EXPECT_EQ(graph.edge_law, EdgeLaw::uniform);
  EXPECT_EQ(graph.top_k, 32);
  EXPECT_DOUBLE_EQ(walk.restart_prob, 0.85);
  ASSERT_EQ(walk.populations.size(), 1U);
  EXPECT_EQ(walk.populations.front().restart, Restart::current);
  EXPECT_EQ(walk.populations.front().count, VisitCount::all);

  apply_preset("weighted4", graph, walk);
  EXPECT_EQ(graph.edge_law, EdgeLaw::weighted);
  EXPECT_EQ(graph.top_k, 4);
  EXPECT_DOUBLE_EQ(walk.restart_prob, 0.15);
  EXPECT_DOUBLE_EQ(walk.decay, 0.0);
  ASSERT_EQ(walk.populations.size(), 1U);
  EXPECT_EQ(walk.populations.front().restart, Restart::recent);
  EXPECT_EQ(walk.populations.front().count, VisitCount::edges);
  EXPECT_DOUBLE_EQ(walk.populations.front().recent_fraction, 0.1);

  apply_preset("default", graph, walk);
  EXPECT_EQ(graph.edge_law, EdgeLaw::weighted);
  EXPECT_EQ(graph.top_k, GraphConfig{}.top_k);
  EXPECT_DOUBLE_EQ(walk.restart_prob, WalkConfig{}.restart_prob);
  EXPECT_EQ(walk.populations.size(), WalkConfig{}.populations.size());
}

TEST(Config, RejectsUnknownPresets) {
  GraphConfig graph = graph_config();
  WalkConfig walk;
  graph.top_k = 16;
  walk.num_walkers = 77;
  for (const char* name : {"", "Default", "uniform", "weighted32"}) {
    expect_invalid("apply_preset", [&] { apply_preset(name, graph, walk); });
  }
  EXPECT_EQ(graph.top_k, 16);
  EXPECT_EQ(walk.num_walkers, 77);
}

}  // namespace
}  // namespace spectralkv::test
