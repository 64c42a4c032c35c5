// SPDX-License-Identifier: Apache-2.0
#include "engine/weights/weight_digest.h"

#include <algorithm>

#include "absl/status/status.h"
#include "absl/strings/str_join.h"
#include "engine/formats/strings.h"
#include "kernels/common/check.h"

namespace bebop {
namespace {

int HexValue(char digit) {
  if (digit >= '0' && digit <= '9') return digit - '0';
  if (digit >= 'a' && digit <= 'f') return digit - 'a' + 10;
  if (digit >= 'A' && digit <= 'F') return digit - 'A' + 10;
  return -1;
}

}  // namespace

std::string DigestHex(const Sha256Digest& digest) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string hex(2 * digest.size(), '0');
  for (size_t i = 0; i < digest.size(); ++i) {
    hex[2 * i] = kDigits[digest[i] >> 4];
    hex[2 * i + 1] = kDigits[digest[i] & 15];
  }
  return hex;
}

absl::StatusOr<Sha256Digest> ParseDigest(std::string_view hex) {
  Sha256Digest digest;
  bool valid = hex.size() == 2 * digest.size();
  for (size_t i = 0; valid && i < digest.size(); ++i) {
    const int high = HexValue(hex[2 * i]), low = HexValue(hex[2 * i + 1]);
    valid = high >= 0 && low >= 0;
    digest[i] = static_cast<uint8_t>(high << 4 | low);
  }
  if (!valid) return absl::InvalidArgumentError(StrCat("expected a digest of 64 hexadecimal digits, got ", Quoted(hex)));
  return digest;
}

int64_t TensorInfo::num_elements() const {
  int64_t count = 1;
  for (const int64_t size : shape) count *= size;
  return count;
}

const char* FormName(DType form) { return form == DType::kBFloat16 ? "BF16" : "F32"; }

Sha256Digest ComponentDigest(const std::vector<TensorInfo>& tensors, bool mtp) {
  std::vector<const TensorInfo*> sorted;
  for (const TensorInfo& tensor : tensors) {
    if (tensor.mtp == mtp) sorted.push_back(&tensor);
  }
  std::sort(sorted.begin(), sorted.end(), [](const TensorInfo* a, const TensorInfo* b) { return a->name < b->name; });
  Sha256 hash;
  for (const TensorInfo* tensor : sorted) {
    hash.Update(StrCat(tensor->name, " ", FormName(tensor->form), " ", absl::StrJoin(tensor->shape, ","), " ",
                       DigestHex(tensor->digest), "\n"));
  }
  return hash.Finish();
}

void WeightVersion::SetDigests(const std::vector<Sha256Digest>& tensor_digests) {
  BEBOP_CHECK(tensor_digests.size() == tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) tensors[i].digest = tensor_digests[i];
  target_digest = ComponentDigest(tensors, /*mtp=*/false);
  draft_digest.reset();
  if (std::any_of(tensors.begin(), tensors.end(), [](const TensorInfo& tensor) { return tensor.mtp; })) {
    draft_digest = ComponentDigest(tensors, /*mtp=*/true);
  }
}

}  // namespace bebop
