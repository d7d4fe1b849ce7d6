// attention_score_mse of one head on a CPU, for one instruction set (see vectors.h). Torch-free.
//
// Two forms. Gram: ||X Y^T||^2 = <X^T X, Y^T Y> with X = [scale_s Q_s | -scale_t Q_t], Y = [K_s | K_t],
// dX = 2 X (Y^T Y), dY = 2 Y (X^T X), student's columns only; rows are read in chunks and nothing of
// the head is kept. Tiled: differences of scores, a block at a time. The choice is the caller's.
//
// Legend: as attention_heads.h; columns s and t: of the student and of the teacher.

#include "attention_heads.h"

namespace METAKD_ISA {

// Rows that are multiplied at a time, and summed one after the other.
constexpr int64_t CHUNK = 16 * ROWS;

// ``size`` is a multiple of a vector.
template <class A>
METAKD_INLINE double inner_product(const A* a, const A* b, int64_t size) {
  constexpr int64_t W = Float<double>::lanes;
  Vector<double> even{}, odd{};
  int64_t i = 0;
  for (; i + 2 * W <= size; i += 2 * W) {
    even += read<double>(a + i) * read<double>(b + i);
    odd += read<double>(a + i + W) * read<double>(b + i + W);
  }
  if (i < size) even += read<double>(a + i) * read<double>(b + i);
  return total_of<double>(even + odd);
}

template <class A>
struct Gram {
  const Head& head;
  const Widths<A> widths;
  static constexpr int64_t BLOCK = 2 * Float<A>::lanes;  // columns of the teacher's block at a time

  A* rows;  // [CHUNK, widths.all]

  METAKD_INLINE Gram(const Head& head, Memory<A>& memory)
      : head(head), widths(head.query_s.width, head.query_t.width) {
    rows = memory.take((CHUNK + ROWS) * widths.all);
  }

  // own: Z^T Z_s [widths.all, widths.s]; rest: Z_t^T Z_t [widths.t, widths.t], of which the entries
  // from the diagonal blocks down count; null if it is not wanted.
  METAKD_NOINLINE void sum(const Matrix& s, double scale_s, const Matrix& t, double scale_t,
                           const int64_t* positions, int64_t count, A* own, A* rest) const {
    const int64_t all = widths.all;
    if (count == 0) {
      __builtin_memset(own, 0, all * widths.s * sizeof(A));
      if (rest) __builtin_memset(rest, 0, widths.t * widths.t * sizeof(A));
    }
    for (int64_t r = 0; r < count; r += CHUNK) {
      const int64_t size = count - r < CHUNK ? count - r : CHUNK;
      gather(s, positions + r, size, scale_s, rows, all);
      gather(t, positions + r, size, scale_t, rows + widths.s, all);
      const Factors<A> with_own{rows, 1, all, rows, all, size};
      multiply(&with_own, 1, all, widths.s, own, widths.s, r > 0);
      for (int64_t c = 0; rest && c < widths.t; c += BLOCK) {
        const A* from = rows + widths.s + c;
        const Factors<A> with_rest{from, 1, all, from, all, size};
        multiply(&with_rest, 1, widths.t - c, columns(c), rest + c * widths.t + c, widths.t, r > 0);
      }
    }
  }

  METAKD_INLINE int64_t columns(int64_t c) const { return widths.t - c < BLOCK ? widths.t - c : BLOCK; }

  METAKD_INLINE double rest_product(const A* a, const A* b) const {
    double sum = 0;
    for (int64_t c = 0; c < widths.t; c += BLOCK) {
      const int64_t size = columns(c);
      for (int64_t r = c; r < widths.t; ++r) {
        const int64_t at = r * widths.t + c;
        const double part = inner_product(a + at, b + at, size);
        sum += r < c + size ? part : 2 * part;
      }
    }
    return sum;
  }
};

// Each of the following returns how many bytes of scratch memory it needs, and does nothing without.

// gram: [2, D_s + D_t, D_s], contiguous. norm_t: ||S_t||^2, or null.
template <class A>
METAKD_NOINLINE int64_t gram_forward(
    const Head& head, const void* norm_t, void* gram, GramValue& found, void* scratch) {
  Memory<A> memory{static_cast<A*>(scratch)};
  const Gram<A> by(head, memory);
  const int64_t s = by.widths.s, t = by.widths.t, all = by.widths.all;
  A *own[2], *rest[2];
  for (int side = 0; side < 2; ++side) {
    own[side] = memory.take((all + ROWS) * s);
    rest[side] = memory.take((t + ROWS) * t);
  }
  if (!scratch) return memory.bytes();
  by.sum(head.query_s, head.scale_s, head.query_t, -head.scale_t, head.query, head.queries, own[0],
         norm_t ? nullptr : rest[0]);
  by.sum(head.key_s, 1.0, head.key_t, 1.0, head.key, head.keys, own[1], norm_t ? nullptr : rest[1]);
  const int64_t width_s = head.query_s.width, width_t = head.query_t.width;
  A* to = static_cast<A*>(gram);
  for (int side = 0; side < 2; ++side)
    for (int64_t r = 0; r < width_s + width_t; ++r, to += width_s) {
      const A* from = own[side] + (r < width_s ? r : r - width_s + s) * s;
      __builtin_memcpy(to, from, width_s * sizeof(A));
    }
  const double square_s = inner_product(own[0], own[1], s * s);
  const double cross = inner_product(own[0] + s * s, own[1] + s * s, t * s);
  const double square_t =
      norm_t ? static_cast<double>(*static_cast<const A*>(norm_t)) : by.rest_product(rest[0], rest[1]);
  found = {square_s + 2 * cross + square_t, square_s + square_t};
  return memory.bytes();
}

// to = factor * rows of [s | t] times gram [D_s + D_t, D_s]
template <class A>
METAKD_INLINE void gram_slopes(const Gram<A>& by, const Matrix& s, double scale_s, const Matrix& t,
                               double scale_t, const int64_t* positions, int64_t count, const A* gram,
                               double factor, A* right, A* product, const Matrix& to) {
  const int64_t width_s = s.width, own = by.widths.s, all = by.widths.all;
  for (int64_t r = 0; r < width_s + t.width; ++r)
    __builtin_memcpy(right + r * own, gram + r * width_s, width_s * sizeof(A));
  int64_t position = 0;  // of the first row that is not written yet
  for (int64_t r = 0; r < count; r += CHUNK) {
    const int64_t size = count - r < CHUNK ? count - r : CHUNK;
    gather(s, positions + r, size, scale_s, by.rows, all);
    gather(t, positions + r, size, scale_t, by.rows + own, all);
    const Factors<A> terms[2] = {{by.rows, all, 1, right, own, width_s},
                                 {by.rows + own, all, 1, right + width_s * own, own, t.width}};
    multiply(terms, 2, size, own, product, own, false);
    const int64_t next = positions[r + size - 1] + 1;
    scatter(product, own, factor, positions + r, size, to, position, next);
    position = next;
  }
  scatter(product, own, factor, positions, 0, to, position, by.head.length);
}

template <class A>
METAKD_NOINLINE int64_t gram_backward(const Head& head, double dhead, const void* gram,
                                      const Matrix& dquery, const Matrix& dkey, void* scratch) {
  Memory<A> memory{static_cast<A*>(scratch)};
  const Gram<A> by(head, memory);
  A* right = memory.take((head.query_s.width + head.query_t.width) * by.widths.s);
  A* product = memory.take((CHUNK + ROWS) * by.widths.s);
  if (!scratch) return memory.bytes();
  const A* of_queries = static_cast<const A*>(gram);
  const A* of_keys = of_queries + (head.query_s.width + head.query_t.width) * head.query_s.width;
  gram_slopes(by, head.query_s, head.scale_s, head.query_t, -head.scale_t, head.query, head.queries,
              of_keys, 2 * dhead * head.scale_s, right, product, dquery);
  gram_slopes(by, head.key_s, 1.0, head.key_t, 1.0, head.key, head.keys, of_queries, 2 * dhead,
              right, product, dkey);
  return memory.bytes();
}

template <class A>
METAKD_NOINLINE int64_t tiled_forward(const Head& head, double& value, void* scratch) {
  Memory<A> memory{static_cast<A*>(scratch)};
  const Packed<A> packed(head, false, memory);
  A* const block = packed.take_block(memory);
  if (!scratch) return memory.bytes();
  packed.pack(head.scale_s, -head.scale_t);
  Vector<double> sum{};
  packed.for_blocks([&](int64_t q, int64_t rows, int64_t first, int64_t keys) METAKD_LAMBDA {
    packed.scores(packed.both, q, rows, first, keys, block);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t from = head.from[q + r], to = head.to[q + r];
      const A* row = block + r * packed.stride + from - first;
      Vector<A> part{};
      for_sums<A>(to - from, [&](int64_t c, int64_t count) METAKD_LAMBDA {
        Vector<A> x = load(row + c);
        if (count < Float<A>::lanes) x = cut<A>(x, count);
        part += x * x;
      }, [&]() METAKD_LAMBDA {
        add_wide<A>(sum, part);
        part = Vector<A>{};
      });
    }
  });
  value = total_of<double>(sum);
  return memory.bytes();
}

template <class A>
METAKD_NOINLINE int64_t tiled_backward(const Head& head, double dhead, const Matrix& dquery,
                                       const Matrix& dkey, void* scratch) {
  Memory<A> memory{static_cast<A*>(scratch)};
  const Packed<A> packed(head, true, memory);
  const Slopes<A> slopes(packed, memory);
  A* const block = packed.take_block(memory);
  if (!scratch) return memory.bytes();
  packed.pack(head.scale_s, -head.scale_t);
  slopes.start(packed);
  packed.for_blocks([&](int64_t q, int64_t rows, int64_t first, int64_t keys) METAKD_LAMBDA {
    packed.scores(packed.both, q, rows, first, keys, block);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t from = head.from[q + r] - first, to = head.to[q + r] - first;
      packed.clear_unseen(block + r * packed.stride, from, to, keys);
    }
    slopes.add(packed, block, q, rows, first, keys);
  });
  slopes.write_to(packed, 2 * dhead, dquery, dkey);
  return memory.bytes();
}

template <class A>
Forms forms_in() {
  return {gram_forward<A>, gram_backward<A>, tiled_forward<A>, tiled_backward<A>};
}

inline Forms forms(bool is_double) { return is_double ? forms_in<double>() : forms_in<float>(); }

}  // namespace METAKD_ISA
