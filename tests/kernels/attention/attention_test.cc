// SPDX-License-Identifier: Apache-2.0
#include "kernels/attention/attention.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "tests/kernels/kernel_test_util.h"

namespace bebop {
namespace {

using testing::InstructionSets;
using testing::kNan;
using testing::kUnit;
using testing::OwnedBatch;
using testing::PaddedMatrix;
using testing::Random;
using testing::SameBits;

struct Shape {
  int32_t q_heads, kv_heads, dim, page_tokens;
};

// Keys or values as a device would hold them: float values that the type can represent, and their bytes.
class Entries {
 public:
  Entries(DType dtype, int64_t count) : dtype_(dtype), bytes_(static_cast<size_t>(count * ElementBytes(dtype)), 0xff) {}  // NaN
  void* data() { return bytes_.data(); }
  DType dtype() const { return dtype_; }
  float Get(int64_t i) const {
    if (dtype_ == DType::kFloat32) {
      float value;
      std::memcpy(&value, &bytes_[static_cast<size_t>(i) * 4], 4);
      return value;
    }
    BFloat16 value;
    std::memcpy(&value, &bytes_[static_cast<size_t>(i) * 2], 2);
    return ToFloat(value);
  }
  void Set(int64_t i, float value) {
    const BFloat16 half = ToBFloat16(value);
    if (dtype_ == DType::kFloat32) {
      std::memcpy(&bytes_[static_cast<size_t>(i) * 4], &value, 4);
    } else {
      std::memcpy(&bytes_[static_cast<size_t>(i) * 2], &half, 2);
    }
  }

 private:
  DType dtype_;
  std::vector<uint8_t> bytes_;
};

// The key and value of a position of a stream of tokens: a function of (stream, position, kv head) alone, so that the same
// context can be laid out in any pages.
void FillEntry(Entries& k, Entries& v, int64_t entry, const Shape& shape, int32_t stream, int32_t position, int32_t head) {
  Random random(static_cast<uint64_t>(stream) * 1000003 + static_cast<uint64_t>(position) * 64 + static_cast<uint64_t>(head));
  for (int32_t i = 0; i < shape.dim; ++i) {
    k.Set(entry * shape.dim + i, random.Normal() * 1.5f);
    v.Set(entry * shape.dim + i, random.Normal());
  }
}

class Cache {
 public:
  Cache(const Shape& shape, DType dtype, int32_t num_pages)
      : shape_(shape), num_pages_(num_pages), k(dtype, Size()), v(dtype, Size()) {}
  KvPagesView View() { return {k.data(), v.data(), k.dtype(), num_pages_, shape_.page_tokens, shape_.kv_heads, shape_.dim}; }
  int64_t Entry(const std::vector<int32_t>& pages, int32_t position, int32_t head) const {
    return (int64_t{pages[position / shape_.page_tokens]} * shape_.kv_heads + head) * shape_.page_tokens +
           position % shape_.page_tokens;
  }
  // Positions [begin, end) of `stream` into `pages`.
  void Fill(const std::vector<int32_t>& pages, int32_t stream, int32_t begin, int32_t end) {
    for (int32_t position = begin; position < end; ++position) {
      for (int32_t h = 0; h < shape_.kv_heads; ++h) FillEntry(k, v, Entry(pages, position, h), shape_, stream, position, h);
    }
  }
  // Page ids in a scrambled order.
  std::vector<int32_t> Take(int32_t num_positions) {
    std::vector<int32_t> pages;
    for (int32_t i = 0; i < (num_positions + shape_.page_tokens - 1) / shape_.page_tokens; ++i) {
      pages.push_back(num_pages_ - 1 - (next_++ ^ 1));
    }
    return pages;
  }

 private:
  int64_t Size() const { return int64_t{num_pages_} * shape_.kv_heads * shape_.page_tokens * shape_.dim; }
  Shape shape_;
  int32_t num_pages_;
  int32_t next_ = 0;

 public:
  Entries k, v;
};

// Queries and gates of a position of a stream, again a function of the place alone.
struct QueryRows {
  QueryRows(const Shape& shape, const std::vector<std::pair<int32_t, int32_t>>& places)
      : q(static_cast<int64_t>(places.size()), shape.q_heads * shape.dim),
        q_gate(static_cast<int64_t>(places.size()), shape.q_heads * 2 * shape.dim),
        out(static_cast<int64_t>(places.size()), shape.q_heads * shape.dim) {
    for (size_t row = 0; row < places.size(); ++row) {
      Random random(static_cast<uint64_t>(places[row].first) * 77777 + static_cast<uint64_t>(places[row].second) + 5000000000u);
      for (int32_t i = 0; i < shape.q_heads * shape.dim; ++i) q.Row(static_cast<int64_t>(row))[i] = random.Normal();
      for (int32_t i = 0; i < shape.q_heads * 2 * shape.dim; ++i) q_gate.Row(static_cast<int64_t>(row))[i] = 3 * random.Normal();
    }
  }
  PaddedMatrix q, q_gate, out;
};

// One row and head in double; `keys` and `values` are the visible entries in order. Checks `out` within the derived tolerance.
void CheckRow(const float* query, const float* gate, const std::vector<std::vector<float>>& keys,
              const std::vector<std::vector<float>>& values, int32_t dim, const float* out) {
  std::vector<double> score;
  double score_magnitude = 0, value_magnitude = 0;
  for (const auto& key : keys) {
    double sum = 0, magnitude = 0;
    for (int32_t i = 0; i < dim; ++i) sum += double{query[i]} * key[i], magnitude += std::fabs(double{query[i]} * key[i]);
    score.push_back(sum / std::sqrt(double(dim)));
    score_magnitude = std::max(score_magnitude, magnitude / std::sqrt(double(dim)));
  }
  const double max = score.empty() ? 0 : *std::max_element(score.begin(), score.end());
  double total = 0;
  for (double& s : score) total += s = std::exp(s - max);
  std::vector<double> mean(static_cast<size_t>(dim));
  for (size_t j = 0; j < score.size(); ++j) {
    for (int32_t i = 0; i < dim; ++i) {
      mean[i] += score[j] / total * values[j][i];
      value_magnitude = std::max(value_magnitude, double{std::fabs(values[j][i])});
    }
  }
  // A score: scale of q, dim/16 sums in a lane and 4 across lanes, each a rounding of at most the magnitude; a weight inherits
  // the error of its score and of the maximum, and the exponential's; the sums over positions round once a position at most and
  // once a tile.
  const double score_error = (dim / 16.0 + 6) * kUnit * score_magnitude;
  const double relative = 2 * (2 * score_error + 4 * kUnit) + 2 * (static_cast<double>(keys.size()) * 17 / 16 + 8) * kUnit;
  for (int32_t i = 0; i < dim; ++i) {
    const double open = 1 / (1 + std::exp(-double{gate[i]}));
    ASSERT_NEAR(out[i], mean[i] * open, (relative + 10 * kUnit) * value_magnitude * open) << "dim " << i;
  }
}

class AttentionTest : public ::testing::TestWithParam<std::tuple<Shape, DType>> {};

TEST_P(AttentionTest, AgreesWithDouble) {
  const auto& [shape, dtype] = GetParam();
  for (const auto set : InstructionSets()) {
    for (const int32_t first_index : {0, 1}) {
      Cache cache(shape, dtype, 200);
      OwnedBatch batch;
      std::vector<std::pair<int32_t, int32_t>> places;
      std::vector<std::vector<int32_t>> tables;
      // A prompt chunk, decodes with drafts at contexts around the tile, and a first token.
      int32_t stream = 0;
      for (const auto& [first, rows] : {std::pair{20, 13}, {255, 4}, {15, 1}, {16, 3}, {first_index, 2}, {95, 5}}) {
        tables.push_back(cache.Take(first + rows));
        cache.Fill(tables.back(), stream, first_index, first + rows);
        batch.Add({.num_rows = rows, .num_known_rows = 1, .first_position = first}, tables.back());
        for (int32_t i = 0; i < rows; ++i) places.emplace_back(stream, first + i);
        ++stream;
      }
      QueryRows rows(shape, places);
      ThreadPool pool(2);
      cpu::AttentionWith(set,
                         {.batch = batch.View(),
                          .q = rows.q.View(),
                          .q_gate = rows.q_gate.View(),
                          .pages = cache.View(),
                          .num_q_heads = shape.q_heads,
                          .first_index = first_index,
                          .out = rows.out.View()},
                         pool);
      EXPECT_TRUE(rows.out.GapsUntouched());
      for (size_t row = 0; row < places.size(); ++row) {
        for (int32_t h = 0; h < shape.q_heads; ++h) {
          std::vector<std::vector<float>> keys, values;
          for (int32_t position = first_index; position <= places[row].second; ++position) {
            const int64_t entry =
                cache.Entry(tables[places[row].first], position, h / (shape.q_heads / shape.kv_heads)) * shape.dim;
            keys.emplace_back();
            values.emplace_back();
            for (int32_t i = 0; i < shape.dim; ++i) {
              keys.back().push_back(cache.k.Get(entry + i));
              values.back().push_back(cache.v.Get(entry + i));
            }
          }
          SCOPED_TRACE(std::string(cpu::InstructionSetName(set)) + " row " + std::to_string(row) + " head " + std::to_string(h));
          CheckRow(rows.q.Row(row) + h * shape.dim, rows.q_gate.Row(row) + (2 * h + 1) * shape.dim, keys, values, shape.dim,
                   rows.out.Row(row) + h * shape.dim);
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

// Rows with private chains: pages up to position - num_chain, then the row's own entries.
TEST_P(AttentionTest, ChainAgreesWithDouble) {
  const auto& [shape, dtype] = GetParam();
  const int64_t kv_width = int64_t{shape.kv_heads} * shape.dim;
  for (const auto set : InstructionSets()) {
    for (const int32_t num_chain : {1, 2, 5}) {
      Cache cache(shape, dtype, 64);
      const int32_t first_index = 1, first = num_chain, num_rows = 37;  // the first row sees no page entry at all
      const std::vector<int32_t> table = cache.Take(first + num_rows);
      cache.Fill(table, 0, first_index, first + num_rows - num_chain);
      OwnedBatch batch;
      batch.Add({.num_rows = num_rows, .num_known_rows = num_rows, .first_position = first}, table);
      std::vector<std::pair<int32_t, int32_t>> places;
      for (int32_t i = 0; i < num_rows; ++i) places.emplace_back(0, first + i);
      QueryRows rows(shape, places);
      std::vector<Entries> k, v;
      std::vector<TensorView> k_views, v_views;
      for (int32_t c = 0; c < num_chain; ++c) {
        k.emplace_back(dtype, num_rows * kv_width);
        v.emplace_back(dtype, num_rows * kv_width);
        for (int32_t row = 0; row < num_rows; ++row) {
          for (int32_t h = 0; h < shape.kv_heads; ++h) {
            FillEntry(k[c], v[c], int64_t{row} * shape.kv_heads + h, shape, 100 + c, row, h);
          }
        }
      }
      for (int32_t c = 0; c < num_chain; ++c) {
        k_views.push_back({k[c].data(), dtype, num_rows, kv_width, kv_width});
        v_views.push_back({v[c].data(), dtype, num_rows, kv_width, kv_width});
      }
      ThreadPool pool(2);
      cpu::AttentionWith(set,
                         {.batch = batch.View(),
                          .q = rows.q.View(),
                          .q_gate = rows.q_gate.View(),
                          .pages = cache.View(),
                          .num_q_heads = shape.q_heads,
                          .first_index = first_index,
                          .num_chain = num_chain,
                          .chain_k = k_views.data(),
                          .chain_v = v_views.data(),
                          .out = rows.out.View()},
                         pool);
      for (int32_t row = 0; row < num_rows; ++row) {
        for (int32_t h = 0; h < shape.q_heads; ++h) {
          const int32_t kv_head = h / (shape.q_heads / shape.kv_heads);
          std::vector<std::vector<float>> keys, values;
          const auto add = [&](const Entries& from_k, const Entries& from_v, int64_t entry) {
            keys.emplace_back();
            values.emplace_back();
            for (int32_t i = 0; i < shape.dim; ++i) {
              keys.back().push_back(from_k.Get(entry * shape.dim + i));
              values.back().push_back(from_v.Get(entry * shape.dim + i));
            }
          };
          for (int32_t position = first_index; position <= first + row - num_chain; ++position) {
            add(cache.k, cache.v, cache.Entry(table, position, kv_head));
          }
          for (int32_t c = 0; c < num_chain; ++c) add(k[c], v[c], int64_t{row} * shape.kv_heads + kv_head);
          CheckRow(rows.q.Row(row) + h * shape.dim, rows.q_gate.Row(row) + (2 * h + 1) * shape.dim, keys, values, shape.dim,
                   rows.out.Row(row) + h * shape.dim);
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

// A prompt of one stream in one call; then cut into chunks, among other sequences, in other pages, with other threads.
TEST_P(AttentionTest, RowsDependOnTheirContextAlone) {
  const auto& [shape, dtype] = GetParam();
  constexpr int32_t kLength = 75;
  for (const auto set : InstructionSets()) {
    std::vector<float> expected;
    for (const int32_t page_tokens : {shape.page_tokens, 4, 64}) {
      const Shape here = {shape.q_heads, shape.kv_heads, shape.dim, page_tokens};
      Cache cache(here, dtype, 200);
      const std::vector<int32_t> table = cache.Take(kLength), other = cache.Take(200);
      cache.Fill(table, 0, 0, kLength);
      cache.Fill(other, 1, 0, 200);
      for (const std::vector<int32_t>& chunks : {std::vector<int32_t>{kLength}, {1, 16, 3, 30, 25}, {40, 33, 1, 1}}) {
        for (const int threads : {1, 5}) {
          for (const bool mates : {false, true}) {
            OwnedBatch batch;
            std::vector<std::pair<int32_t, int32_t>> places;
            std::vector<bool> mine;
            const auto add = [&](int32_t stream, int32_t first, int32_t count) {
              batch.Add({.num_rows = count, .num_known_rows = count, .first_position = first}, stream == 0 ? table : other);
              for (int32_t i = 0; i < count; ++i) {
                places.emplace_back(stream, first + i);
                mine.push_back(stream == 0);
              }
            };
            int32_t done = 0;
            for (const int32_t chunk : chunks) {
              if (mates) add(1, 3 * done, 1 + done % 6);
              add(0, done, chunk);
              done += chunk;
            }
            QueryRows rows(here, places);
            ThreadPool pool(threads);
            cpu::AttentionWith(set,
                               {.batch = batch.View(),
                                .q = rows.q.View(),
                                .q_gate = rows.q_gate.View(),
                                .pages = cache.View(),
                                .num_q_heads = shape.q_heads,
                                .out = rows.out.View()},
                               pool);
            std::vector<float> out;
            for (size_t row = 0; row < places.size(); ++row) {
              if (mine[row]) out.insert(out.end(), rows.out.Row(row), rows.out.Row(row) + shape.q_heads * shape.dim);
            }
            if (expected.empty()) expected = out;
            ASSERT_TRUE(SameBits(expected, out)) << cpu::InstructionSetName(set) << " page " << page_tokens << " chunks "
                                                 << chunks.size() << " threads " << threads << " mates " << mates;
          }
        }
      }
    }
  }
}

// What is not finite in a key, value or query reaches the rows that see it, and no other.
TEST_P(AttentionTest, NanReachesOnlyTheRowsThatSeeIt) {
  const auto& [shape, dtype] = GetParam();
  for (const auto set : InstructionSets()) {
    for (const float poison : {kNan, std::numeric_limits<float>::infinity()}) {
      std::vector<float> clean;
      for (const bool poisoned : {false, true}) {
        Cache cache(shape, dtype, 64);
        const std::vector<int32_t> tables[] = {cache.Take(30), cache.Take(30)};
        OwnedBatch batch;
        std::vector<std::pair<int32_t, int32_t>> places;
        for (int32_t s = 0; s < 2; ++s) {
          cache.Fill(tables[s], s, 0, 30);
          batch.Add({.num_rows = 6, .num_known_rows = 1, .first_position = 20}, tables[s]);
          for (int32_t i = 0; i < 6; ++i) places.emplace_back(s, 20 + i);
        }
        QueryRows rows(shape, places);
        if (poisoned) {  // sequence 0 from its fourth row on
          cache.k.Set(cache.Entry(tables[0], 23, 0) * shape.dim + 1, poison);
          cache.v.Set(cache.Entry(tables[0], 23, 0) * shape.dim + 2, poison);
          rows.q.Row(4)[shape.dim - 1] = poison;
        }
        ThreadPool pool(2);
        cpu::AttentionWith(set,
                           {.batch = batch.View(),
                            .q = rows.q.View(),
                            .q_gate = rows.q_gate.View(),
                            .pages = cache.View(),
                            .num_q_heads = shape.q_heads,
                            .out = rows.out.View()},
                           pool);
        const std::vector<float> out = rows.out.Values();
        if (!poisoned) {
          clean = out;
          continue;
        }
        const int64_t width = shape.q_heads * shape.dim;
        for (int64_t row = 0; row < 12; ++row) {
          const bool harmed = row >= 3 && row < 6;
          EXPECT_EQ(SameBits(&clean[row * width], &out[row * width], width), !harmed) << "row " << row;
          EXPECT_EQ(std::isfinite(out[row * width + 2]), !harmed) << "row " << row;  // dim 2 of the first head
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, AttentionTest,
                         ::testing::Combine(::testing::Values(Shape{1, 1, 16, 4}, Shape{4, 2, 24, 16}, Shape{8, 2, 64, 64},
                                                              Shape{6, 1, 80, 16}, Shape{3, 3, 128, 4}, Shape{20, 1, 32, 16},
                                                              Shape{4, 2, 256, 16}),
                                            ::testing::Values(DType::kFloat32, DType::kBFloat16)));

TEST(AttentionTest, HandComputed) {
  ThreadPool pool(1);
  // Two positions with scores 0 and ln 3 (head_dim 4 halves them): weights 1/4 and 3/4. The gate's second half opens by 1/2.
  const float ln3 = std::log(3.0f);
  std::vector<float> q = {1, 0, 0, 0}, q_gate = {9, 9, 9, 9, 0, 0, 0, 1000}, out(4);
  std::vector<float> k = {0, 5, 0, 0, 2 * ln3, 0, 7, 0}, v = {4, 8, 0, 4, 8, 0, 4, 4};
  OwnedBatch batch;
  batch.Add({.num_rows = 1, .num_known_rows = 1, .first_position = 1}, {0});
  cpu::Attention({.batch = batch.View(),
                  .q = FloatMatrix(q.data(), 1, 4),
                  .q_gate = FloatMatrix(q_gate.data(), 1, 8),
                  .pages = {k.data(), v.data(), DType::kFloat32, 1, 2, 1, 4},
                  .num_q_heads = 1,
                  .out = FloatMatrix(out.data(), 1, 4)},
                 pool);
  const std::vector<float> expected = {3.5f, 1.0f, 1.5f, 4.0f};
  for (int i = 0; i < 4; ++i) EXPECT_NEAR(out[i], expected[i], 1e-5) << i;
}

TEST(AttentionTest, RowThatSeesNothingGivesZero) {
  ThreadPool pool(1);
  std::vector<float> q(16, 1.0f), q_gate(32, 1.0f), out(16, kNan), k(64, kNan), v(64, kNan);
  OwnedBatch batch;
  batch.Add({.num_rows = 1, .num_known_rows = 1, .first_position = 0}, {0});
  cpu::Attention({.batch = batch.View(),
                  .q = FloatMatrix(q.data(), 1, 16),
                  .q_gate = FloatMatrix(q_gate.data(), 1, 32),
                  .pages = {k.data(), v.data(), DType::kFloat32, 1, 4, 1, 16},
                  .num_q_heads = 1,
                  .first_index = 1,
                  .out = FloatMatrix(out.data(), 1, 16)},
                 pool);
  EXPECT_TRUE(SameBits(out, std::vector<float>(16)));
}

// Scores that span far more than the exponential's range: the largest wins wherever it stands.
TEST(AttentionTest, LargeScores) {
  ThreadPool pool(1);
  constexpr int32_t kLength = 50, kDim = 16;
  for (const auto set : InstructionSets()) {
    for (const int32_t winner : {0, 15, 16, 31, 49}) {
      std::vector<float> q(kDim), q_gate(2 * kDim, 1000.0f), out(kDim), k(64 * kDim), v(64 * kDim);
      q[0] = 4;
      for (int32_t t = 0; t < kLength; ++t) {
        k[t * kDim] = t == winner ? 30000.0f : -20000.0f - static_cast<float>(t);
        v[t * kDim + 3] = static_cast<float>(t);
      }
      OwnedBatch batch;
      batch.Add({.num_rows = 1, .num_known_rows = 1, .first_position = kLength - 1}, {0});
      cpu::AttentionWith(set,
                         {.batch = batch.View(),
                          .q = FloatMatrix(q.data(), 1, kDim),
                          .q_gate = FloatMatrix(q_gate.data(), 1, 2 * kDim),
                          .pages = {k.data(), v.data(), DType::kFloat32, 1, 64, 1, kDim},
                          .num_q_heads = 1,
                          .out = FloatMatrix(out.data(), 1, kDim)},
                         pool);
      EXPECT_EQ(out[3], static_cast<float>(winner));
    }
  }
}

}  // namespace
}  // namespace bebop
