// Memory that frees itself, and the device on which a call works.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace spectralkv::cuda {

/// Calls of this thread that take memory or wait leave captures of others alone while it lives.
class CaptureGuard {
 public:
  CaptureGuard();
  ~CaptureGuard();
  CaptureGuard(const CaptureGuard&) = delete;
  CaptureGuard& operator=(const CaptureGuard&) = delete;

 private:
  cudaStreamCaptureMode former_ = cudaStreamCaptureModeRelaxed;
};

/// Makes a device current, and the former one again at the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int former_ = -1;
  CaptureGuard captures_;
};

/// Bytes on the current device, or of pinned host memory that the device sees.
class Memory {
 public:
  enum class Kind : std::uint8_t { device, mapped };

  Memory() = default;
  /// Throws CudaError that says how much was asked for and how much was free.
  Memory(std::int64_t bytes, Kind kind);
  ~Memory();
  Memory(Memory&& other) noexcept;
  Memory& operator=(Memory&& other) noexcept;

  std::int64_t bytes() const { return bytes_; }
  void* data() const { return data_; }
  template <class T>
  T* as(std::int64_t offset = 0) const {
    return reinterpret_cast<T*>(static_cast<std::byte*>(data_) + offset);
  }

 private:
  void* data_ = nullptr;
  std::int64_t bytes_ = 0;
  Kind kind_ = Kind::device;
};

}  // namespace spectralkv::cuda
