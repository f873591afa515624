// Restart weights of novelty populations: how far a key points from where the keys of its head
// point on average.
//
// Tokens of a phrase share their weights: each gets the mean over the tokens near it in the text.
// Where those lie is looked up in a hash table of positions, because slots need not follow the
// text.
//
// Each head's slots are cut into as many parts as the capacity asks for, whatever runs beside; the
// parts' sums are added in the order of the parts. So the same keys give the same bits.
#include <algorithm>
#include <cstdint>

#include "cuda/cuda_check.h"
#include "cuda/device/attention_row.cuh"
#include "cuda/kernels.h"

namespace spectralkv::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMeanThreads = 1024;
/// The weight of the most novel token.
constexpr double kUnit = 0x1p20;
/// Slots that a warp's team looks at together.
constexpr int kRows = 8;
/// Slots of a part: at most, and at least while there are too few parts to fill the device.
constexpr std::int64_t kMostSlots = 1024;
constexpr std::int64_t kLeastSlots = 128;
constexpr std::int64_t kWantedBlocks = 528;
/// Slots that a block gives weights to.
constexpr int kWeightSlots = 1024;

/// What the distances of a part, or of a head, sum to.
struct Moments {
  double count = 0.0;
  double sum = 0.0;
  double squares = 0.0;

  __device__ void add(float distance) {
    const auto exact = static_cast<double>(distance);
    add({.count = 1.0, .sum = exact, .squares = exact * exact});
  }
  __device__ void add(const Moments& other) {
    count += other.count;
    sum += other.sum;
    squares += other.squares;
  }
};

struct Scratch {
  Moments* moments;      ///< (B, Hkv, splits)
  double* highest;       ///< (B, G, blocks of kWeightSlots)
  float* inverse_norms;  ///< (B, Hkv, capacity), -1: left out
  float* distances;      ///< (B, Hkv, capacity)
  float* sums;           ///< (B, Hkv, splits, D)
  float* directions;     ///< (B, Hkv, D)
  std::uint32_t* own;    ///< (B, G, capacity): weights before they are shared; null: nothing is
  std::int32_t*
      places;  ///< (B, G, 1 << place_bits): slots by the hash of their positions, -1: free
  std::int32_t place_bits;
  std::int32_t splits;
  std::int32_t blocks;
  std::int64_t floats;  ///< of all of it
};

Scratch scratch_of(const LayerView& layer, std::int64_t width, float* memory) {
  const std::int64_t heads = std::int64_t{layer.batch} * layer.heads;
  const std::int64_t graphs = std::int64_t{layer.batch} * layer.graphs;
  const auto parts_of = [&](std::int64_t slots) {
    return std::max<std::int64_t>((layer.capacity + slots - 1) / slots, 1);
  };
  const std::int64_t wanted = (kWantedBlocks + heads - 1) / std::max<std::int64_t>(heads, 1);
  Scratch scratch{};
  scratch.splits = static_cast<std::int32_t>(
      std::max(parts_of(kMostSlots), std::min(parts_of(kLeastSlots), wanted)));
  scratch.blocks = static_cast<std::int32_t>(parts_of(kWeightSlots));
  const auto take = [&](std::int64_t floats) {
    float* const start = memory + scratch.floats;
    scratch.floats += (floats + 3) / 4 * 4;
    return start;
  };
  constexpr std::int64_t kMoments = sizeof(Moments) / sizeof(float);
  scratch.moments = reinterpret_cast<Moments*>(take(heads * scratch.splits * kMoments));
  scratch.highest = reinterpret_cast<double*>(take(graphs * scratch.blocks * 2));
  scratch.inverse_norms = take(heads * layer.capacity);
  scratch.distances = take(heads * layer.capacity);
  scratch.sums = take(heads * scratch.splits * layer.head_dim);
  scratch.directions = take(heads * layer.head_dim);
  if (width > 1) {
    scratch.own = reinterpret_cast<std::uint32_t*>(take(graphs * layer.capacity));
    // At most half full, so that a search ends soon.
    while ((std::int64_t{1} << scratch.place_bits) < 2 * layer.capacity) ++scratch.place_bits;
    scratch.places = reinterpret_cast<std::int32_t*>(take(graphs << scratch.place_bits));
  }
  return scratch;
}

/// Combines over a block; thread 0 gets the result, in one order.
template <class T, int kCount, class Combine>
__device__ T block_reduce(T value, T (&shared)[kCount], Combine combine) {
  const auto exchange = [&](int offset) {
    T other;
    const auto* from = reinterpret_cast<const double*>(&value);
    auto* to = reinterpret_cast<double*>(&other);
    for (int i = 0; i < static_cast<int>(sizeof(T) / sizeof(double)); ++i) {
      to[i] = __shfl_xor_sync(0xffffffffU, from[i], offset);
    }
    return other;
  };
  for (int offset = 16; offset > 0; offset /= 2) value = combine(value, exchange(offset));
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  for (int w = 1; w < kCount; ++w) value = combine(value, shared[w]);
  return value;
}

/// Of a block, by all its threads.
__device__ void store_moments(const Scratch& scratch, const Moments& mine) {
  __shared__ Moments shared[kWarps];
  __syncwarp();
  const Moments sum = block_reduce(mine, shared, [](Moments x, const Moments& y) {
    x.add(y);
    return x;
  });
  if (threadIdx.x == 0) scratch.moments[blockIdx.x] = sum;
}

/// 1 / |k| of a key, 0 of a zero key, -1 of one that is left out.
__device__ inline float inverse_norm(float norm2, std::int32_t position) {
  const float inverse = norm2 > 0.0F ? 1.0F / sqrtf(norm2) : 0.0F;
  return position >= 0 && norm2 < INFINITY && inverse < INFINITY ? inverse : -1.0F;
}

/// How a warp reads keys: kTeam lanes a key, kVector elements at a time. A slice is what the lanes
/// of a team hold of a key in registers.
template <class Element, int kVectorElements, int kTeamLanes, int kChunksOfSlice>
struct Reader {
  using T = Element;
  static constexpr int kVector = kVectorElements;
  static constexpr int kTeam = kTeamLanes;
  static constexpr int kChunks = kChunksOfSlice;
  static constexpr int kWidth = kVector * kTeam * kChunks;  ///< of a slice
  static constexpr int kHeld = kVector * kChunks;           ///< columns of a lane
  static constexpr int kTeams = 32 / kTeam;
  static constexpr int kBatch = kRows * kTeams;  ///< slots that a warp reads together
  /// Whether registers suffice to read the next batch ahead.
  static constexpr bool kAhead = kVector > 1 && kChunks == 1;

  struct alignas(sizeof(T) * kVector) Vector {
    T values[kVector];
  };

  __device__ static int column(int member, int i) {
    return (i / kVector * kTeam + member) * kVector + i % kVector;
  }

  /// What a lane holds of kRows slots.
  struct Slice {
    Vector words[kRows][kChunks];

    __device__ float operator()(int row, int i) const {
      return as_float(words[row][i / kVector].values[i % kVector]);
    }
  };

  /// Columns [base, base + kWidth) of the slots of a batch, 0 where there is none.
  __device__ static void load(const TokensView& keys, const T* key_of_head, int first, int end,
                              int base, int dim, Slice& slice) {
    const int member = static_cast<int>(threadIdx.x) % kTeam;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const T* const key = key_of_head + min(first + r, end - 1) * keys.token_stride;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int at = base + (c * kTeam + member) * kVector;
        slice.words[r][c] = at < dim ? *reinterpret_cast<const Vector*>(key + at) : Vector{};
      }
    }
  }

  /// Row whose sum a lane gets from `sum_rows`.
  __device__ static int row_of_member(int member) { return member / (kTeam / kRows); }

  /// What the lane has that gets the sum of a row.
  template <class Value>
  __device__ static Value of_row(Value value, int row) {
    return __shfl_sync(0xffffffffU, value, row * (kTeam / kRows), kTeam);
  }

  /// Sums each row over the lanes of a team.
  __device__ static float sum_rows(float (&rows)[kRows]) {
    const int member = static_cast<int>(threadIdx.x) % kTeam;
    int offset = kTeam / 2;
#pragma unroll
    for (int kept = kRows / 2; kept > 0; kept /= 2) {
      const bool upper = (member & offset) != 0;
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) {
        if (i >= kept) break;
        const float given = upper ? rows[i] : rows[i + kept];
        const float held = upper ? rows[i + kept] : rows[i];
        rows[i] = held + __shfl_xor_sync(0xffffffffU, given, offset, kTeam);
      }
      offset /= 2;
    }
    float sum = rows[0];
#pragma unroll
    for (; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffU, sum, offset, kTeam);
    return sum;
  }
};

/// Keys as they lie.
template <class Reader>
struct Plain {
  using R = Reader;
  static constexpr bool kReadsPositions = false;
  static constexpr int kBlocks = 2;  ///< of a multiprocessor, at least

  __device__ Plain(const RotaryView& /*rotary*/, int /*member*/) {}
  __device__ void take(const typename Reader::Slice& values, int row, std::int32_t /*position*/,
                       float (&out)[Reader::kHeld]) const {
#pragma unroll
    for (int i = 0; i < Reader::kHeld; ++i) out[i] = values(row, i);
  }
};

/// Keys that were turned, element i with the one half a key behind it, turned back. A slice of the
/// reader is a whole key in two chunks, so a lane holds both elements of its pairs.
template <class Reader>
struct Unturned {
  using R = Reader;
  static constexpr bool kReadsPositions = true;
  /// Keys of four bytes leave no registers for a second one.
  static constexpr int kBlocks = sizeof(typename Reader::T) == 2 ? 2 : 1;
  static_assert(Reader::kChunks == 2);

  std::uint64_t steps[Reader::kVector];  ///< of a position, in units of 2^-64 revolutions

  __device__ Unturned(const RotaryView& rotary, int member) {
#pragma unroll
    for (int i = 0; i < Reader::kVector; ++i) {
      const double revolutions = rotary.revolutions[Reader::column(member, i)];
      steps[i] = __double2ull_rn((revolutions - floor(revolutions)) * 0x1p64);
    }
  }
  __device__ void take(const typename Reader::Slice& values, int row, std::int32_t position,
                       float (&out)[Reader::kHeld]) const {
    constexpr float kRadians = 6.28318530717958647692F / 0x1p32F;
#pragma unroll
    for (int i = 0; i < Reader::kVector; ++i) {
      // Whole revolutions fall off at the upper end; what is left lies in [-pi, pi), where the
      // quick sine and cosine are off by less than 2^-21.
      const std::uint64_t turn = static_cast<std::uint32_t>(position) * steps[i];
      const float angle = static_cast<float>(static_cast<std::int32_t>(turn >> 32U)) * kRadians;
      const float sine = __sinf(angle);
      const float cosine = __cosf(angle);
      const float x = values(row, i);
      const float y = values(row, i + Reader::kVector);
      out[i] = x * cosine + y * sine;
      out[i + Reader::kVector] = y * cosine - x * sine;
    }
  }
};

/// The slots of a block of (B, Hkv, splits).
struct Part {
  std::int64_t head;  ///< of all sequences
  std::int64_t b;
  std::int64_t h;
  int begin;
  int end;

  __device__ Part(const LayerView& layer, int splits) {
    head = blockIdx.x / static_cast<unsigned>(splits);
    b = head / layer.heads;
    h = head % layer.heads;
    const int length = static_cast<int>(length_of(layer, h / layer.heads_per_graph));
    const int slots = (length + splits - 1) / splits;
    begin = min(static_cast<int>(blockIdx.x % static_cast<unsigned>(splits)) * slots, length);
    end = min(begin + slots, length);
  }
};

/// Inverse norms, and the sum of a part's directions.
template <class Way>
__global__ void __launch_bounds__(kThreads, Way::kBlocks)
    directions_kernel(LayerView layer, TokensView keys, RotaryView rotary, Scratch scratch) {
  using Reader = typename Way::R;
  using T = typename Reader::T;
  __shared__ float team_sums[kWarps * Reader::kTeams][Reader::kWidth];
  if (has_fault(layer)) return;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int team = lane / Reader::kTeam;
  const int member = lane % Reader::kTeam;
  const Part part(layer, scratch.splits);
  const int dim = layer.head_dim;
  const std::int32_t* const positions = positions_of(layer, part.b, part.h / layer.heads_per_graph);
  const T* const key_of_head = key_at<T>(keys, part.b, part.h, 0);
  float* const inverse_norms = scratch.inverse_norms + part.head * layer.capacity;
  const Way way(rotary, member);
  constexpr int kStep = kWarps * Reader::kBatch;
  const int first_of_team = part.begin + warp * Reader::kBatch + team * kRows;
  for (int base = 0; base < dim; base += Reader::kWidth) {
    float sums[Reader::kHeld] = {};
    typename Reader::Slice next;
    if (Reader::kAhead && part.begin < part.end) {
      Reader::load(keys, key_of_head, first_of_team, part.end, base, dim, next);
    }
    for (int first = first_of_team; first - team * kRows < part.end; first += kStep) {
      if (!Reader::kAhead) Reader::load(keys, key_of_head, first, part.end, base, dim, next);
      const typename Reader::Slice values = next;
      if (Reader::kAhead && first - team * kRows + kStep < part.end) {
        Reader::load(keys, key_of_head, first + kStep, part.end, base, dim, next);
      }
      const int slot = first + Reader::row_of_member(member);
      const std::int32_t position = positions[min(slot, part.end - 1)];
      float inverse = -1.0F;
      if (base == 0) {
        float squares[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          squares[r] = 0.0F;
#pragma unroll
          for (int i = 0; i < Reader::kHeld; ++i) {
            squares[r] = fmaf(values(r, i), values(r, i), squares[r]);
          }
        }
        for (int behind = Reader::kWidth; behind < dim; behind += Reader::kWidth) {
          typename Reader::Slice more;
          Reader::load(keys, key_of_head, first, part.end, behind, dim, more);
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
#pragma unroll
            for (int i = 0; i < Reader::kHeld; ++i) {
              squares[r] = fmaf(more(r, i), more(r, i), squares[r]);
            }
          }
        }
        const float norm2 = Reader::sum_rows(squares);
        if (slot < part.end) {
          inverse = inverse_norm(norm2, position);
          if (member % (Reader::kTeam / kRows) == 0) inverse_norms[slot] = inverse;
        }
      } else if (slot < part.end) {
        inverse = inverse_norms[slot];
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float scale = Reader::of_row(inverse, r);
        const std::int32_t place = Way::kReadsPositions ? Reader::of_row(position, r) : 0;
        if (scale < 0.0F) continue;
        float row[Reader::kHeld];
        way.take(values, r, place, row);
#pragma unroll
        for (int i = 0; i < Reader::kHeld; ++i) sums[i] = fmaf(row[i], scale, sums[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < Reader::kHeld; ++i) {
      team_sums[warp * Reader::kTeams + team][Reader::column(member, i)] = sums[i];
    }
    __syncthreads();
    for (int d = static_cast<int>(threadIdx.x); d < Reader::kWidth && base + d < dim;
         d += kThreads) {
      float sum = 0.0F;
      for (int t = 0; t < kWarps * Reader::kTeams; ++t) sum += team_sums[t][d];
      scratch.sums[std::int64_t{blockIdx.x} * dim + base + d] = sum;
    }
    __syncthreads();
  }
}

/// Pairs of elements that a lane holds of a key.
constexpr int kPairs = 4;

/// A warp's view of keys that were turned by their positions: lane l has the pairs l, l + 32, ...
/// of a slice. Behind the pairs that were turned come those that were not, also two by two.
template <class T>
struct TurnedKeys {
  static constexpr int kSlice = 32 * kPairs;  ///< pairs

  RotaryView rotary;
  int dim;

  __device__ int pairs() const { return rotary.pairs + (dim - 2 * rotary.pairs + 1) / 2; }
  __device__ int first(int pair) const {
    if (pair >= rotary.pairs) return 2 * pair;
    return rotary.interleaved ? 2 * pair : pair;
  }
  __device__ int second(int pair) const {
    if (pair >= rotary.pairs) return 2 * pair + 1;
    return rotary.interleaved ? 2 * pair + 1 : pair + rotary.pairs;
  }

  /// Elements of a key as they lie; zeros behind its end.
  __device__ void load(const T* key, int base, float (&values)[kPairs][2]) const {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int pair = base + i * 32 + static_cast<int>(threadIdx.x) % 32;
      const bool there = pair < pairs();
      values[i][0] = there ? as_float(key[first(pair)]) : 0.0F;
      values[i][1] = there && second(pair) < dim ? as_float(key[second(pair)]) : 0.0F;
    }
  }
  /// Turns them back.
  __device__ void unturn(std::int32_t position, int base, float (&values)[kPairs][2]) const {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int pair = base + i * 32 + static_cast<int>(threadIdx.x) % 32;
      if (pair >= rotary.pairs) break;
      double turn = position * rotary.revolutions[pair];
      turn -= floor(turn);
      float sine = 0.0F;
      float cosine = 0.0F;
      sincospif(2.0F * static_cast<float>(turn), &sine, &cosine);
      const float x = values[i][0];
      values[i][0] = x * cosine + values[i][1] * sine;
      values[i][1] = values[i][1] * cosine - x * sine;
    }
  }
};

__device__ inline float warp_sum(float value) {
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffU, value, offset);
  }
  return value;
}

/// directions_kernel of keys that are turned back. One warp a key.
template <class T>
__global__ void __launch_bounds__(kThreads)
    turned_directions_kernel(LayerView layer, TokensView keys, RotaryView rotary, Scratch scratch) {
  using Keys = TurnedKeys<T>;
  __shared__ float warp_sums[kWarps][2 * Keys::kSlice];
  if (has_fault(layer)) return;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const Part part(layer, scratch.splits);
  const Keys turned{.rotary = rotary, .dim = layer.head_dim};
  const std::int32_t* const positions = positions_of(layer, part.b, part.h / layer.heads_per_graph);
  const T* const key_of_head = key_at<T>(keys, part.b, part.h, 0);
  float* const inverse_norms = scratch.inverse_norms + part.head * layer.capacity;
  float* const out = scratch.sums + std::int64_t{blockIdx.x} * layer.head_dim;
  for (int base = 0; base < turned.pairs(); base += Keys::kSlice) {
    float sums[kPairs][2] = {};
#pragma unroll 2
    for (int slot = part.begin + warp; slot < part.end; slot += kWarps) {
      const T* const key = key_of_head + slot * keys.token_stride;
      float values[kPairs][2];
      turned.load(key, base, values);
      float inverse = -1.0F;
      if (base == 0) {
        float squares = 0.0F;
        const auto add_squares = [&](const float (&of)[kPairs][2]) {
#pragma unroll
          for (int i = 0; i < kPairs; ++i) {
            squares = fmaf(of[i][0], of[i][0], fmaf(of[i][1], of[i][1], squares));
          }
        };
        add_squares(values);
        for (int behind = Keys::kSlice; behind < turned.pairs(); behind += Keys::kSlice) {
          float more[kPairs][2];
          turned.load(key, behind, more);
          add_squares(more);
        }
        const float norm2 = warp_sum(squares);
        inverse = inverse_norm(norm2, positions[slot]);
        if (lane == 0) inverse_norms[slot] = inverse;
      } else {
        inverse = inverse_norms[slot];
      }
      if (inverse < 0.0F) continue;
      turned.unturn(positions[slot], base, values);
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        sums[i][0] = fmaf(values[i][0], inverse, sums[i][0]);
        sums[i][1] = fmaf(values[i][1], inverse, sums[i][1]);
      }
    }
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      warp_sums[warp][2 * (i * 32 + lane)] = sums[i][0];
      warp_sums[warp][2 * (i * 32 + lane) + 1] = sums[i][1];
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < 2 * Keys::kSlice; i += kThreads) {
      const int pair = base + i / 2;
      if (pair >= turned.pairs()) break;
      const int d = i % 2 == 0 ? turned.first(pair) : turned.second(pair);
      float sum = 0.0F;
      for (int w = 0; w < kWarps; ++w) sum += warp_sums[w][i];
      if (d < layer.head_dim) out[d] = sum;
    }
    // The norms of a slice's keys are there for the next one, too.
    __syncthreads();
  }
}

/// One block a head: its mean direction, of length 1 or 0.
__global__ void __launch_bounds__(kMeanThreads) mean_kernel(LayerView layer, Scratch scratch) {
  __shared__ float partial[kMeanThreads];
  __shared__ double shared[kMeanThreads / 32];
  __shared__ float inverse;
  if (has_fault(layer)) return;
  const int thread = static_cast<int>(threadIdx.x);
  const int dim = layer.head_dim;
  const float* const sums = scratch.sums + std::int64_t{blockIdx.x} * scratch.splits * dim;
  float* const direction = scratch.directions + std::int64_t{blockIdx.x} * dim;
  // Groups of threads, one thread a column, share the parts.
  const int width = min(dim, kMeanThreads);
  const int groups = kMeanThreads / width;
  const int group = thread / width;
  const int each = (scratch.splits + groups - 1) / groups;
  double norm2 = 0.0;
  for (int base = 0; base < dim; base += width) {
    const int d = base + thread % width;
    float sum = 0.0F;
    if (group < groups && d < dim) {
      const int end = min((group + 1) * each, scratch.splits);
#pragma unroll 4
      for (int split = group * each; split < end; ++split) {
        sum += sums[std::int64_t{split} * dim + d];
      }
    }
    partial[thread] = sum;
    __syncthreads();
    if (group == 0 && d < dim) {
      for (int i = 1; i < groups; ++i) sum += partial[i * width + thread];
      direction[d] = sum;
      norm2 += static_cast<double>(sum) * sum;
    }
    __syncthreads();
  }
  norm2 = block_reduce(norm2, shared, [](double x, double y) { return x + y; });
  if (thread == 0) inverse = norm2 > 0.0 ? static_cast<float>(1.0 / sqrt(norm2)) : 0.0F;
  __syncthreads();
  if (group != 0) return;
  for (int d = thread; d < dim; d += width) direction[d] *= inverse;
}

template <class Way>
__global__ void __launch_bounds__(kThreads, Way::kBlocks)
    distances_kernel(LayerView layer, TokensView keys, RotaryView rotary, Scratch scratch) {
  using Reader = typename Way::R;
  using T = typename Reader::T;
  if (has_fault(layer)) return;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int team = lane / Reader::kTeam;
  const int member = lane % Reader::kTeam;
  const Part part(layer, scratch.splits);
  const int dim = layer.head_dim;
  const std::int32_t* const positions = positions_of(layer, part.b, part.h / layer.heads_per_graph);
  const T* const key_of_head = key_at<T>(keys, part.b, part.h, 0);
  const float* const inverse_norms = scratch.inverse_norms + part.head * layer.capacity;
  const float* const directions = scratch.directions + part.head * dim;
  float* const distances = scratch.distances + part.head * layer.capacity;
  const Way way(rotary, member);
  float direction[Reader::kHeld];
  const auto load_direction = [&](int base) {
#pragma unroll
    for (int i = 0; i < Reader::kHeld; ++i) {
      const int d = base + Reader::column(member, i);
      direction[i] = d < dim ? directions[d] : 0.0F;
    }
  };
  load_direction(0);
  Moments moments;
  constexpr int kStep = kWarps * Reader::kBatch;
  const int first_of_team = part.begin + warp * Reader::kBatch + team * kRows;
  typename Reader::Slice next;
  if (Reader::kAhead && part.begin < part.end) {
    Reader::load(keys, key_of_head, first_of_team, part.end, 0, dim, next);
  }
  for (int first = first_of_team; first - team * kRows < part.end; first += kStep) {
    const int slot = first + Reader::row_of_member(member);
    const std::int32_t position = Way::kReadsPositions ? positions[min(slot, part.end - 1)] : 0;
    float dots[kRows] = {};
    const auto add_slice = [&](const typename Reader::Slice& values) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const std::int32_t place = Way::kReadsPositions ? Reader::of_row(position, r) : 0;
        float row[Reader::kHeld];
        way.take(values, r, place, row);
#pragma unroll
        for (int i = 0; i < Reader::kHeld; ++i) dots[r] = fmaf(row[i], direction[i], dots[r]);
      }
    };
    if (!Reader::kAhead) Reader::load(keys, key_of_head, first, part.end, 0, dim, next);
    const typename Reader::Slice values = next;
    if (Reader::kAhead && first - team * kRows + kStep < part.end) {
      Reader::load(keys, key_of_head, first + kStep, part.end, 0, dim, next);
    }
    add_slice(values);
    if (dim > Reader::kWidth) {
      for (int base = Reader::kWidth; base < dim; base += Reader::kWidth) {
        typename Reader::Slice more;
        Reader::load(keys, key_of_head, first, part.end, base, dim, more);
        load_direction(base);
        add_slice(more);
      }
      load_direction(0);
    }
    const float dot = Reader::sum_rows(dots);
    if (slot >= part.end || member % (Reader::kTeam / kRows) != 0) continue;
    const float inverse = inverse_norms[slot];
    if (inverse < 0.0F) continue;
    const float distance = -dot * inverse;
    distances[slot] = distance;
    moments.add(distance);
  }
  store_moments(scratch, moments);
}

/// distances_kernel of keys that are turned back. One warp a key.
template <class T>
__global__ void __launch_bounds__(kThreads)
    turned_distances_kernel(LayerView layer, TokensView keys, RotaryView rotary, Scratch scratch) {
  using Keys = TurnedKeys<T>;
  if (has_fault(layer)) return;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const Part part(layer, scratch.splits);
  const Keys turned{.rotary = rotary, .dim = layer.head_dim};
  const std::int32_t* const positions = positions_of(layer, part.b, part.h / layer.heads_per_graph);
  const T* const key_of_head = key_at<T>(keys, part.b, part.h, 0);
  const float* const inverse_norms = scratch.inverse_norms + part.head * layer.capacity;
  const float* const directions = scratch.directions + part.head * layer.head_dim;
  float* const distances = scratch.distances + part.head * layer.capacity;
  Moments moments;
#pragma unroll 2
  for (int slot = part.begin + warp; slot < part.end; slot += kWarps) {
    const float inverse = inverse_norms[slot];
    if (inverse < 0.0F) continue;
    float dot = 0.0F;
    for (int base = 0; base < turned.pairs(); base += Keys::kSlice) {
      float values[kPairs][2];
      turned.load(key_of_head + slot * keys.token_stride, base, values);
      turned.unturn(positions[slot], base, values);
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const int pair = base + i * 32 + lane;
        if (pair >= turned.pairs()) break;
        dot = fmaf(values[i][0], directions[turned.first(pair)], dot);
        if (turned.second(pair) < layer.head_dim) {
          dot = fmaf(values[i][1], directions[turned.second(pair)], dot);
        }
      }
    }
    const float distance = -warp_sum(dot) * inverse;
    if (lane != 0) continue;
    distances[slot] = distance;
    moments.add(distance);
  }
  store_moments(scratch, moments);
}

/// What turns the distances of a head into z-scores; scale 0: they are all alike.
struct Standard {
  double average;
  double scale;
};

/// By one warp.
__device__ Standard standard_of(const Scratch& scratch, std::int64_t head) {
  const Moments* const moments = scratch.moments + head * scratch.splits;
  Moments sum;
#pragma unroll 4
  for (int split = static_cast<int>(threadIdx.x) % 32; split < scratch.splits; split += 32) {
    sum.add(moments[split]);
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    sum.add({.count = __shfl_xor_sync(0xffffffffU, sum.count, offset),
             .sum = __shfl_xor_sync(0xffffffffU, sum.sum, offset),
             .squares = __shfl_xor_sync(0xffffffffU, sum.squares, offset)});
  }
  const double average = sum.count > 0.0 ? sum.sum / sum.count : 0.0;
  const double squares = fmax(sum.squares - sum.sum * average, 0.0);
  const double deviation = sum.count > 1.0 ? sqrt(squares / (sum.count - 1.0)) : 0.0;
  return {.average = average, .scale = deviation > 1e-6 ? 1.0 / deviation : 0.0};
}

/// Calls `use(slot, z)` for the slots of a block of (B, G, blocks), where z is the sum of the
/// z-scores of a token that may be restarted at, -inf for others.
template <class Use>
__device__ void for_each_z_score(const LayerView& layer, const Scratch& scratch, std::int64_t graph,
                                 int block, Use&& use) {
  __shared__ Standard standards[32];
  const std::int64_t b = graph / layer.graphs;
  const std::int64_t g = graph % layer.graphs;
  const std::int64_t first_head = b * layer.heads + g * layer.heads_per_graph;
  const int length = static_cast<int>(length_of(layer, g));
  const std::int32_t* const positions = positions_of(layer, b, g);
  constexpr int kEach = kWeightSlots / kThreads;
  double z[kEach] = {};
  for (int head = 0; head < layer.heads_per_graph; head += 32) {
    const int heads = min(layer.heads_per_graph - head, 32);
    __syncthreads();
    for (int h = static_cast<int>(threadIdx.x) / 32; h < heads; h += kWarps) {
      const Standard standard = standard_of(scratch, first_head + head + h);
      if (threadIdx.x % 32 == 0) standards[h] = standard;
    }
    __syncthreads();
    for (int h = 0; h < heads; ++h) {
      const std::int64_t at = (first_head + head + h) * layer.capacity;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int j = block * kWeightSlots + i * kThreads + static_cast<int>(threadIdx.x);
        if (j >= length) continue;
        if (scratch.inverse_norms[at + j] < 0.0F) {
          z[i] = -INFINITY;
        } else {
          z[i] += (static_cast<double>(scratch.distances[at + j]) - standards[h].average) *
                  standards[h].scale;
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int j = block * kWeightSlots + i * kThreads + static_cast<int>(threadIdx.x);
    if (j < length) use(j, positions[j] >= layer.num_sinks ? z[i] : -INFINITY);
  }
}

/// Where the search for a position begins. Runs of positions are what there is most: they spread
/// out.
__device__ std::uint32_t first_place(std::int32_t position, int bits) {
  return static_cast<std::uint32_t>(position) * 2654435769U >> (32 - bits);
}

__device__ void note_place(std::int32_t* places, int bits, std::int32_t position, int slot) {
  const std::uint32_t last = (1U << bits) - 1U;
  std::uint32_t place = first_place(position, bits);
  while (atomicCAS(places + place, -1, slot) != -1) place = (place + 1) & last;
}

/// The slot of a token that may be restarted at, -1 if there is none at that position.
__device__ int slot_at(const std::int32_t* places, int bits, const std::int32_t* positions,
                       std::int32_t position) {
  const std::uint32_t last = (1U << bits) - 1U;
  for (std::uint32_t place = first_place(position, bits);; place = (place + 1) & last) {
    const std::int32_t slot = places[place];
    if (slot < 0 || positions[slot] == position) return slot;
  }
}

__global__ void __launch_bounds__(kThreads) highest_kernel(LayerView layer, Scratch scratch) {
  __shared__ double shared[kWarps];
  if (has_fault(layer)) return;
  const auto blocks = static_cast<unsigned>(scratch.blocks);
  const std::int64_t graph = blockIdx.x / blocks;
  const std::int32_t* const positions =
      positions_of(layer, graph / layer.graphs, graph % layer.graphs);
  double highest = -INFINITY;
  for_each_z_score(layer, scratch, graph, static_cast<int>(blockIdx.x % blocks),
                   [&](int slot, double z) {
                     highest = fmax(highest, z);
                     if (scratch.places == nullptr || !isfinite(z)) return;
                     note_place(scratch.places + (graph << scratch.place_bits), scratch.place_bits,
                                positions[slot], slot);
                   });
  highest = block_reduce(highest, shared, [](double x, double y) { return fmax(x, y); });
  if (threadIdx.x == 0) scratch.highest[blockIdx.x] = highest;
}

__global__ void __launch_bounds__(kThreads) weights_kernel(LayerView layer, Scratch scratch) {
  __shared__ double shared[kWarps];
  if (has_fault(layer)) return;
  const auto blocks = static_cast<unsigned>(scratch.blocks);
  const std::int64_t graph = blockIdx.x / blocks;
  double highest = -INFINITY;
  for (int i = static_cast<int>(threadIdx.x); i < scratch.blocks; i += kThreads) {
    highest = fmax(highest, scratch.highest[graph * scratch.blocks + i]);
  }
  const auto larger = [](double x, double y) { return fmax(x, y); };
  highest = block_reduce(highest, shared, larger);
  if (threadIdx.x == 0) shared[0] = highest;
  __syncthreads();
  highest = shared[0];
  std::uint32_t* const weights =
      scratch.own != nullptr ? scratch.own + graph * layer.capacity
                             : novelty_of(layer, graph / layer.graphs, graph % layer.graphs);
  const auto heads = static_cast<double>(layer.heads_per_graph);
  for_each_z_score(
      layer, scratch, graph, static_cast<int>(blockIdx.x % blocks), [&](int j, double z) {
        weights[j] = isfinite(z)
                         ? static_cast<std::uint32_t>(llrint(kUnit * exp((z - highest) / heads)))
                         : 0U;
      });
}

/// The mean weight of the tokens that lie at most `reach` positions from a token and may be
/// restarted at.
__global__ void __launch_bounds__(kThreads)
    share_weights_kernel(LayerView layer, Scratch scratch, std::int32_t reach) {
  if (has_fault(layer)) return;
  const auto blocks = static_cast<unsigned>(scratch.blocks);
  const std::int64_t graph = blockIdx.x / blocks;
  const int block = static_cast<int>(blockIdx.x % blocks);
  const std::int64_t b = graph / layer.graphs;
  const std::int64_t g = graph % layer.graphs;
  const std::int32_t* const positions = positions_of(layer, b, g);
  const std::uint32_t* const own = scratch.own + graph * layer.capacity;
  const std::int32_t* const places = scratch.places + (graph << scratch.place_bits);
  std::uint32_t* const weights = novelty_of(layer, b, g);
  const int end = min((block + 1) * kWeightSlots, static_cast<int>(length_of(layer, g)));
  for (int j = block * kWeightSlots + static_cast<int>(threadIdx.x); j < end; j += kThreads) {
    const std::int32_t position = positions[j];
    std::uint64_t sum = 0;
    std::uint32_t count = 0;
    // A token that is not at its own place may not be restarted at.
    if (position >= 0 && slot_at(places, scratch.place_bits, positions, position) == j) {
      for (std::int32_t near = max(position - reach, 0); near <= position + reach; ++near) {
        const int slot = slot_at(places, scratch.place_bits, positions, near);
        if (slot < 0) continue;
        sum += own[slot];
        ++count;
      }
    }
    weights[j] = count == 0 ? 0U : static_cast<std::uint32_t>((sum + count / 2) / count);
  }
}

template <class Way>
void launch_way(const LayerView& layer, const TokensView& keys, const RotaryView& rotary,
                const Scratch& scratch, cudaStream_t stream) {
  const auto heads = static_cast<unsigned>(layer.batch * layer.heads);
  const unsigned parts = heads * static_cast<unsigned>(scratch.splits);
  directions_kernel<Way><<<parts, kThreads, 0, stream>>>(layer, keys, rotary, scratch);
  check(cudaGetLastError(), "directions_kernel");
  mean_kernel<<<heads, kMeanThreads, 0, stream>>>(layer, scratch);
  check(cudaGetLastError(), "mean_kernel");
  distances_kernel<Way><<<parts, kThreads, 0, stream>>>(layer, keys, rotary, scratch);
  check(cudaGetLastError(), "distances_kernel");
}

/// Any shape.
template <class T>
void launch_turned(const LayerView& layer, const TokensView& keys, const RotaryView& rotary,
                   const Scratch& scratch, cudaStream_t stream) {
  const auto heads = static_cast<unsigned>(layer.batch * layer.heads);
  const unsigned parts = heads * static_cast<unsigned>(scratch.splits);
  turned_directions_kernel<T><<<parts, kThreads, 0, stream>>>(layer, keys, rotary, scratch);
  check(cudaGetLastError(), "turned_directions_kernel");
  mean_kernel<<<heads, kMeanThreads, 0, stream>>>(layer, scratch);
  check(cudaGetLastError(), "mean_kernel");
  turned_distances_kernel<T><<<parts, kThreads, 0, stream>>>(layer, keys, rotary, scratch);
  check(cudaGetLastError(), "turned_distances_kernel");
}

template <class T>
void launch_as(const LayerView& layer, const TokensView& keys, const RotaryView& rotary,
               const Scratch& scratch, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  const auto is_aligned = [&](std::int64_t stride) { return stride % kVector == 0; };
  const bool wide = is_aligned(layer.head_dim) && is_aligned(keys.sequence_stride) &&
                    is_aligned(keys.head_stride) && is_aligned(keys.token_stride) &&
                    reinterpret_cast<std::uintptr_t>(keys.data) % 16 == 0;
  if (rotary.pairs > 0) {
    const auto launch = [&]<int kPairsOfKey>() {
      // Four pairs a lane: more would not fit into registers, and a team has at least as many lanes
      // as it looks at slots.
      using Halves = Reader<T, 4, kPairsOfKey / 4, 2>;
      launch_way<Unturned<Halves>>(layer, keys, rotary, scratch, stream);
    };
    const bool halves = wide && !rotary.interleaved && 2 * rotary.pairs == layer.head_dim;
    if (halves && rotary.pairs == 32) {
      launch.template operator()<32>();
    } else if (halves && rotary.pairs == 64) {
      launch.template operator()<64>();
    } else if (halves && rotary.pairs == 128) {
      launch.template operator()<128>();
    } else {
      launch_turned<T>(layer, keys, rotary, scratch, stream);
    }
    return;
  }
  const auto launch = [&]<class One>() {
    launch_way<Plain<One>>(layer, keys, rotary, scratch, stream);
  };
  if (!wide) {
    launch.template operator()<Reader<T, 1, 32, 8>>();
  } else if (layer.head_dim <= 64) {
    launch.template operator()<Reader<T, kVector, 64 / kVector, 1>>();
  } else if (layer.head_dim <= 128) {
    launch.template operator()<Reader<T, kVector, 128 / kVector, 1>>();
  } else {
    launch.template operator()<Reader<T, kVector, 32, 8 / kVector>>();
  }
}

}  // namespace

std::int64_t novelty_scratch(const LayerView& layer, std::int64_t width) {
  return scratch_of(layer, width, nullptr).floats;
}

void launch_novelty(const LayerView& layer, const TokensView& keys, const RotaryView& rotary,
                    std::int64_t width, float* scratch, std::int64_t extent, cudaStream_t stream) {
  if (layer.batch == 0 || extent == 0) return;
  const Scratch parts = scratch_of(layer, width, scratch);
  const auto launch = [&]<class T>(T) { launch_as<T>(layer, keys, rotary, parts, stream); };
  switch (keys.dtype) {
    case DType::f16:
      launch(__half{});
      break;
    case DType::bf16:
      launch(__nv_bfloat16{});
      break;
    default:
      launch(float{});
  }
  const std::int64_t graphs = std::int64_t{layer.batch} * layer.graphs;
  if (parts.places != nullptr) {
    check(cudaMemsetAsync(
              parts.places, -1,
              sizeof(std::int32_t) * static_cast<std::size_t>(graphs << parts.place_bits), stream),
          "cudaMemsetAsync");
  }
  const auto blocks = static_cast<unsigned>(graphs * parts.blocks);
  highest_kernel<<<blocks, kThreads, 0, stream>>>(layer, parts);
  check(cudaGetLastError(), "highest_kernel");
  weights_kernel<<<blocks, kThreads, 0, stream>>>(layer, parts);
  check(cudaGetLastError(), "weights_kernel");
  if (parts.own == nullptr) return;
  share_weights_kernel<<<blocks, kThreads, 0, stream>>>(layer, parts,
                                                        static_cast<std::int32_t>(width / 2));
  check(cudaGetLastError(), "share_weights_kernel");
}

}  // namespace spectralkv::cuda
