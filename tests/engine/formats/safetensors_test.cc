// SPDX-License-Identifier: Apache-2.0
#include "engine/formats/safetensors.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "engine/formats/json.h"
#include "tests/support/checkpoint_writer.h"

namespace bebop {
namespace {

TEST(SafetensorsTest, HeaderDescribesTheTensorsInFileOrder) {
  const std::string file = SafetensorsBytes(
      R"({"b":{"dtype":"BF16","shape":[2,3],"data_offsets":[4,16]},"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},)"
      R"("none":{"dtype":"F32","shape":[0,7],"data_offsets":[4,4]},"__metadata__":{"format":"pt"}}  )",
      std::string(16, 'x'));
  const auto header = ParseSafetensorsHeader(file, "f");
  ASSERT_TRUE(header.ok()) << header.status();
  ASSERT_EQ(header->tensors.size(), 3u);
  EXPECT_EQ(header->tensors[0].name, "a");
  EXPECT_EQ(header->tensors[1].name, "none");
  EXPECT_EQ(header->tensors[2].name, "b");
  EXPECT_EQ(header->tensors[2].shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(header->tensors[2].num_elements(), 6);
  EXPECT_EQ(header->tensors[2].end, file.size());
  EXPECT_EQ(header->tensors[0].begin, file.size() - 16);
  ASSERT_EQ(header->metadata.size(), 1u);
  EXPECT_EQ(header->metadata[0].second, "pt");
}

TEST(SafetensorsTest, EmptyFileOfNoTensors) { EXPECT_TRUE(ParseSafetensorsHeader(SafetensorsBytes("{}", ""), "f").ok()); }

struct BadHeader {
  const char* name;
  std::string json;
  size_t data_bytes;
  absl::StatusCode code;
  std::vector<std::string> message;
};

TEST(SafetensorsTest, RefusesBadHeaders) {
  const auto tensor = [](const std::string& name, const std::string& body) { return "\"" + name + "\":{" + body + "}"; };
  const std::string good = R"("dtype":"F32","shape":[1],"data_offsets":[0,4])";
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  const std::vector<BadHeader> cases = {
      {"Empty", "", 0, kInvalid, {"start with '{'"}},
      {"Array", "[]", 0, kInvalid, {"start with '{'"}},
      {"LeadingBlank", " {}", 0, kInvalid, {"start with '{'"}},
      {"NotJson", "{\"a\"", 0, kInvalid, {"not valid JSON"}},
      {"TwoValues", "{}{}", 0, kInvalid, {"not valid JSON"}},
      {"Comment", "{/**/}", 0, kInvalid, {"not valid JSON"}},
      {"NotUtf8", "{\"\xff\":{}}", 0, kInvalid, {"not valid JSON"}},
      {"Deep", "{\"a\":[[[[[[[[[[]]]]]]]]]]}", 0, kInvalid, {"nested levels"}},
      {"TensorTwice", "{" + tensor("w", good) + "," + tensor("w", good) + "}", 4, kInvalid, {"duplicate key \"w\""}},
      {"MemberTwice", R"({"w":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 4, kInvalid, {"duplicate key \"dtype\""}},
      {"NoObject", R"({"w":3})", 0, kInvalid, {"\"w\"", "got 3"}},
      {"UnknownMember", "{" + tensor("w", good + ",\"x\":1") + "}", 4, kInvalid, {"\"w\"", "\"x\""}},
      {"NoType", R"({"w":{"shape":[1],"data_offsets":[0,4]}})", 4, kInvalid, {"\"w\"", "dtype", "nothing"}},
      {"UnknownType", R"({"w":{"dtype":"F31","shape":[1],"data_offsets":[0,4]}})", 4, kInvalid, {"\"w\"", "\"F31\""}},
      {"TypeNoString", R"({"w":{"dtype":1,"shape":[1],"data_offsets":[0,4]}})", 4, kInvalid, {"\"w\"", "got 1"}},
      {"NoShape", R"({"w":{"dtype":"F32","data_offsets":[0,4]}})", 4, kInvalid, {"\"w\"", "shape"}},
      {"NegativeSize", R"({"w":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}})", 4, kInvalid, {"\"w\"", "got -1"}},
      {"FractionalSize", R"({"w":{"dtype":"F32","shape":[1.5],"data_offsets":[0,4]}})", 4, kInvalid, {"\"w\"", "got 1.5"}},
      {"ShapeOverflow", R"({"w":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}})", 0, kInvalid, {"\"w\"", "2^63"}},
      {"HugeSize", R"({"w":{"dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,0]}})", 0, kInvalid, {"\"w\"", "shape"}},
      {"NoOffsets", R"({"w":{"dtype":"F32","shape":[1]}})", 4, kInvalid, {"\"w\"", "data_offsets"}},
      {"OneOffset", R"({"w":{"dtype":"F32","shape":[1],"data_offsets":[0]}})", 4, kInvalid, {"\"w\"", "two offsets"}},
      {"NegativeOffset", R"({"w":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}})", 4, kInvalid, {"\"w\"", "got -4"}},
      {"OffsetsSwapped", R"({"w":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}})", 4, kInvalid, {"\"w\"", "4 and 0"}},
      {"SizeMismatch", R"({"w":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})", 4, kInvalid, {"\"w\"", "8 bytes", "got 4"}},
      {"Overlap", "{" + tensor("v", good) + "," + tensor("w", R"("dtype":"F32","shape":[1],"data_offsets":[2,6])") + "}", 6, kInvalid,
       {"\"w\"", "overlaps", "4", "2"}},
      {"Hole", "{" + tensor("v", good) + "," + tensor("w", R"("dtype":"F32","shape":[1],"data_offsets":[6,10])") + "}", 10, kInvalid,
       {"\"w\"", "hole", "4", "6"}},
      {"HoleAtStart", R"({"w":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})", 8, kInvalid, {"\"w\"", "hole", "0", "4"}},
      {"Truncated", "{" + tensor("w", good) + "}", 3, absl::StatusCode::kDataLoss, {"\"w\"", "truncated", "4", "3"}},
      {"Trailing", "{" + tensor("w", good) + "}", 5, kInvalid, {"4", "got 5"}},
      {"MetadataNoObject", R"({"__metadata__":[]})", 0, kInvalid, {"__metadata__"}},
      {"MetadataNoString", R"({"__metadata__":{"k":1}})", 0, kInvalid, {"__metadata__", "\"k\"", "got 1"}},
      {"NameWithLineEnd", R"({"a\nb":3})", 0, kInvalid, {"a\\nb"}},
  };
  for (const BadHeader& bad : cases) {
    SCOPED_TRACE(bad.name);
    const absl::Status status = ParseSafetensorsHeader(SafetensorsBytes(bad.json, std::string(bad.data_bytes, '\0')), "f.safetensors").status();
    EXPECT_EQ(status.code(), bad.code) << status;
    const std::string message(status.message());
    EXPECT_TRUE(message.starts_with("f.safetensors: ")) << message;
    for (const std::string& part : bad.message) EXPECT_NE(message.find(part), std::string::npos) << part << " in: " << message;
    EXPECT_EQ(message.find('\n'), std::string::npos);
  }
}

TEST(SafetensorsTest, HeaderLengthIsCapped) {
  const auto with_length = [](uint64_t length) {
    std::string file(8, '\0');
    for (size_t i = 0; i < 8; ++i) file[i] = static_cast<char>(length >> (8 * i));
    return file + "{}";
  };
  const absl::Status over = ParseSafetensorsHeader(with_length(100'000'001), "f").status();
  EXPECT_EQ(over.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(over.message().find("100000000"), absl::string_view::npos) << over;
  EXPECT_NE(over.message().find("100000001"), absl::string_view::npos) << over;
  EXPECT_EQ(ParseSafetensorsHeader(with_length(~uint64_t{0}), "f").status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ParseSafetensorsHeader(with_length(3), "f").status().code(), absl::StatusCode::kDataLoss);
  EXPECT_TRUE(ParseSafetensorsHeader(with_length(2), "f").ok());
  EXPECT_EQ(ParseSafetensorsHeader("1234567", "f").status().code(), absl::StatusCode::kDataLoss);
}

TEST(SafetensorsTest, FoldersAreNoFiles) {
  const TempDir directory;
  const absl::Status status = SafetensorsFile::Open(directory.path()).status();
  EXPECT_FALSE(status.ok());
  EXPECT_NE(std::string(status.message()).find(directory.path()), std::string::npos);
}

TEST(JsonTest, LimitsAreKept) {
  EXPECT_FALSE(ParseJson("[1,2,3]", "f", {.max_bytes = 6}).ok());
  EXPECT_TRUE(ParseJson("[1,2,3]", "f", {.max_bytes = 7}).ok());
  EXPECT_FALSE(ParseJson("[1,2,3]", "f", {.max_values = 3}).ok());
  EXPECT_TRUE(ParseJson("[1,2,3]", "f", {.max_values = 4}).ok());
  EXPECT_TRUE(ParseJson(std::string(64, '[') + std::string(64, ']'), "f").ok());
  EXPECT_FALSE(ParseJson(std::string(65, '[') + std::string(65, ']'), "f").ok());
  EXPECT_FALSE(ParseJson("1e999", "f").ok());
  EXPECT_FALSE(ParseJson("", "f").ok());
}

}  // namespace
}  // namespace bebop
