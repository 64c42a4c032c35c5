// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "engine/config/model_config.h"
#include "engine/weights/weight_digest.h"
#include "tests/support/checkpoint_writer.h"

namespace bebop::test {

// Weights that say in every token which version they are (reliability.md section 2), for a real network of one linear and one full attention layer
// with an MTP layer.
//
// The residual stream has a constant and 16 version dimensions. In version v the embedding, both mixers and both MLPs each add to dimension v mod 16, and
// lm_head gives token v mod 16 from that dimension, or kTorn, by far, from any other. Inside a block the two matrices that carry the version use codes (5 v
// in, 4 v out) that cancel to v only for one version; keys, values, convolution windows and recurrent states carry v as well, so that a stale one shows
// as kTorn, too. What the tokens cannot show (queries, keys, norms) differs between versions in its bytes, for whoever hashes them.
inline constexpr uint32_t kNumIds = 16;
inline constexpr uint32_t kTorn = 20;

inline uint32_t TokenOf(int64_t version) { return static_cast<uint32_t>(version % kNumIds); }

std::string SelfIdentifyingConfigJson();

enum class Caches {
  kShow,  // a cache of another version makes kTorn
  kMute,  // mixers add nothing: tokens tell the version of the weights alone, whatever caches they are kept with
};
std::vector<TestTensor> SelfIdentifyingTensors(const ModelConfig& config, int64_t version, Caches caches);

// The digests of a version as the documents define them, from the tensors alone.
struct Digests {
  Sha256Digest target, draft;
};
Digests DigestsOf(const std::vector<TestTensor>& tensors);

}  // namespace bebop::test
