// SPDX-License-Identifier: Apache-2.0
#include <grpcpp/server_context.h>

#include <array>
#include <atomic>
#include <deque>
#include <memory>
#include <optional>
#include <span>
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

absl::Status TooMany(absl::string_view what) {
  return WithRetryAfter(DetailedError(absl::StatusCode::kResourceExhausted, "CAPACITY", absl::StrCat("too many ", what, " already")), kCapacityRetryDelay);
}

// At most so many calls of a kind at a time; the others are refused at once and leave threads and memory to the rest.
class CallLimit {
 public:
  CallLimit(int max, absl::string_view what) : max_(max), what_(what) {}

  absl::Status Enter() {
    if (num_.fetch_add(1) < max_) return absl::OkStatus();
    --num_;
    return TooMany(what_);
  }
  void Leave() { --num_; }

 private:
  const int max_;
  const absl::string_view what_;
  std::atomic<int> num_ = 0;
};

// A call whose answer comes from another thread. It answers once; cancelling it only tells whoever works on it.
class BlockingCall final : public ServerUnaryReactor {
 public:
  explicit BlockingCall(ByteBuffer* out) : out_(out) {}

  // May refuse. Before anybody else has the call.
  absl::Status Enter(CallLimit* limit) {
    const absl::Status status = limit->Enter();
    if (status.ok()) limit_ = limit;
    return status;
  }
  const std::atomic<bool>& cancelled() const { return cancelled_; }

  // Ends the call: it may be gone when this returns.
  void End(const absl::Status& status) {
    if (limit_ != nullptr) limit_->Leave();  // before the caller hears of it and calls again
    Finish(ToGrpcStatus(status));
  }
  template <typename Reply>
  void Answer(const absl::StatusOr<Reply>& reply) {
    End(reply.ok() ? SerializeMessage(*reply, out_) : reply.status());
  }

  void OnCancel() override { cancelled_ = true; }
  void OnDone() override { delete this; }

 private:
  ByteBuffer* const out_;  // gRPC's; valid until Finish
  CallLimit* limit_ = nullptr;
  std::atomic<bool> cancelled_ = false;
};

// One PushWeights stream. gRPC's threads put chunks in a queue and the service's writer takes them out, so that the next chunk is on the wire
// while one is being packed and hashed. The stream is read no further while limits::kPushQueueChunks wait.
class PushStream final : public ServerReadReactor<ByteBuffer> {
 public:
  // `limit` has been entered if `status` is OK, and is left when the stream ends.
  PushStream(const ServiceContext& context, WeightSession* session, BlockingCalls* writer, CallLimit* limit, ByteBuffer* out, const absl::Status& status)
      : context_(context), session_(*session), writer_(*writer), limit_(*limit), out_(out) {
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
    if (!finish.has_value()) return;
    limit_.Leave();  // before the caller hears of it and calls again
    Finish(*finish);
  }

  void Read() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    reading_ = true;
    StartRead(&incoming_);
  }

  // Has the writer work for this stream, once.
  void Schedule() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (scheduled_ || ended_ || (chunks_.empty() && !no_more_)) return;
    scheduled_ = writer_.Run([this] { Work(); });
    if (!scheduled_) End(TooMany("streams wait"));
  }

  void End(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (ended_) return;
    ended_ = true;
    end_ = ToGrpcStatus(status);
    chunks_.clear();
  }

  // On the writer: up to two chunks, which may be hashed together, or the end, and then it is the other streams' turn. The call is
  // not finished while `scheduled_`.
  void Work() {
    std::array<ByteBuffer, 2> bytes;
    size_t num_chunks = 0;
    {
      MutexLock lock(&mutex_);
      for (; !ended_ && !chunks_.empty() && num_chunks < bytes.size(); ++num_chunks) {
        bytes[num_chunks] = std::move(chunks_.front());
        chunks_.pop_front();
      }
      if (num_chunks > 0 && !reading_ && !no_more_) Read();
    }
    const absl::Status status = Write({bytes.data(), num_chunks});
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

  // Up to two chunks. Those before one that is refused are written.
  absl::Status Write(std::span<ByteBuffer> bytes) {
    size_t num_parsed = 0;
    absl::Status refused;
    while (num_parsed < bytes.size() && refused.ok()) {
      refused = Parse(&bytes[num_parsed], &parsed_[num_parsed]);
      if (refused.ok()) ++num_parsed;
    }
    if (num_parsed == 0) return refused;
    const auto chunk = [](const v1::WeightChunk& message) {
      return TensorChunk{message.tensor(), message.offset(), message.data(), DigestOf(message)};
    };
    const TensorChunk first = chunk(parsed_[0]);
    const bool same_update = num_parsed == 2 && parsed_[0].update_id() == parsed_[1].update_id();
    absl::Status status = same_update
                              ? session_.WriteChunks(update_id_, first, chunk(parsed_[1]))
                              : session_.WriteChunk(parsed_[0].update_id(), first.tensor, first.offset, first.bytes, first.digest);
    if (status.ok() && num_parsed == 2 && !same_update) {
      const TensorChunk second = chunk(parsed_[1]);
      status = session_.WriteChunk(update_id_, second.tensor, second.offset, second.bytes, second.digest);
    }
    return status.ok() ? refused : status;
  }

  absl::Status Parse(ByteBuffer* bytes, v1::WeightChunk* message) {
    if (absl::Status status = ParseMessage(*bytes, message); !status.ok()) return status;
    bytes->Clear();
    const absl::Status known = context_.rules.allow_unknown_fields ? absl::OkStatus() : CheckKnownFields(*message);
    if (!known.ok()) return known;
    return CompleteChunk(message, &update_id_, &tensor_);
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
  CallLimit& limit_;
  ByteBuffer* const out_;  // gRPC's; valid until Finish
  // The writer's alone.
  std::array<v1::WeightChunk, 2> parsed_;
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

// How a method is run.
struct Kind {
  bool needs_serving = true;   // a server that takes work
  bool is_short = false;       // waits for nothing but the session's lock and, at most, the chunk that is being written
  CallLimit* limit = nullptr;  // none: as many as there are threads
};
constexpr Kind kWork = {}, kLook = {.needs_serving = false, .is_short = true};

class WeightsService final : public WithRawMethods<v1::Weights::Service> {
 public:
  WeightsService(const ServiceContext* context, BlockingCalls* calls, WeightSessionOptions options)
      : context_(*context), calls_(*calls), session_(context->engine, &context->clock, std::move(options)) {}

  ServerUnaryReactor* GetWeightInfo(CallbackServerContext* call, const ByteBuffer* in, ByteBuffer* out) override {
    return Handle<v1::GetWeightInfoRequest>(*call, "GetWeightInfo", *in, out, kLook, [this](const v1::GetWeightInfoRequest& request, BlockingCall* reply) {
      reply->Answer<v1::WeightInfo>(ToProto(session_.GetInfo(request.tensors())));
    });
  }

  ServerUnaryReactor* StartWeightUpdate(CallbackServerContext* call, const ByteBuffer* in, ByteBuffer* out) override {
    return Handle<v1::StartWeightUpdateRequest>(
        *call, "StartWeightUpdate", *in, out, kWork, [this](const v1::StartWeightUpdateRequest& request, BlockingCall* reply) {
          const absl::StatusOr<WeightSession::StartRequest> start = ToSession(request);
          if (!start.ok()) return reply->End(start.status());
          reply->Answer(Translated<v1::WeightUpdate>(session_.Start(*start)));
        });
  }

  ServerReadReactor<ByteBuffer>* PushWeights(CallbackServerContext* call, ByteBuffer* out) override {
    absl::Status status = context_.access.Check(*call, "bebop.v1.Weights.PushWeights");
    if (status.ok()) status = context_.CheckServing();
    if (status.ok()) status = streams_.Enter();
    return new PushStream(context_, &session_, &writer_, &streams_, out, status);
  }

  ServerUnaryReactor* UpdateWeights(CallbackServerContext* call, const ByteBuffer* in, ByteBuffer* out) override {
    return Handle<v1::UpdateWeightsRequest>(
        *call, "UpdateWeights", *in, out, Kind{.limit = &reads_}, [this](const v1::UpdateWeightsRequest& request, BlockingCall* reply) {
          absl::Status status = Validate(request);
          if (status.ok()) status = session_.Read(request.update_id(), request.path(), reply->cancelled());
          if (!status.ok()) return reply->End(status);
          const absl::StatusOr<WeightSession::State> state = session_.Progress(request.update_id());
          if (!state.ok()) return reply->End(state.status());
          v1::UpdateWeightsResult result;
          *result.mutable_update() = ToProto(*state);
          reply->Answer<v1::UpdateWeightsResult>(result);
        });
  }

  ServerUnaryReactor* FinishWeightUpdate(CallbackServerContext* call, const ByteBuffer* in, ByteBuffer* out) override {
    return Handle<v1::FinishWeightUpdateRequest>(
        *call, "FinishWeightUpdate", *in, out, kWork, [this](const v1::FinishWeightUpdateRequest& request, BlockingCall* reply) {
          const absl::StatusOr<ExpectedDigests> expected = ToSession(request);
          if (!expected.ok()) return reply->End(expected.status());
          session_.Finish(request.update_id(), *expected, [reply](const absl::StatusOr<WeightSession::FinishResult>& result) {
            reply->Answer(Translated<v1::FinishWeightUpdateResult>(result));
          });
        });
  }

  ServerUnaryReactor* AbortWeightUpdate(CallbackServerContext* call, const ByteBuffer* in, ByteBuffer* out) override {
    return Handle<v1::AbortWeightUpdateRequest>(
        *call, "AbortWeightUpdate", *in, out, kLook, [this](const v1::AbortWeightUpdateRequest& request, BlockingCall* reply) {
          if (const absl::Status status = Validate(request); !status.ok()) return reply->End(status);
          const absl::StatusOr<std::string> id = session_.Abort(request.update_id());
          if (!id.ok()) return reply->End(id.status());
          v1::AbortWeightUpdateResult result;
          result.set_update_id(*id);
          reply->Answer<v1::AbortWeightUpdateResult>(result);
        });
  }

  ServerUnaryReactor* CheckWeights(CallbackServerContext* call, const ByteBuffer* in, ByteBuffer* out) override {
    return Handle<v1::CheckWeightsRequest>(*call, "CheckWeights", *in, out, Kind{.limit = &checks_}, [this](const v1::CheckWeightsRequest&, BlockingCall* reply) {
      reply->Answer(Translated<v1::CheckWeightsResult>(session_.Check()));
    });
  }

 private:
  template <typename Message, typename Value>
  static absl::StatusOr<Message> Translated(const absl::StatusOr<Value>& value) {
    if (!value.ok()) return value.status();
    return ToProto(*value);
  }

  // Runs `handler` on a thread for blocking calls of its kind; it ends the call.
  template <typename Request, typename Handler>
  ServerUnaryReactor* Handle(const CallbackServerContext& call, const char* method, const ByteBuffer& in, ByteBuffer* out, const Kind& kind,
                             const Handler& handler) {
    auto* const reply = new BlockingCall(out);  // deletes itself when it has ended
    Request request;
    absl::Status status = context_.access.Check(call, absl::StrCat("bebop.v1.Weights.", method));
    if (status.ok()) status = ParseMessage(in, &request);
    if (status.ok() && !context_.rules.allow_unknown_fields) status = CheckKnownFields(request);
    if (status.ok() && kind.needs_serving) status = context_.CheckServing();
    if (status.ok() && kind.limit != nullptr) status = reply->Enter(kind.limit);
    if (!status.ok()) {
      reply->End(status);
      return reply;
    }
    auto run = [handler, reply, request = std::move(request)] { handler(request, reply); };
    const bool taken = kind.is_short ? calls_.RunShort(std::move(run)) : calls_.Run(std::move(run));
    if (!taken) reply->End(TooMany("admin calls wait"));
    return reply;
  }

  const ServiceContext& context_;
  BlockingCalls& calls_;
  CallLimit streams_{limits::kPushStreams, "PushWeights streams are open"};
  // They take turns anyway, or hash all weights; callers that ask again and again leave threads for others.
  CallLimit reads_{2, "UpdateWeights calls run"}, checks_{2, "CheckWeights calls run"};
  WeightSession session_;
  BlockingCalls writer_{1, /*num_short_threads=*/0};  // ends before the session
};

}  // namespace

std::unique_ptr<grpc::Service> MakeWeightsService(const ServiceContext* context, BlockingCalls* calls, WeightSessionOptions options) {
  return std::make_unique<WeightsService>(context, calls, std::move(options));
}

}  // namespace bebop
