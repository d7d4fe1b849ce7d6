// soft_kl on CUDA devices: what metakd/ops.py declares, launched from the kernels of soft_kl.cuh.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <tuple>
#include <vector>

#include <soft_kl.cuh>
#include <soft_kl_call.h>

#include "launch.h"

namespace {

using namespace metakd;
using namespace metakd::soft_kl;

struct Device {
  int capability = 0, shared = 0;  // major; bytes that a block may have
};

const Device& device_of(int index) {
  static const std::vector<Device> devices = [] {
    int count = 0;
    STD_CUDA_CHECK(cudaGetDeviceCount(&count));
    std::vector<Device> found(count);
    for (int i = 0; i < count; ++i) {
      STD_CUDA_CHECK(cudaDeviceGetAttribute(&found[i].capability, cudaDevAttrComputeCapabilityMajor, i));
      STD_CUDA_CHECK(cudaDeviceGetAttribute(&found[i].shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, i));
    }
    return found;
  }();
  return devices.at(index);
}

struct ClusterLaunch {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute{};

  ClusterLaunch(const Plan& plan, int clusters, cudaStream_t stream) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = plan.ranks;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.gridDim = dim3(clusters * plan.ranks);
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = plan.bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  ClusterLaunch(const ClusterLaunch&) = delete;
};

// How many clusters a device holds at a time, asked once per kernel and plan; 0: none, take another kernel.
template <typename Kernel>
int resident_clusters(Kernel* kernel, const Plan& plan, int device) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, int, int>, int> known;
  const void* const function = reinterpret_cast<const void*>(kernel);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [entry, is_new] = known.try_emplace({device, function, plan.ranks, plan.bytes}, 0);
  if (!is_new) return entry->second;
  // Of a build for older GPUs a newer one runs PTX, in which this kernel is empty.
  cudaFuncAttributes attributes;
  STD_CUDA_CHECK(cudaFuncGetAttributes(&attributes, function));
  if (attributes.ptxVersion < 90) return 0;
  STD_CUDA_CHECK(cudaFuncSetAttribute(
      function, cudaFuncAttributeMaxDynamicSharedMemorySize, device_of(device).shared));
  if (plan.ranks > PORTABLE_RANKS)
    STD_CUDA_CHECK(cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  const ClusterLaunch launch(plan, 1, nullptr);
  int count = 0;
  if (cudaOccupancyMaxActiveClusters(&count, function, &launch.config) != cudaSuccess) {
    (void)cudaGetLastError();  // a slice of a GPU, say, may not hold any
    count = 0;
  }
  return entry->second = count;
}

template <typename A, typename F>
void with_kind(const Job<A>& job, F f) {
  if (job.beta == A(0)) f(std::integral_constant<Kind, Kind::forward>());
  else if (job.beta == A(1)) f(std::integral_constant<Kind, Kind::reverse>());
  else f(std::integral_constant<Kind, Kind::mixture>());
}

template <Kind KIND>
void launch_narrow(const Job<float>& job, cudaStream_t stream) {
  int lanes = 1;
  while (lanes < 32 && lanes < job.vocab) lanes *= 2;
  const int64_t rows = NARROW_THREADS / lanes;  // of a block
  const dim3 grid(static_cast<unsigned>((job.n + rows - 1) / rows));
  if (job.vocab <= lanes) soft_kl_narrow<1, KIND><<<grid, NARROW_THREADS, 0, stream>>>(job, lanes);
  else if (job.vocab <= 8 * lanes) soft_kl_narrow<8, KIND><<<grid, NARROW_THREADS, 0, stream>>>(job, lanes);
  else soft_kl_narrow<32, KIND><<<grid, NARROW_THREADS, 0, stream>>>(job, lanes);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T, typename A, Kind KIND>
void launch_plain(const Job<A>& job, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(job.n));
  soft_kl_plain<T, A, KIND><<<grid, PLAIN_THREADS, sizeof(PlainShared<A, KIND>), stream>>>(job);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Both sides are of type T.
template <typename T, Kind KIND>
void launch_long(const Job<float>& job, int device, cudaStream_t stream) {
  const bool saves_a_read = !job.given && (job.dstudent || KIND == Kind::mixture);
  if (saves_a_read && device_of(device).capability >= 9) {
    const Plan plan = plan_for<KIND>(job.vocab, sizeof(T), device_of(device).shared);
    const int resident =
        plan.ranks > 0 ? resident_clusters(&soft_kl_one_read<T, KIND>, plan, device) : 0;
    if (resident > 0) {
      const int clusters = static_cast<int>(std::min<int64_t>(job.n, resident));
      const ClusterLaunch launch(plan, clusters, stream);
      STD_CUDA_CHECK(cudaLaunchKernelEx(&launch.config, &soft_kl_one_read<T, KIND>, job, plan));
      return;
    }
  }
  launch_plain<T, float, KIND>(job, stream);
}

void launch(const Job<double>& job, int, cudaStream_t stream) {
  with_kind(job, [&](auto kind) { launch_plain<Any, double, kind()>(job, stream); });
}

void launch(const Job<float>& job, int device, cudaStream_t stream) {
  with_kind(job, [&](auto kind) {
    constexpr Kind KIND = kind();
    if (job.vocab <= NARROW_MOST) return launch_narrow<KIND>(job, stream);
    if (job.dtype_s != job.dtype_t) return launch_plain<Any, float, KIND>(job, stream);
    switch (job.dtype_s) {
      case Dtype::float32: return launch_long<float, KIND>(job, device, stream);
      case Dtype::bfloat16: return launch_long<__nv_bfloat16, KIND>(job, device, stream);
      default: return launch_long<__half, KIND>(job, device, stream);
    }
  });
}

struct Call : Arguments {
  template <typename... Given>
  explicit Call(const Given&... given) : Arguments(given...) {
    STD_TORCH_CHECK(n() <= std::numeric_limits<int>::max(), "soft_kl: too many rows: ", n());
    STD_TORCH_CHECK(student.size(1) < (1 << 30) && teacher.size(1) < (1 << 30), "soft_kl: too many classes");
  }

  // Runs on what is given; undefined tensors are neither read nor written.
  void run(const Tensor& rows, const Tensor& stats, const Tensor& given,
           const Tensor& drows, const Tensor& dstudent) const {
    if (n() == 0) return;
    if (is_double) run_in<double>(rows, stats, given, drows, dstudent);
    else run_in<float>(rows, stats, given, drows, dstudent);
  }

  template <typename A>
  void run_in(const Tensor& rows, const Tensor& stats, const Tensor& given,
              const Tensor& drows, const Tensor& dstudent) const {
    Job<A> job{};
    job.student = student.const_data_ptr();
    job.teacher = teacher.const_data_ptr();
    job.stride_s = student.stride(0);
    job.stride_t = teacher.stride(0);
    job.dtype_s = dtype_of<Dtype>(student);
    job.dtype_t = dtype_of<Dtype>(teacher);
    job.n = n();
    job.vocab = static_cast<int>(vocab_size);
    job.width = static_cast<int>(student.size(1));
    if (rows.defined()) job.rows = rows.mutable_data_ptr<A>();
    if (stats.defined()) job.stats = stats.mutable_data_ptr<A>();
    if (given.defined()) job.given = given.const_data_ptr<A>();
    if (drows.defined()) {
      check_drows(drows);
      job.drows = drows.const_data_ptr<A>();
      job.drows_stride = drows.stride(0);
    }
    if (dstudent.defined()) {
      job.dstudent = dstudent.mutable_data_ptr();
      job.stride_d = dstudent.stride(0);
    }
    if (mask) {
      job.mask = mask->const_data_ptr<bool>();
      job.mask_stride = mask->stride(0);
    }
    if (label) {
      job.label = label->const_data_ptr<int64_t>();
      job.label_stride = label->stride(0);
    }
    job.rate = static_cast<A>(M_LOG2E / temperature);
    job.inverse_temperature = static_cast<A>(1.0 / temperature);
    job.scale = static_cast<A>(scale);
    job.beta = static_cast<A>(beta);
    job.hard_weight = static_cast<A>(hard_weight);
    job.sum_1 = label && temperature != 1.0;
    const launch::DeviceGuard guard(student.get_device_index());
    launch(job, student.get_device_index(), launch::current_stream(student));
  }
};

std::tuple<Tensor, Tensor> soft_kl_fwd(
    const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& label, int64_t vocab_size, double temperature, double scale,
    double beta, double hard_weight) {
  const Call call(student, teacher, mask, label, vocab_size, temperature, scale, beta, hard_weight);
  Tensor rows = call.new_rows(), stats = call.new_stats();
  call.run(rows, stats, {}, {}, {});
  return {rows, stats};
}

Tensor soft_kl_bwd(
    const Tensor& drows, const Tensor& student, const Tensor& teacher,
    const Tensor& stats, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& label, int64_t vocab_size, double temperature, double scale,
    double beta, double hard_weight) {
  const Call call(student, teacher, mask, label, vocab_size, temperature, scale, beta, hard_weight);
  call.check_stats(stats);
  Tensor dstudent = torch::stable::new_empty(student, student.sizes());  // [N, C_s]
  call.run({}, {}, torch::stable::contiguous(stats), drows, dstudent);
  return dstudent;
}

Tensor soft_kl_fwd_bwd_(
    Tensor student, const Tensor& teacher, const Tensor& drows,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& label,
    int64_t vocab_size, double temperature, double scale, double beta, double hard_weight) {
  const Call call(student, teacher, mask, label, vocab_size, temperature, scale, beta, hard_weight);
  const Tensor& target = call.student;  // the student, or a copy with contiguous columns
  STD_TORCH_CHECK(target.size(0) <= 1 || target.stride(0) >= target.size(1),
                  "soft_kl: rows of a student that is overwritten must not overlap");
  Tensor rows = call.new_rows();
  call.run(rows, {}, {}, drows, target);
  call.write_back(student);
  return rows;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metakd, CUDA, m) {
  m.impl("soft_kl_fwd", TORCH_BOX(&soft_kl_fwd));
  m.impl("soft_kl_bwd", TORCH_BOX(&soft_kl_bwd));
  m.impl("soft_kl_fwd_bwd_", TORCH_BOX(&soft_kl_fwd_bwd_));
}
