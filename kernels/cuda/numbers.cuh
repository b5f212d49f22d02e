// Number formats and 16-byte accesses of the device code. nvcc compiles it for the GPU. g++ compiles it with
// shim/cuda.h, to run and check it without a GPU, so only those parts of CUDA may be used that the shim provides.
#pragma once

#include <cstdint>

#ifdef SPG_SHIM
#include "../shim/cuda.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
using half_t = __half;
using bfloat16_t = __nv_bfloat16;
// An array in shared memory, aligned to packs of V values. The shim's version records which threads read and write it.
#define SPG_SHARED(T, name, count, V) __shared__ alignas(16) T name[count]
#define SPG_STORE_PACK(array, index, pack, V) *reinterpret_cast<decltype(pack)*>(&(array)[index]) = pack
#define SPG_STORE_SHARED(array, index, value) (array)[index] = value
#define SPG_CHECK_ALIGNED(p, bytes)
using stream_t = cudaStream_t;
#define SPG_LAUNCH(kernel, grid, block, stream, params) \
  (kernel<<<grid, block, 0, stream>>>(params), int(cudaGetLastError()))
#define SPG_SET_DEVICE(device) int(cudaSetDevice(device))
#endif

namespace spg {

template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

__device__ __forceinline__ float load(float x) { return x; }
__device__ __forceinline__ double load(double x) { return x; }
__device__ __forceinline__ float load(half_t x) { return __half2float(x); }
__device__ __forceinline__ float load(bfloat16_t x) { return __bfloat162float(x); }
__device__ __forceinline__ void store(float* p, float x) { *p = x; }
__device__ __forceinline__ void store(double* p, double x) { *p = x; }
__device__ __forceinline__ void store(half_t* p, float x) { *p = __float2half_rn(x); }
__device__ __forceinline__ void store(bfloat16_t* p, float x) { *p = __float2bfloat16_rn(x); }

// N neighbouring values, which one instruction loads or stores if they have 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
};

template <class T>
constexpr int kFull = 16 / int(sizeof(T));  // values in 16 bytes

template <class T, int N>
__device__ __forceinline__ Pack<T, N> load_pack(const T* p) {
  SPG_CHECK_ALIGNED(p, sizeof(T) * N);
  return *reinterpret_cast<const Pack<T, N>*>(p);
}
template <class T, int N>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, N>& pack) {
  SPG_CHECK_ALIGNED(p, sizeof(T) * N);
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

// Accesses to N neighbouring values, in units of 16 bytes if N is larger than one; p is aligned accordingly.
template <int N, class A>
__device__ __forceinline__ void load_values(A* values, const A* p) {
  constexpr int step = N < kFull<A> ? N : kFull<A>;
#pragma unroll
  for (int i = 0; i < N; i += step) {
    const Pack<A, step> pack = load_pack<A, step>(p + i);
#pragma unroll
    for (int j = 0; j < step; j++) values[i + j] = pack.v[j];
  }
}
template <int N, class A>
__device__ __forceinline__ void fill(A* values, A value) {
#pragma unroll
  for (int i = 0; i < N; i++) values[i] = value;
}

}  // namespace spg
