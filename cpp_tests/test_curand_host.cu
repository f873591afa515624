// cuRAND's device functions, compiled for the host as well, against our Philox: needs no GPU.
#define QUALIFIERS static __forceinline__ __host__ __device__
#include <curand_kernel.h>
#include <gtest/gtest.h>

#include <cstdint>

#include "philox.h"

namespace spectralkv::detail {
namespace {

PhiloxBlock as_block(uint4 numbers) { return {numbers.x, numbers.y, numbers.z, numbers.w}; }

TEST(PhiloxVersusCurand, EveryBlockIsEqual) {
  for (const std::uint64_t seed : {0ULL, 1ULL, 0x123456789abcdefULL, ~0ULL}) {
    for (const std::uint64_t subsequence : {0ULL, 1ULL, 77ULL, 1ULL << 40U, ~0ULL}) {
      for (const std::uint64_t offset : {0ULL, 4ULL, 128ULL, (1ULL << 34U) + 8, (1ULL << 63U)}) {
        curandStatePhilox4_32_10_t state;
        curand_init(seed, subsequence, offset, &state);
        EXPECT_EQ(as_block(curand4(&state)), philox4x32_10(seed, subsequence, offset / 4))
            << "seed " << seed << " subsequence " << subsequence << " offset " << offset;
      }
    }
  }
}

// Advancing a state is advancing the block: the low counter word carries into the next one.
TEST(PhiloxVersusCurand, AStateAdvancesBlockByBlock) {
  constexpr std::uint64_t kSeed = 42;
  constexpr std::uint64_t kSubsequence = 3;
  constexpr std::uint64_t kFirstBlock = 0xfffffffeULL;
  curandStatePhilox4_32_10_t state;
  curand_init(kSeed, kSubsequence, 4 * kFirstBlock, &state);
  for (std::uint64_t block = kFirstBlock; block < kFirstBlock + 5; ++block) {
    EXPECT_EQ(as_block(curand4(&state)), philox4x32_10(kSeed, kSubsequence, block));
  }
}

}  // namespace
}  // namespace spectralkv::detail
