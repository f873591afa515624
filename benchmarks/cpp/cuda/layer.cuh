// A layer in the middle of decoding: what benchmarks of a new token feed to the kernels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cuda/kernels.h"
#include "harness.h"
#include "rows.cuh"

namespace spectralkv::bench {

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

__device__ inline float noise(std::uint64_t i, std::uint32_t seed) {
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

inline void fill(void* data, DType dtype, std::int64_t count, std::uint32_t seed, float scale) {
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
    view_.format = detail::row_format({}, capacity_);
    view_.row_words = detail::words_of_row(view_.format, shape.top_k);
    view_.populations = 1;
    view_.num_sinks = 4;
    view_.law = EdgeLaw::weighted;
    view_.capacity = capacity_;
    view_.positions = positions_.as<std::int32_t>();
    view_.rows = rows_.as<std::uint32_t>();
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

  /// The rows that the slot behind all others has, (B, G, 2 K): neighbours, then thresholds.
  std::vector<std::int32_t> new_rows() const {
    const std::int64_t graphs = shape_.batch * shape_.graphs();
    const std::int64_t words = view_.row_words;
    std::vector<std::uint32_t> rows(static_cast<std::size_t>(graphs * words));
    for (std::int64_t i = 0; i < graphs; ++i) {
      check(
          cudaMemcpy(rows.data() + i * words, view_.rows + (i * capacity_ + shape_.length) * words,
                     static_cast<std::size_t>(words) * 4, cudaMemcpyDeviceToHost),
          "cudaMemcpy");
    }
    return unpacked(rows, view_);
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

  /// Elements of a buffer of the shape's dtype.
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

  const Buffer& key_buffer() const { return keys_; }
  const Buffer& query_buffer() const { return queries_; }

 private:
  std::int64_t slots() const {
    return std::int64_t{shape_.batch} * shape_.graphs() * (shape_.length + kRoom);
  }

  Shape shape_;
  std::int64_t capacity_;
  Buffer keys_, queries_, positions_, rows_, scores_, novelty_, scratch_, small_;
  LayerView view_{};
};

/// As many layers as make the keys cold, or one that stays in the cache.
inline std::vector<std::unique_ptr<Layer>> layers_for(const Shape& shape, bool warm) {
  constexpr std::int64_t kCold = std::int64_t{256} << 20U;
  const std::int64_t count = warm ? 1 : std::clamp<std::int64_t>(kCold / shape.key_bytes(), 1, 32);
  std::vector<std::unique_ptr<Layer>> layers;
  for (std::int64_t i = 0; i < count; ++i) {
    layers.push_back(std::make_unique<Layer>(shape, static_cast<std::uint32_t>(17 + i)));
  }
  return layers;
}

inline void print_rate(const char* bench, const std::string& name, const Timing& timing,
                       double bytes, double bandwidth) {
  const double rate = bytes / (timing.median * 1e-6);
  print(bench, name, timing,
        {{"bytes", bytes},
         {"floor_us", bytes / bandwidth * 1e6},
         {"gbs", rate * 1e-9},
         {"copy_gbs", bandwidth * 1e-9},
         {"fraction_of_copy", rate / bandwidth}});
}

/// Every slot holds the token of its number, but for `holes` of 97.
inline std::vector<std::int32_t> some_positions(const Shape& shape, int holes) {
  std::vector<std::int32_t> positions(static_cast<std::size_t>(shape.length));
  for (std::int64_t j = 0; j < shape.length; ++j) {
    const bool hole = j * 2654435761U % 97 < static_cast<std::uint32_t>(holes);
    positions[static_cast<std::size_t>(j)] = hole ? -1 : static_cast<std::int32_t>(j);
  }
  return positions;
}

}  // namespace spectralkv::bench
