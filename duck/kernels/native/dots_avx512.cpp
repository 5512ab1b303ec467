// int8 and int4 residents on AVX512-VNNI.
#include <array>
#include <cstring>
#include <utility>

#include "dots.h"

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// See isa_avx512.cpp.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

// After every header, and without a pop: see isa_avx2.cpp.
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#endif

namespace duck {
namespace {

#include "vectors_avx512.inc"

constexpr int kDotRows = 12;  // 24 sums
constexpr int vectors_for(int rows) { return rows <= 5 ? 4 : 2; }

template <Format F>
constexpr bool kStarts = true;
template <Format F>
I dot(I sum, I w, I x) {
  return I(_mm512_dpbusd_epi32(__m512i(sum), __m512i(w), __m512i(x)));
}

#include "dot_simd.inc"

}  // namespace

TilesFunction dots_avx512(Format format) {
  if (!__builtin_cpu_supports("avx512vnni")) return nullptr;
  return format == Format::int8 ? dot_tiles<Format::int8> : dot_tiles<Format::int4>;
}

}  // namespace duck

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
namespace duck {
TilesFunction dots_avx512(Format) { return nullptr; }
}  // namespace duck
#endif
