// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <string_view>
#include <type_traits>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace bebop {

// absl::StrCat that also takes std::string_view: the packaged Abseil has a string_view type of its own.
template <typename... Parts>
std::string StrCat(const Parts&... parts) {
  const auto convert = []<typename Part>(const Part& part) -> decltype(auto) {
    if constexpr (std::is_same_v<Part, std::string_view>) {
      return absl::string_view(part.data(), part.size());
    } else {
      return (part);
    }
  };
  return absl::StrCat(convert(parts)...);
}

// `text` in double quotes as it may stand in a one-line error message: control and non-ASCII bytes escaped, clipped to 200 bytes.
std::string Quoted(std::string_view text);

}  // namespace bebop
