// Walking rows of logits: types, wide loads, reductions, and online softmax statistics of two rows at
// once. Torch-free, and all arithmetic on places is __host__ __device__, so that it can be checked
// without a GPU.
//
// A row is walked by a group of threads in chunks of CHUNK columns a thread. `wide`: 16 bytes a load,
// neighbouring columns in a thread, for rows whose addresses agree modulo 16 bytes. Otherwise
// `strided`: a column a load, neighbouring columns in neighbouring threads, for any addresses; a warp's
// loads are still one or two full lines, so this costs instructions, not bytes. The few columns before
// the first and after the last 16-byte boundary of a wide row are the `ragged` ones: one each for the
// first threads. What is not there reads as -inf, which has no weight.
//
// Legend: A the type that is computed in (float, or double where an input is).

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include <rowwise_ptx.cuh>

#define METAKD_BOTH __host__ __device__ __forceinline__
#define METAKD_DEVICE __device__ __forceinline__

namespace metakd {

enum class Dtype : int { float64, float32, bfloat16, float16 };

// In place of a type: any of them, found at run time, strided loads only.
struct Any {};

template <typename T>
constexpr bool is_any = std::is_same_v<T, Any>;

METAKD_BOTH int bytes_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

template <typename A>
METAKD_BOTH A infinity() {
  return static_cast<A>(HUGE_VAL);
}

template <typename A>
constexpr A LOWEST = std::numeric_limits<A>::lowest();  // finite

METAKD_BOTH float max_of(float x, float y) { return fmaxf(x, y); }
METAKD_BOTH double max_of(double x, double y) { return fmax(x, y); }

// Bits of 16-bit logits <-> float.

template <typename T>
METAKD_BOTH float widen(uint32_t bits) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
#ifdef __CUDA_ARCH__
    return __uint_as_float(bits << 16);
#else
    return __bfloat162float(__ushort_as_bfloat16(static_cast<unsigned short>(bits)));
#endif
  } else {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  }
}

template <typename T>
METAKD_BOTH uint32_t narrow(float x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __bfloat16_as_ushort(__float2bfloat16_rn(x));
  else return __half_as_ushort(__float2half_rn(x));
}

// Two of them, the first in the low half.

template <typename T>
METAKD_DEVICE void widen_two(uint32_t bits, float& x, float& y) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    x = __uint_as_float(bits << 16);
    y = __uint_as_float(bits & 0xffff0000u);
  } else {
    x = widen<T>(bits & 0xffffu);
    y = widen<T>(bits >> 16);
  }
}

template <typename T>
METAKD_DEVICE uint32_t narrow_two(float x, float y) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __half2 pair = __floats2half2_rn(x, y);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

// Where columns are

template <typename T>
struct Width {
  static constexpr int vector = 16 / sizeof(T);  // columns in 16 bytes
};
template <>
struct Width<Any> {
  static constexpr int vector = 1;
};

// Columns before the first 16-byte boundary at or after an address; after the last at or before it.
template <typename T>
METAKD_BOTH int columns_to_boundary(uint64_t address) {
  return static_cast<int>((0 - address) & 15) / static_cast<int>(sizeof(T));
}
template <typename T>
METAKD_BOTH int columns_past_boundary(uint64_t address) {
  return static_cast<int>(address & 15) / static_cast<int>(sizeof(T));
}

// How THREADS threads walk columns [0, count). Wide: whole vectors only.
template <typename T, int CHUNK, int THREADS>
struct Walk {
  static constexpr int VECTOR = Width<T>::vector, VECTORS = CHUNK / VECTOR;

  int count, chunks;
  bool wide;

  METAKD_BOTH Walk(int count_, bool wide_)
      : count(count_), chunks((count_ + THREADS * CHUNK - 1) / (THREADS * CHUNK)), wide(wide_) {}

  // Column of element e of a thread's chunk; those below `count` cover every column exactly once.
  METAKD_BOTH int first_column(int chunk, int thread) const {
    return chunk * (THREADS * CHUNK) + thread * (wide ? VECTOR : 1);
  }
  METAKD_BOTH int column(int first, int e) const {
    return first + (wide ? e / VECTOR * (THREADS * VECTOR) + e % VECTOR : e * THREADS);
  }
};

// Columns [0, count) whose 16-byte boundaries come after `head` columns: what is walked in vectors, and
// the few columns around it.
struct Interior {
  int begin, end, count;

  template <typename T>
  static METAKD_BOTH Interior of(int count, bool wide, int head) {
    if (!wide) return {0, count, count};
    const int begin = head < count ? head : count;
    return {begin, begin + (count - begin) / Width<T>::vector * Width<T>::vector, count};
  }

  METAKD_BOTH int size() const { return end - begin; }
  METAKD_BOTH int ragged() const { return count - size(); }  // less than two vectors
  METAKD_BOTH int ragged_column(int i) const { return i < begin ? i : i + size(); }
};

// Loads and stores

template <typename T>
struct Row {
  T* at;
  METAKD_BOTH uint64_t address() const { return reinterpret_cast<uint64_t>(at); }
  METAKD_BOTH Row shifted(int columns) const { return {at + columns}; }
};
template <>
struct Row<Any> {
  char* at;
  Dtype dtype;
  METAKD_BOTH Row shifted(int columns) const {
    return {at + static_cast<int64_t>(columns) * bytes_of(dtype), dtype};
  }
};

template <typename T>
METAKD_DEVICE Row<T> row_of(const void* base, Dtype dtype, int64_t offset) {
  if constexpr (is_any<T>)
    return {static_cast<char*>(const_cast<void*>(base)) + offset * bytes_of(dtype), dtype};
  else
    return {static_cast<T*>(const_cast<void*>(base)) + offset};
}

// One column.
template <typename T, typename A>
METAKD_DEVICE A load_one(const Row<T>& row, int column) {
  if constexpr (is_any<T>) {
    switch (row.dtype) {
      case Dtype::float64: return static_cast<A>(reinterpret_cast<const double*>(row.at)[column]);
      case Dtype::float32: return static_cast<A>(reinterpret_cast<const float*>(row.at)[column]);
      case Dtype::bfloat16:
        return widen<__nv_bfloat16>(reinterpret_cast<const uint16_t*>(row.at)[column]);
      default: return widen<__half>(reinterpret_cast<const uint16_t*>(row.at)[column]);
    }
  } else if constexpr (sizeof(T) == 2) {
    return widen<T>(reinterpret_cast<const uint16_t*>(row.at)[column]);
  } else {
    return row.at[column];
  }
}

template <typename T, typename A>
METAKD_DEVICE void store_one(const Row<T>& row, int column, A x) {
  if constexpr (is_any<T>) {
    switch (row.dtype) {
      case Dtype::float64: reinterpret_cast<double*>(row.at)[column] = x; return;
      case Dtype::float32: reinterpret_cast<float*>(row.at)[column] = static_cast<float>(x); return;
      case Dtype::bfloat16:
        reinterpret_cast<uint16_t*>(row.at)[column] =
            static_cast<uint16_t>(narrow<__nv_bfloat16>(static_cast<float>(x)));
        return;
      default:
        reinterpret_cast<uint16_t*>(row.at)[column] =
            static_cast<uint16_t>(narrow<__half>(static_cast<float>(x)));
    }
  } else if constexpr (sizeof(T) == 2) {
    reinterpret_cast<uint16_t*>(row.at)[column] = static_cast<uint16_t>(narrow<T>(x));
  } else {
    row.at[column] = x;
  }
}

// Elements that `exists(e)` of a row at `column(e)`, -inf elsewhere. The bits of all are asked for
// before the first is looked at: a switch per load would wait for each.
template <typename A, int COUNT, typename Column, typename Exists>
METAKD_DEVICE void load_any(const Row<Any>& row, A (&x)[COUNT], Column column, Exists exists) {
  std::conditional_t<sizeof(A) == 8, uint64_t, uint32_t> bits[COUNT];
  const int size = bytes_of(row.dtype);
  if (size == 2) {
#pragma unroll
    for (int e = 0; e < COUNT; ++e)
      bits[e] = exists(e) ? reinterpret_cast<const uint16_t*>(row.at)[column(e)] : 0;
  } else if (size == 4) {
#pragma unroll
    for (int e = 0; e < COUNT; ++e)
      bits[e] = exists(e) ? reinterpret_cast<const uint32_t*>(row.at)[column(e)] : 0;
  } else if constexpr (sizeof(A) == 8) {
#pragma unroll
    for (int e = 0; e < COUNT; ++e)
      bits[e] = exists(e) ? reinterpret_cast<const uint64_t*>(row.at)[column(e)] : 0;
  }
#pragma unroll
  for (int e = 0; e < COUNT; ++e) {
    const uint32_t low = static_cast<uint32_t>(bits[e]);
    A value;
    if (row.dtype == Dtype::bfloat16) value = widen<__nv_bfloat16>(low);
    else if (row.dtype == Dtype::float16) value = widen<__half>(low);
    else if (sizeof(A) == 4 || row.dtype == Dtype::float32) value = __uint_as_float(low);
    else value = static_cast<A>(__longlong_as_double(static_cast<long long>(bits[e])));
    x[e] = exists(e) ? value : -infinity<A>();
  }
}

template <typename T>
METAKD_DEVICE uint4 minus_infinities() {
  const uint32_t bits = sizeof(T) == 4 ? 0xff800000u
      : std::is_same_v<T, __nv_bfloat16> ? 0xff80ff80u
                                         : 0xfc00fc00u;
  return {bits, bits, bits, bits};
}

// Elements first, first + 1, ... of x; `first` is a constant wherever the loop around is unrolled.
template <typename T, int COUNT>
METAKD_DEVICE void widen_vector(const uint4& v, float (&x)[COUNT], int first) {
  if constexpr (sizeof(T) == 4) {
    x[first] = __uint_as_float(v.x), x[first + 1] = __uint_as_float(v.y);
    x[first + 2] = __uint_as_float(v.z), x[first + 3] = __uint_as_float(v.w);
  } else {
    widen_two<T>(v.x, x[first], x[first + 1]), widen_two<T>(v.y, x[first + 2], x[first + 3]);
    widen_two<T>(v.z, x[first + 4], x[first + 5]), widen_two<T>(v.w, x[first + 6], x[first + 7]);
  }
}

template <typename T, int COUNT>
METAKD_DEVICE uint4 narrow_vector(const float (&x)[COUNT], int first) {
  if constexpr (sizeof(T) == 4)
    return {__float_as_uint(x[first]), __float_as_uint(x[first + 1]), __float_as_uint(x[first + 2]),
            __float_as_uint(x[first + 3])};
  else
    return {narrow_two<T>(x[first], x[first + 1]), narrow_two<T>(x[first + 2], x[first + 3]),
            narrow_two<T>(x[first + 4], x[first + 5]), narrow_two<T>(x[first + 6], x[first + 7])};
}

// A thread's chunk of two rows; false if it has no column of it.
template <typename T, typename A, int CHUNK, int THREADS>
METAKD_DEVICE bool load_chunk(const Walk<T, CHUNK, THREADS>& walk, int first, const Row<T>& row_s,
                              const Row<T>& row_t, A (&s)[CHUNK], A (&t)[CHUNK]) {
  if (first >= walk.count) return false;
  if constexpr (is_any<T>) {
    const auto column = [&](int e) { return first + e * THREADS; };
    const auto exists = [&](int e) { return column(e) < walk.count; };
    load_any(row_s, s, column, exists);
    load_any(row_t, t, column, exists);
  } else if (walk.wide) {
    constexpr int VECTOR = Width<T>::vector, VECTORS = CHUNK / VECTOR, step = THREADS * VECTOR;
    uint4 bits_s[VECTORS], bits_t[VECTORS];
#pragma unroll
    for (int j = 0; j < VECTORS; ++j) {
      const bool there = first + j * step < walk.count;
      bits_s[j] = there ? *reinterpret_cast<const uint4*>(row_s.at + first + j * step) : minus_infinities<T>();
      bits_t[j] = there ? *reinterpret_cast<const uint4*>(row_t.at + first + j * step) : minus_infinities<T>();
    }
#pragma unroll
    for (int j = 0; j < VECTORS; ++j) {
      widen_vector<T>(bits_s[j], s, j * VECTOR);
      widen_vector<T>(bits_t[j], t, j * VECTOR);
    }
  } else {
    const Row<T> from_s = {row_s.at + first}, from_t = {row_t.at + first};
#pragma unroll
    for (int e = 0; e < CHUNK; ++e) {
      const bool there = first + e * THREADS < walk.count;
      s[e] = there ? load_one<T, A>(from_s, e * THREADS) : -infinity<A>();
      t[e] = there ? load_one<T, A>(from_t, e * THREADS) : -infinity<A>();
    }
  }
  return true;
}

template <typename T, typename A, int CHUNK, int THREADS>
METAKD_DEVICE void store_chunk(const Walk<T, CHUNK, THREADS>& walk, int first, const Row<T>& row, const A (&x)[CHUNK]) {
  if constexpr (!is_any<T>) {
    if (walk.wide) {
      constexpr int VECTOR = Width<T>::vector, step = THREADS * VECTOR;
#pragma unroll
      for (int j = 0; j < CHUNK / VECTOR; ++j)
        if (first + j * step < walk.count)
          *reinterpret_cast<uint4*>(row.at + first + j * step) = narrow_vector<T>(x, j * VECTOR);
      return;
    }
  }
#pragma unroll
  for (int e = 0; e < CHUNK; ++e)
    if (first + e * THREADS < walk.count) store_one<T, A>(row, first + e * THREADS, x[e]);
}

// Zeros in columns [from, to), by all of `threads`.
template <typename T>
METAKD_DEVICE void store_zeros(const Row<T>& row, int from, int to, int thread, int threads) {
  if constexpr (is_any<T>) {
    for (int column = from + thread; column < to; column += threads) store_one(row, column, 0.0);
  } else {
    if (from >= to) return;
    const Row<T> start = {row.at + from};
    const Interior interior = Interior::of<T>(to - from, true, columns_to_boundary<T>(start.address()));
    for (int column = interior.begin + thread * Width<T>::vector; column < interior.end;
         column += threads * Width<T>::vector)
      *reinterpret_cast<uint4*>(start.at + column) = uint4{0, 0, 0, 0};
    if (thread < interior.ragged()) store_one(start, interior.ragged_column(thread), 0.0f);
  }
}

// Statistics of two rows in one pass. Sums are of exponentials relative to a reference, a logit near the
// maximum so far; a maximum that is SLACK powers of 2 above it becomes the next reference and rescales
// what was summed. (Maxima rise often among 32 threads, by so much only in the beginning.) `cross` sums
// the weighing side's exp(x') times the difference to the other side: e_t ((t - from_t) - (s - from_s))
// for KL(p || q), e_s ((s - t) - (max_s - top_t)) for KL(q || p): there, the class with most of the
// weight must count exactly 0, or its rounding would drown the others.

enum class Kind : int { forward, reverse, mixture };  // KL(p || q), KL(q || p), Jensen-Shannon

template <typename A, Kind KIND>
struct Online {
  static constexpr bool CROSS = KIND != Kind::mixture, TOP = KIND != Kind::forward;
  static constexpr A LOG2_E = A(1.4426950408889634074), SLACK = A(8);

  A max_s = -infinity<A>(), max_t = -infinity<A>();
  A top_t = -infinity<A>();  // where s is max_s: of a thread's classes the first, of threads the largest
  A from_s = -infinity<A>(), from_t = -infinity<A>();  // references
  A sum_s = 0, sum_t = 0, cross = 0;
  A sum_1 = 0;                // of exp(s - from_s), if wanted
  A lonely = -infinity<A>();  // largest logit of the weighing side where the other side is -inf

  // What is subtracted: never -inf, so that -inf - it is -inf.
  static METAKD_BOTH A origin(A reference) { return reference == -infinity<A>() ? A(0) : reference; }

  // To references that are not lower. `rate` = log2(e) / T.
  METAKD_BOTH void rebase(A new_s, A new_t, A rate, bool one) {
    const A keep_s = new_s == from_s ? A(1) : exp2_of((from_s - new_s) * rate);
    const A keep_t = new_t == from_t ? A(1) : exp2_of((from_t - new_t) * rate);
    // Exactly 0 where all of it underflows: its differences may be infinite.
    if constexpr (KIND == Kind::forward) {
      const A moved_s = origin(from_s) - origin(new_s), moved_t = origin(from_t) - origin(new_t);
      cross = keep_t == A(0) || sum_t == A(0) ? A(0) : keep_t * (cross + sum_t * (moved_t - moved_s));
    }
    if constexpr (KIND == Kind::reverse) cross = keep_s == A(0) ? A(0) : keep_s * cross;
    if (one && new_s != from_s) sum_1 *= exp2_of((from_s - new_s) * LOG2_E);
    sum_s *= keep_s;
    sum_t *= keep_t;
    from_s = new_s;
    from_t = new_t;
  }

  // To a maximum that is not lower, and the teacher's logit there.
  METAKD_BOTH void rise(A new_s, A new_t) {
    if constexpr (KIND == Kind::reverse) {
      const A moved = (max_s - new_s) - (origin(top_t) - origin(new_t));
      cross = sum_s == A(0) ? A(0) : cross + sum_s * moved;
    }
    max_s = new_s;
    top_t = new_t;
  }

  // In groups of 8: more at once would not fit in registers.
  template <int COUNT>
  METAKD_BOTH void absorb(const A (&s)[COUNT], const A (&t)[COUNT], A rate, bool one) {
    constexpr int GROUP = COUNT < 8 ? COUNT : 8;
    static_assert(COUNT % GROUP == 0);
#pragma unroll
    for (int first = 0; first < COUNT; first += GROUP) absorb_group<GROUP>(s, t, first, rate, one);
  }

  template <int GROUP, int COUNT>
  METAKD_BOTH void absorb_group(const A (&s)[COUNT], const A (&t)[COUNT], int first, A rate, bool one) {
    A new_s = max_s, new_t = top_t;
#pragma unroll
    for (int e = first; e < first + GROUP; ++e) {
      if (TOP && s[e] > new_s) new_t = t[e];
      new_s = max_of(new_s, s[e]);
      max_t = max_of(max_t, t[e]);
    }
    rise(new_s, new_t);
    const A fastest = one ? max_of(rate, LOG2_E) : rate;
    if ((max_s - from_s) * fastest > SLACK || (max_t - from_t) * rate > SLACK)
      rebase(max_s, max_t, rate, one);

    const A zero_s = origin(from_s), zero_t = origin(from_t), top = top_difference();
    A part = 0;
#pragma unroll
    for (int e = first; e < first + GROUP; ++e) {
      const A ds = s[e] - zero_s, dt = t[e] - zero_t;
      const A es = exp2_of(ds * rate), et = exp2_of(dt * rate);
      sum_s += es;
      sum_t += et;
      if constexpr (KIND == Kind::forward) part += et * (dt - ds);
      if constexpr (KIND == Kind::reverse) part += es * ((ds - dt) - top);
    }
    if constexpr (CROSS) {
      // A finite sum had no infinite difference in it; only otherwise is a look at each needed.
      if (!(part - part == A(0))) part = careful<GROUP>(s, t, first, rate);
      cross += part;
    }
    if (one) {
#pragma unroll
      for (int e = first; e < first + GROUP; ++e) sum_1 += exp2_of((s[e] - zero_s) * LOG2_E);
    }
  }

  // The reverse KL's ds - dt of the student's maximum, rounded as in the sums.
  METAKD_BOTH A top_difference() const {
    if constexpr (KIND != Kind::reverse) return A(0);
    return (max_s - origin(from_s)) - (origin(top_t) - origin(from_t));
  }

  // `part` where some logits are -inf or NaN.
  template <int GROUP, int COUNT>
  METAKD_BOTH A careful(const A (&s)[COUNT], const A (&t)[COUNT], int first, A rate) {
    const A zero_s = origin(from_s), zero_t = origin(from_t), top = top_difference();
    A part = 0;
#pragma unroll
    for (int e = first; e < first + GROUP; ++e) {
      const A own = KIND == Kind::forward ? t[e] : s[e], other = KIND == Kind::forward ? s[e] : t[e];
      const A d_own = own - (KIND == Kind::forward ? zero_t : zero_s);
      const A d_other = other - (KIND == Kind::forward ? zero_s : zero_t);
      const A weight = exp2_of(d_own * rate);
      if (weight == A(0)) continue;
      if (other == -infinity<A>()) lonely = max_of(lonely, own);  // NaN: the sums know
      else part += weight * ((d_own - d_other) - top);
    }
    return part;
  }

  // Of `lanes` (a power of two) neighbouring threads; all get the result, relative to the maxima.
  METAKD_DEVICE void reduce(int lanes, A rate, bool one) {
    A new_s = max_s, new_t = top_t;
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
      const A other_s = shuffle_xor(new_s, offset);
      if constexpr (TOP) {
        const A other_t = shuffle_xor(new_t, offset);
        if (other_s > new_s || (other_s == new_s && other_t > new_t)) new_t = other_t;
      }
      new_s = max_of(new_s, other_s);
      max_t = max_of(max_t, shuffle_xor(max_t, offset));
    }
    rise(new_s, new_t);
    rebase(max_s, max_t, rate, one);
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
      sum_s += shuffle_xor(sum_s, offset);
      sum_t += shuffle_xor(sum_t, offset);
      if (one) sum_1 += shuffle_xor(sum_1, offset);
      if constexpr (CROSS) {
        cross += shuffle_xor(cross, offset);
        lonely = max_of(lonely, shuffle_xor(lonely, offset));
      }
    }
  }
};

// Two plain sums.
template <typename A>
struct Two {
  A x = 0, y = 0;

  METAKD_DEVICE void reduce(int lanes) {
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
      x += shuffle_xor(x, offset);
      y += shuffle_xor(y, offset);
    }
  }
};

}  // namespace metakd
