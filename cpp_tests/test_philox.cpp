#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <set>

#include "philox.h"

namespace spectralkv::detail {
namespace {

struct KnownAnswer {
  PhiloxBlock counter;
  PhiloxKey key;
  PhiloxBlock expected;
};

// `philox4x32 10` of Random123's kat_vectors.
constexpr std::array<KnownAnswer, 3> kKnownAnswers{{
    {{0x00000000, 0x00000000, 0x00000000, 0x00000000},
     {0x00000000, 0x00000000},
     {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
    {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
     {0xffffffff, 0xffffffff},
     {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
    {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
     {0xa4093822, 0x299f31d0},
     {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
}};

constexpr bool known_answers_hold() {
  for (const KnownAnswer& answer : kKnownAnswers) {
    if (philox4x32_10(answer.counter, answer.key) != answer.expected) {
      return false;
    }
  }
  return true;
}
static_assert(known_answers_hold());

TEST(Philox, GivesTheKnownAnswersOfRandom123) {
  for (const KnownAnswer& answer : kKnownAnswers) {
    EXPECT_EQ(philox4x32_10(answer.counter, answer.key), answer.expected);
  }
}

TEST(Philox, PlacesSeedSubsequenceAndBlockAsCurandDoes) {
  const KnownAnswer& answer = kKnownAnswers[2];
  const auto join = [](std::uint32_t low, std::uint32_t high) {
    return std::uint64_t{high} << 32U | low;
  };
  const std::uint64_t seed = join(answer.key[0], answer.key[1]);
  const std::uint64_t block = join(answer.counter[0], answer.counter[1]);
  const std::uint64_t subsequence = join(answer.counter[2], answer.counter[3]);
  EXPECT_EQ(philox4x32_10(seed, subsequence, block), answer.expected);
}

TEST(Philox, IsAnInjectionOfTheCounter) {
  std::set<PhiloxBlock> seen;
  for (std::uint64_t subsequence = 0; subsequence < 64; ++subsequence) {
    for (std::uint64_t block = 0; block < 64; ++block) {
      EXPECT_TRUE(seen.insert(philox4x32_10(7, subsequence, block)).second);
    }
  }
}

}  // namespace
}  // namespace spectralkv::detail
