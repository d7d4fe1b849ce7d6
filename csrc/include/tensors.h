// What every launcher asks of a tensor. Needs ATen only.

#pragma once

#include <ATen/core/Tensor.h>

namespace metakd {

// Dtype: a device's own enumeration.
template <typename Dtype>
Dtype dtype_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kDouble: return Dtype::float64;
    case at::kFloat: return Dtype::float32;
    case at::kBFloat16: return Dtype::bfloat16;
    case at::kHalf: return Dtype::float16;
    default: TORCH_CHECK(false, "metakd: floating tensors expected, got ", x.scalar_type());
  }
}

inline at::Tensor with_last_stride_1(const at::Tensor& x) {
  return x.stride(-1) == 1 || x.size(-1) <= 1 ? x : x.contiguous();
}

}  // namespace metakd
