// Threads that share numbered items of work, and sleep when there is none.
//
// The caller of run() works too, so a pool of one has no threads at all. Items are claimed in
// ascending order from one counter: an item may wait for the completion of lower ones (they are
// being worked on by somebody who does not wait) and an uneven machine balances itself.
//
// After its last item a thread spins, because a kernel call during decode is shorter than the
// tens of microseconds a sleeping thread takes to wake. It spins for at most spin_us, gives way
// to other runnable threads of its core while it does, and then sleeps in the kernel.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#if !defined(__linux__)
#include <condition_variable>
#endif

namespace duck {

// A number that threads can wait to see change.
class Signal {
 public:
  std::uint32_t value() const { return value_.load(std::memory_order_acquire); }
  void advance();                                    // changes it, and wakes everyone who sleeps
  void wait(std::uint32_t seen, std::int64_t spin_ns);  // until it differs from `seen`

 private:
  std::atomic<std::uint32_t> value_{0};
  std::atomic<int> sleepers_{0};
#if !defined(__linux__)
  std::mutex mutex_;
  std::condition_variable changed_;
#endif
};

// The turns of a waiting loop: pauses first, then ever longer stays out of others' way.
class Spin {
 public:
  explicit Spin(std::int64_t limit_ns) : limit_ns_(limit_ns) {}
  bool again();  // false when the time is over

 private:
  std::int64_t limit_ns_;
  std::int64_t start_ns_ = 0;
  int rounds_ = 0;
  bool polite_ = false;
};

class Pool {
 public:
  // threads: including the caller of run(). pin: each own thread to one processor, leaving the
  // first to the caller.
  Pool(int threads, int spin_us, bool pin);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return int(workers_.size()) + 1; }

  // Calls work(item, thread) for items 0..items-1, thread < threads(). One run at a time.
  template <class Work>
  void run(int items, Work& work) {
    run(items, [](void* w, int item, int thread) { (*static_cast<Work*>(w))(item, thread); },
        &work);
  }

  // The item that the next claim will get: a hint for prefetching.
  int next_item() const { return items_ - left_.load(std::memory_order_relaxed); }

 private:
  using Call = void (*)(void*, int item, int thread);
  void run(int items, Call call, void* work);
  void serve(int thread, int processor);
  void take_items(int thread);

  // The job. Written only while every item of the last one is finished and before left_ says
  // that there are new ones; a thread that has claimed an item may therefore read it.
  Call call_ = nullptr;
  void* work_ = nullptr;
  int items_ = 0;

  alignas(64) std::atomic<std::int32_t> left_{0};        // not yet claimed; negative: none
  alignas(64) std::atomic<std::int32_t> unfinished_{0};
  alignas(64) Signal posted_;
  alignas(64) Signal finished_;
  std::atomic<bool> stop_{false};
  std::int64_t spin_ns_;
  std::vector<std::thread> workers_;
};

// Rounds to nearest and keeps denormals while it lives, whatever the calling thread had set.
class FloatMode {
 public:
  FloatMode();
  ~FloatMode();

 private:
  std::uint64_t saved_;
};

}  // namespace duck
