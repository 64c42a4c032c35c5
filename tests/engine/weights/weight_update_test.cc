// SPDX-License-Identifier: Apache-2.0
#include "engine/weights/weight_update.h"

#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <random>

#include "engine/formats/strings.h"
#include "engine/weights/dummy_weights.h"
#include "tests/engine/weights/weight_test_util.h"

namespace bebop {
namespace {

using test::Arena;
using test::FullSpec;
using test::InForms;
using test::IsMtp;
using test::Load;
using test::ManifestOf;
using test::Place;
using test::SmallConfig;

constexpr int64_t kNoLimit = int64_t{1} << 40;
#ifdef BEBOP_SANITIZED
constexpr uint32_t kNumSeeds = 20;
#else
constexpr uint32_t kNumSeeds = 100;
#endif
constexpr MatrixLayout kLayouts[] = {MatrixLayout::kPanels, MatrixLayout::kRows};

struct Chunk {
  std::string tensor;
  int64_t offset = 0;
  std::string bytes;
  std::optional<Sha256Digest> digest;
};

absl::Status Write(WeightUpdate& update, const Chunk& chunk) {
  return update.WriteChunk(chunk.tensor, chunk.offset, chunk.bytes, chunk.digest);
}

// A tensor as chunks that cover it, with some of it sent twice; the digest comes with any one of them.
void AddChunks(const TestTensor& tensor, bool with_digest, std::mt19937& random, std::vector<Chunk>& chunks) {
  const int64_t width = tensor.dtype == "F32" ? 4 : 2, count = tensor.num_elements();
  const size_t first = chunks.size();
  const auto add = [&](int64_t begin, int64_t end) {
    chunks.push_back({tensor.name,
                      begin * width,
                      tensor.bytes.substr(static_cast<size_t>(begin * width), static_cast<size_t>((end - begin) * width)),
                      {}});
  };
  const auto place = [&] { return static_cast<int64_t>(random()) % (count + 1); };
  std::vector<int64_t> cuts = {0, count};
  for (uint32_t i = random() % 5; i > 0; --i) cuts.push_back(place());
  std::sort(cuts.begin(), cuts.end());
  for (size_t i = 0; i + 1 < cuts.size(); ++i) add(cuts[i], cuts[i + 1]);
  for (uint32_t i = random() % 3; i > 0; --i) {
    const auto [begin, end] = std::minmax({place(), place()});
    add(begin, end);
  }
  if (with_digest) chunks[first + random() % (chunks.size() - first)].digest = Sha256Of(tensor.bytes);
}

std::vector<Chunk> ShuffledChunks(const std::vector<TestTensor>& tensors, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<Chunk> chunks;
  for (const TestTensor& tensor : tensors) AddChunks(tensor, random() % 2 == 0, random, chunks);
  std::shuffle(chunks.begin(), chunks.end(), random);
  return chunks;
}

std::vector<TestTensor> Only(const std::vector<TestTensor>& tensors, bool mtp) {
  std::vector<TestTensor> result;
  std::copy_if(tensors.begin(), tensors.end(), std::back_inserter(result),
               [mtp](const TestTensor& tensor) { return IsMtp(tensor) == mtp; });
  return result;
}

// A model A that is loaded and another, B, that an update should bring.
struct Pair {
  Pair(bool tied, MatrixLayout layout, const std::string& source, DType dtype) : config(SmallConfig(tied)), place(layout) {
    const std::vector<TestTensor> a = MakeModelTensors(config, /*with_mtp=*/true, source, 1),
                                  b = MakeModelTensors(config, true, source, 2);
    loaded = Load(config, a, dtype, place.memory.get());
    other = Load(config, b, dtype, place.memory.get());
    old_tensors = InForms(a, loaded->version);
    tensors = InForms(b, loaded->version);
    old_arena = Arena(*loaded);
  }

  absl::StatusOr<std::unique_ptr<WeightUpdate>> Start(const WeightUpdateSpec& spec, int64_t limit = kNoLimit) {
    return WeightUpdate::Start(config, *loaded, spec, limit, place.memory.get());
  }
  std::unique_ptr<WeightUpdate> StartFull() { return Start(FullSpec(tensors)).value(); }
  // A loaded model never changes, whatever an update does.
  void ExpectUntouched() { EXPECT_TRUE(Arena(*loaded) == old_arena); }

  ModelConfig config;
  Place place;
  std::unique_ptr<ModelWeights> loaded, other;
  std::vector<TestTensor> old_tensors, tensors;  // of A and of B, in the forms of updates
  std::string old_arena;
};

void ExpectSameTensors(const WeightVersion& actual, const WeightVersion& expected) {
  ASSERT_EQ(actual.tensors.size(), expected.tensors.size());
  for (size_t i = 0; i < expected.tensors.size(); ++i) {
    EXPECT_EQ(actual.tensors[i].name, expected.tensors[i].name);
    EXPECT_EQ(actual.tensors[i].digest, expected.tensors[i].digest) << expected.tensors[i].name;
  }
  EXPECT_EQ(actual.target_digest, expected.target_digest);
  EXPECT_EQ(actual.draft_digest, expected.draft_digest);
}

void ExpectError(const absl::Status& status, absl::StatusCode code, const std::string& reason,
                 const std::vector<std::string>& parts) {
  EXPECT_EQ(status.code(), code) << status;
  EXPECT_EQ(StatusReason(status), reason) << status;
  for (const std::string& part : parts)
    EXPECT_NE(status.message().find(part), absl::string_view::npos) << status << " lacks " << part;
  EXPECT_EQ(status.message().find('\n'), absl::string_view::npos);
}

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
constexpr auto kPrecondition = absl::StatusCode::kFailedPrecondition;

// Load(B) is Load(A) and an update to B, bit for bit, whatever the order of the chunks.
TEST(WeightUpdateTest, UpdatingIsLoading) {
  for (const bool tied : {false, true}) {
    for (const MatrixLayout layout : kLayouts) {
      for (const auto& [source, dtype] : {std::pair("BF16", DType::kBFloat16), std::pair("BF16", DType::kFloat32),
                                          std::pair("F32", DType::kFloat32), std::pair("F32", DType::kBFloat16)}) {
        SCOPED_TRACE(
            StrCat(tied ? "tied " : "", layout == MatrixLayout::kPanels ? "panels " : "rows ", source, " ", DTypeName(dtype)));
        Pair models(tied, layout, source, dtype);
        ASSERT_FALSE(Arena(*models.loaded) == Arena(*models.other));
        for (uint32_t seed = 0; seed < kNumSeeds; ++seed) {
          WeightUpdateSpec spec = FullSpec(models.tensors);
          std::mt19937 random(seed);
          std::shuffle(spec.manifest.begin(), spec.manifest.end(), random);
          const auto update = models.Start(spec).value();
          for (const Chunk& chunk : ShuffledChunks(models.tensors, seed))
            ASSERT_TRUE(Write(*update, chunk).ok()) << Write(*update, chunk);
          const WeightUpdateProgress progress = update->Progress(64);
          ASSERT_EQ(progress.complete_tensors, progress.num_tensors);
          ASSERT_EQ(progress.received_bytes, progress.expected_bytes);
          ASSERT_TRUE(progress.missing.empty());
          const auto next = update->Finish({models.other->version.target_digest, models.other->version.draft_digest});
          ASSERT_TRUE(next.ok()) << next.status();
          ASSERT_TRUE(Arena(**next) == Arena(*models.other)) << "seed " << seed;
          if (seed > 0) continue;
          ExpectSameTensors((*next)->version, models.other->version);
          ExpectSameTensors(RecomputeVersion(models.config, **next, models.place.memory.get()).value(), models.other->version);
          EXPECT_EQ((*next)->version.target_step, 7);
          EXPECT_EQ((*next)->version.draft_step, 7);
          EXPECT_EQ((*next)->version.label, "seven");
          // The views are those of the new arena, as a loaded model's are of its own.
          EXPECT_EQ((*next)->embedding.data, (*next)->storage.get());
          EXPECT_EQ((*next)->lm_head.data == (*next)->embedding.data, tied);
          EXPECT_EQ((*next)->layers.size(), models.other->layers.size());
          EXPECT_TRUE((*next)->mtp.has_value());
        }
        models.ExpectUntouched();
      }
    }
  }
}

TEST(WeightUpdateTest, RandomWeightsCanBeUpdated) {
  const ModelConfig config = SmallConfig(/*tied=*/false);
  const Place place(MatrixLayout::kPanels);
  ThreadPool pool(2);
  const auto dummy = MakeDummyWeights(config, DType::kBFloat16, 1, pool, place.memory.get()).value();
  const std::vector<TestTensor> tensors = InForms(MakeModelTensors(config, true, "F32", 2), dummy->version);
  const auto update = WeightUpdate::Start(config, *dummy, FullSpec(tensors), kNoLimit, place.memory.get()).value();
  for (const TestTensor& tensor : tensors)
    ASSERT_TRUE(update->WriteChunk(tensor.name, 0, tensor.bytes, Sha256Of(tensor.bytes)).ok());
  const auto next = update->Finish({});
  ASSERT_TRUE(next.ok()) << next.status();
  const auto loaded = Load(config, tensors, DType::kBFloat16, place.memory.get());
  EXPECT_TRUE(Arena(**next) == Arena(*loaded));
  ExpectSameTensors((*next)->version, loaded->version);
}

TEST(WeightUpdateTest, OneComponentKeepsTheOther) {
  for (const MatrixLayout layout : kLayouts) {
    for (const bool draft : {false, true}) {
      SCOPED_TRACE(draft);
      Pair models(/*tied=*/true, layout, "BF16", DType::kBFloat16);
      const std::vector<TestTensor> sent = Only(models.tensors, draft), kept = Only(models.old_tensors, !draft);
      WeightUpdateSpec spec = FullSpec(sent);
      spec.components = {draft ? WeightComponent::kDraft : WeightComponent::kTarget};
      const auto update = models.Start(spec).value();
      EXPECT_EQ(update->Brings(WeightComponent::kDraft), draft);
      EXPECT_EQ(update->Brings(WeightComponent::kTarget), !draft);
      for (const Chunk& chunk : ShuffledChunks(sent, 3)) ASSERT_TRUE(Write(*update, chunk).ok());
      const auto next = update->Finish({});
      ASSERT_TRUE(next.ok()) << next.status();
      std::vector<TestTensor> mixed = sent;
      mixed.insert(mixed.end(), kept.begin(), kept.end());
      const auto expected = Load(models.config, mixed, DType::kBFloat16, models.place.memory.get());
      EXPECT_TRUE(Arena(**next) == Arena(*expected));
      ExpectSameTensors((*next)->version, expected->version);
      EXPECT_EQ((*next)->version.target_step, draft ? 0 : 7);
      EXPECT_EQ((*next)->version.draft_step, draft ? 7 : 0);
      models.ExpectUntouched();
    }
  }
}

TEST(WeightUpdateTest, ModelsWithoutADraftAreUpdatedWithoutOne) {
  const ModelConfig config = SmallConfig(/*tied=*/false);
  const Place place(MatrixLayout::kPanels);
  const std::vector<TestTensor> tensors = MakeModelTensors(config, /*with_mtp=*/false, "BF16", 2);
  const auto loaded =
      Load(config, MakeModelTensors(config, false, "BF16", 1), DType::kBFloat16, place.memory.get(), /*with_mtp=*/false);
  EXPECT_FALSE(loaded->version.draft_digest.has_value());
  const auto update = WeightUpdate::Start(config, *loaded, FullSpec(tensors), kNoLimit, place.memory.get()).value();
  for (const TestTensor& tensor : tensors) ASSERT_TRUE(update->WriteChunk(tensor.name, 0, tensor.bytes).ok());
  ExpectError(update->Finish({.target = std::nullopt, .draft = Sha256Digest{}}).status(), absl::StatusCode::kDataLoss,
              "DIGEST_MISMATCH", {"draft", "no such component"});
  const auto next = update->Finish({});
  ASSERT_TRUE(next.ok()) << next.status();
  const auto expected = Load(config, tensors, DType::kBFloat16, place.memory.get(), /*with_mtp=*/false);
  EXPECT_TRUE(Arena(**next) == Arena(*expected));

  WeightUpdateSpec draft = FullSpec({});
  draft.components = {WeightComponent::kDraft};
  ExpectError(WeightUpdate::Start(config, *loaded, draft, kNoLimit, place.memory.get()).status(), kPrecondition, "NO_DRAFT",
              {"MTP"});
  WeightUpdateSpec with_mtp = FullSpec(tensors);
  with_mtp.manifest.push_back({"mtp.norm.weight", "BF16", {40}});
  ExpectError(WeightUpdate::Start(config, *loaded, with_mtp, kNoLimit, place.memory.get()).status(), kInvalid, "UNKNOWN_TENSOR",
              {"mtp.norm.weight", "no MTP layer"});
}

// What differs between A and B, in pieces of random size, gives B; what is not sent stays.
TEST(WeightUpdateTest, DeltasKeepWhatIsNotSent) {
  for (const MatrixLayout layout : kLayouts) {
    for (const auto& [source, dtype] :
         {std::pair("BF16", DType::kBFloat16), std::pair("BF16", DType::kFloat32), std::pair("F32", DType::kFloat32)}) {
      Pair models(/*tied=*/false, layout, source, dtype);
      for (uint32_t seed = 0; seed < kNumSeeds / 2; ++seed) {
        SCOPED_TRACE(seed);
        std::mt19937 random(seed);
        std::vector<TestTensor> wanted = models.old_tensors, named;
        std::vector<Chunk> chunks;
        // Half of the updates are proven tensor by tensor, the others by the components' digests.
        const bool tensor_digests = seed % 2 == 0;
        for (size_t i = 0; i < wanted.size(); ++i) {
          if (random() % 2 == 0) continue;
          TestTensor& tensor = wanted[i];
          const size_t width = tensor.dtype == "F32" ? 4 : 2, count = tensor.bytes.size() / width;
          for (uint32_t pieces = random() % 4; pieces > 0; --pieces) {
            const size_t begin = random() % count, size = 1 + random() % (count - begin);
            const std::string bytes = models.tensors[i].bytes.substr(begin * width, size * width);
            tensor.bytes.replace(begin * width, bytes.size(), bytes);
            chunks.push_back({tensor.name, static_cast<int64_t>(begin * width), bytes, {}});
          }
          if (tensor_digests) chunks.push_back({tensor.name, 0, "", Sha256Of(tensor.bytes)});
          named.push_back(tensor);
        }
        std::shuffle(chunks.begin(), chunks.end(), random);
        const auto expected = Load(models.config, wanted, dtype, models.place.memory.get());
        WeightUpdateSpec spec = FullSpec(named);
        spec.encoding = WeightEncoding::kOverwriteDelta;
        spec.base_step = 0;
        const auto update = models.Start(spec).value();
        for (const Chunk& chunk : chunks) ASSERT_TRUE(Write(*update, chunk).ok());
        const auto next =
            update->Finish(tensor_digests ? ExpectedDigests{}
                                          : ExpectedDigests{expected->version.target_digest, expected->version.draft_digest});
        ASSERT_TRUE(next.ok()) << next.status();
        ASSERT_TRUE(Arena(**next) == Arena(*expected));
        ExpectSameTensors((*next)->version, expected->version);
      }
      models.ExpectUntouched();
    }
  }
}

TEST(WeightUpdateTest, DeltasNeedAProof) {
  Pair models(/*tied=*/false, MatrixLayout::kPanels, "BF16", DType::kBFloat16);
  const TestTensor& tensor = models.tensors[3];
  WeightUpdateSpec spec = FullSpec({tensor});
  spec.encoding = WeightEncoding::kOverwriteDelta;
  ExpectError(models.Start(spec).status(), kInvalid, "BASE_STEP_MISSING", {"base_step"});
  spec.base_step = 0;
  const auto update = models.Start(spec).value();
  ASSERT_TRUE(update->WriteChunk(tensor.name, 0, tensor.bytes.substr(0, 8)).ok());
  const Sha256Digest whole = Sha256Of(tensor.bytes);
  ExpectError(update->Finish({}).status(), kPrecondition, "INCOMPLETE", {tensor.name, "no digest"});
  EXPECT_EQ(update->Progress(9).missing.size(), 1u);
  // The digest is the whole new tensor's: a chunk is missing still.
  ASSERT_TRUE(update->WriteChunk(tensor.name, 0, "", whole).ok());
  EXPECT_EQ(update->Progress(9).missing.size(), 0u);
  ExpectError(update->Finish({}).status(), absl::StatusCode::kDataLoss, "DIGEST_MISMATCH", {tensor.name, DigestHex(whole)});
  ASSERT_TRUE(update->WriteChunk(tensor.name, 8, tensor.bytes.substr(8)).ok());
  const auto next = update->Finish({});
  ASSERT_TRUE(next.ok()) << next.status();
  EXPECT_EQ((*next)->version.tensors[3].digest, whole);

  // A tensor that is named but not sent must be what the digest says, too.
  const auto unsent = models.Start(spec).value();
  ASSERT_TRUE(unsent->WriteChunk(tensor.name, 0, "", whole).ok());
  ExpectError(unsent->Finish({}).status(), absl::StatusCode::kDataLoss, "DIGEST_MISMATCH", {tensor.name});
  // A tensor that was sent whole and wrong starts over from the loaded one.
  const auto again = models.Start(spec).value();
  std::string wrong = tensor.bytes;
  wrong[wrong.size() - 2] ^= 1;
  const std::string partly = tensor.bytes.substr(0, 8) + models.old_tensors[3].bytes.substr(8);
  ExpectError(again->WriteChunk(tensor.name, 0, wrong, whole), absl::StatusCode::kDataLoss, "DIGEST_MISMATCH", {tensor.name});
  ASSERT_TRUE(again->WriteChunk(tensor.name, 0, tensor.bytes.substr(0, 8), Sha256Of(partly)).ok());
  const auto mended = again->Finish({});
  ASSERT_TRUE(mended.ok()) << mended.status();
  EXPECT_EQ((*mended)->version.tensors[3].digest,
            ResidentDigest(ResidentTensor(SlotsOf(models.config, **mended)[3], DType::kBFloat16, models.place.memory.get())));
  // Nothing named, nothing changed: a new step for the same bytes.
  spec.manifest.clear();
  const auto same = models.Start(spec).value()->Finish({});
  ASSERT_TRUE(same.ok()) << same.status();
  EXPECT_TRUE(Arena(**same) == Arena(*models.loaded));
  EXPECT_EQ((*same)->version.target_step, 7);
}

TEST(WeightUpdateTest, ManifestsMustFit) {
  for (const bool tied : {false, true}) {
    Pair models(tied, MatrixLayout::kPanels, "BF16", DType::kBFloat16);
    const WeightUpdateSpec good = FullSpec(models.tensors);
    const auto expect = [&](const std::function<void(WeightUpdateSpec&)>& spoil, const std::string& reason,
                            const std::vector<std::string>& parts) {
      WeightUpdateSpec spec = good;
      spoil(spec);
      ExpectError(models.Start(spec).status(), kInvalid, reason, parts);
    };
    const auto find = [](WeightUpdateSpec& spec, const std::string& name) -> TensorSpec& {
      return *std::find_if(spec.manifest.begin(), spec.manifest.end(),
                           [&](const TensorSpec& tensor) { return tensor.name == name; });
    };
    const std::string norm = models.config.tensor_prefix + "norm.weight";
    expect([&](auto& spec) { find(spec, norm).name = "model.norm.wait"; }, "UNKNOWN_TENSOR",
           {"model.norm.wait", "no such tensor"});
    expect([&](auto& spec) { spec.manifest.push_back({"model.visual.patch", "BF16", {4}}); }, "UNKNOWN_TENSOR",
           {"model.visual.patch"});
    // Other spellings of a checkpoint are told the one that is loaded.
    const std::string other = models.config.tensor_prefix == "model." ? "model.language_model.norm.weight" : "model.norm.weight";
    expect([&](auto& spec) { find(spec, norm).name = other; }, "UNKNOWN_TENSOR", {other, norm});
    expect([&](auto& spec) { find(spec, "mtp.fc.weight").name = "model.mtp.fc.weight"; }, "UNKNOWN_TENSOR",
           {"model.mtp.fc.weight", "\"mtp.fc.weight\""});
    if (tied) {
      expect([&](auto& spec) { spec.manifest.push_back({"lm_head.weight", "BF16", {50, 40}}); }, "UNKNOWN_TENSOR",
             {"lm_head.weight", "tied", "embed_tokens"});
    } else {
      expect([&](auto& spec) { std::erase_if(spec.manifest, [](const auto& t) { return t.name == "lm_head.weight"; }); },
             "MISSING_TENSOR", {"lm_head.weight", "BF16 [50, 40]"});
    }
    expect([&](auto& spec) { spec.manifest.push_back(find(spec, norm)); }, "DUPLICATE_TENSOR", {norm, "twice"});
    expect([&](auto& spec) { find(spec, norm).dtype = "F32"; }, "WRONG_DTYPE", {norm, "BF16", "F32"});
    expect([&](auto& spec) { find(spec, norm).dtype = "F16"; }, "WRONG_DTYPE", {norm, "BF16", "F16"});
    expect([&](auto& spec) { find(spec, norm).shape = {41}; }, "WRONG_SHAPE", {norm, "[40]", "[41]"});
    expect([&](auto& spec) { find(spec, norm).shape = {40, 1}; }, "WRONG_SHAPE", {norm, "[40]", "[40, 1]"});
    expect([&](auto& spec) { find(spec, norm).shape = {-40}; }, "WRONG_SHAPE", {norm, "[-40]"});
    expect([&](auto& spec) { find(spec, norm).shape = {std::numeric_limits<int64_t>::max(), 4}; }, "WRONG_SHAPE", {norm});
    expect([&](auto& spec) { spec.manifest.clear(); }, "MISSING_TENSOR", {"embed_tokens", "more missing"});
    expect([&](auto& spec) { std::erase_if(spec.manifest, [](const auto& t) { return t.name.starts_with("mtp."); }); },
           "MISSING_TENSOR", {"mtp.", "components to TARGET"});
    expect([&](auto& spec) { std::erase_if(spec.manifest, [](const auto& t) { return t.name == "mtp.fc.weight"; }); },
           "MISSING_TENSOR", {"mtp.fc.weight"});
    expect([&](auto& spec) { spec.components = {WeightComponent::kTarget}; }, "UNKNOWN_TENSOR", {"mtp.", "DRAFT"});
    expect([&](auto& spec) { spec.components = {WeightComponent::kDraft}; }, "UNKNOWN_TENSOR", {"TARGET"});
    EXPECT_TRUE(models.Start(good).ok());
    models.ExpectUntouched();
  }
}

TEST(WeightUpdateTest, StepsOnlyGrow) {
  Pair models(/*tied=*/false, MatrixLayout::kPanels, "BF16", DType::kBFloat16);
  models.loaded->version.target_step = 5;
  models.loaded->version.draft_step = 3;
  WeightUpdateSpec both = FullSpec(models.tensors);
  WeightUpdateSpec draft = FullSpec(Only(models.tensors, true));
  draft.components = {WeightComponent::kDraft};
  const auto start = [&](WeightUpdateSpec spec, int64_t step, std::optional<int64_t> base, bool rewind = false) {
    spec.target_step = step;
    spec.base_step = base;
    spec.rewind = rewind;
    return models.Start(spec).status();
  };
  EXPECT_TRUE(start(both, 6, std::nullopt).ok());
  EXPECT_TRUE(start(both, 6, 5).ok());  // a full update of both does not care for the draft's
  ExpectError(start(both, 5, std::nullopt), kPrecondition, "STEP_NOT_NEWER", {"5"});
  ExpectError(start(both, 4, 5), kPrecondition, "STEP_NOT_NEWER", {"5", "4"});
  EXPECT_TRUE(start(both, 4, 5, /*rewind=*/true).ok());
  EXPECT_TRUE(start(both, 5, std::nullopt, /*rewind=*/true).ok());
  ExpectError(start(both, 6, 3), kPrecondition, "WRONG_BASE_STEP", {"target", "5", "3"});
  ExpectError(start(both, 6, 4, /*rewind=*/true), kPrecondition, "WRONG_BASE_STEP", {"5", "4"});
  EXPECT_TRUE(start(draft, 4, 3).ok());
  ExpectError(start(draft, 3, std::nullopt), kPrecondition, "STEP_NOT_NEWER", {"draft", "3"});
  ExpectError(start(draft, 6, 5), kPrecondition, "WRONG_BASE_STEP", {"draft", "3", "5"});
  // A delta of both builds on both.
  both.encoding = WeightEncoding::kOverwriteDelta;
  ExpectError(start(both, 6, 5), kPrecondition, "WRONG_BASE_STEP", {"draft"});
  models.loaded->version.draft_step = 5;
  EXPECT_TRUE(start(both, 6, 5).ok());
}

std::string Describe(const WeightUpdate& update) {
  const WeightUpdateProgress progress = update.Progress(1000);
  std::string text = StrCat(progress.received_bytes, " ", progress.complete_tensors, " ", update.staging_bytes());
  for (const TensorProgress& missing : progress.missing) text += StrCat(" ", missing.name, ":", missing.next_offset);
  return text;
}

// Every chunk that may be refused, tried between any two chunks of an update, changes nothing: not the update, not the loaded
// weights.
TEST(WeightUpdateTest, RefusedChunksChangeNothing) {
  for (const MatrixLayout layout : kLayouts) {
    for (const std::string source : {"BF16", "F32"}) {
      Pair models(/*tied=*/false, layout, source, DType::kFloat32);
      const auto update = models.StartFull();
      const std::vector<Chunk> chunks = ShuffledChunks(models.tensors, 11);
      std::string bad_value = source == "F32" ? std::string("\0\0\xc0\x7f", 4) : std::string("\x80\x7f", 2);  // NaN; infinity
      const int64_t width = static_cast<int64_t>(bad_value.size());
      for (size_t i = 0; i < chunks.size(); ++i) {
        const Chunk& chunk = chunks[i];
        const std::string before = Describe(*update);
        const int64_t size = update->Find(chunk.tensor)->num_bytes();
        ExpectError(update->WriteChunk("model.nothing", 0, chunk.bytes), kInvalid, "UNKNOWN_TENSOR",
                    {"model.nothing", "manifest"});
        for (const int64_t offset : {int64_t{-2} * width, size, size - width, std::numeric_limits<int64_t>::max() - 3,
                                     std::numeric_limits<int64_t>::min()}) {
          ExpectError(update->WriteChunk(chunk.tensor, offset, std::string(static_cast<size_t>(2 * width), '\0')), kInvalid,
                      "WRONG_RANGE", {chunk.tensor, StrCat(size), StrCat(offset)});
        }
        ExpectError(update->WriteChunk(chunk.tensor, 1, bad_value), kInvalid, "WRONG_RANGE", {chunk.tensor, "whole elements"});
        ExpectError(update->WriteChunk(chunk.tensor, 0, "x"), kInvalid, "WRONG_RANGE", {chunk.tensor, "whole elements"});
        Chunk spoilt = chunk;
        if (!chunk.bytes.empty()) {
          // Anywhere in the chunk.
          const int64_t at = static_cast<int64_t>(i * 7) % (static_cast<int64_t>(chunk.bytes.size()) / width);
          spoilt.bytes.replace(static_cast<size_t>(at * width), bad_value.size(), bad_value);
          ExpectError(Write(*update, spoilt), kInvalid, "NON_FINITE",
                      {chunk.tensor, StrCat("element ", chunk.offset / width + at, ":"), source == "F32" ? "nan" : "inf"});
        }
        EXPECT_EQ(Describe(*update), before);
        ASSERT_TRUE(Write(*update, chunk).ok());
        if (chunk.bytes.empty()) continue;
        const std::string after = Describe(*update);
        spoilt = chunk;
        const size_t at = i % chunk.bytes.size();
        spoilt.bytes[at] = static_cast<char>(spoilt.bytes[at] ^ 1);
        ExpectError(Write(*update, spoilt), absl::StatusCode::kAlreadyExists, "CHUNK_CONFLICT",
                    {chunk.tensor, StrCat("differs at offset ", chunk.offset + static_cast<int64_t>(at), " ")});
        if (chunk.digest.has_value()) {
          spoilt = chunk;
          (*spoilt.digest)[i % 32] ^= 1;
          ExpectError(Write(*update, spoilt), absl::StatusCode::kAlreadyExists, "CHUNK_CONFLICT",
                      {chunk.tensor, DigestHex(*chunk.digest), DigestHex(*spoilt.digest)});
        }
        ASSERT_TRUE(Write(*update, chunk).ok());  // again
        EXPECT_EQ(Describe(*update), after);
        if (i + 1 < chunks.size()) {
          const WeightUpdateProgress progress = update->Progress(1);
          if (!progress.missing.empty())
            ExpectError(update->Finish({}).status(), kPrecondition, "INCOMPLETE", {progress.missing[0].name});
          EXPECT_EQ(Describe(*update), after);
        }
      }
      models.ExpectUntouched();
      const auto next = update->Finish({});
      ASSERT_TRUE(next.ok()) << next.status();
      EXPECT_TRUE(Arena(**next) == Arena(*models.other));
    }
  }
}

// Counts the bytes that are allocated.
class CountingMemory final : public DeviceMemory {
 public:
  bool is_host() const override { return true; }
  absl::StatusOr<std::shared_ptr<void>> Allocate(int64_t bytes, std::string_view what) override {
    if (bytes > left)
      return absl::ResourceExhaustedError(StrCat(what, ": expected ", bytes, " bytes of memory, ", left, " are free"));
    auto memory = host_->Allocate(bytes, what);
    if (!memory.ok()) return memory;
    live += bytes;
    return std::shared_ptr<void>(memory->get(), [this, bytes, owner = *memory](void*) { live -= bytes; });
  }
  void CopyIn(void* destination, const void* source, int64_t bytes) override { Copy(destination, source, bytes); }
  void CopyOut(void* destination, const void* source, int64_t bytes) override { Copy(destination, source, bytes); }
  void Copy(void* destination, const void* source, int64_t bytes) override { host_->Copy(destination, source, bytes); }
  int64_t available_bytes() const override { return left; }
  absl::Status status() const override { return absl::OkStatus(); }

  int64_t live = 0, left = kNoLimit;

 private:
  std::unique_ptr<DeviceMemory> host_ = MakeHostMemory();
};

// Wherever an update is given up, its memory comes back and the loaded weights are what their digest says.
TEST(WeightUpdateTest, EndsAtEveryChunkWithoutATrace) {
  const ModelConfig config = SmallConfig(/*tied=*/false);
  CountingMemory memory;
  const std::vector<TestTensor> tensors = MakeModelTensors(config, true, "BF16", 2);
  const auto loaded = Load(config, MakeModelTensors(config, true, "BF16", 1), DType::kBFloat16, &memory);
  const std::string arena(Arena(*loaded));
  const std::vector<Chunk> chunks = ShuffledChunks(tensors, 5);
  for (size_t end = 0; end <= chunks.size(); ++end) {
    {
      const auto update = WeightUpdate::Start(config, *loaded, FullSpec(tensors), kNoLimit, &memory).value();
      for (size_t i = 0; i < end; ++i) ASSERT_TRUE(Write(*update, chunks[i]).ok());
      EXPECT_EQ(memory.live, 2 * loaded->storage_bytes);
      EXPECT_GE(update->staging_bytes(), loaded->storage_bytes);
    }
    ASSERT_EQ(memory.live, loaded->storage_bytes);
    ASSERT_TRUE(Arena(*loaded) == arena);
  }
  ExpectSameTensors(RecomputeVersion(config, *loaded, &memory).value(), loaded->version);
}

TEST(WeightUpdateTest, StagingIsBudgeted) {
  const ModelConfig config = SmallConfig(/*tied=*/false);
  CountingMemory memory;
  const std::vector<TestTensor> tensors = MakeModelTensors(config, true, "BF16", 2);
  const auto loaded = Load(config, MakeModelTensors(config, true, "BF16", 1), DType::kBFloat16, &memory);
  const WeightUpdateSpec spec = FullSpec(tensors);
  const int64_t needed = WeightUpdate::Start(config, *loaded, spec, kNoLimit, &memory).value()->staging_bytes();
  EXPECT_GT(needed, loaded->storage_bytes);
  ExpectError(WeightUpdate::Start(config, *loaded, spec, needed - 1, &memory).status(), absl::StatusCode::kResourceExhausted,
              "STAGING_BUDGET", {StrCat(needed), StrCat(needed - 1)});
  EXPECT_EQ(memory.live, loaded->storage_bytes);
  memory.left = loaded->storage_bytes - 1;
  ExpectError(WeightUpdate::Start(config, *loaded, spec, needed, &memory).status(), absl::StatusCode::kResourceExhausted,
              "STAGING_BUDGET", {StrCat(loaded->storage_bytes), StrCat(memory.left)});
  memory.left = kNoLimit;

  // With the least that starts, everything can be sent in order; separate pieces of a tensor are refused, and only these.
  const auto update = WeightUpdate::Start(config, *loaded, spec, needed, &memory).value();
  const TestTensor& tensor = tensors[0];
  ASSERT_TRUE(update->WriteChunk(tensor.name, 8, tensor.bytes.substr(8, 4)).ok());
  const std::string before = Describe(*update);
  ExpectError(update->WriteChunk(tensor.name, 16, tensor.bytes.substr(16, 4)), absl::StatusCode::kResourceExhausted,
              "STAGING_BUDGET", {StrCat(needed)});
  ExpectError(update->WriteChunk(tensor.name, 0, tensor.bytes.substr(0, 4), Sha256Digest{}), absl::StatusCode::kResourceExhausted,
              "STAGING_BUDGET", {StrCat(needed)});
  EXPECT_EQ(Describe(*update), before);
  ASSERT_TRUE(update->WriteChunk(tensor.name, 12, tensor.bytes.substr(12, 4)).ok());  // touches its end
  ASSERT_TRUE(update->WriteChunk(tensor.name, 4, tensor.bytes.substr(4, 4)).ok());    // and its begin
  ASSERT_TRUE(update->WriteChunk(tensor.name, 6, tensor.bytes.substr(6, 20)).ok());   // overlaps it
  for (const TestTensor& whole : tensors) ASSERT_TRUE(update->WriteChunk(whole.name, 0, whole.bytes, Sha256Of(whole.bytes)).ok());
  EXPECT_EQ(update->staging_bytes(), needed);
  EXPECT_TRUE(update->Finish({}).ok());

  // What separate pieces cost is given back as they grow together.
  const auto roomy = WeightUpdate::Start(config, *loaded, spec, needed + 128, &memory).value();
  for (const int64_t offset : {0, 8, 16})
    ASSERT_TRUE(roomy->WriteChunk(tensor.name, offset, tensor.bytes.substr(static_cast<size_t>(offset), 4)).ok());
  EXPECT_EQ(roomy->staging_bytes(), needed + 128);
  EXPECT_FALSE(roomy->WriteChunk(tensor.name, 24, tensor.bytes.substr(24, 4)).ok());
  ASSERT_TRUE(roomy->WriteChunk(tensor.name, 2, tensor.bytes.substr(2, 16)).ok());
  EXPECT_EQ(roomy->staging_bytes(), needed);
}

TEST(WeightUpdateTest, ProgressTellsWhereToGoOn) {
  Pair models(/*tied=*/false, MatrixLayout::kPanels, "BF16", DType::kBFloat16);
  const auto update = models.StartFull();
  const TestTensor& first = models.tensors[0];
  const auto progress = [&] { return update->Progress(2); };
  int64_t total = 0;
  for (const TestTensor& tensor : models.tensors) total += static_cast<int64_t>(tensor.bytes.size());
  EXPECT_EQ(progress().expected_bytes, total);
  EXPECT_EQ(progress().num_tensors, static_cast<int32_t>(models.tensors.size()));
  ASSERT_EQ(progress().missing.size(), 2u);
  EXPECT_EQ(progress().missing[0].name, first.name);
  EXPECT_EQ(progress().missing[0].next_offset, 0);
  ASSERT_TRUE(update->WriteChunk(first.name, 100, first.bytes.substr(100, 20)).ok());
  EXPECT_EQ(progress().missing[0].next_offset, 0);
  EXPECT_EQ(progress().received_bytes, 20);
  ASSERT_TRUE(update->WriteChunk(first.name, 0, first.bytes.substr(0, 90)).ok());
  EXPECT_EQ(progress().missing[0].next_offset, 90);
  ASSERT_TRUE(update->WriteChunk(first.name, 90, first.bytes.substr(90, 10)).ok());
  EXPECT_EQ(progress().missing[0].next_offset, 120);
  EXPECT_EQ(progress().received_bytes, 120);
  ASSERT_TRUE(update->WriteChunk(first.name, 60, first.bytes.substr(60)).ok());
  EXPECT_EQ(progress().complete_tensors, 1);
  EXPECT_EQ(progress().missing[0].name, models.tensors[1].name);
  EXPECT_EQ(progress().received_bytes, static_cast<int64_t>(first.bytes.size()));
  ExpectError(update->Finish({}).status(), kPrecondition, "INCOMPLETE",
              {models.tensors[1].name, "before offset 0", StrCat("and ", models.tensors.size() - 2, " more")});
}

// Digests of the result prove a delta, component by component; they do not replace the bytes of a full update.
TEST(WeightUpdateTest, ExpectedDigestsCompleteDeltasOnly) {
  Pair models(/*tied=*/false, MatrixLayout::kPanels, "BF16", DType::kBFloat16);
  const WeightVersion& loaded = models.loaded->version;
  WeightUpdateSpec spec = FullSpec(models.tensors);
  const auto full = models.Start(spec).value();
  const TestTensor& last = models.tensors.back();
  for (const TestTensor& tensor : models.tensors) {
    if (&tensor == &last) continue;
    ASSERT_TRUE(full->WriteChunk(tensor.name, 0, tensor.bytes).ok());
  }
  ExpectError(full->Finish({models.other->version.target_digest, models.other->version.draft_digest}).status(), kPrecondition,
              "INCOMPLETE", {last.name});
  spec.encoding = WeightEncoding::kOverwriteDelta;
  spec.base_step = 0;
  const auto delta = models.Start(spec).value();
  ExpectError(delta->Finish({loaded.target_digest, std::nullopt}).status(), kPrecondition, "INCOMPLETE", {"mtp."});
  ExpectError(delta->Finish({std::nullopt, loaded.draft_digest}).status(), kPrecondition, "INCOMPLETE", {"embed_tokens"});
  EXPECT_TRUE(delta->Finish({loaded.target_digest, loaded.draft_digest}).ok());
}

// A bit that flips on the way is found at the tensor's last byte, whichever tensor, bit and order; sent again, the update goes
// on.
TEST(WeightUpdateTest, FlippedBitsAreDataLoss) {
  Pair models(/*tied=*/false, MatrixLayout::kPanels, "BF16", DType::kBFloat16);
  const auto update = models.StartFull();
  std::mt19937 random(2);
  for (const TestTensor& tensor : models.tensors) {
    TestTensor flipped = tensor;
    flipped.bytes[random() % flipped.bytes.size()] ^= 1;  // the lowest bit of either byte of an element: stays finite here
    ASSERT_EQ(FirstNonFinite(DType::kBFloat16, flipped.bytes), -1);
    std::vector<Chunk> chunks;
    AddChunks(flipped, /*with_digest=*/false, random, chunks);
    std::shuffle(chunks.begin(), chunks.end(), random);
    const Sha256Digest digest = Sha256Of(tensor.bytes);
    chunks[random() % chunks.size()].digest = digest;
    const std::string before = Describe(*update);
    absl::Status status;
    for (size_t i = 0; i < chunks.size() && status.ok(); ++i) status = Write(*update, chunks[i]);
    ExpectError(status, absl::StatusCode::kDataLoss, "DIGEST_MISMATCH",
                {tensor.name, DigestHex(digest), DigestHex(Sha256Of(flipped.bytes))});
    EXPECT_EQ(Describe(*update), before);  // the tensor starts over
    // A digest that comes after the last byte is checked as well.
    ASSERT_TRUE(update->WriteChunk(tensor.name, 0, flipped.bytes).ok());
    ExpectError(update->WriteChunk(tensor.name, 0, "", digest), absl::StatusCode::kDataLoss, "DIGEST_MISMATCH", {tensor.name});
    EXPECT_EQ(Describe(*update), before);
    ASSERT_TRUE(update->WriteChunk(tensor.name, 0, tensor.bytes, digest).ok());
  }
  // The result's own digests.
  ExpectedDigests expected{models.other->version.target_digest, models.other->version.draft_digest};
  for (std::optional<Sha256Digest>* digest : {&expected.target, &expected.draft}) {
    (**digest)[5] ^= 0x10;
    ExpectError(update->Finish(expected).status(), absl::StatusCode::kDataLoss, "DIGEST_MISMATCH", {DigestHex(**digest)});
    (**digest)[5] ^= 0x10;
  }
  models.ExpectUntouched();
  const auto next = update->Finish(expected);
  ASSERT_TRUE(next.ok()) << next.status();
  EXPECT_TRUE(Arena(**next) == Arena(*models.other));
}

// Two chunks at once are two chunks one after the other, also when one of them is wrong.
TEST(WeightUpdateTest, TwoChunksAreOneAfterTheOther) {
  Pair models(/*tied=*/false, MatrixLayout::kPanels, "BF16", DType::kBFloat16);
  int num_refused = 0, num_lost = 0, num_pairs = 0;
  for (uint32_t seed = 0; seed < kNumSeeds; ++seed) {
    std::mt19937 random(seed);
    std::vector<Chunk> chunks = ShuffledChunks(models.tensors, seed);
    const auto alone = models.StartFull(), together = models.StartFull();
    for (size_t i = 0; i + 1 < chunks.size(); i += 2) {
      Chunk pair[2] = {chunks[i], chunks[i + 1]};
      Chunk& spoilt = pair[random() % 2];
      switch (random() % 4) {
        case 0:
          if (!spoilt.bytes.empty()) spoilt.bytes.replace(0, 2, std::string("\x80\x7f", 2));  // infinity
          break;
        case 1:
          spoilt.offset += 1;
          break;
        case 2:
          spoilt.digest = Sha256Of("something else");
          break;
        default:
          break;
      }
      const auto as_chunk = [](const Chunk& chunk) { return TensorChunk{chunk.tensor, chunk.offset, chunk.bytes, chunk.digest}; };
      const absl::Status first = Write(*alone, pair[0]);
      // A wrong digest comes to light once both have been put in their places.
      const bool takes_second = first.ok() || absl::IsDataLoss(first);
      const absl::Status second = takes_second ? Write(*alone, pair[1]) : absl::OkStatus();
      const absl::Status both = together->WriteChunks(as_chunk(pair[0]), as_chunk(pair[1]));
      if (pair[0].tensor == pair[1].tensor && absl::IsDataLoss(first)) break;  // in turn: the second does not come
      EXPECT_EQ(both, first.ok() ? second : first);
      ASSERT_EQ(Describe(*together), Describe(*alone)) << "seed " << seed << " chunk " << i;
      num_refused += !both.ok();
      num_lost += absl::IsDataLoss(both);
      num_pairs += pair[0].tensor != pair[1].tensor;
    }
  }
  EXPECT_GT(num_refused, static_cast<int>(kNumSeeds));
  EXPECT_GT(num_lost, 0);
  EXPECT_GT(num_pairs, static_cast<int>(kNumSeeds));
  // A whole model, in pairs of unlike sizes, with the digests as the proof.
  const auto update = models.StartFull();
  std::vector<std::pair<const TestTensor*, size_t>> open;
  size_t next_tensor = 0;
  while (true) {
    while (open.size() < 2 && next_tensor < models.tensors.size()) open.emplace_back(&models.tensors[next_tensor++], 0);
    if (open.size() < 2) break;
    TensorChunk pair[2];
    for (size_t i = 0; i < 2; ++i) {
      auto& [tensor, offset] = open[i];
      const std::string_view piece = std::string_view(tensor->bytes).substr(offset, 94 + 88 * i);
      pair[i] = {tensor->name, static_cast<int64_t>(offset), piece, {}};
      offset += piece.size();
      if (offset == tensor->bytes.size()) pair[i].digest = Sha256Of(tensor->bytes);
    }
    const absl::Status status = update->WriteChunks(pair[0], pair[1]);
    ASSERT_TRUE(status.ok()) << status;
    std::erase_if(open, [](const auto& entry) { return entry.second == entry.first->bytes.size(); });
  }
  for (const auto& [tensor, offset] : open) {
    const std::string_view rest = std::string_view(tensor->bytes).substr(offset);
    ASSERT_TRUE(update->WriteChunk(tensor->name, static_cast<int64_t>(offset), rest, Sha256Of(tensor->bytes)).ok());
  }
  const auto next = update->Finish({models.other->version.target_digest, models.other->version.draft_digest});
  ASSERT_TRUE(next.ok()) << next.status();
  EXPECT_TRUE(Arena(**next) == Arena(*models.other));
}

TEST(WeightUpdateTest, AFailedDeviceEndsIt) {
  Pair models(/*tied=*/false, MatrixLayout::kRows, "BF16", DType::kBFloat16);
  const auto update = models.StartFull();
  for (const TestTensor& tensor : models.tensors) ASSERT_TRUE(update->WriteChunk(tensor.name, 0, tensor.bytes).ok());
  models.place.fake->Fail(absl::InternalError("device error: gone"));
  EXPECT_EQ(update->WriteChunk(models.tensors[0].name, 0, models.tensors[0].bytes).code(), absl::StatusCode::kInternal);
  EXPECT_EQ(update->Finish({}).status().code(), absl::StatusCode::kInternal);
  EXPECT_EQ(RecomputeVersion(models.config, *models.loaded, models.place.memory.get()).status().code(),
            absl::StatusCode::kInternal);
}

// The update holds on to the weights it started from, and its result does not.
TEST(WeightUpdateTest, TheLoadedWeightsMayGoFirst) {
  const ModelConfig config = SmallConfig(/*tied=*/false);
  CountingMemory memory;
  const std::vector<TestTensor> tensors = MakeModelTensors(config, true, "BF16", 2);
  auto loaded = Load(config, MakeModelTensors(config, true, "BF16", 1), DType::kBFloat16, &memory);
  WeightUpdateSpec spec = FullSpec(Only(tensors, true));
  spec.components = {WeightComponent::kDraft};
  auto update = WeightUpdate::Start(config, *loaded, spec, kNoLimit, &memory).value();
  const std::string old_embedding(Arena(*loaded).substr(0, 1000));
  const int64_t bytes = loaded->storage_bytes;
  loaded.reset();
  for (const TestTensor& tensor : Only(tensors, true)) ASSERT_TRUE(update->WriteChunk(tensor.name, 0, tensor.bytes).ok());
  const auto next = update->Finish({});
  ASSERT_TRUE(next.ok()) << next.status();
  EXPECT_EQ(memory.live, 2 * bytes);
  update.reset();
  EXPECT_EQ(memory.live, bytes);
  EXPECT_EQ(Arena(**next).substr(0, 1000), old_embedding);
}

TEST(WeightUpdateTest, SpecsCompareWhole) {
  const ModelConfig config = SmallConfig(/*tied=*/false);
  const WeightUpdateSpec spec = FullSpec(MakeModelTensors(config, true, "BF16", 2));
  WeightUpdateSpec other = spec;
  EXPECT_TRUE(spec == other);
  other.manifest.back().shape.back() += 1;
  EXPECT_FALSE(spec == other);
  other = spec;
  other.rewind = true;
  EXPECT_FALSE(spec == other);
}

}  // namespace
}  // namespace bebop
