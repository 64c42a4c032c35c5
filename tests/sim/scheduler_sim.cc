// SPDX-License-Identifier: Apache-2.0
//
// Drives EngineCore with random clients over a virtual clock and a fake executor, from a seed, and checks after every step:
//   I2   every accepted request ends exactly once, within its deadline; at rest nothing is open;
//   I9   cancelled work holds nothing after the next step, in the pools and in the executor;
//   I10  pages, references and slots are conserved; no page has two writers, nothing stale is ever read (FakeExecutor);
//   I11  tokens equal those of an undisturbed run whatever was preempted; refusals are exactly those that could never fit; progress within a bound;
//   I3   every token's span names the weights that drew it, and kv_mixed tells exactly of tokens that read what others computed;
//   I8   nothing begins from pages or states of other weights (FakeExecutor); commits, pauses and sleep come in all modes and at any time;
//   a sample that was cut short and resumed ends with the tokens of an undisturbed run;
//   I26  the counters add up and equal what the clients and the executor saw.
//
//   scheduler_sim --seed N --steps M [--verbose]     one run, to replay a failure
//   scheduler_sim --seeds K --steps M [--first N]    runs N .. N+K-1

#include <algorithm>
#include <array>
#include <cinttypes>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "engine/schedule/engine_core.h"
#include "tests/sim/fake_executor.h"
#include "tests/sim/fake_model.h"

namespace bebop::sim {
namespace {

// Steps in which runnable work may make no visible progress. The longest honest wait is a shared prefix or a recompute fed in chunks of a
// few rows behind another one; the longest of 2,800 seeds was 528.
constexpr int32_t kProgressBound = 800;

class Random {
 public:
  explicit Random(uint64_t seed) : state_(Mix(seed, 77)) {}
  uint64_t Next() { return state_ = Mix(state_, 1); }
  int32_t Below(int32_t bound) { return static_cast<int32_t>(Next() % static_cast<uint64_t>(bound)); }
  int32_t Between(int32_t low, int32_t high) { return low + Below(high - low + 1); }
  bool OneIn(int32_t n) { return Below(n) == 0; }

 private:
  uint64_t state_;
};

class Simulation;

struct Client;

// One observer of one request; checks everything it is told.
class Listener final : public GenerateObserver {
 public:
  Listener(Simulation* simulation, Client* client) : simulation_(simulation), client_(client) {}
  void OnAdmitted() override;
  void OnTokens(const SampleResult& partial, int32_t begin) override;
  void OnSample(const std::shared_ptr<const SampleResult>& ended) override;
  void OnDone(const absl::Status& status) override;
  bool HasRoom() const override { return room; }

  bool room = true;
  bool detached = false, done = false, admitted = false;

 private:
  Simulation* simulation_;
  Client* client_;
  std::map<int32_t, int32_t> streamed_;
  std::set<int32_t> ended_;
};

// A request id and everything that happened under it.
struct Client {
  GenerateRequest request;
  uint64_t order = 0;              // of submission
  std::map<int32_t, SampleResult> expected;
  std::map<int32_t, SampleResult> resumed;   // what its samples began with
  std::map<int32_t, SampleResult> cut;       // what can be resumed
  bool ended_early = false;                  // a weight update ended a sample
  std::vector<std::shared_ptr<Listener>> listeners;
  bool accepted = false, ended = false, cancelled = false, admitted = false;
  bool may_be_cut = false;         // aborted, drained, failed or past its deadline: a prefix of the expected tokens is right
  std::set<int32_t> ended_samples;
  absl::Status end_status;
  absl::Time ended_at;
  int64_t born = -1;               // step during which it was submitted
  bool always_first = true;        // since it came: first in order among runnable requests, and no score about
  const SampleResult& Expected(int32_t sample_index) {
    const auto it = expected.find(sample_index);
    return it != expected.end() ? it->second : expected.emplace(sample_index, Reference(request, sample_index)).first->second;
  }
};

struct ScoreClient final : public ScoreObserver {
  void OnScore(const absl::Status& status, ScoreResult result) override;
  Simulation* simulation = nullptr;
  ScoreRequest request;
  uint64_t handle = 0;
  int64_t born = -1;
  bool cancelled = false, done = false;
};

class Simulation {
 public:
  Simulation(uint64_t seed, bool verbose) : seed_(seed), verbose_(verbose), random_(seed) { Configure(); }

  bool Run(int32_t steps) {
    steps_ = steps;
    Boot();
    for (step_ = 0; step_ < steps && !failed_; ++step_) {
      Act();
      if (!failed_) StepOnce();
      if (core_ == nullptr || step_ % 700 == 699) Rest();
    }
    if (!failed_) Rest();
    return !failed_;
  }

  void Fail(const char* format, ...) __attribute__((format(printf, 2, 3))) {
    if (failed_) return;
    failed_ = true;
    va_list args;
    va_start(args, format);
    std::fprintf(stderr, "FAILED seed %" PRIu64 " step %d: ", seed_, step_);
    std::vfprintf(stderr, format, args);
    va_end(args);
    std::fprintf(stderr, "\nreplay: build/cpu-release/tests/scheduler_sim --seed %" PRIu64 " --steps %d --verbose\n", seed_, steps_);
  }
  void Trace(const char* format, ...) __attribute__((format(printf, 2, 3))) {
    if (!verbose_) return;
    std::printf("[%d] ", step_);
    va_list args;
    va_start(args, format);
    std::vprintf(format, args);
    va_end(args);
    std::printf("\n");
  }

  void CheckSample(Client* client, const SampleResult& sample, bool heard_before);
  void CheckSpans(Client* client, const SampleResult& sample);
  void NoteProgress() { last_progress_ = step_total_; }
  void NoteAdmitted(Client* client) { admitted_now_.push_back(client); }

  // What the whole run exercised, for the summary: a simulation that never preempts proves nothing.
  struct Coverage {
    int64_t steps = 0, requests = 0, samples = 0, tokens = 0, preemptions = 0, forks = 0, scores = 0, refusals = 0, attaches = 0,
            replays = 0, cancels = 0, aborts = 0, deadlines = 0, drains = 0, failures = 0, pauses = 0, non_finite = 0, stops = 0,
            trimmed = 0, commits = 0, waits = 0, keeps = 0, recomputes = 0, superseded = 0, policy_ends = 0, mixed = 0, spans = 0, sleeps = 0,
            pause_waits = 0, resumes = 0, longest_wait = 0;
    void Add(const Coverage& o) {
      const auto* from = reinterpret_cast<const int64_t*>(&o);
      auto* to = reinterpret_cast<int64_t*>(this);
      for (size_t i = 0; i + 1 < sizeof(Coverage) / sizeof(int64_t); ++i) to[i] += from[i];
      longest_wait = std::max(longest_wait, o.longest_wait);
    }
  };
  Coverage coverage;

 private:
  void Configure();
  void Boot();
  void Act();
  void SubmitNew();
  void Resubmit();
  void SubmitScore();
  void StepOnce();
  void CheckAfterStep(absl::Time step_began);
  void Rest();
  GenerateRequest RandomRequest();
  Client* Pick(bool live);
  void SubmitResumed();
  void Commit(InFlight in_flight);
  void Control();
  bool MayRun(const Client& client) const;

  const uint64_t seed_;
  const bool verbose_;
  Random random_;
  int32_t step_ = 0, steps_ = 0;
  int64_t step_total_ = 0, last_progress_ = 0;
  bool failed_ = false;
  int32_t quiet_ = 0;  // > 0: no new work, everybody reads

  EngineCoreOptions options_;
  int32_t max_drafts_ = 0;
  bool may_fail_ = false;
  VirtualClock clock_;
  std::unique_ptr<FakeExecutor> executor_;
  std::unique_ptr<EngineCore> core_;
  absl::Time drain_deadline_ = absl::InfiniteFuture();
  bool expect_error_ = false;
  uint64_t next_id_ = 1;
  std::map<std::string, std::unique_ptr<Client>> clients_;
  std::vector<std::shared_ptr<ScoreClient>> scores_;
  std::vector<Client*> admitted_now_;
  std::vector<uint64_t> cancelled_handles_;
  std::vector<WeightName> names_;   // by epoch
  std::set<int64_t> wait_epochs_;  // that began with a commit that waited
  bool commit_waits_ = false, scores_wait_ = false, pause_waits_ = false, pause_aborts_ = false;
  std::vector<std::unique_ptr<Client>> cut_;  // clients with samples to resume

  // What the counters of EngineLoads must say.
  int64_t submitted_ = 0, finished_ = 0, cancelled_ = 0, failures_ = 0, refused_ = 0;
  friend struct ScoreClient;
  friend class Listener;
};

void Listener::OnAdmitted() {
  if (detached || done) return simulation_->Fail("%s: OnAdmitted after the end", client_->request.request_id.c_str());
  if (admitted) return simulation_->Fail("%s: admitted twice", client_->request.request_id.c_str());
  admitted = true;
  if (!client_->admitted) simulation_->NoteAdmitted(client_);
  client_->admitted = true;
}

void Listener::OnTokens(const SampleResult& partial, int32_t begin) {
  const char* const id = client_->request.request_id.c_str();
  if (detached || done || !admitted) return simulation_->Fail("%s: tokens outside admitted..done", id);
  if (!client_->request.stream_tokens) return simulation_->Fail("%s: tokens though not streaming", id);
  if (ended_.count(partial.sample_index) > 0) return simulation_->Fail("%s: tokens of an ended sample", id);
  // Whoever attaches later hears everything; the first listener knows what it resumed.
  const auto resumed = client_->resumed.find(partial.sample_index);
  const int32_t known = resumed == client_->resumed.end() ? 0 : static_cast<int32_t>(resumed->second.token_ids.size());
  if (streamed_.count(partial.sample_index) == 0) streamed_[partial.sample_index] = begin == known ? known : 0;
  int32_t& seen = streamed_[partial.sample_index];
  const int32_t length = static_cast<int32_t>(partial.token_ids.size());
  simulation_->CheckSpans(client_, partial);
  if (begin != seen || length <= begin) return simulation_->Fail("%s: streamed from %d, had %d of %d", id, begin, seen, length);
  const auto& expected = client_->Expected(partial.sample_index).token_ids;
  if (static_cast<size_t>(length) > expected.size() || !std::equal(partial.token_ids.begin(), partial.token_ids.end(), expected.begin())) {
    return simulation_->Fail("%s: streamed tokens differ", id);
  }
  seen = length;
  simulation_->NoteProgress();
}

void Listener::OnSample(const std::shared_ptr<const SampleResult>& ended) {
  const SampleResult& sample = *ended;
  const char* const id = client_->request.request_id.c_str();
  if (detached || done) return simulation_->Fail("%s: sample after the end", id);
  if (!ended_.insert(sample.sample_index).second) return simulation_->Fail("%s: sample %d ended twice", id, sample.sample_index);
  if (client_->request.stream_tokens && streamed_.count(sample.sample_index) > 0 &&
      streamed_[sample.sample_index] != static_cast<int32_t>(sample.token_ids.size())) {
    return simulation_->Fail("%s: sample %d streamed %d of %zu tokens", id, sample.sample_index, streamed_[sample.sample_index],
                             sample.token_ids.size());
  }
  const bool heard_before = !client_->ended_samples.insert(sample.sample_index).second;
  simulation_->CheckSample(client_, sample, heard_before);
  simulation_->NoteProgress();
}

void Listener::OnDone(const absl::Status& status) {
  const char* const id = client_->request.request_id.c_str();
  if (detached || done) return simulation_->Fail("%s: OnDone twice or after detaching", id);
  if (static_cast<int32_t>(ended_.size()) != client_->request.num_samples) return simulation_->Fail("%s: done before its samples", id);
  done = true;
  if (client_->ended) {
    if (status != client_->end_status) simulation_->Fail("%s: two listeners heard different ends", id);
    return;
  }
  client_->ended = true;
  client_->end_status = status;
  client_->ended_at = simulation_->clock_.Now();
  simulation_->Trace("%s done: %s", id, status.ToString().c_str());
  if (absl::IsDeadlineExceeded(status)) {
    ++simulation_->failures_;
    ++simulation_->coverage.deadlines;
    if (client_->request.deadline > simulation_->clock_.Now()) simulation_->Fail("%s: ended before its deadline", id);
  } else if (!status.ok()) {
    ++simulation_->failures_;
    if (!simulation_->expect_error_) simulation_->Fail("%s: ended with %s", id, status.ToString().c_str());
  } else if (client_->may_be_cut || client_->ended_early) {
    ++simulation_->cancelled_;
  } else if (simulation_->core_ != nullptr && simulation_->core_->draining() && simulation_->drain_deadline_ <= simulation_->clock_.Now()) {
    ++simulation_->cancelled_;
  } else {
    ++simulation_->finished_;
  }
  simulation_->NoteProgress();
}

void ScoreClient::OnScore(const absl::Status& status, ScoreResult result) {
  if (done || cancelled) return simulation->Fail("score %" PRIu64 " ended twice or after its cancellation", handle);
  done = true;
  simulation->NoteProgress();
  if (status.ok()) {
    if (result.logprobs != FakeExecutor::ScoreReference(request)) simulation->Fail("score %" PRIu64 " differs", handle);
    if (result.weight_step != simulation->core_->weights().target_step) simulation->Fail("score %" PRIu64 " names other weights", handle);
    ++simulation->finished_;
    ++simulation->coverage.scores;
  } else if (absl::IsDeadlineExceeded(status)) {
    ++simulation->failures_;
    if (request.deadline > simulation->clock_.Now()) simulation->Fail("score %" PRIu64 " ended before its deadline", handle);
  } else if (absl::IsUnavailable(status)) {
    ++simulation->cancelled_;
    if (simulation->drain_deadline_ > simulation->clock_.Now()) simulation->Fail("score %" PRIu64 " drained early", handle);
  } else {
    ++simulation->failures_;
    if (!simulation->expect_error_) simulation->Fail("score %" PRIu64 ": %s", handle, status.ToString().c_str());
  }
}

// I3, I4, I8: what the executor wrote down of each token, against what the spans say of it.
void Simulation::CheckSpans(Client* client, const SampleResult& sample) {
  const char* const id = client->request.request_id.c_str();
  const auto names = [](const std::vector<WeightSpan>& spans) {
    std::vector<WeightSpan> by_token;
    for (const WeightSpan& span : spans) {
      for (int32_t t = span.begin; t < span.end; ++t) by_token.push_back(span);
    }
    return by_token;
  };
  int32_t end = 0;
  for (size_t i = 0; i < sample.weight_spans.size(); ++i) {
    const WeightSpan& span = sample.weight_spans[i];
    if (span.begin != end || span.end <= span.begin) return Fail("%s: spans do not tile the tokens", id);
    end = span.end;
  }
  if (end != static_cast<int32_t>(sample.token_ids.size())) return Fail("%s: spans end at %d of %zu tokens", id, end, sample.token_ids.size());
  const std::vector<WeightSpan> got = names(sample.weight_spans);
  const auto resumed = client->resumed.find(sample.sample_index);
  const std::vector<WeightSpan> before = resumed == client->resumed.end() ? std::vector<WeightSpan>() : names(resumed->second.weight_spans);
  bool mixed = resumed != client->resumed.end() && resumed->second.kv_mixed;
  const auto& drawn = executor_->DrawnBy(client->request.request_id, sample.sample_index);
  int64_t epoch = -1;
  int32_t changes = 0;
  for (size_t t = 0; t < got.size(); ++t) {
    WeightName name;
    if (t < before.size()) {
      name = {before[t].target_step, before[t].draft_step, before[t].label};
    } else {
      if (t >= drawn.size() || drawn[t].epoch < 0) return Fail("%s: token %zu was never drawn", id, t);
      if (drawn[t].epoch < epoch) return Fail("%s: token %zu was drawn by older weights than the one before it", id, t);
      changes += epoch >= 0 && drawn[t].epoch != epoch;
      // Nobody who leaves it to the update runs across a commit that waited. (Nobody waits for those that wait for a step.)
      const auto waited = wait_epochs_.upper_bound(epoch);
      if (epoch >= 0 && waited != wait_epochs_.end() && *waited <= drawn[t].epoch && client->request.weights.min_step == INT64_MIN &&
          client->request.weights.on_update == OnUpdate::kAsTheUpdateSays) {
        return Fail("%s ran across a commit that waited for it", id);
      }
      epoch = drawn[t].epoch;
      mixed = mixed || drawn[t].mixed;
      name = names_.at(static_cast<size_t>(epoch));
      if (name.target_step < client->request.weights.min_step) return Fail("%s: token %zu drawn at step %" PRId64, id, t, name.target_step);
    }
    if (got[t].target_step != name.target_step || got[t].draft_step != name.draft_step || got[t].label != name.label) {
      return Fail("%s sample %d: token %zu says step %" PRId64 ", drawn by step %" PRId64, id, sample.sample_index, t, got[t].target_step,
                  name.target_step);
    }
  }
  if (before.empty() && !got.empty() && static_cast<int32_t>(sample.weight_spans.size()) != changes + 1) {
    return Fail("%s: %zu spans for %d changes", id, sample.weight_spans.size(), changes);
  }
  if (sample.kv_mixed != mixed) return Fail("%s sample %d: kv_mixed is %d", id, sample.sample_index, sample.kv_mixed);
  coverage.mixed += mixed;
  coverage.spans += changes;
}

void Simulation::CheckSample(Client* client, const SampleResult& sample, bool heard_before) {
  const char* const id = client->request.request_id.c_str();
  const SampleResult& expected = client->Expected(sample.sample_index);
  const bool cut = sample.finish == FinishReason::kAborted || sample.finish == FinishReason::kDrained ||
                   sample.finish == FinishReason::kDeadline || sample.finish == FinishReason::kFailed ||
                   sample.finish == FinishReason::kSuperseded || sample.finish == FinishReason::kWeightPolicy;
  CheckSpans(client, sample);
  if (sample.finish == FinishReason::kSuperseded || sample.finish == FinishReason::kWeightPolicy) {
    client->ended_early = true;
    sample.finish == FinishReason::kSuperseded ? ++coverage.superseded : ++coverage.policy_ends;
  }
  if (sample.finish == FinishReason::kWeightPolicy && !heard_before) {
    int64_t low = core_->weights().target_step, high = low;
    for (const WeightSpan& span : sample.weight_spans) low = std::min(low, span.target_step), high = std::max(high, span.target_step);
    if (high - low <= client->request.weights.max_step_spread) Fail("%s: ended by a policy that it kept to", id);
  } else if (sample.finish != FinishReason::kWeightPolicy && !sample.weight_spans.empty()) {
    int64_t low = INT64_MAX, high = INT64_MIN;
    for (const WeightSpan& span : sample.weight_spans) low = std::min(low, span.target_step), high = std::max(high, span.target_step);
    if (high - low > client->request.weights.max_step_spread) Fail("%s: spans steps %" PRId64 " to %" PRId64, id, low, high);
  }
  const int64_t epoch = sample.finish == FinishReason::kAborted && pause_aborts_ ? core_->abort_epoch() : 0;
  if (!heard_before && sample.abort_epoch != epoch) Fail("%s: abort epoch %" PRId64 ", expected %" PRId64, id, sample.abort_epoch, epoch);
  if (cut) {
    client->cut[sample.sample_index] = sample;
  } else if (sample.pending_drafts != 0) {
    Fail("%s: drafts are pending behind its end", id);
  }
  const size_t length = sample.token_ids.size();
  const auto compare = [&](const char* what, const auto& got, const auto& want) {
    if (want.empty() && !expected.token_ids.empty() && !got.empty()) return Fail("%s: %s not asked for", id, what);
    if (want.empty()) return;
    if (got.size() != length) return Fail("%s: %zu values of %s for %zu tokens", id, got.size(), what, length);
    if (got.size() > want.size() || (!cut && got.size() != want.size()) || !std::equal(got.begin(), got.end(), want.begin())) {
      Fail("%s sample %d: %s differ from an undisturbed run (%zu, expected %zu, finish %d, preemptions %d)", id, sample.sample_index, what,
           got.size(), want.size(), static_cast<int>(sample.finish), sample.preemptions);
    }
  };
  compare("tokens", sample.token_ids, expected.token_ids);
  compare("logprobs", sample.logprobs, expected.logprobs);
  compare("raw logprobs", sample.raw_logprobs, expected.raw_logprobs);
  compare("entropy", sample.entropy, expected.entropy);
  compare("draft logprobs", sample.draft_logprobs, expected.draft_logprobs);
  compare("sources", sample.token_source, expected.token_source);
  if (client->request.output.token_source) {
    // I26: the counts add up to the tokens.
    int64_t drafted = std::count_if(sample.token_source.begin(), sample.token_source.end(), [](int32_t s) { return s > 0; });
    if (drafted != sample.spec.num_accepted_draft_tokens - sample.spec.num_trimmed_tokens) {
      Fail("%s: %" PRId64 " draft tokens, %" PRId64 " accepted - %" PRId64 " trimmed", id, drafted, sample.spec.num_accepted_draft_tokens,
           sample.spec.num_trimmed_tokens);
    }
  }
  const bool is_new = client->resumed.empty();  // else it has counted elsewhere, too
  if (is_new && client->always_first && sample.sample_index == 0 && sample.preemptions > 0) Fail("%s: the first in order was preempted", id);
  if (is_new && sample.recomputed_tokens > 0 && sample.preemptions == 0) Fail("%s: recomputed without a preemption", id);
  if (sample.prompt_tokens != static_cast<int32_t>(client->request.prompt.size())) Fail("%s: prompt_tokens", id);
  const absl::Duration zero = absl::ZeroDuration();
  if (sample.queue_time < zero || sample.prefill_time < zero || sample.decode_time < zero ||
      sample.queue_time + sample.prefill_time + sample.decode_time != sample.total_time ||
      sample.queue_time + sample.prefill_time != sample.time_to_first_token) {
    Fail("%s: times do not add up", id);
  }
  if (cut) return;
  if (sample.finish != expected.finish || sample.stop_token_id != expected.stop_token_id || sample.stop_string != expected.stop_string) {
    Fail("%s sample %d: finish %d, expected %d, or another stop", id, sample.sample_index, static_cast<int>(sample.finish),
         static_cast<int>(expected.finish));
  }
  const SpecCounts& a = sample.spec;
  const SpecCounts& b = expected.spec;
  if (a.num_spec_steps != b.num_spec_steps || a.num_draft_tokens != b.num_draft_tokens ||
      a.num_accepted_draft_tokens != b.num_accepted_draft_tokens || a.num_trimmed_tokens != b.num_trimmed_tokens ||
      a.drafted_per_pos != b.drafted_per_pos || a.accepted_per_pos != b.accepted_per_pos || a.overlap_per_pos != b.overlap_per_pos) {
    Fail("%s sample %d: speculation counts differ", id, sample.sample_index);
  }
  ++coverage.samples;
  coverage.non_finite += sample.finish == FinishReason::kNonFinite;
  coverage.stops += sample.finish == FinishReason::kStop;
  coverage.trimmed += sample.spec.num_trimmed_tokens;
  coverage.forks += sample.cached_tokens > 0;
}

void Simulation::Configure() {
  SchedulerOptions& scheduler = options_.scheduler;
  static constexpr int32_t kPageTokens[] = {1, 2, 3, 4, 8, 16};
  scheduler.page_tokens = kPageTokens[random_.Below(6)];
  max_drafts_ = random_.OneIn(4) ? 0 : random_.Between(1, kMaxDraftTokens);
  scheduler.max_num_seqs = random_.Between(1, 8);
  scheduler.max_step_tokens = scheduler.max_num_seqs * (max_drafts_ + 1) + random_.Below(40);
  // From a pool of one page to one that never runs out.
  scheduler.num_pages = random_.OneIn(3) ? random_.Between(1, 12) : random_.Between(1, 400 / scheduler.page_tokens);
  scheduler.num_state_slots = random_.OneIn(3) ? random_.Between(1, 3) : random_.Between(2, 14);
  scheduler.max_model_len = random_.Between(20, 120);
  scheduler.max_queued_requests = random_.OneIn(4) ? random_.Between(1, 4) : 64;
  scheduler.max_queued_bytes = random_.OneIn(5) ? 20000 : 1 << 20;
  scheduler.max_result_bytes = random_.OneIn(3) ? random_.Between(0, 20000) : 1LL << 40;
  scheduler.result_ttl = absl::Milliseconds(random_.Between(0, 3000));
  scheduler.score_bytes_per_token = 4;
  scheduler.max_score_bytes = random_.OneIn(3) ? 200 : 4000;
  options_.vocab_size = static_cast<int32_t>(kVocab);
  options_.max_draft_tokens = max_drafts_;
  options_.eos_token_ids = EosIds();
  options_.token_bytes = [](uint32_t token) { return TokenText(token); };
  may_fail_ = random_.OneIn(3);
  // None (the CPU), what a device that runs ahead asks for (engine/runtime/cuda_executor.h), or anything.
  scheduler.prefill_cut_tokens = random_.OneIn(2) ? 1 : random_.Between(2, 20);
  // There must be room for a piece beside all decodes, and among the rows of scores.
  if (scheduler.prefill_cut_tokens > 1) scheduler.max_step_tokens += scheduler.prefill_cut_tokens;
  if (random_.OneIn(2)) scheduler.max_score_step_tokens = scheduler.prefill_cut_tokens + random_.Below(20);
  scheduler.lookahead_tokens = random_.OneIn(2) ? 0 : random_.OneIn(2) ? 2 * (max_drafts_ + 1) : random_.Between(1, 40);
}

void Simulation::Boot() {
  core_.reset();
  executor_ = std::make_unique<FakeExecutor>(options_.scheduler);
  // Submissions and attachments may come while a step executes (engine/runtime gives its lock up there); nothing else may.
  executor_->set_while_executing([this] {
    if (quiet_ > 0) return;
    if (random_.OneIn(12)) SubmitNew();
    if (random_.OneIn(40)) SubmitScore();
    if (random_.OneIn(25)) Resubmit();
  });
  executor_->set_runs_ahead(random_.OneIn(2));
  names_ = {{.target_step = 10, .draft_step = 10, .label = "start"}};
  wait_epochs_.clear();
  commit_waits_ = scores_wait_ = pause_waits_ = false;
  options_.weights = names_[0];
  core_ = std::make_unique<EngineCore>(options_, &clock_, executor_.get());
  clients_.clear();
  scores_.clear();
  cancelled_handles_.clear();
  drain_deadline_ = absl::InfiniteFuture();
  expect_error_ = false;
  submitted_ = finished_ = cancelled_ = failures_ = refused_ = 0;
  Trace("boot: page_tokens %d pages %d slots %d seqs %d step_tokens %d drafts %d lookahead %d", options_.scheduler.page_tokens,
        options_.scheduler.num_pages, options_.scheduler.num_state_slots, options_.scheduler.max_num_seqs,
        options_.scheduler.max_step_tokens, max_drafts_, options_.scheduler.lookahead_tokens);
}

GenerateRequest Simulation::RandomRequest() {
  GenerateRequest request;
  request.request_id = "r" + std::to_string(next_id_++);
  request.body_hash = random_.Next();
  // Mostly of a size that fits, so that little pools see traffic, too.
  const SchedulerOptions& scheduler = options_.scheduler;
  const int32_t room = std::max(2, std::min(scheduler.max_model_len, scheduler.num_pages * scheduler.page_tokens) + (random_.OneIn(8) ? 4 : 0));
  const int32_t length = random_.OneIn(3) ? room : random_.Between(2, room);
  const int32_t prompt = random_.Between(1, std::max(1, std::min(length - 1, 60)));
  for (int32_t i = 0; i < prompt; ++i) request.prompt.push_back(static_cast<uint32_t>(random_.Below(kVocab)));
  request.speculation.mode = static_cast<SpeculationMode>(random_.Below(4));
  request.speculation.num_draft_tokens = random_.Between(0, max_drafts_);
  request.stopping.max_new_tokens = std::max(1, length - prompt - (random_.OneIn(4) ? 0 : request.speculation.num_draft_tokens));
  request.num_samples = random_.OneIn(2) ? 1 : random_.Between(1, 6);
  request.sampling.seed = random_.Next();
  request.stopping.min_new_tokens = random_.OneIn(3) ? random_.Below(request.stopping.max_new_tokens + 1) : 0;
  request.stopping.ignore_eos = random_.OneIn(2);
  if (random_.OneIn(4)) request.stopping.stop_token_ids = {static_cast<uint32_t>(random_.Below(kVocab)), 5};
  if (random_.OneIn(3)) {
    for (int32_t i = random_.Between(1, 3); i > 0; --i) {
      std::string text;
      for (int32_t j = random_.Between(2, 5); j > 0; --j) text += static_cast<char>('a' + random_.Below(3));
      request.stopping.stop_strings.push_back(text);
    }
  }
  request.output.logprobs = random_.OneIn(2);
  request.output.raw_logprobs = random_.OneIn(4);
  request.output.entropy = random_.OneIn(4);
  request.output.token_source = random_.OneIn(2);
  request.output.draft_logprobs = random_.OneIn(4);
  request.output.spec_detail = random_.OneIn(2);
  request.priority = random_.OneIn(2) ? 0 : random_.Between(-1, 1);
  request.stream_tokens = random_.OneIn(2);
  if (random_.OneIn(6)) request.deadline = clock_.Now() + absl::Milliseconds(random_.Between(0, 800));
  if (random_.OneIn(2)) request.weights.on_update = static_cast<OnUpdate>(random_.Below(4));
  if (random_.OneIn(5)) request.weights.max_step_spread = random_.Below(4);
  if (random_.OneIn(12)) request.weights.min_step = core_->weights().target_step + random_.Between(-1, 2);
  return request;
}

void Simulation::SubmitNew() {
  auto client = std::make_unique<Client>();
  client->request = RandomRequest();
  client->order = next_id_;
  client->born = step_total_;
  const GenerateRequest& request = client->request;
  auto listener = std::make_shared<Listener>(this, client.get());
  const SchedulerOptions& scheduler = options_.scheduler;
  const EngineLoads before = core_->Loads();
  const absl::Status status = core_->Submit(request, listener);

  const int32_t drafts = request.speculation.mode == SpeculationMode::kOff ? 0 : request.speculation.num_draft_tokens;
  const int32_t length = static_cast<int32_t>(request.prompt.size()) + request.stopping.max_new_tokens;
  const int32_t pages = (length + drafts + scheduler.page_tokens - 1) / scheduler.page_tokens;
  absl::StatusCode expected = absl::StatusCode::kOk;
  bool never = false;
  if (length > scheduler.max_model_len) {
    expected = absl::StatusCode::kInvalidArgument;
  } else if (core_->draining()) {
    expected = absl::StatusCode::kUnavailable;
  } else if (pages > scheduler.num_pages) {
    expected = absl::StatusCode::kResourceExhausted;
    never = true;
  } else if (before.waiting_requests >= scheduler.max_queued_requests) {
    expected = absl::StatusCode::kResourceExhausted;
  } else if (absl::IsResourceExhausted(status) && scheduler.max_queued_bytes == 20000) {
    expected = absl::StatusCode::kResourceExhausted;  // by bytes
    never = EngineCore::CanNeverFit(status);
    if (!never && before.queued_bytes == 0) Fail("refused for bytes by an empty queue");
  }
  if (status.code() != expected || EngineCore::CanNeverFit(status) != never) {
    Fail("submission of %d + %d tokens gave %s", static_cast<int>(request.prompt.size()), request.stopping.max_new_tokens,
         status.ToString().c_str());
  }
  if (!status.ok()) {
    ++refused_;
    ++coverage.refusals;
    if (core_->Loads().submitted != before.submitted) Fail("a refused request was counted");
    return;
  }
  Trace("%s: prompt %zu max_new %d n %d drafts %d mode %d priority %d", request.request_id.c_str(), request.prompt.size(),
        request.stopping.max_new_tokens, request.num_samples, drafts, static_cast<int>(request.speculation.mode), request.priority);
  ++submitted_;
  ++coverage.requests;
  NoteProgress();
  client->accepted = true;
  client->listeners.push_back(std::move(listener));
  clients_[request.request_id] = std::move(client);
}

// Goes on with samples that were cut short, under a new id.
void Simulation::SubmitResumed() {
  if (cut_.empty()) return;
  const std::unique_ptr<Client> old = std::move(cut_.back());
  cut_.pop_back();
  auto client = std::make_unique<Client>();
  client->request = old->request;
  GenerateRequest& request = client->request;
  request.request_id = "r" + std::to_string(next_id_++);
  request.deadline = absl::InfiniteFuture();
  for (auto& [index, sample] : old->cut) {
    if (random_.OneIn(8)) continue;  // a part of the group
    request.resume.push_back(sample);
    client->resumed[index] = sample;
  }
  if (request.resume.empty()) return;
  request.num_samples = static_cast<int32_t>(request.resume.size());
  client->order = next_id_;
  client->born = step_total_;
  auto listener = std::make_shared<Listener>(this, client.get());
  const absl::Status status = core_->Submit(request, listener);
  request.resume.clear();
  if (!status.ok()) {
    ++refused_;
    if (!absl::IsResourceExhausted(status) && !absl::IsUnavailable(status)) Fail("resuming gave %s", status.ToString().c_str());
    return;
  }
  Trace("%s: resumes %s", request.request_id.c_str(), old->request.request_id.c_str());
  ++submitted_;
  ++coverage.requests;
  coverage.resumes += request.num_samples;
  NoteProgress();
  client->accepted = true;
  client->listeners.push_back(std::move(listener));
  clients_[request.request_id] = std::move(client);
}

void Simulation::Commit(InFlight in_flight) {
  WeightName next = names_.back();
  next.label = "v" + std::to_string(names_.size());
  if (random_.OneIn(8)) {
    ++next.draft_step;
  } else {
    next.target_step += quiet_ > 0 || !random_.OneIn(8) ? random_.Between(1, 2) : -random_.Between(0, 3);
  }
  Trace("commit of step %" PRId64 ", mode %d", next.target_step, static_cast<int>(in_flight));
  // As in CommitWeights: where it waits, nothing that it waits for is left.
  if (in_flight == InFlight::kWait) wait_epochs_.insert(static_cast<int64_t>(names_.size()));
  names_.push_back(next);
  for (auto& [id, client] : clients_) client->always_first = false;
  const absl::StatusOr<CommitResult> result = core_->Commit(nullptr, next, in_flight);
  if (!result.ok()) {
    if (expect_error_) return;  // the dropped handles met the injected failure
    return Fail("commit: %s", result.status().ToString().c_str());
  }
  commit_waits_ = scores_wait_ = false;
  ++coverage.commits;
  coverage.keeps += result->kept;
  coverage.recomputes += result->recomputed;
  if (core_->Loads().target_step != next.target_step) Fail("the engine says another step after a commit");
  if (in_flight == InFlight::kAbort && result->kept + result->recomputed > 0) Fail("samples went on over a commit that ends them");
  NoteProgress();
}

// Weights and pauses at random; what waits is looked after first.
void Simulation::Control() {
  if (commit_waits_) {
    if (!core_->CommitMustWait()) {
      Commit(InFlight::kWait);
    } else if (quiet_ == 0 && random_.OneIn(200)) {
      Trace("a commit gives up");
      core_->HoldForCommit(false);
      commit_waits_ = false;
      NoteProgress();
    }
  }
  if (pause_waits_ && !core_->RequestsRun()) {
    Trace("what ran has ended: paused");
    core_->Pause();
    pause_waits_ = false;
    ++coverage.pause_waits;
  }
  if (scores_wait_ && (core_->paused() || !core_->RestartedScoreRuns())) Commit(InFlight::kKeep);
  if (quiet_ > 0) return;
  if (!commit_waits_ && random_.OneIn(60)) {
    // As in CommitWeights, or past its bound.
    if (!scores_wait_ && !core_->paused() && core_->RestartedScoreRuns() && random_.OneIn(2)) {
      Trace("a commit waits for a score");
      core_->HoldScores();
      scores_wait_ = true;
    } else {
      Commit(static_cast<InFlight>(random_.Below(3)));
    }
  }
  if (!commit_waits_ && !scores_wait_ && random_.OneIn(250)) {
    Trace("a commit waits");
    core_->HoldForCommit(true);
    for (auto& [id, client] : clients_) client->always_first = false;
    commit_waits_ = true;
    ++coverage.waits;
  }
  if (!core_->paused() && !pause_waits_ && random_.OneIn(150)) {
    for (auto& [id, client] : clients_) client->always_first = false;
    if (random_.OneIn(3)) {
      Trace("a pause waits");
      core_->HoldForPause();
      pause_waits_ = true;
    } else {
      Trace("pause");
      core_->Pause();
    }
  }
  if (core_->paused() && random_.OneIn(8)) {
    Trace("flush and sleep");
    if (absl::Status status = core_->FlushCache(); !status.ok()) {
      if (!expect_error_) Fail("flush: %s", status.ToString().c_str());
      return;
    }
    const EngineLoads loads = core_->Loads();
    if (loads.used_pages != 0 || loads.used_state_slots != 0 || loads.running_sequences != 0) Fail("a flushed engine holds memory");
    if (!executor_->score_rows().empty()) Fail("the executor remembers a score after a flush");
    if (!executor_->Quiesce().ok()) Fail("quiesce");
    ++coverage.sleeps;
  }
  if ((core_->paused() || pause_waits_) && random_.OneIn(10)) {
    Trace("resume");
    core_->Resume();
    pause_waits_ = false;
    NoteProgress();
  }
}

// Whether nothing but room keeps it from running; holds are another matter.
bool Simulation::MayRun(const Client& client) const {
  return client.request.weights.min_step <= core_->weights().target_step &&
         std::all_of(client.listeners.begin(), client.listeners.end(), [](const auto& l) { return l->room; });
}

Client* Simulation::Pick(bool live) {
  std::vector<Client*> some;
  for (auto& [id, client] : clients_) {
    if (live != (client->ended || client->cancelled)) some.push_back(client.get());
  }
  return some.empty() ? nullptr : some[random_.Below(static_cast<int32_t>(some.size()))];
}

// A repeat of a known id: attaches, replays the kept result, or (after its time to live, or when it ended badly) runs again.
void Simulation::Resubmit() {
  Client* const client = Pick(random_.OneIn(2));
  if (client == nullptr) return;
  if (random_.OneIn(5)) {
    GenerateRequest other = client->request;
    other.body_hash ^= 1;
    const bool known = !client->ended && !client->cancelled;
    if (!known) return;
    if (!absl::IsAlreadyExists(core_->Submit(other, std::make_shared<Listener>(this, client)))) Fail("another body was accepted");
    ++refused_;
    return;
  }
  const EngineLoads before = core_->Loads();
  auto listener = std::make_shared<Listener>(this, client);
  if (!client->ended && !client->cancelled) {
    Trace("%s: attach", client->request.request_id.c_str());
    if (absl::Status status = core_->Submit(client->request, listener); !status.ok()) Fail("attach: %s", status.ToString().c_str());
    client->listeners.push_back(listener);
    ++coverage.attaches;
    if (core_->Loads().submitted != before.submitted) Fail("an attach was counted as a submission");
    return;
  }
  const bool retained = client->ended && client->end_status.ok();
  const absl::Duration ttl = options_.scheduler.result_ttl;
  // Steps move the clock before expirations are looked at, so the very edge is left alone.
  const bool expired = client->ended_at + ttl <= clock_.Now();
  if (!retained || expired || options_.scheduler.max_result_bytes < (1LL << 40)) return;
  Trace("%s: repeat", client->request.request_id.c_str());
  if (absl::Status status = core_->Submit(client->request, listener); !status.ok()) Fail("repeat: %s", status.ToString().c_str());
  if (!listener->done || core_->Loads().submitted != before.submitted) {
    Fail("%s: its result was not kept for its time to live", client->request.request_id.c_str());
  }
  ++coverage.replays;
}

void Simulation::SubmitScore() {
  auto client = std::make_shared<ScoreClient>();
  client->simulation = this;
  client->born = step_total_;
  const SchedulerOptions& scheduler = options_.scheduler;
  const int32_t length = random_.Between(1, std::max(1, std::min(scheduler.max_model_len, scheduler.num_pages * scheduler.page_tokens)) + 3);
  for (int32_t i = 0; i < length; ++i) client->request.token_ids.push_back(static_cast<uint32_t>(random_.Below(kVocab)));
  client->request.draft_depth = random_.OneIn(2) ? 0 : random_.Between(0, 4);
  client->request.priority = random_.Between(-1, 1);
  if (random_.OneIn(6)) client->request.deadline = clock_.Now() + absl::Milliseconds(random_.Between(0, 500));
  const EngineLoads before = core_->Loads();
  const absl::Status status = core_->SubmitScore(client->request, client, &client->handle);
  absl::StatusCode expected = absl::StatusCode::kOk;
  if (core_->draining()) {
    expected = absl::StatusCode::kUnavailable;
  } else if (length > scheduler.max_model_len) {
    expected = absl::StatusCode::kInvalidArgument;
  } else if ((length + scheduler.page_tokens - 1) / scheduler.page_tokens > scheduler.num_pages || length * 4 > scheduler.max_score_bytes ||
             before.waiting_requests >= scheduler.max_queued_requests) {
    expected = absl::StatusCode::kResourceExhausted;
  } else if (absl::IsResourceExhausted(status) && scheduler.max_queued_bytes == 20000 && before.queued_bytes > 0) {
    expected = absl::StatusCode::kResourceExhausted;
  }
  if (status.code() != expected) Fail("score of %d tokens gave %s", length, status.ToString().c_str());
  if (!status.ok()) {
    ++refused_;
    return;
  }
  NoteProgress();
  ++submitted_;
  scores_.push_back(std::move(client));
}

void Simulation::Act() {
  Control();
  if (failed_ || !core_->health().ok()) return;
  if (quiet_ == 0) {
    if (random_.OneIn(10)) SubmitResumed();
    // Bursts and lulls, so that both an empty and a full house occur.
    const int32_t rate = (step_ / 150) % 3 == 0 ? 2 : (step_ / 150) % 3 == 1 ? 6 : 25;
    if (random_.OneIn(rate)) SubmitNew();
    if (random_.OneIn(3 * rate)) SubmitScore();
    if (random_.OneIn(12)) Resubmit();
    if (random_.OneIn(25)) {
      if (Client* client = Pick(true)) {
        Trace("%s: detach", client->request.request_id.c_str());
        auto& listeners = client->listeners;
        const int32_t which = random_.Below(static_cast<int32_t>(listeners.size()));
        core_->Detach(client->request.request_id, listeners[which].get());
        listeners[which]->detached = true;
        listeners.erase(listeners.begin() + which);
        if (listeners.empty()) {
          client->cancelled = true;
          ++cancelled_;
          ++coverage.cancels;
        }
        NoteProgress();
      }
    }
    if (random_.OneIn(60)) {
      if (Client* client = Pick(true)) {
        Trace("%s: abort", client->request.request_id.c_str());
        client->may_be_cut = true;
        if (!core_->Abort(client->request.request_id) || !client->ended) Fail("abort of a live request");
        if (core_->Abort(client->request.request_id)) Fail("a second abort says it ended something");
        ++coverage.aborts;
      }
    }
    if (random_.OneIn(1500)) {
      int32_t live = 0;
      for (auto& [id, client] : clients_) {
        if (client->ended || client->cancelled) continue;
        client->may_be_cut = true;
        live += client->request.num_samples - static_cast<int32_t>(client->ended_samples.size());
      }
      const int64_t epoch = core_->abort_epoch();
      pause_aborts_ = true;
      // The epoch counts before the first sample hears of it.
      if (core_->PauseAborting() != live || core_->abort_epoch() != epoch + 1) Fail("PauseAborting ended another number of samples");
      pause_aborts_ = pause_waits_ = false;
    }
    if (random_.OneIn(40) && !scores_.empty()) {
      ScoreClient& score = *scores_[random_.Below(static_cast<int32_t>(scores_.size()))];
      if (!score.done && !score.cancelled) {
        Trace("score %" PRIu64 ": cancel", score.handle);
        core_->CancelScore(score.handle);
        score.cancelled = true;
        cancelled_handles_.push_back(score.handle);
        ++cancelled_;
        NoteProgress();
      }
    }
    if (random_.OneIn(4)) {
      if (Client* client = Pick(true)) {
        Listener& listener = *client->listeners[random_.Below(static_cast<int32_t>(client->listeners.size()))];
        listener.room = !listener.room && !random_.OneIn(4) ? true : random_.OneIn(2);
        coverage.pauses += listener.room ? 0 : 1;
        NoteProgress();
      }
    }
    if (may_fail_ && random_.OneIn(1200)) {
      Trace("executor fails");
      executor_->FailNext(absl::InternalError("injected"));
      expect_error_ = true;
    }
    if (random_.OneIn(1500) && !core_->draining()) {
      drain_deadline_ = clock_.Now() + absl::Milliseconds(random_.Between(0, 400));
      if (core_->paused()) drain_deadline_ = clock_.Now();  // what stands still ends at once
      Trace("drain");
      core_->StartDrain(drain_deadline_);
      ++coverage.drains;
    }
  }
  // A step takes a few milliseconds, now and then far longer; wall-clock jumps do not exist for the engine's clock.
  clock_.Advance(random_.OneIn(50) ? absl::Milliseconds(random_.Between(50, 400)) : absl::Microseconds(random_.Between(0, 4000)));
}

void Simulation::StepOnce() {
  ++step_total_;
  ++coverage.steps;
  admitted_now_.clear();
  const Client* first = nullptr;
  std::set<std::string> paused;
  const auto comes_before = [](const Client& a, const Client& b) {
    return a.request.priority != b.request.priority ? a.request.priority < b.request.priority : a.order < b.order;
  };
  for (auto& [id, client] : clients_) {
    if (client->ended || client->cancelled) continue;
    if (!MayRun(*client) || core_->paused()) {
      paused.insert(id);
      continue;
    }
    if (first == nullptr || comes_before(*client, *first)) first = client.get();
  }
  for (auto& [id, client] : clients_) client->always_first = client->always_first && client.get() == first && scores_.empty();
  const absl::Time began = clock_.Now();
  const EngineLoads before = core_->Loads();
  const int64_t calls_before = executor_->num_calls();
  absl::StatusOr<bool> worked = core_->Step();
  if (!executor_->violation().empty()) return Fail("%s", executor_->violation().c_str());
  for (const std::string& id : executor_->planned_ids()) {
    if (executor_->num_calls() > calls_before && paused.count(id) > 0) return Fail("%s runs though a reader of it is full", id.c_str());
  }
  if (!worked.ok()) {
    if (!expect_error_) return Fail("step: %s", worked.status().ToString().c_str());
    ++coverage.failures;
    for (auto& [id, client] : clients_) {
      if (!client->ended && !client->cancelled) return Fail("%s was forgotten by a failing engine", id.c_str());
    }
    for (const auto& score : scores_) {
      if (!score->done && !score->cancelled) return Fail("a score was forgotten by a failing engine");
    }
    if (core_->health().ok()) return Fail("health is good after a failure");
    GenerateRequest request = RandomRequest();
    if (!absl::IsInternal(core_->Submit(request, std::make_shared<Listener>(this, nullptr)))) return Fail("a failed engine takes work");
    ++refused_;
  }
  CheckAfterStep(began);
  if (failed_) return;
  const EngineLoads after = core_->Loads();
  coverage.preemptions += after.preemptions - before.preemptions;
  coverage.tokens += after.generated_tokens - before.generated_tokens;
  if (after.generated_tokens > before.generated_tokens) NoteProgress();


  // I11: somebody who may run gets on.
  bool runnable = false, stuck = false;
  for (auto& [id, client] : clients_) {
    if (client->ended || client->cancelled) continue;
    runnable = runnable || MayRun(*client);
    stuck = stuck || !MayRun(*client);
  }
  for (const auto& score : scores_) {
    runnable = runnable || (!score->done && !score->cancelled && (!scores_wait_ || core_->RestartedScoreRuns()));
  }
  // What is held lets nothing else start; what it waits for gets on, unless a reader or a step keeps it.
  if (commit_waits_) runnable = core_->CommitMustWait() && !stuck;
  if (pause_waits_) runnable = (commit_waits_ ? runnable : true) && core_->RequestsRun() && !stuck;
  if (core_->paused()) runnable = false;
  if (!runnable) NoteProgress();
  if (runnable && worked.ok() && !*worked) return Fail("Step says there is nothing to do, and there is");
  coverage.longest_wait = std::max(coverage.longest_wait, step_total_ - last_progress_);
  if (step_total_ - last_progress_ > kProgressBound) return Fail("no progress for %d steps", kProgressBound);
  if (!worked.ok() || (core_->draining() && core_->Idle())) {
    for (auto& [id, client] : clients_) {
      if (!client->ended && !client->cancelled) return Fail("%s is open after the drain", id.c_str());
    }
    Boot();
  }
}

void Simulation::CheckAfterStep(absl::Time step_began) {
  if (absl::Status status = core_->Audit(); !status.ok()) return Fail("audit: %s", std::string(status.message()).c_str());
  const EngineLoads loads = core_->Loads();
  if (loads.submitted != submitted_ || loads.finished != finished_ || loads.cancelled != cancelled_ || loads.failed != failures_ ||
      loads.refused != refused_) {
    return Fail("counters: submitted %" PRId64 "/%" PRId64 " finished %" PRId64 "/%" PRId64 " cancelled %" PRId64 "/%" PRId64
                " failed %" PRId64 "/%" PRId64 " refused %" PRId64 "/%" PRId64,
                loads.submitted, submitted_, loads.finished, finished_, loads.cancelled, cancelled_, loads.failed, failures_, loads.refused,
                refused_);
  }
  if (core_->health().ok()) {
    const SpecCounts& a = loads.spec;
    const SpecCounts& b = executor_->spec();
    if (a.num_spec_steps != b.num_spec_steps || a.num_draft_tokens != b.num_draft_tokens ||
        a.num_accepted_draft_tokens != b.num_accepted_draft_tokens || a.drafted_per_pos != b.drafted_per_pos ||
        a.accepted_per_pos != b.accepted_per_pos) {
      return Fail("speculation counters differ from what the executor did");
    }
    if (loads.steps != executor_->num_calls()) return Fail("steps are miscounted");
  }
  int32_t live = 0;
  for (auto& [id, client] : clients_) {
    if (client->ended || client->cancelled) continue;
    ++live;
    if (client->request.deadline <= step_began && client->born != step_total_) return Fail("%s outlives its deadline", id.c_str());
  }
  if (core_->draining() && drain_deadline_ <= step_began && !core_->Idle()) return Fail("work outlives the drain");
  std::set<uint64_t> open_scores;
  for (const auto& score : scores_) {
    if (score->done || score->cancelled) continue;
    ++live;
    open_scores.insert(score->handle);
    if (score->request.deadline <= step_began && score->born != step_total_) return Fail("score %" PRIu64 " outlives its deadline", score->handle);
  }
  if (live != loads.running_requests + loads.waiting_requests) return Fail("%d live requests, the engine counts others", live);
  for (const auto& [handle, rows] : executor_->score_rows()) {
    if (core_->health().ok() && open_scores.count(handle) == 0) return Fail("the executor still remembers score %" PRIu64, handle);
  }
  if (live == 0 && (loads.used_pages != 0 || loads.used_state_slots != 0 || loads.running_sequences != 0 || loads.queued_bytes != 0)) {
    return Fail("an idle engine holds %d pages, %d state slots", loads.used_pages, loads.used_state_slots);
  }
  if (loads.retained_bytes > options_.scheduler.max_result_bytes && live == 0) return Fail("more is retained than the budget allows");
  if ((commit_waits_ || pause_waits_ || core_->paused()) && !admitted_now_.empty()) {
    return Fail("%s was admitted though it is held", admitted_now_[0]->request.request_id.c_str());
  }
  // First come, first served: nobody is admitted past a request before it in order that could run.
  for (const Client* client : admitted_now_) {
    for (auto& [id, other] : clients_) {
      if (other->ended || other->cancelled || other->admitted || !client->accepted || other->born == step_total_) continue;
      const bool before = other->request.priority != client->request.priority ? other->request.priority < client->request.priority
                                                                              : other->order < client->order;
      if (before && MayRun(*other) && !commit_waits_) return Fail("%s was admitted before %s", client->request.request_id.c_str(), id.c_str());
    }
  }
  // Forget old ended clients (not those whose result may be asked for again).
  for (auto it = clients_.begin(); it != clients_.end();) {
    const Client& client = *it->second;
    const bool gone = client.cancelled || (client.ended && (!client.end_status.ok() || client.ended_at + options_.scheduler.result_ttl <= clock_.Now()));
    if (!gone) {
      ++it;
      continue;
    }
    executor_->Forget(client.request.request_id);
    if (!client.cut.empty() && client.ended && cut_.size() < 20) cut_.push_back(std::move(it->second));
    it = clients_.erase(it);
  }
  std::erase_if(scores_, [](const auto& score) { return score->done || score->cancelled; });
}

// Everybody reads and nobody asks: all open work must end, and nothing may be held then.
void Simulation::Rest() {
  if (failed_) return;
  quiet_ = 1;
  for (auto& [id, client] : clients_) {
    for (auto& listener : client->listeners) listener->room = true;
  }
  core_->Resume();
  pause_waits_ = false;
  for (int32_t i = 0; !core_->Idle() && !failed_; ++i) {
    clock_.Advance(absl::Milliseconds(1));
    Control();
    // Somebody may wait for a step. Seldom: scores start over.
    const auto waits = [this](const auto& entry) { return !entry.second->ended && !entry.second->cancelled && !MayRun(*entry.second); };
    if (i % 400 == 399 && !commit_waits_ && std::any_of(clients_.begin(), clients_.end(), waits)) Commit(InFlight::kKeep);
    StepOnce();
    if (i > 20000) Fail("no rest after 20000 steps");
  }
  if (!failed_) {
    for (auto& [id, client] : clients_) {
      if (!client->ended && !client->cancelled) Fail("%s never ended", id.c_str());
    }
    const EngineLoads loads = core_->Loads();
    if (loads.used_pages != 0 || loads.used_state_slots != 0) Fail("pages or slots are held at rest");
  }
  quiet_ = 0;
  NoteProgress();
}

}  // namespace
}  // namespace bebop::sim

int main(int argc, char** argv) {
  uint64_t first = 1;
  int32_t seeds = 1, steps = 2000;
  bool verbose = false;
  for (int i = 1; i < argc; ++i) {
    const auto value = [&](const char* flag) { return std::strcmp(argv[i], flag) == 0 && i + 1 < argc ? argv[++i] : nullptr; };
    if (const char* text = value("--seed")) {
      first = std::strtoull(text, nullptr, 10);
    } else if (const char* text = value("--first")) {
      first = std::strtoull(text, nullptr, 10);
    } else if (const char* text = value("--seeds")) {
      seeds = std::atoi(text);
    } else if (const char* text = value("--steps")) {
      steps = std::atoi(text);
    } else if (std::strcmp(argv[i], "--verbose") == 0) {
      verbose = true;
    } else {
      std::fprintf(stderr, "usage: scheduler_sim [--seed N | --first N --seeds K] [--steps M] [--verbose]\n");
      return 2;
    }
  }
  bebop::sim::Simulation::Coverage total;
  int32_t failed = 0;
  for (uint64_t seed = first; seed < first + static_cast<uint64_t>(seeds); ++seed) {
    bebop::sim::Simulation simulation(seed, verbose);
    if (!simulation.Run(steps)) ++failed;
    total.Add(simulation.coverage);
    if (failed >= 5) break;
  }
  std::printf("%d seeds: steps %" PRId64 " requests %" PRId64 " samples %" PRId64 " tokens %" PRId64 " preemptions %" PRId64 " forks %" PRId64
              " scores %" PRId64 " refusals %" PRId64 " attaches %" PRId64 " replays %" PRId64 " cancels %" PRId64 " aborts %" PRId64
              " deadlines %" PRId64 " drains %" PRId64 " failures %" PRId64 " pauses %" PRId64 " non_finite %" PRId64 " stops %" PRId64
              " trimmed %" PRId64 " commits %" PRId64 " waits %" PRId64 " keeps %" PRId64 " recomputes %" PRId64 " superseded %" PRId64
              " policy_ends %" PRId64 " mixed %" PRId64 " spans %" PRId64 " sleeps %" PRId64 " pause_waits %" PRId64 " resumes %" PRId64
              " longest_wait %" PRId64 "; failed seeds %d\n",
              seeds, total.steps, total.requests, total.samples, total.tokens, total.preemptions, total.forks, total.scores, total.refusals,
              total.attaches, total.replays, total.cancels, total.aborts, total.deadlines, total.drains, total.failures, total.pauses,
              total.non_finite, total.stops, total.trimmed, total.commits, total.waits, total.keeps, total.recomputes, total.superseded,
              total.policy_ends, total.mixed, total.spans, total.sleeps, total.pause_waits, total.resumes, total.longest_wait, failed);
  if (failed > 0) return 1;
  // A run of many seeds that left out one of these would prove less than it says.
  if (seeds >= 100 && steps >= 1000) {
    for (const int64_t seen : {total.preemptions, total.forks, total.scores, total.refusals, total.attaches, total.replays, total.cancels,
                               total.aborts, total.deadlines, total.drains, total.failures, total.pauses, total.non_finite, total.stops,
                               total.trimmed, total.commits, total.waits, total.keeps, total.recomputes, total.superseded,
                               total.policy_ends, total.mixed, total.spans, total.sleeps, total.pause_waits, total.resumes}) {
      if (seen < 50) {
        std::fprintf(stderr, "FAILED: the simulation hardly exercised one of its subjects\n");
        return 1;
      }
    }
  }
  return 0;
}
