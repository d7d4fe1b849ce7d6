// attention_score_mse on CUDA devices: what metakd/ops.py declares, launched from the kernels of
// attention_score_mse.cuh.

#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include <attention_score_mse.cuh>

#include "launch.h"

namespace {

using namespace metakd;
using namespace metakd::attention_score_mse;

constexpr const char* OP = "attention_score_mse";

// The arguments that forward and backward share.
struct Call {
  std::vector<at::Tensor> of[2][2];  // [role][model]: n of [B, A, L, D], last stride 1
  const std::optional<at::Tensor>&query_mask, &key_mask;
  const std::optional<int64_t> before, after;
  double scale[2], guard;
  int64_t n, batch, heads, length;
  int64_t size[2];
  at::TensorOptions options;  // of results
  Dtype dtype[2];

  Call(at::TensorList query_s, at::TensorList key_s, at::TensorList query_t, at::TensorList key_t,
       const std::optional<at::Tensor>& query_mask_, const std::optional<at::Tensor>& key_mask_,
       std::optional<int64_t> before_, std::optional<int64_t> after_, double scale_s, double scale_t, double guard_)
      : query_mask(query_mask_), key_mask(key_mask_), before(before_), after(after_), scale{scale_s, scale_t},
        guard(guard_) {
    const at::TensorList lists[2][2] = {{query_s, query_t}, {key_s, key_t}};
    TORCH_CHECK(!query_s.empty(), OP, ": at least one layer expected");
    const at::Tensor& first = query_s[0];
    TORCH_CHECK(first.dim() == 4, OP, ": [B, A, L, D] expected, got ", first.sizes());
    n = static_cast<int64_t>(query_s.size());
    batch = first.size(0);
    heads = first.size(1);
    length = first.size(2);
    for (int role : {QUERY, KEY})
      for (int model : {STUDENT, TEACHER}) {
        const at::Tensor& like = lists[QUERY][model].front();
        TORCH_CHECK(static_cast<int64_t>(lists[role][model].size()) == n, OP, ": lists of one length expected");
        for (const at::Tensor& x : lists[role][model]) {
          TORCH_CHECK(x.device() == first.device(), OP, ": all tensors must be on ", first.device());
          TORCH_CHECK(x.sizes() == like.sizes() && x.scalar_type() == like.scalar_type(), OP,
                      ": tensors of a side must have one shape and dtype");
          of[role][model].push_back(with_last_stride_1(x));
        }
        size[model] = like.size(3);
        dtype[model] = dtype_of<Dtype>(like);
        TORCH_CHECK(like.size(0) == batch && like.size(1) == heads && like.size(2) == length, OP,
                    ": student and teacher must agree in B, A and L");
        TORCH_CHECK(1 <= size[model] && size[model] <= MOST_SIZE, OP, ": D must be 1 to ", MOST_SIZE, ", got ",
                    size[model]);
      }
    TORCH_CHECK(batch <= std::numeric_limits<int>::max() && heads <= std::numeric_limits<int>::max(), OP,
                ": too many heads");
    TORCH_CHECK(length <= std::numeric_limits<int>::max() - CHUNK_ROWS, OP, ": too long: ", length);
    TORCH_CHECK(before.value_or(0) >= 0 && after.value_or(0) >= 0, OP, ": before and after must be 0 or more");
    TORCH_CHECK((!before && !after) || !gram_form(), OP, ": before and after need guard = inf");
    TORCH_CHECK(scale[TEACHER] != 0, OP, ": scale_t must not be 0");
    const bool is_double = dtype[STUDENT] == Dtype::float64 || dtype[TEACHER] == Dtype::float64;
    options = first.options().dtype(is_double ? at::kDouble : at::kFloat);
  }

  const at::Tensor& first() const { return of[QUERY][STUDENT][0]; }
  bool gram_form() const { return guard < std::numeric_limits<double>::infinity(); }
  int64_t width() const { return gram_form() ? size[STUDENT] + size[TEACHER] : 0; }

  at::Tensor per_head(at::IntArrayRef more, at::ScalarType type) const {
    std::vector<int64_t> shape = {n, batch, heads};
    shape.insert(shape.end(), more.begin(), more.end());
    return first().new_empty(shape, options.dtype(type));
  }

  void check_result(const at::Tensor& x, at::IntArrayRef more, at::ScalarType type) const {
    std::vector<int64_t> shape = {n, batch, heads};
    shape.insert(shape.end(), more.begin(), more.end());
    TORCH_CHECK(x.device() == first().device() && x.sizes() == at::IntArrayRef(shape) && x.scalar_type() == type,
                OP, ": ", type, " ", at::IntArrayRef(shape), " on ", first().device(), " expected, got ",
                x.scalar_type(), " ", x.sizes(), " on ", x.device());
  }

  // Layers [from, from + count) of what is given; undefined tensors stay null.
  template <typename A>
  Job<A> job(int64_t from, int64_t count, const at::Tensor& heads_out, const at::Tensor& gram,
             const at::Tensor& tiled, const at::Tensor& norm_t, const at::Tensor& dheads,
             const std::vector<launch::Gradient>& gradients) const {
    Job<A> job{};
    const auto heads_of = [](const at::Tensor& x) {
      return Heads{const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
    };
    for (int64_t i = 0; i < count; ++i)
      for (int role : {QUERY, KEY}) {
        for (int model : {STUDENT, TEACHER}) job.layers[i].of[role][model] = heads_of(of[role][model][from + i]);
        if (!gradients.empty()) job.layers[i].grad[role] = heads_of(gradients[role * n + from + i].to);
      }
    const std::optional<at::Tensor>* const masks[2] = {&query_mask, &key_mask};
    for (int role : {QUERY, KEY})
      job.mask[role] = launch::mask_of(OP, *masks[role], first(), length, job.mask_stride_b[role],
                                       job.mask_stride_l[role]);
    const int64_t skipped = from * batch * heads;
    if (heads_out.defined()) job.heads = heads_out.mutable_data_ptr<A>() + skipped;
    job.gram = const_cast<A*>(gram.const_data_ptr<A>()) + skipped * 2 * width() * size[STUDENT];
    job.tiled = const_cast<bool*>(tiled.const_data_ptr<bool>()) + skipped;
    if (norm_t.defined()) job.norm_t = norm_t.const_data_ptr<A>() + skipped;
    if (dheads.defined()) {
      job.dheads = dheads.const_data_ptr<A>() + from * dheads.stride(0);
      for (int i : {0, 1, 2}) job.dheads_stride[i] = dheads.stride(i);
    }
    job.length = length;
    job.batch = static_cast<int>(batch);
    job.heads_count = static_cast<int>(heads);
    for (int model : {STUDENT, TEACHER}) {
      job.size[model] = static_cast<int>(size[model]);
      job.dtype[model] = dtype[model];
      job.scale[model] = static_cast<A>(scale[model]);
    }
    job.guard = static_cast<A>(guard);
    job.reach[QUERY] = static_cast<int>(std::min(before.value_or(length), length));
    job.reach[KEY] = static_cast<int>(std::min(after.value_or(length), length));
    job.gram_form = gram_form();
    return job;
  }

  // Calls `f(element of shared memory)`; halves of one kind go to tensor cores.
  template <typename F>
  void with_type(F f) const {
    if (options.dtype() == at::kDouble) f(double());
    else if (dtype[STUDENT] != dtype[TEACHER] || dtype[STUDENT] == Dtype::float32) f(float());
    else if (dtype[STUDENT] == Dtype::bfloat16) f(__nv_bfloat16());
    else f(__half());
  }

  // Launches `kernel` for MOST_LAYERS layers at a time. `job_of(from, count)` is what it works on,
  // `plan_of(job, shared memory)` how, `blocks_of(job, heads)` and `warps_of(job)` on what.
  template <typename Kernel, typename JobOf, typename PlanOf, typename BlocksOf, typename WarpsOf>
  void run(Kernel* kernel, JobOf job_of, PlanOf plan_of, BlocksOf blocks_of, WarpsOf warps_of) const {
    const c10::cuda::CUDAGuard on_device(first().device());
    const int device = first().device().index();
    TORCH_CHECK(launch::attribute(cudaDevAttrComputeCapabilityMajor, device) >= 8, OP,
                ": a GPU of compute capability 8.0 or higher is needed");
    const int limit = launch::attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    launch::allow_shared(kernel, device);
    const cudaStream_t stream = c10::cuda::getCurrentCUDAStream().stream();
    for (int64_t from = 0; from < n; from += MOST_LAYERS) {
      const int64_t count = std::min<int64_t>(n - from, MOST_LAYERS);
      auto job = job_of(from, count);
      job.plan = plan_of(job, limit);
      TORCH_CHECK(job.plan.bytes > 0, OP, ": heads of ", size[STUDENT], " and ", size[TEACHER],
                  " elements do not fit the shared memory of this GPU");
      const int64_t blocks = blocks_of(job, count * batch * heads);
      TORCH_CHECK(blocks <= std::numeric_limits<int>::max(), OP, ": too many heads");
      if (blocks == 0) continue;
      kernel<<<static_cast<unsigned>(blocks), 32 * warps_of(job), job.plan.bytes, stream>>>(job);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_score_mse_fwd(
    at::TensorList query_s, at::TensorList key_s, at::TensorList query_t, at::TensorList key_t,
    const std::optional<at::Tensor>& query_mask, const std::optional<at::Tensor>& key_mask,
    std::optional<int64_t> before, std::optional<int64_t> after, double scale_s, double scale_t,
    const std::optional<at::Tensor>& norm_t, double guard) {
  const Call call(query_s, key_s, query_t, key_t, query_mask, key_mask, before, after, scale_s, scale_t, guard);
  const at::ScalarType type = call.options.dtype().toScalarType();
  at::Tensor norm;
  if (norm_t) {
    call.check_result(*norm_t, {}, type);
    norm = norm_t->contiguous();
  }
  at::Tensor heads = call.per_head({}, type);                                    // [n, B, A]
  at::Tensor gram = call.per_head({2, call.width(), call.size[STUDENT]}, type);  // [n, B, A, 2, W, D_s]
  at::Tensor tiled = call.per_head({}, at::kBool);                               // [n, B, A]
  at::Tensor sums, tickets;
  call.with_type([&](auto element) {
    using C = decltype(element);
    using A = Sum<C>;
    call.run(
        &attention_score_mse_forward<C, A>,
        [&](int64_t from, int64_t count) {
          Job<A> job = call.job<A>(from, count, heads, gram, tiled, norm, {}, {});
          if (job.forward_chunks() > 1) {
            sums = call.per_head({job.forward_chunks()}, type);
            tickets = call.per_head({}, at::kInt).zero_();
            job.sums = sums.mutable_data_ptr<A>();
            job.tickets = tickets.mutable_data_ptr<int>();
          }
          return job;
        },
        &forward_plan<C, A>,
        [](const Job<A>& job, int64_t heads_count) { return heads_count * job.forward_chunks(); },
        &forward_warps<A>);
  });
  return {heads, gram, tiled};
}

std::vector<at::Tensor> attention_score_mse_bwd(
    const at::Tensor& dheads, at::TensorList query_s, at::TensorList key_s, at::TensorList query_t,
    at::TensorList key_t, const std::optional<at::Tensor>& query_mask, const std::optional<at::Tensor>& key_mask,
    std::optional<int64_t> before, std::optional<int64_t> after, double scale_s, double scale_t,
    const at::Tensor& gram, const at::Tensor& tiled, double guard) {
  const Call call(query_s, key_s, query_t, key_t, query_mask, key_mask, before, after, scale_s, scale_t, guard);
  const at::ScalarType type = call.options.dtype().toScalarType();
  call.check_result(dheads, {}, type);
  call.check_result(gram, {2, call.width(), call.size[STUDENT]}, type);
  call.check_result(tiled, {}, at::kBool);
  const at::Tensor grams = gram.contiguous(), flags = tiled.contiguous();
  std::vector<launch::Gradient> gradients;  // d query_s, d key_s
  for (const at::TensorList& inputs : {query_s, key_s})
    for (const at::Tensor& x : inputs) gradients.emplace_back(x);
  call.with_type([&](auto element) {
    using C = decltype(element);
    using A = Sum<C>;
    call.run(
        &attention_score_mse_backward<C, A>,
        [&](int64_t from, int64_t count) {
          return call.job<A>(from, count, {}, grams, flags, {}, dheads, gradients);
        },
        &backward_plan<C, A>,
        [](const Job<A>& job, int64_t heads) { return heads * 2 * job.chunks(); }, &backward_warps<A>);
  });
  std::vector<at::Tensor> found;
  for (const launch::Gradient& gradient : gradients) found.push_back(gradient.finished());
  return found;
}

}  // namespace

TORCH_LIBRARY_IMPL(metakd, CUDA, m) {
  m.impl("attention_score_mse_fwd", &attention_score_mse_fwd);
  m.impl("attention_score_mse_bwd", &attention_score_mse_bwd);
}
