// In which order the work of one manager runs: on the caller's streams and on its own side stream.
#pragma once

#include <cuda_runtime_api.h>

#include <string_view>

namespace spectralkv::cuda {

/// Owns three events and, from the first walk beside other work on, a non-blocking side stream of
/// the lowest priority. The calls of a manager do not overlap on the host, so the order of the
/// calls is the order that the device must keep: whoever comes next waits, on the device, for the
/// last work on another stream. One exception: a walk beside, or a solve, which counts as one here,
/// reads nothing that a new token changes, so new tokens do not wait for it.
///
/// No stream is used without need: kernels that come by two streams in turns make those of replayed
/// CUDA graphs follow each other later from then on, as seen on an H200: a tenth of a step where
/// kernels are small.
class StreamOrder {
 public:
  /// On the current device.
  StreamOrder();
  ~StreamOrder();
  StreamOrder(const StreamOrder&) = delete;
  StreamOrder& operator=(const StreamOrder&) = delete;

  static bool is_capturing(cudaStream_t stream);

  /// Before work on the caller's stream. Throws CudaError where a capture begins while earlier work
  /// may still run: a captured stream cannot wait for it.
  void enter(cudaStream_t stream, std::string_view operation);
  /// The same, but a walk may still be under way.
  void enter_beside_walk(cudaStream_t stream, std::string_view operation);
  /// After work, whatever stream it was queued on.
  void leave(cudaStream_t stream);

  /// Before a walk or a solve beside, whose beginning was just queued on `stream`. Returns the side
  /// stream.
  cudaStream_t fork_walk(cudaStream_t stream);
  /// After it.
  void leave_walk();
  /// Names the stream of calls that come without one; the legacy default stream before.
  void use(cudaStream_t stream) { used_ = stream == nullptr ? cudaStreamLegacy : stream; }
  /// It, or the side stream where a capture keeps it from being used, ordered behind all earlier
  /// work.
  cudaStream_t own();

  /// Waits for all work of the manager.
  void synchronize();

 private:
  cudaStream_t side();
  static unsigned long long id_of(cudaStream_t stream);
  void check_idle(std::string_view operation) const;
  void wait_for_last(cudaStream_t stream);
  void wait_for_walk(cudaStream_t stream);

  cudaStream_t used_ = cudaStreamLegacy;
  cudaStream_t side_ = nullptr;
  cudaEvent_t last_ = nullptr;  ///< after the latest work but a walk
  cudaEvent_t walk_ = nullptr;  ///< after the latest walk
  cudaEvent_t ready_ = nullptr;
  /// A handle may come again for another stream, its number never.
  unsigned long long last_stream_ = 0;
  bool idle_ = true;     ///< nothing but a walk was queued since the last synchronization
  bool walks_ = false;   ///< the latest work does not follow the latest walk
  bool joined_ = false;  ///< the work that is being queued does
};

}  // namespace spectralkv::cuda
