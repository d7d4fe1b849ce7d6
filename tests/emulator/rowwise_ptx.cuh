// The hardware of csrc/include/rowwise_ptx.cuh, emulated (see device.h). Found before that file, it lets
// a host compiler take the kernels as they are. What each function promises is said there.

#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include <device.h>

#define METAKD_HAS_CLUSTERS 1

#ifndef __launch_bounds__
#define __launch_bounds__(...)
#endif

#define threadIdx (emulator::Index{static_cast<unsigned>(emulator::device.running->thread)})
#define blockIdx (emulator::Index{static_cast<unsigned>(emulator::device.running->block->index)})
#define blockDim (emulator::Index{emulator::device.threads})
#define gridDim (emulator::Index{emulator::device.grid})

inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline double __longlong_as_double(long long bits) { return std::bit_cast<double>(bits); }

namespace emulator {

struct Index {
  unsigned x;
};

inline Block& this_block() { return *device.running->block; }

inline size_t offset_of(const Block& block, const void* shared) {
  return static_cast<const char*>(shared) - block.shared;
}

inline ByteBarrier& barrier_at(Block& block, size_t offset) {
  const auto found = block.barriers.find(offset);
  if (found != block.barriers.end()) return found->second;
  fail("a barrier is used before it is made");
  return block.barriers[offset];
}

inline ByteBarrier& own_barrier(const uint64_t* barrier) {
  return barrier_at(this_block(), offset_of(this_block(), barrier));
}

inline void wait_for_bytes(const uint64_t* at, uint32_t parity, Broken which) {
  ByteBarrier& barrier = own_barrier(at);
  if (is_broken(which)) return maybe_lose_turn();
  while (barrier.parity == parity) barrier.waiting.wait();
}

// As wrong as the instructions may be (2 roundings), for better or worse by the bits of x.
inline float off_by(float size, float x) {
  const uint32_t hash = (std::bit_cast<uint32_t>(x) * 2654435761u) >> 8;
  return size * (static_cast<float>(hash) * 0x1p-23f - 1.0f);
}

}  // namespace emulator

namespace metakd {

using std::exp;
using std::log;

inline float exp2_of(float x) {
  const float y = exp2f(x);
  if (y < 0x1p-126f) return 0.0f;
  return x == 0.0f || !std::isfinite(y) ? y : y * (1.0f + emulator::off_by(0x1p-22f, x));
}

inline double exp2_of(double x) { return exp2(x); }

inline float log2_of(float x) {
  const float y = log2f(x);
  if (y == 0.0f || !std::isfinite(y)) return y;
  return y + emulator::off_by(0x1p-22f, x) * (x > 0.5f && x < 2.0f ? 1.0f : y);
}

inline double log2_of(double x) { return log2(x); }

inline void warp_sync() {
  using namespace emulator;
  this_block().warps[device.running->thread / WARP].meeting.meet(WARP);
}

template <typename A>
inline A shuffle_xor(A x, int offset) {
  using namespace emulator;
  Warp& warp = this_block().warps[device.running->thread / WARP];
  const int lane = device.running->thread % WARP;
  auto& words = warp.words[warp.turn];
  static_assert(sizeof(A) <= sizeof(words[0]));
  std::memcpy(words[lane], &x, sizeof(A));
  if (warp.meeting.arrived == WARP - 1) warp.turn ^= 1;
  warp.meeting.meet(WARP, offset);
  std::memcpy(&x, words[lane ^ offset], sizeof(A));
  return x;
}

inline void block_sync() {
  using namespace emulator;
  if (device.running->block_barriers++ > 0 && is_broken(Broken::block_sync)) return maybe_lose_turn();
  this_block().meeting.meet(static_cast<int>(device.threads));
}

// Blocks that come one after another need no more.
inline bool is_last_block(int* ticket, int count) { return (*ticket)++ == count - 1; }

template <typename A>
inline A load_other(const A* x) {
  return *x;
}

inline char* dynamic_shared() { return emulator::this_block().shared; }

inline int cluster_rank() { return emulator::this_block().rank; }

inline void cluster_sync() {
  using namespace emulator;
  if (is_broken(Broken::cluster_sync)) return maybe_lose_turn();
  device.cluster_meeting.meet(static_cast<int>(device.cluster.size() * device.threads));
}

inline void bytes_init(uint64_t* barrier) {
  using namespace emulator;
  this_block().barriers[offset_of(this_block(), barrier)] = ByteBarrier();
}

inline void bytes_init_done() {}

inline void bytes_arm(uint64_t* at, uint32_t bytes) {
  using namespace emulator;
  ByteBarrier& barrier = own_barrier(at);
  if (barrier.armed) return fail("a barrier is armed twice in a phase");
  if (bytes > BYTES_LIMIT) return fail("a barrier cannot count " + std::to_string(bytes) + " bytes");
  barrier.armed = true;
  barrier.count(-static_cast<int64_t>(bytes));
}

inline void bytes_wait(uint64_t* barrier, uint32_t parity) {
  emulator::wait_for_bytes(barrier, parity, emulator::Broken::bytes_wait);
}

inline void remote_bytes_wait(uint64_t* barrier, uint32_t parity) {
  emulator::wait_for_bytes(barrier, parity, emulator::Broken::remote_bytes_wait);
}

inline void remote_store(float* here, float value, int rank, uint64_t* barrier) {
  using namespace emulator;
  Block& to = device.cluster[rank];
  char* const there = to.shared + offset_of(this_block(), here);
  const size_t its_barrier = offset_of(this_block(), barrier);
  barrier_at(to, its_barrier);
  device.under_way.push_back([=, &to] {
    if (to.ended == static_cast<int>(device.threads)) return fail("a store lands in a block that has ended");
    std::memcpy(there, &value, sizeof(value));
    barrier_at(to, its_barrier).count(sizeof(value));
  });
}

inline void bulk_load(void* to, const void* from, uint32_t bytes, uint64_t* at) {
  using namespace emulator;
  const size_t offset = offset_of(this_block(), to);
  if ((offset | reinterpret_cast<uintptr_t>(from) | bytes) % 16) return fail("a bulk copy is misaligned");
  if (offset + bytes > device.bytes) return fail("a bulk copy ends beyond shared memory");
  ByteBarrier& barrier = own_barrier(at);
  std::memset(to, 0xff, bytes);  // NaN until it is there
  device.under_way.push_back([=, &barrier] {
    std::memcpy(to, from, bytes);
    barrier.count(bytes);
  });
}

}  // namespace metakd
