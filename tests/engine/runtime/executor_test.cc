// SPDX-License-Identifier: Apache-2.0
// Properties of the whole engine on a small random model: speculation, batching, groups, preemption and scoring.
#include "engine/runtime/model_executor.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>

#include "engine/weights/dummy_weights.h"
#include "gtest/gtest.h"
#include "kernels/linear/packed_matrix.h"
#include "tests/engine/runtime/test_engine.h"

namespace bebop::test {
namespace {

std::vector<uint32_t> Prompt(int32_t length, uint32_t start = 3) {
  std::vector<uint32_t> prompt(length);
  for (int32_t i = 0; i < length; ++i) prompt[i] = (start + 7 * i * i + 5 * i) % 96;
  return prompt;
}

// Makes the embedding of `token` NaN. Embeddings are tied: lm_head keeps the clean matrix, the embedding gets a poisoned copy.
void PoisonEmbedding(ModelWeights* weights, uint32_t token) {
  const PackedMatrix& embedding = weights->embedding;
  const int64_t bytes = RoundUp(PackedBytes(embedding.dtype, embedding.rows, embedding.cols), 64);
  std::shared_ptr<void> copy(std::aligned_alloc(64, bytes), std::free);
  std::memcpy(copy.get(), embedding.data, PackedBytes(embedding.dtype, embedding.rows, embedding.cols));
  std::vector<float> row(embedding.cols, std::numeric_limits<float>::quiet_NaN());
  cpu::PackRows(FloatMatrix(row.data(), 1, embedding.cols), embedding.dtype, embedding.rows, embedding.cols, token, copy.get());
  weights->embedding.data = copy.get();
  weights->storage = std::make_shared<std::pair<std::shared_ptr<const void>, std::shared_ptr<void>>>(weights->storage, copy);
}

// Random mixes of BatchMatesThreadsAndChunksChangeNothing (I20); sanitized builds look for memory errors and take a part.
#ifdef BEBOP_SANITIZED
constexpr int kMixes = 4;
#else
constexpr int kMixes = 100;
#endif

GenerateRequest With(GenerateRequest request, SpeculationMode mode, int32_t num_draft_tokens) {
  request.speculation.mode = mode;
  request.speculation.num_draft_tokens = num_draft_tokens;
  return request;
}

TEST(ExecutorTest, GreedyTokensAreTheSameWithAndWithoutDrafts) {
  for (const int32_t length : {1, 5, 33}) {
    SteppedEngine engine({});
    GenerateRequest request = Request("plain", Prompt(length), 24);
    request.sampling.temperature = 0.0f;
    const auto plain = engine.Generate(request);
    ASSERT_EQ(plain.at(0).token_ids.size(), 24u);
    for (const SpeculationMode mode : {SpeculationMode::kTargetOnly, SpeculationMode::kRejection, SpeculationMode::kCoupled}) {
      for (int32_t drafts = 0; drafts <= kMaxDraftTokens; ++drafts) {
        request.request_id = std::to_string(static_cast<int>(mode)) + "/" + std::to_string(drafts);
        const auto drafted = engine.Generate(With(request, mode, drafts));
        EXPECT_EQ(plain.at(0).token_ids, drafted.at(0).token_ids) << "length " << length << " drafts " << drafts;
        EXPECT_EQ(plain.at(0).logprobs, drafted.at(0).logprobs);  // CPU rows do not depend on the batch: equal to the bit
      }
    }
  }
}

TEST(ExecutorTest, CoupledTokensDoNotDependOnTheNumberOfDrafts) {
  SteppedEngine engine({});
  GenerateRequest request = Request("c0", Prompt(9), 48);
  request.num_samples = 3;
  const auto base = engine.Generate(With(request, SpeculationMode::kCoupled, 0));
  for (int32_t drafts = 1; drafts <= kMaxDraftTokens; ++drafts) {
    request.request_id = "c" + std::to_string(drafts);
    const auto drafted = engine.Generate(With(request, SpeculationMode::kCoupled, drafts));
    for (int32_t sample = 0; sample < 3; ++sample) {
      EXPECT_EQ(base.at(sample).token_ids, drafted.at(sample).token_ids) << drafts;
      EXPECT_EQ(base.at(sample).logprobs, drafted.at(sample).logprobs) << drafts;
    }
  }
  EXPECT_NE(base.at(0).token_ids, base.at(1).token_ids);
}

TEST(ExecutorTest, BatchMatesThreadsAndChunksChangeNothing) {
  SteppedEngine alone({});
  std::vector<GenerateRequest> requests;
  for (int i = 0; i < 8; ++i) {
    GenerateRequest request = Request("r" + std::to_string(i), Prompt(1 + 9 * i, i), 20 + i);
    request.num_samples = 1 + i % 3;
    request.sampling.seed = 100 + i;
    request.sampling.top_k = i % 2 ? 20 : 0;
    requests.push_back(With(request, static_cast<SpeculationMode>(i % 4), i % 4 ? 1 + i % 5 : 0));
  }
  std::vector<std::map<int32_t, SampleResult>> expected;
  for (const GenerateRequest& request : requests) expected.push_back(alone.Generate(request));
  std::mt19937 random(7);
  for (int mix = 0; mix < kMixes; ++mix) {
    SteppedEngine::Options options;
    options.num_threads = 1 + mix % 3;
    options.max_step_tokens = mix % 2 ? 80 : 96;
    options.page_tokens = mix % 2 ? 4 : 16;
    SteppedEngine together(options);
    std::vector<std::shared_ptr<Collector>> collectors(requests.size());
    std::vector<size_t> order(requests.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::shuffle(order.begin(), order.end(), random);
    for (const size_t i : order) {
      collectors[i] = std::make_shared<Collector>();
      ASSERT_TRUE(together.core().Submit(requests[i], collectors[i]).ok());
      for (uint32_t steps = random() % 4; steps > 0; --steps) ASSERT_TRUE(together.core().Step().ok());  // joins at any phase
    }
    together.RunToEnd();
    for (size_t i = 0; i < requests.size(); ++i) {
      for (const auto& [index, sample] : expected[i]) {
        EXPECT_EQ(sample.token_ids, collectors[i]->samples.at(index).token_ids) << i << "/" << index;
        EXPECT_EQ(sample.logprobs, collectors[i]->samples.at(index).logprobs) << i << "/" << index;
        EXPECT_EQ(sample.token_source, collectors[i]->samples.at(index).token_source) << i << "/" << index;
      }
    }
  }
}

TEST(ExecutorTest, PreemptionChangesNoToken) {
  std::vector<GenerateRequest> requests;
  for (int i = 0; i < 6; ++i) {
    GenerateRequest request = Request("p" + std::to_string(i), Prompt(6 + 5 * i, i), 40);
    request.num_samples = 1 + i % 2;
    requests.push_back(With(request, i % 2 ? SpeculationMode::kRejection : SpeculationMode::kOff, i % 2 ? 3 : 0));
  }
  SteppedEngine roomy({});
  std::vector<std::map<int32_t, SampleResult>> expected;
  for (const GenerateRequest& request : requests) expected.push_back(roomy.Generate(request));
  SteppedEngine::Options options;
  options.num_pages = 45;  // each needs up to 20 pages of 4
  SteppedEngine tight(options);
  std::vector<std::shared_ptr<Collector>> collectors;
  for (const GenerateRequest& request : requests) {
    collectors.push_back(std::make_shared<Collector>());
    ASSERT_TRUE(tight.core().Submit(request, collectors.back()).ok());
  }
  tight.RunToEnd();
  EXPECT_GT(tight.core().Loads().preemptions, 0);
  for (size_t i = 0; i < requests.size(); ++i) {
    for (const auto& [index, sample] : expected[i]) {
      EXPECT_EQ(sample.token_ids, collectors[i]->samples.at(index).token_ids) << i << "/" << index;
      EXPECT_EQ(sample.logprobs, collectors[i]->samples.at(index).logprobs) << i << "/" << index;
    }
  }
}

// Teacher forcing over prompt + output reproduces what generation reported, for target and drafts.
TEST(ExecutorTest, ScoreAgreesWithGeneration) {
  for (const SpeculationMode mode : {SpeculationMode::kOff, SpeculationMode::kRejection}) {
    SteppedEngine engine({});
    const std::vector<uint32_t> prompt = Prompt(21);
    const auto samples = engine.Generate(With(Request("g", prompt, 60), mode, mode == SpeculationMode::kOff ? 0 : 4));
    const SampleResult& sample = samples.at(0);
    ScoreRequest score;
    score.token_ids = prompt;
    score.token_ids.insert(score.token_ids.end(), sample.token_ids.begin(), sample.token_ids.end());
    score.score_start = static_cast<int32_t>(prompt.size());
    score.entropy = true;
    score.draft_depth = 4;
    score.top_logprobs = 3;
    score.token_ids_logprob = {1, 5};
    const ScoreResult result = engine.Score(score);
    ASSERT_EQ(result.logprobs.size(), sample.token_ids.size());
    ASSERT_EQ(result.positions.size(), sample.token_ids.size());
    for (size_t i = 0; i < sample.token_ids.size(); ++i) {
      EXPECT_NEAR(result.logprobs[i], sample.logprobs[i], 2e-4);
      EXPECT_NEAR(result.logprobs[i], sample.raw_logprobs[i], 2e-4);
      EXPECT_NEAR(result.entropy[i], sample.entropy[i], 2e-4);
      EXPECT_GE(result.positions[i].top_logprobs[0], result.logprobs[i]);
      EXPECT_EQ(result.positions[i].asked_logprobs.size(), 2u);
    }
    if (mode == SpeculationMode::kOff) continue;
    // A token accepted at depth d was drafted by the d-th recurrent step with exactly these inputs.
    int32_t compared = 0;
    for (size_t i = 0; i < sample.token_ids.size(); ++i) {
      const int32_t depth = sample.token_source[i];
      if (depth < 1) continue;
      const DraftScore& draft = result.draft.at(depth - 1);
      const int32_t place = static_cast<int32_t>(prompt.size() + i);
      EXPECT_NEAR(draft.logprobs.at(place - draft.start), sample.draft_logprobs[i], 2e-4) << "depth " << depth;
      ++compared;
    }
    EXPECT_GT(compared, 0);
  }
}

TEST(ExecutorTest, ScoringInChunksGivesTheSameBits) {
  ScoreRequest score;
  score.token_ids = Prompt(150);
  score.draft_depth = 5;
  score.entropy = true;
  SteppedEngine::Options small;
  small.max_step_tokens = 72;
  SteppedEngine::Options large;
  large.max_step_tokens = 200;
  const ScoreResult a = SteppedEngine(small).Score(score);
  const ScoreResult b = SteppedEngine(large).Score(score);
  EXPECT_EQ(a.logprobs.size(), 149u);
  EXPECT_EQ(a.logprobs, b.logprobs);
  ASSERT_EQ(a.draft.size(), 5u);
  for (int depth = 1; depth <= 5; ++depth) {
    EXPECT_EQ(a.draft[depth - 1].start, depth + 1);
    EXPECT_EQ(a.draft[depth - 1].logprobs.size(), static_cast<size_t>(150 - depth - 1));
    EXPECT_EQ(a.draft[depth - 1].logprobs, b.draft[depth - 1].logprobs);
    EXPECT_EQ(a.draft[depth - 1].overlap, b.draft[depth - 1].overlap);
  }
}

// Measured acceptance agrees with the summed overlap of the same reached positions, within four standard errors.
TEST(ExecutorTest, MeasuredAcceptanceIsTheSummedOverlap) {
  for (const SpeculationMode mode : {SpeculationMode::kTargetOnly, SpeculationMode::kRejection, SpeculationMode::kCoupled}) {
    SteppedEngine engine({});
    GenerateRequest request = With(Request("a", Prompt(5), 120), mode, 3);
    request.num_samples = 8;
    request.sampling.temperature = 1.5f;
    SpecCounts total;
    for (const auto& [index, sample] : engine.Generate(request)) total.Add(sample.spec);
    for (int position = 0; position < 3; ++position) {
      const double drafted = total.drafted_per_pos[position];
      if (drafted < 30) continue;
      EXPECT_NEAR(total.accepted_per_pos[position], total.overlap_per_pos[position], 4 * std::sqrt(0.25 * drafted)) << position;
    }
    EXPECT_GT(total.drafted_per_pos[0], 300);
  }
}

// Source counts, emitted tokens and speculation counts close (I26), also when a stop trims.
TEST(ExecutorTest, CountsClose) {
  SteppedEngine engine({});
  GenerateRequest request = With(Request("n", Prompt(12), 100), SpeculationMode::kRejection, 5);
  request.num_samples = 6;
  request.stopping.stop_token_ids = {1, 2, 3, 4, 5, 6, 7, 8};
  request.stopping.min_new_tokens = 3;
  for (const auto& [index, sample] : engine.Generate(request)) {
    int32_t not_drafted = 0;
    for (const int32_t source : sample.token_source) not_drafted += source <= 0;
    EXPECT_EQ(static_cast<int32_t>(sample.token_ids.size()),
              not_drafted + sample.spec.num_accepted_draft_tokens - sample.spec.num_trimmed_tokens);
    EXPECT_GE(sample.token_ids.size(), 3u);
    for (size_t i = 0; i + 1 < sample.token_ids.size(); ++i) {
      EXPECT_TRUE(sample.token_ids[i] == 0 || sample.token_ids[i] > 8) << "a stop id inside";
    }
  }
}

TEST(ExecutorTest, ANonFiniteRowEndsItsSampleAndLeavesOthersBitEqual) {
  const auto run = [](bool poison) {
    SteppedEngine engine({});
    if (poison) PoisonEmbedding(&engine.weights(), 90);
    auto bad = std::make_shared<Collector>(), good = std::make_shared<Collector>();
    std::vector<uint32_t> prompt = Prompt(10);
    prompt[4] = 90;
    EXPECT_TRUE(engine.core().Submit(With(Request("bad", prompt, 30), SpeculationMode::kRejection, 3), bad).ok());
    GenerateRequest other = With(Request("good", Prompt(14, 1), 30), SpeculationMode::kRejection, 3);
    EXPECT_TRUE(engine.core().Submit(other, good).ok());
    engine.RunToEnd();
    return std::make_pair(bad->samples.at(0), good->samples.at(0));
  };
  const auto clean = run(false), poisoned = run(true);
  ASSERT_EQ(clean.first.finish, FinishReason::kLength);
  EXPECT_EQ(poisoned.first.finish, FinishReason::kNonFinite);
  EXPECT_TRUE(poisoned.first.token_ids.empty());
  // The other sample keeps its bits up to where it would itself read the poisoned embedding.
  const auto& tokens = clean.second.token_ids;
  const auto count = static_cast<size_t>(std::find(tokens.begin(), tokens.end(), 90u) - tokens.begin());
  ASSERT_GE(count, 5u);
  ASSERT_GE(poisoned.second.token_ids.size(), count);
  for (size_t i = 0; i < count; ++i) {
    EXPECT_EQ(tokens[i], poisoned.second.token_ids[i]) << i;
    EXPECT_EQ(clean.second.logprobs[i], poisoned.second.logprobs[i]) << i;
  }
}

// Greedy, with new weights after `num_tokens` tokens, or a few more if a step brings more; caches are kept.
SampleResult GenerateOverSwap(GenerateRequest request, const ModelWeights* next, size_t num_tokens) {
  class Streamed final : public GenerateObserver {
   public:
    void OnTokens(const SampleResult& partial, int32_t) override { num_tokens = partial.token_ids.size(); }
    void OnSample(const std::shared_ptr<const SampleResult>& result) override { sample = *result; }
    void OnDone(const absl::Status&) override {}
    size_t num_tokens = 0;
    SampleResult sample;
  };
  request.sampling.temperature = 0.0f;
  request.stream_tokens = true;
  SteppedEngine engine({});
  const auto observer = std::make_shared<Streamed>();
  EXPECT_TRUE(engine.core().Submit(request, observer).ok());
  while (observer->num_tokens < num_tokens) EXPECT_TRUE(engine.Step().ok());
  if (next != nullptr) {
    EXPECT_TRUE(engine.core().Commit(next, {.target_step = 9, .draft_step = 9, .label = "next"}, InFlight::kKeep).ok());
  }
  engine.RunToEnd();
  return observer->sample;
}

// Drafts that stand when weights change were made by the layer before. The new target judges them: greedy tokens are those of no drafts, to the bit,
// and each is stamped with the weights whose pass drew it.
TEST(ExecutorTest, StandingDraftsAreJudgedByTheNewTarget) {
  ThreadPool pool(1);
  const auto memory = MakeHostMemory();
  const auto next = *MakeDummyWeights(SmallConfig(), DType::kFloat32, 2, pool, memory.get());
  for (const int32_t drafts : {1, kMaxDraftTokens}) {
    const GenerateRequest request = With(Request("drafted", Prompt(11), 24), SpeculationMode::kRejection, drafts);
    const SampleResult drafted = GenerateOverSwap(request, next.get(), 9);
    ASSERT_EQ(drafted.weight_spans.size(), 2u);
    const int32_t before = drafted.weight_spans[0].end;
    EXPECT_GE(before, 9);
    EXPECT_EQ(drafted.weight_spans[0], (WeightSpan{.target_step = 0, .draft_step = 0, .label = "", .begin = 0, .end = before}));
    EXPECT_EQ(drafted.weight_spans[1], (WeightSpan{.target_step = 9, .draft_step = 9, .label = "next", .begin = before, .end = 24}));
    EXPECT_TRUE(drafted.kv_mixed);
    const SampleResult plain = GenerateOverSwap(With(request, SpeculationMode::kOff, 0), next.get(), static_cast<size_t>(before));
    EXPECT_EQ(plain.weight_spans, drafted.weight_spans);
    EXPECT_EQ(plain.token_ids, drafted.token_ids) << drafts;
    EXPECT_EQ(plain.logprobs, drafted.logprobs) << drafts;
    // The weights do make a difference.
    const SampleResult undisturbed = GenerateOverSwap(request, nullptr, 0);
    EXPECT_TRUE(std::equal(drafted.token_ids.begin(), drafted.token_ids.begin() + before, undisturbed.token_ids.begin()));
    EXPECT_NE(undisturbed.token_ids, drafted.token_ids);
  }
}

TEST(ExecutorTest, ScoresOfANonFiniteSequenceAreNaNAndOthersKeepTheirBits) {
  ScoreRequest good, bad;
  good.token_ids = Prompt(20);
  good.draft_depth = 3;
  good.entropy = true;
  bad = good;
  bad.token_ids[5] = 90;
  SteppedEngine clean({}), poisoned({});
  const ScoreResult expected = clean.Score(good);
  PoisonEmbedding(&poisoned.weights(), 90);
  const ScoreResult nan = poisoned.Score(bad);
  ASSERT_EQ(nan.logprobs.size(), 19u);
  EXPECT_FALSE(std::isnan(nan.logprobs[3]));
  for (size_t i = 5; i < nan.logprobs.size(); ++i) EXPECT_TRUE(std::isnan(nan.logprobs[i]) && std::isnan(nan.entropy[i])) << i;
  for (const DraftScore& draft : nan.draft) {
    for (size_t i = 5; i < draft.logprobs.size(); ++i) EXPECT_TRUE(std::isnan(draft.logprobs[i]) && std::isnan(draft.overlap[i])) << i;
  }
  EXPECT_EQ(poisoned.Score(good).logprobs, expected.logprobs);
}

}  // namespace
}  // namespace bebop::test
