// The case that networks use: a separable filter of four taps with up 2, down 2 or neither, and equal factors in x and
// y.
//
// Some rows are first filtered along their columns, into a buffer with zeros at the positions of the padding. The
// buffer is then filtered along its rows. All loops process packs of constant size. The last pack overlaps the previous
// one, so that short rows have no slow scalar remainder.
#pragma once

#include <algorithm>

#include "memory.h"
#include "numbers.h"
#include "packs.h"
#include "shape.h"

namespace spg {

template <class A>
struct Taps {  // a local copy, which no store can alias, so that it stays in registers
  A a, b, c, d;
  explicit Taps(const A* t) : a(t[0]), b(t[1]), c(t[2]), d(t[3]) {}
};

constexpr int64_t kAhead = 1024;  // the distance of prefetching, in values

template <int up, int down>
struct FourTaps {
  static bool fits(const Shape& s) {
    return s.kw == 4 && s.kh == 4 && s.up_x == up && s.up_y == up && s.down_x == down && s.down_y == down;
  }

  // buffer[j] = column j, filtered over the input rows of output row oy. `zeros` replaces rows outside of the image.
  template <class T, class A>
  static SPG_INLINE void columns(A* __restrict buffer, const T* image, const T* zeros, const Taps<A>& taps,
                                 int64_t height, int64_t pitch, int64_t oy, int64_t top, int64_t length) {
    const int64_t q = oy * down - top, first = up == 2 ? (q + 1) >> 1 : q;
    auto row = [&](int64_t iy) { return iy >= 0 && iy < height ? image + iy * pitch : zeros; };
    const T *__restrict r0 = row(first), *__restrict r1 = row(first + 1);
    if constexpr (up == 2) {
      const A a = q & 1 ? taps.b : taps.a, b = q & 1 ? taps.d : taps.c;
      in_packs<T>(length, [&](int64_t j, auto count) {
#pragma omp simd
        for (int i = 0; i < count; i++) buffer[j + i] = a * load(r0[j + i]) + b * load(r1[j + i]);
      });
    } else {
      const T *__restrict r2 = row(first + 2), *__restrict r3 = row(first + 3);
      const A a = taps.a, b = taps.b, c = taps.c, d = taps.d;
      const int64_t ahead = pitch * std::max<int64_t>(1, kAhead / std::max<int64_t>(1, pitch));
      in_packs<T>(length, [&](int64_t j, auto count) {
        for (int k = 0; k < down; k++) __builtin_prefetch(r3 + ahead + k * pitch + j);  // for later rows
#pragma omp simd
        for (int i = 0; i < count; i++)
          buffer[j + i] = a * load(r0[j + i]) + b * load(r1[j + i]) + c * load(r2[j + i]) + d * load(r3[j + i]);
      });
    }
  }

  // Computes out[0, pixels * width) from the buffer. It begins with the first value that the first output needs.
  template <class T, class A>
  static SPG_INLINE void row(T* __restrict out, const A* __restrict p, const Taps<A>& taps, int64_t width, int64_t pixels,
                             bool odd, bool past) {
    const A a = taps.a, b = taps.b, c = taps.c, d = taps.d;
    if constexpr (up == 1 && down == 1) {  // the neighbours of all values have the same distance, so one flat loop suffices
      in_packs<T>(pixels * width, [&](int64_t j, auto count) {
        const A* __restrict q = p + j;
        T v[count];
#pragma omp simd
        for (int i = 0; i < count; i++)
          store(v + i, a * q[i] + b * q[i + width] + c * q[i + 2 * width] + d * q[i + 3 * width]);
        put<count>(out + j, v, past);
      });
    } else if constexpr (up == 2) {  // outputs use taps 0 and 2, and taps 1 and 3, alternately
      auto single = [&](A s, A t) {
        in_packs<T>(width, [&](int64_t j, auto count) {
#pragma omp simd
          for (int i = 0; i < count; i++) store(out + j + i, s * p[j + i] + t * p[j + i + width]);
        });
      };
      if (odd) {
        single(b, d);
        out += width, pixels--;  // the next output begins at the same pixel
      }
      const int64_t pairs = pixels / 2;
      if (width == 1) {
        in_packs<T>(pairs, [&](int64_t j, auto count) {
          const A* __restrict q = p + j;
          T v[2 * count];
#pragma omp simd
          for (int i = 0; i < count; i++) {
            store(v + 2 * i, a * q[i] + c * q[i + 1]);
            store(v + 2 * i + 1, b * q[i + 1] + d * q[i + 2]);
          }
          put<2 * count>(out + 2 * j, v, past);
        });
      } else {
        for (int64_t k = 0; k < pairs; k++)
          in_packs<T>(width, [&](int64_t j, auto count) {
            const A* __restrict q = p + k * width + j;
            T* __restrict o = out + 2 * k * width + j;
            T u[count], v[count];
#pragma omp simd
            for (int i = 0; i < count; i++) {
              store(u + i, a * q[i] + c * q[i + width]);
              store(v + i, b * q[i + width] + d * q[i + 2 * width]);
            }
            put<count>(o, u, past);
            put<count>(o + width, v, past);
          });
      }
      out += 2 * pairs * width, p += pairs * width;
      if (pixels % 2) single(a, c);
    } else if (width == 1) {
      in_packs<T>(pixels, [&](int64_t j, auto count) {
        const A* __restrict q = p + 2 * j;
        T v[count];
#pragma omp simd
        for (int i = 0; i < count; i++)
          store(v + i, a * q[2 * i] + b * q[2 * i + 1] + c * q[2 * i + 2] + d * q[2 * i + 3]);
        put<count>(out + j, v, past);
      });
    } else {
      for (int64_t k = 0; k < pixels; k++)
        in_packs<T>(width, [&](int64_t j, auto count) {
          const A* __restrict q = p + 2 * k * width + j;
          T v[count];
#pragma omp simd
          for (int i = 0; i < count; i++)
            store(v + i, a * q[i] + b * q[i + width] + c * q[i + 2 * width] + d * q[i + 3 * width]);
          put<count>(out + k * width + j, v, past);
        });
    }
  }
};

}  // namespace spg
