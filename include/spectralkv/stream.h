// An opaque queue of device work.
#pragma once

namespace spectralkv {

/// The queue on which a call is ordered. On CUDA `handle` is a cudaStream_t; on the CPU, where
/// every call has finished when it returns, it is ignored.
struct Stream {
  void* handle = nullptr;
};

}  // namespace spectralkv
