// bias_act on the GPU: out = f(z), g f'(z) or g h f''(z), with z = x * scale + noise + bias and f(z) = clamp(act(z) *
// gain). cpu/bias_act.cpp computes the same.
//
// The tensor is treated as a matrix. In NCHW the rows are planes [n, c] and the columns are pixels; in channels_last
// the rows are pixels [n, h, w] and the columns are channels. Blocks extend along the columns, and a thread processes N
// neighbouring columns at once.
#pragma once

#include "numbers.cuh"

namespace spg {

enum Act : int { kLinear, kRelu, kLrelu, kTanh, kSigmoid, kElu, kSelu, kSoftplus, kSwish };
enum Order : int { kValue, kSlope, kCurvature };

struct BiasActParams {
  const void *x, *g, *h;
  void* out;
  int n, rows, columns;                // `rows` of one sample; each number is at most 2^30
  const void *bias, *scale, *noise;    // [c], [n or 1, c], [n or 1, inner], in the accumulating format
  int64_t scale_stride, noise_stride;  // distances of samples
  double gain, clamp;                  // infinity for none
  int act;
};

constexpr int kBiasActThreads = 256, kBiasActBlocks = 6;  // blocks per multiprocessor, which use three quarters of its threads

// Activations: the value, and the derivatives at z.
// linear, relu and lrelu consist of two straight lines. The slope below zero is a variable, so that all three share one
// instantiation.
template <class A>
struct Straight {
  A below, floor;
  __device__ explicit Straight(int act)
      : below(act == kLinear ? A(1) : act == kRelu ? A(0) : A(0.2)), floor(act == kRelu ? A(0) : -A(INFINITY)) {}
  __device__ A value(A z) const { return z < 0 ? fmax(z * below, floor) : z; }  // fmax turns 0 * infinity, which is NaN, into 0
  __device__ A slope(A z, A) const { return z > 0 ? A(1) : below; }
  __device__ A curvature(A, A) const { return 0; }
};

template <class A>
struct Curved {
  static constexpr A kSeluScale = A(1.0507009873554805), kSeluAlpha = A(1.6732632423543772);
  int act;
  __device__ explicit Curved(int act_) : act(act_) {}
  __device__ static A sigmoid(A z) { return A(1) / (A(1) + exp(-z)); }
  __device__ A value(A z) const {
    switch (act) {
      case kTanh: return tanh(z);
      case kSigmoid: return sigmoid(z);
      case kElu: return z > 0 ? z : expm1(z);
      case kSelu: return kSeluScale * (z > 0 ? z : kSeluAlpha * expm1(z));
      case kSoftplus: return z > 20 ? z : log1p(exp(z));
      default: return z * sigmoid(z);
    }
  }
  __device__ A slope(A z, A v) const {
    if (act == kTanh) return 1 - v * v;
    if (act == kSigmoid) return v * (1 - v);
    if (act == kElu) return z > 0 ? A(1) : v + 1;
    if (act == kSelu) return z > 0 ? kSeluScale : v + kSeluScale * kSeluAlpha;
    const A p = sigmoid(z);
    return act == kSoftplus ? p : p * (1 + z * (1 - p));
  }
  __device__ A curvature(A z, A v) const {
    if (act <= kLrelu) return 0;
    if (act == kTanh) return -2 * v * (1 - v * v);
    if (act == kSigmoid) return v * (1 - v) * (1 - 2 * v);
    if (act == kElu) return z > 0 ? A(0) : v + 1;
    if (act == kSelu) return z > 0 ? A(0) : v + kSeluScale * kSeluAlpha;
    const A p = sigmoid(z), d = p * (1 - p);
    return act == kSoftplus ? d : d * (2 + z * (1 - 2 * p));
  }
};

// g f'(z) or g h f''(z), which are zero where the clamp limits the value.
template <int order, class F, class A>
__device__ __forceinline__ A derivative(const F& f, A z, A g, A h, A gain, A clamp) {
  const A value = f.value(z), y = value * gain;
  const A dz = g * ((order == kSlope ? f.slope(z, value) : h * f.curvature(z, value)) * gain);
  return fabs(y) > clamp ? A(0) : dz;
}

template <class T, template <class> class F, int order, int N, bool channels_last>
__global__ void __launch_bounds__(kBiasActThreads, kBiasActBlocks) bias_act_kernel(BiasActParams p) {
  using A = typename Accumulator<T>::type;
  const F<A> f(p.act);
  const A gain = A(p.gain), clamp = A(p.clamp);
  const A *bias = static_cast<const A*>(p.bias), *scale = static_cast<const A*>(p.scale);
  const A* noise = static_cast<const A*>(p.noise);
  // In the grid, pixels (rows or columns) run along x, channels along y, samples along z. A thread has N values of a
  // row.
  const int row = (channels_last ? blockIdx.x : blockIdx.y) * blockDim.y + threadIdx.y;
  const int column = ((channels_last ? blockIdx.y : blockIdx.x) * blockDim.x + threadIdx.x) * N;
  const int64_t n = blockIdx.z;
  if (row >= p.rows || column >= p.columns) return;
  const int64_t at = (n * p.rows + row) * p.columns + column;
  A row_shift = 0, row_factor = 1;
  if (channels_last) {
    if (noise) row_shift = noise[n * p.noise_stride + row];
  } else {
    if (bias) row_shift = bias[row];
    if (scale) row_factor = scale[n * p.scale_stride + row];
  }
  Pack<T, N> g, h, out;
  if (order >= kSlope) g = load_pack<T, N>(static_cast<const T*>(p.g) + at);
  if (order == kCurvature) h = load_pack<T, N>(static_cast<const T*>(p.h) + at);
  A z[N];
  {
    const Pack<T, N> x = load_pack<T, N>(static_cast<const T*>(p.x) + at);
    A factor[N], shift[N];
    fill<N>(factor, row_factor);
    fill<N>(shift, A(0));
    if (channels_last) {
      if (scale) load_values<N>(factor, scale + n * p.scale_stride + column);
      if (bias) load_values<N>(shift, bias + column);
    } else if (noise) {
      load_values<N>(shift, noise + n * p.noise_stride + column);
    }
#pragma unroll
    for (int i = 0; i < N; i++) z[i] = load(x.v[i]) * factor[i] + (shift[i] + row_shift);
  }
#pragma unroll
  for (int i = 0; i < N; i++) {
    if (order == kValue) {
      A y = f.value(z[i]) * gain;
      y = y < -clamp ? -clamp : y;  // with this comparison NaN stays NaN
      y = y > clamp ? clamp : y;
      store(&out.v[i], y);
    } else {
      store(&out.v[i], derivative<order>(f, z[i], load(g.v[i]), order == kCurvature ? load(h.v[i]) : A(0), gain, clamp));
    }
  }
  store_pack<T, N>(static_cast<T*>(p.out) + at, out);
}

}  // namespace spg
