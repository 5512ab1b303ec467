// The lossy residents: integer weights, multiplied by integer inputs.
//
// Weights are rounded when they are packed, inputs when they arrive (and h between the two halves
// of an expert): to a whole number of steps, the step being chosen for each row and group of
// consecutive inputs. A group's products are summed as integers, which is exact in any order; then
//     total = fma(weight step * input step, float(sum), total)        group after group,
// so these results too are equal bit for bit wherever they are computed.
//
//     int8   -127..127, groups of 128, step a float: 8.25 bits a weight
//     int4     -8..7,   groups of 32, step a bfloat16: 4.5 bits a weight
//
// A tile is a sequence of groups: the steps of its 64 rows, then their weights, plus 128 or 8 so
// that none is negative, in words of four bytes that meet four consecutive inputs:
//     int8   for every 4 inputs: 64 words, one a row
//     int4   for every 8 inputs: 64 words, one a row; inputs 0-3 in the low half of each byte,
//            4-7 in the high half
// The last group ends with zeros, at the next multiple of 32 inputs.
#pragma once

#include <cstddef>

#include "tile.h"

namespace duck {

constexpr int kRunUp = 32;  // inputs are padded to a multiple of this

constexpr int group_inputs(Format format) { return format == Format::int8 ? 128 : 32; }
constexpr int zero_point(Format format) { return format == Format::int8 ? 128 : 8; }
constexpr int step_bytes(Format format) { return format == Format::int8 ? 4 : 2; }
constexpr int weight_bits(Format format) { return format == Format::int8 ? 8 : 4; }

constexpr int round_up_inputs(int inputs) { return (inputs + kRunUp - 1) / kRunUp * kRunUp; }

// Bytes of the first `inputs` inputs of a tile; of a whole tile, or a multiple of a group.
constexpr std::ptrdiff_t tile_bytes(Format format, int inputs) {
  const int group = group_inputs(format);
  return (inputs + group - 1) / group * std::ptrdiff_t(kTile * step_bytes(format)) +
         round_up_inputs(inputs) * std::ptrdiff_t(kTile * weight_bits(format) / 8);
}

// How a group of inputs begins; as many bytes as it has inputs follow.
struct InputGroup {
  float step;
  std::int32_t start;  // what the sum starts from: it takes the 128 or 8 out of the weights again
};
constexpr int input_group_bytes(Format format) {
  return int(sizeof(InputGroup)) + group_inputs(format);
}

// The tile arithmetic of int8 and int4 through instructions that the instruction set's name does
// not promise; null where this processor or compiler lacks them.
using TilesFunction = void (*)(const Tiles&);
TilesFunction dots_avx512(Format format);   // AVX512-VNNI
TilesFunction dots_avxvnni(Format format);  // AVX-VNNI: vectors of 256 bits

}  // namespace duck
