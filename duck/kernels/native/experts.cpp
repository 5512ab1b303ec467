// One forward pass over the routed experts of a layer, and the C interface to it.
//
// The rows are sorted by expert; then one list of work items goes to the pool:
//     gate and up  (expert, tile, piece of the inputs), ending in h = silu(g) * u * weight
//     down         (range of outputs), for each expert in ascending order adding to the outputs
// An output belongs to one item, so no two threads ever add to the same number, and its sum has
// one order. A down item waits for each expert's h as it comes to it, not for all: nobody stands
// still at a barrier between the two kinds.
#include <cstdlib>
#include <cstring>
#include <exception>
#include <limits>
#include <memory>
#include <mutex>
#include <new>

#include "duck.h"
#include "pool.h"
#include "resident.h"

namespace duck {
namespace {

// Memory that grows and is reused by the next call; contents are not kept when it grows.
template <class T>
class Buffer {
 public:
  T* get(std::size_t count) {
    if (count > count_) {
      data_.reset();
      count_ = 0;
      void* p = std::aligned_alloc(64, round_up(count * sizeof(T), 64));
      if (!p) throw std::bad_alloc();
      data_.reset(static_cast<T*>(p));
      count_ = count;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
  std::size_t count_ = 0;
};

// An expert that at least one row has chosen, and where its rows stand in the sorted list.
struct Active {
  int expert;
  int begin, count;
  std::atomic<int> unfinished;  // tiles whose h is not ready, and the rounding of all of it
};

// What a forward pass needs besides the weights, kept from one to the next.
struct Scratch {
  Buffer<int> seen, count;
  Buffer<Active> active;
  Buffer<float> x, h, taken, y, weight, totals, panel;
  Buffer<const float*> x_rows, h_rows;
  Buffer<float*> y_rows, total_rows;
  Buffer<std::atomic<int>> pieces_left;
};

// The distance of rows in scratch, in floats. A cache line more than a multiple of two, or the rows
// of one expert would all compete for the same few places of the L1 cache (7168 floats are 7 * 4096
// bytes).
std::size_t stride(int columns) { return round_up(columns, 32) + 16; }

}  // namespace
}  // namespace duck

using namespace duck;

struct duck_pool {
  duck_pool(int threads, int spin_us, bool pin) : pool(threads, spin_us, pin) {}
  Pool pool;
  std::mutex busy;
};

struct duck_experts {
  duck_experts(const Shape& shape, int layers, int experts, const Isa* chosen)
      : resident(shape, layers, experts), isa(chosen) {}
  Resident resident;
  const Isa* isa;
  Scratch scratch;
  std::mutex busy;

  bool has(int layer, int expert) const {
    return layer >= 0 && layer < resident.layers && expert >= 0 && expert < resident.experts;
  }
};

namespace duck {
namespace {

// One call of duck_experts_forward, once its arguments are known to be good.
class Forward {
 public:
  // active: experts chosen by any row; assigned: pairs of row and expert; most: rows of the expert
  // that has the most.
  Forward(duck_experts& e, Pool& pool, int layer, int rows, int active, int assigned, int most,
          float* out)
      : resident_(e.resident), s_(e.resident.shape),
        ops_(e.isa->formats[int(s_.format)]), pool_(pool), layer_(layer), rows_(rows),
        active_count_(active), most_(most), out_(out) {
    const int threads = pool.threads();
    // Few experts: cut their inputs in pieces, so that every thread has its share to the end.
    pieces_ = active * s_.tiles() < 8 * threads ? s_.chunks() : 1;
    gate_items_ = active * s_.tiles() * pieces_;
    range_ = s_.down_tiles() / (8 * threads);
    range_ = range_ < 1 ? 1 : round_up(range_, 2);  // AVX-512 takes two tiles at a time
    down_items_ = div_up(s_.down_tiles(), range_);

    Scratch& scratch = e.scratch;
    x_stride_ = stride(s_.row_floats(s_.hidden));
    h_stride_ = stride(s_.tiles() * kTile);
    taken_stride_ = is_exact(s_.format) ? 0 : stride(s_.row_floats(s_.columns));
    y_stride_ = stride(s_.down_tiles() * kTile);
    x_ = scratch.x.get(rows * x_stride_);
    h_ = scratch.h.get(assigned * h_stride_);
    taken_ = scratch.taken.get(assigned * taken_stride_);
    y_ = scratch.y.get(rows * y_stride_);
    active_ = scratch.active.get(active);
    weight_ = scratch.weight.get(assigned);
    x_rows_ = scratch.x_rows.get(assigned);
    h_rows_ = scratch.h_rows.get(assigned);
    y_rows_ = scratch.y_rows.get(assigned);
    // Totals of gate and up, 64 and 64: per piece, or two sets per thread.
    const std::size_t sets = pieces_ > 1 ? std::size_t(assigned) * s_.tiles() * pieces_
                                         : std::size_t(threads) * 2 * most;
    panel_ = scratch.panel.get(std::size_t(threads) * most * kPanel);
    totals_ = scratch.totals.get(sets * 2 * kTile);
    total_rows_ = scratch.total_rows.get(std::size_t(threads) * most);
    if (pieces_ > 1) {
      const int tiles = active * s_.tiles();
      pieces_left_ = scratch.pieces_left.get(tiles);
      for (int i = 0; i < tiles; ++i) new (pieces_left_ + i) std::atomic<int>(pieces_);
    }
  }

  // Sorts the rows by expert. `count` holds each expert's rows, and serves as scratch.
  void sort(int top_k, const std::int32_t* ids, const float* weights, int* count) {
    int begin = 0;
    Active* next = active_;
    for (int expert = 0; expert < resident_.experts; ++expert) {
      if (!count[expert]) continue;
      Active* a = new (next++) Active;
      a->expert = expert;
      a->begin = begin;
      a->count = count[expert];
      a->unfinished.store(s_.tiles() + !is_exact(s_.format), std::memory_order_relaxed);
      count[expert] = begin;
      begin += a->count;
    }
    for (int row = 0; row < rows_; ++row)
      for (int j = 0; j < top_k; ++j) {
        const std::int32_t id = ids[std::size_t(row) * top_k + j];
        if (id < 0) continue;
        const int i = count[id]++;
        weight_[i] = weights[std::size_t(row) * top_k + j];
        x_rows_[i] = x_ + row * x_stride_;
        h_rows_[i] = is_exact(s_.format) ? h_ + i * h_stride_ : taken_ + i * taken_stride_;
        y_rows_[i] = y_ + row * y_stride_;
      }
  }

  void run(const float* x) {
    input_scale_ = s_.scaled() ? kInputScale : 1.0f;
    auto take_row = [&](int row, int) {
      ops_.take_row(x + std::size_t(row) * s_.hidden, input_scale_, x_ + row * x_stride_,
                    s_.hidden);
    };
    if (rows_ < 16)  // not worth the handing out
      for (int row = 0; row < rows_; ++row) take_row(row, 0);
    else
      pool_.run(rows_, take_row);
    auto item = [&](int i, int thread) {
      i < gate_items_ ? gate_item(i, thread) : down_item(i - gate_items_, thread);
    };
    pool_.run(gate_items_ + down_items_, item);
  }

 private:
  const std::uint8_t* gate_weights(const Active& a, int tile, int chunk) const {
    return resident_.record(layer_, a.expert) + tile * s_.gate_tile_bytes() +
           s_.bytes_of(chunk * kChunk);
  }
  const std::uint8_t* down_weights(const Active& a, int tile) const {
    return resident_.record(layer_, a.expert) + 2 * s_.gate_bytes() + tile * s_.down_tile_bytes();
  }
  float* panel(int thread) const { return panel_ + std::size_t(thread) * most_ * kPanel; }
  int gate_piece(int tile, int chunk) const { return tile * s_.chunks() + chunk; }
  int up_piece(int tile, int chunk) const { return gate_piece(s_.tiles() + tile, chunk); }
  int down_piece(int tile) const { return 2 * s_.tiles() * s_.chunks() + tile; }

  // Where the thread that asks will probably read next; null at the end.
  const std::uint8_t* likely_next() const {
    const int item = pool_.next_item();
    if (item < gate_items_) {
      const Active& a = active_[item / pieces_ / s_.tiles()];
      const int tile = item / pieces_ % s_.tiles(), chunk = item % pieces_;
      const Strays& strays = resident_.strays(layer_, a.expert);
      strays.prefetch_index(gate_piece(tile, chunk));
      strays.prefetch_index(up_piece(tile, chunk));
      return gate_weights(a, tile, chunk);
    }
    if (item < gate_items_ + down_items_)
      return down_weights(active_[0], (item - gate_items_) * range_);
    return nullptr;
  }

  void gate_item(int item, int thread) {
    const int tile = item / pieces_ % s_.tiles(), piece = item % pieces_;
    Active& a = active_[item / pieces_ / s_.tiles()];
    const std::size_t set = std::size_t(a.count) * 2 * kTile;
    if (pieces_ == 1) {
      float* sum = totals_ + std::size_t(thread) * 2 * most_ * 2 * kTile;
      chunk(a, tile, 0, thread, sum);
      for (int c = 1; c < s_.chunks(); ++c) {
        chunk(a, tile, c, thread, sum + set);
        for (std::size_t i = 0; i < set; ++i) sum[i] += sum[set + i];
      }
      finish(a, tile, sum);
      return;
    }
    float* sum = totals_ + (std::size_t(a.begin) * s_.tiles() + std::size_t(a.count) * tile) *
                               pieces_ * 2 * kTile;
    chunk(a, tile, piece, thread, sum + piece * set);
    // Whoever brings the last piece adds them up.
    if (pieces_left_[item / pieces_].fetch_sub(1, std::memory_order_acq_rel) > 1) return;
    for (int c = 1; c < s_.chunks(); ++c)
      for (std::size_t i = 0; i < set; ++i) sum[i] += sum[c * set + i];
    finish(a, tile, sum);
  }

  // Gate and up of one tile over one chunk of the inputs: totals [rows][gate 64, up 64].
  void chunk(const Active& a, int tile, int chunk, int thread, float* totals) {
    std::memset(totals, 0, std::size_t(a.count) * 2 * kTile * sizeof(float));
    float** rows = total_rows_ + std::size_t(thread) * most_;
    for (int i = 0; i < a.count; ++i) rows[i] = totals + std::size_t(i) * 2 * kTile;
    const int from = chunk * kChunk;
    Tiles t;
    t.w = gate_weights(a, tile, chunk);
    t.w_stride = std::ptrdiff_t(s_.gate_bytes());
    t.scale = resident_.scales(layer_, a.expert) + (tile * s_.blocks() + from / kBlock) * 2;
    t.scale_stride = std::ptrdiff_t(s_.gate_scales());
    t.count = 2;
    t.split = split_of(resident_.start(layer_, a.expert));
    t.k = s_.hidden - from < kChunk ? s_.hidden - from : kChunk;
    t.first = kBlock;
    t.n = a.count;
    t.panel = panel(thread);
    t.x = x_rows_ + a.begin;
    t.x_at = from;
    t.y = rows;
    t.y_at = 0;
    const bool more = pieces_ == 1 && chunk + 1 < s_.chunks();
    t.next = more ? gate_weights(a, tile, chunk + 1) : likely_next();
    run_tiles(t, a, gate_piece(tile, chunk), up_piece(0, 0) - gate_piece(0, 0));
  }

  void finish(Active& a, int tile, const float* totals) {
    for (int i = 0; i < a.count; ++i)
      ops_.gated(totals + i * 2 * kTile, totals + i * 2 * kTile + kTile, weight_[a.begin + i],
                 input_scale_, h_ + (a.begin + i) * h_stride_ + tile * kTile);
    if (is_exact(s_.format)) {
      a.unfinished.fetch_sub(1, std::memory_order_release);
      return;
    }
    // A group of h may cover two tiles: whoever finishes the last one rounds them all.
    if (a.unfinished.fetch_sub(1, std::memory_order_acq_rel) > 2) return;
    for (int i = a.begin; i < a.begin + a.count; ++i)
      ops_.take_row(h_ + i * h_stride_, 1.0f, taken_ + i * taken_stride_, s_.columns);
    a.unfinished.store(0, std::memory_order_release);
  }

  void down_item(int item, int thread) {
    const int from = item * range_;
    const int count = s_.down_tiles() - from < range_ ? s_.down_tiles() - from : range_;
    for (int row = 0; row < rows_; ++row)
      std::memset(y_ + row * y_stride_ + from * kTile, 0, count * kTile * sizeof(float));
    for (int i = 0; i < active_count_; ++i) {
      const Active& a = active_[i];
      const bool last = i + 1 == active_count_;
      for (Spin spin(std::numeric_limits<std::int64_t>::max());
           a.unfinished.load(std::memory_order_acquire);)
        spin.again();
      Tiles t;
      t.w = down_weights(a, from);
      t.w_stride = std::ptrdiff_t(s_.down_tile_bytes());
      t.scale = resident_.scales(layer_, a.expert) + 2 * s_.gate_scales() +
                std::size_t(from) * s_.down_blocks() * 2;
      t.scale_stride = s_.down_blocks() * 2;
      t.count = count;
      t.split = 0;
      t.k = s_.columns;
      t.first = kBlock - resident_.start(layer_, a.expert);
      t.n = a.count;
      t.panel = panel(thread);
      t.x = h_rows_ + a.begin;
      t.x_at = 0;
      t.y = y_rows_ + a.begin;
      t.y_at = from * kTile;
      if (!last) resident_.strays(layer_, active_[i + 1].expert).prefetch_index(down_piece(from));
      t.next = last ? likely_next() : down_weights(active_[i + 1], from);
      run_tiles(t, a, down_piece(from), 1);
    }
    for (int row = 0; row < rows_; ++row)
      for (int tile = from; tile < from + count; ++tile) {
        const int left = s_.hidden - tile * kTile;
        ops_.place(y_ + row * y_stride_ + tile * kTile,
                   out_ + std::size_t(row) * s_.hidden + tile * kTile, left < kTile ? left : kTile);
      }
  }

  // The tiles themselves, then their strays: those of tile i are the piece `piece` + i * step.
  void run_tiles(Tiles& t, const Active& a, int piece, int step) {
    if (!t.next) t.next = t.w;
    const Strays& strays = resident_.strays(layer_, a.expert);
    if (strays.none()) return ops_.tiles(t);
    for (int tile = 0; tile < t.count; ++tile)
      __builtin_prefetch(strays.begin(piece + tile * step));
    ops_.tiles(t);
    for (int tile = 0; tile < t.count; ++tile, piece += step)
      for (const auto *stray = strays.begin(piece), *end = strays.end(piece); stray < end; ++stray)
        add_stray(t, tile, *stray);
  }

  void add_stray(const Tiles& t, int tile, Strays::Stray stray) const {
    const int input = stray.input(), row = stray.row();
    const int block = (input + kBlock - t.first) / kBlock;
    const float scale = t.scale[tile * t.scale_stride + 2 * block + (row >= t.split)];
    // As the tiles have it: input times 2^-120 of the weight. Both factors are kept normal.
    const float magnitude = float(stray.code() & 7) * 0x1p-69f;
    const float weight = stray.code() & 0x80 ? -magnitude : magnitude;
    const std::ptrdiff_t at = t.y_at + tile * kTile + ops_.position[row];
    for (int i = 0; i < t.n; ++i)
      t.y[i][at] += scale * (t.x[i][t.x_at + input] * 0x1p-60f * weight);
  }

  const Resident& resident_;
  const Shape& s_;
  const FormatOps& ops_;
  Pool& pool_;
  int layer_, rows_, active_count_, most_;
  int pieces_, gate_items_, range_, down_items_;
  float input_scale_ = 1.0f;
  Active* active_;
  float* weight_;  // by place in the sorted list, like the rows below
  const float** x_rows_;
  const float** h_rows_;
  float** y_rows_;
  std::size_t x_stride_, h_stride_, taken_stride_, y_stride_;
  float *x_, *h_, *taken_, *y_, *out_, *totals_, *panel_;
  float** total_rows_;
  std::atomic<int>* pieces_left_ = nullptr;
};

const Isa* find_isa(const char* wanted) {
  for (auto find : {isa_avx512, isa_avx2, isa_avx2_without_vnni, isa_portable}) {
    const Isa* isa = find();
    if (isa && (!wanted || !std::strcmp(wanted, isa->name))) return isa;
  }
  return nullptr;
}

// No exception may cross into C.
template <class Body>
int guarded(Body body) {
  try {
    return body();
  } catch (const std::exception&) {  // no memory, or a thread that the system refuses
    return DUCK_NO_MEMORY;
  }
}

}  // namespace
}  // namespace duck

const char* duck_isa(const char* wanted) {
  const Isa* isa = find_isa(wanted);
  return isa ? isa->name : nullptr;
}

duck_pool* duck_pool_create(int threads, int spin_us, int pin) {
  duck_pool* pool = nullptr;
  guarded([&] {
    pool = new duck_pool(threads, spin_us < 0 ? 0 : spin_us, pin != 0);
    return DUCK_OK;
  });
  return pool;
}

int duck_pool_threads(const duck_pool* pool) { return pool->pool.threads(); }

void duck_pool_destroy(duck_pool* pool) { delete pool; }

std::size_t duck_record_bytes(int hidden, int columns, int format) {
  const Shape shape{hidden, columns, Format(format)};
  return shape.valid() ? shape.record_bytes() : 0;
}

std::size_t duck_scale_floats(int hidden, int columns, int format) {
  const Shape shape{hidden, columns, Format(format)};
  return shape.valid() ? shape.scale_floats() : 0;
}

int duck_experts_create(int layers, int experts, int hidden, int columns, int format,
                        const char* isa, duck_experts** out) {
  const Shape shape{hidden, columns, Format(format)};
  if (!shape.valid() || layers < 1 || layers > kMost || experts < 1 || experts > kMost)
    return DUCK_BAD_SHAPE;
  const Isa* found = find_isa(isa);
  if (!found) return DUCK_NO_ISA;
  return guarded([&] {
    auto e = std::make_unique<duck_experts>(shape, layers, experts, found);
    if (!e->resident.allocate()) return DUCK_NO_MEMORY;
    *out = e.release();
    return DUCK_OK;
  });
}

int duck_experts_use(duck_experts* e, const char* isa) {
  const Isa* found = find_isa(isa);
  if (!found) return DUCK_NO_ISA;
  return guarded([&] {
    const std::scoped_lock lock(e->busy);
    e->isa = found;
    return DUCK_OK;
  });
}

void duck_experts_destroy(duck_experts* experts) { delete experts; }

std::size_t duck_experts_bytes(const duck_experts* e) { return e->resident.bytes(); }

int duck_pack(int hidden, int columns, int format, int start, const void* gate,
              std::ptrdiff_t gate_stride, const void* up, std::ptrdiff_t up_stride,
              const void* down, std::ptrdiff_t down_stride, const float* gate_scale,
              const float* up_scale, const float* down_scale, std::uint8_t* record,
              float* scales) {
  const Shape shape{hidden, columns, Format(format)};
  if (!shape.valid() || start < 0 || start > kMost) return DUCK_BAD_SHAPE;
  return pack(shape, {start, gate, up, down, gate_stride, up_stride, down_stride, gate_scale,
                      up_scale, down_scale},
              record, scales);
}

int duck_experts_load(duck_experts* e, int layer, int expert, int start, const void* gate,
                      std::ptrdiff_t gate_stride, const void* up, std::ptrdiff_t up_stride,
                      const void* down, std::ptrdiff_t down_stride, const float* gate_scale,
                      const float* up_scale, const float* down_scale) {
  if (!e->has(layer, expert) || start < 0 || start > kMost) return DUCK_BAD_SHAPE;
  return guarded([&] {
    return e->resident.load(layer, expert, {start, gate, up, down, gate_stride, up_stride,
                                            down_stride, gate_scale, up_scale, down_scale});
  });
}

std::uint8_t* duck_experts_records(duck_experts* e, int layer) {
  return e->has(layer, 0) ? e->resident.record(layer, 0) : nullptr;
}

float* duck_experts_scales(duck_experts* e, int layer) {
  return e->has(layer, 0) ? e->resident.scales(layer, 0) : nullptr;
}

int duck_experts_adopt(duck_experts* e, int layer, int expert, int start) {
  if (!e->has(layer, expert) || start < 0 || start > kMost) return DUCK_BAD_SHAPE;
  return guarded([&] { return e->resident.adopt(layer, expert, start); });
}

int duck_experts_forward(duck_experts* e, duck_pool* pool, int layer, int rows, int top_k,
                         const float* x, const std::int32_t* ids, const float* weights, float* out,
                         int* bad_row) {
  const Resident& r = e->resident;
  if (!e->has(layer, 0) || rows < 0 || rows > kMost || top_k < 0 || top_k > r.experts)
    return DUCK_BAD_SHAPE;
  return guarded([&] {
    const std::scoped_lock lock(e->busy, pool->busy);
    const FloatMode mode;
    int* count = e->scratch.count.get(r.experts);
    int* seen = e->scratch.seen.get(r.experts);  // the last row that named this expert
    std::memset(count, 0, sizeof(int) * r.experts);
    std::memset(seen, -1, sizeof(int) * r.experts);
    int active = 0, most = 0;
    std::size_t assigned = 0;
    for (int row = 0; row < rows; ++row)
      for (int j = 0; j < top_k; ++j) {
        const std::int32_t id = ids[std::size_t(row) * top_k + j];
        if (id == -1) continue;
        *bad_row = row;
        if (id < 0 || id >= r.experts) return DUCK_BAD_ID;
        if (seen[id] == row) return DUCK_TWICE;
        if (r.start(layer, id) < 0) return DUCK_NOT_LOADED;
        seen[id] = row;
        active += !count[id]++;
        most = count[id] > most ? count[id] : most;
        ++assigned;
      }
    if (assigned > std::size_t(kMost)) return DUCK_BAD_SHAPE;
    if (!active) {
      std::memset(out, 0, sizeof(float) * rows * r.shape.hidden);
      return DUCK_OK;
    }
    Forward forward(*e, pool->pool, layer, rows, active, int(assigned), most, out);
    forward.sort(top_k, ids, weights, count);
    forward.run(x);
    return DUCK_OK;
  });
}

std::uint64_t duck_experts_read(duck_experts* e, duck_pool* pool, std::size_t offset,
                                std::size_t bytes) {
  const std::size_t all = e->resident.bytes() / 256 * 256;
  offset = (offset < all ? offset : all) / 256 * 256;
  bytes = (bytes < all - offset ? bytes : all - offset) / 256 * 256;
  constexpr std::size_t kItem = 256 << 10;
  const Isa* fastest = find_isa(nullptr);  // a yardstick: the same whatever computes
  std::atomic<std::uint64_t> sum{0};
  auto item = [&](int i, int) {
    const std::size_t at = i * kItem, left = bytes - at;
    sum += fastest->read(e->resident.data() + offset + at, left < kItem ? left : kItem);
  };
  const std::scoped_lock lock(e->busy, pool->busy);
  pool->pool.run(int((bytes + kItem - 1) / kItem), item);
  return sum;
}
