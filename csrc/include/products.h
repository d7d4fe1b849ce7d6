// Matrix products on a CPU, for one instruction set (see vectors.h). Torch-free.
//
// Small products of matrices that lie in the cache, where a library's call, packing and threads cost
// more than they bring. One kernel: ROWS x 2 vectors of sums stay in registers (of which the oldest
// processors have 16) while the inner dimension is walked; the left matrix is read a number at a time,
// in either orientation, the right one by vectors. Sums are taken in one order whatever else is
// computed beside them.

#include "vectors.h"

namespace METAKD_ISA {

constexpr int ROWS = 6;

// A line of the cache in numbers: widths of matrices in scratch memory are multiples of it, so that
// the same memory serves every instruction set.
template <class A>
constexpr int64_t LINE = 64 / sizeof(A);

METAKD_INLINE int64_t round_up(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

// One term of a sum of products: entry (i, k) of the left matrix is left[i * row + k * step], entry
// (k, j) of the right one right[k * stride + j].
template <class A>
struct Factors {
  const A* left;
  int64_t row, step;
  const A* right;
  int64_t stride, depth;
};

template <class A, int VECTORS>
METAKD_NOINLINE void tile(
    const Factors<A>* terms, int count, int64_t first, A* to, int64_t stride, bool add) {
  constexpr int W = Float<A>::lanes;
  Vector<A> sum[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < VECTORS; ++j)
      sum[i][j] = add ? load(to + i * stride + j * W) : Vector<A>{};
  for (const Factors<A>* term = terms; term < terms + count; ++term) {
    const int64_t row = term->row, step = term->step, right_stride = term->stride;
    const A* left = term->left + first * row;
    const A* right = term->right;
    for (int64_t k = term->depth; k > 0; --k, left += step, right += right_stride) {
      Vector<A> other[VECTORS];
#pragma GCC unroll 2
      for (int j = 0; j < VECTORS; ++j) other[j] = load(right + j * W);
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) {
        const Vector<A> one = every(left[i * row]);
#pragma GCC unroll 2
        for (int j = 0; j < VECTORS; ++j) sum[i][j] += one * other[j];
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < VECTORS; ++j) store(to + i * stride + j * W, sum[i][j]);
}

// to = sum of ``count`` (1 or 2) products, or to += it. ``columns`` is a multiple of a vector. Up to
// ROWS - 1 rows after the last of ``to`` are overwritten, and as many of the left matrices read.
template <class A>
METAKD_INLINE void multiply(const Factors<A>* terms, int count, int64_t rows, int64_t columns, A* to,
                            int64_t stride, bool add) {
  constexpr int64_t W = Float<A>::lanes;
  Factors<A> here[2] = {terms[0], terms[count - 1]};
  for (int64_t column = 0; column < columns; column += 2 * W) {
    for (int k = 0; k < count; ++k) here[k].right = terms[k].right + column;
    if (column + W < columns)
      for (int64_t row = 0; row < rows; row += ROWS)
        tile<A, 2>(here, count, row, to + row * stride + column, stride, add);
    else
      for (int64_t row = 0; row < rows; row += ROWS)
        tile<A, 1>(here, count, row, to + row * stride + column, stride, add);
  }
}

// W rows of W columns, transposed: to[column * to_stride + row].
template <class A>
METAKD_INLINE void transpose_block(const A* from, int64_t from_stride, A* to, int64_t to_stride) {
  constexpr int W = Float<A>::lanes;
  Vector<A> v[W], next[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) v[i] = load(from + i * from_stride);
  // Shuffling rows i and i + W / 2 into each other, as often as halving W leaves 1.
#pragma GCC unroll 4
  for (int stage = 1; stage < W; stage *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) {
      next[2 * i] = shuffle<A>(v[i], v[i + W / 2], [](int lane) METAKD_LAMBDA {
        return lane / 2 + (lane % 2) * W;
      });
      next[2 * i + 1] = shuffle<A>(v[i], v[i + W / 2], [](int lane) METAKD_LAMBDA {
        return W / 2 + lane / 2 + (lane % 2) * W;
      });
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) v[i] = next[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) store(to + i * to_stride, v[i]);
}

// ``rows`` and ``columns`` are multiples of W.
template <class A>
METAKD_NOINLINE void transpose(
    const A* from, int64_t from_stride, int64_t rows, int64_t columns, A* to, int64_t to_stride) {
  constexpr int W = Float<A>::lanes;
  for (int64_t row = 0; row < rows; row += W)
    for (int64_t column = 0; column < columns; column += W)
      transpose_block(from + row * from_stride + column, from_stride, to + column * to_stride + row,
                      to_stride);
}

}  // namespace METAKD_ISA
