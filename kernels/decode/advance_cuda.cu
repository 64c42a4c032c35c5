// SPDX-License-Identifier: Apache-2.0
// The slots' state machine (BeginDecode, AdvanceSlots), rows by index (GatherRows) and the way out (PublishRecords):
// engine/schedule/sequence.cc and the batch building of engine/runtime/model_executor.cc. A few hundred bytes a sequence; what
// counts is one launch each.
#include "kernels/common/check.h"
#include "kernels/common/cuda_stream.h"
#include "kernels/common/gpu.h"
#include "kernels/common/gpu_vector.h"
#include "kernels/decode/decode.h"

namespace bebop::cuda {
namespace {

constexpr int32_t kThreads = 128;

__global__ void __launch_bounds__(kThreads) BeginDecodeRows(SlotArrays slots, PassArrays pass, const int32_t* slot_of_row) {
  const int32_t sequence_idx = static_cast<int32_t>(blockIdx.x) * kThreads + static_cast<int32_t>(threadIdx.x);
  if (sequence_idx >= pass.num_sequences) return;
  const int32_t rows_per_sequence = pass.num_drafts + 1, first_row = sequence_idx * rows_per_sequence;
  PassSequence sequence;
  sequence.slot = slot_of_row[sequence_idx];
  sequence.first_row = sequence.first_judged_row = first_row;
  SequenceRows rows;
  rows.first_row = first_row;
  if (sequence.slot >= 0) {
    const SlotState& state = slots.states[sequence.slot];
    const SlotRequest& request = slots.requests[sequence.slot];
    const int32_t wanted = min(request.num_draft_tokens, request.max_new_tokens - state.num_output - 2);
    const int32_t num_drafts_next = max(0, min(wanted, pass.num_drafts));
    const int32_t num_mtp = max(num_drafts_next, request.num_draft_tokens > 0 ? 1 : 0);
    const int32_t num_positions = state.num_computed + 1 + state.num_drafts + num_mtp;
    rows.first_page = sequence.slot * slots.max_pages;
    if (state.stopped == 0 && num_positions <= static_cast<int64_t>(state.num_pages) * slots.page_tokens) {
      sequence.num_known = 1;
      sequence.num_drafts = state.num_drafts;
      sequence.sample = 1;
      sequence.num_drafts_next = num_drafts_next;
      rows.num_rows = 1 + state.num_drafts;
      rows.num_known_rows = 1;
      rows.num_replay_rows = state.num_replay;
      rows.first_position = state.num_computed;
      rows.state_src = state.state_src;
      rows.state_dst = state.state_dst;
    }
  }
  pass.sequences[sequence_idx] = sequence;
  pass.rows[sequence_idx] = rows;
  for (int32_t i = 0; i < rows_per_sequence; ++i) {
    const int32_t row = first_row + i;
    const bool valid = i < rows.num_rows;
    uint32_t token = 0;
    if (valid) token = i == 0 ? slots.states[sequence.slot].last_token : slots.states[sequence.slot].drafts[i - 1];
    pass.token_ids[row] = token;
    pass.row_sequence[row] = valid ? sequence_idx : -1;
    pass.row_position[row] = valid ? rows.first_position + i : 0;
    pass.judged_row[row] = valid ? row : -1;
    pass.judged_sequence[row] = valid ? sequence_idx : -1;
  }
}

// One thread block a sequence: thread 0 moves the slot on, all threads write the sequence's rows of the extend pass. Rows of no
// sequence are shared out among all.
__global__ void __launch_bounds__(kThreads) AdvanceSequences(SlotArrays slots, PassArrays pass) {
  __shared__ int32_t shared_stopped;
  const int32_t sequence_idx = blockIdx.x, thread = threadIdx.x;
  for (int32_t row = sequence_idx * kThreads + thread; row < pass.num_rows; row += static_cast<int32_t>(gridDim.x) * kThreads) {
    if (pass.row_sequence[row] >= 0) continue;
    pass.mtp_token_ids[row] = 0;
    pass.mtp_row_sequence[row] = -1;
    pass.mtp_row_position[row] = 0;
  }
  const PassSequence sequence = pass.sequences[sequence_idx];
  const SequenceRows target_rows = pass.rows[sequence_idx];
  const StepRecord& record = pass.records[sequence_idx];
  const bool runs = sequence.slot >= 0 && sequence.num_known > 0;
  int32_t num_output = 0;
  if (thread == 0) shared_stopped = 0;
  __syncthreads();
  if (runs && sequence.sample != 0) {
    const SlotRequest& request = slots.requests[sequence.slot];
    num_output = slots.states[sequence.slot].num_output;
    const uint32_t* const stop_ids = slots.stop_ids + static_cast<int64_t>(sequence.slot) * kMaxStopIds;
    bool stops = record.non_finite != 0 || num_output + record.num_emitted >= request.max_new_tokens;
    // No test of min_new_tokens: ids that stop are banned until then.
    for (int32_t i = 0; i < record.num_emitted; ++i) {
      for (int32_t j = thread; j < request.num_stop_ids; j += kThreads) stops = stops || record.tokens[i] == stop_ids[j];
    }
    if (stops) atomicOr(&shared_stopped, 1);
  }
  __syncthreads();
  const bool stopped = shared_stopped != 0;

  const int32_t num_computed = runs ? slots.states[sequence.slot].num_computed : 0;
  const bool next_is_known = sequence.sample != 0 || sequence.has_next_known != 0;
  int32_t num_certain = 0;
  if (runs && !stopped && slots.requests[sequence.slot].num_draft_tokens > 0) {
    num_certain = sequence.num_known + record.num_accepted - (next_is_known ? 0 : 1);
  }
  for (int32_t i = thread; i < target_rows.num_rows; i += kThreads) {
    const int32_t row = target_rows.first_row + i, next = i + 1;
    const bool certain = i < num_certain;
    uint32_t token = 0;
    if (certain) {
      token = next < sequence.num_known ? pass.token_ids[row + 1]
              : sequence.sample != 0    ? record.tokens[next - sequence.num_known]
                                        : sequence.next_known_token;
    }
    pass.mtp_token_ids[row] = token;
    pass.mtp_row_sequence[row] = certain ? sequence_idx : -1;
    pass.mtp_row_position[row] = certain ? num_computed + 1 + i : 0;
  }
  __syncthreads();  // all have read the state that thread 0 moves on
  if (thread != 0) return;
  SequenceRows rows;
  rows.first_row = target_rows.first_row;
  rows.num_rows = rows.num_known_rows = num_certain;
  rows.first_position = num_certain > 0 ? num_computed + 1 : 0;
  rows.first_page = sequence.slot < 0 ? 0 : sequence.slot * slots.max_pages;
  pass.mtp_rows[sequence_idx] = rows;
  pass.draft_from_row[sequence_idx] =
      num_certain > 0 && sequence.num_drafts_next > 0 ? target_rows.first_row + num_certain - 1 : -1;
  if (!runs) return;
  SlotState& state = slots.states[sequence.slot];
  state.num_computed = num_computed + sequence.num_known + record.num_accepted;
  state.num_replay = record.num_accepted;
  state.num_drafts = 0;
  state.num_drafts_made = 0;
  state.state_src = state.state_dst;
  if (sequence.sample != 0) {
    state.num_output = num_output + record.num_emitted;
    if (record.num_emitted > 0) state.last_token = record.tokens[record.num_emitted - 1];
    if (stopped) state.stopped = 1;
  } else if (sequence.has_next_known != 0) {
    state.last_token = sequence.next_known_token;
  }
}

// One thread block a row. Unit: what both matrices are aligned to.
template <typename Unit>
__global__ void __launch_bounds__(kThreads)
    GatherUnits(const Unit* x, int64_t x_stride, const int32_t* index, Unit* out, int64_t out_stride, int64_t units) {
  const int32_t source = index[blockIdx.x];
  Unit* const to = out + blockIdx.x * out_stride;
  const Unit* const from = x + static_cast<int64_t>(source) * x_stride;
  for (int64_t i = threadIdx.x; i < units; i += kThreads) to[i] = source < 0 ? Unit{} : from[i];
}

template <typename Unit>
void LaunchGather(const TensorView& x, const int32_t* index, const TensorView& out, Stream& stream) {
  const int64_t element = ElementBytes(x.dtype), unit = sizeof(Unit);
  BEBOP_CUDA_TRY(stream, gpu::Launch(GatherUnits<Unit>, dim3(static_cast<unsigned>(out.rows)), kThreads, 0, stream.handle(),
                                     static_cast<const Unit*>(x.data), x.row_stride * element / unit, index,
                                     static_cast<Unit*>(out.data), out.row_stride * element / unit, out.cols * element / unit));
}

constexpr int32_t kPublishThreads = 1024;

// One thread block: the records cross the bus as 8-byte words, then the number.
__global__ void __launch_bounds__(kPublishThreads)
    PublishWords(const uint64_t* records, uint64_t* host_records, int64_t num_words, uint64_t* sequence_number,
                 volatile uint64_t* host_sequence_number) {
  for (int64_t i = threadIdx.x; i < num_words; i += kPublishThreads) host_records[i] = records[i];
  __threadfence_system();  // each thread orders its own words before the barrier, and so before the number
  __syncthreads();
  if (threadIdx.x != 0) return;
  const uint64_t number = *sequence_number + 1;
  *sequence_number = number;
  __threadfence_system();
  *host_sequence_number = number;
}

}  // namespace

void BeginDecode(const SlotArrays& slots, const PassArrays& pass, const int32_t* slot_of_row, Stream& stream) {
  BEBOP_CHECK(pass.num_rows == pass.num_sequences * (pass.num_drafts + 1) && pass.num_judged == pass.num_rows);
  BEBOP_CHECK(pass.num_drafts <= kMaxDecodeDrafts);
  if (pass.num_sequences == 0) return;
  const dim3 grid(static_cast<unsigned>((pass.num_sequences + kThreads - 1) / kThreads));
  BEBOP_CUDA_TRY(stream, gpu::Launch(BeginDecodeRows, grid, kThreads, 0, stream.handle(), slots, pass, slot_of_row));
}

void GatherRows(const TensorView& x, const int32_t* index, const TensorView& out, Stream& stream) {
  BEBOP_CHECK(x.dtype == out.dtype && x.cols == out.cols);
  if (out.rows == 0 || out.cols == 0) return;
  const int64_t element = ElementBytes(x.dtype);
  const auto aligned = [&](const TensorView& view) { return gpu::RowsAligned(view.data, view.row_stride * element); };
  if (aligned(x) && aligned(out) && x.cols * element % 16 == 0) {
    LaunchGather<uint4>(x, index, out, stream);
  } else if (element == 4) {
    LaunchGather<uint32_t>(x, index, out, stream);
  } else {
    LaunchGather<uint16_t>(x, index, out, stream);
  }
}

void AdvanceSlots(const SlotArrays& slots, const PassArrays& pass, Stream& stream) {
  if (pass.num_sequences == 0) return;
  BEBOP_CUDA_TRY(stream, gpu::Launch(AdvanceSequences, dim3(static_cast<unsigned>(pass.num_sequences)), kThreads, 0,
                                     stream.handle(), slots, pass));
}

void PublishRecords(const SlotArrays&, const PassArrays& pass, StepRecord* host_records, uint64_t* sequence_number,
                    volatile uint64_t* host_sequence_number, Stream& stream) {
  static_assert(sizeof(StepRecord) % 8 == 0 && alignof(StepRecord) == 8);
  const int64_t num_words = pass.num_sequences * static_cast<int64_t>(sizeof(StepRecord) / 8);
  BEBOP_CUDA_TRY(stream, gpu::Launch(PublishWords, dim3(1), kPublishThreads, 0, stream.handle(),
                                     reinterpret_cast<const uint64_t*>(pass.records), reinterpret_cast<uint64_t*>(host_records),
                                     num_words, sequence_number, host_sequence_number));
}

}  // namespace bebop::cuda
