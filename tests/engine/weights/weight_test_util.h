// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "engine/base/status_reason.h"
#include "engine/weights/checkpoint.h"
#include "engine/weights/element_form.h"
#include "engine/weights/weight_update.h"
#include "kernels/common/check.h"
#include "tests/support/checkpoint_writer.h"
#include "tests/support/fake_device_memory.h"

namespace bebop::test {

inline ModelConfig SmallConfig(bool tied) { return ParseModelConfig(SmallConfigJson(tied)).value(); }

// What a learner has: the tensors of a checkpoint in the forms that the server lists.
inline std::vector<TestTensor> InForms(const std::vector<TestTensor>& tensors, const WeightVersion& version) {
  std::vector<TestTensor> result;
  for (const TensorInfo& info : version.tensors) {
    const auto tensor =
        std::find_if(tensors.begin(), tensors.end(), [&](const TestTensor& candidate) { return candidate.name == info.name; });
    BEBOP_CHECK(tensor != tensors.end());
    std::vector<float> values;
    for (int64_t i = 0; i < tensor->num_elements(); ++i) values.push_back(tensor->Value(i));
    result.push_back(MakeTensor(info.name, FormName(info.form), info.shape, values));
  }
  return result;
}

inline std::vector<TensorSpec> ManifestOf(const std::vector<TestTensor>& tensors) {
  std::vector<TensorSpec> manifest;
  for (const TestTensor& tensor : tensors) manifest.push_back({tensor.name, tensor.dtype, tensor.shape});
  return manifest;
}

// Where a model lives in a case: host panels or the rows of a device.
struct Place {
  explicit Place(MatrixLayout layout) {
    if (layout == MatrixLayout::kRows) {
      auto device = std::make_unique<FakeDeviceMemory>();
      fake = device.get();
      memory = std::move(device);
    } else {
      memory = MakeHostMemory();
    }
  }
  std::unique_ptr<DeviceMemory> memory;
  FakeDeviceMemory* fake = nullptr;  // with kRows
};

inline std::unique_ptr<ModelWeights> Load(const ModelConfig& config, const std::vector<TestTensor>& tensors, DType dtype,
                                          DeviceMemory* memory, bool with_mtp = true) {
  const TempDir directory;
  WriteFile(directory.path() + "/model.safetensors", SafetensorsBytes(tensors));
  ThreadPool pool(2);
  const LoadOptions options{.path = directory.path(), .mtp_path = "", .dtype = dtype, .needs_mtp = with_mtp};
  return LoadModelWeights(config, options, pool, memory).value();
}

inline std::string_view Arena(const ModelWeights& weights) {
  return {static_cast<const char*>(weights.storage.get()), static_cast<size_t>(weights.storage_bytes)};
}

inline WeightUpdateSpec FullSpec(const std::vector<TestTensor>& tensors) {
  WeightUpdateSpec spec;
  spec.update_id = "update";
  spec.target_step = 7;
  spec.label = "seven";
  spec.manifest = ManifestOf(tensors);
  return spec;
}

inline bool IsMtp(const TestTensor& tensor) { return tensor.name.starts_with("mtp."); }

}  // namespace bebop::test
