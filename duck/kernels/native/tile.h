// What an instruction set must provide, and the resident layout it reads.
//
// A tile is 64 output rows of a weight matrix, stored input by input: the 64 weights that meet
// input k lie together, then those of input k+1. Within such a k-row the rows are permuted so that
// vector code gets at them with shifts and masks alone (see slot_of).
//
// The arithmetic is one fixed sequence of operations per output, the same for every instruction
// set, number of rows and number of threads:
//     for each segment of at most 64 inputs, all of one scale block:
//         acc = 0;  for k in the segment, ascending:  acc = fma(w[k], x[k], acc)
//         total = fma(scale, acc, total)              (without scales: total = total + acc)
// so results are equal bit for bit wherever they are computed. Whoever changes the order of one
// path must change all three (isa_avx2, isa_avx512, isa_portable), and the tests will say so.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace duck {

constexpr int kTile = 64;     // output rows in a tile
constexpr int kBlock = 128;   // edge of a checkpoint's scale blocks
constexpr int kSegment = 64;  // longest chain of fma; half a block halves its rounding error
constexpr int kPanel = kBlock + 16;  // floats from row to row of a panel: see Tiles

enum class Format : int { fp8 = 0, bf16 = 1, f32 = 2, int8 = 3, int4 = 4 };
constexpr int kFormats = 5;

// Whether weights are kept as they are; the others are in dots.h.
constexpr bool is_exact(Format format) { return format <= Format::f32; }

constexpr int weight_bytes(Format format) {  // exact formats
  return format == Format::fp8 ? 1 : format == Format::bf16 ? 2 : 4;
}

// The position, counted in weights, of output row 0..63 within a k-row.
//   fp8:  two groups of 32; byte 4*j + p of a group is row 8*p + j of it. Read as 32-bit lanes,
//         lane j holds rows j, 8+j, 16+j, 24+j, and each is one shift and mask away from a float.
//   bf16: four groups of 16; half p of 32-bit lane j is row 8*p + j of the group.
//   f32:  as is.
inline int slot_of(Format format, int row) {
  const int j = row % 8;
  switch (format) {
    case Format::fp8: return row / 32 * 32 + 4 * j + row % 32 / 8;
    case Format::bf16: return row / 16 * 16 + 2 * j + row % 16 / 8;
    default: return row;
  }
}

// fp8 weights are decoded by moving the code's seven magnitude bits to the top of a float's
// exponent field, which makes them 2^-120 of their value (e4m3 subnormals become float
// denormals, exactly). Inputs are therefore scaled by 2^80 beforehand, and scales by the
// remaining 2^40: products keep 24 bits down to |x| of 2^-77, and inputs from 2^47 upward (far
// beyond any activation) turn into NaN.
constexpr float kInputScale = 0x1p80f;
constexpr float kScaleScale = 0x1p40f;

// `count` tiles, w_stride bytes apart, each times the same n rows of inputs. Row i reads k inputs
// of x[i], from number x_at, and adds to 64 totals at y[i] + y_at + 64 * tile, which lie in the order that
// suits the instruction set.
struct Tiles {
  const std::uint8_t* w;
  std::ptrdiff_t w_stride;
  const float* scale;  // two per scale block: for output rows below `split`, and for the others
  std::ptrdiff_t scale_stride;
  int count;
  int split;
  int k;
  int first;  // inputs in the first scale block: a slice may start in the middle of one
  int n;
  const float* const* x;
  std::ptrdiff_t x_at;
  float* const* y;
  std::ptrdiff_t y_at;
  float* panel;  // room to lay out the inputs of a block: n rows of kPanel
  const std::uint8_t* next;  // what will probably be read after these tiles: a prefetch hint
};

// What depends on both the instruction set and the weights' format.
struct FormatOps {
  void (*tiles)(const Tiles&);
  // A row of n inputs in the form that tiles reads, of Shape::row_floats floats: times `scale`
  // where weights are exact, rounded where they are not.
  void (*take_row)(const float* x, float scale, float* out, int n);
  // From a tile's totals of gate and up, 64 values in row order of h = silu(gate) * up * weight
  // * scale. What is not finite becomes NaN.
  void (*gated)(const float* gate, const float* up, float weight, float scale, float* h);
  // A tile's totals in row order, the first `rows` of them.
  void (*place)(const float* totals, float* out, int rows);
  std::array<std::uint8_t, kTile> position;  // of each output row among a tile's totals
};

struct Isa {
  const char* name;
  FormatOps formats[kFormats];  // by Format
  // Reads bytes (a multiple of 256) as fast as this instruction set can; the sum keeps the
  // compiler honest.
  std::uint64_t (*read)(const std::uint8_t* p, std::size_t bytes);
};

// Null where the compiler's target or this processor lacks the instructions.
const Isa* isa_avx512();
const Isa* isa_avx2();
const Isa* isa_avx2_without_vnni();  // "avx2-no-vnni": for comparison
const Isa* isa_portable();

// exp(z) = 2^n * exp(r): n by the magic-number rounding, r by Cody and Waite's two-part ln 2,
// exp(r) by its Taylor polynomial of degree 7 on |r| <= 0.347. The clamp keeps 2^n normal.
namespace exp_constants {
constexpr float kLow = -87.0f, kHigh = 88.0f;
constexpr float kLog2e = 0x1.715476p0f, kMagic = 0x1.8p23f;
constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
constexpr float kPolynomial[] = {1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f,
                                 1.0f,        1.0f};
}  // namespace exp_constants

}  // namespace duck
