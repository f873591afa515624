// Which libspectralkv this is and what it can run on.
#pragma once

#include <string>

#include "spectralkv/export.h"

namespace spectralkv {

/// "major.minor.patch".
SPECTRALKV_API const char* version() noexcept;

/// True when the CUDA backend was compiled in, whether or not this machine has a device for it.
SPECTRALKV_API bool built_with_cuda() noexcept;

/// CUDA devices that can be used now: 0 without the CUDA backend, without a driver, without a
/// device.
SPECTRALKV_API int cuda_device_count() noexcept;

/// Why `cuda_device_count()` is 0; empty when it is not.
SPECTRALKV_API std::string cuda_status();

/// Name of a device, such as "NVIDIA H200"; empty where there is no such device.
SPECTRALKV_API std::string cuda_device_name(int index);

/// Newest CUDA that the driver supports, as 1000 * major + 10 * minor; 0 without a driver.
SPECTRALKV_API int cuda_driver_version() noexcept;

/// Instruction set that the CPU backend uses here: "avx512", "avx2" or "baseline".
SPECTRALKV_API const char* cpu_simd() noexcept;

/// Threads that the CPU backend uses unless told otherwise: processors this process may run on.
SPECTRALKV_API int cpu_threads() noexcept;

}  // namespace spectralkv
