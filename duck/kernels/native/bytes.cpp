// What transports need: an atomic counter, a checksum, rows in bf16, and their sum.
#include <array>
#include <cstring>

#include "duck.h"
#include "rows.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

// CRC-32C (Castagnoli), bit-reflected, eight bytes at a time: table t holds the effect of a byte
// that t more bytes follow.
using Tables = std::array<std::array<std::uint32_t, 256>, 8>;

constexpr Tables make_tables() {
  Tables tables{};
  for (std::uint32_t i = 0; i < 256; ++i) {
    std::uint32_t crc = i;
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0x82F63B78u : 0);
    tables[0][i] = crc;
  }
  for (int t = 1; t < 8; ++t)
    for (std::uint32_t i = 0; i < 256; ++i)
      tables[t][i] = tables[t - 1][i] >> 8 ^ tables[0][tables[t - 1][i] & 0xFF];
  return tables;
}

constexpr Tables kTables = make_tables();

std::uint32_t crc_by_table(std::uint32_t crc, const std::uint8_t* p, std::size_t bytes) {
  for (; bytes >= 8; p += 8, bytes -= 8) {
    const std::uint32_t low = crc ^ (p[0] | std::uint32_t(p[1]) << 8 | std::uint32_t(p[2]) << 16 |
                                     std::uint32_t(p[3]) << 24);
    crc = kTables[7][low & 0xFF] ^ kTables[6][low >> 8 & 0xFF] ^ kTables[5][low >> 16 & 0xFF] ^
          kTables[4][low >> 24] ^ kTables[3][p[4]] ^ kTables[2][p[5]] ^ kTables[1][p[6]] ^
          kTables[0][p[7]];
  }
  for (; bytes; ++p, --bytes) crc = crc >> 8 ^ kTables[0][(crc ^ *p) & 0xFF];
  return crc;
}

#if defined(__x86_64__)
// The instruction's result takes three cycles, and one can begin in each: so three stretches are
// summed side by side. The sum of stretches in a row is that of the first, moved on by as many
// zero bytes as follow it, xor the next one's; moving on is linear, so four tables of one byte each
// hold it for stretches of one length.
constexpr std::size_t kStretch = 1024;
using Shift = std::array<std::array<std::uint32_t, 256>, 4>;

constexpr Shift make_shift() {
  Shift shift{};
  for (int t = 0; t < 4; ++t)
    for (int bit = 0; bit < 8; ++bit) {
      std::uint32_t crc = 1u << (8 * t + bit);
      for (std::size_t i = 0; i < kStretch; ++i) crc = crc >> 8 ^ kTables[0][crc & 0xFF];
      for (std::uint32_t i = 0; i < 256; ++i)
        if (i >> bit & 1) shift[t][i] ^= crc;
    }
  return shift;
}

const Shift kShift = make_shift();

std::uint32_t moved_on(std::uint32_t crc) {
  return kShift[0][crc & 0xFF] ^ kShift[1][crc >> 8 & 0xFF] ^ kShift[2][crc >> 16 & 0xFF] ^
         kShift[3][crc >> 24];
}

__attribute__((target("sse4.2"))) std::uint32_t crc_by_instruction(std::uint32_t crc,
                                                                   const std::uint8_t* p,
                                                                   std::size_t bytes) {
  for (; bytes >= 3 * kStretch; p += 3 * kStretch, bytes -= 3 * kStretch) {
    std::uint64_t sums[3] = {crc, 0, 0};
    for (std::size_t at = 0; at < kStretch; at += 8)
      for (int s = 0; s < 3; ++s) {
        std::uint64_t word;
        std::memcpy(&word, p + s * kStretch + at, sizeof word);
        sums[s] = _mm_crc32_u64(sums[s], word);
      }
    const std::uint32_t two = moved_on(std::uint32_t(sums[0])) ^ std::uint32_t(sums[1]);
    crc = moved_on(two) ^ std::uint32_t(sums[2]);
  }
  std::uint64_t wide = crc;
  for (; bytes >= 8; p += 8, bytes -= 8) {
    std::uint64_t word;
    std::memcpy(&word, p, sizeof word);
    wide = _mm_crc32_u64(wide, word);
  }
  crc = std::uint32_t(wide);
  for (; bytes; ++p, --bytes) crc = _mm_crc32_u8(crc, *p);
  return crc;
}

// Folding, where products of polynomials are 256 bits wide: bytes that `distance` more bits follow
// are congruent, modulo the polynomial, to themselves times x^distance, so their halves times two
// constants may be added to what lies there (Gopal and others, "Fast CRC computation using the
// PCLMULQDQ instruction", Intel 2009). 64 more for the earlier half; 32 fewer because a constant
// stands in the lower half of its 64 bits, and one fewer because a product of two reflected
// polynomials of degree 63 is one bit short of 128.
constexpr std::uint64_t power(int exponent) {
  std::uint32_t crc = 0x80000000u;  // x^0, reflected
  for (int i = 0; i < exponent; ++i) crc = crc >> 1 ^ (crc & 1 ? 0x82F63B78u : 0);
  return crc;
}

constexpr std::uint64_t kEarlier[] = {power(128 + 31), power(256 + 31), power(1024 + 31)};
constexpr std::uint64_t kLater[] = {power(128 - 33), power(256 - 33), power(1024 - 33)};
constexpr std::size_t kFolded = 128;  // bytes at a time

#define DUCK_FOLDS __attribute__((target("avx2,pclmul,vpclmulqdq,sse4.2")))

DUCK_FOLDS inline __m256i fold(__m256i from, __m256i by, __m256i to) {
  const __m256i earlier = _mm256_clmulepi64_epi128(from, by, 0x00);
  const __m256i later = _mm256_clmulepi64_epi128(from, by, 0x11);
  return _mm256_xor_si256(to, _mm256_xor_si256(earlier, later));
}

DUCK_FOLDS inline __m256i load(const std::uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

DUCK_FOLDS inline __m256i constants(int which) {
  const auto earlier = static_cast<long long>(kEarlier[which]);
  const auto later = static_cast<long long>(kLater[which]);
  return _mm256_set_epi64x(later, earlier, later, earlier);
}

DUCK_FOLDS std::uint32_t crc_by_folding(std::uint32_t crc, const std::uint8_t* p,
                                        std::size_t bytes) {
  if (bytes < 4 * kFolded) return crc_by_instruction(crc, p, bytes);
  const __m256i first = _mm256_castsi128_si256(_mm_cvtsi32_si128(static_cast<int>(crc)));
  __m256i sums[4] = {_mm256_xor_si256(load(p), _mm256_inserti128_si256(
                                                   first, _mm_setzero_si128(), 1)),
                     load(p + 32), load(p + 64), load(p + 96)};
  const __m256i far = constants(2), near = constants(1);
  for (p += kFolded, bytes -= kFolded; bytes >= kFolded; p += kFolded, bytes -= kFolded)
    for (int s = 0; s < 4; ++s) sums[s] = fold(sums[s], far, load(p + 32 * s));
  __m256i sum = sums[0];
  for (int s = 1; s < 4; ++s) sum = fold(sum, near, sums[s]);
  const __m128i by = _mm256_castsi256_si128(constants(0)), half = _mm256_castsi256_si128(sum);
  const __m128i last = _mm_xor_si128(
      _mm256_extracti128_si256(sum, 1),
      _mm_xor_si128(_mm_clmulepi64_si128(half, by, 0x00), _mm_clmulepi64_si128(half, by, 0x11)));
  const auto low = static_cast<std::uint64_t>(_mm_cvtsi128_si64(last));
  const auto high = static_cast<std::uint64_t>(_mm_extract_epi64(last, 1));
  crc = std::uint32_t(_mm_crc32_u64(_mm_crc32_u64(0, low), high));
  return crc_by_instruction(crc, p, bytes);
}
#endif

}  // namespace

std::uint32_t duck_atomic_add_u32(void* address, std::uint32_t value) {
  return __atomic_fetch_add(static_cast<std::uint32_t*>(address), value, __ATOMIC_SEQ_CST);
}

std::uint32_t duck_crc32c(std::uint32_t crc, const void* data, std::size_t bytes) {
  const auto* p = static_cast<const std::uint8_t*>(data);
#if defined(__x86_64__)
  static const bool folds = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("vpclmulqdq");
  if (folds) return ~crc_by_folding(~crc, p, bytes);
  if (__builtin_cpu_supports("sse4.2")) return ~crc_by_instruction(~crc, p, bytes);
#endif
  return ~crc_by_table(~crc, p, bytes);
}

void duck_bf16_from_f32(const float* from, std::uint16_t* to, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, from + i, sizeof bits);
    const std::uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    const bool nan = (bits & 0x7FFFFFFF) > 0x7F800000;
    to[i] = std::uint16_t(nan ? bits >> 16 | 0x40 : rounded);  // a NaN must not round to infinity
  }
}

void duck_f32_from_bf16(const std::uint16_t* from, float* to, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint32_t bits = std::uint32_t(from[i]) << 16;
    std::memcpy(to + i, &bits, sizeof bits);
  }
}

namespace {

#if defined(__x86_64__) && defined(__GNUC__)
#define DUCK_WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define DUCK_WIDE
#endif

// So many sums stay in the nearest cache while all rows are added to them.
constexpr std::size_t kSums = 2048;

float number(std::uint16_t code) {
  const std::uint32_t bits = std::uint32_t{code} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

float number(float value) { return value; }

template <typename T>
inline __attribute__((always_inline)) void add(const void* from, std::size_t count, bool first,
                                               float* to) {
  const auto* row = static_cast<const T*>(from);
  if (first)
    for (std::size_t i = 0; i < count; ++i) to[i] = number(row[i]);
  else
    for (std::size_t i = 0; i < count; ++i) to[i] += number(row[i]);
}

}  // namespace

DUCK_WIDE void duck_row_add(const void* row, std::size_t count, bool bf16, bool first, float* to) {
  if (bf16)
    add<std::uint16_t>(row, count, first, to);
  else
    add<float>(row, count, first, to);
}

DUCK_WIDE bool duck_row_is_finite(const float* row, std::size_t count) {
  std::uint32_t endless = 0;
  for (std::size_t i = 0; i < count; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, row + i, sizeof bits);
    endless |= (bits & 0x7F800000u) == 0x7F800000u;
  }
  return !endless;
}

int duck_rows_sum(const void* rows, std::size_t stride, int ducks, std::size_t count, int bf16,
                  float* to) {
  bool finite = true;
  const std::size_t size = bf16 ? sizeof(std::uint16_t) : sizeof(float);
  for (std::size_t begin = 0; begin < count; begin += kSums) {
    const std::size_t some = count - begin < kSums ? count - begin : kSums;
    const auto* row = static_cast<const char*>(rows) + begin * size;
    for (int duck = 0; duck < ducks; ++duck)
      duck_row_add(row + duck * stride, some, bf16, duck == 0, to + begin);
    finite = duck_row_is_finite(to + begin, some) && finite;
  }
  return finite;
}
