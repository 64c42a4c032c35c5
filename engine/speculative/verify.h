// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>

#include "engine/sampling/sampling_params.h"
#include "kernels/common/philox.h"
#include "kernels/sampling/sampling.h"

namespace bebop {

// Where an emitted token came from, as on the wire: d >= 1 is a draft accepted at depth d.
inline constexpr int32_t kSourcePlain = 0;       // no draft was verified in this iteration
inline constexpr int32_t kSourceCorrected = -1;  // first rejected place: residual (or coupled target) token
inline constexpr int32_t kSourceBonus = -2;      // all drafts accepted: one more from the distribution after the last

// Source of the random numbers of a verification: Philox in the engine, scripted or branching in tests.
class DrawSource {
 public:
  virtual ~DrawSource() = default;
  // Uniform in [0, 1) for the token at output place `offset` (0 = first token of this verification).
  virtual double Uniform(int32_t offset, DrawPurpose purpose, uint32_t lane) = 0;
  // Key for Gumbel noise at that place (coupled mode).
  virtual RandomKey GumbelKey(int32_t offset) = 0;
};

// The engine's source: key.position + offset.
//
// A rejection discards the drafts behind it, and the next iteration draws drafts for the same positions from the same numbers.
// That is harmless: what was emitted so far depends on draws of its own positions alone, so those of later positions are still
// fresh, as are accept, residual and bonus draws, which are made only at places that emit.
class PhiloxDraws final : public DrawSource {
 public:
  explicit PhiloxDraws(const RandomKey& key) : key_(key) {}
  double Uniform(int32_t offset, DrawPurpose purpose, uint32_t lane) override {
    return Uniform53({key_.seed, key_.sample_index, key_.position + static_cast<uint32_t>(offset)}, purpose, lane);
  }
  RandomKey GumbelKey(int32_t offset) override {
    return {key_.seed, key_.sample_index, key_.position + static_cast<uint32_t>(offset)};
  }

 private:
  RandomKey key_;
};

// One sequence's verification (algorithm.md section 2).
struct VerifyArgs {
  SpeculationMode mode = SpeculationMode::kOff;
  bool greedy = false;                        // temperature 0: argmax on both sides
  std::span<const uint32_t> drafts;           // ŷ_1..ŷ_k, k = drafts.size() <= kMaxDraftTokens; empty: plain sampling
  std::span<const TokenDistribution> target;  // p_1..p_{k+1}
  std::span<const TokenDistribution> draft;   // q_1..q_k (empty for target_only is allowed)
  double synthetic_acceptance = -1.0;         // >= 0: accept each reached draft with this probability (not lossless)
};

struct VerifyOutcome {
  int32_t num_accepted = 0;  // drafts accepted; num_emitted = num_accepted + 1 unless non_finite
  int32_t num_emitted = 0;
  uint32_t tokens[kMaxDraftTokens + 1] = {};
  int32_t source[kMaxDraftTokens + 1] = {};
  int32_t num_reached = 0;  // drafts whose acceptance was decided (accepted + the rejected one)
  bool non_finite = false;  // the next needed target row was unusable: emission ends before it
};

// Synthetic acceptance (kSynthetic, lane 0) replaces the decision at each reached draft and nothing else: the token after a
// rejection and the bonus come from the real path at its real cost, so a greedy or coupled "corrected" token may equal the draft.
//
// Decides acceptance and draws the corrected, bonus or plain token. With mode kCoupled (also at k = 0) tokens are a function of
// seed, sample, position and prefix alone. A non-finite draft row counts as "reject, sample from p". REQUIRES: target.size() ==
// drafts.size() + 1.
VerifyOutcome Verify(const VerifyArgs& args, DrawSource& draws);

// Draws draft `offset` (0-based place after the last emitted token) from q: multinomial (rejection), argmax (target_only, greedy)
// or Gumbel (coupled).
uint32_t DrawDraft(SpeculationMode mode, bool greedy, const TokenDistribution& draft, int32_t offset, DrawSource& draws);

// Expected acceptance of the draft at a reached place in the mode used: Σ min(p,q), p(ŷ), or the coupled closed form.
// Greedy: 1 or 0. A non-finite row on either side: 0, as Verify rejects there; mode kOff: 0. Target-only reads of `draft` no more
// than `finite`.
double ExpectedAcceptance(SpeculationMode mode, bool greedy, uint32_t draft_token, const TokenDistribution& target,
                          const TokenDistribution& draft);

}  // namespace bebop
