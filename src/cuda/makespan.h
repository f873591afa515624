// How long a launch takes whose clusters have more to do than others.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <queue>
#include <span>
#include <utility>
#include <vector>

namespace spectralkv::cuda {

/// Jobs that take equally long.
struct EqualJobs {
  std::int64_t count;
  std::int64_t duration;
};

/// When the last of `jobs` is done where each, in their order, goes to the machine that is free
/// first. The longest first is at most a third worse than the best order (R. L. Graham, "Bounds on
/// multiprocessing timing anomalies", 1969).
inline std::int64_t makespan(std::span<const EqualJobs> jobs, std::int64_t machines) {
  using FreeAt = std::pair<std::int64_t, std::int64_t>;  // a time, and machines that are free then
  std::priority_queue<FreeAt, std::vector<FreeAt>, std::greater<>> free;
  free.emplace(0, machines);
  std::int64_t end = 0;
  for (const auto& [count, duration] : jobs) {
    for (std::int64_t left = count; left > 0;) {
      const auto [time, idle] = free.top();
      free.pop();
      const std::int64_t taken = std::min(idle, left);
      if (taken < idle) free.emplace(time, idle - taken);
      free.emplace(time + duration, taken);
      end = std::max(end, time + duration);
      left -= taken;
    }
  }
  return end;
}

}  // namespace spectralkv::cuda
