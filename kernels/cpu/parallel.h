// Parallel loops on PyTorch's own threads. A second thread pool would compete with them for the cores.
#pragma once

#include <cstdint>
#include <new>

#include "memory.h"

#ifdef SPG_ATEN_PARALLEL  // torch before 2.10: the same function through its C++ headers, slower to compile
#include <ATen/Parallel.h>
#else
extern "C" int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain, void (*f)(int64_t, int64_t, void*),
                                      void* context);
#endif

namespace spg {

// Calls f(task) for every task in [0, tasks), at least `grain` tasks on each thread. Tasks must be independent of each
// other, so that results do not depend on the number of threads. Throws std::bad_alloc if a task did.
template <class F>
void parallel_for(int64_t tasks, int64_t grain, const F& f) {
#ifdef SPG_ATEN_PARALLEL
  at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) f(i);
    written();
  });
#else
  auto range = [](int64_t begin, int64_t end, void* context) {
    for (int64_t i = begin; i < end; i++) (*static_cast<const F*>(context))(i);
    written();
  };
  // Exceptions do not pass through this function, which returns an error instead; tasks throw nothing else.
  if (torch_parallel_for(0, tasks, grain, range, const_cast<F*>(&f))) throw std::bad_alloc();
#endif
}

}  // namespace spg
