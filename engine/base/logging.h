// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string_view>

namespace bebop {

enum class LogLevel { kInfo, kWarning, kError };

// One line to stderr with time, level and message. Holds ids, sizes, versions and codes; never prompts, tokens or credentials.
// Thread safe.
void Log(LogLevel level, std::string_view message);

}  // namespace bebop
