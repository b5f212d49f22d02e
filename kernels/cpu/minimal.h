// Convolutions of three taps with fewer products than taps and outputs: along one side, y = A^T [(G w) . (B^T x)],
// where the dot multiplies point by point (Winograd 1980, "Arithmetic complexity of computations"; Lavin and Gray 2016,
// "Fast algorithms for convolutional neural networks"). In two dimensions, each transform is applied along one side and
// then along the other.
//
// Each function reads numbers at a distance of `step` and writes its results with the same distance. A tile has kIn
// inputs, which begin kInStep after those of the previous tile, the first at kFirst. They are transformed to kPoints
// points, and those to kOut outputs. There are always kTaps weights; the last points may share their weights.
#pragma once

#include <type_traits>
#include <utility>

#include "memory.h"

namespace spg {

constexpr int kTaps = 6;

template <class P>
using Number = std::decay_t<decltype(std::declval<P>()[0])>;

// y[i] = w[0] x[i - 1] + w[1] x[i] + w[2] x[i + 1]: F(4, 3), from values at 0, 1, -1, 2, -2 and infinity.
struct Same {
  static constexpr int kIn = 6, kInStep = 4, kFirst = -1, kPoints = 6, kOut = 4;

  template <class P>
  static SPG_INLINE void of_inputs(const P* x, P* o, int step) {  // B^T
    const P x0 = x[0], x1 = x[step], x2 = x[2 * step], x3 = x[3 * step], x4 = x[4 * step], x5 = x[5 * step];
    const P a = x4 - 4 * x2, b = x3 - 4 * x1, c = x4 - x2, d = 2 * (x3 - x1);
    o[0] = 4 * x0 - 5 * x2 + x4;
    o[step] = a + b, o[2 * step] = a - b;
    o[3 * step] = c + d, o[4 * step] = c - d;
    o[5 * step] = 4 * x1 - 5 * x3 + x5;
  }

  template <class P>
  static SPG_INLINE void to_outputs(const P* m, P* o, int step) {  // A^T
    const P m0 = m[0], m5 = m[5 * step];
    const P a = m[step] + m[2 * step], b = m[step] - m[2 * step];
    const P c = m[3 * step] + m[4 * step], d = m[3 * step] - m[4 * step];
    o[0] = m0 + a + c;
    o[step] = b + 2 * d;
    o[2 * step] = a + 4 * c;
    o[3 * step] = b + 8 * d + m5;
  }

  template <class P>
  static SPG_INLINE void of_outputs(const P* y, P* o, int step) {  // A
    const P y0 = y[0], y1 = y[step], y2 = y[2 * step], y3 = y[3 * step];
    const P a = y0 + y2, b = y1 + y3, c = y0 + 4 * y2, d = 2 * y1 + 8 * y3;
    o[0] = y0;
    o[step] = a + b, o[2 * step] = a - b;
    o[3 * step] = c + d, o[4 * step] = c - d;
    o[5 * step] = y3;
  }

  template <class P>
  static SPG_INLINE void of_weights(const P* w, P* o, int step) {  // G
    using A = Number<P>;
    const P w0 = w[0], w1 = w[step], w2 = w[2 * step];
    const P even = w0 * A(1.0 / 24) + w2 * A(1.0 / 6), odd = w1 * A(1.0 / 12);
    o[0] = w0 * A(0.25);
    o[step] = (w0 + w2 + w1) * A(-1.0 / 6), o[2 * step] = (w1 - (w0 + w2)) * A(1.0 / 6);
    o[3 * step] = even + odd, o[4 * step] = even - odd;
    o[5 * step] = w2;
  }

  template <class P>
  static SPG_INLINE void to_weights(const P* u, P* o, int step) {  // G^T
    using A = Number<P>;
    const P u0 = u[0], u5 = u[5 * step];
    const P a = u[step] + u[2 * step], b = u[2 * step] - u[step];
    const P c = u[3 * step] + u[4 * step], d = u[3 * step] - u[4 * step];
    o[0] = u0 * A(0.25) - a * A(1.0 / 6) + c * A(1.0 / 24);
    o[step] = b * A(1.0 / 6) + d * A(1.0 / 12);
    o[2 * step] = (c - a) * A(1.0 / 6) + u5;
  }
};

// F(4, 2), y[i] = w[0] x[i] + w[1] x[i + 1], from values at 0, 1, -1, 2 and infinity.
struct Two {
  template <class P>
  static SPG_INLINE void of_inputs(P x0, P x1, P x2, P x3, P x4, P* o, int step) {
    o[0] = 2 * (x0 - x2) + x3 - x1;
    o[step] = x3 - x2 - 2 * x1;
    o[2 * step] = x3 - 3 * x2 + 2 * x1;
    o[3 * step] = x3 - x1;
    o[4 * step] = 2 * (x1 - x3) + x4 - x2;
  }
  template <class P>
  static SPG_INLINE void to_outputs(P m0, P m1, P m2, P m3, P m4, P& y0, P& y1, P& y2, P& y3) {
    const P sum = m1 + m2, difference = m1 - m2;
    y0 = m0 + sum + m3;
    y1 = difference + 2 * m3;
    y2 = sum + 4 * m3;
    y3 = difference + 8 * m3 + m4;
  }
};

// The common part of the two structures below: F(4, 2) for the outer taps, and direct products for the middle tap. This
// makes 9 products for 4 outputs of 3 taps.
struct Strided {
  static constexpr int kPoints = 9;

  template <class P>
  static SPG_INLINE void of_weights(const P* w, P* o, int step) {
    using A = Number<P>;
    const P w0 = w[0], w1 = w[step], w2 = w[2 * step];
    o[0] = w0 * A(0.5);
    o[step] = (w0 + w2) * A(-0.5);
    o[2 * step] = (w2 - w0) * A(1.0 / 6);
    o[3 * step] = (w0 + 2 * w2) * A(1.0 / 6);
    o[4 * step] = w2;
    o[5 * step] = w1;
  }

  template <class P>
  static SPG_INLINE void to_weights(const P* u, P* o, int step) {
    using A = Number<P>;
    const P u1 = u[step] * A(-0.5), u2 = u[2 * step] * A(1.0 / 6), u3 = u[3 * step] * A(1.0 / 6);
    const P w0 = u[0] * A(0.5) + u1 - u2 + u3, w2 = u1 + u2 + 2 * u3 + u[4 * step], w1 = u[5 * step];
    o[0] = w0, o[step] = w1, o[2 * step] = w2;
  }
};

// y[i] = w[0] x[2 i] + w[1] x[2 i + 1] + w[2] x[2 i + 2].
struct Down : Strided {
  static constexpr int kIn = 9, kInStep = 8, kFirst = 0, kOut = 4;

  template <class P>
  static SPG_INLINE void of_inputs(const P* x, P* o, int step) {
    const P x1 = x[step], x3 = x[3 * step], x5 = x[5 * step], x7 = x[7 * step];
    Two::of_inputs<P>(x[0], x[2 * step], x[4 * step], x[6 * step], x[8 * step], o, step);
    o[5 * step] = x1, o[6 * step] = x3, o[7 * step] = x5, o[8 * step] = x7;
  }

  template <class P>
  static SPG_INLINE void to_outputs(const P* m, P* o, int step) {
    P y0, y1, y2, y3;
    Two::to_outputs<P>(m[0], m[step], m[2 * step], m[3 * step], m[4 * step], y0, y1, y2, y3);
    y0 += m[5 * step], y1 += m[6 * step], y2 += m[7 * step], y3 += m[8 * step];
    o[0] = y0, o[step] = y1, o[2 * step] = y2, o[3 * step] = y3;
  }

  template <class P>
  static SPG_INLINE void of_outputs(const P* y, P* o, int step) {
    const P y0 = y[0], y1 = y[step], y2 = y[2 * step], y3 = y[3 * step];
    const P even = y0 + y2, odd = y1 + y3;
    o[0] = y0;
    o[step] = even + odd, o[2 * step] = even - odd;
    o[3 * step] = y0 + 2 * y1 + 4 * y2 + 8 * y3;
    o[4 * step] = y3;
    o[5 * step] = y0, o[6 * step] = y1, o[7 * step] = y2, o[8 * step] = y3;
  }
};

// y[2 i] = w[0] x[i - 1] + w[2] x[i], y[2 i + 1] = w[1] x[i].
struct Up : Strided {
  static constexpr int kIn = 5, kInStep = 4, kFirst = -1, kOut = 8;

  template <class P>
  static SPG_INLINE void of_inputs(const P* x, P* o, int step) {
    const P x1 = x[step], x2 = x[2 * step], x3 = x[3 * step], x4 = x[4 * step];
    Two::of_inputs<P>(x[0], x1, x2, x3, x4, o, step);
    o[5 * step] = x1, o[6 * step] = x2, o[7 * step] = x3, o[8 * step] = x4;
  }

  template <class P>
  static SPG_INLINE void to_outputs(const P* m, P* o, int step) {
    P y0, y1, y2, y3;
    const P m5 = m[5 * step], m6 = m[6 * step], m7 = m[7 * step], m8 = m[8 * step];
    Two::to_outputs<P>(m[0], m[step], m[2 * step], m[3 * step], m[4 * step], y0, y1, y2, y3);
    o[0] = y0, o[2 * step] = y1, o[4 * step] = y2, o[6 * step] = y3;
    o[step] = m5, o[3 * step] = m6, o[5 * step] = m7, o[7 * step] = m8;
  }
};

}  // namespace spg
