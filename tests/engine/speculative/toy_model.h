// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <numeric>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "engine/sampling/sampling_params.h"
#include "engine/speculative/verify.h"
#include "kernels/sampling/sampling.h"

namespace bebop {

// How a toy draft relates to its target.
enum class DraftKind {
  kGood,      // the target's logits with some noise
  kNear,      // ... with noise of 1e-6: residuals near rounding
  kSame,      // exactly the target's logits
  kBad,       // independent
  kDisjoint,  // target on even places, draft on odd ones
  kOneHot,    // everything on one id
  kUniform,   // all logits equal
};

struct ToyOptions {
  int32_t num_live = 3;        // ids with finite logits
  bool spread_blocks = false;  // the live ids lie in three sampling blocks of a larger vocabulary, else they are 0..num_live-1
  float deviation = 1.5f;
  uint64_t seed = 1;
  DraftKind draft = DraftKind::kGood;
  SamplingParams sampling;
  size_t banned_tokens = 0;  // id 0 is banned while fewer than this many tokens are out (min_new_tokens)
  size_t history = 64;       // how many of the last tokens (and always the length) the distributions depend on
};

// Target and draft of a made-up language whose next-token laws depend on the whole prefix, through the real Transform.
class ToyModel {
 public:
  struct Row {
    std::vector<float> logits, weight;
    std::vector<double> block_sum;
    TokenDistribution distribution;
    std::vector<double> reference;  // [V] probabilities: the transform by sorting, in double, on the untruncated weights
  };

  explicit ToyModel(const ToyOptions& options) : options_(options) {
    for (int32_t i = 0; i < options.num_live; ++i) {
      live_.push_back(options.spread_blocks ? static_cast<uint32_t>(i * 2500 / std::max(1, options.num_live - 1))
                                            : static_cast<uint32_t>(i));
    }
    vocab_size_ = static_cast<int32_t>(live_.back()) + 1;
    scratch_.resize(static_cast<size_t>(vocab_size_));
  }

  const ToyOptions& options() const { return options_; }
  std::span<const uint32_t> live() const { return live_; }
  int32_t vocab_size() const { return vocab_size_; }
  bool greedy() const { return options_.sampling.greedy(); }
  const Row& Target(std::span<const uint32_t> prefix) { return Get(prefix, 0); }
  const Row& Draft(std::span<const uint32_t> prefix) { return Get(prefix, 1); }

 private:
  static uint64_t Mix(uint64_t value) {  // the finaliser of splitmix64
    value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9u;
    value = (value ^ (value >> 27)) * 0x94d049bb133111ebu;
    return value ^ (value >> 31);
  }
  static float Noise(uint64_t state, uint64_t stream, uint32_t id) {  // in (-1.7, 1.7): about unit deviation
    return (static_cast<float>(Mix(state + 0x9e3779b97f4a7c15u * (stream * 4096 + id + 1)) >> 40) * 0x1p-23f - 1.0f) * 1.7f;
  }

  const Row& Get(std::span<const uint32_t> prefix, int role) {
    uint64_t state = Mix(options_.seed + 1000003u * prefix.size());
    const size_t begin = prefix.size() - std::min(prefix.size(), options_.history);
    for (uint32_t token : prefix.subspan(begin)) state = Mix(state ^ (token + 0x9e3779b97f4a7c15u));
    std::unique_ptr<Row>& row = rows_[role][state];
    if (row == nullptr) row = Make(state, role, prefix.size());
    return *row;
  }

  std::unique_ptr<Row> Make(uint64_t state, int role, size_t length) {
    auto row = std::make_unique<Row>();
    const size_t vocab_size = static_cast<size_t>(vocab_size_);
    row->logits.assign(vocab_size, -std::numeric_limits<float>::infinity());
    for (uint32_t i = 0; i < live_.size(); ++i) {
      float logit = options_.deviation * Noise(state, 0, i);
      if (role == 1) {
        const float noise = Noise(state, 1, i);
        switch (options_.draft) {
          case DraftKind::kGood: logit += 0.6f * noise; break;
          case DraftKind::kNear: logit += 1e-6f * noise; break;
          case DraftKind::kSame: break;
          case DraftKind::kBad:
          case DraftKind::kDisjoint: logit = options_.deviation * noise; break;
          case DraftKind::kOneHot: logit = i == state % live_.size() ? 0.0f : -std::numeric_limits<float>::infinity(); break;
          case DraftKind::kUniform: logit = 0.0f; break;
        }
      }
      if (options_.draft == DraftKind::kDisjoint && static_cast<int>(i % 2) != role) continue;
      row->logits[live_[i]] = logit;
    }
    row->weight.resize(vocab_size);
    row->block_sum.resize(static_cast<size_t>(NumSamplingBlocks(vocab_size_)));
    row->distribution.weight = row->weight.data();
    row->distribution.block_sum = row->block_sum.data();
    TransformArgs args;
    args.logits = row->logits.data();
    args.vocab_size = vocab_size_;
    args.scratch = scratch_.data();
    const uint32_t banned[] = {0};
    if (length < options_.banned_tokens && !(options_.draft == DraftKind::kOneHot && role == 1)) args.banned_ids = banned;
    // Untruncated weights first, then the transform under test into the same storage.
    args.temperature = options_.sampling.temperature;
    cpu::Transform(args, &row->distribution);
    row->reference = Reference(row->logits, row->weight, row->distribution.argmax);
    SetTransform(options_.sampling, &args);
    cpu::Transform(args, &row->distribution);
    return row;
  }

  std::vector<double> Reference(const std::vector<float>& logits, const std::vector<float>& weight, uint32_t argmax) const {
    std::vector<uint32_t> order = live_;
    const auto first_by = [&](const auto& value) {
      std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) {
        if (value[a] != value[b]) return value[a] > value[b];
        return (a == argmax) > (b == argmax);
      });
    };
    std::vector<double> kept(weight.begin(), weight.end());
    first_by(logits);
    const int32_t top_k = options_.sampling.greedy() ? 1 : options_.sampling.top_k;
    // Only ids with weight compete: a banned id is not among the k.
    std::vector<uint32_t> with_weight;
    for (uint32_t id : order) {
      if (weight[id] > 0.0f) with_weight.push_back(id);
    }
    if (top_k > 0 && top_k < static_cast<int32_t>(with_weight.size())) {
      const float kth = logits[with_weight[static_cast<size_t>(top_k - 1)]];
      for (uint32_t id : order) {
        if (logits[id] < kth) kept[id] = 0.0;
      }
    }
    std::sort(order.begin(), order.end());
    first_by(kept);
    const double total = std::accumulate(kept.begin(), kept.end(), 0.0);
    if (!options_.sampling.greedy()) {
      double mass = 0.0;
      for (uint32_t id : order) {
        const bool reached = options_.sampling.top_p < 1.0f && mass >= static_cast<double>(options_.sampling.top_p) * total;
        mass += kept[id];
        if (reached) kept[id] = 0.0;
      }
      const double floor = static_cast<double>(options_.sampling.min_p) * *std::max_element(kept.begin(), kept.end());
      for (double& value : kept) value = value < floor ? 0.0 : value;
    }
    const double sum = std::accumulate(kept.begin(), kept.end(), 0.0);
    for (double& value : kept) value /= sum;
    return kept;
  }

  ToyOptions options_;
  std::vector<uint32_t> live_;
  int32_t vocab_size_ = 0;
  std::vector<float> scratch_;
  std::unordered_map<uint64_t, std::unique_ptr<Row>> rows_[2];
};

// One iteration of speculative decoding after `prefix`, as the executor does it: draft, then verify.
struct Iteration {
  std::vector<uint32_t> drafts;
  VerifyOutcome outcome;
};

// Rows of target and draft along prefix + drafts, as VerifyArgs wants them.
struct VerifyRows {
  std::vector<TokenDistribution> target, draft;
};

inline VerifyRows RowsAlong(ToyModel& model, std::span<const uint32_t> prefix, std::span<const uint32_t> drafts) {
  VerifyRows rows;
  std::vector<uint32_t> context(prefix.begin(), prefix.end());
  for (size_t i = 0; i <= drafts.size(); ++i) {
    rows.target.push_back(model.Target(context).distribution);
    if (i == drafts.size()) break;
    rows.draft.push_back(model.Draft(context).distribution);
    context.push_back(drafts[i]);
  }
  return rows;
}

inline VerifyArgs ArgsFor(ToyModel& model, SpeculationMode mode, std::span<const uint32_t> drafts, const VerifyRows& rows) {
  VerifyArgs args;
  args.mode = mode;
  args.greedy = model.greedy();
  args.drafts = drafts;
  args.target = rows.target;
  args.draft = rows.draft;
  return args;
}

inline Iteration Iterate(ToyModel& model, SpeculationMode mode, int32_t num_drafts, std::span<const uint32_t> prefix,
                         DrawSource& draws) {
  Iteration iteration;
  std::vector<uint32_t> context(prefix.begin(), prefix.end());
  for (int32_t i = 0; i < num_drafts; ++i) {
    iteration.drafts.push_back(DrawDraft(mode, model.greedy(), model.Draft(context).distribution, i, draws));
    context.push_back(iteration.drafts.back());
  }
  const VerifyRows rows = RowsAlong(model, prefix, iteration.drafts);
  iteration.outcome = Verify(ArgsFor(model, mode, iteration.drafts, rows), draws);
  return iteration;
}

// Decodes `num_tokens` tokens with Philox draws; observe(prefix, iteration) sees every iteration before its tokens are appended.
template <typename Observe>
std::vector<uint32_t> Decode(ToyModel& model, SpeculationMode mode, int32_t num_drafts, uint64_t seed, uint32_t sample_index,
                             size_t num_tokens, Observe&& observe) {
  std::vector<uint32_t> tokens;
  while (tokens.size() < num_tokens) {
    PhiloxDraws draws({seed, sample_index, static_cast<uint32_t>(tokens.size())});
    const Iteration iteration = Iterate(model, mode, num_drafts, tokens, draws);
    observe(std::span<const uint32_t>(tokens), iteration);
    tokens.insert(tokens.end(), iteration.outcome.tokens, iteration.outcome.tokens + iteration.outcome.num_emitted);
  }
  tokens.resize(num_tokens);
  return tokens;
}

}  // namespace bebop
