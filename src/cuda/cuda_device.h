// The seam between the library and its CUDA backend. A build without CUDA defines the same symbols
// in no_cuda.cpp, so callers need no #ifdef and this header names no CUDA type.
#pragma once

#include <string>

namespace spectralkv::cuda {

bool is_built() noexcept;
int device_count() noexcept;

/// Why `device_count()` is 0; empty when it is not.
std::string status();

/// Empty where there is no such device.
std::string device_name(int index);

/// 1000 * major + 10 * minor; 0 without a driver.
int driver_version() noexcept;

}  // namespace spectralkv::cuda
