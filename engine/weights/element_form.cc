// SPDX-License-Identifier: Apache-2.0
#include "engine/weights/element_form.h"

#include <bit>
#include <cstring>

#include "engine/weights/weight_digest.h"
#include "kernels/common/check.h"

namespace bebop {
namespace {

template <typename T>
T Load(const char* bytes, int64_t index) {
  T value;
  std::memcpy(&value, bytes + index * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return value;
}

template <typename T>
void Store(char* bytes, int64_t index, T value) {
  std::memcpy(bytes + index * static_cast<int64_t>(sizeof(T)), &value, sizeof(T));
}

template <typename Word>
int64_t FirstWithExponent(const char* bytes, int64_t count, Word exponent) {
  // The common case is one pass without a branch.
  Word any = 0;
  for (int64_t i = 0; i < count; ++i) any |= static_cast<Word>((Load<Word>(bytes, i) & exponent) == exponent);
  if (any == 0) return -1;
  int64_t i = 0;
  while ((Load<Word>(bytes, i) & exponent) != exponent) ++i;
  return i;
}

}  // namespace

DType FormOf(std::string_view file_type, DType resident) { return file_type == "BF16" ? DType::kBFloat16 : resident; }

float HalfToFloat(uint16_t half) {
  constexpr float kRescale = 0x1p112f;  // moves a half's exponent (bias 15) to a float's (bias 127), subnormals included
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7FFF) << 13;
  const float finite = std::bit_cast<float>(magnitude) * kRescale;
  const float value = (half & 0x7C00) == 0x7C00 ? std::bit_cast<float>(magnitude | 0x7F800000u) : finite;
  return (half & 0x8000) != 0 ? -value : value;
}

std::string_view ToForm(std::string_view file_type, std::string_view bytes, DType form, std::vector<char>& scratch) {
  if (file_type == FormName(form)) return bytes;
  const int64_t count = static_cast<int64_t>(bytes.size()) / (file_type == "F32" ? 4 : 2);
  scratch.resize(static_cast<size_t>(count * ElementBytes(form)));
  const auto convert = [&](auto&& float_at) {
    if (form == DType::kFloat32) {
      for (int64_t i = 0; i < count; ++i) Store(scratch.data(), i, float_at(i));
    } else {
      for (int64_t i = 0; i < count; ++i) Store(scratch.data(), i, ToBFloat16(float_at(i)).bits);
    }
  };
  if (file_type == "F32") {
    convert([&](int64_t i) { return Load<float>(bytes.data(), i); });
  } else if (file_type == "F16") {
    convert([&](int64_t i) { return HalfToFloat(Load<uint16_t>(bytes.data(), i)); });
  } else {
    BEBOP_CHECK(file_type == "BF16");
    convert([&](int64_t i) { return ToFloat(BFloat16{Load<uint16_t>(bytes.data(), i)}); });
  }
  return {scratch.data(), scratch.size()};
}

int64_t FirstNonFinite(DType form, std::string_view bytes) {
  const int64_t count = static_cast<int64_t>(bytes.size()) / ElementBytes(form);
  return form == DType::kFloat32 ? FirstWithExponent<uint32_t>(bytes.data(), count, 0x7F800000u)
                                 : FirstWithExponent<uint16_t>(bytes.data(), count, 0x7F80u);
}

}  // namespace bebop
