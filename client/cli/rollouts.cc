// SPDX-License-Identifier: Apache-2.0
// rollouts: training data from a file of prompts, in a file that is good at any moment and from which an interrupted run goes on.
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <csignal>
#include <cstdio>
#include <fstream>
#include <map>
#include <mutex>
#include <random>
#include <sstream>
#include <thread>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "client/cli/batch.h"
#include "client/cli/commands.h"
#include "client/cli/console.h"
#include "engine/formats/sha256.h"
#include "google/protobuf/util/message_differencer.h"
#include "nlohmann/json.hpp"

namespace bebop {
namespace {

absl::Status Errno(const std::string& path) { return absl::ErrnoToStatus(errno, path); }

// `status` with more to its message.
absl::Status WithMore(const absl::Status& status, const std::string& more) {
  absl::Status longer(status.code(), absl::StrCat(status.message(), more));
  status.ForEachPayload(
      [&longer](absl::string_view type_url, const absl::Cord& payload) { longer.SetPayload(type_url, payload); });
  return longer;
}

// ---- prompts ----

struct Prompt {
  int64_t line = 0;             // of the file, from 1
  std::string name;             // request_id of its output line
  v1::GenerateRequest request;  // as it is sent
};

// The seed of prompt `index` = 0, 1, ...: a finaliser of 64 bits (SplitMix64: Steele, Lea, Flood, OOPSLA 2014) of the run's
// stream. A seed of their own for all, since with a common one prompts would share their random numbers, and equal prompts all of
// them.
uint64_t SeedOf(uint64_t run_seed, uint64_t index) {
  uint64_t word = run_seed + (index + 1) * 0x9E3779B97F4A7C15u;
  word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9u;
  word = (word ^ (word >> 27)) * 0x94D049BB133111EBu;
  return word ^ (word >> 31);
}

std::string Sha256Hex(const std::string& bytes) {
  const Sha256Digest digest = Sha256Of(bytes);
  return absl::BytesToHexString(absl::string_view(reinterpret_cast<const char*>(digest.data()), digest.size()));
}

// What a run was started with: kept beside its output as FILE.run, and what another run that would go on has to agree with.
struct Run {
  std::string prompts_digest;  // SHA-256, hex
  int64_t num_prompts = 0;
  uint64_t seed = 0;
  v1::GenerateRequest flags;
};

// Without seeds and names of the run's own; those come with Complete.
absl::StatusOr<std::vector<Prompt>> ReadPrompts(const RolloutsFlags& flags, Run* run) {
  std::ifstream file(flags.prompts, std::ios::binary);
  std::stringstream text;
  if (!file || (file.peek() != std::ifstream::traits_type::eof() && !(text << file.rdbuf()))) {
    return absl::NotFoundError(absl::StrCat("cannot read ", flags.prompts));
  }
  run->prompts_digest = Sha256Hex(text.str());
  run->flags = flags.request;
  std::vector<Prompt> prompts;
  std::map<std::string, int64_t> line_of;  // by name
  std::string line;
  for (int64_t number = 1; std::getline(text, line); ++number) {
    if (line.find_first_not_of(" \t\r\v\f") == std::string::npos) continue;
    Prompt prompt{.line = number, .name = {}, .request = {}};
    if (const absl::Status parsed = FromJson(line, &prompt.request); !parsed.ok()) return MalformedLine(number, parsed);
    prompt.name = prompt.request.request_id().empty() ? absl::StrCat("line-", number) : prompt.request.request_id();
    const auto [twin, is_new] = line_of.emplace(prompt.name, number);
    if (!is_new) {
      return absl::InvalidArgumentError(
          absl::StrCat("line ", number, ": request_id: \"", prompt.name, "\" is that of line ", twin->second, ", too"));
    }
    FillUnset(flags.request, &prompt.request);
    // A repeat must be sampled afresh, not attach to what a run before left at the server.
    prompt.request.clear_request_id();
    prompt.request.mutable_output()->set_prompt(true);
    prompts.push_back(std::move(prompt));
  }
  if (prompts.empty()) return absl::InvalidArgumentError("no prompts");
  run->num_prompts = static_cast<int64_t>(prompts.size());
  return prompts;
}

// ---- FILE.run ----

std::string RunToJson(const Run& run) {
  nlohmann::ordered_json json;
  json["prompts_sha256"] = run.prompts_digest;
  json["num_prompts"] = run.num_prompts;
  json["seed"] = absl::StrCat(run.seed);
  json["flags"] = nlohmann::ordered_json::parse(ToJsonLine(run.flags));
  return json.dump() + "\n";
}

absl::StatusOr<Run> RunFromJson(const std::string& text) {
  const auto json = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  Run run;
  const auto is_string = [&json](const char* key) { return json.contains(key) && json[key].is_string(); };
  if (!json.is_object() || !is_string("prompts_sha256") || !is_string("seed") || !json.contains("flags") ||
      !json.contains("num_prompts") || !json["num_prompts"].is_number_integer() ||
      !absl::SimpleAtoi(json["seed"].get<std::string>(), &run.seed)) {
    return absl::InvalidArgumentError("not what bebop rollouts writes");
  }
  run.prompts_digest = json["prompts_sha256"].get<std::string>();
  run.num_prompts = json["num_prompts"].get<int64_t>();
  if (absl::Status status = FromJson(json["flags"].dump(), &run.flags); !status.ok()) return status;
  return run;
}

// INVALID_ARGUMENT with both values where `now` would not continue `then`.
absl::Status CheckSameRun(const Run& then, const Run& now, const std::optional<uint64_t>& seed) {
  if (then.prompts_digest != now.prompts_digest) {
    return absl::InvalidArgumentError(absl::StrCat("--prompts: ", now.num_prompts, " prompts with SHA-256 ", now.prompts_digest,
                                                   ", expected the ", then.num_prompts, " with ", then.prompts_digest));
  }
  if (seed.has_value() && *seed != then.seed) {
    return absl::InvalidArgumentError(absl::StrCat("--seed: ", *seed, ", expected ", then.seed));
  }
  std::string differences;
  google::protobuf::util::MessageDifferencer differencer;
  differencer.ReportDifferencesToString(&differences);
  if (differencer.Compare(then.flags, now.flags)) return absl::OkStatus();
  while (!differences.empty() && differences.back() == '\n') differences.pop_back();
  return absl::InvalidArgumentError(absl::StrCat("flags, then -> now: ", absl::StrReplaceAll(differences, {{"\n", "; "}})));
}

// ---- files ----

absl::Status WriteAll(int descriptor, const std::string& path, absl::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t count = write(descriptor, bytes.data(), bytes.size());
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return Errno(path);
    bytes.remove_prefix(static_cast<size_t>(count));
  }
  return absl::OkStatus();
}

// A file that takes the place of `path` whole or not at all.
class Replacement {
 public:
  explicit Replacement(std::string path)
      : path_(std::move(path)),
        temporary_(path_ + ".tmp"),
        descriptor_(open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666)),
        status_(descriptor_ < 0 ? Errno(temporary_) : absl::OkStatus()) {}
  ~Replacement() {
    if (descriptor_ >= 0) close(descriptor_);
    if (!placed_) unlink(temporary_.c_str());
  }
  Replacement(const Replacement&) = delete;
  Replacement& operator=(const Replacement&) = delete;

  void Write(absl::string_view bytes) {
    if (status_.ok()) status_ = WriteAll(descriptor_, temporary_, bytes);
  }
  absl::Status Place() {
    if (status_.ok() && fsync(descriptor_) != 0) status_ = Errno(temporary_);
    if (status_.ok() && rename(temporary_.c_str(), path_.c_str()) != 0) status_ = Errno(path_);
    placed_ = status_.ok();
    if (!placed_) return status_;
    const size_t slash = path_.rfind('/');
    const std::string folder = slash == std::string::npos ? "." : path_.substr(0, slash + 1);
    const int folder_descriptor = open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (folder_descriptor < 0) return Errno(folder);
    if (fsync(folder_descriptor) != 0) status_ = Errno(folder);  // else a crash may bring the old entry back
    close(folder_descriptor);
    return status_;
  }

 private:
  const std::string path_, temporary_;
  const int descriptor_;
  absl::Status status_;
  bool placed_ = false;
};

// The output: whole lines, each the GenerateResult of a prompt. While it grows in order of arrival, so that nothing that has
// arrived waits in memory for a slower prompt; a run that has come to its end puts it into the order of the prompts.
class OutputFile {
 public:
  explicit OutputFile(std::string path) : path_(std::move(path)) {}
  ~OutputFile() {
    if (descriptor_ >= 0) close(descriptor_);
  }
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  // Opens or makes it, for this process alone.
  absl::Status Open() {
    descriptor_ = open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    struct stat info = {}, named = {};
    if (descriptor_ < 0 || fstat(descriptor_, &info) != 0) return Errno(path_);
    if (!S_ISREG(info.st_mode)) return absl::InvalidArgumentError(absl::StrCat(path_, ": expected a regular file"));
    const auto busy = [this] {
      return absl::FailedPreconditionError(absl::StrCat(path_, ": another bebop rollouts is writing it"));
    };
    if (flock(descriptor_, LOCK_EX | LOCK_NB) != 0) return errno == EWOULDBLOCK ? busy() : Errno(path_);
    if (stat(path_.c_str(), &named) != 0) return Errno(path_);
    if (named.st_dev != info.st_dev || named.st_ino != info.st_ino) return busy();  // it was replaced by a sorted one since
    is_empty_ = info.st_size == 0;
    return absl::OkStatus();
  }

  bool is_empty() const { return is_empty_; }
  size_t num_lines() const { return lines_.size(); }
  const std::vector<bool>& has() const { return has_; }  // by prompt

  // Notes which prompts' lines are there and cuts what follows the last whole line. INVALID_ARGUMENT: a line is not one of
  // `prompts`.
  absl::Status ReadLines(const std::vector<Prompt>& prompts) {
    has_.assign(prompts.size(), false);
    std::map<std::string, size_t> index_of;
    for (size_t i = 0; i < prompts.size(); ++i) index_of.emplace(prompts[i].name, i);
    std::ifstream file(path_, std::ios::binary);
    std::string line;
    for (int64_t number = 1; std::getline(file, line); ++number) {
      if (file.eof()) break;  // no newline: torn
      const auto refuse = [&](const std::string& why) {
        return absl::InvalidArgumentError(absl::StrCat(path_, ": line ", number, ": ", why));
      };
      v1::GenerateResult result;
      if (const absl::Status parsed = FromJson(line, &result); !parsed.ok()) return refuse(std::string(parsed.message()));
      const auto found = index_of.find(result.request_id());
      if (found == index_of.end()) return refuse(absl::StrCat("request_id: \"", result.request_id(), "\" is not in the prompts"));
      if (has_[found->second]) return refuse(absl::StrCat("request_id: \"", result.request_id(), "\" is there already"));
      const Prompt& prompt = prompts[found->second];
      if (absl::StrJoin(result.prompt_token_ids(), " ") != absl::StrJoin(prompt.request.prompt_token_ids(), " ")) {
        return refuse(absl::StrCat("prompt_token_ids: [", absl::StrJoin(result.prompt_token_ids(), " "), "], expected [",
                                   absl::StrJoin(prompt.request.prompt_token_ids(), " "), "] as in line ", prompt.line,
                                   " of the prompts"));
      }
      Add(found->second, line.size() + 1);
    }
    if (file.bad()) return absl::DataLossError(absl::StrCat("cannot read ", path_));
    return CutTail();
  }

  // Adds the lines of these prompts and syncs them. After an error the file ends with the last line that is whole.
  absl::Status Append(const std::vector<std::pair<size_t, std::string>>& lines) {
    std::string bytes;
    for (const auto& [prompt, line] : lines) absl::StrAppend(&bytes, line, "\n");
    absl::Status status = WriteAll(descriptor_, path_, bytes);
    if (status.ok() && fdatasync(descriptor_) != 0) status = Errno(path_);
    if (!status.ok()) {
      CutTail().IgnoreError();  // what cannot be cut is torn, and cut by the next run
      return status;
    }
    for (const auto& [prompt, line] : lines) Add(prompt, line.size() + 1);
    return absl::OkStatus();
  }

  // Puts the lines into the order of the prompts. After an error they are as they were.
  absl::Status Sort() {
    const auto by_prompt = [](const Line& a, const Line& b) { return a.prompt < b.prompt; };
    if (std::is_sorted(lines_.begin(), lines_.end(), by_prompt)) return absl::OkStatus();
    std::sort(lines_.begin(), lines_.end(), by_prompt);
    Replacement sorted(path_);
    std::string bytes;
    for (const Line& line : lines_) {
      bytes.resize(line.size);
      for (size_t done = 0; done < line.size;) {
        const ssize_t count = pread(descriptor_, bytes.data() + done, line.size - done, line.offset + static_cast<off_t>(done));
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) return count < 0 ? Errno(path_) : absl::DataLossError(absl::StrCat(path_, ": became shorter"));
        done += static_cast<size_t>(count);
      }
      sorted.Write(bytes);
    }
    return sorted.Place();
  }

 private:
  struct Line {
    size_t prompt = 0;
    off_t offset = 0;
    size_t size = 0;  // with its newline
  };

  void Add(size_t prompt, size_t size) {
    lines_.push_back({prompt, end_, size});
    end_ += static_cast<off_t>(size);
    has_[prompt] = true;
  }

  absl::Status CutTail() {
    if (ftruncate(descriptor_, end_) != 0 || lseek(descriptor_, end_, SEEK_SET) < 0) return Errno(path_);
    return absl::OkStatus();
  }

  const std::string path_;
  int descriptor_ = -1;
  bool is_empty_ = true;
  std::vector<Line> lines_;
  off_t end_ = 0;  // of the last whole line
  std::vector<bool> has_;
};

// ---- asking ----

// Before a request that a pause or new weights cut short is sent again.
constexpr absl::Duration kBetweenRepeats = absl::Milliseconds(100);

// Whether the server stands still until somebody resumes it, wakes it or brings new weights.
bool IsOfTheServer(const absl::Status& status) {
  const ErrorDetails details = GetErrorDetails(status);
  return details.metadata.contains("waits_for") || details.reason == "STEP_NOT_REACHED";
}

// Whether the server refused this one request, so that others may fare better.
bool IsOfTheRequest(const absl::Status& status) {
  const bool refused = absl::IsInvalidArgument(status) || absl::IsFailedPrecondition(status) || absl::IsResourceExhausted(status) ||
                       absl::IsOutOfRange(status) || absl::IsDeadlineExceeded(status);
  return refused && !IsOfTheServer(status);
}

bool AnyEnded(const v1::GenerateResult& result, std::initializer_list<v1::Finish::Reason> reasons) {
  return std::any_of(result.samples().begin(), result.samples().end(), [&reasons](const v1::SampleResult& sample) {
    return std::find(reasons.begin(), reasons.end(), sample.finish().reason()) != reasons.end();
  });
}

// Keeps `concurrency` requests in flight and hands their results to the thread that writes.
class Generation {
 public:
  using Reply = std::pair<size_t, absl::StatusOr<v1::GenerateResult>>;  // by prompt

  Generation(Client* client, const std::vector<Prompt>& prompts, std::vector<size_t> todo, int32_t concurrency)
      : client_(client), prompts_(prompts), todo_(std::move(todo)) {
    running_ = std::min(todo_.size(), static_cast<size_t>(std::max(1, concurrency)));
    const size_t num_threads = running_;  // threads lower running_ when they end
    for (size_t i = 0; i < num_threads; ++i) threads_.emplace_back([this] { Work(); });
  }
  ~Generation() {
    Stop();
    for (std::thread& thread : threads_) thread.join();
  }
  Generation(const Generation&) = delete;
  Generation& operator=(const Generation&) = delete;

  // What has come in since the last call; waits for something. Empty: all of it has been handed out. What earlier calls returned
  // is safe now: until then a request counts as in flight.
  std::vector<Reply> Take() {
    std::unique_lock<std::mutex> lock(mutex_);
    num_safe_ = num_taken_;
    changed_.notify_all();
    changed_.wait(lock, [this] { return !replies_.empty() || running_ == 0; });
    std::vector<Reply> replies;
    replies.swap(replies_);
    num_taken_ += replies.size();
    return replies;
  }

  // Nothing more is asked; what is in flight still comes in.
  void Stop() {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopped_ = true;
    changed_.notify_all();
  }

 private:
  void Work() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (!stopped_ && next_ < todo_.size()) {
      const size_t prompt = todo_[next_++];
      lock.unlock();
      absl::StatusOr<v1::GenerateResult> result = Ask(prompts_[prompt].request);
      if (result.ok()) result->set_request_id(prompts_[prompt].name);
      lock.lock();
      replies_.emplace_back(prompt, std::move(result));
      const size_t number = num_taken_ + replies_.size();
      changed_.notify_all();
      changed_.wait(lock, [&] { return stopped_ || num_safe_ >= number; });
    }
    --running_;
    changed_.notify_all();
  }

  absl::StatusOr<v1::GenerateResult> Ask(const v1::GenerateRequest& request) {
    while (true) {
      absl::StatusOr<v1::GenerateResult> result = client_->Generate(request);
      if (absl::IsResourceExhausted(result.status())) {
        const std::optional<absl::Duration> pause = GetErrorDetails(result.status()).retry_after;
        if (!pause.has_value() || !Pause(std::max(*pause, absl::Milliseconds(10)))) return result;
        continue;
      }
      if (!result.ok()) return result;
      if (AnyEnded(*result, {v1::Finish::DRAINED})) {
        return WithReason(absl::UnavailableError("the server shut down before the samples were whole"), "DRAINING");
      }
      // Cut short by a pause or by new weights: what a run without them would hold comes from asking again.
      if (!AnyEnded(*result, {v1::Finish::ABORTED, v1::Finish::SUPERSEDED})) return result;
      if (!Pause(kBetweenRepeats)) return absl::CancelledError("the run has ended, and the samples are not whole");
    }
  }

  // False when the run stops meanwhile.
  bool Pause(absl::Duration duration) {
    std::unique_lock<std::mutex> lock(mutex_);
    return !changed_.wait_for(lock, absl::ToChronoMilliseconds(duration), [this] { return stopped_; });
  }

  Client* const client_;
  const std::vector<Prompt>& prompts_;
  const std::vector<size_t> todo_;
  std::mutex mutex_;
  std::condition_variable changed_;  // any of what follows, which is guarded by mutex_
  std::vector<Reply> replies_;       // in order of arrival
  size_t num_taken_ = 0;             // replies handed out
  size_t num_safe_ = 0;              // those of them that are in the file
  size_t next_ = 0;
  size_t running_ = 0;  // threads
  bool stopped_ = false;
  std::vector<std::thread> threads_;
};

// ---- the verb ----

struct Totals {
  int64_t written = 0, refused = 0, samples = 0, tokens = 0;  // of this run
  int64_t spec_steps = 0, accepted = 0;                       // verifications, and drafts that they accepted
  std::map<std::string, int64_t> finish;                      // samples by reason
  double seconds = 0.0;

  void Add(const v1::GenerateResult& result) {
    ++written;
    samples += result.samples_size();
    for (const v1::SampleResult& sample : result.samples()) {
      tokens += sample.token_ids_size();
      spec_steps += sample.spec().num_spec_steps();
      accepted += sample.spec().num_accepted_draft_tokens();
      ++finish[v1::Finish::Reason_Name(sample.finish().reason())];
    }
  }
  double tokens_per_second() const { return seconds > 0.0 ? static_cast<double>(tokens) / seconds : 0.0; }
  // Tokens a verification; 1 without drafts.
  double accept_length() const {
    return spec_steps > 0 ? 1.0 + static_cast<double>(accepted) / static_cast<double>(spec_steps) : 1.0;
  }
};

// Between two lines that say how far the run is, where stderr is no terminal.
constexpr absl::Duration kBetweenLines = absl::Seconds(30);

// What SIGINT and SIGTERM say before they end the process. What is in the file is synced, so nothing is left to do.
std::string* last_words = nullptr;

extern "C" void SayAndEnd(int signal_number) {  // the signal's default action is restored by then (SA_RESETHAND)
  if (write(STDERR_FILENO, last_words->data(), last_words->size()) < 0) {
    // There is nobody to tell.
  }
  raise(signal_number);
}

// Ignored signals stay so.
void HandleSignals(const std::string& words) {
  last_words = new std::string(words);  // lives as long as the process
  for (const int signal_number : {SIGINT, SIGTERM}) {
    struct sigaction action = {};
    if (sigaction(signal_number, nullptr, &action) != 0 || action.sa_handler == SIG_IGN) continue;
    action = {};
    action.sa_handler = SayAndEnd;
    action.sa_flags = static_cast<int>(SA_RESETHAND);
    sigaction(signal_number, &action, nullptr);
  }
}

std::string Eta(double seconds) {
  const auto whole = static_cast<int64_t>(seconds);
  return absl::StrFormat("%d:%02d:%02d", whole / 3600, whole / 60 % 60, whole % 60);
}

void PrintSummary(const GlobalFlags& global, const RolloutsFlags& flags, const Run& run, size_t there, const Totals& totals) {
  if (global.json) {
    nlohmann::ordered_json json;
    json["out"] = flags.out;
    json["prompts"] = run.num_prompts;
    json["there"] = there;
    json["written"] = totals.written;
    json["refused"] = totals.refused;
    json["samples"] = totals.samples;
    json["tokens"] = totals.tokens;
    json["finish"] = totals.finish;
    json["seconds"] = totals.seconds;
    json["tokens_per_second"] = totals.tokens_per_second();
    json["accept_length"] = totals.accept_length();
    json["seed"] = absl::StrCat(run.seed);
    PrintLine(json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace));  // a path may be no UTF-8
    return;
  }
  PrintLine(absl::StrFormat(
      "%s: %d of %d prompts; in this run %d with %d samples of %d tokens in %.1f s, %.1f tokens/s, accept length %.3f; seed %d",
      flags.out, there, run.num_prompts, totals.written, totals.samples, totals.tokens, totals.seconds,
      totals.tokens_per_second(), totals.accept_length(), run.seed));
}

// Opens the output and finds out whether it goes on with a run (whose seed then counts) or begins one.
absl::Status Prepare(const RolloutsFlags& flags, Run* run, std::vector<Prompt>* prompts, OutputFile* out) {
  if (absl::Status status = out->Open(); !status.ok()) return status;
  const std::string run_path = flags.out + ".run";
  if (out->is_empty()) {
    std::random_device device;
    run->seed = flags.seed.has_value() ? *flags.seed : static_cast<uint64_t>(device()) << 32 | device();
    Replacement file(run_path);
    file.Write(RunToJson(*run));
    if (absl::Status status = file.Place(); !status.ok()) return status;
  } else {
    std::ifstream file(run_path);
    if (!file) {
      return absl::InvalidArgumentError(
          absl::StrCat(flags.out, ": has content, and there is no ", run_path, " to go on from; name another --out"));
    }
    std::stringstream text;
    text << file.rdbuf();
    const absl::StatusOr<Run> then = RunFromJson(text.str());
    if (!then.ok()) return absl::InvalidArgumentError(absl::StrCat(run_path, ": ", then.status().message()));
    if (const absl::Status same = CheckSameRun(*then, *run, flags.seed); !same.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat(flags.out, " was begun otherwise: ", same.message(), "; name another --out, or remove it"));
    }
    run->seed = then->seed;
  }
  for (size_t i = 0; i < prompts->size(); ++i) {
    v1::GenerateRequest& request = (*prompts)[i].request;
    // Handles hold the seed of what they go on with.
    if (!request.sampling().has_seed() && request.resume_size() == 0) request.mutable_sampling()->set_seed(SeedOf(run->seed, i));
  }
  return out->ReadLines(*prompts);
}

}  // namespace

int RunRollouts(Client* client, const GlobalFlags& global, const RolloutsFlags& flags) {
  Run run;
  absl::StatusOr<std::vector<Prompt>> prompts = ReadPrompts(flags, &run);
  if (!prompts.ok()) return ReportUsage(absl::StrCat("--prompts: ", flags.prompts, ": ", prompts.status().message()));
  OutputFile out(flags.out);
  if (const absl::Status status = Prepare(flags, &run, &*prompts, &out); !status.ok()) {
    return ReportUsage(absl::StrCat("--out: ", status.message()));
  }
  std::vector<size_t> todo;
  for (size_t i = 0; i < prompts->size(); ++i) {
    if (!out.has()[i]) todo.push_back(i);
  }

  HandleSignals(absl::StrCat("\nstopped: ", flags.out, " keeps what has come in, and the same command goes on from there\n"));

  Totals totals;
  const absl::Time start = absl::Now();
  const bool has_terminal = isatty(STDERR_FILENO) == 1;
  absl::Time last_line = start;
  absl::Status failure;  // the one that ended the run
  int exit_code = kExitOk;
  {
    Progress progress("rollouts", run.num_prompts);
    Generation generation(client, *prompts, todo, flags.concurrency);
    const auto fail = [&](const absl::Status& status) {
      if (failure.ok()) failure = status;
      generation.Stop();
    };
    for (std::vector<Generation::Reply> replies = generation.Take(); !replies.empty(); replies = generation.Take()) {
      std::vector<std::pair<size_t, std::string>> lines;
      Totals with_these = totals;
      for (const auto& [prompt, result] : replies) {
        if (result.ok()) {
          lines.emplace_back(prompt, ToJsonLine(*result));
          with_these.Add(*result);
        } else if (IsOfTheRequest(result.status()) && failure.ok()) {
          ++with_these.refused;
          exit_code = std::max(exit_code, ReportError(WithMore(result.status(), absl::StrCat(" (line ", (*prompts)[prompt].line,
                                                                                             " of ", flags.prompts, ")"))));
        } else {
          fail(result.status());
        }
      }
      if (const absl::Status status = out.Append(lines); !status.ok()) {
        fail(status);
        continue;
      }
      totals = std::move(with_these);
      totals.seconds = absl::ToDoubleSeconds(absl::Now() - start);
      const auto done = static_cast<double>(totals.written + totals.refused);
      const std::string rate =
          absl::StrFormat(", %.0f tokens/s, %s left", totals.tokens_per_second(),
                          done > 0.0 ? Eta(totals.seconds / done * (static_cast<double>(todo.size()) - done)) : "?");
      progress.Show(static_cast<int64_t>(out.num_lines()), rate);
      if (!has_terminal && absl::Now() - last_line >= kBetweenLines) {
        last_line = absl::Now();
        std::fprintf(stderr, "rollouts: %s\n", absl::StrCat(out.num_lines(), "/", run.num_prompts, rate).c_str());
      }
    }
  }
  totals.seconds = absl::ToDoubleSeconds(absl::Now() - start);
  if (failure.ok()) failure = out.Sort();
  PrintSummary(global, flags, run, out.num_lines(), totals);
  if (failure.ok()) return exit_code;
  return ReportError(WithMore(failure, absl::StrCat("; ", flags.out, " has ", out.num_lines(), " of ", run.num_prompts,
                                                    " prompts, and the same command goes on from there")));
}

}  // namespace bebop
