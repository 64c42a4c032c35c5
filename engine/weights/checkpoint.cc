// SPDX-License-Identifier: Apache-2.0
#include "engine/weights/checkpoint.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <map>
#include <optional>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "engine/base/mutex.h"
#include "engine/base/status_macros.h"
#include "engine/formats/safetensors.h"
#include "engine/formats/strings.h"
#include "engine/weights/digest_chain.h"
#include "engine/weights/element_form.h"
#include "engine/weights/row_blocks.h"
#include "engine/weights/weight_layout.h"

namespace bebop {
namespace {

constexpr char kSingleFile[] = "model.safetensors";
constexpr char kIndexFile[] = "model.safetensors.index.json";
constexpr char kLmHead[] = "lm_head.weight";

// One tensor as it lies in a file.
struct Source {
  const SafetensorsFile* file = nullptr;
  const TensorEntry* entry = nullptr;

  std::string Label() const { return StrCat(file->path(), ": tensor ", Quoted(entry->name)); }
  std::string Describe() const { return StrCat(entry->dtype, " ", ShapeString(entry->shape)); }
  std::string_view bytes() const { return file->Bytes(*entry); }
  std::string_view bytes(int64_t first, int64_t count) const {
    const size_t width = static_cast<size_t>(SafetensorsElementBytes(entry->dtype));
    return bytes().substr(static_cast<size_t>(first) * width, static_cast<size_t>(count) * width);
  }
};

// The files of a checkpoint and their tensors by slot name (see TensorSlot::name).
struct Checkpoint {
  std::vector<std::unique_ptr<SafetensorsFile>> files;  // stable addresses
  std::map<std::string, Source> tensors;                // sorted: messages do not depend on hashing
  std::string text_prefix;                              // as this checkpoint spells kTextPrefix; empty until a text tensor is seen

  std::string SpelledName(const std::string& slot_name, const ModelConfig& config) const {
    if (!slot_name.starts_with(kTextPrefix)) return slot_name;
    return StrCat(text_prefix.empty() ? config.tensor_prefix : text_prefix, slot_name.substr(1));
  }
};

bool IsMtp(std::string_view slot_name) { return slot_name.starts_with("mtp."); }

absl::Status AddTensor(const SafetensorsFile& file, const TensorEntry& entry, Checkpoint& checkpoint) {
  const std::string& name = entry.name;
  if (name.starts_with("model.visual.")) return absl::OkStatus();
  const std::string slot_name = SlotName(name);
  if (slot_name.starts_with(kTextPrefix) && checkpoint.text_prefix.empty()) {
    checkpoint.text_prefix = name.substr(0, name.size() - (slot_name.size() - std::string_view(kTextPrefix).size()));
  }
  const auto [twin, inserted] = checkpoint.tensors.emplace(slot_name, Source{&file, &entry});
  if (inserted) return absl::OkStatus();
  return absl::InvalidArgumentError(
      StrCat(file.path(), ": tensor ", Quoted(name), ": already given as ", Quoted(twin->second.entry->name), " in ", twin->second.file->path()));
}

absl::StatusOr<const SafetensorsFile*> OpenFile(const std::string& path, Checkpoint& checkpoint) {
  BEBOP_ASSIGN_OR_RETURN(SafetensorsFile file, SafetensorsFile::Open(path));
  checkpoint.files.push_back(std::make_unique<SafetensorsFile>(std::move(file)));
  return checkpoint.files.back().get();
}

// The index and its shards must agree in both directions.
absl::Status OpenShards(const std::string& directory, Checkpoint& checkpoint) {
  const std::string index_path = StrCat(directory, "/", kIndexFile);
  BEBOP_ASSIGN_OR_RETURN(const MappedFile index_file, MappedFile::Open(index_path));
  BEBOP_ASSIGN_OR_RETURN(const SafetensorsIndex index, ParseSafetensorsIndex(index_file.bytes(), index_path));
  std::unordered_map<std::string_view, std::string_view> shard_of;
  std::map<std::string_view, const SafetensorsFile*> shards;
  for (const auto& [tensor, shard] : index.weight_map) {
    shard_of.emplace(tensor, shard);
    shards.emplace(shard, nullptr);
  }
  size_t num_tensors = 0;
  for (auto& [shard, file] : shards) {
    BEBOP_ASSIGN_OR_RETURN(file, OpenFile(StrCat(directory, "/", shard), checkpoint));
    num_tensors += file->header().tensors.size();
    for (const TensorEntry& entry : file->header().tensors) {
      const auto listed = shard_of.find(entry.name);
      if (listed == shard_of.end() || listed->second != shard) {
        return absl::InvalidArgumentError(StrCat(file->path(), ": tensor ", Quoted(entry.name), ": expected as ", kIndexFile, " says in ",
                                                 listed == shard_of.end() ? "no file" : Quoted(listed->second), ", got it here"));
      }
      BEBOP_RETURN_IF_ERROR(AddTensor(*file, entry, checkpoint));
    }
  }
  if (num_tensors == index.weight_map.size()) return absl::OkStatus();
  for (const auto& [tensor, shard] : index.weight_map) {
    const std::vector<TensorEntry>& entries = shards[shard]->header().tensors;
    if (std::none_of(entries.begin(), entries.end(), [&name = tensor](const TensorEntry& entry) { return entry.name == name; })) {
      return absl::NotFoundError(StrCat(shards[shard]->path(), ": tensor ", Quoted(tensor), ": expected as ", kIndexFile, " says, got nothing"));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<Checkpoint> OpenCheckpoint(const LoadOptions& options) {
  Checkpoint checkpoint;
  const std::string single_path = StrCat(options.path, "/", kSingleFile);
  if (FileExists(single_path)) {
    BEBOP_ASSIGN_OR_RETURN(const SafetensorsFile* file, OpenFile(single_path, checkpoint));
    for (const TensorEntry& entry : file->header().tensors) BEBOP_RETURN_IF_ERROR(AddTensor(*file, entry, checkpoint));
  } else if (FileExists(StrCat(options.path, "/", kIndexFile))) {
    BEBOP_RETURN_IF_ERROR(OpenShards(options.path, checkpoint));
  } else {
    return absl::NotFoundError(StrCat(options.path, ": expected ", kSingleFile, " or ", kIndexFile, ", got neither"));
  }
  if (options.mtp_path.empty()) return checkpoint;

  std::erase_if(checkpoint.tensors, [](const auto& tensor) { return IsMtp(tensor.first); });
  BEBOP_ASSIGN_OR_RETURN(const SafetensorsFile* file, OpenFile(options.mtp_path, checkpoint));
  for (const TensorEntry& entry : file->header().tensors) {
    if (!entry.name.starts_with("mtp.") && !entry.name.starts_with("model.mtp.")) {
      return absl::InvalidArgumentError(StrCat(file->path(), ": tensor ", Quoted(entry.name), ": expected only mtp.* tensors in this file"));
    }
    BEBOP_RETURN_IF_ERROR(AddTensor(*file, entry, checkpoint));
  }
  return checkpoint;
}

bool IsReadable(std::string_view dtype) { return dtype == "BF16" || dtype == "F32" || dtype == "F16"; }

// A tied checkpoint may carry a copy of its embedding as lm_head.weight; anything else under that name contradicts the config.
absl::Status CheckTiedHead(const Source& head, const Source& embedding) {
  const bool same = head.entry->dtype == embedding.entry->dtype && head.entry->shape == embedding.entry->shape && head.bytes() == embedding.bytes();
  if (same) return absl::OkStatus();
  return absl::InvalidArgumentError(StrCat(head.Label(), ": expected none or a copy of ", Quoted(embedding.entry->name),
                                           " with tie_word_embeddings true, got other values; set tie_word_embeddings to false to use them"));
}

// Whether the checkpoint's MTP tensors are there as `options` and `config` need them.
absl::StatusOr<bool> ResolveMtp(const ModelConfig& config, const LoadOptions& options, const Checkpoint& checkpoint) {
  const auto mtp = std::find_if(checkpoint.tensors.begin(), checkpoint.tensors.end(), [](const auto& tensor) { return IsMtp(tensor.first); });
  const bool present = mtp != checkpoint.tensors.end();
  if (present && config.num_mtp_layers == 0) {
    return absl::InvalidArgumentError(StrCat(mtp->second.Label(), ": unexpected with mtp_num_hidden_layers 0 in config.json, expected 1"));
  }
  if (!present && !options.mtp_path.empty()) {
    return absl::InvalidArgumentError(StrCat(options.mtp_path, ": expected mtp.* tensors, got none"));
  }
  if (!present && options.needs_mtp) {
    return absl::FailedPreconditionError(StrCat(options.path, ": expected mtp.* tensors for speculation, got none (mtp_num_hidden_layers ",
                                                config.num_mtp_layers, "): give them with --mtp FILE or start with --speculation off"));
  }
  return present;
}

// Checks names, shapes and types. `sources` receives one tensor a slot.
absl::Status MatchTensors(const ModelConfig& config, const Checkpoint& checkpoint, const std::vector<TensorSlot>& slots, const LoadOptions& options,
                          std::vector<Source>& sources) {
  size_t num_missing = 0;
  std::string first_missing;
  for (const TensorSlot& slot : slots) {
    const auto found = checkpoint.tensors.find(slot.name);
    if (found == checkpoint.tensors.end()) {
      if (num_missing++ == 0) {
        const std::string& owner = slot.mtp && !options.mtp_path.empty() ? options.mtp_path : options.path;
        first_missing = StrCat(owner, ": tensor ", Quoted(checkpoint.SpelledName(slot.name, config)), ": expected ", ShapeString(slot.shape), ", got nothing");
      }
      continue;
    }
    const Source& source = found->second;
    if (source.entry->shape != slot.shape) {
      return absl::InvalidArgumentError(StrCat(source.Label(), ": expected shape ", ShapeString(slot.shape), ", got ", ShapeString(source.entry->shape)));
    }
    if (!IsReadable(source.entry->dtype)) {
      return absl::InvalidArgumentError(StrCat(source.Label(), ": expected type BF16, F32 or F16, got ", source.entry->dtype));
    }
    sources.push_back(source);
  }
  // A misnamed tensor is both missing and unexpected: say both.
  std::string first_unexpected;
  if (checkpoint.tensors.size() > sources.size()) {
    std::unordered_map<std::string_view, bool> known;
    for (const TensorSlot& slot : slots) known.emplace(slot.name, true);
    for (const auto& [name, source] : checkpoint.tensors) {
      if (known.contains(name)) continue;
      if (name == kLmHead && config.tie_word_embeddings) continue;  // CheckTiedHead
      first_unexpected = StrCat(source.Label(), ": unexpected, got ", source.Describe());
      break;
    }
  }
  if (num_missing > 0) {
    if (num_missing > 1) absl::StrAppend(&first_missing, " (and ", num_missing - 1, " more missing)");
    if (!first_unexpected.empty()) absl::StrAppend(&first_missing, "; ", first_unexpected);
    return absl::NotFoundError(first_missing);
  }
  if (!first_unexpected.empty()) return absl::InvalidArgumentError(first_unexpected);
  return absl::OkStatus();
}

// --- Values ---

// Index of the first element whose bits, masked, are at least `bound`; -1 if there is none. The common case is one branch-free pass.
template <typename Word, typename Element>
int64_t FirstAtLeast(const Element* elements, int64_t count, Word mask, Word bound) {
  const auto magnitude = [mask](Element element) { return static_cast<Word>(std::bit_cast<Word>(element) & mask); };
  Word largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, magnitude(elements[i]));
  if (largest < bound) return -1;
  return std::find_if(elements, elements + count, [&](Element element) { return magnitude(element) >= bound; }) - elements;
}

// Scratch of one thread: the file's bytes are not aligned to their type.
struct Scratch {
  std::vector<uint16_t> words;
  std::vector<float> floats;
};

// Elements of one block, read from the file and checked.
class BlockReader {
 public:
  BlockReader(const Source& source, int64_t first, int64_t count, Scratch& scratch)
      : source_(source), first_(first), count_(count), scratch_(scratch) {}

  // The block as float32 (BF16 and F16 are exact). REQUIRES for all three: call one of them, once.
  absl::StatusOr<const float*> Floats(DType destination) {
    scratch_.floats.resize(static_cast<size_t>(count_));
    float* floats = scratch_.floats.data();
    if (source_.entry->dtype == "F32") {
      Copy(floats);
      // What overflows a bfloat16 rounds to infinity: from the middle between its largest value and 2^128.
      const uint32_t bound = destination == DType::kBFloat16 ? 0x7F7F8000u : 0x7F800000u;
      const int64_t bad = FirstAtLeast<uint32_t>(floats, count_, 0x7FFFFFFFu, bound);
      if (bad >= 0) return NotFinite(bad, floats[bad], destination);
      return floats;
    }
    BEBOP_ASSIGN_OR_RETURN(const uint16_t* words, Words());
    const bool is_half = source_.entry->dtype == "F16";
    for (int64_t i = 0; i < count_; ++i) floats[i] = is_half ? HalfToFloat(words[i]) : ToFloat(BFloat16{words[i]});
    return floats;
  }

  // The raw 16-bit words of a BF16 or F16 block.
  absl::StatusOr<const uint16_t*> Words() {
    scratch_.words.resize(static_cast<size_t>(count_));
    uint16_t* words = scratch_.words.data();
    Copy(words);
    const uint16_t infinity = source_.entry->dtype == "F16" ? 0x7C00 : 0x7F80;
    const int64_t bad = FirstAtLeast<uint16_t>(words, count_, 0x7FFF, infinity);
    if (bad >= 0) {
      const bool is_infinite = (words[bad] & 0x7FFF) == infinity;
      constexpr float kInfinity = std::numeric_limits<float>::infinity();
      return NotFinite(bad, is_infinite ? kInfinity : std::numeric_limits<float>::quiet_NaN(), DType::kFloat32);
    }
    return words;
  }

 private:
  template <typename T>
  void Copy(T* destination) const {
    std::memcpy(destination, source_.bytes().data() + static_cast<size_t>(first_) * sizeof(T), static_cast<size_t>(count_) * sizeof(T));
  }

  absl::Status NotFinite(int64_t bad, float value, DType destination) const {
    return absl::InvalidArgumentError(StrCat(source_.Label(), ": element ", first_ + bad, ": expected a finite ",
                                             destination == DType::kBFloat16 ? "bfloat16 " : "", "value, got ", value));
  }

  const Source& source_;
  const int64_t first_, count_;
  Scratch& scratch_;
};

absl::Status FillBlock(const RowBlock& block, const Source& source, Scratch& scratch, BlockWriter& writer) {
  const TensorSlot& slot = *block.slot;
  if (slot.values != nullptr) {
    const int64_t count = SlotElements(slot);
    BlockReader reader(source, 0, count, scratch);
    BEBOP_ASSIGN_OR_RETURN(const float* floats, reader.Floats(DType::kFloat32));
    writer.WriteValues(slot, floats);
    return absl::OkStatus();
  }
  const int64_t cols = slot.matrix.cols;
  BlockReader reader(source, block.first_row * cols, block.num_rows * cols, scratch);
  TensorView rows{nullptr, DType::kFloat32, block.num_rows, cols, cols};
  if (source.entry->dtype == "BF16") {
    BEBOP_ASSIGN_OR_RETURN(const uint16_t* words, reader.Words());
    rows.data = const_cast<uint16_t*>(words);
    rows.dtype = DType::kBFloat16;
  } else {
    BEBOP_ASSIGN_OR_RETURN(const float* floats, reader.Floats(slot.matrix.dtype));
    rows.data = const_cast<float*>(floats);
  }
  writer.WriteRows(block, rows);
  return absl::OkStatus();
}

struct Matched {
  Checkpoint checkpoint;
  bool with_mtp = false;
  std::vector<Source> sources;  // one a slot, in slot order; borrow from `checkpoint`
};

absl::StatusOr<Matched> MatchCheckpoint(const ModelConfig& config, const LoadOptions& options) {
  Matched matched;
  BEBOP_ASSIGN_OR_RETURN(matched.checkpoint, OpenCheckpoint(options));
  BEBOP_ASSIGN_OR_RETURN(matched.with_mtp, ResolveMtp(config, options, matched.checkpoint));
  BEBOP_RETURN_IF_ERROR(MatchTensors(config, matched.checkpoint, ListTensors(config, matched.with_mtp), options, matched.sources));
  return matched;
}

}  // namespace

absl::Status CheckCheckpoint(const ModelConfig& config, const LoadOptions& options) { return MatchCheckpoint(config, options).status(); }

absl::StatusOr<std::unique_ptr<ModelWeights>> LoadModelWeights(const ModelConfig& config, const LoadOptions& options, ThreadPool& pool,
                                                               DeviceMemory* memory) {
  BEBOP_ASSIGN_OR_RETURN(const Matched matched, MatchCheckpoint(config, options));
  BEBOP_ASSIGN_OR_RETURN(WeightLayout layout, AllocateWeights(config, options.dtype, matched.with_mtp, memory));
  BlockWriter writer(memory);

  for (size_t i = 0; i < layout.slots.size(); ++i) {
    const TensorSlot& slot = layout.slots[i];
    const TensorEntry& entry = *matched.sources[i].entry;
    layout.weights->version.tensors.push_back({.name = slot.mtp ? slot.name : entry.name,
                                               .form = FormOf(entry.dtype, ResidentType(slot)),
                                               .shape = slot.shape,
                                               .mtp = slot.mtp});
  }
  const auto index_of = [&layout](const RowBlock& block) { return static_cast<size_t>(block.slot - layout.slots.data()); };
  // From the file, which is mapped: a block's bytes have just been read.
  DigestChain chain(layout.slots, [&](const RowBlock& block, std::vector<char>& scratch) {
    const Source& source = matched.sources[index_of(block)];
    const int64_t row_elements = SlotElements(*block.slot) / block.slot->shape[0];
    const std::string_view bytes = source.bytes(block.first_row * row_elements, block.num_rows * row_elements);
    return ToForm(source.entry->dtype, bytes, layout.weights->version.tensors[index_of(block)].form, scratch);
  });

  // The error of the first bad block, so that the message does not depend on the threads.
  Mutex mutex;
  size_t first_bad = std::numeric_limits<size_t>::max();
  absl::Status status;
  ForEachBlock(layout.slots, pool, [&](const RowBlock& block, size_t block_idx) {
    thread_local Scratch scratch;
    const absl::Status filled = FillBlock(block, matched.sources[index_of(block)], scratch, writer);
    if (filled.ok()) {
      chain.BlockDone(block);
      return;
    }
    MutexLock lock(&mutex);
    if (block_idx < first_bad) {
      first_bad = block_idx;
      status = filled;
    }
  });
  if (!status.ok()) return status;
  BEBOP_RETURN_IF_ERROR(memory->status());

  const auto head = matched.checkpoint.tensors.find(kLmHead);
  if (config.tie_word_embeddings && head != matched.checkpoint.tensors.end()) {
    BEBOP_RETURN_IF_ERROR(CheckTiedHead(head->second, matched.sources.front()));
  }
  layout.weights->version.SetDigests(chain.Finish());
  return std::move(layout.weights);
}

}  // namespace bebop
