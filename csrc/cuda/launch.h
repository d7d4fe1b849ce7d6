// What launchers of CUDA kernels share: tensors as kernels see them, and what a device can do.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <optional>
#include <tuple>

#include <rowwise.cuh>
#include <tensors.h>

namespace metakd::launch {

inline int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

// bool [B, L] of the mask of an operator, or null.
inline const bool* mask_of(const char* op, const std::optional<at::Tensor>& mask, const at::Tensor& like,
                           int64_t length, int64_t& stride_b, int64_t& stride_l) {
  if (!mask) return nullptr;
  TORCH_CHECK(mask->device() == like.device(), op, ": all tensors must be on ", like.device());
  TORCH_CHECK(mask->scalar_type() == at::kBool && mask->dim() == 2 && mask->size(0) == like.size(0) &&
                  mask->size(1) == length,
              op, ": masks must be bool [B, L]");
  stride_b = mask->stride(0);
  stride_l = mask->stride(1);
  return mask->const_data_ptr<bool>();
}

// A gradient like its input; kernels write `to`, whose last stride is 1.
struct Gradient {
  at::Tensor like, to;

  explicit Gradient(const at::Tensor& input) : like(at::empty_like(input)), to(like) {
    if (!with_last_stride_1(like).is_same(like)) to = input.new_empty(input.sizes());
  }
  at::Tensor finished() const {
    if (!to.is_same(like)) like.copy_(to);
    return like;
  }
};

// Lets a kernel have `bytes` of dynamic shared memory; asked once a kernel and device, for all it may have.
template <typename Kernel>
void allow_shared(Kernel* kernel, int device) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*>, bool> done;
  const void* const function = reinterpret_cast<const void*>(kernel);
  const std::lock_guard<std::mutex> lock(mutex);
  if (!done.try_emplace({device, function}, true).second) return;
  C10_CUDA_CHECK(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)));
}

}  // namespace metakd::launch
