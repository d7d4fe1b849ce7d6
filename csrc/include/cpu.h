// What the CPU operators of one file share outside the texts that are compiled per instruction set:
// element types, the choice of instruction set, memory.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
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

enum class Type { float64, float32, bfloat16, float16 };

template <class Pointer>
constexpr bool is_half = std::is_same_v<Pointer, c10::Half*>;

inline Type type_of(const at::Tensor& x) { return metakd::dtype_of<Type>(x); }

// The type that is computed in: double where an input is double.
template <class... Tensors>
at::ScalarType accumulator(const Tensors&... x) {
  return ((x.scalar_type() == at::kDouble) || ...) ? at::kDouble : at::kFloat;
}

using metakd::with_last_stride_1;

// Work (multiplications with an addition) that a thread is worth waking for: tens of microseconds.
constexpr int64_t WORTH = 1 << 21;

inline int64_t grain(int64_t work_per_unit) {
  return std::max<int64_t>(1, WORTH / std::max<int64_t>(1, work_per_unit));
}

// PyTorch's own choice for this processor (ATEN_CPU_CAPABILITY overrides it), so that a build holds
// no instruction that its machine lacks, wherever it was made.
enum class Level { base, avx2, avx512 };

inline Level level() {
  static const Level found = [] {
    const std::string name = at::get_cpu_capability();
    return name == "AVX512" ? Level::avx512 : name == "AVX2" ? Level::avx2 : Level::base;
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
inline void prefer_huge_pages([[maybe_unused]] const at::Tensor& x) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t PAGE = 4096, LARGE = 32 << 20;
  const auto from = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  const uintptr_t begin = (from + PAGE - 1) / PAGE * PAGE, end = (from + x.nbytes()) / PAGE * PAGE;
  if (x.nbytes() >= LARGE) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Gradients of layers, in the layout that empty_like gives; computed with contiguous rows.
class Gradients {
 public:
  std::vector<at::Tensor> rows;

  explicit Gradients(at::TensorList like) {
    for (const at::Tensor& x : like) {
      results_.push_back(at::empty_like(x));
      const bool direct = results_.back().stride(-1) == 1 || x.size(-1) <= 1;
      rows.push_back(direct ? results_.back() : at::empty(x.sizes(), x.options()));
    }
  }

  void append_to(std::vector<at::Tensor>& all) {
    for (size_t i = 0; i < rows.size(); ++i) {
      if (!rows[i].is_same(results_[i])) results_[i].copy_(rows[i]);
      all.push_back(results_[i]);
    }
  }

 private:
  std::vector<at::Tensor> results_;
};

}  // namespace
