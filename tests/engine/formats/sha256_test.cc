// SPDX-License-Identifier: Apache-2.0
#include "engine/formats/sha256.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <random>
#include <string>
#include <utility>

namespace bebop {
namespace {

std::string Hex(const Sha256Digest& digest) {
  std::string text;
  for (const uint8_t byte : digest) {
    constexpr char kDigits[] = "0123456789abcdef";
    text += {kDigits[byte >> 4], kDigits[byte & 15]};
  }
  return text;
}

// libcrypto's, of the whole at once.
Sha256Digest Oracle(std::string_view bytes) {
  Sha256 hash = Sha256::WithoutInstructions();
  hash.Update(bytes);
  return hash.Finish();
}

std::string RandomBytes(std::mt19937* random, size_t size) {
  std::string bytes(size, '\0');
  std::generate(bytes.begin(), bytes.end(), [random] { return static_cast<char>((*random)()); });
  return bytes;
}

// NIST's examples for FIPS 180-4.
TEST(Sha256Test, Examples) {
  // On a processor without the instructions the other tests compare libcrypto with itself: the log tells.
  std::printf("under test: %s\n", Sha256::HasInstructions() ? "ours, with SHA instructions" : "libcrypto alone");
  const std::pair<std::string, const char*> examples[] = {
      {"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
      {"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
      {"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
       "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"},
      {std::string(1000000, 'a'), "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"}};
  for (const auto& [text, digest] : examples) {
    EXPECT_EQ(Hex(Sha256Of(text)), digest);
    EXPECT_EQ(Hex(Oracle(text)), digest);
  }
}

TEST(Sha256Test, EveryLengthAroundTheBlocks) {
  std::mt19937 random(1);
  for (size_t size = 0; size < 300; ++size) {
    const std::string bytes = RandomBytes(&random, size);
    EXPECT_EQ(Hex(Sha256Of(bytes)), Hex(Oracle(bytes))) << size;
  }
}

TEST(Sha256Test, PiecesOfAnySizeAloneAndTogether) {
  std::mt19937 random(2);
  for (int trial = 0; trial < 300; ++trial) {
    std::string whole[2];
    Sha256 hashes[2];
    for (int piece = 0; piece < 12; ++piece) {
      // Of a few bytes, or of a few blocks and some.
      const std::string bytes[2] = {RandomBytes(&random, random() % (random() % 2 == 0 ? 70 : 700)),
                                    RandomBytes(&random, random() % (random() % 2 == 0 ? 70 : 700))};
      if (random() % 3 == 0) {
        hashes[0].Update(bytes[0]);
        hashes[1].Update(bytes[1]);
      } else {
        Sha256::UpdateBoth(&hashes[0], bytes[0], &hashes[1], bytes[1]);
      }
      for (int i = 0; i < 2; ++i) whole[i] += bytes[i];
      if (piece == 5) hashes[0] = Sha256(std::move(hashes[0]));  // moves in the middle of a block
    }
    for (int i = 0; i < 2; ++i) ASSERT_EQ(Hex(hashes[i].Finish()), Hex(Oracle(whole[i]))) << trial << " " << i;
  }
}

// The number of bits ends in 64 of them: here it needs more than 32.
TEST(Sha256Test, MoreThanHalfAGigabyte) {
  std::mt19937 random(4);
  const std::string piece = RandomBytes(&random, size_t{1} << 20);
  Sha256 hashes[3] = {Sha256(), Sha256(), Sha256::WithoutInstructions()};
  for (int i = 0; i < 513; ++i) {
    Sha256::UpdateBoth(&hashes[0], piece, &hashes[1], piece);
    hashes[2].Update(piece);
  }
  const Sha256Digest expected = hashes[2].Finish();
  EXPECT_EQ(hashes[0].Finish(), expected);
  EXPECT_EQ(hashes[1].Finish(), expected);
}

// It does not become a hash of the other kind, with instructions that the processor may lack.
TEST(Sha256Test, WhatWasMovedFromByLibcryptoSaysSo) {
  const auto move_and = [](bool finish) {
    Sha256 hash = Sha256::WithoutInstructions();
    const Sha256 moved = std::move(hash);
    finish ? static_cast<void>(hash.Finish()) : hash.Update("abc");  // NOLINT(bugprone-use-after-move): the point
  };
  EXPECT_DEATH(move_and(false), "SHA-256: used after it was moved from");
  EXPECT_DEATH(move_and(true), "SHA-256: used after it was moved from");
}

TEST(Sha256Test, TogetherWithoutInstructions) {
  std::mt19937 random(3);
  const std::string first = RandomBytes(&random, 1000), second = RandomBytes(&random, 777);
  for (const bool both : {false, true}) {
    Sha256 a = Sha256::WithoutInstructions(), b = both ? Sha256::WithoutInstructions() : Sha256();
    Sha256::UpdateBoth(&a, first, &b, second);
    EXPECT_EQ(a.Finish(), Oracle(first));
    EXPECT_EQ(b.Finish(), Oracle(second));
  }
}

}  // namespace
}  // namespace bebop
