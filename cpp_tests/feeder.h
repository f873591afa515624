// Feeds random tokens to one layer of a manager, as a cache would.
#pragma once

#include <algorithm>
#include <vector>

#include "graph.h"
#include "manager.h"
#include "tensors.h"

namespace spectralkv::test {

/// Keys of one layer, room for `capacity` slots; what has never been written is NaN.
inline HostTensor key_slab(const GraphConfig& config, Index batch, DType dtype = DType::f32) {
  HostTensor keys(dtype, {batch, config.num_kv_heads, config.capacity, config.head_dim});
  keys.fill(kNan);
  return keys;
}

class Feeder {
 public:
  Feeder(GraphManager& manager, Index layer, std::uint64_t seed, DType dtype = DType::f32)
      : keys(key_slab(manager.graph_config(), manager.batch_size(layer), dtype)),
        random(seed),
        manager_(manager),
        layer_(layer) {}

  /// `count` tokens a sequence, or padding where `valid` (B, count) is 0.
  void prefill(Index count, const ConstTensorView& valid = {}, Index row_stride = 1) {
    const GraphConfig& config = manager_.graph_config();
    const Index length = manager_.length(layer_);
    for (Index slot = length; slot < length + count; ++slot) {
      for (Index b = 0; b < keys.size(0); ++b) {
        for (Index h = 0; h < keys.size(1); ++h) write_key(b, h, slot);
      }
    }
    HostTensor queries(keys.dtype(),
                       {keys.size(0), config.num_query_heads, count, config.head_dim});
    queries.fill_normal(random);
    manager_.update_rows(layer_, queries.view(), keys.view(),
                         {.score = {}, .valid = valid, .row_stride = row_stride}, Stream{});
  }

  /// One token a sequence behind the others.
  void append() {
    const Index slot = manager_.length(layer_);
    for (Index b = 0; b < keys.size(0); ++b) {
      for (Index h = 0; h < keys.size(1); ++h) write_key(b, h, slot);
    }
    manager_.update(layer_, query().view(), keys.view(), {}, {}, Stream{});
  }

  /// One token a sequence in the free slots; returns them, (B, Hkv).
  HostTensor reuse() {
    HostTensor slots(DType::i32, {keys.size(0), keys.size(1)});
    manager_.next_slots(layer_, slots.view(), Stream{});
    for (Index b = 0; b < keys.size(0); ++b) {
      for (Index h = 0; h < keys.size(1); ++h) write_key(b, h, slots.get_index({b, h}));
    }
    manager_.update(layer_, query().view(), keys.view(), slots.view(), {}, Stream{});
    return slots;
  }

  HostTensor query() {
    HostTensor query(keys.dtype(), {keys.size(0), manager_.graph_config().num_query_heads,
                                    manager_.graph_config().head_dim});
    query.fill_normal(random);
    return query;
  }

  void write_key(Index b, Index h, Index slot) {
    for (Index d = 0; d < keys.size(3); ++d) keys.set({b, h, slot, d}, random.normal());
  }

  HostTensor keys;
  Random random;

 private:
  GraphManager& manager_;
  Index layer_;
};

/// A keep argument, right-aligned behind -1: `lists` by sequence and KV head.
inline HostTensor keep_tensor(const std::vector<std::vector<std::vector<Index>>>& lists,
                              Index columns = 0) {
  for (const auto& heads : lists) {
    for (const auto& list : heads) columns = std::max(columns, count_of(list));
  }
  HostTensor keep(DType::i32, {count_of(lists), count_of(lists.front()), columns});
  keep.fill(-1);
  for (Index b = 0; b < count_of(lists); ++b) {
    for (Index h = 0; h < count_of(lists[at(b)]); ++h) {
      const std::vector<Index>& list = lists[at(b)][at(h)];
      for (Index i = 0; i < count_of(list); ++i) {
        keep.set({b, h, columns - count_of(list) + i}, static_cast<double>(list[at(i)]));
      }
    }
  }
  return keep;
}

/// A random part of `slots`, ascending, that keeps the last one.
inline std::vector<Index> random_part(Random& random, std::vector<Index> slots, Index count) {
  const Index newest = slots.back();
  slots.pop_back();
  random.shuffle(slots);
  slots.resize(at(count - 1));
  slots.push_back(newest);
  std::sort(slots.begin(), slots.end());
  return slots;
}

}  // namespace spectralkv::test
