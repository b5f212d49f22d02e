// upfirdn2d on the CPU: polyphase (inserted zeros are never multiplied), separable filters in two passes.
//
// One row of output is made at a time. The rows of input that its column taps reach are combined into a row buffer,
// which has zeros where the padding is; the row taps then run along that buffer. Pixels may consist of several values
// that lie side by side (channels_last): then a "row" holds `width` values for every x. A filter that is not an outer
// product takes the second step once for each of its rows, and adds up.

#include <algorithm>
#include <cmath>
#include <vector>

#include "memory.h"
#include "numbers.h"
#include "parallel.h"

namespace spg {
namespace {

constexpr int kRowBuffer = 4096;  // values of a row that are worked on at a time: a few such rows fit in 48 KiB
constexpr int kRowsPerTask = 32;

struct Shape {
  int64_t n, c, h, w, out_h, out_w;
  int up_x, up_y, down_x, down_y, left, top, kw, kh;
  bool channels_last;
};

// floor(a / b) for b > 0.
inline int64_t floor_div(int64_t a, int64_t b) {
  if (b == 1) return a;
  if (b == 2) return a >> 1;
  return a >= 0 ? a / b : -((-a + b - 1) / b);
}

template <class A>
struct Filter {
  std::vector<A> full;     // [kh, kw], in the orientation of a correlation, gain included
  std::vector<A> fx, fy;   // the factors of a separable one, else empty
};

// `f` as it lies in memory; a convolution is the correlation with the filter turned by half a circle.
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
  const A tolerance = std::abs(top) * (sizeof(A) == 8 ? A(1e-16) : A(1e-7));
  for (int i = 0; i < kh; i++)
    for (int j = 0; j < kw; j++)
      if (!(std::abs(out.full[i * kw + j] - fy[i] * fx[j]) <= tolerance)) return out;
  out.fx = fx;
  out.fy = fy;
  return out;
}

// buffer[j] = sum_k taps[k] * rows[k][j]
template <class T, class A>
void combine_rows(A* __restrict buffer, const T* const* rows, const A* taps, int count, int64_t length) {
  const T *__restrict r0 = count > 0 ? rows[0] : nullptr, *__restrict r1 = count > 1 ? rows[1] : nullptr;
  const T *__restrict r2 = count > 2 ? rows[2] : nullptr, *__restrict r3 = count > 3 ? rows[3] : nullptr;
  const A a = count > 0 ? taps[0] : 0, b = count > 1 ? taps[1] : 0, c = count > 2 ? taps[2] : 0;
  const A d = count > 3 ? taps[3] : 0;
  switch (std::min(count, 4)) {
    case 0:
      std::fill(buffer, buffer + length, A(0));
      break;
    case 1:
#pragma omp simd
      for (int64_t j = 0; j < length; j++) buffer[j] = a * load(r0[j]);
      break;
    case 2:
#pragma omp simd
      for (int64_t j = 0; j < length; j++) buffer[j] = a * load(r0[j]) + b * load(r1[j]);
      break;
    case 3:
#pragma omp simd
      for (int64_t j = 0; j < length; j++) buffer[j] = a * load(r0[j]) + b * load(r1[j]) + c * load(r2[j]);
      break;
    default:
#pragma omp simd
      for (int64_t j = 0; j < length; j++)
        buffer[j] = a * load(r0[j]) + b * load(r1[j]) + c * load(r2[j]) + d * load(r3[j]);
  }
  for (int k = 4; k < count; k++) {
    const T* __restrict r = rows[k];
    const A t = taps[k];
#pragma omp simd
    for (int64_t j = 0; j < length; j++) buffer[j] += t * load(r[j]);
  }
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

// As run_along, for any factors and any number of taps.
template <class Put, class T, class A>
void run_along_any(T* __restrict out, const A* __restrict buffer, const A* taps, const Shape& s, int64_t width,
                   int64_t ox0, int64_t ox1, int64_t first) {
  for (int64_t ox = ox0; ox < ox1; ox++, out += width) {
    const int64_t q = ox * s.down_x - s.left;  // the first tap, in up-sampled pixels
    const int64_t start = -floor_div(-q, s.up_x);          // the first input pixel at or behind it
    const A* __restrict p = buffer + (start - first) * width;
    const int k0 = int(start * s.up_x - q);
    if (width == 1) {
      A sum = 0;
      for (int k = k0; k < s.kw; k += s.up_x) sum += taps[k] * *p++;
      Put::put(out, sum);
      continue;
    }
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

// One row of output from ox0 to ox1; the value of input pixel ix lies at buffer[(ix - first) * width].
template <class Put, class T, class A>
void run_along(T* __restrict out, const A* __restrict buffer, const A* taps, const Shape& s, int64_t width, int64_t ox0,
               int64_t ox1, int64_t first) {
  if (s.up_x == 1 && s.down_x == 1) {  // neighbours of all values lie at the same distance: one flat loop
    const A* __restrict p = buffer + (ox0 - s.left - first) * width;
    const int64_t length = (ox1 - ox0) * width;
    if (s.kw == 4) {
      const A a = taps[0], b = taps[1], c = taps[2], d = taps[3];
#pragma omp simd
      for (int64_t j = 0; j < length; j++)
        Put::put(out + j, a * p[j] + b * p[j + width] + c * p[j + 2 * width] + d * p[j + 3 * width]);
      return;
    }
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
  if (s.kw == 4 && s.up_x == 2 && s.down_x == 1) {
    if ((ox0 + s.left) % 2 != 0) {
      run_along_any<Put>(out, buffer, taps, s, width, ox0, ox0 + 1, first);
      out += width;
      ox0++;
    }
    // From here on every other output takes taps 0 and 2, those between them taps 1 and 3.
    const int64_t pairs = (ox1 - ox0) / 2;
    const A* __restrict p = buffer + ((ox0 - s.left) / 2 - first) * width;
    const A a = taps[0], b = taps[2], c = taps[1], d = taps[3];
    if (width == 1) {
#pragma omp simd
      for (int64_t i = 0; i < pairs; i++) {
        Put::put(out + 2 * i, a * p[i] + b * p[i + 1]);
        Put::put(out + 2 * i + 1, c * p[i + 1] + d * p[i + 2]);
      }
    } else {
      for (int64_t i = 0; i < pairs; i++) {
        const A* __restrict q = p + i * width;
        T* __restrict o = out + 2 * i * width;
#pragma omp simd
        for (int64_t j = 0; j < width; j++) {
          Put::put(o + j, a * q[j] + b * q[j + width]);
          Put::put(o + width + j, c * q[j + width] + d * q[j + 2 * width]);
        }
      }
    }
    out += 2 * pairs * width;
    ox0 += 2 * pairs;
  }
  if (s.kw == 4 && s.up_x == 1 && s.down_x == 2) {
    const A* __restrict p = buffer + (ox0 * 2 - s.left - first) * width;
    const A a = taps[0], b = taps[1], c = taps[2], d = taps[3];
    if (width == 1) {
      for (int64_t i0 = 0; i0 < ox1 - ox0; i0 += 64) {
        const int64_t count = std::min<int64_t>(64, ox1 - ox0 - i0);
        const A* __restrict q = p + 2 * i0;
        A even[65], odd[65];
#pragma omp simd
        for (int64_t i = 0; i < count + 1; i++) {
          even[i] = q[2 * i];
          odd[i] = q[2 * i + 1];
        }
#pragma omp simd
        for (int64_t i = 0; i < count; i++)
          Put::put(out + i0 + i, a * even[i] + b * odd[i] + c * even[i + 1] + d * odd[i + 1]);
      }
      return;
    }
    for (int64_t i = 0; i < ox1 - ox0; i++) {
      const A* __restrict q = p + 2 * i * width;
      T* __restrict o = out + i * width;
#pragma omp simd
      for (int64_t j = 0; j < width; j++)
        Put::put(o + j, a * q[j] + b * q[j + width] + c * q[j + 2 * width] + d * q[j + 3 * width]);
    }
    return;
  }
  run_along_any<Put>(out, buffer, taps, s, width, ox0, ox1, first);
}

template <class T>
void upfirdn2d(const T* x, T* y, const float* f, const Shape& s, bool correlate, double gain) {
  using A = typename Accumulator<T>::type;
  const Filter<A> filter = prepare<A>(f, s.kh, s.kw, correlate, gain);
  const bool separable = !filter.fx.empty();
  const int64_t width = s.channels_last ? s.c : 1, planes = s.channels_last ? s.n : s.n * s.c;

  // Outputs of a row worked on at a time, an even number so that phases stay in step.
  const int64_t most = std::max<int64_t>(kRowBuffer / width * s.up_x / s.down_x, 16) / 2 * 2;
  const int64_t segment = std::min(most, s.out_w), segments = (s.out_w + segment - 1) / segment;
  const int64_t row_blocks = (s.out_h + kRowsPerTask - 1) / kRowsPerTask;
  const int64_t work = std::min<int64_t>(kRowsPerTask, s.out_h) * segment * width;
  const int64_t grain = std::max<int64_t>(1, 32768 / work);

  parallel_for(planes * row_blocks * segments, grain, [&](int64_t task) {
    const int64_t ox0 = task % segments * segment, ox1 = std::min(ox0 + segment, s.out_w);
    const int64_t oy0 = task / segments % row_blocks * kRowsPerTask, oy1 = std::min(oy0 + kRowsPerTask, s.out_h);
    const int64_t plane = task / segments / row_blocks;
    const T* image = x + plane * s.h * s.w * width;

    // Input pixels [first, last] are reached; what of them lies outside of the image stays zero in the buffer.
    const int64_t first = -floor_div(-(ox0 * s.down_x - s.left), s.up_x);
    const int64_t last = floor_div((ox1 - 1) * s.down_x - s.left + s.kw - 1, s.up_x);
    const int64_t from = std::max<int64_t>(first, 0), to = std::min(last + 1, s.w);
    static thread_local std::vector<double> memory;
    static thread_local std::vector<const T*> row_memory;
    static thread_local std::vector<A> tap_memory;
    if (row_memory.size() < size_t(s.kh)) {
      row_memory.resize(s.kh);
      tap_memory.resize(s.kh);
    }
    const T** const rows = row_memory.data();  // outside of the loops: thread-local ones are slow to get at
    A* const taps = tap_memory.data();
    const int64_t reach = (std::max<int64_t>(last + 1 - first, 0) + 2) * width;
    // Several short rows are combined before the first of them is read again: what was just stored cannot be loaded at
    // another alignment until it has left the processor's store queue.
    const int64_t together = separable ? std::clamp<int64_t>(2048 / reach, 1, kRowsPerTask) : 1;
    const size_t needed = size_t(together * reach + (separable ? 0 : segment * width)) * sizeof(A) / sizeof(double) + 1;
    if (memory.size() < needed) memory.resize(needed);
    A* const buffers = reinterpret_cast<A*>(memory.data());
    A* const sums = buffers + together * reach;
    std::fill(buffers, buffers + together * reach, A(0));
    const int64_t offset = (from - first) * width, length = std::max<int64_t>(to - from, 0) * width;

    for (int64_t oy = oy0; oy < oy1; oy += together) {
      const int64_t count = std::min(together, oy1 - oy);
      for (int64_t r = 0; r < count; r++) {
        const int64_t q = (oy + r) * s.down_y - s.top;
        const int64_t iy0 = std::max<int64_t>(-floor_div(-q, s.up_y), 0);
        int reached = 0;
        if (!separable) std::fill(sums, sums + (ox1 - ox0) * width, A(0));
        for (int64_t iy = iy0, k = iy0 * s.up_y - q; k < s.kh && iy < s.h; k += s.up_y, iy++) {
          const T* row = image + (iy * s.w + from) * width;
          if (separable) {
            rows[reached] = row;
            taps[reached++] = filter.fy[k];
          } else {
            const A one = 1;
            combine_rows(buffers + offset, &row, &one, 1, length);
            run_along<Add>(sums, buffers, filter.full.data() + k * s.kw, s, width, ox0, ox1, first);
          }
        }
        if (separable) combine_rows(buffers + r * reach + offset, rows, taps, reached, length);
      }
      for (int64_t r = 0; r < count; r++) {
        T* out = y + ((plane * s.out_h + oy + r) * s.out_w + ox0) * width;
        if (separable) {
          run_along<Set>(out, buffers + r * reach, filter.fx.data(), s, width, ox0, ox1, first);
        } else {
#pragma omp simd
          for (int64_t j = 0; j < (ox1 - ox0) * width; j++) store(out + j, sums[j]);
        }
      }
    }
  });
}

}  // namespace
}  // namespace spg

// x [n, c, h, w] -> y [n, c, out_h, out_w], both dense in the same layout; f [kh, kw] float32. Returns 0, or -1 for a
// number format that has no kernel.
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
