// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include "client/cli/commands.h"
#include "client/cli/console.h"
#include "google/protobuf/message.h"

namespace bebop {

// Runs `call(i)` for i in [0, count) on up to `concurrency` threads, and `print(i)` on the calling thread in order of i as results
// come in.
void RunOrdered(size_t count, int32_t concurrency, const std::function<void(size_t)>& call, const std::function<void(size_t)>& print);

// Fills what `line` leaves unset from `flags`, a message of the same type. A list that the line sets stays whole.
void FillUnset(const google::protobuf::Message& flags, google::protobuf::Message* line);

// INVALID_ARGUMENT with the reason MALFORMED_LINE: line `number` does not parse.
absl::Status MalformedLine(int64_t number, const absl::Status& parsed);

// The --requests mode of a verb: each line a Request in JSON, each output line the reply (`show`) or an error in its place.
// `defaults`: what the verb's flags set, for lines that leave it unset.
// `call`: Request -> absl::StatusOr<Reply>; `show`: Reply -> text of its output line.
template <typename Request, typename Reply>
int RunBatch(const BatchFlags& flags, const char* what, const Request& defaults,
             const std::function<absl::StatusOr<Reply>(const Request&)>& call, const std::function<std::string(const Reply&)>& show) {
  const absl::StatusOr<std::vector<InputLine>> lines = ReadLines(flags.requests);
  if (!lines.ok()) return ReportUsage("--requests: " + std::string(lines.status().message()));
  std::vector<absl::StatusOr<Reply>> replies(lines->size(), absl::StatusOr<Reply>(absl::UnknownError("not run")));
  Progress progress(what, static_cast<int64_t>(lines->size()));
  int exit_code = kExitOk;
  RunOrdered(
      lines->size(), flags.concurrency,
      [&](size_t i) {
        Request request;
        const absl::Status parsed = FromJson((*lines)[i].text, &request);
        if (!parsed.ok()) {
          replies[i] = MalformedLine((*lines)[i].number, parsed);
          return;
        }
        FillUnset(defaults, &request);
        replies[i] = call(request);
      },
      [&](size_t i) {
        if (replies[i].ok()) {
          PrintLine(show(*replies[i]));
        } else {
          PrintLine(ErrorToJsonLine(replies[i].status()));
          // A refused line is 1; a server that is not there at all is worth telling apart.
          const int code = IsConnectionError(replies[i].status()) ? kExitNoConnection : kExitRefused;
          exit_code = std::max(exit_code, code);
        }
        replies[i] = absl::UnknownError("printed");  // frees the reply
        progress.Show(static_cast<int64_t>(i) + 1);
      });
  return exit_code;
}

}  // namespace bebop
