// SPDX-License-Identifier: Apache-2.0
#include <grpcpp/server_context.h>

#include "bebop/v1/info.grpc.pb.h"
#include "server/byte_messages.h"
#include "server/grpc_status.h"
#include "server/services.h"

namespace bebop {
namespace {

using grpc::ByteBuffer;
using grpc::CallbackServerContext;
using grpc::ServerUnaryReactor;

template <typename Base>
using WithRawMethods = v1::Info::WithRawCallbackMethod_GetServerInfo<v1::Info::WithRawCallbackMethod_GetModelInfo<
    v1::Info::WithRawCallbackMethod_GetLoads<v1::Info::WithRawCallbackMethod_Tokenize<v1::Info::WithRawCallbackMethod_Detokenize<Base>>>>>;

class InfoService final : public WithRawMethods<v1::Info::Service> {
 public:
  explicit InfoService(const ServiceContext* context) : context_(*context) {}

  ServerUnaryReactor* GetServerInfo(CallbackServerContext* call, const ByteBuffer* in, ByteBuffer* out) override {
    return Answer<v1::GetServerInfoRequest, v1::ServerInfo>("GetServerInfo", call, in, out, [this](const auto&, v1::ServerInfo* reply) {
      FillServerInfo(reply);
      return absl::OkStatus();
    });
  }

  ServerUnaryReactor* GetModelInfo(CallbackServerContext* call, const ByteBuffer* in, ByteBuffer* out) override {
    return Answer<v1::GetModelInfoRequest, v1::ModelInfo>("GetModelInfo", call, in, out, [this](const auto&, v1::ModelInfo* reply) {
      *reply = MakeModelInfo(context_.engine->info(), context_.served_model_name, context_.engine->tokenizer());
      return absl::OkStatus();
    });
  }

  ServerUnaryReactor* GetLoads(CallbackServerContext* call, const ByteBuffer* in, ByteBuffer* out) override {
    return Answer<v1::GetLoadsRequest, v1::Loads>("GetLoads", call, in, out, [this](const auto&, v1::Loads* reply) {
      *reply = MakeLoads(context_.engine->GetLoads(), context_.engine->control());
      reply->set_serving(context_.CheckServing().ok());
      reply->set_draining(context_.draining);
      reply->set_seconds_since_heartbeat(absl::ToDoubleSeconds(context_.engine->SinceHeartbeat()));
      return absl::OkStatus();
    });
  }

  ServerUnaryReactor* Tokenize(CallbackServerContext* call, const ByteBuffer* in, ByteBuffer* out) override {
    return Answer<v1::TokenizeRequest, v1::TokenizeResult>(
        "Tokenize", call, in, out, [this](const v1::TokenizeRequest& request, v1::TokenizeResult* reply) {
          if (absl::Status status = Validate(request, context_.rules); !status.ok()) return status;
          const std::vector<uint32_t> ids = context_.engine->tokenizer()->Encode(request.text(), request.parse_special());
          reply->mutable_token_ids()->Add(ids.begin(), ids.end());
          return absl::OkStatus();
        });
  }

  ServerUnaryReactor* Detokenize(CallbackServerContext* call, const ByteBuffer* in, ByteBuffer* out) override {
    return Answer<v1::DetokenizeRequest, v1::DetokenizeResult>(
        "Detokenize", call, in, out, [this](const v1::DetokenizeRequest& request, v1::DetokenizeResult* reply) {
          const Tokenizer* tokenizer = context_.engine->tokenizer();
          const int32_t vocab_size = tokenizer == nullptr ? 0 : tokenizer->vocab_size();
          if (absl::Status status = Validate(request, context_.rules, vocab_size); !status.ok()) return status;
          const std::vector<uint32_t> ids(request.token_ids().begin(), request.token_ids().end());
          reply->set_text(tokenizer->Decode(ids, request.skip_special()));
          return absl::OkStatus();
        });
  }

 private:
  template <typename Request, typename Reply, typename Handler>
  ServerUnaryReactor* Answer(absl::string_view method, CallbackServerContext* call, const ByteBuffer* in, ByteBuffer* out, const Handler& handler) {
    ServerUnaryReactor* reactor = call->DefaultReactor();
    Request request;
    Reply reply;
    absl::Status status = context_.access.Check(*call, absl::StrCat("bebop.v1.Info.", method));
    if (status.ok()) status = ParseMessage(*in, &request);
    if (status.ok() && !context_.rules.allow_unknown_fields) status = CheckKnownFields(request);
    if (status.ok()) status = handler(request, &reply);
    if (status.ok()) status = SerializeMessage(reply, out);
    reactor->Finish(ToGrpcStatus(status));
    return reactor;
  }

  void FillServerInfo(v1::ServerInfo* reply) const {
    const EngineInfo& info = context_.engine->info();
    const RequestRules rules = context_.Rules();
    const EngineLoads loads = context_.engine->GetLoads();
    const EngineControl control = context_.engine->control();
    reply->set_api_version("bebop.v1");
    reply->set_build(context_.build);
    reply->add_capabilities("score");
    reply->add_capabilities("stream_tokens");
    reply->add_capabilities("resume");
    reply->add_capabilities("weight_updates");
    if (rules.has_mtp) reply->add_capabilities("mtp");
    if (rules.has_tokenizer) reply->add_capabilities("tokenizer");
    reply->set_boot_id(context_.boot_id);
    reply->set_served_model_name(context_.served_model_name);
    reply->set_device(info.device);
    reply->set_instruction_set(info.instruction_set);
    reply->set_num_threads(info.num_threads);
    reply->set_dtype(DTypeName(info.dtype));
    reply->set_load_format(info.dummy_weights ? "dummy" : "auto");
    reply->set_max_model_len(info.max_model_len);
    reply->set_max_num_seqs(info.max_num_seqs);
    reply->set_max_step_tokens(info.max_step_tokens);
    reply->set_max_draft_tokens(info.max_draft_tokens);
    reply->mutable_default_speculation()->set_mode(ToProto(rules.default_mode));
    reply->mutable_default_speculation()->set_num_draft_tokens(rules.default_num_draft_tokens);
    reply->set_synthetic_acceptance_allowed(rules.allow_synthetic_acceptance);
    reply->set_weight_step(loads.target_step);
    reply->set_draft_step(loads.draft_step);
    reply->set_draining(context_.draining);
    reply->set_paused(control.paused);
    AddTags(control.sleeping, reply);
    reply->set_weight_bytes(info.weight_bytes);
    reply->set_kv_cache_bytes(info.kv_cache_bytes);
    reply->set_state_bytes(info.state_bytes);
  }

  const ServiceContext& context_;
};

}  // namespace

std::unique_ptr<grpc::Service> MakeInfoService(const ServiceContext* context) { return std::make_unique<InfoService>(context); }

}  // namespace bebop
