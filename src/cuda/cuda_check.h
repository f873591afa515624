// One check for every call into the CUDA runtime.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "spectralkv/error.h"

namespace spectralkv::cuda {

/// Throws CudaError, naming the call, when it failed. The runtime's own record of it is cleared.
inline void check(cudaError_t error, const char* call) {
  if (error != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    throw CudaError(std::string(call) + ": " + cudaGetErrorString(error));
  }
}

}  // namespace spectralkv::cuda
