// SPDX-License-Identifier: Apache-2.0
#include "server/metrics.h"

#include <prometheus/client_metric.h>
#include <prometheus/metric_family.h>
#include <prometheus/text_serializer.h>

#include <algorithm>
#include <cmath>
#include <sstream>

#include "absl/strings/str_cat.h"

namespace bebop {
namespace {

using prometheus::ClientMetric;
using prometheus::MetricFamily;
using prometheus::MetricType;
using Labels = std::vector<ClientMetric::Label>;

// Seconds. Rollouts run from milliseconds to an hour.
const prometheus::Histogram::BucketBoundaries kRequestBuckets = {0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1,   2.5,
                                                                 5,     10,    20,   40,   80,   160, 320,  640, 1280, 2560};
const prometheus::Histogram::BucketBoundaries kTokenBuckets = {0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05,
                                                               0.1,    0.2,    0.5,   1,     2,     5,    10};
const prometheus::Histogram::BucketBoundaries kUpdateBuckets = {0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600};

constexpr int64_t kMinDrafts = 1000;
constexpr double kDropShare = 0.2;
constexpr double kDropErrors = 3.0;

// Why a sample ended, as `finished_reason`; null: it never does so as a result.
const char* FinishedReason(FinishReason reason) {
  switch (reason) {
    case FinishReason::kStop: return "stop";
    case FinishReason::kLength: return "length";
    case FinishReason::kAborted: return "abort";
    case FinishReason::kDrained: return "drained";
    case FinishReason::kNonFinite: return "non_finite";
    case FinishReason::kDeadline: return "time_budget";
    case FinishReason::kSuperseded: return "superseded";
    case FinishReason::kWeightPolicy: return "weight_policy";
    case FinishReason::kFailed: return "error";
    case FinishReason::kNone: return nullptr;
  }
  return nullptr;
}

// Ended from outside, with tokens that are data.
bool IsPartial(FinishReason reason) {
  return reason == FinishReason::kAborted || reason == FinishReason::kDrained || reason == FinishReason::kDeadline ||
         reason == FinishReason::kSuperseded || reason == FinishReason::kWeightPolicy;
}

const char* EndName(UpdateEnd end) {
  switch (end) {
    case UpdateEnd::kCommitted: return "committed";
    case UpdateEnd::kFailed: return "failed";
    case UpdateEnd::kAborted: return "aborted";
    case UpdateEnd::kExpired: return "expired";
  }
  return "";
}

double Ratio(double part, double whole) { return whole > 0.0 ? part / whole : 0.0; }

// Tokens an iteration with drafts yields: the accepted ones and the one sampled after them.
double AcceptLength(const SpecCounts& spec) {
  return spec.num_spec_steps > 0 ? 1.0 + Ratio(static_cast<double>(spec.num_accepted_draft_tokens), static_cast<double>(spec.num_spec_steps)) : 0.0;
}

double AcceptRate(const SpecCounts& spec) {
  return Ratio(static_cast<double>(spec.num_accepted_draft_tokens), static_cast<double>(spec.num_draft_tokens));
}

// Collects families under the names that were asked for.
class Page {
 public:
  explicit Page(const MetricsOptions& options) : options_(options) {}

  struct Names {
    const char* bebop;
    const char* vllm = nullptr;
    const char* sglang = nullptr;
  };

  void Counter(const Names& names, const char* help, double value, Labels labels = {}) {
    ClientMetric metric = Labelled(std::move(labels));
    metric.counter.value = value;
    Add(names, help, MetricType::Counter, std::move(metric));
  }
  void Gauge(const Names& names, const char* help, double value, Labels labels = {}) {
    ClientMetric metric = Labelled(std::move(labels));
    metric.gauge.value = value;
    Add(names, help, MetricType::Gauge, std::move(metric));
  }
  void Histogram(const Names& names, const char* help, const prometheus::Histogram& histogram, Labels labels = {}) {
    ClientMetric metric = Labelled(std::move(labels));
    metric.histogram = histogram.Collect().histogram;
    Add(names, help, MetricType::Histogram, std::move(metric));
  }
  void Summary(const Names& names, const char* help, int64_t count, double sum) {
    ClientMetric metric = Labelled({});
    metric.summary.sample_count = static_cast<uint64_t>(count);
    metric.summary.sample_sum = sum;
    Add(names, help, MetricType::Summary, std::move(metric));
  }

  std::string Text() const {
    std::ostringstream out;
    prometheus::TextSerializer().Serialize(out, families_);
    return out.str();
  }

 private:
  ClientMetric Labelled(Labels labels) const {
    ClientMetric metric;
    metric.label = std::move(labels);
    metric.label.push_back({"model_name", options_.model_name});
    return metric;
  }

  // Metrics of one name must come in one row; callers add them one after the other.
  void Add(const Names& names, const char* help, MetricType type, ClientMetric metric) {
    AddOne("bebop:", names.bebop, help, type, metric);
    if (options_.vllm) AddOne("vllm:", names.vllm, help, type, metric);
    if (options_.sglang) AddOne("sglang:", names.sglang, help, type, metric);
  }

  void AddOne(const char* prefix, const char* name, const char* help, MetricType type, const ClientMetric& metric) {
    if (name == nullptr) return;
    const std::string full_name = absl::StrCat(prefix, name);
    auto family = std::find_if(families_.begin(), families_.end(), [&full_name](const MetricFamily& entry) { return entry.name == full_name; });
    if (family == families_.end()) family = families_.insert(family, MetricFamily{full_name, help, type, {}});
    family->metric.push_back(metric);
  }

  const MetricsOptions& options_;
  std::vector<MetricFamily> families_;
};

void AddRequests(const EngineLoads& loads, Page* page) {
  page->Gauge({"num_requests_running", "num_requests_running", "num_running_reqs"}, "Requests (groups of samples, and scores) that hold resources.",
              loads.running_requests);
  page->Gauge({"num_requests_waiting", "num_requests_waiting", "num_queue_reqs"}, "Requests that were accepted and not started yet.",
              loads.waiting_requests);
  page->Gauge({"groups_inflight"}, "Requests that were accepted and have not ended.", loads.running_requests + loads.waiting_requests);
  page->Gauge({"num_sequences_running"}, "Sequences in the running batch.", loads.running_sequences);
  page->Gauge({"max_num_seqs"}, "Most sequences in a batch.", loads.max_num_seqs);
  page->Counter({"requests_submitted_total", nullptr, "num_requests_total"},
                "Requests accepted: those that finished, were cancelled, failed, run or wait.", static_cast<double>(loads.submitted));
  page->Counter({"requests_finished_total"}, "Requests whose samples all came to their own end.", static_cast<double>(loads.finished));
  page->Counter({"requests_cancelled_total", nullptr, "num_aborted_requests_total"}, "Requests that were cut short.",
                static_cast<double>(loads.cancelled));
  page->Counter({"requests_failed_total"}, "Requests that missed their deadline, or that the engine failed.", static_cast<double>(loads.failed));
  page->Counter({"requests_refused_total"}, "Requests that were never accepted.", static_cast<double>(loads.refused));
  for (int i = 0; i < kNumFinishReasons; ++i) {
    const char* reason = FinishedReason(static_cast<FinishReason>(i));
    if (reason == nullptr) continue;
    page->Counter({"request_success_total", "request_success_total"}, "Samples by how they ended.",
                  static_cast<double>(loads.samples_by_finish[i]), {{"finished_reason", reason}});
  }
  for (int i = 0; i < kNumFinishReasons; ++i) {
    if (!IsPartial(static_cast<FinishReason>(i))) continue;
    page->Counter({"partial_results_total"}, "Samples that were cut short and returned with their tokens so far.",
                  static_cast<double>(loads.samples_by_finish[i]), {{"reason", FinishedReason(static_cast<FinishReason>(i))}});
  }
}

void AddTokensAndMemory(const EngineLoads& loads, Page* page) {
  page->Counter({"prompt_tokens_total", "prompt_tokens_total", "prompt_tokens_total"}, "Prompt tokens of started groups, each prompt once.",
                static_cast<double>(loads.prompt_tokens));
  page->Counter({"generation_tokens_total", "generation_tokens_total", "generation_tokens_total"}, "Tokens generated, after trimming at stops.",
                static_cast<double>(loads.generated_tokens));
  page->Counter({"num_preemptions_total", "num_preemptions_total"}, "Sequences that lost their pages and were, or will be, recomputed.",
                static_cast<double>(loads.preemptions));
  page->Counter({"kv_recomputed_tokens_total"}, "Tokens whose caches were computed again, after preemption, sleep or new weights.",
                static_cast<double>(loads.recomputed_tokens));
  page->Counter({"engine_steps_total"}, "Steps of the engine.", static_cast<double>(loads.steps));
  page->Gauge({"kv_cache_usage_perc", "kv_cache_usage_perc", "token_usage"}, "Share of KV pages in use, 0 to 1.",
              Ratio(loads.used_pages, loads.total_pages));
  page->Gauge({"kv_pages_used"}, "KV pages in use.", loads.used_pages);
  page->Gauge({"kv_pages"}, "KV pages.", loads.total_pages);
  page->Gauge({"state_slots_used"}, "Recurrent-state slots in use.", loads.used_state_slots);
  page->Gauge({"state_slots"}, "Recurrent-state slots.", loads.total_state_slots);
  page->Gauge({"cache_config_info", "cache_config_info"}, "Always 1; the labels tell how much cache there is.", 1,
              {{"num_gpu_blocks", absl::StrCat(loads.total_pages)}, {"num_state_slots", absl::StrCat(loads.total_state_slots)}});
  page->Gauge({"queued_bytes"}, "Host memory of waiting requests.", static_cast<double>(loads.queued_bytes));
  page->Gauge({"retained_bytes"}, "Host memory of finished samples that are kept for callers that come back.", static_cast<double>(loads.retained_bytes));
}

void AddSpeculation(const EngineLoads& loads, const MetricsState& state, bool dropped, Page* page) {
  const SpecCounts& spec = loads.spec;
  page->Counter({"spec_decode_num_drafts_total", "spec_decode_num_drafts_total"}, "Verifications with at least one draft token.",
                static_cast<double>(spec.num_spec_steps));
  page->Counter({"spec_decode_num_draft_tokens_total", "spec_decode_num_draft_tokens_total"}, "Draft tokens verified.",
                static_cast<double>(spec.num_draft_tokens));
  page->Counter({"spec_decode_num_accepted_tokens_total", "spec_decode_num_accepted_tokens_total"},
                "Draft tokens accepted, before trimming at stops.", static_cast<double>(spec.num_accepted_draft_tokens));
  page->Counter({"spec_decode_num_trimmed_tokens_total"}, "Accepted draft tokens that a stop cut off.", static_cast<double>(spec.num_trimmed_tokens));
  for (int i = 0; i < kMaxDraftTokens; ++i) {
    page->Counter({"spec_decode_num_accepted_tokens_per_pos_total", "spec_decode_num_accepted_tokens_per_pos_total"},
                  "Draft tokens accepted at a position.", static_cast<double>(spec.accepted_per_pos[i]), {{"position", absl::StrCat(i)}});
  }
  for (int i = 0; i < kMaxDraftTokens; ++i) {
    page->Counter({"spec_decode_num_drafted_per_pos_total"}, "Draft tokens at a position whose predecessors were all accepted.",
                  static_cast<double>(spec.drafted_per_pos[i]), {{"position", absl::StrCat(i)}});
  }
  page->Gauge({"spec_accept_length", nullptr, "spec_accept_length"}, "Mean tokens of a verification since the start: 1 + accepted / drafts.",
              AcceptLength(spec));
  page->Gauge({"spec_accept_rate", nullptr, "spec_accept_rate"}, "Share of draft tokens accepted since the start.", AcceptRate(spec));
  page->Gauge({"spec_current_k"}, "Draft tokens of requests that leave it to the server.", state.num_draft_tokens);
  const std::pair<const char*, const SpecCounts*> versions[] = {{"current", &loads.version_spec}, {"previous", &loads.previous_version_spec}};
  for (const auto& [version, counts] : versions) {
    page->Gauge({"spec_version_draft_tokens"}, "Draft tokens verified under a weight version.", static_cast<double>(counts->num_draft_tokens),
                {{"version", version}});
  }
  for (const auto& [version, counts] : versions) {
    page->Gauge({"spec_version_accept_rate"}, "Share of draft tokens accepted under a weight version.", AcceptRate(*counts), {{"version", version}});
  }
  for (const auto& [version, counts] : versions) {
    page->Gauge({"spec_version_accept_length"}, "Mean tokens of a verification under a weight version.", AcceptLength(*counts), {{"version", version}});
  }
  page->Gauge({"spec_acceptance_dropped"}, "1 while clearly fewer drafts are accepted than at best since the draft layer last changed.",
              dropped ? 1 : 0);
}

void AddWeights(const EngineLoads& loads, Page* page) {
  page->Gauge({"weight_version"}, "Step of the target's weights.", static_cast<double>(loads.target_step));
  page->Gauge({"draft_weight_version"}, "Step of the draft layer's weights.", static_cast<double>(loads.draft_step));
  page->Summary({"weight_update_stall_seconds"}, "Time for which a swap of weights held generation up.", loads.weight_commits,
                absl::ToDoubleSeconds(loads.total_swap_time));
  for (int i = 0; i < kNumStepSpreads; ++i) {
    const std::string spread = i + 1 < kNumStepSpreads ? absl::StrCat(i) : absl::StrCat(i, "+");
    page->Counter({"samples_by_version_spread"}, "Samples by the steps between the first and the last weights that made them.",
                  static_cast<double>(loads.samples_by_spread[i]), {{"spread", spread}});
  }
}

void AddState(const MetricsOptions& options, const MetricsState& state, Page* page) {
  page->Gauge({"serving"}, "1 while health says SERVING.", state.serving ? 1 : 0);
  page->Gauge({"draining"}, "1 once the server drains.", state.draining ? 1 : 0);
  page->Gauge({"paused"}, "1 while generation is paused.", state.control.paused ? 1 : 0);
  for (const auto& [tag, sleeps] : {std::pair("weights", state.control.sleeping.weights), std::pair("kv_cache", state.control.sleeping.kv_cache)}) {
    page->Gauge({"sleeping"}, "1 for what was given back for others to use.", sleeps ? 1 : 0, {{"tag", tag}});
  }
  page->Gauge({"heartbeat_age_seconds"}, "Since the engine last went round its loop.", absl::ToDoubleSeconds(state.since_heartbeat));
  page->Gauge({"insecure_no_auth"}, "1 with --insecure-no-auth: whoever reaches the server may use it.", options.insecure_no_auth ? 1 : 0);
  page->Gauge({"build_info"}, "Always 1; the label tells the version.", 1, {{"build", options.build}});
}

}  // namespace

bool AcceptanceDropped(const SpecCounts& now, const SpecCounts& before) {
  if (now.num_draft_tokens < kMinDrafts || before.num_draft_tokens < kMinDrafts) return false;
  const auto variance = [](const SpecCounts& spec) {
    const double rate = AcceptRate(spec);
    return rate * (1.0 - rate) / static_cast<double>(spec.num_draft_tokens);
  };
  const double drop = AcceptRate(before) - AcceptRate(now);
  return drop > kDropShare * AcceptRate(before) && drop > kDropErrors * std::sqrt(variance(now) + variance(before));
}

void AcceptanceWatch::OnCommit(const SpecCounts& ended, int64_t draft_step) {
  open_.Add(ended);
  if (open_.num_draft_tokens >= kMinDrafts) {
    last_ = std::exchange(open_, SpecCounts());
    if (best_.num_draft_tokens == 0 || AcceptRate(last_) > AcceptRate(best_)) best_ = last_;
  }
  if (std::exchange(draft_step_, draft_step) != draft_step) best_ = last_;
}

bool AcceptanceWatch::Dropped(const SpecCounts& version) const {
  SpecCounts now = open_;
  now.Add(version);
  return AcceptanceDropped(now.num_draft_tokens >= kMinDrafts ? now : last_, best_);
}

Metrics::Metrics(MetricsOptions options)
    : options_(std::move(options)),
      time_to_first_token_(kRequestBuckets),
      inter_token_latency_(kTokenBuckets),
      e2e_(kRequestBuckets),
      queue_(kRequestBuckets),
      prefill_(kRequestBuckets),
      decode_(kRequestBuckets) {
  for (const char* phase : {"check", "commit", "stage"}) update_phases_.try_emplace(phase, kUpdateBuckets);
  for (const UpdateEnd end : {UpdateEnd::kCommitted, UpdateEnd::kFailed, UpdateEnd::kAborted, UpdateEnd::kExpired}) updates_[end] = 0;
}

void Metrics::OnSample(const SampleResult& sample) {
  if (sample.finish == FinishReason::kNone || sample.finish == FinishReason::kFailed) return;
  queue_.Observe(absl::ToDoubleSeconds(sample.queue_time));
  e2e_.Observe(absl::ToDoubleSeconds(sample.total_time));
  if (sample.token_ids.empty()) return;  // cut short before its first token
  prefill_.Observe(absl::ToDoubleSeconds(sample.prefill_time));
  decode_.Observe(absl::ToDoubleSeconds(sample.decode_time));
  time_to_first_token_.Observe(absl::ToDoubleSeconds(sample.time_to_first_token));
  if (sample.token_ids.size() > 1) {
    inter_token_latency_.Observe(absl::ToDoubleSeconds(sample.decode_time) / static_cast<double>(sample.token_ids.size() - 1));
  }
}

void Metrics::OnWeightUpdate(UpdateEnd end, const UpdateTimes& times) {
  if (end == UpdateEnd::kCommitted) {
    update_phases_.at("stage").Observe(absl::ToDoubleSeconds(times.stage));
    update_phases_.at("check").Observe(absl::ToDoubleSeconds(times.check));
    update_phases_.at("commit").Observe(absl::ToDoubleSeconds(times.commit));
  }
  MutexLock lock(&mutex_);
  ++updates_[end];
}

void Metrics::OnCommit(const EngineLoads& loads) {
  MutexLock lock(&mutex_);
  acceptance_.OnCommit(loads.previous_version_spec, loads.draft_step);
}

std::string Metrics::Exposition(const EngineLoads& loads, const MetricsState& state) const {
  Page page(options_);
  AddRequests(loads, &page);
  AddTokensAndMemory(loads, &page);
  bool dropped = false;
  {
    MutexLock lock(&mutex_);
    dropped = acceptance_.Dropped(loads.version_spec);
  }
  AddSpeculation(loads, state, dropped, &page);
  AddWeights(loads, &page);
  for (const auto& [phase, histogram] : update_phases_) {
    page.Histogram({"weight_update_seconds"}, "Time of the phases of weight updates that were committed: stage, check, commit.", histogram, {{"phase", phase}});
  }
  {
    MutexLock lock(&mutex_);
    for (const auto& [end, count] : updates_) {
      page.Counter({"weight_update_total"}, "Weight updates that ended.", static_cast<double>(count), {{"result", EndName(end)}});
    }
  }
  page.Histogram({"time_to_first_token_seconds", "time_to_first_token_seconds", "time_to_first_token_seconds"},
                 "From arrival to a sample's first token, once per delivery.", time_to_first_token_);
  page.Histogram({"inter_token_latency_seconds", "inter_token_latency_seconds", "inter_token_latency_seconds"},
                 "Mean time between a sample's tokens, once per delivery.", inter_token_latency_);
  page.Histogram({"e2e_request_latency_seconds", "e2e_request_latency_seconds", "e2e_request_latency_seconds"},
                 "From arrival to a sample's end, once per delivery.", e2e_);
  page.Histogram({"request_queue_time_seconds", "request_queue_time_seconds", "queue_time_seconds"}, "A sample's time in the queue, once per delivery.", queue_);
  page.Histogram({"request_prefill_time_seconds", "request_prefill_time_seconds"}, "From a sample's start to its first token, once per delivery.", prefill_);
  page.Histogram({"request_decode_time_seconds", "request_decode_time_seconds"}, "From a sample's first token to its end, once per delivery.", decode_);
  AddState(options_, state, &page);
  return page.Text();
}

}  // namespace bebop
