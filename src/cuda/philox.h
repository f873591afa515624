// cuRAND's Philox4x32-10 on the device, to hold it against philox.h of the CPU.
#pragma once

#include <cstdint>

namespace spectralkv::cuda {

/// Writes `blocks` consecutive blocks of four numbers: block i is the first `curand4` of a state
/// made by `curand_init(seed, subsequence, offset + 4 * i)`.
///
/// `out` is device memory of 4 * blocks numbers on the current device, `offset` a multiple of 4,
/// `stream` a cudaStream_t. Returns once the kernel is queued.
///
/// Throws InvalidArgument for a negative `blocks` or an `offset` inside a block, CudaError when the
/// launch fails.
void launch_philox_fill(std::uint32_t* out, std::int64_t blocks, std::uint64_t seed,
                        std::uint64_t subsequence, std::uint64_t offset, void* stream);

}  // namespace spectralkv::cuda
