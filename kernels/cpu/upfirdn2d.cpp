// upfirdn2d on the CPU. It is polyphase (inserted zeros are not multiplied), and applies separable filters in two
// passes.
//
// One output row is computed at a time. Its input rows are combined by the column taps into a row buffer with zeros at
// the positions of the padding. The row taps are then applied along this buffer. In channels_last a pixel consists of
// several adjacent values, so a row has `width` values for every x. If the filter is not an outer product, the second
// step is repeated for each row of the filter, and the results are added.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "four_taps.h"
#include "memory.h"
#include "numbers.h"
#include "parallel.h"
#include "shape.h"
#include "slide.h"

namespace spg {
namespace {

constexpr int kRowBuffer = 1024;  // values of a row that are processed at once; all input rows then fit into 32 KiB
constexpr int kRowsPerTask = 32;
constexpr int kSlideRow = 8192, kSlideRows = 8;  // the same for halve_pixels; all rows then fit into 256 KiB

template <class A>
struct Filter {
  std::vector<A> full;     // [kh, kw], in the orientation of a correlation, gain included
  std::vector<A> fx, fy;   // the factors of a separable filter; otherwise empty
};

// `f` is in the order of memory. A convolution is the correlation with the filter rotated by 180 degrees.
template <class A>
Filter<A> prepare(const float* f, int kh, int kw, bool correlate, double gain) {
  Filter<A> out;
  out.full.resize(size_t(kh) * kw);
  for (int i = 0; i < kh * kw; i++) out.full[i] = A(f[correlate ? i : kh * kw - 1 - i] * gain);
  int pivot = 0;
  for (int i = 0; i < kh * kw; i++)
    if (std::abs(out.full[i]) > std::abs(out.full[pivot])) pivot = i;
  const A top = out.full[pivot];
  if (top == 0 || !std::isfinite(double(top))) return out;
  std::vector<A> fx(out.full.begin() + pivot / kw * kw, out.full.begin() + (pivot / kw + 1) * kw), fy(kh);
  for (int i = 0; i < kh; i++) fy[i] = out.full[i * kw + pivot % kw] / top;
  // Filters that were normalised in float32 have been rounded twice, so they are outer products only up to rounding
  // (see stylegan_pg/ops/calls.py). For double images the taps are used directly.
  const A tolerance = std::abs(top) * (sizeof(A) == 8 ? A(1e-16) : A(4e-7));
  for (int i = 0; i < kh; i++)
    for (int j = 0; j < kw; j++)
      if (!(std::abs(out.full[i * kw + j] - fy[i] * fx[j]) <= tolerance)) return out;
  out.fx = fx;
  out.fy = fy;
  return out;
}

struct Set {
  template <class T, class A>
  static void put(T* p, A value) {
    store(p, value);
  }
};
struct Add {
  template <class A>
  static void put(A* p, A value) {
    *p += value;
  }
};

// Computes the outputs ox0 to ox1 of one row, for any factors. buffer[(ix - first) * width] is the input pixel ix.
template <class Put, class T, class A>
void run_along(T* __restrict out, const A* __restrict buffer, const A* taps, const Shape& s, int64_t width,
                   int64_t ox0, int64_t ox1, int64_t first) {
  if (s.up_x == 1 && s.down_x == 1) {  // the neighbours of all values have the same distance, so one flat loop suffices
    const A* __restrict p = buffer + (ox0 - s.left - first) * width;
    const int64_t length = (ox1 - ox0) * width;
    for (int64_t j0 = 0; j0 < length; j0 += 64) {
      const int64_t count = std::min<int64_t>(64, length - j0);
      A sum[64] = {};
      for (int k = 0; k < s.kw; k++) {
        const A t = taps[k];
        const A* __restrict q = p + j0 + k * width;
#pragma omp simd
        for (int64_t j = 0; j < count; j++) sum[j] += t * q[j];
      }
#pragma omp simd
      for (int64_t j = 0; j < count; j++) Put::put(out + j0 + j, sum[j]);
    }
    return;
  }
  if (width == 1) {  // every up-th output uses the same taps
    for (int64_t ox = ox0; ox < std::min(ox0 + s.up_x, ox1); ox++) {
      const int64_t q = ox * s.down_x - s.left, start = -floor_div(-q, s.up_x), outputs = (ox1 - ox - 1) / s.up_x + 1;
      for (int64_t i0 = 0; i0 < outputs; i0 += 64) {
        const int64_t count = std::min<int64_t>(64, outputs - i0);
        const A* __restrict p = buffer + start - first + i0 * s.down_x;
        T* __restrict o = out + (ox - ox0) + i0 * s.up_x;
        A sum[64] = {};
        for (int k = int(start * s.up_x - q); k < s.kw; k += s.up_x, p++) {
          const A t = taps[k];
          if (s.down_x == 1) {
#pragma omp simd
            for (int64_t i = 0; i < count; i++) sum[i] += t * p[i];
          } else {
#pragma omp simd
            for (int64_t i = 0; i < count; i++) sum[i] += t * p[i * s.down_x];
          }
        }
#pragma omp simd
        for (int64_t i = 0; i < count; i++) Put::put(o + i * s.up_x, sum[i]);
      }
    }
    return;
  }
  for (int64_t ox = ox0; ox < ox1; ox++, out += width) {
    const int64_t q = ox * s.down_x - s.left;  // the first tap, in up-sampled pixels
    const int64_t start = -floor_div(-q, s.up_x);          // the first input pixel at or after it
    const A* __restrict p = buffer + (start - first) * width;
    const int k0 = int(start * s.up_x - q);
    for (int64_t j0 = 0; j0 < width; j0 += 64) {
      const int64_t count = std::min<int64_t>(64, width - j0);
      A sum[64] = {};
      const A* __restrict r = p + j0;
      for (int k = k0; k < s.kw; k += s.up_x, r += width) {
        const A t = taps[k];
#pragma omp simd
        for (int64_t j = 0; j < count; j++) sum[j] += t * r[j];
      }
#pragma omp simd
      for (int64_t j = 0; j < count; j++) Put::put(out + j0 + j, sum[j]);
    }
  }
}

// The outputs [ox0, ox1) x [oy0, oy1) of one plane, their input pixels [first, last] in a row, and the part [from, to)
// of these that is inside of the image.
struct Block {
  int64_t ox0, ox1, oy0, oy1, first, last, from, to;
  bool past;  // whether the result is written with non-temporal stores (memory.h)
};

// Returns memory for A[count] that a thread keeps between calls. It is aligned to cache lines, because accesses to
// packs that cross a cache line take twice as long.
template <class A>
A* scratch(size_t count) {
  constexpr uintptr_t kLine = 64;
  static thread_local std::vector<A> memory;
  if (memory.size() < count + kLine / sizeof(A)) memory.resize(count + kLine / sizeof(A));
  return reinterpret_cast<A*>((reinterpret_cast<uintptr_t>(memory.data()) + kLine - 1) / kLine * kLine);
}

// Sets at least `count` numbers to zero, rounded up to a whole pack. Calling memset for two numbers would take longer
// than a whole row.
template <class A>
SPG_INLINE void clear(A* p, int64_t count) {
  if (count > kPack<A>) std::fill(p, p + count, A(0));
  else if (count > 0) std::memset(p, 0, kPack<A> * sizeof(A));
}

template <class Case, class T, class A>
void four_taps(const T* image, T* y, const Filter<A>& filter, const Shape& s, const Block& b, int64_t width) {
  const int64_t reach = (b.last + 1 - b.first) * width, offset = (b.from - b.first) * width;
  const int64_t length = (b.to - b.from) * width;
  // The columns of several short rows are filtered before the rows of the first one, because stored values cannot be
  // loaded with another alignment until they have left the processor's store queue.
  const int64_t together = std::clamp<int64_t>(2048 / reach, 1, kRowsPerTask);
  A* const buffers = scratch<A>(together * reach + length + kPack<A>);
  T* const zeros = reinterpret_cast<T*>(buffers + together * reach + kPack<A>);
  std::fill(zeros, zeros + length, T());
  const Taps<A> fx(filter.fx.data()), fy(filter.fy.data());
  const int64_t height = s.h, pitch = s.w * width, top = s.top, pixels = b.ox1 - b.ox0, out_pitch = s.out_w * width;
  const bool odd = (b.ox0 - s.left) % 2 != 0;
  image += b.from * width, y += b.ox0 * width;
  for (int64_t oy = b.oy0; oy < b.oy1; oy += together) {
    const int64_t count = std::min(together, b.oy1 - oy);
    for (int64_t r = 0; r < count; r++) {
      A* const buffer = buffers + r * reach;
      clear(buffer, offset);
      clear(buffer + offset + length, reach - offset - length);  // this may overwrite the beginning of the next row, which is computed later
      Case::columns(buffer + offset, image, zeros, fy, height, pitch, oy + r, top, length);
    }
    for (int64_t r = 0; r < count; r++)
      Case::row(y + (oy + r) * out_pitch, buffers + r * reach, fx, width, pixels, odd, b.past);
  }
}

// Down 2 for pixels of many values, two rows at a time. A single remaining row is computed in the general way.
template <class T>
void halve_pixels(const T* image, T* y, const Filter<float>& filter, const Shape& s, const Block& b,
                  int64_t width) {
  Block rest = b;
  for (; rest.oy0 + 2 <= b.oy1; rest.oy0 += 2)
    slide(image, y, filter.fx.data(), filter.fy.data(), s, width, b.ox0, b.ox1, rest.oy0, b.past);
  if (rest.oy0 < b.oy1) four_taps<FourTaps<1, 2>>(image, y, filter, s, rest, width);
}

// Any filter and any factors. If the filter is not an outer product, the second step is repeated for each of its rows.
template <class T, class A>
void any_filter(const T* image, T* y, const Filter<A>& filter, const Shape& s, const Block& b, int64_t width) {
  const bool separable = !filter.fx.empty();
  const int64_t reach = (b.last + 1 - b.first) * width, values = (b.ox1 - b.ox0) * width;
  const int64_t length = (b.to - b.from) * width;
  A* const buffer = scratch<A>(reach + values);
  A *const sums = buffer + reach, *const inside = buffer + (b.from - b.first) * width;
  for (int64_t oy = b.oy0; oy < b.oy1; oy++) {
    const int64_t q = oy * s.down_y - s.top;
    const int64_t iy0 = std::max<int64_t>(-floor_div(-q, s.up_y), 0);
    T* out = y + (oy * s.out_w + b.ox0) * width;
    std::fill(buffer, buffer + reach + values, A(0));
    for (int64_t iy = iy0, k = iy0 * s.up_y - q; k < s.kh && iy < s.h; k += s.up_y, iy++) {
      const T* __restrict row = image + (iy * s.w + b.from) * width;
      const A t = separable ? filter.fy[k] : A(1);
#pragma omp simd
      for (int64_t j = 0; j < length; j++) inside[j] = (separable ? inside[j] : A(0)) + t * load(row[j]);
      if (!separable) run_along<Add>(sums, buffer, filter.full.data() + k * s.kw, s, width, b.ox0, b.ox1, b.first);
    }
    if (separable) {
      run_along<Set>(out, buffer, filter.fx.data(), s, width, b.ox0, b.ox1, b.first);
    } else {
#pragma omp simd
      for (int64_t j = 0; j < values; j++) store(out + j, sums[j]);
    }
  }
}

template <class T>
void upfirdn2d(const T* x, T* y, const float* f, const Shape& s, bool correlate, double gain) {
  using A = typename Accumulator<T>::type;
  const Filter<A> filter = prepare<A>(f, s.kh, s.kw, correlate, gain);
  const int64_t width = s.channels_last ? s.c : 1, planes = s.channels_last ? s.n : s.n * s.c;
  auto* how = &any_filter<T, A>;
  int64_t most = std::max<int64_t>(kRowBuffer / width * s.up_x / s.down_x, 8), rows = kRowsPerTask;
  if constexpr (sizeof(A) == sizeof(float)) {  // double is used only in tests, and each case increases the compile time
    if (!filter.fx.empty() && FourTaps<1, 1>::fits(s)) how = &four_taps<FourTaps<1, 1>, T, A>;
    if (!filter.fx.empty() && FourTaps<2, 1>::fits(s)) how = &four_taps<FourTaps<2, 1>, T, A>;
    if (!filter.fx.empty() && FourTaps<1, 2>::fits(s)) how = &four_taps<FourTaps<1, 2>, T, A>;
    if (width >= kSlideValues && how == &four_taps<FourTaps<1, 2>, T, A>) {
      how = &halve_pixels<T>;
      most = std::max<int64_t>(kSlideRow / width / s.down_x, 8), rows = kSlideRows;
    }
  }
  const int64_t segment = std::min(most, s.out_w), segments = (s.out_w + segment - 1) / segment;
  const int64_t row_blocks = (s.out_h + rows - 1) / rows;
  const int64_t work = std::min<int64_t>(rows, s.out_h) * segment * width;
  const bool past = past_caches(sizeof(T) * s.n * s.c * s.out_h * s.out_w);
  parallel_for(planes * row_blocks * segments, std::max<int64_t>(1, 32768 / work), [&](int64_t task) {
    const int64_t plane = task / segments / row_blocks;
    Block b;
    b.past = past;
    b.ox0 = task % segments * segment, b.ox1 = std::min(b.ox0 + segment, s.out_w);
    b.oy0 = task / segments % row_blocks * rows, b.oy1 = std::min(b.oy0 + rows, s.out_h);
    b.first = -floor_div(-(b.ox0 * s.down_x - s.left), s.up_x);
    b.last = std::max(b.first - 1, floor_div((b.ox1 - 1) * s.down_x - s.left + s.kw - 1, s.up_x));
    b.from = std::min(std::max<int64_t>(b.first, 0), b.last + 1), b.to = std::clamp(s.w, b.from, b.last + 1);
    how(x + plane * s.h * s.w * width, y + plane * s.out_h * s.out_w * width, filter, s, b, width);
  });
}

}  // namespace
}  // namespace spg

// Computes y [n, c, out_h, out_w] from x [n, c, h, w], both dense and in the same layout; f is float32 [kh, kw].
// Returns 0, or -1 if there is no kernel for the number format.
SPG_API int spg_upfirdn2d_cpu(int dtype, const void* x, void* y, const float* f, int64_t n, int64_t c, int64_t h,
                                 int64_t w, int64_t out_h, int64_t out_w, int up_x, int up_y, int down_x, int down_y,
                                 int left, int top, int kh, int kw, int channels_last, int correlate, double gain) {
  using namespace spg;
  const Shape s{n, c, h, w, out_h, out_w, up_x, up_y, down_x, down_y, left, top, kw, kh, channels_last != 0};
  if (n * c * out_h * out_w == 0) return 0;
  will_fill(y, size_t(n * c * out_h * out_w) * bytes_of(dtype));
  switch (dtype) {
    case kFloat32:
      upfirdn2d(static_cast<const float*>(x), static_cast<float*>(y), f, s, correlate, gain);
      return 0;
    case kFloat64:
      upfirdn2d(static_cast<const double*>(x), static_cast<double*>(y), f, s, correlate, gain);
      return 0;
    case kBFloat16:
      upfirdn2d(static_cast<const bfloat16*>(x), static_cast<bfloat16*>(y), f, s, correlate, gain);
      return 0;
    default:
      return -1;
  }
}
