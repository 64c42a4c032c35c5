// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "google/protobuf/message.h"

namespace bebop {

// Exit statuses of `bebop` (cli.md section 2).
enum ExitCode { kExitOk = 0, kExitRefused = 1, kExitUsage = 2, kExitNoConnection = 3, kExitTimeout = 4 };

// The exit status that a failed call means.
int ExitCodeOf(const absl::Status& status);

// "error: CODE REASON: message" on stderr; returns ExitCodeOf(status).
int ReportError(const absl::Status& status);
// "error: message" on stderr; returns kExitUsage.
int ReportUsage(const std::string& message);

// protobuf's JSON mapping with proto field names and default-valued fields, on one line.
std::string ToJsonLine(const google::protobuf::Message& message);
// The fields of both side by side in one object. REQUIRES: no name in both.
std::string ToJsonLine(const google::protobuf::Message& first, const google::protobuf::Message& second);
// The other way; unknown fields are refused. INVALID_ARGUMENT.
absl::Status FromJson(const std::string& json, google::protobuf::Message* message);
// {"error":{"code":...,"reason":...,"message":...}}
std::string ErrorToJsonLine(const absl::Status& status);

// Writes `line` and a newline to stdout and flushes.
void PrintLine(const std::string& line);

// Token ids separated by spaces or commas, in brackets or not. INVALID_ARGUMENT names what is no id.
absl::StatusOr<std::vector<uint32_t>> ParseTokenIds(const std::string& text);

// The lines of a file, or of stdin for "-", without blank ones; each with its 1-based number.
struct InputLine {
  int64_t number = 0;
  std::string text;
};
absl::StatusOr<std::vector<InputLine>> ReadLines(const std::string& path);

// Progress on stderr, and only when that is a terminal.
class Progress {
 public:
  Progress(std::string what, int64_t total);
  ~Progress();  // removes the line
  void Show(int64_t done, const std::string& more = {});

 private:
  const std::string what_;
  const int64_t total_;
  const bool enabled_;
};

}  // namespace bebop
