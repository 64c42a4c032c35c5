// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "engine/config/model_config.h"

namespace bebop {

// Writes checkpoints, good and bad, for tests.

// A tensor to be written. `bytes` are its raw little-endian elements.
struct TestTensor {
  std::string name;
  std::string dtype = "F32";
  std::vector<int64_t> shape;
  std::string bytes;

  int64_t num_elements() const;
  float Value(int64_t index) const;  // of F32, BF16 and F16 tensors
};

// A tensor with the given values, rounded to `dtype` (F32, BF16 or F16).
TestTensor MakeTensor(std::string name, std::string dtype, std::vector<int64_t> shape, const std::vector<float>& values);

// All tensors of `config` in checkpoint order with small seeded values; text tensors under config.tensor_prefix.
std::vector<TestTensor> MakeModelTensors(const ModelConfig& config, bool with_mtp, const std::string& dtype, uint32_t seed);

// A whole safetensors file.
std::string SafetensorsBytes(const std::vector<TestTensor>& tensors);
// The same from a header and data that need not fit together.
std::string SafetensorsBytes(std::string_view header_json, std::string_view data);
// The index of shards: (file name, its tensors).
std::string IndexJson(const std::vector<std::pair<std::string, std::vector<TestTensor>>>& shards);

void WriteFile(const std::string& path, std::string_view bytes);  // aborts on failure

// A fresh folder, removed with all it holds on destruction.
class TempDir {
 public:
  TempDir();
  ~TempDir();
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// A small config.json of the family: 3 layers (linear, linear, full), nothing a multiple of a panel, one MTP layer. Flat.
std::string SmallConfigJson(bool tied);

}  // namespace bebop
