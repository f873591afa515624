// The rows of the few tokens that tiles left over: many thread blocks scan the keys of one token.
#pragma once

#include <cstdint>

#include "cuda/device/attention_row.cuh"
#include "cuda/device/row_tiles.cuh"

namespace spectralkv::cuda {

inline constexpr int kScanParts = 16;  ///< of the keys of a token
inline constexpr int kMostScanHeads = 16;
inline constexpr int kMostScanDim = 256;

/// Eight elements of a key as f32.
template <class T>
__device__ inline void unpack(const uint4& chunk, float (&values)[8]) {
  const auto* const pairs = reinterpret_cast<const T*>(&chunk);
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = as_float(pairs[i]);
}

/// References are exact, so one pass settles a row: what reaches the limit is collected, and the
/// part that is done last ranks it.
template <class T>
__global__ void __launch_bounds__(kRowThreads)
    scan_rows_kernel(const __grid_constant__ LayerView layer,
                     const __grid_constant__ RowTilesArgs args) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  __shared__ __align__(16) float queries[kMostScanHeads * kMostScanDim];
  __shared__ float references[kMostScanHeads];
  __shared__ unsigned long long entries[kMostRanked];
  __shared__ bool is_last;
  if (has_fault(layer)) return;
  const int scans = *args.left_count;
  if (scans > kMostScans) return;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kLanes;
  const int team = thread / kLanes;
  const int dim = layer.head_dim;
  const ScoreRule rule(args.scale, args.softcap);
  for (int item = static_cast<int>(blockIdx.x); item < scans * kScanParts;
       item += static_cast<int>(gridDim.x)) {
    RowScan& scan = args.scans[item / kScanParts];
    const std::int64_t graph = scan.graph;
    const std::int64_t b = graph / layer.graphs;
    const std::int64_t g = graph % layer.graphs;
    const std::int64_t at = graph * args.most + scan.at;
    const std::int64_t token = args.drawn.tokens[b * args.most + scan.at];
    const std::int64_t slot = args.first_slot + token;
    __syncthreads();
    for (int i = thread; i < layer.group * dim; i += kRowThreads) {
      queries[i] = as_float(static_cast<const T*>(
          args.queries.data)[b * args.queries.sequence_stride +
                             (g * layer.group + i / dim) * args.queries.head_stride +
                             token * args.queries.token_stride + i % dim]);
    }
    if (thread < layer.group) references[thread] = args.references[at * layer.group + thread];
    __syncthreads();

    const T* const keys = static_cast<const T*>(args.keys.data) + b * args.keys.sequence_stride +
                          g * args.keys.head_stride;
    const KeyMasks* const masks = args.masks + (b * layer.heads + g) * args.blocks;
    const std::int64_t share = (slot + kScanParts - 1) / kScanParts;
    const std::int64_t begin = item % kScanParts * share;
    const std::int64_t end = min(begin + share, slot);
    for (std::int64_t first = begin; first < end; first += kTeams) {
      const std::int64_t j = min(first + team, end - 1);
      float dots[kMostScanHeads] = {};
      for (int chunk = lane; chunk < dim / 8; chunk += kLanes) {
        float key[8];
        unpack<T>(reinterpret_cast<const uint4*>(keys + j * args.keys.token_stride)[chunk], key);
#pragma unroll
        for (int head = 0; head < kMostScanHeads; ++head) {
          if (head >= layer.group) break;
          const float* const query = queries + head * dim + 8 * chunk;
#pragma unroll
          for (int i = 0; i < 8; ++i) dots[head] = fmaf(query[i], key[i], dots[head]);
        }
      }
      float total = 0.0F;
#pragma unroll
      for (int head = 0; head < kMostScanHeads; ++head) {
        if (head >= layer.group) break;
        float dot = dots[head];
        for (int offset = kLanes / 2; offset > 0; offset /= 2) {
          dot += __shfl_xor_sync(kAllOnes, dot, offset);
        }
        if (args.softcap > 0.0F) dot = rule.capped(dot);
        if (isfinite(dot)) total += exp2_of(fmaf(dot, rule.factor, -references[head]));
      }
      const bool candidate = (masks[j / kTileRows].candidates >> (j % kTileRows) & 1U) != 0;
      if (lane != 0 || first + team >= end || !candidate || !(total > scan.limit)) continue;
      const int found = atomicAdd(&scan.found, 1);
      if (found < kMostRanked) {
        args.found[item / kScanParts * kMostRanked + found] =
            ranked_entry(total, static_cast<std::uint32_t>(j));
      }
    }
    __threadfence();
    __syncthreads();
    if (thread == 0) is_last = atomicAdd(&scan.done, 1) == kScanParts - 1;
    __syncthreads();
    if (!is_last) continue;
    __threadfence();
    const int found = *static_cast<const volatile std::int32_t*>(&scan.found);
    if (found > kMostRanked) {  // ties
      if (thread == 0) {
        args.unsettled[atomicAdd(args.unsettled_count, 1)] =
            make_int2(static_cast<int>(graph), static_cast<int>(token));
      }
      continue;
    }
    if (thread < found) {
      entries[thread] = __ldcg(args.found + item / kScanParts * kMostRanked + thread);
    }
    __syncthreads();
    if (thread >= 32) continue;
    const Neighbor best = rank_entries(entries, found, layer.top_k, thread);
    write_row_by_warp(layer, row_of(layer, b, g, slot), thread, best);
    if (thread == 0) atomicAdd(&layer.statistics->rows_written, 1ULL);
  }
#endif
}

}  // namespace spectralkv::cuda
