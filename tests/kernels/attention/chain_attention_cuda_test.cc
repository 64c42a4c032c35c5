// SPDX-License-Identifier: Apache-2.0
#include "kernels/attention/chain_attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "tests/kernels/cuda_test_util.h"

namespace bebop {
namespace {

using testing::CudaTest;
using testing::DeviceArray;
using testing::DeviceMatrix;
using testing::kNan;
using testing::Random;
using testing::RoundToBFloat16;
using testing::SameBits;

constexpr double kRounding = 0x1.01p-8;  // of a value to bf16
constexpr double kFloat = 1e-5;          // of float32 sums of up to some hundred terms, relative to the sum of magnitudes

struct Shape {
  std::vector<int64_t> lengths;
  int32_t q_heads, kv_heads, dim, num_chain;
  int64_t rows() const { return std::accumulate(lengths.begin(), lengths.end(), int64_t{0}); }
};

// Tiles are 64 rows and 32 keys: documents start inside of tiles, reach over several and share one; heads fill 64, 128 or 256
// columns, or a part of them.
const Shape kShapes[] = {
    {{1}, 1, 1, 16, 0}, {{70, 3, 90}, 4, 2, 16, 2}, {{5, 60, 2, 40}, 3, 1, 64, 0}, {{33, 40}, 2, 2, 80, 7}, {{67}, 2, 1, 256, 1}};

// Inputs, bf16 values where the device rounds, so that only what it computes is rounded; and results.
struct Data {
  explicit Data(const Shape& shape)
      : rows(shape.rows()), q_width(shape.q_heads * shape.dim), kv_width(shape.kv_heads * shape.dim) {
    Random random(static_cast<uint64_t>(rows * 31 + shape.dim));
    q = RoundToBFloat16(random.Normals(rows * q_width, 1.5f));
    q_gate = random.Normals(rows * 2 * q_width, 2.0f);
    dout = random.Normals(rows * q_width);
    for (int32_t c = 0; c <= shape.num_chain; ++c) {  // 0: base
      k.push_back(RoundToBFloat16(random.Normals(rows * kv_width)));
      v.push_back(RoundToBFloat16(random.Normals(rows * kv_width)));
      dk.push_back(random.Normals(rows * kv_width));  // what gradients are added to
      dv.push_back(random.Normals(rows * kv_width));
    }
  }
  int64_t rows, q_width, kv_width;
  std::vector<float> q, q_gate, dout;
  std::vector<std::vector<float>> k, v, dk, dv;
};

// A value in double with the largest error that the device's roundings may give it.
struct Bounded {
  double value = 0, error = 0;
};
using BoundedMatrix = std::vector<Bounded>;

struct Expected {
  BoundedMatrix attended, out, log_sum, dgate, dattended, dq;
  std::vector<BoundedMatrix> dk, dv;
};

// The definition, entry by entry.
Expected Reference(const Shape& shape, const Data& data) {
  const int64_t dim = shape.dim, group = shape.q_heads / shape.kv_heads;
  const double scale = 1.0 / std::sqrt(static_cast<double>(dim));
  Expected out;
  for (BoundedMatrix* matrix : {&out.attended, &out.out, &out.dgate, &out.dattended, &out.dq}) matrix->resize(data.q.size());
  out.log_sum.resize(static_cast<size_t>(data.rows * shape.q_heads));
  for (size_t c = 0; c < data.k.size(); ++c) {
    for (auto* all : {&out.dk, &out.dv}) all->emplace_back(data.k[c].size());
    for (size_t i = 0; i < data.k[c].size(); ++i) {
      out.dk[c][i] = {data.dk[c][i], kFloat * std::fabs(data.dk[c][i])};
      out.dv[c][i] = {data.dv[c][i], kFloat * std::fabs(data.dv[c][i])};
    }
  }
  int64_t first = 0;
  for (const int64_t length : shape.lengths) {
    for (int64_t row = first; row < first + length; ++row) {
      for (int64_t head = 0; head < shape.q_heads; ++head) {
        const auto q_at = static_cast<size_t>(row * data.q_width + head * dim),
                   kv_column = static_cast<size_t>(head / group * dim);
        struct Entry {
          size_t matrix, at;
          double score, prob;
        };
        std::vector<Entry> entries;
        for (int64_t key = first; key <= row; ++key)
          entries.push_back({0, static_cast<size_t>(key * data.kv_width) + kv_column, 0, 0});
        for (size_t c = 1; c < data.k.size(); ++c)
          entries.push_back({c, static_cast<size_t>(row * data.kv_width) + kv_column, 0, 0});
        double max = -1e300, sum = 0, score_error = 0;
        for (Entry& entry : entries) {
          double magnitude = 0;
          for (int64_t d = 0; d < dim; ++d) {
            const double term = double{data.q[q_at + d]} * data.k[entry.matrix][entry.at + d] * scale;
            entry.score += term;
            magnitude += std::fabs(term);
          }
          max = std::max(max, entry.score);
          score_error = std::max(score_error, kFloat * magnitude);
        }
        for (const Entry& entry : entries) sum += std::exp(entry.score - max);
        const double log_sum = max + std::log(sum);
        out.log_sum[static_cast<size_t>(row * shape.q_heads + head)] = {log_sum, score_error + kFloat * (1 + std::fabs(log_sum))};
        for (Entry& entry : entries) entry.prob = std::exp(entry.score - log_sum);
        std::vector<double> attended(static_cast<size_t>(dim)), inner(attended), attended_error(attended);
        double delta = 0, delta_error = 0;
        for (int64_t d = 0; d < dim; ++d) {
          const size_t at = q_at + static_cast<size_t>(d), i = static_cast<size_t>(d);
          for (const Entry& entry : entries) {
            const double term = entry.prob * data.v[entry.matrix][entry.at + i];
            attended[i] += term;
            attended_error[i] += std::fabs(term) * (kRounding + 2 * score_error + kFloat);
          }
          const double gate =
              1.0 / (1.0 + std::exp(-double{data.q_gate[static_cast<size_t>((row * shape.q_heads + head) * 2 * dim + dim + d)]}));
          out.attended[at] = {attended[i], attended_error[i]};
          out.out[at] = {attended[i] * gate, attended_error[i] * gate + kFloat * std::fabs(attended[i])};
          inner[i] = data.dout[at] * gate;
          out.dattended[at] = {inner[i], kFloat * std::fabs(inner[i])};
          const double slope = data.dout[at] * gate * (1.0 - gate);
          out.dgate[at] = {slope * attended[i], std::fabs(slope) * (attended_error[i] + kFloat * std::fabs(attended[i]))};
          delta += inner[i] * attended[i];
          delta_error += std::fabs(inner[i]) * (attended_error[i] + kFloat * std::fabs(attended[i]));
        }
        for (const Entry& entry : entries) {
          const double rounding = entry.matrix == 0 ? kRounding : 0.0;  // a row's own chain stays in float32
          double product = 0, product_error = 0;
          for (int64_t d = 0; d < dim; ++d) {
            const double term = inner[static_cast<size_t>(d)] * data.v[entry.matrix][entry.at + d];
            product += term;
            product_error += std::fabs(term) * (rounding + kFloat);
          }
          const double dscore = entry.prob * (product - delta) * scale;
          const double dscore_error =
              entry.prob * scale * (product_error + delta_error) + std::fabs(dscore) * (rounding + 3 * score_error + kFloat);
          for (int64_t d = 0; d < dim; ++d) {
            const double query = data.q[q_at + d], key = data.k[entry.matrix][entry.at + d],
                         gradient = inner[static_cast<size_t>(d)];
            Bounded& dq = out.dq[q_at + d];
            dq.value += dscore * key;
            dq.error += std::fabs(key) * (dscore_error + kFloat * std::fabs(dscore));
            Bounded& dk = out.dk[entry.matrix][entry.at + d];
            dk.value += dscore * query;
            dk.error += std::fabs(query) * (dscore_error + kFloat * std::fabs(dscore));
            Bounded& dv = out.dv[entry.matrix][entry.at + d];
            dv.value += entry.prob * gradient;
            dv.error += entry.prob * std::fabs(gradient) * (2 * rounding + 3 * score_error + kFloat);
          }
        }
      }
    }
    first += length;
  }
  return out;
}

std::vector<DocumentRows> DocumentsOf(const Shape& shape) {
  std::vector<DocumentRows> documents;
  int64_t first = 0;
  for (const int64_t length : shape.lengths) {
    documents.push_back({first, length});
    first += length;
  }
  return documents;
}

// Everything on the device, and a run of both passes.
class DeviceRun {
 public:
  DeviceRun(const Shape& shape, const Data& data)
      : documents(DocumentsOf(shape)),
        q(data.q, data.rows, data.q_width, DType::kFloat32),
        q_gate(data.q_gate, data.rows, 2 * data.q_width, DType::kFloat32, 24),
        dout(data.dout, data.rows, data.q_width, DType::kFloat32),
        attended(data.rows, data.q_width, DType::kFloat32, 16),
        log_sum(data.rows, shape.q_heads, DType::kFloat32, 3),
        out(data.rows, data.q_width, DType::kFloat32) {
    for (size_t c = 0; c < data.k.size(); ++c) {
      const auto matrix = [&](const std::vector<float>& values) {
        return std::make_unique<DeviceMatrix>(values, data.rows, data.kv_width, DType::kFloat32, c % 2 == 0 ? 8 : 32);
      };
      k.push_back(matrix(data.k[c])), v.push_back(matrix(data.v[c]));
      dk.push_back(matrix(data.dk[c])), dv.push_back(matrix(data.dv[c]));
    }
    for (size_t c = 1; c < data.k.size(); ++c) {
      chain_k.push_back(k[c]->View()), chain_v.push_back(v[c]->View());
      dchain_k.push_back(dk[c]->View()), dchain_v.push_back(dv[c]->View());
    }
    forward = {.documents = documents.data(),
               .num_documents = static_cast<int32_t>(documents.count()),
               .q = q.View(),
               .q_gate = q_gate.View(),
               .base_k = k[0]->View(),
               .base_v = v[0]->View(),
               .num_chain = shape.num_chain,
               .chain_k = chain_k.data(),
               .chain_v = chain_v.data(),
               .num_q_heads = shape.q_heads,
               .num_kv_heads = shape.kv_heads,
               .head_dim = shape.dim,
               .attended = attended.View(),
               .log_sum = log_sum.View(),
               .out = out.View()};
  }
  // As in training: dq over out, the gates' gradients over the gates.
  ChainAttentionBackwardArgs Backward() {
    return {forward, dout.View(), out.View(), q_gate.View(), dk[0]->View(), dv[0]->View(), dchain_k.data(), dchain_v.data()};
  }

  DeviceArray<DocumentRows> documents;
  DeviceMatrix q, q_gate, dout, attended, log_sum, out;
  std::vector<std::unique_ptr<DeviceMatrix>> k, v, dk, dv;
  std::vector<TensorView> chain_k, chain_v, dchain_k, dchain_v;
  ChainAttentionArgs forward;
};

void ExpectNear(const std::vector<float>& actual, const BoundedMatrix& expected, const char* what) {
  ASSERT_EQ(actual.size(), expected.size());
  double error = 0, bound = 0;
  for (size_t i = 0; i < actual.size(); ++i) {
    ASSERT_NEAR(actual[i], expected[i].value, expected[i].error + 1e-7) << what << " " << i;
    error += std::pow(actual[i] - expected[i].value, 2);
    bound += std::pow(expected[i].error, 2);
  }
  // Roundings are as often up as down: their sum must be well inside of the bound.
  EXPECT_LE(std::sqrt(error), 0.5 * std::sqrt(bound) + 1e-6) << what;
}

class ChainAttentionCudaTest : public CudaTest {};

TEST_F(ChainAttentionCudaTest, AgreesWithTheDefinition) {
  for (const Shape& shape : kShapes) {
    SCOPED_TRACE(::testing::Message() << shape.rows() << " rows, heads " << shape.q_heads << "/" << shape.kv_heads << " of "
                                      << shape.dim << ", chain " << shape.num_chain);
    const Data data(shape);
    const Expected expected = Reference(shape, data);
    DeviceRun run(shape, data);
    cuda::ChainAttention(run.forward, stream());
    ExpectNear(run.attended.Values(), expected.attended, "attended");
    ExpectNear(run.out.Values(), expected.out, "out");
    ExpectNear(run.log_sum.Values(), expected.log_sum, "log_sum");
    cuda::ChainAttentionBackward(run.Backward(), stream());
    ExpectNear(run.out.Values(), expected.dq, "dq");
    ExpectNear(run.dout.Values(), expected.dattended, "dattended");
    const std::vector<float> q_gate = run.q_gate.Values();
    std::vector<float> dgate;
    for (int64_t i = 0; i < data.rows * shape.q_heads; ++i) {
      const auto begin = q_gate.begin() + i * 2 * shape.dim;
      EXPECT_TRUE(std::equal(begin, begin + shape.dim, data.q_gate.begin() + i * 2 * shape.dim)) << "a query half";
      dgate.insert(dgate.end(), begin + shape.dim, begin + 2 * shape.dim);
    }
    ExpectNear(dgate, expected.dgate, "dgate");
    for (size_t c = 0; c < data.k.size(); ++c) {
      SCOPED_TRACE(::testing::Message() << "entries of step " << c + 1);
      ExpectNear(run.dk[c]->Values(), expected.dk[c], "dk");
      ExpectNear(run.dv[c]->Values(), expected.dv[c], "dv");
      EXPECT_TRUE(run.dk[c]->GapsUntouched() && run.dv[c]->GapsUntouched());
    }
    EXPECT_TRUE(run.attended.GapsUntouched() && run.out.GapsUntouched() && run.log_sum.GapsUntouched());
    EXPECT_TRUE(run.q_gate.GapsUntouched() && run.dout.GapsUntouched());
  }
}

// The reference above, and the CPU's kernel, which autograd judges.
TEST_F(ChainAttentionCudaTest, AgreesWithTheCpu) {
  ThreadPool pool(1);
  const Shape shape = {{20, 51}, 4, 2, 32, 2};
  Data data(shape);
  const Expected expected = Reference(shape, data);
  const auto matrix = [&](std::vector<float>& values, int64_t cols) { return FloatMatrix(values.data(), data.rows, cols); };
  std::vector<float> attended(data.q.size()), out(data.q.size()), log_sum(static_cast<size_t>(data.rows * shape.q_heads));
  std::vector<TensorView> k, v, dk, dv;
  for (size_t c = 0; c < data.k.size(); ++c) {
    k.push_back(matrix(data.k[c], data.kv_width)), v.push_back(matrix(data.v[c], data.kv_width));
    dk.push_back(matrix(data.dk[c], data.kv_width)), dv.push_back(matrix(data.dv[c], data.kv_width));
  }
  const std::vector<DocumentRows> documents = DocumentsOf(shape);
  const ChainAttentionArgs forward = {.documents = documents.data(),
                                      .num_documents = 2,
                                      .q = matrix(data.q, data.q_width),
                                      .q_gate = matrix(data.q_gate, 2 * data.q_width),
                                      .base_k = k[0],
                                      .base_v = v[0],
                                      .num_chain = shape.num_chain,
                                      .chain_k = k.data() + 1,
                                      .chain_v = v.data() + 1,
                                      .num_q_heads = shape.q_heads,
                                      .num_kv_heads = shape.kv_heads,
                                      .head_dim = shape.dim,
                                      .attended = matrix(attended, data.q_width),
                                      .log_sum = matrix(log_sum, shape.q_heads),
                                      .out = matrix(out, data.q_width)};
  cpu::ChainAttention(forward, pool);
  ExpectNear(attended, expected.attended, "attended");
  ExpectNear(log_sum, expected.log_sum, "log_sum");
  cpu::ChainAttentionBackward({forward, matrix(data.dout, data.q_width), matrix(out, data.q_width),
                               matrix(data.q_gate, 2 * data.q_width), dk[0], dv[0], dk.data() + 1, dv.data() + 1},
                              pool);
  ExpectNear(out, expected.dq, "dq");
  for (size_t c = 0; c < data.k.size(); ++c) {
    ExpectNear(data.dk[c], expected.dk[c], "dk");
    ExpectNear(data.dv[c], expected.dv[c], "dv");
  }
}

// No atomics: the order of blocks and threads, which the emulated device draws anew, changes no bit. Nor does another document,
// while a document keeps its place.
TEST_F(ChainAttentionCudaTest, BitsAreRepeatableAndDocumentsAreApart) {
  const Shape shape = {{40, 30, 20}, 2, 1, 16, 1};
  const auto run = [&](const Data& data) {
    auto result = std::make_unique<DeviceRun>(shape, data);
    cuda::ChainAttention(result->forward, stream());
    cuda::ChainAttentionBackward(result->Backward(), stream());
    return result;
  };
  Data data(shape);
  const auto first = run(data), again = run(data);
  for (const int64_t row : {0, 70}) {  // first and last document
    for (int64_t i = row; i < row + 20; ++i) {
      for (auto* matrix : {&data.q, &data.dout}) {
        for (int64_t d = 0; d < data.q_width; ++d) (*matrix)[static_cast<size_t>(i * data.q_width + d)] += 1.0f;
      }
      for (auto* matrices : {&data.k, &data.v}) {
        for (std::vector<float>& matrix : *matrices) {
          for (int64_t d = 0; d < data.kv_width; ++d) matrix[static_cast<size_t>(i * data.kv_width + d)] -= 1.0f;
        }
      }
    }
  }
  const auto others_changed = run(data);
  const auto same = [&](const DeviceMatrix& a, const DeviceMatrix& b, int64_t width, int64_t begin, int64_t end) {
    const std::vector<float> left = a.Values(), right = b.Values();
    return SameBits(left.data() + begin * width, right.data() + begin * width, (end - begin) * width);
  };
  EXPECT_TRUE(same(first->out, again->out, data.q_width, 0, data.rows));
  EXPECT_TRUE(same(first->out, others_changed->out, data.q_width, 40, 70));
  EXPECT_FALSE(same(first->out, others_changed->out, data.q_width, 0, 40));
  for (size_t c = 0; c < 2; ++c) {
    for (auto matrices : {&DeviceRun::dk, &DeviceRun::dv}) {
      const DeviceMatrix &a = *((*first).*matrices)[c], &b = *((*again).*matrices)[c], &d = *((*others_changed).*matrices)[c];
      EXPECT_TRUE(same(a, b, data.kv_width, 0, data.rows)) << c;
      EXPECT_TRUE(same(a, d, data.kv_width, 40, 70)) << c;
      EXPECT_FALSE(same(a, d, data.kv_width, 70, 90)) << c;
    }
  }
}

}  // namespace
}  // namespace bebop
