// SPDX-License-Identifier: Apache-2.0
#include "engine/memory/slot_pool.h"

#include "kernels/common/check.h"

namespace bebop {

SlotPool::SlotPool(int32_t num_slots) {
  BEBOP_CHECK(num_slots >= 0);
  in_use_.assign(static_cast<size_t>(num_slots), 0);
  free_.reserve(static_cast<size_t>(num_slots));
  for (int32_t slot = num_slots - 1; slot >= 0; --slot) free_.push_back(slot);
}

int32_t SlotPool::Allocate() {
  if (free_.empty()) return -1;
  const int32_t slot = free_.back();
  free_.pop_back();
  in_use_[slot] = 1;
  return slot;
}

void SlotPool::Release(int32_t slot) {
  BEBOP_CHECK(in_use(slot));
  in_use_[slot] = 0;
  free_.push_back(slot);
}

bool SlotPool::in_use(int32_t slot) const {
  BEBOP_CHECK(slot >= 0 && slot < num_slots());
  return in_use_[slot] != 0;
}

}  // namespace bebop
