// SPDX-License-Identifier: Apache-2.0
#include "engine/schedule/request_queue.h"

#include "absl/strings/str_cat.h"
#include "kernels/common/check.h"

namespace bebop {

absl::Status RequestQueue::CheckRoom(int64_t bytes) const {
  if (num_requests_ >= max_requests_) {
    return absl::ResourceExhaustedError(absl::StrCat("queue full: ", num_requests_, " requests wait, the limit is ", max_requests_));
  }
  if (num_bytes_ + bytes > max_bytes_) {
    return absl::ResourceExhaustedError(absl::StrCat("queue full: ", num_bytes_, " bytes wait, this request has ", bytes,
                                                     ", the limit is ", max_bytes_));
  }
  return absl::OkStatus();
}

void RequestQueue::Enter(Work* work) {
  BEBOP_CHECK(!work->admitted);
  BEBOP_CHECK(order_.insert(work).second);
  ++num_requests_;
  num_bytes_ += work->queued_bytes;
}

void RequestQueue::Admit(Work* work) {
  BEBOP_CHECK(!work->admitted);
  work->admitted = true;
  --num_requests_;
  num_bytes_ -= work->queued_bytes;
}

void RequestQueue::Leave(Work* work) {
  order_.erase(work);
  if (work->admitted) return;
  --num_requests_;
  num_bytes_ -= work->queued_bytes;
}

}  // namespace bebop
