// The entry points of the backward pass of bias_act for stylegan_pg/ops/calls.py. They divide the tensor into tiles,
// and launch the kernel and, if several tiles contribute to a gradient, the one that adds their sums.

#include "bias_act_backward.cuh"

#include <cmath>

#include "launch.h"

namespace spg {
namespace {

// A tile has as many steps as leave this number of tiles: a few for each block that a GPU runs at a time.
#ifdef SPG_SHIM
constexpr int64_t kEnoughTiles = 2;  // small, so that tests execute several steps
#else
constexpr int64_t kEnoughTiles = 2048;
#endif

struct Problem {
  int64_t n, c, inner;
  bool channels_last, one_scale, one_noise;  // whether all samples share the scale and the noise
  bool with_bias, with_scale, with_noise;

  int64_t rows() const { return channels_last ? inner : c; }
  int64_t columns() const { return channels_last ? c : inner; }
  bool every() const { return with_scale || with_noise; }
};

struct Tiling {
  int x, y, steps;
  int64_t across, down;  // tiles
  BiasActSum channels, products, pixels;  // how the numbers of tiles become gradients
};

// If one tile computes a gradient, or none is wanted, there is nothing to add.
bool is_added(const BiasActSum& sum) { return sum.parts > 1; }

BiasActSum sum_of(bool wanted, int64_t parts, int64_t count) {
  if (!wanted) return BiasActSum{};
  return BiasActSum{nullptr, nullptr, parts, count, power_of_two_from(blocks(parts, 4), 64)};
}

// A thread has N columns.
Tiling tiling(const Problem& q, int N) {
  Tiling t{};
  t.x = power_of_two_from(blocks(q.columns(), N), kBiasActThreads), t.y = kBiasActThreads / t.x;
  t.across = blocks(q.columns(), int64_t(t.x) * N), t.down = blocks(q.rows(), t.y);
  int64_t& divided = q.channels_last || q.every() ? t.down : t.across;  // as `along_row` in the kernel
  const int most = q.every() ? std::min(kMostSteps, kRowSums / (t.y * std::max(1, t.x / kWarp))) : kMostSteps;
  const int64_t steps = std::clamp<int64_t>(t.across * t.down * q.n / kEnoughTiles, 1, most);
  t.steps = int(blocks(divided, blocks(divided, steps)));  // tiles of nearly equal size
  divided = blocks(divided, t.steps);
  const int64_t over_pixels = q.channels_last ? t.down : t.across, over_channels = q.channels_last ? t.across : t.down;
  t.channels = sum_of(q.with_bias, over_pixels * q.n, q.c);
  t.products = sum_of(q.with_scale, q.one_scale ? over_pixels * q.n : over_pixels, q.one_scale ? q.c : q.n * q.c);
  t.pixels = sum_of(q.with_noise, q.one_noise ? over_channels * q.n : over_channels,
                    q.one_noise ? q.inner : q.n * q.inner);
  return t;
}

// The numbers of all tiles.
int64_t workspace(const Tiling& t) {
  int64_t count = 0;
  for (const BiasActSum& sum : {t.channels, t.products, t.pixels}) count += is_added(sum) ? sum.parts * sum.count : 0;
  return count;
}

template <class T, template <class> class F, int N>
int launch_backward(const Problem& q, BiasActBackwardParams b, void* room, stream_t stream) {
  using A = typename Accumulator<T>::type;
  Tiling t = tiling(q, N);
  const dim3 grid(unsigned(q.channels_last ? t.down : t.across), unsigned(q.channels_last ? t.across : t.down), b.p.n);
  if (std::max(grid.y, grid.z) > kMostBlocksYZ) return -1;
  BiasActSums added{};
  int jobs = 0;
  int64_t most_blocks = 0;
  const auto place = [&](BiasActSum sum, void*& to) {
    if (!is_added(sum)) return;
    sum.from = room, sum.to = to, to = room;
    room = static_cast<A*>(room) + sum.parts * sum.count;
    most_blocks = std::max(most_blocks, blocks(sum.count, kBiasActThreads / sum.lanes));
    added.sums[jobs++] = sum;
  };
  place(t.channels, b.channels), place(t.products, b.products), place(t.pixels, b.pixels);
  if (most_blocks > kMostOfADimension) return -1;
  b.steps = t.steps;
  const dim3 block(t.x, t.y);
  const auto kernel = q.channels_last ? q.every() ? bias_act_backward_kernel<T, F, N, true, true>
                                                  : bias_act_backward_kernel<T, F, N, true, false>
                      : q.every()     ? bias_act_backward_kernel<T, F, N, false, true>
                                      : bias_act_backward_kernel<T, F, N, false, false>;
  const int code = SPG_LAUNCH(kernel, grid, block, stream, b);
  if (code || !jobs) return code;
  return SPG_LAUNCH((bias_act_sums<A>), dim3(unsigned(most_blocks), jobs), dim3(kBiasActThreads), stream, added);
}

template <class T>
int launch_backward(const Problem& q, const BiasActBackwardParams& b, void* room, stream_t stream) {
  constexpr int V = kFull<T>;
  const BiasActParams& p = b.p;
  if (p.act > kLrelu) return launch_backward<T, Curved, 1>(q, b, room, stream);
  if (p.columns % V == 0 && aligned(p.x) && aligned(p.g) && aligned(p.out) && aligned(p.bias) && aligned(p.scale) &&
      aligned(p.noise))
    return launch_backward<T, Straight, V>(q, b, room, stream);
  return launch_backward<T, Straight, 1>(q, b, room, stream);
}

}  // namespace
}  // namespace spg

// Stores the number of values, in the accumulating format, for which spg_bias_act_backward_cuda needs memory.
SPG_API int spg_bias_act_backward_workspace_cuda(int dtype, int with_bias, int with_scale, int with_noise, int64_t n,
                                                 int64_t c, int64_t inner, int channels_last, int64_t scale_stride,
                                                 int64_t noise_stride, int64_t* values) {
  using namespace spg;
  const Problem q{n, c, inner, channels_last != 0, scale_stride == 0, noise_stride == 0,
                  with_bias != 0, with_scale != 0, with_noise != 0};
  if (n * c * inner == 0) return -1;
  return with_dtype(dtype, [&](auto zero) {
    // Whether packs can be used also depends on the tensors' addresses.
    *values = std::max(workspace(tiling(q, 1)), workspace(tiling(q, kFull<decltype(zero)>)));
    return 0;
  });
}

// Computes dx, in the format of x, and dbias [c], dscale (the shape of scale) and dnoise (the shape of noise) in the
// accumulating format. Each of these three may be null. The stride of a scale or noise that all samples share is 0. The
// other arguments are those of spg_bias_act_cuda; the tensors must not be empty.
SPG_API int spg_bias_act_backward_cuda(int device, void* stream, int dtype, int act, const void* dy, const void* x,
                                       void* dx, void* dbias, void* dscale, void* dnoise, void* workspace, int64_t n,
                                       int64_t c, int64_t inner, int channels_last, const void* bias, const void* scale,
                                       int64_t scale_stride, const void* noise, int64_t noise_stride, double gain,
                                       double clamp) {
  using namespace spg;
  if (n * c * inner == 0 || std::max({n, c, inner}) > kMostOfADimension) return -1;
  const Problem q{n, c, inner, channels_last != 0, scale_stride == 0, noise_stride == 0, dbias != nullptr,
                  dscale != nullptr, dnoise != nullptr};
  const BiasActParams p{x, dy, nullptr, dx, int(n), int(q.rows()), int(q.columns()), bias, scale, noise, scale_stride,
                        noise_stride, gain, clamp < 0 ? INFINITY : clamp, act};
  if (const int code = SPG_SET_DEVICE(device)) return code;
  return with_dtype(dtype, [&](auto zero) {
    return launch_backward<decltype(zero)>(q, BiasActBackwardParams{p, dbias, dscale, dnoise, 0}, workspace,
                                           static_cast<stream_t>(stream));
  });
}
