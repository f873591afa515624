#include <gtest/gtest.h>

#include <regex>

#include "spectralkv/version.h"

namespace spectralkv {
namespace {

TEST(Version, IsMajorMinorPatch) {
  EXPECT_TRUE(std::regex_match(version(), std::regex(R"(\d+\.\d+\.\d+)"))) << version();
}

TEST(Cuda, TellsWhyThereIsNoDevice) {
  EXPECT_GE(cuda_device_count(), 0);
  EXPECT_EQ(cuda_device_count() == 0, !cuda_status().empty()) << cuda_status();
  if (!built_with_cuda()) {
    EXPECT_EQ(cuda_device_count(), 0);
  }
}

}  // namespace
}  // namespace spectralkv
