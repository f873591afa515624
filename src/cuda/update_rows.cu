// The rows of a block of new tokens: by tiles on the tensor cores where shapes allow, else one
// thread block a row.
#include <algorithm>
#include <array>
#include <cstdint>

#include "cuda/cuda_check.h"
#include "cuda/device/attention_row.cuh"
#include "cuda/device/row_scan.cuh"
#include "cuda/device/row_tiles.cuh"
#include "cuda/kernels.h"

namespace spectralkv::cuda {
namespace {

constexpr int kListThreads = 1024;
constexpr int kWarpsPerBlock = 8;
constexpr std::int64_t kWord = 4;

/// Lists the places of `flags` that are not 0, ascending; one block a list.
__device__ void list_places(const std::int32_t* flags, std::int64_t length, std::int32_t* places,
                            std::int32_t* count) {
  __shared__ int totals[kListThreads / 32];
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const std::int64_t share = (length + kListThreads - 1) / kListThreads;
  const std::int64_t first = threadIdx.x * share;
  const std::int64_t end = min(first + share, length);
  int mine = 0;
  for (std::int64_t i = first; i < end; ++i) mine += flags[i] != 0 ? 1 : 0;
  int before = mine;
  for (int offset = 1; offset < 32; offset *= 2) {
    const int other = __shfl_up_sync(kAllOnes, before, offset);
    if (lane >= offset) before += other;
  }
  if (lane == 31) totals[warp] = before;
  __syncthreads();
  std::int64_t at = before - mine;
  int all = 0;
  for (int w = 0; w < kListThreads / 32; ++w) {
    at += w < warp ? totals[w] : 0;
    all += totals[w];
  }
  for (std::int64_t i = first; i < end; ++i) {
    if (flags[i] != 0) places[at++] = static_cast<std::int32_t>(i);
  }
  if (threadIdx.x == 0) *count = all;
}

/// The drawn tokens of each sequence; one block a sequence.
__global__ void __launch_bounds__(kListThreads)
    list_drawn_kernel(LayerView layer, const std::int32_t* drawn, std::int64_t count,
                      std::int32_t* tokens, std::int64_t most, std::int32_t* counts) {
  if (has_fault(layer)) return;
  const std::int64_t b = blockIdx.x;
  list_places(drawn + b * count, count, tokens + b * most, counts + b);
}

/// What the second pass goes through; one block a graph.
__global__ void __launch_bounds__(kListThreads)
    list_again_kernel(LayerView layer, const std::int32_t* left, const std::int32_t* left_count,
                      const std::int32_t* drawn_counts, std::int32_t* again, std::int64_t most,
                      std::int32_t* counts) {
  if (has_fault(layer) || *left_count <= kMostScans) return;
  const std::int64_t graph = blockIdx.x;
  list_places(left + graph * most, drawn_counts[graph / layer.graphs], again + graph * most,
              counts + graph);
}

/// Masks of 64 keys by one warp, eight lanes a key.
template <class T>
__global__ void __launch_bounds__(32 * kWarpsPerBlock)
    mask_keys_kernel(LayerView layer, TokensView keys, std::int64_t slots, std::int64_t blocks,
                     KeyMasks* masks) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  if (has_fault(layer)) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t block =
      static_cast<std::int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / 32;
  if (block >= blocks) return;
  const std::int64_t b = blockIdx.y / layer.heads;
  const std::int64_t h = blockIdx.y % layer.heads;
  const std::int32_t* const positions = positions_of(layer, b, h / layer.heads_per_graph);
  const T* const head =
      static_cast<const T*>(keys.data) + b * keys.sequence_stride + h * keys.head_stride;
  KeyMasks found{0, 0};
  constexpr int kKeysAtOnce = 4;
#pragma unroll 4
  for (int i = 0; i < kTileRows; i += kKeysAtOnce) {
    const std::int64_t slot = block * kTileRows + i + lane / 8;
    bool finite = slot < slots;
    if (finite) {
      const auto* const key = reinterpret_cast<const uint4*>(head + slot * keys.token_stride);
      for (int chunk = lane % 8; chunk < layer.head_dim / 8; chunk += 8) {
        finite = all_finite<T>(key[chunk]) && finite;
      }
    }
    const std::int32_t position = slot < slots ? positions[slot] : -1;
    const unsigned finites = __ballot_sync(kAllOnes, finite);
    const unsigned occupied = __ballot_sync(kAllOnes, position >= 0);
    const unsigned ordinary = __ballot_sync(kAllOnes, position >= layer.num_sinks);
    for (int k = 0; k < kKeysAtOnce; ++k) {
      const bool counted = (finites >> (8 * k) & 0xffU) == 0xffU && (occupied >> (8 * k) & 1U) != 0;
      const bool candidate = counted && (ordinary >> (8 * k) & 1U) != 0;
      found.counted |= static_cast<unsigned long long>(counted) << (i + k);
      found.candidates |= static_cast<unsigned long long>(candidate) << (i + k);
    }
  }
  if (lane == 0) masks[(b * layer.heads + h) * blocks + block] = found;
#endif
}

template <class T>
__device__ void draw_token(const LayerView& layer, const UpdateRowsArgs& args, std::int64_t graph,
                           std::int64_t token, float* memory) {
  const std::int64_t b = graph / layer.graphs;
  const std::int64_t g = graph % layer.graphs;
  const std::int64_t slot = args.first_slot + token;
  const RowTask task{.sequence = b,
                     .graph = g,
                     .own_slot = slot,
                     .visible = slot + 1,
                     .token = token,
                     .scale = args.scale,
                     .softcap = args.softcap};
  draw_row<T>(layer, args.queries, args.keys, task,
              row_scratch(memory, layer.heads_per_graph * layer.group, layer.head_dim),
              row_of(layer, b, g, slot));
}

template <class T>
__global__ void __launch_bounds__(kRowThreads) rows_kernel(LayerView layer, UpdateRowsArgs args) {
  extern __shared__ float row_memory[];
  if (has_fault(layer)) return;
  // The last tokens see most: they start first.
  const std::int64_t graphs = std::int64_t{layer.batch} * layer.graphs;
  const std::int64_t token = args.count - 1 - blockIdx.x / graphs;
  const std::int64_t graph = blockIdx.x % graphs;
  if (args.drawn[graph / layer.graphs * args.count + token] == 0) return;
  draw_token<T>(layer, args, graph, token, row_memory);
}

/// What the tiles left.
template <class T>
__global__ void __launch_bounds__(kRowThreads)
    unsettled_rows_kernel(LayerView layer, UpdateRowsArgs args, const int2* unsettled,
                          const std::int32_t* count) {
  extern __shared__ float row_memory[];
  if (has_fault(layer)) return;
  for (std::int64_t i = blockIdx.x; i < *count; i += gridDim.x) {
    __syncthreads();
    draw_token<T>(layer, args, unsettled[i].x, unsettled[i].y, row_memory);
  }
}

int attribute_of_device(cudaDeviceAttr attribute) {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

/// As much as there is, whatever one launch takes: another thread may launch the same kernel for
/// another shape.
template <class Kernel>
void allow_shared_memory(Kernel* kernel) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             attribute_of_device(cudaDevAttrMaxSharedMemoryPerBlockOptin)),
        "cudaFuncSetAttribute");
}

template <class T>
void launch_rows(const LayerView& layer, const UpdateRowsArgs& args, cudaStream_t stream) {
  const std::int64_t bytes = row_scratch_bytes(layer);
  allow_shared_memory(rows_kernel<T>);
  const std::int64_t blocks = args.count * layer.batch * layer.graphs;
  rows_kernel<T>
      <<<static_cast<unsigned>(blocks), kRowThreads, static_cast<std::size_t>(bytes), stream>>>(
          layer, args);
  check(cudaGetLastError(), "rows_kernel");
}

// ---- tiles

/// Can 16-byte chunks be copied from it?
bool is_aligned(const TokensView& view) {
  return reinterpret_cast<std::uintptr_t>(view.data) % kChunkBytes == 0 &&
         view.sequence_stride % 8 == 0 && view.head_stride % 8 == 0 && view.token_stride % 8 == 0;
}

/// Query heads of a token, padded to a power of two.
int padded_group(int group) {
  int padded = 2;
  while (padded < group) padded *= 2;
  return padded;
}

/// Fills in the shape of a launch; false where nothing fits.
bool choose_tiles(const LayerView& layer, RowTilesArgs& tiles) {
  const std::int64_t memory = attribute_of_device(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  tiles.panels = (layer.head_dim + kPanelElements - 1) / kPanelElements;
  tiles.keep_low = layer.top_k + 50 * layer.top_k / 100 + 8;
  tiles.keep_high = tiles.keep_low + 8 + layer.top_k / 4;
  tiles.rank_low = std::min(kMostRanked - 8, layer.top_k + 50 * layer.top_k / 100 + 8);
  tiles.rank_high = std::min(kMostRanked, tiles.rank_low + 8 + layer.top_k / 8);
  tiles.samples = 4;
  tiles.sample_share = 24;
  const int tokens = kTileColumns / padded_group(layer.group);
  struct Shape {
    int warpgroups;
    int stages;
    int entries;
  };
  constexpr std::array<Shape, 8> kShapes{{{2, 4, 128},
                                          {2, 3, 128},
                                          {2, 3, 96},
                                          {2, 2, 128},
                                          {2, 2, 64},
                                          {1, 3, 96},
                                          {1, 2, 96},
                                          {1, 2, 64}}};
  for (const Shape& shape : kShapes) {
    const std::int64_t bytes =
        TileMemory::bytes(shape.warpgroups, shape.stages, tiles.panels, tokens, shape.entries);
    // A cut must leave a warp's keys room.
    const int after_cut = tiles.keep_high + (shape.entries - tiles.keep_high) / 8;
    if (bytes > memory || after_cut > shape.entries - kTurnKeys) continue;
    tiles.warpgroups = shape.warpgroups;
    tiles.stages = shape.stages;
    tiles.entries = shape.entries;
    return true;
  }
  return false;
}

template <class T, int kGroup>
void launch_tiles_as(const LayerView& layer, RowTilesArgs tiles, cudaStream_t stream) {
  constexpr int kTokens = kTileColumns / kGroup;
  const std::int64_t bytes =
      TileMemory::bytes(tiles.warpgroups, tiles.stages, tiles.panels, kTokens, tiles.entries);
  allow_shared_memory(row_tiles_kernel<T, kGroup>);
  const int tokens = tiles.warpgroups * kTokens;
  const std::int64_t tiles_a_graph = (tiles.most + tokens - 1) / tokens;
  const std::int64_t grid = tiles_a_graph * layer.batch * layer.graphs;
  for (const bool second : {false, true}) {
    tiles.second = second;
    if (second) {
      const std::int64_t graphs = layer.batch * layer.graphs;
      list_again_kernel<<<static_cast<unsigned>(graphs), kListThreads, 0, stream>>>(
          layer, tiles.left, tiles.left_count, tiles.drawn.counts, tiles.again.tokens, tiles.most,
          tiles.again.counts);
      check(cudaGetLastError(), "list_again_kernel");
    }
    row_tiles_kernel<T, kGroup>
        <<<static_cast<unsigned>(grid), static_cast<unsigned>(1 + tiles.warpgroups) * kWarpgroup,
           static_cast<std::size_t>(bytes), stream>>>(layer, tiles, tiles_a_graph);
    check(cudaGetLastError(), "row_tiles_kernel");
  }
}

template <class T>
bool launch_tiles(const LayerView& layer, const UpdateRowsArgs& args, cudaStream_t stream) {
  constexpr int kMostDim = 256;
  constexpr int kMostGroup = 16;
  if (layer.heads_per_graph != 1 || layer.group > kMostGroup || layer.head_dim % 8 != 0 ||
      layer.head_dim > kMostDim || !is_aligned(args.queries) || !is_aligned(args.keys)) {
    return false;
  }
  RowTilesArgs tiles{};
  if (attribute_of_device(cudaDevAttrComputeCapabilityMajor) < 8 || !choose_tiles(layer, tiles)) {
    return false;
  }
  const std::int64_t slots = args.first_slot + args.count;
  const RowsScratch plan(layer, slots, args.count, args.row_stride);
  std::int32_t* const words = args.scratch;
  std::int32_t* const counts = words + plan.counts;
  tiles.queries = args.queries;
  tiles.keys = args.keys;
  tiles.first_slot = args.first_slot;
  tiles.scale = args.scale;
  tiles.softcap = args.softcap;
  tiles.drawn = {.tokens = words + plan.drawn, .counts = counts};
  tiles.most = plan.most;
  tiles.masks = reinterpret_cast<KeyMasks*>(words + plan.masks);
  tiles.blocks = plan.blocks;
  tiles.left = words + plan.left;
  tiles.again = {.tokens = words + plan.again, .counts = counts + layer.batch};
  tiles.references = reinterpret_cast<float*>(words + plan.references);
  tiles.unsettled = reinterpret_cast<int2*>(words + plan.unsettled);
  tiles.left_count = counts + layer.batch + RowsScratch::graphs(layer);
  tiles.unsettled_count = tiles.left_count + 1;
  tiles.scans = reinterpret_cast<RowScan*>(words + plan.scans);
  tiles.found = reinterpret_cast<unsigned long long*>(words + plan.found);

  check(cudaMemsetAsync(counts, 0, static_cast<std::size_t>(RowsScratch::counters(layer) * kWord),
                        stream),
        "cudaMemsetAsync");
  list_drawn_kernel<<<static_cast<unsigned>(layer.batch), kListThreads, 0, stream>>>(
      layer, args.drawn, args.count, words + plan.drawn, plan.most, counts);
  check(cudaGetLastError(), "list_drawn_kernel");
  const dim3 grid(static_cast<unsigned>((plan.blocks + kWarpsPerBlock - 1) / kWarpsPerBlock),
                  static_cast<unsigned>(layer.batch * layer.heads));
  mask_keys_kernel<T>
      <<<grid, 32 * kWarpsPerBlock, 0, stream>>>(layer, args.keys, slots, plan.blocks, tiles.masks);
  check(cudaGetLastError(), "mask_keys_kernel");
  switch (padded_group(layer.group)) {
    case 2:
      launch_tiles_as<T, 2>(layer, tiles, stream);
      break;
    case 4:
      launch_tiles_as<T, 4>(layer, tiles, stream);
      break;
    case 8:
      launch_tiles_as<T, 8>(layer, tiles, stream);
      break;
    default:
      launch_tiles_as<T, 16>(layer, tiles, stream);
  }
  constexpr unsigned kBlocks = 1024;
  scan_rows_kernel<T><<<kBlocks, kRowThreads, 0, stream>>>(layer, tiles);
  check(cudaGetLastError(), "scan_rows_kernel");
  const std::int64_t bytes = row_scratch_bytes(layer);
  allow_shared_memory(unsettled_rows_kernel<T>);
  unsettled_rows_kernel<T><<<kBlocks, kRowThreads, static_cast<std::size_t>(bytes), stream>>>(
      layer, args, tiles.unsettled, tiles.unsettled_count);
  check(cudaGetLastError(), "unsettled_rows_kernel");
  return true;
}

}  // namespace

std::int64_t update_rows_scratch(const LayerView& layer, std::int64_t slots, std::int64_t count,
                                 std::int64_t row_stride) {
  return RowsScratch(layer, slots, count, row_stride).words;
}

void launch_update_rows(const LayerView& layer, const UpdateRowsArgs& args, cudaStream_t stream) {
  if (args.count == 0 || layer.batch == 0) return;
  switch (args.keys.dtype) {
    case DType::f16:
      if (!launch_tiles<__half>(layer, args, stream)) launch_rows<__half>(layer, args, stream);
      break;
    case DType::bf16:
      if (!launch_tiles<__nv_bfloat16>(layer, args, stream)) {
        launch_rows<__nv_bfloat16>(layer, args, stream);
      }
      break;
    default:
      launch_rows<float>(layer, args, stream);
  }
}

}  // namespace spectralkv::cuda
