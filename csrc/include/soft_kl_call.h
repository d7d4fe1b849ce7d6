// What the launchers of soft_kl check and work out alike on every device. Needs LibTorch's stable ABI only.

#pragma once

#include <cstdint>
#include <optional>

#include <soft_kl_stats.h>
#include <tensors.h>

namespace metakd::soft_kl {

// The arguments that the operators share, see SCHEMAS in metakd/ops.py.
struct Arguments {
  Tensor student, teacher;  // with contiguous columns
  std::optional<Tensor> mask, label;
  int64_t vocab_size;
  double temperature, scale, beta, hard_weight;
  ScalarType type;  // of rows and statistics
  bool is_double;

  Arguments(const Tensor& student_, const Tensor& teacher_, const std::optional<Tensor>& mask_,
            const std::optional<Tensor>& label_, int64_t vocab_size_, double temperature_, double scale_,
            double beta_, double hard_weight_)
      : student(with_last_stride_1(student_)),
        teacher(with_last_stride_1(teacher_)),
        mask(mask_),
        label(label_),
        vocab_size(vocab_size_),
        temperature(temperature_),
        scale(scale_),
        beta(beta_),
        hard_weight(hard_weight_),
        type(accumulator(student, teacher)),
        is_double(type == ScalarType::Double) {
    STD_TORCH_CHECK(teacher.size(0) == n(), "soft_kl: rows of student and teacher differ");
    STD_TORCH_CHECK(0 < vocab_size && vocab_size <= student.size(1) && vocab_size <= teacher.size(1),
                    "soft_kl: vocab_size ", vocab_size, " does not fit the logits");
    check_device(teacher);
    if (mask) check_row("mask", *mask, ScalarType::Bool);
    if (label) check_row("label", *label, ScalarType::Long);
  }

  int64_t n() const { return student.size(0); }

  Tensor new_rows() const { return torch::stable::new_empty(student, {n()}, type); }          // [N]
  Tensor new_stats() const { return torch::stable::new_empty(student, {STATS, n()}, type); }  // [STATS, N]

  // The student was overwritten, or a copy of it with contiguous columns; autograd learns of either.
  void write_back(Tensor& into) const {
    if (!is_same(into, student)) {
      torch::stable::copy_(into, student);
    } else {
      Tensor nothing = torch::stable::narrow(into, 0, 0, 0);
      torch::stable::zero_(nothing);
    }
  }

  void check_device(const Tensor& x) const {
    STD_TORCH_CHECK(x.device() == student.device(), "soft_kl: all tensors must be on one device");
  }

  void check_row(const char* name, const Tensor& x, ScalarType type) const {
    check_device(x);
    STD_TORCH_CHECK(x.scalar_type() == type && x.dim() == 1 && x.numel() == n(),
                    "soft_kl: ", name, " must be ", type, " [N]");
  }

  void check_drows(const Tensor& drows) const {
    check_row("drows", drows, type);
  }

  void check_stats(const Tensor& stats) const {
    check_device(stats);
    STD_TORCH_CHECK(stats.scalar_type() == type && stats.dim() == 2 && stats.size(0) == STATS &&
                        stats.size(1) == n(),
                    "soft_kl: stats must be ", type, " [", static_cast<int>(STATS), ", N]");
  }
};

}  // namespace metakd::soft_kl
