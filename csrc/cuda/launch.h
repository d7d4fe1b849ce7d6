// What launchers of CUDA kernels share: tensors as kernels see them, and what a device can do.

#pragma once

#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <map>
#include <mutex>
#include <optional>
#include <tuple>

#include <rowwise.cuh>
#include <tensors.h>

namespace metakd::launch {

using torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

// bool [B, L] of the mask of an operator, or null.
inline const bool* mask_of(const char* op, const std::optional<Tensor>& mask, const Tensor& like,
                           int64_t length, int64_t& stride_b, int64_t& stride_l) {
  if (!mask) return nullptr;
  STD_TORCH_CHECK(mask->device() == like.device(), op, ": all tensors must be on one device");
  STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 && mask->size(0) == like.size(0) &&
                      mask->size(1) == length,
                  op, ": masks must be bool [B, L]");
  stride_b = mask->stride(0);
  stride_l = mask->stride(1);
  return mask->const_data_ptr<bool>();
}

// Lets a kernel have `bytes` of dynamic shared memory; asked once a kernel and device, for all it may have.
template <typename Kernel>
void allow_shared(Kernel* kernel, int device) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*>, bool> done;
  const void* const function = reinterpret_cast<const void*>(kernel);
  const std::lock_guard<std::mutex> lock(mutex);
  if (!done.try_emplace({device, function}, true).second) return;
  STD_CUDA_CHECK(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)));
}

}  // namespace metakd::launch
