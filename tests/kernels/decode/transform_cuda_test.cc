// SPDX-License-Identifier: Apache-2.0
// TransformRows against cpu::Transform: given equal logits, weights, block sums, totals and thresholds have the CPU's bits. Only
// raw_lse, which goes through the logarithm, may differ by an ulp or two.
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/decode/decode.h"
#include "kernels/sampling/sampling.h"
#include "tests/kernels/cuda_test_util.h"

namespace bebop {
namespace {

using testing::DeviceArray;
using testing::Random;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// One row, what is asked of it, and where it stands in the output.
struct RowCase {
  std::vector<float> logits;
  SlotRequest request;
  std::vector<uint32_t> banned_ids;
  int32_t num_output = 0;
};

// cpu::Transform as the executor calls it.
struct Reference {
  explicit Reference(const RowCase& row)
      : weight(row.logits.size()), block_sum(static_cast<size_t>(NumSamplingBlocks(static_cast<int32_t>(row.logits.size())))) {
    std::vector<float> scratch(row.logits.size());
    TransformArgs args;
    args.logits = row.logits.data();
    args.vocab_size = static_cast<int32_t>(row.logits.size());
    args.temperature = row.request.temperature;
    args.top_k = row.request.top_k;
    args.top_p = row.request.top_p;
    args.min_p = row.request.min_p;
    if (row.num_output < row.request.min_new_tokens) args.banned_ids = row.banned_ids;
    args.want_raw_lse = (row.request.record & kRecordRawLogprob) != 0;
    args.scratch = scratch.data();
    out.weight = weight.data();
    out.block_sum = block_sum.data();
    const bool reports = (row.request.record & (kRecordLogprob | kRecordEntropy | kRecordDraftLogprob)) != 0;
    cpu::Transform(reports ? ReportTransformArgs(args) : args, &out);
  }
  std::vector<float> weight;
  std::vector<double> block_sum;
  TokenDistribution out;
};

class TransformCudaTest : public testing::CudaTest {
 protected:
  // Runs the rows together, each in its own slot, with a padded row behind each; as judged rows and as draft rows. Both must
  // agree with the CPU.
  void Check(const std::vector<RowCase>& rows) {
    ASSERT_FALSE(HasFatalFailure());
    const int32_t vocab_size = static_cast<int32_t>(rows[0].logits.size()), num_blocks = NumSamplingBlocks(vocab_size);
    const int32_t num_slots = static_cast<int32_t>(rows.size());
    std::vector<SlotRequest> requests;
    std::vector<SlotState> states;
    std::vector<uint32_t> banned(rows.size() * kMaxBannedIds, 0xffffffffu);
    std::vector<PassSequence> sequences;
    std::vector<int32_t> judged_sequence, draft_from_row;
    std::vector<float> logits;
    for (int32_t i = 0; i < num_slots; ++i) {
      SlotRequest request = rows[i].request;
      request.num_banned_ids = static_cast<int32_t>(rows[i].banned_ids.size());
      std::copy(rows[i].banned_ids.begin(), rows[i].banned_ids.end(), banned.begin() + i * kMaxBannedIds);
      requests.push_back(request);
      SlotState state;
      state.num_output = rows[i].num_output;
      states.push_back(state);
      PassSequence sequence;
      sequence.slot = num_slots - 1 - i;
      sequence.first_judged_row = 2 * i;
      sequences.push_back(sequence);
      sequences.push_back(PassSequence{});
      judged_sequence.push_back(2 * i);
      judged_sequence.push_back(-1);
      draft_from_row.push_back(7);
      draft_from_row.push_back(-1);
      logits.insert(logits.end(), rows[i].logits.begin(), rows[i].logits.end());
      logits.insert(logits.end(), rows[i].logits.size(), testing::kNan);
    }
    std::reverse(requests.begin(), requests.end());
    std::reverse(states.begin(), states.end());
    std::vector<uint32_t> banned_of_slot;
    for (int32_t slot = 0; slot < num_slots; ++slot) {
      const auto first = banned.begin() + (num_slots - 1 - slot) * kMaxBannedIds;
      banned_of_slot.insert(banned_of_slot.end(), first, first + kMaxBannedIds);
    }
    const int32_t max_drafts = 1, num_rows = 2 * num_slots;
    DeviceArray<SlotRequest> device_requests(requests);
    DeviceArray<SlotState> device_states(states);
    DeviceArray<uint32_t> device_banned(banned_of_slot);
    DeviceArray<PassSequence> device_sequences(sequences);
    DeviceArray<int32_t> device_judged(judged_sequence), device_from(draft_from_row);
    DeviceArray<float> draft_logits(static_cast<int64_t>(num_slots) * vocab_size);
    DeviceArray<DeviceDistribution> target_rows(num_rows), draft_rows(num_slots);
    DeviceArray<double> target_sums(static_cast<int64_t>(num_rows) * num_blocks),
        draft_sums(static_cast<int64_t>(num_slots) * num_blocks);
    DeviceArray<unsigned char> scratch(TransformScratchBytes(num_rows, vocab_size));
    TransformRowsArgs args;
    args.slots.num_slots = num_slots;
    args.slots.max_drafts = max_drafts;
    args.slots.vocab_size = vocab_size;
    args.slots.requests = device_requests.data();
    args.slots.states = device_states.data();
    args.slots.banned_ids = device_banned.data();
    args.slots.draft_logits = draft_logits.data();
    args.slots.draft_rows = draft_rows.data();
    args.slots.draft_block_sums = draft_sums.data();
    args.pass.num_sequences = num_rows;
    args.pass.num_judged = num_rows;
    args.pass.num_drafts = max_drafts;
    args.pass.sequences = device_sequences.data();
    args.pass.judged_sequence = device_judged.data();
    args.pass.draft_from_row = device_from.data();
    args.pass.target_rows = target_rows.data();
    args.pass.target_block_sums = target_sums.data();
    args.scratch = scratch.data();

    for (const bool draft : {false, true}) {
      DeviceArray<float> device_logits(logits);
      args.draft_depth = draft ? 0 : -1;
      args.logits = device_logits.data();
      cuda::TransformRows(args, stream());
      const std::vector<DeviceDistribution> out = draft ? draft_rows.Download() : target_rows.Download();
      const std::vector<double> sums = draft ? draft_sums.Download() : target_sums.Download();
      const std::vector<float> after = device_logits.Download(), copies = draft_logits.Download();
      for (int32_t i = 0; i < num_slots; ++i) {
        SCOPED_TRACE(::testing::Message() << (draft ? "draft" : "target") << " row " << i << " of " << vocab_size
                                          << " ids, temperature " << rows[i].request.temperature << " top_k "
                                          << rows[i].request.top_k << " top_p " << rows[i].request.top_p << " min_p "
                                          << rows[i].request.min_p);
        const int64_t index = draft ? num_slots - 1 - i : 2 * i;
        const float* const own = draft ? draft_logits.data() + index * vocab_size : device_logits.data() + index * vocab_size;
        const std::vector<float>& processed = draft ? copies : after;
        Compare(rows[i], out[index], sums.data() + index * num_blocks, own, processed.data() + index * vocab_size, draft);
        if (HasFailure()) return;
      }
      EXPECT_TRUE(device_logits.GuardsUntouched() && scratch.GuardsUntouched() && target_rows.GuardsUntouched());
      EXPECT_TRUE(draft_logits.GuardsUntouched() && draft_rows.GuardsUntouched() && draft_sums.GuardsUntouched());
    }
  }

 private:
  static void Compare(const RowCase& row, const DeviceDistribution& out, const double* sums, const float* device_logits,
                      const float* processed, bool draft) {
    const Reference reference(row);
    const int32_t vocab_size = reference.out.vocab_size;
    ASSERT_EQ(out.finite != 0, reference.out.finite);
    if (!reference.out.finite) return;
    EXPECT_EQ(out.logits, device_logits);
    EXPECT_EQ(out.argmax, reference.out.argmax);
    EXPECT_EQ(out.total, reference.out.total);
    EXPECT_EQ(std::memcmp(sums, reference.block_sum.data(), reference.block_sum.size() * sizeof(double)), 0);
    // The weights, from the processed logits at the row's temperature and the row's floors.
    std::vector<float> banned(row.logits);
    if (row.num_output < row.request.min_new_tokens) {
      for (const uint32_t id : row.banned_ids) {
        if (id < banned.size()) banned[id] = -kInfinity;
      }
    }
    ASSERT_TRUE(testing::SameBits(processed, banned.data(), vocab_size));
    RowCase plain = row;
    plain.request = SlotRequest{};
    const bool one_hot =
        row.request.temperature == 0.0f && (row.request.record & (kRecordLogprob | kRecordEntropy | kRecordDraftLogprob)) == 0;
    plain.request.temperature = row.request.temperature == 0.0f ? 1.0f : row.request.temperature;
    plain.logits = banned;
    plain.banned_ids.clear();
    const Reference weights(plain);
    for (int32_t id = 0; id < vocab_size; ++id) {
      float weight = weights.weight[id];
      if (banned[id] < out.logit_floor || weight < out.weight_floor) weight = 0.0f;
      if (weight == out.weight_floor && id >= out.tie_begin_excluded && static_cast<uint32_t>(id) != out.argmax) weight = 0.0f;
      ASSERT_EQ(weight, reference.weight[id]) << "id " << id;
    }
    const float scale = std::min(1.0f / plain.request.temperature, std::numeric_limits<float>::max());
    EXPECT_EQ(out.scale, one_hot ? 1.0f : scale);
    if (!draft && (row.request.record & kRecordRawLogprob) != 0) {
      EXPECT_NEAR(out.raw_lse, reference.out.raw_lse, 4e-16 * (std::abs(reference.out.raw_lse) + 20.0));
    }
  }
};

// Rows of several shapes: broad, peaked, few distinct values, constant.
std::vector<float> MakeLogits(int32_t vocab_size, int32_t shape, Random& random) {
  std::vector<float> logits(static_cast<size_t>(vocab_size));
  for (float& logit : logits) {
    logit = random.Normal() * (shape % 2 == 0 ? 1.0f : 6.0f);
    if (shape == 2) logit = std::round(logit * 2.0f) * 0.5f;
    if (shape == 3) logit = std::round(logit * 0.25f);
    if (shape == 4) logit = -1.25f;
  }
  return logits;
}

SlotRequest RandomRequest(int32_t vocab_size, Random& random) {
  constexpr float kTemperatures[] = {1.0f, 1.0f, 0.7f, 1.3f, 0.0f, 1e-42f};
  constexpr float kTopP[] = {1.0f, 1.0f, 0.9f, 0.5f, 0.05f, 0.999999f};
  constexpr float kMinP[] = {0.0f, 0.0f, 0.05f, 1.0f};
  const int32_t top_k[] = {0, 0, 1, 3, 20, vocab_size / 2 + 1, vocab_size + 1};
  SlotRequest request;
  request.temperature = kTemperatures[random.Below(6)];
  request.top_p = kTopP[random.Below(6)];
  request.min_p = kMinP[random.Below(4)];
  request.top_k = top_k[random.Below(7)];
  request.min_new_tokens = random.Below(3);
  request.record = static_cast<uint32_t>(random.Below(32));
  return request;
}

TEST_F(TransformCudaTest, RandomRowsHaveTheBitsOfTheCpu) {
  Random random(1);
  for (const int32_t vocab_size : {1, 2, 3, 5, 16, 17, 1000, 1023, 1024, 1025, 2500, 5000, 9001}) {
    std::vector<RowCase> rows;
    for (int32_t i = 0; i < 24; ++i) {
      RowCase row;
      row.logits = MakeLogits(vocab_size, i % 5, random);
      row.request = RandomRequest(vocab_size, random);
      row.num_output = random.Below(3);
      for (int32_t id = random.Below(4); id < vocab_size + 2 && row.banned_ids.size() < 4;
           id += 1 + random.Below(vocab_size + 1)) {
        row.banned_ids.push_back(static_cast<uint32_t>(id));
      }
      rows.push_back(std::move(row));
    }
    Check(rows);
    if (HasFailure()) return;
  }
}

TEST_F(TransformCudaTest, EveryTruncationAlone) {
  Random random(2);
  std::vector<RowCase> rows;
  for (const int32_t shape : {0, 1, 2, 3}) {
    for (const int32_t top_k : {1, 2, 3, 5, 6, 1024, 4999}) {  // more and less than the row's 5 blocks
      RowCase row;
      row.logits = MakeLogits(5000, shape, random);
      row.request.top_k = top_k;
      rows.push_back(row);
    }
    for (const float top_p : {1e-7f, 0.1f, 0.5f, 0.95f, 0.99999994f}) {
      RowCase row;
      row.logits = MakeLogits(5000, shape, random);
      row.request.top_p = top_p;
      rows.push_back(row);
      row.request.min_p = 0.01f;
      rows.push_back(row);
      row.request.top_k = 40;
      rows.push_back(row);
    }
  }
  Check(rows);
}

TEST_F(TransformCudaTest, BrokenRowsAreNotFiniteAndHarmTheirNeighboursNot) {
  Random random(3);
  std::vector<RowCase> rows;
  for (const float broken : {testing::kNan, kInfinity, -kInfinity}) {
    for (const int32_t place : {0, 1, 1023, 1024, 2999}) {
      for (const bool ban : {false, true}) {  // a ban does not hide a broken row
        RowCase row;
        row.logits = MakeLogits(3000, 0, random);
        row.logits[place] = broken;
        row.request.min_new_tokens = 1;
        row.request.record = ban ? uint32_t{kRecordRawLogprob} : 0;
        if (ban) row.banned_ids = {static_cast<uint32_t>(place), 5};
        rows.push_back(row);
      }
    }
  }
  RowCase nothing;
  nothing.logits.assign(3000, -kInfinity);
  rows.push_back(nothing);
  RowCase zeros;  // of both signs
  zeros.logits.assign(3000, -kInfinity);
  for (const int32_t id : {7, 1500, 2999}) zeros.logits[id] = id == 7 ? -0.0f : 0.0f;
  zeros.request.top_k = 2;
  rows.push_back(zeros);
  zeros.request.top_p = 0.5f;
  rows.push_back(zeros);
  Check(rows);
  // All ids banned.
  RowCase banned;
  banned.logits = {1.0f, 2.0f, 3.0f};
  banned.banned_ids = {2, 0, 1};
  banned.request.min_new_tokens = 1;
  RowCase not_yet = banned;
  not_yet.num_output = 1;
  Check({banned, not_yet});
}

TEST_F(TransformCudaTest, ManyBansAndTheRawSum) {
  Random random(4);
  std::vector<RowCase> rows;
  for (int32_t i = 0; i < 6; ++i) {
    RowCase row;
    row.logits = MakeLogits(9000, i % 3, random);
    row.request.min_new_tokens = 1;
    row.request.record = kRecordRawLogprob | (i % 2 == 0 ? uint32_t{kRecordLogprob} : 0);
    row.request.temperature = i < 2 ? 1.0f : i < 4 ? 0.0f : 0.5f;
    // The largest logit is among them: the raw maximum is another one.
    const int32_t largest = static_cast<int32_t>(std::max_element(row.logits.begin(), row.logits.end()) - row.logits.begin());
    for (int32_t j = 0; j < kMaxBannedIds; ++j) row.banned_ids.push_back(static_cast<uint32_t>(j * 4 + largest % 4));
    row.banned_ids[1000] = static_cast<uint32_t>(largest);
    if (largest / 4 < kMaxBannedIds && largest / 4 != 1000) row.banned_ids[largest / 4] = 9001;  // an id that does not exist
    rows.push_back(row);
  }
  Check(rows);
}

// A logit whose weight beside the logit 0 is exactly `weight`.
float LogitOfWeight(float weight) {
  float logit = std::log(weight);
  for (int32_t i = 0; i < 8; ++i) logit = std::nextafter(logit, 0.0f);
  for (int32_t i = 0; i < 16; ++i, logit = std::nextafter(logit, -kInfinity)) {
    RowCase row;
    row.logits = {0.0f, logit};
    if (Reference(row).weight[1] == weight) return logit;
  }
  ADD_FAILURE() << "no logit has the weight " << weight;
  return 0.0f;
}

// Where a partial sum meets the goal exactly, the device must add as the CPU does: small and large sets of candidates, and ties
// of which a part stays.
TEST_F(TransformCudaTest, TopPWithSumsThatMeetTheGoal) {
  const float half = LogitOfWeight(0.5f), quarter = LogitOfWeight(0.25f);
  std::vector<RowCase> rows;
  for (const int32_t ones : {1, 2, 512, 1024}) {
    for (const float top_p : {0.25f, 0.5f, 0.625f, 0.75f}) {
      RowCase row;
      row.logits.assign(5000, -kInfinity);
      Random random(static_cast<uint64_t>(ones));
      const auto put = [&](float logit, int32_t count) {
        while (count > 0) {
          float& place = row.logits[random.Below(5000)];
          if (place != -kInfinity) continue;
          place = logit;
          --count;
        }
      };
      put(0.0f, ones);
      put(half, ones);
      put(quarter, 2 * ones);
      row.request.top_p = top_p;
      rows.push_back(row);
    }
  }
  Check(rows);
}

// Sums of floats are exact in double unless they span many exponents. So the rows below have weights near 1 and weights near
// 1e-8, and a top_p that cuts among the latter: there the CPU's sums are rounded, and where they meet the goal the order of
// additions decides the border, or how many equal weights at it stay.
constexpr float kLargestTopP = 0.99999994f;

struct Border {
  double sum;  // of the weights >= weight
  float weight;
};

// Appends rows whose total is tuned, by ids behind the first num_fixed, lighter than the border, until top_p * total lies within
// a few ulps of border.sum: one row for each of several neighbouring totals.
void AddTunedRows(RowCase row, int32_t num_fixed, const Border& border, std::vector<RowCase>* rows) {
  const int32_t vocab_size = static_cast<int32_t>(row.logits.size());
  const double wanted_total = border.sum / static_cast<double>(kLargestTopP);
  const double ulp = std::nextafter(wanted_total, 1e300) - wanted_total;
  const std::vector<float> fixed = row.logits;
  for (int32_t nudge = -6; nudge <= 6; ++nudge) {
    row.logits = fixed;
    row.request.top_p = 1.0f;  // the totals below are those before top-p
    const double total = wanted_total + nudge * ulp;
    for (int32_t i = num_fixed; i < vocab_size; ++i) {
      if (!(total > Reference(row).out.total)) break;
      // The largest logit with which the total does not pass what is wanted: bisection over floats.
      float low = -80.0f, high = std::log(border.weight) - 0.1f;
      for (int32_t step = 0; step < 40; ++step) {
        row.logits[i] = 0.5f * (low + high);
        (Reference(row).out.total > total ? high : low) = row.logits[i];
      }
      row.logits[i] = low;
    }
    const double goal = static_cast<double>(kLargestTopP) * Reference(row).out.total;
    row.request.top_p = kLargestTopP;
    if (std::abs(goal - border.sum) <= 16.0 * ulp) rows->push_back(row);  // else more was missing than the light ids weigh
  }
}

// 30 weights near 1, `num_small` near 1e-8 and 20 places for AddTunedRows.
RowCase WideRow(int32_t num_small, Random& random) {
  RowCase row;
  for (int32_t i = 0; i < 30 + num_small; ++i) {
    row.logits.push_back(i % (num_small / 30 + 1) == 0 && i / (num_small / 30 + 1) < 30 ? random.Uniform(-2.0f, 0.0f)
                                                                                        : random.Uniform(-21.5f, -17.0f));
  }
  row.logits[0] = 0.0f;
  row.logits.resize(row.logits.size() + 20, -kInfinity);
  return row;
}

// The border of a row whose total may still grow a little: the smallest sum down to a weight that exceeds the goal.
Border FirstBorder(const RowCase& row) {
  const Reference weights(row);
  std::vector<float> sorted = weights.weight;
  std::sort(sorted.begin(), sorted.end(), std::greater<float>());
  Border border = {0.0, 0.0f};
  for (const float weight : sorted) {
    border = {border.sum + weight, weight};
    if (border.sum > static_cast<double>(kLargestTopP) * weights.out.total) break;
  }
  return border;
}

TEST_F(TransformCudaTest, TopPWhereRoundingDecidesTheBorder) {
  std::vector<RowCase> rows;
  for (uint64_t seed = 1; seed <= 4; ++seed) {
    Random random(seed);
    const RowCase row = WideRow(240, random);
    AddTunedRows(row, 270, FirstBorder(row), &rows);
  }
  ASSERT_GE(rows.size(), 25u);
  Check(rows);
}

// The same with so many candidates that the CPU drops some on its way.
TEST_F(TransformCudaTest, TopPWhereRoundingDecidesAmongMany) {
  std::vector<RowCase> rows;
  for (uint64_t seed = 1; seed <= 2; ++seed) {
    Random random(seed);
    const RowCase row = WideRow(1500, random);
    AddTunedRows(row, 1530, FirstBorder(row), &rows);
  }
  ASSERT_GE(rows.size(), 12u);
  Check(rows);
}

// Equal weights at the border, of which a whole number meets the goal, to within rounding.
TEST_F(TransformCudaTest, TopPWhereRoundingDecidesTheTies) {
  std::vector<RowCase> rows;
  for (uint64_t seed = 1; seed <= 3; ++seed) {
    Random random(seed);
    constexpr float kTied = -22.1f;
    constexpr int32_t kNumTied = 6000, kNumOthers = 330;
    RowCase row = WideRow(kNumOthers - 30, random);
    row.logits.insert(row.logits.begin() + kNumOthers, kNumTied, kTied);
    const Reference weights(row);
    const float tied = weights.weight[kNumOthers];
    double above = 0.0;
    for (const float weight : weights.weight) above += weight > tied ? weight : 0.0f;
    const double count = std::ceil((static_cast<double>(kLargestTopP) * weights.out.total - above) / static_cast<double>(tied));
    ASSERT_GT(count, 1.0);
    AddTunedRows(row, kNumOthers + kNumTied, {above + count * static_cast<double>(tied), tied}, &rows);
  }
  ASSERT_GE(rows.size(), 20u);
  Check(rows);
}

// A logit just below the maximum with the same weight 1, at a lower id: argmax stays first.
TEST_F(TransformCudaTest, ArgmaxComesFirstAmongEqualWeights) {
  RowCase row;
  row.logits = {-1e-9f, -3.0f, 0.0f, -1e-9f, 0.0f};
  ASSERT_EQ(Reference(row).weight[0], 1.0f);
  std::vector<RowCase> rows;
  for (const float top_p : {0.1f, 0.3f, 0.6f, 0.8f}) {
    row.request.top_p = top_p;
    rows.push_back(row);
  }
  Check(rows);
}

TEST_F(TransformCudaTest, FullVocabulary) {
  Random random(5);
  std::vector<RowCase> rows(2);
  rows[0].logits = MakeLogits(248320, 0, random);
  rows[0].request.temperature = 0.8f;
  rows[1].logits = MakeLogits(248320, 1, random);
  rows[1].request.top_k = 20;
  rows[1].request.top_p = 0.95f;
  Check(rows);
}

}  // namespace
}  // namespace bebop
