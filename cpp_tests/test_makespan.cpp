#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <vector>

#include "cuda/makespan.h"
#include "tensors.h"

namespace spectralkv::cuda {
namespace {

using test::at;
using test::Index;

/// One job after the other, machine by machine.
Index simulated(const std::vector<EqualJobs>& jobs, Index machines) {
  std::vector<Index> free_at(at(machines), 0);
  for (const EqualJobs& equal : jobs) {
    for (Index i = 0; i < equal.count; ++i) {
      *std::min_element(free_at.begin(), free_at.end()) += equal.duration;
    }
  }
  return *std::max_element(free_at.begin(), free_at.end());
}

/// As many of each duration.
std::vector<EqualJobs> jobs_of(Index count, const std::vector<Index>& durations) {
  std::vector<EqualJobs> jobs;
  jobs.reserve(durations.size());
  for (const Index duration : durations) jobs.push_back({.count = count, .duration = duration});
  return jobs;
}

TEST(Makespan, OfEqualJobsIsThatOfFullRounds) {
  EXPECT_EQ(makespan(jobs_of(1, {7}), 5), 7);
  EXPECT_EQ(makespan(jobs_of(10, {7}), 5), 14);
  EXPECT_EQ(makespan(jobs_of(11, {7}), 5), 21);
  EXPECT_EQ(makespan(jobs_of(8, {3}), 1), 24);
  EXPECT_EQ(makespan(jobs_of(0, {7}), 5), 0);
  EXPECT_EQ(makespan({}, 5), 0);
}

TEST(Makespan, IsTheLongestJobWhereShortOnesFitBesideIt) {
  EXPECT_EQ(makespan(jobs_of(1, {20, 5, 5, 5, 5}), 8), 20);
  EXPECT_EQ(makespan(jobs_of(1, {20, 5, 5, 5, 5}), 2), 20);
  EXPECT_EQ(makespan(jobs_of(2, {20, 5, 5, 5, 5}), 3), 30);
  // The last of eight begins when the shortest of the seven before it ends.
  EXPECT_EQ(makespan(jobs_of(1, {16, 14, 13, 12, 12, 11, 10, 4}), 7), 16);
  EXPECT_EQ(makespan(jobs_of(1, {16, 14, 13, 12, 12, 11, 10, 9}), 7), 19);
}

TEST(Makespan, IsThatOfASimulation) {
  test::Random random(6);
  for (int i = 0; i < 2000; ++i) {
    std::vector<Index> durations(at(random.integer(1, 12)));
    for (Index& duration : durations) duration = random.integer(1, random.chance(0.5) ? 5 : 5000);
    if (random.chance(0.7)) std::sort(durations.begin(), durations.end(), std::greater<>());
    const Index batch = random.integer(1, random.chance(0.5) ? 3 : 40);
    const Index machines = random.integer(1, 140);
    const std::vector<EqualJobs> jobs = jobs_of(batch, durations);
    ASSERT_EQ(makespan(jobs, machines), simulated(jobs, machines))
        << ::testing::PrintToString(durations) << ", each " << batch << " times, on " << machines;
  }
}

}  // namespace
}  // namespace spectralkv::cuda
