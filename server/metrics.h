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

// The version in use accepts fewer drafts than the one before (docs/operations.md): of at least 1,000 drafts under each, the share accepted
// fell by more than a fifth, and by more than three standard errors.
bool AcceptanceDropped(const SpecCounts& now, const SpecCounts& before);

// What Prometheus scrapes. Names are those of vLLM behind `bebop:` where vLLM has one. Counters and gauges are read from the engine's loads at
// the scrape, all from one snapshot; only times are collected here, once a sample. Thread safe.
class Metrics {
 public:
  explicit Metrics(MetricsOptions options);

  // A sample as a caller gets it; one that failed tells nothing.
  void OnSample(const SampleResult& sample);
  void OnWeightUpdate(UpdateEnd end, const UpdateTimes& times);

  // The text format, version 0.0.4.
  std::string Exposition(const EngineLoads& loads, const MetricsState& state) const;

 private:
  const MetricsOptions options_;
  // prometheus::Histogram locks itself, for a few additions.
  prometheus::Histogram time_to_first_token_, inter_token_latency_, e2e_, queue_, prefill_, decode_;
  std::map<std::string, prometheus::Histogram> update_phases_;  // by phase

  mutable Mutex mutex_;
  std::map<UpdateEnd, int64_t> updates_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace bebop
