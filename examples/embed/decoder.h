// A small decoder with random weights: embeddings, layers of grouped-query attention and a gated
// MLP, greedy choice of the next token.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

struct Shape {
  std::int64_t layers = 2;
  std::int64_t query_heads = 4;
  std::int64_t kv_heads = 2;
  std::int64_t head_dim = 32;
  std::int64_t mlp = 256;
  std::int64_t vocabulary = 128;

  std::int64_t hidden() const { return query_heads * head_dim; }
};

/// Of the rotary embedding: radians a token, one for each pair of elements i and i + head_dim / 2.
std::vector<double> inverse_frequencies(const Shape& shape);

class KvCache;

class Decoder {
 public:
  Decoder(const Shape& shape, unsigned seed);

  /// Reads one token that stands at `position` of the text; returns the likeliest next one.
  std::int64_t step(std::int64_t token, std::int64_t position, KvCache& cache) const;

 private:
  struct Matrix {
    std::int64_t rows = 0;
    std::int64_t columns = 0;
    std::vector<float> weights;

    std::vector<float> operator*(std::span<const float> x) const;
  };
  struct Layer {
    Matrix query, key, value, output, gate, up, down;
  };

  void turn(std::span<float> heads, std::int64_t position) const;
  std::vector<float> attend(std::int64_t layer, std::span<const float> query,
                            const KvCache& cache) const;

  Shape shape_;
  std::vector<double> inv_freq_;
  Matrix embedding_;
  Matrix head_;
  std::vector<Layer> layers_;
};
