// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

namespace bebop {

// Who uses which KV page: reference counts over pages 0..num_pages-1 and a free list. Samples of a group share full pages of their
// prompt by reference; a page with more than one reference is never written (its writer copies it first, "copy on write").
//
// Holds no bytes (ModelStateStorage does) and allocates nothing after construction. Not thread safe: the engine thread.
// Misuse (a page out of range, a reference to a free page, one release too many) is our own bug and aborts.
class PagePool {
 public:
  explicit PagePool(int32_t num_pages);  // REQUIRES: num_pages >= 0

  // A free page with one reference, or -1 when there is none. The page's bytes are those of its last owner.
  int32_t Allocate();
  void AddReference(int32_t page);
  // Drops one reference; the page is free once nobody holds it. True when it became free.
  bool Release(int32_t page);

  int32_t num_references(int32_t page) const;
  int32_t num_free() const { return static_cast<int32_t>(free_.size()); }
  int32_t num_used() const { return num_pages() - num_free(); }
  int32_t num_pages() const { return static_cast<int32_t>(references_.size()); }

 private:
  std::vector<int32_t> references_;  // by page; 0: free
  std::vector<int32_t> free_;        // last in, first out: a page just released is the likeliest to be in a cache
};

}  // namespace bebop
