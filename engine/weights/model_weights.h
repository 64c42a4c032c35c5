// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "engine/config/model_config.h"
#include "engine/weights/weight_digest.h"
#include "kernels/linear/packed_matrix.h"

namespace bebop {

// Where the segments of a fused projection start, in rows of the fused matrix (= columns of its output). Each start is a multiple
// of kPanelRows; the gap between a segment's end and the next start is zero padding.
struct LinearAttentionSegments {
  int64_t qkv = 0, z = 0, b = 0, a = 0, total = 0;
};
struct FullAttentionSegments {
  int64_t q_gate = 0, k = 0, v = 0, total = 0;
};
struct GateUpSegments {
  int64_t gate = 0, up = 0, total = 0;
};
LinearAttentionSegments LinearSegments(const ModelConfig& config);
FullAttentionSegments FullSegments(const ModelConfig& config);
GateUpSegments MlpSegments(const ModelConfig& config);

// Gated DeltaNet block.
struct LinearAttentionWeights {
  PackedMatrix in;                  // [LinearSegments().total, H]: in_proj_qkv | in_proj_z | in_proj_b | in_proj_a
  const float* conv = nullptr;      // [C, K] conv1d.weight
  const float* a_log = nullptr;     // [Hv] A_log
  const float* dt_bias = nullptr;   // [Hv]
  const float* norm = nullptr;      // [dv] plain weight
  PackedMatrix out;                 // [H, Hv*dv] out_proj
};

// Gated full attention.
struct FullAttentionWeights {
  PackedMatrix qkv;                // [FullSegments().total, H]: q_proj (query and gate interleaved per head) | k_proj | v_proj
  const float* q_norm = nullptr;   // [head_dim] zero-centred
  const float* k_norm = nullptr;   // [head_dim] zero-centred
  PackedMatrix out;                // [H, nq*head_dim] o_proj
};

struct MlpWeights {
  PackedMatrix gate_up;  // [MlpSegments().total, H]
  PackedMatrix down;     // [H, F]
};

// One decoder layer; exactly one of `linear` and `full` is set.
struct LayerWeights {
  const float* input_norm = nullptr;           // [H]
  const float* post_attention_norm = nullptr;  // [H]
  std::optional<LinearAttentionWeights> linear;
  std::optional<FullAttentionWeights> full;
  MlpWeights mlp;
};

// The MTP layer (model.md section 4).
struct MtpWeights {
  const float* pre_fc_norm_embedding = nullptr;  // [H]
  const float* pre_fc_norm_hidden = nullptr;     // [H]
  PackedMatrix fc;                               // [H, 2H]: columns of the embedding half first
  LayerWeights layer;                            // a full-attention layer
  const float* norm = nullptr;                   // [H]
};

// All weights of one version in the memory and layout that the kernels read: views into `storage`, which they share a lifetime with.
// Immutable after loading; safe to read from any thread.
struct ModelWeights {
  PackedMatrix embedding;  // [V, H]
  PackedMatrix lm_head;    // [V, H]; the same memory as `embedding` when tied
  std::vector<LayerWeights> layers;
  const float* final_norm = nullptr;  // [H]
  std::optional<MtpWeights> mtp;
  std::shared_ptr<const void> storage;  // owns every byte above
  int64_t storage_bytes = 0;
  int64_t layer_bytes = 0;    // bytes one target pass streams, without lm_head
  int64_t lm_head_bytes = 0;  // bytes one lm_head product streams
  int64_t mtp_bytes = 0;      // bytes one MTP step streams, without lm_head
  WeightVersion version;      // what these weights are
};

}  // namespace bebop
