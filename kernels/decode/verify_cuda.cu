// SPDX-License-Identifier: Apache-2.0
// VerifyRows and DrawDrafts: engine/speculative/verify.cc and the draws behind it, for slots.
//
// VerifyRows, three launches:
//   GumbelRows      chunk x judged row   coupled mode: the best id of every chunk. Places that will not be reached are
//                                        judged with the others, because a place is known to be reached only when those before it
//                                        are done; rows of other modes leave.
//   VocabularyRows  chunk x judged row   residual sums of the one rejected row; entropy and overlap sums where they are recorded
//   FinishRows      sequence             the token that is no draft, log-probabilities, the record
// Acceptance needs single logits only, so each thread block that wants it decides anew (estimated: 2 µs) instead of another
// launch and a round trip.
//
// DrawDrafts, two launches: GumbelDrafts (chunk x sequence; other modes leave) and DrawRows (sequence).
//
// Bytes, V = 248,320: a rejected row reads target and draft logits once, 2 MB; bonus and plain tokens read one block of 4 KB. The
// coupled mode reads each row once more and computes 62,080 Philox calls a row. Partial results are in the stream's workspace.
#include "kernels/common/check.h"
#include "kernels/common/cuda_stream.h"
#include "kernels/decode/decode_device.cuh"

namespace bebop {
namespace cuda {
namespace {

constexpr int32_t kFinishThreads = 256;
// Of the closed form of coupled acceptance: bins of target mass / draft mass, 256 an octave from 2^-16 to 2^16.
constexpr int32_t kRatioBins = 8192;

struct Scratch {
  double* residual;            // [B, M]
  double* entropy;             // [R, M]: Σ w log w
  double* overlap;             // [R, M]
  // [B, 2, kRatioBins] where drafts are verified: target and draft mass by their ratio, in units of 2^-62.
  unsigned long long* ratios;
  double* gumbel_value;        // [R or B, chunks]
  uint32_t* gumbel_id;         // [R or B, chunks]
};

int64_t LayOut(int64_t num_sequences, int64_t num_rows, bool has_drafts, int32_t vocab_size, char* base, Scratch* scratch) {
  const int64_t blocks = NumSamplingBlocks(vocab_size), chunks = NumChunks(vocab_size);
  int64_t offset = 0;
  const auto take = [&](int64_t bytes) {
    char* const at = base + offset;
    offset += (bytes + 15) / 16 * 16;
    return at;
  };
  scratch->residual = reinterpret_cast<double*>(take(num_sequences * blocks * 8));
  scratch->entropy = reinterpret_cast<double*>(take(num_rows * blocks * 8));
  scratch->overlap = reinterpret_cast<double*>(take(num_rows * blocks * 8));
  scratch->ratios = reinterpret_cast<unsigned long long*>(take(has_drafts ? num_sequences * 2 * kRatioBins * 8 : 0));
  scratch->gumbel_value = reinterpret_cast<double*>(take(num_rows * chunks * 8));
  scratch->gumbel_id = reinterpret_cast<uint32_t*>(take(num_rows * chunks * 4));
  return offset;
}

struct Params {
  SlotArrays slots;
  PassArrays pass;
  int32_t depth;  // of DrawDrafts
  Scratch scratch;
};

__device__ int64_t DraftRow(const SlotArrays& slots, int32_t slot, int32_t place) {
  return static_cast<int64_t>(slot) * slots.max_drafts + place;
}

// Position of the token at place 0.
__device__ int32_t FirstPosition(const Params& params, const PassSequence& sequence) {
  return params.slots.states[sequence.slot].num_computed + sequence.num_known;
}

// ---- Decisions ----

// How the token at a place comes about if the place's draft does not stand there.
enum class Draw : int32_t { kKnown, kInverseCdf, kExcluding, kResidual };

struct Verdict {
  int32_t finite;  // the target row
  int32_t accepted;
  Draw draw;
  uint32_t token;  // kKnown
  DrawPurpose purpose;
};

struct Decision {
  int32_t num_accepted, num_reached, non_finite;
  int32_t place;  // of the token that is not an accepted draft
  int32_t source;
  Verdict verdict;  // of that place
};

struct DecisionShared {
  Verdict verdicts[kMaxDecodeDrafts + 1];
  Decision decision;
};

// SampleTarget of verify.cc.
__device__ void DrawFromTarget(const Params& params, const SlotRequest& request, int32_t judged_row, DrawPurpose purpose,
                               Verdict* verdict) {
  verdict->purpose = purpose;
  verdict->draw = Draw::kKnown;
  if (request.temperature == 0.0f) {
    verdict->token = params.pass.target_rows[judged_row].argmax;
  } else if (request.rule == VerifyRule::kCoupled) {
    const int32_t num_chunks = (params.slots.vocab_size + kChunkIds - 1) / kChunkIds;
    const int64_t first = static_cast<int64_t>(judged_row) * num_chunks;
    verdict->token = BestOfChunks(params.scratch.gumbel_value + first, params.scratch.gumbel_id + first, num_chunks);
  } else {
    verdict->draw = Draw::kInverseCdf;
  }
}

// DecideDraft of verify.cc for place `place`, or the token behind the last draft.
__device__ Verdict JudgePlace(const Params& params, const PassSequence& sequence, const SlotRequest& request, int32_t place) {
  const SlotState& state = params.slots.states[sequence.slot];
  const int32_t judged_row = sequence.first_judged_row + place;
  const DeviceDistribution& target = params.pass.target_rows[judged_row];
  Verdict verdict = {target.finite, 0, Draw::kKnown, 0, DrawPurpose::kPlain};
  if (target.finite == 0) return verdict;
  if (place == sequence.num_drafts) {
    DrawFromTarget(params, request, judged_row, place == 0 ? DrawPurpose::kPlain : DrawPurpose::kBonus, &verdict);
    return verdict;
  }
  const uint32_t drafted = state.drafts[place];
  const DeviceDistribution& draft = params.slots.draft_rows[DraftRow(params.slots, sequence.slot, place)];
  const RandomKey key = KeyAt(request, FirstPosition(params, sequence) + place);
  const bool synthetic = request.synthetic_acceptance >= 0.0;
  if (synthetic && Uniform53(key, DrawPurpose::kSynthetic, 0) < request.synthetic_acceptance) {
    verdict.accepted = 1;
    verdict.token = drafted;
    return verdict;
  }
  // Whether a draft row is usable depends on nothing drawn at this place, so the target's own law is the right one.
  if (draft.finite == 0 || request.temperature == 0.0f || request.rule == VerifyRule::kCoupled) {
    DrawFromTarget(params, request, judged_row, DrawPurpose::kResidual, &verdict);
    verdict.accepted = draft.finite != 0 && !synthetic && verdict.token == drafted ? 1 : 0;
    return verdict;
  }
  const double target_prob = ProbAt(target, static_cast<int32_t>(drafted));
  verdict.purpose = DrawPurpose::kResidual;
  if (request.rule == VerifyRule::kTargetOnly) {
    verdict.accepted = !synthetic && Uniform53(key, DrawPurpose::kAccept, 0) < target_prob ? 1 : 0;
    verdict.draw = Draw::kExcluding;
  } else {
    const double draft_prob = ProbAt(draft, static_cast<int32_t>(drafted));
    verdict.accepted = !synthetic && __dmul_rn(Uniform53(key, DrawPurpose::kAccept, 0), draft_prob) < target_prob ? 1 : 0;
    verdict.draw = Draw::kResidual;
  }
  verdict.token = drafted;
  return verdict;
}

// What Verify does short of drawing. All threads of the block call it.
__device__ const Decision& Decide(const Params& params, const PassSequence& sequence, const SlotRequest& request,
                                  DecisionShared& s) {
  const int32_t thread = threadIdx.x;
  if (thread <= sequence.num_drafts) s.verdicts[thread] = JudgePlace(params, sequence, request, thread);
  __syncthreads();
  if (thread == 0) {
    Decision& decision = s.decision;
    int32_t place = 0;
    while (place < sequence.num_drafts && s.verdicts[place].finite != 0 && s.verdicts[place].accepted != 0) ++place;
    decision.num_accepted = decision.place = place;
    decision.verdict = s.verdicts[place];
    decision.non_finite = decision.verdict.finite == 0 ? 1 : 0;
    const bool rejected = place < sequence.num_drafts && decision.non_finite == 0;
    decision.num_reached = place + (rejected ? 1 : 0);
    decision.source = rejected ? -1 : sequence.num_drafts > 0 ? -2 : 0;  // kSourceCorrected, kSourceBonus, kSourcePlain
  }
  __syncthreads();
  return s.decision;
}

// ---- Passes over the vocabulary ----

__global__ void __launch_bounds__(kChunkThreads) GumbelRows(Params params) {
  __shared__ GumbelShared s;
  const int32_t row = blockIdx.y, sequence_idx = params.pass.judged_sequence[row];
  if (sequence_idx < 0) return;
  const PassSequence& sequence = params.pass.sequences[sequence_idx];
  const SlotRequest& request = params.slots.requests[sequence.slot];
  const DeviceDistribution target = params.pass.target_rows[row];
  if (request.rule != VerifyRule::kCoupled || request.temperature == 0.0f || target.finite == 0) return;
  const RandomKey key = KeyAt(request, FirstPosition(params, sequence) + row - sequence.first_judged_row);
  const Candidate best = BestOfChunk(target, params.slots.vocab_size, static_cast<int32_t>(blockIdx.x), key, s);
  if (threadIdx.x == 0) {
    const int64_t index = static_cast<int64_t>(row) * gridDim.x + blockIdx.x;
    params.scratch.gumbel_value[index] = best.value;
    params.scratch.gumbel_id[index] = best.id;
  }
}

__global__ void __launch_bounds__(kChunkThreads) VocabularyRows(Params params) {
  __shared__ DecisionShared s;
  const int32_t row = blockIdx.y, sequence_idx = params.pass.judged_sequence[row];
  if (sequence_idx < 0) return;
  const PassSequence& sequence = params.pass.sequences[sequence_idx];
  const SlotRequest& request = params.slots.requests[sequence.slot];
  const bool rejection = request.rule == VerifyRule::kRejection && request.temperature != 0.0f && sequence.num_drafts > 0;
  if (!rejection && (request.record & kRecordEntropy) == 0) return;
  const Decision& decision = Decide(params, sequence, request, s);
  const int32_t vocab_size = params.slots.vocab_size, num_blocks = NumSamplingBlocks(vocab_size);
  const int32_t block = static_cast<int32_t>(blockIdx.x) * kChunkBlocks + static_cast<int32_t>(threadIdx.x / 16);
  const bool writes = threadIdx.x % 16 == 0 && block < num_blocks;
  const int32_t place = row - sequence.first_judged_row;
  const DeviceDistribution target = params.pass.target_rows[row];
  if (target.finite == 0) return;
  const double* const target_sums = params.pass.target_block_sums + static_cast<int64_t>(row) * num_blocks;
  if ((request.record & kRecordEntropy) != 0 && place <= decision.num_accepted) {
    const double sum = SumBlock(block, vocab_size, [&](int32_t id) {
      const float weight = WeightAt(target, id);
      return __fmul_rn(weight, FastLog(weight));
    });
    if (writes) params.scratch.entropy[static_cast<int64_t>(row) * num_blocks + block] = sum;
  }
  if (!rejection || place >= decision.num_reached) return;
  const int64_t draft_row = DraftRow(params.slots, sequence.slot, place);
  const DeviceDistribution draft = params.slots.draft_rows[draft_row];
  if (draft.finite == 0) return;
  const double target_scale = __ddiv_rn(1.0, target.total), draft_scale = __ddiv_rn(1.0, draft.total);
  const bool light = block >= num_blocks || target_sums[block] == 0.0;
  if (decision.place == place && decision.verdict.draw == Draw::kResidual) {
    const double sum = SumBlock(light ? num_blocks : block, vocab_size, [&](int32_t id) {
      const double excess = __dsub_rn(__dmul_rn(static_cast<double>(WeightAt(target, id)), target_scale),
                                      __dmul_rn(static_cast<double>(WeightAt(draft, id)), draft_scale));
      return excess > 0.0 ? excess : 0.0;
    });
    if (writes) params.scratch.residual[static_cast<int64_t>(sequence_idx) * num_blocks + block] = sum;
  }
  if ((request.record & kRecordOverlap) != 0) {
    const double* const draft_sums = params.slots.draft_block_sums + draft_row * num_blocks;
    const bool empty = light || draft_sums[block] == 0.0;
    const double sum = SumBlock(empty ? num_blocks : block, vocab_size, [&](int32_t id) {
      const double target_prob = __dmul_rn(static_cast<double>(WeightAt(target, id)), target_scale);
      const double draft_prob = __dmul_rn(static_cast<double>(WeightAt(draft, id)), draft_scale);
      return target_prob < draft_prob ? target_prob : draft_prob;
    });
    if (writes) params.scratch.overlap[static_cast<int64_t>(row) * num_blocks + block] = sum;
  }
}

// ---- The token and the record ----

// cpu::SampleResidual. All threads of the block call it.
__device__ int32_t SampleResidual(const DeviceDistribution& target, const double* target_sums, const DeviceDistribution& draft,
                                  const double* residual_sums, int32_t vocab_size, const RandomKey& key, TwoLevelShared& s) {
  __syncthreads();
  const int32_t num_blocks = NumSamplingBlocks(vocab_size);
  for (int32_t i = threadIdx.x; i < num_blocks; i += blockDim.x) s.block_mass[i] = residual_sums[i];
  __syncthreads();
  if (threadIdx.x == 0) s.mass = SumAscending(s.block_mass, num_blocks);
  __syncthreads();
  const double total = s.mass;
  if (!(total > 0.0)) return SampleInverseCdf(target, target_sums, vocab_size, key, DrawPurpose::kResidual, s);
  const double target_scale = __ddiv_rn(1.0, target.total), draft_scale = __ddiv_rn(1.0, draft.total);
  return PickToken(
      vocab_size, total, Uniform53(key, DrawPurpose::kResidual, 0), Uniform53(key, DrawPurpose::kResidual, 1),
      [&](int32_t id) {
        return __dsub_rn(__dmul_rn(static_cast<double>(WeightAt(target, id)), target_scale),
                         __dmul_rn(static_cast<double>(WeightAt(draft, id)), draft_scale));
      },
      s);
}

// cpu::SampleExcluding. All threads of the block call it.
__device__ int32_t SampleExcluding(const DeviceDistribution& target, const double* target_sums, int32_t excluded,
                                   int32_t vocab_size, const RandomKey& key, TwoLevelShared& s) {
  __syncthreads();
  const int32_t num_blocks = NumSamplingBlocks(vocab_size), block = excluded / kSamplingBlock;
  const int32_t first = block * kSamplingBlock, count = BlockCount(vocab_size, block);
  const auto mass_of = [&](int32_t id) { return id == excluded ? 0.0 : static_cast<double>(WeightAt(target, id)); };
  for (int32_t i = threadIdx.x; i < num_blocks; i += blockDim.x) s.block_mass[i] = target_sums[i];
  for (int32_t i = threadIdx.x; i < count; i += blockDim.x) s.id_mass[i] = mass_of(first + i);
  __syncthreads();
  if (threadIdx.x == 0) {
    // The excluded id's block is summed anew: subtracting a weight near the total would leave only rounding.
    s.block_mass[block] = SumAscending(s.id_mass, count);
    s.mass = SumAscending(s.block_mass, num_blocks);
  }
  __syncthreads();
  const double total = s.mass;
  if (!(total > 0.0)) return SampleInverseCdf(target, target_sums, vocab_size, key, DrawPurpose::kResidual, s);
  return PickToken(vocab_size, total, Uniform53(key, DrawPurpose::kResidual, 0), Uniform53(key, DrawPurpose::kResidual, 1),
                   mass_of, s);
}

// cpu::CoupledOverlap without sorting: ids are gathered in bins of r = target mass / draft mass, and a bin counts as one id of
// the ratio of the bin's masses. With r known to a relative 2^-8 inside a bin the result is off by at most its target mass / 256,
// summed over bins by the acceptance within them: under 1/256 in all, 0 where the ratios of a bin are equal (as between equal
// rows), and about 1e-5 for broad rows. Ids with r outside [2^-16, 2^16] share the end bins, which adds at most 2^-16. Masses are
// integers of 2^-62, so the order of atomics does not matter. A report, not a decision.
__device__ double CoupledOverlap(const DeviceDistribution& target, const DeviceDistribution& draft, int32_t vocab_size,
                                 unsigned long long* ratios, double* partial) {
  constexpr double kUnits = 0x1.0p62;
  unsigned long long* const target_mass = ratios;
  unsigned long long* const draft_mass = ratios + kRatioBins;
  for (int32_t i = threadIdx.x; i < 2 * kRatioBins; i += kFinishThreads) ratios[i] = 0;
  __syncthreads();
  for (int32_t id = threadIdx.x; id < vocab_size; id += kFinishThreads) {
    const double target_prob = ProbAt(target, id), draft_prob = ProbAt(draft, id);
    if (!(target_prob > 0.0 || draft_prob > 0.0)) continue;
    const double ratio = fmin(fmax(target_prob / draft_prob, 0x1.0p-16), 0x1.fffffp15);
    // The exponent and the first 8 bits of the mantissa.
    const int32_t bin = static_cast<int32_t>(__double_as_longlong(ratio) >> 44) - ((1023 - 16) << 8);
    atomicAdd(&target_mass[bin], static_cast<unsigned long long>(target_prob * kUnits));
    atomicAdd(&draft_mass[bin], static_cast<unsigned long long>(draft_prob * kUnits));
  }
  __syncthreads();
  // Each thread takes neighbouring bins; masses before and behind them add up exactly.
  constexpr int32_t kBins = kRatioBins / kFinishThreads;
  const int32_t first = static_cast<int32_t>(threadIdx.x) * kBins;
  unsigned long long below = 0, at_or_above = 0;
  for (int32_t i = 0; i < first; ++i) below += draft_mass[i];
  for (int32_t i = first; i < kRatioBins; ++i) at_or_above += target_mass[i];
  double sum = 0.0;
  for (int32_t i = first; i < first + kBins; ++i) {
    const double target_prob = static_cast<double>(target_mass[i]) / kUnits,
                 draft_prob = static_cast<double>(draft_mass[i]) / kUnits;
    if (target_prob > 0.0 && draft_prob > 0.0) {
      sum += target_prob /
             (static_cast<double>(at_or_above) / kUnits + target_prob / draft_prob * (static_cast<double>(below) / kUnits));
    }
    below += draft_mass[i];
    at_or_above -= target_mass[i];
  }
  partial[threadIdx.x] = sum;
  __syncthreads();
  double acceptance = 0.0;
  for (int32_t i = 0; i < kFinishThreads; ++i) acceptance += partial[i];
  __syncthreads();
  return fmin(acceptance, 1.0);
}

__device__ double LogProb(const DeviceDistribution& row, uint32_t id) {
  return log(static_cast<double>(WeightAt(row, static_cast<int32_t>(id)))) - log(row.total);
}

__global__ void __launch_bounds__(kFinishThreads) FinishSequences(Params params) {
  __shared__ TwoLevelShared two_level;
  __shared__ DecisionShared decision_shared;
  const int32_t sequence_idx = blockIdx.x, thread = threadIdx.x;
  const PassSequence& sequence = params.pass.sequences[sequence_idx];
  StepRecord& record = params.pass.records[sequence_idx];
  uint32_t* const words = reinterpret_cast<uint32_t*>(&record);
  for (int32_t i = thread; i < static_cast<int32_t>(sizeof(StepRecord) / 4); i += kFinishThreads) words[i] = 0;
  __syncthreads();
  const int32_t slot = sequence.slot;
  if (thread == 0) {
    record.slot = slot;
    if (slot >= 0) {
      record.residency = params.slots.states[slot].residency;
      record.num_computed = params.slots.states[slot].num_computed;
      record.ran = sequence.num_known > 0 ? 1 : 0;
      record.num_known = sequence.num_known;
      record.num_drafts = sequence.num_drafts;
    }
  }
  if (slot < 0 || sequence.num_known == 0 || sequence.sample == 0) return;

  const SlotRequest& request = params.slots.requests[slot];
  const SlotState& state = params.slots.states[slot];
  const int32_t vocab_size = params.slots.vocab_size, num_blocks = NumSamplingBlocks(vocab_size);
  const Decision& decision = Decide(params, sequence, request, decision_shared);
  const int32_t last_row = sequence.first_judged_row + decision.place;
  int32_t token = 0;
  if (decision.non_finite == 0) {
    const DeviceDistribution target = params.pass.target_rows[last_row];
    const double* const target_sums = params.pass.target_block_sums + static_cast<int64_t>(last_row) * num_blocks;
    const RandomKey key = KeyAt(request, FirstPosition(params, sequence) + decision.place);
    switch (decision.verdict.draw) {
      case Draw::kKnown:
        token = static_cast<int32_t>(decision.verdict.token);
        break;
      case Draw::kInverseCdf:
        token = SampleInverseCdf(target, target_sums, vocab_size, key, decision.verdict.purpose, two_level);
        break;
      case Draw::kExcluding:
        token = SampleExcluding(target, target_sums, static_cast<int32_t>(decision.verdict.token), vocab_size, key, two_level);
        break;
      case Draw::kResidual: {
        const DeviceDistribution draft = params.slots.draft_rows[DraftRow(params.slots, slot, decision.place)];
        const double* const residual = params.scratch.residual + static_cast<int64_t>(sequence_idx) * num_blocks;
        token = SampleResidual(target, target_sums, draft, residual, vocab_size, key, two_level);
        break;
      }
    }
  }
  const int32_t num_emitted = decision.num_accepted + (decision.non_finite == 0 ? 1 : 0);
  if (thread == 0) {
    record.num_emitted = num_emitted;
    record.num_accepted = decision.num_accepted;
    record.num_reached = decision.num_reached;
    record.non_finite = decision.non_finite;
  }

  // One place a thread: what is reported about single tokens, and the sums over blocks.
  const double* const entropy = params.scratch.entropy;
  if (thread < num_emitted) {
    const int32_t row = sequence.first_judged_row + thread;
    const DeviceDistribution target = params.pass.target_rows[row];
    const bool accepted = thread < decision.num_accepted;
    const uint32_t emitted = accepted ? state.drafts[thread] : static_cast<uint32_t>(token);
    record.tokens[thread] = emitted;
    record.source[thread] = accepted ? thread + 1 : decision.source;
    if ((request.record & kRecordLogprob) != 0) record.logprob[thread] = static_cast<float>(LogProb(target, emitted));
    if ((request.record & kRecordRawLogprob) != 0) {
      record.raw_logprob[thread] = static_cast<float>(static_cast<double>(target.logits[emitted]) - target.raw_lse);
    }
    if ((request.record & kRecordEntropy) != 0) {
      const double weighted_log = SumAscending(entropy + static_cast<int64_t>(row) * num_blocks, num_blocks);
      record.entropy[thread] = static_cast<float>(fmax(0.0, log(target.total) - weighted_log / target.total));
    }
    if ((request.record & kRecordDraftLogprob) != 0) {
      record.draft_logprob[thread] = __uint_as_float(0x7fc00000u);
      if (thread < sequence.num_drafts) {
        const DeviceDistribution draft = params.slots.draft_rows[DraftRow(params.slots, slot, thread)];
        if (draft.finite != 0) record.draft_logprob[thread] = static_cast<float>(LogProb(draft, emitted));
      }
    }
  }
  if ((request.record & kRecordOverlap) == 0) return;
  for (int32_t place = 0; place < decision.num_reached; ++place) {
    const int32_t row = sequence.first_judged_row + place;
    const DeviceDistribution target = params.pass.target_rows[row];
    const DeviceDistribution draft = params.slots.draft_rows[DraftRow(params.slots, slot, place)];
    const uint32_t drafted = state.drafts[place];
    double overlap = 0.0;
    if (draft.finite == 0) {
      overlap = 0.0;
    } else if (request.temperature == 0.0f) {
      overlap = drafted == target.argmax ? 1.0 : 0.0;
    } else if (request.rule == VerifyRule::kTargetOnly) {
      overlap = ProbAt(target, static_cast<int32_t>(drafted));
    } else if (request.rule == VerifyRule::kRejection) {
      if (thread == 0) overlap = SumAscending(params.scratch.overlap + static_cast<int64_t>(row) * num_blocks, num_blocks);
    } else if (request.rule == VerifyRule::kCoupled) {
      overlap = CoupledOverlap(target, draft, vocab_size,
                               params.scratch.ratios + static_cast<int64_t>(sequence_idx) * 2 * kRatioBins, two_level.id_mass);
    }
    if (thread == 0) record.overlap[place] = overlap;
  }
}

// ---- Drafts ----

__device__ bool DrawsGumbel(const SlotRequest& request, const DeviceDistribution& draft) {
  return request.rule == VerifyRule::kCoupled && request.temperature != 0.0f && draft.finite != 0;
}

// The key of draft `depth`: AdvanceSlots has moved num_computed to the last emitted token.
__device__ RandomKey DraftKey(const SlotRequest& request, const SlotState& state, int32_t depth) {
  return KeyAt(request, state.num_computed + 1 + depth);
}

__global__ void __launch_bounds__(kChunkThreads) GumbelDrafts(Params params) {
  __shared__ GumbelShared s;
  const int32_t sequence_idx = blockIdx.y;
  if (params.pass.draft_from_row[sequence_idx] < 0) return;
  const int32_t slot = params.pass.sequences[sequence_idx].slot;
  const SlotRequest& request = params.slots.requests[slot];
  const DeviceDistribution draft = params.slots.draft_rows[DraftRow(params.slots, slot, params.depth)];
  if (!DrawsGumbel(request, draft)) return;
  const RandomKey key = DraftKey(request, params.slots.states[slot], params.depth);
  const Candidate best = BestOfChunk(draft, params.slots.vocab_size, static_cast<int32_t>(blockIdx.x), key, s);
  if (threadIdx.x == 0) {
    const int64_t index = static_cast<int64_t>(sequence_idx) * gridDim.x + blockIdx.x;
    params.scratch.gumbel_value[index] = best.value;
    params.scratch.gumbel_id[index] = best.id;
  }
}

__global__ void __launch_bounds__(kFinishThreads) DrawRows(Params params) {
  __shared__ TwoLevelShared s;
  const int32_t sequence_idx = blockIdx.x;
  const PassArrays& pass = params.pass;
  const PassSequence& sequence = pass.sequences[sequence_idx];
  const int32_t slot = sequence.slot, vocab_size = params.slots.vocab_size;
  bool drawn = false;
  int32_t token = 0;
  if (pass.draft_from_row[sequence_idx] >= 0) {
    const SlotRequest& request = params.slots.requests[slot];
    const int64_t draft_row = DraftRow(params.slots, slot, params.depth);
    const DeviceDistribution draft = params.slots.draft_rows[draft_row];
    drawn = draft.finite != 0;
    if (!drawn) {
      token = 0;
    } else if (request.temperature == 0.0f || request.rule == VerifyRule::kTargetOnly) {
      token = static_cast<int32_t>(draft.argmax);
    } else if (request.rule == VerifyRule::kCoupled) {
      const int32_t num_chunks = (vocab_size + kChunkIds - 1) / kChunkIds;
      const int64_t first = static_cast<int64_t>(sequence_idx) * num_chunks;
      token =
          static_cast<int32_t>(BestOfChunks(params.scratch.gumbel_value + first, params.scratch.gumbel_id + first, num_chunks));
    } else {
      const double* const sums = params.slots.draft_block_sums + draft_row * NumSamplingBlocks(vocab_size);
      const RandomKey key = DraftKey(request, params.slots.states[slot], params.depth);
      token = SampleInverseCdf(draft, sums, vocab_size, key, DrawPurpose::kDraft, s);
    }
  }
  __syncthreads();  // all have read what thread 0 now changes
  if (threadIdx.x != 0) return;
  const bool goes_on = drawn && params.depth + 1 < sequence.num_drafts_next;
  int32_t position = 0;
  if (drawn) {
    SlotState& state = params.slots.states[slot];
    const int32_t made = params.depth + 1;
    position = state.num_computed + made;
    state.drafts[params.depth] = static_cast<uint32_t>(token);
    state.num_drafts_made = made;
    state.num_drafts = max(0, min(made, params.slots.requests[slot].max_new_tokens - state.num_output - 1));
    pass.records[sequence_idx].num_drafts_made = made;
  }
  SequenceRows rows;
  rows.first_row = sequence_idx;
  rows.num_rows = rows.num_known_rows = goes_on ? 1 : 0;
  rows.first_position = goes_on ? position : 0;
  rows.first_page = slot < 0 ? 0 : slot * params.slots.max_pages;
  pass.mtp_rows[sequence_idx] = rows;
  pass.mtp_token_ids[sequence_idx] = goes_on ? static_cast<uint32_t>(token) : 0u;
  pass.mtp_row_sequence[sequence_idx] = goes_on ? sequence_idx : -1;
  pass.mtp_row_position[sequence_idx] = goes_on ? position : 0;
  pass.draft_from_row[sequence_idx] = goes_on ? sequence_idx : -1;
}

Params MakeParams(const SlotArrays& slots, const PassArrays& pass, int32_t depth, int64_t num_rows, Stream& stream) {
  BEBOP_CHECK(slots.vocab_size >= 1 && slots.vocab_size <= kMaxDecodeVocabSize && num_rows <= kMaxDecodeRows);
  BEBOP_CHECK(slots.max_drafts <= kMaxDecodeDrafts);
  Params params = {slots, pass, depth, {}};
  const int64_t bytes = LayOut(pass.num_sequences, num_rows, slots.max_drafts > 0, slots.vocab_size,
                               static_cast<char*>(stream.workspace()), &params.scratch);
  BEBOP_CHECK(bytes <= stream.workspace_bytes());
  return params;
}

}  // namespace

void VerifyRows(const SlotArrays& slots, const PassArrays& pass, Stream& stream) {
  if (pass.num_sequences == 0) return;
  const Params params = MakeParams(slots, pass, 0, pass.num_judged, stream);
  const dim3 chunks(static_cast<unsigned>(NumChunks(slots.vocab_size)), static_cast<unsigned>(pass.num_judged));
  if (pass.num_judged > 0) {
    BEBOP_CUDA_TRY(stream, gpu::Launch(GumbelRows, chunks, kChunkThreads, 0, stream.handle(), params));
    BEBOP_CUDA_TRY(stream, gpu::Launch(VocabularyRows, chunks, kChunkThreads, 0, stream.handle(), params));
  }
  BEBOP_CUDA_TRY(stream, gpu::Launch(FinishSequences, dim3(static_cast<unsigned>(pass.num_sequences)), kFinishThreads, 0,
                                     stream.handle(), params));
}

void DrawDrafts(const SlotArrays& slots, const PassArrays& pass, int32_t depth, Stream& stream) {
  BEBOP_CHECK(depth >= 0 && depth < slots.max_drafts);
  if (pass.num_sequences == 0) return;
  const Params params = MakeParams(slots, pass, depth, pass.num_sequences, stream);
  const unsigned num_sequences = static_cast<unsigned>(pass.num_sequences);
  const dim3 chunks(static_cast<unsigned>(NumChunks(slots.vocab_size)), num_sequences);
  BEBOP_CUDA_TRY(stream, gpu::Launch(GumbelDrafts, chunks, kChunkThreads, 0, stream.handle(), params));
  BEBOP_CUDA_TRY(stream, gpu::Launch(DrawRows, dim3(num_sequences), kFinishThreads, 0, stream.handle(), params));
}

}  // namespace cuda

int64_t VerifyScratchBytes(int32_t num_sequences, int32_t num_drafts, int32_t vocab_size) {
  cuda::Scratch scratch;
  return cuda::LayOut(num_sequences, int64_t{num_sequences} * (num_drafts + 1), num_drafts > 0, vocab_size, nullptr, &scratch);
}

}  // namespace bebop
