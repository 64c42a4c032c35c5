// SPDX-License-Identifier: Apache-2.0
#include "engine/formats/sha256.h"

#include <openssl/evp.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace bebop {
namespace {

constexpr size_t kBlockBytes = 64;

// Looked up once: a look-up per digest takes the library's locks. Lives as long as the process.
const EVP_MD* Algorithm() {
  static const EVP_MD* const algorithm = EVP_MD_fetch(nullptr, "SHA256", nullptr);
  return algorithm;
}

// Ends the process: libcrypto fails for want of memory or of the algorithm only, and the rest is our own fault; nothing is input.
void Check(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "fatal: SHA-256: %s\n", what);
  std::abort();
}

// Whole blocks that go into a hash.
struct Input {
  uint32_t* state;
  const uint8_t* bytes;
};

#if defined(__x86_64__)

bool FindInstructions() {
  static const bool has = [] {
    constexpr unsigned int kSsse3 = 1u << 9, kSse41 = 1u << 19, kSha = 1u << 29;  // of ECX, ECX and EBX
    unsigned int eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) == 0 || (ecx & kSsse3) == 0 || (ecx & kSse41) == 0) return false;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (ebx & kSha) != 0;
  }();
  return has;
}

// FIPS 180-4, 4.2.2.
alignas(16) constexpr uint32_t kConstants[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01,
    0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc,
    0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147,
    0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08,
    0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208,
    0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

// Hashes `num_blocks` blocks of each of kLanes inputs. An instruction of one lane takes several cycles and the next of that lane
// needs its result, so the lanes' instructions are interleaved: everything below is unrolled, and arrays are registers.
template <int kLanes>
__attribute__((target("sha,sse4.1,ssse3"))) void HashBlocks(const std::array<Input, kLanes>& inputs, size_t num_blocks) {
  const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
  // The instructions want the state as (a, b, e, f) and (c, d, g, h), from the highest word down.
  __m128i abef[kLanes], cdgh[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint32_t* const s = inputs[lane].state;
    const auto word = [s](int i) { return static_cast<int>(s[i]); };
    abef[lane] = _mm_set_epi32(word(0), word(1), word(4), word(5));
    cdgh[lane] = _mm_set_epi32(word(2), word(3), word(6), word(7));
  }
  for (size_t block = 0; block < num_blocks; ++block) {
    __m128i old_abef[kLanes], old_cdgh[kLanes], schedule[kLanes][4];  // the last 16 words of the message schedule
    for (int lane = 0; lane < kLanes; ++lane) {
      old_abef[lane] = abef[lane];
      old_cdgh[lane] = cdgh[lane];
      for (int i = 0; i < 4; ++i) {
        const uint8_t* const at = inputs[lane].bytes + block * kBlockBytes + static_cast<size_t>(16 * i);
        schedule[lane][i] = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)), big_endian);
      }
    }
#pragma GCC unroll 16
    for (int step = 0; step < 16; ++step) {  // four rounds each
      const __m128i constants = _mm_load_si128(reinterpret_cast<const __m128i*>(kConstants + 4 * step));
#pragma GCC unroll 2
      for (int lane = 0; lane < kLanes; ++lane) {
        __m128i* const w = schedule[lane];
        const __m128i words = _mm_add_epi32(w[step & 3], constants);
        cdgh[lane] = _mm_sha256rnds2_epu32(cdgh[lane], abef[lane], words);
        abef[lane] = _mm_sha256rnds2_epu32(abef[lane], cdgh[lane], _mm_shuffle_epi32(words, 0x0E));
        if (step >= 12) continue;  // the schedule ends
        const __m128i sum = _mm_add_epi32(_mm_sha256msg1_epu32(w[step & 3], w[(step + 1) & 3]),
                                          _mm_alignr_epi8(w[(step + 3) & 3], w[(step + 2) & 3], 4));
        w[step & 3] = _mm_sha256msg2_epu32(sum, w[(step + 3) & 3]);
      }
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      abef[lane] = _mm_add_epi32(abef[lane], old_abef[lane]);
      cdgh[lane] = _mm_add_epi32(cdgh[lane], old_cdgh[lane]);
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    alignas(16) uint32_t front[4], back[4];  // f, e, b, a and h, g, d, c
    _mm_store_si128(reinterpret_cast<__m128i*>(front), abef[lane]);
    _mm_store_si128(reinterpret_cast<__m128i*>(back), cdgh[lane]);
    uint32_t* const s = inputs[lane].state;
    s[0] = front[3], s[1] = front[2], s[2] = back[3], s[3] = back[2], s[4] = front[1], s[5] = front[0], s[6] = back[1],
    s[7] = back[0];
  }
}

#else

bool FindInstructions() { return false; }

template <int kLanes>
void HashBlocks(const std::array<Input, kLanes>&, size_t) {
  Check(false, "this processor has no SHA instructions");  // never called
}

#endif

const uint8_t* Bytes(std::string_view bytes) { return reinterpret_cast<const uint8_t*>(bytes.data()); }

}  // namespace

void Sha256::Free::operator()(evp_md_ctx_st* context) const { EVP_MD_CTX_free(context); }

Sha256::Context Sha256::MakeContext() {
  Check(Algorithm() != nullptr, "libcrypto does not have the algorithm");
  Context context(EVP_MD_CTX_new());
  Check(context != nullptr && EVP_DigestInit_ex2(context.get(), Algorithm(), nullptr) == 1, "libcrypto cannot begin a digest");
  return context;
}

bool Sha256::HasInstructions() { return FindInstructions(); }

Sha256 Sha256::WithoutInstructions() { return Sha256(/*by_libcrypto=*/true); }

Sha256::Sha256() : Sha256(!HasInstructions()) {}

Sha256::Sha256(bool by_libcrypto)
    : by_libcrypto_(by_libcrypto),
      context_(by_libcrypto ? MakeContext() : nullptr),
      // FIPS 180-4, 5.3.3.
      state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19} {}

std::string_view Sha256::FillBlock(std::string_view bytes) {
  const size_t begin = num_bytes_ % kBlockBytes;
  if (begin == 0 || bytes.empty()) return bytes;
  const size_t size = std::min(kBlockBytes - begin, bytes.size());
  std::memcpy(block_.data() + begin, bytes.data(), size);
  num_bytes_ += size;
  if (begin + size == kBlockBytes) HashBlocks<1>({Input{state_.data(), block_.data()}}, 1);
  return bytes.substr(size);
}

void Sha256::KeepTail(std::string_view bytes) {
  if (bytes.empty()) return;
  std::memcpy(block_.data(), bytes.data(), bytes.size());
  num_bytes_ += bytes.size();
}

void Sha256::Update(std::string_view bytes) {
  if (bytes.empty()) return;
  if (by_libcrypto_) {
    Check(context_ != nullptr, "used after it was moved from");
    Check(EVP_DigestUpdate(context_.get(), bytes.data(), bytes.size()) == 1, "libcrypto cannot go on with a digest");
    return;
  }
  bytes = FillBlock(bytes);
  const size_t whole = bytes.size() / kBlockBytes * kBlockBytes;
  HashBlocks<1>({Input{state_.data(), Bytes(bytes)}}, whole / kBlockBytes);
  num_bytes_ += whole;
  KeepTail(bytes.substr(whole));
}

void Sha256::UpdateBoth(Sha256* first, std::string_view first_bytes, Sha256* second, std::string_view second_bytes) {
  if (!first->by_libcrypto_ && !second->by_libcrypto_) {
    first_bytes = first->FillBlock(first_bytes);
    second_bytes = second->FillBlock(second_bytes);
    const size_t both = std::min(first_bytes.size(), second_bytes.size()) / kBlockBytes * kBlockBytes;
    HashBlocks<2>({Input{first->state_.data(), Bytes(first_bytes)}, Input{second->state_.data(), Bytes(second_bytes)}},
                  both / kBlockBytes);
    first->num_bytes_ += both;
    second->num_bytes_ += both;
    first_bytes.remove_prefix(both);
    second_bytes.remove_prefix(both);
  }
  first->Update(first_bytes);
  second->Update(second_bytes);
}

Sha256Digest Sha256::Finish() {
  Sha256Digest digest;
  if (by_libcrypto_) {
    unsigned int size = 0;
    Check(context_ != nullptr, "used after it was moved from");
    Check(EVP_DigestFinal_ex(context_.get(), digest.data(), &size) == 1 && size == digest.size(),
          "libcrypto cannot end a digest");
    return digest;
  }
  // FIPS 180-4, 5.1.1: a one, zeros, and the number of bits.
  const uint64_t num_bits = num_bytes_ * 8;
  std::array<char, kBlockBytes + 8> padding = {'\x80'};
  const size_t zeros_end = num_bytes_ % kBlockBytes < 56 ? 56 - num_bytes_ % kBlockBytes : 120 - num_bytes_ % kBlockBytes;
  for (size_t i = 0; i < 8; ++i) padding[zeros_end + i] = static_cast<char>(num_bits >> (56 - 8 * i));
  Update({padding.data(), zeros_end + 8});
  for (size_t i = 0; i < digest.size(); ++i) digest[i] = static_cast<uint8_t>(state_[i / 4] >> (24 - 8 * (i % 4)));
  return digest;
}

Sha256Digest Sha256Of(std::string_view bytes) {
  Sha256 hash;
  hash.Update(bytes);
  return hash.Finish();
}

}  // namespace bebop
