// The entry point of the filtered leaky ReLU for stylegan_pg/ops/calls.py. It chooses the kernel and the tiles, and
// launches on a stream.

#include "filtered_lrelu.cuh"

#include <cmath>

#include "launch.h"

namespace spg {
namespace {

// The largest number of blocks, which process further tiles in a loop. It is small in the shim, so that tests execute
// the loop, unless they run the last blocks only.
#ifdef SPG_SHIM
int64_t most_blocks() { return shim::machine.last_blocks ? int64_t(1) << 30 : 5; }
#else
int64_t most_blocks() { return int64_t(1) << 30; }
#endif

int modulo(int a, int b) { return (a % b + b) % b; }

template <class K>
int launch(K kernel, FilteredParams& p, int64_t planes, int out_w, int out_h, stream_t stream) {
  p.tiles_x = int(blocks(p.out_w, out_w)), p.tiles_y = int(blocks(p.out_h, out_h));
  p.tiles = planes * p.tiles_x * p.tiles_y;
  return SPG_LAUNCH(kernel, dim3(unsigned(std::min(p.tiles, most_blocks()))), dim3(kFilteredThreads), stream, p);
}

template <class T, int UP, int DOWN>
int launch_tiles(FilteredParams& p, const float* taps1, const float* taps2, stream_t stream) {
  p.shift_x = modulo(-p.left2 - p.left1, UP), p.shift_y = modulo(-p.top2 - p.top1, UP);
  for (int k = 0; p.separable1 && k < p.kw1; k++) {
    const float tap = taps1[p.correlate ? k : p.kw1 - 1 - k];
    p.x1[k + p.shift_x] = tap, p.y1[k + p.shift_y] = tap * float(p.gain1);
  }
  for (int k = 0; p.separable2 && k < p.kw2; k++) {
    const float tap = taps2[p.correlate ? k : p.kw2 - 1 - k];
    p.x2[k] = tap, p.y2[k] = tap * float(p.gain2);
  }
  constexpr int V = kFull<T>;
  p.packed_in = p.w % V == 0 && aligned(p.x), p.packed_out = p.out_w % V == 0 && aligned(p.y);
  if (p.channels_last) {
    using S = FilteredTile<T, UP, DOWN, true>;
    return launch(filtered_lrelu_tiles<T, UP, DOWN, true>, p, p.n * p.c / V, S::kOutW, S::kOutH, stream);
  }
  using S = FilteredTile<T, UP, DOWN, false>;
  return launch(filtered_lrelu_tiles<T, UP, DOWN, false>, p, p.n * p.c, S::kOutW, S::kOutH, stream);
}

template <class T>
int launch_filtered(FilteredParams& p, const float* taps1, const float* taps2, stream_t stream) {
  if constexpr (sizeof(T) < 8) {
    const bool few = std::max(p.kh1, p.kw1) <= kPhaseTaps * p.up && std::max(p.kh2, p.kw2) <= kPhaseTaps * p.down;
    const bool in_packs = !p.channels_last || (p.c % kFull<T> == 0 && aligned(p.x) && aligned(p.y));
    if (few && in_packs) {
      if (p.up == 2 && p.down == 2) return launch_tiles<T, 2, 2>(p, taps1, taps2, stream);
      if (p.up == 4 && p.down == 2) return launch_tiles<T, 4, 2>(p, taps1, taps2, stream);
      if (p.up == 2 && p.down == 4) return launch_tiles<T, 2, 4>(p, taps1, taps2, stream);
    }
  }
  // Tiles begin at rows that are multiples of 4 at the temporary rate, because the slopes of four rows are one byte.
  p.tile = 4;
  while (p.tile < 32 && (2 * p.tile - 1) * p.down + std::max(p.kh2, p.kw2) + p.down - 1 <= kMostMid) p.tile *= 2;
  return launch(filtered_lrelu_any<T>, p, p.n * p.c, p.tile, p.tile, stream);
}

}  // namespace
}  // namespace spg

// The same as spg_filtered_lrelu_cpu in cpu/filtered_lrelu.cpp, with filters on the device and their taps on the host
// (those of separable filters; others may be null), and without dbias. Returns 0, a CUDA error, or -1 if there is no
// kernel, because the number format is unknown, there are too many taps, or a dimension is larger than 2^28.
SPG_API int spg_filtered_lrelu_cuda(int device, void* stream, int dtype, int mode, const void* x, void* y, void* slopes,
                                    const void* bias, const float* taps1, const float* taps2, const float* f1,
                                    const float* f2, int64_t n, int64_t c, int64_t h, int64_t w, int64_t mid_h,
                                    int64_t mid_w, int64_t out_h, int64_t out_w, int64_t left1, int64_t top1,
                                    int64_t left2, int64_t top2, int up, int down, int kh1, int kw1, int separable1,
                                    int kh2, int kw2, int separable2, int channels_last, int correlate, double gain1,
                                    double gain2, double gain, double slope, double clamp) {
  using namespace spg;
  if (n * c * out_h * out_w == 0) return 0;
  auto fits = [](int factor) { return factor == 1 || factor == 2 || factor == 4; };
  const int64_t most = std::max({h, w, mid_h, mid_w, out_h, out_w, c, std::abs(left1), std::abs(top1), std::abs(left2),
                                 std::abs(top2)});
  if (!fits(up) || !fits(down) || std::max({kh1, kw1, kh2, kw2}) > kMostTaps || most > kMostOfADimension / 4) return -1;
  FilteredParams p{};
  p.x = x, p.y = y, p.slopes = static_cast<uint8_t*>(slopes), p.bias = bias, p.f1 = f1, p.f2 = f2, p.n = n, p.c = c;
  p.h = int(h), p.w = int(w), p.mid_h = int(mid_h), p.mid_w = int(mid_w), p.out_h = int(out_h), p.out_w = int(out_w);
  p.left1 = int(left1), p.top1 = int(top1), p.left2 = int(left2), p.top2 = int(top2), p.up = up, p.down = down;
  p.kh1 = kh1, p.kw1 = kw1, p.kh2 = kh2, p.kw2 = kw2, p.separable1 = separable1 != 0, p.separable2 = separable2 != 0;
  p.channels_last = channels_last != 0, p.correlate = correlate != 0, p.mode = mode, p.gain1 = gain1, p.gain2 = gain2;
  p.gain = gain, p.slope = slope, p.clamp = clamp < 0 ? INFINITY : clamp;
  if (const int code = SPG_SET_DEVICE(device)) return code;
  return with_dtype(dtype, [&](auto zero) {
    return launch_filtered<decltype(zero)>(p, taps1, taps2, static_cast<stream_t>(stream));
  });
}
