// SPDX-License-Identifier: Apache-2.0
#include <grpcpp/server_context.h>

#include <algorithm>
#include <atomic>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "bebop/v1/control.grpc.pb.h"
#include "engine/base/status_reason.h"
#include "server/byte_messages.h"
#include "server/grpc_status.h"
#include "server/limits.h"
#include "server/services.h"
#include "server/status_details.h"

// Everything here waits for the engine, for a step or longer, so it runs on the threads for blocking calls. What a call has begun goes on
// when its caller leaves: a pause or a drain is a state of the server, not of the call.
namespace bebop {
namespace {

using grpc::ByteBuffer;
using grpc::CallbackServerContext;
using grpc::ServerUnaryReactor;

absl::Status TooManyCalls(absl::string_view what) {
  return WithRetryAfter(DetailedError(absl::StatusCode::kResourceExhausted, "CAPACITY", absl::StrCat("too many ", what, " wait already")),
                        kCapacityRetryDelay);
}

// What is left of the caller's patience.
absl::Duration TimeLeft(const CallbackServerContext& call) { return std::max(absl::ZeroDuration(), absl::FromChrono(call.deadline()) - absl::Now()); }

template <typename Base>
using WithRawMethods =
    v1::Control::WithRawCallbackMethod_PauseGeneration<v1::Control::WithRawCallbackMethod_ResumeGeneration<v1::Control::WithRawCallbackMethod_Sleep<
        v1::Control::WithRawCallbackMethod_WakeUp<v1::Control::WithRawCallbackMethod_FlushCache<
            v1::Control::WithRawCallbackMethod_Drain<v1::Control::WithRawCallbackMethod_SetSpeculation<Base>>>>>>>;

class ControlService final : public WithRawMethods<v1::Control::Service> {
 public:
  ControlService(ServiceContext* context, BlockingCalls* calls) : context_(*context), engine_(*context->engine), calls_(*calls) {}

  ServerUnaryReactor* PauseGeneration(CallbackServerContext* call, const ByteBuffer* in, ByteBuffer* out) override {
    return Answer<v1::PauseGenerationRequest>("PauseGeneration", call, in, out, [this, call](const v1::PauseGenerationRequest& request) {
      return Pause(request, TimeLeft(*call));
    });
  }
  ServerUnaryReactor* ResumeGeneration(CallbackServerContext* call, const ByteBuffer* in, ByteBuffer* out) override {
    return Answer<v1::ResumeGenerationRequest, /*is_short=*/true>("ResumeGeneration", call, in, out, [this](const v1::ResumeGenerationRequest& request) {
      return State(Validate(request, context_.rules), [this] { return engine_.Resume(); });
    });
  }
  ServerUnaryReactor* Sleep(CallbackServerContext* call, const ByteBuffer* in, ByteBuffer* out) override {
    return Answer<v1::SleepRequest>("Sleep", call, in, out, [this](const v1::SleepRequest& request) {
      const absl::StatusOr<SleepTags> tags = ToEngine(request, context_.rules);
      return State(tags.status(), [&] { return engine_.Sleep(*tags); });
    });
  }
  ServerUnaryReactor* WakeUp(CallbackServerContext* call, const ByteBuffer* in, ByteBuffer* out) override {
    return Answer<v1::WakeUpRequest>("WakeUp", call, in, out, [this](const v1::WakeUpRequest& request) {
      const absl::StatusOr<SleepTags> tags = ToEngine(request, context_.rules);
      return State(tags.status(), [&] { return engine_.WakeUp(*tags); });
    });
  }
  ServerUnaryReactor* FlushCache(CallbackServerContext* call, const ByteBuffer* in, ByteBuffer* out) override {
    return Answer<v1::FlushCacheRequest>("FlushCache", call, in, out, [this](const v1::FlushCacheRequest& request) {
      return State(Validate(request, context_.rules), [this] { return engine_.FlushCache(); });
    });
  }
  ServerUnaryReactor* Drain(CallbackServerContext* call, const ByteBuffer* in, ByteBuffer* out) override {
    return Answer<v1::DrainRequest>("Drain", call, in, out, [this](const v1::DrainRequest& request) { return Drain(request); });
  }
  ServerUnaryReactor* SetSpeculation(CallbackServerContext* call, const ByteBuffer* in, ByteBuffer* out) override {
    return Answer<v1::SetSpeculationRequest>("SetSpeculation", call, in, out, [this](const v1::SetSpeculationRequest& request) {
      return State(context_.ChangeDefaultSpeculation([&request](const RequestRules& rules) { return ToEngine(request, rules); }));
    });
  }

 private:
  // Access and parsing at once, `run` on a thread that may wait. `run`: Request -> absl::StatusOr<v1::ControlState>.
  // `is_short`: it waits for a step at most, and not behind calls that wait for longer.
  template <typename Request, bool is_short = false, typename Run>
  ServerUnaryReactor* Answer(absl::string_view method, CallbackServerContext* call, const ByteBuffer* in, ByteBuffer* out, Run run) {
    ServerUnaryReactor* reactor = call->DefaultReactor();
    Request request;
    absl::Status status = context_.access.Check(*call, absl::StrCat("bebop.v1.Control.", method));
    if (status.ok()) status = ParseMessage(*in, &request);
    if (!status.ok()) {
      reactor->Finish(ToGrpcStatus(status));
      return reactor;
    }
    // `call` and `out` live until Finish.
    auto task = [call, out, reactor, request = std::move(request), run = std::move(run)] {
      absl::StatusOr<v1::ControlState> state = absl::CancelledError("the call was cancelled, or its deadline passed, before its turn came");
      if (!call->IsCancelled()) state = run(request);
      reactor->Finish(ToGrpcStatus(state.ok() ? SerializeMessage(*state, out) : state.status()));
    };
    const bool taken = is_short ? calls_.RunShort(std::move(task)) : calls_.Run(std::move(task));
    if (!taken) reactor->Finish(ToGrpcStatus(TooManyCalls("admin calls")));
    return reactor;
  }

  v1::ControlState State() const {
    v1::ControlState state = MakeControlState(engine_.control(), engine_.GetLoads(), context_.Rules());
    if (context_.draining) state.set_draining(true);
    return state;
  }
  absl::StatusOr<v1::ControlState> State(const absl::Status& done) const {
    if (!done.ok()) return done;
    return State();
  }
  // After `change`, which runs if the request is `valid`.
  template <typename Change>
  absl::StatusOr<v1::ControlState> State(const absl::Status& valid, const Change& change) const {
    return State(valid.ok() ? change() : valid);
  }

  absl::StatusOr<v1::ControlState> Pause(const v1::PauseGenerationRequest& request, absl::Duration time_left) {
    const absl::StatusOr<PauseMode> mode = ToEngine(request, context_.rules);
    if (!mode.ok()) return mode.status();
    const bool waits = *mode == PauseMode::kWait;
    if (waits && waiting_pauses_.fetch_add(1) >= limits::kWaitingPauses) {
      --waiting_pauses_;
      return TooManyCalls("pauses");
    }
    const absl::StatusOr<int32_t> aborted = engine_.Pause(*mode, request.clear_cache(), time_left);
    if (waits) --waiting_pauses_;
    if (absl::IsAborted(aborted.status()) && StatusReason(aborted.status()).empty()) {
      return DetailedError(absl::StatusCode::kAborted, "OVERTAKEN", aborted.status().message());
    }
    if (!aborted.ok()) return aborted.status();
    v1::ControlState state = State();
    state.set_aborted_samples(*aborted);
    return state;
  }

  absl::StatusOr<v1::ControlState> Drain(const v1::DrainRequest& request) {
    const absl::StatusOr<absl::Duration> deadline = ToEngine(request, context_.rules, context_.drain_timeout);
    if (!deadline.ok()) return deadline.status();
    context_.draining = true;
    if (context_.on_draining) context_.on_draining();
    // Others are told at once that it drains.
    if (waiting_drains_.fetch_add(1) < limits::kWaitingDrains) engine_.Drain(*deadline);
    --waiting_drains_;
    return State();
  }

  ServiceContext& context_;
  EngineInterface& engine_;
  BlockingCalls& calls_;
  // Few at a time, so that callers that ask again and again leave threads for others.
  std::atomic<int> waiting_drains_ = 0, waiting_pauses_ = 0;
};

}  // namespace

std::unique_ptr<grpc::Service> MakeControlService(ServiceContext* context, BlockingCalls* calls) {
  return std::make_unique<ControlService>(context, calls);
}

}  // namespace bebop
