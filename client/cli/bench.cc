// SPDX-License-Identifier: Apache-2.0
// bench: load on a server, closed loop (a number of requests in flight) or open loop (arrivals at a rate, whatever the replies do).
#include <atomic>
#include <chrono>
#include <mutex>
#include <random>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "client/cli/commands.h"
#include "client/cli/console.h"
#include "client/cli/statistics.h"
#include "nlohmann/json.hpp"

namespace bebop {
namespace {

using SteadyClock = std::chrono::steady_clock;

double Seconds(SteadyClock::duration duration) { return std::chrono::duration<double>(duration).count(); }

// What the requests of one phase saw. Guarded by `mutex`.
struct Measurements {
  std::mutex mutex;
  std::vector<double> ttft_ms, inter_token_ms;
  int64_t num_tokens = 0, num_samples = 0, num_spec_steps = 0, num_accepted = 0, num_errors = 0;
  std::vector<int64_t> drafted_per_pos, accepted_per_pos;
  absl::Status first_error;
};

v1::GenerateRequest MakeRequest(const BenchFlags& flags, int32_t vocab_size, uint64_t index) {
  v1::GenerateRequest request;
  std::mt19937_64 random(flags.seed * 1000003 + index);
  std::uniform_int_distribution<uint32_t> token(0, static_cast<uint32_t>(vocab_size) - 1);
  for (int32_t i = 0; i < flags.prompt_len; ++i) request.add_prompt_token_ids(token(random));
  request.set_num_samples(flags.num_samples);
  request.mutable_sampling()->set_seed(random());
  request.mutable_sampling()->set_temperature(static_cast<float>(flags.temperature));
  request.mutable_stopping()->set_max_new_tokens(flags.output_len);
  request.mutable_stopping()->set_ignore_eos(true);
  request.mutable_output()->set_stream_tokens(true);
  request.mutable_speculation()->set_mode(flags.mode);
  if (flags.num_draft_tokens) request.mutable_speculation()->set_num_draft_tokens(*flags.num_draft_tokens);
  if (flags.synthetic_acceptance) request.mutable_speculation()->set_synthetic_acceptance(static_cast<float>(*flags.synthetic_acceptance));
  return request;
}

// Runs one request and adds what it saw. `start`: when it was due, so that an open loop charges its own lateness to the server.
void RunOne(Client* client, const v1::GenerateRequest& request, SteadyClock::time_point start, Measurements* all) {
  std::vector<double> ttft_ms, inter_token_ms;
  std::vector<SteadyClock::time_point> last(static_cast<size_t>(request.num_samples()), start);
  std::vector<bool> has_first(last.size(), false);
  std::vector<v1::SampleResult> samples;
  const absl::Status status = client->GenerateStream(request, [&](const v1::GenerateEvent& event) {
    const auto now = SteadyClock::now();
    if (event.has_token_chunk()) {
      const auto sample = static_cast<size_t>(event.token_chunk().sample_index());
      const int32_t num_tokens = event.token_chunk().token_ids_size();
      if (sample >= last.size() || num_tokens == 0) return true;
      const double elapsed_ms = 1e3 * Seconds(now - last[sample]);
      if (!has_first[sample]) {
        ttft_ms.push_back(elapsed_ms);
        has_first[sample] = true;
      } else {  // tokens that come together share the wait
        inter_token_ms.insert(inter_token_ms.end(), static_cast<size_t>(num_tokens), elapsed_ms / num_tokens);
      }
      last[sample] = now;
    } else if (event.has_sample_result()) {
      samples.push_back(event.sample_result());
    }
    return true;
  });
  const std::lock_guard<std::mutex> lock(all->mutex);
  if (!status.ok()) {
    ++all->num_errors;
    all->first_error.Update(status);
  }
  all->ttft_ms.insert(all->ttft_ms.end(), ttft_ms.begin(), ttft_ms.end());
  all->inter_token_ms.insert(all->inter_token_ms.end(), inter_token_ms.begin(), inter_token_ms.end());
  for (const v1::SampleResult& sample : samples) {
    ++all->num_samples;
    all->num_tokens += sample.token_ids_size();
    all->num_spec_steps += sample.spec().num_spec_steps();
    all->num_accepted += sample.spec().num_accepted_draft_tokens();
    const auto positions = static_cast<size_t>(sample.spec().drafted_per_pos_size());
    if (all->drafted_per_pos.size() < positions) {
      all->drafted_per_pos.resize(positions, 0);
      all->accepted_per_pos.resize(positions, 0);
    }
    for (size_t i = 0; i < positions; ++i) {
      all->drafted_per_pos[i] += sample.spec().drafted_per_pos(static_cast<int>(i));
      all->accepted_per_pos[i] += sample.spec().accepted_per_pos(static_cast<int>(i));
    }
  }
}

// `count` requests as the flags say. `first`: index of the first, so that phases differ.
void RunPhase(Client* client, const BenchFlags& flags, int32_t vocab_size, uint64_t first, int32_t count, bool open_loop, Measurements* all) {
  Progress progress("bench", count);
  std::atomic<int32_t> next = 0, finished = 0;
  std::vector<std::thread> threads;
  if (open_loop) {
    std::mt19937_64 random(flags.seed);
    std::exponential_distribution<double> gap(flags.rate);
    auto due = SteadyClock::now();
    for (int32_t i = 0; i < count; ++i) {
      std::this_thread::sleep_until(due);
      threads.emplace_back([=, &finished] {
        RunOne(client, MakeRequest(flags, vocab_size, first + static_cast<uint64_t>(i)), due, all);
        ++finished;
      });
      progress.Show(finished);
      due += std::chrono::duration_cast<SteadyClock::duration>(std::chrono::duration<double>(gap(random)));
    }
  } else {
    for (int32_t t = 0; t < std::min(flags.concurrency, count); ++t) {
      threads.emplace_back([=, &next, &finished] {
        for (int32_t i = next++; i < count; i = next++) {
          RunOne(client, MakeRequest(flags, vocab_size, first + static_cast<uint64_t>(i)), SteadyClock::now(), all);
          ++finished;
        }
      });
    }
    while (finished < count) {
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
      progress.Show(finished);
    }
  }
  for (std::thread& thread : threads) thread.join();
}

// Bytes of weights that one iteration streams: a target pass with its lm_head, and num_drafts MTP steps with theirs.
double BytesPerIteration(const v1::ModelInfo& model, int32_t num_drafts) {
  return static_cast<double>(model.layer_bytes() + model.lm_head_bytes()) +
         static_cast<double>(num_drafts) * static_cast<double>(model.mtp_bytes() + model.lm_head_bytes());
}

}  // namespace

int RunBench(Client* client, const GlobalFlags& global, const BenchFlags& given) {
  BenchFlags flags = given;
  const absl::StatusOr<v1::ServerInfo> server = client->GetServerInfo();
  if (!server.ok()) return ReportError(server.status());
  const absl::StatusOr<v1::ModelInfo> model = client->GetModelInfo();
  if (!model.ok()) return ReportError(model.status());
  const v1::SpeculationParams& defaults = server->default_speculation();
  if (flags.mode == v1::SpeculationParams::UNSPECIFIED) flags.mode = defaults.mode();
  const bool drafts = flags.mode != v1::SpeculationParams::OFF;
  const int32_t num_drafts = drafts ? flags.num_draft_tokens.value_or(defaults.num_draft_tokens()) : 0;
  if (drafts) flags.num_draft_tokens = num_drafts;
  if (flags.synthetic_accept_length) {
    if (!(*flags.synthetic_accept_length >= 1.0 && *flags.synthetic_accept_length <= num_drafts + 1.0)) {
      return ReportUsage(absl::StrCat("--synthetic-accept-length: ", *flags.synthetic_accept_length, " is not in [1, ", num_drafts + 1, "] (1 + ",
                                      num_drafts, " draft tokens)"));
    }
    flags.synthetic_acceptance = SolveAcceptance(*flags.synthetic_accept_length, num_drafts);
  }

  const bool open_loop = flags.rate > 0.0;
  Measurements warmup, all;
  RunPhase(client, flags, model->vocab_size(), 0, flags.warmup, /*open_loop=*/false, &warmup);
  if (warmup.num_errors > 0) return ReportError(warmup.first_error);
  const absl::StatusOr<v1::Loads> before = client->GetLoads();
  if (!before.ok()) return ReportError(before.status());
  const auto start = SteadyClock::now();
  RunPhase(client, flags, model->vocab_size(), static_cast<uint64_t>(flags.warmup), flags.num_requests, open_loop, &all);
  const double elapsed = Seconds(SteadyClock::now() - start);
  const absl::StatusOr<v1::Loads> after = client->GetLoads();
  if (!after.ok()) return ReportError(after.status());
  if (all.num_errors == flags.num_requests && flags.num_requests > 0) return ReportError(all.first_error);

  const double iterations_per_second = static_cast<double>(after->steps() - before->steps()) / elapsed;
  const double bytes_per_iteration = BytesPerIteration(*model, num_drafts);
  nlohmann::ordered_json result;
  result["tokens_per_second"] = static_cast<double>(all.num_tokens) / elapsed;
  result["iterations_per_second"] = iterations_per_second;  // steps of the engine, prefill included
  result["samples_per_second"] = static_cast<double>(all.num_samples) / elapsed;
  result["accept_length"] = all.num_spec_steps > 0 ? 1.0 + static_cast<double>(all.num_accepted) / static_cast<double>(all.num_spec_steps) : 1.0;
  result["acceptance_per_position"] = nlohmann::ordered_json::array();
  for (size_t i = 0; i < all.drafted_per_pos.size(); ++i) {
    const int64_t drafted = all.drafted_per_pos[i];
    result["acceptance_per_position"].push_back(drafted > 0 ? static_cast<double>(all.accepted_per_pos[i]) / static_cast<double>(drafted) : 0.0);
  }
  result["ttft_ms"] = {{"p50", Quantile(&all.ttft_ms, 0.50)}, {"p99", Quantile(&all.ttft_ms, 0.99)}};
  result["inter_token_ms"] = {{"p50", Quantile(&all.inter_token_ms, 0.50)}, {"p99", Quantile(&all.inter_token_ms, 0.99)}};
  result["effective_gb_per_second"] = bytes_per_iteration * iterations_per_second * 1e-9;
  result["bytes_per_iteration"] = bytes_per_iteration;
  result["errors"] = all.num_errors;
  result["seconds"] = elapsed;
  result["tokens"] = all.num_tokens;
  if (global.json) {
    PrintLine(result.dump());
  } else {
    for (const auto& [key, value] : result.items()) PrintLine(absl::StrFormat("%-24s %s", key, value.dump()));
  }
  if (all.num_errors > 0) {
    ReportError(all.first_error);
    return kExitRefused;
  }
  return kExitOk;
}

}  // namespace bebop
