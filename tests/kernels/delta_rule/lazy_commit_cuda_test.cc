// SPDX-License-Identifier: Apache-2.0
// lazy_commit_test on the device: the conv and the delta rule in their step form leave the bits of token-by-token decoding.
#include <tuple>

#include "kernels/causal_conv/causal_conv.h"
#include "kernels/delta_rule/delta_rule.h"
#include "tests/kernels/cuda_test_util.h"
#include "tests/kernels/delta_rule/lazy_commit_test_util.h"

namespace bebop {
namespace {

using testing::Case;
using testing::CudaTest;
using testing::DeviceArray;
using testing::DeviceBatchCopy;
using testing::DeviceLinearState;
using testing::DeviceMatrix;
using testing::kWindow;
using testing::OwnedBatch;
using testing::OwnedLinearState;
using testing::Random;
using testing::Rows;
using testing::Shape;

class Layer {
 public:
  Layer(const Shape& shape, int32_t num_slots, uint64_t seed, DType dtype, cuda::Stream& stream)
      : Layer(shape, num_slots, dtype, stream, Random(seed)) {}

  std::vector<float> Run(const OwnedBatch& batch, Rows& rows) {
    const int64_t count = batch.num_rows();
    EXPECT_EQ(count, rows.count());
    const DeviceMatrix x(rows.x, count, shape_.channels(), dtype_), y(count, shape_.channels(), dtype_),
        a(rows.a, count, shape_.value_heads, dtype_), b(rows.b, count, shape_.value_heads, dtype_),
        out(count, shape_.value_width(), dtype_);
    const DeviceBatchCopy device_batch(batch);
    cuda::CausalConv({device_batch.View(), x.View(), weight_.data(), state_.View(), y.View()}, stream_);
    cuda::DeltaRule(
        {device_batch.View(), y.View(), a.View(), b.View(), a_log_.data(), dt_bias_.data(), state_.View(), out.View()}, stream_);
    BEBOP_CUDA_TRY(stream_, cudaStreamSynchronize(stream_.handle()));
    EXPECT_TRUE(y.GapsUntouched() && out.GapsUntouched());
    return out.Values();
  }
  std::vector<float> RunOne(SequenceRows sequence, Rows& rows) {
    OwnedBatch batch;
    batch.Add(sequence);
    return Run(batch, rows);
  }
  const OwnedLinearState& State() {
    state_.Download(&host_);
    return host_;
  }

 private:
  Layer(const Shape& shape, int32_t num_slots, DType dtype, cuda::Stream& stream, Random random)
      : host_(num_slots, kWindow, shape.key_heads, shape.value_heads, shape.key_dim, shape.value_dim, shape.conv_width),
        state_(host_, dtype),
        weight_(random.Normals(int64_t{shape.channels()} * shape.conv_width, 0.5f)),
        a_log_(random.Normals(shape.value_heads)),
        dt_bias_(random.Normals(shape.value_heads)),
        shape_(shape),
        dtype_(dtype),
        stream_(stream) {}

  OwnedLinearState host_;
  DeviceLinearState state_;
  DeviceArray<float> weight_, a_log_, dt_bias_;
  const Shape shape_;
  const DType dtype_;
  cuda::Stream& stream_;
};

class LazyCommitCudaTest : public CudaTest, public ::testing::WithParamInterface<std::tuple<Case, DType>> {};

TEST_P(LazyCommitCudaTest, RandomWindowsLeaveWhatTokenByTokenDecodingLeaves) {
  const auto& [test_case, dtype] = GetParam();
  Layer reference(test_case.shape, 1, 5, dtype, stream()), layer(test_case.shape, 3, 5, dtype, stream());
  // Prompts that still take the step form.
  testing::CheckRandomWindows(reference, layer, test_case, 340, 13);
}

TEST_P(LazyCommitCudaTest, ForksLeaveTheParentAlone) {
  const auto& [test_case, dtype] = GetParam();
  Layer reference(test_case.shape, 1, 5, dtype, stream()), layer(test_case.shape, 3, 5, dtype, stream());
  testing::CheckForks(reference, layer, test_case);
}

INSTANTIATE_TEST_SUITE_P(Shapes, LazyCommitCudaTest,
                         ::testing::Combine(::testing::Values(Case{{2, 2, 16, 16, 4}, 0.0f},     // the smallest
                                                              Case{{1, 3, 24, 40, 4}, 0.0f},     // ragged, three slices a head
                                                              Case{{1, 2, 32, 48, 3}, -12.0f},   // decay near 1
                                                              Case{{1, 2, 48, 32, 2}, 12.0f},    // decay near 0
                                                              Case{{1, 2, 128, 128, 4}, 0.0f}),  // the real heads
                                            ::testing::Values(DType::kFloat32, DType::kBFloat16)));

}  // namespace
}  // namespace bebop
