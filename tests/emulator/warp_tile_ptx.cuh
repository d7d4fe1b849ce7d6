// The hardware of csrc/include/warp_tile_ptx.cuh, emulated (see device.h). What each function promises
// is said there.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <rowwise_ptx.cuh>

#define METAKD_HAS_TILES 1

namespace emulator {

// What the lanes of a warp do at once: `all(words)` sees every lane's and may change them.
template <typename Words, typename All>
inline void together(Words& own, int action, All all) {
  Warp& warp = this_block().warps[device.running->thread / WARP];
  const int lane = device.running->thread % WARP;
  auto& places = warp.words[warp.turn];
  static_assert(sizeof(Words) <= sizeof(places[0]));
  std::memcpy(places[lane], &own, sizeof(Words));
  if (warp.meeting.arrived == WARP - 1) {
    warp.turn ^= 1;
    Words words[WARP];
    for (int i = 0; i < WARP; ++i) std::memcpy(&words[i], places[i], sizeof(Words));
    all(words);
    for (int i = 0; i < WARP; ++i) std::memcpy(places[i], &words[i], sizeof(Words));
  }
  warp.meeting.meet(WARP, action);
  std::memcpy(&own, places[lane], sizeof(Words));
}

inline bool is_shared(const void* place, size_t bytes) {
  const char* const at = static_cast<const char*>(place);
  return at >= this_block().shared && at + bytes <= this_block().shared + device.bytes;
}

// Towards zero, as tensor cores do it.
inline float truncated(double x) {
  const float y = static_cast<float>(x);
  return std::fabs(static_cast<double>(y)) > std::fabs(x) ? std::nextafterf(y, 0.0f) : y;
}

template <typename T>
inline float half_at(const uint32_t* words, int i) {
  const auto bits = static_cast<unsigned short>(words[i / 2] >> (16 * (i % 2)));
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __bfloat162float(__ushort_as_bfloat16(bits));
  else return __half2float(__ushort_as_half(bits));
}

}  // namespace emulator

namespace metakd {

// Lands when it is waited for; until then the place is NaN.
template <int BYTES>
inline void copy_async(void* to, const void* from, bool real) {
  using namespace emulator;
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % BYTES)
    return fail("an asynchronous copy is misaligned");
  if (!is_shared(to, BYTES)) return fail("an asynchronous copy ends outside shared memory");
  std::memset(to, 0xff, BYTES);
  device.running->copies.back().push_back([=] {
    if (real) std::memcpy(to, from, BYTES);
    else std::memset(to, 0, BYTES);
  });
}

inline void copies_commit() { emulator::device.running->copies.emplace_back(); }

template <int LEFT>
inline void copies_wait() {
  using namespace emulator;
  if (is_broken(Broken::copies_wait)) return;
  auto& groups = device.running->copies;  // the last is not committed yet
  while (groups.size() > LEFT + 1) {
    for (const auto& copy : groups.front()) copy();
    groups.pop_front();
  }
}

template <bool TRANSPOSED>
inline void load_matrices(uint32_t (&x)[4], const void* row) {
  using namespace emulator;
  struct Words {
    const void* row;
    uint32_t x[4];
  } own = {row, {}};
  if (reinterpret_cast<uintptr_t>(row) % 16) return fail("a row of a matrix is misaligned");
  if (!is_shared(row, 16)) return fail("a row of a matrix is outside shared memory");
  together(own, 100 + TRANSPOSED, [](Words* words) {
    for (int lane = 0; lane < WARP; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t pair[2];
        for (int i = 0; i < 2; ++i) {
          const int r = TRANSPOSED ? lane % 4 * 2 + i : lane / 4, c = TRANSPOSED ? lane / 4 : lane % 4 * 2 + i;
          pair[i] = static_cast<const uint16_t*>(words[8 * matrix + r].row)[c];
        }
        words[lane].x[matrix] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
      }
  });
  std::memcpy(x, own.x, sizeof(x));
}

template <typename T>
inline void multiply_add(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  using namespace emulator;
  struct Words {
    uint32_t a[4], b[2];
    float c[4];
  } own = {{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
  together(own, 102, [](Words* words) {
    float x[16][16], y[16][8];
    for (int lane = 0; lane < WARP; ++lane) {
      const int g = lane / 4, q = lane % 4 * 2;
      for (int i = 0; i < 8; ++i) x[g + i / 2 % 2 * 8][q + i / 4 * 8 + i % 2] = half_at<T>(words[lane].a, i);
      for (int i = 0; i < 4; ++i) y[q + i / 2 * 8 + i % 2][g] = half_at<T>(words[lane].b, i);
    }
    for (int lane = 0; lane < WARP; ++lane)
      for (int i = 0; i < 4; ++i) {
        double sum = words[lane].c[i];
        for (int k = 0; k < 16; ++k)
          sum += static_cast<double>(x[lane / 4 + i / 2 * 8][k]) * y[k][lane % 4 * 2 + i % 2];
        words[lane].c[i] = truncated(sum);
      }
  });
  std::memcpy(c, own.c, sizeof(own.c));
}

}  // namespace metakd
