// See pool.h. Threads wait for a task by looking for it, for about as long as a layer of a model takes, and then sleep:
// waking one up costs as much as a small product.

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>

#include "pool.h"

namespace {

constexpr size_t MOST_WORKERS = 63;
constexpr int LOOKS = 20000;  // before a thread sleeps: some 100 us

struct Pool {
  pthread_mutex_t busy = PTHREAD_MUTEX_INITIALIZER;
  std::atomic<uint32_t> tasks{0};     // that were given out; what threads wait for
  std::atomic<uint32_t> sleeping{0};
  std::atomic<uint32_t> unfinished{0};
  size_t workers = 0;
  bool prepared = false;
  // The task, written before tasks is raised and read after that.
  void (*task)(void*, size_t, size_t) = nullptr;
  void* argument = nullptr;
  size_t parts = 0;
};

Pool pool;

long futex(std::atomic<uint32_t>* word, int operation, uint32_t value) {
  return syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), operation, value, nullptr, nullptr, 0);
}

void pause_a_little() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Waits until more tasks were given out than those.
uint32_t wait_for_more(uint32_t known) {
  for (int look = 0; look < LOOKS; ++look) {
    const uint32_t now = pool.tasks.load(std::memory_order_acquire);
    if (now != known) return now;
    pause_a_little();
  }
  pool.sleeping.fetch_add(1);
  while (pool.tasks.load() == known) futex(&pool.tasks, FUTEX_WAIT_PRIVATE, known);
  pool.sleeping.fetch_sub(1);
  return pool.tasks.load(std::memory_order_acquire);
}

struct Start {
  size_t number;
  uint32_t known;
};
Start starts[MOST_WORKERS];

// Part number + 1 of every task. A thread that a task has no part for reports as well: it has read the task, and the
// next one may be written.
void* work(void* start) {
  const size_t part = static_cast<Start*>(start)->number + 1;
  for (uint32_t known = static_cast<Start*>(start)->known;;) {
    known = wait_for_more(known);
    if (part < pool.parts) pool.task(pool.argument, part, pool.parts);
    pool.unfinished.fetch_sub(1, std::memory_order_release);
  }
}

// A forked process has none of the threads.
void after_fork() {
  pool.workers = 0;
  pool.sleeping = 0;
  pool.unfinished = 0;
  pool.busy = PTHREAD_MUTEX_INITIALIZER;
}

// As many threads as are wanted, or as can be had.
size_t grow(size_t wanted) {
  if (!pool.prepared) {
    pool.prepared = true;
    pthread_atfork(nullptr, nullptr, after_fork);
  }
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for the host's threads
  while (pool.workers < wanted && pool.workers < MOST_WORKERS) {
    starts[pool.workers] = {pool.workers, pool.tasks.load()};
    pthread_t thread;
    if (pthread_create(&thread, nullptr, work, &starts[pool.workers])) break;
    pthread_detach(thread);
    ++pool.workers;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return pool.workers;
}

}  // namespace

void run_in_parts(void (*task)(void*, size_t, size_t), void* argument, size_t parts) {
  if (parts > 1 && pthread_mutex_trylock(&pool.busy) == 0) {
    const size_t workers = grow(parts - 1);
    if (workers >= parts - 1) {
      pool.task = task;
      pool.argument = argument;
      pool.parts = parts;
      pool.unfinished.store(static_cast<uint32_t>(workers), std::memory_order_relaxed);
      pool.tasks.fetch_add(1);
      if (pool.sleeping.load()) futex(&pool.tasks, FUTEX_WAKE_PRIVATE, INT32_MAX);
      task(argument, 0, parts);
      for (int looks = 0; pool.unfinished.load(std::memory_order_acquire);) {
        pause_a_little();
        if (++looks > LOOKS) sched_yield();
      }
      pthread_mutex_unlock(&pool.busy);
      return;
    }
    pthread_mutex_unlock(&pool.busy);
  }
  for (size_t part = 0; part < parts; ++part) task(argument, part, parts);
}
