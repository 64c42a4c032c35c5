// SPDX-License-Identifier: Apache-2.0
// Any bytes as a sequence of calls: a manifest with spoilt entries, then chunks, digests and attempts to finish. Beside the
// update runs a model of it, whole tensors and a mark for each byte that came: every call must be refused or taken as the model
// says, refusals change nothing, the loaded weights stay as they are, and what Finish returns are the model's tensors, by their
// digests from the resident bytes.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "engine/base/status_reason.h"
#include "engine/weights/dummy_weights.h"
#include "engine/weights/element_form.h"
#include "engine/weights/weight_update.h"
#include "kernels/common/check.h"
#include "tests/support/checkpoint_writer.h"

namespace bebop {
namespace {

class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  bool empty() const { return size_ == 0; }
  uint8_t Next() {
    if (size_ == 0) return 0;
    --size_;
    return *data_++;
  }
  uint64_t Below(uint64_t limit) {
    const uint64_t value = static_cast<uint64_t>(Next()) << 8 | Next();
    return limit == 0 ? 0 : value % limit;
  }

 private:
  const uint8_t* data_;
  size_t size_;
};

// A tiny model, loaded once.
struct World {
  World() : config(ParseModelConfig(SmallConfigJson(/*tied=*/true)).value()), memory(MakeHostMemory()) {
    config.vocab_size = 9;
    config.hidden_size = 6;
    config.intermediate_size = 5;
    config.num_attention_heads = 1;
    config.linear_num_value_heads = 1;
    config.layers = {LayerKind::kLinearAttention, LayerKind::kFullAttention};
    ThreadPool pool(1);
    base = MakeDummyWeights(config, DType::kBFloat16, 1, pool, memory.get()).value();
    slots = SlotsOf(config, *base);
    arena.assign(static_cast<const char*>(base->storage.get()), static_cast<size_t>(base->storage_bytes));
    for (size_t i = 0; i < slots.size(); ++i) {
      std::string bytes(static_cast<size_t>(base->version.tensors[i].num_bytes()), '\0');
      ResidentTensor(slots[i], base->version.tensors[i].form, memory.get())
          .Read(0, static_cast<int64_t>(bytes.size()), bytes.data());
      tensors.push_back(std::move(bytes));
    }
  }

  ModelConfig config;
  std::unique_ptr<DeviceMemory> memory;
  std::unique_ptr<ModelWeights> base;
  std::vector<TensorSlot> slots;
  std::string arena;
  std::vector<std::string> tensors;  // as bytes
};

// What the update should hold of one tensor.
struct Model {
  size_t index = 0;
  std::string bytes;
  std::vector<bool> came;
  std::optional<Sha256Digest> announced;

  bool whole() const {
    return std::all_of(came.begin(), came.end(), [](bool byte) { return byte; });
  }
};

struct Totals {
  int64_t received_bytes, complete_tensors, staging_bytes;
  bool operator==(const Totals&) const = default;
};
Totals TotalsOf(const WeightUpdate& update) {
  const WeightUpdateProgress progress = update.Progress(0);
  return {progress.received_bytes, progress.complete_tensors, update.staging_bytes()};
}

// A manifest from the input, and whether it is one.
WeightUpdateSpec MakeSpec(const World& world, Bytes& bytes, bool& good) {
  WeightUpdateSpec spec;
  const uint8_t flags = bytes.Next();
  spec.encoding = (flags & 1) != 0 ? WeightEncoding::kOverwriteDelta : WeightEncoding::kFull;
  spec.target_step = 1;
  if ((flags & 1) != 0) spec.base_step = 0;
  if ((flags & 2) != 0) spec.components.push_back(WeightComponent::kTarget);
  if ((flags & 4) != 0) spec.components.push_back(WeightComponent::kDraft);
  const bool target = (flags & 2) != 0 || (flags & 6) == 0, draft = (flags & 4) != 0 || (flags & 6) == 0;
  std::set<std::tuple<std::string, std::string, std::vector<int64_t>>> expected;
  for (const TensorInfo& tensor : world.base->version.tensors) {
    if (!(tensor.mtp ? draft : target)) continue;
    spec.manifest.push_back({tensor.name, FormName(tensor.form), tensor.shape});
    expected.emplace(tensor.name, FormName(tensor.form), tensor.shape);
  }
  for (uint8_t edits = bytes.Next() % 4; edits > 0 && !spec.manifest.empty(); --edits) {
    const size_t at = bytes.Below(spec.manifest.size());
    const auto entry = spec.manifest.begin() + static_cast<std::ptrdiff_t>(at);
    const uint8_t kind = bytes.Next();
    switch (kind % 7) {
      case 0:
        spec.manifest.erase(entry);
        break;
      case 1:
        std::rotate(spec.manifest.begin(), entry, spec.manifest.end());
        break;
      case 2:
        spec.manifest.push_back(TensorSpec(*entry));
        break;
      case 3:
        entry->name.insert(bytes.Below(entry->name.size()), 1, static_cast<char>(bytes.Next()));
        break;
      case 4:
        entry->dtype = kind % 2 == 0 ? "F16" : entry->dtype + "x";
        break;
      case 5: {
        int64_t& size = entry->shape[bytes.Below(entry->shape.size())];
        size = static_cast<int64_t>(static_cast<uint64_t>(size) + (uint64_t{1} << kind / 7));
        break;
      }
      case 6:
        entry->shape.push_back(1);
        break;
    }
  }
  // Each tensor once and as it is, and all of them if the update is full.
  for (const TensorSpec& tensor : spec.manifest) {
    if (expected.erase({tensor.name, tensor.dtype, tensor.shape}) == 0) good = false;
  }
  if (!expected.empty() && spec.encoding == WeightEncoding::kFull) good = false;
  return spec;
}

void FuzzOne(const uint8_t* data, size_t size) {
  static World* const world = new World;
  Bytes bytes(data, size);
  bool good = true;
  const WeightUpdateSpec spec = MakeSpec(*world, bytes, good);
  const bool is_delta = spec.encoding == WeightEncoding::kOverwriteDelta;
  auto started = WeightUpdate::Start(world->config, *world->base, spec, world->base->storage_bytes + (int64_t{1} << 16),
                                     world->memory.get());
  BEBOP_CHECK(started.ok() == good);
  if (!good) {
    BEBOP_CHECK(started.status().code() == absl::StatusCode::kInvalidArgument && !StatusReason(started.status()).empty());
    return;
  }
  WeightUpdate& update = **started;
  std::vector<Model> models;
  for (const TensorSpec& tensor : spec.manifest) {
    const auto& known = world->base->version.tensors;
    const auto found = std::find_if(known.begin(), known.end(), [&](const TensorInfo& info) { return info.name == tensor.name; });
    const size_t index = static_cast<size_t>(found - known.begin());
    models.push_back({index, world->tensors[index], std::vector<bool>(world->tensors[index].size()), std::nullopt});
  }

  std::unique_ptr<ModelWeights> next;
  while (next == nullptr) {
    const uint8_t call = bytes.empty() ? 255 : bytes.Next();
    const Totals before = TotalsOf(update);
    if (call < 240 && !models.empty()) {
      Model& model = models[bytes.Below(models.size())];
      const TensorInfo& info = world->base->version.tensors[model.index];
      const int64_t width = ElementBytes(info.form), total = info.num_bytes();
      int64_t offset = static_cast<int64_t>(bytes.Below(static_cast<uint64_t>(total / width))) * width;
      int64_t length =
          (call & 1) != 0 ? total - offset : std::min<int64_t>(total - offset, static_cast<int64_t>(bytes.Next()) * width);
      if ((call & 3) == 3) std::tie(offset, length) = std::pair(int64_t{0}, total);
      if ((call & 12) == 12) offset += static_cast<int8_t>(bytes.Next());  // often wrong
      // Values by a rule that repeats the same for most chunks, so that repeats agree.
      std::string chunk(static_cast<size_t>(length), '\0');
      const uint8_t seed = (call & 16) != 0 ? bytes.Next() : 0;
      for (int64_t i = 0; i < length; ++i)
        chunk[static_cast<size_t>(i)] = static_cast<char>((static_cast<uint64_t>(offset + i) * 37 + seed) % 61);
      if ((call & 96) == 96 && length >= width) {
        const size_t at = bytes.Below(static_cast<uint64_t>(length / width)) * static_cast<size_t>(width);
        for (int64_t i = 0; i < width; ++i) chunk[at + static_cast<size_t>(i)] = static_cast<char>(bytes.Next());
      }
      const bool in_range = offset >= 0 && offset <= total && length <= total - offset && offset % width == 0;
      const bool finite = FirstNonFinite(info.form, chunk) < 0;
      bool conflict = false;
      std::string after = model.bytes;
      std::vector<bool> came = model.came;
      if (in_range) {
        for (int64_t i = 0; i < length; ++i) {
          const size_t at = static_cast<size_t>(offset + i);
          conflict = conflict || (came[at] && after[at] != chunk[static_cast<size_t>(i)]);
          after[at] = chunk[static_cast<size_t>(i)];
          came[at] = true;
        }
      }
      std::optional<Sha256Digest> digest;
      if ((call & 128) != 0) digest = Sha256Of((call & 64) != 0 ? after : world->tensors[model.index]);
      const bool digest_conflict = digest.has_value() && model.announced.has_value() && *digest != *model.announced;

      const absl::Status status = update.WriteChunk(info.name, offset, chunk, digest);
      using Code = absl::StatusCode;
      const Code expected = !in_range         ? Code::kInvalidArgument
                            : digest_conflict ? Code::kAlreadyExists
                            : !finite         ? Code::kInvalidArgument
                            : conflict        ? Code::kAlreadyExists
                                              : Code::kOk;
      if (expected != Code::kOk) {
        BEBOP_CHECK(status.code() == expected && !StatusReason(status).empty());
        BEBOP_CHECK(TotalsOf(update) == before);
        continue;
      }
      if (absl::IsResourceExhausted(status)) {  // 1024 separate pieces
        BEBOP_CHECK(TotalsOf(update) == before);
        continue;
      }
      model.bytes = std::move(after);
      model.came = std::move(came);
      if (digest.has_value()) model.announced = digest;
      const bool wrong = model.whole() && model.announced.has_value() && *model.announced != Sha256Of(model.bytes);
      BEBOP_CHECK(status.code() == (wrong ? Code::kDataLoss : Code::kOk));
      if (wrong) model = {model.index, world->tensors[model.index], std::vector<bool>(model.came.size()), std::nullopt};
      continue;
    }

    // Finish, the last time with everything that the model lacks.
    if (bytes.empty()) {
      for (Model& model : models) {
        const TensorInfo& info = world->base->version.tensors[model.index];
        if (is_delta && model.announced.has_value() && *model.announced != Sha256Of(model.bytes)) return;  // nothing can mend it
        if (is_delta) {
          BEBOP_CHECK(update.WriteChunk(info.name, 0, "", Sha256Of(model.bytes)).ok());
          model.announced = Sha256Of(model.bytes);
          continue;
        }
        if (model.announced.has_value() && *model.announced != Sha256Of(model.bytes)) return;  // not what the rest would give
        if (!model.whole()) BEBOP_CHECK(update.WriteChunk(info.name, 0, model.bytes).ok());
        model.came.assign(model.came.size(), true);
      }
    }
    std::vector<Sha256Digest> digests;
    for (const std::string& tensor : world->tensors) digests.push_back(Sha256Of(tensor));
    bool complete = true, right = true;
    for (const Model& model : models) {
      complete = complete && (model.whole() || (is_delta && model.announced.has_value()));
      digests[model.index] = Sha256Of(model.bytes);
      right = right && (!model.announced.has_value() || *model.announced == digests[model.index]);
    }
    WeightVersion version = world->base->version;
    version.SetDigests(digests);
    auto finished = update.Finish({});
    if (!complete || !right) {
      BEBOP_CHECK(finished.status().code() == (complete ? absl::StatusCode::kDataLoss : absl::StatusCode::kFailedPrecondition));
      BEBOP_CHECK(TotalsOf(update) == before);
      if (bytes.empty()) return;
      continue;
    }
    BEBOP_CHECK(finished.ok());
    next = *std::move(finished);
    const WeightVersion resident = RecomputeVersion(world->config, *next, world->memory.get()).value();
    for (size_t i = 0; i < digests.size(); ++i) {
      BEBOP_CHECK(resident.tensors[i].digest == digests[i] && next->version.tensors[i].digest == digests[i]);
    }
    BEBOP_CHECK(next->version.target_digest == version.target_digest && next->version.draft_digest == version.draft_digest);
  }
  BEBOP_CHECK(std::memcmp(world->base->storage.get(), world->arena.data(), world->arena.size()) == 0);
}

}  // namespace
}  // namespace bebop

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size <= 1024) bebop::FuzzOne(data, size);  // each call costs a hash of a tensor: long inputs are slow and find nothing new
  return 0;
}
