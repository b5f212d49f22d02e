// Common code of upfirdn2d.cu, bias_act.cu and filtered_lrelu.cu: numbers of blocks, number formats, the C interface.
#pragma once

#include <algorithm>

#include "numbers.cuh"

#define SPG_API extern "C" __attribute__((visibility("default")))

namespace spg {

// stylegan_pg/ops/calls.py uses the same codes.
enum Dtype : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

constexpr unsigned kMostBlocksYZ = 65535;
// The largest number of blocks along z for kernels with a grid-stride loop. It is small in the shim, so that tests
// execute the loop.
#ifdef SPG_SHIM
constexpr int64_t kMostLayers = 3;
#else
constexpr int64_t kMostLayers = kMostBlocksYZ;
#endif

constexpr int64_t kMostOfADimension = int64_t(1) << 30;  // the sum of two dimensions must fit into an int

inline int64_t blocks(int64_t work, int64_t each) { return (work + each - 1) / each; }

inline int power_of_two_from(int64_t n, int most) {
  int p = 1;
  while (p < most && p < n) p *= 2;
  return p;
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class G>
int with_dtype(int dtype, const G& run) {
  switch (dtype) {
    case kFloat32: return run(float());
    case kFloat64: return run(double());
    case kBFloat16: return run(bfloat16_t());
    case kFloat16: return run(half_t());
    default: return -1;
  }
}

}  // namespace spg
