// SPDX-License-Identifier: Apache-2.0
#include "kernels/delta_rule/delta_rule.h"

#include <algorithm>
#include <cmath>

#include "kernels/common/check.h"

namespace bebop::cpu {
namespace {

constexpr int32_t kMaxKeyDim = 256;
constexpr int32_t kBlock = 32;      // columns of S that are worked on together: 16 KiB of state at dk = 128, which stays in L1
constexpr int32_t kMaxTokens = 64;  // tokens whose scalars are computed at a time

// What a token means to one value head, whatever the column. The vectors stay as they are in memory: their norms are scalars.
struct Token {
  const float* q;  // null for a replayed token: it has no output
  const float* k;
  const float* v;
  float* out;   // [dv]
  float decay;  // e^g
  float beta;
  float k_scale;  // 1 / |k|
  float q_scale;  // 1 / (|q| √dk)
  float kq;       // Σ k q, raw
};

// log decay and beta of a token, as the window keeps them.
struct Gate {
  float log_decay;
  float beta;
};

Gate GateOf(const DeltaRuleArgs& args, int64_t row, int32_t head) {
  const float x = args.a.Row<const float>(row)[head] + args.dt_bias[head];
  const float softplus = std::max(x, 0.0f) + std::log1p(std::exp(-std::fabs(x)));
  return {-std::exp(args.a_log[head]) * softplus, 1.0f / (1.0f + std::exp(-args.b.Row<const float>(row)[head]))};
}

// Shape of the state and where its parts lie.
struct Layout {
  explicit Layout(const LinearStateView& view)
      : state(view),
        key_dim(view.key_head_dim),
        value_dim(view.value_head_dim),
        key_width(int64_t{view.num_key_heads} * key_dim),
        value_width(int64_t{view.num_value_heads} * value_dim) {}

  float* Matrix(int64_t slot, int64_t head) const {
    return state.matrix + (slot * state.num_value_heads + head) * key_dim * value_dim;
  }
  float* WindowK(int64_t slot, int64_t row, int64_t key_head) const {
    return static_cast<float*>(state.window_k) + (slot * state.window + row) * key_width + key_head * key_dim;
  }
  float* WindowV(int64_t slot, int64_t row, int64_t head) const {
    return static_cast<float*>(state.window_v) + (slot * state.window + row) * value_width + head * value_dim;
  }
  float* WindowGate(int64_t slot, int64_t row, int64_t head) const {
    return state.window_gate + ((slot * state.window + row) * state.num_value_heads + head) * 2;
  }

  const LinearStateView& state;
  const int64_t key_dim, value_dim, key_width, value_width;
};

// Sequences [first_sequence, last_sequence) of a call, each value head cut into `slices` ranges of columns.
struct Wave {
  const DeltaRuleArgs& args;
  int32_t first_sequence;
  int32_t last_sequence;
  int32_t slices;
};

}  // namespace
}  // namespace bebop::cpu

#define BEBOP_SIMD_SOURCE "kernels/delta_rule/delta_rule_simd.inc"
#include "kernels/common/simd_targets.inc"

namespace bebop::cpu {
namespace {

// Keeps the draft rows of key heads [begin, end) and their value heads in the windows, sequences in order. Apart from RunColumns,
// since the columns and heads that share a window row replay from it in parallel, and src and dst may be one slot.
void KeepWindows(const Wave& wave, int64_t begin, int64_t end) {
  const Layout layout(wave.args.state);
  const int64_t group = layout.state.num_value_heads / layout.state.num_key_heads;
  for (int32_t s = wave.first_sequence; s < wave.last_sequence; ++s) {
    const SequenceRows& sequence = wave.args.batch.sequences[s];
    for (int32_t i = 0; i < sequence.num_rows - sequence.num_known_rows; ++i) {
      const int64_t row = sequence.first_row + sequence.num_known_rows + i;
      const float* k = wave.args.qkv.Row<float>(row) + layout.key_width;
      const float* v = k + layout.key_width;
      std::copy_n(k + begin * layout.key_dim, (end - begin) * layout.key_dim, layout.WindowK(sequence.state_dst, i, begin));
      std::copy_n(v + begin * group * layout.value_dim, (end - begin) * group * layout.value_dim,
                  layout.WindowV(sequence.state_dst, i, begin * group));
      for (int64_t head = begin * group; head < end * group; ++head) {
        const Gate gate = GateOf(wave.args, row, static_cast<int32_t>(head));
        float* kept = layout.WindowGate(sequence.state_dst, i, head);
        kept[0] = gate.log_decay;
        kept[1] = gate.beta;
      }
    }
  }
}

int32_t NumDraftRows(const SequenceRows& sequence) { return sequence.num_rows - sequence.num_known_rows; }

// The sequences from `first` on that can run before any of their windows is written: a sequence that replays a window which an
// earlier one of the call writes begins the next wave. (In decoding all sequences are one wave.)
int32_t EndOfWave(const RaggedBatch& batch, int32_t first) {
  for (int32_t s = first + 1; s < batch.num_sequences; ++s) {
    if (batch.sequences[s].num_replay_rows == 0) continue;
    for (int32_t writer = first; writer < s; ++writer) {
      if (batch.sequences[writer].state_dst == batch.sequences[s].state_src && NumDraftRows(batch.sequences[writer]) > 0)
        return s;
    }
  }
  return batch.num_sequences;
}

}  // namespace

void DeltaRule(const DeltaRuleArgs& args, ThreadPool& pool) { DeltaRuleWith(DetectInstructionSet(), args, pool); }

void DeltaRuleWith(InstructionSet set, const DeltaRuleArgs& args, ThreadPool& pool) {
  const LinearStateView& state = args.state;
  BEBOP_CHECK(state.key_head_dim > 0 && state.key_head_dim <= kMaxKeyDim && state.num_value_heads % state.num_key_heads == 0);
  bool has_drafts = false;
  for (int32_t s = 0; s < args.batch.num_sequences; ++s) {
    const SequenceRows& sequence = args.batch.sequences[s];
    const int32_t num_drafts = NumDraftRows(sequence);
    BEBOP_CHECK(num_drafts >= 0 && num_drafts <= state.window && num_drafts <= kMaxTokens);
    BEBOP_CHECK(sequence.num_replay_rows == 0 || (sequence.state_src >= 0 && sequence.num_replay_rows <= state.window));
    BEBOP_CHECK(sequence.state_src < state.num_slots && sequence.state_dst >= 0 && sequence.state_dst < state.num_slots);
    has_drafts |= num_drafts > 0;
  }
  // Whole heads share the scalars of a token; columns are split only as far as the threads need it. A few items a thread even
  // out.
  const int32_t num_blocks = (state.value_head_dim + kBlock - 1) / kBlock;
  const int32_t slices = std::clamp(2 * pool.num_threads() / state.num_value_heads, 1, num_blocks);
  const auto run_columns = BEBOP_SIMD_SELECT(set, RunColumns);
  for (int32_t first = 0; first < args.batch.num_sequences;) {
    const Wave wave{args, first, EndOfWave(args.batch, first), slices};
    pool.ParallelFor(int64_t{state.num_value_heads} * slices, 1,
                     [&](int64_t begin, int64_t end) { run_columns(wave, begin, end); });
    if (has_drafts) pool.ParallelFor(state.num_key_heads, 4, [&](int64_t begin, int64_t end) { KeepWindows(wave, begin, end); });
    first = wave.last_sequence;
  }
}

}  // namespace bebop::cpu
