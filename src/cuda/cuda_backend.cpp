// Where the CUDA backend is made. It has no kernels yet, so asking for it says why there is none.
#include <memory>
#include <string>

#include "backend.h"
#include "cuda/cuda_device.h"
#include "spectralkv/error.h"

namespace spectralkv::detail {

std::unique_ptr<Backend> make_cuda_backend(const GraphConfig& graph, const WalkConfig& /*walk*/,
                                           const std::vector<LayerState>& /*layers*/) {
  const std::string reason = cuda::is_built()
                                 ? "this version of libspectralkv runs graphs on the CPU only"
                                 : cuda::status();
  throw BackendUnavailable("[GraphManager] no backend for " + name_of(graph.device) + ": " +
                           reason);
}

}  // namespace spectralkv::detail
