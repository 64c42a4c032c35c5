// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

// Returns from the enclosing function when `expression` is not OK. (The packaged Abseil predates absl's own macros.)
#define BEBOP_RETURN_IF_ERROR(expression)                              \
  do {                                                                 \
    if (absl::Status status_ = (expression); !status_.ok()) return status_; \
  } while (false)

#define BEBOP_CONCAT_INNER(a, b) a##b
#define BEBOP_CONCAT(a, b) BEBOP_CONCAT_INNER(a, b)

// `target = *expression`, or returns its status.
#define BEBOP_ASSIGN_OR_RETURN(target, expression) \
  BEBOP_ASSIGN_OR_RETURN_IMPL(BEBOP_CONCAT(statusor_, __LINE__), target, expression)
#define BEBOP_ASSIGN_OR_RETURN_IMPL(statusor, target, expression) \
  auto statusor = (expression);                                   \
  if (!statusor.ok()) return std::move(statusor).status();        \
  target = *std::move(statusor)
