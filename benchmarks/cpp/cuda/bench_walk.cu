// Random walks and the exact solver on a GPU: checks against the CPU backend, then times beside
// what limits them. Arguments: any of "check", "walk", "many", "solve"; none: all. Returns 1 where
// a check fails.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "harness.h"
#include "literal_walk.cuh"
#include "row_format.h"
#include "spectralkv/spectralkv.h"

namespace spectralkv::bench {
namespace {

constexpr Device kGpu{DeviceType::cuda, 0};

/// Graphs of one layer as load_rows takes them.
struct Graphs {
  std::int64_t batch = 1;
  std::int64_t graphs = 1;
  std::int64_t slots = 0;
  int top_k = 8;
  std::vector<std::int32_t> positions;
  std::vector<std::int32_t> neighbors;
  std::vector<float> probabilities;
  std::vector<std::uint32_t> weights;
};

struct Shape {
  std::int64_t batch = 1;
  std::int64_t graphs = 1;
  std::int64_t slots = 0;
  int top_k = 8;
  bool ordered = true;
  double empty = 0.0;  ///< part of the slots without a token
  double hub = 0.0;    ///< part of the edges that go to one token
  bool weighted = true;
  bool alike = false;     ///< all graphs the same
  std::uint32_t gap = 1;  ///< from one position to the next
};

Graphs make_graphs(const Shape& shape, std::uint32_t seed) {
  Graphs out{.batch = shape.batch,
             .graphs = shape.graphs,
             .slots = shape.slots,
             .top_k = shape.top_k,
             .positions = {},
             .neighbors = {},
             .probabilities = {},
             .weights = {}};
  std::mt19937 random(seed);
  const auto below = [&](std::uint32_t n) {
    return static_cast<std::uint32_t>((std::uint64_t{random()} * n) >> 32U);
  };
  const auto slots = static_cast<std::uint32_t>(shape.slots);
  const auto held =
      static_cast<std::uint32_t>(std::lround((1.0 - shape.empty) * static_cast<double>(slots)));
  const std::int64_t made = shape.alike ? 1 : shape.batch * shape.graphs;
  for (std::int64_t graph = 0; graph < made; ++graph) {
    // Which slot holds the token of rank r; positions have gaps.
    std::vector<std::uint32_t> slot_of(slots);
    std::iota(slot_of.begin(), slot_of.end(), 0U);
    if (held < slots || !shape.ordered) std::shuffle(slot_of.begin(), slot_of.end(), random);
    slot_of.resize(held);
    if (shape.ordered) std::sort(slot_of.begin(), slot_of.end());
    std::vector<std::int32_t> positions(slots, -1);
    std::vector<std::int32_t> neighbors(slots * static_cast<std::size_t>(shape.top_k), -1);
    std::vector<float> probabilities(neighbors.size(), 0.0F);
    std::vector<std::uint32_t> weights(slots, 0U);
    for (std::uint32_t r = 0; r < held; ++r) {
      const std::uint32_t slot = slot_of[r];
      positions[slot] = static_cast<std::int32_t>(r * shape.gap);
      weights[slot] = r < 4 ? 0U : 1U + (random() >> (8 + below(20)));
      const int edges = static_cast<int>(
          std::min<std::uint32_t>(static_cast<std::uint32_t>(shape.top_k), r > 4 ? r - 4 : 0));
      if (edges == 0) continue;
      float sum = 0.0F;
      for (int k = 0; k < edges; ++k) {
        // Half of the edges are local.
        const std::uint32_t back = below(2) == 0 ? below(std::min(r - 4, 64U)) : below(r - 4);
        std::uint32_t to = r - 1 - back;
        if (shape.hub > 0.0 && below(1000) < static_cast<std::uint32_t>(1000 * shape.hub)) to = 4;
        const std::size_t at =
            slot * static_cast<std::size_t>(shape.top_k) + static_cast<std::size_t>(k);
        neighbors[at] = static_cast<std::int32_t>(slot_of[to]);
        probabilities[at] =
            shape.weighted ? 0.05F + static_cast<float>(below(1000)) / 1000.0F : 1.0F;
        sum += probabilities[at];
      }
      for (int k = 0; k < edges; ++k) {
        probabilities[slot * static_cast<std::size_t>(shape.top_k) + static_cast<std::size_t>(k)] /=
            sum;
      }
    }
    const std::int64_t copies = shape.alike ? shape.batch * shape.graphs : 1;
    for (std::int64_t copy = 0; copy < copies; ++copy) {
      out.positions.insert(out.positions.end(), positions.begin(), positions.end());
      out.neighbors.insert(out.neighbors.end(), neighbors.begin(), neighbors.end());
      out.probabilities.insert(out.probabilities.end(), probabilities.begin(), probabilities.end());
      out.weights.insert(out.weights.end(), weights.begin(), weights.end());
    }
  }
  return out;
}

/// A tensor on the host or the GPU, filled from the host.
template <class T>
class Tensor {
 public:
  Tensor(Device device, std::int64_t count) : device_(device), count_(count) {
    if (device.type == DeviceType::cpu) {
      host_.resize(static_cast<std::size_t>(count));
    } else {
      gpu_ = std::make_unique<Buffer>(std::max<std::int64_t>(count * 4, 4));
    }
  }
  Tensor(Device device, const std::vector<T>& values)
      : Tensor(device, static_cast<std::int64_t>(values.size())) {
    if (gpu_ == nullptr) {
      host_ = values;
    } else {
      check(cudaMemcpy(data(), values.data(), values.size() * 4, cudaMemcpyHostToDevice),
            "cudaMemcpy");
    }
  }
  void* data() { return gpu_ == nullptr ? host_.data() : gpu_->template as<void>(); }
  std::vector<T> values() {
    if (gpu_ == nullptr) return host_;
    std::vector<T> out(static_cast<std::size_t>(count_));
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    check(cudaMemcpy(out.data(), data(), out.size() * 4, cudaMemcpyDeviceToHost), "cudaMemcpy");
    return out;
  }

 private:
  Device device_;
  std::int64_t count_;
  std::vector<T> host_;
  std::unique_ptr<Buffer> gpu_;
};

void load(GraphManager& manager, std::int64_t layer, const Graphs& graphs) {
  const Device device = manager.graph_config().device;
  Tensor<std::int32_t> positions(device, graphs.positions);
  Tensor<std::int32_t> neighbors(device, graphs.neighbors);
  Tensor<float> probabilities(device, graphs.probabilities);
  manager.load_rows(
      layer,
      ConstTensorView(positions.data(), DType::i32, {graphs.batch, graphs.graphs, graphs.slots},
                      device),
      ConstTensorView(neighbors.data(), DType::i32,
                      {graphs.batch, graphs.graphs, graphs.slots, graphs.top_k}, device),
      ConstTensorView(probabilities.data(), DType::f32,
                      {graphs.batch, graphs.graphs, graphs.slots, graphs.top_k}, device));
  if (!manager.walk_config().needs_novelty()) return;
  Tensor<std::uint32_t> weights(device, graphs.weights);
  manager.load_restart_weights(
      layer, ConstTensorView(weights.data(), DType::u32,
                             {graphs.batch, graphs.graphs, graphs.slots}, device));
  manager.synchronize();
}

/// Frees the slots whose token is among every `every`-th of its graph.
void release(GraphManager& manager, std::int64_t layer, const Graphs& graphs, std::int64_t every) {
  std::vector<std::int32_t> keep;
  std::int64_t count = 0;
  for (std::int64_t graph = 0; graph < graphs.batch * graphs.graphs; ++graph) {
    std::int64_t held = 0;
    count = 0;
    for (std::int64_t slot = 0; slot < graphs.slots; ++slot) {
      if (graphs.positions[static_cast<std::size_t>(graph * graphs.slots + slot)] < 0) continue;
      if (held++ % every == 1) continue;
      keep.push_back(static_cast<std::int32_t>(slot));
      ++count;
    }
  }
  const Device device = manager.graph_config().device;
  Tensor<std::int32_t> tensor(device, keep);
  manager.release(
      layer,
      ConstTensorView(tensor.data(), DType::i32, {graphs.batch, graphs.graphs, count}, device), {});
  manager.synchronize();
}

std::vector<std::uint32_t> visits_of(GraphManager& manager, std::int64_t layer, int population) {
  const Device device = manager.graph_config().device;
  const std::int64_t heads = manager.graph_config().num_kv_heads;
  const std::int64_t batch = manager.batch_size(layer);
  const std::int64_t length = manager.length(layer);
  Tensor<std::uint32_t> out(device, batch * heads * length);
  manager.visits(layer, population,
                 TensorView(out.data(), DType::u32, {batch, heads, length}, device), {});
  manager.synchronize();
  return out.values();
}

std::vector<float> scores_of(GraphManager& manager, std::int64_t layer, int population) {
  const Device device = manager.graph_config().device;
  const std::int64_t heads = manager.graph_config().num_kv_heads;
  const std::int64_t batch = manager.batch_size(layer);
  const std::int64_t length = manager.length(layer);
  Tensor<float> out(device, batch * heads * length);
  manager.scores(layer, population,
                 TensorView(out.data(), DType::f32, {batch, heads, length}, device), {});
  manager.synchronize();
  return out.values();
}

struct Check {
  const char* name;
  Shape shape;
  std::int64_t layers = 1;
  EdgeLaw law = EdgeLaw::weighted;
  std::vector<Population> populations;
  double decay = 0.0;
  std::int64_t walkers = 1024;
  std::int64_t steps = 20;
  std::int64_t release_every = 0;
  std::int64_t spare = 0;  ///< capacity above the slots
  GraphScope scope = GraphScope::head;
};

int failures = 0;

void expect(bool good, const std::string& what) {
  if (good) return;
  ++failures;
  std::printf("FAILED %s\n", what.c_str());
}

void run_check(const Check& check_case) {
  const Shape& shape = check_case.shape;
  const std::int64_t heads = check_case.scope == GraphScope::head ? shape.graphs : 2;
  GraphConfig config{.num_layers = check_case.layers,
                     .batch_size = shape.batch,
                     .num_query_heads = heads,
                     .num_kv_heads = heads,
                     .head_dim = 64,
                     .capacity = shape.slots + check_case.spare,
                     .top_k = shape.top_k,
                     .edge_law = check_case.law,
                     .scope = check_case.scope,
                     .seed = 0x123456789abcdefULL};
  WalkConfig walk{.num_walkers = check_case.walkers,
                  .walk_length = check_case.steps,
                  .decay = check_case.decay,
                  .populations = check_case.populations};
  GraphManager cpu(config, walk);
  config.device = kGpu;
  GraphManager gpu(config, walk);
  for (std::int64_t layer = 0; layer < check_case.layers; ++layer) {
    const Graphs graphs = make_graphs(shape, static_cast<std::uint32_t>(7 + layer));
    for (GraphManager* manager : {&cpu, &gpu}) {
      load(*manager, layer, graphs);
      if (check_case.release_every > 0) release(*manager, layer, graphs, check_case.release_every);
    }
  }
  std::vector<std::uint8_t> marks;
  for (std::int64_t b = 0; b < shape.batch; ++b) marks.push_back(b % 2 == 0 ? 1 : 0);
  for (GraphManager* manager : {&cpu, &gpu}) {
    manager->walk(kAllLayers, {}, {});
    manager->walk(kAllLayers, marks, {});
  }
  std::uint64_t counted = 0;
  std::size_t unlike = 0;
  for (std::int64_t layer = 0; layer < check_case.layers; ++layer) {
    for (int p = 0; p < static_cast<int>(walk.populations.size()); ++p) {
      const auto expected = visits_of(cpu, layer, p);
      const auto got = visits_of(gpu, layer, p);
      for (std::size_t i = 0; i < expected.size(); ++i) {
        counted += expected[i];
        unlike += expected[i] != got[i] ? 1 : 0;
      }
      const auto expected_scores = scores_of(cpu, layer, p);
      const auto got_scores = scores_of(gpu, layer, p);
      std::size_t unlike_scores = 0;
      for (std::size_t i = 0; i < expected_scores.size(); ++i) {
        unlike_scores += expected_scores[i] != got_scores[i] ? 1 : 0;
      }
      expect(unlike_scores == 0, std::string(check_case.name) + ": scores of " +
                                     std::to_string(unlike_scores) + " slots");
    }
    for (std::int64_t b = 0; b < shape.batch; ++b) {
      expect(cpu.tokens_walked(layer, b) == gpu.tokens_walked(layer, b),
             std::string(check_case.name) + ": tokens_walked");
    }
  }
  expect(unlike == 0,
         std::string(check_case.name) + ": visits of " + std::to_string(unlike) + " slots differ");
  // The solver; twice on the GPU, for the same bits.
  double worst = 0.0;
  for (GraphManager* manager : {&cpu, &gpu}) manager->reset(kAllLayers);
  for (std::int64_t layer = 0; layer < check_case.layers; ++layer) {
    const Graphs graphs = make_graphs(shape, static_cast<std::uint32_t>(7 + layer));
    for (GraphManager* manager : {&cpu, &gpu}) {
      load(*manager, layer, graphs);
      if (check_case.release_every > 0) release(*manager, layer, graphs, check_case.release_every);
    }
  }
  cpu.solve(kAllLayers, {}, {});
  gpu.solve(kAllLayers, {}, {});
  for (std::int64_t layer = 0; layer < check_case.layers; ++layer) {
    for (int p = 0; p < static_cast<int>(walk.populations.size()); ++p) {
      const auto expected = scores_of(cpu, layer, p);
      const auto got = scores_of(gpu, layer, p);
      for (std::size_t i = 0; i < expected.size(); ++i) {
        const double difference = std::abs(double{expected[i]} - double{got[i]});
        worst = std::max(worst, difference / (std::abs(double{expected[i]}) + 1e-3));
      }
    }
  }
  expect(worst < 1e-5, std::string(check_case.name) + ": solver off by " + std::to_string(worst));
  if (check_case.decay == 0.0) {
    const auto first = scores_of(gpu, 0, 0);
    gpu.solve(kAllLayers, {}, {});
    const auto second = scores_of(gpu, 0, 0);
    expect(std::memcmp(first.data(), second.data(), first.size() * sizeof(float)) == 0,
           std::string(check_case.name) + ": solver not deterministic");
  }
  std::printf("check %s: %llu visits, %zu unlike; solver %.2g\n", check_case.name,
              static_cast<unsigned long long>(counted), unlike, worst);
  std::fflush(stdout);
}

void run_checks() {
  const Population recent{.restart = Restart::recent, .count = VisitCount::edges, .share = 0.5};
  const Population novelty{.restart = Restart::novelty, .count = VisitCount::all, .share = 0.5};
  const Population current{.restart = Restart::current, .count = VisitCount::all, .share = 0.5};
  const Population tokens{
      .restart = Restart::recent, .count = VisitCount::all, .share = 0.5, .recent_tokens = 777};
  const std::vector<Population> usual{recent, novelty};
  const std::vector<Population> others{tokens, current};
  run_check(
      {.name = "usual", .shape = {.batch = 2, .graphs = 2, .slots = 4096}, .populations = usual});
  run_check({.name = "layers, odd capacity",
             .shape = {.batch = 3, .graphs = 2, .slots = 1003},
             .layers = 3,
             .populations = usual,
             .spare = 6});
  run_check({.name = "k4", .shape = {.slots = 4096, .top_k = 4}, .populations = usual});
  run_check({.name = "k16", .shape = {.slots = 3000, .top_k = 16}, .populations = usual});
  run_check({.name = "k32 weighted", .shape = {.slots = 3000, .top_k = 32}, .populations = others});
  run_check({.name = "k32 uniform",
             .shape = {.slots = 5000, .top_k = 32, .weighted = false},
             .law = EdgeLaw::uniform,
             .populations = usual});
  run_check({.name = "k8 uniform unordered",
             .shape = {.slots = 5000, .ordered = false, .weighted = false},
             .law = EdgeLaw::uniform,
             .populations = usual});
  run_check({.name = "unordered, empty slots, stale edges",
             .shape = {.batch = 2, .slots = 20001, .ordered = false, .empty = 0.2, .gap = 2},
             .populations = others,
             .release_every = 3,
             .spare = 1});
  run_check({.name = "ordered, empty slots",
             .shape = {.slots = 20000, .empty = 0.2, .gap = 2},
             .populations = usual});
  run_check({.name = "positions with gaps",
             .shape = {.batch = 2, .slots = 30000, .gap = 7},
             .populations = others});
  run_check({.name = "stale edges, decay",
             .shape = {.batch = 2, .graphs = 2, .slots = 4096},
             .populations = usual,
             .decay = 0.9,
             .release_every = 2});
  run_check({.name = "64k, long walks",
             .shape = {.slots = 65539},
             .populations = usual,
             .walkers = 300,
             .steps = 77,
             .spare = 4});
  run_check(
      {.name = "140k stale", .shape = {.slots = 140000}, .populations = usual, .release_every = 4});
  run_check({.name = "hub", .shape = {.slots = 4096, .hub = 0.5}, .populations = usual});
  for (const std::int64_t slots : {1, 3, 4, 5, 7, 8, 9, 33}) {
    run_check(
        {.name = "few slots", .shape = {.slots = slots}, .populations = others, .walkers = 33});
  }
  run_check({.name = "scope layer",
             .shape = {.slots = 500},
             .populations = usual,
             .steps = 1,
             .scope = GraphScope::layer});
  std::printf("%d failures\n", failures);
}

// ---- timing

/// The rows of the first graph as the device holds them.
struct Rows {
  std::unique_ptr<Tensor<std::int32_t>> rows;
  std::unique_ptr<Tensor<std::int32_t>> positions;
  std::unique_ptr<Buffer> cumulative;
};

Rows rows_of(const Graphs& graphs, bool weighted) {
  const auto top_k = static_cast<std::size_t>(graphs.top_k);
  const auto slots = static_cast<std::size_t>(graphs.slots);
  const std::size_t words = weighted ? 2 * top_k : top_k;
  std::vector<std::int32_t> rows(slots * words, -1);
  for (std::size_t slot = 0; slot < slots; ++slot) {
    double sum = 0.0;
    for (std::size_t k = 0; k < top_k; ++k) {
      const std::size_t at = slot * top_k + k;
      rows[slot * words + k] = graphs.neighbors[at];
      sum += double{graphs.probabilities[at]};
      if (weighted) {
        rows[slot * words + top_k + k] = static_cast<std::int32_t>(
            static_cast<std::uint32_t>(std::min(sum * 0x1p32, 4294967295.0)));
      }
    }
  }
  std::vector<std::uint64_t> cumulative(slots);
  std::uint64_t sum = 0;
  for (std::size_t slot = 0; slot < slots; ++slot) {
    cumulative[slot] = sum += graphs.weights[slot];
  }
  Rows out{.rows = std::make_unique<Tensor<std::int32_t>>(kGpu, rows),
           .positions = std::make_unique<Tensor<std::int32_t>>(
               kGpu, std::vector<std::int32_t>(graphs.positions.begin(),
                                               graphs.positions.begin() + graphs.slots)),
           .cumulative = std::make_unique<Buffer>(graphs.slots * 8)};
  check(
      cudaMemcpy(out.cumulative->as<void>(), cumulative.data(), slots * 8, cudaMemcpyHostToDevice),
      "cudaMemcpy");
  return out;
}

/// As many loads one after the other as a walker has steps, of words of rows that lie anywhere.
__global__ void chase_kernel(const std::int32_t* rows, std::uint32_t slots, std::uint32_t words,
                             int threads, int steps, std::uint32_t* out) {
  const std::uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
  if (thread >= static_cast<std::uint32_t>(threads)) return;
  std::uint32_t node = __umulhi(thread * 0x9e3779b1U, slots);
  for (int step = 0; step < steps; ++step) {
    const auto value = static_cast<std::uint32_t>(__ldg(rows + node * words));
    node = __umulhi((value + thread) * 0x9e3779b1U, slots);
  }
  out[thread] = node;
}

__global__ void empty_kernel() {}

/// Reads sectors anywhere in memory, all independent of each other.
__global__ void gather_kernel(const std::uint32_t* data, std::uint64_t sectors, int each,
                              std::uint32_t* out) {
  const std::uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
  std::uint32_t sum = 0;
#pragma unroll 8
  for (int i = 0; i < each; ++i) {
    std::uint64_t mixed =
        (std::uint64_t{thread} * 64 + static_cast<std::uint64_t>(i) + 1) * 0x9e3779b97f4a7c15ULL;
    mixed ^= mixed >> 29U;
    mixed *= 0xbf58476d1ce4e5b9ULL;
    sum += __ldg(data + __umul64hi(mixed, sectors) * 8);
  }
  if (sum == 0x12345678U) out[0] = sum;
}

struct Law {
  const char* name;
  int top_k;
  EdgeLaw law;

  /// Words of a row of a graph with so many slots.
  int row_words(std::int64_t slots) const {
    return detail::words_of_row(detail::row_format({.edge_law = law}, slots), top_k);
  }
};
constexpr Law kLaws[] = {{"K=8 weighted", 8, EdgeLaw::weighted},
                         {"K=4 weighted", 4, EdgeLaw::weighted},
                         {"K=32 uniform", 32, EdgeLaw::uniform}};
constexpr int kWalkers = 1024;
constexpr int kSteps = 20;

GraphManager manager_of(const Law& law, std::int64_t layers, std::int64_t heads, std::int64_t slots,
                        const std::vector<Population>& populations) {
  return {GraphConfig{.num_layers = layers,
                      .num_query_heads = heads,
                      .num_kv_heads = heads,
                      .head_dim = 128,
                      .capacity = slots,
                      .top_k = law.top_k,
                      .edge_law = law.law,
                      .device = kGpu},
          WalkConfig{.populations = populations}};
}

/// The usual populations, and all of them walking.
const std::vector<Population> kUsual = WalkConfig{}.populations;
const std::vector<Population> kWalking = walking().populations;
const std::vector<Population> kRecent{{.restart = Restart::recent, .count = VisitCount::edges}};

void time_one_graph() {
  constexpr int kCalls = 16;
  const Timing nothing = measure({.calls = kCalls}, [](int, cudaStream_t stream) {
    empty_kernel<<<1, 32, 0, stream>>>();
    check(cudaGetLastError(), "empty_kernel");
  });
  print("empty", "one launch", nothing);
  for (const Law& law : kLaws) {
    for (const std::int64_t slots : {4096, 65536}) {
      const bool weighted = law.law == EdgeLaw::weighted;
      const Graphs graphs =
          make_graphs({.slots = slots, .top_k = law.top_k, .weighted = weighted}, 5);
      const std::string name =
          "graphs=1 W=1024 S=20 N=" + std::to_string(slots) + " " + std::string(law.name);
      const Rows rows = rows_of(graphs, weighted);
      const Buffer out(kWalkers * 4);
      const auto words = static_cast<std::uint32_t>(law.row_words(slots));
      const auto chase = [&](int threads_a_block) {
        return measure({.calls = kCalls}, [&](int, cudaStream_t stream) {
          chase_kernel<<<static_cast<unsigned>(kWalkers / threads_a_block),
                         static_cast<unsigned>(threads_a_block), 0, stream>>>(
              static_cast<const std::int32_t*>(rows.rows->data()),
              static_cast<std::uint32_t>(slots), words, kWalkers, kSteps, out.as<std::uint32_t>());
          check(cudaGetLastError(), "chase_kernel");
        });
      };
      const Timing chase64 = chase(64);
      const Timing chase32 = chase(32);
      print("chase", name + " blocks of 32", chase32);
      print("chase", name + " blocks of 64", chase64);
      const double floor = std::min(chase32.median, chase64.median);

      const Buffer states(kWalkers * static_cast<std::int64_t>(sizeof(curandStatePhilox4_32_10_t)));
      const Buffer visits(slots * 4);
      literal_init_kernel<<<kWalkers / 64, 64>>>(states.as<curandStatePhilox4_32_10_t>(), kWalkers,
                                                 1);
      check(cudaDeviceSynchronize(), "literal_init_kernel");
      const LiteralGraph literal{
          .positions = static_cast<const std::int32_t*>(rows.positions->data()),
          .rows = static_cast<const std::int32_t*>(rows.rows->data()),
          .cumulative = rows.cumulative->as<std::uint64_t>(),
          .visits = visits.as<std::uint32_t>(),
          .slots = slots,
          .first_recent = slots - slots / 10,
          .top_k = law.top_k,
          .weighted = weighted};
      const Timing plain = measure({.calls = kCalls}, [&](int, cudaStream_t stream) {
        check(cudaMemsetAsync(visits.as<void>(), 0, static_cast<std::size_t>(slots * 4), stream),
              "cudaMemsetAsync");
        literal_walk_kernel<<<kWalkers / 64, 64, 0, stream>>>(
            literal, states.as<curandStatePhilox4_32_10_t>(), kWalkers, kSteps, 1U << 31U);
        check(cudaGetLastError(), "literal_walk_kernel");
      });
      print("literal", name, plain, {{"over_chase", plain.median / floor}});

      for (const auto& [kind, populations] :
           {std::pair{"recent and novelty", &kWalking}, std::pair{"recent", &kRecent}}) {
        GraphManager manager = manager_of(law, 1, 1, slots, *populations);
        load(manager, 0, graphs);
        manager.synchronize();
        const Timing walk = measure({.calls = kCalls}, [&](int, cudaStream_t stream) {
          manager.walk(0, {}, Stream{stream});
        });
        manager.refresh();
        print("walk", name + " " + kind, walk,
              {{"chase_us", floor},
               {"literal_us", plain.median},
               {"over_chase", walk.median / floor},
               {"over_literal", plain.median / walk.median}});
      }
    }
  }
  const Graphs hub = make_graphs({.slots = 4096, .hub = 0.5}, 5);
  GraphManager manager = manager_of(kLaws[0], 1, 1, 4096, kWalking);
  load(manager, 0, hub);
  manager.synchronize();
  print("walk", "graphs=1 W=1024 S=20 N=4096 K=8 weighted, half of the edges to one token",
        measure({.calls = kCalls},
                [&](int, cudaStream_t stream) { manager.walk(0, {}, Stream{stream}); }));
}

/// Sectors of 32 bytes that a step touches: with restart_prob 0.5, half of the steps are followed
/// by one over an edge and read a row for it; the next node's position is read unless a restart
/// follows a restart; a visit is one. A restart by novelty reads the weights of eight slots, and of
/// their sums where a thread block does not hold them all.
double sectors_a_step(const Law& law, const Population& population, std::int64_t slots) {
  const double row = law.law == EdgeLaw::weighted ? std::max(1.0, law.row_words(slots) / 8.0) : 1.0;
  double sectors = 0.5 * row + 0.75 + (population.count == VisitCount::all ? 1.0 : 0.5);
  if (population.restart == Restart::novelty) sectors += 0.5 * (slots > 8192 ? 2.0 : 1.0);
  return sectors;
}

void time_many_graphs() {
  constexpr std::int64_t kLayers = 32;
  constexpr std::int64_t kHeads = 8;
  constexpr double kAllSteps = double{kWalkers} * kSteps * kLayers * kHeads;
  // The first fits the L2 cache, the second does not.
  for (const std::int64_t bytes : {std::int64_t{20} << 20U, std::int64_t{200} << 20U}) {
    const Buffer data(bytes);
    const Buffer out(4);
    check(cudaMemset(data.as<void>(), 0, static_cast<std::size_t>(bytes)), "cudaMemset");
    constexpr int kEach = 64;
    const auto threads = static_cast<std::int64_t>(kAllSteps) * 3 / kEach;
    const Timing gather =
        measure({.calls = 1, .warm_up = 3, .replays = 20}, [&](int, cudaStream_t stream) {
          gather_kernel<<<static_cast<unsigned>(threads / 256), 256, 0, stream>>>(
              data.as<std::uint32_t>(), static_cast<std::uint64_t>(bytes / 32), kEach,
              out.as<std::uint32_t>());
          check(cudaGetLastError(), "gather_kernel");
        });
    const double sectors_a_us = static_cast<double>(threads) * kEach / gather.median;
    print("gather", "sectors anywhere in " + std::to_string(bytes >> 20U) + " MiB", gather,
          {{"gsectors", sectors_a_us * 1e-3}});
    for (const Law& law : kLaws) {
      const std::int64_t slots = bytes / (kLayers * kHeads) / (4 * law.row_words(0)) / 256 * 256;
      const Graphs graphs = make_graphs({.graphs = kHeads,
                                         .slots = slots,
                                         .top_k = law.top_k,
                                         .weighted = law.law == EdgeLaw::weighted,
                                         .alike = true},
                                        6);
      for (const auto& [kind, populations] :
           {std::pair{"recent and novelty", &kWalking}, std::pair{"recent", &kRecent}}) {
        GraphManager manager = manager_of(law, kLayers, kHeads, slots, *populations);
        for (std::int64_t layer = 0; layer < kLayers; ++layer) load(manager, layer, graphs);
        manager.synchronize();
        const Timing walk = measure(
            {.calls = 1, .warm_up = 3, .replays = 20},
            [&](int, cudaStream_t stream) { manager.walk(kAllLayers, {}, Stream{stream}); });
        double sectors = 0.0;
        for (const Population& population : *populations) {
          sectors += population.share * sectors_a_step(law, population, slots);
        }
        print("walk",
              "graphs=256 W=1024 S=20 N=" + std::to_string(slots) + " " + law.name + " " + kind +
                  (bytes >> 20U > 50 ? " DRAM" : " L2"),
              walk,
              {{"gsteps", kAllSteps / walk.median * 1e-3},
               {"gather_gsteps", sectors_a_us * 1e-3 / sectors},
               {"sectors_a_step", sectors}});
      }
      GraphManager manager = manager_of(law, kLayers, kHeads, slots, kUsual);
      for (std::int64_t layer = 0; layer < kLayers; ++layer) load(manager, layer, graphs);
      manager.synchronize();
      print("renew",
            "graphs=256 N=" + std::to_string(slots) + " " + law.name + " recent, novelty exactly",
            measure({.calls = 1, .warm_up = 3, .replays = 20}, [&](int, cudaStream_t stream) {
              manager.walk(kAllLayers, {}, Stream{stream});
            }));
    }
  }
}

void time_solver() {
  for (const std::int64_t slots : {4096, 65536}) {
    for (const std::int64_t heads : {1, 8, 256}) {
      const bool layers = heads > 8;
      if (layers && slots > 4096) continue;
      const Graphs graphs =
          make_graphs({.graphs = layers ? 8 : heads, .slots = slots, .alike = true}, 8);
      GraphManager manager =
          manager_of(kLaws[0], layers ? 32 : 1, layers ? 8 : heads, slots, kRecent);
      for (std::int64_t layer = 0; layer < (layers ? 32 : 1); ++layer) load(manager, layer, graphs);
      manager.solve(kAllLayers, {}, {});
      manager.synchronize();
      const Timing solve =
          measure({.calls = 1, .warm_up = 1, .replays = 7},
                  [&](int, cudaStream_t stream) { manager.solve(kAllLayers, {}, Stream{stream}); });
      print("solve", "N=" + std::to_string(slots) + " K=8 graphs=" + std::to_string(heads), solve);
    }
  }
}

/// What of the exact solver's best fifth a walk of 25 visits a token finds.
void print_overlap() {
  for (const std::int64_t slots : {4096, 65536}) {
    const Graphs graphs = make_graphs({.slots = slots}, 9);
    GraphManager manager(GraphConfig{.capacity = slots, .device = kGpu},
                         WalkConfig{.num_walkers = 25 * slots / 10, .populations = kRecent});
    load(manager, 0, graphs);
    const auto best = [&] {
      const auto scores = scores_of(manager, 0, 0);
      std::vector<std::int32_t> order(scores.size());
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) {
        return scores[static_cast<std::size_t>(a)] > scores[static_cast<std::size_t>(b)];
      });
      order.resize(order.size() / 5);
      std::sort(order.begin(), order.end());
      return order;
    };
    manager.walk(0, {}, {});
    const auto walked = best();
    manager.solve(0, {}, {});
    const auto solved = best();
    std::vector<std::int32_t> both;
    std::set_intersection(walked.begin(), walked.end(), solved.begin(), solved.end(),
                          std::back_inserter(both));
    std::printf(R"({"bench": "overlap", "case": "%lld slots, 25 visits a slot", "overlap": %.4f})"
                "\n",
                static_cast<long long>(slots),
                static_cast<double>(both.size()) / static_cast<double>(solved.size()));
  }
}

}  // namespace
}  // namespace spectralkv::bench

int main(int argc, char** argv) {
  using namespace spectralkv::bench;
  const std::vector<std::string> wanted(argv + 1, argv + argc);
  const auto wants = [&](const char* name) {
    return wanted.empty() || std::find(wanted.begin(), wanted.end(), name) != wanted.end();
  };
  try {
    if (wants("check")) run_checks();
    if (wants("walk")) time_one_graph();
    if (wants("many")) time_many_graphs();
    if (wants("solve")) {
      print_overlap();
      time_solver();
    }
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  return failures == 0 ? 0 : 1;
}
