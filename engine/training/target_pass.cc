// SPDX-License-Identifier: Apache-2.0
#include "engine/training/target_pass.h"

#include <algorithm>
#include <vector>

#include "engine/base/status_macros.h"

namespace bebop {
namespace {

constexpr int32_t kPageTokens = 16;
// Documents of one pass: each has a state slot of its own, which for a large model is tens of MB.
constexpr int32_t kSlots = 16;

ModelStateOptions StateOptions(DType weight_dtype, DType activation_dtype, int64_t max_rows) {
  return {.kv_dtype = weight_dtype,
          .num_pages = static_cast<int32_t>(max_rows / kPageTokens + kSlots),  // every document ends in a page of its own
          .page_tokens = kPageTokens,
          .num_slots = static_cast<int32_t>(std::min<int64_t>(kSlots, max_rows)),
          .window = 0,
          .input_dtype = activation_dtype};
}

// The target alone: no pages for its MTP layer.
ModelConfig WithoutMtp(ModelConfig config) {
  config.num_mtp_layers = 0;
  return config;
}

double Flops(const PackedMatrix& matrix) { return 2.0 * static_cast<double>(matrix.rows) * static_cast<double>(matrix.cols); }

}  // namespace

absl::StatusOr<std::unique_ptr<TargetPass>> TargetPass::Create(const ModelConfig& config, const ModelWeights* weights,
                                                               Backend* backend, int64_t max_rows) {
  const ModelConfig target = WithoutMtp(config);
  const DType dtype = weights->embedding.dtype, activation_dtype = backend->activation_dtype(dtype);
  const ModelStateOptions options = StateOptions(dtype, activation_dtype, max_rows);
  std::unique_ptr<TargetPass> pass(new TargetPass());
  BEBOP_ASSIGN_OR_RETURN(
      pass->model_, Model::Create(target, static_cast<int32_t>(max_rows), activation_dtype, backend->ops(), backend->memory()));
  pass->model_->SetWeights(weights);
  BEBOP_ASSIGN_OR_RETURN(pass->storage_, ModelStateStorage::Create(target, options, backend->memory()));
  BEBOP_ASSIGN_OR_RETURN(pass->device_batch_, DeviceBatch::Create(max_rows, kSlots, options.num_pages, backend->memory()));
  pass->builder_.Reserve(max_rows, kSlots, options.num_pages);
  for (const LayerWeights& layer : weights->layers) {
    const PackedMatrix& in = layer.linear ? layer.linear->in : layer.full->qkv;
    const PackedMatrix& out = layer.linear ? layer.linear->out : layer.full->out;
    pass->row_flops_ += Flops(in) + Flops(out) + Flops(layer.mlp.gate_up) + Flops(layer.mlp.down);
  }
  return pass;
}

int64_t TargetPass::Bytes(const ModelConfig& config, DType weight_dtype, DType activation_dtype, int64_t max_rows) {
  const ModelConfig target = WithoutMtp(config);
  const ModelStateOptions options = StateOptions(weight_dtype, activation_dtype, max_rows);
  return Model::ActivationBytes(target, static_cast<int32_t>(max_rows), activation_dtype) +
         options.num_pages * PageBytes(target, options) + options.num_slots * SlotBytes(target, options);
}

void TargetPass::Run(std::span<const TrainingDocument* const> documents, const TensorView& hidden) {
  int64_t row = 0;
  for (size_t first = 0; first < documents.size(); first += kSlots) {
    const auto group = documents.subspan(first, std::min<size_t>(kSlots, documents.size() - first));
    int64_t rows = 0;
    for (const TrainingDocument* document : group) rows += static_cast<int64_t>(document->token_ids.size());
    RunGroup(group, hidden.Rows(row, rows));
    row += rows;
  }
}

void TargetPass::RunGroup(std::span<const TrainingDocument* const> documents, const TensorView& hidden) {
  builder_.Clear();
  std::vector<int32_t> pages;
  int32_t next_page = 0, slot = 0;
  for (const TrainingDocument* document : documents) {
    const auto rows = static_cast<int32_t>(document->token_ids.size());
    pages.clear();
    for (int32_t position = 0; position < rows; position += kPageTokens) pages.push_back(next_page++);
    builder_.AddSequence(0, pages);
    for (const uint32_t token : document->token_ids) builder_.AddRow(token);
    builder_.last_sequence().num_prefill_rows = rows;
    builder_.last_sequence().state_dst = slot++;  // state_src stays -1: a document starts from zero
  }
  device_batch_->Upload(builder_);
  model_->ForwardTarget(device_batch_->tokens(), device_batch_->View(), storage_->state(), hidden);
}

}  // namespace bebop
