#include <benchmark/benchmark.h>

#include <cstdint>

#include "philox.h"

namespace {

void philox_blocks(benchmark::State& state) {
  std::uint64_t block = 0;
  for (auto _ : state) {
    benchmark::DoNotOptimize(spectralkv::detail::philox4x32_10(42, 7, block++));
  }
  state.SetItemsProcessed(state.iterations());
}
BENCHMARK(philox_blocks);

}  // namespace
