// SPDX-License-Identifier: Apache-2.0
#include "engine/tokenizer/nfc.h"

#include <unicode/normalizer2.h>
#include <unicode/uchar.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include "engine/tokenizer/utf8.h"
#include "kernels/common/check.h"

namespace bebop {
namespace {

struct Mark {
  char32_t code_point;
  uint8_t combining_class;  // 0: a starter
  uint32_t order;           // before sorting
};

const icu::Normalizer2& Nfc() {
  UErrorCode error = U_ZERO_ERROR;
  const icu::Normalizer2* nfc = icu::Normalizer2::getNFCInstance(error);
  BEBOP_CHECK(U_SUCCESS(error) && nfc != nullptr);  // its data is compiled into the library
  return *nfc;
}

// The normaliser of the `tokenizers` package, with which models were trained, has the tables of Unicode 9.0: to it, later code points
// are starters that neither decompose nor compose.
bool IsKnown(UChar32 code_point) {
  constexpr uint8_t kMajorVersion = 9;
  if (code_point < 0x300) return true;
  UVersionInfo age;
  u_charAge(code_point, age);
  return age[0] < kMajorVersion || (age[0] == kMajorVersion && age[1] == 0);
}

uint8_t CombiningClass(const icu::Normalizer2& nfc, UChar32 code_point) {
  const uint8_t combining_class = nfc.getCombiningClass(code_point);
  return combining_class != 0 && IsKnown(code_point) ? combining_class : 0;
}

// The quick check of UAX 15 section 9. False: perhaps not normalised.
bool IsSurelyNfc(std::string_view text, const icu::Normalizer2& nfc) {
  uint8_t last_class = 0;
  for (size_t i = 0; i < text.size();) {
    const Utf8Char next = DecodeUtf8(text.substr(i));
    i += static_cast<size_t>(next.length);
    if (next.code_point < 0x300) {  // starters that compose with nothing before them
      last_class = 0;
      continue;
    }
    const UChar32 code_point = static_cast<UChar32>(next.code_point);
    const uint8_t combining_class = CombiningClass(nfc, code_point);
    if (combining_class != 0 && combining_class < last_class) return false;
    if (u_getIntPropertyValue(code_point, UCHAR_NFC_QUICK_CHECK) != UNORM_YES) return false;
    last_class = combining_class;
  }
  return true;
}

std::vector<Mark> Decompose(std::string_view text, const icu::Normalizer2& nfc) {
  std::vector<Mark> marks;
  marks.reserve(text.size());
  icu::UnicodeString decomposition;
  const auto add = [&](UChar32 code_point) { marks.push_back({static_cast<char32_t>(code_point), CombiningClass(nfc, code_point), static_cast<uint32_t>(marks.size())}); };
  for (size_t i = 0; i < text.size();) {
    const Utf8Char next = DecodeUtf8(text.substr(i));
    i += static_cast<size_t>(next.length);
    const UChar32 code_point = static_cast<UChar32>(next.code_point);
    if (code_point < 0xC0 || !nfc.getDecomposition(code_point, decomposition) || !IsKnown(code_point)) {
      add(code_point);
      continue;
    }
    for (int32_t j = 0; j < decomposition.length(); j = decomposition.moveIndex32(j, 1)) add(decomposition.char32At(j));
  }
  // Canonical ordering: each run of marks by class, equal classes in their order.
  for (auto run = marks.begin(); run != marks.end();) {
    if (run->combining_class == 0) {
      ++run;
      continue;
    }
    const auto end = std::find_if(run, marks.end(), [](const Mark& mark) { return mark.combining_class == 0; });
    std::sort(run, end, [](const Mark& a, const Mark& b) {
      return std::tie(a.combining_class, a.order) < std::tie(b.combining_class, b.order);
    });
    run = end;
  }
  return marks;
}

}  // namespace

std::string NormalizeNfc(std::string_view text) {
  const icu::Normalizer2& nfc = Nfc();
  if (IsSurelyNfc(text, nfc)) return std::string(text);
  std::vector<Mark> marks = Decompose(text, nfc);

  // Canonical composition in place: each mark joins the last starter unless something between them blocks it.
  size_t length = 0;
  size_t starter = marks.size();  // none yet
  uint8_t last_class = 0;         // of the mark kept before this one, 0 directly behind the starter
  for (const Mark mark : marks) {
    if (starter < length && (last_class == 0 || last_class < mark.combining_class)) {
      const UChar32 composite =
          nfc.composePair(static_cast<UChar32>(marks[starter].code_point), static_cast<UChar32>(mark.code_point));
      if (composite >= 0 && IsKnown(composite)) {
        marks[starter].code_point = static_cast<char32_t>(composite);
        continue;
      }
    }
    if (mark.combining_class == 0) starter = length;
    last_class = mark.combining_class;
    marks[length++] = mark;
  }

  std::string out;
  out.reserve(text.size());
  for (size_t i = 0; i < length; ++i) AppendUtf8(marks[i].code_point, out);
  return out;
}

}  // namespace bebop
