// The row of one new token a sequence: against a reference, then against the memory's bandwidth.
//
//   bench_update [check | time | plans]    (default: check, then time)
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda/device/graph_rows.cuh"
#include "cuda/kernels.h"
#include "harness.h"

namespace spectralkv::bench {
namespace {

using namespace spectralkv::cuda;  // NOLINT: every name here is the library's

struct Shape {
  int batch = 1;
  int heads = 8;
  int group = 4;
  int dim = 128;
  int top_k = 8;
  DType dtype = DType::bf16;
  std::int64_t length = 4096;
  bool shared_graph = false;
  float softcap = 0.0F;

  int graphs() const { return shared_graph ? 1 : heads; }
  std::int64_t key_bytes() const { return batch * heads * length * dim * size_of(dtype); }
  std::string name() const {
    const char* type = dtype == DType::bf16 ? "bf16" : dtype == DType::f16 ? "f16" : "f32";
    return "B=" + std::to_string(batch) + " S=" + std::to_string(length) +
           " Hkv=" + std::to_string(heads) + " group=" + std::to_string(group) +
           " D=" + std::to_string(dim) + " K=" + std::to_string(top_k) + " " + type +
           (shared_graph ? " layer" : "");
  }
};

__device__ float noise(std::uint64_t i, std::uint32_t seed) {
  std::uint64_t x = (i + 1) * 0x9e3779b97f4a7c15ULL ^ (std::uint64_t{seed} << 40U);
  x ^= x >> 31U;
  x *= 0xbf58476d1ce4e5b9ULL;
  x ^= x >> 27U;
  x *= 0x94d049bb133111ebULL;
  x ^= x >> 31U;
  float sum = 0.0F;  // of four: near enough to normal
  for (int k = 0; k < 4; ++k) sum += static_cast<float>(x >> (16 * k) & 0xffffU) / 65536.0F - 0.5F;
  return sum * 1.7320508F;
}

template <class T>
__global__ void fill_kernel(T* data, std::int64_t count, std::uint32_t seed, float scale) {
  for (std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; i < count;
       i += std::int64_t{gridDim.x} * blockDim.x) {
    data[i] = static_cast<T>(noise(static_cast<std::uint64_t>(i), seed) * scale);
  }
}

void fill(void* data, DType dtype, std::int64_t count, std::uint32_t seed, float scale) {
  if (dtype == DType::f32) {
    fill_kernel<<<1024, 256>>>(static_cast<float*>(data), count, seed, scale);
  } else if (dtype == DType::f16) {
    fill_kernel<<<1024, 256>>>(static_cast<__half*>(data), count, seed, scale);
  } else {
    fill_kernel<<<1024, 256>>>(static_cast<__nv_bfloat16*>(data), count, seed, scale);
  }
  check(cudaGetLastError(), "fill_kernel");
}

/// A layer with `shape.length` tokens, random keys, and what else an update needs.
class Layer {
 public:
  static constexpr std::int64_t kRoom = 512;  ///< slots that timed updates may take

  Layer(const Shape& shape, std::uint32_t seed)
      : shape_(shape),
        capacity_(shape.length + kRoom),
        keys_(shape.batch * shape.heads * capacity_ * shape.dim * size_of(shape.dtype)),
        queries_(shape.batch * shape.heads * shape.group * shape.dim * size_of(shape.dtype)),
        positions_(slots() * 4),
        rows_(slots() * 2 * shape.top_k * 4),
        scores_(slots() * 4),
        novelty_(slots() * 4),
        scratch_(std::int64_t{16} << 20U),
        small_(4096 + shape.batch * static_cast<std::int64_t>(sizeof(SequenceCounters))) {
    fill(keys_.as<void>(), shape.dtype, keys_.bytes() / size_of(shape.dtype), seed, 1.0F);
    fill(queries_.as<void>(), shape.dtype, queries_.bytes() / size_of(shape.dtype), seed + 1, 2.0F);
    check(cudaMemset(positions_.as<void>(), 0xff, static_cast<std::size_t>(positions_.bytes())),
          "cudaMemset");
    check(cudaMemset(small_.as<void>(), 0, static_cast<std::size_t>(small_.bytes())), "cudaMemset");
    std::vector<std::int32_t> positions(static_cast<std::size_t>(shape.length));
    for (std::int64_t j = 0; j < shape.length; ++j) {
      positions[static_cast<std::size_t>(j)] = static_cast<std::int32_t>(j);
    }
    set_positions(positions);
    view_.index = 0;
    view_.batch = shape.batch;
    view_.heads = shape.heads;
    view_.graphs = shape.graphs();
    view_.heads_per_graph = shape.heads / shape.graphs();
    view_.group = shape.group;
    view_.head_dim = shape.dim;
    view_.top_k = shape.top_k;
    view_.row_words = 2 * shape.top_k;
    view_.populations = 1;
    view_.num_sinks = 4;
    view_.law = EdgeLaw::weighted;
    view_.capacity = capacity_;
    view_.positions = positions_.as<std::int32_t>();
    view_.rows = rows_.as<std::int32_t>();
    view_.scores = scores_.as<float>();
    view_.novelty = novelty_.as<std::uint32_t>();
    view_.update_scratch = scratch_.as<void>();
    auto* const small = small_.as<unsigned char>();
    view_.counters = reinterpret_cast<LayerCounters*>(small);
    view_.fault = reinterpret_cast<FaultRecord*>(small + 256);
    view_.reported = reinterpret_cast<FaultRecord*>(small + 512);
    view_.statistics = reinterpret_cast<cuda::Statistics*>(small + 768);
    view_.sequences = reinterpret_cast<SequenceCounters*>(small + 1024);
    rewind();
  }

  void set_positions(const std::vector<std::int32_t>& positions) {
    for (std::int64_t i = 0; i < shape_.batch * shape_.graphs(); ++i) {
      check(cudaMemcpy(positions_.as<std::int32_t>() + i * capacity_, positions.data(),
                       positions.size() * 4, cudaMemcpyHostToDevice),
            "cudaMemcpy");
    }
  }

  /// Forgets what updates added.
  void rewind() {
    const LayerCounters counters{.length = shape_.length, .ordered = 1, .ticket = 0};
    check(cudaMemcpy(view_.counters, &counters, sizeof(counters), cudaMemcpyHostToDevice),
          "cudaMemcpy");
    const std::vector<SequenceCounters> sequences(
        static_cast<std::size_t>(shape_.batch),
        SequenceCounters{
            .seen = shape_.length, .held = shape_.length, .walked_at = -1, .walk_block = 0});
    check(cudaMemcpy(view_.sequences, sequences.data(), sequences.size() * sizeof(SequenceCounters),
                     cudaMemcpyHostToDevice),
          "cudaMemcpy");
    for (std::int64_t i = 0; i < shape_.batch * shape_.graphs(); ++i) {
      check(cudaMemset(positions_.as<std::int32_t>() + i * capacity_ + shape_.length, 0xff,
                       static_cast<std::size_t>(capacity_ - shape_.length) * 4),
            "cudaMemset");
    }
  }

  TokensView keys() const {
    return {.data = keys_.as<void>(),
            .dtype = shape_.dtype,
            .sequence_stride = shape_.heads * capacity_ * shape_.dim,
            .head_stride = capacity_ * shape_.dim,
            .token_stride = shape_.dim};
  }
  UpdateArgs args() const {
    const std::int64_t query_heads = shape_.heads * shape_.group;
    return {.queries = {.data = queries_.as<void>(),
                        .dtype = shape_.dtype,
                        .sequence_stride = query_heads * shape_.dim,
                        .head_stride = shape_.dim,
                        .token_stride = query_heads * shape_.dim},
            .keys = keys(),
            .slots = {},
            .scale = 1.0F / std::sqrt(static_cast<float>(shape_.dim)),
            .softcap = shape_.softcap};
  }

  const LayerView& view() const { return view_; }

  /// The rows that the slot behind all others has, (B, G, 2 K).
  std::vector<std::int32_t> new_rows() const {
    const std::int64_t graphs = shape_.batch * shape_.graphs();
    const std::int64_t words = view_.row_words;
    std::vector<std::int32_t> rows(static_cast<std::size_t>(graphs * words));
    for (std::int64_t i = 0; i < graphs; ++i) {
      check(
          cudaMemcpy(rows.data() + i * words, view_.rows + (i * capacity_ + shape_.length) * words,
                     static_cast<std::size_t>(words) * 4, cudaMemcpyDeviceToHost),
          "cudaMemcpy");
    }
    return rows;
  }

  /// Of graph (b, g): weights of the device, and how far from the right ones the worst is.
  double novelty_error(int b, int g, const std::vector<std::int32_t>& positions) const {
    const int heads = shape_.heads / shape_.graphs();
    const auto n = static_cast<std::size_t>(shape_.length);
    const auto dim = static_cast<std::size_t>(shape_.dim);
    std::vector<double> z(n);
    for (int h = g * heads; h < (g + 1) * heads; ++h) {
      const std::vector<double> keys =
          host(keys_, (std::int64_t{b} * shape_.heads + h) * capacity_ * shape_.dim,
               shape_.length * shape_.dim);
      std::vector<double> mean(dim);
      std::vector<double> distance(n);
      const auto norm_of = [&](std::size_t j) {
        double squares = 0.0;
        for (std::size_t d = 0; d < dim; ++d) squares += keys[j * dim + d] * keys[j * dim + d];
        return std::sqrt(squares);
      };
      for (std::size_t j = 0; j < n; ++j) {
        if (positions[j] < 0) continue;
        const double norm = norm_of(j);
        for (std::size_t d = 0; d < dim; ++d) mean[d] += keys[j * dim + d] / norm;
      }
      double length = 0.0;
      for (const double m : mean) length += m * m;
      length = std::sqrt(length);
      double count = 0.0;
      double sum = 0.0;
      for (std::size_t j = 0; j < n; ++j) {
        if (positions[j] < 0) continue;
        double dot = 0.0;
        for (std::size_t d = 0; d < dim; ++d) dot += keys[j * dim + d] * mean[d];
        distance[j] = -dot / length / norm_of(j);
        sum += distance[j];
        count += 1.0;
      }
      double squares = 0.0;
      for (std::size_t j = 0; j < n; ++j) {
        if (positions[j] >= 0) squares += std::pow(distance[j] - sum / count, 2.0);
      }
      const double deviation = count > 1.0 ? std::sqrt(squares / (count - 1.0)) : 0.0;
      for (std::size_t j = 0; j < n; ++j) {
        if (positions[j] < 4) {
          z[j] = -INFINITY;
        } else if (deviation > 1e-6) {
          z[j] += (distance[j] - sum / count) / deviation;
        }
      }
    }
    std::vector<std::uint32_t> weights(n);
    check(cudaMemcpy(weights.data(),
                     view_.novelty + (std::int64_t{b} * shape_.graphs() + g) * capacity_, n * 4,
                     cudaMemcpyDeviceToHost),
          "cudaMemcpy");
    const double highest = *std::max_element(z.begin(), z.end());
    double worst = 0.0;
    for (std::size_t j = 0; j < n; ++j) {
      const double wanted = std::isfinite(z[j]) ? 0x1p20 * std::exp((z[j] - highest) / heads) : 0.0;
      worst = std::max(worst, std::abs(static_cast<double>(weights[j]) - wanted));
    }
    return worst;
  }

  /// Of graph (b, g), in double precision; the new token is not in the list.
  std::vector<double> probabilities(int b, int g,
                                    const std::vector<std::int32_t>& positions) const {
    const std::int64_t n = shape_.length + 1;
    const int heads = shape_.heads / shape_.graphs();
    std::vector<double> mean(static_cast<std::size_t>(n));
    for (int h = g * heads; h < (g + 1) * heads; ++h) {
      const std::vector<double> keys = host(
          keys_, (std::int64_t{b} * shape_.heads + h) * capacity_ * shape_.dim, n * shape_.dim);
      const std::vector<double> queries = host(
          queries_, (std::int64_t{b} * shape_.heads + h) * shape_.group * std::int64_t{shape_.dim},
          std::int64_t{shape_.group} * shape_.dim);
      for (int q = 0; q < shape_.group; ++q) {
        std::vector<double> scores(static_cast<std::size_t>(n));
        double highest = -INFINITY;
        for (std::int64_t j = 0; j < n; ++j) {
          double dot = 0.0;
          for (int d = 0; d < shape_.dim; ++d) {
            dot += queries[static_cast<std::size_t>(q * shape_.dim + d)] *
                   keys[static_cast<std::size_t>(j * shape_.dim + d)];
          }
          dot *= static_cast<double>(args().scale);
          if (shape_.softcap > 0.0F) dot = shape_.softcap * std::tanh(dot / shape_.softcap);
          const bool seen = j == shape_.length || positions[static_cast<std::size_t>(j)] >= 0;
          scores[static_cast<std::size_t>(j)] = seen ? dot : -INFINITY;
          highest = std::max(highest, scores[static_cast<std::size_t>(j)]);
        }
        double sum = 0.0;
        for (double& score : scores) sum += score = std::exp(score - highest);
        for (std::size_t j = 0; j < scores.size(); ++j) {
          mean[j] += scores[j] / sum / (heads * shape_.group);
        }
      }
    }
    mean.pop_back();
    for (std::size_t j = 0; j < mean.size(); ++j) {
      if (positions[j] < 4) mean[j] = 0.0;
    }
    return mean;
  }

 private:
  std::vector<double> host(const Buffer& buffer, std::int64_t first, std::int64_t count) const {
    std::vector<unsigned char> bytes(static_cast<std::size_t>(count * size_of(shape_.dtype)));
    check(cudaMemcpy(bytes.data(), buffer.as<unsigned char>() + first * size_of(shape_.dtype),
                     bytes.size(), cudaMemcpyDeviceToHost),
          "cudaMemcpy");
    std::vector<double> values(static_cast<std::size_t>(count));
    for (std::size_t i = 0; i < values.size(); ++i) {
      if (shape_.dtype == DType::f32) {
        float value = 0.0F;
        std::memcpy(&value, bytes.data() + 4 * i, 4);
        values[i] = value;
      } else if (shape_.dtype == DType::f16) {
        __half value;
        std::memcpy(&value, bytes.data() + 2 * i, 2);
        values[i] = __half2float(value);
      } else {
        __nv_bfloat16 value;
        std::memcpy(&value, bytes.data() + 2 * i, 2);
        values[i] = __bfloat162float(value);
      }
    }
    return values;
  }

  std::int64_t slots() const {
    return std::int64_t{shape_.batch} * shape_.graphs() * (shape_.length + kRoom);
  }

  Shape shape_;
  std::int64_t capacity_;
  Buffer keys_, queries_, positions_, rows_, scores_, novelty_, scratch_, small_;
  LayerView view_{};
};

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

/// Every slot holds the token of its number, but for `holes` of 97.
std::vector<std::int32_t> some_positions(const Shape& shape, int holes) {
  std::vector<std::int32_t> positions(static_cast<std::size_t>(shape.length));
  for (std::int64_t j = 0; j < shape.length; ++j) {
    const bool hole = j * 2654435761U % 97 < static_cast<std::uint32_t>(holes);
    positions[static_cast<std::size_t>(j)] = hole ? -1 : static_cast<std::int32_t>(j);
  }
  return positions;
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
  const Buffer scratch(novelty_scratch(layer.view()) * 4);
  launch_novelty(layer.view(), layer.keys(), {}, scratch.as<float>(), shape.length, nullptr);
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
  const std::vector<UpdatePlan> plans = {{1, 256}, {2, 128}, {4, 256}, {8, 512}, {16, 256}, {0, 0}};
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

/// As many layers as make the keys cold, or one that stays in the cache.
std::vector<std::unique_ptr<Layer>> layers_for(const Shape& shape, bool warm) {
  constexpr std::int64_t kCold = std::int64_t{256} << 20U;
  const std::int64_t count = warm ? 1 : std::clamp<std::int64_t>(kCold / shape.key_bytes(), 1, 32);
  std::vector<std::unique_ptr<Layer>> layers;
  for (std::int64_t i = 0; i < count; ++i) {
    layers.push_back(std::make_unique<Layer>(shape, static_cast<std::uint32_t>(17 + i)));
  }
  return layers;
}

void print_rate(const char* bench, const std::string& name, const Timing& timing, double bytes,
                double bandwidth) {
  const double rate = bytes / (timing.median * 1e-6);
  print(bench, name, timing,
        {{"bytes", bytes},
         {"floor_us", bytes / bandwidth * 1e6},
         {"gbs", rate * 1e-9},
         {"copy_gbs", bandwidth * 1e-9},
         {"fraction_of_copy", rate / bandwidth}});
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
    const UpdatePlan plan = plan_update(layers[0]->view(), extent);
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

void time_novelty(const Shape& shape, double bandwidth) {
  const std::vector<std::unique_ptr<Layer>> layers = layers_for(shape, false);
  const Buffer scratch(novelty_scratch(layers[0]->view()) * 4);
  const Timing timing = measure(
      {.calls = static_cast<int>(layers.size()), .warm_up = 3, .replays = 25},
      [&](int call, auto stream) {
        const Layer& layer = *layers[static_cast<std::size_t>(call)];
        launch_novelty(layer.view(), layer.keys(), {}, scratch.as<float>(), shape.length, stream);
      });
  print_rate("novelty", shape.name(), timing, 2.0 * static_cast<double>(shape.key_bytes()),
             bandwidth);
}

/// What other plans would give.
void time_plans(double bandwidth) {
  std::vector<UpdatePlan> plans;
  for (const int cluster : {1, 2, 4, 8, 16}) {
    for (const int threads : {256, 512}) plans.push_back({cluster, threads});
  }
  plans.push_back({0, 0});
  time_shape({.batch = 1, .length = 4096}, plans, bandwidth, true);
  time_shape({.batch = 1, .length = 4096}, plans, bandwidth);
  time_shape({.batch = 1, .length = 16384}, plans, bandwidth);
  time_shape({.batch = 16, .length = 4096}, plans, bandwidth);
  time_shape({.batch = 4, .length = 16384}, plans, bandwidth);
  const std::vector<UpdatePlan> wide = {{8, 256}, {8, 512}, {16, 256}, {16, 512}, {0, 0}};
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
      time_novelty({.batch = batch, .length = length}, bandwidth);
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
