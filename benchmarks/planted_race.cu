// Threads read what other warps have written to shared memory, with no barrier between: a racecheck that
// does not see this sees nothing.

#include <cuda_runtime.h>

__global__ void reverse(float* out) {
  __shared__ float tile[256];
  tile[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = tile[255 - threadIdx.x];
}

int main() {
  float* out = nullptr;
  if (cudaMalloc(&out, 256 * sizeof(float)) != cudaSuccess) return 1;
  reverse<<<1, 256>>>(out);
  return cudaDeviceSynchronize() == cudaSuccess ? 0 : 1;
}
