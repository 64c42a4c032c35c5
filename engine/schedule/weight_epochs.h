// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <string>
#include <utility>

#include "kernels/common/check.h"

namespace bebop {

// What the weights of one epoch are called.
struct WeightName {
  int64_t target_step = 0, draft_step = 0;
  std::string label;
};

// The names behind the epochs that executors stamp outcomes with (Executor::SetWeights): epoch 0 is the weights at the start, and each commit
// adds one. Old names are kept as long as an outcome may still carry their epoch.
class WeightEpochs {
 public:
  WeightEpochs() : names_(1) {}

  int64_t current() const { return first_ + static_cast<int64_t>(names_.size()) - 1; }
  const WeightName& current_name() const { return names_.back(); }
  // REQUIRES: it was not forgotten, and has begun.
  const WeightName& name(int64_t epoch) const {
    BEBOP_CHECK(epoch >= first_ && epoch <= current());
    return names_[static_cast<size_t>(epoch - first_)];
  }
  void NameCurrent(WeightName name) { names_.back() = std::move(name); }
  void Begin(WeightName name) { names_.push_back(std::move(name)); }
  // No outcome of an epoch before this one will come any more.
  void ForgetBefore(int64_t epoch) {
    for (; first_ < std::min(epoch, current()); ++first_) names_.pop_front();
  }

 private:
  std::deque<WeightName> names_;
  int64_t first_ = 0;
};

}  // namespace bebop
