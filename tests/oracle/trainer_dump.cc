// SPDX-License-Identifier: Apache-2.0
//
// trainer_dump CHECKPOINT DOCUMENTS OUT [KEY=VALUE ...]
//
// Trains the MTP layer of a checkpoint (in float32) on one batch, for tests/oracle/trainer_test.py to judge. DOCUMENTS: text, one
// a line: loss_start, then the token ids. KEYs: loss, steps (K), updates, rate, weight_decay, clip, top_k, chunk_rows, threads.
// Prints the report of the first step, `name value ...` a line, and writes raw float32 files, one a tensor, to the folder OUT:
//   gradient.NAME    of the first step: Adam's first moment after it, with beta1 = 0
//   parameter.NAME   after `updates` steps with the usual betas
#include <cstdio>
#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "tests/engine/training/training_test_util.h"

namespace bebop {
namespace {

const std::map<std::string, DraftLoss> kLosses = {{"ce", DraftLoss::kCrossEntropy},
                                                  {"kl", DraftLoss::kKl},
                                                  {"reverse_kl", DraftLoss::kReverseKl},
                                                  {"tv", DraftLoss::kTotalVariation},
                                                  {"e2e_tv", DraftLoss::kEndToEndTotalVariation},
                                                  {"lk", DraftLoss::kLk}};

std::vector<TrainingDocument> ReadDocuments(const std::string& path) {
  std::ifstream file(path);
  std::vector<TrainingDocument> out;
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    TrainingDocument& document = out.emplace_back();
    document.line = static_cast<int64_t>(out.size());
    BEBOP_CHECK(static_cast<bool>(words >> document.loss_start));
    for (uint32_t id; words >> id;) document.token_ids.push_back(id);
  }
  return out;
}

void Write(const std::string& prefix, const MtpLayout& layout, const std::vector<float>& flat) {
  for (const MtpTensor& tensor : layout.tensors) {
    std::ofstream file(prefix + tensor.name, std::ios::binary);
    file.write(reinterpret_cast<const char*>(flat.data() + tensor.offset),
               static_cast<std::streamsize>(tensor.size() * static_cast<int64_t>(sizeof(float))));
    BEBOP_CHECK(file.good());
  }
}

int Main(int argc, char** argv) {
  if (argc < 4) {
    std::fprintf(stderr, "usage: trainer_dump CHECKPOINT DOCUMENTS OUT [KEY=VALUE ...]\n");
    return 2;
  }
  std::map<std::string, std::string> values = {{"updates", "0"}, {"rate", "0.01"},    {"weight_decay", "0"}, {"clip", "0"},
                                               {"top_k", "0"},   {"chunk_rows", "0"}, {"threads", "2"}};
  for (int i = 4; i < argc; ++i) {
    const std::string word = argv[i];
    values[word.substr(0, word.find('='))] = word.substr(word.find('=') + 1);
  }
  testing::TrainerHarness harness(argv[1], DType::kFloat32, std::stoi(values["threads"]));
  const std::vector<TrainingDocument> documents = ReadDocuments(argv[2]);
  std::vector<const TrainingDocument*> batch;
  TrainerOptions options;
  options.batch_tokens = 0;
  for (const TrainingDocument& document : documents) {
    batch.push_back(&document);
    options.batch_tokens += static_cast<int64_t>(document.token_ids.size());
  }
  options.loss = kLosses.at(values["loss"]);
  options.num_steps_ahead = std::stoi(values["steps"]);
  options.chunk_rows = std::stoll(values["chunk_rows"]);
  options.truncate_top_k = std::stoi(values["top_k"]);
  options.optimizer.learning_rate = std::stod(values["rate"]);
  options.optimizer.weight_decay = std::stod(values["weight_decay"]);
  options.optimizer.clip_norm = std::stod(values["clip"]);

  TrainerOptions bare = options;
  bare.optimizer.beta1 = 0.0;
  bare.optimizer.clip_norm = 0.0;
  auto trainer = harness.Make(bare);
  BEBOP_CHECK(trainer.ok());
  const auto report = (*trainer)->Step(batch);
  BEBOP_CHECK(report.ok());
  std::printf("loss %.17g\nterms %lld\ntarget_entropy %.17g\ndraft_entropy %.17g\nkl %.17g\ngradient_norm %.17g\nacceptance",
              report->loss, static_cast<long long>(report->terms), report->target_entropy, report->draft_entropy, report->kl,
              report->gradient_norm);
  for (const double value : report->acceptance) std::printf(" %.17g", value);
  std::printf("\nrows");
  for (const int64_t value : report->rows) std::printf(" %lld", static_cast<long long>(value));
  std::printf("\n");
  const std::string out = argv[3];
  Write(out + "/gradient.", (*trainer)->layout(), (*trainer)->state().first_moment);

  trainer = harness.Make(options);
  BEBOP_CHECK(trainer.ok());
  for (int update = 0; update < std::stoi(values["updates"]); ++update) BEBOP_CHECK((*trainer)->Step(batch).ok());
  Write(out + "/parameter.", (*trainer)->layout(), (*trainer)->state().parameters);
  return 0;
}

}  // namespace
}  // namespace bebop

int main(int argc, char** argv) { return bebop::Main(argc, argv); }
