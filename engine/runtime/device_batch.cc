// SPDX-License-Identifier: Apache-2.0
#include "engine/runtime/device_batch.h"

#include <algorithm>
#include <cstring>

#include "engine/base/status_macros.h"
#include "kernels/common/check.h"

namespace bebop {
namespace {

constexpr int64_t kAlignment = 16;  // of each array: whole 16-byte loads

// Where the arrays of a batch lie behind each other.
struct Layout {
  int64_t tokens = 0, row_sequence = 0, row_position = 0, sequences = 0, page_ids = 0, bytes = 0;
  Layout(int64_t num_rows, int64_t num_sequences, int64_t num_page_entries) {
    const auto take = [this](int64_t count, int64_t element_bytes) {
      const int64_t begin = bytes;
      bytes += (count * element_bytes + kAlignment - 1) / kAlignment * kAlignment;
      return begin;
    };
    tokens = take(num_rows, sizeof(uint32_t));
    row_sequence = take(num_rows, sizeof(int32_t));
    row_position = take(num_rows, sizeof(int32_t));
    sequences = take(num_sequences, sizeof(SequenceRows));
    page_ids = take(num_page_entries, sizeof(int32_t));
  }
};

}  // namespace

int64_t DeviceBatch::Bytes(int64_t max_rows, int64_t max_sequences, int64_t max_page_entries) {
  return Layout(max_rows, max_sequences, max_page_entries).bytes;
}

absl::StatusOr<std::unique_ptr<DeviceBatch>> DeviceBatch::Create(int64_t max_rows, int64_t max_sequences, int64_t max_page_entries,
                                                                 DeviceMemory* memory) {
  std::unique_ptr<DeviceBatch> batch(new DeviceBatch(memory));
  if (memory->is_host()) return batch;
  const int64_t bytes = Bytes(max_rows, max_sequences, max_page_entries);
  BEBOP_ASSIGN_OR_RETURN(batch->arrays_, memory->Allocate(bytes, "batch arrays"));
  batch->staging_.resize(static_cast<size_t>(bytes));
  return batch;
}

void DeviceBatch::Upload(const BatchBuilder& builder) {
  view_ = builder.View();
  tokens_ = builder.tokens();
  for (int32_t s = 0; s < view_.num_sequences; ++s) {
    const SequenceRows& sequence = view_.sequences[s];
    view_.max_sequence_rows = std::max(view_.max_sequence_rows, sequence.num_rows);
    view_.max_positions = std::max(view_.max_positions, sequence.first_position + sequence.num_rows);
  }
  if (memory_.is_host()) return;

  const Layout layout(view_.num_rows, view_.num_sequences, builder.num_page_entries());
  BEBOP_CHECK(layout.bytes <= static_cast<int64_t>(staging_.size()));
  char* const device = static_cast<char*>(arrays_.get());
  const auto place = [&](auto** array, int64_t offset, int64_t count) {
    using Element = std::remove_pointer_t<std::remove_reference_t<decltype(*array)>>;
    if (count > 0) std::memcpy(staging_.data() + offset, *array, static_cast<size_t>(count) * sizeof(Element));
    *array = reinterpret_cast<Element*>(device + offset);
  };
  place(&tokens_, layout.tokens, view_.num_rows);
  place(&view_.row_sequence, layout.row_sequence, view_.num_rows);
  place(&view_.row_position, layout.row_position, view_.num_rows);
  place(&view_.sequences, layout.sequences, view_.num_sequences);
  place(&view_.page_ids, layout.page_ids, builder.num_page_entries());
  memory_.CopyIn(device, staging_.data(), layout.bytes);
}

}  // namespace bebop
