// What row-wise kernels ask of the hardware and C++ has no word for. Torch-free. Everything here is an
// instruction or two, so that the algorithms above it (rowwise.cuh, <op>.cuh) read as C++.
//
// The functions from `cluster_rank` on exist for sm_90 and newer; for older targets they are empty, and
// no host code launches a kernel that calls them there.

#pragma once

#include <cstdint>

namespace metakd {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define METAKD_HAS_CLUSTERS 1
#else
#define METAKD_HAS_CLUSTERS 0
#endif

// 2^x; results below 2^-126 are 0. One instruction, error below 2 ulp.
__host__ __device__ __forceinline__ float exp2_of(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

__host__ __device__ __forceinline__ double exp2_of(double x) { return exp2(x); }

// log2 x for normal x. One instruction, error below 2^-22 (absolute between 1/2 and 2, else relative).
__host__ __device__ __forceinline__ float log2_of(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return log2f(x);
#endif
}

__host__ __device__ __forceinline__ double log2_of(double x) { return log2(x); }

__device__ __forceinline__ void warp_sync() { __syncwarp(); }

template <typename A>
__device__ __forceinline__ A shuffle_xor(A x, int offset) {
  return __shfl_xor_sync(0xffffffffu, x, offset);
}

__device__ __forceinline__ void block_sync() { __syncthreads(); }

// Whether `count` - 1 other blocks have been here; who is last may `load_other` what they stored before.
// By one thread of a block, after a block barrier if others of it stored. `ticket` was 0 in the beginning.
__device__ __forceinline__ bool is_last_block(int* ticket, int count) {
  __threadfence();
  const bool last = atomicAdd(ticket, 1) == count - 1;
  __threadfence();
  return last;
}

template <typename A>
__device__ __forceinline__ A load_other(const A* x) {
  return __ldcg(x);
}

// The block's dynamic shared memory.
__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(128) char metakd_dynamic_shared[];
  return metakd_dynamic_shared;
}

__device__ __forceinline__ uint32_t shared_address(const void* x) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(x));
}

// Thread-block clusters (sm_90)

__device__ __forceinline__ int cluster_rank() {
  uint32_t rank = 0;
#if METAKD_HAS_CLUSTERS
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return static_cast<int>(rank);
}

// A barrier of all threads of the cluster.
__device__ __forceinline__ void cluster_sync() {
#if METAKD_HAS_CLUSTERS
  __syncwarp();  // the barrier is `aligned`
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
#endif
}

// Barriers that count bytes (mbarrier, sm_90). One thread arms a phase with the bytes to come; it ends
// when it is armed and they came, in any order. Phases have parity 0, 1, 0, ...

__device__ __forceinline__ void bytes_init(uint64_t* barrier) {
#if METAKD_HAS_CLUSTERS
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
#endif
}

// Between `bytes_init` and its first use by other threads or by a bulk copy, before a block barrier.
__device__ __forceinline__ void bytes_init_done() {
#if METAKD_HAS_CLUSTERS
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void bytes_arm(uint64_t* barrier, uint32_t bytes) {
#if METAKD_HAS_CLUSTERS
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
#endif
}

__device__ __forceinline__ void bytes_wait(uint64_t* barrier, uint32_t parity) {
#if METAKD_HAS_CLUSTERS
  uint32_t done = 0;
  while (!done)
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}\n"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
#endif
}

// The same, for what other blocks of the cluster stored.
__device__ __forceinline__ void remote_bytes_wait(uint64_t* barrier, uint32_t parity) {
#if METAKD_HAS_CLUSTERS
  uint32_t done = 0;
  while (!done)
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}\n"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
#endif
}

// Stores a word where block `rank` of the cluster has `here`, and counts its 4 bytes at that block's
// `barrier`: whoever waited for the phase there sees it, without a fence.
__device__ __forceinline__ void remote_store(float* here, float value, int rank, uint64_t* barrier) {
#if METAKD_HAS_CLUSTERS
  asm volatile(
      "{\n"
      ".reg .b32 to, done;\n"
      "mapa.shared::cluster.u32 to, %0, %2;\n"
      "mapa.shared::cluster.u32 done, %3, %2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [to], %1, [done];\n"
      "}\n" ::"r"(shared_address(here)),
      "r"(__float_as_uint(value)), "r"(rank), "r"(shared_address(barrier))
      : "memory");
#endif
}

// Starts copying to this block's shared memory; addresses and bytes are multiples of 16.
__device__ __forceinline__ void bulk_load(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
#if METAKD_HAS_CLUSTERS
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(to)),
      "l"(reinterpret_cast<uint64_t>(__cvta_generic_to_global(from))), "r"(bytes),
      "r"(shared_address(barrier))
      : "memory");
#endif
}

}  // namespace metakd
