// SPDX-License-Identifier: Apache-2.0
// The device's step loop against the engine's own parts: engine/schedule's Sequence says what a pass does and what becomes of its
// outcome, cpu::Transform, Verify and DrawDraft say what comes out. Sequences of all modes move through slots for many passes
// over random logits; after each pass every integer must be equal, and floats equal but for the last bits.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/schedule/sequence.h"
#include "engine/schedule/weight_epochs.h"
#include "engine/speculative/verify.h"
#include "gtest/gtest.h"
#include "kernels/decode/decode.h"
#include "tests/kernels/cuda_test_util.h"

namespace bebop {
namespace {

using testing::DeviceArray;
using testing::Random;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int32_t kPageTokens = 4;
constexpr int32_t kMaxPages = 64;
constexpr int32_t kNumSamples = 3;  // of a request; one of them is in a slot

static_assert(static_cast<int32_t>(VerifyRule::kOff) == static_cast<int32_t>(SpeculationMode::kOff));
static_assert(static_cast<int32_t>(VerifyRule::kTargetOnly) == static_cast<int32_t>(SpeculationMode::kTargetOnly));
static_assert(static_cast<int32_t>(VerifyRule::kRejection) == static_cast<int32_t>(SpeculationMode::kRejection));
static_assert(static_cast<int32_t>(VerifyRule::kCoupled) == static_cast<int32_t>(SpeculationMode::kCoupled));
static_assert(kMaxDecodeDrafts == kMaxDraftTokens);

// A distribution and its weights.
struct OwnedDistribution {
  std::vector<float> weight;
  std::vector<double> block_sum;
  TokenDistribution view;
};

// A sequence in a slot, and what the CPU's executor would hold for it.
struct Live {
  std::unique_ptr<Group> group;
  Sequence* sequence = nullptr;
  uint64_t residency = 0;
  int32_t slot = -1;
  bool in_first_pass = true;  // since it entered or lost its memory: no state to read
  std::vector<OwnedDistribution> drafts;
  uint32_t tokens[kMaxDraftTokens] = {};
};

struct Scenario {
  int32_t vocab_size = 5;
  int32_t num_slots = 4;
  int32_t max_drafts = 3;
  int32_t num_passes = 30;
  uint64_t seed = 1;
  bool broken_rows = true;
  std::optional<SpeculationMode> mode = {};  // of all requests
};

// What AdvanceSlots and DrawDrafts must write about the MTP passes of one sequence.
struct ExpectedMtp {
  int32_t num_rows = 0, first_position = 0;
  std::vector<uint32_t> tokens;
};

class Loop {
 public:
  Loop(const Scenario& scenario, cuda::Stream& stream)
      : scenario_(scenario),
        stream_(stream),
        random_(scenario.seed),
        num_blocks_(NumSamplingBlocks(scenario.vocab_size)),
        max_sequences_(scenario.num_slots + 2),
        max_rows_(std::max(max_sequences_ * (scenario.max_drafts + 1), 64)),
        base_(random_.Normals(scenario.vocab_size, 2.0f)),
        live_(static_cast<size_t>(scenario.num_slots)),
        requests_(scenario.num_slots),
        states_(std::vector<SlotState>(static_cast<size_t>(scenario.num_slots))),
        stop_ids_(int64_t{scenario.num_slots} * kMaxStopIds),
        banned_ids_(int64_t{scenario.num_slots} * kMaxBannedIds),
        page_ids_(int64_t{scenario.num_slots} * kMaxPages),
        draft_logits_(int64_t{scenario.num_slots} * scenario.max_drafts * scenario.vocab_size),
        draft_rows_(int64_t{scenario.num_slots} * scenario.max_drafts),
        draft_sums_(int64_t{scenario.num_slots} * scenario.max_drafts * num_blocks_),
        sequences_(max_sequences_),
        rows_(max_sequences_),
        mtp_rows_(max_sequences_),
        token_ids_(max_rows_),
        mtp_token_ids_(max_rows_),
        row_sequence_(max_rows_),
        row_position_(max_rows_),
        mtp_row_sequence_(max_rows_),
        mtp_row_position_(max_rows_),
        judged_row_(max_rows_),
        judged_sequence_(max_rows_),
        draft_from_row_(max_sequences_),
        slot_of_row_(max_sequences_),
        logits_(int64_t{max_rows_} * scenario.vocab_size),
        target_rows_(max_rows_),
        target_sums_(int64_t{max_rows_} * num_blocks_),
        records_(max_sequences_),
        scratch_(TransformScratchBytes(max_rows_, scenario.vocab_size)),
        sequence_number_(std::vector<uint64_t>{0}) {
    slots_.num_slots = scenario.num_slots;
    slots_.max_drafts = scenario.max_drafts;
    slots_.vocab_size = scenario.vocab_size;
    slots_.max_pages = kMaxPages;
    slots_.page_tokens = kPageTokens;
    slots_.requests = requests_.data();
    slots_.states = states_.data();
    slots_.stop_ids = stop_ids_.data();
    slots_.banned_ids = banned_ids_.data();
    slots_.page_ids = page_ids_.data();
    slots_.draft_logits = draft_logits_.data();
    slots_.draft_rows = draft_rows_.data();
    slots_.draft_block_sums = draft_sums_.data();
    pass_.num_drafts = scenario.max_drafts;
    pass_.sequences = sequences_.data();
    pass_.rows = rows_.data();
    pass_.token_ids = token_ids_.data();
    pass_.row_sequence = row_sequence_.data();
    pass_.row_position = row_position_.data();
    pass_.judged_row = judged_row_.data();
    pass_.judged_sequence = judged_sequence_.data();
    pass_.logits = logits_.data();
    pass_.target_rows = target_rows_.data();
    pass_.target_block_sums = target_sums_.data();
    pass_.mtp_rows = mtp_rows_.data();
    pass_.mtp_token_ids = mtp_token_ids_.data();
    pass_.mtp_row_sequence = mtp_row_sequence_.data();
    pass_.mtp_row_position = mtp_row_position_.data();
    pass_.draft_from_row = draft_from_row_.data();
    pass_.records = records_.data();
    EXPECT_EQ(cudaMallocHost(reinterpret_cast<void**>(&host_records_), sizeof(StepRecord) * static_cast<size_t>(max_sequences_)),
              cudaSuccess);
    EXPECT_EQ(cudaMallocHost(reinterpret_cast<void**>(&number_memory_), sizeof(uint64_t)), cudaSuccess);
    host_number_ = number_memory_;
    *host_number_ = 0;
  }
  ~Loop() {
    EXPECT_EQ(cudaFreeHost(host_records_), cudaSuccess);
    EXPECT_EQ(cudaFreeHost(number_memory_), cudaSuccess);
  }
  Loop(const Loop&) = delete;
  Loop& operator=(const Loop&) = delete;

  void Run() {
    for (int32_t i = 0; i < scenario_.num_passes && !::testing::Test::HasFailure(); ++i) {
      SCOPED_TRACE(::testing::Message() << "pass " << i);
      for (int32_t slot = 0; slot < scenario_.num_slots; ++slot) {
        if (live_[slot].sequence == nullptr && random_.Below(3) > 0) MoveIn(slot);
        if (live_[slot].sequence != nullptr && random_.Below(12) == 0) LoseMemory(slot);
      }
      bool some_prefill = false;
      for (const Live& live : live_) some_prefill |= live.sequence != nullptr && !live.sequence->is_decoding();
      if (some_prefill) PrefillPass();
      if (!::testing::Test::HasFailure()) DecodePass();
    }
    // The scenario did something.
    EXPECT_GT(num_emitted_, 0);
    for (const auto untouched : {requests_.GuardsUntouched(), states_.GuardsUntouched(), draft_logits_.GuardsUntouched(),
                                 draft_rows_.GuardsUntouched(), draft_sums_.GuardsUntouched(), sequences_.GuardsUntouched(),
                                 rows_.GuardsUntouched(), mtp_rows_.GuardsUntouched(), token_ids_.GuardsUntouched(),
                                 mtp_token_ids_.GuardsUntouched(), logits_.GuardsUntouched(), target_rows_.GuardsUntouched(),
                                 target_sums_.GuardsUntouched(), records_.GuardsUntouched(), scratch_.GuardsUntouched()}) {
      EXPECT_TRUE(untouched);
    }
  }

  // What happened, to see that scenarios are not empty.
  int64_t num_emitted() const { return num_emitted_; }
  int64_t num_accepted() const { return num_accepted_; }
  int64_t num_rejected() const { return num_rejected_; }
  int64_t num_non_finite() const { return num_non_finite_; }
  int64_t num_restored() const { return num_restored_; }
  int64_t num_without_pages() const { return num_without_pages_; }

 private:
  // ---- The host's part: sequences and slots ----

  GenerateRequest RandomRequest() {
    constexpr float kTemperatures[] = {1.0f, 1.0f, 0.7f, 1.3f, 0.0f};
    constexpr float kTopP[] = {1.0f, 1.0f, 0.9f, 0.5f};
    constexpr float kMinP[] = {0.0f, 0.0f, 0.05f};
    constexpr double kSynthetic[] = {-1.0, -1.0, -1.0, -1.0, 0.0, 0.5, 1.0};
    GenerateRequest request;
    request.num_samples = kNumSamples;
    for (int32_t i = 1 + random_.Below(9); i > 0; --i) request.prompt.push_back(RandomToken());
    request.sampling.temperature = kTemperatures[random_.Below(5)];
    request.sampling.top_p = kTopP[random_.Below(4)];
    request.sampling.min_p = kMinP[random_.Below(3)];
    request.sampling.top_k = random_.Below(3) == 0 ? 1 + random_.Below(30) : 0;
    request.sampling.seed = random_.Next();
    request.stopping.max_new_tokens = 1 + random_.Below(24);
    request.stopping.min_new_tokens = random_.Below(2) * random_.Below(5);
    for (int32_t i = random_.Below(3); i > 0; --i) request.stopping.stop_token_ids.push_back(RandomToken());
    request.speculation.mode = scenario_.mode.value_or(static_cast<SpeculationMode>(random_.Below(4)));
    if (request.speculation.mode != SpeculationMode::kOff) {
      request.speculation.num_draft_tokens = random_.Below(5) == 0 ? 0 : 1 + random_.Below(scenario_.max_drafts);
    }
    request.speculation.synthetic_acceptance = kSynthetic[random_.Below(7)];
    const auto wanted = [&] { return random_.Below(3) == 0; };
    request.output.logprobs = wanted();
    request.output.raw_logprobs = wanted();
    request.output.entropy = wanted();
    request.output.draft_logprobs = wanted();
    request.output.spec_detail = wanted();
    return request;
  }
  uint32_t RandomToken() { return static_cast<uint32_t>(random_.Below(scenario_.vocab_size)); }

  void MoveIn(int32_t slot) {
    Live& live = live_[slot];
    live.group = std::make_unique<Group>(RandomRequest(), std::vector<uint32_t>{}, nullptr);
    live.sequence = &live.group->samples[static_cast<size_t>(slot) % kNumSamples];
    live.slot = slot;
    live.drafts.resize(static_cast<size_t>(scenario_.max_drafts));
    const GenerateRequest& request = live.group->request;
    SlotRequest out;
    out.seed = request.sampling.seed;
    out.sample_index = static_cast<uint32_t>(live.sequence->sample_index());
    out.rule = static_cast<VerifyRule>(request.speculation.mode);
    out.temperature = request.sampling.temperature;
    out.top_p = request.sampling.top_p;
    out.min_p = request.sampling.min_p;
    out.top_k = request.sampling.top_k;
    out.num_draft_tokens = live.group->num_draft_tokens;
    out.max_new_tokens = request.stopping.max_new_tokens;
    out.min_new_tokens = request.stopping.min_new_tokens;
    out.record = (request.output.logprobs ? kRecordLogprob : 0u) | (request.output.raw_logprobs ? kRecordRawLogprob : 0u) |
                 (request.output.entropy ? kRecordEntropy : 0u) | (request.output.draft_logprobs ? kRecordDraftLogprob : 0u) |
                 (request.output.spec_detail ? kRecordOverlap : 0u);
    const std::vector<uint32_t>& stop_ids = live.group->rules.stop_ids();
    out.num_stop_ids = static_cast<int32_t>(stop_ids.size());
    out.num_banned_ids = static_cast<int32_t>(live.group->banned_before_min.size());
    out.synthetic_acceptance = request.speculation.synthetic_acceptance;
    Write(requests_, slot, out);
    for (size_t i = 0; i < stop_ids.size(); ++i)
      Write(stop_ids_, int64_t{slot} * kMaxStopIds + static_cast<int64_t>(i), stop_ids[i]);
    for (size_t i = 0; i < live.group->banned_before_min.size(); ++i) {
      Write(banned_ids_, int64_t{slot} * kMaxBannedIds + static_cast<int64_t>(i), live.group->banned_before_min[i]);
    }
    WriteState(slot);
  }

  // The state of a sequence with nothing computed.
  void WriteState(int32_t slot) {
    Live& live = live_[slot];
    live.residency = ++last_residency_;
    live.in_first_pass = true;
    SlotState state;
    state.residency = live.residency;
    state.stopped = 0;
    state.num_output = live.sequence->num_output();
    state.state_src = -1;
    state.state_dst = slot + 100;
    state.num_pages = kMaxPages;
    Write(states_, slot, state);
  }

  void LoseMemory(int32_t slot) {
    if (live_[slot].sequence->num_drafts() > 0) ++num_restored_;
    live_[slot].sequence->Reset();
    WriteState(slot);
  }

  template <typename T>
  static void Write(const DeviceArray<T>& array, int64_t index, const T& value) {
    ASSERT_LT(index, array.count());
    ASSERT_EQ(cudaMemcpy(array.data() + index, &value, sizeof(T), cudaMemcpyHostToDevice), cudaSuccess);
  }
  template <typename T>
  static void WriteAll(const DeviceArray<T>& array, const std::vector<T>& values) {
    ASSERT_LE(static_cast<int64_t>(values.size()), array.count());
    ASSERT_EQ(cudaMemcpy(array.data(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), cudaSuccess);
  }

  // Rows of logits that resemble each other, so that drafts are accepted now and then; some with ties, few broken.
  std::vector<float> RandomLogits(int32_t num_rows) {
    std::vector<float> logits;
    logits.reserve(static_cast<size_t>(num_rows) * base_.size());
    for (int32_t row = 0; row < num_rows; ++row) {
      const bool coarse = random_.Below(4) == 0;
      const float noise = random_.Below(3) == 0 ? 0.0f : 0.7f;
      for (const float value : base_) {
        const float logit = value + noise * random_.Normal();
        logits.push_back(coarse ? std::round(logit) : logit);
      }
      if (!scenario_.broken_rows || random_.Below(40) != 0) continue;
      constexpr float kBroken[] = {testing::kNan, kInfinity};
      logits[logits.size() - 1 - random_.Below(scenario_.vocab_size)] = kBroken[random_.Below(2)];
    }
    return logits;
  }

  // ---- The reference ----

  void Transform(const Live& live, int32_t output_idx, const float* logits, OwnedDistribution* out) {
    const GenerateRequest& request = live.group->request;
    out->weight.assign(base_.size(), 0.0f);
    out->block_sum.assign(static_cast<size_t>(num_blocks_), 0.0);
    out->view = TokenDistribution{};
    out->view.weight = out->weight.data();
    out->view.block_sum = out->block_sum.data();
    std::vector<float> scratch(base_.size());
    TransformArgs args;
    args.logits = logits;
    args.vocab_size = scenario_.vocab_size;
    args.temperature = request.sampling.temperature;
    args.top_k = request.sampling.top_k;
    args.top_p = request.sampling.top_p;
    args.min_p = request.sampling.min_p;
    if (output_idx < request.stopping.min_new_tokens) args.banned_ids = live.group->banned_before_min;
    args.want_raw_lse = request.output.raw_logprobs;
    args.scratch = scratch.data();
    const bool reports = request.output.logprobs || request.output.entropy || request.output.draft_logprobs;
    cpu::Transform(reports ? ReportTransformArgs(args) : args, &out->view);
  }

  // ModelExecutor::VerifySequence.
  void Verify(const Live& live, const Pass& pass, const float* logits, SequenceOutcome* outcome) {
    const GenerateRequest& request = live.group->request;
    const bool greedy = request.sampling.greedy();
    const int32_t num_rows = pass.num_drafts + 1;
    std::vector<OwnedDistribution> owned(static_cast<size_t>(num_rows));
    std::vector<TokenDistribution> target, draft;
    for (int32_t i = 0; i < num_rows; ++i) {
      Transform(live, live.sequence->num_output() + i, logits + int64_t{i} * scenario_.vocab_size, &owned[i]);
      target.push_back(owned[i].view);
    }
    for (int32_t i = 0; i < pass.num_drafts; ++i) draft.push_back(live.drafts[i].view);
    VerifyArgs args;
    args.mode = request.speculation.mode;
    args.greedy = greedy;
    args.drafts = {live.tokens, static_cast<size_t>(pass.num_drafts)};
    args.target = target;
    args.draft = draft;
    args.synthetic_acceptance = request.speculation.synthetic_acceptance;
    PhiloxDraws draws(RandomKey{request.sampling.seed, static_cast<uint32_t>(live.sequence->sample_index()),
                                static_cast<uint32_t>(live.sequence->num_computed() + pass.num_known)});
    const VerifyOutcome verified = bebop::Verify(args, draws);
    outcome->num_emitted = verified.num_emitted;
    outcome->num_accepted = verified.num_accepted;
    outcome->num_reached = verified.num_reached;
    outcome->non_finite = verified.non_finite;
    for (int32_t i = 0; i < verified.num_reached && request.output.spec_detail; ++i) {
      outcome->overlap[i] = ExpectedAcceptance(args.mode, greedy, args.drafts[i], target[i], draft[i]);
    }
    for (int32_t i = 0; i < verified.num_emitted; ++i) {
      const uint32_t token = verified.tokens[i];
      outcome->tokens[i] = token;
      outcome->source[i] = verified.source[i];
      if (request.output.logprobs) outcome->logprob[i] = static_cast<float>(LogProb(target[i], token));
      if (request.output.entropy) outcome->entropy[i] = static_cast<float>(cpu::Entropy(target[i]));
      if (request.output.raw_logprobs) {
        outcome->raw_logprob[i] = static_cast<float>(RawLogProb(target[i], logits + int64_t{i} * scenario_.vocab_size, token));
      }
      if (request.output.draft_logprobs) {
        outcome->draft_logprob[i] =
            i < pass.num_drafts && draft[i].finite ? static_cast<float>(LogProb(draft[i], token)) : testing::kNan;
      }
    }
  }

  // ModelExecutor::Draft for one sequence; logits[d] is its row at depth d.
  void Draft(Live& live, const Pass& pass, const std::vector<const float*>& logits, SequenceOutcome* outcome) {
    const int32_t num_last = pass.sample ? outcome->num_emitted : 1;
    const uint32_t first_position = static_cast<uint32_t>(live.sequence->num_computed() + pass.num_known + num_last);
    for (int32_t depth = 0; depth < pass.num_drafts_next; ++depth) {
      Transform(live, live.sequence->num_output() + outcome->num_emitted + depth, logits[depth], &live.drafts[depth]);
      if (!live.drafts[depth].view.finite) return;
      PhiloxDraws draws(
          RandomKey{live.group->request.sampling.seed, static_cast<uint32_t>(live.sequence->sample_index()), first_position});
      live.tokens[depth] = DrawDraft(live.group->request.speculation.mode, live.group->request.sampling.greedy(),
                                     live.drafts[depth].view, depth, draws);
      outcome->num_drafts_made = depth + 1;
    }
  }

  // ---- Passes ----

  // What a pass over B sequences must bring about; entry b is null for padding and no-ops.
  struct Expected {
    Live* live = nullptr;
    int32_t slot = -1;
    Pass pass;
    int32_t first_row = 0, first_judged_row = 0;
    int32_t num_computed = 0;
    std::optional<uint32_t> next_known;
    SequenceOutcome outcome;
    FinishReason finish = FinishReason::kNone;
    ExpectedMtp mtp;
  };

  void DecodePass() {
    const int32_t num_sequences = scenario_.num_slots + 1, rows_each = scenario_.max_drafts + 1;
    // A random order of the slots with one padded place; slots that wait for prefill stay out.
    std::vector<int32_t> slot_of_row(static_cast<size_t>(num_sequences), -1);
    for (int32_t slot = 0; slot < scenario_.num_slots; ++slot) slot_of_row[slot] = slot;
    for (int32_t i = num_sequences - 1; i > 0; --i) std::swap(slot_of_row[i], slot_of_row[random_.Below(i + 1)]);
    std::vector<Expected> expected(static_cast<size_t>(num_sequences));
    for (int32_t b = 0; b < num_sequences; ++b) {
      int32_t& slot = slot_of_row[b];
      Expected& entry = expected[b];
      entry.first_row = entry.first_judged_row = b * rows_each;
      if (slot >= 0 && live_[slot].sequence != nullptr && !live_[slot].sequence->is_decoding()) slot = -1;
      entry.slot = slot;
      if (slot < 0 || live_[slot].sequence == nullptr) continue;  // a stopped slot is a no-op
      Live& live = live_[slot];
      entry.pass = live.sequence->NextPass(1);
      const int32_t needed = (entry.pass.num_positions + kPageTokens - 1) / kPageTokens;
      const bool fits = random_.Below(6) != 0;
      SlotState state = states_.Download()[slot];
      state.num_pages = fits ? needed : needed - 1;
      Write(states_, slot, state);
      if (fits) {
        entry.live = &live;
        // A draft whose row was not finite: rejected, whoever made it.
        if (scenario_.broken_rows && entry.pass.num_drafts > 0 && random_.Below(10) == 0) {
          const int32_t place = random_.Below(entry.pass.num_drafts);
          live.drafts[place].view.finite = false;
          const int64_t row = int64_t{slot} * scenario_.max_drafts + place;
          DeviceDistribution draft = draft_rows_.Download()[row];
          draft.finite = 0;
          Write(draft_rows_, row, draft);
        }
      } else {
        ++num_without_pages_;
      }
    }
    WriteAll(slot_of_row_, slot_of_row);
    pass_.num_sequences = num_sequences;
    pass_.num_rows = pass_.num_judged = num_sequences * rows_each;
    cuda::BeginDecode(slots_, pass_, slot_of_row_.data(), stream_);
    CheckTargetRows(expected);
    RunPass(expected);
  }

  void PrefillPass() {
    std::vector<Expected> expected;
    std::vector<PassSequence> sequences;
    std::vector<SequenceRows> rows;
    std::vector<uint32_t> token_ids;
    std::vector<int32_t> row_sequence, row_position, judged_row, judged_sequence;
    for (Live& live : live_) {
      if (live.sequence == nullptr || live.sequence->is_decoding()) continue;
      const int32_t b = static_cast<int32_t>(expected.size());
      Expected entry;
      entry.live = &live;
      entry.slot = live.slot;
      entry.pass = live.sequence->NextPass(1 + random_.Below(6));
      entry.first_row = static_cast<int32_t>(token_ids.size());
      entry.first_judged_row = static_cast<int32_t>(judged_row.size());
      const int32_t first = live.sequence->num_computed(), end = first + entry.pass.num_known;
      for (int32_t t = first; t < end; ++t) {
        token_ids.push_back(live.sequence->token(t));
        row_sequence.push_back(b);
        row_position.push_back(t);
      }
      if (entry.pass.sample) {
        judged_row.push_back(static_cast<int32_t>(token_ids.size()) - 1);
        judged_sequence.push_back(b);
      } else {
        // A chunk may also end where nobody knows yet what follows: then its last row gets no MTP entry.
        if (end + 1 == live.sequence->num_tokens() || random_.Below(8) != 0) entry.next_known = live.sequence->token(end);
      }
      PassSequence sequence;
      sequence.slot = live.slot;
      sequence.first_row = entry.first_row;
      sequence.num_known = entry.pass.num_known;
      sequence.sample = entry.pass.sample ? 1 : 0;
      sequence.first_judged_row = entry.first_judged_row;
      sequence.num_drafts_next = entry.pass.num_drafts_next;
      sequence.has_next_known = entry.next_known.has_value() ? 1 : 0;
      sequence.next_known_token = entry.next_known.value_or(0);
      sequences.push_back(sequence);
      SequenceRows target;
      target.first_row = entry.first_row;
      target.num_rows = target.num_known_rows = entry.pass.num_known;
      target.first_position = first;
      target.state_src = live.in_first_pass ? -1 : live.slot + 100;
      target.state_dst = live.slot + 100;
      target.first_page = live.slot * kMaxPages;
      rows.push_back(target);
      expected.push_back(entry);
    }
    // A padded sequence and padded rows.
    expected.push_back({});
    sequences.push_back({});
    rows.push_back({});
    for (int32_t i = 0; i < 3; ++i) {
      token_ids.push_back(0);
      row_sequence.push_back(-1);
      row_position.push_back(0);
    }
    judged_row.push_back(-1);
    judged_sequence.push_back(-1);
    WriteAll(sequences_, sequences);
    WriteAll(rows_, rows);
    WriteAll(token_ids_, token_ids);
    WriteAll(row_sequence_, row_sequence);
    WriteAll(row_position_, row_position);
    WriteAll(judged_row_, judged_row);
    WriteAll(judged_sequence_, judged_sequence);
    pass_.num_sequences = static_cast<int32_t>(sequences.size());
    pass_.num_rows = static_cast<int32_t>(token_ids.size());
    pass_.num_judged = static_cast<int32_t>(judged_row.size());
    RunPass(expected);
  }

  // What BeginDecode wrote.
  void CheckTargetRows(const std::vector<Expected>& expected) {
    const std::vector<PassSequence> sequences = sequences_.Download();
    const std::vector<SequenceRows> rows = rows_.Download();
    const std::vector<uint32_t> token_ids = token_ids_.Download();
    const std::vector<int32_t> row_sequence = row_sequence_.Download(), row_position = row_position_.Download();
    const std::vector<int32_t> judged_row = judged_row_.Download(), judged_sequence = judged_sequence_.Download();
    const std::vector<SlotState> states = states_.Download();
    const int32_t rows_each = scenario_.max_drafts + 1;
    for (int32_t b = 0; b < pass_.num_sequences; ++b) {
      SCOPED_TRACE(::testing::Message() << "sequence " << b);
      const Expected& entry = expected[b];
      const bool runs = entry.live != nullptr;
      const int32_t num_rows = runs ? entry.pass.num_rows() : 0;
      ASSERT_EQ(sequences[b].slot, entry.slot);
      ASSERT_EQ(sequences[b].num_known, runs ? 1 : 0);
      ASSERT_EQ(rows[b].num_rows, num_rows);
      if (runs) {
        ASSERT_EQ(sequences[b].num_drafts, entry.pass.num_drafts);
        ASSERT_EQ(sequences[b].sample, 1);
        ASSERT_EQ(sequences[b].num_drafts_next, entry.pass.num_drafts_next);
        ASSERT_EQ(sequences[b].first_row, entry.first_row);
        ASSERT_EQ(sequences[b].first_judged_row, entry.first_judged_row);
        ASSERT_EQ(sequences[b].has_next_known, 0);
        ASSERT_EQ(rows[b].first_row, entry.first_row);
        ASSERT_EQ(rows[b].num_known_rows, 1);
        ASSERT_EQ(rows[b].num_replay_rows, entry.live->sequence->num_replay());
        ASSERT_EQ(rows[b].first_position, entry.live->sequence->num_computed());
        ASSERT_EQ(rows[b].first_page, entry.slot * kMaxPages);
        ASSERT_EQ(rows[b].state_src, entry.slot + 100);
        ASSERT_EQ(rows[b].state_dst, entry.slot + 100);
      }
      for (int32_t i = 0; i < rows_each; ++i) {
        const int32_t row = b * rows_each + i;
        const bool valid = i < num_rows;
        ASSERT_EQ(row_sequence[row], valid ? b : -1);
        ASSERT_EQ(judged_row[row], valid ? row : -1);
        ASSERT_EQ(judged_sequence[row], valid ? b : -1);
        if (!valid) continue;
        const Sequence& sequence = *entry.live->sequence;
        ASSERT_EQ(row_position[row], sequence.num_computed() + i);
        ASSERT_EQ(token_ids[row], i == 0 ? sequence.token(sequence.num_computed()) : entry.live->tokens[i - 1]);
      }
    }
  }

  // The pass itself, on the device and by the reference, and every comparison.
  void RunPass(std::vector<Expected>& expected) {
    const int64_t vocab_size = scenario_.vocab_size;
    const std::vector<float> target_logits = RandomLogits(pass_.num_judged);
    std::vector<std::vector<float>> draft_logits;
    for (int32_t depth = 0; depth < scenario_.max_drafts; ++depth) draft_logits.push_back(RandomLogits(pass_.num_sequences));

    for (int32_t b = 0; b < pass_.num_sequences; ++b) {
      Expected& entry = expected[b];
      if (entry.live == nullptr) continue;
      Live& live = *entry.live;
      entry.num_computed = live.sequence->num_computed();
      if (entry.pass.sample) Verify(live, entry.pass, target_logits.data() + entry.first_judged_row * vocab_size, &entry.outcome);
      FillMtp(&entry);
      if (entry.mtp.num_rows > 0) {
        std::vector<const float*> logits;
        for (const std::vector<float>& rows : draft_logits) logits.push_back(rows.data() + b * vocab_size);
        Draft(live, entry.pass, logits, &entry.outcome);
      }
      SpecCounts counts;
      entry.finish = live.sequence->Apply(entry.pass, entry.outcome, WeightEpochs(), &counts);
      if (entry.finish != FinishReason::kNone) {  // the device makes no drafts that nobody will verify
        entry.outcome.num_drafts_made = 0;
        entry.mtp = {};
      }
      live.in_first_pass = false;
      num_emitted_ += entry.outcome.num_emitted;
      num_accepted_ += entry.outcome.num_accepted;
      num_rejected_ += entry.outcome.num_reached - entry.outcome.num_accepted;
      num_non_finite_ += entry.outcome.non_finite ? 1 : 0;
    }

    const std::vector<SlotState> states_before = states_.Download();
    WriteAll(logits_, target_logits);
    TransformRowsArgs transform = {slots_, pass_, -1, logits_.data(), scratch_.data()};
    cuda::TransformRows(transform, stream_);
    cuda::VerifyRows(slots_, pass_, stream_);
    CheckRecords(expected, records_.Download().data(), false);
    cuda::AdvanceSlots(slots_, pass_, stream_);
    CheckExtend(expected);
    for (int32_t depth = 0; depth < scenario_.max_drafts; ++depth) {
      WriteAll(logits_, draft_logits[depth]);
      transform.draft_depth = depth;
      cuda::TransformRows(transform, stream_);
      cuda::DrawDrafts(slots_, pass_, depth, stream_);
      CheckDraftStep(expected, depth);
      if (::testing::Test::HasFailure()) return;
    }
    cuda::PublishRecords(slots_, pass_, host_records_, sequence_number_.data(), host_number_, stream_);
    ASSERT_EQ(cudaStreamSynchronize(stream_.handle()), cudaSuccess);
    ASSERT_EQ(*host_number_, ++num_passes_);
    ASSERT_EQ(sequence_number_.Download()[0], num_passes_);
    CheckRecords(expected, host_records_, true);
    CheckStates(expected, states_before);
    for (const Expected& entry : expected) {
      if (entry.live != nullptr && entry.finish != FinishReason::kNone) *entry.live = Live{};
    }
  }

  // ModelExecutor::ExtendMtp.
  static void FillMtp(Expected* entry) {
    const Live& live = *entry->live;
    if (live.group->num_draft_tokens == 0 || entry->outcome.non_finite) return;
    const bool next_is_known = entry->pass.sample || entry->next_known.has_value();
    const int32_t num_known = entry->pass.num_known;
    const int32_t num_certain = num_known + entry->outcome.num_accepted - (next_is_known ? 0 : 1);
    if (num_certain <= 0) return;
    entry->mtp.num_rows = num_certain;
    entry->mtp.first_position = entry->num_computed + 1;
    for (int32_t row = 0; row < num_certain; ++row) {
      const int32_t next = row + 1;
      if (next < num_known) {
        entry->mtp.tokens.push_back(live.sequence->token(entry->num_computed + next));
      } else {
        entry->mtp.tokens.push_back(entry->pass.sample ? entry->outcome.tokens[next - num_known] : *entry->next_known);
      }
    }
  }

  void CheckExtend(const std::vector<Expected>& expected) {
    const std::vector<SequenceRows> rows = mtp_rows_.Download();
    const std::vector<uint32_t> token_ids = mtp_token_ids_.Download();
    const std::vector<int32_t> row_sequence = mtp_row_sequence_.Download(), row_position = mtp_row_position_.Download();
    const std::vector<int32_t> from_row = draft_from_row_.Download();
    std::vector<int32_t> wanted(static_cast<size_t>(pass_.num_rows), -1);
    for (int32_t b = 0; b < pass_.num_sequences; ++b) {
      SCOPED_TRACE(::testing::Message() << "MTP rows of sequence " << b);
      const Expected& entry = expected[b];
      ASSERT_EQ(rows[b].num_rows, entry.mtp.num_rows);
      const bool drafts = entry.mtp.num_rows > 0 && entry.pass.num_drafts_next > 0;
      ASSERT_EQ(from_row[b], drafts ? entry.first_row + entry.mtp.num_rows - 1 : -1);
      if (entry.mtp.num_rows == 0) continue;
      ASSERT_EQ(rows[b].first_row, entry.first_row);
      ASSERT_EQ(rows[b].num_known_rows, entry.mtp.num_rows);
      ASSERT_EQ(rows[b].num_replay_rows, 0);
      ASSERT_EQ(rows[b].first_position, entry.mtp.first_position);
      ASSERT_EQ(rows[b].first_page, entry.slot * kMaxPages);
      for (int32_t i = 0; i < entry.mtp.num_rows; ++i) {
        wanted[entry.first_row + i] = b;
        ASSERT_EQ(token_ids[entry.first_row + i], entry.mtp.tokens[i]) << i;
        ASSERT_EQ(row_position[entry.first_row + i], entry.mtp.first_position + i);
      }
    }
    for (int32_t row = 0; row < pass_.num_rows; ++row) ASSERT_EQ(row_sequence[row], wanted[row]) << "row " << row;
  }

  void CheckDraftStep(const std::vector<Expected>& expected, int32_t depth) {
    const std::vector<SequenceRows> rows = mtp_rows_.Download();
    const std::vector<uint32_t> token_ids = mtp_token_ids_.Download();
    const std::vector<int32_t> row_sequence = mtp_row_sequence_.Download(), row_position = mtp_row_position_.Download();
    const std::vector<int32_t> from_row = draft_from_row_.Download();
    for (int32_t b = 0; b < pass_.num_sequences; ++b) {
      SCOPED_TRACE(::testing::Message() << "draft step " << depth << " of sequence " << b);
      const Expected& entry = expected[b];
      const bool goes_on = entry.outcome.num_drafts_made > depth && entry.pass.num_drafts_next > depth + 1;
      ASSERT_EQ(rows[b].num_rows, goes_on ? 1 : 0);
      ASSERT_EQ(row_sequence[b], goes_on ? b : -1);
      ASSERT_EQ(from_row[b], goes_on ? b : -1);
      if (!goes_on) continue;
      const int32_t num_last = entry.pass.sample ? entry.outcome.num_emitted : 1;
      const int32_t position = entry.num_computed + entry.pass.num_known + num_last + depth;
      ASSERT_EQ(rows[b].first_row, b);
      ASSERT_EQ(rows[b].num_known_rows, 1);
      ASSERT_EQ(rows[b].first_position, position);
      ASSERT_EQ(rows[b].first_page, entry.slot * kMaxPages);
      ASSERT_EQ(row_position[b], position);
      ASSERT_EQ(token_ids[b], entry.live->tokens[depth]);
    }
  }

  // Equal, or off by what the last bits of a logarithm in double leave of a float.
  static void ExpectFloat(float actual, float wanted, const char* what, int32_t place) {
    if (std::isnan(wanted)) {
      ASSERT_TRUE(std::isnan(actual)) << what << " " << place << ": " << actual;
    } else if (std::isinf(wanted)) {
      ASSERT_EQ(actual, wanted) << what << " " << place;
    } else {
      ASSERT_NEAR(actual, wanted, 0x1.0p-23 * std::abs(wanted) + 1e-13) << what << " " << place;
    }
  }

  static void CheckRecords(const std::vector<Expected>& expected, const StepRecord* records, bool drafted) {
    for (size_t b = 0; b < expected.size(); ++b) {
      const Expected& entry = expected[b];
      const StepRecord& record = records[b];
      SCOPED_TRACE(::testing::Message() << "record " << b);
      ASSERT_EQ(record.slot, entry.slot);
      ASSERT_EQ(record.ran, entry.live != nullptr ? 1 : 0);
      ASSERT_EQ(record.num_drafts_made, drafted ? entry.outcome.num_drafts_made : 0);
      if (entry.live == nullptr) {
        ASSERT_EQ(record.num_emitted, 0);
        continue;
      }
      const SequenceOutcome& outcome = entry.outcome;
      const GenerateRequest& request = entry.live->group->request;
      SCOPED_TRACE(::testing::Message() << SpeculationModeName(request.speculation.mode) << " temperature "
                                        << request.sampling.temperature << " synthetic "
                                        << request.speculation.synthetic_acceptance << " drafts " << entry.pass.num_drafts);
      ASSERT_EQ(record.residency, entry.live->residency);
      ASSERT_EQ(record.num_computed, entry.num_computed);
      ASSERT_EQ(record.num_known, entry.pass.num_known);
      ASSERT_EQ(record.num_drafts, entry.pass.num_drafts);
      ASSERT_EQ(record.num_accepted, outcome.num_accepted);
      ASSERT_EQ(record.num_reached, outcome.num_reached);
      ASSERT_EQ(record.num_emitted, outcome.num_emitted);
      ASSERT_EQ(record.non_finite != 0, outcome.non_finite);
      for (int32_t i = 0; i < outcome.num_emitted; ++i) {
        ASSERT_EQ(record.tokens[i], outcome.tokens[i]) << "place " << i;
        ASSERT_EQ(record.source[i], outcome.source[i]) << "place " << i;
        ExpectFloat(record.logprob[i], outcome.logprob[i], "logprob", i);
        ExpectFloat(record.raw_logprob[i], outcome.raw_logprob[i], "raw_logprob", i);
        ExpectFloat(record.entropy[i], outcome.entropy[i], "entropy", i);
        ExpectFloat(record.draft_logprob[i], outcome.draft_logprob[i], "draft_logprob", i);
      }
      // Coupled: the device's closed form works on bins of p/q.
      const bool binned = request.speculation.mode == SpeculationMode::kCoupled && !request.sampling.greedy();
      for (int32_t i = 0; i < outcome.num_reached; ++i)
        ASSERT_NEAR(record.overlap[i], outcome.overlap[i], binned ? 1.0 / 256 : 0.0) << i;
    }
  }

  void CheckStates(const std::vector<Expected>& expected, const std::vector<SlotState>& before) {
    const std::vector<SlotState> states = states_.Download();
    for (const Expected& entry : expected) {
      if (entry.slot < 0) continue;
      SCOPED_TRACE(::testing::Message() << "state of slot " << entry.slot);
      const SlotState& state = states[entry.slot];
      if (entry.live == nullptr) {
        ASSERT_EQ(std::memcmp(&state, &before[entry.slot], sizeof(state)), 0);
        continue;
      }
      ASSERT_EQ(state.stopped != 0, entry.finish != FinishReason::kNone);
      if (entry.finish != FinishReason::kNone) continue;
      const Sequence& sequence = *entry.live->sequence;
      ASSERT_EQ(state.residency, entry.live->residency);
      ASSERT_EQ(state.num_computed, sequence.num_computed());
      ASSERT_EQ(state.num_replay, sequence.num_replay());
      ASSERT_EQ(state.num_output, sequence.num_output());
      ASSERT_EQ(state.num_drafts, sequence.num_drafts());
      ASSERT_EQ(state.num_drafts_made, entry.outcome.num_drafts_made);
      for (int32_t i = 0; i < sequence.num_drafts(); ++i) ASSERT_EQ(state.drafts[i], entry.live->tokens[i]);
      if (sequence.is_decoding()) {
        ASSERT_EQ(state.last_token, sequence.token(sequence.num_computed()));
      }
      ASSERT_EQ(state.state_src, entry.slot + 100);
      ASSERT_EQ(state.state_dst, entry.slot + 100);
    }
  }

  const Scenario scenario_;
  cuda::Stream& stream_;
  Random random_;
  const int32_t num_blocks_, max_sequences_, max_rows_;
  const std::vector<float> base_;
  std::vector<Live> live_;
  uint64_t last_residency_ = 0, num_passes_ = 0;
  int64_t num_emitted_ = 0, num_accepted_ = 0, num_rejected_ = 0, num_non_finite_ = 0, num_restored_ = 0, num_without_pages_ = 0;

  DeviceArray<SlotRequest> requests_;
  DeviceArray<SlotState> states_;
  DeviceArray<uint32_t> stop_ids_, banned_ids_;
  DeviceArray<int32_t> page_ids_;
  DeviceArray<float> draft_logits_;
  DeviceArray<DeviceDistribution> draft_rows_;
  DeviceArray<double> draft_sums_;
  DeviceArray<PassSequence> sequences_;
  DeviceArray<SequenceRows> rows_, mtp_rows_;
  DeviceArray<uint32_t> token_ids_, mtp_token_ids_;
  DeviceArray<int32_t> row_sequence_, row_position_, mtp_row_sequence_, mtp_row_position_, judged_row_, judged_sequence_,
      draft_from_row_, slot_of_row_;
  DeviceArray<float> logits_;
  DeviceArray<DeviceDistribution> target_rows_;
  DeviceArray<double> target_sums_;
  DeviceArray<StepRecord> records_;
  DeviceArray<unsigned char> scratch_;
  DeviceArray<uint64_t> sequence_number_;
  SlotArrays slots_;
  PassArrays pass_;
  StepRecord* host_records_ = nullptr;
  uint64_t* number_memory_ = nullptr;
  volatile uint64_t* host_number_ = nullptr;
};

class StepLoopCudaTest : public testing::CudaTest {};

TEST_F(StepLoopCudaTest, AllModesOverManySizes) {
  int64_t accepted = 0, rejected = 0, non_finite = 0, restored = 0, without_pages = 0;
  uint64_t seed = 1;
  for (const int32_t vocab_size : {2, 5, 17, 1000, 1024, 1025, 5000}) {
    for (const int32_t max_drafts : {1, 3, 8}) {
      if (vocab_size == 5000 && max_drafts == 8) continue;
      Scenario scenario{
          .vocab_size = vocab_size, .max_drafts = max_drafts, .num_passes = vocab_size > 100 ? 10 : 40, .seed = ++seed};
      SCOPED_TRACE(::testing::Message() << "vocabulary " << vocab_size << " drafts " << max_drafts);
      Loop loop(scenario, stream());
      loop.Run();
      if (HasFailure()) return;
      accepted += loop.num_accepted();
      rejected += loop.num_rejected();
      non_finite += loop.num_non_finite();
      restored += loop.num_restored();
      without_pages += loop.num_without_pages();
    }
  }
  // All that is compared did happen.
  RecordProperty("counts", std::to_string(accepted) + " " + std::to_string(rejected) + " " + std::to_string(non_finite) + " " +
                               std::to_string(restored) + " " + std::to_string(without_pages));
  EXPECT_GT(accepted, 200);
  EXPECT_GT(rejected, 200);
  EXPECT_GT(non_finite, 20);
  EXPECT_GT(restored, 20);
  EXPECT_GT(without_pages, 50);
}

TEST_F(StepLoopCudaTest, EachModeAlone) {
  for (const SpeculationMode mode :
       {SpeculationMode::kOff, SpeculationMode::kTargetOnly, SpeculationMode::kRejection, SpeculationMode::kCoupled}) {
    SCOPED_TRACE(SpeculationModeName(mode));
    Loop loop({.vocab_size = 2100, .num_passes = 15, .seed = 78, .broken_rows = false, .mode = mode}, stream());
    loop.Run();
    EXPECT_EQ(loop.num_accepted() > 0, mode != SpeculationMode::kOff);
    if (HasFailure()) return;
  }
}

TEST_F(StepLoopCudaTest, FullVocabulary) {
  Loop loop({.vocab_size = 248320, .num_slots = 2, .max_drafts = 2, .num_passes = 2, .seed = 5, .broken_rows = false}, stream());
  loop.Run();
}

TEST_F(StepLoopCudaTest, GatherRows) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const int64_t cols : {1, 3, 8, 40, 1000}) {
      for (const int64_t gap : {0, 1, 8}) {
        Random random(static_cast<uint64_t>(cols));
        const std::vector<float> values = testing::RoundToBFloat16(random.Normals(6 * cols));
        const testing::DeviceMatrix x(values, 6, cols, dtype, gap);
        const testing::DeviceMatrix out(5, cols, dtype, gap);
        const std::vector<int32_t> index = {5, -1, 0, 0, 3};
        const DeviceArray<int32_t> device_index(index);
        cuda::GatherRows(x.View(), device_index.data(), out.View(), stream());
        const std::vector<float> gathered = out.Values();
        for (int64_t i = 0; i < 5; ++i) {
          for (int64_t col = 0; col < cols; ++col) {
            ASSERT_EQ(gathered[i * cols + col], index[i] < 0 ? 0.0f : values[index[i] * cols + col]) << i << " " << col;
          }
        }
        EXPECT_TRUE(out.GapsUntouched());
      }
    }
  }
}

}  // namespace
}  // namespace bebop
