// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string_view>
#include <utility>

struct evp_md_ctx_st;  // of libcrypto

namespace bebop {

using Sha256Digest = std::array<uint8_t, 32>;

// SHA-256 (FIPS 180-4) of bytes that come in pieces. Movable; what was moved from is assigned to or destroyed, nothing else.
//
// With the processor's SHA instructions where it has them, else by libcrypto, whose code for processors without them is faster
// than C++. The instructions of one hash wait for each other; two hashes side by side fill these waits, which libcrypto does not
// offer.
class Sha256 {
 public:
  Sha256();
  // By libcrypto: for processors without the instructions, and for tests of that.
  static Sha256 WithoutInstructions();
  // Whether Sha256() has the instructions on this processor.
  static bool HasInstructions();

  void Update(std::string_view bytes);
  // The same as first->Update(first_bytes) and second->Update(second_bytes), in little more time than the longer of the two.
  // REQUIRES: first and second are two hashes.
  static void UpdateBoth(Sha256* first, std::string_view first_bytes, Sha256* second, std::string_view second_bytes);
  // The digest of everything so far. REQUIRES: called once, last.
  Sha256Digest Finish();

 private:
  struct Free {
    void operator()(evp_md_ctx_st* context) const;
  };
  using Context = std::unique_ptr<evp_md_ctx_st, Free>;

  explicit Sha256(bool by_libcrypto);
  static Context MakeContext();
  // Moves bytes into the block that is not full yet and hashes it if it becomes full; returns the rest.
  std::string_view FillBlock(std::string_view bytes);
  void KeepTail(std::string_view bytes);

  bool by_libcrypto_;                   // with context_, else with the instructions and what follows it
  Context context_;
  std::array<uint32_t, 8> state_ = {};  // a to h of the standard
  std::array<uint8_t, 64> block_ = {};  // the first num_bytes_ % 64 bytes of the next one
  uint64_t num_bytes_ = 0;
};

Sha256Digest Sha256Of(std::string_view bytes);

}  // namespace bebop
