// Vectors of numbers on a CPU, for one instruction set: arithmetic, exponential, logarithm, loads and
// stores that convert. Torch-free.
//
// Included once per instruction set by a text that is itself compiled once per instruction set (see
// instruction_sets.h), which undefines the macros at its end. ``Type`` and ``is_half`` come from the
// includer. Nothing of std:: is instantiated here, see soft_kl_rows.h.

#define METAKD_INLINE inline __attribute__((always_inline))
#define METAKD_NOINLINE __attribute__((noinline))
#define METAKD_LAMBDA __attribute__((always_inline))

namespace METAKD_ISA {

template <class A>
struct Float;

template <>
struct Float<float> {
  static constexpr Type type = Type::float32;
  typedef float Vector __attribute__((vector_size(METAKD_BYTES)));
  typedef int32_t Integer __attribute__((vector_size(METAKD_BYTES)));
  static constexpr int lanes = METAKD_BYTES / 4, digits = 23, bias = 127;
  static constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
  static constexpr float lowest = -__FLT_MAX__, least_normal = __FLT_MIN__;
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
  static constexpr double lowest = -__DBL_MAX__, least_normal = __DBL_MIN__;
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

// log x for any x > 0, where ``log_of`` wants normal numbers.
template <class A>
METAKD_INLINE Vector<A> log_of_any(Vector<A> x) {
  const auto tiny = x < every(Float<A>::least_normal);
  const Vector<A> log = log_of<A>(tiny ? x * static_cast<A>(0x1p64) : x);
  return tiny ? log - static_cast<A>(64 * 0.69314718055994530942) : log;
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

// Rows side by side: lanes are rows

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

// Back to rows [r, r + count) of ``size`` numbers, and zeros to their other columns.
template <class A>
METAKD_NOINLINE void scatter(const A* from, void* x, Type type, int64_t stride, int64_t r, int count,
                             int64_t size, int64_t width) {
  constexpr int W = Float<A>::lanes;
  with_type(type, [&](auto* like) METAKD_LAMBDA {
    using T = std::remove_pointer_t<decltype(like)>;
    T* to = static_cast<T*>(x) + r * stride;
    for (int lane = 0; lane < count; ++lane, to += stride) {
      for (int64_t c = 0; c < size; ++c) to[c] = static_cast<T>(from[c * W + lane]);
      for (int64_t c = size; c < width; ++c) to[c] = T(0);
    }
  });
}

// Lanes across

// Lane k of the result is lane from(k) of a followed by b.
template <class A, class F>
METAKD_INLINE Vector<A> shuffle(Vector<A> a, [[maybe_unused]] Vector<A> b, F from) {
  constexpr int W = Float<A>::lanes;
#if defined(__clang__)
  Vector<A> v;
#pragma GCC unroll 16
  for (int lane = 0; lane < W; ++lane) v[lane] = from(lane) < W ? a[from(lane)] : b[from(lane) - W];
  return v;
#else
  Integer<A> lanes;
#pragma GCC unroll 16
  for (int lane = 0; lane < W; ++lane) lanes[lane] = from(lane);
  return __builtin_shuffle(a, b, lanes);
#endif
}

template <class A>
METAKD_INLINE A total_of(Vector<A> v) {
#pragma GCC unroll 4
  for (int half = Float<A>::lanes / 2; half > 0; half /= 2)
    v += shuffle<A>(v, v, [half](int lane) METAKD_LAMBDA { return lane ^ half; });
  return v[0];
}

// A NaN may be passed over.
template <class A>
METAKD_INLINE A maximum_of(Vector<A> v) {
#pragma GCC unroll 4
  for (int half = Float<A>::lanes / 2; half > 0; half /= 2) {
    const Vector<A> other = shuffle<A>(v, v, [half](int lane) METAKD_LAMBDA { return lane ^ half; });
    v = other > v ? other : v;
  }
  return v[0];
}

// 0, 1, 2, ..
template <class A>
METAKD_INLINE Vector<A> lane_numbers() {
  Vector<A> v;
#pragma GCC unroll 16
  for (int lane = 0; lane < Float<A>::lanes; ++lane) v[lane] = static_cast<A>(lane);
  return v;
}

// Lanes from ``count`` on become ``beyond``.
template <class A>
METAKD_INLINE Vector<A> cut(Vector<A> v, int64_t count, A beyond = 0) {
  return lane_numbers<A>() < every(static_cast<A>(count)) ? v : every(beyond);
}

// f(c, count) for the vectors of a row; a last one has less than all lanes.
template <class A, class F>
METAKD_INLINE void for_vectors(int64_t size, F f) {
  constexpr int64_t W = Float<A>::lanes;
  int64_t c = 0;
  for (; c + W <= size; c += W) f(c, W);
  if (c < size) f(c, size - c);
}

// Vectors summed in A before the sum goes to a double.
constexpr int64_t SUMMED = 128;

// f(c, count) for the vectors of a row, and done() now and then: as often as sums in A are good for.
template <class A, class F, class G>
METAKD_INLINE void for_sums(int64_t size, F f, G done) {
  constexpr int64_t STEP = SUMMED * Float<A>::lanes;
  for (int64_t begin = 0; begin < size; begin += STEP) {
    for_vectors<A>(size - begin < STEP ? size - begin : STEP, [&](int64_t c, int64_t count) METAKD_LAMBDA {
      f(begin + c, count);
    });
    done();
  }
}

// Vectors of numbers of another type

// f with a null pointer to the type, of the types that fit into A: nothing else is ever computed in A.
template <class A, class F>
METAKD_INLINE void with_narrow_type(Type type, F f) {
  with_type(type, [&](auto* like) METAKD_LAMBDA {
    if constexpr (sizeof(*like) <= sizeof(A)) f(like);
  });
}

// Memory as numbers of the type of ``like``.
template <class T>
METAKD_INLINE const T* numbers(const void* memory, T*) {
  return static_cast<const T*>(memory);
}

template <class T>
METAKD_INLINE T* numbers(void* memory, T*) {
  return static_cast<T*>(memory);
}

typedef float NarrowFloat __attribute__((vector_size(METAKD_BYTES / 2)));
typedef uint16_t NarrowBits __attribute__((vector_size(METAKD_BYTES / 2)));
typedef uint32_t Bits __attribute__((vector_size(METAKD_BYTES)));

// As many numbers as a vector of A has lanes.
template <class A>
METAKD_INLINE Vector<A> read(const A* from) {
  return load(from);
}

template <class A>
METAKD_INLINE Vector<double> read(const float* from)
  requires(sizeof(A) == 8)
{
  NarrowFloat v;
  __builtin_memcpy(&v, from, sizeof(v));
  return __builtin_convertvector(v, Vector<double>);
}

template <class A>
METAKD_INLINE Vector<float> read(const c10::BFloat16* from)
  requires(sizeof(A) == 4)
{
  NarrowBits v;
  __builtin_memcpy(&v, from, sizeof(v));
  return (Vector<float>)(__builtin_convertvector(v, Bits) << 16);
}

template <class A>
METAKD_INLINE Vector<float> read(const c10::Half* from)
  requires(sizeof(A) == 4)
{
#if METAKD_BYTES == 64
  return (Vector<float>)_mm512_maskz_cvtph_ps(-1, _mm256_loadu_si256((const __m256i*)from));
#elif METAKD_BYTES == 32
  return (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#else
  Vector<float> v;
  for (int lane = 0; lane < Float<float>::lanes; ++lane) v[lane] = static_cast<float>(from[lane]);
  return v;
#endif
}

template <class A, class T>
METAKD_INLINE Vector<double> read(const T* from)
  requires(sizeof(A) == 8 && sizeof(T) == 2)
{
  Vector<double> v;
  for (int lane = 0; lane < Float<double>::lanes; ++lane) v[lane] = static_cast<float>(from[lane]);
  return v;
}

// Sums in double of numbers of type A: to[lane % lanes of a double] or, of an array, to[lane].
template <class A>
METAKD_INLINE void add_wide(Vector<double>& to, Vector<A> v) {
  A lanes[Float<A>::lanes];
  store(lanes, v);
#pragma GCC unroll 2
  for (int lane = 0; lane < Float<A>::lanes; lane += Float<double>::lanes)
    to += read<double>(lanes + lane);
}

template <class A>
METAKD_INLINE void add_wide(double* to, Vector<A> v) {
  A lanes[Float<A>::lanes];
  store(lanes, v);
#pragma GCC unroll 2
  for (int lane = 0; lane < Float<A>::lanes; lane += Float<double>::lanes)
    store(to + lane, load(to + lane) + read<double>(lanes + lane));
}

// Lanes from ``count`` on are 0.
template <class A, class T>
METAKD_INLINE Vector<A> read_some(const T* from, int64_t count) {
  T some[Float<A>::lanes];
  __builtin_memset(static_cast<void*>(some), 0, sizeof(some));
  for (int64_t lane = 0; lane < count; ++lane) some[lane] = from[lane];
  return read<A>(some);
}

METAKD_INLINE void write(float* to, Vector<float> v) { store(to, v); }

METAKD_INLINE void write(double* to, Vector<double> v) { store(to, v); }

METAKD_INLINE void write(float* to, Vector<double> v) {
  const NarrowFloat narrow = __builtin_convertvector(v, NarrowFloat);
  __builtin_memcpy(to, &narrow, sizeof(narrow));
}

METAKD_INLINE void write(c10::BFloat16* to, Vector<float> v) {
  const Bits bits = (Bits)v;
  const Bits nearest = (bits + (0x7fff + ((bits >> 16) & 1))) >> 16;  // ties to even
  const NarrowBits narrow = __builtin_convertvector(v == v ? nearest : Bits{} + 0x7fc0, NarrowBits);
  __builtin_memcpy(static_cast<void*>(to), &narrow, sizeof(narrow));
}

METAKD_INLINE void write(c10::Half* to, Vector<float> v) {
#if METAKD_BYTES == 64
  _mm256_storeu_si256((__m256i*)to, _mm512_maskz_cvtps_ph(-1, (__m512)v, 0));
#elif METAKD_BYTES == 32
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)v, 0));
#else
  for (int lane = 0; lane < Float<float>::lanes; ++lane) to[lane] = static_cast<c10::Half>(v[lane]);
#endif
}

template <class T>
METAKD_INLINE void write(T* to, Vector<double> v)
  requires(sizeof(T) == 2)
{
  for (int lane = 0; lane < Float<double>::lanes; ++lane)
    to[lane] = static_cast<T>(static_cast<float>(v[lane]));
}

template <class T, class V>
METAKD_INLINE void write_some(T* to, V v, int64_t count) {
  T some[sizeof(v) / sizeof(v[0])];
  write(some, v);
  for (int64_t lane = 0; lane < count; ++lane) to[lane] = some[lane];
}

}  // namespace METAKD_ISA
