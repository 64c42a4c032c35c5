// SPDX-License-Identifier: Apache-2.0
#include "engine/weights/weight_files.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <functional>
#include <thread>

#include "engine/formats/strings.h"
#include "tests/engine/weights/weight_test_util.h"

namespace bebop {
namespace {

using test::Arena;
using test::FullSpec;
using test::InForms;
using test::Load;
using test::ManifestOf;
using test::Place;
using test::SmallConfig;

constexpr int64_t kNoLimit = int64_t{1} << 40;
constexpr WeightRoot::Resolver kResolvers[] = {WeightRoot::Resolver::kKernel, WeightRoot::Resolver::kWalk};
constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
constexpr auto kDenied = absl::StatusCode::kPermissionDenied;

void ExpectError(const absl::Status& status, absl::StatusCode code, const std::string& reason,
                 const std::vector<std::string>& parts) {
  EXPECT_EQ(status.code(), code) << status;
  EXPECT_EQ(StatusReason(status), reason) << status;
  for (const std::string& part : parts)
    EXPECT_NE(status.message().find(part), absl::string_view::npos) << status << " lacks " << part;
}

// A loaded model, a root, and files that others put there.
struct Scene {
  explicit Scene(bool tied = false, const std::string& source = "BF16", DType dtype = DType::kBFloat16,
                 MatrixLayout layout = MatrixLayout::kPanels)
      : config(SmallConfig(tied)), place(layout), dtype(dtype) {
    loaded = Load(config, MakeModelTensors(config, true, source, 1), dtype, place.memory.get());
    tensors = MakeModelTensors(config, true, source, 2);
    std::filesystem::create_directories(root_path());
    root = WeightRoot::Open(root_path()).value();
  }
  std::string root_path() const { return directory.path() + "/root"; }
  void Put(const std::string& path, const std::vector<TestTensor>& what) {
    std::filesystem::create_directories(std::filesystem::path(root_path() + "/" + path).parent_path());
    WriteFile(root_path() + "/" + path, SafetensorsBytes(what));
  }
  std::unique_ptr<WeightUpdate> Start() { return Start(FullSpec(InForms(tensors, loaded->version))); }
  std::unique_ptr<WeightUpdate> Start(const WeightUpdateSpec& spec) {
    return WeightUpdate::Start(config, *loaded, spec, kNoLimit, place.memory.get()).value();
  }
  // Reads `path` into an update of everything and compares with loading.
  void ExpectReads(const std::string& path) {
    const auto update = Start();
    const absl::Status status = ReadWeights(root, path, *update);
    ASSERT_TRUE(status.ok()) << status;
    const auto next = update->Finish({});
    ASSERT_TRUE(next.ok()) << next.status();
    const auto expected = Load(config, tensors, dtype, place.memory.get());
    EXPECT_TRUE(Arena(**next) == Arena(*expected));
    EXPECT_EQ((*next)->version.target_digest, expected->version.target_digest);
    EXPECT_EQ((*next)->version.draft_digest, expected->version.draft_digest);
  }

  TempDir directory;
  ModelConfig config;
  Place place;
  DType dtype;
  std::unique_ptr<ModelWeights> loaded;
  std::vector<TestTensor> tensors;
  WeightRoot root;
};

TEST(WeightFilesTest, ReadsFoldersFilesAndShards) {
  for (const MatrixLayout layout : {MatrixLayout::kPanels, MatrixLayout::kRows}) {
    for (const std::string source : {"BF16", "F32", "F16"}) {
      for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
        SCOPED_TRACE(StrCat(source, " to ", DTypeName(dtype)));
        Scene scene(/*tied=*/false, source, dtype, layout);
        scene.Put("steps/7/model.safetensors", scene.tensors);
        scene.ExpectReads("steps/7");
        scene.ExpectReads("steps/7/");
        scene.ExpectReads("./steps//7/model.safetensors");
        const auto middle = scene.tensors.begin() + 20;
        const std::vector<std::pair<std::string, std::vector<TestTensor>>> shards = {
            {"a.safetensors", {scene.tensors.begin(), middle}}, {"b.safetensors", {middle, scene.tensors.end()}}};
        for (const auto& [file, tensors] : shards) scene.Put("shards/" + file, tensors);
        WriteFile(scene.root_path() + "/shards/model.safetensors.index.json", IndexJson(shards));
        scene.ExpectReads("shards");
        // Shard by shard.
        const auto update = scene.Start();
        ASSERT_TRUE(ReadWeights(scene.root, "shards/b.safetensors", *update).ok());
        EXPECT_EQ(StatusReason(update->Finish({}).status()), "INCOMPLETE");
        ASSERT_TRUE(ReadWeights(scene.root, "shards/a.safetensors", *update).ok());
        ASSERT_TRUE(ReadWeights(scene.root, "shards", *update).ok());  // again, the same bytes
        EXPECT_TRUE(update->Finish({}).ok());
      }
    }
  }
}

TEST(WeightFilesTest, NamesMayBeSpelledAsLoadingTakesThem) {
  Scene scene(/*tied=*/true);
  std::vector<TestTensor> other = scene.tensors;
  for (TestTensor& tensor : other) {
    const std::string slot = SlotName(tensor.name);
    tensor.name = slot.starts_with("mtp.") ? "model." + slot : "model.language_model." + slot.substr(1);
  }
  other.push_back(MakeTensor("model.visual.patch_embed.weight", "F16", {2}, {1, 2}));
  TestTensor head = other[0];
  ASSERT_TRUE(head.name.ends_with("embed_tokens.weight"));
  head.name = "lm_head.weight";
  other.push_back(head);
  scene.Put("model.safetensors", other);
  scene.ExpectReads(".");

  other.back().bytes[3] ^= 1;
  scene.Put("model.safetensors", other);
  const auto update = scene.Start();
  ExpectError(ReadWeights(scene.root, ".", *update), kInvalid, "UNKNOWN_TENSOR", {"lm_head.weight", "tied"});
  EXPECT_EQ(update->Progress(0).received_bytes, 0);
}

TEST(WeightFilesTest, ComponentsAndDeltasTakeTheirTensors) {
  Scene scene;
  scene.Put("all.safetensors", scene.tensors);
  for (const bool draft : {false, true}) {
    std::vector<TestTensor> sent;
    for (const TestTensor& tensor : scene.tensors) {
      if (test::IsMtp(tensor) == draft) sent.push_back(tensor);
    }
    WeightUpdateSpec spec = FullSpec(sent);
    spec.components = {draft ? WeightComponent::kDraft : WeightComponent::kTarget};
    const auto update = scene.Start(spec);
    ASSERT_TRUE(ReadWeights(scene.root, "all.safetensors", *update).ok());
    EXPECT_TRUE(update->Finish({}).ok());
  }
  const std::vector<TestTensor> some = {scene.tensors[1], scene.tensors[9]};
  WeightUpdateSpec spec = FullSpec(some);
  spec.encoding = WeightEncoding::kOverwriteDelta;
  spec.base_step = 0;
  scene.Put("some.safetensors", some);
  const auto update = scene.Start(spec);
  ExpectError(ReadWeights(scene.root, "all.safetensors", *update), kInvalid, "UNKNOWN_TENSOR", {"not in the manifest"});
  ASSERT_TRUE(ReadWeights(scene.root, "some.safetensors", *update).ok());
  const auto next = update->Finish({});
  ASSERT_TRUE(next.ok()) << next.status();
  std::vector<TestTensor> mixed = MakeModelTensors(scene.config, true, "BF16", 1);
  mixed[1] = some[0];
  mixed[9] = some[1];
  EXPECT_TRUE(Arena(**next) == Arena(*Load(scene.config, mixed, scene.dtype, scene.place.memory.get())));
}

// Headers are checked before any value is used.
TEST(WeightFilesTest, FilesThatDoNotFitAreRefusedWhole) {
  Scene scene;
  const auto update = scene.Start();
  const auto expect = [&](const std::function<void(std::vector<TestTensor>&)>& spoil, absl::StatusCode code,
                          const std::string& reason, const std::vector<std::string>& parts) {
    std::vector<TestTensor> tensors = scene.tensors;
    spoil(tensors);
    scene.Put("model.safetensors", tensors);
    ExpectError(ReadWeights(scene.root, ".", *update), code, reason, parts);
    EXPECT_EQ(update->Progress(0).received_bytes, 0);
  };
  const std::string last = scene.tensors.back().name;
  expect([](auto& tensors) { tensors.back().name += "s"; }, kInvalid, "UNKNOWN_TENSOR", {last + "s", "model.safetensors"});
  expect([](auto& tensors) { tensors.back().shape = {20, 2}; }, kInvalid, "WRONG_SHAPE", {last, "[40]", "[20, 2]"});
  expect([](auto& tensors) { tensors.back().dtype = "I16"; }, kInvalid, "WRONG_DTYPE", {last, "BF16", "I16"});
  expect([](auto& tensors) { tensors.back() = MakeTensor(tensors.back().name, "F32", {40}, std::vector<float>(40)); }, kInvalid,
         "WRONG_DTYPE", {last, "BF16", "F32"});  // would load as F32
  expect(
      [](auto& tensors) {
        tensors.push_back(tensors.back());
        tensors.back().name = "model.mtp.pre_fc_norm_hidden.weight";
      },
      kInvalid, "DUPLICATE_TENSOR", {"model.mtp.pre_fc_norm_hidden.weight", "\"mtp.pre_fc_norm_hidden.weight\""});
  expect([](auto& tensors) { tensors.push_back(tensors[0]); }, kInvalid, "", {"model.safetensors"});

  const std::string good = SafetensorsBytes(scene.tensors);
  const auto write = [&](const std::string& bytes) { WriteFile(scene.root_path() + "/model.safetensors", bytes); };
  for (const size_t size : {size_t{0}, size_t{7}, size_t{8}, size_t{100}, good.size() - 1}) {
    write(good.substr(0, size));
    ExpectError(ReadWeights(scene.root, ".", *update), absl::StatusCode::kDataLoss, "", {"model.safetensors"});
  }
  write(good + "x");
  ExpectError(ReadWeights(scene.root, ".", *update), kInvalid, "", {"model.safetensors"});
  write(std::string(8, '\x7f') + good);
  ExpectError(ReadWeights(scene.root, ".", *update), kInvalid, "", {"at most"});
  EXPECT_EQ(update->Progress(0).received_bytes, 0);

  // Values: what came before the bad one stays, and the file may be mended.
  std::vector<TestTensor> tensors = scene.tensors;
  tensors.back().bytes.replace(6, 2, "\x80\x7f", 2);
  scene.Put("model.safetensors", tensors);
  ExpectError(ReadWeights(scene.root, ".", *update), kInvalid, "NON_FINITE", {"\"./model.safetensors\"", last, "element 3"});
  scene.Put("model.safetensors", scene.tensors);
  ASSERT_TRUE(ReadWeights(scene.root, ".", *update).ok());
  EXPECT_TRUE(update->Finish({}).ok());
}

TEST(WeightFilesTest, NoPathLeadsOutOfTheRoot) {
  Scene scene;
  const std::string outside = scene.directory.path() + "/secret";
  std::filesystem::create_directories(outside);
  WriteFile(outside + "/model.safetensors", SafetensorsBytes(scene.tensors));
  scene.Put("in/model.safetensors", scene.tensors);
  namespace fs = std::filesystem;
  fs::create_symlink(outside, scene.root_path() + "/absolute");
  fs::create_symlink("../secret", scene.root_path() + "/relative");
  fs::create_symlink("../../secret/model.safetensors", scene.root_path() + "/in/file.safetensors");
  fs::create_symlink("loop", scene.root_path() + "/loop");
  fs::create_symlink("in", scene.root_path() + "/latest");
  fs::create_directories(scene.root_path() + "/trap");
  fs::create_symlink("../../secret/model.safetensors", scene.root_path() + "/trap/model.safetensors");
  ASSERT_EQ(mkfifo((scene.root_path() + "/fifo").c_str(), 0600), 0);

  for (const WeightRoot::Resolver resolver : kResolvers) {
    SCOPED_TRACE(resolver == WeightRoot::Resolver::kWalk ? "walk" : "kernel");
    const WeightRoot root = WeightRoot::Open(scene.root_path(), resolver).value();
    const auto update = scene.Start();
    for (const std::string& path :
         {outside, std::string("/"), std::string("/etc/passwd"), std::string("../secret"), std::string(".."),
          std::string("in/../../secret"), std::string("in/../in"), std::string("absolute"),
          std::string("absolute/model.safetensors"), std::string("relative"), std::string("relative/model.safetensors"),
          std::string("in/file.safetensors"), std::string("trap"), std::string("loop")}) {
      ExpectError(ReadWeights(root, path, *update), kDenied, "OUTSIDE_ROOT", {});
    }
    ExpectError(ReadWeights(root, "", *update), kInvalid, "", {});
    ExpectError(ReadWeights(root, std::string("in\0/../x", 8), *update), kInvalid, "", {});
    ExpectError(ReadWeights(root, "nothing", *update), absl::StatusCode::kNotFound, "", {"\"nothing\""});
    ExpectError(ReadWeights(root, "in/nothing/x", *update), absl::StatusCode::kNotFound, "", {"in/nothing/x"});
    ExpectError(ReadWeights(root, ".", *update), absl::StatusCode::kNotFound, "", {"neither"});
    ExpectError(ReadWeights(root, "fifo", *update), kInvalid, "", {"regular file"});
    EXPECT_FALSE(ReadWeights(root, std::string(5000, 'x'), *update).ok());
    EXPECT_FALSE(ReadWeights(root, "in/model.safetensors/x", *update).ok());
    EXPECT_EQ(update->Progress(0).received_bytes, 0);
    // A link that stays inside is fine where the kernel can tell.
    const absl::Status latest = ReadWeights(root, "latest", *update);
    if (resolver == WeightRoot::Resolver::kKernel) {
      EXPECT_TRUE(latest.ok()) << latest;
    } else {
      ExpectError(latest, kDenied, "OUTSIDE_ROOT", {"latest"});
    }
    EXPECT_TRUE(ReadWeights(root, "in", *update).ok());
  }
  EXPECT_EQ(WeightRoot::Open(scene.root_path() + "/nothing").status().code(), absl::StatusCode::kNotFound);
  EXPECT_FALSE(WeightRoot::Open(scene.root_path() + "/in/model.safetensors").ok());
}

// While somebody swaps a folder for a link to a secret one, nothing outside is ever opened.
TEST(WeightFilesTest, RacingRenamesDoNotLeadOut) {
  Scene scene;
  const std::string root_path = scene.root_path();
  namespace fs = std::filesystem;
  fs::create_directories(scene.directory.path() + "/secret");
  WriteFile(scene.directory.path() + "/secret/x", "secret");
  fs::create_directories(root_path + "/folder");
  WriteFile(root_path + "/folder/x", "public");
  fs::create_symlink(scene.directory.path() + "/secret", root_path + "/link");
  std::atomic<bool> stop{false};
  std::thread swapper([&] {
    while (!stop) {
      // The folder, then the link, under the name `moving`.
      (void)rename((root_path + "/folder").c_str(), (root_path + "/moving").c_str());
      (void)rename((root_path + "/moving").c_str(), (root_path + "/folder").c_str());
      (void)rename((root_path + "/link").c_str(), (root_path + "/moving").c_str());
      (void)rename((root_path + "/moving").c_str(), (root_path + "/link").c_str());
    }
  });
  for (const WeightRoot::Resolver resolver : kResolvers) {
    const WeightRoot root = WeightRoot::Open(root_path, resolver).value();
    int opened = 0;
    for (int i = 0; i < 20000; ++i) {
      const auto descriptor = root.OpenBeneath("moving/x");
      if (!descriptor.ok()) continue;
      char text[8] = {};
      ASSERT_EQ(read(descriptor->value(), text, sizeof(text)), 6);
      ASSERT_STREQ(text, "public");
      ++opened;
    }
    RecordProperty(resolver == WeightRoot::Resolver::kWalk ? "walk" : "kernel", opened);
  }
  stop = true;
  swapper.join();
}

// The kernel's own files end before the size they claim.
TEST(WeightFilesTest, FilesThatEndEarlyAreDataLoss) {
  Scene scene;
  const absl::StatusOr<WeightRoot> root = WeightRoot::Open("/sys/devices/system/cpu");
  if (!root.ok() || !root->OpenBeneath("online").ok()) GTEST_SKIP() << "no /sys/devices/system/cpu/online here";
  const auto update = scene.Start();
  ExpectError(ReadWeights(*root, "online", *update), absl::StatusCode::kDataLoss, "", {"\"online\"", "the file ends after"});
}

// Reading, not mapping: a file cut short between its header and its values is an error.
TEST(WeightFilesTest, FilesMayShrinkWhileTheyAreRead) {
  Scene scene;
  scene.Put("model.safetensors", scene.tensors);
  const std::string path = scene.root_path() + "/model.safetensors";
  const std::string good = SafetensorsBytes(scene.tensors);
  std::atomic<bool> stop{false};
  std::thread cutter([&] {
    while (!stop) {
      std::filesystem::resize_file(path, good.size() / 2);
      WriteFile(path, good);
    }
  });
  for (int i = 0; i < 200; ++i) {
    const auto update = scene.Start();
    const absl::Status status = ReadWeights(scene.root, ".", *update);
    if (status.ok()) continue;
    // Holes of a file that grows again are zeros: finite, but not JSON.
    EXPECT_TRUE(absl::IsDataLoss(status) || absl::IsInvalidArgument(status)) << status;
  }
  stop = true;
  cutter.join();
}

}  // namespace
}  // namespace bebop
