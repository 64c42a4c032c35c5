// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <grpcpp/support/status.h>

#include "absl/status/status.h"

namespace bebop {

// The only way from the engine's and the server's statuses to gRPC: same code, same message, details completed (CompleteDetails) and
// packed as google.rpc.Status.
grpc::Status ToGrpcStatus(const absl::Status& status);

}  // namespace bebop
