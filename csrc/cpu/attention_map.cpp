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

std::tuple<Tensor, Tensor> attention_map_fwd(
    const Tensors& query_s, const Tensors& key_s, const Tensors& query_t, const Tensors& key_t,
    const std::optional<Tensor>& query_mask, const std::optional<Tensor>& key_mask,
    std::optional<int64_t> before, std::optional<int64_t> after, double scale_s, double scale_t,
    bool squared, bool /*same*/) {
  const AttentionCall call(
      query_s, key_s, query_t, key_t, query_mask, key_mask, before, after, scale_s, scale_t);
  Tensor heads = call.by_head({});                // [n, B, A]
  Tensor stats = call.by_head({3, call.length});  // [n, B, A, 3, L]
  torch::stable::zero_(stats);
  const Forms by = METAKD_BEST(forms)(call.is_double, squared);
  const PerHead values(heads, call), of_heads(stats, call);
  torch::stable::parallel_for(0, call.count(), grain(work(call)), [&](int64_t begin, int64_t end) {
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

Tensors attention_map_bwd(
    const Tensor& dheads, const Tensors& query_s, const Tensors& key_s, const Tensors& query_t,
    const Tensors& key_t, const std::optional<Tensor>& query_mask,
    const std::optional<Tensor>& key_mask, std::optional<int64_t> before, std::optional<int64_t> after,
    double scale_s, double scale_t, const Tensor& stats, bool squared, bool same) {
  const AttentionCall call(
      query_s, key_s, query_t, key_t, query_mask, key_mask, before, after, scale_s, scale_t);
  const Tensor dheads_ = torch::stable::contiguous(dheads), stats_ = torch::stable::contiguous(stats);
  STD_TORCH_CHECK(dheads_.scalar_type() == call.type &&
                      stats_.scalar_type() == dheads_.scalar_type() && dheads_.numel() == call.count() &&
                      stats_.numel() == call.count() * 3 * call.length,
                  "attention_map: dheads and stats must be as the forward left them");
  std::vector<Gradient> dquery = metakd::gradients_of(query_s), dkey;
  if (!same) dkey = metakd::gradients_of(key_s);
  const Forms by = METAKD_BEST(forms)(call.is_double, squared);
  const PerHead slopes(dheads_, call), of_heads(stats_, call);
  torch::stable::parallel_for(0, call.count(), grain(work(call)), [&](int64_t begin, int64_t end) {
    Scratch memory;
    for (int64_t index = begin; index < end; ++index) {
      const Matrix to_query = call.rows(dquery, index);
      std::optional<Matrix> to_key;
      if (!same) to_key = call.rows(dkey, index);
      memory.lend([&](void* scratch) {
        return by.backward(call.head(index), slopes.get(index), of_heads.at(index), to_query,
                           to_key ? &*to_key : nullptr, scratch);
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
  m.impl("attention_map_fwd", TORCH_BOX(&attention_map_fwd));
  m.impl("attention_map_bwd", TORCH_BOX(&attention_map_bwd));
}
