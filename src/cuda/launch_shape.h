// What launchers ask of the device and of the caller's tensors before they choose a kernel.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/cuda_check.h"
#include "cuda/layer.h"

namespace spectralkv::cuda {

/// Of the current device.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

/// Asks for a kernel to begin while the one in front of it ends, which it must wait for (see
/// device/kernel_order.cuh); false where the device cannot.
inline bool begin_early(cudaLaunchAttribute& attribute) {
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) < 9) return false;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return true;
}

/// Whether every row begins at a multiple of `bytes`; elements of `element` bytes.
inline bool rows_start_at(const TokensView& tokens, std::int64_t bytes, std::int64_t element) {
  const auto is_multiple = [&](std::int64_t stride) { return stride * element % bytes == 0; };
  return reinterpret_cast<std::uintptr_t>(tokens.data) % static_cast<std::uintptr_t>(bytes) == 0 &&
         is_multiple(tokens.sequence_stride) && is_multiple(tokens.head_stride) &&
         is_multiple(tokens.token_stride);
}
/// Whether rows lie less than 4 GiB apart.
inline bool is_near(std::int64_t stride, std::int64_t element) {
  return stride >= 0 && stride * element <= std::int64_t{0xffffffff};
}

}  // namespace spectralkv::cuda
