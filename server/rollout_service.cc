// SPDX-License-Identifier: Apache-2.0
#include <grpcpp/server_context.h>

#include <algorithm>
#include <atomic>
#include <deque>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "bebop/v1/rollout.grpc.pb.h"
#include "engine/base/mutex.h"
#include "engine/base/status_reason.h"
#include "server/byte_messages.h"
#include "server/deadline_watch.h"
#include "server/grpc_status.h"
#include "server/limits.h"
#include "server/resume_handle.h"
#include "server/services.h"
#include "server/status_details.h"

// A call has two halves with different lifetimes. The *reactor* belongs to gRPC: it lives until its OnDone. The *observer* is shared
// with the engine, whose thread may still be inside it when the call is gone. The observer points at its reactor through an atomic or
// a locked pointer; whoever takes that pointer finishes the call, exactly once, and from then on nobody else touches the reactor.
namespace bebop {
namespace {

using grpc::ByteBuffer;
using grpc::CallbackServerContext;
using grpc::ServerUnaryReactor;
using grpc::ServerWriteReactor;

grpc::Status CancelledStatus() { return ToGrpcStatus(absl::CancelledError("the call was cancelled, or its deadline passed")); }

// What the end of a group means for its caller. Running into the server's wall time is data (TIME_BUDGET) once all samples have it.
absl::Status CallStatus(const absl::Status& done, int num_delivered, const GenerateRequest& request) {
  if (absl::IsDeadlineExceeded(done) && num_delivered == request.num_samples) return absl::OkStatus();
  return done;
}

// A failed sample carries no data; the group's OnDone tells why.
bool HasData(const SampleResult& sample) { return sample.finish != FinishReason::kNone && sample.finish != FinishReason::kFailed; }

// What replies are made from: the request without what it resumes, and with the prompt only when it goes back.
struct ReplyPart {
  GenerateRequest request;
  ResumeOrigin origin;
};

ReplyPart MakeReplyPart(const ServiceContext& context, const GenerateRequest& request, bool with_prompt) {
  ReplyPart part = {.request = request, .origin = MakeResumeOrigin(context.rules.model, request.prompt)};
  if (!with_prompt) std::vector<uint32_t>().swap(part.request.prompt);
  std::vector<SampleResult>().swap(part.request.resume);
  return part;
}

// `params`: AppliedParams of the group, which its first sample tells.
v1::SampleResult ToReply(const SampleResult& sample, const ReplyPart& part, std::optional<v1::GenerateRequest>* params) {
  if (!params->has_value()) *params = AppliedParams(sample, part.request);
  v1::SampleResult result = ToProto(sample, **params);
  if (IsCutShort(sample.finish)) result.set_resume_handle(EncodeResumeHandle(part.origin, **params, result, sample.pending_drafts));
  return result;
}

// A refusal of Submit, with the field that it is about.
absl::Status NameField(const absl::Status& refusal, int64_t min_step) {
  if (StatusReason(refusal) != "STEP_NOT_REACHED") return refusal;
  return DetailedError(refusal.code(), "STEP_NOT_REACHED", refusal.message(), {{"field", "weights.min_step"}, {"value", absl::StrCat(min_step)}});
}

absl::StatusOr<GenerateRequest> ParseGenerate(const ServiceContext& context, const CallbackServerContext& call, absl::string_view method,
                                              const ByteBuffer& bytes, bool* with_prompt) {
  if (absl::Status status = context.access.Check(call, method); !status.ok()) return status;
  v1::GenerateRequest message;
  if (absl::Status status = ParseMessage(bytes, &message); !status.ok()) return status;
  if (absl::Status status = context.CheckServing(); !status.ok()) return status;
  *with_prompt = message.output().prompt();
  return ToEngine(message, context.Rules(), context.NewRequestContext());
}

absl::StatusOr<std::vector<ScoreRequest>> ParseScore(const ServiceContext& context, const CallbackServerContext& call, const ByteBuffer& bytes) {
  if (absl::Status status = context.access.Check(call, "bebop.v1.Rollout.Score"); !status.ok()) return status;
  v1::ScoreRequest message;
  if (absl::Status status = ParseMessage(bytes, &message); !status.ok()) return status;
  if (absl::Status status = context.CheckServing(); !status.ok()) return status;
  return ToEngine(message, context.rules, context.NewRequestContext());
}

// ---- Generate ----

class UnaryGenerate;

// Collects a group's samples. All On* methods run under the engine's lock, one at a time; a group that was cut short is replied to
// elsewhere.
class GroupObserver final : public GenerateObserver, public std::enable_shared_from_this<GroupObserver> {
 public:
  GroupObserver(UnaryGenerate* call, ReplyThread* reply_thread, ReplyPart part)
      : call_(call), reply_thread_(*reply_thread), part_(std::move(part)) {
    result_.set_request_id(part_.request.request_id);
    result_.mutable_prompt_token_ids()->Add(part_.request.prompt.begin(), part_.request.prompt.end());
  }

  // The call, for the first taker; null afterwards.
  UnaryGenerate* Take() { return call_.exchange(nullptr); }

  void OnSample(const std::shared_ptr<const SampleResult>& sample) override {
    if (IsCutShort(sample->finish)) {
      cut_short_.push_back(sample);
    } else if (HasData(*sample)) {
      *result_.add_samples() = ToReply(*sample, part_, &params_);
    }
  }
  void OnDone(const absl::Status& status) override;

 private:
  // After the engine's last call.
  void Reply(UnaryGenerate* call, const absl::Status& status);

  std::atomic<UnaryGenerate*> call_;
  ReplyThread& reply_thread_;  // of the server; while the call has not ended
  const ReplyPart part_;
  // The engine's thread until OnDone, then whoever replies.
  std::optional<v1::GenerateRequest> params_;
  v1::GenerateResult result_;
  std::vector<std::shared_ptr<const SampleResult>> cut_short_;
};

class UnaryGenerate final : public ServerUnaryReactor {
 public:
  UnaryGenerate(const ServiceContext& context, const CallbackServerContext& call, const ByteBuffer& in, ByteBuffer* out)
      : engine_(*context.engine), out_(out) {
    bool with_prompt = false;
    absl::StatusOr<GenerateRequest> request = ParseGenerate(context, call, "bebop.v1.Rollout.Generate", in, &with_prompt);
    if (request.ok() && request->stream_tokens) {
      request = InvalidField("output.stream_tokens", "true", "possible with Generate; use GenerateStream");
    }
    if (!request.ok()) {
      Finish(ToGrpcStatus(request.status()));
      return;
    }
    request_id_ = request->request_id;
    observer_ = std::make_shared<GroupObserver>(this, &context.reply_thread, MakeReplyPart(context, *request, with_prompt));
    const int64_t min_step = request->weights.min_step;
    const absl::Status status = engine_.Submit(*std::move(request), observer_);
    if (!status.ok()) {
      if (observer_->Take() != nullptr) Finish(ToGrpcStatus(NameField(status, min_step)));
      return;
    }
    const auto end = [observer = observer_](const absl::Status& why) {
      if (UnaryGenerate* const taken = observer->Take(); taken != nullptr) taken->Finish(ToGrpcStatus(why));
    };
    watch_.Start(call, engine_, min_step, [this] { engine_.Detach(request_id_, observer_.get()); }, end);
  }

  // After Take().
  void Complete(const absl::Status& status, const v1::GenerateResult& result) {
    Finish(ToGrpcStatus(status.ok() ? SerializeMessage(result, out_) : status));
  }

  void OnCancel() override {
    if (observer_ == nullptr || observer_->Take() == nullptr) return;
    engine_.Detach(request_id_, observer_.get());
    Finish(CancelledStatus());
  }
  void OnDone() override { delete this; }

 private:
  EngineInterface& engine_;
  ByteBuffer* const out_;  // gRPC's; valid until Finish
  std::string request_id_;
  std::shared_ptr<GroupObserver> observer_;
  DeadlineWatch watch_;
};

void GroupObserver::OnDone(const absl::Status& status) {
  UnaryGenerate* call = Take();
  if (call == nullptr) return;
  if (cut_short_.empty()) {
    Reply(call, status);
  } else {
    reply_thread_.Add([self = shared_from_this(), call, status] { self->Reply(call, status); });
  }
}

void GroupObserver::Reply(UnaryGenerate* call, const absl::Status& status) {
  for (const auto& sample : cut_short_) *result_.add_samples() = ToReply(*sample, part_, &params_);
  auto* samples = result_.mutable_samples();
  std::sort(samples->pointer_begin(), samples->pointer_end(),
            [](const v1::SampleResult* a, const v1::SampleResult* b) { return a->sample_index() < b->sample_index(); });
  call->Complete(CallStatus(status, samples->size(), part_.request), result_);
}

// ---- GenerateStream ----

class StreamGenerate;

// Turns a group into events and feeds them to the stream one at a time; gRPC takes the next only when the reader's window has room, so
// what a slow reader leaves waits in `events_`, and HasRoom() pauses its group.
class StreamObserver final : public GenerateObserver, public std::enable_shared_from_this<StreamObserver> {
 public:
  StreamObserver(StreamGenerate* call, EngineInterface* engine, ReplyThread* reply_thread, ReplyPart part)
      : call_(call), engine_(engine), reply_thread_(*reply_thread), part_(std::move(part)) {}

  // Under the engine's lock.
  void OnAdmitted() override {
    v1::GenerateEvent event;
    event.mutable_admitted()->set_request_id(part_.request.request_id);
    Do([this, event = std::move(event)] { Push(event); });
  }
  void OnTokens(const SampleResult& partial, int32_t begin) override {
    if (!part_.request.stream_tokens) return;
    v1::GenerateEvent event;
    *event.mutable_token_chunk() = ToProto(partial, begin);
    Do([this, event = std::move(event)] { Push(event); });
  }
  void OnSample(const std::shared_ptr<const SampleResult>& sample) override {
    if (!HasData(*sample)) return;
    ++num_delivered_;
    was_cut_short_ = was_cut_short_ || IsCutShort(sample->finish);
    Do([this, sample] {
      v1::GenerateEvent event;
      *event.mutable_sample_result() = ToReply(*sample, part_, &params_);
      Push(event);
    });
  }
  void OnDone(const absl::Status& status) override {
    Do([this, call_status = CallStatus(status, num_delivered_, part_.request)] { PushEnd(call_status); });
  }
  bool HasRoom() const override { return unsent_bytes_.load(std::memory_order_relaxed) < limits::kStreamBufferBytes; }

  // gRPC threads.
  void OnWriteDone(bool ok);
  // The call ends with `status` once the events pushed so far are out.
  void End(const absl::Status& status);
  // Ends it as soon as no write is in flight, and drops what was not sent. False: it had ended already.
  bool Cancel();

 private:
  // Does `push` now, or, once a sample was cut short, elsewhere and in order. The engine may come here after the call has ended,
  // and then the server and its thread may be gone; they are there as long as the call has not, and it cannot end under the lock.
  template <typename Action>
  void Do(Action push) {
    if (!was_cut_short_) return push();
    MutexLock lock(&mutex_);
    if (call_ != nullptr) reply_thread_.Add([self = shared_from_this(), push = std::move(push)] { push(); });
  }
  void Push(const v1::GenerateEvent& event);
  void PushEnd(const absl::Status& call_status);
  // Starts the next write, or finishes the call when there is none left and the end is known.
  void Advance() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  Mutex mutex_;
  StreamGenerate* call_ ABSL_GUARDED_BY(mutex_);  // null: finished
  std::deque<ByteBuffer> events_ ABSL_GUARDED_BY(mutex_);  // front: in flight while writing_
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  std::optional<grpc::Status> end_ ABSL_GUARDED_BY(mutex_);
  std::atomic<int64_t> unsent_bytes_ = 0;
  EngineInterface* const engine_;
  ReplyThread& reply_thread_;  // of the server; see Do
  const ReplyPart part_;
  // Whoever makes the samples into events: the engine's thread until one was cut short, then the reply thread.
  std::optional<v1::GenerateRequest> params_;
  // Under the engine's lock.
  int num_delivered_ = 0;
  bool was_cut_short_ = false;
};

class StreamGenerate final : public ServerWriteReactor<ByteBuffer> {
 public:
  StreamGenerate(const ServiceContext& context, const CallbackServerContext& call, const ByteBuffer& in) : engine_(*context.engine) {
    bool with_prompt = false;
    absl::StatusOr<GenerateRequest> request = ParseGenerate(context, call, "bebop.v1.Rollout.GenerateStream", in, &with_prompt);
    if (!request.ok()) {
      Finish(ToGrpcStatus(request.status()));
      return;
    }
    request_id_ = request->request_id;
    observer_ =
        std::make_shared<StreamObserver>(this, &engine_, &context.reply_thread, MakeReplyPart(context, *request, with_prompt));
    const int64_t min_step = request->weights.min_step;
    const absl::Status status = engine_.Submit(*std::move(request), observer_);
    if (!status.ok()) {
      observer_->End(NameField(status, min_step));
      return;
    }
    watch_.Start(call, engine_, min_step, [this] { engine_.Detach(request_id_, observer_.get()); },
                 [observer = observer_](const absl::Status& why) { observer->End(why); });
  }

  void OnWriteDone(bool ok) override {
    if (!ok) engine_.Detach(request_id_, observer_.get());  // the stream is broken; OnCancel may come too late to do it
    observer_->OnWriteDone(ok);
  }
  void OnCancel() override {
    if (observer_ != nullptr && observer_->Cancel()) engine_.Detach(request_id_, observer_.get());
  }
  void OnDone() override { delete this; }

 private:
  EngineInterface& engine_;
  std::string request_id_;
  std::shared_ptr<StreamObserver> observer_;
  DeadlineWatch watch_;
};

void StreamObserver::Push(const v1::GenerateEvent& event) {
  ByteBuffer bytes;
  const absl::Status status = SerializeMessage(event, &bytes);
  if (!status.ok()) {
    End(status);
    return;
  }
  MutexLock lock(&mutex_);
  if (call_ == nullptr || end_.has_value()) return;
  unsent_bytes_ += static_cast<int64_t>(bytes.Length());
  events_.push_back(std::move(bytes));
  Advance();
}

void StreamObserver::PushEnd(const absl::Status& call_status) {
  if (call_status.ok()) {
    v1::GenerateEvent event;
    event.mutable_group_done()->set_request_id(part_.request.request_id);
    event.mutable_group_done()->set_num_samples(part_.request.num_samples);
    event.mutable_group_done()->mutable_prompt_token_ids()->Add(part_.request.prompt.begin(), part_.request.prompt.end());
    Push(event);
  }
  End(call_status);
}

void StreamObserver::End(const absl::Status& status) {
  MutexLock lock(&mutex_);
  if (call_ == nullptr || end_.has_value()) return;
  end_ = ToGrpcStatus(status);
  Advance();
}

bool StreamObserver::Cancel() {
  MutexLock lock(&mutex_);
  if (call_ == nullptr) return false;
  events_.resize(writing_ ? 1 : 0);  // the one in flight belongs to gRPC until OnWriteDone
  unsent_bytes_ = 0;
  end_ = CancelledStatus();
  Advance();
  return true;
}

void StreamObserver::OnWriteDone(bool ok) {
  bool wake = false;
  {
    MutexLock lock(&mutex_);
    writing_ = false;
    const auto bytes = static_cast<int64_t>(events_.front().Length());
    events_.pop_front();
    if (!ok) {  // the stream is broken
      events_.clear();
      unsent_bytes_ = 0;
      end_ = CancelledStatus();
    } else if (unsent_bytes_ > 0) {
      const int64_t before = unsent_bytes_.fetch_sub(bytes);
      wake = before >= limits::kStreamBufferBytes && before - bytes < limits::kStreamBufferBytes;
    }
    Advance();
  }
  if (wake) engine_->Wake();
}

void StreamObserver::Advance() {
  if (call_ == nullptr || writing_) return;
  if (!events_.empty()) {
    writing_ = true;
    call_->StartWrite(&events_.front());
  } else if (end_.has_value()) {
    std::exchange(call_, nullptr)->Finish(*end_);
  }
}

// ---- Score ----

class UnaryScore;

// Collects the scores of one call. Outlives it while the engine still holds one of its observers.
class ScoreCollector {
 public:
  ScoreCollector(UnaryScore* call, std::vector<ScoreRequest> requests) : call_(call), requests_(std::move(requests)), missing_(requests_.size()) {
    for (size_t i = 0; i < requests_.size(); ++i) result_.add_scores();
  }
  UnaryScore* Take() { return call_.exchange(nullptr); }
  const std::vector<ScoreRequest>& requests() const { return requests_; }

  // Engine thread.
  void OnScore(size_t index, const absl::Status& status, const ScoreResult& score);

 private:
  std::atomic<UnaryScore*> call_;
  const std::vector<ScoreRequest> requests_;
  // Engine thread only.
  size_t missing_;
  absl::Status first_error_;
  v1::ScoreResult result_;
};

class SequenceObserver final : public ScoreObserver {
 public:
  SequenceObserver(std::shared_ptr<ScoreCollector> collector, size_t index) : collector_(std::move(collector)), index_(index) {}
  void OnScore(const absl::Status& status, ScoreResult result) override { collector_->OnScore(index_, status, result); }

 private:
  const std::shared_ptr<ScoreCollector> collector_;
  const size_t index_;
};

class UnaryScore final : public ServerUnaryReactor {
 public:
  UnaryScore(const ServiceContext& context, const CallbackServerContext& call, const ByteBuffer& in, ByteBuffer* out)
      : engine_(*context.engine), out_(out) {
    absl::StatusOr<std::vector<ScoreRequest>> requests = ParseScore(context, call, in);
    if (!requests.ok()) {
      Finish(ToGrpcStatus(requests.status()));
      return;
    }
    collector_ = std::make_shared<ScoreCollector>(this, *std::move(requests));
    if (!SubmitAll()) return;
    const auto end = [collector = collector_](const absl::Status& why) {
      if (UnaryScore* const taken = collector->Take(); taken != nullptr) taken->Finish(ToGrpcStatus(why));
    };
    watch_.Start(call, engine_, /*min_step=*/0, [this] { CancelAll(); }, end);
  }

  // The engine's thread, after Take().
  void Complete(const absl::Status& status, const v1::ScoreResult& result) {
    Finish(ToGrpcStatus(status.ok() ? SerializeMessage(result, out_) : status));
  }

  void OnCancel() override {
    if (collector_ == nullptr || collector_->Take() == nullptr) return;
    CancelAll();
    Finish(CancelledStatus());
  }
  void OnDone() override { delete this; }

 private:
  // All sequences or none: when one is refused, those before it are cancelled, and the call has ended.
  bool SubmitAll() {
    MutexLock lock(&mutex_);
    handles_.reserve(collector_->requests().size());
    for (size_t i = 0; i < collector_->requests().size(); ++i) {
      uint64_t handle = 0;
      const absl::Status status = engine_.SubmitScore(collector_->requests()[i], std::make_shared<SequenceObserver>(collector_, i), &handle);
      if (status.ok()) {
        handles_.push_back(handle);
        continue;
      }
      if (collector_->Take() == nullptr) return false;
      for (const uint64_t submitted : handles_) engine_.CancelScore(submitted);
      Finish(ToGrpcStatus(status));
      return false;
    }
    return true;
  }
  void CancelAll() {
    MutexLock lock(&mutex_);
    for (const uint64_t handle : handles_) engine_.CancelScore(handle);
  }

  EngineInterface& engine_;
  ByteBuffer* const out_;  // gRPC's; valid until Finish
  std::shared_ptr<ScoreCollector> collector_;
  Mutex mutex_;
  std::vector<uint64_t> handles_ ABSL_GUARDED_BY(mutex_);
  DeadlineWatch watch_;
};

void ScoreCollector::OnScore(size_t index, const absl::Status& status, const ScoreResult& score) {
  if (status.ok()) {
    *result_.mutable_scores(static_cast<int>(index)) = ToProto(score, requests_[index]);
  } else {
    first_error_.Update(status);
  }
  if (--missing_ > 0) return;
  if (UnaryScore* call = Take(); call != nullptr) call->Complete(first_error_, result_);
}

// ---- the service ----

template <typename Base>
using WithRawMethods = v1::Rollout::WithRawCallbackMethod_Generate<v1::Rollout::WithRawCallbackMethod_GenerateStream<
    v1::Rollout::WithRawCallbackMethod_Score<v1::Rollout::WithRawCallbackMethod_Abort<Base>>>>;

class RolloutService final : public WithRawMethods<v1::Rollout::Service> {
 public:
  explicit RolloutService(const ServiceContext* context) : context_(*context) {}

  // The reactors delete themselves in OnDone.
  ServerUnaryReactor* Generate(CallbackServerContext* call, const ByteBuffer* in, ByteBuffer* out) override {
    return new UnaryGenerate(context_, *call, *in, out);
  }
  ServerWriteReactor<ByteBuffer>* GenerateStream(CallbackServerContext* call, const ByteBuffer* in) override {
    return new StreamGenerate(context_, *call, *in);
  }
  ServerUnaryReactor* Score(CallbackServerContext* call, const ByteBuffer* in, ByteBuffer* out) override {
    return new UnaryScore(context_, *call, *in, out);
  }
  ServerUnaryReactor* Abort(CallbackServerContext* call, const ByteBuffer* in, ByteBuffer* out) override {
    ServerUnaryReactor* reactor = call->DefaultReactor();
    v1::AbortRequest request;
    absl::Status status = context_.access.Check(*call, "bebop.v1.Rollout.Abort");
    if (status.ok()) status = ParseMessage(*in, &request);
    if (status.ok()) status = Validate(request, context_.rules);
    if (status.ok()) {
      v1::AbortResult result;
      for (const std::string& id : request.request_ids()) {
        if (context_.engine->Abort(id)) result.add_aborted_request_ids(id);
      }
      status = SerializeMessage(result, out);
    }
    reactor->Finish(ToGrpcStatus(status));
    return reactor;
  }

 private:
  const ServiceContext& context_;
};

}  // namespace

std::unique_ptr<grpc::Service> MakeRolloutService(const ServiceContext* context) { return std::make_unique<RolloutService>(context); }

}  // namespace bebop
