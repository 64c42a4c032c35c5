// SPDX-License-Identifier: Apache-2.0
#include "client/cpp/checkpoint_push.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string_view>
#include <thread>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "engine/formats/safetensors.h"
#include "engine/formats/sha256.h"
#include "engine/formats/strings.h"

namespace bebop {
namespace {

constexpr int64_t kChunkBytes = 1 << 20;  // small enough that sending one and making the next overlap
constexpr int64_t kPieceBytes = 4 << 20;
constexpr int kMaxFailures = 5;  // in a row without a byte more at the server
constexpr auto kFirstPause = std::chrono::milliseconds(100);

absl::Status Refuse(const std::string& reason, const std::string& message) { return WithReason(absl::InvalidArgumentError(message), reason); }

// ---- files ----

// A safetensors file that is read piece by piece: not mapped, since one that is cut short meanwhile should be an error.
class InputFile {
 public:
  static absl::StatusOr<std::unique_ptr<InputFile>> Open(const std::string& path) {
    std::unique_ptr<InputFile> file(new InputFile(path));
    file->descriptor_ = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file->descriptor_ < 0) return absl::ErrnoToStatus(errno, Quoted(path));
    struct stat info = {};
    if (fstat(file->descriptor_, &info) != 0 || !S_ISREG(info.st_mode)) {
      return absl::InvalidArgumentError(StrCat(Quoted(path), ": expected a regular file or a folder"));
    }
    file->size_ = static_cast<uint64_t>(info.st_size);
    return file;
  }
  ~InputFile() {
    if (descriptor_ >= 0) close(descriptor_);
  }
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;

  const std::string& path() const { return path_; }

  absl::Status Read(uint64_t offset, uint64_t size, std::string* out) const {
    out->resize(size);
    for (uint64_t done = 0; done < size;) {
      const ssize_t count = pread(descriptor_, out->data() + done, size - done, static_cast<off_t>(offset + done));
      if (count < 0 && errno == EINTR) continue;
      if (count < 0) return absl::ErrnoToStatus(errno, Quoted(path_));
      if (count == 0) {
        return absl::DataLossError(StrCat(Quoted(path_), ": expected ", size_, " bytes as at first, the file ends after ", offset + done));
      }
      done += static_cast<uint64_t>(count);
    }
    return absl::OkStatus();
  }

  absl::StatusOr<SafetensorsHeader> ReadHeader() const {
    std::string head;
    if (absl::Status status = Read(0, std::min<uint64_t>(size_, 8), &head); !status.ok()) return status;
    if (head.size() == 8) {
      // A length that is too long is refused below, without reading on.
      const uint64_t header_bytes = SafetensorsHeaderBytes(head);
      if (header_bytes <= kMaxSafetensorsHeaderBytes) {
        if (absl::Status status = Read(0, std::min(size_, 8 + header_bytes), &head); !status.ok()) return status;
      }
    }
    return ParseSafetensorsHeader(head, size_, Quoted(path_));
  }

  absl::StatusOr<std::string> ReadAll() const {
    if (size_ > kMaxSafetensorsHeaderBytes) {
      return absl::InvalidArgumentError(StrCat(Quoted(path_), ": expected at most ", kMaxSafetensorsHeaderBytes, " bytes, got ", size_));
    }
    std::string text;
    if (absl::Status status = Read(0, size_, &text); !status.ok()) return status;
    return text;
  }

 private:
  explicit InputFile(std::string path) : path_(std::move(path)) {}

  const std::string path_;
  int descriptor_ = -1;
  uint64_t size_ = 0;
};

using Files = std::vector<std::unique_ptr<InputFile>>;

bool IsFolder(const std::string& path) {
  struct stat info = {};
  return stat(path.c_str(), &info) == 0 && S_ISDIR(info.st_mode);
}

absl::Status AddFile(const std::string& path, Files* files) {
  absl::StatusOr<std::unique_ptr<InputFile>> file = InputFile::Open(path);
  if (!file.ok()) return file.status();
  files->push_back(*std::move(file));
  return absl::OkStatus();
}

absl::StatusOr<Files> OpenFiles(const std::vector<std::string>& paths) {
  Files files;
  for (const std::string& path : paths) {
    if (!IsFolder(path)) {
      if (absl::Status status = AddFile(path, &files); !status.ok()) return status;
      continue;
    }
    // As in loading: the single file wins over an index.
    const std::string single = path + "/model.safetensors", index_path = path + "/model.safetensors.index.json";
    const absl::Status status = AddFile(single, &files);
    if (status.ok()) continue;
    if (!absl::IsNotFound(status)) return status;
    const absl::StatusOr<std::unique_ptr<InputFile>> index_file = InputFile::Open(index_path);
    if (absl::IsNotFound(index_file.status())) {
      return absl::NotFoundError(StrCat(Quoted(path), ": expected model.safetensors or model.safetensors.index.json, got neither"));
    }
    if (!index_file.ok()) return index_file.status();
    const absl::StatusOr<std::string> json = (*index_file)->ReadAll();
    if (!json.ok()) return json.status();
    const absl::StatusOr<SafetensorsIndex> index = ParseSafetensorsIndex(*json, Quoted(index_path));
    if (!index.ok()) return index.status();
    std::set<std::string> shards;
    for (const auto& [tensor, shard] : index->weight_map) shards.insert(shard);
    for (const std::string& shard : shards) {
      if (absl::Status added = AddFile(absl::StrCat(path, "/", shard), &files); !added.ok()) return added;
    }
  }
  return files;
}

// ---- tensors ----

// The same for all spellings of a tensor's name.
std::string Spelling(const std::string& name) {
  const std::string_view view = name;
  if (view.starts_with("model.mtp.")) return name.substr(std::string_view("model.").size());
  if (view.starts_with("model.language_model.")) return "model." + name.substr(std::string_view("model.language_model.").size());
  return name;
}

bool IsDraft(const std::string& name) { return std::string_view(name).starts_with("mtp."); }

bool IsFloat(const std::string& dtype) { return dtype == "BF16" || dtype == "F32" || dtype == "F16"; }

float HalfToFloat(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, magnitude = static_cast<uint32_t>(half & 0x7FFF) << 13;
  if ((half & 0x7C00) == 0x7C00) return std::bit_cast<float>(sign | magnitude | 0x7F800000u);
  // The exponents' biases are 15 and 127; multiplying also makes subnormals right.
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f));
}

uint16_t RoundToBFloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return static_cast<uint16_t>(bits >> 16 | 0x40);  // a NaN stays one
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);                // to nearest, ties to even
}

// `from` as elements of type `to`. REQUIRES: both are floating-point types, `to` BF16 or F32.
void Cast(const std::string& from_type, const std::string& from, const std::string& to_type, std::string* to) {
  const size_t from_width = from_type == "F32" ? 4 : 2, to_width = to_type == "F32" ? 4 : 2, count = from.size() / from_width;
  to->resize(count * to_width);
  for (size_t i = 0; i < count; ++i) {
    float value = 0.0f;
    if (from_width == 4) {
      std::memcpy(&value, from.data() + i * 4, 4);
    } else {
      uint16_t word = 0;
      std::memcpy(&word, from.data() + i * 2, 2);
      value = from_type == "F16" ? HalfToFloat(word) : std::bit_cast<float>(static_cast<uint32_t>(word) << 16);
    }
    if (to_width == 4) {
      std::memcpy(to->data() + i * 4, &value, 4);
    } else {
      const uint16_t word = RoundToBFloat16(value);
      std::memcpy(to->data() + i * 2, &word, 2);
    }
  }
}

std::string Hex(const Sha256Digest& digest) {
  return absl::BytesToHexString(absl::string_view(reinterpret_cast<const char*>(digest.data()), digest.size()));
}

// A tensor as it is sent.
struct Tensor {
  const InputFile* file = nullptr;
  TensorEntry entry;
  std::string name, dtype;
  std::optional<Sha256Digest> digest;  // once all of it has been read

  int64_t file_width() const { return SafetensorsElementBytes(entry.dtype); }
  int64_t width() const { return SafetensorsElementBytes(dtype); }
  int64_t num_bytes() const { return entry.num_elements() * width(); }

  // Elements as they are sent.
  absl::Status Read(int64_t first, int64_t count, std::string* out) const {
    const uint64_t begin = entry.begin + static_cast<uint64_t>(first * file_width()), size = static_cast<uint64_t>(count * file_width());
    if (dtype == entry.dtype) return file->Read(begin, size, out);
    std::string bytes;
    if (absl::Status status = file->Read(begin, size, &bytes); !status.ok()) return status;
    Cast(entry.dtype, bytes, dtype, out);
    return absl::OkStatus();
  }
};

std::string Label(const InputFile& file, const TensorEntry& entry) { return StrCat(Quoted(file.path()), ": tensor ", Quoted(entry.name)); }

absl::Status CheckTiedHead(const Tensor& head, const Tensor* embedding) {
  const absl::Status different =
      Refuse("UNKNOWN_TENSOR", StrCat(Label(*head.file, head.entry), ": expected none or a copy of the embedding it is tied to, got other values"));
  if (embedding == nullptr || head.entry.dtype != embedding->entry.dtype || head.entry.shape != embedding->entry.shape) return different;
  std::string head_bytes, embedding_bytes;
  const uint64_t size = head.entry.end - head.entry.begin;
  for (uint64_t offset = 0; offset < size; offset += kPieceBytes) {
    const uint64_t piece = std::min<uint64_t>(kPieceBytes, size - offset);
    if (absl::Status status = head.file->Read(head.entry.begin + offset, piece, &head_bytes); !status.ok()) return status;
    if (absl::Status status = embedding->file->Read(embedding->entry.begin + offset, piece, &embedding_bytes); !status.ok()) return status;
    if (head_bytes != embedding_bytes) return different;
  }
  return absl::OkStatus();
}

// Whether an update of `components` brings a tensor of that name; `name` may be in any spelling.
bool Brings(const std::vector<v1::WeightComponent::Type>& components, const std::string& name) {
  const auto type = IsDraft(Spelling(name)) ? v1::WeightComponent::DRAFT : v1::WeightComponent::TARGET;
  return components.empty() || std::find(components.begin(), components.end(), type) != components.end();
}

absl::StatusOr<std::vector<Tensor>> ListTensors(const Files& files, const v1::WeightInfo& info, const std::vector<v1::WeightComponent::Type>& components) {
  std::map<std::string, const v1::TensorSpec*> known;  // by spelling
  for (const v1::TensorSpec& spec : info.tensors()) known.emplace(Spelling(spec.name()), &spec);
  std::vector<Tensor> tensors;
  std::map<std::string, size_t> index_of;  // by spelling
  std::optional<Tensor> tied_head;
  for (const std::unique_ptr<InputFile>& file : files) {
    absl::StatusOr<SafetensorsHeader> header = file->ReadHeader();
    if (!header.ok()) return header.status();
    for (const TensorEntry& entry : header->tensors) {
      if (std::string_view(entry.name).starts_with("model.visual.") || !Brings(components, entry.name)) continue;
      const std::string spelling = Spelling(entry.name);
      const auto found = known.find(spelling);
      Tensor tensor{file.get(), entry, entry.name, entry.dtype, std::nullopt};
      if (found != known.end()) {
        tensor.name = found->second->name();
        if (IsFloat(entry.dtype) && IsFloat(found->second->dtype())) tensor.dtype = found->second->dtype();
      } else if (entry.name == "lm_head.weight") {  // the server's is tied, or it would list it
        tied_head = std::move(tensor);
        continue;
      }
      const auto [twin, is_new] = index_of.emplace(spelling, tensors.size());
      if (!is_new) {
        const Tensor& first = tensors[twin->second];
        return Refuse("DUPLICATE_TENSOR", StrCat(Label(*file, entry), ": already given as ", Label(*first.file, first.entry)));
      }
      tensors.push_back(std::move(tensor));
    }
  }
  if (tied_head.has_value()) {
    const auto embedding = index_of.find("model.embed_tokens.weight");
    if (absl::Status status = CheckTiedHead(*tied_head, embedding == index_of.end() ? nullptr : &tensors[embedding->second]); !status.ok()) return status;
  }
  return tensors;
}

// The component's digest, as weights.proto defines it; empty when nothing of it was sent.
std::string ComponentDigest(const std::vector<Tensor>& tensors, bool draft) {
  std::vector<const Tensor*> sorted;
  for (const Tensor& tensor : tensors) {
    if (IsDraft(tensor.name) == draft) sorted.push_back(&tensor);
  }
  if (sorted.empty()) return "";
  std::sort(sorted.begin(), sorted.end(), [](const Tensor* a, const Tensor* b) { return a->name < b->name; });
  Sha256 hash;
  for (const Tensor* tensor : sorted) {
    if (!tensor->digest.has_value()) return "";
    hash.Update(absl::StrCat(tensor->name, " ", tensor->dtype, " ", absl::StrJoin(tensor->entry.shape, ","), " ", Hex(*tensor->digest), "\n"));
  }
  return Hex(hash.Finish());
}

// ---- sending ----

// What one stream brings of a tensor: its elements from `first` on.
struct Part {
  size_t tensor = 0;
  int64_t first = 0;
};

// Makes the chunks of one stream, of two tensors in turn: SHA-256 of two costs little more than of one, here and at the server.
class ChunkSource {
 public:
  ChunkSource(std::vector<Tensor>* tensors, const WeightUpdateOptions& options) : tensors_(*tensors), options_(options) {
    for (const Tensor& tensor : tensors_) total_ += tensor.num_bytes();
  }

  // The next stream brings these.
  void Begin(std::vector<Part> parts) {
    parts_ = std::move(parts);
    next_part_ = num_ready_ = next_ready_ = 0;
    lanes_ = {};
    done_ = total_;
    for (const Part& part : parts_) done_ -= tensors_[part.tensor].num_bytes() - part.first * tensors_[part.tensor].width();
    is_first_ = true;
  }

  // False at the end, and when a file cannot be read; see status().
  bool Next(v1::WeightChunk* chunk) {
    if (next_ready_ == num_ready_ && !Prepare()) return false;
    chunk->Swap(&ready_[next_ready_++]);  // buffers go round
    if (is_first_) {
      chunk->set_update_id(options_.update_id);
    } else {
      chunk->clear_update_id();
    }
    is_first_ = false;
    done_ += static_cast<int64_t>(chunk->data().size());
    if (options_.on_progress != nullptr) options_.on_progress(done_, total_);
    return true;
  }

  const absl::Status& status() const { return status_; }

 private:
  // A tensor that is being read.
  struct Lane {
    Tensor* tensor = nullptr;
    int64_t first = 0;   // element that is read next
    int64_t hashed = 0;  // elements before this one are in `hash`
    Sha256 hash;
  };

  // Makes the next chunk of each lane; false if there is none.
  bool Prepare() {
    num_ready_ = next_ready_ = 0;
    std::array<Lane*, 2> lanes = {};  // of the chunks
    for (Lane& lane : lanes_) {
      if (lane.tensor == nullptr) {
        if (next_part_ == parts_.size()) continue;
        const Part& part = parts_[next_part_++];
        lane = Lane{.tensor = &tensors_[part.tensor], .first = part.first, .hashed = 0, .hash = Sha256()};
      }
      if (!Read(&lane, &ready_[num_ready_])) return false;
      lanes[num_ready_++] = &lane;
    }
    if (num_ready_ == 2) {
      Sha256::UpdateBoth(&lanes[0]->hash, ready_[0].data(), &lanes[1]->hash, ready_[1].data());
    } else if (num_ready_ == 1) {
      lanes[0]->hash.Update(ready_[0].data());
    }
    for (size_t i = 0; i < num_ready_; ++i) {
      Lane& lane = *lanes[i];
      lane.hashed = lane.first;
      if (lane.first < lane.tensor->entry.num_elements()) continue;
      lane.tensor->digest = lane.hash.Finish();
      ready_[i].set_digest(lane.tensor->digest->data(), lane.tensor->digest->size());
      lane.tensor = nullptr;
    }
    return num_ready_ > 0;
  }

  // The next chunk but for its digest; what the server has from the stream before is read to be hashed.
  bool Read(Lane* lane, v1::WeightChunk* chunk) {
    const Tensor& tensor = *lane->tensor;
    const int64_t per_chunk = kChunkBytes / std::max<int64_t>(1, tensor.width());
    for (; lane->hashed < lane->first && status_.ok(); lane->hashed = std::min(lane->first, lane->hashed + per_chunk)) {
      status_ = tensor.Read(lane->hashed, std::min(per_chunk, lane->first - lane->hashed), chunk->mutable_data());
      if (status_.ok()) lane->hash.Update(chunk->data());
    }
    const int64_t size = std::min(per_chunk, tensor.entry.num_elements() - lane->first);
    if (status_.ok()) status_ = tensor.Read(lane->first, size, chunk->mutable_data());
    chunk->set_tensor(tensor.name);
    chunk->set_offset(lane->first * tensor.width());
    chunk->clear_digest();
    lane->first += size;
    return status_.ok();
  }

  std::vector<Tensor>& tensors_;
  const WeightUpdateOptions& options_;
  std::vector<Part> parts_;
  size_t next_part_ = 0;  // that no lane has yet
  std::array<Lane, 2> lanes_;
  std::array<v1::WeightChunk, 2> ready_;  // those from next_ready_ to num_ready_
  size_t num_ready_ = 0, next_ready_ = 0;
  int64_t done_ = 0, total_ = 0;
  bool is_first_ = true;
  absl::Status status_;
};

// What another stream may mend: a lost connection, or a tensor that did not arrive as it was sent and starts over.
bool IsWorthAnother(const absl::Status& status) { return IsConnectionError(status) || absl::IsDataLoss(status); }

absl::Status SendAll(WeightsClient* client, const v1::StartWeightUpdateRequest& start, v1::WeightUpdate state, std::vector<Tensor>* tensors,
                     const WeightUpdateOptions& options) {
  std::map<std::string, size_t> index_of;
  for (size_t i = 0; i < tensors->size(); ++i) index_of.emplace((*tensors)[i].name, i);
  ChunkSource source(tensors, options);
  int failures = 0;
  auto pause = kFirstPause;
  while (state.missing_size() > 0) {
    // What the server lists is in the manifest's order, and so are the tensors here; of a long list it sends the beginning.
    std::vector<Part> parts;
    for (const v1::TensorProgress& missing : state.missing()) {
      const auto found = index_of.find(missing.name());
      if (found == index_of.end()) {
        return absl::InternalError(StrCat("the server misses tensor ", Quoted(missing.name()), ", which was not announced"));
      }
      parts.push_back({found->second, missing.next_offset() / std::max<int64_t>(1, (*tensors)[found->second].width())});
    }
    for (size_t i = parts.back().tensor + 1; i < tensors->size(); ++i) parts.push_back({i, 0});
    source.Begin(std::move(parts));
    const int64_t received = state.received_bytes();
    absl::StatusOr<v1::PushWeightsResult> result = client->PushWeights([&source](v1::WeightChunk* chunk) { return source.Next(chunk); });
    if (!source.status().ok()) return source.status();
    absl::Status status = result.status();
    if (result.ok()) {
      state = result->update();
    } else {
      if (!IsWorthAnother(status)) return status;
      std::this_thread::sleep_for(pause);
      pause *= 2;
      if (absl::StatusOr<v1::WeightUpdate> now = client->StartWeightUpdate(start); now.ok()) {
        state = *std::move(now);
      } else if (!IsConnectionError(now.status())) {
        return now.status();
      }
    }
    if (state.received_bytes() > received) {
      failures = 0;
      pause = kFirstPause;
    } else if (++failures == kMaxFailures) {
      return status.ok() ? absl::InternalError("the server took a whole stream and misses as much as before") : status;
    }
  }
  return absl::OkStatus();
}

// ---- updates ----

v1::StartWeightUpdateRequest StartRequest(const WeightUpdateOptions& options) {
  v1::StartWeightUpdateRequest start;
  start.set_update_id(options.update_id);
  start.set_target_step(options.target_step);
  if (options.base_step.has_value()) start.set_base_step(*options.base_step);
  if (!options.label.empty()) start.set_label(options.label);
  for (const v1::WeightComponent::Type component : options.components) start.add_components(component);
  start.set_in_flight(options.in_flight);
  if (options.deadline_ms.has_value()) start.set_deadline_ms(*options.deadline_ms);
  start.set_rewind(options.rewind);
  return start;
}

WeightUpdateOptions WithId(WeightUpdateOptions options) {
  if (options.update_id.empty()) {
    std::random_device device;
    options.update_id = absl::StrCat("push-", absl::Hex(device(), absl::kZeroPad8), absl::Hex(device(), absl::kZeroPad8));
  }
  return options;
}

absl::StatusOr<v1::FinishWeightUpdateResult> Finish(WeightsClient* client, const v1::FinishWeightUpdateRequest& request) {
  auto pause = kFirstPause;
  for (int failures = 0;; pause *= 2) {
    absl::StatusOr<v1::FinishWeightUpdateResult> result = client->FinishWeightUpdate(request);
    if (result.ok() || !IsConnectionError(result.status()) || ++failures == kMaxFailures) return result;
    std::this_thread::sleep_for(pause);
  }
}

// Runs the steps between start and end; an error takes the update back.
absl::StatusOr<v1::FinishWeightUpdateResult> RunUpdate(WeightsClient* client, const v1::StartWeightUpdateRequest& start,
                                                       const std::function<absl::StatusOr<v1::FinishWeightUpdateRequest>(const v1::WeightUpdate&)>& bring) {
  const absl::StatusOr<v1::WeightUpdate> state = client->StartWeightUpdate(start);
  if (!state.ok()) return state.status();
  absl::StatusOr<v1::FinishWeightUpdateRequest> finish = bring(*state);
  absl::Status status = finish.status();
  if (status.ok()) {
    finish->set_update_id(start.update_id());
    absl::StatusOr<v1::FinishWeightUpdateResult> result = Finish(client, *finish);
    if (result.ok()) return result;
    status = result.status();
  }
  v1::AbortWeightUpdateRequest abort;
  abort.set_update_id(start.update_id());
  client->AbortWeightUpdate(abort).IgnoreError();  // it may be gone already; otherwise it expires
  return status;
}

}  // namespace

absl::StatusOr<v1::FinishWeightUpdateResult> PushCheckpoint(WeightsClient* client, const std::vector<std::string>& paths,
                                                            const WeightUpdateOptions& given_options) {
  const WeightUpdateOptions options = WithId(given_options);
  const absl::StatusOr<Files> files = OpenFiles(paths);
  if (!files.ok()) return files.status();
  const absl::StatusOr<v1::WeightInfo> info = client->GetWeightInfo(/*tensors=*/true);
  if (!info.ok()) return info.status();
  absl::StatusOr<std::vector<Tensor>> tensors = ListTensors(*files, *info, options.components);
  if (!tensors.ok()) return tensors.status();
  v1::StartWeightUpdateRequest start = StartRequest(options);
  for (const Tensor& tensor : *tensors) {
    v1::TensorSpec* const spec = start.add_manifest();
    spec->set_name(tensor.name);
    spec->set_dtype(tensor.dtype);
    spec->mutable_shape()->Add(tensor.entry.shape.begin(), tensor.entry.shape.end());
  }
  return RunUpdate(client, start, [&](const v1::WeightUpdate& state) -> absl::StatusOr<v1::FinishWeightUpdateRequest> {
    if (absl::Status status = SendAll(client, start, state, &*tensors, options); !status.ok()) return status;
    v1::FinishWeightUpdateRequest finish;
    finish.set_expect_target_digest(ComponentDigest(*tensors, /*draft=*/false));
    finish.set_expect_draft_digest(ComponentDigest(*tensors, /*draft=*/true));
    return finish;
  });
}

absl::StatusOr<v1::FinishWeightUpdateResult> UpdateFromPath(WeightsClient* client, const std::string& path, const WeightUpdateOptions& given_options) {
  const WeightUpdateOptions options = WithId(given_options);
  const absl::StatusOr<v1::WeightInfo> info = client->GetWeightInfo(/*tensors=*/true);
  if (!info.ok()) return info.status();
  v1::StartWeightUpdateRequest start = StartRequest(options);
  for (const v1::TensorSpec& tensor : info->tensors()) {
    if (Brings(options.components, tensor.name())) *start.add_manifest() = tensor;
  }
  return RunUpdate(client, start, [&](const v1::WeightUpdate&) -> absl::StatusOr<v1::FinishWeightUpdateRequest> {
    v1::UpdateWeightsRequest request;
    request.set_update_id(options.update_id);
    request.set_path(path);
    if (const absl::Status status = client->UpdateWeights(request).status(); !status.ok()) return status;
    return v1::FinishWeightUpdateRequest();
  });
}

}  // namespace bebop
