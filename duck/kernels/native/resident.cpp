// See resident.h.
#include "resident.h"

#include <sys/mman.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "duck.h"

namespace duck {
namespace {

constexpr std::size_t kHugePage = std::size_t(2) << 20;

bool finite(const std::uint8_t* p, std::size_t count) {
  std::uint8_t bad = 0;
  for (std::size_t i = 0; i < count; ++i) bad |= (p[i] & 0x7F) == 0x7F;
  return !bad;
}
bool finite(const std::uint16_t* p, std::size_t count) {
  std::uint16_t bad = 0;
  for (std::size_t i = 0; i < count; ++i) bad |= (p[i] & 0x7F80) == 0x7F80;
  return !bad;
}
bool finite(const std::uint32_t* p, std::size_t count) {
  std::uint32_t bad = 0;
  for (std::size_t i = 0; i < count; ++i) bad |= (p[i] & 0x7F800000u) == 0x7F800000u;
  return !bad;
}
bool finite(const float* p, std::size_t count, float factor) {
  for (std::size_t i = 0; i < count; ++i)
    if (!std::isfinite(p[i] * factor)) return false;
  return true;
}

// A matrix as a checkpoint has it: [rows, inputs], rows `stride` weights apart.
struct Matrix {
  const void* data;
  std::ptrdiff_t stride;
  int rows, inputs;

  template <class T>
  const T* row(int i) const { return static_cast<const T*>(data) + i * stride; }
  template <class T>
  bool all_finite() const {
    for (int i = 0; i < rows; ++i)
      if (!finite(row<T>(i), inputs)) return false;
    return true;
  }
};

// Into tiles; rows beyond the last are zero. T has the size of a weight.
template <class T>
std::uint8_t* pack_matrix(Format format, const Matrix& m, std::uint8_t* to) {
  const int rows = m.rows, inputs = m.inputs;
  for (int tile = 0; tile < div_up(rows, kTile); ++tile) {
    T* out = reinterpret_cast<T*>(to) + std::size_t(tile) * inputs * kTile;
    for (int k = 0; k < inputs; k += 64)  // a stretch of the tile that stays in L1
      for (int r = 0; r < kTile; ++r) {
        const int row = tile * kTile + r;
        const T* in = row < rows ? m.row<T>(row) + k : nullptr;
        const int end = inputs - k < 64 ? inputs - k : 64;
        T* slot = out + std::size_t(k) * kTile + slot_of(format, r);
        for (int i = 0; i < end; ++i, slot += kTile) *slot = in ? in[i] : T(0);
      }
  }
  return to + std::size_t(div_up(rows, kTile)) * inputs * kTile * sizeof(T);
}

template <class T>
int pack_record(const Shape& s, const Slice& slice, std::uint8_t* record) {
  const Matrix gate{slice.gate, slice.gate_stride, s.columns, s.hidden};
  const Matrix up{slice.up, slice.up_stride, s.columns, s.hidden};
  const Matrix down{slice.down, slice.down_stride, s.hidden, s.columns};
  for (const Matrix* m : {&gate, &up, &down})
    if (!m->all_finite<T>()) return DUCK_NOT_A_NUMBER;
  for (const Matrix* m : {&gate, &up, &down}) record = pack_matrix<T>(s.format, *m, record);
  return DUCK_OK;
}

std::uint16_t bf16_from(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return std::uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
float from_bf16(std::uint16_t half) {
  const std::uint32_t bits = std::uint32_t(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The nearest whole number, ties to even, of |value| < 2^22.
float nearest(float value) { return (value + 0x1.8p23f) - 0x1.8p23f; }

// The step of a group of weights, as it will be read, written to `to`. int8: the largest is 127
// steps. int4: the largest is -8 of them, whatever its sign, for there is no +8.
float put_step(Format format, const float* weights, int count, std::uint8_t* to) {
  float largest = 0.0f;
  for (int i = 0; i < count; ++i)
    if (std::fabs(weights[i]) > std::fabs(largest)) largest = weights[i];
  if (std::fabs(largest) < 0x1p-100f) largest = 0.0f;  // so that the step is a normal number
  if (format == Format::int8) {
    const float step = std::fabs(largest) / 127.0f;
    std::memcpy(to, &step, sizeof step);
    return step;
  }
  const std::uint16_t half = bf16_from(largest / -8.0f);
  std::memcpy(to, &half, sizeof half);
  return from_bf16(half);
}

// Into tiles of dots.h; rows beyond the last are zero.
std::uint8_t* pack_rounded(Format format, const Matrix& m, std::uint8_t* to) {
  const int group = group_inputs(format), zero = zero_point(format);
  const int per_word = format == Format::int8 ? 4 : 8;
  for (int tile = 0; tile < div_up(m.rows, kTile); ++tile)
    for (int k = 0; k < m.inputs; k += group) {
      const int count = m.inputs - k < group ? m.inputs - k : group;
      std::uint8_t* const words = to + kTile * step_bytes(format);
      const std::ptrdiff_t bytes = tile_bytes(format, count);
      std::memset(to, 0, bytes);
      for (int r = 0; r < kTile; ++r) {
        const int row = tile * kTile + r;
        const float* const in = row < m.rows ? m.row<float>(row) + k : nullptr;
        const float step = in ? put_step(format, in, count, to + r * step_bytes(format)) : 0.0f;
        for (int i = 0; i < round_up_inputs(count); ++i) {
          const float steps = in && i < count && step != 0.0f ? nearest(in[i] / step) : 0.0f;
          const float least = format == Format::int8 ? -127.0f : -8.0f;
          const float most = format == Format::int8 ? 127.0f : 7.0f;
          const int q = int(steps < least ? least : steps > most ? most : steps) + zero;
          std::uint8_t& byte = words[i / per_word * 4 * kTile + 4 * r + i % 4];
          byte = std::uint8_t(byte | (i % per_word < 4 ? q : q << 4));
        }
      }
      to += bytes;
    }
  return to;
}

int pack_rounded_record(const Shape& s, const Slice& slice, std::uint8_t* record) {
  const Matrix gate{slice.gate, slice.gate_stride, s.columns, s.hidden};
  const Matrix up{slice.up, slice.up_stride, s.columns, s.hidden};
  const Matrix down{slice.down, slice.down_stride, s.hidden, s.columns};
  for (const Matrix* m : {&gate, &up, &down})
    if (!m->all_finite<std::uint32_t>()) return DUCK_NOT_A_NUMBER;
  for (const Matrix* m : {&gate, &up, &down}) record = pack_rounded(s.format, *m, record);
  return DUCK_OK;
}

// Whether every step of a packed record is a number.
bool finite_steps(const Shape& s, const std::uint8_t* record) {
  const int group = group_inputs(s.format);
  for (int tile = 0; tile < 2 * s.tiles() + s.down_tiles(); ++tile) {
    const int inputs = tile < 2 * s.tiles() ? s.hidden : s.columns;
    for (int k = 0; k < inputs; k += group) {
      std::uint32_t words[kTile];
      std::uint16_t halves[kTile];
      std::memcpy(words, record, sizeof words);
      std::memcpy(halves, record, sizeof halves);
      if (!(s.format == Format::int8 ? finite(words, kTile) : finite(halves, kTile))) return false;
      record += tile_bytes(s.format, inputs - k < group ? inputs - k : group);
    }
  }
  return true;
}

void pack_scales(const Shape& s, const Slice& slice, float* out) {
  const int first_block = slice.start / kBlock, last = slice.start + s.columns - 1;
  const int column_blocks = last / kBlock - first_block + 1;
  for (const float* from : {slice.gate_scale, slice.up_scale})
    for (int tile = 0; tile < s.tiles(); ++tile) {
      // The blocks of the rows before and after the split; after the last column there is none.
      const int row = slice.start + tile * kTile;
      const int split = row + split_of(slice.start);
      const int below = row / kBlock - first_block;
      const int above = (split < last ? split : last) / kBlock - first_block;
      for (int b = 0; b < s.blocks(); ++b, out += 2) {
        out[0] = from[std::ptrdiff_t(below) * s.blocks() + b] * kScaleScale;
        out[1] = from[std::ptrdiff_t(above) * s.blocks() + b] * kScaleScale;
      }
    }
  for (int tile = 0; tile < s.down_tiles(); ++tile) {
    const float* from = slice.down_scale + std::ptrdiff_t(tile * kTile / kBlock) * column_blocks;
    for (int b = 0; b < s.down_blocks(); ++b, out += 2)
      out[0] = out[1] = b < column_blocks ? from[b] * kScaleScale : 0.0f;
  }
}

bool is_stray(std::uint8_t code) { return std::uint8_t((code & 0x7F) - 1) < 7; }

// Whether any of 64 codes is a stray, or NaN: eight at a time, because a slice that is loaded passes
// through here at the speed of a disk. No sum carries into the next byte.
struct Found {
  bool stray, nan;
};
Found look(const std::uint8_t* codes) {
  constexpr std::uint64_t kOnes = 0x0101010101010101u;
  std::uint64_t stray = 0, nan = 0;  // in bit 7 of each byte
  for (int i = 0; i < kTile; i += 8) {
    std::uint64_t eight;
    std::memcpy(&eight, codes + i, 8);
    const std::uint64_t normal = (eight & kOnes * 0x78) + kOnes * 0x78;   // exponent not 0
    const std::uint64_t nonzero = (eight & kOnes * 0x07) + kOnes * 0x7F;  // mantissa not 0
    stray |= ~normal & nonzero;
    nan |= (eight & kOnes * 0x7F) + kOnes;  // all seven bits set
  }
  return {(stray & kOnes * 0x80) != 0, (nan & kOnes * 0x80) != 0};
}

}  // namespace

int pack(const Shape& s, const Slice& slice, std::uint8_t* record, float* scales) {
  if (s.scaled()) {
    const std::size_t column_blocks =
        (slice.start + s.columns - 1) / kBlock - slice.start / kBlock + 1;
    for (const float* from : {slice.gate_scale, slice.up_scale, slice.down_scale})
      if (!finite(from, column_blocks * s.blocks(), kScaleScale)) return DUCK_NOT_A_NUMBER;
  }
  const int status = !is_exact(s.format)        ? pack_rounded_record(s, slice, record)
                     : s.format == Format::fp8  ? pack_record<std::uint8_t>(s, slice, record)
                     : s.format == Format::bf16 ? pack_record<std::uint16_t>(s, slice, record)
                                                : pack_record<std::uint32_t>(s, slice, record);
  if (status == DUCK_OK && s.scaled()) pack_scales(s, slice, scales);
  return status;
}

Mapping::~Mapping() {
  if (base_) munmap(base_, mapped_);
}

bool Mapping::map(std::size_t bytes) {
  mapped_ = round_up(bytes, kHugePage) + kHugePage;  // room to align
  void* base = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) return false;
  base_ = base;
  const auto address = reinterpret_cast<std::uintptr_t>(base);
  data_ = static_cast<std::uint8_t*>(base) + (round_up(address, kHugePage) - address);
#if defined(MADV_HUGEPAGE)
  madvise(data_, round_up(bytes, kHugePage), MADV_HUGEPAGE);  // a refusal costs speed, no more
#endif
  return true;
}

bool Strays::take(const Shape& s, std::uint8_t* record) {
  list_.reset();
  const std::size_t bytes = s.record_bytes();
  std::vector<std::size_t> places;
  bool rare = s.columns <= kInputs, nan = false;
  for (std::size_t at = 0; at < bytes; at += kTile) {
    const Found found = look(record + at);
    nan |= found.nan;
    for (std::size_t i = at; found.stray && rare && i < at + kTile; ++i)
      if (is_stray(record[i])) {
        places.push_back(i);
        rare = places.size() <= bytes / 256;
      }
  }
  if (nan) return false;
  if (!rare || places.empty()) return true;

  int row_of[kTile];
  for (int row = 0; row < kTile; ++row) row_of[slot_of(s.format, row)] = row;
  const int pieces = 2 * s.tiles() * s.chunks() + s.down_tiles();
  list_.reset(new Stray[pieces + 1 + places.size()]);
  std::uint32_t at = std::uint32_t(pieces + 1);
  int piece = 0;
  std::size_t begin = 0;  // of the piece, in the record
  auto next = places.begin();
  auto take_piece = [&](int inputs) {
    list_[piece++].bits = at;
    const std::size_t end = begin + std::size_t(inputs) * kTile;
    for (; next != places.end() && *next < end; ++next) {
      const std::uint32_t input = std::uint32_t((*next - begin) / kTile);
      const std::uint32_t row = std::uint32_t(row_of[*next % kTile]);
      list_[at++].bits = input << 14 | row << 8 | record[*next];
      record[*next] = 0;
    }
    begin = end;
  };
  for (int tile = 0; tile < 2 * s.tiles(); ++tile)
    for (int k = 0; k < s.hidden; k += kChunk)
      take_piece(s.hidden - k < kChunk ? s.hidden - k : kChunk);
  for (int tile = 0; tile < s.down_tiles(); ++tile) take_piece(s.columns);
  list_[piece].bits = at;
  return true;
}

bool Resident::allocate() {
  if (double(records()) * double(shape.record_bytes()) >
      double(std::numeric_limits<std::ptrdiff_t>::max() / 4))
    return false;
  start_.reset(new std::atomic<int>[records()]);
  for (std::size_t i = 0; i < records(); ++i) start_[i].store(-1);
  strays_.reset(new Strays[records()]);
  return arena_.map(bytes());
}

int Resident::load(int layer, int expert, const Slice& slice) {
  start_[index(layer, expert)].store(-1);
  const int status = pack(shape, slice, record(layer, expert), scales(layer, expert));
  return status == DUCK_OK ? adopt(layer, expert, slice.start) : status;
}

int Resident::adopt(int layer, int expert, int start) {
  start_[index(layer, expert)].store(-1);
  std::uint8_t* p = record(layer, expert);
  if (!finite(scales(layer, expert), shape.scale_floats(), 1.0f) ||
      !settle(strays_[index(layer, expert)], p))
    return DUCK_NOT_A_NUMBER;
  start_[index(layer, expert)].store(start % kBlock, std::memory_order_release);
  return DUCK_OK;
}

bool Resident::settle(Strays& strays, std::uint8_t* record) const {
  const std::size_t bytes = shape.record_bytes();
  switch (shape.format) {
    case Format::fp8: return strays.take(shape, record);
    case Format::bf16: return finite(reinterpret_cast<const std::uint16_t*>(record), bytes / 2);
    case Format::f32: return finite(reinterpret_cast<const std::uint32_t*>(record), bytes / 4);
    default: return finite_steps(shape, record);
  }
}

}  // namespace duck
