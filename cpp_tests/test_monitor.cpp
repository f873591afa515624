#include <gtest/gtest.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "expect.h"
#include "feeder.h"
#include "graph.h"
#include "manager.h"
#include "reference.h"
#include "tensors.h"

namespace spectralkv::test {
namespace {

constexpr Index kHeads = 2;
constexpr Index kQueryHeads = 4;
constexpr Index kHeadDim = 8;

GraphConfig graph_config(Index batch, Index layers = 1) {
  return {.num_layers = layers,
          .batch_size = batch,
          .num_query_heads = kQueryHeads,
          .num_kv_heads = kHeads,
          .head_dim = kHeadDim,
          .capacity = 64,
          .seed = 3,
          .num_threads = 1};
}

MonitorConfig monitor_config(Index walk_interval = 0, Solver solver = Solver::walk) {
  return {.eviction = {.budget = 24, .interval = 8, .window = 8, .sinks = 4},
          .solver = solver,
          .walk_interval = walk_interval};
}

/// What one sequence says: keys and queries of its tokens.
struct Text {
  HostTensor keys{DType::f32, {kHeads, 200, kHeadDim}};
  HostTensor queries{DType::f32, {kQueryHeads, 200, kHeadDim}};

  explicit Text(std::uint64_t seed) {
    Random random(seed);
    keys.fill_normal(random);
    queries.fill_normal(random);
  }
};

/// An engine's loop over a batch of texts and one layer.
class Engine {
 public:
  Engine(std::vector<Text> texts, const MonitorConfig& config, const WalkConfig& walk = {},
         bool reuse = false)
      : monitor(graph_config(count_of(texts)), walk, config),
        texts_(std::move(texts)),
        next_(texts_.size(), 0),
        keys_(key_slab(monitor.graph().graph_config(), count_of(texts_))),
        reuse_(reuse) {}

  /// Prompts of these lengths, padded left, in chunks.
  void prefill(const std::vector<Index>& prompts, Index chunk = 1000) {
    const Index longest = *std::max_element(prompts.begin(), prompts.end());
    for (Index first = 0; first < longest; first += chunk) {
      const Index count = std::min(chunk, longest - first);
      HostTensor valid(DType::u8, {batch(), count});
      HostTensor queries(DType::f32, {batch(), kQueryHeads, count, kHeadDim});
      queries.fill(kNan);
      for (Index b = 0; b < batch(); ++b) {
        for (Index i = 0; i < count; ++i) {
          if (first + i < longest - prompts[at(b)]) continue;
          valid.set({b, i}, 1.0);
          for (Index h = 0; h < kQueryHeads; ++h) {
            for (Index d = 0; d < kHeadDim; ++d) {
              queries.set({b, h, i, d}, text_query(b, h, d));
            }
          }
          for (Index h = 0; h < kHeads; ++h) write_key(b, h, first + i);
          ++next_[at(b)];
        }
      }
      monitor.on_prefill(0, queries.view(), keys_.view(), {}, valid.view(), Stream{});
    }
    monitor.on_prefill_end(0, keys_.view(), Stream{});
  }

  /// One token a sequence: by on_step, or by the two calls that it stands for.
  void step(bool in_two_calls = false) {
    HostTensor slots(DType::i32, {batch(), kHeads});
    slots.fill(static_cast<double>(monitor.graph().length(0)));
    if (reuse_) monitor.graph().next_slots(0, slots.view(), Stream{});
    HostTensor query(DType::f32, {batch(), kQueryHeads, kHeadDim});
    for (Index b = 0; b < batch(); ++b) {
      for (Index h = 0; h < kQueryHeads; ++h) {
        for (Index d = 0; d < kHeadDim; ++d) query.set({b, h, d}, text_query(b, h, d));
      }
      for (Index h = 0; h < kHeads; ++h) write_key(b, h, slots.get_index({b, h}));
      ++next_[at(b)];
    }
    const ConstTensorView taken = reuse_ ? std::as_const(slots).view() : ConstTensorView{};
    if (in_two_calls) {
      monitor.graph().update(0, query.view(), keys_.view(), taken, {}, Stream{});
      monitor.renew_due(0, keys_.view(), Stream{});
    } else {
      monitor.on_step(0, query.view(), keys_.view(), taken, {}, Stream{});
    }
  }

  HostTensor keep() {
    HostTensor keep(DType::i32, {batch(), kHeads, monitor.kept_length(0)});
    monitor.keep(0, keys_.view(), keep.view(), Stream{});
    return keep;
  }

  void cut_if_full() {
    if (!monitor.is_full(0)) return;
    const HostTensor kept = keep();
    if (reuse_) {
      monitor.graph().release(0, kept.view(), Stream{});
    } else {
      monitor.graph().compact(0, kept.view(), keys_.view(), {}, Stream{});
    }
  }

  /// Positions that a head holds, in order.
  std::vector<Index> held(Index b, Index h) const {
    std::vector<Index> positions;
    for (const double position : read_positions(monitor.graph(), 0).vector({b, h})) {
      if (position >= 0.0) positions.push_back(static_cast<Index>(position));
    }
    std::sort(positions.begin(), positions.end());
    return positions;
  }

  Index batch() const { return count_of(texts_); }
  const HostTensor& keys() const { return keys_; }
  Index walks() const { return monitor.graph().statistics().walks; }

  Monitor monitor;

 private:
  double text_query(Index b, Index h, Index d) const {
    return texts_[at(b)].queries.get({h, next_[at(b)], d});
  }
  void write_key(Index b, Index h, Index slot) {
    for (Index d = 0; d < kHeadDim; ++d) {
      keys_.set({b, h, slot, d}, texts_[at(b)].keys.get({h, next_[at(b)], d}));
    }
  }

  std::vector<Text> texts_;
  std::vector<Index> next_;
  HostTensor keys_;
  bool reuse_;
};

TEST(Monitor, WalksEveryIntervalOfASequence) {
  Engine engine({Text(1), Text(2)}, monitor_config(4));
  engine.prefill({8, 4});
  EXPECT_EQ(engine.walks(), 2 * kHeads);
  for (int round = 1; round <= 3; ++round) {
    for (int i = 0; i < 3; ++i) engine.step();
    EXPECT_EQ(engine.walks(), round * 2 * kHeads);
    engine.step();
    EXPECT_EQ(engine.walks(), (round + 1) * 2 * kHeads);
  }
}

TEST(Monitor, RenewsWhatIsDueAfterTokensThatCameAnotherWay) {
  Engine one({Text(1), Text(2)}, monitor_config(4));
  Engine other({Text(1), Text(2)}, monitor_config(4));
  one.prefill({8, 4});
  other.prefill({8, 4});
  for (int i = 0; i < 9; ++i) {
    one.step();
    other.step(true);
    EXPECT_EQ(other.walks(), one.walks());
    EXPECT_EQ(other.monitor.graph().tokens_walked(0, 1), one.monitor.graph().tokens_walked(0, 1));
  }
  EXPECT_EQ(one.walks(), 3 * 2 * kHeads);
}

TEST(Monitor, WalksEveryIntervalWithoutAPrompt) {
  Engine engine({Text(1)}, monitor_config(4));
  for (int i = 1; i <= 20; ++i) {
    engine.step();
    EXPECT_EQ(engine.walks(), i / 4 * kHeads) << "after " << i << " tokens";
  }
}

TEST(Monitor, WalksAtTheCutOnlyWithoutAnInterval) {
  Engine engine({Text(1), Text(2)}, monitor_config(0));
  engine.prefill({20, 6});
  const Index at_start = engine.walks();
  EXPECT_EQ(at_start, 2 * kHeads);
  while (!engine.monitor.is_full(0)) engine.step();
  EXPECT_EQ(engine.walks(), at_start);
  EXPECT_EQ(engine.monitor.graph().tokens_held(0, 0), 32);
  EXPECT_EQ(engine.monitor.kept_length(0), 24);
  engine.keep();  // sequence 0 is full, the other one is not
  EXPECT_EQ(engine.walks(), at_start + kHeads);
  engine.keep();  // and nothing is new
  EXPECT_EQ(engine.walks(), at_start + kHeads);
  engine.cut_if_full();
  EXPECT_EQ(engine.walks(), at_start + kHeads);
  EXPECT_EQ(engine.monitor.graph().length(0), 24);
  EXPECT_EQ(engine.monitor.graph().tokens_held(0, 1), 18);
}

TEST(Monitor, SolvesExactlyWhenAsked) {
  Engine engine({Text(1)}, monitor_config(4, Solver::exact));
  engine.prefill({8});
  for (int i = 0; i < 4; ++i) engine.step();
  EXPECT_EQ(engine.walks(), 0);
  EXPECT_EQ(engine.monitor.graph().statistics().solves, 2 * kHeads);
}

TEST(Monitor, SolvesTheExactPopulations) {
  WalkConfig walk;
  walk.populations.back().solver = Solver::exact;
  Engine engine({Text(1)}, monitor_config(4), walk);
  engine.prefill({8});
  for (int i = 0; i < 4; ++i) engine.step();
  EXPECT_EQ(engine.walks(), 2 * kHeads);
  EXPECT_EQ(engine.monitor.graph().statistics().solves, 2 * kHeads);
}

TEST(Monitor, KeepsWhatTheManagerSelects) {
  Engine engine({Text(1), Text(2)}, monitor_config());
  engine.prefill({40, 30});
  EXPECT_TRUE(engine.monitor.is_full(0));
  EXPECT_EQ(engine.monitor.kept_length(0), 30);
  const HostTensor kept = engine.keep();
  HostTensor selected(DType::i32, {2, kHeads, 30});
  engine.monitor.graph().select(0, engine.monitor.config().eviction, false, selected.view(),
                                Stream{});
  EXPECT_EQ(kept.bytes(), selected.bytes());
  for (Index h = 0; h < kHeads; ++h) {
    const Vector first = kept.vector({0, h});
    EXPECT_EQ(std::count(first.begin(), first.end(), -1.0), 6);
  }
  engine.cut_if_full();
  EXPECT_FALSE(engine.monitor.is_full(0));
  EXPECT_EQ(engine.held(0, 0).size(), 24U);
  EXPECT_EQ(engine.held(1, 0).size(), 30U);
}

/// Runs a batch and each of its texts alone; at every token they must hold the same.
void expect_alike(const MonitorConfig& config, const WalkConfig& walk, bool reuse,
                  const std::vector<Index>& prompts, Index steps, Index chunk = 1000) {
  std::vector<Text> texts;
  for (Index b = 0; b < count_of(prompts); ++b) {
    texts.emplace_back(static_cast<std::uint64_t>(50 + b));
  }
  Engine batch(texts, config, walk, reuse);
  std::vector<Engine> alone;
  for (const Text& text : texts) alone.emplace_back(std::vector{text}, config, walk, reuse);
  batch.prefill(prompts, chunk);
  for (Index b = 0; b < count_of(prompts); ++b) alone[at(b)].prefill({prompts[at(b)]});
  for (Index step = 0; step <= steps; ++step) {
    batch.cut_if_full();
    for (Index b = 0; b < count_of(prompts); ++b) {
      Engine& single = alone[at(b)];
      single.cut_if_full();
      EXPECT_EQ(batch.monitor.graph().tokens_seen(0, b), single.monitor.graph().tokens_seen(0, 0));
      EXPECT_EQ(batch.monitor.graph().tokens_walked(0, b),
                single.monitor.graph().tokens_walked(0, 0));
      for (Index h = 0; h < kHeads; ++h) {
        ASSERT_EQ(batch.held(b, h), single.held(0, h))
            << "step " << step << ", sequence " << b << ", head " << h;
      }
    }
    batch.step();
    for (Engine& single : alone) single.step();
  }
  EXPECT_GT(batch.monitor.graph().statistics().evicted, 0);
}

TEST(Monitor, TreatsASequenceInABatchAsAlone) {
  for (const Solver solver : {Solver::walk, Solver::exact}) {
    for (const Index interval : {0, 3, 8}) {
      for (const bool reuse : {false, true}) {
        SCOPED_TRACE(::testing::Message() << "solver " << static_cast<int>(solver) << ", interval "
                                          << interval << ", reuse " << reuse);
        // Walks draw from the tokens in the order of their slots; when padding is reused that is
        // not the order of a sequence alone.
        const bool padded = solver == Solver::exact || !reuse;
        expect_alike(monitor_config(interval, solver), {}, reuse,
                     padded ? std::vector<Index>{30, 11, 40} : std::vector<Index>{30, 30}, 60);
      }
    }
  }
}

TEST(Monitor, TreatsASequenceInABatchAsAloneWhenScoresAccumulate) {
  const WalkConfig walk{.num_walkers = 256,
                        .decay = 0.7,
                        .populations = {{.restart = Restart::current, .count = VisitCount::all}}};
  expect_alike(monitor_config(4), walk, false, {25, 7}, 80);
}

TEST(Monitor, TreatsASequenceInABatchAsAloneWhereAllPopulationsWalk) {
  WalkConfig walk;
  for (Population& population : walk.populations) population.solver = Solver::walk;
  for (const Index interval : {0, 3}) {
    expect_alike(monitor_config(interval), walk, false, {30, 11, 40}, 60);
  }
}

TEST(Monitor, TakesPromptsInChunks) {
  for (const Index chunk : {1, 7, 16}) {
    expect_alike(monitor_config(), {}, false, {33, 20}, 10, chunk);
  }
}

TEST(Monitor, DrawsEveryNthPromptRow) {
  MonitorConfig config = monitor_config();
  config.row_stride = 4;
  Engine engine({Text(1)}, config);
  engine.prefill({21});
  EXPECT_EQ(engine.monitor.graph().statistics().rows_written, 6 * kHeads);
  engine.step();
  EXPECT_EQ(engine.monitor.graph().statistics().rows_written, 7 * kHeads);
}

TEST(Monitor, DrawsTheNewestPromptRows) {
  MonitorConfig config = monitor_config();
  config.prompt_rows = 3;
  config.row_stride = 2;
  MonitorConfig all = config;
  all.prompt_rows = 1000;
  for (const std::vector<Index>& prompts : {std::vector<Index>{21, 21}, {21, 15}}) {
    Engine few({Text(1), Text(2)}, config);
    Engine many({Text(1), Text(2)}, all);
    few.prefill(prompts);
    many.prefill(prompts);
    EXPECT_EQ(few.monitor.graph().statistics().rows_written, 2 * 3 * kHeads);
    EXPECT_EQ(few.monitor.graph().tokens_seen(0, 0), 21);
    EXPECT_EQ(few.monitor.graph().tokens_seen(0, 1), prompts[1]);
    const Graphs some = read_graphs(few.monitor.graph(), 0);
    const Graphs every = read_graphs(many.monitor.graph(), 0);
    for (std::size_t b = 0; b < some.size(); ++b) {
      for (std::size_t h = 0; h < some[b].size(); ++h) {
        EXPECT_EQ(some[b][h].positions, every[b][h].positions);
        for (std::size_t slot = 0; slot < 21; ++slot) {
          const bool drawn = slot >= 15 && (20 - slot) % 2 == 0;
          EXPECT_EQ(some[b][h].rows[slot], drawn ? every[b][h].rows[slot] : std::vector<Edge>{})
              << b << ' ' << h << ' ' << slot;
        }
      }
    }
  }
}

TEST(Monitor, RefusesLongPromptsWhole) {
  MonitorConfig config = monitor_config();
  config.prompt_rows = 3;
  Engine engine({Text(1)}, config);
  Monitor& monitor = engine.monitor;
  const Index capacity = monitor.graph().capacity(0);
  const HostTensor keys = key_slab(monitor.graph().graph_config(), 1);
  const auto prefill = [&](Index count, const ConstTensorView& seen, Index marks) {
    HostTensor queries(DType::f32, {1, kQueryHeads, count, kHeadDim});
    const HostTensor valid(DType::u8, {1, marks});
    monitor.on_prefill(0, queries.view(), seen, {}, valid.view(), Stream{});
  };
  ConstTensorView short_keys = keys.view();
  short_keys.shape[2] = 9;
  EXPECT_THROW(prefill(capacity + 1, keys.view(), capacity + 1), InvalidArgument);
  EXPECT_THROW(prefill(10, short_keys, 10), InvalidArgument);
  EXPECT_THROW(prefill(10, keys.view(), 9), InvalidArgument);
  EXPECT_EQ(monitor.graph().length(0), 0);
}

TEST(Monitor, DecodesInFixedSlots) {
  // With reuse no slot behind budget + interval is ever touched.
  Engine engine({Text(1), Text(2)}, monitor_config(), {}, true);
  engine.prefill({20, 20});
  for (int i = 0; i < 150; ++i) {
    engine.step();
    engine.cut_if_full();
    EXPECT_LE(engine.monitor.graph().length(0), 32);
    EXPECT_LT(engine.monitor.graph().tokens_held(0, 0), 32);
  }
  const std::vector<Index> held = engine.held(1, 1);
  for (Index i = 0; i < 4; ++i) EXPECT_EQ(held[at(i)], i);
  for (Index i = 0; i < 8; ++i) EXPECT_EQ(held[held.size() - 1 - at(i)], 169 - i);
}

TEST(Monitor, GivesTheSafetyMaskOfItsSettings) {
  MonitorConfig config = monitor_config();
  config.top_fraction = 0.5;
  Engine engine({Text(1)}, config);
  engine.prefill({40});
  HostTensor mine(DType::u8, {1, kHeads, 40});
  HostTensor managers(DType::u8, {1, kHeads, 40});
  engine.monitor.safety_mask(0, mine.view(), Stream{});
  engine.monitor.graph().safety_mask(0, config.eviction, 0.5, managers.view(), Stream{});
  EXPECT_EQ(mine.bytes(), managers.bytes());
  const Vector mask = mine.vector({0, 1});
  for (Index slot = 0; slot < 40; ++slot) {
    if (slot < 4 || slot >= 32) {
      EXPECT_EQ(mask[at(slot)], 0.0) << slot;
    }
  }
  EXPECT_GE(std::count(mask.begin(), mask.end(), 1.0), 8);
  EXPECT_LE(std::count(mask.begin(), mask.end(), 1.0), 20);
}

TEST(Monitor, FreesTheSlotsOfAFinishedSequence) {
  Monitor monitor(graph_config(2, 2), {}, monitor_config());
  for (Index layer = 0; layer < 2; ++layer) Feeder(monitor.graph(), layer, 5).prefill(20);
  monitor.on_finish(1);
  for (Index layer = 0; layer < 2; ++layer) {
    EXPECT_EQ(monitor.graph().tokens_held(layer, 0), 20);
    EXPECT_EQ(monitor.graph().tokens_held(layer, 1), 0);
    EXPECT_EQ(monitor.graph().tokens_seen(layer, 1), 0);
  }
  HostTensor slots(DType::i32, {2, kHeads});
  monitor.graph().next_slots(1, slots.view(), Stream{});
  EXPECT_EQ(slots.get({0, 0}), 20.0);
  EXPECT_EQ(slots.get({1, 0}), 0.0);
  EXPECT_FALSE(monitor.is_full(0));
}

TEST(Monitor, CanBeMoved) {
  Monitor first(graph_config(1), {}, monitor_config(5));
  Feeder(first.graph(), 0, 6).prefill(9);
  Monitor second = std::move(first);
  EXPECT_EQ(second.config().walk_interval, 5);
  EXPECT_EQ(std::as_const(second).graph().length(0), 9);
}

TEST(Monitor, ChecksItsSettings) {
  MonitorConfig config = monitor_config();
  config.walk_interval = -1;
  expect_invalid("MonitorConfig", [&] { Monitor(graph_config(1), {}, config); });
  config = monitor_config();
  config.eviction.window = 100;
  expect_invalid("EvictionConfig", [&] { Monitor(graph_config(1), {}, config); });
  GraphConfig graph = graph_config(1);
  graph.top_k = 5;
  expect_invalid("GraphConfig", [&] { Monitor(graph, {}, monitor_config()); });
}

}  // namespace
}  // namespace spectralkv::test
