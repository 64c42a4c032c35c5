// SPDX-License-Identifier: Apache-2.0
// generate, score, tokenize, detokenize, info, health, loads.
#include <cstdio>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "client/cli/batch.h"
#include "client/cli/commands.h"
#include "client/cli/console.h"

namespace bebop {
namespace {

constexpr absl::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD

// Text of `ids`, or the ids themselves when the server has no tokenizer.
template <typename Ids>
absl::StatusOr<std::string> TextOf(Client* client, const Ids& ids) {
  v1::DetokenizeRequest request;
  request.mutable_token_ids()->Add(ids.begin(), ids.end());
  const absl::StatusOr<v1::DetokenizeResult> result = client->Detokenize(request);
  if (result.ok()) return result->text();
  if (GetErrorDetails(result.status()).reason == "NO_TOKENIZER") return absl::StrJoin(ids, " ");
  return result.status();
}

std::string Summary(const v1::SampleResult& sample) {
  std::string text = absl::StrFormat("sample %d: %d tokens, %s", sample.sample_index(), sample.token_ids_size(),
                                     v1::Finish::Reason_Name(sample.finish().reason()));
  if (sample.spec().num_spec_steps() > 0) {
    absl::StrAppendFormat(&text, ", accept length %.2f",
                          1.0 + static_cast<double>(sample.spec().num_accepted_draft_tokens()) / static_cast<double>(sample.spec().num_spec_steps()));
  }
  absl::StrAppendFormat(&text, ", %.3f s", sample.timing().e2e());
  if (!sample.resume_handle().empty()) text += "; cut short, --json has a resume_handle to go on with";
  return text;
}

// A result in hand is shown whatever has become of the server since (it may have drained): as ids where it cannot say the text.
std::string SamplesAsText(Client* client, const v1::GenerateResult& result) {
  std::string text;
  for (const v1::SampleResult& sample : result.samples()) {
    const absl::StatusOr<std::string> decoded = TextOf(client, sample.token_ids());
    if (!text.empty()) text += '\n';
    absl::StrAppend(&text, "[", Summary(sample), "]\n", decoded.ok() ? *decoded : absl::StrJoin(sample.token_ids(), " "));
    if (sample.logprobs_size() > 0) absl::StrAppend(&text, "\n[logprobs ", absl::StrJoin(sample.logprobs(), " "), "]");
  }
  return text;
}

// Prints the text of one sample as it grows. Half characters at the end decode to U+FFFD and are held back until they are whole.
class TextStream {
 public:
  explicit TextStream(Client* client) : client_(client) {}
  absl::Status Add(const v1::TokenChunk& chunk) {
    ids_.insert(ids_.end(), chunk.token_ids().begin(), chunk.token_ids().end());
    return Show(/*last=*/false);
  }
  absl::Status Finish(const v1::SampleResult& sample) {
    ids_.assign(sample.token_ids().begin(), sample.token_ids().end());
    const absl::Status status = Show(/*last=*/true);
    if (status.ok()) std::fputc('\n', stdout);
    return status;
  }

 private:
  absl::Status Show(bool last) {
    absl::StatusOr<std::string> text = TextOf(client_, ids_);
    if (!text.ok()) return text.status();
    size_t end = text->size();
    while (!last && end >= kReplacement.size() && absl::EndsWith(absl::string_view(*text).substr(0, end), kReplacement)) end -= kReplacement.size();
    if (end > shown_) {
      std::fwrite(text->data() + shown_, 1, end - shown_, stdout);
      std::fflush(stdout);
      shown_ = end;
    }
    return absl::OkStatus();
  }

  Client* const client_;
  std::vector<uint32_t> ids_;
  size_t shown_ = 0;
};

int StreamGenerate(Client* client, const GlobalFlags& global, v1::GenerateRequest request) {
  // Several samples interleave, so their text comes whole; with --json everything is shown as it comes.
  const bool incremental = global.json || request.num_samples() <= 1;
  request.mutable_output()->set_stream_tokens(incremental);
  TextStream text(client);
  absl::Status failure;
  const absl::Status status = client->GenerateStream(request, [&](const v1::GenerateEvent& event) {
    if (global.json) {
      PrintLine(ToJsonLine(event));
    } else if (event.has_token_chunk()) {
      failure = text.Add(event.token_chunk());
    } else if (event.has_sample_result() && incremental) {
      failure = text.Finish(event.sample_result());
      std::fprintf(stderr, "[%s]\n", Summary(event.sample_result()).c_str());
    } else if (event.has_sample_result()) {
      v1::GenerateResult one;
      *one.add_samples() = event.sample_result();
      PrintLine(SamplesAsText(client, one));
    }
    return failure.ok();
  });
  if (!failure.ok()) return ReportError(failure);
  return status.ok() ? static_cast<int>(kExitOk) : ReportError(status);
}

}  // namespace

int RunGenerate(Client* client, const GlobalFlags& global, const GenerateFlags& flags) {
  if (!flags.batch.requests.empty()) {
    if (flags.text.has_value() || !flags.token_ids.empty() || flags.parse_special) {
      return ReportUsage("--requests: the prompts come from its lines; drop TEXT, --token-ids and --parse-special");
    }
    if (flags.stream) return ReportUsage("--stream: not with --requests");
    return RunBatch<v1::GenerateRequest, v1::GenerateResult>(
        flags.batch, "generate", flags.request, [client](const v1::GenerateRequest& line) { return client->Generate(line); },
        [&](const v1::GenerateResult& result) {
          if (global.json) return ToJsonLine(result);
          return SamplesAsText(client, result);
        });
  }
  v1::GenerateRequest request = flags.request;
  if (flags.text.has_value() == !flags.token_ids.empty()) return ReportUsage("generate: give one of TEXT, --token-ids and --requests");
  if (flags.text.has_value()) {
    v1::TokenizeRequest tokenize;
    tokenize.set_text(*flags.text);
    tokenize.set_parse_special(flags.parse_special);
    const absl::StatusOr<v1::TokenizeResult> tokens = client->Tokenize(tokenize);
    if (!tokens.ok()) return ReportError(tokens.status());
    *request.mutable_prompt_token_ids() = tokens->token_ids();
  } else {
    const absl::StatusOr<std::vector<uint32_t>> ids = ParseTokenIds(flags.token_ids);
    if (!ids.ok()) return ReportUsage("--token-ids: " + std::string(ids.status().message()));
    request.mutable_prompt_token_ids()->Add(ids->begin(), ids->end());
  }
  if (flags.stream) return StreamGenerate(client, global, std::move(request));
  const absl::StatusOr<v1::GenerateResult> result = client->Generate(request);
  if (!result.ok()) return ReportError(result.status());
  if (global.json) {
    PrintLine(ToJsonLine(*result));
    return kExitOk;
  }
  PrintLine(SamplesAsText(client, *result));
  return kExitOk;
}

namespace {

std::string ScoresAsText(const v1::ScoreResult& result) {
  std::string text;
  for (int i = 0; i < result.scores_size(); ++i) {
    const v1::SequenceScore& score = result.scores(i);
    double sum = 0.0;
    for (const float value : score.logprobs()) sum += value;
    absl::StrAppend(&text, i > 0 ? "\n" : "", "sequence ", i, ": ", score.logprobs_size(), " positions, total ", sum, " nats");
    for (const v1::DraftScore& draft : score.draft()) {
      double overlap = 0.0;
      for (const float value : draft.overlap()) overlap += value;
      if (draft.overlap_size() > 0) absl::StrAppend(&text, "\n  draft depth ", draft.depth(), ": mean overlap ", overlap / draft.overlap_size());
    }
  }
  return text;
}

}  // namespace

int RunScore(Client* client, const GlobalFlags& global, const ScoreFlags& flags) {
  const auto show = [&global](const v1::ScoreResult& result) { return global.json ? ToJsonLine(result) : ScoresAsText(result); };
  if (!flags.batch.requests.empty()) {
    if (!flags.token_ids.empty()) return ReportUsage("--requests: the sequences come from its lines; drop --token-ids");
    return RunBatch<v1::ScoreRequest, v1::ScoreResult>(
        flags.batch, "score", flags.request, [client](const v1::ScoreRequest& line) { return client->Score(line); }, show);
  }
  const absl::StatusOr<std::vector<uint32_t>> ids = ParseTokenIds(flags.token_ids);
  if (!ids.ok()) return ReportUsage("--token-ids: " + std::string(ids.status().message()));
  if (ids->empty()) return ReportUsage("score: give --token-ids or --requests");
  v1::ScoreRequest request = flags.request;
  request.add_sequences()->mutable_token_ids()->Add(ids->begin(), ids->end());
  const absl::StatusOr<v1::ScoreResult> result = client->Score(request);
  if (!result.ok()) return ReportError(result.status());
  PrintLine(show(*result));
  return kExitOk;
}

int RunTokenize(Client* client, const GlobalFlags& global, const TokenizeFlags& flags) {
  const auto show = [&global](const v1::TokenizeResult& result) {
    return global.json ? ToJsonLine(result) : absl::StrJoin(result.token_ids(), " ");
  };
  v1::TokenizeRequest request;
  request.set_parse_special(flags.parse_special);
  if (!flags.batch.requests.empty()) {
    if (flags.text.has_value()) return ReportUsage("--requests: the texts come from its lines; drop TEXT");
    return RunBatch<v1::TokenizeRequest, v1::TokenizeResult>(
        flags.batch, "tokenize", request, [client](const v1::TokenizeRequest& line) { return client->Tokenize(line); }, show);
  }
  if (!flags.text.has_value()) return ReportUsage("tokenize: give TEXT or --requests");
  request.set_text(*flags.text);
  const absl::StatusOr<v1::TokenizeResult> result = client->Tokenize(request);
  if (!result.ok()) return ReportError(result.status());
  PrintLine(show(*result));
  return kExitOk;
}

int RunDetokenize(Client* client, const GlobalFlags& global, const DetokenizeFlags& flags) {
  const auto show = [&global](const v1::DetokenizeResult& result) { return global.json ? ToJsonLine(result) : result.text(); };
  v1::DetokenizeRequest request;
  request.set_skip_special(flags.skip_special);
  if (!flags.batch.requests.empty()) {
    if (!flags.ids.empty()) return ReportUsage("--requests: the ids come from its lines; drop IDS");
    return RunBatch<v1::DetokenizeRequest, v1::DetokenizeResult>(
        flags.batch, "detokenize", request, [client](const v1::DetokenizeRequest& line) { return client->Detokenize(line); }, show);
  }
  if (flags.ids.empty()) return ReportUsage("detokenize: give IDS or --requests");
  const absl::StatusOr<std::vector<uint32_t>> ids = ParseTokenIds(absl::StrJoin(flags.ids, " "));
  if (!ids.ok()) return ReportUsage("detokenize: " + std::string(ids.status().message()));
  request.mutable_token_ids()->Add(ids->begin(), ids->end());
  const absl::StatusOr<v1::DetokenizeResult> result = client->Detokenize(request);
  if (!result.ok()) return ReportError(result.status());
  PrintLine(show(*result));
  return kExitOk;
}

int RunInfo(Client* client, const GlobalFlags& global) {
  const absl::StatusOr<v1::ServerInfo> server = client->GetServerInfo();
  if (!server.ok()) return ReportError(server.status());
  const absl::StatusOr<v1::ModelInfo> model = client->GetModelInfo();
  if (!model.ok()) return ReportError(model.status());
  if (global.json) {
    PrintLine(ToJsonLine(*server, *model));
  } else {
    PrintLine(absl::StrCat(server->DebugString(), model->DebugString()));
  }
  return kExitOk;
}

int RunHealth(Client* client, const GlobalFlags& global, const std::string& service) {
  const absl::StatusOr<std::string> status = client->Health(service);
  if (!status.ok()) return ReportError(status.status());
  PrintLine(global.json ? absl::StrCat("{\"status\":\"", *status, "\"}") : *status);
  return *status == "SERVING" ? kExitOk : kExitRefused;
}

int RunLoads(Client* client, const GlobalFlags& global) {
  const absl::StatusOr<v1::Loads> loads = client->GetLoads();
  if (!loads.ok()) return ReportError(loads.status());
  PrintLine(global.json ? ToJsonLine(*loads) : loads->DebugString());
  return kExitOk;
}

}  // namespace bebop
