// How many thread-block clusters a device runs at once.
#pragma once

#include <cstdint>
#include <optional>

namespace spectralkv::cuda {

/// Thread blocks of a cluster, at most.
inline constexpr int kMostCluster = 16;

/// Clusters of `cluster` thread blocks that the current device runs at once where each block has a
/// multiprocessor to itself; 0 where it does not know clusters of that size. The blocks of a
/// cluster share a group of multiprocessors, and groups differ: of 132 multiprocessors clusters of
/// 16 may reach far fewer than those of 12.
int clusters_at_once(int cluster);

/// About how long a scan of the keys takes where `count` clusters read `slots` slots with each of
/// their blocks, in slots that a block reads one after the other. None where no such cluster runs,
/// or where its size leaves a part of a group of multiprocessors idle and not all run at once.
std::optional<std::int64_t> cluster_cost(std::int64_t count, int cluster, std::int64_t slots);

/// The size of `count` clusters whose launch should end first; 0: none will do.
///
/// `slots_of(cluster)` are the slots of a block, `fits(cluster)` says whether its shared memory
/// suffices.
template <class SlotsOf, class Fits>
int best_cluster(std::int64_t count, SlotsOf&& slots_of, Fits&& fits) {
  int best = 0;
  std::int64_t least = 0;
  for (int cluster = 1; cluster <= kMostCluster; ++cluster) {
    const std::optional<std::int64_t> cost = cluster_cost(count, cluster, slots_of(cluster));
    if (!cost || (best != 0 && *cost >= least) || !fits(cluster)) continue;
    best = cluster;
    least = *cost;
  }
  return best;
}

}  // namespace spectralkv::cuda
