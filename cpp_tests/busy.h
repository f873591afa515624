// Kernels that keep a stream busy, or break its device.
#pragma once

#include <cuda_runtime_api.h>

namespace spectralkv::test {

/// Occupies one thread of the device for that long.
void launch_spin(double milliseconds, cudaStream_t stream);

/// Ends in an error that stays with the process.
void launch_trap(cudaStream_t stream);

}  // namespace spectralkv::test
