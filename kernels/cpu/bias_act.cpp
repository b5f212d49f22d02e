// bias_act on the CPU, in one pass over memory: y = clamp(act(x * scale + noise + bias) * gain), its derivatives, and
// the backward pass of training, which computes the derivative together with the sums for the gradients of bias, scale
// and noise. Every function computes z = x * scale + noise + bias again, because this is faster than storing it.

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <vector>

#include "memory.h"
#include "numbers.h"
#include "packs.h"
#include "parallel.h"

namespace spg {
namespace {

enum Act : int { kLinear, kRelu, kLrelu, kTanh, kSigmoid, kElu, kSelu, kSoftplus, kSwish, kActs };
enum Order : int { kValue, kSlope, kCurvature };

constexpr int64_t kChunk = 4096;  // values that one task processes: a part of a plane, or all channels of some pixels
constexpr int64_t kSummed = 8 * kChunk;  // the same if pixels are also summed, because each task writes a row of sums
constexpr int64_t kKept = int64_t(1) << 19;  // if there are at most so many sums of a kind, a thread keeps their memory between calls

// linear, relu and lrelu consist of two straight lines that meet at 0. The code has no branches, because a single one
// would prevent the vectorisation of loops in the backward pass, which also compute sums.
template <class A>
struct Straight {
  static constexpr bool kQuick = true;  // memory limits the speed, not arithmetic
  A slope;  // the slope below 0; for relu it is not exactly 0, so that relu(-inf) is 0 and not NaN
  A value(A z) const { return z < 0 ? z * slope : z; }
  A derivative(A z) const { return z > 0 ? A(1) : slope; }
};
template <class A>
struct Rectified {
  static constexpr bool kQuick = true;
  A value(A z) const { return z < 0 ? A(0) : z; }
  A derivative(A z) const { return z > 0 ? A(1) : A(0); }
};

// The other activations, element by element, and the second derivatives of all activations. Those of straight lines
// need not be fast.
template <class A>
struct Curved {
  static constexpr bool kQuick = false;
  int act;
  static constexpr A kScale = A(1.0507009873554804934193349852946), kAlpha = A(1.6732632423543772848170429916717);

  static A sigmoid(A z) { return 1 / (1 + std::exp(-z)); }
  A value(A z) const {
    switch (act) {
      case kLinear: return z;
      case kRelu: return z < 0 ? A(0) : z;
      case kLrelu: return z < 0 ? z * A(0.2) : z;
      case kTanh: return std::tanh(z);
      case kSigmoid: return sigmoid(z);
      case kElu: return z > 0 ? z : std::expm1(z);
      case kSelu: return kScale * (z > 0 ? z : kAlpha * std::expm1(z));
      case kSoftplus: return z > 20 ? z : std::log1p(std::exp(z));
      default: return z * sigmoid(z);
    }
  }
  A derivative(A z) const {
    const A p = sigmoid(z), t = act == kTanh ? std::tanh(z) : A(0);
    switch (act) {
      case kTanh: return 1 - t * t;
      case kSigmoid: return p * (1 - p);
      case kElu: return z > 0 ? A(1) : std::exp(z);
      case kSelu: return kScale * (z > 0 ? A(1) : kAlpha * std::exp(z));
      case kSoftplus: return p;
      default: return p * (1 + z * (1 - p));
    }
  }
  A curvature(A z) const {
    const A p = sigmoid(z), t = act == kTanh ? std::tanh(z) : A(0);
    switch (act) {
      case kLinear: case kRelu: case kLrelu: return 0;
      case kTanh: return -2 * t * (1 - t * t);
      case kSigmoid: return p * (1 - p) * (1 - 2 * p);
      case kElu: return z > 0 ? A(0) : std::exp(z);
      case kSelu: return z > 0 ? A(0) : kScale * kAlpha * std::exp(z);
      case kSoftplus: return p * (1 - p);
      default: return p * (1 - p) * (2 + z * (1 - 2 * p));
    }
  }
};

// Computes one element: for order 0 the output, for order 1 g times the derivative, for order 2 g * h times the second
// derivative. The derivatives of clamped values are 0.
template <int order, class F, class A>
inline A element(const F& f, A z, A g, A h, A gain, A clamp) {
  A y = f.value(z) * gain;
  if constexpr (order == kValue) {
    y = y < -clamp ? -clamp : y;  // with this comparison NaN stays NaN
    return y > clamp ? clamp : y;
  }
  A slope;
  if constexpr (order == kCurvature) slope = h * f.curvature(z);
  else slope = f.derivative(z);
  const A out = g * gain * slope;
  return std::abs(y) > clamp ? A(0) : out;
}

template <class A>
struct Args {
  int64_t n, c, inner;            // channels_last: for each n, `inner` pixels of c values; otherwise c planes of `inner` values
  const A *bias, *scale, *noise;  // [c], [n or 1, c], [n or 1, inner]; noise may be missing
  int64_t scale_stride, noise_stride;  // the distances of samples: c and inner, or 0 if all samples share the values
  A gain, clamp;
  bool channels_last;

  int64_t chunk = kChunk;

  // The inner values of one task. There may be no channels.
  int64_t each() const { return channels_last ? std::max<int64_t>(1, chunk / std::max<int64_t>(1, c)) : kChunk; }
  int64_t chunks() const { return (inner + each() - 1) / each(); }
};

template <class A, int n>
A added(const A (&lanes)[n]) {
  A sum = 0;
  for (A lane : lanes) sum += lane;
  return sum;
}

inline int64_t grain_for(int64_t work) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(work, 1)); }

template <int order, class F, class T, class A>
void planes(const F& shared, const T* x, const T* g, const T* h, T* out, const Args<A>& a) {
  const int64_t chunks = a.chunks();
  const bool past = past_caches(sizeof(T) * a.n * a.c * a.inner);
  parallel_for(a.n * a.c * chunks, grain_for(std::min(a.inner, kChunk)), [&](int64_t task) {
    const F f = shared;  // a local copy, which no store can alias, so that it stays in registers
    const int64_t plane = task / chunks, n = plane / a.c, c = plane % a.c, begin = task % chunks * kChunk;
    const int64_t length = std::min(kChunk, a.inner - begin), at = plane * a.inner + begin;
    const A bias = a.bias[c], scale = a.scale[n * a.scale_stride + c], gain = a.gain, clamp = a.clamp;
    const T *__restrict px = x + at, *__restrict pg = g + at, *__restrict ph = h + at;
    auto run = [&](auto shift) {
      in_packs_and_rest<T, F::kQuick>(length, [&](int64_t j, auto count) {
        T v[kPack<T>];
#pragma omp simd
        for (int i = 0; i < count; i++)
          store(v + i, element<order>(f, load(px[j + i]) * scale + shift(j + i),
                                      order >= kSlope ? A(load(pg[j + i])) : A(0),
                                      order == kCurvature ? A(load(ph[j + i])) : A(0), gain, clamp));
        put(out + at + j, v, count, past);
      });
    };
    const A* const noise = a.noise ? a.noise + n * a.noise_stride + begin : nullptr;
    if constexpr (!F::kQuick) run([=](int64_t i) { return noise ? noise[i] + bias : bias; });
    else if (noise) run([=](int64_t i) { return noise[i] + bias; });
    else run([=](int64_t) { return bias; });
  });
}

template <int order, class F, class T, class A>
void pixels(const F& shared, const T* x, const T* g, const T* h, T* out, const Args<A>& a) {
  const int64_t each = a.each(), chunks = a.chunks();
  const bool past = past_caches(sizeof(T) * a.n * a.c * a.inner);
  parallel_for(a.n * chunks, grain_for(std::min(a.inner, each) * a.c), [&](int64_t task) {
    const F f = shared;  // a local copy, which no store can alias, so that it stays in registers
    const int64_t n = task / chunks, begin = task % chunks * each, end = std::min(begin + each, a.inner);
    const A gain = a.gain, clamp = a.clamp;
    const A *__restrict bias = a.bias, *__restrict scale = a.scale + n * a.scale_stride;
    for (int64_t pixel = begin; pixel < end; pixel++) {
      const A noise = a.noise ? a.noise[n * a.noise_stride + pixel] : A(0);
      const int64_t at = (n * a.inner + pixel) * a.c;
      const T *__restrict px = x + at, *__restrict pg = g + at, *__restrict ph = h + at;
      in_packs_and_rest<T, F::kQuick>(a.c, [&](int64_t j, auto count) {
        T v[kPack<T>];
#pragma omp simd
        for (int i = 0; i < count; i++)
          store(v + i, element<order>(f, load(px[j + i]) * scale[j + i] + (noise + bias[j + i]),
                                      order >= kSlope ? A(load(pg[j + i])) : A(0),
                                      order == kCurvature ? A(load(ph[j + i])) : A(0), gain, clamp));
        put(out + at + j, v, count, past);
      });
    }
  });
}

// The backward pass: dx = dz * scale; the sums of dz (for the bias) and of dz * x (for the scale) over each chunk, each
// [n, chunks, c]; and the sum of dz over the channels, [n, inner] (for the noise, or null). Chunks have a fixed size,
// so that the order of summation, and therefore the bits of the sums, do not depend on the number of threads.
template <class F, class T, class A>
void backward_planes(const F& shared, const T* dy, const T* x, T* dx, A* sums, A* products, A* over_channels,
                     const Args<A>& a) {
  const int64_t chunks = a.chunks();
  const bool past = past_caches(sizeof(T) * a.n * a.c * a.inner);
  parallel_for(a.n * chunks, grain_for(std::min(a.inner, kChunk) * a.c), [&](int64_t task) {
    const F f = shared;  // a local copy, which no store can alias, so that it stays in registers
    const int64_t n = task / chunks, begin = task % chunks * kChunk, length = std::min(kChunk, a.inner - begin);
    A scratch[kChunk];
    A* __restrict total = over_channels ? over_channels + n * a.inner + begin : scratch;
    std::fill(total, total + length, A(0));
    for (int64_t c = 0; c < a.c; c++) {
      const int64_t at = (n * a.c + c) * a.inner + begin;
      const A bias = a.bias[c], scale = a.scale[n * a.scale_stride + c], gain = a.gain, clamp = a.clamp;
      const T *__restrict px = x + at, *__restrict pg = dy + at;
      A sum[kPack<T>] = {}, product[kPack<T>] = {};
      auto run = [&](auto shift, auto add) {
        in_packs_and_rest<T, F::kQuick>(length, [&](int64_t j, auto count) {
          T v[kPack<T>];
#pragma omp simd
          for (int i = 0; i < count; i++) {
            const A value = load(px[j + i]);
            const A dz = element<kSlope>(f, value * scale + shift(j + i), A(load(pg[j + i])), A(0), gain, clamp);
            store(v + i, dz * scale);
            sum[i] += dz;
            product[i] += dz * value;
            add(j + i, dz);
          }
          put(dx + at + j, v, count, past);
        });
      };
      const A* const noise = a.noise ? a.noise + n * a.noise_stride + begin : nullptr;
      auto add = [=](int64_t i, A dz) { total[i] += dz; };
      if constexpr (!F::kQuick) run([=](int64_t i) { return noise ? noise[i] + bias : bias; }, add);
      else if (noise) run([=](int64_t i) { return noise[i] + bias; }, add);
      else run([=](int64_t) { return bias; }, [](int64_t, A) {});
      sums[task * a.c + c] = added(sum), products[task * a.c + c] = added(product);
    }
  });
}

template <class F, class T, class A>
void backward_pixels(const F& shared, const T* dy, const T* x, T* dx, A* sums, A* products, A* over_channels,
                     const Args<A>& a) {
  const int64_t each = a.each(), chunks = a.chunks();
  const bool past = past_caches(sizeof(T) * a.n * a.c * a.inner);
  parallel_for(a.n * chunks, grain_for(std::min(a.inner, each) * a.c), [&](int64_t task) {
    const F f = shared;  // a local copy, which no store can alias, so that it stays in registers
    const int64_t n = task / chunks, begin = task % chunks * each, end = std::min(begin + each, a.inner);
    const A gain = a.gain, clamp = a.clamp;
    const A *__restrict bias = a.bias, *__restrict scale = a.scale + n * a.scale_stride;
    A *__restrict s = sums + task * a.c, *__restrict p = products + task * a.c;
    std::fill(s, s + a.c, A(0));
    std::fill(p, p + a.c, A(0));
    for (int64_t pixel = begin; pixel < end; pixel++) {
      const A noise = a.noise ? a.noise[n * a.noise_stride + pixel] : A(0);
      const int64_t at = (n * a.inner + pixel) * a.c;
      const T *__restrict px = x + at, *__restrict pg = dy + at;
      A total[kPack<T>] = {};
      in_packs_and_rest<T, F::kQuick>(a.c, [&](int64_t j, auto count) {
        T v[kPack<T>];
#pragma omp simd
        for (int i = 0; i < count; i++) {
          const A value = load(px[j + i]), shift = noise + bias[j + i];
          const A dz = element<kSlope>(f, value * scale[j + i] + shift, A(load(pg[j + i])), A(0), gain, clamp);
          store(v + i, dz * scale[j + i]);
          s[j + i] += dz;
          p[j + i] += dz * value;
          total[i] += dz;
        }
        put(dx + at + j, v, count, past);
      });
      if (over_channels) over_channels[n * a.inner + pixel] = added(total);
    }
  });
}

// Computes out[groups, c], the sums over the `rows` rows of c values of each group.
template <class A>
void add_rows(const A* from, A* out, int64_t groups, int64_t rows, int64_t c) {
  std::vector<double> sums(c);
  for (int64_t g = 0; g < groups; g++, out += c) {
    std::fill(sums.begin(), sums.end(), 0.0);
    double* __restrict s = sums.data();
    for (int64_t r = 0; r < rows; r++, from += c)
#pragma omp simd
      for (int64_t i = 0; i < c; i++) s[i] += from[i];
    std::copy(sums.begin(), sums.end(), out);
  }
}

template <class A, class G>
void with_activation(int act, const G& run) {
  if (act == kRelu) run(Rectified<A>());
  else if (act <= kLrelu) run(Straight<A>{act == kLinear ? A(1) : A(0.2)});
  else run(Curved<A>{act});
}

template <class G>
int with_dtype(int dtype, const G& run) {
  if (dtype == kFloat32) run(float());
  else if (dtype == kFloat64) run(double());
  else if (dtype == kBFloat16) run(bfloat16());
  else return -1;
  return 0;
}

}  // namespace
}  // namespace spg

// Computes out = f(z) for order 0, g f'(z) for order 1, and g h f''(z) for order 2. bias [c], scale [n or 1, c] and
// noise [n or 1, inner] have the accumulating format (float, or double for double); noise may be null. clamp < 0 means
// no clamp. Returns 0, or -1 if there is no kernel for the number format.
SPG_API int spg_bias_act_cpu(int dtype, int act, int order, const void* x, const void* g, const void* h, void* out,
                                int64_t n, int64_t c, int64_t inner, int channels_last, const void* bias,
                                const void* scale, int64_t scale_stride, const void* noise, int64_t noise_stride,
                                double gain, double clamp) {
  using namespace spg;
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = typename Accumulator<T>::type;
    if (n * c * inner == 0) return;
    will_fill(out, size_t(n * c * inner) * sizeof(T));
    const Args<A> a{n, c, inner, (const A*)bias, (const A*)scale, (const A*)noise, scale_stride, noise_stride, A(gain),
                    clamp < 0 ? std::numeric_limits<A>::infinity() : A(clamp), channels_last != 0};
    auto elementwise = [&](auto order_, const auto& f) {
      constexpr int k = decltype(order_)::value;
      if (channels_last) pixels<k>(f, (const T*)x, (const T*)g, (const T*)h, (T*)out, a);
      else planes<k>(f, (const T*)x, (const T*)g, (const T*)h, (T*)out, a);
    };
    if (order == kCurvature) return elementwise(std::integral_constant<int, kCurvature>(), Curved<A>{act});
    with_activation<A>(act, [&](const auto& f) {
      if (order == kValue) elementwise(std::integral_constant<int, kValue>(), f);
      else elementwise(std::integral_constant<int, kSlope>(), f);
    });
  });
}

// Computes dx, in the format of x, and dbias [c], dscale [n, c] and dnoise [n, inner] in the accumulating format. Each
// of these three may be null; dnoise must be null if there is no noise. Returns -2 if there is no memory for partial
// sums.
SPG_API int spg_bias_act_backward_cpu(int dtype, int act, const void* dy, const void* x, void* dx, void* dbias,
                                         void* dscale, void* dnoise, int64_t n, int64_t c, int64_t inner,
                                         int channels_last, const void* bias, const void* scale, int64_t scale_stride,
                                         const void* noise, int64_t noise_stride, double gain, double clamp) {
  using namespace spg;
  try {
    return with_dtype(dtype, [&](auto zero) {
      using T = decltype(zero);
      using A = typename Accumulator<T>::type;
      const Args<A> a{n, c, inner, (const A*)bias, (const A*)scale, (const A*)noise, scale_stride, noise_stride, A(gain),
                      clamp < 0 ? std::numeric_limits<A>::infinity() : A(clamp), channels_last != 0, kSummed};
      static thread_local std::vector<A> kept;
      const int64_t rows = n * a.chunks(), each = rows * c;
      // Returning memory to the system can take longer than the whole computation, so threads keep it up to a limit.
      std::vector<A> large;
      std::vector<A>& partial = each > kKept ? large : kept;
      if (partial.size() < size_t(2 * each)) partial.resize(2 * each);
      A *sums = partial.data(), *products = sums + each;
      if (n * c * inner == 0) {
        if (dnoise) std::fill_n((A*)dnoise, n * inner, A(0));
      } else {
        will_fill(dx, size_t(n * c * inner) * sizeof(T));
        with_activation<A>(act, [&](const auto& f) {
          auto* backward = channels_last ? backward_pixels<std::decay_t<decltype(f)>, T, A>
                                         : backward_planes<std::decay_t<decltype(f)>, T, A>;
          backward(f, (const T*)dy, (const T*)x, (T*)dx, sums, products, (A*)dnoise, a);
        });
      }
      if (dbias) add_rows(sums, (A*)dbias, 1, rows, c);
      if (dscale) add_rows(products, (A*)dscale, n, rows / std::max<int64_t>(1, n), c);
    });
  } catch (const std::bad_alloc&) {
    return -2;
  }
}
