// Every bad argument throws, says what was expected and what came, and changes nothing.
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "expect.h"
#include "feeder.h"
#include "graph.h"
#include "manager.h"
#include "spectralkv/error.h"
#include "spectralkv/version.h"
#include "tensors.h"

namespace spectralkv::test {
namespace {

constexpr Index kLength = 20;
constexpr Index kCapacity = 24;

GraphConfig graph_config() {
  return {.num_layers = 2,
          .batch_size = 2,
          .num_query_heads = 4,
          .num_kv_heads = 2,
          .head_dim = 8,
          .capacity = kCapacity,
          .top_k = 4,
          .num_threads = 1};
}

/// What may differ in an argument without making it wrong.
struct Freedom {
  std::vector<int> axes{};      ///< extents that are not checked against an exact number
  std::vector<DType> dtypes{};  ///< allowed besides the argument's own
  bool last_stride = false;     ///< the last axis need not be contiguous
  bool written = false;         ///< broadcast axes are wrong, too
};

/// Ways to spoil a good argument.
template <class View>
std::vector<std::pair<std::string, View>> spoiled(const View& good, const Freedom& freedom) {
  std::vector<std::pair<std::string, View>> views;
  const auto add = [&](const std::string& what, auto&& change) {
    View view = good;
    change(view);
    views.emplace_back(what, view);
  };
  const auto is_free = [&](int axis) {
    return std::find(freedom.axes.begin(), freedom.axes.end(), axis) != freedom.axes.end();
  };
  for (int axis = 0; axis < good.rank; ++axis) {
    const std::string name = "axis " + std::to_string(axis);
    const auto index = static_cast<std::size_t>(axis);
    add(name + " negative", [&](View& view) { view.shape[index] = -1; });
    if (!is_free(axis)) {
      add(name + " longer", [&](View& view) { ++view.shape[index]; });
      add(name + " shorter", [&](View& view) { --view.shape[index]; });
    }
    add(name + " backwards", [&](View& view) { view.strides[index] = -view.strides[index]; });
    if (freedom.written && good.size(axis) > 1) {
      add(name + " broadcast", [&](View& view) { view.strides[index] = 0; });
    }
  }
  add("an axis less", [](View& view) { --view.rank; });
  add("an axis more", [](View& view) {
    view.shape[static_cast<std::size_t>(view.rank)] = 1;
    view.strides[static_cast<std::size_t>(view.rank)] = 1;
    ++view.rank;
  });
  for (const DType dtype :
       {DType::f32, DType::f16, DType::bf16, DType::i32, DType::u32, DType::u8}) {
    if (dtype == good.dtype ||
        std::find(freedom.dtypes.begin(), freedom.dtypes.end(), dtype) != freedom.dtypes.end()) {
      continue;
    }
    add(name_of(dtype), [&](View& view) { view.dtype = dtype; });
  }
  add("on another device", [](View& view) { view.device = {DeviceType::cuda, 0}; });
  if (!freedom.last_stride) {
    add("last stride",
        [](View& view) { view.strides[static_cast<std::size_t>(view.rank - 1)] = 2; });
  }
  add("no data", [](View& view) { view.data = nullptr; });
  return views;
}

class Arguments : public ::testing::Test {
 protected:
  Arguments() : manager(graph_config(), {.num_walkers = 64}), feeder(manager, 0, 1) {
    feeder.prefill(kLength);
    manager.update_novelty(0, feeder.keys.view(), Stream{});
    manager.walk(0, {}, Stream{});
    Feeder other(manager, 1, 2);
    other.prefill(7);
    for (Index b = 0; b < 2; ++b) {
      for (Index h = 0; h < 2; ++h) feeder.write_key(b, h, kLength);
    }
    query = feeder.query();
  }

  void rejected(std::string_view operation, const std::function<void()>& call,
                std::source_location where = std::source_location::current()) {
    expect_rejected(manager, operation, call, where);
  }

  /// `call` refuses every spoiled form of `good`.
  template <class View>
  void refuses(std::string_view operation, const View& good, const Freedom& freedom,
               const std::function<void(const View&)>& call,
               std::source_location where = std::source_location::current()) {
    for (const auto& [what, view] : spoiled(good, freedom)) {
      SCOPED_TRACE(what);
      rejected(operation, [&, bad = view] { call(bad); }, where);
    }
  }

  /// Layers that do not exist.
  void refuses_layers(std::string_view operation, const std::function<void(Index)>& call,
                      bool all_is_a_layer = false,
                      std::source_location where = std::source_location::current()) {
    for (const Index layer : {Index{-2}, Index{2}, Index{1} << 40}) {
      rejected(operation, [&] { call(layer); }, where);
    }
    if (!all_is_a_layer) rejected(operation, [&] { call(kAllLayers); }, where);
  }

  ConstTensorView keys() const { return feeder.keys.view(); }

  GraphManager manager;
  Feeder feeder;
  HostTensor query;
};

const Freedom kKeys{.axes = {2}, .dtypes = {}, .last_stride = false, .written = false};

TEST_F(Arguments, OfUpdate) {
  const auto update = [&](const ConstTensorView& q, const ConstTensorView& k,
                          const ConstTensorView& s = {}, const ScoreOptions& options = {}) {
    manager.update(0, q, k, s, options, Stream{});
  };
  refuses<ConstTensorView>("update", std::as_const(query).view(), {},
                           [&](const ConstTensorView& view) { update(view, keys()); });
  refuses<ConstTensorView>("update", keys(), kKeys, [&](const ConstTensorView& view) {
    update(std::as_const(query).view(), view);
  });
  ConstTensorView few = keys();
  few.shape[2] = kLength;  // no room for the new token's key
  rejected("update", [&] { update(query.view(), few); });
  rejected("update", [&] { update({}, keys()); });
  rejected("update", [&] { update(query.view(), {}); });
  refuses_layers("update", [&](Index layer) {
    manager.update(layer, query.view(), keys(), {}, {}, Stream{});
  });
  for (const double bad : {-1.0, kNan, kInfinity}) {
    rejected("update", [&] { update(query.view(), keys(), {}, {.scale = bad}); });
    rejected("update", [&] { update(query.view(), keys(), {}, {.softcap = bad}); });
  }
}

TEST_F(Arguments, OfAttend) {
  HostTensor values(DType::f32, {2, 2, kCapacity, 8});
  HostTensor out(DType::f32, {2, 4, 8});
  const auto attend = [&](const ConstTensorView& q, const ConstTensorView& k,
                          const ConstTensorView& v, const TensorView& o,
                          const ConstTensorView& s = {}, const ScoreOptions& options = {}) {
    manager.attend(0, q, k, v, s, o, options, Stream{});
  };
  const ConstTensorView one = query.view();
  refuses<ConstTensorView>("attend", one, {}, [&](const ConstTensorView& view) {
    attend(view, keys(), values.view(), out.view());
  });
  refuses<ConstTensorView>("attend", keys(), kKeys, [&](const ConstTensorView& view) {
    attend(one, view, values.view(), out.view());
  });
  refuses<ConstTensorView>(
      "attend", std::as_const(values).view(), kKeys,
      [&](const ConstTensorView& view) { attend(one, keys(), view, out.view()); });
  refuses<TensorView>("attend", out.view(), {.axes = {}, .dtypes = {}, .written = true},
                      [&](const TensorView& view) { attend(one, keys(), values.view(), view); });
  ConstTensorView few = values.view();
  few.shape[2] = kLength;  // no room for the new token's value
  rejected("attend", [&] { attend(one, keys(), few, out.view()); });
  rejected("attend", [&] { attend(one, keys(), {}, out.view()); });
  rejected("attend", [&] { attend(one, keys(), values.view(), {}); });
  rejected("attend", [&] { attend(one, keys(), {}, {}); });
  refuses_layers("attend", [&](Index layer) {
    manager.attend(layer, one, keys(), values.view(), {}, out.view(), {}, Stream{});
  });
  HostTensor slots(DType::i32, {2, 2});
  for (const Index bad : {Index{-1}, Index{0}, kCapacity}) {
    slots.fill(kLength);
    slots.set({1, 0}, static_cast<double>(bad));
    rejected("attend", [&] { attend(one, keys(), values.view(), out.view(), slots.view()); });
  }
  rejected("attend", [&] { attend(one, keys(), values.view(), out.view(), {}, {.scale = kNan}); });
}

TEST_F(Arguments, OfDecodeAttention) {
  HostTensor values(DType::f32, {2, 2, kCapacity, 8});
  HostTensor positions(DType::i32, {2, 2, kCapacity});
  HostTensor out(DType::f32, {2, 4, 8});
  const ConstTensorView one = query.view();
  const auto refuses_all = [&](const auto& good, const Freedom& freedom, auto&& call) {
    for (const auto& [what, view] : spoiled(good, freedom)) {
      SCOPED_TRACE(what);
      expect_invalid("decode_attention", [&, bad = view] { call(bad); });
    }
  };
  refuses_all(one, {}, [&](const ConstTensorView& view) {
    decode_attention(view, keys(), values.view(), positions.view(), 20, out.view(), {});
  });
  refuses_all(keys(), kKeys, [&](const ConstTensorView& view) {
    decode_attention(one, view, values.view(), positions.view(), 20, out.view(), {});
  });
  refuses_all(std::as_const(values).view(), kKeys, [&](const ConstTensorView& view) {
    decode_attention(one, keys(), view, positions.view(), 20, out.view(), {});
  });
  refuses_all(std::as_const(positions).view(), {.axes = {2}, .dtypes = {}},
              [&](const ConstTensorView& view) {
                decode_attention(one, keys(), values.view(), view, 20, out.view(), {});
              });
  refuses_all(out.view(), {.axes = {}, .dtypes = {}, .written = true}, [&](const TensorView& view) {
    decode_attention(one, keys(), values.view(), positions.view(), 20, view, {});
  });
  for (const Index length : {Index{-1}, kCapacity + 1}) {
    expect_invalid("decode_attention", [&] {
      decode_attention(one, keys(), values.view(), {}, length, out.view(), {});
    });
  }
  ConstTensorView few = positions.view();
  few.shape[2] = kLength - 1;
  expect_invalid("decode_attention", [&] {
    decode_attention(one, keys(), values.view(), few, kLength, out.view(), {});
  });
  HostTensor odd(DType::f32, {2, 3, 8});  // query heads for two KV heads
  expect_invalid("decode_attention", [&] {
    decode_attention(odd.view(), keys(), values.view(), {}, kLength, odd.view(), {});
  });
  expect_invalid("decode_attention", [&] {
    decode_attention(one, keys(), values.view(), {}, kLength, out.view(), {.softcap = -1.0});
  });
}

TEST_F(Arguments, OfUpdatesSlots) {
  const auto update = [&](const ConstTensorView& slots) {
    manager.update(0, query.view(), keys(), slots, {}, Stream{});
  };
  HostTensor slots(DType::i32, {2, 2});
  slots.fill(kLength);
  refuses<ConstTensorView>("update", std::as_const(slots).view(),
                           {.axes = {}, .dtypes = {}, .last_stride = true, .written = false},
                           update);
  for (const Index bad : {Index{-1}, Index{-2}, Index{0}, kLength - 1, kCapacity, Index{1} << 20}) {
    slots.fill(kLength);
    slots.set({1, 0}, static_cast<double>(bad));
    rejected("update", [&] { update(slots.view()); });
  }
  // A slot of the cache that the keys do not reach.
  slots.fill(kLength + 2);
  ConstTensorView few = keys();
  few.shape[2] = kLength + 2;
  rejected("update", [&] { manager.update(0, query.view(), few, slots.view(), {}, Stream{}); });
}

TEST_F(Arguments, OfUpdateOverTheCapacity) {
  for (Index i = kLength; i < kCapacity; ++i) feeder.append();
  HostTensor more(DType::f32, {2, 2, kCapacity + 5, 8});
  rejected("update", [&] { manager.update(0, query.view(), more.view(), {}, {}, Stream{}); });
  HostTensor queries(DType::f32, {2, 4, 1, 8});
  rejected("update_rows",
           [&] { manager.update_rows(0, queries.view(), more.view(), {}, Stream{}); });
}

TEST_F(Arguments, OfUpdateRows) {
  HostTensor queries(DType::f32, {2, 4, 3, 8});
  HostTensor valid(DType::u8, {2, 3});
  valid.fill(1);
  const auto update = [&](const ConstTensorView& q, const ConstTensorView& k,
                          const RowOptions& options) {
    manager.update_rows(0, q, k, options, Stream{});
  };
  refuses<ConstTensorView>("update_rows", std::as_const(queries).view(),
                           {.axes = {2}, .dtypes = {}, .last_stride = false, .written = false},
                           [&](const ConstTensorView& view) { update(view, keys(), {}); });
  refuses<ConstTensorView>("update_rows", keys(), kKeys,
                           [&](const ConstTensorView& view) { update(queries.view(), view, {}); });
  refuses<ConstTensorView>("update_rows", std::as_const(valid).view(),
                           {.axes = {}, .dtypes = {}, .last_stride = true, .written = false},
                           [&](const ConstTensorView& view) {
                             update(queries.view(), keys(), {.score = {}, .valid = view});
                           });
  ConstTensorView few = keys();
  few.shape[2] = kLength + 2;
  rejected("update_rows", [&] { update(queries.view(), few, {}); });
  const HostTensor many(DType::f32, {2, 4, kCapacity - kLength + 1, 8});
  rejected("update_rows", [&] { update(many.view(), keys(), {}); });
  for (const Index stride : {Index{-1}, Index{1} << 31}) {
    rejected("update_rows", [&] {
      update(queries.view(), keys(), {.score = {}, .valid = {}, .row_stride = stride});
    });
  }
  rejected("update_rows",
           [&] { update(queries.view(), keys(), {.score = {.softcap = -1.0}, .valid = {}}); });
  refuses_layers("update_rows", [&](Index layer) {
    manager.update_rows(layer, queries.view(), keys(), {}, Stream{});
  });
}

TEST_F(Arguments, OfUpdateNovelty) {
  refuses<ConstTensorView>(
      "update_novelty", keys(),
      {.axes = {2}, .dtypes = {DType::f16, DType::bf16}, .last_stride = false, .written = false},
      [&](const ConstTensorView& view) { manager.update_novelty(0, view, Stream{}); });
  ConstTensorView few = keys();
  few.shape[2] = kLength - 1;
  rejected("update_novelty", [&] { manager.update_novelty(0, few, Stream{}); });
  refuses_layers("update_novelty",
                 [&](Index layer) { manager.update_novelty(layer, keys(), Stream{}); });
}

TEST_F(Arguments, OfWalkAndSolve) {
  for (const std::size_t marks : {1U, 3U}) {
    const std::vector<std::uint8_t> sequences(marks, 1);
    rejected("walk", [&] { manager.walk(0, sequences, Stream{}); });
    rejected("solve", [&] { manager.solve(0, sequences, Stream{}); });
  }
  refuses_layers("walk", [&](Index layer) { manager.walk(layer, {}, Stream{}); }, true);
  refuses_layers("solve", [&](Index layer) { manager.solve(layer, {}, Stream{}); }, true);
  // Layer 1 has no restart weights yet: layer 0 does not walk, either.
  rejected("walk", [&] { manager.walk(kAllLayers, {}, Stream{}); });
  rejected("solve", [&] { manager.solve(kAllLayers, {}, Stream{}); });
}

TEST_F(Arguments, OfUpdateAndStep) {
  const auto step = [&](const ConstTensorView& q, const ConstTensorView& k) {
    manager.update_and_step(0, q, k, {}, {}, Stream{});
  };
  ConstTensorView few = keys();
  few.shape[2] = kLength;
  const Snapshot before(manager);
  EXPECT_THROW(step(query.view(), few), InvalidArgument);
  EXPECT_THROW(step({}, keys()), InvalidArgument);
  EXPECT_THROW(manager.update_and_step(2, query.view(), keys(), {}, {}, Stream{}), InvalidArgument);
  EXPECT_TRUE(before == Snapshot(manager));
}

const Freedom kOut{.axes = {}, .dtypes = {}, .last_stride = false, .written = true};

TEST_F(Arguments, OfScoresAndVisits) {
  HostTensor scores(DType::f32, {2, 2, kLength});
  HostTensor visits(DType::u32, {2, 2, kLength});
  refuses<TensorView>("scores", scores.view(), kOut,
                      [&](const TensorView& out) { manager.scores(0, 0, out, Stream{}); });
  refuses<TensorView>("visits", visits.view(), kOut,
                      [&](const TensorView& out) { manager.visits(0, 0, out, Stream{}); });
  for (const int population : {-2, 2, 100}) {
    rejected("scores", [&] { manager.scores(0, population, scores.view(), Stream{}); });
    rejected("visits", [&] { manager.visits(0, population, visits.view(), Stream{}); });
  }
  rejected("visits", [&] { manager.visits(0, -1, visits.view(), Stream{}); });
  refuses_layers("scores", [&](Index layer) { manager.scores(layer, 0, scores.view(), Stream{}); });
  refuses_layers("visits", [&](Index layer) { manager.visits(layer, 0, visits.view(), Stream{}); });
}

TEST_F(Arguments, OfEviction) {
  const EvictionConfig good{.budget = 12, .interval = 4, .window = 4, .sinks = 2};
  ASSERT_TRUE(manager.is_full(0, good));
  HostTensor out(DType::i32, {2, 2, 12});
  HostTensor mask(DType::u8, {2, 2, kLength});
  refuses<TensorView>("select", out.view(), kOut, [&](const TensorView& view) {
    manager.select(0, good, false, view, Stream{});
  });
  refuses<TensorView>("safety_mask", mask.view(), kOut, [&](const TensorView& view) {
    manager.safety_mask(0, good, 0.2, view, Stream{});
  });
  std::vector<EvictionConfig> bad(4, good);
  bad[0].budget = 6;
  bad[1].window = -1;
  bad[2].sinks = -1;
  bad[3].interval = -1;
  for (const EvictionConfig& eviction : bad) {
    rejected("EvictionConfig", [&] { (void)manager.is_full(0, eviction); });
    rejected("EvictionConfig", [&] { (void)manager.full_sequences(0, eviction); });
    rejected("EvictionConfig", [&] { (void)manager.kept_length(0, eviction, true); });
    rejected("EvictionConfig", [&] { manager.select(0, eviction, false, out.view(), Stream{}); });
    rejected("EvictionConfig",
             [&] { manager.safety_mask(0, eviction, 0.2, mask.view(), Stream{}); });
  }
  for (const double fraction : {-0.1, 1.1, kNan}) {
    rejected("safety_mask", [&] { manager.safety_mask(0, good, fraction, mask.view(), Stream{}); });
  }
  refuses_layers("is_full", [&](Index layer) { (void)manager.is_full(layer, good); });
  refuses_layers("full_sequences", [&](Index layer) { (void)manager.full_sequences(layer, good); });
  refuses_layers("kept_length",
                 [&](Index layer) { (void)manager.kept_length(layer, good, false); });
  refuses_layers("select",
                 [&](Index layer) { manager.select(layer, good, false, out.view(), Stream{}); });
  refuses_layers("safety_mask", [&](Index layer) {
    manager.safety_mask(layer, good, 0.2, mask.view(), Stream{});
  });
}

/// Lists that neither compact nor release may accept, for (sequence 1, head 1) of kLength slots of
/// which 5 is empty.
std::vector<std::vector<Index>> bad_lists() {
  return {{0, 1, 2, 2},        // twice
          {0, 2, 1, 3},        // not ascending
          {3, 2, 1, 0},        //
          {0, 1, 2, kLength},  // not in use
          {0, 1, 2, 1 << 20},  //
          {-2, 0, 1, 2},       // no slot
          {0, -1, 2, 3},       // a hole
          {0, 1, -1, 3},       //
          {-1, 1, -1, 2},      //
          {-1, 1, 2, -1},      // neither behind the -1 nor before them
          {0, 1, -1, -2},      //
          {0, 1, 2, 5}};       // empty
}

TEST_F(Arguments, OfCompactAndRelease) {
  std::vector<Index> all(at(kLength));
  std::iota(all.begin(), all.end(), 0);
  all.erase(all.begin() + 5);
  manager.release(0, keep_tensor({{all, all}, {all, all}}).view(), Stream{});
  HostTensor values(DType::f16, {2, 2, kCapacity, 5});
  HostTensor keep(DType::i32, {2, 2, 4});
  const auto fill = [&] {
    keep.for_each([&](const std::vector<Index>& index) {
      keep.set(index, static_cast<double>(index[2] + 1));
    });
  };
  const Bytes bytes = feeder.keys.bytes();
  const auto compact = [&](const ConstTensorView& list, const TensorView& k, const TensorView& v) {
    manager.compact(0, list, k, v, Stream{});
  };
  fill();
  const Freedom free_length{.axes = {2}, .dtypes = {}, .last_stride = false, .written = false};
  refuses<ConstTensorView>(
      "compact", std::as_const(keep).view(), free_length,
      [&](const ConstTensorView& view) { compact(view, feeder.keys.view(), values.view()); });
  refuses<ConstTensorView>(
      "release", std::as_const(keep).view(), free_length,
      [&](const ConstTensorView& view) { manager.release(0, view, Stream{}); });
  const Freedom moved{
      .axes = {2, 3},
      .dtypes = {DType::f32, DType::f16, DType::bf16, DType::i32, DType::u32, DType::u8},
      .last_stride = false,
      .written = true};
  refuses<TensorView>("compact", feeder.keys.view(), moved,
                      [&](const TensorView& view) { compact(keep.view(), view, values.view()); });
  refuses<TensorView>("compact", values.view(), moved, [&](const TensorView& view) {
    compact(keep.view(), feeder.keys.view(), view);
  });
  TensorView few = values.view();
  few.shape[2] = kLength - 1;
  rejected("compact", [&] { compact(keep.view(), feeder.keys.view(), few); });
  HostTensor long_list(DType::i32, {2, 2, kCapacity + 1});
  long_list.fill(-1);
  rejected("compact", [&] { compact(long_list.view(), feeder.keys.view(), values.view()); });
  for (const std::vector<Index>& list : bad_lists()) {
    fill();
    for (Index i = 0; i < 4; ++i) keep.set({1, 1, i}, static_cast<double>(list[at(i)]));
    SCOPED_TRACE(::testing::PrintToString(list));
    rejected("compact", [&] { compact(keep.view(), feeder.keys.view(), values.view()); });
    rejected("release", [&] { manager.release(0, keep.view(), Stream{}); });
  }
  fill();
  refuses_layers("compact",
                 [&](Index layer) { manager.compact(layer, keep.view(), {}, {}, Stream{}); });
  refuses_layers("release", [&](Index layer) { manager.release(layer, keep.view(), Stream{}); });
  EXPECT_EQ(bytes, feeder.keys.bytes());
}

/// Lists that a head may keep whatever the others keep.
TEST_F(Arguments, OfCompactAndReleaseMayDifferInLength) {
  const std::vector<std::uint8_t> saved = manager.save_layer(0);
  for (const std::vector<Index>& list : std::vector<std::vector<Index>>{
           {0, 1, 2, -1}, {4, -1, -1, -1}, {-1, 0, 1, 2}, {-1, -1, -1, 7}, {-1, -1, -1, -1}}) {
    SCOPED_TRACE(::testing::PrintToString(list));
    HostTensor keep(DType::i32, {2, 2, 4});
    keep.for_each([&](const std::vector<Index>& index) {
      keep.set(index, static_cast<double>(index[0] == 1 && index[1] == 1 ? list[at(index[2])]
                                                                         : index[2] + 1));
    });
    const auto held =
        static_cast<Index>(std::count_if(list.begin(), list.end(), [](Index s) { return s >= 0; }));
    for (const bool moves : {false, true}) {
      manager.load_layer(0, saved);
      const auto call = [&](std::span<const Index> kept) {
        if (moves) {
          manager.compact(0, keep.view(), {}, {}, Stream{}, kept);
        } else {
          manager.release(0, keep.view(), Stream{}, kept);
        }
      };
      const std::string_view operation = moves ? "compact" : "release";
      // What the caller says that they keep.
      for (const std::vector<Index>& kept : std::vector<std::vector<Index>>{{4},
                                                                            {4, 4, 4},
                                                                            {4, 4},
                                                                            {4, 4, 4, 4},
                                                                            {4, 4, held, 4},
                                                                            {4, 4, 4, -1},
                                                                            {4, 4, 4, 5},
                                                                            {4, 4, 4, held, 4}}) {
        SCOPED_TRACE(::testing::PrintToString(kept));
        rejected(operation, [&] { call(kept); });
      }
      call(std::vector<Index>{4, 4, 4, held});
      const std::vector<double> positions = read_positions(manager, 0).vector({1, 1});
      EXPECT_EQ(std::count_if(positions.begin(), positions.end(), [](double p) { return p >= 0; }),
                held);
      EXPECT_EQ(manager.tokens_held(0, 1), 4);
    }
  }
}

TEST_F(Arguments, OfSharedGraphs) {
  GraphConfig config = graph_config();
  config.scope = GraphScope::layer;
  GraphManager shared(config, {});
  Feeder tokens(shared, 0, 3);
  tokens.prefill(10);
  HostTensor keep(DType::i32, {2, 2, 3});
  keep.for_each([&](const std::vector<Index>& index) {
    keep.set(index, static_cast<double>(index[1] + index[2]));  // head 1 keeps others
  });
  expect_rejected(shared, "compact", [&] { shared.compact(0, keep.view(), {}, {}, Stream{}); });
  expect_rejected(shared, "release", [&] { shared.release(0, keep.view(), Stream{}); });
  HostTensor slots(DType::i32, {2, 2});
  slots.fill(10);
  slots.set({1, 1}, 11);
  HostTensor keys = key_slab(config, 2);
  keys.fill(1.0);
  expect_rejected(shared, "update", [&] {
    shared.update(0, tokens.query().view(), keys.view(), slots.view(), {}, Stream{});
  });
}

TEST_F(Arguments, OfPlace) {
  HostTensor slots(DType::i32, {2, 2});
  HostTensor slab(DType::f32, {2, 2, 2 * kLength, 8});
  HostTensor value_slab(DType::f16, {2, 2, 2 * kLength, 5});
  const HostTensor key(DType::f32, {2, 2, 8});
  const HostTensor value(DType::f16, {2, 2, 5});
  const auto place = [&](const ConstTensorView& k, const ConstTensorView& v, const TensorView& keys,
                         const TensorView& values, const TensorView& out) {
    manager.place(0, k, v, keys, values, out, Stream{});
  };
  const Freedom moved{.axes = {2}, .dtypes = {}, .last_stride = false, .written = true};
  refuses<ConstTensorView>("place", key.view(), {}, [&](const ConstTensorView& view) {
    place(view, value.view(), slab.view(), value_slab.view(), slots.view());
  });
  refuses<ConstTensorView>("place", value.view(), {}, [&](const ConstTensorView& view) {
    place(key.view(), view, slab.view(), value_slab.view(), slots.view());
  });
  refuses<TensorView>("place", slab.view(), moved, [&](const TensorView& view) {
    place(key.view(), value.view(), view, value_slab.view(), slots.view());
  });
  refuses<TensorView>("place", value_slab.view(), moved, [&](const TensorView& view) {
    place(key.view(), value.view(), slab.view(), view, slots.view());
  });
  refuses<TensorView>("place", slots.view(),
                      {.axes = {}, .dtypes = {}, .last_stride = true, .written = true},
                      [&](const TensorView& view) {
                        place(key.view(), value.view(), slab.view(), value_slab.view(), view);
                      });
  // Slots that the keys do not have are no room for a token.
  HostTensor short_slab(DType::f32, {2, 2, kLength, 8});
  HostTensor short_values(DType::f16, {2, 2, kLength, 5});
  rejected("place", [&] {
    place(key.view(), value.view(), short_slab.view(), short_values.view(), slots.view());
  });
  refuses_layers("place", [&](Index layer) {
    manager.place(layer, key.view(), value.view(), slab.view(), value_slab.view(), slots.view(),
                  Stream{});
  });
}

TEST_F(Arguments, OfRotary) {
  GraphConfig config = graph_config();
  config.rotary.inv_freq.assign(at(config.head_dim / 2), 0.5);
  config.validate();
  config.rotary.inv_freq.push_back(0.1);
  expect_invalid("GraphConfig", [&] { config.validate(); });
  config.rotary.inv_freq = {kInfinity};
  expect_invalid("GraphConfig", [&] { config.validate(); });
}

TEST_F(Arguments, OfNextSlotsAndPositions) {
  HostTensor slots(DType::i32, {2, 2});
  refuses<TensorView>("next_slots", slots.view(),
                      {.axes = {}, .dtypes = {}, .last_stride = true, .written = true},
                      [&](const TensorView& view) { manager.next_slots(0, view, Stream{}); });
  refuses_layers("next_slots",
                 [&](Index layer) { manager.next_slots(layer, slots.view(), Stream{}); });
  HostTensor positions(DType::i32, {2, 2, kLength});
  refuses<TensorView>("positions", positions.view(), kOut,
                      [&](const TensorView& view) { manager.positions(0, view, Stream{}); });
  refuses_layers("positions",
                 [&](Index layer) { manager.positions(layer, positions.view(), Stream{}); });
}

TEST_F(Arguments, OfTruncate) {
  for (const Index count : {Index{-1}, kLength + 1, Index{1} << 40}) {
    rejected("truncate", [&] { manager.truncate(0, count); });
  }
  rejected("truncate", [&] { manager.truncate(kAllLayers, 8); });  // layer 1 has 7
  refuses_layers("truncate", [&](Index layer) { manager.truncate(layer, 1); }, true);
}

TEST_F(Arguments, OfSelectBatch) {
  for (const std::vector<Index>& sequences :
       {std::vector<Index>{}, {2}, {0, -1}, {1, 0, Index{1} << 40}}) {
    rejected("select_batch", [&] { manager.select_batch(0, sequences); });
  }
  manager.select_batch(1, std::vector<Index>{0});
  rejected("select_batch", [&] { manager.select_batch(kAllLayers, std::vector<Index>{0, 1}); });
  refuses_layers(
      "select_batch", [&](Index layer) { manager.select_batch(layer, std::vector<Index>{0}); },
      true);
}

TEST_F(Arguments, OfReset) {
  for (const Index sequence : {Index{-1}, Index{2}, Index{1} << 40}) {
    rejected("reset", [&] { manager.reset(0, sequence); });
    rejected("reset", [&] { manager.reset(kAllLayers, sequence); });
  }
  refuses_layers("reset", [&](Index layer) { manager.reset(layer); }, true);
}

TEST_F(Arguments, OfReserve) {
  for (const Index capacity : {Index{-1}, Index{0}, kLength - 1, Index{1} << 40}) {
    rejected("reserve", [&] { manager.reserve(0, capacity); });
    rejected("reserve", [&] { manager.reserve(kAllLayers, capacity); });
  }
  refuses_layers("reserve", [&](Index layer) { manager.reserve(layer, 100); }, true);
}

/// Left-aligned: 8 tokens of head 0, 12 of head 1; then 11, with slot 11 free.
class DividedArguments : public Arguments {
 protected:
  DividedArguments() {
    HostTensor keep(DType::i32, {2, 2, 12});
    keep.for_each([&](const std::vector<Index>& index) {
      keep.set(index, static_cast<double>(index[1] == 0 && index[2] >= 8 ? -1 : index[2]));
    });
    manager.compact(0, keep.view(), feeder.keys.view(), {}, Stream{});
    for (Index b = 0; b < 2; ++b) keep.set({b, 1, 11}, -1.0);
    manager.release(0, keep.view(), Stream{});
  }

  /// `call` is refused, and the message names `part`.
  void rejected_for(std::string_view operation, std::string_view part,
                    const std::function<void()>& call,
                    std::source_location where = std::source_location::current()) {
    const std::vector<Index> rooms(manager.rooms(0).begin(), manager.rooms(0).end());
    rejected(operation, call, where);
    EXPECT_EQ(rooms, std::vector<Index>(manager.rooms(0).begin(), manager.rooms(0).end()));
    try {
      call();
    } catch (const InvalidArgument& error) {
      EXPECT_NE(std::string_view(error.what()).find(part), std::string_view::npos)
          << error.what() << ", line " << where.line();
    }
  }
};

TEST_F(DividedArguments, OfDivide) {
  const auto divide = [&](const std::vector<Index>& rooms) { manager.divide(0, rooms); };
  for (const std::vector<Index>& rooms :
       std::vector<std::vector<Index>>{{}, {24}, {24, 24, 24}, {24, 24, 24, 24}}) {
    rejected_for("divide", "number of rooms must be 2", [&] { divide(rooms); });
  }
  rejected_for("divide", "the room of head 0 must be in [8,", [&] { divide({7, 12}); });
  rejected_for("divide", "the room of head 1 must be in [11,", [&] { divide({12, 10}); });
  rejected_for("divide", "the room of head 1", [&] { divide({12, 0}); });
  rejected_for("divide", "the room of head 0", [&] { divide({-1, 12}); });
  rejected_for("divide", "the room of head 1", [&] { divide({12, -24}); });
  rejected_for("divide", "the room of head 1", [&] { divide({12, Index{1} << 31}); });
  rejected_for("divide", "all rooms together", [&] { divide({Index{1} << 30, Index{1} << 30}); });
  rejected_for("divide", "the largest room must be in [12,", [&] { divide({11, 11}); });
  refuses_layers("divide", [&](Index layer) { manager.divide(layer, std::vector<Index>{24, 24}); });
  divide({8, 12});
  // Of a divided layer, too.
  rejected_for("divide", "the room of head 0", [&] { divide({7, 12}); });
  rejected_for("divide", "the room of head 1", [&] { divide({12, 10}); });
  rejected_for("divide", "number of rooms", [&] { divide({}); });
  rejected_for("reserve", "capacity must be in [12,", [&] { manager.reserve(0, 11); });
  divide({12, 11});
  EXPECT_EQ(manager.capacity(0), 12);

  GraphConfig config = graph_config();
  config.scope = GraphScope::layer;
  GraphManager shared(config, {});
  for (const std::vector<Index>& rooms : std::vector<std::vector<Index>>{{24}, {24, 24}}) {
    expect_rejected(shared, "divide", [&] { shared.divide(0, rooms); });
  }
}

TEST_F(DividedArguments, OfCallsThatNeedAnEvenLayer) {
  manager.divide(0, std::vector<Index>{10, 14});
  constexpr std::string_view kPart = "must be an even layer (see reserve)";
  HostTensor pool(DType::f32, {2, 1, 24, 8});
  HostTensor out(DType::f32, {2, 4, 8});
  HostTensor queries(DType::f32, {2, 4, 1, 8});
  for (const HostTensor* cache : {&std::as_const(pool), &std::as_const(feeder.keys)}) {
    rejected_for("update", kPart,
                 [&] { manager.update(0, query.view(), cache->view(), {}, {}, Stream{}); });
    rejected_for("attend", kPart, [&] {
      manager.attend(0, query.view(), cache->view(), cache->view(), {}, out.view(), {}, Stream{});
    });
    rejected_for("update_rows", kPart,
                 [&] { manager.update_rows(0, queries.view(), cache->view(), {}, Stream{}); });
    rejected_for("update_rows", kPart, [&] {
      manager.update_rows(0, queries.view(), cache->view(),
                          {.score = {}, .valid = {}, .row_stride = 0}, Stream{});
    });
  }
  rejected_for("update", kPart, [&] {
    manager.update_and_step(0, query.view(), std::as_const(pool).view(), {}, {}, Stream{});
  });
  HostTensor keep(DType::i32, {2, 2, 4});
  keep.for_each(
      [&](const std::vector<Index>& index) { keep.set(index, static_cast<double>(index[2])); });
  rejected_for("compact", kPart, [&] { manager.compact(0, keep.view(), {}, {}, Stream{}); });
  rejected_for("compact", kPart,
               [&] { manager.compact(0, keep.view(), feeder.keys.view(), {}, Stream{}); });
  HostTensor positions(DType::i32, {2, 2, 10});
  HostTensor neighbors(DType::i32, {2, 2, 10, 4});
  HostTensor probabilities(DType::f32, {2, 2, 10, 4});
  positions.fill(-1);
  neighbors.fill(-1);
  const auto load = [&] {
    manager.load_rows(0, positions.view(), neighbors.view(), probabilities.view());
  };
  rejected_for("load_rows", kPart, load);
  HostTensor weights(DType::u32, {2, 2, manager.length(0)});
  const auto load_weights = [&] { manager.load_restart_weights(0, weights.view()); };
  rejected_for("load_restart_weights", kPart, load_weights);
  // The other layer is as it was, and so is this one once it is even.
  manager.update_rows(1, queries.view(), feeder.keys.view(), {}, Stream{});
  manager.reserve(0, kCapacity);
  load_weights();
  manager.compact(0, keep.view(), {}, {}, Stream{});
  load();
}

TEST_F(DividedArguments, OfItsCaches) {
  manager.divide(0, std::vector<Index>{10, 14});
  constexpr Index kPool = 24;
  const HostTensor pool(DType::f32, {2, 1, kPool, 8});
  HostTensor written = pool;
  HostTensor values(DType::f16, {2, 1, kPool, 5});
  HostTensor out(DType::f32, {2, 4, 8});
  HostTensor slots(DType::i32, {2, 2});
  for (Index b = 0; b < 2; ++b) {
    slots.set({b, 0}, 8);
    slots.set({b, 1}, 11);
  }
  const HostTensor key(DType::f32, {2, 2, 8});
  const HostTensor value(DType::f16, {2, 2, 5});
  const auto update = [&](const ConstTensorView& keys) {
    manager.update(0, query.view(), keys, slots.view(), {}, Stream{});
  };
  const auto attend = [&](const ConstTensorView& keys, const ConstTensorView& its_values) {
    manager.attend(0, query.view(), keys, its_values, slots.view(), out.view(), {}, Stream{});
  };
  const auto renew = [&](const ConstTensorView& keys) {
    manager.update_novelty(0, keys, Stream{});
  };
  const auto place = [&](const TensorView& keys, const TensorView& its_values) {
    HostTensor found(DType::i32, {2, 2});
    manager.place(0, key.view(), value.view(), keys, its_values, found.view(), Stream{});
  };
  const ConstTensorView good = pool.view();
  refuses<ConstTensorView>("update", good, kKeys, update);
  refuses<ConstTensorView>("attend", good, kKeys,
                           [&](const ConstTensorView& view) { attend(view, good); });
  refuses<ConstTensorView>("attend", good, kKeys,
                           [&](const ConstTensorView& view) { attend(good, view); });
  refuses<ConstTensorView>(
      "update_novelty", good,
      {.axes = {2}, .dtypes = {DType::f16, DType::bf16}, .last_stride = false, .written = false},
      renew);
  const Freedom moved{.axes = {2}, .dtypes = {}, .last_stride = false, .written = true};
  refuses<TensorView>("place", written.view(), moved,
                      [&](const TensorView& view) { place(view, values.view()); });
  refuses<TensorView>("place", values.view(), moved,
                      [&](const TensorView& view) { place(written.view(), view); });

  // As an even layer has them, and a slot less than the pool.
  constexpr std::string_view kAxes = "(B, 1, pool, D)";
  HostTensor even(DType::f32, {2, 2, kPool, 8});
  HostTensor even_values(DType::f16, {2, 2, kPool, 5});
  const ConstTensorView even_keys = std::as_const(even).view();
  rejected_for("update", kAxes, [&] { update(even_keys); });
  rejected_for("attend", kAxes, [&] { attend(even_keys, good); });
  rejected("attend", [&] { attend(good, even_keys); });
  rejected_for("update_novelty", kAxes, [&] { renew(even_keys); });
  rejected_for("place", kAxes, [&] { place(even.view(), even_values.view()); });
  rejected_for("place", kAxes, [&] { place(written.view(), even_values.view()); });
  ConstTensorView few = good;
  few.shape[2] = kPool - 1;
  constexpr std::string_view kSlots = "number of slots must be at least 24, got 23";
  rejected_for("update", kSlots, [&] { update(few); });
  rejected_for("attend", kSlots, [&] { attend(few, good); });
  rejected_for("attend", kSlots, [&] { attend(good, few); });
  rejected_for("update_novelty", kSlots, [&] { renew(few); });
  TensorView few_keys = written.view();
  TensorView few_values = values.view();
  few_keys.shape[2] = few_values.shape[2] = kPool - 1;
  rejected_for("place", kSlots, [&] { place(few_keys, few_values); });
  rejected("place", [&] { place(written.view(), few_values); });
  EXPECT_EQ(pool.bytes(), written.bytes());

  // And the other way round: an even layer takes no pool.
  HostTensor all_slots(DType::f32, {2, 1, 2 * kCapacity, 8});
  rejected("update", [&] {
    manager.update(1, query.view(), std::as_const(all_slots).view(), {}, {}, Stream{});
  });
  update(good);
}

TEST_F(Arguments, OfHeadBudgets) {
  EvictionConfig eviction{.budget = 12, .interval = 4, .window = 4, .sinks = 2};
  HostTensor out(DType::i32, {2, 2, kLength});
  HostTensor mask(DType::u8, {2, 2, kLength});
  const auto of_cuts = [&](GraphManager& of, const EvictionConfig& bad, std::string_view common) {
    const auto refused = [&](std::string_view operation, const std::function<void()>& call) {
      expect_rejected(of, common.empty() ? operation : common, call);
    };
    refused("is_full", [&] { (void)of.is_full(0, bad); });
    refused("full_sequences", [&] { (void)of.full_sequences(0, bad); });
    refused("kept_length", [&] { (void)of.kept_length(0, bad, true); });
    refused("kept_counts", [&] { (void)of.kept_counts(0, bad, false); });
    refused("select", [&] { of.select(0, bad, true, out.view(), Stream{}); });
  };
  for (const std::vector<Index>& budgets :
       std::vector<std::vector<Index>>{{12}, {12, 12, 12}, {12, 12, 12, 12}}) {
    eviction.head_budgets = budgets;
    of_cuts(manager, eviction, "");
  }
  for (const std::vector<Index>& budgets :
       std::vector<std::vector<Index>>{{6, 12}, {12, 6}, {12, 0}, {-1, 12}, {12, Index{1} << 40}}) {
    eviction.head_budgets = budgets;
    expect_invalid("EvictionConfig", [&] { eviction.validate(); });
    of_cuts(manager, eviction, "EvictionConfig");
    rejected("EvictionConfig", [&] { manager.safety_mask(0, eviction, 0.2, mask.view(), {}); });
    expect_invalid("EvictionConfig", [&] { MonitorConfig{.eviction = eviction}.validate(); });
  }
  eviction.head_budgets = {7, 12};
  eviction.validate();
  refuses_layers("kept_counts",
                 [&](Index layer) { (void)manager.kept_counts(layer, eviction, false); });
  HostTensor good(DType::i32, {2, 2, 12});
  refuses<TensorView>("select", good.view(), kOut, [&](const TensorView& view) {
    manager.select(0, eviction, false, view, Stream{});
  });

  // Heads that share a graph cannot keep different numbers.
  GraphConfig config = graph_config();
  config.scope = GraphScope::layer;
  GraphManager shared(config, {});
  for (const std::vector<Index>& budgets : std::vector<std::vector<Index>>{{12}, {12, 12}}) {
    eviction.head_budgets = budgets;
    of_cuts(shared, eviction, "");
  }
}

TEST(MonitorArguments, OfHeadBudgets) {
  MonitorConfig config{.eviction = {.budget = 12, .interval = 4, .window = 4, .sinks = 2}};
  const auto make = [&] { Monitor(graph_config(), {}, config); };
  for (const std::size_t layers : {1U, 3U}) {
    config.head_budgets.assign(layers, {12, 14});
    EXPECT_NO_THROW(config.validate());
    expect_invalid("Monitor", make);
  }
  config.head_budgets = {{12, 14}, {12, 6}};
  expect_invalid("EvictionConfig", [&] { config.validate(); });
  expect_invalid("EvictionConfig", make);
  config.head_budgets = {{12, 14}, {}};
  EXPECT_NO_THROW(make());
  Monitor monitor(graph_config(), {}, config);
  for (const Index layer : {Index{-1}, Index{2}, kAllLayers}) {
    expect_invalid("Monitor", [&] { (void)monitor.is_full(layer); });
    expect_invalid("Monitor", [&] { (void)monitor.kept_length(layer); });
  }
  for (const Index layer : {Index{-1}, Index{2}, kAllLayers}) {
    expect_invalid("Monitor", [&] { monitor.set_head_budgets(layer, {12, 14}); });
  }
  expect_invalid("Monitor", [&] { monitor.set_head_budgets(0, {12, 14, 16}); });
  expect_invalid("EvictionConfig", [&] { monitor.set_head_budgets(0, {12, 6}); });
  EXPECT_EQ(monitor.config().head_budgets, config.head_budgets);  // as before
  config.head_budgets = {{12, 14}, {12, 14, 16}};
  Monitor uneven(graph_config(), {}, config);
  EXPECT_FALSE(uneven.is_full(0));
  expect_invalid("is_full", [&] { (void)uneven.is_full(1); });
  expect_invalid("kept_length", [&] { (void)uneven.kept_length(1); });
}

TEST_F(Arguments, OfInspection) {
  refuses_layers("rooms", [&](Index layer) { (void)manager.rooms(layer); });
  refuses_layers("length", [&](Index layer) { (void)manager.length(layer); });
  refuses_layers("capacity", [&](Index layer) { (void)manager.capacity(layer); });
  refuses_layers("batch_size", [&](Index layer) { (void)manager.batch_size(layer); });
  refuses_layers("tokens_seen", [&](Index layer) { (void)manager.tokens_seen(layer, 0); });
  refuses_layers("tokens_held", [&](Index layer) { (void)manager.tokens_held(layer, 0); });
  refuses_layers("tokens_walked", [&](Index layer) { (void)manager.tokens_walked(layer, 0); });
  for (const Index sequence : {-1, 2}) {
    rejected("tokens_seen", [&] { (void)manager.tokens_seen(0, sequence); });
    rejected("tokens_held", [&] { (void)manager.tokens_held(0, sequence); });
    rejected("tokens_walked", [&] { (void)manager.tokens_walked(0, sequence); });
  }
}

TEST_F(Arguments, OfRows) {
  HostTensor neighbors(DType::i32, {2, 2, kLength, 4});
  HostTensor probabilities(DType::f32, {2, 2, kLength, 4});
  refuses<TensorView>("rows", neighbors.view(), kOut, [&](const TensorView& view) {
    manager.rows(0, view, probabilities.view(), Stream{});
  });
  refuses<TensorView>("rows", probabilities.view(), kOut, [&](const TensorView& view) {
    manager.rows(0, neighbors.view(), view, Stream{});
  });
  refuses_layers("rows", [&](Index layer) {
    manager.rows(layer, neighbors.view(), probabilities.view(), Stream{});
  });
  HostTensor restart(DType::f32, {2, 2, kLength});
  refuses<TensorView>("restart_distribution", restart.view(), kOut, [&](const TensorView& view) {
    manager.restart_distribution(0, 0, view, Stream{});
  });
  for (const int population : {-1, 2}) {
    rejected("restart_distribution",
             [&] { manager.restart_distribution(0, population, restart.view(), Stream{}); });
  }
  refuses_layers("restart_distribution", [&](Index layer) {
    manager.restart_distribution(layer, 0, restart.view(), Stream{});
  });
}

TEST_F(Arguments, OfLoadRows) {
  HostTensor positions(DType::i32, {2, 2, 10});
  HostTensor neighbors(DType::i32, {2, 2, 10, 4});
  HostTensor probabilities(DType::f32, {2, 2, 10, 4});
  const auto fill = [&] {
    neighbors.fill(-1);
    probabilities.fill(0.0);
    positions.for_each([&](const std::vector<Index>& index) {
      const Index slot = index[2];
      positions.set(index, slot == 3 ? -1.0 : static_cast<double>(2 * slot));
    });
    neighbors.set({1, 1, 9, 0}, 5);
    neighbors.set({1, 1, 9, 1}, 6);
    probabilities.set({1, 1, 9, 0}, 0.25);
    probabilities.set({1, 1, 9, 1}, 0.75);
  };
  const auto load = [&] {
    manager.load_rows(0, positions.view(), neighbors.view(), probabilities.view());
  };
  fill();
  // Another number of slots in one of the three does not fit the others.
  const Freedom nothing{};
  refuses<ConstTensorView>("load_rows", std::as_const(positions).view(), nothing,
                           [&](const ConstTensorView& view) {
                             manager.load_rows(0, view, neighbors.view(), probabilities.view());
                           });
  refuses<ConstTensorView>("load_rows", std::as_const(neighbors).view(), nothing,
                           [&](const ConstTensorView& view) {
                             manager.load_rows(0, positions.view(), view, probabilities.view());
                           });
  refuses<ConstTensorView>("load_rows", std::as_const(probabilities).view(), nothing,
                           [&](const ConstTensorView& view) {
                             manager.load_rows(0, positions.view(), neighbors.view(), view);
                           });
  refuses_layers("load_rows", [&](Index layer) {
    manager.load_rows(layer, positions.view(), neighbors.view(), probabilities.view());
  });
  const auto refuses_content = [&](HostTensor& tensor, std::initializer_list<Index> index,
                                   double value,
                                   std::source_location where = std::source_location::current()) {
    fill();
    tensor.set(index, value);
    rejected("load_rows", load, where);
  };
  refuses_content(positions, {1, 1, 8}, 4.0);      // twice
  refuses_content(positions, {1, 1, 8}, -2.0);     // no position
  refuses_content(positions, {1, 1, 8}, -1.0);     // a token less than the other head
  refuses_content(neighbors, {1, 1, 9, 0}, 3.0);   // an empty slot
  refuses_content(neighbors, {1, 1, 9, 0}, 9.0);   // itself
  refuses_content(neighbors, {1, 1, 9, 0}, 10.0);  // out of range
  refuses_content(neighbors, {1, 1, 9, 0}, -2.0);
  refuses_content(positions, {1, 1, 5}, 100.0);  // then 9 -> 5 points to a newer token
  refuses_content(probabilities, {1, 1, 9, 0}, 0.5);
  refuses_content(probabilities, {1, 1, 9, 0}, -0.25);
  refuses_content(probabilities, {1, 1, 9, 0}, kNan);
  refuses_content(probabilities, {1, 1, 9, 0}, kInfinity);
  HostTensor many_positions(DType::i32, {2, 2, kCapacity + 1});
  HostTensor many_neighbors(DType::i32, {2, 2, kCapacity + 1, 4});
  HostTensor many_probabilities(DType::f32, {2, 2, kCapacity + 1, 4});
  many_positions.fill(-1);
  many_neighbors.fill(-1);
  rejected("load_rows", [&] {
    manager.load_rows(0, many_positions.view(), many_neighbors.view(), many_probabilities.view());
  });
  fill();
  load();
  EXPECT_EQ(manager.length(0), 10);
}

TEST(Construction, ChecksItsConfigurations) {
  GraphConfig graph = graph_config();
  graph.top_k = 6;
  expect_invalid("GraphConfig", [&] { GraphManager(graph, {}); });
  expect_invalid("WalkConfig", [&] { GraphManager(graph_config(), {.restart_prob = 0.0}); });
  expect_invalid("WalkConfig", [&] { GraphManager(graph_config(), {.populations = {}}); });
}

TEST(Construction, TellsThatThereIsNoCuda) {
  if (cuda_device_count() > 0) GTEST_SKIP() << "there is a CUDA device";
  GraphConfig graph = graph_config();
  graph.device = {DeviceType::cuda, 0};
  try {
    GraphManager manager(graph, {});
    FAIL() << "nothing was thrown";
  } catch (const BackendUnavailable& error) {
    EXPECT_GT(std::string(error.what()).size(), 10U) << error.what();
  }
}

}  // namespace
}  // namespace spectralkv::test
