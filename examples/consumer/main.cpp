// An engine's loop in plain C++: one sequence, one layer, a cache of the engine's own. Keys, values
// and queries are random here; a real engine computes them, and attends over slots [0, length).
#include <cstdint>
#include <exception>
#include <iostream>
#include <random>
#include <vector>

#include "spectralkv/spectralkv.h"

namespace {

namespace skv = spectralkv;

constexpr std::int64_t kQueryHeads = 4;
constexpr std::int64_t kHeads = 2;
constexpr std::int64_t kDim = 64;
constexpr std::int64_t kLayer = 0;
constexpr std::int64_t kTokens = 500;

void decode() {
  const skv::EvictionConfig eviction{.budget = 96, .interval = 32};
  const std::int64_t capacity = eviction.budget + eviction.interval;
  skv::GraphConfig graph{.num_query_heads = kQueryHeads,
                         .num_kv_heads = kHeads,
                         .head_dim = kDim,
                         .capacity = capacity,
                         .seed = 1};
  skv::WalkConfig walk;
  skv::apply_preset("default", graph, walk);
  skv::Monitor monitor(graph, walk, {.eviction = eviction});

  std::vector<float> query(kQueryHeads * kDim);
  std::vector<float> keys(static_cast<std::size_t>(kHeads * capacity * kDim));
  std::vector<float> values(keys.size());
  const skv::ConstTensorView query_view(query.data(), skv::DType::f32, {1, kQueryHeads, kDim});
  const skv::TensorView key_view(keys.data(), skv::DType::f32, {1, kHeads, capacity, kDim});
  const skv::TensorView value_view(values.data(), skv::DType::f32, {1, kHeads, capacity, kDim});

  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  for (std::int64_t token = 0; token < kTokens; ++token) {
    const std::int64_t slot = monitor.graph().length(kLayer);
    for (float& x : query) x = normal(random);
    for (std::int64_t h = 0; h < kHeads; ++h) {
      for (std::int64_t d = 0; d < kDim; ++d) {
        const auto at = static_cast<std::size_t>((h * capacity + slot) * kDim + d);
        keys[at] = normal(random);
        values[at] = normal(random);
      }
    }
    monitor.on_step(kLayer, query_view, key_view, {}, {}, {});
    if (!monitor.is_full(kLayer)) continue;

    const std::int64_t kept = monitor.kept_length(kLayer);
    std::vector<std::int32_t> keep(static_cast<std::size_t>(kHeads * kept));
    const skv::TensorView keep_view(keep.data(), skv::DType::i32, {1, kHeads, kept});
    monitor.keep(kLayer, key_view, keep_view, {});
    monitor.graph().compact(kLayer, keep_view, key_view, value_view, {});
  }
  const skv::Statistics statistics = monitor.graph().statistics();
  std::cout << kTokens << " tokens seen, " << monitor.graph().tokens_held(kLayer, 0)
            << " held by each head, " << statistics.evicted << " let go, " << statistics.walks
            << " graphs walked\n";
}

}  // namespace

int main() {
  std::cout << "spectralkv " << skv::version() << ", CPU kernels: " << skv::cpu_simd()
            << ", CUDA devices: ";
  if (const int devices = skv::cuda_device_count(); devices > 0) {
    std::cout << devices << '\n';
  } else {
    std::cout << "none (" << skv::cuda_status() << ")\n";
  }
  try {
    decode();
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
