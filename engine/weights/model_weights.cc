// SPDX-License-Identifier: Apache-2.0
#include "engine/weights/model_weights.h"

namespace bebop {
namespace {

// The start of the next segment after rows [begin, begin + rows).
int64_t NextSegment(int64_t begin, int64_t rows) { return RoundUp(begin + rows, kPanelRows); }

}  // namespace

LinearAttentionSegments LinearSegments(const ModelConfig& config) {
  LinearAttentionSegments segments;
  segments.z = NextSegment(segments.qkv, config.conv_channels());
  segments.b = NextSegment(segments.z, config.linear_value_width());
  segments.a = NextSegment(segments.b, config.linear_num_value_heads);
  segments.total = NextSegment(segments.a, config.linear_num_value_heads);
  return segments;
}

FullAttentionSegments FullSegments(const ModelConfig& config) {
  FullAttentionSegments segments;
  segments.k = NextSegment(segments.q_gate, int64_t{2} * config.num_attention_heads * config.head_dim);
  segments.v = NextSegment(segments.k, int64_t{1} * config.num_key_value_heads * config.head_dim);
  segments.total = NextSegment(segments.v, int64_t{1} * config.num_key_value_heads * config.head_dim);
  return segments;
}

GateUpSegments MlpSegments(const ModelConfig& config) {
  GateUpSegments segments;
  segments.up = NextSegment(segments.gate, config.intermediate_size);
  segments.total = NextSegment(segments.up, config.intermediate_size);
  return segments;
}

}  // namespace bebop
