// SPDX-License-Identifier: Apache-2.0
#include "engine/weights/resident_tensor.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "engine/base/status_macros.h"
#include "engine/weights/row_blocks.h"
#include "kernels/common/check.h"
#include "kernels/linear/packed_matrix.h"

namespace bebop {
namespace {

constexpr int64_t kPieceBytes = 1 << 18;  // stays in a second-level cache between two uses

// In panels, 4 bytes of a row (a float, or a pair of bfloat16 columns) lie this far from the next 4 of the same row.
constexpr int64_t kGroupStride = 4 * kPanelRows;

// Columns [begin, end) of one row of a panel matrix, whose first 4 bytes are at `row`. `bytes` are those of the columns alone.
template <bool kToPanels>
void MoveSameType(char* row, int64_t element_bytes, int64_t begin, int64_t end, char* bytes) {
  const auto move = [](char* panel, char* linear, auto width) {
    kToPanels ? std::memcpy(panel, linear, width()) : std::memcpy(linear, panel, width());
  };
  if (element_bytes == 2 && begin < end && begin % 2 != 0) {  // the second half of a pair
    move(row + begin / 2 * kGroupStride + 2, bytes, [] { return size_t{2}; });
    bytes += 2;
    ++begin;
  }
  const int64_t per_group = 4 / element_bytes;
  char* panel = row + begin / per_group * kGroupStride;
  const int64_t num_groups = (end - begin) / per_group;
  for (int64_t group = 0; group < num_groups; ++group)
    move(panel + group * kGroupStride, bytes + group * 4, [] { return size_t{4}; });
  if (num_groups * per_group < end - begin)
    move(panel + num_groups * kGroupStride, bytes + num_groups * 4, [] { return size_t{2}; });
}

// The same where `bytes` are bfloat16 and the panels float32: a bfloat16 is the upper half of its float, also if it is a NaN.
template <bool kToPanels>
void MoveHalves(char* row, int64_t begin, int64_t end, char* bytes) {
  for (int64_t col = begin; col < end; ++col, bytes += 2) {
    char* const panel = row + col * kGroupStride;
    if constexpr (kToPanels) {
      uint16_t word;
      std::memcpy(&word, bytes, sizeof(word));
      const uint32_t wide = static_cast<uint32_t>(word) << 16;
      std::memcpy(panel, &wide, sizeof(wide));
    } else {
      std::memcpy(bytes, panel + 2, 2);
    }
  }
}

}  // namespace

ResidentTensor::ResidentTensor(const TensorSlot& slot, DType form, DeviceMemory* memory)
    : slot_(slot), form_(form), memory_(memory), num_bytes_(SlotElements(slot) * ElementBytes(form)) {
  BEBOP_CHECK(form == DType::kBFloat16 || ResidentType(slot) == DType::kFloat32);
}

void ResidentTensor::Write(int64_t offset, std::string_view bytes) const {
  Move<Direction::kWrite>(offset, static_cast<int64_t>(bytes.size()), const_cast<char*>(bytes.data()));
}

void ResidentTensor::Read(int64_t offset, int64_t size, char* out) const { Move<Direction::kRead>(offset, size, out); }

template <ResidentTensor::Direction kDirection>
void ResidentTensor::Move(int64_t offset, int64_t size, char* bytes) const {
  const int64_t width = ElementBytes(form_);
  BEBOP_CHECK(offset >= 0 && size >= 0 && offset <= num_bytes_ - size && offset % width == 0 && size % width == 0);
  if (slot_.values == nullptr && slot_.matrix.layout == MatrixLayout::kPanels) {
    MovePanels<kDirection>(offset / width, size / width, bytes);
  } else {
    MoveRows<kDirection>(offset / width, size / width, bytes);
  }
}

template <ResidentTensor::Direction kDirection>
void ResidentTensor::MovePanels(int64_t first, int64_t count, char* bytes) const {
  constexpr bool kToPanels = kDirection == Direction::kWrite;
  // Columns of a panel that are moved row after row, so that its cache lines, which all rows share, are fetched once.
  constexpr int64_t kBlockCols = 256;
  const PackedMatrix& matrix = slot_.matrix;
  const int64_t cols = matrix.cols, form_bytes = ElementBytes(form_), stored_bytes = ElementBytes(matrix.dtype);
  const int64_t panel_row_bytes = RoundUp(cols, kPanelCols) * stored_bytes;  // bytes of a panel for each of its rows
  char* const base = static_cast<char*>(const_cast<void*>(matrix.data));
  const auto move = [&](int64_t row, int64_t begin, int64_t end) {
    const int64_t matrix_row = slot_.first_row + row;
    char* const panel = base + matrix_row / kPanelRows * kPanelRows * panel_row_bytes + matrix_row % kPanelRows * 4;
    char* const linear = bytes + (row * cols + begin - first) * form_bytes;
    form_bytes == stored_bytes ? MoveSameType<kToPanels>(panel, stored_bytes, begin, end, linear)
                               : MoveHalves<kToPanels>(panel, begin, end, linear);
  };
  const int64_t end = first + count;
  for (int64_t at = first; at < end;) {
    const int64_t row = at / cols;
    const int64_t whole_rows = at % cols == 0 ? (end - at) / cols : 0;
    if (whole_rows == 0) {  // a row that begins before the range or ends after it
      const int64_t row_end = std::min(end, (row + 1) * cols);
      move(row, at % cols, row_end - row * cols);
      at = row_end;
      continue;
    }
    const int64_t num_rows = std::min(whole_rows, kPanelRows - (slot_.first_row + row) % kPanelRows);
    for (int64_t col = 0; col < cols; col += kBlockCols) {
      for (int64_t r = row; r < row + num_rows; ++r) move(r, col, std::min(col + kBlockCols, cols));
    }
    at += num_rows * cols;
  }
}

template <ResidentTensor::Direction kDirection>
void ResidentTensor::MoveRows(int64_t first, int64_t count, char* bytes) const {
  const int64_t stored_bytes = ElementBytes(ResidentType(slot_));
  char* base = reinterpret_cast<char*>(slot_.values);
  if (base == nullptr) {
    base = static_cast<char*>(const_cast<void*>(slot_.matrix.data)) + slot_.first_row * slot_.matrix.cols * stored_bytes;
  }
  base += first * stored_bytes;
  if (stored_bytes == ElementBytes(form_)) {
    kDirection == Direction::kWrite ? memory_->CopyIn(base, bytes, count * stored_bytes)
                                    : memory_->CopyOut(bytes, base, count * stored_bytes);
    return;
  }
  thread_local std::vector<uint32_t> wide;
  constexpr int64_t kPiece = kPieceBytes / 4;
  wide.resize(static_cast<size_t>(std::min(count, kPiece)));
  for (int64_t done = 0; done < count; done += kPiece) {
    const int64_t piece = std::min(kPiece, count - done);
    if constexpr (kDirection == Direction::kRead) memory_->CopyOut(wide.data(), base + done * 4, piece * 4);
    for (int64_t i = 0; i < piece; ++i) {
      uint16_t word;
      if constexpr (kDirection == Direction::kWrite) {
        std::memcpy(&word, bytes + (done + i) * 2, sizeof(word));
        wide[static_cast<size_t>(i)] = static_cast<uint32_t>(word) << 16;
      } else {
        word = static_cast<uint16_t>(wide[static_cast<size_t>(i)] >> 16);
        std::memcpy(bytes + (done + i) * 2, &word, sizeof(word));
      }
    }
    if constexpr (kDirection == Direction::kWrite) memory_->CopyIn(base + done * 4, wide.data(), piece * 4);
  }
}

ArenaRange RangeOf(const TensorSlot& slot) {
  if (slot.values != nullptr) return {slot.values, SlotElements(slot) * ElementBytes(DType::kFloat32)};
  const PackedMatrix& matrix = slot.matrix;
  char* const base = static_cast<char*>(const_cast<void*>(matrix.data));
  const bool panels = matrix.layout == MatrixLayout::kPanels;
  const int64_t row_bytes = (panels ? RoundUp(matrix.cols, kPanelCols) : matrix.cols) * ElementBytes(matrix.dtype);
  const int64_t num_rows = panels ? RoundUp(slot.shape[0], kPanelRows) : slot.shape[0];
  return {base + slot.first_row * row_bytes, num_rows * row_bytes};
}

Sha256Digest ResidentDigest(const ResidentTensor& tensor) {
  Sha256 hash;
  std::vector<char> piece(static_cast<size_t>(std::min(tensor.num_bytes(), kPieceBytes)));
  for (int64_t offset = 0; offset < tensor.num_bytes(); offset += kPieceBytes) {
    const int64_t size = std::min(kPieceBytes, tensor.num_bytes() - offset);
    tensor.Read(offset, size, piece.data());
    hash.Update({piece.data(), static_cast<size_t>(size)});
  }
  return hash.Finish();
}

absl::StatusOr<WeightVersion> RecomputeVersion(const ModelConfig& config, const ModelWeights& weights, DeviceMemory* memory) {
  const std::vector<TensorSlot> slots = SlotsOf(config, weights);
  WeightVersion version = weights.version;
  BEBOP_CHECK(version.tensors.size() == slots.size());
  std::vector<Sha256Digest> digests;
  for (size_t i = 0; i < slots.size(); ++i)
    digests.push_back(ResidentDigest(ResidentTensor(slots[i], version.tensors[i].form, memory)));
  BEBOP_RETURN_IF_ERROR(memory->status());
  version.SetDigests(digests);
  return version;
}

}  // namespace bebop
