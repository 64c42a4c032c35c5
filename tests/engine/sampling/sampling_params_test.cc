// SPDX-License-Identifier: Apache-2.0
#include "engine/sampling/sampling_params.h"

#include <limits>
#include <string>

#include "gtest/gtest.h"

namespace bebop {
namespace {

TEST(SpeculationModeName, NamesAreThoseOfTheCommandLine) {
  EXPECT_STREQ(SpeculationModeName(SpeculationMode::kOff), "off");
  EXPECT_STREQ(SpeculationModeName(SpeculationMode::kTargetOnly), "target_only");
  EXPECT_STREQ(SpeculationModeName(SpeculationMode::kRejection), "rejection");
  EXPECT_STREQ(SpeculationModeName(SpeculationMode::kCoupled), "coupled");
}

TEST(ValidateSamplingParams, AcceptsTheDefaultsAndTheEdges) {
  SamplingParams params;
  EXPECT_TRUE(ValidateSamplingParams(params).ok());
  params = {
      .temperature = 0.0f, .top_k = std::numeric_limits<int32_t>::max(), .top_p = 1e-9f, .min_p = 1.0f, .seed = ~uint64_t{0}};
  EXPECT_TRUE(ValidateSamplingParams(params).ok());
}

TEST(ValidateSamplingParams, RefusesEachFieldOutOfRangeByName) {
  const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
  const auto refused = [](SamplingParams params, const std::string& field) {
    const absl::Status status = ValidateSamplingParams(params);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_NE(status.message().find("sampling." + field), absl::string_view::npos) << status;
  };
  for (float value : {-1.0f, -1e-30f, nan, infinity}) refused({.temperature = value}, "temperature");
  for (int32_t value : {-1, std::numeric_limits<int32_t>::min()}) refused({.top_k = value}, "top_k");
  for (float value : {0.0f, -0.5f, 1.0001f, nan, infinity}) refused({.top_p = value}, "top_p");
  for (float value : {-0.01f, 1.0001f, nan, infinity}) refused({.min_p = value}, "min_p");
}

TEST(SetTransform, CopiesEveryField) {
  TransformArgs args;
  args.vocab_size = 7;
  SetTransform({.temperature = 0.5f, .top_k = 3, .top_p = 0.25f, .min_p = 0.125f}, &args);
  EXPECT_EQ(args.temperature, 0.5f);
  EXPECT_EQ(args.top_k, 3);
  EXPECT_EQ(args.top_p, 0.25f);
  EXPECT_EQ(args.min_p, 0.125f);
  EXPECT_EQ(args.vocab_size, 7);
}

}  // namespace
}  // namespace bebop
