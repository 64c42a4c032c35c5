// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <set>

#include "absl/status/status.h"
#include "engine/schedule/sequence.h"

namespace bebop {

// Work that waits to start, by priority (lower first) and then arrival, under two budgets for what has never run: a count and host
// bytes. Preempted work comes back to its old place without a charge; it was accepted and is never refused.
// Borrows its work. Not thread safe: the engine thread. Allocates when work enters, which is not in the steady step.
class RequestQueue {
 public:
  struct Before {
    bool operator()(const Work* a, const Work* b) const {
      return a->priority != b->priority ? a->priority < b->priority : a->arrival < b->arrival;
    }
  };
  using Order = std::set<Work*, Before>;

  RequestQueue(int32_t max_requests, int64_t max_bytes) : max_requests_(max_requests), max_bytes_(max_bytes) {}

  // RESOURCE_EXHAUSTED, naming the budget and both numbers, when another request of that many bytes has no room now.
  absl::Status CheckRoom(int64_t bytes) const;
  int64_t max_bytes() const { return max_bytes_; }

  // Enters new work and charges work->queued_bytes. REQUIRES: not admitted.
  void Enter(Work* work);
  // Enters admitted work again. No effect when it is queued.
  void Return(Work* work) { order_.insert(work); }
  // Takes work out of the order, e.g. when all its samples have started. The charge ends with Admit or Leave.
  void Remove(Work* work) { order_.erase(work); }
  // `work` holds resources for the first time: ends its charge.
  void Admit(Work* work);
  // Removes work for good, ending its charge if it was never admitted.
  void Leave(Work* work);

  const Order& order() const { return order_; }
  int32_t num_requests() const { return num_requests_; }  // never admitted
  int64_t num_bytes() const { return num_bytes_; }

 private:
  const int32_t max_requests_;
  const int64_t max_bytes_;
  Order order_;
  int32_t num_requests_ = 0;
  int64_t num_bytes_ = 0;
};

}  // namespace bebop
