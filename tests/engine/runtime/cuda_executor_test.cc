// SPDX-License-Identifier: Apache-2.0
// The engine on a CUDA device against the engine on the CPU: the same requests, the same tokens. A small float32 model; under the
// emulated device float32 products add up in the CPU's order of magnitude only, so log-probabilities are close and tokens equal
// but for near ties.
#include "engine/runtime/cuda_executor.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "engine/model/ops.h"
#include "engine/runtime/scorer.h"
#include "gtest/gtest.h"
#include "kernels/common/cuda_stream.h"
#include "kernels/decode/decode.h"
#include "tests/engine/runtime/cuda_stepped_engine.h"
#include "tests/support/allocation_counter.h"

#if defined(BEBOP_CUDA_EMULATION)
#include "cuda_emulation_control.h"
#endif

namespace bebop::test {
namespace {

using Samples = std::vector<std::map<int32_t, SampleResult>>;

// Submits all at once and runs to the end.
Samples GenerateAll(SteppedEngine& engine, const std::vector<GenerateRequest>& requests) {
  std::vector<std::shared_ptr<Reader>> readers;
  for (const GenerateRequest& request : requests) {
    readers.push_back(std::make_shared<Reader>());
    const absl::Status status = engine.core().Submit(request, readers.back());
    EXPECT_TRUE(status.ok()) << status;
  }
  engine.RunToEnd();
  Samples samples;
  for (const auto& reader : readers) {
    EXPECT_TRUE(reader->finished && reader->done.ok()) << reader->done;
    samples.push_back(reader->samples);
  }
  return samples;
}

void ExpectClose(const std::vector<float>& expected, const std::vector<float>& values, size_t count, const char* what) {
  ASSERT_GE(std::min(expected.size(), values.size()), expected.empty() ? 0 : count) << what;
  for (size_t i = 0; i < std::min(count, expected.size()); ++i) {
    if (!std::isfinite(expected[i])) {  // no draft stood there, or it could not have been drafted
      EXPECT_EQ(std::isnan(expected[i]), std::isnan(values[i])) << what << " of token " << i;
      EXPECT_EQ(std::isinf(expected[i]), std::isinf(values[i])) << what << " of token " << i;
    } else {
      EXPECT_NEAR(expected[i], values[i], kTolerance) << what << " of token " << i;
    }
  }
}

// Everything that a sample reports, up to rounding.
void ExpectSame(const SampleResult& expected, const SampleResult& sample) {
  EXPECT_EQ(expected.token_ids, sample.token_ids);
  if (expected.token_ids != sample.token_ids) return;
  const size_t count = expected.token_ids.size();
  EXPECT_EQ(expected.token_source, sample.token_source);
  EXPECT_EQ(expected.finish, sample.finish);
  EXPECT_EQ(expected.stop_token_id, sample.stop_token_id);
  EXPECT_EQ(expected.stop_string, sample.stop_string);
  ExpectClose(expected.logprobs, sample.logprobs, count, "logprob");
  ExpectClose(expected.raw_logprobs, sample.raw_logprobs, count, "raw logprob");
  ExpectClose(expected.entropy, sample.entropy, count, "entropy");
  ExpectClose(expected.draft_logprobs, sample.draft_logprobs, count, "draft logprob");
  EXPECT_EQ(expected.spec.num_spec_steps, sample.spec.num_spec_steps);
  EXPECT_EQ(expected.spec.num_draft_tokens, sample.spec.num_draft_tokens);
  EXPECT_EQ(expected.spec.num_accepted_draft_tokens, sample.spec.num_accepted_draft_tokens);
  EXPECT_EQ(expected.spec.num_trimmed_tokens, sample.spec.num_trimmed_tokens);
  EXPECT_EQ(expected.spec.drafted_per_pos, sample.spec.drafted_per_pos);
  EXPECT_EQ(expected.spec.accepted_per_pos, sample.spec.accepted_per_pos);
  for (size_t i = 0; i < expected.spec.overlap_per_pos.size(); ++i) {
    EXPECT_NEAR(expected.spec.overlap_per_pos[i], sample.spec.overlap_per_pos[i], 1e-2);
  }
}

void ExpectSame(const Samples& expected, const Samples& samples) {
  ASSERT_EQ(expected.size(), samples.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    ASSERT_EQ(expected[i].size(), samples[i].size());
    for (const auto& [index, sample] : expected[i]) {
      SCOPED_TRACE("request " + std::to_string(i) + " sample " + std::to_string(index));
      ExpectSame(sample, samples[i].at(index));
    }
  }
}

class CudaExecutorTest : public CudaEngineTest {};

// Every mode and number of drafts, in one batch.
std::vector<GenerateRequest> AllModes(float temperature, int32_t max_new_tokens) {
  std::vector<GenerateRequest> requests;
  for (const SpeculationMode mode :
       {SpeculationMode::kOff, SpeculationMode::kTargetOnly, SpeculationMode::kRejection, SpeculationMode::kCoupled}) {
    for (const int32_t drafts : {0, 1, 3, kMaxDraftTokens}) {
      // No drafts are "off" but for the coupled mode, which draws otherwise.
      if (mode == SpeculationMode::kOff ? drafts > 0 : drafts == 0 && mode != SpeculationMode::kCoupled) continue;
      const int32_t i = static_cast<int32_t>(requests.size());
      GenerateRequest request =
          Request("m" + std::to_string(i), Prompt(1 + 5 * (i % 7), static_cast<uint32_t>(i)), max_new_tokens + i % 3);
      request.sampling.temperature = temperature;
      request.sampling.seed = 100 + static_cast<uint64_t>(i);
      if (temperature > 0.0f) {
        request.sampling.top_k = i % 3 == 1 ? 20 : 0;
        request.sampling.top_p = i % 4 == 2 ? 0.8f : 1.0f;
        request.sampling.min_p = i % 5 == 3 ? 0.02f : 0.0f;
      }
      requests.push_back(With(std::move(request), mode, drafts));
    }
  }
  return requests;
}

TEST_F(CudaExecutorTest, GreedyTokensAreTheCpusInEveryMode) {
  const std::vector<GenerateRequest> requests = AllModes(0.0f, 7);
  SteppedEngine cpu({});
  DeviceOptions options;
  options.max_num_seqs = 4;
  DeviceEngine device(options);
  ExpectSame(GenerateAll(cpu, requests), GenerateAll(*device, requests));
}

TEST_F(CudaExecutorTest, SampledTokensAreTheCpusInEveryMode) {
  const std::vector<GenerateRequest> requests = AllModes(1.0f, 7);
  SteppedEngine cpu({});
  DeviceOptions options;
  options.max_num_seqs = 4;
  DeviceEngine device(options);
  ExpectSame(GenerateAll(cpu, requests), GenerateAll(*device, requests));
}

// Three sequences of different modes and lengths, one of them a group, with up to two drafts: enough to change buckets and γ on
// the way.
std::vector<GenerateRequest> FewRequests() {
  std::vector<GenerateRequest> requests = {
      With(Request("off", Prompt(9, 1), 12), SpeculationMode::kOff, 0),
      With(Request("rejection", Prompt(5, 2), 14), SpeculationMode::kRejection, 2),
      With(Request("coupled", Prompt(6, 3), 8), SpeculationMode::kCoupled, 1),
  };
  requests[2].num_samples = 2;
  return requests;
}

TEST_F(CudaExecutorTest, GraphsGiveTheBitsOfSingleLaunches) {
  DeviceOptions options;
  DeviceEngine graphs(options);
  options.graphs = false;
  DeviceEngine launches(options);
  const Samples expected = GenerateAll(*launches, FewRequests()), samples = GenerateAll(*graphs, FewRequests());
  for (size_t i = 0; i < expected.size(); ++i) {
    for (const auto& [index, sample] : expected[i]) {
      EXPECT_EQ(sample.token_ids, samples[i].at(index).token_ids);
      EXPECT_EQ(sample.logprobs, samples[i].at(index).logprobs);
      EXPECT_EQ(sample.entropy, samples[i].at(index).entropy);
    }
  }
}

// Without lookahead the iteration ahead lacks a page again and again; it must then run when its pages have come, and once only.
TEST_F(CudaExecutorTest, IterationsThatLackedPagesRunLater) {
  SteppedEngine cpu({});
  DeviceOptions options;
  options.lookahead_tokens = -1;
  options.page_tokens = 1;
  DeviceEngine device(options);
  ExpectSame(GenerateAll(cpu, FewRequests()), GenerateAll(*device, FewRequests()));
}

TEST_F(CudaExecutorTest, PreemptionChangesNoToken) {
  std::vector<GenerateRequest> requests;
  for (int i = 0; i < 4; ++i) {
    requests.push_back(With(Request("p" + std::to_string(i), Prompt(6 + 3 * i, static_cast<uint32_t>(i)), 22),
                            i % 2 ? SpeculationMode::kRejection : SpeculationMode::kTargetOnly, 2 * (i % 2)));
  }
  SteppedEngine cpu({});
  DeviceOptions options;
  options.max_draft_tokens = 2;
  options.num_pages = 18;  // of 4 positions: the sequences need 7 to 10 in the end
  DeviceEngine device(options);
  ExpectSame(GenerateAll(cpu, requests), GenerateAll(*device, requests));
  EXPECT_GT(device->core().Loads().preemptions, 0);
}

// Chunks of few rows, so that a recompute may end with a chunk of one known token that samples: which is no decode, since the
// device has not drawn the token that it feeds.
TEST_F(CudaExecutorTest, RecomputingInTinyChunksChangesNoToken) {
  std::vector<GenerateRequest> requests;
  for (int i = 0; i < 4; ++i) {
    requests.push_back(With(Request("t" + std::to_string(i), Prompt(4 + i, static_cast<uint32_t>(i)), 13 + i),
                            i % 2 ? SpeculationMode::kRejection : SpeculationMode::kOff, i % 2));
  }
  SteppedEngine cpu({});
  DeviceOptions options;
  options.max_num_seqs = 2;
  options.max_draft_tokens = 1;
  options.max_step_tokens = 4;
  options.page_tokens = 2;
  options.num_pages = 13;
  DeviceEngine device(options);
  ExpectSame(GenerateAll(cpu, requests), GenerateAll(*device, requests));
  EXPECT_GT(device->core().Loads().preemptions, 0);
}

// Iterations captured for 8, 32, 128 .. positions: each holds while it is used, at its border, too.
TEST_F(CudaExecutorTest, LengthClassesReachAsFarAsTheirSequences) {
  std::vector<GenerateRequest> requests;
  // All drafts accepted, so that sequences move by four positions: with prompts of four lengths every distance to a border
  // occurs.
  for (int i = 1; i <= 4; ++i) {
    requests.push_back(With(Request("l" + std::to_string(i), Prompt(i), 33 + i), SpeculationMode::kTargetOnly, 3));
    requests.back().speculation.synthetic_acceptance = 1.0;
  }
  SteppedEngine cpu({});
  DeviceOptions options;
  options.shortest_class = 8;
  options.max_draft_tokens = 3;
  options.max_num_seqs = 1;  // each has the classes to itself
  DeviceEngine device(options);
  ExpectSame(GenerateAll(cpu, requests), GenerateAll(*device, requests));
}

// Whoever comes back from a pause finds its record, however many iterations of others have been published in between.
TEST_F(CudaExecutorTest, PausesThatTakeTurnsLoseNoRecord) {
  std::vector<GenerateRequest> requests;
  for (int i = 0; i < 7; ++i)
    requests.push_back(With(Request("r" + std::to_string(i), Prompt(3 + i), 10), SpeculationMode::kCoupled, i % 2));
  SteppedEngine cpu({});
  const Samples expected = GenerateAll(cpu, requests);
  DeviceEngine device;
  std::vector<std::shared_ptr<Reader>> readers;
  for (const GenerateRequest& request : requests) {
    readers.push_back(std::make_shared<Reader>());
    ASSERT_TRUE(device->core().Submit(request, readers.back()).ok());
  }
  for (int step = 0; !device->core().Idle(); ++step) {
    ASSERT_LT(step, 400);
    // All run for a few steps, then one at a time.
    for (size_t i = 0; i < readers.size(); ++i) readers[i]->room = step < 4 || static_cast<size_t>(step) % readers.size() == i;
    ASSERT_TRUE(device->Step().ok());
  }
  for (size_t i = 0; i < requests.size(); ++i) {
    SCOPED_TRACE(i);
    ASSERT_TRUE(readers[i]->finished);
    ExpectSame(expected[i].at(0), readers[i]->samples.at(0));
  }
}

// Requests come and go at any step: groups, pauses, cancellations, stops of every kind, bans, scores between them. What ends by
// itself ends as it does alone on the CPU.
void RunMix(uint32_t seed) {
  std::mt19937 random(seed);
  SteppedEngine::Options cpu_options;
  static const std::vector<std::string> kTexts = [] {
    std::vector<std::string> texts;
    for (int i = 0; i < 97; ++i) texts.push_back({static_cast<char>('a' + i % 7), static_cast<char>('a' + i % 3)});
    return texts;
  }();
  cpu_options.token_bytes = [](uint32_t token) -> std::string_view { return kTexts[token]; };
  cpu_options.max_step_tokens = 80;
  DeviceOptions options;
  static_cast<SteppedEngine::Options&>(options) = cpu_options;
  options.max_num_seqs = 5;
  options.num_pages = 48;
  DeviceEngine device(options);
  std::vector<GenerateRequest> requests;
  for (int i = 0; i < 8; ++i) {
    const int32_t drafts = static_cast<int32_t>(random() % 3);
    GenerateRequest request =
        With(Request("x" + std::to_string(i), Prompt(static_cast<int32_t>(1 + random() % 14), random() % 90), 4 + random() % 8),
             drafts > 0 ? static_cast<SpeculationMode>(1 + random() % 3) : SpeculationMode::kOff, drafts);
    request.sampling.seed = random();
    request.sampling.temperature = i % 4 == 0 ? 0.0f : 0.9f;
    request.num_samples = 1 + static_cast<int32_t>(random() % 3);
    request.stopping.ignore_eos = random() % 2 == 0;
    if (i % 3 == 0) {
      for (uint32_t id = 0; id < 97; id += 9) request.stopping.stop_token_ids.push_back(id);
      request.stopping.min_new_tokens = static_cast<int32_t>(random() % 4);
    }
    if (i % 3 == 1) request.stopping.stop_strings = {"ab", "caf"};
    if (i == 5) {  // more stop ids than the device looks at
      for (uint32_t id = 0; id < 90; ++id) request.stopping.stop_token_ids.push_back(id);
      request.stopping.min_new_tokens = 3;
    }
    requests.push_back(std::move(request));
  }
  ScoreRequest score;
  score.token_ids = Prompt(30);
  score.draft_depth = 2;
  score.entropy = true;
  SteppedEngine cpu(cpu_options);
  const Samples expected = GenerateAll(cpu, requests);
  const ScoreResult expected_score = cpu.Score(score);

  std::vector<std::shared_ptr<Reader>> readers;
  const auto score_reader = std::make_shared<ScoreCollector>();
  size_t cancelled = requests.size();
  for (int step = 0; step < 400; ++step) {
    if (readers.size() < requests.size() && random() % 2 == 0) {
      readers.push_back(std::make_shared<Reader>());
      ASSERT_TRUE(device->core().Submit(requests[readers.size() - 1], readers.back()).ok());
    }
    if (step == 6) {
      uint64_t handle = 0;
      ASSERT_TRUE(device->core().SubmitScore(score, score_reader, &handle).ok());
    }
    for (const auto& reader : readers) {
      if (random() % 4 == 0) reader->room = step > 60 || random() % 2 == 0;
    }
    if (cancelled == requests.size() && readers.size() > 4 && random() % 4 == 0) {
      const size_t which = random() % readers.size();
      if (!readers[which]->finished) {
        cancelled = which;
        device->core().Detach(requests[which].request_id, readers[which].get());
      }
    }
    const absl::StatusOr<bool> worked = device->Step();
    ASSERT_TRUE(worked.ok()) << worked.status();
    ASSERT_TRUE(device->core().Audit().ok());
    if (readers.size() == requests.size() && device->core().Idle()) break;
  }
  ASSERT_TRUE(device->core().Idle());
  EXPECT_LT(cancelled, requests.size());
  for (size_t i = 0; i < requests.size(); ++i) {
    if (i == cancelled) continue;
    ASSERT_TRUE(readers[i]->finished && readers[i]->done.ok()) << i;
    for (const auto& [index, sample] : expected[i]) {
      SCOPED_TRACE("seed " + std::to_string(seed) + " request " + std::to_string(i) + " sample " + std::to_string(index));
      ExpectSame(sample, readers[i]->samples.at(index));
    }
  }
  ASSERT_TRUE(score_reader->finished && score_reader->done.ok());
  ExpectClose(expected_score.logprobs, score_reader->result.logprobs, expected_score.logprobs.size(), "scored logprob");
  ExpectClose(expected_score.entropy, score_reader->result.entropy, expected_score.entropy.size(), "scored entropy");
  ASSERT_EQ(score_reader->result.draft.size(), 2u);
  for (size_t d = 0; d < 2; ++d) {
    ExpectClose(expected_score.draft[d].logprobs, score_reader->result.draft[d].logprobs, expected_score.draft[d].logprobs.size(),
                "draft score");
  }
}

TEST_F(CudaExecutorTest, WhatHappensToOthersChangesNothing) {
  for (const uint32_t seed : {1u, 2u}) RunMix(seed);
}

// A row that is not finite ends its own sample and nobody else's.
TEST_F(CudaExecutorTest, NonFiniteRowsEndTheirOwnSample) {
  DeviceEngine device;
  // The embedding of token 95 becomes NaN. Embeddings are tied: lm_head keeps the clean matrix.
  ModelWeights& weights = device->weights();
  const int64_t bytes = weights.embedding.rows * weights.embedding.cols * static_cast<int64_t>(sizeof(float));
  auto copy = device->memory().Allocate(bytes, "poisoned embedding");
  ASSERT_TRUE(copy.ok());
  device->memory().Copy(copy->get(), weights.embedding.data, bytes);
  const std::vector<float> row(static_cast<size_t>(weights.embedding.cols), std::numeric_limits<float>::quiet_NaN());
  device->memory().CopyIn(static_cast<float*>(copy->get()) + 95 * weights.embedding.cols, row.data(),
                          static_cast<int64_t>(row.size()) * 4);
  weights.embedding.data = copy->get();

  const GenerateRequest good = With(Request("good", Prompt(7), 10), SpeculationMode::kRejection, 2);
  GenerateRequest bad = With(Request("bad", {4, 95, 6}, 10), SpeculationMode::kRejection, 2);
  SteppedEngine cpu({});
  const Samples expected = GenerateAll(cpu, {good});
  const Samples samples = GenerateAll(*device, {good, bad});
  ExpectSame(expected[0].at(0), samples[0].at(0));
  EXPECT_EQ(samples[1].at(0).finish, FinishReason::kNonFinite);
  EXPECT_TRUE(samples[1].at(0).token_ids.empty());
}

std::vector<float> Download(DeviceMemory& memory, const void* data, int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  memory.CopyOut(values.data(), data, count * 4);
  return values;
}

// Three sequences run in a bucket of four. No row of nobody's writes to a page or a state.
TEST_F(CudaExecutorTest, PaddingTouchesNothing) {
  DeviceEngine device;
  std::vector<GenerateRequest> requests = FewRequests();
  requests[2].num_samples = 1;
  std::vector<std::shared_ptr<Reader>> readers;
  for (const GenerateRequest& request : requests) {
    readers.push_back(std::make_shared<Reader>());
    ASSERT_TRUE(device->core().Submit(request, readers.back()).ok());
  }
  int32_t most_pages = 0, most_states = 0;
  for (bool works = true; works;) {
    const auto worked = device->Step();
    ASSERT_TRUE(worked.ok());
    works = *worked;
    most_pages = std::max(most_pages, device->core().Loads().used_pages);
    most_states = std::max(most_states, device->core().Loads().used_state_slots);
  }
  ASSERT_GT(most_pages, 0);
  const ModelState& state = device->storage().state();
  const auto written = [&](const void* data, int64_t count, int64_t each) {
    const std::vector<float> values = Download(device->memory(), data, count * each);
    int32_t blocks = 0;
    for (int64_t i = 0; i < count; ++i) {
      blocks +=
          std::any_of(values.begin() + i * each, values.begin() + (i + 1) * each, [](float value) { return value != 0.0f; });
    }
    return blocks;
  };
  const KvPagesView& kv = state.kv.front();
  const int64_t page_values = int64_t{kv.num_kv_heads} * kv.page_tokens * kv.head_dim;
  // Pages are handed out anew as sequences end, so this bound is loose by what came and went: nothing here.
  EXPECT_LE(written(kv.k, kv.num_pages, page_values), most_pages);
  EXPECT_LE(written(state.mtp_kv.v, kv.num_pages, page_values), most_pages);
  const LinearStateView& linear = state.linear.front();
  const int64_t matrix = int64_t{linear.num_value_heads} * linear.key_head_dim * linear.value_head_dim;
  EXPECT_LE(written(linear.matrix, linear.num_slots, matrix), most_states);
  EXPECT_GT(written(linear.matrix, linear.num_slots, matrix), 0);
}

TEST_F(CudaExecutorTest, OptionsOutOfRangeAreRefused) {
  const ModelConfig config = SmallConfig();
  cuda::Stream stream({.workspace_bytes = 1 << 20});
  const auto memory = MakeCudaMemory(&stream);
  CudaExecutorOptions good;
  good.max_num_seqs = 4;
  good.max_step_tokens = 36;
  good.max_draft_tokens = 8;
  good.max_model_len = 64;
  const auto refused = [&](const char* word, const auto& change) {
    CudaExecutorOptions options = good;
    change(&options);
    const auto made = MakeCudaExecutor(config, options, nullptr, nullptr, memory.get(), &stream);
    EXPECT_TRUE(absl::IsInvalidArgument(made.status())) << made.status();
    EXPECT_NE(made.status().message().find(word), absl::string_view::npos) << made.status();
  };
  refused("max_draft_tokens: 9", [](auto* options) { options->max_draft_tokens = 9; });
  refused("max_num_seqs: 0", [](auto* options) { options->max_num_seqs = 0; });
  refused("max_step_tokens: 35", [](auto* options) { options->max_step_tokens = 35; });
  refused("page_tokens: 0", [](auto* options) { options->page_tokens = 0; });
  refused("max_model_len: 0", [](auto* options) { options->max_model_len = 0; });
  // Grids have a row of a decode pass in y: 7,281 sequences with 8 drafts are 65,529.
  const auto rows = [](int32_t num_seqs) {
    return [num_seqs](auto* options) {
      options->max_num_seqs = num_seqs;
      options->max_step_tokens = 1 << 20;
    };
  };
  refused("max_num_seqs x (max_draft_tokens + 1): 65538 is outside [1, 65535]", rows(7282));
  ModelConfig wide = config;
  wide.vocab_size = kMaxDecodeVocabSize + 1;
  const absl::Status too_wide = CheckCudaExecutorOptions(wide, good, int64_t{1} << 40);
  EXPECT_TRUE(absl::IsInvalidArgument(too_wide)) << too_wide;
  EXPECT_NE(too_wide.message().find("vocab_size: 1048577"), absl::string_view::npos) << too_wide;
  wide.vocab_size = kMaxDecodeVocabSize;
  EXPECT_TRUE(CheckCudaExecutorOptions(wide, good, int64_t{1} << 40).ok());
}

// What verification takes of the workspace is known at start: the operator's own check would end the process.
TEST_F(CudaExecutorTest, VerificationBeyondTheWorkspaceIsRefused) {
  ModelConfig config = SmallConfig();
  config.vocab_size = 248320;
  CudaExecutorOptions options;
  options.max_num_seqs = 2000;
  options.max_draft_tokens = 8;
  options.max_step_tokens = 18000;
  options.max_model_len = 64;
  const int64_t bytes = VerifyScratchBytes(2000, 8, config.vocab_size);
  EXPECT_GT(bytes, int64_t{2000} * 131072);
  EXPECT_TRUE(CheckCudaExecutorOptions(config, options, bytes).ok());
  const absl::Status refused = CheckCudaExecutorOptions(config, options, bytes - 1);
  EXPECT_TRUE(absl::IsResourceExhausted(refused)) << refused;
  for (const std::string& word : {std::string("max_num_seqs: 2000"), std::to_string(bytes), std::to_string(bytes - 1)}) {
    EXPECT_NE(refused.message().find(word), absl::string_view::npos) << refused;
  }
  // The executor asks the same of its stream.
  cuda::Stream stream({.workspace_bytes = 1 << 20});
  const auto memory = MakeCudaMemory(&stream);
  const auto made = MakeCudaExecutor(config, options, nullptr, nullptr, memory.get(), &stream);
  EXPECT_TRUE(absl::IsResourceExhausted(made.status())) << made.status();
  // Without drafts there is no overlap to keep bins for: 4,096 sequences fit into the default workspace.
  options.max_num_seqs = 4096;
  options.max_draft_tokens = 0;
  EXPECT_TRUE(CheckCudaExecutorOptions(config, options, cuda::StreamOptions{}.workspace_bytes).ok());
}

// In bfloat16 tokens differ from the CPU's sooner or later, whose activations are float32. But what the device reports about its
// tokens is what teacher forcing on the CPU finds for them. Logits of this model are up to 4 in size; some thirty roundings of
// 2^-9 in front of lm_head leave a standard error of 4 2^-9 sqrt(30) = 0.043, four times which no value of a hundred should
// exceed. A wrong key, state or row gives errors of the logits' own size.
TEST_F(CudaExecutorTest, BFloat16LogprobsAreThoseOfTeacherForcing) {
  SteppedEngine::Options cpu_options;
  cpu_options.dtype = DType::kBFloat16;
  cpu_options.page_tokens = 16;
  SteppedEngine cpu(cpu_options);
  DeviceOptions options;
  static_cast<SteppedEngine::Options&>(options) = cpu_options;
  options.max_num_seqs = 4;
  options.shortest_class = 16;
  DeviceEngine device(options);
  const std::vector<GenerateRequest> requests = FewRequests();
  const Samples samples = GenerateAll(*device, requests);
  for (size_t i = 0; i < requests.size(); ++i) {
    for (const auto& [index, sample] : samples[i]) {
      ScoreRequest score;
      score.token_ids = requests[i].prompt;
      score.token_ids.insert(score.token_ids.end(), sample.token_ids.begin(), sample.token_ids.end());
      score.score_start = static_cast<int32_t>(requests[i].prompt.size());
      const ScoreResult forced = cpu.Score(score);
      ASSERT_EQ(forced.logprobs.size(), sample.logprobs.size());
      for (size_t t = 0; t < forced.logprobs.size(); ++t)
        EXPECT_NEAR(forced.logprobs[t], sample.logprobs[t], 0.17) << i << "/" << index << " token " << t;
    }
  }
}

// Sequences with a draft each, past the first steps: buffers have their sizes, the iteration is captured.
void StartSteadyDecoding(DeviceEngine& device, std::vector<std::shared_ptr<Reader>>* readers, int32_t num_sequences) {
  for (int i = 0; i < num_sequences; ++i) {
    readers->push_back(std::make_shared<Reader>());
    GenerateRequest request = With(Request("s" + std::to_string(i), Prompt(4 + i), 200), SpeculationMode::kRejection, 1);
    request.output = {.logprobs = true};
    ASSERT_TRUE(device->core().Submit(request, readers->back()).ok());
  }
  for (int i = 0; i < 5; ++i) ASSERT_TRUE(*device->Step());
}

// A steady step neither allocates nor synchronises, and is one graph and the publication of its records, but for new pages.
TEST_F(CudaExecutorTest, SteadyStepsNeitherAllocateNorSynchronise) {
  DeviceEngine device;
  std::vector<std::shared_ptr<Reader>> readers;
  StartSteadyDecoding(device, &readers, 2);
  constexpr int kSteps = 12;
#if defined(BEBOP_CUDA_EMULATION)
  const emulation::Counters before = emulation::GetCounters();
  for (int i = 0; i < kSteps; ++i) ASSERT_TRUE(*device->Step());
  const emulation::Counters after = emulation::GetCounters();
  EXPECT_EQ(after.allocations, before.allocations);
  EXPECT_EQ(after.frees, before.frees);
  EXPECT_EQ(after.synchronizations, before.synchronizations);
  EXPECT_EQ(after.graph_launches - before.graph_launches, kSteps);
#else
  // Host memory; the emulated device's own bookkeeping would count, too.
  const int64_t before = NumAllocations();
  for (int i = 0; i < kSteps; ++i) ASSERT_TRUE(*device->Step());
  EXPECT_EQ(NumAllocations(), before);
#endif
}

#if defined(BEBOP_CUDA_EMULATION)

// The tokens of a step are those of an iteration that was enqueued in the step before; only the last one has none behind it.
TEST_F(CudaExecutorTest, IterationsAreEnqueuedAStepAhead) {
  DeviceEngine device;
  const auto reader = std::make_shared<Reader>();
  ASSERT_TRUE(device->core().Submit(With(Request("a", Prompt(4), 8), SpeculationMode::kOff, 0), reader).ok());
  const auto enqueued_by_step = [&] {
    const auto launches = [] { return emulation::GetCounters().graph_launches; };
    const int64_t before = launches();
    EXPECT_TRUE(*device->Step());
    return launches() - before;
  };
  EXPECT_EQ(enqueued_by_step(), 0);  // the prompt, and the first iteration of its kind
  for (int i = 0; i < 6; ++i) EXPECT_EQ(enqueued_by_step(), 1);
  EXPECT_FALSE(reader->finished);
  EXPECT_EQ(enqueued_by_step(), 0);
  EXPECT_TRUE(reader->finished);
}

// While the host has the results of one iteration, the next one is there or on its way: a paused sequence finds it when it comes
// back.
TEST_F(CudaExecutorTest, WhatRanAheadOfAPauseIsKept) {
  SteppedEngine cpu({});
  DeviceEngine device;
  std::vector<std::shared_ptr<Reader>> readers;
  StartSteadyDecoding(device, &readers, 2);
  readers[0]->room = false;
  for (int i = 0; i < 6; ++i) ASSERT_TRUE(*device->Step());  // one alone
  const emulation::Counters before = emulation::GetCounters();
  readers[0]->room = true;
  readers[1]->room = false;
  ASSERT_TRUE(*device->Step());
  // Its tokens were there; only the next iteration was enqueued.
  EXPECT_EQ(emulation::GetCounters().graph_launches - before.graph_launches, 1);
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(*device->Step());
  EXPECT_EQ(emulation::GetCounters().graph_launches - before.graph_launches, 4);
}

TEST_F(CudaExecutorTest, DeviceErrorsEndTheEngineWithTheirWords) {
  for (const int64_t operations : {1, 7, 60}) {
    DeviceEngine device;
    std::vector<std::shared_ptr<Reader>> readers;
    StartSteadyDecoding(device, &readers, 1);
    emulation::InjectStickyErrorAfter(operations, cudaErrorIllegalAddress);
    absl::Status status;
    for (int i = 0; i < 100 && status.ok(); ++i) status = device->Step().status();
    EXPECT_TRUE(absl::IsInternal(status)) << status;
    EXPECT_NE(status.message().find("illegal memory access"), absl::string_view::npos) << status;
    EXPECT_NE(status.message().find("cuda"), absl::string_view::npos) << status;  // the call
    EXPECT_TRUE(readers[0]->finished);
    EXPECT_TRUE(absl::IsInternal(readers[0]->done)) << readers[0]->done;
    EXPECT_FALSE(device->core().health().ok());
    emulation::InjectStickyError(cudaSuccess);
  }
}

// What the factory is told to allow for is what the executor takes.
TEST_F(CudaExecutorTest, BytesAreForeseen) {
  const ModelConfig config = SmallConfig();
  cuda::Stream stream({.workspace_bytes = 1 << 20});
  const auto memory = MakeCudaMemory(&stream);
  const auto ops = MakeCudaOps(&stream);
  ModelStateOptions state;
  state.kv_dtype = DType::kFloat32;
  state.num_pages = 8;
  state.num_slots = 4;
  state.window = 8;
  auto storage = ModelStateStorage::Create(config, state, memory.get());
  ASSERT_TRUE(storage.ok());
  CudaExecutorOptions options;
  options.max_num_seqs = 4;
  options.max_step_tokens = 64;
  options.max_draft_tokens = 8;
  options.max_model_len = 64;
  auto model = Model::Create(config, options.max_step_tokens, DType::kFloat32, ops.get(), memory.get());
  ASSERT_TRUE(model.ok());
  const int64_t before = memory->available_bytes();
  const auto executor = MakeCudaExecutor(config, options, model->get(), storage->get(), memory.get(), &stream);
  ASSERT_TRUE(executor.ok()) << executor.status();
  const int64_t taken = before - memory->available_bytes();
  const int64_t foreseen =
      CudaExecutorBytes(config, options) +
      Scorer::DeviceBytes(config, options.max_step_tokens, (64 + 8 + 15) / 16, DType::kFloat32, DType::kFloat32);
  EXPECT_LE(taken, foreseen + 64 * 512);  // what rounding up of 64 allocations may take
  EXPECT_GE(taken, foreseen);
}

TEST_F(CudaExecutorTest, TooLittleMemorySaysWhatFor) {
  const ModelConfig config = SmallConfig();
  cuda::Stream stream({.workspace_bytes = 16 << 20});
  const auto memory = MakeCudaMemory(&stream);
  const auto ops = MakeCudaOps(&stream);
  ModelStateOptions state;
  state.num_pages = 8;
  state.num_slots = 4;
  auto storage = ModelStateStorage::Create(config, state, memory.get());
  auto model = Model::Create(config, 64, DType::kFloat32, ops.get(), memory.get());
  ASSERT_TRUE(storage.ok() && model.ok());
  CudaExecutorOptions options;
  options.max_num_seqs = 64;
  options.max_step_tokens = 64;
  options.max_model_len = 64;
  size_t free_bytes = 0, total_bytes = 0;
  ASSERT_EQ(cudaMemGetInfo(&free_bytes, &total_bytes), cudaSuccess);
  emulation::SetDeviceMemoryBytes(total_bytes - free_bytes + (300 << 10));
  const auto executor = MakeCudaExecutor(config, options, model->get(), storage->get(), memory.get(), &stream);
  emulation::SetDeviceMemoryBytes(total_bytes);
  EXPECT_TRUE(absl::IsResourceExhausted(executor.status())) << executor.status();
  EXPECT_NE(executor.status().message().find("banned ids"), absl::string_view::npos) << executor.status();
}

#endif  // BEBOP_CUDA_EMULATION

// What a batch-invariant engine promises, in the mode that servers run: the chunked form of the delta rule (bf16, heads of 128), prompts that
// compete for the rows of a step, preemption, length classes that change. Alone or among others, every bit is the same.
TEST_F(CudaExecutorTest, ABatchInvariantSequenceDoesNotDependOnItsBatch) {
  DeviceOptions options;
  options.dtype = DType::kBFloat16;
  options.batch_invariant = true;
  options.linear_head_dim = 128;
  options.prefill_cut_tokens = 64;
  options.max_draft_tokens = 1;
  options.max_num_seqs = 2;
  options.max_step_tokens = 2 * 2 + 64;
  options.shortest_class = 32;
  options.page_tokens = 16;
  options.num_pages = 64;
  std::vector<GenerateRequest> requests;
  for (const int32_t length : {100, 90}) {
    const std::string id = std::to_string(length);
    requests.push_back(With(Request(id, Prompt(length, static_cast<uint32_t>(length)), 6), SpeculationMode::kRejection, 1));
    requests.back().priority = 1;
  }
  Samples alone;
  for (const GenerateRequest& request : requests) {
    DeviceEngine engine(options);
    alone.push_back(GenerateAll(*engine, {request})[0]);
  }
  DeviceEngine engine(options);
  std::vector<std::shared_ptr<Reader>> readers;
  for (const GenerateRequest& request : requests) {
    readers.push_back(std::make_shared<Reader>());
    ASSERT_TRUE(engine->core().Submit(request, readers.back()).ok());
  }
  for (int step = 0; step < 5; ++step) ASSERT_TRUE(engine->Step().ok());
  // It takes the slot of the one that came last.
  const auto urgent = std::make_shared<Reader>();
  ASSERT_TRUE(engine->core().Submit(Request("urgent", Prompt(20), 2), urgent).ok());
  engine->RunToEnd();
  int32_t preemptions = 0;
  for (size_t i = 0; i < requests.size(); ++i) {
    ASSERT_TRUE(readers[i]->finished && readers[i]->done.ok()) << readers[i]->done;
    const SampleResult& expected = alone[i].at(0);
    const SampleResult& sample = readers[i]->samples.at(0);
    preemptions += sample.preemptions;
    EXPECT_EQ(expected.token_ids, sample.token_ids) << i;
    ASSERT_EQ(expected.logprobs.size(), 6u) << i;
    EXPECT_TRUE(std::all_of(expected.logprobs.begin(), expected.logprobs.end(), [](float x) { return std::isfinite(x); }));
    EXPECT_EQ(expected.logprobs, sample.logprobs) << i;
    EXPECT_EQ(expected.raw_logprobs, sample.raw_logprobs) << i;
  }
  EXPECT_GT(preemptions, 0);
  EXPECT_TRUE(engine.stream().ok()) << engine.stream().error();
}

}  // namespace
}  // namespace bebop::test
