// SPDX-License-Identifier: Apache-2.0
#include "server/access.h"

namespace bebop {

absl::Status Access::Check(const grpc::CallbackServerContext&, absl::string_view) const { return absl::OkStatus(); }

}  // namespace bebop
