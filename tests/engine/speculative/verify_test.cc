// SPDX-License-Identifier: Apache-2.0
// Verification with every draw written by hand.
#include "engine/speculative/verify.h"

#include <cmath>
#include <limits>
#include <map>
#include <memory>
#include <tuple>
#include <vector>

#include "gtest/gtest.h"

namespace bebop {
namespace {

using Key = std::tuple<int32_t, DrawPurpose, uint32_t>;

// Answers only what the test wrote down, and each of it at most once.
class WrittenDraws final : public DrawSource {
 public:
  explicit WrittenDraws(std::map<Key, double> draws) : draws_(std::move(draws)) {}
  double Uniform(int32_t offset, DrawPurpose purpose, uint32_t lane) override {
    const auto found = draws_.find({offset, purpose, lane});
    if (found == draws_.end()) {
      ADD_FAILURE() << "unexpected draw at " << offset << ", purpose " << static_cast<int>(purpose) << ", lane " << lane;
      return 0.5;
    }
    const double value = found->second;
    draws_.erase(found);
    return value;
  }
  RandomKey GumbelKey(int32_t offset) override { return {99, 4, 1000 + static_cast<uint32_t>(offset)}; }
  size_t left() const { return draws_.size(); }

 private:
  std::map<Key, double> draws_;
};

// Distributions with given probabilities.
class Distributions {
 public:
  TokenDistribution Of(std::vector<float> weight) {
    auto row = std::make_unique<Storage>();
    row->weight = std::move(weight);
    TokenDistribution distribution;
    distribution.weight = row->weight.data();
    distribution.block_sum = &row->sum;
    distribution.vocab_size = static_cast<int32_t>(row->weight.size());
    for (uint32_t id = 0; id < row->weight.size(); ++id) {
      row->sum += row->weight[id];
      if (row->weight[id] > row->weight[distribution.argmax]) distribution.argmax = id;
    }
    distribution.total = row->sum;
    distribution.finite = true;
    rows_.push_back(std::move(row));
    return distribution;
  }
  TokenDistribution Broken() {
    TokenDistribution distribution = Of({1, 1, 1, 1});
    distribution.finite = false;
    return distribution;
  }

 private:
  struct Storage {
    std::vector<float> weight;
    double sum = 0.0;
  };
  std::vector<std::unique_ptr<Storage>> rows_;
};

constexpr DrawPurpose kAccept = DrawPurpose::kAccept, kResidual = DrawPurpose::kResidual, kBonus = DrawPurpose::kBonus,
                      kPlain = DrawPurpose::kPlain, kDraft = DrawPurpose::kDraft, kSynthetic = DrawPurpose::kSynthetic;

class VerifyTest : public ::testing::Test {
 protected:
  // Runs and requires that exactly the written draws were used.
  VerifyOutcome Run(std::map<Key, double> written) {
    VerifyArgs args;
    args.mode = mode;
    args.greedy = greedy;
    args.drafts = drafts;
    args.target = target;
    args.draft = draft;
    args.synthetic_acceptance = synthetic;
    WrittenDraws draws(std::move(written));
    const VerifyOutcome outcome = Verify(args, draws);
    EXPECT_EQ(draws.left(), 0u) << "some draws were not used";
    return outcome;
  }
  static void ExpectOutcome(const VerifyOutcome& outcome, int32_t num_accepted, int32_t num_reached,
                            const std::vector<std::pair<uint32_t, int32_t>>& tokens, bool non_finite = false) {
    EXPECT_EQ(outcome.num_accepted, num_accepted);
    EXPECT_EQ(outcome.num_reached, num_reached);
    EXPECT_EQ(outcome.non_finite, non_finite);
    ASSERT_EQ(outcome.num_emitted, static_cast<int32_t>(tokens.size()));
    for (size_t i = 0; i < tokens.size(); ++i) {
      EXPECT_EQ(outcome.tokens[i], tokens[i].first) << i;
      EXPECT_EQ(outcome.source[i], tokens[i].second) << i;
    }
  }

  Distributions distributions;
  SpeculationMode mode = SpeculationMode::kRejection;
  bool greedy = false;
  double synthetic = -1.0;
  std::vector<uint32_t> drafts;
  std::vector<TokenDistribution> target, draft;
};

TEST_F(VerifyTest, RejectionByHand) {
  // p/q of id 1 is 0.25/0.5: accepted below one half. The residual of p - q = {0.25, -0.25, 0, 0} is id 0.
  target = {distributions.Of({2, 1, 1, 0}), distributions.Of({0, 0, 1, 1})};
  draft = {distributions.Of({1, 2, 1, 0})};
  drafts = {1};
  const double half_below = 0.5 - 0x1p-54;
  ExpectOutcome(Run({{{0, kAccept, 0}, half_below}, {{1, kBonus, 0}, 0.0}, {{1, kBonus, 1}, 0.5}}), 1, 1,
                {{1, 1}, {3, kSourceBonus}});
  ExpectOutcome(Run({{{0, kAccept, 0}, 0.5}, {{0, kResidual, 0}, 0.9}, {{0, kResidual, 1}, 0.9}}), 0, 1, {{0, kSourceCorrected}});
}

TEST_F(VerifyTest, ADraftEqualToItsTargetIsAlwaysAccepted) {
  target = {distributions.Of({0.3f, 0.1f, 0.7f}), distributions.Of({1, 0, 0})};
  draft = {distributions.Of({0.3f, 0.1f, 0.7f})};
  for (uint32_t id = 0; id < 3; ++id) {
    drafts = {id};
    ExpectOutcome(Run({{{0, kAccept, 0}, 1.0 - 0x1p-53}, {{1, kBonus, 0}, 0.2}, {{1, kBonus, 1}, 0.2}}), 1, 1,
                  {{id, 1}, {0, kSourceBonus}});
  }
}

TEST_F(VerifyTest, TheSecondRejectionStopsAndUsesItsOwnRow) {
  target = {distributions.Of({1, 0, 0, 0}), distributions.Of({0, 1, 1, 0}), distributions.Of({0, 0, 0, 1})};
  draft = {distributions.Of({1, 0, 0, 0}), distributions.Of({0, 1, 0, 1})};
  drafts = {0, 3};
  ExpectOutcome(Run({{{0, kAccept, 0}, 0.99}, {{1, kAccept, 0}, 0.0}, {{1, kResidual, 0}, 0.3}, {{1, kResidual, 1}, 0.7}}), 1, 2,
                {{0, 1}, {2, kSourceCorrected}});
}

TEST_F(VerifyTest, TargetOnlyByHand) {
  mode = SpeculationMode::kTargetOnly;
  target = {distributions.Of({1, 4, 1, 2}), distributions.Of({0, 0, 1, 1})};
  drafts = {1};  // no draft distribution needed
  ExpectOutcome(Run({{{0, kAccept, 0}, 0.4999}, {{1, kBonus, 0}, 0.0}, {{1, kBonus, 1}, 0.0}}), 1, 1,
                {{1, 1}, {2, kSourceBonus}});
  // Without id 1: 1/4, 0, 1/4, 2/4.
  ExpectOutcome(Run({{{0, kAccept, 0}, 0.5}, {{0, kResidual, 0}, 0.1}, {{0, kResidual, 1}, 0.2499}}), 0, 1,
                {{0, kSourceCorrected}});
  ExpectOutcome(Run({{{0, kAccept, 0}, 0.5}, {{0, kResidual, 0}, 0.1}, {{0, kResidual, 1}, 0.2501}}), 0, 1,
                {{2, kSourceCorrected}});
}

TEST_F(VerifyTest, PlainTokenInEveryMode) {
  target = {distributions.Of({1, 2, 1})};
  for (SpeculationMode plain : {SpeculationMode::kOff, SpeculationMode::kTargetOnly, SpeculationMode::kRejection}) {
    mode = plain;
    ExpectOutcome(Run({{{0, kPlain, 0}, 0.3}, {{0, kPlain, 1}, 0.76}}), 0, 0, {{2, kSourcePlain}});
  }
  mode = SpeculationMode::kCoupled;
  ExpectOutcome(Run({}), 0, 0, {{cpu::SampleGumbel(target[0], {99, 4, 1000}), kSourcePlain}});
  greedy = true;
  for (SpeculationMode any : {SpeculationMode::kOff, SpeculationMode::kCoupled}) {
    mode = any;
    ExpectOutcome(Run({}), 0, 0, {{1, kSourcePlain}});
  }
}

TEST_F(VerifyTest, CoupledAcceptsWhenBothArgmaxesAgree) {
  mode = SpeculationMode::kCoupled;
  target = {distributions.Of({3, 2, 1}), distributions.Of({1, 1, 1})};
  draft = {distributions.Of({1, 2, 3})};
  const uint32_t first = cpu::SampleGumbel(target[0], {99, 4, 1000}), second = cpu::SampleGumbel(target[1], {99, 4, 1001});
  drafts = {first};
  ExpectOutcome(Run({}), 1, 1, {{first, 1}, {second, kSourceBonus}});
  drafts = {(first + 1) % 3};
  ExpectOutcome(Run({}), 0, 1, {{first, kSourceCorrected}});
}

TEST_F(VerifyTest, GreedyNeedsNoDraws) {
  greedy = true;
  target = {distributions.Of({0, 3, 1}), distributions.Of({5, 1, 1}), distributions.Of({0, 0, 1})};
  draft = {distributions.Of({1, 0, 0}), distributions.Of({1, 0, 0})};
  for (SpeculationMode any : {SpeculationMode::kTargetOnly, SpeculationMode::kRejection, SpeculationMode::kCoupled}) {
    mode = any;
    drafts = {1, 0};
    ExpectOutcome(Run({}), 2, 2, {{1, 1}, {0, 2}, {2, kSourceBonus}});
    drafts = {1, 2};
    ExpectOutcome(Run({}), 1, 2, {{1, 1}, {0, kSourceCorrected}});
  }
}

TEST_F(VerifyTest, ANonFiniteTargetRowEndsEmissionBeforeIt) {
  draft = {distributions.Of({1, 0, 0, 0}), distributions.Of({1, 0, 0, 0})};
  drafts = {0, 0};
  const TokenDistribution good = distributions.Of({1, 0, 0, 0}), broken = distributions.Broken();
  target = {broken, good, good};
  ExpectOutcome(Run({}), 0, 0, {}, true);
  target = {good, broken, good};
  ExpectOutcome(Run({{{0, kAccept, 0}, 0.5}}), 1, 1, {{0, 1}}, true);
  target = {good, good, broken};
  ExpectOutcome(Run({{{0, kAccept, 0}, 0.5}, {{1, kAccept, 0}, 0.5}}), 2, 2, {{0, 1}, {0, 2}}, true);
  // A broken row behind a rejection is not needed.
  target = {good, distributions.Of({0, 1, 0, 0}), broken};
  ExpectOutcome(Run({{{0, kAccept, 0}, 0.5}, {{1, kAccept, 0}, 0.0}, {{1, kResidual, 0}, 0.5}, {{1, kResidual, 1}, 0.5}}), 1, 2,
                {{0, 1}, {1, kSourceCorrected}});
  drafts.clear();
  draft.clear();
  target = {broken};
  for (SpeculationMode any : {SpeculationMode::kOff, SpeculationMode::kCoupled}) {
    mode = any;
    ExpectOutcome(Run({}), 0, 0, {}, true);
  }
}

TEST_F(VerifyTest, ANonFiniteDraftRowIsRejectedAndTheTargetSampled) {
  target = {distributions.Of({1, 2, 1, 0}), distributions.Of({1, 0, 0, 0})};
  draft = {distributions.Broken()};
  drafts = {1};
  for (SpeculationMode any : {SpeculationMode::kRejection, SpeculationMode::kTargetOnly}) {
    mode = any;
    ExpectOutcome(Run({{{0, kResidual, 0}, 0.5}, {{0, kResidual, 1}, 0.5}}), 0, 1, {{1, kSourceCorrected}});
  }
  mode = SpeculationMode::kCoupled;
  ExpectOutcome(Run({}), 0, 1, {{cpu::SampleGumbel(target[0], {99, 4, 1000}), kSourceCorrected}});
  greedy = true;
  ExpectOutcome(Run({}), 0, 1, {{1, kSourceCorrected}});
}

TEST_F(VerifyTest, SyntheticAcceptanceReplacesTheDecisionAndNothingElse) {
  synthetic = 0.75;
  target = {distributions.Of({0, 0, 1, 1}), distributions.Of({1, 0, 0, 0})};
  draft = {distributions.Of({1, 0, 1, 0})};
  drafts = {0};  // p = 0: never accepted by the real rule
  ExpectOutcome(Run({{{0, kSynthetic, 0}, 0.7499}, {{1, kBonus, 0}, 0.0}, {{1, kBonus, 1}, 0.0}}), 1, 1,
                {{0, 1}, {0, kSourceBonus}});
  drafts = {2};
  ExpectOutcome(Run({{{0, kSynthetic, 0}, 0.75}, {{0, kResidual, 0}, 0.0}, {{0, kResidual, 1}, 0.0}}), 0, 1,
                {{3, kSourceCorrected}});
  greedy = true;
  drafts = {2};  // the argmax: the real rule would accept it
  ExpectOutcome(Run({{{0, kSynthetic, 0}, 0.9}}), 0, 1, {{2, kSourceCorrected}});
}

TEST_F(VerifyTest, SyntheticAcceptanceOfACertainTokenStillEmits) {
  synthetic = 0.0;
  mode = SpeculationMode::kTargetOnly;
  target = {distributions.Of({0, 1, 0}), distributions.Of({1, 0, 0})};
  drafts = {1};
  ExpectOutcome(Run({{{0, kSynthetic, 0}, 0.0}, {{0, kResidual, 0}, 0.5}, {{0, kResidual, 1}, 0.5}}), 0, 1,
                {{1, kSourceCorrected}});
}

TEST(DrawDraft, EachModeItsOwnWay) {
  Distributions distributions;
  const TokenDistribution draft = distributions.Of({1, 5, 2});
  WrittenDraws multinomial({{{2, kDraft, 0}, 0.9}, {{2, kDraft, 1}, 0.8}});
  EXPECT_EQ(DrawDraft(SpeculationMode::kRejection, false, draft, 2, multinomial), 2u);
  EXPECT_EQ(multinomial.left(), 0u);
  WrittenDraws none({});
  EXPECT_EQ(DrawDraft(SpeculationMode::kTargetOnly, false, draft, 2, none), 1u);
  EXPECT_EQ(DrawDraft(SpeculationMode::kRejection, true, draft, 2, none), 1u);
  EXPECT_EQ(DrawDraft(SpeculationMode::kCoupled, true, draft, 2, none), 1u);
  EXPECT_EQ(DrawDraft(SpeculationMode::kCoupled, false, draft, 2, none), cpu::SampleGumbel(draft, {99, 4, 1002}));
  EXPECT_EQ(DrawDraft(SpeculationMode::kRejection, false, distributions.Broken(), 2, none), 0u) << "any id, no draws";
}

TEST(ExpectedAcceptance, ByHand) {
  Distributions distributions;
  const TokenDistribution target = distributions.Of({2, 1, 1}), draft = distributions.Of({1, 1, 2});
  EXPECT_DOUBLE_EQ(ExpectedAcceptance(SpeculationMode::kRejection, false, 0, target, draft), 0.75);
  EXPECT_DOUBLE_EQ(ExpectedAcceptance(SpeculationMode::kTargetOnly, false, 0, target, draft), 0.5);
  // Ratios p/q 2, 1, 1/2: .5/(.5 + 2 * .75) + .25/(.75 + .5) + .25/1.
  EXPECT_NEAR(ExpectedAcceptance(SpeculationMode::kCoupled, false, 0, target, draft), 0.25 + 0.2 + 0.25, 1e-12);
  EXPECT_EQ(ExpectedAcceptance(SpeculationMode::kRejection, true, 0, target, draft), 1.0);
  EXPECT_EQ(ExpectedAcceptance(SpeculationMode::kRejection, true, 1, target, draft), 0.0);
  EXPECT_EQ(ExpectedAcceptance(SpeculationMode::kRejection, false, 0, target, distributions.Broken()), 0.0);
  EXPECT_EQ(ExpectedAcceptance(SpeculationMode::kOff, false, 0, target, draft), 0.0);
}

TEST(PhiloxDraws, AreKeyedByAbsolutePosition) {
  PhiloxDraws draws({5, 6, 100});
  EXPECT_EQ(draws.Uniform(3, kAccept, 1), Uniform53({5, 6, 103}, kAccept, 1));
  const RandomKey key = draws.GumbelKey(7);
  EXPECT_EQ(key.seed, 5u);
  EXPECT_EQ(key.sample_index, 6u);
  EXPECT_EQ(key.position, 107u);
}

}  // namespace
}  // namespace bebop
