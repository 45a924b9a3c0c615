// Threads inside of one call, and calls that run without the GIL, even while the process ends.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace armillary {

// Work without the GIL. A thread that asks for it once the interpreter has ended is unwound by Python (before 3.14, where
// it waits for ever), and may not be unwound through the destructors and pybind11's frames above, which aborts the
// process: "terminate called without an active exception". So it stays here until the process is gone.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {  // also what unwinds a thread that ends
      for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
    }
  }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

// `body(index)` for every index below `count` on `threads` threads, this one included; it must not throw. Indices are
// handed out one at a time, so uneven work balances itself. Where the system has no more threads, those there are do it.
template <class Body>
void for_each_index(std::int64_t count, int threads, const Body& body) {
  std::atomic<std::int64_t> next{0};
  const auto work = [&]() noexcept {
    for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(i);
  };
  std::vector<std::thread> helpers;
  const std::int64_t wanted = std::min<std::int64_t>(threads, count) - 1;
  try {
    for (std::int64_t t = 0; t < wanted; ++t) helpers.emplace_back(work);
  } catch (const std::system_error&) {
  } catch (const std::bad_alloc&) {
  }
  work();
  for (auto& helper : helpers) helper.join();
}

}  // namespace armillary

// Compile a hot function for several x86 vector widths and pick one at load time.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define ARMILLARY_VECTOR_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define ARMILLARY_VECTOR_CLONES
#endif
