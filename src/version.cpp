#include "spectralkv/version.h"

#include <string>

#include "cpu/simd.h"
#include "cuda/cuda_device.h"
#include "thread_pool.h"

namespace spectralkv {

const char* version() noexcept { return SPECTRALKV_VERSION; }

bool built_with_cuda() noexcept { return cuda::is_built(); }

int cuda_device_count() noexcept { return cuda::device_count(); }

std::string cuda_status() { return cuda::status(); }

std::string cuda_device_name(int index) { return cuda::device_name(index); }

int cuda_driver_version() noexcept { return cuda::driver_version(); }

const char* cpu_simd() noexcept { return detail::simd_kernels().name; }

int cpu_threads() noexcept { return detail::available_processors(); }

}  // namespace spectralkv
