// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/formats/file.h"

namespace bebop {

// The safetensors format: 8 bytes header length (little endian), a JSON header of that length, then the tensors' bytes, row major,
// little endian. Stricter than needed to read: the header must account for every byte exactly once.

// Longest header accepted, as the reference reader.
inline constexpr uint64_t kMaxSafetensorsHeaderBytes = 100'000'000;

struct TensorEntry {
  std::string name;
  std::string dtype;           // as the header writes it: "BF16", "F32", ...
  std::vector<int64_t> shape;  // empty: a scalar
  uint64_t begin = 0;          // offset of the first byte in the file
  uint64_t end = 0;            // one past the last
  int64_t num_elements() const;
};

struct SafetensorsHeader {
  std::vector<TensorEntry> tensors;  // in the order of their bytes
  std::vector<std::pair<std::string, std::string>> metadata;
};

// Bytes per element of a safetensors type; 0 for an unknown one.
int64_t SafetensorsElementBytes(std::string_view dtype);

// `[2, 3]`.
std::string ShapeString(const std::vector<int64_t>& shape);

// Parses and checks the header of a file whose whole content is `file_bytes`; `name` starts every message. Errors name the tensor and
// both values. DATA_LOSS: the file is shorter than its header says. INVALID_ARGUMENT: everything else (header too long, not JSON,
// duplicate name, unknown type, size that does not match the shape, overlap, hole, trailing bytes).
absl::StatusOr<SafetensorsHeader> ParseSafetensorsHeader(std::string_view file_bytes, std::string_view name);
// The same of a file of `file_size` bytes that is not in memory: `head` is its beginning, up to the header's end if the file has it.
absl::StatusOr<SafetensorsHeader> ParseSafetensorsHeader(std::string_view head, uint64_t file_size, std::string_view name);
// The header's length that a file's first 8 bytes tell, unchecked.
uint64_t SafetensorsHeaderBytes(std::string_view first_bytes);

// A mapped safetensors file. Immutable; safe to read from any thread.
class SafetensorsFile {
 public:
  static absl::StatusOr<SafetensorsFile> Open(const std::string& path);
  const std::string& path() const { return file_.path(); }
  const SafetensorsHeader& header() const { return header_; }
  // The tensor's bytes, not aligned to its type.
  std::string_view Bytes(const TensorEntry& entry) const { return file_.bytes().substr(entry.begin, entry.end - entry.begin); }

 private:
  MappedFile file_;
  SafetensorsHeader header_;
};

// `model.safetensors.index.json`: which file of the folder holds each tensor.
struct SafetensorsIndex {
  std::vector<std::pair<std::string, std::string>> weight_map;  // tensor -> file name (no folders), sorted by tensor
};
// INVALID_ARGUMENT: not JSON, duplicate tensor, a file name that is empty, `.`/`..` or holds a slash.
absl::StatusOr<SafetensorsIndex> ParseSafetensorsIndex(std::string_view json, std::string_view name);

}  // namespace bebop
