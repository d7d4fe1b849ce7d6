// attention_score_mse on the CPU: what metakd/ops.py declares, head by head.

#include "cpu_attention.h"

namespace {

struct GramValue {
  double value, size;  // ||S_s - S_t||^2, ||S_s||^2 + ||S_t||^2
};

// The two forms of one head, in one type and instruction set: attention_score_mse_heads.h.
struct Forms {
  int64_t (*gram_forward)(
      const Head&, const void* norm_t, void* gram, GramValue& found, void* scratch);
  int64_t (*gram_backward)(const Head&, double dhead, const void* gram, const Matrix& dquery,
                           const Matrix& dkey, void* scratch);
  int64_t (*tiled_forward)(const Head&, double& value, void* scratch);
  int64_t (*tiled_backward)(
      const Head&, double dhead, const Matrix& dquery, const Matrix& dkey, void* scratch);
};

#define METAKD_TEXT "attention_score_mse_heads.h"
#include "instruction_sets.h"

// Multiplications of one head, forward or backward.
int64_t work(const AttentionCall& call, bool tiled) {
  const int64_t width = call.width_s + call.width_t;
  return call.length * width * (tiled ? call.reach : width);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_score_mse_fwd(
    at::TensorList query_s, at::TensorList key_s, at::TensorList query_t, at::TensorList key_t,
    const std::optional<at::Tensor>& query_mask, const std::optional<at::Tensor>& key_mask,
    std::optional<int64_t> before, std::optional<int64_t> after, double scale_s, double scale_t,
    const std::optional<at::Tensor>& norm_t, double guard) {
  const AttentionCall call(
      query_s, key_s, query_t, key_t, query_mask, key_mask, before, after, scale_s, scale_t);
  const bool only_tiles = guard == std::numeric_limits<double>::infinity();
  TORCH_CHECK(only_tiles || (!before && !after), "attention_score_mse: before and after need guard = inf");
  const int64_t width = only_tiles ? 0 : call.width_s + call.width_t;
  at::Tensor heads = at::empty(call.sizes({}), call.options);                           // [n, B, A]
  at::Tensor gram = at::empty(call.sizes({2, width, call.width_s}), call.options);      // [n, B, A, 2, W, D_s]
  at::Tensor tiled = at::empty(call.sizes({}), call.options.dtype(at::kBool));          // [n, B, A]
  std::optional<at::Tensor> norm;
  if (norm_t) {
    norm = norm_t->contiguous();
    TORCH_CHECK(norm->sizes() == heads.sizes() && norm->scalar_type() == heads.scalar_type(),
                "attention_score_mse: norm_t must be like the result");
  }
  const Forms by = METAKD_BEST(forms)(call.is_double);
  const PerHead values(heads, call), grams(gram, call), norms(norm.value_or(heads), call);
  bool* is_tiled = tiled.mutable_data_ptr<bool>();
  at::parallel_for(0, call.count(), grain(work(call, only_tiles)), [&](int64_t begin, int64_t end) {
    Scratch for_gram, for_tiles;
    for (int64_t index = begin; index < end; ++index) {
      const Head head = call.head(index);
      GramValue found{};
      if (!only_tiles)
        for_gram.lend([&](void* scratch) {
          return by.gram_forward(head, norm ? norms.at(index) : nullptr, grams.at(index), found, scratch);
        });
      is_tiled[index] = only_tiles || (guard > 0 && found.value < guard * found.size);
      if (is_tiled[index])
        for_tiles.lend([&](void* scratch) {
          return by.tiled_forward(head, found.value, scratch);
        });
      values.set(index, found.value);
    }
  });
  return {heads, gram, tiled};
}

std::vector<at::Tensor> attention_score_mse_bwd(
    const at::Tensor& dheads, at::TensorList query_s, at::TensorList key_s, at::TensorList query_t,
    at::TensorList key_t, const std::optional<at::Tensor>& query_mask,
    const std::optional<at::Tensor>& key_mask, std::optional<int64_t> before, std::optional<int64_t> after,
    double scale_s, double scale_t, const at::Tensor& gram, const at::Tensor& tiled, double guard) {
  const AttentionCall call(
      query_s, key_s, query_t, key_t, query_mask, key_mask, before, after, scale_s, scale_t);
  const at::Tensor dheads_ = dheads.contiguous(), gram_ = gram.contiguous(), tiled_ = tiled.contiguous();
  TORCH_CHECK(dheads_.scalar_type() == call.options.dtype().toScalarType() &&
                  gram_.scalar_type() == dheads_.scalar_type() && dheads_.numel() == call.count() &&
                  tiled_.numel() == call.count(),
              "attention_score_mse: dheads, gram and tiled must be as the forward left them");
  const bool only_tiles = guard == std::numeric_limits<double>::infinity();
  TORCH_CHECK(only_tiles || gram_.numel() == call.count() * 2 * (call.width_s + call.width_t) * call.width_s,
              "attention_score_mse: gram must be as the forward left it");
  Gradients dquery(query_s), dkey(key_s);
  const Forms by = METAKD_BEST(forms)(call.is_double);
  const PerHead slopes(dheads_, call), grams(gram_, call);
  const bool* is_tiled = tiled_.const_data_ptr<bool>();
  at::parallel_for(0, call.count(), grain(work(call, only_tiles)), [&](int64_t begin, int64_t end) {
    Scratch for_gram, for_tiles;
    for (int64_t index = begin; index < end; ++index) {
      const Head head = call.head(index);
      const Matrix to_query = call.rows(dquery.rows, index), to_key = call.rows(dkey.rows, index);
      const double dhead = slopes.get(index);
      if (is_tiled[index])
        for_tiles.lend([&](void* scratch) {
          return by.tiled_backward(head, dhead, to_query, to_key, scratch);
        });
      else
        for_gram.lend([&](void* scratch) {
          return by.gram_backward(head, dhead, grams.at(index), to_query, to_key, scratch);
        });
    }
  });
  std::vector<at::Tensor> all;
  dquery.append_to(all);
  dkey.append_to(all);
  return all;
}

}  // namespace

TORCH_LIBRARY_IMPL(metakd, CPU, m) {
  m.impl("attention_score_mse_fwd", &attention_score_mse_fwd);
  m.impl("attention_score_mse_bwd", &attention_score_mse_bwd);
}
