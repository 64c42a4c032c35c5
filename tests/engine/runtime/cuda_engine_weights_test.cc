// SPDX-License-Identifier: Apache-2.0
// The whole engine on a device whose weights change, sleep and wake while it generates: what comes out is what the CPU's engine makes of the
// same change after the same token.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "engine/weights/dummy_weights.h"
#include "engine/weights/resident_tensor.h"
#include "engine/weights/weight_layout.h"
#include "tests/engine/runtime/device_engine.h"

#if defined(BEBOP_CUDA_EMULATION)
#include "cuda_emulation_control.h"
#endif

namespace bebop::test {
namespace {

constexpr uint64_t kSeedAtStart = 1, kOtherSeed = 2;

// Tells how many tokens are there.
class Streamed final : public Waiting<GenerateObserver> {
 public:
  void OnTokens(const SampleResult& partial, int32_t) override { num_tokens = static_cast<int32_t>(partial.token_ids.size()); }
  void OnSample(const std::shared_ptr<const SampleResult>& result) override { sample = *result; }
  void OnDone(const absl::Status& with) override { End(with); }
  void WaitForTokens(int32_t count) const {
    while (num_tokens < count) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  std::atomic<int32_t> num_tokens{0};
  SampleResult sample;
};

GenerateRequest Greedy(const std::string& id, int32_t max_new_tokens) {
  GenerateRequest request = Request(id, {1, 2, 3, 4, 5, 6, 7}, max_new_tokens);
  request.sampling.temperature = 0;
  request.speculation = {SpeculationMode::kRejection, 2, -1.0};
  request.stream_tokens = true;
  return request;
}

class CudaEngineWeightsTest : public testing::Test {
 protected:
  void SetUp() override {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) GTEST_SKIP() << "this machine has no CUDA device";
    EngineOptions options = SmallEngineOptions(DeviceName());
    options.dummy_seed = kSeedAtStart;
    options.max_draft_tokens = 2;
    options.max_num_seqs = 2;
    auto engine = Engine::Create(options);
    ASSERT_TRUE(engine.ok()) << engine.status();
    engine_ = *std::move(engine);
  }

  std::shared_ptr<Streamed> Submit(const GenerateRequest& request) {
    auto observer = std::make_shared<Streamed>();
    const absl::Status status = engine_->Submit(request, observer);
    EXPECT_TRUE(status.ok()) << status;
    return observer;
  }
  SampleResult Finish(Streamed& observer) {
    EXPECT_TRUE(observer.Wait());
    EXPECT_TRUE(observer.status.ok()) << observer.status;
    return observer.sample;
  }

  // An update to the dummy weights of `seed`, staged as a learner's: by threads that come and go.
  std::unique_ptr<ModelWeights> Stage(uint64_t seed, int64_t step) {
    const ModelConfig& config = engine_->info().config;
    const auto source = *MakeDummyWeights(config, DType::kFloat32, seed, pool_, host_.get());
    const std::vector<TensorSlot> slots = SlotsOf(config, *source);
    WeightUpdateSpec spec;
    spec.update_id = std::to_string(step);
    spec.target_step = step;
    for (const TensorInfo& tensor : source->version.tensors) spec.manifest.push_back({tensor.name, FormName(tensor.form), tensor.shape});
    absl::StatusOr<std::unique_ptr<WeightUpdate>> update = absl::UnknownError("not started");
    std::thread([&] { update = engine_->StartWeightUpdate(spec, int64_t{1} << 30); }).join();
    if (!update.ok()) {
      ADD_FAILURE() << update.status();
      return nullptr;
    }
    std::thread([&] {
      for (size_t i = 0; i < slots.size(); ++i) {
        const ResidentTensor tensor(slots[i], source->version.tensors[i].form, host_.get());
        std::string bytes(static_cast<size_t>(tensor.num_bytes()), '\0');
        tensor.Read(0, tensor.num_bytes(), bytes.data());
        const absl::Status status = (*update)->WriteChunk(source->version.tensors[i].name, 0, bytes, source->version.tensors[i].digest);
        ASSERT_TRUE(status.ok()) << status;
      }
    }).join();
    absl::StatusOr<std::unique_ptr<ModelWeights>> weights = (*update)->Finish({source->version.target_digest, source->version.draft_digest});
    EXPECT_TRUE(weights.ok()) << weights.status();
    return weights.ok() ? *std::move(weights) : nullptr;
  }

  // What the CPU makes of `request`, with `change` after `num_tokens` tokens.
  static SampleResult OnCpu(GenerateRequest request, int32_t num_tokens, const std::function<void(SteppedEngine&)>& change) {
    SteppedEngine::Options options;
    options.max_draft_tokens = 2;
    options.weight_seed = kSeedAtStart;
    SteppedEngine cpu(options);
    const auto observer = std::make_shared<Streamed>();
    EXPECT_TRUE(cpu.core().Submit(request, observer).ok());
    while (observer->num_tokens < num_tokens) EXPECT_TRUE(cpu.Step().ok());
    EXPECT_EQ(observer->num_tokens, num_tokens) << "the device's steps end elsewhere";
    change(cpu);
    cpu.RunToEnd();
    return observer->sample;
  }
  SampleResult OnCpuUnder(uint64_t seed, const GenerateRequest& request) {
    const auto weights = *MakeDummyWeights(SmallConfig(), DType::kFloat32, seed, pool_, host_.get());
    return OnCpu(request, 0, [&](SteppedEngine& cpu) { EXPECT_TRUE(cpu.core().Commit(weights.get(), {}, InFlight::kKeep).ok()); });
  }

  static void ExpectSame(const SampleResult& sample, const SampleResult& expected) {
    EXPECT_EQ(sample.token_ids, expected.token_ids);
    ASSERT_EQ(sample.logprobs.size(), expected.logprobs.size());
    for (size_t i = 0; i < expected.logprobs.size(); ++i) ASSERT_LE(std::fabs(sample.logprobs[i] - expected.logprobs[i]), 2e-4f) << i;
  }
  void ExpectDigestsHold(const Sha256Digest& target) {
    const auto hashed = engine_->RehashWeights();
    ASSERT_TRUE(hashed.ok()) << hashed.status();
    EXPECT_EQ(hashed->target_digest, target);
    EXPECT_EQ(engine_->weight_version().target_digest, target);
    EXPECT_EQ(hashed->draft_digest, engine_->weight_version().draft_digest);
  }

  ThreadPool pool_{1};
  const std::unique_ptr<DeviceMemory> host_ = MakeHostMemory();
  std::unique_ptr<Engine> engine_;
};

TEST_F(CudaEngineWeightsTest, RunningSamplesGoOnUnderNewWeightsAsTheyDoOnTheCpu) {
  const auto other = *MakeDummyWeights(SmallConfig(), DType::kFloat32, kOtherSeed, pool_, host_.get());
  int64_t step = 0;
  for (const InFlight in_flight : {InFlight::kKeep, InFlight::kRecompute}) {
    const bool keep = in_flight == InFlight::kKeep;
    SCOPED_TRACE(keep ? "keep" : "recompute");
    const GenerateRequest request = Greedy(keep ? "keep" : "recompute", 60);
    std::unique_ptr<ModelWeights> staged = Stage(kOtherSeed, ++step);
    ASSERT_NE(staged, nullptr);
    const auto observer = Submit(request);
    observer->WaitForTokens(8);
    const auto committed = engine_->CommitWeights(std::move(staged), in_flight, absl::Seconds(60));
    ASSERT_TRUE(committed.ok()) << committed.status();
    EXPECT_EQ(committed->kept, keep ? 1 : 0);
    EXPECT_EQ(committed->recomputed, keep ? 0 : 1);
    const SampleResult sample = Finish(*observer);
    ASSERT_EQ(sample.weight_spans.size(), 2u);
    EXPECT_EQ(sample.weight_spans[0].target_step, step - 1);
    EXPECT_EQ(sample.weight_spans[1].target_step, step);
    EXPECT_GE(sample.weight_spans[0].end, 8);
    EXPECT_EQ(sample.weight_spans[1].end, 60);
    EXPECT_EQ(sample.kv_mixed, keep);
    ExpectSame(sample, OnCpu(request, sample.weight_spans[0].end,
                             [&](SteppedEngine& cpu) { EXPECT_TRUE(cpu.core().Commit(other.get(), {}, in_flight).ok()); }));
    ExpectDigestsHold(other->version.target_digest);
    // Back to the weights of the start, while nothing runs.
    staged = Stage(kSeedAtStart, ++step);
    ASSERT_TRUE(engine_->CommitWeights(std::move(staged), InFlight::kAbort, absl::Seconds(60)).ok());
  }
}

TEST_F(CudaEngineWeightsTest, RunningSamplesEndOrAreWaitedFor) {
  std::unique_ptr<ModelWeights> staged = Stage(kOtherSeed, 1);
  const auto aborted = Submit(Greedy("aborted", 100));
  aborted->WaitForTokens(5);
  auto committed = engine_->CommitWeights(std::move(staged), InFlight::kAbort, absl::Seconds(60));
  ASSERT_TRUE(committed.ok()) << committed.status();
  EXPECT_EQ(committed->ended, 1);
  const SampleResult partial = Finish(*aborted);
  EXPECT_EQ(partial.finish, FinishReason::kSuperseded);
  const SampleResult whole = OnCpuUnder(kSeedAtStart, Greedy("whole", 100));
  ASSERT_GE(partial.token_ids.size(), 5u);
  ASSERT_LT(partial.token_ids.size(), 100u);
  EXPECT_TRUE(std::equal(partial.token_ids.begin(), partial.token_ids.end(), whole.token_ids.begin()));

  staged = Stage(kSeedAtStart, 2);
  const auto awaited = Submit(Greedy("awaited", 24));
  awaited->WaitForTokens(3);
  committed = engine_->CommitWeights(std::move(staged), InFlight::kWait, absl::Seconds(60));
  ASSERT_TRUE(committed.ok()) << committed.status();
  const SampleResult under_other = Finish(*awaited);
  ASSERT_EQ(under_other.weight_spans.size(), 1u);
  EXPECT_EQ(under_other.weight_spans[0].target_step, 1);
  ExpectSame(under_other, OnCpuUnder(kOtherSeed, Greedy("awaited", 24)));
  const SampleResult after = Finish(*Submit(Greedy("after", 12)));
  EXPECT_EQ(after.weight_spans[0].target_step, 2);
  ExpectSame(after, OnCpuUnder(kSeedAtStart, Greedy("after", 12)));
}

// Whoever runs when the engine falls asleep goes on as if nothing had been; the memory was really gone meanwhile.
TEST_F(CudaEngineWeightsTest, AsleepTheDeviceIsFreeAndNothingIsLost) {
  const auto free_bytes = [] {
    size_t free = 0, total = 0;
    EXPECT_EQ(cudaMemGetInfo(&free, &total), cudaSuccess);
    return static_cast<int64_t>(free);
  };
  const EngineInfo& info = engine_->info();
  const Sha256Digest digest = engine_->weight_version().target_digest;
  int32_t number = 0;
  for (const SleepTags tags : {SleepTags{true, false}, SleepTags{false, true}, SleepTags{true, true}}) {
    const GenerateRequest request = Greedy("s" + std::to_string(number++), 40);
    const auto observer = Submit(request);
    observer->WaitForTokens(6);
    const int64_t before = free_bytes();
    ASSERT_TRUE(engine_->Sleep(tags).ok());
    EXPECT_GE(free_bytes() - before,
              (tags.weights ? info.weight_bytes : 0) + (tags.kv_cache ? info.kv_cache_bytes + info.state_bytes : 0));
    EXPECT_LT(observer->num_tokens, 40);
    EXPECT_EQ(engine_->weights() == nullptr, tags.weights);
    EXPECT_EQ(engine_->weight_version().target_digest, digest);
#if defined(BEBOP_CUDA_EMULATION)
    // Somebody else has the memory for a while.
    size_t free = 0, total = 0;
    ASSERT_EQ(cudaMemGetInfo(&free, &total), cudaSuccess);
    emulation::SetDeviceMemoryBytes(total - free + 1000);
    const absl::Status refused = engine_->WakeUp({true, true});
    EXPECT_TRUE(absl::IsResourceExhausted(refused)) << refused;
    EXPECT_EQ(engine_->control().sleeping.weights, tags.weights);
    EXPECT_EQ(engine_->control().sleeping.kv_cache, tags.kv_cache);
    emulation::SetDeviceMemoryBytes(total);
#endif
    const absl::Status awake = engine_->WakeUp(tags);
    ASSERT_TRUE(awake.ok()) << awake;
    ExpectSame(Finish(*observer), OnCpuUnder(kSeedAtStart, request));
    ExpectDigestsHold(digest);
  }
  EXPECT_TRUE(engine_->health().ok()) << engine_->health();
}

}  // namespace
}  // namespace bebop::test
