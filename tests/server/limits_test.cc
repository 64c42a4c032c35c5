// SPDX-License-Identifier: Apache-2.0
#include "server/limits.h"

#include <gtest/gtest.h>

#include <fstream>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "bebop/v1/control.pb.h"
#include "bebop/v1/info.pb.h"
#include "bebop/v1/rollout.pb.h"
#include "bebop/v1/weights.pb.h"

namespace bebop {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::FileDescriptor;

void AddMessages(const Descriptor* message, std::map<std::string, const Descriptor*>* messages) {
  EXPECT_TRUE(messages->emplace(message->name(), message).second) << message->name() << " is there twice; rows name messages without scope";
  for (int i = 0; i < message->nested_type_count(); ++i) AddMessages(message->nested_type(i), messages);
}

std::vector<const FileDescriptor*> AllFiles() {
  return {v1::GenerateRequest::descriptor()->file(), v1::ServerInfo::descriptor()->file(), v1::ControlState::descriptor()->file(),
          v1::WeightInfo::descriptor()->file()};
}

std::map<std::string, const Descriptor*> AllMessages() {
  std::map<std::string, const Descriptor*> messages;
  for (const FileDescriptor* file : AllFiles()) {
    for (int i = 0; i < file->message_type_count(); ++i) AddMessages(file->message_type(i), &messages);
  }
  return messages;
}

// Messages that a client sends: the inputs of all methods and what they contain.
void AddReachable(const Descriptor* message, std::set<const Descriptor*>* reachable) {
  if (!reachable->insert(message).second) return;
  for (int i = 0; i < message->field_count(); ++i) {
    if (message->field(i)->message_type() != nullptr) AddReachable(message->field(i)->message_type(), reachable);
  }
}

TEST(Limits, EverySizedFieldHasARow) {
  std::set<std::string> rows;
  for (const SizeLimit& row : SizeLimits()) {
    EXPECT_TRUE(rows.insert(std::string(row.field)).second) << row.field << " twice";
    EXPECT_TRUE(row.max > 0 || !row.rule.empty()) << row.field;
  }
  std::set<std::string> sized;
  for (const auto& [name, message] : AllMessages()) {
    for (int i = 0; i < message->field_count(); ++i) {
      const FieldDescriptor* field = message->field(i);
      const bool is_bytes = field->type() == FieldDescriptor::TYPE_STRING || field->type() == FieldDescriptor::TYPE_BYTES;
      if (field->is_repeated() || is_bytes) sized.insert(name + "." + field->name());
    }
  }
  EXPECT_EQ(rows, sized);
}

TEST(Limits, EveryNumberInARequestHasARow) {
  std::set<std::string> rows;
  for (const NumberLimit& row : NumberLimits()) {
    EXPECT_TRUE(rows.insert(std::string(row.field)).second) << row.field << " twice";
    EXPECT_FALSE(row.range.empty());
  }
  std::set<const Descriptor*> reachable;
  for (const FileDescriptor* file : AllFiles()) {
    for (int s = 0; s < file->service_count(); ++s) {
      for (int m = 0; m < file->service(s)->method_count(); ++m) AddReachable(file->service(s)->method(m)->input_type(), &reachable);
    }
  }
  std::set<std::string> numbers;
  for (const Descriptor* message : reachable) {
    for (int i = 0; i < message->field_count(); ++i) {
      const FieldDescriptor* field = message->field(i);
      const bool is_number = field->cpp_type() != FieldDescriptor::CPPTYPE_MESSAGE && field->cpp_type() != FieldDescriptor::CPPTYPE_STRING &&
                             field->cpp_type() != FieldDescriptor::CPPTYPE_BOOL;
      if (is_number && !field->is_repeated()) numbers.insert(message->name() + "." + field->name());
    }
  }
  EXPECT_EQ(rows, numbers);
}

// api.md "Conventions": counts, indexes and positions of requests are int32, token ids uint32, enums start with UNSPECIFIED.
TEST(Limits, WireTypesFollowTheConventions) {
  for (const auto& [name, message] : AllMessages()) {
    for (int i = 0; i < message->enum_type_count(); ++i) {
      EXPECT_EQ(message->enum_type(i)->FindValueByNumber(0)->name(), "UNSPECIFIED") << name;
    }
    for (int i = 0; i < message->field_count(); ++i) {
      const FieldDescriptor* field = message->field(i);
      if (field->type() == FieldDescriptor::TYPE_UINT32) {
        EXPECT_NE(field->name().find("token_id"), std::string::npos) << name << "." << field->name();
      }
      if (field->type() == FieldDescriptor::TYPE_UINT64) {
        EXPECT_NE(field->name().find("seed"), std::string::npos) << field->name();
      }
    }
  }
  const FileDescriptor* file = v1::GenerateRequest::descriptor()->file();
  EXPECT_EQ(file->enum_type_count(), 0) << "enums are nested in their message";
}

TEST(Limits, DocumentMatchesTheTable) {
  std::ifstream file("docs/limits.md");  // tests run in the source tree
  std::stringstream text;
  text << file.rdbuf();
  if (text.str() == LimitsMarkdown()) return;
  const std::string fresh = ::testing::TempDir() + "/limits.md";
  std::ofstream(fresh) << LimitsMarkdown();
  ADD_FAILURE() << "docs/limits.md is not what server/limits.cc says; copy " << fresh << " over it";
}

}  // namespace
}  // namespace bebop
