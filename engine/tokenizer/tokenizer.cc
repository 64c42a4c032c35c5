// SPDX-License-Identifier: Apache-2.0
#include "engine/tokenizer/tokenizer.h"

#include <algorithm>
#include <array>
#include <optional>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "engine/base/status_macros.h"
#include "engine/formats/file.h"
#include "engine/formats/json.h"
#include "engine/formats/strings.h"
#include "engine/tokenizer/added_tokens.h"
#include "engine/tokenizer/bpe.h"
#include "engine/tokenizer/nfc.h"
#include "engine/tokenizer/pre_tokenizer.h"
#include "engine/tokenizer/utf8.h"

namespace bebop {
namespace {

constexpr char kFile[] = "tokenizer.json";
constexpr JsonLimits kLimits = {.max_bytes = size_t{256} << 20, .max_depth = 64, .max_values = 8'000'000};
constexpr int64_t kMaxTokenId = (1 << 22) - 1;  // tables are indexed by id

// The printable stand-ins of bytes in the vocabulary of a byte-level BPE: bytes that print stand for themselves, the others take code
// points from U+0100 on, in order.
class ByteAlphabet {
 public:
  ByteAlphabet() {
    byte_of_.fill(-1);
    int32_t next = 0x100;
    for (int32_t byte = 0; byte < 256; ++byte) {
      const bool prints = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
      byte_of_[static_cast<size_t>(prints ? byte : next++)] = static_cast<int16_t>(byte);
    }
  }

  // The bytes that `token` spells; its own UTF-8 when a character of it is in no byte's place (as the `tokenizers` decoder does).
  std::string Bytes(std::string_view token, bool* is_spelled = nullptr) const {
    std::string bytes;
    for (size_t i = 0; i < token.size();) {
      const Utf8Char next = DecodeUtf8(token.substr(i));
      if (!next.valid || next.code_point >= byte_of_.size() || byte_of_[next.code_point] < 0) {
        if (is_spelled != nullptr) *is_spelled = false;
        return std::string(token);
      }
      bytes.push_back(static_cast<char>(byte_of_[next.code_point]));
      i += static_cast<size_t>(next.length);
    }
    if (is_spelled != nullptr) *is_spelled = true;
    return bytes;
  }

 private:
  std::array<int16_t, 0x144> byte_of_;  // 188 printing bytes, 68 others: the last stand-in is U+0143
};

// A member that must be absent, null, or one of the values that change nothing.
absl::Status ExpectNeutral(const JsonObject& object, std::string_view key, bool neutral, std::string_view expected) {
  return !object.Has(key) || neutral ? absl::OkStatus() : object.Unexpected(key, expected);
}

absl::Status ExpectFalse(const JsonObject& object, std::string_view key) {
  BEBOP_ASSIGN_OR_RETURN(const bool value, object.Boolean(key, false));
  return value ? object.Unexpected(key, "false (not implemented)") : absl::OkStatus();
}

// The steps of a component: itself, or the entries of a `Sequence` under `list_key`. Sequences do not nest.
absl::StatusOr<std::vector<JsonObject>> Steps(const JsonObject& root, std::string_view key, std::string_view list_key) {
  std::vector<JsonObject> steps;
  if (!root.Has(key)) return steps;
  BEBOP_ASSIGN_OR_RETURN(const JsonObject component, root.Object(key));
  BEBOP_ASSIGN_OR_RETURN(const std::string type, component.String("type"));
  if (type != "Sequence") {
    steps.push_back(component);
    return steps;
  }
  BEBOP_ASSIGN_OR_RETURN(const JsonValue::Array* entries, component.Array(list_key));
  for (size_t i = 0; i < entries->size(); ++i) {
    BEBOP_ASSIGN_OR_RETURN(const JsonObject step, JsonObject::Open((*entries)[i], kFile, StrCat(key, ".", list_key, "[", i, "].")));
    steps.push_back(step);
  }
  return steps;
}

absl::Status ExpectType(const JsonObject& step, std::string_view expected) {
  BEBOP_ASSIGN_OR_RETURN(const std::string type, step.String("type"));
  return type == expected ? absl::OkStatus() : step.Unexpected("type", StrCat(Quoted(expected), " (others are not implemented)"));
}

absl::StatusOr<bool> ReadNormalizer(const JsonObject& root) {
  BEBOP_ASSIGN_OR_RETURN(const std::vector<JsonObject> steps, Steps(root, "normalizer", "normalizers"));
  for (const JsonObject& step : steps) BEBOP_RETURN_IF_ERROR(ExpectType(step, "NFC"));
  return !steps.empty();
}

absl::StatusOr<std::unique_ptr<PreTokenizer>> ReadPreTokenizer(const JsonObject& root) {
  BEBOP_ASSIGN_OR_RETURN(const std::vector<JsonObject> steps, Steps(root, "pre_tokenizer", "pretokenizers"));
  if (steps.empty() || steps.size() > 2) return root.Unexpected("pre_tokenizer", "Split and ByteLevel, or ByteLevel");
  const JsonObject& byte_level = steps.back();
  BEBOP_RETURN_IF_ERROR(ExpectType(byte_level, "ByteLevel"));
  BEBOP_RETURN_IF_ERROR(ExpectFalse(byte_level, "add_prefix_space"));
  BEBOP_ASSIGN_OR_RETURN(const bool use_regex, byte_level.Boolean("use_regex", true));
  if (steps.size() == 1) {
    if (!use_regex) return byte_level.Unexpected("use_regex", "true without Split");
    return PreTokenizer::Create(PreTokenizer::kGpt2Pattern);
  }
  if (use_regex) return byte_level.Unexpected("use_regex", "false behind Split");
  const JsonObject& split = steps.front();
  BEBOP_RETURN_IF_ERROR(ExpectType(split, "Split"));
  BEBOP_RETURN_IF_ERROR(ExpectFalse(split, "invert"));
  BEBOP_ASSIGN_OR_RETURN(const std::string behavior, split.String("behavior"));
  if (behavior != "Isolated") return split.Unexpected("behavior", "\"Isolated\" (others are not implemented)");
  BEBOP_ASSIGN_OR_RETURN(const JsonObject pattern, split.Object("pattern"));
  BEBOP_ASSIGN_OR_RETURN(const std::string expression, pattern.String("Regex"));
  absl::StatusOr<std::unique_ptr<PreTokenizer>> pre_tokenizer = PreTokenizer::Create(expression);
  if (!pre_tokenizer.ok()) {
    return absl::InvalidArgumentError(StrCat(kFile, ": pre_tokenizer: ", pre_tokenizer.status().message()));
  }
  return pre_tokenizer;
}

// Components that would change ids or text and are not implemented.
absl::Status CheckOtherComponents(const JsonObject& root) {
  BEBOP_RETURN_IF_ERROR(ExpectNeutral(root, "truncation", false, "null (not implemented)"));
  BEBOP_RETURN_IF_ERROR(ExpectNeutral(root, "padding", false, "null (not implemented)"));
  BEBOP_ASSIGN_OR_RETURN(const std::vector<JsonObject> post, Steps(root, "post_processor", "processors"));
  for (const JsonObject& step : post) BEBOP_RETURN_IF_ERROR(ExpectType(step, "ByteLevel"));
  BEBOP_ASSIGN_OR_RETURN(const std::vector<JsonObject> decoders, Steps(root, "decoder", "decoders"));
  if (decoders.size() != 1) return root.Unexpected("decoder", "ByteLevel");
  return ExpectType(decoders.front(), "ByteLevel");
}

absl::Status CheckModelVariants(const JsonObject& model) {
  BEBOP_RETURN_IF_ERROR(ExpectType(model, "BPE"));
  BEBOP_ASSIGN_OR_RETURN(const double dropout, model.Number("dropout", 0.0, 1.0, 0.0));
  if (dropout != 0.0) return model.Unexpected("dropout", "0 (not implemented)");
  for (const std::string_view key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    BEBOP_ASSIGN_OR_RETURN(const std::string affix, model.String(key, ""));
    if (!affix.empty()) return model.Unexpected(key, "none (not implemented)");
  }
  // unk_token and fuse_unk need a character without token: there is none, every byte has one.
  return ExpectFalse(model, "byte_fallback");
}

// One entry of `merges`: "left right" or ["left", "right"].
std::optional<std::pair<std::string_view, std::string_view>> ReadMerge(const JsonValue& merge) {
  if (const std::string* text = merge.string()) {
    const size_t space = text->find(' ');
    if (space == std::string::npos || text->find(' ', space + 1) != std::string::npos) return std::nullopt;
    return std::pair(std::string_view(*text).substr(0, space), std::string_view(*text).substr(space + 1));
  }
  const JsonValue::Array* pair = merge.array();
  if (pair == nullptr || pair->size() != 2 || (*pair)[0].string() == nullptr || (*pair)[1].string() == nullptr) return std::nullopt;
  return std::pair(std::string_view(*(*pair)[0].string()), std::string_view(*(*pair)[1].string()));
}

}  // namespace

struct Tokenizer::Impl {
  bool normalizes = false;
  bool ignores_merges = false;
  std::unique_ptr<PreTokenizer> pre_tokenizer;
  std::unique_ptr<BpeMerges> merges;
  AddedTokens added;             // matched in the text as it is
  AddedTokens added_normalized;  // matched in the normalised text
  absl::flat_hash_map<std::string, uint32_t> whole_pieces;  // only with ignore_merges: token by its bytes
  std::vector<std::string> bytes;  // by id
  std::vector<bool> special;       // by id

  using Vocabulary = absl::flat_hash_map<std::string_view, uint32_t>;  // by spelling

  void SetToken(uint32_t id, std::string token_bytes, bool is_special) {
    if (bytes.size() <= id) {
      bytes.resize(id + size_t{1});
      special.resize(id + size_t{1});
    }
    bytes[id] = std::move(token_bytes);
    special[id] = is_special;
  }

  absl::StatusOr<Vocabulary> ReadVocabulary(const JsonObject& model, const ByteAlphabet& alphabet) {
    const JsonValue* vocab = model.Get("vocab");
    if (vocab == nullptr || vocab->object() == nullptr) return model.Unexpected("vocab", "an object");
    Vocabulary ids;
    ids.reserve(vocab->object()->size());
    absl::flat_hash_map<uint32_t, std::string_view> owners;
    owners.reserve(vocab->object()->size());
    for (const auto& [token, id] : *vocab->object()) {
      if (id.integer() == nullptr || *id.integer() < 0 || *id.integer() > kMaxTokenId) {
        return absl::InvalidArgumentError(
            StrCat(kFile, ": model.vocab.", Quoted(token), ": expected an id in [0, ", kMaxTokenId, "], got ", JsonValue::Describe(&id)));
      }
      const uint32_t token_id = static_cast<uint32_t>(*id.integer());
      const auto [owner, is_new] = owners.emplace(token_id, token);
      if (!is_new) {
        return absl::InvalidArgumentError(StrCat(kFile, ": model.vocab: expected one token with id ", token_id, ", got ", Quoted(owner->second), " and ", Quoted(token)));
      }
      ids.emplace(token, token_id);
      bool is_spelled = false;
      std::string spelled = alphabet.Bytes(token, &is_spelled);
      if (ignores_merges && is_spelled) whole_pieces.emplace(spelled, token_id);
      SetToken(token_id, std::move(spelled), false);
    }
    return ids;
  }

  absl::Status ReadModel(const JsonObject& model, const ByteAlphabet& alphabet, Vocabulary& ids) {
    BEBOP_RETURN_IF_ERROR(CheckModelVariants(model));
    BEBOP_ASSIGN_OR_RETURN(ignores_merges, model.Boolean("ignore_merges", false));
    BEBOP_ASSIGN_OR_RETURN(ids, ReadVocabulary(model, alphabet));

    std::array<uint32_t, 256> byte_tokens{};
    std::array<bool, 256> has_token{};
    for (const auto& [token, id] : ids) {
      bool is_spelled = false;
      const std::string spelled = alphabet.Bytes(token, &is_spelled);
      if (!is_spelled || spelled.size() != 1) continue;
      byte_tokens[static_cast<uint8_t>(spelled[0])] = id;
      has_token[static_cast<uint8_t>(spelled[0])] = true;
    }
    for (size_t byte = 0; byte < 256; ++byte) {
      if (!has_token[byte]) return absl::InvalidArgumentError(StrCat(kFile, ": model.vocab: expected a token for every byte, got none for byte ", byte));
    }

    BEBOP_ASSIGN_OR_RETURN(const JsonValue::Array* list, model.Array("merges"));
    merges = std::make_unique<BpeMerges>(byte_tokens);
    merges->Reserve(list->size());
    std::string joined;
    for (size_t i = 0; i < list->size(); ++i) {
      const JsonValue& entry = (*list)[i];
      const auto merge = ReadMerge(entry);
      const auto refuse = [&](std::string_view expected, std::string_view got) {
        return absl::InvalidArgumentError(StrCat(kFile, ": model.merges[", i, "]: expected ", expected, ", got ", got));
      };
      if (!merge) return refuse("two tokens", JsonValue::Describe(&entry));
      joined = StrCat(merge->first, merge->second);
      std::array<uint32_t, 3> token_ids{};
      const std::array<std::string_view, 3> tokens = {merge->first, merge->second, joined};
      for (size_t j = 0; j < tokens.size(); ++j) {
        const auto id = ids.find(tokens[j]);
        if (id == ids.end()) return refuse("tokens of the vocabulary", Quoted(tokens[j]));
        token_ids[j] = id->second;
      }
      merges->Add(token_ids[0], token_ids[1], static_cast<uint32_t>(i), token_ids[2]);
    }
    return absl::OkStatus();
  }

  absl::Status ReadAddedTokens(const JsonObject& root, const ByteAlphabet& alphabet, const Vocabulary& ids) {
    if (!root.Has("added_tokens")) return absl::OkStatus();
    BEBOP_ASSIGN_OR_RETURN(const JsonValue::Array* list, root.Array("added_tokens"));
    absl::flat_hash_map<std::string, uint32_t> seen;
    absl::flat_hash_map<uint32_t, std::string> owners;
    for (const auto& [token, id] : ids) owners.emplace(id, token);
    for (size_t i = 0; i < list->size(); ++i) {
      BEBOP_ASSIGN_OR_RETURN(const JsonObject entry, JsonObject::Open((*list)[i], kFile, StrCat("added_tokens[", i, "].")));
      BEBOP_ASSIGN_OR_RETURN(const int64_t id, entry.Integer("id", 0, kMaxTokenId));
      BEBOP_ASSIGN_OR_RETURN(const std::string content, entry.String("content"));
      BEBOP_ASSIGN_OR_RETURN(const bool is_special, entry.Boolean("special", false));
      BEBOP_ASSIGN_OR_RETURN(const bool is_normalized, entry.Boolean("normalized", !is_special));
      for (const std::string_view key : {"single_word", "lstrip", "rstrip"}) BEBOP_RETURN_IF_ERROR(ExpectFalse(entry, key));
      if (content.empty() || content.size() > AddedTokens::kMaxContentBytes) {
        return entry.Unexpected("content", StrCat("1 to ", AddedTokens::kMaxContentBytes, " bytes"));
      }
      const uint32_t token_id = static_cast<uint32_t>(id);
      if (!seen.emplace(content, token_id).second) return entry.Unexpected("content", "no token twice");
      const auto [owner, is_new] = owners.emplace(token_id, content);
      if (!is_new && owner->second != content) return entry.Unexpected("id", StrCat("an id that ", Quoted(owner->second), " does not have"));
      if (const auto known = ids.find(content); known != ids.end() && known->second != token_id) {
        return entry.Unexpected("id", StrCat("the id ", known->second, " that the vocabulary gives ", Quoted(content)));
      }
      SetToken(token_id, alphabet.Bytes(content), is_special);
      const bool in_normalized = normalizes && is_normalized;
      (in_normalized ? added_normalized : added).Add(in_normalized ? NormalizeNfc(content) : content, token_id, is_special);
    }
    return absl::OkStatus();
  }

  absl::Status Read(std::string_view json) {
    BEBOP_ASSIGN_OR_RETURN(const JsonValue root_value, ParseJson(json, kFile, kLimits));
    BEBOP_ASSIGN_OR_RETURN(const JsonObject root, JsonObject::Open(root_value, kFile));
    BEBOP_RETURN_IF_ERROR(CheckOtherComponents(root));
    BEBOP_ASSIGN_OR_RETURN(normalizes, ReadNormalizer(root));
    BEBOP_ASSIGN_OR_RETURN(pre_tokenizer, ReadPreTokenizer(root));
    const ByteAlphabet alphabet;
    Vocabulary ids;
    BEBOP_ASSIGN_OR_RETURN(const JsonObject model, root.Object("model"));
    BEBOP_RETURN_IF_ERROR(ReadModel(model, alphabet, ids));
    return ReadAddedTokens(root, alphabet, ids);
  }

  // Text between added tokens, normalised.
  void EncodePieces(std::string_view text, BpeMerges::Scratch& scratch, std::vector<uint32_t>& token_ids) const {
    for (size_t begin = 0; begin < text.size();) {
      const std::string_view piece = text.substr(begin, pre_tokenizer->PieceLength(text, begin));
      begin += piece.size();
      if (ignores_merges) {
        if (const auto whole = whole_pieces.find(absl::string_view(piece.data(), piece.size())); whole != whole_pieces.end()) {
          token_ids.push_back(whole->second);
          continue;
        }
      }
      merges->Encode(piece, scratch, token_ids);
    }
  }
};

Tokenizer::Tokenizer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::~Tokenizer() = default;

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::FromJson(std::string_view json) {
  auto impl = std::make_unique<Impl>();
  BEBOP_RETURN_IF_ERROR(impl->Read(json));
  return std::unique_ptr<Tokenizer>(new Tokenizer(std::move(impl)));
}

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::FromFile(const std::string& path) {
  BEBOP_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(path));
  absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer = FromJson(file.bytes());
  if (tokenizer.ok()) return tokenizer;
  return absl::Status(tokenizer.status().code(), StrCat(path, ": ", tokenizer.status().message()));
}

std::vector<uint32_t> Tokenizer::Encode(std::string_view text, bool parse_special) const {
  std::string valid;
  valid.reserve(text.size());
  AppendReplacingInvalid(text, /*hold_back=*/false, valid);

  std::vector<uint32_t> token_ids;
  BpeMerges::Scratch scratch;
  const auto encode_normalized = [&](std::string_view part) { impl_->EncodePieces(part, scratch, token_ids); };
  const auto take_token = [&](uint32_t token_id) { token_ids.push_back(token_id); };
  const auto encode_raw = [&](std::string_view part) {
    if (!impl_->normalizes) {
      encode_normalized(part);
      return;
    }
    impl_->added_normalized.Split(NormalizeNfc(part), parse_special, encode_normalized, take_token);
  };
  impl_->added.Split(valid, parse_special, encode_raw, take_token);
  return token_ids;
}

std::string Tokenizer::DecodeBytes(std::span<const uint32_t> token_ids, bool skip_special) const {
  std::string bytes;
  for (const uint32_t token_id : token_ids) {
    if (!skip_special || !IsSpecial(token_id)) bytes += TokenBytes(token_id);
  }
  return bytes;
}

std::string Tokenizer::Decode(std::span<const uint32_t> token_ids, bool skip_special) const {
  std::string text;
  AppendReplacingInvalid(DecodeBytes(token_ids, skip_special), /*hold_back=*/false, text);
  return text;
}

std::string_view Tokenizer::TokenBytes(uint32_t token_id) const {
  return token_id < impl_->bytes.size() ? std::string_view(impl_->bytes[token_id]) : std::string_view();
}

bool Tokenizer::IsSpecial(uint32_t token_id) const { return token_id < impl_->special.size() && impl_->special[token_id]; }

int32_t Tokenizer::vocab_size() const { return static_cast<int32_t>(impl_->bytes.size()); }

IncrementalDecoder::IncrementalDecoder(const Tokenizer* tokenizer, bool skip_special) : tokenizer_(tokenizer), skip_special_(skip_special) {}

std::string IncrementalDecoder::Push(uint32_t token_id) {
  std::string text;
  if (skip_special_ && tokenizer_->IsSpecial(token_id)) return text;
  pending_ += tokenizer_->TokenBytes(token_id);
  pending_.erase(0, AppendReplacingInvalid(pending_, /*hold_back=*/true, text));
  return text;
}

std::string IncrementalDecoder::Finish() {
  std::string text;
  AppendReplacingInvalid(pending_, /*hold_back=*/false, text);
  pending_.clear();
  return text;
}

}  // namespace bebop
