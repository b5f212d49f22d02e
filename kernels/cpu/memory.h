// Large results are mostly new memory. Half of the time for filling it is spent on page faults of 4 KiB pages.
// Requesting huge pages (on Linux, if they are available on request) makes this several times as fast.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef __SSE2__
#include <immintrin.h>
#endif

#define SPG_INLINE inline __attribute__((always_inline))

namespace spg {

inline void will_fill(void* p, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + bytes) / kPage * kPage;
  if (end > begin + kPage) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint, which may fail
#else
  (void)p, (void)bytes;
#endif
}

// Returns whether a result of this number of bytes is written with non-temporal stores, which bypass the caches. It
// does not fit into the caches anyway, and a normal store first reads the cache line from memory: 3 transfers instead
// of 2.
inline bool past_caches(size_t bytes) {
#ifdef __SSE2__
  return bytes >= size_t(4) << 20;
#else
  return (void)bytes, false;  // compilers have no such instruction for this processor
#endif
}

// Copies from[0, n) to to[0, n). The size is constant and should be a whole number of cache lines. With `past`, the
// cache lines that are not shared with other stores are written with non-temporal stores.
template <int n, class T>
SPG_INLINE void put(T* to, const T* from, bool past) {
#ifdef __SSE2__
  if constexpr (n * sizeof(T) % 64 == 0) {
    if (past && reinterpret_cast<uintptr_t>(to) % 64 == 0) {
#pragma GCC unroll 8
      for (size_t i = 0; i < n * sizeof(T) / 64; i++) {
        char* line = reinterpret_cast<char*>(to) + 64 * i;
        const char* values = reinterpret_cast<const char*>(from) + 64 * i;
#if defined(__AVX512F__)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(line), _mm512_loadu_si512(values));
#elif defined(__AVX__)
        for (int k = 0; k < 64; k += 32)
          _mm256_stream_si256(reinterpret_cast<__m256i*>(line + k),
                              _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + k)));
#else
        for (int k = 0; k < 64; k += 16)
          _mm_stream_si128(reinterpret_cast<__m128i*>(line + k),
                           _mm_loadu_si128(reinterpret_cast<const __m128i*>(values + k)));
#endif
      }
      return;
    }
  }
#endif
  (void)past;
  std::memcpy(to, from, n * sizeof(T));
}

template <int n, class T>
SPG_INLINE void put(T* to, const T* from, std::integral_constant<int, n>, bool past) {
  put<n>(to, from, past);
}
template <class T>
SPG_INLINE void put(T* to, const T* from, int n, bool) {
  std::memcpy(to, from, n * sizeof(T));
}

// Makes the non-temporal stores of this thread visible to other threads.
inline void written() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

}  // namespace spg
