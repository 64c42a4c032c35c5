// SPDX-License-Identifier: Apache-2.0
// Every request field at its boundaries: accepted, or refused with the code and the field's path.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "server/limits.h"
#include "server/status_details.h"
#include "tests/server/test_rules.h"

namespace bebop {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int32_t kMin = std::numeric_limits<int32_t>::min();
constexpr int32_t kMax = std::numeric_limits<int32_t>::max();

struct Case {
  std::string name;
  absl::Status status;
  std::string field;  // empty: accepted
  absl::StatusCode code = absl::StatusCode::kInvalidArgument;
};

// Collects cases; each is run at once.
class Table {
 public:
  using Edit = std::function<void(v1::GenerateRequest*)>;
  using Check = std::function<void(const GenerateRequest&)>;

  void Generate(const std::string& name, const Edit& edit, const std::string& field, const RequestRules& rules = SmallRules(),
                absl::StatusCode code = absl::StatusCode::kInvalidArgument) {
    v1::GenerateRequest message = ValidRequest();
    edit(&message);
    cases.push_back({name, ToEngine(message, rules, FixedContext()).status(), field, code});
  }
  void Score(const std::string& name, const std::function<void(v1::ScoreRequest*)>& edit, const std::string& field,
             const RequestRules& rules = SmallRules(), absl::StatusCode code = absl::StatusCode::kInvalidArgument) {
    v1::ScoreRequest message = ValidScore();
    edit(&message);
    cases.push_back({name, ToEngine(message, rules, FixedContext()).status(), field, code});
  }
  // One numeric field: values that pass and values that are refused under its name.
  template <typename T>
  void Number(const std::string& field, const std::vector<T>& good, const std::vector<T>& bad,
              const std::function<void(v1::GenerateRequest*, T)>& set) {
    for (const T value : good) Generate(absl::StrCat(field, "=", value), [&](v1::GenerateRequest* m) { set(m, value); }, "");
    for (const T value : bad) Generate(absl::StrCat(field, "=", value), [&](v1::GenerateRequest* m) { set(m, value); }, field);
  }
  template <typename T>
  void ScoreNumber(const std::string& field, const std::vector<T>& good, const std::vector<T>& bad,
                   const std::function<void(v1::ScoreRequest*, T)>& set) {
    for (const T value : good) Score(absl::StrCat("score ", field, "=", value), [&](v1::ScoreRequest* m) { set(m, value); }, "");
    for (const T value : bad) Score(absl::StrCat("score ", field, "=", value), [&](v1::ScoreRequest* m) { set(m, value); }, field);
  }

  void Expect() const {
    for (const Case& c : cases) {
      SCOPED_TRACE(c.name);
      if (c.field.empty()) {
        EXPECT_TRUE(c.status.ok()) << c.status;
        continue;
      }
      EXPECT_EQ(c.status.code(), c.code) << c.status;
      EXPECT_EQ(ErrorMetadata(c.status, "field"), c.field) << c.status;
      EXPECT_FALSE(ErrorReason(c.status).empty());
      if (ErrorReason(c.status) == "INVALID_FIELD") {
        EXPECT_FALSE(ErrorMetadata(c.status, "value").empty());
        EXPECT_FALSE(ErrorMetadata(c.status, "limit").empty());
      }
      EXPECT_LT(c.status.message().size(), 512u);  // it travels in metadata
    }
  }

  std::vector<Case> cases;
};

void SamplingCases(Table* table) {
  const float tiny = std::numeric_limits<float>::denorm_min();
  table->Number<float>("sampling.temperature", {0.0f, -0.0f, limits::kMinTemperature, 0.5f, 1.0f, 100.0f},
                       {-1.0f, -tiny, tiny, std::nextafter(limits::kMinTemperature, 0.0f), std::nextafter(100.0f, 200.0f), kNan, kInf, -kInf},
                       [](v1::GenerateRequest* m, float x) { m->mutable_sampling()->set_temperature(x); });
  table->Number<float>("sampling.top_p", {tiny, 0.1f, 1.0f}, {0.0f, -0.1f, std::nextafter(1.0f, 2.0f), 2.0f, kNan, kInf, -kInf},
                       [](v1::GenerateRequest* m, float x) { m->mutable_sampling()->set_top_p(x); });
  table->Number<int32_t>("sampling.top_k", {0, 1, 99, 100, kMax}, {-1, kMin},
                         [](v1::GenerateRequest* m, int32_t n) { m->mutable_sampling()->set_top_k(n); });
  table->Number<float>("sampling.min_p", {0.0f, tiny, 0.5f, 1.0f}, {-tiny, std::nextafter(1.0f, 2.0f), kNan, kInf, -kInf},
                       [](v1::GenerateRequest* m, float x) { m->mutable_sampling()->set_min_p(x); });
  table->Number<uint64_t>("sampling.seed", {0, 1, std::numeric_limits<uint64_t>::max()}, {},
                          [](v1::GenerateRequest* m, uint64_t n) { m->mutable_sampling()->set_seed(n); });
}

void StoppingCases(Table* table) {
  // Prompt 4, model length 64.
  table->Number<int32_t>("stopping.max_new_tokens", {1, 2, 59, 60}, {0, -1, 61, 64, kMax, kMin},
                         [](v1::GenerateRequest* m, int32_t n) { m->mutable_stopping()->set_max_new_tokens(n); });
  table->Number<int32_t>("stopping.min_new_tokens", {0, 1, 60}, {-1, 61, kMax, kMin},
                         [](v1::GenerateRequest* m, int32_t n) { m->mutable_stopping()->set_min_new_tokens(n); });
  table->Number<int32_t>("stopping.min_new_tokens", {0, 10}, {11}, [](v1::GenerateRequest* m, int32_t n) {
    m->mutable_stopping()->set_max_new_tokens(10);
    m->mutable_stopping()->set_min_new_tokens(n);
  });
  const auto stop_ids = [](int count) {
    return [count](v1::GenerateRequest* m) {
      for (int i = 0; i < count; ++i) m->mutable_stopping()->add_stop_token_ids(7);
    };
  };
  for (const int count : {0, 1, 255, 256}) table->Generate(absl::StrCat("stop ids x", count), stop_ids(count), "");
  for (const int count : {257, 1000}) table->Generate(absl::StrCat("stop ids x", count), stop_ids(count), "stopping.stop_token_ids");
  for (const uint32_t id : {0u, 99u}) {
    table->Generate(absl::StrCat("stop id ", id), [id](v1::GenerateRequest* m) { m->mutable_stopping()->add_stop_token_ids(id); }, "");
  }
  for (const uint32_t id : {100u, 0x80000000u, 0xFFFFFFFFu}) {
    table->Generate(absl::StrCat("stop id ", id),
                    [id](v1::GenerateRequest* m) {
                      m->mutable_stopping()->add_stop_token_ids(3);
                      m->mutable_stopping()->add_stop_token_ids(id);
                    },
                    "stopping.stop_token_ids[1]");
  }
  const auto stops = [](int count, size_t bytes) {
    return [count, bytes](v1::GenerateRequest* m) {
      for (int i = 0; i < count; ++i) m->mutable_stopping()->add_stop(std::string(bytes, 'x'));
    };
  };
  for (const int count : {1, 15, 16}) table->Generate(absl::StrCat("stops x", count), stops(count, 2), "");
  for (const int count : {17, 100}) table->Generate(absl::StrCat("stops x", count), stops(count, 2), "stopping.stop");
  for (const size_t bytes : {1u, 255u, 256u}) table->Generate(absl::StrCat("stop of ", bytes), stops(1, bytes), "");
  for (const size_t bytes : {0u, 257u, 5000u}) table->Generate(absl::StrCat("stop of ", bytes), stops(2, bytes), "stopping.stop[0]");
  RequestRules no_tokenizer = SmallRules();
  no_tokenizer.has_tokenizer = false;
  table->Generate("stop without tokenizer", stops(1, 2), "stopping.stop", no_tokenizer, absl::StatusCode::kFailedPrecondition);
  table->Generate("no stop without tokenizer", stops(0, 2), "", no_tokenizer);
}

void SpeculationCases(Table* table) {
  using Params = v1::SpeculationParams;
  for (const auto mode : {Params::UNSPECIFIED, Params::OFF, Params::TARGET_ONLY, Params::REJECTION, Params::COUPLED}) {
    table->Generate(absl::StrCat("mode ", mode), [mode](v1::GenerateRequest* m) { m->mutable_speculation()->set_mode(mode); }, "");
  }
  for (const int mode : {5, 99, -1}) {
    table->Generate(absl::StrCat("mode ", mode),
                    [mode](v1::GenerateRequest* m) { m->mutable_speculation()->set_mode(static_cast<Params::Mode>(mode)); }, "speculation.mode");
  }
  table->Number<int32_t>("speculation.num_draft_tokens", {0, 1, 5}, {-1, 6, 8, 9, kMax, kMin},
                         [](v1::GenerateRequest* m, int32_t n) { m->mutable_speculation()->set_num_draft_tokens(n); });
  table->Number<int32_t>("speculation.num_draft_tokens", {0, 5}, {-1, 6}, [](v1::GenerateRequest* m, int32_t n) {
    m->mutable_speculation()->set_mode(Params::OFF);
    m->mutable_speculation()->set_num_draft_tokens(n);
  });
  RequestRules wide = SmallRules();
  wide.max_draft_tokens = 100;  // the engine's own limit still holds
  table->Generate("8 drafts", [](v1::GenerateRequest* m) { m->mutable_speculation()->set_num_draft_tokens(8); }, "", wide);
  table->Generate("9 drafts", [](v1::GenerateRequest* m) { m->mutable_speculation()->set_num_draft_tokens(9); }, "speculation.num_draft_tokens", wide);
  table->Number<float>("speculation.synthetic_acceptance", {0.0f, 0.5f, 1.0f}, {-0.1f, std::nextafter(1.0f, 2.0f), kNan, kInf, -kInf},
                       [](v1::GenerateRequest* m, float x) { m->mutable_speculation()->set_synthetic_acceptance(x); });
  const auto synthetic_off = [](v1::GenerateRequest* m) {
    m->mutable_speculation()->set_synthetic_acceptance(0.5f);
    m->mutable_speculation()->set_mode(Params::OFF);
  };
  table->Generate("synthetic with OFF", synthetic_off, "speculation.synthetic_acceptance");
  RequestRules real = SmallRules();
  real.allow_synthetic_acceptance = false;
  table->Generate("synthetic on a real server", [](v1::GenerateRequest* m) { m->mutable_speculation()->set_synthetic_acceptance(0.5f); },
                  "speculation.synthetic_acceptance", real, absl::StatusCode::kFailedPrecondition);
  RequestRules no_mtp = SmallRules();
  no_mtp.has_mtp = false;
  no_mtp.default_mode = SpeculationMode::kOff;
  for (const auto mode : {Params::TARGET_ONLY, Params::REJECTION, Params::COUPLED}) {
    table->Generate(absl::StrCat("no MTP, mode ", mode), [mode](v1::GenerateRequest* m) { m->mutable_speculation()->set_mode(mode); },
                    "speculation.mode", no_mtp, absl::StatusCode::kUnimplemented);
  }
  table->Generate("no MTP, OFF", [](v1::GenerateRequest* m) { m->mutable_speculation()->set_mode(Params::OFF); }, "", no_mtp);
  table->Generate("no MTP, unset", [](v1::GenerateRequest*) {}, "", no_mtp);
}

void RequestCases(Table* table) {
  const auto prompt = [](int count, uint32_t last) {
    return [count, last](v1::GenerateRequest* m) {
      m->clear_prompt_token_ids();
      for (int i = 0; i < count; ++i) m->add_prompt_token_ids(i + 1 == count ? last : 1);
    };
  };
  for (const int count : {1, 2, 62, 63}) table->Generate(absl::StrCat("prompt of ", count), prompt(count, 5), "");
  for (const int count : {0, 64, 65, 5000}) table->Generate(absl::StrCat("prompt of ", count), prompt(count, 5), "prompt_token_ids");
  for (const uint32_t id : {0u, 99u}) table->Generate(absl::StrCat("prompt id ", id), prompt(3, id), "");
  for (const uint32_t id : {100u, 0x7FFFFFFFu, 0x80000000u, 0xFFFFFFFFu}) {
    table->Generate(absl::StrCat("prompt id ", id), prompt(3, id), "prompt_token_ids[2]");
  }
  table->Number<int32_t>("num_samples", {1, 2, 1023, 1024}, {0, -1, 1025, kMax, kMin},
                         [](v1::GenerateRequest* m, int32_t n) { m->set_num_samples(n); });
  table->Number<int32_t>("priority", {0, 1, -1, kMax, kMin}, {}, [](v1::GenerateRequest* m, int32_t n) { m->set_priority(n); });
  for (const std::string& id : {std::string("a"), std::string("A.z_0:9-"), std::string(64, 'x')}) {
    table->Generate(absl::StrCat("id ", id), [&id](v1::GenerateRequest* m) { m->set_request_id(id); }, "");
  }
  for (const std::string& id : {std::string(65, 'x'), std::string("a b"), std::string("a/b"), std::string("a\n"), std::string(1, '\0'),
                                std::string("\xC3\xA4"), std::string("a\x7F")}) {
    table->Generate(absl::StrCat("bad id of ", id.size()), [&id](v1::GenerateRequest* m) { m->set_request_id(id); }, "request_id");
  }
}

void ScoreCases(Table* table) {
  const auto sequences = [](int count, int length, uint32_t last) {
    return [count, length, last](v1::ScoreRequest* m) {
      m->clear_sequences();
      for (int i = 0; i < count; ++i) {
        auto* ids = m->add_sequences()->mutable_token_ids();
        for (int t = 0; t < length; ++t) ids->Add(t + 1 == length ? last : 1);
      }
    };
  };
  for (const int count : {1, 2, 1024}) table->Score(absl::StrCat("sequences x", count), sequences(count, 2, 1), "");
  for (const int count : {0, 1025}) table->Score(absl::StrCat("sequences x", count), sequences(count, 2, 1), "sequences");
  for (const int length : {1, 2, 63, 64}) table->Score(absl::StrCat("length ", length), sequences(1, length, 1), "");
  for (const int length : {0, 65}) table->Score(absl::StrCat("length ", length), sequences(2, length, 1), "sequences[0].token_ids");
  table->Score("id 99", sequences(1, 3, 99), "");
  for (const uint32_t id : {100u, 0xFFFFFFFFu}) table->Score(absl::StrCat("id ", id), sequences(2, 3, id), "sequences[0].token_ids[2]");
  RequestRules long_model = SmallRules();
  long_model.max_model_len = 1 << 21;
  table->Score("2^20 tokens", sequences(16, 1 << 16, 1), "", long_model);
  table->Score("2^20 + 16 tokens", sequences(16, (1 << 16) + 1, 1), "sequences", long_model);
  table->Score("reply of 88 MB",
               [&](v1::ScoreRequest* m) {
                 sequences(8, 1 << 16, 1)(m);
                 m->set_top_logprobs(20);
               },
               "sequences", long_model);
  table->ScoreNumber<int32_t>("score_start", {0, 1, 3}, {-1, 4, kMax, kMin}, [](v1::ScoreRequest* m, int32_t n) { m->set_score_start(n); });
  table->ScoreNumber<float>("temperature", {limits::kMinTemperature, 1.0f, 100.0f}, {0.0f, -1.0f, 101.0f, kNan, kInf},
                            [](v1::ScoreRequest* m, float x) { m->set_temperature(x); });
  table->ScoreNumber<int32_t>("top_logprobs", {0, 1, 20}, {-1, 21, kMax, kMin}, [](v1::ScoreRequest* m, int32_t n) { m->set_top_logprobs(n); });
  table->ScoreNumber<int32_t>("draft_depth", {0, 1, 5}, {-1, 6, 9, kMax, kMin}, [](v1::ScoreRequest* m, int32_t n) { m->set_draft_depth(n); });
  const auto asked = [](int count, uint32_t last) {
    return [count, last](v1::ScoreRequest* m) {
      for (int i = 0; i < count; ++i) m->add_token_ids_logprob(i + 1 == count ? last : 1);
    };
  };
  for (const int count : {0, 1, 1024}) table->Score(absl::StrCat("asked x", count), asked(count, 2), "");
  table->Score("asked x1025", asked(1025, 2), "token_ids_logprob");
  table->Score("asked id 100", asked(3, 100), "token_ids_logprob[2]");
  RequestRules no_mtp = SmallRules();
  no_mtp.has_mtp = false;
  table->Score("draft depth without MTP", [](v1::ScoreRequest* m) { m->set_draft_depth(1); }, "draft_depth", no_mtp,
               absl::StatusCode::kUnimplemented);
}

TEST(Validation, EveryFieldAtItsBoundaries) {
  Table table;
  SamplingCases(&table);
  StoppingCases(&table);
  SpeculationCases(&table);
  RequestCases(&table);
  ScoreCases(&table);
  EXPECT_GE(table.cases.size(), 150u);
  table.Expect();
}

TEST(Validation, AbortTokenizeDetokenize) {
  const RequestRules rules = SmallRules();
  RequestRules no_tokenizer = rules;
  no_tokenizer.has_tokenizer = false;

  v1::AbortRequest abort;
  EXPECT_EQ(ErrorMetadata(Validate(abort, rules), "field"), "request_ids");
  abort.add_request_ids("a");
  EXPECT_TRUE(Validate(abort, rules).ok());
  abort.add_request_ids("");
  EXPECT_EQ(ErrorMetadata(Validate(abort, rules), "field"), "request_ids[1]");
  abort.clear_request_ids();
  for (int i = 0; i < 1025; ++i) abort.add_request_ids("a");
  EXPECT_EQ(ErrorMetadata(Validate(abort, rules), "field"), "request_ids");

  v1::TokenizeRequest tokenize;
  EXPECT_TRUE(Validate(tokenize, rules).ok());
  tokenize.set_text(std::string(limits::kTokenizeBytes, 'x'));
  EXPECT_TRUE(Validate(tokenize, rules).ok());
  EXPECT_EQ(Validate(tokenize, no_tokenizer).code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(ErrorReason(Validate(tokenize, no_tokenizer)), "NO_TOKENIZER");
  tokenize.mutable_text()->push_back('x');
  EXPECT_EQ(ErrorMetadata(Validate(tokenize, rules), "field"), "text");

  v1::DetokenizeRequest detokenize;
  EXPECT_TRUE(Validate(detokenize, rules, 90).ok());
  detokenize.add_token_ids(99);  // the model's padding beyond the tokenizer's ids
  EXPECT_TRUE(Validate(detokenize, rules, 90).ok());
  detokenize.add_token_ids(100);
  EXPECT_TRUE(Validate(detokenize, rules, 101).ok());
  EXPECT_EQ(ErrorMetadata(Validate(detokenize, rules, 90), "field"), "token_ids[1]");
  EXPECT_EQ(ErrorReason(Validate(detokenize, no_tokenizer, 0)), "NO_TOKENIZER");
  detokenize.clear_token_ids();
  for (int64_t i = 0; i <= limits::kDetokenizeIds; ++i) detokenize.add_token_ids(1);
  EXPECT_EQ(ErrorMetadata(Validate(detokenize, rules, 90), "field"), "token_ids");
}

}  // namespace
}  // namespace bebop
