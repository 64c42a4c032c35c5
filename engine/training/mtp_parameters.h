// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "engine/config/model_config.h"
#include "kernels/common/tensor_view.h"

namespace bebop {

// A trained tensor: its name in the checkpoint and where it lies in a flat array of floats. Vectors have rows = 1.
struct MtpTensor {
  std::string name;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t offset = 0;
  bool is_vector = false;

  int64_t size() const { return rows * cols; }
};

// How the MTP layer's parameters lie in one flat array, the same for weights, gradients and the optimizer's moments: so the
// optimizer, the norm of the gradient and a checkpoint know nothing of the network. Matrices are row-major [out, in]; q|k|v and
// gate|up are neighbours and thereby also one matrix each. Groups start at multiples of 16 floats; `total` floats, padding
// included, which stays zero.
struct MtpLayout {
  explicit MtpLayout(const ModelConfig& config);

  int64_t hidden = 0, ffn = 0, query_width = 0, kv_width = 0, head_dim = 0;
  int64_t pre_fc_norm_embedding = 0, pre_fc_norm_hidden = 0, fc = 0, input_norm = 0, qkv = 0, q_norm = 0, k_norm = 0, out = 0,
          post_attention_norm = 0, gate_up = 0, down = 0, norm = 0, total = 0;
  std::vector<MtpTensor> tensors;  // the 15 of the MTP layer, by offset

  int64_t qkv_width() const { return 2 * query_width + 2 * kv_width; }
  TensorView Fc(float* flat) const { return FloatMatrix(flat + fc, hidden, 2 * hidden); }
  TensorView Qkv(float* flat) const { return FloatMatrix(flat + qkv, qkv_width(), hidden); }
  TensorView Out(float* flat) const { return FloatMatrix(flat + out, hidden, query_width); }
  TensorView GateUp(float* flat) const { return FloatMatrix(flat + gate_up, 2 * ffn, hidden); }
  TensorView Down(float* flat) const { return FloatMatrix(flat + down, hidden, ffn); }
};

}  // namespace bebop
