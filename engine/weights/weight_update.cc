// SPDX-License-Identifier: Apache-2.0
#include "engine/weights/weight_update.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "engine/base/status_macros.h"
#include "engine/base/status_reason.h"
#include "engine/formats/safetensors.h"
#include "engine/formats/strings.h"
#include "engine/weights/element_form.h"
#include "kernels/common/check.h"

namespace bebop {
namespace {

constexpr int64_t kPieceBytes = 1 << 18;  // stays in a second-level cache between two uses
constexpr int64_t kRangeBytes = 64;       // a node of std::map with two offsets, and what the allocator adds

constexpr char kLmHead[] = "lm_head.weight";

absl::Status Invalid(absl::string_view reason, const std::string& message) {
  return StatusWithReason(absl::StatusCode::kInvalidArgument, reason, message);
}

std::string Label(std::string_view name) { return StrCat("tensor ", Quoted(name)); }

double ElementValue(DType form, std::string_view bytes, int64_t index) {
  const char* const at = bytes.data() + index * ElementBytes(form);
  if (form == DType::kFloat32) {
    float value;
    std::memcpy(&value, at, sizeof(value));
    return value;
  }
  BFloat16 value;
  std::memcpy(&value, at, sizeof(value));
  return ToFloat(value);
}

}  // namespace

int64_t WeightUpdate::Tensor::next_offset() const {
  return received.empty() || received.begin()->first > 0 ? 0 : received.begin()->second;
}

int64_t WeightUpdate::Tensor::charged_bytes() const {
  return received.size() <= 1 ? 0 : kRangeBytes * static_cast<int64_t>(received.size() - 1);
}

WeightUpdate::WeightUpdate(const ModelConfig& config, const ModelWeights& base, WeightUpdateSpec spec, int64_t limit_bytes,
                           DeviceMemory* memory)
    : config_(config),
      base_(base),
      spec_(std::move(spec)),
      limit_bytes_(limit_bytes),
      memory_(memory),
      base_slots_(SlotsOf(config_, base_)) {
  BEBOP_CHECK(base_.version.tensors.size() == base_slots_.size());
}

absl::StatusOr<std::unique_ptr<WeightUpdate>> WeightUpdate::Start(const ModelConfig& config, const ModelWeights& base,
                                                                  WeightUpdateSpec spec, int64_t limit_bytes,
                                                                  DeviceMemory* memory) {
  std::unique_ptr<WeightUpdate> update(new WeightUpdate(config, base, std::move(spec), limit_bytes, memory));
  BEBOP_RETURN_IF_ERROR(update->ResolveComponents());
  BEBOP_RETURN_IF_ERROR(update->CheckSteps());
  BEBOP_ASSIGN_OR_RETURN(const std::vector<size_t> slots, update->MatchManifest());

  // The first range of each tensor is charged here, so that an update that sends its tensors in order is never refused half-way.
  const int64_t bytes = base.storage_bytes + kRangeBytes * static_cast<int64_t>(slots.size());
  BEBOP_RETURN_IF_ERROR(update->Charge(bytes));
  absl::StatusOr<WeightLayout> next = AllocateWeights(config, base.embedding.dtype, base.mtp.has_value(), memory);
  if (absl::IsResourceExhausted(next.status()))
    return StatusWithReason(next.status().code(), "STAGING_BUDGET", next.status().message());
  BEBOP_RETURN_IF_ERROR(next.status());
  update->next_ = *std::move(next);
  BEBOP_CHECK(update->next_.weights->storage_bytes == base.storage_bytes &&
              update->next_.weights->embedding.layout == base.embedding.layout);
  update->staging_bytes_ = bytes;

  update->tensors_.reserve(slots.size());
  for (const size_t slot : slots) {
    const TensorInfo& info = update->base_.version.tensors[slot];
    update->tensor_of_.emplace(info.name, update->tensors_.size());
    update->tensors_.emplace_back(info, slot, ResidentTensor(update->next_.slots[slot], info.form, memory));
  }
  return update;
}

absl::Status WeightUpdate::ResolveComponents() {
  for (const WeightComponent component : spec_.components) (component == WeightComponent::kTarget ? target_ : draft_) = true;
  const bool has_draft = base_.mtp.has_value();
  if (spec_.components.empty()) {
    target_ = true;
    draft_ = has_draft;
  }
  if (!draft_ || has_draft) return absl::OkStatus();
  return StatusWithReason(absl::StatusCode::kFailedPrecondition, "NO_DRAFT",
                          "components: expected TARGET, the loaded model has no MTP layer; got DRAFT");
}

absl::Status WeightUpdate::CheckSteps() const {
  const WeightVersion& loaded = base_.version;
  const auto check = [&](const char* component, int64_t step, bool exact) -> absl::Status {
    if (exact && spec_.base_step.has_value() && *spec_.base_step != step) {
      return StatusWithReason(
          absl::StatusCode::kFailedPrecondition, "WRONG_BASE_STEP",
          StrCat("base_step: expected ", step, ", which is loaded as ", component, ", got ", *spec_.base_step),
          {{"field", "base_step"}, {"value", StrCat(*spec_.base_step)}, {"limit", StrCat(step)}, {"component", component}});
    }
    if (spec_.target_step > step || spec_.rewind) return absl::OkStatus();
    return StatusWithReason(absl::StatusCode::kFailedPrecondition, "STEP_NOT_NEWER",
                            StrCat("target_step: expected more than ", step, ", which is loaded as ", component,
                                   " (or rewind), got ", spec_.target_step),
                            {{"field", "target_step"},
                             {"value", StrCat(spec_.target_step)},
                             {"limit", StrCat("> ", step)},
                             {"component", component}});
  };
  if (is_delta() && !spec_.base_step.has_value()) {
    return Invalid("BASE_STEP_MISSING", "base_step: expected the step that an overwrite delta starts from, got none");
  }
  if (target_) BEBOP_RETURN_IF_ERROR(check("target", loaded.target_step, true));
  // A full update of both does not build on the loaded draft.
  if (draft_) BEBOP_RETURN_IF_ERROR(check("draft", loaded.draft_step, !target_ || is_delta()));
  return absl::OkStatus();
}

absl::Status WeightUpdate::UnknownName(const std::string& name) const {
  if (name == kLmHead && config_.tie_word_embeddings) {
    return Invalid("UNKNOWN_TENSOR", StrCat(Label(name), ": not expected: it is tied to ", Quoted(base_.version.tensors[0].name),
                                            "; leave it out"));
  }
  if (SlotName(name).starts_with("mtp.") && !base_.mtp.has_value())
    return Invalid("UNKNOWN_TENSOR", StrCat(Label(name), ": not expected: the loaded model has no MTP layer"));
  for (size_t i = 0; i < base_slots_.size(); ++i) {
    if (SlotName(name) != base_slots_[i].name) continue;
    return Invalid("UNKNOWN_TENSOR",
                   StrCat(Label(name), ": expected the loaded checkpoint's spelling ", Quoted(base_.version.tensors[i].name)));
  }
  return Invalid("UNKNOWN_TENSOR", StrCat(Label(name), ": the loaded model has no such tensor"));
}

absl::StatusOr<std::vector<size_t>> WeightUpdate::MatchManifest() const {
  const std::vector<TensorInfo>& known = base_.version.tensors;
  std::unordered_map<std::string_view, size_t> index_of;
  for (size_t i = 0; i < known.size(); ++i) index_of.emplace(known[i].name, i);
  std::vector<bool> named(known.size());
  std::vector<size_t> slots;
  absl::Status unknown;
  for (const TensorSpec& spec : spec_.manifest) {
    const auto found = index_of.find(spec.name);
    if (found == index_of.end()) {
      if (unknown.ok()) unknown = UnknownName(spec.name);
      continue;
    }
    const TensorInfo& tensor = known[found->second];
    if (!(tensor.mtp ? draft_ : target_)) {
      const char* const component = tensor.mtp ? "DRAFT" : "TARGET";
      return Invalid("UNKNOWN_TENSOR", StrCat(Label(spec.name), ": not expected without ", component, " in components"));
    }
    if (named[found->second])
      return Invalid("DUPLICATE_TENSOR", StrCat(Label(spec.name), ": expected once in the manifest, got it twice"));
    if (spec.dtype != FormName(tensor.form)) {
      return Invalid("WRONG_DTYPE",
                     StrCat(Label(spec.name), ": expected dtype ", FormName(tensor.form), ", got ", Quoted(spec.dtype)));
    }
    if (spec.shape != tensor.shape) {
      return Invalid("WRONG_SHAPE",
                     StrCat(Label(spec.name), ": expected shape ", ShapeString(tensor.shape), ", got ", ShapeString(spec.shape)));
    }
    named[found->second] = true;
    slots.push_back(found->second);
  }
  // A misspelled tensor is unknown and missing: the first says more.
  if (!unknown.ok()) return unknown;
  if (is_delta()) return slots;
  const TensorInfo* first = nullptr;
  int64_t num_missing = 0;
  bool has_draft = false, has_target = false;
  for (size_t i = 0; i < known.size(); ++i) {
    has_draft = has_draft || (named[i] && known[i].mtp);
    has_target = has_target || (named[i] && !known[i].mtp);
    if (named[i] || !(known[i].mtp ? draft_ : target_)) continue;
    if (num_missing++ == 0) first = &known[i];
  }
  if (num_missing == 0) return slots;
  std::string message = StrCat(Label(first->name), ": expected ", FormName(first->form), " ", ShapeString(first->shape),
                               " in the manifest, got nothing");
  if (num_missing > 1) absl::StrAppend(&message, " (and ", num_missing - 1, " more missing)");
  if (first->mtp && !has_draft && target_)
    absl::StrAppend(&message, "; to keep the loaded draft, set components to TARGET alone");
  if (target_ && has_draft && !has_target) absl::StrAppend(&message, "; to replace the draft alone, set components to DRAFT");
  return Invalid("MISSING_TENSOR", message);
}

absl::Status WeightUpdate::Charge(int64_t bytes) const {
  if (bytes <= limit_bytes_ - staging_bytes_) return absl::OkStatus();
  return StatusWithReason(
      absl::StatusCode::kResourceExhausted, "STAGING_BUDGET",
      StrCat("weight staging: expected at most ", limit_bytes_, " bytes, got ", staging_bytes_ + bytes),
      {{"field", "--weight-staging-bytes"}, {"value", StrCat(staging_bytes_ + bytes)}, {"limit", StrCat(limit_bytes_)}});
}

const TensorInfo* WeightUpdate::Find(std::string_view tensor) const {
  const auto found = tensor_of_.find(tensor);
  return found == tensor_of_.end() ? nullptr : tensors_[found->second].info;
}

bool WeightUpdate::Takes(const TensorInfo& tensor, std::string_view file_type) const {
  if (file_type != "BF16" && file_type != "F32" && file_type != "F16") return false;
  const size_t slot = static_cast<size_t>(&tensor - base_.version.tensors.data());
  return FormOf(file_type, ResidentType(base_slots_[slot])) == tensor.form;
}

absl::Status WeightUpdate::WriteChunk(std::string_view name, int64_t offset, std::string_view bytes,
                                      const std::optional<Sha256Digest>& digest) {
  std::string_view to_hash;
  BEBOP_ASSIGN_OR_RETURN(Tensor* const tensor, Take({name, offset, bytes, digest}, &to_hash));
  if (!to_hash.empty()) tensor->hash->Update(to_hash);
  return Conclude(*tensor);
}

absl::Status WeightUpdate::WriteChunks(const TensorChunk& first, const TensorChunk& second) {
  if (first.tensor == second.tensor) {  // one hash: in turn
    BEBOP_RETURN_IF_ERROR(WriteChunk(first.tensor, first.offset, first.bytes, first.digest));
    return WriteChunk(second.tensor, second.offset, second.bytes, second.digest);
  }
  std::string_view first_to_hash, second_to_hash;
  BEBOP_ASSIGN_OR_RETURN(Tensor* const one, Take(first, &first_to_hash));
  const absl::StatusOr<Tensor*> other = Take(second, &second_to_hash);
  if (other.ok() && !first_to_hash.empty() && !second_to_hash.empty()) {
    Sha256::UpdateBoth(&*one->hash, first_to_hash, &*(*other)->hash, second_to_hash);
  } else {
    if (!first_to_hash.empty()) one->hash->Update(first_to_hash);
    if (other.ok() && !second_to_hash.empty()) (*other)->hash->Update(second_to_hash);
  }
  const absl::Status first_status = Conclude(*one), second_status = other.ok() ? Conclude(**other) : other.status();
  return first_status.ok() ? second_status : first_status;
}

absl::StatusOr<WeightUpdate::Tensor*> WeightUpdate::Take(const TensorChunk& chunk, std::string_view* to_hash) {
  const auto& [name, offset, bytes, digest] = chunk;
  const auto found = tensor_of_.find(name);
  if (found == tensor_of_.end()) return Invalid("UNKNOWN_TENSOR", StrCat(Label(name), ": not in the manifest of this update"));
  BEBOP_CHECK(next_.weights != nullptr);
  Tensor& tensor = tensors_[found->second];
  const DType form = tensor.info->form;
  const int64_t size = static_cast<int64_t>(bytes.size()), width = ElementBytes(form);
  if (offset < 0 || offset > tensor.resident.num_bytes() || size > tensor.resident.num_bytes() - offset || offset % width != 0 ||
      size % width != 0) {
    return Invalid("WRONG_RANGE", StrCat(Label(name), ": expected whole elements of ", width, " bytes within ",
                                         tensor.resident.num_bytes(), " bytes, got ", size, " bytes at offset ", offset));
  }
  if (digest.has_value() && tensor.announced.has_value() && *digest != *tensor.announced) {
    return StatusWithReason(absl::StatusCode::kAlreadyExists, "CHUNK_CONFLICT",
                            StrCat(Label(name), ": digest ", DigestHex(*digest), " after digest ", DigestHex(*tensor.announced)));
  }
  if (const int64_t bad = FirstNonFinite(form, bytes); bad >= 0) {
    const int64_t element = offset / width + bad;
    return StatusWithReason(
        absl::StatusCode::kInvalidArgument, "NON_FINITE",
        StrCat(Label(name), ": element ", element, ": expected a finite value, got ", ElementValue(form, bytes, bad)),
        {{"tensor", std::string(name)}, {"element", StrCat(element)}});
  }
  BEBOP_RETURN_IF_ERROR(CheckRepeats(tensor, offset, bytes));
  if (size > 0 && !tensor.received.empty()) {
    const auto after = tensor.received.upper_bound(offset + size);  // the first range that begins behind the chunk
    const bool touches = after != tensor.received.begin() && std::prev(after)->second >= offset;
    if (!touches) BEBOP_RETURN_IF_ERROR(Charge(kRangeBytes));
  }

  if (digest.has_value()) tensor.announced = digest;
  if (size > 0) Receive(tensor, offset, bytes, to_hash);
  return &tensor;
}

absl::Status WeightUpdate::CheckRepeats(const Tensor& tensor, int64_t offset, std::string_view bytes) const {
  const int64_t end = offset + static_cast<int64_t>(bytes.size());
  auto range = tensor.received.upper_bound(offset);
  if (range != tensor.received.begin()) --range;
  std::vector<char> there;
  for (; range != tensor.received.end() && range->first < end; ++range) {
    const int64_t overlap_end = std::min(end, range->second);
    for (int64_t at = std::max(offset, range->first); at < overlap_end; at += kPieceBytes) {
      const int64_t size = std::min(kPieceBytes, overlap_end - at);
      there.resize(static_cast<size_t>(size));
      tensor.resident.Read(at, size, there.data());
      const char* const come = bytes.data() + (at - offset);
      if (std::memcmp(come, there.data(), there.size()) == 0) continue;
      const int64_t same = std::mismatch(there.begin(), there.end(), come).first - there.begin();
      return StatusWithReason(absl::StatusCode::kAlreadyExists, "CHUNK_CONFLICT",
                              StrCat(Label(tensor.info->name), ": the chunk of ", bytes.size(), " bytes at offset ", offset,
                                     " differs at offset ", at + same, " from what came before"));
    }
  }
  return absl::OkStatus();
}

void WeightUpdate::Receive(Tensor& tensor, int64_t offset, std::string_view bytes, std::string_view* to_hash) {
  if (is_delta() && !tensor.based) {
    CopyBase(tensor.slot);
    tensor.based = true;
  }
  const int64_t end = offset + static_cast<int64_t>(bytes.size());
  tensor.resident.Write(offset, bytes);

  // The ranges that the chunk overlaps or touches become one with it.
  staging_bytes_ -= tensor.charged_bytes();
  int64_t begin = offset, merged_end = end;
  auto range = tensor.received.upper_bound(offset);
  if (range != tensor.received.begin() && std::prev(range)->second >= offset) --range;
  while (range != tensor.received.end() && range->first <= end) {
    begin = std::min(begin, range->first);
    merged_end = std::max(merged_end, range->second);
    tensor.received_bytes -= range->second - range->first;
    range = tensor.received.erase(range);
  }
  tensor.received.emplace(begin, merged_end);
  tensor.received_bytes += merged_end - begin;
  staging_bytes_ += tensor.charged_bytes();

  if (tensor.actual.has_value()) return;
  if (!tensor.hash.has_value()) tensor.hash.emplace();
  // As far as there is no gap: the chunk's part is hashed from the chunk, which is in the cache.
  if (offset <= tensor.hashed_bytes && tensor.hashed_bytes < end) {
    *to_hash = bytes.substr(static_cast<size_t>(tensor.hashed_bytes - offset));
    tensor.hashed_bytes = end;
  }
}

absl::Status WeightUpdate::Conclude(Tensor& tensor) {
  BEBOP_RETURN_IF_ERROR(memory_->status());
  if (tensor.hash.has_value()) {
    const int64_t next = tensor.next_offset();
    std::vector<char> piece;
    while (tensor.hashed_bytes < next) {
      piece.resize(static_cast<size_t>(std::min(kPieceBytes, next - tensor.hashed_bytes)));
      tensor.resident.Read(tensor.hashed_bytes, static_cast<int64_t>(piece.size()), piece.data());
      tensor.hash->Update({piece.data(), piece.size()});
      tensor.hashed_bytes += static_cast<int64_t>(piece.size());
    }
    if (tensor.whole()) {
      tensor.actual = tensor.hash->Finish();
      tensor.hash.reset();
    }
  }
  if (!tensor.announced.has_value() || !tensor.actual.has_value()) return absl::OkStatus();
  const absl::Status status = CheckDigest(tensor, *tensor.actual);
  if (!status.ok()) StartOver(tensor);
  return status;
}

absl::Status WeightUpdate::CheckDigest(const Tensor& tensor, const Sha256Digest& actual) const {
  if (actual == *tensor.announced) return absl::OkStatus();
  return StatusWithReason(
      absl::StatusCode::kDataLoss, "DIGEST_MISMATCH",
      StrCat(Label(tensor.info->name), ": expected digest ", DigestHex(*tensor.announced), ", got ", DigestHex(actual)));
}

void WeightUpdate::StartOver(Tensor& tensor) {
  tensor.received.clear();  // one range, since the tensor is whole: charged with the manifest
  tensor.received_bytes = 0;
  tensor.based = false;
  tensor.hash.reset();
  tensor.hashed_bytes = 0;
  tensor.announced.reset();
  tensor.actual.reset();
}

void WeightUpdate::CopyBase(size_t slot) const {
  const ArenaRange from = RangeOf(base_slots_[slot]), to = RangeOf(next_.slots[slot]);
  memory_->Copy(to.data, from.data, from.bytes);
}

WeightUpdateProgress WeightUpdate::Progress(size_t max_missing) const {
  WeightUpdateProgress progress;
  progress.num_tensors = static_cast<int32_t>(tensors_.size());
  for (const Tensor& tensor : tensors_) {
    progress.received_bytes += tensor.received_bytes;
    progress.expected_bytes += is_delta() ? tensor.received_bytes : tensor.resident.num_bytes();
    if (Complete(tensor)) {
      ++progress.complete_tensors;
    } else if (progress.missing.size() < max_missing) {
      progress.missing.push_back({tensor.info->name, tensor.next_offset()});
    }
  }
  return progress;
}

absl::StatusOr<std::unique_ptr<ModelWeights>> WeightUpdate::Finish(const ExpectedDigests& expected) {
  BEBOP_CHECK(next_.weights != nullptr);
  const Tensor* first = nullptr;
  int64_t num_missing = 0;
  for (const Tensor& tensor : tensors_) {
    const bool proven = is_delta() && (tensor.info->mtp ? expected.draft : expected.target).has_value();
    if (proven || Complete(tensor)) continue;
    if (num_missing++ == 0) first = &tensor;
  }
  if (num_missing > 0) {
    std::string message = StrCat(Label(first->info->name), ": expected ", first->resident.num_bytes(),
                                 " bytes, got those before offset ", first->next_offset(), is_delta() ? " and no digest" : "");
    if (num_missing > 1) absl::StrAppend(&message, " (and ", num_missing - 1, " more incomplete)");
    return StatusWithReason(absl::StatusCode::kFailedPrecondition, "INCOMPLETE", message);
  }

  WeightVersion version = base_.version;
  std::vector<Sha256Digest> digests;
  for (const TensorInfo& tensor : version.tensors) digests.push_back(tensor.digest);
  std::vector<bool> touched(digests.size());
  for (const Tensor& tensor : tensors_) {
    // A delta without bytes says that the tensor is as it was; its digest may say otherwise.
    if (tensor.received_bytes > 0) {
      touched[tensor.slot] = true;
      digests[tensor.slot] = tensor.actual.has_value() ? *tensor.actual : ResidentDigest(tensor.resident);
    }
    if (tensor.announced.has_value()) BEBOP_RETURN_IF_ERROR(CheckDigest(tensor, digests[tensor.slot]));
  }
  version.SetDigests(digests);
  const auto check = [](const char* component, const std::optional<Sha256Digest>& wanted,
                        const std::optional<Sha256Digest>& got) -> absl::Status {
    if (!wanted.has_value() || wanted == got) return absl::OkStatus();
    return StatusWithReason(absl::StatusCode::kDataLoss, "DIGEST_MISMATCH",
                            StrCat(component, ": expected digest ", DigestHex(*wanted), ", got ",
                                   got.has_value() ? DigestHex(*got) : "no such component"));
  };
  BEBOP_RETURN_IF_ERROR(check("target", expected.target, version.target_digest));
  BEBOP_RETURN_IF_ERROR(check("draft", expected.draft, version.draft_digest));

  for (size_t slot = 0; slot < touched.size(); ++slot) {
    if (!touched[slot]) CopyBase(slot);
  }
  // On a device copies are in order with each other but not with another stream: reading back one byte waits for all of them.
  char last = 0;
  memory_->CopyOut(&last, next_.weights->storage.get(), 1);
  BEBOP_RETURN_IF_ERROR(memory_->status());

  if (target_) version.target_step = spec_.target_step;
  if (draft_) version.draft_step = spec_.target_step;
  version.label = spec_.label;
  next_.weights->version = std::move(version);
  return std::move(next_.weights);
}

}  // namespace bebop
