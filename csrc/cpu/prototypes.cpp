// masked_mean, class_prototypes, prototype_score and domain_expertise on the CPU: what metakd/ops.py
// declares.
//
// Sums over rows are taken in double and row after row, one piece of the columns at a time: a column's
// sum does not depend on the pieces, hence not on the number of threads.
//
// Legend: N rows, B batch, L length, H hidden size, K domains, M classes.

#include "cpu.h"

namespace {

struct Scores {
  const void *embedding, *center, *units;  // [N, H] of type; the type that is computed in: [H], [K, M, stride]
  void* to;                                // [N]
  const int64_t *domain, *label;
  const bool* exists;  // [K, M]
  int64_t embedding_stride, stride, width, domains, classes;
  Type type;
  double alpha;
};

struct Expertise {
  const void *logits, *t;
  void* to;
  const int64_t* label;
  int64_t row, column, classes;  // strides of the logits
  Type type;
};

// In one type and instruction set: prototypes_rows.h.
struct Forms {
  void (*add_rows)(const void* from, Type, int64_t stride, int64_t rows, int64_t width,
                   const int64_t* slot, double* sums, int64_t sums_stride);
  void (*write_quotient)(const double* sums, double divisor, int64_t width, void* to, Type);
  void (*divide_row)(const void* from, double divisor, int64_t width, void* to, Type);
  void (*normalise)(const Scores&, const void* prototypes, Type, int64_t row_stride, void* to);
  void (*score_rows)(const Scores&, int64_t begin, int64_t end, void* scratch);
  void (*expertise_rows)(const Expertise&, int64_t begin, int64_t end);
};

#define METAKD_TEXT "prototypes_rows.h"
#include "instruction_sets.h"

constexpr int64_t COLUMNS = 256;  // of a piece
constexpr int64_t READ = 32;      // multiplications in the time that one number takes to come
constexpr int64_t PADDING = 64;   // columns of a row of numbers are a multiple of the widest vector

int64_t padded(int64_t width) { return (width + PADDING - 1) / PADDING * PADDING; }

const void* at(const Tensor& x, int64_t offset) {
  return static_cast<const char*>(x.const_data_ptr()) + offset * x.element_size();
}

void* at_mutable(Tensor& x, int64_t offset) { return const_cast<void*>(at(x, offset)); }

Forms forms_for(ScalarType type) { return METAKD_BEST(forms)(type == ScalarType::Double); }

int64_t pieces(int64_t width) { return (width + COLUMNS - 1) / COLUMNS; }

// Of one example: 0 for a real token, -1 for a masked one; and how many are real.
int64_t find_real(const Tensor& mask, int64_t example, std::vector<int64_t>& slot) {
  const bool* real = mask.const_data_ptr<bool>() + example * mask.stride(0);
  int64_t count = 0;
  slot.resize(mask.size(1));
  for (int64_t token = 0; token < mask.size(1); ++token) {
    const bool is_real = real[token * mask.stride(1)];
    slot[token] = is_real ? 0 : -1;
    count += is_real;
  }
  return count;
}

void check_mask(const Tensor& mask) {
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool && mask.dim() == 2, "masked_mean: bool mask [B, L] expected");
}

Tensor masked_mean_fwd(const Tensor& hidden_, const Tensor& mask) {
  check_mask(mask);
  const Tensor hidden = with_last_stride_1(hidden_);
  STD_TORCH_CHECK(hidden.dim() == 3 && hidden.sizes().slice(0, 2).equals(mask.sizes()), "masked_mean: shapes");
  const int64_t batch = hidden.size(0), length = hidden.size(1), width = hidden.size(2);
  Tensor mean = torch::stable::new_empty(hidden, {batch, width});  // [B, H]
  const Forms by = forms_for(accumulator(hidden));
  const Type type = type_of(hidden);
  const int64_t per_example = pieces(width);
  const int64_t work = length * std::min(width, COLUMNS) * READ;
  torch::stable::parallel_for(0, batch * per_example, grain(work), [&](int64_t begin, int64_t end) {
    std::vector<int64_t> slot;
    double sums[COLUMNS];
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t example = piece / per_example, column = piece % per_example * COLUMNS;
      const int64_t count = std::min(COLUMNS, width - column);
      const int64_t real = find_real(mask, example, slot);
      std::fill_n(sums, COLUMNS, 0.0);
      by.add_rows(at(hidden, example * hidden.stride(0) + column), type, hidden.stride(1), length, count,
                  slot.data(), sums, 0);
      by.write_quotient(sums, std::max<int64_t>(real, 1), count, at_mutable(mean, example * width + column), type);
    }
  });
  return mean;
}

Tensor masked_mean_bwd(const Tensor& dmean_, const Tensor& mask) {
  check_mask(mask);
  const Tensor dmean = with_last_stride_1(dmean_);
  STD_TORCH_CHECK(dmean.dim() == 2 && dmean.size(0) == mask.size(0), "masked_mean: shapes");
  const int64_t batch = mask.size(0), length = mask.size(1), width = dmean.size(1);
  Tensor dhidden = torch::stable::new_empty(dmean, {batch, length, width});  // [B, L, H]
  const Forms by = forms_for(accumulator(dmean));
  const Type type = type_of(dmean);
  const int64_t bytes = width * dmean.element_size();
  torch::stable::parallel_for(0, batch, grain(length * width * READ), [&](int64_t begin, int64_t end) {
    std::vector<int64_t> slot;
    const std::unique_ptr<char[]> row(new char[bytes]);
    for (int64_t example = begin; example < end; ++example) {
      const int64_t real = find_real(mask, example, slot);
      by.divide_row(at(dmean, example * dmean.stride(0)), std::max<int64_t>(real, 1), width, row.get(), type);
      char* to = static_cast<char*>(at_mutable(dhidden, example * length * width));
      for (int64_t token = 0; token < length; ++token, to += bytes) {
        if (slot[token] == 0) std::memcpy(to, row.get(), bytes);
        else std::memset(to, 0, bytes);
      }
    }
  });
  return dhidden;
}

Tensor as_indices(const Tensor& x, int64_t rows, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Long && x.numel() == rows, "metakd: ", name, " must be int64 [N]");
  return torch::stable::contiguous(x);
}

std::tuple<Tensor, Tensor> class_prototypes(
    const Tensor& embedding_, const Tensor& domain_, const Tensor& label_,
    int64_t num_domains, int64_t num_classes) {
  const Tensor embedding = with_last_stride_1(embedding_);
  const int64_t rows = embedding.size(0), width = embedding.size(1), cells = num_domains * num_classes;
  const Tensor domain = as_indices(domain_, rows, "domain"), label = as_indices(label_, rows, "label");
  Tensor prototypes =
      torch::stable::new_empty(embedding, {num_domains, num_classes, width}, accumulator(embedding));  // [K, M, H]
  Tensor counts = torch::stable::new_zeros(domain, {num_domains, num_classes});                         // [K, M]
  int64_t* count = counts.mutable_data_ptr<int64_t>();
  std::vector<int64_t> slot(rows);  // a row's cell; -1 where there is none
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t k = domain.const_data_ptr<int64_t>()[r], m = label.const_data_ptr<int64_t>()[r];
    const bool known = 0 <= k && k < num_domains && 0 <= m && m < num_classes;
    slot[r] = known ? k * num_classes + m : -1;
    if (known) ++count[slot[r]];
  }
  const Forms by = forms_for(accumulator(embedding));
  const int64_t work = rows * std::min(width, COLUMNS) * READ;
  torch::stable::parallel_for(0, pieces(width), grain(work), [&](int64_t begin, int64_t end) {
    std::vector<double> sums(cells * COLUMNS);
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t column = piece * COLUMNS, size = std::min(COLUMNS, width - column);
      std::fill(sums.begin(), sums.end(), 0.0);
      by.add_rows(at(embedding, column), type_of(embedding), embedding.stride(0), rows, size, slot.data(),
                  sums.data(), COLUMNS);
      for (int64_t cell = 0; cell < cells; ++cell)
        by.write_quotient(sums.data() + cell * COLUMNS, std::max<int64_t>(count[cell], 1), size,
                          at_mutable(prototypes, cell * width + column), type_of(prototypes));
    }
  });
  return {prototypes, counts};
}

Tensor prototype_score(
    const Tensor& embedding_, const Tensor& prototypes_, const Tensor& counts,
    const Tensor& domain_, const Tensor& label_, double alpha,
    const std::optional<Tensor>& center_) {
  const Tensor embedding = with_last_stride_1(embedding_), prototypes = torch::stable::contiguous(prototypes_);
  const int64_t rows = embedding.size(0), width = embedding.size(1);
  STD_TORCH_CHECK(prototypes.dim() == 3 && prototypes.size(2) == width &&
                      counts.sizes().equals(prototypes.sizes().slice(0, 2)) &&
                      (!center_ || center_->numel() == width),
                  "prototype_score: prototypes [K, M, H], counts [K, M] and center [H] expected");
  const ScalarType computed = accumulator(embedding, prototypes, center_.value_or(embedding));
  const Tensor domain = as_indices(domain_, rows, "domain"), label = as_indices(label_, rows, "label");
  const Tensor exists = metakd::contiguous_as(ScalarType::Bool, counts);  // none is negative
  Tensor t = torch::stable::new_empty(embedding, {rows}, computed);  // [N]
  Tensor units =
      torch::stable::new_zeros(embedding, {prototypes.size(0), prototypes.size(1), padded(width)}, computed);
  Tensor center;
  if (center_) {
    center = torch::stable::new_zeros(embedding, {padded(width)}, computed);
    Tensor real = torch::stable::narrow(center, 0, 0, width);
    torch::stable::copy_(real, *center_);
  }
  Scores scores{};
  scores.embedding = embedding.const_data_ptr();
  scores.center = center_ ? center.const_data_ptr() : nullptr;
  scores.to = t.mutable_data_ptr();
  scores.domain = domain.const_data_ptr<int64_t>();
  scores.label = label.const_data_ptr<int64_t>();
  scores.exists = exists.const_data_ptr<bool>();
  scores.embedding_stride = embedding.stride(0);
  scores.stride = padded(width);
  scores.width = width;
  scores.domains = prototypes.size(0);
  scores.classes = prototypes.size(1);
  scores.type = type_of(embedding);
  scores.alpha = alpha;
  const Forms by = forms_for(computed);
  by.normalise(scores, prototypes.const_data_ptr(), type_of(prototypes), width, units.mutable_data_ptr());
  scores.units = units.const_data_ptr();
  torch::stable::parallel_for(0, rows, grain(width * (READ + scores.domains)), [&](int64_t begin, int64_t end) {
    const Tensor row = torch::stable::new_zeros(embedding, {padded(width)}, computed);
    by.score_rows(scores, begin, end, row.mutable_data_ptr());
  });
  return t;
}

Tensor domain_expertise(const Tensor& logits, const Tensor& label_, const Tensor& t_) {
  STD_TORCH_CHECK(logits.dim() == 2 && t_.numel() == logits.size(0), "domain_expertise: shapes");
  const int64_t rows = logits.size(0);
  const ScalarType computed = accumulator(logits, t_);
  const Tensor t = metakd::contiguous_as(computed, t_), label = as_indices(label_, rows, "label");
  Tensor weights = torch::stable::new_empty(t, {rows});  // [N]
  Expertise of{};
  of.logits = logits.const_data_ptr();
  of.t = t.const_data_ptr();
  of.to = weights.mutable_data_ptr();
  of.label = label.const_data_ptr<int64_t>();
  of.row = logits.stride(0);
  of.column = logits.stride(1);
  of.classes = logits.size(1);
  of.type = type_of(logits);
  const Forms by = forms_for(computed);
  torch::stable::parallel_for(0, rows, grain(of.classes * 2 * READ), [&](int64_t begin, int64_t end) {
    by.expertise_rows(of, begin, end);
  });
  return weights;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metakd, CPU, m) {
  m.impl("masked_mean_fwd", TORCH_BOX(&masked_mean_fwd));
  m.impl("masked_mean_bwd", TORCH_BOX(&masked_mean_bwd));
  m.impl("class_prototypes", TORCH_BOX(&class_prototypes));
  m.impl("prototype_score", TORCH_BOX(&prototype_score));
  m.impl("domain_expertise", TORCH_BOX(&domain_expertise));
}
