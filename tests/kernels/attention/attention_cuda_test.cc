// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <optional>

#include "kernels/attention/attention.h"
#include "kernels/attention/attention_cuda.h"
#include "tests/kernels/cuda_test_util.h"

namespace bebop {
namespace {

using cuda::AttentionKernel;
using testing::CudaTest;
using testing::DeviceArray;
using testing::DeviceBatchCopy;
using testing::DeviceMatrix;
using testing::kNan;
using testing::OwnedBatch;
using testing::Random;
using testing::RoundToBFloat16;
using testing::SameBits;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Shape {
  int32_t q_heads, kv_heads, dim, page_tokens;

  std::string Name() const { return "q heads " + std::to_string(q_heads) + " dim " + std::to_string(dim); }
};

// Rows [first, first + rows) of a stream of tokens. What lies at a position of a stream is a function of (stream, position, head)
// alone, so the same context can be laid out in any pages and batch.
struct Part {
  int32_t stream, first, rows;
};

// A call with everything it points to, on the host; values are representable in `dtype`. Pages, beyond what is written, and page
// tables hold NaN and nothing.
class Case {
 public:
  Case(const Shape& shape, DType dtype, const std::vector<Part>& parts, int32_t first_index = 0, int32_t num_chain = 0)
      : shape(shape), dtype(dtype), first_index(first_index), num_chain(num_chain) {
    num_pages = 2;
    for (const Part& part : parts) num_pages += PagesFor(part.first + part.rows);
    k.assign(static_cast<size_t>(int64_t{num_pages} * shape.kv_heads * shape.page_tokens * shape.dim), kNan);
    v = k;
    int32_t next_page = num_pages - 1;
    for (const Part& part : parts) {
      std::vector<int32_t> pages;
      const int32_t end = part.first + part.rows - num_chain;  // the last rows' own entries are in the chain
      for (int32_t i = 0; i < PagesFor(end); ++i) pages.push_back(next_page--);
      tables.push_back(pages);
      for (int32_t position = first_index; position < end; ++position) {
        for (int32_t h = 0; h < shape.kv_heads; ++h) {
          const int64_t entry = Entry(pages, position, h);
          FillEntry(part.stream, position, h, &k[entry], &v[entry]);
        }
      }
      batch.Add({.num_rows = part.rows, .num_known_rows = 1, .first_position = part.first}, pages);
      for (int32_t i = 0; i < part.rows; ++i) {
        Random random(static_cast<uint64_t>(part.stream) * 77777 + static_cast<uint64_t>(part.first + i) + 5000000000u);
        Append(random.Normals(int64_t{shape.q_heads} * shape.dim), &q);
        Append(random.Normals(int64_t{shape.q_heads} * 2 * shape.dim, 3.0f), &q_gate);
      }
    }
    chain_k.resize(static_cast<size_t>(num_chain));
    chain_v.resize(static_cast<size_t>(num_chain));
    for (int32_t c = 0; c < num_chain; ++c) {
      chain_k[c].resize(static_cast<size_t>(int64_t{batch.num_rows()} * shape.kv_heads * shape.dim));
      chain_v[c].resize(chain_k[c].size());
      for (int32_t row = 0; row < batch.num_rows(); ++row) {
        for (int32_t h = 0; h < shape.kv_heads; ++h) {
          const int64_t at = (int64_t{row} * shape.kv_heads + h) * shape.dim;
          FillEntry(1000 + c, row, h, &chain_k[c][at], &chain_v[c][at]);
        }
      }
    }
    if (dtype == DType::kBFloat16) {
      q = RoundToBFloat16(q);
      q_gate = RoundToBFloat16(q_gate);
    }
  }

  KvPagesView Pages(void* keys, void* values, DType type) const {
    return {keys, values, type, num_pages, shape.page_tokens, shape.kv_heads, shape.dim};
  }
  int64_t Width() const { return int64_t{shape.q_heads} * shape.dim; }
  int32_t PagesFor(int32_t positions) const { return (std::max(positions, 1) + shape.page_tokens - 1) / shape.page_tokens; }
  int64_t Entry(const std::vector<int32_t>& pages, int32_t position, int32_t head) const {
    const int64_t slab = int64_t{pages[position / shape.page_tokens]} * shape.kv_heads + head;
    return (slab * shape.page_tokens + position % shape.page_tokens) * shape.dim;
  }
  void FillEntry(int32_t stream, int32_t position, int32_t head, float* key, float* value) const {
    Random random(static_cast<uint64_t>(stream) * 1000003 + static_cast<uint64_t>(position) * 64 + static_cast<uint64_t>(head));
    // Entries at borders of tiles weigh more, so that one missing stands out of the tolerance.
    const float weight = position % 64 == 0 || position % 64 == 63 ? 20.0f : 1.0f;
    for (int32_t i = 0; i < shape.dim; ++i) {
      key[i] = Round(random.Normal() * 1.5f);
      value[i] = Round(random.Normal() * weight);
    }
  }
  float Round(float value) const { return dtype == DType::kBFloat16 ? ToFloat(ToBFloat16(value)) : value; }

  const Shape shape;
  const DType dtype;
  const int32_t first_index, num_chain;
  int32_t num_pages;
  std::vector<std::vector<int32_t>> tables;
  OwnedBatch batch;
  std::vector<float> q, q_gate, k, v;
  std::vector<std::vector<float>> chain_k, chain_v;

 private:
  static void Append(const std::vector<float>& values, std::vector<float>* to) {
    to->insert(to->end(), values.begin(), values.end());
  }
};

std::vector<float> RunOnCpu(Case& c) {
  std::vector<float> out(static_cast<size_t>(c.batch.num_rows() * c.Width()));
  const int64_t rows = c.batch.num_rows(), kv_width = int64_t{c.shape.kv_heads} * c.shape.dim;
  std::vector<TensorView> chain_k, chain_v;
  for (int32_t i = 0; i < c.num_chain; ++i) {
    chain_k.push_back(FloatMatrix(c.chain_k[i].data(), rows, kv_width));
    chain_v.push_back(FloatMatrix(c.chain_v[i].data(), rows, kv_width));
  }
  ThreadPool pool(1);
  cpu::Attention({.batch = c.batch.View(),
                  .q = FloatMatrix(c.q.data(), rows, c.Width()),
                  .q_gate = FloatMatrix(c.q_gate.data(), rows, 2 * c.Width()),
                  .pages = c.Pages(c.k.data(), c.v.data(), DType::kFloat32),
                  .num_q_heads = c.shape.q_heads,
                  .first_index = c.first_index,
                  .num_chain = c.num_chain,
                  .chain_k = chain_k.data(),
                  .chain_v = chain_v.data(),
                  .out = FloatMatrix(out.data(), rows, c.Width())},
                 pool);
  return out;
}

// Device copies of a case, in a batch with padding: a sequence of no rows before each real one, and rows of no sequence at the
// end; what they point to must not be followed.
class DeviceCase {
 public:
  static constexpr int32_t kPaddedRows = 3;
  explicit DeviceCase(const Case& c)
      : case_(c),
        batch_(PaddedBatch(c)),
        rows_(c.batch.num_rows() + kPaddedRows),
        q_(PaddedRows(c.q, c.Width()), rows_, c.Width(), c.dtype),
        q_gate_(PaddedRows(c.q_gate, 2 * c.Width()), rows_, 2 * c.Width(), c.dtype),
        k_(c.k, static_cast<int64_t>(c.k.size()) / c.shape.dim, c.shape.dim, c.dtype, 0),
        v_(c.v, static_cast<int64_t>(c.v.size()) / c.shape.dim, c.shape.dim, c.dtype, 0),
        out_(rows_, c.Width(), c.dtype) {
    const int64_t kv_width = int64_t{c.shape.kv_heads} * c.shape.dim;
    for (int32_t i = 0; i < c.num_chain; ++i) {
      chain_.push_back(std::make_unique<DeviceMatrix>(c.chain_k[i], c.batch.num_rows(), kv_width, c.dtype));
      chain_k_.push_back(chain_.back()->View());
      chain_.push_back(std::make_unique<DeviceMatrix>(c.chain_v[i], c.batch.num_rows(), kv_width, c.dtype, 16));
      chain_v_.push_back(chain_.back()->View());
    }
  }

  AttentionArgs Args() const {
    AttentionArgs args;
    args.batch = batch_.View();
    args.q = q_.View();
    args.q_gate = q_gate_.View();
    args.pages = case_.Pages(k_.View().data, v_.View().data, case_.dtype);
    args.num_q_heads = case_.shape.q_heads;
    args.first_index = case_.first_index;
    args.num_chain = case_.num_chain;
    args.chain_k = chain_k_.data();
    args.chain_v = chain_v_.data();
    args.out = out_.View();
    // The bounds of the padding.
    args.batch.max_sequence_rows = std::max(args.batch.max_sequence_rows, 1);
    return args;
  }
  // The real rows.
  std::vector<float> Out() const {
    EXPECT_TRUE(out_.GapsUntouched());
    std::vector<float> values = out_.Values();
    values.resize(static_cast<size_t>((rows_ - kPaddedRows) * case_.Width()));
    return values;
  }

 private:
  static OwnedBatch PaddedBatch(const Case& c) {
    OwnedBatch padded;
    const SequenceRows nowhere = {.first_row = 1 << 30, .num_rows = 0, .first_page = 1 << 30};
    for (size_t s = 0; s < c.batch.sequences.size(); ++s) {
      padded.sequences.push_back(nowhere);
      padded.Add(c.batch.sequences[s], c.tables[s]);
    }
    for (int32_t i = 0; i < kPaddedRows; ++i) {
      padded.row_sequence.push_back(-1);
      padded.row_position.push_back(i == 0 ? 1 << 30 : -i);
    }
    return padded;
  }
  static std::vector<float> PaddedRows(std::vector<float> values, int64_t width) {
    values.insert(values.end(), static_cast<size_t>(kPaddedRows * width), kNan);
    return values;
  }

  const Case& case_;
  DeviceBatchCopy batch_;
  int64_t rows_;
  DeviceMatrix q_, q_gate_, k_, v_, out_;
  std::vector<std::unique_ptr<DeviceMatrix>> chain_;
  std::vector<TensorView> chain_k_, chain_v_;
};

std::vector<float> RunOnDevice(const Case& c, cuda::Stream& stream, std::optional<AttentionKernel> kernel = std::nullopt) {
  const DeviceCase device(c);
  const AttentionArgs args = device.Args();
  cuda::AttentionWith(kernel.value_or(cuda::ChooseAttentionKernel(args, stream)), args, stream);
  EXPECT_TRUE(stream.ok()) << stream.error();
  return device.Out();
}

// Compares with the CPU on the same values within docs/numerics.md, "CUDA": with a = the attention-weighted mean of |v|, times
// the gate,
//   |device - cpu| <= (w + 2 e + (n + 64) 2^-23) (a + |cpu|) + w |cpu|
//   e = (head_dim + 16) 2^-23 |q| max|k| / √head_dim + 2^-21
// w = 2^-8 (rounding of weights and of the output) in bf16 and 0 in float32. A score is off by e at most and a weight,
// relatively, by w + 2e, which moves the mean by as much of the mean |v - out|; the sum over n entries rounds like any (tensor
// cores truncate: 2^-23).
void ExpectAgrees(Case& c, const std::vector<float>& actual) {
  const std::vector<float> expected = RunOnCpu(c);
  Case magnitudes = c;
  for (float& value : magnitudes.v) value = std::fabs(value);
  for (std::vector<float>& values : magnitudes.chain_v) {
    for (float& value : values) value = std::fabs(value);
  }
  const std::vector<float> magnitude = RunOnCpu(magnitudes);
  const int32_t dim = c.shape.dim;
  const auto norm = [dim](const float* x) {
    double sum = 0;
    for (int32_t i = 0; i < dim; ++i) sum += double{x[i]} * x[i];
    return std::sqrt(sum);
  };
  double max_key = 0;
  const auto see = [&](const std::vector<float>& keys) {
    for (size_t i = 0; i < keys.size(); i += static_cast<size_t>(dim)) {
      if (const double key = norm(&keys[i]); key > max_key) max_key = key;  // false for what nobody wrote
    }
  };
  see(c.k);
  for (const std::vector<float>& keys : c.chain_k) see(keys);
  const double w = c.dtype == DType::kBFloat16 ? 0x1.0p-8 : 0.0;
  ASSERT_EQ(actual.size(), expected.size());
  for (int32_t row = 0; row < c.batch.num_rows(); ++row) {
    for (int32_t h = 0; h < c.shape.q_heads; ++h) {
      const int64_t at = row * c.Width() + int64_t{h} * dim;
      const double e = (dim + 16) * 0x1.0p-23 * norm(&c.q[at]) * max_key / std::sqrt(double(dim)) + 0x1.0p-21;
      const double relative = 1.01 * (w + 2 * e + (c.batch.row_position[row] + 64) * 0x1.0p-23);
      for (int64_t i = at; i < at + dim; ++i) {
        const double size = std::fabs(double{expected[i]});
        const double tolerance = relative * (magnitude[i] + size) + (w + 0x1.0p-20) * size + 1e-30;
        ASSERT_TRUE(std::fabs(double{actual[i]} - expected[i]) <= tolerance)
            << "row " << row << " at position " << c.batch.row_position[row] << " head " << h << " dim " << i - at << ": "
            << actual[i] << ", expected " << expected[i] << " +- " << tolerance;
      }
    }
  }
}

using AttentionCudaTest = CudaTest;

TEST_F(AttentionCudaTest, SplitKernelAgreesWithCpu) {
  // head_dims of both instances, whole and padded; groups 1 to 8; 16 to 80 packed rows and more than one block of them; lengths
  // around tiles.
  const std::vector<std::pair<Shape, std::vector<Part>>> cases = {
      {{1, 1, 16, 16}, {{0, 0, 1}, {1, 62, 3}, {2, 63, 1}, {3, 64, 1}, {4, 200, 9}}},
      {{4, 2, 64, 64}, {{0, 126, 4}, {1, 127, 1}, {2, 128, 4}, {3, 0, 4}, {4, 15, 2}}},
      {{6, 2, 80, 16}, {{0, 300, 9}, {1, 31, 1}}},
      {{8, 1, 128, 64}, {{0, 190, 6}, {1, 64, 2}}},
      {{5, 1, 256, 16}, {{0, 250, 9}, {1, 5, 1}}},
      {{16, 2, 256, 64}, {{0, 130, 9}, {1, 60, 7}}},
      {{8, 2, 256, 16}, {{0, 520, 4}, {1, 511, 4}, {2, 0, 1}}},
      {{7, 1, 48, 32}, {{0, 40, 33}, {1, 90, 1}, {2, 0, 14}}},
  };
  const auto invariant = MakeInvariantStream();
  for (const auto& [shape, parts] : cases) {
    for (const int32_t first_index : {0, 1}) {
      SCOPED_TRACE(shape.Name() + " first " + std::to_string(first_index));
      Case c(shape, DType::kBFloat16, parts, first_index);
      ExpectAgrees(c, RunOnDevice(c, stream(), AttentionKernel::kSplit));
      ExpectAgrees(c, RunOnDevice(c, *invariant));
      if (HasFatalFailure()) return;
    }
  }
}

// More splits than a warp has lanes, and than the merge has groups of threads; for the first row the last one decides by far.
TEST_F(AttentionCudaTest, ManySplitsAgreeWithCpu) {
  constexpr int32_t kFirst = 33 * 512 + 30;
  Case c({1, 1, 16, 64}, DType::kBFloat16, {{0, kFirst, 2}});
  for (int32_t i = 0; i < 16; ++i) c.k[c.Entry(c.tables[0], kFirst - 2, 0) + i] = c.Round(60 * c.q[i]);
  ExpectAgrees(c, RunOnDevice(c, *MakeInvariantStream()));
}

TEST_F(AttentionCudaTest, PrefillKernelAgreesWithCpu) {
  const std::vector<std::pair<Shape, std::vector<Part>>> cases = {
      {{1, 1, 16, 16}, {{0, 0, 130}, {1, 70, 1}, {2, 63, 66}}},
      {{4, 2, 128, 64}, {{0, 0, 70}, {1, 127, 33}}},
      {{6, 1, 256, 16}, {{0, 0, 24}, {1, 100, 13}, {2, 7, 1}}},
      {{3, 1, 208, 64}, {{0, 190, 30}}},
  };
  for (const auto& [shape, parts] : cases) {
    for (const int32_t first_index : {0, 1}) {
      SCOPED_TRACE(shape.Name() + " first " + std::to_string(first_index));
      Case c(shape, DType::kBFloat16, parts, first_index);
      ExpectAgrees(c, RunOnDevice(c, stream(), AttentionKernel::kPrefill));
      if (HasFatalFailure()) return;
    }
  }
}

TEST_F(AttentionCudaTest, FloatKernelAgreesWithCpu) {
  const std::vector<Part> parts = {{0, 0, 3}, {1, 126, 4}, {2, 128, 1}, {3, 260, 2}};
  for (const Shape& shape : {Shape{1, 1, 16, 16}, Shape{6, 2, 64, 64}, Shape{2, 1, 256, 16}, Shape{3, 1, 129, 4}}) {
    for (const int32_t first_index : {0, 1}) {
      Case c(shape, DType::kFloat32, parts, first_index);
      ExpectAgrees(c, RunOnDevice(c, stream()));
      if (HasFatalFailure()) return;
    }
  }
}

// Pages up to position - num_chain, then the row's own entries; some rows, and one whole sequence, see no page entry at all.
TEST_F(AttentionCudaTest, ChainAgreesWithCpu) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
    for (const Shape& shape : {Shape{4, 2, 64, 16}, Shape{2, 1, 256, 64}}) {
      for (const int32_t num_chain : {1, 2, 8}) {
        SCOPED_TRACE(std::string(DTypeName(dtype)) + " chain " + std::to_string(num_chain));
        Case c(shape, dtype, {{0, num_chain, 40}, {1, 70, 3}, {2, num_chain - 1, 1}}, 1, num_chain);
        ExpectAgrees(c, RunOnDevice(c, stream()));
        if (HasFatalFailure()) return;
      }
    }
  }
}

// A batch-invariant stream gives the rows of a context the same bits in windows of any size (none to 11 drafts), among other
// sequences, in other pages, and with a workspace that takes the rows in several slices.
TEST_F(AttentionCudaTest, InvariantRowsDependOnTheirContextAlone) {
  constexpr int32_t kFirst = 508, kRows = 12;  // across the border of the first split
  struct Variant {
    const char* name;
    std::vector<int32_t> windows;
    int32_t page_tokens = 16;
    bool mates = false;
    int64_t workspace_rows = 1000;
  };
  const std::vector<Variant> variants = {
      {.name = "windows of 4", .windows = {4, 4, 4}},
      {.name = "no drafts", .windows = std::vector<int32_t>(kRows, 1)},
      {.name = "one window in larger pages", .windows = {kRows}, .page_tokens = 64},
      {.name = "among others", .windows = {7, 5}, .mates = true},
      {.name = "among others in slices of rows", .windows = {kRows}, .mates = true, .workspace_rows = 5},
  };
  for (const auto& [dtype, dim] : {std::pair{DType::kBFloat16, 64}, {DType::kBFloat16, 256}, {DType::kFloat32, 16}}) {
    std::vector<float> expected;
    for (const Variant& variant : variants) {
      if (dim == 256 && variant.windows.size() > 3) continue;
      const Shape shape = {3, 1, dim, variant.page_tokens};
      constexpr int32_t kSplits = 2;
      const int64_t row_bytes = kSplits * shape.q_heads * (dim * 4 + 8);
      cuda::Stream here({.batch_invariant = true, .workspace_bytes = variant.workspace_rows * row_bytes});
      std::vector<float> out;
      int32_t done = 0;
      for (const int32_t rows : variant.windows) {
        std::vector<Part> parts = {{0, kFirst + done, rows}};
        if (variant.mates) parts = {{1, 3, 1}, parts[0], {2, 100, 21}, {3, 0, 2}};
        Case c(shape, dtype, parts);
        const std::vector<float> all = RunOnDevice(c, here);
        const auto begin = all.begin() + (variant.mates ? 1 : 0) * c.Width();
        out.insert(out.end(), begin, begin + rows * c.Width());
        done += rows;
      }
      if (expected.empty()) expected = out;
      EXPECT_TRUE(SameBits(expected, out)) << DTypeName(dtype) << " dim " << dim << " " << variant.name;
      EXPECT_TRUE(std::all_of(out.begin(), out.end(), [](float x) { return std::isfinite(x); }));
    }
  }
}

// What is not finite in a key, value or query reaches the rows that see it, and no others.
TEST_F(AttentionCudaTest, NanReachesOnlyTheRowsThatSeeIt) {
  const Shape shape = {4, 2, 64, 16};
  constexpr int32_t kBegin = 61, kRowsOfEach = 24, kPoisoned = 70;  // positions; the poison lies in the second tile
  for (const auto kernel : {AttentionKernel::kSplit, AttentionKernel::kPrefill, AttentionKernel::kFloat}) {
    const DType dtype = kernel == AttentionKernel::kFloat ? DType::kFloat32 : DType::kBFloat16;
    Case clean(shape, dtype, {{0, kBegin, kRowsOfEach}, {1, kBegin, kRowsOfEach}});
    const std::vector<float> expected = RunOnDevice(clean, stream(), kernel);
    enum class Place { kKey, kValue, kQuery };
    for (const Place place : {Place::kKey, Place::kValue, Place::kQuery}) {
      for (const float poison : {kNan, kInfinity, -kInfinity}) {
        Case c = clean;
        const int64_t entry = c.Entry(c.tables[0], kPoisoned, 1);  // kv head 1 has q heads 2 and 3
        constexpr int32_t kRow = kPoisoned - kBegin;
        if (place == Place::kKey) c.k[entry + 1] = poison;
        if (place == Place::kValue) c.v[entry + 2] = poison;
        if (place == Place::kQuery) c.q[kRow * c.Width() + 3 * shape.dim + 5] = poison;
        const std::vector<float> out = RunOnDevice(c, stream(), kernel);
        for (int32_t row = 0; row < 2 * kRowsOfEach; ++row) {
          for (int32_t h = 0; h < shape.q_heads; ++h) {
            const int64_t at = row * c.Width() + int64_t{h} * shape.dim;
            bool harmed = row < kRowsOfEach && row >= kRow && h >= 2;
            if (place == Place::kQuery) harmed = row == kRow && h == 3;
            // A score of -infinity is a weight of 0; a value harms its own column.
            SCOPED_TRACE("kernel " + std::to_string(static_cast<int>(kernel)) + " place " +
                         std::to_string(static_cast<int>(place)) + " poison " + std::to_string(poison) + " row " +
                         std::to_string(row) + " head " + std::to_string(h));
            if (!harmed) {
              ASSERT_TRUE(SameBits(&expected[at], &out[at], shape.dim));
            } else if (place == Place::kValue) {
              ASSERT_FALSE(std::isfinite(out[at + 2]));
              ASSERT_TRUE(SameBits(&expected[at + 3], &out[at + 3], shape.dim - 3));
            } else if (place == Place::kQuery || std::isnan(poison)) {
              ASSERT_TRUE(std::all_of(&out[at], &out[at] + shape.dim, [](float x) { return std::isnan(x); }));
            } else {  // an infinite score: NaN, or without that entry
              const float query = c.q[at + 1] * poison;
              ASSERT_EQ(std::isnan(out[at]), query > 0);
              ASSERT_FALSE(SameBits(&expected[at], &out[at], shape.dim));
            }
          }
        }
      }
    }
  }
}

TEST_F(AttentionCudaTest, RowThatSeesNothingGivesZero) {
  for (const auto kernel : {AttentionKernel::kSplit, AttentionKernel::kPrefill, AttentionKernel::kFloat}) {
    const DType dtype = kernel == AttentionKernel::kFloat ? DType::kFloat32 : DType::kBFloat16;
    Case c({2, 1, 32, 16}, dtype, {{0, 0, 3}}, 1);  // position 0 is in no page; rows 1 and 2 see something
    const std::vector<float> out = RunOnDevice(c, stream(), kernel);
    EXPECT_TRUE(std::all_of(out.begin(), out.begin() + c.Width(), [](float x) { return x == 0.0f; }));
    ExpectAgrees(c, out);
  }
}

// Keys of -infinity scores only: there is no mean to give, as on the CPU.
TEST_F(AttentionCudaTest, OnlyMinusInfinityGivesNan) {
  for (const auto kernel : {AttentionKernel::kSplit, AttentionKernel::kPrefill, AttentionKernel::kFloat}) {
    const DType dtype = kernel == AttentionKernel::kFloat ? DType::kFloat32 : DType::kBFloat16;
    Case c({1, 1, 16, 16}, dtype, {{0, 4, 1}});
    for (int32_t position = 0; position < 5; ++position) c.k[c.Entry(c.tables[0], position, 0) + 7] = -kInfinity;
    std::fill(c.q.begin(), c.q.end(), 1.0f);
    for (const std::vector<float>& out : {RunOnDevice(c, stream(), kernel), RunOnCpu(c)}) {
      EXPECT_TRUE(std::all_of(out.begin(), out.end(), [](float x) { return std::isnan(x); }));
    }
  }
}

// Scores that span far more than the exponential's range: the largest wins wherever it stands.
TEST_F(AttentionCudaTest, LargeScores) {
  for (const auto kernel : {AttentionKernel::kSplit, AttentionKernel::kPrefill, AttentionKernel::kFloat}) {
    const DType dtype = kernel == AttentionKernel::kFloat ? DType::kFloat32 : DType::kBFloat16;
    for (const int32_t winner : {0, 63, 64, 150, 199}) {
      Case c({1, 1, 16, 16}, dtype, {{0, 199, 1}});
      std::fill(c.q.begin(), c.q.end(), 0.0f);
      c.q[0] = 4;
      std::fill(c.q_gate.begin(), c.q_gate.end(), 1000.0f);
      for (int32_t position = 0; position < 200; ++position) {
        const float key = position == winner ? 30000.0f : -20000.0f - static_cast<float>(position);
        c.k[c.Entry(c.tables[0], position, 0)] = c.Round(key);
      }
      const std::vector<float> out = RunOnDevice(c, stream(), kernel);
      EXPECT_TRUE(SameBits(out.data(), &c.v[c.Entry(c.tables[0], winner, 0)], 16)) << "winner " << winner;
    }
  }
}

TEST_F(AttentionCudaTest, ChoosesTheKernelFromHostValues) {
  AttentionArgs args;
  args.batch = {.num_sequences = 4, .num_rows = 16, .max_sequence_rows = 4, .max_positions = 4096};
  args.pages = {.dtype = DType::kBFloat16, .page_tokens = 64, .num_kv_heads = 4, .head_dim = 256};
  args.num_q_heads = 16;
  EXPECT_EQ(cuda::ChooseAttentionKernel(args, stream()), AttentionKernel::kSplit);  // verify
  args.batch.num_rows = args.batch.max_sequence_rows = 8192;
  EXPECT_EQ(cuda::ChooseAttentionKernel(args, stream()), AttentionKernel::kPrefill);
  EXPECT_EQ(cuda::ChooseAttentionKernel(args, *MakeInvariantStream()), AttentionKernel::kSplit);
  args.num_chain = 1;
  EXPECT_EQ(cuda::ChooseAttentionKernel(args, stream()), AttentionKernel::kSplit);
  args.pages.dtype = DType::kFloat32;
  EXPECT_EQ(cuda::ChooseAttentionKernel(args, stream()), AttentionKernel::kFloat);
}

TEST_F(AttentionCudaTest, WorkspaceForNotOneRowIsAnError) {
  Case c({4, 1, 64, 16}, DType::kBFloat16, {{0, 10, 1}});
  const DeviceCase device(c);
  cuda::Stream small({.workspace_bytes = 1000});
  cuda::Attention(device.Args(), small);
  EXPECT_FALSE(small.ok());
  EXPECT_NE(small.error().find("partial results of one row take 1056 bytes, the workspace has 1000"), std::string::npos)
      << small.error();
}

TEST_F(AttentionCudaTest, EmptyBatchDoesNothing) {
  AttentionArgs args;
  args.pages = {.dtype = DType::kBFloat16, .page_tokens = 16, .num_kv_heads = 1, .head_dim = 16};
  args.num_q_heads = 1;
  args.q.dtype = args.q_gate.dtype = args.out.dtype = DType::kBFloat16;
  const DeviceArray<int32_t> none(0);
  args.batch.row_sequence = args.batch.row_position = none.data();
  cuda::Attention(args, stream());
  EXPECT_TRUE(stream().ok());
}

}  // namespace
}  // namespace bebop
