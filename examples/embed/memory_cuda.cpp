// A build with the CUDA toolkit: for a CUDA device, managed memory, which both sides reach.
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstring>
#include <stdexcept>
#include <string>

#include "memory.h"

std::shared_ptr<void> allocate_bytes(std::size_t bytes, spectralkv::Device device) {
  if (device.type == spectralkv::DeviceType::cpu) {
    return std::make_shared<std::max_align_t[]>(bytes / sizeof(std::max_align_t) + 1);
  }
  const auto check = [](cudaError_t status, const char* call) {
    if (status == cudaSuccess) return;
    throw std::runtime_error(std::string("[embed] ") + call + ": " + cudaGetErrorString(status));
  };
  void* data = nullptr;
  check(cudaSetDevice(device.index), "cudaSetDevice");
  // CUDA allocates no zero bytes.
  check(cudaMallocManaged(&data, bytes + 1, cudaMemAttachGlobal), "cudaMallocManaged");
  std::shared_ptr<void> buffer(data, [](void* memory) {
    (void)cudaFree(memory);  // a destructor has nobody to tell
  });
  std::memset(data, 0, bytes);
  return buffer;
}
