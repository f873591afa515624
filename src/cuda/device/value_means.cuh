// Means of values by the softmax of scores, tile by tile: the taps (see NoTap) of an attention that
// reads values while the keys of the next slots are on their way. Two ways, as for dot products.
//
// The scores of a tile lie in shared memory, in units of log(2), -inf where there is none. Sums are
// relative to the highest score so far, which every warp follows for itself; `finish` tells it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/device/attention_row.cuh"
#include "cuda/device/exp_sum.cuh"
#include "cuda/device/key_dots.cuh"

namespace spectralkv::cuda {

/// Where a warp finds the scores of its tiles.
struct TileScores {
  float* scores;  ///< of the task's first query head and first slot
  int pitch;      ///< between query heads
  int mask;       ///< -1, or kTile - 1: each tile takes the place of the one before

  __device__ float* of_tile(int tile) const { return scores + (tile * kTile & mask); }
  __device__ float& at(int column, int slot) const {
    return scores[column * pitch + (slot & mask)];
  }
};

/// Values of one head.
template <class T>
struct ValueRows {
  const T* values;  ///< of slot 0
  std::int64_t stride;
  int head_dim;
};

/// Two numbers as the 16-bit elements of an operand; the first one is the lower.
template <class T>
__device__ inline std::uint32_t packed_pair(float low, float high) {
  std::uint32_t bits = 0;
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&bits, &pair, sizeof(bits));
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &pair, sizeof(bits));
  }
  return bits;
}

/// 16-bit values of the shapes that TensorDots reads.
///
/// A lane reads 16 contiguous bytes of four slots: 8 elements, of which it puts those of two slots
/// side by side. So the left operand is made of values as they lie in memory: row r of instruction
/// i is element 8 r + 2 i of a unit of 64, row r + 8 the one behind it, columns are slots. The
/// right operand is the probabilities of 8 query heads.
template <class Dots>
struct TensorMeans {
  using T = typename Dots::T;
  static constexpr bool kActive = true;
  static constexpr int kBlocks = Dots::kRowBlocks;
  static constexpr int kPanels = (Dots::kColumns + 7) / 8;
  static constexpr int kUnits = (kBlocks + 1) / 2;
  /// Units without columns behind the end of the shortest row that comes here.
  static constexpr int kFullUnits = kBlocks <= 2 ? 0 : kBlocks <= 4 ? 1 : 2;
  /// Units of a tile under way: of long rows the second half is asked for when the first one is
  /// there.
  static constexpr int kAhead = kUnits < 2 ? 1 : 2;

  __device__ TensorMeans(const ValueRows<T>& rows, const TileScores& tile_scores)
      : values(reinterpret_cast<const unsigned char*>(rows.values)),
        value_bytes(static_cast<std::uint32_t>(rows.stride * sizeof(T))),
        head_dim(rows.head_dim),
        scores(tile_scores) {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      maximum[panel] = -FLT_MAX;
      sum[panel] = 0.0F;
    }
  }

  template <class Task>
  __device__ void begin(const Task& task, int place, int tile) {
#pragma unroll
    for (int unit = 0; unit < kAhead; ++unit) load(task, place, unit, tile);
  }

  template <class Task>
  __device__ void tile(const Task& task, int place, int tile, std::uint32_t seen, int next) {
    const int row = static_cast<int>(threadIdx.x) % 32 / 4;
    const int pair = static_cast<int>(threadIdx.x) % 4;
    __syncwarp();
    std::uint32_t weights[kPanels][2];
    float factors[kPanels];
    bool raised = false;
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      const int head = panel * 8 + row;
      float2 low{-INFINITY, -INFINITY};
      float2 high = low;
      if (head < task.query_heads) {
        const float* const from = scores.of_tile(tile) + head * scores.pitch + 2 * pair;
        low = *reinterpret_cast<const float2*>(from);
        high = *reinterpret_cast<const float2*>(from + 8);
      }
      float highest = fmaxf(fmaxf(low.x, low.y), fmaxf(high.x, high.y));
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffU, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffU, highest, 2));
      const float before = maximum[panel];
      const float now = fmaxf(before, highest);
      raised = raised || now > before;
      maximum[panel] = now;
      factors[panel] = exp2_of(before - now);
      low = {exp2_of(low.x - now), exp2_of(low.y - now)};
      high = {exp2_of(high.x - now), exp2_of(high.y - now)};
      sum[panel] = fmaf(sum[panel], factors[panel], (low.x + low.y) + (high.x + high.y));
      weights[panel][0] = packed_pair<T>(low.x, low.y);
      weights[panel][1] = packed_pair<T>(high.x, high.y);
    }
    if (__any_sync(0xffffffffU, raised)) {
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        const float first = __shfl_sync(0xffffffffU, factors[panel], 8 * pair);
        const float second = __shfl_sync(0xffffffffU, factors[panel], 8 * pair + 4);
#pragma unroll
        for (int unit = 0; unit < kUnits; ++unit) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float (&sums)[4] = means[panel][unit][i];
            sums[0] *= first;
            sums[1] *= second;
            sums[2] *= first;
            sums[3] *= second;
          }
        }
      }
    }
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
      uint4(&slots)[4] = ring[place][unit % kAhead];
      if (seen != kAllSeen) {  // what lies there may be no number, and 0 times that is none
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int slot = 2 * pair + i % 2 + i / 2 * 8;
          if ((seen >> Dots::seen_bit(slot) & 1U) == 0) slots[i] = {};
        }
      }
      multiply_word<0>(unit, slots[0].x, slots[1].x, slots[2].x, slots[3].x, weights);
      multiply_word<1>(unit, slots[0].y, slots[1].y, slots[2].y, slots[3].y, weights);
      multiply_word<2>(unit, slots[0].z, slots[1].z, slots[2].z, slots[3].z, weights);
      multiply_word<3>(unit, slots[0].w, slots[1].w, slots[2].w, slots[3].w, weights);
      if (unit + kAhead < kUnits) {
        load(task, place, unit + kAhead, tile);
      } else if (next >= 0) {
        load(task, place, unit + kAhead - kUnits, next);
      }
    }
    __syncwarp();
  }

  /// Calls tell(column, maximum and sum of the warp's scores) by one lane a query head.
  template <class Tell>
  __device__ void finish(int query_heads, Tell&& tell) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      float total = sum[panel];
      total += __shfl_xor_sync(0xffffffffU, total, 1);
      total += __shfl_xor_sync(0xffffffffU, total, 2);
      const int head = panel * 8 + lane / 4;
      if (lane % 4 == 0 && head < query_heads) {
        tell(head, ExpSum{.maximum = maximum[panel], .sum = total});
      }
    }
  }

  /// Writes to[column * pitch + d], times factor_of(column). `to` and pitch are multiples of four.
  template <class Factor>
  __device__ void store(float* to, int pitch, int query_heads, Factor&& factor_of) const {
    const int row = static_cast<int>(threadIdx.x) % 32 / 4;
    const int pair = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        const int column = panel * 8 + 2 * pair + v;
        if (column >= query_heads) continue;
        const float factor = factor_of(column);
#pragma unroll
        for (int unit = 0; unit < kUnits; ++unit) {
          const int d = unit * 64 + 8 * row;
          if (d >= head_dim) continue;
          auto* const out = reinterpret_cast<float4*>(to + column * pitch + d);
          const float (&sums)[4][4] = means[panel][unit];
          out[0] = {sums[0][v] * factor, sums[0][2 + v] * factor, sums[1][v] * factor,
                    sums[1][2 + v] * factor};
          out[1] = {sums[2][v] * factor, sums[2][2 + v] * factor, sums[3][v] * factor,
                    sums[3][2 + v] * factor};
        }
      }
    }
  }

 private:
  template <class Task>
  __device__ void load(const Task& task, int place, int unit, int tile) {
    const int row = static_cast<int>(threadIdx.x) % 32 / 4;
    const int first = task.begin + tile * kTile + static_cast<int>(threadIdx.x) % 4 * 2;
    // Behind the end of a row stand its last elements, which nobody takes.
    const int column = unit * 64 + 8 * row;
    const int from = unit < kFullUnits ? column : min(column, head_dim - 8);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto slot = static_cast<std::uint32_t>(min(first + i % 2 + i / 2 * 8, task.end - 1));
      ring[place][unit % kAhead][i] =
          load_key<0>(values + std::uint64_t{slot} * value_bytes + from * sizeof(T));
    }
  }

  /// Instruction kWord: words kWord of four slots.
  template <int kWord>
  __device__ void multiply_word(int unit, std::uint32_t a, std::uint32_t b, std::uint32_t c,
                                std::uint32_t d, const std::uint32_t (&weights)[kPanels][2]) {
    constexpr unsigned kLower = 0x5410;
    constexpr unsigned kUpper = 0x7632;
    const uint4 left{__byte_perm(a, b, kLower), __byte_perm(a, b, kUpper),
                     __byte_perm(c, d, kLower), __byte_perm(c, d, kUpper)};
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      multiply<T>(means[panel][unit][kWord], left, weights[panel][0], weights[panel][1]);
    }
  }

  const unsigned char* values;
  std::uint32_t value_bytes;
  int head_dim;
  TileScores scores;
  float means[kPanels][kUnits][4][4] = {};
  float maximum[kPanels];  ///< of query head panel * 8 + lane / 4
  float sum[kPanels];      ///< the same, over this lane's slots
  uint4 ring[Dots::kTilesAhead][kAhead][4];
};

/// Any type, rows of up to kMostAttendDim elements: a lane takes every 32nd.
template <class Dots>
struct CoreMeans {
  using T = typename Dots::T;
  static constexpr bool kActive = true;
  static constexpr int kHeads = Dots::kColumns;
  static constexpr int kParts = kMostAttendDim / 32;
  static constexpr int kSlots = 4;  ///< whose values are under way together

  __device__ CoreMeans(const ValueRows<T>& value_rows, const TileScores& tile_scores)
      : rows(value_rows), scores(tile_scores) {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      maximum[h] = -FLT_MAX;
      sum[h] = 0.0F;
    }
  }

  template <class Task>
  __device__ void begin(const Task& /*task*/, int /*place*/, int /*tile*/) {}

  template <class Task>
  __device__ void tile(const Task& task, int /*place*/, int tile, std::uint32_t seen,
                       int /*next*/) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    __syncwarp();
    float weights[kHeads];  // of slot `lane`
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const bool mine = lane < kTile && h < task.query_heads;
      const float score = mine ? scores.of_tile(tile)[h * scores.pitch + lane] : -INFINITY;
      float highest = score;
      for (int offset = kTile / 2; offset > 0; offset /= 2) {
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffU, highest, offset));
      }
      const float now = fmaxf(maximum[h], __shfl_sync(0xffffffffU, highest, 0));
      const float factor = exp2_of(maximum[h] - now);
      weights[h] = exp2_of(score - now);
      maximum[h] = now;
      sum[h] = fmaf(sum[h], factor, weights[h]);
#pragma unroll
      for (int i = 0; i < kParts; ++i) means[h][i] *= factor;
    }
    const T* const first = rows.values + (task.begin + tile * kTile) * rows.stride;
#pragma unroll 1
    for (int slot = 0; slot < kTile; slot += kSlots) {
      float values[kSlots][kParts];
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
        const bool is_seen = (seen >> Dots::seen_bit(slot + s) & 1U) != 0;
#pragma unroll
        for (int i = 0; i < kParts; ++i) {
          const int d = lane + 32 * i;
          values[s][i] =
              is_seen && d < rows.head_dim ? as_float(first[(slot + s) * rows.stride + d]) : 0.0F;
        }
      }
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
          const float weight = __shfl_sync(0xffffffffU, weights[h], slot + s);
#pragma unroll
          for (int i = 0; i < kParts; ++i) means[h][i] = fmaf(weight, values[s][i], means[h][i]);
        }
      }
    }
    __syncwarp();
  }

  template <class Tell>
  __device__ void finish(int query_heads, Tell&& tell) {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      float total = sum[h];
      for (int offset = 16; offset > 0; offset /= 2) {
        total += __shfl_xor_sync(0xffffffffU, total, offset);
      }
      if (threadIdx.x % 32 == 0 && h < query_heads) {
        tell(h, ExpSum{.maximum = maximum[h], .sum = total});
      }
    }
  }

  template <class Factor>
  __device__ void store(float* to, int pitch, int query_heads, Factor&& factor_of) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      if (h >= query_heads) break;
      const float factor = factor_of(h);
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        const int d = lane + 32 * i;
        if (d < rows.head_dim) to[h * pitch + d] = means[h][i] * factor;
      }
    }
  }

 private:
  ValueRows<T> rows;
  TileScores scores;
  float means[kHeads][kParts] = {};
  float maximum[kHeads];
  float sum[kHeads];  ///< over this lane's slots
};

}  // namespace spectralkv::cuda
