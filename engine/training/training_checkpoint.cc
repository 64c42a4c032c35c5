// SPDX-License-Identifier: Apache-2.0
#include "engine/training/training_checkpoint.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>
#include <numbers>
#include <span>
#include <string_view>
#include <utility>

#include "absl/strings/numbers.h"
#include "engine/base/logging.h"
#include "engine/base/status_macros.h"
#include "engine/formats/file.h"
#include "engine/formats/json.h"
#include "engine/formats/safetensors.h"
#include "engine/formats/strings.h"
#include "engine/weights/element_form.h"
#include "engine/weights/weight_digest.h"
#include "engine/weights/weight_files.h"
#include "engine/weights/weight_layout.h"
#include "kernels/common/check.h"
#include "kernels/common/philox.h"

namespace bebop {
namespace {

constexpr char kSingleFile[] = "model.safetensors";
constexpr char kIndexFile[] = "model.safetensors.index.json";
constexpr char kMtpFile[] = "mtp.safetensors";
constexpr char kOptimizerFile[] = "optimizer.safetensors";
constexpr char kStateFile[] = "state.json";
constexpr char kStepPrefix[] = "step-";
constexpr char kUnfinished[] = ".tmp";
constexpr size_t kKept = 2;
constexpr int64_t kStateVersion = 1;
constexpr size_t kPieceBytes = 4 << 20;
// Philox counters of initial weights (see also training_data.cc).
constexpr uint32_t kInitPurpose = 0x696E6974;

// --- Writing ---

absl::Status FileError(const std::string& path, std::string_view what) {
  const int error = errno;
  // A limit on the size of files is a full disk to whoever meets it.
  if (error == EFBIG || error == ENOSPC || error == EDQUOT) {
    return absl::ResourceExhaustedError(StrCat(path, ": ", what, ": ", std::strerror(error)));
  }
  return absl::ErrnoToStatus(error, StrCat(path, ": ", what));
}

std::string FolderOf(const std::string& path) {
  const std::string folder = std::filesystem::path(path).parent_path().string();
  return folder.empty() ? "." : folder;
}

// Makes what happened to the entries of a folder last.
absl::Status SyncFolder(const std::string& path) {
  const Descriptor folder(open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!folder.valid()) return FileError(path, "cannot be opened");
  // Some network file systems have no such call for folders.
  if (fsync(folder.value()) != 0 && errno != EINVAL) return FileError(path, "cannot be synced");
  return absl::OkStatus();
}

absl::Status Rename(const std::string& from, const std::string& to) {
  if (rename(from.c_str(), to.c_str()) != 0) return FileError(to, StrCat("cannot rename ", from, " to it"));
  return SyncFolder(FolderOf(to));
}

// A new file, hashed as it is written.
class FileWriter {
 public:
  static absl::StatusOr<FileWriter> Create(const std::string& path) {
    FileWriter writer(path);
    writer.descriptor_ = Descriptor(open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666));
    if (!writer.descriptor_.valid()) return FileError(path, "cannot be written");
    return writer;
  }

  absl::Status Write(std::string_view bytes) {
    hash_.Update(bytes);
    while (!bytes.empty()) {
      const ssize_t count = write(descriptor_.value(), bytes.data(), bytes.size());
      if (count < 0 && errno == EINTR) continue;
      if (count < 0) return FileError(path_, "cannot be written");
      bytes.remove_prefix(static_cast<size_t>(count));
    }
    return absl::OkStatus();
  }

  // Until the bytes are on the disk; returns their SHA-256. Call once, last.
  absl::StatusOr<Sha256Digest> Finish() {
    if (fsync(descriptor_.value()) != 0) return FileError(path_, "cannot be written");
    return hash_.Finish();
  }

 private:
  explicit FileWriter(std::string path) : path_(std::move(path)) {}
  std::string path_;
  Descriptor descriptor_;
  Sha256 hash_;
};

std::string JsonText(const nlohmann::ordered_json& json) {
  return json.dump(/*indent=*/-1, ' ', /*ensure_ascii=*/true, nlohmann::ordered_json::error_handler_t::replace);
}

std::vector<int64_t> ShapeOf(const MtpTensor& tensor) {
  if (tensor.is_vector) return {tensor.cols};
  return {tensor.rows, tensor.cols};
}

// Flat arrays of MtpLayout, each under its tensors' names with a prefix.
using NamedArrays = std::vector<std::pair<std::string, const std::vector<float>*>>;

absl::StatusOr<Sha256Digest> WriteSafetensors(const std::string& path, const MtpLayout& layout, const NamedArrays& arrays,
                                              DType dtype) {
  nlohmann::ordered_json header;
  header["__metadata__"] = {{"format", "pt"}};  // without it transformers refuses the file
  int64_t offset = 0;
  for (const auto& [prefix, values] : arrays) {
    BEBOP_CHECK(static_cast<int64_t>(values->size()) == layout.total);
    for (const MtpTensor& tensor : layout.tensors) {
      const int64_t end = offset + tensor.size() * ElementBytes(dtype);
      header[prefix + tensor.name] = {{"dtype", FormName(dtype)}, {"shape", ShapeOf(tensor)}, {"data_offsets", {offset, end}}};
      offset = end;
    }
  }
  std::string text = JsonText(header);
  text.resize((text.size() + 7) / 8 * 8, ' ');  // so that the tensors are aligned
  uint64_t size = text.size();
  std::string head(sizeof(size), '\0');
  std::memcpy(head.data(), &size, sizeof(size));  // little endian, as every processor this builds for

  BEBOP_ASSIGN_OR_RETURN(FileWriter file, FileWriter::Create(path));
  BEBOP_RETURN_IF_ERROR(file.Write(head + text));
  std::vector<char> converted;
  for (const auto& [prefix, values] : arrays) {
    for (const MtpTensor& tensor : layout.tensors) {
      std::string_view bytes(reinterpret_cast<const char*>(values->data() + tensor.offset),
                             static_cast<size_t>(tensor.size()) * sizeof(float));
      bytes = ToForm("F32", bytes, dtype, converted);
      for (size_t begin = 0; begin < bytes.size(); begin += kPieceBytes)
        BEBOP_RETURN_IF_ERROR(file.Write(bytes.substr(begin, kPieceBytes)));
    }
  }
  return file.Finish();
}

// --- Reading ---

// A tensor as it lies in a file.
struct Found {
  const SafetensorsFile* file = nullptr;
  const TensorEntry* entry = nullptr;
  std::string Label() const { return StrCat(file->path(), ": tensor ", Quoted(entry->name)); }
};

// The MTP tensors of a file or checkpoint folder, by slot name.
struct MtpSource {
  std::vector<std::unique_ptr<SafetensorsFile>> files;
  std::map<std::string, Found> tensors;
};

bool IsMtp(std::string_view slot_name) { return slot_name.starts_with("mtp."); }

absl::Status AddFile(const std::string& path, bool only_mtp, MtpSource& source) {
  BEBOP_ASSIGN_OR_RETURN(SafetensorsFile opened, SafetensorsFile::Open(path));
  source.files.push_back(std::make_unique<SafetensorsFile>(std::move(opened)));
  const SafetensorsFile& file = *source.files.back();
  for (const TensorEntry& entry : file.header().tensors) {
    const std::string name = SlotName(entry.name);
    if (!IsMtp(name)) {
      if (!only_mtp) continue;
      return absl::InvalidArgumentError(
          StrCat(path, ": tensor ", Quoted(entry.name), ": expected only mtp.* tensors in this file"));
    }
    const auto [twin, inserted] = source.tensors.emplace(name, Found{&file, &entry});
    if (inserted) continue;
    return absl::InvalidArgumentError(StrCat(path, ": tensor ", Quoted(entry.name), ": already given as ",
                                             Quoted(twin->second.entry->name), " in ", twin->second.file->path()));
  }
  return absl::OkStatus();
}

absl::StatusOr<MtpSource> OpenMtpSource(const std::string& path) {
  MtpSource source;
  std::error_code error;
  if (!std::filesystem::is_directory(path, error)) {
    BEBOP_RETURN_IF_ERROR(AddFile(path, /*only_mtp=*/true, source));
    return source;
  }
  const std::string single = StrCat(path, "/", kSingleFile), index_path = StrCat(path, "/", kIndexFile);
  if (FileExists(single)) {
    BEBOP_RETURN_IF_ERROR(AddFile(single, /*only_mtp=*/false, source));
    return source;
  }
  if (!FileExists(index_path)) {
    return absl::NotFoundError(StrCat(path, ": expected ", kSingleFile, " or ", kIndexFile, ", got neither"));
  }
  BEBOP_ASSIGN_OR_RETURN(const MappedFile index_file, MappedFile::Open(index_path));
  BEBOP_ASSIGN_OR_RETURN(const SafetensorsIndex index, ParseSafetensorsIndex(index_file.bytes(), index_path));
  std::map<std::string_view, bool> shards;
  for (const auto& [tensor, shard] : index.weight_map) {
    if (IsMtp(SlotName(tensor))) shards.emplace(shard, true);
  }
  for (const auto& [shard, unused] : shards) BEBOP_RETURN_IF_ERROR(AddFile(StrCat(path, "/", shard), /*only_mtp=*/false, source));
  return source;
}

absl::Status CheckEntry(const Found& found, const std::vector<int64_t>& shape) {
  if (found.entry->shape != shape) {
    return absl::InvalidArgumentError(
        StrCat(found.Label(), ": expected shape ", ShapeString(shape), ", got ", ShapeString(found.entry->shape)));
  }
  const std::string& type = found.entry->dtype;
  if (type == "BF16" || type == "F32" || type == "F16") return absl::OkStatus();
  return absl::InvalidArgumentError(StrCat(found.Label(), ": expected type BF16, F32 or F16, got ", type));
}

// flat <- the tensor's values.
absl::Status ReadValues(const Found& found, const MtpTensor& tensor, std::vector<float>& flat) {
  std::vector<char> converted;
  const std::string_view bytes = ToForm(found.entry->dtype, found.file->Bytes(*found.entry), DType::kFloat32, converted);
  float* const values = flat.data() + tensor.offset;
  std::memcpy(values, bytes.data(), bytes.size());
  const int64_t bad = FirstNonFinite(DType::kFloat32, bytes);
  if (bad < 0) return absl::OkStatus();
  return absl::InvalidArgumentError(StrCat(found.Label(), ": element ", bad, ": expected a finite value, got ", values[bad]));
}

// One file of a training checkpoint: exactly the tensors of `prefixes`, in float32.
absl::Status ReadArrays(const std::string& path, const MtpLayout& layout,
                        const std::vector<std::pair<std::string, std::vector<float>*>>& arrays) {
  BEBOP_ASSIGN_OR_RETURN(const SafetensorsFile file, SafetensorsFile::Open(path));
  std::map<std::string_view, const TensorEntry*> entries;
  for (const TensorEntry& entry : file.header().tensors) entries.emplace(entry.name, &entry);
  for (const auto& [prefix, values] : arrays) {
    values->assign(static_cast<size_t>(layout.total), 0.0f);
    for (const MtpTensor& tensor : layout.tensors) {
      const auto entry = entries.find(prefix + tensor.name);
      if (entry == entries.end())
        return absl::NotFoundError(StrCat(path, ": tensor ", Quoted(prefix + tensor.name), ": expected, got nothing"));
      const Found found{&file, entry->second};
      BEBOP_RETURN_IF_ERROR(CheckEntry(found, ShapeOf(tensor)));
      BEBOP_RETURN_IF_ERROR(ReadValues(found, tensor, *values));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckDigest(const std::string& path, const std::string& expected) {
  BEBOP_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(path));
  const std::string actual = DigestHex(Sha256Of(file.bytes()));
  if (actual == expected) return absl::OkStatus();
  return absl::DataLossError(StrCat(path, ": expected SHA-256 ", expected, " as ", kStateFile, " says, got ", actual));
}

// --- Folders of checkpoints ---

// The step of an entry called step-<digits>, and with `suffix` behind; -1: it is none of ours.
int64_t StepOf(std::string_view name, std::string_view suffix) {
  if (!name.starts_with(kStepPrefix) || !name.ends_with(suffix)) return -1;
  name.remove_prefix(std::string_view(kStepPrefix).size());
  if (name.size() < suffix.size()) return -1;
  name.remove_suffix(suffix.size());
  int64_t step = 0;
  // As PathOf writes it: no sign, no space, no leading zero.
  if (!absl::SimpleAtoi(absl::string_view(name.data(), name.size()), &step) || name != std::to_string(step)) return -1;
  return step;
}

// Steps that the folder has, newest first.
absl::StatusOr<std::vector<int64_t>> ListSteps(const std::string& folder) {
  std::vector<int64_t> steps;
  std::error_code error;
  std::filesystem::directory_iterator entry(folder, error);
  if (error == std::errc::no_such_file_or_directory) return steps;
  for (; !error && entry != std::filesystem::directory_iterator(); entry.increment(error)) {
    const int64_t step = StepOf(entry->path().filename().native(), "");
    if (step >= 0) steps.push_back(step);
  }
  if (error) return absl::ErrnoToStatus(error.value(), folder);
  std::sort(steps.begin(), steps.end(), std::greater<>());
  return steps;
}

// A reader sees the checkpoint `path` as either whole or not there.
absl::Status RemoveStep(const std::string& path) {
  const std::string doomed = path + kUnfinished;
  std::error_code error;
  std::filesystem::remove_all(doomed, error);
  if (!error && rename(path.c_str(), doomed.c_str()) != 0) return FileError(path, "cannot be removed");
  if (!error) std::filesystem::remove_all(doomed, error);
  return error ? absl::ErrnoToStatus(error.value(), StrCat(path, ": cannot be removed")) : absl::OkStatus();
}

// Removes all but the newest checkpoints, and what killed runs have left unfinished.
absl::Status Prune(const std::string& folder) {
  BEBOP_ASSIGN_OR_RETURN(const std::vector<int64_t> steps, ListSteps(folder));
  for (size_t i = kKept; i < steps.size(); ++i) BEBOP_RETURN_IF_ERROR(RemoveStep(StrCat(folder, "/", kStepPrefix, steps[i])));
  std::vector<std::string> unfinished;
  std::error_code error;
  for (std::filesystem::directory_iterator entry(folder, error); !error && entry != std::filesystem::directory_iterator();
       entry.increment(error)) {
    if (StepOf(entry->path().filename().native(), kUnfinished) >= 0) unfinished.push_back(entry->path().string());
  }
  for (const std::string& path : unfinished) {
    if (!error) std::filesystem::remove_all(path, error);
  }
  if (error == std::errc::no_such_file_or_directory) return absl::OkStatus();
  return error ? absl::ErrnoToStatus(error.value(), StrCat(folder, ": cannot be cleared")) : absl::OkStatus();
}

// Fills the folder `part`, until all of it is on the disk.
absl::Status WriteStep(const std::string& part, const TrainingProgress& progress, const MtpLayout& layout) {
  if (mkdir(part.c_str(), 0777) != 0) return FileError(part, "cannot be made");
  const MtpTrainer::State& state = progress.state;
  BEBOP_ASSIGN_OR_RETURN(const Sha256Digest mtp_digest,
                         WriteSafetensors(StrCat(part, "/", kMtpFile), layout, {{"", &state.parameters}}, DType::kFloat32));
  BEBOP_ASSIGN_OR_RETURN(
      const Sha256Digest optimizer_digest,
      WriteSafetensors(StrCat(part, "/", kOptimizerFile), layout,
                       {{"first_moment.", &state.first_moment}, {"second_moment.", &state.second_moment}}, DType::kFloat32));
  nlohmann::ordered_json json;
  json["version"] = kStateVersion;
  json["step"] = state.step;
  json["epoch"] = progress.epoch;
  json["batch"] = progress.batch;
  json["tokens"] = progress.tokens;
  json["seconds"] = progress.seconds;
  json["mtp_sha256"] = DigestHex(mtp_digest);
  json["optimizer_sha256"] = DigestHex(optimizer_digest);
  json["identity"] = progress.identity;
  BEBOP_ASSIGN_OR_RETURN(FileWriter file, FileWriter::Create(StrCat(part, "/", kStateFile)));
  BEBOP_RETURN_IF_ERROR(file.Write(JsonText(json) + "\n"));
  BEBOP_RETURN_IF_ERROR(file.Finish().status());
  return SyncFolder(part);
}

absl::StatusOr<TrainingProgress> ReadStep(const std::string& path, const MtpLayout& layout) {
  TrainingProgress progress;
  const std::string state_path = StrCat(path, "/", kStateFile), mtp_path = StrCat(path, "/", kMtpFile),
                    optimizer_path = StrCat(path, "/", kOptimizerFile);
  BEBOP_ASSIGN_OR_RETURN(const MappedFile state_file, MappedFile::Open(state_path));
  BEBOP_ASSIGN_OR_RETURN(const JsonValue value, ParseJson(state_file.bytes(), state_path));
  BEBOP_ASSIGN_OR_RETURN(const JsonObject object, JsonObject::Open(value, state_path));
  constexpr int64_t kAny = std::numeric_limits<int64_t>::max();
  BEBOP_RETURN_IF_ERROR(object.Integer("version", kStateVersion, kStateVersion).status());
  BEBOP_ASSIGN_OR_RETURN(progress.state.step, object.Integer("step", 0, kAny));
  BEBOP_ASSIGN_OR_RETURN(progress.epoch, object.Integer("epoch", 0, kAny));
  BEBOP_ASSIGN_OR_RETURN(progress.batch, object.Integer("batch", 0, kAny));
  BEBOP_ASSIGN_OR_RETURN(progress.tokens, object.Integer("tokens", 0, kAny));
  BEBOP_ASSIGN_OR_RETURN(progress.seconds, object.Number("seconds", 0.0, 1e12));
  BEBOP_RETURN_IF_ERROR(object.Object("identity").status());
  for (const auto& [name, text] : *object.Get("identity")->object()) {
    if (text.string() == nullptr)
      return absl::InvalidArgumentError(StrCat(state_path, ": identity.", name, ": expected a string"));
    progress.identity[name] = *text.string();
  }
  BEBOP_ASSIGN_OR_RETURN(const std::string mtp_digest, object.String("mtp_sha256"));
  BEBOP_ASSIGN_OR_RETURN(const std::string optimizer_digest, object.String("optimizer_sha256"));
  BEBOP_RETURN_IF_ERROR(CheckDigest(mtp_path, mtp_digest));
  BEBOP_RETURN_IF_ERROR(CheckDigest(optimizer_path, optimizer_digest));
  BEBOP_RETURN_IF_ERROR(ReadArrays(mtp_path, layout, {{"", &progress.state.parameters}}));
  BEBOP_RETURN_IF_ERROR(
      ReadArrays(optimizer_path, layout,
                 {{"first_moment.", &progress.state.first_moment}, {"second_moment.", &progress.state.second_moment}}));
  return progress;
}

absl::Status CheckIdentity(const std::string& path, const std::map<std::string, std::string>& found,
                           const std::map<std::string, std::string>& wanted) {
  std::map<std::string, std::pair<std::string, std::string>> both;  // name -> found, wanted
  for (const auto& [name, value] : found) both[name].first = value;
  for (const auto& [name, value] : wanted) both[name].second = value;
  for (const auto& [name, values] : both) {
    const auto& [old_value, new_value] = values;
    if (old_value == new_value) continue;
    return absl::FailedPreconditionError(
        StrCat(path, ": ", name, ": the run that was stopped had ", old_value.empty() ? "nothing" : old_value, ", this one has ",
               new_value.empty() ? "nothing" : new_value, "; give what it had to go on with it, or begin anew without --resume"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::vector<float>> ReadMtpParameters(const std::string& path, const ModelConfig& config,
                                                     const MtpLayout& layout) {
  if (config.num_mtp_layers == 0) {
    return absl::InvalidArgumentError("config.json: mtp_num_hidden_layers: expected 1 to train the MTP layer, got 0");
  }
  BEBOP_ASSIGN_OR_RETURN(const MtpSource source, OpenMtpSource(path));
  if (source.tensors.empty()) {
    return absl::FailedPreconditionError(StrCat(path,
                                                ": expected mtp.* tensors to begin from, got none: give them with --mtp FILE, or "
                                                "begin from random ones with --init-mtp"));
  }
  std::vector<float> flat(static_cast<size_t>(layout.total), 0.0f);
  size_t num_found = 0, num_missing = 0;
  std::string first_missing;
  for (const MtpTensor& tensor : layout.tensors) {
    const auto found = source.tensors.find(tensor.name);
    if (found == source.tensors.end()) {
      if (num_missing++ == 0)
        first_missing =
            StrCat(path, ": tensor ", Quoted(tensor.name), ": expected ", ShapeString(ShapeOf(tensor)), ", got nothing");
      continue;
    }
    ++num_found;
    BEBOP_RETURN_IF_ERROR(CheckEntry(found->second, ShapeOf(tensor)));
    BEBOP_RETURN_IF_ERROR(ReadValues(found->second, tensor, flat));
  }
  std::string first_unexpected;  // a misnamed tensor is both missing and unexpected: say both
  if (num_found < source.tensors.size()) {
    for (const auto& [name, found] : source.tensors) {
      const bool known = std::any_of(layout.tensors.begin(), layout.tensors.end(),
                                     [&name = name](const MtpTensor& tensor) { return tensor.name == name; });
      if (known) continue;
      first_unexpected = StrCat(found.Label(), ": unexpected, got ", found.entry->dtype, " ", ShapeString(found.entry->shape));
      break;
    }
  }
  if (num_missing > 0) {
    if (num_missing > 1) first_missing += StrCat(" (and ", num_missing - 1, " more missing)");
    return absl::NotFoundError(first_unexpected.empty() ? first_missing : StrCat(first_missing, "; ", first_unexpected));
  }
  if (!first_unexpected.empty()) return absl::InvalidArgumentError(first_unexpected);
  return flat;
}

absl::StatusOr<std::optional<DType>> MtpFileType(const std::string& path) {
  BEBOP_ASSIGN_OR_RETURN(const MtpSource source, OpenMtpSource(path));
  if (source.tensors.empty()) return std::nullopt;
  const bool is_bfloat16 = std::all_of(source.tensors.begin(), source.tensors.end(),
                                       [](const auto& tensor) { return tensor.second.entry->dtype == "BF16"; });
  return is_bfloat16 ? DType::kBFloat16 : DType::kFloat32;
}

std::vector<float> InitMtpParameters(const MtpLayout& layout, uint64_t seed) {
  std::vector<float> flat(static_cast<size_t>(layout.total), 0.0f);
  for (const MtpTensor& tensor : layout.tensors) {
    if (tensor.is_vector || tensor.offset == layout.fc) continue;
    const bool writes_stream = tensor.offset == layout.out || tensor.offset == layout.down;
    const double deviation = writes_stream ? 0.02 * std::numbers::sqrt2 / 2.0 : 0.02;
    // Keyed by the place in the flat array: two normals a draw (Box and Muller).
    for (int64_t i = 0; i < tensor.size(); i += 2) {
      const uint64_t place = static_cast<uint64_t>(tensor.offset + i);
      const auto words = Philox4x32(seed, {static_cast<uint32_t>(place), static_cast<uint32_t>(place >> 32), 0, kInitPurpose});
      const double radius_uniform =
          (static_cast<double>(static_cast<uint64_t>(words[0]) << 21 | words[1] >> 11) + 0.5) * 0x1p-53;  // never 0
      const double angle = 2.0 * std::numbers::pi * static_cast<double>(words[2]) * 0x1p-32;
      const double radius = deviation * std::sqrt(-2.0 * std::log(radius_uniform));
      flat[place] = static_cast<float>(radius * std::cos(angle));
      if (i + 1 < tensor.size()) flat[place + 1] = static_cast<float>(radius * std::sin(angle));
    }
  }
  // Both halves of a pair have variance 1 after their norms; so has this mean of them.
  const float share = static_cast<float>(std::numbers::sqrt2 / 2.0);
  for (int64_t row = 0; row < layout.hidden; ++row) {
    float* const weights = flat.data() + layout.fc + row * 2 * layout.hidden;
    weights[row] = weights[layout.hidden + row] = share;
  }
  return flat;
}

absl::Status CheckWritable(const std::string& path) {
  const std::string folder = FolderOf(path);
  std::error_code error;
  if (std::filesystem::is_directory(path, error))
    return absl::InvalidArgumentError(StrCat(path, ": expected a file to write, got a folder"));
  if (!std::filesystem::is_directory(folder, error)) return absl::NotFoundError(StrCat(path, ": ", folder, " is no folder"));
  const std::string part = path + kUnfinished;
  const Descriptor fresh(open(part.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666));
  if (fresh.valid()) {
    unlink(part.c_str());
    return absl::OkStatus();
  }
  // One that is there stays until the trained weights take its place.
  if (errno == EEXIST && Descriptor(open(part.c_str(), O_WRONLY | O_CLOEXEC)).valid()) return absl::OkStatus();
  return FileError(part, "cannot be written");
}

absl::Status WriteMtpFile(const std::string& path, const MtpLayout& layout, const std::vector<float>& parameters, DType dtype) {
  const std::string part = path + kUnfinished;
  absl::Status status = WriteSafetensors(part, layout, {{"", &parameters}}, dtype).status();
  if (status.ok()) status = Rename(part, path);
  if (!status.ok()) unlink(part.c_str());
  return status;
}

TrainingCheckpoints::TrainingCheckpoints(std::string folder) : folder_(std::move(folder)) {}

absl::StatusOr<int64_t> TrainingCheckpoints::Newest() const {
  BEBOP_ASSIGN_OR_RETURN(const std::vector<int64_t> steps, ListSteps(folder_));
  return steps.empty() ? -1 : steps.front();
}

std::string TrainingCheckpoints::PathOf(int64_t step) const { return StrCat(folder_, "/", kStepPrefix, step); }

absl::Status TrainingCheckpoints::Save(const TrainingProgress& progress, const MtpLayout& layout) {
  const int64_t step = progress.state.step;
  const std::string path = PathOf(step), part = path + kUnfinished;
  if (mkdir(folder_.c_str(), 0777) != 0 && errno != EEXIST) return FileError(folder_, "cannot be made");
  BEBOP_RETURN_IF_ERROR(SyncFolder(FolderOf(folder_)));
  if (FileExists(path)) {
    // Saved already, and a signal came before the next step; or it is damaged.
    const absl::StatusOr<TrainingProgress> old = ReadStep(path, layout);
    if (old.ok() && old->identity == progress.identity) return absl::OkStatus();
    BEBOP_RETURN_IF_ERROR(RemoveStep(path));
  }
  std::error_code error;
  std::filesystem::remove_all(part, error);
  absl::Status status = WriteStep(part, progress, layout);
  if (status.ok()) status = Rename(part, path);
  if (!status.ok()) {
    std::filesystem::remove_all(part, error);
    return status;
  }
  // The new one is safe, so that a failure from here on costs room and nothing else.
  if (const absl::Status pruned = Prune(folder_); !pruned.ok()) Log(LogLevel::kWarning, std::string(pruned.message()));
  return absl::OkStatus();
}

absl::StatusOr<std::optional<TrainingProgress>> TrainingCheckpoints::Load(
    const MtpLayout& layout, const std::map<std::string, std::string>& identity) const {
  BEBOP_ASSIGN_OR_RETURN(const std::vector<int64_t> steps, ListSteps(folder_));
  absl::Status first_error;
  for (const int64_t step : steps) {
    const std::string path = PathOf(step);
    absl::StatusOr<TrainingProgress> progress = ReadStep(path, layout);
    if (progress.ok()) {
      BEBOP_RETURN_IF_ERROR(CheckIdentity(path, progress->identity, identity));
      return std::optional<TrainingProgress>(*std::move(progress));
    }
    // Renamed when it was whole: something else has damaged it since.
    Log(LogLevel::kWarning, StrCat("skipped: ", std::string(progress.status().message())));
    first_error.Update(progress.status());
  }
  if (!first_error.ok()) return first_error;
  return std::nullopt;
}

absl::Status TrainingCheckpoints::Remove() {
  BEBOP_ASSIGN_OR_RETURN(const std::vector<int64_t> steps, ListSteps(folder_));
  // Oldest first: a kill half-way leaves the newest.
  for (auto step = steps.rbegin(); step != steps.rend(); ++step) BEBOP_RETURN_IF_ERROR(RemoveStep(PathOf(*step)));
  BEBOP_RETURN_IF_ERROR(Prune(folder_));
  if (rmdir(folder_.c_str()) != 0 && errno != ENOENT && errno != ENOTEMPTY && errno != EEXIST)
    return FileError(folder_, "cannot be removed");
  return absl::OkStatus();
}

}  // namespace bebop
