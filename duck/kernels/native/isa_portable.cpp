// The tile arithmetic in plain C++: the only path on machines without AVX2, and the plainest
// statement of what the vector paths compute. A compiler whose target has a fused multiply-add
// (arm64) turns the loops over rows into vector code; x86 without AVX2 calls the C library's
// fmaf, which is slow but gives the same bits.
#include <cmath>
#include <cstring>

#include "dots.h"
#include "tile.h"

namespace duck {
namespace {

float from_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <Format F>
float weight(const std::uint8_t* w, int slot);

template <>
inline float weight<Format::fp8>(const std::uint8_t* w, int slot) {
  const std::int32_t code = static_cast<std::int8_t>(w[slot]);
  return from_bits((std::uint32_t(code) << 20) & 0x87F00000u);
}
template <>
inline float weight<Format::bf16>(const std::uint8_t* w, int slot) {
  std::uint16_t half;
  std::memcpy(&half, w + 2 * slot, sizeof half);
  return from_bits(std::uint32_t(half) << 16);
}
template <>
inline float weight<Format::f32>(const std::uint8_t* w, int slot) {
  float value;
  std::memcpy(&value, w + 4 * slot, sizeof value);
  return value;
}

#include "round_inputs.inc"

// A weight of a group of int8 or int4: input k of row.
template <Format F>
int step_count(const std::uint8_t* w, int k, int row) {
  if (F == Format::int8) return int(w[k / 4 * 4 * kTile + 4 * row + k % 4]) - 128;
  const int pair = w[k / 8 * 4 * kTile + 4 * row + k % 4];
  return (k % 8 < 4 ? pair & 15 : pair >> 4) - 8;
}
template <Format F>
float step(const std::uint8_t* steps, int row) {
  float value = 0;
  if (F == Format::int8) {
    std::memcpy(&value, steps + 4 * row, sizeof value);
    return value;
  }
  std::uint16_t half;
  std::memcpy(&half, steps + 2 * row, sizeof half);
  return from_bits(std::uint32_t(half) << 16);
}

template <Format F>
void dot_tiles(const Tiles& t) {
  constexpr int kGroup = group_inputs(F);
  for (int c = 0; c < t.count; ++c)
    for (int i = 0; i < t.n; ++i) {
      const std::uint8_t* w = t.w + c * t.w_stride;
      const auto* x = reinterpret_cast<const std::uint8_t*>(t.x[i]) +
                      t.x_at / kGroup * input_group_bytes(F);
      float* y = t.y[i] + t.y_at + c * kTile;
      for (int k = 0; k < t.k; k += kGroup, x += input_group_bytes(F)) {
        InputGroup head;
        std::memcpy(&head, x, sizeof head);
        std::int8_t inputs[kGroup];
        std::memcpy(inputs, x + sizeof head, sizeof inputs);
        const int some = t.k - k < kGroup ? t.k - k : kGroup;
        for (int row = 0; row < kTile; ++row) {
          std::int32_t sum = 0;
          for (int j = 0; j < some; ++j)
            sum += step_count<F>(w + kTile * step_bytes(F), j, row) * inputs[j];
          y[row] = std::fmaf(step<F>(w, row) * head.step, float(sum), y[row]);
        }
        w += tile_bytes(F, some);
      }
    }
}

// In slot order while accumulating: the loops then run over consecutive bytes.
template <Format F>
void tiles(const Tiles& t) {
  const int row_bytes = kTile * weight_bytes(F);
  for (int c = 0; c < t.count; ++c)
    for (int i = 0; i < t.n; ++i) {
      const std::uint8_t* w = t.w + c * t.w_stride;
      const float* scale = t.scale + c * t.scale_stride;
      const float* x = t.x[i] + t.x_at;
      float* y = t.y[i] + t.y_at + c * kTile;
      for (int k = 0, border = t.first; k < t.k;) {
        if (k == border) {
          border += kBlock;
          scale += 2;
        }
        int end = k + kSegment < border ? k + kSegment : border;
        if (end > t.k) end = t.k;
        float acc[kTile] = {};
        for (; k < end; ++k, w += row_bytes)
          for (int s = 0; s < kTile; ++s) acc[s] = std::fmaf(weight<F>(w, s), x[k], acc[s]);
        for (int row = 0; row < kTile; ++row) {
          const float a = acc[slot_of(F, row)];
          y[row] = F == Format::fp8 ? std::fmaf(scale[row >= t.split], a, y[row]) : y[row] + a;
        }
      }
    }
}

float exp_float(float z) {
  using namespace exp_constants;
  z = z < kHigh ? z : kHigh;
  z = z > kLow ? z : kLow;
  const float t = std::fmaf(z, kLog2e, kMagic);
  const float n = t - kMagic;
  const float r = std::fmaf(n, -kLn2Low, std::fmaf(n, -kLn2High, z));
  float p = kPolynomial[0];
  for (int i = 1; i < 8; ++i) p = std::fmaf(p, r, kPolynomial[i]);
  std::uint32_t bits, shift;
  std::memcpy(&bits, &p, sizeof bits);
  std::memcpy(&shift, &t, sizeof shift);
  return from_bits(bits + (shift << 23));
}

void gated(const float* gate, const float* up, float weight, float scale, float* h) {
  for (int i = 0; i < kTile; ++i) {
    const float silu = gate[i] / (1.0f + exp_float(-gate[i]));
    const float v = silu * up[i] * weight * scale;
    h[i] = v + (v - v);  // infinities become NaN
  }
}

void place(const float* totals, float* out, int rows) {
  std::memcpy(out, totals, rows * sizeof(float));
}

void scale_row(const float* x, float scale, float* out, int n) {
  for (int i = 0; i < n; ++i) out[i] = x[i] * scale;
}

template <Format F>
constexpr FormatOps format_ops() {
  FormatOps ops{nullptr, nullptr, gated, place, {}};
  if constexpr (is_exact(F)) {
    ops.tiles = tiles<F>;
    ops.take_row = scale_row;
  } else {
    ops.tiles = dot_tiles<F>;
    ops.take_row = round_inputs<F>;
  }
  for (int i = 0; i < kTile; ++i) ops.position[i] = std::uint8_t(i);
  return ops;
}

std::uint64_t read(const std::uint8_t* p, std::size_t bytes) {
  std::uint64_t sum[8] = {};
  for (std::size_t at = 0; at < bytes; at += 64) {
    std::uint64_t word[8];
    std::memcpy(word, p + at, sizeof word);
    for (int i = 0; i < 8; ++i) sum[i] ^= word[i];
  }
  for (int i = 1; i < 8; ++i) sum[0] ^= sum[i];
  return sum[0];
}

}  // namespace

const Isa* isa_portable() {
  static constexpr Isa kIsa{
      "scalar",
      {format_ops<Format::fp8>(), format_ops<Format::bf16>(), format_ops<Format::f32>(),
       format_ops<Format::int8>(), format_ops<Format::int4>()},
      read};
  return &kIsa;
}

}  // namespace duck
