// Restart weights of novelty populations: how far a key points from where the keys of its head
// point on average. One block a graph, so that all sums have one order.
#include <cstdint>

#include "cuda/cuda_check.h"
#include "cuda/device/attention_row.cuh"
#include "cuda/kernels.h"

namespace spectralkv::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
/// The weight of the most novel token.
constexpr double kUnit = 0x1p20;

template <class Combine>
__device__ double block_reduce(double value, double* shared, Combine combine) {
  for (int offset = 16; offset > 0; offset /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffffU, value, offset));
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  double result = shared[0];
  for (int i = 1; i < kWarps; ++i) result = combine(result, shared[i]);
  return result;
}

__device__ float warp_sum(float value) {
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffU, value, offset);
  }
  return value;
}

/// `scratch` has 3 floats a slot of a graph: inverse norm (-1: left out), distance, sum of
/// z-scores.
template <class T>
__global__ void __launch_bounds__(kThreads)
    novelty_kernel(LayerView layer, TokensView keys, float* scratch) {
  extern __shared__ float mean[];  // (kWarps + 1, head_dim)
  __shared__ double shared[kWarps];
  if (has_fault(layer)) return;
  const std::int64_t b = blockIdx.x / layer.graphs;
  const std::int64_t g = blockIdx.x % layer.graphs;
  const std::int64_t length = layer.counters->length;
  const int dim = layer.head_dim;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const std::int32_t* positions = positions_of(layer, b, g);
  float* const inverse_norms = scratch + blockIdx.x * 3 * layer.capacity;
  float* const distances = inverse_norms + layer.capacity;
  float* const z_scores = distances + layer.capacity;
  float* const direction = mean + kWarps * dim;
  for (std::int64_t j = threadIdx.x; j < length; j += kThreads) z_scores[j] = 0.0F;

  for (int head = 0; head < layer.heads_per_graph; ++head) {
    const std::int64_t h = g * layer.heads_per_graph + head;
    for (int i = static_cast<int>(threadIdx.x); i < kWarps * dim; i += kThreads) mean[i] = 0.0F;
    __syncthreads();
    for (std::int64_t j = warp; j < length; j += kWarps) {
      float inverse = -1.0F;
      if (positions[j] >= 0) {
        const T* key = key_at<T>(keys, b, h, j);
        float norm2 = 0.0F;
        int finite = 1;
        for (int d = lane; d < dim; d += 32) {
          const float value = as_float(key[d]);
          if (!isfinite(value)) finite = 0;
          norm2 = fmaf(value, value, norm2);
        }
        norm2 = warp_sum(norm2);
        if (__all_sync(0xffffffffU, finite) != 0) {
          inverse = norm2 > 0.0F ? 1.0F / sqrtf(norm2) : 0.0F;
          for (int d = lane; d < dim; d += 32) {
            mean[warp * dim + d] = fmaf(as_float(key[d]), inverse, mean[warp * dim + d]);
          }
        }
      }
      if (lane == 0) inverse_norms[j] = inverse;
    }
    __syncthreads();
    double norm2 = 0.0;
    for (int d = static_cast<int>(threadIdx.x); d < dim; d += kThreads) {
      float sum = 0.0F;
      for (int w = 0; w < kWarps; ++w) sum += mean[w * dim + d];
      direction[d] = sum;
      norm2 += static_cast<double>(sum) * sum;
    }
    const auto add = [](double x, double y) { return x + y; };
    norm2 = block_reduce(norm2, shared, add);
    const float inverse = norm2 > 0.0 ? static_cast<float>(1.0 / sqrt(norm2)) : 0.0F;
    for (std::int64_t j = warp; j < length; j += kWarps) {
      if (inverse_norms[j] < 0.0F) continue;
      const T* key = key_at<T>(keys, b, h, j);
      float dot = 0.0F;
      for (int d = lane; d < dim; d += 32) {
        dot = fmaf(as_float(key[d]), direction[d] * inverse, dot);
      }
      dot = warp_sum(dot);
      if (lane == 0) distances[j] = -dot * inverse_norms[j];
    }
    __syncthreads();
    double sum = 0.0;
    double count = 0.0;
    for (std::int64_t j = threadIdx.x; j < length; j += kThreads) {
      if (inverse_norms[j] < 0.0F) continue;
      sum += distances[j];
      count += 1.0;
    }
    sum = block_reduce(sum, shared, add);
    count = block_reduce(count, shared, add);
    const double average = count > 0.0 ? sum / count : 0.0;
    double squares = 0.0;
    for (std::int64_t j = threadIdx.x; j < length; j += kThreads) {
      if (inverse_norms[j] < 0.0F) continue;
      squares += (distances[j] - average) * (distances[j] - average);
    }
    squares = block_reduce(squares, shared, add);
    const double deviation = count > 1.0 ? sqrt(squares / (count - 1.0)) : 0.0;
    for (std::int64_t j = threadIdx.x; j < length; j += kThreads) {
      if (inverse_norms[j] < 0.0F) {
        z_scores[j] = -INFINITY;
      } else if (deviation > 1e-6) {
        z_scores[j] += static_cast<float>((distances[j] - average) / deviation);
      }
    }
    __syncthreads();
  }

  const auto may_restart = [&](std::int64_t j) {
    return positions[j] >= layer.num_sinks && isfinite(z_scores[j]);
  };
  double highest = -INFINITY;
  for (std::int64_t j = threadIdx.x; j < length; j += kThreads) {
    if (may_restart(j)) highest = fmax(highest, static_cast<double>(z_scores[j]));
  }
  highest = block_reduce(highest, shared, [](double x, double y) { return fmax(x, y); });
  std::uint32_t* weights = novelty_of(layer, b, g);
  for (std::int64_t j = threadIdx.x; j < length; j += kThreads) {
    weights[j] = may_restart(j) ? static_cast<std::uint32_t>(llrint(
                                      kUnit * exp((static_cast<double>(z_scores[j]) - highest) /
                                                  static_cast<double>(layer.heads_per_graph))))
                                : 0U;
  }
}

template <class T>
void launch_as(const LayerView& layer, const TokensView& keys, float* scratch,
               cudaStream_t stream) {
  const auto bytes = static_cast<std::size_t>((kWarps + 1) * layer.head_dim) * sizeof(float);
  check(cudaFuncSetAttribute(novelty_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        "cudaFuncSetAttribute");
  novelty_kernel<T><<<static_cast<unsigned>(layer.batch * layer.graphs), kThreads, bytes, stream>>>(
      layer, keys, scratch);
  check(cudaGetLastError(), "novelty_kernel");
}

}  // namespace

std::int64_t novelty_scratch(const LayerView& layer) {
  return 3 * std::int64_t{layer.batch} * layer.graphs * layer.capacity;
}

void launch_novelty(const LayerView& layer, const TokensView& keys, float* scratch,
                    std::int64_t /*extent*/, cudaStream_t stream) {
  switch (keys.dtype) {
    case DType::f16:
      launch_as<__half>(layer, keys, scratch, stream);
      break;
    case DType::bf16:
      launch_as<__nv_bfloat16>(layer, keys, scratch, stream);
      break;
    default:
      launch_as<float>(layer, keys, scratch, stream);
  }
}

}  // namespace spectralkv::cuda
