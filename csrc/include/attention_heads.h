// Rows of attention heads in scratch memory, for one instruction set (see vectors.h). Torch-free.
//
// A head's real rows are gathered as numbers of type A, the student's columns before the teacher's,
// each side padded with zeros to whole lines of the cache: a masked row is never read. The keys lie in
// panels too, transposed: scores are then a product of rows of queries and a panel of keys.
//
// Legend: A the type that is computed in, Q real queries, K real keys, D_s / D_t head sizes, W lanes.

#include "products.h"

namespace METAKD_ISA {

// Scores are computed in blocks: all keys that some queries see, at most QUERIES, about BLOCK scores, so
// that a block stays in the second cache.
constexpr int64_t QUERIES = 8 * ROWS, BLOCK = 1 << 16;

template <class A>
constexpr int64_t PANEL = 2 * Float<A>::lanes;  // keys

// Hands out scratch memory; without any it counts what is needed.
template <class A>
struct Memory {
  A* base;
  int64_t used = 0;

  METAKD_INLINE A* take(int64_t count) {
    A* const from = base ? base + used : nullptr;
    used += round_up(count, LINE<A>);
    return from;
  }

  METAKD_INLINE int64_t bytes() const { return used * static_cast<int64_t>(sizeof(A)); }
};

template <class A>
struct Widths {
  int64_t s, t, all;

  METAKD_INLINE Widths(int64_t width_s, int64_t width_t)
      : s(round_up(width_s, LINE<A>)), t(round_up(width_t, LINE<A>)), all(s + t) {}
};

// Rows ``positions`` of a matrix times ``scale``.
template <class A>
METAKD_NOINLINE void gather(
    const Matrix& matrix, const int64_t* positions, int64_t count, double scale, A* to, int64_t stride) {
  constexpr int64_t W = Float<A>::lanes;
  const Vector<A> factor = per_lane<A>(scale);
  const int64_t width = matrix.width;
  with_narrow_type<A>(matrix.type, [&](auto* like) METAKD_LAMBDA {
    for (int64_t r = 0; r < count; ++r, to += stride) {
      const auto* from = numbers(matrix.data, like) + positions[r] * matrix.stride;
      int64_t c = 0;
      for (; c + W <= width; c += W) store(to + c, read<A>(from + c) * factor);
      if (c == width) continue;
      if (width > W) store(to + width - W, read<A>(from + width - W) * factor);
      else store(to, read_some<A>(from, width) * factor);
    }
  });
}

// The other way, times ``factor``, to rows [begin, end): those not among ``positions`` become 0.
template <class A>
METAKD_NOINLINE void scatter(
    const A* from, int64_t stride, double factor, const int64_t* positions, int64_t count,
    const Matrix& matrix, int64_t begin, int64_t end) {
  constexpr int64_t W = Float<A>::lanes;
  const Vector<A> factors = per_lane<A>(factor);
  const int64_t width = matrix.width;
  with_narrow_type<A>(matrix.type, [&](auto* like) METAKD_LAMBDA {
    int64_t r = 0;
    for (int64_t position = begin; position < end; ++position) {
      auto* to = numbers(matrix.data, like) + position * matrix.stride;
      if (r == count || positions[r] != position) {
        __builtin_memset(static_cast<void*>(to), 0, width * sizeof(*to));
        continue;
      }
      const A* row = from + r++ * stride;
      int64_t c = 0;
      for (; c + W <= width; c += W) write(to + c, load(row + c) * factors);
      if (c == width) continue;
      if (width > W) write(to + width - W, load(row + width - W) * factors);
      else write_some(to, load(row) * factors, width);
    }
  });
}

template <class A>
struct Packed {
  const Head& head;
  const Widths<A> widths;
  const int64_t widest;  // keys of a block of scores, at most
  const int64_t stride;  // from one row of a block of scores to the next
  A *query, *key;        // [Q, widths.all], [K, widths.all]
  A* panels;             // [K / PANEL, widths.all, PANEL]

  // ``keeps_keys``: the keys as rows are wanted too, otherwise only PANEL of them at a time.
  METAKD_INLINE Packed(const Head& head, bool keeps_keys, Memory<A>& memory)
      : head(head), widths(head.query_s.width, head.query_t.width),
        widest(widest_of(head.keys)), stride(stride_of(widest)), keeps_keys(keeps_keys) {
    const int64_t keys = round_up(head.length, PANEL<A>);
    query = memory.take((head.length + ROWS) * widths.all);
    key = memory.take((keeps_keys ? keys : PANEL<A>) * widths.all);
    panels = memory.take(keys * widths.all);
  }

  // A block of scores; some rows more than are used, see multiply.
  METAKD_INLINE A* take_block(Memory<A>& memory) const {
    const int64_t longest = stride_of(widest_of(head.length));
    const int64_t rows = BLOCK / longest < QUERIES ? BLOCK / longest : QUERIES;
    return memory.take((rows + 2 * ROWS) * longest);
  }

  METAKD_NOINLINE void pack(double scale_s, double scale_t) const {
    const int64_t all = widths.all;
    gather(head.query_s, head.query, head.queries, scale_s, query, all);
    gather(head.query_t, head.query, head.queries, scale_t, query + widths.s, all);
    for (int64_t k = 0; k < head.keys; k += PANEL<A>) {
      const int64_t count = head.keys - k < PANEL<A> ? head.keys - k : PANEL<A>;
      A* rows = key + (keeps_keys ? k * all : 0);
      gather(head.key_s, head.key + k, count, 1.0, rows, all);
      gather(head.key_t, head.key + k, count, 1.0, rows + widths.s, all);
      // Columns after the last key hold anything: nobody reads what becomes of them.
      transpose(rows, all, PANEL<A>, all, panels + k * all, PANEL<A>);
    }
  }

  // f(first query, queries, first key, keys) for blocks of neighbouring queries and the keys that they
  // see, from a panel's first key on. Column 0 of a block of scores is the first key.
  template <class F>
  METAKD_INLINE void for_blocks(F f) const {
    int64_t most = BLOCK / stride / ROWS * ROWS;
    most = most < ROWS ? ROWS : most < QUERIES ? most : QUERIES;
    for (int64_t q = 0, rows; q < head.queries; q += rows) {
      const int64_t first = head.from[q] / PANEL<A> * PANEL<A>;
      // A mask may leave queries far apart, which see keys far apart.
      rows = 1;
      while (rows < most && q + rows < head.queries && head.to[q + rows] - first <= widest) ++rows;
      f(q, rows, first, head.to[q + rows - 1] - first);
    }
  }

  // Scores of the student, of the teacher, or the sum of both: of ``rows`` queries with ``keys`` keys
  // from ``first`` on. What a query does not see may hold anything.
  enum Side { student, teacher, both };

  METAKD_INLINE void scores(
      Side side, int64_t q, int64_t rows, int64_t first, int64_t keys, A* block) const {
    for (int64_t k = first; k < first + keys; k += PANEL<A>) {
      int64_t skip = 0, end = rows;
      while (skip < rows && head.to[q + skip] <= k) ++skip;
      while (end > skip && head.from[q + end - 1] >= k + PANEL<A>) --end;
      const A* own = query + (q + skip) * widths.all;
      const A* panel = panels + k * widths.all;
      const Factors<A> terms[2] = {
          {own, widths.all, 1, panel, PANEL<A>, head.query_s.width},
          {own + widths.s, widths.all, 1, panel + widths.s * PANEL<A>, PANEL<A>, head.query_t.width}};
      multiply(terms + (side == teacher), side == both ? 2 : 1, end - skip, PANEL<A>,
               block + skip * stride + k - first, stride, false);
    }
  }

  // Makes columns of a row outside [from, to) 0, as far as a product with ``keys`` keys may read.
  METAKD_INLINE void clear_unseen(A* row, int64_t from, int64_t to, int64_t keys) const {
    constexpr int64_t W = Float<A>::lanes;
    const int64_t end = round_up(keys, PANEL<A>) + LINE<A>;
    __builtin_memset(row, 0, from * sizeof(A));
    int64_t c = to / W * W;
    if (c < to) {
      store(row + c, cut<A>(load(row + c), to - c));
      c += W;
    }
    for (; c < end; c += W) store(row + c, Vector<A>{});
  }

 private:
  const bool keeps_keys;

  // Of a head of ``keys`` keys: a query's reach, moved on by the other queries of a block, from a panel's
  // first key on.
  METAKD_INLINE int64_t widest_of(int64_t keys) const {
    const int64_t most = head.reach + QUERIES + PANEL<A>;
    return keys < most ? keys : most;
  }

  // Room for the last panel and a line. An odd number of lines: an even one would put rows into the
  // same few places of the first cache.
  static METAKD_INLINE int64_t stride_of(int64_t keys) {
    const int64_t lines = round_up(round_up(keys, PANEL<A>), LINE<A>) / LINE<A> + 1;
    return (lines | 1) * LINE<A>;
  }
};

// The sums that a block of dS = d loss / d scores contributes to the gradients of queries and keys.
template <class A>
struct Slopes {
  A *query, *key;  // [Q, widths.s], [K, widths.s]

  METAKD_INLINE Slopes(const Packed<A>& packed, Memory<A>& memory)
      : query(memory.take((packed.head.length + ROWS) * packed.widths.s)),
        key(memory.take((packed.head.length + ROWS) * packed.widths.s)) {}

  METAKD_INLINE void start(const Packed<A>& packed) const {
    __builtin_memset(key, 0, packed.head.keys * packed.widths.s * sizeof(A));
  }

  // ``block``: see Packed::for_blocks; cleared where unseen.
  METAKD_INLINE void add(const Packed<A>& packed, const A* block, int64_t q, int64_t rows, int64_t first,
                         int64_t keys) const {
    const int64_t all = packed.widths.all, own = packed.widths.s, stride = packed.stride;
    const Factors<A> by_key{block, stride, 1, packed.key + first * all, all, keys};
    multiply(&by_key, 1, rows, own, query + q * own, own, false);
    const Factors<A> by_query{block, 1, stride, packed.query + q * all, all, rows};
    multiply(&by_query, 1, keys, own, key + first * own, own, true);
  }

  // ``factor`` is that of the loss; the packed queries carry the scale of the scores, the keys do not.
  METAKD_NOINLINE void write_to(
      const Packed<A>& packed, double factor, const Matrix& to_query, const Matrix& to_key) const {
    const Head& head = packed.head;
    const int64_t own = packed.widths.s;
    scatter(query, own, factor * head.scale_s, head.query, head.queries, to_query, 0, head.length);
    scatter(key, own, factor, head.key, head.keys, to_key, 0, head.length);
  }

  // The sum of both, where queries and keys are the same rows; rounded once.
  METAKD_NOINLINE void write_sum_to(const Packed<A>& packed, double factor, const Matrix& to) const {
    constexpr int64_t W = Float<A>::lanes;
    const Head& head = packed.head;
    const int64_t own = packed.widths.s;
    const Vector<A> scale = per_lane<A>(head.scale_s);
    A* const sum = packed.query;  // not needed any more
    int64_t q = 0, k = 0;
    for (int64_t position = 0; position < head.length; ++position) {
      const bool is_query = q < head.queries && head.query[q] == position;
      const bool is_key = k < head.keys && head.key[k] == position;
      for (int64_t c = 0; c < own; c += W) {
        Vector<A> both{};
        if (is_query) both += load(query + q * own + c) * scale;
        if (is_key) both += load(key + k * own + c);
        store(sum + c, both);
      }
      scatter(sum, own, factor, &position, is_query || is_key, to, position, position + 1);
      q += is_query;
      k += is_key;
    }
  }
};

}  // namespace METAKD_ISA
