// attention_score_mse on CUDA devices: what metakd/ops.py declares, launched from the kernels of
// attention_score_mse.cuh.

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
  Tensors of[2][2];  // [role][model]: n of [B, A, L, D], last stride 1
  const std::optional<Tensor>&query_mask, &key_mask;
  const std::optional<int64_t> before, after;
  double scale[2], guard;
  int64_t n, batch, heads, length;
  int64_t size[2];
  ScalarType type;  // of results
  Dtype dtype[2];

  Call(const Tensors& query_s, const Tensors& key_s, const Tensors& query_t, const Tensors& key_t,
       const std::optional<Tensor>& query_mask_, const std::optional<Tensor>& key_mask_,
       std::optional<int64_t> before_, std::optional<int64_t> after_, double scale_s, double scale_t, double guard_)
      : query_mask(query_mask_), key_mask(key_mask_), before(before_), after(after_), scale{scale_s, scale_t},
        guard(guard_) {
    const Tensors* const lists[2][2] = {{&query_s, &query_t}, {&key_s, &key_t}};
    STD_TORCH_CHECK(!query_s.empty(), OP, ": at least one layer expected");
    const Tensor& first = query_s[0];
    STD_TORCH_CHECK(first.dim() == 4, OP, ": [B, A, L, D] expected");
    n = static_cast<int64_t>(query_s.size());
    batch = first.size(0);
    heads = first.size(1);
    length = first.size(2);
    for (int role : {QUERY, KEY})
      for (int model : {STUDENT, TEACHER}) {
        const Tensor& like = lists[QUERY][model]->front();
        STD_TORCH_CHECK(static_cast<int64_t>(lists[role][model]->size()) == n, OP, ": lists of one length expected");
        for (const Tensor& x : *lists[role][model]) {
          STD_TORCH_CHECK(x.device() == first.device(), OP, ": all tensors must be on one device");
          STD_TORCH_CHECK(x.sizes().equals(like.sizes()) && x.scalar_type() == like.scalar_type(), OP,
                          ": tensors of a side must have one shape and dtype");
          of[role][model].push_back(with_last_stride_1(x));
        }
        size[model] = like.size(3);
        dtype[model] = dtype_of<Dtype>(like);
        STD_TORCH_CHECK(like.size(0) == batch && like.size(1) == heads && like.size(2) == length, OP,
                        ": student and teacher must agree in B, A and L");
        STD_TORCH_CHECK(1 <= size[model] && size[model] <= MOST_SIZE, OP, ": D must be 1 to ", MOST_SIZE, ", got ",
                        size[model]);
      }
    STD_TORCH_CHECK(batch <= std::numeric_limits<int>::max() && heads <= std::numeric_limits<int>::max(), OP,
                    ": too many heads");
    STD_TORCH_CHECK(length <= std::numeric_limits<int>::max() - CHUNK_ROWS, OP, ": too long: ", length);
    STD_TORCH_CHECK(before.value_or(0) >= 0 && after.value_or(0) >= 0, OP, ": before and after must be 0 or more");
    STD_TORCH_CHECK((!before && !after) || !gram_form(), OP, ": before and after need guard = inf");
    STD_TORCH_CHECK(scale[TEACHER] != 0, OP, ": scale_t must not be 0");
    const bool is_double = dtype[STUDENT] == Dtype::float64 || dtype[TEACHER] == Dtype::float64;
    type = is_double ? ScalarType::Double : ScalarType::Float;
  }

  const Tensor& first() const { return of[QUERY][STUDENT][0]; }
  bool gram_form() const { return guard < std::numeric_limits<double>::infinity(); }
  int64_t width() const { return gram_form() ? size[STUDENT] + size[TEACHER] : 0; }

  Tensor per_head(Shape more, ScalarType of_type) const {
    std::vector<int64_t> shape = {n, batch, heads};
    shape.insert(shape.end(), more.begin(), more.end());
    return torch::stable::new_empty(first(), shape, of_type);
  }

  void check_result(const Tensor& x, Shape more, ScalarType of_type) const {
    std::vector<int64_t> shape = {n, batch, heads};
    shape.insert(shape.end(), more.begin(), more.end());
    STD_TORCH_CHECK(x.device() == first().device() && x.sizes().equals(Shape(shape)) && x.scalar_type() == of_type, OP,
                    ": a result has another shape, dtype or device than the forward left");
  }

  // Layers [from, from + count) of what is given; undefined tensors stay null.
  template <typename A>
  Job<A> job(int64_t from, int64_t count, const Tensor& heads_out, const Tensor& gram,
             const Tensor& tiled, const Tensor& norm_t, const Tensor& dheads,
             const std::vector<Gradient>& gradients) const {
    Job<A> job{};
    const auto heads_of = [](const Tensor& x) {
      return Heads{const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
    };
    for (int64_t i = 0; i < count; ++i)
      for (int role : {QUERY, KEY}) {
        for (int model : {STUDENT, TEACHER}) job.layers[i].of[role][model] = heads_of(of[role][model][from + i]);
        if (!gradients.empty()) job.layers[i].grad[role] = heads_of(gradients[role * n + from + i].to);
      }
    const std::optional<Tensor>* const masks[2] = {&query_mask, &key_mask};
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
    if (type == ScalarType::Double) f(double());
    else if (dtype[STUDENT] != dtype[TEACHER] || dtype[STUDENT] == Dtype::float32) f(float());
    else if (dtype[STUDENT] == Dtype::bfloat16) f(__nv_bfloat16());
    else f(__half());
  }

  // Launches `kernel` for MOST_LAYERS layers at a time. `job_of(from, count)` is what it works on,
  // `plan_of(job, shared memory)` how, `blocks_of(job, heads)` and `warps_of(job)` on what.
  template <typename Kernel, typename JobOf, typename PlanOf, typename BlocksOf, typename WarpsOf>
  void run(Kernel* kernel, JobOf job_of, PlanOf plan_of, BlocksOf blocks_of, WarpsOf warps_of) const {
    const launch::DeviceGuard on_device(first().get_device_index());
    const int device = first().get_device_index();
    STD_TORCH_CHECK(launch::attribute(cudaDevAttrComputeCapabilityMajor, device) >= 8, OP,
                    ": a GPU of compute capability 8.0 or higher is needed");
    const int limit = launch::attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    launch::allow_shared(kernel, device);
    const cudaStream_t stream = launch::current_stream(first());
    for (int64_t from = 0; from < n; from += MOST_LAYERS) {
      const int64_t count = std::min<int64_t>(n - from, MOST_LAYERS);
      auto job = job_of(from, count);
      job.plan = plan_of(job, limit);
      STD_TORCH_CHECK(job.plan.bytes > 0, OP, ": heads of ", size[STUDENT], " and ", size[TEACHER],
                      " elements do not fit the shared memory of this GPU");
      const int64_t blocks = blocks_of(job, count * batch * heads);
      STD_TORCH_CHECK(blocks <= std::numeric_limits<int>::max(), OP, ": too many heads");
      if (blocks == 0) continue;
      kernel<<<static_cast<unsigned>(blocks), 32 * warps_of(job), job.plan.bytes, stream>>>(job);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
  }
};

std::tuple<Tensor, Tensor, Tensor> attention_score_mse_fwd(
    const Tensors& query_s, const Tensors& key_s, const Tensors& query_t, const Tensors& key_t,
    const std::optional<Tensor>& query_mask, const std::optional<Tensor>& key_mask,
    std::optional<int64_t> before, std::optional<int64_t> after, double scale_s, double scale_t,
    const std::optional<Tensor>& norm_t, double guard) {
  const Call call(query_s, key_s, query_t, key_t, query_mask, key_mask, before, after, scale_s, scale_t, guard);
  const ScalarType type = call.type;
  Tensor norm;
  if (norm_t) {
    call.check_result(*norm_t, {}, type);
    norm = torch::stable::contiguous(*norm_t);
  }
  Tensor heads = call.per_head({}, type);                                    // [n, B, A]
  Tensor gram = call.per_head({2, call.width(), call.size[STUDENT]}, type);  // [n, B, A, 2, W, D_s]
  Tensor tiled = call.per_head({}, ScalarType::Bool);                               // [n, B, A]
  Tensor sums, tickets;
  call.with_type([&](auto element) {
    using C = decltype(element);
    using A = Sum<C>;
    call.run(
        &attention_score_mse_forward<C, A>,
        [&](int64_t from, int64_t count) {
          Job<A> job = call.job<A>(from, count, heads, gram, tiled, norm, {}, {});
          if (job.forward_chunks() > 1) {
            sums = call.per_head({job.forward_chunks()}, type);
            tickets = call.per_head({}, ScalarType::Int);
            torch::stable::zero_(tickets);
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

Tensors attention_score_mse_bwd(
    const Tensor& dheads, const Tensors& query_s, const Tensors& key_s, const Tensors& query_t,
    const Tensors& key_t, const std::optional<Tensor>& query_mask, const std::optional<Tensor>& key_mask,
    std::optional<int64_t> before, std::optional<int64_t> after, double scale_s, double scale_t,
    const Tensor& gram, const Tensor& tiled, double guard) {
  const Call call(query_s, key_s, query_t, key_t, query_mask, key_mask, before, after, scale_s, scale_t, guard);
  const ScalarType type = call.type;
  call.check_result(dheads, {}, type);
  call.check_result(gram, {2, call.width(), call.size[STUDENT]}, type);
  call.check_result(tiled, {}, ScalarType::Bool);
  const Tensor grams = torch::stable::contiguous(gram), flags = torch::stable::contiguous(tiled);
  std::vector<Gradient> gradients = gradients_of(query_s);  // d query_s, d key_s
  for (const Tensor& x : key_s) gradients.emplace_back(x);
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
  Tensors found;
  append_finished(gradients, found);
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metakd, CUDA, m) {
  m.impl("attention_score_mse_fwd", TORCH_BOX(&attention_score_mse_fwd));
  m.impl("attention_score_mse_bwd", TORCH_BOX(&attention_score_mse_bwd));
}
