// attention_kl, attention_prob_mse and relation_kl on the CPU: what metakd/ops.py declares, head by
// head.

#include "cpu_attention.h"

namespace {

// One head, in one type and instruction set: attention_map_heads.h.
struct Forms {
  int64_t (*forward)(const Head&, double& value, void* stats, void* scratch);
  int64_t (*backward)(const Head&, double dhead, const void* stats, const Matrix& dquery,
                      const Matrix* dkey, void* scratch);
};

#define METAKD_TEXT "attention_map_heads.h"
#include "instruction_sets.h"

// Multiplications of one head, forward or backward.
int64_t work(const AttentionCall& call) {
  return call.length * call.reach * (call.width_s + call.width_t);
}

std::tuple<at::Tensor, at::Tensor> attention_map_fwd(
    at::TensorList query_s, at::TensorList key_s, at::TensorList query_t, at::TensorList key_t,
    const std::optional<at::Tensor>& query_mask, const std::optional<at::Tensor>& key_mask,
    std::optional<int64_t> before, std::optional<int64_t> after, double scale_s, double scale_t,
    bool squared, bool /*same*/) {
  const AttentionCall call(
      query_s, key_s, query_t, key_t, query_mask, key_mask, before, after, scale_s, scale_t);
  at::Tensor heads = at::empty(call.sizes({}), call.options);                 // [n, B, A]
  at::Tensor stats = at::zeros(call.sizes({3, call.length}), call.options);   // [n, B, A, 3, L]
  const Forms by = METAKD_BEST(forms)(call.is_double, squared);
  const PerHead values(heads, call), of_heads(stats, call);
  at::parallel_for(0, call.count(), grain(work(call)), [&](int64_t begin, int64_t end) {
    Scratch memory;
    for (int64_t index = begin; index < end; ++index) {
      double value = 0;
      memory.lend([&](void* scratch) {
        return by.forward(call.head(index), value, of_heads.at(index), scratch);
      });
      values.set(index, value);
    }
  });
  return {heads, stats};
}

std::vector<at::Tensor> attention_map_bwd(
    const at::Tensor& dheads, at::TensorList query_s, at::TensorList key_s, at::TensorList query_t,
    at::TensorList key_t, const std::optional<at::Tensor>& query_mask,
    const std::optional<at::Tensor>& key_mask, std::optional<int64_t> before, std::optional<int64_t> after,
    double scale_s, double scale_t, const at::Tensor& stats, bool squared, bool same) {
  const AttentionCall call(
      query_s, key_s, query_t, key_t, query_mask, key_mask, before, after, scale_s, scale_t);
  const at::Tensor dheads_ = dheads.contiguous(), stats_ = stats.contiguous();
  TORCH_CHECK(dheads_.scalar_type() == call.options.dtype().toScalarType() &&
                  stats_.scalar_type() == dheads_.scalar_type() && dheads_.numel() == call.count() &&
                  stats_.numel() == call.count() * 3 * call.length,
              "attention_map: dheads and stats must be as the forward left them");
  Gradients dquery(query_s), dkey(same ? at::TensorList() : key_s);
  const Forms by = METAKD_BEST(forms)(call.is_double, squared);
  const PerHead slopes(dheads_, call), of_heads(stats_, call);
  at::parallel_for(0, call.count(), grain(work(call)), [&](int64_t begin, int64_t end) {
    Scratch memory;
    for (int64_t index = begin; index < end; ++index) {
      const Matrix to_query = call.rows(dquery.rows, index);
      std::optional<Matrix> to_key;
      if (!same) to_key = call.rows(dkey.rows, index);
      memory.lend([&](void* scratch) {
        return by.backward(call.head(index), slopes.get(index), of_heads.at(index), to_query,
                           to_key ? &*to_key : nullptr, scratch);
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
  m.impl("attention_map_fwd", &attention_map_fwd);
  m.impl("attention_map_bwd", &attention_map_bwd);
}
