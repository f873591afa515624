// What the two backends must do alike to the last bit: both get the same calls.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <tuple>
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

WalkConfig walk_config(double decay, std::optional<double> own_decay = std::nullopt) {
  return {.num_walkers = 333,
          .walk_length = 15,
          .restart_prob = 0.4,
          .decay = decay,
          .populations = {{.share = 0.3, .recent_fraction = 0.3, .decay = own_decay},
                          {.restart = Restart::novelty, .count = VisitCount::all, .share = 0.3},
                          {.restart = Restart::current, .count = VisitCount::all, .share = 0.2},
                          {.restart = Restart::novelty, .share = 0.2}}};
}

/// A manager of each backend, and the same calls to both.
class Pair {
 public:
  Pair(const GraphConfig& graph, const WalkConfig& walk)
      : cpu_(graph, walk), managers_{GraphManager(cpu_), GraphManager(graph, walk)} {}

  template <class Call>
  void both(Call&& call) {
    for (GraphManager& manager : managers_) call(manager);
  }
  /// `call(manager, out)` writes the same bytes with both; returns them.
  template <class Call>
  HostTensor same(const HostTensor& out, Call&& call) {
    std::vector<HostTensor> written(2, out);
    for (std::size_t i = 0; i < 2; ++i) call(managers_[i], written[i]);
    EXPECT_TRUE(written[0].bytes() == written[1].bytes());
    return written[0];
  }
  void expect_same_state(const std::string& after) {
    const Snapshot expected(managers_[0]);
    const Snapshot actual(managers_[1]);
    EXPECT_EQ(expected.numbers, actual.numbers) << "after " << after;
    ASSERT_EQ(expected.tensors.size(), actual.tensors.size()) << "after " << after;
    for (std::size_t i = 0; i < expected.tensors.size(); ++i) {
      EXPECT_TRUE(expected.tensors[i] == actual.tensors[i])
          << "tensor " << i << " of " << expected.tensors.size() << " after " << after;
    }
  }

  const GraphManager& cpu() const { return managers_[0]; }
  const GraphManager& cuda() const { return managers_[1]; }

 private:
  spectralkv::GraphManager cpu_;
  std::array<GraphManager, 2> managers_;
};

/// A whole life of a manager, step by random step. New tokens have queries that are not finite:
/// their rows are empty, so that no rounding of an attention decides where a walk goes.
class Life {
 public:
  Life(const GraphConfig& graph, const WalkConfig& walk, std::uint64_t seed)
      : random_(seed), pair_(graph, walk), config_(graph) {
    for (Index layer = 0; layer < config_.num_layers; ++layer) load(layer, random_.integer(1, 90));
  }

  void step() {
    const Index layer = random_.integer(0, config_.num_layers - 1);
    switch (random_.integer(0, 10)) {
      case 0:
        return load(layer, random_.integer(1, config_.capacity));
      case 1:
        return append(layer);
      case 2:
        return prefill(layer);
      case 3:
      case 4:
        return walk(layer);
      case 5:
        return cut(layer, true);
      case 6:
        return cut(layer, false);
      case 7:
        return reuse(layer);
      case 8:
        return rearrange(layer);
      case 9:
        return swap(layer);
      default:
        return truncate(layer);
    }
  }

 private:
  Index batch(Index layer) const { return pair_.cpu().batch_size(layer); }
  Index length(Index layer) const { return pair_.cpu().length(layer); }
  bool has_room(Index layer) const {
    for (Index b = 0; b < batch(layer); ++b) {
      if (pair_.cpu().tokens_held(layer, b) == config_.capacity) return false;
    }
    return true;
  }
  HostTensor keys(Index layer) {
    HostTensor keys(DType::f16,
                    {batch(layer), config_.num_kv_heads, config_.capacity, config_.head_dim});
    keys.fill_normal(random_);
    return keys;
  }
  HostTensor queries(Index layer, std::vector<Index> tokens) const {
    std::vector<Index> shape{batch(layer), config_.num_query_heads};
    shape.insert(shape.end(), tokens.begin(), tokens.end());
    shape.push_back(config_.head_dim);
    HostTensor queries(DType::f16, shape);
    queries.fill(kNan);
    return queries;
  }
  void renew(Index layer) {
    if (!pair_.cpu().walk_config().needs_novelty()) return;
    HostTensor weights(DType::u32,
                       {batch(layer), pair_.cpu().graphs_per_sequence(), length(layer)});
    weights.for_each([&](const std::vector<Index>& index) {
      weights.set(index, static_cast<double>(random_.integer(0, 1 << 20)));
    });
    pair_.both([&](GraphManager& manager) { manager.load_restart_weights(layer, weights.view()); });
  }

  void load(Index layer, Index slots) {
    Graphs graphs;
    for (Index b = 0; b < batch(layer); ++b) {
      const Index tokens = random_.integer(1, slots);
      const Index seen = tokens + random_.integer(0, 50);
      graphs.emplace_back();
      for (Index g = 0; g < pair_.cpu().graphs_per_sequence(); ++g) {
        graphs.back().push_back(random_graph(random_,
                                             {.slots = slots,
                                              .tokens = tokens,
                                              .seen = seen,
                                              .num_sinks = config_.num_sinks,
                                              .dead_ends = 0.1},
                                             config_.top_k, config_.edge_law));
      }
    }
    pair_.both([&](GraphManager& manager) { load_graphs(manager, layer, graphs); });
    renew(layer);
    pair_.expect_same_state("load_rows");
  }

  void append(Index layer) {
    if (length(layer) == config_.capacity) return;
    const HostTensor cache = keys(layer);
    if (random_.chance(0.25)) {
      const HostTensor block = queries(layer, {1});
      pair_.both([&](GraphManager& manager) {
        manager.update_rows(layer, block.view(), cache.view(),
                            {.score = {}, .valid = {}, .row_stride = 0}, Stream{});
      });
      pair_.expect_same_state("update_rows without a row");
      return;
    }
    const HostTensor query = queries(layer, {});
    pair_.both([&](GraphManager& manager) {
      manager.update(layer, query.view(), cache.view(), {}, {}, Stream{});
    });
    pair_.expect_same_state("update");
  }

  void prefill(Index layer) {
    const Index count = std::min(random_.integer(0, 20), config_.capacity - length(layer));
    const HostTensor cache = keys(layer);
    const HostTensor block = queries(layer, {count});
    HostTensor valid(DType::u8, {batch(layer), count});
    for (Index b = 0; b < batch(layer); ++b) {
      const Index padding = random_.integer(0, count);
      for (Index i = padding; i < count; ++i) valid.set({b, i}, 1);
    }
    const Index stride = random_.integer(0, 4);
    pair_.both([&](GraphManager& manager) {
      manager.update_rows(layer, block.view(), cache.view(),
                          {.score = {}, .valid = valid.view(), .row_stride = stride}, Stream{});
    });
    pair_.expect_same_state("update_rows");
  }

  void walk(Index layer) {
    if (pair_.cpu().walk_config().needs_novelty()) {
      for (Index l = 0; l < config_.num_layers; ++l) renew(l);
    }
    std::vector<std::uint8_t> marks(at(batch(layer)));
    for (std::uint8_t& mark : marks) mark = random_.chance(0.7) ? 1 : 0;
    const bool all = random_.chance(0.5);
    pair_.both([&](GraphManager& manager) {
      if (all) {
        manager.walk(kAllLayers, {}, Stream{});
      } else {
        manager.walk(layer, marks, Stream{});
      }
    });
    pair_.expect_same_state("walk");
    if (length(layer) == 0) return;
    for (int p = 0; p < count_of(pair_.cpu().walk_config().populations); ++p) {
      EXPECT_TRUE(read_restart(pair_.cpu(), layer, p).bytes() ==
                  read_restart(pair_.cuda(), layer, p).bytes());
    }
  }

  void cut(Index layer, bool compacts) {
    EvictionConfig eviction{.budget = 0,
                            .interval = random_.integer(1, 8),
                            .window = random_.integer(0, 10),
                            .sinks = random_.integer(0, 4)};
    eviction.budget = eviction.window + eviction.sinks + random_.integer(1, 30);
    const bool force = random_.chance(0.5);
    const Index kept_length = pair_.cpu().kept_length(layer, eviction, force);
    const Index heads = config_.num_kv_heads;
    pair_.same(HostTensor(DType::u8, {batch(layer), heads, length(layer)}, {1, 0, 2}, 3),
               [&](const GraphManager& manager, HostTensor& out) {
                 manager.safety_mask(layer, eviction, 0.3, out.view(), Stream{});
               });
    const HostTensor keep =
        pair_.same(HostTensor(DType::i32, {batch(layer), heads, kept_length}, {1, 0, 2}, 2),
                   [&](const GraphManager& manager, HostTensor& out) {
                     manager.select(layer, eviction, force, out.view(), Stream{});
                   });
    const std::vector<Index> kept = pair_.cpu().kept_counts(layer, eviction, force);
    const bool told = random_.chance(0.5);
    const std::span<const Index> counts =
        told ? std::span<const Index>(kept) : std::span<const Index>();
    if (!compacts) {
      pair_.both(
          [&](GraphManager& manager) { manager.release(layer, keep.view(), Stream{}, counts); });
      return pair_.expect_same_state("release");
    }
    HostTensor moved(random_.chance(0.5) ? DType::bf16 : DType::u8,
                     {batch(layer), heads, length(layer) + 2, random_.integer(1, 40)}, {2, 0, 1, 3},
                     random_.integer(0, 3));
    moved.fill_bits(random_);
    HostTensor others(DType::f32, {batch(layer), heads, config_.capacity, 32});
    others.fill_bits(random_);
    std::vector<HostTensor> values(2, others);
    std::size_t next = 0;
    pair_.same(moved, [&](GraphManager& manager, HostTensor& out) {
      manager.compact(layer, keep.view(), out.view(), values[next++].view(), Stream{}, counts);
    });
    EXPECT_TRUE(values[0].bytes() == values[1].bytes());
    pair_.expect_same_state("compact");
  }

  void reuse(Index layer) {
    if (!has_room(layer)) return;
    const HostTensor slots =
        pair_.same(HostTensor(DType::i32, {batch(layer), config_.num_kv_heads}),
                   [&](const GraphManager& manager, HostTensor& out) {
                     manager.next_slots(layer, out.view(), Stream{});
                   });
    const HostTensor cache = keys(layer);
    const HostTensor query = queries(layer, {});
    pair_.both([&](GraphManager& manager) {
      manager.update(layer, query.view(), cache.view(), slots.view(), {}, Stream{});
    });
    pair_.expect_same_state("update into free slots");
  }

  void rearrange(Index layer) {
    if (random_.chance(0.3)) {
      const Index sequence = random_.integer(0, batch(layer) - 1);
      pair_.both([&](GraphManager& manager) { manager.reset(layer, sequence); });
      return pair_.expect_same_state("reset");
    }
    std::vector<Index> sequences(at(random_.integer(1, 3)));
    for (Index& sequence : sequences) sequence = random_.integer(0, batch(layer) - 1);
    // A walk of all layers takes marks of one number of sequences.
    pair_.both([&](GraphManager& manager) { manager.select_batch(layer, sequences); });
    pair_.expect_same_state("select_batch");
  }

  void truncate(Index layer) {
    const Index count = std::min(random_.integer(0, 5), length(layer));
    std::vector<bool> threw;
    pair_.both([&](GraphManager& manager) {
      try {
        manager.truncate(layer, count);
        threw.push_back(false);
      } catch (const InvalidArgument&) {  // some were evicted
        threw.push_back(true);
      }
    });
    EXPECT_EQ(threw[0], threw[1]);
    pair_.expect_same_state("truncate");
  }

  /// Each goes on from what the other saved.
  void swap(Index layer) {
    std::vector<std::vector<std::uint8_t>> saved;
    pair_.both([&](GraphManager& manager) { saved.push_back(manager.save_layer(layer)); });
    pair_.both([&](GraphManager& manager) {
      manager.load_layer(layer, saved.back());
      saved.pop_back();
    });
    pair_.expect_same_state("load_layer");
  }

  Random random_;
  Pair pair_;
  GraphConfig config_;
};

void live(GraphConfig graph, const WalkConfig& walk, std::uint64_t seed, int steps) {
  Life life(graph, walk, seed);
  for (int i = 0; i < steps; ++i) {
    SCOPED_TRACE(::testing::Message() << "step " << i);
    life.step();
    if (::testing::Test::HasFailure()) return;
  }
}

TEST(BackendsAgree, OnTheLivesOfManagers) {
  std::uint64_t seed = 1;
  for (const GraphScope scope : {GraphScope::head, GraphScope::layer}) {
    for (const EdgeLaw law : kEdgeLaws) {
      for (const int top_k : {4, 8, 16, 32}) {
        constexpr std::array kDecays{0.0, 0.7, 1.0};
        const double decay = kDecays[seed % kDecays.size()];
        std::optional<double> own_decay;
        if (seed % 2 != 0) own_decay = 0.9;
        SCOPED_TRACE(::testing::Message()
                     << "scope " << static_cast<int>(scope) << ", law " << static_cast<int>(law)
                     << ", top_k " << top_k << ", decay " << decay);
        live({.num_layers = 3,
              .batch_size = 2,
              .num_query_heads = 4,
              .num_kv_heads = 2,
              .head_dim = 8,
              .capacity = 100,
              .top_k = top_k,
              .edge_law = law,
              .pack_rows = seed % 3 != 0,
              .scope = scope,
              .num_sinks = static_cast<Index>(seed % 5),
              .seed = seed,
              .head_offset = static_cast<Index>(seed % 2) * 6,
              .total_kv_heads = seed % 2 != 0 ? 16 : 0,
              .num_threads = 1},
             walk_config(decay, own_decay), seed, 40);
        ++seed;
        if (HasFailure()) return;
      }
    }
  }
}

TEST(BackendsAgree, OnPresets) {
  for (const char* preset : {"default", "uniform32", "weighted4"}) {
    SCOPED_TRACE(preset);
    GraphConfig graph{.num_layers = 2,
                      .batch_size = 3,
                      .num_query_heads = 4,
                      .num_kv_heads = 4,
                      .head_dim = 16,
                      .capacity = 200,
                      .seed = 7,
                      .num_threads = 1};
    WalkConfig walk;
    apply_preset(preset, graph, walk);
    // Bit for bit, which what is solved exactly is not: see OnSolvesToRounding.
    for (Population& population : walk.populations) population.solver = Solver::walk;
    live(graph, walk, 1000, 60);
  }
}

/// Every token follows random older ones, nearer ones more often; some slots are empty. Under
/// EdgeLaw::attention a third is left over.
Graph long_graph(Random& random, Index slots, int top_k, Index num_sinks, bool in_order,
                 EdgeLaw law = EdgeLaw::weighted) {
  const double kept = law == EdgeLaw::attention ? 2.0 / 3.0 : 1.0;
  Graph graph = plain_graph(slots);
  if (!in_order) random.shuffle(graph.positions);
  std::vector<Index> slot_of(at(slots));
  for (Index slot = 0; slot < slots; ++slot) slot_of[at(graph.positions[at(slot)])] = slot;
  for (Index position = num_sinks + 1; position < slots; ++position) {
    std::vector<Index> older;
    for (int k = 0; k < top_k; ++k) {
      const double near = random.uniform() * random.uniform();
      older.push_back(position - 1 -
                      static_cast<Index>(near * static_cast<double>(position - num_sinks)));
    }
    std::sort(older.begin(), older.end());
    older.erase(std::unique(older.begin(), older.end()), older.end());
    std::vector<Edge>& row = graph.rows[at(slot_of[at(position)])];
    for (const Index other : older) {
      row.push_back({slot_of[at(other)], kept / static_cast<double>(older.size())});
    }
  }
  return graph;
}

class BackendsAgreeOnLength : public ::testing::TestWithParam<std::tuple<Index, EdgeLaw>> {};

TEST_P(BackendsAgreeOnLength, WalksAndCuts) {
  const auto [slots, law] = GetParam();
  Random random(static_cast<std::uint64_t>(slots));
  for (const bool in_order : {true, false}) {
    SCOPED_TRACE(in_order);
    const GraphConfig config{.num_layers = 2,
                             .num_query_heads = 2,
                             .num_kv_heads = 2,
                             .head_dim = 8,
                             .capacity = slots + 4,
                             .edge_law = law,
                             .seed = 5,
                             .num_threads = 2};
    Pair pair(config, {.num_walkers = 4096,
                       .walk_length = 20,
                       .decay = in_order ? 0.0 : 0.5,
                       .populations = {
                           {.share = 0.5},
                           {.restart = Restart::novelty, .count = VisitCount::all, .share = 0.5}}});
    for (Index layer = 0; layer < 2; ++layer) {
      Graphs graphs(1);
      for (int g = 0; g < 2; ++g) {
        graphs[0].push_back(
            long_graph(random, slots, config.top_k, config.num_sinks, in_order, law));
      }
      HostTensor weights(DType::u32, {1, 2, slots});
      weights.for_each([&](const std::vector<Index>& index) {
        weights.set(index, static_cast<double>(random.integer(0, 1 << 20)));
      });
      pair.both([&](GraphManager& manager) {
        load_graphs(manager, layer, graphs);
        manager.load_restart_weights(layer, weights.view());
      });
    }
    pair.both([&](GraphManager& manager) {
      manager.walk(kAllLayers, {}, Stream{});
      manager.walk(kAllLayers, {}, Stream{});
    });
    pair.expect_same_state("two walks");
    if (slots == 0) continue;
    EvictionConfig eviction{.budget = std::max<Index>(1, slots / 5), .window = 0, .sinks = 0};
    if (eviction.budget > 60) {
      eviction.window = 50;
      eviction.sinks = 4;
    }
    pair.same(HostTensor(DType::u8, {1, 2, slots}),
              [&](const GraphManager& manager, HostTensor& out) {
                manager.safety_mask(0, eviction, 0.2, out.view(), Stream{});
              });
    const HostTensor keep =
        pair.same(HostTensor(DType::i32, {1, 2, pair.cpu().kept_length(0, eviction, true)}),
                  [&](const GraphManager& manager, HostTensor& out) {
                    manager.select(0, eviction, true, out.view(), Stream{});
                  });
    HostTensor keys(DType::f16, {1, 2, slots, 8});
    keys.fill_bits(random);
    pair.same(keys, [&](GraphManager& manager, HostTensor& out) {
      manager.compact(0, keep.view(), out.view(), {}, Stream{});
    });
    pair.both([&](GraphManager& manager) { manager.walk(0, {}, Stream{}); });
    pair.expect_same_state("compact and a walk");
    // The other layer lets its slots go instead; the next walk meets stale edges.
    const HostTensor released =
        pair.same(HostTensor(DType::i32, {1, 2, pair.cpu().kept_length(1, eviction, true)}),
                  [&](const GraphManager& manager, HostTensor& out) {
                    manager.select(1, eviction, true, out.view(), Stream{});
                  });
    pair.both([&](GraphManager& manager) { manager.release(1, released.view(), Stream{}); });
    HostTensor query(DType::f16, {1, 2, 8});
    query.fill(kNan);
    HostTensor cache(DType::f16, {1, 2, slots + 4, 8});
    for (int i = 0; i < 3; ++i) {
      const HostTensor free = pair.same(HostTensor(DType::i32, {1, 2}),
                                        [&](const GraphManager& manager, HostTensor& out) {
                                          manager.next_slots(1, out.view(), Stream{});
                                        });
      pair.both([&](GraphManager& manager) {
        manager.update(1, query.view(), cache.view(), free.view(), {}, Stream{});
      });
    }
    pair.both([&](GraphManager& manager) { manager.walk(1, {}, Stream{}); });
    pair.expect_same_state("slots that were used again, and a walk");
  }
}

INSTANTIATE_TEST_SUITE_P(Lengths, BackendsAgreeOnLength,
                         ::testing::Combine(::testing::Values(0, 1, 7, 8, 9, 4096, 65539),
                                            ::testing::Values(EdgeLaw::weighted,
                                                              EdgeLaw::attention)));

TEST(BackendsAgree, OnSolvesToRounding) {
  Random random(3);
  for (const GraphScope scope : {GraphScope::head, GraphScope::layer}) {
    for (const EdgeLaw law : {EdgeLaw::weighted, EdgeLaw::attention}) {
      const GraphConfig config{.num_query_heads = 2,
                               .num_kv_heads = 2,
                               .head_dim = 8,
                               .capacity = 3000,
                               .edge_law = law,
                               .scope = scope,
                               .num_threads = 1};
      WalkConfig mix = walk_config(0.5, 0.9);
      mix.populations[1].solver = Solver::exact;
      mix.populations[2].solver = Solver::exact;
      Pair solved(config, walk_config(0.5, 0.9));
      Pair mixed(config, mix);
      Graphs graphs(1);
      for (Index g = 0; g < solved.cpu().graphs_per_sequence(); ++g) {
        graphs[0].push_back(long_graph(random, 3000, config.top_k, config.num_sinks, g == 0, law));
      }
      HostTensor weights(DType::u32, {1, solved.cpu().graphs_per_sequence(), 3000});
      weights.fill(5);
      for (Pair* pair : {&solved, &mixed}) {
        pair->both([&](GraphManager& manager) {
          load_graphs(manager, 0, graphs);
          manager.load_restart_weights(0, weights.view());
          for (int round = 0; round < 2; ++round) {
            if (pair == &solved) {
              manager.solve(0, {}, Stream{});
            } else {
              manager.walk(0, {}, Stream{});
            }
          }
        });
        for (int p = -1; p < 4; ++p) {
          const HostTensor expected = read_scores(pair->cpu(), 0, p);
          const HostTensor actual = read_scores(pair->cuda(), 0, p);
          if (pair == &mixed && (p == 0 || p == 3)) {
            EXPECT_TRUE(expected.bytes() == actual.bytes()) << "population " << p;
          }
          for (Index h = 0; h < 2; ++h) {
            for (Index slot = 0; slot < 3000; ++slot) {
              const double value = expected.get({0, h, slot});
              ASSERT_NEAR(actual.get({0, h, slot}), value, 1e-5 * (1.0 + value)) << slot;
            }
          }
        }
      }
    }
  }
}

/// Rows with other neighbours; those with the same ones differ by rounding at most.
Index count_differing_rows(const Graph& expected, const Graph& actual) {
  EXPECT_EQ(expected.positions, actual.positions);
  const auto slots_of = [](const std::vector<Edge>& row) {
    std::vector<Index> slots;
    for (const Edge& edge : row) slots.push_back(edge.slot);
    std::sort(slots.begin(), slots.end());
    return slots;
  };
  Index differing = 0;
  for (Index slot = 0; slot < std::min(expected.length(), actual.length()); ++slot) {
    const std::vector<Edge>& row = actual.rows[at(slot)];
    if (slots_of(expected.rows[at(slot)]) != slots_of(row)) {
      ++differing;
    } else {
      expect_same_row(expected.rows[at(slot)], row, 1e-5 + 2.0 * kPackedTolerance);
    }
  }
  return differing;
}

TEST(BackendsAgree, OnRowsOfManyTokens) {
  // Scores of random keys are apart by more than their rounding, but for a few in a million.
  Random random(4);
  // Sanitizers see this test: not every type with every law.
  using Case = std::pair<DType, EdgeLaw>;
  for (const auto& [dtype, law] :
       {Case{DType::f32, EdgeLaw::weighted}, Case{DType::f16, EdgeLaw::weighted},
        Case{DType::bf16, EdgeLaw::weighted}, Case{DType::bf16, EdgeLaw::attention}}) {
    SCOPED_TRACE(name_of(dtype));
    const GraphConfig config{.batch_size = 2,
                             .num_query_heads = 8,
                             .num_kv_heads = 2,
                             .head_dim = 128,
                             .capacity = 1000,
                             .edge_law = law,
                             .num_threads = 2};
    Pair pair(config, {});
    HostTensor keys(dtype, {2, 2, 1000, 128}, {0, 2, 1, 3}, 2);
    keys.fill_normal(random);
    HostTensor queries(dtype, {2, 8, 900, 128});
    queries.fill_normal(random, 0.5);
    HostTensor valid(DType::u8, {2, 900});
    valid.for_each([&](const std::vector<Index>& index) {
      valid.set(index, index[0] == 0 || index[1] >= 123 ? 1.0 : 0.0);
    });
    pair.both([&](GraphManager& manager) {
      manager.update_rows(0, queries.view(), keys.view(), {.score = {}, .valid = valid.view()},
                          Stream{});
    });
    const Graphs expected = read_graphs(pair.cpu(), 0);
    const Graphs actual = read_graphs(pair.cuda(), 0);
    Index differing = 0;
    for (std::size_t b = 0; b < 2; ++b) {
      for (std::size_t g = 0; g < 2; ++g) {
        expect_sound(actual[b][g], config.num_sinks, law);
        differing += count_differing_rows(expected[b][g], actual[b][g]);
      }
    }
    EXPECT_LE(differing, 3);
  }
}

/// New tokens of a divided layer whose heads hold so many.
void expect_same_tokens(const std::vector<Index>& held, DType dtype) {
  constexpr Index kBatch = 3;
  constexpr Index kDim = 64;
  constexpr Index kSteps = 4;
  Random random(8);
  const Index heads = count_of(held);
  const Index most = *std::max_element(held.begin(), held.end());
  Pair pair({.batch_size = kBatch,
             .num_query_heads = 2 * heads,
             .num_kv_heads = heads,
             .head_dim = kDim,
             .capacity = most,
             .num_threads = 2},
            {});
  std::vector<std::vector<Index>> kept;
  std::vector<Index> rooms;
  for (const Index count : held) {
    kept.push_back(plain_graph(count).positions);
    rooms.push_back(count + kSteps);
  }
  const HostTensor keep = keep_tensor(std::vector(at(kBatch), kept));
  pair.both([&](GraphManager& manager) {
    load_graphs(manager, 0, Graphs(at(kBatch), std::vector<Graph>(at(heads), plain_graph(most))));
    manager.release(0, keep.view(), Stream{});
    manager.divide(0, rooms);
  });
  HostTensor keys(dtype, {kBatch, 1, std::accumulate(rooms.begin(), rooms.end(), Index{0}), kDim});
  keys.fill_normal(random);
  HostTensor values = keys;
  values.fill_normal(random);
  for (Index step = 0; step < kSteps; ++step) {
    SCOPED_TRACE(::testing::Message() << "step " << step);
    HostTensor token(dtype, {kBatch, heads, kDim});
    token.fill_normal(random);
    HostTensor query(dtype, {kBatch, 2 * heads, kDim});
    query.fill_normal(random);
    const HostTensor slots = pair.same(HostTensor(DType::i32, {kBatch, heads}),
                                       [&](const GraphManager& manager, HostTensor& out) {
                                         manager.place(0, token.view(), token.view(), keys.view(),
                                                       values.view(), out.view(), Stream{});
                                       });
    if (step % 2 == 0) {
      pair.both([&](GraphManager& manager) {
        manager.update(0, query.view(), keys.view(), slots.view(), {}, Stream{});
      });
      continue;
    }
    std::vector<HostTensor> outs;
    pair.both([&](GraphManager& manager) {
      outs.push_back(query);
      manager.attend(0, query.view(), keys.view(), values.view(), slots.view(), outs.back().view(),
                     {}, Stream{});
    });
    outs[0].for_each([&](const std::vector<Index>& index) {
      ASSERT_NEAR(outs[0].get(index), outs[1].get(index), dtype == DType::f32 ? 2e-5 : 3e-2)
          << ::testing::PrintToString(index);
    });
  }
  const Graphs expected = read_graphs(pair.cpu(), 0);
  const Graphs actual = read_graphs(pair.cuda(), 0);
  Index differing = 0;
  for (std::size_t b = 0; b < at(kBatch); ++b) {
    for (std::size_t g = 0; g < at(heads); ++g) {
      EXPECT_EQ(actual[b][g].held(), rooms[g]);
      differing += count_differing_rows(expected[b][g], actual[b][g]);
    }
  }
  EXPECT_LE(differing, 3);
}

TEST(BackendsAgree, OnTokensOfHeadsWhoseRoomsDifferMuch) {
  // More heads of all sequences than any device has multiprocessors, and few.
  Random random(9);
  std::vector<Index> many(80);
  for (Index& held : many) held = random.integer(1, 400);
  for (const DType dtype : {DType::f32, DType::bf16}) {
    SCOPED_TRACE(name_of(dtype));
    expect_same_tokens({1900, 90, 1500, 64, 333, 2200, 17, 700}, dtype);
    expect_same_tokens(many, dtype);
  }
}

}  // namespace
}  // namespace spectralkv::test
