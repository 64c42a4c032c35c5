// SPDX-License-Identifier: Apache-2.0
// Runs the draft losses over one packed batch, in double and with the float kernels, for draft_losses_test.py to compare:
//   draft_losses_dump INPUT OUTPUT
// INPUT: int32 loss, documents, T, K, V; int32 document starts [documents + 1]; int32 tokens [T]; float64 target logits [T, V]
// and draft logits [K, T, V]. OUTPUT: float64, for the double reference and then for the float kernels: loss; α [K, T]; kl,
// reverse kl, H(p), H(q) of every row [K, T, 4]; gradient [K, T, V]. Rows that do not count are zeros.
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <string>
#include <vector>

#include "kernels/common/check.h"
#include "kernels/draft_losses/draft_losses.h"
#include "kernels/draft_losses/draft_losses_reference.h"

namespace bebop {
namespace {

struct Batch {
  DraftLoss loss;
  int32_t num_rows, num_steps, vocab_size;
  std::vector<int32_t> starts, tokens, steps;
  std::vector<double> target, draft;
  double scale = 0.0;

  // Whether step k (0-based) of base t counts, its target row, and the data token there.
  bool Counts(int32_t k, int32_t t) const { return k < steps[static_cast<size_t>(t)]; }
  int32_t TargetRow(int32_t k, int32_t t) const { return t + k + 1; }
  uint32_t Token(int32_t k, int32_t t) const {
    return static_cast<uint32_t>(loss == DraftLoss::kCrossEntropy && Counts(k, t) ? tokens[static_cast<size_t>(t + k + 2)] : 0);
  }
};

template <typename T>
std::vector<T> Read(std::ifstream& in, int64_t count) {
  std::vector<T> out(static_cast<size_t>(count));
  in.read(reinterpret_cast<char*>(out.data()), static_cast<std::streamsize>(out.size() * sizeof(T)));
  BEBOP_CHECK(in.good());
  return out;
}

struct Output {
  std::ofstream file;
  void Write(double value) { file.write(reinterpret_cast<const char*>(&value), sizeof value); }
  void Write(const ChainLossResult& result, const std::vector<DraftLossRow>& rows, const std::vector<double>& gradient) {
    BEBOP_CHECK(result.finite);
    Write(result.loss);
    for (const DraftLossRow& row : rows) Write(row.acceptance);
    for (const DraftLossRow& row : rows) {
      for (const double value : {row.kl, row.reverse_kl, row.target_entropy, row.draft_entropy}) Write(value);
    }
    for (const double value : gradient) Write(value);
  }
};

void RunReference(const Batch& batch, Output* output) {
  const auto size = static_cast<size_t>(batch.vocab_size);
  std::vector<DraftLossRow> rows(static_cast<size_t>(batch.num_steps * batch.num_rows));
  std::vector<double> weights(rows.size()), gradient(rows.size() * size, 0.0);
  const auto logits = [&](int32_t k, int32_t t) {
    return std::span(batch.draft).subspan(static_cast<size_t>(k * batch.num_rows + t) * size, size);
  };
  const auto target = [&](int32_t k, int32_t t) {
    return std::span(batch.target).subspan(static_cast<size_t>(batch.TargetRow(k, t)) * size, size);
  };
  const auto for_each = [&](auto body) {
    for (int32_t k = 0; k < batch.num_steps; ++k) {
      for (int32_t t = 0; t < batch.num_rows; ++t) {
        if (batch.Counts(k, t)) body(k, t, static_cast<size_t>(k * batch.num_rows + t));
      }
    }
  };
  for_each([&](int32_t k, int32_t t, size_t i) {
    rows[i] = reference::DraftLossForward(batch.loss, logits(k, t), target(k, t), batch.Token(k, t));
  });
  const ChainLossResult result =
      ChainLoss({batch.loss, batch.num_rows, batch.num_steps, rows.data(), batch.steps.data(), batch.scale, weights.data()});
  for_each([&](int32_t k, int32_t t, size_t i) {
    reference::DraftLossBackward(batch.loss, logits(k, t), target(k, t), batch.Token(k, t), weights[i],
                                 std::span(gradient).subspan(i * size, size));
  });
  output->Write(result, rows, gradient);
}

// Step by step, in chunks of two rows, the gradient over the logits: the way of the trainer.
void RunKernels(const Batch& batch, Output* output) {
  ThreadPool pool(2);
  constexpr int32_t kChunk = 2;
  const auto num_rows = static_cast<size_t>(batch.num_rows);
  std::vector<float> target(batch.target.begin(), batch.target.end()), draft(batch.draft.begin(), batch.draft.end());
  const TensorView targets = FloatMatrix(target.data(), batch.num_rows, batch.vocab_size);
  std::vector<LogitNormalizer> normalizers(num_rows);
  cpu::Normalize(targets, normalizers.data(), pool);
  std::vector<DraftLossRow> rows(static_cast<size_t>(batch.num_steps) * num_rows);
  std::vector<double> weights(rows.size());
  const auto for_each_chunk = [&](auto body) {
    for (int32_t k = 0; k < batch.num_steps; ++k) {
      for (int32_t first = 0; first < batch.num_rows; first += kChunk) {
        const int32_t count = std::min(kChunk, batch.num_rows - first);
        int32_t target_rows[kChunk];
        uint32_t tokens[kChunk];
        for (int32_t i = 0; i < count; ++i) {
          target_rows[i] = batch.Counts(k, first + i) ? batch.TargetRow(k, first + i) : -1;
          tokens[i] = batch.Token(k, first + i);
        }
        const int64_t at = int64_t{k} * batch.num_rows + first;
        const TensorView logits = FloatMatrix(draft.data() + at * batch.vocab_size, count, batch.vocab_size);
        body(DraftLossArgs{batch.loss, logits, targets, normalizers.data(), target_rows, tokens, rows.data() + at}, at);
      }
    }
  };
  for_each_chunk([&](const DraftLossArgs& args, int64_t) { cpu::DraftLossForward(args, pool); });
  const ChainLossResult result =
      ChainLoss({batch.loss, batch.num_rows, batch.num_steps, rows.data(), batch.steps.data(), batch.scale, weights.data()});
  for_each_chunk([&](const DraftLossArgs& args, int64_t at) {
    cpu::DraftLossBackward({args, weights.data() + at, args.draft}, pool);
  });
  output->Write(result, rows, std::vector<double>(draft.begin(), draft.end()));
}

}  // namespace
}  // namespace bebop

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: draft_losses_dump INPUT OUTPUT\n");
    return 2;
  }
  std::ifstream in(argv[1], std::ios::binary);
  const std::vector<int32_t> head = bebop::Read<int32_t>(in, 5);
  bebop::Batch batch{};
  batch.loss = static_cast<bebop::DraftLoss>(head[0]);
  batch.num_rows = head[2], batch.num_steps = head[3], batch.vocab_size = head[4];
  batch.starts = bebop::Read<int32_t>(in, head[1] + 1);
  batch.tokens = bebop::Read<int32_t>(in, batch.num_rows);
  batch.target = bebop::Read<double>(in, int64_t{batch.num_rows} * batch.vocab_size);
  batch.draft = bebop::Read<double>(in, int64_t{batch.num_steps} * batch.num_rows * batch.vocab_size);
  batch.steps.resize(static_cast<size_t>(batch.num_rows));
  bebop::ChainSteps(batch.loss, batch.num_steps, batch.starts, batch.steps);
  batch.scale = 1.0 / static_cast<double>(bebop::NumChainTerms(batch.loss, batch.steps));
  bebop::Output output{std::ofstream(argv[2], std::ios::binary)};
  bebop::RunReference(batch, &output);
  bebop::RunKernels(batch, &output);
  output.file.close();
  return output.file.good() ? 0 : 1;
}
