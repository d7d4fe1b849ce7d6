// The kernels of soft_kl.cuh on the emulated device, as a library with one C function. What a launch
// needs is worked out as in csrc/cuda/soft_kl.cu, but the caller chooses the kernel.

#include <cmath>
#include <cstdint>
#include <string>
#include <type_traits>

#include <soft_kl.cuh>

namespace {

using namespace metakd;
using namespace metakd::soft_kl;

enum class Kernel : int { narrow, plain, one_read };

}  // namespace

// Field by field the class Call of test_cuda_emulated.py. What may be null in a Job may be null here.
struct Call {
  const void *student, *teacher;
  void *dstudent, *rows, *stats;
  const void *given, *drows;
  const bool* mask;
  const int64_t* label;
  int64_t stride_s, stride_t, stride_d, drows_stride, mask_stride, label_stride, n;
  double temperature, scale, beta, hard_weight;
  int vocab, width;
  Dtype dtype_s, dtype_t;
  Kernel kernel;
  // Of one_read. Without ranks, what plan_for chooses; what was taken stands here afterwards.
  int ranks, stages, lag;
  int clusters;
  emulator::Broken broken;
  uint64_t seed;
};

namespace {

template <typename A>
Job<A> job_of(const Call& call) {
  Job<A> job{};
  job.student = call.student;
  job.teacher = call.teacher;
  job.dstudent = call.dstudent;
  job.rows = static_cast<A*>(call.rows);
  job.stats = static_cast<A*>(call.stats);
  job.given = static_cast<const A*>(call.given);
  job.drows = static_cast<const A*>(call.drows);
  job.mask = call.mask;
  job.label = call.label;
  job.stride_s = call.stride_s;
  job.stride_t = call.stride_t;
  job.stride_d = call.stride_d;
  job.drows_stride = call.drows_stride;
  job.mask_stride = call.mask_stride;
  job.label_stride = call.label_stride;
  job.n = call.n;
  job.vocab = call.vocab;
  job.width = call.width;
  job.dtype_s = call.dtype_s;
  job.dtype_t = call.dtype_t;
  job.rate = static_cast<A>(M_LOG2E / call.temperature);
  job.inverse_temperature = static_cast<A>(1.0 / call.temperature);
  job.scale = static_cast<A>(call.scale);
  job.beta = static_cast<A>(call.beta);
  job.hard_weight = static_cast<A>(call.hard_weight);
  job.sum_1 = call.label && call.temperature != 1.0;
  return job;
}

template <Kind KIND>
Plan plan_of(const Call& call) {
  const int size = bytes_of(call.dtype_s);
  if (call.ranks == 0) return plan_for<KIND>(call.vocab, size, emulator::SHARED_LIMIT);
  Plan plan;
  plan.ranks = call.ranks;
  plan.stages = call.stages;
  plan.lag = call.lag;
  plan.span = rounded((call.vocab + plan.ranks - 1) / plan.ranks, 8);
  plan.buffer = rounded((plan.span + 8) * size, 128);
  plan.bytes = SHARED_HEAD<KIND> + plan.stages * 2 * plan.buffer;
  return plan;
}

template <Kind KIND>
void launch_narrow(const Job<float>& job) {
  int lanes = 1;
  while (lanes < 32 && lanes < job.vocab) lanes *= 2;
  const int rows = NARROW_THREADS / lanes, blocks = static_cast<int>((job.n + rows - 1) / rows);
  const auto launch = [&](auto kernel) {
    emulator::launch(blocks, 1, NARROW_THREADS, 0, [=] { kernel(job, lanes); });
  };
  if (job.vocab <= lanes) launch(soft_kl_narrow<1, KIND>);
  else if (job.vocab <= 8 * lanes) launch(soft_kl_narrow<8, KIND>);
  else launch(soft_kl_narrow<32, KIND>);
}

template <typename T, typename A, Kind KIND>
void launch_plain(const Job<A>& job) {
  constexpr size_t BYTES = sizeof(PlainShared<A, KIND>);
  emulator::launch(static_cast<int>(job.n), 1, PLAIN_THREADS, BYTES, [=] { soft_kl_plain<T, A, KIND>(job); });
}

template <typename T, Kind KIND>
void launch_one_read(const Job<float>& job, Call& call) {
  const Plan plan = plan_of<KIND>(call);
  call.ranks = plan.ranks;
  call.stages = plan.stages;
  call.lag = plan.lag;
  if (plan.ranks == 0) return emulator::fail("the plain kernel is planned for this row");
  const int blocks = call.clusters * plan.ranks;
  emulator::launch(blocks, plan.ranks, THREADS, plan.bytes, [=] { soft_kl_one_read<T, KIND>(job, plan); });
}

template <typename T, Kind KIND>
void launch_typed(const Job<float>& job, Call& call) {
  if (call.kernel == Kernel::plain) launch_plain<T, float, KIND>(job);
  else launch_one_read<T, KIND>(job, call);
}

template <Kind KIND>
void launch(Call& call) {
  if (call.dtype_s == Dtype::float64 || call.dtype_t == Dtype::float64)
    return launch_plain<Any, double, KIND>(job_of<double>(call));
  const Job<float> job = job_of<float>(call);
  if (call.kernel == Kernel::narrow) return launch_narrow<KIND>(job);
  if (call.dtype_s != call.dtype_t) return launch_plain<Any, float, KIND>(job);
  switch (call.dtype_s) {
    case Dtype::float32: return launch_typed<float, KIND>(job, call);
    case Dtype::bfloat16: return launch_typed<__nv_bfloat16, KIND>(job, call);
    default: return launch_typed<__half, KIND>(job, call);
  }
}

}  // namespace

// What went wrong on the device, or null.
extern "C" const char* soft_kl_emulated(Call* call) {
  emulator::Device& device = emulator::device;
  device.error.clear();
  device.running = nullptr;
  device.broken = call->broken;
  device.seed = call->seed;
  device.state = call->seed * 0x9e3779b97f4a7c15u + 88172645463325252u;
  if (call->beta == 0) launch<Kind::forward>(*call);
  else if (call->beta == 1) launch<Kind::reverse>(*call);
  else launch<Kind::mixture>(*call);
  return device.error.empty() ? nullptr : device.error.c_str();
}
