// How many thread-block clusters a device runs at once, and how large they should be.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "cuda/makespan.h"

namespace spectralkv::cuda {

/// Thread blocks of a cluster, at most.
inline constexpr int kMostCluster = 16;

/// Clusters of `cluster` thread blocks that the current device runs at once where each block has a
/// multiprocessor to itself; 0 where it does not know clusters of that size. The blocks of a
/// cluster share a group of multiprocessors, and groups differ: of 132 multiprocessors clusters of
/// 16 may reach far fewer than those of 12.
int clusters_at_once(int cluster);

/// About how long a scan of the keys takes where `count` clusters have `scans` to do, in slots that
/// a block reads one after the other. None where no such cluster runs, or where its size leaves a
/// part of a group of multiprocessors idle and not all run at once.
std::optional<std::int64_t> cluster_cost(std::int64_t count, int cluster,
                                         std::span<const EqualJobs> scans);

/// The size of `count` clusters whose launch should end first; 0: none will do. Each scans `extent`
/// slots; of a divided layer, whose graphs have `rooms` and begin in descending order of these, as
/// many as there is room for.
///
/// `slots_of(extent, cluster)` are the slots of a block, `fits(cluster)` says whether its shared
/// memory suffices.
template <class SlotsOf, class Fits>
int best_cluster(std::int64_t count, std::int64_t extent, std::span<const std::int64_t> rooms,
                 SlotsOf&& slots_of, Fits&& fits) {
  // About what a block spends on beginning and merging.
  constexpr std::int64_t kOverhead = 512;
  std::vector<std::int64_t> extents(rooms.begin(), rooms.end());
  std::sort(extents.begin(), extents.end(), std::greater<>());
  if (extents.empty()) extents.push_back(extent);
  const std::int64_t graphs = std::ssize(extents);
  std::vector<EqualJobs> scans(extents.size());
  int best = 0;
  std::int64_t least = 0;
  for (int cluster = 1; cluster <= kMostCluster; ++cluster) {
    for (std::size_t i = 0; i < scans.size(); ++i) {
      scans[i] = {.count = count / graphs,
                  .duration = slots_of(std::min(extents[i], extent), cluster) + kOverhead};
    }
    const std::optional<std::int64_t> cost = cluster_cost(count, cluster, scans);
    if (!cost || (best != 0 && *cost >= least) || !fits(cluster)) continue;
    best = cluster;
    least = *cost;
  }
  return best;
}

}  // namespace spectralkv::cuda
