// SPDX-License-Identifier: Apache-2.0
#include "engine/weights/weight_files.h"

#include <fcntl.h>
#include <linux/openat2.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <set>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "absl/strings/str_split.h"
#include "engine/base/status_macros.h"
#include "engine/base/status_reason.h"
#include "engine/formats/safetensors.h"
#include "engine/formats/strings.h"
#include "engine/weights/element_form.h"

namespace bebop {
namespace {

constexpr int64_t kPieceBytes = 4 << 20;
// O_NONBLOCK: a FIFO must be refused, not waited for.
constexpr int kReadFlags = O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY;

absl::Status Outside(const std::string& path) {
  return StatusWithReason(absl::StatusCode::kPermissionDenied, "OUTSIDE_ROOT",
                          StrCat(Quoted(path), ": expected a path that is relative to the weights root and stays beneath it"));
}

absl::Status SystemError(int error, const std::string& path) { return absl::ErrnoToStatus(error, Quoted(path)); }

// The descriptor, or -1 with errno set.
int OpenByKernel(int folder, const std::string& path) {
  open_how how = {};
  how.flags = static_cast<uint64_t>(kReadFlags);
  how.resolve = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS;
  // EAGAIN: somebody renamed a part meanwhile, and the kernel cannot tell any more.
  constexpr int kTries = 16;
  int descriptor = -1;
  for (int i = 0; i < kTries; ++i) {
    descriptor = static_cast<int>(syscall(SYS_openat2, folder, path.c_str(), &how, sizeof(how)));
    if (descriptor >= 0 || errno != EAGAIN) break;
  }
  return descriptor;
}

bool IsLink(int folder, const char* name) {
  struct stat info;
  return fstatat(folder, name, &info, AT_SYMLINK_NOFOLLOW) == 0 && S_ISLNK(info.st_mode);
}

absl::StatusOr<Descriptor> OpenByWalk(int folder, const std::string& path) {
  const std::vector<std::string> parts = absl::StrSplit(path, '/', absl::SkipEmpty());
  Descriptor opened;
  for (size_t i = 0; i < parts.size(); ++i) {
    const int parent = opened.valid() ? opened.value() : folder;
    const bool last = i + 1 == parts.size();
    Descriptor next(openat(parent, parts[i].c_str(), (last ? kReadFlags : O_PATH | O_DIRECTORY | O_CLOEXEC) | O_NOFOLLOW));
    if (!next.valid()) {
      const int error = errno;
      return IsLink(parent, parts[i].c_str()) ? Outside(path) : SystemError(error, path);
    }
    opened = std::move(next);
  }
  return opened;
}

// A regular file that is read piece by piece.
class InputFile {
 public:
  static absl::StatusOr<InputFile> Open(Descriptor descriptor, std::string path) {
    struct stat info;
    if (fstat(descriptor.value(), &info) != 0 || !S_ISREG(info.st_mode)) {
      return absl::InvalidArgumentError(StrCat(Quoted(path), ": expected a regular file or a folder"));
    }
    InputFile file;
    file.descriptor_ = std::move(descriptor);
    file.path_ = std::move(path);
    file.size_ = static_cast<uint64_t>(info.st_size);
    return file;
  }

  const std::string& path() const { return path_; }
  uint64_t size() const { return size_; }

  absl::Status Read(uint64_t offset, uint64_t size, std::string& out) const {
    out.resize(size);
    for (uint64_t done = 0; done < size;) {
      const ssize_t count = pread(descriptor_.value(), out.data() + done, size - done, static_cast<off_t>(offset + done));
      if (count < 0 && errno == EINTR) continue;
      if (count < 0) return SystemError(errno, path_);
      if (count == 0)
        return absl::DataLossError(
            StrCat(Quoted(path_), ": expected ", size_, " bytes as at first, the file ends after ", offset + done));
      done += static_cast<uint64_t>(count);
    }
    return absl::OkStatus();
  }

  absl::StatusOr<SafetensorsHeader> ReadHeader() const {
    std::string head;
    BEBOP_RETURN_IF_ERROR(Read(0, std::min<uint64_t>(size_, 8), head));
    if (head.size() == 8) {
      // A length that is too long is refused below, without reading on.
      const uint64_t header_bytes = SafetensorsHeaderBytes(head);
      if (header_bytes <= kMaxSafetensorsHeaderBytes) BEBOP_RETURN_IF_ERROR(Read(0, std::min(size_, 8 + header_bytes), head));
    }
    return ParseSafetensorsHeader(head, size_, Quoted(path_));
  }

 private:
  Descriptor descriptor_;
  std::string path_;
  uint64_t size_ = 0;
};

// A tensor of a file.
struct Source {
  const InputFile* file = nullptr;
  TensorEntry entry;

  std::string Label() const { return StrCat(Quoted(file->path()), ": tensor ", Quoted(entry.name)); }
  absl::Status Read(uint64_t offset, std::string& bytes) const {
    return file->Read(entry.begin + offset, std::min<uint64_t>(kPieceBytes, entry.end - entry.begin - offset), bytes);
  }
};

absl::Status Refuse(absl::string_view reason, const std::string& message) {
  return StatusWithReason(absl::StatusCode::kInvalidArgument, reason, message);
}

absl::StatusOr<std::vector<InputFile>> OpenFiles(const WeightRoot& root, const std::string& path) {
  BEBOP_ASSIGN_OR_RETURN(Descriptor opened, root.OpenBeneath(path));
  std::vector<InputFile> files;
  struct stat info;
  if (fstat(opened.value(), &info) != 0) return SystemError(errno, path);
  if (!S_ISDIR(info.st_mode)) {
    BEBOP_ASSIGN_OR_RETURN(InputFile file, InputFile::Open(std::move(opened), path));
    files.push_back(std::move(file));
    return files;
  }
  const auto open = [&](const std::string& name) -> absl::StatusOr<InputFile> {
    const std::string file_path = StrCat(path, "/", name);
    BEBOP_ASSIGN_OR_RETURN(Descriptor descriptor, root.OpenBeneath(file_path));
    return InputFile::Open(std::move(descriptor), file_path);
  };
  // As in loading: the single file wins over an index.
  absl::StatusOr<InputFile> single = open("model.safetensors");
  if (single.ok()) {
    files.push_back(*std::move(single));
    return files;
  }
  if (!absl::IsNotFound(single.status())) return single.status();
  const absl::StatusOr<InputFile> index_file = open("model.safetensors.index.json");
  if (absl::IsNotFound(index_file.status())) {
    return absl::NotFoundError(StrCat(Quoted(path), ": expected model.safetensors or model.safetensors.index.json, got neither"));
  }
  BEBOP_RETURN_IF_ERROR(index_file.status());
  if (index_file->size() > kMaxSafetensorsHeaderBytes) {
    return absl::InvalidArgumentError(StrCat(Quoted(index_file->path()), ": expected at most ", kMaxSafetensorsHeaderBytes,
                                             " bytes, got ", index_file->size()));
  }
  std::string json;
  BEBOP_RETURN_IF_ERROR(index_file->Read(0, index_file->size(), json));
  BEBOP_ASSIGN_OR_RETURN(const SafetensorsIndex index, ParseSafetensorsIndex(json, Quoted(index_file->path())));
  std::set<std::string> shards;
  for (const auto& [tensor, shard] : index.weight_map) shards.insert(shard);
  for (const std::string& shard : shards) {
    BEBOP_ASSIGN_OR_RETURN(InputFile file, open(shard));
    files.push_back(std::move(file));
  }
  return files;
}

using Between = std::function<absl::Status()>;

absl::Status CheckTiedHead(const Source& head, const Source* embedding, const Between& between) {
  const absl::Status different = Refuse(
      "UNKNOWN_TENSOR", StrCat(head.Label(), ": expected none or a copy of the embedding it is tied to, got other values"));
  if (embedding == nullptr || head.entry.dtype != embedding->entry.dtype || head.entry.shape != embedding->entry.shape)
    return different;
  std::string head_bytes, embedding_bytes;
  for (uint64_t offset = 0; offset < head.entry.end - head.entry.begin; offset += kPieceBytes) {
    BEBOP_RETURN_IF_ERROR(head.Read(offset, head_bytes));
    BEBOP_RETURN_IF_ERROR(embedding->Read(offset, embedding_bytes));
    if (head_bytes != embedding_bytes) return different;
    if (between != nullptr) BEBOP_RETURN_IF_ERROR(between());
  }
  return absl::OkStatus();
}

absl::Status Feed(const Source& source, const TensorInfo& tensor, WeightUpdate& update, const Between& between) {
  std::string bytes;
  std::vector<char> scratch;
  int64_t written = 0;
  for (uint64_t offset = 0; offset < source.entry.end - source.entry.begin; offset += kPieceBytes) {
    BEBOP_RETURN_IF_ERROR(source.Read(offset, bytes));
    const std::string_view elements = ToForm(source.entry.dtype, bytes, tensor.form, scratch);
    const absl::Status status = update.WriteChunk(tensor.name, written, elements);
    if (!status.ok())
      return StatusWithReason(status.code(), StatusReason(status),
                              StrCat(Quoted(source.file->path()), ": ", std::string(status.message())));
    written += static_cast<int64_t>(elements.size());
    if (between != nullptr) BEBOP_RETURN_IF_ERROR(between());
  }
  return absl::OkStatus();
}

}  // namespace

Descriptor::~Descriptor() {
  if (valid()) close(value_);
}

absl::StatusOr<WeightRoot> WeightRoot::Open(const std::string& path, Resolver resolver) {
  WeightRoot root;
  root.folder_ = Descriptor(open(path.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
  if (!root.folder_.valid()) return SystemError(errno, path);
  root.resolver_ = resolver;
  return root;
}

absl::StatusOr<Descriptor> WeightRoot::OpenBeneath(const std::string& path) const {
  if (path.empty() || path.find('\0') != std::string::npos) {
    return absl::InvalidArgumentError(StrCat("path: expected one beneath the weights root, got ", Quoted(path)));
  }
  const std::vector<std::string> parts = absl::StrSplit(path, '/');
  if (path.front() == '/' || std::find(parts.begin(), parts.end(), "..") != parts.end()) return Outside(path);
  if (resolver_ == Resolver::kKernel) {
    Descriptor descriptor(OpenByKernel(folder_.value(), path));
    if (descriptor.valid()) return descriptor;
    if (errno == EXDEV || errno == ELOOP) return Outside(path);
    // EPERM: a sandbox that does not know the call.
    if (errno != ENOSYS && errno != EPERM) return SystemError(errno, path);
  }
  return OpenByWalk(folder_.value(), path);
}

absl::Status ReadWeights(const WeightRoot& root, const std::string& path, WeightUpdate& update, const Between& between) {
  BEBOP_ASSIGN_OR_RETURN(const std::vector<InputFile> files, OpenFiles(root, path));
  std::unordered_map<std::string, const TensorInfo*> known;  // by slot name
  for (const TensorInfo& tensor : update.base_version().tensors) known.emplace(SlotName(tensor.name), &tensor);
  const TensorInfo& embedding = update.base_version().tensors.front();
  std::unordered_map<const TensorInfo*, Source> sources;
  std::optional<Source> tied_head;
  for (const InputFile& file : files) {
    BEBOP_ASSIGN_OR_RETURN(const SafetensorsHeader header, file.ReadHeader());
    for (const TensorEntry& entry : header.tensors) {
      if (entry.name.starts_with("model.visual.")) continue;
      const Source source{&file, entry};
      const std::string slot_name = SlotName(entry.name);
      const auto found = known.find(slot_name);
      if (found == known.end() && entry.name == "lm_head.weight") {  // the loaded model's is tied, or it would be known
        tied_head = source;
        continue;
      }
      const WeightComponent component = slot_name.starts_with("mtp.") ? WeightComponent::kDraft : WeightComponent::kTarget;
      if (!update.Brings(component)) continue;
      if (found == known.end()) return Refuse("UNKNOWN_TENSOR", StrCat(source.Label(), ": the loaded model has no such tensor"));
      const TensorInfo& tensor = *found->second;
      if (update.Find(tensor.name) == nullptr)
        return Refuse("UNKNOWN_TENSOR", StrCat(source.Label(), ": not in the manifest of this update"));
      if (!update.Takes(tensor, entry.dtype)) {
        return Refuse("WRONG_DTYPE",
                      StrCat(source.Label(), ": expected what loads as ", FormName(tensor.form), ", got ", entry.dtype));
      }
      if (entry.shape != tensor.shape) {
        return Refuse("WRONG_SHAPE",
                      StrCat(source.Label(), ": expected shape ", ShapeString(tensor.shape), ", got ", ShapeString(entry.shape)));
      }
      const auto [twin, inserted] = sources.emplace(&tensor, source);
      if (!inserted) return Refuse("DUPLICATE_TENSOR", StrCat(source.Label(), ": already given as ", twin->second.Label()));
    }
  }
  if (tied_head.has_value() && update.Brings(WeightComponent::kTarget)) {
    const auto source = sources.find(&embedding);
    BEBOP_RETURN_IF_ERROR(CheckTiedHead(*tied_head, source == sources.end() ? nullptr : &source->second, between));
  }
  for (const TensorInfo& tensor : update.base_version().tensors) {
    const auto source = sources.find(&tensor);
    if (source != sources.end()) BEBOP_RETURN_IF_ERROR(Feed(source->second, tensor, update, between));
  }
  return absl::OkStatus();
}

}  // namespace bebop
