// SPDX-License-Identifier: Apache-2.0
#include "engine/training/training_checkpoint.h"

#include <dirent.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <set>
#include <string>
#include <vector>

#include "engine/formats/file.h"
#include "engine/formats/strings.h"
#include "engine/weights/checkpoint.h"
#include "tests/support/checkpoint_writer.h"

namespace {

// What the program's changes to files meet: the calls below stand in for the C library's.
struct Faults {
  int until_kill = -1;      // calls that go through before the process is killed in the next one; < 0: never
  bool half_write = false;  // that one is a write that gets half its bytes out
  int until_error = -1;     // calls that go through before all of `failing` fail with `error`; < 0: never
  int error = 0;
  std::string failing = {};  // "write", "fsync" or "rename"
};
Faults faults;
// The calls of this process, in order; equal ones in a row once.
std::vector<std::string> calls;

// True: the call fails with errno set.
bool Meet(const char* name) {
  if (calls.empty() || calls.back() != name) calls.push_back(name);
  if (faults.until_kill >= 0 && faults.until_kill-- == 0) syscall(SYS_kill, getpid(), SIGKILL);
  if (faults.until_error < 0 || faults.failing != name) return false;
  if (faults.until_error > 0) {
    --faults.until_error;
    return false;
  }
  errno = faults.error;
  return true;
}

}  // namespace

extern "C" {
ssize_t write(int descriptor, const void* bytes, size_t count) {
  if (descriptor <= 2) return syscall(SYS_write, descriptor, bytes, count);  // of the test itself
  if (faults.half_write && faults.until_kill == 0) syscall(SYS_write, descriptor, bytes, count / 2);
  if (Meet("write")) return -1;
  return syscall(SYS_write, descriptor, bytes, std::min<size_t>(count, 16384));  // short, as a write may be
}
// Only counted: a kill does not show whether it was done, and it is slow.
int fsync(int descriptor) { return Meet("fsync") || fcntl(descriptor, F_GETFD) < 0 ? -1 : 0; }
int rename(const char* from, const char* to) noexcept {
  return Meet("rename") ? -1 : static_cast<int>(syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0));
}
int mkdir(const char* path, mode_t mode) noexcept {
  return Meet("mkdir") ? -1 : static_cast<int>(syscall(SYS_mkdirat, AT_FDCWD, path, mode));
}
int unlinkat(int folder, const char* path, int flags) noexcept {
  return Meet("unlinkat") ? -1 : static_cast<int>(syscall(SYS_unlinkat, folder, path, flags));
}
int unlink(const char* path) noexcept { return Meet("unlink") ? -1 : static_cast<int>(syscall(SYS_unlinkat, AT_FDCWD, path, 0)); }
}

namespace bebop {
namespace {

const std::map<std::string, std::string> kIdentity = {{"loss", "e2e_tv"}, {"lr", "0.001"}};

class TrainingCheckpointTest : public testing::Test {
 protected:
  TrainingCheckpointTest()
      : config_(ParseModelConfig(SmallConfigJson(/*tied=*/true)).value()), layout_(config_), runs_(folder_.path() + "/run") {}
  void TearDown() override { faults = {}; }

  // Numbers that tell which step they are of.
  TrainingProgress Progress(int64_t step) const {
    TrainingProgress progress;
    progress.state.step = step;
    progress.epoch = step / 3;
    progress.batch = step % 3;
    progress.tokens = 1000 * step;
    progress.seconds = 0.1 * static_cast<double>(step);
    progress.identity = kIdentity;
    for (std::vector<float>* values : {&progress.state.parameters, &progress.state.first_moment, &progress.state.second_moment}) {
      values->assign(static_cast<size_t>(layout_.total), 0.0f);
      // Padding stays zero, as the trainer leaves it.
      for (const MtpTensor& tensor : layout_.tensors) {
        for (int64_t i = tensor.offset; i < tensor.offset + tensor.size(); ++i)
          (*values)[static_cast<size_t>(i)] = std::sin(static_cast<float>(i + 31 * step));
      }
      step += 1000;
    }
    return progress;
  }
  void ExpectEqual(const TrainingProgress& actual, const TrainingProgress& expected) const {
    EXPECT_EQ(actual.state.step, expected.state.step);
    EXPECT_EQ(actual.state.parameters, expected.state.parameters);
    EXPECT_EQ(actual.state.first_moment, expected.state.first_moment);
    EXPECT_EQ(actual.state.second_moment, expected.state.second_moment);
    EXPECT_EQ(actual.epoch, expected.epoch);
    EXPECT_EQ(actual.batch, expected.batch);
    EXPECT_EQ(actual.tokens, expected.tokens);
    EXPECT_EQ(actual.seconds, expected.seconds);
    EXPECT_EQ(actual.identity, expected.identity);
  }
  // The step that a resumed run would begin from; -1: none. Its numbers are those that were saved.
  int64_t Newest() const {
    const auto loaded = TrainingCheckpoints(runs_).Load(layout_, kIdentity);
    EXPECT_TRUE(loaded.ok()) << loaded.status();
    if (!loaded.ok() || !loaded->has_value()) return -1;
    ExpectEqual(**loaded, Progress((*loaded)->state.step));
    return (*loaded)->state.step;
  }
  std::set<std::string> Entries(const std::string& path) const {
    std::set<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(path)) names.insert(entry.path().filename());
    return names;
  }
  void Spoil(const std::string& path, std::streamoff at) {
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    file.seekg(at);
    const char byte = static_cast<char>(file.get() ^ 1);
    file.seekp(at);
    file.put(byte);
    ASSERT_TRUE(file.good());
  }

  const TempDir folder_;
  const ModelConfig config_;
  const MtpLayout layout_;
  const std::string runs_;
};

TEST_F(TrainingCheckpointTest, LoadsWhatWasSavedAndKeepsTwo) {
  TrainingCheckpoints checkpoints(runs_);
  EXPECT_EQ(Newest(), -1);
  EXPECT_EQ(checkpoints.Newest().value(), -1);
  for (const int64_t step : {0, 9, 10, 100}) {
    ASSERT_TRUE(checkpoints.Save(Progress(step), layout_).ok());
    EXPECT_EQ(Newest(), step);
    EXPECT_EQ(checkpoints.Newest().value(), step);
  }
  EXPECT_EQ(Entries(runs_), (std::set<std::string>{"step-10", "step-100"}));
  EXPECT_EQ(Entries(checkpoints.PathOf(100)), (std::set<std::string>{"mtp.safetensors", "optimizer.safetensors", "state.json"}));
  ASSERT_TRUE(checkpoints.Remove().ok());
  EXPECT_FALSE(FileExists(runs_));
  EXPECT_TRUE(checkpoints.Remove().ok());
}

// Power may fail at any time, too: bytes are on the disk before the name that promises them, and the name before Save returns.
TEST_F(TrainingCheckpointTest, SyncsInOrder) {
  calls.clear();
  ASSERT_TRUE(TrainingCheckpoints(runs_).Save(Progress(1), layout_).ok());
  // Parent; three files; the folder among them ("fsync" of the last file and the folder are one here); its name.
  EXPECT_EQ(calls, (std::vector<std::string>{"mkdir", "fsync", "mkdir", "write", "fsync", "write", "fsync", "write", "fsync",
                                             "rename", "fsync"}));
  calls.clear();
  ASSERT_TRUE(WriteMtpFile(folder_.path() + "/out", layout_, Progress(1).state.parameters, DType::kFloat32).ok());
  EXPECT_EQ(calls, (std::vector<std::string>{"write", "fsync", "rename", "fsync"}));
}

TEST_F(TrainingCheckpointTest, RemoveLeavesWhatIsNotItsOwn) {
  TrainingCheckpoints checkpoints(runs_);
  ASSERT_TRUE(checkpoints.Save(Progress(1), layout_).ok());
  const std::set<std::string> others = {"notes.txt", "step-+5", "step-05", "step-7.old", "step-draft.tmp", "step-.tmp"};
  for (const std::string& name : others) WriteFile(StrCat(runs_, "/", name), "mine");
  EXPECT_EQ(checkpoints.Newest().value_or(-2), 1);
  ASSERT_TRUE(checkpoints.Save(Progress(2), layout_).ok());
  ASSERT_TRUE(checkpoints.Remove().ok());
  EXPECT_EQ(Entries(runs_), others);
}

TEST_F(TrainingCheckpointTest, AnotherRunsCheckpointIsRefusedWithBothValues) {
  TrainingCheckpoints checkpoints(runs_);
  ASSERT_TRUE(checkpoints.Save(Progress(4), layout_).ok());
  const auto expect = [&](const std::map<std::string, std::string>& identity, const std::string& part) {
    const auto loaded = checkpoints.Load(layout_, identity);
    EXPECT_EQ(loaded.status().code(), absl::StatusCode::kFailedPrecondition) << loaded.status();
    EXPECT_NE(loaded.status().message().find(part), std::string::npos) << loaded.status();
  };
  expect({{"loss", "ce"}, {"lr", "0.001"}}, "/step-4: loss: the run that was stopped had e2e_tv, this one has ce");
  expect({{"loss", "ce"}, {"lr", "1"}}, "loss: ");  // the first one
  expect({{"loss", "e2e_tv"}}, "lr: the run that was stopped had 0.001, this one has nothing");
  expect({{"loss", "e2e_tv"}, {"lr", "0.001"}, {"seed", "1"}}, "seed: the run that was stopped had nothing, this one has 1");
}

TEST_F(TrainingCheckpointTest, DamageIsSeenAndTheOlderOneTaken) {
  TrainingCheckpoints checkpoints(runs_);
  for (const std::string file : {"mtp.safetensors", "optimizer.safetensors", "state.json"}) {
    ASSERT_TRUE(checkpoints.Save(Progress(1), layout_).ok());
    ASSERT_TRUE(checkpoints.Save(Progress(2), layout_).ok());
    const std::string path = checkpoints.PathOf(2) + "/" + file;
    // The last byte: of a value, or of the JSON.
    Spoil(path, static_cast<std::streamoff>(std::filesystem::file_size(path)) - 2);
    EXPECT_EQ(Newest(), 1) << file;
    ASSERT_TRUE(checkpoints.Save(Progress(2), layout_).ok());  // in place of the damaged one
    EXPECT_EQ(Newest(), 2);
    std::filesystem::remove(path);
    EXPECT_EQ(Newest(), 1) << file;
    std::filesystem::resize_file(checkpoints.PathOf(1) + "/" + file, 5);
    const auto none = checkpoints.Load(layout_, kIdentity);
    EXPECT_FALSE(none.ok());
    EXPECT_NE(none.status().message().find("step-2/"), std::string::npos) << none.status();
    ASSERT_TRUE(checkpoints.Remove().ok());
  }
}

// A process is killed at every call that changes a file, and in the middle of every write: what is loaded afterwards is a whole
// checkpoint, the newest that Save had returned for or the one after it.
TEST_F(TrainingCheckpointTest, KillsLeaveAWholeCheckpoint) {
  for (const bool half_write : {false, true}) {
    bool finished = false;
    int kills = 0, behind = 0;
    for (int calls = 0; !finished; ++calls) {
      ASSERT_LT(calls, 2000);
      std::filesystem::remove_all(runs_);
      ASSERT_TRUE(TrainingCheckpoints(runs_).Save(Progress(1), layout_).ok());
      int done[2];
      ASSERT_EQ(pipe(done), 0);
      const pid_t child = fork();
      if (child == 0) {
        faults = {.until_kill = calls, .half_write = half_write};
        for (const int64_t step : {2, 3, 4}) {
          if (!TrainingCheckpoints(runs_).Save(Progress(step), layout_).ok()) _exit(1);
          const char byte = static_cast<char>(step);
          syscall(SYS_write, done[1], &byte, 1);
        }
        _exit(0);
      }
      close(done[1]);
      int64_t saved = 1;
      char byte = 0;
      while (read(done[0], &byte, 1) == 1) saved = byte;
      close(done[0]);
      int status = 0;
      ASSERT_EQ(waitpid(child, &status, 0), child);
      finished = WIFEXITED(status);
      if (finished) {
        ASSERT_EQ(WEXITSTATUS(status), 0);
        ASSERT_EQ(saved, 4);
      }
      const int64_t newest = Newest();
      EXPECT_GE(newest, saved) << "killed at call " << calls;
      EXPECT_LE(newest, saved + 1) << "killed at call " << calls;
      behind += newest == saved;
      kills += !finished;
      // What has the name of a checkpoint is one: nothing is filled, or emptied, under it.
      for (const std::string& name : Entries(runs_)) {
        if (!name.ends_with(".tmp")) {
          EXPECT_EQ(Entries(runs_ + "/" + name).size(), 3u) << name << ", killed at call " << calls;
        }
      }
      // The next run goes on where this one was killed.
      ASSERT_TRUE(TrainingCheckpoints(runs_).Save(Progress(5), layout_).ok());
      EXPECT_EQ(Newest(), 5);
      for (const std::string& name : Entries(runs_)) EXPECT_TRUE(name.find('.') == std::string::npos) << name;
    }
    EXPECT_GT(kills, 60);  // three checkpoints of three files
    EXPECT_GT(behind, 40);
  }
}

TEST_F(TrainingCheckpointTest, FailuresKeepTheLastCheckpointAndLeaveNoRest) {
  TrainingCheckpoints checkpoints(runs_);
  ASSERT_TRUE(checkpoints.Save(Progress(1), layout_).ok());
  struct Case {
    const char* failing;
    int error;
    absl::StatusCode code;
  };
  for (const Case& test :
       {Case{"write", ENOSPC, absl::StatusCode::kResourceExhausted}, Case{"write", EDQUOT, absl::StatusCode::kResourceExhausted},
        Case{"fsync", ENOSPC, absl::StatusCode::kResourceExhausted}, Case{"write", EFBIG, absl::StatusCode::kResourceExhausted},
        Case{"rename", EACCES, absl::StatusCode::kPermissionDenied},
        Case{"mkdir", EACCES, absl::StatusCode::kPermissionDenied}}) {
    for (const int until : {0, 1, 3, 7}) {
      if (until > 0 && (std::string(test.failing) == "rename" || std::string(test.failing) == "mkdir")) continue;
      if (until > 5 && std::string(test.failing) == "fsync") continue;  // a checkpoint has 6, the folders' included
      faults = {.until_error = until, .error = test.error, .failing = test.failing};
      const absl::Status status = checkpoints.Save(Progress(2), layout_);
      faults = {};
      EXPECT_EQ(status.code(), test.code) << test.failing << " " << until << ": " << status;
      EXPECT_NE(status.message().find(folder_.path()), std::string::npos) << status;
      EXPECT_EQ(Newest(), 1) << test.failing << " " << until;
      EXPECT_EQ(Entries(runs_), (std::set<std::string>{"step-1"})) << test.failing << " " << until;
    }
  }
  ASSERT_TRUE(checkpoints.Save(Progress(2), layout_).ok());
  EXPECT_EQ(Newest(), 2);
}

// The kernel itself refuses, in a process that may not write files beyond a size.
TEST_F(TrainingCheckpointTest, FullDisk) {
  ASSERT_TRUE(TrainingCheckpoints(runs_).Save(Progress(1), layout_).ok());
  const std::string out = folder_.path() + "/out.safetensors";
  WriteFile(out, "old");
  const pid_t child = fork();
  if (child == 0) {
    signal(SIGXFSZ, SIG_IGN);
    const rlimit limit = {.rlim_cur = 8192, .rlim_max = 8192};
    if (setrlimit(RLIMIT_FSIZE, &limit) != 0) _exit(1);
    if (!absl::IsResourceExhausted(TrainingCheckpoints(runs_).Save(Progress(2), layout_))) _exit(2);
    if (!absl::IsResourceExhausted(WriteMtpFile(out, layout_, Progress(2).state.parameters, DType::kFloat32))) _exit(3);
    _exit(0);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 0);
  EXPECT_EQ(Newest(), 1);
  EXPECT_EQ(MappedFile::Open(out)->bytes(), "old");
  EXPECT_EQ(Entries(folder_.path()), (std::set<std::string>{"run", "out.safetensors"}));
}

TEST_F(TrainingCheckpointTest, FoldersThatCannotBe) {
  EXPECT_EQ(TrainingCheckpoints(folder_.path() + "/none/run").Save(Progress(1), layout_).code(), absl::StatusCode::kNotFound);
  WriteFile(folder_.path() + "/file", "");
  EXPECT_FALSE(TrainingCheckpoints(folder_.path() + "/file").Save(Progress(1), layout_).ok());
}

// --- The trained file ---

class MtpFileTest : public TrainingCheckpointTest {
 protected:
  MtpFileTest() : out_(folder_.path() + "/mtp.safetensors"), model_(folder_.path() + "/model") {
    std::filesystem::create_directory(model_);
    tensors_ = MakeModelTensors(config_, /*with_mtp=*/true, "BF16", 1);
  }
  void WriteModel(const std::vector<TestTensor>& tensors) { WriteFile(model_ + "/model.safetensors", SafetensorsBytes(tensors)); }
  std::vector<TestTensor> Select(bool mtp) const {
    std::vector<TestTensor> selected;
    std::copy_if(tensors_.begin(), tensors_.end(), std::back_inserter(selected),
                 [mtp](const TestTensor& tensor) { return (tensor.name.find("mtp.") != std::string::npos) == mtp; });
    return selected;
  }
  TestTensor& Find(const std::string& name) {
    return *std::find_if(tensors_.begin(), tensors_.end(), [&](const TestTensor& tensor) { return tensor.name == name; });
  }
  absl::StatusOr<std::unique_ptr<ModelWeights>> Load(const std::string& mtp_path, DType dtype) {
    ThreadPool pool(1);
    LoadOptions options;
    options.path = model_;
    options.mtp_path = mtp_path;
    options.dtype = dtype;
    return LoadModelWeights(config_, options, pool, MakeHostMemory().get());
  }

  const std::string out_, model_;
  std::vector<TestTensor> tensors_;
};

// The loader that serves is the judge of names, shapes and values.
TEST_F(MtpFileTest, LoadsInPlaceOfTheCheckpointsTensors) {
  WriteModel(Select(/*mtp=*/false));
  const std::vector<float> parameters = Progress(1).state.parameters;
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    ASSERT_TRUE(WriteMtpFile(out_, layout_, parameters, dtype).ok());
    EXPECT_EQ(MtpFileType(out_).value(), dtype);
    const auto weights = Load(out_, dtype);
    ASSERT_TRUE(weights.ok()) << weights.status();
    const auto rounded = [dtype](float value) { return dtype == DType::kFloat32 ? value : ToFloat(ToBFloat16(value)); };
    std::vector<float> row(static_cast<size_t>(2 * config_.hidden_size));
    cpu::UnpackRow((*weights)->mtp->fc, 3, row.data());
    for (size_t i = 0; i < row.size(); ++i)
      EXPECT_EQ(row[i], rounded(parameters[static_cast<size_t>(layout_.fc) + 3 * row.size() + i]));
    row.resize(static_cast<size_t>(config_.intermediate_size));
    cpu::UnpackRow((*weights)->mtp->layer.mlp.down, 5, row.data());
    for (size_t i = 0; i < row.size(); ++i)
      EXPECT_EQ(row[i], rounded(parameters[static_cast<size_t>(layout_.down) + 5 * row.size() + i]));
    for (int64_t i = 0; i < config_.hidden_size; ++i) {
      EXPECT_EQ((*weights)->mtp->norm[i], rounded(parameters[static_cast<size_t>(layout_.norm + i)]));
    }
    const auto again = ReadMtpParameters(out_, config_, layout_);
    ASSERT_TRUE(again.ok()) << again.status();
    for (size_t i = 0; i < parameters.size(); ++i) ASSERT_EQ((*again)[i], rounded(parameters[i])) << i;
  }
  EXPECT_EQ(Entries(folder_.path()), (std::set<std::string>{"model", "mtp.safetensors"}));
  // So is the head within a training checkpoint.
  TrainingCheckpoints checkpoints(runs_);
  ASSERT_TRUE(checkpoints.Save(Progress(7), layout_).ok());
  EXPECT_TRUE(Load(checkpoints.PathOf(7) + "/mtp.safetensors", DType::kBFloat16).ok());
}

TEST_F(MtpFileTest, ReadsCheckpointFoldersFilesAndShards) {
  const auto expect_values = [&](const absl::StatusOr<std::vector<float>>& flat) {
    ASSERT_TRUE(flat.ok()) << flat.status();
    for (const MtpTensor& tensor : layout_.tensors) {
      const TestTensor& expected = Find(tensor.name);
      for (int64_t i = 0; i < tensor.size(); ++i)
        ASSERT_EQ((*flat)[static_cast<size_t>(tensor.offset + i)], expected.Value(i)) << tensor.name << " " << i;
    }
  };
  for (const std::string dtype : {"F32", "BF16", "F16"}) {
    tensors_ = MakeModelTensors(config_, /*with_mtp=*/true, dtype, 2);
    WriteModel(tensors_);
    expect_values(ReadMtpParameters(model_, config_, layout_));
    EXPECT_EQ(MtpFileType(model_).value(), dtype == "BF16" ? DType::kBFloat16 : DType::kFloat32);
    WriteFile(out_, SafetensorsBytes(Select(/*mtp=*/true)));
    expect_values(ReadMtpParameters(out_, config_, layout_));
  }
  std::filesystem::remove(model_ + "/model.safetensors");
  const std::vector<std::pair<std::string, std::vector<TestTensor>>> shards = {{"a.safetensors", Select(false)},
                                                                               {"b.safetensors", Select(true)}};
  for (const auto& [file, shard] : shards) WriteFile(model_ + "/" + file, SafetensorsBytes(shard));
  WriteFile(model_ + "/model.safetensors.index.json", IndexJson(shards));
  expect_values(ReadMtpParameters(model_, config_, layout_));
  // The other spelling.
  std::vector<TestTensor> spelled = Select(true);
  for (TestTensor& tensor : spelled) tensor.name = "model." + tensor.name;
  WriteFile(out_, SafetensorsBytes(spelled));
  expect_values(ReadMtpParameters(out_, config_, layout_));
}

TEST_F(MtpFileTest, BadFilesAreNamed) {
  const auto expect = [&](const std::string& path, absl::StatusCode code, const std::string& part) {
    const auto flat = ReadMtpParameters(path, config_, layout_);
    EXPECT_EQ(flat.status().code(), code) << flat.status();
    EXPECT_NE(flat.status().message().find(part), std::string::npos) << flat.status() << "\nexpected " << part;
    EXPECT_NE(flat.status().message().find(path), std::string::npos) << flat.status();
  };
  WriteModel(Select(false));
  EXPECT_EQ(MtpFileType(model_).value(), std::nullopt);
  expect(model_, absl::StatusCode::kFailedPrecondition,
         "expected mtp.* tensors to begin from, got none: give them with --mtp FILE, or begin from random "
         "ones with --init-mtp");
  expect(folder_.path(), absl::StatusCode::kNotFound, "expected model.safetensors or model.safetensors.index.json, got neither");
  expect(folder_.path() + "/none", absl::StatusCode::kNotFound, "");
  expect(model_ + "/model.safetensors", absl::StatusCode::kInvalidArgument, "expected only mtp.* tensors in this file");
  const std::vector<TestTensor> good = Select(true);
  const auto expect_spoiled = [&](absl::StatusCode code, const std::string& part,
                                  const std::function<void(std::vector<TestTensor>&)>& spoil) {
    std::vector<TestTensor> tensors = good;
    spoil(tensors);
    WriteFile(out_, SafetensorsBytes(tensors));
    expect(out_, code, part);
  };
  const auto index_of = [&](const std::string& name) {
    return static_cast<size_t>(
        std::find_if(good.begin(), good.end(), [&](const TestTensor& tensor) { return tensor.name == name; }) - good.begin());
  };
  const size_t fc = index_of("mtp.fc.weight"), norm = index_of("mtp.norm.weight");
  const int64_t hidden = config_.hidden_size;
  expect_spoiled(absl::StatusCode::kNotFound, StrCat("tensor \"mtp.norm.weight\": expected [", hidden, "], got nothing"),
                 [&](auto& tensors) { tensors.erase(tensors.begin() + static_cast<std::ptrdiff_t>(norm)); });
  expect_spoiled(absl::StatusCode::kNotFound, "(and 14 more missing)", [&](auto& tensors) {
    tensors.resize(1), tensors[0] = good[fc];
    tensors[0].name = "mtp.cf";
  });
  expect_spoiled(absl::StatusCode::kInvalidArgument, "tensor \"mtp.extra\": unexpected, got F32 [1]",
                 [&](auto& tensors) { tensors.push_back(MakeTensor("mtp.extra", "F32", {1}, {1.0f})); });
  expect_spoiled(absl::StatusCode::kInvalidArgument, StrCat("tensor \"mtp.norm.weight\": expected shape [", hidden, "], got [1]"),
                 [&](auto& tensors) { tensors[norm] = MakeTensor("mtp.norm.weight", "F32", {1}, {1.0f}); });
  expect_spoiled(absl::StatusCode::kInvalidArgument, "tensor \"mtp.norm.weight\": expected type BF16, F32 or F16, got I32",
                 [&](auto& tensors) {
                   tensors[norm] =
                       MakeTensor("mtp.norm.weight", "F32", {hidden}, std::vector<float>(static_cast<size_t>(hidden)));
                   tensors[norm].dtype = "I32";
                 });
  expect_spoiled(absl::StatusCode::kInvalidArgument, "tensor \"mtp.norm.weight\": element 2: expected a finite value, got inf",
                 [&](auto& tensors) {
                   std::vector<float> values(static_cast<size_t>(hidden));
                   values[2] = INFINITY;
                   tensors[norm] = MakeTensor("mtp.norm.weight", "BF16", {hidden}, values);
                 });
  expect_spoiled(absl::StatusCode::kInvalidArgument, "already given as", [&](auto& tensors) {
    tensors.push_back(good[norm]);
    tensors.back().name = "model.mtp.norm.weight";
  });
  WriteFile(out_, SafetensorsBytes(good).substr(0, 5000));
  expect(out_, absl::StatusCode::kDataLoss, "");
  ModelConfig without = config_;
  without.num_mtp_layers = 0;
  EXPECT_EQ(ReadMtpParameters(out_, without, layout_).status().message(),
            "config.json: mtp_num_hidden_layers: expected 1 to train the MTP layer, got 0");
}

TEST_F(MtpFileTest, WritesWholeOrNotAtAll) {
  const std::vector<float> old_values = Progress(1).state.parameters, new_values = Progress(2).state.parameters;
  bool finished = false;
  for (int calls = 0; !finished; ++calls) {
    ASSERT_LT(calls, 200);
    ASSERT_TRUE(WriteMtpFile(out_, layout_, old_values, DType::kFloat32).ok());
    const pid_t child = fork();
    if (child == 0) {
      faults = {.until_kill = calls, .half_write = true};
      _exit(WriteMtpFile(out_, layout_, new_values, DType::kFloat32).ok() ? 0 : 1);
    }
    int status = 0;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    finished = WIFEXITED(status);
    const auto values = ReadMtpParameters(out_, config_, layout_);
    ASSERT_TRUE(values.ok()) << "killed at call " << calls << ": " << values.status();
    EXPECT_TRUE(*values == new_values || (!finished && *values == old_values));
  }
}

TEST_F(MtpFileTest, PlacesThatCannotBeWritten) {
  EXPECT_TRUE(CheckWritable(out_).ok());
  EXPECT_FALSE(FileExists(out_));
  EXPECT_EQ(Entries(folder_.path()), (std::set<std::string>{"model"}));
  WriteFile(out_ + ".tmp", "somebody's");
  EXPECT_TRUE(CheckWritable(out_).ok());
  EXPECT_EQ(std::filesystem::file_size(out_ + ".tmp"), 10u);
  std::filesystem::remove(out_ + ".tmp");
  EXPECT_EQ(CheckWritable(model_).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(CheckWritable(folder_.path() + "/none/a.safetensors").code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(WriteMtpFile(folder_.path() + "/none/a.safetensors", layout_, Progress(1).state.parameters, DType::kFloat32).code(),
            absl::StatusCode::kNotFound);
  if (geteuid() == 0) return;  // root may write anywhere
  ASSERT_EQ(chmod(model_.c_str(), 0555), 0);
  EXPECT_EQ(CheckWritable(model_ + "/a.safetensors").code(), absl::StatusCode::kPermissionDenied);
  ASSERT_EQ(chmod(model_.c_str(), 0755), 0);
}

TEST_F(MtpFileTest, InitialParameters) {
  const std::vector<float> flat = InitMtpParameters(layout_, 5);
  EXPECT_EQ(flat, InitMtpParameters(layout_, 5));
  const std::vector<float> other = InitMtpParameters(layout_, 6);
  for (const MtpTensor& tensor : layout_.tensors) {
    const std::vector<float> values(flat.begin() + tensor.offset, flat.begin() + tensor.offset + tensor.size());
    if (tensor.is_vector) {
      EXPECT_EQ(values, std::vector<float>(values.size(), 0.0f)) << tensor.name;
      continue;
    }
    if (tensor.name == "mtp.fc.weight") {
      for (int64_t row = 0; row < tensor.rows; ++row) {
        for (int64_t col = 0; col < tensor.cols; ++col) {
          EXPECT_EQ(values[static_cast<size_t>(row * tensor.cols + col)], col % tensor.rows == row ? std::sqrt(0.5f) : 0.0f);
        }
      }
      continue;
    }
    EXPECT_FALSE(std::equal(values.begin(), values.end(), other.begin() + tensor.offset)) << tensor.name;
    const double expected = tensor.name.find("o_proj") != std::string::npos || tensor.name.find("down_proj") != std::string::npos
                                ? 0.02 * std::sqrt(0.5)
                                : 0.02;
    double sum = 0.0, squares = 0.0, fourth = 0.0;
    for (const float value : values) {
      sum += value;
      squares += static_cast<double>(value) * value;
      fourth += std::pow(static_cast<double>(value), 4);
    }
    const double count = static_cast<double>(values.size());
    EXPECT_NEAR(sum / count, 0.0, 5 * expected / std::sqrt(count)) << tensor.name;
    EXPECT_NEAR(squares / count, expected * expected, 5 * expected * expected * std::sqrt(2.0 / count)) << tensor.name;
    // Normal: the fourth moment is 3 σ⁴, with a standard error of √(96 / n) σ⁴.
    EXPECT_NEAR(fourth / count / std::pow(expected, 4), 3.0, 5 * std::sqrt(96.0 / count)) << tensor.name;
  }
}

}  // namespace
}  // namespace bebop
