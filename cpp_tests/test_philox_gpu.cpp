#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "cuda/cuda_check.h"
#include "cuda/philox.h"
#include "philox.h"

namespace spectralkv::cuda {
namespace {

struct FreeDeviceMemory {
  void operator()(void* memory) const { cudaFree(memory); }
};

class PhiloxGpu : public testing::Test {
 protected:
  void SetUp() override {
    // A blocking stream would hide a launch that went to the default stream.
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  }

  void TearDown() override {
    if (stream_ != nullptr) {
      cudaStreamDestroy(stream_);
    }
  }

  std::vector<std::uint32_t> fill(std::int64_t blocks, std::uint64_t seed,
                                  std::uint64_t subsequence, std::uint64_t offset) {
    std::vector<std::uint32_t> numbers(static_cast<std::size_t>(4 * blocks));
    const std::size_t bytes = numbers.size() * sizeof(std::uint32_t);
    void* memory = nullptr;
    check(cudaMalloc(&memory, bytes), "cudaMalloc");
    const std::unique_ptr<void, FreeDeviceMemory> owner(memory);
    launch_philox_fill(static_cast<std::uint32_t*>(memory), blocks, seed, subsequence, offset,
                       stream_);
    check(cudaMemcpyAsync(numbers.data(), memory, bytes, cudaMemcpyDeviceToHost, stream_),
          "cudaMemcpyAsync");
    check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
    return numbers;
  }

  cudaStream_t stream_ = nullptr;
};

TEST_F(PhiloxGpu, DrawsWhatTheCpuDraws) {
  for (const std::int64_t blocks : {1, 3, 255, 256, 257, 100'000}) {
    for (const std::uint64_t subsequence : {0ULL, 77ULL, 1ULL << 40U}) {
      constexpr std::uint64_t kSeed = 0x123456789abcdefULL;
      constexpr std::uint64_t kOffset =
          (1ULL << 34U) - 8;  // so that the low counter word overflows
      const std::vector<std::uint32_t> numbers = fill(blocks, kSeed, subsequence, kOffset);
      for (std::int64_t i = 0; i < blocks; ++i) {
        const auto expected =
            detail::philox4x32_10(kSeed, subsequence, kOffset / 4 + static_cast<std::uint64_t>(i));
        for (std::size_t word = 0; word < 4; ++word) {
          ASSERT_EQ(numbers[static_cast<std::size_t>(4 * i) + word], expected[word])
              << "block " << i << " of " << blocks << ", word " << word;
        }
      }
    }
  }
}

TEST_F(PhiloxGpu, QueuesNothingForNoBlocks) {
  EXPECT_NO_THROW(launch_philox_fill(nullptr, 0, 1, 0, 0, stream_));
}

}  // namespace
}  // namespace spectralkv::cuda
