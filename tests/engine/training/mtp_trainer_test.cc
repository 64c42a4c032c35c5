// SPDX-License-Identifier: Apache-2.0
#include "engine/training/mtp_trainer.h"

#include <gtest/gtest.h>

#include <cstdio>

#include "tests/engine/training/training_test_util.h"
#include "tests/kernels/kernel_test_util.h"

namespace bebop {
namespace {

using testing::Random;
using testing::TrainerHarness;

constexpr char kTinyModel[] = "tests/models/bebop-tiny";

struct Documents {
  std::vector<TrainingDocument> documents;
  std::vector<const TrainingDocument*> pointers;
  void Add(std::vector<uint32_t> ids, int32_t loss_start) {
    documents.push_back({std::move(ids), loss_start, static_cast<int64_t>(documents.size()) + 1, 0});
    pointers.clear();
    for (const TrainingDocument& document : documents) pointers.push_back(&document);
  }
};

TEST(MtpTrainerTest, TrainsTheBundledModel) {
  TrainerHarness harness(kTinyModel, DType::kBFloat16, 2);
  TrainerOptions options;
  options.optimizer.learning_rate = 1e-3;
  auto trainer = harness.Make(options);
  ASSERT_TRUE(trainer.ok()) << trainer.status();
  Random random(5);
  Documents batch;
  for (const int length : {300, 64, 500, 9}) {
    std::vector<uint32_t> ids;
    for (int i = 0; i < length; ++i) ids.push_back(static_cast<uint32_t>(random.Below(200)));
    batch.Add(ids, length / 4);
  }
  for (int step = 0; step < 12; ++step) {
    const auto report = (*trainer)->Step(batch.pointers);
    ASSERT_TRUE(report.ok()) << report.status();
    std::printf("step %ld loss %.5f alpha %.4f %.4f %.4f Hp %.3f Hq %.3f kl %.4f norm %.4f lr %g tokens %ld terms %ld rows %ld s %.3f gf %.2f\n", report->step, report->loss,
                report->acceptance[0], report->acceptance[1], report->acceptance[4], report->target_entropy, report->draft_entropy, report->kl, report->gradient_norm,
                report->learning_rate, report->tokens, report->terms, report->rows[0], report->seconds, report->gemm_flops * 1e-9);
  }
}

}  // namespace
}  // namespace bebop
