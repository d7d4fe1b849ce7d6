// CUDA kernels of the soft_kl family: see metakd/ops.py for the contract and metakd/kernels/soft_kl.py
// for the derivation of the gradients. Torch-free: launchers are in cuda/soft_kl.cu, and a compiler or a
// host program can take this file alone.
//
// Three kernels; each computes rows, statistics and gradient, or what is asked for of these.
//
// narrow (C <= 1024): a row is held in the registers of 1 to 32 threads and read once. Its backward
//   computes the statistics again: that costs two exponentials, reading them would cost as much time.
// plain (any row, any dtypes, any GPU): a block per row. One pass gives the statistics online; the
//   Jensen-Shannon divergence and the gradient take one more pass each.
// one_read (sm_90, both sides of one dtype): clusters of 1 to 16 blocks hold rows of both tensors in
//   their shared memory, so that a row comes from memory once however many passes it takes.
//
// Bytes moved (b per element, N rows, C classes):
//                              plain          one_read
//   soft_kl_fwd, KL            2NCb           (plain is as good)
//   soft_kl_fwd, JSD           4NCb           2NCb
//   soft_kl_bwd                3NCb           (there is no forward to share the read with)
//   soft_kl_fwd_bwd_, KL       5NCb           3NCb
//   soft_kl_fwd_bwd_, JSD      7NCb           3NCb
//
// How one_read is laid out. Memory is kept busy by loads that are on their way while other rows are
// computed: a multiprocessor of an H200 moves 33 bytes a ns, so 64 KB are two microseconds of traffic,
// more than the latency of one. Hence stages of about 64 KB, filled by bulk copies, which need no
// registers and no threads, and as few blocks a row as leave room for three of them (V = 128256 in
// bfloat16: 8 blocks of 3 x 64 KB; 4 blocks of 128 KB would have one stage and load nothing while they
// compute). Blocks are resident, one a multiprocessor, and take rows in turn.
// The second budget is exponentials: 16 a clock and multiprocessor. KL takes 4 a pair of logits, which
// is about three quarters of the time that its 3 x 2 bytes take. So little may wait: statistics of a row
// go to all blocks of the cluster by asynchronous stores that count their bytes at a barrier of the
// receiver, with no fence and no cluster barrier, and with three stages the gradient of the row before
// is computed between sending and receiving (`lag`). The Jensen-Shannon divergence takes 8 a pair and
// is bound by that. Nobody reads another block's shared memory; who received everything of its last
// row has nothing to come and may end.
// Rows of up to 64 KB (both sides) stay with plain: all that its blocks have under way is in the L2.
//
// Bulk copies want addresses that are multiples of 16 bytes; rows of 30522 or 50257 half precision
// logits are not. A block copies what lies between its first and last 16-byte boundary, for each side
// on its own, and reads the few columns outside (`ragged`) from memory when it needs them. Shared
// memory keeps the row's alignment, so that both sides are read 16 bytes at a time where their
// addresses agree modulo 16, as they do when the tensors have the same shape.
//
// Order of sums: fixed by thread, warp, block and cluster; no atomics. Same input, same bits.
//
// Legend: N rows, C classes, V classes that count; _s student, _t teacher; s, t logits; p, q teacher's
// and student's probabilities, m their mixture; `rate` = log2(e) / T; A the type computed in.

#pragma once

#include <rowwise.cuh>
#include <soft_kl_stats.h>

namespace metakd::soft_kl {

constexpr int NO_LABEL = -2;   // of any row
constexpr int BAD_LABEL = -1;  // outside 0..V - 1: the row becomes NaN

// What one call works on. Strides in elements.
template <typename A>
struct Job {
  const void *student, *teacher;  // [N, C_s], [N, C_t]
  void* dstudent;                 // [N, C_s], may be the student; null: no gradient
  A *rows, *stats;                // [N], [STATS, N] to write, or null
  const A *given, *drows;         // [STATS, N] to read instead of computing it, or null; [N]
  const bool* mask;               // [N] or null
  const int64_t* label;           // [N] or null
  int64_t stride_s, stride_t, stride_d, drows_stride, mask_stride, label_stride;
  int64_t n;
  int vocab, width;  // V, C_s
  Dtype dtype_s, dtype_t;
  A rate, inverse_temperature, scale, beta, hard_weight;
  bool sum_1;  // sum exp(s - max_s) is wanted and is not sum exp((s - max_s) / T)

  METAKD_BOTH bool is_masked(int64_t row) const { return mask && !mask[row * mask_stride]; }

  METAKD_BOTH int label_of(int64_t row) const {
    if (!label) return NO_LABEL;
    const int64_t at = label[row * label_stride];
    return at >= 0 && at < vocab ? static_cast<int>(at) : BAD_LABEL;
  }
};

// Mathematics of a row

template <typename A>
struct Facts {
  A max_s, lsum_s, max_t, lsum_t, inner, lsum_1, shift;  // the rows of stats
  A inverse_s, inverse_t, inverse_1;                     // 1 / sum of each exponential
  A divergence;
};

template <typename A>
METAKD_BOTH A not_a_number() {
  return infinity<A>() - infinity<A>();
}

template <typename A, Kind KIND>
METAKD_BOTH Facts<A> facts_of(const Online<A, KIND>& sums, const Job<A>& job) {
  Facts<A> facts;
  facts.max_s = sums.max_s;
  facts.max_t = sums.max_t;
  // A row without any mass has no distribution, as in log_softmax.
  const A sum_s = sums.max_s == -infinity<A>() ? not_a_number<A>() : sums.sum_s;
  const A sum_t = sums.max_t == -infinity<A>() ? not_a_number<A>() : sums.sum_t;
  const A sum_1 = job.sum_1 ? sums.sum_1 : sum_s;
  facts.lsum_s = log(sum_s);
  facts.lsum_t = log(sum_t);
  facts.lsum_1 = log(sum_1);
  facts.inverse_s = A(1) / sum_s;
  facts.inverse_t = A(1) / sum_t;
  facts.inverse_1 = A(1) / sum_1;
  facts.inner = facts.divergence = facts.shift = 0;
  if constexpr (KIND != Kind::forward) {
    facts.shift = sums.top_t - sums.max_t;
    // Where the teacher has no mass at the student's maximum, the reverse KL is infinite, and the
    // mixture sees no difference between -inf and this.
    if (facts.shift == -infinity<A>()) facts.shift = KIND == Kind::reverse ? A(0) : LOWEST<A>;
  }
  if constexpr (KIND != Kind::mixture) {
    constexpr bool FORWARD = KIND == Kind::forward;
    const A inverse = FORWARD ? facts.inverse_t : facts.inverse_s;
    A gap = sums.cross * inverse * job.inverse_temperature;
    const A lonely = exp2_of((sums.lonely - (FORWARD ? sums.max_t : sums.max_s)) * job.rate) * inverse;
    if (lonely != A(0)) gap += infinity<A>();
    // One logarithm of the ratio is more accurate than the difference of two.
    const A between = log(sum_t / sum_s);
    if constexpr (FORWARD) {
      facts.divergence = gap - between;
    } else {
      facts.inner = gap;
      facts.divergence = gap - facts.shift * job.inverse_temperature + between;
    }
  }
  return facts;
}

template <typename A>
METAKD_BOTH void finish_mixture(Facts<A>& facts, const Two<A>& sums, const Job<A>& job) {
  constexpr A LN_2 = A(0.69314718055994530942);
  facts.divergence = -LN_2 * sums.x;
  facts.inner = -(A(1) - job.beta) * LN_2 * sums.y;
}

// `at_label` is the student's logit there.
template <typename A>
METAKD_BOTH A value_of(const Facts<A>& facts, const Job<A>& job, int label, A at_label) {
  A value = job.scale * facts.divergence;
  if (label != NO_LABEL) {
    const A entropy = facts.lsum_1 - (at_label - facts.max_s);
    value += job.hard_weight * (label == BAD_LABEL ? not_a_number<A>() : entropy);
  }
  return value;
}

template <typename A>
METAKD_BOTH Facts<A> read_facts(const Job<A>& job, int64_t row) {
  Facts<A> facts;
  const A* const given = job.given + row;
  facts.max_s = given[MAX_S * job.n];
  facts.lsum_s = given[LSUM_S * job.n];
  facts.max_t = given[MAX_T * job.n];
  facts.lsum_t = given[LSUM_T * job.n];
  facts.inner = given[INNER * job.n];
  facts.lsum_1 = given[LSUM_1 * job.n];
  facts.shift = given[SHIFT * job.n];
  facts.inverse_s = exp(-facts.lsum_s);
  facts.inverse_t = exp(-facts.lsum_t);
  facts.inverse_1 = job.label ? exp(-facts.lsum_1) : A(0);
  facts.divergence = 0;
  return facts;
}

template <typename A>
METAKD_BOTH void write_facts(const Job<A>& job, int64_t row, const Facts<A>& facts, A value) {
  if (job.rows) job.rows[row] = value;
  if (!job.stats) return;
  A* const stats = job.stats + row;
  stats[MAX_S * job.n] = facts.max_s;
  stats[LSUM_S * job.n] = facts.lsum_s;
  stats[MAX_T * job.n] = facts.max_t;
  stats[LSUM_T * job.n] = facts.lsum_t;
  stats[INNER * job.n] = facts.inner;
  stats[LSUM_1 * job.n] = facts.lsum_1;
  stats[SHIFT * job.n] = facts.shift;
}

template <typename A>
METAKD_BOTH void write_masked(const Job<A>& job, int64_t row) {
  write_facts(job, row, Facts<A>{}, A(0));
}

// Mathematics of a class

// Everything constant in a row that its classes need: for the gradient, and for the mixture's sums.
template <typename A, Kind KIND>
struct Slope {
  A max_s, max_t, rate;
  A weight_s, weight_t;  // of exp(s'), exp(t'); for the mixture, weight_s of q
  A inner, shift;
  A gap, top;            // log2 of sum_t / sum_s; of m / q at the student's maximum
  A cool;                // 1 / T
  A log2_s, log2_t;      // log2 of the sums
  A beta, rest;          // rest = 1 - beta
  A hard, hard_1;        // of the one-hot label, of exp(s - max_s)
  int label;

  Slope() = default;

  METAKD_BOTH Slope(const Facts<A>& facts, const Job<A>& job, A drow, int label_) : label(label_) {
    constexpr A LOG2_E = A(1.4426950408889634074);
    max_s = facts.max_s;
    max_t = facts.max_t;
    rate = job.rate;
    cool = job.inverse_temperature;
    inner = facts.inner;
    shift = facts.shift;
    beta = job.beta;
    rest = A(1) - beta;
    const A weight = drow * job.scale * cool;
    weight_s = weight * (KIND == Kind::mixture ? A(1) : facts.inverse_s);
    weight_t = weight * facts.inverse_t;
    gap = (facts.lsum_t - facts.lsum_s) * LOG2_E;
    log2_s = facts.lsum_s * LOG2_E;
    log2_t = facts.lsum_t * LOG2_E;
    if constexpr (KIND == Kind::mixture) {
      A p, q, m_over_p;
      mix(A(0), shift, p, q, m_over_p, top);
    }
    hard = drow * job.hard_weight;
    hard_1 = hard * facts.inverse_1;
    if (label == BAD_LABEL) hard = hard_1 = not_a_number<A>();
  }

  // p, q and, in log2, m / p and m / q. The larger of p and q over m comes from their ratio, so that
  // logarithms are of numbers near 1 where p and q are close.
  METAKD_BOTH void mix(A ds, A dt, A& p, A& q, A& m_over_p, A& m_over_q) const {
    const A r = (dt - ds) * rate - gap;  // log2 of p / q
    const bool teacher = r >= A(0);      // is the larger
    const A ratio = exp2_of(-(teacher ? r : -r));
    const A larger = exp2_of(max_of(ds * rate - log2_s, dt * rate - log2_t));
    const A smaller = larger * ratio;
    const A mixed = log2_of(teacher ? beta + rest * ratio : rest + beta * ratio);
    p = teacher ? larger : smaller;
    q = teacher ? smaller : larger;
    if (larger == A(0)) p = q = A(0);  // both -inf: r is NaN
    m_over_p = teacher ? mixed : mixed - r;
    m_over_q = teacher ? mixed + r : mixed;
  }

  // Into the divergence and `inner`. Two sums, because the errors of r and of what q sums to cancel in
  // the one, and those of `top` do not come in.
  METAKD_BOTH void add_mixture(A s, A t, Two<A>& sums) const {
    A p, q, m_over_p, m_over_q;
    mix(s - max_s, t - max_t, p, q, m_over_p, m_over_q);
    sums.x += p == A(0) ? A(0) : beta * p * m_over_p;
    sums.x += q == A(0) ? A(0) : rest * q * m_over_q;
    sums.y += q == A(0) ? A(0) : q * (m_over_q - top);
  }

  // Of the divergence's part of a row with respect to s.
  METAKD_BOTH A soft(A s, A t) const {
    constexpr A LN_2 = A(0.69314718055994530942);
    const A ds = s - max_s, dt = t - max_t;
    if constexpr (KIND == Kind::mixture) {
      A p, q, m_over_p, m_over_q;
      mix(ds, dt, p, q, m_over_p, m_over_q);
      // Without mass: 0, and NaN in a row of NaN.
      return weight_s * (q == A(0) ? A(0) * inner : q * (-rest * LN_2 * (m_over_q - top) - inner));
    } else {
      const A es = exp2_of(ds * rate);
      if constexpr (KIND == Kind::forward) return es * weight_s - exp2_of(dt * rate) * weight_t;
      return weight_s * (es == A(0) ? A(0) * inner : es * (((ds - dt) + shift) * cool - inner));
    }
  }

  // Of the cross-entropy's part.
  METAKD_BOTH A of_label(A s, int column) const {
    constexpr A LOG2_E = A(1.4426950408889634074);
    return exp2_of((s - max_s) * LOG2_E) * hard_1 - (column == label ? hard : A(0));
  }

  // Logits become gradients; `column(e)` is where element e is.
  template <int COUNT, typename Column>
  METAKD_BOTH void differentiate(A (&s)[COUNT], const A (&t)[COUNT], Column column) const {
    if (label == NO_LABEL) {
#pragma unroll
      for (int e = 0; e < COUNT; ++e) s[e] = soft(s[e], t[e]);
    } else {
#pragma unroll
      for (int e = 0; e < COUNT; ++e) s[e] = soft(s[e], t[e]) + of_label(s[e], column(e));
    }
  }
};

// narrow

constexpr int NARROW_THREADS = 128, NARROW_MOST = 1024;

// `lanes` neighbouring threads (a power of two, at most 32) per row, COUNT classes each.
template <int COUNT, Kind KIND>
__global__ void __launch_bounds__(NARROW_THREADS) soft_kl_narrow(const Job<float> job, const int lanes) {
  using A = float;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (NARROW_THREADS / lanes) +
      static_cast<int>(threadIdx.x) / lanes;
  // Threads beyond the last row, or of a masked one, go along with nothing: shuffles want whole warps.
  const bool inside = row < job.n;
  const bool real = inside && !job.is_masked(row);
  const Row<Any> row_s = row_of<Any>(job.student, job.dtype_s, inside ? row * job.stride_s : 0);
  const Row<Any> row_t = row_of<Any>(job.teacher, job.dtype_t, inside ? row * job.stride_t : 0);
  const auto column = [&](int e) { return lane + e * lanes; };
  const auto exists = [&](int e) { return real && column(e) < job.vocab; };
  A s[COUNT], t[COUNT];
  load_any(row_s, s, column, exists);
  load_any(row_t, t, column, exists);
  const int label = real ? job.label_of(row) : NO_LABEL;

  Online<A, KIND> sums;
  sums.absorb(s, t, job.rate, job.sum_1);
  sums.reduce(lanes, job.rate, job.sum_1);
  Facts<A> facts = facts_of(sums, job);
  if constexpr (KIND == Kind::mixture) {
    const Slope<A, KIND> slope(facts, job, A(0), NO_LABEL);
    Two<A> mixed;
#pragma unroll
    for (int e = 0; e < COUNT; ++e) slope.add_mixture(s[e], t[e], mixed);
    mixed.reduce(lanes);
    finish_mixture(facts, mixed, job);
  }

  Two<A> at_label;
#pragma unroll
  for (int e = 0; e < COUNT; ++e)
    if (column(e) == label) at_label.x = s[e];
  if (job.label) at_label.reduce(lanes);  // all but one are 0

  if (real && lane == 0) write_facts(job, row, facts, value_of(facts, job, label, at_label.x));
  if (inside && !real && lane == 0) write_masked(job, row);
  if (!inside || !job.dstudent) return;

  const Row<Any> out = row_of<Any>(job.dstudent, job.dtype_s, row * job.stride_d);
  if (real) {
    const Slope<A, KIND> slope(facts, job, job.drows[row * job.drows_stride], label);
    slope.differentiate(s, t, column);
  }
#pragma unroll
  for (int e = 0; e < COUNT; ++e)
    if (column(e) < job.vocab) store_one(out, column(e), real ? s[e] : A(0));
  for (int beyond = job.vocab + lane; beyond < job.width; beyond += lanes) store_one(out, beyond, A(0));
}

// Reductions over a block; warp 0 has the result.

template <typename X, typename Reduce>
METAKD_DEVICE void reduce_block(X& x, X* warps, Reduce reduce) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, count = blockDim.x / 32;
  reduce(x);
  if (lane == 0) warps[warp] = x;
  block_sync();
  if (warp == 0) {
    x = lane < count ? warps[lane] : X();
    reduce(x);
  }
}

// plain

// Three blocks of 256 threads leave each 80 registers, room for 16 columns of both sides: 48 KB of half
// precision logits are under way in a multiprocessor.
constexpr int PLAIN_THREADS = 256;

template <typename T, typename A>
struct Plain {
  static constexpr int blocks = sizeof(A) == 8 ? 1 : 3;
  static constexpr int chunk = sizeof(A) == 8 ? 4 : is_any<T> ? 8 : 16;  // columns of each side in a thread
};

template <typename A, Kind KIND>
struct PlainShared {
  Online<A, KIND> warps[PLAIN_THREADS / 32];
  Two<A> mixed[PLAIN_THREADS / 32];
  Facts<A> facts;
  A at_label;
};

template <typename T>
METAKD_DEVICE bool alike(const Row<T>& x, const Row<T>& y) {
  if constexpr (is_any<T>) return false;
  else return ((x.address() ^ y.address()) & 15) == 0;
}

template <typename T>
METAKD_DEVICE int head_of(const Row<T>& x) {
  if constexpr (is_any<T>) return 0;
  else return columns_to_boundary<T>(x.address());
}

// T: the dtype of both sides, or Any.
template <typename T, typename A, Kind KIND>
__global__ void __launch_bounds__(PLAIN_THREADS, Plain<T, A>::blocks)
    soft_kl_plain(const Job<A> job) {
  constexpr int CHUNK = Plain<T, A>::chunk;
  auto& shared = *reinterpret_cast<PlainShared<A, KIND>*>(dynamic_shared());
  constexpr int THREADS = PLAIN_THREADS;
  const int thread = threadIdx.x;
  // A backward starts where the forward ended: that is still in the L2.
  const int64_t row = job.given ? job.n - 1 - blockIdx.x : blockIdx.x;
  const Row<T> row_s = row_of<T>(job.student, job.dtype_s, row * job.stride_s);
  const Row<T> row_t = row_of<T>(job.teacher, job.dtype_t, row * job.stride_t);
  const auto out_row = [&] { return row_of<T>(job.dstudent, job.dtype_s, row * job.stride_d); };
  if (job.is_masked(row)) {
    if (thread == 0) write_masked(job, row);
    if (job.dstudent) store_zeros(out_row(), 0, job.width, thread, THREADS);
    return;
  }

  Facts<A> facts;
  if (job.given) {
    facts = read_facts(job, row);
  } else {
    const bool wide = alike(row_s, row_t);
    const Interior inside = Interior::of<T>(job.vocab, wide, head_of(row_s));
    const Walk<T, CHUNK, THREADS> walk(inside.size(), wide);
    const Row<T> in_s = row_s.shifted(inside.begin), in_t = row_t.shifted(inside.begin);
    Online<A, KIND> sums;
#pragma unroll 1
    for (int chunk = 0; chunk < walk.chunks; ++chunk) {
      A s[CHUNK], t[CHUNK];
      const int first = walk.first_column(chunk, thread);
      if (load_chunk(walk, first, in_s, in_t, s, t)) sums.absorb(s, t, job.rate, job.sum_1);
    }
    if (thread < inside.ragged()) {
      const int column = inside.ragged_column(thread);
      const A s[1] = {load_one<T, A>(row_s, column)}, t[1] = {load_one<T, A>(row_t, column)};
      sums.absorb(s, t, job.rate, job.sum_1);
    }
    if (thread == 0) {
      const int label = job.label_of(row);
      shared.at_label = label >= 0 ? load_one<T, A>(row_s, label) : A(0);
    }
    reduce_block(sums, shared.warps, [&](auto& x) { x.reduce(32, job.rate, job.sum_1); });
    if (thread == 0) shared.facts = facts = facts_of(sums, job);
    if constexpr (KIND == Kind::mixture) {
      block_sync();
      facts = shared.facts;
      const Slope<A, KIND> slope(facts, job, A(0), NO_LABEL);
      Two<A> mixed;
#pragma unroll 1
      for (int chunk = walk.chunks - 1; chunk >= 0; --chunk) {
        A s[CHUNK], t[CHUNK];
        const int first = walk.first_column(chunk, thread);
        if (!load_chunk(walk, first, in_s, in_t, s, t)) continue;
#pragma unroll
        for (int e = 0; e < CHUNK; ++e) slope.add_mixture(s[e], t[e], mixed);
      }
      if (thread < inside.ragged()) {
        const int column = inside.ragged_column(thread);
        slope.add_mixture(load_one<T, A>(row_s, column), load_one<T, A>(row_t, column), mixed);
      }
      reduce_block(mixed, shared.mixed, [](auto& x) { x.reduce(32); });
      if (thread == 0) {
        finish_mixture(facts, mixed, job);
        shared.facts = facts;
      }
    }
    if (thread == 0) write_facts(job, row, facts, value_of(facts, job, job.label_of(row), shared.at_label));
    if (!job.dstudent) return;
    block_sync();
    facts = shared.facts;
  }
  if (!job.dstudent) return;

  // In place: every read for the statistics came before the barrier above, and below a thread
  // overwrites what it has just read itself.
  const Row<T> out = out_row();
  const Slope<A, KIND> slope(facts, job, job.drows[row * job.drows_stride], job.label_of(row));
  const bool wide = alike(row_s, row_t) && alike(row_s, out);
  const Interior inside = Interior::of<T>(job.vocab, wide, head_of(row_s));
  const Walk<T, CHUNK, THREADS> walk(inside.size(), wide);
  const Row<T> in_s = row_s.shifted(inside.begin), in_t = row_t.shifted(inside.begin),
               to = out.shifted(inside.begin);
#pragma unroll 1
  for (int chunk = walk.chunks - 1; chunk >= 0; --chunk) {
    A s[CHUNK], t[CHUNK];
    const int first = walk.first_column(chunk, thread);
    if (!load_chunk(walk, first, in_s, in_t, s, t)) continue;
    slope.differentiate(s, t, [&](int e) { return inside.begin + walk.column(first, e); });
    store_chunk(walk, first, to, s);
  }
  if (thread < inside.ragged()) {
    const int column = inside.ragged_column(thread);
    A s[1] = {load_one<T, A>(row_s, column)};
    const A t[1] = {load_one<T, A>(row_t, column)};
    slope.differentiate(s, t, [&](int) { return column; });
    store_one<T, A>(out, column, s[0]);
  }
  store_zeros(out, job.vocab, job.width, thread, THREADS);
}

// one_read

constexpr int MOST_RANKS = 16, PORTABLE_RANKS = 8, MOST_STAGES = 4, THREADS = 512;
constexpr int LAG_STAGES = 3;  // with fewer, a lagging gradient would keep loads waiting
constexpr int LEAST_BYTES = 1 << 16;  // of a row of both sides

// How rows are laid over a cluster.
struct Plan {
  int ranks = 0, stages = 0;  // blocks of a cluster, 0: the plain kernel does better; rows in flight
  int span = 0;                            // columns of a block
  int buffer = 0;                          // bytes of one side in a stage
  int bytes = 0;                           // of shared memory
  bool lag = false;
};

// What a block has of a row.
template <typename T>
struct Part {
  static constexpr int VECTOR = Width<T>::vector;

  int first, last;       // its columns
  int from_s, from_t;    // where what it copies of each side begins
  int count_s, count_t;  // columns copied
  int begin, end;        // copied of both sides; the other columns are ragged
  bool wide;             // sides agree in alignment

  // Addresses are those of column 0.
  METAKD_BOTH Part(uint64_t address_s, uint64_t address_t, int vocab, int rank, int ranks, int span) {
    const int head = columns_to_boundary<T>(address_s);
    first = rank == 0 ? 0 : least(vocab, head + rank * span);
    last = rank == ranks - 1 ? vocab : least(vocab, head + (rank + 1) * span);
    int to_s, to_t;
    clip(address_s, from_s, to_s);
    clip(address_t, from_t, to_t);
    count_s = to_s - from_s;
    count_t = to_t - from_t;
    begin = from_s > from_t ? from_s : from_t;
    end = least(to_s, to_t);
    if (end <= begin) begin = end = first;
    wide = (from_s - from_t) % VECTOR == 0;
  }

  METAKD_BOTH int ragged() const { return last - first - (end - begin); }
  METAKD_BOTH int ragged_column(int i) const {
    const int column = first + i;
    return column < begin ? column : column + (end - begin);
  }

 private:
  static METAKD_BOTH int least(int x, int y) { return x < y ? x : y; }

  METAKD_BOTH void clip(uint64_t address, int& from, int& to) const {
    from = first + columns_to_boundary<T>(address + static_cast<uint64_t>(first) * sizeof(T));
    to = last - columns_past_boundary<T>(address + static_cast<uint64_t>(last) * sizeof(T));
    if (to <= from) from = to = first;
  }
};

// What the blocks of a cluster send each other of a row: every block stores its X into every block.
// There are two sets of slots. Who sends x + 2 has everybody's x + 1, and those were sent by warps that
// had read x before.
template <typename X>
struct Exchange {
  X slots[2][MOST_RANKS];
  uint64_t full[2];

  METAKD_DEVICE void init() {
    bytes_init(&full[0]);
    bytes_init(&full[1]);
  }

  // By warp 0: its first lanes send to a block each. x counts exchanges.
  METAKD_DEVICE void send(const X& value, int x, int lane, int rank, int ranks) {
    constexpr int WORDS = sizeof(X) / sizeof(float);
    uint64_t* const barrier = &full[x & 1];
    warp_sync();
    if (lane == 0) bytes_arm(barrier, ranks * sizeof(X));
    if (lane >= ranks) return;
    const float* const words = reinterpret_cast<const float*>(&value);
#pragma unroll
    for (int i = 0; i < WORDS; ++i)
      remote_store(reinterpret_cast<float*>(&slots[x & 1][rank]) + i, words[i], lane, barrier);
  }

  METAKD_DEVICE X receive(int x, int lane, int ranks) {
    remote_bytes_wait(&full[x & 1], (x >> 1) & 1);
    return lane < ranks ? slots[x & 1][lane] : X();
  }
};

template <Kind KIND>
struct ClusterShared {
  uint64_t full[MOST_STAGES];
  Exchange<Online<float, KIND>> sums;
  Exchange<Two<float>> mixed;
  Online<float, KIND> warps[THREADS / 32];
  Two<float> mixed_warps[THREADS / 32];
  Slope<float, KIND> slopes[2];
  Facts<float> facts;
  float at_label, drow;  // thread 0's
  int label;
  bool masked[MOST_STAGES];
};

constexpr int rounded(int x, int to) { return (x + to - 1) / to * to; }

// Bytes before the stages.
template <Kind KIND>
constexpr int SHARED_HEAD = rounded(sizeof(ClusterShared<KIND>), 128);

// For rows of `vocab` classes of `size` bytes; `limit`: shared memory that a block may have.
template <Kind KIND>
Plan plan_for(int vocab, int size, int limit) {
  Plan plan;
  // Rows that all blocks of the plain kernel have under way fit the L2 then: a second look is free.
  if (static_cast<int64_t>(vocab) * size * 2 < LEAST_BYTES) return plan;
  // Three stages, if need be two, or one; and the fewest blocks.
  for (int wanted = LAG_STAGES; wanted > 0; --wanted)
    for (int ranks = 1; ranks <= MOST_RANKS; ranks *= 2) {
      // A cluster of 16 is not portable: only for rows that fit no other.
      if (ranks > PORTABLE_RANKS && wanted > 1) continue;
      const int span = rounded((vocab + ranks - 1) / ranks, 8);
      const int buffer = rounded((span + 8) * size, 128);
      int stages = (limit - SHARED_HEAD<KIND>) / (2 * buffer);
      if (stages < wanted) continue;
      if (stages > MOST_STAGES) stages = MOST_STAGES;
      plan.ranks = ranks;
      plan.stages = stages;
      plan.span = span;
      plan.buffer = buffer;
      plan.bytes = SHARED_HEAD<KIND> + stages * 2 * buffer;
      plan.lag = stages >= LAG_STAGES;
      return plan;
    }
  return plan;
}

// gridDim.x is a multiple of plan.ranks and at most N * plan.ranks.
template <typename T, Kind KIND>
__global__ void __launch_bounds__(THREADS, 1) soft_kl_one_read(const Job<float> job, const Plan plan) {
#if METAKD_HAS_CLUSTERS
  using A = float;
  constexpr int CHUNK = KIND == Kind::mixture ? Width<T>::vector : 8;
  using RowWalk = Walk<T, CHUNK, THREADS>;
  auto& shared = *reinterpret_cast<ClusterShared<KIND>*>(dynamic_shared());
  char* const buffers = dynamic_shared() + SHARED_HEAD<KIND>;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int ranks = plan.ranks, rank = cluster_rank();
  const int cluster = blockIdx.x / ranks, clusters = gridDim.x / ranks;
  // Rows of the cluster, counted from 0 within it.
  const int mine = (static_cast<int>(job.n) - cluster + clusters - 1) / clusters;
  const auto row_at = [&](int i) { return static_cast<int64_t>(cluster + i * clusters); };
  const auto student = [&](int i) { return row_of<T>(job.student, job.dtype_s, row_at(i) * job.stride_s); };
  const auto teacher = [&](int i) { return row_of<T>(job.teacher, job.dtype_t, row_at(i) * job.stride_t); };
  const auto part_of = [&](int i) {
    return Part<T>(student(i).address(), teacher(i).address(), job.vocab, rank, ranks, plan.span);
  };
  const auto walk_of = [&](const Part<T>& part) { return RowWalk(part.end - part.begin, part.wide); };
  // In shared memory: a side of a stage, and in it the first column that is there of both sides.
  const auto buffer = [&](int stage, int side) { return buffers + (2 * stage + side) * plan.buffer; };
  const auto copied_s = [&](const Part<T>& part, int stage) {
    return Row<T>{reinterpret_cast<T*>(buffer(stage, 0)) + (part.begin - part.from_s)};
  };
  const auto copied_t = [&](const Part<T>& part, int stage) {
    return Row<T>{reinterpret_cast<T*>(buffer(stage, 1)) + (part.begin - part.from_t)};
  };

  // One thread of the last warp (the first has the most to do otherwise) starts loads.
  const bool loads = thread == THREADS - 32;
  bool next_masked = loads && job.is_masked(row_at(0));
  const auto start_load = [&](int i, int stage) {
    const bool masked = next_masked;
    uint64_t* const full = &shared.full[stage];
    shared.masked[stage] = masked;
    if (masked) {
      bytes_arm(full, 0);
    } else {
      const Part<T> part = part_of(i);
      const uint32_t bytes_s = part.count_s * sizeof(T), bytes_t = part.count_t * sizeof(T);
      bytes_arm(full, bytes_s + bytes_t);
      if (bytes_s > 0) bulk_load(buffer(stage, 0), student(i).at + part.from_s, bytes_s, full);
      if (bytes_t > 0) bulk_load(buffer(stage, 1), teacher(i).at + part.from_t, bytes_t, full);
    }
    if (i + 1 < mine) next_masked = job.is_masked(row_at(i + 1));
  };

  if (thread == 0) {
#pragma unroll
    for (int stage = 0; stage < MOST_STAGES; ++stage) bytes_init(&shared.full[stage]);
    shared.sums.init();
    shared.mixed.init();
    bytes_init_done();
  }
  // Nobody stores into a block that is not ready. Blocks may end, too: who has received everything of
  // the last row has nothing to come any more.
  cluster_sync();
  if (loads)
    for (int i = 0; i < plan.stages && i < mine; ++i) start_load(i, i);

  // Thread 0 asks for what it needs of a row besides logits while the row before is computed.
  int next_label = thread == 0 ? job.label_of(row_at(0)) : NO_LABEL;
  A next_drow = thread == 0 && job.dstudent ? job.drows[row_at(0) * job.drows_stride] : A(0);

  const int lag = plan.lag ? 1 : 0;
  int stage = 0, parity = 0;   // of row i
  int x = 0;                   // exchanges so far
#pragma unroll 1
  for (int i = 0; i < mine + lag; ++i) {
    bool masked = false;
    if (i < mine) {
      if (thread == 0) {
        shared.label = next_label;
        shared.drow = next_drow;
        if (i + 1 < mine) {
          next_label = job.label_of(row_at(i + 1));
          if (job.dstudent) next_drow = job.drows[row_at(i + 1) * job.drows_stride];
        }
      }
      bytes_wait(&shared.full[stage], parity);
      masked = shared.masked[stage];
      if (!masked) {
        // What is here of row i.
        Online<A, KIND> sums;
        const Part<T> part = part_of(i);
        const bool ragged = thread < part.ragged();
        A at_label = 0, ragged_s[1], ragged_t[1];
        if (rank == 0 && thread == 0 && shared.label >= 0)
          at_label = load_one<T, A>(student(i), shared.label);
        if (ragged) {
          ragged_s[0] = load_one<T, A>(student(i), part.ragged_column(thread));
          ragged_t[0] = load_one<T, A>(teacher(i), part.ragged_column(thread));
        }
        const RowWalk walk = walk_of(part);
        const Row<T> row_s = copied_s(part, stage), row_t = copied_t(part, stage);
#pragma unroll 1
        for (int chunk = 0; chunk < walk.chunks; ++chunk) {
          A s[CHUNK], t[CHUNK];
          if (load_chunk(walk, walk.first_column(chunk, thread), row_s, row_t, s, t))
            sums.absorb(s, t, job.rate, job.sum_1);
        }
        if (ragged) sums.absorb(ragged_s, ragged_t, job.rate, job.sum_1);
        // Read before it is sent that this block is through with the row: after that, another block may
        // overwrite the label's logit with its gradient.
        if (rank == 0 && thread == 0) shared.at_label = at_label;
        reduce_block(sums, shared.warps, [&](auto& y) { y.reduce(32, job.rate, job.sum_1); });
        if (warp == 0) shared.sums.send(sums, x, lane, rank, ranks);
      }
    }

    // Two steps, in the order that `lag` asks for.
#pragma unroll 1
    for (int step = 0; step < 2; ++step) {
      if (step == lag) {
        // Finish row i with what all blocks have of it.
        if (i >= mine) continue;
        if (masked) {
          if (rank == 0 && thread == 0) write_masked(job, row_at(i));
          block_sync();
          continue;
        }
        if (warp == 0) {
          Online<A, KIND> sums = shared.sums.receive(x, lane, ranks);
          sums.reduce(MOST_RANKS, job.rate, job.sum_1);
          if (lane == 0) shared.facts = facts_of(sums, job);
        }
        if constexpr (KIND == Kind::mixture) {
          block_sync();
          Two<A> mixed;
          const Slope<A, KIND> slope(shared.facts, job, A(0), NO_LABEL);
          const Part<T> part = part_of(i);
          const RowWalk walk = walk_of(part);
          const Row<T> row_s = copied_s(part, stage), row_t = copied_t(part, stage);
#pragma unroll 1
          for (int chunk = 0; chunk < walk.chunks; ++chunk) {
            A s[CHUNK], t[CHUNK];
            if (!load_chunk(walk, walk.first_column(chunk, thread), row_s, row_t, s, t)) continue;
#pragma unroll
            for (int e = 0; e < CHUNK; ++e) slope.add_mixture(s[e], t[e], mixed);
          }
          if (thread < part.ragged()) {
            const int column = part.ragged_column(thread);
            slope.add_mixture(load_one<T, A>(student(i), column), load_one<T, A>(teacher(i), column), mixed);
          }
          reduce_block(mixed, shared.mixed_warps, [](auto& y) { y.reduce(32); });
          if (warp == 0) {
            shared.mixed.send(mixed, x, lane, rank, ranks);
            mixed = shared.mixed.receive(x, lane, ranks);
            mixed.reduce(MOST_RANKS);
            if (lane == 0) finish_mixture(shared.facts, mixed, job);
          }
        }
        if (thread == 0) {
          const Facts<A> facts = shared.facts;
          shared.slopes[i & 1] = Slope<A, KIND>(facts, job, shared.drow, shared.label);
          if (rank == 0) write_facts(job, row_at(i), facts, value_of(facts, job, shared.label, shared.at_label));
        }
        block_sync();
        ++x;
      } else {
        // The gradient of row j, over the student's logits or elsewhere.
        const int j = i - lag;
        if (j < 0 || !job.dstudent) continue;
        const int from = stage >= lag ? stage - lag : plan.stages - 1;
        const Row<T> out = row_of<T>(job.dstudent, job.dtype_s, row_at(j) * job.stride_d);
        const Part<T> part = part_of(j);
        if (shared.masked[from]) {
          store_zeros(out, part.first, part.last, thread, THREADS);
        } else {
          const Slope<A, KIND> slope = shared.slopes[j & 1];
          const bool ragged = thread < part.ragged();
          const int ragged_column = part.ragged_column(thread);
          A ragged_s[1], ragged_t[1];
          if (ragged) {
            ragged_s[0] = load_one<T, A>(student(j), ragged_column);
            ragged_t[0] = load_one<T, A>(teacher(j), ragged_column);
          }
          const RowWalk walk = walk_of(part);
          const Row<T> row_s = copied_s(part, from), row_t = copied_t(part, from);
          const Row<T> to = out.shifted(part.begin);
#pragma unroll 1
          for (int chunk = 0; chunk < walk.chunks; ++chunk) {
            A s[CHUNK], t[CHUNK];
            const int first = walk.first_column(chunk, thread);
            if (!load_chunk(walk, first, row_s, row_t, s, t)) continue;
            slope.differentiate(s, t, [&](int e) { return part.begin + walk.column(first, e); });
            store_chunk(walk, first, to, s);
          }
          if (ragged) {
            slope.differentiate(ragged_s, ragged_t, [&](int) { return ragged_column; });
            store_one<T, A>(out, ragged_column, ragged_s[0]);
          }
        }
        store_zeros(out, job.vocab, job.width, rank * THREADS + thread, ranks * THREADS);
      }
    }

    // The stage of row i - lag is free once all threads are through with it: a lagging gradient came
    // before the barrier that finishing a row ends with.
    if (lag == 0) block_sync();
    const int next = i - lag + plan.stages;
    if (loads && i >= lag && next < mine) start_load(next, stage >= lag ? stage - lag : plan.stages - 1);
    if (++stage == plan.stages) stage = 0, parity ^= 1;
  }
#endif
}

}  // namespace metakd::soft_kl
