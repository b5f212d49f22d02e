// 3x3 convolutions in channels_last that preserve the size, halve it (stride 2, no padding) or double it (transposed).
// They use fewer products than direct convolution (minimal.h): for a tile of 4x4 outputs 36 instead of 144, or 81 at
// stride 2. Their rounding errors are about ten times those of direct convolution, far below the rounding of bfloat16.
// They are for bfloat16 on processors without bfloat16 instructions.
//
// Images have the number format T; weights and all sums have the format A (float, or double for double). At each point
// of the transform there is one matrix product over channels: of the tiles and the weights for the result, or of the
// tiles and the gradients for the gradient of the weights. Both process blocks of tiles that stay in the caches. The
// order of summation does not depend on the number of threads and, for results, not on the other images of a batch.

#include <algorithm>
#include <cstring>

#include "memory.h"
#include "minimal.h"
#include "numbers.h"
#include "parallel.h"
#include "products.h"
#include "vectors.h"

namespace spg {
namespace {

constexpr int64_t kSummedTiles = 64;  // tiles over which the gradients of the weights are summed at once
constexpr int kMatrices = kTaps * kTaps;

// The number of input channels is padded to whole packs, the number of output channels to whole panels.
static_assert(kLanes<double> % kRows == 0 && kPanel<double> % kLanes<double> == 0);
inline int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Picture {
  int64_t h, w, c;
};

// The number of tiles of `side` outputs, given the number of outputs.
struct Tiles {
  int64_t rows, columns, count;
  Tiles(int64_t n, const Picture& out, int64_t side)
      : rows((out.h + side - 1) / side), columns((out.w + side - 1) / side), count(n * rows * columns) {}
};

// The position of a tile: its sample, and its row and column in the sample.
struct Tile {
  int64_t sample, row, column;
  Tile(const Tiles& t, int64_t i)
      : sample(i / (t.rows * t.columns)), row(i / t.columns % t.rows), column(i % t.columns) {}
};

// The index of the weights by which a point is multiplied.
template <class Plan>
constexpr int matrix_of(int point) {
  const int y = point / Plan::kPoints, x = point % Plan::kPoints;
  return (y < kTaps ? y : kTaps - 1) * kTaps + (x < kTaps ? x : kTaps - 1);
}

// ------------------------------------------------------------------------------------------------------- transforms

// Loads `side` times `side` packs of an image, beginning at (y, x), with distance `pitch`. Positions outside of the
// image or of its channels are zero.
template <int side, int pitch, class T, class P>
SPG_INLINE void load_square(const T* sample, const Picture& from, int64_t y, int64_t x, int64_t channel, P* to) {
  for (int i = 0; i < side; i++)
    for (int k = 0; k < side; k++) {
      const bool inside = y + i >= 0 && y + i < from.h && x + k >= 0 && x + k < from.w && channel < from.c;
      to[i * pitch + k] =
          inside ? load_pack(sample + ((y + i) * from.w + x + k) * from.c + channel, from.c - channel) : P{};
    }
}

// Computes to[points, channels] = B^T x B. The points have a distance of `stride`.
template <class Plan, class T, class A>
void inputs(const T* x, const Picture& from, const Tile& tile, A* to, int64_t stride) {
  constexpr int n = Plan::kPoints;
  const T* sample = x + tile.sample * from.h * from.w * from.c;
  const int64_t top = tile.row * Plan::kInStep + Plan::kFirst, left = tile.column * Plan::kInStep + Plan::kFirst;
  for (int64_t j = 0; j < from.c; j += kLanes<A>) {
    Pack<A> d[n * n];
    load_square<Plan::kIn, n>(sample, from, top, left, j, d);
    for (int i = 0; i < Plan::kIn; i++) Plan::of_inputs(d + i * n, d + i * n, 1);
    for (int k = 0; k < n; k++) Plan::of_inputs(d + k, d + k, n);
    for (int p = 0; p < n * n; p++) store_pack(to + p * stride + j, d[p]);
  }
}

// Computes A y A^T of a tile of the result's gradient, as panels of columns with distance `panel`.
template <class Plan, class T, class A>
void gradients(const T* dy, const Picture& from, const Tile& tile, A* to, int64_t stride, int64_t panel) {
  constexpr int n = Plan::kPoints;
  const T* sample = dy + tile.sample * from.h * from.w * from.c;
  for (int64_t j = 0; j < padded(from.c, kPanel<A>); j += kLanes<A>) {
    Pack<A> d[n * n];
    load_square<Plan::kOut, n>(sample, from, tile.row * Plan::kOut, tile.column * Plan::kOut, j, d);
    for (int i = 0; i < Plan::kOut; i++) Plan::of_outputs(d + i * n, d + i * n, 1);
    for (int k = 0; k < n; k++) Plan::of_outputs(d + k, d + k, n);
    for (int p = 0; p < n * n; p++) store_pack(to + j / kPanel<A> * panel + j % kPanel<A> + p * stride, d[p]);
  }
}

// Computes A^T m A of m[points, channels], and stores the part within the image.
template <class Plan, class T, class A>
void outputs(const A* m, int64_t stride, const Picture& to, const Tile& tile, T* y) {
  constexpr int n = Plan::kPoints;
  const int64_t top = tile.row * Plan::kOut, left = tile.column * Plan::kOut;
  T* const first = y + ((tile.sample * to.h + top) * to.w + left) * to.c;
  for (int64_t j = 0; j < to.c; j += kLanes<A>) {
    Pack<A> d[n * n];
    for (int p = 0; p < n * n; p++) d[p] = load_pack(m + p * stride + j);
    for (int k = 0; k < n; k++) Plan::to_outputs(d + k, d + k, n);
    for (int i = 0; i < Plan::kOut && top + i < to.h; i++) {
      Plan::to_outputs(d + i * n, d + i * n, 1);
      for (int k = 0; k < Plan::kOut && left + k < to.w; k++)
        store_pack(first + (i * to.w + k) * to.c + j, d[i * n + k], to.c - j);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------- weights

struct Strides {
  int64_t out, in, y, x;  // distances in numbers
};

// Computes the transformed weights [kMatrices, panels of outputs, inputs, kPanel]. Outputs and inputs are padded.
template <class A>
struct Weights {
  int64_t in, out, in_padded, out_padded;
  Weights(int64_t in, int64_t out) : in(in), out(out), in_padded(padded(in, kLanes<A>)), out_padded(padded(out, kPanel<A>)) {}
  int64_t stride() const { return in_padded * out_padded; }
  int64_t size() const { return kMatrices * stride(); }
  int64_t at(int64_t i, int64_t o) const { return (o / kPanel<A> * in_padded + i) * kPanel<A> + o % kPanel<A>; }
};

// Calls f(first output of a pack, first input, number of inputs) for parts of the weights, in parallel.
template <class A, class F>
void over_weights(const Weights<A>& u, const F& f) {
  const int64_t blocks = u.in_padded / kLanes<A>;
  parallel_for(u.out_padded / kLanes<A> * blocks, 16,
               [&](int64_t task) { f(task / blocks * kLanes<A>, task % blocks * kLanes<A>); });
}

template <class Plan, class A>
void transform_weights(const A* w, const Strides& by, const Weights<A>& u, A* to) {
  over_weights(u, [&](int64_t o, int64_t first) {
    for (int64_t i = first; i < first + kLanes<A>; i++) {
      Pack<A> g[kMatrices] = {};
      if (i < u.in)
        for (int lane = 0; lane < kLanes<A> && o + lane < u.out; lane++)
          for (int t = 0; t < 9; t++)
            g[t / 3 * kTaps + t % 3][lane] = w[(o + lane) * by.out + i * by.in + t / 3 * by.y + t % 3 * by.x];
      for (int k = 0; k < 3; k++) Plan::of_weights(g + k * kTaps, g + k * kTaps, 1);
      for (int k = 0; k < kTaps; k++) Plan::of_weights(g + k, g + k, kTaps);
      for (int p = 0; p < kMatrices; p++) store_pack(to + p * u.stride() + u.at(i, o), g[p]);
    }
  });
}

template <class Plan, class A>
void transform_gradient(const A* from, const Weights<A>& u, A* w, const Strides& by) {
  over_weights(u, [&](int64_t o, int64_t first) {
    for (int64_t i = first; i < std::min(first + kLanes<A>, u.in); i++) {
      Pack<A> g[kMatrices];
      for (int p = 0; p < kMatrices; p++) g[p] = load_pack(from + p * u.stride() + u.at(i, o));
      for (int k = 0; k < kTaps; k++) Plan::to_weights(g + k, g + k, kTaps);
      for (int k = 0; k < 3; k++) Plan::to_weights(g + k * kTaps, g + k * kTaps, 1);
      for (int lane = 0; lane < kLanes<A> && o + lane < u.out; lane++)
        for (int t = 0; t < 9; t++)
          w[(o + lane) * by.out + i * by.in + t / 3 * by.y + t % 3 * by.x] = g[t / 3 * kTaps + t % 3][lane];
    }
  });
}

// ----------------------------------------------------------------------------------------------------- convolutions

// The working memory, in numbers: transformed weights, and for each block of tiles the inputs and the products.
struct Room {
  int64_t weights, first, second;
};

// The number of tiles that a thread processes at once. With few channels, tiles and weights stay in its second-level
// cache. With many channels the weights do not, so more tiles are processed for each time that the weights are read.
// Few tiles are divided among all threads.
struct Blocks {
  int64_t size, count, workers;
  Blocks(bool many_points, int64_t tiles, int64_t in, int64_t out, int64_t threads) {
    const int64_t most = (many_points ? 16 : 32) * (std::max(in, out) > 128 ? 2 : 1);
    size = std::min(most, padded(std::max<int64_t>(1, (tiles + threads - 1) / threads), kRows));
    count = (tiles + size - 1) / size;
    workers = std::min(threads, std::max<int64_t>(1, count));
  }
};

template <class Plan, class A>
Room room_for_result(int64_t in, int64_t out, const Blocks& blocks) {
  const Weights<A> u(in, out);
  const int64_t rows = Plan::kPoints * Plan::kPoints * blocks.size;
  return {u.size(), rows * u.in_padded, rows * u.out_padded};
}

template <class Plan, class T, class A>
void convolve(const T* x, const A* w, const Strides& by, T* y, int64_t n, const Picture& in, const Picture& out, A* room,
              int64_t threads) {
  constexpr int points = Plan::kPoints * Plan::kPoints;
  const Weights<A> u(in.c, out.c);
  const Tiles tiles(n, out, Plan::kOut);
  const Blocks blocks(Plan::kPoints > kTaps, tiles.count, in.c, out.c, threads);
  const Room each = room_for_result<Plan, A>(in.c, out.c, blocks);
  A* const weights = room;
  transform_weights<Plan>(w, by, u, weights);
  parallel_for(blocks.workers, 1, [&](int64_t worker) {
    A *const from = room + each.weights + worker * (each.first + each.second), *const to = from + each.first;
    for (int64_t b = worker; b < blocks.count; b += blocks.workers) {
      const int64_t begin = b * blocks.size, count = std::min(blocks.size, tiles.count - begin);
      const int64_t rows = padded(count, kRows);
      for (int64_t i = 0; i < count; i++)
        inputs<Plan>(x, in, Tile(tiles, begin + i), from + i * u.in_padded, rows * u.in_padded);
      for (int p = 0; p < points; p++) {
        A *const a = from + p * rows * u.in_padded, *const c = to + p * rows * u.out_padded;
        std::fill(a + count * u.in_padded, a + rows * u.in_padded, A(0));
        for (int64_t o = 0; o < u.out_padded; o += kPanel<A>)
          for (int64_t r = 0; r < rows; r += kRows)
            product(u.in_padded, a + r * u.in_padded, u.in_padded, 1, weights + matrix_of<Plan>(p) * u.stride() + u.at(0, o),
                    c + r * u.out_padded + o, u.out_padded, false);
      }
      for (int64_t i = 0; i < count; i++)
        outputs<Plan>(to + i * u.out_padded, rows * u.out_padded, out, Tile(tiles, begin + i), y);
    }
  });
}

template <class Plan, class A>
Room room_for_gradient(int64_t in, int64_t out) {
  const Weights<A> u(in, out);
  const int64_t rows = Plan::kPoints * Plan::kPoints * kSummedTiles;
  return {u.size(), rows * u.in_padded, rows * u.out_padded};
}

template <class Plan, class T, class A>
void gradient_of_weights(const T* x, const T* dy, A* dw, const Strides& by, int64_t n, const Picture& in,
                         const Picture& out, A* room) {
  constexpr int points = Plan::kPoints * Plan::kPoints;
  const Weights<A> u(in.c, out.c);
  const Room each = room_for_gradient<Plan, A>(in.c, out.c);
  A *const weights = room, *const from = room + each.weights, *const of = from + each.first;
  const Tiles tiles(n, out, Plan::kOut);
  if (!tiles.count) std::fill(weights, weights + u.size(), A(0));
  for (int64_t begin = 0; begin < tiles.count; begin += kSummedTiles) {
    const int64_t count = std::min(kSummedTiles, tiles.count - begin), panels = u.out_padded / kPanel<A>;
    parallel_for(count, 4, [&](int64_t i) {
      const Tile tile(tiles, begin + i);
      inputs<Plan>(x, in, tile, from + i * u.in_padded, count * u.in_padded);
      gradients<Plan>(dy, out, tile, of + i * kPanel<A>, count * u.out_padded, count * kPanel<A>);
    });
    parallel_for(kMatrices * panels, 1, [&](int64_t task) {
      const int64_t matrix = task / panels, o = task % panels * kPanel<A>;
      bool add = begin > 0;
      for (int p = 0; p < points; p++) {
        if (matrix_of<Plan>(p) != matrix) continue;
        const A *const a = from + p * count * u.in_padded, *const b = of + p * count * u.out_padded + o * count;
        for (int64_t i = 0; i < u.in_padded; i += kRows)
          product(count, a + i, 1, u.in_padded, b, weights + matrix * u.stride() + u.at(i, o), kPanel<A>, add);
        add = true;
      }
    });
  }
  transform_gradient<Plan>(weights, u, dw, by);
}

// Calls run(plan, number, sum) with values of the types for this dtype and stride.
template <class G>
int with_types(int dtype, bool transposed, int stride, const G& run) {
  auto with_plan = [&](auto plan) {
    if (dtype == kFloat64) run(plan, double(), double());
    else if (dtype == kBFloat16) run(plan, bfloat16(), float());
    else return -1;
    return 0;
  };
  if (stride == 1) return with_plan(Same());
  if (stride != 2) return -1;
  return transposed ? with_plan(Up()) : with_plan(Down());
}

}  // namespace
}  // namespace spg

// Sets *bytes to the working memory of the first of the two functions below or, with `gradient`, of the second. All
// three return 0, or -1 if there is no kernel for the number format or stride.
SPG_API int spg_conv3x3_workspace_cpu(int dtype, int gradient, int transposed, int stride, int64_t n, int64_t in,
                                 int64_t out_h, int64_t out_w, int64_t out, int64_t threads, int64_t* bytes) {
  using namespace spg;
  return with_types(dtype, transposed, stride, [&](auto plan, auto, auto sum) {
    using Plan = decltype(plan);
    using A = decltype(sum);
    const Tiles tiles(n, Picture{out_h, out_w, out}, Plan::kOut);
    const Blocks blocks(Plan::kPoints > kTaps, tiles.count, in, out, threads);
    const Room room = gradient ? room_for_gradient<Plan, A>(in, out) : room_for_result<Plan, A>(in, out, blocks);
    *bytes = int64_t(sizeof(A)) * (room.weights + (gradient ? 1 : blocks.workers) * (room.first + room.second));
  });
}

// Computes y [n, out_h, out_w, out], the correlation of x [n, h, w, in] with weights [out, in, 3, 3] of these strides,
// with padding 1 at stride 1 and without padding at stride 2. If `transposed`, computes the adjoint of a correlation
// from y to x, with weights in the same order.
SPG_API int spg_conv3x3_cpu(int dtype, int transposed, int stride, const void* x, const void* weight, void* y, void* room,
                            int64_t n, int64_t h, int64_t w, int64_t in, int64_t out_h, int64_t out_w, int64_t out,
                            int64_t by_out, int64_t by_in, int64_t by_y, int64_t by_x, int64_t threads) {
  using namespace spg;
  return with_types(dtype, transposed, stride, [&](auto plan, auto number, auto sum) {
    using T = decltype(number);
    using A = decltype(sum);
    const A* first = (const A*)weight + (transposed ? 2 * (by_y + by_x) : 0);
    const Strides by{by_out, by_in, transposed ? -by_y : by_y, transposed ? -by_x : by_x};
    convolve<decltype(plan)>((const T*)x, first, by, (T*)y, n, Picture{h, w, in}, Picture{out_h, out_w, out}, (A*)room,
                             threads);
  });
}

// Computes the gradient of the weights of a convolution that is not transposed, from the gradient dy of its result.
SPG_API int spg_conv3x3_weight_cpu(int dtype, int stride, const void* x, const void* dy, void* dweight, void* room,
                                   int64_t n, int64_t h, int64_t w, int64_t in, int64_t out_h, int64_t out_w, int64_t out,
                                   int64_t by_out, int64_t by_in, int64_t by_y, int64_t by_x) {
  using namespace spg;
  return with_types(dtype, false, stride, [&](auto plan, auto number, auto sum) {
    using T = decltype(number);
    using A = decltype(sum);
    if constexpr (!std::is_same_v<decltype(plan), Up>)
      gradient_of_weights<decltype(plan)>((const T*)x, (const T*)dy, (A*)dweight, Strides{by_out, by_in, by_y, by_x}, n,
                                          Picture{h, w, in}, Picture{out_h, out_w, out}, (A*)room);
  });
}
