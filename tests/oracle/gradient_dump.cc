// SPDX-License-Identifier: Apache-2.0
//
// gradient_dump OPERATOR FOLDER [KEY=VALUE ...]
//
// Runs one backward operator, the whole MTP chain, or the optimizer on raw arrays in FOLDER (NAME.bin: float32, or uint32 for
// tokens) and writes its results there as out.NAME.bin, for tests/oracle/gradient_test.py to judge. KEY=VALUE are the shapes;
// `documents` is a list of row counts.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "engine/training/mtp_block.h"
#include "engine/training/optimizer.h"
#include "kernels/attention/chain_attention.h"
#include "kernels/common/check.h"
#include "kernels/linear/linear_backward.h"
#include "kernels/qk_norm_rope/qk_norm_rope_backward.h"
#include "kernels/rms_norm/rms_norm_backward.h"
#include "kernels/swiglu/swiglu_backward.h"

namespace bebop {
namespace {

struct Case {
  std::string folder;
  std::map<std::string, std::string> values;
  ThreadPool pool{2};

  int64_t Int(const std::string& key) const { return std::stoll(values.at(key)); }
  float Float(const std::string& key) const { return std::stof(values.at(key)); }
  template <typename T = float>
  std::vector<T> Read(const std::string& name) const {
    std::ifstream file(folder + "/" + name + ".bin", std::ios::binary | std::ios::ate);
    BEBOP_CHECK(file.good());
    std::vector<T> out(static_cast<size_t>(file.tellg()) / sizeof(T));
    file.seekg(0);
    file.read(reinterpret_cast<char*>(out.data()), static_cast<std::streamsize>(out.size() * sizeof(T)));
    BEBOP_CHECK(file.good());
    return out;
  }
  void Write(const std::string& name, const float* data, int64_t count) const {
    std::ofstream file(folder + "/out." + name + ".bin", std::ios::binary);
    file.write(reinterpret_cast<const char*>(data), static_cast<std::streamsize>(count * static_cast<int64_t>(sizeof(float))));
    BEBOP_CHECK(file.good());
  }
  void Write(const std::string& name, const std::vector<float>& data) const {
    Write(name, data.data(), static_cast<int64_t>(data.size()));
  }
  std::vector<DocumentRows> Documents() const {
    std::vector<DocumentRows> out;
    std::istringstream list(values.at("documents"));
    int64_t row = 0;
    for (std::string item; std::getline(list, item, ',');) {
      out.push_back({row, std::stoll(item)});
      row += out.back().num_rows;
    }
    return out;
  }
};

TensorView View(std::vector<float>& data, int64_t rows) {
  return FloatMatrix(data.data(), rows, static_cast<int64_t>(data.size()) / rows);
}

// A buffer for a packed matrix: aligned, and full of garbage that packing must overwrite.
struct PackBuffer {
  explicit PackBuffer(int64_t bytes) : data(static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(bytes)))) {
    for (int64_t i = 0; i < bytes / 4; ++i) data[i] = 1e30f;
  }
  ~PackBuffer() { std::free(data); }
  PackBuffer(const PackBuffer&) = delete;
  PackBuffer& operator=(const PackBuffer&) = delete;
  float* data;
};

void RunLinear(Case& test) {
  const int64_t rows = test.Int("rows"), inputs = test.Int("inputs"), outputs = test.Int("outputs");
  std::vector<float> x = test.Read("x"), w = test.Read("w"), dy = test.Read("dy"), dw = test.Read("dw_start");
  std::vector<float> y(dy.size()), dx(x.size());
  PackBuffer packed(PackedBytes(DType::kFloat32, outputs, inputs)), transposed(PackedBytes(DType::kFloat32, inputs, outputs));
  cpu::LinearScratch scratch;
  cpu::LinearBackwardScratch backward_scratch;
  cpu::Linear({.x = View(x, rows), .w = cpu::PackFloat(View(w, outputs), packed.data, test.pool), .y = View(y, rows)}, scratch,
              test.pool);
  cpu::Linear({.x = View(dy, rows), .w = cpu::PackTransposed(View(w, outputs), transposed.data, test.pool), .y = View(dx, rows)},
              scratch, test.pool);
  cpu::LinearBackwardWeight(
      {.x = View(x, rows), .dy = View(dy, rows), .accumulate = test.Int("accumulate") != 0, .dw = View(dw, outputs)},
      backward_scratch, test.pool);
  test.Write("y", y);
  test.Write("dx", dx);
  test.Write("dw", dw);
}

void RunRmsNorm(Case& test) {
  const int64_t rows = test.Int("rows");
  std::vector<float> x = test.Read("x"), weight = test.Read("weight"), dy = test.Read("dy"), dx = test.Read("dx_start");
  std::vector<float> dweight(weight.size());
  cpu::RmsNormBackward({.x = View(x, rows),
                        .weight = weight.data(),
                        .eps = test.Float("eps"),
                        .dy = View(dy, rows),
                        .dx = View(dx, rows),
                        .accumulate_dx = true,
                        .dweight = dweight.data()},
                       test.pool);
  test.Write("dx", dx);
  test.Write("dweight", dweight);
}

void RunSwiGlu(Case& test) {
  const int64_t rows = test.Int("rows");
  std::vector<float> gate = test.Read("gate"), up = test.Read("up"), dout = test.Read("dout");
  const TensorView gates = View(gate, rows), ups = View(up, rows), outs = View(dout, rows);
  cpu::SwiGluBackward({.gate = gates, .up = ups, .dout = outs, .dgate = gates, .dup = ups, .out = outs}, test.pool);
  test.Write("dgate", gate);
  test.Write("dup", up);
  test.Write("out", dout);
}

void RunQkNormRope(Case& test) {
  const int64_t rows = test.Int("rows");
  std::vector<float> q_gate = test.Read("q_gate"), k = test.Read("k"), q_norm = test.Read("q_norm"), k_norm = test.Read("k_norm");
  std::vector<float> dq = test.Read("dq"), dk = test.Read("dk");
  const std::vector<uint32_t> positions = test.Read<uint32_t>("positions");
  const std::vector<int32_t> row_position(positions.begin(), positions.end());
  std::vector<float> dq_norm(q_norm.size()), dk_norm(k_norm.size());
  cpu::QkNormRopeBackward({.row_position = row_position.data(),
                           .q_gate = View(q_gate, rows),
                           .k = View(k, rows),
                           .q_norm = q_norm.data(),
                           .k_norm = k_norm.data(),
                           .eps = test.Float("eps"),
                           .num_q_heads = static_cast<int32_t>(test.Int("q_heads")),
                           .num_kv_heads = static_cast<int32_t>(test.Int("kv_heads")),
                           .head_dim = static_cast<int32_t>(test.Int("head_dim")),
                           .rotary_dim = static_cast<int32_t>(test.Int("rotary_dim")),
                           .rope_theta = 1e4,
                           .dq = View(dq, rows),
                           .dk = View(dk, rows),
                           .dq_gate = View(q_gate, rows),
                           .dk_out = View(k, rows),
                           .dq_norm = dq_norm.data(),
                           .dk_norm = dk_norm.data()},
                          test.pool);
  test.Write("dq_gate", q_gate);
  test.Write("dk", k);
  test.Write("dq_norm", dq_norm);
  test.Write("dk_norm", dk_norm);
}

void RunAttention(Case& test) {
  const int64_t rows = test.Int("rows"), q_heads = test.Int("q_heads"), chain = test.Int("chain");
  const std::vector<DocumentRows> documents = test.Documents();
  std::vector<float> q = test.Read("q"), q_gate = test.Read("q_gate"), k = test.Read("k"), v = test.Read("v"),
                     dout = test.Read("dout");
  std::vector<float> attended(q.size()), out(q.size()), log_sum(static_cast<size_t>(rows * q_heads)), dk(k.size()), dv(v.size());
  std::vector<std::vector<float>> chain_k, chain_v, dchain_k, dchain_v;
  std::vector<TensorView> views[4];
  for (int64_t c = 0; c < chain; ++c) {
    chain_k.push_back(test.Read("chain_k" + std::to_string(c)));
    chain_v.push_back(test.Read("chain_v" + std::to_string(c)));
    dchain_k.emplace_back(k.size());
    dchain_v.emplace_back(v.size());
  }
  for (int64_t c = 0; c < chain; ++c) {
    const auto at = static_cast<size_t>(c);
    views[0].push_back(View(chain_k[at], rows));
    views[1].push_back(View(chain_v[at], rows));
    views[2].push_back(View(dchain_k[at], rows));
    views[3].push_back(View(dchain_v[at], rows));
  }
  const ChainAttentionArgs forward = {.documents = documents.data(),
                                      .num_documents = static_cast<int32_t>(documents.size()),
                                      .q = View(q, rows),
                                      .q_gate = View(q_gate, rows),
                                      .base_k = View(k, rows),
                                      .base_v = View(v, rows),
                                      .num_chain = static_cast<int32_t>(chain),
                                      .chain_k = views[0].data(),
                                      .chain_v = views[1].data(),
                                      .num_q_heads = static_cast<int32_t>(q_heads),
                                      .num_kv_heads = static_cast<int32_t>(test.Int("kv_heads")),
                                      .head_dim = static_cast<int32_t>(test.Int("head_dim")),
                                      .attended = View(attended, rows),
                                      .log_sum = View(log_sum, rows),
                                      .out = View(out, rows)};
  const auto set = static_cast<cpu::InstructionSet>(test.Int("set"));
  if (set > cpu::DetectInstructionSet()) std::exit(77);
  cpu::ChainAttentionWith(set, forward, test.pool);
  test.Write("out", out);
  cpu::ChainAttentionBackwardWith(set,
                                  {.forward = forward,
                                   .dout = View(dout, rows),
                                   .dq = View(out, rows),
                                   .dq_gate = View(q_gate, rows),
                                   .dbase_k = View(dk, rows),
                                   .dbase_v = View(dv, rows),
                                   .dchain_k = views[2].data(),
                                   .dchain_v = views[3].data()},
                                  test.pool);
  test.Write("dq", out);
  test.Write("dq_gate", q_gate);
  test.Write("dk", dk);
  test.Write("dv", dv);
  for (int64_t c = 0; c < chain; ++c) {
    test.Write("dchain_k" + std::to_string(c), dchain_k[static_cast<size_t>(c)]);
    test.Write("dchain_v" + std::to_string(c), dchain_v[static_cast<size_t>(c)]);
  }
}

ModelConfig Config(const Case& test) {
  ModelConfig config;
  config.hidden_size = static_cast<int32_t>(test.Int("hidden"));
  config.intermediate_size = static_cast<int32_t>(test.Int("ffn"));
  config.vocab_size = static_cast<int32_t>(test.Int("vocab"));
  config.num_attention_heads = static_cast<int32_t>(test.Int("q_heads"));
  config.num_key_value_heads = static_cast<int32_t>(test.Int("kv_heads"));
  config.head_dim = static_cast<int32_t>(test.Int("head_dim"));
  config.rotary_dim = static_cast<int32_t>(test.Int("rotary_dim"));
  config.rope_theta = std::stod(test.values.at("theta"));
  config.rms_norm_eps = test.Float("eps");
  return config;
}

// One float a parameter, read tensor by tensor.
std::vector<float> ReadTensors(const Case& test, const MtpLayout& layout, const std::string& suffix = "") {
  std::vector<float> out(static_cast<size_t>(layout.total));
  for (const MtpTensor& tensor : layout.tensors) {
    const std::vector<float> values = test.Read(tensor.name + suffix);
    BEBOP_CHECK(static_cast<int64_t>(values.size()) == tensor.size());
    std::copy(values.begin(), values.end(), out.begin() + tensor.offset);
  }
  return out;
}

void RunAdamW(Case& test) {
  const MtpLayout layout(Config(test));
  OptimizerOptions options;
  options.learning_rate = test.Float("rate");
  options.weight_decay = test.Float("weight_decay");
  options.clip_norm = test.Float("clip");
  options.warmup_steps = test.Int("warmup");
  options.total_steps = test.Int("steps");
  options.decay = RateDecay::kLinear;
  const std::unique_ptr<TrainingOps> ops = MakeCpuTrainingOps(&test.pool);
  const std::unique_ptr<DeviceMemory> memory = MakeHostMemory();
  auto optimizer = AdamW::Create(layout, options, memory.get(), ops.get());
  BEBOP_CHECK(optimizer.ok());
  std::vector<float> parameters = ReadTensors(test, layout);
  const std::vector<float> start = parameters;
  for (int64_t step = 1; step <= test.Int("steps"); ++step) {
    const std::vector<float> gradients = ReadTensors(test, layout, "." + std::to_string(step));
    (*optimizer)->Step(step, (*optimizer)->Norm(gradients.data()), gradients.data(), parameters.data());
  }
  for (size_t i = 0; i < start.size(); ++i) parameters[i] -= start[i];
  for (const MtpTensor& tensor : layout.tensors) test.Write(tensor.name, parameters.data() + tensor.offset, tensor.size());
}

void RunMtp(Case& test) {
  const ModelConfig config = Config(test);
  const auto steps = static_cast<int32_t>(test.Int("steps"));
  const std::vector<DocumentRows> documents = test.Documents();
  std::vector<int32_t> positions;
  for (const DocumentRows& document : documents) {
    for (int32_t row = 0; row < document.num_rows; ++row) positions.push_back(row + 1);
  }
  const auto rows = static_cast<int64_t>(positions.size());
  for (int64_t i = rows; i < steps * rows; ++i) positions.push_back(positions[static_cast<size_t>(i - rows)] + 1);

  const std::unique_ptr<DeviceMemory> memory = MakeHostMemory();
  const std::unique_ptr<TrainingOps> ops = MakeCpuTrainingOps(&test.pool);
  auto block = MtpBlock::Create(config, rows + 3, steps, memory.get(), ops.get());
  BEBOP_CHECK(block.ok());
  const MtpLayout& layout = (*block)->layout();
  const std::vector<float> parameters = ReadTensors(test, layout);
  std::vector<float> gradients(parameters.size());
  std::vector<float> table = test.Read("embedding"), target_hidden = test.Read("target_hidden"), dhidden = test.Read("dhidden");
  const std::vector<uint32_t> tokens = test.Read<uint32_t>("tokens");
  PackBuffer packed(PackedBytes(DType::kFloat32, config.vocab_size, config.hidden_size));
  const PackedMatrix embedding = ops->Pack(View(table, config.vocab_size), packed.data);
  const MtpBatch batch = {.documents = documents.data(),
                          .num_documents = static_cast<int32_t>(documents.size()),
                          .num_rows = rows,
                          .token_ids = tokens.data(),
                          .row_position = positions.data(),
                          .target_hidden = View(target_hidden, rows),
                          .embedding = embedding};

  // Twice: a second pass over used buffers must give the same.
  for (int pass = 0; pass < 2; ++pass) {
    std::fill(gradients.begin(), gradients.end(), 0.0f);
    std::vector<float> gradient = dhidden;
    (*block)->SetParameters(parameters.data());
    std::vector<TensorView> step_gradients;
    for (int32_t step = 1; step <= steps; ++step) {
      step_gradients.push_back(FloatMatrix(gradient.data() + (step - 1) * rows * config.hidden_size, rows, config.hidden_size));
      (*block)->ForwardStep(batch, step);
      test.Write("hidden" + std::to_string(step), (*block)->hidden(step).Row<float>(0), rows * config.hidden_size);
    }
    (*block)->Backward(batch, steps, step_gradients.data(), gradients.data());
  }
  for (const MtpTensor& tensor : layout.tensors) test.Write(tensor.name, gradients.data() + tensor.offset, tensor.size());
}

int Main(int argc, char** argv) {
  const std::map<std::string, void (*)(Case&)> operators = {
      {"linear", RunLinear},       {"rms_norm", RunRmsNorm}, {"swiglu", RunSwiGlu}, {"qk_norm_rope", RunQkNormRope},
      {"attention", RunAttention}, {"mtp", RunMtp},          {"adamw", RunAdamW}};
  if (argc < 3 || operators.count(argv[1]) == 0) {
    std::fprintf(stderr, "usage: gradient_dump OPERATOR FOLDER [KEY=VALUE ...]\n");
    return 2;
  }
  Case test;
  test.folder = argv[2];
  for (int i = 3; i < argc; ++i) {
    const std::string argument = argv[i];
    const size_t equals = argument.find('=');
    BEBOP_CHECK(equals != std::string::npos);
    test.values[argument.substr(0, equals)] = argument.substr(equals + 1);
  }
  operators.at(argv[1])(test);
  return 0;
}

}  // namespace
}  // namespace bebop

int main(int argc, char** argv) { return bebop::Main(argc, argv); }
