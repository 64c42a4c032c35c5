// SPDX-License-Identifier: Apache-2.0
#include "engine/memory/page_pool.h"

#include "kernels/common/check.h"

namespace bebop {

PagePool::PagePool(int32_t num_pages) {
  BEBOP_CHECK(num_pages >= 0);
  references_.assign(static_cast<size_t>(num_pages), 0);
  free_.reserve(static_cast<size_t>(num_pages));
  for (int32_t page = num_pages - 1; page >= 0; --page) free_.push_back(page);  // page 0 is handed out first
}

int32_t PagePool::Allocate() {
  if (free_.empty()) return -1;
  const int32_t page = free_.back();
  free_.pop_back();
  references_[page] = 1;
  return page;
}

void PagePool::AddReference(int32_t page) {
  BEBOP_CHECK(num_references(page) > 0);
  ++references_[page];
}

bool PagePool::Release(int32_t page) {
  BEBOP_CHECK(num_references(page) > 0);
  if (--references_[page] > 0) return false;
  free_.push_back(page);
  return true;
}

int32_t PagePool::num_references(int32_t page) const {
  BEBOP_CHECK(page >= 0 && page < num_pages());
  return references_[page];
}

}  // namespace bebop
