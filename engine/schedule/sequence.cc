// SPDX-License-Identifier: Apache-2.0
#include "engine/schedule/sequence.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "kernels/common/check.h"

namespace bebop {

Sequence::Sequence(Group* group, const StopRules* rules, int32_t sample_index)
    : group_(group), sample_index_(sample_index), matcher_(rules) {
  if (is_prefix()) state = State::kIdle;
  result.sample_index = is_prefix() ? 0 : sample_index;
  result.seed_used = group->request.sampling.seed;
  result.speculation = group->request.speculation;
  result.prompt_tokens = static_cast<int32_t>(group->request.prompt.size());
}

Sequence::Sequence(Group* group, const StopRules* rules, SampleResult resumed) : Sequence(group, rules, resumed.sample_index) {
  const GenerateRequest& request = group->request;
  const int32_t prompt_tokens = result.prompt_tokens;
  for (const uint32_t token : resumed.token_ids) matcher_.Push(token);
  result.token_ids = std::move(resumed.token_ids);
  if (request.output.logprobs) result.logprobs = std::move(resumed.logprobs);
  if (request.output.raw_logprobs) result.raw_logprobs = std::move(resumed.raw_logprobs);
  if (request.output.entropy) result.entropy = std::move(resumed.entropy);
  if (request.output.draft_logprobs) result.draft_logprobs = std::move(resumed.draft_logprobs);
  if (request.output.token_source) result.token_source = std::move(resumed.token_source);
  result.spec = resumed.spec;
  result.weight_spans = std::move(resumed.weight_spans);
  result.kv_mixed = resumed.kv_mixed;
  result.prompt_tokens = prompt_tokens;
  result.cached_tokens = resumed.cached_tokens;
  result.preemptions = resumed.preemptions;
  result.recomputed_tokens = resumed.recomputed_tokens;
  // All but the last token was fed once, elsewhere.
  resumed_ = num_output() > 0;
  if (resumed_) num_computed_ever_ = prompt_tokens + num_output() - 1;
  // As after a preemption: the same drafts, at the same places.
  if (resumed_) {
    num_restore_drafts_ = std::clamp(resumed.pending_drafts, 0, std::min(group->num_draft_tokens, num_remaining() - 1));
  }
}

Rank Sequence::rank() const { return {group_->priority, group_->arrival, sample_index_}; }

int32_t Sequence::num_tokens() const {
  return static_cast<int32_t>(group_->request.prompt.size()) + (is_prefix() ? -1 : num_output());
}

int32_t Sequence::num_remaining() const { return group_->request.stopping.max_new_tokens - num_output(); }

uint32_t Sequence::token(int32_t position) const {
  const auto& prompt = group_->request.prompt;
  const int32_t prompt_length = static_cast<int32_t>(prompt.size());
  return position < prompt_length ? prompt[position] : result.token_ids.at(position - prompt_length);
}

bool Sequence::is_decoding() const {
  return !is_prefix() && num_output() > 0 && num_restore_drafts_ == 0 && num_computed_ == num_tokens() - 1;
}

Pass Sequence::NextPass(int32_t max_known) const {
  Pass pass;
  // A recompute that must restore drafts ends before the last emitted token; the verification that follows feeds it.
  const int32_t end = is_prefix() || num_restore_drafts_ == 0 ? num_tokens() : num_tokens() - 1;
  pass.num_known = std::min(max_known, end - num_computed_);
  const bool reaches_end = num_computed_ + pass.num_known == end;
  if (reaches_end && num_restore_drafts_ > 0) {
    pass.num_drafts_next = num_restore_drafts_;
  } else if (reaches_end && !is_prefix()) {
    pass.sample = true;
    pass.num_drafts = num_drafts_;
    // At least one token comes out of this pass, and drafts are only of use with room for one more token behind them.
    pass.num_drafts_next = std::max(0, std::min(group_->num_draft_tokens, num_remaining() - 2));
  }
  const int32_t num_mtp = std::max(pass.num_drafts_next, group_->num_draft_tokens > 0 ? 1 : 0);
  pass.num_positions = num_computed_ + pass.num_rows() + num_mtp;
  return pass;
}

int32_t Sequence::NumPositions(int32_t lookahead) const {
  const int32_t needed = NextPass(std::numeric_limits<int32_t>::max()).num_positions;
  if (is_prefix()) return needed;  // it never decodes
  const int32_t most = static_cast<int32_t>(group_->request.prompt.size()) + group_->request.stopping.max_new_tokens +
                       group_->num_draft_tokens;
  return std::max(needed, std::min(needed + lookahead, most));
}

// Before the counters of its pass are applied.
void Sequence::NoteEpoch(int64_t epoch) {
  BEBOP_CHECK(epoch >= weight_epoch_);  // I4
  cache_mixed_ = num_computed_ > 0 && (cache_mixed_ || epoch != weight_epoch_);
  weight_epoch_ = epoch;
}

void Sequence::ExtendSpans(int32_t num_tokens, const WeightEpochs& epochs) {
  if (num_tokens == 0) return;
  result.kv_mixed = result.kv_mixed || cache_mixed_;
  const int32_t begin = num_output(), end = begin + num_tokens;
  std::vector<WeightSpan>& spans = result.weight_spans;
  if (span_epoch_ != weight_epoch_ || spans.empty()) {
    const WeightName& name = epochs.name(weight_epoch_);
    const bool resumed = span_epoch_ < 0 && !spans.empty();
    const bool same = resumed && spans.back().target_step == name.target_step && spans.back().draft_step == name.draft_step &&
                      spans.back().label == name.label;
    if (!same) {
      spans.push_back({.target_step = name.target_step, .draft_step = name.draft_step, .label = name.label, .begin = begin, .end = begin});
    }
    span_epoch_ = weight_epoch_;
  }
  spans.back().end = end;
}

FinishReason Sequence::Apply(const Pass& pass, const SequenceOutcome& outcome, const WeightEpochs& epochs, SpecCounts* step_counts) {
  *step_counts = SpecCounts();
  NoteEpoch(outcome.weight_epoch);
  result.recomputed_tokens += std::max(0, std::min(num_computed_ + pass.num_known, num_computed_ever_) - num_computed_);
  num_computed_ += pass.num_known;
  num_replay_ = 0;
  num_drafts_ = 0;
  num_computed_ever_ = std::max(num_computed_ever_, num_computed_);
  if (!pass.sample) {
    if (pass.num_drafts_next > 0) {
      num_drafts_ = std::min(outcome.num_drafts_made, num_restore_drafts_);
      num_restore_drafts_ = 0;
    }
    return FinishReason::kNone;
  }

  const int32_t accepted = outcome.num_accepted;
  BEBOP_CHECK(accepted >= 0 && accepted <= outcome.num_reached && outcome.num_reached <= pass.num_drafts);
  BEBOP_CHECK(outcome.num_emitted == accepted + (outcome.non_finite ? 0 : 1));
  num_computed_ += accepted;
  num_replay_ = accepted;
  num_computed_ever_ = std::max(num_computed_ever_, num_computed_);

  // The one place that trims: everything below sees `kept` tokens and no more.
  const GenerateRequest& request = group_->request;
  FinishReason finish = FinishReason::kNone;
  int32_t kept = 0;
  while (kept < outcome.num_emitted && finish == FinishReason::kNone) {
    const std::optional<StopMatch> stop = matcher_.Push(outcome.tokens[kept++]);
    if (stop.has_value()) {
      finish = FinishReason::kStop;
      result.stop_token_id = stop->token_id;
      if (stop->string_index.has_value()) result.stop_string = request.stopping.stop_strings[*stop->string_index];
    } else if (num_output() + kept == request.stopping.max_new_tokens) {
      finish = FinishReason::kLength;
    }
  }
  if (finish == FinishReason::kNone && outcome.non_finite) finish = FinishReason::kNonFinite;

  SpecCounts& counts = *step_counts;
  if (pass.num_drafts > 0) {
    counts.num_spec_steps = 1;
    counts.num_draft_tokens = pass.num_drafts;
    counts.num_accepted_draft_tokens = accepted;
    counts.num_trimmed_tokens = std::max(0, accepted - kept);
    for (int32_t i = 0; i < outcome.num_reached; ++i) {
      counts.drafted_per_pos[i] = 1;
      counts.accepted_per_pos[i] = i < accepted ? 1 : 0;
      if (request.output.spec_detail) counts.overlap_per_pos[i] = outcome.overlap[i];
    }
    result.spec.Add(counts);
  }

  const auto append = [kept](bool wanted, const auto& from, auto* to) {
    if (wanted) to->insert(to->end(), from.begin(), from.begin() + kept);
  };
  ExtendSpans(kept, epochs);
  append(true, outcome.tokens, &result.token_ids);
  append(request.output.logprobs, outcome.logprob, &result.logprobs);
  append(request.output.raw_logprobs, outcome.raw_logprob, &result.raw_logprobs);
  append(request.output.entropy, outcome.entropy, &result.entropy);
  append(request.output.draft_logprobs, outcome.draft_logprob, &result.draft_logprobs);
  append(request.output.token_source, outcome.source, &result.token_source);
  num_drafts_ = std::max(0, std::min(outcome.num_drafts_made, num_remaining() - 1));
  return finish;
}

void Sequence::StartFrom(const Sequence& prefix) {
  num_computed_ = prefix.num_computed_;
  // Later than its own last pass, since a commit leaves no prefix behind.
  weight_epoch_ = prefix.weight_epoch_;
  cache_mixed_ = prefix.cache_mixed_;
}

void Sequence::Reset() {
  // If drafts were still to be restored, they still are.
  num_restore_drafts_ = std::max(num_restore_drafts_, num_drafts_);
  num_drafts_ = 0;
  num_computed_ = 0;
  num_replay_ = 0;
}

Group::Group(GenerateRequest generate_request, const std::vector<uint32_t>& eos_token_ids, const TokenBytes* token_bytes)
    : resume_(std::move(generate_request.resume)),
      request(std::move(generate_request)),
      rules(request.stopping, eos_token_ids, token_bytes),
      num_draft_tokens(request.speculation.mode == SpeculationMode::kOff ? 0 : request.speculation.num_draft_tokens),
      prefix(this, &rules, kPrefixSub) {
  priority = request.priority;
  deadline = request.deadline;
  if (request.stopping.min_new_tokens > 0) banned_before_min = rules.stop_ids();
  samples.reserve(static_cast<size_t>(request.num_samples));
  if (resume_.empty()) {
    for (int32_t i = 0; i < request.num_samples; ++i) samples.emplace_back(this, &rules, i);
  } else {
    for (SampleResult& resumed : resume_) samples.emplace_back(this, &rules, std::move(resumed));
    resume_ = {};
  }
  num_waiting = num_unfinished = request.num_samples;
}

ScoreWork::ScoreWork(ScoreRequest score_request) : request(std::move(score_request)) {
  is_score = true;
  priority = request.priority;
  deadline = request.deadline;
}

}  // namespace bebop
