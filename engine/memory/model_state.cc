// SPDX-License-Identifier: Apache-2.0
#include "engine/memory/model_state.h"

#include <algorithm>
#include <string>

#include "engine/base/status_macros.h"
#include "engine/formats/strings.h"
#include "kernels/common/check.h"

namespace bebop {
namespace {

constexpr int64_t kAlignment = 256;  // of every array: what DeviceMemory gives

int64_t Aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Elements of k (as many as of v) in one page of one attention layer.
int64_t PageElements(const ModelConfig& config, const ModelStateOptions& options) {
  return static_cast<int64_t>(config.num_key_value_heads) * options.page_tokens * config.head_dim;
}

int32_t NumPagedLayers(const ModelConfig& config) { return config.num_full_attention_layers() + config.num_mtp_layers; }

// Bytes that one slot takes in each array of a LinearStateView.
struct SlotArrayBytes {
  int64_t matrix = 0, conv_inputs = 0, window_k = 0, window_v = 0, window_gate = 0;
  int64_t total() const { return matrix + conv_inputs + window_k + window_v + window_gate; }
};

SlotArrayBytes BytesPerSlot(const ModelConfig& config, const ModelStateOptions& options) {
  const int64_t window = options.window;
  const int64_t input = ElementBytes(options.input_dtype), wide = ElementBytes(DType::kFloat32);
  return {.matrix = wide * config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim,
          .conv_inputs = input * (config.linear_conv_kernel_dim - 1 + window) * config.conv_channels(),
          .window_k = input * window * config.linear_key_width(),
          .window_v = input * window * config.linear_value_width(),
          .window_gate = wide * window * config.linear_num_value_heads * 2};
}

// Hands out aligned arrays one after the other. Without memory (base null) it only counts, so one layout serves both uses.
class Carver {
 public:
  explicit Carver(char* base) : base_(base) {}
  char* Take(int64_t bytes) {
    char* const array = base_ == nullptr ? nullptr : base_ + used_;
    used_ += Aligned(bytes);
    return array;
  }
  int64_t used() const { return used_; }

 private:
  char* const base_;
  int64_t used_ = 0;
};

KvPagesView CarveKvPages(const ModelConfig& config, const ModelStateOptions& options, Carver& carver) {
  const int64_t bytes = options.num_pages * PageElements(config, options) * ElementBytes(options.kv_dtype);
  KvPagesView view;
  view.k = carver.Take(bytes);
  view.v = carver.Take(bytes);
  view.dtype = options.kv_dtype;
  view.num_pages = options.num_pages;
  view.page_tokens = options.page_tokens;
  view.num_kv_heads = config.num_key_value_heads;
  view.head_dim = config.head_dim;
  return view;
}

LinearStateView CarveLinearState(const ModelConfig& config, const ModelStateOptions& options, Carver& carver) {
  const SlotArrayBytes slot = BytesPerSlot(config, options);
  const int64_t num_slots = options.num_slots;
  LinearStateView view;
  view.matrix = reinterpret_cast<float*>(carver.Take(num_slots * slot.matrix));
  view.conv_inputs = carver.Take(num_slots * slot.conv_inputs);
  view.window_k = carver.Take(num_slots * slot.window_k);
  view.window_v = carver.Take(num_slots * slot.window_v);
  view.window_gate = reinterpret_cast<float*>(carver.Take(num_slots * slot.window_gate));
  view.input_dtype = options.input_dtype;
  view.num_slots = options.num_slots;
  view.window = options.window;
  view.num_key_heads = config.linear_num_key_heads;
  view.num_value_heads = config.linear_num_value_heads;
  view.key_head_dim = config.linear_key_head_dim;
  view.value_head_dim = config.linear_value_head_dim;
  view.conv_width = config.linear_conv_kernel_dim;
  return view;
}

ModelState CarveState(const ModelConfig& config, const ModelStateOptions& options, Carver& carver) {
  ModelState state;
  for (LayerKind kind : config.layers) {
    if (kind == LayerKind::kFullAttention) {
      state.kv.push_back(CarveKvPages(config, options, carver));
    } else {
      state.linear.push_back(CarveLinearState(config, options, carver));
    }
  }
  if (config.num_mtp_layers > 0) state.mtp_kv = CarveKvPages(config, options, carver);
  return state;
}

void CopyPageOf(const KvPagesView& pages, int32_t source, int32_t destination, DeviceMemory& memory) {
  BEBOP_CHECK(0 <= source && source < pages.num_pages && 0 <= destination && destination < pages.num_pages);
  const int64_t page_bytes =
      static_cast<int64_t>(pages.num_kv_heads) * pages.page_tokens * pages.head_dim * ElementBytes(pages.dtype);
  for (void* array : {pages.k, pages.v}) {
    char* const base = static_cast<char*>(array);
    memory.Copy(base + destination * page_bytes, base + source * page_bytes, page_bytes);
  }
}

}  // namespace

int64_t PageBytes(const ModelConfig& config, const ModelStateOptions& options) {
  return NumPagedLayers(config) * 2 * PageElements(config, options) * ElementBytes(options.kv_dtype);
}

int64_t SlotBytes(const ModelConfig& config, const ModelStateOptions& options) {
  return config.num_linear_attention_layers() * BytesPerSlot(config, options).total();
}

absl::StatusOr<std::unique_ptr<ModelStateStorage>> ModelStateStorage::Create(const ModelConfig& config, const ModelStateOptions& options,
                                                                             DeviceMemory* memory) {
  BEBOP_CHECK(options.num_pages >= 0 && options.page_tokens > 0 && options.num_slots >= 0 && options.window >= 0);
  std::unique_ptr<ModelStateStorage> storage(new ModelStateStorage(config, options, memory));
  BEBOP_RETURN_IF_ERROR(storage->Restore());
  return storage;
}

ModelStateStorage::ModelStateStorage(const ModelConfig& config, const ModelStateOptions& options, DeviceMemory* memory)
    : config_(config), options_(options), memory_(memory) {}

absl::Status ModelStateStorage::Restore() {
  if (!released()) return absl::OkStatus();
  Carver counter(nullptr);
  CarveState(config_, options_, counter);
  const std::string what = StrCat("KV pages and recurrent states (", options_.num_pages, " pages of ", PageBytes(config_, options_), " bytes, ",
                                  options_.num_slots, " slots of ", SlotBytes(config_, options_), " bytes)");
  BEBOP_ASSIGN_OR_RETURN(bytes_, memory_->Allocate(std::max(counter.used(), kAlignment), what));
  Carver carver(static_cast<char*>(bytes_.get()));
  state_ = CarveState(config_, options_, carver);
  return absl::OkStatus();
}

void ModelStateStorage::Release() {
  bytes_.reset();
  Carver nowhere(nullptr);
  state_ = CarveState(config_, options_, nowhere);
}

void ModelStateStorage::CopyPage(int32_t source, int32_t destination) {
  BEBOP_CHECK(!released());
  for (const KvPagesView& pages : state_.kv) CopyPageOf(pages, source, destination, *memory_);
  if (state_.mtp_kv.num_pages > 0) CopyPageOf(state_.mtp_kv, source, destination, *memory_);
}

}  // namespace bebop
