// SPDX-License-Identifier: Apache-2.0
#include "engine/weights/checkpoint.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "engine/formats/strings.h"
#include "tests/support/checkpoint_writer.h"

namespace bebop {
namespace {

constexpr char kSingle[] = "/model.safetensors";
constexpr char kIndex[] = "/model.safetensors.index.json";

ModelConfig SmallConfig(bool tied) { return ParseModelConfig(SmallConfigJson(tied)).value(); }

// A checkpoint that a case may spoil before it is written.
struct Fixture {
  explicit Fixture(bool tied = false, const std::string& dtype = "BF16") : config(SmallConfig(tied)) {
    tensors = MakeModelTensors(config, /*with_mtp=*/true, dtype, 1);
    options.path = directory.path();
    options.dtype = DType::kFloat32;
  }

  TestTensor& Find(const std::string& name) {
    const auto found = std::find_if(tensors.begin(), tensors.end(), [&](const TestTensor& tensor) { return tensor.name == name; });
    if (found == tensors.end()) std::abort();
    return *found;
  }
  void Erase(const std::string& prefix) {
    std::erase_if(tensors, [&](const TestTensor& tensor) { return tensor.name.starts_with(prefix); });
  }
  std::vector<TestTensor> Take(const std::string& prefix) {
    std::vector<TestTensor> taken;
    for (const TestTensor& tensor : tensors) {
      if (tensor.name.starts_with(prefix)) taken.push_back(tensor);
    }
    Erase(prefix);
    return taken;
  }
  void Write() { WriteFile(directory.path() + kSingle, SafetensorsBytes(tensors)); }
  // The tensors in two shards.
  void WriteShards() {
    const auto middle = tensors.begin() + static_cast<std::ptrdiff_t>(tensors.size() / 2);
    shards = {{"a.safetensors", {tensors.begin(), middle}}, {"b.safetensors", {middle, tensors.end()}}};
    for (const auto& [file, shard] : shards) WriteFile(directory.path() + "/" + file, SafetensorsBytes(shard));
    WriteFile(directory.path() + kIndex, IndexJson(shards));
  }
  absl::StatusOr<std::unique_ptr<ModelWeights>> Load() {
    ThreadPool pool(2);
    return LoadModelWeights(config, options, pool, MakeHostMemory().get());
  }

  TempDir directory;
  ModelConfig config;
  std::vector<TestTensor> tensors;
  std::vector<std::pair<std::string, std::vector<TestTensor>>> shards;
  LoadOptions options;
};

std::vector<float> Row(const PackedMatrix& matrix, int64_t row) {
  std::vector<float> values(static_cast<size_t>(matrix.cols));
  cpu::UnpackRow(matrix, row, values.data());
  return values;
}

float Expected(const TestTensor& tensor, int64_t index, DType dtype) {
  const float value = tensor.Value(index);
  return dtype == DType::kBFloat16 ? ToFloat(ToBFloat16(value)) : value;
}

void ExpectRows(const PackedMatrix& matrix, int64_t first_row, const TestTensor& tensor) {
  ASSERT_EQ(matrix.cols, tensor.shape[1]) << tensor.name;
  for (int64_t row = 0; row < tensor.shape[0]; ++row) {
    const std::vector<float> values = Row(matrix, first_row + row);
    for (int64_t col = 0; col < matrix.cols; ++col) {
      ASSERT_EQ(values[static_cast<size_t>(col)], Expected(tensor, row * matrix.cols + col, matrix.dtype)) << tensor.name << " " << row << " " << col;
    }
  }
}

void ExpectZeroRows(const PackedMatrix& matrix, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    for (const float value : Row(matrix, row)) ASSERT_EQ(value, 0.0f) << row;
  }
}

void ExpectValues(const float* values, const TestTensor& tensor) {
  ASSERT_NE(values, nullptr) << tensor.name;
  ASSERT_EQ(reinterpret_cast<uintptr_t>(values) % 64, 0u) << tensor.name;
  for (int64_t i = 0; i < tensor.num_elements(); ++i) ASSERT_EQ(values[i], tensor.Value(i)) << tensor.name << " " << i;
}

void ExpectFullLayer(const LayerWeights& layer, Fixture& fixture, const std::string& prefix) {
  ASSERT_TRUE(layer.full.has_value());
  ASSERT_FALSE(layer.linear.has_value());
  // head_dim 8: q_proj has 2*3*8 = 48 rows, k_proj and v_proj 8 of 16.
  EXPECT_EQ(layer.full->qkv.rows, 80);
  ExpectRows(layer.full->qkv, 0, fixture.Find(prefix + "self_attn.q_proj.weight"));
  ExpectRows(layer.full->qkv, 48, fixture.Find(prefix + "self_attn.k_proj.weight"));
  ExpectZeroRows(layer.full->qkv, 56, 64);
  ExpectRows(layer.full->qkv, 64, fixture.Find(prefix + "self_attn.v_proj.weight"));
  ExpectZeroRows(layer.full->qkv, 72, 80);
  ExpectRows(layer.full->out, 0, fixture.Find(prefix + "self_attn.o_proj.weight"));
  ExpectValues(layer.full->q_norm, fixture.Find(prefix + "self_attn.q_norm.weight"));
  ExpectValues(layer.full->k_norm, fixture.Find(prefix + "self_attn.k_norm.weight"));
}

void ExpectCommon(const LayerWeights& layer, Fixture& fixture, const std::string& prefix) {
  ExpectValues(layer.input_norm, fixture.Find(prefix + "input_layernorm.weight"));
  ExpectValues(layer.post_attention_norm, fixture.Find(prefix + "post_attention_layernorm.weight"));
  EXPECT_EQ(layer.mlp.gate_up.rows, 64);  // 24 rows each, padded to 32
  ExpectRows(layer.mlp.gate_up, 0, fixture.Find(prefix + "mlp.gate_proj.weight"));
  ExpectZeroRows(layer.mlp.gate_up, 24, 32);
  ExpectRows(layer.mlp.gate_up, 32, fixture.Find(prefix + "mlp.up_proj.weight"));
  ExpectRows(layer.mlp.down, 0, fixture.Find(prefix + "mlp.down_proj.weight"));
}

// Everything in `weights` is what the fixture's tensors (under `prefix`) say.
void ExpectModel(const ModelWeights& weights, Fixture& fixture, const std::string& prefix) {
  ExpectRows(weights.embedding, 0, fixture.Find(prefix + "embed_tokens.weight"));
  if (fixture.config.tie_word_embeddings) {
    EXPECT_EQ(weights.lm_head.data, weights.embedding.data);
  } else {
    EXPECT_NE(weights.lm_head.data, weights.embedding.data);
    ExpectRows(weights.lm_head, 0, fixture.Find("lm_head.weight"));
  }
  ExpectValues(weights.final_norm, fixture.Find(prefix + "norm.weight"));
  ASSERT_EQ(weights.layers.size(), 3u);
  for (int i = 0; i < 3; ++i) {
    const LayerWeights& layer = weights.layers[static_cast<size_t>(i)];
    const std::string name = StrCat(prefix, "layers.", i, ".");
    ExpectCommon(layer, fixture, name);
    if (i == 2) {
      ExpectFullLayer(layer, fixture, name);
      continue;
    }
    ASSERT_TRUE(layer.linear.has_value());
    ASSERT_FALSE(layer.full.has_value());
    // 26 channels, 18 values, 3 heads: segments at 0, 32, 64, 80, end 96.
    EXPECT_EQ(layer.linear->in.rows, 96);
    ExpectRows(layer.linear->in, 0, fixture.Find(name + "linear_attn.in_proj_qkv.weight"));
    ExpectZeroRows(layer.linear->in, 26, 32);
    ExpectRows(layer.linear->in, 32, fixture.Find(name + "linear_attn.in_proj_z.weight"));
    ExpectRows(layer.linear->in, 64, fixture.Find(name + "linear_attn.in_proj_b.weight"));
    ExpectRows(layer.linear->in, 80, fixture.Find(name + "linear_attn.in_proj_a.weight"));
    ExpectZeroRows(layer.linear->in, 83, 96);
    ExpectRows(layer.linear->out, 0, fixture.Find(name + "linear_attn.out_proj.weight"));
    ExpectValues(layer.linear->conv, fixture.Find(name + "linear_attn.conv1d.weight"));
    ExpectValues(layer.linear->a_log, fixture.Find(name + "linear_attn.A_log"));
    ExpectValues(layer.linear->dt_bias, fixture.Find(name + "linear_attn.dt_bias"));
    ExpectValues(layer.linear->norm, fixture.Find(name + "linear_attn.norm.weight"));
  }
}

void ExpectMtp(const ModelWeights& weights, Fixture& fixture) {
  ASSERT_TRUE(weights.mtp.has_value());
  ExpectValues(weights.mtp->pre_fc_norm_embedding, fixture.Find("mtp.pre_fc_norm_embedding.weight"));
  ExpectValues(weights.mtp->pre_fc_norm_hidden, fixture.Find("mtp.pre_fc_norm_hidden.weight"));
  ExpectRows(weights.mtp->fc, 0, fixture.Find("mtp.fc.weight"));
  ExpectCommon(weights.mtp->layer, fixture, "mtp.layers.0.");
  ExpectFullLayer(weights.mtp->layer, fixture, "mtp.layers.0.");
  ExpectValues(weights.mtp->norm, fixture.Find("mtp.norm.weight"));
}

TEST(CheckpointTest, EveryTensorArrivesInEveryTypeCombination) {
  for (const std::string source : {"BF16", "F32", "F16"}) {
    for (const DType destination : {DType::kFloat32, DType::kBFloat16}) {
      SCOPED_TRACE(source + " to " + DTypeName(destination));
      Fixture fixture(/*tied=*/source == "F32", source);
      fixture.options.dtype = destination;
      fixture.Write();
      const auto weights = fixture.Load();
      ASSERT_TRUE(weights.ok()) << weights.status();
      ExpectModel(**weights, fixture, "model.");
      ExpectMtp(**weights, fixture);
    }
  }
}

TEST(CheckpointTest, AccountsForItsBytes) {
  Fixture fixture;
  fixture.Write();
  const auto loaded = fixture.Load();
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  const ModelWeights& weights = **loaded;
  const int64_t table = PackedBytes(DType::kFloat32, 50, 40);
  EXPECT_EQ(weights.lm_head_bytes, table);
  EXPECT_EQ(weights.storage_bytes, 2 * table + weights.layer_bytes + weights.mtp_bytes);
  EXPECT_GT(weights.layer_bytes, 2 * weights.mtp_bytes);
}

TEST(CheckpointTest, ReadsShardsAsOneFile) {
  Fixture fixture;
  fixture.WriteShards();
  const auto weights = fixture.Load();
  ASSERT_TRUE(weights.ok()) << weights.status();
  ExpectModel(**weights, fixture, "model.");
  ExpectMtp(**weights, fixture);
}

TEST(CheckpointTest, ReadsMultimodalNamesAndSkipsVision) {
  Fixture fixture;
  fixture.config.tensor_prefix = "model.language_model.";
  fixture.tensors = MakeModelTensors(fixture.config, true, "BF16", 2);
  fixture.tensors.push_back(MakeTensor("model.visual.blocks.0.attn.qkv.weight", "F32", {2}, {std::numeric_limits<float>::quiet_NaN(), 1}));
  fixture.Write();
  const auto weights = fixture.Load();
  ASSERT_TRUE(weights.ok()) << weights.status();
  ExpectModel(**weights, fixture, "model.language_model.");

  fixture.config.tensor_prefix = "model.";  // what config.json suggests does not matter
  EXPECT_TRUE(fixture.Load().ok());
}

TEST(CheckpointTest, ReadsMtpUnderModelPrefix) {
  Fixture fixture;
  for (TestTensor& tensor : fixture.tensors) {
    if (tensor.name.starts_with("mtp.")) tensor.name = "model." + tensor.name;
  }
  fixture.Write();
  const auto weights = fixture.Load();
  ASSERT_TRUE(weights.ok()) << weights.status();
  EXPECT_TRUE((*weights)->mtp.has_value());
}

TEST(CheckpointTest, MtpFileSuppliesOrReplacesTheLayer) {
  for (const bool replaces : {false, true}) {
    Fixture fixture;
    Fixture other;
    other.tensors = MakeModelTensors(other.config, true, "F32", 99);
    WriteFile(other.directory.path() + "/mtp.safetensors", SafetensorsBytes(other.Take("mtp.")));
    if (!replaces) fixture.Erase("mtp.");
    fixture.Write();
    fixture.options.mtp_path = other.directory.path() + "/mtp.safetensors";
    const auto weights = fixture.Load();
    ASSERT_TRUE(weights.ok()) << weights.status();
    ExpectModel(**weights, fixture, "model.");
    other.tensors = MakeModelTensors(other.config, true, "F32", 99);
    ExpectMtp(**weights, other);
  }
}

TEST(CheckpointTest, NoMtpTensorsAreFineWhenNothingNeedsThem) {
  Fixture fixture;
  fixture.Erase("mtp.");
  fixture.options.needs_mtp = false;
  fixture.Write();
  const auto weights = fixture.Load();
  ASSERT_TRUE(weights.ok()) << weights.status();
  EXPECT_FALSE((*weights)->mtp.has_value());
  EXPECT_EQ((*weights)->mtp_bytes, 0);
}

TEST(CheckpointTest, TiedCheckpointMayCarryACopy) {
  Fixture fixture(/*tied=*/true);
  TestTensor copy = fixture.Find("model.embed_tokens.weight");
  copy.name = "lm_head.weight";
  fixture.tensors.push_back(copy);
  fixture.Write();
  const auto weights = fixture.Load();
  ASSERT_TRUE(weights.ok()) << weights.status();
  EXPECT_EQ((*weights)->lm_head.data, (*weights)->embedding.data);
}

TEST(CheckpointTest, SingleFileWinsOverIndex) {
  Fixture fixture;
  fixture.Write();
  WriteFile(fixture.directory.path() + kIndex, "not json");
  EXPECT_TRUE(fixture.Load().ok());
}

TEST(CheckpointTest, UnalignedDataIsRead) {
  Fixture fixture;
  std::string bytes = SafetensorsBytes(fixture.tensors);
  // One more blank in the header moves every tensor by one byte.
  uint64_t header_bytes = static_cast<uint8_t>(bytes[0]) | static_cast<uint64_t>(static_cast<uint8_t>(bytes[1])) << 8;
  for (int shift = 0; shift < 2; ++shift) {
    bytes.insert(8 + header_bytes++, " ");
    bytes[0] = static_cast<char>(header_bytes & 255);
    bytes[1] = static_cast<char>(header_bytes >> 8 & 255);
    WriteFile(fixture.directory.path() + kSingle, bytes);
    const auto weights = fixture.Load();
    ASSERT_TRUE(weights.ok()) << weights.status();
    ExpectModel(**weights, fixture, "model.");
  }
}

// --- What is refused ---

struct BadCase {
  const char* name;
  std::function<void(Fixture&)> spoil;  // also writes the files
  absl::StatusCode code;
  std::vector<std::string> message;  // substrings, in any order
  bool by_header = true;             // CheckCheckpoint sees it, too
};

void PutBits(TestTensor& tensor, int64_t index, uint32_t bits, int bytes) {
  for (int i = 0; i < bytes; ++i) tensor.bytes[static_cast<size_t>(index * bytes + i)] = static_cast<char>(bits >> (8 * i));
}

std::vector<BadCase> BadCases() {
  using absl::StatusCode;
  const auto spoil_and_write = [](const std::function<void(Fixture&)>& spoil) {
    return [spoil](Fixture& fixture) {
      spoil(fixture);
      fixture.Write();
    };
  };
  std::vector<BadCase> cases = {
      {"NoFolder", [](Fixture& f) { f.options.path += "/none"; }, StatusCode::kNotFound, {"/none", "model.safetensors"}},
      {"EmptyFolder", [](Fixture&) {}, StatusCode::kNotFound, {"model.safetensors", "index.json"}},
      {"EmptyFile", [](Fixture& f) { WriteFile(f.directory.path() + kSingle, ""); }, StatusCode::kDataLoss, {"at least 8", "got 0"}},
      {"Truncated",
       [](Fixture& f) {
         const std::string bytes = SafetensorsBytes(f.tensors);
         WriteFile(f.directory.path() + kSingle, std::string_view(bytes).substr(0, bytes.size() - 1));
       },
       StatusCode::kDataLoss, {"mtp.pre_fc_norm_hidden.weight", "truncated"}},
      {"TrailingBytes", [](Fixture& f) { WriteFile(f.directory.path() + kSingle, SafetensorsBytes(f.tensors) + "x"); },
       StatusCode::kInvalidArgument, {"bytes of data"}},
      {"MissingNorm", spoil_and_write([](Fixture& f) { f.Erase("model.norm.weight"); }), StatusCode::kNotFound,
       {"model.norm.weight", "[40]", "nothing"}},
      {"MissingLmHead", spoil_and_write([](Fixture& f) { f.Erase("lm_head.weight"); }), StatusCode::kNotFound, {"lm_head.weight", "[50, 40]"}},
      {"MissingLayer", spoil_and_write([](Fixture& f) { f.Erase("model.layers.1."); }), StatusCode::kNotFound,
       {"model.layers.1.input_layernorm.weight", "more missing"}},
      {"MissingPartOfMtp", spoil_and_write([](Fixture& f) { f.Erase("mtp.norm.weight"); }), StatusCode::kNotFound, {"mtp.norm.weight"}},
      {"MissingMtp", spoil_and_write([](Fixture& f) { f.Erase("mtp."); }), StatusCode::kFailedPrecondition,
       {"mtp.*", "--mtp FILE", "--speculation off"}},
      {"MtpAgainstConfig", spoil_and_write([](Fixture& f) { f.config.num_mtp_layers = 0; }), StatusCode::kInvalidArgument,
       {"mtp.fc.weight", "mtp_num_hidden_layers 0"}},
      {"MissingPartOfMtpUnneeded", spoil_and_write([](Fixture& f) {
         f.Erase("mtp.fc");
         f.options.needs_mtp = false;
       }),
       StatusCode::kNotFound, {"mtp.fc.weight"}},
      {"Extra", spoil_and_write([](Fixture& f) { f.tensors.push_back(MakeTensor("model.extra", "F32", {1}, {0})); }), StatusCode::kInvalidArgument,
       {"model.extra", "unexpected", "F32 [1]"}},
      {"ExtraTopLevel", spoil_and_write([](Fixture& f) { f.tensors.push_back(MakeTensor("visual.x", "F32", {1}, {0})); }),
       StatusCode::kInvalidArgument, {"visual.x", "unexpected"}},
      {"ExtraBias", spoil_and_write([](Fixture& f) { f.tensors.push_back(MakeTensor("model.layers.2.self_attn.q_proj.bias", "F32", {1}, {0})); }),
       StatusCode::kInvalidArgument, {"q_proj.bias", "unexpected"}},
      {"ExtraLayer", spoil_and_write([](Fixture& f) { f.tensors.push_back(MakeTensor("model.layers.3.input_layernorm.weight", "F32", {1}, {0})); }),
       StatusCode::kInvalidArgument, {"model.layers.3.input_layernorm.weight"}},
      {"Misnamed", spoil_and_write([](Fixture& f) { f.Find("model.norm.weight").name = "model.Norm.weight"; }), StatusCode::kNotFound,
       {"model.norm.weight", "model.Norm.weight", "unexpected"}},
      {"Misshapen", spoil_and_write([](Fixture& f) { f.Find("model.layers.0.mlp.down_proj.weight").shape = {24, 40}; }), StatusCode::kInvalidArgument,
       {"model.layers.0.mlp.down_proj.weight", "[40, 24]", "[24, 40]"}},
      {"ConvWithoutMiddleDimension", spoil_and_write([](Fixture& f) { f.Find("model.layers.0.linear_attn.conv1d.weight").shape = {26, 3}; }),
       StatusCode::kInvalidArgument, {"conv1d.weight", "[26, 1, 3]", "[26, 3]"}},
      {"OtherVocabulary", spoil_and_write([](Fixture& f) { f.config.vocab_size = 51; }), StatusCode::kInvalidArgument,
       {"embed_tokens.weight", "[51, 40]", "[50, 40]"}},
      {"WrongType", spoil_and_write([](Fixture& f) {
         TestTensor& tensor = f.Find("model.norm.weight");
         tensor.dtype = "I16";
       }),
       StatusCode::kInvalidArgument, {"model.norm.weight", "BF16", "I16"}},
      {"QuantisedType", spoil_and_write([](Fixture& f) {
         TestTensor& tensor = f.Find("lm_head.weight");
         tensor.dtype = "F8_E4M3";
         tensor.bytes.resize(tensor.bytes.size() / 2);
       }),
       StatusCode::kInvalidArgument, {"lm_head.weight", "F8_E4M3"}},
      {"BothPrefixes", spoil_and_write([](Fixture& f) {
         TestTensor twin = f.Find("model.norm.weight");
         twin.name = "model.language_model.norm.weight";
         f.tensors.push_back(twin);
       }),
       StatusCode::kInvalidArgument, {"model.language_model.norm.weight", "model.norm.weight", "already"}},
      {"MtpUnderBothPrefixes", spoil_and_write([](Fixture& f) {
         TestTensor twin = f.Find("mtp.norm.weight");
         twin.name = "model.mtp.norm.weight";
         f.tensors.push_back(twin);
       }),
       StatusCode::kInvalidArgument, {"model.mtp.norm.weight", "already"}},
      {"MtpFileMissing", spoil_and_write([](Fixture& f) { f.options.mtp_path = f.directory.path() + "/none.safetensors"; }), StatusCode::kNotFound,
       {"none.safetensors"}},
      {"MtpFileWithOtherTensors", spoil_and_write([](Fixture& f) {
         f.options.mtp_path = f.directory.path() + "/mtp.safetensors";
         WriteFile(f.options.mtp_path, SafetensorsBytes({f.Find("mtp.norm.weight"), f.Find("model.norm.weight")}));
       }),
       StatusCode::kInvalidArgument, {"mtp.safetensors", "model.norm.weight", "only mtp.*"}},
      {"MtpFileIncomplete", spoil_and_write([](Fixture& f) {
         f.options.mtp_path = f.directory.path() + "/mtp.safetensors";
         WriteFile(f.options.mtp_path, SafetensorsBytes({f.Find("mtp.norm.weight")}));
       }),
       StatusCode::kNotFound, {"mtp.safetensors", "mtp.pre_fc_norm_embedding.weight"}},
      {"MtpFileEmpty", spoil_and_write([](Fixture& f) {
         f.options.mtp_path = f.directory.path() + "/mtp.safetensors";
         WriteFile(f.options.mtp_path, SafetensorsBytes(std::vector<TestTensor>{}));
       }),
       StatusCode::kInvalidArgument, {"mtp.safetensors", "got none"}},
      // Shards.
      {"ShardMissing", [](Fixture& f) {
         f.WriteShards();
         if (std::remove((f.directory.path() + "/b.safetensors").c_str()) != 0) std::abort();
       },
       StatusCode::kNotFound, {"b.safetensors"}},
      {"ShardLacksTensor", [](Fixture& f) {
         f.WriteShards();
         f.shards[1].second.pop_back();
         WriteFile(f.directory.path() + "/b.safetensors", SafetensorsBytes(f.shards[1].second));
       },
       StatusCode::kNotFound, {"b.safetensors", "mtp.pre_fc_norm_hidden.weight", "index.json"}},
      {"ShardHasTensorOfOther", [](Fixture& f) {
         f.WriteShards();
         f.shards[1].second.push_back(f.shards[0].second[0]);
         WriteFile(f.directory.path() + "/b.safetensors", SafetensorsBytes(f.shards[1].second));
       },
       StatusCode::kInvalidArgument, {"b.safetensors", "lm_head.weight", "a.safetensors"}},
      {"ShardHasUnlistedTensor", [](Fixture& f) {
         f.WriteShards();
         f.shards[0].second.push_back(MakeTensor("stray", "F32", {1}, {0}));
         WriteFile(f.directory.path() + "/a.safetensors", SafetensorsBytes(f.shards[0].second));
       },
       StatusCode::kInvalidArgument, {"a.safetensors", "stray", "no file"}},
      {"IndexNotJson", [](Fixture& f) { WriteFile(f.directory.path() + kIndex, "{"); }, StatusCode::kInvalidArgument, {"index.json", "JSON"}},
      {"IndexWithoutMap", [](Fixture& f) { WriteFile(f.directory.path() + kIndex, "{\"metadata\":{}}"); }, StatusCode::kInvalidArgument,
       {"weight_map", "nothing"}},
      {"IndexLeavesFolder", [](Fixture& f) { WriteFile(f.directory.path() + kIndex, R"({"weight_map":{"w":"../a.safetensors"}})"); },
       StatusCode::kInvalidArgument, {"\"w\"", "../a.safetensors"}},
      {"IndexTensorTwice", [](Fixture& f) { WriteFile(f.directory.path() + kIndex, R"({"weight_map":{"w":"a","w":"b"}})"); },
       StatusCode::kInvalidArgument, {"duplicate key \"w\""}},
      // Values.
      {"NaN", spoil_and_write([](Fixture& f) { PutBits(f.Find("model.layers.1.mlp.up_proj.weight"), 77, 0x7FC0, 2); }), StatusCode::kInvalidArgument,
       {"model.layers.1.mlp.up_proj.weight", "element 77", "nan", "finite"}, false},
      {"MinusInfinity", spoil_and_write([](Fixture& f) { PutBits(f.Find("model.embed_tokens.weight"), 1999, 0xFF80, 2); }),
       StatusCode::kInvalidArgument, {"model.embed_tokens.weight", "element 1999", "inf"}, false},
      {"NaNInVector", spoil_and_write([](Fixture& f) { PutBits(f.Find("model.layers.0.linear_attn.A_log"), 2, 0x7FFF, 2); }),
       StatusCode::kInvalidArgument, {"linear_attn.A_log", "element 2"}, false},
      {"NaNInMtp", spoil_and_write([](Fixture& f) { PutBits(f.Find("mtp.fc.weight"), 0, 0xFFC1, 2); }), StatusCode::kInvalidArgument,
       {"mtp.fc.weight", "element 0"}, false},
      {"NaNFloat", spoil_and_write([](Fixture& f) {
         TestTensor& tensor = f.Find("model.norm.weight");
         tensor = MakeTensor(tensor.name, "F32", tensor.shape, std::vector<float>(40, 1.0f));
         PutBits(tensor, 39, 0x7F800001, 4);
       }),
       StatusCode::kInvalidArgument, {"model.norm.weight", "element 39", "nan"}, false},
      {"InfinityHalf", spoil_and_write([](Fixture& f) {
         TestTensor& tensor = f.Find("model.norm.weight");
         tensor.dtype = "F16";
         PutBits(tensor, 5, 0xFC00, 2);
       }),
       StatusCode::kInvalidArgument, {"model.norm.weight", "element 5", "inf"}, false},
      {"OverflowsBFloat16", spoil_and_write([](Fixture& f) {
         f.options.dtype = DType::kBFloat16;
         TestTensor& tensor = f.Find("lm_head.weight");
         tensor = MakeTensor(tensor.name, "F32", tensor.shape, std::vector<float>(2000, 1.0f));
         PutBits(tensor, 3, 0x7F7F8000, 4);  // rounds to infinity; one bit less does not
       }),
       StatusCode::kInvalidArgument, {"lm_head.weight", "element 3", "bfloat16"}, false},
  };
  return cases;
}

TEST(CheckpointTest, RefusesBadCheckpoints) {
  const std::vector<BadCase> cases = BadCases();
  EXPECT_GE(cases.size(), 40u);
  for (const BadCase& bad : cases) {
    SCOPED_TRACE(bad.name);
    Fixture fixture;
    bad.spoil(fixture);
    const absl::Status status = fixture.Load().status();
    EXPECT_EQ(status.code(), bad.code) << status;
    const std::string message(status.message());
    for (const std::string& part : bad.message) EXPECT_NE(message.find(part), std::string::npos) << "no " << part << " in: " << message;
    EXPECT_NE(message.find(fixture.directory.path()), std::string::npos) << "no file in: " << message;
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
    EXPECT_EQ(CheckCheckpoint(fixture.config, fixture.options).code(), bad.by_header ? bad.code : absl::StatusCode::kOk);
  }
}

TEST(CheckpointTest, LargestFloatThatFitsBFloat16IsRead) {
  Fixture fixture;
  fixture.options.dtype = DType::kBFloat16;
  TestTensor& tensor = fixture.Find("lm_head.weight");
  tensor = MakeTensor(tensor.name, "F32", tensor.shape, std::vector<float>(2000, 1.0f));
  PutBits(tensor, 3, 0x7F7F7FFF, 4);
  fixture.Write();
  EXPECT_TRUE(fixture.Load().ok());
}

TEST(CheckpointTest, RefusesAnotherLmHeadUnderTying) {
  Fixture fixture(/*tied=*/true);
  TestTensor head = fixture.Find("model.embed_tokens.weight");
  head.name = "lm_head.weight";
  head.bytes[0] ^= 1;
  fixture.tensors.push_back(head);
  fixture.Write();
  const absl::Status status = fixture.Load().status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("lm_head.weight"), absl::string_view::npos) << status;
  EXPECT_NE(status.message().find("tie_word_embeddings"), absl::string_view::npos) << status;
}

TEST(CheckpointTest, FirstBadTensorIsNamedWhateverTheThreads) {
  Fixture fixture;
  PutBits(fixture.Find("model.layers.0.mlp.gate_proj.weight"), 3, 0x7FC0, 2);
  PutBits(fixture.Find("model.layers.2.mlp.gate_proj.weight"), 3, 0x7FC0, 2);
  PutBits(fixture.Find("mtp.norm.weight"), 3, 0x7FC0, 2);
  fixture.Write();
  for (const int num_threads : {1, 2, 7}) {
    ThreadPool pool(num_threads);
    const absl::Status status = LoadModelWeights(fixture.config, fixture.options, pool, MakeHostMemory().get()).status();
    EXPECT_NE(status.message().find("layers.0.mlp.gate_proj"), absl::string_view::npos) << status;
  }
}

}  // namespace
}  // namespace bebop
