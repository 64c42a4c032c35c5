// SPDX-License-Identifier: Apache-2.0
// Exact enumeration (invariant I17a): the joint law of the emitted sequence is that of plain decoding.
//
// The draws are replaced by a branching oracle. For each uniform that the code asks for, the oracle finds by bisection over the
// 2^53 values it can take where the code's behaviour changes, takes one branch for each piece, and weighs it with the piece's
// share of the values. So the probabilities are those of the real code with its real 53-bit uniforms, not of a model of it.
#include <array>
#include <cstring>
#include <map>
#include <string>

#include "engine/speculative/verify.h"
#include "gtest/gtest.h"
#include "tests/engine/speculative/toy_model.h"

namespace bebop {
namespace {

constexpr double kTolerance = 1e-12;
constexpr uint64_t kNumUniforms = uint64_t{1} << 53;

// A draw and the piece [begin, end) of its 2^53 values that a branch stands for; the branch is run with `begin`.
struct Draw {
  int32_t offset;
  DrawPurpose purpose;
  uint32_t lane;
  uint64_t begin, end;
  bool Is(int32_t other_offset, DrawPurpose other_purpose, uint32_t other_lane) const {
    return offset == other_offset && purpose == other_purpose && lane == other_lane;
  }
};

// Answers from a script; the first draw that is not in it is reported, and it and all later ones are 0. A draw asked twice has
// one value, as with Philox: reused random numbers show up as dependence.
class ScriptedDraws final : public DrawSource {
 public:
  explicit ScriptedDraws(const std::vector<Draw>& script, int32_t base = 0) : script_(script), base_(base) {}
  double Uniform(int32_t offset, DrawPurpose purpose, uint32_t lane) override {
    offset += base_;
    last_offset_ = std::max(last_offset_, offset);
    for (const Draw& draw : script_) {
      if (draw.Is(offset, purpose, lane)) return static_cast<double>(draw.begin) * 0x1.0p-53;
    }
    if (!missing_) missing_draw_ = {offset, purpose, lane, 0, kNumUniforms};
    missing_ = true;
    return 0.0;
  }
  RandomKey GumbelKey(int32_t) override {
    ADD_FAILURE() << "Gumbel noise cannot be enumerated";
    return {};
  }
  void set_base(int32_t base) { base_ = base; }
  bool missing() const { return missing_; }
  const Draw& missing_draw() const { return missing_draw_; }
  int32_t last_offset() const { return last_offset_; }

 private:
  const std::vector<Draw>& script_;
  int32_t base_ = 0;
  bool missing_ = false;
  Draw missing_draw_{};
  int32_t last_offset_ = -1;
};

// The first value in (draw.begin, draw.end) at which run's result differs from the one at draw.begin, given that the ends of
// [draw.begin, last] differ. `draw` is an entry of the script; its begin is moved while searching and put back.
template <typename Run, typename Result>
uint64_t FirstChange(Run& run, const std::vector<Draw>& script, Draw& draw, uint64_t last, const Result& first_result) {
  const uint64_t begin = draw.begin;
  uint64_t low = begin, high = last;
  while (high - low > 1) {
    draw.begin = low + (high - low) / 2;
    ScriptedDraws draws(script);
    (run(draws) == first_result ? low : high) = draw.begin;
  }
  draw.begin = begin;
  return high;
}

// Calls leaf(result, probability, draws) for every behaviour of run(draws). Results are arrays that compare.
//
// A new draw is cut into pieces where the result changes while all later draws are 0. A draw that is used again later can have
// more borders, which show only then: so at a leaf every piece is checked at its other end, and cut again where that differs.
template <typename Run, typename Leaf>
void Explore(Run& run, std::vector<Draw>& script, Leaf& leaf) {
  ASSERT_LT(script.size(), 64u) << "endless draws";
  script.reserve(64);  // entries are referred to while others are added
  ScriptedDraws draws(script);
  const auto result = run(draws);
  if (draws.missing()) {
    script.push_back(draws.missing_draw());
    const size_t place = script.size() - 1;
    // A coarse grid, so that pieces between equal ends are not overlooked, then bisection.
    constexpr uint64_t kGrid = 8;
    for (uint64_t begin = 0; begin < kNumUniforms;) {
      script[place].begin = begin;
      ScriptedDraws first(script);
      const auto first_result = run(first);
      uint64_t end = kNumUniforms;
      for (uint64_t cell = begin / (kNumUniforms / kGrid) + 1; cell <= kGrid; ++cell) {
        const uint64_t border = std::min(cell * (kNumUniforms / kGrid), kNumUniforms - 1);
        if (border <= begin) break;
        script[place].begin = border;
        ScriptedDraws probe(script);
        const auto probe_result = run(probe);
        script[place].begin = begin;
        if (probe_result != first_result) {
          end = FirstChange(run, script, script[place], border, first_result);
          break;
        }
      }
      script[place].end = end;
      Explore(run, script, leaf);
      begin = end;
    }
    script.pop_back();
    return;
  }
  for (Draw& draw : script) {
    const Draw whole = draw;
    if (whole.end - whole.begin < 2) continue;
    draw.begin = whole.end - 1;
    ScriptedDraws probe(script);
    const auto last_result = run(probe);
    draw.begin = whole.begin;
    if (!probe.missing() && last_result == result) continue;
    // A path that asks for more draws compares by what it would do with zeros; that it asks is a difference of its own.
    const auto with_missing = [&](DrawSource& source) {
      const auto value = run(static_cast<ScriptedDraws&>(source));
      return std::pair(value, static_cast<ScriptedDraws&>(source).missing());
    };
    const uint64_t change = FirstChange(with_missing, script, draw, whole.end - 1, std::pair(result, false));
    draw.end = change;
    Explore(run, script, leaf);
    draw = whole;
    draw.begin = change;
    Explore(run, script, leaf);
    draw = whole;
    return;
  }
  double probability = 1.0;
  for (const Draw& draw : script) probability *= static_cast<double>(draw.end - draw.begin) * 0x1.0p-53;
  leaf(result, probability, draws);
}

using Flat = std::array<int32_t, 4 + 2 * (kMaxDraftTokens + 1)>;

Flat Flatten(const VerifyOutcome& outcome) {
  Flat flat{outcome.num_accepted, outcome.num_emitted, outcome.num_reached, outcome.non_finite};
  for (int32_t i = 0; i < outcome.num_emitted; ++i) {
    flat[4 + 2 * i] = static_cast<int32_t>(outcome.tokens[i]);
    flat[5 + 2 * i] = outcome.source[i];
  }
  return flat;
}

struct Case {
  SpeculationMode mode;
  int32_t num_drafts;
  ToyOptions toy;
};

std::string Describe(const Case& test) {
  const SamplingParams& sampling = test.toy.sampling;
  return std::string(SpeculationModeName(test.mode)) + " drafts " + std::to_string(test.num_drafts) + " live " +
         std::to_string(test.toy.num_live) + (test.toy.spread_blocks ? " spread" : "") + " kind " +
         std::to_string(static_cast<int>(test.toy.draft)) + " T " + std::to_string(sampling.temperature) + " k " +
         std::to_string(sampling.top_k) + " top_p " + std::to_string(sampling.top_p) + " min_p " +
         std::to_string(sampling.min_p) + " banned " + std::to_string(test.toy.banned_tokens) + " seed " +
         std::to_string(test.toy.seed);
}

using Tokens = std::vector<uint32_t>;
using SequenceLaw = std::map<Tokens, double>;

SequenceLaw PlainLaw(ToyModel& model, size_t num_tokens) {
  SequenceLaw law = {{{}, 1.0}};
  for (size_t i = 0; i < num_tokens; ++i) {
    SequenceLaw longer;
    for (const auto& [prefix, mass] : law) {
      const ToyModel::Row& row = model.Target(prefix);
      double sum = 0.0;
      for (uint32_t id : model.live()) {
        const double reported = std::exp(LogProb(row.distribution, id));
        EXPECT_NEAR(reported, row.reference[id], kTolerance) << "log-probabilities describe the sampled distribution (I19)";
        sum += reported;
        if (row.reference[id] == 0.0) continue;
        Tokens next = prefix;
        next.push_back(id);
        longer[next] = mass * row.reference[id];
      }
      EXPECT_NEAR(sum, 1.0, kTolerance);
    }
    law = std::move(longer);
  }
  return law;
}

// Law of the draft after `context`.
std::vector<std::pair<uint32_t, double>> DraftLaw(ToyModel& model, SpeculationMode mode, std::span<const uint32_t> context) {
  std::map<uint32_t, double> law;
  auto run = [&](DrawSource& draws) {
    return std::array<uint32_t, 1>{DrawDraft(mode, model.greedy(), model.Draft(context).distribution, 3, draws)};
  };
  auto leaf = [&](const std::array<uint32_t, 1>& id, double probability, const ScriptedDraws& draws) {
    EXPECT_LE(draws.last_offset(), 3);
    law[id[0]] += probability;
  };
  std::vector<Draw> script;
  Explore(run, script, leaf);
  return {law.begin(), law.end()};
}

// Expected acceptance from the reference probabilities.
double ExpectedByReference(ToyModel& model, SpeculationMode mode, std::span<const uint32_t> context, uint32_t drafted) {
  const ToyModel::Row& target = model.Target(context);
  if (model.greedy() || mode == SpeculationMode::kTargetOnly) return target.reference[drafted];
  const ToyModel::Row& draft = model.Draft(context);
  double overlap = 0.0;
  for (uint32_t id : model.live()) overlap += std::min(target.reference[id], draft.reference[id]);
  return overlap;
}

class SequenceEnumerator {
 public:
  SequenceEnumerator(const Case& test, size_t num_tokens) : test_(test), num_tokens_(num_tokens), model_(test.toy) {}

  void Check() {
    const SequenceLaw plain = PlainLaw(model_, num_tokens_);
    Continue({}, 1.0);
    double difference = 0.0;
    for (const auto& [tokens, mass] : plain) difference = std::max(difference, std::abs(mass - law_[tokens]));
    double total = 0.0;
    for (const auto& [tokens, mass] : law_) {
      total += mass;
      if (!plain.contains(tokens)) difference = std::max(difference, mass);
    }
    EXPECT_NEAR(total, 1.0, kTolerance) << Describe(test_);
    EXPECT_LE(difference, kTolerance) << Describe(test_);
    for (int32_t i = 0; i < test_.num_drafts; ++i) {
      EXPECT_NEAR(accepted_[i], expected_[i], kTolerance) << "acceptance of draft " << i + 1 << ", " << Describe(test_);
    }
  }

 private:
  void Continue(const Tokens& prefix, double mass) {
    if (prefix.size() >= num_tokens_) {
      law_[prefix] += mass;
      return;
    }
    std::map<Tokens, double> next;  // what one iteration leads to, cut at num_tokens
    Tokens drafts;
    DraftsFrom(prefix, &drafts, 1.0, &next, mass);
    for (const auto& [tokens, probability] : next) Continue(tokens, mass * probability);
  }

  void DraftsFrom(const Tokens& prefix, Tokens* drafts, double probability, std::map<Tokens, double>* next, double mass) {
    if (static_cast<int32_t>(drafts->size()) == test_.num_drafts) {
      VerifyDrafts(prefix, *drafts, probability, next, mass);
      return;
    }
    Tokens context = prefix;
    context.insert(context.end(), drafts->begin(), drafts->end());
    auto found = draft_laws_.find(context);
    if (found == draft_laws_.end()) found = draft_laws_.emplace(context, DraftLaw(model_, test_.mode, context)).first;
    for (const auto& [id, draft_probability] : found->second) {
      drafts->push_back(id);
      DraftsFrom(prefix, drafts, probability * draft_probability, next, mass);
      drafts->pop_back();
    }
  }

  void VerifyDrafts(const Tokens& prefix, const Tokens& drafts, double probability, std::map<Tokens, double>* next, double mass) {
    const VerifyRows rows = RowsAlong(model_, prefix, drafts);
    const VerifyArgs args = ArgsFor(model_, test_.mode, drafts, rows);
    double expected[kMaxDraftTokens];
    Tokens context = prefix;
    for (size_t i = 0; i < drafts.size(); ++i) {
      expected[i] = ExpectedAcceptance(test_.mode, model_.greedy(), drafts[i], rows.target[i], rows.draft[i]);
      EXPECT_NEAR(expected[i], ExpectedByReference(model_, test_.mode, context, drafts[i]), kTolerance) << Describe(test_);
      context.push_back(drafts[i]);
    }
    auto run = [&](DrawSource& draws) { return Flatten(Verify(args, draws)); };
    auto leaf = [&](const Flat& flat, double branch, const ScriptedDraws& draws) {
      const int32_t num_accepted = flat[0], num_emitted = flat[1], num_reached = flat[2];
      EXPECT_EQ(num_emitted, num_accepted + 1);
      EXPECT_EQ(num_reached, std::min(num_accepted + 1, test_.num_drafts));
      // Draws belong to the places that were emitted: what later iterations draw for later places is fresh.
      EXPECT_LT(draws.last_offset(), num_emitted);
      Tokens tokens = prefix;
      for (int32_t i = 0; i < num_emitted; ++i) {
        const int32_t source = flat[5 + 2 * i];
        EXPECT_EQ(source, i < num_accepted                   ? i + 1
                          : test_.num_drafts == 0            ? kSourcePlain
                          : num_accepted == test_.num_drafts ? kSourceBonus
                                                             : kSourceCorrected);
        tokens.push_back(static_cast<uint32_t>(flat[4 + 2 * i]));
      }
      for (int32_t i = 0; i < num_reached; ++i) {
        expected_[i] += mass * probability * branch * expected[i];
        if (i < num_accepted) accepted_[i] += mass * probability * branch;
      }
      if (tokens.size() > num_tokens_) tokens.resize(num_tokens_);  // a stop in the middle of accepted drafts cuts the same way
      (*next)[tokens] += probability * branch;
    };
    std::vector<Draw> script;
    Explore(run, script, leaf);
  }

  const Case test_;
  const size_t num_tokens_;
  ToyModel model_;
  SequenceLaw law_;
  std::map<Tokens, std::vector<std::pair<uint32_t, double>>> draft_laws_;
  double accepted_[kMaxDraftTokens] = {}, expected_[kMaxDraftTokens] = {};
};

constexpr DraftKind kKinds[] = {DraftKind::kGood,     DraftKind::kNear,   DraftKind::kSame,   DraftKind::kBad,
                                DraftKind::kDisjoint, DraftKind::kOneHot, DraftKind::kUniform};

struct NamedTransform {
  SamplingParams sampling;
  size_t banned_tokens;
};
const NamedTransform kTransforms[] = {
    {{.temperature = 1.0f}, 0},
    {{.temperature = 0.7f, .top_k = 2}, 0},
    {{.temperature = 1.0f, .top_p = 0.8f}, 0},
    {{.temperature = 1.5f, .min_p = 0.4f}, 0},
    {{.temperature = 1.3f, .top_k = 3, .top_p = 0.9f, .min_p = 0.05f}, 0},
    {{.temperature = 1.0f, .top_p = 0.95f}, 2},
    {{.temperature = 0.0f}, 1},
};

// Vocabularies of 3 to 5 and 0 to 4 drafts, dealt over all kinds of drafts, transforms and modes.
std::vector<Case> AllCases() {
  std::vector<Case> cases;
  uint64_t seed = 1;
  for (SpeculationMode mode : {SpeculationMode::kRejection, SpeculationMode::kTargetOnly}) {
    for (DraftKind kind : kKinds) {
      for (const NamedTransform& transform : kTransforms) {
        ToyOptions toy;
        toy.draft = kind;
        toy.sampling = transform.sampling;
        toy.banned_tokens = transform.banned_tokens;
        for (const auto& [num_live, num_drafts] : std::initializer_list<std::pair<int32_t, int32_t>>{
                 {3, 0}, {3, 1}, {3, 2}, {3, 3}, {3, 4}, {4, 1}, {4, 2}, {5, 1}, {5, 2}}) {
          toy.num_live = num_live;
          toy.seed = seed++;
          cases.push_back({mode, num_drafts, toy});
        }
      }
    }
  }
  return cases;
}

TEST(VerifyEnumeration, SequenceLawIsPlainDecodingsForEveryDraftAndTransform) {
  const std::vector<Case> cases = AllCases();
  ASSERT_GE(cases.size(), 800u);
  for (const Case& test : cases) {
    SequenceEnumerator(test, /*num_tokens=*/3).Check();
    if (HasFailure()) return;  // one failing configuration says enough
  }
}

TEST(VerifyEnumeration, IdsInSeveralSamplingBlocks) {
  for (SpeculationMode mode : {SpeculationMode::kRejection, SpeculationMode::kTargetOnly}) {
    for (DraftKind kind : {DraftKind::kGood, DraftKind::kBad, DraftKind::kDisjoint}) {
      ToyOptions toy;
      toy.num_live = 4;
      toy.spread_blocks = true;
      toy.draft = kind;
      toy.seed = 800;
      SequenceEnumerator({mode, 1, toy}, 2).Check();
    }
  }
}

TEST(VerifyEnumeration, PlainDecoding) {
  for (const NamedTransform& transform : kTransforms) {
    ToyOptions toy;
    toy.num_live = 5;
    toy.sampling = transform.sampling;
    toy.banned_tokens = transform.banned_tokens;
    SequenceEnumerator({SpeculationMode::kOff, 0, toy}, 2).Check();
  }
}

// Whole runs over several iterations with one oracle keyed by absolute position, as Philox is: an iteration that is cut short by
// a rejection leaves draft draws of later positions behind, which the next iteration uses again.
TEST(VerifyEnumeration, ReusingTheDraftDrawsOfDiscardedPlacesIsHarmless) {
  for (DraftKind kind : {DraftKind::kGood, DraftKind::kBad}) {
    for (int32_t num_drafts : {1, 2}) {
      constexpr size_t kTokens = 2;
      ToyOptions toy;
      toy.num_live = 3;
      toy.draft = kind;
      toy.seed = 33;
      ToyModel model(toy);
      SequenceLaw law;
      using Trace = std::array<int32_t, 16>;
      auto run = [&](ScriptedDraws& draws) {
        Trace trace;
        trace.fill(-1);
        size_t traced = 0;
        Tokens tokens;
        while (tokens.size() < kTokens) {
          draws.set_base(static_cast<int32_t>(tokens.size()));
          const Iteration iteration = Iterate(model, SpeculationMode::kRejection, num_drafts, tokens, draws);
          for (uint32_t draft : iteration.drafts) trace[4 + traced++] = static_cast<int32_t>(draft);
          trace[4 + traced++] = 100 + iteration.outcome.num_accepted;
          tokens.insert(tokens.end(), iteration.outcome.tokens, iteration.outcome.tokens + iteration.outcome.num_emitted);
        }
        for (size_t i = 0; i < kTokens; ++i) trace[i] = static_cast<int32_t>(tokens[i]);
        return trace;
      };
      auto leaf = [&](const Trace& trace, double probability, const ScriptedDraws&) {
        law[{static_cast<uint32_t>(trace[0]), static_cast<uint32_t>(trace[1])}] += probability;
      };
      std::vector<Draw> script;
      Explore(run, script, leaf);
      for (const auto& [tokens, mass] : PlainLaw(model, kTokens)) EXPECT_NEAR(law[tokens], mass, kTolerance);
    }
  }
}

}  // namespace
}  // namespace bebop
