#include "cuda/stream_order.h"

#include <string>
#include <string_view>

#include "cuda/cuda_check.h"
#include "cuda/device_memory.h"
#include "spectralkv/error.h"

namespace spectralkv::cuda {

StreamOrder::StreamOrder() {
  try {
    check(cudaEventCreateWithFlags(&last_, cudaEventDisableTiming), "cudaEventCreateWithFlags");
    check(cudaEventCreateWithFlags(&walk_, cudaEventDisableTiming), "cudaEventCreateWithFlags");
    check(cudaEventCreateWithFlags(&ready_, cudaEventDisableTiming), "cudaEventCreateWithFlags");
  } catch (...) {
    if (last_ != nullptr) static_cast<void>(cudaEventDestroy(last_));
    if (walk_ != nullptr) static_cast<void>(cudaEventDestroy(walk_));
    throw;
  }
}

StreamOrder::~StreamOrder() {
  const CaptureGuard captures;
  // The memory that queued work uses is freed next.
  if (!idle_) static_cast<void>(cudaEventSynchronize(last_));
  if (side_ != nullptr) {
    static_cast<void>(cudaStreamSynchronize(side_));
    static_cast<void>(cudaStreamDestroy(side_));
  }
  static_cast<void>(cudaEventDestroy(last_));
  static_cast<void>(cudaEventDestroy(walk_));
  static_cast<void>(cudaEventDestroy(ready_));
  static_cast<void>(cudaGetLastError());
}

bool StreamOrder::is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  // The legacy default stream cannot be captured, and asking for it disturbs captures of others.
  if (stream == nullptr || stream == cudaStreamLegacy) return false;
  check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

unsigned long long StreamOrder::id_of(cudaStream_t stream) {
  unsigned long long id = 0;
  check(cudaStreamGetId(stream, &id), "cudaStreamGetId");
  return id;
}

void StreamOrder::wait_for_last(cudaStream_t stream) {
  if (!idle_ && last_stream_ != id_of(stream)) {
    check(cudaStreamWaitEvent(stream, last_, 0), "cudaStreamWaitEvent");
  }
}

void StreamOrder::wait_for_walk(cudaStream_t stream) {
  if (walks_) check(cudaStreamWaitEvent(stream, walk_, 0), "cudaStreamWaitEvent");
  joined_ = true;
}

void StreamOrder::check_idle(std::string_view operation) const {
  if (idle_ && !walks_) return;
  throw CudaError("[" + std::string(operation) +
                  "] the manager must be idle when it is captured: call synchronize() before");
}

void StreamOrder::enter(cudaStream_t stream, std::string_view operation) {
  if (is_capturing(stream)) {
    check_idle(operation);
    return;
  }
  wait_for_last(stream);
  wait_for_walk(stream);
}

void StreamOrder::enter_beside_walk(cudaStream_t stream, std::string_view operation) {
  if (is_capturing(stream)) {
    check_idle(operation);
    return;
  }
  wait_for_last(stream);
  joined_ = false;
}

void StreamOrder::leave(cudaStream_t stream) {
  if (is_capturing(stream)) return;
  check(cudaEventRecord(last_, stream), "cudaEventRecord");
  last_stream_ = id_of(stream);
  idle_ = false;
  if (joined_) walks_ = false;
}

cudaStream_t StreamOrder::side() {
  if (side_ == nullptr) {
    int lowest = 0;
    int highest = 0;
    check(cudaDeviceGetStreamPriorityRange(&lowest, &highest), "cudaDeviceGetStreamPriorityRange");
    check(cudaStreamCreateWithPriority(&side_, cudaStreamNonBlocking, lowest),
          "cudaStreamCreateWithPriority");
  }
  return side_;
}

cudaStream_t StreamOrder::fork_walk(cudaStream_t stream) {
  const cudaStream_t side = this->side();
  check(cudaEventRecord(ready_, stream), "cudaEventRecord");
  check(cudaStreamWaitEvent(side, ready_, 0), "cudaStreamWaitEvent");
  return side;
}

void StreamOrder::leave_walk() {
  check(cudaEventRecord(walk_, side_), "cudaEventRecord");
  walks_ = true;
}

cudaStream_t StreamOrder::own() {
  // While a blocking stream is captured, the legacy one may not be used.
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const bool is_free =
      cudaStreamIsCapturing(used_, &status) == cudaSuccess && status == cudaStreamCaptureStatusNone;
  if (!is_free) static_cast<void>(cudaGetLastError());
  const cudaStream_t stream = is_free ? used_ : side();
  wait_for_last(stream);
  wait_for_walk(stream);
  return stream;
}

void StreamOrder::synchronize() {
  if (!idle_) check(cudaEventSynchronize(last_), "cudaEventSynchronize");
  idle_ = true;
  if (walks_) check(cudaEventSynchronize(walk_), "cudaEventSynchronize");
  walks_ = false;
}

}  // namespace spectralkv::cuda
