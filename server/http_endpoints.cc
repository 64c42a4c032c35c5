// SPDX-License-Identifier: Apache-2.0
#include "server/http_endpoints.h"

#include <civetweb.h>
#include <netdb.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace bebop {
namespace {

constexpr auto kWakeInterval = std::chrono::milliseconds(5);

const char* ReasonPhrase(int status) {
  switch (status) {
    case 200: return "OK";
    case 404: return "Not Found";
    case 405: return "Method Not Allowed";
    default: return "Service Unavailable";
  }
}

void Write(mg_connection* connection, const HttpReply& reply, bool with_body) {
  const std::string head = absl::StrCat("HTTP/1.1 ", reply.status, " ", ReasonPhrase(reply.status), "\r\nContent-Type: ", reply.content_type,
                                        "\r\nContent-Length: ", reply.body.size(), "\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n");
  const std::string bytes = with_body ? absl::StrCat(head, reply.body) : head;
  mg_write(connection, bytes.data(), bytes.size());
}

}  // namespace

struct HttpEndpoints::Impl {
  explicit Impl(Handler answer) : handler(std::move(answer)) { mg_init_library(0); }
  ~Impl() {
    if (context != nullptr) Stop();
    mg_exit_library();
  }

  // The library's listening thread looks up from its sockets every 2 s, a constant of the library, or when somebody connects: so
  // somebody does.
  void Stop() {
    std::atomic<bool> stopped = false;
    std::thread waker([this, &stopped] {
      while (!stopped) {
        Connect();
        std::this_thread::sleep_for(kWakeInterval);
      }
    });
    mg_stop(context);
    stopped = true;
    waker.join();
  }

  // What `host` stands for, which may take a while. A name may have addresses that the library does not listen at.
  void Resolve(const std::string& host) {
    addrinfo hints = {};
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = AI_NUMERICSERV;
    addrinfo* found = nullptr;
    if (getaddrinfo(host.c_str(), absl::StrCat(port).c_str(), &hints, &found) != 0) return;
    for (const addrinfo* one = found; one != nullptr; one = one->ai_next) {
      Address address = {.size = one->ai_addrlen};
      std::memcpy(&address.bytes, one->ai_addr, one->ai_addrlen);
      addresses.push_back(address);
    }
    freeaddrinfo(found);
  }

  // Connects to the listener and hangs up.
  void Connect() const {
    for (const Address& address : addresses) {
      const int connection = socket(address.bytes.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
      if (connection < 0) continue;
      // Whether or not it works out: a listener that is gone needs no waking.
      connect(connection, reinterpret_cast<const sockaddr*>(&address.bytes), address.size);
      close(connection);
    }
  }

  // Answers every request, so that the library itself never looks for a file.
  static int OnRequest(mg_connection* connection) {
    const mg_request_info& request = *mg_get_request_info(connection);
    const auto& impl = *static_cast<const Impl*>(request.user_data);
    const std::string_view method = request.request_method;
    if (method != "GET" && method != "HEAD") {
      Write(connection, {.status = 405, .body = "GET or HEAD\n"}, true);
      return 405;
    }
    const HttpReply reply = impl.handler(request.local_uri);
    Write(connection, reply, method == "GET");
    return reply.status;
  }
  static int DropMessage(const mg_connection*, const char*) { return 1; }

  struct Address {
    sockaddr_storage bytes = {};
    socklen_t size = 0;
  };

  const Handler handler;
  std::vector<Address> addresses;  // the listener's
  mg_context* context = nullptr;
  int32_t port = 0;
};

HttpEndpoints::HttpEndpoints(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
HttpEndpoints::~HttpEndpoints() = default;

absl::StatusOr<std::unique_ptr<HttpEndpoints>> HttpEndpoints::Start(const std::string& host, int32_t port, Handler handler) {
  auto impl = std::make_unique<Impl>(std::move(handler));
  const std::string address = absl::StrContains(host, ':') ? absl::StrCat("[", host, "]:", port) : absl::StrCat(host, ":", port);
  // A peer that sends nothing holds a thread for the timeout: there are enough for a few of them beside the probes, and others wait in line.
  const char* options[] = {"listening_ports",  address.c_str(), "num_threads",      "16",   "request_timeout_ms", "2000",
                           "connection_queue", "64",            "max_request_size", "8192", nullptr};
  mg_callbacks callbacks = {};
  callbacks.begin_request = &Impl::OnRequest;
  callbacks.log_message = &Impl::DropMessage;  // what peers send wrong is no news
  impl->context = mg_start(&callbacks, impl.get(), options);
  mg_server_port bound = {};
  if (impl->context == nullptr || mg_get_server_ports(impl->context, 1, &bound) < 1) {
    return absl::InvalidArgumentError(absl::StrCat("--host/--http-port: cannot listen on ", address));
  }
  impl->port = bound.port;
  impl->Resolve(host);  // now, since a name that resolves slowly would make ending slow
  return std::unique_ptr<HttpEndpoints>(new HttpEndpoints(std::move(impl)));
}

int32_t HttpEndpoints::port() const { return impl_->port; }

}  // namespace bebop
