// SPDX-License-Identifier: Apache-2.0
#include "engine/schedule/delivery_ledger.h"

#include <string>

#include "engine/schedule/request_queue.h"
#include "gtest/gtest.h"

namespace bebop {
namespace {

struct Recorder final : GenerateObserver {
  void OnAdmitted() override { log += "A"; }
  void OnTokens(const SampleResult& partial, int32_t begin) override {
    log += "t" + std::to_string(partial.sample_index) + ":" + std::to_string(begin);
  }
  void OnSample(const std::shared_ptr<const SampleResult>& sample) override { log += "s" + std::to_string(sample->sample_index); }
  void OnDone(const absl::Status& status) override { log += status.ok() ? "D" : "E"; }
  bool HasRoom() const override { return room; }
  std::string log;
  bool room = true;
};

SampleResult Sample(int32_t index, int32_t tokens = 1) {
  SampleResult sample;
  sample.sample_index = index;
  sample.token_ids.assign(static_cast<size_t>(tokens), 1u);
  return sample;
}

const absl::Time kNow = absl::FromUnixSeconds(100);

TEST(DeliveryLedger, TellsEveryObserverAndReplaysToLateOnes) {
  DeliveryLedger ledger(1 << 20, absl::Seconds(10));
  auto first = std::make_shared<Recorder>(), second = std::make_shared<Recorder>(), third = std::make_shared<Recorder>();
  auto* entry = ledger.Open("a", 1, 2, first);
  ledger.Admitted(entry);
  ledger.Tokens(entry, Sample(0), 0);
  ledger.Sample(entry, Sample(1));
  ledger.Attach(entry, second);
  ledger.Sample(entry, Sample(0));
  ledger.Done(entry, absl::OkStatus(), true, kNow);
  EXPECT_EQ(first->log, "At0:0s1s0D");
  EXPECT_EQ(second->log, "As1s0D");
  ledger.Attach(ledger.Find("a"), third);
  EXPECT_EQ(third->log, "As1s0D");
  EXPECT_EQ(first.use_count(), 1) << "observers are let go of at the end";
}

TEST(DeliveryLedger, ResultsLiveForTheirTime) {
  DeliveryLedger ledger(1 << 20, absl::Seconds(10));
  auto* entry = ledger.Open("a", 1, 1, std::make_shared<Recorder>());
  ledger.Sample(entry, Sample(0));
  EXPECT_EQ(ledger.NextExpiry(), absl::InfiniteFuture());
  ledger.Done(entry, absl::OkStatus(), true, kNow);
  EXPECT_EQ(ledger.NextExpiry(), kNow + absl::Seconds(10));
  ledger.Expire(kNow + absl::Seconds(10) - absl::Nanoseconds(1));
  EXPECT_NE(ledger.Find("a"), nullptr);
  EXPECT_GT(ledger.bytes(), 0);
  ledger.Expire(kNow + absl::Seconds(10));
  EXPECT_EQ(ledger.Find("a"), nullptr);
  EXPECT_EQ(ledger.bytes(), 0);
}

TEST(DeliveryLedger, TheOldestRetainedGoFirstWhenBytesRunOut) {
  const int64_t each = DeliveryLedger::SampleBytes(Sample(0, 100));
  DeliveryLedger ledger(2 * each, absl::Seconds(10));
  for (const char* id : {"a", "b", "c"}) {
    auto* entry = ledger.Open(id, 1, 1, std::make_shared<Recorder>());
    ledger.Sample(entry, Sample(0, 100));
    ledger.Done(entry, absl::OkStatus(), true, kNow);
  }
  EXPECT_EQ(ledger.Find("a"), nullptr);
  EXPECT_NE(ledger.Find("b"), nullptr);
  EXPECT_NE(ledger.Find("c"), nullptr);
  EXPECT_EQ(ledger.bytes(), 2 * each);
  // Samples of a running request count, and stay.
  auto* running = ledger.Open("d", 1, 2, std::make_shared<Recorder>());
  ledger.Sample(running, Sample(0, 300));
  EXPECT_EQ(ledger.Find("b"), nullptr);
  EXPECT_EQ(ledger.Find("c"), nullptr);
  EXPECT_NE(ledger.Find("d"), nullptr);
}

TEST(DeliveryLedger, FailuresAndZeroTimeToLiveAreNotKept) {
  DeliveryLedger ledger(1 << 20, absl::ZeroDuration());
  auto observer = std::make_shared<Recorder>();
  auto* entry = ledger.Open("a", 1, 1, observer);
  ledger.Sample(entry, Sample(0));
  ledger.Done(entry, absl::InternalError("broken"), false, kNow);
  EXPECT_EQ(observer->log, "s0E");
  EXPECT_EQ(ledger.Find("a"), nullptr);
  entry = ledger.Open("b", 1, 1, observer);
  ledger.Sample(entry, Sample(0));
  ledger.Done(entry, absl::OkStatus(), true, kNow);
  EXPECT_EQ(ledger.Find("b"), nullptr);
  EXPECT_EQ(ledger.bytes(), 0);
}

TEST(DeliveryLedger, DetachTellsWhenNobodyIsLeft) {
  DeliveryLedger ledger(1 << 20, absl::Seconds(1));
  auto first = std::make_shared<Recorder>(), second = std::make_shared<Recorder>();
  auto* entry = ledger.Open("a", 1, 1, first);
  ledger.Attach(entry, second);
  EXPECT_FALSE(ledger.Detach(entry, first.get()));
  EXPECT_FALSE(ledger.Detach(entry, first.get())) << "unknown by now";
  ledger.Admitted(entry);
  EXPECT_EQ(first->log, "");
  EXPECT_TRUE(ledger.Detach(entry, second.get()));
  ledger.Forget(entry);
  EXPECT_EQ(ledger.Find("a"), nullptr);
}

TEST(DeliveryLedger, OneObserverWithoutRoomIsEnough) {
  DeliveryLedger ledger(1 << 20, absl::Seconds(1));
  auto first = std::make_shared<Recorder>(), second = std::make_shared<Recorder>();
  auto* entry = ledger.Open("a", 1, 1, first);
  ledger.Attach(entry, second);
  EXPECT_TRUE(ledger.HasRoom(entry));
  second->room = false;
  EXPECT_FALSE(ledger.HasRoom(entry));
}

TEST(DeliveryLedgerDeathTest, ASecondEndAborts) {
  DeliveryLedger ledger(1 << 20, absl::Seconds(1));
  auto* entry = ledger.Open("a", 1, 2, std::make_shared<Recorder>());
  ledger.Sample(entry, Sample(0));
  EXPECT_DEATH(ledger.Sample(entry, Sample(0)), "CHECK failed");
  EXPECT_DEATH(ledger.Done(entry, absl::OkStatus(), true, kNow), "CHECK failed") << "a sample is missing";
}

TEST(RequestQueue, OrdersByPriorityThenArrival) {
  RequestQueue queue(10, 1000);
  Work works[4];
  const int32_t priorities[] = {1, 0, 1, -3};
  for (int i = 0; i < 4; ++i) {
    works[i].priority = priorities[i];
    works[i].arrival = static_cast<uint64_t>(i);
    queue.Enter(&works[i]);
  }
  EXPECT_EQ(std::vector<Work*>(queue.order().begin(), queue.order().end()),
            (std::vector<Work*>{&works[3], &works[1], &works[0], &works[2]}));
}

TEST(RequestQueue, ChargesWhatHasNeverRun) {
  RequestQueue queue(2, 100);
  Work first, second;
  first.queued_bytes = 60;
  second.queued_bytes = 30;
  second.arrival = 1;
  EXPECT_TRUE(queue.CheckRoom(100).ok());
  queue.Enter(&first);
  EXPECT_TRUE(absl::IsResourceExhausted(queue.CheckRoom(41)));
  EXPECT_TRUE(queue.CheckRoom(40).ok());
  queue.Enter(&second);
  EXPECT_TRUE(absl::IsResourceExhausted(queue.CheckRoom(0))) << "by count";
  queue.Admit(&first);
  queue.Remove(&first);
  EXPECT_EQ(queue.num_bytes(), 30);
  queue.Return(&first);  // preempted: no charge
  EXPECT_EQ(queue.num_requests(), 1);
  EXPECT_EQ(*queue.order().begin(), &first);
  queue.Leave(&first);
  queue.Leave(&second);
  EXPECT_EQ(queue.num_bytes(), 0);
  EXPECT_EQ(queue.num_requests(), 0);
  EXPECT_TRUE(queue.order().empty());
}

}  // namespace
}  // namespace bebop
