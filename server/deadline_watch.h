// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <grpcpp/alarm.h>
#include <grpcpp/server_context.h>

#include <cstdint>
#include <functional>
#include <memory>

#include "absl/status/status.h"
#include "engine/runtime/engine_interface.h"

namespace bebop {

// Why nothing will come of a request that wants `min_step` before somebody does something: DEADLINE_EXCEEDED that says what, in words
// and as `waits_for` among the error's metadata: WakeUp, ResumeGeneration or weights.min_step. OK: it moves, for all that the engine
// knows.
absl::Status WhyItWaits(const EngineInterface& engine, int64_t min_step);

// Tells a caller whose deadline is about to pass why its request stands still. At the deadline itself gRPC ends the call on the
// caller's side, with nothing but "Deadline Exceeded". A request that moves keeps its last moment: the watch looks once, a quarter of
// a second before the deadline or less, and who comes to a standstill after that hears gRPC's words alone.
class DeadlineWatch {
 public:
  DeadlineWatch() = default;
  ~DeadlineWatch();  // the call has ended
  DeadlineWatch(const DeadlineWatch&) = delete;
  DeadlineWatch& operator=(const DeadlineWatch&) = delete;

  // Shortly before the deadline of `call`, if WhyItWaits: `detach`, then `end` with the reason, both on a thread of gRPC's. `detach`
  // runs before the destructor returns or not at all; `end` may come later, so it must own what it uses. Nothing happens for a call
  // without a deadline. Called once.
  void Start(const grpc::CallbackServerContext& call, const EngineInterface& engine, int64_t min_step,
             std::function<void()> detach, std::function<void(const absl::Status&)> end);

 private:
  struct State;
  std::shared_ptr<State> state_;
  std::unique_ptr<grpc::Alarm> alarm_;
};

}  // namespace bebop
