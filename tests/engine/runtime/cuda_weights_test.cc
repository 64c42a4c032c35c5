// SPDX-License-Identifier: Apache-2.0
// New weights under a running device engine. The oracle is the CPU's executor in lockstep: what the device says about a pass must be what
// the CPU finds for that very pass under the weights of the stamp. So a wrong stamp, a pass that mixed weights and a captured iteration
// that kept old addresses all show, in whatever order things happen.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "engine/runtime/model_executor.h"
#include "engine/weights/dummy_weights.h"
#include "engine/weights/offloaded_weights.h"
#include "engine/weights/resident_tensor.h"
#include "kernels/common/check.h"
#include "tests/engine/runtime/cuda_stepped_engine.h"

#if defined(BEBOP_CUDA_EMULATION)
#include "cuda_emulation_control.h"
#endif

namespace bebop::test {
namespace {

constexpr uint64_t kSeedOfFirstWeights = 1;

// Runs each plan on the device, then on the CPU: each sequence under the weights that the device's outcome is stamped with.
class Lockstep final : public Executor {
 public:
  // One pass of a sequence.
  struct Pass {
    uint64_t residency = 0;
    int64_t epoch = 0;   // as stamped
    int64_t latest = 0;  // of the weights that were set when the plan came
  };

  Lockstep(std::unique_ptr<Executor> device, const ModelConfig& config, const ModelExecutorOptions& executor, const DeviceOptions& options,
           ModelStateStorage* device_storage, DeviceMemory* device_memory)
      : device_(std::move(device)),
        device_storage_(device_storage),
        device_memory_(device_memory),
        config_(config),
        pool_(1),
        memory_(MakeHostMemory()),
        ops_(MakeCpuOps(&pool_)) {
    ModelStateOptions state;
    state.kv_dtype = options.dtype;
    state.num_pages = options.num_pages;
    state.page_tokens = options.page_tokens;
    state.num_slots = options.max_num_seqs + 2;
    state.window = options.max_draft_tokens;
    storage_ = *ModelStateStorage::Create(config, state, memory_.get());
    model_ = *Model::Create(config, options.max_step_tokens, DType::kFloat32, ops_.get(), memory_.get());
    executor_ = std::make_unique<ModelExecutor>(config, executor, model_.get(), storage_.get(), memory_.get(), &pool_);
    weights_.push_back(*MakeDummyWeights(config, DType::kFloat32, kSeedOfFirstWeights, pool_, memory_.get()));
  }

  absl::Status Execute(const StepPlan& plan, StepResult* result) override {
    const absl::Status status = device_->Execute(plan, result);
    if (!status.ok()) return status;
    std::map<int64_t, std::vector<size_t>> by_epoch;
    for (size_t i = 0; i < plan.sequences.size(); ++i) by_epoch[result->sequences[i].weight_epoch].push_back(i);
    passes.clear();
    StepPlan part;
    part.page_copies = plan.page_copies;
    StepResult expected;
    for (const auto& [epoch, indexes] : by_epoch) {
      BEBOP_CHECK(epoch >= 0 && static_cast<size_t>(epoch) < weights_.size());
      part.sequences.clear();
      for (const size_t i : indexes) part.sequences.push_back(plan.sequences[i]);
      BEBOP_CHECK(executor_->SetWeights(weights_[static_cast<size_t>(epoch)].get(), epoch).ok());
      BEBOP_CHECK(executor_->Execute(part, &expected).ok());
      for (size_t j = 0; j < indexes.size(); ++j) {
        SequenceOutcome& outcome = result->sequences[indexes[j]];
        const SequencePlan& sequence = part.sequences[j];
        std::string id = sequence.request->request_id;
        if (sequence.sample_index > 0) id += "/" + std::to_string(sequence.sample_index);
        passes[id] = {sequence.residency, epoch, latest()};
        if (!Same(expected.sequences[j], outcome)) {
          return absl::InternalError(id + ", " + std::to_string(sequence.num_output) + " tokens out, stamped " + std::to_string(epoch));
        }
        ++(epoch == latest() ? num_of_latest : num_of_earlier);
        outcome.weight_epoch = 0;  // the core above has heard of no update
      }
      part.page_copies.clear();
    }
    return absl::OkStatus();
  }

  // The weights that dummies of `seed` are, from now on; the previous ones are freed.
  void Swap(uint64_t seed) {
    weights_.push_back(*MakeDummyWeights(config_, DType::kFloat32, seed, pool_, memory_.get()));
    std::unique_ptr<ModelWeights> next = *MakeDummyWeights(config_, DType::kFloat32, seed, pool_, device_memory_);
    const absl::Status status = device_->SetWeights(next.get(), latest());
    EXPECT_TRUE(status.ok()) << status;
    loaded_ = std::move(next);
  }

  // The caches go and come back empty. REQUIRES: nothing is planned with its residency again.
  void RenewCaches() {
    ASSERT_TRUE(device_->Quiesce().ok());
    device_storage_->Release();
    taken_.push_back(*device_memory_->Allocate(1 << 20, "somebody else's"));
    ASSERT_TRUE(device_storage_->Restore().ok());
  }

  // The same with the weights, to host memory and back. REQUIRES: Swap was called.
  void Sleep() {
    ASSERT_TRUE(device_->Quiesce().ok());
    device_storage_->Release();
    const Sha256Digest target = loaded_->version.target_digest;
    auto asleep = OffloadedWeights::Create(config_, *loaded_, device_memory_);
    ASSERT_TRUE(asleep.ok()) << asleep.status();
    const int64_t before = device_memory_->available_bytes();
    const int64_t bytes = loaded_->storage_bytes;
    loaded_.reset();
    EXPECT_GE(device_memory_->available_bytes(), before + bytes);
    // What others take meanwhile: neither caches nor weights come back to where they were.
    taken_.push_back(*device_memory_->Allocate(bytes, "somebody else's"));
    ASSERT_TRUE(device_storage_->Restore().ok());
    auto back = (*asleep)->Restore(device_memory_);
    ASSERT_TRUE(back.ok()) << back.status();
    loaded_ = *std::move(back);
    EXPECT_EQ(RecomputeVersion(config_, *loaded_, device_memory_)->target_digest, target);
    ASSERT_TRUE(device_->SetWeights(loaded_.get(), latest()).ok());
  }

  absl::Status SetWeights(const ModelWeights*, int64_t) override { return absl::UnimplementedError("use Swap"); }
  absl::Status Quiesce() override { return absl::UnimplementedError("use Sleep"); }

  int64_t latest() const { return static_cast<int64_t>(weights_.size()) - 1; }

  std::map<std::string, Pass> passes;             // of the last plan, by request; "id/1" for sample 1
  int64_t num_of_latest = 0, num_of_earlier = 0;  // passes under the weights that were set when they were planned, and others

 private:
  static bool Same(const SequenceOutcome& expected, const SequenceOutcome& outcome) {
    EXPECT_EQ(expected.num_emitted, outcome.num_emitted);
    EXPECT_EQ(expected.num_accepted, outcome.num_accepted);
    EXPECT_EQ(expected.num_drafts_made, outcome.num_drafts_made);
    EXPECT_EQ(expected.tokens, outcome.tokens);
    EXPECT_EQ(expected.source, outcome.source);
    for (size_t i = 0; i < static_cast<size_t>(expected.num_emitted); ++i) {
      EXPECT_NEAR(expected.logprob[i], outcome.logprob[i], kTolerance);
      EXPECT_NEAR(expected.raw_logprob[i], outcome.raw_logprob[i], kTolerance);
      EXPECT_NEAR(expected.entropy[i], outcome.entropy[i], kTolerance);
    }
    return !::testing::Test::HasFailure();
  }

  const std::unique_ptr<Executor> device_;
  ModelStateStorage* const device_storage_;
  DeviceMemory* const device_memory_;
  const ModelConfig config_;
  ThreadPool pool_;
  const std::unique_ptr<DeviceMemory> memory_;
  const std::unique_ptr<Ops> ops_;
  std::unique_ptr<ModelStateStorage> storage_;
  std::unique_ptr<Model> model_;
  std::unique_ptr<ModelExecutor> executor_;
  std::vector<std::unique_ptr<ModelWeights>> weights_;  // by epoch, in host memory
  std::unique_ptr<ModelWeights> loaded_;                // on the device, since the first swap
  std::vector<std::shared_ptr<void>> taken_;
};

// The emulated device's time goes with the sizes that an iteration is captured for.
DeviceOptions SmallOptions() {
  DeviceOptions options;
  options.max_num_seqs = 4;
  options.max_draft_tokens = 2;
  options.shortest_class = 64;
  return options;
}

class LockstepEngine {
 public:
  explicit LockstepEngine(DeviceOptions options = SmallOptions()) {
    options.weight_seed = kSeedOfFirstWeights;
    options.wrap = [this, options](std::unique_ptr<Executor> device, const ModelConfig& config, const ModelExecutorOptions& executor,
                                   ModelStateStorage* storage, DeviceMemory* memory) {
      auto made = std::make_unique<Lockstep>(std::move(device), config, executor, options, storage, memory);
      lockstep_ = made.get();
      return made;
    };
    engine_ = std::make_unique<DeviceEngine>(options);
  }
  Lockstep& lockstep() { return *lockstep_; }
  SteppedEngine* operator->() { return &**engine_; }

  std::shared_ptr<Reader> Submit(const GenerateRequest& request) {
    auto reader = std::make_shared<Reader>();
    const absl::Status status = (*engine_)->core().Submit(request, reader);
    EXPECT_TRUE(status.ok()) << status;
    return reader;
  }
  void Step(int count = 1) {
    for (int i = 0; i < count; ++i) {
      const absl::StatusOr<bool> worked = (*engine_)->Step();
      ASSERT_TRUE(worked.ok() && *worked) << worked.status();
    }
  }
  void RunToEnd() {
    for (int step = 0; !(*engine_)->core().Idle(); ++step) {
      ASSERT_LT(step, 1000);
      const absl::StatusOr<bool> worked = (*engine_)->Step();
      ASSERT_TRUE(worked.ok()) << worked.status();
    }
  }

 private:
  Lockstep* lockstep_ = nullptr;
  std::unique_ptr<DeviceEngine> engine_;
};

GenerateRequest Greedy(const std::string& id, int32_t prompt_length, int32_t max_new_tokens, int32_t num_draft_tokens) {
  GenerateRequest request =
      With(Request(id, Prompt(prompt_length), max_new_tokens), num_draft_tokens > 0 ? SpeculationMode::kRejection : SpeculationMode::kOff,
           num_draft_tokens);
  request.sampling.temperature = 0.0f;
  return request;
}

class CudaWeightsTest : public CudaEngineTest {};

// The tokens of the step after a swap were computed before it, and say so; from then on the new weights speak. A chunk of a prompt has
// nothing ahead of it.
TEST_F(CudaWeightsTest, WhatRanAheadKeepsItsStampAndNothingElseDoes) {
  LockstepEngine engine;
  engine.Submit(Greedy("off", 4, 60, 0));
  engine.Submit(Greedy("drafts", 5, 60, 2));
  engine.Step(5);
  engine.Submit(Greedy("late", 60, 30, 1));
  engine.lockstep().Swap(2);
  engine.Step();
  auto& passes = engine.lockstep().passes;
  EXPECT_EQ(passes.at("off").epoch, 0);
  EXPECT_EQ(passes.at("drafts").epoch, 0);
  EXPECT_EQ(passes.at("late").epoch, 1);
  for (int64_t epoch = 1; epoch < 4; ++epoch) {
    for (int i = 0; i < 3; ++i) {
      engine.Step();
      ASSERT_EQ(passes.size(), 3u);
      for (const auto& [id, pass] : passes) EXPECT_EQ(pass.epoch, epoch) << id;
    }
    engine.lockstep().Swap(10 + static_cast<uint64_t>(epoch));
    engine.Step();
    for (const auto& [id, pass] : passes) EXPECT_EQ(pass.epoch, epoch) << id << ": what ran ahead";
  }
}

// The record of a paused sequence outlasts swaps: it is what its weights made of it.
TEST_F(CudaWeightsTest, ARecordThatIsKeptOverSwapsKeepsItsStamp) {
  LockstepEngine engine;
  const auto paused = engine.Submit(Greedy("paused", 4, 40, 1));
  engine.Submit(Greedy("runs", 5, 80, 1));
  engine.Step(5);
  paused->room = false;
  engine.Step(2);
  for (const uint64_t seed : {2, 3}) {
    engine.lockstep().Swap(seed);
    engine.Step(3);
    EXPECT_EQ(engine.lockstep().passes.count("paused"), 0u);
    EXPECT_EQ(engine.lockstep().passes.at("runs").epoch, engine.lockstep().latest());
  }
  paused->room = true;
  engine.Step();
  EXPECT_EQ(engine.lockstep().passes.at("paused").epoch, 0);
  engine.Step();
  EXPECT_EQ(engine.lockstep().passes.at("paused").epoch, 2);
  engine.RunToEnd();
}

// Nothing runs, everything is kept: swaps follow each other.
TEST_F(CudaWeightsTest, SwapsWhileAllArePaused) {
  LockstepEngine engine;
  std::vector<std::shared_ptr<Reader>> readers;
  for (int i = 0; i < 3; ++i) readers.push_back(engine.Submit(Greedy("r" + std::to_string(i), 3 + i, 12, i)));
  engine.Step(4);
  for (const auto& reader : readers) reader->room = false;
  for (const uint64_t seed : {2, 3, 4}) engine.lockstep().Swap(seed);
  for (const auto& reader : readers) reader->room = true;
  engine.Step();
  for (const auto& [id, pass] : engine.lockstep().passes) EXPECT_EQ(pass.epoch, 0) << id;
  engine.Step();
  for (const auto& [id, pass] : engine.lockstep().passes) EXPECT_EQ(pass.epoch, 3) << id;
  engine.RunToEnd();
}

// Requests of all modes come, pause and go, with too few pages, prompts in chunks, page tables that lack a page for the iteration ahead,
// and weights that change at any step.
TEST_F(CudaWeightsTest, EveryPassIsOfTheWeightsOfItsStamp) {
  for (const uint32_t seed : {1u, 2u}) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    DeviceOptions options = SmallOptions();
    options.max_step_tokens = 24;
    options.num_pages = 44;
    if (seed % 2 == 0) options.lookahead_tokens = -1;
    LockstepEngine engine(options);
    std::vector<std::shared_ptr<Reader>> readers;
    std::vector<GenerateRequest> requests;
    std::map<uint64_t, std::set<int64_t>> late_stamps;  // by residency: the swaps since which it has had an outcome of before
    for (int i = 0; i < 9; ++i) {
      const int32_t drafts = static_cast<int32_t>(random() % 3);
      GenerateRequest request = With(Request("x" + std::to_string(i), Prompt(static_cast<int32_t>(1 + random() % 40), random() % 90),
                                             4 + static_cast<int32_t>(random() % 12)),
                                     drafts > 0 ? static_cast<SpeculationMode>(1 + random() % 3) : SpeculationMode::kOff, drafts);
      request.sampling.seed = random();
      request.sampling.temperature = i % 2 == 0 ? 0.0f : 0.9f;
      request.num_samples = 1 + i % 2;
      requests.push_back(std::move(request));
    }
    bool cancelled = false;
    for (int step = 0; readers.size() < requests.size() || !engine->core().Idle(); ++step) {
      ASSERT_LT(step, 400);
      if (readers.size() < requests.size() && random() % 2 == 0) readers.push_back(engine.Submit(requests[readers.size()]));
      for (const auto& reader : readers) {
        if (random() % 4 == 0) reader->room = step > 60 || random() % 2 == 0;
      }
      if (!cancelled && readers.size() == 6) {
        engine->core().Detach(requests[5].request_id, readers[5].get());
        cancelled = true;
      }
      if (random() % 5 == 0) engine.lockstep().Swap(random());
      engine.lockstep().passes.clear();  // a step in which all are paused has no plan
      const absl::StatusOr<bool> worked = engine->Step();
      ASSERT_TRUE(worked.ok()) << worked.status();
      for (const auto& [id, pass] : engine.lockstep().passes) {
        if (pass.epoch == pass.latest) continue;
        EXPECT_TRUE(late_stamps[pass.residency].insert(pass.latest).second) << id << ": only one iteration runs ahead";
      }
      ASSERT_TRUE(engine->core().Audit().ok());
    }
    EXPECT_GT(engine.lockstep().latest(), 5);
    EXPECT_GT(engine.lockstep().num_of_earlier, 0);
    EXPECT_GT(engine.lockstep().num_of_latest, engine.lockstep().num_of_earlier);
    EXPECT_GT(engine->core().Loads().preemptions, 0);
  }
}

// Captured or not, the bits are the same on both sides of a swap.
TEST_F(CudaWeightsTest, GraphsGiveTheBitsOfSingleLaunchesOverASwap) {
  std::map<int32_t, SampleResult> samples[2];
  for (const bool graphs : {false, true}) {
    DeviceOptions options = SmallOptions();
    options.graphs = graphs;
    LockstepEngine engine(options);
    GenerateRequest request = With(Request("r", Prompt(7), 11), SpeculationMode::kCoupled, 1);
    request.num_samples = 2;
    const auto reader = engine.Submit(request);
    engine.Step(4);
    engine.lockstep().Swap(2);
    engine.RunToEnd();
    samples[graphs] = reader->samples;
  }
  ASSERT_EQ(samples[0].size(), 2u);
  for (const auto& [index, sample] : samples[0]) {
    EXPECT_EQ(sample.token_ids, samples[1].at(index).token_ids);
    EXPECT_EQ(sample.logprobs, samples[1].at(index).logprobs);
    EXPECT_EQ(sample.entropy, samples[1].at(index).entropy);
  }
}

// Caches and weights leave the device and come back to other addresses: who comes then gets the same tokens.
TEST_F(CudaWeightsTest, AfterASleepEverythingIsWhereTheDeviceLooks) {
  LockstepEngine engine;
  engine.lockstep().Swap(2);
  const GenerateRequest request = With(Request("before", Prompt(9), 14), SpeculationMode::kRejection, 2);
  const auto before = engine.Submit(request);
  engine.RunToEnd();
  engine.Submit(Greedy("cancelled", 4, 100, 1));
  engine.Step(3);
  EXPECT_TRUE(engine->core().Abort("cancelled"));  // an iteration of its runs on
  GenerateRequest again = request;
  for (const bool weights : {false, true}) {
    if (weights) {
      engine.lockstep().Sleep();
    } else {
      engine.lockstep().RenewCaches();
    }
    again.request_id = weights ? "after both" : "after";
    const auto after = engine.Submit(again);
    engine.RunToEnd();
    EXPECT_EQ(after->samples.at(0).token_ids, before->samples.at(0).token_ids);
    EXPECT_EQ(after->samples.at(0).logprobs, before->samples.at(0).logprobs);
  }
  engine.lockstep().Swap(3);
  again.request_id = "under other weights";
  const auto other = engine.Submit(again);
  engine.RunToEnd();
  EXPECT_NE(other->samples.at(0).token_ids, before->samples.at(0).token_ids);
}

#if defined(BEBOP_CUDA_EMULATION)

// A swap costs two iterations that are not one graph launch; then all is as before it. What it frees is the previous weights alone.
TEST_F(CudaWeightsTest, StepsAreSteadyAgainTwoStepsAfterASwap) {
  LockstepEngine engine;
  engine.lockstep().Swap(2);
  for (int i = 0; i < 2; ++i) engine.Submit(Greedy("s" + std::to_string(i), 4 + i, 200, 1));
  engine.Step(5);
  const emulation::Counters steady = emulation::GetCounters();
  engine.Step(4);
  EXPECT_EQ(emulation::GetCounters().graph_launches - steady.graph_launches, 4);
  EXPECT_EQ(emulation::GetCounters().synchronizations, steady.synchronizations);
  engine.lockstep().Swap(3);
  const emulation::Counters swapped = emulation::GetCounters();
  engine.Step(2);  // kernel by kernel; captured
  EXPECT_EQ(emulation::GetCounters().graph_launches - swapped.graph_launches, 1);
  const emulation::Counters before = emulation::GetCounters();
  engine.Step(8);
  const emulation::Counters after = emulation::GetCounters();
  EXPECT_EQ(after.graph_launches - before.graph_launches, 8);
  EXPECT_EQ(after.allocations, before.allocations);
  EXPECT_EQ(after.frees, before.frees);
  EXPECT_EQ(after.synchronizations, swapped.synchronizations);
}

// Nothing runs when the executor has let go: caches and weights may go at once, by whatever way.
TEST_F(CudaWeightsTest, WhoQuiescesWaits) {
  Executor* executor = nullptr;
  DeviceOptions options = SmallOptions();
  options.wrap = [&](std::unique_ptr<Executor> made, const ModelConfig&, const ModelExecutorOptions&, ModelStateStorage*, DeviceMemory*) {
    executor = made.get();
    return made;
  };
  DeviceEngine engine(options);
  ASSERT_TRUE(engine->core().Submit(Greedy("r", 4, 20, 1), std::make_shared<Reader>()).ok());
  for (int i = 0; i < 4; ++i) ASSERT_TRUE(engine->Step().ok());
  ASSERT_EQ(cudaStreamQuery(engine.stream().handle()), cudaErrorNotReady) << "an iteration runs ahead";
  engine->core().Pause();
  ASSERT_TRUE(engine->core().Abort("r"));
  ASSERT_TRUE(executor->Quiesce().ok());
  EXPECT_EQ(cudaStreamQuery(engine.stream().handle()), cudaSuccess);
}

// A device that failed says so to whoever swaps or sleeps.
TEST_F(CudaWeightsTest, AFailedDeviceNeitherSwapsNorSleeps) {
  Executor* executor = nullptr;
  DeviceOptions options;
  options.wrap = [&](std::unique_ptr<Executor> made, const ModelConfig&, const ModelExecutorOptions&, ModelStateStorage*, DeviceMemory*) {
    executor = made.get();
    return made;
  };
  for (const bool swap : {true, false}) {
    DeviceEngine engine(options);
    ASSERT_TRUE(engine->core().Submit(Greedy("r", 4, 20, 1), std::make_shared<Reader>()).ok());
    for (int i = 0; i < 3; ++i) ASSERT_TRUE(engine->Step().ok());
    emulation::InjectStickyError(cudaErrorIllegalAddress);
    const absl::Status status = swap ? executor->SetWeights(&engine->weights(), 1) : executor->Quiesce();
    EXPECT_TRUE(absl::IsInternal(status)) << status;
    EXPECT_NE(status.message().find("illegal memory access"), absl::string_view::npos) << status;
    emulation::InjectStickyError(cudaSuccess);
  }
}

#endif  // BEBOP_CUDA_EMULATION

}  // namespace
}  // namespace bebop::test
