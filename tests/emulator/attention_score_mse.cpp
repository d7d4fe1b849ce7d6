// The kernels of attention_score_mse.cuh on the emulated device, as a library with one C function. What a
// launch needs is worked out as in csrc/cuda/attention_score_mse.cu.

#include <cstdint>
#include <cstring>
#include <vector>

#include <attention_score_mse.cuh>

#include <emulated.h>

namespace {

using namespace metakd;
using namespace metakd::attention_score_mse;

}  // namespace

// Field by field the class ScoreCall of test_cuda_features_emulated.py.
struct Call {
  int64_t layers[MOST_LAYERS][6][4];  // struct Layer
  const bool* mask[2];
  int64_t mask_stride_b[2], mask_stride_l[2];
  void *heads, *gram;
  bool* tiled;
  const void *norm_t, *dheads;
  int64_t dheads_stride[3];
  int64_t n, batch, heads_count, length;
  int64_t size[2], dtype[2];
  double scale[2], guard;
  int64_t reach[2], gram_form, backward;
  int64_t limit;  // of shared memory; afterwards what was planned:
  int64_t rows, stages, panel;
  emulator::Run run;
};

namespace {

template <typename C>
void launch(Call& call) {
  using A = Sum<C>;
  Job<A> job{};
  static_assert(sizeof(job.layers) == sizeof(call.layers));
  std::memcpy(job.layers, call.layers, sizeof(call.layers));
  for (int i : {0, 1}) {
    job.mask[i] = call.mask[i];
    job.mask_stride_b[i] = call.mask_stride_b[i];
    job.mask_stride_l[i] = call.mask_stride_l[i];
    job.size[i] = static_cast<int>(call.size[i]);
    job.dtype[i] = static_cast<Dtype>(call.dtype[i]);
    job.scale[i] = static_cast<A>(call.scale[i]);
    job.reach[i] = static_cast<int>(call.reach[i]);
  }
  job.heads = static_cast<A*>(call.heads);
  job.gram = static_cast<A*>(call.gram);
  job.tiled = call.tiled;
  job.norm_t = static_cast<const A*>(call.norm_t);
  job.dheads = static_cast<const A*>(call.dheads);
  for (int i : {0, 1, 2}) job.dheads_stride[i] = call.dheads_stride[i];
  job.batch = static_cast<int>(call.batch);
  job.heads_count = static_cast<int>(call.heads_count);
  job.length = call.length;
  job.guard = static_cast<A>(call.guard);
  job.gram_form = call.gram_form;
  const int limit = static_cast<int>(call.limit);
  job.plan = call.backward ? backward_plan<C>(job, limit) : forward_plan<C>(job, limit);
  call.rows = job.plan.rows;
  call.stages = job.plan.stages;
  call.panel = job.plan.panel;
  if (job.plan.bytes == 0) return emulator::fail("too little shared memory");
  const int heads = static_cast<int>(call.n * call.batch * call.heads_count);
  if (call.backward) {
    emulator::launch(heads * 2 * job.chunks(), 1, 32 * backward_warps(job), job.plan.bytes,
                     [=] { attention_score_mse_backward<C, A>(job); });
  } else {
    std::vector<A> sums(heads * job.forward_chunks());
    std::vector<int> tickets(heads);
    job.sums = sums.data();
    job.tickets = tickets.data();
    emulator::launch(heads * job.forward_chunks(), 1, 32 * forward_warps(job), job.plan.bytes,
                     [=] { attention_score_mse_forward<C, A>(job); });
  }
}

}  // namespace

// What went wrong on the device, or null.
extern "C" const char* attention_score_mse_emulated(Call* call) {
  return emulator::run(call->run, [&] {
    const auto s = static_cast<Dtype>(call->dtype[0]), t = static_cast<Dtype>(call->dtype[1]);
    if (s == Dtype::float64 || t == Dtype::float64) launch<double>(*call);
    else if (s != t || s == Dtype::float32) launch<float>(*call);
    else if (s == Dtype::bfloat16) launch<__nv_bfloat16>(*call);
    else launch<__half>(*call);
  });
}
