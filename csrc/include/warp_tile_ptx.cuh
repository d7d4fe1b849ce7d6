// Instructions below warp_tile.cuh: asynchronous copies of a few bytes, and products of small matrices on
// tensor cores. Torch-free. They exist for sm_80 and newer; for older targets they are empty, and no host
// code launches a kernel that calls them there.

#pragma once

#include <cuda_bf16.h>

#include <cstdint>
#include <type_traits>

#include <rowwise_ptx.cuh>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define METAKD_HAS_TILES 1
#else
#define METAKD_HAS_TILES 0
#endif

namespace metakd {

// Starts copying BYTES (4, 8 or 16, and so aligned) to shared memory, or zeros if `real` is false: then
// nothing is read.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool real) {
#if METAKD_HAS_TILES
  const uint32_t address = shared_address(to);
  const uint64_t source = reinterpret_cast<uint64_t>(__cvta_generic_to_global(from));
  const int bytes = real ? BYTES : 0;
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(source), "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(source), "n"(BYTES),
                 "r"(bytes)
                 : "memory");
#endif
}

// A thread's copies since the last commit become a group, empty or not.
__device__ __forceinline__ void copies_commit() {
#if METAKD_HAS_TILES
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until all groups of this thread but the last LEFT have landed. Other threads see them after a barrier.
template <int LEFT>
__device__ __forceinline__ void copies_wait() {
#if METAKD_HAS_TILES
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
#endif
}

// Four 8 x 8 matrices of 16-bit elements from shared memory. Lane i names row i % 8 of matrix i / 8
// (16 bytes, aligned) and gets elements (i / 4, 2 (i % 4)) and the one right of it of each; TRANSPOSED,
// elements (2 (i % 4), i / 4) and the one below.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(uint32_t (&x)[4], const void* row) {
#if METAKD_HAS_TILES
  const uint32_t address = shared_address(row);
  if constexpr (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
#endif
}

// c += a b with a 16 x 16, b 16 x 8 of type T and c 16 x 8. With g = lane / 4 and q = 2 (lane % 4), a lane
// has of a rows g, g + 8, g, g + 8 at columns q, q, q + 8, q + 8 (two each), of b column g at rows q and
// q + 8 (two each), of c columns q and q + 1 at rows g and g + 8. Sums are truncated, not rounded.
template <typename T>
__device__ __forceinline__ void multiply_add(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if METAKD_HAS_TILES
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

}  // namespace metakd
