// Rows of mixture_kl on a CPU, for one instruction set (see vectors.h). Torch-free.
//
// The same sweeps serve two layouts, over vectors of the student's logits and of each teacher's. Wide:
// lanes are neighbouring classes of one row, padded with -inf (without mass), totals are doubles.
// Narrow: lanes are neighbouring rows, so that 2 to NARROW classes fill a register too.
//
// Legend: N rows, M teachers, C classes, W lanes; ``_s`` student; a side is the student (0) or a teacher
// (1 to M); A the type that is computed in. The formulas stand in metakd.kernels.mixture_kl.

#include "vectors.h"

namespace METAKD_ISA {

// Of a row, in all lanes, or of the row of each lane.
template <class A>
struct Side {
  Vector<A> max;     // of the raw logits
  Vector<A> before;  // ``max``, without the piece under way
  Vector<A> sum;     // of exp((x - max) / T)
  Vector<A> share;   // of the student: the sum of all
  Vector<A> weight;  // what exp((x - max) / T) is multiplied by
  Vector<A> offset;  // log p_m - log q without (t - max_t - s + max_s) / T, and with the share
  Vector<A> inner;   // sum of exp((t - max) / T) (log p - log q)
  Vector<A> power;   // exp((t - max) / T) of the vector under way
};

// Scratch of a thread.
template <class A>
struct Room {
  static constexpr int64_t PIECE = 32;  // vectors of a row that are worked on at a time
  static constexpr int64_t LENGTH = PIECE * Float<A>::lanes;
  static_assert(NARROW <= PIECE);

  int64_t sides;
  Side<A>* side;
  Vector<double> *powers, *inner;  // sums over the pieces of a row, of ``sum`` and ``inner`` of a side
  A *logits, *gradient;  // of a piece: [sides, LENGTH], [LENGTH]
  const A** x;           // where a piece of each side lies: in ``logits``, or in the caller's tensor

  static METAKD_INLINE int64_t bytes(int64_t sides) {
    const int64_t of_side = sizeof(Side<A>) + 2 * sizeof(Vector<double>) + LENGTH * sizeof(A) + sizeof(A*);
    return sides * of_side + LENGTH * sizeof(A);
  }

  METAKD_INLINE Room(const Job& job, void* memory) : sides(1 + job.teachers) {
    side = static_cast<Side<A>*>(memory);
    powers = reinterpret_cast<Vector<double>*>(side + sides);
    inner = powers + sides;
    logits = reinterpret_cast<A*>(inner + sides);
    gradient = logits + sides * LENGTH;
    x = reinterpret_cast<const A**>(gradient + LENGTH);
  }
};

// Sweeps over the vectors that a room holds

template <class A>
METAKD_NOINLINE void raise_maxima(const Room<A> room, int64_t vectors) {
  constexpr int64_t W = Float<A>::lanes;
  for (int64_t k = 0; k < room.sides; ++k) {
    const A* x = room.x[k];
    Vector<A> even = room.side[k].max, odd = even;
    int64_t i = 0;
    for (; i + 1 < vectors; i += 2) {
      const Vector<A> a = load(x + i * W), b = load(x + (i + 1) * W);
      even = a > even ? a : even;
      odd = b > odd ? b : odd;
    }
    if (i < vectors) {
      const Vector<A> a = load(x + i * W);
      even = a > even ? a : even;
    }
    room.side[k].max = odd > even ? odd : even;
  }
}

template <class A>
METAKD_NOINLINE void sum_powers(const Room<A> room, const Exp<A> soft, int64_t vectors) {
  constexpr int64_t W = Float<A>::lanes;
  for (int64_t k = 0; k < room.sides; ++k) {
    const A* x = room.x[k];
    const Vector<A> max = room.side[k].max;
    Vector<A> sum{};
    for (int64_t i = 0; i < vectors; ++i) sum += soft(load(x + i * W) - max);
    room.side[k].sum = sum;
  }
}

// log(x / y) for x >= y > 0 of one size or so, exactly 0 where they are equal; a NaN in x stays. One
// division, where the logarithm of a quotient takes two.
template <class A>
METAKD_INLINE Vector<A> log_quotient(Vector<A> x, Vector<A> y) {
  constexpr Integer<A> half = (Integer<A>{} + 1) << (Float<A>::digits - 1);
  // Bits of a number are its logarithm, nearly: x 2^-n is within a factor of 1.52 of y.
  const Integer<A> n = ((Integer<A>)x - (Integer<A>)y + half) >> Float<A>::digits;
  const Vector<A> near = (Vector<A>)((Integer<A>)x - (n << Float<A>::digits));
  const Vector<A> s = (near - y) / (near + y), z = s * s;  // log(near / y) = 2 atanh s
  Vector<A> rest{};
#pragma GCC unroll 16
  for (int k = Float<A>::log_terms; k > 0; --k) rest = (rest + static_cast<A>(2.0 / (2 * k + 1))) * z;
  const Vector<A> exponent = __builtin_convertvector(n, Vector<A>);
  const Vector<A> log = exponent * static_cast<A>(0.69314718055994530942) + (s + s + s * rest);
  return x == x ? log : x;
}

// log p of the mixture is that of its largest part, and the logarithm of what all are to that one: so it
// needs no digits of p where p is tiny, and none are lost where a teacher is alone.
template <class A>
METAKD_NOINLINE void sum_inner(const Room<A> room, const Exp<A> soft, Vector<A> inv_t, int64_t vectors) {
  using V = Vector<A>;
  constexpr int64_t W = Float<A>::lanes;
  const V zero{}, max_s = room.side[0].max;
  const int64_t sides = room.sides;
  for (int64_t k = 1; k < sides; ++k) room.side[k].inner = zero;
  for (int64_t i = 0; i < vectors; ++i) {
    const V ds = load(room.x[0] + i * W) - max_s;
    V p{}, largest = every<A>(-1), gap{};
    for (int64_t k = 1; k < sides; ++k) {
      Side<A>& side = room.side[k];
      const V dt = load(room.x[k] + i * W) - side.max;
      const V power = soft(dt), part = power * side.weight;
      side.power = power;
      gap = part > largest ? (dt - ds) * inv_t + side.offset : gap;
      largest = part > largest ? part : largest;
      p += part;
    }
    const V ratio = p == zero ? zero : gap + log_quotient<A>(p, largest);  // log p - log q
    for (int64_t k = 1; k < sides; ++k) {
      Side<A>& side = room.side[k];
      side.inner += side.power == zero ? zero : side.power * ratio;
    }
  }
}

template <class A>
METAKD_NOINLINE void write_slopes(const Room<A> room, const Exp<A> soft, int64_t vectors, A* to) {
  using V = Vector<A>;
  constexpr int64_t W = Float<A>::lanes;
  const int64_t sides = room.sides;
  const V max_s = room.side[0].max, weight_s = room.side[0].weight;
  for (int64_t i = 0; i < vectors; ++i) {
    V p{};
    for (int64_t k = 1; k < sides; ++k)
      p += soft(load(room.x[k] + i * W) - room.side[k].max) * room.side[k].weight;
    store(to + i * W, soft(load(room.x[0] + i * W) - max_s) * weight_s - p);
  }
}

// Wide: one row at a time, lanes are classes

template <class A>
struct Wide {
  using V = Vector<A>;
  static constexpr int64_t W = Float<A>::lanes, LENGTH = Room<A>::LENGTH;

  // f(first class, classes, vectors) of each piece, once it lies in the room.
  template <class F>
  static METAKD_INLINE void for_pieces(const Job& job, const Room<A>& room, int64_t r, F f) {
    for (int64_t begin = 0; begin < job.classes; begin += LENGTH) {
      const int64_t count = job.classes - begin < LENGTH ? job.classes - begin : LENGTH;
      const int64_t vectors = (count + W - 1) / W;
      for (int64_t k = 0; k < room.sides; ++k) {
        const Type type = k == 0 ? job.student_type : job.teacher_type;
        const char* from = k == 0
            ? row_of(job.student, type, r, job.student_stride)
            : row_of(job.teacher, type, r, job.teacher_stride) + (k - 1) * job.teacher_step * bytes_of(type);
        from += begin * bytes_of(type);
        room.x[k] = reinterpret_cast<const A*>(from);
        if (type == Float<A>::type && count == vectors * W) continue;
        A* to = room.logits + k * LENGTH;
        widen(from, type, to, count);
        for (int64_t c = count; c < vectors * W; ++c) to[c] = -INFINITY;
        room.x[k] = to;
      }
      f(begin, count, vectors);
    }
  }

  // Less than nothing has no logarithm.
  static METAKD_INLINE double share_of(double share) { return share < 0 ? NAN : share; }

  // Of a row whose classes are all -inf there is none, as log_softmax has it.
  static METAKD_INLINE double sum_of(Vector<double> powers) {
    const double sum = total_of<double>(powers);
    return sum == 0 ? NAN : sum;
  }

  static METAKD_INLINE void forward(const Job& job, int64_t begin, int64_t end, const Room<A>& room) {
    const Exp<A> soft(1.0 / job.temperature);
    const V inv_t = per_lane<A>(1.0 / job.temperature);
    for (int64_t r = begin; r < end; ++r) {
      A* const value = static_cast<A*>(job.values) + r;
      A* stat = static_cast<A*>(job.stats) + r;
      const auto note = [&](double x) METAKD_LAMBDA {
        *stat = static_cast<A>(x);
        stat += job.rows;
      };
      if (job.is_masked(r)) {
        *value = 0;
        for (int64_t k = 0; k < OF_STUDENT + OF_TEACHER * job.teachers; ++k) note(0);
        continue;
      }
      for (int64_t k = 0; k < room.sides; ++k) {
        room.side[k].max = every<A>(Float<A>::lowest);  // finite: no class at all never makes inf - inf
        room.powers[k] = room.inner[k] = Vector<double>{};
      }
      for_pieces(job, room, r, [&](int64_t, int64_t, int64_t vectors) METAKD_LAMBDA {
        for (int64_t k = 0; k < room.sides; ++k) room.side[k].before = room.side[k].max;
        raise_maxima(room, vectors);
        for (int64_t k = 0; k < room.sides; ++k) {
          // A NaN is passed over here; the sums show it.
          Side<A>& side = room.side[k];
          const double before = side.before[0], max = maximum_of<A>(side.max);
          side.max = per_lane<A>(max);
          if (max > before) room.powers[k] *= ::exp((before - max) / job.temperature);
        }
        sum_powers(room, soft, vectors);
        for (int64_t k = 0; k < room.sides; ++k) add_wide<A>(room.powers[k], room.side[k].sum);
      });
      const A* shares = static_cast<const A*>(job.shares) + r * job.teachers;
      const double sum_s = sum_of(room.powers[0]);
      for (int64_t k = 1; k < room.sides; ++k) {
        const double share = share_of(shares[k - 1]), sum = sum_of(room.powers[k]);
        room.side[k].weight = per_lane<A>(share / sum);
        room.side[k].offset = per_lane<A>(::log(share * (sum_s / sum)));
      }
      for_pieces(job, room, r, [&](int64_t, int64_t, int64_t vectors) METAKD_LAMBDA {
        sum_inner(room, soft, inv_t, vectors);
        for (int64_t k = 1; k < room.sides; ++k) add_wide<A>(room.inner[k], room.side[k].inner);
      });
      note(room.side[0].max[0]);
      note(::log(sum_s));
      double mixed = 0;
      for (int64_t k = 1; k < room.sides; ++k) {
        const double share = shares[k - 1], sum = sum_of(room.powers[k]);
        const double inner = total_of<double>(room.inner[k]) / sum;
        note(room.side[k].max[0]);
        note(::log(sum));
        note(inner);
        mixed += share == 0 ? 0 : share * inner;
      }
      *value = static_cast<A>(job.scale * mixed);
    }
  }

  static METAKD_INLINE void backward(const Job& job, int64_t begin, int64_t end, const Room<A>& room) {
    const Exp<A> soft(1.0 / job.temperature);
    const int64_t bytes = bytes_of(job.student_type);
    const bool direct = job.student_type == Float<A>::type;
    for (int64_t r = begin; r < end; ++r) {
      char* const row = row_of(job.dstudent, job.student_type, r, job.classes);
      A* const dshares = static_cast<A*>(job.dshares) + r * job.teachers;
      if (job.is_masked(r)) {
        __builtin_memset(row, 0, job.classes * bytes);
        for (int64_t m = 0; m < job.teachers; ++m) dshares[m] = 0;
        continue;
      }
      const A* stat = static_cast<const A*>(job.stats) + r;
      const A* shares = static_cast<const A*>(job.shares) + r * job.teachers;
      const double up = job.scale * static_cast<const A*>(job.drows)[r], factor = up / job.temperature;
      double heard = 0;
      for (int64_t k = 0; k < room.sides; ++k) {
        const A* of_side = stat + (k == 0 ? 0 : OF_STUDENT + (k - 1) * OF_TEACHER) * job.rows;
        const double share = k == 0 ? 1 : share_of(shares[k - 1]);
        room.side[k].max = every(of_side[MAX * job.rows]);
        room.side[k].weight = per_lane<A>(factor * share * ::exp(-of_side[LSUM * job.rows]));
        if (k == 0) continue;
        heard += share;
        dshares[k - 1] = static_cast<A>(share == 0 ? 0 : up * (of_side[INNER * job.rows] + 1));
      }
      room.side[0].weight *= per_lane<A>(heard);
      for_pieces(job, room, r, [&](int64_t first, int64_t count, int64_t vectors) METAKD_LAMBDA {
        char* const to = row + first * bytes;
        const bool in_place = direct && count == vectors * W;
        write_slopes(room, soft, vectors, in_place ? reinterpret_cast<A*>(to) : room.gradient);
        if (!in_place) narrow(room.gradient, job.student_type, to, count);
      });
    }
  }
};

// Narrow: W rows at a time, lanes are rows

template <class A>
struct Narrow {
  using V = Vector<A>;
  static constexpr int W = Float<A>::lanes;

  // W rows from r on. Lanes whose row is masked or does not exist compute another one; what comes of
  // it is replaced by 0 before it is written.
  struct Block {
    int64_t rows[W];
    A real[W];
    int64_t r;
    int count;

    METAKD_INLINE V of_real(V v) const { return load(real) != V{} ? v : V{}; }

    // A number of each row, from where they lie.
    METAKD_INLINE V take(const void* from, int64_t stride) const {
      A lanes[W];
      for (int lane = 0; lane < W; ++lane) lanes[lane] = static_cast<const A*>(from)[rows[lane] * stride];
      return load(lanes);
    }

    METAKD_INLINE void put(void* to, V v, int64_t stride = 1) const {
      A lanes[W];
      store(lanes, of_real(v));
      for (int lane = 0; lane < count; ++lane) static_cast<A*>(to)[(r + lane) * stride] = lanes[lane];
    }
  };

  // Rows from r on, with their logits and shares in the room.
  static METAKD_INLINE void fill(const Job& job, int64_t r, int64_t end, Block& block, const Room<A>& room) {
    block.r = r;
    block.count = end - r < W ? static_cast<int>(end - r) : W;
    for (int lane = 0; lane < W; ++lane) {
      const bool is_real = lane < block.count && !job.is_masked(r + lane);
      block.real[lane] = is_real ? A(1) : A(0);
      block.rows[lane] = is_real ? r + lane : lane > 0 ? block.rows[lane - 1] : r;
    }
    room.side[0].share = V{};
    for (int64_t k = 0; k < room.sides; ++k) {
      A* to = room.logits + k * Room<A>::LENGTH;
      room.x[k] = to;
      if (k == 0) {
        gather(job.student, job.student_type, job.student_stride, block.rows, job.classes, to);
        continue;
      }
      const char* from = row_of(job.teacher, job.teacher_type, k - 1, job.teacher_step);
      gather(from, job.teacher_type, job.teacher_stride, block.rows, job.classes, to);
      const V share = block.take(static_cast<const A*>(job.shares) + k - 1, job.teachers);
      room.side[k].share = share < V{} ? every<A>(NAN) : share;
      room.side[0].share += room.side[k].share;
    }
  }

  static METAKD_INLINE A* stat(const Job& job, int64_t k, int64_t which) {
    return static_cast<A*>(job.stats) + ((k == 0 ? 0 : OF_STUDENT + (k - 1) * OF_TEACHER) + which) * job.rows;
  }

  static METAKD_INLINE void forward(const Job& job, int64_t begin, int64_t end, const Room<A>& room) {
    const Exp<A> soft(1.0 / job.temperature);
    const V inv_t = per_lane<A>(1.0 / job.temperature), zero{};
    Block block;
    for (int64_t r = begin; r < end; r += W) {
      fill(job, r, end, block, room);
      for (int64_t k = 0; k < room.sides; ++k) room.side[k].max = load(room.x[k]);
      raise_maxima(room, job.classes);
      sum_powers(room, soft, job.classes);
      const V sum_s = room.side[0].sum;
      for (int64_t k = 1; k < room.sides; ++k) {
        Side<A>& side = room.side[k];
        side.weight = side.share / side.sum;
        side.offset = log_of_any<A>(side.share * (sum_s / side.sum));
      }
      sum_inner(room, soft, inv_t, job.classes);
      V value{};
      for (int64_t k = 0; k < room.sides; ++k) {
        const Side<A>& side = room.side[k];
        block.put(stat(job, k, MAX), side.max);
        block.put(stat(job, k, LSUM), log_of<A>(side.sum));
        if (k == 0) continue;
        const V inner = side.inner / side.sum;
        block.put(stat(job, k, INNER), inner);
        value += side.share == zero ? zero : side.share * inner;
      }
      block.put(job.values, value * static_cast<A>(job.scale));
    }
  }

  static METAKD_INLINE void backward(const Job& job, int64_t begin, int64_t end, const Room<A>& room) {
    const Exp<A> soft(1.0 / job.temperature);
    const V zero{};
    Block block;
    for (int64_t r = begin; r < end; r += W) {
      fill(job, r, end, block, room);
      const V up = block.of_real(block.take(job.drows, 1) * static_cast<A>(job.scale));
      const V factor = up * per_lane<A>(1.0 / job.temperature);
      for (int64_t k = 0; k < room.sides; ++k) {
        Side<A>& side = room.side[k];
        side.max = block.take(stat(job, k, MAX), 1);
        side.weight = factor * side.share * exp_of<A>(-block.take(stat(job, k, LSUM), 1));
        if (k == 0) continue;
        const V slope = up * (block.take(stat(job, k, INNER), 1) + static_cast<A>(1));
        block.put(static_cast<A*>(job.dshares) + k - 1, side.share == zero ? zero : slope, job.teachers);
      }
      write_slopes(room, soft, job.classes, room.gradient);
      for (int64_t c = 0; c < job.classes; ++c)
        store(room.gradient + c * W, block.of_real(load(room.gradient + c * W)));
      scatter(room.gradient, job.dstudent, job.student_type, job.classes, r, block.count, job.classes,
              job.classes);
    }
  }
};

// Choosing the text that was compiled for the job

template <class A, bool backward>
int64_t rows_of(const Job& job, int64_t begin, int64_t end, void* scratch) {
  const int64_t bytes = Room<A>::bytes(1 + job.teachers);
  if (!scratch) return bytes;
  const Room<A> room(job, scratch);
  const bool is_narrow = job.classes <= NARROW;
  if constexpr (backward) {
    if (is_narrow) Narrow<A>::backward(job, begin, end, room);
    else Wide<A>::backward(job, begin, end, room);
  } else {
    if (is_narrow) Narrow<A>::forward(job, begin, end, room);
    else Wide<A>::forward(job, begin, end, room);
  }
  return bytes;
}

inline Forms forms(bool in_double) {
  return in_double ? Forms{rows_of<double, false>, rows_of<double, true>}
                   : Forms{rows_of<float, false>, rows_of<float, true>};
}

}  // namespace METAKD_ISA
