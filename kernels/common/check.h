// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdio>
#include <cstdlib>

// BEBOP_CHECK(condition): an invariant of our own code; on failure prints the place and aborts, in every build.
// Never for input, files or the network: those return a status. BEBOP_DCHECK is for inner loops and vanishes with NDEBUG.
#define BEBOP_CHECK(condition)                                                                     \
  do {                                                                                             \
    if (!(condition)) [[unlikely]] {                                                               \
      std::fprintf(stderr, "bebop: CHECK failed at %s:%d: %s\n", __FILE__, __LINE__, #condition);  \
      std::abort();                                                                                \
    }                                                                                              \
  } while (false)

#ifdef NDEBUG
#define BEBOP_DCHECK(condition) \
  do {                          \
  } while (false && (condition))
#else
#define BEBOP_DCHECK(condition) BEBOP_CHECK(condition)
#endif
