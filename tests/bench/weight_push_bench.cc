// SPDX-License-Identifier: Apache-2.0
// A weight update over loopback against a plain gRPC client stream of the same bytes in the same chunks, and what its stages cost alone: SHA-256,
// which learner and server each compute once (of two tensors at a time: BM_Sha256Both), and writing chunks into the staged copy, which includes the server's SHA-256.
#include <grpcpp/grpcpp.h>

#include <string>
#include <string_view>

#include "bebop/v1/weights.grpc.pb.h"
#include "benchmark/benchmark.h"
#include "client/cpp/checkpoint_push.h"
#include "engine/weights/dummy_weights.h"
#include "engine/weights/weight_digest.h"
#include "kernels/common/check.h"
#include "server/server.h"
#include "tests/server/fake_engine.h"
#include "tests/support/checkpoint_writer.h"

namespace bebop {
namespace {

constexpr size_t kChunkBytes = 1 << 20;

// About 200 MB of bfloat16 weights.
constexpr char kConfigJson[] =
    R"({"model_type": "qwen3_5_text", "hidden_size": 1024, "intermediate_size": 3072, "vocab_size": 16384, "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"], "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 16, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": false,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000000.0, "partial_rotary_factor": 0.25},
        "mtp_num_hidden_layers": 1, "eos_token_id": 7, "max_position_embeddings": 4096, "tie_word_embeddings": true})";

// A server over an engine with those weights, and a checkpoint for it.
class Setup {
 public:
  static Setup& Get() {
    static auto* const setup = new Setup();
    return *setup;
  }

  std::string address() const { return server_->admin_address(); }
  const std::vector<std::string>& paths() const { return paths_; }
  int64_t num_bytes() const { return num_bytes_; }
  std::string_view bytes() const { return bytes_; }
  WeightVersion version() const { return engine_.weight_version(); }
  FakeEngine& engine() { return engine_; }

 private:
  Setup() : memory_(MakeHostMemory()) {
    const ModelConfig config = ParseModelConfig(kConfigJson).value();
    ThreadPool pool(2);
    engine_.LoadWeights(config, MakeDummyWeights(config, DType::kBFloat16, 1, pool, memory_.get()).value(), memory_.get());
    server_ = Server::Start(&engine_, {}).value();
    // Small values, all finite, in the tensors that the server lists.
    std::vector<TestTensor> tensors;
    for (const TensorInfo& info : engine_.weight_version().tensors) {
      TestTensor tensor{.name = info.name, .dtype = FormName(info.form), .shape = info.shape, .bytes = std::string(static_cast<size_t>(info.num_bytes()), '\x3c')};
      for (size_t i = 0; i < tensor.bytes.size(); i += 4) tensor.bytes[i] = static_cast<char>(i >> 2);
      num_bytes_ += info.num_bytes();
      tensors.push_back(std::move(tensor));
    }
    bytes_ = SafetensorsBytes(tensors);
    WriteFile(folder_.path() + "/model.safetensors", bytes_);
    paths_ = {folder_.path()};
  }

  const std::unique_ptr<DeviceMemory> memory_;
  const TempDir folder_;
  FakeEngine engine_;
  std::unique_ptr<Server> server_;
  std::vector<std::string> paths_;
  std::string bytes_;
  int64_t num_bytes_ = 0;
};

void SetBytes(benchmark::State& state) { state.SetBytesProcessed(state.iterations() * Setup::Get().num_bytes()); }

// Takes chunks and forgets them.
class PlainService final : public v1::Weights::Service {
  grpc::Status PushWeights(grpc::ServerContext*, grpc::ServerReader<v1::WeightChunk>* reader, v1::PushWeightsResult* result) override {
    v1::WeightChunk chunk;
    while (reader->Read(&chunk)) result->mutable_update()->set_received_bytes(result->update().received_bytes() + static_cast<int64_t>(chunk.data().size()));
    return grpc::Status::OK;
  }
};

void BM_PlainStream(benchmark::State& state) {
  const std::string_view bytes = Setup::Get().bytes();
  PlainService service;
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(&service);
  builder.SetMaxReceiveMessageSize(16 << 20);
  const std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  WeightsClient client({.server = "127.0.0.1:" + std::to_string(port)});
  for (auto _ : state) {
    size_t at = 0;
    const auto result = client.PushWeights([&](v1::WeightChunk* chunk) {
      if (at >= bytes.size()) return false;
      const std::string_view piece = bytes.substr(at, kChunkBytes);
      chunk->set_data(piece.data(), piece.size());
      at += piece.size();
      return true;
    });
    BEBOP_CHECK(result.ok());
  }
  SetBytes(state);
}
BENCHMARK(BM_PlainStream)->MeasureProcessCPUTime()->UseRealTime()->Unit(benchmark::kMillisecond);

// A whole update as a learner makes it: read, hashed, streamed, checked, swapped.
void BM_Push(benchmark::State& state) {
  WeightsClient client({.server = Setup::Get().address()});
  for (auto _ : state) {
    WeightUpdateOptions options;
    options.target_step = client.GetWeightInfo(false)->target_step() + 1;
    const auto result = PushCheckpoint(&client, Setup::Get().paths(), options);
    BEBOP_CHECK(result.ok());
  }
  SetBytes(state);
}
BENCHMARK(BM_Push)->MeasureProcessCPUTime()->UseRealTime()->Unit(benchmark::kMillisecond);

void BM_Sha256(benchmark::State& state) {
  const std::string_view bytes = Setup::Get().bytes();
  for (auto _ : state) benchmark::DoNotOptimize(Sha256Of(bytes));
  SetBytes(state);
}
BENCHMARK(BM_Sha256)->MeasureProcessCPUTime()->UseRealTime()->Unit(benchmark::kMillisecond);

// The same bytes as two hashes side by side, as a push has them.
void BM_Sha256Both(benchmark::State& state) {
  const std::string_view bytes = Setup::Get().bytes(), front = bytes.substr(0, bytes.size() / 2), back = bytes.substr(front.size());
  for (auto _ : state) {
    Sha256 first, second;
    Sha256::UpdateBoth(&first, front, &second, back);
    benchmark::DoNotOptimize(first.Finish());
    benchmark::DoNotOptimize(second.Finish());
  }
  SetBytes(state);
}
BENCHMARK(BM_Sha256Both)->MeasureProcessCPUTime()->UseRealTime()->Unit(benchmark::kMillisecond);

void BM_WriteChunks(benchmark::State& state) {
  Setup& setup = Setup::Get();
  const std::string_view bytes = setup.bytes();
  for (auto _ : state) {
    const WeightVersion version = setup.version();
    WeightUpdateSpec spec;
    spec.target_step = version.target_step + 1;
    for (const TensorInfo& info : version.tensors) spec.manifest.push_back({info.name, FormName(info.form), info.shape});
    const auto update = setup.engine().StartWeightUpdate(spec, int64_t{1} << 40).value();
    // The file ends with the tensors one after the other, in the order of the version.
    size_t at = bytes.size() - static_cast<size_t>(setup.num_bytes());
    for (const TensorInfo& info : version.tensors) {
      const std::string_view tensor = bytes.substr(at, static_cast<size_t>(info.num_bytes()));
      for (size_t offset = 0; offset < tensor.size(); offset += kChunkBytes) {
        BEBOP_CHECK(update->WriteChunk(info.name, static_cast<int64_t>(offset), tensor.substr(offset, kChunkBytes)).ok());
      }
      at += tensor.size();
    }
  }
  SetBytes(state);
}
BENCHMARK(BM_WriteChunks)->MeasureProcessCPUTime()->UseRealTime()->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace bebop

BENCHMARK_MAIN();
