// What goes wrong on a device is named, and leaves the manager usable or saying that it is not.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "busy.h"
#include "device_tensor.h"
#include "expect.h"
#include "spectralkv/error.h"
#include "spectralkv/version.h"

namespace spectralkv::test {
namespace {

template <class Error>
void expect_error(const std::vector<std::string>& parts, const std::function<void()>& call) {
  try {
    call();
    ADD_FAILURE() << "nothing was thrown";
  } catch (const Error& error) {
    const std::string message = error.what();
    for (const std::string& part : parts) {
      EXPECT_NE(message.find(part), std::string::npos) << part << " is not in: " << message;
    }
  }
}

TEST(CudaErrors, ADeviceThatIsNotThere) {
  GraphConfig config = Decoder::graph_config(1);
  config.device.index = 99;
  expect_error<BackendUnavailable>(
      {"[GraphManager]", "cuda:99", std::to_string(cuda_device_count()) + " CUDA device"},
      [&] { spectralkv::GraphManager(config, Decoder::walk_config()); });
}

TEST(CudaErrors, ATensorInHostMemory) {
  Decoder decoder;
  HostTensor keys(DType::f16, {2, 2, 48, 64});
  HostTensor scores(DType::f32, {2, 2, decoder.manager.length(0)});
  const std::vector<std::string> parts{"cuda:0", "cpu"};
  expect_error<InvalidArgument>(
      parts, [&] { decoder.manager.update(0, decoder.query().view(), keys.view(), {}, {}, {}); });
  expect_error<InvalidArgument>(parts, [&] { decoder.manager.scores(0, -1, scores.view(), {}); });
}

TEST(CudaErrors, NoMemoryForAManager) {
  GraphConfig config = Decoder::graph_config(1);
  config.capacity = Index{1} << 30;
  config.num_query_heads = 64;
  config.num_kv_heads = 64;
  for (int i = 0; i < 3; ++i) {
    expect_error<CudaError>({"cudaMalloc", "asked for", "bytes", "are free"},
                            [&] { spectralkv::GraphManager(config, Decoder::walk_config()); });
    EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  }
  const OwnStream stream;
  Decoder decoder;
  decoder.step(stream);
  EXPECT_NO_THROW(decoder.manager.synchronize());
}

TEST(CudaErrors, NoMemoryForMoreCapacity) {
  Decoder decoder;
  GraphManager manager(decoder.manager);
  const Snapshot before(manager);
  expect_error<CudaError>({"cudaMalloc", "asked for"},
                          [&] { decoder.manager.reserve(0, (Index{1} << 31) - 1); });
  EXPECT_TRUE(before == Snapshot(manager));
  const OwnStream stream;
  decoder.step(stream);
  EXPECT_NO_THROW(decoder.manager.synchronize());
}

// -- what only the device can see

class DeviceFaults : public ::testing::Test {
 protected:
  DeviceTensor slots(Index slot) {
    HostTensor slots(DType::i32, {2, 2});
    slots.fill(static_cast<double>(slot));
    return DeviceTensor(slots);
  }
  /// The call checks its list first, and may have news of that when it goes on.
  static void raise_or_return(const std::function<void()>& call) {
    try {
      call();
    } catch (const InvalidArgument&) {
    }
  }
  /// The fault came to light, and stays until all is reset.
  void expect_faulty(std::string_view operation) {
    expect_invalid(operation, [&] { decoder.manager.synchronize(); });
    EXPECT_THROW(decoder.manager.walk(0, {}, stream.stream()), InvalidArgument);
    EXPECT_THROW(decoder.step(stream), InvalidArgument);
    EXPECT_THROW(decoder.manager.reset(1), InvalidArgument);
    EXPECT_THROW(decoder.manager.reserve(0, 100), InvalidArgument);
  }
  void expect_recovery() {
    decoder.manager.reset(kAllLayers);
    EXPECT_EQ(decoder.manager.length(0), 0);
    EXPECT_EQ(decoder.manager.tokens_held(0, 1), 0);
    for (int i = 0; i < 3; ++i) {
      decoder.manager.update_and_step(0, decoder.query().view(), decoder.keys().view(), {}, {},
                                      stream.stream());
    }
    decoder.manager.synchronize();
    EXPECT_EQ(read_positions(GraphManager(decoder.manager), 0).vector({1, 0}),
              (std::vector<double>{0, 1, 2}));
  }

  OwnStream stream;
  Decoder decoder;
};

TEST_F(DeviceFaults, ASlotThatHoldsAToken) {
  DeviceTensor bad = slots(3);
  const HostTensor before = read_positions(GraphManager(decoder.manager), 0);
  decoder.manager.update(0, decoder.query().view(), decoder.keys().view(), bad.view(), {},
                         stream.stream());
  expect_faulty("update");
  expect_recovery();
}

TEST_F(DeviceFaults, ASlotOutsideTheCapacity) {
  DeviceTensor bad = slots(1 << 20);
  decoder.manager.update(0, decoder.query().view(), decoder.keys().view(), bad.view(), {},
                         stream.stream());
  expect_faulty("update");
  expect_recovery();
}

TEST_F(DeviceFaults, AKeptSlotThatIsNotInUse) {
  HostTensor keep(DType::i32, {2, 2, 3});
  keep.for_each([&](const std::vector<Index>& index) {
    keep.set(index, index[0] == 1 && index[2] == 2 ? 47.0 : static_cast<double>(index[2]));
  });
  DeviceTensor bad(keep);
  const std::vector<Index> kept{3, 3};
  raise_or_return([&] { decoder.manager.release(0, bad.view(), stream.stream(), kept); });
  expect_faulty("synchronize");
  expect_recovery();
}

TEST_F(DeviceFaults, AnotherNumberOfKeptSlots) {
  HostTensor keep(DType::i32, {2, 2, 3});
  keep.for_each(
      [&](const std::vector<Index>& index) { keep.set(index, static_cast<double>(index[2])); });
  DeviceTensor three(keep);
  const std::vector<Index> two{2, 3};
  raise_or_return([&] { decoder.manager.compact(1, three.view(), {}, {}, stream.stream(), two); });
  expect_faulty("synchronize");
  expect_recovery();
}

// -- errors that stay with the process

using CudaErrorsDeathTest = ::testing::Test;

/// In a child process: the device breaks, the manager says so by the failed call, and goes.
void break_the_device() {
  {
    const OwnStream stream;
    Decoder decoder;
    decoder.step(stream);
    decoder.manager.synchronize();
    launch_trap(stream.handle());
    static_cast<void>(cudaStreamSynchronize(stream.handle()));
    for (int i = 0; i < 2; ++i) {
      try {
        decoder.step(stream);
        std::fprintf(stderr, "nothing was thrown\n");
      } catch (const CudaError& error) {
        std::fprintf(stderr, "CudaError %s\n", error.what());
      }
    }
    try {
      decoder.manager.reset(kAllLayers);
      std::fprintf(stderr, "reset threw nothing\n");
    } catch (const CudaError& error) {
      std::fprintf(stderr, "CudaError %s\n", error.what());
    }
  }
  std::fprintf(stderr, "the manager is gone\n");
  std::_Exit(0);
}

TEST_F(CudaErrorsDeathTest, OfSomebodyElseIsNamed) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(break_the_device(), ::testing::ExitedWithCode(0),
              "CudaError cuda[A-Za-z]+: .*\n.*CudaError .*\n.*CudaError .*\n.*the manager is gone");
}

}  // namespace
}  // namespace spectralkv::test
