// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <grpcpp/impl/codegen/service_type.h>

#include <memory>

#include "server/blocking_calls.h"
#include "server/service_context.h"
#include "server/weight_session.h"

namespace bebop {

// The gRPC services of bebop.v1, on gRPC's callback API: no thread waits for a request. Messages are parsed here rather than by gRPC, so
// that bytes that are no message get INVALID_ARGUMENT / MALFORMED_MESSAGE. `context` must outlive the service.
std::unique_ptr<grpc::Service> MakeRolloutService(const ServiceContext* context);
std::unique_ptr<grpc::Service> MakeInfoService(const ServiceContext* context);
// `calls` runs what blocks.
std::unique_ptr<grpc::Service> MakeWeightsService(const ServiceContext* context, BlockingCalls* calls, WeightSessionOptions options);
std::unique_ptr<grpc::Service> MakeControlService(ServiceContext* context, BlockingCalls* calls);

}  // namespace bebop
