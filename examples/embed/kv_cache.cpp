#include "kv_cache.h"

#include <algorithm>

#include "memory.h"

namespace skv = spectralkv;

namespace {

skv::GraphManager make_graph(const Shape& shape, std::int64_t capacity, skv::Device device) {
  skv::GraphConfig graph{.num_layers = shape.layers,
                         .num_query_heads = shape.query_heads,
                         .num_kv_heads = shape.kv_heads,
                         .head_dim = shape.head_dim,
                         .capacity = capacity,
                         .seed = 1,
                         .device = device,
                         // Walks then compare keys as they were before the model turned them.
                         .rotary = {.inv_freq = inverse_frequencies(shape)}};
  skv::WalkConfig walk;
  skv::apply_preset("default", graph, walk);
  return {graph, walk};
}

std::int64_t capacity_for(const skv::EvictionConfig& eviction, std::int64_t max_tokens) {
  if (eviction.budget == 0) return max_tokens;
  eviction.validate();
  return eviction.budget + eviction.interval;
}

}  // namespace

KvCache::KvCache(const Shape& shape, const skv::EvictionConfig& eviction, std::int64_t max_tokens,
                 skv::Device device)
    : shape_(shape),
      eviction_(eviction),
      capacity_(capacity_for(eviction, max_tokens)),
      device_(device),
      graph_(make_graph(shape, capacity_, device)) {
  for (std::int64_t i = 0; i < shape.layers; ++i) {
    layers_.push_back(
        {allocate<float>(size_of_slab(), device), allocate<float>(size_of_slab(), device), 0});
  }
  query_ = allocate<float>(index(shape.query_heads * shape.head_dim), device);
  keep_ = allocate<std::int32_t>(index(shape.kv_heads * eviction.budget), device);
}

void KvCache::append(std::int64_t layer, std::span<const float> key, std::span<const float> value) {
  Layer& own = layers_[index(layer)];
  const std::int64_t dim = shape_.head_dim;
  for (std::int64_t head = 0; head < shape_.kv_heads; ++head) {
    const std::int64_t to = (head * capacity_ + own.length) * dim;
    std::copy_n(key.data() + head * dim, dim, own.keys.get() + to);
    std::copy_n(value.data() + head * dim, dim, own.values.get() + to);
  }
  ++own.length;
}

void KvCache::observe(std::int64_t layer, std::span<const float> query) {
  if (eviction_.budget == 0) return;
  std::copy(query.begin(), query.end(), query_.get());
  const skv::ConstTensorView query_view(query_.get(), skv::DType::f32,
                                        {1, shape_.query_heads, shape_.head_dim}, device_);
  graph_.update(layer, query_view, view(layers_[index(layer)].keys), {}, {}, {});
  if (graph_.is_full(layer, eviction_)) evict(layer);
  // This engine computes on the host, so it waits for the device before it touches its buffers
  // again. One that computes on the device passes its stream to every call and waits for nothing.
  graph_.synchronize();
}

void KvCache::evict(std::int64_t layer) {
  Layer& own = layers_[index(layer)];
  const skv::TensorView keys = view(own.keys);
  const skv::TensorView values = view(own.values);
  const std::int64_t length = graph_.kept_length(layer, eviction_, false);
  const std::vector<std::int64_t> kept = graph_.kept_counts(layer, eviction_, false);
  const skv::TensorView keep(keep_.get(), skv::DType::i32, {1, shape_.kv_heads, length}, device_);
  graph_.update_novelty(layer, keys, {});
  graph_.walk(layer, {}, {});
  graph_.select(layer, eviction_, false, keep, {});
  graph_.compact(layer, keep, keys, values, {}, kept);
  own.length = length;
}

std::span<const float> KvCache::keys(std::int64_t layer, std::int64_t head) const {
  return of_head(layers_[index(layer)].keys, head, length(layer));
}

std::span<const float> KvCache::values(std::int64_t layer, std::int64_t head) const {
  return of_head(layers_[index(layer)].values, head, length(layer));
}

std::int64_t KvCache::bytes() const {
  return 2 * shape_.layers * static_cast<std::int64_t>(size_of_slab() * sizeof(float));
}

std::size_t KvCache::size_of_slab() const {
  return index(shape_.kv_heads * capacity_ * shape_.head_dim);
}

skv::TensorView KvCache::view(const std::shared_ptr<float[]>& slab) const {
  return {slab.get(), skv::DType::f32, {1, shape_.kv_heads, capacity_, shape_.head_dim}, device_};
}

std::span<const float> KvCache::of_head(const std::shared_ptr<float[]>& slab, std::int64_t head,
                                        std::int64_t length) const {
  return {slab.get() + head * capacity_ * shape_.head_dim, index(length * shape_.head_dim)};
}
