// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <prometheus/histogram.h>

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/time/time.h"
#include "engine/base/mutex.h"
#include "engine/schedule/engine_loads.h"
#include "engine/schedule/request.h"
#include "engine/schedule/weight_commit.h"
#include "server/update_end.h"

namespace bebop {

struct MetricsOptions {
  std::string model_name{};  // label model_name of every metric
  std::string build{};
  bool vllm = false, sglang = false;  // the metrics that have a name there, under that name, too
  bool insecure_no_auth = false;
};

// What a scrape tells besides the engine's loads.
struct MetricsState {
  bool serving = true, draining = false;
  EngineControl control{};
  absl::Duration since_heartbeat{};
  int32_t num_draft_tokens = 0;  // of requests that leave it unset; 0 with mode off
};

// Of at least 1,000 drafts each, the share accepted fell by more than a fifth, and by more than three standard errors.
bool AcceptanceDropped(const SpecCounts& now, const SpecCounts& before);

// Whether the draft layer still follows the target. Counts of weight versions are put together into windows of at least 1,000 drafts, so that
// versions that lived for a moment count, too; the latest window is compared with the best one since the draft layer last changed, the one just
// before that change included. So slow drift is heard as well as a sudden drop.
class AcceptanceWatch {
 public:
  // The version that made the counts `ended` was replaced; the draft layer is now of `draft_step`.
  void OnCommit(const SpecCounts& ended, int64_t draft_step);
  // `version`: counts of the version in use.
  bool Dropped(const SpecCounts& version) const;

 private:
  SpecCounts open_;  // versions whose window is not full yet
  SpecCounts last_, best_;
  int64_t draft_step_ = 0;
};

// What Prometheus scrapes. Names are those of vLLM behind `bebop:` where vLLM has one. Counters and gauges are read from the engine's loads at
// the scrape, all from one snapshot; only times, and what tells a drop of acceptance, are collected here. Thread safe.
class Metrics {
 public:
  explicit Metrics(MetricsOptions options);

  // A sample that ended; one that failed tells nothing.
  void OnSample(const SampleResult& sample);
  // Times are kept of updates that were committed.
  void OnWeightUpdate(UpdateEnd end, const UpdateTimes& times);
  // After a commit, with the loads that it left.
  void OnCommit(const EngineLoads& loads);

  // The text format, version 0.0.4.
  std::string Exposition(const EngineLoads& loads, const MetricsState& state) const;

 private:
  const MetricsOptions options_;
  // prometheus::Histogram locks itself, for a few additions.
  prometheus::Histogram time_to_first_token_, inter_token_latency_, e2e_, queue_, prefill_, decode_;
  std::map<std::string, prometheus::Histogram> update_phases_;  // by phase

  mutable Mutex mutex_;
  std::map<UpdateEnd, int64_t> updates_ ABSL_GUARDED_BY(mutex_);
  AcceptanceWatch acceptance_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace bebop
