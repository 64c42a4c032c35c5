// SPDX-License-Identifier: Apache-2.0
#include "server/access.h"

#include <errno.h>
#include <openssl/crypto.h>
#include <string.h>
#include <sys/stat.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <map>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "engine/base/logging.h"
#include "server/status_details.h"

namespace bebop {
namespace {

constexpr int64_t kMaxFileBytes = 1 << 20;
constexpr size_t kMinTokenBytes = 16;
constexpr size_t kMaxTokenBytes = 512;

constexpr uint32_t Bit(Role role) { return 1u << static_cast<uint32_t>(role); }
constexpr uint32_t kRollout = Bit(Role::kRollout);
constexpr uint32_t kWeights = Bit(Role::kWeights);
constexpr uint32_t kAdmin = Bit(Role::kAdmin);
constexpr uint32_t kAny = kRollout | kWeights | kAdmin;

constexpr std::pair<absl::string_view, uint32_t> kRoleNames[] = {{"rollout", kRollout}, {"weights", kWeights}, {"admin", kAdmin}};

// Every method there is, and who may call it besides admins.
const std::map<absl::string_view, uint32_t>& RolesByMethod() {
  static const auto* const roles = new std::map<absl::string_view, uint32_t>({
      {"bebop.v1.Rollout.Generate", kRollout},
      {"bebop.v1.Rollout.GenerateStream", kRollout},
      {"bebop.v1.Rollout.Score", kRollout},
      {"bebop.v1.Rollout.Abort", kRollout},
      {"bebop.v1.Info.GetServerInfo", kAny},
      {"bebop.v1.Info.GetModelInfo", kAny},
      {"bebop.v1.Info.GetLoads", kAny},
      {"bebop.v1.Info.Tokenize", kAny},
      {"bebop.v1.Info.Detokenize", kAny},
      {"bebop.v1.Weights.GetWeightInfo", kWeights},
      {"bebop.v1.Weights.StartWeightUpdate", kWeights},
      {"bebop.v1.Weights.PushWeights", kWeights},
      {"bebop.v1.Weights.UpdateWeights", kWeights},
      {"bebop.v1.Weights.FinishWeightUpdate", kWeights},
      {"bebop.v1.Weights.AbortWeightUpdate", kWeights},
      {"bebop.v1.Weights.CheckWeights", kWeights},
      {"bebop.v1.Control.PauseGeneration", kWeights},
      {"bebop.v1.Control.ResumeGeneration", kWeights},
      {"bebop.v1.Control.Sleep", kWeights},
      {"bebop.v1.Control.WakeUp", kWeights},
      {"bebop.v1.Control.FlushCache", kWeights},
      {"bebop.v1.Control.SetSpeculation", kWeights},
      {"bebop.v1.Control.Drain", kAdmin},  // ends the process
  });
  return *roles;
}

// 0 for a method that nobody was given.
uint32_t AllowedRoles(absl::string_view method) {
  const auto found = RolesByMethod().find(method);
  return found == RolesByMethod().end() ? 0 : found->second | kAdmin;
}

std::string Names(uint32_t roles) {
  std::vector<absl::string_view> names;
  for (const auto& [name, bit] : kRoleNames) {
    if ((roles & bit) != 0) names.push_back(name);
  }
  return absl::StrJoin(names, ", ");
}

Sha256Digest Digest(absl::string_view token) { return Sha256Of({token.data(), token.size()}); }

// What is wrong with a line's token; empty: nothing.
std::string TokenFault(absl::string_view token) {
  if (token.size() < kMinTokenBytes) return absl::StrCat("the token has ", token.size(), " characters; at least ", kMinTokenBytes);
  if (token.size() > kMaxTokenBytes) return absl::StrCat("the token has ", token.size(), " characters; at most ", kMaxTokenBytes);
  const bool visible = std::all_of(token.begin(), token.end(), [](unsigned char c) { return absl::ascii_isgraph(c); });
  return visible ? "" : "the token holds a character that is not visible ASCII";
}

absl::StatusOr<uint32_t> ParseRoles(absl::string_view text) {
  uint32_t roles = 0;
  for (const absl::string_view name : absl::StrSplit(text, ',')) {
    const auto found = std::find_if(std::begin(kRoleNames), std::end(kRoleNames), [name](const auto& entry) { return entry.first == name; });
    // Not the name itself: whoever swaps the columns would find a token in the log.
    if (found == std::end(kRoleNames)) return absl::InvalidArgumentError("the line does not begin with roles of rollout, weights, admin");
    roles |= found->second;
  }
  return roles;
}

absl::StatusOr<std::string> ReadTokenFile(const std::string& path) {
  struct stat info = {};
  if (::stat(path.c_str(), &info) != 0) {
    const std::string message = absl::StrCat(path, ": ", ::strerror(errno));
    return errno == EACCES ? absl::PermissionDeniedError(message) : absl::NotFoundError(message);
  }
  if (!S_ISREG(info.st_mode)) return absl::InvalidArgumentError(absl::StrCat(path, ": not a regular file"));
  if (info.st_size > kMaxFileBytes) return absl::InvalidArgumentError(absl::StrCat(path, ": ", info.st_size, " bytes; at most ", kMaxFileBytes));
  if ((info.st_mode & S_IWOTH) != 0) return absl::PermissionDeniedError(absl::StrCat(path, ": everybody may write it; chmod o-rw"));
  if ((info.st_mode & S_IROTH) != 0) Log(LogLevel::kWarning, absl::StrCat("token file ", path, ": everybody on this machine may read it"));
  std::ifstream file(path, std::ios::binary);
  std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (!file.good() && !file.eof()) return absl::PermissionDeniedError(absl::StrCat(path, ": cannot be read"));
  return text;
}

}  // namespace

absl::StatusOr<Access> Access::FromFile(const std::string& path) {
  const absl::StatusOr<std::string> text = ReadTokenFile(path);
  if (!text.ok()) return text.status();
  Access access;
  std::vector<int> line_of_token;
  int line_number = 0;
  for (const absl::string_view line : absl::StrSplit(*text, '\n')) {
    ++line_number;
    const auto error = [&path, line_number](absl::string_view fault) {
      return absl::InvalidArgumentError(absl::StrCat(path, ": line ", line_number, ": ", fault));
    };
    const std::vector<absl::string_view> words = absl::StrSplit(line, absl::ByAnyChar(" \t\r"), absl::SkipEmpty());
    if (words.empty() || words[0][0] == '#') continue;
    if (words.size() != 2) return error("not `ROLE[,ROLE] TOKEN`");
    const absl::StatusOr<uint32_t> roles = ParseRoles(words[0]);
    if (!roles.ok()) return error(roles.status().message());
    if (const std::string fault = TokenFault(words[1]); !fault.empty()) return error(fault);
    const Sha256Digest digest = Digest(words[1]);
    for (size_t i = 0; i < access.tokens_.size(); ++i) {
      if (access.tokens_[i].digest == digest) return error(absl::StrCat("the token of line ", line_of_token[i], " again"));
    }
    access.tokens_.push_back({digest, *roles});
    line_of_token.push_back(line_number);
  }
  // Without tokens everybody could do everything, which is not what a token file asks for.
  if (access.tokens_.empty()) return absl::InvalidArgumentError(absl::StrCat(path, ": holds no token"));
  return access;
}

absl::Status Access::Check(const grpc::CallbackServerContext& call, absl::string_view method) const {
  if (open()) return absl::OkStatus();
  std::vector<absl::string_view> authorization;
  const auto [begin, end] = call.client_metadata().equal_range("authorization");
  for (auto entry = begin; entry != end; ++entry) authorization.emplace_back(entry->second.data(), entry->second.size());
  return CheckHeaders(authorization, method);
}

absl::Status Access::CheckHeaders(std::span<const absl::string_view> authorization, absl::string_view method) const {
  if (open()) return absl::OkStatus();
  if (authorization.empty()) {
    return DetailedError(absl::StatusCode::kUnauthenticated, "NO_TOKEN", "this server wants a token: metadata `authorization: Bearer TOKEN`");
  }
  constexpr absl::string_view kScheme = "Bearer ";  // in any case, as in HTTP
  const absl::string_view header = authorization[0];
  if (authorization.size() > 1 || !absl::StartsWithIgnoreCase(header, kScheme)) {
    return DetailedError(absl::StatusCode::kUnauthenticated, "UNKNOWN_TOKEN", "metadata authorization is not one `Bearer TOKEN`");
  }
  const Sha256Digest digest = Digest(absl::StripAsciiWhitespace(header.substr(kScheme.size())));
  uint32_t roles = 0;
  // All of them, each in constant time.
  for (const Token& token : tokens_) {
    if (CRYPTO_memcmp(token.digest.data(), digest.data(), digest.size()) == 0) roles = token.roles;
  }
  if (roles == 0) return DetailedError(absl::StatusCode::kUnauthenticated, "UNKNOWN_TOKEN", "this server does not know the token");
  const uint32_t allowed = AllowedRoles(method);
  if ((roles & allowed) != 0) return absl::OkStatus();
  const std::string needed = allowed == 0 ? "a role nobody has" : absl::StrCat("one of the roles ", Names(allowed));
  return DetailedError(absl::StatusCode::kPermissionDenied, "WRONG_ROLE",
                       absl::StrCat(method, " needs ", needed, "; the token has ", Names(roles)),
                       {{"method", std::string(method)}, {"needed", Names(allowed)}, {"roles", Names(roles)}});
}

absl::Status CheckComplete(std::span<const google::protobuf::ServiceDescriptor* const> services) {
  for (const google::protobuf::ServiceDescriptor* service : services) {
    for (int i = 0; i < service->method_count(); ++i) {
      const std::string& method = service->method(i)->full_name();
      if (RolesByMethod().count(method) == 0) {
        return absl::InternalError(absl::StrCat(method, " is not in the table of roles (server/access.cc)"));
      }
    }
  }
  return absl::OkStatus();
}

absl::Status CheckComplete(std::span<const std::string> service_names) {
  std::vector<const google::protobuf::ServiceDescriptor*> services;
  for (const std::string& name : service_names) {
    if (name == "grpc.health.v1.Health" || absl::StartsWith(name, "grpc.reflection.")) continue;
    services.push_back(google::protobuf::DescriptorPool::generated_pool()->FindServiceByName(name));
    if (services.back() == nullptr) return absl::InternalError(absl::StrCat("service ", name, " has no descriptor, so no roles"));
  }
  return CheckComplete(services);
}

}  // namespace bebop
