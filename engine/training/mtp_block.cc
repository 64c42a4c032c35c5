// SPDX-License-Identifier: Apache-2.0
#include "engine/training/mtp_block.h"

#include <algorithm>
#include <string>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "kernels/common/check.h"

namespace bebop {
namespace {

constexpr int64_t kAlignment = 256;  // of every array: what DeviceMemory gives

// The column ranges of a fused projection.
struct Projected {
  TensorView q_gate, k, v;
};
Projected Split(const TensorView& projected, const MtpLayout& layout) {
  return {projected.Columns(0, 2 * layout.query_width), projected.Columns(2 * layout.query_width, layout.kv_width),
          projected.Columns(2 * layout.query_width + layout.kv_width, layout.kv_width)};
}

}  // namespace

MtpBlock::MtpBlock(const ModelConfig& config, int64_t max_rows, int32_t max_steps, TrainingOps* ops)
    : config_(config),
      layout_(config),
      max_rows_(max_rows),
      max_steps_(max_steps),
      ops_(*ops),
      arrays_(config, max_rows, max_steps, *ops, /*base=*/nullptr) {}

MtpBlock::Arrays::Arrays(const ModelConfig& config, int64_t max_rows, int32_t max_steps, const TrainingOps& ops, char* base)
    : saved(static_cast<size_t>(max_steps)) {
  const MtpLayout layout(config);
  const auto take = [&](int64_t size) {
    char* const place = base == nullptr ? nullptr : base + bytes;
    bytes += RoundUp(size, kAlignment);
    return place;
  };
  constexpr auto kFloatBytes = static_cast<int64_t>(sizeof(float));
  const auto matrix = [&](int64_t cols) {
    return FloatMatrix(reinterpret_cast<float*>(take(max_rows * cols * kFloatBytes)), max_rows, cols);
  };
  const int64_t hidden = layout.hidden, query = layout.query_width, kv = layout.kv_width;
  for (Saved& step : saved) {
    for (TensorView* view : {&step.fused, &step.attended_stream, &step.mlp_stream, &step.hidden}) *view = matrix(hidden);
    step.projected = matrix(layout.qkv_width());
    for (TensorView* view : {&step.query, &step.attended, &step.gated}) *view = matrix(query);
    for (TensorView* view : {&step.key, &step.dkey, &step.dvalue}) *view = matrix(kv);
    step.log_sum = matrix(config.num_attention_heads);
    step.gate_up = matrix(2 * layout.ffn);
  }
  pair = matrix(2 * hidden);
  embedded = matrix(hidden);
  stream = matrix(hidden);
  wide = matrix(std::max(layout.ffn, query));
  const auto pack = [&](Packed& packed, int64_t rows, int64_t cols) {
    packed.forward_data = take(ops.PackedMatrixBytes(rows, cols));
    if (!ops.reads_columns()) packed.transposed_data = take(ops.PackedMatrixBytes(cols, rows));
  };
  pack(fc, hidden, 2 * hidden);
  pack(qkv, layout.qkv_width(), hidden);
  pack(out, hidden, query);
  pack(gate_up, 2 * layout.ffn, hidden);
  pack(down, hidden, layout.ffn);
  row_sequence = reinterpret_cast<int32_t*>(take(max_rows * static_cast<int64_t>(sizeof(int32_t))));
  sequence = reinterpret_cast<SequenceRows*>(take(sizeof(SequenceRows)));
}

int64_t MtpBlock::OperandValues(const ModelConfig& config, int64_t max_rows) {
  const MtpLayout layout(config);
  return max_rows * RoundUp(std::max({2 * layout.hidden, 2 * layout.ffn, layout.qkv_width()}), kPanelCols);
}

int64_t MtpBlock::Bytes(const ModelConfig& config, int64_t max_rows, int32_t max_steps, const TrainingOps& ops) {
  return Arrays(config, max_rows, max_steps, ops, /*base=*/nullptr).bytes;
}

absl::StatusOr<std::unique_ptr<MtpBlock>> MtpBlock::Create(const ModelConfig& config, int64_t max_rows, int32_t max_steps,
                                                           DeviceMemory* memory, TrainingOps* ops) {
  BEBOP_CHECK(max_rows > 0 && max_steps >= 1 && max_steps <= kMaxSteps);
  if (config.head_dim % 16 != 0) {
    return absl::UnimplementedError(absl::StrCat("training: head_dim must be a multiple of 16, got ", config.head_dim));
  }
  std::unique_ptr<MtpBlock> block(new MtpBlock(config, max_rows, max_steps, ops));
  BEBOP_RETURN_IF_ERROR(ops->ReserveOperands(OperandValues(config, max_rows)));
  BEBOP_ASSIGN_OR_RETURN(block->storage_, memory->Allocate(block->arrays_.bytes, "training activations"));
  block->arrays_ = Arrays(config, max_rows, max_steps, *ops, static_cast<char*>(block->storage_.get()));
  const SequenceRows sequence;
  memory->CopyIn(block->arrays_.sequence, &sequence, sizeof(sequence));
  return block;
}

void MtpBlock::SetParameters(const float* flat) {
  parameters_ = flat;
  auto* const weights = const_cast<float*>(flat);  // a view has no const form; packing only reads
  const auto pack = [&](const TensorView& matrix, Packed& packed) {
    packed.forward = ops_.Pack(matrix, packed.forward_data);
    packed.transposed = ops_.reads_columns() ? InColumns(packed.forward) : ops_.PackTransposed(matrix, packed.transposed_data);
  };
  pack(layout_.Fc(weights), arrays_.fc);
  pack(layout_.Qkv(weights), arrays_.qkv);
  pack(layout_.Out(weights), arrays_.out);
  pack(layout_.GateUp(weights), arrays_.gate_up);
  pack(layout_.Down(weights), arrays_.down);
}

MtpBlock::Saved MtpBlock::RowsOf(int32_t step, int64_t rows) const {
  Saved out = arrays_.saved[static_cast<size_t>(step - 1)];
  for (TensorView* view : {&out.fused, &out.attended_stream, &out.mlp_stream, &out.hidden, &out.projected, &out.query, &out.key,
                           &out.attended, &out.gated, &out.log_sum, &out.gate_up, &out.dkey, &out.dvalue}) {
    *view = view->Rows(0, rows);
  }
  return out;
}

void MtpBlock::Norm(const TensorView& x, int64_t weight, const TensorView& out) {
  ops_.RmsNorm({.x = x, .residual = {}, .weight = parameters_ + weight, .eps = config_.rms_norm_eps, .out = out});
}

void MtpBlock::NormBackward(const TensorView& x, int64_t weight, const TensorView& dy, const TensorView& dx, bool accumulate,
                            float* gradients) {
  ops_.RmsNormBackward({.x = x,
                        .weight = parameters_ + weight,
                        .eps = config_.rms_norm_eps,
                        .dy = dy,
                        .dx = dx,
                        .accumulate_dx = accumulate,
                        .dweight = gradients + weight});
}

void MtpBlock::MatMul(const TensorView& x, const PackedMatrix& w, const TensorView& y) {
  ops_.Linear({.x = x, .w = w, .y = y});
}

void MtpBlock::WeightGradient(const TensorView& x, const TensorView& dy, const TensorView& dw) {
  ops_.LinearBackwardWeight({.x = x, .dy = dy, .accumulate = true, .dw = dw});
}

void MtpBlock::MakeInput(const MtpBatch& batch, int32_t step, const TensorView& embedded, const TensorView& pair) {
  ops_.Embedding({.token_ids = batch.token_ids + (step - 1) * batch.num_rows, .table = batch.embedding, .out = embedded});
  Norm(embedded, layout_.pre_fc_norm_embedding, pair.Columns(0, layout_.hidden));
  Norm(step == 1 ? batch.target_hidden : RowsOf(step - 1, batch.num_rows).hidden, layout_.pre_fc_norm_hidden,
       pair.Columns(layout_.hidden, layout_.hidden));
}

TensorView MtpBlock::hidden(int32_t step) const { return arrays_.saved[static_cast<size_t>(step - 1)].hidden; }

void MtpBlock::ForwardStep(const MtpBatch& batch, int32_t step) {
  const int64_t rows = batch.num_rows;
  BEBOP_CHECK(parameters_ != nullptr && step >= 1 && step <= max_steps_ && rows <= max_rows_);
  const Saved saved = RowsOf(step, rows);
  const Projected projected = Split(saved.projected, layout_);
  const TensorView pair = arrays_.pair.Rows(0, rows), normed = arrays_.embedded.Rows(0, rows);
  const TensorView update = arrays_.stream.Rows(0, rows);

  MakeInput(batch, step, normed, pair);
  MatMul(pair, arrays_.fc.forward, saved.fused);

  Norm(saved.fused, layout_.input_norm, normed);
  MatMul(normed, arrays_.qkv.forward, saved.projected);
  // Keys and values go to dense matrices, so which sequence the rows belong to does not matter.
  ops_.QkNormRope({.batch = {.num_sequences = 1,
                             .num_rows = static_cast<int32_t>(rows),
                             .sequences = arrays_.sequence,
                             .row_sequence = arrays_.row_sequence,
                             .row_position = batch.row_position + (step - 1) * rows},
                   .q_gate = projected.q_gate,
                   .k = projected.k,
                   .v = projected.v,
                   .q_norm = parameters_ + layout_.q_norm,
                   .k_norm = parameters_ + layout_.k_norm,
                   .eps = config_.rms_norm_eps,
                   .num_q_heads = config_.num_attention_heads,
                   .num_kv_heads = config_.num_key_value_heads,
                   .head_dim = config_.head_dim,
                   .rotary_dim = config_.rotary_dim,
                   .rope_theta = config_.rope_theta,
                   .q_out = saved.query,
                   .pages = {},
                   .dense_k = saved.key,
                   .dense_v = projected.v});  // stays where it is
  TensorView chain_k[kMaxSteps], chain_v[kMaxSteps];
  const Saved first = RowsOf(1, rows);
  for (int32_t s = 2; s <= step; ++s) {
    const Saved entry = RowsOf(s, rows);
    chain_k[s - 2] = entry.key;
    chain_v[s - 2] = Split(entry.projected, layout_).v;
  }
  ops_.ChainAttention({.documents = batch.documents,
                       .num_documents = batch.num_documents,
                       .q = saved.query,
                       .q_gate = projected.q_gate,
                       .base_k = first.key,
                       .base_v = Split(first.projected, layout_).v,
                       .num_chain = step - 1,
                       .chain_k = chain_k,
                       .chain_v = chain_v,
                       .num_q_heads = config_.num_attention_heads,
                       .num_kv_heads = config_.num_key_value_heads,
                       .head_dim = config_.head_dim,
                       .attended = saved.attended,
                       .log_sum = saved.log_sum,
                       .out = saved.gated});
  // The sum of stream and update happens inside the norm that reads it, in place: in a copy here, as the backward wants both
  // streams.
  MatMul(saved.gated, arrays_.out.forward, update);
  ops_.Copy(saved.fused, saved.attended_stream);
  ops_.RmsNorm({.x = saved.attended_stream,
                .residual = update,
                .weight = parameters_ + layout_.post_attention_norm,
                .eps = config_.rms_norm_eps,
                .out = normed});
  MatMul(normed, arrays_.gate_up.forward, saved.gate_up);
  const TensorView activated = arrays_.wide.Rows(0, rows).Columns(0, layout_.ffn);
  ops_.SwiGlu(
      {.gate = saved.gate_up.Columns(0, layout_.ffn), .up = saved.gate_up.Columns(layout_.ffn, layout_.ffn), .out = activated});
  MatMul(activated, arrays_.down.forward, update);
  ops_.Copy(saved.attended_stream, saved.mlp_stream);
  ops_.RmsNorm({.x = saved.mlp_stream,
                .residual = update,
                .weight = parameters_ + layout_.norm,
                .eps = config_.rms_norm_eps,
                .out = saved.hidden});
}

void MtpBlock::Backward(const MtpBatch& batch, int32_t num_steps, const TensorView* dhidden, float* gradients) {
  const int64_t rows = batch.num_rows, ffn = layout_.ffn, hidden = layout_.hidden;
  BEBOP_CHECK(num_steps >= 1 && num_steps <= max_steps_ && rows <= max_rows_);
  TensorView chain_k[kMaxSteps], chain_v[kMaxSteps], dchain_k[kMaxSteps], dchain_v[kMaxSteps];
  for (int32_t step = 1; step <= num_steps; ++step) {
    const Saved saved = RowsOf(step, rows);
    ops_.Clear(saved.dkey);
    ops_.Clear(saved.dvalue);
    if (step == 1) continue;
    chain_k[step - 2] = saved.key;
    chain_v[step - 2] = Split(saved.projected, layout_).v;
    dchain_k[step - 2] = saved.dkey;
    dchain_v[step - 2] = saved.dvalue;
  }
  const Saved first = RowsOf(1, rows);
  const TensorView pair = arrays_.pair.Rows(0, rows), normed = arrays_.embedded.Rows(0, rows);
  const TensorView dstream = arrays_.stream.Rows(0, rows);
  const TensorView dnormed = FloatMatrix(static_cast<float*>(arrays_.pair.data), rows, hidden);  // while the pair is not needed

  // From the last step to the first: what a step adds to the entries of earlier ones, and to the hidden state before it, is
  // complete when its turn comes.
  for (int32_t step = num_steps; step >= 1; --step) {
    const Saved saved = RowsOf(step, rows);
    const Projected projected = Split(saved.projected, layout_);
    NormBackward(saved.mlp_stream, layout_.norm, dhidden[step - 1], dstream, /*accumulate=*/false, gradients);

    const TensorView activated = arrays_.wide.Rows(0, rows).Columns(0, ffn);
    const TensorView gate = saved.gate_up.Columns(0, ffn), up = saved.gate_up.Columns(ffn, ffn);
    MatMul(dstream, arrays_.down.transposed, activated);
    ops_.SwiGluBackward({.gate = gate, .up = up, .dout = activated, .dgate = gate, .dup = up, .out = activated});
    WeightGradient(activated, dstream, layout_.Down(gradients));
    Norm(saved.attended_stream, layout_.post_attention_norm, normed);
    WeightGradient(normed, saved.gate_up, layout_.GateUp(gradients));
    MatMul(saved.gate_up, arrays_.gate_up.transposed, dnormed);
    NormBackward(saved.attended_stream, layout_.post_attention_norm, dnormed, dstream, /*accumulate=*/true, gradients);

    const TensorView dgated = arrays_.wide.Rows(0, rows).Columns(0, layout_.query_width);
    WeightGradient(saved.gated, dstream, layout_.Out(gradients));
    MatMul(dstream, arrays_.out.transposed, dgated);
    ops_.ChainAttentionBackward({.forward = {.documents = batch.documents,
                                             .num_documents = batch.num_documents,
                                             .q = saved.query,
                                             .q_gate = projected.q_gate,
                                             .base_k = first.key,
                                             .base_v = Split(first.projected, layout_).v,
                                             .num_chain = step - 1,
                                             .chain_k = chain_k,
                                             .chain_v = chain_v,
                                             .num_q_heads = config_.num_attention_heads,
                                             .num_kv_heads = config_.num_key_value_heads,
                                             .head_dim = config_.head_dim,
                                             .attended = saved.attended,
                                             .log_sum = saved.log_sum,
                                             .out = saved.gated},
                                 .dout = dgated,
                                 .dq = saved.gated,
                                 .dq_gate = projected.q_gate,
                                 .dbase_k = first.dkey,
                                 .dbase_v = first.dvalue,
                                 .dchain_k = dchain_k,
                                 .dchain_v = dchain_v});
    ops_.QkNormRopeBackward({.row_position = batch.row_position + (step - 1) * rows,
                             .q_gate = projected.q_gate,
                             .k = projected.k,
                             .q_norm = parameters_ + layout_.q_norm,
                             .k_norm = parameters_ + layout_.k_norm,
                             .eps = config_.rms_norm_eps,
                             .num_q_heads = config_.num_attention_heads,
                             .num_kv_heads = config_.num_key_value_heads,
                             .head_dim = config_.head_dim,
                             .rotary_dim = config_.rotary_dim,
                             .rope_theta = config_.rope_theta,
                             .dq = saved.gated,
                             .dk = saved.dkey,
                             .dq_gate = projected.q_gate,
                             .dk_out = projected.k,
                             .dq_norm = gradients + layout_.q_norm,
                             .dk_norm = gradients + layout_.k_norm});
    ops_.Copy(saved.dvalue, projected.v);
    Norm(saved.fused, layout_.input_norm, normed);
    WeightGradient(normed, saved.projected, layout_.Qkv(gradients));
    MatMul(saved.projected, arrays_.qkv.transposed, dnormed);
    NormBackward(saved.fused, layout_.input_norm, dnormed, dstream, /*accumulate=*/true, gradients);

    MakeInput(batch, step, normed, pair);
    WeightGradient(pair, dstream, layout_.Fc(gradients));
    MatMul(dstream, arrays_.fc.transposed, pair);
    NormBackward(normed, layout_.pre_fc_norm_embedding, pair.Columns(0, hidden), {}, /*accumulate=*/false, gradients);
    NormBackward(step == 1 ? batch.target_hidden : RowsOf(step - 1, rows).hidden, layout_.pre_fc_norm_hidden,
                 pair.Columns(hidden, hidden), step == 1 ? TensorView{} : dhidden[step - 2], /*accumulate=*/true, gradients);
  }
}

}  // namespace bebop
