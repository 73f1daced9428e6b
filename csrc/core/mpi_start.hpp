// Watches a process while MPI starts. MPI_Init waits for every rank and holds Python's interpreter
// lock meanwhile, so only a C++ thread can end a rank that waits for a rank that never starts.
#pragma once

#include <condition_variable>
#include <mutex>
#include <thread>

namespace pympa {

// Removes the names of the files that this process has mapped from MPICH's shared memory. The
// memory stays mapped.
void unlink_shared_files();

// From its making to `stop`, ends the process by one line
// - once an interrupt (Ctrl-C), which all threads hold back, has been pending for `grace` seconds;
// - after `most` seconds.
// Launchers take such an end for a failure of the whole job. Tasks speak in turn, by their number,
// and the first one that does ends the others.
class MpiStart {
 public:
  MpiStart(int task, double grace, double most);
  ~MpiStart() { stop(); }
  MpiStart(const MpiStart&) = delete;
  MpiStart& operator=(const MpiStart&) = delete;

  void stop();

 private:
  void watch(int task, double grace, double most);
  // Waits, and tells whether the watch was stopped meanwhile.
  bool stopped_within(double seconds);

  std::mutex mutex_;
  std::condition_variable changed_;
  bool stopped_ = false;
  std::thread thread_;
};

}  // namespace pympa
