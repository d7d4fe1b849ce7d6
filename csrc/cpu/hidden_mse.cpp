// hidden_mse on the CPU: what metakd/ops.py declares.
//
// Legend: n layers, B batch, L length, H hidden size.

#include "cpu.h"

namespace {

// Tokens of one example in one layer; strides in elements.
struct Tokens {
  const void *student, *teacher;
  void* gradient;
  int64_t stride_s, stride_t, stride_gradient, width;
  Type type_s, type_t;
  const bool* mask;
  int64_t mask_stride;

  bool is_real(int64_t token) const { return !mask || mask[token * mask_stride]; }
};

// In one type and instruction set: hidden_mse_rows.h.
struct Forms {
  double (*squares)(const Tokens&, int64_t begin, int64_t end);
  void (*slopes)(const Tokens&, double factor, int64_t begin, int64_t end);
};

#define METAKD_TEXT "hidden_mse_rows.h"
#include "instruction_sets.h"

const void* example(const Tensor& x, int64_t index) {
  return static_cast<const char*>(x.const_data_ptr()) + index * x.stride(0) * x.element_size();
}

class Call {
 public:
  int64_t layers, batch, length, width;
  ScalarType type;  // of rows
  Forms by;

  Call(const Tensors& student, const Tensors& teacher, const std::optional<Tensor>& mask)
      : layers(student.size()), mask_(mask) {
    STD_TORCH_CHECK(layers > 0 && teacher.size() == student.size() && student[0].dim() == 3,
                    "hidden_mse: as many layers [B, L, H] expected on both sides");
    for (int64_t layer = 0; layer < layers; ++layer) {
      STD_TORCH_CHECK(student[layer].sizes().equals(student[0].sizes()) &&
                          teacher[layer].sizes().equals(student[0].sizes()) &&
                          student[layer].scalar_type() == student[0].scalar_type() &&
                          teacher[layer].scalar_type() == teacher[0].scalar_type(),
                      "hidden_mse: layers must have one shape, and one dtype on each side");
      student_.push_back(with_last_stride_1(student[layer]));
      teacher_.push_back(with_last_stride_1(teacher[layer]));
    }
    batch = student[0].size(0);
    length = student[0].size(1);
    width = student[0].size(2);
    if (mask)
      STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 && mask->size(0) == batch &&
                          mask->size(1) == length,
                      "hidden_mse: bool mask [B, L] expected");
    type = accumulator(student[0], teacher[0]);
    by = METAKD_BEST(forms)(type == ScalarType::Double);
  }

  Tokens tokens(int64_t layer, int64_t index) const {
    const Tensor &s = student_[layer], &t = teacher_[layer];
    Tokens found{};
    found.student = example(s, index);
    found.teacher = example(t, index);
    found.stride_s = s.stride(1);
    found.stride_t = t.stride(1);
    found.width = width;
    found.type_s = type_of(s);
    found.type_t = type_of(t);
    if (mask_) {
      found.mask = mask_->const_data_ptr<bool>() + index * mask_->stride(0);
      found.mask_stride = mask_->stride(1);
    }
    return found;
  }

  // What the mean of an example divides by.
  std::vector<double> counts() const {
    std::vector<double> found;
    for (int64_t index = 0; index < batch; ++index) {
      const Tokens mask = tokens(0, index);
      int64_t real = 0;
      for (int64_t token = 0; token < length; ++token) real += mask.is_real(token);
      found.push_back(static_cast<double>(std::max<int64_t>(real, 1) * std::max<int64_t>(width, 1)));
    }
    return found;
  }

  // f(layer, example, first token, end, number of the piece) in pieces that do not depend on the number
  // of threads.
  template <class F>
  void for_pieces(F f) const {
    const int64_t per_example = pieces();
    torch::stable::parallel_for(0, layers * batch * per_example, grain(TOKENS * width * READ), [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t first = piece % per_example * TOKENS, row = piece / per_example;
        f(row / batch, row % batch, first, std::min(first + TOKENS, length), piece);
      }
    });
  }

  // Of one example in one layer.
  int64_t pieces() const { return (length + TOKENS - 1) / TOKENS; }

 private:
  static constexpr int64_t TOKENS = 32;
  static constexpr int64_t READ = 32;  // multiplications in the time that one number takes to come

  Tensors student_, teacher_;
  std::optional<Tensor> mask_;
};

Tensor hidden_mse_fwd(
    const Tensors& student, const Tensors& teacher, const std::optional<Tensor>& mask) {
  const Call call(student, teacher, mask);
  const int64_t pieces = call.pieces();
  std::vector<double> sums(call.layers * call.batch * pieces);
  call.for_pieces([&](int64_t layer, int64_t index, int64_t begin, int64_t end, int64_t piece) {
    sums[piece] = call.by.squares(call.tokens(layer, index), begin, end);
  });
  Tensor rows = torch::stable::new_empty(student[0], {call.layers, call.batch}, ScalarType::Double);  // [n, B]
  double* to = rows.mutable_data_ptr<double>();
  const std::vector<double> counts = call.counts();
  for (int64_t row = 0; row < call.layers * call.batch; ++row) {
    double sum = 0;
    for (int64_t piece = 0; piece < pieces; ++piece) sum += sums[row * pieces + piece];
    to[row] = sum / counts[row % call.batch];
  }
  return torch::stable::to(rows, call.type);
}

Tensors hidden_mse_bwd(
    const Tensor& drows, const Tensors& student, const Tensors& teacher,
    const std::optional<Tensor>& mask) {
  const Call call(student, teacher, mask);
  STD_TORCH_CHECK(drows.numel() == call.layers * call.batch, "hidden_mse: drows");
  const Tensor factors = metakd::contiguous_as(ScalarType::Double, drows);
  const double* factor = factors.const_data_ptr<double>();
  const std::vector<double> counts = call.counts();
  std::vector<Gradient> gradients = metakd::gradients_of(student);
  call.for_pieces([&](int64_t layer, int64_t index, int64_t begin, int64_t end, int64_t) {
    Tokens tokens = call.tokens(layer, index);
    const Tensor& to = gradients[layer].to;
    tokens.gradient = const_cast<void*>(example(to, index));
    tokens.stride_gradient = to.stride(1);
    call.by.slopes(tokens, 2 * factor[layer * call.batch + index] / counts[index], begin, end);
  });
  Tensors all;
  metakd::append_finished(gradients, all);
  return all;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metakd, CPU, m) {
  m.impl("hidden_mse_fwd", TORCH_BOX(&hidden_mse_fwd));
  m.impl("hidden_mse_bwd", TORCH_BOX(&hidden_mse_bwd));
}
