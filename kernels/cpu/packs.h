// Loops over packs. A pack has a constant number of values, which fill one cache line.
#pragma once

#include <cstdint>
#include <type_traits>

#include "memory.h"

namespace spg {

template <class T>
constexpr int kPack = 64 / sizeof(T);

// Calls body(j, count) such that [0, n) is covered; some positions may be covered twice. `count` is a constant.
template <class T, class Body>
SPG_INLINE void in_packs(int64_t n, const Body& body) {
  int64_t j = 0;
  for (; j + kPack<T> <= n; j += kPack<T>) body(j, std::integral_constant<int, kPack<T>>());
  if (j == n) return;
  if (n >= kPack<T>) return body(n - kPack<T>, std::integral_constant<int, kPack<T>>());
  for (; j + 16 <= n; j += 16) body(j, std::integral_constant<int, 16>());
  for (; j + 4 <= n; j += 4) body(j, std::integral_constant<int, 4>());
  for (; j < n; j++) body(j, std::integral_constant<int, 1>());
}

// Calls body(j, count) such that [0, n) is covered exactly once, by whole packs and a remainder. If `worth`, the body
// is compiled twice, so that `count` is a constant for whole packs.
template <class T, bool worth, class Body>
SPG_INLINE void in_packs_and_rest(int64_t n, const Body& body) {
  int64_t j = 0;
  if constexpr (worth)
    for (; j + kPack<T> <= n; j += kPack<T>) body(j, std::integral_constant<int, kPack<T>>());
  for (; j < n; j += kPack<T>) body(j, int(n - j < kPack<T> ? n - j : kPack<T>));
}

}  // namespace spg
