// int8 and int4 residents on AVX-VNNI: an Intel N100 has it, and no AVX-512.
#include <array>
#include <cstring>
#include <utility>

#include "dots.h"

#if defined(__x86_64__) && __has_include(<avxvnniintrin.h>)
#include <cpuid.h>
#include <immintrin.h>

// After every header, and without a pop: see isa_avx2.cpp.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avxvnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,avxvnni")
#endif

namespace duck {
namespace {

#include "vectors_avx2.inc"

constexpr int kDotRows = 6;  // 12 sums, two vectors of weights, one input, one mask
constexpr int vectors_for(int rows) { return rows == 1 ? 8 : rows == 2 ? 4 : 2; }

template <Format F>
constexpr bool kStarts = true;
template <Format F>
I dot(I sum, I w, I x) {
  return I(_mm256_dpbusd_avx_epi32(__m256i(sum), __m256i(w), __m256i(x)));
}

#include "dot_simd.inc"

}  // namespace

TilesFunction dots_avxvnni(Format format) {
  unsigned eax = 0, ebx, ecx, edx;  // leaf 7, subleaf 1, EAX bit 4 (Intel's manual, CPUID)
  if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) || !(eax & 1u << 4)) return nullptr;
  return format == Format::int8 ? dot_tiles<Format::int8> : dot_tiles<Format::int4>;
}

}  // namespace duck

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
namespace duck {
TilesFunction dots_avxvnni(Format) { return nullptr; }
}  // namespace duck
#endif
