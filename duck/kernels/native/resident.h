// Where the experts of one duck lie in memory, and how they get there.
//
// One mapping of huge pages holds a record per expert, layer by layer: gate tiles, up tiles, down
// tiles (tile.h). Scales lie apart, behind all records: for each tile and scale block of inputs two
// floats, because a tile may cross one border between blocks of rows.
//
// Strays: an e4m3 subnormal would decode to a float denormal, which costs an Intel core over a
// hundred cycles whenever a multiplication meets one (AMD's nothing). Trained weights hold one in
// about eight thousand. Where they are as rare as that, they are taken out of the tiles (a zero
// stays behind) and kept in a list, whose products are added after the tiles' own: as exact as
// before, at the full speed of the rest. An expert full of them keeps them in place.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "dots.h"
#include "tile.h"

namespace duck {

// The inputs of gate and up are summed in chunks of this many, and the chunks' totals in order.
// It fixes results, so it must not depend on rows, threads or processor.
constexpr int kChunk = 1024;

constexpr int kMost = 1 << 22;  // of anything counted: products of three fit 64 bits with ease

constexpr int div_up(int a, int b) { return (a + b - 1) / b; }
constexpr std::size_t round_up(std::size_t a, std::size_t b) { return (a + b - 1) / b * b; }

struct Shape {
  int hidden, columns;
  Format format;

  bool valid() const {
    return hidden > 0 && hidden <= kMost && columns > 0 && columns <= kMost &&
           int(format) >= 0 && int(format) < kFormats;
  }
  bool scaled() const { return format == Format::fp8; }

  int tiles() const { return div_up(columns, kTile); }  // of gate; as many of up
  int down_tiles() const { return div_up(hidden, kTile); }
  int chunks() const { return div_up(hidden, kChunk); }
  // Bytes of the first `inputs` inputs of a tile: all of them, or a multiple of kBlock.
  std::size_t bytes_of(int inputs) const {
    return is_exact(format) ? std::size_t(inputs) * kTile * weight_bytes(format)
                            : tile_bytes(format, inputs);
  }
  std::size_t gate_tile_bytes() const { return bytes_of(hidden); }
  std::size_t down_tile_bytes() const { return bytes_of(columns); }
  std::size_t gate_bytes() const { return tiles() * gate_tile_bytes(); }
  std::size_t record_bytes() const { return 2 * gate_bytes() + down_tiles() * down_tile_bytes(); }

  // Floats that a row of inputs takes once it is in the form that tiles read.
  int row_floats(int inputs) const {
    return is_exact(format) ? inputs
                            : div_up(inputs, group_inputs(format)) * input_group_bytes(format) / 4;
  }

  int blocks() const { return div_up(hidden, kBlock); }
  // One more than aligned slices need: a slice may begin and end in the middle of a block.
  int down_blocks() const { return div_up(columns + kBlock - 1, kBlock); }
  std::size_t gate_scales() const { return std::size_t(tiles()) * blocks() * 2; }
  std::size_t down_scales() const { return std::size_t(down_tiles()) * down_blocks() * 2; }
  std::size_t scale_floats() const { return scaled() ? 2 * gate_scales() + down_scales() : 0; }
};

// One expert's slice as a checkpoint has it, or in floats: see duck_pack.
struct Slice {
  int start;
  const void *gate, *up, *down;
  std::ptrdiff_t gate_stride, up_stride, down_stride;
  const float *gate_scale, *up_scale, *down_scale;
};

// Writes record_bytes and scale_floats; DUCK_OK, or DUCK_NOT_A_NUMBER with nothing written.
int pack(const Shape& shape, const Slice& slice, std::uint8_t* record, float* scales);

// An anonymous mapping, on huge pages where the kernel has them.
class Mapping {
 public:
  Mapping() = default;
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  bool map(std::size_t bytes);
  std::uint8_t* data() const { return data_; }

 private:
  void* base_ = nullptr;
  std::size_t mapped_ = 0;
  std::uint8_t* data_ = nullptr;
};

// The strays of one expert, grouped by the pieces in which a forward pass takes its weights: a
// chunk of a gate tile, a chunk of an up tile, or a down tile.
class Strays {
 public:
  struct Stray {
    std::uint32_t bits;
    int code() const { return int(bits & 0xFF); }
    int row() const { return int(bits >> 8 & 0x3F); }
    int input() const { return int(bits >> 14); }  // within the piece
  };
  static constexpr int kInputs = 1 << 18;  // that fit into `bits`

  // Moves the strays of a packed fp8 record into the list, if they are few. False if a code is NaN.
  bool take(const Shape& shape, std::uint8_t* record);

  const Stray* begin(int piece) const { return list_.get() + first(piece); }
  const Stray* end(int piece) const { return list_.get() + first(piece + 1); }
  bool none() const { return !list_; }
  void prefetch_index(int piece) const {
    if (list_) __builtin_prefetch(list_.get() + piece);
  }

 private:
  // Where a piece's strays begin, counted in elements of the same array that holds them.
  std::uint32_t first(int piece) const { return list_[piece].bits; }
  std::unique_ptr<Stray[]> list_;
};

class Resident {
 public:
  const Shape shape;
  const int layers, experts;

  Resident(const Shape& s, int layer_count, int expert_count)
      : shape(s), layers(layer_count), experts(expert_count) {}
  bool allocate();

  // Both: DUCK_OK or DUCK_NOT_A_NUMBER; after the latter the expert is not loaded.
  int load(int layer, int expert, const Slice& slice);
  int adopt(int layer, int expert, int start);  // record and scales are filled in already

  std::size_t bytes() const {
    return records() * (shape.record_bytes() + shape.scale_floats() * sizeof(float));
  }
  std::uint8_t* data() const { return arena_.data(); }
  std::uint8_t* record(int layer, int expert) const {
    return arena_.data() + index(layer, expert) * shape.record_bytes();
  }
  float* scales(int layer, int expert) const {
    return reinterpret_cast<float*>(arena_.data() + records() * shape.record_bytes()) +
           index(layer, expert) * shape.scale_floats();
  }
  const Strays& strays(int layer, int expert) const { return strays_[index(layer, expert)]; }
  // The slice's first column within its scale block; -1: not loaded.
  int start(int layer, int expert) const {
    return start_[index(layer, expert)].load(std::memory_order_acquire);
  }

 private:
  std::size_t records() const { return std::size_t(layers) * experts; }
  std::size_t index(int layer, int expert) const { return std::size_t(layer) * experts + expert; }
  bool settle(Strays& strays, std::uint8_t* record) const;  // false: not all of it are numbers

  Mapping arena_;
  std::unique_ptr<std::atomic<int>[]> start_;
  std::unique_ptr<Strays[]> strays_;
};

// The first row of every tile that belongs to the next block of rows; 0 if tiles fit the blocks.
inline int split_of(int start) { return (kTile - start % kTile) % kTile; }

}  // namespace duck
