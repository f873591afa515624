#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "cuda/clusters.h"
#include "cuda/cuda_check.h"
#include "cuda/launch_shape.h"
#include "cuda/makespan.h"

namespace spectralkv::cuda {
namespace {

/// Stands for any kernel whose blocks take all the shared memory of a multiprocessor.
__global__ void whole_multiprocessor_kernel() {}

int asked(int cluster) {
  if (cluster == 1) return device_attribute(cudaDevAttrMultiProcessorCount);
  if (device_attribute(cudaDevAttrClusterLaunch) == 0) return 0;
  const auto kernel = whole_multiprocessor_kernel;
  const int bytes = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "cudaFuncSetAttribute");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
        "cudaFuncSetAttribute");
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(cluster));
  config.blockDim = dim3(256);
  config.dynamicSmemBytes = static_cast<std::size_t>(bytes);
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess) return clusters;
  static_cast<void>(cudaGetLastError());  // a size that this device does not know
  return 0;
}

}  // namespace

int clusters_at_once(int cluster) {
  constexpr std::size_t kDevices = 64;
  constexpr int kKnown = 1;  // is added to an answer
  static std::array<std::array<std::atomic<int>, kMostCluster + 1>, kDevices> answers{};
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  std::atomic<int>& answer =
      answers[static_cast<std::size_t>(device) % kDevices][static_cast<std::size_t>(cluster)];
  if (answer == 0) answer = asked(cluster) + kKnown;
  return answer - kKnown;
}

std::optional<std::int64_t> cluster_cost(std::int64_t count, int cluster,
                                         std::span<const EqualJobs> scans) {
  const std::int64_t at_once = clusters_at_once(cluster);
  const bool is_power_of_two = (cluster & (cluster - 1)) == 0;
  if (at_once == 0 || (!is_power_of_two && count > at_once)) return std::nullopt;
  return makespan(scans, at_once);
}

}  // namespace spectralkv::cuda
