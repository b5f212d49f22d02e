// Loops over packs of constant size, a cache line of numbers each.
#pragma once

#include <cstdint>
#include <type_traits>

#include "memory.h"

namespace spg {

template <class T>
constexpr int kPack = 64 / sizeof(T);

// Calls body(j, count) so that all of [0, n) is covered, here and there twice; count is a constant.
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

// Calls body(j, count) so that all of [0, n) is covered once, by packs and what is left of one. In whole packs count is
// a constant if it is `worth` the time to compile the body twice.
template <class T, bool worth, class Body>
SPG_INLINE void in_packs_and_rest(int64_t n, const Body& body) {
  int64_t j = 0;
  if constexpr (worth)
    for (; j + kPack<T> <= n; j += kPack<T>) body(j, std::integral_constant<int, kPack<T>>());
  for (; j < n; j += kPack<T>) body(j, int(n - j < kPack<T> ? n - j : kPack<T>));
}

}  // namespace spg
