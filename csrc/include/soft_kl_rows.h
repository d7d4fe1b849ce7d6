// Rows of the soft_kl family on a CPU, for one instruction set. Torch-free.
//
// Included once per instruction set, with METAKD_ISA (the namespace) and METAKD_BYTES (of a vector
// register) defined and that instruction set switched on by a pragma. Nothing of std:: is instantiated
// here: whatever is compiled for a newer processor must stay out of the reach of an older one, and
// the linker keeps one copy of an inline function for everybody.
//
// Vectors are the compilers' own (GCC, Clang): they need no library, and one text serves AVX-512,
// AVX2 and the base of any processor.
//
// The same mathematics runs in two layouts. Wide: lanes are neighbouring classes of one row, padded
// with -inf (without weight in every divergence), and totals are doubles. Narrow: lanes are
// neighbouring rows, so that 2 to NARROW classes fill a register too.
//
// Legend: N rows, C classes, V classes that count, W lanes; _s student, _t teacher; A the type that
// is computed in (float, or double where an input is double); X a value per row: a double when wide, a
// vector of A when narrow. The formulas stand in metakd.kernels.soft_kl.

#include "vectors.h"

namespace METAKD_ISA {

template <class X>
struct Sums {
  X s, t, cross, one;  // of exp(s'), of exp(t'), of weight times difference, of exp(s - max_s)
};

// Of the mixture's classes: of p (log p - log m), q (log q - log m), and the latter less ``top``.
template <class X>
struct Shares {
  X p, q, inner;
};

// What is known of a row once it was read: the rows of ``stats``, and 1 / sum of each exponential.
template <class X>
struct Row {
  X max_s, lsum_s, max_t, lsum_t, inner, lsum_1, shift;
  X inverse_s, inverse_t, inverse_1;
  X value;
};

template <class A, Kind kind, bool labelled>
struct Math {
  using V = Vector<A>;
  static constexpr int W = Float<A>::lanes;

  const Job& job;
  const Exp<A> soft, hard;  // exp(x / T), exp(x)
  const V zero = {};

  explicit METAKD_INLINE Math(const Job& job) : job(job), soft(1.0 / job.temperature), hard(1.0) {}

  // Columns

  // A gradient q (g - inner) cancels where one class has nearly all of q, and the reverse KL's |g| may be
  // thousands. So g is counted from that of the student's first maximum, there and in ``inner``: the
  // reverse KL's g = ((s - max_s) - (t - max_t) + shift) / T is exactly 0 there. ``shift`` is t - max_t
  // there. The mixture's g is small: at T >= 1 it loses no digits that count, and this would cost time.
  METAKD_INLINE bool is_shifted() const {
    return kind == Kind::reverse || (kind == Kind::mixture && job.temperature < 1);
  }

  // Where ``dt`` is -inf, the reverse KL is infinite, and the mixture does not see the difference.
  METAKD_INLINE V shift_of(V dt) const {
    const V finite = kind == Kind::reverse ? zero : every<A>(Float<A>::lowest);
    return dt == every<A>(-INFINITY) ? finite : dt;
  }

  METAKD_INLINE void add(V ds, V dt, V shift, Sums<V>& sums) const {
    const V es = soft(ds), et = soft(dt);
    sums.s += es;
    sums.t += et;
    if constexpr (kind == Kind::forward) sums.cross += et == zero ? zero : et * (dt - ds);
    if constexpr (kind == Kind::reverse) sums.cross += es == zero ? zero : es * ((ds - dt) + shift);
    if constexpr (labelled) sums.one += hard(ds);
  }

  // log p - log m, log q - log m. From r = log p - log q, whose rounding errors cancel in the sum:
  // m over the larger of p and q is share of the larger + share of the smaller * exp(-|r|).
  // ``top``: log q - log m at the student's maximum, or 0.
  struct Mixture {
    V beta, rest, inv_t, between, top;

    METAKD_INLINE Mixture(const Math& math, V between, V shift)
        : beta(per_lane<A>(math.job.beta)),
          rest(per_lane<A>(1.0 - math.job.beta)),
          inv_t(per_lane<A>(1.0 / math.job.temperature)),
          between(between),
          top{} {
      V log_p;
      if (kind == Kind::mixture && math.is_shifted()) logs(math.hard, V{}, shift, log_p, top);
    }

    METAKD_INLINE void logs(const Exp<A>& hard, V ds, V dt, V& log_p, V& log_q) const {
      const V r = (dt - ds) * inv_t - between;
      const auto teacher = r > V{};
      V ratio, ratio_less_one;  // of the smaller to the larger
      hard.compute(teacher ? -r : r, ratio, ratio_less_one);
      const V larger = teacher ? beta : rest, smaller = teacher ? rest : beta;
      const V mix = log_of<A>(larger + smaller * ratio, smaller * ratio_less_one);
      log_p = (teacher ? V{} : r) - mix;
      log_q = (teacher ? -r : V{}) - mix;
    }
  };

  template <class X>
  METAKD_INLINE Mixture mixture(const Row<X>& row) const {
    return Mixture(*this, per_lane<A>(row.lsum_t - row.lsum_s), per_lane<A>(row.shift));
  }

  METAKD_INLINE void add_mixture(
      const Mixture& mix, V ds, V dt, V inverse_s, V inverse_t, Shares<V>& sums) const {
    const V q = soft(ds) * inverse_s, p = soft(dt) * inverse_t;
    V log_p, log_q;
    mix.logs(hard, ds, dt, log_p, log_q);
    log_q = q == zero ? zero : log_q;
    sums.p += p == zero ? zero : p * log_p;
    sums.q += q * log_q;
    sums.inner += q * (log_q - mix.top);
  }

  // Rows

  template <class X>
  METAKD_INLINE void finish_sums(const Sums<X>& sums, Row<X>& row) const {
    row.lsum_s = log_of<A>(sums.s);
    row.lsum_t = log_of<A>(sums.t);
    row.inverse_s = 1 / sums.s;
    row.inverse_t = 1 / sums.t;
    row.inner = X{};
    row.lsum_1 = row.inverse_1 = X{};
    if constexpr (labelled) {
      row.lsum_1 = log_of<A>(sums.one);
      row.inverse_1 = 1 / sums.one;
    }
    const auto inv_t = scalar<X>(1.0 / job.temperature);
    // lsum_t - lsum_s without the rounding of either.
    const X between = log_of<A>(sums.t * row.inverse_s);
    if constexpr (kind == Kind::forward)
      row.value = sums.cross * row.inverse_t * inv_t - between;
    if constexpr (kind == Kind::reverse) {
      row.inner = sums.cross * row.inverse_s * inv_t;
      row.value = row.inner - row.shift * inv_t + between;
    }
  }

  template <class X>
  METAKD_INLINE void finish_mixture(const Shares<X>& sums, Row<X>& row) const {
    const auto beta = scalar<X>(job.beta), rest = scalar<X>(1.0 - job.beta);
    row.inner = sums.inner * rest;
    row.value = sums.p * beta + sums.q * rest;
  }

  // ``picked``: the student's logit of the label.
  template <class X>
  METAKD_INLINE void finish_value(X picked, Row<X>& row) const {
    row.value = row.value * scalar<X>(job.scale);
    if constexpr (labelled)
      row.value += (row.lsum_1 - (picked - row.max_s)) * scalar<X>(job.hard_weight);
  }

  // A number of the caller's in the type that a vector of A, or a double, multiplies with.
  template <class X>
  static METAKD_INLINE auto scalar(double value) {
    if constexpr (sizeof(X) == sizeof(double)) return value;
    else return static_cast<A>(value);
  }

  // Gradient: everything that is constant in a row.
  struct Slope {
    V max_s, max_t, weight_s, weight_t, inverse_1, hard_weight, inv_t, shift, inner, rest;
    Mixture mix;
  };

  template <class X>
  METAKD_INLINE Slope slope(const Row<X>& row, X drow) const {
    const X weight = drow * scalar<X>(job.scale / job.temperature);
    return {
        per_lane<A>(row.max_s),
        per_lane<A>(row.max_t),
        per_lane<A>(weight * row.inverse_s),
        per_lane<A>(weight * row.inverse_t),
        per_lane<A>(row.inverse_1),
        per_lane<A>(drow * scalar<X>(job.hard_weight)),
        per_lane<A>(1.0 / job.temperature),
        per_lane<A>(row.shift),
        per_lane<A>(row.inner),
        per_lane<A>(1.0 - job.beta),
        mixture(row)};
  }

  // ``target``: 1 for the class of the label, 0 for others.
  METAKD_INLINE V gradient(const Slope& at, V s, V t, V target) const {
    const V ds = s - at.max_s, dt = t - at.max_t;
    const V es = soft(ds);
    V d;
    if constexpr (kind == Kind::forward) {
      d = es * at.weight_s - soft(dt) * at.weight_t;
    } else if constexpr (kind == Kind::reverse) {
      d = es == zero ? zero : es * at.weight_s * (((ds - dt) + at.shift) * at.inv_t - at.inner);
    } else {
      V log_p, log_q;
      at.mix.logs(hard, ds, dt, log_p, log_q);
      d = es == zero ? zero : es * at.weight_s * (at.rest * (log_q - at.mix.top) - at.inner);
    }
    if constexpr (labelled) d += (hard(ds) * at.inverse_1 - target) * at.hard_weight;
    return d;
  }
};

// Wide: one row at a time, lanes are classes

template <class A, Kind kind, bool labelled>
struct Wide {
  using V = Vector<A>;
  using M = Math<A, kind, labelled>;
  static constexpr int W = Float<A>::lanes;
  // Vectors summed in A before the sum goes to a double: keeps its error at that of one term.
  static constexpr int64_t CHUNK = 128;
  static constexpr int64_t LINE = 64 / sizeof(A);  // of the cache

  template <class F>
  static METAKD_INLINE void sweep(const A* s, const A* t, int64_t begin, int64_t end, F f) {
    int64_t c = begin;
    for (; c + W <= end; c += W) f(load(s + c), load(t + c));
    if (c < end) f(load_some(s + c, end - c), load_some(t + c, end - c));
  }

  // f(begin, end) in steps that sums in A are good for.
  template <class F>
  static METAKD_INLINE void chunks(int64_t size, F f) {
    for (int64_t c = 0; c < size; c += CHUNK * W) f(c, c + CHUNK * W < size ? c + CHUNK * W : size);
  }

  static METAKD_INLINE double total(V v) {
    double lanes[W];
    for (int lane = 0; lane < W; ++lane) lanes[lane] = v[lane];
#pragma GCC unroll 8
    for (int half = W / 2; half > 0; half /= 2)
      for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    return lanes[0];
  }

  // A NaN is passed over here; the sums show it.
  static METAKD_INLINE A maximum(const A* x, int64_t size) {
    const V lowest = every<A>(-INFINITY);
    V m0 = lowest, m1 = lowest, m2 = lowest, m3 = lowest;
    int64_t c = 0;
    for (; c + 4 * W <= size; c += 4 * W) {
      const V x0 = load(x + c), x1 = load(x + c + W), x2 = load(x + c + 2 * W), x3 = load(x + c + 3 * W);
      m0 = x0 > m0 ? x0 : m0;
      m1 = x1 > m1 ? x1 : m1;
      m2 = x2 > m2 ? x2 : m2;
      m3 = x3 > m3 ? x3 : m3;
    }
    m0 = m1 > m0 ? m1 : m0;
    m2 = m3 > m2 ? m3 : m2;
    m0 = m2 > m0 ? m2 : m0;
    A m = m0[0];
    for (int lane = 1; lane < W; ++lane) m = m0[lane] > m ? m0[lane] : m;
    for (; c < size; ++c) m = x[c] > m ? x[c] : m;
    return m;
  }

  // The teacher's logit at the student's first maximum.
  static METAKD_INLINE A at_maximum(const A* s, const A* t, int64_t size, A max) {
    const V m = every(max);
    int64_t c = 0;
    for (; c + 4 * W <= size; c += 4 * W) {
      const Integer<A> hit = (load(s + c) == m) | (load(s + c + W) == m) | (load(s + c + 2 * W) == m) |
          (load(s + c + 3 * W) == m);
      uint64_t words[METAKD_BYTES / 8], any = 0;
      __builtin_memcpy(words, &hit, sizeof(words));
      for (uint64_t word : words) any |= word;
      if (any) break;
    }
    while (c < size - 1 && s[c] != max) ++c;
    return t[c];
  }

  static METAKD_INLINE void find_shift(
      const M& math, const A* s, const A* t, int64_t size, Row<double>& row) {
    row.shift = 0;
    if (math.is_shifted()) {
      const A max_t = static_cast<A>(row.max_t);
      const V dt = every(at_maximum(s, t, size, static_cast<A>(row.max_s)) - max_t);
      row.shift = math.shift_of(dt)[0];
    }
  }

  // ``next_s``, ``next_t``: the rows after these, fetched meanwhile; null if there is nothing to fetch.
  // Math by value, here and below: the compiler knows then that no store changes it.
  static METAKD_NOINLINE void read(const Job& job, const M math, const A* s, const A* t,
                                   const A* next_s, const A* next_t, int64_t label, Row<double>& row) {
    row.max_s = maximum(s, job.classes);
    row.max_t = maximum(t, job.classes);
    const V max_s = per_lane<A>(row.max_s), max_t = per_lane<A>(row.max_t);
    find_shift(math, s, t, job.classes, row);
    const V shift = per_lane<A>(row.shift);
    Sums<double> sums{};
    chunks(job.classes, [&](int64_t begin, int64_t end) METAKD_LAMBDA {
      if (next_s)
        for (int64_t c = begin; c < end; c += LINE) {
          __builtin_prefetch(next_s + c);
          __builtin_prefetch(next_t + c);
        }
      Sums<V> part{};
      sweep(s, t, begin, end, [&](V x, V y) METAKD_LAMBDA {
        math.add(x - max_s, y - max_t, shift, part);
      });
      sums.s += total(part.s);
      sums.t += total(part.t);
      if constexpr (kind != Kind::mixture) sums.cross += total(part.cross);
      if constexpr (labelled) sums.one += total(part.one);
    });
    math.finish_sums(sums, row);
    if constexpr (kind == Kind::mixture) {
      const auto mix = math.mixture(row);
      const V inverse_s = per_lane<A>(row.inverse_s), inverse_t = per_lane<A>(row.inverse_t);
      Shares<double> shares{};
      chunks(job.classes, [&](int64_t begin, int64_t end) METAKD_LAMBDA {
        Shares<V> part{};
        sweep(s, t, begin, end, [&](V x, V y) METAKD_LAMBDA {
          math.add_mixture(mix, x - max_s, y - max_t, inverse_s, inverse_t, part);
        });
        shares.p += total(part.p);
        shares.q += total(part.q);
        shares.inner += total(part.inner);
      });
      math.finish_mixture(shares, row);
    }
    math.finish_value(labelled ? static_cast<double>(s[label]) : 0.0, row);
  }

  // ``to`` may be ``s``.
  static METAKD_NOINLINE void differentiate(const Job& job, const M math, const A* s, const A* t,
                                            const Row<double>& row, double drow, int64_t label, A* to) {
    const int64_t size = job.classes;
    const auto at = math.slope(row, drow);
    A at_label{};
    if constexpr (labelled)
      at_label = math.gradient(at, every(s[label]), every(t[label]), every<A>(1))[0];
    int64_t c = 0;
    for (; c + W <= size; c += W) store(to + c, math.gradient(at, load(s + c), load(t + c), V{}));
    if (c < size) {
      const V d = math.gradient(at, load_some(s + c, size - c), load_some(t + c, size - c), V{});
      store_some(to + c, d, size - c);
    }
    if constexpr (labelled) to[label] = at_label;
  }

  static METAKD_INLINE void recall(const Job& job, int64_t r, Row<double>& row) {
    const A* stats = static_cast<const A*>(job.stats) + r;
    row.max_s = stats[MAX_S * job.rows];
    row.lsum_s = stats[LSUM_S * job.rows];
    row.max_t = stats[MAX_T * job.rows];
    row.lsum_t = stats[LSUM_T * job.rows];
    row.inner = stats[INNER * job.rows];
    row.lsum_1 = stats[LSUM_1 * job.rows];
    row.shift = stats[SHIFT * job.rows];
    row.inverse_s = ::exp(-row.lsum_s);
    row.inverse_t = ::exp(-row.lsum_t);
    row.inverse_1 = ::exp(-row.lsum_1);
  }

  static METAKD_INLINE void run(const Job& job, Op op, int64_t begin, int64_t end, A* scratch_s) {
    const M math(job);
    A* const scratch_t = scratch_s + job.classes;
    const bool direct_s = job.student_type == Float<A>::type, direct_t = job.teacher_type == Float<A>::type;
    for (int64_t r = begin; r < end; ++r) {
      char* gradient = row_of(job.gradient, job.student_type, r, job.gradient_stride);
      if (job.is_masked(r)) {
        if (op != Op::backward) static_cast<A*>(job.values)[r] = 0;
        if (op == Op::forward)
          for (int k = 0; k < STATS; ++k) static_cast<A*>(job.stats)[k * job.rows + r] = 0;
        else
          __builtin_memset(gradient, 0, job.width * bytes_of(job.student_type));
        continue;
      }
      // Rows as numbers of type A: where they lie, or converted into the scratch.
      const char* own_s = row_of(job.student, job.student_type, r, job.student_stride);
      const char* own_t = row_of(job.teacher, job.teacher_type, r, job.teacher_stride);
      const A* s = direct_s ? reinterpret_cast<const A*>(own_s) : scratch_s;
      const A* t = direct_t ? reinterpret_cast<const A*>(own_t) : scratch_t;
      if (!direct_s) widen(own_s, job.student_type, scratch_s, job.classes);
      if (!direct_t) widen(own_t, job.teacher_type, scratch_t, job.classes);
      const int64_t label = labelled ? job.label[r * job.label_stride] : 0;
      Row<double> row;
      if (op == Op::backward) {
        recall(job, r, row);
      } else {
        const bool next = direct_s && direct_t && r + 1 < end;
        read(job, math, s, t, next ? s + job.student_stride : nullptr,
             next ? t + job.teacher_stride : nullptr, label, row);
        static_cast<A*>(job.values)[r] = static_cast<A>(row.value);
      }
      if (op == Op::forward) {
        const double all[STATS] = {
            row.max_s, row.lsum_s, row.max_t, row.lsum_t, row.inner, row.lsum_1, row.shift};
        for (int k = 0; k < STATS; ++k)
          static_cast<A*>(job.stats)[k * job.rows + r] = static_cast<A>(all[k]);
        continue;
      }
      const double drow = static_cast<const A*>(job.drows)[r * job.drows_stride];
      A* to = direct_s ? reinterpret_cast<A*>(gradient) : scratch_s;
      differentiate(job, math, s, t, row, drow, label, to);
      if (!direct_s) narrow(scratch_s, job.student_type, gradient, job.classes);
      const int64_t bytes = bytes_of(job.student_type);
      __builtin_memset(gradient + job.classes * bytes, 0, (job.width - job.classes) * bytes);
    }
  }
};

// Narrow: W rows at a time, lanes are rows

template <class A, Kind kind, bool labelled>
struct Narrow {
  using V = Vector<A>;
  using M = Math<A, kind, labelled>;
  static constexpr int W = Float<A>::lanes;

  // W rows from r on. Lanes whose row is masked or does not exist compute another one; what comes of
  // it is replaced by 0 before it is written.
  struct Block {
    A s[NARROW * W], t[NARROW * W];
    A at_label[W], label[W], drow[W];
    Integer<A> real;  // all bits or none
    int64_t r;
    int count;
  };

  static METAKD_INLINE V maximum(const A* x, int64_t size) {
    V m = load(x);
    for (int64_t c = 1; c < size; ++c) {
      const V next = load(x + c * W);
      m = next > m ? next : m;
    }
    return m;
  }

  static METAKD_INLINE void find_shift(const M& math, const Block& block, int64_t size, Row<V>& row) {
    row.shift = V{};
    if (math.is_shifted()) {
      V t = load(block.t);
      for (int64_t c = size - 1; c >= 0; --c)
        t = load(block.s + c * W) == row.max_s ? load(block.t + c * W) : t;
      row.shift = math.shift_of(t - row.max_t);
    }
  }

  static METAKD_NOINLINE void read(const Job& job, const M math, const Block& block, Row<V>& row) {
    const int64_t size = job.classes;
    const A *s = block.s, *t = block.t;
    row.max_s = maximum(s, size);
    row.max_t = maximum(t, size);
    find_shift(math, block, size, row);
    Sums<V> sums{};
    for (int64_t c = 0; c < size; ++c)
      math.add(load(s + c * W) - row.max_s, load(t + c * W) - row.max_t, row.shift, sums);
    math.finish_sums(sums, row);
    if constexpr (kind == Kind::mixture) {
      const auto mix = math.mixture(row);
      Shares<V> shares{};
      for (int64_t c = 0; c < size; ++c)
        math.add_mixture(mix, load(s + c * W) - row.max_s, load(t + c * W) - row.max_t,
                         row.inverse_s, row.inverse_t, shares);
      math.finish_mixture(shares, row);
    }
    math.finish_value(load(block.at_label), row);
  }

  // Overwrites block.s.
  static METAKD_NOINLINE void differentiate(const Job& job, const M math, Block& block, const Row<V>& row) {
    const int64_t size = job.classes;
    const auto at = math.slope(row, load(block.drow));
    const V labels = load(block.label);
    const Integer<A> real = block.real;
    for (int64_t c = 0; c < size; ++c) {
      const V target = labels == every(static_cast<A>(c)) ? every<A>(1) : V{};
      const V d = math.gradient(at, load(block.s + c * W), load(block.t + c * W), target);
      store(block.s + c * W, real ? d : V{});
    }
  }

  static METAKD_INLINE V recall_one(const Job& job, const Block& block, int k) {
    const A* from = static_cast<const A*>(job.stats) + k * job.rows + block.r;
    return block.count == W ? load(from) : load_some(from, block.count);
  }

  static METAKD_INLINE void write(A* to, V v, const Block& block) {
    v = block.real ? v : V{};
    if (block.count == W) store(to + block.r, v);
    else store_some(to + block.r, v, block.count);
  }

  static METAKD_INLINE void fill(const Job& job, Op op, int64_t r, int64_t end, Block& block) {
    block.r = r;
    block.count = end - r < W ? static_cast<int>(end - r) : W;
    int64_t rows[W];
    A real[W];
    const bool all = !job.mask && block.count == W;
    for (int lane = 0; all && lane < W; ++lane) {
      real[lane] = A(1);
      rows[lane] = r + lane;
    }
    for (int lane = 0; !all && lane < W; ++lane) {
      const bool is_real = lane < block.count && !job.is_masked(r + lane);
      real[lane] = is_real ? A(1) : A(0);
      rows[lane] = is_real ? r + lane : lane > 0 ? rows[lane - 1] : r;
    }
    block.real = load(real) != V{};
    gather(job.student, job.student_type, job.student_stride, rows, job.classes, block.s);
    gather(job.teacher, job.teacher_type, job.teacher_stride, rows, job.classes, block.t);
    for (int lane = 0; labelled && lane < W; ++lane) {
      const int64_t label = real[lane] != 0 ? job.label[rows[lane] * job.label_stride] : 0;
      block.label[lane] = static_cast<A>(label);
      block.at_label[lane] = block.s[label * W + lane];
    }
    for (int lane = 0; op != Op::forward && lane < W; ++lane)
      block.drow[lane] = static_cast<const A*>(job.drows)[rows[lane] * job.drows_stride];
  }

  static METAKD_INLINE void run(const Job& job, Op op, int64_t begin, int64_t end) {
    const M math(job);
    A* const values = static_cast<A*>(job.values);
    A* const stats = static_cast<A*>(job.stats);
    Block block{};
    Row<V> row;
    for (int64_t r = begin; r < end; r += W) {
      fill(job, op, r, end, block);
      if (op == Op::backward) {
        V all[STATS];
        for (int k = 0; k < STATS; ++k) all[k] = recall_one(job, block, k);
        row = {all[MAX_S], all[LSUM_S], all[MAX_T], all[LSUM_T], all[INNER], all[LSUM_1], all[SHIFT],
               exp_of<A>(-all[LSUM_S]), exp_of<A>(-all[LSUM_T]), exp_of<A>(-all[LSUM_1]), V{}};
      } else {
        read(job, math, block, row);
        write(values, row.value, block);
      }
      if (op == Op::forward) {
        const V all[STATS] = {
            row.max_s, row.lsum_s, row.max_t, row.lsum_t, row.inner, row.lsum_1, row.shift};
        for (int k = 0; k < STATS; ++k) write(stats + k * job.rows, all[k], block);
      } else {
        differentiate(job, math, block, row);
        scatter(block.s, job.gradient, job.student_type, job.gradient_stride, r, block.count, job.classes,
                job.width);
      }
    }
  }
};

// Choosing the text that was compiled for the job

template <class A, Kind kind, bool labelled>
METAKD_NOINLINE void rows(const Job& job, Op op, int64_t begin, int64_t end, void* scratch) {
  if (job.classes <= NARROW) Narrow<A, kind, labelled>::run(job, op, begin, end);
  else Wide<A, kind, labelled>::run(job, op, begin, end, static_cast<A*>(scratch));
}

template <class A, Kind kind>
Rows* rows_of(bool labelled) {
  return labelled ? rows<A, kind, true> : rows<A, kind, false>;
}

template <class A>
Rows* rows_of(Kind kind, bool labelled) {
  switch (kind) {
    case Kind::forward: return rows_of<A, Kind::forward>(labelled);
    case Kind::reverse: return rows_of<A, Kind::reverse>(labelled);
    default: return rows_of<A, Kind::mixture>(labelled);
  }
}

inline Rows* find(bool in_double, Kind kind, bool labelled) {
  return in_double ? rows_of<double>(kind, labelled) : rows_of<float>(kind, labelled);
}

}  // namespace METAKD_ISA
