// SPDX-License-Identifier: Apache-2.0
#include "engine/schedule/engine_core.h"

#include <algorithm>
#include <map>
#include <optional>
#include <set>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/base/status_reason.h"
#include "engine/schedule/delivery_ledger.h"
#include "engine/schedule/scheduler.h"
#include "engine/schedule/sequence.h"
#include "kernels/common/check.h"

namespace bebop {
namespace {

constexpr char kCanNeverFit[] = "bebop/can-never-fit";
// Of a count that a resumed sample brings: room to count on.
constexpr int32_t kMaxCarried = 1 << 30;

absl::Status MarkIf(bool never, absl::Status status) {
  if (never) status.SetPayload(kCanNeverFit, absl::Cord());
  return status;
}

int64_t HostBytes(const GenerateRequest& request) {
  int64_t bytes = static_cast<int64_t>(sizeof(Group) + request.request_id.size() + 4 * request.prompt.size() +
                                       4 * request.stopping.stop_token_ids.size() + sizeof(Sequence) * request.num_samples);
  for (const std::string& text : request.stopping.stop_strings) bytes += static_cast<int64_t>(5 * text.size());  // text and borders
  for (const SampleResult& resumed : request.resume) bytes += DeliveryLedger::SampleBytes(resumed);
  return bytes;
}

int64_t HostBytes(const ScoreRequest& request) {
  return static_cast<int64_t>(sizeof(ScoreWork) + 4 * request.token_ids.size() + 4 * request.token_ids_logprob.size());
}

// Largest target step less the smallest.
uint64_t StepSpread(const std::vector<WeightSpan>& spans) {
  if (spans.empty()) return 0;
  const auto before = [](const WeightSpan& a, const WeightSpan& b) { return a.target_step < b.target_step; };
  const auto [low, high] = std::minmax_element(spans.begin(), spans.end(), before);
  return static_cast<uint64_t>(high->target_step) - static_cast<uint64_t>(low->target_step);
}

}  // namespace

struct EngineCore::Impl {
  // Unfinished groups by arrival: whatever is done to all of them happens in that order, in every run.
  struct LiveGroup {
    std::unique_ptr<Group> group;
    DeliveryLedger::Entry* entry = nullptr;
  };
  using Deadline = std::tuple<absl::Time, uint64_t, bool>;  // when, arrival (groups) or handle (scores), is_score

  Impl(EngineCoreOptions core_options, const Clock* core_clock, Executor* core_executor)
      : options(std::move(core_options)),
        clock(core_clock),
        executor(core_executor),
        scheduler(options.scheduler),
        ledger(options.scheduler.max_result_bytes, options.scheduler.result_ttl) {
    // The largest step, so that the steady step does not allocate.
    const size_t num_seqs = static_cast<size_t>(options.scheduler.max_num_seqs);
    plan.sequences.reserve(num_seqs);
    plan.page_copies.reserve(num_seqs);
    result.sequences.reserve(num_seqs);
    progress.reserve(num_seqs);
    epochs.NameCurrent(options.weights);
  }

  absl::Status CheckTokens(const char* what, const std::vector<uint32_t>& tokens) const;
  absl::Status CheckRequest(const GenerateRequest& request) const;
  absl::Status CheckResume(const GenerateRequest& request) const;
  absl::Status CheckRequest(const ScoreRequest& request) const;
  absl::Status CheckOpen() const;

  LiveGroup* FindLive(const std::string& id);
  void Watch(absl::Time deadline, uint64_t key, bool is_score);
  void Unwatch(absl::Time deadline, uint64_t key, bool is_score);
  void EndSample(LiveGroup* live, Sequence* sample, FinishReason finish);
  void EndGroup(LiveGroup* live, FinishReason finish, const absl::Status& status, bool retain, int64_t* counter);
  void Discard(LiveGroup* live);
  void EndScore(ScoreWork* score, const absl::Status& status, ScoreResult score_result, int64_t* counter);
  bool Expire(absl::Time now);
  void DeliverProgress(absl::Time now);
  bool WaitsForStep(const LiveGroup& live) const;
  absl::Status ExecuteDrops();
  bool SpreadsTooFar(const Group& group, const Sequence& sample) const;
  void EndEarly(LiveGroup* live, const std::vector<Sequence*>& samples, FinishReason finish);
  void EndIfDone(LiveGroup* live);
  int32_t EndPolicies(uint64_t arrival);

  const EngineCoreOptions options;
  const Clock* const clock;
  Executor* const executor;
  Scheduler scheduler;
  DeliveryLedger ledger;

  std::map<uint64_t, LiveGroup> groups;               // by arrival
  std::unordered_map<std::string, uint64_t> arrival_of;  // by request id, of unfinished groups
  std::map<uint64_t, std::unique_ptr<ScoreWork>> scores;  // by handle
  std::set<Deadline> deadlines;
  uint64_t next_arrival = 1;
  absl::Time drain_deadline = absl::InfiniteFuture();
  bool draining = false;
  absl::Status health;
  WeightEpochs epochs;
  bool paused = false;
  int64_t abort_epoch = 0;
  std::vector<uint64_t> resumed;  // arrivals of groups with resumed samples, whose spans nobody has held against their policy
  EngineLoads counts;

  // Reused between steps.
  StepPlan plan;
  StepResult result;
  std::vector<Work*> admitted;
  std::vector<Scheduler::Progress> progress;
  std::vector<Scheduler::FinishedScore> finished_scores;
};

EngineCore::EngineCore(EngineCoreOptions options, const Clock* clock, Executor* executor)
    : impl_(std::make_unique<Impl>(std::move(options), clock, executor)) {}

EngineCore::~EngineCore() = default;

// ---- Submission ----

absl::Status EngineCore::Impl::CheckTokens(const char* what, const std::vector<uint32_t>& tokens) const {
  if (options.vocab_size <= 0) return absl::OkStatus();
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] >= static_cast<uint32_t>(options.vocab_size)) {
      return absl::InvalidArgumentError(absl::StrCat(what, "[", i, "] is ", tokens[i], ", vocab_size is ", options.vocab_size));
    }
  }
  return absl::OkStatus();
}

absl::Status EngineCore::Impl::CheckRequest(const GenerateRequest& request) const {
  if (request.request_id.empty()) return absl::InvalidArgumentError("request_id is empty");
  if (request.prompt.empty()) return absl::InvalidArgumentError("prompt is empty");
  if (request.num_samples < 1) return absl::InvalidArgumentError(absl::StrCat("num_samples is ", request.num_samples, ", must be >= 1"));
  if (request.stopping.max_new_tokens < 1) {
    return absl::InvalidArgumentError(absl::StrCat("max_new_tokens is ", request.stopping.max_new_tokens, ", must be >= 1"));
  }
  if (request.speculation.num_draft_tokens < 0 || request.speculation.num_draft_tokens > options.max_draft_tokens) {
    return absl::InvalidArgumentError(absl::StrCat("num_draft_tokens is ", request.speculation.num_draft_tokens, ", must be 0..",
                                                   options.max_draft_tokens));
  }
  const int64_t length = static_cast<int64_t>(request.prompt.size()) + request.stopping.max_new_tokens;
  if (length > options.scheduler.max_model_len) {
    return absl::InvalidArgumentError(absl::StrCat("prompt (", request.prompt.size(), ") + max_new_tokens (",
                                                   request.stopping.max_new_tokens, ") = ", length, ", max_model_len is ",
                                                   options.scheduler.max_model_len));
  }
  BEBOP_RETURN_IF_ERROR(CheckTokens("prompt", request.prompt));
  BEBOP_RETURN_IF_ERROR(CheckTokens("stop_token_ids", request.stopping.stop_token_ids));
  if (request.stopping.stop_token_ids.size() > kMaxStopTokenIds) {
    return absl::InvalidArgumentError(absl::StrCat("stop_token_ids has ", request.stopping.stop_token_ids.size(), " ids, the limit is ",
                                                   kMaxStopTokenIds));
  }
  for (const std::string& text : request.stopping.stop_strings) {
    if (text.empty()) return absl::InvalidArgumentError("a stop string is empty");
  }
  if (request.weights.max_step_spread < 0) {
    return absl::InvalidArgumentError(absl::StrCat("max_step_spread is ", request.weights.max_step_spread, ", must be >= 0"));
  }
  if (!request.stopping.stop_strings.empty() && options.token_bytes == nullptr) {
    return absl::FailedPreconditionError("stop strings need a tokenizer, and this checkpoint has none");
  }
  return CheckResume(request);
}

// What a resumed sample may say is what this engine could have said of it: everything else would break a counter later.
absl::Status EngineCore::Impl::CheckResume(const GenerateRequest& request) const {
  if (request.resume.empty()) return absl::OkStatus();
  if (request.resume.size() != static_cast<size_t>(request.num_samples)) {
    return absl::InvalidArgumentError(absl::StrCat("resume has ", request.resume.size(), " samples, num_samples is ", request.num_samples));
  }
  const StopRules rules(request.stopping, options.eos_token_ids, &options.token_bytes);
  int32_t last_index = -1;
  for (size_t i = 0; i < request.resume.size(); ++i) {
    const SampleResult& sample = request.resume[i];
    const std::string where = absl::StrCat("resume[", i, "]");
    const auto refuse = [&](const auto&... parts) { return absl::InvalidArgumentError(absl::StrCat(where, parts...)); };
    if (sample.sample_index <= last_index || sample.sample_index >= kPrefixSub) {
      return refuse(".sample_index is ", sample.sample_index, ", must be greater than that before it (", last_index, ") and less than ",
                    kPrefixSub);
    }
    last_index = sample.sample_index;
    if (sample.seed_used != request.sampling.seed) {
      return refuse(".seed_used is ", sample.seed_used, ", the request's seed is ", request.sampling.seed);
    }
    const int64_t length = static_cast<int64_t>(sample.token_ids.size());
    if (length >= request.stopping.max_new_tokens) {
      return refuse(" has ", length, " tokens, max_new_tokens is ", request.stopping.max_new_tokens, ": nothing is left to sample");
    }
    BEBOP_RETURN_IF_ERROR(CheckTokens(absl::StrCat(where, ".token_ids").c_str(), sample.token_ids));
    const std::tuple<const char*, bool, size_t> arrays[] = {
        {"logprobs", request.output.logprobs, sample.logprobs.size()},
        {"raw_logprobs", request.output.raw_logprobs, sample.raw_logprobs.size()},
        {"entropy", request.output.entropy, sample.entropy.size()},
        {"draft_logprobs", request.output.draft_logprobs, sample.draft_logprobs.size()},
        {"token_source", request.output.token_source, sample.token_source.size()},
    };
    for (const auto& [name, wanted, size] : arrays) {
      if (wanted && size != sample.token_ids.size()) return refuse(".", name, " has ", size, " values for ", length, " tokens");
    }
    int64_t end = 0;
    for (const WeightSpan& span : sample.weight_spans) {
      if (span.begin != end || span.end <= span.begin) {
        return refuse(".weight_spans has [", span.begin, ", ", span.end, ") where a span from ", end, " is due");
      }
      end = span.end;
    }
    if (end != length) return refuse(".weight_spans end at ", end, ", the sample has ", length, " tokens");
    const SpecCounts& spec = sample.spec;
    const int64_t most = (length + 1) * kMaxDraftTokens;
    bool sound = true;
    for (const int64_t count : {spec.num_spec_steps, spec.num_draft_tokens, spec.num_accepted_draft_tokens, spec.num_trimmed_tokens}) {
      sound = sound && count >= 0 && count <= most;
    }
    for (int32_t place = 0; place < kMaxDraftTokens; ++place) {
      sound = sound && spec.drafted_per_pos[place] >= 0 && spec.drafted_per_pos[place] <= most && spec.accepted_per_pos[place] >= 0 &&
              spec.accepted_per_pos[place] <= most && spec.overlap_per_pos[place] >= 0 && spec.overlap_per_pos[place] <= static_cast<double>(most);
    }
    if (!sound) return refuse(".spec has counts that ", length, " tokens cannot have");
    for (const auto& [name, count] : {std::pair("preemptions", sample.preemptions), std::pair("recomputed_tokens", sample.recomputed_tokens)}) {
      if (count < 0 || count > kMaxCarried) return refuse(".", name, " is ", count, ", must be 0..", kMaxCarried);
    }
    if (sample.cached_tokens < 0 || static_cast<size_t>(sample.cached_tokens) > request.prompt.size()) {
      return refuse(".cached_tokens is ", sample.cached_tokens, ", the prompt has ", request.prompt.size());
    }
    if (sample.pending_drafts < 0) return refuse(".pending_drafts is ", sample.pending_drafts, ", must be >= 0");
    StopMatcher matcher(&rules);
    for (int64_t t = 0; t < length; ++t) {
      if (matcher.Push(sample.token_ids[t]).has_value()) return refuse(".token_ids[", t, "] completes a stop: the sample has ended");
    }
  }
  return absl::OkStatus();
}

absl::Status EngineCore::Impl::CheckRequest(const ScoreRequest& request) const {
  if (request.token_ids.empty()) return absl::InvalidArgumentError("token_ids is empty");
  if (static_cast<int64_t>(request.token_ids.size()) > options.scheduler.max_model_len) {
    return absl::InvalidArgumentError(absl::StrCat("token_ids has ", request.token_ids.size(), " tokens, max_model_len is ",
                                                   options.scheduler.max_model_len));
  }
  if (request.draft_depth < 0 || request.draft_depth > kMaxDraftTokens) {
    return absl::InvalidArgumentError(absl::StrCat("draft_depth is ", request.draft_depth, ", must be 0..", kMaxDraftTokens));
  }
  BEBOP_RETURN_IF_ERROR(CheckTokens("token_ids", request.token_ids));
  return CheckTokens("token_ids_logprob", request.token_ids_logprob);
}

absl::Status EngineCore::Impl::CheckOpen() const {
  if (!health.ok()) return absl::InternalError(absl::StrCat("the engine has failed: ", health.message()));
  if (draining) return absl::UnavailableError("the server is draining");
  return absl::OkStatus();
}

absl::Status EngineCore::Submit(GenerateRequest request, std::shared_ptr<GenerateObserver> observer) {
  Impl& impl = *impl_;
  const auto refuse = [&](absl::Status status) {
    ++impl.counts.refused;
    return status;
  };
  if (!impl.health.ok()) return refuse(impl.CheckOpen());
  if (absl::Status status = impl.CheckRequest(request); !status.ok()) return refuse(std::move(status));
  if (DeliveryLedger::Entry* entry = impl.ledger.Find(request.request_id)) {
    if (entry->body_hash() != request.body_hash) {
      return refuse(absl::AlreadyExistsError(absl::StrCat(
          "request id ", request.request_id, " is of a request with another body, which runs or whose result is still kept")));
    }
    GenerateObserver* const listener = observer.get();
    impl.ledger.Attach(entry, std::move(observer));
    Impl::LiveGroup* const live = impl.FindLive(request.request_id);
    if (live == nullptr || !live->group->request.stream_tokens || !live->group->admitted) return absl::OkStatus();
    for (const Sequence& sample : live->group->samples) {
      if (sample.state != Sequence::State::kEnded && sample.num_output() > 0) listener->OnTokens(sample.result, 0);
    }
    return absl::OkStatus();
  }
  if (absl::Status status = impl.CheckOpen(); !status.ok()) return refuse(std::move(status));
  const int64_t target_step = impl.epochs.current_name().target_step;
  if (request.weights.refuse_if_behind && target_step < request.weights.min_step) {
    return refuse(StatusWithReason(absl::StatusCode::kFailedPrecondition, "STEP_NOT_REACHED",
                                   absl::StrCat("weights.min_step: ", request.weights.min_step, " is not reached; the target is at step ",
                                                target_step, " (weights.wait_for_step would wait)")));
  }

  const int64_t bytes = HostBytes(request);
  const bool resumes = !request.resume.empty();
  auto group = std::make_unique<Group>(std::move(request), impl.options.eos_token_ids, &impl.options.token_bytes);
  group->queued_bytes = bytes;
  bool never = false;
  if (absl::Status status = impl.scheduler.CheckRoom(*group, &never); !status.ok()) return refuse(MarkIf(never, std::move(status)));
  group->arrival = impl.next_arrival++;
  group->submitted = impl.clock->Now();
  const GenerateRequest& accepted = group->request;
  impl.scheduler.Add(group.get());
  impl.Watch(group->deadline, group->arrival, false);
  impl.arrival_of.emplace(accepted.request_id, group->arrival);
  Impl::LiveGroup live;
  live.entry = impl.ledger.Open(accepted.request_id, accepted.body_hash, accepted.num_samples, std::move(observer));
  const uint64_t arrival = group->arrival;
  if (resumes) impl.resumed.push_back(arrival);
  live.group = std::move(group);
  impl.groups.emplace(arrival, std::move(live));
  ++impl.counts.submitted;
  return absl::OkStatus();
}

absl::Status EngineCore::SubmitScore(ScoreRequest request, std::shared_ptr<ScoreObserver> observer, uint64_t* handle) {
  Impl& impl = *impl_;
  const auto refuse = [&](absl::Status status) {
    ++impl.counts.refused;
    return status;
  };
  if (absl::Status status = impl.CheckOpen(); !status.ok()) return refuse(std::move(status));
  if (absl::Status status = impl.CheckRequest(request); !status.ok()) return refuse(std::move(status));
  const int64_t bytes = HostBytes(request);
  auto score = std::make_unique<ScoreWork>(std::move(request));
  score->queued_bytes = bytes;
  score->score_bytes = score->num_rows() * impl.options.scheduler.score_bytes_per_token;
  bool never = false;
  if (absl::Status status = impl.scheduler.CheckRoom(*score, &never); !status.ok()) return refuse(MarkIf(never, std::move(status)));
  score->arrival = score->handle = impl.next_arrival++;
  score->submitted = impl.clock->Now();
  score->observer = std::move(observer);
  impl.scheduler.Add(score.get());
  impl.Watch(score->deadline, score->handle, true);
  ++impl.counts.submitted;
  *handle = score->handle;
  impl.scores.emplace(score->handle, std::move(score));
  return absl::OkStatus();
}

bool EngineCore::CanNeverFit(const absl::Status& refusal) { return refusal.GetPayload(kCanNeverFit).has_value(); }

EngineCore::Impl::LiveGroup* EngineCore::Impl::FindLive(const std::string& id) {
  const auto it = arrival_of.find(id);
  return it == arrival_of.end() ? nullptr : &groups.find(it->second)->second;
}

void EngineCore::Impl::Watch(absl::Time deadline, uint64_t key, bool is_score) {
  if (deadline != absl::InfiniteFuture()) deadlines.emplace(deadline, key, is_score);
}

void EngineCore::Impl::Unwatch(absl::Time deadline, uint64_t key, bool is_score) { deadlines.erase({deadline, key, is_score}); }

// ---- Endings ----

// Hands the result of a sample over to the ledger. Its resources are the scheduler's to free.
void EngineCore::Impl::EndSample(LiveGroup* live, Sequence* sample, FinishReason finish) {
  Group& group = *live->group;
  const absl::Time now = clock->Now();
  SampleResult& done = sample->result;
  done.finish = finish;
  const bool own_end = finish == FinishReason::kStop || finish == FinishReason::kLength || finish == FinishReason::kNonFinite;
  done.pending_drafts = own_end ? 0 : sample->num_pending_drafts();
  ++counts.samples_by_finish[static_cast<size_t>(finish)];
  ++counts.samples_by_spread[static_cast<size_t>(std::min<uint64_t>(StepSpread(done.weight_spans), kNumStepSpreads - 1))];
  const absl::Time admitted_at = group.admitted ? group.admitted_at : now;
  const absl::Time first_token = std::min(now, sample->first_token_time);
  done.queue_time = admitted_at - group.submitted;
  done.prefill_time = first_token - admitted_at;
  done.decode_time = now - first_token;
  done.time_to_first_token = first_token - group.submitted;
  done.total_time = now - group.submitted;
  // Arrays were reserved for what could come; what is kept is what came.
  done.token_ids.shrink_to_fit();
  done.logprobs.shrink_to_fit();
  done.raw_logprobs.shrink_to_fit();
  done.entropy.shrink_to_fit();
  done.draft_logprobs.shrink_to_fit();
  done.token_source.shrink_to_fit();
  sample->state = Sequence::State::kEnded;
  --group.num_unfinished;
  if (options.on_sample_end != nullptr) options.on_sample_end(done);
  ledger.Sample(live->entry, std::move(done));
}

void EngineCore::Impl::Discard(LiveGroup* live) {
  const Group& group = *live->group;
  Unwatch(group.deadline, group.arrival, false);
  arrival_of.erase(group.request.request_id);
  groups.erase(group.arrival);  // last: `live` and `group` go with it
}

void EngineCore::Impl::EndGroup(LiveGroup* live, FinishReason finish, const absl::Status& status, bool retain, int64_t* counter) {
  Group& group = *live->group;
  // Which samples were unfinished is their state before the scheduler lets go of them.
  std::vector<Sequence*> unfinished;
  for (Sequence& sample : group.samples) {
    if (sample.state != Sequence::State::kEnded) unfinished.push_back(&sample);
  }
  scheduler.Remove(&group);
  for (Sequence* sample : unfinished) EndSample(live, sample, finish);
  ++*counter;
  DeliveryLedger::Entry* const entry = live->entry;
  Discard(live);
  ledger.Done(entry, status, retain, clock->Now());
}

void EngineCore::Impl::EndScore(ScoreWork* score, const absl::Status& status, ScoreResult score_result, int64_t* counter) {
  scheduler.Remove(score);
  Unwatch(score->deadline, score->handle, true);
  ++*counter;
  const std::shared_ptr<ScoreObserver> observer = std::move(score->observer);
  scores.erase(score->handle);
  observer->OnScore(status, std::move(score_result));
}

void EngineCore::Detach(const std::string& request_id, const GenerateObserver* observer) {
  DeliveryLedger::Entry* const entry = impl_->ledger.Find(request_id);
  if (entry == nullptr || !impl_->ledger.Detach(entry, observer)) return;
  Impl::LiveGroup* const live = impl_->FindLive(request_id);
  BEBOP_CHECK(live != nullptr);
  if (live->group->request.detach) return;  // runs on, and is retained
  impl_->scheduler.Remove(live->group.get());
  impl_->Discard(live);
  impl_->ledger.Forget(entry);
  ++impl_->counts.cancelled;
}

void EngineCore::CancelScore(uint64_t handle) {
  const auto it = impl_->scores.find(handle);
  if (it == impl_->scores.end()) return;
  impl_->scheduler.Remove(it->second.get());
  impl_->Unwatch(it->second->deadline, handle, true);
  impl_->scores.erase(it);
  ++impl_->counts.cancelled;
}

bool EngineCore::Abort(const std::string& request_id) {
  Impl::LiveGroup* const live = impl_->FindLive(request_id);
  if (live == nullptr) return false;
  impl_->EndGroup(live, FinishReason::kAborted, absl::OkStatus(), /*retain=*/true, &impl_->counts.cancelled);
  return true;
}

void EngineCore::StartDrain(absl::Time deadline) {
  impl_->draining = true;
  if (impl_->paused) deadline = std::min(deadline, impl_->clock->Now());  // what stands still would only be cut later
  impl_->drain_deadline = std::min(impl_->drain_deadline, deadline);
}

bool EngineCore::draining() const { return impl_->draining; }

bool EngineCore::Idle() const { return impl_->groups.empty() && impl_->scores.empty(); }

void EngineCore::FailAll(const absl::Status& status) {
  BEBOP_CHECK(!status.ok());
  if (impl_->health.ok()) impl_->health = status;
  while (!impl_->groups.empty()) {
    impl_->EndGroup(&impl_->groups.begin()->second, FinishReason::kFailed, status, false, &impl_->counts.failed);
  }
  while (!impl_->scores.empty()) impl_->EndScore(impl_->scores.begin()->second.get(), status, {}, &impl_->counts.failed);
}

const absl::Status& EngineCore::health() const { return impl_->health; }

// ---- Stepping ----

bool EngineCore::Impl::Expire(absl::Time now) {
  ledger.Expire(now);
  bool any = false;
  while (!deadlines.empty() && std::get<0>(*deadlines.begin()) <= now) {
    const auto [when, key, is_score] = *deadlines.begin();
    any = true;
    const absl::Status status = absl::DeadlineExceededError("the request's deadline passed before it finished");
    if (is_score) {
      EndScore(scores.find(key)->second.get(), status, {}, &counts.failed);
    } else {
      EndGroup(&groups.find(key)->second, FinishReason::kDeadline, status, /*retain=*/false, &counts.failed);
    }
  }
  if (draining && drain_deadline <= now) {
    any = any || !groups.empty() || !scores.empty();
    while (!groups.empty()) {
      EndGroup(&groups.begin()->second, FinishReason::kDrained, absl::OkStatus(), /*retain=*/true, &counts.cancelled);
    }
    while (!scores.empty()) {
      EndScore(scores.begin()->second.get(), absl::UnavailableError("the server is draining"), {}, &counts.cancelled);
    }
  }
  return any;
}

absl::StatusOr<bool> EngineCore::Step() {
  Impl& impl = *impl_;
  if (!impl.health.ok()) return impl.health;
  bool worked = impl.Expire(impl.clock->Now());
  for (const uint64_t arrival : std::exchange(impl.resumed, {})) worked = impl.EndPolicies(arrival) > 0 || worked;
  if (impl.paused) {
    impl.scheduler.PlanNothing(&impl.plan);
    impl.admitted.clear();
  } else {
    for (auto& [arrival, live] : impl.groups) live.group->paused = impl.WaitsForStep(live) || !impl.ledger.HasRoom(live.entry);
    impl.scheduler.Plan(&impl.plan, &impl.admitted);
  }
  const absl::Time planned_at = impl.clock->Now();
  for (Work* work : impl.admitted) {
    work->admitted_at = planned_at;
    if (work->is_score) continue;
    impl.counts.prompt_tokens += static_cast<int64_t>(static_cast<Group*>(work)->request.prompt.size());
    impl.ledger.Admitted(impl.groups.find(work->arrival)->second.entry);
  }
  if (impl.plan.empty() && impl.plan.page_copies.empty() && impl.plan.dropped_score_handles.empty()) {
    return worked || !impl.admitted.empty();
  }

  impl.result.finished_scores.clear();
  ++impl.counts.steps;
  if (absl::Status status = impl.executor->Execute(impl.plan, &impl.result); !status.ok()) {
    FailAll(status);
    return status;
  }
  impl.scheduler.Apply(impl.plan, &impl.result, impl.epochs, &impl.progress, &impl.finished_scores);
  impl.DeliverProgress(impl.clock->Now());
  return true;
}

void EngineCore::Impl::DeliverProgress(absl::Time now) {
  for (const Scheduler::Progress& step : progress) {
    Sequence* const sample = step.sequence;
    LiveGroup* const live = &groups.find(sample->group()->arrival)->second;
    const int32_t emitted = sample->num_output() - step.begin;
    counts.generated_tokens += emitted;
    counts.spec.Add(step.spec);
    if (step.weight_epoch == epochs.current()) {
      counts.version_spec.Add(step.spec);
    } else if (step.weight_epoch == epochs.current() - 1) {
      counts.previous_version_spec.Add(step.spec);  // it had run ahead of the commit
    }
    if (emitted > 0) sample->first_token_time = std::min(sample->first_token_time, now);
    if (emitted > 0 && live->group->request.stream_tokens) ledger.Tokens(live->entry, sample->result, step.begin);
    if (step.finish == FinishReason::kNone) continue;
    EndSample(live, sample, step.finish);
    EndIfDone(live);
  }
  for (const Scheduler::FinishedScore& finished : finished_scores) {
    finished.result->weight_step = epochs.current_name().target_step;
    EndScore(finished.score, absl::OkStatus(), std::move(*finished.result), &counts.finished);
  }
}

absl::Time EngineCore::NextDeadline() const {
  absl::Time next = impl_->ledger.NextExpiry();
  if (!impl_->deadlines.empty()) next = std::min(next, std::get<0>(*impl_->deadlines.begin()));
  if (impl_->draining && !Idle()) next = std::min(next, impl_->drain_deadline);
  return next;
}

// ---- Weights ----

// Also of a group that ran, once the step was set back. Nothing may wait for its end, or the commit that it waits for might.
bool EngineCore::Impl::WaitsForStep(const LiveGroup& live) const {
  return live.group->request.weights.min_step > epochs.current_name().target_step;
}

// Makes the executor forget what was dropped, now.
absl::Status EngineCore::Impl::ExecuteDrops() {
  scheduler.PlanNothing(&plan);
  if (plan.dropped_score_handles.empty()) return absl::OkStatus();
  result.finished_scores.clear();
  ++counts.steps;
  return executor->Execute(plan, &result);
}

bool EngineCore::Impl::SpreadsTooFar(const Group& group, const Sequence& sample) const {
  if (sample.num_output() == 0) return false;
  int64_t low = epochs.current_name().target_step, high = low;
  for (const WeightSpan& span : sample.result.weight_spans) {
    low = std::min(low, span.target_step);
    high = std::max(high, span.target_step);
  }
  return static_cast<uint64_t>(high) - static_cast<uint64_t>(low) > static_cast<uint64_t>(group.request.weights.max_step_spread);
}

// Ends samples of a group, of which others may go on.
void EngineCore::Impl::EndEarly(LiveGroup* live, const std::vector<Sequence*>& samples, FinishReason finish) {
  for (Sequence* sample : samples) {
    scheduler.End(sample);
    EndSample(live, sample, finish);
  }
  live->group->cut_short = live->group->cut_short || !samples.empty();
  EndIfDone(live);
}

void EngineCore::Impl::EndIfDone(LiveGroup* live) {
  if (live->group->num_unfinished > 0) return;
  EndGroup(live, FinishReason::kNone, absl::OkStatus(), /*retain=*/true, live->group->cut_short ? &counts.cancelled : &counts.finished);
}

// Ends the samples whose next token would be further from their first than their request allows. Returns their number.
int32_t EngineCore::Impl::EndPolicies(uint64_t arrival) {
  const auto it = groups.find(arrival);
  if (it == groups.end()) return 0;
  std::vector<Sequence*> too_far;
  for (Sequence& sample : it->second.group->samples) {
    if (sample.state != Sequence::State::kEnded && SpreadsTooFar(*it->second.group, sample)) too_far.push_back(&sample);
  }
  const int32_t count = static_cast<int32_t>(too_far.size());
  if (count > 0) EndEarly(&it->second, too_far, FinishReason::kWeightPolicy);
  return count;
}

absl::StatusOr<CommitResult> EngineCore::Commit(const ModelWeights* weights, WeightName name, InFlight in_flight) {
  Impl& impl = *impl_;
  if (!impl.health.ok()) return impl.CheckOpen();
  const absl::Time began = impl.clock->Now();
  impl.scheduler.DropPrefixes();
  impl.scheduler.RestartScores();
  absl::Status status = impl.ExecuteDrops();
  if (status.ok()) status = impl.executor->SetWeights(weights, impl.epochs.current() + 1);
  if (!status.ok()) {
    FailAll(status);
    return status;
  }
  impl.epochs.Begin(std::move(name));
  impl.epochs.ForgetBefore(impl.scheduler.EarliestEpoch());

  CommitResult commit;
  std::vector<uint64_t> arrivals;  // groups end on the way
  for (const auto& [arrival, live] : impl.groups) arrivals.push_back(arrival);
  for (const uint64_t arrival : arrivals) {
    commit.ended += impl.EndPolicies(arrival);
    const auto it = impl.groups.find(arrival);
    if (it == impl.groups.end()) continue;
    Group& group = *it->second.group;
    OnUpdate choice = group.request.weights.on_update;
    if (in_flight == InFlight::kAbort) {
      choice = OnUpdate::kStop;
    } else if (choice == OnUpdate::kAsTheUpdateSays && in_flight == InFlight::kRecompute) {
      choice = OnUpdate::kRecompute;
    }
    std::vector<Sequence*> stopped;
    for (Sequence& sample : group.samples) {
      if (sample.state == Sequence::State::kEnded || !sample.has_begun()) continue;
      const bool computed = sample.state == Sequence::State::kRunning && sample.num_computed() > 0;
      if (choice == OnUpdate::kStop) {
        stopped.push_back(&sample);
      } else if (choice == OnUpdate::kRecompute && sample.state == Sequence::State::kRunning) {
        commit.recomputed += computed ? 1 : 0;
        impl.scheduler.Recompute(&sample);
      } else {
        commit.kept += computed ? 1 : 0;
      }
    }
    commit.ended += static_cast<int32_t>(stopped.size());
    if (!stopped.empty()) impl.EndEarly(&it->second, stopped, FinishReason::kSuperseded);
  }
  HoldForCommit(false);
  impl.counts.previous_version_spec = std::exchange(impl.counts.version_spec, SpecCounts());
  ++impl.counts.weight_commits;
  commit.swap_time = impl.clock->Now() - began;
  impl.counts.last_swap_time = commit.swap_time;
  impl.counts.total_swap_time += commit.swap_time;
  return commit;
}

absl::Status EngineCore::MoveWeights(const ModelWeights* weights) {
  absl::Status status = impl_->executor->SetWeights(weights, impl_->epochs.current());
  if (!status.ok()) FailAll(status);
  return status;
}

void EngineCore::HoldForCommit(bool hold) {
  // Prefixes would be forgotten at the commit, and until then nobody begins from them.
  if (hold) impl_->scheduler.DropPrefixes();
  impl_->scheduler.HoldSamples(hold);
  if (!hold) impl_->scheduler.HoldScores(false);
}

bool EngineCore::RestartedScoreRuns() const { return impl_->scheduler.RestartedScoreRuns(); }

void EngineCore::HoldScores() { impl_->scheduler.HoldScores(true); }

bool EngineCore::CommitMustWait() const {
  for (const auto& [arrival, live] : impl_->groups) {
    if (live.group->request.weights.on_update != OnUpdate::kAsTheUpdateSays || impl_->WaitsForStep(live)) continue;
    for (const Sequence& sample : live.group->samples) {
      if (sample.state != Sequence::State::kEnded && sample.has_begun()) return true;
    }
  }
  return false;
}

const WeightName& EngineCore::weights() const { return impl_->epochs.current_name(); }

// ---- Control ----

void EngineCore::Pause() {
  impl_->paused = true;
  impl_->scheduler.HoldRequests(false);
}

void EngineCore::Resume() {
  impl_->paused = false;
  impl_->scheduler.HoldRequests(false);
}

bool EngineCore::paused() const { return impl_->paused; }

int32_t EngineCore::PauseAborting() {
  Pause();
  ++impl_->abort_epoch;
  int32_t count = 0;
  while (!impl_->groups.empty()) {
    Impl::LiveGroup* const live = &impl_->groups.begin()->second;
    count += live->group->num_unfinished;
    for (Sequence& sample : live->group->samples) sample.result.abort_epoch = impl_->abort_epoch;
    impl_->EndGroup(live, FinishReason::kAborted, absl::OkStatus(), /*retain=*/true, &impl_->counts.cancelled);
  }
  return count;
}

int64_t EngineCore::abort_epoch() const { return impl_->abort_epoch; }

void EngineCore::HoldForPause() {
  impl_->paused = false;
  impl_->scheduler.HoldRequests(true);
}

bool EngineCore::holds_for_pause() const { return impl_->scheduler.holds_requests(); }

bool EngineCore::RequestsRun() const {
  return std::any_of(impl_->groups.begin(), impl_->groups.end(),
                     [this](const auto& entry) { return entry.second.group->admitted && !impl_->WaitsForStep(entry.second); }) ||
         std::any_of(impl_->scores.begin(), impl_->scores.end(), [](const auto& entry) { return entry.second->admitted; });
}

absl::Status EngineCore::FlushCache() {
  BEBOP_CHECK(impl_->paused);
  impl_->scheduler.DropPrefixes();
  impl_->scheduler.RestartScores();
  for (auto& [arrival, live] : impl_->groups) {
    for (Sequence& sample : live.group->samples) {
      if (sample.state == Sequence::State::kRunning) impl_->scheduler.Recompute(&sample);
    }
  }
  absl::Status status = impl_->ExecuteDrops();
  if (!status.ok()) FailAll(status);
  return status;
}

// ---- Numbers ----

EngineLoads EngineCore::Loads() const {
  const Scheduler& scheduler = impl_->scheduler;
  EngineLoads loads = impl_->counts;
  loads.waiting_requests = scheduler.queue().num_requests();
  loads.running_requests = static_cast<int32_t>(impl_->groups.size() + impl_->scores.size()) - loads.waiting_requests;
  loads.running_sequences = scheduler.slots().num_used();
  loads.max_num_seqs = scheduler.slots().num_slots();
  loads.used_pages = scheduler.pages().num_used();
  loads.total_pages = scheduler.pages().num_pages();
  loads.used_state_slots = scheduler.state_slots().num_used();
  loads.total_state_slots = scheduler.state_slots().num_slots();
  loads.queued_bytes = scheduler.queue().num_bytes();
  loads.retained_bytes = impl_->ledger.bytes();
  loads.preemptions = scheduler.num_preemptions();
  loads.recomputed_tokens = scheduler.num_recomputed_tokens();
  loads.target_step = impl_->epochs.current_name().target_step;
  loads.draft_step = impl_->epochs.current_name().draft_step;
  return loads;
}

absl::Status EngineCore::Audit() const {
  std::vector<const Group*> groups;
  std::vector<const ScoreWork*> scores;
  for (const auto& [arrival, live] : impl_->groups) {
    groups.push_back(live.group.get());
    if (live.group->num_unfinished == 0) return absl::InternalError("a group without unfinished samples is alive");
    if (live.entry->num_samples() + live.group->num_unfinished != live.group->samples.size()) {
      return absl::InternalError("ended and unfinished samples do not add up");
    }
  }
  for (const auto& [handle, score] : impl_->scores) scores.push_back(score.get());
  BEBOP_RETURN_IF_ERROR(impl_->scheduler.Audit(groups, scores));
  const EngineLoads loads = Loads();
  if (loads.submitted != loads.finished + loads.cancelled + loads.failed + loads.running_requests + loads.waiting_requests) {
    return absl::InternalError(absl::StrCat("submitted ", loads.submitted, " != finished ", loads.finished, " + cancelled ",
                                            loads.cancelled, " + failed ", loads.failed, " + running ", loads.running_requests,
                                            " + waiting ", loads.waiting_requests));
  }
  return absl::OkStatus();
}

}  // namespace bebop
