// Tensors in device memory and streams, for tests that are about CUDA itself.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <memory>
#include <utility>
#include <vector>

#include "cuda/cuda_check.h"
#include "graph.h"
#include "manager.h"
#include "tensors.h"

namespace spectralkv::test {

class OwnStream {
 public:
  OwnStream() {
    cuda::check(cudaStreamCreateWithFlags(&handle_, cudaStreamNonBlocking),
                "cudaStreamCreateWithFlags");
  }
  ~OwnStream() { static_cast<void>(cudaStreamDestroy(handle_)); }
  OwnStream(const OwnStream&) = delete;
  OwnStream& operator=(const OwnStream&) = delete;

  cudaStream_t handle() const { return handle_; }
  Stream stream() const { return {handle_}; }
  bool is_busy() const {
    const cudaError_t status = cudaStreamQuery(handle_);
    if (status == cudaErrorNotReady) return true;
    cuda::check(status, "cudaStreamQuery");
    return false;
  }
  void synchronize() const { cuda::check(cudaStreamSynchronize(handle_), "cudaStreamSynchronize"); }

 private:
  cudaStream_t handle_ = nullptr;
};

/// A copy of a HostTensor, made at once.
class DeviceTensor {
 public:
  explicit DeviceTensor(const HostTensor& host) : host_(host) {
    void* memory = nullptr;
    cuda::check(cudaMalloc(&memory, host.bytes().size()), "cudaMalloc");
    memory_.reset(memory);
    cuda::check(cudaMemcpy(memory, host.bytes().data(), host.bytes().size(), cudaMemcpyDefault),
                "cudaMemcpy");
  }

  TensorView view() {
    TensorView view = host_.view();
    view.data = memory_.get();
    view.device = {DeviceType::cuda, 0};
    return view;
  }
  /// Behind what `stream` holds; waits.
  HostTensor read(const OwnStream& stream) const {
    HostTensor result = host_;
    cuda::check(cudaMemcpyAsync(result.view().data, memory_.get(), result.bytes().size(),
                                cudaMemcpyDefault, stream.handle()),
                "cudaMemcpyAsync");
    stream.synchronize();
    return result;
  }
  /// NaN everywhere, in the order of the stream.
  void poison(const OwnStream& stream) {
    cuda::check(cudaMemsetAsync(memory_.get(), 0xff, host_.bytes().size(), stream.handle()),
                "cudaMemsetAsync");
  }

 private:
  struct Free {
    void operator()(void* memory) const { static_cast<void>(cudaFree(memory)); }
  };

  HostTensor host_;
  std::unique_ptr<void, Free> memory_;
};

inline Index free_device_bytes() {
  std::size_t free = 0;
  std::size_t total = 0;
  cuda::check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  return static_cast<Index>(free);
}

/// A manager in the middle of decoding: its cache is a token over the budget, and every step cuts
/// it and puts a new token into a free slot. Keys and query stay the same, so that a step depends
/// on the manager's state alone.
class Decoder {
 public:
  static constexpr Index kBudget = 40;
  static constexpr Index kLayers = 2;

  explicit Decoder(std::uint64_t seed = 1, const WalkConfig& walk = walk_config())
      : manager(graph_config(seed), walk),
        keys_(random_tensor(seed, {2, 2, kCapacity, 64})),
        queries_(random_tensor(seed + 1, {2, 4, kBudget + 1, 64})),
        query_(random_tensor(seed + 2, {2, 4, 64})),
        slots_(HostTensor(DType::i32, {2, 2})),
        keep_(HostTensor(DType::i32, {2, 2, kBudget})) {
    for (Index layer = 0; layer < kLayers; ++layer) {
      manager.update_rows(layer, queries_.view(), keys_.view(), {}, {});
      manager.update_novelty(layer, keys_.view(), {});
    }
    manager.walk(kAllLayers, {}, {});
    manager.synchronize();
  }

  void step(const OwnStream& on) {
    for (Index layer = 0; layer < kLayers; ++layer) {
      free_slots(layer, on);
      reuse_slots(layer, on);
      manager.update_novelty(layer, keys_.view(), on.stream());
    }
    manager.walk(kAllLayers, {}, on.stream());
  }

  void free_slots(Index layer, const OwnStream& on) {
    manager.select(layer, eviction(), true, keep_.view(), on.stream());
    manager.release(layer, keep_.view(), on.stream(), manager.kept_counts(layer, eviction(), true));
  }

  void reuse_slots(Index layer, const OwnStream& on) {
    manager.next_slots(layer, slots_.view(), on.stream());
    manager.update(layer, query_.view(), keys_.view(), slots_.view(), {}, on.stream());
  }

  /// Behind all others, and every layer gets it.
  void add_token(const OwnStream& on) {
    for (Index layer = 0; layer < kLayers; ++layer) {
      manager.update(layer, query_.view(), keys_.view(), {}, {}, on.stream());
    }
  }

  static EvictionConfig eviction() {
    return {.budget = kBudget, .interval = 1, .window = 8, .sinks = 2};
  }
  static GraphConfig graph_config(std::uint64_t seed) {
    return {.num_layers = kLayers,
            .batch_size = 2,
            .num_query_heads = 4,
            .num_kv_heads = 2,
            .head_dim = 64,
            .capacity = kCapacity,
            .num_sinks = 2,
            .seed = seed,
            .device = {DeviceType::cuda, 0}};
  }
  static WalkConfig walk_config() {
    return {.num_walkers = 256,
            .decay = 0.5,
            .populations = {{.share = 0.5},
                            {.restart = Restart::novelty, .count = VisitCount::all, .share = 0.5}}};
  }
  /// The same with these populations (bits) solved exactly.
  static WalkConfig exact_config(unsigned exact) {
    WalkConfig walk = walk_config();
    for (std::size_t p = 0; p < walk.populations.size(); ++p) {
      if ((exact >> p & 1U) != 0) walk.populations[p].solver = Solver::exact;
    }
    return walk;
  }
  static HostTensor random_tensor(std::uint64_t seed, const std::vector<Index>& shape) {
    HostTensor tensor(DType::f16, shape);
    Random random(seed);
    tensor.fill_normal(random);
    return tensor;
  }

  DeviceTensor& keys() { return keys_; }
  DeviceTensor& query() { return query_; }

  spectralkv::GraphManager manager;

 private:
  static constexpr Index kCapacity = 48;

  DeviceTensor keys_;
  DeviceTensor queries_;
  DeviceTensor query_;
  DeviceTensor slots_;
  DeviceTensor keep_;
};

}  // namespace spectralkv::test
