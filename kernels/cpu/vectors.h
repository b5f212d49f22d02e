// Vectors of numbers in registers, and their conversion to the stored formats.
#pragma once

#include <cstdint>
#include <cstring>

#include "memory.h"
#include "numbers.h"

namespace spg {

// A vector of one cache line. Compilers use several registers if those are smaller.
template <class A>
struct PackOf {
  typedef A type __attribute__((vector_size(64)));
};
template <class A>
using Pack = typename PackOf<A>::type;
template <class A>
constexpr int kLanes = 64 / sizeof(A);

typedef uint32_t PackBits __attribute__((vector_size(64)));
typedef uint16_t HalfBits __attribute__((vector_size(32)));

SPG_INLINE Pack<float> load_pack(const float* p) {
  Pack<float> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
SPG_INLINE Pack<double> load_pack(const double* p) {
  Pack<double> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
SPG_INLINE Pack<float> load_pack(const bfloat16* p) {
  HalfBits h;
  std::memcpy(&h, p, sizeof h);
  return (Pack<float>)(__builtin_convertvector(h, PackBits) << 16);
}

SPG_INLINE void store_pack(float* p, const Pack<float>& v) { std::memcpy(p, &v, sizeof v); }
SPG_INLINE void store_pack(double* p, const Pack<double>& v) { std::memcpy(p, &v, sizeof v); }
SPG_INLINE void store_pack(bfloat16* p, const Pack<float>& v) {  // rounds as `store`
  const PackBits bits = (PackBits)v, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const PackBits nan = (PackBits)((bits & 0x7fffffff) > 0x7f800000);
  const HalfBits h = __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), HalfBits);
  std::memcpy(p, &h, sizeof h);
}

// Loads the first `count` numbers of a pack; the others are zero.
template <class T>
SPG_INLINE auto load_pack(const T* p, int64_t count) {
  constexpr int kAll = sizeof(load_pack(p)) / sizeof(load_pack(p)[0]);
  if (count >= kAll) return load_pack(p);
  T some[kAll] = {};
  std::memcpy(some, p, count * sizeof(T));
  return load_pack(some);
}
template <class T, class P>
SPG_INLINE void store_pack(T* p, const P& v, int64_t count) {
  constexpr int kAll = sizeof(v) / sizeof(v[0]);
  if (count >= kAll) return store_pack(p, v);
  T some[kAll];
  store_pack(some, v);
  std::memcpy(p, some, count * sizeof(T));
}

}  // namespace spg
