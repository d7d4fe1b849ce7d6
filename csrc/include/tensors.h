// What every launcher asks of a tensor, in LibTorch's stable ABI: a build serves every torch from
// TORCH_TARGET_VERSION on, and knows nothing of Python.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <cstdint>
#include <vector>

namespace metakd {

using Shape = torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// Dtype: a device's own enumeration.
template <typename Dtype>
Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Double: return Dtype::float64;
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    default: STD_TORCH_CHECK(false, "metakd: floating tensors expected, got ", x.scalar_type());
  }
}

// What sums of these are kept in: double where one is.
template <class... Given>
ScalarType accumulator(const Given&... x) {
  return ((x.scalar_type() == ScalarType::Double) || ...) ? ScalarType::Double : ScalarType::Float;
}

inline bool is_same(const Tensor& x, const Tensor& y) { return x.get() == y.get(); }

inline Tensor contiguous_as(ScalarType type, const Tensor& x) {
  return torch::stable::contiguous(torch::stable::to(x, type));
}

inline Tensor with_last_stride_1(const Tensor& x) {
  return x.size(x.dim() - 1) <= 1 || x.stride(x.dim() - 1) == 1 ? x : torch::stable::contiguous(x);
}

// A gradient like its input, in the layout that empty_like gives; kernels write `to`, whose last
// stride is 1.
struct Gradient {
  Tensor like, to;

  explicit Gradient(const Tensor& input)
      : like(torch::stable::empty_like(input)),
        to(is_same(with_last_stride_1(like), like) ? like : torch::stable::new_empty(input, input.sizes())) {}

  Tensor finished() {
    if (!is_same(to, like)) torch::stable::copy_(like, to);
    return like;
  }
};

inline std::vector<Gradient> gradients_of(const Tensors& inputs) {
  return std::vector<Gradient>(inputs.begin(), inputs.end());
}

inline void append_finished(std::vector<Gradient>& from, Tensors& to) {
  for (Gradient& gradient : from) to.push_back(gradient.finished());
}

}  // namespace metakd
