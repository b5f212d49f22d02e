// The four-tap filter with down 2 for pixels of many adjacent values (channels_last). It writes only the result,
// because most of the time is spent on memory accesses.
//
// The loop runs along a row. For some values of each pixel, the filtered columns of the last four pixels stay in
// registers. Two output rows are computed together, because they share two of their input rows. The sums are the same
// as those of FourTaps, in the same order: columns first.
#pragma once

#include <cstdint>

#include "memory.h"
#include "shape.h"
#include "vectors.h"

namespace spg {

constexpr int kPackValues = kLanes<float>;
constexpr int kSlidePacks = 2;  // packs of a pixel that are processed at once: a pair of cache lines
constexpr int kRowsReached = 6;  // input rows of two output rows
constexpr int kSlideValues = kSlidePacks * kPackValues;

SPG_INLINE void put_pack(float* p, const Pack<float>& v, bool past) {
  put<kPackValues>(p, reinterpret_cast<const float*>(&v), past);
}
SPG_INLINE void put_pack(bfloat16* p, const Pack<float>& v, bool) { store_pack(p, v); }

// Computes `kSlideValues` values of the outputs [ox0, ox0 + pixels) of two rows. rows[k] is the first pixel of the k-th
// input row, and step[k] the distance of its pixels, which is 0 for a row of zeros outside of the image. Meanwhile two
// rows that begin at `ahead`, with distance `pitch`, are prefetched into the second-level cache.
template <class T>
void slide_along(T* __restrict out, int64_t out_pitch, const T* const* rows, const int64_t* step, const float* fx,
                 const float* fy, int64_t w, int64_t width, int64_t x0, int64_t pixels, const T* ahead, int64_t pitch, bool past) {
  Pack<float> v[kSlidePacks][2][4];
  const float ya = fy[0], yb = fy[1], yc = fy[2], yd = fy[3], xa = fx[0], xb = fx[1], xc = fx[2], xd = fx[3];
  auto column = [&](int64_t x, int slot) __attribute__((always_inline)) {
    if (x < 0 || x >= w) {
      for (int u = 0; u < kSlidePacks; u++)
        for (int r = 0; r < 2; r++) v[u][r][slot] = Pack<float>{};
      return;
    }
    for (int u = 0; u < kSlidePacks; u++) {
      Pack<float> t[kRowsReached];
      for (int k = 0; k < kRowsReached; k++) t[k] = load_pack(rows[k] + x * step[k] + u * kPackValues);
      for (int k = 0; k < 2; k++)
        __builtin_prefetch(ahead + k * pitch + (x - x0) * kSlideValues + u * kPackValues, 0, 2);
      for (int r = 0; r < 2; r++) {
        const Pack<float>* q = t + 2 * r;
        v[u][r][slot] = ya * q[0] + yb * q[1] + yc * q[2] + yd * q[3];
      }
    }
  };
  column(x0, 2), column(x0 + 1, 3);
  for (int64_t i = 0; i < pixels; i++) {
    for (int u = 0; u < kSlidePacks; u++)
      for (int r = 0; r < 2; r++) v[u][r][0] = v[u][r][2], v[u][r][1] = v[u][r][3];
    column(x0 + 2 * i + 2, 2), column(x0 + 2 * i + 3, 3);
    for (int u = 0; u < kSlidePacks; u++)
      for (int r = 0; r < 2; r++) {
        const Pack<float>* q = v[u][r];
        put_pack(out + r * out_pitch + i * width + u * kPackValues, xa * q[0] + xb * q[1] + xc * q[2] + xd * q[3],
                   past);
      }
  }
}

// Computes the outputs [ox0, ox1) of the rows oy and oy + 1 of one image. A pixel has `width` values, at least
// kSlideValues.
template <class T>
void slide(const T* image, T* y, const float* fx, const float* fy, const Shape& s, int64_t width, int64_t ox0,
           int64_t ox1, int64_t oy, bool past) {
  static const T zeros[kSlideValues] = {};
  const int64_t pitch = s.w * width, first = oy * 2 - s.top;
  for (int64_t j = 0; j < width; j += kSlideValues) {
    j = j + kSlideValues <= width ? j : width - kSlideValues;  // the last values are computed twice, which is faster than one by one
    const T* rows[kRowsReached];
    int64_t step[kRowsReached];
    for (int k = 0; k < kRowsReached; k++) {
      const bool inside = first + k >= 0 && first + k < s.h;
      rows[k] = inside ? image + (first + k) * pitch + j : zeros, step[k] = inside ? width : 0;
    }
    // Memory is fastest in the order of addresses, so each iteration prefetches its share of the next two rows.
    const int64_t x0 = ox0 * 2 - s.left, pixels = ox1 - ox0;
    const T* ahead = image + (first + kRowsReached) * pitch + x0 * width + j * 2 * pixels;
    slide_along(y + (oy * s.out_w + ox0) * width + j, s.out_w * width, rows, step, fx, fy, s.w, width, x0, pixels, ahead,
                pitch, past);
  }
}

}  // namespace spg
