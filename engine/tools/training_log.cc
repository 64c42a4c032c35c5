// SPDX-License-Identifier: Apache-2.0
#include "engine/tools/training_log.h"

#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"

namespace bebop {
namespace {

using Json = nlohmann::ordered_json;

double Ratio(double sum, double count) { return count > 0.0 ? sum / count : 0.0; }

std::string Text(const Json& json) { return json.dump(-1, ' ', /*ensure_ascii=*/true, Json::error_handler_t::replace); }

Json EvaluationJson(const ReportSum& sum) {
  return {{"loss", sum.loss()},
          {"alpha", sum.acceptance()},
          {"entropy_target", sum.target_entropy()},
          {"entropy_draft", sum.draft_entropy()},
          {"kl", sum.kl()},
          {"terms", sum.terms()},
          {"tokens", sum.tokens()}};
}

std::string AlphaText(const std::vector<double>& acceptance) {
  const auto percent = [](std::string* out, double value) { absl::StrAppend(out, absl::StrFormat("%.1f", 100.0 * value)); };
  return absl::StrJoin(acceptance, " ", percent);
}

std::string QualityText(const ReportSum& sum) {
  return absl::StrFormat("loss %.4f  alpha %% %s  entropy %.3f/%.3f  kl %.4f", sum.loss(), AlphaText(sum.acceptance()),
                         sum.target_entropy(), sum.draft_entropy(), sum.kl());
}

}  // namespace

void ReportSum::Add(const TrainingReport& report) {
  tokens_ += report.tokens;
  seconds_ += report.seconds;
  gemm_flops_ += report.gemm_flops;
  if (report.terms == 0) return;  // nothing in it counted
  acceptance_.resize(report.acceptance.size());
  rows_.resize(report.acceptance.size());
  double rows = 0.0;
  for (size_t k = 0; k < report.acceptance.size(); ++k) {
    const double count = static_cast<double>(report.rows[k]);
    acceptance_[k] += count * report.acceptance[k];
    rows_[k] += count;
    rows += count;
  }
  terms_ += report.terms;
  loss_ += static_cast<double>(report.terms) * report.loss;
  target_entropy_ += rows * report.target_entropy;
  draft_entropy_ += rows * report.draft_entropy;
  kl_ += rows * report.kl;
}

double ReportSum::loss() const { return Ratio(loss_, static_cast<double>(terms_)); }

std::vector<double> ReportSum::acceptance() const {
  std::vector<double> means;
  for (size_t k = 0; k < rows_.size(); ++k) means.push_back(Ratio(acceptance_[k], rows_[k]));
  return means;
}

namespace {
double Total(const std::vector<double>& values) {
  double sum = 0.0;
  for (const double value : values) sum += value;
  return sum;
}
}  // namespace

double ReportSum::target_entropy() const { return Ratio(target_entropy_, Total(rows_)); }
double ReportSum::draft_entropy() const { return Ratio(draft_entropy_, Total(rows_)); }
double ReportSum::kl() const { return Ratio(kl_, Total(rows_)); }

TrainingLog::TrainingLog(bool json, double gemm_rate)
    : json_(json), gemm_rate_(gemm_rate), shows_progress_(isatty(STDERR_FILENO) == 1) {}

TrainingLog::~TrainingLog() { ClearProgress(); }

void TrainingLog::ClearProgress() {
  if (progress_shown_) std::fputs("\r\033[K", stderr);
  progress_shown_ = false;
}

void TrainingLog::Print(const std::string& line) {
  ClearProgress();
  std::fprintf(stdout, "%s\n", line.c_str());
  std::fflush(stdout);
}

void TrainingLog::Note(const std::string& text) {
  ClearProgress();
  std::fprintf(stderr, "%s\n", text.c_str());
}

double TrainingLog::BoundFraction(double flops, double seconds) const {
  return seconds > 0.0 ? flops / seconds / gemm_rate_ : 0.0;
}

void TrainingLog::Progress(const RunPlace& place, const TrainingReport& report) {
  if (!shows_progress_) return;
  const double done =
      place.all_batches > 0 ? 100.0 * static_cast<double>(place.done_batches) / static_cast<double>(place.all_batches) : 100.0;
  const double tokens_per_second = report.seconds > 0.0 ? static_cast<double>(report.tokens) / report.seconds : 0.0;
  std::fprintf(stderr,
               "\r\033[Kstep %lld  batch %lld/%lld (%.0f %%)  %.0f tokens/s  %.0f %% of the GEMM bound  loss %.4f  %s left",
               static_cast<long long>(place.step), static_cast<long long>(place.done_batches),
               static_cast<long long>(place.all_batches), done, tokens_per_second,
               100.0 * BoundFraction(report.gemm_flops, report.seconds), report.loss, DurationText(place.seconds_left).c_str());
  std::fflush(stderr);
  progress_shown_ = true;
}

void TrainingLog::Steps(const RunPlace& place, const ReportSum& sum, const TrainingReport& last) {
  const double tokens_per_second = sum.seconds() > 0.0 ? static_cast<double>(sum.tokens()) / sum.seconds() : 0.0;
  const double fraction = BoundFraction(sum.gemm_flops(), sum.seconds());
  if (!json_) {
    Print(absl::StrFormat("step %d/%d  epoch %d  %s  norm %.3g  lr %.3g  %.0f tokens/s  %.0f %% of the GEMM bound", place.step,
                          place.all_batches, place.epoch, QualityText(sum), last.gradient_norm, last.learning_rate,
                          tokens_per_second, 100.0 * fraction));
    return;
  }
  Print(Text({{"step", place.step},
              {"total_steps", place.all_batches},
              {"epoch", place.epoch},
              {"loss", sum.loss()},
              {"alpha", sum.acceptance()},
              {"entropy_target", sum.target_entropy()},
              {"entropy_draft", sum.draft_entropy()},
              {"kl", sum.kl()},
              {"gradient_norm", last.gradient_norm},
              {"lr", last.learning_rate},
              {"tokens", place.tokens},
              {"tokens_per_second", tokens_per_second},
              {"gemm_bound_fraction", fraction}}));
}

void TrainingLog::Evaluation(int64_t step, const ReportSum& sum) {
  if (json_) {
    Print(Text({{"step", step}, {"evaluation", EvaluationJson(sum)}}));
  } else {
    Print(absl::StrFormat("step %d  evaluation  %s", step, QualityText(sum)));
  }
}

void TrainingLog::Finished(const RunPlace& place, double seconds, const std::optional<ReportSum>& evaluation,
                           const TrainingDataCounts& counts, const std::string& out) {
  if (json_) {
    Print(Text({{"step", place.step},
                {"evaluation", evaluation ? EvaluationJson(*evaluation) : Json()},
                {"out", out},
                {"tokens", place.tokens},
                {"seconds", seconds},
                {"data",
                 {{"documents", counts.documents},
                  {"tokens", counts.tokens},
                  {"loss_tokens", counts.loss_tokens},
                  {"skipped_short", counts.skipped_short},
                  {"skipped_failed", counts.skipped_failed},
                  {"truncated", counts.truncated}}}}));
    return;
  }
  if (evaluation) Print(absl::StrFormat("step %d  evaluation  %s", place.step, QualityText(*evaluation)));
  Print(absl::StrFormat("%s: %d steps, %d tokens in %s; data: %s", out, place.step, place.tokens, DurationText(seconds),
                        CountsText(counts)));
}

std::string DurationText(double seconds) {
  const int64_t whole = std::llround(seconds);
  if (whole >= 3600) return absl::StrFormat("%d h %02d min", whole / 3600, whole / 60 % 60);
  if (whole >= 60) return absl::StrFormat("%d min %02d s", whole / 60, whole % 60);
  return absl::StrCat(whole, " s");
}

std::string BytesText(int64_t bytes) {
  return bytes >= 1'000'000'000 ? absl::StrFormat("%.2f GB", static_cast<double>(bytes) * 1e-9)
                                : absl::StrFormat("%.0f MB", static_cast<double>(bytes) * 1e-6);
}

std::string CountsText(const TrainingDataCounts& counts) {
  std::string text =
      absl::StrCat(counts.documents, " documents of ", counts.tokens, " tokens, ", counts.loss_tokens, " of them to predict");
  if (counts.skipped_short > 0)
    absl::StrAppend(&text, "; skipped ", counts.skipped_short, " too short or with nothing to predict");
  if (counts.skipped_failed > 0) absl::StrAppend(&text, "; skipped ", counts.skipped_failed, " that had failed");
  if (counts.truncated > 0) absl::StrAppend(&text, "; cut ", counts.truncated, " at --max-seq-len");
  return text;
}

}  // namespace bebop
