// The row of one token by one thread block: two passes over the keys, nothing stored a key.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/device/graph_rows.cuh"
#include "cuda/layer.h"

namespace spectralkv::cuda {

inline constexpr int kRowThreads = 256;
/// Lanes that share a key.
inline constexpr int kLanes = 8;
inline constexpr int kTeams = kRowThreads / kLanes;
inline constexpr int kMostNeighbors = 32;

template <class T>
__device__ inline float as_float(T value);
template <>
__device__ inline float as_float(float value) {
  return value;
}
template <>
__device__ inline float as_float(__half value) {
  return __half2float(value);
}
template <>
__device__ inline float as_float(__nv_bfloat16 value) {
  return __bfloat162float(value);
}

/// What a row is drawn from.
struct RowTask {
  std::int64_t sequence;
  std::int64_t graph;
  std::int64_t own_slot;
  std::int64_t visible;  ///< slots that it sees
  std::int64_t token;    ///< index among the queries
  float scale;
  float softcap;
};

/// Shared memory of a thread block; `queries` holds every query head of the graph as f32.
struct RowScratch {
  float* queries;
  float* shifts;  ///< log of the softmax's sum, a head
  float* values;  ///< (kTeams, kMostNeighbors)
  std::int32_t* slots;
  float* partial;  ///< (kTeams, 2)
};

__device__ inline RowScratch row_scratch(float* memory, int query_heads, int head_dim) {
  RowScratch scratch;
  scratch.queries = memory;
  scratch.shifts = scratch.queries + query_heads * head_dim;
  scratch.partial = scratch.shifts + query_heads;
  scratch.values = scratch.partial + 2 * kTeams;
  scratch.slots = reinterpret_cast<std::int32_t*>(scratch.values + kTeams * kMostNeighbors);
  return scratch;
}

inline std::int64_t row_scratch_bytes(const LayerView& layer) {
  const std::int64_t heads = std::int64_t{layer.heads_per_graph} * layer.group;
  return (heads * (layer.head_dim + 1) + 2 * kTeams + 2 * kTeams * kMostNeighbors) * 4;
}

/// The score of one key for one query head, the same in all lanes of a team; -inf where it is no
/// number.
template <class T>
__device__ inline float score_of(const float* query, const T* key, int head_dim,
                                 const RowTask& task, int lane) {
  float sum = 0.0F;
  for (int d = lane; d < head_dim; d += kLanes) sum = fmaf(query[d], as_float(key[d]), sum);
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(0xffffffffU, sum, offset, kLanes);
  }
  if (!isfinite(sum)) return -INFINITY;
  sum *= task.scale;
  return task.softcap > 0.0F ? task.softcap * tanhf(sum / task.softcap) : sum;
}

template <class T>
__device__ inline const T* key_at(const TokensView& keys, std::int64_t b, std::int64_t h,
                                  std::int64_t slot) {
  return static_cast<const T*>(keys.data) + token_offset(keys, b, h, slot);
}

/// Draws a row into `row` (of an emptied slot). All threads of the block take part.
template <class T>
__device__ void draw_row(const LayerView& layer, const TokensView& queries, const TokensView& keys,
                         const RowTask& task, const RowScratch& scratch, std::uint32_t* row) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int team = static_cast<int>(threadIdx.x) / kLanes;
  const int dim = layer.head_dim;
  const int query_heads = layer.heads_per_graph * layer.group;
  const std::int64_t first_head = task.graph * layer.heads_per_graph;
  const std::int32_t* positions = positions_of(layer, task.sequence, task.graph);

  int finite = 1;
  for (int i = static_cast<int>(threadIdx.x); i < query_heads * dim; i += kRowThreads) {
    const std::int64_t head = first_head * layer.group + i / dim;
    const float value = as_float(static_cast<const T*>(
        queries.data)[task.sequence * queries.sequence_stride + head * queries.head_stride +
                      task.token * queries.token_stride + i % dim]);
    scratch.queries[i] = value;
    if (!isfinite(value)) finite = 0;
  }
  for (int i = static_cast<int>(threadIdx.x); i < layer.heads_per_graph * dim; i += kRowThreads) {
    const T* key = key_at<T>(keys, task.sequence, first_head + i / dim, task.own_slot);
    if (!isfinite(as_float(key[i % dim]))) finite = 0;
  }
  const bool drawn = __syncthreads_and(finite) != 0;
  if (threadIdx.x == 0) {
    atomicAdd(&layer.statistics->rows_written, 1ULL);
    if (!drawn) atomicAdd(&layer.statistics->rows_nonfinite, 1ULL);
  }
  if (!drawn) return;

  const auto counts = [&](std::int64_t j) {
    return j < task.visible && (positions[j] >= 0 || j == task.own_slot);
  };
  for (int q = 0; q < query_heads; ++q) {
    const std::int64_t head = first_head + q / layer.group;
    float maximum = -INFINITY;
    float sum = 0.0F;
    for (std::int64_t first = 0; first < task.visible; first += kTeams) {
      const std::int64_t j = first + team;
      const bool seen = counts(j);
      const T* key = key_at<T>(keys, task.sequence, head, seen ? j : task.own_slot);
      const float score = score_of(scratch.queries + q * dim, key, dim, task, lane);
      if (!seen || score == -INFINITY) continue;
      if (score > maximum) {
        sum = sum * expf(maximum - score) + 1.0F;
        maximum = score;
      } else {
        sum += expf(score - maximum);
      }
    }
    if (lane == 0) {
      scratch.partial[2 * team] = maximum;
      scratch.partial[2 * team + 1] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      float highest = -INFINITY;
      for (int t = 0; t < kTeams; ++t) highest = fmaxf(highest, scratch.partial[2 * t]);
      float total = 0.0F;
      for (int t = 0; t < kTeams; ++t) {
        if (scratch.partial[2 * t] == -INFINITY) continue;
        total += scratch.partial[2 * t + 1] * expf(scratch.partial[2 * t] - highest);
      }
      scratch.shifts[q] = total > 0.0F ? highest + logf(total) : INFINITY;
    }
    __syncthreads();
  }

  // Each team keeps a descending list of its own.
  float* const values = scratch.values + team * kMostNeighbors;
  std::int32_t* const slots = scratch.slots + team * kMostNeighbors;
  int held = 0;
  for (std::int64_t first = 0; first < task.visible; first += kTeams) {
    const std::int64_t j = first + team;
    const bool candidate =
        j < task.visible && j != task.own_slot && positions[j] >= layer.num_sinks;
    float probability = 0.0F;
    for (int q = 0; q < query_heads; ++q) {
      const std::int64_t head = first_head + q / layer.group;
      const T* key = key_at<T>(keys, task.sequence, head, candidate ? j : task.own_slot);
      const float score = score_of(scratch.queries + q * dim, key, dim, task, lane);
      if (score != -INFINITY) probability += expf(score - scratch.shifts[q]);
    }
    probability /= static_cast<float>(query_heads);
    if (!candidate || !(probability > 0.0F) || lane != 0) continue;
    if (held == layer.top_k && probability <= values[held - 1]) continue;
    int at = held < layer.top_k ? held++ : held - 1;
    while (at > 0 && values[at - 1] < probability) {
      values[at] = values[at - 1];
      slots[at] = slots[at - 1];
      --at;
    }
    values[at] = probability;
    slots[at] = static_cast<std::int32_t>(j);
  }
  if (lane == 0) {
    for (int k = held; k < layer.top_k; ++k) {
      values[k] = -1.0F;
      slots[k] = 0x7fffffff;
    }
  }
  __syncthreads();
  if (threadIdx.x >= 32) return;

  // One warp merges the teams' lists: lane t looks at the head of list t.
  static_assert(kTeams == 32);
  const int mine = static_cast<int>(threadIdx.x);
  int next = 0;
  int count = 0;
  std::int32_t neighbors[kMostNeighbors];
  float best[kMostNeighbors];
  while (count < layer.top_k) {
    float value = next < layer.top_k ? scratch.values[mine * kMostNeighbors + next] : -1.0F;
    std::int32_t slot =
        next < layer.top_k ? scratch.slots[mine * kMostNeighbors + next] : 0x7fffffff;
    const std::int32_t own = slot;
    for (int offset = 16; offset > 0; offset /= 2) {
      const float other = __shfl_xor_sync(0xffffffffU, value, offset);
      const std::int32_t other_slot = __shfl_xor_sync(0xffffffffU, slot, offset);
      if (other > value || (other == value && other_slot < slot)) {
        value = other;
        slot = other_slot;
      }
    }
    if (!(value > 0.0F)) break;
    if (own == slot) ++next;
    neighbors[count] = slot;
    best[count++] = value;
  }
  if (mine == 0) write_row(layer, row, neighbors, best, count);
}

}  // namespace spectralkv::cuda
