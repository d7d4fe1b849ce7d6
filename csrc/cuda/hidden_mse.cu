// hidden_mse on CUDA devices: what metakd/ops.py declares, launched from the kernels of hidden_mse.cuh.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include <hidden_mse.cuh>

#include "launch.h"

namespace {

using namespace metakd;
using namespace metakd::hidden_mse;

constexpr const char* OP = "hidden_mse";

struct Call {
  Tensors student, teacher;  // n of [B, L, H], last stride 1
  const std::optional<Tensor>& mask;
  int64_t n, batch, length, chunks;
  ScalarType type;  // of rows

  Call(const Tensors& student_, const Tensors& teacher_, const std::optional<Tensor>& mask_) : mask(mask_) {
    STD_TORCH_CHECK(!student_.empty() && student_.size() == teacher_.size(), OP,
                    ": as many student as teacher layers expected, and at least one");
    const Tensor &own = student_[0], &taught = teacher_[0];
    STD_TORCH_CHECK(own.dim() == 3, OP, ": [B, L, H] expected");
    n = static_cast<int64_t>(student_.size());
    batch = own.size(0);
    length = own.size(1);
    chunks = chunks_of(length);
    for (int64_t i = 0; i < n; ++i) {
      STD_TORCH_CHECK(student_[i].sizes().equals(teacher_[i].sizes()), OP, ": shapes differ");
      STD_TORCH_CHECK(student_[i].dim() == 3 && student_[i].size(0) == batch && student_[i].size(1) == length, OP,
                      ": layers must agree in B and L");
      STD_TORCH_CHECK(student_[i].size(2) < (1 << 30), OP, ": too wide: ", student_[i].size(2));
      for (const Tensor* x : {&student_[i], &teacher_[i]})
        STD_TORCH_CHECK(x->device() == own.device(), OP, ": all tensors must be on one device");
      STD_TORCH_CHECK(student_[i].scalar_type() == own.scalar_type() && teacher_[i].scalar_type() == taught.scalar_type(),
                      OP, ": layers of a side must have one dtype");
      student.push_back(with_last_stride_1(student_[i]));
      teacher.push_back(with_last_stride_1(teacher_[i]));
    }
    STD_TORCH_CHECK(length <= std::numeric_limits<int>::max() - TOKENS, OP, ": too long: ", length);
    STD_TORCH_CHECK(batch * chunks * std::min<int64_t>(n, MOST_LAYERS) <= std::numeric_limits<int>::max(), OP,
                    ": too many tokens");
    type = accumulator(own, taught);
  }

  // Launches `kernel` for MOST_LAYERS layers at a time; `add(job, from)` adds what it reads or writes of
  // layers from `from` on.
  template <typename A, typename Add>
  void run(void (*kernel)(Job<A>), const std::vector<Gradient>& gradients, Add add) const {
    const launch::DeviceGuard on_device(student[0].get_device_index());
    const cudaStream_t stream = launch::current_stream(student[0]);
    for (int64_t from = 0; from < n; from += MOST_LAYERS) {
      const int64_t count = std::min<int64_t>(n - from, MOST_LAYERS);
      Job<A> job{};
      const auto tokens_of = [](const Tensor& x) {
        return Tokens{const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1)};
      };
      for (int64_t i = 0; i < count; ++i) {
        Layer& layer = job.layers[i];
        layer.student = tokens_of(student[from + i]);
        layer.teacher = tokens_of(teacher[from + i]);
        if (!gradients.empty()) layer.grad = tokens_of(gradients[from + i].to);
        layer.width = student[from + i].size(2);
      }
      job.mask = launch::mask_of(OP, mask, student[0], length, job.mask_stride_b, job.mask_stride_l);
      job.length = length;
      job.batch = static_cast<int>(batch);
      job.chunks = static_cast<int>(chunks);
      job.dtype_s = dtype_of<Dtype>(student[0]);
      job.dtype_t = dtype_of<Dtype>(teacher[0]);
      add(job, from);
      const int64_t blocks = count * batch * chunks;
      if (blocks == 0) continue;
      kernel<<<static_cast<unsigned>(blocks), THREADS, SHARED<A>, stream>>>(job);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
  }

  template <typename F>
  void with_type(F f) const {
    if (type == ScalarType::Double) f(double());
    else f(float());
  }
};

Tensor hidden_mse_fwd(const Tensors& student, const Tensors& teacher, const std::optional<Tensor>& mask) {
  const Call call(student, teacher, mask);
  Tensor rows = torch::stable::new_empty(student[0], {call.n, call.batch}, call.type);  // [n, B]
  Tensor parts, tickets;
  if (call.chunks > 1) {
    parts = torch::stable::new_empty(student[0], {2, call.n, call.batch, call.chunks}, call.type);
    tickets = torch::stable::new_zeros(student[0], {call.n, call.batch}, ScalarType::Int);
  }
  call.with_type([&](auto element) {
    using A = decltype(element);
    call.run<A>(&hidden_mse_forward<A>, {}, [&](Job<A>& job, int64_t from) {
      job.rows = rows.mutable_data_ptr<A>() + from * call.batch;
      if (call.chunks == 1) return;
      job.sums = parts.mutable_data_ptr<A>() + from * call.batch * call.chunks;
      job.counts = job.sums + call.n * call.batch * call.chunks;
      job.tickets = tickets.mutable_data_ptr<int>() + from * call.batch;
    });
  });
  return rows;
}

Tensors hidden_mse_bwd(const Tensor& drows, const Tensors& student, const Tensors& teacher,
                                       const std::optional<Tensor>& mask) {
  const Call call(student, teacher, mask);
  STD_TORCH_CHECK(drows.device() == student[0].device() && drows.dim() == 2 && drows.size(0) == call.n &&
                      drows.size(1) == call.batch && drows.scalar_type() == call.type,
                  OP, ": drows must be [n, B] in the dtype of the rows");
  std::vector<Gradient> gradients = gradients_of(student);
  if (call.length > 0)
    call.with_type([&](auto element) {
      using A = decltype(element);
      call.run<A>(&hidden_mse_backward<A>, gradients, [&](Job<A>& job, int64_t from) {
        job.drows = drows.const_data_ptr<A>() + from * drows.stride(0);
        job.drows_stride[0] = drows.stride(0);
        job.drows_stride[1] = drows.stride(1);
      });
    });
  Tensors found;
  append_finished(gradients, found);
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metakd, CUDA, m) {
  m.impl("hidden_mse_fwd", TORCH_BOX(&hidden_mse_fwd));
  m.impl("hidden_mse_bwd", TORCH_BOX(&hidden_mse_bwd));
}
