// SPDX-License-Identifier: Apache-2.0
// verify: does speculative sampling on this server, with the checkpoint it has loaded, agree with plain sampling?
#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "client/cli/commands.h"
#include "client/cli/console.h"
#include "client/cli/statistics.h"
#include "nlohmann/json.hpp"

namespace bebop {
namespace {

// Each chi-square test at 1e-7, so that some dozens of them together stay below 1e-5 by chance.
constexpr double kNormalDeviate = 5.1993;
// Prompts' length when they are random ids, and tokens generated for the distribution tests: the first comes from the prompt's
// own pass, those after it from drafted iterations.
constexpr int32_t kRandomPromptLen = 12;
constexpr int32_t kSampledTokens = 4;
constexpr int32_t kMaxGroup = 1024;
// For the log-probability test: so many tokens that all drafts get accepted and rejected somewhere, and samples that take different
// turns, at the price of one small group a prompt.
constexpr int32_t kScoredTokens = 24;
constexpr int32_t kScoredSamples = 4;
// Tolerance of |log p of the sample - log p of Score|. Both are the same numbers up to the order of sums: the prefill form against the
// step form. In float32 that is rounding; in bfloat16 activations round at 2^-8.
constexpr double kLogprobTolerance32 = 1e-3;
constexpr double kLogprobMeanTolerance16 = 0.03;

using Mode = v1::SpeculationParams::Mode;

struct TestResult {
  std::string name;
  double statistic = 0.0, threshold = 0.0;
  int64_t samples = 0;
  bool passed() const { return statistic <= threshold; }  // false for NaN
};

// Texts whose continuations have some entropy on most models.
const char* const kTexts[] = {"The answer is", "def f(x):\n    return", "12 + 7 =", "Once upon a time, there",
                              "{\"name\": \"", "In the year", "x = 3; y = 4; print(", "Question: what is"};

class Verifier {
 public:
  Verifier(Client* client, const VerifyFlags& flags) : client_(client), flags_(flags), random_(flags.seed != 0 ? flags.seed : std::random_device()()) {}

  absl::Status Run() {
    absl::StatusOr<v1::ServerInfo> server = client_->GetServerInfo();
    if (!server.ok()) return server.status();
    server_ = *std::move(server);
    absl::StatusOr<v1::ModelInfo> model = client_->GetModelInfo();
    if (!model.ok()) return model.status();
    model_ = *std::move(model);
    if (absl::Status status = MakePrompts(); !status.ok()) return status;
    num_drafts_ = std::min(3, server_.max_draft_tokens());
    const std::vector<std::pair<Mode, const char*>> modes = {{v1::SpeculationParams::TARGET_ONLY, "target_only"},
                                                             {v1::SpeculationParams::REJECTION, "rejection"},
                                                             {v1::SpeculationParams::COUPLED, "coupled"}};
    Progress progress("verify", static_cast<int64_t>(prompts_.size()) * 4 + 8);
    for (size_t i = 0; i < prompts_.size(); ++i) {
      absl::StatusOr<Histograms> plain = Sample(prompts_[i], v1::SpeculationParams::OFF, 0);
      if (!plain.ok()) return plain.status();
      progress.Show(++done_);
      for (const auto& [mode, name] : modes) {
        if (!model_.has_mtp()) continue;
        const absl::StatusOr<Histograms> drafted = Sample(prompts_[i], mode, num_drafts_);
        if (!drafted.ok()) return drafted.status();
        Compare(absl::StrCat("prompt", i, "/", name), *plain, *drafted);
        progress.Show(++done_);
      }
    }
    // Without a draft layer there is nothing speculative to compare; log-probabilities are checked all the same.
    if (absl::Status status = CheckLogprobs(v1::SpeculationParams::OFF, "off", 0); !status.ok()) return status;
    progress.Show(++done_);
    if (!model_.has_mtp()) return absl::OkStatus();
    for (const auto& [mode, name] : modes) {
      if (absl::Status status = CheckLogprobs(mode, name, num_drafts_); !status.ok()) return status;
      if (absl::Status status = CheckGreedy(mode, name); !status.ok()) return status;
      progress.Show(++done_);
    }
    return CheckCoupled();
  }

  const std::vector<TestResult>& tests() const { return tests_; }

 private:
  // Of the first, second, ... token, and of neighbouring pairs: a wrong bonus token or swapped rows can keep marginals right.
  struct Histograms {
    std::vector<Histogram> tokens = std::vector<Histogram>(kSampledTokens);
    std::vector<Histogram> pairs = std::vector<Histogram>(kSampledTokens - 1);
    int64_t num_samples = 0;
  };

  absl::Status MakePrompts() {
    const auto num_prompts = static_cast<size_t>(flags_.num_prompts);
    for (size_t i = 0; i < num_prompts; ++i) {
      std::vector<uint32_t> ids;
      if (model_.has_tokenizer() && i < std::size(kTexts)) {
        v1::TokenizeRequest request;
        request.set_text(kTexts[i]);
        const absl::StatusOr<v1::TokenizeResult> tokens = client_->Tokenize(request);
        if (!tokens.ok()) return tokens.status();
        ids.assign(tokens->token_ids().begin(), tokens->token_ids().end());
      } else {
        std::uniform_int_distribution<uint32_t> token(0, static_cast<uint32_t>(model_.vocab_size()) - 1);
        for (int32_t t = 0; t < kRandomPromptLen; ++t) ids.push_back(token(random_));
      }
      prompts_.push_back(std::move(ids));
    }
    return absl::OkStatus();
  }

  v1::GenerateRequest NewRequest(const std::vector<uint32_t>& prompt, Mode mode, int32_t num_drafts, int32_t max_new_tokens) {
    v1::GenerateRequest request;
    request.mutable_prompt_token_ids()->Add(prompt.begin(), prompt.end());
    request.mutable_sampling()->set_seed(random_());
    request.mutable_stopping()->set_max_new_tokens(max_new_tokens);
    request.mutable_stopping()->set_ignore_eos(true);  // so that every sample has all its tokens
    request.mutable_speculation()->set_mode(mode);
    request.mutable_speculation()->set_num_draft_tokens(num_drafts);
    return request;
  }

  absl::StatusOr<Histograms> Sample(const std::vector<uint32_t>& prompt, Mode mode, int32_t num_drafts) {
    Histograms histograms;
    for (int32_t left = flags_.num_samples; left > 0; left -= kMaxGroup) {
      v1::GenerateRequest request = NewRequest(prompt, mode, num_drafts, kSampledTokens);
      request.set_num_samples(std::min(left, kMaxGroup));
      const absl::StatusOr<v1::GenerateResult> result = client_->Generate(request);
      if (!result.ok()) return result.status();
      for (const v1::SampleResult& sample : result->samples()) {
        ++histograms.num_samples;
        for (int t = 0; t < std::min(sample.token_ids_size(), kSampledTokens); ++t) {
          ++histograms.tokens[static_cast<size_t>(t)][sample.token_ids(t)];
          if (t > 0) ++histograms.pairs[static_cast<size_t>(t) - 1][(uint64_t{sample.token_ids(t - 1)} << 32) | sample.token_ids(t)];
        }
      }
    }
    return histograms;
  }

  void Compare(const std::string& name, const Histograms& plain, const Histograms& drafted) {
    const auto add = [&](const std::string& what, const Histogram& a, const Histogram& b) {
      const ChiSquare result = CompareHistograms(a, b);
      tests_.push_back({absl::StrCat(name, "/", what), result.statistic, ChiSquareQuantile(result.degrees_of_freedom, kNormalDeviate),
                        plain.num_samples + drafted.num_samples});
    };
    for (size_t t = 0; t < plain.tokens.size(); ++t) add(absl::StrCat("token", t + 1), plain.tokens[t], drafted.tokens[t]);
    for (size_t t = 0; t < plain.pairs.size(); ++t) add(absl::StrCat("pair", t + 1, "-", t + 2), plain.pairs[t], drafted.pairs[t]);
  }

  // Raw log-probabilities of samples against teacher forcing.
  absl::Status CheckLogprobs(Mode mode, const char* name, int32_t num_drafts) {
    double largest = 0.0, sum = 0.0;
    int64_t count = 0;
    for (const std::vector<uint32_t>& prompt : prompts_) {
      v1::GenerateRequest generate = NewRequest(prompt, mode, num_drafts, kScoredTokens);
      generate.set_num_samples(kScoredSamples);
      generate.mutable_output()->set_raw_logprobs(true);
      const absl::StatusOr<v1::GenerateResult> result = client_->Generate(generate);
      if (!result.ok()) return result.status();
      v1::ScoreRequest score;
      score.set_score_start(static_cast<int32_t>(prompt.size()));
      for (const v1::SampleResult& sample : result->samples()) {
        auto* ids = score.add_sequences()->mutable_token_ids();
        ids->Add(prompt.begin(), prompt.end());
        ids->Add(sample.token_ids().begin(), sample.token_ids().end());
      }
      const absl::StatusOr<v1::ScoreResult> scores = client_->Score(score);
      if (!scores.ok()) return scores.status();
      for (int i = 0; i < result->samples_size(); ++i) {
        const auto& sampled = result->samples(i).raw_logprobs();
        const auto& scored = scores->scores(i).logprobs();
        if (sampled.size() != scored.size()) return absl::InternalError("Score returned another number of positions than were generated");
        for (int t = 0; t < sampled.size(); ++t, ++count) {
          const double difference = std::abs(double{sampled[t]} - double{scored[t]});
          sum += difference;
          if (!(difference <= largest)) largest = difference;  // keeps a NaN
        }
      }
    }
    const bool is_float32 = server_.dtype() == "float32";
    const double statistic = is_float32 ? largest : sum / static_cast<double>(std::max<int64_t>(1, count));
    tests_.push_back({absl::StrCat(name, is_float32 ? "/logprob_max_difference" : "/logprob_mean_difference"), statistic,
                      is_float32 ? kLogprobTolerance32 : kLogprobMeanTolerance16, count});
    return absl::OkStatus();
  }

  // How many tokens differ between two runs of the same prompt; a missing token counts.
  absl::StatusOr<int64_t> CountDifferences(const v1::GenerateRequest& a, const v1::GenerateRequest& b) {
    const absl::StatusOr<v1::GenerateResult> first = client_->Generate(a);
    if (!first.ok()) return first.status();
    const absl::StatusOr<v1::GenerateResult> second = client_->Generate(b);
    if (!second.ok()) return second.status();
    int64_t differences = 0;
    for (int i = 0; i < std::min(first->samples_size(), second->samples_size()); ++i) {
      const auto& x = first->samples(i).token_ids();
      const auto& y = second->samples(i).token_ids();
      differences += std::abs(x.size() - y.size());
      for (int t = 0; t < std::min(x.size(), y.size()); ++t) differences += x[t] != y[t] ? 1 : 0;
      compared_ += std::min(x.size(), y.size());
    }
    return differences + std::abs(first->samples_size() - second->samples_size());
  }

  // Temperature 0: token for token what plain decoding gives.
  absl::Status CheckGreedy(Mode mode, const char* name) {
    int64_t differences = 0;
    compared_ = 0;
    for (const std::vector<uint32_t>& prompt : prompts_) {
      v1::GenerateRequest plain = NewRequest(prompt, v1::SpeculationParams::OFF, 0, flags_.greedy_tokens);
      plain.mutable_sampling()->set_temperature(0.0f);
      v1::GenerateRequest drafted = plain;
      drafted.mutable_speculation()->set_mode(mode);
      drafted.mutable_speculation()->set_num_draft_tokens(num_drafts_);
      const absl::StatusOr<int64_t> count = CountDifferences(plain, drafted);
      if (!count.ok()) return count.status();
      differences += *count;
    }
    tests_.push_back({absl::StrCat(name, "/greedy_token_differences"), static_cast<double>(differences), 0.0, compared_});
    return absl::OkStatus();
  }

  // COUPLED: tokens depend on the seed alone, whatever the number of drafts.
  absl::Status CheckCoupled() {
    for (int32_t num_drafts = 1; num_drafts <= server_.max_draft_tokens(); ++num_drafts) {
      int64_t differences = 0;
      compared_ = 0;
      for (const std::vector<uint32_t>& prompt : prompts_) {
        v1::GenerateRequest without = NewRequest(prompt, v1::SpeculationParams::COUPLED, 0, flags_.greedy_tokens);
        without.set_num_samples(2);
        v1::GenerateRequest with = without;
        with.mutable_speculation()->set_num_draft_tokens(num_drafts);
        const absl::StatusOr<int64_t> count = CountDifferences(without, with);
        if (!count.ok()) return count.status();
        differences += *count;
      }
      tests_.push_back({absl::StrCat("coupled/token_differences_at_", num_drafts), static_cast<double>(differences), 0.0, compared_});
    }
    return absl::OkStatus();
  }

  Client* const client_;
  const VerifyFlags flags_;
  std::mt19937_64 random_;
  v1::ServerInfo server_;
  v1::ModelInfo model_;
  std::vector<std::vector<uint32_t>> prompts_;
  int32_t num_drafts_ = 0;
  int64_t done_ = 0;
  int64_t compared_ = 0;  // tokens of the comparison in progress
  std::vector<TestResult> tests_;
};

}  // namespace

int RunVerify(Client* client, const GlobalFlags& global, const VerifyFlags& flags) {
  Verifier verifier(client, flags);
  if (absl::Status status = verifier.Run(); !status.ok()) return ReportError(status);
  size_t num_failed = 0;
  nlohmann::ordered_json tests = nlohmann::ordered_json::array();
  if (!global.json) PrintLine(absl::StrFormat("%-4s %-40s %9s    %-9s %s", "", "check", "statistic", "bound", "samples or tokens"));
  for (const TestResult& test : verifier.tests()) {
    num_failed += test.passed() ? 0 : 1;
    tests.push_back({{"name", test.name}, {"statistic", test.statistic}, {"threshold", test.threshold}, {"samples", test.samples}, {"passed", test.passed()}});
    if (!global.json) {
      PrintLine(absl::StrFormat("%-4s %-40s %9.3g %s %-9.3g %d", test.passed() ? "ok" : "FAIL", test.name, test.statistic,
                                test.passed() ? "<=" : "> ", test.threshold, test.samples));
    }
  }
  if (global.json) {
    PrintLine(nlohmann::ordered_json{{"passed", num_failed == 0}, {"tests", tests}}.dump());
  } else if (num_failed == 0) {
    PrintLine(absl::StrCat("passed ", verifier.tests().size(), " checks"));
  } else {
    PrintLine(absl::StrCat("FAILED ", num_failed, " of ", verifier.tests().size(), " checks"));
  }
  return num_failed == 0 ? kExitOk : kExitRefused;
}

}  // namespace bebop
