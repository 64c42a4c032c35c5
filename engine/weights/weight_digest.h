// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/formats/sha256.h"
#include "kernels/common/dtype.h"

namespace bebop {

// 64 lower-case hexadecimal digits, and back from digits of either case. INVALID_ARGUMENT: anything else.
std::string DigestHex(const Sha256Digest& digest);
absl::StatusOr<Sha256Digest> ParseDigest(std::string_view hex);

// One tensor of a version, as an update must bring it.
//
// Its `form` is the type of its bytes in digests and updates: the checkpoint's type where that is BF16, or F32 that is held as
// float32. A checkpoint whose type is not held exactly is described as it is resident, since nothing else could be checked: F32
// and F16 held as bfloat16 have form BF16 and the digest of the rounded values, F16 held as float32 has form F32. Random weights
// have the resident type. So in every case the bytes can be had back from the resident ones, without rounding.
struct TensorInfo {
  std::string name;  // as the checkpoint spells it, but for the MTP layer: always "mtp.*"
  DType form = DType::kBFloat16;
  std::vector<int64_t> shape;
  bool mtp = false;
  Sha256Digest digest = {};  // of the row-major little-endian bytes

  int64_t num_elements() const;
  int64_t num_bytes() const { return num_elements() * ElementBytes(form); }
};

// "BF16" or "F32", as safetensors has it.
const char* FormName(DType form);

// What loaded weights are: known by step and label to learners, by digest to everybody.
struct WeightVersion {
  int64_t target_step = 0;  // 0: the checkpoint loaded at start
  int64_t draft_step = 0;
  std::string label;                // of the last update; may be empty
  std::vector<TensorInfo> tensors;  // in the order of the layout's slots
  Sha256Digest target_digest = {};
  std::optional<Sha256Digest> draft_digest;  // none without an MTP layer

  // Sets the tensors' digests, and from these both components'.
  void SetDigests(const std::vector<Sha256Digest>& tensor_digests);
};

// SHA-256 over the lines "name form shape digest\n", sorted by name, of the MTP layer's tensors or of all others.
Sha256Digest ComponentDigest(const std::vector<TensorInfo>& tensors, bool mtp);

}  // namespace bebop
