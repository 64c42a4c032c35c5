// SPDX-License-Identifier: Apache-2.0
#include "kernels/sampling/sampling.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/sampling/sampling_kernels.h"

namespace bebop {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr double kLargestUniform = 1.0 - 0x1.0p-53;

// A row with its storage.
struct Row {
  explicit Row(std::vector<float> values) : logits(std::move(values)) {
    const size_t vocab_size = logits.size();
    weight.assign(vocab_size, -1.0f);
    block_sum.assign(static_cast<size_t>(NumSamplingBlocks(static_cast<int32_t>(vocab_size))), -1.0);
    scratch.assign(vocab_size, kNaN);
    args.logits = logits.data();
    args.vocab_size = static_cast<int32_t>(vocab_size);
    args.scratch = scratch.data();
    out.weight = weight.data();
    out.block_sum = block_sum.data();
  }
  Row(const Row&) = delete;
  Row& operator=(const Row&) = delete;
  const TokenDistribution& Run() {
    cpu::Transform(args, &out);
    return out;
  }
  std::vector<float> logits, weight, scratch;
  std::vector<double> block_sum;
  TransformArgs args;
  TokenDistribution out;
};

std::vector<float> RandomLogits(int32_t vocab_size, float deviation, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0f, deviation);
  std::vector<float> logits(static_cast<size_t>(vocab_size));
  for (float& logit : logits) logit = normal(generator);
  return logits;
}

const int32_t kSizes[] = {1, 2, 3, 15, 16, 17, 63, 64, 65, 1000, 1023, 1024, 1025, 2047, 2500, 5000};

// The transform as algorithm.md section 2 words it, by sorting; starts from the untruncated weights.
std::vector<float> TruncateBySorting(const std::vector<float>& logits, std::vector<float> weight, int32_t top_k, float top_p,
                                     float min_p) {
  const int32_t vocab_size = static_cast<int32_t>(logits.size());
  std::vector<int32_t> order(static_cast<size_t>(vocab_size));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
  if (top_k > 0 && top_k < vocab_size) {
    const float kth = logits[order[top_k - 1]];
    for (int32_t id = 0; id < vocab_size; ++id) {
      if (logits[id] < kth) weight[id] = 0.0f;
    }
  }
  if (top_p < 1.0f) {
    const uint32_t first = static_cast<uint32_t>(order[0]);
    std::sort(order.begin(), order.end());
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
      if (weight[a] != weight[b]) return weight[a] > weight[b];
      return (static_cast<uint32_t>(a) == first) > (static_cast<uint32_t>(b) == first);
    });
    double total = 0.0, mass = 0.0;
    for (float value : weight) total += value;
    for (int32_t id : order) {
      if (mass >= static_cast<double>(top_p) * total) {
        weight[id] = 0.0f;
      } else {
        mass += weight[id];
      }
    }
  }
  const float largest = *std::max_element(weight.begin(), weight.end());
  for (float& value : weight) {
    if (value < min_p * largest) value = 0.0f;
  }
  return weight;
}

// Sums in the documented order, by plain loops.
void CheckSums(const TokenDistribution& distribution) {
  double total = 0.0;
  for (int32_t block = 0; block < NumSamplingBlocks(distribution.vocab_size); ++block) {
    double lanes[16] = {};
    const int32_t end = std::min((block + 1) * kSamplingBlock, distribution.vocab_size);
    for (int32_t id = block * kSamplingBlock; id < end; ++id) lanes[id % 16] += distribution.weight[id];
    for (int32_t half : {8, 4, 2, 1}) {
      for (int32_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    ASSERT_EQ(distribution.block_sum[block], lanes[0]) << "block " << block;
    total += lanes[0];
  }
  ASSERT_EQ(distribution.total, total);
}

int64_t UlpDistance(float value, double exact) {
  const float nearest = static_cast<float>(exact);
  return std::abs(static_cast<int64_t>(std::bit_cast<int32_t>(value)) - std::bit_cast<int32_t>(nearest));
}

TEST(Transform, WeightsAreWithinOneUlpOfExp) {
  // Every float x = logit of a dense grid over [-90, 0]; the maximum is 0 and the temperature 1, so x is the exponent itself.
  int64_t worst = 0;
  std::vector<float> logits(1 << 16);
  for (int32_t chunk = 0; chunk < 32; ++chunk) {
    for (size_t i = 0; i < logits.size(); ++i) {
      logits[i] = -90.0f * static_cast<float>(i + static_cast<size_t>(chunk) * logits.size()) / (32.0f * 65536.0f);
    }
    logits[0] = 0.0f;
    Row row(logits);
    ASSERT_TRUE(row.Run().finite);
    for (size_t i = 0; i < logits.size(); ++i) {
      const double exact = std::exp(static_cast<double>(logits[i]));
      if (exact < 1.1754945e-38) {
        ASSERT_EQ(row.weight[i], 0.0f) << logits[i];
      } else {
        worst = std::max(worst, UlpDistance(row.weight[i], exact));
      }
    }
  }
  EXPECT_LE(worst, 1);
  RecordProperty("worst_ulp", static_cast<int>(worst));
}

TEST(Transform, TemperatureAndSumsForEverySize) {
  for (int32_t vocab_size : kSizes) {
    for (float temperature : {1.0f, 0.3f, 2.5f}) {
      Row row(RandomLogits(vocab_size, 3.0f, static_cast<uint32_t>(vocab_size)));
      row.args.temperature = temperature;
      row.args.want_raw_lse = true;
      const TokenDistribution& out = row.Run();
      ASSERT_TRUE(out.finite);
      CheckSums(out);
      const auto max = std::max_element(row.logits.begin(), row.logits.end());
      EXPECT_EQ(out.argmax, static_cast<uint32_t>(max - row.logits.begin()));
      EXPECT_EQ(out.weight[out.argmax], 1.0f);
      long double sum = 0.0, raw_sum = 0.0;
      for (float logit : row.logits) {
        sum += std::exp((static_cast<long double>(logit) - *max) / temperature);
        raw_sum += std::exp(static_cast<long double>(logit) - *max);
      }
      EXPECT_NEAR(out.raw_lse, static_cast<double>(std::log(raw_sum) + *max), 1e-6);
      double probability_sum = 0.0;
      for (int32_t id = 0; id < vocab_size; ++id) {
        const double exponent = (static_cast<double>(row.logits[id]) - *max) / temperature;
        const double exact = std::exp(exponent) / static_cast<double>(sum);
        // Three float roundings of the exponent, 1 ulp of the exponential, and as much for the sum.
        const double tolerance = 0x1p-24 * (3.0 * std::abs(exponent) + 8.0);
        ASSERT_NEAR(out.prob(static_cast<uint32_t>(id)) / exact, 1.0, tolerance);
        ASSERT_NEAR(LogProb(out, static_cast<uint32_t>(id)), std::log(exact), tolerance);
        probability_sum += std::exp(LogProb(out, static_cast<uint32_t>(id)));
      }
      EXPECT_NEAR(probability_sum, 1.0, 1e-12);
      EXPECT_NEAR(RawLogProb(out, row.logits.data(), 0), row.logits[0] - static_cast<double>(std::log(raw_sum) + *max), 1e-6);
    }
  }
}

TEST(Transform, TruncationEqualsSortingBitForBit) {
  std::mt19937 generator(5);
  const int32_t top_ks[] = {0, 0, 1, 2, 3, 5, 20, 300, 1024, 4999};
  const float top_ps[] = {1.0f, 1.0f, 0.95f, 0.5f, 0.1f, 1e-6f, 0.999f, 0.9999999f};
  const float min_ps[] = {0.0f, 0.0f, 0.01f, 0.3f, 1.0f};
  const float temperatures[] = {1.0f, 0.2f, 3.0f, 100.0f};
  const float deviations[] = {3.0f, 0.1f, 30.0f};
  for (int32_t trial = 0; trial < 1500; ++trial) {
    const int32_t vocab_size = kSizes[generator() % std::size(kSizes)];
    std::vector<float> logits = RandomLogits(vocab_size, deviations[generator() % 3], generator());
    switch (generator() % 4) {
      case 0:  // coarse values: many ties
        for (float& logit : logits) logit = std::round(logit);
        break;
      case 1:  // ids without mass
        for (float& logit : logits) logit = generator() % 2 ? logit : -kInfinity;
        logits[generator() % logits.size()] = 0.25f;
        break;
      default: break;
    }
    Row plain(logits);
    plain.args.temperature = temperatures[generator() % std::size(temperatures)];
    ASSERT_TRUE(plain.Run().finite);
    Row row(logits);
    row.args.temperature = plain.args.temperature;
    row.args.top_k = top_ks[generator() % std::size(top_ks)];
    row.args.top_p = top_ps[generator() % std::size(top_ps)];
    row.args.min_p = min_ps[generator() % std::size(min_ps)];
    ASSERT_TRUE(row.Run().finite);
    ASSERT_EQ(row.weight, TruncateBySorting(logits, plain.weight, row.args.top_k, row.args.top_p, row.args.min_p))
        << "trial " << trial << " V " << vocab_size << " T " << row.args.temperature << " top_k " << row.args.top_k << " top_p "
        << row.args.top_p << " min_p " << row.args.min_p;
    CheckSums(row.out);
    EXPECT_GT(row.weight[row.out.argmax], 0.0f);
  }
}

TEST(Transform, HandComputedTruncation) {
  // Probabilities 0.4, 0.3, 0.2, 0.1 up to a constant.
  const std::vector<float> logits = {std::log(0.2f), std::log(0.4f), std::log(0.1f), std::log(0.3f)};
  const auto support = [&](int32_t top_k, float top_p, float min_p) {
    Row row(logits);
    row.args.top_k = top_k;
    row.args.top_p = top_p;
    row.args.min_p = min_p;
    row.Run();
    std::vector<uint32_t> ids;
    for (uint32_t id = 0; id < 4; ++id) {
      if (row.weight[id] > 0.0f) ids.push_back(id);
    }
    return ids;
  };
  using Ids = std::vector<uint32_t>;
  EXPECT_EQ(support(2, 1.0f, 0.0f), (Ids{1, 3}));
  EXPECT_EQ(support(0, 0.65f, 0.0f), (Ids{1, 3})) << "0.4 + 0.3 crosses 0.65; the crossing id stays";
  EXPECT_EQ(support(0, 0.75f, 0.0f), (Ids{0, 1, 3}));
  EXPECT_EQ(support(0, 0.01f, 0.0f), (Ids{1}));
  EXPECT_EQ(support(0, 1.0f, 0.6f), (Ids{1, 3})) << "0.2 < 0.6 * 0.4";
  EXPECT_EQ(support(3, 0.7f, 0.0f), (Ids{1, 3})) << "top_p counts what top_k left: 0.7 / 0.9 reaches 0.7";
  EXPECT_EQ(support(0, 0.95f, 0.3f), (Ids{0, 1, 3}));
}

TEST(Transform, TiesAtTheKthValueStayAndTiesOfTopPGoByArgmaxThenId) {
  Row row({1.0f, 2.0f, 1.0f, 2.0f, 1.0f, 0.0f});
  row.args.top_k = 3;
  row.Run();
  EXPECT_GT(row.weight[0], 0.0f);
  EXPECT_GT(row.weight[4], 0.0f);
  EXPECT_EQ(row.weight[5], 0.0f);
  Row uniform(std::vector<float>(10, 1.0f));
  uniform.args.top_p = 0.5f;
  uniform.Run();
  EXPECT_EQ(uniform.weight, (std::vector<float>{1, 1, 1, 1, 1, 0, 0, 0, 0, 0}));
  // Logits that differ but whose weights do not: the largest logit keeps its place.
  Row close({1.0f, std::nextafter(1.0f, 2.0f), 1.0f});
  close.args.temperature = 100.0f;
  close.args.top_p = 0.01f;
  close.Run();
  EXPECT_EQ(close.weight, (std::vector<float>{0, 1, 0}));
}

TEST(Transform, GreedyIsOneHotAtTheLowestLargest) {
  for (int32_t vocab_size : kSizes) {
    std::vector<float> logits(static_cast<size_t>(vocab_size), -2.0f);
    const uint32_t first = static_cast<uint32_t>(vocab_size) / 2;
    for (size_t id = first; id < logits.size(); id += 7) logits[id] = 5.0f;
    Row row(logits);
    row.args.temperature = 0.0f;
    const TokenDistribution& out = row.Run();
    ASSERT_TRUE(out.finite);
    EXPECT_EQ(out.argmax, first);
    EXPECT_EQ(out.prob(first), 1.0);
    EXPECT_EQ(std::count(row.weight.begin(), row.weight.end(), 0.0f), vocab_size - 1);
    EXPECT_EQ(cpu::SampleInverseCdf(out, 0.9, 0.9), first);
    EXPECT_EQ(cpu::Entropy(out), 0.0);
    // The report: same argmax, temperature 1, no truncation.
    row.args.top_k = 1;
    row.args = ReportTransformArgs(row.args);
    row.Run();
    EXPECT_EQ(row.out.argmax, first);
    EXPECT_EQ(std::count(row.weight.begin(), row.weight.end(), 0.0f), 0);
    EXPECT_EQ(row.args.temperature, 1.0f);
  }
}

TEST(Transform, BannedIdsHaveNoMassAndTheRestIsUnchanged) {
  for (float temperature : {0.0f, 1.0f, 0.5f}) {
    const std::vector<float> logits = RandomLogits(2000, 3.0f, 3);
    const uint32_t best = static_cast<uint32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
    const std::vector<uint32_t> banned = {best, 17, 1999, 17, 4000000000u};
    std::vector<float> masked = logits;
    masked[best] = masked[17] = masked[1999] = -kInfinity;
    Row row(logits), expected(masked), raw(logits);
    row.args.temperature = expected.args.temperature = temperature;
    row.args.banned_ids = banned;
    row.args.top_p = expected.args.top_p = 0.9f;
    row.args.want_raw_lse = raw.args.want_raw_lse = true;
    ASSERT_TRUE(row.Run().finite);
    expected.Run();
    raw.Run();
    EXPECT_EQ(row.weight, expected.weight);
    EXPECT_EQ(row.out.argmax, expected.out.argmax);
    EXPECT_EQ(row.out.total, expected.out.total);
    EXPECT_NEAR(row.out.raw_lse, raw.out.raw_lse, 1e-9) << "nothing is banned from the raw log-probabilities";
  }
}

TEST(Transform, NonFiniteRowsAreFlagged) {
  for (int32_t vocab_size : {1, 5, 16, 1024, 1025, 2500}) {
    for (float bad : {kNaN, -kNaN, kInfinity}) {
      for (int32_t place : {0, vocab_size / 2, vocab_size - 1}) {
        for (float temperature : {1.0f, 0.0f}) {
          Row row(RandomLogits(vocab_size, 2.0f, 9));
          row.args.temperature = temperature;
          ASSERT_TRUE(row.Run().finite);
          row.logits[place] = bad;
          EXPECT_FALSE(row.Run().finite) << vocab_size << " " << bad << " " << place;
          row.args.want_raw_lse = true;
          EXPECT_FALSE(row.Run().finite);
          const uint32_t banned[] = {static_cast<uint32_t>(place)};
          row.args.banned_ids = banned;
          EXPECT_FALSE(row.Run().finite) << "a ban does not hide a broken row";
          EXPECT_FALSE(cpu::Summarize(row.logits.data(), vocab_size, 1.0f, true).finite);
        }
      }
    }
    Row nothing(std::vector<float>(static_cast<size_t>(vocab_size), -kInfinity));
    EXPECT_FALSE(nothing.Run().finite);
    EXPECT_FALSE(cpu::Summarize(nothing.logits.data(), vocab_size, 1.0f, true).finite);
    nothing.logits.back() = -1e30f;
    ASSERT_TRUE(nothing.Run().finite);
    EXPECT_EQ(nothing.out.argmax, static_cast<uint32_t>(vocab_size - 1));
  }
  Row all_banned({1.0f, 2.0f});
  const uint32_t banned[] = {0, 1};
  all_banned.args.banned_ids = banned;
  EXPECT_FALSE(all_banned.Run().finite);
}

TEST(Transform, ExtremeTemperaturesAndLogits) {
  for (float temperature : {1e-45f, 1e-38f, 1e-10f, 1e10f, 3e38f}) {
    Row row({-3e38f, 1.0f, 3.0f, 2.9999f, 3.0f, -kInfinity});
    row.args.temperature = temperature;
    const TokenDistribution& out = row.Run();
    ASSERT_TRUE(out.finite);
    EXPECT_EQ(out.argmax, 2u);
    EXPECT_EQ(out.weight[2], 1.0f);
    EXPECT_EQ(out.weight[4], 1.0f);
    EXPECT_EQ(out.weight[5], 0.0f);
    EXPECT_EQ(out.weight[3], temperature < 1.0f ? 0.0f : 1.0f);
    CheckSums(out);
  }
  Row wide({3.4e38f, -3.4e38f});
  ASSERT_TRUE(wide.Run().finite);
  EXPECT_EQ(wide.weight, (std::vector<float>{1.0f, 0.0f}));
}

// All instruction sets give the same bits (the statement at the top of sampling_kernels.h).
TEST(SamplingKernels, TablesAgreeBitForBit) {
  std::vector<const cpu::SamplingKernels*> tables;
  for (int set = 0; set <= static_cast<int>(cpu::DetectInstructionSet()); ++set) {
    tables.push_back(&cpu::SamplingKernelsFor(static_cast<cpu::InstructionSet>(set)));
  }
  std::mt19937 generator(11);
  for (int trial = 0; trial < 400; ++trial) {
    const int32_t count = 1 + static_cast<int32_t>(generator() % 1024);
    std::vector<float> logits = RandomLogits(count, trial % 3 == 0 ? 40.0f : 3.0f, generator());
    if (trial % 5 == 0) logits[generator() % logits.size()] = kNaN;
    if (trial % 4 == 0) logits[generator() % logits.size()] = -kInfinity;
    const float max = 4.0f, scale = 1.7f;
    std::vector<double> reference;
    std::vector<float> reference_weight;
    for (const cpu::SamplingKernels* kernels : tables) {
      std::vector<double> results;
      const cpu::BlockMax block_max = kernels->max_of_block(logits.data(), count);
      results.push_back(block_max.unusable);
      if (!block_max.unusable) results.push_back(block_max.max);
      std::vector<float> finite = logits;
      for (float& logit : finite) logit = std::isnan(logit) ? 0.0f : std::min(logit, max);
      std::vector<float> weight(finite.size());
      results.push_back(kernels->exp_block(finite.data(), count, max, scale, -5.0f, 1e-9f, weight.data()));
      const std::vector<float> floored = weight;
      results.push_back(kernels->exp_block(finite.data(), count, max, scale, -kInfinity, 0.0f, weight.data()));
      const std::vector<float> full = weight;
      const cpu::ExpSums sums = kernels->sum_exp_block(finite.data(), count, max, scale);
      EXPECT_EQ(sums.sum, results.back());
      results.push_back(sums.weighted_log);
      results.push_back(kernels->count_at_least(finite.data(), count, 0.5f));
      results.push_back(kernels->mass_at_least(full.data(), count, 1e-4f));
      results.push_back(kernels->residual_block(full.data(), floored.data(), count, 0.3, 0.7));
      results.push_back(kernels->overlap_block(full.data(), floored.data(), count, 0.3, 0.7));
      results.push_back(kernels->weighted_log_block(full.data(), count));
      results.push_back(kernels->filter_block(weight.data(), count, 1e-3f));
      weight.insert(weight.end(), floored.begin(), floored.end());
      weight.insert(weight.end(), full.begin(), full.end());
      std::vector<float> noise_weight(cpu::kNoiseGroup, 1e-3f);
      uint32_t high[cpu::kNoiseGroup];
      results.push_back(kernels->noise_group(0xfedcba9876543210u + static_cast<uint64_t>(trial), 5, 0xfffffff0u, 6, 16 * 77,
                                             noise_weight.data(), trial % 2 ? 1e11f : 1e9f, high));
      for (uint32_t word : high) results.push_back(word);
      if (reference.empty()) {
        reference = results;
        reference_weight = weight;
      }
      ASSERT_EQ(results, reference);
      ASSERT_EQ(weight, reference_weight);
    }
  }
}

TEST(SampleInverseCdf, MatchesTheCumulativeSumsOverBlocks) {
  std::mt19937_64 generator(21);
  std::uniform_real_distribution<double> uniform(0.0, 1.0);
  Row row(RandomLogits(2500, 1.0f, 4));
  row.args.min_p = 0.02f;
  const TokenDistribution& out = row.Run();
  for (int trial = 0; trial < 20000; ++trial) {
    const double u_block = uniform(generator), u_within = uniform(generator);
    const uint32_t id = cpu::SampleInverseCdf(out, u_block, u_within);
    ASSERT_GT(out.weight[id], 0.0f);
    const int32_t block = static_cast<int32_t>(id) / kSamplingBlock;
    double before = 0.0;
    for (int32_t j = 0; j < block; ++j) before += out.block_sum[j];
    ASSERT_LE(before, u_block * out.total * (1 + 1e-12));
    ASSERT_GT(before + out.block_sum[block], u_block * out.total * (1 - 1e-12));
    double within = 0.0;
    for (uint32_t v = static_cast<uint32_t>(block * kSamplingBlock); v < id; ++v) within += out.weight[v];
    ASSERT_LE(within, u_within * out.block_sum[block] * (1 + 1e-12));
    ASSERT_GT(within + out.weight[id], u_within * out.block_sum[block] * (1 - 1e-12));
  }
}

TEST(Samplers, NeverReturnAnIdWithoutMassAtTheEdgesOfTheUniform) {
  std::mt19937 generator(31);
  for (int trial = 0; trial < 300; ++trial) {
    const int32_t vocab_size = kSizes[generator() % std::size(kSizes)];
    std::vector<float> logits = RandomLogits(vocab_size, 20.0f, generator()),
                       draft_logits = RandomLogits(vocab_size, 20.0f, generator());
    for (float& logit : logits) logit = generator() % 3 ? logit : -kInfinity;
    logits[generator() % logits.size()] = 1.0f;
    Row target(logits), draft(draft_logits);
    target.Run();
    draft.Run();
    for (double u_block : {0.0, 0.5, kLargestUniform}) {
      for (double u_within : {0.0, 0.5, kLargestUniform}) {
        EXPECT_GT(target.weight[cpu::SampleInverseCdf(target.out, u_block, u_within)], 0.0f);
        EXPECT_GT(target.weight[cpu::SampleResidual(target.out, draft.out, u_block, u_within)], 0.0f);
        const uint32_t rest = cpu::SampleExcluding(target.out, target.out.argmax, u_block, u_within);
        EXPECT_GT(target.weight[rest], 0.0f);
        if (std::count(target.weight.begin(), target.weight.end(), 0.0f) < vocab_size - 1) {
          EXPECT_NE(rest, target.out.argmax);
        }
      }
    }
  }
}

// Reference inverse CDF over masses given one by one.
uint32_t InvertMasses(const std::vector<double>& mass, double u_block, double u_within, double* margin) {
  std::vector<double> block_mass(mass.size() / kSamplingBlock + 1, 0.0);
  for (size_t id = 0; id < mass.size(); ++id) block_mass[id / kSamplingBlock] += mass[id];
  const double total = std::accumulate(block_mass.begin(), block_mass.end(), 0.0);
  *margin = 1.0;
  size_t block = 0;
  for (double cumulative = 0.0;; ++block) {
    cumulative += block_mass[block];
    *margin = std::min(*margin, std::abs(cumulative / total - u_block));
    if (cumulative > u_block * total) break;
  }
  size_t id = block * kSamplingBlock;
  for (double cumulative = 0.0;; ++id) {
    cumulative += mass[id];
    if (mass[id] > 0.0) *margin = std::min(*margin, std::abs(cumulative / block_mass[block] - u_within));
    if (cumulative > u_within * block_mass[block]) return static_cast<uint32_t>(id);
  }
}

TEST(Samplers, ResidualAndExclusionMatchTheirMasses) {
  std::mt19937_64 generator(41);
  std::uniform_real_distribution<double> uniform(0.0, 1e0 - 1e-6);
  for (int32_t vocab_size : {3, 17, 1024, 2500}) {
    Row target(RandomLogits(vocab_size, 2.0f, 51)), draft(RandomLogits(vocab_size, 2.0f, 52));
    if (vocab_size > 3) target.args.top_p = draft.args.top_p = 0.9f;
    target.Run();
    draft.Run();
    std::vector<double> residual, rest;
    const uint32_t excluded = target.out.argmax;
    for (uint32_t id = 0; id < static_cast<uint32_t>(vocab_size); ++id) {
      residual.push_back(std::max(0.0, target.out.prob(id) - draft.out.prob(id)));
      rest.push_back(id == excluded ? 0.0 : target.out.prob(id));
    }
    int compared = 0;
    for (int trial = 0; trial < 2000; ++trial) {
      const double u_block = uniform(generator), u_within = uniform(generator);
      double margin;
      uint32_t expected = InvertMasses(residual, u_block, u_within, &margin);
      if (margin > 1e-12) {
        EXPECT_EQ(cpu::SampleResidual(target.out, draft.out, u_block, u_within), expected);
        ++compared;
      }
      expected = InvertMasses(rest, u_block, u_within, &margin);
      if (margin > 1e-12) {
        EXPECT_EQ(cpu::SampleExcluding(target.out, excluded, u_block, u_within), expected);
        ++compared;
      }
    }
    EXPECT_GT(compared, 3900);
  }
}

TEST(Samplers, FallBackToTheTargetWhenNothingIsLeft) {
  Row target({0.0f, 1.0f, 2.0f}), same({0.0f, 1.0f, 2.0f}), one_hot({0.0f, -kInfinity, -kInfinity});
  target.Run();
  same.Run();
  one_hot.Run();
  for (double u : {0.0, 0.2, 0.7, kLargestUniform}) {
    EXPECT_EQ(cpu::SampleResidual(target.out, same.out, 0.0, u), cpu::SampleInverseCdf(target.out, 0.0, u));
    EXPECT_EQ(cpu::SampleExcluding(one_hot.out, 0, 0.0, u), 0u);
  }
}

TEST(Samplers, ExclusionKeepsTinyRemaindersExact) {
  // 1 + 2e-20 is 1 in double: the rest must come from its own weights, 3:1, not from a difference.
  Row row({0.0f, std::log(3e-20f), -kInfinity, std::log(1e-20f)});
  row.Run();
  int threes = 0;
  for (int i = 0; i < 4000; ++i) {
    const uint32_t id = cpu::SampleExcluding(row.out, 0, 0.5, (i + 0.5) / 4000);
    ASSERT_TRUE(id == 1 || id == 3);
    threes += id == 1;
  }
  EXPECT_NEAR(threes, 3000, 2);
}

TEST(Samplers, EveryIdOfALargeVocabularyIsReachable) {
  constexpr int32_t kVocab = 248320;  // 242.5 blocks
  for (bool tiny : {false, true}) {
    std::vector<float> logits(kVocab, tiny ? -60.0f : 0.0f);
    if (tiny) logits[5] = 0.0f;  // one id holds nearly everything, the rest 1e-26 each
    Row row(logits);
    ASSERT_TRUE(row.Run().finite);
    CheckSums(row.out);
    for (int32_t id : {0, 1, 1023, 1024, 123456, 247807, 247808, 248318, 248319}) {
      const int32_t block = id / kSamplingBlock;
      double before = 0.0, within = 0.0;
      for (int32_t j = 0; j < block; ++j) before += row.out.block_sum[j];
      for (int32_t v = block * kSamplingBlock; v < id; ++v) within += row.out.weight[v];
      const double u_block = (before + 0.5 * row.out.block_sum[block]) / row.out.total;
      const double u_within = (within + 0.5 * row.out.weight[id]) / row.out.block_sum[block];
      if (tiny && block > 0) continue;  // below 2^-53 of the total: not a 53-bit uniform
      if (tiny) {
        EXPECT_EQ(cpu::SampleInverseCdf(row.out, 0.0, kLargestUniform), 5u);
        EXPECT_EQ(cpu::SampleExcluding(row.out, 5, u_block, (id + 0.5) / (kVocab - 1)) < static_cast<uint32_t>(kVocab), true);
      } else {
        EXPECT_EQ(cpu::SampleInverseCdf(row.out, u_block, u_within), static_cast<uint32_t>(id));
      }
    }
  }
}

uint32_t GumbelByDefinition(const TokenDistribution& distribution, const RandomKey& key) {
  double best = 0.0;
  int64_t best_id = -1;
  for (uint32_t id = 0; id < static_cast<uint32_t>(distribution.vocab_size); ++id) {
    if (distribution.weight[id] == 0.0f) continue;
    const double score = std::log(distribution.prob(id)) - std::log(cpu::CoupledExponential(key, id));
    if (best_id < 0 || score > best) {
      best = score;
      best_id = id;
    }
  }
  return static_cast<uint32_t>(best_id);
}

TEST(SampleGumbel, IsTheArgmaxOfLogProbabilityPlusGumbel) {
  std::mt19937 generator(61);
  for (int trial = 0; trial < 1200; ++trial) {
    const int32_t vocab_size = kSizes[generator() % std::size(kSizes)];
    Row row(RandomLogits(vocab_size, trial % 3 == 0 ? 0.01f : 4.0f, generator()));
    if (trial % 2) row.args.top_k = 1 + static_cast<int32_t>(generator() % 50);
    row.Run();
    const RandomKey key{generator(), static_cast<uint32_t>(generator()), static_cast<uint32_t>(generator())};
    ASSERT_EQ(cpu::SampleGumbel(row.out, key), GumbelByDefinition(row.out, key)) << trial;
  }
}

TEST(CoupledExponential, HasTheDocumentedBitsAndLaw) {
  const RandomKey key{77, 3, 9};
  for (uint32_t id : {0u, 5u, 16u, 63u, 64u, 1000u, 248319u}) {
    const uint32_t lane = id / 64 * 16 + id % 16, word = id % 64 / 16;
    const uint32_t purpose = static_cast<uint32_t>(DrawPurpose::kCoupled);
    const uint64_t high = Philox4x32(77, {9, 3, purpose, lane})[word];
    const uint64_t low = Philox4x32(77, {9, 3, purpose, lane + 0x80000000u})[word] >> 11;
    const double c = (static_cast<double>(high << 21 | low) + 0.5) * 0x1.0p-53;
    EXPECT_EQ(cpu::CoupledExponential(key, id), -std::log1p(-c));
  }
  constexpr int kCount = 100000;
  std::vector<double> values;
  for (uint32_t id = 0; id < kCount; ++id) values.push_back(-std::expm1(-cpu::CoupledExponential(key, id)));
  std::sort(values.begin(), values.end());
  double distance = 0.0;
  for (int i = 0; i < kCount; ++i) {
    distance = std::max({distance, (i + 1.0) / kCount - values[i], values[i] - static_cast<double>(i) / kCount});
  }
  EXPECT_LT(distance, 2.7 / std::sqrt(kCount));  // Kolmogorov-Smirnov, false alarm under 1e-6
}

TEST(Scalars, MatchTheirDefinitions) {
  std::mt19937 generator(71);
  for (int trial = 0; trial < 200; ++trial) {
    const int32_t vocab_size = trial < 190 ? kSizes[generator() % 10] : 2500;
    Row target(RandomLogits(vocab_size, trial % 2 ? 3.0f : 0.5f, generator()));
    Row draft(RandomLogits(vocab_size, trial % 2 ? 3.0f : 0.5f, generator()));
    if (trial % 3 == 0) target.args.top_k = draft.args.top_k = 5;
    if (trial % 7 == 0) {
      draft.logits = target.logits;
      draft.args.logits = draft.logits.data();
    }
    target.Run();
    draft.Run();
    double entropy = 0.0, overlap = 0.0, coupled = 0.0;
    for (uint32_t v = 0; v < static_cast<uint32_t>(vocab_size); ++v) {
      const double target_prob = target.out.prob(v), draft_prob = draft.out.prob(v);
      if (target_prob > 0.0) entropy -= target_prob * std::log(target_prob);
      overlap += std::min(target_prob, draft_prob);
      if (target_prob == 0.0 || draft_prob == 0.0) continue;
      double sum = 0.0;
      for (uint32_t u = 0; u < static_cast<uint32_t>(vocab_size); ++u) {
        sum += std::max(target.out.prob(u) / target_prob, draft.out.prob(u) / draft_prob);
      }
      coupled += 1.0 / sum;
    }
    EXPECT_NEAR(cpu::Entropy(target.out), entropy, 1e-6);
    EXPECT_NEAR(cpu::Overlap(target.out, draft.out), overlap, 1e-12);
    EXPECT_NEAR(cpu::CoupledOverlap(target.out, draft.out), coupled, 3e-9);
    const double distance = 1.0 - overlap;
    EXPECT_GE(coupled, (1 - distance) / (1 + distance) - 1e-9);
    EXPECT_LE(coupled, overlap + 1e-9);
  }
}

TEST(Summarize, MatchesLongDouble) {
  for (int32_t vocab_size : kSizes) {
    for (float temperature : {1.0f, 0.25f, 4.0f}) {
      std::vector<float> logits = RandomLogits(vocab_size, 3.0f, static_cast<uint32_t>(vocab_size) + 1);
      logits[0] = -400.0f;
      logits.back() = 2.0f;
      const LogitSummary summary = cpu::Summarize(logits.data(), vocab_size, temperature, true);
      ASSERT_TRUE(summary.finite);
      long double sum = 0.0, weighted = 0.0;
      for (float logit : logits) sum += std::exp(static_cast<long double>(logit) / temperature);
      for (float logit : logits) {
        const long double log_prob = static_cast<long double>(logit) / temperature - std::log(sum);
        weighted -= std::exp(log_prob) * log_prob;
        EXPECT_NEAR(summary.LogProb(logit), static_cast<double>(log_prob), 2e-6 * (1 + std::abs(static_cast<double>(log_prob))));
      }
      EXPECT_NEAR(summary.entropy, static_cast<double>(weighted), 2e-6);
      EXPECT_EQ(summary.argmax, static_cast<uint32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin()));
    }
  }
}

TEST(TopLogits, IsTheHeadOfAStableSort) {
  std::mt19937 generator(81);
  for (int trial = 0; trial < 200; ++trial) {
    std::vector<float> logits = RandomLogits(1 + static_cast<int32_t>(generator() % 3000), 3.0f, generator());
    if (trial % 2) {
      for (float& logit : logits) logit = std::round(logit);
    }
    std::vector<uint32_t> order(logits.size());
    std::iota(order.begin(), order.end(), 0u);
    std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return logits[a] > logits[b]; });
    for (int32_t count : {0, 1, 20}) {
      std::vector<uint32_t> ids(static_cast<size_t>(count) + 1, 123456789u);
      const int32_t written = cpu::TopLogits(logits.data(), static_cast<int32_t>(logits.size()), count, ids.data());
      ASSERT_EQ(written, std::min<int32_t>(count, static_cast<int32_t>(logits.size())));
      EXPECT_TRUE(std::equal(order.begin(), order.begin() + written, ids.begin()));
      EXPECT_EQ(ids[written], 123456789u);
    }
  }
}

}  // namespace
}  // namespace bebop
