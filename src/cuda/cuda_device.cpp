#include "cuda/cuda_device.h"

#include <cuda_runtime_api.h>

#include <string>

namespace spectralkv::cuda {
namespace {

struct DeviceQuery {
  cudaError_t error = cudaSuccess;
  int count = 0;
};

DeviceQuery query_devices() noexcept {
  DeviceQuery query;
  query.error = cudaGetDeviceCount(&query.count);
  if (query.error != cudaSuccess) {
    query.count = 0;
    // The runtime remembers the failure: the next call that checks for errors must not find ours.
    static_cast<void>(cudaGetLastError());
  }
  return query;
}

}  // namespace

bool is_built() noexcept { return true; }

int device_count() noexcept { return query_devices().count; }

std::string status() {
  const DeviceQuery query = query_devices();
  if (query.error != cudaSuccess) {
    return std::string("no CUDA device can be used: ") + cudaGetErrorString(query.error);
  }
  return query.count > 0 ? "" : "this machine has no CUDA device";
}

std::string device_name(int index) {
  cudaDeviceProp properties{};
  if (index < 0 || index >= device_count() ||
      cudaGetDeviceProperties(&properties, index) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return {};
  }
  return properties.name;
}

int driver_version() noexcept {
  int version = 0;
  if (cudaDriverGetVersion(&version) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return 0;
  }
  return version;
}

}  // namespace spectralkv::cuda
