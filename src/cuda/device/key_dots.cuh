// Dot products of query heads with the keys of a run of slots: how a warp reads keys once and at
// full width. Two ways: tensor cores for 16-bit keys of common shapes, plain cores for all others.
//
// A warp takes tiles of kTile slots. For every (slot, query head) exactly one lane gets the value
// and calls `emit(i, column, slot, position, value)`; i < kValues counts the columns of that lane,
// so that a lane may keep what belongs to a column in registers. Lanes that share columns differ
// in bits kFirstRowBit and up.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/device/attention_row.cuh"
#include "cuda/layer.h"

namespace spectralkv::cuda {

inline constexpr int kTile = 16;

/// Keys of one head and the query heads that look at them.
template <class T>
struct DotsTask {
  const T* keys;  ///< of slot 0
  std::int64_t key_stride;
  const T* queries;  ///< of the first query head
  std::int64_t query_stride;
  const std::int32_t* positions;
  int query_heads;  ///< at most kColumns
  int head_dim;
  int begin;  ///< slots [begin, end)
  int end;
};

__device__ inline uint4 load_key(const void* address) {
  uint4 value;
  asm("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
      : "l"(address));
  return value;
}

/// c += a b of mma.m16n8k16: `low` and `high` are two words each of the rows r and r + 8.
template <class T>
__device__ inline void multiply(float (&c)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2,
                                std::uint32_t a3, std::uint32_t b0, std::uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
#endif
}

/// 16-bit keys of up to 32 kBlocks elements, a multiple of 8, at addresses that are multiples of
/// 16 bytes. The sum over a row may run in any order as long as keys and queries agree: so each
/// lane reads 16 contiguous bytes and calls them the columns that the instruction wants from it.
template <class Element, int kBlocks, int kPanels>
struct TensorDots {
  using T = Element;
  static constexpr int kColumns = 8 * kPanels;
  static constexpr int kValues = 2 * kPanels;
  static constexpr int kFirstRowBit = 4;
  static constexpr int kUnitBlocks = kBlocks < 4 ? kBlocks : 4;
  static constexpr int kUnits = kBlocks / kUnitBlocks;  ///< of a tile
  static constexpr int kStages = kBlocks <= 2 ? 4 : 2;
  static_assert(kStages % kUnits == 0);

  __device__ static int column(int lane, int i) { return i / 2 * 8 + lane % 4 * 2 + i % 2; }

  template <class Emit>
  __device__ static void run(const DotsTask<T>& task, int warp, int warps, Emit&& emit) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int row = lane / 4;
    const int first_column = lane % 4 * 8;
    const int tiles = (task.end - task.begin + kTile - 1) / kTile;
    if (warp >= tiles) return;

    uint4 query[kPanels][kBlocks];
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        const int at = block * 32 + first_column;
        const int head = panel * 8 + row;
        query[panel][block] =
            at < task.head_dim && head < task.query_heads
                ? *reinterpret_cast<const uint4*>(task.queries + head * task.query_stride + at)
                : uint4{};
      }
    }

    uint4 ring[kStages][kUnitBlocks][2];
    std::int32_t position[kStages][2];
    // Stage s of a round takes part s % kUnits of tile s / kUnits of the round.
    const auto load = [&](int stage, int tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int slot = min(task.begin + tile * kTile + row + half * 8, task.end - 1);
        const T* const key = task.keys + slot * task.key_stride;
        if (stage % kUnits == 0) position[stage][half] = task.positions[slot];
#pragma unroll
        for (int block = 0; block < kUnitBlocks; ++block) {
          const int at = (stage % kUnits * kUnitBlocks + block) * 32 + first_column;
          ring[stage][block][half] = at < task.head_dim ? load_key(key + at) : uint4{};
        }
      }
    };
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      const int tile = warp + stage / kUnits * warps;
      if (tile < tiles) load(stage, tile);
    }
    constexpr int kRound = kStages / kUnits;  // tiles
    for (int first = warp; first < tiles; first += kRound * warps) {
#pragma unroll
      for (int t = 0; t < kRound; ++t) {
        const int tile = first + t * warps;
        if (tile >= tiles) break;
        float sums[kPanels][4] = {};
        const std::int32_t position0 = position[t * kUnits][0];
        const std::int32_t position1 = position[t * kUnits][1];
#pragma unroll
        for (int unit = 0; unit < kUnits; ++unit) {
          const int stage = t * kUnits + unit;
#pragma unroll
          for (int block = 0; block < kUnitBlocks; ++block) {
            const uint4 low = ring[stage][block][0];
            const uint4 high = ring[stage][block][1];
#pragma unroll
            for (int panel = 0; panel < kPanels; ++panel) {
              const uint4 q = query[panel][unit * kUnitBlocks + block];
              multiply<T>(sums[panel], low.x, high.x, low.y, high.y, q.x, q.y);
              multiply<T>(sums[panel], low.z, high.z, low.w, high.w, q.z, q.w);
            }
          }
          if (tile + kRound * warps < tiles) load(stage, tile + kRound * warps);
        }
        const int slot = task.begin + tile * kTile + row;
#pragma unroll
        for (int i = 0; i < kValues; ++i) {
          const int at = column(lane, i);
          if (at >= task.query_heads) continue;
          if (slot < task.end) emit(i, at, slot, position0, sums[i / 2][i % 2]);
          if (slot + 8 < task.end) emit(i, at, slot + 8, position1, sums[i / 2][2 + i % 2]);
        }
      }
    }
  }
};

/// Any type, any shape. Eight lanes share four slots; kWide: rows are multiples of four elements,
/// at addresses that are multiples of their size.
template <class Element, bool kWide, int kHeads>
struct CoreDots {
  using T = Element;
  static constexpr int kColumns = kHeads;
  static constexpr int kValues = kHeads / 2;
  static constexpr int kFirstRowBit = 2;
  static constexpr int kSlots = 4;
  static constexpr int kVector = kWide ? 4 : 1;

  struct alignas(sizeof(T) * kVector) Vector {
    T values[kVector];
  };

  __device__ static int column(int lane, int i) { return lane % 2 * kValues + i; }

  template <class Emit>
  __device__ static void run(const DotsTask<T>& task, int warp, int warps, Emit&& emit) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int team = lane / kLanes;
    const int member = lane % kLanes;
    const int tiles = (task.end - task.begin + kTile - 1) / kTile;
    for (int tile = warp; tile < tiles; tile += warps) {
      const int first = task.begin + tile * kTile + team * kSlots;
      const T* keys[kSlots];
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
        keys[s] = task.keys + min(first + s, task.end - 1) * task.key_stride;
      }
      const int slot = first + member / 2;
      const std::int32_t position = slot < task.end ? task.positions[slot] : -1;
      float sums[kSlots * kHeads] = {};
      Vector next[kSlots];
      const auto load = [&](int at) {
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
          next[s] = *reinterpret_cast<const Vector*>(keys[s] + at);
        }
      };
      int at = member * kVector;
      if (at < task.head_dim) load(at);
#pragma unroll 2
      for (; at < task.head_dim; at += kLanes * kVector) {
        Vector now[kSlots];
#pragma unroll
        for (int s = 0; s < kSlots; ++s) now[s] = next[s];
        if (at + kLanes * kVector < task.head_dim) load(at + kLanes * kVector);
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
          if (h >= task.query_heads) break;
          const Vector query =
              *reinterpret_cast<const Vector*>(task.queries + h * task.query_stride + at);
#pragma unroll
          for (int v = 0; v < kVector; ++v) {
#pragma unroll
            for (int s = 0; s < kSlots; ++s) {
              sums[s * kHeads + h] = fmaf(as_float(query.values[v]), as_float(now[s].values[v]),
                                          sums[s * kHeads + h]);
            }
          }
        }
      }
      // Halves go to the lane that keeps them, until each lane has its own values only.
#pragma unroll
      for (int offset = kLanes / 2, kept = kSlots * kHeads / 2; offset > 0;
           offset /= 2, kept /= 2) {
        const bool upper = (member & offset) != 0;
#pragma unroll
        for (int i = 0; i < kSlots * kHeads / 2; ++i) {
          if (i >= kept) break;
          const float given = upper ? sums[i] : sums[i + kept];
          const float held = upper ? sums[i + kept] : sums[i];
          sums[i] = held + __shfl_xor_sync(0xffffffffU, given, offset, kLanes);
        }
      }
      if (slot >= task.end) continue;
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        const int at_column = column(lane, i);
        if (at_column < task.query_heads) emit(i, at_column, slot, position, sums[i]);
      }
    }
  }
};

}  // namespace spectralkv::cuda
