// Products of 32 x 32 tiles, a tile a warp, with operands in shared memory: on tensor cores where these
// are of half precision, by fused multiply-adds in full precision where they are float or double.
// Torch-free. One arrangement of a tile in the registers of a warp serves both, so kernels are written
// once.
//
// Rows in shared memory are padded by 16 bytes: eight rows then lie in different banks, whichever way
// they are read.
//
// Tensor cores truncate their sums. So nothing is summed in them for long: a product starts from zero and
// is added to what came before by an ordinary addition.
//
// What is not exact in half precision (a Gram matrix, a difference of scores) becomes a sum of pieces
// that are: x = p0 + p1 + ... with each p the rounding of what is left. Each tile of it is scaled by a
// power of two first, so that float16 has the range for it.

#pragma once

#include <rowwise.cuh>
#include <warp_tile_ptx.cuh>

namespace metakd {

constexpr int TILE = 32;

// The type that products of C are summed in.
template <typename C>
using Sum = std::conditional_t<std::is_same_v<C, double>, double, float>;

template <typename C>
constexpr bool on_tensor_cores = sizeof(C) == 2;

// Elements that pad a row in shared memory.
template <typename C>
constexpr int PADDING = 16 / static_cast<int>(sizeof(C));

// Pieces that hold a float as exactly as products need it: all of its bits, or twice the bits of C.
template <typename C>
constexpr int FULL_PIECES = std::is_same_v<C, __nv_bfloat16> ? 3 : on_tensor_cores<C> ? 2 : 1;
template <typename C>
constexpr int TWO_PIECES = on_tensor_cores<C> ? 2 : 1;

template <typename A>
struct Tile {
  A at[TILE] = {};  // of a lane

  static METAKD_BOTH int row(int e, int lane) { return e / 16 * 16 + e % 4 / 2 * 8 + lane / 4; }
  // Elements 2 i and 2 i + 1 are neighbours in a row.
  static METAKD_BOTH int column(int e, int lane) { return e / 4 % 4 * 8 + lane % 4 * 2 + e % 2; }

  METAKD_DEVICE void add(const Tile& other, A factor = 1) {
#pragma unroll
    for (int e = 0; e < TILE; ++e) at[e] += factor * other.at[e];
  }
  METAKD_DEVICE void scale(A factor) {
#pragma unroll
    for (int e = 0; e < TILE; ++e) at[e] *= factor;
  }
};

// How an operand lies in shared memory: its row index or its column index is that of the row there.
enum class Lies : bool { by_row, by_column };

// tile += x y, x [32, depth], y [depth, 32]; depth is a multiple of 16. x and y may be sums of PIECES_X
// and PIECES_Y pieces, `apart` elements from each other.
template <Lies X, Lies Y, int PIECES_X = 1, int PIECES_Y = 1, typename C, typename A>
METAKD_DEVICE void multiply(Tile<A>& tile, const C* x, int stride_x, const C* y, int stride_y, int depth,
                            int apart = 0) {
  const int lane = threadIdx.x % 32;
  constexpr bool X_ROWS = X == Lies::by_row, Y_ROWS = Y == Lies::by_row;
  if constexpr (on_tensor_cores<C>) {
    // Where a lane points to in a 16 x 16 part: in the order (row, column) of matrices 00 10 01 11 or
    // 00 01 10 11.
    const int row_1 = lane % 16, column_1 = lane / 16 * 8;
    const int row_2 = lane % 8 + lane / 16 * 8, column_2 = lane / 8 % 2 * 8;
    x += (X_ROWS ? row_1 : row_2) * stride_x + (X_ROWS ? column_1 : column_2);
    y += (Y_ROWS ? row_1 : row_2) * stride_y + (Y_ROWS ? column_1 : column_2);
#pragma unroll 1
    for (int k = 0; k < depth; k += 16) {
      uint32_t a[PIECES_X][2][4], b[PIECES_Y][2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < PIECES_X; ++i)
          load_matrices<!X_ROWS>(a[i][half], x + i * apart + 16 * half * (X_ROWS ? stride_x : 1));
#pragma unroll
        for (int i = 0; i < PIECES_Y; ++i)
          load_matrices<Y_ROWS>(b[i][half], y + i * apart + 16 * half * (Y_ROWS ? 1 : stride_y));
      }
#pragma unroll
      for (int piece = 0; piece < PIECES_X * PIECES_Y; ++piece)
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const auto& right = b[piece % PIECES_Y][j / 2];
            multiply_add<C>(tile.at + 16 * i + 4 * j, a[piece / PIECES_Y][i], right[j % 2 * 2],
                            right[j % 2 * 2 + 1]);
          }
      x += 16 * (X_ROWS ? 1 : stride_x);
      y += 16 * (Y_ROWS ? stride_y : 1);
    }
  } else {
    static_assert(PIECES_X == 1 && PIECES_Y == 1);
    const int step_x = X_ROWS ? 1 : stride_x, across_x = X_ROWS ? stride_x : 1;
    const int step_y = Y_ROWS ? stride_y : 1, across_y = Y_ROWS ? 1 : stride_y;
    x += lane / 4 * across_x;
    y += lane % 4 * 2 * across_y;
#pragma unroll 2
    for (int k = 0; k < depth; ++k) {
      A a[4], b[8];
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = x[8 * i * across_x];
#pragma unroll
      for (int j = 0; j < 8; ++j) b[j] = y[(j / 2 * 8 + j % 2) * across_y];
#pragma unroll
      for (int e = 0; e < TILE; ++e) tile.at[e] += a[e / 16 * 2 + e % 4 / 2] * b[e / 4 % 4 * 2 + e % 2];
      x += step_x;
      y += step_y;
    }
  }
}

template <typename C, typename A>
METAKD_DEVICE C rounded_to(A x) {
  if constexpr (std::is_same_v<C, __nv_bfloat16>) return __float2bfloat16_rn(x);
  else if constexpr (on_tensor_cores<C>) return __float2half_rn(x);
  else return x;
}

template <typename C, typename A>
METAKD_DEVICE A widened(C x) {
  if constexpr (std::is_same_v<C, __nv_bfloat16>) return __bfloat162float(x);
  else if constexpr (on_tensor_cores<C>) return __half2float(x);
  else return x;
}

// Stores a tile's pieces, `apart` elements from each other; the result is what its products are to be
// multiplied by.
template <int PIECES, typename C, typename A>
METAKD_DEVICE A store_pieces(const Tile<A>& tile, C* to, int stride, int apart) {
  const int lane = threadIdx.x % 32;
  A scale = 1, inverse = 1;
  if constexpr (on_tensor_cores<C>) {
    float largest = 0;
#pragma unroll
    for (int e = 0; e < TILE; ++e) largest = fmaxf(largest, fabsf(tile.at[e]));
    for (int offset = 16; offset > 0; offset /= 2) largest = fmaxf(largest, shuffle_xor(largest, offset));
    // To between 2^14 and 2^15, by the exponent's bits; 0 and what is next to nothing stay small.
    const int exponent = static_cast<int>(__float_as_uint(largest) >> 23);
    const int bounded = exponent < 15 ? 15 : exponent > 254 ? 254 : exponent;
    scale = __uint_as_float(static_cast<uint32_t>(268 - bounded) << 23);
    inverse = 1 / scale;
  }
#pragma unroll
  for (int e = 0; e < TILE; ++e) {
    A left = tile.at[e] * scale;
    C* const place = to + tile.row(e, lane) * stride + tile.column(e, lane);
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
      const C rounded = rounded_to<C>(left);
      place[piece * apart] = rounded;
      left -= widened<C, A>(rounded);
    }
  }
  return inverse;
}

template <typename A>
METAKD_DEVICE A warp_sum(A x) {
  for (int offset = 16; offset > 0; offset /= 2) x += shuffle_xor(x, offset);
  return x;
}

}  // namespace metakd
