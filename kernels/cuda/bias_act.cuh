// The tail of every layer on the GPU: out = f(z), g f'(z) or g h f''(z), with z = x * scale + noise + bias and
// f(z) = clamp(act(z) * gain). See cpu/bias_act.cpp, which computes the same.
//
// The tensor is seen as rows and columns: a plane [n, c] and its pixels in NCHW, a pixel [n, h, w] and its channels in
// channels_last. Blocks are flat along the columns, and a thread handles N neighbouring columns at a time.
#pragma once

#include "numbers.cuh"

namespace spg {

enum Act : int { kLinear, kRelu, kLrelu, kTanh, kSigmoid, kElu, kSelu, kSoftplus, kSwish };
enum Order : int { kValue, kSlope, kCurvature };

struct BiasActParams {
  const void *x, *g, *h;
  void* out;
  int64_t n, rows_of_n, columns;           // rows = n * rows_of_n
  const void *bias, *scale, *noise;        // [c], [n or 1, c], [n or 1, inner], of the accumulating format
  int64_t scale_stride, noise_stride;      // between samples
  double gain, clamp;
  int act;
};

// linear, relu and lrelu: two straight lines. The slope below zero comes as a value, so one instantiation serves all.
template <class A>
struct Straight {
  A below;
  __device__ explicit Straight(int act) : below(act == kLinear ? A(1) : act == kRelu ? A(0) : A(0.2)) {}
  __device__ A value(A z) const { return z < 0 ? (below == 0 ? A(0) : z * below) : z; }
  __device__ A slope(A z) const { return z > 0 ? A(1) : below; }
  __device__ A curvature(A) const { return 0; }
};

template <class A>
struct Curved {
  int act;
  __device__ explicit Curved(int act_) : act(act_) {}
  __device__ static A sigmoid(A z) { return A(1) / (A(1) + exp(-z)); }
  __device__ A value(A z) const {
    switch (act) {
      case kTanh: return tanh(z);
      case kSigmoid: return sigmoid(z);
      case kElu: return z > 0 ? z : expm1(z);
      case kSelu: return A(1.0507009873554805) * (z > 0 ? z : A(1.6732632423543772) * expm1(z));
      case kSoftplus: return z > 20 ? z : log1p(exp(z));
      default: return z * sigmoid(z);
    }
  }
  __device__ A slope(A z) const {
    const A p = sigmoid(z);
    switch (act) {
      case kTanh: {
        const A t = tanh(z);
        return 1 - t * t;
      }
      case kSigmoid: return p * (1 - p);
      case kElu: return z > 0 ? A(1) : exp(z);
      case kSelu: return A(1.0507009873554805) * (z > 0 ? A(1) : A(1.6732632423543772) * exp(z));
      case kSoftplus: return p;
      default: return p * (1 + z * (1 - p));
    }
  }
  __device__ A curvature(A z) const {
    const A p = sigmoid(z);
    switch (act) {
      case kTanh: {
        const A t = tanh(z);
        return -2 * t * (1 - t * t);
      }
      case kSigmoid: return p * (1 - p) * (1 - 2 * p);
      case kElu: return z > 0 ? A(0) : exp(z);
      case kSelu: return z > 0 ? A(0) : A(1.0507009873554805 * 1.6732632423543772) * exp(z);
      case kSoftplus: return p * (1 - p);
      case kSwish: return p * (1 - p) * (2 + z * (1 - 2 * p));
      default: return 0;  // straight
    }
  }
};

template <class T, template <class> class F, int order, int N, bool channels_last>
__global__ void bias_act_kernel(BiasActParams p) {
  using A = typename Accumulator<T>::type;
  const F<A> f(p.act);
  const A gain = A(p.gain), clamp = A(p.clamp);
  const bool clamped = p.clamp >= 0;
  const A *bias = static_cast<const A*>(p.bias), *scale = static_cast<const A*>(p.scale);
  const A* noise = static_cast<const A*>(p.noise);
  const int64_t rows = p.n * p.rows_of_n, row_step = int64_t(gridDim.y) * blockDim.y;
  const int64_t first = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  const int64_t column_step = int64_t(gridDim.x) * blockDim.x * N;
  for (int64_t row = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; row < rows; row += row_step) {
    const int64_t n = row / p.rows_of_n, r = row - n * p.rows_of_n;
    A row_bias = 0, row_scale = 1;
    if (channels_last) {
      if (noise) row_bias = noise[n * p.noise_stride + r];
    } else {
      if (bias) row_bias = bias[r];
      if (scale) row_scale = scale[n * p.scale_stride + r];
    }
    for (int64_t column = first; column < p.columns; column += column_step) {
      const int64_t at = row * p.columns + column;
      const Pack<T, N> x = load_pack<T, N>(static_cast<const T*>(p.x) + at);
      Pack<T, N> g = x, h = x, out;
      if (order >= kSlope) g = load_pack<T, N>(static_cast<const T*>(p.g) + at);
      if (order == kCurvature) h = load_pack<T, N>(static_cast<const T*>(p.h) + at);
#pragma unroll
      for (int i = 0; i < N; i++) {
        A factor = row_scale, shift = row_bias;
        if (channels_last) {
          if (scale) factor = scale[n * p.scale_stride + column + i];
          if (bias) shift += bias[column + i];
        } else if (noise) {
          shift += noise[n * p.noise_stride + column + i];
        }
        const A z = load(x.v[i]) * factor + shift;
        A y = f.value(z) * gain;
        if (order == kValue) {
          if (clamped) {
            y = y < -clamp ? -clamp : y;  // in this form NaN stays NaN
            y = y > clamp ? clamp : y;
          }
          store(&out.v[i], y);
        } else {
          A d = load(g.v[i]) * gain;
          d *= order == kSlope ? f.slope(z) : load(h.v[i]) * f.curvature(z);
          if (clamped && (y > clamp || y < -clamp)) d = 0;
          store(&out.v[i], d);
        }
      }
      store_pack<T, N>(static_cast<T*>(p.out) + at, out);
    }
  }
}

}  // namespace spg
