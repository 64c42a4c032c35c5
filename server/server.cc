// SPDX-License-Identifier: Apache-2.0
#include "server/server.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/impl/server_builder_option.h>
#include <grpcpp/impl/server_builder_plugin.h>
#include <grpcpp/impl/server_initializer.h>
#include <grpcpp/support/server_interceptor.h>
#include <netdb.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "engine/base/logging.h"
#include "engine/base/mutex.h"
#include "server/blocking_calls.h"
#include "server/http_endpoints.h"
#include "server/limits.h"
#include "server/metrics.h"
#include "server/resume_handle.h"
#include "server/service_context.h"
#include "server/services.h"

#ifndef BEBOP_VERSION
#error "BEBOP_VERSION comes from CMake"
#endif

namespace bebop {
namespace {

constexpr auto kHealthInterval = std::chrono::milliseconds(100);
constexpr auto kInsecureWarningInterval = std::chrono::minutes(1);
// A peer that vanished without a word (host down, cable out) is found by a ping after this long without traffic, and given up when the
// answer takes longer than the timeout; its requests then stop costing work.
constexpr int kKeepaliveIntervalMs = 60'000;
constexpr int kKeepaliveTimeoutMs = 20'000;
// An engine that has not gone round its loop for so long hangs. Steps take seconds at most, and it goes round while it is paused, asleep or waiting.
constexpr absl::Duration kHeartbeatLimit = absl::Minutes(2);
constexpr auto kFlushTime = std::chrono::seconds(2);  // for the last replies to leave, after the engine has drained

// gRPC's reflection library registers itself with every server of the process; off loopback its calls are cut here.
class ReflectionRefuser final : public grpc::experimental::Interceptor {
 public:
  explicit ReflectionRefuser(grpc::experimental::ServerRpcInfo* info) : info_(info) {}
  void Intercept(grpc::experimental::InterceptorBatchMethods* methods) override {
    if (methods->QueryInterceptionHookPoint(grpc::experimental::InterceptionHookPoints::POST_RECV_INITIAL_METADATA)) {
      info_->server_context()->TryCancel();
    }
    methods->Proceed();
  }

 private:
  grpc::experimental::ServerRpcInfo* const info_;
};

class ReflectionRefuserFactory final : public grpc::experimental::ServerInterceptorFactoryInterface {
 public:
  grpc::experimental::Interceptor* CreateServerInterceptor(grpc::experimental::ServerRpcInfo* info) override {
    return absl::StartsWith(info->method(), "/grpc.reflection.") ? new ReflectionRefuser(info) : nullptr;
  }
};

struct Listener {
  std::unique_ptr<grpc::Server> server;
  std::string address;
  std::vector<std::string> services;  // full names, gRPC's own among them
};

// Writes down what a server really serves, whoever registered it.
class ServiceLister final : public grpc::ServerBuilderPlugin {
 public:
  explicit ServiceLister(std::vector<std::string>* names) : names_(*names) {}
  std::string name() override { return "bebop.service_lister"; }
  void InitServer(grpc::ServerInitializer*) override {}
  void Finish(grpc::ServerInitializer* initializer) override { names_ = *initializer->GetServiceList(); }
  void ChangeArguments(const std::string&, void*) override {}

 private:
  std::vector<std::string>& names_;
};

class ListServices final : public grpc::ServerBuilderOption {
 public:
  explicit ListServices(std::vector<std::string>* names) : names_(names) {}
  void UpdateArguments(grpc::ChannelArguments*) override {}
  void UpdatePlugins(std::vector<std::unique_ptr<grpc::ServerBuilderPlugin>>* plugins) override {
    plugins->push_back(std::make_unique<ServiceLister>(names_));
  }

 private:
  std::vector<std::string>* const names_;
};

// IPv6 addresses need brackets before the port.
std::string Address(const std::string& host, int port) {
  return absl::StrContains(host, ':') ? absl::StrCat("[", host, "]:", port) : absl::StrCat(host, ":", port);
}

// Why nothing can listen there, as far as another try tells: gRPC keeps it to its log.
std::string WhyNot(const std::string& host, int32_t port) {
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
  addrinfo* found = nullptr;
  if (const int error = getaddrinfo(host.c_str(), absl::StrCat(port).c_str(), &hints, &found); error != 0) {
    return absl::StrCat(": ", gai_strerror(error));
  }
  std::string reason;
  const int listener = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const int reuse = 1;  // as gRPC does: a connection that is closing is no reason
  if (listener < 0 || setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &reuse, sizeof(reuse)) != 0 ||
      bind(listener, found->ai_addr, found->ai_addrlen) != 0 || listen(listener, 1) != 0) {
    reason = absl::StrCat(": ", std::generic_category().message(errno));
  }
  if (listener >= 0) close(listener);
  freeaddrinfo(found);
  return reason;
}

struct ListenerLimits {
  const char* name;
  int64_t receive_bytes;
  int64_t quota_bytes;
};

// `flags`: those that say where, for the error.
absl::StatusOr<Listener> Listen(const ListenOptions& options, const char* flags, int32_t port, const ListenerLimits& limits,
                                const std::vector<grpc::Service*>& services) {
  grpc::ServerBuilder builder;
  int bound_port = 0;
  builder.AddListeningPort(Address(options.host, port), grpc::InsecureServerCredentials(), &bound_port);
  for (grpc::Service* service : services) builder.RegisterService(service);
  builder.SetMaxReceiveMessageSize(static_cast<int>(limits.receive_bytes));
  builder.SetMaxSendMessageSize(-1);  // replies are bounded by what was asked for
  builder.SetResourceQuota(grpc::ResourceQuota(limits.name).Resize(static_cast<size_t>(limits.quota_bytes)));
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);  // or two servers could share a port unnoticed
  builder.AddChannelArgument(GRPC_ARG_MAX_METADATA_SIZE, bebop::limits::kMetadataBytes);
  builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, bebop::limits::kConcurrentStreams);
  // Clients may ping idle connections; those that ping more often are sent away. Our own pings find dead peers.
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, bebop::limits::kMinPingIntervalSeconds * 1000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveIntervalMs);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
  if (!options.is_loopback) {
    std::vector<std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface>> interceptors;
    interceptors.push_back(std::make_unique<ReflectionRefuserFactory>());
    builder.experimental().SetInterceptorCreators(std::move(interceptors));
  }
  Listener listener;
  builder.SetOption(std::make_unique<ListServices>(&listener.services));
  listener.server = builder.BuildAndStart();
  if (listener.server == nullptr || bound_port == 0) {
    return absl::InvalidArgumentError(absl::StrCat(flags, ": cannot listen on ", Address(options.host, port), WhyNot(options.host, port)));
  }
  listener.address = Address(options.host, bound_port);
  if (const absl::Status status = CheckComplete(listener.services); !status.ok()) return status;
  return listener;
}

}  // namespace

struct Server::Impl {
  ServiceContext context;
  std::unique_ptr<grpc::Service> rollout, rollout_info, admin_info, weights, control;
  BlockingCalls blocking_calls{limits::kBlockingCalls};  // of the services above
  Listener rollout_listener, admin_listener;
  std::string http_address;
  std::unique_ptr<HttpEndpoints> http;  // below what it tells of, so that it ends first
  bool warn_insecure = false;

  Mutex mutex;
  CondVar changed;
  bool listening ABSL_GUARDED_BY(mutex) = false;  // on both ports
  bool stopping ABSL_GUARDED_BY(mutex) = false;
  bool drain_started ABSL_GUARDED_BY(mutex) = false;
  bool drained ABSL_GUARDED_BY(mutex) = false;
  std::thread health_thread;

  void SetHealth(bool serving) {
    for (const Listener* listener : {&rollout_listener, &admin_listener}) {
      grpc::HealthCheckServiceInterface* health = listener->server->GetHealthCheckService();
      health->SetServingStatus(serving);  // the services that it knows, and ""
      health->SetServingStatus("bebop.v1.Info", serving);
      health->SetServingStatus("bebop.v1.Rollout", serving);
      if (listener == &rollout_listener) continue;
      health->SetServingStatus("bebop.v1.Weights", serving);
      health->SetServingStatus("bebop.v1.Control", serving);
    }
  }

  void FollowHealth() {
    bool serving = true;
    auto next_warning = std::chrono::steady_clock::now();
    while (true) {
      const absl::Status status = context.CheckServing();
      if (status.ok() != serving) {
        serving = status.ok();
        SetHealth(serving);
        Log(serving ? LogLevel::kInfo : LogLevel::kWarning, absl::StrCat("health: ", serving ? "SERVING" : absl::StrCat("NOT_SERVING, ", status.message())));
      }
      if (warn_insecure && std::chrono::steady_clock::now() >= next_warning) {
        Log(LogLevel::kWarning, "--insecure-no-auth: anyone who reaches this address can use this server");
        next_warning += kInsecureWarningInterval;
      }
      MutexLock lock(&mutex);
      if (!stopping) changed.WaitFor(&mutex, kHealthInterval);
      if (stopping) return;
    }
  }

  HttpReply AnswerHttp(const std::string& path) const {
    if (path == "/metrics") return {.content_type = "text/plain; version=0.0.4; charset=utf-8", .body = Exposition()};
    if (path == "/health" || path == "/liveness") return Probe(CheckAlive());
    if (path == "/ready") return Probe(context.CheckServing());
    if (path == "/version") {
      return {.content_type = "application/json",
              .body = absl::StrCat("{\"version\": \"" BEBOP_VERSION "\", \"boot_id\": \"", context.boot_id, "\"}\n")};
    }
    return {.status = 404, .body = "/metrics, /health, /liveness, /ready or /version\n"};
  }

  static HttpReply Probe(const absl::Status& status) {
    if (status.ok()) return {.body = "ok\n"};
    return {.status = 503, .body = absl::StrCat(status.message(), "\n")};
  }

  // Whether a new process would do better. Takes no lock of the engine, and holds while it drains, is paused or sleeps.
  absl::Status CheckAlive() const {
    if (absl::Status health = context.engine->health(); !health.ok()) return health;
    const absl::Duration age = context.engine->SinceHeartbeat();
    if (age <= kHeartbeatLimit) return absl::OkStatus();
    return absl::InternalError(absl::StrCat("the engine has not gone round its loop for ", absl::FormatDuration(age)));
  }

  std::string Exposition() const {
    const RequestRules rules = context.Rules();
    return context.metrics->Exposition(
        context.engine->GetLoads(),
        {.serving = context.CheckServing().ok(),
         .draining = context.draining,
         .control = context.engine->control(),
         .since_heartbeat = context.engine->SinceHeartbeat(),
         .num_draft_tokens = rules.default_mode == SpeculationMode::kOff ? 0 : rules.default_num_draft_tokens});
  }

  void StopListening() {
    const auto deadline = std::chrono::system_clock::now() + kFlushTime;
    rollout_listener.server->Shutdown(deadline);
    admin_listener.server->Shutdown(deadline);
  }
};

Server::Server(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

absl::StatusOr<std::unique_ptr<Server>> Server::Start(EngineInterface* engine, const ListenOptions& options) {
  const EngineInfo& info = engine->info();
  auto impl = std::make_unique<Impl>();
  ServiceContext& context = impl->context;
  context.engine = engine;
  context.served_model_name = options.served_model_name.empty() ? info.model_name : options.served_model_name;
  context.boot_id = absl::StrCat(absl::Hex(RandomBits(), absl::kZeroPad16));
  context.build = "bebop-server " BEBOP_VERSION;
  context.max_request_time = options.max_request_time;
  context.drain_timeout = options.drain_timeout;
  context.on_draining = [running = impl.get()] {
    MutexLock lock(&running->mutex);
    if (running->listening) running->SetHealth(false);
  };
  context.access = options.access;
  const bool insecure = !options.is_loopback && options.access.open();
  context.metrics = std::make_shared<Metrics>(MetricsOptions{.model_name = context.served_model_name,
                                                             .build = context.build,
                                                             .vllm = options.vllm_metrics,
                                                             .sglang = options.sglang_metrics,
                                                             .insecure_no_auth = insecure});
  engine->ListenToSampleEnds([metrics = context.metrics](const SampleResult& sample) { metrics->OnSample(sample); });
  context.rules.max_model_len = info.max_model_len;
  context.rules.vocab_size = info.config.vocab_size;
  context.rules.max_draft_tokens = info.max_draft_tokens;
  context.rules.has_mtp = info.has_mtp;
  context.rules.has_tokenizer = engine->tokenizer() != nullptr;
  context.rules.allow_synthetic_acceptance = options.allow_synthetic_acceptance || info.dummy_weights;
  context.rules.allow_unknown_fields = options.allow_unknown_fields;
  context.rules.model = ModelHash(info.config);
  context.rules.default_mode = options.default_mode;
  // Whatever the default mode: a request may choose a mode that drafts and leave the number open.
  context.rules.default_num_draft_tokens = std::min(options.default_num_draft_tokens, info.max_draft_tokens);

  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  impl->rollout = MakeRolloutService(&context);
  impl->rollout_info = MakeInfoService(&context);
  impl->admin_info = MakeInfoService(&context);
  WeightSessionOptions weight_options;
  weight_options.staging_limit_bytes = options.weight_staging_bytes;
  if (!options.weights_root.empty()) {
    absl::StatusOr<WeightRoot> root = WeightRoot::Open(options.weights_root);
    if (!root.ok()) return absl::Status(root.status().code(), absl::StrCat("--weights-root: ", root.status().message()));
    weight_options.root = *std::move(root);
  }
  weight_options.on_end = [metrics = context.metrics, engine](UpdateEnd end, const UpdateTimes& times) {
    metrics->OnWeightUpdate(end, times);
    if (end == UpdateEnd::kCommitted) metrics->OnCommit(engine->GetLoads());
  };
  impl->weights = MakeWeightsService(&context, &impl->blocking_calls, std::move(weight_options));
  impl->control = MakeControlService(&context, &impl->blocking_calls);
  absl::StatusOr<Listener> rollout = Listen(options, "--host/--port", options.port, {"rollout", limits::kRolloutReceiveBytes, limits::kRolloutQuotaBytes},
                                            {impl->rollout.get(), impl->rollout_info.get()});
  if (!rollout.ok()) return rollout.status();
  impl->rollout_listener = *std::move(rollout);
  absl::StatusOr<Listener> admin = Listen(options, "--host/--admin-port", options.admin_port,
                                          {"admin", limits::kAdminReceiveBytes, limits::kAdminQuotaBytes}, {impl->admin_info.get(), impl->weights.get(), impl->control.get()});
  if (!admin.ok()) return admin.status();
  impl->admin_listener = *std::move(admin);
  impl->warn_insecure = insecure;
  if (!options.is_loopback && !options.access.open()) {
    Log(LogLevel::kWarning, "tokens cross the network in clear: this build has no TLS; put one in front where the network is not trusted");
  }
  {
    MutexLock lock(&impl->mutex);
    impl->SetHealth(context.CheckServing().ok());
    impl->listening = true;
  }
  Impl* const running = impl.get();
  if (options.http_port >= 0) {
    auto http = HttpEndpoints::Start(options.host, options.http_port, [running](const std::string& path) { return running->AnswerHttp(path); });
    if (!http.ok()) return http.status();
    impl->http = *std::move(http);
    impl->http_address = Address(options.host, impl->http->port());
  }
  impl->health_thread = std::thread([running] { running->FollowHealth(); });
  return std::unique_ptr<Server>(new Server(std::move(impl)));
}

Server::~Server() {
  {
    MutexLock lock(&impl_->mutex);
    impl_->stopping = true;
    impl_->changed.NotifyAll();
  }
  impl_->health_thread.join();
  impl_->StopListening();
}

const std::string& Server::rollout_address() const { return impl_->rollout_listener.address; }
const std::string& Server::admin_address() const { return impl_->admin_listener.address; }
const std::string& Server::http_address() const { return impl_->http_address; }
const std::string& Server::served_model_name() const { return impl_->context.served_model_name; }

void Server::Drain(absl::Duration timeout) {
  {
    MutexLock lock(&impl_->mutex);
    if (impl_->drain_started) {
      while (!impl_->drained) impl_->changed.Wait(&impl_->mutex);
      return;
    }
    impl_->drain_started = true;
    impl_->context.draining = true;
  }
  impl_->SetHealth(false);
  impl_->context.engine->Drain(timeout);
  impl_->context.reply_thread.Flush();
  impl_->StopListening();
  MutexLock lock(&impl_->mutex);
  impl_->drained = true;
  impl_->changed.NotifyAll();
}

}  // namespace bebop
