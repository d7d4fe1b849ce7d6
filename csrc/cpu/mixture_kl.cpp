// mixture_kl on the CPU: what metakd/ops.py declares, over the rows of mixture_kl_rows.h.

#include "cpu.h"

namespace {

// Most classes for which lanes are rows.
constexpr int64_t NARROW = 24;

// Statistics of a row: two of the student, then three of each teacher; MIXTURE_STATS of metakd/ops.py.
enum Stat : int64_t { MAX, LSUM, OF_STUDENT, INNER = OF_STUDENT, OF_TEACHER };

// What one call works on. Strides in elements; N = rows, M = teachers, C = classes.
struct Job {
  const void *student, *teacher;  // [N, C], [N, M, C], with contiguous columns
  const void *shares, *drows;     // [N, M], [N], contiguous, of the type that is computed in, as are:
  void *values, *stats, *dshares;
  void* dstudent;
  const bool* mask;
  int64_t student_stride, teacher_stride, teacher_step, mask_stride;
  int64_t rows, teachers, classes;
  Type student_type, teacher_type;
  double temperature, scale;

  bool is_masked(int64_t row) const { return mask && !mask[row * mask_stride]; }
};

// Rows [begin, end) of a job; returns the bytes of scratch that it needs, and with null does no more.
using Rows = int64_t(const Job&, int64_t begin, int64_t end, void* scratch);

struct Forms {
  Rows *forward, *backward;
};

#define METAKD_TEXT "mixture_kl_rows.h"
#include "instruction_sets.h"

struct Call {
  Tensor student, teacher, shares;
  std::optional<Tensor> mask;
  ScalarType type;  // of rows and statistics
  Job job{};
  Forms by;

  Call(const Tensor& student_, const Tensor& teacher_, const Tensor& shares_,
       const std::optional<Tensor>& mask_, double temperature, double scale)
      : student(with_last_stride_1(student_)),
        teacher(with_last_stride_1(teacher_)),
        mask(mask_),
        type(accumulator(student_, teacher_, shares_)) {
    STD_TORCH_CHECK(student.dim() == 2 && teacher.dim() == 3 && shares_.dim() == 2,
                    "mixture_kl: student [N, C], teacher [N, M, C] and shares [N, M] expected");
    job.rows = student.size(0);
    job.teachers = teacher.size(1);
    job.classes = student.size(1);
    STD_TORCH_CHECK(teacher.size(0) == job.rows && teacher.size(2) == job.classes && job.classes > 0 &&
                        shares_.size(0) == job.rows && shares_.size(1) == job.teachers,
                    "mixture_kl: sizes differ");
    shares = metakd::contiguous_as(type, shares_);
    if (mask) {
      STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->dim() == 1 && mask->numel() == job.rows,
                      "mixture_kl: bool mask [N] expected");
      job.mask = mask->const_data_ptr<bool>();
      job.mask_stride = mask->stride(0);
    }
    job.student = student.const_data_ptr();
    job.teacher = teacher.const_data_ptr();
    job.shares = shares.const_data_ptr();
    job.student_stride = student.stride(0);
    job.teacher_stride = teacher.stride(0);
    job.teacher_step = teacher.stride(1);
    job.student_type = type_of(student);
    job.teacher_type = type_of(teacher);
    job.temperature = temperature;
    job.scale = scale;
    by = METAKD_BEST(forms)(type == ScalarType::Double);
  }

  int64_t stats() const { return OF_STUDENT + OF_TEACHER * job.teachers; }

  void run(Rows* rows) const {
    // A thread is worth waking for this many logits (tens of microseconds, asleep or not).
    constexpr int64_t LEAST = 32768;
    const int64_t grain = std::max<int64_t>(1, LEAST / (job.classes * (1 + job.teachers)));
    torch::stable::parallel_for(0, job.rows, grain, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      scratch.lend([&](void* memory) { return rows(job, begin, end, memory); });
    });
  }
};

std::tuple<Tensor, Tensor> mixture_kl_fwd(
    const Tensor& student, const Tensor& teacher, const Tensor& shares,
    const std::optional<Tensor>& mask, double temperature, double scale) {
  Call call(student, teacher, shares, mask, temperature, scale);
  Tensor rows = torch::stable::new_empty(student, {call.job.rows}, call.type);  // [N]
  Tensor stats = torch::stable::new_empty(student, {call.stats(), call.job.rows}, call.type);
  call.job.values = rows.mutable_data_ptr();
  call.job.stats = stats.mutable_data_ptr();
  call.run(call.by.forward);
  return {rows, stats};
}

std::tuple<Tensor, Tensor> mixture_kl_bwd(
    const Tensor& drows, const Tensor& student, const Tensor& teacher,
    const Tensor& shares, const Tensor& stats, const std::optional<Tensor>& mask,
    double temperature, double scale) {
  Call call(student, teacher, shares, mask, temperature, scale);
  const int64_t n = call.job.rows;
  STD_TORCH_CHECK(drows.dim() == 1 && drows.numel() == n, "mixture_kl: drows [N] expected");
  STD_TORCH_CHECK(stats.dim() == 2 && stats.size(0) == call.stats() && stats.size(1) == n,
                  "mixture_kl: stats [", call.stats(), ", N] expected");
  const Tensor factors = metakd::contiguous_as(call.type, drows);
  const Tensor kept = metakd::contiguous_as(call.type, stats);
  Tensor dstudent = torch::stable::new_empty(student, {n, call.job.classes});  // [N, C]
  Tensor dshares = torch::stable::new_empty(student, {n, call.job.teachers}, call.type);  // [N, M]
  prefer_huge_pages(dstudent);
  call.job.drows = factors.const_data_ptr();
  call.job.stats = const_cast<void*>(kept.const_data_ptr());
  call.job.dstudent = dstudent.mutable_data_ptr();
  call.job.dshares = dshares.mutable_data_ptr();
  call.run(call.by.backward);
  return {dstudent, torch::stable::to(dshares, shares.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metakd, CPU, m) {
  m.impl("mixture_kl_fwd", TORCH_BOX(&mixture_kl_fwd));
  m.impl("mixture_kl_bwd", TORCH_BOX(&mixture_kl_bwd));
}
