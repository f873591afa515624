// The row of one new token a sequence.
#include <cstdint>

#include "cuda/cuda_check.h"
#include "cuda/device/attention_row.cuh"
#include "cuda/kernels.h"

namespace spectralkv::cuda {
namespace {

__device__ std::int64_t slot_at(const UpdateArgs& args, std::int64_t b, std::int64_t h,
                                std::int64_t length) {
  if (args.slots.data == nullptr) return length;
  return args.slots.data[b * args.slots.sequence_stride + h * args.slots.head_stride];
}

/// Whether the slots of all sequences can be taken. Every block looks at all of them, so that all
/// decide alike before any writes.
__device__ bool check_slots(const LayerView& layer, const UpdateArgs& args, std::int64_t length) {
  int good = 1;
  for (int i = static_cast<int>(threadIdx.x); i < layer.batch * layer.heads; i += kRowThreads) {
    const std::int64_t b = i / layer.heads;
    const std::int64_t h = i % layer.heads;
    const std::int64_t g = h / layer.heads_per_graph;
    const std::int64_t slot = slot_at(args, b, h, length);
    const std::int64_t of_graph = slot_at(args, b, g * layer.heads_per_graph, length);
    if (slot < 0 || slot > length || slot >= layer.capacity) {
      good = 0;
      const bool full = args.slots.data == nullptr;
      report(layer, full ? Fault::layer_full : Fault::slot_range, b, h, full ? slot + 1 : slot,
             full ? layer.capacity : min(length, layer.capacity - 1));
    } else if (slot < length && positions_of(layer, b, g)[slot] >= 0) {
      good = 0;
      report(layer, Fault::slot_taken, b, h, slot, 0);
    } else if (slot != of_graph) {
      good = 0;
      report(layer, Fault::slots_differ, b, h, slot, of_graph);
    }
  }
  return __syncthreads_and(good) != 0;
}

/// One block a graph of a sequence draws the row. Nothing is taken yet: the other blocks still
/// check the slots.
template <class T>
__global__ void __launch_bounds__(kRowThreads) draw_kernel(LayerView layer, UpdateArgs args) {
  extern __shared__ float memory[];
  if (has_fault(layer)) return;
  const std::int64_t length = layer.counters->length;
  if (!check_slots(layer, args, length)) return;
  const std::int64_t b = blockIdx.x / layer.graphs;
  const std::int64_t g = blockIdx.x % layer.graphs;
  const std::int64_t slot = slot_at(args, b, g * layer.heads_per_graph, length);
  if (threadIdx.x == 0) clear_slot(layer, b, g, slot);
  __syncthreads();
  const RowTask task{.sequence = b,
                     .graph = g,
                     .own_slot = slot,
                     .visible = max(length, slot + 1),
                     .token = 0,
                     .scale = args.scale,
                     .softcap = args.softcap};
  draw_row<T>(layer, args.queries, args.keys, task,
              row_scratch(memory, layer.heads_per_graph * layer.group, layer.head_dim),
              row_of(layer, b, g, slot));
}

/// Takes the slots and counts the tokens.
__global__ void take_kernel(LayerView layer, UpdateArgs args) {
  if (has_fault(layer)) return;
  const std::int64_t length = layer.counters->length;
  std::int64_t behind = length;
  int appended = 1;
  for (std::int64_t i = threadIdx.x; i < std::int64_t{layer.batch} * layer.graphs;
       i += blockDim.x) {
    const std::int64_t b = i / layer.graphs;
    const std::int64_t g = i % layer.graphs;
    const std::int64_t slot = slot_at(args, b, g * layer.heads_per_graph, length);
    positions_of(layer, b, g)[slot] = static_cast<std::int32_t>(layer.sequences[b].seen);
    if (slot == length) behind = length + 1;
    if (slot != length) appended = 0;
  }
  const bool grows = __syncthreads_or(behind > length ? 1 : 0) != 0;
  const bool ordered = __syncthreads_and(appended) != 0;
  for (std::int64_t b = threadIdx.x; b < layer.batch; b += blockDim.x) {
    ++layer.sequences[b].seen;
    ++layer.sequences[b].held;
  }
  if (threadIdx.x != 0) return;
  layer.counters->length = length + (grows ? 1 : 0);
  if (!ordered) layer.counters->ordered = 0;
}

template <class T>
void launch_as(const LayerView& layer, const UpdateArgs& args, cudaStream_t stream) {
  const std::int64_t bytes = row_scratch_bytes(layer);
  check(cudaFuncSetAttribute(draw_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        "cudaFuncSetAttribute");
  draw_kernel<T><<<static_cast<unsigned>(layer.batch * layer.graphs), kRowThreads,
                   static_cast<std::size_t>(bytes), stream>>>(layer, args);
  check(cudaGetLastError(), "draw_kernel");
}

}  // namespace

void launch_update(const LayerView& layer, const UpdateArgs& args, std::int64_t /*extent*/,
                   cudaStream_t stream) {
  switch (args.keys.dtype) {
    case DType::f16:
      launch_as<__half>(layer, args, stream);
      break;
    case DType::bf16:
      launch_as<__nv_bfloat16>(layer, args, stream);
      break;
    default:
      launch_as<float>(layer, args, stream);
  }
  take_kernel<<<1, 256, 0, stream>>>(layer, args);
  check(cudaGetLastError(), "take_kernel");
}

}  // namespace spectralkv::cuda
