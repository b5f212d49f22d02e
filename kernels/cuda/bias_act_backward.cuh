// The backward pass of bias_act on the GPU in one pass over memory: dx = dz * scale with dz = dy f'(z), the sums of dz
// over the samples and pixels of each channel (for the bias) and over the channels of each pixel (for the noise), and
// the sums of dz * x over the pixels of each channel (for the scale). cpu/bias_act.cpp computes the same.
//
// Rows and columns are those of bias_act.cuh. A block processes a tile of one sample's matrix and writes one number for
// each row or column of its tile and each sum. If several tiles contribute to a gradient, a second kernel adds their
// numbers. The order of all additions is fixed, so that the bits are the same in every run.
#pragma once

#include "bias_act.cuh"

namespace spg {

// The largest number of steps in which a block processes its tile.
#ifdef SPG_SHIM
constexpr int kMostSteps = 3;  // small, so that tests execute several tiles
#else
constexpr int kMostSteps = 64;
#endif

constexpr int kWarp = 32;
constexpr int kRowSums = 512;  // the most sums of rows, one for each of their warps, that a block keeps
// Blocks per multiprocessor: fewer where threads hold the sums of many columns. Each of their threads waits for two
// packs at once, so that half of a multiprocessor's threads keep its memory busy.
template <class T, int N, bool column_products>
constexpr int kBackwardBlocks = N == 8 && column_products ? 3 : N > 1 || sizeof(T) == 8 ? 4 : kBiasActBlocks;

struct BiasActBackwardParams {
  BiasActParams p;  // g is dy, out is dx
  // Sums of dz and of dz * x over the pixels in a tile, [tiles, n, c], and of dz over the channels in it, [tiles, n,
  // inner], in the accumulating format. Each may be null.
  void *channels, *products, *pixels;
  int steps;
};

__device__ __forceinline__ int warps_of_row() { return blockDim.x > kWarp ? blockDim.x / kWarp : 1; }

// Adds a value over the threads of a warp that have the same row, and keeps the sum in `stage`. The width of a block is
// a power of two, and all its threads call this together.
template <class A, class Stage>
__device__ __forceinline__ void add_over_row(Stage& stage, int row_of_tile, A value) {
#pragma unroll
  for (unsigned lanes = kWarp / 2; lanes; lanes /= 2) {
    const A other = __shfl_xor_sync(0xffffffff, value, lanes);
    if (lanes < blockDim.x) value += other;  // without a branch, as the shuffle is not conditional
  }
  if (threadIdx.x % kWarp) return;
  Pack<A, 1> pack{{value}};
  SPG_STORE_PACK(stage, row_of_tile * warps_of_row() + int(threadIdx.x) / kWarp, pack, 1);
}

// Adds the sums of the warps of each row, and writes those of the tile's rows.
template <class A, class Stage>
__device__ __forceinline__ void write_row_sums(Stage& stage, int rows, A* out) {
  __syncthreads();
  const int warps = warps_of_row();
#pragma unroll 1
  for (int row = threadIdx.y * blockDim.x + threadIdx.x; row < rows; row += kBiasActThreads) {
    A sum = 0;
    for (int warp = 0; warp < warps; warp++) sum += stage[row * warps + warp];
    out[row] = sum;
  }
}

// Adds the N values of each thread over the threads of the same columns, and writes the sums of the block's columns.
template <int N, class A, class Stage>
__device__ __forceinline__ void write_column_sums(Stage& stage, const A* values, A* out, int columns) {
  constexpr int V = N < kFull<A> ? N : kFull<A>;
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, width = blockDim.x * N;
#pragma unroll
  for (int i = 0; i < N; i += V) {
    Pack<A, V> pack;
#pragma unroll
    for (int j = 0; j < V; j++) pack.v[j] = values[i + j];
    SPG_STORE_PACK(stage, thread * N + i, pack, V);
  }
  __syncthreads();
#pragma unroll 1
  for (int column = thread; column < width && column < columns; column += kBiasActThreads) {
    A sum = 0;
    for (int y = 0; y < int(blockDim.y); y++) sum += stage[y * width + column];
    out[column] = sum;
  }
  __syncthreads();  // all threads must be done before the next sums overwrite these
}

// A thread has N neighbouring columns and, in each step, one row. Sums other than those for the bias are computed only
// if `every`. In NCHW without `every`, the steps of a thread are parts of the same row, so that a tile has few sums.
template <class T, template <class> class F, int N, bool channels_last, bool every>
__global__ void __launch_bounds__(kBiasActThreads, (kBackwardBlocks<T, N, channels_last && every>))
    bias_act_backward_kernel(BiasActBackwardParams b) {
  using A = typename Accumulator<T>::type;
  constexpr bool along_row = !channels_last && !every;
  SPG_SHARED(A, row_sums, channels_last && !every ? 1 : kRowSums, 1);
  SPG_SHARED(A, row_products, channels_last || !every ? 1 : kRowSums, 1);
  SPG_SHARED(A, column_stage, kBiasActThreads * N, kFull<A>);
  const BiasActParams& p = b.p;
  const F<A> f(p.act);
  const A gain = A(p.gain), clamp = A(p.clamp);
  const A *bias = static_cast<const A*>(p.bias), *scale = static_cast<const A*>(p.scale);
  const A* noise = static_cast<const A*>(p.noise);
  A *channels = static_cast<A*>(b.channels), *products = every ? static_cast<A*>(b.products) : nullptr;
  A* pixels = every ? static_cast<A*>(b.pixels) : nullptr;
  const int64_t n = blockIdx.z;
  const int tile_row = channels_last ? blockIdx.x : blockIdx.y, tile_column = channels_last ? blockIdx.y : blockIdx.x;
  const int tile_rows = int(blockDim.y) * (along_row ? 1 : b.steps), first_row = tile_row * tile_rows;
  const int first_column = tile_column * int(blockDim.x) * N * (along_row ? b.steps : 1);
  int column = first_column + threadIdx.x * N;
  A *along = channels_last ? pixels : channels, *down = channels_last ? channels : pixels;

  // What does not change in the steps, as far as there are registers for it.
  A factor[N], shift[N];
  fill<N>(factor, A(1));
  fill<N>(shift, A(0));
  const A* shifts = channels_last ? bias : noise ? noise + n * p.noise_stride : nullptr;  // of columns
  constexpr bool shift_in_steps = along_row || (channels_last && every);
  if (column < p.columns) {
    if (channels_last && scale) load_values<N>(factor, scale + n * p.scale_stride + column);
    if (!shift_in_steps && shifts) load_values<N>(shift, shifts + column);
  }
  A column_sums[N], column_products[N], sum = 0, product = 0;
  fill<N>(column_sums, A(0));
  fill<N>(column_products, A(0));
#pragma unroll 1
  for (int step = 0; step < b.steps; step++) {
    const int row_of_tile = (along_row ? 0 : step * int(blockDim.y)) + threadIdx.y, row = first_row + row_of_tile;
    if (row < p.rows && column < p.columns) {
      A row_factor = 1, row_shift = 0;
      if (channels_last) {
        if (noise) row_shift = noise[n * p.noise_stride + row];
      } else {
        if (bias) row_shift = bias[row];
        if (scale) row_factor = scale[n * p.scale_stride + row];
      }
      if (shift_in_steps && shifts) load_values<N>(shift, shifts + column);
      const int64_t at = (n * p.rows + row) * p.columns + column;
      const Pack<T, N> x = load_pack<T, N>(static_cast<const T*>(p.x) + at);
      const Pack<T, N> dy = load_pack<T, N>(static_cast<const T*>(p.g) + at);
      Pack<T, N> dx;
#pragma unroll
      for (int i = 0; i < N; i++) {
        const A value = load(x.v[i]), by = channels_last ? factor[i] : row_factor;
        const A dz = derivative<kSlope>(f, value * by + (shift[i] + row_shift), A(load(dy.v[i])), A(0), gain, clamp);
        store(&dx.v[i], dz * by);
        sum += dz;
        product += dz * value;
        column_sums[i] += dz;
        column_products[i] += dz * value;
      }
      store_pack<T, N>(static_cast<T*>(p.out) + at, dx);
    }
    if (along_row) {
      column += blockDim.x * N;
      continue;
    }
    if (along) add_over_row(row_sums, row_of_tile, sum);
    if (!channels_last && products) add_over_row(row_products, row_of_tile, product);
    sum = product = 0;
  }
  const int64_t row_at = (tile_column * int64_t(p.n) + n) * p.rows + first_row;
  const int rows = p.rows - first_row < tile_rows ? p.rows - first_row : tile_rows;
  if (along_row && along) add_over_row(row_sums, threadIdx.y, sum);
  if (along) write_row_sums(row_sums, rows, along + row_at);
  if (!channels_last && products) write_row_sums(row_products, rows, products + row_at);
  const int64_t column_at = (tile_row * int64_t(p.n) + n) * p.columns + first_column;
  if (down) write_column_sums<N>(column_stage, column_sums, down + column_at, p.columns - first_column);
  if (channels_last && products)
    write_column_sums<N>(column_stage, column_products, products + column_at, p.columns - first_column);
}

// Adds the numbers of tiles: to[i] is the sum over the `parts` of from[part, i], with `count` values each.
struct BiasActSum {
  const void* from;
  void* to;
  int64_t parts, count;
  int lanes;  // threads that share a sum, a power of two
};
struct BiasActSums {
  BiasActSum sums[3];
};

template <class A>
__global__ void __launch_bounds__(kBiasActThreads, kBiasActBlocks) bias_act_sums(BiasActSums p) {
  SPG_SHARED(A, stage, kBiasActThreads, 1);
  // With an index, the compiler would copy the parameters to local memory.
  const BiasActSum job = blockIdx.y == 0 ? p.sums[0] : blockIdx.y == 1 ? p.sums[1] : p.sums[2];
  const int width = kBiasActThreads / job.lanes, thread = threadIdx.x, lane = thread / width;
  const int64_t begin = int64_t(blockIdx.x) * width, i = begin + thread % width;
  if (begin >= job.count) return;
  Pack<A, 1> sum{{0}};
  if (i < job.count) {
#pragma unroll 8
    for (int64_t part = lane; part < job.parts; part += job.lanes)
      sum.v[0] += static_cast<const A*>(job.from)[part * job.count + i];
  }
  SPG_STORE_PACK(stage, thread, sum, 1);
  for (int half = job.lanes / 2; half; half /= 2) {
    __syncthreads();
    if (lane >= half) continue;
    sum.v[0] += stage[thread + half * width];
    SPG_STORE_PACK(stage, thread, sum, 1);
  }
  if (lane == 0 && i < job.count) static_cast<A*>(job.to)[i] = sum.v[0];
}

}  // namespace spg
