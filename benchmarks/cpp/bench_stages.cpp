// Every stage of GraphManager on the CPU, at the shapes of an 8B model's layer: 32 query and 8 KV
// heads of 128. Arguments: slots, and threads (0: all).
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <numeric>
#include <random>
#include <vector>

#include "spectralkv/spectralkv.h"

namespace {

namespace skv = spectralkv;

constexpr std::int64_t kQueryHeads = 32;
constexpr std::int64_t kHeads = 8;
constexpr std::int64_t kDim = 128;

skv::GraphConfig graph_config(std::int64_t capacity, std::int64_t threads) {
  return {.num_query_heads = kQueryHeads,
          .num_kv_heads = kHeads,
          .head_dim = kDim,
          .capacity = capacity,
          .num_threads = static_cast<int>(threads)};
}

skv::WalkConfig recent_walk() {
  skv::WalkConfig walk;
  walk.populations = {{.restart = skv::Restart::recent, .count = skv::VisitCount::edges}};
  return walk;
}

/// Values in [-1, 1] of any floating dtype; half precision gets exact small fractions.
std::vector<std::byte> random_values(skv::DType dtype, std::int64_t count) {
  std::mt19937 random(1);
  std::vector<std::byte> bytes(static_cast<std::size_t>(count * skv::size_of(dtype)));
  for (std::int64_t i = 0; i < count; ++i) {
    const float value = std::uniform_real_distribution<float>(-1, 1)(random);
    std::uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof(bits));
    auto* const to = bytes.data() + i * skv::size_of(dtype);
    if (dtype == skv::DType::f32) {
      std::memcpy(to, &bits, 4);
    } else if (dtype == skv::DType::bf16) {
      const auto half = static_cast<std::uint16_t>(bits >> 16U);
      std::memcpy(to, &half, 2);
    } else {
      // Any finite float16 does: sign, exponent 14 (a half to one), random mantissa.
      const auto half =
          static_cast<std::uint16_t>(((bits >> 16U) & 0x8000U) | 0x3800U | (bits & 0x3ffU));
      std::memcpy(to, &half, 2);
    }
  }
  return bytes;
}

/// A manager whose first `length` slots hold tokens with random edges.
skv::GraphManager filled_manager(std::int64_t length, std::int64_t capacity, std::int64_t threads) {
  skv::GraphManager manager(graph_config(capacity, threads), recent_walk());
  const int top_k = manager.graph_config().top_k;
  std::mt19937 random(2);
  std::vector<std::int32_t> positions;
  std::vector<std::int32_t> neighbors;
  std::vector<float> probabilities;
  for (std::int64_t h = 0; h < kHeads; ++h) {
    for (std::int32_t slot = 0; slot < length; ++slot) {
      positions.push_back(slot);
      for (int k = 0; k < top_k; ++k) {
        neighbors.push_back(slot == 0 ? -1 : static_cast<std::int32_t>(random() % slot));
        probabilities.push_back(slot == 0 ? 0.0F : 1.0F / static_cast<float>(top_k));
      }
    }
  }
  manager.load_rows(
      0, skv::ConstTensorView(positions.data(), skv::DType::i32, {1, kHeads, length}),
      skv::ConstTensorView(neighbors.data(), skv::DType::i32, {1, kHeads, length, top_k}),
      skv::ConstTensorView(probabilities.data(), skv::DType::f32, {1, kHeads, length, top_k}));
  return manager;
}

void update(benchmark::State& state, skv::DType dtype) {
  const std::int64_t length = state.range(0);
  const auto keys = random_values(dtype, kHeads * length * kDim);
  const auto query = random_values(dtype, kQueryHeads * kDim);
  skv::GraphManager manager = filled_manager(length - 1, length, state.range(1));
  for (auto _ : state) {
    manager.update(0, skv::ConstTensorView(query.data(), dtype, {1, kQueryHeads, kDim}),
                   skv::ConstTensorView(keys.data(), dtype, {1, kHeads, length, kDim}), {}, {}, {});
    state.PauseTiming();
    manager.truncate(0, 1);
    state.ResumeTiming();
  }
  state.SetBytesProcessed(state.iterations() * static_cast<std::int64_t>(keys.size()));
}
BENCHMARK_CAPTURE(update, f32, skv::DType::f32)->ArgsProduct({{1024, 4096, 32768}, {1, 0}});
BENCHMARK_CAPTURE(update, f16, skv::DType::f16)->ArgsProduct({{1024, 4096, 32768}, {1, 0}});
BENCHMARK_CAPTURE(update, bf16, skv::DType::bf16)->ArgsProduct({{1024, 4096, 32768}, {1, 0}});

void update_rows(benchmark::State& state) {
  const std::int64_t length = state.range(0);
  const auto keys = random_values(skv::DType::f32, kHeads * length * kDim);
  const auto queries = random_values(skv::DType::f32, kQueryHeads * length * kDim);
  skv::GraphManager manager(graph_config(length, state.range(1)), recent_walk());
  for (auto _ : state) {
    manager.update_rows(
        0, skv::ConstTensorView(queries.data(), skv::DType::f32, {1, kQueryHeads, length, kDim}),
        skv::ConstTensorView(keys.data(), skv::DType::f32, {1, kHeads, length, kDim}), {}, {});
    state.PauseTiming();
    manager.reset(0);
    state.ResumeTiming();
  }
  // Two operations for each query head, visible pair of tokens and dimension.
  state.counters["flops"] =
      benchmark::Counter(static_cast<double>(kQueryHeads * length * (length + 1) * kDim),
                         benchmark::Counter::kIsIterationInvariantRate);
}
BENCHMARK(update_rows)->ArgsProduct({{512, 2048}, {1, 0}})->Unit(benchmark::kMillisecond);

void walk(benchmark::State& state) {
  skv::GraphManager manager = filled_manager(state.range(0), state.range(0), state.range(1));
  const skv::WalkConfig& config = manager.walk_config();
  for (auto _ : state) manager.walk(0, {}, {});
  state.SetItemsProcessed(state.iterations() * kHeads * config.num_walkers * config.walk_length);
}
BENCHMARK(walk)->ArgsProduct({{1024, 4096, 32768}, {1, 0}});

void solve(benchmark::State& state) {
  skv::GraphManager manager = filled_manager(state.range(0), state.range(0), state.range(1));
  for (auto _ : state) manager.solve(0, {}, {});
  state.SetItemsProcessed(state.iterations() * kHeads * state.range(0));
}
BENCHMARK(solve)->ArgsProduct({{1024, 4096, 32768}, {1, 0}});

void select(benchmark::State& state) {
  const std::int64_t length = state.range(0);
  skv::GraphManager manager = filled_manager(length, length, state.range(1));
  manager.walk(0, {}, {});
  const skv::EvictionConfig eviction{.budget = length / 5, .interval = 1};
  std::vector<std::int32_t> keep(static_cast<std::size_t>(kHeads * eviction.budget));
  for (auto _ : state) {
    manager.select(0, eviction, true,
                   skv::TensorView(keep.data(), skv::DType::i32, {1, kHeads, eviction.budget}), {});
  }
  state.SetItemsProcessed(state.iterations() * kHeads * length);
}
BENCHMARK(select)->ArgsProduct({{1024, 4096, 32768}, {1, 0}});

void compact(benchmark::State& state) {
  const std::int64_t length = state.range(0);
  auto keys = random_values(skv::DType::f32, kHeads * length * kDim);
  auto values = keys;
  std::mt19937 random(3);
  std::vector<std::int32_t> keep;
  for (std::int64_t h = 0; h < kHeads; ++h) {
    std::vector<std::int32_t> slots(static_cast<std::size_t>(length));
    std::iota(slots.begin(), slots.end(), 0);
    std::vector<std::int32_t> kept;
    std::sample(slots.begin(), slots.end(), std::back_inserter(kept), length / 5, random);
    keep.insert(keep.end(), kept.begin(), kept.end());
  }
  const std::int64_t kept = length / 5;
  for (auto _ : state) {
    state.PauseTiming();
    skv::GraphManager manager = filled_manager(length, length, state.range(1));
    state.ResumeTiming();
    manager.compact(0, skv::ConstTensorView(keep.data(), skv::DType::i32, {1, kHeads, kept}),
                    skv::TensorView(keys.data(), skv::DType::f32, {1, kHeads, length, kDim}),
                    skv::TensorView(values.data(), skv::DType::f32, {1, kHeads, length, kDim}), {});
  }
  state.SetBytesProcessed(state.iterations() * 2 * kHeads * kept * kDim * 4);
}
BENCHMARK(compact)->ArgsProduct({{1024, 4096}, {1, 0}})->Iterations(50);

void copy_limit(benchmark::State& state) {  // what compaction can reach: a plain copy of its bytes
  const auto bytes = static_cast<std::size_t>(2 * kHeads * (state.range(0) / 5) * kDim * 4);
  std::vector<std::byte> from(bytes, std::byte{1});
  std::vector<std::byte> to(bytes);
  for (auto _ : state) {
    std::memcpy(to.data(), from.data(), bytes);
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * static_cast<std::int64_t>(bytes));
}
BENCHMARK(copy_limit)->Arg(1024)->Arg(4096);

}  // namespace
