// What the device found in a caller's tensor, as the error that the caller sees.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string_view>

#include "cuda/layer.h"

namespace spectralkv::cuda {

/// Throws InvalidArgument as the CPU backend does.
[[noreturn]] void throw_fault(std::string_view operation, const FaultRecord& record);

/// fault.cu: forgets the fault.
void launch_clear_fault(FaultRecord* fault, FaultRecord* reported, cudaStream_t stream);

}  // namespace spectralkv::cuda
