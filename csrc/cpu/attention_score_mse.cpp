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

std::tuple<Tensor, Tensor, Tensor> attention_score_mse_fwd(
    const Tensors& query_s, const Tensors& key_s, const Tensors& query_t, const Tensors& key_t,
    const std::optional<Tensor>& query_mask, const std::optional<Tensor>& key_mask,
    std::optional<int64_t> before, std::optional<int64_t> after, double scale_s, double scale_t,
    const std::optional<Tensor>& norm_t, double guard) {
  const AttentionCall call(
      query_s, key_s, query_t, key_t, query_mask, key_mask, before, after, scale_s, scale_t);
  const bool only_tiles = guard == std::numeric_limits<double>::infinity();
  STD_TORCH_CHECK(only_tiles || (!before && !after), "attention_score_mse: before and after need guard = inf");
  const int64_t width = only_tiles ? 0 : call.width_s + call.width_t;
  Tensor heads = call.by_head({});                                   // [n, B, A]
  Tensor gram = call.by_head({2, width, call.width_s});              // [n, B, A, 2, W, D_s]
  Tensor tiled = call.by_head({}, ScalarType::Bool);                 // [n, B, A]
  std::optional<Tensor> norm;
  if (norm_t) {
    norm = torch::stable::contiguous(*norm_t);
    STD_TORCH_CHECK(norm->sizes().equals(heads.sizes()) && norm->scalar_type() == heads.scalar_type(),
                    "attention_score_mse: norm_t must be like the result");
  }
  const Forms by = METAKD_BEST(forms)(call.is_double);
  const PerHead values(heads, call), grams(gram, call), norms(norm.value_or(heads), call);
  bool* is_tiled = tiled.mutable_data_ptr<bool>();
  torch::stable::parallel_for(0, call.count(), grain(work(call, only_tiles)), [&](int64_t begin, int64_t end) {
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

Tensors attention_score_mse_bwd(
    const Tensor& dheads, const Tensors& query_s, const Tensors& key_s, const Tensors& query_t,
    const Tensors& key_t, const std::optional<Tensor>& query_mask,
    const std::optional<Tensor>& key_mask, std::optional<int64_t> before, std::optional<int64_t> after,
    double scale_s, double scale_t, const Tensor& gram, const Tensor& tiled, double guard) {
  const AttentionCall call(
      query_s, key_s, query_t, key_t, query_mask, key_mask, before, after, scale_s, scale_t);
  const Tensor dheads_ = torch::stable::contiguous(dheads), gram_ = torch::stable::contiguous(gram),
               tiled_ = torch::stable::contiguous(tiled);
  STD_TORCH_CHECK(dheads_.scalar_type() == call.type &&
                      gram_.scalar_type() == dheads_.scalar_type() && dheads_.numel() == call.count() &&
                      tiled_.numel() == call.count(),
                  "attention_score_mse: dheads, gram and tiled must be as the forward left them");
  const bool only_tiles = guard == std::numeric_limits<double>::infinity();
  STD_TORCH_CHECK(only_tiles || gram_.numel() == call.count() * 2 * (call.width_s + call.width_t) * call.width_s,
                  "attention_score_mse: gram must be as the forward left it");
  std::vector<Gradient> dquery = metakd::gradients_of(query_s), dkey = metakd::gradients_of(key_s);
  const Forms by = METAKD_BEST(forms)(call.is_double);
  const PerHead slopes(dheads_, call), grams(gram_, call);
  const bool* is_tiled = tiled_.const_data_ptr<bool>();
  torch::stable::parallel_for(0, call.count(), grain(work(call, only_tiles)), [&](int64_t begin, int64_t end) {
    Scratch for_gram, for_tiles;
    for (int64_t index = begin; index < end; ++index) {
      const Head head = call.head(index);
      const Matrix to_query = call.rows(dquery, index), to_key = call.rows(dkey, index);
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
  Tensors all;
  metakd::append_finished(dquery, all);
  metakd::append_finished(dkey, all);
  return all;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metakd, CPU, m) {
  m.impl("attention_score_mse_fwd", TORCH_BOX(&attention_score_mse_fwd));
  m.impl("attention_score_mse_bwd", TORCH_BOX(&attention_score_mse_bwd));
}
