#include "spectralkv/version.h"

#include <string>

#include "cuda/cuda_device.h"

namespace spectralkv {

const char* version() noexcept { return SPECTRALKV_VERSION; }

bool built_with_cuda() noexcept { return cuda::is_built(); }

int cuda_device_count() noexcept { return cuda::device_count(); }

std::string cuda_status() { return cuda::status(); }

}  // namespace spectralkv
