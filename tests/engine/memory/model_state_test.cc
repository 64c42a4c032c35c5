// SPDX-License-Identifier: Apache-2.0
#include "engine/memory/model_state.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"

namespace bebop {
namespace {

// Three linear and two full layers, one MTP layer; every dimension differs.
ModelConfig Config() {
  ModelConfig config;
  config.layers = {LayerKind::kLinearAttention, LayerKind::kFullAttention, LayerKind::kLinearAttention,
                   LayerKind::kLinearAttention, LayerKind::kFullAttention};
  config.num_key_value_heads = 2;
  config.head_dim = 24;
  config.linear_num_key_heads = 2;
  config.linear_num_value_heads = 6;
  config.linear_key_head_dim = 5;
  config.linear_value_head_dim = 7;
  config.linear_conv_kernel_dim = 4;
  config.num_mtp_layers = 1;
  return config;
}

ModelStateOptions Options() {
  return {.kv_dtype = DType::kBFloat16, .num_pages = 5, .page_tokens = 3, .num_slots = 4, .window = 2};
}

int64_t PagesBytes(const KvPagesView& pages) {
  const int64_t elements = static_cast<int64_t>(pages.num_pages) * pages.num_kv_heads * pages.page_tokens * pages.head_dim;
  return elements * ElementBytes(pages.dtype);
}

// Every array of the state as (data, bytes), from the shapes that ragged_batch.h documents.
std::vector<std::pair<char*, int64_t>> Arrays(const ModelState& state) {
  std::vector<std::pair<char*, int64_t>> arrays;
  const auto add = [&](void* data, int64_t bytes) { arrays.emplace_back(static_cast<char*>(data), bytes); };
  for (const KvPagesView& pages : state.kv) {
    add(pages.k, PagesBytes(pages));
    add(pages.v, PagesBytes(pages));
  }
  add(state.mtp_kv.k, PagesBytes(state.mtp_kv));
  add(state.mtp_kv.v, PagesBytes(state.mtp_kv));
  for (const LinearStateView& view : state.linear) {
    const int64_t slots = view.num_slots, floats = sizeof(float);
    add(view.matrix, slots * view.num_value_heads * view.key_head_dim * view.value_head_dim * floats);
    add(view.conv_inputs, slots * (view.conv_width - 1 + view.window) * view.conv_channels() * floats);
    add(view.window_k, slots * view.window * view.num_key_heads * view.key_head_dim * floats);
    add(view.window_v, slots * view.window * view.num_value_heads * view.value_head_dim * floats);
    add(view.window_gate, slots * view.window * view.num_value_heads * 2 * floats);
  }
  return arrays;
}

TEST(ModelStateTest, BytesPerPageAndSlotAreThoseOfTheShapes) {
  // 3 layers with pages x (k, v) x 2 heads x 3 tokens x 24 x 2 bytes.
  EXPECT_EQ(PageBytes(Config(), Options()), 3 * 2 * 2 * 3 * 24 * 2);
  // C = 2*2*5 + 6*7 = 62. Per linear layer: matrix 6*5*7, conv (3 + 2) * 62, window 2 * (10 + 42 + 12), floats.
  EXPECT_EQ(SlotBytes(Config(), Options()), 3 * 4 * (210 + 5 * 62 + 2 * 64));
  ModelConfig without_mtp = Config();
  without_mtp.num_mtp_layers = 0;
  EXPECT_EQ(PageBytes(without_mtp, Options()), 2 * 2 * 2 * 3 * 24 * 2);
}

TEST(ModelStateTest, ArraysAreZeroAlignedAndApart) {
  const auto memory = MakeHostMemory();
  const auto storage = *ModelStateStorage::Create(Config(), Options(), memory.get());
  const ModelState& state = storage->state();
  ASSERT_EQ(state.kv.size(), 2u);
  ASSERT_EQ(state.linear.size(), 3u);
  EXPECT_EQ(state.mtp_kv.num_pages, 5);
  EXPECT_EQ(state.linear[2].conv_channels(), 62);
  EXPECT_EQ(state.linear[2].conv_width, 4);
  int64_t page_bytes = 0, slot_bytes = 0;
  const std::vector<std::pair<char*, int64_t>> arrays = Arrays(state);
  for (size_t i = 0; i < arrays.size(); ++i) {
    const auto [data, bytes] = arrays[i];
    EXPECT_EQ(reinterpret_cast<uintptr_t>(data) % 64, 0u);
    for (int64_t j = 0; j < bytes; ++j) ASSERT_EQ(data[j], 0) << "array " << i << " is not zero, or overlaps an earlier one";
    std::memset(data, static_cast<int>(i + 1), bytes);
    (i < 6 ? page_bytes : slot_bytes) += bytes;
  }
  for (size_t i = 0; i < arrays.size(); ++i) {
    const auto [data, bytes] = arrays[i];
    for (int64_t j = 0; j < bytes; ++j) ASSERT_EQ(data[j], static_cast<char>(i + 1)) << "array " << i << " was overwritten";
  }
  EXPECT_EQ(page_bytes, 5 * PageBytes(Config(), Options()));
  EXPECT_EQ(slot_bytes, 4 * SlotBytes(Config(), Options()));
}

TEST(ModelStateTest, InputsInBFloat16TakeHalf) {
  ModelStateOptions options = Options();
  options.input_dtype = DType::kBFloat16;
  // Per layer: matrix 210 floats, (3 + 2) x 62 inputs, 2 x (10 + 42) windows of k and v, 2 x 6 x 2 gates.
  EXPECT_EQ(SlotBytes(Config(), options), 3 * (4 * 210 + 2 * 5 * 62 + 2 * 2 * 52 + 4 * 24));
  EXPECT_EQ(PageBytes(Config(), options), PageBytes(Config(), Options()));
  const auto memory = MakeHostMemory();
  const auto storage = *ModelStateStorage::Create(Config(), options, memory.get());
  const LinearStateView& view = storage->state().linear[1];
  EXPECT_EQ(view.input_dtype, DType::kBFloat16);
  // Slots x rows x channels apart at least, in bytes of the type.
  EXPECT_GE(static_cast<char*>(view.window_k) - static_cast<char*>(view.conv_inputs), 4 * 5 * 62 * 2);
  EXPECT_LT(static_cast<char*>(view.window_k) - static_cast<char*>(view.conv_inputs), 4 * 5 * 62 * 4);
}

TEST(ModelStateTest, WithoutMtpThereAreNoMtpPages) {
  ModelConfig config = Config();
  config.num_mtp_layers = 0;
  const auto memory = MakeHostMemory();
  const auto storage = *ModelStateStorage::Create(config, Options(), memory.get());
  EXPECT_EQ(storage->state().mtp_kv.num_pages, 0);
  storage->CopyPage(0, 1);
}

TEST(ModelStateTest, CopyPageCopiesThatPageOfEveryLayerAndNothingElse) {
  const auto memory = MakeHostMemory();
  const auto storage = *ModelStateStorage::Create(Config(), Options(), memory.get());
  const ModelState& state = storage->state();
  std::vector<KvPagesView> layers = state.kv;
  layers.push_back(state.mtp_kv);
  const int64_t page_bytes = PagesBytes(layers[0]) / 5;
  int fill = 1;
  for (const KvPagesView& pages : layers) {
    for (void* array : {pages.k, pages.v}) {
      for (int page = 0; page < 5; ++page) std::memset(static_cast<char*>(array) + page * page_bytes, fill++, page_bytes);
    }
  }
  storage->CopyPage(3, 1);
  fill = 1;
  for (const KvPagesView& pages : layers) {
    for (void* array : {pages.k, pages.v}) {
      for (int page = 0; page < 5; ++page, ++fill) {
        const char expected = static_cast<char>(page == 1 ? fill + 2 : fill);
        for (int64_t j = 0; j < page_bytes; ++j) {
          ASSERT_EQ(static_cast<char*>(array)[page * page_bytes + j], expected) << "page " << page;
        }
      }
    }
  }
}

// Asked for after a release, the arrays are whole, zero and where the state says; the state itself is the same object.
TEST(ModelStateTest, ReleasedAndRestoredItIsAsFresh) {
  const auto memory = MakeHostMemory();
  const auto storage = *ModelStateStorage::Create(Config(), Options(), memory.get());
  const ModelState& state = storage->state();
  for (const auto& [data, bytes] : Arrays(state)) std::memset(data, 0x5a, static_cast<size_t>(bytes));
  storage->Release();
  EXPECT_TRUE(storage->released());
  for (const auto& [data, bytes] : Arrays(state)) EXPECT_EQ(data, nullptr) << "but still of " << bytes << " bytes";
  storage->Release();
  ASSERT_TRUE(storage->Restore().ok());
  EXPECT_FALSE(storage->released());
  EXPECT_EQ(&storage->state(), &state);
  std::vector<std::pair<char*, int64_t>> arrays = Arrays(state);
  ASSERT_EQ(arrays.size(), 6u + 15u);
  std::sort(arrays.begin(), arrays.end());
  for (size_t i = 0; i < arrays.size(); ++i) {
    const auto& [data, bytes] = arrays[i];
    ASSERT_NE(data, nullptr);
    if (i > 0) {
      EXPECT_GE(data, arrays[i - 1].first + arrays[i - 1].second);
    }
    EXPECT_EQ(std::count(data, data + bytes, 0), bytes);
  }
  storage->CopyPage(0, 4);
  ASSERT_TRUE(storage->Restore().ok());  // nothing to do
  EXPECT_EQ(Arrays(state).front().first, state.kv.front().k);
}

// Resident bytes of this process.
int64_t ResidentBytes() {
  int64_t total = 0, resident = 0;
  std::ifstream("/proc/self/statm") >> total >> resident;
  return resident * sysconf(_SC_PAGESIZE);
}

TEST(ModelStateTest, ReleasedPagesGoBackToTheSystem) {
  ModelStateOptions options = Options();
  options.num_pages = 50'000;  // 84 MB
  const auto memory = MakeHostMemory();
  const auto storage = *ModelStateStorage::Create(Config(), options, memory.get());
  for (const auto& [data, bytes] : Arrays(storage->state())) std::memset(data, 1, static_cast<size_t>(bytes));
  const int64_t before = ResidentBytes();
  storage->Release();
  EXPECT_LT(ResidentBytes(), before - options.num_pages * PageBytes(Config(), options) * 9 / 10);
}

// Memory that can be had no more is asked for again later.
TEST(ModelStateTest, ARestoreThatFailsMayBeTriedAgain) {
  class ScarceMemory final : public DeviceMemory {
   public:
    bool is_host() const override { return true; }
    absl::StatusOr<std::shared_ptr<void>> Allocate(int64_t bytes, std::string_view what) override {
      if (scarce) return absl::ResourceExhaustedError(std::string(what) + ": " + std::to_string(bytes));
      return host_->Allocate(bytes, what);
    }
    void CopyIn(void* to, const void* from, int64_t bytes) override { host_->CopyIn(to, from, bytes); }
    void CopyOut(void* to, const void* from, int64_t bytes) override { host_->CopyOut(to, from, bytes); }
    void Copy(void* to, const void* from, int64_t bytes) override { host_->Copy(to, from, bytes); }
    int64_t available_bytes() const override { return host_->available_bytes(); }
    absl::Status status() const override { return absl::OkStatus(); }
    bool scarce = false;

   private:
    const std::unique_ptr<DeviceMemory> host_ = MakeHostMemory();
  };
  ScarceMemory memory;
  const auto storage = *ModelStateStorage::Create(Config(), Options(), &memory);
  storage->Release();
  memory.scarce = true;
  const absl::Status refused = storage->Restore();
  EXPECT_TRUE(absl::IsResourceExhausted(refused)) << refused;
  EXPECT_NE(refused.message().find("5 pages of "), absl::string_view::npos) << refused;
  EXPECT_TRUE(storage->released());
  memory.scarce = false;
  EXPECT_TRUE(storage->Restore().ok());
  EXPECT_FALSE(storage->released());
}

TEST(ModelStateTest, TooMuchMemoryIsResourceExhaustedAndNamesTheBytes) {
  ModelStateOptions options = Options();
  options.num_slots = 2'000'000'000;
  options.window = 8;
  ModelConfig config = Config();
  config.linear_num_value_heads = 64;
  config.linear_key_head_dim = config.linear_value_head_dim = 128;
  const auto memory = MakeHostMemory();
  const auto storage = ModelStateStorage::Create(config, options, memory.get());
  ASSERT_EQ(storage.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_NE(storage.status().message().find(std::to_string(SlotBytes(config, options))), std::string_view::npos);
}

}  // namespace
}  // namespace bebop
