// What stylegan_pg/ops/native.py calls: chooses kernel, grid and block, and launches on a stream. The same file makes
// the library that runs the kernels without a GPU (g++ -x c++ -DSPG_SHIM).

#include <algorithm>

#include "bias_act.cuh"
#include "upfirdn2d.cuh"

#define SPG_API extern "C" __attribute__((visibility("default")))

namespace spg {
namespace {

// Codes shared with stylegan_pg/ops/native.py.
enum Dtype : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// Along y and z, where the kernels go on in steps of the grid. The shim has few, so that they have to.
#ifdef SPG_SHIM
constexpr int64_t kMostBlocks = 3;
#else
constexpr int64_t kMostBlocks = 65535;
#endif

inline unsigned blocks(int64_t work, int64_t each, int64_t most = kMostBlocks) {
  return unsigned(std::min((work + each - 1) / each, most));
}

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

template <class T, int UP, int DOWN>
int launch_fast(const Upfirdn2dParams& p, stream_t stream) {
  constexpr int V = kFull<T>;
  if (p.channels_last) {
    const int64_t flat = int64_t((p.out_w + UP - 1) / UP) * (p.c / V);
    const int x = power_of_two_from(flat, 128), y = 128 / x;
    const dim3 grid(blocks(flat, x, 2147483647), blocks(p.out_h, y * UP, 2147483647), blocks(p.n, 1));
    if (grid.y > 65535) return -1;
    return SPG_LAUNCH((upfirdn2d_pixels<T, UP, DOWN>), grid, dim3(x, y), stream, p);
  }
  using S = Tile<T, UP, DOWN>;
  const dim3 grid(blocks(p.out_w, S::kOutW, 2147483647), blocks(p.out_h, S::kOutH, 2147483647), blocks(p.n * p.c, 1));
  if (grid.y > 65535) return -1;
  return SPG_LAUNCH((upfirdn2d_planes<T, UP, DOWN>), grid, dim3(S::kThreadsX, S::kThreadsY), stream, p);
}

// 4 taps in both directions, equal factors, whole packs, and in phase: what the fast kernels are made for.
template <class T>
int launch_upfirdn2d(const Upfirdn2dParams& p, bool separable, stream_t stream) {
  constexpr int V = kFull<T>;
  const bool in_packs = p.channels_last ? p.c % V == 0 : p.w % V == 0 && p.out_w % V == 0;
  if (sizeof(T) < 8 && separable && p.kw == 4 && p.kh == 4 && p.up_x == p.up_y && p.down_x == p.down_y && in_packs &&
      aligned(p.x) && aligned(p.y)) {
    int code = -1;
    if (p.up_x == 1 && p.down_x == 1) code = launch_fast<T, 1, 1>(p, stream);
    if (p.up_x == 1 && p.down_x == 2) code = launch_fast<T, 1, 2>(p, stream);
    if (p.up_x == 2 && p.down_x == 1 && p.left % 2 == 0 && p.top % 2 == 0) code = launch_fast<T, 2, 1>(p, stream);
    if (code >= 0) return code;
  }
  const int64_t total = p.n * p.c * p.out_h * p.out_w;
  return SPG_LAUNCH((upfirdn2d_any<T>), dim3(blocks(total, 256, 1 << 20)), dim3(256), stream, p);
}

template <class T, template <class> class F, int order, int N>
int launch_bias_act(const BiasActParams& p, bool channels_last, stream_t stream) {
  const int x = power_of_two_from((p.columns + N - 1) / N, 256), y = 256 / x;
  const dim3 grid(blocks(p.columns, int64_t(x) * N, 1 << 20), blocks(p.n * p.rows_of_n, y));
  if (channels_last) return SPG_LAUNCH((bias_act_kernel<T, F, order, N, true>), grid, dim3(x, y), stream, p);
  return SPG_LAUNCH((bias_act_kernel<T, F, order, N, false>), grid, dim3(x, y), stream, p);
}

template <class T, int order>
int launch_straight(const BiasActParams& p, bool channels_last, stream_t stream) {
  constexpr int V = kFull<T>;
  if (p.columns % V == 0 && aligned(p.x) && aligned(p.g) && aligned(p.h) && aligned(p.out))
    return launch_bias_act<T, Straight, order, V>(p, channels_last, stream);
  return launch_bias_act<T, Straight, order, 1>(p, channels_last, stream);
}

// The curved activations are bound by arithmetic, so they go without packs; the straight ones have no second derivative.
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

// x [n, c, h, w] -> y [n, c, out_h, out_w], both dense in the same layout; f [kh, kw] float32 on the device. For a
// separable filter `factors` (on the host) holds fx and fy [4] in the orientation of a correlation, gain included; else
// it is null. Returns 0, a CUDA error, or -1 for a number format that has no kernel.
SPG_API int spg_upfirdn2d_cuda(int device, void* stream, int dtype, const void* x, void* y, const float* f,
                               const float* factors, int64_t n, int64_t c, int64_t h, int64_t w, int64_t out_h,
                               int64_t out_w, int up_x, int up_y, int down_x, int down_y, int left, int top, int kh,
                               int kw, int channels_last, int correlate, double gain) {
  using namespace spg;
  if (n * c * out_h * out_w == 0) return 0;
  Upfirdn2dParams p{x, y, f, n, c, int(h), int(w), int(out_h), int(out_w), up_x, up_y, down_x, down_y, left, top, kh, kw,
                    channels_last != 0, correlate != 0, gain, {}, {}};
  for (int i = 0; factors && i < 4; i++) {
    p.fx[i] = factors[i];
    p.fy[i] = factors[4 + i];
  }
  if (const int code = SPG_SET_DEVICE(device)) return code;
  return with_dtype(dtype, [&](auto zero) {
    return launch_upfirdn2d<decltype(zero)>(p, factors != nullptr, static_cast<stream_t>(stream));
  });
}

// As spg_bias_act_cpu (cpu/bias_act.cpp).
SPG_API int spg_bias_act_cuda(int device, void* stream, int dtype, int act, int order, const void* x, const void* g,
                              const void* h, void* out, int64_t n, int64_t c, int64_t inner, int channels_last,
                              const void* bias, const void* scale, int64_t scale_stride, const void* noise,
                              int64_t noise_stride, double gain, double clamp) {
  using namespace spg;
  if (n * c * inner == 0) return 0;
  const BiasActParams p{x, g, h, out, n, channels_last ? inner : c, channels_last ? c : inner, bias, scale, noise,
                        scale_stride, noise_stride, gain, clamp, act};
  if (const int code = SPG_SET_DEVICE(device)) return code;
  return with_dtype(dtype, [&](auto zero) {
    return launch_bias_act<decltype(zero)>(p, order, channels_last != 0, static_cast<stream_t>(stream));
  });
}
