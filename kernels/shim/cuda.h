// The part of CUDA that is needed to run the device code of this folder on a CPU and to check it. Compile with
// `g++ -x c++ -DSPG_SHIM cuda/*.cu`.
//
// Each thread of a block is a fibre with its own stack, and __syncthreads() switches to the next fibre. Threads run in
// forward, reverse or random order, to detect results that depend on the order. Shared memory records which threads
// have accessed each element since the last barrier. The shim reports races, accesses outside of an array, barriers
// and warp shuffles that some threads do not reach, unaligned packs, and shared memory that is read before it is
// written.
#pragma once

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using stream_t = void*;

struct half_t {
  _Float16 value;
};
struct bfloat16_t {
  uint16_t bits;
};
inline float __half2float(half_t x) { return float(x.value); }
inline half_t __float2half_rn(float x) { return {_Float16(x)}; }
inline float __bfloat162float(bfloat16_t x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline bfloat16_t __float2bfloat16_rn(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fff};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

namespace shim {

constexpr size_t kStack = 1 << 16;

struct Fibre {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  dim3 index;
  int number = 0, line = 0;  // the source line of the barrier or shuffle at which the fibre waits
  bool done = false, shuffles = false;
  double offered[2];  // what it gives to other threads in this shuffle and in the one before, which may still be read
};

struct Tracked {
  virtual ~Tracked() = default;
};

struct Machine {
  dim3 grid, block, block_index;
  std::vector<std::unique_ptr<Fibre>> fibres;
  Fibre* current = nullptr;
  ucontext_t scheduler;
  std::function<void()> kernel;
  std::map<int, std::unique_ptr<Tracked>> shared;  // the shared arrays of the block, by source line
  int epoch = 0;                                   // the number of barriers that the block has passed
  int shuffle = 0;                                 // the number of shuffles
  int64_t launches = 0;                            // the number of launched kernels
  int order = 0;                                   // 0 forward, 1 reverse, 2 random
  int64_t last_blocks = 0;                         // run only this number of blocks, the last of the grid; 0 for all
  std::mt19937 dice;
  std::string report;

  void complain(const std::string& what) {
    if (report.size() < 2000 && report.find(what) == std::string::npos) report += what + "\n";
  }
};

inline Machine machine;

// A shared array. Each element records its last writer, and its reader, or that it has had several readers.
template <class T>
struct Shared : Tracked {
  struct Account {
    int writer = -1, write_epoch = -1, reader = -1, read_epoch = -1;
  };
  std::vector<T> values;
  std::vector<Account> accounts;
  int line;
  Shared(int64_t count, int line_) : values(count), accounts(count), line(line_) {}

  bool inside(int64_t i) {
    if (i >= 0 && i < int64_t(values.size())) return true;
    machine.complain("line " + std::to_string(line) + ": shared index out of bounds");
    return false;
  }
  T operator[](int64_t i) {
    if (!inside(i)) return T{};
    Account& a = accounts[i];
    const int me = machine.current->number;
    if (a.writer < 0) machine.complain("line " + std::to_string(line) + ": shared memory read before it is written");
    if (a.write_epoch == machine.epoch && a.writer != me)
      machine.complain("line " + std::to_string(line) + ": race, read of what another thread writes");
    a.reader = a.read_epoch == machine.epoch && a.reader != me ? -2 : me;
    a.read_epoch = machine.epoch;
    return values[i];
  }
  void put(int64_t i, T value) {
    if (!inside(i)) return;
    Account& a = accounts[i];
    const int me = machine.current->number;
    if (a.write_epoch == machine.epoch && a.writer != me)
      machine.complain("line " + std::to_string(line) + ": race, two threads write");
    if (a.read_epoch == machine.epoch && a.reader != me)
      machine.complain("line " + std::to_string(line) + ": race, write of what another thread reads");
    a.writer = me;
    a.write_epoch = machine.epoch;
    values[i] = value;
  }
};

template <class T>
Shared<T>& shared(int line, int64_t count) {
  auto& slot = machine.shared[line];
  if (!slot) slot = std::make_unique<Shared<T>>(count, line);
  return static_cast<Shared<T>&>(*slot);
}

inline void barrier(int line) {
  machine.current->line = line;
  machine.current->shuffles = false;
  swapcontext(&machine.current->context, &machine.scheduler);
}

// All threads of the block must call this together, although CUDA requires it only of a warp. It is no barrier for
// shared memory.
template <class T>
T shuffle_xor(int line, T value, unsigned lanes) {
  Machine& m = machine;
  const int slot = m.shuffle % 2, me = m.current->number;
  m.current->offered[slot] = double(value);
  m.current->line = line;
  m.current->shuffles = true;
  swapcontext(&m.current->context, &m.scheduler);
  const unsigned other = me ^ lanes;
  if (lanes >= 32 || other >= m.block.x * m.block.y * m.block.z) {
    m.complain("line " + std::to_string(line) + ": a shuffle with a thread that does not exist");
    return value;
  }
  return T(m.fibres[other]->offered[slot]);
}

inline void check_aligned(const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) machine.complain("a pack that is not aligned to its size");
}

inline void fibre_main() {
  machine.kernel();
  machine.current->done = true;
  swapcontext(&machine.current->context, &machine.scheduler);
}

inline std::vector<int64_t> sequence(int64_t count) {
  std::vector<int64_t> s(count);
  for (int64_t i = 0; i < count; i++) s[i] = machine.order == 1 ? count - 1 - i : i;
  if (machine.order == 2) std::shuffle(s.begin(), s.end(), machine.dice);
  return s;
}

inline void run_block(int threads) {
  Machine& m = machine;
  m.shared.clear();
  m.epoch = 0;
  while (int(m.fibres.size()) < threads) m.fibres.push_back(std::make_unique<Fibre>());
  for (int i = 0; i < threads; i++) {
    Fibre& f = *m.fibres[i];
    f.number = i;
    f.index = dim3(i % m.block.x, i / m.block.x % m.block.y, i / m.block.x / m.block.y);
    f.done = false;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, fibre_main, 0);
  }
  for (int waiting = threads; waiting;) {
    for (int64_t i : sequence(threads)) {
      if (m.fibres[i]->done) continue;
      m.current = m.fibres[i].get();
      swapcontext(&m.scheduler, &m.current->context);
    }
    waiting = 0;
    int line = 0;
    bool shuffles = false;
    for (int i = 0; i < threads; i++) {
      if (m.fibres[i]->done) continue;
      if (waiting++ && m.fibres[i]->line != line) m.complain("threads wait at different barriers");
      line = m.fibres[i]->line;
      shuffles = m.fibres[i]->shuffles;
    }
    if (waiting && waiting < threads)
      m.complain("line " + std::to_string(line) + ": a barrier that not all threads of the block reach");
    (shuffles ? m.shuffle : m.epoch)++;
  }
}

template <class K, class P>
int launch(K kernel, dim3 grid, dim3 block, const P& params) {
  Machine& m = machine;
  m.launches++;
  m.grid = grid;
  m.block = block;
  m.kernel = [=] { kernel(params); };
  const int threads = block.x * block.y * block.z;
  const int64_t blocks = int64_t(grid.x) * grid.y * grid.z;
  const int64_t chosen = m.last_blocks ? std::min(m.last_blocks, blocks) : blocks;
  for (int64_t i : sequence(chosen)) {
    i += blocks - chosen;
    m.block_index = dim3(unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y));
    run_block(threads);
  }
  return 0;
}

}  // namespace shim

#define threadIdx (shim::machine.current->index)
#define blockIdx (shim::machine.block_index)
#define blockDim (shim::machine.block)
#define gridDim (shim::machine.grid)
#define __syncthreads() shim::barrier(__LINE__)
#define __shfl_xor_sync(mask, value, lanes) shim::shuffle_xor(__LINE__, value, lanes)

#define SPG_SHARED(T, name, count, V) auto& name = shim::shared<T>(__LINE__, count)
#define SPG_STORE_PACK(array, index, pack, V) \
  for (int pack_i = 0; pack_i < V; pack_i++) (array).put((index) + pack_i, (pack).v[pack_i])
#define SPG_STORE_SHARED(array, index, value) (array).put(index, value)
#define SPG_CHECK_ALIGNED(p, bytes) shim::check_aligned(p, bytes)
#define SPG_LAUNCH(kernel, grid, block, stream, params) ((void)(stream), shim::launch(kernel, grid, block, params))
#define SPG_SET_DEVICE(device) ((void)(device), 0)

// Sets the order of threads and blocks for the following launches. The functions below return the number of launches so
// far, and return and clear the reports.
extern "C" __attribute__((visibility("default"))) inline void spg_shim_order(int order, unsigned seed) {
  shim::machine.order = order;
  shim::machine.dice.seed(seed);
}
extern "C" __attribute__((visibility("default"))) inline void spg_shim_last_blocks(int64_t count) {
  shim::machine.last_blocks = count;
}
extern "C" __attribute__((visibility("default"))) inline int64_t spg_shim_launches() { return shim::machine.launches; }
extern "C" __attribute__((visibility("default"))) inline int spg_shim_report(char* text, int size) {
  const int length = int(shim::machine.report.size());
  snprintf(text, size, "%s", shim::machine.report.c_str());
  shim::machine.report.clear();
  return length;
}
// Inline functions without a call are not emitted unless their addresses are taken.
__attribute__((used)) static void* const spg_shim_entries[] = {(void*)spg_shim_order, (void*)spg_shim_last_blocks,
                                                                (void*)spg_shim_launches, (void*)spg_shim_report};
