// SPDX-License-Identifier: Apache-2.0
#include "engine/weights/weight_digest.h"

#include <gtest/gtest.h>

#include <bit>
#include <cctype>
#include <cmath>
#include <limits>
#include <random>

#include "absl/strings/str_join.h"
#include "engine/formats/strings.h"
#include "engine/weights/digest_chain.h"
#include "engine/weights/dummy_weights.h"
#include "engine/weights/resident_tensor.h"
#include "tests/engine/weights/weight_test_util.h"

namespace bebop {
namespace {

using test::Arena;
using test::InForms;
using test::Load;
using test::Place;
using test::SmallConfig;

constexpr MatrixLayout kLayouts[] = {MatrixLayout::kPanels, MatrixLayout::kRows};

// The digests by their definition, from the tensors that a checkpoint holds.
Sha256Digest ExpectedComponent(const std::vector<TestTensor>& tensors, bool mtp) {
  std::vector<std::string> lines;
  for (const TestTensor& tensor : tensors) {
    if (test::IsMtp(tensor) != mtp) continue;
    lines.push_back(StrCat(tensor.name, " ", tensor.dtype, " ", absl::StrJoin(tensor.shape, ","), " ",
                           DigestHex(Sha256Of(tensor.bytes)), "\n"));
  }
  std::sort(lines.begin(), lines.end());
  return Sha256Of(absl::StrJoin(lines, ""));
}

TEST(WeightDigestTest, Sha256HasTheStandardsValues) {
  // FIPS 180-4's examples: "abc" and the empty message; and a million times "a" in pieces.
  EXPECT_EQ(DigestHex(Sha256Of("abc")), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(DigestHex(Sha256Of("")), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  Sha256 hash;
  for (int i = 0; i < 1000; ++i) hash.Update(std::string(1000, 'a'));
  EXPECT_EQ(DigestHex(hash.Finish()), "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST(WeightDigestTest, HexIsReadBack) {
  const Sha256Digest digest = Sha256Of("abc");
  std::string hex = DigestHex(digest);
  EXPECT_EQ(*ParseDigest(hex), digest);
  for (char& digit : hex) digit = static_cast<char>(std::toupper(digit));
  EXPECT_EQ(*ParseDigest(hex), digest);
  for (const std::string& bad : {std::string(), hex.substr(1), hex + "0", "g" + hex.substr(1), " " + hex.substr(1)}) {
    EXPECT_EQ(ParseDigest(bad).status().code(), absl::StatusCode::kInvalidArgument) << bad;
  }
}

// `printf` and `sha256sum` give the same: the format is part of the API.
TEST(WeightDigestTest, ComponentsAreHashesOfSortedLines) {
  const TensorInfo b{.name = "b", .form = DType::kFloat32, .shape = {2, 3}, .digest = Sha256Of("b")};
  const TensorInfo a{.name = "a", .form = DType::kBFloat16, .shape = {4}, .digest = Sha256Of("a")};
  const TensorInfo draft{.name = "mtp.c", .form = DType::kBFloat16, .shape = {1, 1, 5}, .mtp = true, .digest = Sha256Of("c")};
  WeightVersion version;
  version.tensors = {b, draft, a};
  EXPECT_EQ(ComponentDigest(version.tensors, false),
            Sha256Of("a BF16 4 ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb\n"
                     "b F32 2,3 3e23e8160039594a33894f6564e1b1348bbd7a0088d42c4acb73eeaed59c009d\n"));
  EXPECT_EQ(ComponentDigest(version.tensors, true),
            Sha256Of("mtp.c BF16 1,1,5 2e7d2c03a9507ae265ecf5b5356885a53393a2029d241394997265a1a25aefc6\n"));
  version.SetDigests({b.digest, draft.digest, a.digest});
  EXPECT_EQ(version.target_digest, ComponentDigest(version.tensors, false));
  EXPECT_EQ(version.draft_digest, ComponentDigest(version.tensors, true));
  version.tensors.erase(version.tensors.begin() + 1);
  version.SetDigests({b.digest, a.digest});
  EXPECT_FALSE(version.draft_digest.has_value());
}

TEST(WeightDigestTest, LoadingGivesTheDigestsOfTheCheckpoint) {
  for (const bool tied : {false, true}) {
    const ModelConfig config = SmallConfig(tied);
    for (const MatrixLayout layout : kLayouts) {
      for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
        for (const std::string source : {"BF16", "F32", "F16"}) {
          SCOPED_TRACE(StrCat(tied, " ", static_cast<int>(layout), " ", DTypeName(dtype), " ", source));
          const std::vector<TestTensor> tensors = MakeModelTensors(config, /*with_mtp=*/true, source, 3);
          const Place place(layout);
          const auto weights = Load(config, tensors, dtype, place.memory.get());
          const WeightVersion& version = weights->version;
          EXPECT_EQ(version.target_step, 0);
          // What is not held exactly is described as it is held.
          const std::vector<TestTensor> expected = InForms(tensors, version);
          for (size_t i = 0; i < expected.size(); ++i) {
            const TensorInfo& info = version.tensors[i];
            const bool is_vector = expected[i].shape.size() != 2;
            const DType held = is_vector ? DType::kFloat32 : dtype;
            EXPECT_EQ(info.form, source == "BF16" ? DType::kBFloat16 : held) << info.name;
            EXPECT_EQ(info.mtp, test::IsMtp(expected[i]));
            EXPECT_EQ(info.digest, Sha256Of(expected[i].bytes)) << info.name;
            EXPECT_EQ(info.num_bytes(), static_cast<int64_t>(expected[i].bytes.size()));
          }
          EXPECT_EQ(version.tensors.size(), tensors.size());
          EXPECT_EQ(version.target_digest, ExpectedComponent(expected, false));
          ASSERT_TRUE(version.draft_digest.has_value());
          EXPECT_EQ(*version.draft_digest, ExpectedComponent(expected, true));
          if (source == "BF16") {  // the checkpoint's own, whatever holds it
            EXPECT_EQ(version.target_digest, ExpectedComponent(tensors, false));
          }

          const auto again = RecomputeVersion(config, *weights, place.memory.get());
          ASSERT_TRUE(again.ok()) << again.status();
          EXPECT_EQ(again->target_digest, version.target_digest);
          EXPECT_EQ(again->draft_digest, version.draft_digest);
        }
      }
    }
  }
}

TEST(WeightDigestTest, NamesAreTheCheckpointsAndTheDraftsBeginWithMtp) {
  ModelConfig config = SmallConfig(/*tied=*/false);
  config.tensor_prefix = "model.language_model.";
  std::vector<TestTensor> tensors = MakeModelTensors(config, /*with_mtp=*/true, "BF16", 3);
  for (TestTensor& tensor : tensors) {
    if (test::IsMtp(tensor)) tensor.name = "model." + tensor.name;
  }
  const Place place(MatrixLayout::kPanels);
  const auto weights = Load(config, tensors, DType::kBFloat16, place.memory.get());
  EXPECT_EQ(weights->version.tensors.front().name, "model.language_model.embed_tokens.weight");
  for (const TensorInfo& tensor : weights->version.tensors) EXPECT_EQ(tensor.mtp, tensor.name.starts_with("mtp.")) << tensor.name;
}

TEST(WeightDigestTest, RandomWeightsHaveTheDigestsOfTheirBytes) {
  for (const MatrixLayout layout : kLayouts) {
    for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
      // Tensors of several blocks, so that blocks are hashed that another thread made.
      ModelConfig config = SmallConfig(/*tied=*/false);
      config.vocab_size = 3000;
      config.hidden_size = 320;
      const Place place(layout);
      std::optional<Sha256Digest> first;
      for (const int num_threads : {1, 4}) {
        ThreadPool pool(num_threads);
        const auto weights = MakeDummyWeights(config, dtype, 5, pool, place.memory.get()).value();
        const auto again = RecomputeVersion(config, *weights, place.memory.get());
        ASSERT_TRUE(again.ok()) << again.status();
        for (size_t i = 0; i < again->tensors.size(); ++i) {
          ASSERT_EQ(again->tensors[i].digest, weights->version.tensors[i].digest) << again->tensors[i].name;
        }
        EXPECT_EQ(again->target_digest, weights->version.target_digest);
        EXPECT_EQ(again->draft_digest, weights->version.draft_digest);
        EXPECT_EQ(first.value_or(weights->version.target_digest), weights->version.target_digest);
        first = weights->version.target_digest;
        EXPECT_EQ(weights->version.tensors.front().name, config.tensor_prefix + "embed_tokens.weight");
      }
    }
  }
}

// Any bit of the arena that a tensor fills, flipped, shows in that tensor's digest and in its component's.
TEST(WeightDigestTest, RecomputingSeesEveryFlippedBit) {
  const ModelConfig config = SmallConfig(/*tied=*/false);
  const Place place(MatrixLayout::kPanels);
  const auto weights = Load(config, MakeModelTensors(config, true, "F32", 3), DType::kFloat32, place.memory.get());
  const std::vector<TensorSlot> slots = SlotsOf(config, *weights);
  std::mt19937 random(1);
  for (size_t i = 0; i < slots.size(); ++i) {
    const TensorSlot& slot = slots[i];
    // An element's place from the layout's definition, not from the code under test.
    const int64_t element = static_cast<int64_t>(random()) % SlotElements(slot);
    float* at = slot.values == nullptr ? nullptr : slot.values + element;
    if (at == nullptr) {
      const int64_t row = slot.first_row + element / slot.matrix.cols, col = element % slot.matrix.cols;
      at = static_cast<float*>(const_cast<void*>(slot.matrix.data)) + (row / 16 * RoundUp(slot.matrix.cols, 32) + col) * 16 +
           row % 16;
    }
    const uint32_t bits = std::bit_cast<uint32_t>(*at);
    *at = std::bit_cast<float>(bits ^ 1u << random() % 32);
    const WeightVersion broken = RecomputeVersion(config, *weights, place.memory.get()).value();
    *at = std::bit_cast<float>(bits);
    for (size_t t = 0; t < slots.size(); ++t)
      ASSERT_EQ(broken.tensors[t].digest == weights->version.tensors[t].digest, t != i) << slots[t].name;
    ASSERT_EQ(broken.target_digest == weights->version.target_digest, slot.mtp);
    ASSERT_EQ(broken.draft_digest == weights->version.draft_digest, !slot.mtp);
  }
}

// Every pattern of 16 bits, NaNs with their payloads too, in every layout, type and cut.
TEST(WeightDigestTest, ResidentTensorsReturnTheBytesTheyWereGiven) {
  ModelConfig config = SmallConfig(/*tied=*/false);
  config.vocab_size = 1700;  // 1700 x 40 elements: more than 2^16, no multiple of a panel
  for (const MatrixLayout layout : kLayouts) {
    for (const auto& [dtype, form] : {std::pair(DType::kBFloat16, DType::kBFloat16), std::pair(DType::kFloat32, DType::kBFloat16),
                                      std::pair(DType::kFloat32, DType::kFloat32)}) {
      const Place place(layout);
      const WeightLayout weights = AllocateWeights(config, dtype, true, place.memory.get()).value();
      std::mt19937 random(1);
      for (const TensorSlot& slot : weights.slots) {
        const ResidentTensor tensor(slot, form, place.memory.get());
        const int64_t width = ElementBytes(form), count = SlotElements(slot);
        std::string bytes;
        for (int64_t i = 0; i < count; ++i) {
          const uint32_t word = form == DType::kBFloat16 ? static_cast<uint32_t>(i) : static_cast<uint32_t>(random());
          bytes.append(reinterpret_cast<const char*>(&word), static_cast<size_t>(width));
        }
        ASSERT_EQ(tensor.num_bytes(), static_cast<int64_t>(bytes.size()));
        std::vector<int64_t> cuts = {0, count};
        for (int i = 0; i < 20; ++i) cuts.push_back(static_cast<int64_t>(random()) % (count + 1));
        std::sort(cuts.begin(), cuts.end());
        for (size_t i = 0; i + 1 < cuts.size(); ++i) {
          tensor.Write(cuts[i] * width, std::string_view(bytes).substr(static_cast<size_t>(cuts[i] * width),
                                                                       static_cast<size_t>((cuts[i + 1] - cuts[i]) * width)));
        }
        std::string back(bytes.size(), 'x');
        tensor.Read(0, tensor.num_bytes(), back.data());
        ASSERT_TRUE(back == bytes) << slot.name;
        for (int i = 0; i < 20; ++i) {
          const int64_t begin = static_cast<int64_t>(random()) % count, size = static_cast<int64_t>(random()) % (count - begin);
          std::string part(static_cast<size_t>(size * width), 'x');
          tensor.Read(begin * width, size * width, part.data());
          ASSERT_TRUE(part == bytes.substr(static_cast<size_t>(begin * width), part.size())) << slot.name;
        }
        ASSERT_EQ(ResidentDigest(tensor), Sha256Of(bytes));
      }
    }
  }
}

TEST(WeightDigestTest, SlotsFillDistinctPartsOfTheArena) {
  const ModelConfig config = SmallConfig(/*tied=*/false);
  for (const MatrixLayout layout : kLayouts) {
    for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
      const Place place(layout);
      const WeightLayout weights = AllocateWeights(config, dtype, true, place.memory.get()).value();
      const char* const arena = static_cast<const char*>(weights.weights->storage.get());
      std::vector<int> owner(static_cast<size_t>(weights.weights->storage_bytes), -1);
      for (size_t i = 0; i < weights.slots.size(); ++i) {
        const ArenaRange range = RangeOf(weights.slots[i]);
        const int64_t begin = static_cast<const char*>(range.data) - arena;
        ASSERT_GE(begin, 0);
        ASSERT_LE(begin + range.bytes, weights.weights->storage_bytes);
        for (int64_t at = begin; at < begin + range.bytes; ++at) {
          ASSERT_EQ(owner[static_cast<size_t>(at)], -1) << weights.slots[i].name;
          owner[static_cast<size_t>(at)] = static_cast<int>(i);
        }
      }
      // What a tensor writes lies within its range.
      for (size_t i = 0; i < weights.slots.size(); ++i) {
        const ResidentTensor tensor(weights.slots[i], DType::kBFloat16, place.memory.get());
        std::memset(const_cast<char*>(arena), 0, owner.size());
        tensor.Write(0, std::string(static_cast<size_t>(tensor.num_bytes()), '\xff'));
        for (size_t at = 0; at < owner.size(); ++at)
          ASSERT_TRUE(arena[at] == 0 || owner[at] == static_cast<int>(i)) << weights.slots[i].name;
      }
    }
  }
}

// Blocks in any order, each once.
TEST(WeightDigestTest, ChainsHashBlocksInOrder) {
  const ModelConfig config = SmallConfig(/*tied=*/false);
  const std::vector<TensorSlot> slots = ListTensors(config, true);
  std::mt19937 random(1);
  for (int seed = 0; seed < 50; ++seed) {
    std::vector<RowBlock> blocks;
    for (const TensorSlot& slot : slots) {
      for (int64_t row = 0; row < slot.shape[0];) {
        const int64_t rows = std::min<int64_t>(slot.shape[0] - row, 1 + random() % 20);
        blocks.push_back({&slot, row, rows});
        row += rows;
      }
    }
    std::shuffle(blocks.begin(), blocks.end(), random);
    const auto bytes_of = [](const RowBlock& block) {
      std::string bytes;
      for (int64_t row = block.first_row; row < block.first_row + block.num_rows; ++row)
        bytes += StrCat(block.slot->name, row, ";");
      return bytes;
    };
    DigestChain chain(slots, [&](const RowBlock& block, std::vector<char>& scratch) {
      const std::string bytes = bytes_of(block);
      scratch.assign(bytes.begin(), bytes.end());
      return std::string_view(scratch.data(), scratch.size());
    });
    ThreadPool pool(3);
    pool.ParallelFor(static_cast<int64_t>(blocks.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) chain.BlockDone(blocks[static_cast<size_t>(i)]);
    });
    const std::vector<Sha256Digest> digests = chain.Finish();
    for (size_t i = 0; i < slots.size(); ++i) ASSERT_EQ(digests[i], Sha256Of(bytes_of({&slots[i], 0, slots[i].shape[0]})));
  }
}

TEST(WeightDigestTest, FormsConvertAsLoadingDoes) {
  std::vector<char> scratch;
  // All halves, against their definition.
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const int exponent = static_cast<int>(bits >> 10 & 31), fraction = static_cast<int>(bits & 1023);
    const float value = HalfToFloat(static_cast<uint16_t>(bits));
    ASSERT_EQ(std::signbit(value), bits >> 15 == 1) << bits;
    if (exponent == 31) {
      ASSERT_EQ(std::isnan(value), fraction != 0) << bits;
      ASSERT_EQ(std::isinf(value), fraction == 0) << bits;
    } else {
      const double magnitude = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
      ASSERT_EQ(std::fabs(value), static_cast<float>(magnitude)) << bits;
    }
  }
  const float values[] = {1.0f, -3.1415927f, 1.00390625f, 3.39e38f, std::numeric_limits<float>::max()};
  const std::string_view bytes(reinterpret_cast<const char*>(values), sizeof(values));
  EXPECT_EQ(ToForm("F32", bytes, DType::kFloat32, scratch).data(), bytes.data());
  const std::string_view narrow = ToForm("F32", bytes, DType::kBFloat16, scratch);
  ASSERT_EQ(narrow.size(), 10u);
  for (int i = 0; i < 5; ++i) {
    BFloat16 value;
    std::memcpy(&value, narrow.data() + 2 * i, 2);
    EXPECT_EQ(value.bits, ToBFloat16(values[i]).bits);
  }
  EXPECT_EQ(FirstNonFinite(DType::kFloat32, bytes), -1);
  EXPECT_EQ(FirstNonFinite(DType::kBFloat16, narrow), 4);  // the largest float rounds to infinity
  EXPECT_EQ(FormOf("BF16", DType::kFloat32), DType::kBFloat16);
  EXPECT_EQ(FormOf("F32", DType::kBFloat16), DType::kBFloat16);
  EXPECT_EQ(FormOf("F16", DType::kFloat32), DType::kFloat32);
}

}  // namespace
}  // namespace bebop
