// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "kernels/common/ragged_batch.h"
#include "kernels/common/stream.h"
#include "kernels/common/tensor_view.h"

// The device's side of the step loop: what the CPU does between the matrix products of an iteration in engine/runtime/model_executor.cc and
// engine/schedule/sequence.cc (apply), as kernels over slots in device memory. So a whole iteration runs without the host, and the next one
// can follow before the host has read the results of this one ("run-ahead", ADR 5). The CPU code is the reference; the tests compare.
//
// One pass over a batch:
//   BeginDecode        (decode passes only; a prefill pass gets its arrays from the host)   slots -> rows of the target pass
//   [target forward, lm_head]
//   TransformRows      logits -> distributions of the rows that are judged
//   VerifyRows         accept, residual, bonus or plain token; log-probabilities -> StepRecord
//   AdvanceSlots       lengths, replay counts, stop flags; the rows of the MTP extend pass
//   [MTP forward over the certain rows, gather the last one of each sequence]
//   for depth = 0 .. γ-1:  [lm_head]  TransformRows (draft)  DrawDrafts  [MTP forward of one row a sequence]
//   PublishRecords     StepRecords -> pinned host memory, then the sequence number
namespace bebop {

inline constexpr int32_t kMaxDecodeDrafts = 8;
// Sums over the sampling blocks of a row are in shared memory.
inline constexpr int32_t kMaxDecodeVocabSize = 1 << 20;
// Target rows of a decode pass, B (γ + 1): the vocabulary kernels' grids have a row in y.
inline constexpr int32_t kMaxDecodeRows = 65535;
// End-of-sequence and stop ids a slot can hold for the device's own stop test. A request with more is stopped by the host alone (its rows
// run one iteration in vain). Ids banned before min_new_tokens have no such way out: kMaxBannedIds is what a request may have.
inline constexpr int32_t kMaxStopIds = 64;
inline constexpr int32_t kMaxBannedIds = 2048;

// engine/sampling's SpeculationMode, by value.
enum class VerifyRule : int32_t { kOff = 0, kTargetOnly = 1, kRejection = 2, kCoupled = 3 };

// What a StepRecord must hold beyond tokens (engine/sampling's OutputParams).
enum RecordFlags : uint32_t {
  kRecordLogprob = 1, kRecordRawLogprob = 2, kRecordEntropy = 4, kRecordDraftLogprob = 8, kRecordOverlap = 16,
};

// Constant while a sequence lives in a slot; written by the host when it moves in.
struct SlotRequest {
  uint64_t seed = 0;
  uint32_t sample_index = 0;
  VerifyRule rule = VerifyRule::kOff;
  float temperature = 1.0f, top_p = 1.0f, min_p = 0.0f;
  int32_t top_k = 0;
  int32_t num_draft_tokens = 0;  // γ of the request; > 0: the MTP cache is extended in every pass
  int32_t max_new_tokens = 0, min_new_tokens = 0;
  uint32_t record = 0;           // RecordFlags
  int32_t num_stop_ids = 0;      // in SlotArrays::stop_ids; 0 also when the request has more than kMaxStopIds
  int32_t num_banned_ids = 0;    // in SlotArrays::banned_ids; banned while output number < min_new_tokens
  double synthetic_acceptance = -1.0;  // >= 0: accept each reached draft with this probability
};

// Where a sequence stands, advanced by the device itself. The host writes it when a sequence moves in.
struct SlotState {
  uint64_t residency = 0;    // SequencePlan::residency
  int32_t stopped = 1;       // 1: a no-op until the host moves somebody in
  int32_t num_computed = 0;  // as in docs/engine_contract.md
  int32_t num_replay = 0;
  int32_t num_output = 0;
  int32_t num_drafts = 0;    // drafts to verify in the next pass: drafts[0 .. num_drafts)
  int32_t num_drafts_made = 0;  // of the latest pass
  uint32_t last_token = 0;   // the token emitted last: not computed yet
  uint32_t drafts[kMaxDecodeDrafts] = {};
  int32_t state_src = -1, state_dst = -1;
  int32_t num_pages = 0;     // valid entries of its page table
};

// A row's next-token distribution as the numbers that turn a logit into a weight: the values of TokenDistribution (kernels/sampling/sampling.h)
// without the V weights, which are recomputed from the logits wherever they are needed. Given equal logits, weights, block sums, totals and
// every draw have the bits of the CPU's.
struct DeviceDistribution {
  const float* logits = nullptr;  // [V] in device memory; banned ids are -inf already
  float max_logit = 0.0f;
  float scale = 0.0f;             // 1 / temperature
  float logit_floor = 0.0f;       // logits below have weight 0 (top-k)
  float weight_floor = 0.0f;      // weights below are 0 (top-p, min-p, underflow)
  int32_t tie_begin_excluded = 0; // among weights equal to weight_floor, ids >= this are out, but for argmax (top-p cuts between equals); V: none
  uint32_t argmax = 0;
  int32_t finite = 0;
  double total = 0.0;
  double raw_lse = 0.0;
};

// One sequence of a pass. BeginDecode writes it in decode passes, the host in prefill passes.
struct PassSequence {
  int32_t slot = -1;           // -1: padding
  int32_t first_row = 0;       // in the target pass
  int32_t num_known = 0;       // 0: a no-op (stopped, or out of pages)
  int32_t num_drafts = 0;      // verified in this pass
  int32_t sample = 0;          // 1: judge num_drafts + 1 rows from the last known one on
  int32_t first_judged_row = 0;  // of those rows among the pass's logits rows
  int32_t num_drafts_next = 0;
  int32_t has_next_known = 0;  // prefill chunk that ends before the sequence does
  uint32_t next_known_token = 0;
};

// What a pass did to one sequence: engine/schedule's SequenceOutcome, and what the host needs to match it to its plan.
struct StepRecord {
  uint64_t residency = 0;
  int32_t slot = -1;          // -1: padding
  int32_t ran = 0;            // 0: a no-op
  int32_t num_computed = 0;   // before the pass
  int32_t num_known = 0, num_drafts = 0;  // of the pass
  int32_t num_emitted = 0, num_accepted = 0, num_reached = 0, non_finite = 0;
  int32_t num_drafts_made = 0;
  uint32_t tokens[kMaxDecodeDrafts + 1] = {};
  int32_t source[kMaxDecodeDrafts + 1] = {};  // engine/speculative's kSource values
  float logprob[kMaxDecodeDrafts + 1] = {}, raw_logprob[kMaxDecodeDrafts + 1] = {};
  float entropy[kMaxDecodeDrafts + 1] = {}, draft_logprob[kMaxDecodeDrafts + 1] = {};
  double overlap[kMaxDecodeDrafts] = {};
};

// Everything about slots, in device memory; S slots, γ = max_drafts of the engine.
struct SlotArrays {
  int32_t num_slots = 0, max_drafts = 0, vocab_size = 0, max_pages = 0, page_tokens = 0;
  SlotRequest* requests = nullptr;    // [S]
  SlotState* states = nullptr;        // [S]
  uint32_t* stop_ids = nullptr;       // [S, kMaxStopIds]
  uint32_t* banned_ids = nullptr;     // [S, kMaxBannedIds]
  int32_t* page_ids = nullptr;        // [S, max_pages]
  float* draft_logits = nullptr;      // [S, γ, V]: of the drafts that wait to be verified, as processed (bans applied)
  DeviceDistribution* draft_rows = nullptr;  // [S, γ]
  double* draft_block_sums = nullptr;        // [S, γ, NumSamplingBlocks(V)]
};

// The arrays of one pass over B sequences with up to T target rows and R judged rows; device memory.
struct PassArrays {
  int32_t num_sequences = 0;  // B, the bucket
  int32_t num_rows = 0;       // T
  int32_t num_judged = 0;     // R, rows of logits
  int32_t num_drafts = 0;     // γ of the pass: most drafts that it verifies or makes
  PassSequence* sequences = nullptr;   // [B]
  // Target pass.
  SequenceRows* rows = nullptr;        // [B]
  uint32_t* token_ids = nullptr;       // [T]
  int32_t* row_sequence = nullptr;     // [T]
  int32_t* row_position = nullptr;     // [T]
  int32_t* judged_row = nullptr;       // [R] row of the target pass behind each logits row; -1: padding
  int32_t* judged_sequence = nullptr;  // [R] its sequence; -1: padding
  // Logits of the judged rows and what TransformRows makes of them.
  float* logits = nullptr;             // [R, V]
  DeviceDistribution* target_rows = nullptr;  // [R]
  double* target_block_sums = nullptr;        // [R, NumSamplingBlocks(V)]
  // MTP extend pass over the same rows (row t of the target pass becomes row t here), then draft steps over B rows.
  SequenceRows* mtp_rows = nullptr;    // [B]
  uint32_t* mtp_token_ids = nullptr;   // [max(T, B)]
  int32_t* mtp_row_sequence = nullptr; // [max(T, B)]
  int32_t* mtp_row_position = nullptr; // [max(T, B)]
  int32_t* draft_from_row = nullptr;   // [B] row of the extend pass that draft 1 is drawn from; -1: drafts nothing (more)
  StepRecord* records = nullptr;       // [B]
};

// SequenceRows of every array name their page table by first_page = slot * max_pages in SlotArrays::page_ids.

// Rows of the judged distributions to fill.
struct TransformRowsArgs {
  SlotArrays slots;
  PassArrays pass;
  int32_t draft_depth = -1;  // -1: the judged rows of the pass; d >= 0: one row a sequence, the d-th draft of its slot (logits [B, V])
  float* logits = nullptr;   // [R or B, V]; bans are written into it
  void* scratch = nullptr;   // TransformScratchBytes(...) bytes
};
int64_t TransformScratchBytes(int32_t num_rows, int32_t vocab_size);
// What VerifyRows and DrawDrafts take of the stream's workspace for up to `num_sequences` sequences that verify up to
// `num_drafts` drafts each. With drafts it is some 150 KB a sequence at V = 248,320: a caller compares it with the workspace at
// start.
int64_t VerifyScratchBytes(int32_t num_sequences, int32_t num_drafts, int32_t vocab_size);

namespace cuda {

// slot_of_row: [B] device, -1 for padding. Sequence b gets rows [b (γ+1), (b+1) (γ+1)): its last token and its drafts; sets PassSequence,
// target rows, row maps and judged rows (T = R = B (γ+1), judged row r is target row r). A slot that is stopped, or whose page table does
// not reach to the end of what the pass could write (num_computed + 1 + num_drafts + max(num_drafts_next, MTP ? 1 : 0) positions), is a no-op.
// REQUIRES: num_drafts of every slot <= pass.num_drafts. num_drafts_next = clamp(min(γ of request, max_new_tokens - num_output - 2), 0, γ of pass).
void BeginDecode(const SlotArrays& slots, const PassArrays& pass, const int32_t* slot_of_row, Stream& stream);

// Gathers rows: out[i] = x[index[i]], zeros where index[i] < 0. x, out: one dtype, any; index: [out.rows].
void GatherRows(const TensorView& x, const int32_t* index, const TensorView& out, Stream& stream);

// The transform of algorithm.md section 2 without sorting, by the slot's request (report distribution of greedy rows where log-probabilities
// are recorded, as in model_executor.cc). Draft rows are also copied to SlotArrays::draft_logits and fill draft_rows, draft_block_sums.
void TransformRows(const TransformRowsArgs& args, Stream& stream);

// Decides each sampling sequence and fills its StepRecord (all fields but num_drafts_made). REQUIRES, as DrawDrafts: the stream's
// workspace has VerifyScratchBytes(num_sequences, slots.max_drafts, vocab_size).
void VerifyRows(const SlotArrays& slots, const PassArrays& pass, Stream& stream);

// After VerifyRows: moves the slots on (also those that did not sample), sets stop flags, and builds the MTP extend pass: certain rows only, all
// others padding (row_sequence -1), sequences without drafting num_rows 0. Stops at stop ids, max_new_tokens and non-finite rows, never
// where the host would go on. num_drafts of the slot is 0 until DrawDrafts.
void AdvanceSlots(const SlotArrays& slots, const PassArrays& pass, Stream& stream);

// After TransformRows(draft_depth): draws draft `depth` of each drafting sequence into its slot, counts it, and builds the next draft step
// (mtp_rows etc.: one row a sequence at row b, num_rows 0 where no further draft is wanted or the row was not finite). After the last depth
// num_drafts of the slot is set: max(0, min(made, remaining output - 1)).
void DrawDrafts(const SlotArrays& slots, const PassArrays& pass, int32_t depth, Stream& stream);

// Copies records [B] to `host_records` (pinned, mapped) and then stores `sequence_number[0] + 1` (device counter) to itself and to
// *host_sequence_number, after a system-wide fence: a host that sees the number sees the records.
void PublishRecords(const SlotArrays& slots, const PassArrays& pass, StepRecord* host_records, uint64_t* sequence_number,
                    volatile uint64_t* host_sequence_number, Stream& stream);

}  // namespace cuda
}  // namespace bebop
