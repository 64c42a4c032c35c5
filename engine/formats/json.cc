// SPDX-License-Identifier: Apache-2.0
#include "engine/formats/json.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "absl/strings/escaping.h"

namespace bebop {
namespace {

// Builds a JsonValue from the parser's events and stops it at the first limit. nlohmann's event interface reports errors through
// `parse_error` and throws nothing; its own tree would keep the last of two equal keys silently.
class TreeBuilder final : public nlohmann::json_sax<nlohmann::json> {
 public:
  TreeBuilder(std::string_view name, const JsonLimits& limits) : name_(name), limits_(limits) {}

  absl::Status status() const { return status_; }
  JsonValue TakeRoot() { return std::move(root_); }

  bool null() override { return Add(nullptr); }
  bool boolean(bool value) override { return Add(value); }
  bool number_integer(number_integer_t value) override { return Add(int64_t{value}); }
  bool number_unsigned(number_unsigned_t value) override {
    if (value > static_cast<number_unsigned_t>(std::numeric_limits<int64_t>::max())) return Add(static_cast<double>(value));
    return Add(static_cast<int64_t>(value));
  }
  bool number_float(number_float_t value, const string_t&) override {
    if (!std::isfinite(value)) return Fail("number out of range");
    return Add(double{value});
  }
  bool string(string_t& value) override { return Add(std::move(value)); }
  bool binary(binary_t&) override { return Fail("binary value"); }

  bool start_object(size_t) override { return Open<JsonValue::Object>(); }
  bool start_array(size_t) override { return Open<JsonValue::Array>(); }
  bool end_object() override { return CheckKeysDiffer() && Close(); }
  bool end_array() override { return Close(); }
  bool key(string_t& key) override {
    open_.back()->mutable_object()->emplace_back().first = std::move(key);
    return Count();
  }

  bool parse_error(size_t position, const std::string&, const nlohmann::detail::exception& error) override {
    // The library's texts are long and quote the input; the place says enough.
    return Fail(StrCat(error.id == 406 ? "number out of range" : "not valid JSON", " at byte ", position));
  }

 private:
  bool Fail(std::string_view what) {
    if (status_.ok()) status_ = absl::InvalidArgumentError(StrCat(name_, ": ", what));
    return false;
  }

  bool Count() {
    if (++num_values_ > limits_.max_values) return Fail(StrCat("expected at most ", limits_.max_values, " values, got more"));
    return true;
  }

  // Where the next value belongs: the root, the end of the open array, or the open object's last key.
  JsonValue& NextSlot() {
    if (open_.empty()) return root_;
    if (JsonValue::Array* array = open_.back()->mutable_array()) return array->emplace_back();
    return open_.back()->mutable_object()->back().second;
  }

  template <typename T>
  bool Add(T value) {
    NextSlot().Set(std::move(value));
    return Count();
  }

  // An open value's address is stable: its parent grows only after it is closed.
  template <typename Container>
  bool Open() {
    if (static_cast<int32_t>(open_.size()) >= limits_.max_depth) {
      return Fail(StrCat("expected at most ", limits_.max_depth, " nested levels, got more"));
    }
    JsonValue& slot = NextSlot();
    slot.Set(Container());
    open_.push_back(&slot);
    return Count();
  }

  bool Close() {
    open_.pop_back();
    return true;
  }

  bool CheckKeysDiffer() {
    const JsonValue::Object& object = *open_.back()->object();
    std::vector<std::string_view> keys;
    keys.reserve(object.size());
    for (const JsonValue::Member& member : object) keys.push_back(member.first);
    std::sort(keys.begin(), keys.end());
    const auto twin = std::adjacent_find(keys.begin(), keys.end());
    return twin == keys.end() || Fail(StrCat("duplicate key ", Quoted(*twin)));
  }

  const std::string name_;
  const JsonLimits limits_;
  absl::Status status_;
  JsonValue root_;
  std::vector<JsonValue*> open_;
  size_t num_values_ = 0;
};

}  // namespace

std::string Quoted(std::string_view text) {
  constexpr size_t kMaxShown = 200;
  return StrCat("\"", absl::CHexEscape(absl::string_view(text.data(), std::min(text.size(), kMaxShown))), text.size() > kMaxShown ? "..." : "", "\"");
}

const JsonValue* JsonValue::Find(std::string_view key) const {
  if (const Object* members = object()) {
    for (const Member& member : *members) {
      if (member.first == key) return &member.second;
    }
  }
  return nullptr;
}

std::string JsonValue::Describe(const JsonValue* value) {
  if (value == nullptr) return "nothing";
  if (value->is_null()) return "null";
  if (const bool* boolean = value->boolean()) return *boolean ? "true" : "false";
  if (const int64_t* integer = value->integer()) return StrCat(*integer);
  if (const double* real = value->real()) return StrCat(*real);
  if (const std::string* string = value->string()) return Quoted(*string);
  if (const Array* array = value->array()) return StrCat("an array of ", array->size());
  return StrCat("an object of ", value->object()->size());
}

absl::StatusOr<JsonValue> ParseJson(std::string_view text, std::string_view name, const JsonLimits& limits) {
  if (text.size() > limits.max_bytes) {
    return absl::InvalidArgumentError(StrCat(name, ": expected at most ", limits.max_bytes, " bytes of JSON, got ", text.size()));
  }
  TreeBuilder builder(name, limits);
  const bool complete = nlohmann::json::sax_parse(text.begin(), text.end(), &builder, nlohmann::json::input_format_t::json,
                                                  /*strict=*/true, /*ignore_comments=*/false);
  if (!builder.status().ok()) return builder.status();
  if (!complete) return absl::InvalidArgumentError(StrCat(name, ": not valid JSON"));
  return builder.TakeRoot();
}

absl::StatusOr<JsonObject> JsonObject::Open(const JsonValue& value, std::string_view file, std::string_view path) {
  if (value.object() == nullptr) {
    return absl::InvalidArgumentError(
        StrCat(file, ": ", path, path.empty() ? "" : ": ", "expected an object, got ", JsonValue::Describe(&value)));
  }
  return JsonObject(value, file, path);
}

const JsonValue* JsonObject::Get(std::string_view key) const {
  const JsonValue* value = value_->Find(key);
  return value == nullptr || value->is_null() ? nullptr : value;
}

absl::Status JsonObject::Unexpected(std::string_view key, std::string_view expected) const {
  return absl::InvalidArgumentError(
      StrCat(file_, ": ", path_, key, ": expected ", expected, ", got ", JsonValue::Describe(value_->Find(key))));
}

absl::StatusOr<int64_t> JsonObject::Integer(std::string_view key, int64_t min, int64_t max, std::optional<int64_t> fallback) const {
  const JsonValue* value = Get(key);
  if (value == nullptr && fallback) return *fallback;
  const int64_t* integer = value == nullptr ? nullptr : value->integer();
  if (integer == nullptr || *integer < min || *integer > max) {
    return Unexpected(key, StrCat("an integer in [", min, ", ", max, "]"));
  }
  return *integer;
}

absl::StatusOr<double> JsonObject::Number(std::string_view key, double min, double max, std::optional<double> fallback) const {
  const JsonValue* value = Get(key);
  if (value == nullptr && fallback) return *fallback;
  std::optional<double> number;
  if (value != nullptr && value->integer() != nullptr) number = static_cast<double>(*value->integer());
  if (value != nullptr && value->real() != nullptr) number = *value->real();
  if (!number || !(*number >= min && *number <= max)) return Unexpected(key, StrCat("a number in [", min, ", ", max, "]"));
  return *number;
}

absl::StatusOr<bool> JsonObject::Boolean(std::string_view key, std::optional<bool> fallback) const {
  const JsonValue* value = Get(key);
  if (value == nullptr && fallback) return *fallback;
  if (value == nullptr || value->boolean() == nullptr) return Unexpected(key, "true or false");
  return *value->boolean();
}

absl::StatusOr<std::string> JsonObject::String(std::string_view key, std::optional<std::string> fallback) const {
  const JsonValue* value = Get(key);
  if (value == nullptr && fallback) return *fallback;
  if (value == nullptr || value->string() == nullptr) return Unexpected(key, "a string");
  return *value->string();
}

absl::StatusOr<JsonObject> JsonObject::Object(std::string_view key) const {
  const JsonValue* value = Get(key);
  if (value == nullptr || value->object() == nullptr) return Unexpected(key, "an object");
  return JsonObject(*value, file_, StrCat(path_, key, "."));
}

absl::StatusOr<const JsonValue::Array*> JsonObject::Array(std::string_view key) const {
  const JsonValue* value = Get(key);
  if (value == nullptr || value->array() == nullptr) return Unexpected(key, "an array");
  return value->array();
}

}  // namespace bebop
