// hidden_mse on a CPU, for one instruction set (see vectors.h). Torch-free.

#include "vectors.h"

namespace METAKD_ISA {

// f(null pointers to the types of student and teacher).
template <class A, class F>
METAKD_INLINE void with_types(const Tokens& tokens, F f) {
  with_narrow_type<A>(tokens.type_s, [&](auto* s) METAKD_LAMBDA {
    with_narrow_type<A>(tokens.type_t, [&](auto* t) METAKD_LAMBDA { f(s, t); });
  });
}

// Sum of squared differences over real tokens [begin, end).
template <class A>
METAKD_NOINLINE double squares(const Tokens& tokens, int64_t begin, int64_t end) {
  constexpr int64_t W = Float<A>::lanes;
  Vector<double> sum{};
  with_types<A>(tokens, [&](auto* like_s, auto* like_t) METAKD_LAMBDA {
    for (int64_t token = begin; token < end; ++token) {
      if (!tokens.is_real(token)) continue;
      const auto* s = numbers(tokens.student, like_s) + token * tokens.stride_s;
      const auto* t = numbers(tokens.teacher, like_t) + token * tokens.stride_t;
      Vector<A> even{}, odd{};
      int64_t c = 0;
      for (; c + 2 * W <= tokens.width; c += 2 * W) {
        const Vector<A> x = read<A>(s + c) - read<A>(t + c);
        const Vector<A> y = read<A>(s + c + W) - read<A>(t + c + W);
        even += x * x;
        odd += y * y;
      }
      for_vectors<A>(tokens.width - c, [&](int64_t rest, int64_t count) METAKD_LAMBDA {
        const Vector<A> x = read_some<A>(s + c + rest, count) - read_some<A>(t + c + rest, count);
        even += x * x;
      });
      add_wide<A>(sum, even + odd);
    }
  });
  return total_of<double>(sum);
}

// factor * (student - teacher) in real tokens [begin, end), 0 in others.
template <class A>
METAKD_NOINLINE void slopes(const Tokens& tokens, double factor, int64_t begin, int64_t end) {
  constexpr int64_t W = Float<A>::lanes;
  const Vector<A> factors = per_lane<A>(factor);
  with_types<A>(tokens, [&](auto* like_s, auto* like_t) METAKD_LAMBDA {
    for (int64_t token = begin; token < end; ++token) {
      auto* to = numbers(tokens.gradient, like_s) + token * tokens.stride_gradient;
      if (!tokens.is_real(token)) {
        __builtin_memset(static_cast<void*>(to), 0, tokens.width * sizeof(*to));
        continue;
      }
      const auto* s = numbers(tokens.student, like_s) + token * tokens.stride_s;
      const auto* t = numbers(tokens.teacher, like_t) + token * tokens.stride_t;
      for_vectors<A>(tokens.width, [&](int64_t c, int64_t count) METAKD_LAMBDA {
        if (count == W) {
          write(to + c, (read<A>(s + c) - read<A>(t + c)) * factors);
        } else {
          const Vector<A> x = read_some<A>(s + c, count) - read_some<A>(t + c, count);
          write_some(to + c, x * factors, count);
        }
      });
    }
  });
}

inline Forms forms(bool is_double) {
  return is_double ? Forms{squares<double>, slopes<double>} : Forms{squares<float>, slopes<float>};
}

}  // namespace METAKD_ISA
