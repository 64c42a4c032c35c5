// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "engine/base/clock.h"
#include "engine/schedule/scheduler_options.h"
#include "engine/schedule/step_plan.h"
#include "tests/sim/fake_model.h"

namespace bebop::sim {

class VirtualClock final : public Clock {
 public:
  absl::Time Now() const override { return now_; }
  void Advance(absl::Duration by) { now_ += by; }

 private:
  absl::Time now_ = absl::FromUnixSeconds(1000);
};

// Runs plans against shadow memory and the fake model. For every position of every page it remembers which prefix wrote it, for the target
// and for the MTP cache, and for every state slot which prefix it holds and which drafts lie in its window. Each pass reads all that a
// real one would read; reading a wrong or stale entry, writing what another sequence of the step reads, or a plan that breaks its own
// contract (step_plan.h) is a violation: the first one is kept, and Execute fails.
//
// What is written carries the epoch of the weights of its pass. A sequence's first pass in a slot may read of its own epoch only (I8); later
// ones, what this stay wrote. Scores never read across a commit. Of each token it remembers the epoch that drew it (I3), and whether it read any other.
class FakeExecutor final : public Executor {
 public:
  explicit FakeExecutor(const SchedulerOptions& options);

  absl::Status Execute(const StepPlan& plan, StepResult* result) override;
  absl::Status SetWeights(const ModelWeights* weights, int64_t epoch) override;
  // Forgets all caches, so that whoever goes on without computing anew is caught.
  absl::Status Quiesce() override;

  // Decodes sometimes have the epoch at the end of their sequence's pass before, as those that a device ran ahead.
  void set_runs_ahead(bool runs_ahead) { runs_ahead_ = runs_ahead; }
  struct Drawn {
    int64_t epoch = -1;
    bool mixed = false;  // what was computed before was not all of this epoch
  };
  // By place in the output, of the sample of a request; places that it did not draw have epoch -1.
  const std::vector<Drawn>& DrawnBy(const std::string& request_id, int32_t sample_index) { return drawn_[{request_id, sample_index}]; }
  void Forget(const std::string& request_id) { std::erase_if(drawn_, [&](const auto& entry) { return entry.first.first == request_id; }); }

  const std::string& violation() const { return violation_; }
  // Called in the middle of every Execute: what other threads do to the core while the real executor runs without its lock.
  void set_while_executing(std::function<void()> action) { while_executing_ = std::move(action); }
  void FailNext(absl::Status status) { fail_next_ = std::move(status); }
  const std::map<uint64_t, int32_t>& score_rows() const { return score_rows_; }  // unfinished handles it has memory for
  int64_t num_calls() const { return num_calls_; }
  const SpecCounts& spec() const { return spec_; }
  const std::vector<std::string>& planned_ids() const { return planned_ids_; }  // requests of the latest call's sequences

  // What a score of these tokens returns.
  static std::vector<float> ScoreReference(const ScoreRequest& request);

 private:
  struct Entry {
    uint64_t prefix = 0;   // of all tokens up to and including this position's
    uint32_t token = 0;
    int32_t position = -1;
    bool certain = false;  // MTP: made from a true hidden state
    int64_t epoch = 0;
  };
  struct State {
    uint64_t prefix = 0;
    int32_t num_tokens = -1;
    std::vector<uint32_t> window;
  };
  struct Drafts {
    const GenerateRequest* request = nullptr;
    uint32_t sample_index = 0;
    int32_t base = -1;  // position of the token they stand behind
    std::vector<uint32_t> tokens;
  };

  bool Fail(const std::string& what);
  Entry* At(std::vector<Entry>* entries, std::span<const int32_t> pages, int32_t position);
  bool CheckTogether(const StepPlan& plan);
  bool CheckResidency(const SequencePlan& plan);
  bool CheckLookahead(const SequencePlan& plan);
  // Entries of epochs before `earliest` may not be read; *mixed: some was not of `epoch`.
  bool ReadPrefix(std::span<const int32_t> pages, int32_t num_tokens, bool mtp, int64_t earliest, int64_t epoch, uint64_t* prefix, bool* mixed);
  bool RunSequence(const SequencePlan& plan, SequenceOutcome* out);
  int64_t EpochOf(const SequencePlan& plan) const;
  bool RunScore(const ScorePlan& plan, StepResult* result);

  const SchedulerOptions options_;
  std::vector<Entry> target_, mtp_;  // [num_pages * page_tokens]
  std::vector<State> states_;
  std::vector<Drafts> drafts_;       // by executor slot
  struct Stay {
    uint64_t residency = 0;
    const GenerateRequest* request = nullptr;
    uint32_t sample_index = 0;
    int32_t num_computed = 0;  // of the latest plan
    std::vector<int32_t> pages;
    int64_t first_epoch = -1;  // of its first pass; -1: not yet
    int64_t ahead_epoch = -1;  // when its latest pass ended
  };
  std::vector<Stay> stays_;          // by executor slot, the latest
  std::set<uint64_t> residencies_;   // that were ever used
  std::map<uint64_t, int32_t> score_rows_;
  std::map<uint64_t, int32_t> score_bases_;
  std::string violation_;
  absl::Status fail_next_;
  std::function<void()> while_executing_;
  int64_t num_calls_ = 0;
  int64_t weight_epoch_ = 0;
  bool runs_ahead_ = false;
  std::map<std::pair<std::string, int32_t>, std::vector<Drawn>> drawn_;
  SpecCounts spec_;
  std::vector<std::string> planned_ids_;
};

}  // namespace bebop::sim
