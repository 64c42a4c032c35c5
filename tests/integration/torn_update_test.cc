// SPDX-License-Identifier: Apache-2.0
//
// The torn-update proof (reliability.md section 2: I3, I4, I5, I22, I23): a server with weights that say in every token which version they are, rollouts
// that never stop, and a learner whose updates succeed, fail and break off. BEBOP_TORN_UPDATES sets the number of updates of a run (100).
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "client/cpp/client.h"
#include "client/cpp/weights_client.h"
#include "engine/runtime/engine.h"
#include "engine/weights/resident_tensor.h"
#include "server/server.h"
#include "tests/integration/self_identifying.h"

namespace bebop::test {
namespace {

constexpr uint32_t kVocabulary = 50;
constexpr int64_t kNeverCommitted = 1'000'000;  // updates that are made to fail have steps above this

int NumUpdates() {
  const char* text = std::getenv("BEBOP_TORN_UPDATES");
  return text != nullptr ? std::atoi(text) : 100;
}

// Before every step, hashes all resident tensors and compares with what the learner meant by the step that they claim to be.
class HashingExecutor final : public Executor {
 public:
  HashingExecutor(std::unique_ptr<Executor> inner, ModelConfig config, std::function<Digests(int64_t)> expected)
      : inner_(std::move(inner)), config_(std::move(config)), expected_(std::move(expected)), memory_(MakeHostMemory()) {}

  absl::Status Execute(const StepPlan& plan, StepResult* result) override {
    if (weights_ != nullptr) {
      const absl::StatusOr<WeightVersion> now = RecomputeVersion(config_, *weights_, memory_.get());
      if (!now.ok()) return now.status();
      if (now->target_digest != digests_.target || now->draft_digest != digests_.draft) {
        return absl::InternalError(absl::StrCat("torn: the weights of step ", weights_->version.target_step, " are not that version's"));
      }
      ++num_hashed;
    }
    return inner_->Execute(plan, result);
  }
  absl::Status SetWeights(const ModelWeights* weights, int64_t epoch) override {
    weights_ = weights;
    digests_ = expected_(weights->version.target_step);
    return inner_->SetWeights(weights, epoch);
  }
  absl::Status Quiesce() override { return inner_->Quiesce(); }

  static inline std::atomic<int64_t> num_hashed = 0;

 private:
  const std::unique_ptr<Executor> inner_;
  const ModelConfig config_;
  const std::function<Digests(int64_t)> expected_;
  const std::unique_ptr<DeviceMemory> memory_;
  const ModelWeights* weights_ = nullptr;
  Digests digests_;
};

// Threads that end when the test does, also when an assertion leaves it early.
class Threads {
 public:
  explicit Threads(std::atomic<bool>* stop) : stop_(*stop) {}
  ~Threads() { Join(); }
  void Add(std::function<void()> run) { threads_.emplace_back(std::move(run)); }
  void Join() {
    stop_ = true;
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
  }

 private:
  std::atomic<bool>& stop_;
  std::vector<std::thread> threads_;
};

class TornUpdateTest : public testing::Test {
 protected:
  void Start(Caches caches, bool hash = true) {
    caches_ = caches;
    WriteFile(folder_.path() + "/config.json", SelfIdentifyingConfigJson());
    absl::StatusOr<ModelConfig> config = LoadModelConfig(folder_.path());
    ASSERT_TRUE(config.ok()) << config.status();
    config_ = *std::move(config);
    WriteFile(folder_.path() + "/model.safetensors", SafetensorsBytes(Tensors(0)));
    EngineOptions options;
    options.model_path = folder_.path();
    options.dtype = DType::kFloat32;
    options.num_threads = 1;
    options.max_num_seqs = 6;
    auto engine = Engine::Create(options, [&](std::unique_ptr<Executor> inner) -> std::unique_ptr<Executor> {
      if (!hash) return inner;
      return std::make_unique<HashingExecutor>(std::move(inner), config_, [this](int64_t step) { return DigestsOf(Tensors(step)); });
    });
    ASSERT_TRUE(engine.ok()) << engine.status();
    engine_ = *std::move(engine);
    auto server = Server::Start(engine_.get(), ListenOptions());
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    rollout_ = std::make_unique<Client>(ClientOptions{.server = server_->rollout_address(), .timeout = absl::Seconds(60)});
    weights_ = std::make_unique<WeightsClient>(ClientOptions{.server = server_->admin_address(), .timeout = absl::Seconds(60)});
  }

  std::vector<TestTensor> Tensors(int64_t step) const { return SelfIdentifyingTensors(config_, step, caches_); }

  static v1::StartWeightUpdateRequest Manifest(const std::vector<TestTensor>& tensors, const std::string& id, int64_t step,
                                               v1::InFlight::Mode in_flight) {
    v1::StartWeightUpdateRequest request;
    request.set_update_id(id);
    request.set_target_step(step);
    request.set_in_flight(in_flight);
    request.set_label(absl::StrCat("label ", step));
    for (const TestTensor& tensor : tensors) {
      v1::TensorSpec* spec = request.add_manifest();
      spec->set_name(tensor.name);
      spec->set_dtype(tensor.dtype);
      for (const int64_t size : tensor.shape) spec->add_shape(size);
    }
    return request;
  }

  // The tensors as chunks of at most `chunk_bytes`, each tensor's digest with its last.
  static std::vector<v1::WeightChunk> Chunks(const std::vector<TestTensor>& tensors, const std::string& id, size_t chunk_bytes) {
    std::vector<v1::WeightChunk> chunks;
    for (const TestTensor& tensor : tensors) {
      for (size_t offset = 0; offset < tensor.bytes.size(); offset += chunk_bytes) {
        v1::WeightChunk& chunk = chunks.emplace_back();
        chunk.set_update_id(id);
        chunk.set_tensor(tensor.name);
        chunk.set_offset(static_cast<int64_t>(offset));
        chunk.set_data(tensor.bytes.substr(offset, chunk_bytes));
      }
      const Sha256Digest digest = Sha256Of(tensor.bytes);
      chunks.back().set_digest(digest.data(), digest.size());
    }
    return chunks;
  }

  absl::Status Push(const std::vector<v1::WeightChunk>& chunks, size_t count) {
    size_t next = 0;
    return weights_
        ->PushWeights([&](v1::WeightChunk* chunk) {
          if (next == count) return false;
          *chunk = chunks[next++];
          return true;
        })
        .status();
  }

  static v1::FinishWeightUpdateRequest FinishOf(const std::string& id, const Digests& digests) {
    v1::FinishWeightUpdateRequest request;
    request.set_update_id(id);
    request.set_expect_target_digest(DigestHex(digests.target));
    request.set_expect_draft_digest(DigestHex(digests.draft));
    return request;
  }

  absl::StatusOr<v1::FinishWeightUpdateResult> Update(int64_t step, v1::InFlight::Mode in_flight) {
    const std::vector<TestTensor> tensors = Tensors(step);
    const std::string id = absl::StrCat("update-", step);
    if (auto started = weights_->StartWeightUpdate(Manifest(tensors, id, step, in_flight)); !started.ok()) return started.status();
    std::vector<v1::WeightChunk> chunks = Chunks(tensors, id, 1024);
    std::shuffle(chunks.begin(), chunks.end(), random_);
    if (absl::Status pushed = Push(chunks, chunks.size()); !pushed.ok()) return pushed;
    return weights_->FinishWeightUpdate(FinishOf(id, DigestsOf(tensors)));
  }

  // One that must not come through, in one of seven ways; returns what was wrong with the refusal.
  std::string BrokenUpdate(int64_t step, int kind) {
    const std::vector<TestTensor> tensors = Tensors(step);
    const std::string id = absl::StrCat("broken-", step);
    v1::StartWeightUpdateRequest start = Manifest(tensors, id, step, v1::InFlight::KEEP);
    if (kind == 0) start.set_base_step(step);
    if (kind == 1) start.mutable_manifest(3)->set_name("model.layers.7.nothing.weight");
    const absl::Status started = weights_->StartWeightUpdate(start).status();
    if (kind <= 1) return started.code() == (kind == 0 ? absl::StatusCode::kFailedPrecondition : absl::StatusCode::kInvalidArgument) ? "" : started.ToString();
    if (!started.ok()) return started.ToString();
    std::vector<v1::WeightChunk> chunks = Chunks(tensors, id, 1024);
    const size_t half = chunks.size() / 2;
    absl::Status refused;
    if (kind == 2) {  // a value that is not finite
      const float bad = std::numeric_limits<float>::quiet_NaN();
      chunks[half].mutable_data()->replace(0, 4, reinterpret_cast<const char*>(&bad), 4);
      refused = Push(chunks, chunks.size());
      if (GetErrorDetails(refused).reason != "NON_FINITE") return refused.ToString();
    } else if (kind == 3) {  // a bit of a tensor has changed on the way
      (*chunks[half].mutable_data())[2] ^= 1;
      refused = Push(chunks, chunks.size());
      if (GetErrorDetails(refused).reason != "DIGEST_MISMATCH") return refused.ToString();
    } else if (kind == 4) {  // too early
      if (refused = Push(chunks, half); !refused.ok()) return refused.ToString();
      refused = weights_->FinishWeightUpdate(FinishOf(id, DigestsOf(tensors))).status();
      if (GetErrorDetails(refused).reason != "INCOMPLETE") return refused.ToString();
    } else if (kind == 5) {  // the learner's idea of the whole differs
      if (refused = Push(chunks, chunks.size()); !refused.ok()) return refused.ToString();
      refused = weights_->FinishWeightUpdate(FinishOf(id, DigestsOf(Tensors(step + 1)))).status();
      if (GetErrorDetails(refused).reason != "DIGEST_MISMATCH") return refused.ToString();
    } else {  // it dies in the middle; somebody else clears up
      if (refused = Push(chunks, half); !refused.ok()) return refused.ToString();
    }
    const absl::Status aborted = weights_->AbortWeightUpdate({}).status();
    return aborted.ok() ? "" : aborted.ToString();
  }

  // Greedy in the model's own way: every distribution is a point.
  static v1::GenerateRequest Request(int i) {
    v1::GenerateRequest request;
    for (int t = 0; t < 3 + i % 5; ++t) request.add_prompt_token_ids(static_cast<uint32_t>(21 + (i + t) % 20));
    request.set_num_samples(1 + i % 3);
    request.mutable_stopping()->set_max_new_tokens(40 + i % 30);
    request.mutable_stopping()->set_ignore_eos(true);
    request.mutable_speculation()->set_mode(static_cast<v1::SpeculationParams::Mode>(1 + i % 4));
    if (i % 4 != 0) request.mutable_speculation()->set_num_draft_tokens(1 + i % 5);
    return request;
  }

  // What is wrong with a sample; empty: nothing. Steps before `at_least` were gone when it was asked for, those after `at_most` had not been begun.
  std::string Check(const v1::SampleResult& sample, int64_t at_least, int64_t at_most) {
    int32_t end = 0;
    int64_t step = at_least;
    for (const v1::WeightSpan& span : sample.weight_spans()) {
      if (span.start() != end || span.end() <= span.start()) return "spans do not tile the tokens";
      if (span.step() < step || (end > 0 && span.step() == step)) return absl::StrCat("step ", span.step(), " after ", step);
      if (span.step() > at_most) return absl::StrCat("step ", span.step(), " was never committed, at most ", at_most);
      if (span.draft_step() != span.step()) return "draft and target differ";
      if (span.step() > 0 && span.label() != absl::StrCat("label ", span.step())) return absl::StrCat("label '", span.label(), "' of step ", span.step());
      for (int32_t t = span.start(); t < span.end(); ++t) {
        if (sample.token_ids(t) == kTorn) return absl::StrCat("token ", t, " is torn, stamped ", span.step());
        if (sample.token_ids(t) != TokenOf(span.step())) return absl::StrCat("token ", t, " is of ", sample.token_ids(t), ", stamped ", span.step());
      }
      num_tokens_ += span.end() - span.start();
      num_changes_ += end > 0;
      step = span.step();
      end = span.end();
    }
    if (end != sample.token_ids_size()) return "spans do not tile the tokens";
    if (caches_ == Caches::kShow && sample.kv_mixed()) return "kv_mixed without a commit that keeps caches";
    return "";
  }

  // The first token under weights of version 17 with the tensor of that name of version 16, which the learner is made to believe in; kVocabulary if
  // there is none.
  uint32_t TokenWithOneTensorOfAnotherVersion(const std::string& name) {
    std::vector<TestTensor> mixed = Tensors(17);
    const std::vector<TestTensor> other = Tensors(16);
    for (size_t i = 0; i < mixed.size(); ++i) {
      if (mixed[i].name == name) mixed[i] = other[i];
    }
    const std::string id = absl::StrCat("mixed", name);
    v1::StartWeightUpdateRequest start = Manifest(mixed, id, 17, v1::InFlight::ABORT);
    start.set_rewind(true);
    const std::vector<v1::WeightChunk> chunks = Chunks(mixed, id, 4096);
    EXPECT_TRUE(weights_->StartWeightUpdate(start).ok());
    EXPECT_EQ(Push(chunks, chunks.size()), absl::OkStatus());
    EXPECT_TRUE(weights_->FinishWeightUpdate(FinishOf(id, DigestsOf(mixed))).ok());
    const auto result = rollout_->Generate(Request(1));
    return result.ok() ? result->samples(0).token_ids(0) : kVocabulary;
  }

  // Whether that many updates are swapped in, now or within a moment.
  bool IsCommitted(int64_t num_updates) {
    for (int i = 0; i < 50; ++i) {
      const absl::StatusOr<v1::WeightInfo> info = weights_->GetWeightInfo(false);
      if (info.ok() && info->num_updates() == num_updates) return true;
      std::this_thread::sleep_for(std::chrono::milliseconds(4));
    }
    return false;
  }

  // Rollouts without end beside `num_updates` updates in the given modes, every third followed by one that fails.
  void UpdateUnderLoad(int num_updates, const std::vector<v1::InFlight::Mode>& modes) {
    std::atomic<int64_t> committed = 0, begun = 0;
    std::atomic<bool> stop = false;
    std::atomic<int> num_samples = 0, num_superseded = 0;
    Threads actors(&stop);
    for (int actor = 0; actor < 3; ++actor) {
      actors.Add([&, actor] {
        for (int i = actor; !stop; i += 3) {
          const int64_t at_least = committed;
          const absl::StatusOr<v1::GenerateResult> result = rollout_->Generate(Request(i));
          ASSERT_TRUE(result.ok()) << result.status();
          for (const v1::SampleResult& sample : result->samples()) {
            const bool superseded = sample.finish().reason() == v1::Finish::SUPERSEDED;
            EXPECT_EQ(Check(sample, at_least, begun), "") << sample.ShortDebugString();
            EXPECT_TRUE(superseded || sample.finish().reason() == v1::Finish::LENGTH) << sample.finish().ShortDebugString();
            num_superseded += superseded ? 1 : 0;
            ++num_samples;
          }
        }
      });
    }
    for (int64_t step = 1; step <= num_updates; ++step) {
      begun = step;
      const absl::StatusOr<v1::FinishWeightUpdateResult> done = Update(step, modes[static_cast<size_t>(step) % modes.size()]);
      ASSERT_TRUE(done.ok()) << done.status();
      EXPECT_EQ(done->info().target_step(), step);
      EXPECT_EQ(done->info().target_digest(), DigestHex(DigestsOf(Tensors(step)).target));
      committed = step;
      if (step % 3 == 0) {
        EXPECT_EQ(BrokenUpdate(kNeverCommitted + step, static_cast<int>(step / 3 % 7)), "");
      }
    }
    actors.Join();
    const absl::StatusOr<v1::WeightInfo> info = weights_->GetWeightInfo(false);
    ASSERT_TRUE(info.ok());
    EXPECT_EQ(info->target_step(), num_updates);
    EXPECT_EQ(info->num_updates(), num_updates);
    EXPECT_EQ(info->staging_bytes(), 0);
    const absl::StatusOr<v1::CheckWeightsResult> check = weights_->CheckWeights();
    ASSERT_TRUE(check.ok());
    EXPECT_TRUE(check->target_matches() && check->draft_matches());
    std::printf("%d updates, %d samples (%d superseded), %lld tokens, %lld changes of version within a sample, %lld steps hashed\n", num_updates,
                num_samples.load(), num_superseded.load(), static_cast<long long>(num_tokens_), static_cast<long long>(num_changes_),
                static_cast<long long>(HashingExecutor::num_hashed));
    // The proof needs updates in the middle of samples.
    EXPECT_GT(num_changes_, num_updates / 4);
  }

  TempDir folder_;
  Caches caches_ = Caches::kMute;
  ModelConfig config_;
  std::unique_ptr<Engine> engine_;
  std::unique_ptr<Server> server_;
  std::unique_ptr<Client> rollout_;
  std::unique_ptr<WeightsClient> weights_;
  std::minstd_rand random_{7};
  std::atomic<int64_t> num_tokens_ = 0, num_changes_ = 0;
};

// The weights do what self_identifying.h says, and a single tensor of another version shows, in the tokens or in the hash: else the tests below could
// not fail.
TEST_F(TornUpdateTest, TheWeightsTellThemselves) {
  Start(Caches::kShow, /*hash=*/false);
  for (const int64_t step : {1, 2, 15, 16}) {
    ASSERT_TRUE(Update(step, v1::InFlight::RECOMPUTE).ok());
    for (int i = 0; i < 8; ++i) {
      const auto result = rollout_->Generate(Request(i));
      ASSERT_TRUE(result.ok()) << result.status();
      for (const v1::SampleResult& sample : result->samples()) EXPECT_EQ(Check(sample, step, step), "");
      if (i % 4 != 0) {
        EXPECT_GT(result->samples(0).spec().num_accepted_draft_tokens(), 0);
      }
    }
  }
  for (const char* name : {"model.embed_tokens.weight", "lm_head.weight", "model.layers.0.linear_attn.in_proj_qkv.weight",
                           "model.layers.0.linear_attn.out_proj.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight",
                           "model.layers.1.self_attn.v_proj.weight", "model.layers.1.self_attn.o_proj.weight"}) {
    EXPECT_NE(TokenWithOneTensorOfAnotherVersion(name), TokenOf(17)) << name;
  }
  EXPECT_EQ(TokenWithOneTensorOfAnotherVersion(""), TokenOf(17));
}

TEST_F(TornUpdateTest, TheHashSeesWhatTokensCannotShow) {
  Start(Caches::kShow);
  EXPECT_EQ(TokenWithOneTensorOfAnotherVersion("model.layers.1.self_attn.k_proj.weight"), kVocabulary) << "generation went on";
  EXPECT_NE(engine_->health().message().find("torn"), absl::string_view::npos) << engine_->health();
}

TEST_F(TornUpdateTest, CachesThatAreKeptShowAsTorn) {
  Start(Caches::kShow);
  // A running sample over a commit that keeps its cache: the very thing that kv_mixed tells, and that recomputing must never show.
  v1::GenerateRequest request = Request(0);
  request.set_num_samples(1);
  request.mutable_stopping()->set_max_new_tokens(900);
  absl::StatusOr<v1::GenerateResult> result;
  for (int64_t step = 1; step <= 200 && (!result.ok() || result->samples(0).weight_spans_size() < 2); ++step) {  // until one comes in the middle
    std::thread actor([&] { result = rollout_->Generate(request); });
    EXPECT_TRUE(Update(step, v1::InFlight::KEEP).ok());
    actor.join();
    ASSERT_TRUE(result.ok()) << result.status();
  }
  const v1::SampleResult& sample = result->samples(0);
  EXPECT_TRUE(sample.kv_mixed());
  EXPECT_EQ(sample.weight_spans_size(), 2);
  EXPECT_GT(std::count(sample.token_ids().begin(), sample.token_ids().end(), kTorn), 0);
}

TEST_F(TornUpdateTest, NoTokenIsWronglyStampedWhateverBecomesOfRunningSamples) {
  Start(Caches::kMute);
  UpdateUnderLoad(NumUpdates(), {v1::InFlight::KEEP, v1::InFlight::RECOMPUTE, v1::InFlight::ABORT, v1::InFlight::KEEP, v1::InFlight::WAIT});
}

TEST_F(TornUpdateTest, NoCacheOfAnotherVersionIsRead) {
  Start(Caches::kShow);
  UpdateUnderLoad(NumUpdates(), {v1::InFlight::RECOMPUTE, v1::InFlight::RECOMPUTE, v1::InFlight::ABORT, v1::InFlight::WAIT});
}

TEST_F(TornUpdateTest, AFaultAtEveryChunkChangesNothing) {
  Start(Caches::kShow);
  ASSERT_TRUE(Update(3, v1::InFlight::KEEP).ok());
  const absl::StatusOr<v1::WeightInfo> before = weights_->GetWeightInfo(false);
  ASSERT_TRUE(before.ok());
  const std::vector<TestTensor> tensors = Tensors(4);
  int64_t attempt = 0;
  const size_t num_chunks = Chunks(tensors, "count", 2048).size();
  for (size_t boundary = 0; boundary <= num_chunks; ++boundary) {
    for (int kind = 0; kind < 5; ++kind) {
      SCOPED_TRACE(absl::StrCat("kind ", kind, " after ", boundary, " of ", num_chunks, " chunks"));
      const std::string id = absl::StrCat("fault-", ++attempt);
      ASSERT_TRUE(weights_->StartWeightUpdate(Manifest(tensors, id, 4, v1::InFlight::KEEP)).ok());
      std::vector<v1::WeightChunk> chunks = Chunks(tensors, id, 2048);
      if (boundary > 0) {
        ASSERT_EQ(Push(chunks, boundary), absl::OkStatus());
      }
      std::string reason;
      if (kind == 0) {  // the learner is gone
      } else if (kind == 1) {  // it believes that it is done
        if (boundary < num_chunks) reason = GetErrorDetails(weights_->FinishWeightUpdate(FinishOf(id, DigestsOf(tensors))).status()).reason;
        EXPECT_EQ(reason, boundary < num_chunks ? "INCOMPLETE" : "");
      } else if (kind == 2 && boundary < num_chunks) {  // the next chunk lies about where it belongs
        chunks[boundary].set_offset(chunks[boundary].offset() + (1 << 20));
        EXPECT_EQ(GetErrorDetails(Push({chunks[boundary]}, 1)).reason, "WRONG_RANGE");
      } else if (kind == 3 && boundary > 0) {  // the last one again, and different
        (*chunks[boundary - 1].mutable_data())[1] ^= 4;
        EXPECT_EQ(GetErrorDetails(Push({chunks[boundary - 1]}, 1)).reason, "CHUNK_CONFLICT");
      } else if (kind == 4) {  // another learner
        v1::StartWeightUpdateRequest other = Manifest(tensors, absl::StrCat("other-", attempt), 5, v1::InFlight::KEEP);
        EXPECT_EQ(GetErrorDetails(weights_->StartWeightUpdate(other).status()).reason, "UPDATE_IN_PROGRESS");
      }
      v1::AbortWeightUpdateRequest abort;
      abort.set_update_id(id);
      ASSERT_TRUE(weights_->AbortWeightUpdate(abort).ok());
      const absl::StatusOr<v1::WeightInfo> after = weights_->GetWeightInfo(false);
      ASSERT_TRUE(after.ok());
      EXPECT_EQ(after->target_step(), 3);
      EXPECT_EQ(after->target_digest(), before->target_digest());
      EXPECT_EQ(after->draft_digest(), before->draft_digest());
      EXPECT_EQ(after->staging_bytes(), 0);
      EXPECT_FALSE(after->has_update());
    }
    const auto result = rollout_->Generate(Request(static_cast<int>(boundary)));  // each step of it hashes what is resident
    ASSERT_TRUE(result.ok()) << result.status();
    for (const v1::SampleResult& sample : result->samples()) EXPECT_EQ(Check(sample, 3, 3), "");
  }
  // And the update as it was meant goes through.
  ASSERT_TRUE(Update(4, v1::InFlight::KEEP).ok());
}

// A caller that hangs up at some moment around the commit. Only a reply of an update that was swapped in counts as lost; a call that failed before it
// reached the server does not.
TEST_F(TornUpdateTest, AReplyLostAtTheCommitIsGivenAgain) {
  Start(Caches::kMute);
  const int num_wanted = NumUpdates() / 4 + 1;
  int num_lost = 0, num_unheard = 0;
  absl::Duration patience = absl::Milliseconds(1);  // grows when the server has not heard the call, shrinks when the reply has come
  int64_t step = 0;
  while (num_lost < num_wanted && step < 20 * NumUpdates()) {
    ++step;
    const std::vector<TestTensor> tensors = Tensors(step);
    const std::string id = absl::StrCat("update-", step);
    ASSERT_TRUE(weights_->StartWeightUpdate(Manifest(tensors, id, step, v1::InFlight::KEEP)).ok());
    const std::vector<v1::WeightChunk> chunks = Chunks(tensors, id, 1 << 20);
    ASSERT_EQ(Push(chunks, chunks.size()), absl::OkStatus());
    const v1::FinishWeightUpdateRequest finish = FinishOf(id, DigestsOf(tensors));
    WeightsClient hasty({.server = server_->admin_address(), .timeout = patience});
    absl::StatusOr<v1::FinishWeightUpdateResult> first = hasty.FinishWeightUpdate(finish);
    if (first.ok()) {
      patience *= 0.8;
    } else {
      EXPECT_TRUE(absl::IsDeadlineExceeded(first.status())) << first.status();
      if (IsCommitted(step)) {
        ++num_lost;
      } else {
        ++num_unheard;
        patience *= 1.5;
      }
    }
    for (int repeat = 0; repeat < 2; ++repeat) {
      const absl::StatusOr<v1::FinishWeightUpdateResult> again = weights_->FinishWeightUpdate(finish);
      ASSERT_TRUE(again.ok()) << again.status();
      EXPECT_EQ(again->info().target_step(), step);
      EXPECT_EQ(again->info().update_id(), id);
      EXPECT_EQ(again->info().target_digest(), finish.expect_target_digest());
      if (first.ok()) {
        EXPECT_EQ(again->SerializeAsString(), first->SerializeAsString());
      }
      first = again;
    }
    EXPECT_EQ(weights_->GetWeightInfo(false)->num_updates(), step) << "committed once";
    EXPECT_EQ(GetErrorDetails(weights_->StartWeightUpdate(Manifest(tensors, id + "-late", step, v1::InFlight::KEEP)).status()).reason, "STEP_NOT_NEWER");
  }
  std::printf("%lld updates: %d replies lost after the commit, %d calls that the server had not heard\n", static_cast<long long>(step), num_lost, num_unheard);
  EXPECT_EQ(num_lost, num_wanted);
}

}  // namespace
}  // namespace bebop::test
