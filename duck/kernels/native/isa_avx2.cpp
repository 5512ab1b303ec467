// AVX2 + FMA: what an Intel N100 has, and every x86 server.
#include <array>
#include <cstring>
#include <utility>

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

using V = __m256;
constexpr int kLanes = 8;
constexpr int kPair = 1;     // eight chains of fma already; sixteen registers hold no more
constexpr int kMaxRows = 6;  // 12 accumulators, two weights, one input, one mask
constexpr int strips_for(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }

inline V zero() { return _mm256_setzero_ps(); }
inline V set1(const float* p) { return _mm256_broadcast_ss(p); }
inline V add(V a, V b) { return _mm256_add_ps(a, b); }
inline V sub(V a, V b) { return _mm256_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm256_mul_ps(a, b); }
inline V div(V a, V b) { return _mm256_div_ps(a, b); }
inline V min(V a, V b) { return _mm256_min_ps(a, b); }
inline V max(V a, V b) { return _mm256_max_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V load_vector(const float* p) { return _mm256_loadu_ps(p); }
inline void store_vector(float* p, V v) { _mm256_storeu_ps(p, v); }
inline V add_exponent(V v, V n) {
  const __m256i shifted = _mm256_slli_epi32(_mm256_castps_si256(n), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(v), shifted));
}
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

template <int UPPER>
void store_rows(float* p, V v) { store_vector(p, v); }
template <int UPPER>
V row_scale(const float* pair, int row, int split) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(split - row), lane);
  return _mm256_blendv_ps(set1(pair + 1), set1(pair), _mm256_castsi256_ps(below));
}

inline __m256i load_bytes(const std::uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
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
    const __m256i v = _mm256_srai_epi16(_mm256_slli_epi16(load_bytes(p), 8), 4);
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

}  // namespace

const Isa* isa_avx2() {
  static constexpr Isa kIsa{
      "avx2", {format_ops<Fp8>(), format_ops<Bf16>(), format_ops<F32>()}, scale_row, read};
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &kIsa : nullptr;
}

}  // namespace duck

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
namespace duck {
const Isa* isa_avx2() { return nullptr; }
}  // namespace duck
#endif
