// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "kernels/common/cuda_stream.h"
#include "kernels/common/dtype.h"
#include "kernels/common/ragged_batch.h"
#include "kernels/common/tensor_view.h"
#include "tests/kernels/kernel_test_util.h"

// What the tests of the CUDA operators share: device copies of host data, with poison around them. Every test derives from CudaTest.
namespace bebop::testing {

// Memory of the device that holds `count` values of T between two guard zones of NaN patterns (0xff bytes), which GuardsUntouched checks.
template <typename T>
class DeviceArray {
 public:
  static constexpr int64_t kGuardBytes = 256;
  explicit DeviceArray(int64_t count) : count_(count) {
    EXPECT_EQ(cudaMalloc(&base_, static_cast<size_t>(bytes() + 2 * kGuardBytes)), cudaSuccess);
    EXPECT_EQ(cudaMemset(base_, 0xff, static_cast<size_t>(bytes() + 2 * kGuardBytes)), cudaSuccess);
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(static_cast<int64_t>(values.size())) { Upload(values); }
  ~DeviceArray() { (void)cudaFree(base_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* data() const { return reinterpret_cast<T*>(static_cast<char*>(base_) + kGuardBytes); }
  int64_t count() const { return count_; }
  int64_t bytes() const { return count_ * static_cast<int64_t>(sizeof(T)); }
  void Upload(const std::vector<T>& values) {
    ASSERT_EQ(static_cast<int64_t>(values.size()), count_);
    if (count_ == 0) return;
    ASSERT_EQ(cudaMemcpy(data(), values.data(), static_cast<size_t>(bytes()), cudaMemcpyHostToDevice), cudaSuccess);
  }
  // Waits for the device.
  std::vector<T> Download() const {
    std::vector<T> values(static_cast<size_t>(count_));
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    if (count_ == 0) return values;
    EXPECT_EQ(cudaMemcpy(values.data(), data(), static_cast<size_t>(bytes()), cudaMemcpyDeviceToHost), cudaSuccess);
    return values;
  }
  bool GuardsUntouched() const {
    std::vector<unsigned char> guard(kGuardBytes);
    for (const char* zone : {static_cast<const char*>(base_), static_cast<const char*>(base_) + kGuardBytes + bytes()}) {
      EXPECT_EQ(cudaMemcpy(guard.data(), zone, kGuardBytes, cudaMemcpyDeviceToHost), cudaSuccess);
      if (std::any_of(guard.begin(), guard.end(), [](unsigned char byte) { return byte != 0xff; })) return false;
    }
    return true;
  }

 private:
  const int64_t count_;
  void* base_ = nullptr;
};

// A matrix in device memory of float32 or bf16 whose rows lie further apart than they are long; gaps and unwritten values are NaN.
class DeviceMatrix {
 public:
  // `gap` elements between rows; keep it a multiple of 8 where an operator asks for aligned rows.
  DeviceMatrix(int64_t rows, int64_t cols, DType dtype, int64_t gap = 8)
      : rows_(rows), cols_(cols), stride_(cols + gap), dtype_(dtype), bytes_(rows * stride_ * ElementBytes(dtype)) {}
  // Values are rounded to dtype.
  DeviceMatrix(const std::vector<float>& values, int64_t rows, int64_t cols, DType dtype, int64_t gap = 8)
      : DeviceMatrix(rows, cols, dtype, gap) {
    Upload(values);
  }
  TensorView View() const { return {bytes_.data(), dtype_, rows_, cols_, stride_}; }

  void Upload(const std::vector<float>& values) {
    std::vector<unsigned char> raw(static_cast<size_t>(bytes_.count()), 0xff);
    for (int64_t r = 0; r < rows_; ++r) {
      for (int64_t c = 0; c < cols_; ++c) {
        const float value = values[static_cast<size_t>(r * cols_ + c)];
        unsigned char* const out = raw.data() + (r * stride_ + c) * ElementBytes(dtype_);
        if (dtype_ == DType::kFloat32) {
          std::memcpy(out, &value, 4);
        } else {
          const BFloat16 rounded = ToBFloat16(value);
          std::memcpy(out, &rounded, 2);
        }
      }
    }
    bytes_.Upload(raw);
  }
  // As float, without the gaps.
  std::vector<float> Values() const {
    const std::vector<unsigned char> raw = bytes_.Download();
    std::vector<float> values(static_cast<size_t>(rows_ * cols_));
    for (int64_t r = 0; r < rows_; ++r) {
      for (int64_t c = 0; c < cols_; ++c) values[static_cast<size_t>(r * cols_ + c)] = Element(raw, r, c);
    }
    return values;
  }
  bool GapsUntouched() const {
    const std::vector<unsigned char> raw = bytes_.Download();
    for (int64_t r = 0; r < rows_; ++r) {
      for (int64_t c = cols_; c < stride_; ++c) {
        if (!std::isnan(Element(raw, r, c))) return false;
      }
    }
    return bytes_.GuardsUntouched();
  }

 private:
  float Element(const std::vector<unsigned char>& raw, int64_t row, int64_t col) const {
    const unsigned char* const at = raw.data() + (row * stride_ + col) * ElementBytes(dtype_);
    if (dtype_ == DType::kFloat32) {
      float value;
      std::memcpy(&value, at, 4);
      return value;
    }
    BFloat16 value;
    std::memcpy(&value, at, 2);
    return ToFloat(value);
  }
  const int64_t rows_, cols_, stride_;
  const DType dtype_;
  DeviceArray<unsigned char> bytes_;
};

inline std::vector<float> RoundToBFloat16(std::vector<float> values) {
  for (float& value : values) value = ToFloat(ToBFloat16(value));
  return values;
}

// A device copy of an OwnedBatch, with the launch bounds filled in.
class DeviceBatchCopy {
 public:
  explicit DeviceBatchCopy(const OwnedBatch& batch)
      : sequences_(batch.sequences), page_ids_(batch.page_ids), row_sequence_(batch.row_sequence), row_position_(batch.row_position) {
    view_ = batch.View();
    view_.sequences = sequences_.data();
    view_.page_ids = page_ids_.data();
    view_.row_sequence = row_sequence_.data();
    view_.row_position = row_position_.data();
    for (const SequenceRows& sequence : batch.sequences) {
      view_.max_sequence_rows = std::max(view_.max_sequence_rows, sequence.num_rows);
      view_.max_positions = std::max(view_.max_positions, sequence.first_position + sequence.num_rows);
    }
  }
  const RaggedBatch& View() const { return view_; }

 private:
  DeviceArray<SequenceRows> sequences_;
  DeviceArray<int32_t> page_ids_, row_sequence_, row_position_;
  RaggedBatch view_;
};

// The recurrent state of one layer in device memory, copied from a host state (inputs rounded to `input_dtype`), and back.
class DeviceLinearState {
 public:
  DeviceLinearState(const OwnedLinearState& host, DType input_dtype)
      : matrix_(host.matrix),
        window_gate_(host.window_gate),
        conv_inputs_(host.conv_inputs, 1, static_cast<int64_t>(host.conv_inputs.size()), input_dtype, 0),
        window_k_(host.window_k, 1, static_cast<int64_t>(host.window_k.size()), input_dtype, 0),
        window_v_(host.window_v, 1, static_cast<int64_t>(host.window_v.size()), input_dtype, 0) {
    view_ = host.view;
    view_.matrix = matrix_.data();
    view_.window_gate = window_gate_.data();
    view_.conv_inputs = conv_inputs_.View().data;
    view_.window_k = window_k_.View().data;
    view_.window_v = window_v_.View().data;
    view_.input_dtype = input_dtype;
  }
  const LinearStateView& View() const { return view_; }
  // Overwrites the arrays of `host`.
  void Download(OwnedLinearState* host) const {
    host->matrix = matrix_.Download();
    host->window_gate = window_gate_.Download();
    host->conv_inputs = conv_inputs_.Values();
    host->window_k = window_k_.Values();
    host->window_v = window_v_.Values();
  }

 private:
  DeviceArray<float> matrix_, window_gate_;
  DeviceMatrix conv_inputs_, window_k_, window_v_;
  LinearStateView view_;
};

// Skips, saying why, where there is no device. `stream()` checks its error when the test ends.
class CudaTest : public ::testing::Test {
 protected:
  void SetUp() override {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || count == 0) {
      GTEST_SKIP() << "no CUDA device: " << (error != cudaSuccess ? cudaGetErrorString(error) : "none found");
    }
    stream_ = std::make_unique<cuda::Stream>(cuda::StreamOptions{.workspace_bytes = 64 << 20});
    ASSERT_TRUE(stream_->ok()) << stream_->error();
  }
  void TearDown() override {
    if (stream_ == nullptr) return;
    BEBOP_CUDA_TRY(*stream_, cudaStreamSynchronize(stream_->handle()));
    EXPECT_TRUE(stream_->ok()) << stream_->error();
  }
  cuda::Stream& stream() { return *stream_; }
  // A second stream whose operators are batch invariant.
  std::unique_ptr<cuda::Stream> MakeInvariantStream() {
    return std::make_unique<cuda::Stream>(cuda::StreamOptions{.batch_invariant = true, .workspace_bytes = 64 << 20});
  }

 private:
  std::unique_ptr<cuda::Stream> stream_;
};

}  // namespace bebop::testing
