// The parameters of a call of upfirdn2d.
#pragma once

#include <cstdint>

namespace spg {

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

}  // namespace spg
