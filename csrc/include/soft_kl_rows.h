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

namespace METAKD_ISA {

#define METAKD_INLINE inline __attribute__((always_inline))
#define METAKD_NOINLINE __attribute__((noinline))
#define METAKD_LAMBDA __attribute__((always_inline))

template <class A>
struct Float;

template <>
struct Float<float> {
  static constexpr Type type = Type::float32;
  typedef float Vector __attribute__((vector_size(METAKD_BYTES)));
  typedef int32_t Integer __attribute__((vector_size(METAKD_BYTES)));
  static constexpr int lanes = METAKD_BYTES / 4, digits = 23, bias = 127;
  static constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
  static constexpr float lowest = -__FLT_MAX__;
  static constexpr float lowest_exponent = -160.0f;  // 2 to this is 0
  static constexpr int32_t sqrt_half = 0x3f3504f3;   // bits of sqrt(1/2)
  // 2^f - 1 = f (c0 + c1 f + ..) for |f| <= 1/2: minimax, 2e-8 relative with the rounded coefficients.
  static constexpr int exp_terms = 6;
  static constexpr float exp_term(int k) {
    constexpr float c[] = {0.69314724f,  0.24022652f,   0.055503104f,
                           0.009617693f, 0.0013406643f, 0.00015594676f};
    return c[k];
  }
  static constexpr int log_terms = 5;  // of a Taylor series; the next one is below 1/4 ulp
  static constexpr double ln2_high = 0.693145751953125;  // 16 bits: times an exponent it is exact
};

template <>
struct Float<double> {
  static constexpr Type type = Type::float64;
  typedef double Vector __attribute__((vector_size(METAKD_BYTES)));
  typedef int64_t Integer __attribute__((vector_size(METAKD_BYTES)));
  static constexpr int lanes = METAKD_BYTES / 8, digits = 52, bias = 1023;
  static constexpr double round = 6755399441055744.0;
  static constexpr double lowest = -__DBL_MAX__;
  static constexpr double lowest_exponent = -1100.0;
  static constexpr int64_t sqrt_half = 0x3fe6a09e667f3bcd;
  static constexpr int exp_terms = 14;  // Taylor
  static constexpr double exp_term(int k) {
    return k == 0 ? 0.69314718055994530942 : exp_term(k - 1) * 0.69314718055994530942 / (k + 1);
  }
  static constexpr int log_terms = 11;
  static constexpr double ln2_high = 0.69314718036912381649;
};

template <class A>
using Vector = typename Float<A>::Vector;
template <class A>
using Integer = typename Float<A>::Integer;

constexpr long double LOG2_E_LONG = 1.44269504088896340735992468100189214L;
constexpr double LN_2_LOW_FLOAT = 1.4286068203094172321e-6;  // ln 2 - Float<float>::ln2_high
constexpr double LN_2_LOW_DOUBLE = 1.9082149292705877e-10;  // ln 2 - Float<double>::ln2_high

template <class A>
METAKD_INLINE Vector<A> every(A value) {
  return value - Vector<A>{};
}

template <class A>
METAKD_INLINE Vector<A> load(const A* from) {
  Vector<A> v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}

template <class A>
METAKD_INLINE void store(A* to, Vector<A> v) {
  __builtin_memcpy(to, &v, sizeof(v));
}

// Lanes from ``count`` on are -inf.
template <class A>
METAKD_INLINE Vector<A> load_some(const A* from, int64_t count) {
  Vector<A> v = every<A>(-INFINITY);
  for (int64_t lane = 0; lane < count; ++lane) v[lane] = from[lane];
  return v;
}

template <class A>
METAKD_INLINE void store_some(A* to, Vector<A> v, int64_t count) {
  for (int64_t lane = 0; lane < count; ++lane) to[lane] = v[lane];
}

// A value per row as a vector of A: a double goes to all lanes, a vector is one already.
template <class A>
METAKD_INLINE Vector<A> per_lane(double value) {
  return every<A>(static_cast<A>(value));
}

template <class A>
METAKD_INLINE Vector<A> per_lane(Vector<A> value) {
  return value;
}

// exp(x * rate) for x * rate <= 0 (or NaN) as 2^n 2^f: the rate is kept to twice the precision of A,
// so that a temperature costs no accuracy and no multiplication of its own.
template <class A>
struct Exp {
  Vector<A> high, low, floor;

  explicit METAKD_INLINE Exp(double rate) {
    const long double exact = LOG2_E_LONG * rate;
    const A near = static_cast<A>(exact);
    high = every<A>(near);
    low = every<A>(static_cast<A>(exact - near));
    floor = every<A>(static_cast<A>(Float<A>::lowest_exponent / near));
  }

  METAKD_INLINE Vector<A> operator()(Vector<A> x) const {
    Vector<A> power, power_less_one;
    compute(x, power, power_less_one);
    return power;
  }

  // The exponential, and it less 1 (not rounded near 1; costs nothing where it is not used).
  METAKD_INLINE void compute(Vector<A> x, Vector<A>& power, Vector<A>& power_less_one) const {
    x = x < floor ? floor : x;  // a NaN stays
    const Vector<A> rounder = every<A>(Float<A>::round), one = every<A>(1);
    const Vector<A> shifted = x * high + rounder;
    const Vector<A> n = shifted - rounder;
    const Vector<A> f = x * low + (x * high - n);  // in [-1/2, 1/2]
    // Pairs of terms: half as long a chain of operations that wait for each other as Horner's.
    const Vector<A> square = f * f;
    Vector<A> sum{};
#pragma GCC unroll 8
    for (int k = Float<A>::exp_terms - 2; k >= 0; k -= 2)
      sum = sum * square + (every(Float<A>::exp_term(k + 1)) * f + every(Float<A>::exp_term(k)));
    power = scale(sum * f + one, n, shifted);
    power_less_one = scale(sum * f, n, shifted) + (scale(one, n, shifted) - one);
  }

#if METAKD_BYTES == 64
  // The plain forms of these intrinsics make GCC warn of a variable of its own (here and below).
  static METAKD_INLINE Vector<float> scale(Vector<float> x, Vector<float> n, Vector<float>) {
    return (Vector<float>)_mm512_maskz_scalef_ps(-1, (__m512)x, (__m512)n);
  }
  static METAKD_INLINE Vector<double> scale(Vector<double> x, Vector<double> n, Vector<double>) {
    return (Vector<double>)_mm512_maskz_scalef_pd(-1, (__m512d)x, (__m512d)n);
  }
#else
  // In two steps, because 2^n may be less than the least normal number.
  static METAKD_INLINE Vector<A> scale(Vector<A> x, Vector<A>, Vector<A> shifted) {
    const Integer<A> n = (Integer<A>)shifted - (Integer<A>)every<A>(Float<A>::round);
    const Integer<A> half = n >> 1;
    return x * power(half) * power(n - half);
  }
  static METAKD_INLINE Vector<A> power(Integer<A> n) {
    return (Vector<A>)((n + Float<A>::bias) << Float<A>::digits);
  }
#endif
};

// log x for normal x > 0; a NaN stays. ``less_one`` is x - 1, perhaps known better than x tells.
template <class A>
METAKD_INLINE Vector<A> log_of(Vector<A> x, Vector<A> less_one) {
  const Integer<A> n = ((Integer<A>)x - Float<A>::sqrt_half) >> Float<A>::digits;
  const Vector<A> reduced = (Vector<A>)((Integer<A>)x - (n << Float<A>::digits)) - static_cast<A>(1);
  const Vector<A> f = n == 0 ? less_one : reduced;
  // log(1 + f) = 2 atanh s = f - f^2/2 + s (f^2/2 + rest); the first two terms are nearly exact.
  const Vector<A> s = f / (f + static_cast<A>(2)), z = s * s;
  const Vector<A> half_square = f * f * static_cast<A>(0.5);
  Vector<A> rest{};
#pragma GCC unroll 16
  for (int k = Float<A>::log_terms; k > 0; --k)
    rest = (rest + static_cast<A>(2.0 / (2 * k + 1))) * z;
  const double low = sizeof(A) == 4 ? LN_2_LOW_FLOAT : LN_2_LOW_DOUBLE;
  const Vector<A> exponent = __builtin_convertvector(n, Vector<A>);
  const Vector<A> small = exponent * static_cast<A>(low) + s * (half_square + rest);
  const Vector<A> log = exponent * static_cast<A>(Float<A>::ln2_high) + (f - (half_square - small));
  return x == x ? log : x;
}

template <class A>
METAKD_INLINE Vector<A> log_of(Vector<A> x) {
  return log_of<A>(x, x - static_cast<A>(1));
}

template <class A>
METAKD_INLINE double log_of(double x) {
  return ::log(x);
}

template <class A>
METAKD_INLINE Vector<A> exp_of(Vector<A> x) {
  return Exp<A>(1.0)(x);
}

template <class A>
METAKD_INLINE double exp_of(double x) {
  return ::exp(x);
}

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

// Conversions

inline int64_t bytes_of(Type type) {
  return type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2;
}

inline char* row_of(const void* x, Type type, int64_t r, int64_t stride) {
  return static_cast<char*>(const_cast<void*>(x)) + r * stride * bytes_of(type);
}

// f with a null pointer to the type.
template <class F>
METAKD_INLINE void with_type(Type type, F f) {
  switch (type) {
    case Type::float64: return f(static_cast<double*>(nullptr));
    case Type::float32: return f(static_cast<float*>(nullptr));
    case Type::bfloat16: return f(static_cast<c10::BFloat16*>(nullptr));
    case Type::float16: return f(static_cast<c10::Half*>(nullptr));
  }
}

// ``count`` numbers; vectors of F16C where the compiler would not think of them.
template <class A, class T>
METAKD_INLINE void widen_block(const T* from, A* to, int64_t count) {
  int64_t i = 0;
#if METAKD_BYTES == 64
  if constexpr (sizeof(A) == 4 && is_half<T*>)
    for (; i + 16 <= count; i += 16)
      _mm512_storeu_ps(to + i, _mm512_maskz_cvtph_ps(-1, _mm256_loadu_si256((const __m256i*)(from + i))));
#elif METAKD_BYTES == 32
  if constexpr (sizeof(A) == 4 && is_half<T*>)
    for (; i + 8 <= count; i += 8)
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
#endif
  for (; i < count; ++i) to[i] = static_cast<A>(from[i]);
}

template <class A>
METAKD_NOINLINE void widen(const char* row, Type type, A* to, int64_t count) {
  with_type(type, [&](auto* like) METAKD_LAMBDA {
    using T = std::remove_pointer_t<decltype(like)>;
    const T* from = reinterpret_cast<const T*>(row);
    constexpr int64_t LINE = 64 / sizeof(T), AHEAD = 32 * LINE;  // of the cache; prefetched
    int64_t i = 0;
    for (; i + LINE <= count; i += LINE) {
      __builtin_prefetch(from + i + AHEAD);
      widen_block(from + i, to + i, LINE);
    }
    widen_block(from + i, to + i, count - i);
  });
}

template <class A>
METAKD_NOINLINE void narrow(const A* from, Type type, char* row, int64_t count) {
  with_type(type, [&](auto* like) METAKD_LAMBDA {
    auto* to = reinterpret_cast<decltype(like)>(row);
    int64_t i = 0;
#if METAKD_BYTES == 64
    if constexpr (sizeof(A) == 4 && is_half<decltype(like)>)
      for (; i + 16 <= count; i += 16)
        _mm256_storeu_si256((__m256i*)(to + i), _mm512_maskz_cvtps_ph(-1, _mm512_loadu_ps(from + i), 0));
#elif METAKD_BYTES == 32
    if constexpr (sizeof(A) == 4 && is_half<decltype(like)>)
      for (; i + 8 <= count; i += 8)
        _mm_storeu_si128((__m128i*)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
#endif
    for (; i < count; ++i) to[i] = static_cast<std::remove_pointer_t<decltype(like)>>(from[i]);
  });
}

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

// Class c of row rows[lane] to to[c * W + lane].
template <class A>
METAKD_NOINLINE void gather(
    const void* x, Type type, int64_t stride, const int64_t* rows, int64_t size, A* to) {
  constexpr int W = Float<A>::lanes;
  with_type(type, [&](auto* like) METAKD_LAMBDA {
    const std::remove_pointer_t<decltype(like)>* from[W];
    for (int lane = 0; lane < W; ++lane)
      from[lane] = static_cast<decltype(&*from[lane])>(x) + rows[lane] * stride;
    for (int64_t c = 0; c < size; ++c)
#pragma GCC unroll 16
      for (int lane = 0; lane < W; ++lane) to[c * W + lane] = static_cast<A>(from[lane][c]);
  });
}

// Back to the gradient of rows [r, r + count), and zeros to its other columns.
template <class A>
METAKD_NOINLINE void scatter(const Job& job, const A* from, int64_t r, int count) {
  constexpr int W = Float<A>::lanes;
  const int64_t size = job.classes, width = job.width, stride = job.gradient_stride;
  with_type(job.student_type, [&](auto* like) METAKD_LAMBDA {
    using T = std::remove_pointer_t<decltype(like)>;
    T* to = static_cast<T*>(job.gradient) + r * stride;
    for (int lane = 0; lane < count; ++lane, to += stride) {
      for (int64_t c = 0; c < size; ++c) to[c] = static_cast<T>(from[c * W + lane]);
      for (int64_t c = size; c < width; ++c) to[c] = T(0);
    }
  });
}

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
        scatter(job, block.s, r, block.count);
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

#undef METAKD_INLINE
#undef METAKD_NOINLINE
#undef METAKD_LAMBDA

}  // namespace METAKD_ISA
