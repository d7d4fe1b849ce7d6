// The kernels of hidden_mse.cuh on the emulated device, as a library with one C function. What a launch
// needs is worked out as in csrc/cuda/hidden_mse.cu.

#include <cstdint>
#include <cstring>
#include <vector>

#include <hidden_mse.cuh>

#include <emulated.h>

namespace {

using namespace metakd;
using namespace metakd::hidden_mse;

}  // namespace

// Field by field the class HiddenCall of test_cuda_features_emulated.py.
struct Call {
  int64_t layers[MOST_LAYERS][10];  // struct Layer
  const bool* mask;
  int64_t mask_stride_b, mask_stride_l;
  void* rows;
  const void* drows;
  int64_t drows_stride[2];
  int64_t n, batch, length;
  int64_t dtype[2];
  int64_t backward;
  emulator::Run run;
};

namespace {

template <typename A>
void launch(const Call& call) {
  Job<A> job{};
  static_assert(sizeof(job.layers) == sizeof(call.layers));
  std::memcpy(job.layers, call.layers, sizeof(call.layers));
  job.mask = call.mask;
  job.mask_stride_b = call.mask_stride_b;
  job.mask_stride_l = call.mask_stride_l;
  job.rows = static_cast<A*>(call.rows);
  job.drows = static_cast<const A*>(call.drows);
  for (int i : {0, 1}) job.drows_stride[i] = call.drows_stride[i];
  job.length = call.length;
  job.batch = static_cast<int>(call.batch);
  job.chunks = chunks_of(call.length);
  job.dtype_s = static_cast<Dtype>(call.dtype[0]);
  job.dtype_t = static_cast<Dtype>(call.dtype[1]);
  const int pairs = static_cast<int>(call.n * call.batch), blocks = pairs * job.chunks;
  std::vector<A> parts(2 * blocks);
  std::vector<int> tickets(pairs);
  job.sums = parts.data();
  job.counts = parts.data() + blocks;
  job.tickets = tickets.data();
  emulator::launch(blocks, 1, THREADS, SHARED<A>, [=] {
    if (call.backward) hidden_mse_backward<A>(job);
    else hidden_mse_forward<A>(job);
  });
}

}  // namespace

// What went wrong on the device, or null.
extern "C" const char* hidden_mse_emulated(Call* call) {
  return emulator::run(call->run, [&] {
    const bool is_double = call->dtype[0] == static_cast<int64_t>(Dtype::float64) ||
        call->dtype[1] == static_cast<int64_t>(Dtype::float64);
    if (is_double) launch<double>(*call);
    else launch<float>(*call);
  });
}
