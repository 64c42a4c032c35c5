// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <google/protobuf/descriptor.h>
#include <grpcpp/server_context.h>

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "engine/weights/weight_digest.h"

namespace bebop {

// What a token may do. Info needs any of them; health and, on loopback, reflection need none.
enum class Role : uint8_t {
  kRollout,  // Rollout
  kWeights,  // Weights, and the Control calls that a learner needs: pause, resume, sleep, wake up, flush, speculation
  kAdmin,    // everything
};

// Who may call what (reliability.md 1.2, I21). A caller shows its token as metadata `authorization: Bearer TOKEN`. Immutable; any thread.
class Access {
 public:
  Access() = default;  // everybody may do everything
  // A regular file of lines `ROLE[,ROLE] TOKEN`; empty lines and those that begin with # do not count. Tokens are 16 to 512 visible ASCII
  // characters, each on one line only. Errors name file and line, never a token: NOT_FOUND; INVALID_ARGUMENT, also without any token;
  // PERMISSION_DENIED when the process may not read it, or everybody may write it. A file that everybody may read is used, with a warning:
  // orchestrators mount secrets that way.
  static absl::StatusOr<Access> FromFile(const std::string& path);

  // Every handler asks first, before it looks at the message. `method` is the full name, "bebop.v1.Weights.PushWeights". UNAUTHENTICATED [NO_TOKEN],
  // [UNKNOWN_TOKEN]; PERMISSION_DENIED [WRONG_ROLE] names the roles that would do, and is the answer to methods nobody was given, too.
  absl::Status Check(const grpc::CallbackServerContext& call, absl::string_view method) const;
  // The same, of the values of all `authorization` headers of a call.
  absl::Status CheckHeaders(std::span<const absl::string_view> authorization, absl::string_view method) const;

  bool open() const { return tokens_.empty(); }

 private:
  struct Token {
    Sha256Digest digest = {};  // so that neither memory dumps nor comparison times tell a token
    uint32_t roles = 0;        // bit 1 << Role
  };
  std::vector<Token> tokens_;
};

// A server must not start with a method that the table of roles lacks: INTERNAL names it.
absl::Status CheckComplete(std::span<const google::protobuf::ServiceDescriptor* const> services);
// The same by the services' full names; health and reflection, which are not in the table, are passed over.
absl::Status CheckComplete(std::span<const std::string> service_names);

}  // namespace bebop
