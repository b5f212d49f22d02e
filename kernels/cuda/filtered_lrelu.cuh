// The filtered leaky ReLU on the GPU: up-sampling, activation and down-sampling of a tile in shared memory, so that the
// up-sampled image never reaches global memory. cpu/filtered_lrelu.cpp computes the same, and explains the two stages,
// the temporary rate ("mid"), and the recorded slopes, with which the same code computes all derivatives.
//
// With `top` zeros before the image of stage 1, tap k of row m at the temporary rate is applied to the input row
// (m + k - top1) / up if this is an integer. Tap k of output row o is applied to row o * down + k - top2 at the temporary
// rate. The same holds for columns. The slopes of four rows of a column are one byte, and a plane has
// [ceil(mid_h / 4), mid_w] bytes.
#pragma once

#include "numbers.cuh"

namespace spg {

enum Mode : int { kPlain, kRecord, kMasked };

constexpr int kFilteredThreads = 256;
constexpr int kMostUp = 4, kMostDown = 4, kPhaseTaps = 6;  // of the tiled kernel: at most 6 taps for each phase
constexpr int kMostTaps = 48;                              // of the general kernel

struct FilteredParams {
  const void* x;
  void* y;
  uint8_t* slopes;
  const void* bias;  // [c] in the accumulating format, or null
  const float *f1, *f2;  // on the device, [k] or [kh, kw] in the order of memory
  int64_t n, c, tiles;
  int h, w, mid_h, mid_w, out_h, out_w, left1, top1, left2, top2, up, down, kh1, kw1, kh2, kw2, tiles_x, tiles_y, tile;
  bool separable1, separable2, channels_last, correlate, packed_in, packed_out;
  int mode;
  double gain1, gain2, gain, slope, clamp;  // infinity for no clamp
  // Of the tiled kernel: the taps of separable filters as correlations, including gain1 and gain2 along y. Those of
  // stage 1 begin with shift_x and shift_y zeros, so that the first tap of each tile meets a value.
  int shift_x, shift_y;
  float x1[(kPhaseTaps + 1) * kMostUp], y1[(kPhaseTaps + 1) * kMostUp], x2[kPhaseTaps * kMostDown], y2[kPhaseTaps * kMostDown];
};

__device__ __forceinline__ int floor_of(int a, int b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

// Activates a value, or multiplies it by the slope that `code` stands for. In the former case `code` becomes 0 for z > 0,
// 1 for the leaky side, and 2 where the clamp limits the value.
template <class A>
__device__ __forceinline__ A activated(A z, bool masked, int& code, A gain, A slope, A clamp) {
  if (masked) return code >= 2 ? A(0) : z * (code ? gain * slope : gain);
  const A y = (z < 0 ? z * slope : z) * gain;
  code = y > clamp || y < -clamp ? 2 : z > 0 ? 0 : 1;
  return y > clamp ? clamp : y < -clamp ? -clamp : y;  // NaN stays NaN
}

// Activates the values z of the rows m to m + 3 in a column. Values outside of [0, mid_h) x [0, mid_w) become zero. If
// `own`, the slopes are recorded; then m is a multiple of 4 in [0, mid_h).
template <class A>
__device__ __forceinline__ void activate(A (&z)[4], int m, int column, int64_t plane, bool own, const FilteredParams& p) {
  const bool inside = column >= 0 && column < p.mid_w, masked = p.mode == kMasked;
  const int groups = (p.mid_h + 3) / 4, group = floor_of(m, 4);
  uint8_t* at = p.slopes + (plane * groups + group) * p.mid_w + column;
  int codes = 0;
  if (masked && inside) {
    if (group >= 0 && group < groups) codes = at[0];
    if (m != group * 4 && group + 1 >= 0 && group + 1 < groups) codes |= int(at[p.mid_w]) << 8;
    codes >>= 2 * (m - group * 4);
  }
  int packed = 0;
#pragma unroll
  for (int r = 0; r < 4; r++) {
    int code = codes >> (2 * r) & 3;
    const bool here = inside && m + r >= 0 && m + r < p.mid_h;
    const A y = activated(z[r], masked, code, A(p.gain), A(p.slope), A(p.clamp));
    z[r] = here ? y : A(0);
    packed |= here ? code << (2 * r) : 0;
  }
  if (own && p.mode == kRecord && inside) at[0] = uint8_t(packed);
}

// The shape of a tile of the tiled kernel.
template <class T, int UP, int DOWN, bool LAST>
struct FilteredTile {
  static constexpr int V = kFull<T>, kChannels = LAST ? V : 1;
  static constexpr int kOutW = (LAST ? 32 : 64) / DOWN, kOutH = (LAST && V == 8 ? 16 : 32) / DOWN;
  static constexpr int kTaps1 = (kPhaseTaps + 1) * UP, kTaps2 = kPhaseTaps * DOWN;
  static constexpr int kMidW = (kOutW + kPhaseTaps) * DOWN, kMidH = (kOutH + kPhaseTaps) * DOWN;
  static constexpr int kInW = (kMidW + kTaps1 - 2) / UP + 1, kInH = (kMidH + kTaps1 - 2) / UP + 1;
  static constexpr int kIn = kInW * kInH > kOutW * kOutH ? kInW * kInH : kOutW * kOutH;  // for a channel; later its outputs
  static constexpr int kWindow = (3 + kTaps1 - 1) / UP + 1;  // inputs of four neighbouring values at the temporary rate
  static constexpr int kPacks = (kInW + V - 2) / V + 1;
};

// The kernel for up and down in (2, 2), (4, 2) and (2, 4), and at most six taps for each phase. In channels_last, c must
// be a multiple of V, and a tile has V channels. A block processes the tiles blockIdx.x, blockIdx.x + gridDim.x, ...
template <class T, int UP, int DOWN, bool LAST>
__global__ void __launch_bounds__(kFilteredThreads, DOWN == 4 ? 3 : 4) filtered_lrelu_tiles(FilteredParams p) {
  using S = FilteredTile<T, UP, DOWN, LAST>;
  constexpr int V = S::V, kMidW = S::kMidW;
  SPG_SHARED(float, in, S::kIn * S::kChannels, 4);       // inputs, later outputs
  SPG_SHARED(float, rows, S::kInH * kMidW, 4);           // filtered along x to the temporary rate; later along y to the output's
  SPG_SHARED(float, mid, S::kMidH * kMidW, 4);
  SPG_SHARED(float, full1, S::kTaps1 * S::kTaps1, 4);    // filters that are not separable
  SPG_SHARED(float, full2, S::kTaps2 * S::kTaps2, 4);
  const int thread = threadIdx.x;
  if (!p.separable1)
    for (int i = thread; i < S::kTaps1 * S::kTaps1; i += kFilteredThreads) {
      const int ky = i / S::kTaps1 - p.shift_y, kx = i % S::kTaps1 - p.shift_x, k = ky * p.kw1 + kx;
      const bool inside = ky >= 0 && ky < p.kh1 && kx >= 0 && kx < p.kw1;
      SPG_STORE_SHARED(full1, i, inside ? p.f1[p.correlate ? k : p.kh1 * p.kw1 - 1 - k] * float(p.gain1) : 0.0f);
    }
  if (!p.separable2)
    for (int i = thread; i < S::kTaps2 * S::kTaps2; i += kFilteredThreads) {
      const int ky = i / S::kTaps2, kx = i % S::kTaps2, k = ky * p.kw2 + kx;
      const bool inside = ky < p.kh2 && kx < p.kw2;
      SPG_STORE_SHARED(full2, i, inside ? p.f2[p.correlate ? k : p.kh2 * p.kw2 - 1 - k] * float(p.gain2) : 0.0f);
    }
  for (int64_t tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
    // In channels_last, blocks with the other channels of a tile are neighbours.
    const int chunks = int(p.c / S::kChannels);
    int64_t rest = tile;
    int chunk = 0;
    if (LAST) {
      chunk = int(rest % chunks);
      rest /= chunks;
    }
    const int tile_x = int(rest % p.tiles_x), tile_y = int(rest / p.tiles_x % p.tiles_y);
    const int64_t image = rest / p.tiles_x / p.tiles_y;  // the sample, or the plane
    const int ox0 = tile_x * S::kOutW, oy0 = tile_y * S::kOutH;
    const int mx0 = ox0 * DOWN - p.left2, my0 = oy0 * DOWN - p.top2;
    const int ix0 = (mx0 - p.left1 - p.shift_x) / UP, iy0 = (my0 - p.top1 - p.shift_y) / UP;  // the divisions are exact
    const float* bias = static_cast<const float*>(p.bias);

    if (LAST) {
      const T* from = static_cast<const T*>(p.x) + image * p.h * p.w * p.c + chunk * V;
      for (int i = thread; i < S::kInH * S::kInW; i += kFilteredThreads) {
        const int iy = iy0 + i / S::kInW, ix = ix0 + i % S::kInW;
        const bool inside = iy >= 0 && iy < p.h && ix >= 0 && ix < p.w;
        Pack<T, V> values;
        if (inside) values = load_pack<T, V>(from + (int64_t(iy) * p.w + ix) * p.c);
#pragma unroll
        for (int j = 0; j < V; j++)
          SPG_STORE_SHARED(in, j * S::kIn + i, inside ? load(values.v[j]) + (bias ? bias[chunk * V + j] : 0.0f) : 0.0f);
      }
    } else {
      const T* from = static_cast<const T*>(p.x) + image * p.h * p.w;
      const float shift = bias ? bias[image % p.c] : 0.0f;
      const int first = floor_of(ix0, V) * V;  // the first column of the pack that contains ix0
      for (int i = thread; i < S::kInH * S::kPacks; i += kFilteredThreads) {
        const int row = i / S::kPacks, iy = iy0 + row, ix = first + i % S::kPacks * V;
        const bool row_inside = iy >= 0 && iy < p.h;
        const bool pack_inside = row_inside && p.packed_in && ix >= 0 && ix < p.w;
        Pack<T, V> values;
        if (pack_inside) values = load_pack<T, V>(from + int64_t(iy) * p.w + ix);
#pragma unroll
        for (int j = 0; j < V; j++) {
          const bool inside = row_inside && ix + j >= 0 && ix + j < p.w;
          if (!p.packed_in && inside) values.v[j] = from[int64_t(iy) * p.w + ix + j];
          const int column = ix + j - ix0;
          if (column >= 0 && column < S::kInW)
            SPG_STORE_SHARED(in, row * S::kInW + column, inside ? load(values.v[j]) + shift : 0.0f);
        }
      }
    }
    __syncthreads();

#pragma unroll 1
    for (int channel = 0; channel < S::kChannels; channel++) {
      const int in0 = channel * S::kIn;
      if (p.separable1) {
        for (int i = thread; i < S::kInH * (kMidW / 4); i += kFilteredThreads) {
          const int row = i / (kMidW / 4), column = i % (kMidW / 4) * 4;
          float v[S::kWindow];
#pragma unroll
          for (int q = 0; q < S::kWindow; q++) v[q] = in[in0 + row * S::kInW + column / UP + q];
          Pack<float, 4> sums;
#pragma unroll
          for (int r = 0; r < 4; r++) {
            sums.v[r] = 0;
#pragma unroll
            for (int k = 0; k < S::kTaps1; k++)
              if ((r + k) % UP == 0) sums.v[r] += p.x1[k] * v[(r + k) / UP];
          }
          SPG_STORE_PACK(rows, row * kMidW + column, sums, 4);
        }
        __syncthreads();
      }
      // The rows and columns whose slopes this tile records. The last tiles also record those that no output uses.
      const int own_y = tile_y + 1 == p.tiles_y ? p.mid_h : (oy0 + S::kOutH) * DOWN;
      const int own_x = tile_x + 1 == p.tiles_x ? p.mid_w : (ox0 + S::kOutW) * DOWN;
      const int64_t plane = LAST ? image * p.c + chunk * V + channel : image;
      for (int i = thread; i < kMidW * (S::kMidH / 4); i += kFilteredThreads) {
        const int row = i / kMidW * 4, column = i % kMidW;
        float z[4] = {};
        if (p.separable1) {
          float v[S::kWindow];
#pragma unroll
          for (int q = 0; q < S::kWindow; q++) v[q] = rows[(row / UP + q) * kMidW + column];
#pragma unroll
          for (int r = 0; r < 4; r++)
#pragma unroll
            for (int k = 0; k < S::kTaps1; k++)
              if ((r + k) % UP == 0) z[r] += p.y1[k] * v[(r + k) / UP];
        } else {
          const int kx = (UP - column % UP) % UP;  // the first tap that meets a value
#pragma unroll 1
          for (int q = 0; q < S::kWindow; q++)
#pragma unroll
            for (int k = 0; k <= kPhaseTaps; k++) {
              const float v = in[in0 + (row / UP + q) * S::kInW + (column + kx) / UP + k];
#pragma unroll
              for (int r = 0; r < 4; r++) {
                const int ky = q * UP - r;
                if (ky >= 0 && ky < S::kTaps1) z[r] += full1[ky * S::kTaps1 + kx + k * UP] * v;
              }
            }
        }
        activate(z, my0 + row, mx0 + column, plane, my0 + row < own_y && mx0 + column < own_x, p);
#pragma unroll
        for (int r = 0; r < 4; r++) SPG_STORE_SHARED(mid, (row + r) * kMidW + column, z[r]);
      }
      __syncthreads();

      if (p.separable2) {
        for (int i = thread; i < kMidW * (S::kOutH / 2); i += kFilteredThreads) {
          const int row = i / kMidW * 2, column = i % kMidW;
          float first = 0, second = 0;
#pragma unroll
          for (int q = 0; q < S::kTaps2 + DOWN; q++) {
            const float v = mid[(row * DOWN + q) * kMidW + column];
            if (q < S::kTaps2) first += p.y2[q < S::kTaps2 ? q : 0] * v;
            if (q >= DOWN) second += p.y2[q >= DOWN ? q - DOWN : 0] * v;
          }
          SPG_STORE_SHARED(rows, row * kMidW + column, first);
          SPG_STORE_SHARED(rows, (row + 1) * kMidW + column, second);
        }
        __syncthreads();
        for (int i = thread; i < S::kOutH * S::kOutW; i += kFilteredThreads) {
          const int row = i / S::kOutW, column = i % S::kOutW;
          float sum = 0;
#pragma unroll
          for (int k = 0; k < S::kTaps2; k++) sum += p.x2[k] * rows[row * kMidW + column * DOWN + k];
          SPG_STORE_SHARED(in, in0 + i, sum);
        }
      } else {
        for (int i = thread; i < S::kOutH / 2 * S::kOutW; i += kFilteredThreads) {
          const int row = i / S::kOutW * 2, column = i % S::kOutW;
          float first = 0, second = 0;
#pragma unroll 1
          for (int q = 0; q < S::kTaps2 + DOWN; q++)
#pragma unroll
            for (int k = 0; k < S::kTaps2; k++) {
              const float v = mid[(row * DOWN + q) * kMidW + column * DOWN + k];
              if (q < S::kTaps2) first += full2[q * S::kTaps2 + k] * v;
              if (q >= DOWN) second += full2[(q - DOWN) * S::kTaps2 + k] * v;
            }
          SPG_STORE_SHARED(in, in0 + row * S::kOutW + column, first);
          SPG_STORE_SHARED(in, in0 + (row + 1) * S::kOutW + column, second);
        }
      }
      __syncthreads();  // before the next channel overwrites the rows, and before the outputs are read
    }

    if (LAST) {
      T* to = static_cast<T*>(p.y) + image * p.out_h * p.out_w * p.c + chunk * V;
      for (int i = thread; i < S::kOutH * S::kOutW; i += kFilteredThreads) {
        const int oy = oy0 + i / S::kOutW, ox = ox0 + i % S::kOutW;
        if (oy >= p.out_h || ox >= p.out_w) continue;
        Pack<T, V> values;
#pragma unroll
        for (int j = 0; j < V; j++) store(&values.v[j], in[j * S::kIn + i]);
        store_pack<T, V>(to + (int64_t(oy) * p.out_w + ox) * p.c, values);
      }
    } else {
      T* to = static_cast<T*>(p.y) + image * p.out_h * p.out_w;
      for (int i = thread; i < S::kOutH * (S::kOutW / V); i += kFilteredThreads) {
        const int row = i / (S::kOutW / V), column = i % (S::kOutW / V) * V, oy = oy0 + row, ox = ox0 + column;
        if (oy >= p.out_h || ox >= p.out_w) continue;
        T* at = to + int64_t(oy) * p.out_w + ox;
        Pack<T, V> values;
#pragma unroll
        for (int j = 0; j < V; j++) store(&values.v[j], in[row * S::kOutW + column + j]);
        if (p.packed_out) {
          store_pack<T, V>(at, values);
        } else {
#pragma unroll
          for (int j = 0; j < V; j++)
            if (ox + j < p.out_w) at[j] = values.v[j];
        }
      }
    }
    __syncthreads();  // all threads must be done before the next tile overwrites the outputs
  }
}

// The general kernel, for all other cases. A block computes tile * tile outputs of a plane. Only the values at the
// temporary rate are in shared memory.
constexpr int kMostMid = 76;

template <class T>
__global__ void __launch_bounds__(kFilteredThreads, 4) filtered_lrelu_any(FilteredParams p) {
  using A = typename Accumulator<T>::type;
  SPG_SHARED(A, mid, kMostMid * kMostMid, 2);
  const int64_t step = p.channels_last ? p.c : 1;
  for (int64_t tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
    const int tile_x = int(tile % p.tiles_x), tile_y = int(tile / p.tiles_x % p.tiles_y);
    const int64_t plane = tile / p.tiles_x / p.tiles_y, n = plane / p.c, c = plane % p.c;
    const int ox0 = tile_x * p.tile, oy0 = tile_y * p.tile;
    const int mx0 = ox0 * p.down - p.left2, my0 = oy0 * p.down - p.top2;
    const int width = (p.tile - 1) * p.down + p.kw2 + p.down - 1, height = (p.tile - 1) * p.down + p.kh2 + p.down - 1;
    const int own_y = tile_y + 1 == p.tiles_y ? p.mid_h : (oy0 + p.tile) * p.down;
    const int own_x = tile_x + 1 == p.tiles_x ? p.mid_w : (ox0 + p.tile) * p.down;
    const T* from = static_cast<const T*>(p.x) + (p.channels_last ? n * p.h * p.w * p.c + c : plane * p.h * p.w);
    const A bias = p.bias ? static_cast<const A*>(p.bias)[c] : A(0);
    for (int i = threadIdx.x; i < width * ((height + 3) / 4); i += kFilteredThreads) {
      const int row = i / width * 4, column = i % width;
      const int qx = mx0 + column - p.left1, first_x = -floor_of(-qx, p.up) > 0 ? -floor_of(-qx, p.up) : 0;
      A z[4];
#pragma unroll
      for (int r = 0; r < 4; r++) {
        const int qy = my0 + row + r - p.top1, first_y = -floor_of(-qy, p.up) > 0 ? -floor_of(-qy, p.up) : 0;
        A sum = 0;
        for (int iy = first_y, ky = first_y * p.up - qy; ky < p.kh1 && iy < p.h; ky += p.up, iy++) {
          A along = 0;
          for (int ix = first_x, kx = first_x * p.up - qx; kx < p.kw1 && ix < p.w; kx += p.up, ix++) {
            const int k = p.separable1 ? kx : ky * p.kw1 + kx, last = (p.separable1 ? p.kw1 : p.kh1 * p.kw1) - 1;
            along += A(p.f1[p.correlate ? k : last - k]) * (A(load(from[(int64_t(iy) * p.w + ix) * step])) + bias);
          }
          sum += p.separable1 ? A(p.f1[p.correlate ? ky : p.kh1 - 1 - ky]) * along : along;
        }
        z[r] = sum * A(p.gain1);
      }
      activate(z, my0 + row, mx0 + column, plane, my0 + row < own_y && mx0 + column < own_x, p);
#pragma unroll
      for (int r = 0; r < 4; r++)
        if (row + r < height) SPG_STORE_SHARED(mid, (row + r) * width + column, z[r]);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < p.tile * p.tile; i += kFilteredThreads) {
      const int row = i / p.tile, column = i % p.tile, oy = oy0 + row, ox = ox0 + column;
      if (oy >= p.out_h || ox >= p.out_w) continue;
      A sum = 0;
      for (int ky = 0; ky < p.kh2; ky++) {
        A along = 0;
        for (int kx = 0; kx < p.kw2; kx++) {
          const int k = p.separable2 ? kx : ky * p.kw2 + kx, last = (p.separable2 ? p.kw2 : p.kh2 * p.kw2) - 1;
          along += A(p.f2[p.correlate ? k : last - k]) * mid[(row * p.down + ky) * width + column * p.down + kx];
        }
        sum += p.separable2 ? A(p.f2[p.correlate ? ky : p.kh2 - 1 - ky]) * along : along;
      }
      const int64_t at = int64_t(oy) * p.out_w + ox;
      store(static_cast<T*>(p.y) + (p.channels_last ? (n * p.out_h * p.out_w + at) * p.c + c : plane * p.out_h * p.out_w + at),
            A(sum * A(p.gain2)));
    }
    __syncthreads();  // all threads must be done before the next tile overwrites the values
  }
}

}  // namespace spg
