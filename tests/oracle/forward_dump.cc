// SPDX-License-Identifier: Apache-2.0
//
// forward_dump MODEL DTYPE TOKENS OUT MAX_CHAIN_LENGTH
//
// Runs the real Model on a checkpoint and writes raw float32 logits for tests/oracle/network_test.py to judge. MODEL: checkpoint
// folder. DTYPE: float32 or bfloat16. TOKENS: text, one sequence a line. OUT: existing folder; receives one file [rows, V] a mode:
//   prefill      all sequences in one pass, known rows only
//   chunked      random chunks of random sequences, ragged
//   decode       one token of every sequence a pass
//   verify       windows of up to 5 drafts of which a random number are the sequence's own tokens (and accepted)
//   mtp.1 .. 5   teacher-forced depths: for each sequence, bases in order; deeper than 1 only up to MAX_CHAIN_LENGTH tokens
//   mtp_prenorm  depth 1 fed with the hidden states from before the final norm, the bug that the oracle must see
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "engine/config/model_config.h"
#include "engine/weights/checkpoint.h"
#include "tests/engine/model/model_harness.h"

namespace bebop {
namespace {

using Sequence = ModelHarness::Sequence;
using Tokens = std::vector<uint32_t>;

constexpr int32_t kWindow = 5;
constexpr int32_t kMaxDepth = 5;
constexpr int32_t kMaxRows = 1024;

struct Run {
  const ModelConfig config;
  const std::unique_ptr<ModelWeights> weights;
  const DType dtype;
  const std::vector<Tokens> tokens;
  const std::string out;
  const int32_t max_chain_length;

  ModelHarness MakeHarness() const {
    HarnessOptions options;
    options.kv_dtype = dtype;
    options.page_tokens = 16;
    options.num_pages = 128;
    options.num_slots = 2 * static_cast<int32_t>(tokens.size()) + 2;
    options.window = kWindow;
    options.max_rows = kMaxRows;
    return ModelHarness(config, weights.get(), options);
  }
};

// How much of a sequence a pass takes: known tokens, then drafts, of which the first `num_right` are its own.
struct Piece {
  int32_t num_known = 0, num_drafts = 0, num_right = 0;
};

bool Write(const std::string& path, const Matrix& matrix) {
  std::ofstream file(path, std::ios::binary);
  const size_t bytes = matrix.values.size() * sizeof(float);
  file.write(reinterpret_cast<const char*>(matrix.values.data()), static_cast<std::streamsize>(bytes));
  return file.good();
}

Tokens Slice(const Tokens& tokens, int64_t begin, int64_t count) {
  return {tokens.begin() + begin, tokens.begin() + begin + count};
}

// Takes all sequences to their end in passes cut by `choose(sequence, left)` (num_known 0: not in this pass); hidden states of the
// certain rows of each sequence.
template <typename Choose>
std::vector<Matrix> TargetInPieces(const Run& run, ModelHarness& harness, std::vector<Sequence>& sequences, Choose choose) {
  std::vector<Matrix> hidden(run.tokens.size());
  sequences.resize(run.tokens.size());
  for (;;) {
    std::vector<ModelHarness::TargetRows> rows;
    std::vector<std::pair<size_t, Piece>> pieces;
    int32_t num_left = 0, num_rows = 0;
    for (size_t s = 0; s < sequences.size(); ++s) {
      const int32_t begin = sequences[s].num_computed;
      const int32_t left = static_cast<int32_t>(run.tokens[s].size()) - begin;
      num_left += left;
      if (left == 0) continue;
      const Piece piece = choose(s, left);
      if (piece.num_known == 0 || num_rows + piece.num_known + piece.num_drafts > kMaxRows) continue;
      num_rows += piece.num_known + piece.num_drafts;
      Tokens drafts = Slice(run.tokens[s], begin + piece.num_known, piece.num_drafts);
      for (int32_t i = piece.num_right; i < piece.num_drafts; ++i) drafts[i] = (drafts[i] + 1 + i) % run.config.vocab_size;
      rows.push_back({&sequences[s], Slice(run.tokens[s], begin, piece.num_known), drafts});
      pieces.emplace_back(s, piece);
    }
    if (num_left == 0) return hidden;
    if (rows.empty()) continue;
    const Matrix out = harness.Target(rows);
    int64_t first_row = 0;
    for (const auto& [s, piece] : pieces) {
      hidden[s].Append(out.Rows(first_row, piece.num_known + piece.num_right));
      harness.Accept(sequences[s], piece.num_right);
      first_row += piece.num_known + piece.num_drafts;
    }
  }
}

template <typename Choose>
bool DumpTarget(const Run& run, const std::string& mode, Choose choose) {
  ModelHarness harness = run.MakeHarness();
  std::vector<Sequence> sequences;
  Matrix logits;
  for (const Matrix& hidden : TargetInPieces(run, harness, sequences, choose)) logits.Append(harness.Logits(hidden));
  return Write(run.out + "/" + mode, logits);
}

bool DumpMtp(const Run& run) {
  ModelHarness harness = run.MakeHarness();
  std::vector<Sequence> sequences;
  const std::vector<Matrix> hidden =
      TargetInPieces(run, harness, sequences, [](size_t, int32_t left) { return Piece{.num_known = left}; });
  std::vector<Matrix> logits(kMaxDepth);
  Matrix prenorm_logits;
  for (size_t s = 0; s < sequences.size(); ++s) {
    const Tokens& tokens = run.tokens[s];
    const int64_t count = static_cast<int64_t>(tokens.size());
    if (count < 2) continue;
    // RMSNorm is scale free, so the state before the final norm is the state after it without the norm's weight.
    Matrix before = hidden[s].Rows(0, count - 1);
    for (int64_t i = 0; i < before.rows * before.cols; ++i) before.values[i] /= 1.0f + run.weights->final_norm[i % before.cols];
    prenorm_logits.Append(harness.Logits(harness.Mtp({{&sequences[s], Slice(tokens, 1, count - 1), 1}}, before)));

    const Matrix depth1 = harness.Mtp({{&sequences[s], Slice(tokens, 1, count - 1), 1}}, hidden[s].Rows(0, count - 1));
    logits[0].Append(harness.Logits(depth1));
    if (count > run.max_chain_length) continue;
    ModelHarness::Chain chain(harness, sequences[s], depth1);
    for (int64_t depth = 2; depth <= kMaxDepth && depth < count; ++depth) {
      logits[depth - 1].Append(harness.Logits(chain.Step(Slice(tokens, depth, count - depth))));
    }
  }
  bool good = Write(run.out + "/mtp_prenorm", prenorm_logits);
  for (int depth = 1; depth <= kMaxDepth; ++depth) good &= Write(run.out + "/mtp." + std::to_string(depth), logits[depth - 1]);
  return good;
}

bool DumpAll(const Run& run) {
  std::mt19937 random(12345);
  const auto uniform = [&](int32_t low, int32_t high) { return std::uniform_int_distribution<int32_t>(low, high)(random); };
  bool good = DumpTarget(run, "prefill", [](size_t, int32_t left) { return Piece{.num_known = left}; });
  good &= DumpTarget(run, "chunked", [&](size_t, int32_t left) { return Piece{.num_known = std::min(left, uniform(0, 70))}; });
  good &= DumpTarget(run, "decode", [](size_t, int32_t) { return Piece{.num_known = 1}; });
  good &= DumpTarget(run, "verify", [&](size_t, int32_t left) {
    const int32_t num_drafts = std::min(left - 1, uniform(0, kWindow));
    return Piece{.num_known = 1, .num_drafts = num_drafts, .num_right = uniform(0, num_drafts)};
  });
  if (run.config.num_mtp_layers > 0) good &= DumpMtp(run);
  return good;
}

std::vector<Tokens> ReadTokens(const std::string& path) {
  std::vector<Tokens> sequences;
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    Tokens& tokens = sequences.emplace_back();
    for (uint32_t token; words >> token;) tokens.push_back(token);
  }
  return sequences;
}

int Main(int argc, char** argv) {
  int32_t max_chain_length = 0;
  if (argc != 6 || !absl::SimpleAtoi(argv[5], &max_chain_length)) {
    std::fprintf(stderr, "usage: forward_dump MODEL float32|bfloat16 TOKENS OUT MAX_CHAIN_LENGTH\n");
    return 2;
  }
  const DType dtype = std::string(argv[2]) == "float32" ? DType::kFloat32 : DType::kBFloat16;
  const absl::StatusOr<ModelConfig> config = LoadModelConfig(argv[1]);
  if (!config.ok()) {
    std::fprintf(stderr, "%s\n", config.status().ToString().c_str());
    return 1;
  }
  ThreadPool pool(2);
  absl::StatusOr<std::unique_ptr<ModelWeights>> weights =
      LoadModelWeights(*config, {.path = argv[1], .mtp_path = "", .dtype = dtype, .needs_mtp = config->num_mtp_layers > 0}, pool,
                       MakeHostMemory().get());
  if (!weights.ok()) {
    std::fprintf(stderr, "%s\n", weights.status().ToString().c_str());
    return 1;
  }
  const Run run{*config, *std::move(weights), dtype, ReadTokens(argv[3]), argv[4], max_chain_length};
  return DumpAll(run) ? 0 : 1;
}

}  // namespace
}  // namespace bebop

int main(int argc, char** argv) { return bebop::Main(argc, argv); }
