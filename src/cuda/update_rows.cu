// The rows of a block of new tokens.
#include <cstdint>

#include "cuda/cuda_check.h"
#include "cuda/device/attention_row.cuh"
#include "cuda/kernels.h"

namespace spectralkv::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kRowThreads)
    rows_kernel(LayerView layer, UpdateRowsArgs args, std::int64_t begin, std::int64_t tokens) {
  extern __shared__ float memory[];
  if (has_fault(layer)) return;
  // The last tokens see most: they start first.
  const std::int64_t graphs = std::int64_t{layer.batch} * layer.graphs;
  const std::int64_t token = begin + tokens - 1 - blockIdx.x / graphs;
  const std::int64_t b = blockIdx.x % graphs / layer.graphs;
  const std::int64_t g = blockIdx.x % layer.graphs;
  if (args.drawn[b * args.count + token] == 0) return;
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
void launch_as(const LayerView& layer, const UpdateRowsArgs& args, std::int64_t begin,
               std::int64_t tokens, cudaStream_t stream) {
  const std::int64_t bytes = row_scratch_bytes(layer);
  check(cudaFuncSetAttribute(rows_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        "cudaFuncSetAttribute");
  const std::int64_t blocks = tokens * layer.batch * layer.graphs;
  if (blocks == 0) return;
  rows_kernel<T>
      <<<static_cast<unsigned>(blocks), kRowThreads, static_cast<std::size_t>(bytes), stream>>>(
          layer, args, begin, tokens);
  check(cudaGetLastError(), "rows_kernel");
}

}  // namespace

std::int64_t update_rows_scratch(const LayerView& /*layer*/, std::int64_t /*tokens*/) { return 0; }

void launch_update_rows(const LayerView& layer, const UpdateRowsArgs& args, std::int64_t begin,
                        std::int64_t tokens, cudaStream_t stream) {
  switch (args.keys.dtype) {
    case DType::f16:
      launch_as<__half>(layer, args, begin, tokens, stream);
      break;
    case DType::bf16:
      launch_as<__nv_bfloat16>(layer, args, begin, tokens, stream);
      break;
    default:
      launch_as<float>(layer, args, begin, tokens, stream);
  }
}

}  // namespace spectralkv::cuda
