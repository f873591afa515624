// Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw, "Parallel random
// numbers: as easy as 1, 2, 3", SC 2011, laid out as cuRAND lays it out, so that CPU and CUDA draw
// the same numbers.
#pragma once

#include <array>
#include <cstdint>

namespace spectralkv::detail {

using PhiloxBlock = std::array<std::uint32_t, 4>;
using PhiloxKey = std::array<std::uint32_t, 2>;

/// The ten rounds as published: four counter words and two key words give four random words.
constexpr PhiloxBlock philox4x32_10(PhiloxBlock counter, PhiloxKey key) noexcept {
  constexpr std::uint64_t kMultiplier0 = 0xD2511F53;
  constexpr std::uint64_t kMultiplier1 = 0xCD9E8D57;
  constexpr std::uint32_t kWeyl0 = 0x9E3779B9;
  constexpr std::uint32_t kWeyl1 = 0xBB67AE85;
  constexpr int kRounds = 10;
  for (int round = 0; round < kRounds; ++round) {
    const std::uint64_t product0 = kMultiplier0 * counter[0];
    const std::uint64_t product1 = kMultiplier1 * counter[2];
    counter = {static_cast<std::uint32_t>(product1 >> 32U) ^ counter[1] ^ key[0],
               static_cast<std::uint32_t>(product1),
               static_cast<std::uint32_t>(product0 >> 32U) ^ counter[3] ^ key[1],
               static_cast<std::uint32_t>(product0)};
    key[0] += kWeyl0;
    key[1] += kWeyl1;
  }
  return counter;
}

/// What `curand4` returns for a state made by `curand_init(seed, subsequence, 4 * block)`: the seed
/// is the key, the block counts in the low two words of the counter, the subsequence in the high
/// two.
constexpr PhiloxBlock philox4x32_10(std::uint64_t seed, std::uint64_t subsequence,
                                    std::uint64_t block) noexcept {
  return philox4x32_10(
      PhiloxBlock{static_cast<std::uint32_t>(block), static_cast<std::uint32_t>(block >> 32U),
                  static_cast<std::uint32_t>(subsequence),
                  static_cast<std::uint32_t>(subsequence >> 32U)},
      PhiloxKey{static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32U)});
}

}  // namespace spectralkv::detail
