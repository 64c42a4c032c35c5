// SPDX-License-Identifier: Apache-2.0
#include "engine/training/training_data.h"

#include <gtest/gtest.h>

#include <map>
#include <set>
#include <string>
#include <vector>

#include "engine/formats/strings.h"
#include "kernels/common/philox.h"
#include "tests/support/checkpoint_writer.h"

namespace bebop {
namespace {

constexpr TrainingDataOptions kOptions = {.vocab_size = 100, .num_steps_ahead = 2, .max_seq_len = 6};

class TrainingDataTest : public testing::Test {
 protected:
  absl::StatusOr<TrainingData> Read(const std::string& text, const TrainingDataOptions& options = kOptions) {
    WriteFile(path_, text);
    return ReadTrainingData(path_, options);
  }
  // The message of the error that `text` must give, behind the file's path.
  std::string Refusal(const std::string& text) {
    const absl::StatusOr<TrainingData> data = Read(text);
    if (data.ok()) return "OK";
    EXPECT_EQ(data.status().code(), absl::StatusCode::kInvalidArgument) << data.status();
    const std::string message(data.status().message());
    EXPECT_EQ(message.find('\n'), std::string::npos);
    return message.starts_with(path_ + ": ") ? message.substr(path_.size() + 2) : message;
  }

  const TempDir folder_;
  const std::string path_ = folder_.path() + "/data.jsonl";
};

using Ids = std::vector<uint32_t>;

TEST_F(TrainingDataTest, ReadsDocumentsAndGenerateResults) {
  const auto data = Read(
      "{\"token_ids\": [1, 2, 3, 4], \"loss_start\": 2}\r\n"
      "\n"
      "  {\"token_ids\":[5,6,7,8,9],\"reward\":0.5}\n"
      "{\"request_id\":\"a\",\"prompt_token_ids\":[10,11],\"samples\":[{\"token_ids\":[12,13,14],\"finish\":{\"reason\":\"STOP\"}"
      "},"
      "{\"token_ids\":[15,16],\"finish\":{\"reason\":\"ABORTED\"}}]}");  // the last line needs no newline
  ASSERT_TRUE(data.ok()) << data.status();
  ASSERT_EQ(data->documents.size(), 4u);
  EXPECT_EQ(data->documents[0].token_ids, (Ids{1, 2, 3, 4}));
  EXPECT_EQ(data->documents[0].loss_start, 2);
  EXPECT_EQ(data->documents[0].line, 1);
  EXPECT_EQ(data->documents[1].token_ids, (Ids{5, 6, 7, 8, 9}));
  EXPECT_EQ(data->documents[1].loss_start, 0);
  EXPECT_EQ(data->documents[1].line, 3);
  EXPECT_EQ(data->documents[2].token_ids, (Ids{10, 11, 12, 13, 14}));
  EXPECT_EQ(data->documents[2].loss_start, 2);
  EXPECT_EQ(data->documents[3].token_ids, (Ids{10, 11, 15, 16}));
  EXPECT_EQ(data->documents[3].line, 4);
  EXPECT_EQ(data->documents[3].sample, 1);
  EXPECT_EQ(data->counts.documents, 4);
  EXPECT_EQ(data->counts.tokens, 18);
  EXPECT_EQ(data->counts.loss_tokens, 2 + 5 + 3 + 2);
  EXPECT_EQ(data->counts.skipped_short + data->counts.skipped_failed + data->counts.truncated, 0);
}

TEST_F(TrainingDataTest, DigestIsTheFilesSha256) {
  // As `printf '{"token_ids":[1,2,3,4]}\n' | sha256sum` prints it.
  const auto data = Read("{\"token_ids\":[1,2,3,4]}\n");
  ASSERT_TRUE(data.ok()) << data.status();
  EXPECT_EQ(data->digest, "b0ec257d1d9c00c890580c7f0a49aaa5cbe03ef90644033a450adb2e0e8ee5a4");
}

TEST_F(TrainingDataTest, CountsWhatItSkipsAndCuts) {
  const auto data = Read(
      "{\"token_ids\":[1,2,3]}\n"                             // shorter than 2 + 2
      "{\"token_ids\":[1,2,3,4]}\n"                           // just long enough
      "{\"token_ids\":[1,2,3,4],\"loss_start\":4}\n"          // nothing to predict
      "{\"token_ids\":[1,2,3,4,5,6,7,8],\"loss_start\":5}\n"  // loses its end
      "{\"token_ids\":[1,2,3,4,5,6,7,8],\"loss_start\":6}\n"  // loses all there is to predict
      "{\"prompt_token_ids\":[1,2,3,4],\"samples\":[{\"token_ids\":[]},{\"token_ids\":[5,6],\"finish\":{\"reason\":\"NON_"
      "FINITE\"}}]}\n"
      "{\"error\":{\"code\":\"UNAVAILABLE\",\"reason\":\"DRAINING\",\"message\":\"\"}}\n");
  ASSERT_TRUE(data.ok()) << data.status();
  ASSERT_EQ(data->documents.size(), 2u);
  EXPECT_EQ(data->documents[0].line, 2);
  EXPECT_EQ(data->documents[1].token_ids, (Ids{1, 2, 3, 4, 5, 6}));
  EXPECT_EQ(data->counts.skipped_short, 4);
  EXPECT_EQ(data->counts.skipped_failed, 2);
  EXPECT_EQ(data->counts.truncated, 1);
  EXPECT_EQ(data->counts.loss_tokens, 4 + 1);
}

TEST_F(TrainingDataTest, LossStartOfAResultMayBeGiven) {
  const auto data = Read("{\"prompt_token_ids\":[1,2,3],\"samples\":[{\"token_ids\":[4,5]}],\"loss_start\":1}\n");
  ASSERT_TRUE(data.ok()) << data.status();
  EXPECT_EQ(data->documents[0].loss_start, 1);
}

TEST_F(TrainingDataTest, BadLinesAreNamedWithFieldAndBothValues) {
  const std::string good = "{\"token_ids\":[1,2,3,4]}\n";
  EXPECT_EQ(Refusal(good + "{\"token_ids\":[1,2,100,4]}"),
            "line 2: token_ids[2]: expected a token id in [0, 99] as the model has them, got 100 (data of another vocabulary)");
  EXPECT_EQ(Refusal("{\"token_ids\":[1,-2]}"),
            "line 1: token_ids[1]: expected a token id in [0, 99] as the model has them, got -2");
  EXPECT_EQ(Refusal("{\"token_ids\":[1.0]}"),
            "line 1: token_ids[0]: expected a token id in [0, 99] as the model has them, got 1");
  EXPECT_EQ(Refusal("{\"token_ids\":[\"7\"]}"),
            "line 1: token_ids[0]: expected a token id in [0, 99] as the model has them, got \"7\"");
  EXPECT_EQ(Refusal("{\"token_ids\":7}"), "line 1: token_ids: expected an array, got 7");
  EXPECT_EQ(Refusal(good + "\n{\"token_ids\":[1,2,3,4],\"loss_start\":5}"),
            "line 3: loss_start: expected an integer in [0, 4], got 5");
  EXPECT_EQ(Refusal("{\"token_ids\":[1,2,3,4],\"loss_start\":-1}"), "line 1: loss_start: expected an integer in [0, 4], got -1");
  EXPECT_EQ(Refusal("{\"text\":\"hello\"}"),
            "line 1: expected either \"token_ids\" or, of a GenerateResult, \"samples\", got neither");
  EXPECT_EQ(Refusal("{\"token_ids\":[1],\"samples\":[]}"),
            "line 1: expected either \"token_ids\" or, of a GenerateResult, \"samples\", got both");
  EXPECT_EQ(Refusal("[1,2,3]"), "line 1: expected an object, got an array of 3");
  EXPECT_EQ(Refusal(good + "{\"token_ids\":[1,2,3"), "line 2: not valid JSON at byte 20");
  for (const std::string prompt : {"", "\"prompt_token_ids\":[],", "\"prompt_token_ids\":null,"}) {
    const std::string message = Refusal("{" + prompt + "\"samples\":[{\"token_ids\":[1,2,3,4]}]}");
    EXPECT_TRUE(message.starts_with("line 1: prompt_token_ids: expected the prompt's ids")) << message;
    EXPECT_NE(message.find("bebop rollouts"), std::string::npos);
  }
  EXPECT_EQ(Refusal("{\"prompt_token_ids\":[1],\"samples\":[{\"token_ids\":[1,2,3]},{\"token_ids\":[4,5,444]}]}"),
            "line 1: samples[1].token_ids[2]: expected a token id in [0, 99] as the model has them, got 444 (data of another "
            "vocabulary)");
  EXPECT_EQ(Refusal("{\"prompt_token_ids\":[1],\"samples\":[3]}"), "line 1: samples[0]: expected an object, got 3");
  EXPECT_EQ(Refusal("{\"prompt_token_ids\":[1],\"samples\":[{}]}"),
            "line 1: samples[0].token_ids: expected an array, got nothing");
}

TEST_F(TrainingDataTest, FilesWithoutADocumentSayWhy) {
  const std::string empty = "expected lines of JSON with documents, got an empty file";
  EXPECT_EQ(Refusal(""), empty);
  EXPECT_EQ(Refusal("\n \r\n\t\n"), empty);
  EXPECT_EQ(Refusal("{\"token_ids\":[1,2,3]}\n{\"error\":{}}\n{\"error\":{}}\n"),
            "expected documents to train on, got none: 1 skipped with fewer than 4 tokens (--num-steps-ahead 2 + 2) or nothing "
            "to predict, 2 that had "
            "failed");
  const auto missing = ReadTrainingData(folder_.path() + "/none.jsonl", kOptions);
  EXPECT_EQ(missing.status().code(), absl::StatusCode::kNotFound);
  EXPECT_NE(missing.status().message().find("none.jsonl"), std::string::npos);
  EXPECT_EQ(ReadTrainingData(folder_.path(), kOptions).status().code(), absl::StatusCode::kInvalidArgument);
}

// Whatever happens to a line, it is read or refused by its number: nothing crashes, nothing is taken for another token.
TEST_F(TrainingDataTest, SpoiledLinesAreReadOrRefused) {
  const std::string good =
      "{\"prompt_token_ids\":[1,2],\"samples\":[{\"token_ids\":[3,4,5],\"finish\":{\"reason\":\"STOP\"}}],\"loss_start\":2}";
  int refused = 0;
  for (uint32_t trial = 0; trial < 1000; ++trial) {
    const auto words = Philox4x32(1, {trial, 0, 0, 0});
    std::string line = good;
    const size_t place = words[0] % line.size();
    switch (words[1] % 4) {
      case 0:
        line[place] = static_cast<char>(words[2] % 256);
        break;
      case 1:
        line.erase(place, words[2] % 8);
        break;
      case 2:
        line.insert(place, 1, "[]{}\",:0-9e.\\ntf"[words[2] % 16]);
        break;
      default:
        line.insert(place, line.substr(words[2] % line.size(), words[3] % 30));
        break;
    }
    std::erase(line, '\n');
    const auto data = Read("{\"token_ids\":[1,2,3,4]}\n" + line + "\n");
    if (data.ok()) {
      for (const TrainingDocument& document : data->documents) {
        EXPECT_LE(document.loss_start, static_cast<int32_t>(document.token_ids.size()));
        for (const uint32_t id : document.token_ids) EXPECT_LT(id, 100u);
      }
    } else {
      ++refused;
      EXPECT_EQ(data.status().code(), absl::StatusCode::kInvalidArgument) << line;
      EXPECT_TRUE(std::string(data.status().message()).starts_with(path_ + ": line 2: ")) << data.status();
    }
  }
  EXPECT_GT(refused, 500);
  EXPECT_LT(refused, 1000);
}

TrainingData Documents(const std::vector<int32_t>& sizes) {
  TrainingData data;
  for (const int32_t size : sizes) data.documents.push_back({.token_ids = Ids(static_cast<size_t>(size))});
  return data;
}

TEST(PlanEpoch, BatchesAreFullAndHoldEveryDocumentOnce) {
  const TrainingData data = Documents({7, 3, 10, 1, 5, 5, 2, 8, 4, 6});
  for (int64_t epoch = 0; epoch < 20; ++epoch) {
    const auto batches = PlanEpoch(data, 10, 3, epoch);
    std::multiset<int32_t> seen;
    int64_t before = 0;
    for (size_t i = 0; i < batches.size(); ++i) {
      ASSERT_FALSE(batches[i].empty());
      int64_t tokens = 0;
      for (const int32_t index : batches[i])
        tokens += static_cast<int64_t>(data.documents[static_cast<size_t>(index)].token_ids.size());
      EXPECT_LE(tokens, 10);
      // The batch before it had no room for its first document.
      const int64_t first = static_cast<int64_t>(data.documents[static_cast<size_t>(batches[i][0])].token_ids.size());
      EXPECT_TRUE(i == 0 || before + first > 10);
      before = tokens;
      seen.insert(batches[i].begin(), batches[i].end());
    }
    EXPECT_EQ(seen, (std::multiset<int32_t>{0, 1, 2, 3, 4, 5, 6, 7, 8, 9}));
  }
}

TEST(PlanEpoch, SeedAndEpochDecide) {
  const TrainingData data = Documents(std::vector<int32_t>(50, 1));
  EXPECT_EQ(PlanEpoch(data, 4, 1, 0), PlanEpoch(data, 4, 1, 0));
  EXPECT_NE(PlanEpoch(data, 4, 1, 0), PlanEpoch(data, 4, 2, 0));
  EXPECT_NE(PlanEpoch(data, 4, 1, 0), PlanEpoch(data, 4, 1, 1));
  EXPECT_NE(PlanEpoch(data, 4, 1, 0), PlanEpoch(data, 4, 1, int64_t{1} << 32));
}

// Every order of three documents comes equally often: 6,000 draws, each count within 5 standard deviations.
TEST(PlanEpoch, OrdersAreEquallyLikely) {
  const TrainingData data = Documents({1, 1, 1});
  std::map<std::vector<int32_t>, int> counts;
  for (int64_t epoch = 0; epoch < 6000; ++epoch) ++counts[PlanEpoch(data, 3, 9, epoch).at(0)];
  EXPECT_EQ(counts.size(), 6u);
  for (const auto& [order, count] : counts) EXPECT_NEAR(count, 1000, 5 * 29);
}

}  // namespace
}  // namespace bebop
