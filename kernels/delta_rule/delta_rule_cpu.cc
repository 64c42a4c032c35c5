// SPDX-License-Identifier: Apache-2.0
#include "kernels/delta_rule/delta_rule.h"

#include <algorithm>
#include <cmath>

#include "kernels/common/check.h"

namespace bebop::cpu {
namespace {

constexpr int32_t kMaxKeyDim = 256;
constexpr int32_t kColumns = 32;  // columns of S that are worked on at a time

// One token of one value head: raw k, v (after conv and SiLU), log decay and beta; q is null for a replayed row, which has no output.
struct Token {
  const float* q;
  const float* k;
  const float* v;
  float gate;
  float beta;
};

float Sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }
float Softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

// S ← e^g S, δ = β(v − Sᵀk), S ← S + kδᵀ, o = Sᵀq on `count` columns.
void Step(const Token& token, int32_t key_dim, int32_t count, float (*matrix)[kColumns], float* out) {
  double square = 0.0;
  for (int32_t i = 0; i < key_dim; ++i) square += static_cast<double>(token.k[i]) * token.k[i];
  const float k_scale = static_cast<float>(1.0 / std::sqrt(square + 1e-6));
  const float decay = std::exp(token.gate);
  float delta[kColumns] = {};
  for (int32_t i = 0; i < key_dim; ++i) {
    const float k = token.k[i] * k_scale;
    for (int32_t c = 0; c < kColumns; ++c) {
      matrix[i][c] *= decay;
      delta[c] += matrix[i][c] * k;
    }
  }
  for (int32_t c = 0; c < count; ++c) delta[c] = token.beta * (token.v[c] - delta[c]);
  for (int32_t i = 0; i < key_dim; ++i) {
    const float k = token.k[i] * k_scale;
    for (int32_t c = 0; c < kColumns; ++c) matrix[i][c] += k * delta[c];
  }
  if (token.q == nullptr) return;
  square = 0.0;
  for (int32_t i = 0; i < key_dim; ++i) square += static_cast<double>(token.q[i]) * token.q[i];
  const float q_scale = static_cast<float>(1.0 / std::sqrt(square + 1e-6) / std::sqrt(static_cast<double>(key_dim)));
  float sum[kColumns] = {};
  for (int32_t i = 0; i < key_dim; ++i) {
    for (int32_t c = 0; c < kColumns; ++c) sum[c] += matrix[i][c] * (token.q[i] * q_scale);
  }
  std::copy_n(sum, count, out);
}

class Worker {
 public:
  explicit Worker(const DeltaRuleArgs& args) : args_(args) {}

  // Value heads of key head `key_head`, one after the other; the window's k is written last, as all of them replay from it.
  void RunKeyHead(const SequenceRows& sequence, int32_t key_head) {
    const LinearStateView& state = args_.state;
    const int32_t group = state.num_value_heads / state.num_key_heads;
    for (int32_t g = 0; g < group; ++g) RunValueHead(sequence, key_head, key_head * group + g);
    const int64_t key_width = int64_t{state.num_key_heads} * state.key_head_dim;
    for (int32_t row = sequence.num_known_rows; row < sequence.num_rows; ++row) {
      const int64_t window_row = int64_t{sequence.state_dst} * state.window + row - sequence.num_known_rows;
      std::copy_n(args_.qkv.Row<const float>(sequence.first_row + row) + key_width + int64_t{key_head} * state.key_head_dim,
                  state.key_head_dim, state.window_k + window_row * key_width + int64_t{key_head} * state.key_head_dim);
    }
  }

 private:
  void RunValueHead(const SequenceRows& sequence, int32_t key_head, int32_t head) {
    const LinearStateView& state = args_.state;
    const int32_t key_dim = state.key_head_dim, value_dim = state.value_head_dim;
    const int64_t key_width = int64_t{state.num_key_heads} * key_dim, value_width = int64_t{state.num_value_heads} * value_dim;
    const int64_t head_elements = int64_t{key_dim} * value_dim;
    for (int32_t column = 0; column < value_dim; column += kColumns) {
      const int32_t count = std::min(kColumns, value_dim - column);
      if (sequence.state_src >= 0) {
        const float* source = state.matrix + (int64_t{sequence.state_src} * state.num_value_heads + head) * head_elements + column;
        for (int32_t i = 0; i < key_dim; ++i) {
          std::copy_n(source + int64_t{i} * value_dim, count, matrix_[i]);
          std::fill(matrix_[i] + count, matrix_[i] + kColumns, 0.0f);
        }
      } else {
        std::fill_n(&matrix_[0][0], kMaxKeyDim * kColumns, 0.0f);
      }
      for (int32_t r = 0; r < sequence.num_replay_rows; ++r) {
        const int64_t window_row = int64_t{sequence.state_src} * state.window + r;
        const float* gate = state.window_gate + (window_row * state.num_value_heads + head) * 2;
        const Token token{nullptr, state.window_k + window_row * key_width + int64_t{key_head} * key_dim,
                          state.window_v + window_row * value_width + int64_t{head} * value_dim + column, gate[0], gate[1]};
        Step(token, key_dim, count, matrix_, nullptr);
      }
      for (int32_t row = 0; row < sequence.num_rows; ++row) {
        if (row == sequence.num_known_rows) StoreMatrix(sequence, head, column, count);
        Step(MakeToken(sequence.first_row + row, key_head, head, column), key_dim, count, matrix_,
             args_.out.Row<float>(sequence.first_row + row) + int64_t{head} * value_dim + column);
      }
      if (sequence.num_known_rows == sequence.num_rows) StoreMatrix(sequence, head, column, count);
    }
    // The window of v and gates last: src and dst may be one slot.
    for (int32_t row = sequence.num_known_rows; row < sequence.num_rows; ++row) {
      const Token token = MakeToken(sequence.first_row + row, key_head, head, 0);
      const int64_t window_row = int64_t{sequence.state_dst} * state.window + row - sequence.num_known_rows;
      std::copy_n(token.v, value_dim, state.window_v + window_row * value_width + int64_t{head} * value_dim);
      float* gate = state.window_gate + (window_row * state.num_value_heads + head) * 2;
      gate[0] = token.gate;
      gate[1] = token.beta;
    }
  }

  Token MakeToken(int64_t row, int32_t key_head, int32_t head, int32_t column) const {
    const LinearStateView& state = args_.state;
    const int64_t key_width = int64_t{state.num_key_heads} * state.key_head_dim;
    const float* qkv = args_.qkv.Row<const float>(row);
    const float* q = qkv + int64_t{key_head} * state.key_head_dim;
    const float gate = -std::exp(args_.a_log[head]) * Softplus(args_.a.Row<const float>(row)[head] + args_.dt_bias[head]);
    const float beta = Sigmoid(args_.b.Row<const float>(row)[head]);
    return {q, q + key_width, qkv + 2 * key_width + int64_t{head} * state.value_head_dim + column, gate, beta};
  }

  void StoreMatrix(const SequenceRows& sequence, int32_t head, int32_t column, int32_t count) const {
    const LinearStateView& state = args_.state;
    float* destination = state.matrix + column +
                         (int64_t{sequence.state_dst} * state.num_value_heads + head) * state.key_head_dim * state.value_head_dim;
    for (int32_t i = 0; i < state.key_head_dim; ++i) {
      std::copy_n(matrix_[i], count, destination + int64_t{i} * state.value_head_dim);
    }
  }

  const DeltaRuleArgs& args_;
  float matrix_[kMaxKeyDim][kColumns];
};

}  // namespace

void DeltaRule(const DeltaRuleArgs& args, ThreadPool& pool) {
  const LinearStateView& state = args.state;
  BEBOP_CHECK(state.key_head_dim > 0 && state.key_head_dim <= kMaxKeyDim && state.num_value_heads % state.num_key_heads == 0);
  pool.ParallelFor(state.num_key_heads, 1, [&](int64_t begin, int64_t end) {
    Worker worker(args);
    for (int32_t s = 0; s < args.batch.num_sequences; ++s) {
      for (int64_t key_head = begin; key_head < end; ++key_head) {
        worker.RunKeyHead(args.batch.sequences[s], static_cast<int32_t>(key_head));
      }
    }
  });
}

}  // namespace bebop::cpu
