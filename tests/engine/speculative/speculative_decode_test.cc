// SPDX-License-Identifier: Apache-2.0
// Whole sequences through drafting and verification with Philox draws: what must be equal token for token.
#include "gtest/gtest.h"

#include <vector>

#include "tests/engine/speculative/toy_model.h"

namespace bebop {
namespace {

const auto kIgnore = [](std::span<const uint32_t>, const Iteration&) {};

// The coupled mode by its definition: at each position the argmax of log p + G.
std::vector<uint32_t> CoupledByDefinition(ToyModel& model, uint64_t seed, uint32_t sample_index, size_t num_tokens) {
  std::vector<uint32_t> tokens;
  while (tokens.size() < num_tokens) {
    const ToyModel::Row& row = model.Target(tokens);
    const RandomKey key{seed, sample_index, static_cast<uint32_t>(tokens.size())};
    double best = -std::numeric_limits<double>::infinity();
    uint32_t best_id = 0;
    for (uint32_t id : model.live()) {
      const double score = std::log(row.reference[id]) - std::log(cpu::CoupledExponential(key, id));
      if (score > best) {
        best = score;
        best_id = id;
      }
    }
    tokens.push_back(best_id);
  }
  return tokens;
}

// 10,000 (seed, sample, prefix) cases over 20 languages: tokens are a function of seed, sample, position and prefix alone,
// whatever the number of drafts.
TEST(CoupledMode, TokensAreTheSameForEveryNumberOfDrafts) {
  constexpr DraftKind kKinds[] = {DraftKind::kGood, DraftKind::kBad, DraftKind::kUniform, DraftKind::kOneHot};
  constexpr size_t kTokens = 10;
  int64_t accepted = 0, drafted = 0;
  for (uint64_t language = 0; language < 20; ++language) {
    ToyOptions toy;
    toy.num_live = 12;
    toy.history = 2;
    toy.seed = 500 + language;
    toy.draft = kKinds[language % 4];
    if (language % 5 == 1) toy.sampling.top_p = 0.9f;
    if (language % 5 == 2) toy.sampling.top_k = 4;
    if (language % 5 == 3) toy.banned_tokens = 3;
    ToyModel model(toy);
    for (uint32_t sample = 0; sample < 500; ++sample) {
      const uint64_t seed = 0x9000000000u * language + 7;
      const std::vector<uint32_t> expected = CoupledByDefinition(model, seed, sample, kTokens);
      for (int32_t num_drafts = 0; num_drafts <= kMaxDraftTokens; ++num_drafts) {
        const std::vector<uint32_t> tokens = Decode(model, SpeculationMode::kCoupled, num_drafts, seed, sample, kTokens,
                                                    [&](std::span<const uint32_t>, const Iteration& iteration) {
                                                      accepted += iteration.outcome.num_accepted;
                                                      drafted += num_drafts;
                                                    });
        ASSERT_EQ(tokens, expected) << "language " << language << " sample " << sample << " drafts " << num_drafts;
      }
    }
  }
  EXPECT_GT(accepted, drafted / 10) << "drafts were really accepted";
}

TEST(GreedyMode, TokensEqualPlainGreedyDecodingInEveryMode) {
  for (uint64_t language = 0; language < 200; ++language) {
    ToyOptions toy;
    toy.num_live = 3 + static_cast<int32_t>(language % 40);
    toy.seed = language;
    toy.draft = static_cast<DraftKind>(language % 7);
    toy.deviation = language % 3 == 0 ? 0.0f : 2.0f;  // all logits tie: the lowest id
    toy.sampling.temperature = 0.0f;
    toy.banned_tokens = language % 4;
    ToyModel model(toy);
    std::vector<uint32_t> expected;
    for (int i = 0; i < 12; ++i) {
      const ToyModel::Row& row = model.Target(expected);
      uint32_t best = static_cast<uint32_t>(model.vocab_size());
      for (uint32_t id : model.live()) {
        if (id == 0 && expected.size() < toy.banned_tokens) continue;
        if (best == static_cast<uint32_t>(model.vocab_size()) || row.logits[id] > row.logits[best]) best = id;
      }
      expected.push_back(best);
    }
    for (SpeculationMode mode : {SpeculationMode::kTargetOnly, SpeculationMode::kRejection, SpeculationMode::kCoupled}) {
      for (int32_t num_drafts = 0; num_drafts <= kMaxDraftTokens; ++num_drafts) {
        ASSERT_EQ(Decode(model, mode, num_drafts, 1, 0, 12, kIgnore), expected) << "language " << language;
      }
    }
    EXPECT_EQ(Decode(model, SpeculationMode::kOff, 0, 1, 0, 12, kIgnore), expected);
  }
}

// A row of a batch sees only its own arguments: the same sequences decoded alone and in turns (I20 at this level).
TEST(Determinism, InterleavedSequencesEqualSequencesAlone) {
  ToyOptions toy;
  toy.num_live = 9;
  toy.history = 3;
  ToyModel model(toy);
  for (SpeculationMode mode : {SpeculationMode::kTargetOnly, SpeculationMode::kRejection, SpeculationMode::kCoupled}) {
    std::vector<std::vector<uint32_t>> together(8);
    for (int round = 0; round < 12; ++round) {
      for (uint32_t sample = 0; sample < together.size(); ++sample) {
        std::vector<uint32_t>& tokens = together[sample];
        PhiloxDraws draws({42, sample, static_cast<uint32_t>(tokens.size())});
        const Iteration iteration = Iterate(model, mode, 3, tokens, draws);
        tokens.insert(tokens.end(), iteration.outcome.tokens, iteration.outcome.tokens + iteration.outcome.num_emitted);
      }
    }
    for (uint32_t sample = 0; sample < together.size(); ++sample) {
      EXPECT_EQ(Decode(model, mode, 3, 42, sample, together[sample].size(), kIgnore), together[sample]);
      if (sample > 0) {
        EXPECT_NE(together[sample], together[0]) << "samples of a group differ";
      }
    }
  }
}

}  // namespace
}  // namespace bebop
