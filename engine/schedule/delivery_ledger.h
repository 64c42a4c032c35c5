// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "engine/schedule/request.h"

namespace bebop {

// Who is told what, exactly once: request ids with their observers and ended samples, while the request runs and, for idempotent
// repeats, for a while after it ended. Life of an entry:
//
//   Open ── Admitted, Tokens*, Sample×n ── Done(retain) ──▶ retained ── time to live over, or evicted for bytes ──▶ gone
//     └──── Done(no retain), or Forget (cancelled by its last observer) ──▶ gone
//
// Checks its callers: a sample delivered twice, Done before all samples, or anything after Done aborts the process.
// Not thread safe: the engine thread. Observers are called from within and must not call back.
class DeliveryLedger {
 public:
  class Entry {
   public:
    const std::string& id() const { return id_; }
    uint64_t body_hash() const { return body_hash_; }
    bool ended() const { return ended_; }
    size_t num_samples() const { return samples_.size(); }  // ended ones

   private:
    friend class DeliveryLedger;
    std::string id_;
    uint64_t body_hash_ = 0;
    std::vector<std::shared_ptr<GenerateObserver>> observers_;
    std::vector<std::shared_ptr<const SampleResult>> samples_;  // in order of their end; observers may share them
    std::set<int32_t> ended_indexes_;  // of samples; a resumed group need not have all from 0
    size_t num_samples_ = 0;
    bool admitted_ = false, ended_ = false;
    absl::Time expiry_ = absl::InfiniteFuture();
    int64_t bytes_ = 0;
  };

  // Ended samples are kept within `max_bytes`: retained entries go, oldest first, to make room; those of running requests stay (they
  // are needed for attaching, and bounded by what runs).
  DeliveryLedger(int64_t max_bytes, absl::Duration time_to_live);

  Entry* Find(const std::string& id);  // null: unknown
  // REQUIRES: Find(id) is null.
  Entry* Open(const std::string& id, uint64_t body_hash, int32_t num_samples, std::shared_ptr<GenerateObserver> observer);
  // Adds an observer and tells it what it missed: OnAdmitted, each ended sample, and OnDone(OK) when the request has ended (retained
  // entries ended well). The tokens so far of running samples are for the caller to add.
  void Attach(Entry* entry, std::shared_ptr<GenerateObserver> observer);
  // Removes an observer; true when it was there and no other is left of a request that has not ended.
  bool Detach(Entry* entry, const GenerateObserver* observer);

  void Admitted(Entry* entry);
  void Tokens(Entry* entry, const SampleResult& partial, int32_t begin);
  void Sample(Entry* entry, SampleResult sample);
  // Tells all observers the end and lets go of them. With `retain` the samples stay until `now` + time to live. `entry` may be gone
  // after the call. REQUIRES: all samples were delivered; status is OK when `retain`.
  void Done(Entry* entry, const absl::Status& status, bool retain, absl::Time now);
  // Drops an entry without telling anybody.
  void Forget(Entry* entry);

  // Whether every observer has room.
  bool HasRoom(const Entry* entry) const;

  void Expire(absl::Time now);      // drops retained entries whose time is over
  absl::Time NextExpiry() const;
  int64_t bytes() const { return bytes_; }
  // Host bytes that an ended sample takes.
  static int64_t SampleBytes(const SampleResult& sample);

 private:
  void Erase(Entry* entry);
  void EvictOverBudget();

  const int64_t max_bytes_;
  const absl::Duration time_to_live_;
  std::unordered_map<std::string, std::unique_ptr<Entry>> entries_;
  std::deque<Entry*> retained_;  // in order of their end, which is the order of their expiry
  int64_t bytes_ = 0;
};

}  // namespace bebop
