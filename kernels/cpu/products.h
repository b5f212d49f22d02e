// The innermost part of a matrix product, whose sums stay in registers.
#pragma once

#include <cstdint>
#ifdef __ARM_NEON
#include <arm_neon.h>
#endif

#include "memory.h"

namespace spg {

// The numbers of rows and of vectors of columns that are computed at once. The vectors have the width of the
// processor's registers.
#if defined(__AVX512F__)
constexpr int kRows = 8, kVectors = 2, kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kRows = 4, kVectors = 2, kVectorBytes = 32;
#else
constexpr int kRows = 4, kVectors = 2, kVectorBytes = 16;
#endif

template <class A>
struct VectorOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
  typedef A stored __attribute__((vector_size(kVectorBytes), aligned(sizeof(A)), may_alias));
};
template <class A>
using Vector = typename VectorOf<A>::type;
template <class A>
constexpr int kWidth = kVectorBytes / sizeof(A);
template <class A>
constexpr int kPanel = kVectors * kWidth<A> < 64 / int(sizeof(A)) ? 64 / int(sizeof(A)) : kVectors * kWidth<A>;

// a * b + c, rounded only once if the processor has fused multiply-add. It must be explicit, because the compiler flags
// forbid contraction (stylegan_pg/ops/recipes.py).
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

// c[kRows, kPanel] = the sum over k of a[row * row_step + k * step] * b[k, kPanel]. Optionally it is added to c. The
// rows of c have a distance of c_step.
template <class A>
SPG_INLINE void product(int64_t depth, const A* a, int64_t row_step, int64_t step, const A* b, A* c, int64_t c_step,
                        bool add) {
  using Stored = typename VectorOf<A>::stored;  // memcpy would take an address, and its argument would not stay in registers
  for (int part = 0; part < kPanel<A>; part += kVectors * kWidth<A>, b += kVectors * kWidth<A>, c += kVectors * kWidth<A>) {
    const A *pa = a, *pb = b;
    Vector<A> sum[kRows][kVectors];
    for (int r = 0; r < kRows; r++)
      for (int v = 0; v < kVectors; v++)
        sum[r][v] = add ? *reinterpret_cast<const Stored*>(c + r * c_step + v * kWidth<A>) : Vector<A>{};
    for (int64_t k = 0; k < depth; k++, pa += step, pb += kPanel<A>) {
      Vector<A> column[kVectors];
      for (int v = 0; v < kVectors; v++) column[v] = *reinterpret_cast<const Stored*>(pb + v * kWidth<A>);
      for (int r = 0; r < kRows; r++)
        for (int v = 0; v < kVectors; v++) sum[r][v] = multiply_add(pa[r * row_step], column[v], sum[r][v]);
    }
    for (int r = 0; r < kRows; r++)
      for (int v = 0; v < kVectors; v++) *reinterpret_cast<Stored*>(c + r * c_step + v * kWidth<A>) = sum[r][v];
  }
}

}  // namespace spg
