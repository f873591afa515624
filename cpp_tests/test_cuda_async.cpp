// Nothing in a step waits or takes memory, streams keep their order, and a step can be captured.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "busy.h"
#include "cuda/cuda_check.h"
#include "device_tensor.h"
#include "expect.h"
#include "spectralkv/error.h"

namespace spectralkv::test {
namespace {

using cuda::check;

/// Far longer than the host needs to queue anything, far shorter than a test may take.
constexpr double kBusyMilliseconds = 300.0;

class CudaAsync : public ::testing::Test {
 protected:
  /// Kernels are loaded by their first launch, which may wait for the device.
  static void warm_up() {
    Decoder decoder(99);
    const OwnStream stream;
    decoder.step(stream);
    launch_spin(0.001, stream.handle());
    stream.synchronize();
  }

  static std::vector<Bytes> state_of(spectralkv::GraphManager& manager) {
    return Snapshot(GraphManager(manager)).tensors;
  }
  static void expect_same_state(Decoder& expected, Decoder& actual) {
    EXPECT_TRUE(state_of(expected.manager) == state_of(actual.manager));
  }
  static void expect_same_counts(Decoder& expected, Decoder& actual) {
    for (Index layer = 0; layer < Decoder::kLayers; ++layer) {
      EXPECT_EQ(expected.manager.length(layer), actual.manager.length(layer));
      for (Index b = 0; b < 2; ++b) {
        EXPECT_EQ(expected.manager.tokens_seen(layer, b), actual.manager.tokens_seen(layer, b));
        EXPECT_EQ(expected.manager.tokens_held(layer, b), actual.manager.tokens_held(layer, b));
        EXPECT_EQ(expected.manager.tokens_walked(layer, b), actual.manager.tokens_walked(layer, b));
      }
    }
  }

  class Graph {
   public:
    template <class Calls>
    Graph(const OwnStream& stream, Calls&& calls) {
      check(cudaStreamBeginCapture(stream.handle(), cudaStreamCaptureModeGlobal),
            "cudaStreamBeginCapture");
      try {
        calls();
      } catch (...) {
        static_cast<void>(cudaStreamEndCapture(stream.handle(), &graph_));
        throw;
      }
      check(cudaStreamEndCapture(stream.handle(), &graph_), "cudaStreamEndCapture");
      check(cudaGraphInstantiate(&executable_, graph_, 0), "cudaGraphInstantiate");
    }
    ~Graph() {
      if (executable_ != nullptr) static_cast<void>(cudaGraphExecDestroy(executable_));
      if (graph_ != nullptr) static_cast<void>(cudaGraphDestroy(graph_));
    }
    Graph(const Graph&) = delete;
    Graph& operator=(const Graph&) = delete;

    void replay(const OwnStream& stream) const {
      check(cudaGraphLaunch(executable_, stream.handle()), "cudaGraphLaunch");
    }

   private:
    cudaGraph_t graph_ = nullptr;
    cudaGraphExec_t executable_ = nullptr;
  };
};

TEST_F(CudaAsync, NoCallOfAStepWaitsForABusyStream) {
  warm_up();
  Decoder expected;
  Decoder decoder;
  const OwnStream stream;
  DeviceTensor scores(HostTensor(DType::f32, {2, 2, decoder.manager.length(0)}));
  DeviceTensor mask(HostTensor(DType::u8, {2, 2, decoder.manager.length(0)}));
  expected.step(stream);
  expected.step(stream);
  expected.manager.synchronize();
  launch_spin(kBusyMilliseconds, stream.handle());
  decoder.step(stream);
  decoder.step(stream);
  decoder.manager.scores(0, -1, scores.view(), stream.stream());
  decoder.manager.safety_mask(0, Decoder::eviction(), 0.2, mask.view(), stream.stream());
  EXPECT_TRUE(stream.is_busy()) << "a call waited until the stream was idle";
  stream.synchronize();
  expect_same_state(expected, decoder);
}

TEST_F(CudaAsync, ACompactionDoesNotWaitWhereTheHostKnowsWhatStays) {
  warm_up();
  Decoder decoder;
  const OwnStream stream;
  DeviceTensor keep(HostTensor(DType::i32, {2, 2, Decoder::kBudget}));
  DeviceTensor values(Decoder::random_tensor(5, {2, 2, 48, 64}));
  spectralkv::GraphManager& manager = decoder.manager;
  const auto cut = [&](Index layer) {
    manager.select(layer, Decoder::eviction(), true, keep.view(), stream.stream());
    manager.compact(layer, keep.view(), values.view(), {}, stream.stream(),
                    manager.kept_counts(layer, Decoder::eviction(), true));
  };
  cut(0);
  manager.synchronize();
  launch_spin(kBusyMilliseconds, stream.handle());
  cut(1);
  EXPECT_TRUE(stream.is_busy()) << "a call waited until the stream was idle";
  EXPECT_EQ(manager.length(1), Decoder::kBudget);
  manager.synchronize();
}

TEST_F(CudaAsync, WalksRunBesideTheCallersStream) {
  warm_up();
  Decoder expected;
  Decoder decoder;
  const OwnStream stream;
  expected.step(stream);
  decoder.step(stream);
  launch_spin(kBusyMilliseconds, stream.handle());  // decoding goes on
  decoder.manager.synchronize();
  EXPECT_TRUE(stream.is_busy()) << "the walk waited for work that came after it";
  stream.synchronize();
  expect_same_state(expected, decoder);
}

TEST_F(CudaAsync, AWalkNotBesideRunsOnTheCallersStream) {
  warm_up();
  Decoder expected;
  Decoder decoder;
  const OwnStream stream;
  for (int i = 0; i < 3; ++i) {
    expected.manager.walk(kAllLayers, {}, stream.stream());
    expected.manager.solve(0, {}, stream.stream());
  }
  expected.manager.synchronize();
  launch_spin(kBusyMilliseconds, stream.handle());
  for (int i = 0; i < 3; ++i) {
    decoder.manager.walk(kAllLayers, {}, stream.stream(), false);
    decoder.manager.solve(0, {}, stream.stream(), false);
  }
  EXPECT_TRUE(stream.is_busy()) << "a call waited until the stream was idle";
  stream.synchronize();
  expect_same_counts(expected, decoder);
  expect_same_state(expected, decoder);
}

TEST_F(CudaAsync, NewTokensDoNotWaitForAWalk) {
  warm_up();
  // A walk of a tenth of a second on a corner of the device, beside an update of microseconds.
  WalkConfig long_walk = Decoder::walk_config();
  long_walk.walk_length = 200'000;
  Decoder expected(1, long_walk);
  Decoder decoder(1, long_walk);
  const OwnStream stream;
  expected.manager.walk(kAllLayers, {}, stream.stream());
  expected.manager.synchronize();
  expected.add_token(stream);
  expected.manager.synchronize();

  const auto now = [] { return std::chrono::steady_clock::now(); };
  const auto begin = now();
  decoder.manager.walk(kAllLayers, {}, stream.stream());
  decoder.add_token(stream);
  stream.synchronize();
  const auto updated = now();
  decoder.manager.synchronize();
  const auto walked = now();
  EXPECT_LT(4 * (updated - begin), walked - begin) << "the new token waited for the walk";
  expect_same_state(expected, decoder);
  expect_same_counts(expected, decoder);
}

TEST_F(CudaAsync, ASolvePassesOverTokensThatComeMeanwhile) {
  warm_up();
  const OwnStream stream;
  for (const bool in_free_slots : {false, true}) {
    SCOPED_TRACE(::testing::Message() << "in free slots " << in_free_slots);
    Decoder expected(1, Decoder::exact_config(2));
    Decoder decoder(1, Decoder::exact_config(2));
    const auto for_layers = [&](auto&& call) {
      for (Index layer = 0; layer < Decoder::kLayers; ++layer) call(layer);
    };
    const auto run = [&](Decoder& one, bool all, bool waits) {
      if (in_free_slots) for_layers([&](Index layer) { one.free_slots(layer, stream); });
      if (all) {
        one.manager.solve(kAllLayers, {}, stream.stream());
      } else {
        one.manager.walk(kAllLayers, {}, stream.stream());
      }
      if (waits) one.manager.synchronize();
      if (in_free_slots) {
        for_layers([&](Index layer) { one.reuse_slots(layer, stream); });
      } else {
        one.add_token(stream);
      }
    };
    for (int round = 0; round < 6; ++round) {
      run(expected, round % 2 == 0, true);
      run(decoder, round % 2 == 0, false);
      expect_same_state(expected, decoder);
      expect_same_counts(expected, decoder);
    }
  }
}

TEST_F(CudaAsync, ACallersBufferMayChangeBehindACall) {
  warm_up();
  Decoder expected;
  Decoder decoder;
  const OwnStream stream;
  expected.step(stream);
  expected.manager.synchronize();
  launch_spin(50.0, stream.handle());
  decoder.step(stream);
  decoder.keys().poison(stream);
  decoder.query().poison(stream);
  expect_same_state(expected, decoder);
}

TEST_F(CudaAsync, CallsOnOtherStreamsKeepTheirOrder) {
  warm_up();
  Decoder expected;
  Decoder decoder;
  const OwnStream only;
  std::vector<std::unique_ptr<OwnStream>> streams;
  for (int i = 0; i < 3; ++i) streams.push_back(std::make_unique<OwnStream>());
  for (int i = 0; i < 12; ++i) {
    expected.step(only);
    const OwnStream& stream = *streams[static_cast<std::size_t>(i) % streams.size()];
    launch_spin(2.0, stream.handle());
    decoder.step(stream);
  }
  expect_same_state(expected, decoder);
  // A stream that is gone may leave its handle to the next one.
  for (int i = 0; i < 12; ++i) {
    expected.step(only);
    const OwnStream passing;
    launch_spin(2.0, passing.handle());
    decoder.step(passing);
  }
  expect_same_state(expected, decoder);
}

TEST_F(CudaAsync, TheDefaultStreamIsAStreamToo) {
  Decoder expected;
  Decoder decoder;
  const OwnStream stream;
  DeviceTensor scores(HostTensor(DType::f32, {2, 2, decoder.manager.length(0)}));
  expected.manager.walk(kAllLayers, {}, stream.stream());
  decoder.manager.walk(kAllLayers, {}, {});
  decoder.manager.scores(0, -1, scores.view(), {});
  expected.manager.walk(kAllLayers, {}, stream.stream());
  decoder.manager.walk(kAllLayers, {}, {cudaStreamPerThread});
  expect_same_state(expected, decoder);
}

TEST_F(CudaAsync, CallsWithoutAStreamTakeTheOneThatIsNamed) {
  warm_up();
  Decoder expected;
  Decoder decoder;
  const OwnStream stream;
  expected.step(stream);
  decoder.step(stream);
  spectralkv::GraphManager& manager = decoder.manager;
  manager.use_stream(stream.stream());
  const Index rows = expected.manager.statistics().rows_written;
  expected.manager.reset(1, 0);
  expected.manager.refresh();
  launch_spin(kBusyMilliseconds, cudaStreamLegacy);
  manager.reset(1, 0);
  EXPECT_EQ(manager.statistics().rows_written, rows);
  EXPECT_EQ(cudaStreamQuery(cudaStreamLegacy), cudaErrorNotReady)
      << "a call waited for the default stream";
  manager.refresh();
  expect_same_state(expected, decoder);
  // It may be captured meanwhile.
  const Graph graph(stream, [&] { EXPECT_EQ(manager.statistics().rows_written, rows); });
}

TEST_F(CudaAsync, AManagerIsMadeWhileItsStreamIsBusy) {
  warm_up();
  const OwnStream stream;
  launch_spin(kBusyMilliseconds, stream.handle());
  spectralkv::GraphManager manager(Decoder::graph_config(3), Decoder::walk_config(),
                                   stream.stream());
  EXPECT_TRUE(stream.is_busy()) << "it waited until the stream was idle";
  spectralkv::GraphManager expected(Decoder::graph_config(3), Decoder::walk_config());
  EXPECT_EQ(manager.save_layer(0), expected.save_layer(0));
  EXPECT_FALSE(stream.is_busy());
}

TEST_F(CudaAsync, ManagersOnTwoStreamsDoNotDisturbEachOther) {
  Decoder expected_one(1);
  Decoder expected_two(2);
  Decoder one(1);
  Decoder two(2);
  const OwnStream first;
  const OwnStream second;
  for (int i = 0; i < 30; ++i) {
    one.step(first);
    two.step(second);
  }
  for (int i = 0; i < 30; ++i) expected_one.step(first);
  for (int i = 0; i < 30; ++i) expected_two.step(first);
  expect_same_state(expected_one, one);
  expect_same_state(expected_two, two);
}

// -- CUDA graphs

TEST_F(CudaAsync, ReplaysOfACapturedStepEqualCalls) {
  warm_up();
  for (const unsigned exact : {0U, 1U, 2U, 3U}) {
    SCOPED_TRACE(::testing::Message() << "exact " << exact);
    Decoder expected(1, Decoder::exact_config(exact));
    Decoder decoder(1, Decoder::exact_config(exact));
    const OwnStream stream;
    const Graph graph(stream, [&] { decoder.step(stream); });
    expect_same_state(expected, decoder);  // nothing has run
    expect_same_counts(expected, decoder);
    for (int i = 0; i < 25; ++i) {
      expected.step(stream);
      graph.replay(stream);
    }
    decoder.manager.refresh();
    expect_same_counts(expected, decoder);
    expect_same_state(expected, decoder);
    // Calls go on where the replays ended, and replays where the calls did.
    expected.step(stream);
    decoder.step(stream);
    decoder.manager.synchronize();
    expected.step(stream);
    graph.replay(stream);
    decoder.manager.refresh();
    expect_same_counts(expected, decoder);
    expect_same_state(expected, decoder);
  }
}

TEST_F(CudaAsync, ReplaysAppendTokens) {
  warm_up();
  Decoder expected;
  Decoder decoder;
  const OwnStream stream;
  const auto append = [&](Decoder& one) {
    one.manager.update_and_step(0, one.query().view(), one.keys().view(), {}, {}, stream.stream());
  };
  const Graph graph(stream, [&] { append(decoder); });
  for (int i = 0; i < 5; ++i) {
    append(expected);
    graph.replay(stream);
  }
  decoder.manager.refresh();
  EXPECT_EQ(decoder.manager.length(0), Decoder::kBudget + 6);
  expect_same_counts(expected, decoder);
  expect_same_state(expected, decoder);
}

TEST_F(CudaAsync, AttendDoesNotWaitAndCanBeCaptured) {
  warm_up();
  Decoder expected;
  Decoder decoder;
  const OwnStream stream;
  DeviceTensor values(Decoder::random_tensor(5, {2, 2, 48, 64}));
  DeviceTensor wanted(HostTensor(DType::f16, {2, 4, 64}));
  DeviceTensor out(HostTensor(DType::f16, {2, 4, 64}));
  const auto attend = [&](Decoder& one, DeviceTensor& to) {
    one.manager.attend(0, one.query().view(), one.keys().view(), values.view(), {}, to.view(), {},
                       stream.stream());
  };
  const auto expect_same_output = [&] {
    const HostTensor right = wanted.read(stream);
    const HostTensor actual = out.read(stream);
    right.for_each([&](const std::vector<Index>& index) {
      EXPECT_NEAR(actual.get(index), right.get(index), 4e-3);
    });
  };
  attend(expected, wanted);
  launch_spin(kBusyMilliseconds, stream.handle());
  attend(decoder, out);
  EXPECT_TRUE(stream.is_busy()) << "the call waited until the stream was idle";
  expect_same_output();
  decoder.manager.synchronize();
  const Graph graph(stream, [&] { attend(decoder, out); });
  for (int i = 0; i < 4; ++i) {
    attend(expected, wanted);
    out.poison(stream);
    graph.replay(stream);
    expect_same_output();
  }
  decoder.manager.refresh();
  expect_same_counts(expected, decoder);
  expect_same_state(expected, decoder);
}

TEST_F(CudaAsync, ACaptureThatCannotWorkSaysSo) {
  warm_up();
  Decoder decoder;
  const OwnStream stream;
  DeviceTensor positions(HostTensor(DType::i32, {2, 2, 4}));
  DeviceTensor neighbors(HostTensor(DType::i32, {2, 2, 4, 8}));
  DeviceTensor probabilities(HostTensor(DType::f32, {2, 2, 4, 8}));
  DeviceTensor queries(Decoder::random_tensor(1, {2, 4, 2, 64}));
  spectralkv::GraphManager& manager = decoder.manager;
  const std::vector<Bytes> before = state_of(manager);
  const auto expect_refused = [&](const std::string& operation, auto&& call) {
    manager.synchronize();
    check(cudaStreamBeginCapture(stream.handle(), cudaStreamCaptureModeGlobal),
          "cudaStreamBeginCapture");
    try {
      call();
      ADD_FAILURE() << operation << " was captured";
    } catch (const CudaError& error) {
      EXPECT_EQ(std::string(error.what()).rfind("[" + operation + "] ", 0), 0U) << error.what();
    }
    cudaGraph_t graph = nullptr;
    EXPECT_EQ(cudaStreamEndCapture(stream.handle(), &graph), cudaSuccess) << operation;
    static_cast<void>(cudaGraphDestroy(graph));
  };
  expect_refused("update_rows", [&] {
    manager.update_rows(0, queries.view(), decoder.keys().view(), {}, stream.stream());
  });
  expect_refused("load_rows", [&] {
    manager.load_rows(0, positions.view(), neighbors.view(), probabilities.view(), stream.stream());
  });
  // The memory of the exact solver is taken by its first call.
  expect_refused("solve", [&] { manager.solve(0, {}, stream.stream()); });
  EXPECT_TRUE(before == state_of(manager));
  // Earlier work may still run.
  manager.walk(0, {}, stream.stream());
  check(cudaStreamBeginCapture(stream.handle(), cudaStreamCaptureModeGlobal),
        "cudaStreamBeginCapture");
  EXPECT_THROW(manager.walk(0, {}, stream.stream()), CudaError);
  cudaGraph_t graph = nullptr;
  EXPECT_EQ(cudaStreamEndCapture(stream.handle(), &graph), cudaSuccess);
  static_cast<void>(cudaGraphDestroy(graph));
  decoder.step(stream);
  manager.synchronize();
}

TEST_F(CudaAsync, OtherManagersLeaveACaptureAlone) {
  warm_up();
  Decoder expected;
  Decoder decoder;
  const OwnStream stream;
  const OwnStream aside;
  Decoder other(7);
  const Graph graph(stream, [&] {
    decoder.step(stream);
    other.step(aside);
    other.manager.synchronize();
    other.manager.reserve(0, 100);
    EXPECT_GT(other.manager.statistics().rows_written, 0);
    const spectralkv::GraphManager passing(Decoder::graph_config(3), Decoder::walk_config());
  });
  graph.replay(stream);
  expected.step(stream);
  decoder.manager.refresh();
  expect_same_state(expected, decoder);
}

}  // namespace
}  // namespace spectralkv::test
