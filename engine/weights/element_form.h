// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "kernels/common/dtype.h"

namespace bebop {

// The form (TensorInfo::form) of a checkpoint's tensor of type BF16, F16 or F32 that is held as `resident`.
DType FormOf(std::string_view file_type, DType resident);

// Elements of type BF16, F16 or F32 as bytes of `form`: `bytes` themselves, or the converted ones in `scratch`, rounded to
// nearest even. What is not finite stays so. REQUIRES: whole elements.
std::string_view ToForm(std::string_view file_type, std::string_view bytes, DType form, std::vector<char>& scratch);

float HalfToFloat(uint16_t half);

// Index of the first element of `bytes` (of `form`, in any alignment) that is infinite or NaN; -1 if there is none.
int64_t FirstNonFinite(DType form, std::string_view bytes);

}  // namespace bebop
