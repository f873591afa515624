#include <gtest/gtest.h>

#include "cuda/philox.h"
#include "spectralkv/error.h"

namespace spectralkv::cuda {
namespace {

TEST(PhiloxLauncher, RefusesBadArgumentsBeforeItNeedsADevice) {
  EXPECT_THROW(launch_philox_fill(nullptr, -1, 1, 0, 0, nullptr), InvalidArgument);
  EXPECT_THROW(launch_philox_fill(nullptr, 1, 1, 0, 2, nullptr), InvalidArgument);
}

}  // namespace
}  // namespace spectralkv::cuda
