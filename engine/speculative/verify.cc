// SPDX-License-Identifier: Apache-2.0
#include "engine/speculative/verify.h"

#include "kernels/common/check.h"

namespace bebop {
namespace {

// A token from a whole distribution, with the two uniforms of `purpose`.
uint32_t SampleToken(const TokenDistribution& distribution, int32_t offset, DrawPurpose purpose, DrawSource& draws) {
  const double u_block = draws.Uniform(offset, purpose, 0);
  return cpu::SampleInverseCdf(distribution, u_block, draws.Uniform(offset, purpose, 1));
}

// The token of a place where no draft stands: plain, bonus, or corrected after an unusable draft row.
uint32_t SampleTarget(const VerifyArgs& args, int32_t offset, DrawPurpose purpose, DrawSource& draws) {
  const TokenDistribution& target = args.target[offset];
  if (args.greedy) return target.argmax;
  if (args.mode == SpeculationMode::kCoupled) return cpu::SampleGumbel(target, draws.GumbelKey(offset));
  return SampleToken(target, offset, purpose, draws);
}

struct Decision {
  bool accepted;
  uint32_t token;
};

// Accepts draft `i`, or draws the token that stands in its place. REQUIRES: target[i].finite.
Decision DecideDraft(const VerifyArgs& args, int32_t i, DrawSource& draws) {
  const uint32_t drafted = args.drafts[i];
  const TokenDistribution& target = args.target[i];
  const TokenDistribution* draft = args.draft.empty() ? nullptr : &args.draft[i];
  const bool synthetic = args.synthetic_acceptance >= 0.0;
  if (synthetic && draws.Uniform(i, DrawPurpose::kSynthetic, 0) < args.synthetic_acceptance) return {true, drafted};
  // Whether a draft row is usable depends on nothing drawn at this place, so the target's own law is the right one.
  if (draft != nullptr && !draft->finite) return {false, SampleTarget(args, i, DrawPurpose::kResidual, draws)};

  if (args.greedy || args.mode == SpeculationMode::kCoupled) {
    const uint32_t chosen = SampleTarget(args, i, DrawPurpose::kResidual, draws);
    return {!synthetic && chosen == drafted, chosen};
  }
  const double target_prob = target.prob(drafted);
  if (args.mode == SpeculationMode::kTargetOnly) {
    if (!synthetic && draws.Uniform(i, DrawPurpose::kAccept, 0) < target_prob) return {true, drafted};
    const double u_block = draws.Uniform(i, DrawPurpose::kResidual, 0);
    return {false, cpu::SampleExcluding(target, drafted, u_block, draws.Uniform(i, DrawPurpose::kResidual, 1))};
  }
  const double draft_prob = draft->prob(drafted);
  if (!synthetic && draws.Uniform(i, DrawPurpose::kAccept, 0) * draft_prob < target_prob) return {true, drafted};
  const double u_block = draws.Uniform(i, DrawPurpose::kResidual, 0);
  return {false, cpu::SampleResidual(target, *draft, u_block, draws.Uniform(i, DrawPurpose::kResidual, 1))};
}

}  // namespace

VerifyOutcome Verify(const VerifyArgs& args, DrawSource& draws) {
  const int32_t num_drafts = static_cast<int32_t>(args.drafts.size());
  BEBOP_CHECK(num_drafts <= kMaxDraftTokens && args.target.size() == args.drafts.size() + 1);
  BEBOP_CHECK(num_drafts == 0 || args.mode != SpeculationMode::kOff);
  BEBOP_CHECK(args.draft.size() == args.drafts.size() ||
              (args.draft.empty() && (args.greedy || args.mode != SpeculationMode::kRejection)));
  VerifyOutcome outcome;
  const auto emit = [&outcome](uint32_t token, int32_t source) {
    outcome.tokens[outcome.num_emitted] = token;
    outcome.source[outcome.num_emitted++] = source;
  };
  for (int32_t i = 0; i < num_drafts; ++i) {
    if (!args.target[i].finite) {
      outcome.non_finite = true;
      return outcome;
    }
    ++outcome.num_reached;
    const Decision decision = DecideDraft(args, i, draws);
    emit(decision.token, decision.accepted ? i + 1 : kSourceCorrected);
    if (!decision.accepted) return outcome;
    ++outcome.num_accepted;
  }
  if (!args.target[num_drafts].finite) {
    outcome.non_finite = true;
    return outcome;
  }
  const bool plain = num_drafts == 0;
  emit(SampleTarget(args, num_drafts, plain ? DrawPurpose::kPlain : DrawPurpose::kBonus, draws),
       plain ? kSourcePlain : kSourceBonus);
  return outcome;
}

uint32_t DrawDraft(SpeculationMode mode, bool greedy, const TokenDistribution& draft, int32_t offset, DrawSource& draws) {
  BEBOP_CHECK(mode != SpeculationMode::kOff);
  if (!draft.finite) return 0;  // any id will do: Verify rejects it
  if (greedy || mode == SpeculationMode::kTargetOnly) return draft.argmax;
  if (mode == SpeculationMode::kCoupled) return cpu::SampleGumbel(draft, draws.GumbelKey(offset));
  return SampleToken(draft, offset, DrawPurpose::kDraft, draws);
}

double ExpectedAcceptance(SpeculationMode mode, bool greedy, uint32_t draft_token, const TokenDistribution& target,
                          const TokenDistribution& draft) {
  if (!target.finite || !draft.finite) return 0.0;
  if (greedy) return draft_token == target.argmax ? 1.0 : 0.0;
  switch (mode) {
    case SpeculationMode::kOff: return 0.0;
    case SpeculationMode::kTargetOnly: return target.prob(draft_token);
    case SpeculationMode::kRejection: return cpu::Overlap(target, draft);
    case SpeculationMode::kCoupled: return cpu::CoupledOverlap(target, draft);
  }
  return 0.0;
}

}  // namespace bebop
