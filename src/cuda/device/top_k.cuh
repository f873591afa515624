// The K highest of many values by one thread block.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/device/warp.cuh"

namespace spectralkv::cuda {

/// A value and its slot as one number, so that of equal values the lower slot is the higher. 0 is
/// less than any of them. Values are not negative.
__device__ inline std::uint64_t candidate(float value, int slot) {
  return std::uint64_t{__float_as_uint(value)} << 32U | ~static_cast<std::uint32_t>(slot);
}
__device__ inline float value_of(std::uint64_t candidate) {
  return __uint_as_float(static_cast<std::uint32_t>(candidate >> 32U));
}
__device__ inline std::int32_t slot_of(std::uint64_t candidate) {
  return static_cast<std::int32_t>(~static_cast<std::uint32_t>(candidate));
}

inline constexpr int kMostTopKThreads = 512;

struct TopKScratch {
  alignas(16) std::uint64_t list[kMostTopKThreads];
  std::uint64_t best[32];
  alignas(16) std::uint32_t highest[32];
  int found;  ///< 0 before a search
};

/// Before a first search, by 32 threads; the block waits afterwards.
__device__ inline void clear(TopKScratch& scratch, int lane) {
  scratch.highest[lane] = 0;
  scratch.best[lane] = 0;
  if (lane == 0) scratch.found = 0;
}

/// Keeps the K highest that a warp is shown, one a lane, in the first K lanes in descending order.
__device__ inline void insert(std::uint64_t& mine, std::uint64_t shown, int top_k) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  while (true) {
    const std::uint64_t least = __shfl_sync(0xffffffffU, mine, top_k - 1);
    const std::uint32_t hits = __ballot_sync(0xffffffffU, shown > least);
    if (hits == 0) return;
    const int source = __ffs(static_cast<int>(hits)) - 1;
    const std::uint64_t value = __shfl_sync(0xffffffffU, shown, source);
    if (lane == source) shown = 0;
    const int at = __popc(__ballot_sync(0xffffffffU, mine > value));
    const std::uint64_t before = __shfl_up_sync(0xffffffffU, mine, 1);
    if (lane == at) mine = value;
    if (lane > at) mine = before;
    if (lane >= top_k) mine = 0;
  }
}

/// Writes the K highest of list[0, count) to best[0, K), descending; `best` is 0 before. Who reads
/// it waits for the block.
__device__ inline void rank_list(TopKScratch& scratch, int count, int top_k) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    const std::uint64_t own = scratch.list[i];
    int better = 0;
    // Two at a time; where the number is odd, one that was never listed does not count.
#pragma unroll 4
    for (int j = 0; j < count; j += 2) {
      const ulonglong2 two = *reinterpret_cast<const ulonglong2*>(scratch.list + j);
      better += (two.x > own ? 1 : 0) + (j + 1 < count && two.y > own ? 1 : 0);
    }
    if (own != 0 && better < top_k) scratch.best[better] = own;
  }
}

/// What block_top_k finds.
struct Found {
  const std::uint64_t* candidates;  ///< 32 in shared memory, in no order
  int count;
  std::uint32_t bound;  ///< bits of a value that the K-th highest reaches
};

/// Finds candidates among values[0, count), which belong to the slots from first_slot on: the K
/// highest above 0 are among them. Thread t must have written the values at t, t + blockDim.x, ...
/// and says the highest of them; this may be called right behind. All threads get the answer.
/// Warps: a power of two, at most 16. `scratch` was cleared.
__device__ inline Found block_top_k(const float* values, int count, int first_slot, float highest,
                                    int top_k, TopKScratch& scratch) {
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  const int warps = threads / 32;

  // The K-th highest of some values that are there is a bound for the K-th highest of all. Twice as
  // many as K are looked at, as far as 32 lanes go.
  const int rounds = max(min(2 * top_k, 32) / warps, 1);
  std::uint32_t rest = __float_as_uint(highest);
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
    const std::uint32_t best = warp_max(rest);
    const std::uint32_t owners = __ballot_sync(0xffffffffU, rest == best);
    if (lane == __ffs(static_cast<int>(owners)) - 1) {
      scratch.highest[warp * rounds + round] = best;
      rest = 0;
    }
  }
  __syncthreads();
  const std::uint32_t mine = scratch.highest[lane];
  int better = 0;
#pragma unroll
  for (int i = 0; i < 32; i += 4) {
    const uint4 four = *reinterpret_cast<const uint4*>(scratch.highest + i);
    better += (four.x > mine ? 1 : 0) + (four.y > mine ? 1 : 0) + (four.z > mine ? 1 : 0) +
              (four.w > mine ? 1 : 0);
  }
  const std::uint32_t bits = warp_min(better < top_k ? mine : 0xffffffffU);
  const float bound = __uint_as_float(bits);

  if (highest >= bound && highest > 0.0F) {
#pragma unroll 4
    for (int j = thread; j < count; j += threads) {
      const float value = values[j];
      if (value < bound || !(value > 0.0F)) continue;
      const int at = atomicAdd(&scratch.found, 1);
      if (at < threads) scratch.list[at] = candidate(value, first_slot + j);
    }
  }
  __syncthreads();
  const int found = scratch.found;
  if (found <= 32) return {.candidates = scratch.list, .count = found, .bound = bits};
  if (found > threads) {  // many equal values, or all the high ones in one warp
    std::uint64_t best = 0;
    for (int first = warp * 32; first < count; first += threads) {
      const int j = first + lane;
      const float value = j < count ? values[j] : 0.0F;
      insert(best, value > 0.0F ? candidate(value, first_slot + j) : 0, top_k);
    }
    scratch.list[thread] = best;
    __syncthreads();
  }
  rank_list(scratch, min(found, threads), top_k);
  __syncthreads();
  return {.candidates = scratch.best, .count = top_k, .bound = bits};
}

}  // namespace spectralkv::cuda
