// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "absl/strings/string_view.h"

namespace bebop {

// Limits of what the network may send, in one place: validation uses the constants, docs/limits.md is LimitsMarkdown(), and a test
// walks the message descriptors so that no repeated, text or numeric request field lacks a row.
namespace limits {

inline constexpr int64_t kRolloutReceiveBytes = 64 << 20;
inline constexpr int64_t kAdminReceiveBytes = 16 << 20;
inline constexpr int64_t kRolloutQuotaBytes = 1LL << 30;  // gRPC's own buffers
inline constexpr int64_t kAdminQuotaBytes = 128 << 20;
inline constexpr int32_t kMetadataBytes = 16 << 10;
inline constexpr int32_t kConcurrentStreams = 256;  // per connection
inline constexpr int32_t kMinPingIntervalSeconds = 10;
inline constexpr int64_t kStreamBufferBytes = 256 << 10;  // unsent events of one GenerateStream before its group pauses
inline constexpr int64_t kScoreReplyBytes = 64 << 20;     // arrays of one ScoreResult

inline constexpr int32_t kRequestIdBytes = 64;
inline constexpr int32_t kNumSamples = 1024;
inline constexpr int32_t kStopTokenIds = 256;
inline constexpr int32_t kStopStrings = 16;
inline constexpr int32_t kStopStringBytes = 256;
inline constexpr float kMinTemperature = 1e-4f;  // below it only 0 (greedy): logits / temperature must stay finite
inline constexpr float kMaxTemperature = 100.0f;
inline constexpr int32_t kScoreSequences = 1024;
inline constexpr int64_t kScoreTokens = 1 << 20;  // over all sequences of a request
inline constexpr int32_t kTopLogprobs = 20;
inline constexpr int32_t kTokenIdsLogprob = 1024;
inline constexpr int32_t kAbortIds = 1024;
inline constexpr int64_t kResumeBytes = 32 << 20;  // of one request's handles together, so of a handle, too
inline constexpr int32_t kSleepTags = 2;
inline constexpr double kDrainSeconds = 86400;
inline constexpr int64_t kTokenizeBytes = 8 << 20;
// NFC makes UTF-8 text at most 3 times as long (Unicode FAQ, normalization), and a tokenizer makes at most one id of a byte.
inline constexpr int64_t kTokenizeResultIds = 3 * kTokenizeBytes;
inline constexpr int32_t kEosTokenIds = 1024;  // what engine/config/model_config.cc takes from a checkpoint
inline constexpr int64_t kDetokenizeIds = 1 << 20;

// Admin calls that may wait, e.g. for running samples. Short ones (a resume, a look, an abort) have threads of their own.
inline constexpr int kBlockingCalls = 8;   // at a time
inline constexpr int kShortCalls = 2;      // at a time
inline constexpr size_t kQueuedCalls = 64;  // of either kind, that wait for a thread
inline constexpr int kWaitingPauses = 2;   // of PauseGeneration with WAIT
inline constexpr int kWaitingDrains = 2;

inline constexpr int32_t kWeightTensors = 1 << 16;
inline constexpr int32_t kWeightComponents = 2;
inline constexpr int32_t kMissingTensors = 64;  // named in a WeightUpdate
inline constexpr int32_t kTensorNameBytes = 256;
inline constexpr int32_t kTensorDTypeBytes = 8;
inline constexpr int32_t kTensorDimensions = 8;
inline constexpr int32_t kWeightLabelBytes = 64;
inline constexpr int32_t kWeightPathBytes = 4096;
inline constexpr int64_t kWeightChunkBytes = 4 << 20;
inline constexpr int32_t kWeightDeadlineMs = 3'600'000;
inline constexpr int32_t kWeightUpdateSeconds = 3600;  // from an update's start to its Finish, however often its learner calls
inline constexpr int kPushStreams = 4;                 // PushWeights streams at a time
// Of one PushWeights stream that wait to be written, before it is read further. With these a stream holds one more that comes in, and
// up to three copies of the two that the writer works on, which keep their memory as long as the stream: 12 messages, and kPushStreams
// of them 192 MiB of chunks of kWeightChunkBytes beside the staging budget. A larger message ends its stream.
inline constexpr size_t kPushQueueChunks = 8;

}  // namespace limits

// One row: a repeated, string or bytes field ("Message.field") and how large it may get. `max` 0: see `rule` alone.
struct SizeLimit {
  absl::string_view field;
  int64_t max = 0;
  absl::string_view unit;
  absl::string_view rule;
};

// One row: a numeric field of a request and its allowed values in words.
struct NumberLimit {
  absl::string_view field;
  absl::string_view range;
};

std::span<const SizeLimit> SizeLimits();
std::span<const NumberLimit> NumberLimits();

// The text of docs/limits.md.
std::string LimitsMarkdown();

}  // namespace bebop
