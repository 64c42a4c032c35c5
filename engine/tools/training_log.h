// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "engine/training/mtp_trainer.h"
#include "engine/training/training_data.h"

namespace bebop {

// Batches' reports as one: means over all of their terms and rows.
class ReportSum {
 public:
  void Add(const TrainingReport& report);
  void Clear() { *this = ReportSum(); }

  int64_t terms() const { return terms_; }
  int64_t tokens() const { return tokens_; }
  double loss() const;
  std::vector<double> acceptance() const;  // [K]; 0 where no row counted
  double target_entropy() const;
  double draft_entropy() const;
  double kl() const;
  double gemm_flops() const { return gemm_flops_; }
  double seconds() const { return seconds_; }

 private:
  int64_t terms_ = 0, tokens_ = 0;
  double loss_ = 0.0, target_entropy_ = 0.0, draft_entropy_ = 0.0, kl_ = 0.0, gemm_flops_ = 0.0, seconds_ = 0.0;
  std::vector<double> acceptance_;
  std::vector<double> rows_;
};

// Where a run is, for the line that people watch.
struct RunPlace {
  int64_t step = 0;
  int64_t epoch = 0;
  int64_t num_epochs = 0;
  int64_t done_batches = 0;  // of the whole run
  int64_t all_batches = 0;   // each is a step
  int64_t tokens = 0;        // of the whole run, trained on
  double seconds_left = 0.0;
};

// What a run says: with `json` one object a line on stdout, else lines for people there. A line that is overwritten shows
// progress on stderr, when that is a terminal.
class TrainingLog {
 public:
  // gemm_rate: floating point operations a second that products alone reach here.
  TrainingLog(bool json, double gemm_rate);
  ~TrainingLog();

  // What is said once, at the start; on stderr.
  void Note(const std::string& text);
  void Progress(const RunPlace& place, const TrainingReport& report);
  // The steps since the last call.
  void Steps(const RunPlace& place, const ReportSum& sum, const TrainingReport& last);
  void Evaluation(int64_t step, const ReportSum& sum);
  // The last one. `evaluation`: none without --eval-data.
  void Finished(const RunPlace& place, double seconds, const std::optional<ReportSum>& evaluation,
                const TrainingDataCounts& counts, const std::string& out);

 private:
  void Print(const std::string& line);
  void ClearProgress();
  double BoundFraction(double flops, double seconds) const;

  const bool json_;
  const double gemm_rate_;
  const bool shows_progress_;
  bool progress_shown_ = false;
};

// "2 h 05 min", "3 min 20 s", "12 s".
std::string DurationText(double seconds);
// "1.4 GB", "182 MB".
std::string BytesText(int64_t bytes);
// What was read and what was left out.
std::string CountsText(const TrainingDataCounts& counts);

}  // namespace bebop
