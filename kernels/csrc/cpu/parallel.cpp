#include "cpu/parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <unistd.h>
#endif

#include "portable.h"

namespace d23 {
namespace {

thread_local bool inside_parallel_region = false;

int64_t process_id() {
#if defined(_WIN32)
  return 0;  // no fork there
#else
  return static_cast<int64_t>(getpid());
#endif
}

struct Job {
  const std::function<void(int64_t, int64_t)>* body;
  int64_t count, grain;
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::mutex error_mutex;

  void work() {
    inside_parallel_region = true;
    for (;;) {
      const int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= count) break;
      try {
        (*body)(begin, std::min(begin + grain, count));
      } catch (...) {
        std::lock_guard<std::mutex> lock(error_mutex);
        if (!error) error = std::current_exception();
        next.store(count, std::memory_order_relaxed);
      }
    }
    inside_parallel_region = false;
  }
};

// Workers sleep on a condition variable between jobs. The pool is never destroyed: threads that outlive main()
// while static destructors run would be worse than a few leaked bytes.
class Pool {
 public:
  void run(Job& job, int64_t helpers) {
    std::unique_lock<std::mutex> turn(run_mutex_);  // one job at a time; callers from several Python threads queue
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int64_t>(threads_) < helpers) {
        std::thread([this, index = threads_] { loop(index); }).detach();
        ++threads_;
      }
      job_ = &job;
      wanted_ = helpers;
      active_ = helpers;
      ++generation_;
    }
    wake_.notify_all();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return active_ == 0; });
    job_ = nullptr;
  }

 private:
  void loop(int64_t index) {
    uint64_t seen = 0;
    for (;;) {
      Job* job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_ != seen && job_ != nullptr && index < wanted_; });
        seen = generation_;
        job = job_;
      }
      job->work();
      std::lock_guard<std::mutex> lock(mutex_);
      if (--active_ == 0) done_.notify_one();
    }
  }

  std::mutex run_mutex_, mutex_;
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  int64_t threads_ = 0, wanted_ = 0, active_ = 0;
  uint64_t generation_ = 0;
};

// A forked child has the pool's memory but none of its threads: it starts a pool of its own.
Pool& pool() {
  static std::mutex mutex;
  static Pool* current = nullptr;
  static int64_t owner = -1;
  std::lock_guard<std::mutex> lock(mutex);
  if (owner != process_id()) {
    current = new Pool;
    owner = process_id();
  }
  return *current;
}

}  // namespace

void parallel_for(int64_t count, int64_t grain, int64_t num_threads, const std::function<void(int64_t, int64_t)>& body) {
  if (count <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  const int64_t pieces = (count + grain - 1) / grain;
  const int64_t threads = std::min(num_threads, pieces);
  Job job;
  job.body = &body;
  job.count = count;
  job.grain = grain;
  if (threads <= 1 || inside_parallel_region) {
    for (int64_t begin = 0; begin < count; begin += grain) body(begin, std::min(begin + grain, count));
    return;
  }
  pool().run(job, threads - 1);
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace d23

// 0 baseline, 1 AVX2 + FMA, 2 AVX-512 (F, DQ, BW, VL).
D23_EXPORT int64_t d23_cpu_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  return avx2 ? (avx512 ? 2 : 1) : 0;
#else
  return 0;
#endif
}
