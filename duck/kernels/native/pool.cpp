// See pool.h.
#include "pool.h"

#include <chrono>
#include <climits>

#if defined(__linux__)
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace duck {
namespace {

// How long to spin before giving way to other threads at every turn. Shorter than the time that
// another process loses by us, longer than the usual wait for a thread that is still working.
constexpr std::int64_t kRudeNs = 20'000;

std::int64_t now_ns() {
  using namespace std::chrono;
  return duration_cast<nanoseconds>(steady_clock::now().time_since_epoch()).count();
}

inline void pause_cpu() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The processors this process may use.
std::vector<int> processors() {
  std::vector<int> list;
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0)
    for (int i = 0; i < CPU_SETSIZE; ++i)
      if (CPU_ISSET(i, &set)) list.push_back(i);
#endif
  if (list.empty())
    for (unsigned i = 0; i < std::thread::hardware_concurrency(); ++i) list.push_back(int(i));
  if (list.empty()) list.push_back(0);
  return list;
}

}  // namespace

bool Spin::again() {
  pause_cpu();
  if (!polite_ && ++rounds_ % 32) return true;  // the clock costs as much as a pause
  const std::int64_t now = now_ns();
  if (!start_ns_) start_ns_ = now;
  polite_ = now - start_ns_ >= kRudeNs;
  if (polite_) std::this_thread::yield();
  return now - start_ns_ < limit_ns_;
}

void Signal::advance() {
  // Sequentially consistent with the sleeper's own add-then-look: one of the two sees the other.
  value_.fetch_add(1);
#if defined(__linux__)
  if (sleepers_.load())
    syscall(SYS_futex, &value_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
#else
  if (sleepers_.load()) {
    std::lock_guard<std::mutex> lock(mutex_);
    changed_.notify_all();
  }
#endif
}

void Signal::wait(std::uint32_t seen, std::int64_t spin_ns) {
  if (spin_ns > 0)
    for (Spin spin(spin_ns); spin.again();)
      if (value() != seen) return;
  sleepers_.fetch_add(1);
#if defined(__linux__)
  while (value_.load() == seen)
    syscall(SYS_futex, &value_, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
#else
  {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return value_.load() != seen; });
  }
#endif
  sleepers_.fetch_sub(1);
}

Pool::Pool(int threads, int spin_us, bool pin) : spin_ns_(std::int64_t(spin_us) * 1000) {
  const std::vector<int> usable = processors();
  if (threads < 1) threads = int(usable.size());
  // More threads than processors: whoever spins takes the processor from one who works.
  if (threads > int(usable.size())) spin_ns_ = 0;
  workers_.reserve(threads - 1);
  for (int i = 1; i < threads; ++i)
    workers_.emplace_back(&Pool::serve, this, i, pin ? usable[i % usable.size()] : -1);
}

Pool::~Pool() {
  stop_.store(true);
  posted_.advance();
  for (std::thread& worker : workers_) worker.join();
}

void Pool::run(int items, Call call, void* work) {
  if (workers_.empty() || items <= 1) {
    items_ = items;
    for (int i = 0; i < items; ++i) {
      left_.store(items - i - 1, std::memory_order_relaxed);
      call(work, i, 0);
    }
    return;
  }
  call_ = call;
  work_ = work;
  items_ = items;
  unfinished_.store(items, std::memory_order_relaxed);
  left_.store(items, std::memory_order_release);
  posted_.advance();
  take_items(0);
  // The signal may still come from the end of the job before; hence the loop.
  for (;;) {
    const std::uint32_t seen = finished_.value();
    if (!unfinished_.load(std::memory_order_acquire)) return;
    finished_.wait(seen, spin_ns_);
  }
}

void Pool::take_items(int thread) {
  for (;;) {
    const std::int32_t left = left_.fetch_sub(1, std::memory_order_acq_rel);
    if (left <= 0) return;
    call_(work_, items_ - left, thread);
    if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) finished_.advance();
  }
}

void Pool::serve(int thread, int processor) {
#if defined(__linux__)
  if (processor >= 0) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(processor, &set);
    sched_setaffinity(0, sizeof set, &set);  // a refusal costs speed, nothing else
  }
#else
  (void)processor;
#endif
  const FloatMode mode;
  for (std::uint32_t seen = 0;;) {
    posted_.wait(seen, spin_ns_);
    seen = posted_.value();
    if (stop_.load()) return;
    take_items(thread);
  }
}

FloatMode::FloatMode() {
#if defined(__x86_64__)
  saved_ = _mm_getcsr();
  _mm_setcsr(0x1F80);
#elif defined(__aarch64__)
  asm volatile("mrs %0, fpcr" : "=r"(saved_));
  asm volatile("msr fpcr, %0" : : "r"(std::uint64_t(0)));
#else
  saved_ = 0;
#endif
}

FloatMode::~FloatMode() {
#if defined(__x86_64__)
  _mm_setcsr(unsigned(saved_));
#elif defined(__aarch64__)
  asm volatile("msr fpcr, %0" : : "r"(saved_));
#endif
}

}  // namespace duck
