// The row of one new token a sequence: against a reference, then against the memory's bandwidth.
//
//   bench_update [check | time | plans]    (default: check, then time)
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>
#include <numbers>
#include <string>
#include <vector>

#include "cuda/clusters.h"
#include "cuda/kernels.h"
#include "harness.h"
#include "layer.cuh"

namespace spectralkv::bench {
namespace {

bool sound = true;

void expect(bool good, const std::string& what) {
  if (good) return;
  sound = false;
  std::printf("WRONG %s\n", what.c_str());
}

std::string plan_name(const UpdatePlan& plan) {
  return " cluster" + std::to_string(plan.cluster) + " threads" + std::to_string(plan.threads);
}

void update(Layer& layer, const UpdatePlan& plan, std::int64_t extent, cudaStream_t stream) {
  launch_update(layer.view(), layer.args(), extent, plan, stream);
}

/// Against double precision: what is drawn must be among the best but for rounding.
void check_shape(const Shape& shape, const UpdatePlan& plan, int holes) {
  const std::string name = shape.name() + plan_name(plan) + (holes != 0 ? " holes" : "");
  Layer layer(shape, static_cast<std::uint32_t>(shape.length * 31 + shape.dim));
  const std::vector<std::int32_t> positions = some_positions(shape, holes);
  layer.set_positions(positions);
  update(layer, plan, shape.length + 1, nullptr);
  check(cudaDeviceSynchronize(), name.c_str());
  const std::vector<std::int32_t> rows = layer.new_rows();
  layer.rewind();
  update(layer, plan, shape.length + 1, nullptr);
  check(cudaDeviceSynchronize(), name.c_str());
  expect(rows == layer.new_rows(), name + ": other bits the second time");
  LayerCounters counters{};
  check(cudaMemcpy(&counters, layer.view().counters, sizeof(counters), cudaMemcpyDeviceToHost),
        "cudaMemcpy");
  expect(counters.length == shape.length + 1 && counters.ticket == 0, name + ": counters");
  cuda::Statistics statistics{};
  check(
      cudaMemcpy(&statistics, layer.view().statistics, sizeof(statistics), cudaMemcpyDeviceToHost),
      "cudaMemcpy");
  const int graphs = shape.batch * shape.graphs();
  expect(statistics.rows_written == 2ULL * static_cast<unsigned long long>(graphs) &&
             statistics.rows_nonfinite == 0,
         name + ": statistics");
  for (int i : {0, graphs - 1}) {
    const std::vector<double> exact =
        layer.probabilities(i / shape.graphs(), i % shape.graphs(), positions);
    std::vector<double> best = exact;
    std::sort(best.begin(), best.end(), std::greater<>());
    best.resize(static_cast<std::size_t>(shape.top_k), 0.0);
    const std::int32_t* row = rows.data() + std::int64_t{i} * 2 * shape.top_k;
    double total = 0.0;
    for (int k = 0; k < shape.top_k; ++k) {
      if (row[k] < 0) continue;
      if (row[k] >= shape.length) {
        expect(false, name + ": slot out of range");
        return;
      }
      total += exact[static_cast<std::size_t>(row[k])];
    }
    double sum = 0.0;
    for (int k = 0; k < shape.top_k; ++k) {
      const double p = row[k] >= 0 ? exact[static_cast<std::size_t>(row[k])] : 0.0;
      const double wanted = best[static_cast<std::size_t>(k)];
      const bool good = std::abs(p - wanted) <= 2e-5 * wanted && (row[k] >= 0) == (wanted > 0.0);
      for (int other = 0; other < k; ++other) {
        expect(row[k] < 0 || row[k] != row[other], name + ": a slot twice");
      }
      sum += p;
      const double threshold =
          static_cast<double>(static_cast<std::uint32_t>(row[shape.top_k + k])) / 0x1p32;
      const bool right = total == 0.0 || std::abs(threshold - sum / total) < 2e-5;
      if (good && right) continue;
      expect(false, name + ": graph " + std::to_string(i) + " edge " + std::to_string(k) +
                        " slot " + std::to_string(row[k]) + " p " + std::to_string(p) + " wanted " +
                        std::to_string(wanted) + " threshold " + std::to_string(threshold) +
                        " wanted " + std::to_string(sum / total));
      return;
    }
  }
}

void check_novelty(const Shape& shape, int holes) {
  const std::string name = "novelty " + shape.name();
  Layer layer(shape, static_cast<std::uint32_t>(shape.length + shape.dim));
  const std::vector<std::int32_t> positions = some_positions(shape, holes);
  layer.set_positions(positions);
  // Of single tokens, as the reference has them.
  const Buffer scratch(novelty_scratch(layer.view(), 1) * 4);
  launch_novelty(layer.view(), layer.keys(), {}, 1, scratch.as<float>(), shape.length, nullptr);
  check(cudaDeviceSynchronize(), name.c_str());
  const double error = layer.novelty_error(shape.batch - 1, shape.graphs() - 1, positions);
  expect(error < 40.0, name + ": off by " + std::to_string(error) + " of 2^20");
}

void check_all() {
  for (const DType dtype : {DType::bf16, DType::f16, DType::f32}) {
    for (const int dim : {6, 64, 80, 128, 256, 300, 513}) {
      for (const std::int64_t length : {1, 8, 100, 5000}) {
        check_novelty({.batch = 2, .heads = 2, .dim = dim, .dtype = dtype, .length = length}, 30);
      }
    }
    check_novelty({.batch = 2, .heads = 4, .dtype = dtype, .length = 3000, .shared_graph = true},
                  10);
  }
  const std::vector<UpdatePlan> plans = {{1, 256},  {2, 128},  {3, 256}, {8, 512},
                                         {13, 512}, {16, 256}, {0, 0}};
  for (const UpdatePlan& plan : plans) {
    for (const DType dtype : {DType::bf16, DType::f16, DType::f32}) {
      for (const std::int64_t length : {0, 1, 7, 8, 9, 777, 4096}) {
        check_shape({.batch = 2, .heads = 2, .dtype = dtype, .length = length}, plan, 0);
      }
      for (const int dim : {7, 20, 64, 80, 96, 128, 256, 264}) {
        for (const int group : {1, 3, 8, 16, 17}) {
          check_shape({.batch = 1,
                       .heads = 2,
                       .group = group,
                       .dim = dim,
                       .top_k = group == 3   ? 4
                                : group == 8 ? 16
                                             : 32,
                       .dtype = dtype,
                       .length = 1500},
                      plan, group == 3 ? 50 : 0);
        }
      }
      check_shape({.batch = 2, .heads = 4, .dtype = dtype, .length = 2000, .shared_graph = true},
                  plan, 10);
      check_shape({.batch = 1, .heads = 2, .dtype = dtype, .length = 2000, .softcap = 5.0F}, plan,
                  10);
      if (plan.cluster == 0 || plan.cluster > 4) {
        check_shape({.batch = 1, .heads = 2, .dtype = dtype, .length = 65539}, plan, 0);
      }
    }
  }
  std::printf("checked: %s\n", sound ? "good" : "WRONG");
}

/// All rows of one plan against those of the kernels that read keys twice.
void compare(Layer& layer, const Shape& shape, const UpdatePlan& plan, std::int64_t extent) {
  const auto rows_of = [&](const UpdatePlan& one) {
    layer.rewind();
    update(layer, one, extent, nullptr);
    check(cudaDeviceSynchronize(), "update");
    std::vector<std::int32_t> rows = layer.new_rows();
    layer.rewind();
    const std::size_t words = static_cast<std::size_t>(2 * shape.top_k);
    for (std::size_t i = 0; i < rows.size(); i += words) {
      const auto first = rows.begin() + static_cast<std::ptrdiff_t>(i);
      std::sort(first, first + shape.top_k);
      std::fill(first + shape.top_k, first + static_cast<std::ptrdiff_t>(words), 0);
    }
    return rows;
  };
  const UpdatePlan split{0, 0};
  if (plan.cluster == 0 || rows_of(plan) == rows_of(split)) return;
  std::printf("%s%s: rows differ\n", shape.name().c_str(), plan_name(plan).c_str());
}

/// Without plans: as the library does it, under the name of `bench`.
void time_shape(const Shape& shape, const std::vector<UpdatePlan>& plans, double bandwidth,
                bool warm = false, const char* bench = "update_shape") {
  const std::vector<std::unique_ptr<Layer>> layers = layers_for(shape, warm);
  const auto bytes = static_cast<double>(shape.key_bytes());
  const std::int64_t extent = shape.length + Layer::kRoom;
  const auto time = [&](const UpdatePlan& plan) {
    const Timing timing =
        measure({.calls = warm ? 8 : static_cast<int>(layers.size()), .warm_up = 3, .replays = 25},
                [&](int call, auto stream) {
                  Layer& layer = *layers[static_cast<std::size_t>(call) % layers.size()];
                  update(layer, plan, extent, stream);
                });
    for (const auto& layer : layers) layer->rewind();
    return timing;
  };
  const std::string name = shape.name() + (warm ? " warm" : "");
  if (plans.empty()) {
    const UpdatePlan plan = plan_update(layers[0]->view(), extent, {});
    print_rate(bench, name + plan_name(plan), time(plan), bytes, bandwidth);
    return;
  }
  for (const UpdatePlan& plan : plans) {
    try {
      compare(*layers[0], shape, plan, extent);
      print_rate("update_plan", name + plan_name(plan), time(plan), bytes, bandwidth);
    } catch (const Error& error) {
      std::printf("%s%s: %s\n", name.c_str(), plan_name(plan).c_str(), error.what());
    }
  }
}

/// Of keys as they lie, or turned back as a model with rotary embeddings turned them.
void time_novelty(const Shape& shape, bool turned, double bandwidth) {
  const std::vector<std::unique_ptr<Layer>> layers = layers_for(shape, false);
  const std::int64_t width = WalkConfig{}.novelty_width;
  const Buffer scratch(novelty_scratch(layers[0]->view(), width) * 4);
  const int pairs = shape.dim / 2;
  std::vector<double> revolutions(static_cast<std::size_t>(pairs));
  for (int i = 0; i < pairs; ++i) {
    revolutions[static_cast<std::size_t>(i)] =
        std::pow(1e4, -static_cast<double>(i) / pairs) / (2.0 * std::numbers::pi);
  }
  const Buffer on_device(static_cast<std::int64_t>(revolutions.size() * sizeof(double)));
  check(cudaMemcpy(on_device.as<void>(), revolutions.data(), revolutions.size() * sizeof(double),
                   cudaMemcpyHostToDevice),
        "cudaMemcpy");
  const RotaryView rotary{
      .revolutions = on_device.as<double>(), .pairs = turned ? pairs : 0, .interleaved = false};
  const Timing timing =
      measure({.calls = static_cast<int>(layers.size()), .warm_up = 3, .replays = 25},
              [&](int call, auto stream) {
                const Layer& layer = *layers[static_cast<std::size_t>(call)];
                launch_novelty(layer.view(), layer.keys(), rotary, width, scratch.as<float>(),
                               shape.length, stream);
              });
  print_rate("novelty", shape.name() + (turned ? " turned back" : ""), timing,
             2.0 * static_cast<double>(shape.key_bytes()), bandwidth);
}

/// What other plans would give.
void time_plans(double bandwidth) {
  std::vector<UpdatePlan> plans;
  for (int cluster = 1; cluster <= kMostCluster; ++cluster) {
    for (const int threads : {256, 512}) plans.push_back({cluster, threads});
  }
  plans.push_back({0, 0});
  time_shape({.batch = 1, .length = 4096}, plans, bandwidth, true);
  time_shape({.batch = 1, .length = 4096}, plans, bandwidth);
  time_shape({.batch = 1, .length = 16384}, plans, bandwidth);
  time_shape({.batch = 16, .length = 4096}, plans, bandwidth);
  time_shape({.batch = 4, .length = 16384}, plans, bandwidth);
  const std::vector<UpdatePlan> wide = {{5, 512},  {6, 512},  {8, 256},  {8, 512},
                                        {10, 512}, {12, 512}, {13, 512}, {14, 512},
                                        {15, 512}, {16, 256}, {16, 512}, {0, 0}};
  time_shape({.batch = 1, .length = 65536}, wide, bandwidth);
  time_shape({.batch = 1, .length = 131072}, wide, bandwidth);
  time_shape({.batch = 16, .length = 65536}, wide, bandwidth);
  for (const std::int64_t length : {4096, 16384}) {
    time_shape({.batch = 1, .length = length, .shared_graph = true}, wide, bandwidth);
  }
}

void time_all(double bandwidth) {
  for (const int batch : {1, 16}) {
    for (const std::int64_t length : {4096, 16384, 65536}) {
      time_shape({.batch = batch, .length = length}, {}, bandwidth, false, "update");
    }
  }
  time_shape({.batch = 1, .length = 4096}, {}, bandwidth, true, "update_warm");
  for (const int batch : {1, 16}) {
    const std::int64_t length = batch == 1 ? 65536 : 16384;
    for (const int group : {1, 8, 16}) {
      time_shape({.batch = batch, .group = group, .length = length}, {}, bandwidth);
    }
    for (const int dim : {64, 80, 96, 256}) {
      time_shape({.batch = batch, .dim = dim, .length = length}, {}, bandwidth);
    }
    for (const int top_k : {4, 32}) {
      time_shape({.batch = batch, .top_k = top_k, .length = length}, {}, bandwidth);
    }
    time_shape({.batch = batch, .dtype = DType::f16, .length = length}, {}, bandwidth);
    time_shape({.batch = batch, .dtype = DType::f32, .length = length}, {}, bandwidth);
    time_shape({.batch = batch, .group = 8, .dtype = DType::f32, .length = length}, {}, bandwidth);
    time_shape({.batch = batch, .length = length, .shared_graph = true}, {}, bandwidth);
  }
  for (const int batch : {1, 16}) {
    for (const std::int64_t length : {4096, 65536}) {
      for (const bool turned : {false, true}) {
        time_novelty({.batch = batch, .length = length}, turned, bandwidth);
      }
    }
  }
}

int run(int count, char** arguments) {
  const std::string mode = count > 1 ? arguments[1] : "all";
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  std::printf("%s, %d multiprocessors\n", properties.name, properties.multiProcessorCount);
  if (mode == "all" || mode == "check") check_all();
  if (!sound || mode == "check") return sound ? 0 : 1;
  const double bandwidth = copy_bandwidth();
  if (mode == "plans") {
    time_plans(bandwidth);
  } else {
    time_all(bandwidth);
  }
  return 0;
}

}  // namespace
}  // namespace spectralkv::bench

int main(int count, char** arguments) {
  try {
    return spectralkv::bench::run(count, arguments);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
