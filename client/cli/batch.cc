// SPDX-License-Identifier: Apache-2.0
#include "client/cli/batch.h"

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>

#include "absl/strings/str_cat.h"
#include "client/cpp/client.h"

namespace bebop {

namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;

// Empties the lists of `merged` that `line` sets, at every depth.
void ClearListsOf(const Message& line, Message* merged) {
  const auto* reflection = line.GetReflection();
  std::vector<const FieldDescriptor*> fields;
  reflection->ListFields(line, &fields);
  for (const FieldDescriptor* field : fields) {
    if (field->is_repeated()) {
      reflection->ClearField(merged, field);
    } else if (field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) {
      ClearListsOf(reflection->GetMessage(line, field), reflection->MutableMessage(merged, field));
    }
  }
}

}  // namespace

void FillUnset(const Message& flags, Message* line) {
  const std::unique_ptr<Message> merged(flags.New());
  merged->CopyFrom(flags);
  ClearListsOf(*line, merged.get());
  merged->MergeFrom(*line);
  line->CopyFrom(*merged);
}

absl::Status MalformedLine(int64_t number, const absl::Status& parsed) {
  return WithReason(absl::InvalidArgumentError(absl::StrCat("line ", number, ": ", parsed.message())), "MALFORMED_LINE");
}

void RunOrdered(size_t count, int32_t concurrency, const std::function<void(size_t)>& call, const std::function<void(size_t)>& print) {
  std::mutex mutex;
  std::condition_variable finished;
  std::vector<bool> done(count, false);  // guarded by `mutex`
  std::atomic<size_t> next = 0;
  const auto work = [&] {
    for (size_t i = next++; i < count; i = next++) {
      call(i);
      const std::lock_guard<std::mutex> lock(mutex);
      done[i] = true;
      finished.notify_one();
    }
  };
  std::vector<std::thread> threads;
  const size_t num_threads = std::min(count, static_cast<size_t>(std::max(1, concurrency)));
  for (size_t i = 0; i < num_threads; ++i) threads.emplace_back(work);
  for (size_t i = 0; i < count; ++i) {
    {
      std::unique_lock<std::mutex> lock(mutex);
      finished.wait(lock, [&] { return done[i]; });
    }
    print(i);
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace bebop
