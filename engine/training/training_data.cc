// SPDX-License-Identifier: Apache-2.0
#include "engine/training/training_data.h"

#include <algorithm>
#include <optional>
#include <string_view>
#include <utility>

#include "engine/base/status_macros.h"
#include "engine/formats/file.h"
#include "engine/formats/json.h"
#include "engine/formats/strings.h"
#include "engine/weights/weight_digest.h"
#include "kernels/common/check.h"
#include "kernels/common/philox.h"

namespace bebop {
namespace {

// A line of a large group (64 samples of 8k tokens with a handful of arrays a token) stays within these.
constexpr JsonLimits kLineLimits = {.max_bytes = size_t{256} << 20, .max_depth = 16, .max_values = size_t{8} << 20};
// Philox counters of the shuffles: its own purpose, so that they share no numbers with initial weights of the same seed.
constexpr uint32_t kShufflePurpose = 0x73687566;

class Reader {
 public:
  Reader(std::string path, const TrainingDataOptions& options, TrainingData& data)
      : path_(std::move(path)), options_(options), data_(data) {}

  absl::Status Line(std::string_view text, int64_t number) {
    line_ = number;
    const std::string name = StrCat(path_, ": line ", number);
    BEBOP_ASSIGN_OR_RETURN(const JsonValue value, ParseJson(text, name, kLineLimits));
    BEBOP_ASSIGN_OR_RETURN(const JsonObject object, JsonObject::Open(value, name));
    ++num_lines_;
    // What `bebop generate --requests` prints in place of a request that was refused.
    if (object.Has("error") && !object.Has("samples") && !object.Has("token_ids")) {
      ++data_.counts.skipped_failed;
      return absl::OkStatus();
    }
    if (object.Has("token_ids") == object.Has("samples")) {
      return absl::InvalidArgumentError(StrCat(name, ": expected either \"token_ids\" or, of a GenerateResult, \"samples\", got ",
                                               object.Has("samples") ? "both" : "neither"));
    }
    return object.Has("token_ids") ? Document(object) : Samples(object, name);
  }

  // The file has been read.
  absl::Status Finish() const {
    if (!data_.documents.empty()) return absl::OkStatus();
    if (num_lines_ == 0)
      return absl::InvalidArgumentError(StrCat(path_, ": expected lines of JSON with documents, got an empty file"));
    const TrainingDataCounts& counts = data_.counts;
    return absl::InvalidArgumentError(
        StrCat(path_, ": expected documents to train on, got none: ", counts.skipped_short, " skipped with fewer than ",
               options_.num_steps_ahead + 2, " tokens (--num-steps-ahead ", options_.num_steps_ahead,
               " + 2) or nothing to predict, ", counts.skipped_failed, " that had failed", CutAwayText()));
  }

 private:
  std::string CutAwayText() const {
    if (num_cut_away_ == 0) return "";
    return StrCat("; ", num_cut_away_, " of them have more tokens, which --max-seq-len ", options_.max_seq_len,
                  " cuts off (by default --batch-tokens)");
  }

  absl::Status Document(const JsonObject& object) {
    TrainingDocument document;
    document.line = line_;
    BEBOP_RETURN_IF_ERROR(AppendIds(object, "", "token_ids", document.token_ids));
    BEBOP_ASSIGN_OR_RETURN(document.loss_start, LossStart(object, document, 0));
    Add(std::move(document));
    return absl::OkStatus();
  }

  absl::Status Samples(const JsonObject& object, const std::string& name) {
    std::vector<uint32_t> prompt;
    if (!object.Has("prompt_token_ids")) return NoPrompt(object);
    BEBOP_RETURN_IF_ERROR(AppendIds(object, "", "prompt_token_ids", prompt));
    if (prompt.empty()) return NoPrompt(object);
    BEBOP_ASSIGN_OR_RETURN(const JsonValue::Array* samples, object.Array("samples"));
    for (size_t i = 0; i < samples->size(); ++i) {
      const std::string path = StrCat("samples[", i, "].");
      BEBOP_RETURN_IF_ERROR(JsonObject::Open((*samples)[i], name, path.substr(0, path.size() - 1)).status());
      const JsonObject sample((*samples)[i], name, path);
      if (sample.Has("finish")) {
        BEBOP_ASSIGN_OR_RETURN(const JsonObject finish, sample.Object("finish"));
        BEBOP_ASSIGN_OR_RETURN(const std::string reason, finish.String("reason", std::string()));
        // The model broke down in it. A sample that was cut short for any other reason is the model's own as far as it goes.
        if (reason == "NON_FINITE") {
          ++data_.counts.skipped_failed;
          continue;
        }
      }
      TrainingDocument document;
      document.token_ids = prompt;
      document.line = line_;
      document.sample = static_cast<int32_t>(i);
      BEBOP_RETURN_IF_ERROR(AppendIds(sample, path, "token_ids", document.token_ids));
      BEBOP_ASSIGN_OR_RETURN(document.loss_start, LossStart(object, document, static_cast<int64_t>(prompt.size())));
      Add(std::move(document));
    }
    return absl::OkStatus();
  }

  static absl::Status NoPrompt(const JsonObject& object) {
    return object.Unexpected("prompt_token_ids",
                             "the prompt's ids beside \"samples\" (`bebop rollouts` writes them; so does a request with "
                             "\"output\": {\"prompt\": true})");
  }

  // `path` is where `object` is in its line.
  absl::Status AppendIds(const JsonObject& object, std::string_view path, std::string_view key,
                         std::vector<uint32_t>& ids) const {
    BEBOP_ASSIGN_OR_RETURN(const JsonValue::Array* values, object.Array(key));
    ids.reserve(ids.size() + values->size());
    for (size_t i = 0; i < values->size(); ++i) {
      const int64_t* id = (*values)[i].integer();
      if (id == nullptr || *id < 0 || *id >= options_.vocab_size) {
        const bool is_id = id != nullptr && *id >= 0;
        return absl::InvalidArgumentError(StrCat(
            path_, ": line ", line_, ": ", path, key, "[", i, "]: expected a token id in [0, ", options_.vocab_size - 1,
            "] as the model has them, got ", JsonValue::Describe(&(*values)[i]), is_id ? " (data of another vocabulary)" : ""));
      }
      ids.push_back(static_cast<uint32_t>(*id));
    }
    return absl::OkStatus();
  }

  absl::StatusOr<int32_t> LossStart(const JsonObject& object, const TrainingDocument& document, int64_t fallback) const {
    BEBOP_ASSIGN_OR_RETURN(const int64_t start,
                           object.Integer("loss_start", 0, static_cast<int64_t>(document.token_ids.size()), fallback));
    return static_cast<int32_t>(start);
  }

  void Add(TrainingDocument document) {
    TrainingDataCounts& counts = data_.counts;
    const bool too_long = document.token_ids.size() > static_cast<size_t>(options_.max_seq_len);
    if (too_long) document.token_ids.resize(static_cast<size_t>(options_.max_seq_len));
    const int64_t size = static_cast<int64_t>(document.token_ids.size());
    if (size < options_.num_steps_ahead + 2 || document.loss_start >= size) {
      ++counts.skipped_short;
      num_cut_away_ += too_long;
      return;
    }
    counts.truncated += too_long;
    ++counts.documents;
    counts.tokens += size;
    counts.loss_tokens += size - document.loss_start;
    data_.documents.push_back(std::move(document));
  }

  const std::string path_;
  const TrainingDataOptions options_;
  TrainingData& data_;
  int64_t line_ = 0;
  int64_t num_lines_ = 0;     // that are not empty
  int64_t num_cut_away_ = 0;  // documents that were skipped and too long before
};

// A stream of 64-bit words that (seed, epoch) decide.
class ShuffleWords {
 public:
  ShuffleWords(uint64_t seed, int64_t epoch) : seed_(seed), epoch_(static_cast<uint64_t>(epoch)) {}

  // Uniform in [0, bound), exactly: what a division would favour is drawn again. REQUIRES: bound > 0.
  uint64_t Below(uint64_t bound) {
    const uint64_t too_few = (0 - bound) % bound;  // 2^64 mod bound
    while (true) {
      const uint64_t word = Next();
      if (word >= too_few) return word % bound;
    }
  }

 private:
  uint64_t Next() {
    const uint32_t low = static_cast<uint32_t>(epoch_), high = static_cast<uint32_t>(epoch_ >> 32);
    const auto words = Philox4x32(seed_, {count_++, low, high, kShufflePurpose});
    return static_cast<uint64_t>(words[0]) << 32 | words[1];
  }

  const uint64_t seed_, epoch_;
  uint32_t count_ = 0;
};

}  // namespace

absl::StatusOr<TrainingData> ReadTrainingData(const std::string& path, const TrainingDataOptions& options) {
  BEBOP_CHECK(options.max_seq_len > options.num_steps_ahead + 1);
  BEBOP_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(path));
  TrainingData data;
  Reader reader(path, options, data);
  std::string_view rest = file.bytes();
  for (int64_t number = 1; !rest.empty(); ++number) {
    const size_t end = std::min(rest.find('\n'), rest.size());
    const std::string_view line = rest.substr(0, end);
    rest.remove_prefix(std::min(end + 1, rest.size()));
    if (line.find_first_not_of(" \t\r") != std::string_view::npos) BEBOP_RETURN_IF_ERROR(reader.Line(line, number));
  }
  BEBOP_RETURN_IF_ERROR(reader.Finish());
  data.digest = DigestHex(Sha256Of(file.bytes()));
  return data;
}

std::vector<std::vector<int32_t>> PlanEpoch(const TrainingData& data, int64_t batch_tokens, uint64_t seed, int64_t epoch) {
  std::vector<int32_t> order(data.documents.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
  // Fisher and Yates, by hand: std::shuffle's result differs between libraries.
  ShuffleWords words(seed, epoch);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[words.Below(i)]);

  std::vector<std::vector<int32_t>> batches;
  int64_t room = 0;
  for (const int32_t index : order) {
    const int64_t size = static_cast<int64_t>(data.documents[static_cast<size_t>(index)].token_ids.size());
    BEBOP_CHECK(size <= batch_tokens);
    if (size > room) {
      batches.emplace_back();
      room = batch_tokens;
    }
    batches.back().push_back(index);
    room -= size;
  }
  return batches;
}

}  // namespace bebop
