// SPDX-License-Identifier: Apache-2.0
#include <grpcpp/server_context.h>

#include <atomic>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "bebop/v1/weights.grpc.pb.h"
#include "engine/base/mutex.h"
#include "server/byte_messages.h"
#include "server/grpc_status.h"
#include "server/limits.h"
#include "server/services.h"
#include "server/status_details.h"
#include "server/translation.h"
#include "server/weight_session.h"
#include "server/weights_messages.h"

// Everything that takes longer than a look at memory runs off gRPC's threads: chunks on one thread of this service, in turn with each other
// as the session wants them anyway, the rest on the server's threads for blocking calls.
namespace bebop {
namespace {

using grpc::ByteBuffer;
using grpc::CallbackServerContext;
using grpc::ServerReadReactor;
using grpc::ServerUnaryReactor;

absl::Status CancelledError() { return absl::CancelledError("the call was cancelled, or its deadline passed"); }

absl::Status TooManyCalls() {
  return WithRetryAfter(DetailedError(absl::StatusCode::kResourceExhausted, "CAPACITY", "too many admin calls wait already"), kCapacityRetryDelay);
}

// A call whose answer comes from another thread. It answers once; cancelling it only tells whoever works on it.
class BlockingCall final : public ServerUnaryReactor {
 public:
  explicit BlockingCall(ByteBuffer* out) : out_(out) {}

  const std::atomic<bool>& cancelled() const { return cancelled_; }

  // Ends the call: it may be gone when this returns.
  void Fail(const absl::Status& status) { Finish(ToGrpcStatus(status)); }
  template <typename Reply>
  void Answer(const absl::StatusOr<Reply>& reply) {
    Fail(reply.ok() ? SerializeMessage(*reply, out_) : reply.status());
  }

  void OnCancel() override { cancelled_ = true; }
  void OnDone() override { delete this; }

 private:
  ByteBuffer* const out_;  // gRPC's; valid until Finish
  std::atomic<bool> cancelled_ = false;
};

// One PushWeights stream. gRPC's threads put chunks in a queue and the service's writer takes them out, so that the next chunk is on the wire
// while one is being packed and hashed. The stream is read no further while limits::kPushQueueChunks wait.
class PushStream final : public ServerReadReactor<ByteBuffer> {
 public:
  PushStream(const ServiceContext& context, WeightSession* session, BlockingCalls* writer, ByteBuffer* out, const absl::Status& status)
      : context_(context), session_(*session), writer_(*writer), out_(out) {
    if (!status.ok()) {
      ended_ = true;
      Finish(ToGrpcStatus(status));
      return;
    }
    MutexLock lock(&mutex_);
    Read();
  }

  void OnReadDone(bool ok) override {
    Update([this, ok]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
      reading_ = false;
      if (!ok) {
        no_more_ = true;
      } else if (!ended_) {
        chunks_.push_back(std::move(incoming_));
        incoming_.Clear();
        if (chunks_.size() < limits::kPushQueueChunks) Read();
      }
      Schedule();
    });
  }
  void OnCancel() override {
    Update([this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { End(CancelledError()); });
  }
  void OnDone() override { delete this; }

 private:
  // Runs `change` under the lock, and finishes the call when that has ended it and the writer is not in it. Last: the stream may be gone afterwards.
  template <typename Change>
  void Update(const Change& change) {
    std::optional<grpc::Status> finish;
    {
      MutexLock lock(&mutex_);
      change();
      if (ended_ && !scheduled_) finish = std::exchange(end_, std::nullopt);
    }
    if (finish.has_value()) Finish(*finish);
  }

  void Read() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    reading_ = true;
    StartRead(&incoming_);
  }

  // Has the writer work for this stream, once.
  void Schedule() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (scheduled_ || ended_ || (chunks_.empty() && !no_more_)) return;
    scheduled_ = writer_.Run([this] { Work(); });
    if (!scheduled_) End(TooManyCalls());
  }

  void End(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (ended_) return;
    ended_ = true;
    end_ = ToGrpcStatus(status);
    chunks_.clear();
  }

  // On the writer: one chunk, or the end, and then it is the other streams' turn. The call is not finished while `scheduled_`.
  void Work() {
    ByteBuffer bytes;
    bool has_chunk = false;
    {
      MutexLock lock(&mutex_);
      if (!ended_ && !chunks_.empty()) {
        bytes = std::move(chunks_.front());
        chunks_.pop_front();
        has_chunk = true;
        if (!reading_ && !no_more_) Read();
      }
    }
    absl::Status status;
    if (has_chunk) status = Write(bytes);
    Update([this, &status]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
      scheduled_ = false;
      if (!status.ok()) {
        End(status);
      } else if (!ended_ && chunks_.empty() && no_more_) {
        End(Reply());
      } else {
        Schedule();
      }
    });
  }

  absl::Status Write(const ByteBuffer& bytes) {
    if (absl::Status status = ParseMessage(bytes, &chunk_); !status.ok()) return status;
    if (absl::Status status = context_.rules.allow_unknown_fields ? absl::OkStatus() : CheckKnownFields(chunk_); !status.ok()) return status;
    if (absl::Status status = CompleteChunk(&chunk_, &update_id_, &tensor_); !status.ok()) return status;
    return session_.WriteChunk(update_id_, tensor_, chunk_.offset(), chunk_.data(), DigestOf(chunk_));
  }

  absl::Status Reply() {
    if (update_id_.empty()) return InvalidField("update_id", "missing", "optional in the first chunk of a stream");
    const absl::StatusOr<WeightSession::State> state = session_.Progress(update_id_);
    if (!state.ok()) return state.status();
    v1::PushWeightsResult result;
    *result.mutable_update() = ToProto(*state);
    return SerializeMessage(result, out_);
  }

  const ServiceContext& context_;
  WeightSession& session_;
  BlockingCalls& writer_;
  ByteBuffer* const out_;  // gRPC's; valid until Finish
  // The writer's alone.
  v1::WeightChunk chunk_;
  std::string update_id_, tensor_;

  Mutex mutex_;
  ByteBuffer incoming_;  // gRPC's while reading_
  std::deque<ByteBuffer> chunks_ ABSL_GUARDED_BY(mutex_);
  bool reading_ ABSL_GUARDED_BY(mutex_) = false;
  bool no_more_ ABSL_GUARDED_BY(mutex_) = false;
  bool scheduled_ ABSL_GUARDED_BY(mutex_) = false;
  bool ended_ ABSL_GUARDED_BY(mutex_) = false;
  std::optional<grpc::Status> end_ ABSL_GUARDED_BY(mutex_);  // until the call is finished
};

template <typename Base>
using WithRawMethods = v1::Weights::WithRawCallbackMethod_GetWeightInfo<v1::Weights::WithRawCallbackMethod_StartWeightUpdate<
    v1::Weights::WithRawCallbackMethod_PushWeights<v1::Weights::WithRawCallbackMethod_UpdateWeights<v1::Weights::WithRawCallbackMethod_FinishWeightUpdate<
        v1::Weights::WithRawCallbackMethod_AbortWeightUpdate<v1::Weights::WithRawCallbackMethod_CheckWeights<Base>>>>>>>;

class WeightsService final : public WithRawMethods<v1::Weights::Service> {
 public:
  WeightsService(const ServiceContext* context, BlockingCalls* calls, WeightSessionOptions options)
      : context_(*context), calls_(*calls), session_(context->engine, &context->clock, std::move(options)) {}

  ServerUnaryReactor* GetWeightInfo(CallbackServerContext* call, const ByteBuffer* in, ByteBuffer* out) override {
    return Handle<v1::GetWeightInfoRequest>(*call, "GetWeightInfo", *in, out, Serving::kAny, [this](const v1::GetWeightInfoRequest& request, BlockingCall* reply) {
      reply->Answer<v1::WeightInfo>(ToProto(session_.GetInfo(request.tensors())));
    });
  }

  ServerUnaryReactor* StartWeightUpdate(CallbackServerContext* call, const ByteBuffer* in, ByteBuffer* out) override {
    return Handle<v1::StartWeightUpdateRequest>(
        *call, "StartWeightUpdate", *in, out, Serving::kMust, [this](const v1::StartWeightUpdateRequest& request, BlockingCall* reply) {
          const absl::StatusOr<WeightSession::StartRequest> start = ToSession(request);
          if (!start.ok()) return reply->Fail(start.status());
          reply->Answer(Translated<v1::WeightUpdate>(session_.Start(*start)));
        });
  }

  ServerReadReactor<ByteBuffer>* PushWeights(CallbackServerContext* call, ByteBuffer* out) override {
    absl::Status status = context_.access.Check(*call, "bebop.v1.Weights.PushWeights");
    if (status.ok()) status = context_.CheckServing();
    return new PushStream(context_, &session_, &writer_, out, status);
  }

  ServerUnaryReactor* UpdateWeights(CallbackServerContext* call, const ByteBuffer* in, ByteBuffer* out) override {
    return Handle<v1::UpdateWeightsRequest>(
        *call, "UpdateWeights", *in, out, Serving::kMust, [this](const v1::UpdateWeightsRequest& request, BlockingCall* reply) {
          absl::Status status = Validate(request);
          if (status.ok()) status = session_.Read(request.update_id(), request.path(), reply->cancelled());
          if (!status.ok()) return reply->Fail(status);
          const absl::StatusOr<WeightSession::State> state = session_.Progress(request.update_id());
          if (!state.ok()) return reply->Fail(state.status());
          v1::UpdateWeightsResult result;
          *result.mutable_update() = ToProto(*state);
          reply->Answer<v1::UpdateWeightsResult>(result);
        });
  }

  ServerUnaryReactor* FinishWeightUpdate(CallbackServerContext* call, const ByteBuffer* in, ByteBuffer* out) override {
    return Handle<v1::FinishWeightUpdateRequest>(
        *call, "FinishWeightUpdate", *in, out, Serving::kMust, [this](const v1::FinishWeightUpdateRequest& request, BlockingCall* reply) {
          const absl::StatusOr<ExpectedDigests> expected = ToSession(request);
          if (!expected.ok()) return reply->Fail(expected.status());
          session_.Finish(request.update_id(), *expected, [reply](const absl::StatusOr<WeightSession::FinishResult>& result) {
            reply->Answer(Translated<v1::FinishWeightUpdateResult>(result));
          });
        });
  }

  ServerUnaryReactor* AbortWeightUpdate(CallbackServerContext* call, const ByteBuffer* in, ByteBuffer* out) override {
    return Handle<v1::AbortWeightUpdateRequest>(
        *call, "AbortWeightUpdate", *in, out, Serving::kAny, [this](const v1::AbortWeightUpdateRequest& request, BlockingCall* reply) {
          if (const absl::Status status = Validate(request); !status.ok()) return reply->Fail(status);
          const absl::StatusOr<std::string> id = session_.Abort(request.update_id());
          if (!id.ok()) return reply->Fail(id.status());
          v1::AbortWeightUpdateResult result;
          result.set_update_id(*id);
          reply->Answer<v1::AbortWeightUpdateResult>(result);
        });
  }

  ServerUnaryReactor* CheckWeights(CallbackServerContext* call, const ByteBuffer* in, ByteBuffer* out) override {
    return Handle<v1::CheckWeightsRequest>(*call, "CheckWeights", *in, out, Serving::kMust, [this](const v1::CheckWeightsRequest&, BlockingCall* reply) {
      reply->Answer(Translated<v1::CheckWeightsResult>(session_.Check()));
    });
  }

 private:
  // Whether a method needs a server that takes work.
  enum class Serving { kMust, kAny };

  template <typename Message, typename Value>
  static absl::StatusOr<Message> Translated(const absl::StatusOr<Value>& value) {
    if (!value.ok()) return value.status();
    return ToProto(*value);
  }

  // Runs `handler` on a thread for blocking calls; it ends the call.
  template <typename Request, typename Handler>
  ServerUnaryReactor* Handle(const CallbackServerContext& call, const char* method, const ByteBuffer& in, ByteBuffer* out, Serving serving,
                             const Handler& handler) {
    auto* const reply = new BlockingCall(out);  // deletes itself when it has ended
    Request request;
    absl::Status status = context_.access.Check(call, absl::StrCat("bebop.v1.Weights.", method));
    if (status.ok()) status = ParseMessage(in, &request);
    if (status.ok() && !context_.rules.allow_unknown_fields) status = CheckKnownFields(request);
    if (status.ok() && serving == Serving::kMust) status = context_.CheckServing();
    if (!status.ok()) {
      reply->Fail(status);
    } else if (!calls_.Run([handler, reply, request = std::move(request)] { handler(request, reply); })) {
      reply->Fail(TooManyCalls());
    }
    return reply;
  }

  const ServiceContext& context_;
  BlockingCalls& calls_;
  WeightSession session_;
  BlockingCalls writer_{1};  // ends before the session
};

}  // namespace

std::unique_ptr<grpc::Service> MakeWeightsService(const ServiceContext* context, BlockingCalls* calls, WeightSessionOptions options) {
  return std::make_unique<WeightsService>(context, calls, std::move(options));
}

}  // namespace bebop
