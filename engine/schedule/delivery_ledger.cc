// SPDX-License-Identifier: Apache-2.0
#include "engine/schedule/delivery_ledger.h"

#include <algorithm>
#include <utility>

#include "kernels/common/check.h"

namespace bebop {

DeliveryLedger::DeliveryLedger(int64_t max_bytes, absl::Duration time_to_live)
    : max_bytes_(max_bytes), time_to_live_(time_to_live) {}

int64_t DeliveryLedger::SampleBytes(const SampleResult& sample) {
  const size_t values = sample.token_ids.capacity() + sample.logprobs.capacity() + sample.raw_logprobs.capacity() +
                        sample.entropy.capacity() + sample.draft_logprobs.capacity() + sample.token_source.capacity();
  size_t bytes = sizeof(SampleResult) + 4 * values + (sample.stop_string ? sample.stop_string->capacity() : 0);
  for (const WeightSpan& span : sample.weight_spans) bytes += sizeof(WeightSpan) + span.label.capacity();
  return static_cast<int64_t>(bytes);
}

DeliveryLedger::Entry* DeliveryLedger::Find(const std::string& id) {
  const auto it = entries_.find(id);
  return it == entries_.end() ? nullptr : it->second.get();
}

DeliveryLedger::Entry* DeliveryLedger::Open(const std::string& id, uint64_t body_hash, int32_t num_samples,
                                            std::shared_ptr<GenerateObserver> observer) {
  std::unique_ptr<Entry>& entry = entries_[id];
  BEBOP_CHECK(entry == nullptr);
  entry = std::make_unique<Entry>();
  entry->id_ = id;
  entry->body_hash_ = body_hash;
  entry->num_samples_ = static_cast<size_t>(num_samples);
  entry->samples_.reserve(static_cast<size_t>(num_samples));
  entry->observers_.push_back(std::move(observer));
  return entry.get();
}

void DeliveryLedger::Attach(Entry* entry, std::shared_ptr<GenerateObserver> observer) {
  if (entry->admitted_) observer->OnAdmitted();
  for (const auto& sample : entry->samples_) observer->OnSample(sample);
  if (entry->ended_) {
    observer->OnDone(absl::OkStatus());
  } else {
    entry->observers_.push_back(std::move(observer));
  }
}

bool DeliveryLedger::Detach(Entry* entry, const GenerateObserver* observer) {
  auto& observers = entry->observers_;
  const auto it = std::find_if(observers.begin(), observers.end(), [&](const auto& held) { return held.get() == observer; });
  if (it == observers.end()) return false;
  observers.erase(it);
  return observers.empty() && !entry->ended_;
}

void DeliveryLedger::Admitted(Entry* entry) {
  BEBOP_CHECK(!entry->ended_ && !entry->admitted_);
  entry->admitted_ = true;
  for (const auto& observer : entry->observers_) observer->OnAdmitted();
}

void DeliveryLedger::Tokens(Entry* entry, const SampleResult& partial, int32_t begin) {
  BEBOP_CHECK(!entry->ended_ && entry->ended_indexes_.count(partial.sample_index) == 0);
  for (const auto& observer : entry->observers_) observer->OnTokens(partial, begin);
}

void DeliveryLedger::Sample(Entry* entry, SampleResult sample) {
  BEBOP_CHECK(!entry->ended_ && entry->samples_.size() < entry->num_samples_);
  BEBOP_CHECK(entry->ended_indexes_.insert(sample.sample_index).second);
  const int64_t bytes = SampleBytes(sample);
  entry->bytes_ += bytes;
  bytes_ += bytes;
  entry->samples_.push_back(std::make_shared<const SampleResult>(std::move(sample)));
  for (const auto& observer : entry->observers_) observer->OnSample(entry->samples_.back());
  EvictOverBudget();
}

void DeliveryLedger::Done(Entry* entry, const absl::Status& status, bool retain, absl::Time now) {
  BEBOP_CHECK(!entry->ended_ && entry->samples_.size() == entry->num_samples_ && (status.ok() || !retain));
  entry->ended_ = true;
  const std::vector<std::shared_ptr<GenerateObserver>> observers = std::move(entry->observers_);
  entry->observers_.clear();
  for (const auto& observer : observers) observer->OnDone(status);
  if (retain && time_to_live_ > absl::ZeroDuration()) {
    entry->expiry_ = now + time_to_live_;
    retained_.push_back(entry);
    EvictOverBudget();
  } else {
    Erase(entry);
  }
}

void DeliveryLedger::Forget(Entry* entry) {
  BEBOP_CHECK(!entry->ended_);
  Erase(entry);
}

bool DeliveryLedger::HasRoom(const Entry* entry) const {
  for (const auto& observer : entry->observers_) {
    if (!observer->HasRoom()) return false;
  }
  return true;
}

void DeliveryLedger::Expire(absl::Time now) {
  while (!retained_.empty() && retained_.front()->expiry_ <= now) {
    Entry* const oldest = retained_.front();
    retained_.pop_front();
    Erase(oldest);
  }
}

absl::Time DeliveryLedger::NextExpiry() const {
  return retained_.empty() ? absl::InfiniteFuture() : retained_.front()->expiry_;
}

void DeliveryLedger::Erase(Entry* entry) {
  bytes_ -= entry->bytes_;
  entries_.erase(entries_.find(entry->id_));
}

void DeliveryLedger::EvictOverBudget() {
  while (bytes_ > max_bytes_ && !retained_.empty()) {
    Entry* const oldest = retained_.front();
    retained_.pop_front();
    Erase(oldest);
  }
}

}  // namespace bebop
