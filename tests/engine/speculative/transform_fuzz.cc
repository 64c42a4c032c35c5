// SPDX-License-Identifier: Apache-2.0
// Any bytes as sampling parameters, logits and draws: validation refuses or Transform, the samplers and Verify run, every emitted
// id is in range and has weight, and a second run gives the same tokens.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <vector>

#include "engine/sampling/sampling_params.h"
#include "engine/speculative/verify.h"
#include "kernels/common/check.h"

namespace bebop {
namespace {

class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  template <typename T>
  T Take() {
    T value{};
    const size_t count = std::min(sizeof(T), size_);
    if (count > 0) std::memcpy(&value, data_, count);
    data_ += count;
    size_ -= count;
    return value;
  }

 private:
  const uint8_t* data_;
  size_t size_;
};

struct Row {
  std::vector<float> logits, weight;
  std::vector<double> block_sum;
  TokenDistribution distribution;
};

// Logits from one byte per id at first, then a pattern; some bytes mean special values.
Row MakeRow(Bytes& bytes, TransformArgs args) {
  Row row;
  const size_t vocab_size = static_cast<size_t>(args.vocab_size);
  row.logits.resize(vocab_size);
  const float scale = static_cast<float>(bytes.Take<int8_t>()) * 0.37f;
  for (size_t id = 0; id < vocab_size; ++id) {
    const uint8_t byte = id < 48 ? bytes.Take<uint8_t>() : static_cast<uint8_t>(id * 37 + id / 256);
    float logit = (static_cast<float>(byte) - 128.0f) * scale;
    if (id < 48) {
      if (byte == 255) logit = -std::numeric_limits<float>::infinity();
      if (byte == 254) logit = bytes.Take<float>();  // any float, NaN and infinities among them
    }
    row.logits[id] = logit;
  }
  row.weight.resize(vocab_size);
  row.block_sum.resize(static_cast<size_t>(NumSamplingBlocks(args.vocab_size)));
  std::vector<float> scratch(vocab_size);
  row.distribution.weight = row.weight.data();
  row.distribution.block_sum = row.block_sum.data();
  args.logits = row.logits.data();
  args.scratch = scratch.data();
  cpu::Transform(args, &row.distribution);
  return row;
}

void CheckRow(const Row& row) {
  const TokenDistribution& distribution = row.distribution;
  if (!distribution.finite) return;
  BEBOP_CHECK(distribution.argmax < static_cast<uint32_t>(distribution.vocab_size));
  BEBOP_CHECK(distribution.weight[distribution.argmax] == 1.0f);
  BEBOP_CHECK(distribution.total >= 1.0 && std::isfinite(distribution.total));
  double sum = 0.0;
  for (float weight : row.weight) {
    BEBOP_CHECK(weight >= 0.0f && weight <= 1.0f);
    sum += weight;
  }
  BEBOP_CHECK(std::abs(sum / distribution.total - 1.0) < 1e-12);
  const double entropy = cpu::Entropy(distribution);
  BEBOP_CHECK(entropy >= 0.0 && entropy <= std::log(static_cast<double>(distribution.vocab_size)) + 1e-5);
}

}  // namespace

int FuzzOne(const uint8_t* data, size_t size) {
  Bytes bytes(data, size);
  SamplingParams params;
  params.temperature = bytes.Take<float>();
  params.top_k = bytes.Take<int32_t>();
  params.top_p = bytes.Take<float>();
  params.min_p = bytes.Take<float>();
  params.seed = bytes.Take<uint64_t>();
  if (!ValidateSamplingParams(params).ok()) {
    // Most random bytes are out of range: fold them into range and go on.
    params.temperature = std::isfinite(params.temperature) ? std::abs(params.temperature) : 1.0f;
    params.top_k = static_cast<int32_t>(static_cast<uint32_t>(params.top_k) % 5000u);
    params.top_p = (static_cast<float>(bytes.Take<uint8_t>()) + 1.0f) / 256.0f;
    params.min_p = static_cast<float>(bytes.Take<uint8_t>()) / 255.0f;
    BEBOP_CHECK(ValidateSamplingParams(params).ok());
  }
  TransformArgs args;
  SetTransform(params, &args);
  constexpr int32_t kSizes[] = {1, 2, 5, 16, 47, 1023, 1024, 1025, 2100};
  args.vocab_size = kSizes[bytes.Take<uint8_t>() % std::size(kSizes)];
  args.want_raw_lse = (bytes.Take<uint8_t>() & 1) != 0;
  uint32_t banned[3];
  for (uint32_t& id : banned) id = bytes.Take<uint16_t>();
  args.banned_ids = std::span<const uint32_t>(banned, bytes.Take<uint8_t>() % 4);
  const SpeculationMode mode = static_cast<SpeculationMode>(1 + bytes.Take<uint8_t>() % 3);
  const size_t num_drafts = bytes.Take<uint8_t>() % 4;
  const double synthetic = static_cast<double>(bytes.Take<int8_t>()) / 127.0;  // negative: off

  std::vector<Row> target, draft;
  std::vector<TokenDistribution> target_rows, draft_rows;
  for (size_t i = 0; i <= num_drafts; ++i) {
    target.push_back(MakeRow(bytes, args));
    CheckRow(target.back());
    target_rows.push_back(target.back().distribution);
    if (i == num_drafts) break;
    draft.push_back(MakeRow(bytes, args));
    CheckRow(draft.back());
    draft_rows.push_back(draft.back().distribution);
  }
  PhiloxDraws draws({params.seed, bytes.Take<uint32_t>(), bytes.Take<uint32_t>()});
  std::vector<uint32_t> drafts;
  for (size_t i = 0; i < num_drafts; ++i) {
    drafts.push_back(DrawDraft(mode, params.greedy(), draft_rows[i], static_cast<int32_t>(i), draws));
    BEBOP_CHECK(drafts.back() < static_cast<uint32_t>(args.vocab_size));
    BEBOP_CHECK(!draft_rows[i].finite || draft_rows[i].weight[drafts.back()] > 0.0f);
    const double expected = ExpectedAcceptance(mode, params.greedy(), drafts.back(), target_rows[i], draft_rows[i]);
    BEBOP_CHECK(expected >= 0.0 && expected <= 1.0 + 1e-12);
  }
  VerifyArgs verify;
  verify.mode = mode;
  verify.greedy = params.greedy();
  verify.drafts = drafts;
  verify.target = target_rows;
  verify.draft = draft_rows;
  verify.synthetic_acceptance = synthetic;
  const VerifyOutcome outcome = Verify(verify, draws);
  BEBOP_CHECK(outcome.num_accepted <= outcome.num_reached && outcome.num_reached <= static_cast<int32_t>(num_drafts));
  BEBOP_CHECK(outcome.num_emitted == outcome.num_accepted + (outcome.non_finite ? 0 : 1));
  for (int32_t i = 0; i < outcome.num_emitted; ++i) {
    BEBOP_CHECK(outcome.tokens[i] < static_cast<uint32_t>(args.vocab_size));
    BEBOP_CHECK(target_rows[i].finite);
    // Only synthetic acceptance may emit what the target excludes.
    BEBOP_CHECK(synthetic >= 0.0 || target_rows[i].weight[outcome.tokens[i]] > 0.0f);
  }
  const VerifyOutcome again = Verify(verify, draws);
  BEBOP_CHECK(std::memcmp(&again.tokens, &outcome.tokens, sizeof(again.tokens)) == 0);
  return 0;
}

}  // namespace bebop

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) { return bebop::FuzzOne(data, size); }
