#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <vector>

#include "row_format.h"
#include "tensors.h"

namespace spectralkv::detail {
namespace {

constexpr std::uint32_t kAllOnes = std::numeric_limits<std::uint32_t>::max();
constexpr std::int32_t kHighestSlot = kMostPackedSlots - 1;

/// What packing makes of a threshold.
constexpr std::uint32_t packed(std::uint32_t threshold) {
  return packed_threshold(pack_edge(-1, threshold));
}

// Slots and thresholds do not reach into each other, and both ends of a threshold stay.
static_assert(packed_slot(pack_edge(-1, 0)) == -1);
static_assert(packed_slot(pack_edge(-1, kAllOnes)) == -1);
static_assert(packed_slot(pack_edge(0, kAllOnes)) == 0);
static_assert(packed_slot(pack_edge(kHighestSlot, 0)) == kHighestSlot);
static_assert(packed_slot(pack_edge(kHighestSlot, kAllOnes)) == kHighestSlot);
static_assert(packed_threshold(pack_edge(kHighestSlot, 0)) == 0);
static_assert(packed_threshold(pack_edge(0, kAllOnes)) == kAllOnes);
static_assert(packed(0) == 0 && packed(kAllOnes) == kAllOnes);

/// Ascending: both ends, what lies around every boundary, and random numbers.
std::vector<std::uint32_t> some_thresholds() {
  std::vector<std::uint32_t> thresholds;
  test::Random random(1);
  for (std::uint64_t unit = 0; unit <= 0xffff; ++unit) {
    const std::uint64_t nearest = unit * 0x10001U;
    const std::uint64_t boundary = nearest + 0x8000U;  // the last number that is rounded down
    for (const std::uint64_t threshold :
         {nearest, nearest + 1, nearest + 2 + random.bits() % 0x7ffd, boundary, boundary + 1,
          nearest + 0x10000U}) {
      if (threshold <= kAllOnes) thresholds.push_back(static_cast<std::uint32_t>(threshold));
    }
  }
  return thresholds;
}

TEST(PackEdge, RoundsThresholds) {
  std::uint32_t before = 0;
  for (const std::uint32_t threshold : some_thresholds()) {
    const std::uint32_t rounded = packed(threshold);
    // To the nearest; of two that are as near but for 2^-32 it may be the other one.
    ASSERT_LE(rounded > threshold ? rounded - threshold : threshold - rounded, 0x8001U)
        << threshold;
    ASSERT_GE(rounded, before) << threshold;
    ASSERT_EQ(packed(rounded), rounded) << threshold;
    before = rounded;
  }
}

TEST(PackEdge, KeepsEverySlot) {
  for (std::int32_t slot = -1; slot <= kHighestSlot; ++slot) {
    for (const std::uint32_t threshold : {0U, 0x12345678U, kAllOnes}) {
      const std::uint32_t word = pack_edge(slot, threshold);
      ASSERT_EQ(packed_slot(word), slot);
      ASSERT_EQ(packed_threshold(word), packed(threshold));
    }
  }
}

TEST(RowFormat, IsPackedWhereSlotsFit) {
  GraphConfig config;
  for (const EdgeLaw law : {EdgeLaw::weighted, EdgeLaw::attention}) {
    config.edge_law = law;
    config.pack_rows = true;
    EXPECT_EQ(row_format(config, 0), RowFormat::packed);
    EXPECT_EQ(row_format(config, 65535), RowFormat::packed);
    EXPECT_EQ(row_format(config, 65536), RowFormat::wide);
    config.pack_rows = false;
    EXPECT_EQ(row_format(config, 10), RowFormat::wide);
  }
  for (const bool pack : {false, true}) {
    config.edge_law = EdgeLaw::uniform;
    config.pack_rows = pack;
    EXPECT_EQ(row_format(config, 10), RowFormat::slots);
    EXPECT_EQ(row_format(config, 65536), RowFormat::slots);
  }
}

}  // namespace
}  // namespace spectralkv::detail
