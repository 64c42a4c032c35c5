// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "engine/config/model_config.h"
#include "engine/memory/model_state.h"
#include "engine/model/model.h"
#include "engine/weights/model_weights.h"
#include "kernels/common/thread_pool.h"

namespace bebop {

// A dense float matrix that owns its values.
struct Matrix {
  int64_t rows = 0, cols = 0;
  std::vector<float> values;

  Matrix() = default;
  Matrix(int64_t num_rows, int64_t num_cols) : rows(num_rows), cols(num_cols), values(num_rows * num_cols) {}
  TensorView view() { return FloatMatrix(values.data(), rows, cols); }
  std::span<const float> row(int64_t index) const { return {values.data() + index * cols, static_cast<size_t>(cols)}; }
  // Rows [begin, begin + count) as a copy.
  Matrix Rows(int64_t begin, int64_t count) const;
  void Append(const Matrix& other);
  bool operator==(const Matrix&) const = default;
};

struct HarnessOptions {
  DType kv_dtype = DType::kFloat32;
  int32_t page_tokens = 4;
  int32_t num_pages = 512;
  int32_t num_slots = 16;
  int32_t window = 5;
  int32_t num_threads = 2;
  int32_t max_rows = 512;
  int32_t num_padding_rows = 0;       // on a device: rows and sequences that stand for nobody, at the end of every batch
  int32_t num_padding_sequences = 0;
  uint32_t seed = 1;  // of the order in which pages and slots are handed out
};

// Runs a real Model over real state storage with the bookkeeping that the scheduler does in the engine, in its simplest form: pages
// handed out in random order, a new state slot for every pass (so that no test passes by reading a slot in place by accident), and
// storage filled with NaN at first (so that none passes by reading what nobody wrote).
class ModelHarness {
 public:
  // Where one sequence stands. Counters as in docs/engine_contract.md.
  struct Sequence {
    int32_t num_computed = 0;
    int32_t num_replay = 0;
    int32_t slot = -1;
    std::vector<int32_t> pages;
  };
  // Rows of one sequence in a target pass.
  struct TargetRows {
    Sequence* sequence = nullptr;
    std::vector<uint32_t> known, drafts;
  };
  // Rows of one sequence in an MTP step; the first of `next_tokens` is at position `first_position`.
  struct MtpRows {
    Sequence* sequence = nullptr;
    std::vector<uint32_t> next_tokens;
    int32_t first_position = 0;
  };

  ModelHarness(const ModelConfig& config, const ModelWeights* weights, const HarnessOptions& options);
  // The same on a device: `memory` and `ops`, which must outlive the harness, belong together, and `weights` lie in `memory`.
  ModelHarness(const ModelConfig& config, const ModelWeights* weights, const HarnessOptions& options, DType activation_dtype, DeviceMemory* memory,
               Ops* ops);

  // One pass over all rows, in order: hidden [T, H]. Known rows count as computed afterwards; Accept says how many drafts do.
  Matrix Target(const std::vector<TargetRows>& rows);
  // The first `count` drafts of the sequence's last pass were right.
  void Accept(Sequence& sequence, int32_t count);
  // `depth` 1: writes the MTP cache at the rows' positions (extend, and recurrent drafting). Chain(): teacher-forced depth > 1.
  Matrix Mtp(const std::vector<MtpRows>& rows, Matrix previous);

  // Teacher-forced depths after the first, for every base of one sequence in one pass a depth. Start with the outputs of depth 1,
  // one row a base; each Step gives depth 2, 3, ... for the bases [0, tokens.size()), tokens[t] = x_{t+depth}.
  class Chain {
   public:
    Chain(ModelHarness& harness, Sequence& sequence, Matrix depth1)
        : harness_(harness), sequence_(sequence), last_(std::move(depth1)) {}
    Matrix Step(std::span<const uint32_t> tokens);

   private:
    ModelHarness& harness_;
    Sequence& sequence_;
    Matrix last_;
    int32_t depth_ = 1;
    std::vector<std::shared_ptr<void>> k_, v_;  // one dense [rows, kv width] array a depth from 2 on
  };

  // A copy of `parent`: full pages are shared, a partly filled one is copied; the state is read from the parent's slot.
  Sequence Fork(const Sequence& parent);
  // Forgets the sequence's pages and slot (they are handed out again, with what is in them).
  void Release(Sequence& sequence);

  Matrix Logits(Matrix hidden);
  const ModelConfig& config() const { return config_; }
  const ModelState& state() const { return storage_->state(); }
  Model& model() { return *model_; }

 private:
  friend class Chain;
  void GrowPages(Sequence& sequence, int32_t num_tokens);
  int32_t TakeSlot();
  Matrix RunMtp(const std::vector<MtpRows>& rows, Matrix previous, const MtpChain* chain);
  // A batch under construction, and its arrays where the model reads them.
  struct Arrays {
    std::vector<uint32_t> tokens;
    std::vector<SequenceRows> sequences;
    std::vector<int32_t> page_ids, row_sequence, row_position;
    std::vector<std::shared_ptr<void>> memory;
    const uint32_t* device_tokens = nullptr;
    RaggedBatch batch;
  };
  void Upload(Arrays& arrays);
  // `matrix` as the model has activations, with room for padding rows; and the first rows of such a matrix.
  TensorView ToDevice(const Matrix& matrix, std::shared_ptr<void>* owner);
  TensorView NewRows(int64_t rows, int64_t cols, DType dtype, std::shared_ptr<void>* owner);
  Matrix FromDevice(const TensorView& view, int64_t rows);

  const ModelConfig config_;
  const HarnessOptions options_;
  ThreadPool pool_;
  const std::unique_ptr<DeviceMemory> own_memory_;  // null on a device
  const std::unique_ptr<Ops> own_ops_;
  DeviceMemory& memory_;
  const std::unique_ptr<Model> model_;
  std::unique_ptr<ModelStateStorage> storage_;
  std::vector<int32_t> free_pages_, page_uses_, free_slots_, slot_uses_;
};

// A config with every dimension odd enough to show a mix-up; `layers` is one letter a layer: L linear attention, F full attention.
ModelConfig TinyConfig(std::string_view layers);

}  // namespace bebop
