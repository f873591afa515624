#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <vector>

#include "cuda/cuda_check.h"
#include "device.h"
#include "spectralkv/version.h"
#include "tensors.h"

namespace spectralkv::test {
namespace {

using cuda::check;

class NeedsDevice : public ::testing::Environment {
 public:
  void SetUp() override {
    // CTest takes a test for skipped by these words, which GoogleTest leaves out here.
    if (cuda_device_count() == 0) GTEST_SKIP() << "[  SKIPPED ] " << cuda_status();
  }
};
const ::testing::Environment* const needs_device =
    ::testing::AddGlobalTestEnvironment(new NeedsDevice);

/// Two streams that take turns, so that every call has to be ordered behind one on another stream.
/// Neither waits for the default stream: a launch that went there by mistake shows.
cudaStream_t next_stream() {
  static const std::array<cudaStream_t, 2> streams = [] {
    // Copies come and go with every call: their memory stays.
    cudaMemPool_t pool = nullptr;
    check(cudaDeviceGetDefaultMemPool(&pool, 0), "cudaDeviceGetDefaultMemPool");
    std::uint64_t all = std::numeric_limits<std::uint64_t>::max();
    check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &all),
          "cudaMemPoolSetAttribute");
    std::array<cudaStream_t, 2> created{};
    for (cudaStream_t& stream : created) {
      check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    }
    return created;
  }();
  static std::atomic<std::size_t> turn = 0;
  return streams[turn++ % streams.size()];
}

}  // namespace

GraphConfig on_tested_device(GraphConfig config) {
  config.device = {DeviceType::cuda, 0};
  config.eager_checks = true;
  return config;
}

struct DeviceCall::Mirrors {
  struct Mirror {
    HostRange host;
    std::byte* device = nullptr;
    bool written = false;
  };

  cudaStream_t stream = next_stream();
  std::vector<Mirror> mirrors;

  std::byte* mirror(const void* data, bool written) {
    const auto* address = static_cast<const std::byte*>(data);
    for (Mirror& one : mirrors) {
      if (address < one.host.data || address >= one.host.data + one.host.bytes) continue;
      one.written = one.written || written;
      return one.device + (address - one.host.data);
    }
    const HostRange host = HostRanges::find(address);
    if (host.data == nullptr) throw std::logic_error("a test's tensor is no HostTensor");
    mirrors.push_back({.host = host, .device = nullptr, .written = written});
    Mirror& one = mirrors.back();
    void* memory = nullptr;
    check(cudaMallocAsync(&memory, host.bytes, stream), "cudaMallocAsync");
    one.device = static_cast<std::byte*>(memory);
    check(cudaMemcpyAsync(memory, host.data, host.bytes, cudaMemcpyHostToDevice, stream),
          "cudaMemcpyAsync");
    return one.device + (address - host.data);
  }

  template <class View>
  View view_of(View view, bool written) {
    if (view.empty()) return view;
    if (view.device != Device{}) {
      view.device = {};
      return view;
    }
    view.device = {DeviceType::cuda, 0};
    if (view.data != nullptr) view.data = mirror(view.data, written);
    return view;
  }

  void finish() {
    bool waits = false;
    for (const Mirror& one : mirrors) {
      if (one.written) {
        check(cudaMemcpyAsync(one.host.data, one.device, one.host.bytes, cudaMemcpyDeviceToHost,
                              stream),
              "cudaMemcpyAsync");
        waits = true;
      }
      constexpr int kPoison = 0xff;
      check(cudaMemsetAsync(one.device, kPoison, one.host.bytes, stream), "cudaMemsetAsync");
      check(cudaFreeAsync(one.device, stream), "cudaFreeAsync");
    }
    if (waits) check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  }
};

DeviceCall::DeviceCall(Device device)
    : mirrors_(device.type == DeviceType::cuda ? std::make_unique<Mirrors>() : nullptr) {}

DeviceCall::~DeviceCall() {
  if (mirrors_ == nullptr) return;
  try {
    mirrors_->finish();
  } catch (const CudaError& error) {
    ADD_FAILURE() << error.what();
  }
}

ConstTensorView DeviceCall::operator()(const ConstTensorView& read) {
  return mirrors_ == nullptr ? read : mirrors_->view_of(read, false);
}
TensorView DeviceCall::operator()(const TensorView& written) {
  return mirrors_ == nullptr ? written : mirrors_->view_of(written, true);
}
Stream DeviceCall::stream() const {
  return mirrors_ == nullptr ? Stream{} : Stream{mirrors_->stream};
}

}  // namespace spectralkv::test
