// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <functional>
#include <set>
#include <string_view>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "engine/base/mutex.h"
#include "engine/weights/row_blocks.h"
#include "engine/weights/weight_digest.h"
#include "engine/weights/weight_layout.h"

namespace bebop {

// Hashes tensors while several threads fill their blocks (ForEachBlock). SHA-256 takes a tensor's bytes in order, blocks get done
// in any: whoever finishes the block that a tensor waits for hashes it and all that follow and are done; the others go on
// filling. So no thread ever waits, and the threads share both kinds of work.
class DigestChain {
 public:
  // The bytes of a block in the tensor's form; may use `scratch`. Called for each block once, by any thread.
  using BlockBytes = std::function<std::string_view(const RowBlock& block, std::vector<char>& scratch)>;

  // `slots` must outlive the chain.
  DigestChain(const std::vector<TensorSlot>& slots, BlockBytes block_bytes);
  // Thread safe. REQUIRES: once a block.
  void BlockDone(const RowBlock& block);
  // The digests in slot order. REQUIRES: all blocks are done.
  std::vector<Sha256Digest> Finish();

 private:
  struct Later {
    bool operator()(const RowBlock& a, const RowBlock& b) const { return a.first_row < b.first_row; }
  };
  struct Tensor {
    Mutex mutex;
    bool busy ABSL_GUARDED_BY(mutex) = false;  // a thread is hashing
    int64_t next_row ABSL_GUARDED_BY(mutex) = 0;
    std::set<RowBlock, Later> done ABSL_GUARDED_BY(mutex);  // but not hashed
    Sha256 hash;                                            // of the thread that has set `busy`
  };

  const std::vector<TensorSlot>& slots_;
  const BlockBytes block_bytes_;
  std::vector<Tensor> tensors_;
};

}  // namespace bebop
