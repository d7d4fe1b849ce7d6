// Arguments of the attention operators on the CPU: layers of queries and keys, and which rows of each
// head are real. See metakd/ops.py for the schemas.
//
// Legend: n layers, B batch, A heads, L length, D_s / D_t head sizes.

#pragma once

#include "cpu.h"

namespace {

// Rows of one head in memory: row r begins at element r * stride.
struct Matrix {
  void* data;
  int64_t stride, width;
  Type type;
};

struct Head {
  Matrix query_s, query_t, key_s, key_t;
  const int64_t *query, *key;  // positions of the real queries and keys
  const int64_t *from, *to;    // by real query: it sees these of the real keys; neither ever decreases
  int64_t queries, keys, length;
  int64_t reach;  // positions that a query sees, real or not, at most
  double scale_s, scale_t;
};

class AttentionCall {
 public:
  int64_t layers, batch, heads, length, width_s, width_t;
  int64_t reach;  // as of a Head
  bool is_double;
  ScalarType type;  // of results by head

  AttentionCall(const Tensors& query_s, const Tensors& key_s, const Tensors& query_t,
                const Tensors& key_t, const std::optional<Tensor>& query_mask,
                const std::optional<Tensor>& key_mask, std::optional<int64_t> before,
                std::optional<int64_t> after, double scale_s, double scale_t)
      : layers(query_s.size()), scale_s_(scale_s), scale_t_(scale_t) {
    STD_TORCH_CHECK(layers > 0 && key_s.size() == query_s.size() && query_t.size() == query_s.size() &&
                        key_t.size() == query_s.size(),
                    "metakd: as many layers of queries and keys expected on both sides");
    const Tensor &own = query_s[0], &other = query_t[0];
    STD_TORCH_CHECK(own.dim() == 4 && other.dim() == 4 &&
                        own.sizes().slice(0, 3).equals(other.sizes().slice(0, 3)),
                    "metakd: queries [B, A, L, D] of one B, A and L expected");
    take(query_s, own, query_s_);
    take(key_s, own, key_s_);
    take(query_t, other, query_t_);
    take(key_t, other, key_t_);
    batch = own.size(0);
    heads = own.size(1);
    length = own.size(2);
    width_s = own.size(3);
    width_t = other.size(3);
    type = accumulator(own, other);
    is_double = type == ScalarType::Double;
    STD_TORCH_CHECK(before.value_or(0) >= 0 && after.value_or(0) >= 0,
                    "metakd: before and after must be 0 or more");
    const int64_t back = std::min(before.value_or(length), length);
    const int64_t ahead = std::min(after.value_or(length), length);
    reach = std::min(back + 1 + ahead, length);
    find_real(query_mask, key_mask, back, ahead);
  }

  int64_t count() const { return layers * batch * heads; }

  // [n, B, A, *rest], not filled, of `type` unless told.
  Tensor by_head(Shape rest, std::optional<ScalarType> other = std::nullopt) const {
    std::vector<int64_t> all = {layers, batch, heads};
    all.insert(all.end(), rest.begin(), rest.end());
    return torch::stable::new_empty(query_s_[0], all, other.value_or(type));
  }

  Matrix rows(const Tensors& of, int64_t index) const { return rows(of[index / (batch * heads)], index); }

  Matrix rows(const std::vector<Gradient>& of, int64_t index) const {
    return rows(of[index / (batch * heads)].to, index);
  }

  Matrix rows(const Tensor& x, int64_t index) const {
    const int64_t offset = index / heads % batch * x.stride(0) + index % heads * x.stride(1);
    char* data = static_cast<char*>(const_cast<void*>(x.const_data_ptr()));
    return {data + offset * static_cast<int64_t>(x.element_size()), x.stride(2), x.size(3), type_of(x)};
  }

  Head head(int64_t index) const {
    const int64_t example = examples_ == 1 ? 0 : index / heads % batch;
    const int64_t query = first_query_[example], key = first_key_[example];
    return {
        rows(query_s_, index),
        rows(query_t_, index),
        rows(key_s_, index),
        rows(key_t_, index),
        query_.data() + query,
        key_.data() + key,
        from_.data() + query,
        to_.data() + query,
        first_query_[example + 1] - query,
        first_key_[example + 1] - key,
        length,
        reach,
        scale_s_,
        scale_t_};
  }

 private:
  Tensors query_s_, key_s_, query_t_, key_t_;
  double scale_s_, scale_t_;
  // Examples without a mask are all alike and stand here once. Rows of an example e begin at first_[e].
  int64_t examples_;
  std::vector<int64_t> query_, key_, from_, to_, first_query_, first_key_;

  static void take(const Tensors& from, const Tensor& like, Tensors& to) {
    to.reserve(from.size());
    for (const Tensor& x : from) {
      STD_TORCH_CHECK(x.sizes().equals(like.sizes()) && x.scalar_type() == like.scalar_type(),
                      "metakd: layers of a side must have one shape and dtype");
      to.push_back(with_last_stride_1(x));
    }
  }

  void find_real(const std::optional<Tensor>& query_mask, const std::optional<Tensor>& key_mask,
                 int64_t back, int64_t ahead) {
    examples_ = query_mask || key_mask ? batch : 1;
    positions(query_mask, query_, first_query_);
    positions(key_mask, key_, first_key_);
    from_.resize(query_.size());
    to_.resize(query_.size());
    for (int64_t example = 0; example < examples_; ++example) {
      int64_t from = 0, to = 0;
      const int64_t keys = first_key_[example + 1] - first_key_[example];
      const int64_t* key = key_.data() + first_key_[example];
      for (int64_t i = first_query_[example]; i < first_query_[example + 1]; ++i) {
        while (from < keys && key[from] < query_[i] - back) ++from;
        while (to < keys && key[to] <= query_[i] + ahead) ++to;
        from_[i] = from;
        to_[i] = to;
      }
    }
  }

  void positions(const std::optional<Tensor>& mask, std::vector<int64_t>& all,
                 std::vector<int64_t>& first) const {
    if (mask)
      STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 && mask->size(0) == batch &&
                          mask->size(1) == length,
                      "metakd: bool masks [B, L] expected");
    const bool* real = mask ? mask->const_data_ptr<bool>() : nullptr;
    all.reserve(examples_ * length);
    first.reserve(examples_ + 1);
    for (int64_t example = 0; example < examples_; ++example) {
      first.push_back(all.size());
      for (int64_t i = 0; i < length; ++i)
        if (!real || real[example * mask->stride(0) + i * mask->stride(1)]) all.push_back(i);
    }
    first.push_back(all.size());
  }
};

// Heads of a call by their place in [n, B, A].
class PerHead {
 public:
  PerHead(const Tensor& x, const AttentionCall& call)
      : data_(static_cast<char*>(const_cast<void*>(x.const_data_ptr()))),
        bytes_(call.count() ? x.numel() * x.element_size() / call.count() : 0),
        is_double_(x.scalar_type() == ScalarType::Double) {}

  void* at(int64_t index) const { return data_ + index * bytes_; }

  double get(int64_t index) const {
    return is_double_ ? *static_cast<double*>(at(index)) : *static_cast<float*>(at(index));
  }

  void set(int64_t index, double value) const {
    if (is_double_) *static_cast<double*>(at(index)) = value;
    else *static_cast<float*>(at(index)) = static_cast<float>(value);
  }

 private:
  char* data_;
  int64_t bytes_;
  bool is_double_;
};

}  // namespace
