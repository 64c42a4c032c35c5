// SPDX-License-Identifier: Apache-2.0
// The threaded façade: submissions, cancellations and shutdown from many threads while the engine runs. Also run under TSan.
#include "engine/runtime/engine.h"

#include <atomic>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <thread>

#include "engine/base/mutex.h"
#include "gtest/gtest.h"
#include "tests/engine/runtime/test_engine.h"

namespace bebop::test {
namespace {

// Counts what it is told and lets a thread wait for the end.
class WaitingObserver final : public GenerateObserver {
 public:
  void OnSample(const std::shared_ptr<const SampleResult>& sample) override {
    MutexLock lock(&mutex_);
    ++samples_;
    finish_ = sample->finish;
    tokens_ += static_cast<int64_t>(sample->token_ids.size());
  }
  void OnDone(const absl::Status& status) override {
    MutexLock lock(&mutex_);
    ++done_;
    status_ = status;
    changed_.NotifyAll();
  }
  bool WaitDone(std::chrono::seconds timeout = std::chrono::seconds(60)) {
    MutexLock lock(&mutex_);
    const auto end = std::chrono::steady_clock::now() + timeout;
    while (done_ == 0 && std::chrono::steady_clock::now() < end) changed_.WaitFor(&mutex_, std::chrono::milliseconds(50));
    return done_ == 1;
  }
  int samples() {
    MutexLock lock(&mutex_);
    return samples_;
  }
  FinishReason finish() {
    MutexLock lock(&mutex_);
    return finish_;
  }
  absl::Status status() {
    MutexLock lock(&mutex_);
    return status_;
  }

 private:
  Mutex mutex_;
  CondVar changed_;
  int samples_ ABSL_GUARDED_BY(mutex_) = 0;
  int done_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t tokens_ ABSL_GUARDED_BY(mutex_) = 0;
  FinishReason finish_ ABSL_GUARDED_BY(mutex_) = FinishReason::kNone;
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
};

std::unique_ptr<Engine> MakeEngine(int32_t max_num_seqs = 8) {
  EngineOptions options;
  options.model_path = WriteSmallConfigFolder();
  options.load_dummy = true;
  options.num_threads = 2;
  options.max_num_seqs = max_num_seqs;
  options.dtype = DType::kFloat32;
  absl::StatusOr<std::unique_ptr<Engine>> engine = Engine::Create(options);
  EXPECT_TRUE(engine.ok()) << engine.status();
  return engine.ok() ? *std::move(engine) : nullptr;
}

GenerateRequest Small(const std::string& id, int32_t max_new_tokens) {
  GenerateRequest request = Request(id, {1, 2, 3, 4, 5}, max_new_tokens);
  request.speculation = {SpeculationMode::kRejection, 3, -1.0};
  return request;
}

TEST(EngineTest, ManyThreadsSubmitCancelAndLook) {
  std::unique_ptr<Engine> engine = MakeEngine();
  ASSERT_NE(engine, nullptr);
  constexpr int kThreads = 4, kRequests = 25;
  std::atomic<int> ended{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < kRequests; ++i) {
        const std::string id = std::to_string(t) + "/" + std::to_string(i);
        auto observer = std::make_shared<WaitingObserver>();
        GenerateRequest request = Small(id, i % 5 == 1 ? 400 : 12);
        request.num_samples = 1 + i % 3;
        ASSERT_TRUE(engine->Submit(request, observer).ok());
        engine->GetLoads();
        if (i % 5 == 1) {
          engine->Abort(id);
        } else if (i % 5 == 2) {
          engine->Detach(id, observer.get());
          ++ended;
          continue;
        }
        ASSERT_TRUE(observer->WaitDone()) << id;
        EXPECT_TRUE(observer->status().ok());
        EXPECT_EQ(observer->samples(), request.num_samples);
        if (i % 5 == 1) {
          EXPECT_EQ(observer->finish(), FinishReason::kAborted);
        }
        ++ended;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(ended, kThreads * kRequests);
  engine->Drain(absl::Seconds(30));
  const EngineLoads loads = engine->GetLoads();
  EXPECT_EQ(loads.submitted, kThreads * kRequests);
  EXPECT_EQ(loads.submitted, loads.finished + loads.cancelled + loads.failed);
  EXPECT_EQ(loads.used_pages, 0);
  EXPECT_EQ(loads.used_state_slots, 0);
  EXPECT_LT(engine->SinceHeartbeat(), absl::Seconds(5));
}

TEST(EngineTest, DestructionEndsWhatIsInFlight) {
  auto observer = std::make_shared<WaitingObserver>();
  {
    std::unique_ptr<Engine> engine = MakeEngine();
    ASSERT_NE(engine, nullptr);
    ASSERT_TRUE(engine->Submit(Small("x", 450), observer).ok());
  }
  ASSERT_TRUE(observer->WaitDone());
}

TEST(EngineTest, DrainDeliversPartialSamples) {
  std::unique_ptr<Engine> engine = MakeEngine();
  ASSERT_NE(engine, nullptr);
  auto observer = std::make_shared<WaitingObserver>();
  GenerateRequest request = Small("long", 450);
  request.num_samples = 8;
  ASSERT_TRUE(engine->Submit(request, observer).ok());
  engine->Drain(absl::Milliseconds(30));
  ASSERT_TRUE(observer->WaitDone());
  EXPECT_EQ(observer->samples(), 8);
  EXPECT_EQ(engine->Submit(Small("late", 5), std::make_shared<WaitingObserver>()).code(), absl::StatusCode::kUnavailable);
}

// Lets a number of steps pass, then fails every one.
class FailingExecutor final : public Executor {
 public:
  FailingExecutor(std::unique_ptr<Executor> inner, int steps) : inner_(std::move(inner)), steps_(steps) {}
  absl::Status Execute(const StepPlan& plan, StepResult* result) override {
    return steps_-- > 0 ? inner_->Execute(plan, result) : absl::InternalError("injected device failure");
  }
  absl::Status SetWeights(const ModelWeights* weights, int64_t epoch) override { return inner_->SetWeights(weights, epoch); }
  absl::Status Quiesce() override { return inner_->Quiesce(); }

 private:
  const std::unique_ptr<Executor> inner_;
  int steps_;
};

TEST(EngineTest, AnExecutorFailureEndsWhatIsInFlightAndTheEngineStaysResponsive) {
  EngineOptions options;
  options.model_path = WriteSmallConfigFolder();
  options.load_dummy = true;
  options.num_threads = 2;
  absl::StatusOr<std::unique_ptr<Engine>> engine = Engine::Create(options, [](std::unique_ptr<Executor> inner) {
    return std::make_unique<FailingExecutor>(std::move(inner), 5);
  });
  ASSERT_TRUE(engine.ok()) << engine.status();
  auto first = std::make_shared<WaitingObserver>(), second = std::make_shared<WaitingObserver>();
  ASSERT_TRUE((*engine)->Submit(Small("a", 200), first).ok());
  const absl::Status also = (*engine)->Submit(Small("b", 200), second);  // may already find the engine failed
  ASSERT_TRUE(first->WaitDone());
  EXPECT_EQ(first->status().code(), absl::StatusCode::kInternal);
  EXPECT_NE(first->status().message().find("injected device failure"), absl::string_view::npos);
  if (also.ok()) {
    EXPECT_TRUE(second->WaitDone());
  }
  EXPECT_FALSE((*engine)->health().ok());
  EXPECT_EQ((*engine)->Submit(Small("c", 5), std::make_shared<WaitingObserver>()).code(), absl::StatusCode::kInternal);
  EXPECT_FALSE((*engine)->Abort("a"));
  (*engine)->Drain(absl::Seconds(5));  // returns at once: nothing is left
  const EngineLoads loads = (*engine)->GetLoads();
  EXPECT_EQ(loads.submitted, loads.finished + loads.cancelled + loads.failed);
}

TEST(EngineTest, SizesThatCannotBeHadAreRefused) {
  EngineOptions options;
  options.model_path = WriteSmallConfigFolder();
  const auto folder = std::filesystem::path(options.model_path) / "long";
  std::filesystem::create_directories(folder);
  std::ifstream in(std::filesystem::path(options.model_path) / "config.json");
  std::string json((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  json.replace(json.find("\"max_position_embeddings\": 512"), 30, "\"max_position_embeddings\": 2147483647");
  std::ofstream(folder / "config.json") << json;
  options.model_path = folder;
  options.load_dummy = true;
  options.max_model_len = 2147483647;
  options.kv_cache_bytes = 100000000;
  EXPECT_EQ(Engine::Create(options).status().code(), absl::StatusCode::kResourceExhausted);
}

TEST(EngineTest, RefusalsNameTheOption) {
  EngineOptions options;
  options.model_path = WriteSmallConfigFolder();
  options.load_dummy = true;
  options.max_model_len = 100000;
  absl::StatusOr<std::unique_ptr<Engine>> engine = Engine::Create(options);
  ASSERT_EQ(engine.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(engine.status().message().find("max_model_len: 100000"), std::string::npos) << engine.status();
  options.max_model_len = 0;
  options.kv_cache_bytes = 100;
  engine = Engine::Create(options);
  ASSERT_EQ(engine.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_NE(engine.status().message().find("kv_cache_bytes: 100"), std::string::npos) << engine.status();
}

}  // namespace
}  // namespace bebop::test
