// The entry point of bias_act for stylegan_pg/ops/calls.py. It chooses kernel, grid and block, and launches on a
// stream.

#include "bias_act.cuh"

#include <cmath>

#include "launch.h"

namespace spg {
namespace {

template <class T, template <class> class F, int order, int N>
int launch_bias_act(const BiasActParams& p, bool channels_last, stream_t stream) {
  const int x = power_of_two_from((p.columns + N - 1) / N, kBiasActThreads), y = kBiasActThreads / x;
  const int along_columns = (p.columns + x * N - 1) / (x * N), along_rows = (p.rows + y - 1) / y;
  const dim3 grid(channels_last ? along_rows : along_columns, channels_last ? along_columns : along_rows, p.n);
  if (std::max(grid.y, grid.z) > kMostBlocksYZ) return -1;
  if (channels_last) return SPG_LAUNCH((bias_act_kernel<T, F, order, N, true>), grid, dim3(x, y), stream, p);
  return SPG_LAUNCH((bias_act_kernel<T, F, order, N, false>), grid, dim3(x, y), stream, p);
}

template <class T, int order>
int launch_straight(const BiasActParams& p, bool channels_last, stream_t stream) {
  constexpr int V = kFull<T>;
  if (p.columns % V == 0 && aligned(p.x) && aligned(p.g) && aligned(p.h) && aligned(p.out) && aligned(p.bias) &&
      aligned(p.scale) && aligned(p.noise))
    return launch_bias_act<T, Straight, order, V>(p, channels_last, stream);
  return launch_bias_act<T, Straight, order, 1>(p, channels_last, stream);
}

// The speed of curved activations is limited by arithmetic, so they do not use packs. The second derivative of
// piecewise linear activations is zero.
template <class T>
int launch_bias_act(const BiasActParams& p, int order, bool channels_last, stream_t stream) {
  if (p.act <= kLrelu && order == kValue) return launch_straight<T, kValue>(p, channels_last, stream);
  if (p.act <= kLrelu && order == kSlope) return launch_straight<T, kSlope>(p, channels_last, stream);
  if (order == kValue) return launch_bias_act<T, Curved, kValue, 1>(p, channels_last, stream);
  if (order == kSlope) return launch_bias_act<T, Curved, kSlope, 1>(p, channels_last, stream);
  return launch_bias_act<T, Curved, kCurvature, 1>(p, channels_last, stream);
}

}  // namespace
}  // namespace spg

// The same as spg_bias_act_cpu in cpu/bias_act.cpp.
SPG_API int spg_bias_act_cuda(int device, void* stream, int dtype, int act, int order, const void* x, const void* g,
                              const void* h, void* out, int64_t n, int64_t c, int64_t inner, int channels_last,
                              const void* bias, const void* scale, int64_t scale_stride, const void* noise,
                              int64_t noise_stride, double gain, double clamp) {
  using namespace spg;
  if (n * c * inner == 0) return 0;
  if (std::max({n, c, inner}) > kMostOfADimension) return -1;
  const BiasActParams p{x, g, h, out, int(n), int(channels_last ? inner : c), int(channels_last ? c : inner), bias, scale,
                        noise, scale_stride, noise_stride, gain, clamp < 0 ? INFINITY : clamp, act};
  if (const int code = SPG_SET_DEVICE(device)) return code;
  return with_dtype(dtype, [&](auto zero) {
    return launch_bias_act<decltype(zero)>(p, order, channels_last != 0, static_cast<stream_t>(stream));
  });
}
