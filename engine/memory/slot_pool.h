// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

namespace bebop {

// Which of the slots 0..num_slots-1 are in use; a slot has one owner. Used for recurrent-state slots and for executor slots.
// Allocates nothing after construction. Not thread safe: the engine thread. Releasing a free slot is our own bug and aborts.
class SlotPool {
 public:
  explicit SlotPool(int32_t num_slots);  // REQUIRES: num_slots >= 0

  int32_t Allocate();  // -1 when all are in use
  void Release(int32_t slot);

  bool in_use(int32_t slot) const;
  int32_t num_free() const { return static_cast<int32_t>(free_.size()); }
  int32_t num_used() const { return num_slots() - num_free(); }
  int32_t num_slots() const { return static_cast<int32_t>(in_use_.size()); }

 private:
  std::vector<char> in_use_;
  std::vector<int32_t> free_;
};

}  // namespace bebop
