// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <string_view>

namespace bebop {

// Unicode normalisation form C of valid UTF-8 (UAX 15), with ICU's tables as far as Unicode 9.0 has them (what the `tokenizers`
// package normalises by; later code points stay as they are). O(n log n) for any text: ICU's own loop inserts combining
// marks one by one, which takes minutes on a mebibyte of marks in descending order; here runs of marks are sorted.
// REQUIRES: text is valid UTF-8.
std::string NormalizeNfc(std::string_view text);

}  // namespace bebop
