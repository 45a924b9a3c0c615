// Run a loop body for every index on a few threads, the calling one among them.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace armillary {

// `body(index)` must not throw. Indices are handed out one at a time, so uneven work balances itself.
template <class Body>
void for_each_index(std::int64_t count, int threads, const Body& body) {
  std::atomic<std::int64_t> next{0};
  const auto work = [&] {
    for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(i);
  };
  std::vector<std::thread> helpers;
  const std::int64_t wanted = std::min<std::int64_t>(threads, count) - 1;
  for (std::int64_t t = 0; t < wanted; ++t) helpers.emplace_back(work);
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
