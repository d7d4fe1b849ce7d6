// What the CPU operators of one file share outside the texts that are compiled per instruction set:
// element types, the choice of instruction set, memory.

#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "tensors.h"

namespace {

using metakd::accumulator;
using metakd::Gradient;
using metakd::ScalarType;
using metakd::Shape;
using metakd::Tensor;
using metakd::Tensors;
using metakd::with_last_stride_1;

enum class Type { float64, float32, bfloat16, float16 };

template <class Pointer>
constexpr bool is_half = std::is_same_v<Pointer, c10::Half*>;

inline Type type_of(const Tensor& x) { return metakd::dtype_of<Type>(x); }

// Work (multiplications with an addition) that a thread is worth waking for: tens of microseconds.
constexpr int64_t WORTH = 1 << 21;

inline int64_t grain(int64_t work_per_unit) {
  return std::max<int64_t>(1, WORTH / std::max<int64_t>(1, work_per_unit));
}

// The widest that this processor has, so that a build holds no instruction that its machine lacks,
// wherever it was made; ATEN_CPU_CAPABILITY narrows it as it does PyTorch's own.
enum class Level { base, avx2, avx512 };

inline Level level() {
  static const Level found = [] {
#if defined(__x86_64__)
    const char* const asked = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string most = asked ? asked : "avx512";
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && most != "avx2" && most != "default") return Level::avx512;
    if (avx2 && most != "default") return Level::avx2;
#endif
    return Level::base;
  }();
  return found;
}

#if defined(__x86_64__)
#define METAKD_BEST(function)                            \
  (level() == Level::avx512     ? avx512::function       \
       : level() == Level::avx2 ? avx2::function         \
                                : base::function)
#else
#define METAKD_BEST(function) base::function
#endif

// Zeroed memory that starts at a line of the cache, for functions that say how much they need.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { ::operator delete(memory_, std::align_val_t{LINE_BYTES}); }

  // f(memory), where f(nullptr) returned the bytes; the first call's are taken for all.
  template <class F>
  void lend(F f) {
    if (!memory_) {
      const size_t bytes = std::max<int64_t>(f(nullptr), 1);
      memory_ = ::operator new(bytes, std::align_val_t{LINE_BYTES});
      std::memset(memory_, 0, bytes);
    }
    f(memory_);
  }

 private:
  static constexpr size_t LINE_BYTES = 64;
  void* memory_ = nullptr;
};

// From 32 MiB on malloc maps new memory every time, and its page faults may take longer than the
// gradient that is written there: huge pages have 512 times fewer of them. Only advice, may be refused.
inline void prefer_huge_pages([[maybe_unused]] const Tensor& x) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t PAGE = 4096, LARGE = 32 << 20;
  const auto from = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  const uintptr_t bytes = x.numel() * x.element_size();
  const uintptr_t begin = (from + PAGE - 1) / PAGE * PAGE, end = (from + bytes) / PAGE * PAGE;
  if (bytes >= LARGE) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace
