#include "thread_pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sched.h>
#include <unistd.h>
#endif

namespace spectralkv::detail {
namespace {

using Task = std::function<void(std::int64_t, int)>;

class ThreadPool {
 public:
  // Never destroyed: worker threads may outlive static destructors.
  static ThreadPool& shared() {
    static auto* pool = new ThreadPool;
    return *pool;
  }

  void run(std::int64_t count, int threads, const Task& task) {
    const std::unique_lock region(region_, std::try_to_lock);
    if (!region.owns_lock() || forked()) {
      for (std::int64_t i = 0; i < count; ++i) task(i, 0);
      return;
    }
    const int helpers = static_cast<int>(std::min<std::int64_t>(threads, count)) - 1;
    grow(helpers);
    {
      const std::scoped_lock lock(mutex_);
      task_ = &task;
      count_ = count;
      next_.store(0, std::memory_order_relaxed);
      places_ = helpers;
      joined_ = 0;
    }
    for (int i = 0; i < helpers; ++i) wake_.notify_one();
    drain(0);
    // Helpers that have not woken yet find no place: on a busy machine waiting for them would cost
    // more than they could help.
    std::unique_lock lock(mutex_);
    places_ = 0;
    done_.wait(lock, [&] { return busy_ == 0; });
  }

 private:
  void drain(int worker) {
    for (;;) {
      const std::int64_t index = next_.fetch_add(1, std::memory_order_relaxed);
      if (index >= count_) return;
      (*task_)(index, worker);
    }
  }

  void grow(int helpers) {
    for (; threads_ < helpers; ++threads_) {
      std::thread([this] { loop(); }).detach();
    }
  }

  void loop() {
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return places_ > 0; });
      --places_;
      const int worker = ++joined_;
      ++busy_;
      lock.unlock();
      drain(worker);
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

#ifdef __linux__
  bool forked() const { return getpid() != owner_; }
  const pid_t owner_ = getpid();
#else
  bool forked() const { return false; }
#endif

  std::mutex region_;  // one parallel_for at a time
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  int threads_ = 0;
  int places_ = 0;  // for helpers that may still join
  int joined_ = 0;
  int busy_ = 0;
  const Task* task_ = nullptr;
  std::int64_t count_ = 0;
  std::atomic<std::int64_t> next_{0};
};

}  // namespace

int available_processors() noexcept {
#ifdef __linux__
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

void parallel_for(std::int64_t count, int threads, const Task& task) {
  if (threads <= 1 || count <= 1) {
    for (std::int64_t i = 0; i < count; ++i) task(i, 0);
    return;
  }
  ThreadPool::shared().run(count, threads, task);
}

}  // namespace spectralkv::detail
