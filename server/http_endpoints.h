// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace bebop {

struct HttpReply {
  int status = 200;
  const char* content_type = "text/plain; charset=utf-8";
  std::string body{};
};

// A small HTTP/1.1 listener for probes and scrapes, on threads of its own. It reads no file and no request body, and asks for no
// credentials. Methods other than GET and HEAD are answered with 405.
class HttpEndpoints {
 public:
  // Called on the listener's threads, several at a time. `path` is decoded and without query.
  using Handler = std::function<HttpReply(const std::string& path)>;

  // Listens on `host`, a number or a name, and `port`, 0 for a free one. INVALID_ARGUMENT when it cannot.
  static absl::StatusOr<std::unique_ptr<HttpEndpoints>> Start(const std::string& host, int32_t port, Handler handler);
  // Waits for answers under way.
  ~HttpEndpoints();

  int32_t port() const;

 private:
  struct Impl;
  explicit HttpEndpoints(std::unique_ptr<Impl> impl);
  const std::unique_ptr<Impl> impl_;
};

}  // namespace bebop
