// SPDX-License-Identifier: Apache-2.0
#include "engine/runtime/model_executor.h"

#include <algorithm>
#include <limits>

#include "kernels/common/check.h"

namespace bebop {
namespace {

// Absolute position of the first token that this step emits for the sequence.
uint32_t FirstEmittedPosition(const SequencePlan& sequence) {
  return static_cast<uint32_t>(sequence.num_computed + sequence.known_tokens.size());
}

RandomKey KeyAt(const SequencePlan& sequence, uint32_t position) { return {sequence.seed, sequence.sample_index, position}; }

}  // namespace

ModelExecutor::ModelExecutor(const ModelConfig& config, const ModelExecutorOptions& options, Model* model,
                             ModelStateStorage* storage, DeviceMemory* memory, ThreadPool* pool)
    : config_(config),
      options_(options),
      model_(model),
      storage_(storage),
      pool_(pool),
      logit_rows_(std::clamp(options.max_num_seqs * (options.max_draft_tokens + 1), options.max_draft_tokens + 1, kMaxLogitRows)),
      scorer_(config, options.max_step_tokens, options.page_table_entries, model, &storage->state(), memory, pool),
      hidden_(static_cast<size_t>(options.max_step_tokens) * config.hidden_size),
      gathered_(static_cast<size_t>(logit_rows_) * config.hidden_size),
      logits_(static_cast<size_t>(logit_rows_) * config.vocab_size),
      scratch_(static_cast<size_t>(logit_rows_) * config.vocab_size),
      target_rows_(logit_rows_, config.vocab_size),
      draft_rows_(static_cast<int64_t>(options.max_num_seqs) * options.max_draft_tokens, config.vocab_size),
      slots_(options.max_num_seqs) {
  if (options.max_draft_tokens > 0) {
    mtp_input_.resize(hidden_.size());
    mtp_hidden_.resize(hidden_.size());
    draft_hidden_.resize(static_cast<size_t>(options.max_num_seqs) * config.hidden_size);
  }
  target_batch_.Reserve(options.max_step_tokens, options.max_num_seqs + 1, options.page_table_entries);
  mtp_batch_.Reserve(options.max_step_tokens, options.max_num_seqs + 1, options.page_table_entries);
  block_.reserve(options.max_num_seqs);
  block_first_row_.reserve(options.max_num_seqs);
  logit_row_.reserve(logit_rows_);
  drafting_.reserve(options.max_num_seqs);
}

absl::Status ModelExecutor::SetWeights(const ModelWeights* weights, int64_t epoch) {
  model_->SetWeights(weights);
  weight_epoch_ = epoch;
  return absl::OkStatus();
}

absl::Status ModelExecutor::Execute(const StepPlan& plan, StepResult* result) {
  for (const uint64_t handle : plan.dropped_score_handles) scorer_.Drop(handle);
  for (const PageCopy& copy : plan.page_copies) storage_->CopyPage(copy.source, copy.destination);
  SequenceOutcome outcome;
  outcome.weight_epoch = weight_epoch_;
  result->sequences.assign(plan.sequences.size(), outcome);
  result->finished_scores.clear();

  BuildTargetBatch(plan);
  if (target_batch_.num_rows() > 0) {
    BEBOP_CHECK(target_batch_.num_rows() <= options_.max_step_tokens);
    model_->ForwardTarget(target_batch_.tokens(), target_batch_.View(), storage_->state(),
                          Hidden(hidden_, target_batch_.num_rows()));
  }
  VerifyAll(plan, result);
  ExtendMtp(plan, *result);
  Draft(plan, result);

  for (size_t i = 0; i < plan.scores.size(); ++i) {
    const ScorePlan& score = plan.scores[i];
    if (score.draft_phase) {
      scorer_.AddDraftBases(score);
    } else {
      scorer_.AddTargetRows(score, Hidden(hidden_, target_batch_.num_rows()).Rows(score_first_row_[i], score.end - score.begin));
    }
    if (score.last) result->finished_scores.push_back(scorer_.Take(score.handle));
  }
  return absl::OkStatus();
}

void ModelExecutor::BuildTargetBatch(const StepPlan& plan) {
  target_batch_.Clear();
  score_first_row_.clear();
  sequence_first_row_.clear();
  for (const ScorePlan& score : plan.scores) {
    score_first_row_.push_back(target_batch_.num_rows());
    if (score.draft_phase) continue;
    target_batch_.AddSequence(score.begin, score.pages);
    for (int32_t t = score.begin; t < score.end; ++t) target_batch_.AddRow(score.request->token_ids[t]);
    SequenceRows& rows = target_batch_.last_sequence();
    rows.state_src = score.state_src;
    rows.state_dst = score.state_dst;
  }
  for (const SequencePlan& sequence : plan.sequences) {
    sequence_first_row_.push_back(target_batch_.num_rows());
    target_batch_.AddSequence(sequence.num_computed, sequence.pages);
    for (const uint32_t token : sequence.known_tokens) target_batch_.AddRow(token);
    for (int32_t i = 0; i < sequence.num_drafts; ++i) target_batch_.AddRow(slots_[sequence.slot].tokens[i]);
    SequenceRows& rows = target_batch_.last_sequence();
    rows.num_known_rows = static_cast<int32_t>(sequence.known_tokens.size());
    rows.num_replay_rows = sequence.num_replay;
    rows.state_src = sequence.state_src;
    rows.state_dst = sequence.state_dst;
  }
}

void ModelExecutor::VerifyAll(const StepPlan& plan, StepResult* result) {
  block_.clear();
  block_first_row_.clear();
  logit_row_.clear();
  for (size_t i = 0; i < plan.sequences.size(); ++i) {
    const SequencePlan& sequence = plan.sequences[i];
    if (!sequence.sample) continue;
    const int32_t num_rows = sequence.num_drafts + 1;
    if (static_cast<int32_t>(logit_row_.size()) + num_rows > logit_rows_) VerifyBlock(plan, result);
    block_.push_back(i);
    block_first_row_.push_back(static_cast<int32_t>(logit_row_.size()));
    for (int32_t row = 0; row < num_rows; ++row) logit_row_.push_back({i, row});
  }
  VerifyBlock(plan, result);
}

TensorView ModelExecutor::Logits(int64_t rows) {
  const TensorView logits = FloatMatrix(logits_.data(), rows, config_.vocab_size);
  model_->Logits(Hidden(gathered_, rows), logits);
  return logits;
}

void ModelExecutor::VerifyBlock(const StepPlan& plan, StepResult* result) {
  if (block_.empty()) return;
  const int64_t width = config_.hidden_size;
  for (size_t i = 0; i < logit_row_.size(); ++i) {
    const size_t sequence_idx = logit_row_[i].sequence_idx;
    const int32_t last_known = static_cast<int32_t>(plan.sequences[sequence_idx].known_tokens.size()) - 1;
    const int64_t row = sequence_first_row_[sequence_idx] + last_known + logit_row_[i].row_in_sequence;
    std::copy_n(hidden_.data() + row * width, width, gathered_.data() + i * width);
  }
  Logits(static_cast<int64_t>(logit_row_.size()));
  pool_->ParallelFor(static_cast<int64_t>(logit_row_.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      TransformRow(plan.sequences[logit_row_[i].sequence_idx], logit_row_[i].row_in_sequence, static_cast<int32_t>(i));
    }
  });
  pool_->ParallelFor(static_cast<int64_t>(block_.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      VerifySequence(plan.sequences[block_[i]], block_first_row_[i], &result->sequences[block_[i]]);
    }
  });
  block_.clear();
  block_first_row_.clear();
  logit_row_.clear();
}

namespace {

// The processed distribution of one row: the request's transform, with end-of-sequence and stop ids banned while output number
// `output_idx` is below min_new_tokens. Target and draft rows get exactly the same.
void TransformFor(const SequencePlan& sequence, int32_t output_idx, const float* logits, int32_t vocab_size, float* scratch,
                  TokenDistribution* out) {
  const SamplingParams& sampling = sequence.request->sampling;
  TransformArgs args;
  args.logits = logits;
  args.vocab_size = vocab_size;
  args.temperature = sampling.temperature;
  args.top_k = sampling.top_k;
  args.top_p = sampling.top_p;
  args.min_p = sampling.min_p;
  if (output_idx < sequence.request->stopping.min_new_tokens) args.banned_ids = sequence.banned_before_min;
  args.want_raw_lse = sequence.request->output.raw_logprobs;
  args.scratch = scratch;
  // A greedy row is judged by its argmax alone; what is reported about it is temperature 1 without truncation.
  const OutputParams& output = sequence.request->output;
  const bool reports = output.logprobs || output.entropy || output.draft_logprobs;
  cpu::Transform(reports ? ReportTransformArgs(args) : args, out);
}

}  // namespace

void ModelExecutor::TransformRow(const SequencePlan& sequence, int32_t row_in_sequence, int32_t logit_row) {
  const int64_t offset = static_cast<int64_t>(logit_row) * config_.vocab_size;
  TransformFor(sequence, sequence.num_output + row_in_sequence, logits_.data() + offset, config_.vocab_size,
               scratch_.data() + offset, &target_rows_[logit_row]);
}

void ModelExecutor::VerifySequence(const SequencePlan& sequence, int32_t first_logit_row, SequenceOutcome* outcome) {
  const GenerateRequest& request = *sequence.request;
  const bool greedy = request.sampling.greedy();
  const DraftSlot& slot = slots_[sequence.slot];
  const int64_t first_draft_row = static_cast<int64_t>(sequence.slot) * options_.max_draft_tokens;
  VerifyArgs args;
  args.mode = request.speculation.mode;
  args.greedy = greedy;
  args.drafts = {slot.tokens, static_cast<size_t>(sequence.num_drafts)};
  args.target = {target_rows_.data() + first_logit_row, static_cast<size_t>(sequence.num_drafts) + 1};
  if (sequence.num_drafts > 0) args.draft = {draft_rows_.data() + first_draft_row, static_cast<size_t>(sequence.num_drafts)};
  args.synthetic_acceptance = request.speculation.synthetic_acceptance;
  PhiloxDraws draws(KeyAt(sequence, FirstEmittedPosition(sequence)));
  const VerifyOutcome verified = Verify(args, draws);

  outcome->num_emitted = verified.num_emitted;
  outcome->num_accepted = verified.num_accepted;
  outcome->num_reached = verified.num_reached;
  outcome->non_finite = verified.non_finite;
  if (request.output.spec_detail) {
    for (int32_t i = 0; i < verified.num_reached; ++i) {
      outcome->overlap[i] =
          ExpectedAcceptance(request.speculation.mode, greedy, args.drafts[i], args.target[i], args.draft[i]);
    }
  }
  for (int32_t i = 0; i < verified.num_emitted; ++i) {
    const TokenDistribution& target = args.target[i];
    const uint32_t token = verified.tokens[i];
    outcome->tokens[i] = token;
    outcome->source[i] = verified.source[i];
    if (request.output.logprobs) outcome->logprob[i] = static_cast<float>(LogProb(target, token));
    if (request.output.entropy) outcome->entropy[i] = static_cast<float>(cpu::Entropy(target));
    if (request.output.raw_logprobs) {
      const float* logits = logits_.data() + (static_cast<int64_t>(first_logit_row) + i) * config_.vocab_size;
      outcome->raw_logprob[i] = static_cast<float>(RawLogProb(target, logits, token));
    }
    if (request.output.draft_logprobs) {
      outcome->draft_logprob[i] = i < sequence.num_drafts && args.draft[i].finite
                                      ? static_cast<float>(LogProb(args.draft[i], token))
                                      : std::numeric_limits<float>::quiet_NaN();
    }
  }
}

void ModelExecutor::ExtendMtp(const StepPlan& plan, const StepResult& result) {
  mtp_batch_.Clear();
  extend_last_row_.assign(plan.sequences.size(), -1);
  const int64_t width = config_.hidden_size;
  for (size_t i = 0; i < plan.sequences.size(); ++i) {
    const SequencePlan& sequence = plan.sequences[i];
    const SequenceOutcome& outcome = result.sequences[i];
    if (!sequence.keep_mtp || outcome.non_finite) continue;
    // Certain rows: the known ones and the accepted drafts. Row t goes in with the token at t + 1; the last row needs the token that was
    // just emitted, or the next one of the prompt.
    const int32_t num_known = static_cast<int32_t>(sequence.known_tokens.size());
    const bool next_is_known = sequence.sample || !sequence.next_known_token.empty();
    const int32_t num_certain = num_known + outcome.num_accepted - (next_is_known ? 0 : 1);
    if (num_certain <= 0) continue;
    const int32_t first_row = mtp_batch_.num_rows();
    mtp_batch_.AddSequence(sequence.num_computed + 1, sequence.pages);
    for (int32_t row = 0; row < num_certain; ++row) {
      const int32_t next = row + 1;
      if (next < num_known) {
        mtp_batch_.AddRow(sequence.known_tokens[next]);
      } else if (sequence.sample) {
        mtp_batch_.AddRow(outcome.tokens[next - num_known]);
      } else {
        mtp_batch_.AddRow(sequence.next_known_token.front());
      }
    }
    std::copy_n(hidden_.data() + sequence_first_row_[i] * width, num_certain * width, mtp_input_.data() + first_row * width);
    extend_last_row_[i] = first_row + num_certain - 1;
  }
  const int32_t rows = mtp_batch_.num_rows();
  if (rows == 0) return;
  model_->ForwardMtp(mtp_batch_.tokens(), mtp_batch_.View(), Hidden(mtp_input_, rows), storage_->state(), nullptr,
                     Hidden(mtp_hidden_, rows));
}

void ModelExecutor::Draft(const StepPlan& plan, StepResult* result) {
  const int64_t width = config_.hidden_size;
  drafting_.clear();
  for (size_t i = 0; i < plan.sequences.size(); ++i) {
    const SequencePlan& sequence = plan.sequences[i];
    const SequenceOutcome& outcome = result->sequences[i];
    if (sequence.num_drafts_next == 0 || extend_last_row_[i] < 0) continue;
    std::copy_n(mtp_hidden_.data() + extend_last_row_[i] * width, width, draft_hidden_.data() + drafting_.size() * width);
    // Drafts follow the last token known: the one just emitted, or, where a recompute restores lost drafts, next_known_token.
    const int32_t num_last = sequence.sample ? outcome.num_emitted : 1;
    drafting_.push_back({i, static_cast<int32_t>(FirstEmittedPosition(sequence)) + num_last});
  }
  for (int32_t depth = 0; !drafting_.empty(); ++depth) {
    // Distributions and draws, at most logit_rows_ sequences at a time.
    for (size_t begin = 0; begin < drafting_.size(); begin += logit_rows_) {
      const size_t count = std::min<size_t>(logit_rows_, drafting_.size() - begin);
      std::copy_n(draft_hidden_.data() + begin * width, count * width, gathered_.data());
      Logits(static_cast<int64_t>(count));
      pool_->ParallelFor(static_cast<int64_t>(count), 1, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          const Drafting& drafting = drafting_[begin + i];
          const SequencePlan& sequence = plan.sequences[drafting.sequence_idx];
          SequenceOutcome& outcome = result->sequences[drafting.sequence_idx];
          TokenDistribution& draft =
              draft_rows_[static_cast<int64_t>(sequence.slot) * options_.max_draft_tokens + depth];
          TransformFor(sequence, sequence.num_output + outcome.num_emitted + depth, logits_.data() + i * config_.vocab_size,
                       config_.vocab_size, scratch_.data() + i * config_.vocab_size, &draft);
          if (!draft.finite) continue;  // no further drafts for this sequence
          PhiloxDraws draws(KeyAt(sequence, static_cast<uint32_t>(drafting.first_position)));
          slots_[sequence.slot].tokens[depth] =
              DrawDraft(sequence.request->speculation.mode, sequence.request->sampling.greedy(), draft, depth, draws);
          outcome.num_drafts_made = depth + 1;
        }
      });
    }
    // The next recurrent step, for the sequences that want more: the MTP layer's own output and the token just drafted.
    mtp_batch_.Clear();
    size_t kept = 0;
    for (size_t i = 0; i < drafting_.size(); ++i) {
      const Drafting drafting = drafting_[i];
      const SequencePlan& sequence = plan.sequences[drafting.sequence_idx];
      const int32_t made = result->sequences[drafting.sequence_idx].num_drafts_made;
      if (made != depth + 1 || made >= sequence.num_drafts_next) continue;
      mtp_batch_.AddSequence(drafting.first_position + depth, sequence.pages);
      mtp_batch_.AddRow(slots_[sequence.slot].tokens[depth]);
      std::copy_n(draft_hidden_.data() + i * width, width, mtp_input_.data() + kept * width);
      drafting_[kept++] = drafting;
    }
    drafting_.resize(kept);
    if (kept == 0) return;
    model_->ForwardMtp(mtp_batch_.tokens(), mtp_batch_.View(), Hidden(mtp_input_, kept), storage_->state(), nullptr,
                       Hidden(draft_hidden_, kept));
  }
}

}  // namespace bebop
