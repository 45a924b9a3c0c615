#include "threads.h"

#include <pthread.h>

#include <chrono>

namespace {

// Read and written with the GIL held.
int running = 0;
bool ended = false;
std::thread::id last;  // the thread that ends the interpreter: it may still call

}  // namespace

namespace armillary {

WithoutGil::WithoutGil() {
  const bool stays = ended && std::this_thread::get_id() != last;
  if (!stays) ++running;
  state_ = PyEval_SaveThread();
  while (stays) std::this_thread::sleep_for(std::chrono::hours(1));
}

WithoutGil::~WithoutGil() {
  PyEval_RestoreThread(state_);
  --running;
}

void wait_for_calls_at_exit() {
  pthread_atfork(nullptr, nullptr, [] { running = 0; });  // a fork has one thread: the one that forked, in no call
  pybind11::module_::import("atexit").attr("register")(pybind11::cpp_function([] {
    ended = true;
    last = std::this_thread::get_id();
    while (running > 0) {
      pybind11::gil_scoped_release release;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }));
}

}  // namespace armillary
