// AVX-512 (F, BW, VL, DQ): the same bytes and the same sums as AVX2, twice as wide.
#include <array>
#include <cstring>
#include <utility>

#include "dots.h"
#include "tile.h"

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC's own AVX-512 header passes deliberately undefined vectors (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

// After every header, and without a pop: see isa_avx2.cpp.
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")
#endif

namespace duck {
namespace {

#include "vectors_avx512.inc"

constexpr int kPair = 2;      // one row: two tiles at a time, for eight chains of fma
constexpr int kMaxRows = 14;  // 28 accumulators, two weights, one input, one mask
constexpr int strips_for(int rows) { return rows <= 6 ? 2 : 1; }

inline V add_exponent(V v, V n) {
  const __m512i shifted = _mm512_slli_epi32(_mm512_castps_si512(n), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(v), shifted));
}

// Lanes 8..15 of a decoded vector are UPPER rows after lanes 0..7.
template <int UPPER>
void store_rows(float* p, V v) {
  _mm256_storeu_ps(p, _mm512_castps512_ps256(v));
  _mm256_storeu_ps(p + UPPER, _mm512_extractf32x8_ps(v, 1));
}
template <int UPPER>
V row_scale(const float* pair, int row, int split) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, UPPER, UPPER + 1, UPPER + 2,
                                         UPPER + 3, UPPER + 4, UPPER + 5, UPPER + 6, UPPER + 7);
  const __mmask16 below = _mm512_cmpgt_epi32_mask(_mm512_set1_epi32(split - row), lane);
  return _mm512_mask_blend_ps(below, set1(pair + 1), set1(pair));
}

inline V masked(__m512i v, int mask) {
  return _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(mask)));
}

struct Fp8 {
  static constexpr int kRowBytes = kTile;
  static constexpr int kUpper = 32;
  static constexpr bool kScaled = true;
  static constexpr bool kParity = true;
  static constexpr int at(int) { return 0; }
  static constexpr int row(int strip, int i) { return 8 * strip + 16 * i; }

  // As in isa_avx2.cpp.
  static constexpr int kMask = int(0x87F00000u);
  static void even(const std::uint8_t* p, V* f) {
    const __m512i v = _mm512_srai_epi16(_mm512_slli_epi16(load_bytes(p), 8), 4);
    f[0] = masked(_mm512_bslli_epi128(v, 2), kMask);
    f[1] = masked(v, kMask);
  }
  static void odd(const std::uint8_t* p, V* f) {
    const __m512i v = _mm512_srai_epi16(load_bytes(p), 4);
    f[0] = masked(_mm512_bslli_epi128(v, 2), kMask);
    f[1] = masked(v, kMask);
  }
};

struct Bf16 {
  static constexpr int kRowBytes = 2 * kTile;
  static constexpr int kUpper = 16;
  static constexpr bool kScaled = false;
  static constexpr bool kParity = false;
  static constexpr int at(int strip) { return 64 * strip; }
  static constexpr int row(int strip, int i) { return 32 * strip + 8 * i; }
  static void even(const std::uint8_t* p, V* f) {
    const __m512i v = load_bytes(p);
    f[0] = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
    f[1] = masked(v, int(0xFFFF0000u));
  }
  static void odd(const std::uint8_t* p, V* f) { even(p, f); }
};

struct F32 {
  static constexpr int kRowBytes = 4 * kTile;
  static constexpr int kUpper = 8;
  static constexpr bool kScaled = false;
  static constexpr bool kParity = false;
  static constexpr int at(int strip) { return 128 * strip; }
  static constexpr int row(int strip, int i) { return 32 * strip + 16 * i; }
  static void even(const std::uint8_t* p, V* f) {
    f[0] = load_vector(reinterpret_cast<const float*>(p));
    f[1] = load_vector(reinterpret_cast<const float*>(p) + kLanes);
  }
  static void odd(const std::uint8_t* p, V* f) { even(p, f); }
};

#include "tile_simd.inc"

std::uint64_t read(const std::uint8_t* p, std::size_t bytes) {
  __m512i sum[4] = {};
  for (std::size_t at = 0; at < bytes; at += 256) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      prefetch(p + at + 4096 + 64 * i);
      sum[i] = _mm512_xor_si512(sum[i], load_bytes(p + at + 64 * i));
    }
  }
  const __m512i all = _mm512_xor_si512(_mm512_xor_si512(sum[0], sum[1]),
                                       _mm512_xor_si512(sum[2], sum[3]));
  std::uint64_t words[8];
  std::memcpy(words, &all, sizeof words);
  return words[0] ^ words[7];
}

}  // namespace

const Isa* isa_avx512() {
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return nullptr;
  // The first processors with AVX-512 lack its VNNI: they take the smaller vectors there.
  static const auto dots = [](Format format) {
    if (const TilesFunction vnni = dots_avx512(format))
      return format == Format::int8 ? dot_ops<Format::int8>(vnni) : dot_ops<Format::int4>(vnni);
    return isa_avx2()->formats[int(format)];
  };
  static const Isa kIsa{"avx512",
                        {format_ops<Fp8>(), format_ops<Bf16>(), format_ops<F32>(),
                         dots(Format::int8), dots(Format::int4)},
                        read};
  return &kIsa;
}

}  // namespace duck

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
namespace duck {
const Isa* isa_avx512() { return nullptr; }
}  // namespace duck
#endif
