// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels/common/cpu_features.h"
#include "kernels/common/ragged_batch.h"
#include "kernels/common/tensor_view.h"

// What the tests of the CPU operators share.
namespace bebop::testing {

inline constexpr double kUnit = 0x1.0p-24;  // half a unit in the last place of a float in [1, 2)
inline constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// The instruction sets of this processor whose kernels differ.
inline std::vector<cpu::InstructionSet> InstructionSets() {
  std::vector<cpu::InstructionSet> sets;
  for (const auto set : {cpu::InstructionSet::kPortable, cpu::InstructionSet::kAvx2, cpu::InstructionSet::kAvx512}) {
    if (set <= cpu::DetectInstructionSet()) sets.push_back(set);
  }
  return sets;
}

// Reproducible numbers (splitmix64).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t Next() {
    uint64_t z = (state_ += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  int32_t Below(int32_t bound) { return static_cast<int32_t>(Next() % static_cast<uint64_t>(bound)); }
  float Uniform(float low, float high) { return low + (high - low) * static_cast<float>(Next() >> 40) * 0x1.0p-24f; }
  // About normal: the sum of four uniforms, scaled to variance 1.
  float Normal() { return (Uniform(-1, 1) + Uniform(-1, 1) + Uniform(-1, 1) + Uniform(-1, 1)) * 0.8660254f; }
  std::vector<float> Normals(int64_t count, float scale = 1.0f) {
    std::vector<float> out(static_cast<size_t>(count));
    for (float& value : out) value = Normal() * scale;
    return out;
  }

 private:
  uint64_t state_;
};

// Equal bit for bit, so that NaN equals itself and -0 differs from 0.
inline bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}
inline bool SameBits(const float* a, const float* b, int64_t count) {
  return std::memcmp(a, b, static_cast<size_t>(count) * sizeof(float)) == 0;
}

// A matrix whose rows lie further apart than they are long; the gaps hold NaN, so that reading one shows in the result.
class PaddedMatrix {
 public:
  PaddedMatrix(int64_t rows, int64_t cols, int64_t gap = 5)
      : rows_(rows), cols_(cols), stride_(cols + gap), data_(static_cast<size_t>(rows * stride_), kNan) {}
  PaddedMatrix(const std::vector<float>& values, int64_t rows, int64_t cols, int64_t gap = 5) : PaddedMatrix(rows, cols, gap) {
    for (int64_t r = 0; r < rows; ++r) std::memcpy(Row(r), &values[static_cast<size_t>(r * cols)], static_cast<size_t>(cols) * 4);
  }
  TensorView View() { return {data_.data(), DType::kFloat32, rows_, cols_, stride_}; }
  float* Row(int64_t row) { return data_.data() + row * stride_; }
  // The rows without the gaps.
  std::vector<float> Values() {
    std::vector<float> out;
    for (int64_t r = 0; r < rows_; ++r) out.insert(out.end(), Row(r), Row(r) + cols_);
    return out;
  }
  bool GapsUntouched() {
    for (int64_t r = 0; r < rows_; ++r) {
      for (int64_t c = cols_; c < stride_; ++c) {
        if (!std::isnan(Row(r)[c])) return false;
      }
    }
    return true;
  }

 private:
  int64_t rows_, cols_, stride_;
  std::vector<float> data_;
};

// A batch and what it points to.
struct OwnedBatch {
  std::vector<SequenceRows> sequences;
  std::vector<int32_t> page_ids;
  std::vector<int32_t> row_sequence;
  std::vector<int32_t> row_position;

  // Appends a sequence; first_row follows the last one. `pages` may be empty.
  void Add(SequenceRows sequence, const std::vector<int32_t>& pages = {}) {
    sequence.first_row = static_cast<int32_t>(row_sequence.size());
    sequence.first_page = static_cast<int32_t>(page_ids.size());
    for (int32_t i = 0; i < sequence.num_rows; ++i) {
      row_sequence.push_back(static_cast<int32_t>(sequences.size()));
      row_position.push_back(sequence.first_position + i);
    }
    page_ids.insert(page_ids.end(), pages.begin(), pages.end());
    sequences.push_back(sequence);
  }
  int32_t num_rows() const { return static_cast<int32_t>(row_sequence.size()); }
  RaggedBatch View() const {
    return {static_cast<int32_t>(sequences.size()),
            num_rows(),
            sequences.data(),
            page_ids.data(),
            row_sequence.data(),
            row_position.data()};
  }
};

// The recurrent state of one layer, all slots, filled with NaN: reading what nobody wrote shows.
struct OwnedLinearState {
  OwnedLinearState(int32_t num_slots, int32_t window, int32_t key_heads, int32_t value_heads, int32_t key_dim, int32_t value_dim,
                   int32_t conv_width) {
    view.num_slots = num_slots;
    view.window = window;
    view.num_key_heads = key_heads;
    view.num_value_heads = value_heads;
    view.key_head_dim = key_dim;
    view.value_head_dim = value_dim;
    view.conv_width = conv_width;
    matrix.assign(static_cast<size_t>(int64_t{num_slots} * MatrixSize()), kNan);
    conv_inputs.assign(static_cast<size_t>(int64_t{num_slots} * ConvSize()), kNan);
    window_k.assign(static_cast<size_t>(int64_t{num_slots} * window * key_heads * key_dim), kNan);
    window_v.assign(static_cast<size_t>(int64_t{num_slots} * window * value_heads * value_dim), kNan);
    window_gate.assign(static_cast<size_t>(int64_t{num_slots} * window * value_heads * 2), kNan);
    view.matrix = matrix.data();
    view.conv_inputs = conv_inputs.data();
    view.window_k = window_k.data();
    view.window_v = window_v.data();
    view.window_gate = window_gate.data();
  }
  OwnedLinearState(const OwnedLinearState&) = delete;
  OwnedLinearState& operator=(const OwnedLinearState&) = delete;

  int64_t MatrixSize() const { return int64_t{view.num_value_heads} * view.key_head_dim * view.value_head_dim; }
  int64_t ConvSize() const { return int64_t{view.conv_width - 1 + view.window} * view.conv_channels(); }
  std::vector<float> Matrix(int32_t slot) const { return Part(matrix, slot); }
  std::vector<float> ConvHistory(int32_t slot) const {  // the committed rows
    std::vector<float> out = Part(conv_inputs, slot);
    out.resize(static_cast<size_t>(int64_t{view.conv_width - 1} * view.conv_channels()));
    return out;
  }
  // Everything that a slot holds.
  std::vector<float> Slot(int32_t slot) const {
    std::vector<float> out;
    for (const std::vector<float>* array : {&matrix, &conv_inputs, &window_k, &window_v, &window_gate}) {
      const std::vector<float> part = Part(*array, slot);
      out.insert(out.end(), part.begin(), part.end());
    }
    return out;
  }

  LinearStateView view;
  std::vector<float> matrix, conv_inputs, window_k, window_v, window_gate;

 private:
  std::vector<float> Part(const std::vector<float>& array, int32_t slot) const {
    const auto size = static_cast<std::ptrdiff_t>(array.size()) / view.num_slots;
    return {array.begin() + slot * size, array.begin() + (slot + 1) * size};
  }
};

}  // namespace bebop::testing
