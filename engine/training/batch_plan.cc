// SPDX-License-Identifier: Apache-2.0
#include "engine/training/batch_plan.h"

#include <algorithm>

#include "kernels/common/check.h"

namespace bebop {
namespace {

// The steps of base `base` that count: first .. last, none when first > last.
struct StepRange {
  int32_t first = 1;
  int32_t last = 0;
};
StepRange CountedSteps(const TrainingDocument& document, DraftLoss loss, int32_t num_steps, int32_t base) {
  const auto num_tokens = static_cast<int32_t>(document.token_ids.size());
  const int32_t last_target = loss == DraftLoss::kCrossEntropy ? num_tokens - 2 : num_tokens - 1;
  if (loss == DraftLoss::kEndToEndTotalVariation) {
    return {1, base + num_steps <= last_target && base + 2 >= document.loss_start ? num_steps : 0};
  }
  return {std::max(1, document.loss_start - base - 1), std::min(num_steps, last_target - base)};
}

class Planner {
 public:
  Planner(DraftLoss loss, int32_t num_steps, int64_t logit_rows, BatchPlan* plan)
      : loss_(loss), num_steps_(num_steps), logit_rows_(logit_rows), plan_(*plan) {}

  // The bases of a document that count are neighbours: they are cut into runs where a chunk is full.
  void AddDocument(const TrainingDocument& document, const DocumentRows& rows) {
    const auto num_tokens = static_cast<int32_t>(rows.num_rows);
    int32_t base = 0;
    const auto counts = [&](int32_t t) {
      const StepRange range = CountedSteps(document, loss_, num_steps_, t);
      return range.first <= range.last;
    };
    while (base < num_tokens && !counts(base)) ++base;
    while (base < num_tokens && counts(base)) {
      // One more base takes K drafts and a target, the first one of a run K targets.
      if (plan_.chunks.empty() || used_ + 2 * num_steps_ > logit_rows_) NewChunk();
      LogitChunk& chunk = plan_.chunks.back();
      BaseRun run = {.document = static_cast<int32_t>(plan_.documents.size()) - 1,
                     .first_row = rows.first_row + base,
                     .first_target = rows.first_row + base + 1};
      const int32_t first = base;
      int64_t used = used_;
      while (base < num_tokens && counts(base)) {
        const int64_t targets = std::min(base + num_steps_, num_tokens - 1) - first;
        if (used_ + targets + (base + 1 - first) * num_steps_ > logit_rows_) break;
        used = used_ + targets + (base + 1 - first) * num_steps_;
        run.num_targets = targets;
        ++base;
      }
      used_ = used;
      run.num_bases = base - first;
      chunk.num_bases += run.num_bases;
      chunk.num_targets += run.num_targets;
      ++chunk.num_runs;
      plan_.runs.push_back(run);
    }
  }

  // The arrays of all chunks, once their sizes are known.
  void FillArrays(std::span<const TrainingDocument* const> documents) {
    for (const LogitChunk& chunk : plan_.chunks) {
      int64_t base = chunk.first_base, first_target = 0;
      for (int64_t r = chunk.first_run; r < chunk.first_run + chunk.num_runs; ++r) {
        const BaseRun& run = plan_.runs[static_cast<size_t>(r)];
        const TrainingDocument& document = *documents[static_cast<size_t>(run.document)];
        const int64_t first = run.first_row - plan_.documents[static_cast<size_t>(run.document)].first_row;
        for (int64_t t = first; t < first + run.num_bases; ++t, ++base) {
          const StepRange range = CountedSteps(document, loss_, num_steps_, static_cast<int32_t>(t));
          plan_.steps[static_cast<size_t>(base)] = range.last;
          plan_.terms += loss_ == DraftLoss::kEndToEndTotalVariation ? 1 : range.last - range.first + 1;
          for (int32_t k = range.first; k <= range.last; ++k) {
            const auto at =
                static_cast<size_t>(num_steps_ * chunk.first_base + (k - 1) * chunk.num_bases + base - chunk.first_base);
            plan_.target_rows[at] = static_cast<int32_t>(first_target + t + k - (first + 1));
            const auto predicted = static_cast<size_t>(t + k + 1);  // read by cross-entropy alone, which has it
            plan_.data_tokens[at] = predicted < document.token_ids.size() ? document.token_ids[predicted] : 0;
            ++plan_.step_rows[static_cast<size_t>(k - 1)];
          }
        }
        first_target += run.num_targets;
      }
    }
  }

 private:
  void NewChunk() {
    LogitChunk chunk;
    chunk.first_run = static_cast<int64_t>(plan_.runs.size());
    if (!plan_.chunks.empty()) chunk.first_base = plan_.chunks.back().first_base + plan_.chunks.back().num_bases;
    plan_.chunks.push_back(chunk);
    used_ = 0;
  }

  const DraftLoss loss_;
  const int32_t num_steps_;
  const int64_t logit_rows_;
  BatchPlan& plan_;
  int64_t used_ = 0;  // rows of logits of the last chunk
};

}  // namespace

bool AnythingCounts(const TrainingDocument& document, DraftLoss loss, int32_t num_steps) {
  const auto num_tokens = static_cast<int32_t>(document.token_ids.size());
  for (int32_t base = 0; base < num_tokens; ++base) {
    const StepRange range = CountedSteps(document, loss, num_steps, base);
    if (range.first <= range.last) return true;
  }
  return false;
}

void PlanBatch(std::span<const TrainingDocument* const> documents, DraftLoss loss, int32_t num_steps, int64_t logit_rows,
               BatchPlan* plan) {
  BEBOP_CHECK(num_steps >= 1 && logit_rows >= 2 * num_steps);
  plan->num_rows = 0;
  plan->terms = 0;
  plan->documents.clear();
  plan->runs.clear();
  plan->chunks.clear();
  Planner planner(loss, num_steps, logit_rows, plan);
  for (const TrainingDocument* document : documents) {
    plan->documents.push_back({plan->num_rows, static_cast<int64_t>(document->token_ids.size())});
    plan->num_rows += plan->documents.back().num_rows;
    planner.AddDocument(*document, plan->documents.back());
  }

  const auto rows = static_cast<size_t>(plan->num_rows), count = static_cast<size_t>(num_steps);
  plan->token_ids.assign(count * rows, 0);
  plan->row_position.assign(count * rows, 0);
  for (size_t i = 0; i < documents.size(); ++i) {
    const std::vector<uint32_t>& ids = documents[i]->token_ids;
    const auto first = static_cast<size_t>(plan->documents[i].first_row);
    for (size_t k = 1; k <= count; ++k) {
      for (size_t t = 0; t < ids.size(); ++t) {
        const size_t at = (k - 1) * rows + first + t;
        if (t + k < ids.size()) plan->token_ids[at] = ids[t + k];
        plan->row_position[at] = static_cast<int32_t>(t + k);
      }
    }
  }

  const auto bases =
      static_cast<size_t>(plan->chunks.empty() ? 0 : plan->chunks.back().first_base + plan->chunks.back().num_bases);
  plan->steps.assign(bases, 0);
  plan->target_rows.assign(count * bases, -1);
  plan->data_tokens.assign(count * bases, 0);
  plan->step_rows.assign(count, 0);
  planner.FillArrays(documents);
}

}  // namespace bebop
