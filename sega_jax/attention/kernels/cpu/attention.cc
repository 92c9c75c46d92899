// Flash attention on CPU: scores, softmax and sums of a strip of queries stay in the core's own caches.
//
// A task is a range of queries of one head.  It walks the key blocks that any of its rows visits, in ascending order;
// each is packed once into panels and meets the queries strip by strip: a product into scores, the softmax relative to
// a running maximum, a product onto the sums.  A map row (a query block) takes part only in blocks that it visits, and
// a query's result does not depend on which task it falls into.  Threads are XLA's own.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <type_traits>
#include <vector>

#include "products.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace sega {

constexpr int64_t kKeys = 256;          // most keys packed at once
constexpr int64_t kStrip = 32;          // queries whose scores are in flight
constexpr int64_t kFewestQueries = 64;  // tasks are not cut into fewer
constexpr double kAlone = 1e6;          // fewer multiplications take less time than waking other threads
constexpr float kNothing = -std::numeric_limits<float>::infinity();

static int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// [B, N, H, D] of q, k, v, the latter two with `kv_heads`; the block map as compressed rows
// (`sega_jax.layouts.blocks`), or block_q = 0 without one; causal requests have none.
struct Problem {
  int64_t batch, queries, keys, heads, kv_heads, depth, width;
  const void *q, *k, *v;
  const int32_t* lengths;
  int64_t block_q, block_k, columns;
  const int32_t *visit_count, *visit_columns, *visit_patterns;
  const uint8_t* patterns;
  bool causal;
  float scale;
  void* out;
  float* lse;
};

// Aligned memory, not initialised.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : data_(static_cast<T*>(::operator new(sizeof(T) * size, kAlignment))) {}
  ~Buffer() { ::operator delete(data_, kAlignment); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* operator+(int64_t offset) { return data_ + offset; }
  T& operator[](int64_t index) { return data_[index]; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  T* data_;
};

// A map row inside a task: queries `first` to `first + rows`, kept from `slot` on; `next` is its next visit.
struct Segment {
  int64_t first, rows, slot;
  const int32_t *columns, *patterns;
  int64_t visits, next;

  int64_t column() const { return columns ? columns[next] : next; }
  int32_t pattern() const { return columns ? patterns[next] : 0; }
};

template <class Element, class Product>
class Worker {
 public:
  explicit Worker(const Problem& problem, int64_t most_queries)
      : p_(problem),
        units_(round_up(Product::kPairs ? (p_.depth + 1) / 2 : p_.depth, std::max(Product::kDepth, kLanes))),
        width_(round_up(p_.width, kPanel)),
        slots_(most_queries + (p_.block_q ? most_queries / p_.block_q + 2 : 1) * Product::kStep),
        queries_(slots_ * units_),
        sums_(slots_ * width_),
        highest_(slots_),
        totals_(slots_),
        keys_(std::min(kKeys, round_up(p_.keys, kPanel)) * units_),
        values_(std::min(kKeys, round_up(p_.keys, kPanel)) * width_),
        scores_(kStrip * kKeys),
        staged_(std::max(units_ * kLanes, 2 * width_)) {
    scale_ = p_.scale == 0 ? 1.0f : std::fabs(p_.scale);  // its sign and a zero go into the queries
  }

  // Queries `first` to `last` of head `plane % heads` of sample `plane / heads`.
  void run(int64_t plane, int64_t first, int64_t last) {
    sample_ = plane / p_.heads, head_ = plane % p_.heads;
    kv_head_ = head_ / (p_.heads / p_.kv_heads);
    limit_ = std::clamp<int64_t>(p_.lengths[sample_], 0, p_.keys);
    if (p_.causal) limit_ = std::min(limit_, last);
    begin(first, last);
    const int64_t side = p_.block_q ? p_.block_k : kKeys;
    for (;;) {
      int64_t column = -1;
      for (const Segment& s : segments_)
        if (s.next < s.visits && (column < 0 || s.column() < column)) column = s.column();
      if (column < 0) break;
      const int64_t start = column * side, stop = std::min(start + side, limit_);
      for (int64_t key = start; key < stop; key += kKeys) {
        const int64_t count = std::min(kKeys, stop - key);
        pack_keys(key, count);
        pack_values(key, count);
        for (const Segment& s : segments_)
          if (s.next < s.visits && s.column() == column) visit(s, key, key - start, count);
      }
      for (Segment& s : segments_)
        if (s.next < s.visits && s.column() == column) ++s.next;
    }
    for (const Segment& s : segments_) finish(s);
  }

 private:
  static constexpr bool kPairs = Product::kPairs;
  static_assert(kStrip % Product::kStep == 0 && kKeys % kPanel == 0);

  template <class T>
  const T* query_row(int64_t token) const {
    return static_cast<const T*>(p_.q) + ((sample_ * p_.queries + token) * p_.heads + head_) * p_.depth;
  }

  template <class T>
  const T* key_row(const void* x, int64_t token, int64_t size) const {
    return static_cast<const T*>(x) + ((sample_ * p_.keys + token) * p_.kv_heads + kv_head_) * size;
  }

  void begin(int64_t first, int64_t last) {
    segments_.clear();
    int64_t slot = 0;
    while (first < last) {
      Segment s{first, last - first, slot, nullptr, nullptr, (limit_ + kKeys - 1) / kKeys, 0};
      if (p_.block_q) {
        const int64_t row = first / p_.block_q;
        s.rows = std::min(last, (row + 1) * p_.block_q) - first;
        s.columns = p_.visit_columns + row * p_.columns;
        s.patterns = p_.visit_patterns + row * p_.columns;
        s.visits = p_.visit_count[row];
      }
      segments_.push_back(s);
      const int64_t slots = round_up(s.rows, Product::kStep);
      for (int64_t i = 0; i < slots; ++i) {
        uint32_t* to = queries_ + (slot + i) * units_;
        if (i < s.rows && p_.scale != 0) {
          load_units(query_row<Element>(first + i), p_.depth, to, units_);
        } else {
          std::fill_n(to, units_, 0u);
        }
        if (p_.scale < 0)
          for (int64_t u = 0; u < units_; ++u) to[u] ^= kPairs ? 0x80008000u : 0x80000000u;
      }
      std::fill_n(sums_ + slot * width_, slots * width_, 0.0f);
      std::fill_n(highest_ + slot, slots, kNothing);
      std::fill_n(totals_ + slot, slots, 0.0f);
      first += s.rows, slot += slots;
    }
  }

  // `size` elements as units; the rest is zero.
  static void load_units(const Element* from, int64_t size, uint32_t* to, int64_t units) {
    if constexpr (kPairs || std::is_same_v<Element, float>) {
      std::memcpy(to, from, size * sizeof(Element));
      std::memset(reinterpret_cast<char*>(to) + size * sizeof(Element), 0, units * 4 - size * sizeof(Element));
    } else {
      for (int64_t i = 0; i < size; ++i) to[i] = uint32_t{from[i].bits} << 16;
      std::fill(to + size, to + units, 0u);
    }
  }

  // Keys as panels of kPanel keys, each [units, kPanel]; keys past `count` are zero.
  void pack_keys(int64_t first, int64_t count) {
    for (int64_t key = 0; key < round_up(count, kPanel); key += kLanes) {
      for (int64_t i = 0; i < kLanes; ++i) {
        uint32_t* to = staged_ + i * units_;
        if (key + i < count) {
          load_units(key_row<Element>(p_.k, first + key + i, p_.depth), p_.depth, to, units_);
        } else {
          std::fill_n(to, units_, 0u);
        }
      }
      uint32_t* panel = keys_ + key / kPanel * kPanel * units_ + key % kPanel;
      for (int64_t u = 0; u < units_; u += kLanes) transpose(staged_ + u, units_, panel + u * kPanel, kPanel);
    }
  }

  // Values as panels of kPanel channels, each [units of keys, kPanel]; keys past `count` are zero.
  void pack_values(int64_t first, int64_t count) {
    constexpr int64_t together = kPairs ? 2 : 1;
    const int64_t units = round_up(count, kPanel) / together;
    for (int64_t u = 0; u < units; ++u) {
      uint32_t* merged = staged_ + 0;
      std::fill_n(merged, width_, 0u);
      for (int64_t i = 0; i < together; ++i) {
        const int64_t key = u * together + i;
        if (key >= count) continue;
        const Element* from = key_row<Element>(p_.v, first + key, p_.width);
        if constexpr (std::is_same_v<Element, float>) {
          std::memcpy(merged, from, p_.width * sizeof(float));
        } else {
          const int shift = kPairs && i == 0 ? 0 : 16;
          for (int64_t c = 0; c < p_.width; ++c) merged[c] |= uint32_t{from[c].bits} << shift;
        }
      }
      for (int64_t c = 0; c < width_; c += kPanel)
        std::memcpy(values_ + (c * units + u * kPanel), merged + c, kPanel * sizeof(uint32_t));
    }
  }

  // A segment meets `count` packed keys from `from` on, which lie from `within` on in the block of its present visit.
  void visit(const Segment& s, int64_t from, int64_t within, int64_t count) {
    const int64_t padded = round_up(count, kPanel);
    const int64_t units = kPairs ? padded / 2 : padded;
    const uint8_t* pattern = nullptr;
    if (const int32_t kind = s.pattern())
      pattern = p_.patterns + (kind - 1) * p_.block_q * p_.block_k + s.first % p_.block_q * p_.block_k + within;
    for (int64_t start = 0; start < s.rows; start += kStrip) {
      const int64_t rows = std::min(kStrip, s.rows - start), slot = s.slot + start;
      const int64_t stepped = round_up(rows, Product::kStep);
      if (p_.causal && from >= s.first + start + rows) continue;  // all keys are behind all queries
      for (int64_t key = 0; key < padded; key += kPanel)
        Product::template product<false>(scores_ + key, kKeys, queries_ + slot * units_, units_, keys_ + key * units_,
                                         stepped, units_);
      for (int64_t i = 0; i < stepped; ++i) {
        float* scores = scores_ + i * kKeys;
        if (i >= rows) {
          std::fill_n(scores, padded, 0.0f);  // weights of no query
          continue;
        }
        if (pattern) {
          const uint8_t* seen = pattern + (start + i) * p_.block_k;
          for (int64_t j = 0; j < count; ++j) scores[j] = seen[j] ? scores[j] : kNothing;
        }
        const int64_t ahead = p_.causal ? s.first + start + i + 1 - from : count;
        std::fill(scores + std::clamp<int64_t>(ahead, 0, count), scores + padded, kNothing);
        weigh(scores, padded, slot + i);
      }
      const uint32_t* weights = reinterpret_cast<const uint32_t*>(scores_ + 0);
      for (int64_t c = 0; c < width_; c += kPanel)
        Product::template product<true>(sums_ + slot * width_ + c, width_, weights, kKeys, values_ + c * units, stepped,
                                        units);
    }
  }

  // Scores of one query become weights relative to its highest score so far, in place: floats, or bfloat16 in the
  // first half of the row.
  void weigh(float* scores, int64_t count, int64_t slot) {
    Floats top = load<Floats>(scores);
    for (int64_t j = kLanes; j < count; j += kLanes) top = larger(top, load<Floats>(scores + j));
    const float highest = reduce(top, [](float a, float b) { return a > b ? a : b; });
    if (highest > highest_[slot]) {
      const float keep = std::exp((highest_[slot] - highest) * scale_);
      highest_[slot] = highest;
      totals_[slot] *= keep;
      for (float* sum = sums_ + slot * width_; sum < sums_ + (slot + 1) * width_; sum += kLanes)
        store(sum, load<Floats>(sum) * keep);
    }
    const float shift = highest_[slot] == kNothing ? 0.0f : highest_[slot];
    const float binary = scale_ * 1.44269504088896f;  // weights are powers of two
    Floats total{};
    for (int64_t j = 0; j < count; j += (kPairs ? 2 : 1) * kLanes) {
      const Floats weight = power<!kPairs>((load<Floats>(scores + j) - shift) * binary);
      total += weight;
      if constexpr (kPairs) {
        const Floats next = power<false>((load<Floats>(scores + j + kLanes) - shift) * binary);
        total += next;
        store_pairs(reinterpret_cast<uint16_t*>(scores) + j, weight, next);
      } else {
        store(scores + j, weight);
      }
    }
    totals_[slot] += reduce(total, [](float a, float b) { return a + b; });
  }

  void finish(const Segment& s) {
    for (int64_t i = 0; i < s.rows; ++i) {
      const int64_t slot = s.slot + i, at = (sample_ * p_.queries + s.first + i) * p_.heads + head_;
      const float total = totals_[slot];
      const float inverse = total == 0 ? 0.0f : 1.0f / total;
      const float* sums = sums_ + slot * width_;
      Element* out = static_cast<Element*>(p_.out) + at * p_.width;
      for (int64_t c = 0; c < p_.width; ++c) {
        if constexpr (std::is_same_v<Element, float>) {
          out[c] = sums[c] * inverse;
        } else {
          out[c] = narrow(sums[c] * inverse);
        }
      }
      p_.lse[at] = total == 0 ? kNothing : std::log(total) + highest_[slot] * scale_;
    }
  }

  const Problem p_;
  const int64_t units_, width_, slots_;
  Buffer<uint32_t> queries_;
  Buffer<float> sums_, highest_, totals_;
  Buffer<uint32_t> keys_, values_;
  Buffer<float> scores_;
  Buffer<uint32_t> staged_;
  float scale_;
  int64_t sample_, head_, kv_head_, limit_;
  std::vector<Segment> segments_;
};

// -- threads ----------------------------------------------------------------------------------------------------------

// Tasks of one call, taken in turn by whoever is free.  A helper that comes when all are taken touches nothing but this.
struct Tasks {
  std::atomic<int64_t> next{0};
  int64_t count = 0;
  std::mutex mutex;
  std::condition_variable changed;
  int64_t done = 0;
  bool out_of_memory = false;
};

template <class Element, class Product>
static void work(const Problem& problem, int64_t size, Tasks& tasks) {
  int64_t task = tasks.next++, finished = 0;
  if (task >= tasks.count) return;
  bool failed = false;
  try {
    [[maybe_unused]] typename Product::Session session;
    Worker<Element, Product> worker(problem, std::min(size, problem.queries));
    const int64_t per_plane = (problem.queries + size - 1) / size;
    for (; task < tasks.count; task = tasks.next++, ++finished) {
      const int64_t first = task % per_plane * size;
      worker.run(task / per_plane, first, std::min(first + size, problem.queries));
    }
  } catch (const std::bad_alloc&) {
    failed = true;
    for (; task < tasks.count; task = tasks.next++) ++finished;
  }
  const std::lock_guard<std::mutex> lock(tasks.mutex);
  tasks.done += finished;
  tasks.out_of_memory |= failed;
  tasks.changed.notify_all();
}

template <class Element, class Product>
static ffi::Error attend(const Problem& problem, ffi::ThreadPool pool) {
  const int64_t planes = problem.batch * problem.heads, threads = std::max<int64_t>(1, pool.num_threads());
  const auto count = [&](int64_t size) { return planes * ((problem.queries + size - 1) / size); };
  int64_t size = Product::kQueries;
  while (size > kFewestQueries && count(size) < 4 * threads) size /= 2;
  if (problem.block_q && problem.block_q < size) size = size / problem.block_q * problem.block_q;
  auto tasks = std::make_shared<Tasks>();
  tasks->count = count(size);
  const double products = double(planes) * problem.queries * problem.keys * (problem.depth + problem.width);
  const int64_t workers = products < kAlone ? 1 : std::min(threads, tasks->count);
  for (int64_t helper = 1; helper < workers; ++helper)
    pool.Schedule([tasks, problem, size] { work<Element, Product>(problem, size, *tasks); });
  work<Element, Product>(problem, size, *tasks);
  std::unique_lock<std::mutex> lock(tasks->mutex);
  tasks->changed.wait(lock, [&] { return tasks->done == tasks->count; });
  if (tasks->out_of_memory) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "attention: out of memory");
  return ffi::Error::Success();
}

// A map may be traced, so what it holds is known only now.
static ffi::Error checked(const Problem& p, int64_t listed_rows, int64_t patterns) {
  const int64_t rows = p.block_q ? (p.queries + p.block_q - 1) / p.block_q : 0;
  if (rows > listed_rows) return ffi::Error::InvalidArgument("attention: a block map has too few rows for the queries");
  for (int64_t row = 0; row < rows; ++row) {
    if (p.visit_count[row] < 0 || p.visit_count[row] > p.columns)
      return ffi::Error::InvalidArgument("attention: a block map's row counts more visits than it lists");
    for (int64_t i = row * p.columns; i < row * p.columns + p.visit_count[row]; ++i)
      if (p.visit_columns[i] < 0 || p.visit_columns[i] * p.block_k >= p.keys)
        return ffi::Error::InvalidArgument("attention: a block map visits a key block that is not there");
    for (int64_t i = row * p.columns; i < row * p.columns + p.visit_count[row]; ++i)
      if (p.visit_patterns[i] < 0 || p.visit_patterns[i] > patterns)
        return ffi::Error::InvalidArgument("attention: a block map names a pattern that is not there");
  }
  return ffi::Error::Success();
}

static ffi::Error run(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                      ffi::Buffer<ffi::S32> lengths, ffi::Buffer<ffi::S32> count, ffi::Buffer<ffi::S32> columns,
                      ffi::Buffer<ffi::S32> pattern, ffi::Buffer<ffi::PRED> patterns, ffi::Result<ffi::AnyBuffer> out,
                      ffi::Result<ffi::Buffer<ffi::F32>> lse, float scale, int64_t block_q, int64_t block_k, bool causal,
                      [[maybe_unused]] bool tiles) {
  const auto asked = q.dimensions(), given = v.dimensions();
  const Problem problem{asked[0],
                        asked[1],
                        given[1],
                        asked[2],
                        given[2],
                        asked[3],
                        given[3],
                        q.untyped_data(),
                        k.untyped_data(),
                        v.untyped_data(),
                        lengths.typed_data(),
                        block_q,
                        block_k,
                        columns.dimensions()[1],
                        count.typed_data(),
                        columns.typed_data(),
                        pattern.typed_data(),
                        reinterpret_cast<const uint8_t*>(patterns.typed_data()),
                        causal,
                        scale,
                        out->untyped_data(),
                        lse->typed_data()};
  const ffi::Error refused = checked(problem, columns.dimensions()[0], patterns.dimensions()[0]);
  if (refused.failure()) return refused;
  if (q.element_type() == ffi::F32) return attend<float, Lanewise<FloatUnits>>(problem, pool);
#if defined(SEGA_TILES)
  if (tiles) return attend<Bfloat16, Tiles>(problem, pool);
#endif
#if defined(__AVX512BF16__)
  return attend<Bfloat16, Lanewise<PairUnits>>(problem, pool);
#else
  return attend<Bfloat16, Lanewise<FloatUnits>>(problem, pool);
#endif
}

}  // namespace sega

// Whether `tiles` may be asked for: they are here, may be used, and multiply as they should.
extern "C" int sega_has_tiles() {
#if defined(SEGA_TILES)
  using sega::Tiles, sega::kPanel;
  if (!Tiles::usable()) return false;
  alignas(64) uint32_t a[Tiles::kStep * Tiles::kDepth], b[Tiles::kDepth * kPanel];
  alignas(64) float c[Tiles::kStep * kPanel];
  const auto pair = [](int first, int second) {  // small integers
    return uint32_t{sega::narrow(float(first)).bits} | uint32_t{sega::narrow(float(second)).bits} << 16;
  };
  const auto left = [](int i, int k) { return (7 * i + 3 * k) % 11 - 5; };
  const auto right = [](int k, int j) { return (5 * k + 2 * j) % 13 - 6; };
  for (int u = 0; u < Tiles::kDepth; ++u) {
    for (int i = 0; i < Tiles::kStep; ++i) a[i * Tiles::kDepth + u] = pair(left(i, 2 * u), left(i, 2 * u + 1));
    for (int j = 0; j < kPanel; ++j) b[u * kPanel + j] = pair(right(2 * u, j), right(2 * u + 1, j));
  }
  {
    Tiles::Session session;
    Tiles::product<false>(c, kPanel, a, Tiles::kDepth, b, Tiles::kStep, Tiles::kDepth);
    Tiles::product<true>(c, kPanel, a, Tiles::kDepth, b, Tiles::kStep, Tiles::kDepth);
  }
  for (int i = 0; i < Tiles::kStep; ++i)
    for (int j = 0; j < kPanel; ++j) {
      int expected = 0;
      for (int k = 0; k < 2 * Tiles::kDepth; ++k) expected += 2 * left(i, k) * right(k, j);
      if (c[i * kPanel + j] != float(expected)) return false;
    }
  return true;
#else
  return false;
#endif
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(sega_attention, sega::run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("block_q")
                                  .Attr<int64_t>("block_k")
                                  .Attr<bool>("causal")
                                  .Attr<bool>("tiles"));
