// soft_kl on the CPU: what metakd/ops.py declares, over the rows of soft_kl_rows.h.

#include "cpu.h"

#include <soft_kl_call.h>

namespace {

using namespace metakd::soft_kl;

enum class Op { forward, backward, both };
enum class Kind { forward, reverse, mixture };  // KL(p || q), KL(q || p), Jensen-Shannon

// Most classes for which lanes are rows.
constexpr int64_t NARROW = 24;

// What one call works on. Strides in elements; N = rows, V = classes, C_s = width.
struct Job {
  const void *student, *teacher;
  void *gradient, *values, *stats;
  const void* drows;
  const bool* mask;
  const int64_t* label;
  int64_t student_stride, teacher_stride, gradient_stride, drows_stride, mask_stride, label_stride;
  int64_t rows, classes, width;
  Type student_type, teacher_type;
  double temperature, scale, beta, hard_weight;

  bool is_masked(int64_t row) const { return mask && !mask[row * mask_stride]; }
};

// Rows [begin, end) of a job; scratch: two rows of the type that is computed in.
using Rows = void(const Job&, Op, int64_t begin, int64_t end, void* scratch);

#define METAKD_TEXT "soft_kl_rows.h"
#include "instruction_sets.h"

struct Call : Arguments {
  Job job{};
  Kind kind;

  template <class... Given>
  explicit Call(const Given&... given) : Arguments(given...) {
    job.rows = n();
    job.classes = vocab_size;
    job.width = student.size(1);
    job.student = student.const_data_ptr();
    job.teacher = teacher.const_data_ptr();
    job.student_stride = student.stride(0);
    job.teacher_stride = teacher.stride(0);
    job.student_type = type_of(student);
    job.teacher_type = type_of(teacher);
    if (mask) {
      job.mask = mask->const_data_ptr<bool>();
      job.mask_stride = mask->stride(0);
    }
    if (label) {
      job.label = label->const_data_ptr<int64_t>();
      job.label_stride = label->stride(0);
    }
    job.temperature = temperature;
    job.scale = scale;
    job.beta = beta;
    job.hard_weight = hard_weight;
    kind = beta == 0 ? Kind::forward : beta == 1 ? Kind::reverse : Kind::mixture;
  }

  void take_drows(const Tensor& drows) {
    check_drows(drows);
    job.drows = drows.const_data_ptr();
    job.drows_stride = drows.stride(0);
  }

  void run(Op op) const {
    // A thread is worth waking for this many pairs of logits (tens of microseconds, asleep or not).
    constexpr int64_t WORTH = 65536;
    Rows* rows = METAKD_BEST(find)(is_double, kind, job.label != nullptr);
    const int64_t grain = std::max<int64_t>(1, WORTH / job.classes);
    torch::stable::parallel_for(0, job.rows, grain, [&](int64_t begin, int64_t end) {
      std::unique_ptr<char[]> scratch;
      const bool converts = student.scalar_type() != type || teacher.scalar_type() != type;
      if (converts && job.classes > NARROW)
        scratch.reset(new char[2 * job.classes * (is_double ? sizeof(double) : sizeof(float))]);
      rows(job, op, begin, end, scratch.get());
    });
  }
};

std::tuple<Tensor, Tensor> soft_kl_fwd(
    const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& label, int64_t vocab_size, double temperature, double scale,
    double beta, double hard_weight) {
  Call call(student, teacher, mask, label, vocab_size, temperature, scale, beta, hard_weight);
  Tensor rows = call.new_rows(), stats = call.new_stats();
  call.job.values = rows.mutable_data_ptr();
  call.job.stats = stats.mutable_data_ptr();
  call.run(Op::forward);
  return {rows, stats};
}

Tensor soft_kl_bwd(
    const Tensor& drows, const Tensor& student, const Tensor& teacher,
    const Tensor& stats, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& label, int64_t vocab_size, double temperature, double scale,
    double beta, double hard_weight) {
  Call call(student, teacher, mask, label, vocab_size, temperature, scale, beta, hard_weight);
  call.check_stats(stats);
  const Tensor stats_rows = torch::stable::contiguous(stats);
  Tensor dstudent = torch::stable::new_empty(student, {call.job.rows, call.job.width});  // [N, C_s]
  prefer_huge_pages(dstudent);
  call.take_drows(drows);
  call.job.stats = const_cast<void*>(stats_rows.const_data_ptr());
  call.job.gradient = dstudent.mutable_data_ptr();
  call.job.gradient_stride = call.job.width;
  call.run(Op::backward);
  return dstudent;
}

Tensor soft_kl_fwd_bwd_(
    Tensor student, const Tensor& teacher, const Tensor& drows,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& label,
    int64_t vocab_size, double temperature, double scale, double beta, double hard_weight) {
  Call call(student, teacher, mask, label, vocab_size, temperature, scale, beta, hard_weight);
  Tensor rows = call.new_rows();
  call.take_drows(drows);
  call.job.values = rows.mutable_data_ptr();
  call.job.gradient = call.student.mutable_data_ptr();
  call.job.gradient_stride = call.job.student_stride;
  call.run(Op::both);
  call.write_back(student);
  return rows;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metakd, CPU, m) {
  m.impl("soft_kl_fwd", TORCH_BOX(&soft_kl_fwd));
  m.impl("soft_kl_bwd", TORCH_BOX(&soft_kl_bwd));
  m.impl("soft_kl_fwd_bwd_", TORCH_BOX(&soft_kl_fwd_bwd_));
}
