// How many thread-block clusters a device runs at once.
#pragma once

#include <cstdint>

namespace spectralkv::cuda {

/// Thread blocks of a cluster, at most.
inline constexpr int kMostCluster = 16;

/// Clusters of `cluster` thread blocks that the current device runs at once where each block has a
/// multiprocessor to itself; 0 where it does not know clusters of that size. The blocks of a
/// cluster share a group of multiprocessors, and groups differ: of 132 multiprocessors clusters of
/// 16 may reach far fewer than those of 12.
int clusters_at_once(int cluster);

/// About how long a scan of the keys takes where `count` clusters read `slots` slots with each of
/// their blocks, in slots that a block reads one after the other. Not for sizes of which none runs.
std::int64_t cluster_cost(std::int64_t count, int cluster, std::int64_t slots);

/// Whether `count` clusters of `cluster` blocks are worth a thought: of sizes that leave a part of
/// a group of multiprocessors idle only those that all run at once.
bool cluster_is_apt(std::int64_t count, int cluster);

}  // namespace spectralkv::cuda
