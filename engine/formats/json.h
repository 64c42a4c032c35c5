// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/formats/strings.h"

namespace bebop {

// A parsed JSON value (RFC 8259). Plain data: owns everything below it. Objects keep the order of the file.
class JsonValue {
 public:
  using Array = std::vector<JsonValue>;
  using Member = std::pair<std::string, JsonValue>;
  using Object = std::vector<Member>;

  JsonValue() : data_(nullptr) {}
  // Replaces the value; T is one of the alternatives of `data_`.
  template <typename T>
  T& Set(T value) {
    return data_.template emplace<T>(std::move(value));
  }

  bool is_null() const { return std::holds_alternative<std::nullptr_t>(data_); }
  // Null unless the value has that type.
  const bool* boolean() const { return std::get_if<bool>(&data_); }
  const int64_t* integer() const { return std::get_if<int64_t>(&data_); }  // written without fraction or exponent, fits int64
  const double* real() const { return std::get_if<double>(&data_); }       // every other number
  const std::string* string() const { return std::get_if<std::string>(&data_); }
  const Array* array() const { return std::get_if<Array>(&data_); }
  const Object* object() const { return std::get_if<Object>(&data_); }
  Array* mutable_array() { return std::get_if<Array>(&data_); }
  Object* mutable_object() { return std::get_if<Object>(&data_); }

  // Member `key` of an object; null when this is no object or has no such member. Linear: for objects with few members.
  const JsonValue* Find(std::string_view key) const;

  // The value as it may stand in an error message: one line, clipped, e.g. `12`, `"gelu"`, `an array of 3`, `nothing` for null pointers.
  static std::string Describe(const JsonValue* value);

 private:
  std::variant<std::nullptr_t, bool, int64_t, double, std::string, Array, Object> data_;
};

// What a document may cost. Exceeding a limit is INVALID_ARGUMENT.
struct JsonLimits {
  size_t max_bytes = 16 << 20;
  int32_t max_depth = 64;
  size_t max_values = 1 << 20;  // values and keys in all: bounds memory at about 100 bytes each
};

// Parses a whole document: strict UTF-8, no comments, no trailing bytes, no duplicate keys. The only JSON parser of the engine.
// INVALID_ARGUMENT: `<name>: <what is wrong>`, one line.
absl::StatusOr<JsonValue> ParseJson(std::string_view text, std::string_view name, const JsonLimits& limits = {});

// Typed access to the members of one object, with errors that name the key and both values:
//   `config.json: text_config.hidden_size: expected an integer in [1, 1048576], got "big"`.
// A member that is null counts as absent. Borrows the value.
class JsonObject {
 public:
  // `value` must be an object (else see Open). `path` prefixes keys in messages: empty, or "text_config.".
  JsonObject(const JsonValue& value, std::string_view file, std::string_view path = "") : value_(&value), file_(file), path_(path) {}
  // INVALID_ARGUMENT unless `value` is an object.
  static absl::StatusOr<JsonObject> Open(const JsonValue& value, std::string_view file, std::string_view path = "");

  bool Has(std::string_view key) const { return Get(key) != nullptr; }
  const JsonValue* Get(std::string_view key) const;  // null when absent or null

  // Without `fallback` the member is required.
  absl::StatusOr<int64_t> Integer(std::string_view key, int64_t min, int64_t max, std::optional<int64_t> fallback = {}) const;
  absl::StatusOr<double> Number(std::string_view key, double min, double max, std::optional<double> fallback = {}) const;
  absl::StatusOr<bool> Boolean(std::string_view key, std::optional<bool> fallback = {}) const;
  absl::StatusOr<std::string> String(std::string_view key, std::optional<std::string> fallback = {}) const;
  absl::StatusOr<JsonObject> Object(std::string_view key) const;
  absl::StatusOr<const JsonValue::Array*> Array(std::string_view key) const;

  // `<file>: <path><key>: expected <expected>, got <value>`.
  absl::Status Unexpected(std::string_view key, std::string_view expected) const;

 private:
  const JsonValue* value_;
  std::string file_;
  std::string path_;
};

}  // namespace bebop
