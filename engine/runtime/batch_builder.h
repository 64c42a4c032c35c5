// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/common/ragged_batch.h"

namespace bebop {

// A ragged batch under construction, with the arrays that back its views. Reused from step to step; allocates only beyond what
// Reserve foresaw.
class BatchBuilder {
 public:
  void Reserve(int64_t rows, int64_t sequences, int64_t page_entries) {
    tokens_.reserve(rows);
    row_sequence_.reserve(rows);
    row_position_.reserve(rows);
    sequences_.reserve(sequences);
    page_ids_.reserve(page_entries);
  }
  void Clear() {
    tokens_.clear();
    row_sequence_.clear();
    row_position_.clear();
    sequences_.clear();
    page_ids_.clear();
  }
  // Starts a sequence whose first row has absolute position `first_position`; AddRow appends its rows, all known.
  void AddSequence(int32_t first_position, std::span<const int32_t> pages) {
    SequenceRows& sequence = sequences_.emplace_back();
    sequence.first_row = num_rows();
    sequence.first_position = first_position;
    sequence.first_page = static_cast<int32_t>(page_ids_.size());
    page_ids_.insert(page_ids_.end(), pages.begin(), pages.end());
  }
  void AddRow(uint32_t token) {
    SequenceRows& sequence = sequences_.back();
    row_sequence_.push_back(static_cast<int32_t>(sequences_.size()) - 1);
    row_position_.push_back(sequence.first_position + sequence.num_rows);
    tokens_.push_back(token);
    ++sequence.num_rows;
    ++sequence.num_known_rows;
  }
  // The sequence added last, to set what is not rows.
  SequenceRows& last_sequence() { return sequences_.back(); }
  int64_t num_page_entries() const { return static_cast<int64_t>(page_ids_.size()); }
  int32_t num_rows() const { return static_cast<int32_t>(tokens_.size()); }
  const uint32_t* tokens() const { return tokens_.data(); }
  // Valid until the next change.
  RaggedBatch View() const {
    return {.num_sequences = static_cast<int32_t>(sequences_.size()),
            .num_rows = num_rows(),
            .sequences = sequences_.data(),
            .page_ids = page_ids_.data(),
            .row_sequence = row_sequence_.data(),
            .row_position = row_position_.data()};
  }

 private:
  std::vector<uint32_t> tokens_;
  std::vector<int32_t> row_sequence_, row_position_, page_ids_;
  std::vector<SequenceRows> sequences_;
};

}  // namespace bebop
