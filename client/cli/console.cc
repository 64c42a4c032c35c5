// SPDX-License-Identifier: Apache-2.0
#include "client/cli/console.h"

#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <iostream>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "client/cpp/client.h"
#include "google/protobuf/util/json_util.h"
#include "nlohmann/json.hpp"

namespace bebop {

int ExitCodeOf(const absl::Status& status) {
  if (status.ok()) return kExitOk;
  if (absl::IsDeadlineExceeded(status)) return kExitTimeout;
  return IsConnectionError(status) ? kExitNoConnection : kExitRefused;
}

int ReportError(const absl::Status& status) {
  const std::string reason = GetErrorDetails(status).reason;
  std::fprintf(stderr, "error: %s%s%s: %s\n", absl::StatusCodeToString(status.code()).c_str(), reason.empty() ? "" : " ", reason.c_str(),
               std::string(status.message()).c_str());
  return ExitCodeOf(status);
}

int ReportUsage(const std::string& message) {
  std::fprintf(stderr, "error: %s\n", message.c_str());
  return kExitUsage;
}

std::string ToJsonLine(const google::protobuf::Message& message) {
  google::protobuf::util::JsonPrintOptions options;
  options.preserve_proto_field_names = true;
  options.always_print_primitive_fields = true;
  std::string json;
  const auto status = google::protobuf::util::MessageToJsonString(message, &json, options);
  return status.ok() ? json : "{}";  // fails only for Any and bad UTF-8, which these messages cannot hold
}

std::string ToJsonLine(const google::protobuf::Message& first, const google::protobuf::Message& second) {
  auto all = nlohmann::ordered_json::parse(ToJsonLine(first));
  all.update(nlohmann::ordered_json::parse(ToJsonLine(second)));
  return all.dump();
}

absl::Status FromJson(const std::string& json, google::protobuf::Message* message) {
  const auto status = google::protobuf::util::JsonStringToMessage(json, message);
  if (status.ok()) return absl::OkStatus();
  std::string text(status.message().data(), status.message().size());
  for (char& c : text) {
    if (c == '\n') c = ' ';
  }
  return absl::InvalidArgumentError(absl::StrCat("not a ", message->GetDescriptor()->name(), ": ", text));
}

std::string ErrorToJsonLine(const absl::Status& status) {
  nlohmann::ordered_json error;
  error["code"] = absl::StatusCodeToString(status.code());
  error["reason"] = GetErrorDetails(status).reason;
  error["message"] = std::string(status.message());
  return nlohmann::ordered_json{{"error", error}}.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

void PrintLine(const std::string& line) {
  std::fwrite(line.data(), 1, line.size(), stdout);
  std::fputc('\n', stdout);
  std::fflush(stdout);
}

absl::StatusOr<std::vector<uint32_t>> ParseTokenIds(const std::string& text) {
  std::vector<uint32_t> ids;
  for (const absl::string_view word : absl::StrSplit(text, absl::ByAnyChar(" ,[]\t\n"), absl::SkipEmpty())) {
    uint32_t id = 0;
    if (!absl::SimpleAtoi(word, &id)) return absl::InvalidArgumentError(absl::StrCat("\"", word, "\" is not a token id"));
    ids.push_back(id);
  }
  return ids;
}

absl::StatusOr<std::vector<InputLine>> ReadLines(const std::string& path) {
  std::ifstream file;
  if (path != "-") {
    file.open(path);
    if (!file) return absl::NotFoundError(absl::StrCat("cannot read ", path));
  }
  std::istream& input = path == "-" ? std::cin : file;
  std::vector<InputLine> lines;
  InputLine line;
  while (std::getline(input, line.text)) {
    ++line.number;
    if (!absl::StripAsciiWhitespace(line.text).empty()) lines.push_back(line);
  }
  if (input.bad()) return absl::NotFoundError(absl::StrCat("cannot read ", path));
  return lines;
}

Progress::Progress(std::string what, int64_t total) : what_(std::move(what)), total_(total), enabled_(isatty(STDERR_FILENO) == 1) {}

Progress::~Progress() {
  if (enabled_) std::fprintf(stderr, "\r\033[K");
}

void Progress::Show(int64_t done, const std::string& more) {
  if (!enabled_) return;
  std::fprintf(stderr, "\r\033[K%s: %lld/%lld%s", what_.c_str(), static_cast<long long>(done), static_cast<long long>(total_),
               more.c_str());
}

}  // namespace bebop
