// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace bebop::test {

// Calls of operator new in this program so far. Linking bebop::allocation_counter replaces the global operators; under sanitizers, which
// bring their own, nothing is counted and this returns 0, so that a test of "allocates nothing" proves something in other builds only.
int64_t NumAllocations();

}  // namespace bebop::test
