// Convolutions of 3x3 that keep the size, in channels_last, by Winograd's minimal filtering F(4x4, 3x3) (Lavin and Gray
// 2016, "Fast algorithms for convolutional neural networks"): Y = A^T [(G w G^T) (B^T x B)] A takes 36 products for a tile
// of 4x4 outputs where the definition takes 144. Rounding errors are about ten times as large as the definition's, far
// below those of 16 bits; for where 16 bits are wanted and a processor has no instructions for them.
//
// Numbers at rest are T, all sums are A (float; for double, double). For each of the 36 points the products are a matrix
// product over the channels: of the tiles' rows and the weights' for the result, of the tiles' columns and the gradients'
// for the gradient of the weights. Both go by blocks of tiles that stay in the caches.

#include <algorithm>
#include <cstring>

#include "memory.h"
#include "numbers.h"
#include "parallel.h"
#include "vectors.h"

namespace spg {
namespace {

constexpr int kTile = 4, kReach = 6, kPoints = kReach * kReach;  // outputs and inputs of a tile along a side
constexpr int64_t kSummedTiles = 64;  // gradients of the weights are summed by so many at a time

// Parts of the matrix products that stay in registers: rows, and vectors of columns.
#ifdef __AVX512F__
constexpr int kRows = 8, kVectors = 2;
#else
constexpr int kRows = 4, kVectors = 2;
#endif

// What processors multiply and add at once.
#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
template <class A>
struct VectorOf {
  typedef A type __attribute__((vector_size(kBytes)));
  typedef A stored __attribute__((vector_size(kBytes), aligned(sizeof(A)), may_alias));
};
template <class A>
using Vector = typename VectorOf<A>::type;
template <class A>
constexpr int kWidth = kBytes / sizeof(A);
template <class A>
constexpr int kPanel = kVectors * kWidth<A>;  // columns
// Numbers of inputs are padded to whole packs, those of outputs to whole panels.
static_assert(kLanes<double> % kRows == 0 && kPanel<double> % kLanes<double> == 0);

SPG_INLINE Vector<float> multiply_add(float a, const Vector<float>& b, const Vector<float>& c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(_mm512_set1_ps(a), b, c);
#elif defined(__AVX__) && defined(__FMA__)
  return _mm256_fmadd_ps(_mm256_set1_ps(a), b, c);
#elif defined(__ARM_NEON)
  return vfmaq_n_f32(c, b, a);
#else
  return a * b + c;
#endif
}
SPG_INLINE Vector<double> multiply_add(double a, const Vector<double>& b, const Vector<double>& c) {
  return a * b + c;
}

inline int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Size {
  int64_t n, h, w, tiles_y, tiles_x;
  Size(int64_t n, int64_t h, int64_t w)
      : n(n), h(h), w(w), tiles_y((h + kTile - 1) / kTile), tiles_x((w + kTile - 1) / kTile) {}
  int64_t tiles() const { return n * tiles_y * tiles_x; }
};

// Where a tile lies: the sample's first pixel, and the row and column of its first output.
struct Tile {
  int64_t first, y, x;
  Tile(const Size& s, int64_t i)
      : first(i / (s.tiles_y * s.tiles_x) * s.h * s.w),
        y(i / s.tiles_x % s.tiles_y * kTile),
        x(i % s.tiles_x * kTile) {}
};

// ------------------------------------------------------------------------------------------------ along one side

template <class P>
SPG_INLINE void of_inputs(const P* d, P* o, int step) {  // B^T
  const P d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step];
  const P a = d4 - 4 * d2, b = d3 - 4 * d1, c = d4 - d2, e = 2 * (d3 - d1);
  o[0] = 4 * d[0] - 5 * d2 + d4;
  o[step] = a + b, o[2 * step] = a - b;
  o[3 * step] = c + e, o[4 * step] = c - e;
  o[5 * step] = 4 * d1 - 5 * d3 + d[5 * step];
}

template <class P>
SPG_INLINE void to_outputs(const P* m, P* o, int step) {  // A^T
  const P a = m[step] + m[2 * step], b = m[step] - m[2 * step];
  const P c = m[3 * step] + m[4 * step], d = m[3 * step] - m[4 * step];
  const P last = m[5 * step];
  o[0] = m[0] + a + c;
  o[step] = b + 2 * d;
  o[2 * step] = a + 4 * c;
  o[3 * step] = b + 8 * d + last;
}

template <class P>
SPG_INLINE void of_outputs(const P* y, P* o, int step) {  // A
  const P y0 = y[0], y1 = y[step], y2 = y[2 * step], y3 = y[3 * step];
  const P a = y0 + y2, b = y1 + y3, c = y0 + 4 * y2, d = 2 * y1 + 8 * y3;
  o[0] = y0;
  o[step] = a + b, o[2 * step] = a - b;
  o[3 * step] = c + d, o[4 * step] = c - d;
  o[5 * step] = y3;
}

template <class P>
SPG_INLINE void of_weights(const P* g, P* o, int step) {  // G
  using A = std::decay_t<decltype(g[0][0])>;
  const P sum = g[0] + g[2 * step], middle = g[step];
  const P even = g[0] * A(1.0 / 24) + g[2 * step] * A(1.0 / 6), odd = middle * A(1.0 / 12);
  const P last = g[2 * step];
  o[0] = g[0] * A(0.25);
  o[step] = (sum + middle) * A(-1.0 / 6), o[2 * step] = (middle - sum) * A(1.0 / 6);
  o[3 * step] = even + odd, o[4 * step] = even - odd;
  o[5 * step] = last;
}

template <class P>
SPG_INLINE void to_weights(const P* u, P* o, int step) {  // G^T
  using A = std::decay_t<decltype(u[0][0])>;
  const P a = u[step] + u[2 * step], b = u[2 * step] - u[step];
  const P c = u[3 * step] + u[4 * step], d = u[3 * step] - u[4 * step];
  const P last = u[5 * step];
  o[0] = u[0] * A(0.25) - a * A(1.0 / 6) + c * A(1.0 / 24);
  o[step] = b * A(1.0 / 6) + d * A(1.0 / 12);
  o[2 * step] = (c - a) * A(1.0 / 6) + last;
}

// ------------------------------------------------------------------------------------------------------- transforms

// Rows of `to`, [points, rows, padded channels] of which `stride` lie between points: B^T x B of the inputs around a tile,
// zeros outside of the image and of the channels.
template <class T, class A>
void inputs(const T* x, const Size& s, int64_t c, const Tile& tile, A* to, int64_t stride) {
  for (int64_t j = 0; j < c; j += kLanes<A>) {
    Pack<A> d[kPoints];
    for (int i = 0; i < kReach; i++) {
      const int64_t y = tile.y - 1 + i;
      for (int k = 0; k < kReach; k++) {
        const int64_t at = tile.x - 1 + k;
        const bool inside = y >= 0 && y < s.h && at >= 0 && at < s.w;
        if (inside) load_pack(x + (tile.first + y * s.w + at) * c + j, d[i * kReach + k], c - j);
        else d[i * kReach + k] = Pack<A>{};
      }
      of_inputs(d + i * kReach, d + i * kReach, 1);
    }
    for (int k = 0; k < kReach; k++) of_inputs(d + k, d + k, kReach);
    for (int p = 0; p < kPoints; p++) std::memcpy(to + p * stride + j, d + p, sizeof d[p]);
  }
}

// The same of a gradient's tile of outputs: A y A^T, as panels of columns for a matrix product.
template <class T, class A>
void gradients(const T* y, const Size& s, int64_t c, const Tile& tile, A* to, int64_t stride, int64_t panel) {
  for (int64_t j = 0; j < padded(c, kPanel<A>); j += kLanes<A>) {
    Pack<A> d[kPoints];
    for (int i = 0; i < kTile; i++) {
      for (int k = 0; k < kTile; k++) {
        const bool inside = tile.y + i < s.h && tile.x + k < s.w && j < c;
        const T* from = y + (tile.first + (tile.y + i) * s.w + tile.x + k) * c + j;
        if (inside) load_pack(from, d[i * kReach + k], c - j);
        else d[i * kReach + k] = Pack<A>{};
      }
      of_outputs(d + i * kReach, d + i * kReach, 1);
    }
    for (int k = 0; k < kReach; k++) of_outputs(d + k, d + k, kReach);
    A* const at = to + j / kPanel<A> * panel + j % kPanel<A>;
    for (int p = 0; p < kPoints; p++) std::memcpy(at + p * stride, d + p, sizeof d[p]);
  }
}

// A^T m A, where it lies within the image.
template <class T, class A>
void outputs(const A* m, int64_t stride, const Size& s, int64_t c, const Tile& tile, T* y) {
  for (int64_t j = 0; j < c; j += kLanes<A>) {
    Pack<A> d[kPoints];
    for (int p = 0; p < kPoints; p++) std::memcpy(d + p, m + p * stride + j, sizeof d[p]);
    for (int k = 0; k < kReach; k++) to_outputs(d + k, d + k, kReach);
    for (int i = 0; i < kTile && tile.y + i < s.h; i++) {
      to_outputs(d + i * kReach, d + i * kReach, 1);
      for (int k = 0; k < kTile && tile.x + k < s.w; k++)
        store_pack(y + (tile.first + (tile.y + i) * s.w + tile.x + k) * c + j, d[i * kReach + k], c - j);
    }
  }
}

// ------------------------------------------------------------------------------------------------- matrix products

// c[kRows, kPanel] = the sum over k of a[row * row_step + k * step] * b[k, kPanel], added to what c is if so wanted.
template <class A>
SPG_INLINE void product(int64_t depth, const A* a, int64_t row_step, int64_t step, const A* b, A* c, int64_t c_step,
                        bool add) {
  using Stored = typename VectorOf<A>::stored;  // no memcpy: what it is given the address of does not stay in registers
  Vector<A> sum[kRows][kVectors];
  for (int r = 0; r < kRows; r++)
    for (int v = 0; v < kVectors; v++)
      sum[r][v] = add ? *reinterpret_cast<const Stored*>(c + r * c_step + v * kWidth<A>) : Vector<A>{};
  for (int64_t k = 0; k < depth; k++, a += step, b += kPanel<A>) {
    Vector<A> column[kVectors];
    for (int v = 0; v < kVectors; v++) column[v] = *reinterpret_cast<const Stored*>(b + v * kWidth<A>);
    for (int r = 0; r < kRows; r++)
      for (int v = 0; v < kVectors; v++) sum[r][v] = multiply_add(a[r * row_step], column[v], sum[r][v]);
  }
  for (int r = 0; r < kRows; r++)
    for (int v = 0; v < kVectors; v++) *reinterpret_cast<Stored*>(c + r * c_step + v * kWidth<A>) = sum[r][v];
}

struct Strides {
  int64_t out, in, y, x;  // of the weights, in numbers
};

// [points, panels of outputs, inputs, kPanel], both padded.
template <class A>
struct Weights {
  int64_t in, out, in_padded, out_padded;
  Weights(int64_t in, int64_t out) : in(in), out(out), in_padded(padded(in, kLanes<A>)), out_padded(padded(out, kPanel<A>)) {}
  int64_t stride() const { return in_padded * out_padded; }
  int64_t size() const { return kPoints * stride(); }
  int64_t at(int64_t i, int64_t o) const { return (o / kPanel<A> * in_padded + i) * kPanel<A> + o % kPanel<A>; }
};

// Calls f(first output, first input, inputs) for parts of the weights, in parallel.
template <class A, class F>
void over_weights(const Weights<A>& u, const F& f) {
  const int64_t blocks = u.in_padded / kLanes<A>;
  parallel_for(u.out_padded / kLanes<A> * blocks, 16,
               [&](int64_t task) { f(task / blocks * kLanes<A>, task % blocks * kLanes<A>); });
}

template <class T, class A>
void transform_weights(const T* w, const Strides& by, const Weights<A>& u, A* to) {
  over_weights(u, [&](int64_t o, int64_t first) {
    for (int64_t i = first; i < first + kLanes<A>; i++) {
      Pack<A> g[kPoints] = {};
      if (i < u.in)
        for (int lane = 0; lane < kLanes<A> && o + lane < u.out; lane++)
          for (int t = 0; t < 9; t++)
            g[t / 3 * kReach + t % 3][lane] = load(w[(o + lane) * by.out + i * by.in + t / 3 * by.y + t % 3 * by.x]);
      for (int k = 0; k < 3; k++) of_weights(g + k * kReach, g + k * kReach, 1);
      for (int k = 0; k < kReach; k++) of_weights(g + k, g + k, kReach);
      for (int p = 0; p < kPoints; p++) store_pack(to + p * u.stride() + u.at(i, o), g[p]);
    }
  });
}

template <class T, class A>
void transform_gradient(const A* from, const Weights<A>& u, T* w, const Strides& by) {
  over_weights(u, [&](int64_t o, int64_t first) {
    for (int64_t i = first; i < std::min(first + kLanes<A>, u.in); i++) {
      Pack<A> g[kPoints];
      for (int p = 0; p < kPoints; p++) load_pack(from + p * u.stride() + u.at(i, o), g[p]);
      for (int k = 0; k < kReach; k++) to_weights(g + k, g + k, kReach);
      for (int k = 0; k < 3; k++) to_weights(g + k * kReach, g + k * kReach, 1);
      for (int lane = 0; lane < kLanes<A> && o + lane < u.out; lane++)
        for (int t = 0; t < 9; t++)
          store(&w[(o + lane) * by.out + i * by.in + t / 3 * by.y + t % 3 * by.x], g[t / 3 * kReach + t % 3][lane]);
    }
  });
}

// --------------------------------------------------------------------------------------------------- convolutions

// Tiles that a thread works on at a time: with few channels they and the weights stay in its second-level cache, with
// many the weights come from further away, for more tiles at once.
inline int64_t block_of(int64_t channels) { return channels <= 128 ? 32 : 64; }

struct Room {
  int64_t weights, first, second;  // numbers
};

template <class A>
Room forward_room(int64_t in, int64_t out) {
  const Weights<A> u(in, out);
  const int64_t rows = kPoints * block_of(std::max(in, out));
  return {u.size(), rows * u.in_padded, rows * u.out_padded};
}

template <class T, class A>
void convolve(const T* x, const T* w, const Strides& by, T* y, const Size& s, int64_t in, int64_t out, A* room,
              int64_t workers) {
  const Weights<A> u(in, out);
  const Room each = forward_room<A>(in, out);
  const int64_t block = block_of(std::max(in, out)), tiles = s.tiles();
  A* const weights = room;
  transform_weights(w, by, u, weights);
  parallel_for(workers, 1, [&](int64_t worker) {
    A* const from = room + each.weights + worker * (each.first + each.second);
    A* const to = from + each.first;
    const int64_t blocks = (tiles + block - 1) / block;
    for (int64_t b = worker; b < blocks; b += workers) {
      const int64_t begin = b * block, count = std::min(block, tiles - begin), rows = padded(count, kRows);
      for (int64_t i = 0; i < count; i++)
        inputs(x, s, in, Tile(s, begin + i), from + i * u.in_padded, rows * u.in_padded);
      for (int p = 0; p < kPoints && rows > count; p++)
        std::memset(from + (p * rows + count) * u.in_padded, 0, (rows - count) * u.in_padded * sizeof(A));
      for (int p = 0; p < kPoints; p++)
        for (int64_t o = 0; o < u.out_padded; o += kPanel<A>)
          for (int64_t r = 0; r < rows; r += kRows)
            product(u.in_padded, from + (p * rows + r) * u.in_padded, u.in_padded, 1, weights + p * u.stride() + u.at(0, o),
                    to + (p * rows + r) * u.out_padded + o, u.out_padded, false);
      for (int64_t i = 0; i < count; i++)
        outputs(to + i * u.out_padded, rows * u.out_padded, s, out, Tile(s, begin + i), y);
    }
  });
}

template <class A>
Room gradient_room(int64_t in, int64_t out) {
  const Weights<A> u(in, out);
  return {u.size(), kPoints * kSummedTiles * u.in_padded, kPoints * kSummedTiles * u.out_padded};
}

template <class T, class A>
void gradient_of_weights(const T* x, const T* dy, T* dw, const Strides& by, const Size& s, int64_t in, int64_t out, A* room) {
  const Weights<A> u(in, out);
  const Room each = gradient_room<A>(in, out);
  A *const weights = room, *const from = room + each.weights, *const of = from + each.first;
  const int64_t tiles = s.tiles();
  if (!tiles) std::fill(weights, weights + u.size(), A(0));
  for (int64_t begin = 0; begin < tiles; begin += kSummedTiles) {
    const int64_t count = std::min(kSummedTiles, tiles - begin);
    parallel_for(count, 4, [&](int64_t i) {
      const Tile tile(s, begin + i);
      inputs(x, s, in, tile, from + i * u.in_padded, count * u.in_padded);
      gradients(dy, s, out, tile, of + i * kPanel<A>, count * u.out_padded, count * kPanel<A>);
    });
    const int64_t panels = u.out_padded / kPanel<A>;
    parallel_for(kPoints * panels, 1, [&](int64_t task) {
      const int64_t p = task / panels, o = task % panels * kPanel<A>;
      for (int64_t i = 0; i < u.in_padded; i += kRows)
        product(count, from + p * count * u.in_padded + i, 1, u.in_padded, of + p * count * u.out_padded + o * count,
                weights + p * u.stride() + u.at(i, o), kPanel<A>, begin > 0);
    });
  }
  transform_gradient(weights, u, dw, by);
}

template <class G>
int with_numbers(int dtype, const G& run) {
  if (dtype == kFloat32) run(float(), float());
  else if (dtype == kFloat64) run(double(), double());
  else if (dtype == kBFloat16) run(bfloat16(), float());
  else return -1;
  return 0;
}

}  // namespace
}  // namespace spg

// *bytes = how much memory the two functions below need to work in, on so many threads. All return 0, or -1 for a number
// format that has no kernel.
SPG_API int spg_conv3x3_room_cpu(int dtype, int64_t in, int64_t out, int64_t workers, int64_t* bytes) {
  using namespace spg;
  return with_numbers(dtype, [&](auto, auto sum) {
    using A = decltype(sum);
    const Room f = forward_room<A>(in, out), g = gradient_room<A>(in, out);
    const int64_t forward = f.weights + workers * (f.first + f.second), gradient = g.weights + g.first + g.second;
    *bytes = int64_t(sizeof(A)) * std::max(forward, gradient);
  });
}

// y [n, h, w, out] = the correlation of x [n, h, w, in] with weights [out, in, 3, 3] that lie at these strides, or with
// turned ones: [in, out, 3, 3], both axes in the other direction.
SPG_API int spg_conv3x3_cpu(int dtype, const void* x, const void* weight, void* y, void* room, int64_t n, int64_t h,
                            int64_t w, int64_t in, int64_t out, int64_t by_0, int64_t by_1, int64_t by_2, int64_t by_3,
                            int turned, int64_t workers) {
  using namespace spg;
  return with_numbers(dtype, [&](auto number, auto sum) {
    using T = decltype(number);
    using A = decltype(sum);
    const T* first = (const T*)weight + (turned ? 2 * (by_2 + by_3) : 0);
    const Strides by = turned ? Strides{by_1, by_0, -by_2, -by_3} : Strides{by_0, by_1, by_2, by_3};
    convolve((const T*)x, first, by, (T*)y, Size(n, h, w), in, out, (A*)room, workers);
  });
}

// The gradient of the weights [out, in, 3, 3], from the gradient dy of the result.
SPG_API int spg_conv3x3_weight_cpu(int dtype, const void* x, const void* dy, void* dweight, void* room, int64_t n,
                                   int64_t h, int64_t w, int64_t in, int64_t out, int64_t by_0, int64_t by_1,
                                   int64_t by_2, int64_t by_3) {
  using namespace spg;
  return with_numbers(dtype, [&](auto number, auto sum) {
    using T = decltype(number);
    using A = decltype(sum);
    gradient_of_weights((const T*)x, (const T*)dy, (T*)dweight, Strides{by_0, by_1, by_2, by_3}, Size(n, h, w), in, out,
                        (A*)room);
  });
}
