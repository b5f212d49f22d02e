// The entry point of upfirdn2d for stylegan_pg/ops/calls.py. It chooses kernel, grid and block, and launches on a
// stream.

#include "upfirdn2d.cuh"

#include "launch.h"

namespace spg {
namespace {

template <class T, int UP, int DOWN>
int launch_fast(const Upfirdn2dParams& p, stream_t stream) {
  constexpr int V = kFull<T>;
  if (p.channels_last) {
    const int64_t flat = p.out_w * (p.c / V);
    const int x = power_of_two_from(flat, 128), y = 128 / x;
    const dim3 grid(unsigned(blocks(flat, x)), unsigned(blocks(p.out_h, y)), unsigned(p.n));
    if (flat > kMostOfADimension || grid.y > kMostBlocksYZ || p.n > kMostBlocksYZ) return -1;
    return SPG_LAUNCH((upfirdn2d_pixels<T, UP, DOWN>), grid, dim3(x, y), stream, p);
  }
  using S = Tile<T, UP, DOWN>;
  const dim3 grid(unsigned(blocks(p.out_w, S::kOutW)), unsigned(blocks(p.out_h, S::kOutH)),
                  unsigned(std::min(p.n * p.c, kMostLayers)));
  if (grid.y > kMostBlocksYZ) return -1;
  const dim3 block(S::kThreadsX, S::kThreadsY);
  if (p.w % V == 0 && p.out_w % V == 0 && aligned(p.x) && aligned(p.y))
    return SPG_LAUNCH((upfirdn2d_planes<T, UP, DOWN, true>), grid, block, stream, p);
  return SPG_LAUNCH((upfirdn2d_planes<T, UP, DOWN, false>), grid, block, stream, p);
}

// Returns whether a fast kernel applies: 4 taps and equal factors in both directions, even padding for up-sampling, and
// whole packs of channels in channels_last.
template <class T>
int launch_upfirdn2d(const Upfirdn2dParams& p, bool separable, stream_t stream) {
  if constexpr (sizeof(T) < 8) {
    const bool in_packs = !p.channels_last || (p.c % kFull<T> == 0 && aligned(p.x) && aligned(p.y));
    if (separable && p.kw == 4 && p.kh == 4 && p.up_x == p.up_y && p.down_x == p.down_y && in_packs) {
      int code = -1;
      if (p.up_x == 1 && p.down_x == 1) code = launch_fast<T, 1, 1>(p, stream);
      if (p.up_x == 1 && p.down_x == 2) code = launch_fast<T, 1, 2>(p, stream);
      if (p.up_x == 2 && p.down_x == 1 && p.left % 2 == 0 && p.top % 2 == 0) code = launch_fast<T, 2, 1>(p, stream);
      if (code >= 0) return code;
    }
  }
  const int64_t total = p.n * p.c * p.out_h * p.out_w;
  return SPG_LAUNCH((upfirdn2d_any<T>), dim3(unsigned(std::min(blocks(total, 256), int64_t(1) << 20))), dim3(256), stream, p);
}

}  // namespace
}  // namespace spg

// Computes y [n, c, out_h, out_w] from x [n, c, h, w], both dense and in the same layout; f is float32 [kh, kw] on the
// device. For a separable filter, `factors` (on the host) contains fx [4] and fy [4] in the orientation of a
// correlation, including the gain; otherwise it is null. Returns 0, a CUDA error, or -1 if there is no kernel, because
// the number format is unknown or a dimension is larger than 2^30.
SPG_API int spg_upfirdn2d_cuda(int device, void* stream, int dtype, const void* x, void* y, const float* f,
                               const float* factors, int64_t n, int64_t c, int64_t h, int64_t w, int64_t out_h,
                               int64_t out_w, int up_x, int up_y, int down_x, int down_y, int left, int top, int kh,
                               int kw, int channels_last, int correlate, double gain) {
  using namespace spg;
  if (n * c * out_h * out_w == 0) return 0;
  if (std::max({h, w, out_h, out_w}) > kMostOfADimension) return -1;
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
