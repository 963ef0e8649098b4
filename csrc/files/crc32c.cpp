// Copyright 2026 The fusestep authors
// SPDX-License-Identifier: Apache-2.0
#include "crc32c.h"

#include <array>
#include <cstring>

#include "tuning.h"

#if defined(__x86_64__)
#include <nmmintrin.h>
#define FUSESTEP_CRC_TARGET __attribute__((target("sse4.2")))
#elif defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
#define FUSESTEP_CRC_TARGET
#endif

namespace fusestep::detail {
namespace {

// Polynomials over GF(2) modulo this one, the coefficient of x^0 in the highest bit.
constexpr std::uint32_t kPolynomial = 0x82f63b78;

using Table = std::array<std::uint32_t, 256>;

/// A product with x is a shift; what leaves at the end comes back as the polynomial.
constexpr std::uint32_t times_x(std::uint32_t a) { return a >> 1 ^ (a & 1 ? kPolynomial : 0); }

/// tables[k][i]: byte i followed by k bytes of zeros.
constexpr std::array<Table, 8> make_byte_tables() {
  std::array<Table, 8> tables{};
  for (std::uint32_t i = 0; i < 256; ++i) {
    tables[0][i] = i;
    for (int bit = 0; bit < 8; ++bit) tables[0][i] = times_x(tables[0][i]);
  }
  for (std::size_t k = 1; k < 8; ++k) {
    for (std::size_t i = 0; i < 256; ++i) {
      const std::uint32_t before = tables[k - 1][i];
      tables[k][i] = before >> 8 ^ tables[0][before & 255];
    }
  }
  return tables;
}

constexpr std::array<Table, 8> kByteTables = make_byte_tables();

/// Eight bytes at a time ("slicing by 8").
std::uint32_t update_portable(std::uint32_t state, const unsigned char* data, std::size_t bytes) {
  for (; bytes >= 8; data += 8, bytes -= 8) {
    std::uint32_t next = 0;
    for (std::size_t i = 0; i < 4; ++i) {
      next ^=
          kByteTables[7 - i][(state >> 8 * i & 255) ^ data[i]] ^ kByteTables[3 - i][data[i + 4]];
    }
    state = next;
  }
  for (; bytes > 0; ++data, --bytes) state = state >> 8 ^ kByteTables[0][(state ^ *data) & 255];
  return state;
}

#if defined(FUSESTEP_CRC_TARGET)

constexpr std::uint32_t multiply(std::uint32_t a, std::uint32_t b) {
  std::uint32_t product = 0;
  for (; a != 0; a <<= 1, b = times_x(b)) product ^= a >> 31 ? b : 0;
  return product;
}

/// Appends a fixed number of zero bytes to a stream: multiplies its state by a power of x.
class ZeroBytes {
 public:
  constexpr explicit ZeroBytes(std::size_t bytes) {
    std::uint32_t power = 1u << 31, square = 1u << 23;  // x^0 and x^8
    for (; bytes > 0; bytes >>= 1, square = multiply(square, square)) {
      if (bytes & 1) power = multiply(power, square);
    }
    for (std::size_t k = 0; k < 4; ++k) {
      for (std::uint32_t i = 1; i < 256; ++i) {
        const std::uint32_t lowest = i & (~i + 1), rest = i ^ lowest;
        tables_[k][i] =
            rest == 0 ? multiply(i << 8 * k, power) : tables_[k][rest] ^ tables_[k][lowest];
      }
    }
  }
  std::uint32_t append_to(std::uint32_t state) const {
    return tables_[0][state & 255] ^ tables_[1][state >> 8 & 255] ^ tables_[2][state >> 16 & 255] ^
           tables_[3][state >> 24];
  }

 private:
  std::array<Table, 4> tables_{};
};

#if defined(__x86_64__)
using State = std::uint64_t;
FUSESTEP_CRC_TARGET State add_word(State state, std::uint64_t word) {
  return _mm_crc32_u64(state, word);
}
FUSESTEP_CRC_TARGET State add_byte(State state, unsigned char byte) {
  return _mm_crc32_u8(static_cast<std::uint32_t>(state), byte);
}
bool has_instruction() { return __builtin_cpu_supports("sse4.2") != 0; }
#else
using State = std::uint32_t;
State add_word(State state, std::uint64_t word) { return __crc32cd(state, word); }
State add_byte(State state, unsigned char byte) { return __crc32cb(state, byte); }
bool has_instruction() { return true; }
#endif

std::uint64_t load_word(const unsigned char* data) {
  std::uint64_t word = 0;
  std::memcpy(&word, data, sizeof word);
  return word;
}

/// An instruction waits for the one before it, but a processor starts one per cycle: so three
/// streams are computed at a time and joined. Advances `data`.
template <std::size_t kStream>
FUSESTEP_CRC_TARGET State add_streams(State state, const unsigned char*& data, std::size_t& bytes) {
  static constexpr ZeroBytes kZeros(kStream);
  for (; bytes >= 3 * kStream; data += 3 * kStream, bytes -= 3 * kStream) {
    State second = 0, third = 0;
    for (std::size_t i = 0; i < kStream; i += 8) {
      state = add_word(state, load_word(data + i));
      second = add_word(second, load_word(data + kStream + i));
      third = add_word(third, load_word(data + 2 * kStream + i));
    }
    state = kZeros.append_to(static_cast<std::uint32_t>(state)) ^ second;
    state = kZeros.append_to(static_cast<std::uint32_t>(state)) ^ third;
  }
  return state;
}

FUSESTEP_CRC_TARGET std::uint32_t update(std::uint32_t crc, const unsigned char* data,
                                         std::size_t bytes) {
  State state = crc;
  state = add_streams<kCrcLongStream>(state, data, bytes);
  state = add_streams<kCrcShortStream>(state, data, bytes);
  for (; bytes >= 8; data += 8, bytes -= 8) state = add_word(state, load_word(data));
  for (; bytes > 0; ++data, --bytes) state = add_byte(state, *data);
  return static_cast<std::uint32_t>(state);
}

#endif

}  // namespace

std::uint32_t crc32c_portable(std::uint32_t crc, const void* data, std::size_t bytes) {
  return ~update_portable(~crc, static_cast<const unsigned char*>(data), bytes);
}

std::uint32_t crc32c(std::uint32_t crc, const void* data, std::size_t bytes) {
#if defined(FUSESTEP_CRC_TARGET)
  static const bool fast = has_instruction();
  if (fast) return ~update(~crc, static_cast<const unsigned char*>(data), bytes);
#endif
  return crc32c_portable(crc, data, bytes);
}

}  // namespace fusestep::detail
