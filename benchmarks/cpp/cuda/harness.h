// How GPU work is timed: captured once, replayed often, over buffers that do not fit the L2 cache.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <initializer_list>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cuda/cuda_check.h"
#include "spectralkv/config.h"

namespace spectralkv::bench {

using cuda::check;

/// Device memory that frees itself.
class Buffer {
 public:
  explicit Buffer(std::int64_t bytes) : bytes_(bytes) {
    check(cudaMalloc(&data_, static_cast<std::size_t>(bytes)), "cudaMalloc");
  }
  ~Buffer() { static_cast<void>(cudaFree(data_)); }
  Buffer(Buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  Buffer& operator=(Buffer&&) = delete;

  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  std::int64_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  std::int64_t bytes_ = 0;
};

/// Microseconds of one call: median and quartiles over replays.
struct Timing {
  double median = 0.0;
  double low = 0.0;
  double high = 0.0;
};

struct Plan {
  int calls = 1;    ///< in one captured graph; call i gets i, to choose its buffers
  int warm_up = 5;  ///< replays
  int replays = 50;
};

/// Keeps the device busy for about as long as the host takes to queue what is timed.
template <int kCycles>
__global__ void busy_kernel() {
  const long long start = clock64();
  while (clock64() - start < kCycles) {
  }
}

/// Times `work(call, stream)`: `plan.calls` of them are captured into one CUDA graph, whose replays
/// are timed with events. Cold figures need calls whose buffers together exceed the L2 cache.
inline Timing measure(const Plan& plan, const std::function<void(int, cudaStream_t)>& work) {
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
  for (int call = 0; call < plan.calls; ++call) work(call, stream);
  check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
  check(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
  cudaEvent_t begin = nullptr;
  cudaEvent_t end = nullptr;
  check(cudaEventCreate(&begin), "cudaEventCreate");
  check(cudaEventCreate(&end), "cudaEventCreate");
  for (int i = 0; i < plan.warm_up; ++i) {
    check(cudaGraphLaunch(executable, stream), "cudaGraphLaunch");
  }
  std::vector<double> times;
  for (int i = 0; i < plan.replays; ++i) {
    busy_kernel<50000><<<1, 1, 0, stream>>>();
    check(cudaGetLastError(), "busy_kernel");
    check(cudaEventRecord(begin, stream), "cudaEventRecord");
    check(cudaGraphLaunch(executable, stream), "cudaGraphLaunch");
    check(cudaEventRecord(end, stream), "cudaEventRecord");
    check(cudaEventSynchronize(end), "cudaEventSynchronize");
    float milliseconds = 0.0F;
    check(cudaEventElapsedTime(&milliseconds, begin, end), "cudaEventElapsedTime");
    times.push_back(1e3 * static_cast<double>(milliseconds) / plan.calls);
  }
  static_cast<void>(cudaEventDestroy(begin));
  static_cast<void>(cudaEventDestroy(end));
  static_cast<void>(cudaGraphExecDestroy(executable));
  static_cast<void>(cudaGraphDestroy(graph));
  static_cast<void>(cudaStreamDestroy(stream));
  std::sort(times.begin(), times.end());
  const auto quantile = [&](double q) {
    return times[static_cast<std::size_t>(q * static_cast<double>(times.size() - 1))];
  };
  return {.median = quantile(0.5), .low = quantile(0.25), .high = quantile(0.75)};
}

/// Each thread has kLoads of its block's vectors under way at once.
template <int kLoads>
__global__ void copy_kernel(const uint4* from, uint4* to, std::int64_t count) {
  const std::int64_t first =
      std::int64_t{blockIdx.x} * blockDim.x * kLoads + static_cast<std::int64_t>(threadIdx.x);
  uint4 loaded[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const std::int64_t at = first + i * std::int64_t{blockDim.x};
    if (at < count) loaded[i] = __ldcs(from + at);
  }
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const std::int64_t at = first + i * std::int64_t{blockDim.x};
    if (at < count) __stcs(to + at, loaded[i]);
  }
}

/// Bytes a second of a large copy on the device, read and written bytes counted: the memory's
/// limit. The faster of cudaMemcpy and a plain kernel; prints both.
inline double copy_bandwidth() {
  constexpr std::int64_t kBytes = std::int64_t{2} << 30U;
  constexpr int kThreads = 256;
  constexpr int kLoads = 4;
  const Buffer from(kBytes);
  const Buffer to(kBytes);
  const Plan plan{.calls = 1, .warm_up = 3, .replays = 15};
  const auto rate_of = [](const Timing& timing) {
    return 2.0 * static_cast<double>(kBytes) / (timing.median * 1e-6);
  };
  const double memcpy_rate = rate_of(measure(plan, [&](int, auto stream) {
    check(cudaMemcpyAsync(to.as<void>(), from.as<void>(), static_cast<std::size_t>(kBytes),
                          cudaMemcpyDeviceToDevice, stream),
          "cudaMemcpyAsync");
  }));
  const double kernel_rate = rate_of(measure(plan, [&](int, auto stream) {
    constexpr std::int64_t kVectors = kBytes / static_cast<std::int64_t>(sizeof(uint4));
    copy_kernel<kLoads><<<kVectors / (kThreads * kLoads), kThreads, 0, stream>>>(
        from.as<const uint4>(), to.as<uint4>(), kVectors);
    check(cudaGetLastError(), "copy_kernel");
  }));
  std::printf(
      R"({"bench": "copy", "case": "2 GiB on the device", "memcpy_gbs": %.1f, "kernel_gbs": %.1f})"
      "\n",
      1e-9 * memcpy_rate, 1e-9 * kernel_rate);
  std::fflush(stdout);
  return std::max(memcpy_rate, kernel_rate);
}

/// One line of JSON a figure: {"bench": ..., "case": ..., "us": ..., "us_quartiles": [..], ...}.
inline void print(std::string_view bench, std::string_view shape, const Timing& timing,
                  std::initializer_list<std::pair<const char*, double>> figures = {}) {
  std::printf(R"({"bench": "%.*s", "case": "%.*s", "us": %.3f, "us_quartiles": [%.3f, %.3f])",
              static_cast<int>(bench.size()), bench.data(), static_cast<int>(shape.size()),
              shape.data(), timing.median, timing.low, timing.high);
  for (const auto& [name, value] : figures) std::printf(", \"%s\": %.6g", name, value);
  std::printf("}\n");
  std::fflush(stdout);
}

/// The usual walk with walkers for all populations: what is solved exactly is the CPU's to rounding
/// only, and takes no steps.
inline WalkConfig walking() {
  WalkConfig walk;
  for (Population& population : walk.populations) population.solver = Solver::walk;
  return walk;
}

}  // namespace spectralkv::bench
