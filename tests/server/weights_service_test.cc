// SPDX-License-Identifier: Apache-2.0
// The Weights service over real sockets: with a fake engine on real small weights, and with the engine on the bundled model.
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <thread>

#include "bebop/v1/weights.grpc.pb.h"
#include "client/cpp/checkpoint_push.h"
#include "client/cpp/connection.h"
#include "engine/formats/safetensors.h"
#include "engine/runtime/engine.h"
#include "server/limits.h"
#include "server/server.h"
#include "tests/engine/weights/weight_test_util.h"
#include "tests/server/fake_engine.h"

namespace bebop {
namespace {

using test::InForms;
using test::Load;
using test::SmallConfig;

void ExpectError(const absl::Status& status, absl::StatusCode code, const std::string& reason, const std::string& part = "") {
  EXPECT_EQ(status.code(), code) << status;
  EXPECT_EQ(GetErrorDetails(status).reason, reason) << status;
  EXPECT_NE(status.message().find(part), absl::string_view::npos) << status << " lacks " << part;
}

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
constexpr auto kPrecondition = absl::StatusCode::kFailedPrecondition;

class WeightsServiceTest : public ::testing::Test {
 protected:
  WeightsServiceTest() : config_(SmallConfig(/*tied=*/true)), memory_(MakeHostMemory()) {
    std::shared_ptr<const ModelWeights> loaded = Load(config_, MakeModelTensors(config_, true, "BF16", 1), DType::kBFloat16, memory_.get());
    checkpoint_ = MakeModelTensors(config_, true, "BF16", 2);
    tensors_ = InForms(checkpoint_, loaded->version);
    engine_.LoadWeights(config_, std::move(loaded), memory_.get());
    Start({});
  }

  void Start(ListenOptions options) {
    server_.reset();
    auto server = Server::Start(&engine_, options);
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    client_ = std::make_unique<WeightsClient>(ClientOptions{.server = server_->admin_address(), .timeout = absl::Seconds(30)});
  }

  v1::StartWeightUpdateRequest Request(const std::string& id, int64_t step) const {
    v1::StartWeightUpdateRequest request;
    request.set_update_id(id);
    request.set_target_step(step);
    for (const TestTensor& tensor : tensors_) {
      v1::TensorSpec* const spec = request.add_manifest();
      spec->set_name(tensor.name);
      spec->set_dtype(tensor.dtype);
      spec->mutable_shape()->Add(tensor.shape.begin(), tensor.shape.end());
    }
    return request;
  }
  // One stream with these chunks.
  absl::StatusOr<v1::PushWeightsResult> Push(const std::vector<v1::WeightChunk>& chunks) {
    size_t next = 0;
    return client_->PushWeights([&](v1::WeightChunk* chunk) {
      if (next == chunks.size()) return false;
      *chunk = chunks[next++];
      return true;
    });
  }
  v1::WeightChunk Chunk(const std::string& id, const std::string& tensor, int64_t offset, const std::string& data) const {
    v1::WeightChunk chunk;
    chunk.set_update_id(id);
    chunk.set_tensor(tensor);
    chunk.set_offset(offset);
    chunk.set_data(data);
    return chunk;
  }
  // All tensors in pieces, naming update and tensor only where they are new.
  std::vector<v1::WeightChunk> AllChunks(const std::string& id, size_t piece = 64) const {
    std::vector<v1::WeightChunk> chunks;
    for (const TestTensor& tensor : tensors_) {
      for (size_t at = 0; at < tensor.bytes.size(); at += piece) {
        chunks.push_back(Chunk(chunks.empty() ? id : "", at == 0 ? tensor.name : "", static_cast<int64_t>(at), tensor.bytes.substr(at, piece)));
      }
      const Sha256Digest digest = Sha256Of(tensor.bytes);
      chunks.back().set_digest(digest.data(), digest.size());
    }
    return chunks;
  }
  absl::StatusOr<v1::FinishWeightUpdateResult> Finish(const std::string& id) {
    v1::FinishWeightUpdateRequest request;
    request.set_update_id(id);
    return client_->FinishWeightUpdate(request);
  }

  const ModelConfig config_;
  const std::unique_ptr<DeviceMemory> memory_;
  FakeEngine engine_;
  std::vector<TestTensor> checkpoint_, tensors_;
  std::unique_ptr<Server> server_;
  std::unique_ptr<WeightsClient> client_;
};

TEST_F(WeightsServiceTest, AStreamOfChunksBecomesTheWeights) {
  const absl::StatusOr<v1::WeightInfo> before = client_->GetWeightInfo(/*tensors=*/true);
  ASSERT_TRUE(before.ok()) << before.status();
  ASSERT_EQ(before->tensors_size(), static_cast<int>(tensors_.size()));
  EXPECT_EQ(before->tensors(0).name(), tensors_[0].name);
  EXPECT_EQ(before->target_step(), 0);
  v1::StartWeightUpdateRequest request = Request("one", 5);
  request.set_label("five");
  request.set_in_flight(v1::InFlight::RECOMPUTE);
  request.set_deadline_ms(5000);
  engine_.OnCommit([](InFlight in_flight, absl::Duration deadline) -> absl::StatusOr<CommitResult> {
    EXPECT_EQ(in_flight, InFlight::kRecompute);
    EXPECT_EQ(deadline, absl::Seconds(5));
    CommitResult result;
    result.swap_time = absl::Milliseconds(250);
    result.recomputed = 3;
    return result;
  });
  ASSERT_TRUE(client_->StartWeightUpdate(request).ok());
  const absl::StatusOr<v1::PushWeightsResult> pushed = Push(AllChunks("one"));
  ASSERT_TRUE(pushed.ok()) << pushed.status();
  EXPECT_EQ(pushed->update().missing_size(), 0);
  EXPECT_EQ(pushed->update().received_bytes(), pushed->update().expected_bytes());
  const absl::StatusOr<v1::WeightInfo> open = client_->GetWeightInfo(false);
  EXPECT_EQ(open->update().update_id(), "one");
  EXPECT_GT(open->staging_bytes(), 0);
  EXPECT_EQ(open->target_digest(), before->target_digest());

  const absl::StatusOr<v1::FinishWeightUpdateResult> result = Finish("one");
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->info().target_step(), 5);
  EXPECT_EQ(result->info().label(), "five");
  EXPECT_EQ(result->info().update_id(), "one");
  EXPECT_EQ(result->recomputed_samples(), 3);
  EXPECT_DOUBLE_EQ(result->swap_seconds(), 0.25);
  const absl::StatusOr<v1::FinishWeightUpdateResult> again = Finish("one");
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->SerializeAsString(), result->SerializeAsString());
  EXPECT_TRUE(client_->CheckWeights()->target_matches());
  EXPECT_EQ(client_->CheckWeights()->target_digest(), result->info().target_digest());
}

TEST_F(WeightsServiceTest, ALostStreamGoesOnWhereItBroke) {
  ASSERT_TRUE(client_->StartWeightUpdate(Request("one", 5)).ok());
  const std::vector<v1::WeightChunk> chunks = AllChunks("one");
  // The learner vanishes in the middle of a stream: no reply, no end.
  const std::shared_ptr<grpc::Channel> channel = grpc::CreateChannel(server_->admin_address(), grpc::InsecureChannelCredentials());
  const std::unique_ptr<v1::Weights::Stub> stub = v1::Weights::NewStub(channel);
  grpc::ClientContext context;
  v1::PushWeightsResult unused;
  const auto writer = stub->PushWeights(&context, &unused);
  for (size_t i = 0; i < chunks.size() / 2; ++i) ASSERT_TRUE(writer->Write(chunks[i]));
  ASSERT_TRUE(FakeEngine::WaitUntil([&] { return client_->GetWeightInfo(false)->update().received_bytes() > 0; }));
  context.TryCancel();
  EXPECT_FALSE(writer->Finish().ok());

  const absl::StatusOr<v1::WeightUpdate> state = client_->StartWeightUpdate(Request("one", 5));
  ASSERT_TRUE(state.ok()) << state.status();
  ASSERT_GT(state->missing_size(), 0);
  EXPECT_GT(state->received_bytes(), 0);
  EXPECT_LT(state->received_bytes(), state->expected_bytes());
  ASSERT_TRUE(Push(chunks).ok()) << "chunks that came before are ignored";
  EXPECT_TRUE(Finish("one").ok());
}

TEST_F(WeightsServiceTest, ChunksThatAreWrongEndTheirStreamOnly) {
  ExpectError(Push({}).status(), kInvalid, "INVALID_FIELD", "update_id");
  ExpectError(Push({Chunk("one", tensors_[0].name, 0, "ab")}).status(), kPrecondition, "NO_UPDATE", "one");
  ASSERT_TRUE(client_->StartWeightUpdate(Request("one", 5)).ok());
  const std::string name = tensors_[0].name;
  ExpectError(Push({Chunk("", name, 0, "ab")}).status(), kInvalid, "INVALID_FIELD", "update_id");
  ExpectError(Push({Chunk("one", "", 0, "ab")}).status(), kInvalid, "INVALID_FIELD", "tensor");
  ExpectError(Push({Chunk("o/e", name, 0, "ab")}).status(), kInvalid, "INVALID_FIELD", "o/e");
  ExpectError(Push({Chunk("one", std::string(300, 'x'), 0, "ab")}).status(), kInvalid, "INVALID_FIELD", "300");
  ExpectError(Push({Chunk("one", name, 0, std::string(limits::kWeightChunkBytes + 2, 'x'))}).status(), kInvalid, "INVALID_FIELD", "data");
  ExpectError(Push({Chunk("one", "model.nothing", 0, "ab")}).status(), kInvalid, "UNKNOWN_TENSOR", "model.nothing");
  ExpectError(Push({Chunk("one", name, 1, "ab")}).status(), kInvalid, "WRONG_RANGE", name);
  ExpectError(Push({Chunk("one", name, 0, std::string("\x80\x7F", 2))}).status(), kInvalid, "NON_FINITE", name);
  v1::WeightChunk digest = Chunk("one", name, 0, "ab");
  digest.set_digest("short");
  ExpectError(Push({digest}).status(), kInvalid, "INVALID_FIELD", "digest");
  v1::WeightChunk whole = Chunk("one", name, 0, tensors_[0].bytes);
  whole.set_digest(std::string(32, 'x'));
  ExpectError(Push({whole}).status(), absl::StatusCode::kDataLoss, "DIGEST_MISMATCH", name);
  v1::WeightChunk unknown = Chunk("one", name, 0, "ab");
  unknown.GetReflection()->MutableUnknownFields(&unknown)->AddVarint(99, 1);
  ExpectError(Push({unknown}).status(), kInvalid, "UNKNOWN_FIELD", "99");

  ExpectError(Finish("one").status(), kPrecondition, "INCOMPLETE", name);
  ASSERT_TRUE(Push(AllChunks("one")).ok());
  EXPECT_TRUE(Finish("one").ok());
}

TEST_F(WeightsServiceTest, RequestsThatAreWrongNameTheField) {
  const auto start = [&](const std::function<void(v1::StartWeightUpdateRequest&)>& change) {
    v1::StartWeightUpdateRequest request = Request("one", 5);
    change(request);
    return client_->StartWeightUpdate(request).status();
  };
  using Start = v1::StartWeightUpdateRequest;
  ExpectError(start([](Start& r) { r.clear_update_id(); }), kInvalid, "INVALID_FIELD", "update_id");
  ExpectError(start([](Start& r) { r.set_update_id(std::string(65, 'a')); }), kInvalid, "INVALID_FIELD", "update_id");
  ExpectError(start([](Start& r) { r.set_target_step(-1); }), kInvalid, "INVALID_FIELD", "target_step: -1");
  ExpectError(start([](Start& r) { r.set_base_step(-3); }), kInvalid, "INVALID_FIELD", "base_step: -3");
  ExpectError(start([](Start& r) { r.set_label(std::string(65, 'a')); }), kInvalid, "INVALID_FIELD", "label: 65");
  ExpectError(start([](Start& r) { r.set_deadline_ms(0); }), kInvalid, "INVALID_FIELD", "deadline_ms: 0");
  ExpectError(start([](Start& r) { r.set_deadline_ms(3'600'001); }), kInvalid, "INVALID_FIELD", "deadline_ms: 3600001");
  ExpectError(start([](Start& r) { r.set_in_flight(static_cast<v1::InFlight::Mode>(9)); }), kInvalid, "INVALID_FIELD", "in_flight: 9");
  ExpectError(start([](Start& r) { r.set_encoding(static_cast<v1::WeightEncoding::Type>(9)); }), kInvalid, "INVALID_FIELD", "encoding: 9");
  ExpectError(start([](Start& r) { r.add_components(static_cast<v1::WeightComponent::Type>(9)); }), kInvalid, "INVALID_FIELD", "components[0]: 9");
  ExpectError(start([](Start& r) {
                r.add_components(v1::WeightComponent::TARGET);
                r.add_components(v1::WeightComponent::TARGET);
              }),
              kInvalid, "INVALID_FIELD", "components[1]");
  ExpectError(start([](Start& r) { r.mutable_manifest(3)->set_name(std::string(257, 'a')); }), kInvalid, "INVALID_FIELD", "manifest[3].name: 257");
  ExpectError(start([](Start& r) { r.mutable_manifest(3)->set_dtype("BFLOAT16X"); }), kInvalid, "INVALID_FIELD", "manifest[3].dtype");
  ExpectError(start([](Start& r) { r.mutable_manifest(3)->mutable_shape()->Resize(9, 1); }), kInvalid, "INVALID_FIELD", "manifest[3].shape");
  ExpectError(start([](Start& r) { r.mutable_manifest(3)->set_dtype("F64"); }), kInvalid, "WRONG_DTYPE", "F64");
  ExpectError(start([](Start& r) { r.mutable_manifest()->RemoveLast(); }), kInvalid, "MISSING_TENSOR");
  ExpectError(start([](Start& r) { r.set_base_step(3); }), kPrecondition, "WRONG_BASE_STEP");
  ExpectError(start([](Start& r) { r.GetReflection()->MutableUnknownFields(&r)->AddVarint(99, 1); }), kInvalid, "UNKNOWN_FIELD", "99");
  v1::FinishWeightUpdateRequest finish;
  finish.set_update_id("one");
  finish.set_expect_draft_digest("abc");
  ExpectError(client_->FinishWeightUpdate(finish).status(), kInvalid, "INVALID_FIELD", "expect_draft_digest");
  v1::UpdateWeightsRequest update;
  update.set_update_id("one");
  ExpectError(client_->UpdateWeights(update).status(), kInvalid, "INVALID_FIELD", "path");
  update.set_path("here");
  ExpectError(client_->UpdateWeights(update).status(), absl::StatusCode::kPermissionDenied, "NO_WEIGHTS_ROOT");
  v1::AbortWeightUpdateRequest abort;
  abort.set_update_id("a b");
  ExpectError(client_->AbortWeightUpdate(abort).status(), kInvalid, "INVALID_FIELD", "update_id");
}

TEST_F(WeightsServiceTest, ASecondLearnerIsToldToComeBack) {
  ASSERT_TRUE(client_->StartWeightUpdate(Request("one", 5)).ok());
  const absl::Status status = client_->StartWeightUpdate(Request("two", 5)).status();
  ExpectError(status, absl::StatusCode::kAborted, "UPDATE_IN_PROGRESS", "one");
  EXPECT_TRUE(GetErrorDetails(status).retry_after.has_value());
  v1::StartWeightUpdateRequest other = Request("one", 6);
  const absl::Status reused = client_->StartWeightUpdate(other).status();
  ExpectError(reused, absl::StatusCode::kAlreadyExists, "UPDATE_ID_REUSED");
  EXPECT_FALSE(GetErrorDetails(reused).retry_after.has_value());
  EXPECT_EQ(client_->AbortWeightUpdate({})->update_id(), "one");
  EXPECT_TRUE(client_->StartWeightUpdate(Request("two", 5)).ok());
}

TEST_F(WeightsServiceTest, WhenItDrainsNothingStartsAndAbortStillWorks) {
  ASSERT_TRUE(client_->StartWeightUpdate(Request("one", 5)).ok());
  engine_.SetHealth(absl::InternalError("gone"));
  ExpectError(client_->StartWeightUpdate(Request("one", 5)).status(), absl::StatusCode::kInternal, "ENGINE_FAILED");
  ExpectError(Push(AllChunks("one")).status(), absl::StatusCode::kInternal, "ENGINE_FAILED");
  ExpectError(Finish("one").status(), absl::StatusCode::kInternal, "ENGINE_FAILED");
  EXPECT_EQ(client_->AbortWeightUpdate({})->update_id(), "one");
  EXPECT_TRUE(client_->GetWeightInfo(false).ok());
}

// Many streams at once, each with another part of the tensors, while another client asks how far they are.
TEST_F(WeightsServiceTest, StreamsMaySplitTheTensors) {
  ASSERT_TRUE(client_->StartWeightUpdate(Request("one", 5)).ok());
  std::vector<std::thread> streams;
  for (size_t stream = 0; stream < 4; ++stream) {
    streams.emplace_back([&, stream] {
      std::vector<v1::WeightChunk> chunks;
      for (size_t i = stream; i < tensors_.size(); i += 4) {
        for (size_t at = 0; at < tensors_[i].bytes.size(); at += 32) {
          chunks.push_back(Chunk("one", tensors_[i].name, static_cast<int64_t>(at), tensors_[i].bytes.substr(at, 32)));
        }
      }
      const absl::StatusOr<v1::PushWeightsResult> result = Push(chunks);
      EXPECT_TRUE(result.ok()) << result.status();
    });
  }
  for (int i = 0; i < 20; ++i) EXPECT_TRUE(client_->GetWeightInfo(false).ok());
  for (std::thread& stream : streams) stream.join();
  EXPECT_TRUE(Finish("one").ok());
}

// Slow calls are refused beyond a few, and short ones do not wait for them.
TEST_F(WeightsServiceTest, ShortCallsDoNotWaitForLongOnes) {
  std::atomic<bool> let_go = false;
  std::atomic<int> num_hashing = 0, num_refused = 0;
  engine_.OnRehash([&] {
    ++num_hashing;
    while (!let_go) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  });
  ASSERT_TRUE(client_->StartWeightUpdate(Request("one", 5)).ok());
  std::vector<std::thread> checks;
  for (int i = 0; i < 12; ++i) {
    checks.emplace_back([&] {
      const absl::StatusOr<v1::CheckWeightsResult> check = client_->CheckWeights();
      if (check.ok()) return;
      ExpectError(check.status(), absl::StatusCode::kResourceExhausted, "CAPACITY", "CheckWeights");
      EXPECT_TRUE(GetErrorDetails(check.status()).retry_after.has_value());
      ++num_refused;
    });
  }
  EXPECT_TRUE(FakeEngine::WaitUntil([&] { return num_refused == 10; })) << num_refused;
  EXPECT_TRUE(FakeEngine::WaitUntil([&] { return num_hashing == 2; })) << num_hashing;
  EXPECT_EQ(client_->GetWeightInfo(false)->update().update_id(), "one");
  EXPECT_EQ(client_->AbortWeightUpdate({})->update_id(), "one");
  let_go = true;
  for (std::thread& check : checks) check.join();
  engine_.OnRehash(nullptr);
  EXPECT_TRUE(client_->CheckWeights().ok());
}

TEST_F(WeightsServiceTest, StreamsAreFew) {
  ASSERT_TRUE(client_->StartWeightUpdate(Request("one", 5)).ok());
  const std::shared_ptr<grpc::Channel> channel = grpc::CreateChannel(server_->admin_address(), grpc::InsecureChannelCredentials());
  const std::unique_ptr<v1::Weights::Stub> stub = v1::Weights::NewStub(channel);
  struct Stream {
    grpc::ClientContext context;
    v1::PushWeightsResult result;
    std::unique_ptr<grpc::ClientWriter<v1::WeightChunk>> writer;
  };
  std::vector<Stream> open(limits::kPushStreams);
  for (size_t i = 0; i < open.size(); ++i) {
    open[i].writer = stub->PushWeights(&open[i].context, &open[i].result);
    EXPECT_TRUE(open[i].writer->Write(Chunk("one", tensors_[i].name, 0, tensors_[i].bytes.substr(0, 8))));
  }
  EXPECT_TRUE(FakeEngine::WaitUntil([&] { return client_->GetWeightInfo(false)->update().received_bytes() == 8 * limits::kPushStreams; }));
  ExpectError(Push(AllChunks("one")).status(), absl::StatusCode::kResourceExhausted, "CAPACITY", "PushWeights");
  for (Stream& stream : open) {
    stream.writer->WritesDone();
    EXPECT_TRUE(stream.writer->Finish().ok());
  }
  EXPECT_TRUE(Push(AllChunks("one")).ok());
  EXPECT_TRUE(Finish("one").ok());
}

// A stream that is cut off leaves no thread behind that would keep the server from ending.
TEST_F(WeightsServiceTest, TheServerEndsWithAStreamOpen) {
  ASSERT_TRUE(client_->StartWeightUpdate(Request("one", 5)).ok());
  const std::unique_ptr<v1::Weights::Stub> stub =
      v1::Weights::NewStub(grpc::CreateChannel(server_->admin_address(), grpc::InsecureChannelCredentials()));
  grpc::ClientContext context;
  v1::PushWeightsResult unused;
  const auto writer = stub->PushWeights(&context, &unused);
  ASSERT_TRUE(writer->Write(AllChunks("one")[0]));
  server_.reset();
  EXPECT_FALSE(writer->Finish().ok());
}

// ---- pushing checkpoints ----

TEST_F(WeightsServiceTest, ACheckpointIsPushedWhateverItsSpelling) {
  const TempDir folder;
  std::vector<TestTensor> respelled = checkpoint_;
  for (TestTensor& tensor : respelled) {
    if (tensor.name.starts_with("model.")) tensor.name = "model.language_model." + tensor.name.substr(6);
    if (tensor.name == "model.language_model.embed_tokens.weight") {
      TestTensor head = tensor;
      head.name = "lm_head.weight";
      respelled.push_back(std::move(head));
      break;
    }
  }
  for (TestTensor& tensor : respelled) {
    if (tensor.name.starts_with("model.") && !tensor.name.starts_with("model.language_model.")) tensor.name = "model.language_model." + tensor.name.substr(6);
  }
  respelled.push_back(MakeTensor("model.visual.patch", "F32", {2}, {1.0f, 2.0f}));
  const std::vector<TestTensor> first(respelled.begin(), respelled.begin() + 5), second(respelled.begin() + 5, respelled.end());
  WriteFile(folder.path() + "/a.safetensors", SafetensorsBytes(first));
  WriteFile(folder.path() + "/b.safetensors", SafetensorsBytes(second));
  WriteFile(folder.path() + "/model.safetensors.index.json", IndexJson({{"a.safetensors", first}, {"b.safetensors", second}}));
  int64_t last = 0, total = 0;
  WeightUpdateOptions options;
  options.target_step = 5;
  options.label = "pushed";
  options.on_progress = [&](int64_t done, int64_t all) {
    EXPECT_GE(done, last);
    last = done;
    total = all;
  };
  const absl::StatusOr<v1::FinishWeightUpdateResult> result = PushCheckpoint(client_.get(), {folder.path()}, options);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(last, total);
  EXPECT_GT(total, 0);
  const std::unique_ptr<DeviceMemory> memory = MakeHostMemory();
  const WeightVersion expected = Load(config_, checkpoint_, DType::kBFloat16, memory.get())->version;
  EXPECT_EQ(result->info().target_digest(), DigestHex(expected.target_digest));
  EXPECT_EQ(result->info().draft_digest(), DigestHex(*expected.draft_digest));

  // The draft alone, from float32 values that are rounded to what the server lists.
  const std::string file = folder.path() + "/wide.safetensors";
  const std::vector<TestTensor> wide = MakeModelTensors(config_, true, "F32", 3);
  WriteFile(file, SafetensorsBytes(wide));
  options.target_step = 6;
  last = 0;
  options.components = {v1::WeightComponent::DRAFT};
  const absl::StatusOr<v1::FinishWeightUpdateResult> draft = PushCheckpoint(client_.get(), {file}, options);
  ASSERT_TRUE(draft.ok()) << draft.status();
  EXPECT_EQ(draft->info().target_step(), 5);
  EXPECT_EQ(draft->info().draft_step(), 6);
  EXPECT_EQ(draft->info().target_digest(), DigestHex(expected.target_digest));
  WeightVersion rounded = engine_.weight_version();
  std::vector<Sha256Digest> digests;
  for (const TestTensor& tensor : InForms(wide, rounded)) digests.push_back(Sha256Of(tensor.bytes));
  rounded.SetDigests(digests);
  EXPECT_EQ(draft->info().draft_digest(), DigestHex(*rounded.draft_digest));
}

TEST_F(WeightsServiceTest, APushThatIsRefusedLeavesNothingOpen) {
  const TempDir folder;
  const std::string file = folder.path() + "/model.safetensors";
  WeightUpdateOptions options;
  options.target_step = 5;
  const auto push = [&](const std::vector<TestTensor>& tensors) {
    WriteFile(file, SafetensorsBytes(tensors));
    const absl::Status status = PushCheckpoint(client_.get(), {file}, options).status();
    EXPECT_FALSE(client_->GetWeightInfo(false)->has_update());
    EXPECT_EQ(client_->GetWeightInfo(false)->target_step(), 0);
    return status;
  };
  std::vector<TestTensor> tensors = checkpoint_;
  tensors.pop_back();
  ExpectError(push(tensors), kInvalid, "MISSING_TENSOR", checkpoint_.back().name);
  tensors = checkpoint_;
  tensors[1].bytes[1] = '\x7F';
  tensors[1].bytes[0] = '\xC0';
  ExpectError(push(tensors), kInvalid, "NON_FINITE", tensors[1].name);
  tensors = checkpoint_;
  tensors.push_back(tensors[1]);
  tensors.back().name = "model.language_model." + tensors[1].name.substr(6);
  ExpectError(push(tensors), kInvalid, "DUPLICATE_TENSOR", tensors[1].name);
  tensors = checkpoint_;
  tensors.push_back(checkpoint_[1]);
  tensors.back().name = "lm_head.weight";
  ExpectError(push(tensors), kInvalid, "UNKNOWN_TENSOR", "lm_head.weight");
  tensors = checkpoint_;
  tensors.push_back(MakeTensor("model.more", "F32", {1}, {1.0f}));
  ExpectError(push(tensors), kInvalid, "UNKNOWN_TENSOR", "model.more");
  EXPECT_TRUE(absl::IsNotFound(PushCheckpoint(client_.get(), {folder.path() + "/nothing"}, options).status()));
  options.target_step = 0;
  ExpectError(push(checkpoint_), kPrecondition, "STEP_NOT_NEWER");
}

// ---- with the real engine ----

struct Replica {
  std::unique_ptr<Engine> engine;
  std::unique_ptr<Server> server;
};

Replica StartReplica(const std::string& model) {
  EngineOptions options;
  options.model_path = model;
  options.num_threads = 1;
  options.max_model_len = 128;
  options.max_num_seqs = 4;
  Replica replica;
  auto engine = Engine::Create(options);
  EXPECT_TRUE(engine.ok()) << engine.status();
  replica.engine = *std::move(engine);
  auto server = Server::Start(replica.engine.get(), {});
  EXPECT_TRUE(server.ok()) << server.status();
  replica.server = *std::move(server);
  return replica;
}

std::string ScoreOf(const Replica& replica) {
  Client client({.server = replica.server->rollout_address(), .timeout = absl::Seconds(60)});
  v1::ScoreRequest request;
  for (uint32_t id = 1; id < 24; ++id) {
    if (request.sequences_size() == 0) request.add_sequences();
    request.mutable_sequences(0)->add_token_ids(id * 7);
  }
  request.set_draft_depth(2);
  request.set_entropy(true);
  absl::StatusOr<v1::ScoreResult> result = client.Score(request);
  EXPECT_TRUE(result.ok()) << result.status();
  if (!result.ok()) return "";
  for (v1::SequenceScore& score : *result->mutable_scores()) score.clear_weight_step();
  return result->SerializeAsString();
}

// I7: an update to B leaves the server as one that was started with B, bit for bit, target and draft.
TEST(WeightsServiceEngineTest, UpdatingIsStarting) {
  constexpr char kTiny[] = "tests/models/bebop-tiny";
  const TempDir folder;
  for (const char* name : {"/config.json", "/tokenizer.json"}) std::filesystem::copy_file(std::string(kTiny) + name, folder.path() + name);
  // B: every weight of A with another last bit, so that no tensor can stay A's unnoticed.
  std::ifstream file(std::string(kTiny) + "/model.safetensors", std::ios::binary);
  std::string bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  const SafetensorsHeader header = ParseSafetensorsHeader(bytes, "tiny").value();
  for (const TensorEntry& entry : header.tensors) {
    for (uint64_t at = entry.begin; at < entry.end; at += entry.dtype == "F32" ? 4 : 2) bytes[at] = static_cast<char>(bytes[at] ^ 0x08);
  }
  WriteFile(folder.path() + "/model.safetensors", bytes);

  const Replica updated = StartReplica(kTiny), started = StartReplica(folder.path());
  const std::string old_score = ScoreOf(updated), new_score = ScoreOf(started);
  ASSERT_NE(old_score, new_score);
  WeightsClient client({.server = updated.server->admin_address(), .timeout = absl::Seconds(60)});
  WeightUpdateOptions options;
  options.target_step = 1;
  const absl::StatusOr<v1::FinishWeightUpdateResult> result = PushCheckpoint(&client, {folder.path()}, options);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(ScoreOf(updated), new_score);
  WeightsClient other({.server = started.server->admin_address(), .timeout = absl::Seconds(60)});
  EXPECT_EQ(result->info().target_digest(), other.GetWeightInfo(false)->target_digest());
  EXPECT_EQ(result->info().draft_digest(), other.GetWeightInfo(false)->draft_digest());
  options.target_step = 2;
  ASSERT_TRUE(PushCheckpoint(&client, {kTiny}, options).ok());
  EXPECT_EQ(ScoreOf(updated), old_score) << "and back";
}

}  // namespace
}  // namespace bebop
