// SPDX-License-Identifier: Apache-2.0
//
// The forward passes on a device against those on the CPU: the same weights, the same passes (prompt chunks, verification windows, forks,
// MTP steps and chains), the same numbers up to rounding. What the numbers must be is the business of tests/oracle.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "engine/model/ops.h"
#include "engine/weights/dummy_weights.h"
#include "kernels/common/cuda_stream.h"
#include "tests/engine/model/model_harness.h"

namespace bebop {
namespace {

using Sequence = ModelHarness::Sequence;
using Tokens = std::vector<uint32_t>;

Tokens Slice(const Tokens& tokens, int64_t begin, int64_t count) { return {tokens.begin() + begin, tokens.begin() + begin + count}; }

// Sizes that are no multiples of any tile, within what the device's kernels take.
ModelConfig DeviceConfig(std::string_view layers) {
  ModelConfig config = TinyConfig(layers);
  config.head_dim = 32;
  config.linear_key_head_dim = 24;
  config.linear_value_head_dim = 40;
  return config;
}

// What one backend made of a scenario, a matrix a pass, and what each is.
struct Results {
  std::vector<std::string> names;
  std::vector<Matrix> matrices;
  void Add(std::string name, Matrix matrix) {
    names.push_back(std::move(name));
    matrices.push_back(std::move(matrix));
  }
};

// Three sequences through everything a model does. The tokens are given, so both backends see the same passes.
Results RunScenario(ModelHarness& harness, const Tokens& tokens) {
  Results results;
  Sequence a, b;
  int64_t at = 0;
  const auto take = [&](int64_t count) {
    at += count;
    return Slice(tokens, at - count, count);
  };
  // Prompts in chunks; the second chunk crosses a page and a multiple of 64 positions.
  Matrix hidden_a;
  const Tokens prompt_a = take(83), prompt_b = take(20);
  const Matrix first = harness.Target({{&a, Slice(prompt_a, 0, 37), {}}, {&b, prompt_b, {}}});
  results.Add("prompts", first);
  hidden_a.Append(first.Rows(0, 37));
  const Matrix second = harness.Target({{&a, Slice(prompt_a, 37, 46), {}}});
  results.Add("second chunk", second);
  hidden_a.Append(second);
  results.Add("logits", harness.Logits(second.Rows(40, 6)));

  // The MTP cache over the prompt, two recurrent steps behind it, and teacher-forced depths.
  Tokens next_a = Slice(prompt_a, 1, 82);
  Sequence drafted = harness.Fork(a);
  Matrix mtp = harness.Mtp({{&drafted, next_a, 1}}, hidden_a.Rows(0, 82));
  results.Add("MTP extend", mtp);
  const Matrix step1 = harness.Mtp({{&drafted, take(1), 83}}, hidden_a.Rows(82, 1));
  results.Add("MTP draft 1", step1);
  results.Add("MTP draft 2", harness.Mtp({{&drafted, take(1), 84}}, step1));
  ModelHarness::Chain chain(harness, drafted, mtp.Rows(0, 30));
  results.Add("MTP chain 2", chain.Step(Slice(prompt_a, 2, 30)));
  results.Add("MTP chain 3", chain.Step(Slice(prompt_a, 3, 29)));
  results.Add("MTP chain 4", chain.Step(Slice(prompt_a, 4, 20)));
  harness.Release(drafted);

  // Verification with any number accepted, beside plain rows and beside a prompt.
  results.Add("windows", harness.Target({{&a, take(1), take(3)}, {&b, take(1), take(2)}}));
  harness.Accept(a, 2);
  harness.Accept(b, 0);
  Sequence c;
  results.Add("window, plain row and prompt", harness.Target({{&b, take(1), take(5)}, {&a, take(1), {}}, {&c, take(19), {}}}));
  harness.Accept(b, 5);
  harness.Accept(a, 0);
  // A fork reads its parent's slot; both go on in different ways.
  Sequence d = harness.Fork(a);
  results.Add("fork", harness.Target({{&d, take(1), take(2)}}));
  harness.Accept(d, 1);
  const Matrix last = harness.Target({{&a, take(1), take(1)}, {&d, take(2), {}}, {&b, take(1), take(1)}, {&c, take(1), take(4)}});
  results.Add("after the fork", last);
  results.Add("last logits", harness.Logits(last));
  return results;
}

struct Tolerance {
  double rms, largest;  // relative to the rms of the expected values
};

// Float32: both sides round sums of about a hundred terms, in other orders: 2^-24 sqrt(100) / 2 = 3e-7 of a typical value. Some 60 operators
// one after the other, in random directions, make that 2.3e-6; twice as much is allowed, and ten times more for the largest of thousands.
// bfloat16: the device rounds every activation to 8 bits (2^-9 = 0.2 % in the rms), the CPU only the inputs of products. The same 60
// roundings in random directions are 1.5 %, and a recurrent state and a softmax carry them on; twice that, and six times for the largest.
Tolerance ToleranceOf(DType dtype) { return dtype == DType::kFloat32 ? Tolerance{5e-6, 5e-5} : Tolerance{0.03, 0.2}; }

void ExpectClose(const Matrix& actual, const Matrix& expected, Tolerance tolerance, const std::string& what) {
  ASSERT_EQ(actual.rows, expected.rows) << what;
  ASSERT_EQ(actual.cols, expected.cols) << what;
  double squares = 0, error_squares = 0, largest = 0;
  for (size_t i = 0; i < expected.values.size(); ++i) {
    ASSERT_TRUE(std::isfinite(expected.values[i])) << what;
    ASSERT_TRUE(std::isfinite(actual.values[i])) << what << ": row " << i / static_cast<size_t>(expected.cols);
    const double error = std::fabs(double{actual.values[i]} - double{expected.values[i]});
    squares += double{expected.values[i]} * double{expected.values[i]};
    error_squares += error * error;
    largest = std::max(largest, error);
  }
  const double scale = std::sqrt(squares / static_cast<double>(expected.values.size()));
  EXPECT_LE(std::sqrt(error_squares / static_cast<double>(expected.values.size())), tolerance.rms * scale) << what;
  EXPECT_LE(largest, tolerance.largest * scale) << what;
}

class CudaModelTest : public testing::TestWithParam<std::tuple<std::string, DType>> {
 protected:
  void SetUp() override {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) GTEST_SKIP() << "this machine has no CUDA device";
    stream_ = std::make_unique<cuda::Stream>(cuda::StreamOptions{.workspace_bytes = 32 << 20});
    ASSERT_TRUE(stream_->ok()) << stream_->error();
    memory_ = MakeCudaMemory(stream_.get());
    ops_ = MakeCudaOps(stream_.get());
    ThreadPool pool(2);
    weights_ = *MakeDummyWeights(config_, dtype_, 7, pool, MakeHostMemory().get());
    device_weights_ = *MakeDummyWeights(config_, dtype_, 7, pool, memory_.get());
    std::mt19937 random(20240601);
    for (int i = 0; i < 300; ++i) tokens_.push_back(static_cast<uint32_t>(random() % static_cast<uint32_t>(config_.vocab_size)));
  }

  HarnessOptions Options() const {
    HarnessOptions options;
    options.kv_dtype = dtype_;
    options.page_tokens = 16;
    options.num_pages = 64;
    options.max_rows = 128;
    return options;
  }
  Results OnDevice(const HarnessOptions& options) {
    ModelHarness harness(config_, device_weights_.get(), options, dtype_, memory_.get(), ops_.get());
    Results results = RunScenario(harness, tokens_);
    EXPECT_TRUE(stream_->ok()) << stream_->error();
    return results;
  }
  void ExpectAllClose(const Results& actual, const Results& expected) {
    ASSERT_EQ(actual.names, expected.names);
    for (size_t i = 0; i < expected.names.size(); ++i) {
      ExpectClose(actual.matrices[i], expected.matrices[i], ToleranceOf(dtype_), expected.names[i]);
    }
  }

  const ModelConfig config_ = DeviceConfig(std::get<0>(GetParam()));
  const DType dtype_ = std::get<1>(GetParam());
  std::unique_ptr<cuda::Stream> stream_;
  std::unique_ptr<DeviceMemory> memory_;
  std::unique_ptr<Ops> ops_;
  std::unique_ptr<ModelWeights> weights_, device_weights_;
  Tokens tokens_;
};

TEST_P(CudaModelTest, AgreesWithTheCpu) {
  ModelHarness cpu(config_, weights_.get(), Options());
  const Results expected = RunScenario(cpu, tokens_);
  ExpectAllClose(OnDevice(Options()), expected);
}

TEST_P(CudaModelTest, PaddingChangesNothing) {
  HarnessOptions options = Options();
  const Results expected = OnDevice(options);
  options.num_padding_rows = 13;
  options.num_padding_sequences = 3;
  options.seed = 5;  // other pages and slots: nobody depends on where a sequence lies
  ExpectAllClose(OnDevice(options), expected);
}

INSTANTIATE_TEST_SUITE_P(Networks, CudaModelTest,
                         testing::Combine(testing::Values("LFL", "FF"), testing::Values(DType::kFloat32, DType::kBFloat16)),
                         [](const auto& info) { return std::get<0>(info.param) + "_" + DTypeName(std::get<1>(info.param)); });

}  // namespace
}  // namespace bebop
