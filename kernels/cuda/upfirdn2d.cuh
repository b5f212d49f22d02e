// upfirdn2d on the GPU: padding, up-sampling, filtering and down-sampling in one pass. cpu/upfirdn2d.cpp computes the
// same.
//
// There are three kernels: a general one, and one for each layout for the 4-tap separable filter with up 2, down 2 or
// neither (with an even padding for up 2). With `top` and `left` zeros before the image, tap k of output o is applied
// to the input (o * down + k - padding) / up if this is an integer. All indices below follow from this formula.
#pragma once

#include "numbers.cuh"

namespace spg {

struct Upfirdn2dParams {
  const void* x;
  void* y;
  const float* f;  // [kh, kw] on the device, in the order of memory (used by upfirdn2d_any)
  int64_t n, c;
  int h, w, out_h, out_w, up_x, up_y, down_x, down_y, left, top, kh, kw;
  bool channels_last, correlate;
  double gain;
  float fx[4], fy[4];  // factors in the orientation of a correlation, including the gain; all indices are constants
};

__device__ __forceinline__ int ceil_div(int a, int b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }

// The general kernel. A thread computes one output.
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

// The shape of the tiles in NCHW. Each of kThreadsX * kThreadsY threads computes V neighbouring outputs in R rows.
template <class T, int UP, int DOWN>
struct Tile {
  static constexpr int V = kFull<T>, R = DOWN == 2 ? 1 : 2;
  static constexpr int kThreadsX = DOWN == 2 ? 8 : 16, kThreadsY = 128 / kThreadsX;
  static constexpr int kOutW = kThreadsX * V, kOutH = kThreadsY * R;
  static constexpr int kColumns = ((V - 1) * DOWN + 3) / UP + 1, kRows = ((R - 1) * DOWN + 3) / UP + 1;  // inputs of one thread
  // The number of 16-byte packs that contain all columns, for any position of the first column in its pack.
  static constexpr int kPacks = (((kOutW - 1) * DOWN + 3) / UP + 1 + V - 2) / V + 1;
  static constexpr int kInW = kPacks * V, kInH = ((kOutH - 1) * DOWN + 3) / UP + 1;
  static constexpr int kTrips = (kInH * kPacks + 127) / 128;  // packs that each thread loads
};

// The kernel for NCHW. If UP is 2, the padding must be even. If PACKED, it accesses whole packs, which requires that w
// and out_w are multiples of V and that both tensors are aligned; otherwise it accesses single values. A block
// processes the planes blockIdx.z, blockIdx.z + gridDim.z, ...
template <class T, int UP, int DOWN, bool PACKED>
__global__ void __launch_bounds__(128, 12) upfirdn2d_planes(Upfirdn2dParams p) {
  using S = Tile<T, UP, DOWN>;
  constexpr int V = S::V;
  SPG_SHARED(T, tile, S::kInH * S::kInW, V);
  const int tile_x = blockIdx.x * S::kOutW, tile_y = blockIdx.y * S::kOutH;
  const int x0 = (tile_x * DOWN - p.left) / UP, y0 = (tile_y * DOWN - p.top) / UP;  // the division is exact, because the padding is even
  const int x0_pack = (x0 >= 0 ? x0 / V : -((V - 1 - x0) / V)) * V;                 // the first column of the pack that contains x0
  const int thread = threadIdx.y * S::kThreadsX + threadIdx.x;
  for (int64_t plane = blockIdx.z; plane < p.n * p.c; plane += gridDim.z) {
    const T* image = static_cast<const T*>(p.x) + plane * p.h * p.w;
#pragma unroll(PACKED && DOWN == 1 ? S::kTrips : 1)
    for (int trip = 0; trip < S::kTrips; trip++) {
      const int i = thread + trip * 128;
      if (trip + 1 == S::kTrips && i >= S::kInH * S::kPacks) break;
      const int row = i / S::kPacks, pack = i % S::kPacks, iy = y0 + row, ix = x0_pack + pack * V;
      const bool row_inside = iy >= 0 && iy < p.h;
      Pack<T, V> values;
      if (PACKED && row_inside && ix >= 0 && ix < p.w) {
        values = load_pack<T, V>(image + int64_t(iy) * p.w + ix);
      } else {
#pragma unroll
        for (int j = 0; j < V; j++) store(&values.v[j], 0.0f);
      }
      if (!PACKED && row_inside) {
#pragma unroll
        for (int j = 0; j < V; j++)
          if (ix + j >= 0 && ix + j < p.w) values.v[j] = image[int64_t(iy) * p.w + ix + j];
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
        if (oy + r >= p.out_h) break;
        if (PACKED) {
          Pack<T, V> values;
#pragma unroll
          for (int j = 0; j < V; j++) store(&values.v[j], sums[r][j]);
          store_pack<T, V>(out + int64_t(r) * p.out_w, values);
        } else {
#pragma unroll
          for (int j = 0; j < V; j++) {
            if (ox + j >= p.out_w) break;
            store(out + int64_t(r) * p.out_w + j, sums[r][j]);
          }
        }
      }
    }
    __syncthreads();  // all threads must be done before the next plane overwrites the tile
  }
}

// The kernel for channels_last. c must be a multiple of V and, if UP is 2, the padding must be even. A thread computes
// V channels of one pixel. blockIdx.x and threadIdx.x run over columns and channels, blockIdx.y and threadIdx.y over
// rows, blockIdx.z over samples. Neighbouring threads read common inputs through the cache.
template <class T, int UP, int DOWN>
__global__ void __launch_bounds__(128, 12) upfirdn2d_pixels(Upfirdn2dParams p) {
  constexpr int V = kFull<T>;
  const int packs = int(p.c / V), flat = blockIdx.x * blockDim.x + threadIdx.x;
  const int ox = flat / packs, oy = blockIdx.y * blockDim.y + threadIdx.y, channel = (flat - ox * packs) * V;
  if (ox >= p.out_w || oy >= p.out_h) return;
  // With UP 2 and an even padding, an output uses only the taps of its own parity. For odd outputs the first input is
  // one position further.
  const int odd_x = UP == 2 ? ox & 1 : 0, odd_y = UP == 2 ? oy & 1 : 0;
  const int ix = (ox * DOWN - p.left + odd_x) / UP, iy = (oy * DOWN - p.top + odd_y) / UP;
  const int64_t n = blockIdx.z;
  const T* at = static_cast<const T*>(p.x) + ((n * p.h + iy) * p.w + ix) * p.c + channel;
  T* out = static_cast<T*>(p.y) + ((n * p.out_h + oy) * p.out_w + ox) * p.c + channel;
  const float x0 = odd_x ? p.fx[1] : p.fx[0], x1 = UP == 2 ? (odd_x ? p.fx[3] : p.fx[2]) : p.fx[1];
  const float y0 = odd_y ? p.fy[1] : p.fy[0], y1 = UP == 2 ? (odd_y ? p.fy[3] : p.fy[2]) : p.fy[1];
  float sums[V] = {};
#pragma unroll 1  // unrolled, all sixteen packs would need registers; for float32, two packs at once are enough
  for (int m = 0; m < 4 / UP; m++, at += p.w * p.c) {
    const float fy = m == 0 ? y0 : m == 1 ? y1 : m == 2 ? p.fy[2] : p.fy[3];
    if (iy + m < 0 || iy + m >= p.h) continue;
#pragma unroll(sizeof(T) == 4 ? 1 : 2)
    for (int pair = 0; pair < 4 / UP; pair += 2) {
#pragma unroll
      for (int k = 0; k < 2; k++) {
        const int column = ix + pair + k;
        if (column < 0 || column >= p.w) continue;
        const float f = fy * (pair == 0 ? (k ? x1 : x0) : p.fx[2 + k]);
        const Pack<T, V> values = load_pack<T, V>(at + (pair + k) * p.c);
#pragma unroll
        for (int i = 0; i < V; i++) sums[i] += f * load(values.v[i]);
      }
    }
  }
  Pack<T, V> values;
#pragma unroll
  for (int i = 0; i < V; i++) store(&values.v[i], sums[i]);
  store_pack<T, V>(out, values);
}

}  // namespace spg
