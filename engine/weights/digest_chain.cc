// SPDX-License-Identifier: Apache-2.0
#include "engine/weights/digest_chain.h"

#include <utility>

#include "kernels/common/check.h"

namespace bebop {

DigestChain::DigestChain(const std::vector<TensorSlot>& slots, BlockBytes block_bytes)
    : slots_(slots), block_bytes_(std::move(block_bytes)), tensors_(slots.size()) {}

void DigestChain::BlockDone(const RowBlock& block) {
  thread_local std::vector<char> scratch;
  Tensor& tensor = tensors_[static_cast<size_t>(block.slot - slots_.data())];
  tensor.mutex.Lock();
  tensor.done.insert(block);
  if (!tensor.busy) {
    tensor.busy = true;
    while (!tensor.done.empty() && tensor.done.begin()->first_row == tensor.next_row) {
      const RowBlock next = *tensor.done.begin();
      tensor.done.erase(tensor.done.begin());
      tensor.next_row += next.num_rows;
      tensor.mutex.Unlock();
      tensor.hash.Update(block_bytes_(next, scratch));
      tensor.mutex.Lock();
    }
    tensor.busy = false;
  }
  tensor.mutex.Unlock();
}

std::vector<Sha256Digest> DigestChain::Finish() {
  std::vector<Sha256Digest> digests;
  for (size_t i = 0; i < tensors_.size(); ++i) {
    MutexLock lock(&tensors_[i].mutex);
    BEBOP_CHECK(!tensors_[i].busy && tensors_[i].next_row == slots_[i].shape[0]);
    digests.push_back(tensors_[i].hash.Finish());
  }
  return digests;
}

}  // namespace bebop
