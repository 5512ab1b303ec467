// AVX2 + FMA: what an Intel N100 has, and every x86 server.
#include <array>
#include <cstring>
#include <utility>

#include "dots.h"
#include "tile.h"

#if defined(__x86_64__)
#include <immintrin.h>

// After every header: what those define must not be compiled for this instruction set, or the
// linker might keep that copy for everybody. (And no pop: templates are compiled at the end.)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

namespace duck {
namespace {

#include "vectors_avx2.inc"

constexpr int kPair = 1;     // eight chains of fma already; sixteen registers hold no more
constexpr int kMaxRows = 6;  // 12 accumulators, two weights, one input, one mask
constexpr int strips_for(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }

inline V add_exponent(V v, V n) {
  const __m256i shifted = _mm256_slli_epi32(_mm256_castps_si256(n), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(v), shifted));
}

template <int UPPER>
void store_rows(float* p, V v) { store_vector(p, v); }
template <int UPPER>
V row_scale(const float* pair, int row, int split) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(split - row), lane);
  return _mm256_blendv_ps(set1(pair + 1), set1(pair), _mm256_castsi256_ps(below));
}

inline V masked(__m256i v, int mask) {
  return _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(mask)));
}

struct Fp8 {
  static constexpr int kRowBytes = kTile;
  static constexpr int kUpper = 0;
  static constexpr bool kScaled = true;
  static constexpr bool kParity = true;
  static constexpr int at(int strip) { return 32 * (strip / 2); }
  static constexpr int row(int strip, int i) { return 32 * (strip / 2) + 8 * (strip % 2) + 16 * i; }

  // Bytes 0 and 2 of each 32-bit lane (even), or 1 and 3 (odd): the sign spread over the top five
  // bits, the magnitude below it; the mask keeps one sign bit and drops the neighbour byte. Moving
  // whole bytes (bslli) is work for another port than shifting bits, and fma leaves that one free.
  static constexpr int kMask = int(0x87F00000u);
  static void even(const std::uint8_t* p, V* f) {
    const __m256i v = _mm256_srai_epi16(_mm256_bslli_epi128(load_bytes(p), 1), 4);
    f[0] = masked(_mm256_bslli_epi128(v, 2), kMask);
    f[1] = masked(v, kMask);
  }
  static void odd(const std::uint8_t* p, V* f) {
    const __m256i v = _mm256_srai_epi16(load_bytes(p), 4);
    f[0] = masked(_mm256_bslli_epi128(v, 2), kMask);
    f[1] = masked(v, kMask);
  }
};

struct Bf16 {
  static constexpr int kRowBytes = 2 * kTile;
  static constexpr int kUpper = 0;
  static constexpr bool kScaled = false;
  static constexpr bool kParity = false;
  static constexpr int at(int strip) { return 32 * strip; }
  static constexpr int row(int strip, int i) { return 16 * strip + 8 * i; }
  static void even(const std::uint8_t* p, V* f) {
    const __m256i v = load_bytes(p);
    f[0] = _mm256_castsi256_ps(_mm256_slli_epi32(v, 16));
    f[1] = masked(v, int(0xFFFF0000u));
  }
  static void odd(const std::uint8_t* p, V* f) { even(p, f); }
};

struct F32 {
  static constexpr int kRowBytes = 4 * kTile;
  static constexpr int kUpper = 0;
  static constexpr bool kScaled = false;
  static constexpr bool kParity = false;
  static constexpr int at(int strip) { return 64 * strip; }
  static constexpr int row(int strip, int i) { return 16 * strip + 8 * i; }
  static void even(const std::uint8_t* p, V* f) {
    f[0] = load_vector(reinterpret_cast<const float*>(p));
    f[1] = load_vector(reinterpret_cast<const float*>(p) + kLanes);
  }
  static void odd(const std::uint8_t* p, V* f) { even(p, f); }
};

#include "tile_simd.inc"

// Without VNNI: products of bytes are added in pairs, which must fit 16 bits. Those of int4 do;
// int8 weights therefore give their sign to the inputs first.
constexpr int kDotRows = 6;
constexpr int vectors_for(int rows) { return rows <= 2 ? 4 : 2; }
template <Format F>
constexpr bool kStarts = F == Format::int4;
template <Format F>
I dot(I sum, I weights, I inputs) {
  __m256i w = __m256i(weights), x = __m256i(inputs);
  if (F == Format::int8) {
    w = _mm256_xor_si256(w, _mm256_set1_epi8(-128));  // minus 128
    x = _mm256_sign_epi8(x, w);
    w = _mm256_abs_epi8(w);
  }
  const __m256i pairs = _mm256_maddubs_epi16(w, x);
  return sum + I(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

#include "dot_simd.inc"

std::uint64_t read(const std::uint8_t* p, std::size_t bytes) {
  __m256i sum[8] = {};
  for (std::size_t at = 0; at < bytes; at += 256) {
    prefetch(p + at + 4096);
    prefetch(p + at + 4096 + 64);
    prefetch(p + at + 4096 + 128);
    prefetch(p + at + 4096 + 192);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) sum[i] = _mm256_xor_si256(sum[i], load_bytes(p + at + 32 * i));
  }
  for (int i = 1; i < 8; ++i) sum[0] = _mm256_xor_si256(sum[0], sum[i]);
  return std::uint64_t(_mm256_extract_epi64(sum[0], 0)) ^
         std::uint64_t(_mm256_extract_epi64(sum[0], 3));
}

bool supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

Isa isa(const char* name, TilesFunction int8, TilesFunction int4) {
  return {name,
          {format_ops<Fp8>(), format_ops<Bf16>(), format_ops<F32>(), dot_ops<Format::int8>(int8),
           dot_ops<Format::int4>(int4)},
          read};
}

}  // namespace

const Isa* isa_avx2() {
  static const auto tiles = [](Format format, TilesFunction without) {
    const TilesFunction vnni = dots_avxvnni(format);
    return vnni ? vnni : without;
  };
  static const Isa kIsa = isa("avx2", tiles(Format::int8, dot_tiles<Format::int8>),
                              tiles(Format::int4, dot_tiles<Format::int4>));
  return supported() ? &kIsa : nullptr;
}

const Isa* isa_avx2_without_vnni() {
  static const Isa kIsa =
      isa("avx2-no-vnni", dot_tiles<Format::int8>, dot_tiles<Format::int4>);
  return supported() ? &kIsa : nullptr;
}

}  // namespace duck

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
namespace duck {
const Isa* isa_avx2() { return nullptr; }
const Isa* isa_avx2_without_vnni() { return nullptr; }
}  // namespace duck
#endif
