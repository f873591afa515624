#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <tuple>
#include <utility>

#include "kv_cache.h"

namespace {

float dot(std::span<const float> a, std::span<const float> b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0F);
}

void add(std::vector<float>& to, const std::vector<float>& x) {
  for (std::size_t i = 0; i < to.size(); ++i) to[i] += x[i];
}

/// Divided by the root of the mean square.
std::vector<float> normalized(std::span<const float> x) {
  const float scale = 1.0F / std::sqrt(dot(x, x) / static_cast<float>(x.size()) + 1e-6F);
  std::vector<float> out(x.begin(), x.end());
  for (float& element : out) element *= scale;
  return out;
}

}  // namespace

std::vector<double> inverse_frequencies(const Shape& shape) {
  std::vector<double> frequencies;
  for (std::int64_t i = 0; i < shape.head_dim; i += 2) {
    frequencies.push_back(
        std::pow(10000.0, -static_cast<double>(i) / static_cast<double>(shape.head_dim)));
  }
  return frequencies;
}

std::vector<float> Decoder::Matrix::operator*(std::span<const float> x) const {
  std::vector<float> out(static_cast<std::size_t>(rows));
  for (std::int64_t row = 0; row < rows; ++row) {
    out[static_cast<std::size_t>(row)] =
        dot({weights.data() + row * columns, static_cast<std::size_t>(columns)}, x);
  }
  return out;
}

Decoder::Decoder(const Shape& shape, unsigned seed)
    : shape_(shape), inv_freq_(inverse_frequencies(shape)) {
  std::mt19937 random(seed);
  const auto matrix = [&](std::int64_t rows, std::int64_t columns, float gain) {
    std::normal_distribution<float> normal(0.0F, gain / std::sqrt(static_cast<float>(columns)));
    Matrix result{rows, columns, std::vector<float>(static_cast<std::size_t>(rows * columns))};
    for (float& weight : result.weights) weight = normal(random);
    return result;
  };
  const std::int64_t hidden = shape.hidden();
  const std::int64_t kv = shape.kv_heads * shape.head_dim;
  embedding_ = matrix(shape.vocabulary, hidden, std::sqrt(static_cast<float>(hidden)));
  head_ = matrix(shape.vocabulary, hidden, 1.0F);
  for (std::int64_t i = 0; i < shape.layers; ++i) {
    // Large queries make the attention sharp, as that of trained models is.
    layers_.push_back({.query = matrix(hidden, hidden, 3.0F),
                       .key = matrix(kv, hidden, 1.0F),
                       .value = matrix(kv, hidden, 1.0F),
                       .output = matrix(hidden, hidden, 1.0F),
                       .gate = matrix(shape.mlp, hidden, 1.0F),
                       .up = matrix(shape.mlp, hidden, 1.0F),
                       .down = matrix(hidden, shape.mlp, 1.0F)});
  }
}

std::int64_t Decoder::step(std::int64_t token, std::int64_t position, KvCache& cache) const {
  const auto first = embedding_.weights.begin() + token * shape_.hidden();
  std::vector<float> x(first, first + shape_.hidden());
  for (std::int64_t i = 0; i < shape_.layers; ++i) {
    const Layer& layer = layers_[static_cast<std::size_t>(i)];
    const std::vector<float> in = normalized(x);
    std::vector<float> query = layer.query * in;
    std::vector<float> key = layer.key * in;
    // By its position in the text, not by its slot: what is let go leaves no gap behind.
    turn(query, position);
    turn(key, position);
    cache.append(i, key, layer.value * in);
    add(x, layer.output * attend(i, query, cache));
    cache.observe(i, query);

    const std::vector<float> middle = normalized(x);
    std::vector<float> gate = layer.gate * middle;
    const std::vector<float> up = layer.up * middle;
    for (std::size_t j = 0; j < gate.size(); ++j) gate[j] *= up[j] / (1.0F + std::exp(-gate[j]));
    add(x, layer.down * gate);
  }
  const std::vector<float> logits = head_ * normalized(x);
  return std::max_element(logits.begin(), logits.end()) - logits.begin();
}

void Decoder::turn(std::span<float> heads, std::int64_t position) const {
  const std::size_t pairs = inv_freq_.size();
  for (std::size_t head = 0; head < heads.size(); head += 2 * pairs) {
    for (std::size_t i = 0; i < pairs; ++i) {
      const double angle = static_cast<double>(position) * inv_freq_[i];
      const auto cos = static_cast<float>(std::cos(angle));
      const auto sin = static_cast<float>(std::sin(angle));
      float& a = heads[head + i];
      float& b = heads[head + i + pairs];
      std::tie(a, b) = std::pair(a * cos - b * sin, b * cos + a * sin);
    }
  }
}

std::vector<float> Decoder::attend(std::int64_t layer, std::span<const float> query,
                                   const KvCache& cache) const {
  const auto dim = static_cast<std::size_t>(shape_.head_dim);
  const auto length = static_cast<std::size_t>(cache.length(layer));
  const float scale = 1.0F / std::sqrt(static_cast<float>(dim));
  std::vector<float> out(query.size());
  std::vector<float> weights(length);
  for (std::int64_t head = 0; head < shape_.query_heads; ++head) {
    const std::int64_t kv_head = head / (shape_.query_heads / shape_.kv_heads);
    const std::span<const float> keys = cache.keys(layer, kv_head);
    const std::span<const float> values = cache.values(layer, kv_head);
    const std::size_t start = static_cast<std::size_t>(head) * dim;
    for (std::size_t slot = 0; slot < length; ++slot) {
      weights[slot] = scale * dot(query.subspan(start, dim), keys.subspan(slot * dim, dim));
    }
    const float most = *std::max_element(weights.begin(), weights.end());
    for (float& weight : weights) weight = std::exp(weight - most);
    const float total = std::accumulate(weights.begin(), weights.end(), 0.0F);
    for (std::size_t slot = 0; slot < length; ++slot) {
      for (std::size_t d = 0; d < dim; ++d) {
        out[start + d] += weights[slot] / total * values[slot * dim + d];
      }
    }
  }
  return out;
}
