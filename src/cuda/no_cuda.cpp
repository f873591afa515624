#include <string>

#include "cuda/cuda_device.h"

namespace spectralkv::cuda {

bool is_built() noexcept { return false; }

int device_count() noexcept { return 0; }

// NOLINTNEXTLINE(modernize-use-string-view): one signature with and without CUDA
std::string status() { return "this libspectralkv was built without CUDA"; }

}  // namespace spectralkv::cuda
