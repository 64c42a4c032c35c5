// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "engine/sampling/sampling_params.h"
#include "engine/schedule/weight_commit.h"

namespace bebop {

// Most stop ids of a request: a device holds them for each sample.
inline constexpr int32_t kMaxStopTokenIds = 1024;

struct StoppingParams {
  int32_t max_new_tokens = 0;  // > 0; "up to the model length" is resolved before submission
  int32_t min_new_tokens = 0;
  std::vector<uint32_t> stop_token_ids;  // <= kMaxStopTokenIds
  std::vector<std::string> stop_strings;  // matched on decoded bytes; tokens are kept through the one that completes the match
  bool ignore_eos = false;
};

struct SpeculationParams {
  SpeculationMode mode = SpeculationMode::kOff;
  int32_t num_draft_tokens = 0;         // γ, 0..kMaxDraftTokens
  double synthetic_acceptance = -1.0;   // < 0: off
};

// Tokens [begin, end) of a sample were drawn from the target of one weight version (I3); where they were drafted, by that version's draft layer
// or, at the first verification after a swap, by the one before.
struct WeightSpan {
  int64_t target_step = 0, draft_step = 0;
  std::string label;
  int32_t begin = 0, end = 0;
  bool operator==(const WeightSpan&) const = default;
};

enum class FinishReason : uint8_t { kNone, kStop, kLength, kAborted, kDrained, kNonFinite, kDeadline, kFailed, kSuperseded, kWeightPolicy };
inline constexpr int32_t kNumFinishReasons = 10;

// Exact counts of speculation for one sample; per position i (0-based) over steps whose draft i existed and whose drafts before i were
// accepted, before trimming at a stop (cli.md section 3).
struct SpecCounts {
  int64_t num_spec_steps = 0;              // verifications with at least one draft
  int64_t num_draft_tokens = 0;            // all drafts verified
  int64_t num_accepted_draft_tokens = 0;   // before trimming
  int64_t num_trimmed_tokens = 0;          // accepted but cut by a stop
  std::array<int64_t, kMaxDraftTokens> drafted_per_pos{};
  std::array<int64_t, kMaxDraftTokens> accepted_per_pos{};
  std::array<double, kMaxDraftTokens> overlap_per_pos{};
  void Add(const SpecCounts& other);
};

// One finished sample. Per-token arrays have the length of token_ids, or are empty when not asked for.
struct SampleResult {
  int32_t sample_index = 0;
  uint64_t seed_used = 0;
  SpeculationParams speculation;  // of the group that ran: a repeat of the request may have been given other defaults
  std::vector<uint32_t> token_ids;
  std::vector<float> logprobs, raw_logprobs, entropy, draft_logprobs;
  std::vector<int32_t> token_source;
  FinishReason finish = FinishReason::kNone;
  std::optional<uint32_t> stop_token_id;
  std::optional<std::string> stop_string;
  SpecCounts spec;
  std::vector<WeightSpan> weight_spans;  // tile [0, token_ids.size())
  bool kv_mixed = false;      // some token was drawn with keys, values or states computed under other weights than its own
  int64_t abort_epoch = 0;    // of the pause that ended it (kAborted); else 0
  int32_t pending_drafts = 0;  // that stood behind the last token when it was cut short: whoever goes on makes the same ones anew
  int32_t prompt_tokens = 0, cached_tokens = 0, preemptions = 0, recomputed_tokens = 0;
  absl::Duration queue_time, prefill_time, decode_time, time_to_first_token, total_time;
};

// A validated generation request: a group of samples of one prompt.
struct GenerateRequest {
  std::string request_id;     // unique while known to the server
  uint64_t body_hash = 0;     // of everything but the id: same id + same hash attaches, same id + another hash is refused
  std::vector<uint32_t> prompt;  // >= 1 tokens
  int32_t num_samples = 1;
  SamplingParams sampling;
  StoppingParams stopping;
  OutputParams output;
  SpeculationParams speculation;
  int32_t priority = 0;       // lower runs first
  bool stream_tokens = false;
  WeightPolicy weights;
  bool detach = false;        // runs on when its last observer leaves
  // Samples that were cut short, to go on with: num_samples of them with the request's seed, in the order of their index; empty: new ones. Tokens,
  // per-token arrays as asked for, spans, kv_mixed, pending drafts, counts and usage are taken over, and stops are matched on from there; reason, times
  // and epoch are not. What is prefilled anew counts as recomputed. Draws are keyed by position and drafts made anew, so under unchanged weights the tokens are those of an undisturbed run.
  std::vector<SampleResult> resume;
  absl::Time deadline = absl::InfiniteFuture();  // on the engine's (monotonic) clock
};

// Teacher-forced scoring of one sequence (cli.md section 3).
struct ScoreRequest {
  std::vector<uint32_t> token_ids;  // T >= 1
  int32_t score_start = 0;
  float temperature = 1.0f;         // > 0
  int32_t top_logprobs = 0;
  std::vector<uint32_t> token_ids_logprob;
  bool entropy = false;
  int32_t draft_depth = 0;          // 0..kMaxDraftTokens
  int32_t priority = 0;
  absl::Time deadline = absl::InfiniteFuture();
};

// What a request tells its owner. Calls come one at a time, under the engine's lock: from the engine thread, from Submit when a repeat
// hears what it missed, and from whoever aborts. Must return quickly and never block or call the engine.
class GenerateObserver {
 public:
  virtual ~GenerateObserver() = default;
  // The request left the queue and holds its resources.
  virtual void OnAdmitted() {}
  // New tokens of a sample (only with stream_tokens): result arrays from index `begin` on are new.
  virtual void OnTokens(const SampleResult& /*partial*/, int32_t /*begin*/) {}
  // A sample ended; each sample of an accepted request ends exactly once. It never changes again, so it may be kept and read elsewhere.
  virtual void OnSample(const std::shared_ptr<const SampleResult>& sample) = 0;
  // The request ended: OK after all samples were delivered, else why (deadline, engine failure). Called exactly once, last.
  virtual void OnDone(const absl::Status& status) = 0;
  // False while the owner's output buffer is full: the request's samples pause and may be preempted; others go on.
  virtual bool HasRoom() const { return true; }
};

struct ScoredPosition {
  std::vector<uint32_t> top_ids;
  std::vector<float> top_logprobs;
  std::vector<float> asked_logprobs;  // token_ids_logprob's
};
struct DraftScore {
  int32_t depth = 0;  // 1-based
  int32_t start = 0;
  std::vector<float> logprobs, overlap, argmax_prob, entropy;
};
struct ScoreResult {
  std::vector<float> logprobs;             // t = max(score_start, 1) .. T-1
  std::vector<float> entropy;
  std::vector<ScoredPosition> positions;   // when top_logprobs or token_ids_logprob were asked for
  std::vector<DraftScore> draft;           // draft_depth entries
  int64_t weight_step = 0;
};

class ScoreObserver {
 public:
  virtual ~ScoreObserver() = default;
  // Called once, on the engine thread.
  virtual void OnScore(const absl::Status& status, ScoreResult result) = 0;
};

}  // namespace bebop
