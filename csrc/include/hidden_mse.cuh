// CUDA kernels of hidden_mse: see metakd/ops.py for the contract. Torch-free: launchers are in
// cuda/hidden_mse.cu, and a compiler or a host program can take this file alone.
//
// One forward and one backward launch for all layers: at the sizes of encoders a layer is one or two
// microseconds of traffic, less than a launch costs. A block takes TOKENS tokens of one layer and
// example, a warp a token at a time; masked tokens are not read. 16 bytes a load (8 elements of both
// sides at once, whatever their dtypes) where addresses allow it.
//
// Forward: each block stores its sum and its count of real tokens; the last block of a layer and example
// adds them up, in their order. Backward: d student = drow * 2 (student - teacher) / (tokens * H), with
// tokens counted again by each block: that is L bytes, of the L2.
//
// Bytes moved: 2 L H elements forward, 3 L H backward, per layer and example. 24 warps of a multiprocessor
// have up to 2 KB of half precision each under way: 48 KB, more than memory's latency asks for (33 bytes a
// ns, about a microsecond).
//
// Order of sums: fixed by the place of a token in its example. Same input, same bits, and masked tokens at
// the end of all sequences change no bit.
//
// Legend: n layers, B batch, L length, H hidden size; A the type computed in.

#pragma once

#include <rowwise.cuh>

namespace metakd::hidden_mse {

constexpr int MOST_LAYERS = 32;  // of a launch
constexpr int THREADS = 256, WARPS = THREADS / 32, TOKENS = 32;

// [B, L, H], neighbours in H adjacent; strides in elements.
struct Tokens {
  void* data;
  int64_t stride_b, stride_l;
};

struct Layer {
  Tokens student, teacher, grad;
  int64_t width;  // H
};

template <typename A>
struct Job {
  Layer layers[MOST_LAYERS];
  const bool* mask;  // [B, L] or null
  int64_t mask_stride_b, mask_stride_l;
  A *rows, *sums, *counts;  // [n, B] and, with more than one chunk of tokens, [n, B, chunks] twice
  int* tickets;             // [n, B], zeros
  const A* drows;           // [n, B]
  int64_t drows_stride[2];
  int64_t length;
  int batch, chunks;
  Dtype dtype_s, dtype_t;

  METAKD_BOTH bool is_real(int b, int64_t token) const {
    return token < length && (!mask || mask[b * mask_stride_b + token * mask_stride_l]);
  }
};

// Eight neighbours of a row, as they lie in memory.
struct Eight {
  uint4 low, high;

  METAKD_DEVICE void load(const Row<Any>& row, int column) {
    const uint4* const at = reinterpret_cast<const uint4*>(row.shifted(column).at);
    low = at[0];
    if (row.dtype == Dtype::float32) high = at[1];
  }
  METAKD_DEVICE void widen(Dtype dtype, float (&x)[8]) const {
    if (dtype == Dtype::float32) {
      widen_vector<float>(low, x, 0);
      widen_vector<float>(high, x, 4);
    } else if (dtype == Dtype::bfloat16) {
      widen_vector<__nv_bfloat16>(low, x, 0);
    } else {
      widen_vector<__half>(low, x, 0);
    }
  }
  METAKD_DEVICE void narrow(Dtype dtype, const float (&x)[8]) {
    if (dtype == Dtype::float32) {
      low = narrow_vector<float>(x, 0);
      high = narrow_vector<float>(x, 4);
    } else if (dtype == Dtype::bfloat16) {
      low = narrow_vector<__nv_bfloat16>(x, 0);
    } else {
      low = narrow_vector<__half>(x, 0);
    }
  }
  METAKD_DEVICE void store(const Row<Any>& row, int column) const {
    uint4* const at = reinterpret_cast<uint4*>(row.shifted(column).at);
    at[0] = low;
    if (row.dtype == Dtype::float32) at[1] = high;
  }
};

// A block's share of a layer and example.
template <typename A>
struct Share {
  const Job<A>& job;
  int64_t index;  // of [n, B]
  int layer, b, chunk;

  METAKD_BOTH explicit Share(const Job<A>& job_, int64_t block) : job(job_) {
    chunk = static_cast<int>(block % job.chunks);
    index = block / job.chunks;
    b = static_cast<int>(index % job.batch);
    layer = static_cast<int>(index / job.batch);
  }

  METAKD_BOTH const Layer& of() const { return job.layers[layer]; }
  METAKD_BOTH bool is_real(int64_t token) const { return job.is_real(b, token); }

  METAKD_DEVICE Row<Any> row(const Tokens& tokens, Dtype dtype, int64_t token) const {
    return row_of<Any>(tokens.data, dtype, b * tokens.stride_b + token * tokens.stride_l);
  }

  // Whether rows can be walked 8 elements at a time.
  METAKD_DEVICE bool is_wide(const Tokens& tokens, Dtype dtype) const {
    const uint64_t address = reinterpret_cast<uint64_t>(row(tokens, dtype, 0).at);
    return ((address | static_cast<uint64_t>(tokens.stride_l * bytes_of(dtype))) & 15) == 0;
  }

  // f(token) for the warp's tokens, real or not; all its lanes together.
  template <typename F>
  METAKD_DEVICE void over_tokens(F f) const {
    const int64_t first = static_cast<int64_t>(chunk) * TOKENS;
    for (int64_t token = first + threadIdx.x / 32; token < first + TOKENS && token < job.length; token += WARPS)
      f(token);
  }
};

// Residuals of a token: f(column, residuals, count), `count` of them from `column` on, 1 or 8; by a warp.
template <typename A, typename F>
METAKD_DEVICE void over_residuals(const Share<A>& share, int64_t token, bool wide, F f) {
  const Job<A>& job = share.job;
  const Row<Any> row_s = share.row(share.of().student, job.dtype_s, token);
  const Row<Any> row_t = share.row(share.of().teacher, job.dtype_t, token);
  const int width = static_cast<int>(share.of().width), lane = threadIdx.x % 32;
  if constexpr (sizeof(A) == 4) {
    if (wide) {
      constexpr int TURN = 2;  // loads of each side under way in a thread
      for (int first = lane * 8; first < width; first += TURN * 256) {
        Eight bits_s[TURN], bits_t[TURN];
#pragma unroll
        for (int i = 0; i < TURN; ++i)
          if (first + 256 * i < width) {
            bits_s[i].load(row_s, first + 256 * i);
            bits_t[i].load(row_t, first + 256 * i);
          }
#pragma unroll
        for (int i = 0; i < TURN; ++i)
          if (first + 256 * i < width) {
            float s[8], t[8];
            bits_s[i].widen(job.dtype_s, s);
            bits_t[i].widen(job.dtype_t, t);
#pragma unroll
            for (int e = 0; e < 8; ++e) s[e] -= t[e];
            f(first + 256 * i, s, std::integral_constant<int, 8>());
          }
      }
      return;
    }
  }
  constexpr int TURN = 4;
  for (int first = lane; first < width; first += TURN * 32) {
    A s[TURN], t[TURN];
    const auto column = [&](int e) { return first + 32 * e; };
    const auto exists = [&](int e) { return column(e) < width; };
    load_any(row_s, s, column, exists);
    load_any(row_t, t, column, exists);
#pragma unroll
    for (int e = 0; e < TURN; ++e)
      if (exists(e)) {
        const A residual[1] = {s[e] - t[e]};
        f(column(e), residual, std::integral_constant<int, 1>());
      }
  }
}

template <typename A>
METAKD_DEVICE A warp_total(A x) {
  for (int offset = 16; offset > 0; offset /= 2) x += shuffle_xor(x, offset);
  return x;
}

template <typename A>
METAKD_BOTH A mean_of(A sum, A tokens, int64_t width) {
  return tokens == A(0) ? A(0) : sum / (tokens * static_cast<A>(width));
}

// gridDim.x = n x B x chunks.
template <typename A>
__global__ void __launch_bounds__(THREADS, 3) hidden_mse_forward(const __grid_constant__ Job<A> job) {
  struct Part {
    A sum, count;
  };
  Part* const parts = reinterpret_cast<Part*>(dynamic_shared());
  bool* const is_last = reinterpret_cast<bool*>(parts + WARPS);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const Share<A> share(job, blockIdx.x);
  const bool wide = share.of().width % 8 == 0 && share.is_wide(share.of().student, job.dtype_s) &&
      share.is_wide(share.of().teacher, job.dtype_t);
  A sum = 0, count = 0;
  share.over_tokens([&](int64_t token) {
    if (!share.is_real(token)) return;
    A of_token = 0;  // short sums, so that few roundings pile up
    over_residuals(share, token, wide, [&](int, const auto& residual, auto elements) {
#pragma unroll
      for (int e = 0; e < elements(); ++e) of_token += residual[e] * residual[e];
    });
    sum += of_token;
    count += 1;
  });
  sum = warp_total(sum);
  if (lane == 0) parts[warp] = {sum, count};
  block_sync();
  if (thread == 0) {
    for (int i = 1; i < WARPS; ++i) sum += parts[i].sum, count += parts[i].count;
    if (job.chunks == 1) {
      job.rows[share.index] = mean_of(sum, count, share.of().width);
    } else {
      job.sums[blockIdx.x] = sum;
      job.counts[blockIdx.x] = count;
      *is_last = is_last_block(job.tickets + share.index, job.chunks);
    }
  }
  if (job.chunks == 1) return;
  block_sync();
  if (!*is_last || warp > 0) return;
  sum = count = 0;
  for (int64_t i = lane; i < job.chunks; i += 32) {
    sum += load_other(job.sums + share.index * job.chunks + i);
    count += load_other(job.counts + share.index * job.chunks + i);
  }
  sum = warp_total(sum);
  count = warp_total(count);
  if (lane == 0) job.rows[share.index] = mean_of(sum, count, share.of().width);
}

template <typename A>
__global__ void __launch_bounds__(THREADS, 3) hidden_mse_backward(const __grid_constant__ Job<A> job) {
  int* const parts = reinterpret_cast<int*>(dynamic_shared());
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const Share<A> share(job, blockIdx.x);
  const Layer& layer = share.of();
  A tokens = static_cast<A>(job.length);
  if (job.mask) {
    int count = 0;
    for (int64_t token = thread; token < job.length; token += THREADS) count += share.is_real(token);
    count = warp_total(count);
    if (lane == 0) parts[warp] = count;
    block_sync();
    count = 0;
    for (int i = 0; i < WARPS; ++i) count += parts[i];
    tokens = static_cast<A>(count);
  }
  const A drow = job.drows[share.layer * job.drows_stride[0] + share.b * job.drows_stride[1]];
  const A factor = 2 * mean_of(drow, tokens, layer.width);
  const bool wide = layer.width % 8 == 0 && share.is_wide(layer.student, job.dtype_s) &&
      share.is_wide(layer.teacher, job.dtype_t) && share.is_wide(layer.grad, job.dtype_s);
  share.over_tokens([&](int64_t token) {
    const Row<Any> out = share.row(layer.grad, job.dtype_s, token);
    if (!share.is_real(token)) {
      for (int column = lane; column < layer.width; column += 32) store_one(out, column, A(0));
      return;
    }
    over_residuals(share, token, wide, [&](int column, const auto& residual, auto elements) {
      if constexpr (elements() == 8) {
        float gradient[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) gradient[e] = factor * residual[e];
        Eight bits;
        bits.narrow(job.dtype_s, gradient);
        bits.store(out, column);
      } else {
        store_one<Any, A>(out, column, factor * residual[0]);
      }
    });
  });
}

// Dynamic shared memory of either kernel.
template <typename A>
constexpr int SHARED = WARPS * 2 * sizeof(A) + 16;

METAKD_BOTH int chunks_of(int64_t length) {
  return length == 0 ? 1 : static_cast<int>((length + TOKENS - 1) / TOKENS);
}

}  // namespace metakd::hidden_mse
