#include "core/mpi_start.hpp"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <fstream>
#include <string>

namespace pympa {

namespace {

constexpr double kLookSeconds = 0.1;     // between two looks
constexpr double kOthersSeconds = 2.0;   // the first task speaks for all, if it is there
constexpr double kStaggerSeconds = 0.5;  // between two others: they did not begin together
constexpr double kMostStagger = 10.0;
constexpr double kForwardSeconds = 0.1;  // a launcher loses what it has not read at an end
constexpr const char* kSegment = "/dev/shm/mpich_shm_";

bool interrupt_is_pending() {
  sigset_t pending;
  return sigpending(&pending) == 0 && sigismember(&pending, SIGINT) == 1;
}

void tell(const std::string& text) {
  const std::string line = "pympa: " + text + "\n";
  if (write(STDERR_FILENO, line.data(), line.size()) < 0) return;  // nobody listens
  std::this_thread::sleep_for(std::chrono::duration<double>(kForwardSeconds));
}

// A launcher ends all tasks if one ends by a signal; after a non-zero status it may wait for them.
[[noreturn]] void end() {
  signal(SIGTERM, SIG_DFL);
  sigset_t only;
  sigemptyset(&only);
  sigaddset(&only, SIGTERM);
  pthread_sigmask(SIG_UNBLOCK, &only, nullptr);
  raise(SIGTERM);
  _exit(1);
}

}  // namespace

void unlink_shared_files() {
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    const std::size_t start = line.find(kSegment);
    if (start != std::string::npos) unlink(line.c_str() + start);  // gone already is well, too
  }
}

MpiStart::MpiStart(int task, double grace, double most)
    : thread_(&MpiStart::watch, this, task, grace, most) {}

void MpiStart::stop() {
  {
    const std::lock_guard lock(mutex_);
    stopped_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
}

bool MpiStart::stopped_within(double seconds) {
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, std::chrono::duration<double>(seconds),
                           [this] { return stopped_; });
}

void MpiStart::watch(int task, double grace, double most) {
  const double turn = std::min(kOthersSeconds + kStaggerSeconds * task, kMostStagger);
  double waited = 0.0, pending = 0.0;
  while (pending < grace && waited < most) {
    if (stopped_within(kLookSeconds)) return;
    waited += kLookSeconds;
    if (interrupt_is_pending()) pending += kLookSeconds;
  }
  if (stopped_within(task == 0 ? 0.0 : turn)) return;
  unlink_shared_files();
  tell(pending >= grace ? "interrupted"
                        : "MPI did not start within " + std::to_string(std::lround(most)) +
                              " seconds: a task of this job ended before, or never began");
  end();
}

}  // namespace pympa
