// The cache of one sequence: keys and values in buffers of the engine's own, cut to a budget.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "decoder.h"
#include "spectralkv/spectralkv.h"

class KvCache {
 public:
  /// `eviction.budget` 0: keeps all of `max_tokens` tokens.
  KvCache(const Shape& shape, const spectralkv::EvictionConfig& eviction, std::int64_t max_tokens,
          spectralkv::Device device);

  /// Puts a token's key and value (Hkv, D) behind the others.
  void append(std::int64_t layer, std::span<const float> key, std::span<const float> value);

  /// Keys or values (length, D) of one head, the newest token last.
  std::span<const float> keys(std::int64_t layer, std::int64_t head) const;
  std::span<const float> values(std::int64_t layer, std::int64_t head) const;

  /// After the attention of a token: draws its row of the graph from its query (Hq, D) and, where
  /// budget and interval are used up, lets go what the walks say.
  void observe(std::int64_t layer, std::span<const float> query);

  std::int64_t length(std::int64_t layer) const { return layers_[index(layer)].length; }
  std::int64_t bytes() const;
  spectralkv::Statistics statistics() const { return graph_.statistics(); }

 private:
  struct Layer {
    std::shared_ptr<float[]> keys;    ///< (Hkv, capacity, D)
    std::shared_ptr<float[]> values;  ///< (Hkv, capacity, D)
    std::int64_t length = 0;
  };

  static std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }
  std::size_t size_of_slab() const;
  spectralkv::TensorView view(const std::shared_ptr<float[]>& slab) const;
  std::span<const float> of_head(const std::shared_ptr<float[]>& slab, std::int64_t head,
                                 std::int64_t length) const;
  void evict(std::int64_t layer);

  Shape shape_;
  spectralkv::EvictionConfig eviction_;
  std::int64_t capacity_;
  spectralkv::Device device_;
  std::vector<Layer> layers_;
  std::shared_ptr<float[]> query_;        ///< (Hq, D), where the device can read it
  std::shared_ptr<std::int32_t[]> keep_;  ///< (Hkv, budget)
  spectralkv::GraphManager graph_;
};
