// SPDX-License-Identifier: Apache-2.0
//
// Weights in device memory hold what weights in host memory hold, in rows: same values, zero padding, aligned, copied in by small blocks.
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "engine/weights/checkpoint.h"
#include "engine/weights/dummy_weights.h"
#include "engine/weights/weight_layout.h"
#include "tests/support/checkpoint_writer.h"
#include "tests/support/fake_device_memory.h"

namespace bebop {
namespace {

struct Vector {
  const float* values;
  int64_t count;
};

// Every matrix and every vector of a model, in a fixed order.
struct Parts {
  std::vector<PackedMatrix> matrices;
  std::vector<Vector> vectors;

  Parts(const ModelWeights& weights, const ModelConfig& config) {
    matrices = {weights.embedding, weights.lm_head};
    for (const LayerWeights& layer : weights.layers) Add(layer, config);
    vectors.push_back({weights.final_norm, config.hidden_size});
    if (!weights.mtp.has_value()) return;
    matrices.push_back(weights.mtp->fc);
    Add(weights.mtp->layer, config);
    for (const float* values : {weights.mtp->pre_fc_norm_embedding, weights.mtp->pre_fc_norm_hidden, weights.mtp->norm}) {
      vectors.push_back({values, config.hidden_size});
    }
  }

 private:
  void Add(const LayerWeights& layer, const ModelConfig& config) {
    vectors.push_back({layer.input_norm, config.hidden_size});
    vectors.push_back({layer.post_attention_norm, config.hidden_size});
    matrices.push_back(layer.mlp.gate_up);
    matrices.push_back(layer.mlp.down);
    if (layer.full.has_value()) {
      matrices.push_back(layer.full->qkv);
      matrices.push_back(layer.full->out);
      vectors.push_back({layer.full->q_norm, config.head_dim});
      vectors.push_back({layer.full->k_norm, config.head_dim});
    } else {
      matrices.push_back(layer.linear->in);
      matrices.push_back(layer.linear->out);
      vectors.push_back({layer.linear->conv, int64_t{config.conv_channels()} * config.linear_conv_kernel_dim});
      vectors.push_back({layer.linear->a_log, config.linear_num_value_heads});
      vectors.push_back({layer.linear->dt_bias, config.linear_num_value_heads});
      vectors.push_back({layer.linear->norm, config.linear_value_head_dim});
    }
  }
};

float At(const PackedMatrix& rows, int64_t row, int64_t col) {
  const int64_t index = row * rows.cols + col;
  return rows.dtype == DType::kFloat32 ? static_cast<const float*>(rows.data)[index] : ToFloat(static_cast<const BFloat16*>(rows.data)[index]);
}

void ExpectSame(const ModelWeights& device, const ModelWeights& host, const ModelConfig& config) {
  const Parts actual(device, config), expected(host, config);
  ASSERT_EQ(actual.matrices.size(), expected.matrices.size());
  ASSERT_EQ(actual.vectors.size(), expected.vectors.size());
  for (size_t m = 0; m < expected.matrices.size(); ++m) {
    const PackedMatrix& rows = actual.matrices[m];
    const PackedMatrix& panels = expected.matrices[m];
    ASSERT_EQ(rows.layout, MatrixLayout::kRows) << m;
    ASSERT_EQ(panels.layout, MatrixLayout::kPanels) << m;
    ASSERT_EQ(rows.dtype, panels.dtype) << m;
    ASSERT_EQ(rows.rows, panels.rows) << m;  // with the rows between segments, which are zero on both sides
    ASSERT_EQ(rows.cols, panels.cols) << m;
    ASSERT_EQ(reinterpret_cast<uintptr_t>(rows.data) % 256, 0u) << m;
    std::vector<float> row(static_cast<size_t>(panels.cols));
    for (int64_t r = 0; r < panels.rows; ++r) {
      cpu::UnpackRow(panels, r, row.data());
      for (int64_t c = 0; c < panels.cols; ++c) ASSERT_EQ(At(rows, r, c), row[static_cast<size_t>(c)]) << "matrix " << m << " [" << r << ", " << c << "]";
    }
  }
  for (size_t v = 0; v < expected.vectors.size(); ++v) {
    for (int64_t i = 0; i < expected.vectors[v].count; ++i) ASSERT_EQ(actual.vectors[v].values[i], expected.vectors[v].values[i]) << "vector " << v;
  }
}

TEST(DeviceWeightsTest, DummyWeightsAreThoseOfTheHost) {
  for (const bool tied : {false, true}) {
    const ModelConfig config = ParseModelConfig(SmallConfigJson(tied)).value();
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      SCOPED_TRACE(DTypeName(dtype));
      ThreadPool pool(3);
      test::FakeDeviceMemory memory;
      const auto device = MakeDummyWeights(config, dtype, 5, pool, &memory);
      ASSERT_TRUE(device.ok()) << device.status();
      const auto host = *MakeDummyWeights(config, dtype, 5, pool, MakeHostMemory().get());
      ExpectSame(**device, *host, config);
      EXPECT_EQ((*device)->storage_bytes, WeightBytes(config, dtype, /*with_mtp=*/true, MatrixLayout::kRows));
      EXPECT_EQ(host->storage_bytes, WeightBytes(config, dtype, /*with_mtp=*/true, MatrixLayout::kPanels));
    }
  }
}

TEST(DeviceWeightsTest, CheckpointsOfEveryTypeAreThoseOfTheHost) {
  for (const std::string source : {"BF16", "F32", "F16"}) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      SCOPED_TRACE(source + " to " + DTypeName(dtype));
      const ModelConfig config = ParseModelConfig(SmallConfigJson(/*tied=*/false)).value();
      const TempDir directory;
      WriteFile(directory.path() + "/model.safetensors", SafetensorsBytes(MakeModelTensors(config, /*with_mtp=*/true, source, 3)));
      const LoadOptions options{.path = directory.path(), .mtp_path = "", .dtype = dtype};
      ThreadPool pool(3);
      test::FakeDeviceMemory memory;
      const auto device = LoadModelWeights(config, options, pool, &memory);
      ASSERT_TRUE(device.ok()) << device.status();
      const auto host = LoadModelWeights(config, options, pool, MakeHostMemory().get());
      ASSERT_TRUE(host.ok()) << host.status();
      ExpectSame(**device, **host, config);
    }
  }
}

// The model's size must not show on the host: whatever it is, blocks are of about a MiB.
TEST(DeviceWeightsTest, LargeModelsAreCopiedByBlocks) {
  ModelConfig config = ParseModelConfig(SmallConfigJson(/*tied=*/false)).value();
  config.hidden_size = 1024;
  config.vocab_size = 5000;
  ThreadPool pool(2);
  test::FakeDeviceMemory memory;
  const auto weights = MakeDummyWeights(config, DType::kFloat32, 0, pool, &memory);
  ASSERT_TRUE(weights.ok()) << weights.status();
  EXPECT_GT((*weights)->storage_bytes, 40 << 20);
  EXPECT_LE(memory.largest_copy(), 1 << 20);
  EXPECT_GT(memory.num_copies(), 40);
}

TEST(DeviceWeightsTest, AFailedDeviceIsAnError) {
  const ModelConfig config = ParseModelConfig(SmallConfigJson(/*tied=*/false)).value();
  ThreadPool pool(2);
  test::FakeDeviceMemory memory;
  memory.Fail(absl::InternalError("device error: gone"));
  EXPECT_EQ(MakeDummyWeights(config, DType::kBFloat16, 0, pool, &memory).status().code(), absl::StatusCode::kInternal);
  const TempDir directory;
  WriteFile(directory.path() + "/model.safetensors", SafetensorsBytes(MakeModelTensors(config, /*with_mtp=*/true, "F32", 3)));
  EXPECT_EQ(LoadModelWeights(config, {.path = directory.path(), .mtp_path = ""}, pool, &memory).status().code(), absl::StatusCode::kInternal);
}

}  // namespace
}  // namespace bebop
