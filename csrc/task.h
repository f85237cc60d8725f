// Work for a thread pool, in phases.
#pragma once

namespace moejet {

class Task {
 public:
  virtual ~Task() = default;
  // Prepares the next phase, or returns false when there is none. One thread runs it, between
  // phases, while the others wait: whatever it writes they see, and the other way round.
  virtual bool next() = 0;
  // One worker's share of the phase.
  virtual void work(int worker) = 0;
};

}  // namespace moejet
