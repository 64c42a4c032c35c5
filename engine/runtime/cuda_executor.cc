// SPDX-License-Identifier: Apache-2.0
#include "engine/runtime/cuda_executor.h"

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/runtime/batch_builder.h"
#include "engine/runtime/device_batch.h"
#include "engine/runtime/iteration_graphs.h"
#include "engine/runtime/record_ring.h"
#include "engine/runtime/scorer.h"
#include "engine/runtime/staging.h"
#include "kernels/common/check.h"
#include "kernels/common/cuda_stream.h"
#include "kernels/decode/decode.h"
#include "kernels/sampling/sampling.h"

namespace bebop {
namespace {

static_assert(kMaxDecodeDrafts == kMaxDraftTokens);
static_assert(static_cast<int>(SpeculationMode::kOff) == static_cast<int>(VerifyRule::kOff) &&
              static_cast<int>(SpeculationMode::kTargetOnly) == static_cast<int>(VerifyRule::kTargetOnly) &&
              static_cast<int>(SpeculationMode::kRejection) == static_cast<int>(VerifyRule::kRejection) &&
              static_cast<int>(SpeculationMode::kCoupled) == static_cast<int>(VerifyRule::kCoupled));

// Scores of one target pass: enough to fill a pass with short ones.
constexpr int32_t kMaxScoresPerPass = 64;

uint32_t RecordFlagsOf(const OutputParams& output) {
  return (output.logprobs ? kRecordLogprob : 0u) | (output.raw_logprobs ? kRecordRawLogprob : 0u) |
         (output.entropy ? kRecordEntropy : 0u) | (output.draft_logprobs ? kRecordDraftLogprob : 0u) |
         (output.spec_detail ? kRecordOverlap : 0u);
}

// Everything in device memory but what Scorer, Staging and the score batch have.
struct DeviceArrays {
  SlotArrays slots;
  PassArrays pass;                 // of decode passes, at their largest; prefill passes share what the device alone fills
  int32_t* slot_of_row = nullptr;  // [S] the batch of the iteration enqueued last
  char* hidden = nullptr;          // [max_step_tokens, H] of the target, post-norm
  char* mtp_hidden = nullptr;      // [max_step_tokens, H] of the extend pass
  char* draft_hidden[2] =
      {};  // [S, H] rows that the next draft is drawn from, and the MTP layer's next; [0] also the judged rows of a prefill pass
  void* scratch = nullptr;  // of TransformRows
};

struct DevicePart {
  const char* what;
  int64_t bytes;
  void** address;
};

int32_t MaxPages(const CudaExecutorOptions& options) {
  return (options.max_model_len + options.max_draft_tokens + options.page_tokens - 1) / options.page_tokens;
}

// The arrays, their sizes and where their addresses go: the one list that sizes and allocates.
std::vector<DevicePart> PartsOf(const ModelConfig& config, const CudaExecutorOptions& options, DType activation_dtype,
                                DeviceArrays* arrays) {
  const int64_t num_slots = options.max_num_seqs, num_drafts = options.max_draft_tokens, vocab = config.vocab_size;
  const int64_t rows = num_slots * (num_drafts + 1), step_rows = options.max_step_tokens;
  const int64_t blocks = NumSamplingBlocks(config.vocab_size);
  const int64_t hidden_bytes = config.hidden_size * ElementBytes(activation_dtype);
  std::vector<DevicePart> parts;
  const auto add = [&parts](const char* what, int64_t count, auto** address, int64_t bytes_each) {
    if (count > 0) parts.push_back({what, count * bytes_each, reinterpret_cast<void**>(address)});
  };
  const auto typed = [&add](const char* what, int64_t count, auto** address) { add(what, count, address, sizeof(**address)); };
  SlotArrays& slots = arrays->slots;
  typed("slot requests", num_slots, &slots.requests);
  typed("slot states", num_slots, &slots.states);
  typed("stop ids", num_slots * kMaxStopIds, &slots.stop_ids);
  typed("banned ids", num_slots * kMaxBannedIds, &slots.banned_ids);
  typed("page tables", num_slots * MaxPages(options), &slots.page_ids);
  typed("draft logits", num_slots * num_drafts * vocab, &slots.draft_logits);
  typed("draft rows", num_slots * num_drafts, &slots.draft_rows);
  typed("draft rows", num_slots * num_drafts * blocks, &slots.draft_block_sums);
  PassArrays& pass = arrays->pass;
  typed("pass sequences", num_slots, &pass.sequences);
  typed("target rows", num_slots, &pass.rows);
  typed("target rows", rows, &pass.token_ids);
  typed("target rows", rows, &pass.row_sequence);
  typed("target rows", rows, &pass.row_position);
  typed("judged rows", rows, &pass.judged_row);
  typed("judged rows", rows, &pass.judged_sequence);
  typed("logits", rows * vocab, &pass.logits);
  typed("judged rows", rows, &pass.target_rows);
  typed("judged rows", rows * blocks, &pass.target_block_sums);
  typed("MTP rows", num_slots, &pass.mtp_rows);
  typed("MTP rows", step_rows, &pass.mtp_token_ids);
  typed("MTP rows", step_rows, &pass.mtp_row_sequence);
  typed("MTP rows", step_rows, &pass.mtp_row_position);
  typed("MTP rows", num_slots, &pass.draft_from_row);
  typed("step records", num_slots, &pass.records);
  typed("batch", num_slots, &arrays->slot_of_row);
  add("hidden states", step_rows, &arrays->hidden, hidden_bytes);
  add("hidden states", num_slots, &arrays->draft_hidden[0], hidden_bytes);
  if (num_drafts > 0) {
    add("hidden states", step_rows, &arrays->mtp_hidden, hidden_bytes);
    add("hidden states", num_slots, &arrays->draft_hidden[1], hidden_bytes);
  }
  add("sampling scratch", 1, &arrays->scratch, TransformScratchBytes(static_cast<int32_t>(rows), config.vocab_size));
  return parts;
}

// Staged writes of a sequence that moves in, at most: its request, state, two lists of ids and page table with its length.
constexpr int32_t kWritesPerSlot = 6;

int64_t StagedBytes(const CudaExecutorOptions& options) {
  const int64_t slot_bytes =
      static_cast<int64_t>(sizeof(SlotRequest) + sizeof(SlotState) + sizeof(PassSequence) + sizeof(SequenceRows)) +
      4 * (kMaxStopIds + kMaxBannedIds + int64_t{MaxPages(options)} + 2 + 2 * 2);
  return options.max_num_seqs * slot_bytes + 3 * 4 * int64_t{options.max_step_tokens};
}

int64_t ScorePageEntries(const CudaExecutorOptions& options) { return 4 * int64_t{MaxPages(options)}; }

}  // namespace

absl::Status CheckCudaExecutorOptions(const ModelConfig& config, const CudaExecutorOptions& options,
                                      int64_t workspace_bytes) {
  const auto check = [](const char* name, int64_t value, int64_t low, int64_t high) {
    if (value >= low && value <= high) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat(name, ": ", value, " is outside [", low, ", ", high, "]"));
  };
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  BEBOP_RETURN_IF_ERROR(check("max_draft_tokens", options.max_draft_tokens, 0, config.num_mtp_layers > 0 ? kMaxDraftTokens : 0));
  BEBOP_RETURN_IF_ERROR(check("max_num_seqs", options.max_num_seqs, 1, kMaxDecodeRows));
  BEBOP_RETURN_IF_ERROR(
      check("max_step_tokens", options.max_step_tokens, int64_t{options.max_num_seqs} * (options.max_draft_tokens + 1), kMost));
  BEBOP_RETURN_IF_ERROR(
      check("end-of-sequence ids", static_cast<int64_t>(config.eos_token_ids.size()), 0, kMaxBannedIds - kMaxStopTokenIds));
  BEBOP_RETURN_IF_ERROR(check("page_tokens", options.page_tokens, 1, 1 << 16));
  BEBOP_RETURN_IF_ERROR(check("max_model_len", options.max_model_len, 1, 1 << 24));
  BEBOP_RETURN_IF_ERROR(check("shortest_class", options.shortest_class, 1, 1 << 24));
  // Page tables are indexed by 32 bits.
  BEBOP_RETURN_IF_ERROR(
      check("max_num_seqs x pages of max_model_len", int64_t{options.max_num_seqs} * MaxPages(options), 1, kMost));
  const int64_t decode_rows = int64_t{options.max_num_seqs} * (options.max_draft_tokens + 1);
  BEBOP_RETURN_IF_ERROR(check("max_num_seqs x (max_draft_tokens + 1)", decode_rows, 1, kMaxDecodeRows));
  BEBOP_RETURN_IF_ERROR(check("vocab_size", config.vocab_size, 1, kMaxDecodeVocabSize));
  const int64_t verify_bytes = VerifyScratchBytes(options.max_num_seqs, options.max_draft_tokens, config.vocab_size);
  if (verify_bytes > workspace_bytes) {
    return absl::ResourceExhaustedError(absl::StrCat("max_num_seqs: ", options.max_num_seqs, " sequences with ",
                                                     options.max_draft_tokens, " drafts take ", verify_bytes,
                                                     " bytes to verify, and the workspace has ", workspace_bytes,
                                                     ": lower max_num_seqs"));
  }
  return absl::OkStatus();
}

// One instance serves one engine; not thread safe: the engine thread.
//
// Numbers of a step, for n sequences: the host's own work is a comparison of page table lengths and the translation of n records;
// the device gets at most one copy and one launch of changes, one graph and one launch that publishes.
class CudaExecutor final : public Executor {
 public:
  static absl::StatusOr<std::unique_ptr<Executor>> Create(const ModelConfig& config, const CudaExecutorOptions& options,
                                                          Model* model, ModelStateStorage* storage, DeviceMemory* memory,
                                                          cuda::Stream* stream);
  ~CudaExecutor() override;

  absl::Status Execute(const StepPlan& plan, StepResult* result) override;
  absl::Status SetWeights(const ModelWeights* weights, int64_t epoch) override;
  absl::Status Quiesce() override;

 private:
  // What the host knows about a slot in device memory.
  struct Slot {
    uint64_t residency = 0;        // of the sequence there; 0: none yet
    int32_t num_pages = 0;         // of its page table there
    int32_t num_draft_tokens = 0;  // γ of its request; 0 when it does not draft
    bool decodes = false;          // the device has its last token: an iteration can run it
    int32_t num_in_flight = 0;     // passes enqueued for it whose records have not been read
    // Its pass that has run and that no plan has asked for yet: in the ring within a step, else in `kept`. Null: none.
    const StepRecord* record = nullptr;
    StepRecord kept;
    int64_t record_epoch = 0;  // of the weights that the pass ran with
  };
  // Bounds of a pass that are not in PassArrays.
  struct PassBounds {
    int32_t max_sequence_rows = 0;
    int32_t max_positions = 0;
    bool judged_rows_are_target_rows = false;  // every row of a decode pass
    bool extends_mtp = false;
  };

  CudaExecutor(const ModelConfig& config, const CudaExecutorOptions& options, Model* model, ModelStateStorage* storage,
               DeviceMemory* memory, cuda::Stream* stream);

  Slot& SlotOf(const SequencePlan& sequence) { return slots_[static_cast<size_t>(sequence.slot)]; }
  bool IsDecode(const SequencePlan& sequence) {
    return sequence.sample && sequence.known_tokens.size() == 1 && SlotOf(sequence).decodes;
  }
  void UpdateSlot(const SequencePlan& sequence);
  void MoveIn(const SequencePlan& sequence, Slot* slot);
  // Fills chunk_pass_ with the prefill chunks of the plan, in staged memory.
  void StageChunks(const StepPlan& plan);
  void EnqueueChunks(const StepPlan& plan);
  // One iteration of the slots in batch_.
  void EnqueueIteration(int32_t needed_positions);
  // All launches of a pass whose arrays are set, up to its records.
  void EnqueuePass(const PassArrays& pass, const PassBounds& bounds);
  void Publish(const PassArrays& pass, int32_t max_positions);
  absl::Status RunScores(const StepPlan& plan, StepResult* result);
  void PlanAhead(const StepPlan& plan);
  // Waits for all that was enqueued, and reads its records.
  absl::Status Settle();
  // Reads the records of all passes up to `number`.
  absl::Status Read(uint64_t number);
  absl::Status Collect(const StepPlan& plan, StepResult* result, uint64_t last_of_step);
  void Translate(const SequencePlan& sequence, const Slot& slot, SequenceOutcome* outcome) const;
  // Copies records that nobody asked for out of the ring, whose entries come to be used again.
  void KeepRecords();

  TensorView Hidden(char* data, int64_t rows) const {
    return {data, model_->activation_dtype(), rows, config_.hidden_size, config_.hidden_size};
  }
  // Positions that a row of the sequence's next pass, and of the `passes` iterations from it on, may come to.
  int32_t PositionsAfter(const SequencePlan& sequence, int32_t passes) {
    const int32_t num_drafts = SlotOf(sequence).num_draft_tokens;
    const int32_t first = sequence.num_computed + static_cast<int32_t>(sequence.known_tokens.size()) + sequence.num_drafts;
    return first + (passes - 1) * (1 + num_drafts) + std::max(num_drafts, 1);
  }

  const ModelConfig config_;
  const CudaExecutorOptions options_;
  const int32_t most_positions_;
  Model* const model_;
  ModelStateStorage* const storage_;
  DeviceMemory* const memory_;
  cuda::Stream& stream_;

  ThreadPool own_pool_{1};
  Scorer scorer_;
  BatchBuilder score_batch_;
  std::unique_ptr<DeviceBatch> device_score_batch_;
  DeviceArrays device_;
  std::vector<std::shared_ptr<void>> device_memory_;
  std::unique_ptr<Staging> staging_;
  std::unique_ptr<RecordRing> ring_;
  IterationGraphs graphs_;

  std::vector<Slot> slots_;           // [max_num_seqs]
  std::vector<int32_t> slot_of_row_;  // what the device's slot_of_row holds
  std::vector<int32_t> batch_;        // slots of the iteration that is being enqueued
  std::vector<size_t> chunks_;        // indexes into plan.sequences
  PassArrays chunk_pass_;
  PassBounds chunk_bounds_;
  std::vector<size_t> waiting_;                       // of plan.sequences, without a record yet
  uint64_t read_ = 0;                                 // passes whose records have been read
  uint64_t kept_up_to_ = 0;                           // passes whose unasked records are out of the ring
  int32_t max_positions_[RecordRing::kEntries] = {};  // that the passes in the ring were launched for
  int64_t weight_epoch_ = 0;                          // of the passes that are enqueued now, and of all whose records are unread
};

absl::StatusOr<std::unique_ptr<Executor>> MakeCudaExecutor(const ModelConfig& config, const CudaExecutorOptions& options,
                                                           Model* model, ModelStateStorage* storage, DeviceMemory* memory,
                                                           cuda::Stream* stream) {
  return CudaExecutor::Create(config, options, model, storage, memory, stream);
}

int64_t CudaExecutorBytes(const ModelConfig& config, const CudaExecutorOptions& options) {
  DeviceArrays arrays;
  int64_t bytes = Staging::Bytes(StagedBytes(options), kWritesPerSlot * options.max_num_seqs) +
                  DeviceBatch::Bytes(options.max_step_tokens, kMaxScoresPerPass, ScorePageEntries(options));
  for (const DevicePart& part : PartsOf(config, options, DType::kFloat32, &arrays)) bytes += part.bytes;
  return bytes;
}

CudaExecutor::CudaExecutor(const ModelConfig& config, const CudaExecutorOptions& options, Model* model,
                           ModelStateStorage* storage, DeviceMemory* memory, cuda::Stream* stream)
    : config_(config),
      options_(options),
      most_positions_(MaxPages(options) * options.page_tokens),
      model_(model),
      storage_(storage),
      memory_(memory),
      stream_(*stream),
      scorer_(config, options.max_step_tokens, MaxPages(options), model, &storage->state(), memory,
              options.pool != nullptr ? options.pool : &own_pool_),
      graphs_(options.graphs, stream),
      slots_(static_cast<size_t>(options.max_num_seqs)),
      slot_of_row_(static_cast<size_t>(options.max_num_seqs), -1) {
  batch_.reserve(slots_.size());
  chunks_.reserve(slots_.size());
  waiting_.reserve(slots_.size());
  score_batch_.Reserve(options.max_step_tokens, kMaxScoresPerPass, ScorePageEntries(options));
}

absl::StatusOr<std::unique_ptr<Executor>> CudaExecutor::Create(const ModelConfig& config, const CudaExecutorOptions& options,
                                                               Model* model, ModelStateStorage* storage, DeviceMemory* memory,
                                                               cuda::Stream* stream) {
  BEBOP_RETURN_IF_ERROR(CheckCudaExecutorOptions(config, options, stream->workspace_bytes()));
  std::unique_ptr<CudaExecutor> executor(new CudaExecutor(config, options, model, storage, memory, stream));
  for (const DevicePart& part : PartsOf(config, options, model->activation_dtype(), &executor->device_)) {
    BEBOP_ASSIGN_OR_RETURN(std::shared_ptr<void> allocated, memory->Allocate(part.bytes, part.what));
    *part.address = allocated.get();
    executor->device_memory_.push_back(std::move(allocated));
  }
  SlotArrays& slots = executor->device_.slots;
  slots.num_slots = options.max_num_seqs;
  slots.max_drafts = options.max_draft_tokens;
  slots.vocab_size = config.vocab_size;
  slots.max_pages = MaxPages(options);
  slots.page_tokens = options.page_tokens;
  BEBOP_ASSIGN_OR_RETURN(executor->staging_,
                         Staging::Create(StagedBytes(options), kWritesPerSlot * options.max_num_seqs, memory, stream));
  BEBOP_ASSIGN_OR_RETURN(executor->ring_, RecordRing::Create(options.max_num_seqs, memory, stream));
  BEBOP_ASSIGN_OR_RETURN(executor->device_score_batch_,
                         DeviceBatch::Create(options.max_step_tokens, kMaxScoresPerPass, ScorePageEntries(options), memory));
  BEBOP_RETURN_IF_ERROR(executor->scorer_.Reserve());
  BEBOP_RETURN_IF_ERROR(memory->status());
  return executor;
}

// What is in flight writes to memory of ours.
CudaExecutor::~CudaExecutor() { (void)cudaStreamSynchronize(stream_.handle()); }

absl::Status CudaExecutor::Execute(const StepPlan& plan, StepResult* result) {
  BEBOP_RETURN_IF_ERROR(memory_->status());
  // The ring has room for the passes of a step and one before: steps that found all they wanted kept have left more unread.
  if (ring_->last_published() > read_ + 1) BEBOP_RETURN_IF_ERROR(Read(ring_->last_published() - 1));
  KeepRecords();
  result->sequences.assign(plan.sequences.size(), SequenceOutcome{});
  result->finished_scores.clear();
  for (const uint64_t handle : plan.dropped_score_handles) scorer_.Drop(handle);
  for (const PageCopy& copy : plan.page_copies) storage_->CopyPage(copy.source, copy.destination);

  // What the device must know, and what is to be computed for this step. Sequences that ran ahead are done already, or will be
  // soon.
  staging_->Begin();
  chunks_.clear();
  batch_.clear();
  int32_t needed_positions = 0;
  for (size_t i = 0; i < plan.sequences.size(); ++i) {
    const SequencePlan& sequence = plan.sequences[i];
    UpdateSlot(sequence);
    const Slot& slot = SlotOf(sequence);
    if (!IsDecode(sequence)) {
      chunks_.push_back(i);
    } else if (slot.num_in_flight == 0 && slot.record == nullptr) {
      batch_.push_back(sequence.slot);
      needed_positions = std::max(needed_positions, PositionsAfter(sequence, 1));
    }
  }
  if (!chunks_.empty()) StageChunks(plan);
  staging_->Upload();
  if (!chunks_.empty()) EnqueueChunks(plan);
  if (!batch_.empty()) EnqueueIteration(needed_positions);
  // Scores wait for the device. The iteration ahead comes after them, so that the device has something to do while the host
  // plans.
  if (!plan.scores.empty()) BEBOP_RETURN_IF_ERROR(RunScores(plan, result));
  const uint64_t last_of_step = ring_->last_published();
  PlanAhead(plan);
  BEBOP_RETURN_IF_ERROR(Collect(plan, result, last_of_step));
  staging_->End();
  return memory_->status();
}

// ---- Between two steps ----

absl::Status CudaExecutor::Settle() {
  BEBOP_RETURN_IF_ERROR(memory_->status());
  return Read(ring_->last_published());
}

// A pass reads weights before it publishes, so once all records are here nobody reads the previous weights; and each record has the epoch
// that ends here. The graphs hold the previous weights' addresses (ADR 6).
absl::Status CudaExecutor::SetWeights(const ModelWeights* weights, int64_t epoch) {
  BEBOP_CHECK(epoch >= weight_epoch_);
  BEBOP_RETURN_IF_ERROR(Settle());
  graphs_.Invalidate();
  model_->SetWeights(weights);
  weight_epoch_ = epoch;
  return memory_->status();
}

absl::Status CudaExecutor::Quiesce() {
  BEBOP_RETURN_IF_ERROR(Settle());
  BEBOP_CUDA_TRY(stream_, cudaStreamSynchronize(stream_.handle()));  // copies of pages come after the last pass
  // Nothing else keeps addresses of caches or weights: passes look them up, and the plans of products depend on shapes alone. Whoever
  // comes next has a residency of its own, which brings its page table along and leaves all records behind.
  graphs_.Clear();
  return memory_->status();
}

// ---- What the device knows ----

void CudaExecutor::UpdateSlot(const SequencePlan& sequence) {
  Slot& slot = SlotOf(sequence);
  if (slot.residency != sequence.residency) MoveIn(sequence, &slot);
  // A page table only grows while its sequence stays.
  const int32_t num_pages = static_cast<int32_t>(sequence.pages.size());
  BEBOP_CHECK(slot.num_pages <= num_pages && num_pages <= device_.slots.max_pages);
  if (slot.num_pages == num_pages) return;
  int32_t* const table = device_.slots.page_ids + int64_t{sequence.slot} * device_.slots.max_pages;
  staging_->Write(table + slot.num_pages, sequence.pages.data() + slot.num_pages, int64_t{num_pages - slot.num_pages} * 4);
  staging_->Write(&device_.slots.states[sequence.slot].num_pages, &num_pages, sizeof(num_pages));
  slot.num_pages = num_pages;
}

void CudaExecutor::MoveIn(const SequencePlan& sequence, Slot* slot) {
  const GenerateRequest& request = *sequence.request;
  SlotRequest there;
  there.seed = sequence.seed;
  there.sample_index = sequence.sample_index;
  there.rule = static_cast<VerifyRule>(request.speculation.mode);
  there.temperature = request.sampling.temperature;
  there.top_p = request.sampling.top_p;
  there.min_p = request.sampling.min_p;
  there.top_k = request.sampling.top_k;
  there.num_draft_tokens = sequence.keep_mtp ? request.speculation.num_draft_tokens : 0;
  there.max_new_tokens = request.stopping.max_new_tokens;
  there.min_new_tokens = request.stopping.min_new_tokens;
  there.record = RecordFlagsOf(request.output);
  if (sequence.stop_ids.size() <= kMaxStopIds) there.num_stop_ids = static_cast<int32_t>(sequence.stop_ids.size());
  BEBOP_CHECK(sequence.banned_before_min.size() <= kMaxBannedIds);
  there.num_banned_ids = static_cast<int32_t>(sequence.banned_before_min.size());
  there.synthetic_acceptance = request.speculation.synthetic_acceptance;

  SlotState state;
  state.residency = sequence.residency;
  state.stopped = 0;
  state.num_computed = sequence.num_computed;
  state.num_replay = sequence.num_replay;
  state.num_output = sequence.num_output;
  // Iterations go on from the sequence's own slot; only its first pass, which the host describes, may read another's.
  state.state_src = state.state_dst = sequence.state_dst;

  const SlotArrays& slots = device_.slots;
  staging_->Write(&slots.requests[sequence.slot], &there, sizeof(there));
  // Without num_pages: that word has its own write (UpdateSlot), and one step's writes must not overlap.
  static_assert(offsetof(SlotState, num_pages) + sizeof(int32_t) + alignof(SlotState) > sizeof(SlotState));
  staging_->Write(&slots.states[sequence.slot], &state, offsetof(SlotState, num_pages));
  staging_->Write(slots.stop_ids + int64_t{sequence.slot} * kMaxStopIds, sequence.stop_ids.data(),
                  int64_t{there.num_stop_ids} * 4);
  staging_->Write(slots.banned_ids + int64_t{sequence.slot} * kMaxBannedIds, sequence.banned_before_min.data(),
                  int64_t{there.num_banned_ids} * 4);
  *slot = Slot{};
  slot->residency = sequence.residency;
  slot->num_draft_tokens = there.num_draft_tokens;
}

// ---- Passes ----

void CudaExecutor::StageChunks(const StepPlan& plan) {
  PassArrays& pass = chunk_pass_;
  pass = device_.pass;
  pass.num_sequences = static_cast<int32_t>(chunks_.size());
  pass.num_rows = pass.num_judged = pass.num_drafts = 0;
  chunk_bounds_ = {};
  for (const size_t i : chunks_) {
    const SequencePlan& sequence = plan.sequences[i];
    BEBOP_CHECK(sequence.num_drafts == 0 && !sequence.known_tokens.empty());
    const int32_t num_known = static_cast<int32_t>(sequence.known_tokens.size());
    pass.num_rows += num_known;
    pass.num_judged += sequence.sample ? 1 : 0;
    pass.num_drafts = std::max(pass.num_drafts, sequence.num_drafts_next);
    chunk_bounds_.max_sequence_rows = std::max(chunk_bounds_.max_sequence_rows, num_known);
    chunk_bounds_.max_positions = std::max(chunk_bounds_.max_positions, PositionsAfter(sequence, 1));
    chunk_bounds_.extends_mtp = chunk_bounds_.extends_mtp || sequence.keep_mtp;
  }
  BEBOP_CHECK(pass.num_rows <= options_.max_step_tokens);

  PassSequence* const sequences = staging_->Add(pass.num_sequences, &pass.sequences);
  SequenceRows* const rows = staging_->Add(pass.num_sequences, &pass.rows);
  uint32_t* const token_ids = staging_->Add(pass.num_rows, &pass.token_ids);
  int32_t* const row_sequence = staging_->Add(pass.num_rows, &pass.row_sequence);
  int32_t* const row_position = staging_->Add(pass.num_rows, &pass.row_position);
  int32_t* const judged_row = staging_->Add(pass.num_judged, &pass.judged_row);
  int32_t* const judged_sequence = staging_->Add(pass.num_judged, &pass.judged_sequence);
  int32_t row = 0, judged = 0;
  for (int32_t b = 0; b < pass.num_sequences; ++b) {
    const SequencePlan& sequence = plan.sequences[chunks_[static_cast<size_t>(b)]];
    const int32_t num_known = static_cast<int32_t>(sequence.known_tokens.size());
    PassSequence& in = sequences[b] = PassSequence{};
    in.slot = sequence.slot;
    in.first_row = row;
    in.num_known = num_known;
    in.sample = sequence.sample ? 1 : 0;
    in.first_judged_row = judged;
    in.num_drafts_next = sequence.num_drafts_next;
    in.has_next_known = sequence.next_known_token.empty() ? 0 : 1;
    if (in.has_next_known != 0) in.next_known_token = sequence.next_known_token.front();
    SequenceRows& target = rows[b] = SequenceRows{};
    target.first_row = row;
    target.num_rows = target.num_known_rows = num_known;
    // The last token of a prompt always takes the step form: the samples of a group compute it apart from the rest, which they
    // share.
    const int32_t prompt_length = static_cast<int32_t>(sequence.request->prompt.size());
    target.num_prefill_rows = std::clamp(prompt_length - 1 - sequence.num_computed, 0, num_known);
    target.num_replay_rows = sequence.num_replay;
    target.first_position = sequence.num_computed;
    target.state_src = sequence.state_src;
    target.state_dst = sequence.state_dst;
    target.first_page = sequence.slot * device_.slots.max_pages;
    for (int32_t i = 0; i < num_known; ++i, ++row) {
      token_ids[row] = sequence.known_tokens[static_cast<size_t>(i)];
      row_sequence[row] = b;
      row_position[row] = sequence.num_computed + i;
    }
    if (!sequence.sample) continue;
    judged_row[judged] = row - 1;
    judged_sequence[judged++] = b;
  }
}

void CudaExecutor::EnqueueChunks(const StepPlan& plan) {
  EnqueuePass(chunk_pass_, chunk_bounds_);
  Publish(chunk_pass_, chunk_bounds_.max_positions);
  for (const size_t i : chunks_) {
    const SequencePlan& sequence = plan.sequences[i];
    Slot& slot = SlotOf(sequence);
    ++slot.num_in_flight;
    // The device has the last token once it has drawn it, or made drafts behind it; else the next chunk brings it along.
    slot.decodes = sequence.sample || sequence.num_drafts_next > 0;
  }
}

void CudaExecutor::EnqueueIteration(int32_t needed_positions) {
  IterationKey key;
  key.bucket = BatchBucket(static_cast<int32_t>(batch_.size()), options_.max_num_seqs);
  for (const int32_t slot : batch_) {
    key.num_drafts = std::max(key.num_drafts, slots_[static_cast<size_t>(slot)].num_draft_tokens);
    ++slots_[static_cast<size_t>(slot)].num_in_flight;
  }
  // Also with batch invariance: an invariant attention splits a row's keys by the row's position, whatever the bound is.
  key.max_positions = LengthClass(needed_positions, options_.shortest_class, most_positions_);
  batch_.resize(static_cast<size_t>(key.bucket), -1);
  if (!std::equal(batch_.begin(), batch_.end(), slot_of_row_.begin())) {
    std::copy(batch_.begin(), batch_.end(), slot_of_row_.begin());
    staging_->CopyNow(device_.slot_of_row, batch_.data(), static_cast<int64_t>(batch_.size()) * 4);
  }
  PassArrays pass = device_.pass;
  pass.num_sequences = key.bucket;
  pass.num_rows = pass.num_judged = key.bucket * (key.num_drafts + 1);
  pass.num_drafts = key.num_drafts;
  PassBounds bounds;
  bounds.max_sequence_rows = key.num_drafts + 1;
  bounds.max_positions = key.max_positions;
  bounds.judged_rows_are_target_rows = true;
  bounds.extends_mtp = key.num_drafts > 0;
  graphs_.Run(key, [&] {
    cuda::BeginDecode(device_.slots, pass, device_.slot_of_row, stream_);
    EnqueuePass(pass, bounds);
  });
  Publish(pass, bounds.max_positions);
}

void CudaExecutor::Publish(const PassArrays& pass, int32_t max_positions) {
  const uint64_t number = ring_->Publish(device_.slots, pass);
  max_positions_[number % RecordRing::kEntries] = max_positions;
}

void CudaExecutor::EnqueuePass(const PassArrays& pass, const PassBounds& bounds) {
  const ModelState& state = storage_->state();
  const SlotArrays& slots = device_.slots;
  const auto logits = [&](const TensorView& hidden, int32_t depth) {
    const TensorView rows = FloatMatrix(pass.logits, hidden.rows, config_.vocab_size);
    model_->Logits(hidden, rows);
    cuda::TransformRows({.slots = slots, .pass = pass, .draft_depth = depth, .logits = pass.logits, .scratch = device_.scratch},
                        stream_);
  };
  RaggedBatch target;
  target.num_sequences = pass.num_sequences;
  target.num_rows = pass.num_rows;
  target.sequences = pass.rows;
  target.page_ids = slots.page_ids;
  target.row_sequence = pass.row_sequence;
  target.row_position = pass.row_position;
  target.max_sequence_rows = bounds.max_sequence_rows;
  target.max_positions = bounds.max_positions;
  const TensorView hidden = Hidden(device_.hidden, pass.num_rows);
  model_->ForwardTarget(pass.token_ids, target, state, hidden);
  if (bounds.judged_rows_are_target_rows) {
    logits(hidden, -1);
  } else if (pass.num_judged > 0) {
    const TensorView judged = Hidden(device_.draft_hidden[0], pass.num_judged);
    cuda::GatherRows(hidden, pass.judged_row, judged, stream_);
    logits(judged, -1);
  }
  cuda::VerifyRows(slots, pass, stream_);
  cuda::AdvanceSlots(slots, pass, stream_);
  if (!bounds.extends_mtp) return;

  // The MTP cache over the certain rows, then one draft after the other from the last of them.
  RaggedBatch mtp = target;
  mtp.sequences = pass.mtp_rows;
  mtp.row_sequence = pass.mtp_row_sequence;
  mtp.row_position = pass.mtp_row_position;
  const TensorView mtp_hidden = Hidden(device_.mtp_hidden, pass.num_rows);
  model_->ForwardMtp(pass.mtp_token_ids, mtp, hidden, state, nullptr, mtp_hidden);
  if (pass.num_drafts == 0) return;
  mtp.num_rows = pass.num_sequences;
  mtp.max_sequence_rows = 1;
  int current = 0;
  cuda::GatherRows(mtp_hidden, pass.draft_from_row, Hidden(device_.draft_hidden[current], pass.num_sequences), stream_);
  for (int32_t depth = 0; depth < pass.num_drafts; ++depth) {
    const TensorView from = Hidden(device_.draft_hidden[current], pass.num_sequences);
    logits(from, depth);
    cuda::DrawDrafts(slots, pass, depth, stream_);
    if (depth + 1 == pass.num_drafts) break;
    current = 1 - current;
    model_->ForwardMtp(pass.mtp_token_ids, mtp, from, state, nullptr, Hidden(device_.draft_hidden[current], pass.num_sequences));
  }
}

// Scores have target passes of their own: their page tables belong to no slot.
absl::Status CudaExecutor::RunScores(const StepPlan& plan, StepResult* result) {
  size_t first = 0;
  const auto run_pass = [&](size_t end) {
    if (score_batch_.num_rows() > 0) {
      device_score_batch_->Upload(score_batch_);
      const TensorView hidden = Hidden(device_.hidden, score_batch_.num_rows());
      model_->ForwardTarget(device_score_batch_->tokens(), device_score_batch_->View(), storage_->state(), hidden);
      int32_t row = 0;
      for (size_t i = first; i < end; ++i) {
        const ScorePlan& score = plan.scores[i];
        if (score.draft_phase) continue;
        scorer_.AddTargetRows(score, hidden.Rows(row, score.end - score.begin));
        row += score.end - score.begin;
      }
    }
    first = end;
    score_batch_.Clear();
  };
  score_batch_.Clear();
  int32_t num_scores = 0;
  for (size_t i = 0; i < plan.scores.size(); ++i) {
    const ScorePlan& score = plan.scores[i];
    if (score.draft_phase) continue;
    if (num_scores == kMaxScoresPerPass ||
        score_batch_.num_page_entries() + static_cast<int64_t>(score.pages.size()) > ScorePageEntries(options_)) {
      run_pass(i);
      num_scores = 0;
    }
    ++num_scores;
    score_batch_.AddSequence(score.begin, score.pages);
    for (int32_t t = score.begin; t < score.end; ++t) score_batch_.AddRow(score.request->token_ids[static_cast<size_t>(t)]);
    SequenceRows& rows = score_batch_.last_sequence();
    rows.num_prefill_rows = rows.num_known_rows;
    rows.state_src = score.state_src;
    rows.state_dst = score.state_dst;
  }
  run_pass(plan.scores.size());
  for (const ScorePlan& score : plan.scores) {
    if (score.draft_phase) scorer_.AddDraftBases(score);
    if (score.last) result->finished_scores.push_back(scorer_.Take(score.handle));
  }
  return memory_->status();
}

// The iteration after this step's, of all sequences that surely or maybe go on: the device decides which do.
void CudaExecutor::PlanAhead(const StepPlan& plan) {
  batch_.clear();
  int32_t needed_positions = 0;
  for (const SequencePlan& sequence : plan.sequences) {
    if (!SlotOf(sequence).decodes) continue;
    // This step emits at least one token of it.
    if (sequence.sample && sequence.num_output + 1 >= sequence.request->stopping.max_new_tokens) continue;
    batch_.push_back(sequence.slot);
    needed_positions = std::max(needed_positions, PositionsAfter(sequence, 2));
  }
  if (!batch_.empty()) EnqueueIteration(needed_positions);
}

// ---- Results ----

absl::Status CudaExecutor::Read(uint64_t number) {
  while (read_ < number) {
    BEBOP_RETURN_IF_ERROR(ring_->Wait(read_ + 1));
    ++read_;
    const StepRecord* const records = ring_->Records(read_);
    for (int32_t b = 0; b < ring_->num_records(read_); ++b) {
      const StepRecord& record = records[b];
      if (record.slot < 0) continue;
      BEBOP_CHECK(record.slot < options_.max_num_seqs);
      Slot& slot = slots_[static_cast<size_t>(record.slot)];
      if (slot.residency != record.residency) continue;  // of a sequence that has gone
      --slot.num_in_flight;
      if (record.ran == 0) continue;  // stopped, or out of pages
      // Attention was launched for no fewer positions than the rows and the drafts behind them came to.
      const int32_t num_certain = record.num_known + record.num_accepted;
      BEBOP_CHECK(record.num_computed + std::max(record.num_known + record.num_drafts, num_certain + record.num_drafts_made) <=
                  max_positions_[read_ % RecordRing::kEntries]);
      BEBOP_CHECK(slot.record == nullptr && slot.num_in_flight >= 0);
      slot.record = &record;
      slot.record_epoch = weight_epoch_;  // SetWeights reads all that was enqueued before it
    }
  }
  return absl::OkStatus();
}

// Each planned sequence takes the record of its one pass that has run and was not asked for yet.
absl::Status CudaExecutor::Collect(const StepPlan& plan, StepResult* result, uint64_t last_of_step) {
  waiting_.resize(plan.sequences.size());
  std::iota(waiting_.begin(), waiting_.end(), size_t{0});
  const auto translate_some = [&] {
    std::erase_if(waiting_, [&](size_t i) {
      Slot& slot = SlotOf(plan.sequences[i]);
      if (slot.record == nullptr) return false;
      Translate(plan.sequences[i], slot, &result->sequences[i]);
      slot.record = nullptr;
      return true;
    });
    return waiting_.empty();
  };
  if (!translate_some()) {  // the others were kept from an earlier step
    BEBOP_RETURN_IF_ERROR(Read(last_of_step));
    if (!translate_some()) {
      // An iteration ahead lacked pages, which this step's plan has brought: the next iteration was the first to run ...
      BEBOP_RETURN_IF_ERROR(Read(ring_->last_published()));
      if (!translate_some()) {
        // ... unless there was none, because the sequence surely ends in this step.
        KeepRecords();
        batch_.clear();
        int32_t needed_positions = 0;
        for (const size_t i : waiting_) {
          batch_.push_back(plan.sequences[i].slot);
          needed_positions = std::max(needed_positions, PositionsAfter(plan.sequences[i], 1));
        }
        EnqueueIteration(needed_positions);
        BEBOP_RETURN_IF_ERROR(Read(ring_->last_published()));
        BEBOP_CHECK(translate_some());  // else the plan's page table does not reach as far as step_plan.h says
      }
    }
  }
  KeepRecords();
  return absl::OkStatus();
}

void CudaExecutor::KeepRecords() {
  for (; kept_up_to_ < read_; ++kept_up_to_) {
    const StepRecord* const records = ring_->Records(kept_up_to_ + 1);
    for (int32_t b = 0; b < ring_->num_records(kept_up_to_ + 1); ++b) {
      if (records[b].slot < 0) continue;
      Slot& slot = slots_[static_cast<size_t>(records[b].slot)];
      if (slot.record != &records[b]) continue;
      slot.kept = records[b];
      slot.record = &slot.kept;
    }
  }
}

void CudaExecutor::Translate(const SequencePlan& sequence, const Slot& slot, SequenceOutcome* outcome) const {
  const StepRecord& record = *slot.record;
  // The host plans what the device did without being asked: both follow from the same state.
  BEBOP_CHECK(record.residency == sequence.residency && record.num_computed == sequence.num_computed);
  BEBOP_CHECK(record.num_known == static_cast<int32_t>(sequence.known_tokens.size()) && record.num_drafts == sequence.num_drafts);
  BEBOP_CHECK(record.num_drafts_made <= sequence.num_drafts_next);
  outcome->num_emitted = record.num_emitted;
  outcome->num_accepted = record.num_accepted;
  outcome->num_reached = record.num_reached;
  outcome->non_finite = record.non_finite != 0;
  outcome->num_drafts_made = record.num_drafts_made;
  outcome->weight_epoch = slot.record_epoch;
  const OutputParams& output = sequence.request->output;
  const auto copy = [](bool wanted, const auto& from, int32_t count, auto* to) {
    if (wanted) std::copy_n(std::begin(from), count, to->begin());
  };
  copy(true, record.tokens, record.num_emitted, &outcome->tokens);
  copy(true, record.source, record.num_emitted, &outcome->source);
  copy(output.logprobs, record.logprob, record.num_emitted, &outcome->logprob);
  copy(output.raw_logprobs, record.raw_logprob, record.num_emitted, &outcome->raw_logprob);
  copy(output.entropy, record.entropy, record.num_emitted, &outcome->entropy);
  copy(output.draft_logprobs, record.draft_logprob, record.num_emitted, &outcome->draft_logprob);
  copy(output.spec_detail, record.overlap, record.num_reached, &outcome->overlap);
}

}  // namespace bebop
