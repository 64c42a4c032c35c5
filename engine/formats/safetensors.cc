// SPDX-License-Identifier: Apache-2.0
#include "engine/formats/safetensors.h"

#include <algorithm>
#include <array>
#include <tuple>


#include "absl/status/status.h"
#include "absl/strings/str_join.h"
#include "engine/formats/json.h"
#include "engine/formats/strings.h"

namespace bebop {
namespace {

constexpr uint64_t kLengthBytes = 8;

template <typename... Parts>
absl::Status Invalid(const Parts&... parts) {
  return absl::InvalidArgumentError(StrCat(parts...));
}

// Reads one header member. Offsets are still relative to the data section.
absl::StatusOr<TensorEntry> ParseEntry(const std::string& tensor, const JsonValue& value, std::string_view name) {
  const auto invalid = [&](auto&&... parts) { return Invalid(name, ": tensor ", Quoted(tensor), ": ", parts...); };
  const JsonValue::Object* object = value.object();
  if (object == nullptr) return invalid("expected an object, got ", JsonValue::Describe(&value));
  for (const JsonValue::Member& member : *object) {
    if (member.first != "dtype" && member.first != "shape" && member.first != "data_offsets") {
      return invalid("unknown key ", Quoted(member.first));
    }
  }
  TensorEntry entry;
  entry.name = tensor;

  const JsonValue* dtype = value.Find("dtype");
  const int64_t element_bytes = dtype != nullptr && dtype->string() != nullptr ? SafetensorsElementBytes(*dtype->string()) : 0;
  if (element_bytes == 0) return invalid("dtype: expected a safetensors type, got ", JsonValue::Describe(dtype));
  entry.dtype = *dtype->string();

  const JsonValue* shape = value.Find("shape");
  if (shape == nullptr || shape->array() == nullptr) return invalid("shape: expected an array, got ", JsonValue::Describe(shape));
  int64_t bytes = element_bytes;
  for (const JsonValue& dimension : *shape->array()) {
    const int64_t* size = dimension.integer();
    if (size == nullptr || *size < 0) return invalid("shape: expected sizes >= 0, got ", JsonValue::Describe(&dimension));
    if (__builtin_mul_overflow(bytes, *size, &bytes)) return invalid("shape: more than 2^63 bytes");
    entry.shape.push_back(*size);
  }

  const JsonValue* offsets = value.Find("data_offsets");
  if (offsets == nullptr || offsets->array() == nullptr || offsets->array()->size() != 2) {
    return invalid("data_offsets: expected two offsets, got ", JsonValue::Describe(offsets));
  }
  std::array<uint64_t, 2> range{};
  for (size_t i = 0; i < 2; ++i) {
    const JsonValue& offset = (*offsets->array())[i];
    if (offset.integer() == nullptr || *offset.integer() < 0) {
      return invalid("data_offsets: expected offsets >= 0, got ", JsonValue::Describe(&offset));
    }
    range[i] = static_cast<uint64_t>(*offset.integer());
  }
  if (range[1] < range[0]) return invalid("data_offsets: expected begin <= end, got ", range[0], " and ", range[1]);
  if (range[1] - range[0] != static_cast<uint64_t>(bytes)) {
    return invalid("expected ", bytes, " bytes for ", entry.dtype, " ", ShapeString(entry.shape), ", got ", range[1] - range[0]);
  }
  entry.begin = range[0];
  entry.end = range[1];
  return entry;
}

}  // namespace

int64_t TensorEntry::num_elements() const {
  int64_t count = 1;
  for (const int64_t size : shape) count *= size;
  return count;
}

int64_t SafetensorsElementBytes(std::string_view dtype) {
  static constexpr std::pair<std::string_view, int64_t> kTypes[] = {
      {"BF16", 2}, {"F16", 2}, {"F32", 4}, {"F64", 8}, {"I8", 1},      {"U8", 1},      {"I16", 2},  {"U16", 2},
      {"I32", 4},  {"U32", 4}, {"I64", 8}, {"U64", 8}, {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"BOOL", 1}, {"F8_E8M0", 1}};
  for (const auto& [type, bytes] : kTypes) {
    if (type == dtype) return bytes;
  }
  return 0;
}

std::string ShapeString(const std::vector<int64_t>& shape) { return StrCat("[", absl::StrJoin(shape, ", "), "]"); }

uint64_t SafetensorsHeaderBytes(std::string_view first_bytes) {
  uint64_t header_bytes = 0;
  for (uint64_t i = 0; i < kLengthBytes; ++i) header_bytes |= static_cast<uint64_t>(static_cast<uint8_t>(first_bytes[i])) << (8 * i);
  return header_bytes;
}

absl::StatusOr<SafetensorsHeader> ParseSafetensorsHeader(std::string_view file_bytes, std::string_view name) {
  return ParseSafetensorsHeader(file_bytes, file_bytes.size(), name);
}

absl::StatusOr<SafetensorsHeader> ParseSafetensorsHeader(std::string_view head, uint64_t file_size, std::string_view name) {
  if (file_size < kLengthBytes) return absl::DataLossError(StrCat(name, ": expected at least 8 bytes, got ", file_size));
  const uint64_t header_bytes = SafetensorsHeaderBytes(head);
  if (header_bytes > kMaxSafetensorsHeaderBytes) {
    return Invalid(name, ": not a safetensors file: expected a header of at most ", kMaxSafetensorsHeaderBytes, " bytes, got ",
                   header_bytes);
  }
  if (header_bytes > file_size - kLengthBytes) {
    return absl::DataLossError(
        StrCat(name, ": expected a header of ", header_bytes, " bytes, the file ends after ", file_size - kLengthBytes));
  }
  const std::string_view json = head.substr(kLengthBytes, header_bytes);
  if (json.empty() || json.front() != '{') {
    return Invalid(name, ": not a safetensors file: expected the header to start with '{'");
  }

  // About 8 values a tensor: room for 250,000 tensors, and a bound on what a hostile header costs.
  absl::StatusOr<JsonValue> root =
      ParseJson(json, name, {.max_bytes = kMaxSafetensorsHeaderBytes, .max_depth = 8, .max_values = 2'000'000});
  if (!root.ok()) return root.status();

  SafetensorsHeader header;
  for (const auto& [key, value] : *root->object()) {
    if (key == "__metadata__") {
      if (value.object() == nullptr) return Invalid(name, ": __metadata__: expected an object, got ", JsonValue::Describe(&value));
      for (const auto& [meta_key, meta_value] : *value.object()) {
        if (meta_value.string() == nullptr) {
          return Invalid(name, ": __metadata__.", Quoted(meta_key), ": expected a string, got ", JsonValue::Describe(&meta_value));
        }
        header.metadata.emplace_back(meta_key, *meta_value.string());
      }
      continue;
    }
    absl::StatusOr<TensorEntry> entry = ParseEntry(key, value, name);
    if (!entry.ok()) return entry.status();
    header.tensors.push_back(*std::move(entry));
  }

  // Every byte of the data section belongs to exactly one tensor. Empty tensors sort before the one that starts where they do.
  std::sort(header.tensors.begin(), header.tensors.end(), [](const TensorEntry& a, const TensorEntry& b) {
    return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
  });
  const uint64_t data_begin = kLengthBytes + header_bytes;
  uint64_t expected = 0;
  for (TensorEntry& entry : header.tensors) {
    if (entry.begin != expected) {
      return Invalid(name, ": tensor ", Quoted(entry.name), ": ", entry.begin < expected ? "overlaps its neighbour" : "leaves a hole",
                     ": expected data to begin at ", expected, ", got ", entry.begin);
    }
    expected = entry.end;
    entry.begin += data_begin;
    entry.end += data_begin;
  }
  const uint64_t data_bytes = file_size - data_begin;
  if (expected > data_bytes) {
    // The first tensor that the file does not hold whole.
    const auto cut = std::find_if(header.tensors.begin(), header.tensors.end(),
                                  [&](const TensorEntry& entry) { return entry.end > file_size; });
    return absl::DataLossError(StrCat(name, ": tensor ", Quoted(cut->name), ": truncated: expected ", expected,
                                            " bytes of data in all, got ", data_bytes));
  }
  if (expected < data_bytes) return Invalid(name, ": expected ", expected, " bytes of data, got ", data_bytes);
  return header;
}

absl::StatusOr<SafetensorsFile> SafetensorsFile::Open(const std::string& path) {
  absl::StatusOr<MappedFile> file = MappedFile::Open(path);
  if (!file.ok()) return file.status();
  absl::StatusOr<SafetensorsHeader> header = ParseSafetensorsHeader(file->bytes(), path);
  if (!header.ok()) return header.status();
  SafetensorsFile result;
  result.file_ = *std::move(file);
  result.header_ = *std::move(header);
  return result;
}

absl::StatusOr<SafetensorsIndex> ParseSafetensorsIndex(std::string_view json, std::string_view name) {
  absl::StatusOr<JsonValue> root = ParseJson(json, name, {.max_bytes = kMaxSafetensorsHeaderBytes, .max_depth = 8, .max_values = 2'000'000});
  if (!root.ok()) return root.status();
  absl::StatusOr<JsonObject> object = JsonObject::Open(*root, name);
  if (!object.ok()) return object.status();
  const JsonValue* map = object->Get("weight_map");
  if (map == nullptr || map->object() == nullptr) return object->Unexpected("weight_map", "an object");
  SafetensorsIndex index;
  for (const auto& [tensor, file] : *map->object()) {
    const std::string* file_name = file.string();
    if (file_name == nullptr || file_name->empty() || *file_name == "." || *file_name == ".." ||
        file_name->find_first_of(std::string_view("/\0", 2)) != std::string::npos) {
      return Invalid(name, ": weight_map.", Quoted(tensor), ": expected a file name, got ", JsonValue::Describe(&file));
    }
    index.weight_map.emplace_back(tensor, *file_name);
  }
  if (index.weight_map.empty()) return Invalid(name, ": weight_map: expected at least one tensor, got none");
  std::sort(index.weight_map.begin(), index.weight_map.end());
  return index;
}

}  // namespace bebop
