// SPDX-License-Identifier: Apache-2.0
#include "engine/memory/model_state.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "kernels/common/check.h"

namespace bebop {
namespace {

constexpr int64_t kAlignment = 64;  // of every array: a cache line, and what aligned vector loads want

int64_t Aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Elements of k (as many as of v) in one page of one attention layer.
int64_t PageElements(const ModelConfig& config, const ModelStateOptions& options) {
  return static_cast<int64_t>(config.num_key_value_heads) * options.page_tokens * config.head_dim;
}

int32_t NumPagedLayers(const ModelConfig& config) { return config.num_full_attention_layers() + config.num_mtp_layers; }

// Floats that one slot takes in each array of a LinearStateView.
struct SlotFloats {
  int64_t matrix = 0, conv_inputs = 0, window_k = 0, window_v = 0, window_gate = 0;
  int64_t total() const { return matrix + conv_inputs + window_k + window_v + window_gate; }
};

SlotFloats FloatsPerSlot(const ModelConfig& config, int64_t window) {
  return {.matrix = static_cast<int64_t>(config.linear_num_value_heads) * config.linear_key_head_dim * config.linear_value_head_dim,
          .conv_inputs = (config.linear_conv_kernel_dim - 1 + window) * config.conv_channels(),
          .window_k = window * config.linear_key_width(),
          .window_v = window * config.linear_value_width(),
          .window_gate = window * config.linear_num_value_heads * 2};
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
  float* TakeFloats(int64_t count) { return reinterpret_cast<float*>(Take(count * static_cast<int64_t>(sizeof(float)))); }
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
  const SlotFloats slot = FloatsPerSlot(config, options.window);
  const int64_t num_slots = options.num_slots;
  LinearStateView view;
  view.matrix = carver.TakeFloats(num_slots * slot.matrix);
  view.conv_inputs = carver.TakeFloats(num_slots * slot.conv_inputs);
  view.window_k = carver.TakeFloats(num_slots * slot.window_k);
  view.window_v = carver.TakeFloats(num_slots * slot.window_v);
  view.window_gate = carver.TakeFloats(num_slots * slot.window_gate);
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

void CopyPageOf(const KvPagesView& pages, int32_t source, int32_t destination) {
  BEBOP_CHECK(0 <= source && source < pages.num_pages && 0 <= destination && destination < pages.num_pages);
  const int64_t page_bytes =
      static_cast<int64_t>(pages.num_kv_heads) * pages.page_tokens * pages.head_dim * ElementBytes(pages.dtype);
  for (void* array : {pages.k, pages.v}) {
    char* const base = static_cast<char*>(array);
    std::memcpy(base + destination * page_bytes, base + source * page_bytes, page_bytes);
  }
}

}  // namespace

int64_t PageBytes(const ModelConfig& config, const ModelStateOptions& options) {
  return NumPagedLayers(config) * 2 * PageElements(config, options) * ElementBytes(options.kv_dtype);
}

int64_t SlotBytes(const ModelConfig& config, const ModelStateOptions& options) {
  return config.num_linear_attention_layers() * FloatsPerSlot(config, options.window).total() *
         static_cast<int64_t>(sizeof(float));
}

absl::StatusOr<std::unique_ptr<ModelStateStorage>> ModelStateStorage::Create(const ModelConfig& config,
                                                                             const ModelStateOptions& options) {
  BEBOP_CHECK(options.num_pages >= 0 && options.page_tokens > 0 && options.num_slots >= 0 && options.window >= 0);
  Carver counter(nullptr);
  CarveState(config, options, counter);
  // Anonymous memory comes zeroed and is backed page by page at first use, so unused KV pages cost address space only.
  const size_t bytes = static_cast<size_t>(std::max(counter.used(), kAlignment));
  void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    return absl::ResourceExhaustedError(absl::StrCat("cannot get ", bytes, " bytes for KV pages and recurrent states (",
                                                     options.num_pages, " pages of ", PageBytes(config, options), " bytes, ",
                                                     options.num_slots, " slots of ", SlotBytes(config, options), " bytes)"));
  }
  std::unique_ptr<ModelStateStorage> storage(new ModelStateStorage());
  storage->bytes_ = {static_cast<char*>(memory), Unmap{bytes}};
  Carver carver(storage->bytes_.get());
  storage->state_ = CarveState(config, options, carver);
  return storage;
}

void ModelStateStorage::Unmap::operator()(char* memory) const { munmap(memory, bytes); }

void ModelStateStorage::CopyPage(int32_t source, int32_t destination) {
  for (const KvPagesView& pages : state_.kv) CopyPageOf(pages, source, destination);
  if (state_.mtp_kv.num_pages > 0) CopyPageOf(state_.mtp_kv, source, destination);
}

}  // namespace bebop
