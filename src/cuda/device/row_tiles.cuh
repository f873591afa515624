// Rows of many tokens at once, in one pass over the keys, on the tensor cores.
//
// A tile is 64 keys by 128 columns, one a (token, query head); the columns lie such that a thread
// holds all heads of its tokens. With reference[q] near the logarithm of the softmax's sum of
// column q,
//   value(token, j) = sum over q of 2^(score(q, j) - reference[q])
// is near the (group-fold) probability, which is what keys are ranked by. Sums are not known before
// all keys were seen, so the references are estimates, from a sample of the blocks of keys at first
// and from what was seen later on. Per token a list holds the keys of the highest values, and
// `bound` is at least the value of every key that is not in it: it rises when the list is cut, and
// is scaled with the values, by the head that changes most, when references change. At the end the
// references are exact, the list's keys are scored anew, and if the K-th best lies above the bound
// no key outside can belong to the row. Tokens of which that cannot be said are scanned, see
// row_scan.cuh, or, when they are many, go through once more, with exact references from the start;
// what is still not told apart (ties) is left to draw_row.
#pragma once

#include <cstdint>

#include "cuda/device/graph_rows.cuh"
#include "cuda/device/matrix.cuh"
#include "cuda/layer.h"

namespace spectralkv::cuda {

inline constexpr int kMostWarpgroups = 2;  ///< of a thread block, that compute
inline constexpr int kTileThreads = (kMostWarpgroups + 1) * kWarpgroup;
/// Most entries of a list when it is ranked.
inline constexpr int kMostRanked = 64;
inline constexpr int kMostEntries = 128;
inline constexpr int kTurnKeys = kTileRows / 4;  ///< of a block, that a warp has

/// Which keys of a block of 64 a softmax counts, and which may become neighbours.
struct alignas(16) KeyMasks {
  unsigned long long counted;
  unsigned long long candidates;
};

/// A token that the first pass left over, when there are few: all keys are scanned for those above
/// a limit that its K-th neighbour reaches.
struct RowScan {
  std::int32_t graph;
  std::int32_t at;  ///< in `drawn`
  float limit;      ///< of the sum of probabilities
  std::int32_t found;
  std::int32_t done;  ///< parts of the scan
};
inline constexpr int kMostScans = 1536;

/// Tokens that get a row, by sequence or by graph.
struct TokenList {
  std::int32_t* tokens;  ///< (lists, stride)
  std::int32_t* counts;  ///< (lists)
};

struct RowTilesArgs {
  TokensView queries;
  TokensView keys;
  std::int64_t first_slot;
  float scale;
  float softcap;
  TokenList drawn;    ///< by sequence
  std::int64_t most;  ///< stride of the lists
  KeyMasks* masks;    ///< (B, Hkv, blocks)
  std::int64_t blocks;
  /// Did the first pass leave a token over? (B, G, most), as `drawn` lists them; and the exact
  /// references of those left over, (B, G, most, group).
  std::int32_t* left;
  float* references;
  std::int32_t* left_count;  ///< of all graphs
  /// Places in `drawn` of what the second pass goes through, by graph, ascending.
  TokenList again;
  RowScan* scans;             ///< (kMostScans)
  unsigned long long* found;  ///< (kMostScans, kMostRanked)
  /// (graph in the layer, token) left over by the second.
  int2* unsettled;
  std::int32_t* unsettled_count;
  // Of the launch
  std::int32_t warpgroups;
  std::int32_t stages;
  std::int32_t panels;
  std::int32_t entries;   ///< of a list
  std::int32_t keep_low;  ///< a list is cut to between these
  std::int32_t keep_high;
  std::int32_t rank_low;  ///< and to these before it is ranked
  std::int32_t rank_high;
  std::int32_t samples;       ///< fewest blocks of a sample
  std::int32_t sample_share;  ///< one in so many blocks
  bool second;                ///< pass
};

/// Where what lies in the scratch of one call, in words.
struct RowsScratch {
  std::int64_t most;    ///< tokens of a sequence that get a row
  std::int64_t blocks;  ///< of keys
  std::int64_t masks;
  std::int64_t counts;  ///< drawn by sequence, again by graph, left over in all, unsettled
  std::int64_t drawn;
  std::int64_t left;
  std::int64_t again;
  std::int64_t references;
  std::int64_t unsettled;
  std::int64_t scans;
  std::int64_t found;
  std::int64_t words;

  RowsScratch(const LayerView& layer, std::int64_t slots, std::int64_t count,
              std::int64_t row_stride)
      : most((count + row_stride - 1) / row_stride),
        blocks((slots + kTileRows - 1) / kTileRows),
        masks(0),
        counts(aligned(masks + layer.batch * layer.heads * blocks * 4)),
        drawn(aligned(counts + counters(layer))),
        left(aligned(drawn + layer.batch * most)),
        again(aligned(left + graphs(layer) * most)),
        references(aligned(again + graphs(layer) * most)),
        unsettled(aligned(references + graphs(layer) * most * layer.group)),
        scans(aligned(unsettled + graphs(layer) * most * 2)),
        found(aligned(scans + kMostScans * static_cast<std::int64_t>(sizeof(RowScan)) / 4)),
        words(aligned(found + std::int64_t{kMostScans} * kMostRanked * 2)) {}

  static std::int64_t aligned(std::int64_t word) { return (word + 63) / 64 * 64; }
  static std::int64_t graphs(const LayerView& layer) {
    return std::int64_t{layer.batch} * layer.graphs;
  }
  static std::int64_t counters(const LayerView& layer) { return layer.batch + graphs(layer) + 2; }
};

/// Shared memory of a thread block, in this order.
struct TileMemory {
  static constexpr int kAlignment = 1024;
  /// Floats of one thread's columns (32), so far apart that four threads' reads do not collide.
  static constexpr int kThreadColumns = kTileColumns / 4;
  static constexpr int kColumnStride = kThreadColumns + 4;
  static constexpr int kColumns = 4 * kColumnStride;

  /// What a warpgroup has for itself besides its queries and lists.
  struct Warpgroup {
    float reference[kColumns];
    float head_sum[kColumns];
    float middle_sum[kColumns];
    float ratio[kColumns];
    float partial[4][kColumns];
    float partial_maximum[4][kColumns];
    float bound[kTileColumns];
    std::int32_t count[kTileColumns];
    std::int32_t slot[kTileColumns];  ///< -1: no token
    std::int32_t token[kTileColumns];
    std::int32_t state[kTileColumns];  ///< of TokenState
  };
  struct Block {
    Warpgroup warpgroups[kMostWarpgroups];
    KeyMasks masks[4];
    unsigned long long full[4];
    unsigned long long empty[4];
    std::int32_t lowest_slot;
    std::int32_t highest_slot;
  };

  static std::int64_t bytes(int warpgroups, int stages, int panels, int tokens, int entries) {
    const std::int64_t queries = std::int64_t{warpgroups} * panels * kTileColumns * kPanelBytes;
    const std::int64_t keys = std::int64_t{stages} * panels * kTileRows * kPanelBytes;
    const std::int64_t lists = std::int64_t{warpgroups} * tokens * entries * 8;
    return kAlignment + queries + keys + lists + static_cast<std::int64_t>(sizeof(Block));
  }
};

enum TokenState : std::int32_t {
  kTokenPlain = 0,
  kTokenNonfinite = 1,  ///< its query or key has elements that are no numbers
  kTokenUnsure = 2,     ///< a sum overflowed
};

/// Blocks of 64 keys in the order they are seen: those around the tile's own tokens and the first,
/// then the middle, by golden steps, so that any number of the latter is a fair sample.
struct BlockOrder {
  int blocks;
  int tail;  ///< first block that not all tokens see to its end
  int head;  ///< number of blocks that are not in the middle
  int middle;
  int step;
  int samples;

  __device__ BlockOrder(int lowest_slot, int highest_slot, int fewest, int share) {
    blocks = highest_slot / kTileRows + 1;
    tail = lowest_slot / kTileRows;
    middle = tail > 1 ? tail - 1 : 0;
    head = blocks - middle;
    samples = middle / share > fewest ? middle / share : fewest;
    if (samples > middle) samples = middle;
    step = middle * 5 / 8 + 1;
    while (middle > 0 && common_divisor(step, middle) != 1) ++step;
  }
  __device__ static int common_divisor(int a, int b) {
    while (b != 0) {
      const int rest = a % b;
      a = b;
      b = rest;
    }
    return a;
  }
  __device__ int head_block(int i) const {
    if (middle == 0) return i;
    return i == 0 ? 0 : tail + i - 1;
  }
  /// `cursor`: 0 at first, kept by the caller.
  __device__ int next_middle(int& cursor) const {
    const int at = cursor + 1;
    cursor += step;
    if (cursor >= middle) cursor -= middle;
    return at;
  }
  /// Block number i of all that pass; in ascending order of i. The sample comes first (not in the
  /// second pass), then everything.
  __device__ int block(int i, bool sampled, int& cursor) const {
    if (sampled) {
      if (i < samples) return next_middle(cursor);
      i -= samples;
      if (i < head) return head_block(i);
      if (i == head) cursor = 0;
      i -= head;
    }
    return i < head ? head_block(i) : next_middle(cursor);
  }
  __device__ int steps(bool sampled) const { return blocks + (sampled ? samples + head : 0); }
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800

__device__ inline float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Are all eight elements numbers?
template <class T>
__device__ inline bool all_finite(const uint4& chunk) {
  constexpr std::uint32_t kExponent = std::is_same_v<T, __half> ? 0x7c00U : 0x7f80U;
  bool finite = true;
  for (const std::uint32_t pair : {chunk.x, chunk.y, chunk.z, chunk.w}) {
    finite = finite && (pair & kExponent) != kExponent && (pair >> 16U & kExponent) != kExponent;
  }
  return finite;
}

/// Scores in units of log2: `factor` times a dot product, or capped ones.
struct ScoreRule {
  float factor;
  float inner;  ///< of the softcap: 2 log2(e) scale / softcap; 0: none
  float outer;  ///< softcap log2(e)

  __device__ ScoreRule(float scale, float softcap) {
    constexpr float kLog2E = 1.44269504088896F;
    factor = softcap > 0.0F ? 1.0F : scale * kLog2E;
    inner = softcap > 0.0F ? 2.0F * kLog2E * scale / softcap : 0.0F;
    outer = softcap * kLog2E;
  }
  /// softcap tanh(scale dot / softcap); no number where the dot product is none.
  __device__ float capped(float dot) const {
    const float tanh = 1.0F - __fdividef(2.0F, 1.0F + exp2_of(inner * dot));
    return fmaf(outer, tanh, 0.0F * dot);
  }
};

/// A number that orders entries: higher probability first, then lower slot.
__device__ inline unsigned long long ranked_entry(float probability, std::uint32_t slot) {
  return static_cast<unsigned long long>(__float_as_uint(probability)) << 32U |
         static_cast<std::uint32_t>(~slot);
}

struct Neighbor {
  std::int32_t slot;
  float probability;
};

/// The best of up to kMostRanked entries, by one warp: lane k gets number k, probability 0 where
/// there is none. The entries' order is lost.
__device__ inline Neighbor rank_entries(unsigned long long* entries, int count, int top_k,
                                        int lane) {
  const unsigned long long first = lane < count ? entries[lane] : 0ULL;
  const unsigned long long second = lane + 32 < count ? entries[lane + 32] : 0ULL;
  int first_rank = 0;
  int second_rank = 0;
  for (int i = 0; i < count; ++i) {
    const unsigned long long other = entries[i];
    first_rank += other > first ? 1 : 0;
    second_rank += other > second ? 1 : 0;
  }
  __syncwarp();
  if (lane < count && first_rank < top_k) entries[first_rank] = first;
  if (lane + 32 < count && second_rank < top_k) entries[second_rank] = second;
  __syncwarp();
  const unsigned long long best = lane < min(count, top_k) ? entries[lane] : 0ULL;
  return {static_cast<std::int32_t>(~static_cast<std::uint32_t>(best)),
          __uint_as_float(static_cast<std::uint32_t>(best >> 32U))};
}

/// Like write_row, by a warp whose lane k has neighbour k with the sum of its probabilities over
/// the query heads of the group.
__device__ inline void write_row_by_warp(const LayerView& layer, std::uint32_t* row, int lane,
                                         const Neighbor& neighbor) {
  const bool is_neighbor = neighbor.probability > 0.0F;
  const int count = __popc(__ballot_sync(kAllOnes, is_neighbor));
  const auto probability = is_neighbor ? static_cast<double>(neighbor.probability) : 0.0;
  std::uint32_t threshold = 0;
  if (layer.law == EdgeLaw::attention) {
    const double heads = layer.group;
    std::uint64_t widths = attention_width(probability / heads);
    for (int offset = 1; offset < 32; offset *= 2) {
      const std::uint64_t before = __shfl_up_sync(kAllOnes, widths, offset);
      if (lane >= offset) widths += before;
    }
    threshold = attention_threshold(widths);
  } else if (layer.law == EdgeLaw::weighted && count > 0) {
    double sum = probability;
    for (int offset = 1; offset < 32; offset *= 2) {
      const double before = __shfl_up_sync(kAllOnes, sum, offset);
      if (lane >= offset) sum += before;
    }
    const double total = __shfl_sync(kAllOnes, sum, 31);
    threshold = lane + 1 < count ? weighted_threshold(sum / total) : kAllOnes;
  }
  if (lane < layer.top_k) {
    set_edge(layer, row, lane, is_neighbor ? neighbor.slot : -1, threshold);
  }
}

/// kGroup: query heads of a token's columns, `group` of them real.
template <class T, int kGroup>
struct RowTiles {
  static constexpr int kTokens = kTileColumns / kGroup;
  static constexpr int kThreadColumns = TileMemory::kThreadColumns;
  static constexpr int kThreadTokens = kThreadColumns / kGroup;
  static constexpr int kColumnStride = TileMemory::kColumnStride;
  /// Registers are short where a thread has many tokens.
  static constexpr bool kHoldsBounds = kThreadTokens <= 8;

  /// Column x of the threads with lane % 4 == c belongs to token 4 (x / kGroup) + c, head
  /// x % kGroup; it is row `tile_column` of the tile of queries.
  __device__ static int tile_column(int c, int x) { return x / 2 * 8 + 2 * c + x % 2; }

  const LayerView& layer;
  const RowTilesArgs& args;
  TileMemory::Block& block;
  TileMemory::Warpgroup& own;
  uint2* lists;  ///< (kTokens, entries): slot, value
  std::uint32_t queries;
  std::uint32_t keys;
  const unsigned char* query_tile;
  int name;  ///< of the warpgroup's barrier
  int thread;
  int lane;
  int warp;
  int c;  ///< lane % 4
  std::int64_t b;
  std::int64_t g;
  std::int64_t first_index;  ///< of the tile in the list
  BlockOrder order;
  ScoreRule rule;
  int stage = 0;  ///< of the next block
  std::uint32_t parity = 0;
  int cursor = 0;  ///< see BlockOrder

  float reference[kThreadColumns];
  float sum[kThreadColumns];
  float bound[kHoldsBounds ? kThreadTokens : 1];

  // ---- input

  __device__ void load_queries() {
    constexpr int kColumnsApart = kWarpgroup / 8;
    constexpr int kAtOnce = kTileColumns / kColumnsApart;
    const int chunks = layer.head_dim / 8;
    unsigned char* const tile = const_cast<unsigned char*>(query_tile);
    const T* const head_queries = static_cast<const T*>(args.queries.data) +
                                  b * args.queries.sequence_stride +
                                  g * layer.group * args.queries.head_stride;
    for (int chunk = thread % 8; chunk < 8 * args.panels; chunk += 8) {
      uint4 values[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int column = thread / 8 + kColumnsApart * i;
        const int token = token_of_column(column);
        const int head = head_of_column(column);
        values[i] = make_uint4(0, 0, 0, 0);
        if (own.slot[token] >= 0 && head < layer.group && chunk < chunks) {
          values[i] =
              reinterpret_cast<const uint4*>(head_queries + head * args.queries.head_stride +
                                             own.token[token] * args.queries.token_stride)[chunk];
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int column = thread / 8 + kColumnsApart * i;
        if (!all_finite<T>(values[i])) own.state[token_of_column(column)] = kTokenNonfinite;
        *reinterpret_cast<uint4*>(tile + chunk_offset(kTileColumns, column, chunk)) = values[i];
      }
    }
  }
  __device__ static int token_of_column(int column) {
    return (column / 8 * 2 + column % 2) / kGroup * 4 + column % 8 / 2;
  }
  __device__ static int head_of_column(int column) {
    return (column / 8 * 2 + column % 2) % kGroup;
  }

  __device__ void start_tokens() {
    for (int token = thread; token < kTokens; token += kWarpgroup) {
      const int slot = own.slot[token];
      if (slot >= 0) {
        const unsigned long long counted =
            args.masks[(b * layer.heads + g) * args.blocks + slot / kTileRows].counted;
        if ((counted >> (slot % kTileRows) & 1U) == 0) own.state[token] = kTokenNonfinite;
      }
      own.count[token] = 0;
      // No value exceeds infinity: nothing is listed.
      const bool listed = slot >= 0 && own.state[token] == kTokenPlain;
      own.bound[token] = listed ? -1.0F : INFINITY;
    }
  }

  // ---- one block of keys

  /// Waits for the next block, and begins to multiply it with the queries.
  __device__ void start_scores(Accumulator& acc, bool there) {
    if (there) barrier_wait(shared_address(&block.full[stage]), parity);
    start_product<T>(acc,
                     keys + __shfl_sync(kAllOnes, stage, 0) * args.panels * kTileRows * kPanelBytes,
                     queries, (layer.head_dim + 15) / 16);
  }
  /// Waits for the scores of the block; those of keys that a token does not see are -inf.
  __device__ KeyMasks finish_scores(Accumulator& acc, int block_index) {
    const KeyMasks masks = block.masks[stage];
    __syncwarp();
    if (lane == 0) barrier_arrive(shared_address(&block.empty[stage]));
    if (++stage == args.stages) {
      stage = 0;
      parity ^= 1U;
    }
    if (args.softcap > 0.0F) {
#pragma unroll
      for (int i = 0; i < kTileColumns / 2; ++i) acc[i] = rule.capped(acc[i]);
    }
    const int first_key = block_index * kTileRows;
    if (masks.counted != ~0ULL || block_index >= order.tail) {
      const int row = 16 * warp + lane / 4;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const bool counted = (masks.counted >> (row + 8 * r) & 1U) != 0;
#pragma unroll
        for (int x = 0; x < kThreadColumns; ++x) {
          const bool seen = counted && first_key + row + 8 * r <= own.slot[4 * (x / kGroup) + c];
          float& score = acc[x / 2 * 4 + 2 * r + x % 2];
          score = seen ? score : -INFINITY;
        }
      }
    }
    return masks;
  }

  // ---- references

  static constexpr float kNothing = -1e30F;

  /// Adds a block to this thread's own running maximum (in `reference`) and sum.
  __device__ void sample(const Accumulator& acc) {
#pragma unroll
    for (int x = 0; x < kThreadColumns; ++x) {
      const float first = acc[x / 2 * 4 + x % 2] * rule.factor;
      const float second = acc[x / 2 * 4 + 2 + x % 2] * rule.factor;
      const float highest = fmaxf(reference[x], fmaxf(first, second));
      sum[x] = fmaf(sum[x], exp2_of(reference[x] - highest),
                    exp2_of(first - highest) + exp2_of(second - highest));
      reference[x] = highest;
    }
  }

  __device__ void finish_sample() {
#pragma unroll
    for (int x = 0; x < kThreadColumns; ++x) {
      float highest = reference[x];
      for (int offset = 4; offset < 32; offset *= 2) {
        highest = fmaxf(highest, __shfl_xor_sync(kAllOnes, highest, offset));
      }
      float total = sum[x] * exp2_of(reference[x] - highest);
      for (int offset = 4; offset < 32; offset *= 2) {
        total += __shfl_xor_sync(kAllOnes, total, offset);
      }
      if (lane / 4 == 0) {
        own.partial[warp][c * kColumnStride + x] = total;
        own.partial_maximum[warp][c * kColumnStride + x] = highest;
      }
    }
    warpgroup_sync(name);
    const int column = thread / kThreadColumns * kColumnStride + thread % kThreadColumns;
    float highest = kNothing;
    for (int w = 0; w < 4; ++w) highest = fmaxf(highest, own.partial_maximum[w][column]);
    float total = 0.0F;
    for (int w = 0; w < 4; ++w) {
      total += own.partial[w][column] * exp2_of(own.partial_maximum[w][column] - highest);
    }
    own.reference[column] = highest > kNothing ? highest + log2f(total) : 0.0F;
  }

  /// References of the second pass.
  __device__ void load_references() {
    const int column = thread / kThreadColumns * kColumnStride + thread % kThreadColumns;
    const int token = thread % kThreadColumns / kGroup * 4 + thread / kThreadColumns;
    const int head = thread % kThreadColumns % kGroup;
    own.reference[column] = own.slot[token] >= 0 && head < layer.group
                                ? args.references[place_of(token) * layer.group + head]
                                : 0.0F;
  }
  /// In what is kept by graph and drawn token.
  __device__ std::int64_t place_of(int token) const {
    const std::int64_t list = (b * layer.graphs + g) * args.most;
    const std::int64_t at = first_index + token;
    return list + (args.second ? args.again.tokens[list + at] : at);
  }

  __device__ void clear_sums() {
    const int column = thread / kThreadColumns * kColumnStride + thread % kThreadColumns;
    own.head_sum[column] = 0.0F;
    own.middle_sum[column] = 0.0F;
    own.ratio[column] = 1.0F;
    // Columns without a head add nothing.
    if (thread % kGroup >= layer.group) own.reference[column] = INFINITY;
  }

  __device__ void reload() {
#pragma unroll
    for (int x = 0; x < kThreadColumns; ++x) reference[x] = own.reference[c * kColumnStride + x];
#pragma unroll
    for (int i = 0; i < (kHoldsBounds ? kThreadTokens : 0); ++i) bound[i] = own.bound[4 * i + c];
  }

  // ---- values and lists

  /// Values of this thread's two keys for its tokens; adds to the sums.
  __device__ void add_values(const Accumulator& acc, float (&values)[kThreadTokens][2]) {
#pragma unroll
    for (int i = 0; i < kThreadTokens; ++i) {
      values[i][0] = 0.0F;
      values[i][1] = 0.0F;
#pragma unroll
      for (int head = 0; head < kGroup; ++head) {
        const int x = i * kGroup + head;
        const float first = exp2_of(fmaf(acc[x / 2 * 4 + x % 2], rule.factor, -reference[x]));
        const float second = exp2_of(fmaf(acc[x / 2 * 4 + 2 + x % 2], rule.factor, -reference[x]));
        values[i][0] = head == 0 ? first : values[i][0] + first;
        values[i][1] = head == 0 ? second : values[i][1] + second;
        sum[x] += first + second;
      }
    }
  }

  enum Listed : int {
    kBeyondRoom = 1,  ///< a list has more than `room` entries
    kOverflow = 2,    ///< and more than it can hold: some are lost
  };

  /// Lists what exceeds the bounds; returns bits of Listed.
  __device__ int list_values(const float (&values)[kThreadTokens][2], const KeyMasks& masks,
                             int block_index, int room) {
    int full = 0;
    const int row = 16 * warp + lane / 4;
#pragma unroll
    for (int i = 0; i < kThreadTokens; ++i) {
      const int token = 4 * i + c;
      const float limit = kHoldsBounds ? bound[kHoldsBounds ? i : 0] : own.bound[token];
      if (!(fmaxf(values[i][0], values[i][1]) > limit)) continue;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (!(values[i][r] > limit)) continue;
        const int key = block_index * kTileRows + row + 8 * r;
        const bool candidate = (masks.candidates >> (row + 8 * r) & 1U) != 0;
        if (candidate && key < own.slot[token]) {
          const int at = atomicAdd(&own.count[token], 1);
          if (at >= room) full |= kBeyondRoom;
          if (at >= args.entries) {
            full |= kOverflow;
            continue;
          }
          lists[token * args.entries + at] =
              make_uint2(static_cast<std::uint32_t>(key), __float_as_uint(values[i][r]));
        }
      }
    }
    return full;
  }

  /// How many of the lanes of `lanes` come before this one.
  __device__ int rank_in(unsigned lanes) const { return __popc(lanes & ((1U << lane) - 1U)); }

  /// Takes the entries of block `dropped` (-1: of none) off a list, and cuts what is left, if it is
  /// more than `trigger` entries, to between `low` and `high`; by one warp. The order of entries is
  /// an accident: nothing here may depend on it.
  __device__ void cut_list(int token, float ratio, int dropped, int trigger, int low, int high) {
    constexpr int kPerLane = kMostEntries / 32;
    uint2* const list = lists + token * args.entries;
    const int listed = min(own.count[token], args.entries);
    uint2 entries[kPerLane];
    unsigned there[kPerLane];
    int count = 0;
    std::uint32_t highest = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int at = lane + 32 * i;
      entries[i] = at < listed ? list[at] : make_uint2(0, 0);
      const bool is_there = at < listed && static_cast<int>(entries[i].x / kTileRows) != dropped;
      there[i] = __ballot_sync(kAllOnes, is_there);
      count += __popc(there[i]);
      entries[i].y = is_there ? __float_as_uint(__uint_as_float(entries[i].y) * ratio) : 0U;
      highest = max(highest, entries[i].y);
    }
    float lowest = own.bound[token] * ratio;
    __syncwarp();
    if (count <= trigger) {
      if (ratio != 1.0F || count != listed) {
        int before = 0;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
          if ((there[i] >> lane & 1U) != 0) list[before + rank_in(there[i])] = entries[i];
          before += __popc(there[i]);
        }
      }
      if (lane == 0) {
        own.count[token] = count;
        own.bound[token] = lowest;
      }
      return;
    }
    // Values are not negative: they compare like their bits. The share above x of those above
    // `below` falls about like a power of x, which gives guesses for the cut; where a guess leaves
    // the bracket, it is halved.
    std::uint32_t least = 0x7f800000U;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if ((there[i] >> lane & 1U) != 0) least = min(least, entries[i].y);
    }
    least = __reduce_min_sync(kAllOnes, least);
    std::uint32_t above = __reduce_max_sync(kAllOnes, highest);
    std::uint32_t below =
        max(least > 0U ? least - 1U : 0U, lowest > 0.0F ? __float_as_uint(lowest) : 0U);
    const float base = __log2f(__uint_as_float(below | 1U));
    // Whole numbers add up to the same in any order.
    constexpr float kLogUnit = 4096.0F;
    int logs = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if ((there[i] >> lane & 1U) != 0) {
        logs += __float2int_rn(kLogUnit * (__log2f(__uint_as_float(entries[i].y)) - base));
      }
    }
    logs = __reduce_add_sync(kAllOnes, logs);
    const float wanted = 0.5F * static_cast<float>(low + high);
    const float slope =
        __fdividef(static_cast<float>(logs), kLogUnit * static_cast<float>(count)) * 0.6931472F;
    float guess = base + slope * __log2f(__fdividef(static_cast<float>(count), wanted));
    constexpr int kMostSteps = 26;
    for (int step = 0; step < kMostSteps && above - below > 1; ++step) {
      std::uint32_t middle = __float_as_uint(exp2_of(guess));
      if (step > 3 || !(middle > below && middle < above)) middle = below + (above - below) / 2;
      int higher = 0;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        higher += __popc(__ballot_sync(kAllOnes, entries[i].y > middle));
      }
      if (higher > high) {
        below = middle;
      } else {
        above = middle;
        if (higher >= low) break;
      }
      guess = __log2f(__uint_as_float(middle)) +
              slope * __log2f(__fdividef(fmaxf(static_cast<float>(higher), 0.5F), wanted));
    }
    int kept = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const bool stays = entries[i].y > above;
      const unsigned stay = __ballot_sync(kAllOnes, stays);
      if (stays) list[kept + rank_in(stay)] = entries[i];
      kept += __popc(stay);
    }
    if (lane == 0) {
      own.count[token] = kept;
      own.bound[token] = fmaxf(__uint_as_float(above), lowest);
    }
  }

  /// Adds up the sums, renews the references if asked to, and cuts lists, see cut_list. `done`
  /// blocks of the middle were seen.
  __device__ void refresh(bool in_head, int done, bool renew, int dropped, int trigger, int low,
                          int high) {
    if (!args.second) {
#pragma unroll
      for (int x = 0; x < kThreadColumns; ++x) {
        float total = sum[x];
        for (int offset = 4; offset < 32; offset *= 2) {
          total += __shfl_xor_sync(kAllOnes, total, offset);
        }
        if (lane / 4 == 0) own.partial[warp][c * kColumnStride + x] = total;
        sum[x] = 0.0F;
      }
    }
    warpgroup_sync(name);
    if (!args.second) {
      const int column = thread / kThreadColumns * kColumnStride + thread % kThreadColumns;
      float total = 0.0F;
      for (int w = 0; w < 4; ++w) total += own.partial[w][column];
      float head = own.head_sum[column] + (in_head ? total : 0.0F);
      float middle = own.middle_sum[column] + (in_head ? 0.0F : total);
      float ratio = 1.0F;
      if (renew && thread % kGroup < layer.group) {
        const float seen =
            done > 0 ? __fdividef(static_cast<float>(order.middle), static_cast<float>(done))
                     : 0.0F;
        const float all = fmaf(middle, seen, head);
        if (all > 0.0F && all < INFINITY) {
          own.reference[column] += log2f(all);
          ratio = __fdividef(1.0F, all);
        } else {
          own.state[thread % kThreadColumns / kGroup * 4 + thread / kThreadColumns] |= kTokenUnsure;
        }
      }
      own.head_sum[column] = head * ratio;
      own.middle_sum[column] = middle * ratio;
      own.ratio[column] = ratio;
    }
    warpgroup_sync(name);
    for (int token = warp; token < kTokens; token += 4) {
      float ratio = 1.0F;
      if (renew) {
        ratio = 0.0F;
        for (int head = 0; head < layer.group; ++head) {
          ratio = fmaxf(ratio, own.ratio[token % 4 * kColumnStride + token / 4 * kGroup + head]);
        }
      }
      cut_list(token, ratio, dropped, trigger, low, high);
    }
    warpgroup_sync(name);
    reload();
  }

  /// Lists a block that overflowed some list and was taken off all of them. Which of its values had
  /// found room was an accident; now a warp lists its keys when all lists have room for them.
  __device__ void list_in_turns(float (&values)[kThreadTokens][2], const KeyMasks& masks,
                                int block_index, int trigger) {
#pragma unroll
    for (int t = 0; t < kThreadTokens; ++t) {
      float ratio = 0.0F;
      for (int head = 0; head < layer.group; ++head) {
        ratio = fmaxf(ratio, own.ratio[c * kColumnStride + t * kGroup + head]);
      }
      values[t][0] *= ratio;
      values[t][1] *= ratio;
    }
#pragma unroll 1
    for (int turn = 0; turn < 4; ++turn) {
      const int full =
          turn == warp ? list_values(values, masks, block_index, args.entries - kTurnKeys) : 0;
      if (warpgroup_any(name, full != 0) && turn < 3) {
        // Nothing was added to the sums since they were last added up: only lists are cut.
        refresh(true, 0, false, -1, trigger, args.keep_low, args.keep_high);
      }
    }
  }

  // ---- rows

  /// The probability sums of 32 entries from `base` on, in place of their values, as a number that
  /// orders entries: higher probability first, then lower slot.
  __device__ void score_entries(int token, int base, int count) {
    constexpr int kRows = 4;  // of a lane: 8 apart
    constexpr int kEights = kGroup > 8 ? 2 : 1;
    const int row = lane / 4;
    auto* const ranked = reinterpret_cast<unsigned long long*>(lists + token * args.entries);
    const uint2* const list = lists + token * args.entries;
    const T* const head_keys = static_cast<const T*>(args.keys.data) +
                               b * args.keys.sequence_stride + g * args.keys.head_stride;
    std::uint32_t slots[kRows];
    const uint4* from[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      slots[r] = list[min(base + row + 8 * r, count - 1)].x;
      from[r] = reinterpret_cast<const uint4*>(head_keys + slots[r] * args.keys.token_stride);
    }
    float acc[kEights][kRows / 2][4] = {};
    const int chunks = layer.head_dim / 8;
    // The order of elements within a sum is free: lane c takes chunk c of every four.
#pragma unroll 4
    for (int chunk = c; chunk < (chunks + 3) / 4 * 4; chunk += 4) {
      uint4 key[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        key[r] = make_uint4(0, 0, 0, 0);
        if (chunk < chunks) key[r] = from[r][chunk];
      }
#pragma unroll
      for (int e = 0; e < kEights; ++e) {
        uint4 query{0, 0, 0, 0};
        const int head = 8 * e + row;
        if (head < kGroup && chunk < chunks) {
          const int column = tile_column(token % 4, token / 4 * kGroup + head);
          query = *reinterpret_cast<const uint4*>(query_tile +
                                                  chunk_offset(kTileColumns, column, chunk));
        }
#pragma unroll
        for (int r = 0; r < kRows; r += 2) {
          multiply<T>(acc[e][r / 2], key[r].x, key[r + 1].x, key[r].y, key[r + 1].y, query.x,
                      query.y);
          multiply<T>(acc[e][r / 2], key[r].z, key[r + 1].z, key[r].w, key[r + 1].w, query.z,
                      query.w);
        }
      }
    }
    float totals[kRows] = {};
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int head = 8 * e + 2 * c + i;
        if (head >= layer.group) continue;
        const float shift = own.reference[token % 4 * kColumnStride + token / 4 * kGroup + head];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          float score = acc[e][r / 2][r % 2 * 2 + i];
          if (args.softcap > 0.0F) score = rule.capped(score);
          if (isfinite(score)) totals[r] += exp2_of(fmaf(score, rule.factor, -shift));
        }
      }
    }
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      totals[r] += __shfl_xor_sync(kAllOnes, totals[r], 1);
      totals[r] += __shfl_xor_sync(kAllOnes, totals[r], 2);
      const int at = base + row + 8 * r;
      if (c == r && at < count) {
        ranked[at] = ranked_entry(totals[r], slots[r]);
      }
    }
  }

  /// Draws the row of a token, by one warp; false where its list may lack a neighbour. `last` is
  /// the least probability sum of the row.
  __device__ bool draw(int token, float& last) {
    const int count = own.count[token];
    auto* const ranked = reinterpret_cast<unsigned long long*>(lists + token * args.entries);
    for (int base = 0; base < count; base += 32) score_entries(token, base, count);
    __syncwarp();
    const Neighbor best = rank_entries(ranked, count, layer.top_k, lane);
    // Scores of the pass and of the list may differ by how they were rounded.
    constexpr float kSlack = 1.002F;
    constexpr float kLeast = 1e-36F;
    last = __shfl_sync(kAllOnes, best.probability, layer.top_k - 1);
    const float limit = own.bound[token];
    if (limit >= 0.0F && !(last > fmaf(limit, kSlack, kLeast))) return false;
    write_row_by_warp(layer, row_of(layer, b, g, own.slot[token]), lane, best);
    return true;
  }

  __device__ void finish() {
    std::uint32_t drawn = 0;
    std::uint32_t nonfinite = 0;
    const std::int64_t graph = b * layer.graphs + g;
    for (int token = warp; token < kTokens; token += 4) {
      if (own.slot[token] < 0) continue;
      const std::int64_t place = place_of(token);
      if (lane == 0 && !args.second) args.left[place] = 0;
      if (own.state[token] & kTokenNonfinite) {
        ++drawn;
        ++nonfinite;
        continue;
      }
      const bool unsure = (own.state[token] & kTokenUnsure) != 0;
      float last = 0.0F;
      if (!unsure && draw(token, last)) {
        ++drawn;
        continue;
      }
      // A scan needs a limit that is no rounding error.
      constexpr float kLeast = 1e-30F;
      if (args.second || !(last > kLeast)) {
        if (lane == 0) {
          args.unsettled[atomicAdd(args.unsettled_count, 1)] =
              make_int2(static_cast<int>(graph), own.token[token]);
        }
        continue;
      }
      if (lane == 0) {
        args.left[place] = 1;
        const int all = atomicAdd(args.left_count, 1);
        constexpr float kBelow = 0.99F;
        if (all < kMostScans) {
          args.scans[all] = {.graph = static_cast<std::int32_t>(graph),
                             .at = static_cast<std::int32_t>(place - graph * args.most),
                             .limit = kBelow * last,
                             .found = 0,
                             .done = 0};
        }
      }
      for (int head = lane; head < layer.group; head += 32) {
        args.references[place * layer.group + head] =
            own.reference[token % 4 * kColumnStride + token / 4 * kGroup + head];
      }
    }
    if (lane == 0 && drawn > 0) {
      atomicAdd(&layer.statistics->rows_written, static_cast<unsigned long long>(drawn));
    }
    if (lane == 0 && nonfinite > 0) {
      atomicAdd(&layer.statistics->rows_nonfinite, static_cast<unsigned long long>(nonfinite));
    }
  }

  __device__ void run() {
    start_tokens();
    load_queries();
    publish_to_products();
    warpgroup_sync(name);
    start_tokens();  // once more: queries may have turned out to be no numbers

    Accumulator acc;
    const bool sampled = !args.second;
    int step = 0;
    if (sampled) {
#pragma unroll
      for (int x = 0; x < kThreadColumns; ++x) {
        reference[x] = kNothing;
        sum[x] = 0.0F;
      }
      for (; step < order.samples + order.head; ++step) {
        if (step == order.samples && order.samples > 0) {
          const float all = static_cast<float>(order.middle) / static_cast<float>(order.samples);
#pragma unroll
          for (int x = 0; x < kThreadColumns; ++x) sum[x] *= all;
        }
        start_scores(acc, true);
        finish_product(acc);
        finish_scores(acc, order.block(step, sampled, cursor));
        sample(acc);
      }
      finish_sample();
    } else {
      load_references();
    }
    clear_sums();
    warpgroup_sync(name);
    reload();
#pragma unroll
    for (int x = 0; x < kThreadColumns; ++x) sum[x] = 0.0F;

    const int trigger = args.keep_high + (args.entries - args.keep_high) / 8;
    start_scores(acc, true);
    finish_product(acc);
    for (int i = 0; i < order.blocks; ++i, ++step) {
      const int block_index = order.block(step, sampled, cursor);
      const KeyMasks masks = finish_scores(acc, block_index);
      float values[kThreadTokens][2];
      add_values(acc, values);
      // The next product runs while lists are filled.
      start_scores(acc, i + 1 < order.blocks);
      // Lists are cut while the next block hardly overflows them; before there are bounds, it may
      // be listed as a whole.
      const int room = args.entries - (i == 0 ? kTileRows : kTurnKeys);
      const int full = list_values(values, masks, block_index, room);
      finish_product(acc);
      const bool in_head = i < order.head;
      const int done = in_head ? 0 : i + 1 - order.head;
      if (warpgroup_any(name, full != 0)) {
        const bool overflow = warpgroup_any(name, (full & kOverflow) != 0);
        refresh(in_head, done, sampled && done > 0 && done >= order.samples,
                overflow ? block_index : -1, trigger, args.keep_low, args.keep_high);
        if (overflow) list_in_turns(values, masks, block_index, trigger);
      }
      const bool head_ends = sampled && i + 1 == order.head;
      const bool all_seen = i + 1 == order.blocks;
      if (!head_ends && !all_seen) continue;
      refresh(in_head, done, sampled && all_seen, -1, all_seen ? args.rank_high : kMostEntries,
              all_seen ? args.rank_low : args.keep_low, all_seen ? args.rank_high : args.keep_high);
    }
    finish();
  }
};

template <class T, int kGroup>
__device__ void feed_keys(const LayerView& layer, const RowTilesArgs& args,
                          TileMemory::Block& block, std::uint32_t keys, std::int64_t b,
                          std::int64_t g, const BlockOrder& order) {
  const int thread = static_cast<int>(threadIdx.x);
  const T* const from = static_cast<const T*>(args.keys.data) + b * args.keys.sequence_stride +
                        g * args.keys.head_stride;
  const KeyMasks* const masks = args.masks + (b * layer.heads + g) * args.blocks;
  const int chunks = layer.head_dim / 8;
  const int steps = order.steps(!args.second);
  // Copies under way while the next are issued; what waits for its announcement must leave the
  // consumers a stage.
  const int lag = args.stages > 3 ? 2 : args.stages - 2;
  const std::int64_t length = static_cast<std::int64_t>(block.highest_slot) + 1;
  int stage = 0;
  int announced = 0;
  int cursor = 0;
  std::uint32_t parity = 1;  // all stages are empty: the phase before the first has ended
  const auto announce = [&] {
    publish_to_products();
    barrier_arrive(shared_address(&block.full[announced]));
    if (++announced == args.stages) announced = 0;
  };
  for (int step = 0; step < steps; ++step) {
    barrier_wait(shared_address(&block.empty[stage]), parity);
    const int index = order.block(step, !args.second, cursor);
    const std::uint32_t to = keys + stage * args.panels * kTileRows * kPanelBytes;
#pragma unroll
    for (int row = thread / 8; row < kTileRows; row += kWarpgroup / 8) {
      const std::int64_t slot = std::int64_t{index} * kTileRows + row;
      const bool there = slot < length;
      const T* const key = from + (there ? slot : 0) * args.keys.token_stride;
      for (int panel = 0; panel < args.panels; ++panel) {
        const int chunk = 8 * panel + thread % 8;
        copy_chunk(to + chunk_offset(kTileRows, row, chunk), key + (chunk < chunks ? chunk : 0) * 8,
                   there && chunk < chunks);
      }
    }
    if (thread == 0) copy_chunk(shared_address(&block.masks[stage]), masks + index, true);
    copies_commit();
    if (++stage == args.stages) {
      stage = 0;
      parity ^= 1U;
    }
    if (step < lag) continue;
    if (lag == 2) {
      copies_wait<2>();
    } else if (lag == 1) {
      copies_wait<1>();
    } else {
      copies_wait<0>();
    }
    announce();
  }
  copies_wait<0>();
  for (int step = max(steps - lag, 0); step < steps; ++step) announce();
}

#endif  // __CUDA_ARCH__ >= 800

/// One warpgroup copies keys, the others draw the rows of a tile of tokens each. Grid: (graphs of
/// all sequences) x tiles, the longest of a graph first.
template <class T, int kGroup>
__global__ void __launch_bounds__(kTileThreads, 1)
    row_tiles_kernel(const __grid_constant__ LayerView layer,
                     const __grid_constant__ RowTilesArgs args, std::int64_t tiles) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  using Tiles = RowTiles<T, kGroup>;
  extern __shared__ unsigned char memory[];
  if (has_fault(layer)) return;
  if (args.second && *args.left_count <= kMostScans) return;  // they are scanned
  const std::int64_t graph = blockIdx.x / tiles;
  const std::int64_t tile = tiles - 1 - blockIdx.x % tiles;
  const std::int64_t b = graph / layer.graphs;
  const std::int64_t g = graph % layer.graphs;
  const std::int32_t* const drawn = args.drawn.tokens + b * args.most;
  const std::int32_t* const again = args.again.tokens + graph * args.most;
  const std::int64_t count = args.second ? args.again.counts[graph] : args.drawn.counts[b];
  const int tokens = args.warpgroups * Tiles::kTokens;
  const std::int64_t first = tile * tokens;
  if (first >= count) return;

  const std::uint32_t start = shared_address(memory);
  unsigned char* const aligned = memory + (-start & (TileMemory::kAlignment - 1));
  const int query_bytes = args.panels * kTileColumns * kPanelBytes;
  const int key_bytes = args.panels * kTileRows * kPanelBytes;
  unsigned char* const key_tiles = aligned + args.warpgroups * query_bytes;
  auto* const lists = reinterpret_cast<uint2*>(key_tiles + args.stages * key_bytes);
  auto& block = *reinterpret_cast<TileMemory::Block*>(lists + tokens * args.entries);

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < args.stages; ++stage) {
      barrier_init(shared_address(&block.full[stage]), kWarpgroup);
      barrier_init(shared_address(&block.empty[stage]),
                   static_cast<std::uint32_t>(4 * args.warpgroups));
    }
    block.lowest_slot = 0x7fffffff;
    block.highest_slot = -1;
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < tokens; i += static_cast<int>(blockDim.x)) {
    TileMemory::Warpgroup& own = block.warpgroups[i / Tiles::kTokens];
    const int at = i % Tiles::kTokens;
    std::int32_t token = -1;
    if (first + i < count) token = drawn[args.second ? again[first + i] : first + i];
    const std::int32_t slot = token < 0 ? -1 : static_cast<std::int32_t>(args.first_slot) + token;
    own.token[at] = token;
    own.slot[at] = slot;
    own.state[at] = kTokenPlain;
    if (slot < 0) continue;
    atomicMin(&block.lowest_slot, slot);
    atomicMax(&block.highest_slot, slot);
  }
  __syncthreads();
  const BlockOrder order(block.lowest_slot, block.highest_slot, args.samples, args.sample_share);
  // The shuffle tells the compiler that a warp agrees: what follows from it goes to uniform
  // registers.
  const int role = __shfl_sync(kAllOnes, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  if (role == 0) {
    keep_few_registers();
    feed_keys<T, kGroup>(layer, args, block, shared_address(key_tiles), b, g, order);
    return;
  }
  take_many_registers();
  const int w = role - 1;
  unsigned char* const query_tile = aligned + w * query_bytes;
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  Tiles mine{.layer = layer,
             .args = args,
             .block = block,
             .own = block.warpgroups[w],
             .lists = lists + w * Tiles::kTokens * args.entries,
             .queries = shared_address(query_tile),
             .keys = shared_address(key_tiles),
             .query_tile = query_tile,
             .name = role,
             .thread = thread,
             .lane = thread % 32,
             .warp = thread / 32,
             .c = thread % 4,
             .b = b,
             .g = g,
             .first_index = first + w * Tiles::kTokens,
             .order = order,
             .rule = ScoreRule(args.scale, args.softcap),
             .stage = 0,
             .parity = 0,
             .cursor = 0,
             .reference = {},
             .sum = {},
             .bound = {}};
  mine.run();
#endif
}

}  // namespace spectralkv::cuda
