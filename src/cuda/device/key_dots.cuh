// Dot products of query heads with the keys of a run of slots: how a warp reads keys once and at
// full width. Two ways: tensor cores for 16-bit keys of common shapes, plain cores for all others.
//
// A warp takes tiles of kTile slots. For every (slot, query head) exactly one lane gets the value
// and calls `emit(i, column, slot, place, value, valid)`. i < kValues counts the columns of that
// lane, so that a lane may keep what belongs to a column in registers; lanes that share columns
// differ in bits kFirstRowBit and up. `place` is the position of the slot's token, or kOwnPlace, or
// kNoPlace where the slot is empty or behind the end of the last tile. `valid` is false where there
// is no such query head.
//
// Who needs more than the dot products hands over a tap, see NoTap.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#include "cuda/device/attention_row.cuh"
#include "cuda/layer.h"

namespace spectralkv::cuda {

inline constexpr int kTile = 16;
inline constexpr int kNoPlace = -1;
inline constexpr int kOwnPlace = -2;

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
  int own_slot;

  __device__ std::int32_t position(int slot) const { return positions[slot]; }

  __device__ std::int32_t place(int slot, std::int32_t position) const {
    const std::int32_t place = slot == own_slot ? kOwnPlace : position;
    return slot < end ? place : kNoPlace;
  }
};

/// What a warp calls around its tiles, of which Dots::kTilesAhead are under way, each in a place of
/// its own: begin(task, place, tile) for the first ones when their keys were asked for, and
/// tile(task, place, tile, seen, next) when the dot products of a tile were emitted. Bit
/// Dots::seen_bit(slot of the tile) of `seen` says whether the slot holds a token that the queries
/// see; `next` is the tile that takes the place, -1 behind the last.
struct NoTap {
  static constexpr bool kActive = false;
};

/// `seen` of a tile whose slots are all seen.
inline constexpr std::uint32_t kAllSeen = 0x55555555U;

template <int kOffset>
__device__ inline uint4 load_key(const unsigned char* address) {
  uint4 value;
  asm("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4 + %5];"
      : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
      : "l"(address), "n"(kOffset));
  return value;
}

/// c += a b of mma.m16n8k16.
template <class T>
__device__ inline void multiply(float (&c)[4], const uint4& a, std::uint32_t b0, std::uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
  }
#endif
}

/// 16-bit keys of up to 32 kBlocks elements (kBlocks 2 to 4, or 8 for more), a multiple of 8, at
/// addresses that are multiples of 16 bytes and less than 4 GiB apart.
///
/// A lane reads 16 contiguous bytes of a key, and hands them to the instruction as they lie in its
/// registers: words 0 and 2 stand in row r of its left operand, words 1 and 3 in row r + 8. So one
/// key takes two rows, each with half of the columns, and the right operand must hold the half that
/// belongs to the row: up to 4 query heads fit into its 8 columns with both halves (the upper rows'
/// results count in the lower columns and the other way round), 8 take two instructions.
template <class Element, int kBlocks, int kHeads, int kDepth = kBlocks <= 2 ? 4 : 2>
struct TensorDots {
  using T = Element;
  static constexpr int kColumns = kHeads;
  static constexpr int kRowBlocks = kBlocks;
  static constexpr bool kPaired = kHeads == 4;
  static constexpr int kPanels = kPaired ? 1 : kHeads / 8;
  static constexpr int kValues = 2 * kPanels;
  static constexpr int kFirstRowBit = kPaired ? 2 : 4;
  static constexpr int kMostThreads = kHeads <= 8 ? 512 : 256;  ///< for want of registers
  static constexpr int kUnitBlocks = kBlocks < 4 ? kBlocks : 4;
  static constexpr int kUnits = kBlocks / kUnitBlocks;  ///< of a tile
  /// Blocks without columns behind the end of the shortest row that comes here.
  static constexpr int kFullBlocks = kBlocks == 2 ? 0 : kBlocks <= 4 ? kBlocks - 1 : 4;
  static constexpr int kStages = kDepth;
  static constexpr int kHalves = kPaired ? 1 : 2;  ///< right operands of a panel
  static constexpr int kTilesAhead = kStages / kUnits;
  static_assert(kStages % kUnits == 0);

  __device__ static int column(int lane, int i) {
    return kPaired ? lane % 2 * 2 + i : i / 2 * 8 + lane % 4 * 2 + i % 2;
  }
  __device__ static int seen_bit(int slot) { return slot % 8 * 4 + slot / 8 * 2; }

  template <class Task, class Find, class Emit, class Tap = NoTap>
  __device__ static void run(Task task, int warp, int warps, Find&& find, Emit&& emit,
                             Tap&& tap = {}) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int row = lane / 4;
    const bool upper = lane % 4 >= 2;
    const int first_column = lane % 4 * 8;
    // Else what is loaded first is addressed ahead of the loop over query heads, for all rounds.
    asm volatile("" : "+r"(warp));

    // Behind the end of a row stand its last elements, and zeros in the query.
    const auto column_of = [&](int block) {
      const int at = block * 32 + first_column;
      return block < kFullBlocks ? at : min(at, task.head_dim - 8);
    };
    uint2 query[kPanels][kHalves][kBlocks];
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      const int head = kPaired ? row % 4 : panel * 8 + row;
      const T* const from = task.queries + min(head, task.query_heads - 1) * task.query_stride;
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        uint4 words = *reinterpret_cast<const uint4*>(from + column_of(block));
        if (block >= kFullBlocks && block * 32 + first_column >= task.head_dim) words = {};
        if constexpr (kPaired) {
          query[panel][0][block] = row < 4 ? uint2{words.x, words.z} : uint2{words.y, words.w};
        } else {
          query[panel][0][block] = {words.x, words.z};
          query[panel][1][block] = {words.y, words.w};
        }
      }
    }

    find(task);
    const int tiles = (task.end - task.begin + kTile - 1) / kTile;
    if (warp >= tiles) return;
    const auto* const keys =
        reinterpret_cast<const unsigned char*>(task.keys) + first_column * sizeof(T);
    const auto key_bytes = static_cast<std::uint32_t>(task.key_stride * sizeof(T));
    constexpr int kPositions = kPaired ? 1 : 2;
    uint4 ring[kStages][kUnitBlocks][2];
    std::int32_t position[kStages][kPositions];
    const auto load_blocks = [&](const unsigned char* key, int first, int half, auto& blocks) {
      const auto load_block = [&]<int kBlock>() {
        if (first + kBlock < kFullBlocks) {
          blocks[kBlock][half] = load_key<kBlock * 64>(key + first * 64);
        } else {
          blocks[kBlock][half] = load_key<0>(key + (column_of(first + kBlock) - first_column) * 2);
        }
      };
      [&]<int... kBlock>(std::integer_sequence<int, kBlock...>) {
        (load_block.template operator()<kBlock>(), ...);
      }(std::make_integer_sequence<int, kUnitBlocks>{});
    };
    // Stage s of a round takes part s % kUnits of tile s / kUnits of the round.
    const auto load = [&](int stage, int tile) {
      const int first = task.begin + tile * kTile + row;
      if (stage % kUnits == 0) {
        if constexpr (kPaired) {
          position[stage][0] = task.position(min(first + (upper ? 8 : 0), task.end - 1));
        } else {
          position[stage][0] = task.position(min(first, task.end - 1));
          position[stage][1] = task.position(min(first + 8, task.end - 1));
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto slot = static_cast<std::uint32_t>(min(first + half * 8, task.end - 1));
        const unsigned char* const key = keys + std::uint64_t{slot} * key_bytes;
        load_blocks(key, stage % kUnits * kUnitBlocks, half, ring[stage]);
      }
    };
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      load(stage, min(warp + stage / kUnits * warps, tiles - 1));
    }
    constexpr bool kTapped = std::remove_cvref_t<Tap>::kActive;
    if constexpr (kTapped) {
#pragma unroll
      for (int t = 0; t < kTilesAhead; ++t) tap.begin(task, t, min(warp + t * warps, tiles - 1));
    }
#pragma unroll 1
    for (int first = warp; first < tiles; first += kTilesAhead * warps) {
#pragma unroll
      for (int t = 0; t < kTilesAhead; ++t) {
        const int tile = first + t * warps;
        if (tile >= tiles) break;
        float sums[2][kPanels][kHalves][4] = {};
        std::int32_t at_position[kPositions];
#pragma unroll
        for (int i = 0; i < kPositions; ++i) at_position[i] = position[t * kUnits][i];
#pragma unroll
        for (int unit = 0; unit < kUnits; ++unit) {
          const int stage = t * kUnits + unit;
#pragma unroll
          for (int block = 0; block < kUnitBlocks; ++block) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
              for (int panel = 0; panel < kPanels; ++panel) {
#pragma unroll
                for (int part = 0; part < kHalves; ++part) {
                  const uint2 q = query[panel][part][unit * kUnitBlocks + block];
                  multiply<T>(sums[half][panel][part], ring[stage][block][half], q.x, q.y);
                }
              }
            }
          }
          if (tile + kTilesAhead * warps < tiles) load(stage, tile + kTilesAhead * warps);
        }
        const int slot = task.begin + tile * kTile + row;
        if constexpr (kPaired) {
          // Each lane of a pair has half a sum of two slots; it keeps one slot.
          const int mine = slot + (upper ? 8 : 0);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float given = upper ? sums[0][0][0][2 + i] : sums[1][0][0][i];
            const float held = upper ? sums[1][0][0][2 + i] : sums[0][0][0][i];
            const float sum = held + __shfl_xor_sync(0xffffffffU, given, 2);
            const int at = column(lane, i);
            emit(i, at, mine, task.place(mine, at_position[0]), sum, at < task.query_heads);
          }
        } else {
#pragma unroll
          for (int i = 0; i < kValues; ++i) {
            const int at = column(lane, i);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const float sum = sums[half][i / 2][0][i % 2] + sums[half][i / 2][1][2 + i % 2];
              emit(i, at, slot + 8 * half, task.place(slot + 8 * half, at_position[half]), sum,
                   at < task.query_heads);
            }
          }
        }
        if constexpr (kTapped) {
          const auto holders = [&](int from, std::int32_t position) {
            return __ballot_sync(0xffffffffU, task.place(from, position) != kNoPlace);
          };
          // Lane 4 r knows slot r; slot r + 8 is known to lane 4 r + 2, or to lane 4 r as well.
          std::uint32_t seen = 0;
          if constexpr (kPaired) {
            seen = holders(slot + (upper ? 8 : 0), at_position[0]) & kAllSeen;
          } else {
            constexpr std::uint32_t kFirstLanes = 0x11111111U;
            seen = (holders(slot, at_position[0]) & kFirstLanes) |
                   (holders(slot + 8, at_position[1]) & kFirstLanes) << 2U;
          }
          const int next = tile + kTilesAhead * warps;
          tap.tile(task, t, tile, seen, next < tiles ? next : -1);
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
  static constexpr int kTilesAhead = 1;
  static constexpr int kVector = kWide ? 4 : 1;
  static constexpr int kMostThreads = kHeads <= 4 ? 512 : 256;

  struct alignas(sizeof(T) * kVector) Vector {
    T values[kVector];
  };

  __device__ static int column(int lane, int i) { return lane % 2 * kValues + i; }
  __device__ static int seen_bit(int slot) { return 2 * slot; }

  template <class Task, class Find, class Emit, class Tap = NoTap>
  __device__ static void run(Task task, int warp, int warps, Find&& find, Emit&& emit,
                             Tap&& tap = {}) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int team = lane / kLanes;
    const int member = lane % kLanes;
    find(task);
    const int tiles = (task.end - task.begin + kTile - 1) / kTile;
    constexpr bool kTapped = std::remove_cvref_t<Tap>::kActive;
    if constexpr (kTapped) {
      if (warp < tiles) tap.begin(task, 0, warp);
    }
    for (int tile = warp; tile < tiles; tile += warps) {
      const int first = task.begin + tile * kTile + team * kSlots;
      const T* keys[kSlots];
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
        keys[s] = task.keys + min(first + s, task.end - 1) * task.key_stride;
      }
      const int slot = first + member / 2;
      const std::int32_t position = task.position(min(slot, task.end - 1));
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
              sums[s * kHeads + h] =
                  fmaf(as_float(query.values[v]), as_float(now[s].values[v]), sums[s * kHeads + h]);
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
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        const int at_column = column(lane, i);
        emit(i, at_column, slot, task.place(slot, position), sums[i], at_column < task.query_heads);
      }
      if constexpr (kTapped) {
        const std::uint32_t holders =
            __ballot_sync(0xffffffffU, task.place(slot, position) != kNoPlace);
        tap.tile(task, 0, tile, holders & kAllSeen, tile + warps < tiles ? tile + warps : -1);
      }
    }
  }
};

}  // namespace spectralkv::cuda
