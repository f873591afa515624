// One pool of threads for the process.
#pragma once

#include <cstdint>
#include <functional>

namespace spectralkv::detail {

/// Processors that this process may run on.
int available_processors() noexcept;

/// Calls task(index, worker) for every index in [0, count) on up to `threads` threads, the caller
/// among them, and returns when all are done. `worker` is below `threads` and unique at any moment.
///
/// The pool is shared: while another thread of the process is inside a parallel_for, and in a child
/// after fork, the calling thread does all the work itself, so the process never runs more threads
/// than it asked for. Tasks must not throw.
void parallel_for(std::int64_t count, int threads,
                  const std::function<void(std::int64_t index, int worker)>& task);

}  // namespace spectralkv::detail
