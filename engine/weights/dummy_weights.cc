// SPDX-License-Identifier: Apache-2.0
#include "engine/weights/dummy_weights.h"

#include <algorithm>
#include <cmath>
#include <string_view>
#include <vector>

#include "engine/base/status_macros.h"
#include "engine/weights/digest_chain.h"
#include "engine/weights/element_form.h"
#include "engine/weights/row_blocks.h"
#include "engine/weights/weight_layout.h"

namespace bebop {
namespace {

// A mixing function of 64 bits: the finaliser of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators",
// OOPSLA 2014). A billion weights in seconds need something cheaper than the Philox that keys sampling; here speed is all that counts.
uint64_t Mix(uint64_t value) {
  value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9u;
  value = (value ^ (value >> 27)) * 0x94D049BB133111EBu;
  return value ^ (value >> 31);
}

// FNV-1a.
uint64_t HashName(std::string_view name) {
  uint64_t hash = 0xCBF29CE484222325u;
  for (const char c : name) hash = (hash ^ static_cast<uint8_t>(c)) * 0x100000001B3u;
  return hash;
}

uint64_t Word(uint64_t key, uint64_t index) { return Mix(key + index * 0x9E3779B97F4A7C15u); }

double Uniform(uint64_t key, uint64_t index) { return static_cast<double>(Word(key, index) >> 11) * 0x1p-53; }

// About normal, mean 0, variance 1: the sum of four 16-bit uniforms (range +-3.46).
float Normal(uint64_t key, uint64_t index) {
  const uint64_t word = Word(key, index);
  const int32_t sum = static_cast<int32_t>((word & 0xFFFF) + (word >> 16 & 0xFFFF) + (word >> 32 & 0xFFFF) + (word >> 48));
  constexpr float kMean = 2.0f * 65535.0f;
  constexpr float kScale = 1.0f / 37837.2f;  // 1 / sqrt(4 * 65536^2 / 12)
  return (static_cast<float>(sum) - kMean) * kScale;
}

// Decay of one value head at zero input: exp(g) = exp(-rate * softplus(bias)). Heads are spread evenly over log(-g), which gives
// half-lives from 7 to 700 tokens.
struct HeadDecay {
  double rate;  // exp(A_log)
  double bias;  // dt_bias
};
HeadDecay DecayOfHead(uint64_t key, int64_t head, int64_t num_heads) {
  const double slowest = std::log(-std::log(0.999)), fastest = std::log(-std::log(0.9));
  const double place = (static_cast<double>(head) + Uniform(key, 2 * static_cast<uint64_t>(head))) / static_cast<double>(num_heads);
  const double minus_g = std::exp(slowest + (fastest - slowest) * place);
  const double rate = 1.0 + 3.0 * Uniform(key, 2 * static_cast<uint64_t>(head) + 1);
  return {rate, std::log(std::expm1(minus_g / rate))};
}

// Standard deviation of a matrix's or vector's values.
float Spread(const TensorSlot& slot, const ModelConfig& config) {
  const double fan_in = static_cast<double>(slot.shape.back());
  switch (slot.role) {
    case TensorRole::kEmbedding:
      return 0.02f;
    case TensorRole::kLmHead:
      return static_cast<float>(3.0 / std::sqrt(fan_in));
    case TensorRole::kInProjection:
    case TensorRole::kConv:
      return static_cast<float>(1.0 / std::sqrt(fan_in));
    case TensorRole::kOutProjection:
      // Two blocks a layer add up to a residual stream of order 1 (gated inputs have a standard deviation of about 1/3).
      return static_cast<float>(3.0 / std::sqrt(2.0 * static_cast<double>(config.layers.size()) * fan_in));
    case TensorRole::kDecayProjection:
      return static_cast<float>(0.3 / std::sqrt(fan_in));
    case TensorRole::kZeroCentredNorm:
    case TensorRole::kPlainNorm:
      return 0.1f;
    case TensorRole::kDecayRate:
    case TensorRole::kDecayBias:
      break;
  }
  return 0.0f;
}

// The values of a float vector.
void MakeValues(const TensorSlot& slot, const ModelConfig& config, uint64_t seed, float* out) {
  const int64_t count = SlotElements(slot);
  if (slot.role == TensorRole::kDecayRate || slot.role == TensorRole::kDecayBias) {
    // Both vectors of a layer come from one key: the name up to their common block.
    const uint64_t key = Mix(seed ^ HashName(std::string_view(slot.name).substr(0, slot.name.rfind('.'))));
    for (int64_t head = 0; head < count; ++head) {
      const HeadDecay decay = DecayOfHead(key, head, count);
      out[head] = static_cast<float>(slot.role == TensorRole::kDecayRate ? std::log(decay.rate) : decay.bias);
    }
    return;
  }
  const uint64_t key = Mix(seed ^ HashName(slot.name));
  const float spread = Spread(slot, config);
  const float centre = slot.role == TensorRole::kPlainNorm ? 1.0f : 0.0f;
  for (int64_t i = 0; i < count; ++i) out[i] = centre + spread * Normal(key, static_cast<uint64_t>(i));
}

// The rows of a block, [num_rows, cols].
void MakeRows(const RowBlock& block, const ModelConfig& config, uint64_t seed, float* out) {
  const TensorSlot& slot = *block.slot;
  const uint64_t key = Mix(seed ^ HashName(slot.name));
  const float spread = Spread(slot, config);
  const uint64_t first = static_cast<uint64_t>(block.first_row * slot.matrix.cols);
  const int64_t count = block.num_rows * slot.matrix.cols;
  for (int64_t i = 0; i < count; ++i) out[i] = spread * Normal(key, first + static_cast<uint64_t>(i));
}

// The values of a block, rows of a matrix or a whole vector.
float* MakeBlock(const RowBlock& block, const ModelConfig& config, uint64_t seed, std::vector<float>& values) {
  const bool is_matrix = block.slot->values == nullptr;
  const int64_t count = is_matrix ? block.num_rows * block.slot->matrix.cols : SlotElements(*block.slot);
  values.resize(static_cast<size_t>(count));
  is_matrix ? MakeRows(block, config, seed, values.data()) : MakeValues(*block.slot, config, seed, values.data());
  return values.data();
}

}  // namespace

absl::StatusOr<std::unique_ptr<ModelWeights>> MakeDummyWeights(const ModelConfig& config, DType dtype, uint64_t seed, ThreadPool& pool,
                                                               DeviceMemory* memory) {
  BEBOP_ASSIGN_OR_RETURN(WeightLayout layout, AllocateWeights(config, dtype, config.num_mtp_layers > 0, memory));
  const auto spelled = [&config](const std::string& name) {
    return name.starts_with(kTextPrefix) ? config.tensor_prefix + name.substr(1) : name;
  };
  for (const TensorSlot& slot : layout.slots) {
    layout.weights->version.tensors.push_back({.name = spelled(slot.name), .form = ResidentType(slot), .shape = slot.shape, .mtp = slot.mtp});
  }
  const uint64_t key = Mix(seed + 0x9E3779B97F4A7C15u);  // so that small seeds differ in all bits
  // Made a second time: that is cheaper than to fetch them back from a device.
  DigestChain chain(layout.slots, [&](const RowBlock& block, std::vector<char>& scratch) {
    thread_local std::vector<float> values;
    MakeBlock(block, config, key, values);
    const std::string_view bytes(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float));
    return ToForm("F32", bytes, ResidentType(*block.slot), scratch);
  });
  BlockWriter writer(memory);
  ForEachBlock(layout.slots, pool, [&](const RowBlock& block, size_t) {
    thread_local std::vector<float> values;
    float* const made = MakeBlock(block, config, key, values);
    if (block.slot->values == nullptr) {
      writer.WriteRows(block, FloatMatrix(made, block.num_rows, block.slot->matrix.cols));
    } else {
      writer.WriteValues(*block.slot, made);
    }
    chain.BlockDone(block);
  });
  BEBOP_RETURN_IF_ERROR(memory->status());
  layout.weights->version.SetDigests(chain.Finish());
  return std::move(layout.weights);
}

}  // namespace bebop
