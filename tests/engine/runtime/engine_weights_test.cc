// SPDX-License-Identifier: Apache-2.0
// Weight updates, pauses and sleep through the threaded engine with a real model. Also run under TSan.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include <unistd.h>

#include "absl/strings/match.h"
#include "engine/base/mutex.h"
#include "engine/base/status_reason.h"
#include "engine/memory/device_memory.h"
#include "engine/runtime/engine.h"
#include "engine/weights/dummy_weights.h"
#include "engine/weights/resident_tensor.h"
#include "engine/weights/weight_files.h"
#include "gtest/gtest.h"
#include "tests/engine/runtime/test_engine.h"

namespace bebop::test {
namespace {

constexpr char kTinyModel[] = "tests/models/bebop-tiny";

// Keeps samples and the tokens streamed so far, and lets a thread wait for either. Has no room once a sample has `stop_at` tokens, until Open: so
// that what the test does next finds the sample where it should be.
class Listener final : public GenerateObserver {
 public:
  explicit Listener(size_t stop_at) : stop_at_(stop_at) {}
  bool HasRoom() const override { return streamed_tokens_ < stop_at_; }
  void Open(Engine& engine, size_t stop_at = SIZE_MAX) {
    stop_at_ = stop_at;
    engine.Wake();
  }
  void OnTokens(const SampleResult& partial, int32_t /*begin*/) override {
    MutexLock lock(&mutex_);
    streamed_tokens_ = std::max<size_t>(streamed_tokens_, partial.token_ids.size());
    changed_.NotifyAll();
  }
  void OnSample(const std::shared_ptr<const SampleResult>& sample) override {
    MutexLock lock(&mutex_);
    samples_[sample->sample_index] = *sample;
  }
  void OnDone(const absl::Status& status) override {
    MutexLock lock(&mutex_);
    done_ = true;
    status_ = status;
    changed_.NotifyAll();
  }
  // By index.
  std::map<int32_t, SampleResult> Wait() {
    MutexLock lock(&mutex_);
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    while (!done_ && std::chrono::steady_clock::now() < end) changed_.WaitFor(&mutex_, std::chrono::milliseconds(50));
    EXPECT_TRUE(done_);
    EXPECT_EQ(status_, absl::OkStatus());
    return samples_;
  }
  // Until some sample has that many tokens.
  void WaitTokens(size_t count) {
    MutexLock lock(&mutex_);
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    while (streamed_tokens_ < count && std::chrono::steady_clock::now() < end) changed_.WaitFor(&mutex_, std::chrono::milliseconds(50));
    EXPECT_GE(streamed_tokens_, count);
  }
  size_t num_tokens() const { return streamed_tokens_; }  // of the longest sample

 private:
  std::atomic<size_t> stop_at_, streamed_tokens_{0};
  Mutex mutex_;
  CondVar changed_;
  std::map<int32_t, SampleResult> samples_ ABSL_GUARDED_BY(mutex_);
  bool done_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
};

// Runs a call that waits, and joins it however the test ends. Declared behind what the call uses.
class Background {
 public:
  explicit Background(std::function<void()> call) : thread_(std::move(call)) {}
  ~Background() { Join(); }
  void Join() {
    if (thread_.joinable()) thread_.join();
  }

 private:
  std::thread thread_;
};

// True once `condition` holds; false after a minute.
bool WaitUntil(const std::function<bool()>& condition) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (!condition()) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

// Steps that take `pause` longer than they do.
class SlowExecutor final : public Executor {
 public:
  SlowExecutor(std::unique_ptr<Executor> inner, std::chrono::milliseconds pause) : inner_(std::move(inner)), pause_(pause) {}
  absl::Status Execute(const StepPlan& plan, StepResult* result) override {
    std::this_thread::sleep_for(pause_);
    return inner_->Execute(plan, result);
  }
  absl::Status SetWeights(const ModelWeights* weights, int64_t epoch) override { return inner_->SetWeights(weights, epoch); }
  absl::Status Quiesce() override { return inner_->Quiesce(); }

 private:
  const std::unique_ptr<Executor> inner_;
  const std::chrono::milliseconds pause_;
};

class ScoreListener final : public ScoreObserver {
 public:
  void OnScore(const absl::Status& status, ScoreResult /*result*/) override {
    EXPECT_EQ(status, absl::OkStatus());
    done = true;
  }
  std::atomic<bool> done{false};
};

class EngineWeightsTest : public testing::Test {
 protected:
  static std::unique_ptr<Engine> Make(uint64_t seed, std::chrono::milliseconds step_pause = {}, int32_t max_step_tokens = 0) {
    EngineOptions options;
    options.model_path = WriteSmallConfigFolder();
    options.load_dummy = true;
    options.dummy_seed = seed;
    options.num_threads = 2;
    options.max_num_seqs = 8;
    options.max_step_tokens = max_step_tokens;
    options.dtype = DType::kFloat32;
    absl::StatusOr<std::unique_ptr<Engine>> engine = Engine::Create(options, [step_pause](std::unique_ptr<Executor> made) {
      return step_pause.count() > 0 ? std::make_unique<SlowExecutor>(std::move(made), step_pause) : std::move(made);
    });
    EXPECT_TRUE(engine.ok()) << engine.status();
    return engine.ok() ? *std::move(engine) : nullptr;
  }
  // What an engine made with that seed loads, under another step.
  std::unique_ptr<ModelWeights> Weights(uint64_t seed, int64_t step) {
    absl::StatusOr<std::unique_ptr<ModelWeights>> weights = MakeDummyWeights(SmallConfig(), DType::kFloat32, seed, pool_, memory_.get());
    EXPECT_TRUE(weights.ok());
    (*weights)->version.target_step = (*weights)->version.draft_step = step;
    (*weights)->version.label = "step " + std::to_string(step);
    return *std::move(weights);
  }
  static GenerateRequest Greedy(const std::string& id, int32_t max_new_tokens) {
    GenerateRequest request = Request(id, {1, 2, 3, 4, 5}, max_new_tokens);
    request.sampling.temperature = 0;
    request.speculation = {SpeculationMode::kRejection, 3, -1.0};
    request.stream_tokens = true;
    return request;
  }
  static std::shared_ptr<Listener> Submit(Engine& engine, const GenerateRequest& request, size_t stop_at = SIZE_MAX) {
    auto listener = std::make_shared<Listener>(stop_at);
    EXPECT_EQ(engine.Submit(request, listener), absl::OkStatus());
    return listener;
  }
  static SampleResult Run(Engine& engine, const GenerateRequest& request) { return Submit(engine, request)->Wait().at(0); }

  ThreadPool pool_{2};
  std::unique_ptr<DeviceMemory> memory_ = MakeHostMemory();
};

void ExpectTiled(const SampleResult& sample) {
  int32_t end = 0;
  for (const WeightSpan& span : sample.weight_spans) {
    EXPECT_EQ(span.begin, end);
    EXPECT_GT(span.end, span.begin);
    end = span.end;
  }
  EXPECT_EQ(end, static_cast<int32_t>(sample.token_ids.size()));
}

// The tiny model with other signs in its second half.
std::string WriteOtherTinyModel() {
  const std::filesystem::path folder = std::filesystem::temp_directory_path() / ("bebop-other-tiny-" + std::to_string(getpid()));
  std::filesystem::create_directories(folder);
  for (const char* name : {"config.json", "model.safetensors"}) {
    std::ifstream in(std::filesystem::path(kTinyModel) / name, std::ios::binary);
    std::string bytes((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
    if (std::string_view(name) == "model.safetensors") {
      for (size_t i = bytes.size() - 1; i > bytes.size() / 2; i -= 2) bytes[i] = static_cast<char>(bytes[i] ^ 0x80);
    }
    std::ofstream(folder / name, std::ios::binary) << bytes;
  }
  return folder;
}

// I7: a checkpoint that is read into an engine gives the tokens of an engine that loaded it.
TEST_F(EngineWeightsTest, UpdatingToACheckpointIsLoadingIt) {
  EngineOptions options;
  options.model_path = kTinyModel;
  options.num_threads = 2;
  std::unique_ptr<Engine> loaded = Engine::Create(options).value();
  options.model_path = WriteOtherTinyModel();
  std::unique_ptr<Engine> updated = Engine::Create(options).value();
  std::filesystem::remove_all(options.model_path);
  GenerateRequest request = Greedy("a", 40);
  request.prompt = {10, 20, 30, 40, 50, 60, 70};
  const SampleResult expected = Run(*loaded, request);
  EXPECT_NE(Run(*updated, request).token_ids, expected.token_ids);

  WeightUpdateSpec spec;
  spec.update_id = "u";
  spec.target_step = 7;
  for (const TensorInfo& tensor : updated->weight_version().tensors) spec.manifest.push_back({tensor.name, FormName(tensor.form), tensor.shape});
  absl::StatusOr<std::unique_ptr<WeightUpdate>> update = updated->StartWeightUpdate(spec, 1LL << 40);
  ASSERT_TRUE(update.ok()) << update.status();
  const absl::StatusOr<WeightRoot> root = WeightRoot::Open(kTinyModel);
  ASSERT_TRUE(root.ok());
  ASSERT_EQ(ReadWeights(*root, "model.safetensors", **update), absl::OkStatus());
  absl::StatusOr<std::unique_ptr<ModelWeights>> next = (*update)->Finish({});
  ASSERT_TRUE(next.ok()) << next.status();
  update->reset();
  const absl::StatusOr<CommitResult> commit = updated->CommitWeights(*std::move(next), InFlight::kKeep, absl::Seconds(10));
  ASSERT_TRUE(commit.ok()) << commit.status();
  request.request_id = "b";
  const SampleResult sample = Run(*updated, request);
  EXPECT_EQ(sample.token_ids, expected.token_ids);
  EXPECT_EQ(sample.logprobs, expected.logprobs);
  EXPECT_FALSE(sample.kv_mixed);
  ASSERT_EQ(sample.weight_spans.size(), 1u);
  EXPECT_EQ(sample.weight_spans[0].target_step, 7);
  EXPECT_EQ(updated->weight_version().target_step, 7);
  EXPECT_EQ(updated->weights()->version.target_digest, updated->weight_version().target_digest);
  const absl::StatusOr<WeightVersion> rehashed = updated->RehashWeights();
  ASSERT_TRUE(rehashed.ok());
  EXPECT_EQ(rehashed->target_digest, updated->weight_version().target_digest);
}

// After a commit with kRecompute the rest of a sample is what the new weights alone would say behind the tokens so far.
TEST_F(EngineWeightsTest, RecomputedSamplesGoOnAsUnderTheNewWeightsAlone) {
  std::unique_ptr<Engine> engine = Make(1), reference = Make(2);
  auto listener = Submit(*engine, Greedy("a", 120), 10);
  listener->WaitTokens(10);
  const absl::StatusOr<CommitResult> commit = engine->CommitWeights(Weights(2, 5), InFlight::kRecompute, absl::Seconds(10));
  ASSERT_TRUE(commit.ok()) << commit.status();
  EXPECT_EQ(commit->recomputed, 1);
  listener->Open(*engine);
  EXPECT_EQ(commit->kept + commit->ended, 0);
  EXPECT_GE(commit->swap_time, absl::ZeroDuration());
  const SampleResult sample = listener->Wait().at(0);
  ExpectTiled(sample);
  ASSERT_EQ(sample.weight_spans.size(), 2u);
  EXPECT_EQ(sample.weight_spans[0].target_step, 0);
  EXPECT_EQ(sample.weight_spans[1].target_step, 5);
  EXPECT_EQ(sample.weight_spans[1].label, "step 5");
  EXPECT_FALSE(sample.kv_mixed);
  EXPECT_EQ(sample.preemptions, 1);

  const auto begin = sample.token_ids.begin() + sample.weight_spans[1].begin;
  GenerateRequest rest = Greedy("rest", 120 - sample.weight_spans[1].begin);
  rest.prompt.insert(rest.prompt.end(), sample.token_ids.begin(), begin);
  EXPECT_EQ(std::vector<uint32_t>(begin, sample.token_ids.end()), Run(*reference, rest).token_ids);
  // Whoever comes later knows only the new weights.
  const SampleResult fresh = Run(*engine, Greedy("b", 30));
  EXPECT_EQ(fresh.token_ids, Run(*reference, Greedy("b", 30)).token_ids);
  const EngineLoads loads = engine->GetLoads();
  EXPECT_EQ(loads.weight_commits, 1);
  EXPECT_EQ(loads.target_step, 5);
  EXPECT_EQ(loads.last_swap_time, commit->swap_time);
  EXPECT_GE(loads.recomputed_tokens, 5 + 10 - 1);
  EXPECT_EQ(loads.samples_by_spread[5], 1);
  EXPECT_EQ(loads.samples_by_spread[0], 1);
  EXPECT_EQ(loads.version_spec.num_spec_steps + loads.previous_version_spec.num_spec_steps, loads.spec.num_spec_steps);
  EXPECT_GT(loads.version_spec.num_spec_steps, 0);
  EXPECT_GT(loads.previous_version_spec.num_spec_steps, 0);
}

TEST_F(EngineWeightsTest, KeptSamplesGoOnWithTheirCaches) {
  std::unique_ptr<Engine> engine = Make(1), reference = Make(2);
  auto listener = Submit(*engine, Greedy("a", 120), 10);
  listener->WaitTokens(10);
  const absl::StatusOr<CommitResult> commit = engine->CommitWeights(Weights(2, 5), InFlight::kKeep, absl::Seconds(10));
  ASSERT_TRUE(commit.ok());
  EXPECT_EQ(commit->kept, 1);
  listener->Open(*engine);
  const SampleResult sample = listener->Wait().at(0);
  ExpectTiled(sample);
  ASSERT_EQ(sample.weight_spans.size(), 2u);
  EXPECT_TRUE(sample.kv_mixed);
  EXPECT_EQ(sample.preemptions, 0);
  const auto begin = sample.token_ids.begin() + sample.weight_spans[1].begin;
  GenerateRequest rest = Greedy("rest", 120 - sample.weight_spans[1].begin);
  rest.prompt.insert(rest.prompt.end(), sample.token_ids.begin(), begin);
  EXPECT_NE(std::vector<float>(sample.logprobs.begin() + sample.weight_spans[1].begin, sample.logprobs.end()), Run(*reference, rest).logprobs)
      << "the old cache makes a difference, or this test proves nothing";
}

// What an abort cut is gone on with, by draws at the same places and the same drafts.
TEST_F(EngineWeightsTest, ResumedSamplesEndAsUndisturbedOnes) {
  for (const SpeculationMode mode : {SpeculationMode::kOff, SpeculationMode::kRejection, SpeculationMode::kCoupled}) {
    for (const float temperature : {0.0f, 1.0f}) {
      if (mode == SpeculationMode::kOff && temperature == 0.0f) continue;
      std::unique_ptr<Engine> engine = Make(1), other = Make(1);
      GenerateRequest request = Greedy("a", 60);
      request.num_samples = 3;
      request.sampling.temperature = temperature;
      request.speculation.mode = mode;
      const std::map<int32_t, SampleResult> expected = Submit(*other, request)->Wait();
      auto listener = Submit(*engine, request, 8);
      listener->WaitTokens(8);
      const absl::StatusOr<CommitResult> commit = engine->CommitWeights(Weights(2, 5), InFlight::kAbort, absl::Seconds(10));
      ASSERT_TRUE(commit.ok());
      ASSERT_EQ(commit->ended, 3);
      std::map<int32_t, SampleResult> cut = listener->Wait();
      GenerateRequest rest = request;
      rest.request_id = "rest";
      for (const auto& [index, sample] : cut) {
        EXPECT_EQ(sample.finish, FinishReason::kSuperseded);
        EXPECT_LT(sample.token_ids.size(), 60u);
        rest.resume.push_back(sample);
      }
      // Elsewhere, under the weights of its beginning; and one of them alone.
      const std::map<int32_t, SampleResult> whole = Submit(*other, rest)->Wait();
      ASSERT_EQ(whole.size(), 3u);
      for (const auto& [index, sample] : whole) {
        EXPECT_EQ(sample.token_ids, expected.at(index).token_ids) << "mode " << static_cast<int>(mode) << " temperature " << temperature;
        EXPECT_EQ(sample.logprobs, expected.at(index).logprobs);
        EXPECT_EQ(sample.token_source, expected.at(index).token_source);
        EXPECT_EQ(sample.spec.num_accepted_draft_tokens, expected.at(index).spec.num_accepted_draft_tokens);
        EXPECT_EQ(sample.weight_spans.size(), 1u);
        EXPECT_FALSE(sample.kv_mixed);
      }
      rest.request_id = "one";
      rest.resume = {cut.at(2)};
      rest.num_samples = 1;
      EXPECT_EQ(Submit(*other, rest)->Wait().at(2).token_ids, expected.at(2).token_ids);
    }
  }
}

TEST_F(EngineWeightsTest, ACommitWaitsForWhatRunsAndGivesUpAtItsDeadline) {
  std::unique_ptr<Engine> engine = Make(1);
  auto running = Submit(*engine, Greedy("a", 100), 2);
  running->WaitTokens(2);
  const absl::Status late = engine->CommitWeights(Weights(2, 5), InFlight::kWait, absl::Milliseconds(20)).status();
  EXPECT_EQ(late.code(), absl::StatusCode::kDeadlineExceeded) << late;
  EXPECT_EQ(engine->weight_version().target_step, 0);

  auto longer = Submit(*engine, Greedy("b", 100), 2);
  longer->WaitTokens(2);
  std::shared_ptr<Listener> next;
  std::unique_ptr<ModelWeights> weights = Weights(2, 6);
  Background newcomer([&] {
    EXPECT_TRUE(WaitUntil([&] { return engine->control().committing; }));
    next = Submit(*engine, Greedy("c", 20));
    running->Open(*engine, 40);
    running->WaitTokens(40);
    EXPECT_EQ(next->num_tokens(), 0u) << "nothing begins that the swap would wait for";
    running->Open(*engine);
    longer->Open(*engine);
  });
  const absl::StatusOr<CommitResult> commit = engine->CommitWeights(std::move(weights), InFlight::kWait, absl::Seconds(60));
  newcomer.Join();
  ASSERT_TRUE(commit.ok()) << commit.status();
  EXPECT_EQ(commit->kept + commit->recomputed + commit->ended, 0);
  const SampleResult before = longer->Wait().at(0), after = next->Wait().at(0);
  ASSERT_EQ(before.weight_spans.size(), 1u);
  EXPECT_EQ(before.weight_spans[0].target_step, 0);
  ASSERT_EQ(after.weight_spans.size(), 1u);
  EXPECT_EQ(after.weight_spans[0].target_step, 6);
}

// Weights whose tied embedding is nothing but the rows that are `step` modulo kModulus: where the logits of others are 0, greedy sampling picks one of
// these rows, so that each token tells which weights drew it.
constexpr int64_t kModulus = 4;

std::unique_ptr<ModelWeights> TellWith(std::unique_ptr<ModelWeights> weights, int64_t step, DeviceMemory* memory) {
  const ModelConfig config = SmallConfig();
  for (const TensorSlot& slot : SlotsOf(config, *weights)) {
    if (slot.role != TensorRole::kLmHead) continue;
    ResidentTensor tensor(slot, DType::kFloat32, memory);
    const int64_t row_bytes = tensor.num_bytes() / config.vocab_size;
    // Each kept row is one row, shifted a little: some of them is above 0 unless all are below, and then its opposite is there, too.
    std::vector<float> first(static_cast<size_t>(row_bytes / 4)), row(first.size());
    tensor.Read(0, row_bytes, reinterpret_cast<char*>(first.data()));
    for (int64_t token = 0; token < config.vocab_size; ++token) {
      const float sign = token % kModulus != step % kModulus ? 0.0f : token / kModulus % 2 == 0 ? 1.0f : -1.0f;
      for (size_t i = 0; i < row.size(); ++i) row[i] = sign * first[i] * (1.0f + 0.01f * static_cast<float>((token * 31 + i) % 17));
      tensor.Write(token * row_bytes, {reinterpret_cast<const char*>(row.data()), static_cast<size_t>(row_bytes)});
    }
  }
  return weights;
}

TEST_F(EngineWeightsTest, AHundredCommitsUnderLoadAndEveryTokenNamesItsWeights) {
  std::unique_ptr<Engine> engine = Make(1);
  ASSERT_TRUE(engine->CommitWeights(TellWith(Weights(1, 1), 1, memory_.get()), InFlight::kKeep, absl::Seconds(10)).ok());
  std::atomic<bool> stop{false};
  std::atomic<int64_t> tokens{0}, spans{0}, wrong{0};
  std::vector<std::unique_ptr<Background>> clients;
  for (int t = 0; t < 2; ++t) {
    clients.push_back(std::make_unique<Background>([&, t] {
      for (int i = 0; !stop; ++i) {
        GenerateRequest request = Greedy(std::to_string(t) + "/" + std::to_string(i), 30 + 7 * (i % 5));
        request.num_samples = 1 + i % 3;
        request.weights.on_update = static_cast<OnUpdate>(i % 4);
        for (const auto& [index, sample] : Submit(*engine, request)->Wait()) {
          ExpectTiled(sample);
          spans += static_cast<int64_t>(sample.weight_spans.size());
          for (const WeightSpan& span : sample.weight_spans) {
            for (int32_t i = span.begin; i < span.end; ++i) {
              ++tokens;
              wrong += sample.token_ids[i] % kModulus != span.target_step % kModulus;
            }
          }
        }
      }
    }));
  }
  absl::Status status;
  for (int64_t step = 2; step <= 101 && status.ok(); ++step) {
    const int64_t before = engine->GetLoads().generated_tokens;
    while (engine->GetLoads().generated_tokens < before + 10) std::this_thread::sleep_for(std::chrono::microseconds(100));
    status = engine->CommitWeights(TellWith(Weights(1, step), step, memory_.get()), static_cast<InFlight>(step % 3), absl::Seconds(10)).status();
  }
  stop = true;
  clients.clear();
  ASSERT_EQ(status, absl::OkStatus());
  EXPECT_EQ(wrong, 0) << "of " << tokens << " tokens in " << spans << " spans";
  EXPECT_GT(tokens, 500);
  EXPECT_EQ(engine->GetLoads().weight_commits, 101);
}

TEST_F(EngineWeightsTest, PausedAndSleepingTheEngineTakesWorkAndGoesOnWhereItWas) {
  std::unique_ptr<Engine> engine = Make(1), other = Make(1);
  GenerateRequest request = Greedy("a", 120);
  request.sampling.temperature = 1.0f;
  const SampleResult expected = Run(*other, request);
  const absl::Status running = engine->FlushCache();
  EXPECT_EQ(running.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(StatusReason(running), "NOT_PAUSED");
  auto listener = Submit(*engine, request, 5);
  listener->WaitTokens(5);
  ASSERT_EQ(*engine->Pause(PauseMode::kKeep, /*clear_cache=*/false, absl::Seconds(10)), 0);
  EXPECT_TRUE(engine->control().paused);
  listener->Open(*engine);
  const size_t at_pause = listener->num_tokens();
  ASSERT_LT(at_pause, 120u);
  auto newcomer = Submit(*engine, Greedy("b", 10));
  EXPECT_GT(engine->GetLoads().used_pages, 0);
  EXPECT_EQ(engine->FlushCache(), absl::OkStatus());
  EXPECT_EQ(engine->GetLoads().used_pages, 0);
  ASSERT_EQ(engine->Sleep({.weights = true, .kv_cache = true}), absl::OkStatus());
  ASSERT_EQ(engine->Sleep({.weights = true, .kv_cache = true}), absl::OkStatus()) << "a repeat";
  std::this_thread::sleep_for(std::chrono::milliseconds(700));
  EXPECT_LT(engine->SinceHeartbeat(), absl::Seconds(5));
  EXPECT_EQ(listener->num_tokens(), at_pause);
  EXPECT_TRUE(engine->control().sleeping.weights);
  EXPECT_TRUE(engine->control().sleeping.kv_cache);
  EXPECT_EQ(engine->weights(), nullptr);
  EXPECT_EQ(engine->weight_version().target_step, 0);
  for (const absl::Status& status : {engine->Resume(), engine->RehashWeights().status(), engine->StartWeightUpdate({}, 1 << 20).status(),
                                     engine->CommitWeights(Weights(2, 3), InFlight::kKeep, absl::Seconds(1)).status()}) {
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
    EXPECT_EQ(StatusReason(status), "ASLEEP");
  }
  // Weights first, as a learner wants that sends new ones before the caches come back.
  ASSERT_EQ(engine->WakeUp({.weights = true, .kv_cache = false}), absl::OkStatus());
  EXPECT_NE(engine->weights(), nullptr);
  EXPECT_TRUE(engine->RehashWeights().ok());
  EXPECT_EQ(StatusReason(engine->Resume()), "ASLEEP");
  ASSERT_EQ(engine->WakeUp({.weights = true, .kv_cache = true}), absl::OkStatus());
  EXPECT_FALSE(engine->control().sleeping.kv_cache);
  EXPECT_TRUE(engine->control().paused) << "it was not Sleep that paused";
  ASSERT_EQ(engine->Resume(), absl::OkStatus());
  EXPECT_EQ(listener->Wait().at(0).token_ids, expected.token_ids);
  newcomer->Wait();

  auto again = Submit(*engine, Greedy("c", 60), 3);
  again->WaitTokens(3);
  ASSERT_EQ(engine->Sleep({.weights = false, .kv_cache = true}), absl::OkStatus());
  again->Open(*engine);
  // New weights come while the caches sleep.
  ASSERT_TRUE(engine->CommitWeights(Weights(2, 3), InFlight::kKeep, absl::Seconds(1)).ok());
  ASSERT_EQ(engine->WakeUp({.weights = true, .kv_cache = true}), absl::OkStatus());
  EXPECT_FALSE(engine->control().paused);
  const SampleResult sample = again->Wait().at(0);
  EXPECT_EQ(sample.weight_spans.size(), 2u);
  EXPECT_FALSE(sample.kv_mixed);
}

TEST_F(EngineWeightsTest, PausesEndWhatTheySay) {
  std::unique_ptr<Engine> engine = Make(1);
  GenerateRequest request = Greedy("a", 120);
  request.num_samples = 2;
  auto cut = Submit(*engine, request, 4);
  cut->WaitTokens(4);
  EXPECT_EQ(*engine->Pause(PauseMode::kAbort, false, absl::Seconds(1)), 2);
  EXPECT_EQ(engine->control().abort_epoch, 1);
  for (const auto& [index, sample] : cut->Wait()) {
    EXPECT_EQ(sample.finish, FinishReason::kAborted);
    EXPECT_EQ(sample.abort_epoch, 1);
  }
  EXPECT_EQ(*engine->Pause(PauseMode::kAbort, false, absl::Seconds(1)), 0);
  EXPECT_EQ(engine->control().abort_epoch, 2);
  ASSERT_EQ(engine->Resume(), absl::OkStatus());

  auto first = Submit(*engine, Greedy("b", 100), 2);
  first->WaitTokens(2);
  std::shared_ptr<Listener> second;
  Background newcomer([&] {
    EXPECT_TRUE(WaitUntil([&] { return engine->control().pausing; }));
    second = Submit(*engine, Greedy("c", 10));
    first->Open(*engine);
  });
  EXPECT_EQ(*engine->Pause(PauseMode::kWait, false, absl::Seconds(60)), 0);
  newcomer.Join();
  EXPECT_EQ(first->Wait().at(0).token_ids.size(), 100u);
  EXPECT_EQ(engine->GetLoads().running_requests, 0);
  EXPECT_EQ(engine->GetLoads().waiting_requests, 1);
  EXPECT_TRUE(engine->control().paused);
  ASSERT_EQ(engine->Resume(), absl::OkStatus());
  second->Wait();

  // Deadlines are of waits only.
  ASSERT_EQ(*engine->Pause(PauseMode::kAbort, true, absl::ZeroDuration()), 0);
  ASSERT_TRUE(engine->CommitWeights(Weights(1, 1), InFlight::kKeep, absl::ZeroDuration()).ok());
  ASSERT_EQ(engine->Resume(), absl::OkStatus());

  auto endless = Submit(*engine, Greedy("d", 450), 2);
  endless->WaitTokens(2);
  const absl::Status late = engine->Pause(PauseMode::kWait, false, absl::Milliseconds(20)).status();
  EXPECT_EQ(late.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_TRUE(engine->control().paused);
  // Paused or not, a drain ends what stands still.
  engine->Drain(absl::Milliseconds(10));
  endless->Wait();
}

// A swap cannot wait for what stands still.
TEST_F(EngineWeightsTest, ACommitThatWouldWaitInAPauseIsRefusedAtOnce) {
  std::unique_ptr<Engine> engine = Make(1);
  auto stands = Submit(*engine, Greedy("a", 60), 2);
  stands->WaitTokens(2);
  ASSERT_TRUE(engine->Pause(PauseMode::kKeep, false, absl::Seconds(10)).ok());
  const absl::Status refused = engine->CommitWeights(Weights(2, 5), InFlight::kWait, absl::Minutes(10)).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition) << refused;
  EXPECT_EQ(StatusReason(refused), "PAUSED");
  EXPECT_EQ(engine->weight_version().target_step, 0);
  ASSERT_TRUE(engine->Pause(PauseMode::kAbort, false, absl::Seconds(10)).ok());
  EXPECT_TRUE(engine->CommitWeights(Weights(2, 6), InFlight::kWait, absl::Seconds(60)).ok()) << "there is nothing to wait for";
}

// Commits follow each other faster than a score takes.
// Nobody can say when what it waits for goes on, and until then nothing may begin.
TEST_F(EngineWeightsTest, APauseEndsACommitThatWaits) {
  std::unique_ptr<Engine> engine = Make(1);
  auto running = Submit(*engine, Greedy("a", 100), 2);
  running->WaitTokens(2);
  std::unique_ptr<ModelWeights> weights = Weights(2, 5);
  absl::StatusOr<CommitResult> commit = absl::UnknownError("");
  Background committer([&] { commit = engine->CommitWeights(std::move(weights), InFlight::kWait, absl::Seconds(60)); });
  ASSERT_TRUE(WaitUntil([&] { return engine->control().committing; }));
  ASSERT_TRUE(engine->Pause(PauseMode::kKeep, false, absl::Seconds(10)).ok());
  committer.Join();
  EXPECT_EQ(commit.status().code(), absl::StatusCode::kFailedPrecondition) << commit.status();
  EXPECT_EQ(StatusReason(commit.status()), "PAUSED");
  EXPECT_TRUE(absl::StrContains(commit.status().message(), "since generation was paused")) << commit.status();
  EXPECT_FALSE(engine->control().committing);
  EXPECT_EQ(engine->weight_version().target_step, 0);
  // Nothing is left behind: what stood still goes on, and newcomers begin.
  ASSERT_TRUE(engine->Resume().ok());
  running->Open(*engine);
  EXPECT_EQ(Run(*engine, Greedy("b", 20)).token_ids.size(), 20u);
  const SampleResult sample = running->Wait().at(0);
  EXPECT_EQ(sample.token_ids.size(), 100u);
  EXPECT_EQ(sample.weight_spans.size(), 1u);
  // A pause that ends what runs leaves nothing to wait for.
  auto other = Submit(*engine, Greedy("c", 100), 2);
  other->WaitTokens(2);
  weights = Weights(2, 6);
  Background second([&] { commit = engine->CommitWeights(std::move(weights), InFlight::kWait, absl::Seconds(60)); });
  ASSERT_TRUE(WaitUntil([&] { return engine->control().committing; }));
  ASSERT_TRUE(engine->Pause(PauseMode::kAbort, false, absl::Seconds(10)).ok());
  second.Join();
  EXPECT_TRUE(commit.ok()) << commit.status();
  EXPECT_EQ(engine->weight_version().target_step, 6);
}

TEST_F(EngineWeightsTest, ScoresEndUnderSteadyCommits) {
  std::unique_ptr<Engine> engine = Make(1, std::chrono::milliseconds(3), /*max_step_tokens=*/72);
  ScoreRequest request;
  request.token_ids.assign(450, 7);
  auto score = std::make_shared<ScoreListener>();
  uint64_t handle = 0;
  ASSERT_EQ(engine->SubmitScore(request, score, &handle), absl::OkStatus());
  int64_t step = 0;
  while (!score->done && step < 100) {
    const int64_t steps = engine->GetLoads().steps;
    ASSERT_TRUE(WaitUntil([&] { return score->done || engine->GetLoads().steps > steps; }));
    ASSERT_TRUE(engine->CommitWeights(Weights(1, ++step), InFlight::kKeep, absl::Seconds(60)).ok());
  }
  EXPECT_TRUE(score->done) << step << " commits";
  EXPECT_LE(step, 4);
}

// Not even while the engine is in a long step.
TEST_F(EngineWeightsTest, WhoeverWaitsPastItsDeadlineDoesNotSpin) {
  std::unique_ptr<Engine> engine = Make(1, std::chrono::milliseconds(400));
  auto running = Submit(*engine, Greedy("a", 40));
  ASSERT_TRUE(WaitUntil([&] { return engine->GetLoads().steps > 0; }));
  const auto cpu_time = [] {
    timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return absl::DurationFromTimespec(time);
  };
  const absl::Duration before = cpu_time();
  ASSERT_TRUE(engine->Pause(PauseMode::kAbort, false, absl::ZeroDuration()).ok());
  EXPECT_LT(cpu_time() - before, absl::Milliseconds(40));
  running->Wait();
}

// A pause that gives up waiting does not undo what somebody said meanwhile.
TEST_F(EngineWeightsTest, ALatePauseGivesWayToAResume) {
  std::unique_ptr<Engine> engine = Make(1, std::chrono::milliseconds(800));
  auto running = Submit(*engine, Greedy("a", 60));
  ASSERT_TRUE(WaitUntil([&] { return engine->GetLoads().steps > 0; }));
  absl::Status paused, resumed;
  {
    // It begins to wait between two steps, and its deadline passes within the next; there the resume came first.
    Background pause([&] { paused = engine->Pause(PauseMode::kWait, false, absl::Milliseconds(1200)).status(); });
    ASSERT_TRUE(WaitUntil([&] { return engine->control().pausing; }));
    resumed = engine->Resume();
  }
  EXPECT_EQ(resumed, absl::OkStatus());
  EXPECT_TRUE(absl::IsAborted(paused)) << paused;
  EXPECT_FALSE(engine->control().paused);
  EXPECT_TRUE(engine->Abort("a"));
  running->Wait();
}

TEST_F(EngineWeightsTest, DetachedGroupsRunOn) {
  std::unique_ptr<Engine> engine = Make(1);
  GenerateRequest request = Greedy("a", 60);
  request.detach = true;
  {
    auto gone = Submit(*engine, request);
    gone->WaitTokens(1);
    engine->Detach("a", gone.get());
  }
  EXPECT_EQ(Run(*engine, request).token_ids.size(), 60u);
  const EngineLoads loads = engine->GetLoads();
  EXPECT_EQ(loads.submitted, 1);
  EXPECT_EQ(loads.finished, 1);
}

}  // namespace
}  // namespace bebop::test
