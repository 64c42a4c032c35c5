// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <grpcpp/support/server_callback.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

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
  // A file of lines `ROLE[,ROLE] TOKEN`; empty lines and those that begin with # do not count. Errors name file and line, never a token: NOT_FOUND,
  // PERMISSION_DENIED (others may read it), INVALID_ARGUMENT.
  static absl::StatusOr<Access> FromFile(const std::string& path);

  // Every handler asks first, before it looks at the message. `method` is the full name, "bebop.v1.Weights.PushWeights". UNAUTHENTICATED [NO_TOKEN],
  // [UNKNOWN_TOKEN]; PERMISSION_DENIED [WRONG_ROLE] names the roles that would do, and is the answer to methods nobody was given, too.
  absl::Status Check(const grpc::CallbackServerContext& call, absl::string_view method) const;

  bool open() const { return tokens_.empty(); }

 private:
  struct Token {
    std::array<uint8_t, 32> digest = {};  // SHA-256, so that neither memory dumps nor comparison times tell a token
    uint32_t roles = 0;                   // bit 1 << Role
  };
  std::vector<Token> tokens_;
};

}  // namespace bebop
