// Prototypes and what is computed from them on a CPU, for one instruction set (see vectors.h).
// Torch-free.
//
// Legend: N rows, B batch, L length, H hidden size, K domains, M classes.

#include "vectors.h"

namespace METAKD_ISA {

// to[0 .. width) += the numbers of a row, in double. ``to`` has room for whole vectors.
template <class A, class T>
METAKD_INLINE void add_row(double* to, const T* row, int64_t width) {
  for_vectors<A>(width, [&](int64_t c, int64_t count) METAKD_LAMBDA {
    add_wide<A>(to + c, count == Float<A>::lanes ? read<A>(row + c) : read_some<A>(row + c, count));
  });
}

// Rows [0, rows) of a matrix, from one column on, into sums[slot[row]] where that is not negative.
template <class A>
METAKD_NOINLINE void add_rows(const void* from, Type type, int64_t stride, int64_t rows, int64_t width,
                              const int64_t* slot, double* sums, int64_t sums_stride) {
  with_narrow_type<A>(type, [&](auto* like) METAKD_LAMBDA {
    const auto* row = numbers(from, like);
    for (int64_t r = 0; r < rows; ++r, row += stride)
      if (slot[r] >= 0) add_row<A>(sums + slot[r] * sums_stride, row, width);
  });
}

template <class A>
METAKD_NOINLINE void write_quotient(
    const double* sums, double divisor, int64_t width, void* to, Type type) {
  with_narrow_type<A>(type, [&](auto* like) METAKD_LAMBDA {
    using T = std::remove_pointer_t<decltype(like)>;
    T* row = numbers(to, like);
    for (int64_t c = 0; c < width; ++c) row[c] = static_cast<T>(static_cast<A>(sums[c] / divisor));
  });
}

// A row of ones' own type, divided; both of ``type``.
template <class A>
METAKD_NOINLINE void divide_row(const void* from, double divisor, int64_t width, void* to, Type type) {
  const Vector<A> by = per_lane<A>(divisor);
  with_narrow_type<A>(type, [&](auto* like) METAKD_LAMBDA {
    const auto* row = numbers(from, like);
    auto* out = numbers(to, like);
    for_vectors<A>(width, [&](int64_t c, int64_t count) METAKD_LAMBDA {
      if (count == Float<A>::lanes) write(out + c, read<A>(row + c) / by);
      else write_some(out + c, read_some<A>(row + c, count) / by, count);
    });
  });
}

// a . b in double; sizes are multiples of a vector.
template <class A>
METAKD_INLINE double dot(const A* a, const A* b, int64_t size) {
  Vector<double> sum{};
  Vector<A> part{};
  for_sums<A>(size, [&](int64_t c, int64_t) METAKD_LAMBDA {
    part += load(a + c) * load(b + c);
  }, [&]() METAKD_LAMBDA {
    add_wide<A>(sum, part);
    part = Vector<A>{};
  });
  return total_of<double>(sum);
}

// Row minus center (null: 0) as numbers of A, padded with zeros to whole vectors; returns its norm, at
// least F.normalize's eps.
template <class A>
METAKD_INLINE double centered(const void* from, Type type, const A* center, int64_t width, A* to) {
  constexpr int64_t W = Float<A>::lanes;
  with_narrow_type<A>(type, [&](auto* like) METAKD_LAMBDA {
    const auto* row = numbers(from, like);
    for_vectors<A>(width, [&](int64_t c, int64_t count) METAKD_LAMBDA {
      Vector<A> x = count == W ? read<A>(row + c) : read_some<A>(row + c, count);
      if (center) x -= load(center + c);
      store(to + c, x);
    });
  });
  const double norm = ::sqrt(dot(to, to, (width + W - 1) / W * W));
  return norm < 1e-12 ? 1e-12 : norm;
}

// Prototypes, centered and of length 1: to[cell * stride].
template <class A>
METAKD_NOINLINE void normalise(
    const Scores& scores, const void* prototypes, Type type, int64_t row_stride, void* to) {
  A* row = static_cast<A*>(to);
  for (int64_t cell = 0; cell < scores.domains * scores.classes; ++cell, row += scores.stride) {
    if (!scores.exists[cell]) continue;
    const char* from = static_cast<const char*>(prototypes) + cell * row_stride * bytes_of(type);
    const double norm = centered(from, type, static_cast<const A*>(scores.center), scores.width, row);
    const Vector<A> by = per_lane<A>(norm);
    for (int64_t c = 0; c < scores.width; c += Float<A>::lanes) store(row + c, load(row + c) / by);
  }
}

// See reference.prototype_score. ``scratch``: one row.
template <class A>
METAKD_NOINLINE void score_rows(const Scores& scores, int64_t begin, int64_t end, void* scratch) {
  A* const row = static_cast<A*>(scratch);
  const A* const units = static_cast<const A*>(scores.units);
  const int64_t domains = scores.domains, classes = scores.classes;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t domain = scores.domain[r], label = scores.label[r];
    A& to = static_cast<A*>(scores.to)[r];
    if (domain < 0 || domain >= domains || label < 0 || label >= classes) {
      to = NAN;
      continue;
    }
    const char* from = static_cast<const char*>(scores.embedding) +
        r * scores.embedding_stride * bytes_of(scores.type);
    const double norm =
        centered(from, scores.type, static_cast<const A*>(scores.center), scores.width, row);
    double own = 0, others = 0;
    int64_t count = 0;
    for (int64_t k = 0; k < domains; ++k) {
      const int64_t cell = k * classes + label;
      if (!scores.exists[cell]) continue;
      const double cosine = dot(row, units + cell * scores.stride, scores.stride) / norm;
      if (k == domain) own = cosine;
      else others += cosine, ++count;
    }
    const bool has_own = scores.exists[domain * classes + label];
    if (count > 0) others /= static_cast<double>(count);
    // A part that does not exist is 0, so the plain sum is the other part at full weight.
    to = static_cast<A>(
        has_own && count > 0 ? scores.alpha * own + (1 - scores.alpha) * others : own + others);
  }
}

// (1 + t) / (exp((1 - p)^2) + 1), p the softmax of the label's logit. Lanes are rows.
template <class A>
METAKD_NOINLINE void expertise_rows(const Expertise& of, int64_t begin, int64_t end) {
  constexpr int64_t W = Float<A>::lanes;
  const Exp<A> exp(1.0);
  with_narrow_type<A>(of.type, [&](auto* like) METAKD_LAMBDA {
    const auto* logits = numbers(of.logits, like);
    for (int64_t first = begin; first < end; first += W) {
      const int64_t count = end - first < W ? end - first : W;
      const std::remove_pointer_t<decltype(like)>* rows[W];
      int64_t label[W];
      Vector<A> at_label{}, t{};
      for (int64_t lane = 0; lane < W; ++lane) {  // what has no row computes the last one again
        const int64_t r = first + (lane < count ? lane : count - 1);
        rows[lane] = logits + r * of.row;
        label[lane] = of.label[r];
        const bool known = 0 <= label[lane] && label[lane] < of.classes;
        at_label[lane] = known ? static_cast<A>(rows[lane][label[lane] * of.column]) : NAN;
        t[lane] = static_cast<const A*>(of.t)[r];
      }
      Vector<A> max = every(static_cast<A>(-INFINITY)), sum{};
      for (int64_t c = 0; c < of.classes; ++c) {
        Vector<A> x{};
        for (int64_t lane = 0; lane < W; ++lane) x[lane] = static_cast<A>(rows[lane][c * of.column]);
        max = x > max ? x : max;
      }
      for (int64_t c = 0; c < of.classes; ++c) {
        Vector<A> x{};
        for (int64_t lane = 0; lane < W; ++lane) x[lane] = static_cast<A>(rows[lane][c * of.column]);
        sum += exp(x - max);
      }
      const Vector<A> one = every<A>(1), miss = one - exp(at_label - max) / sum;
      const Vector<A> weight = (one + t) / (exp(miss * miss) + one);
      store_some(static_cast<A*>(of.to) + first, weight, count);
    }
  });
}

template <class A>
Forms forms_in() {
  return {add_rows<A>,  write_quotient<A>, divide_row<A>,
          normalise<A>, score_rows<A>,     expertise_rows<A>};
}

inline Forms forms(bool is_double) { return is_double ? forms_in<double>() : forms_in<float>(); }

}  // namespace METAKD_ISA
