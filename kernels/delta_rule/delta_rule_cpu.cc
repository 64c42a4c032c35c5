// SPDX-License-Identifier: Apache-2.0
#include "kernels/delta_rule/delta_rule.h"

#include <algorithm>
#include <cmath>

#include "kernels/common/check.h"
#include "kernels/common/simd.h"

namespace bebop::cpu {
namespace {

using simd::Floats;
using simd::kWidth;

constexpr int32_t kMaxKeyDim = 256;
constexpr int32_t kBlock = 2 * kWidth;  // columns of S that are worked on together: 16 KiB of state at dk = 128, which stays in L1
constexpr int32_t kMaxTokens = 64;      // tokens whose scalars are computed at a time

// Columns of one row of a block of S.
template <class Set>
struct Columns {
  Floats<Set> low, high;
};

// What a token means to one value head, whatever the column. The vectors stay as they are in memory: their norms are scalars.
struct Token {
  const float* q;  // null for a replayed token: it has no output
  const float* k;
  const float* v;
  float* out;     // [dv]
  float decay;    // e^g
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

  float* Matrix(int64_t slot, int64_t head) const { return state.matrix + (slot * state.num_value_heads + head) * key_dim * value_dim; }
  float* WindowK(int64_t slot, int64_t row, int64_t key_head) const {
    return state.window_k + (slot * state.window + row) * key_width + key_head * key_dim;
  }
  float* WindowV(int64_t slot, int64_t row, int64_t head) const {
    return state.window_v + (slot * state.window + row) * value_width + head * value_dim;
  }
  float* WindowGate(int64_t slot, int64_t row, int64_t head) const {
    return state.window_gate + ((slot * state.window + row) * state.num_value_heads + head) * 2;
  }

  const LinearStateView& state;
  const int64_t key_dim, value_dim, key_width, value_width;
};

template <class Set>
BEBOP_SIMD_INLINE float Dot(const float* a, const float* b, int64_t count) {
  Floats<Set> sum = simd::Zero<Set>();
  for (int64_t i = 0; i < count; i += kWidth) {
    sum = simd::MulAdd(simd::LoadPartial<Set>(a + i, count - i), simd::LoadPartial<Set>(b + i, count - i), sum);
  }
  return simd::Sum(sum);
}

template <class Set>
BEBOP_SIMD_INLINE void SetScalars(const Gate& gate, int64_t key_dim, Token* token) {
  token->decay = std::exp(gate.log_decay);
  token->beta = gate.beta;
  token->k_scale = 1.0f / std::sqrt(Dot<Set>(token->k, token->k, key_dim) + 1e-6f);
  if (token->q != nullptr) {
    token->q_scale = 1.0f / std::sqrt((Dot<Set>(token->q, token->q, key_dim) + 1e-6f) * static_cast<float>(key_dim));
    token->kq = Dot<Set>(token->k, token->q, key_dim);
  }
}

// A block of S on its way through the tokens of one sequence.
//
// Sᵀk and Sᵀq of a token need one pass over S each, and S ← e^g S + k δᵀ another. All three are one pass here: the update of a token
// is left pending and made by the pass of the next token, and o = (e^g S + k δᵀ)ᵀ q = e^g (Sᵀq) + δ (k·q).
template <class Set>
class Block {
 public:
  // Columns [column, column + kBlock) of a [key_dim, value_dim] matrix, as far as there are so many.
  BEBOP_SIMD_INLINE Block(int64_t key_dim, int64_t value_dim, int64_t column)
      : key_dim_(key_dim), value_dim_(value_dim), column_(column), count_(std::min<int64_t>(kBlock, value_dim - column)) {}

  // The state before the first token; null: zeros. The first Step or Finish reads it.
  BEBOP_SIMD_INLINE void Start(const float* matrix) {
    source_ = matrix;
    pending_k_ = nullptr;
  }

  // One token. If `commit` is not null, S before this token is written there.
  BEBOP_SIMD_INLINE void Step(const Token& token, float* commit) {
    const Columns<Set> zero = {simd::Zero<Set>(), simd::Zero<Set>()};
    Columns<Set> sk = zero, sq = zero;
    if (token.q == nullptr) {
      Pass<true, false>(token.k, nullptr, nullptr, &sk, &sq);
    } else {
      Pass<true, true>(token.k, token.q, commit, &sk, &sq);
    }
    const Floats<Set> read = simd::Broadcast<Set>(token.decay * token.k_scale), beta = simd::Broadcast<Set>(token.beta);
    const Floats<Set> k_scale = simd::Broadcast<Set>(token.k_scale);  // k's norm goes with delta
    const Columns<Set> v = LoadColumns(token.v + column_, count_);
    pending_delta_ = {beta * (v.low - sk.low * read) * k_scale, beta * (v.high - sk.high * read) * k_scale};
    pending_decay_ = token.decay;
    pending_k_ = token.k;
    if (token.q != nullptr) {
      const Floats<Set> decay = simd::Broadcast<Set>(token.decay), kq = simd::Broadcast<Set>(token.kq);
      const Floats<Set> q_scale = simd::Broadcast<Set>(token.q_scale);
      StoreColumns({simd::MulAdd(pending_delta_.low, kq, sq.low * decay) * q_scale,
                    simd::MulAdd(pending_delta_.high, kq, sq.high * decay) * q_scale},
                   token.out + column_, count_);
    }
  }

  // Writes S after the last token to `matrix`.
  BEBOP_SIMD_INLINE void Finish(float* matrix) {
    Columns<Set> unused = {simd::Zero<Set>(), simd::Zero<Set>()};
    Pass<false, false>(nullptr, nullptr, matrix, &unused, &unused);
  }

 private:
  // Reads S once: makes the pending update, commits, and adds up Sᵀk and Sᵀq over the rows in order.
  template <bool with_k, bool with_q>
  BEBOP_SIMD_INLINE void Pass(const float* k, const float* q, float* commit, Columns<Set>* sk, Columns<Set>* sq) {
    // Locals, as the compiler must assume that the stores below change members.
    const int64_t key_dim = key_dim_, stride = value_dim_, count = count_;
    const float* const pending_k = pending_k_;
    const float* const source = source_ != nullptr ? source_ + column_ : nullptr;
    float* const destination = commit != nullptr ? commit + column_ : nullptr;
    const Floats<Set> decay = simd::Broadcast<Set>(pending_decay_);
    const Columns<Set> delta = pending_delta_;
    Columns<Set> k_sum = *sk, q_sum = *sq;
    for (int64_t i = 0; i < key_dim; ++i) {
      Columns<Set> s;
      if (pending_k != nullptr) {
        const Floats<Set> ki = simd::Broadcast<Set>(pending_k[i]);
        s.low = simd::MulAdd(ki, delta.low, decay * simd::Load<Set>(matrix_[i]));
        s.high = simd::MulAdd(ki, delta.high, decay * simd::Load<Set>(matrix_[i] + kWidth));
      } else if (source != nullptr) {
        s = LoadColumns(source + i * stride, count);
      } else {
        s = {simd::Zero<Set>(), simd::Zero<Set>()};
      }
      simd::Store(s.low, matrix_[i]);
      simd::Store(s.high, matrix_[i] + kWidth);
      if (destination != nullptr) StoreColumns(s, destination + i * stride, count);
      if constexpr (with_k) {
        const Floats<Set> ki = simd::Broadcast<Set>(k[i]);
        k_sum = {simd::MulAdd(ki, s.low, k_sum.low), simd::MulAdd(ki, s.high, k_sum.high)};
      }
      if constexpr (with_q) {
        const Floats<Set> qi = simd::Broadcast<Set>(q[i]);
        q_sum = {simd::MulAdd(qi, s.low, q_sum.low), simd::MulAdd(qi, s.high, q_sum.high)};
      }
    }
    *sk = k_sum;
    *sq = q_sum;
  }

  BEBOP_SIMD_INLINE static Columns<Set> LoadColumns(const float* row, int64_t count) {
    if (count == kBlock) return {simd::Load<Set>(row), simd::Load<Set>(row + kWidth)};
    float padded[kBlock] = {};
    std::copy_n(row, count, padded);
    return {simd::Load<Set>(padded), simd::Load<Set>(padded + kWidth)};
  }
  BEBOP_SIMD_INLINE static void StoreColumns(const Columns<Set>& value, float* row, int64_t count) {
    if (count == kBlock) {
      simd::Store(value.low, row);
      simd::Store(value.high, row + kWidth);
      return;
    }
    float padded[kBlock];
    simd::Store(value.low, padded);
    simd::Store(value.high, padded + kWidth);
    std::copy_n(padded, count, row);
  }

  const int64_t key_dim_, value_dim_, column_, count_;
  const float* source_ = nullptr;
  const float* pending_k_ = nullptr;  // of the last token, whose update is pending; null before the first
  float pending_decay_ = 0.0f;
  Columns<Set> pending_delta_ = {simd::Zero<Set>(), simd::Zero<Set>()};
  alignas(64) float matrix_[kMaxKeyDim][kBlock];
};

// Sequences [first_sequence, last_sequence) of a call, each value head cut into `slices` ranges of columns.
struct Wave {
  const DeltaRuleArgs& args;
  int32_t first_sequence;
  int32_t last_sequence;
  int32_t slices;
};

// Token `index` of a sequence for value head `head`: the replayed rows of the window, then the rows of this pass.
template <class Set>
BEBOP_SIMD_INLINE Token MakeToken(const DeltaRuleArgs& args, const Layout& layout, const SequenceRows& sequence, int64_t head,
                                  int64_t index) {
  const int64_t key_head = head / (layout.state.num_value_heads / layout.state.num_key_heads);
  Token token = {};
  Gate gate;
  if (index < sequence.num_replay_rows) {
    const float* kept = layout.WindowGate(sequence.state_src, index, head);
    gate = {kept[0], kept[1]};
    token.k = layout.WindowK(sequence.state_src, index, key_head);
    token.v = layout.WindowV(sequence.state_src, index, head);
  } else {
    const int64_t row = sequence.first_row + index - sequence.num_replay_rows;
    const float* qkv = args.qkv.Row<float>(row);
    gate = GateOf(args, row, head);
    token.q = qkv + key_head * layout.key_dim;
    token.k = qkv + layout.key_width + key_head * layout.key_dim;
    token.v = qkv + 2 * layout.key_width + head * layout.value_dim;
    token.out = args.out.Row<float>(row) + head * layout.value_dim;
  }
  SetScalars<Set>(gate, layout.key_dim, &token);
  return token;
}

// All tokens of one sequence on blocks [first_block, last_block) of the columns of S of value head `head`; writes S at the last known
// row to slot state_dst. Tokens go in runs of at most kMaxTokens; between runs S lies in slot state_dst. Draft rows are in one run,
// the last, as S with them is stored nowhere.
template <class Set>
BEBOP_SIMD_INLINE void RunSequence(const DeltaRuleArgs& args, const Layout& layout, const SequenceRows& sequence, int64_t head,
                                   int64_t first_block, int64_t last_block) {
  const int64_t num_tokens = sequence.num_replay_rows + sequence.num_rows;
  const int64_t num_committed = sequence.num_replay_rows + sequence.num_known_rows;
  float* const destination = layout.Matrix(sequence.state_dst, head);
  const float* source = sequence.state_src >= 0 ? layout.Matrix(sequence.state_src, head) : nullptr;
  Token tokens[kMaxTokens];
  for (int64_t first = 0; first < num_tokens;) {
    const int64_t left = num_tokens - first;
    const int64_t count = left <= kMaxTokens ? left : std::min<int64_t>(kMaxTokens, num_committed - first);
    for (int64_t i = 0; i < count; ++i) tokens[i] = MakeToken<Set>(args, layout, sequence, head, first + i);
    for (int64_t index = first_block; index < last_block; ++index) {
      Block<Set> block(layout.key_dim, layout.value_dim, index * kBlock);
      block.Start(source);
      for (int64_t i = 0; i < count; ++i) block.Step(tokens[i], first + i == num_committed ? destination : nullptr);
      if (first + count <= num_committed) block.Finish(destination);
    }
    source = destination;
    first += count;
  }
}

// An item is a range of columns of a value head, with all sequences of the wave in order.
template <class Set>
BEBOP_SIMD_INLINE void RunColumns(const Wave& wave, int64_t begin, int64_t end) {
  const Layout layout(wave.args.state);
  const int64_t num_blocks = (layout.value_dim + kBlock - 1) / kBlock;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item / wave.slices, slice = item % wave.slices;
    for (int32_t s = wave.first_sequence; s < wave.last_sequence; ++s) {
      RunSequence<Set>(wave.args, layout, wave.args.batch.sequences[s], head, num_blocks * slice / wave.slices,
                       num_blocks * (slice + 1) / wave.slices);
    }
  }
}
BEBOP_SIMD_RANGE_KERNEL(RunColumns, Wave)

// Keeps the draft rows of key heads [begin, end) and their value heads in the windows, sequences in order. Apart from RunColumns, since
// the columns and heads that share a window row replay from it in parallel, and src and dst may be one slot.
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

// The sequences from `first` on that can run before any of their windows is written: a sequence that replays a window which an earlier
// one of the call writes begins the next wave. (In decoding all sequences are one wave.)
int32_t EndOfWave(const RaggedBatch& batch, int32_t first) {
  for (int32_t s = first + 1; s < batch.num_sequences; ++s) {
    if (batch.sequences[s].num_replay_rows == 0) continue;
    for (int32_t writer = first; writer < s; ++writer) {
      if (batch.sequences[writer].state_dst == batch.sequences[s].state_src && NumDraftRows(batch.sequences[writer]) > 0) return s;
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
  // Whole heads share the scalars of a token; columns are split only as far as the threads need it. A few items a thread even out.
  const int32_t num_blocks = (state.value_head_dim + kBlock - 1) / kBlock;
  const int32_t slices = std::clamp(2 * pool.num_threads() / state.num_value_heads, 1, num_blocks);
  const auto run_columns = RunColumnsFor(set);
  for (int32_t first = 0; first < args.batch.num_sequences;) {
    const Wave wave{args, first, EndOfWave(args.batch, first), slices};
    pool.ParallelFor(int64_t{state.num_value_heads} * slices, 1, [&](int64_t begin, int64_t end) { run_columns(wave, begin, end); });
    if (has_drafts) pool.ParallelFor(state.num_key_heads, 4, [&](int64_t begin, int64_t end) { KeepWindows(wave, begin, end); });
    first = wave.last_sequence;
  }
}

}  // namespace bebop::cpu
