// What the launchers of soft_kl check and work out alike on every device. Needs ATen only.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

#include <soft_kl_stats.h>
#include <tensors.h>

namespace metakd::soft_kl {

// The arguments that the operators share, see SCHEMAS in metakd/ops.py.
struct Arguments {
  at::Tensor student, teacher;  // with contiguous columns
  std::optional<at::Tensor> mask, label;
  int64_t vocab_size;
  double temperature, scale, beta, hard_weight;
  bool is_double;
  at::TensorOptions options;  // of rows and statistics

  Arguments(const at::Tensor& student_, const at::Tensor& teacher_, const std::optional<at::Tensor>& mask_,
            const std::optional<at::Tensor>& label_, int64_t vocab_size_, double temperature_, double scale_,
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
        is_double(student.scalar_type() == at::kDouble || teacher.scalar_type() == at::kDouble),
        options(student.options().dtype(is_double ? at::kDouble : at::kFloat)) {
    TORCH_CHECK(teacher.size(0) == n(), "soft_kl: rows of student and teacher differ");
    TORCH_CHECK(0 < vocab_size && vocab_size <= student.size(1) && vocab_size <= teacher.size(1),
                "soft_kl: vocab_size ", vocab_size, " does not fit the logits");
    check_device(teacher);
    if (mask) check_row("mask", *mask, at::kBool);
    if (label) check_row("label", *label, at::kLong);
  }

  int64_t n() const { return student.size(0); }

  void check_device(const at::Tensor& x) const {
    TORCH_CHECK(x.device() == student.device(), "soft_kl: all tensors must be on ", student.device());
  }

  void check_row(const char* name, const at::Tensor& x, at::ScalarType type) const {
    check_device(x);
    TORCH_CHECK(x.scalar_type() == type && x.dim() == 1 && x.numel() == n(),
                "soft_kl: ", name, " must be ", type, " [N]");
  }

  void check_drows(const at::Tensor& drows) const {
    check_row("drows", drows, options.dtype().toScalarType());
  }

  void check_stats(const at::Tensor& stats) const {
    check_device(stats);
    const at::ScalarType type = options.dtype().toScalarType();
    TORCH_CHECK(stats.scalar_type() == type && stats.dim() == 2 && stats.size(0) == STATS &&
                    stats.size(1) == n(),
                "soft_kl: stats must be ", type, " [", static_cast<int>(STATS), ", N]");
  }
};

}  // namespace metakd::soft_kl
