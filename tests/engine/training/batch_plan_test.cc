// SPDX-License-Identifier: Apache-2.0
#include "engine/training/batch_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <tuple>

#include "engine/training/logit_truncation.h"
#include "tests/kernels/kernel_test_util.h"

namespace bebop {
namespace {

using testing::Random;

using Term = std::tuple<int64_t, int32_t, int64_t, uint32_t>;  // row of the base, step, row of the target, token predicted

// All terms of a batch, as the header defines them.
std::set<Term> Terms(const std::vector<TrainingDocument>& documents, DraftLoss loss, int32_t num_steps) {
  std::set<Term> out;
  int64_t first_row = 0;
  for (const TrainingDocument& document : documents) {
    const auto n = static_cast<int32_t>(document.token_ids.size());
    for (int32_t t = 0; t < n; ++t) {
      for (int32_t k = 1; k <= num_steps; ++k) {
        bool counts = t + k < n && t + k + 1 >= document.loss_start;
        if (loss == DraftLoss::kCrossEntropy) counts = counts && t + k + 1 < n;
        if (loss == DraftLoss::kEndToEndTotalVariation) counts = t + num_steps < n && t + 2 >= document.loss_start;
        const uint32_t token = t + k + 1 < n ? document.token_ids[static_cast<size_t>(t + k + 1)] : 0;
        if (counts) out.insert({first_row + t, k, first_row + t + k, token});
      }
    }
    first_row += n;
  }
  return out;
}

TEST(BatchPlanTest, HasEveryTermOnceInChunksOfTheAskedSize) {
  Random random(3);
  BatchPlan plan;  // used again and again
  for (int round = 0; round < 200; ++round) {
    const int32_t num_steps = 1 + random.Below(8);
    const auto loss = static_cast<DraftLoss>(random.Below(6));
    const int64_t logit_rows = 2 * num_steps + random.Below(80);
    std::vector<TrainingDocument> documents(static_cast<size_t>(1 + random.Below(6)));
    std::vector<const TrainingDocument*> pointers;
    for (TrainingDocument& document : documents) {
      document.token_ids.resize(static_cast<size_t>(1 + random.Below(60)));
      for (uint32_t& id : document.token_ids) id = static_cast<uint32_t>(1 + random.Below(1000));
      document.loss_start = random.Below(static_cast<int32_t>(document.token_ids.size()));
      pointers.push_back(&document);
    }
    PlanBatch(pointers, loss, num_steps, logit_rows, &plan);

    for (const TrainingDocument& document : documents) {
      EXPECT_EQ(AnythingCounts(document, loss, num_steps), !Terms({document}, loss, num_steps).empty());
    }
    std::set<Term> terms;
    std::vector<int64_t> step_rows(static_cast<size_t>(num_steps), 0);
    int64_t chains = 0, first_base = 0, first_run = 0, last_row = -1;
    for (const LogitChunk& chunk : plan.chunks) {
      ASSERT_LE(chunk.num_targets + num_steps * chunk.num_bases, logit_rows);
      ASSERT_EQ(chunk.first_base, first_base);
      ASSERT_EQ(chunk.first_run, first_run);
      std::vector<int64_t> bases, targets;  // rows of the batch
      for (int64_t r = chunk.first_run; r < chunk.first_run + chunk.num_runs; ++r) {
        const BaseRun& run = plan.runs[static_cast<size_t>(r)];
        const DocumentRows& document = plan.documents[static_cast<size_t>(run.document)];
        ASSERT_GE(run.first_row, document.first_row);
        ASSERT_LE(run.first_target + run.num_targets, document.first_row + document.num_rows);
        ASSERT_GT(run.num_bases, 0);
        for (int64_t i = 0; i < run.num_bases; ++i) bases.push_back(run.first_row + i);
        for (int64_t i = 0; i < run.num_targets; ++i) targets.push_back(run.first_target + i);
      }
      ASSERT_EQ(static_cast<int64_t>(bases.size()), chunk.num_bases);
      ASSERT_EQ(static_cast<int64_t>(targets.size()), chunk.num_targets);
      for (const int64_t row : bases) {
        ASSERT_GT(row, last_row);  // ascending: the order of the sums
        last_row = row;
      }
      for (int32_t k = 1; k <= num_steps; ++k) {
        for (int64_t i = 0; i < chunk.num_bases; ++i) {
          const auto at = static_cast<size_t>(num_steps * chunk.first_base + (k - 1) * chunk.num_bases + i);
          if (plan.target_rows[at] < 0) continue;
          ASSERT_LE(k, plan.steps[static_cast<size_t>(chunk.first_base + i)]);
          const bool once = terms
                                .insert({bases[static_cast<size_t>(i)], k, targets.at(static_cast<size_t>(plan.target_rows[at])),
                                         plan.data_tokens[at]})
                                .second;
          ASSERT_TRUE(once);
          ++step_rows[static_cast<size_t>(k - 1)];
          chains += k == num_steps ? 1 : 0;
        }
      }
      first_base += chunk.num_bases;
      first_run += chunk.num_runs;
    }
    EXPECT_EQ(terms, Terms(documents, loss, num_steps)) << "round " << round;
    EXPECT_EQ(plan.step_rows, step_rows);
    EXPECT_EQ(plan.terms, loss == DraftLoss::kEndToEndTotalVariation ? chains : static_cast<int64_t>(terms.size()));

    for (int32_t k = 1; k <= num_steps; ++k) {
      for (size_t d = 0; d < documents.size(); ++d) {
        for (int64_t t = 0; t < plan.documents[d].num_rows; ++t) {
          const auto at = static_cast<size_t>((k - 1) * plan.num_rows + plan.documents[d].first_row + t);
          ASSERT_EQ(plan.row_position[at], t + k);
          const bool inside = t + k < plan.documents[d].num_rows;  // elsewhere any valid id
          ASSERT_EQ(plan.token_ids[at], inside ? documents[d].token_ids[static_cast<size_t>(t + k)] : 0u);
        }
      }
    }
  }
}

TEST(LogitTruncationTest, KeepsTheLargestAndTheirTiesInBothSides) {
  std::vector<float> target = {1, 5, 3, 3, -2,  //
                               0, 0, 0, 0, 9};
  std::vector<float> draft = {10, 20, 30, 40, 50,  //
                              10, 20, 30, 40, 50,  //
                              10, 20, 30, 40, 50};
  const int32_t target_rows[] = {1, -1, 0};
  TruncateLogits(2, FloatMatrix(target.data(), 2, 5), target_rows, FloatMatrix(draft.data(), 3, 5));
  constexpr float kCut = -1e30f;
  EXPECT_EQ(target, (std::vector<float>{kCut, 5, 3, 3, kCut, 0, 0, 0, 0, 9}));
  EXPECT_EQ(draft, (std::vector<float>{10, 20, 30, 40, 50, 10, 20, 30, 40, 50, kCut, 20, 30, 40, kCut}));
  TruncateLogits(1, FloatMatrix(target.data(), 2, 5), target_rows, FloatMatrix(draft.data(), 3, 5));
  EXPECT_EQ(target, (std::vector<float>{kCut, 5, kCut, kCut, kCut, kCut, kCut, kCut, kCut, 9}));
  EXPECT_EQ(draft, (std::vector<float>{kCut, kCut, kCut, kCut, 50, 10, 20, 30, 40, 50, kCut, 20, kCut, kCut, kCut}));
}

TEST(LogitTruncationTest, TheWholeVocabularyIsNoTruncation) {
  std::vector<float> target = {1, 5, 3}, draft = {3, 2, 1};
  const int32_t target_rows[] = {0};
  TruncateLogits(3, FloatMatrix(target.data(), 1, 3), target_rows, FloatMatrix(draft.data(), 1, 3));
  EXPECT_EQ(target, (std::vector<float>{1, 5, 3}));
  EXPECT_EQ(draft, (std::vector<float>{3, 2, 1}));
}

}  // namespace
}  // namespace bebop
