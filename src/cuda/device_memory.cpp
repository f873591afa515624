#include "cuda/device_memory.h"

#include <cstdint>
#include <string>
#include <utility>

#include "cuda/cuda_check.h"
#include "spectralkv/error.h"

namespace spectralkv::cuda {

CaptureGuard::CaptureGuard() { static_cast<void>(cudaThreadExchangeStreamCaptureMode(&former_)); }

CaptureGuard::~CaptureGuard() { static_cast<void>(cudaThreadExchangeStreamCaptureMode(&former_)); }

DeviceGuard::DeviceGuard(int device) {
  int current = -1;
  check(cudaGetDevice(&current), "cudaGetDevice");
  if (current == device) return;
  check(cudaSetDevice(device), "cudaSetDevice");
  former_ = current;
}

DeviceGuard::~DeviceGuard() {
  if (former_ >= 0) static_cast<void>(cudaSetDevice(former_));
}

Memory::Memory(std::int64_t bytes, Kind kind) : bytes_(bytes), kind_(kind) {
  if (bytes == 0) return;
  if (kind == Kind::mapped) {
    check(cudaHostAlloc(&data_, static_cast<std::size_t>(bytes),
                        cudaHostAllocMapped | cudaHostAllocPortable),
          "cudaHostAlloc");
    return;
  }
  const cudaError_t error = cudaMalloc(&data_, static_cast<std::size_t>(bytes));
  if (error == cudaErrorMemoryAllocation) {
    static_cast<void>(cudaGetLastError());
    std::size_t free = 0;
    std::size_t total = 0;
    static_cast<void>(cudaMemGetInfo(&free, &total));
    throw CudaError("cudaMalloc: out of memory: asked for " + std::to_string(bytes) + " bytes, " +
                    std::to_string(free) + " of " + std::to_string(total) + " are free");
  }
  check(error, "cudaMalloc");
}

Memory::~Memory() {
  if (data_ == nullptr) return;
  const CaptureGuard captures;
  static_cast<void>(kind_ == Kind::mapped ? cudaFreeHost(data_) : cudaFree(data_));
}

Memory::Memory(Memory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)),
      kind_(other.kind_) {}

Memory& Memory::operator=(Memory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(kind_, other.kind_);
  return *this;
}

}  // namespace spectralkv::cuda
