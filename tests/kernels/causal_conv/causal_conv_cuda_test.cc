// SPDX-License-Identifier: Apache-2.0
#include "kernels/causal_conv/causal_conv.h"
#include "tests/kernels/cuda_test_util.h"

namespace bebop {
namespace {

using testing::CudaTest;
using testing::DeviceArray;
using testing::DeviceBatchCopy;
using testing::DeviceLinearState;
using testing::DeviceMatrix;
using testing::kNan;
using testing::kUnit;
using testing::OwnedBatch;
using testing::OwnedLinearState;
using testing::Random;
using testing::RoundToBFloat16;
using testing::SameBits;

struct Shape {
  int32_t key_heads, value_heads, key_dim, value_dim, width, window;
  int64_t gap;  // between rows of x and y
};

std::vector<float> Stored(std::vector<float> values, DType dtype) {
  return dtype == DType::kFloat32 ? values : RoundToBFloat16(std::move(values));
}

// A layer's convolution with its state on the device.
class Layer {
 public:
  Layer(const Shape& shape, int32_t num_slots, DType dtype, Random& random)
      : host(num_slots, shape.window, shape.key_heads, shape.value_heads, shape.key_dim, shape.value_dim, shape.width),
        channels(host.view.conv_channels()),
        weight(random.Normals(int64_t{channels} * shape.width, 0.5f)),
        shape_(shape),
        dtype_(dtype) {}

  // A state that an earlier pass may have left: every row of the slot.
  void FillSlot(int32_t slot, Random& random) {
    const std::vector<float> values = Stored(random.Normals(host.ConvSize()), dtype_);
    std::copy(values.begin(), values.end(), host.conv_inputs.begin() + slot * host.ConvSize());
  }
  // Runs `batch` on the device; the slots go there and back through `host`. Returns y [T, C]; rows that nobody writes are NaN.
  std::vector<float> Run(const OwnedBatch& batch, const std::vector<float>& x, cuda::Stream& stream) {
    const int64_t rows = batch.num_rows();
    const DeviceMatrix device_x(x, rows, channels, dtype_, shape_.gap), device_y(rows, channels, dtype_, shape_.gap);
    const DeviceArray<float> device_weight(weight);
    const DeviceBatchCopy device_batch(batch);
    const DeviceLinearState state(host, dtype_);
    const std::vector<float> matrix = host.matrix, window_k = host.window_k, window_gate = host.window_gate;
    cuda::CausalConv({device_batch.View(), device_x.View(), device_weight.data(), state.View(), device_y.View()}, stream);
    BEBOP_CUDA_TRY(stream, cudaStreamSynchronize(stream.handle()));
    state.Download(&host);
    EXPECT_TRUE(device_y.GapsUntouched() && device_x.GapsUntouched());
    EXPECT_TRUE(SameBits(matrix, host.matrix) && SameBits(window_k, host.window_k) && SameBits(window_gate, host.window_gate));
    return device_y.Values();
  }

  OwnedLinearState host;
  const int32_t channels;
  const std::vector<float> weight;

 private:
  const Shape shape_;
  const DType dtype_;
};

class CausalConvCudaTest : public CudaTest {};

// One batch of everything: prompts beyond the head's rows, decode steps in place and into other slots, two children of one
// parent, drafts alone, fewer known rows than taps, padded sequences. The CPU runs the same; what a device may not touch keeps
// its bits.
TEST_F(CausalConvCudaTest, AgreesWithTheCpu) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const Shape& shape :
         {Shape{2, 4, 16, 20, 4, 8, 8}, Shape{1, 3, 13, 11, 4, 5, 3}, Shape{1, 2, 8, 16, 1, 4, 8}, Shape{2, 2, 8, 24, 2, 3, 8},
          Shape{1, 1, 16, 8, 3, 8, 8}, Shape{1, 2, 8, 12, 8, 8, 8}, Shape{4, 8, 32, 40, 4, 3, 8}}) {
      constexpr int32_t kNumSlots = 12;
      Random random(static_cast<uint64_t>(shape.width * 100 + shape.key_dim));
      Layer layer(shape, kNumSlots, dtype, random);
      for (const int32_t slot : {1, 2, 3, 4, 5}) layer.FillSlot(slot, random);
      OwnedBatch batch;
      const int32_t window = shape.window;
      batch.Add({.num_rows = 45, .num_known_rows = 45, .state_src = -1, .state_dst = 0});
      batch.Add({.num_rows = 1 + window, .num_known_rows = 1, .num_replay_rows = window, .state_src = 1, .state_dst = 1});
      batch.Add({.num_rows = 0});
      batch.Add({.num_rows = 1, .num_known_rows = 1, .num_replay_rows = 0, .state_src = 2, .state_dst = 2});
      batch.Add({.num_rows = 2 + window / 2, .num_known_rows = 2, .num_replay_rows = 1, .state_src = 3, .state_dst = 6});
      batch.Add({.num_rows = 3, .num_known_rows = 3, .num_replay_rows = 2, .state_src = 3, .state_dst = 7});
      batch.Add({.num_rows = window, .num_known_rows = 0, .num_replay_rows = 3, .state_src = 4, .state_dst = 4});
      batch.Add({.num_rows = 17 + window, .num_known_rows = 17, .num_replay_rows = 2, .state_src = 5, .state_dst = 8});
      batch.Add({.num_rows = 0});
      batch.Add({.num_rows = 16, .num_known_rows = 14, .state_src = -1, .state_dst = 9});
      batch.Add({.num_rows = 70, .num_known_rows = 70, .state_src = -1, .state_dst = 10});
      // Padded rows lie behind the others.
      for (int i = 0; i < 3; ++i) batch.row_sequence.push_back(-1), batch.row_position.push_back(0);
      const int32_t rows = batch.num_rows(), channels = layer.channels;
      const std::vector<float> x = Stored(random.Normals(int64_t{rows} * channels), dtype);

      OwnedLinearState expected_state(kNumSlots, window, shape.key_heads, shape.value_heads, shape.key_dim, shape.value_dim,
                                      shape.width);
      expected_state.conv_inputs = layer.host.conv_inputs;
      expected_state.view.conv_inputs = expected_state.conv_inputs.data();
      OwnedBatch cpu_batch = batch;
      std::erase_if(cpu_batch.sequences, [](const SequenceRows& sequence) { return sequence.num_rows == 0; });
      std::vector<float> cpu_x = x, expected(x.size(), kNan);
      ThreadPool pool(2);
      cpu::CausalConv({cpu_batch.View(), FloatMatrix(cpu_x.data(), rows, channels), layer.weight.data(), expected_state.view,
                       FloatMatrix(expected.data(), rows, channels)},
                      pool);
      std::vector<float> magnitudes(x.size());  // Σ |weight x| <= Σ |weight| max |x|
      for (int32_t c = 0; c < channels; ++c) {
        float sum = 0;
        for (int32_t j = 0; j < shape.width; ++j) sum += std::fabs(layer.weight[c * shape.width + j]);
        for (int32_t t = 0; t < rows; ++t) magnitudes[t * channels + c] = sum * 3.5f;  // of Random::Normal
      }

      const std::vector<float> y = layer.Run(batch, x, stream());
      for (int32_t t = 0; t < rows; ++t) {
        for (int32_t c = 0; c < channels; ++c) {
          const size_t i = static_cast<size_t>(t * channels + c);
          if (batch.row_sequence[t] < 0) {
            ASSERT_TRUE(std::isnan(y[i]));
            continue;
          }
          // Both sum `width` products and take a SiLU of slope 1.1 at most and 8 ulp; the device rounds to its type.
          const double tolerance = 2 * 1.1 * (shape.width + 1) * kUnit * magnitudes[i] + 16 * kUnit * std::fabs(expected[i]) +
                                   (dtype == DType::kBFloat16 ? 0x1.0p-8 * std::fabs(expected[i]) : 0.0);
          ASSERT_NEAR(y[i], expected[i], tolerance)
              << DTypeName(dtype) << " width " << shape.width << " row " << t << " channel " << c;
        }
      }
      EXPECT_TRUE(SameBits(layer.host.conv_inputs, expected_state.conv_inputs)) << DTypeName(dtype) << " width " << shape.width;
    }
  }
}

// A row has the same bits whether it comes alone, as a draft, or far down a prompt.
TEST_F(CausalConvCudaTest, RowsDoNotDependOnTheirPass) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    const Shape shape = {1, 2, 16, 20, 4, 8, 8};
    constexpr int32_t kNumRows = 90;
    Random random(7);
    Layer layer(shape, 2, dtype, random);
    const int32_t channels = layer.channels;
    const std::vector<float> x = Stored(random.Normals(int64_t{kNumRows} * channels), dtype);
    OwnedBatch prompt;
    prompt.Add({.num_rows = kNumRows, .num_known_rows = kNumRows, .state_src = -1, .state_dst = 0});
    const std::vector<float> expected = layer.Run(prompt, x, stream());
    int32_t computed = 0, replay = 0;
    while (computed < kNumRows) {
      const int32_t known = std::min(random.Below(3), kNumRows - computed);
      const int32_t drafts = std::max(known == 0 ? 1 : 0, random.Below(shape.window + 1));
      const int32_t accepted = std::min(random.Below(drafts + 1), kNumRows - computed - known);
      std::vector<float> part = Stored(random.Normals(int64_t{known + drafts} * channels), dtype);
      std::copy_n(x.begin() + computed * channels, (known + accepted) * channels, part.begin());
      OwnedBatch batch;
      batch.Add({.num_rows = known + drafts,
                 .num_known_rows = known,
                 .num_replay_rows = replay,
                 .state_src = computed == 0 && replay == 0 ? -1 : 1,
                 .state_dst = 1});
      const std::vector<float> y = layer.Run(batch, part, stream());
      ASSERT_TRUE(SameBits(y.data(), &expected[computed * channels], int64_t{known + accepted} * channels)) << "row " << computed;
      computed += known + accepted;
      replay = accepted;
    }
  }
}

TEST_F(CausalConvCudaTest, NansStayInTheirSequence) {
  const Shape shape = {1, 2, 16, 20, 4, 4, 8};
  Random random(8);
  Layer layer(shape, 2, DType::kBFloat16, random);
  const int32_t channels = layer.channels;
  std::vector<float> x = Stored(random.Normals(int64_t{2} * 40 * channels), DType::kBFloat16);
  OwnedBatch batch;
  for (int32_t s = 0; s < 2; ++s) batch.Add({.num_rows = 40, .num_known_rows = 38, .state_src = -1, .state_dst = s});
  const std::vector<float> clean = layer.Run(batch, x, stream());
  const std::vector<float> slot = layer.host.Slot(1);
  for (int32_t i = 37 * channels; i < 40 * channels; ++i) x[static_cast<size_t>(i)] = kNan;
  const std::vector<float> y = layer.Run(batch, x, stream());
  EXPECT_TRUE(SameBits(&y[40 * channels], &clean[40 * channels], int64_t{40} * channels));
  EXPECT_TRUE(SameBits(layer.host.Slot(1), slot));
  EXPECT_TRUE(SameBits(y.data(), clean.data(), int64_t{37} * channels));
  for (int32_t i = 37 * channels; i < 40 * channels; ++i) ASSERT_TRUE(std::isnan(y[static_cast<size_t>(i)]));
}

}  // namespace
}  // namespace bebop
