// SPDX-License-Identifier: Apache-2.0
#include "server/weight_session.h"

#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "tests/engine/weights/weight_test_util.h"
#include "tests/server/fake_engine.h"

namespace bebop {
namespace {

using test::FullSpec;
using test::InForms;
using test::IsMtp;
using test::Load;
using test::Place;
using test::SmallConfig;

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
constexpr auto kPrecondition = absl::StatusCode::kFailedPrecondition;
constexpr auto kExists = absl::StatusCode::kAlreadyExists;

class ManualClock final : public Clock {
 public:
  absl::Time Now() const override { return absl::UnixEpoch() + absl::Milliseconds(now_ms_.load()); }
  void Advance(absl::Duration time) { now_ms_ += absl::ToInt64Milliseconds(time); }

 private:
  std::atomic<int64_t> now_ms_ = 1'000'000;
};

// Host memory that knows how much of it is out.
class CountingMemory final : public DeviceMemory {
 public:
  bool is_host() const override { return true; }
  absl::StatusOr<std::shared_ptr<void>> Allocate(int64_t bytes, std::string_view what) override {
    auto memory = host_->Allocate(bytes, what);
    if (!memory.ok()) return memory;
    bytes_ += bytes;
    void* const address = memory->get();
    return std::shared_ptr<void>(address, [this, bytes, kept = *std::move(memory)](void*) { bytes_ -= bytes; });
  }
  void CopyIn(void* destination, const void* source, int64_t bytes) override { host_->CopyIn(destination, source, bytes); }
  void CopyOut(void* destination, const void* source, int64_t bytes) override { host_->CopyOut(destination, source, bytes); }
  void Copy(void* destination, const void* source, int64_t bytes) override { host_->Copy(destination, source, bytes); }
  int64_t available_bytes() const override { return host_->available_bytes(); }
  absl::Status status() const override { return host_->status(); }
  int64_t bytes() const { return bytes_; }

 private:
  const std::unique_ptr<DeviceMemory> host_ = MakeHostMemory();
  std::atomic<int64_t> bytes_ = 0;
};

void ExpectError(const absl::Status& status, absl::StatusCode code, const std::string& reason, const std::vector<std::string>& parts = {}) {
  EXPECT_EQ(status.code(), code) << status;
  EXPECT_EQ(StatusReason(status), reason) << status;
  for (const std::string& part : parts) EXPECT_NE(status.message().find(part), absl::string_view::npos) << status << " lacks " << part;
  EXPECT_EQ(status.message().find('\n'), absl::string_view::npos);
}

// An engine on model A, a session, and the tensors of another model, B, that updates bring.
class WeightSessionTest : public ::testing::Test {
 protected:
  WeightSessionTest() : config_(SmallConfig(/*tied=*/true)) {
    const std::vector<TestTensor> a = MakeModelTensors(config_, /*with_mtp=*/true, "BF16", 1), b = MakeModelTensors(config_, true, "BF16", 2);
    std::shared_ptr<const ModelWeights> loaded = Load(config_, a, DType::kBFloat16, &memory_);
    tensors_ = InForms(b, loaded->version);
    checkpoint_ = b;
    const std::unique_ptr<ModelWeights> other = Load(config_, b, DType::kBFloat16, MakeHost());
    expected_ = other->version;
    engine_.LoadWeights(config_, std::move(loaded), &memory_);
    before_ = engine_.weight_version();
    one_copy_ = memory_.bytes();
    MakeSession({});
  }

  DeviceMemory* MakeHost() {
    host_ = MakeHostMemory();
    return host_.get();
  }
  void MakeSession(WeightSessionOptions options) {
    session_.reset();
    session_ = std::make_unique<WeightSession>(&engine_, &clock_, std::move(options));
  }

  WeightSession::StartRequest Request(const std::string& id, int64_t step) const {
    WeightSession::StartRequest request;
    request.spec = FullSpec(tensors_);
    request.spec.update_id = id;
    request.spec.target_step = step;
    request.spec.label = id;
    return request;
  }
  absl::Status Write(const std::string& id, const TestTensor& tensor) {
    return session_->WriteChunk(id, tensor.name, 0, tensor.bytes, Sha256Of(tensor.bytes));
  }
  void WriteAll(const std::string& id) {
    for (const TestTensor& tensor : tensors_) ASSERT_EQ(Write(id, tensor), absl::OkStatus());
  }
  absl::StatusOr<WeightSession::FinishResult> Finish(const std::string& id, const ExpectedDigests& expected = {}) {
    absl::StatusOr<WeightSession::FinishResult> result = absl::UnknownError("never called");
    session_->Finish(id, expected, [&result](const absl::StatusOr<WeightSession::FinishResult>& told) { result = told; });
    return result;
  }

  // Version and digests are those of the start, and nothing is held beside the loaded weights.
  void ExpectUntouched() {
    const WeightVersion now = engine_.weight_version();
    EXPECT_EQ(now.target_step, before_.target_step);
    EXPECT_EQ(now.draft_step, before_.draft_step);
    EXPECT_EQ(now.target_digest, before_.target_digest);
    EXPECT_EQ(now.draft_digest, before_.draft_digest);
    const absl::StatusOr<WeightSession::CheckResult> check = session_->Check();
    ASSERT_TRUE(check.ok()) << check.status();
    EXPECT_TRUE(check->target_matches && check->draft_matches);
    ExpectNothingOpen();
  }
  void ExpectNothingOpen() {
    const WeightSession::Info info = session_->GetInfo(false);
    EXPECT_FALSE(info.open.has_value());
    EXPECT_EQ(info.staging_bytes, 0);
    EXPECT_EQ(memory_.bytes(), one_copy_);
  }

  const ModelConfig config_;
  CountingMemory memory_;
  std::unique_ptr<DeviceMemory> host_;
  ManualClock clock_;
  FakeEngine engine_;
  std::vector<TestTensor> tensors_, checkpoint_;
  WeightVersion before_, expected_;
  int64_t one_copy_ = 0;
  std::unique_ptr<WeightSession> session_;
};

TEST_F(WeightSessionTest, FromStartToFinish) {
  const absl::StatusOr<WeightSession::State> state = session_->Start(Request("one", 5));
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_EQ(state->progress.num_tensors, static_cast<int32_t>(tensors_.size()));
  EXPECT_EQ(state->progress.received_bytes, 0);
  EXPECT_EQ(memory_.bytes(), 2 * one_copy_);
  EXPECT_GE(session_->GetInfo(false).staging_bytes, one_copy_);
  clock_.Advance(absl::Seconds(2));
  WriteAll("one");
  EXPECT_EQ(session_->Progress("one")->progress.missing.size(), 0u);
  EXPECT_EQ(engine_.weight_version().target_digest, before_.target_digest) << "nothing is visible before Finish";

  engine_.OnCommit([](InFlight in_flight, absl::Duration deadline) -> absl::StatusOr<CommitResult> {
    EXPECT_EQ(in_flight, InFlight::kKeep);
    EXPECT_EQ(deadline, absl::Minutes(10));
    CommitResult result;
    result.swap_time = absl::Milliseconds(3);
    result.kept = 4;
    return result;
  });
  const absl::StatusOr<WeightSession::FinishResult> result = Finish("one", {expected_.target_digest, expected_.draft_digest});
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->info.version.target_step, 5);
  EXPECT_EQ(result->info.version.draft_step, 5);
  EXPECT_EQ(result->info.version.label, "one");
  EXPECT_EQ(result->info.version.target_digest, expected_.target_digest);
  EXPECT_EQ(result->info.version.draft_digest, expected_.draft_digest);
  EXPECT_EQ(result->info.update_id, "one");
  EXPECT_EQ(result->info.num_updates, 1);
  EXPECT_EQ(result->stage_time, absl::Seconds(2));
  EXPECT_EQ(result->commit.kept, 4);
  EXPECT_EQ(engine_.weight_version().target_digest, expected_.target_digest);
  ExpectNothingOpen();  // the old weights are gone, too
  const WeightSession::Info info = session_->GetInfo(true);
  EXPECT_EQ(info.update_id, "one");
  EXPECT_EQ(info.version.tensors.size(), tensors_.size());
  EXPECT_TRUE(session_->Check()->target_matches);
}

TEST_F(WeightSessionTest, RepeatingAStartReturnsTheOpenUpdate) {
  ASSERT_TRUE(session_->Start(Request("one", 5)).ok());
  ASSERT_EQ(Write("one", tensors_[0]), absl::OkStatus());
  const absl::StatusOr<WeightSession::State> again = session_->Start(Request("one", 5));
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->progress.received_bytes, static_cast<int64_t>(tensors_[0].bytes.size()));
  ExpectError(session_->Start(Request("one", 6)).status(), kExists, "UPDATE_ID_REUSED", {"one"});
  WeightSession::StartRequest other_mode = Request("one", 5);
  other_mode.in_flight = InFlight::kAbort;
  ExpectError(session_->Start(other_mode).status(), kExists, "UPDATE_ID_REUSED");
  ExpectError(session_->Start(Request("two", 5)).status(), absl::StatusCode::kAborted, "UPDATE_IN_PROGRESS", {"one", "two"});
  EXPECT_EQ(session_->Progress("one")->progress.received_bytes, again->progress.received_bytes) << "refusals change nothing";
}

TEST_F(WeightSessionTest, RepeatingAFinishReturnsTheSameResult) {
  ASSERT_TRUE(session_->Start(Request("one", 5)).ok());
  WriteAll("one");
  const absl::StatusOr<WeightSession::FinishResult> first = Finish("one");
  ASSERT_TRUE(first.ok());
  ASSERT_TRUE(session_->Start(Request("two", 6)).ok());  // whatever has happened since
  const absl::StatusOr<WeightSession::FinishResult> again = Finish("one", {expected_.target_digest, {}});
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->info.num_updates, 1);
  EXPECT_EQ(again->info.update_id, "one");
  EXPECT_FALSE(again->info.open.has_value());
  EXPECT_EQ(again->stage_time, first->stage_time);
  ExpectError(Finish("one", {before_.target_digest, {}}).status(), kExists, "UPDATE_FINISHED", {"one", DigestHex(before_.target_digest)});
  ExpectError(session_->Start(Request("one", 5)).status(), kExists, "UPDATE_FINISHED", {"one"});
  ExpectError(session_->Start(Request("one", 9)).status(), kExists, "UPDATE_FINISHED", {"one"});
  ExpectError(Write("one", tensors_[0]), kPrecondition, "NO_UPDATE", {"finished"});
  EXPECT_EQ(*session_->Abort("one"), "") << "a finished update cannot be taken back, and saying so again is harmless";
  EXPECT_EQ(engine_.weight_version().target_step, 5);
  EXPECT_EQ(*session_->Abort(""), "two");
}

TEST_F(WeightSessionTest, AFinishThatLacksTensorsLeavesTheUpdateOpen) {
  ASSERT_TRUE(session_->Start(Request("one", 5)).ok());
  for (size_t i = 1; i < tensors_.size(); ++i) ASSERT_EQ(Write("one", tensors_[i]), absl::OkStatus());
  ExpectError(Finish("one").status(), kPrecondition, "INCOMPLETE", {tensors_[0].name});
  ASSERT_EQ(Write("one", tensors_[0]), absl::OkStatus());
  EXPECT_TRUE(Finish("one").ok());
}

TEST_F(WeightSessionTest, AWrongDigestEndsTheUpdate) {
  ASSERT_TRUE(session_->Start(Request("one", 5)).ok());
  WriteAll("one");
  ExpectError(Finish("one", {before_.target_digest, {}}).status(), absl::StatusCode::kDataLoss, "DIGEST_MISMATCH", {"target"});
  ExpectUntouched();
  ExpectError(Finish("one").status(), kPrecondition, "NO_UPDATE", {"expected digest"});
}

TEST_F(WeightSessionTest, EveryEndIsToldOnceWithItsTimes) {
  std::vector<std::pair<UpdateEnd, UpdateTimes>> ends;
  WeightSessionOptions options;
  options.on_end = [&ends](UpdateEnd end, const UpdateTimes& times) { ends.emplace_back(end, times); };
  MakeSession(std::move(options));
  // An early Finish leaves the update open, so it is no end; aborting it is one.
  ASSERT_TRUE(session_->Start(Request("aborted", 5)).ok());
  EXPECT_FALSE(Finish("aborted").ok());
  EXPECT_EQ(ends.size(), 0u);
  clock_.Advance(absl::Seconds(3));
  ASSERT_TRUE(session_->Abort("aborted").ok());
  ASSERT_EQ(ends.size(), 1u);
  EXPECT_EQ(ends[0].first, UpdateEnd::kAborted);
  EXPECT_EQ(ends[0].second.stage, absl::Seconds(3));
  EXPECT_EQ(ends[0].second.commit, absl::ZeroDuration());
  ASSERT_TRUE(session_->Abort("aborted").ok());
  EXPECT_EQ(ends.size(), 1u);

  WeightSession::StartRequest request = Request("expired", 5);
  request.deadline = absl::Seconds(60);
  ASSERT_TRUE(session_->Start(request).ok());
  clock_.Advance(absl::Seconds(61));
  session_->GetInfo(false);
  ASSERT_EQ(ends.size(), 2u);
  EXPECT_EQ(ends[1].first, UpdateEnd::kExpired);

  ExpectedDigests wrong;
  wrong.target = Sha256Digest();
  ASSERT_TRUE(session_->Start(Request("failed", 5)).ok());
  WriteAll("failed");
  EXPECT_FALSE(Finish("failed", wrong).ok());
  ASSERT_EQ(ends.size(), 3u);
  EXPECT_EQ(ends[2].first, UpdateEnd::kFailed);

  engine_.OnCommit([this](InFlight, absl::Duration) -> absl::StatusOr<CommitResult> {
    clock_.Advance(absl::Seconds(4));
    return CommitResult();
  });
  ASSERT_TRUE(session_->Start(Request("committed", 5)).ok());
  clock_.Advance(absl::Seconds(2));
  WriteAll("committed");
  ASSERT_TRUE(Finish("committed").ok());
  ASSERT_EQ(ends.size(), 4u);
  EXPECT_EQ(ends[3].first, UpdateEnd::kCommitted);
  EXPECT_EQ(ends[3].second.stage, absl::Seconds(2));
  EXPECT_EQ(ends[3].second.commit, absl::Seconds(4));
  ASSERT_TRUE(Finish("committed").ok());  // a repeat is no further end
  EXPECT_EQ(ends.size(), 4u);
}

TEST_F(WeightSessionTest, WrongTensorsAreRefused) {
  const auto start = [&](const std::function<void(WeightSession::StartRequest&)>& change) {
    WeightSession::StartRequest request = Request("one", 5);
    change(request);
    return session_->Start(request).status();
  };
  ExpectError(start([](auto& request) { request.spec.manifest[0].name = "model.nothing"; }), kInvalid, "UNKNOWN_TENSOR", {"model.nothing"});
  ExpectError(start([](auto& request) { request.spec.manifest.pop_back(); }), kInvalid, "MISSING_TENSOR");
  ExpectError(start([](auto& request) { request.spec.manifest.push_back(request.spec.manifest[0]); }), kInvalid, "DUPLICATE_TENSOR");
  ExpectError(start([](auto& request) { request.spec.manifest[1].dtype = "F16"; }), kInvalid, "WRONG_DTYPE", {"BF16", "F16"});
  ExpectError(start([](auto& request) { ++request.spec.manifest[1].shape[0]; }), kInvalid, "WRONG_SHAPE");
  ExpectError(start([](auto& request) { request.spec.target_step = 0; }), kPrecondition, "STEP_NOT_NEWER");
  ExpectError(start([](auto& request) { request.spec.base_step = 3; }), kPrecondition, "WRONG_BASE_STEP", {"3"});
  ExpectError(start([](auto& request) { request.spec.encoding = WeightEncoding::kOverwriteDelta; }), kInvalid, "BASE_STEP_MISSING");
  ExpectUntouched();
  ASSERT_EQ(start([](auto&) {}), absl::OkStatus()) << "refused starts do not use their id up";

  ExpectError(session_->WriteChunk("one", "model.nothing", 0, "ab", {}), kInvalid, "UNKNOWN_TENSOR");
  ExpectError(session_->WriteChunk("one", tensors_[0].name, 1, "ab", {}), kInvalid, "WRONG_RANGE");
  ExpectError(session_->WriteChunk("one", tensors_[0].name, -2, "ab", {}), kInvalid, "WRONG_RANGE");
  const std::string nan("\xC0\x7F", 2);
  ExpectError(session_->WriteChunk("one", tensors_[0].name, 0, nan, {}), kInvalid, "NON_FINITE");
  ASSERT_EQ(session_->WriteChunk("one", tensors_[0].name, 0, tensors_[0].bytes.substr(0, 8), {}), absl::OkStatus());
  ExpectError(session_->WriteChunk("one", tensors_[0].name, 0, std::string(8, 'x'), {}), kExists, "CHUNK_CONFLICT");
  ExpectError(session_->WriteChunk("one", tensors_[1].name, 0, tensors_[1].bytes, Sha256Of("something else")), absl::StatusCode::kDataLoss,
              "DIGEST_MISMATCH", {tensors_[1].name});
  ExpectError(session_->WriteChunk("other", tensors_[0].name, 0, "ab", {}), kPrecondition, "NO_UPDATE", {"other", "one"});
  WriteAll("one");  // every refused chunk can be sent again
  EXPECT_TRUE(Finish("one", {expected_.target_digest, expected_.draft_digest}).ok());
}

TEST_F(WeightSessionTest, StagingIsBudgeted) {
  EXPECT_EQ(session_->GetInfo(false).staging_limit_bytes, one_copy_ + (16 << 20));
  MakeSession({.staging_limit_bytes = one_copy_, .root = std::nullopt, .on_end = nullptr});  // just enough, whatever it takes to keep track
  ASSERT_TRUE(session_->Start(Request("one", 5)).ok());
  ASSERT_TRUE(session_->Abort("one").ok());
  MakeSession({.staging_limit_bytes = one_copy_ - 1, .root = std::nullopt, .on_end = nullptr});
  EXPECT_EQ(session_->GetInfo(false).staging_limit_bytes, one_copy_ - 1);
  ExpectError(session_->Start(Request("one", 5)).status(), absl::StatusCode::kResourceExhausted, "STAGING_BUDGET");
  ExpectUntouched();
}

TEST_F(WeightSessionTest, AnIdleUpdateExpiresAndGivesItsMemoryBack) {
  WeightSession::StartRequest request = Request("one", 5);
  request.deadline = absl::Seconds(60);
  ASSERT_TRUE(session_->Start(request).ok());
  for (int i = 0; i < 3; ++i) {  // each call starts the time anew
    clock_.Advance(absl::Seconds(59));
    ASSERT_EQ(Write("one", tensors_[0]), absl::OkStatus());
  }
  clock_.Advance(absl::Seconds(40));
  ASSERT_TRUE(session_->GetInfo(false).open.has_value());  // who watches does not
  clock_.Advance(absl::Seconds(20));
  ExpectError(Write("one", tensors_[1]), kPrecondition, "NO_UPDATE", {"one", "deadline_ms"});
  ExpectUntouched();
  ASSERT_TRUE(session_->Start(Request("two", 5)).ok()) << "the next learner is not kept out";
}

TEST_F(WeightSessionTest, AnUpdateThatDripsExpiresToo) {
  WeightSession::StartRequest request = Request("one", 5);
  request.deadline = absl::Seconds(60);
  ASSERT_TRUE(session_->Start(request).ok());
  for (int i = 0; i < 60; ++i) {  // a call every 59 s, for 59 minutes
    clock_.Advance(absl::Seconds(59));
    ASSERT_EQ(Write("one", tensors_[0]), absl::OkStatus());
  }
  clock_.Advance(absl::Seconds(59));
  ASSERT_EQ(Write("one", tensors_[0]), absl::OkStatus());
  clock_.Advance(absl::Seconds(1));
  ExpectError(Write("one", tensors_[0]), kPrecondition, "NO_UPDATE", {"one", "1h"});
  ExpectUntouched();
}

TEST_F(WeightSessionTest, ExpiryNeedsNoCall) {
  WeightSession::StartRequest request = Request("one", 5);
  request.deadline = absl::Milliseconds(20);
  ASSERT_TRUE(session_->Start(request).ok());
  EXPECT_EQ(memory_.bytes(), 2 * one_copy_);
  clock_.Advance(absl::Milliseconds(20));
  EXPECT_TRUE(FakeEngine::WaitUntil([this] { return memory_.bytes() == one_copy_; }));
}

TEST_F(WeightSessionTest, AbortForgetsTheUpdate) {
  ASSERT_TRUE(session_->Start(Request("one", 5)).ok());
  ASSERT_EQ(Write("one", tensors_[0]), absl::OkStatus());
  EXPECT_EQ(*session_->Abort("two"), "") << "not that one";
  EXPECT_TRUE(session_->GetInfo(false).open.has_value());
  EXPECT_EQ(*session_->Abort("one"), "one");
  EXPECT_EQ(*session_->Abort("one"), "");
  ExpectUntouched();
  ExpectError(Write("one", tensors_[1]), kPrecondition, "NO_UPDATE", {"aborted"});
  ExpectError(Finish("one").status(), kPrecondition, "NO_UPDATE", {"aborted"});
  ExpectError(session_->Progress("one").status(), kPrecondition, "NO_UPDATE", {"aborted"});
}

TEST_F(WeightSessionTest, WhileItIsSwappedInNothingElseHappensToIt) {
  std::atomic<bool> swapping = false, let_go = false;
  engine_.OnCommit([&](InFlight, absl::Duration) -> absl::StatusOr<CommitResult> {
    swapping = true;
    while (!let_go) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    return CommitResult();
  });
  WeightSession::StartRequest request = Request("one", 5);
  request.in_flight = InFlight::kWait;
  request.deadline = absl::Seconds(30);
  ASSERT_TRUE(session_->Start(request).ok());
  WriteAll("one");
  absl::StatusOr<WeightSession::FinishResult> first = absl::UnknownError("");
  std::thread finish([&] { first = Finish("one"); });
  EXPECT_TRUE(FakeEngine::WaitUntil([&] { return swapping.load(); }));  // no ASSERT until the thread is joined

  ExpectError(session_->Abort("one").status(), kPrecondition, "COMMITTING", {"one"});
  ExpectError(session_->Abort("").status(), kPrecondition, "COMMITTING");
  ExpectError(Write("one", tensors_[0]), kPrecondition, "COMMITTING");
  ExpectError(session_->Start(Request("two", 6)).status(), absl::StatusCode::kAborted, "UPDATE_IN_PROGRESS");
  EXPECT_TRUE(session_->Start(request).ok()) << "the same start is still the open update";
  clock_.Advance(absl::Hours(1));  // the swap's deadline is the engine's to keep
  EXPECT_TRUE(session_->GetInfo(false).open.has_value());
  // A repeated Finish neither swaps again nor holds a thread.
  absl::StatusOr<WeightSession::FinishResult> second = absl::UnknownError("pending"), third = absl::UnknownError("pending");
  session_->Finish("one", {}, [&second](const auto& told) { second = told; });
  session_->Finish("one", {before_.target_digest, {}}, [&third](const auto& told) { third = told; });
  EXPECT_EQ(second.status().message(), "pending");
  let_go = true;
  finish.join();
  ASSERT_TRUE(first.ok()) << first.status();
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_EQ(second->info.num_updates, 1);
  ExpectError(third.status(), kExists, "UPDATE_FINISHED");
  ExpectNothingOpen();
}

// What keeps the engine from taking weights now is asked before the staged copy is used up.
TEST_F(WeightSessionTest, AFinishWhileTheEngineSleepsLeavesTheUpdateOpen) {
  ASSERT_TRUE(session_->Start(Request("one", 5)).ok());
  WriteAll("one");
  ASSERT_TRUE(engine_.Sleep({.weights = true}).ok());
  for (int i = 0; i < 2; ++i) ExpectError(Finish("one").status(), kPrecondition, "ASLEEP", {"one"});
  EXPECT_EQ(session_->Progress("one")->progress.missing.size(), 0u) << "nothing that was sent is lost";
  ASSERT_TRUE(engine_.WakeUp({.weights = true}).ok());
  EXPECT_TRUE(Finish("one").ok());
}

TEST_F(WeightSessionTest, AFinishThatWouldWaitForPausedSamplesLeavesTheUpdateOpen) {
  WeightSession::StartRequest request = Request("one", 5);
  request.in_flight = InFlight::kWait;
  ASSERT_TRUE(session_->Start(request).ok());
  WriteAll("one");
  ASSERT_TRUE(engine_.Pause(PauseMode::kKeep, false, absl::Seconds(1)).ok());
  ExpectError(Finish("one").status(), kPrecondition, "PAUSED", {"one", "WAIT"});
  EXPECT_TRUE(session_->GetInfo(false).open.has_value());
  ASSERT_TRUE(engine_.Resume().ok());
  EXPECT_TRUE(Finish("one").ok());
  ASSERT_TRUE(session_->Start(Request("two", 6)).ok());
  WriteAll("two");
  ASSERT_TRUE(engine_.Pause(PauseMode::kKeep, false, absl::Seconds(1)).ok());
  EXPECT_TRUE(Finish("two").ok()) << "one that keeps running samples works while paused";
}

// Whoever polls sees an update's id beside its version or not yet, never beside the version before it.
TEST_F(WeightSessionTest, InfoPairsVersionAndUpdate) {
  std::atomic<bool> stop = false;
  std::atomic<int64_t> num_seen = 0;
  std::thread onlooker([&] {
    while (!stop) {
      const WeightSession::Info info = session_->GetInfo(false);
      EXPECT_GE(info.version.target_step, info.update_id.empty() ? 0 : std::stoll(info.update_id));
      EXPECT_GE(info.version.target_step, info.num_updates);
      ++num_seen;
    }
  });
  for (int step = 1; step <= 60; ++step) {
    EXPECT_TRUE(session_->Start(Request(absl::StrCat(step), step)).ok());
    for (const TestTensor& tensor : tensors_) EXPECT_EQ(Write(absl::StrCat(step), tensor), absl::OkStatus());
    EXPECT_TRUE(Finish(absl::StrCat(step)).ok());
  }
  EXPECT_TRUE(FakeEngine::WaitUntil([&] { return num_seen > 100; }));
  stop = true;
  onlooker.join();
}

// An onlooker that hashes all the while gets an answer about one version, or is told to ask again; it never waits for updates to stop.
TEST_F(WeightSessionTest, ACheckEndsHoweverManyUpdatesCome) {
  std::atomic<int> num_commits = 0;
  engine_.OnRehash([&] {
    const std::string id = absl::StrCat("during-", ++num_commits);
    EXPECT_TRUE(session_->Start(Request(id, num_commits)).ok());
    WriteAll(id);
    EXPECT_TRUE(Finish(id).ok());
  });
  ExpectError(session_->Check().status(), absl::StatusCode::kUnavailable, "WEIGHTS_CHANGED", {"ask again"});
  EXPECT_EQ(num_commits, 3);
  engine_.OnRehash(nullptr);
  EXPECT_TRUE(session_->Check()->target_matches);
}

TEST_F(WeightSessionTest, AFailedSwapEndsTheUpdateAndChangesNothing) {
  for (const absl::StatusCode code : {absl::StatusCode::kDeadlineExceeded, absl::StatusCode::kInternal, absl::StatusCode::kUnavailable}) {
    engine_.OnCommit([code](InFlight, absl::Duration) -> absl::StatusOr<CommitResult> { return absl::Status(code, "not now"); });
    ASSERT_TRUE(session_->Start(Request("one", 5)).ok());
    WriteAll("one");
    EXPECT_EQ(Finish("one").status().code(), code);
    ExpectUntouched();
    ExpectError(Finish("one").status(), kPrecondition, "NO_UPDATE", {"not now"});
    EXPECT_EQ(session_->GetInfo(false).num_updates, 0);
  }
}

// Several streams, an onlooker and finally an abort at once. The memory checks that only one thread is at the staged copy.
TEST_F(WeightSessionTest, ChunksOfSeveralStreamsTakeTurns) {
  Place place(MatrixLayout::kRows);
  FakeEngine engine;
  engine.LoadWeights(config_, Load(config_, MakeModelTensors(config_, true, "BF16", 1), DType::kBFloat16, place.memory.get()), place.memory.get());
  WeightSession session(&engine, &clock_, {});
  for (int round = 0; round < 8; ++round) {
    const std::string id = absl::StrCat("round-", round);
    ASSERT_TRUE(session.Start(Request(id, 5)).ok());
    std::atomic<int> num_written = 0, num_refused = 0;
    std::vector<std::thread> streams;
    for (size_t stream = 0; stream < 4; ++stream) {
      streams.emplace_back([&, stream] {
        for (size_t i = stream; i < tensors_.size(); i += 4) {
          for (size_t at = 0; at < tensors_[i].bytes.size(); at += 64) {
            const absl::Status status =
                session.WriteChunk(id, tensors_[i].name, static_cast<int64_t>(at), std::string_view(tensors_[i].bytes).substr(at, 64), {});
            ++(status.ok() ? num_written : num_refused);
            if (!status.ok()) ExpectError(status, kPrecondition, "NO_UPDATE", {"aborted"});
          }
        }
      });
    }
    const bool abort = round % 2 == 1;
    if (abort) {
      FakeEngine::WaitUntil([&] { return num_written > 5; });
      EXPECT_EQ(*session.Abort(id), id);
      EXPECT_EQ(session.GetInfo(false).staging_bytes, 0);
    }
    for (std::thread& stream : streams) stream.join();
    if (abort) continue;
    EXPECT_EQ(num_refused, 0);
    EXPECT_EQ(session.Progress(id)->progress.missing.size(), 0u);
    session.Abort(id).IgnoreError();
  }
}

class WeightSessionFilesTest : public WeightSessionTest {
 protected:
  WeightSessionFilesTest() {
    WriteFile(folder_.path() + "/model.safetensors", SafetensorsBytes(checkpoint_));
    WeightSessionOptions options;
    options.root = WeightRoot::Open(folder_.path()).value();
    MakeSession(std::move(options));
  }
  const TempDir folder_;
  const std::atomic<bool> not_cancelled_ = false;
};

TEST_F(WeightSessionFilesTest, FilesBringTensorsToo) {
  ASSERT_TRUE(session_->Start(Request("one", 5)).ok());
  ExpectError(session_->Read("one", "../model.safetensors", not_cancelled_), absl::StatusCode::kPermissionDenied, "OUTSIDE_ROOT");
  EXPECT_TRUE(absl::IsNotFound(session_->Read("one", "nothing.safetensors", not_cancelled_)));
  ExpectError(session_->Read("two", "model.safetensors", not_cancelled_), kPrecondition, "NO_UPDATE");
  ASSERT_EQ(session_->Read("one", ".", not_cancelled_), absl::OkStatus());
  EXPECT_TRUE(Finish("one", {expected_.target_digest, expected_.draft_digest}).ok());
}

TEST_F(WeightSessionFilesTest, WithoutARootNoFilesAreRead) {
  MakeSession({});
  ASSERT_TRUE(session_->Start(Request("one", 5)).ok());
  ExpectError(session_->Read("one", "model.safetensors", not_cancelled_), absl::StatusCode::kPermissionDenied, "NO_WEIGHTS_ROOT", {"--weights-root"});
}

TEST_F(WeightSessionFilesTest, ACancelledReadStops) {
  ASSERT_TRUE(session_->Start(Request("one", 5)).ok());
  const std::atomic<bool> cancelled = true;
  EXPECT_TRUE(absl::IsCancelled(session_->Read("one", "model.safetensors", cancelled)));
  EXPECT_GT(session_->Progress("one")->progress.missing.size(), 0u);
  ASSERT_EQ(session_->Read("one", "model.safetensors", not_cancelled_), absl::OkStatus()) << "what came before is not lost, nor in the way";
  EXPECT_TRUE(Finish("one").ok());
}

// While a file is read others get their turns, and an abort ends the reading.
TEST_F(WeightSessionFilesTest, AnAbortStopsARead) {
  for (int round = 0; round < 20; ++round) {
    ASSERT_TRUE(session_->Start(Request("one", 5)).ok());
    std::atomic<bool> stop = false;
    std::thread reader([&] {
      absl::Status status;
      while (!stop && status.ok()) status = session_->Read("one", "model.safetensors", not_cancelled_);
      if (!status.ok()) ExpectError(status, kPrecondition, "NO_UPDATE", {"aborted"});
    });
    EXPECT_TRUE(FakeEngine::WaitUntil([&] { return session_->GetInfo(false).open->progress.received_bytes > 0; }));
    EXPECT_EQ(Write("one", tensors_.back()), absl::OkStatus());
    EXPECT_EQ(*session_->Abort("one"), "one");
    stop = true;
    reader.join();
    ExpectUntouched();
  }
}

}  // namespace
}  // namespace bebop
