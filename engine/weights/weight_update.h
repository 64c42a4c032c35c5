// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/config/model_config.h"
#include "engine/memory/device_memory.h"
#include "engine/weights/model_weights.h"
#include "engine/weights/resident_tensor.h"
#include "engine/weights/weight_digest.h"
#include "engine/weights/weight_layout.h"

namespace bebop {

enum class WeightComponent : uint8_t {
  kTarget,
  kDraft,  // the mtp.* tensors
};

enum class WeightEncoding : uint8_t {
  kFull,            // every tensor of the components, every byte
  kOverwriteDelta,  // what is not sent stays as it is loaded
};

// A tensor as a learner announces it.
struct TensorSpec {
  std::string name;
  std::string dtype;
  std::vector<int64_t> shape;
  bool operator==(const TensorSpec&) const = default;
};

// What an update is to do. Equality tells a repeated start from another one.
struct WeightUpdateSpec {
  std::string update_id;
  std::optional<int64_t> base_step;  // step that must be loaded (the target's, if the update brings it)
  int64_t target_step = 0;           // of all components that the update brings
  std::string label;
  std::vector<WeightComponent> components;  // empty: all that the model has
  std::vector<TensorSpec> manifest;         // the tensors that will come, in any order
  WeightEncoding encoding = WeightEncoding::kFull;
  bool rewind = false;  // allow a step that is not newer
  bool operator==(const WeightUpdateSpec&) const = default;
};

struct TensorProgress {
  std::string name;
  int64_t next_offset = 0;  // every byte before it is there
};

struct WeightUpdateProgress {
  int64_t received_bytes = 0;  // each byte counted once
  int64_t expected_bytes = 0;  // of a full update; of a delta, whose length nobody knows, received_bytes
  int32_t complete_tensors = 0;
  int32_t num_tensors = 0;
  std::vector<TensorProgress> missing;  // incomplete tensors in the manifest's order
};

// Digests that the result of an update must have. A component without one is not checked.
struct ExpectedDigests {
  std::optional<Sha256Digest> target, draft;
};

// A part of a tensor; see WeightUpdate::WriteChunk.
struct TensorChunk {
  std::string_view tensor;
  int64_t offset = 0;
  std::string_view bytes;
  std::optional<Sha256Digest> digest;
};

// One weight update from its manifest to weights that can be swapped in. The loaded weights are read, never written: whatever
// fails or stops, they are as they were, and destroying the object forgets the update and frees all that it holds.
//
// The new weights are built where and as they will be used: a chunk goes straight to its place in a second arena, whose slots
// hold every byte exactly (ResidentTensor), so there is no other copy of the tensors. What a chunk costs: a pass for non-finite
// values, the packing, and SHA-256 if it comes in order; bytes that come out of order are read back and hashed once those before
// them are there. What the update does not bring is copied from the loaded weights at the end.
//
// Each refusal leaves the update as it was, with one exception: a tensor with a wrong digest starts over. Every error names
// tensor and values in one line and has a reason (engine/base/status_reason.h), in brackets below.
//
// Not thread safe. Any thread may use it, also while the engine runs on `base`; on a device, `memory` should then have a stream
// of its own, since its calls wait for what is on the stream.
//
// Example:
//   auto update = WeightUpdate::Start(config, loaded, spec, limit_bytes, memory);
//   (*update)->WriteChunk("model.norm.weight", 0, bytes, digest);
//   absl::StatusOr<std::unique_ptr<ModelWeights>> next = (*update)->Finish({});
class WeightUpdate {
 public:
  // Checks the spec against the loaded weights `base` of `config` and takes the memory of the new ones. Copies what it needs of
  // `base`, and shares its storage. `limit_bytes`: of the new arena and of the bookkeeping of what has come.
  //
  // FAILED_PRECONDITION [WRONG_BASE_STEP], [STEP_NOT_NEWER], [NO_DRAFT] (the model has no MTP layer); INVALID_ARGUMENT
  // [BASE_STEP_MISSING] (of a delta), [UNKNOWN_TENSOR], [DUPLICATE_TENSOR], [MISSING_TENSOR] (of a full update), [WRONG_DTYPE],
  // [WRONG_SHAPE]; RESOURCE_EXHAUSTED [STAGING_BUDGET] names what is needed and what is allowed or free; INTERNAL: the device
  // failed.
  static absl::StatusOr<std::unique_ptr<WeightUpdate>> Start(const ModelConfig& config, const ModelWeights& base,
                                                             WeightUpdateSpec spec, int64_t limit_bytes, DeviceMemory* memory);
  WeightUpdate(const WeightUpdate&) = delete;
  WeightUpdate& operator=(const WeightUpdate&) = delete;

  // Puts bytes of a tensor where they belong, in any order of tensors and offsets; offset and size are whole elements. Bytes that
  // came before are ignored if they are the same. `digest` is the whole tensor's; it may come with any chunk, also with an empty
  // one.
  //
  // INVALID_ARGUMENT [UNKNOWN_TENSOR] (not in the manifest), [WRONG_RANGE] (names range and size), [NON_FINITE] (names the
  // element); ALREADY_EXISTS [CHUNK_CONFLICT]: other bytes or another digest came before (names the first offset that differs, or
  // both digests); RESOURCE_EXHAUSTED [STAGING_BUDGET]: too many separate pieces; DATA_LOSS [DIGEST_MISMATCH]: the tensor is
  // complete and is not what the digest says: its bytes are forgotten, send them again; INTERNAL: the device failed.
  absl::Status WriteChunk(std::string_view tensor, int64_t offset, std::string_view bytes,
                          const std::optional<Sha256Digest>& digest = std::nullopt);
  // The same for two chunks, the second only if the first is not refused; an error is the first one's. Chunks of different
  // tensors are hashed side by side, in about half of the time (Sha256::UpdateBoth), so a wrong digest of the first does not keep
  // the second out.
  absl::Status WriteChunks(const TensorChunk& first, const TensorChunk& second);

  // The new weights with their version, once everything is there and right; after that nothing may be called any more. A tensor
  // of a delta, which may be any part of it, counts as complete when all of it came, or its digest, or when `expected` has its
  // component's.
  //
  // FAILED_PRECONDITION [INCOMPLETE] names what is missing; DATA_LOSS [DIGEST_MISMATCH] names both digests; INTERNAL: the device
  // failed.
  absl::StatusOr<std::unique_ptr<ModelWeights>> Finish(const ExpectedDigests& expected);

  // Lists at most `max_missing` tensors.
  WeightUpdateProgress Progress(size_t max_missing) const;

  const WeightUpdateSpec& spec() const { return spec_; }
  // What the tensor must be; null if the manifest does not have it.
  const TensorInfo* Find(std::string_view tensor) const;
  // Whether loading `tensor`, one of base_version()'s, from a checkpoint in which it is of `file_type` gives its form.
  bool Takes(const TensorInfo& tensor, std::string_view file_type) const;
  const WeightVersion& base_version() const { return base_.version; }
  bool Brings(WeightComponent component) const { return component == WeightComponent::kTarget ? target_ : draft_; }
  // Bytes charged against the limit.
  int64_t staging_bytes() const { return staging_bytes_; }

 private:
  // A tensor of the manifest. `received` maps the begins of disjoint, not touching ranges of bytes to their ends.
  struct Tensor {
    Tensor(const TensorInfo& tensor_info, size_t tensor_slot, const ResidentTensor& bytes)
        : info(&tensor_info), slot(tensor_slot), resident(bytes) {}

    int64_t next_offset() const;
    int64_t charged_bytes() const;  // for ranges beyond the first
    bool whole() const { return next_offset() == resident.num_bytes(); }

    const TensorInfo* info;
    size_t slot;              // number of its slot
    ResidentTensor resident;  // in the new arena
    std::map<int64_t, int64_t> received;
    int64_t received_bytes = 0;
    bool based = false;          // of a delta: the slot has the loaded values
    std::optional<Sha256> hash;  // of the first `hashed_bytes` of a tensor that is not whole
    int64_t hashed_bytes = 0;
    std::optional<Sha256Digest> announced;
    std::optional<Sha256Digest> actual;  // of a whole tensor
  };

  WeightUpdate(const ModelConfig& config, const ModelWeights& base, WeightUpdateSpec spec, int64_t limit_bytes,
               DeviceMemory* memory);
  absl::Status ResolveComponents();
  absl::Status CheckSteps() const;
  // Fills tensors_ except for their memory: the slots that the manifest names.
  absl::StatusOr<std::vector<size_t>> MatchManifest() const;
  absl::Status UnknownName(const std::string& name) const;
  absl::Status Charge(int64_t bytes) const;

  absl::Status CheckRepeats(const Tensor& tensor, int64_t offset, std::string_view bytes) const;
  // Checks a chunk and puts it in its place. Returns the tensor; what of the chunk its hash needs next is `to_hash`.
  absl::StatusOr<Tensor*> Take(const TensorChunk& chunk, std::string_view* to_hash);
  void Receive(Tensor& tensor, int64_t offset, std::string_view bytes, std::string_view* to_hash);
  // Once `to_hash` is hashed: hashes what had come before its turn, and checks the digest of a tensor that is whole.
  absl::Status Conclude(Tensor& tensor);
  absl::Status CheckDigest(const Tensor& tensor, const Sha256Digest& actual) const;
  void StartOver(Tensor& tensor);
  void CopyBase(size_t slot) const;
  bool Complete(const Tensor& tensor) const { return tensor.whole() || (is_delta() && tensor.announced.has_value()); }
  bool is_delta() const { return spec_.encoding == WeightEncoding::kOverwriteDelta; }

  const ModelConfig config_;
  const ModelWeights base_;  // views; shares the storage
  const WeightUpdateSpec spec_;
  const int64_t limit_bytes_;
  DeviceMemory* const memory_;
  const std::vector<TensorSlot> base_slots_;
  bool target_ = false, draft_ = false;  // the components that come
  WeightLayout next_;
  std::vector<Tensor> tensors_;                             // in the manifest's order
  std::unordered_map<std::string_view, size_t> tensor_of_;  // by name
  int64_t staging_bytes_ = 0;
};

}  // namespace bebop
