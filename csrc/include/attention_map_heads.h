// attention_kl and attention_prob_mse of one head on a CPU, for one instruction set (see vectors.h).
// Torch-free.
//
// Scores are computed in blocks that hold whole rows, of both sides, and never kept. Maxima are found
// again in the backward (they are exact), so stats hold the logarithms of sums relative to them, which
// loses no digits where scores are large.
//
// Legend: as attention_heads.h; L length, P_s / P_t maps of student and teacher.

#include "attention_heads.h"

namespace METAKD_ISA {

// A NaN is passed over; the sums show it.
template <class A>
METAKD_INLINE Vector<A> row_maximum(const A* row, int64_t size) {
  Vector<A> max = every(static_cast<A>(-INFINITY));
  for_vectors<A>(size, [&](int64_t c, int64_t count) METAKD_LAMBDA {
    Vector<A> x = load(row + c);
    if (count < Float<A>::lanes) x = cut<A>(x, count, -INFINITY);
    max = x > max ? x : max;
  });
  return every(maximum_of<A>(max));
}

template <class A>
METAKD_INLINE void take_total(double& to, Vector<A>& part) {
  to += total_of<A>(part);
  part = Vector<A>{};
}

template <class A>
struct Maps {
  const Packed<A> packed;
  A *const block_s, *const block_t;  // see Packed::for_blocks
  const Exp<A> exp;

  METAKD_INLINE Maps(const Head& head, bool keeps_keys, Memory<A>& memory)
      : packed(head, keeps_keys, memory),
        block_s(packed.take_block(memory)),
        block_t(packed.take_block(memory)),
        exp(1.0) {}

  // f(position of the query, scores of the student, of the teacher, and of which columns [from, to) it
  // sees the keys) for the rows of a block.
  template <class F>
  METAKD_INLINE void for_rows(int64_t q, int64_t rows, int64_t first, int64_t keys, F f) const {
    packed.scores(packed.student, q, rows, first, keys, block_s);
    packed.scores(packed.teacher, q, rows, first, keys, block_t);
    for (int64_t r = 0; r < rows; ++r)
      f(packed.head.query[q + r], block_s + r * packed.stride, block_t + r * packed.stride,
        packed.head.from[q + r] - first, packed.head.to[q + r] - first);
  }

  // KL of a row, and log sum exp(score - maximum) of either side.
  METAKD_INLINE double divergence(
      const A* s, const A* t, int64_t size, double& lsum_s, double& lsum_t) const {
    const Vector<A> max_s = row_maximum(s, size), max_t = row_maximum(t, size), zero{};
    Vector<A> part_s{}, part_t{}, part_cross{};
    double sum_s = 0, sum_t = 0, cross = 0;
    for_sums<A>(size, [&](int64_t c, int64_t count) METAKD_LAMBDA {
      const Vector<A> ds = load(s + c) - max_s, dt = load(t + c) - max_t;
      Vector<A> es = exp(ds), et = exp(dt);
      if (count < Float<A>::lanes) {
        es = cut<A>(es, count);
        et = cut<A>(et, count);
      }
      part_s += es;
      part_t += et;
      part_cross += et == zero ? zero : et * (dt - ds);
    }, [&]() METAKD_LAMBDA {
      take_total<A>(sum_s, part_s);
      take_total<A>(sum_t, part_t);
      take_total<A>(cross, part_cross);
    });
    lsum_s = ::log(sum_s);
    lsum_t = ::log(sum_t);
    // From the quotient, without the rounding of either logarithm.
    return cross / sum_t + ::log(sum_s / sum_t);
  }

  // Replaces scores by exp(score - maximum).
  METAKD_INLINE double exponentials(A* row, int64_t size) const {
    const Vector<A> max = row_maximum(row, size);
    Vector<A> part{};
    double sum = 0;
    for_sums<A>(size, [&](int64_t c, int64_t count) METAKD_LAMBDA {
      Vector<A> e = exp(load(row + c) - max);
      store(row + c, e);
      if (count < Float<A>::lanes) e = cut<A>(e, count);
      part += e;
    }, [&]() METAKD_LAMBDA { take_total<A>(sum, part); });
    return sum;
  }

  // Sum of (P_s - P_t)^2 of a row whose scores it replaces, and of P_s (P_s - P_t).
  METAKD_INLINE double squares(
      A* s, A* t, int64_t size, double& lsum_s, double& lsum_t, double& inner) const {
    const double sum_s = exponentials(s, size), sum_t = exponentials(t, size);
    const Vector<A> share_s = per_lane<A>(1 / sum_s), share_t = per_lane<A>(1 / sum_t);
    Vector<A> part{}, part_inner{};
    double sum = 0;
    inner = 0;
    for_sums<A>(size, [&](int64_t c, int64_t count) METAKD_LAMBDA {
      const Vector<A> p_s = load(s + c) * share_s;
      Vector<A> gap = p_s - load(t + c) * share_t, product = p_s * gap;
      if (count < Float<A>::lanes) {
        gap = cut<A>(gap, count);
        product = cut<A>(product, count);
      }
      part += gap * gap;
      part_inner += product;
    }, [&]() METAKD_LAMBDA {
      take_total<A>(sum, part);
      take_total<A>(inner, part_inner);
    });
    lsum_s = ::log(sum_s);
    lsum_t = ::log(sum_t);
    return sum;
  }
};

// Each of the following returns how many bytes of scratch memory it needs, and does nothing without.

// stats: [3, L] lsum_s, lsum_t, inner; zeros where nothing is written.
template <class A, bool squared>
METAKD_NOINLINE int64_t map_forward(const Head& head, double& value, void* stats, void* scratch) {
  Memory<A> memory{static_cast<A*>(scratch)};
  const Maps<A> maps(head, false, memory);
  if (!scratch) return memory.bytes();
  maps.packed.pack(head.scale_s, head.scale_t);
  A* const lsums_s = static_cast<A*>(stats);
  A *const lsums_t = lsums_s + head.length, *const inners = lsums_t + head.length;
  double total = 0;
  maps.packed.for_blocks([&](int64_t q, int64_t rows, int64_t first, int64_t keys) METAKD_LAMBDA {
    maps.for_rows(q, rows, first, keys, [&](
        int64_t position, A* s, A* t, int64_t from, int64_t to) METAKD_LAMBDA {
      if (from == to) return;
      double lsum_s, lsum_t, inner = 0;
      if constexpr (squared) total += maps.squares(s + from, t + from, to - from, lsum_s, lsum_t, inner);
      else total += maps.divergence(s + from, t + from, to - from, lsum_s, lsum_t);
      lsums_s[position] = static_cast<A>(lsum_s);
      lsums_t[position] = static_cast<A>(lsum_t);
      inners[position] = static_cast<A>(inner);
    });
  });
  value = total;
  return memory.bytes();
}

// dS_s = dhead (P_s - P_t), or with squared dhead 2 P_s ((P_s - P_t) - inner). Without ``dkey`` the
// keys are the queries, and the sum of both gradients goes to ``dquery``.
template <class A, bool squared>
METAKD_NOINLINE int64_t map_backward(const Head& head, double dhead, const void* stats,
                                     const Matrix& dquery, const Matrix* dkey, void* scratch) {
  Memory<A> memory{static_cast<A*>(scratch)};
  const Maps<A> maps(head, true, memory);
  const Slopes<A> slopes(maps.packed, memory);
  if (!scratch) return memory.bytes();
  maps.packed.pack(head.scale_s, head.scale_t);
  slopes.start(maps.packed);
  const A* const lsums_s = static_cast<const A*>(stats);
  const A *const lsums_t = lsums_s + head.length, *const inners = lsums_t + head.length;
  maps.packed.for_blocks([&](int64_t q, int64_t rows, int64_t first, int64_t keys) METAKD_LAMBDA {
    maps.for_rows(q, rows, first, keys, [&](
        int64_t position, A* s, A* t, int64_t from, int64_t to) METAKD_LAMBDA {
      const Vector<A> max_s = row_maximum(s + from, to - from), max_t = row_maximum(t + from, to - from);
      const Vector<A> lsum_s = every(lsums_s[position]), lsum_t = every(lsums_t[position]);
      const Vector<A> inner = every(inners[position]);
      for (int64_t c = from; c < to; c += Float<A>::lanes) {
        const Vector<A> p_s = maps.exp(load(s + c) - max_s - lsum_s);
        const Vector<A> gap = p_s - maps.exp(load(t + c) - max_t - lsum_t);
        store(s + c, squared ? p_s * (gap - inner) : gap);
      }
      maps.packed.clear_unseen(s, from, to, keys);
    });
    slopes.add(maps.packed, maps.block_s, q, rows, first, keys);
  });
  const double factor = squared ? 2 * dhead : dhead;
  if (dkey) slopes.write_to(maps.packed, factor, dquery, *dkey);
  else slopes.write_sum_to(maps.packed, factor, dquery);
  return memory.bytes();
}

template <class A, bool squared>
Forms forms_in() {
  return {map_forward<A, squared>, map_backward<A, squared>};
}

inline Forms forms(bool is_double, bool squared) {
  if (is_double) return squared ? forms_in<double, true>() : forms_in<double, false>();
  return squared ? forms_in<float, true>() : forms_in<float, false>();
}

}  // namespace METAKD_ISA
