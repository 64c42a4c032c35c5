// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "kernels/draft_losses/draft_losses.h"
#include "kernels/draft_losses/draft_losses_reference.h"
#include "tests/kernels/cuda_test_util.h"

namespace bebop {
namespace {

using testing::CudaTest;
using testing::DeviceArray;
using testing::DeviceMatrix;
using testing::kNan;
using testing::kUnit;
using testing::Random;
using testing::RoundToBFloat16;

constexpr DraftLoss kLosses[] = {DraftLoss::kCrossEntropy,   DraftLoss::kKl,
                                 DraftLoss::kReverseKl,      DraftLoss::kTotalVariation,
                                 DraftLoss::kEndToEndTotalVariation, DraftLoss::kLk};

template <typename T>
std::unique_ptr<DeviceArray<T>> ToDevice(const std::vector<T>& values) {
  auto out = std::make_unique<DeviceArray<T>>(static_cast<int64_t>(values.size()));
  out->Upload(values);
  return out;
}

class DraftLossesCudaTest : public CudaTest {};

// Two chains of two steps over three target rows, one of them masked, in both dtypes, against double.
TEST_F(DraftLossesCudaTest, AgreesWithTheReference) {
  // logit - max is rounded once (values mostly within 40), expf is 2 ulp at most, and each probability is rounded once more.
  constexpr double kProbability = (40 + 6) * kUnit, kNearTie = 2 * kProbability;
  constexpr int32_t kBases = 2, kSteps = 2, kRows = kBases * kSteps, kTargets = 3;
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const int32_t vocab : {8, 16, 4096, 4104, 10000}) {  // a block takes 4096 a turn
      Random random(static_cast<uint64_t>(vocab));
      std::vector<float> target = random.Normals(kTargets * vocab, 3.0f), draft = random.Normals(kRows * vocab, 1.0f);
      for (int32_t i = 0; i < kRows * vocab; ++i) draft[i] += target[i % (kTargets * vocab)];
      std::copy_n(target.begin(), vocab, draft.begin() + 3 * vocab);  // row 3 ties with its target everywhere: S = 1
      if (dtype == DType::kBFloat16) target = RoundToBFloat16(target), draft = RoundToBFloat16(draft);
      const std::vector<int32_t> target_rows = {1, -1, 2, 0}, steps = {2, 1};
      const std::vector<uint32_t> tokens = {3, 4000000000u, static_cast<uint32_t>(vocab - 1), 0};
      for (const DraftLoss loss : kLosses) {
        DeviceMatrix targets(target, kTargets, vocab, dtype), drafts(draft, kRows, vocab, dtype), elsewhere(kRows, vocab, dtype);
        DeviceArray<LogitNormalizer> normalizers(kTargets);
        DeviceArray<DraftLossRow> rows(kRows);
        DeviceArray<double> weights(kRows);
        DeviceArray<ChainLossResult> result(1);
        const auto device_target_rows = ToDevice(target_rows), device_steps = ToDevice(steps);
        const auto device_tokens = ToDevice(tokens);
        cuda::Normalize(targets.View(), normalizers.data(), stream());
        const DraftLossArgs args = {loss,
                                    drafts.View(),
                                    targets.View(),
                                    normalizers.data(),
                                    device_target_rows->data(),
                                    device_tokens->data(),
                                    rows.data()};
        cuda::DraftLossForward(args, stream());
        // Base 1 has its first step masked: as e2e it has no whole chain. Its second step stands behind one that does not count.
        const bool chained = loss == DraftLoss::kEndToEndTotalVariation;
        const std::vector<int32_t> counted = chained ? std::vector<int32_t>{2, 0} : steps;
        const auto device_counted = ToDevice(counted);
        ChainLossArgs chain = {loss, kBases, kSteps, rows.data(), device_counted->data(), 0.25, weights.data()};
        cuda::ChainLoss(chain, result.data(), stream());
        cuda::DraftLossBackward({args, weights.data(), elsewhere.View()}, stream());
        cuda::DraftLossBackward({args, weights.data(), drafts.View()}, stream());

        // The chains on the host, from the device's rows: the same to the bit but for the order of two additions.
        std::vector<DraftLossRow> actual_rows = rows.Download();
        std::vector<double> host_weights(kRows);
        chain.rows = actual_rows.data(), chain.steps = counted.data(), chain.row_weights = host_weights.data();
        const ChainLossResult expected_result = ChainLoss(chain);
        EXPECT_NEAR(result.Download()[0].loss, expected_result.loss, 1e-15 * (1 + std::fabs(expected_result.loss)));
        EXPECT_TRUE(result.Download()[0].finite && expected_result.finite);
        for (int32_t i = 0; i < kRows; ++i) EXPECT_NEAR(weights.Download()[i], host_weights[i], 1e-15);

        const std::vector<float> gradient = elsewhere.Values();
        EXPECT_TRUE(testing::SameBits(gradient, drafts.Values())) << "the gradient may replace the logits";
        EXPECT_TRUE(drafts.GapsUntouched() && targets.GapsUntouched() && elsewhere.GapsUntouched());
        EXPECT_TRUE(rows.GuardsUntouched() && weights.GuardsUntouched());
        EXPECT_TRUE(normalizers.GuardsUntouched() && result.GuardsUntouched());
        int nonzero = 0;
        for (int32_t r = 0; r < kRows; ++r) {
          const DraftLossRow& actual = actual_rows[r];
          EXPECT_TRUE(actual.finite);
          const float* const row_gradient = gradient.data() + int64_t{r} * vocab;
          if (target_rows[r] < 0) {
            EXPECT_EQ(actual.loss, 0.0);
            EXPECT_TRUE(std::all_of(row_gradient, row_gradient + vocab, [](float value) { return value == 0.0f; }));
            continue;
          }
          const std::vector<double> z(draft.begin() + r * vocab, draft.begin() + (r + 1) * vocab);
          const std::vector<double> y(target.begin() + target_rows[r] * vocab, target.begin() + (target_rows[r] + 1) * vocab);
          const DraftLossRow expected = reference::DraftLossForward(loss, z, y, tokens[r]);
          std::vector<double> expected_gradient(z.size());
          reference::DraftLossBackward(loss, z, y, tokens[r], host_weights[r], expected_gradient);
          const auto near = [&](double a, double b) { EXPECT_NEAR(a, b, 3 * kProbability * (1 + std::fabs(b))) << vocab; };
          near(actual.loss, expected.loss);
          near(actual.acceptance, expected.acceptance);
          near(actual.covered_mass, expected.covered_mass);
          near(actual.kl, expected.kl);
          near(actual.reverse_kl, expected.reverse_kl);
          near(actual.target_entropy, expected.target_entropy);
          near(actual.draft_entropy, expected.draft_entropy);
          const auto log_sum_exp = [](const std::vector<double>& logits) {
            double sum = 0.0;
            for (const double logit : logits) sum += std::exp(logit);
            return std::log(sum);
          };
          const double draft_lse = log_sum_exp(z), target_lse = log_sum_exp(y);
          const bool overlaps = loss == DraftLoss::kTotalVariation || chained || loss == DraftLoss::kLk;
          double near_tie_mass = 0.0;
          for (int32_t v = 0; overlaps && v < vocab; ++v) {
            if (std::fabs((z[v] - draft_lse) - (y[v] - target_lse)) < kNearTie) near_tie_mass += std::exp(z[v] - draft_lse);
          }
          const double weight = host_weights[r] / (loss == DraftLoss::kLk ? expected.acceptance : 1.0);
          for (int32_t v = 0; v < vocab; ++v) {
            const double log_draft = z[v] - draft_lse, log_target = y[v] - target_lse, ratio = std::fabs(log_draft - log_target);
            double tolerance = 3 * kProbability * weight * (std::exp(log_draft) + std::exp(log_target)) * (1 + ratio) + 1e-37;
            if (loss == DraftLoss::kCrossEntropy) tolerance += weight * kUnit;
            if (overlaps) tolerance += weight * std::exp(log_draft) * ((ratio < kNearTie ? 1.0 : 0.0) + near_tie_mass);
            if (dtype == DType::kBFloat16) tolerance += 0x1.01p-8 * std::fabs(expected_gradient[v]);
            ASSERT_NEAR(row_gradient[v], expected_gradient[v], tolerance)
                << DTypeName(dtype) << " " << vocab << " loss " << static_cast<int>(loss) << " row " << r << " id " << v;
            nonzero += row_gradient[v] != 0.0f;
          }
        }
        EXPECT_GT(nonzero, vocab / 2);
      }
    }
  }
}

TEST_F(DraftLossesCudaTest, BrokenLogitsShow) {
  constexpr int32_t kVocab = 4104;
  Random random(5);
  const std::vector<float> good = random.Normals(kVocab);
  const float infinity = std::numeric_limits<float>::infinity();
  for (const float broken : {kNan, infinity, -infinity, 2e29f, 0.0f}) {
    for (const size_t at : {size_t{0}, size_t{4103}}) {
      std::vector<float> bad = good;
      bad[at] = broken;
      for (const bool draft_is_bad : {false, true}) {
        DeviceMatrix targets(draft_is_bad ? good : bad, 1, kVocab, DType::kFloat32);
        DeviceMatrix drafts(draft_is_bad ? bad : good, 1, kVocab, DType::kFloat32);
        DeviceArray<LogitNormalizer> normalizers(1);
        DeviceArray<DraftLossRow> rows(1);
        DeviceArray<double> weights(1);
        DeviceArray<ChainLossResult> result(1);
        const auto zero = ToDevice<int32_t>({0}), one = ToDevice<int32_t>({1});
        cuda::Normalize(targets.View(), normalizers.data(), stream());
        cuda::DraftLossForward(
            {DraftLoss::kKl, drafts.View(), targets.View(), normalizers.data(), zero->data(), nullptr, rows.data()}, stream());
        cuda::ChainLoss({DraftLoss::kKl, 1, 1, rows.data(), one->data(), 1.0, weights.data()}, result.data(), stream());
        EXPECT_EQ(rows.Download()[0].finite, broken == 0.0f) << broken;
        EXPECT_EQ(result.Download()[0].finite, broken == 0.0f) << broken;
      }
    }
  }
}

TEST_F(DraftLossesCudaTest, NoRowsAreNoWork) {
  const TensorView empty = {nullptr, DType::kBFloat16, 0, 16, 16};
  cuda::Normalize(empty, nullptr, stream());
  const DraftLossArgs args = {DraftLoss::kKl, empty, empty, nullptr, nullptr, nullptr, nullptr};
  cuda::DraftLossForward(args, stream());
  cuda::DraftLossBackward({args, nullptr, empty}, stream());
}

}  // namespace
}  // namespace bebop
