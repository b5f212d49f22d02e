// upfirdn2d on the GPU: pad, up-sample, filter, down-sample in one pass. See cpu/upfirdn2d.cpp, which computes the same.
//
// Three kernels: one for anything, and two for the 4-tap separable filter at up 2, down 2 and 1 (even padding where it
// up-samples), by layout. With `top` and `left` zeros before the image, output o meets tap k of input (o * down + k -
// padding) / up, where that is whole; all indices below follow from it.
#pragma once

#include "numbers.cuh"

namespace spg {

struct Upfirdn2dParams {
  const void* x;
  void* y;
  const float* f;  // [kh, kw] on the device, as it lies in memory (upfirdn2d_any)
  int64_t n, c;
  int h, w, out_h, out_w, up_x, up_y, down_x, down_y, left, top, kh, kw;
  bool channels_last, correlate;
  double gain;
  float fx[4], fy[4];  // factors in the orientation of a correlation, gain included; only ever indexed by constants
};

__device__ __forceinline__ int ceil_div(int a, int b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }

// One output at a time.
template <class T>
__global__ void upfirdn2d_any(Upfirdn2dParams p) {
  using A = typename Accumulator<T>::type;
  const T* x = static_cast<const T*>(p.x);
  const int64_t total = p.n * p.c * p.out_h * p.out_w, step = int64_t(gridDim.x) * blockDim.x;
  const int64_t x_step = p.channels_last ? p.c : 1;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += step) {
    int64_t rest = i, c = 0;
    if (p.channels_last) {
      c = rest % p.c;
      rest /= p.c;
    }
    const int ox = int(rest % p.out_w);
    rest /= p.out_w;
    const int oy = int(rest % p.out_h);
    const int64_t plane = rest / p.out_h;  // n, or (n, c)
    const int qx = ox * p.down_x - p.left, qy = oy * p.down_y - p.top;
    const int ix0 = ceil_div(qx, p.up_x) > 0 ? ceil_div(qx, p.up_x) : 0;
    const int iy0 = ceil_div(qy, p.up_y) > 0 ? ceil_div(qy, p.up_y) : 0;
    A sum = 0;
    for (int iy = iy0, ky = iy0 * p.up_y - qy; ky < p.kh && iy < p.h; ky += p.up_y, iy++) {
      const T* row = x + (plane * p.h + iy) * p.w * x_step + c;
      for (int ix = ix0, kx = ix0 * p.up_x - qx; kx < p.kw && ix < p.w; kx += p.up_x, ix++) {
        const int tap = ky * p.kw + kx;
        sum += A(p.f[p.correlate ? tap : p.kh * p.kw - 1 - tap]) * A(load(row[ix * x_step]));
      }
    }
    store(static_cast<T*>(p.y) + i, A(sum * A(p.gain)));
  }
}

// The shape of the tiles in NCHW: kThreadsX * kThreadsY threads, each of which makes V neighbouring outputs of R rows.
template <class T, int UP, int DOWN>
struct Tile {
  static constexpr int V = kFull<T>, R = DOWN == 2 ? 1 : (V == 8 ? 2 : 4);
  static constexpr int kThreadsX = DOWN == 2 ? 8 : 16, kThreadsY = 128 / kThreadsX;
  static constexpr int kOutW = kThreadsX * V, kOutH = kThreadsY * R;
  static constexpr int kColumns = ((V - 1) * DOWN + 3) / UP + 1, kRows = ((R - 1) * DOWN + 3) / UP + 1;  // of a thread
  // Whole 16-byte packs that hold all columns wherever the first one falls in its pack.
  static constexpr int kPacks = (((kOutW - 1) * DOWN + 3) / UP + 1 + V - 2) / V + 1;
  static constexpr int kInW = kPacks * V, kInH = ((kOutH - 1) * DOWN + 3) / UP + 1;
};

// NCHW. Needs w and out_w in multiples of V, and an even padding where UP is 2. Blocks take planes blockIdx.z,
// blockIdx.z + gridDim.z, ...
template <class T, int UP, int DOWN>
__global__ void __launch_bounds__(128, 12) upfirdn2d_planes(Upfirdn2dParams p) {
  using S = Tile<T, UP, DOWN>;
  constexpr int V = S::V;
  SPG_SHARED(T, tile, S::kInH * S::kInW, V);
  const int tile_x = blockIdx.x * S::kOutW, tile_y = blockIdx.y * S::kOutH;
  const int x0 = (tile_x * DOWN - p.left) / UP, y0 = (tile_y * DOWN - p.top) / UP;  // whole: the padding is even
  const int x0_pack = (x0 >= 0 ? x0 / V : -((V - 1 - x0) / V)) * V;                 // the pack that x0 falls into
  const int thread = threadIdx.y * S::kThreadsX + threadIdx.x;
  for (int64_t plane = blockIdx.z; plane < p.n * p.c; plane += gridDim.z) {
    const T* image = static_cast<const T*>(p.x) + plane * p.h * p.w;
    for (int i = thread; i < S::kInH * S::kPacks; i += 128) {
      const int row = i / S::kPacks, pack = i % S::kPacks, iy = y0 + row, ix = x0_pack + pack * V;
      Pack<T, V> values;
      if (iy >= 0 && iy < p.h && ix >= 0 && ix < p.w) {
        values = load_pack<T, V>(image + int64_t(iy) * p.w + ix);
      } else {
#pragma unroll
        for (int j = 0; j < V; j++) store(&values.v[j], 0.0f);
      }
      SPG_STORE_PACK(tile, row * S::kInW + pack * V, values, V);
    }
    __syncthreads();

    const int ox = tile_x + threadIdx.x * V, oy = tile_y + threadIdx.y * S::R;
    if (ox < p.out_w && oy < p.out_h) {
      const int column = x0 - x0_pack + threadIdx.x * (V * DOWN / UP), row = threadIdx.y * S::R * DOWN / UP;
      float sums[S::R][V] = {};
#pragma unroll
      for (int m = 0; m < S::kRows; m++) {
        float v[S::kColumns];
#pragma unroll
        for (int j = 0; j < S::kColumns; j++) v[j] = load(tile[(row + m) * S::kInW + column + j]);
#pragma unroll
        for (int j = 0; j < V; j++) {
          float along = 0;
#pragma unroll
          for (int k = 0; k < 4; k++)
            if ((j * DOWN + k) % UP == 0) along += p.fx[k] * v[(j * DOWN + k) / UP];
#pragma unroll
          for (int r = 0; r < S::R; r++) {
#pragma unroll
            for (int k = 0; k < 4; k++)
              if ((r * DOWN + k) % UP == 0 && (r * DOWN + k) / UP == m) sums[r][j] += p.fy[k] * along;
          }
        }
      }
      T* out = static_cast<T*>(p.y) + (plane * p.out_h + oy) * p.out_w + ox;
#pragma unroll
      for (int r = 0; r < S::R; r++) {
        if (oy + r < p.out_h) {
          Pack<T, V> values;
#pragma unroll
          for (int j = 0; j < V; j++) store(&values.v[j], sums[r][j]);
          store_pack<T, V>(out + int64_t(r) * p.out_w, values);
        }
      }
    }
    __syncthreads();  // before the next plane overwrites the tile
  }
}

// channels_last. Needs c in multiples of V, and an even padding where UP is 2. A thread makes V channels of UP * UP
// pixels; blockIdx.x and threadIdx.x run over columns and channels, blockIdx.y and threadIdx.y over rows, blockIdx.z over
// samples. Neighbouring threads share what they read through the cache.
template <class T, int UP, int DOWN>
__global__ void __launch_bounds__(128, 12) upfirdn2d_pixels(Upfirdn2dParams p) {
  constexpr int V = kFull<T>;
  const int packs = int(p.c / V), columns = (p.out_w + UP - 1) / UP;
  const int64_t flat = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int oy = (blockIdx.y * blockDim.y + threadIdx.y) * UP;
  if (flat >= int64_t(columns) * packs || oy >= p.out_h) return;
  const int pack = int(flat % packs), ox = int(flat / packs) * UP;
  const int ix0 = (ox * DOWN - p.left) / UP, iy0 = (oy * DOWN - p.top) / UP;  // whole: the padding is even
  const int64_t row_step = int64_t(p.w) * p.c;
  for (int64_t n = blockIdx.z; n < p.n; n += gridDim.z) {
#pragma unroll 1
    for (int phase = 0; phase < UP * UP; phase++) {  // of the pixel, among those that one input pixel becomes
      const int r = phase / UP, j = phase % UP;
      if (oy + r >= p.out_h || ox + j >= p.out_w) continue;
      // Taps by phase: with UP 2, those of its parity, the odd ones an input further.
      const float x0 = UP == 2 && j ? p.fx[1] : p.fx[0], x1 = UP == 2 ? (j ? p.fx[3] : p.fx[2]) : p.fx[1];
      const float y0 = UP == 2 && r ? p.fy[1] : p.fy[0], y1 = UP == 2 ? (r ? p.fy[3] : p.fy[2]) : p.fy[1];
      const int ix = ix0 + j, iy = iy0 + r;
      const T* at = static_cast<const T*>(p.x) + ((n * p.h + iy) * p.w + ix) * p.c + pack * V;
      float sums[V] = {};
#pragma unroll
      for (int m = 0; m < 4 / UP; m++, at += row_step) {
        if (iy + m < 0 || iy + m >= p.h) continue;
        const float fy = m == 0 ? y0 : m == 1 ? y1 : p.fy[m];
#pragma unroll
        for (int k = 0; k < 4 / UP; k++) {
          if (ix + k < 0 || ix + k >= p.w) continue;
          const float f = fy * (k == 0 ? x0 : k == 1 ? x1 : p.fx[k]);
          const Pack<T, V> values = load_pack<T, V>(at + k * p.c);
#pragma unroll
          for (int i = 0; i < V; i++) sums[i] += f * load(values.v[i]);
        }
      }
      Pack<T, V> values;
#pragma unroll
      for (int i = 0; i < V; i++) store(&values.v[i], sums[i]);
      store_pack<T, V>(static_cast<T*>(p.y) + ((n * p.out_h + oy + r) * p.out_w + ox + j) * p.c + pack * V, values);
    }
  }
}

}  // namespace spg
