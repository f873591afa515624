// Memory of the whole device is counted: nothing else may run on it.
#include <gtest/gtest.h>

#include <utility>
#include <vector>

#include "device_tensor.h"
#include "spectralkv/error.h"
#include "spectralkv/graph_manager.h"

namespace spectralkv::test {
namespace {

TEST(CudaMemory, IsNotTakenInAStep) {
  for (const unsigned exact : {0U, 1U, 2U, 3U}) {
    SCOPED_TRACE(::testing::Message() << "exact " << exact);
    Decoder decoder(1, Decoder::exact_config(exact));
    const OwnStream stream;
    decoder.step(stream);  // loads the kernels
    decoder.manager.synchronize();
    const Index before = free_device_bytes();
    const MemoryUse use = decoder.manager.memory_use();
    for (int i = 0; i < 100; ++i) decoder.step(stream);
    decoder.manager.synchronize();
    EXPECT_EQ(free_device_bytes(), before);
    EXPECT_EQ(decoder.manager.memory_use().graph_bytes, use.graph_bytes);
    EXPECT_EQ(decoder.manager.memory_use().scratch_bytes, use.scratch_bytes);
  }
}

TEST(CudaMemory, IsThereBeforeTheFirstWalk) {
  for (const unsigned exact : {0U, 1U, 2U, 3U}) {
    SCOPED_TRACE(::testing::Message() << "exact " << exact);
    spectralkv::GraphManager manager(Decoder::graph_config(1), Decoder::exact_config(exact));
    DeviceTensor keys(Decoder::random_tensor(1, {2, 2, 100, 64}));
    manager.reserve(1, 100);
    for (Index layer = 0; layer < Decoder::kLayers; ++layer) {
      manager.update_novelty(layer, keys.view(), {});
    }
    const MemoryUse use = manager.memory_use();
    manager.walk(0, {}, {});
    manager.walk(1, {}, {});
    manager.walk(kAllLayers, {}, {});
    if (exact != 0) manager.solve(kAllLayers, {}, {});  // captured walks would lose their memory
    EXPECT_EQ(manager.memory_use().scratch_bytes, use.scratch_bytes);
  }
}

TEST(CudaMemory, IsGivenBack) {
  const OwnStream stream;
  const auto live = [&](int i) {
    const spectralkv::GraphManager idle(Decoder::graph_config(1), Decoder::walk_config());
    if (i % 10 != 0) return;
    Decoder decoder(static_cast<std::uint64_t>(i));
    decoder.step(stream);
    spectralkv::GraphManager other = std::move(decoder.manager);
    other.reserve(0, 100 + i);
    other.select_batch(0, std::vector<Index>{1, 1, 0});
  };
  live(0);  // loads the kernels
  stream.synchronize();
  const Index before = free_device_bytes();
  for (int i = 1; i <= 200; ++i) live(i);
  stream.synchronize();
  EXPECT_EQ(free_device_bytes(), before);
}

TEST(CudaMemory, IsGivenBackWhereThereIsTooLittle) {
  {
    const Decoder loads_what_the_first_one_needs;
  }
  GraphConfig config = Decoder::graph_config(1);
  config.capacity = Index{1} << 30;
  const Index before = free_device_bytes();
  for (int i = 0; i < 3; ++i) {
    EXPECT_THROW(spectralkv::GraphManager(config, Decoder::walk_config()), CudaError);
  }
  // More is free where the driver gave back what others had left to it, too.
  EXPECT_GE(free_device_bytes(), before);
}

}  // namespace
}  // namespace spectralkv::test
