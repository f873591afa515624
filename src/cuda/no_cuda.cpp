#include <memory>
#include <string>
#include <vector>

#include "backend.h"
#include "cuda/cuda_device.h"
#include "spectralkv/error.h"

namespace spectralkv::cuda {

bool is_built() noexcept { return false; }

int device_count() noexcept { return 0; }

// NOLINTNEXTLINE(modernize-use-string-view): one signature with and without CUDA
std::string status() { return "this libspectralkv was built without CUDA"; }

std::string device_name(int /*index*/) { return {}; }

int driver_version() noexcept { return 0; }

}  // namespace spectralkv::cuda

namespace spectralkv::detail {

std::unique_ptr<Backend> make_cuda_backend(const GraphConfig& graph, const WalkConfig& /*walk*/,
                                           const std::vector<LayerState>& /*layers*/,
                                           Stream /*stream*/) {
  throw BackendUnavailable("[GraphManager] no backend for " + name_of(graph.device) + ": " +
                           cuda::status());
}

void decode_attention_on_cuda(const AttentionArgs& /*args*/, int device, Stream /*stream*/) {
  throw BackendUnavailable("[decode_attention] no backend for " +
                           name_of(Device{DeviceType::cuda, device}) + ": " + cuda::status());
}

}  // namespace spectralkv::detail
