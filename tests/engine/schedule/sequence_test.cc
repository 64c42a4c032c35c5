// SPDX-License-Identifier: Apache-2.0
#include "engine/schedule/sequence.h"

#include <memory>
#include <numeric>

#include "gtest/gtest.h"

namespace bebop {
namespace {

constexpr int32_t kWhole = 1 << 20;

std::unique_ptr<Group> MakeGroup(int32_t prompt, int32_t max_new, int32_t drafts, std::vector<uint32_t> stop_ids = {}) {
  GenerateRequest request;
  request.prompt.resize(static_cast<size_t>(prompt));
  std::iota(request.prompt.begin(), request.prompt.end(), 100u);
  request.num_samples = 2;
  request.stopping.max_new_tokens = max_new;
  request.stopping.stop_token_ids = std::move(stop_ids);
  request.speculation.mode = drafts > 0 ? SpeculationMode::kRejection : SpeculationMode::kOff;
  request.speculation.num_draft_tokens = drafts > 0 ? drafts : 3;  // off ignores the number
  request.output.logprobs = request.output.token_source = request.output.spec_detail = true;
  return std::make_unique<Group>(std::move(request), std::vector<uint32_t>{}, nullptr);
}

SequenceOutcome Outcome(std::vector<uint32_t> tokens, int32_t accepted, int32_t reached, int32_t made) {
  SequenceOutcome outcome;
  outcome.num_emitted = static_cast<int32_t>(tokens.size());
  outcome.num_accepted = accepted;
  outcome.num_reached = reached;
  outcome.num_drafts_made = made;
  for (size_t i = 0; i < tokens.size(); ++i) {
    outcome.tokens[i] = tokens[i];
    outcome.logprob[i] = -static_cast<float>(tokens[i]);
    outcome.source[i] = static_cast<int32_t>(i) < accepted ? static_cast<int32_t>(i) + 1 : reached > accepted ? -1 : -2;
  }
  outcome.overlap = {0.5, 0.25, 0.125};
  return outcome;
}

FinishReason Apply(Sequence* sequence, const Pass& pass, const SequenceOutcome& outcome, SpecCounts* totals) {
  SpecCounts step;
  const FinishReason finish = sequence->Apply(pass, outcome, WeightEpochs(), &step);
  totals->Add(step);
  return finish;
}

void ExpectPass(const Pass& pass, int32_t known, int32_t drafts, bool sample, int32_t next, int32_t positions) {
  EXPECT_EQ(pass.num_known, known);
  EXPECT_EQ(pass.num_drafts, drafts);
  EXPECT_EQ(pass.sample, sample);
  EXPECT_EQ(pass.num_drafts_next, next);
  EXPECT_EQ(pass.num_positions, positions);
}

TEST(Sequence, PrefillChunksThenDecodesWithDrafts) {
  const auto group = MakeGroup(10, 20, 3);
  Sequence& sample = group->samples[0];
  SpecCounts totals;
  ExpectPass(sample.NextPass(4), 4, 0, false, 0, 5);  // one MTP entry behind the chunk
  EXPECT_EQ(Apply(&sample, sample.NextPass(4), {}, &totals), FinishReason::kNone);
  ExpectPass(sample.NextPass(kWhole), 6, 0, true, 3, 13);
  EXPECT_FALSE(sample.is_decoding());
  Apply(&sample, sample.NextPass(kWhole), Outcome({1}, 0, 0, 3), &totals);
  EXPECT_TRUE(sample.is_decoding());
  EXPECT_EQ(sample.num_computed(), 10);
  ExpectPass(sample.NextPass(kWhole), 1, 3, true, 3, 17);
  Apply(&sample, sample.NextPass(kWhole), Outcome({2, 3, 4}, 2, 3, 3), &totals);
  EXPECT_EQ(sample.num_computed(), 13);
  EXPECT_EQ(sample.num_replay(), 2);
  EXPECT_EQ(sample.num_tokens(), 14);
  EXPECT_EQ(sample.result.token_ids, (std::vector<uint32_t>{1, 2, 3, 4}));
  EXPECT_EQ(sample.result.spec.num_spec_steps, 1);
  EXPECT_EQ(sample.result.spec.num_draft_tokens, 3);
  EXPECT_EQ(sample.result.spec.num_accepted_draft_tokens, 2);
  EXPECT_EQ(sample.result.spec.drafted_per_pos[2], 1);
  EXPECT_EQ(sample.result.spec.accepted_per_pos[1], 1);
  EXPECT_EQ(sample.result.spec.accepted_per_pos[2], 0);
  EXPECT_EQ(sample.result.spec.overlap_per_pos[2], 0.125);
  EXPECT_EQ(totals.num_draft_tokens, 3);
}

// A device that runs ahead needs pages beyond the next pass, but nobody needs more than the whole sequence can take.
TEST(Sequence, LookaheadEndsWhereTheSequenceMust) {
  const auto group = MakeGroup(10, 6, 3);
  Sequence& sample = group->samples[0];
  SpecCounts totals;
  EXPECT_EQ(sample.NumPositions(0), 13);  // prompt and drafts
  EXPECT_EQ(sample.NumPositions(4), 17);
  EXPECT_EQ(sample.NumPositions(8), 19);  // prompt, output and drafts
  Apply(&sample, sample.NextPass(kWhole), Outcome({1}, 0, 0, 3), &totals);
  EXPECT_EQ(sample.NumPositions(0), 17);
  EXPECT_EQ(sample.NumPositions(8), 19);
  Apply(&sample, sample.NextPass(kWhole), Outcome({2, 3, 4, 5}, 3, 3, 0), &totals);
  EXPECT_EQ(sample.num_remaining(), 1);
  EXPECT_EQ(sample.NumPositions(8), 19);
  EXPECT_EQ(group->prefix.NumPositions(8), group->prefix.NumPositions(0));  // never decodes
}

TEST(Sequence, WithoutSpeculationNothingIsKeptForTheMtpLayer) {
  const auto group = MakeGroup(10, 20, 0);
  ExpectPass(group->samples[0].NextPass(kWhole), 10, 0, true, 0, 10);
  ExpectPass(group->samples[0].NextPass(3), 3, 0, false, 0, 3);
}

TEST(Sequence, DraftsNeverReachBeyondTheLastToken) {
  const auto group = MakeGroup(4, 3, 8);
  Sequence& sample = group->samples[0];
  SpecCounts totals;
  ExpectPass(sample.NextPass(kWhole), 4, 0, true, 1, 5);  // 3 remain: one now, and of the two after it a draft can be but one
  Apply(&sample, sample.NextPass(kWhole), Outcome({1}, 0, 0, 1), &totals);
  ExpectPass(sample.NextPass(kWhole), 1, 1, true, 0, 7);
  EXPECT_EQ(Apply(&sample, sample.NextPass(kWhole), Outcome({2, 3}, 1, 1, 0), &totals), FinishReason::kLength);
}

TEST(Sequence, TrimsOnceAtTheStopAndCountsBeforeIt) {
  const auto group = MakeGroup(4, 50, 3, {7});
  Sequence& sample = group->samples[0];
  SpecCounts totals;
  Apply(&sample, sample.NextPass(kWhole), Outcome({1}, 0, 0, 3), &totals);
  EXPECT_EQ(Apply(&sample, sample.NextPass(kWhole), Outcome({2, 7, 3, 4}, 3, 3, 3), &totals), FinishReason::kStop);
  EXPECT_EQ(sample.result.token_ids, (std::vector<uint32_t>{1, 2, 7}));
  EXPECT_EQ(sample.result.logprobs, (std::vector<float>{-1, -2, -7}));
  EXPECT_EQ(sample.result.token_source, (std::vector<int32_t>{-2, 1, 2}));
  EXPECT_TRUE(sample.result.raw_logprobs.empty());
  EXPECT_EQ(sample.result.stop_token_id, 7u);
  EXPECT_EQ(sample.result.spec.num_accepted_draft_tokens, 3);
  EXPECT_EQ(sample.result.spec.num_trimmed_tokens, 1);
}

TEST(Sequence, AStopAtTheLengthLimitIsAStop) {
  const auto group = MakeGroup(4, 2, 0, {7});
  Sequence& sample = group->samples[0];
  SpecCounts totals;
  EXPECT_EQ(Apply(&sample, sample.NextPass(kWhole), Outcome({1}, 0, 0, 0), &totals), FinishReason::kNone);
  EXPECT_EQ(Apply(&sample, sample.NextPass(kWhole), Outcome({7}, 0, 0, 0), &totals), FinishReason::kStop);
}

TEST(Sequence, NonFiniteRowKeepsTheTokensBeforeIt) {
  const auto group = MakeGroup(4, 50, 3, {7});
  SpecCounts totals;
  Sequence& sample = group->samples[0];
  Apply(&sample, sample.NextPass(kWhole), Outcome({1}, 0, 0, 3), &totals);
  SequenceOutcome outcome = Outcome({2, 3}, 2, 2, 0);
  outcome.non_finite = true;
  EXPECT_EQ(Apply(&sample, sample.NextPass(kWhole), outcome, &totals), FinishReason::kNonFinite);
  EXPECT_EQ(sample.result.token_ids, (std::vector<uint32_t>{1, 2, 3}));
  // A stop among the valid tokens wins.
  Sequence& other = group->samples[1];
  Apply(&other, other.NextPass(kWhole), Outcome({1}, 0, 0, 3), &totals);
  outcome.tokens[0] = 7;
  EXPECT_EQ(Apply(&other, other.NextPass(kWhole), outcome, &totals), FinishReason::kStop);
}

TEST(Sequence, RecomputeRestoresTheDraftsThatWerePending) {
  const auto group = MakeGroup(10, 20, 3);
  Sequence& sample = group->samples[0];
  SpecCounts totals;
  Apply(&sample, sample.NextPass(kWhole), Outcome({1}, 0, 0, 3), &totals);
  Apply(&sample, sample.NextPass(kWhole), Outcome({2, 3}, 1, 2, 2), &totals);
  EXPECT_EQ(sample.num_drafts(), 2);
  sample.Reset();
  EXPECT_EQ(sample.num_computed(), 0);
  EXPECT_EQ(sample.num_replay(), 0);
  EXPECT_EQ(sample.num_drafts(), 0);
  EXPECT_FALSE(sample.is_decoding());
  // 13 tokens: 12 again, two drafts behind the 13th, then the verification as it would have been.
  ExpectPass(sample.NextPass(7), 7, 0, false, 0, 8);
  Apply(&sample, sample.NextPass(7), {}, &totals);
  sample.Reset();  // interrupted again
  ExpectPass(sample.NextPass(kWhole), 12, 0, false, 2, 14);
  SequenceOutcome made;
  made.num_drafts_made = 2;
  Apply(&sample, sample.NextPass(kWhole), made, &totals);
  EXPECT_TRUE(sample.is_decoding());
  ExpectPass(sample.NextPass(kWhole), 1, 2, true, 3, 18);
  EXPECT_EQ(sample.result.recomputed_tokens, 7 + 12);
  EXPECT_EQ(sample.result.token_ids.size(), 3u);
}

TEST(Sequence, RecomputeWithoutPendingDraftsSamplesAtItsEnd) {
  const auto group = MakeGroup(10, 20, 0);
  Sequence& sample = group->samples[0];
  SpecCounts totals;
  Apply(&sample, sample.NextPass(kWhole), Outcome({1}, 0, 0, 0), &totals);
  sample.Reset();
  ExpectPass(sample.NextPass(kWhole), 11, 0, true, 0, 11);
}

TEST(Sequence, PrefixStopsBeforeTheLastPromptToken) {
  const auto group = MakeGroup(10, 20, 3);
  ExpectPass(group->prefix.NextPass(kWhole), 9, 0, false, 0, 10);
  SpecCounts totals;
  Apply(&group->prefix, group->prefix.NextPass(kWhole), {}, &totals);
  EXPECT_EQ(group->prefix.num_computed(), group->prefix.num_tokens());
}

TEST(Sequence, RankPutsAPrefixBehindItsSamplesAndBeforeLaterGroups) {
  const auto group = MakeGroup(10, 20, 3);
  group->arrival = 5;
  const auto later = MakeGroup(10, 20, 3);
  later->arrival = 6;
  const auto urgent = MakeGroup(10, 20, 3);
  urgent->arrival = 7;
  urgent->priority = -1;
  EXPECT_LT(group->samples[0].rank(), group->samples[1].rank());
  EXPECT_LT(group->samples[1].rank(), group->prefix.rank());
  EXPECT_LT(group->prefix.rank(), later->samples[0].rank());
  EXPECT_LT(urgent->prefix.rank(), group->samples[0].rank());
}

}  // namespace
}  // namespace bebop
