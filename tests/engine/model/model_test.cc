// SPDX-License-Identifier: Apache-2.0
//
// The forward passes against themselves: whatever a pass is made of (chunks, drafts that are accepted or not, batch mates, forks,
// threads, page sizes), every certain row has the bits that decoding token by token gives. What the numbers themselves must be is
// the business of tests/oracle.
#include "engine/model/model.h"

#include <cmath>
#include <random>
#include <string>
#include <tuple>

#include "engine/weights/dummy_weights.h"
#include "gtest/gtest.h"
#include "tests/engine/model/model_harness.h"
#include "tests/support/allocation_counter.h"

namespace bebop {
namespace {

using Sequence = ModelHarness::Sequence;
using TargetRows = ModelHarness::TargetRows;
using Tokens = std::vector<uint32_t>;

Tokens Slice(const Tokens& tokens, int64_t begin, int64_t count) {
  return {tokens.begin() + begin, tokens.begin() + begin + count};
}

// Rows [begin, begin + count) of both matrices have the same bits (and are numbers).
void ExpectSameRows(const Matrix& actual, int64_t actual_begin, const Matrix& expected, int64_t expected_begin, int64_t count,
                    const std::string& what) {
  ASSERT_LE(actual_begin + count, actual.rows) << what;
  ASSERT_LE(expected_begin + count, expected.rows) << what;
  for (int64_t i = 0; i < count; ++i) {
    const std::span<const float> a = actual.row(actual_begin + i), e = expected.row(expected_begin + i);
    for (int64_t c = 0; c < actual.cols; ++c) {
      ASSERT_TRUE(std::isfinite(e[c])) << what << ": expected row " << expected_begin + i << " column " << c;
      ASSERT_EQ(a[c], e[c]) << what << ": row " << expected_begin + i << " column " << c;
    }
  }
}

// Row `actual_row` is row `expected_row` but for rounding: the attention kernel sums a chain's entries apart from those in pages.
void ExpectCloseRow(const Matrix& actual, int64_t actual_row, const Matrix& expected, int64_t expected_row, DType dtype,
                    const std::string& what) {
  // Outputs are of order 1. In bfloat16 one value that rounds the other way is off by 2^-9 of itself and spreads from there.
  const float tolerance = dtype == DType::kFloat32 ? 1e-5f : 0.05f;
  const std::span<const float> a = actual.row(actual_row), e = expected.row(expected_row);
  for (int64_t c = 0; c < actual.cols; ++c) ASSERT_NEAR(a[c], e[c], tolerance) << what << ": column " << c;
}

class ModelTest : public testing::TestWithParam<std::tuple<std::string, DType>> {
 protected:
  ModelTest() : config_(TinyConfig(std::get<0>(GetParam()))), random_(20240601) {
    ThreadPool pool(1);
    weights_ = *MakeDummyWeights(config_, dtype(), 7, pool, MakeHostMemory().get());
  }

  DType dtype() const { return std::get<1>(GetParam()); }

  HarnessOptions Options(int32_t num_threads = 2, int32_t page_tokens = 4) const {
    HarnessOptions options;
    options.kv_dtype = dtype();
    options.num_threads = num_threads;
    options.page_tokens = page_tokens;
    options.num_pages = 2400 / page_tokens;
    return options;
  }

  int32_t Uniform(int32_t low, int32_t high) { return std::uniform_int_distribution<int32_t>(low, high)(random_); }

  Tokens RandomTokens(int64_t count) {
    Tokens tokens(count);
    for (uint32_t& token : tokens) token = static_cast<uint32_t>(Uniform(0, config_.vocab_size - 1));
    return tokens;
  }

  // `num_drafts` drafts for the places from `position` on, of which exactly the first `num_right` are the sequence's own tokens.
  Tokens Drafts(const Tokens& tokens, int64_t position, int32_t num_drafts, int32_t num_right) {
    Tokens drafts = RandomTokens(num_drafts);
    std::copy_n(tokens.begin() + position, num_right, drafts.begin());
    if (num_right < num_drafts) drafts[num_right] = (tokens[position + num_right] + 1) % config_.vocab_size;
    return drafts;
  }

  // Post-norm hidden states of all of `tokens`, one token a pass, alone.
  Matrix TokenByToken(const Tokens& tokens) {
    ModelHarness harness(config_, weights_.get(), Options(1));
    Sequence sequence;
    Matrix hidden;
    for (uint32_t token : tokens) hidden.Append(harness.Target({{&sequence, {token}, {}}}));
    return hidden;
  }

  // MTP outputs of depth 1 over all of `tokens` in one extend, alone: row t has base t.
  Matrix MtpAlone(const Tokens& tokens, const Matrix& hidden) {
    ModelHarness harness(config_, weights_.get(), Options(1));
    Sequence sequence;
    const int64_t count = static_cast<int64_t>(tokens.size()) - 1;
    return harness.Mtp({{&sequence, Slice(tokens, 1, count), 1}}, hidden.Rows(0, count));
  }

  const ModelConfig config_;
  std::unique_ptr<ModelWeights> weights_;
  std::mt19937 random_;
};

TEST_P(ModelTest, RowsDependOnEveryEarlierTokenAndOnNoLaterOne) {
  const Tokens tokens = RandomTokens(20);
  const Matrix hidden = TokenByToken(tokens);
  for (int64_t changed : {0, 7, 19}) {
    Tokens other = tokens;
    other[changed] = (other[changed] + 1) % config_.vocab_size;
    const Matrix changed_hidden = TokenByToken(other);
    ExpectSameRows(changed_hidden, 0, hidden, 0, changed, "before the change");
    for (int64_t row = changed; row < 20; ++row) {
      EXPECT_NE(changed_hidden.Rows(row, 1), hidden.Rows(row, 1)) << "token " << changed << " does not reach row " << row;
    }
  }
}

TEST_P(ModelTest, PrefillInAnyChunkingEqualsTokenByToken) {
  const Tokens tokens = RandomTokens(150);
  const Matrix expected = TokenByToken(tokens);
  for (const int32_t largest : {1, 2, 7, 40, 149, 150}) {
    ModelHarness harness(config_, weights_.get(), Options(3, largest % 3 == 0 ? 1 : 16));
    Sequence sequence;
    Matrix hidden;
    while (sequence.num_computed < 150) {
      const int32_t count = std::min(150 - sequence.num_computed, largest >= 149 ? largest : Uniform(1, largest));
      hidden.Append(harness.Target({{&sequence, Slice(tokens, sequence.num_computed, count), {}}}));
    }
    ExpectSameRows(hidden, 0, expected, 0, 150, "chunks of at most " + std::to_string(largest));
    ASSERT_EQ(harness.Logits(hidden.Rows(149, 1)), harness.Logits(expected.Rows(149, 1)));
  }
}

TEST_P(ModelTest, VerifyWindowsEqualTokenByToken) {
  const Tokens tokens = RandomTokens(420);
  const Matrix expected = TokenByToken(tokens);
  ModelHarness harness(config_, weights_.get(), Options());
  Sequence sequence;
  int32_t windows = 0, accepted_all = 0, accepted_none = 0;
  while (sequence.num_computed + 12 < 420) {
    const int32_t base = sequence.num_computed;
    // Mostly the decode shape (one known token); sometimes a chunk of them with drafts behind it.
    const int32_t num_known = windows % 7 == 3 ? Uniform(2, 5) : 1;
    const int32_t num_drafts = Uniform(0, 5);
    const int32_t num_right = Uniform(0, num_drafts);
    const Matrix hidden = harness.Target(
        {{&sequence, Slice(tokens, base, num_known), Drafts(tokens, base + num_known, num_drafts, num_right)}});
    ExpectSameRows(hidden, 0, expected, base, num_known + num_right, "window " + std::to_string(windows));
    harness.Accept(sequence, num_right);
    ++windows;
    accepted_all += num_drafts > 0 && num_right == num_drafts;
    accepted_none += num_drafts > 0 && num_right == 0;
  }
  EXPECT_GE(windows, 64);
  EXPECT_GE(accepted_all, 5);
  EXPECT_GE(accepted_none, 5);
  const Matrix rest = harness.Target({{&sequence, Slice(tokens, sequence.num_computed, 420 - sequence.num_computed), {}}});
  ExpectSameRows(rest, rest.rows - 1, expected, 419, 1, "after the last window");
  ASSERT_EQ(harness.Logits(rest.Rows(rest.rows - 1, 1)), harness.Logits(expected.Rows(419, 1)));
}

TEST_P(ModelTest, RaggedBatchesEqualAlone) {
  constexpr int kSequences = 5;
  std::vector<Tokens> tokens;
  std::vector<Matrix> expected;
  for (int s = 0; s < kSequences; ++s) {
    tokens.push_back(RandomTokens(60 + 17 * s));
    expected.push_back(TokenByToken(tokens.back()));
  }
  for (const int32_t num_threads : {1, 2, 5}) {
    ModelHarness harness(config_, weights_.get(), Options(num_threads, num_threads == 2 ? 1 : 16));
    std::vector<Sequence> sequences(kSequences);
    for (;;) {
      std::vector<int> order;
      for (int s = 0; s < kSequences; ++s) {
        if (sequences[s].num_computed < static_cast<int32_t>(tokens[s].size())) order.push_back(s);
      }
      if (order.empty()) break;
      std::shuffle(order.begin(), order.end(), random_);
      order.resize(Uniform(1, static_cast<int32_t>(order.size())));
      std::vector<TargetRows> rows;
      std::vector<int32_t> bases, num_right;
      for (int s : order) {
        const int32_t base = sequences[s].num_computed;
        const int32_t left = static_cast<int32_t>(tokens[s].size()) - base;
        const int32_t num_known = Uniform(0, 2) == 0 ? std::min(left, Uniform(1, 33)) : 1;
        const int32_t num_drafts = std::min(left - num_known, Uniform(0, 5));
        bases.push_back(base);
        num_right.push_back(Uniform(0, num_drafts));
        rows.push_back({&sequences[s], Slice(tokens[s], base, num_known),
                        Drafts(tokens[s], base + num_known, num_drafts, num_right.back())});
      }
      const Matrix hidden = harness.Target(rows);
      int64_t first_row = 0;
      for (size_t i = 0; i < order.size(); ++i) {
        ExpectSameRows(hidden, first_row, expected[order[i]], bases[i], rows[i].known.size() + num_right[i],
                       "sequence " + std::to_string(order[i]));
        if (HasFatalFailure()) return;
        first_row += rows[i].known.size() + rows[i].drafts.size();
        harness.Accept(sequences[order[i]], num_right[i]);
      }
    }
  }
}

TEST_P(ModelTest, ForksOfOnePromptContinueAlone) {
  constexpr int kChildren = 4;
  for (const bool replayed : {false, true}) {
    const Tokens prompt = RandomTokens(22);  // ends inside a page of 4
    ModelHarness harness(config_, weights_.get(), Options());
    Sequence parent;
    // With `replayed`, the prompt's last two tokens are accepted drafts, so that every child replays the parent's window.
    const int64_t known = replayed ? 20 : 22;
    harness.Target({{&parent, Slice(prompt, 0, known), replayed ? Drafts(prompt, 20, 2, 2) : Tokens()}});
    harness.Accept(parent, replayed ? 2 : 0);
    std::vector<Sequence> children;
    std::vector<Tokens> full;
    std::vector<Matrix> expected, actual(kChildren);
    for (int c = 0; c < kChildren; ++c) {
      children.push_back(harness.Fork(parent));
      full.push_back(prompt);
      const Tokens own = RandomTokens(14);
      full.back().insert(full.back().end(), own.begin(), own.end());
      expected.push_back(TokenByToken(full.back()));
    }
    harness.Release(parent);
    for (int step = 0; step < 14; step += 2) {
      std::vector<TargetRows> rows;
      for (int c = 0; c < kChildren; ++c) rows.push_back({&children[c], Slice(full[c], 22 + step, 2), {}});
      const Matrix hidden = harness.Target(rows);
      for (int c = 0; c < kChildren; ++c) actual[c].Append(hidden.Rows(2 * c, 2));
    }
    for (int c = 0; c < kChildren; ++c) ExpectSameRows(actual[c], 0, expected[c], 22, 14, "child " + std::to_string(c));
  }
}

TEST_P(ModelTest, MtpExtendInAnyChunkingAndBatchEqualsAlone) {
  std::vector<Tokens> tokens = {RandomTokens(50), RandomTokens(31)};
  std::vector<Matrix> hidden, expected, actual(2);
  for (const Tokens& sequence_tokens : tokens) {
    hidden.push_back(TokenByToken(sequence_tokens));
    expected.push_back(MtpAlone(sequence_tokens, hidden.back()));
  }
  ModelHarness harness(config_, weights_.get(), Options(3, 3));
  std::vector<Sequence> sequences(2);
  std::vector<int32_t> done = {0, 0};
  while (done[0] < 49 || done[1] < 30) {
    std::vector<ModelHarness::MtpRows> rows;
    Matrix previous;
    for (int s : {1, 0}) {
      const int32_t count = std::min(static_cast<int32_t>(tokens[s].size()) - 1 - done[s], Uniform(1, 9));
      if (count == 0) continue;
      rows.push_back({&sequences[s], Slice(tokens[s], done[s] + 1, count), done[s] + 1});
      previous.Append(hidden[s].Rows(done[s], count));
    }
    const Matrix out = harness.Mtp(rows, previous);
    int64_t first_row = 0;
    for (const ModelHarness::MtpRows& part : rows) {
      const int s = part.sequence == &sequences[0] ? 0 : 1;
      const int64_t count = static_cast<int64_t>(part.next_tokens.size());
      actual[s].Append(out.Rows(first_row, count));
      first_row += count;
      done[s] += static_cast<int32_t>(count);
    }
  }
  for (int s : {0, 1}) ExpectSameRows(actual[s], 0, expected[s], 0, expected[s].rows, "sequence " + std::to_string(s));
}

// The engine's loop: verify, extend the MTP cache over the certain rows with true hidden states, draft recurrently behind it. The
// recurrent entries of one iteration are rewritten by the next one's extend, so every extend equals a run that never drafted.
TEST_P(ModelTest, MtpExtendRewritesTheRecurrentEntries) {
  const Tokens tokens = RandomTokens(200);
  const Matrix hidden = TokenByToken(tokens);
  const Matrix expected = MtpAlone(tokens, hidden);
  ModelHarness harness(config_, weights_.get(), Options());
  Sequence sequence;
  int iterations = 0;
  while (sequence.num_computed + 14 < 200) {
    const int32_t base = sequence.num_computed;
    const int32_t num_right = Uniform(0, 5);
    const Matrix verified = harness.Target({{&sequence, {tokens[base]}, Drafts(tokens, base + 1, 5, num_right)}});
    harness.Accept(sequence, num_right);
    const int32_t num_certain = 1 + num_right;
    const Matrix extended =
        harness.Mtp({{&sequence, Slice(tokens, base + 1, num_certain), base + 1}}, verified.Rows(0, num_certain));
    ExpectSameRows(extended, 0, expected, base, num_certain, "iteration " + std::to_string(iterations));
    if (HasFatalFailure()) return;
    Matrix last = extended.Rows(num_certain - 1, 1);
    for (int32_t depth = 2; depth <= 5; ++depth) {
      last = harness.Mtp({{&sequence, RandomTokens(1), base + num_right + depth}}, last);
    }
    ++iterations;
  }
  EXPECT_GE(iterations, 30);
}

TEST_P(ModelTest, MtpChainEqualsRecurrentDrafting) {
  constexpr int32_t kCount = 30, kDepth = 5;
  const Tokens tokens = RandomTokens(kCount);
  const Matrix hidden = TokenByToken(tokens);
  // All bases at once: depth 1 fills the pages, deeper steps use private chains.
  ModelHarness parallel(config_, weights_.get(), Options(3));
  Sequence scored;
  Matrix depth1 = parallel.Mtp({{&scored, Slice(tokens, 1, kCount - 1), 1}}, hidden.Rows(0, kCount - 1));
  ModelHarness::Chain chain(parallel, scored, depth1);
  std::vector<Matrix> chained = {depth1};
  for (int32_t depth = 2; depth <= kDepth; ++depth) chained.push_back(chain.Step(Slice(tokens, depth, kCount - depth)));
  // One base after the other, as drafting does it.
  ModelHarness recurrent(config_, weights_.get(), Options(1));
  Sequence drafted;
  for (int32_t base = 0; base + kDepth < kCount; ++base) {
    Matrix last = recurrent.Mtp({{&drafted, {tokens[base + 1]}, base + 1}}, hidden.Rows(base, 1));
    ExpectSameRows(chained[0], base, last, 0, 1, "depth 1");
    for (int32_t depth = 2; depth <= kDepth; ++depth) {
      last = recurrent.Mtp({{&drafted, {tokens[base + depth]}, base + depth}}, last);
      ExpectCloseRow(chained[depth - 1], base, last, 0, dtype(),
                     "base " + std::to_string(base) + " depth " + std::to_string(depth));
      if (HasFatalFailure()) return;
    }
  }
  // A deeper step is not the step before it: the chain is seen at all.
  EXPECT_NE(chained[1].Rows(0, 1), depth1.Rows(1, 1));
}

TEST_P(ModelTest, PassesDoNotAllocate) {
  ThreadPool pool(2);
  const auto memory = MakeHostMemory();
  const auto ops = MakeCpuOps(&pool);
  const auto owner = *Model::Create(config_, 32, DType::kFloat32, ops.get(), memory.get());
  Model& model = *owner;
  model.SetWeights(weights_.get());
  const auto storage = *ModelStateStorage::Create(
      config_, {.kv_dtype = dtype(), .num_pages = 4, .page_tokens = 16, .num_slots = 2, .window = 5}, memory.get());
  const Tokens tokens = RandomTokens(32);
  Matrix hidden(32, config_.hidden_size), mtp_hidden(32, config_.hidden_size), logits(32, config_.vocab_size);
  const int32_t page_ids[] = {2, 0, 3};
  const SequenceRows sequence{.num_rows = 32, .num_known_rows = 30, .state_dst = 1};
  const SequenceRows next{.num_rows = 31, .num_known_rows = 31, .first_position = 1};
  const RaggedBatch batch{.num_sequences = 1, .num_rows = 32, .sequences = &sequence, .page_ids = page_ids};
  const RaggedBatch mtp_batch{.num_sequences = 1, .num_rows = 31, .sequences = &next, .page_ids = page_ids};
  const int64_t before = test::NumAllocations();
  model.ForwardTarget(tokens.data(), batch, storage->state(), hidden.view());
  model.ForwardMtp(tokens.data() + 1, mtp_batch, hidden.view().Rows(0, 31), storage->state(), nullptr,
                   mtp_hidden.view().Rows(0, 31));
  model.Logits(hidden.view(), logits.view());
  EXPECT_EQ(test::NumAllocations() - before, 0);
}

INSTANTIATE_TEST_SUITE_P(Networks, ModelTest,
                         testing::Combine(testing::Values("LLFL", "FF", "LL"), testing::Values(DType::kFloat32, DType::kBFloat16)),
                         [](const auto& info) { return std::get<0>(info.param) + "_" + DTypeName(std::get<1>(info.param)); });

}  // namespace
}  // namespace bebop
